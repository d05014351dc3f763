"""Small videos, made with PyAV itself."""

import functools
import io
import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import servers
from PIL import Image

RATE = 10  # frames a second
FOUR = ("red", "green", "blue", "yellow")
SILENT = (("x265-params", "log-level=none"), ("preset", "ultrafast"))
HASTY = (("deadline", "realtime"), ("cpu-used", "8"))  # else VP8 takes a second
PQ, HLG = 16, 18  # transfer functions, as ITU-T H.273 numbers them
BT2020 = ((0.6274, 0.3293, 0.0433), (0.0691, 0.9195, 0.0114), (0.0164, 0.0880, 0.8956))  # of sRGB


@functools.cache
def film(
    *colours: str,
    seconds: float = 8.0,
    codec: str = "libx264",
    kind: str = "mp4",
    size: tuple[int, int] = (160, 120),
    pixels: str = "yuv420p",
    aspect: Fraction | None = None,
    times: Sequence[int] = (),
    options: Sequence[tuple[str, str]] = (),
) -> bytes:
    """A video that shows one colour after the other, each for the same time.

    `times` are those of its frames in tenths of a second, if they are not evenly spread; `aspect`
    is that of a pixel.
    """
    shown = [Image.new("RGB", size, servers.COLOURS[colour]) for colour in colours or FOUR]
    moments = times or range(round(seconds * RATE))
    images = [shown[number * len(shown) // len(moments)] for number in range(len(moments))]
    like = {"pixels": pixels, "aspect": aspect, "times": moments, "options": options}
    return recorded(codec, kind, images, **like)


class Sparse:
    """A large file in memory, which keeps nothing of what is zero."""

    def __init__(self) -> None:
        self.written: dict[int, bytes] = {}
        self._at = self._size = 0

    def write(self, data: bytes) -> int:
        if bytes(data).strip(b"\0"):
            self.written[self._at] = bytes(data)
        self._at += len(data)
        self._size = max(self._size, self._at)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(self._size)
        found = bytearray(last - first)
        for at, data in self.written.items():
            begin, end = max(first, at), min(last, at + len(data))
            if begin < end:
                found[begin - first : end - first] = data[begin - at : end - at]
        return bytes(found)


@functools.cache
def large(*colours: str, seconds: int = 300, rate: int = 1, frame: int = 500_000) -> Sparse:
    """A video of which each frame is a picture of so many bytes; its index is at the end."""
    target = Sparse()
    with av.open(target, "w", format="mov") as container:
        stream: Any = container.add_stream("mjpeg", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        for number in range(seconds * rate):
            colour = colours[number * len(colours) // (seconds * rate)]
            picture = servers.picture(colour, size=(320, 240))
            packet = av.Packet(picture + bytes(frame - len(picture)))
            packet.stream, packet.time_base = stream, Fraction(1, rate)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, True
            container.mux(packet)
    return target


def boxes(film: bytes | Sparse) -> dict[bytes, slice]:
    """Where the outer boxes of an MP4 file are, by their names."""
    at, found = 0, {}
    while at < len(film):
        head = film[at : at + 16]
        size = int.from_bytes(head[:4])
        size = int.from_bytes(head[8:]) if size == 1 else size
        found[head[4:8]] = slice(at, at + size)
        at += size
    return found


def index_first(film: Sparse) -> Sparse:
    """The same video with its index at the front."""
    found, target = boxes(film), Sparse()
    index = bytearray(film[found[b"moov"]])
    at = index.index(b"stco") + 8  # the places of all chunks
    for entry in range(at + 4, at + 4 + 4 * int.from_bytes(index[at : at + 4]), 4):
        place = int.from_bytes(index[entry : entry + 4]) + len(index)
        index[entry : entry + 4] = place.to_bytes(4)
    begin, end = found[b"ftyp"].stop, found[b"moov"].start
    target.write(film[:begin])
    target.write(index)
    for at, data in film.written.items():
        part = data[max(begin - at, 0) : max(end - at, 0)]
        target.seek(max(begin, at) + len(index))
        target.write(part)
    target.seek(len(film) - 1)
    target.write(film[end - 1 : end])
    return target


def turned(film: bytes, degrees: int) -> bytes:
    """The same video, to be shown turned clockwise."""
    one, at = 0x10000, film.index(b"tkhd") + 44
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 0x40000000)
    return film[:at] + matrix + film[at + len(matrix) :]


@functools.cache
def hdr(transfer: int, *colours: tuple[float, float, float]) -> bytes:
    """A video in HDR, a second for each colour; 1 is as bright as white on paper, 203 nits."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx265", rate=RATE, options=dict(SILENT))
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p10le"
        for where in (stream.codec_context, frame := av.VideoFrame(128, 128, "yuv420p10le")):
            where.color_trc, where.color_primaries = transfer, 9
            where.colorspace, where.color_range = 9, 1
        for number in range(RATE * len(colours)):
            values = samples(transfer, colours[number // RATE])
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(round(value * 4).to_bytes(2, "little") * (plane.buffer_size // 2))
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def samples(transfer: int, colour: tuple[float, float, float]) -> tuple[float, float, float]:
    """Luma and chroma of a colour in HDR, in steps of eight bits."""
    light = [sum(w * c for w, c in zip(row, colour, strict=True)) for row in BT2020]
    r, g, b = map(pq if transfer == PQ else hlg(light), light)
    luma = 0.2627 * r + 0.678 * g + 0.0593 * b
    return (luma * 219 + 16, (b - luma) / 1.8814 * 224 + 128, (r - luma) / 1.4746 * 224 + 128)


def pq(light: float) -> float:
    """The signal of SMPTE ST 2084 for this light."""
    power = (max(light, 0.0) * 203 / 10_000) ** (2610 / 16384)
    return ((3424 + 2413 * 32 * power) / (4096 + 2392 * 32 * power)) ** (2523 / 32)


def hlg(light: Sequence[float]) -> Callable[[float], float]:
    """What gives the signal of ARIB STD-B67 for a part of this light, on a screen of 1,000 nits."""
    whole = 0.203 * sum(w * c for w, c in zip((0.2627, 0.678, 0.0593), light, strict=True))

    def signal(part: float) -> float:
        scene = max(part, 0.0) * 0.203 * whole ** (1 / 1.2 - 1)
        if scene <= 1 / 12:
            return math.sqrt(3 * scene)
        return 0.17883277 * math.log(12 * scene - 0.28466892) + 0.55991073

    return signal


@functools.cache
def corners() -> bytes:
    """A video whose upper corners are red and green, its lower ones blue and yellow."""
    image = Image.new("RGB", (160, 120))
    for number, colour in enumerate(FOUR):
        part = Image.new("RGB", (80, 60), servers.COLOURS[colour])
        image.paste(part, (number % 2 * 80, number // 2 * 60))
    return recorded("libx264", "mp4", [image] * 40)


def recorded(
    codec: str,
    kind: str,
    images: Sequence[Image.Image],
    target: Any = None,
    *,
    pixels: str = "yuv420p",
    aspect: Fraction | None = None,
    times: Sequence[int] = (),
    options: Sequence[tuple[str, str]] = (),
) -> bytes:
    """A video of these pictures, ten a second unless `times` tells."""
    kept = io.BytesIO()
    with av.open(target or kept, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=RATE, options=dict(options))
        stream.width, stream.height = images[0].size
        stream.pix_fmt = pixels
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for moment, image in zip(times or range(len(images)), images, strict=True):
            frame = av.VideoFrame.from_image(image)
            frame.pts = moment
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return kept.getvalue()


class Live:
    """A target that cannot go back, as a video is recorded that does not know how long it is."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


@functools.cache
def endless(kind: str, codec: str = "libx264") -> bytes:
    """A video of four colours that does not say how long it lasts."""
    target = Live()
    images = [Image.new("RGB", (160, 120), servers.COLOURS[c]) for c in FOUR for _ in range(20)]
    recorded(codec, kind, images, target)
    return bytes(target.data)


@functools.cache
def tone() -> bytes:
    """A sound without a picture."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        for number in range(20):
            frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            frame.planes[0].update(bytes(4096))
            frame.rate, frame.pts = 8000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()
