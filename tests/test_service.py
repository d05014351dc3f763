"""The service by its command line: what arrives, what is away, and what it says of itself."""

import errno
import http.client
import json
import os
import queue
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import films
import pytest
import sandbox
import servers
from forks import Tool
from hours import with_health
from servers import RESET, FakeKey, FakeOllama, FakeServer, Reply
from worlds import (
    BUSY,
    CHATS,
    NO_PAUSE,
    ROOT,
    ApiWorld,
    Running,
    SqlWorld,
    World,
    about_photos,
    answer_by_picture,
    asking,
    fill,
    mainly,
    others_long,
    tally,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow

ALWAYS, NEVER = ["--api-poll-interval", "0.1"], ["--api-poll-interval", "1000"]
DEBUG, MONITOR = ["--log-level", "debug"], ["--mode", "monitor"]
READY = ia.t("ready")


# --- The service -----------------------------------------------------------------------------

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) (.*)")


def spoken(lines: list[str]) -> list[tuple[str, str]]:
    """Level and message of each line for people; there are no others."""
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    return [match.groups() for match in found if match[1] != "DEBUG"]


class Service(Running):
    """The command line as a service, which looks for arrivals all the time and says all it can."""

    def __init__(self, library: World, model: FakeServer, *more: str, **environ: str) -> None:
        argv = [*library.argv, *asking(model), *ALWAYS, *DEBUG, "--mode", "combined", *more]
        super().__init__(*argv, **environ)

    def hear(self, *texts: str) -> None:
        """Return once it has said each of these, in whatever order."""
        missing = [text for text in texts if not any(text in line for line in self.said)]
        while missing:
            try:
                line = self._lines.get(timeout=servers.PATIENCE)
            except queue.Empty:
                raise AssertionError(f"not said: {missing}, but: {self.said}") from None
            self.said.append(line)
            missing = [text for text in missing if text not in line]

    def wait_until_stored(self, *ids: str) -> None:
        """Return once it has stored a description for each of these."""
        self.hear(*(f"({id}), written: " for id in ids))

    def stop(self) -> int:
        """Ask it to end as services are asked; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    @property
    def spoken(self) -> list[tuple[str, str]]:
        return spoken(self.said)


STOPPING = ("WARNING", ia.t("finishing", signal="SIGTERM"))


def asked(model: FakeServer) -> list[bytes]:
    """The pictures the model was asked about, in the order of the requests."""
    chats = (exchange.json for exchange in model.find(*CHATS))
    return [ia.base64.b64decode(chat["messages"][0]["images"][0]) for chat in chats]


def note_arrivals(server: FakeServer, method: str, path: str) -> None:
    """Have `wait_for` count such requests; none is held."""
    server.hold(method, path)
    server.gate.set()


def add_unready(library: World, number: int) -> list[str]:
    """Photos whose previews Immich has not made yet."""
    if isinstance(library, SqlWorld):
        return library.photos.add_many(number, preview=False)
    return [asset.id for asset in library.server.add_many(number, preview=None)]


def make_preview(library: World, id: str, picture: bytes) -> None:
    """Make a preview as Immich does: the file, then its row."""
    if isinstance(library, SqlWorld):
        library.photos.write_preview(id, picture)
        library.photos.add_preview(id)
    else:
        library.server.assets[id].preview = picture


def grow_old(library: World) -> None:
    """Let what is there have arrived an hour ago."""
    if isinstance(library, ApiWorld):
        for asset in library.server.assets.values():
            asset.created_at -= timedelta(hours=1)
        return
    run = library.photos.run
    run("SET session_replication_role = replica")  # or a trigger stamps the rows anew
    run('UPDATE {asset} SET "createdAt" = "createdAt" - interval \'1 hour\'')
    run("UPDATE {file} SET \"updateId\" = immich_uuid_v7(now() - interval '1 hour')")
    run("SET session_replication_role = DEFAULT")


# --- Arrivals --------------------------------------------------------------------------------

BURST = 30  # as many as go three at a time
ROWS_BEHIND = 10  # files; the row of a preview comes some 20 to 110 ms after its file


def wait_for_the_watch(library: SqlWorld, model: FakeServer) -> None:
    """Return once a preview is noticed by its event, when nothing else tells of it."""
    [id] = add_unready(library, 1)
    library.photos.add_preview(id)
    note_arrivals(model, *CHATS)
    for _ in range(20 * servers.PATIENCE):  # the watch begins at some moment after the start
        library.photos.write_preview(id, servers.picture())
        if model.arrived.acquire(timeout=0.05):
            return
    raise AssertionError("no event came through")


def burst_with_events(library: SqlWorld, pictures: dict[str, bytes]) -> None:
    ids = list(pictures)
    for n in range(len(ids) + ROWS_BEHIND):
        if n < len(ids):
            library.photos.write_preview(ids[n], pictures[ids[n]])
        if n >= ROWS_BEHIND:
            library.photos.add_preview(ids[n - ROWS_BEHIND])


def burst_without_events(library: World, pictures: dict[str, bytes]) -> None:
    for id, picture in pictures.items():
        if isinstance(library, SqlWorld):
            library.photos.add_preview(id)
        else:
            make_preview(library, id, picture)


@pytest.mark.parametrize(
    ("access", "events"), [("database", True), ("database", False), ("api", False)]
)
def test_a_burst_of_arrivals_is_described_once_each(access, events, request, ollama):
    """With events nobody looks for them; without, the files were there before the tool."""
    library = request.getfixturevalue(access)
    pictures = {id: servers.own_picture(n) for n, id in enumerate(add_unready(library, BURST), 20)}
    if access == "database" and not events:
        for id, picture in pictures.items():
            library.photos.write_preview(id, picture)
    three = threading.Barrier(3, timeout=servers.PATIENCE)

    def answer(image: bytes, prompt: str) -> str:
        three.wait()  # fewer at a time than were allowed are wrong as well
        return servers.told(image)

    pace = NEVER if events else ALWAYS
    with Service(library, ollama, *MONITOR, "--max-concurrent", "3", *pace) as tool:
        tool.hear(READY)
        if events:
            wait_for_the_watch(library, ollama)
        ollama.answer = answer
        (burst_with_events if events else burst_without_events)(library, pictures)
        tool.wait_until_stored(*pictures)
        assert tool.stop() == 0
    assert Counter(asked(ollama)) - Counter([servers.picture()]) == Counter(pictures.values())
    assert ollama.most_in_flight == 3
    assert library.texts().items() >= {id: servers.told(p) for id, p in pictures.items()}.items()


@pytest.mark.parametrize(
    ("library", "mode"),
    others_long(
        [(access, mode) for access in ("api", "database") for mode in ("monitor", "combined")],
        *(("api", "combined"), ("database", "monitor")),
    ),
    indirect=["library"],
)
def test_a_video_that_arrives_is_described(library, ollama, mode):
    options = NEVER if isinstance(library, SqlWorld) else ()  # there, inotify tells
    with Service(library, ollama, "--mode", mode, "--videos", *options) as tool:
        tool.hear(READY)
        if isinstance(library, SqlWorld):
            wait_for_the_watch(library, ollama)
        id = library.add("a.mp4", type="VIDEO", film=films.film(), picture=servers.picture("gray"))
        tool.wait_until_stored(id)
        assert tool.stop() == 0
    assert tuple(map(servers.colour_of, ollama.shown[-1])) == films.FOUR


def test_what_events_and_the_feed_both_tell_of_is_described_once(hours, database, ollama):
    stray, *ids = add_unready(database, 5)
    pictures = {id: servers.own_picture(n) for n, id in enumerate([stray, *ids])}
    database.photos.write_preview(stray, pictures[stray])  # before anybody watches
    with hours.service(database, ollama, *MONITOR, "--api-poll-interval", "10") as run:
        run.until(60)
        for id in ids:
            hours.told_by_others(lambda id=id: make_preview(database, id, pictures[id]))
        run.until(100)  # the feed has gone over all of them
        assert (run.counts, run.lines(ia.t("watch_missed"))) == ({"described": 4}, [])
        database.photos.add_preview(stray)
        run.until(200)
    assert run.counts == {"described": 5}
    assert Counter(asked(ollama)) == Counter(pictures.values())
    assert run.lines(level="WARNING") == [ia.t("watch_missed")]  # once


def test_arrivals_overtake_the_backlog(library, ollama):
    backlog = fill(library, 40)
    grow_old(library)
    new = servers.own_picture(1000)
    turns = threading.Semaphore(0)

    def answer(image: bytes, prompt: str) -> str:
        assert turns.acquire(timeout=servers.PATIENCE), "no turn came"
        return servers.told(image)

    ollama.answer = answer
    note_arrivals(ollama, *CHATS)
    with Service(library, ollama, "--max-concurrent", "1") as tool:
        ollama.wait_for(1)
        id = library.add(picture=new)
        before = 0
        while new not in asked(ollama):
            before += 1
            turns.release()
            ollama.wait_for(1)
        turns.release(100)
        tool.wait_until_stored(id, *backlog)
        assert tool.stop() == 0
    assert before < len(backlog) - 10  # the last few may be asked about in any order
    assert set(Counter(asked(ollama)).values()) == {1}
    assert library.texts() == backlog | {id: servers.told(new)}
    assert tool.spoken[-1][1].startswith(tally(described=41))


def test_monitoring_leaves_the_backlog_alone(library, ollama):
    backlog = fill(library, 3)
    grow_old(library)
    with Service(library, ollama, *MONITOR) as tool:
        tool.hear(READY)
        if isinstance(library, SqlWorld):
            wait_for_the_watch(library, ollama)
        id = library.add(picture=servers.own_picture(100))
        tool.wait_until_stored(id)
        assert tool.stop() == 0
    texts = library.texts()
    assert {id: texts[id] for id in backlog} == dict.fromkeys(backlog, "")
    assert texts[id] == servers.told(servers.own_picture(100))
    assert {*asked(ollama)} <= {servers.picture(), servers.own_picture(100)}


def test_what_has_a_description_is_left_alone_when_it_arrives(library, ollama):
    with Service(library, ollama) as tool:
        tool.hear(READY)
        if isinstance(library, SqlWorld):
            wait_for_the_watch(library, ollama)
        by_hand = library.add(picture=servers.own_picture(1), description="By a person.")
        id = library.add(picture=servers.own_picture(2))
        tool.wait_until_stored(id)
        assert tool.stop() == 0
    assert library.texts()[by_hand] == "By a person."
    assert asked(ollama)[-1] == servers.own_picture(2)
    assert servers.own_picture(1) not in asked(ollama)


def test_a_photo_is_described_once_its_preview_is_made(api, immich, ollama):
    with Service(api, ollama, *MONITOR) as tool:
        tool.hear(READY)
        [id] = add_unready(api, 1)
        note_arrivals(immich, "POST", "/search/metadata")
        immich.wait_for(3)  # timeline, archive, timeline: one of the first two was answered
        make_preview(api, id, servers.picture())
        tool.wait_until_stored(id)
        assert tool.stop() == 0
    assert tool.spoken[-1][1].startswith(tally(described=1))
    assert asked(ollama) == [servers.picture()]
    assert immich.count("GET", "/thumbnail") == 1


# --- Photos that fail ------------------------------------------------------------------------


def test_what_arrives_is_described_while_others_fail(hours, api, ollama):
    """Five of them, and one place at the host; each is asked about three times."""
    sick = [servers.own_picture(n) for n in range(5)]
    ids = [api.add(picture=picture) for picture in sick]
    answer_by_picture(ollama, dict.fromkeys(sick, Reply(500, {"error": "out of memory"})))
    healthy = servers.own_picture(100)
    with hours.service(api, ollama, "--max-concurrent", "1", "--api-poll-interval", "30") as run:
        run.at(15, lambda: ids.append(api.add(picture=healthy)))
        run.until(60)
        assert run.counts == {"described": 1, "failed": 5}
        assert api.texts() == dict.fromkeys(ids, "") | {ids[-1]: servers.told(healthy)}
        run.until(3600)
    assert len(about_photos(ollama)) == 1 + 3 * len(sick)


# --- The end ---------------------------------------------------------------------------------


@mainly("database")
def test_a_service_without_work_ends_well_when_asked(library, ollama):
    with Service(library, ollama, *MONITOR) as tool:
        tool.hear(READY)
        tool.wait_until_stored(library.add(picture=servers.picture()))
        assert tool.stop() == 0
    first, stopping, last = tool.spoken
    assert (first, stopping) == (("INFO", READY), STOPPING)
    assert last[0] == "INFO"
    assert last[1].startswith(tally(described=1))


@mainly("api")
def test_what_is_in_flight_is_stored_before_the_end(library, ollama):
    backlog = fill(library, 6)
    ollama.hold(*CHATS)
    with Service(library, ollama, "--max-concurrent", "2", "--grace", "600") as tool:
        ollama.wait_for(2)
        tool.process.send_signal(signal.SIGTERM)
        tool.hear(STOPPING[1])
        ollama.gate.set()
        assert tool.end() == 0
    assert ollama.count(*CHATS) == 2
    written = dict(library.writes())
    assert len(written) == 2
    assert library.texts() == dict.fromkeys(backlog, "") | {id: backlog[id] for id in written}
    assert tool.spoken[-1][1].startswith(tally(described=2))


def test_a_second_signal_ends_a_service_at_once(api, ollama):
    fill(api, 3)
    ollama.hold(*CHATS)
    with Service(api, ollama, "--grace", "600") as tool:
        ollama.wait_for(3)
        tool.process.send_signal(signal.SIGTERM)
        tool.hear(STOPPING[1])
        assert tool.stop() == 128 + signal.SIGTERM
    assert api.writes() == []


def test_a_service_that_does_not_finish_within_the_grace_says_so_by_its_exit_code(api, ollama):
    fill(api, 3)
    ollama.hold(*CHATS)
    with Service(api, ollama, "--grace", "2") as tool:
        ollama.wait_for(3)
        assert tool.stop() == 128 + signal.SIGTERM
    stopping, (level, last) = tool.spoken[-2:]
    assert (stopping, level) == (STOPPING, "WARNING")
    assert last.startswith(tally())
    assert api.writes() == []


@mainly("database")
def test_what_was_in_hand_when_it_was_killed_is_found_again(library, ollama):
    with Service(library, ollama) as tool:
        tool.hear(READY)
        ollama.hold(*CHATS)
        wanted = fill(library, 4)
        ollama.wait_for(4)
        tool.process.kill()
        assert tool.end() == -signal.SIGKILL
    assert library.writes() == []
    grow_old(library)  # or they count as arrivals
    ollama.gate.set()
    with Service(library, ollama) as tool:
        tool.wait_until_stored(*wanted)
        assert tool.stop() == 0
    assert sorted(library.writes()) == sorted(wanted.items())


# --- The start -------------------------------------------------------------------------------

PATIENT = ["--wait-retry-interval", "0.02"]


class Nowhere:
    """A library at a port where nothing listens."""

    def __init__(self, access: str) -> None:
        port = sandbox.free_port()
        self.argv = ["--immich-api-url", f"http://127.0.0.1:{port}", "--immich-api-keys", "key"]
        if access == "database":
            self.argv = ["--postgres-url", f"host=127.0.0.1 port={port} user=nobody"]


def come_up_badly(server: FakeServer) -> None:
    """Start, but hang up on the first requests."""
    server.script(".*", "", RESET, forever=True)
    server.start()
    note_arrivals(server, ".*", "")
    server.wait_for(5)
    server.forget_scripts()


def test_it_waits_for_a_library_that_is_not_there_yet(library, ollama):
    wanted = fill(library, 2)
    library.begin("gone")
    with Service(library, ollama, *PATIENT) as tool:
        try:
            tool.hear(ia.t("waiting", why=""))
        finally:
            come_up_badly(library.server) if isinstance(library, ApiWorld) else library.end("gone")
        tool.wait_until_stored(*wanted)
        assert tool.stop() == 0
    assert_waited(tool)


def assert_waited(tool: Service) -> None:
    """It said once that it waits, and once that this is over."""
    waiting, back, ready, *_ = tool.spoken
    assert waiting[0] == back[0] == "INFO"
    assert waiting[1].endswith(ia.t("waiting", why=""))
    assert re.fullmatch(re.escape(ia.t("back", time="")[:-1]) + r"0:00:\d\d\.", back[1])
    assert ready == ("INFO", READY)
    assert len(tool.spoken) == 5


def test_it_waits_for_a_model_host_that_is_not_there_yet(api, ollama):
    wanted = fill(api, 2)
    ollama.close()
    with Service(api, ollama, *PATIENT) as tool:
        tool.hear(ia.t("waiting", why=""))
        come_up_badly(ollama)
        tool.wait_until_stored(*wanted)
        assert tool.stop() == 0
    assert_waited(tool)
    assert ollama.url in tool.spoken[0][1]


@pytest.mark.parametrize("missing", ["api", "database", "model"])
def test_it_gives_up_when_the_wait_is_over(missing, api, ollama):
    library = api if missing == "model" else Nowhere(missing)
    if missing == "model":
        ollama.close()
    with Service(library, ollama, *PATIENT, "--wait-timeout", "0.2") as tool:
        assert tool.end() == 2
    waiting, gave_up = tool.spoken
    assert waiting[1].endswith(ia.t("waiting", why=""))
    assert gave_up[0] == "CRITICAL"
    assert gave_up[1] == ia.t("library_away", why=waiting[1].removesuffix(ia.t("waiting", why="")))


def test_waiting_at_the_start_ends_well_when_asked(ollama):
    with Service(Nowhere("api"), ollama) as tool:
        tool.hear(ia.t("waiting", why=""))
        assert tool.stop() == 0
    assert tool.spoken[1:] == [STOPPING]


# --- What only looks final ------------------------------------------------------------------

SIGN_IN = "<html><body>Sign in</body></html>"
PROXIES = {
    "sends on": Reply(302, SIGN_IN, {"Location": "https://sign.in/"}),
    "wants a password": Reply(401, SIGN_IN),
    "forbids": Reply(403, SIGN_IN),
    "does not find": Reply(404, SIGN_IN),
    "shows a page": Reply(200, SIGN_IN, {"Content-Type": "text/html; charset=utf-8"}),
    "gateway": Reply(502, SIGN_IN),
}


@pytest.mark.parametrize("says", others_long(PROXIES, "sends on", "forbids", "shows a page"))
def test_a_proxy_that_answers_instead_is_waited_for(hours, api, immich, ollama, says):
    backlog = fill(api, 4)
    immich.script(".*", "", hours.between(1.5, 30, PROXIES[says]), forever=True)
    hours.pace(ollama)
    with hours.service(api, ollama, "--max-concurrent", "1", *NO_PAUSE) as run:
        run.until(120)
    assert [line.level for line in run.said] == ["INFO"] * 3
    ready, waiting, back = run.said
    assert ready.text == READY
    assert waiting.text.endswith(ia.t("waiting", why=""))
    assert waiting.at < 30 <= back.at
    assert (run.counts, api.texts()) == ({"described": 4}, backlog)


def test_a_proxy_that_answers_instead_is_waited_for_at_the_start(api, immich, ollama):
    backlog = fill(api, 2)
    immich.script(".*", "", PROXIES["does not find"], forever=True)
    with Service(api, ollama, *PATIENT) as tool:
        tool.hear(ia.t("waiting", why=""))
        immich.forget_scripts()
        tool.wait_until_stored(*backlog)
        assert tool.stop() == 0
    assert_waited(tool)


@pytest.mark.parametrize("renamed", [False, True], ids=["closed", "renamed"])
def test_a_database_that_is_being_restored_is_waited_for(database, ollama, renamed):
    if not database.server.own:
        pytest.skip("the server is not ours to stop")
    name = database.photos.run("SELECT current_database()")[0][0]
    with (
        Service(database, ollama, *ALWAYS, *NO_PAUSE) as tool,
        sandbox.connected(database.server.uri("postgres")) as admin,
    ):
        tool.hear(READY)
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        left = "SELECT pg_terminate_backend(pid, 9000) FROM pg_stat_activity WHERE datname = %s"
        admin.execute(left, (name,))
        if renamed:
            admin.execute(f'ALTER DATABASE "{name}" RENAME TO away')
        tool.hear(ia.t("waiting", why=""))
        if renamed:
            admin.execute(f'ALTER DATABASE away RENAME TO "{name}"')
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        tool.hear(ia.t("back", time="")[:-1])
        backlog = fill(database, 2)
        tool.wait_until_stored(*backlog)
        assert tool.stop() == 0
    assert len(tool.spoken) == 5


# --- The folder of the previews --------------------------------------------------------------


def test_it_waits_for_the_folder_of_the_previews(database, ollama):
    backlog = fill(database, 8)
    thumbs, elsewhere = database.photos.root / "thumbs", database.photos.root / "elsewhere"
    ollama.hold(*CHATS)
    with Service(database, ollama, "--max-concurrent", "1", *NEVER, *NO_PAUSE) as tool:
        ollama.wait_for(1)
        thumbs.rename(elsewhere)
        ollama.gate.set()
        tool.hear(ia.t("waiting", why=ia.t("root_wrong", root=database.photos.root)))
        elsewhere.rename(thumbs)
        tool.wait_until_stored(*backlog)
        wait_for_the_watch(database, ollama)  # it still tells
        assert tool.stop() == 0
    ready, waiting, back, *rest = tool.spoken
    assert waiting[0] == back[0] == "INFO"
    assert back[1].startswith(ia.t("back", time="")[:-1])
    assert (ready, len(rest)) == (("INFO", READY), 2)
    assert tool.spoken[-1][1].startswith(tally(described=9))
    assert database.texts().items() >= backlog.items()
    assert set(Counter(asked(ollama)).values()) == {1}


# --- Health ----------------------------------------------------------------------------------


def ask(port: int, path: str) -> tuple[int, str, str]:
    """Status, content type and body of an answer."""
    there = http.client.HTTPConnection("127.0.0.1", port, timeout=servers.PATIENCE)
    with closing(there) as connection:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.headers["Content-Type"], reply.read().decode()


def health(port: int) -> tuple[int, dict[str, Any]]:
    status, kind, body = ask(port, "/health")
    assert kind == "application/json"
    return status, json.loads(body)


def open_at(port: int) -> list[str]:
    return ["--health-port", str(port)]


def test_health_tells_when_it_starts_when_it_is_well_and_what_is_in_flight(api, ollama):
    port = sandbox.free_port()
    ollama.hold("POST", "/api/show")
    with Service(api, ollama, *open_at(port)) as tool:
        ollama.wait_for(1)
        status, report = health(port)
        assert (status, report["status"]) == (503, "starting")
        ollama.gate.set()
        tool.hear(READY)
        status, report = health(port)
        assert report.pop("backlog_left") in (None, 0)  # it may still be counting
        assert (status, report) == (
            200,
            {
                "status": "ok",
                "version": ia.__version__,
                "library_away_seconds": 0,
                "model_hosts": {ollama.url: "ok"},
                "in_flight": 0,
                **dict.fromkeys(["described", "undone", "skipped", "not_ready", "failed"], 0),
            },
        )
        ollama.hold(*CHATS)
        id = api.add(picture=servers.picture())
        ollama.wait_for(1)
        assert health(port)[1]["in_flight"] == 1
        ollama.gate.set()
        tool.wait_until_stored(id)
        assert ask(port, "/nothing")[0] == 404
        assert tool.stop() == 0


TROUBLES = {  # how a host looks at /health
    "unavailable": lambda host: host.script(*CHATS, BUSY, forever=True),
    "struck off": lambda host: host.models.clear(),
}


@pytest.mark.parametrize("state", TROUBLES)
@pytest.mark.parametrize("number", [1, 2])
def test_health_is_bad_only_while_no_model_host_is_well(hours, api, ollama, state, number):
    with FakeOllama() as other:
        hosts = [ollama, other]
        for host in hosts[:number]:
            TROUBLES[state](host)
        with hours.service(api, *hosts, *with_health(), "--max-concurrent", "1") as run:
            api.add(picture=servers.picture())
            run.until(60)
            status, report = run.health()
            all_well = (200, "ok") if number == 1 else (503, "no_model_host")
            assert (status, report["status"]) == all_well
            states = [state] * number + ["ok"] * (2 - number)
            assert report["model_hosts"] == dict(zip((h.url for h in hosts), states, strict=True))
            assert run.counts == ({"described": 1} if number == 1 else {})
    other.check()


SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)*)\})? (-?[0-9.e+-]+)')


def metrics(port: int) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples of each metric by the values of their labels, if they are as they should be."""
    status, kind, body = ask(port, "/metrics")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    assert body.endswith("\n")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for line in body.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split(" ")[2:]
            assert kind == ("counter" if name.endswith("_total") else "gauge")
            assert name not in found
            found[name] = {}
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert name == [*found][-1]  # the samples of one metric stand below its type
            values = tuple(re.findall(r'"((?:[^"\\]|\\.)*)"', labels or ""))
            assert values not in found[name]
            found[name][values] = float(value)
    return {name.removeprefix("immich_analyze_"): samples for name, samples in found.items()}


def test_the_metrics_add_up(hours, api, ollama):
    api.server.keys[api.server.key] = FakeKey("alice", servers.EVERYTHING)
    api.add(picture=servers.picture(), description="By a person.")
    api.add(picture=b"This is no picture.")
    fill(api, 4)
    hours.pace(ollama, seconds=2.5)
    with hours.service(api, ollama, *with_health()) as run:
        run.until(60)
        seen = metrics(run.config.health_port)
    assert seen["photos_total"] == {
        ("described", ""): 4,
        ("failed", "preview_unknown"): 1,
        ("skipped", "has_description"): 1,
    }
    assert seen["requests_total"] == {(ollama.url,): 4}
    assert seen["request_seconds_total"] == {(ollama.url,): 4 * 2.5}
    assert seen["healthy"] == {(): 1}
    assert seen["backlog_left"] == seen["library_away_seconds"] == {(): 0}
    assert seen["in_flight"] == seen["unavailable_seconds"] == {(ollama.url,): 0}


def test_the_metrics_tell_for_how_long_a_host_is_unavailable(hours, api, ollama):
    fill(api, 1)
    ollama.script(*CHATS, Reply(503, {"error": "busy"}, {"Retry-After": "100"}))
    with hours.service(api, ollama, *with_health()) as run:
        run.until(60)
        seen = metrics(run.config.health_port)
    assert seen["unavailable_seconds"] == {(ollama.url,): 40}
    assert seen["healthy"] == {(): 0}


def test_a_port_in_use_costs_only_health(api, ollama):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with Service(api, ollama, *open_at(port)) as tool:
            tool.wait_until_stored(api.add(picture=servers.picture()))
            assert tool.stop() == 0
    why = os.strerror(errno.EADDRINUSE)
    complaint = ia.t("no_health", host="127.0.0.1", port=port, why=why)
    assert tool.spoken[:2] == [("ERROR", complaint), ("INFO", READY)]
    assert str(port) in complaint


@pytest.mark.measured
def test_the_health_check_asks_by_the_same_settings(api, ollama, command):
    port = sandbox.free_port()

    def check(*argv: str, **environ: str) -> tuple[int, str]:
        done = command("--healthcheck", *argv, **environ)
        return done.returncode, done.stdout + done.stderr

    ollama.hold("POST", "/api/show")
    with Service(api, ollama, *open_at(port)) as tool:
        ollama.wait_for(1)
        code, said = check(*open_at(port))
        assert (code, said.count("\n")) == (1, 1)
        assert said.startswith(ia.t("unhealthy", why='{"status": "starting"'))
        ollama.gate.set()
        tool.hear(READY)
        assert check(*open_at(port)) == (0, "")
        by_variable = {"IMMICH_ANALYZE_HEALTH_PORT": str(port), "HTTP_PROXY": "http://127.0.0.1:9"}
        by_variable["IMMICH_ANALYZE_HEALTH_HOST"] = "0.0.0.0"
        assert check(**by_variable) == (0, "")
        by_variable["IMMICH_ANALYZE_HEALTH_HOST"] = "elsewhere.invalid"
        code, said = check(**by_variable)
        assert (code, "127.0.0.1:9" in said) == (1, False)
        assert tool.stop() == 0
    code, said = check(*open_at(port))
    assert (code, said.count("\n")) == (1, 1)
    assert f"127.0.0.1:{port}" in said
    assert check() == (0, "")


# --- systemd ---------------------------------------------------------------------------------


class Systemd:
    """What systemd hears: a socket that a service sends to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.settimeout(servers.PATIENCE)
        self.close = self._socket.close

    def next(self) -> list[str]:
        """The lines of the next message."""
        return self._socket.recv(4096).decode().splitlines()

    def until(self, text: str) -> list[list[str]]:
        """All messages up to one with this line."""
        messages, end = [self.next()], time.monotonic() + servers.PATIENCE
        while text not in messages[-1]:
            assert time.monotonic() < end, f"not told: {text}, but: {messages[-1]}"
            messages.append(self.next())
        return messages

    def has_heard(self) -> bool:
        """Whether a message is there already."""
        return bool(select.select([self._socket], [], [], 0)[0])


ADDRESSES = ("a path", "an abstract name")


@pytest.fixture(params=ADDRESSES)
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = str(tmp_path / "notify")
    if request.param == "an abstract name":
        address = f"@immich-analyze-{secrets.token_hex(8)}"
    with closing(Systemd(address)) as listening:
        yield listening


CHECKING = [f"STATUS={ia.t('checking')}", "WATCHDOG=1"]


def by_systemd(systemd: Systemd) -> dict[str, str]:
    return {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "100000"}


def test_systemd_is_told_all_from_the_start_to_the_end(api, ollama, systemd):
    ollama.hold("POST", "/api/show")
    with Service(api, ollama, *MONITOR, **by_systemd(systemd)) as tool:
        assert systemd.next() == CHECKING
        ollama.wait_for(1)
        ollama.gate.set()
        *before, ready = systemd.until("READY=1")
        assert [CHECKING] * len(before) == before
        assert ready == ["READY=1"]
        assert systemd.next() == [f"STATUS={tally()}", "WATCHDOG=1"]
        tool.wait_until_stored(api.add(picture=servers.picture()))
        *_, last = systemd.until(f"STATUS={tally(described=1)}")
        assert last[1:] == ["WATCHDOG=1"]
        assert tool.stop() == 0
    *rest, last = systemd.until("STOPPING=1")
    assert ["READY=1"] not in rest
    assert last == ["STOPPING=1"]
    assert not systemd.has_heard()


@pytest.mark.measured
@pytest.mark.parametrize(
    ("systemd", "missing"),
    others_long(
        [(address, missing) for address in ADDRESSES for missing in ("api", "database", "model")],
        *((ADDRESSES[0], "api"), (ADDRESSES[1], "database"), (ADDRESSES[0], "model")),
    ),
    indirect=["systemd"],
)
def test_a_boot_is_not_held_up_by_what_is_away(missing, api, ollama, systemd):
    """Ready, alive for as long as it takes, and saying what it waits for; unhealthy."""
    library, port = api if missing == "model" else Nowhere(missing), sandbox.free_port()
    if missing == "model":
        ollama.close()
    with Service(library, ollama, *open_at(port), **by_systemd(systemd)) as tool:
        *before, ready = systemd.until("READY=1")
        assert ([CHECKING] * len(before), ready) == (before, ["READY=1"])
        tool.hear(ia.t("waiting", why=""))
        [(_, waiting)] = tool.spoken
        systemd.until(f"STATUS={waiting}")
        for _ in range(10):
            assert systemd.next() == [f"STATUS={waiting}", "WATCHDOG=1"]
        status, report = health(port)
        assert (status, report["status"]) == (503, "starting")
        assert tool.stop() == 0


@pytest.fixture
def status() -> ia.Status:
    """How a run with one model host stands."""
    hosts, patience = ia.Hosts(["http://a"], 1, 1.0), ia.Patience(ia.Stop(), 1, 1)
    return ia.Status(ia.parse(["--api-key", "host-key"], {}), hosts, patience, ia.Tally())


def test_the_status_says_what_is_waited_for(status):
    busy = ia.Unavailable("host_busy", url="http://a", status=503, why="")
    assert status.waiting() == ia.t("checking")
    status.ready = True
    assert status.waiting() == ""
    status._hosts.unavailable("http://a", busy)
    assert status.waiting() == ia.t("no_host", why=busy)
    status.waits.why = ia.Unavailable("database_down", why="starting up")
    assert status.waiting() == ia.t("waiting", why=status.waits.why)
    status.waits.why = None
    status._hosts.answered("http://a", status._hosts.number("http://a"))
    assert status.waiting() == ""


@pytest.mark.parametrize("systemd", ADDRESSES[:1], indirect=True)
@pytest.mark.parametrize("wrong", [[], ["--api-key", "two words"], ["--mode", "always"]])
def test_wrong_settings_are_never_ready(api, ollama, systemd, wrong):
    if not wrong:  # the key is
        api.server.keys = {"another": api.server.keys.pop(api.server.key)}
    with Service(api, ollama, *wrong, **by_systemd(systemd)) as tool:
        assert tool.end() == 2
    heard = []
    while systemd.has_heard():
        heard.append(systemd.next())
    assert heard in ([], [CHECKING] * len(heard))


def test_what_is_waited_for_cannot_forge_a_message(monkeypatch, status):
    told = []
    monkeypatch.setattr(ia, "notify", told.append)
    status.waits.why = ia.Unavailable("root_wrong", root="/photos\nMAINPID=1\x1b[2J\ud800")
    stop = ia.Stop()
    stop.set()
    ia.keep_posted(status, ia.Tally(), stop)
    ready, message, stopping = told
    assert (ready, stopping) == ("READY=1", "STOPPING=1")
    assert [line.partition("=")[0] for line in message.splitlines()] == ["STATUS", "WATCHDOG"]
    assert message.splitlines()[0].isprintable()


def test_systemd_is_told_no_secret_that_a_host_repeats(monkeypatch, status):
    told = []
    monkeypatch.setattr(ia, "notify", told.append)
    refused = ia.Fatal("host_key_refused", url="http://a", status=401, said=" “host-key”")
    status._hosts.lasts = status.ready = True
    status._hosts.unavailable("http://a", refused)
    stop = ia.Stop()
    stop.set()
    ia.keep_posted(status, ia.Tally(), stop)
    assert ia.t("no_host", why=str(refused).replace("host-key", "…")) in told[1]


def test_a_service_of_which_nobody_wants_to_hear_goes_on(api, ollama, tmp_path):
    environ = {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "20000"}
    with Service(api, ollama, **environ) as tool:
        tool.hear(READY)
        tool.wait_until_stored(api.add(picture=servers.picture()))
        assert tool.stop() == 0
    assert len(tool.spoken) == 3


@pytest.mark.parametrize("journal", [True, False])
def test_lines_carry_a_priority_where_the_journal_reads_them(api, ollama, tmp_path, journal):
    api.add(picture=servers.picture())
    api.add(picture=b"This is no picture.")  # the newest is listed first
    grow_old(api)
    ollama.hold(*CHATS)
    with (tmp_path / "log").open("w+") as file:
        here = os.fstat(file.fileno())
        environ = {"JOURNAL_STREAM": f"{here.st_dev}:{here.st_ino + (not journal)}"}
        argv = ["-c", *api.argv, *asking(ollama)]
        with Tool(*argv, environ=environ, stdin=subprocess.DEVNULL, stderr=file) as process:
            try:
                ollama.wait_for(1)
                process.terminate()
                ollama.gate.set()
                assert process.wait(servers.PATIENCE) == 0
            finally:
                process.kill()
        file.seek(0)
        lines = file.read().splitlines()
    if journal:
        said = [re.fullmatch(r"<(\d)>(.*)", line).groups() for line in lines]
    else:
        numbers = {"ERROR": "3", "WARNING": "4", "INFO": "6"}
        said = [(numbers[level], message) for level, message in spoken(lines)]
    assert said[0] == ("6", READY)
    assert ("4", STOPPING[1]) in said
    assert said[-1][1].startswith(tally(described=1, failed=1))
    assert sorted(number for number, _ in said) == ["3", "4", "4", "6"]


BUG = """
import immich_analyze as ia
ia.set_up_logging()
try:
    raise ValueError("one\\n<6>two")
except ValueError:
    ia.log.error("a bug", exc_info=True)
"""


def test_each_line_of_a_bug_carries_its_priority(tmp_path):
    """So that `journalctl -p err` shows all of it, and no server can say how bad it is."""
    with (tmp_path / "log").open("w+") as file:
        here = os.fstat(file.fileno())
        environ = os.environ | {"JOURNAL_STREAM": f"{here.st_dev}:{here.st_ino}"}
        subprocess.run([sys.executable, "-c", BUG], cwd=ROOT, env=environ, stderr=file, check=True)
        file.seek(0)
        lines = file.read().splitlines()
    assert (lines[0], lines[-1]) == ("<3>a bug", "<3><6>two")
    assert [line for line in lines if not line.startswith("<3>")] == []
