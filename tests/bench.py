"""Measure the tool beside bare clients; nothing here passes or fails.

    python tests/bench.py [start|memory|listing|photo|service|all]

Each figure is the median of five runs of a whole process, and stands beside a yardstick from
the same minutes on the same machine: the bare clients below send the same requests or the same
SQL, parse the answers, and do nothing else. Immich, the model host and PostgreSQL run in child
processes, where they cost nobody memory but some of the two sides' time; only the group
service has them in its own, to know when what arrives and is asked. Results: BENCHMARKS.md.
"""

import argparse
import http.server
import importlib.metadata
import io
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

RUNS = 5
LARGE, SMALL = 100_000, 1_000  # described photos
PHOTOS = 300  # to be described
ARRIVALS, BURST, MANY_ARRIVALS = 20, 2_000, 50_000
BURST_SECONDS = 20
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

# --- the servers, each in a child process ---------------------------------------------------------


class Instant(http.server.BaseHTTPRequestHandler):
    """A model host that answers at once, whatever the picture."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "A photo of a lake between two mountains."}
        answer = {"message": message, "done": True, "done_reason": "stop"}
        body = json.dumps(answer | {"capabilities": ["completion", "vision"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def preview() -> bytes:
    """A JPEG as large as Immich's previews often are."""
    from PIL import Image

    noise = Image.effect_noise((90, 60), 90).resize((2160, 1440), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    Image.merge("RGB", [noise, noise.rotate(180), noise.rotate(90)]).save(out, "JPEG", quality=80)
    return out.getvalue()


@contextmanager
def model_server() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    import threading

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Instant)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"url": f"http://127.0.0.1:{server.server_port}"}, lambda: None


@contextmanager
def immich_server(
    photos: int, described: bool
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    import servers

    class QuickImmich(servers.FakeImmich):
        """Without the checks, whose time would be that of the requests."""

        def verify(self, *_: object) -> None:
            """Take it for right; the tests have checked it."""

    with QuickImmich() as immich:
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


SERVERS = {"immich": immich_server, "postgres": postgres_server, "model": model_server}


def serve(name: str, *arguments: Any) -> None:
    """Run in the child: say where the server is, set it back for each line, end with the input."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    with SERVERS[name](*arguments) as (told, reset):
        print(json.dumps(told), flush=True)
        for _ in sys.stdin:
            reset()
            print("{}", flush=True)


class Server:
    """A server in a child process; its facts are attributes."""

    def __init__(self, name: str, *arguments: Any) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps([name, *arguments])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a server of the benchmark did not start")
        return json.loads(line)

    def __getattr__(self, name: str) -> Any:
        return self.facts[name]

    def reset(self) -> None:
        """Back to where it began."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._answer()

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


class Counting(Instant):
    """A model host that says when it was asked about a picture, and how many asked at a time."""

    asked: queue.SimpleQueue[float] = queue.SimpleQueue()
    lock, now, most = threading.Lock(), 0, 0

    def do_POST(self) -> None:
        if self.path == "/api/chat":
            self.asked.put(time.monotonic())
        with Counting.lock:
            Counting.now += 1
            Counting.most = max(Counting.most, Counting.now)
        super().do_POST()
        with Counting.lock:
            Counting.now -= 1


@contextmanager
def running(*options: str) -> Iterator[subprocess.Popen[str]]:
    """The tool as a service, ready; it is told to stop at the end if it still runs."""
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as model,
        tempfile.TemporaryDirectory() as home,
    ):
        threading.Thread(target=model.serve_forever, daemon=True).start()
        hosts = ["--hosts", f"http://127.0.0.1:{model.server_port}"]
        command = tool("--combined", *options, *hosts)
        environment = ENVIRONMENT | {"HOME": home, "LANG": "C.UTF-8"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        if "Ready" not in (line := process.stderr.readline()):
            sys.exit(f"the service did not start: {line}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait()
        model.shutdown()


def latencies(arrive: Callable[[], None], number: int = ARRIVALS) -> list[float]:
    """Seconds from the end of each arrival to the request about it."""
    found = []
    for _ in range(number):
        arrive()
        began = time.monotonic()
        found.append(Counting.asked.get(timeout=60) - began)
    return found


def resident(process: subprocess.Popen[str]) -> float:
    """MiB of memory that a process has now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def stopping(process: subprocess.Popen[str]) -> float:
    """Seconds from SIGTERM to the end."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait()
    return time.monotonic() - began


def arrivals_row(what: str, found: list[float]) -> None:
    note = "slowest of them"
    row(what, seconds(statistics.median(found)), seconds(max(found)), note)


def service_api() -> None:
    """Arrivals through the API, whose preview is made a second after the upload."""
    import servers

    with servers.FakeImmich() as immich:

        def arrive() -> None:
            asset = immich.add(preview=None)
            threading.Event().wait(1.0)
            asset.preview = servers.picture()

        given = ["--immich-api-url", immich.url, "--immich-api-keys", immich.key]
        with running(*given) as process:
            arrivals_row("API: preview made to model asked (poll 10 s)", latencies(arrive, 10))
            row("API: SIGTERM when idle", seconds(stopping(process)), "", "")


def service_database() -> None:
    """Arrivals through the database: with the help of inotify, without it, many, and very many."""
    import sandbox

    with sandbox.Postgres() as server, tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with sandbox.PhotoLibrary(server.database(), Path(folder)) as library:
            given = ["--postgres-url", library.uri, "--immich-root", folder]
            small = sandbox.draw("red", (64, 48))
            early = library.add_many(6, preview=False)
            for photo in early:
                library.write_preview(photo, small)
            with running(*given) as process:
                found = latencies(lambda: library.add(preview_bytes=small) and None)
                arrivals_row("database: row to model asked, inotify", found)
                rows = iter(early)
                found = latencies(lambda: library.add_preview(next(rows)), len(early))
                arrivals_row("database: row to model asked, no event (poll 10 s)", found)
                row("database: SIGTERM when idle", seconds(stopping(process)), "", "")
            with running(*given) as process:
                Counting.most, began = 0, time.monotonic()
                for number in range(BURST):
                    library.add(preview_bytes=small)
                    ahead = began + (number + 1) * BURST_SECONDS / BURST - time.monotonic()
                    threading.Event().wait(max(0.0, ahead))
                for _ in range(BURST):
                    Counting.asked.get(timeout=60)
                what = f"database: {BURST:,} arrivals, until all are asked about"
                took = time.monotonic() - began
                row(what, seconds(took), f"{BURST_SECONDS} s", "the time in which they arrive")
                row(
                    "... requests at a time, and twice", str(Counting.most), "4", "--max-concurrent"
                )
            with running(*given, "--api-poll-interval", "0.5") as process:
                ids = add_quick(library, small)
                before = resident(process)
                for _ in range(0, MANY_ARRIVALS, 1000):
                    ids = add_quick(library, small)
                what = f"database: memory after {MANY_ARRIVALS:,} more arrivals"
                row(what, megabytes(resident(process)), megabytes(before), f"after {len(ids):,}")


def add_quick(library: Any, picture: bytes) -> list[str]:
    """A thousand photos that share one preview; returns when all were asked about."""
    ids = library.add_many(1000, files=False)
    library.write_preview(ids[0], picture)
    one = "(SELECT path FROM {file} WHERE \"assetId\" = %s AND type = 'preview')"
    library.run(f'UPDATE {{file}} SET path = {one} WHERE "assetId" = ANY(%s::uuid[])', ids[0], ids)
    for _ in ids:
        Counting.asked.get(timeout=120)
    return ids


def service() -> None:
    """How a service fares: how prompt it is, how much it bears, how it ends."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    service_api()
    service_database()


GROUPS = {
    "start": start,
    "memory": memory,
    "listing": listing,
    "photo": photo,
    "service": service,
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
