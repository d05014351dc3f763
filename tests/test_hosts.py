"""Which model host is asked next, how long a sick one rests, and when none is left."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from conftest import FakeStop

import immich_analyze as ia

A, B, C = "http://a", "http://b", "http://c"


def nobody(url):
    raise AssertionError(f"{url} was probed")


DOWN = ia.HostDown("host_busy", url=A, status=503, why="")


@pytest.fixture
def hosts(stop):
    """Makes Hosts on the invented clock; a host rests for 60 seconds."""

    def make(*urls: str, places: int = 4) -> ia.Hosts:
        return ia.Hosts(urls, places, 60.0, stop.clock)

    return make


def pause(seconds: float) -> ia.HostDown:
    return ia.HostDown("host_busy", pause=seconds, url=A, status=429, why="")


def fatal(url: str) -> ia.Fatal:
    return ia.Fatal("host_key_refused", url=url, status=401)


def asked(hosts: ia.Hosts, stop: threading.Event, number: int) -> str:
    """The hosts that so many requests, one after the other, go to; their last letters."""
    found = ""
    for _ in range(number):
        with hosts.place(stop, (), nobody) as url:
            found += url[-1]
    return found


# Sharing


@pytest.mark.parametrize(
    ("urls", "order"), [((A,), "aaaa"), ((A, B), "abab"), ((A, B, C), "abca"), ((C, A), "caca")]
)
def test_equal_hosts_take_turns(hosts, stop, urls, order):
    assert asked(hosts(*urls), stop, 4) == order


def test_the_host_with_the_fewest_requests_in_flight_is_asked(hosts, stop):
    mine = hosts(A, B, places=5)
    with ExitStack() as on_a, ExitStack() as on_b:
        assert on_a.enter_context(mine.place(stop, (), nobody)) == A
        assert on_b.enter_context(mine.place(stop, (), nobody)) == B
        assert on_a.enter_context(mine.place(stop, (), nobody)) == A
        assert asked(mine, stop, 3) == "bbb"
        on_b.close()
        assert on_b.enter_context(mine.place(stop, (), nobody)) == B
        assert on_b.enter_context(mine.place(stop, (), nobody)) == B
        on_a.close()
        assert asked(mine, stop, 3) == "aaa"
    assert asked(mine, stop, 4) == "baba"


def test_a_slow_host_gets_less_and_holds_up_nobody(hosts, stop):
    mine = hosts(A, B)
    with mine.place(stop, (), nobody) as slow:
        assert slow == A
        assert asked(mine, stop, 10) == "b" * 10


def test_a_request_that_fails_leaves_its_host_too(hosts, stop):
    mine = hosts(A, B)
    with pytest.raises(ia.Gone), mine.place(stop, (), nobody):
        raise ia.Gone("photo_gone")
    assert asked(mine, stop, 3) == "bab"


def test_the_number_of_hosts_is_told(hosts):
    assert [len(hosts(*urls)) for urls in ((A,), (A, B, C))] == [1, 3]


# Resting


def test_a_host_in_trouble_rests_while_the_others_work(hosts, stop):
    mine = hosts(A, B, C)
    mine.down(B, DOWN)
    assert asked(mine, stop, 5) == "acaca"
    stop.now += 59.9
    assert asked(mine, stop, 2) == "ca"
    stop.now += 0.1
    assert asked(mine, stop, 3) == "bca"
    assert stop.waits == []


@pytest.mark.parametrize(
    ("rests", "url", "waits"),
    [
        ([(A, DOWN)], A, [60]),
        ([(A, pause(7))], A, [7]),
        ([(A, DOWN), (B, pause(7))], B, [7]),
        ([(A, DOWN), (B, pause(90))], A, [60]),
        ([(A, pause(600)), (A, DOWN), (B, pause(900))], A, [600]),
        ([(A, pause(1)), (A, pause(30)), (B, pause(20))], B, [20]),
    ],
)
def test_when_all_rest_the_first_to_wake_is_waited_for(hosts, stop, rests, url, waits):
    mine = hosts(*dict.fromkeys(url for url, _ in rests))
    for host, trouble in rests:
        mine.down(host, trouble)
    with mine.place(stop, (), nobody) as found:
        assert (found, stop.waits) == (url, waits)


def test_picking_tells_how_long_to_wait_and_changes_nothing(hosts, stop):
    mine = hosts(A, B)
    mine.down(A, DOWN)
    mine.down(B, pause(5))
    assert [mine.pick(), mine.pick()] == [(B, 5.0)] * 2
    stop.now += 2
    assert mine.pick() == (B, 3.0)
    stop.now += 3
    assert mine.pick() == (B, 0.0)


def test_a_host_that_fell_ill_meanwhile_is_waited_for_again(hosts, stop, monkeypatch):
    mine = hosts(A)
    mine.down(A, pause(5))
    wait = stop.wait

    def ill_again(seconds: float) -> bool:
        stopped = wait(seconds)
        if len(stop.waits) < 3:
            mine.down(A, pause(8))
        return stopped

    monkeypatch.setattr(stop, "wait", ill_again)
    with mine.place(stop, (), nobody) as url:
        assert (url, stop.waits) == (A, [5, 8, 8])


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.DEBUG, ia.log.name)
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_rest_is_told_once(hosts, stop, lines):
    mine = hosts(A, B)
    for _ in range(3):
        mine.down(A, DOWN)
    why = ia.t("host_rests", why=DOWN, seconds="60")
    assert lines() == [("WARNING", why)]
    stop.now += 60
    mine.down(A, DOWN)
    assert lines() == [("WARNING", why)]


def test_a_host_that_answers_again_is_told_once(hosts, stop, lines):
    mine = hosts(A, B)
    mine.up(A)
    mine.down(A, DOWN)
    mine.up(B)
    mine.up(A)  # the answer to a question of before
    before = lines()
    stop.now += 60
    mine.up(A)
    mine.up(A)
    assert lines()[len(before) :] == [("INFO", ia.t("host_back", url=A))]
    mine.down(A, DOWN)
    assert lines()[-1][0] == "WARNING"


# Striking off


def test_a_host_is_struck_off_with_a_line_and_asked_again_in_an_hour(hosts, stop, lines):
    mine = hosts(A, B)
    mine.strike(A, fatal(A))
    assert asked(mine, stop, 3) == "bbb"
    assert lines() == [("ERROR", ia.t("host_struck", why=fatal(A)))]
    assert [host.struck for host in mine.seen()] == [True, False]
    stop.now += ia.STRUCK_REST
    assert asked(mine, stop, 1) == "a"
    mine.strike(A, fatal(A))
    assert len(lines()) == 1
    stop.now += ia.STRUCK_REST
    mine.up(A)
    assert lines()[1:] == [("INFO", ia.t("host_back", url=A))]
    assert [host.struck for host in mine.seen()] == [False, False]


def test_one_that_asks_for_a_moment_again_and_again_is_one_line(hosts, stop, lines):
    mine, moment = hosts(A), ia.HostDown("host_busy", pause=1.0, url=A, status=429, why="")
    for _ in range(20):
        mine.down(A, moment)
        stop.now += 1
        mine.up(A)
    assert len(lines()) == 2
    mine.down(A, DOWN)
    assert len(lines()) == 3
    stop.now += ia.QUIET + 60
    mine.up(A)
    mine.down(A, moment)
    assert len(lines()) == 5


def test_several_workers_may_strike_and_rest_one_host(hosts, stop, lines):
    mine = hosts(A, B)
    for _ in range(3):
        mine.strike(A, fatal(A))
    mine.down(A, DOWN)
    assert asked(mine, stop, 2) == "bb"
    assert len(lines()) == 1


def test_striking_the_last_host_raises_why(hosts, stop, lines):
    mine = hosts(A, B)
    mine.strike(A, fatal(A))
    error = fatal(B)
    for _ in range(2):
        with pytest.raises(ia.Fatal) as caught:
            mine.strike(B, error)
        assert caught.value is error
    assert len(lines()) == 1


def test_a_host_may_be_struck_while_requests_are_with_it(hosts, stop):
    mine = hosts(A, B)
    with mine.place(stop, (), nobody) as first, mine.place(stop, (), nobody) as second:
        assert [first, second] == [A, B]
        mine.strike(A, fatal(A))
    assert asked(mine, stop, 2) == "bb"


# Places


@pytest.mark.parametrize(("places", "workers"), [(1, 3), (2, 5), (4, 6), (6, 4)])
def test_no_more_requests_than_places(hosts, stop, places, workers):
    mine = hosts(A, B, places=places)
    inside, leave, lock = threading.Semaphore(0), threading.Semaphore(0), threading.Lock()
    counts = []

    def work() -> None:
        with mine.place(stop, (), nobody):
            with lock:
                counts.append(counts[-1] + 1 if counts else 1)
            inside.release()
            assert leave.acquire(timeout=5)
            with lock:
                counts.append(counts[-1] - 1)

    most = min(places, workers)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work) for _ in range(workers)]
        for number in range(workers):
            if number >= most:
                leave.release()
            assert inside.acquire(timeout=5)
        for _ in range(most):
            leave.release()
    assert [job.exception() for job in jobs] == [None] * workers
    assert (max(counts), counts[-1]) == (most, 0)


def test_a_place_is_free_again_after_an_error(hosts, stop):
    mine = hosts(A, places=1)
    for _ in range(3):
        with pytest.raises(ia.Gone), mine.place(stop, (), nobody):
            raise ia.Gone("photo_gone")
    assert asked(mine, stop, 1) == "a"


# Stopping


def test_stopping_ends_the_wait_for_a_host():
    stop = FakeStop(after=2)
    mine = ia.Hosts([A], 1, 60.0, lambda: 0.0)
    mine.down(A, DOWN)
    with pytest.raises(ia.Stopped), mine.place(stop, (), nobody):
        pytest.fail("was given a host")
    assert stop.waits == [60, 60]


def test_nobody_is_asked_once_stopped(hosts, stop):
    mine = hosts(A)
    stop.set()
    with pytest.raises(ia.Stopped), mine.place(stop, (), nobody):
        pytest.fail("was given a host")
    assert stop.waits == []


def test_who_waits_for_a_place_does_not_ask_once_stopped(hosts):
    stop = threading.Event()
    mine = hosts(A, places=1)
    pool = ThreadPoolExecutor(1)
    with pool, mine.place(stop, (), nobody):
        job = pool.submit(asked, mine, stop, 1)
        stop.set()
    with pytest.raises(ia.Stopped):
        job.result(timeout=5)
