"""Photos arrive while everything around the tool, and the tool itself, is stopped and started.

    python tests/faults.py [api|database|both] [--photos N] [--rounds N] [--seed N]

First each fault alone, then so many rounds of one or two at random. Meanwhile people write
descriptions of their own, also while the model looks at that very photo. At the end every photo
has exactly one description, its own; the tool wrote each once at most and none over a person's;
it said little, and ends with exit code 0. The seed, which is told, repeats what is chosen but not
to the millisecond when it happens. The short form is test_faults.py.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import http.client
import itertools
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from enum import Flag, auto
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
import psycopg2.extensions
import sandbox
import servers
from servers import CUT, RESET, FakeImmich, FakeKey, FakeLlamaCpp, FakeOllama, Reply

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "immich_analyze.py"
SAID = json.loads((ROOT / "i18n" / "en.json").read_text(encoding="utf-8"))
CHATS = ("POST", "/api/chat|/v1/chat/completions")
WRITES = ("PUT", "/api/assets/[0-9a-f-]{36}$")

TIMEOUT = 1.0  # of a request to the model
PATIENCE = 20.0  # seconds until what has to happen did not
QUICK = {
    "--api-poll-interval": "0.2",
    "--wait-timeout": "0",
    "--wait-retry-interval": "0.2",
    "--timeout": f"{TIMEOUT}",
    "--retry-delay-seconds": "0.2",
    "--unavailable-duration": "0.2",
    "--lang": "en",
}
WIDTH = 78  # of two names
MOST_LINES = 6  # an outage is one line and its end another, for each server that is away
FOREIGN = ("IMMICH_", "DB_", "RUST_LOG", "LC_", "LANG", "JOURNAL_STREAM", "NOTIFY_SOCKET")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

Met = Callable[[], object]  # whether the work has met a fault


class Broken(Exception):
    """The trial cannot go on; the text says what the tool did, or did not do."""


def pattern(key: str) -> re.Pattern[str]:
    """What a message looks like, whatever stands in its places."""
    parts = re.split(r"\{\w+\}", SAID[key])
    return re.compile(".*".join(map(re.escape, parts)))


READY, WAITING, BACK = pattern("ready"), pattern("waiting"), pattern("back")
HOST_AWAY, HOST_BACK = pattern("host_unavailable"), pattern("host_back")
FAILED = re.compile(r"ERROR \S+ \([0-9a-f-]{36}\): ")
LIBRARY = "the library"
BUG = re.compile(r"Traceback|" + re.escape(SAID["bug"]))


# --- The tool ------------------------------------------------------------------------------------


class Tool:
    """The command line as a service, which can be killed and started again; and all it says."""

    def __init__(self, file: Path, argv: Sequence[str], home: Path) -> None:
        self._port = sandbox.free_port()
        health = ["--health-port", str(self._port)]
        self._command = [sys.executable, str(file), "--combined", *health, *argv]
        foreign = {n for n in os.environ if n.startswith(FOREIGN) or n.upper() in PROXIES}
        self._environ = {n: text for n, text in os.environ.items() if n not in foreign}
        self._environ |= {"HOME": str(home), "LANG": "C.UTF-8"}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._asked = False  # to end
        self.news = threading.Event()  # set when it said something
        self.runs: list[list[str]] = [[]]  # what each process said
        self.said: list[str] = []  # all of that

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._asked = False
        self.runs.append([])
        reading = (self._process, self.runs[-1])
        self._reader = threading.Thread(target=self._read, args=reading, daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            self.said.append(line.rstrip("\n"))
            self.news.set()

    @property
    def ready(self) -> bool:
        """Whether its start is over."""
        return any(map(READY.search, self.runs[-1]))

    @property
    def away(self) -> set[str]:
        """Whom it misses: the library by what it said, hosts by its /health.

        That a host is unavailable is not said again for some minutes.
        """
        said = [begins for who, begins, _ in outages(self.runs[-1]) if who == LIBRARY]
        missed = {LIBRARY} if said[-1:] == [True] else set()
        return missed | {host for host, state in self._hosts().items() if state != "ok"}

    def _hosts(self) -> dict[str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            with closing(connection):
                connection.request("GET", "/health")
                states: dict[str, str] = json.load(connection.getresponse())["model_hosts"]
                return states
        except (OSError, http.client.HTTPException):  # it is not there yet, or any more
            return {}

    @property
    def surprise(self) -> int | None:
        """The exit code with which it ended though nobody asked it to."""
        return None if self._asked or not self._process else self._process.poll()

    def ask(self) -> None:
        """Ask it to end, as services are asked."""
        self._asked = True
        self._process.terminate()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> int | None:
        """End it at once if it has not ended; its exit code."""
        if not self._process:
            return None
        process, self._process = self._process, None
        process.kill()
        process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        process.stderr.close()
        return process.returncode

    def heard(self, seen: re.Pattern[str] | str, since: int = 0) -> int:
        """How many lines from one on have this in them."""
        return sum(1 for line in self.said[since:] if re.search(seen, line))


def outages(lines: Iterable[str]) -> Iterator[tuple[str, bool, str]]:
    """Who went away or came back by the lines of one process, in order, with the line."""
    for line in lines:
        host = next(iter(re.findall(r"http://[\d.]+:\d+", line)), "")
        for seen, who, begins in (
            (HOST_AWAY, host, True),
            (HOST_BACK, host, False),
            (WAITING, LIBRARY, True),
            (BACK, LIBRARY, False),
        ):
            if seen.search(line):
                yield who, begins, line


# --- The library, behind either way of access ----------------------------------------------------


class Write(NamedTuple):
    """A description that the tool stored."""

    id: str
    before: str  # what it replaced
    text: str


class WatchedImmich(FakeImmich):
    """Notes each write as it takes effect, and who was looked at last."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self.last: dict[str, str] = {}  # call that was last answered about a photo
        self.answering = threading.Event()  # writes are answered
        self.answering.set()

    def _answer(self, exchange: servers.Exchange) -> Any:
        answer = super()._answer(exchange)
        if id := exchange.params.get("id"):
            self.last[id] = exchange.operation.name
        return answer

    def _describe(self, asset: servers.FakeAsset, text: str) -> None:
        self.writes.append(Write(asset.id, asset.description, text))
        super()._describe(asset, text)

    def serve(self, exchange: servers.Exchange) -> Reply | None:
        reply = super().serve(exchange)
        if (exchange.operation and exchange.operation.name) == "updateAsset":
            self.answering.wait()  # for the queue that writes files; notes are not written there
        return reply


class ApiLibrary:
    """The library behind Immich's API."""

    name = "api"
    here = True  # whether people and Immich itself get at it

    def __init__(self, stack: ExitStack) -> None:
        self.server: WatchedImmich = stack.enter_context(WatchedImmich())
        # a key that may not ask who it is would write nothing to a photo to learn that
        self.server.keys[self.server.key] = FakeKey("alice", [*servers.MINIMAL, "user.read"])
        self.argv = ["--immich-api-url", self.server.url, "--immich-api-keys", self.server.key]

    def add(self, text: str) -> str:
        """Upload a photo; it has no preview yet."""
        return self.server.add(preview=None, description=text).id

    def preview(self, id: str, picture: bytes) -> list[Callable[[], None]]:
        """The steps by which Immich makes a preview."""
        return [functools.partial(setattr, self.server.assets[id], "preview", picture)]

    def type(self, id: str, text: str) -> bool:
        """Describe a photo as a person; False if it was not the time.

        Immich has no write on condition: who types between the tool's last look and its write
        loses, as README says. People here leave that moment alone.
        """
        with self.server.lock:
            if self.server.last.get(id) == "getAssetInfo":
                return False
            self.server.assets[id].description = text
            return True

    def begun(self, id: str) -> bool:
        """Whether the tool is at work on a photo; one that it saw unready it may look up late."""
        return self.server.last.get(id) == "viewAsset"

    def texts(self) -> dict[str, str]:
        return {id: asset.description for id, asset in self.server.assets.items()}

    def writes(self) -> list[Write]:
        return self.server.writes

    def check(self) -> None:
        self.server.check()


class SqlLibrary:
    """The library in PostgreSQL, whose trigger notes each write of the tool as it takes effect."""

    name = "database"

    def __init__(self, stack: ExitStack, postgres: sandbox.Postgres, root: Path) -> None:
        self.postgres = postgres
        uri = postgres.database()
        stack.callback(postgres.drop, uri)
        self.photos = stack.enter_context(sandbox.PhotoLibrary(uri, root))
        self.here = True
        named = psycopg2.extensions.parse_dsn(uri) | {"application_name": "tool"}
        self.argv = ["--postgres-url", sandbox.libpq_uri(named), "--immich-root", str(root)]
        # in spite of the server's settings: what is written survives a crash, as with Immich
        name = named["dbname"]
        self.photos.run(f'ALTER DATABASE "{name}" SET synchronous_commit = on')
        self.photos.run("CREATE SCHEMA seen")
        self.photos.run('CREATE TABLE seen.writes (n serial, id uuid, before text, "text" text)')
        self.photos.run(
            "CREATE FUNCTION seen.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            ' INSERT INTO seen.writes (id, before, "text")'
            " VALUES (NEW.\"assetId\", coalesce(OLD.description, ''), NEW.description);"
            " RETURN NULL; END $$"
        )
        self.photos.run(
            "CREATE TRIGGER noted AFTER UPDATE ON {exif} FOR EACH ROW"
            " WHEN (current_setting('application_name') = 'tool')"
            " EXECUTE FUNCTION seen.note()"
        )

    def add(self, text: str) -> str:
        return self.photos.add(preview=False, description=text)

    def preview(self, id: str, picture: bytes) -> list[Callable[[], None]]:
        """First the file, a little later its row."""
        write = functools.partial(self.photos.write_preview, id, picture)
        return [write, functools.partial(self.photos.add_preview, id)]

    def type(self, id: str, text: str) -> bool:
        self.photos.describe(id, text)
        return True

    def begun(self, id: str) -> bool:
        return True

    def texts(self) -> dict[str, str]:
        return self.photos.descriptions()

    def writes(self) -> list[Write]:
        rows = self.photos.run('SELECT id::text, before, "text" FROM seen.writes ORDER BY n')
        return [Write(*row) for row in rows]

    def check(self) -> None:
        """PostgreSQL itself refused what was wrong."""

    def blocked(self) -> int:
        """How many writes of the tool wait for a lock."""
        [(count,)] = self.photos.run(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'tool' AND wait_event_type = 'Lock'"
        )
        return count


Library = ApiLibrary | SqlLibrary


@dataclass
class Photo:
    """A photo that arrived, and what it must say in the end."""

    id: str
    picture: bytes
    typed: str = ""  # by a person, at last
    late: bool = False  # its preview comes some time after it
    ready: bool = False

    @property
    def wanted(self) -> str:
        return self.typed or servers.told(self.picture)


def wrongs(
    photos: Iterable[Photo], texts: dict[str, str], writes: Sequence[Write]
) -> Iterator[str]:
    """What is not as it should be in the end, a line each."""
    for photo in photos:
        own, told = [write for write in writes if write.id == photo.id], servers.told(photo.picture)
        if texts[photo.id] != photo.wanted:
            yield f"{photo.id}: says {texts[photo.id]!r} instead of {photo.wanted!r}"
        if len(own) > 1:
            yield f"{photo.id}: was written {len(own)} times: {own}"
        if not own and not photo.typed:
            yield f"{photo.id}: was written by nobody that was seen"
        for write in own:
            if write.before.strip():
                yield f"{photo.id}: {write.before!r} was replaced"
            if write.text != told:
                yield f"{photo.id}: was described as {write.text!r} instead of {told!r}"


def repeated(lines: Iterable[str]) -> Iterator[str]:
    """Lines of one process about an outage that it had told of already."""
    away: set[str] = set()
    for who, begins, line in outages(lines):
        if begins and who in away:
            yield line
        (away.add if begins else away.discard)(who)


# --- The trial -----------------------------------------------------------------------------------


class Mark(Flag):
    """What sets a fault apart."""

    LASTING = auto()  # may go on for seconds without costing a photo its tries
    KIN = auto()  # so much like another one that the short form goes without
    SLOW = auto()  # takes more than a minute: once, in the long form


class Fault(NamedTuple):
    """Something that goes wrong for a while."""

    name: str
    takes: str  # a letter for each of hosts A and B, library and tool: two at a time share none
    happening: Callable[[], AbstractContextManager[Met]]
    marks: Mark = Mark(0)


@dataclass(frozen=True)
class Plan:
    """How much there is to do; the long form."""

    photos: int = 200
    rounds: int = 40
    seed: int = 0
    thinking: float = 0.25  # how long a model takes
    lasts: float = 3.0  # how long an outage goes on after it was met
    spread: float = 3.0  # within how many seconds the photos of a round arrive
    late: float = 3.0  # how long a preview or a person takes at most
    ceiling: float = 200.0  # a photo that failed three times is tried again after 60 s, then 90
    long: bool = True
    tool: Path = TOOL


SHORT: dict[str, Any] = {
    "thinking": 0.03,
    "lasts": 0.05,
    "spread": 0.5,
    "late": 1.4,
    "ceiling": 20.0,
    "long": False,
}


class Outcome(NamedTuple):
    """How a trial went."""

    problems: list[str]
    log: list[str]
    summary: str


class Trial:
    """One library, two model hosts and the tool; all of it lives in the thread that runs it."""

    def __init__(self, library: Library, plan: Plan, stack: ExitStack, say: Callable[[str], None]):
        self.library, self.plan, self.say = library, plan, say
        self.chance = random.Random(plan.seed)
        kind = FakeOllama if library.name == "api" else FakeLlamaCpp
        self.hosts = [stack.enter_context(kind(answer=self._think)) for _ in range(2)]
        spoken = "ollama" if kind is FakeOllama else "llamacpp"
        urls = ",".join(host.url for host in self.hosts)
        argv = [*library.argv, *itertools.chain(*QUICK.items())]
        argv += ["--hosts", urls, "--interface", spoken, "--model-name", "tiny-vlm"]
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="immich-home-")))
        self.tool = Tool(plan.tool, argv, home)
        stack.callback(self.tool.kill)
        self.photos: dict[str, Photo] = {}
        self.problems: list[str] = []
        self.broken = False
        self._thinking: list[bytes] = []  # pictures that the models look at
        self._wishes: dict[bytes, tuple[Photo, threading.Event]] = {}  # to be typed over meanwhile
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._arrived = 0  # with those that are on their way
        self._began = time.monotonic()

    # Life: people, uploads and the models' thoughts

    def _think(self, picture: bytes, _: str) -> str:
        """Answer for a model, in a thread of its server's; a person may write first."""
        self._thinking.append(picture)
        self.tool.news.set()
        if wish := self._wishes.get(picture):
            wish[1].wait(0.5)
        else:
            threading.Event().wait(self.plan.thinking)
        self._thinking.remove(picture)
        return servers.told(picture)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), action))

    def arrivals(self, number: int, within: float = 0.0) -> None:
        """Let so many photos arrive in the next seconds."""
        self._arrived += number
        for _ in range(number):
            self.later(self.chance.uniform(0, within), self._arrive)

    def _arrive(self) -> None:
        """A photo and its fate: it has a text, or a person writes one, or its preview is late."""
        number = len(self.photos)
        picture, fate = servers.own_picture(number), self.chance.random()
        text = f"A person wrote this before, {number}." if fate < 0.08 else ""
        photo = Photo(self.library.add(text), picture, text, late=fate > 0.75)
        self.photos[photo.id] = photo
        if 0.08 < fate < 0.2:
            self._wishes[picture] = (photo, threading.Event())
        elif 0.2 < fate < 0.3:
            self.later(self.chance.uniform(0, self.plan.late), functools.partial(self._type, photo))
        self._make_preview(photo)

    def _make_preview(self, photo: Photo) -> None:
        when = self.chance.uniform(0.2, self.plan.late) if photo.late else 0.0
        for step in self.library.preview(photo.id, photo.picture):
            self.later(when, step)
            when += self.chance.uniform(0.02, 0.11)  # as long as Immich takes
        self.later(when, functools.partial(setattr, photo, "ready", True))

    def _type(self, photo: Photo) -> None:
        text = f"A person wrote this about {photo.id[:8]}."
        if self.library.type(photo.id, text):
            photo.typed = text

    def _tick(self) -> None:
        """Do what is due; while nobody gets at the library it has to wait."""
        while self.library.here and self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[-1]()
        for picture in [*self._thinking] if self.library.here else ():
            if wish := self._wishes.pop(picture, None):
                self._type(wish[0])
                wish[1].set()
        if self.tool.surprise is not None:
            raise Broken(f"the tool ended by itself, with exit code {self.tool.surprise}")

    def live(self, seconds: float, until: Met = lambda: False) -> bool:
        """Let time pass, or less of it if something happens; whether that did."""
        deadline = time.monotonic() + seconds
        while not until():
            self._tick()
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.tool.news.wait(min(left, 0.02))
            self.tool.news.clear()
        return True

    def work(self, seconds: float, until: Met) -> bool:
        """Live while a photo arrives whenever the tool has nothing left to do."""
        deadline = time.monotonic() + seconds
        while not self.live(0.15, until):
            if time.monotonic() > deadline:
                return False
            arrived = len(self.photos) == self._arrived
            if self.library.here and arrived and not self.undescribed():
                self.arrivals(1)
        return True

    def must(self, what: str, happened: bool) -> None:
        """Go on only if it did."""
        if not happened:
            raise Broken(f"it never came: {what}")

    def stop_tool(self) -> None:
        """Ask it to end, and go on with life until it has."""
        self.tool.ask()
        self.must("the tool's end", self.live(2 * PATIENCE, lambda: self.tool.ended))
        if code := self.tool.kill():
            self.problems.append(f"after SIGTERM the exit code was {code}")

    # The course of events

    def undescribed(self) -> list[Photo]:
        """The photos that could have a description by now, and have none."""
        texts = self.library.texts()
        return [p for p in self.photos.values() if p.ready and not texts[p.id].strip()]

    def settled(self) -> bool:
        """Whether the tool runs, misses nobody, and has described all that it can know of.

        So no photo takes what one fault cost it of its tries into the next one.
        """
        arrived = len(self.photos) == self._arrived
        complete = arrived and all(photo.ready or photo.late for photo in self.photos.values())
        well = self.tool.ready and not self.tool.away
        begun = self.library.begun
        return well and complete and all(p.late and not begun(p.id) for p in self.undescribed())

    def alone(self, number: str, fault: Fault, photos: int) -> None:
        """One fault in the middle of work, until all of its photos are described after all."""
        began, said, before = time.monotonic(), len(self.tool.said), len(self.photos)
        self.arrivals(photos - photos // 2, 0.15)
        self.live(1, lambda: len(self.photos) > before)
        with fault.happening() as met:
            self.arrivals(photos // 2, 0.15)
            self.must(
                f"sign of {fault.name}",
                self.work(100 if Mark.SLOW in fault.marks else PATIENCE, met),
            )
            self.live(self.plan.lasts if Mark.LASTING in fault.marks else 0.1)
        self.must(f"end of {fault.name}", self.work(self.plan.ceiling, self.settled))
        self.tell(number, fault.name, began, said, MOST_LINES)

    def at_random(self, number: str, faults: Sequence[Fault], photos: int) -> None:
        """One or two faults at once, and no waiting for what they leave undone."""
        began, said = time.monotonic(), len(self.tool.said)
        self.started()
        self.arrivals(photos, self.plan.spread)
        first = self.chance.choice(faults)
        free = [fault for fault in faults if not set(fault.takes) & set(first.takes)]
        chosen = [first, *self.chance.sample(free, min(len(free), self.chance.randint(0, 1)))]
        with ExitStack() as stack:
            for fault in chosen:
                stack.enter_context(fault.happening())
                self.live(self.chance.uniform(0, 0.5))
            self.live(self.chance.uniform(0, self.plan.spread / 2))
        self.live(self.chance.uniform(0, self.plan.spread / 3))
        names = " + ".join(fault.name for fault in chosen)
        self.tell(number, names, began, said, 2 * MOST_LINES)

    def tell(self, number: str, name: str, began: float, said: int, most: int) -> None:
        """Say what just happened, in a line; the tool may have used so many about it."""
        spent, lines = time.monotonic() - began, self.tool.said[said:]
        counts = f"{len(self.photos)} photos, {len(self.undescribed())} open, {len(lines)} lines"
        self.say(f"{self.library.name:8} {number:>7}  {name:{WIDTH}} {spent:5.1f} s  {counts}")
        about_it = [line for line in lines if not FAILED.search(line)]
        if len(about_it) > most:
            self.problems.append("\n    ".join([f"{name}: {len(about_it)} lines", *about_it]))

    def run(self, faults: Sequence[Fault]) -> None:
        """All of it."""
        plan, rounds = self.plan, self.plan.rounds
        share = max(3, plan.photos // (len(faults) + rounds + 1))
        self.arrivals(share)
        self.live(0.1)
        self.tool.start()
        self.started()
        for number, fault in enumerate(faults, 1):
            self.alone(f"{number}/{len(faults)}", fault, share)
        quick = [fault for fault in faults if Mark.SLOW not in fault.marks]
        for number in range(1, rounds + 1):
            if number > rounds * 3 / 4:  # another start would find what this one has lost
                quick = [fault for fault in quick if "T" not in fault.takes]
            self.at_random(f"{number}/{rounds}", quick, share)
            if not plan.long:
                self.must("end of all trouble", self.work(plan.ceiling, self.settled))
        began, said = time.monotonic(), len(self.tool.said)
        self.arrivals(max(0, plan.photos - self._arrived), plan.spread)
        self.must("a description of each photo", self.live(plan.ceiling, self.finished))
        self.live(0.3)  # in which nothing is written again
        self.started()
        self.stop_tool()
        self.tell("end", "all is described, the tool is asked to end", began, said, MOST_LINES)

    def started(self) -> None:
        """Wait for the tool's start to be over."""
        self.must("the tool's start", self.live(PATIENCE, lambda: self.tool.ready))

    def finished(self) -> bool:
        """Whether all photos have arrived and are described."""
        return len(self.photos) == self._arrived and not self._due and not self.undescribed()

    def verdict(self) -> Outcome:
        """What was wrong, and a summary."""
        photos, said, texts = self.photos.values(), self.tool.said, self.library.texts()
        done = [photo for photo in photos if texts[photo.id].strip() or not self.broken]
        found = [*self.problems, *wrongs(done, texts, self.library.writes())]
        again = [line for lines in self.tool.runs for line in repeated(lines)]
        if self.broken:
            found.append(f"open then: {[photo.id for photo in self.undescribed()]}")
        found += [f"said again: {line}" for line in again]
        found += [f"a bug: {line}" for line in said if BUG.search(line)]
        for server in (self.library, *self.hosts):
            try:
                server.check()
            except AssertionError as error:
                found.append(f"against the contract: {error}")
        return Outcome(found, said, self._summary())

    def _summary(self) -> str:
        asked = sum(len(host.asked) for host in self.hosts)
        typed = sum(1 for photo in self.photos.values() if photo.typed)
        return (
            f"{self.library.name}: {len(self.photos)} photos, {typed} described by people;"
            f" {asked} answers of the models, {len(self.tool.runs) - 1} starts of the tool,"
            f" {self.tool.heard(FAILED)} failures on the way, {len(self.tool.said)} lines;"
            f" {time.monotonic() - self._began:.1f} s, seed {self.plan.seed}"
        )


# --- What goes wrong -----------------------------------------------------------------------------


class Faults:
    """The faults of one trial, each a context manager that gives a way to know it was met."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._tool, self._library = trial.tool, trial.library

    def all(self) -> list[Fault]:
        """Each of them, in order; the tool's first, as a start finds what the last one lost."""
        own = self._of_api() if self._library.name == "api" else self._of_database()
        faults = [*self._of_tool(), *self._of_hosts(), *own]
        left_out = Mark(0) if self._trial.plan.long else Mark.KIN | Mark.SLOW
        return [fault for fault in faults if not fault.marks & left_out]

    # Model hosts

    def _of_hosts(self) -> list[Fault]:
        first, second = self._trial.hosts
        busy, wait = {"error": "busy"}, {"Retry-After": "1"}
        replies = Reply(503, busy), Reply(429, busy, wait)
        others = Reply(429, busy), Reply(503, busy, wait)
        broken = Reply(500, {"error": "out of memory"})
        lasting, kin = Mark.LASTING, Mark.KIN
        return [
            Fault("a model host is closed", "A", lambda: self._closed(first), lasting),
            Fault(
                "both model hosts are closed", "AB", lambda: self._closed(first, second), lasting
            ),
            Fault("503, and 429 with Retry-After", "AB", lambda: self._says(*replies), lasting),
            Fault(
                "429, and 503 with Retry-After", "AB", lambda: self._says(*others), lasting | kin
            ),
            Fault("a model host fails (500)", "A", lambda: self._fails(broken, first)),
            Fault(
                "both fail until they are unavailable (500)", "AB", lambda: self._fails_all(broken)
            ),
            Fault("a model host hangs beyond --timeout", "A", lambda: self._hangs(first)),
            Fault("answers end in the middle", "AB", lambda: self._next(CUT)),
            Fault("requests get no answer", "AB", lambda: self._next(RESET), kin),
        ]

    def _missed(self, *hosts: servers.FakeServer) -> bool:
        """Whether the tool has said that these are away."""
        return {host.url for host in hosts} <= self._tool.away

    @contextmanager
    def _closed(self, *hosts: servers.FakeServer) -> Iterator[Met]:
        for host in hosts:
            host.close()
        yield lambda: self._missed(*hosts)
        for host in hosts:
            reopen(host)

    @contextmanager
    def _says(self, *replies: Reply) -> Iterator[Met]:
        """One reply for each host."""
        hosts = self._trial.hosts
        for host, reply in zip(hosts, replies, strict=True):
            host.script(*CHATS, reply, forever=True)
        yield lambda: self._missed(*hosts)
        for host in hosts:
            host.forget_scripts()

    @contextmanager
    def _fails(self, reply: Reply, *hosts: servers.FakeServer) -> Iterator[Met]:
        before = {host: host.count(*CHATS) for host in hosts}
        for host in hosts:
            host.script(*CHATS, reply, forever=True)
        yield lambda: all(host.count(*CHATS) > seen for host, seen in before.items())
        for host in hosts:
            host.forget_scripts()

    @contextmanager
    def _fails_all(self, reply: Reply) -> Iterator[Met]:
        """Until both are known to be sick; no photo is to blame then."""
        with self._fails(reply, *self._trial.hosts):
            yield lambda: self._missed(*self._trial.hosts)

    @contextmanager
    def _hangs(self, host: servers.FakeServer) -> Iterator[Met]:
        host.hold(*CHATS)
        over: list[float] = []

        def met() -> bool:
            if not over and host.arrived.acquire(blocking=False):
                over.append(time.monotonic() + TIMEOUT)
            return bool(over) and time.monotonic() > over[0]

        yield met
        host.gate.set()

    @contextmanager
    def _next(self, trouble: servers.Special) -> Iterator[Met]:
        """The next request to each; a photo has three tries."""
        before = {host: host.count(*CHATS) for host in self._trial.hosts}
        for host in self._trial.hosts:
            host.script(*CHATS, trouble)
        yield lambda: all(host.count(*CHATS) > seen for host, seen in before.items())
        for host in self._trial.hosts:
            host.forget_scripts()

    # Immich

    def _of_api(self) -> list[Fault]:
        lasting, kin, slow = Mark.LASTING, Mark.KIN, Mark.SLOW
        return [
            Fault("Immich is closed", "L", self._immich_closed, lasting),
            Fault("Immich is in maintenance", "L", lambda: self._immich("maintenance"), lasting),
            Fault("Immich's database is down", "L", lambda: self._immich("database_down"), lasting),
            Fault("a proxy finds no Immich (502)", "L", self._proxied, lasting | kin),
            Fault("answers to writes are lost", "L", lambda: self._write(CUT)),
            Fault("writes get no answer", "L", lambda: self._write(RESET), kin),
            Fault("writes are answered too late", "L", self._late, slow),
        ]

    def _waits(self) -> bool:
        return LIBRARY in self._tool.away

    @contextmanager
    def _immich_closed(self) -> Iterator[Met]:
        self._library.server.close()
        yield self._waits
        reopen(self._library.server)

    @contextmanager
    def _immich(self, trouble: str) -> Iterator[Met]:
        setattr(self._library.server, trouble, True)
        yield self._waits
        setattr(self._library.server, trouble, False)

    @contextmanager
    def _proxied(self) -> Iterator[Met]:
        page = Reply(502, "<html>Bad Gateway</html>")
        self._library.server.script(".*", "", page, forever=True)
        yield self._waits
        self._library.server.forget_scripts()

    @contextmanager
    def _write(self, trouble: servers.Special) -> Iterator[Met]:
        server = self._library.server
        before = server.count(*WRITES)
        server.script(*WRITES, trouble, trouble)
        yield lambda: server.count(*WRITES) >= before + 2
        server.forget_scripts()

    @contextmanager
    def _late(self) -> Iterator[Met]:
        """Immich has done them, but answers after more than a minute."""
        server, over = self._library.server, list[float]()
        before = len(server.writes)
        server.answering.clear()

        def met() -> bool:
            if not over and len(server.writes) > before:
                over.append(time.monotonic() + 62)
            return bool(over) and time.monotonic() > over[0]

        try:
            yield met
        finally:
            server.answering.set()

    # PostgreSQL

    def _of_database(self) -> list[Fault]:
        lasting = Mark.LASTING
        own = [
            Fault("PostgreSQL is stopped", "L", lambda: self._stopped("fast"), lasting),
            Fault("PostgreSQL crashes", "L", lambda: self._stopped("immediate"), lasting),
        ]
        return [
            *(own if self._library.postgres.own else []),
            Fault("connections are ended", "L", lambda: self._ended(0), Mark.KIN),
            Fault(
                "connections are ended again and again",
                "L",
                lambda: self._ended(max(0.5, self._trial.plan.lasts)),
            ),
        ]

    @contextmanager
    def _stopped(self, mode: str) -> Iterator[Met]:
        self._library.here = False
        try:
            self._library.postgres.stop(mode)
            yield self._waits
        finally:
            self._library.postgres.start()
            self._library.here = True

    @contextmanager
    def _ended(self, seconds: float) -> Iterator[Met]:
        """By an administrator, for so long; those that are only being opened too."""
        ended, began = 0, time.monotonic()
        while (spent := time.monotonic() - began) < seconds or (not ended and spent < 2):
            rows = self._library.photos.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'tool'"
            )
            ended += len(rows)
            self._trial.live(0)
        yield lambda: ended

    # The tool

    def _of_tool(self) -> list[Fault]:
        write = self._killed_at_put if self._library.name == "api" else self._killed_at_update
        return [
            Fault("the tool is killed", "T", self._killed),
            Fault("it is killed while the models think", "TAB", self._killed_in_flight),
            Fault("it is killed while it writes", "TABL", write),
            Fault("it is asked to end, and started", "T", self._asked),
        ]

    @contextmanager
    def _killed(self) -> Iterator[Met]:
        self._tool.kill()
        yield lambda: True
        self._tool.start()

    @contextmanager
    def _asked(self) -> Iterator[Met]:
        self._trial.stop_tool()
        yield lambda: True
        self._tool.start()

    def _hold(self, call: tuple[str, str], *held: servers.FakeServer) -> bool:
        """Wait until one of these holds such a request; with another fault there may be none."""
        for server in held:
            server.hold(*call)
        arrived = [server.arrived for server in held]
        return self._trial.work(3, lambda: any(one.acquire(blocking=False) for one in arrived))

    def _release(self) -> None:
        for host in self._trial.hosts:
            host.gate.set()

    @contextmanager
    def _killed_in_flight(self) -> Iterator[Met]:
        held = self._hold(CHATS, *self._trial.hosts)
        self._tool.kill()
        yield lambda: held
        self._release()
        self._tool.start()

    @contextmanager
    def _killed_at_put(self) -> Iterator[Met]:
        """The write is lost with Immich, which is restarted too."""
        server = self._library.server
        held = self._hold(WRITES, server)
        self._tool.kill()
        server.close()
        yield lambda: held
        reopen(server)
        self._tool.start()

    @contextmanager
    def _killed_at_update(self) -> Iterator[Met]:
        """The write waits in PostgreSQL, which does it though nobody is left to be told.

        Until then the photo is claimed by the dead, so the next one leaves it alone.
        """
        self._hold(CHATS, *self._trial.hosts)
        with sandbox.connected(self._library.photos.uri) as cursor:
            cursor.connection.autocommit = False
            table = self._library.photos.tables["exif"]
            cursor.execute(f'LOCK TABLE "{table}" IN SHARE ROW EXCLUSIVE MODE')
            self._library.here = False  # people would wait as well
            self._release()
            self._trial.live(3, self._library.blocked)
            self._tool.kill()
            left = self._library.blocked()
            self._tool.start()
            yield lambda: self._tool.ready and left > 0
        self._library.here = True


def reopen(server: servers.FakeServer) -> None:
    """Start a server at its port again, which a passing connection may hold for a moment."""
    for left in reversed(range(50)):
        try:
            server.start()
            break
        except OSError:
            if not left:
                raise
            threading.Event().wait(0.1)


# --- Running it ----------------------------------------------------------------------------------


def tried(
    access: str,
    plan: Plan,
    postgres: sandbox.Postgres | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """One trial from its beginning to its end."""
    with ExitStack() as stack:
        if access == "api":
            library: Library = ApiLibrary(stack)
        else:
            server = postgres or stack.enter_context(sandbox.Postgres())
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="immich-photos-"))
            library = SqlLibrary(stack, server, Path(folder))
        trial = Trial(library, plan, stack, say)
        try:
            trial.run(Faults(trial).all())
        except Broken as broken:
            trial.broken = True
            trial.problems.append(str(broken))
        outcome = trial.verdict()
    say(outcome.summary)
    for problem in outcome.problems:
        say(f"  PROBLEM {problem}")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("access", nargs="?", default="both", choices=["api", "database", "both"])
    add("--photos", type=int, default=Plan.photos, metavar="N")
    add("--rounds", type=int, default=Plan.rounds, metavar="N", help="of faults at random")
    add("--seed", type=int, default=secrets.randbelow(10**6), metavar="N")
    add("--short", action="store_true", help="outages as short as in test_faults.py")
    add("--tool", type=Path, default=TOOL, metavar="FILE", help="another copy of the tool")
    add("--log", action="store_true", help="show what the tool said")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # to tidy up
    form = SHORT if options.short else {}
    plan = Plan(options.photos, options.rounds, options.seed, tool=options.tool, **form)
    print(f"seed {plan.seed}", flush=True)
    say = functools.partial(print, flush=True)
    accesses = ["api", "database"] if options.access == "both" else [options.access]
    outcomes = [tried(access, plan, say=say) for access in accesses]
    for outcome in outcomes:
        if options.log or outcome.problems:
            print(*outcome.log[None if options.log else -60 :], sep="\n")
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
