"""Measure the tool beside bare clients; nothing here passes or fails.

    python tests/bench.py [start|memory|listing|facts|photo|video|arrival|burst|stop|growth|
                           saturation|unequal|death|poison|outage|instances|all]

Each figure is the median of five runs of a whole process (of one, for memory), and stands beside
a yardstick from the same minutes on the same machine: the bare clients below send the same
requests or the same SQL, parse the answers, and do nothing else. Immich, the model hosts and
PostgreSQL run in child processes, where they cost nobody memory but some of the two sides' time.
From arrival to growth it is about the service, whose settings are the default ones but for
addresses; from saturation on about several hosts, and the yardstick is what these could do.
Results: BENCHMARKS.md.
"""

import argparse
import base64
import functools
import http.server
import importlib.metadata
import io
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

RUNS = 5
HUGE, LARGE, MEDIUM, SMALL = 1_000_000, 100_000, 10_000, 1_000  # described photos
RENEWED = ["-O", "outdated", "--context", "people,place,date"]  # once a fact is another
PHOTOS = 300  # to be described
VIDEOS = 20  # likewise; each of them lasts FILM_SECONDS, with a key frame every two
FILM_SECONDS = 60
ARRIVALS = 40  # that are timed
POLL = 10.0  # seconds between two looks, by default
BURST, BURST_SECONDS = 2_000, 20.0
GROWTH, BATCH = 50_000, 500  # arrivals after the first SMALL ones, so many at once
PLACES, PAUSE = 4, 0.25  # of a model host, and the seconds that each takes for a picture
FLEET_PHOTOS = 640  # ten seconds for four such hosts
TIMEOUT = 2.0  # of the tool, where a host hangs
OUTAGE = 20.0  # seconds
TAKEN = "2019-07-14T15:30:00"  # by the clock of the place, where what is known is told
POISON = 99_999_999  # the number of a picture on which every host fails
TESTS = Path(__file__).resolve().parent
TOOL = TESTS.parent / "immich_analyze.py"
PACKAGES = (
    *("requests", "urllib3", "psycopg2-binary", "pillow"),
    *("ConfigArgParse", "jinja2", "tqdm", "watchdog"),
)
FOREIGN = ("IMMICH_", "DB_", "RUST_LOG", "TEST_DATABASE_URL")
ENVIRONMENT = {name: text for name, text in os.environ.items() if not name.startswith(FOREIGN)}

# --- the yardsticks: what a client cannot do without ----------------------------------------------

IMPORTS = "import configargparse, psycopg2, requests, tqdm, PIL.Image, watchdog.observers"

BARE_API_LISTING = """
import datetime, requests, sys
url, key = sys.argv[1:3]
session = requests.Session()
session.headers["x-api-key"] = key
photos = 0
for visibility in ("timeline", "archive"):
    body = {"size": 1000, "page": 1, "order": "desc", "withExif": True, "type": "IMAGE"}
    more = True
    while more:
        told = session.post(url, json=body | {"visibility": visibility}).json()["assets"]
        more, photos = told["nextPage"], photos + len(told["items"])
        if more:
            last = datetime.datetime.fromisoformat(told["items"][-1]["fileCreatedAt"])
            last += datetime.timedelta(milliseconds=1)
            body["takenBefore"] = last.isoformat(timespec="milliseconds").replace("+00:00", "Z")
"""

BARE_SQL_LISTING = """
import psycopg2, sys
cursor = psycopg2.connect(sys.argv[1]).cursor()
after = "00000000-0000-0000-0000-000000000000"
while after:
    values = {"key": sys.argv[3], "since": None, "after": after, "page": 1000}
    values["videos"] = ("IMAGE",)
    cursor.execute(sys.argv[2], values)
    rows = cursor.fetchall()
    after = rows[-1][0] if len(rows) == 1000 else None
"""

BARE_API_NOTES = """
import concurrent.futures, datetime, requests, sys, threading
immich, key, note = sys.argv[1:4]
own = threading.local()

def call(method, path, body=None):
    if not hasattr(own, "session"):
        own.session = requests.Session()
        own.session.headers["x-api-key"] = key
    return own.session.request(method, immich + "/api" + path, json=body).json()

def read(photo):
    return call("GET", f"/assets/{photo['id']}/metadata/{note}")["value"]

with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for visibility in ("timeline", "archive"):
        body = {"size": 1000, "page": 1, "order": "desc", "type": "IMAGE", "visibility": visibility}
        body |= {"withExif": True, "withPeople": True}
        more = True
        while more:
            told = call("POST", "/search/metadata", body)["assets"]
            more = told["nextPage"]
            if more:
                last = datetime.datetime.fromisoformat(told["items"][-1]["fileCreatedAt"])
                last += datetime.timedelta(milliseconds=1)
                before = last.isoformat(timespec="milliseconds").replace("+00:00", "Z")
                body["takenBefore"] = before
            list(pool.map(read, told["items"]))
"""

BARE_FRAMES = """
import av, io, json, sys
file, times, number = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
for _ in range(number):
    with av.open(file) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for at in times:
            container.seek(int(at / stream.time_base), stream=stream)
            image = next(container.decode(stream)).to_image(width=1024, height=576)
            image.save(io.BytesIO(), "JPEG", quality=90)
"""

BARE_API_PHOTOS = """
import base64, concurrent.futures, requests, sys, threading
immich, key, model = sys.argv[1:4]
own = threading.local()

def describe(photo):
    session = own.__dict__.setdefault("session", requests.Session())
    headers = {"x-api-key": key}
    path = f"{immich}/api/assets/{photo}"
    picture = session.get(path + "/thumbnail?size=preview", headers=headers).content
    message = {"role": "user", "content": "?", "images": [base64.b64encode(picture).decode()]}
    question = {"model": "m", "stream": False, "messages": [message]}
    text = session.post(model + "/api/chat", json=question).json()["message"]["content"]
    session.get(path, headers=headers).json()
    session.put(path, headers=headers, json={"description": text})

body = {"size": 1000, "withExif": True, "type": "IMAGE", "visibility": "timeline"}
found = requests.post(immich + "/api/search/metadata", headers={"x-api-key": key}, json=body)
with concurrent.futures.ThreadPoolExecutor(6) as pool:
    list(pool.map(describe, [photo["id"] for photo in found.json()["assets"]["items"]]))
"""

BARE_SQL_PHOTOS = """
import base64, concurrent.futures, pathlib, psycopg2, requests, sys, threading
uri, listing, write, key, note, root, model = sys.argv[1:8]
own = threading.local()

def describe(row):
    if not hasattr(own, "session"):
        own.session, own.connection = requests.Session(), psycopg2.connect(uri)
        own.connection.autocommit = True
    picture = (pathlib.Path(root) / row[3].partition("/data/")[2]).read_bytes()
    message = {"role": "user", "content": "?", "images": [base64.b64encode(picture).decode()]}
    question = {"model": "m", "stream": False, "messages": [message]}
    text = own.session.post(model + "/api/chat", json=question).json()["message"]["content"]
    values = first | {"note": note, "id": row[0], "text": text, "listed": row[2]}
    own.connection.cursor().execute(write, values)

cursor = psycopg2.connect(uri).cursor()
after = "00000000-0000-0000-0000-000000000000"
first = {"key": key, "since": None, "after": after, "page": 1000, "videos": ("IMAGE",)}
cursor.execute(listing, first)
with concurrent.futures.ThreadPoolExecutor(6) as pool:
    list(pool.map(describe, cursor.fetchall()))
"""

BARE_ARRIVALS = """
import base64, requests, sys
session = requests.Session()
for line in sys.stdin:
    with open(line[:-1], "rb") as file:
        picture = base64.b64encode(file.read()).decode()
    message = {"role": "user", "content": "?", "images": [picture]}
    question = {"model": "m", "stream": False, "messages": [message]}
    session.post(sys.argv[1] + "/api/chat", json=question).json()
    print(flush=True)
"""

BARE_WAITING = f"""
import signal, sys
{IMPORTS}
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
print("Ready", file=sys.stderr, flush=True)
signal.sigwait({{signal.SIGTERM}})
"""

# --- the servers, each in a child process ---------------------------------------------------------


class Instant(http.server.BaseHTTPRequestHandler):
    """A model host that answers at once, and to each picture something else."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers["Content-Length"]))
        status, mark = self.note(request), zlib.adler32(request)
        text = f"A photo of a lake between two mountains, marked {mark:08x}."
        message = {"role": "assistant", "content": text}
        answer = {"message": message, "done": True, "done_reason": "stop"}
        body = json.dumps(answer | {"capabilities": ["completion", "vision"]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def note(self, request: bytes) -> int:
        """Take no note of it; the status of the answer."""
        return 200

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Noting(Instant):
    """The same, but it notes when it was asked about each numbered picture."""

    asked: ClassVar[defaultdict[int, list[float]]] = defaultdict(list)

    def note(self, request: bytes) -> int:
        if (number := number_in(request)) is not None:
            self.asked[number].append(time.monotonic())
        return 200

    @classmethod
    def forget(cls) -> dict[int, list[float]]:
        """What was noted, which begins anew."""
        asked = dict(cls.asked)
        cls.asked.clear()
        return asked


def numbered(picture: bytes, number: int) -> bytes:
    """The same JPEG with its number as a comment."""
    return picture[:2] + b"\xff\xfe\0\x0a%08d" % number + picture[2:]


IMAGE = re.compile(rb'"images": \["([\w+/]{40})')


def number_in(request: bytes) -> int | None:
    """The number of the picture in a request; None without one."""
    image = IMAGE.search(request)
    number = base64.b64decode(image[1])[6:14] if image else b""
    return int(number) if number.isdigit() else None


class Placed(Instant):
    """Asks its host, which has places, about each picture."""

    def note(self, request: bytes) -> int:
        if self.path == "/api/chat":
            return self.server.describe(number_in(request))
        self.server.stall()
        return 200


class PlacedHost(http.server.ThreadingHTTPServer):
    """A model host with some places, each of which takes its time for a picture.

    More requests than places queue. It notes of each picture its number, if it has one, and
    when it was asked about, begun and answered. Lines can name its methods.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, pause: float, places: int) -> None:
        super().__init__(("127.0.0.1", 0), Placed)
        self._pause, self._places = pause, threading.Semaphore(places)
        self._seen: list[list[Any]] = []
        self._trouble = ""
        self._connections: set[Any] = set()
        self._listen()

    def _listen(self) -> float:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return time.monotonic()

    def stall(self) -> None:
        """Never return if it hangs."""
        if self._trouble == "hang":
            threading.Event().wait()

    def describe(self, number: int | None) -> int:
        """Take a picture; the status to answer with."""
        seen = [number, time.monotonic(), None, None]
        self._seen.append(seen)
        with self._places:
            seen[2] = time.monotonic()
            time.sleep(self._pause)
            self.stall()  # with its place
            if self._trouble or number == POISON:
                return 500
            seen[3] = time.monotonic()
        return 200

    def forget(self) -> list[list[Any]]:
        """What was noted, which begins anew."""
        seen, self._seen = self._seen, []
        return seen

    def count(self) -> int:
        """How many answers it gave."""
        return sum(seen[3] is not None for seen in self._seen)

    def hang(self) -> float:
        """Take requests, and answer none from now on; the moment."""
        self._trouble = "hang"
        return time.monotonic()

    def die(self) -> float:
        """Refuse connections, and cut those that there are; the moment."""
        self._trouble = "die"
        time.sleep(0.05)  # by then an answer that was just noted is out
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        return time.monotonic()

    def back(self) -> float:
        """Be there again, at the same address; the moment."""
        self._trouble = ""
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        return self._listen()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that went away, nor of those that were cut off."""


def preview(width: int = 2160) -> bytes:
    """A JPEG as large as Immich's previews often are."""
    from PIL import Image

    size = (width, width * 2 // 3)
    noise = Image.effect_noise((90, 60), 90).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    Image.merge("RGB", [noise, noise.rotate(180), noise.rotate(90)]).save(out, "JPEG", quality=80)
    return out.getvalue()


@contextmanager
def model_server(notes: bool = False) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Noting if notes else Instant)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"url": f"http://127.0.0.1:{server.server_port}"}, Noting.forget


@contextmanager
def fleet_server(
    pauses: list[float], places: int
) -> Iterator[tuple[dict[str, Any], Callable[..., Any]]]:
    """One host for each pause, all in one process."""
    hosts = [PlacedHost(pause, places) for pause in pauses]

    def tell(what: str = "forget", which: str = "") -> list[Any]:
        return [getattr(host, what)() for host in ([hosts[int(which)]] if which else hosts)]

    yield {"urls": [f"http://127.0.0.1:{host.server_port}" for host in hosts]}, tell


def quick_immich() -> Any:
    """A fake of Immich without the checks, whose time would be that of the requests."""
    import servers

    class QuickImmich(servers.FakeImmich):
        described = 0

        def verify(self, *_: object) -> None:
            """Take it for right; the tests have checked it."""

        def _describe(self, asset: Any, text: str) -> None:
            super()._describe(asset, text)
            self.described += 1

    return QuickImmich()


@functools.cache
def known() -> dict[str, Any]:
    """Who is on each photo, and where it was taken."""
    from facts import Person

    people = [Person("Zoë", "1980-02-29", x=100), Person("Anna", x=500), Person("", x=700)]
    return {"people": people, "place": ("Warnemünde", "Mecklenburg-Vorpommern", "Germany")}


def noted(text: str, *options: str) -> dict[str, Any]:
    """The note of a text that the tool wrote with these options."""
    import facts

    import immich_analyze as ia

    config = ia.parse(options, {})
    people = [{"name": each.name, "birthDate": each.birth} for each in known()["people"]]
    told = {"people": people, "exifInfo": facts.exif(known()["place"]), "localDateTime": TAKEN}
    names = ia.names_id(ia.Photo("", "", text, "", told=told), config)
    note = ia.Note(config.model_name, config.prompt_id, text=ia.text_id(text), facts=names)
    return note.value(datetime.now(UTC))


@contextmanager
def immich_server(
    photos: int, described: bool, *options: str
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """With options, things are known of the photos, and runs with these described them."""
    import facts

    import immich_analyze as ia

    with quick_immich() as immich:
        text = "A photo of a lake between two mountains." if described else ""
        picture, more = preview(), dict[str, Any]()
        if options:
            more |= {"people": known()["people"], "extra": facts.exif(known()["place"])}
            more |= {"local": facts.times(TAKEN)["local"]}
            more |= {"notes": {ia.KEY: noted(text, *options)}}
        immich.add_many(photos, description=text, preview=picture, **more)

        def reset() -> None:
            immich.exchanges.clear()
            for asset in () if described else immich.assets.values():
                asset.description = ""

        told = {"url": immich.url, "key": immich.key, "preview": len(picture)}
        yield told | {"note_key": ia.KEY}, reset


@contextmanager
def postgres_server(
    photos: int, described: bool, *options: str
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """With options, things are known of the photos, and runs with these described them."""
    import sandbox

    import immich_analyze as ia

    text = "A photo of a lake between two mountains." if described else ""
    with sandbox.Postgres() as server, tempfile.TemporaryDirectory() as folder:
        uri, root = server.database(), Path(folder)
        with sandbox.PhotoLibrary(uri, root) as library:
            # the start-up check looks for a few of the first ones
            first = 10 if described else photos
            if described:  # the checks of what is right would take as long as the rest
                library.run("SET session_replication_role = replica")
            more = {"taken": TAKEN, "place": known()["place"]} if options else {}
            ids = library.add_many(first, description=text, preview_bytes=preview(), **more)
            library.add_many(photos - first, description=text, files=False, **more)
            if options:
                show_all(library, ids[0], json.dumps(noted(text, *options)))
            library.run("ANALYZE")
            tables = dict(library.run(ia.data_file("connection.sql")))
            sql = ia.statements({t: set(c) for t, c in tables.items()}, ia.parse(options, {}))

            def reset() -> None:
                if not described:
                    library.run("UPDATE {exif} SET description = '', \"lockedProperties\" = NULL")

            note = json.dumps(ia.Note("m", "p", text=ia.text_id(text)).value(datetime.now(UTC)))
            told = {"uri": uri, "root": folder, "listing": sql["listing"], "write": sql["write"]}
            yield told | {"key": ia.KEY, "note": note}, reset


def show_all(library: Any, id: str, note: str) -> None:
    """Have the same people on all photos, and the same note with them."""
    import immich_analyze as ia

    for person in known()["people"]:
        library.add_person(id, person)
    columns = '"personGroupId", "imageWidth", "imageHeight", "boundingBoxX1", "boundingBoxX2",'
    columns += ' "boundingBoxY1", "boundingBoxY2"'
    library.run(
        f'INSERT INTO {{face}} ("assetId", {columns}) SELECT a.id, {columns}'
        ' FROM {asset} a JOIN {face} f ON f."assetId" = %s AND a.id <> f."assetId"',
        id,
    )
    insert = 'INSERT INTO asset_metadata ("assetId", key, value) SELECT id, %s, %s::jsonb'
    library.run(f"{insert} FROM {{asset}}", ia.KEY, note)


def make_film(file: Path, size: tuple[int, int] = (1920, 1080), rate: int = 10) -> None:
    """Film a noise that moves, and changes colour with each second."""
    import av
    from PIL import Image, ImageChops

    few = Image.effect_noise((60, 34), 90)
    noise = Image.merge("RGB", [few, few.rotate(180), few]).resize(size, Image.Resampling.BICUBIC)
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", 2 * rate
        for number in range(FILM_SECONDS * rate):
            shade = (number // rate * 37 % 200, number // rate * 71 % 200, 60)
            moved = ImageChops.offset(noise, 5 * number, 0)
            shown = ImageChops.add(moved, Image.new("RGB", size, shade), 2)
            frame = av.VideoFrame.from_image(shown)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@contextmanager
def film_server(file: str) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """An Immich with one video, many times; it tells what was read of it."""
    film = Path(file).read_bytes()
    with quick_immich() as immich:
        immich.add_many(VIDEOS, name="clip.mp4", type="VIDEO", film=film, preview=preview())

        def reset() -> list[int]:
            read = [len(one.reply) for one in immich.find("GET", "/video/playback")]
            immich.exchanges.clear()
            for asset in immich.assets.values():
                asset.description = ""
            return [len(read), sum(read)]

        yield {"url": immich.url, "key": immich.key}, reset


SERVERS = {
    "film": film_server,
    "immich": immich_server,
    "postgres": postgres_server,
    "model": model_server,
    "fleet": fleet_server,
}


def serve(name: str, *arguments: Any) -> None:
    """Run in the child: say where the server is, obey each line, end with the input.

    The words of a line are for the server; an empty one sets it back.
    """
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    with SERVERS[name](*arguments) as (told, reset):
        print(json.dumps(told), flush=True)
        for line in sys.stdin:
            print(json.dumps(reset(*line.split())), flush=True)


class Server:
    """A server in a child process; its facts are attributes."""

    def __init__(self, name: str, *arguments: Any) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps([name, *arguments])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
        self.facts = self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a server of the benchmark did not start")
        return json.loads(line)

    def __getattr__(self, name: str) -> Any:
        return self.facts[name]

    def reset(self) -> Any:
        """Back to where it began; what it noted until then."""
        return self.tell()

    def tell(self, *words: str) -> Any:
        """Have it do something else; what it says to that."""
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# --- measuring ------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a process took."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    memory: float  # most MiB at a time


def once(command: list[str], home: str) -> Cost:
    """Run a command to its end, which must be a good one."""
    environment = ENVIRONMENT | {"HOME": home, "LANG": "C.UTF-8"}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, **quiet)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {' '.join(command)[:300]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def measured(
    *commands: list[str], before: Callable[[], None] = lambda: None, runs: int = RUNS
) -> list[Cost]:
    """The median cost of each command; they take turns, so that a busy minute hits all alike."""
    costs: list[list[Cost]] = [[] for _ in commands]
    with tempfile.TemporaryDirectory() as home:
        for number in range(runs + 1):
            for command, list_of_costs in zip(commands, costs, strict=True):
                before()
                cost = once(command, home)
                if number:  # the first round only warms up
                    list_of_costs.append(cost)
    return [Cost(*map(statistics.median, zip(*some, strict=True))) for some in costs]


def tool(*options: str) -> list[str]:
    return [sys.executable, str(TOOL), *options]


def bare(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def api(immich: Server) -> list[str]:
    return ["-d", "immich-api", "--immich-api-url", immich.url, "--immich-api-keys", immich.key]


def database(postgres: Server) -> list[str]:
    return ["-d", "database", "--postgres-url", postgres.uri, "--immich-root", postgres.root]


def row(what: str, figure: str, yardstick: str, note: str) -> None:
    """Print one line of the table as soon as it is known."""
    print(f"| {what:<52} | {figure:>9} | {yardstick:>9} | {note:<44} |", flush=True)


def seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 1 else f"{value:.2f} s"


def milliseconds(value: float) -> str:
    return f"{value * 1000 / PHOTOS:.2f} ms"


def megabytes(value: float) -> str:
    return f"{value:.1f} MiB"


# --- what is measured -----------------------------------------------------------------------------


def start() -> None:
    """How long a person waits for an answer that needs no server."""
    nothing, imports, version, usage = measured(
        bare("pass"), bare(IMPORTS), tool("--version"), tool("-h")
    )
    row("--version", seconds(version.wall), seconds(nothing.wall), "python -c pass")
    row("-h", seconds(usage.wall), seconds(nothing.wall), "python -c pass")
    row("-h", seconds(usage.wall), seconds(imports.wall), "importing the six dependencies")


def memory() -> None:
    """How memory grows with the library, for a run that finds nothing to do.

    With the default policy PostgreSQL keeps described photos to itself, so there it is another
    one, that has them listed. A run takes long, and no two differ much: one is enough.
    """
    with Server("model") as model:
        host = ["--hosts", model.url]
        for mode, name, options in (("API", "immich", api), ("database", "postgres", database)):
            listed = ["-O", "outdated"] if mode == "database" else []
            with Server(name, SMALL, True) as small, Server(name, HUGE, True) as large:
                commands = (tool(*options(each), *host, *listed) for each in (small, large))
                few, many = measured(*commands, before=large.reset, runs=1)
            what = f"{mode}: most memory, {HUGE:,} listed photos"
            row(what, megabytes(many.memory), megabytes(few.memory), f"the same with {SMALL:,}")


def listing() -> None:
    """A run that finds everything described: how long until it ends."""
    with Server("model") as model, Server("immich", LARGE, True) as immich:
        search = immich.url + "/api/search/metadata"
        whole, client = measured(
            tool(*api(immich), "--hosts", model.url),
            bare(BARE_API_LISTING, search, immich.key),
            before=immich.reset,
        )
        what = f"API: restart on {LARGE:,} described photos"
        row(what, seconds(whole.wall), seconds(client.wall), "bare client, the same requests")
        row(what + ", CPU", seconds(whole.cpu), seconds(client.cpu), "bare client")
    with Server("model") as model, Server("postgres", LARGE, True) as postgres:
        whole, client = measured(
            tool(*database(postgres), "--hosts", model.url),
            bare(BARE_SQL_LISTING, postgres.uri, postgres.listing, postgres.key),
        )
        what = f"database: restart on {LARGE:,} described photos"
        row(what, seconds(whole.wall), seconds(client.wall), "bare client, the same SQL")
        row(what + ", CPU", seconds(whole.cpu), seconds(client.cpu), "bare client")


def facts() -> None:
    """The same where each text is ours, and is compared with what is known of its photo."""
    with (
        Server("model") as model,
        Server("immich", SMALL, True, *RENEWED) as small,
        Server("immich", MEDIUM, True, *RENEWED) as immich,
    ):
        whole, client, few = measured(
            tool(*api(immich), "--hosts", model.url, *RENEWED),
            bare(BARE_API_NOTES, immich.url, immich.key, immich.note_key),
            tool(*api(small), "--hosts", model.url, *RENEWED),
            before=immich.reset,
        )
        tell_facts("API", MEDIUM, whole, client, few, "the same requests")
    with (
        Server("model") as model,
        Server("postgres", SMALL, True, *RENEWED) as small,
        Server("postgres", LARGE, True, *RENEWED) as postgres,
    ):
        whole, client, few = measured(
            tool(*database(postgres), "--hosts", model.url, *RENEWED),
            bare(BARE_SQL_LISTING, postgres.uri, postgres.listing, postgres.key),
            tool(*database(small), "--hosts", model.url, *RENEWED),
        )
        tell_facts("database", LARGE, whole, client, few, "the same SQL")


def tell_facts(mode: str, photos: int, whole: Cost, client: Cost, few: Cost, how: str) -> None:
    what = f"{mode}: facts of {photos:,} photos compared"
    note = f"{how}: {whole.wall / client.wall:.2f} times, promised: 1.3"
    row(what, seconds(whole.wall), seconds(client.wall), note)
    row(what + ", CPU", seconds(whole.cpu), seconds(client.cpu), "bare client")
    row(what + ", memory", megabytes(whole.memory), megabytes(few.memory), f"with {SMALL:,}")


def photo() -> None:
    """What the tool adds to the model's own time for each photo, start and listing included."""
    with Server("model") as model, Server("immich", PHOTOS, False) as immich:
        whole, client = measured(
            tool(*api(immich), "--hosts", model.url),
            bare(BARE_API_PHOTOS, immich.url, immich.key, model.url),
            before=immich.reset,
        )
        size = f"{immich.preview // 1000} kB"
        what = f"API: a described photo ({size} preview)"
        row(what, milliseconds(whole.wall), milliseconds(client.wall), "bare client, 6 threads")
        row(what + ", CPU", milliseconds(whole.cpu), milliseconds(client.cpu), "bare client")
    with Server("model") as model, Server("postgres", PHOTOS, False) as postgres:
        facts = (postgres.uri, postgres.listing, postgres.write, postgres.key, postgres.note)
        whole, client = measured(
            tool(*database(postgres), "--hosts", model.url),
            bare(BARE_SQL_PHOTOS, *facts, postgres.root, model.url),
            before=postgres.reset,
        )
        what = f"database: a described photo ({size} preview)"
        row(what, milliseconds(whole.wall), milliseconds(client.wall), "bare client, 6 threads")
        row(what + ", CPU", milliseconds(whole.cpu), milliseconds(client.cpu), "bare client")


def video() -> None:
    """What four frames of a video cost, beside FFmpeg's own work for the same ones."""
    step = (FILM_SECONDS - 2) / 4
    times = [1 + step * (part + 0.5) for part in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        make_film(file)
        with Server("model") as model, Server("film", str(file)) as immich:
            read: list[list[int]] = []
            options = ["--videos", "only", "--hosts", model.url]
            whole, still, frames = measured(
                tool(*api(immich), *options),
                tool(*api(immich), *options, "--video-frames", "1"),
                bare(BARE_FRAMES, str(file), json.dumps(times), str(VIDEOS)),
                before=lambda: read.append(immich.reset()),
            )
        spent = (whole.cpu - still.cpu) * 1000 / VIDEOS
        what = f"four frames of a video ({file.stat().st_size / 1e6:.0f} MB, 1080p)"
        ffmpeg = f"{frames.cpu * 1000 / VIDEOS:.1f} ms"
        row(f"{what}, CPU", f"{spent:.1f} ms", ffmpeg, "PyAV alone, a local file")
        requests, size = (figure / VIDEOS for figure in max(read))
        row(f"{what}, read", f"{size / 1e6:.2f} MB", f"{requests:.0f}", "requests a video")
        row(
            f"{what}, memory", megabytes(whole.memory), megabytes(still.memory), "its preview alone"
        )


# --- the service ----------------------------------------------------------------------------------


class Service:
    """A process that is ready for what arrives; what it says of trouble is shown."""

    def __init__(self, command: list[str]) -> None:
        environment = ENVIRONMENT | {"HOME": "/nonexistent", "LANG": "C.UTF-8"}
        pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        line = self._process.stderr.readline()
        if "Ready" not in line:
            sys.exit(f"the service did not start: {line}")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        time.sleep(1)  # by then it watches its folder, and has nothing to do

    def _read(self) -> None:
        for line in self._process.stderr:
            if not re.search(" INFO |SIGTERM", line):
                print(line.rstrip(), file=sys.stderr)

    def memory(self) -> float:
        """What it takes now, in MiB."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def watched(self) -> int:
        """How many folders it watches."""
        count = 0
        for file in Path(f"/proc/{self._process.pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):  # it closes others meanwhile
                count += file.read_text().count("inotify wd:")
        return count

    def end(self) -> float:
        """Ask it to end; the seconds until it has, which must be well."""
        began = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()  # a timeout would look only every 50 ms
        spent = time.perf_counter() - began
        self._reader.join()
        self._process.stderr.close()
        if code:
            sys.exit(f"exit code {code} of the service")
        return spent

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def service(*options: str) -> Service:
    return Service(tool("--combined", *options))


@contextmanager
def sql_library() -> Iterator[tuple[Any, list[str]]]:
    """A library in PostgreSQL for photos to arrive in, and the tool's options for it."""
    import sandbox

    with sandbox.Postgres() as server, tempfile.TemporaryDirectory() as folder:
        uri = server.database()
        with sandbox.PhotoLibrary(uri, Path(folder)) as library:
            options = ["-d", "database", "--postgres-url", uri, "--immich-root", folder]
            yield library, options


def wait_until_described(library: Any, but: int = 0) -> None:
    """Return once no more than so many photos in PostgreSQL have no description."""
    left = but + 1
    while left > but:
        time.sleep(0.02)
        [(left,)] = library.run("SELECT count(*) FROM {exif} WHERE description = ''")


class Arrivals:
    """Numbered previews that appear at certain times, and how soon the model is asked of each."""

    def __init__(self) -> None:
        self._picture = preview()
        self._steps: list[tuple[float, Callable[[], Any], int | None]] = []
        self._appeared: dict[int, float] = {}

    def at(self, moment: float, step: Callable[[], Any], appears: int | None = None) -> None:
        """Do this after so many seconds; if it makes a preview appear, that is noted."""
        self._steps.append((moment, step, appears))

    def picture(self, number: int) -> bytes:
        return numbered(self._picture, number)

    def let_happen(self) -> float:
        """Do it all; when that began, by the monotonic clock."""
        began = time.monotonic()
        for moment, step, number in sorted(self._steps, key=lambda each: each[0]):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            if number is not None:
                self._appeared[number] = time.monotonic()
            step()
        return began

    def delays(self, asked: dict[str, list[float]]) -> list[float]:
        """Seconds from each preview to the first request about it, as the model noted them."""
        return [asked[str(number)][0] - there for number, there in self._appeared.items()]


def let_rows_appear(arrivals: Arrivals, library: Any, number: int, pause: float) -> None:
    """Have as many previews made in PostgreSQL: each a file, and its row a little later."""
    for n, id in enumerate(library.add_many(number, preview=False)):

        def write(n: int = n, id: str = id) -> None:
            library.write_preview(id, arrivals.picture(n))

        arrivals.at(pause * n, write)
        row_later = pause * n + random.uniform(0.02, 0.11)
        arrivals.at(row_later, functools.partial(library.add_preview, id), appears=n)


def told_at_once(model: Server) -> list[float]:
    """The delays of a bare client that is told of each preview."""
    arrivals, pipes = Arrivals(), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.NamedTemporaryFile() as file,
        subprocess.Popen(bare(BARE_ARRIVALS, model.url), **pipes) as client,
    ):

        def tell() -> None:
            client.stdin.write(file.name.encode() + b"\n")
            client.stdin.flush()
            client.stdout.readline()

        for n in range(ARRIVALS):
            write = functools.partial(Path(file.name).write_bytes, arrivals.picture(n))
            arrivals.at(1 + 0.2 * n, write)
            arrivals.at(1.1 + 0.2 * n, tell, appears=n)
        arrivals.let_happen()
        client.stdin.close()
    return arrivals.delays(model.reset())


def tell_delays(what: str, delays: list[float], *yardsticks: tuple[float, str]) -> None:
    """Lines for the usual and the longest of some delays, each with its yardstick."""
    figures = {"median": statistics.median(delays), "longest": max(delays)}
    for (name, figure), (yardstick, note) in zip(figures.items(), yardsticks, strict=True):
        row(f"{what}: {name} of {len(delays)}", seconds(figure), seconds(yardstick), note)


def arrival() -> None:
    """How soon the model is asked of a preview that appears, while there is nothing else to do."""
    random.seed(1)
    with sql_library() as (library, options), Server("model", True) as model:
        arrivals = Arrivals()
        let_rows_appear(arrivals, library, ARRIVALS, pause=0.7)
        with service(*options, "--hosts", model.url):
            arrivals.let_happen()
            wait_until_described(library)
        delays, least = arrivals.delays(model.reset()), told_at_once(model)
    who = "bare client that is told"
    tell_delays("arrival, inotify", delays, (statistics.median(least), who), (max(least), who))
    arrival_without_events()


def arrival_without_events() -> None:
    """The same where only looking helps, at moments spread over six looks."""
    import servers

    with ExitStack() as stack:
        library, options = stack.enter_context(sql_library())
        immich = stack.enter_context(servers.FakeImmich())
        of_rows, of_uploads = (stack.enter_context(Server("model", True)) for _ in range(2))
        rows, uploads = Arrivals(), Arrivals()
        for n, id in enumerate(library.add_many(ARRIVALS, preview=False)):
            library.write_preview(id, rows.picture(n))  # before anybody watches
            show = functools.partial(library.add_preview, id)
            rows.at(random.uniform(0, 6 * POLL), show, appears=n)
        for n in range(ARRIVALS):
            asset, moment = immich.add(preview=None), random.uniform(0, 6 * POLL)
            del immich.assets[asset.id]

            def upload(asset: Any = asset) -> None:
                asset.created_at = immich.now()
                immich.assets[asset.id] = asset

            uploads.at(moment, upload)
            show = functools.partial(setattr, asset, "preview", uploads.picture(n))
            uploads.at(moment + 1, show, appears=n)
        stack.enter_context(service(*options, "--hosts", of_rows.url))
        given = ["--immich-api-url", immich.url, "--immich-api-keys", immich.key]
        stack.enter_context(service(*given, "--hosts", of_uploads.url))
        other = threading.Thread(target=uploads.let_happen)
        other.start()
        rows.let_happen()
        other.join()
        time.sleep(2 * POLL)
        found, half = rows.delays(of_rows.reset()), "half the poll interval"
        promised = (POLL + 1, "promised: the poll interval + 1 s")
        tell_delays("arrival, no event", found, (POLL / 2, half), promised)
        found = uploads.delays(of_uploads.reset())
        tell_delays("arrival, API, 1 s after upload", found, (POLL / 2, half), promised)


def burst() -> None:
    """Many previews in new folders, with a model that answers at once."""
    random.seed(1)
    with sql_library() as (library, options), Server("model", True) as model:
        arrivals = Arrivals()
        let_rows_appear(arrivals, library, BURST, pause=BURST_SECONDS / BURST)
        with service(*options, "--hosts", model.url):
            began = arrivals.let_happen()
            there = time.monotonic() - began
            wait_until_described(library)
            described = time.monotonic() - began
        asked = model.reset()
    what, delays = f"burst of {BURST:,} previews", arrivals.delays(asked)
    row(f"{what}: all described", seconds(described), seconds(there), "all there")
    row(f"{what}: longest wait", seconds(max(delays)), seconds(statistics.median(delays)), "median")
    requests = sum(map(len, asked.values()))
    row(f"{what}: requests", f"{requests:,}", f"{len(asked):,}", "pictures")


def stop() -> None:
    """How long an idle service takes to end once it is asked to."""
    import servers

    with sql_library() as (_, options), servers.FakeImmich() as immich:
        given = ["--immich-api-url", immich.url, "--immich-api-keys", immich.key]
        with Server("model") as model:
            for mode, access in (("API", given), ("database", options)):
                command = tool("--combined", *access, "--hosts", model.url)
                spent = [
                    [Service(each).end() for each in (command, bare(BARE_WAITING))]
                    for _ in range(RUNS)
                ]
                figure, yardstick = map(statistics.median, zip(*spent, strict=True))
                what = f"{mode}: SIGTERM to the end, idle"
                row(what, seconds(figure), seconds(yardstick), "a process with the same imports")


def growth() -> None:
    """How memory grows with all that arrives, and with the folders that are watched."""
    with sql_library() as (library, options), Server("model") as model:
        command = [*options, "--api-poll-interval", "0.5", "--hosts", model.url]
        with service(*command) as running:
            none = running.memory()
        for n in range(0x10000):  # as in a large library; else the folders were what grows
            there = library.root / "thumbs" / library.owner() / f"{n >> 8:02x}" / f"{n & 255:02x}"
            there.mkdir(parents=True)
        with service(*command) as running:
            while running.watched() < 0x10000:
                time.sleep(0.05)
            folders = running.memory()

            def arrive(number: int) -> float:
                for _ in range(0, number, BATCH):
                    library.add_many(BATCH, preview_bytes=tiny())
                    wait_until_described(library, but=BATCH)
                wait_until_described(library)
                return running.memory()

            grown = [arrive(number) for number in (SMALL, GROWTH // 2, GROWTH // 2)]
    what = "database: memory to watch 65,536 folders"
    row(what, megabytes(folders), megabytes(none), "no folder")
    tell_growth("database", *grown)
    growth_by_api()


def tell_growth(mode: str, few: float, half: float, many: float) -> None:
    what = f"{mode}: memory after {SMALL + GROWTH:,} arrivals"
    row(what, megabytes(many), megabytes(few), f"after {SMALL:,}")
    row(what, megabytes(many), megabytes(half), f"after {SMALL + GROWTH // 2:,}")


def growth_by_api() -> None:
    """The same through the API, where nothing is watched."""
    immich = quick_immich()
    with immich, Server("model") as model:
        given = ["--immich-api-url", immich.url, "--immich-api-keys", immich.key]
        with service(*given, "--api-poll-interval", "5", "--hosts", model.url) as running:

            def arrive(number: int) -> float:
                for _ in range(0, number, BATCH):
                    immich.add_many(BATCH, preview=tiny())
                    immich.exchanges.clear()
                    while immich.described < len(immich.assets) - 2 * BATCH:
                        time.sleep(0.02)
                while immich.described < len(immich.assets):
                    time.sleep(0.02)
                return running.memory()

            tell_growth("API", *(arrive(number) for number in (SMALL, GROWTH // 2, GROWTH // 2)))


@functools.cache
def tiny() -> bytes:
    """A picture that takes no time."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    return out.getvalue()


# --- several hosts --------------------------------------------------------------------------------


class Request(NamedTuple):
    """A request about a picture, as a host noted it."""

    host: int
    number: int
    asked: float
    begun: float | None  # once a place was free
    answered: float | None  # if well


class Fleet:
    """Model hosts with places, and photos in PostgreSQL for the tool to have described there."""

    def __init__(self, pauses: list[float], places: int, photos: int, concurrent: int) -> None:
        self.capacity = sum(places / pause for pause in pauses)
        self._stack = ExitStack()
        self.library, options = self._stack.enter_context(sql_library())
        self.hosts = self._stack.enter_context(Server("fleet", pauses, places))
        many = ["--max-concurrent", str(concurrent)]
        self._command = tool(*options, "--hosts", ",".join(self.hosts.urls), *many)
        self._picture = preview(360)
        self.ids = self.library.add_many(photos, files=False)
        for number in range(photos):
            self.show(number, number)
        self.library.run("ANALYZE")

    def show(self, photo: int, number: int) -> None:
        """Give a photo the picture of that number."""
        self.library.write_preview(self.ids[photo], numbered(self._picture, number))

    def begin(self, *options: str) -> "subprocess.Popen[str]":
        """Start the tool, whose settings are the default ones but for these."""
        environment = ENVIRONMENT | {"HOME": "/nonexistent", "LANG": "C.UTF-8"}
        pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*self._command, *options], env=environment, **pipes)

    def wait_for(self, answers: int) -> None:
        """Return once the hosts gave so many answers."""
        while sum(self.hosts.tell("count")) < answers:
            time.sleep(0.02)

    def end(self, *processes: "subprocess.Popen[str]") -> tuple[list[Request], str]:
        """What the hosts noted until all have ended, and what was said meanwhile."""
        said = "".join(process.communicate()[1] for process in processes)
        if any(process.returncode not in (0, 1) for process in processes):  # 1: a photo failed
            sys.exit(f"the tool did not end well: {said}")
        noted = self.hosts.reset()
        requests = [Request(host, *each) for host, some in enumerate(noted) for each in some]
        return [each for each in requests if each.number is not None], said

    def undescribed(self) -> int:
        [(left,)] = self.library.run("SELECT count(*) FROM {exif} WHERE description = ''")
        return left

    def forget(self) -> None:
        """Take all descriptions away."""
        self.library.run("UPDATE {exif} SET description = '', \"lockedProperties\" = NULL")
        self.library.run("DELETE FROM asset_metadata")

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def rate(requests: list[Request], first: float, last: float) -> float:
    """Photos per second between two moments; one that is only partly in there counts in part.

    To count answers would be wrong by up to a batch of them, as equal places begin together.
    """
    photos = 0.0
    for _, _, _, begun, answered in requests:
        if begun is not None and answered is not None:
            inside = min(answered, last) - max(begun, first)
            photos += max(0.0, inside) / (answered - begun)
    return photos / (last - first)


def answers(requests: list[Request]) -> list[float]:
    """When pictures were answered, in order."""
    return sorted(each.answered for each in requests if each.answered is not None)


def tell_rate(what: str, rates: list[float], yardstick: float, of_what: str, least: str) -> None:
    """A line for the median of some rates; the last column has what it is of the yardstick."""
    figure = statistics.median(rates)
    note = f"{of_what}: {figure / yardstick:.1%}, promised: {least}"
    row(f"{what}: photos a second", f"{figure:.2f}", f"{yardstick:.2f}", note)


def saturation() -> None:
    """How much of what equal hosts can do is made use of."""
    rates = []
    with Fleet([PAUSE] * 4, PLACES, FLEET_PHOTOS, concurrent=16) as fleet:
        for _ in range(RUNS):
            requests, _ = fleet.end(fleet.begin())
            moments = [each.asked for each in requests]
            rates.append(rate(requests, min(moments), max(moments)))
            fleet.forget()
        tell_rate("saturation, 4 equal hosts", rates, fleet.capacity, "all they can", "97 %")


def unequal() -> None:
    """The same with one host four times as fast as the others, until work runs out."""
    rates = []
    with Fleet([0.1, 0.4, 0.4, 0.4], PLACES, FLEET_PHOTOS, concurrent=16) as fleet:
        for _ in range(RUNS):
            requests, _ = fleet.end(fleet.begin())
            moments = answers(requests)
            tenth = len(moments) // 10
            rates.append(rate(requests, moments[tenth], moments[-tenth]))
            fleet.forget()
        tell_rate("unequal, 1 fast host and 3", rates, fleet.capacity, "all they can", "95 %")


def death() -> None:
    """What is left when one of four hosts goes away in the middle, and whether all goes well."""
    for how, way in (("refused", "die"), ("hanging", "hang")):
        rates, lost, doubled = [], 0, 0
        for _ in range(RUNS):
            with Fleet([PAUSE] * 4, PLACES, FLEET_PHOTOS, concurrent=16) as fleet:
                process = fleet.begin("--timeout", f"{TIMEOUT:g}")
                fleet.wait_for(FLEET_PHOTOS // 3)
                [since] = fleet.hosts.tell(way, "0")
                requests, _ = fleet.end(process)
                lost += fleet.undescribed()
            stuck = [each.asked for each in requests if not (each.host or each.answered)]
            first = since + 1 if way == "die" else min(stuck) + TIMEOUT
            moments = answers(requests)
            rates.append(rate(requests, first, moments[len(moments) * 95 // 100]))
            doubled += len(moments) - len({each.number for each in requests if each.answered})
        tell_rate(f"death, {how}", rates, fleet.capacity * 3 / 4, "what is left", "95 %")
        note = f"of {RUNS} times {FLEET_PHOTOS}; promised"
        row(f"death, {how}: photos lost, doubled", f"{lost}, {doubled}", "0, 0", note)


def poison() -> None:
    """What one picture on which every host fails costs the others."""
    rates: tuple[list[float], list[float]] = ([], [])
    unavailable = 0
    with Fleet([0.02] * 2, PLACES, 1000, concurrent=8) as fleet:
        for _ in range(RUNS):
            for list_of_rates, number in zip(rates, (POISON, 500), strict=True):
                fleet.show(500, number)
                requests, said = fleet.end(fleet.begin())
                unavailable += said.count("will be asked again in")
                good = [each.asked for each in requests if each.number != POISON]
                list_of_rates.append(len(good) / (max(good) - min(good)))
                fleet.forget()
    without = statistics.median(rates[1])
    tell_rate("poison, 1 picture of 1,000", rates[0], without, "without it", "98 %")
    row("poison: hosts left alone", f"{unavailable}", "0", f"in {2 * RUNS} runs; promised")


def outage() -> None:
    """How soon hosts that were all away are asked again."""
    delays = []
    with Fleet([PAUSE] * 4, PLACES, FLEET_PHOTOS // 2, concurrent=16) as fleet:
        for _ in range(RUNS):
            process = fleet.begin()
            fleet.wait_for(FLEET_PHOTOS // 6)
            fleet.hosts.tell("die")
            time.sleep(OUTAGE)
            back = min(fleet.hosts.tell("back"))
            requests, _ = fleet.end(process)
            delays.append(min(each.asked for each in requests if each.asked > back) - back)
            fleet.forget()
    delay = statistics.median(delays)
    what = f"outage, all hosts for {OUTAGE:g} s: first request"
    row(what, seconds(delay), seconds(1.0), "after their return; promised")


def instances() -> None:
    """What three instances at once do on one library."""

    def together(number: int) -> tuple[float, int, int]:
        with Fleet([PAUSE], 3 * PLACES, PHOTOS, concurrent=PLACES) as fleet:
            requests, _ = fleet.end(*[fleet.begin() for _ in range(number)])
            # the library is new, so all changes are those of the tool
            counted = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = %s"
            [(written,)] = fleet.library.run(counted, fleet.library.tables["exif"])
        spent = answers(requests)[-1] - min(each.asked for each in requests)
        return PHOTOS / spent, len(requests), written

    alone, _, _ = map(statistics.median, zip(*(together(1) for _ in range(RUNS)), strict=True))
    several = [together(3) for _ in range(RUNS)]
    figure, asked, written = map(statistics.median, zip(*several, strict=True))
    what = "instances, 3 at once"
    note = f"1 alone: {figure / alone:.2f} times, promised: 2.8"
    row(f"{what}: photos a second", f"{figure:.2f}", f"{alone:.2f}", note)
    row(f"{what}: requests", f"{asked:,}", f"{PHOTOS:,}", "photos; promised")
    row(f"{what}: descriptions written", f"{written:,}", f"{PHOTOS:,}", "photos; promised")


GROUPS = {
    "start": start,
    "memory": memory,
    "listing": listing,
    "facts": facts,
    "photo": photo,
    "video": video,
    "arrival": arrival,
    "burst": burst,
    "stop": stop,
    "growth": growth,
    "saturation": saturation,
    "unequal": unequal,
    "death": death,
    "poison": poison,
    "outage": outage,
    "instances": instances,
}


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("group", nargs="?", default="all", choices=[*GROUPS, "all"])
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    today = f"{datetime.now().astimezone():%Y-%m-%d}"
    print(f"{today}, {os.cpu_count()} cores {platform.machine()}, {processor()}")
    print(f"Python {platform.python_version()}, {versions}")
    print(f"load before: {os.getloadavg()[0]:.2f}; medians of {RUNS}\n")
    row("what", "measured", "yardstick", "which is")
    print(f"|{'-' * 54}|{'-' * 10}:|{'-' * 10}:|{'-' * 46}|")
    for name, group in GROUPS.items():
        if options.group in (name, "all"):
            group()


if __name__ == "__main__":
    main()
