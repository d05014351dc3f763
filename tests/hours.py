"""Invented time for whole runs: real threads, HTTP and SQL, and a clock that nobody waits for.

One thread of the tool runs at a time. It hands on its turn only where it waits: for a lock, an
event, another thread, or for a fake server that takes its time. Who waited longest is next. When
all wait, the clock jumps to the end of the shortest wait. So the course of a run does not depend
on the machine, and a day takes only as long as the work that is done in it.

    with hours.service(api, ollama, "--api-poll-interval", "60") as run:
        run.at(45, lambda: api.add(picture=picture))
        run.until(3600)
    assert run.counts == {"described": 1}

The test's own thread has its turn, too: while it looks at things, nothing moves.
"""

import datetime as dates
import functools
import http.client
import itertools
import json
import logging
import math
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent import futures
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import FunctionType, ModuleType
from typing import Any

import pytest
import requests
import sandbox
from servers import Exchange, FakeServer, HungUp, Reply, Special
from worlds import ApiWorld, SqlWorld, World, asking

import immich_analyze as ia

BEGIN = datetime(2026, 3, 2, 9, tzinfo=UTC)
UPTIME = 1000.0  # what the clock shows at the beginning: never is 0, as on real machines
DAY = 86400.0
STUCK = 60.0  # real seconds without a turn handed on: something waits that we do not know of
LONGEST = 240.0  # real seconds for a test: a run that does too much need not end all others
POSTS = 300.0  # invented seconds between two words to systemd, which does not listen here
SPINNING = 50_000  # turns and looks at the clock within one invented moment
ABOUT_A_PHOTO = re.compile(r"\([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\): ")
OVER = (futures._base.CANCELLED, futures._base.CANCELLED_AND_NOTIFIED, futures._base.FINISHED)
FIRST, USUAL, LAST = range(3)  # who goes before whom when several could go on

Ready = Callable[[], bool]


class Broken(BaseException):
    """The simulation is over before the run; ends the tool's threads."""


class Waiter:
    """A thread that waits: until what, or until when at the latest."""

    def __init__(self, ready: Ready, deadline: float, rank: int) -> None:
        self.ready = ready
        self.deadline = deadline
        self.rank = rank
        self._turn = threading.Lock()
        self._turn.acquire()
        self.go = self._turn.release

    def sleep(self, most: float = -1) -> bool:
        """Wait, in real time, for the turn."""
        return self._turn.acquire(timeout=most)


class Hours:
    """The clock of a test, and whose turn it is."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        self._guard = threading.RLock()
        self._changed = threading.Condition(self._guard)  # for threads that have no turn
        self._running = True  # somebody has the turn: at first the test
        self._waiting: list[Waiter] = []
        self._test = threading.get_ident()
        self._members = {self._test}
        self._outside = 0  # locks held by threads that have no turn
        self._news = threading.Semaphore(0)  # released by those
        self._moves = self._still = 0
        self._overdue = time.monotonic() + LONGEST
        self._broken = ""
        self.patience = math.inf  # how long the client waits whose turn it is
        self._timed_out = False
        self._clock_file: Any = None
        self._put_in_place(patch)

    # What a test does

    def now(self) -> datetime:
        """The invented date."""
        return BEGIN + timedelta(seconds=self.time)

    @contextmanager
    def service(self, library: World, *more: FakeServer | str) -> Iterator["Run"]:
        """A service in this process, "combined" unless told otherwise; it ends with the block."""
        mode = [] if "--mode" in more else ["--mode", "combined"]
        with self._running_tool(library, *more, *mode) as run:
            yield run

    @contextmanager
    def batch(self, library: World, *more: FakeServer | str) -> Iterator["Run"]:
        """A batch; the block is left when it ends by itself, in an hour at the latest."""
        with self._running_tool(library, *more) as run:
            yield run
            run.end()

    @contextmanager
    def _running_tool(self, library: World, *more: FakeServer | str) -> Iterator["Run"]:
        urls = [word for word in more if not isinstance(word, str) or word.startswith("http")]
        options = [word for word in more if word not in urls]
        run = Run(self, ia.parse([*library.argv, *(asking(*urls) if urls else []), *options], {}))
        if isinstance(library, SqlWorld):
            self.govern(library)
        log_level = ia.log.level
        ia.log.addHandler(run.listener)
        ia.log.setLevel(logging.INFO)
        try:
            run.start()
            yield run
        finally:
            run.close()
            ia.log.removeHandler(run.listener)
            ia.log.setLevel(log_level)
        if run.bug:
            raise run.bug

    def govern(self, library: SqlWorld) -> None:
        """Have PostgreSQL go by the invented clock, which it reads from a file."""
        if self._clock_file:
            return
        run = library.photos.run
        [(folder,)] = run("SHOW data_directory")
        [(name,)] = run("SELECT current_database()")
        try:
            self._clock_file = open(f"{folder}/{name}.clock", "w")  # noqa: SIM115 - until close()
        except OSError:
            pytest.skip("the server is not ours: it has its own clock")
        self._show_clock()
        for statement in INVENTED_CLOCK:
            run(statement.replace("{name}", name).replace("{begin}", BEGIN.isoformat()))

    def told_by_others(self, act: Callable[[], Any]) -> None:
        """Do something that a thread without a turn tells the tool of, and wait until it did."""
        while self._news.acquire(blocking=False):
            pass
        act()
        assert self._news.acquire(timeout=STUCK), "nobody told of it"

    def since_begin(self, exchange: Exchange) -> float:
        """When a request came to a fake server, by this clock."""
        return (exchange.at - BEGIN) / timedelta(seconds=1)

    def written(self, library: ApiWorld) -> dict[str, float]:
        """When each photo's description was sent, by this clock."""
        puts = (put for put in library.server.find("PUT", "/api/assets/") if put.status == 200)
        texts = (put for put in puts if put.operation.name == "updateAsset" and put.json)
        return {put.params["id"]: self.since_begin(put) for put in texts}

    # Replies of fake servers that depend on the invented time

    def takes(self, seconds: float) -> None:
        """Let an answer take so long, or until the client gives up.

        To be called by a fake server's thread, in the turn of whoever asked.
        """
        given, gave_up = min(seconds, self.patience), seconds >= self.patience
        self.block(lambda: False, self.time + given)
        self._timed_out = gave_up
        if gave_up or self._broken:
            raise HungUp

    def pace(self, *hosts: Any, seconds: float = 1.0) -> None:
        """Let model hosts take so long for each answer."""

        def answer(image: bytes, prompt: str, usual: Any) -> Any:
            self.takes(seconds)
            return usual(image, prompt)

        for host in hosts:
            host.answer = functools.partial(answer, usual=host.answer)

    def slow(self, seconds: float, reply: Reply | Special | None = None) -> Callable[..., Any]:
        """For `script`: this reply, or the usual one, after so many seconds."""

        def late(_: Exchange) -> Reply | Special | None:
            self.takes(seconds)
            return reply

        return late

    def hang(self, _: Exchange) -> None:
        """For `script`: no answer at all, until the client's time is over."""
        self.takes(math.inf)

    def between(self, begin: float, end: float, reply: Any) -> Callable[[Exchange], Any]:
        """For `script`: this reply from one time to another, and the usual one at others."""

        def choose(exchange: Exchange) -> Any:
            if not begin <= self.time < end:
                return None
            return reply(exchange) if callable(reply) else reply

        return choose

    # Turns

    def block(self, ready: Ready, deadline: float = math.inf, rank: int = USUAL) -> None:
        """Hand on the turn until `ready`, or until the deadline."""
        waiter = Waiter(ready, deadline, rank)
        with self._guard:
            self._refuse_if_broken()
            self._waiting.append(waiter)
            self._running = False
            self._hand_on()
        moves = -1
        while not waiter.sleep(STUCK if threading.get_ident() == self._test else -1):
            if moves == self._moves:
                self._break("nothing moves any more")
            moves = self._moves
        self._refuse_if_broken()

    def _refuse_if_broken(self) -> None:
        if self._broken and threading.get_ident() == self._test:
            raise AssertionError(self._broken)
        if self._broken and self.is_member():
            raise Broken

    def _hand_on(self) -> None:
        """Give the turn to the first who can go on; if there is none, let time pass."""
        while not self._running and self._waiting and not self._broken:
            able = [w for w in self._waiting if w.deadline <= self.time or w.ready()]
            if able:
                chosen = min(able, key=lambda waiter: waiter.rank)
                self._waiting.remove(chosen)
                self._running = True
                self._moves += 1
                self._still += 1
                chosen.go()
                return
            soonest = min(waiter.deadline for waiter in self._waiting)
            if self._outside or soonest == math.inf:
                return  # a thread that has no turn will let somebody go on
            self.time, self._still = soonest, 0
            if time.monotonic() > self._overdue and not self._broken:
                self._break("there is too much to do")
                return
            self._show_clock()
            self._changed.notify_all()

    def _show_clock(self) -> None:
        if self._clock_file:
            self._clock_file.seek(0)
            self._clock_file.write(f"{self.time:020.6f}")
            self._clock_file.flush()

    def tick(self) -> float:
        """The clock, for those who go by it; who never lets it go on is found out."""
        self._still += 1
        if self._still > SPINNING and not self._broken:
            self._break("spinning: time does not go on any more")
        self._refuse_if_broken()
        return UPTIME + self.time

    def changed(self) -> None:
        """To be called when something changed that may be waited for."""
        with self._guard:
            if not self.is_member():
                self._news.release()
            self._hand_on()
            self._changed.notify_all()

    def wait(self, ready: Ready, seconds: float | None = None) -> bool:
        """What every waiting of the tool comes down to."""
        deadline = self.time + max(0.0, math.inf if seconds is None else seconds)
        if self.is_member():
            self.tick()
            if not ready():
                self.block(ready, deadline)
        else:
            with self._changed:
                over = lambda: ready() or self.time >= deadline or self._broken  # noqa: E731
                self._changed.wait_for(over, STUCK)
        return ready()

    def take(self, free: Ready, take: Callable[[], Any], seconds: float | None = None) -> bool:
        """Wait for something and take it before anybody else does."""
        deadline = self.time + (math.inf if seconds is None else seconds)
        while True:
            with self._guard:
                if free():
                    take()
                    return True
            if self.time >= deadline or self._broken:
                self._refuse_if_broken()
                return False
            self.wait(free, deadline - self.time)

    def expected(self) -> Waiter:
        """A thread will soon come and want its turn."""
        waiter = Waiter(lambda: True, -math.inf, USUAL)
        with self._guard:
            self._waiting.append(waiter)
            self._hand_on()
        return waiter

    def enter(self, waiter: Waiter) -> None:
        """The thread that was expected is here."""
        waiter.sleep()
        self._members.add(threading.get_ident())

    def leave(self) -> None:
        """The thread whose turn it is ends."""
        with self._guard:
            self._members.discard(threading.get_ident())
            self._running = False
            self._hand_on()
            self._changed.notify_all()

    @property
    def alone(self) -> bool:
        """Whether no thread of the tool is left."""
        return len(self._members) <= 1 and not any(w.deadline < 0 for w in self._waiting)

    def is_member(self) -> bool:
        return threading.get_ident() in self._members

    def count_outside(self, number: int) -> None:
        """A thread without a turn took a lock (1) or gave it back (-1)."""
        self._outside += number

    def where(self) -> str:
        """Where each thread of the tool is, its way in this file left out."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        told = ""
        for ident, frame in sys._current_frames().items():
            if ident in self._members and ident != self._test:
                stack = traceback.extract_stack(frame)
                own = [part for part in stack if part.filename == ia.__file__][-3:]
                way = " > ".join(f"{part.name}:{part.lineno}" for part in own)
                told += f"\n{names.get(ident)}: {way}"
        return told

    def _break(self, why: str) -> None:
        stacks = self.where()
        with self._guard:
            self._broken = f"{why}, at {self.time:g} s{stacks}"
            for waiter in self._waiting:
                waiter.go()
            self._waiting.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Back to real time, if need be by force."""
        if not self.alone and not self._broken:
            self._break("the test is over")
        if self._clock_file:
            self._clock_file.close()

    # What the tool uses instead

    def _put_in_place(self, patch: pytest.MonkeyPatch) -> None:
        own = {
            name: self._bound(kind)
            for name, kind in {
                "Lock": Lock,
                "RLock": RLock,
                "Event": Event,
                "Condition": Condition,
                "Semaphore": Semaphore,
                "BoundedSemaphore": Semaphore,
                "Thread": Thread,
            }.items()
        }
        wall = lambda: self.now().timestamp()  # noqa: E731
        clocks = {"monotonic": self.tick, "time": wall, "sleep": self.sleep}
        patch.setattr(ia, "threading", Instead(threading, **own))
        patch.setattr(ia, "time", Instead(time, **clocks))
        patch.setattr(ia, "datetime", self._datetime())
        patch.setattr(ia, "POST_INTERVAL", POSTS)
        patch.setattr(ia, "SimpleQueue", self._bound(SimpleQueue))
        patch.setattr(ia, "ThreadPoolExecutor", self._bound(Pool))
        patch.setattr(ia, "wait", self.wait_for_futures, raising=False)
        patch.setattr(ia, "as_completed", self.as_completed, raising=False)
        patch.setattr(requests.adapters.HTTPAdapter, "send", self._sender())
        patch.setattr(FakeServer, "now", staticmethod(self.now))
        self._put_in_defaults(patch, {"monotonic": self.tick, "time": wall} | own)

    @staticmethod
    def _put_in_defaults(patch: pytest.MonkeyPatch, own: dict[str, Any]) -> None:
        """Also where a default value, or a dataclass, holds one of the real ones."""
        real = {getattr(time, name, None) or getattr(threading, name): own[name] for name in own}

        def kept(value: Any) -> Any:
            return real.get(value) if isinstance(value, Hashable) else None

        for function in functions_of(ia):
            old = function.__defaults__ or ()
            if any(map(kept, old)):
                new = tuple(kept(value) or value for value in old)
                patch.setattr(function, "__defaults__", new)
            for cell in function.__closure__ or ():
                if kept(cell.cell_contents):
                    patch.setattr(cell, "cell_contents", kept(cell.cell_contents))

    def _bound(self, kind: type) -> type:
        """The class with this clock in it."""
        return type(kind.__name__, (kind,), {"hours": self})

    def sleep(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

    def _datetime(self) -> type:
        hours = self

        class Kind(type):
            def __instancecheck__(cls, thing: object) -> bool:
                return isinstance(thing, dates.datetime)

        class Datetime(datetime, metaclass=Kind):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return hours.now().astimezone(tz) if tz else hours.now().replace(tzinfo=None)

        return Datetime

    def _sender(self) -> Callable[..., Any]:
        """Sends a request; how long the client waits for the answer is invented, too."""
        hours, send = self, requests.adapters.HTTPAdapter.send

        def sending(
            adapter: Any, request: Any, stream: bool = False, timeout: Any = None, **more: Any
        ) -> Any:
            if not hours.is_member():
                return send(adapter, request, stream=stream, timeout=timeout, **more)
            asked = timeout[1] if isinstance(timeout, tuple) else timeout
            hours.patience = math.inf if asked is None else asked
            hours._timed_out = False
            try:
                return send(adapter, request, stream=stream, timeout=STUCK, **more)
            except requests.exceptions.ConnectionError as error:
                if hours._timed_out:
                    raise requests.exceptions.ReadTimeout(error, request=request) from error
                raise

        return sending

    def wait_for_futures(
        self, given: Iterable[Any], timeout: float | None = None, return_when: str = "ALL_COMPLETED"
    ) -> Any:
        """`concurrent.futures.wait`."""
        given = list(given)

        def ready() -> bool:
            done = [future for future in given if future.done()]
            failed = (not future.cancelled() and future.exception(0) for future in done)
            return (
                len(done) == len(given)
                or (return_when == futures.FIRST_COMPLETED and bool(done))
                or (return_when == futures.FIRST_EXCEPTION and any(failed))
            )

        self.wait(ready, timeout)
        return futures.wait(given, 0, return_when)

    def as_completed(self, given: Iterable[Any], timeout: float | None = None) -> Iterator[Any]:
        """`concurrent.futures.as_completed`."""
        left = list(given)
        while left:
            self.wait_for_futures(left, timeout, futures.FIRST_COMPLETED)
            done = next((future for future in left if future.done()), None)
            if done is None:
                raise TimeoutError
            left.remove(done)
            yield done


# PostgreSQL's own functions come after those of the schema `invented`; defaults are bound early.
INVENTED_CLOCK = [
    "CREATE SCHEMA invented",
    """CREATE FUNCTION invented.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
       SECURITY DEFINER SET search_path = pg_catalog AS
       $$ SELECT timestamptz '{begin}'
          + pg_read_file('{name}.clock')::float8 * interval '1 s' $$""",
    """CREATE FUNCTION invented.now() RETURNS timestamptz LANGUAGE sql VOLATILE AS
       $$ SELECT invented.clock_timestamp() $$""",
    "GRANT USAGE ON SCHEMA invented TO PUBLIC",
    """DO $$ DECLARE part record; BEGIN
       EXECUTE (SELECT replace(pg_get_functiondef(oid), ' DEFAULT clock_timestamp()',
                ' DEFAULT invented.clock_timestamp()')
           FROM pg_proc WHERE proname = 'immich_uuid_v7');
       FOR part IN SELECT adrelid::regclass AS relation, attname FROM pg_attrdef
           JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
           WHERE pg_get_expr(adbin, adrelid) IN ('now()', 'clock_timestamp()') LOOP
         EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET DEFAULT invented.clock_timestamp()',
                        part.relation, part.attname);
       END LOOP; END $$""",
    'ALTER DATABASE "{name}" SET search_path = invented, public, pg_catalog',
    "SET search_path = invented, public, pg_catalog",
]


def functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """A module's functions, and those of its classes."""
    for thing in list(vars(module).values()):
        own = getattr(thing, "__module__", "") == module.__name__
        for part in [thing, *(vars(thing).values() if isinstance(thing, type) else ())]:
            if own and isinstance(part, FunctionType):
                yield part


class Instead:
    """A module with some of its parts replaced."""

    def __init__(self, module: ModuleType, **own: Any) -> None:
        vars(self).update(own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# --- What waits ------------------------------------------------------------------------------


class Lock:
    """`threading.Lock`."""

    hours: Hours

    def __init__(self) -> None:
        self._owner = 0
        self._depth = 0
        self._is_outside = False

    def _free(self) -> bool:
        return not self._depth

    def _take(self) -> None:
        self._owner, self._depth = threading.get_ident(), self._depth + 1
        if self._depth == 1:
            self._is_outside = not self.hours.is_member()
            self.hours.count_outside(self._is_outside)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        seconds = None if timeout < 0 else timeout
        return self.hours.take(self._free, self._take, seconds if blocking else 0)

    def release(self) -> None:
        assert self._depth, "release of a free lock"
        self._depth -= 1
        if not self._depth:
            self.hours.count_outside(-self._is_outside)
            self.hours.changed()

    def locked(self) -> bool:
        return bool(self._depth)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    """`threading.RLock`."""

    def _free(self) -> bool:
        return not self._depth or self._owner == threading.get_ident()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = threading.get_ident()  # whoever asks later is another thread
        seconds = None if timeout < 0 else timeout
        free = lambda: not self._depth or self._owner == me  # noqa: E731
        return self.hours.take(free, self._take, seconds if blocking else 0)


class Event:
    """`threading.Event`."""

    hours: Hours

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self.hours.changed()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self.hours.wait(self.is_set, timeout)


class Semaphore:
    """`threading.Semaphore` and `BoundedSemaphore`."""

    hours: Hours

    def __init__(self, value: int = 1) -> None:
        self._value = value

    def _take(self) -> None:
        self._value -= 1

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        return self.hours.take(lambda: self._value > 0, self._take, timeout if blocking else 0)

    def release(self, n: int = 1) -> None:
        self._value += n
        self.hours.changed()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition:
    """`threading.Condition`."""

    hours: Hours

    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = lock or self.hours._bound(RLock)()
        self._told: deque[list[bool]] = deque()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def wait(self, timeout: float | None = None) -> bool:
        told = [False]
        self._told.append(told)
        depth = self._lock._depth
        for _ in range(depth):
            self.release()
        try:
            self.hours.wait(lambda: told[0], timeout)
        finally:
            for _ in range(depth):
                self.acquire()
            if told in self._told:
                self._told.remove(told)
        return told[0]

    def wait_for(self, ready: Ready, timeout: float | None = None) -> bool:
        end = self.hours.time + (math.inf if timeout is None else timeout)
        while not ready() and self.hours.time < end:
            self.wait(None if timeout is None else end - self.hours.time)
        return ready()

    def notify(self, n: int = 1) -> None:
        for told in [self._told.popleft() for _ in range(min(n, len(self._told)))]:
            told[0] = True
        self.hours.changed()

    def notify_all(self) -> None:
        self.notify(len(self._told))


class SimpleQueue:
    """`queue.SimpleQueue`, for one thread that takes from it."""

    hours: Hours

    def __init__(self) -> None:
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self.hours.changed()

    def get(self) -> Any:
        self.hours.wait(lambda: bool(self._items))
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items


class Thread(threading.Thread):
    """`threading.Thread`; those that serve for ever never wait for the invented time."""

    hours: Hours
    _expected: Waiter | None = None
    _over = False

    def start(self) -> None:
        if getattr(self._target, "__name__", "") != "serve_forever":
            self._expected = self.hours.expected()
        super().start()

    def run(self) -> None:
        if not self._expected:
            super().run()
            return
        self.hours.enter(self._expected)
        try:
            super().run()
        except Broken:
            pass
        finally:
            self._over = True
            self.hours.leave()

    def join(self, timeout: float | None = None) -> None:
        if self._expected:
            self.hours.wait(lambda: self._over, timeout)
        if self._over or not self._expected:
            super().join(timeout)


class Pool(futures.Executor):
    """`ThreadPoolExecutor`; what is submitted begins in that order."""

    hours: Hours

    def __init__(self, max_workers: int = 8, thread_name_prefix: str = "pool", **_: Any) -> None:
        self._most = max_workers
        self._name = thread_name_prefix
        self._busy = 0
        self._numbers = itertools.count()
        self._queue: deque[tuple[Future, Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *given: Any, **more: Any) -> "Future":
        future = self.hours._bound(Future)()
        self._queue.append((future, lambda: fn(*given, **more)))
        if self._busy < self._most:
            self._busy += 1
            name = f"{self._name}_{next(self._numbers)}"
            self.hours._bound(Thread)(target=self._work, name=name).start()
        return future

    def _work(self) -> None:
        try:
            while self._queue:
                future, call = self._queue.popleft()
                if future.set_running_or_notify_cancel():
                    try:
                        result = call()
                    except BaseException as error:  # noqa: BLE001 - as the real one does
                        future.set_exception(error)
                    else:
                        future.set_result(result)
        finally:
            self._busy -= 1
            self.hours.changed()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while cancel_futures and self._queue:
            self._queue.pop()[0].cancel()
        if wait:
            self.hours.wait(lambda: not self._busy)


class Future(futures.Future[Any]):
    """`concurrent.futures.Future`."""

    hours: Hours

    def done(self) -> bool:
        return self._state in OVER  # without a lock, as one thread runs at a time

    def result(self, timeout: float | None = None) -> Any:
        self.hours.wait(self.done, timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> Any:
        if timeout != 0:
            self.hours.wait(self.done, timeout)
        return super().exception(0)

    def set_result(self, result: Any) -> None:
        super().set_result(result)
        self.hours.changed()

    def set_exception(self, exception: BaseException | None) -> None:
        super().set_exception(exception)
        self.hours.changed()


class Stop(ia.Stop):
    """The event that ends a run."""

    def __init__(self, hours: Hours) -> None:
        super().__init__()
        self._hours = hours

    def wait(self, timeout: float | None = None) -> bool:
        return self._hours.wait(self.is_set, timeout)


# --- A run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """What was said, and when."""

    at: float
    level: str
    text: str


class Listener(logging.Handler):
    """Keeps what a run says."""

    def __init__(self, run: "Run") -> None:
        super().__init__()
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        line = Line(self._run.time, record.levelname, record.getMessage())
        self._run.said.append(line)


class Run:
    """A run of the tool, by a clock that began with it."""

    def __init__(self, hours: Hours, config: ia.Config) -> None:
        self.config = config
        self.stop = Stop(hours)
        self.tally = ia.Tally()
        self.said: list[Line] = []
        self.listener = Listener(self)
        self.fatal = ""  # the key of the error that ended it
        self.complete = False
        self.bug: BaseException | None = None
        self.ended: float | None = None  # when
        self._hours = hours
        self._began = hours.time
        self._plans: list[tuple[float, int, Callable[[], Any]]] = []

    def start(self) -> None:
        self._hours._bound(Thread)(target=self._serve, name="serve").start()

    def _serve(self) -> None:
        try:
            self.complete = ia.serve_columns({"a": self.config}, self.stop, self.tally)
        except ia.Stopped:
            pass
        except ia.Fatal as error:
            self.fatal = error.key
            self.said.append(Line(self.time, "CRITICAL", str(error)))
        except Exception as error:  # noqa: BLE001 - is raised in the test
            self.bug = error
        finally:
            self.ended = self.time
            self.stop.set()  # as the process ends

    @property
    def time(self) -> float:
        """Seconds since its start."""
        return self._hours.time - self._began

    def at(self, seconds: float, act: Callable[[], Any]) -> None:
        """Have something happen at that time of the run."""
        self._plans.append((seconds, len(self._plans), act))
        self._plans.sort(key=lambda plan: plan[:2])

    def until(self, seconds: float) -> None:
        """Let time pass up to then, until nothing is left to do at that moment."""
        self._pass(seconds, lambda: False)

    def end(self, most: float = 3600.0) -> None:
        """Let time pass until the run ends by itself."""
        self._pass(self.time + most, lambda: self.ended is not None)
        assert self.ended is not None, f"it did not end within {most:g} s{self._hours.where()}"

    def _pass(self, seconds: float, enough: Ready) -> None:
        hours, began = self._hours, self._began
        while self._plans and self._plans[0][0] <= seconds and not enough():
            hours.block(enough, began + self._plans[0][0], FIRST)
            if not enough():
                self._plans.pop(0)[-1]()
        if not enough():
            hours.block(enough, began + seconds, LAST)

    def close(self) -> None:
        """Ask it to stop; it has an hour to do so."""
        hours = self._hours
        self.stop.set()
        if not hours.alone:
            hours.block(lambda: hours.alone, hours.time + 3600, LAST)
        assert hours.alone, f"it does not stop{hours.where()}"

    @property
    def counts(self) -> dict[str, int]:
        """How many photos ended how, as the last line tells."""
        return {outcome.value: n for outcome, n in self.tally.counts.items() if n}

    @property
    def reasons(self) -> dict[str, int]:
        """How many photos failed or were skipped, by the reason's key."""
        found: dict[str, int] = {}
        for (_, reason), n in self.tally.reasons.items():
            found[reason] = found.get(reason, 0) + n
        return {reason: n for reason, n in found.items() if reason and n}

    @property
    def code(self) -> int:
        """The exit code that this means."""
        if self.fatal:
            return 2
        return int(not self.complete or "failed" in self.counts)

    def lines(self, *parts: str, level: str = "") -> list[str]:
        """What was said that has all these words in it."""
        return [
            line.text
            for line in self.said
            if all(part in line.text for part in parts) and level in ("", line.level)
        ]

    def complaints(self, host: FakeServer) -> list[str]:
        """The lines about trouble with a host, those about single photos left out."""
        bad = (line.text for line in self.said if line.level != "INFO" and host.url in line.text)
        return [text for text in bad if not ABOUT_A_PHOTO.search(text)]

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and report of /health."""
        address = ("127.0.0.1", self.config.health_port)
        with closing(http.client.HTTPConnection(*address, timeout=STUCK)) as connection:
            connection.request("GET", "/health")
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())


def with_health() -> list[str]:
    """The options for /health at a free port."""
    return ["--health-port", str(sandbox.free_port())]
