"""Measure the tool beside bare clients; nothing here passes or fails.

    python tests/bench.py [GROUP]     all groups, or the one named: see -h

Each figure is the median of five runs of a whole process, and stands beside a yardstick from
the same minutes on the same machine: the bare clients below send the same requests or the same
SQL, parse the answers, and do nothing else. Immich, the model host and PostgreSQL run in child
processes, where they cost nobody memory but some of the two sides' time. From arrival on it is
about the service, whose settings are the default ones but for addresses. Results: BENCHMARKS.md.
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

RUNS = 5
LARGE, SMALL = 100_000, 1_000  # described photos
PHOTOS = 300  # to be described
ARRIVALS = 40  # that are timed
POLL = 10.0  # seconds between two looks, by default
BURST, BURST_SECONDS = 2_000, 20.0
CALM = 1.0  # seconds after a host's death until the rate counts again
GROWTH, BATCH = 50_000, 500  # arrivals after the first SMALL ones, so many at once
TESTS = Path(__file__).resolve().parent
TOOL = TESTS.parent / "immich_analyze.py"
PACKAGES = (
    *("requests", "urllib3", "psycopg2-binary", "pillow", "ConfigArgParse", "tqdm", "watchdog"),
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
    cursor.execute(sys.argv[2], {"since": None, "after": after, "limit": 1000})
    rows = cursor.fetchall()
    after = rows[-1][0] if len(rows) == 1000 else None
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
uri, listing, write, root, model = sys.argv[1:6]
own = threading.local()

def describe(row):
    if not hasattr(own, "session"):
        own.session, own.connection = requests.Session(), psycopg2.connect(uri)
        own.connection.autocommit = True
    picture = (pathlib.Path(root) / row[3].partition("/data/")[2]).read_bytes()
    message = {"role": "user", "content": "?", "images": [base64.b64encode(picture).decode()]}
    question = {"model": "m", "stream": False, "messages": [message]}
    text = own.session.post(model + "/api/chat", json=question).json()["message"]["content"]
    own.connection.cursor().execute(write, {"id": row[0], "text": text, "listed": row[2]})

cursor = psycopg2.connect(uri).cursor()
first = {"since": None, "after": "00000000-0000-0000-0000-000000000000", "limit": 1000}
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
    """A model host that answers at once, whatever the picture."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    SAID: ClassVar[dict[str, Any]] = {
        "message": {"role": "assistant", "content": "A photo of a lake between two mountains."},
        "done": True,
        "done_reason": "stop",
    }

    def do_POST(self) -> None:
        self.note(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200, {"capabilities": ["completion", "vision"], **self.SAID})

    def answer(self, status: int, said: dict[str, Any]) -> None:
        """Send JSON."""
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def note(self, request: bytes) -> None:
        """Take no note of it."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Noting(Instant):
    """The same, but it notes when it was asked about each numbered picture."""

    IMAGE = re.compile(rb'"images": \["([\w+/]{40})')
    asked: ClassVar[defaultdict[int, list[float]]] = defaultdict(list)

    def note(self, request: bytes) -> None:
        if image := self.IMAGE.search(request):
            self.asked[int(base64.b64decode(image[1])[6:14])].append(time.monotonic())

    @classmethod
    def forget(cls) -> dict[int, list[float]]:
        """What was noted, which begins anew."""
        asked = dict(cls.asked)
        cls.asked.clear()
        return asked


class Hosts:
    """Model hosts that take their time, each so many pictures at once; the others queue there.

    They note each picture they answered: its number, the host, and when, by the monotonic clock.
    """

    def __init__(self, kinds: list[tuple[int, float]], poison: int = -1) -> None:
        self.answered: list[tuple[int, int, float]] = []
        self.first = 0.0  # when the first picture came, since that was asked last
        self._kinds, self._poison = kinds, poison
        self._hanging: set[int] = set()
        self._open: list[set[Any]] = [set() for _ in kinds]
        self._servers = [self._server(number, 0) for number in range(len(kinds))]
        self.ports = [server.server_port for server in self._servers]

    def _server(self, number: int, port: int) -> http.server.ThreadingHTTPServer:
        places, delay = self._kinds[number]
        free, hosts = threading.Semaphore(places), self

        class Timed(Instant):
            def setup(self) -> None:
                super().setup()
                hosts._open[number].add(self.connection)

            def do_GET(self) -> None:
                self.answer(200, {"version": "0"})

            def do_POST(self) -> None:
                request = self.rfile.read(int(self.headers["Content-Length"]))
                image = Noting.IMAGE.search(request)
                data = base64.b64decode(image[1])[6:14] if image else b""
                hosts.first = hosts.first or (time.monotonic() if image else 0.0)
                if number in hosts._hanging:
                    while number in hosts._hanging:
                        time.sleep(0.05)
                    self.close_connection = True
                    return
                if not data.isdigit():  # no picture of ours
                    self.answer(200, {"capabilities": ["vision"], **self.SAID})
                    return
                picture = int(data)
                if picture == hosts._poison:
                    self.answer(500, {"error": "out of memory"})
                    return
                with free:
                    time.sleep(delay)
                if number not in hosts._hanging:
                    self.answer(200, self.SAID)
                    self.wfile.flush()  # which fails if nobody is there any more
                    hosts.answered.append((picture, number, time.monotonic()))

        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Timed)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # of connections that are dropped
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def told(self) -> tuple[float, list[tuple[int, int, float]]]:
        """When the first picture came and what was answered, which both begin anew."""
        told = self.first, self.answered
        self.first, self.answered = 0.0, []
        return told

    def die(self, number: int) -> None:
        """Refuse connections, and drop those there are."""
        self._servers[number].shutdown()
        self._servers[number].server_close()
        for connection in self._open[number]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def back(self, number: int) -> None:
        """Be there again."""
        self._hanging.discard(number)
        if self._servers[number].socket.fileno() < 0:
            self._servers[number] = self._server(number, self.ports[number])

    def hang(self, number: int) -> None:
        """Take requests and never answer."""
        self._hanging.add(number)


@contextmanager
def hosts_server(*arguments: Any) -> Iterator[tuple[dict[str, Any], Callable[..., Any]]]:
    hosts = Hosts(*arguments)
    urls = ",".join(f"http://127.0.0.1:{port}" for port in hosts.ports)
    yield {"urls": urls}, lambda what, *numbers: getattr(hosts, what)(*numbers)


def numbered(picture: bytes, number: int) -> bytes:
    """The same JPEG with its number as a comment."""
    return picture[:2] + b"\xff\xfe\0\x0a%08d" % number + picture[2:]


def preview() -> bytes:
    """A JPEG as large as Immich's previews often are."""
    from PIL import Image

    noise = Image.effect_noise((90, 60), 90).resize((2160, 1440), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    Image.merge("RGB", [noise, noise.rotate(180), noise.rotate(90)]).save(out, "JPEG", quality=80)
    return out.getvalue()


@contextmanager
def model_server(notes: bool = False) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Noting if notes else Instant)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"url": f"http://127.0.0.1:{server.server_port}"}, Noting.forget


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


@contextmanager
def immich_server(
    photos: int, described: bool
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    with quick_immich() as immich:
        text = "A photo of a lake between two mountains." if described else ""
        picture = preview()
        immich.add_many(photos, description=text, preview=picture)

        def reset() -> None:
            immich.exchanges.clear()
            for asset in () if described else immich.assets.values():
                asset.description = ""

        yield {"url": immich.url, "key": immich.key, "preview": len(picture)}, reset


@contextmanager
def postgres_server(
    photos: int, described: bool
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    import sandbox

    import immich_analyze as ia

    text = "A photo of a lake between two mountains." if described else ""
    with sandbox.Postgres() as server, tempfile.TemporaryDirectory() as folder:
        uri, root = server.database(), Path(folder)
        with sandbox.PhotoLibrary(uri, root) as library:
            # the start-up check looks for a few of the first ones
            first = 10 if described else photos
            library.add_many(first, description=text, preview_bytes=preview())
            library.add_many(photos - first, description=text, files=False)
            library.run("ANALYZE")
            tables = dict(library.run(ia.TABLES))
            sql = ia.statements({t: set(c) for t, c in tables.items()}, ia.Policy.NONE)

            def reset() -> None:
                if not described:
                    library.run("UPDATE {exif} SET description = '', \"lockedProperties\" = NULL")

            told = {"uri": uri, "root": folder, "listing": sql.listing, "write": sql.write}
            yield told, reset


SERVERS = {
    "immich": immich_server,
    "postgres": postgres_server,
    "model": model_server,
    "hosts": hosts_server,
}


def serve(name: str, *arguments: Any) -> None:
    """Run in the child: say where the server is, call its function for each line of arguments."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    with SERVERS[name](*arguments) as (told, reset):
        print(json.dumps(told), flush=True)
        for line in sys.stdin:
            print(json.dumps(reset(*json.loads(line))), flush=True)


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

    def reset(self, *arguments: Any) -> Any:
        """Back to where it began, or what else its function does; what that gives."""
        self._process.stdin.write(json.dumps(arguments) + "\n")
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


def measured(*commands: list[str], before: Callable[[], None] = lambda: None) -> list[Cost]:
    """The median cost of each command; they take turns, so that a busy minute hits all alike."""
    costs: list[list[Cost]] = [[] for _ in commands]
    with tempfile.TemporaryDirectory() as home:
        for number in range(RUNS + 1):
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
    """How memory grows with the library, for a run that finds nothing to do."""
    with Server("model") as model:
        host = ["--hosts", model.url]
        for mode, name, options in (("API", "immich", api), ("database", "postgres", database)):
            with Server(name, SMALL, True) as small, Server(name, LARGE, True) as large:
                few, many = measured(
                    tool(*options(small), *host), tool(*options(large), *host), before=large.reset
                )
            what = f"{mode}: most memory, {LARGE:,} described photos"
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
            bare(BARE_SQL_LISTING, postgres.uri, postgres.listing),
        )
        what = f"database: restart on {LARGE:,} described photos"
        row(what, seconds(whole.wall), seconds(client.wall), "bare client, the same SQL")
        row(what + ", CPU", seconds(whole.cpu), seconds(client.cpu), "bare client")


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
        facts = (postgres.uri, postgres.listing, postgres.write, postgres.root)
        whole, client = measured(
            tool(*database(postgres), "--hosts", model.url),
            bare(BARE_SQL_PHOTOS, *facts, model.url),
            before=postgres.reset,
        )
        what = f"database: a described photo ({size} preview)"
        row(what, milliseconds(whole.wall), milliseconds(client.wall), "bare client, 6 threads")
        row(what + ", CPU", milliseconds(whole.cpu), milliseconds(client.cpu), "bare client")


# --- model hosts ----------------------------------------------------------------------------------

EQUAL = [(4, 0.25)] * 4  # places, seconds for a picture
Answered = list[tuple[int, int, float]]


@contextmanager
def numbered_library(photos: int) -> Iterator[tuple[list[str], Callable[[], None]]]:
    """A library whose pictures have numbers: the tool's options, and how it is set back."""
    from PIL import Image

    out = io.BytesIO()
    Image.effect_noise((400, 300), 60).convert("RGB").save(out, "JPEG", quality=60)
    with sql_library() as (library, options):
        for number, id in enumerate(library.add_many(photos, preview=False)):
            library.write_preview(id, numbered(out.getvalue(), number))
            library.add_preview(id)
        library.run("ANALYZE")

        def reset() -> None:
            library.run("UPDATE {exif} SET description = '', \"lockedProperties\" = NULL")
            library.run("DELETE FROM asset_metadata")

        yield options, reset


def batch(*options: str) -> subprocess.Popen[str]:
    """The tool at work on what is there."""
    environment = ENVIRONMENT | {"HOME": "/nonexistent", "LANG": "C.UTF-8"}
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    command = tool("--log-level", "warning", *options)
    return subprocess.Popen(command, env=environment, **pipes)


def rate(answered: Answered, begin: float, end: float) -> float:
    """Answers per second between two moments."""
    return sum(begin <= at < end for _, _, at in answered) / (end - begin)


def moments(answered: Answered, *shares: float) -> list[float]:
    """When these shares of the answers had been given."""
    times = sorted(at for _, _, at in answered)
    return [times[min(int(share * len(times)), len(times) - 1)] for share in shares]


def faults(answered: Answered, photos: int) -> str:
    """What was lost or doubled."""
    lost = photos - len({number for number, _, _ in answered})
    return f"{lost} lost, {len(answered) - photos + lost} doubled"


def share(what: str, rates: list[float], capacity: float, note: str) -> None:
    """A line for the median of some rates."""
    median = statistics.median(rates)
    figure, whole = f"{100 * median / capacity:.1f} %", f"{capacity:.0f}/s"
    row(what, figure, whole, note)


def saturation() -> None:
    """Equal hosts, from the first request to the last answer."""
    rates = []
    with numbered_library(640) as (options, reset), Server("hosts", EQUAL) as hosts:
        for _ in range(RUNS):
            reset()
            done = batch(*options, "--hosts", hosts.urls, "--max-concurrent", "16")
            done.communicate()
            first, answered = hosts.reset("told")
            rates.append(len(answered) / (moments(answered, 1)[0] - first))
    share("4 equal hosts x 4 places, 0.25 s a picture", rates, 64, "the hosts' capacity")


def unequal() -> None:
    """A fast host and slow ones, while there is enough to do."""
    rates = []
    kinds = [(4, 0.1)] + [(4, 0.4)] * 3
    with numbered_library(700) as (options, reset), Server("hosts", kinds) as hosts:
        for _ in range(RUNS):
            reset()
            done = batch(*options, "--hosts", hosts.urls, "--max-concurrent", "16")
            done.communicate()
            _, answered = hosts.reset("told")
            rates.append(rate(answered, *moments(answered, 0.1, 0.9)))
    share("1 fast host, 3 four times slower", rates, 70, "their summed capacity")


def death() -> None:
    """One of four hosts dies in the middle, while there is enough to do."""
    photos = 800
    with numbered_library(photos) as (options, reset), Server("hosts", EQUAL) as hosts:
        known = [*options, "--hosts", hosts.urls, "--max-concurrent", "16", "--timeout", "2"]
        for how, calm in (("die", CALM), ("hang", 2 + CALM)):
            rates, found = [], []
            for _ in range(RUNS):
                reset()
                done = batch(*known)
                time.sleep(5)
                hosts.reset(how, 0)
                died = time.monotonic()
                done.communicate()
                _, answered = hosts.reset("told")
                hosts.reset("back", 0)
                rates.append(rate(answered, died + calm, *moments(answered, 0.95)))
                found.append(faults(answered, photos))
            what = {"die": "one of 4 hosts refuses", "hang": "one of 4 hosts hangs"}[how]
            share(what, rates, 48, f"what is left; {max(found)}")


def poison() -> None:
    """One picture in 1,000 on which every host fails."""
    photos, kinds = 1000, [(4, 0.1)] * 2
    spent: dict[int, list[float]] = {-1: [], 500: []}
    rests = 0
    with (
        numbered_library(photos) as (options, reset),
        Server("hosts", kinds) as healthy,
        Server("hosts", kinds, 500) as poisoned,
    ):
        for _ in range(RUNS):
            for number, hosts in ((-1, healthy), (500, poisoned)):
                reset()
                done = batch(*options, "--hosts", hosts.urls, "--max-concurrent", "8")
                _, said = done.communicate()
                rests += said.count("Next try")
                first, answered = hosts.reset("told")
                spent[number].append((moments(answered, 1)[0] - first) / len(answered))
    with_it, without = (1 / statistics.median(spent[number]) for number in (500, -1))
    row(
        "1 poisonous picture in 1,000",
        f"{with_it:.1f}/s",
        f"{without:.1f}/s",
        f"without it; {rests} rests of a host",
    )


def outage() -> None:
    """All hosts are away for 20 seconds."""
    waits = []
    for _ in range(RUNS):
        with numbered_library(8) as (options, _), Server("hosts", EQUAL) as hosts:
            for number in range(4):
                hosts.reset("hang", number)
            with service(*options, "--hosts", hosts.urls):
                for number in range(4):
                    hosts.reset("die", number)
                time.sleep(20)
                hosts.reset("told")
                began = time.monotonic()
                for number in range(4):
                    hosts.reset("back", number)
                first = 0.0
                while not first:
                    time.sleep(0.01)
                    first, _ = hosts.reset("told")
            waits.append(first - began)
    row(
        "all hosts away for 20 s: first request",
        seconds(statistics.median(waits)),
        "1 s",
        "promised",
    )


def instances() -> None:
    """Three instances on one library, whose host has places for all of them."""
    photos, spent, found = 320, {1: [], 3: []}, []
    with numbered_library(photos) as (options, reset), Server("hosts", [(12, 0.25)]) as hosts:
        for _ in range(RUNS):
            for number in spent:
                reset()
                tools = [batch(*options, "--hosts", hosts.urls) for _ in range(number)]
                for each in tools:
                    each.communicate()
                first, answered = hosts.reset("told")
                spent[number].append(moments(answered, 1)[0] - first)
                found.append(faults(answered, photos))
    one, three = (photos / statistics.median(spent[number]) for number in (1, 3))
    row("3 instances, database mode", f"{three:.1f}/s", f"{one:.1f}/s", f"one; {max(found)}")


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
        promised = (POLL + 2.5, "promised: the poll interval + 2.5 s")
        tell_delays("arrival, no event", found, (POLL / 2 + 2, half + ", feed's 2 s"), promised)
        promised = (POLL + 1, "promised: the poll interval + 1 s")
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


GROUPS = {
    "start": start,
    "memory": memory,
    "listing": listing,
    "photo": photo,
    "saturation": saturation,
    "unequal": unequal,
    "death": death,
    "poison": poison,
    "outage": outage,
    "instances": instances,
    "arrival": arrival,
    "burst": burst,
    "stop": stop,
    "growth": growth,
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
