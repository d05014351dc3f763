"""The files of videos: how they are fetched, and what is made of them."""

import contextlib
import functools
import io
import itertools
import os
import random
import re
import subprocess
import sys
import threading
from fractions import Fraction
from unittest.mock import Mock

import av
import films
import pytest
import sandbox
import servers
from films import film
from PIL import Image
from servers import CUT, HANG, RESET, Reply, Stream
from worlds import NO_PAUSE, SqlWorld, asking, others_long

import immich_analyze as ia

pytestmark = pytest.mark.slow

FOUR = list(films.FOUR)
STILL = servers.picture("gray")
PHOTO = servers.picture("pink")
PLAYBACK = ("GET", "/video/playback")
FORBIDDEN = {"message": "Forbidden", "statusCode": 403}


@pytest.fixture
def described(command, ollama):
    """Describes videos by their names, and a photo beside them; what was shown of each."""

    def run(library, videos, *argv):
        ids = {
            name: library.add(
                name, type="VIDEO", picture=STILL, **(v if isinstance(v, dict) else {"film": v})
            )
            for name, v in videos.items()
        }
        photo = library.add(picture=PHOTO)
        done = command(*library.argv, *asking(ollama), "--videos", *argv)
        assert done.returncode == 0
        assert library.texts()[photo] == servers.told(PHOTO)
        if not ids:
            return done.stderr
        lines = done.stderr.removeprefix(ia.t("no_lock") + "\n").splitlines()
        texts, shown = library.texts(), {}
        for name, id in ids.items():
            shown[name] = next(s for s in ollama.shown if servers.told(s[0]) == texts[id])
            said = [line for line in lines if id in line]
            beginning = ia.t("video_still", name=name, id=id, why="")
            assert len(said) == (shown[name] == [STILL])
            assert all(line.startswith(beginning) and line != beginning for line in said)
        assert len(lines) == list(shown.values()).count([STILL])
        return shown

    return run


def colours(pictures):
    return [servers.colour_of(picture) for picture in pictures]


def sizes(pictures):
    return {Image.open(io.BytesIO(picture)).size for picture in pictures}


# --- Immich's API ----------------------------------------------------------------------------


def part(exchange):
    """The bytes of a video that were asked for."""
    unit, _, bounds = exchange.headers["Range"].partition("=")
    first, last = map(int, bounds.split("-"))
    assert unit == "bytes"
    return last - first + 1


@pytest.mark.parametrize("index", ["front", "end"])
def test_little_of_a_large_video_is_fetched(api, immich, described, index):
    large = films.large(*FOUR)
    shown = described(api, {"a.mp4": films.index_first(large) if index == "front" else large})
    assert colours(shown["a.mp4"]) == FOUR
    fetched = immich.find(*PLAYBACK)
    assert len(fetched) <= 60
    assert sum(map(part, fetched)) <= 20_000_000
    assert len({exchange.headers["Range"] for exchange in fetched}) == len(fetched)
    for exchange in fetched:
        assert exchange.headers["x-api-key"] == immich.key
        assert immich.key not in exchange.target


@pytest.mark.measured
@pytest.mark.parametrize(
    ("frame", "most"), [(1_000_000, 5_000_000), (100_000, 2_000_000), (1_000_000, 2_000_000)]
)
def test_a_video_is_given_up_before_much_of_it_is_fetched(api, immich, described, frame, most):
    seconds = most * 20 // frame if most > 2_000_000 else 30
    described(api, {"a.mp4": films.large(*FOUR, seconds=seconds, frame=frame)})
    assert sum(map(part, immich.find(*PLAYBACK))) <= most


def test_a_small_video_is_fetched_once(api, immich, described):
    described(api, {"a.mp4": film()})
    assert len(immich.find(*PLAYBACK)) == 1


def trickle(data, pause):
    """Send a few bytes at a time."""
    never = threading.Event()
    for at in range(0, len(data), 2000):
        yield data[at : at + 2000]
        never.wait(pause)


def without_ranges(exchange):
    return Reply(200, film(), {"Content-Type": "video/mp4"})


def ranged(what, data=None):
    return Reply(206, film() if data is None else data, {"Content-Range": what})


def later(reply):
    """Answer requests as usual for the beginning alone."""
    return lambda chat: None if "bytes=0-" in chat.headers["Range"] else reply


SPREAD = functools.partial(films.large, *FOUR, seconds=60, frame=200_000)
MISBEHAVING = {  # and whether its frames can be had all the same
    "ignores ranges": (without_ranges, True),
    "416": (Reply(416, {"message": "Range Not Satisfiable"}), False),
    "404": (Reply(404, {"message": "Asset media not found", "statusCode": 404}), False),
    "403": (Reply(403, FORBIDDEN), False),
    "500": (Reply(500, {"message": "Internal server error"}), False),
    "page": (Reply(200, "<html>Log in</html>", {"Content-Type": "text/html"}), False),
    "empty": (Reply(206, b"", {"Content-Range": "bytes 0-0/0"}), False),
    "cut": (CUT, False),
    "reset": (RESET, False),
    "hangs": (HANG, False),
    "too much": (Reply(206, bytes(5 * 10**6), {"Content-Range": "bytes 0-1/2"}), False),
    "no size": (ranged("bytes 0-100/*"), True),
    "words": (ranged("nonsense"), True),
    "digits": (ranged("bytes 0-1/²"), True),
    "short": (ranged("bytes 0-1/2"), None),
    "huge": (ranged(f"bytes 0-1/{10**30}"), None),
}


@pytest.mark.parametrize("trouble", MISBEHAVING)
def test_a_server_may_misbehave(api, immich, described, trouble):
    reply, good = MISBEHAVING[trouble]
    immich.script(*PLAYBACK, reply, forever=True)
    shown = described(api, {"a.mp4": film()}, "--timeout", "1")
    assert colours(shown["a.mp4"]) in [FOUR] * (good is not False) + [["gray"]] * (not good)


@pytest.mark.parametrize("trouble", ["500", "cut", "reset", "hangs", "too much"])
def test_a_server_may_misbehave_later(api, immich, described, trouble):
    immich.script(*PLAYBACK, later(MISBEHAVING[trouble][0]), forever=True)
    shown = described(api, {"a.mp4": SPREAD()}, "--timeout", "1")
    assert colours(shown["a.mp4"]) == ["gray"]


@pytest.mark.measured
def test_a_server_that_is_slow_but_never_silent_is_given_up(api, immich, ollama, command):
    id = api.add("a.mp4", type="VIDEO", film=film(), picture=STILL)
    slow = Reply(206, Stream(trickle(bytes(10**6), 0.2), "video/mp4"))
    immich.script(*PLAYBACK, slow, forever=True)
    done = command(*api.argv, *asking(ollama), "--videos", "--timeout", "1")
    said = ia.t("video_still", name="a.mp4", id=id, why=ia.t("video_slow"))
    assert (done.returncode, done.stderr) == (0, said + "\n")
    assert api.texts() == {id: servers.told(STILL)}


def test_what_was_found_before_the_trouble_is_shown(api, immich, described):
    fetched = itertools.count()
    immich.script(
        *PLAYBACK, lambda _: Reply(500, "broken") if next(fetched) > 8 else None, forever=True
    )
    shown = described(api, {"a.mp4": SPREAD()})
    found = colours(shown["a.mp4"])
    assert 0 < len(found) < 4
    assert found == FOUR[: len(found)]


@pytest.mark.parametrize(
    "check",
    [Reply(502, "starting"), Reply(401, {"message": "Invalid API key"})],
    ids=["down", "refuses"],
)
def test_an_outage_is_waited_for(api, immich, described, check):
    def fall(_):
        immich.script("GET", "/api-keys/me", check)
        return Reply(503, "starting")

    immich.script(*PLAYBACK, fall, fall)
    shown = described(api, {"a.mp4": film()}, *NO_PAUSE)
    assert colours(shown["a.mp4"]) == FOUR
    assert len(immich.find(*PLAYBACK)) == 3


@pytest.mark.measured
def test_an_outage_in_the_middle_of_a_video_costs_no_frames(api, immich, described):
    def fall(_):
        immich.script("GET", "/api-keys/me", Reply(502, "starting"))
        return Reply(503, "starting")

    immich.script(*PLAYBACK, *[lambda _: None] * 10, fall)
    shown = described(api, {"a.mp4": films.large(*FOUR)}, *NO_PAUSE)
    assert colours(shown["a.mp4"]) == FOUR


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_passes_no_videos_costs_only_their_frames(api, immich, described, status):
    immich.script(*PLAYBACK, Reply(status, "too large"), forever=True)
    shown = described(api, {"a.mp4": film(), "b.mp4": film()})
    assert [*shown.values()] == [[STILL], [STILL]]


def test_no_two_videos_are_decoded_at_a_time(api, immich, described):
    second = threading.Barrier(2)
    met = []

    def meet(exchange):
        with contextlib.suppress(threading.BrokenBarrierError):
            second.wait(0.2)
            met.append(exchange)

    immich.script(*PLAYBACK, meet, forever=True)
    described(api, {f"{n}.mp4": film() for n in range(4)}, "--max-concurrent", "4")
    assert met == []


# --- Immich's folder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "style"),
    others_long(
        itertools.product(["1.132.3", "1.144.1", sandbox.NEWEST], [None, "container", "data"]),
        *(("1.132.3", None), ("1.144.1", "container"), (sandbox.NEWEST, "data")),
    ),
)
def test_what_immich_transcoded_is_read_else_the_original(
    photos, postgres, described, version, style
):
    library = SqlWorld(photos(version, path_style=style), postgres)
    videos = {
        "original.mp4": film("red", "blue"),
        "both.mov": {"film": b"of a kind that nobody knows", "transcoded": film("green", "pink")},
        "neither.mp4": {},
    }
    shown = described(library, videos)
    assert {name: colours(pictures) for name, pictures in shown.items()} == {
        "original.mp4": ["red", "blue"],
        "both.mov": ["green", "pink"],
        "neither.mp4": ["gray"],
    }


def test_nothing_outside_of_immichs_folder_is_read(database, described, tmp_path):
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(film())
    run, add, found = database.photos.run, database.add, {}

    def place(name, change):
        """Put in a video, then change its file or path."""
        id = add(name, type="VIDEO", picture=servers.own_picture(len(found)), film=film())
        [(path,)] = run('SELECT "originalPath" FROM {asset} WHERE "id" = %s', id)
        file = database.photos.root / path.removeprefix(database.photos.prefix)
        said = change(file) or path
        run('UPDATE {asset} SET "originalPath" = %s WHERE "id" = %s', str(said), id)
        found[id] = servers.own_picture(len(found))

    def link(file):
        file.unlink()
        file.symlink_to(outside)

    def pipe(file):
        file.unlink()
        os.mkfifo(file)

    def folder(file):
        file.unlink()
        file.mkdir()

    def loop(file):
        file.unlink()
        file.symlink_to(file)

    place("library.mp4", lambda _: outside)
    place("up.mp4", lambda _: f"{database.photos.prefix}upload/../../outside.mp4")
    place("long.mp4", lambda _: f"{database.photos.prefix}upload/{'x' * 300}.mp4")
    for name, change in (("link", link), ("pipe", pipe), ("folder", folder), ("loop", loop)):
        place(f"{name}.mp4", change)
    said = described(database, {})
    names = re.findall(r"^(\w+)\.mp4 ", said, re.M)
    assert sorted(names) == ["folder", "library", "link", "long", "loop", "pipe", "up"]
    assert said.count(ia.t("video_missing")) == len(found)
    assert {id: database.texts()[id] for id in found} == {
        id: servers.told(picture) for id, picture in found.items()
    }


def test_what_is_transcoded_comes_before_the_original(database, described):
    clip = {"film": film("pink"), "transcoded": film()}
    assert colours(described(database, {"a.mp4": clip})["a.mp4"]) == FOUR


def test_a_broken_transcoded_file_does_not_hide_the_original(database, described):
    clip = {"film": film(), "transcoded": b"broken" * 100}
    assert colours(described(database, {"a.mp4": clip})["a.mp4"]) == FOUR


def test_a_file_that_cannot_be_opened_is_told(database, described, monkeypatch):
    monkeypatch.setattr(
        av, "open", fail := Mock(side_effect=av.error.PermissionError(13, "Denied"))
    )
    assert described(database, {"a.mp4": film()}) == {"a.mp4": [STILL]}
    assert fail.called


# --- What is made of a video -----------------------------------------------------------------


@functools.cache
def kinds():
    """Videos as cameras and programs make them."""
    latin = film(codec="mpeg4", kind="avi").replace(b"Lavf", b"\xcb\xe0\xe2\xf4")  # not UTF-8
    return {
        "hevc.mp4": film(codec="libx265", options=films.SILENT),
        "mpeg4.avi": film(codec="mpeg4", kind="avi"),
        "tags.avi": latin,
        "mjpeg.avi": film(codec="mjpeg", kind="avi", pixels="yuvj420p"),
        "mjpeg.mov": film(codec="mjpeg", kind="mov", pixels="yuvj420p"),
        "vp8.webm": film(codec="libvpx", kind="webm", options=films.HASTY),
        "stream.ts": film(kind="mpegts", seconds=20.0, options=(("g", "5"),)),
        "camera.3gp": film(kind="3gp"),
        "old.flv": film(kind="flv"),
        "old.wmv": film(codec="wmv2", kind="asf"),
        "422.mkv": film(kind="matroska", pixels="yuv422p10le"),
        "444.mp4": film(pixels="yuv444p"),
        "prores.mov": film(codec="prores_ks", kind="mov", pixels="yuva444p10le"),
        "rgba.mov": film(codec="png", kind="mov", pixels="rgba"),
        "argb.mov": film(codec="qtrle", kind="mov", pixels="argb"),
        "gbrp16.mkv": film(codec="ffv1", kind="matroska", pixels="gbrp16le"),
        "raw.avi": film(codec="rawvideo", kind="avi", pixels="bgr24"),
    }


def test_videos_of_all_kinds_are_shown_as_they_are(api, described):
    shown = described(api, kinds())
    assert [name for name, pictures in shown.items() if colours(pictures) != FOUR] == []
    assert {size for pictures in shown.values() for size in sizes(pictures)} == {(160, 120)}


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libsvtav1"])
def test_videos_of_the_web_are_shown_as_they_are(api, described, codec, capfd):
    clip = film("red", "blue", codec=codec, kind="webm", seconds=2.0)
    assert colours(described(api, {"a.webm": clip})["a.webm"]) == ["red", "blue"]


def test_gray_is_gray(api, described):
    shown = described(api, {"a.mp4": film("black", "gray", "white", pixels="gray")})
    assert colours(shown["a.mp4"]) == ["gray", "white"]


SHAPES = {  # and the size that people see
    "portrait": (lambda: film(size=(120, 160)), (120, 160)),
    "anamorphic": (lambda: film(aspect=Fraction(2, 1)), (320, 120)),
    "narrow pixels": (lambda: film(aspect=Fraction(1, 2)), (80, 120)),
    "turned right": (lambda: films.turned(film(), 90), (120, 160)),
    "turned left": (lambda: films.turned(film(), 270), (120, 160)),
    "upside down": (lambda: films.turned(film(), 180), (160, 120)),
    "odd": (lambda: film(codec="mjpeg", kind="mov", pixels="yuvj444p", size=(161, 99)), (161, 99)),
}


@pytest.mark.parametrize(("clip", "size"), SHAPES.values(), ids=SHAPES)
def test_a_video_has_the_shape_that_people_see(api, described, clip, size):
    shown = described(api, {"a.mp4": clip()})["a.mp4"]
    assert (colours(shown), sizes(shown)) == (FOUR, {size})


@pytest.mark.parametrize("size", [(1, 1), (2, 5000), (5000, 2)], ids=str)
def test_the_smallest_and_longest_videos_are_shown_at_all(api, described, size):
    kind = {"codec": "ffv1", "kind": "matroska", "pixels": "yuv444p"}
    shown = described(api, {"a.mkv": film(size=size, **kind)})["a.mkv"]
    assert colours(shown) == FOUR


@pytest.mark.parametrize(("degrees", "corner"), [(90, "blue"), (180, "yellow"), (270, "green")])
def test_a_video_is_turned_the_right_way(api, described, degrees, corner):
    """Its upper corners are red and green, its lower ones blue and yellow."""
    shown = described(api, {"a.mp4": films.turned(films.corners(), degrees)})["a.mp4"]
    assert name_at(Image.open(io.BytesIO(shown[0])), (10, 10)) == corner


def name_at(image, place):
    """The colour of a few pixels."""
    x, y = place
    target = io.BytesIO()
    image.crop((x - 2, y - 2, x + 3, y + 3)).save(target, "PNG")
    return servers.colour_of(target.getvalue())


def test_frames_that_are_not_evenly_spread_are_shown_in_their_order(api, described):
    times = (0, 1, 2, 3, 5, 9, 14, 20, 21, 22, 40, 41, 60, 61, 62, 79)
    clip = film(times=times, options=(("bf", "0"), ("g", "1")))
    found = colours(described(api, {"a.mp4": clip})["a.mp4"])
    assert len(found) > 1
    assert found == sorted(found, key=FOUR.index)


@pytest.mark.parametrize("transfer", others_long([films.PQ, films.HLG], films.PQ))
def test_hdr_looks_as_bright_and_colourful_as_it_is(api, described, transfer):
    shown = described(api, {"a.mp4": films.hdr(transfer, (1, 1, 1), (1, 0, 0))})["a.mp4"]
    white, red = (
        Image.open(io.BytesIO(frame)).convert("RGB").getpixel((60, 60)) for frame in shown
    )
    assert min(white) >= 180
    assert red[0] >= 150
    assert red[0] > 3 * max(red[1:])


# --- Videos that are none, or not whole ------------------------------------------------------


def flipped(seed):
    """A video some bytes of which are wrong."""
    chance, data = random.Random(seed), bytearray(film())
    for _ in range(chance.choice((1, 5, 50, 500))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def lasting(seconds):
    """A video that claims to last so long."""
    data = bytearray(film())
    for box, at in ((b"mvhd", 16), (b"tkhd", 24), (b"mdhd", 16)):
        where = data.index(box) + 4 + at
        data[where : where + 4] = min(seconds * 1000, 2**32 - 1).to_bytes(4)
    return bytes(data)


@functools.cache
def broken():
    """What is no video, or not a whole one."""
    return {
        "cut.mp4": film()[: len(film()) // 2],
        "empty.mp4": b"",
        "garbage.mp4": random.Random(1).randbytes(10_000),
        "zeros.mp4": bytes(10_000),
        "encrypted.mp4": film().replace(b"avc1", b"encv"),
        "unknown.mp4": film().replace(b"avc1", b"zzzz"),
        "other.mp4": film().replace(b"avc1", b"hvc1"),
        "black.mp4": film("black"),
        "audio.m4a": films.tone(),
        "picture.mp4": servers.picture("red"),
        "text.mp4": b"a letter" * 1000,
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n%s\n#EXT-X-ENDLIST\n",
        "concat.mp4": b"ffconcat version 1.0\nfile '%s'\n",
    }


def test_what_is_no_video_is_described_by_its_preview(library, described, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(film())
    place = str(tmp_path / "secret.mp4").encode()
    shown = described(
        library,
        {name: d.replace(b"%s", place) for name, d in broken().items()},
        "--log-level",
        "warning",
    )
    assert shown == {name: [STILL] for name in broken()}


def test_a_video_that_no_frame_can_be_had_of_shows_nothing(api, described):
    videos = {name: broken()[name] for name in ("encrypted.mp4", "black.mp4", "audio.m4a")}
    assert described(api, videos) == {name: [STILL] for name in videos}


def test_what_cannot_be_reached_in_a_stream_is_told_in_words(api, ollama, command):
    """One that has a single key frame, and no index by which that could be found."""
    clip = film(kind="mpegts", options=(("g", "250"), ("sc_threshold", "0")))
    id = api.add("a.ts", type="VIDEO", film=clip, picture=STILL)
    done = command(*api.argv, *asking(ollama), "--videos")
    said = ia.t("video_still", name="a.ts", id=id, why=ia.t("video_blank"))
    assert (done.returncode, done.stderr) == (0, said + "\n")


def test_a_playlist_is_not_followed_to_a_server(api, immich, described):
    other = f"{immich.url}/stolen.ts".encode()
    names = ("playlist.mp4", "concat.mp4")
    described(api, {name: broken()[name].replace(b"%s", other) for name in names})
    assert immich.find("GET", "stolen") == []


@pytest.mark.measured
def test_wrong_bytes_cost_no_more_than_frames(api, described):
    shown = described(api, {f"{seed}.mp4": flipped(seed) for seed in range(25)})
    numbers = {len(pictures) for pictures in shown.values()}
    assert min(numbers) == 1 < max(numbers)


def test_a_video_of_unknown_length_shows_what_it_can(api, described):
    videos = {
        "live.mkv": films.endless(kind="matroska"),
        "live.webm": films.endless(kind="webm", codec="libvpx"),
        "cut.mkv": film(kind="matroska")[:-3000],
        "long.mp4": lasting(10**6),
        "zero.mp4": lasting(0),
        "one.mp4": film("red", seconds=0.1),
    }
    shown = described(api, videos)
    assert {name for name, pictures in shown.items() if pictures == [STILL]} == set()
    assert all(colours(pictures)[0] in FOUR for pictures in shown.values())


# --- What it costs ---------------------------------------------------------------------------

MEASURE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    [line] = [line for line in open("/proc/self/status") if "VmHWM" in line]
    print(line.split()[1])
"""


@pytest.mark.long
def test_two_large_videos_at_a_time_take_little_memory(api, ollama):
    colour = functools.partial(film, size=(3840, 2160), times=tuple(range(0, 80, 4)))
    fast = (("preset", "ultrafast"), ("refs", "3"))
    for n in range(4):
        api.add(f"{n}.mp4", type="VIDEO", film=colour(options=fast), picture=STILL)
    for _ in range(20):
        api.add(picture=servers.picture("red", size=(1440, 1080)))
    argv = [sys.executable, "-c", MEASURE, ia.__file__, *api.argv, *asking(ollama)]
    taken = []
    for more in ([], ["--videos"]):
        done = subprocess.run([*argv, *more], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        taken.append(int(done.stdout.splitlines()[-1]))
    photos, videos = taken
    assert videos - photos <= 120 * 1024
    assert sum(len(shown) == 4 for shown in ollama.shown) == 4
