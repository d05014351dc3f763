"""Fixtures and the rules that hold in every test.

No test sees the settings of whoever runs it, waits for real time, or leaves a thread behind.
"""

import contextlib
import functools
import gc
import logging
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sandbox
import servers
from forks import MEASURE
from hours import Hours
from worlds import ApiWorld, SqlWorld, World, readable_immich

import immich_analyze as ia

ROOT = Path(__file__).parent.parent
FOREIGN = ("IMMICH_", "DB_", "RUST_LOG", "LC_", "LANG", "JOURNAL_STREAM", "NOTIFY_SOCKET")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
TRACERS = sys.gettrace(), threading.gettrace()  # of coverage, if it runs
THREADS = pytest.StashKey[set[threading.Thread]]()
HOME = pytest.StashKey[Path]()


def trace(function: Any, in_new_threads: Any) -> None:
    """What this thread and later ones are traced with; None for nothing."""
    sys.settrace(function)
    threading.settrace(in_new_threads)


trace(None, None)


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: more workers than cores, as most tests wait for another process."""
    return len(os.sched_getaffinity(0)) * 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a browser come first: all go to one worker, and no other one needs a browser."""
    items.sort(key=lambda item: "chromium" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """Spare the search for garbage, which is a tenth of all work, what is there for good by now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True, scope="session")
def own_environment(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[None]:
    """Settings of the person or service that runs the tests stay out of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(FOREIGN) or name.upper() in PROXIES:
                patch.delenv(name)
        pytestconfig.stash[HOME] = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(pytestconfig.stash[HOME]))
        patch.setenv("LANG", "C.UTF-8")
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder for files; the usual one stays empty, as all tests share it."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture(autouse=True, scope="session")
def parsers() -> Iterator[None]:
    """Keeps the parser of each language: to build one takes most of what reading settings takes."""
    build = ia.build_parser
    kept = functools.cache(lambda *_: build())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ia, "build_parser", lambda: kept(ia._language, *ia.CONFIG_FILES))
        yield


# What follows holds in every test. Hooks do it, as a fixture costs each of the thousands of tests
# more time than what it does.


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Coverage is measured in tests alone, and of slow ones only in those marked `measured`.

    Tracing makes all of Python slow, also outside of the module that is measured.
    """
    if item.get_closest_marker("slow") and not item.get_closest_marker("measured"):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(MEASURE, raising=False)
            return (yield)
    trace(*TRACERS)
    try:
        return (yield)
    finally:
        trace(None, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[THREADS] = set(threading.enumerate())
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Every thread that a test starts has ended when it is over, and nothing lasts.

    Servers that outlive a test answer in threads of their own, which are daemons.
    """
    yield
    ia._language = "en"
    assert os.listdir(item.config.stash[HOME]) == []  # files are for the fixture `home`
    left = {thread for thread in threading.enumerate() if not thread.daemon} - item.stash[THREADS]
    for thread in left:
        thread.join(servers.PATIENCE)
    assert not [thread for thread in left if thread.is_alive()]


class FakeStop(ia.Stop):
    """A stop event whose time is invented: waiting is noted and over at once.

    Its `clock` moves by what was waited for. `after` sets it at the end of that many waits.
    """

    def __init__(self, after: int | None = None) -> None:
        super().__init__()
        self.waits: list[float] = []
        self.now = 1000.0
        self._after = after

    def clock(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None, "would wait for ever"
        self.waits.append(timeout)
        self.now += timeout
        if len(self.waits) == self._after:
            self.set()
        return self.is_set()

    def nap(self, seconds: float) -> None:
        if seconds > 0:
            self.wait(seconds)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> FakeStop:
    """A stop event that does not wait; the module's clock is its own."""
    fake = FakeStop()
    monkeypatch.setattr(ia.time, "monotonic", fake.clock)
    return fake


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hours]:
    """Invented time for the whole test, and for the tool and the fake servers in it."""
    clock = Hours(monkeypatch)
    yield clock
    clock.close()


@pytest.fixture
def config() -> Callable[..., ia.Config]:
    """Makes a Config as the command line does: config("--think", environ={…})."""

    def make(*argv: str, environ: dict[str, str] | None = None) -> ia.Config:
        return ia.parse(argv, environ or {})

    return make


@pytest.fixture(scope="session")
def postgres() -> Iterator[sandbox.Postgres]:
    """A real PostgreSQL for the whole session; each test makes databases of its own."""
    with sandbox.Postgres() as server:
        yield server


@pytest.fixture
def photos(postgres: sandbox.Postgres, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes filled databases: photos("2.7.5") is an empty library of that release."""
    opened: list[tuple[str, sandbox.PhotoLibrary]] = []

    def make(
        version: str = sandbox.NEWEST, *, encoding: str = "UTF8", **options: Any
    ) -> sandbox.PhotoLibrary:
        uri = postgres.database(version, encoding)
        root = tmp_path / f"library-{len(opened)}"
        library = sandbox.PhotoLibrary(uri, root, **options)
        library.uri, library.root = uri, root
        opened.append((uri, library))
        return library

    yield make
    for uri, library in opened:
        library.close()
        postgres.drop(uri)


@pytest.fixture
def immich() -> Iterator[servers.FakeImmich]:
    """A fake Immich 3.1.0 with one user; what was said to it is checked at the end."""
    with servers.FakeImmich() as server:
        yield server
    server.check()


@pytest.fixture
def ollama() -> Iterator[servers.FakeOllama]:
    """A fake Ollama with one vision model, `tiny-vlm`."""
    with servers.FakeOllama() as server:
        yield server
    server.check()


@pytest.fixture
def llamacpp() -> Iterator[servers.FakeLlamaCpp]:
    """A fake llama.cpp server with one vision model."""
    with servers.FakeLlamaCpp() as server:
        yield server
    server.check()


@pytest.fixture(scope="session")
def real_llamacpp() -> Iterator[sandbox.LlamaCpp]:
    """llama.cpp's own server on the tiny model."""
    with sandbox.LlamaCpp() as server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A real browser for the whole session; see tests/browser.py."""
    from browser import LACKING, browser  # here, as it would slow down every start

    if LACKING:
        pytest.skip(LACKING)
    with browser() as one:
        yield one


Done = subprocess.CompletedProcess[str]


class NoSignals:
    """In place of what catches signals, which would stay for all tests to come."""

    def __init__(self, stop: ia.Stop) -> None:
        self.number = 0
        self.grace = 0.0


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """What a run changes for all of its process is put back at the end."""
    watchdog, language = logging.getLogger("watchdog"), ia._language
    levels = [(log, log.level) for log in (ia.log, watchdog)]
    handlers, propagate = ia.log.handlers[:], ia.log.propagate
    with warnings.catch_warnings():
        try:
            yield
        finally:
            ia._language = language
            ia.log.handlers[:], ia.log.propagate = handlers, propagate
            for log, level in levels:
                log.setLevel(level)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs the command line to its end in this process, without a terminal.

    Much cheaper than `process`, and as good but for signals, a new interpreter and how it ends.
    """

    def run(*argv: str, **environ: str) -> Done:
        with (
            tempfile.TemporaryFile("w+") as stdout,
            tempfile.TemporaryFile("w+") as stderr,
            contextlib.chdir(tmp_path),
            as_it_was(),
            monkeypatch.context() as patch,
        ):
            patch.setattr(ia, "Signals", NoSignals)
            patch.setattr(ia, "CHECK_PAUSE", 2 * servers.SIDECAR_DELAY)  # what the fake needs
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            for name, value in environ.items():
                patch.setenv(name, value)
            try:
                code = ia.main(argv)
            except SystemExit as end:  # how argparse ends after --help
                code = end.code or 0
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(argv, code, stdout.read(), stderr.read())

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Done]:
    """Runs the command line to its end in a process of its own, without a terminal."""

    def run(*argv: str, **environ: str) -> Done:
        return subprocess.run(
            [sys.executable, str(ROOT / "immich_analyze.py"), *argv],
            cwd=tmp_path,
            env=os.environ | environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=servers.PATIENCE,
            check=False,
        )

    return run


@pytest.fixture
def api(immich: servers.FakeImmich) -> ApiWorld:
    """A library behind the REST API."""
    return ApiWorld(immich)


@pytest.fixture
def database(photos: Callable[..., Any], postgres: sandbox.Postgres) -> SqlWorld:
    """A library in PostgreSQL."""
    return SqlWorld(photos(), postgres)


@pytest.fixture(params=["api", "database"])
def library(request: pytest.FixtureRequest) -> World:
    """Each of the two."""
    return request.getfixturevalue(request.param)


RELEASES = [*(("api", v) for v in ("1.132.3", "1.135.3", "2.7.5", "3.1.0", "3.3.5"))]
RELEASES += [("database", version) for version in sandbox.VERSIONS]


@pytest.fixture(params=RELEASES, ids="-".join)
def any_library(request: Any, photos: Any, postgres: sandbox.Postgres) -> Iterator[World]:
    """A library of each generation, behind either way of access."""
    access, version = request.param
    if access == "database":
        yield SqlWorld(photos(version), postgres)
        return
    with readable_immich(version, partners=True) as server:
        yield ApiWorld(server)
    server.check()
