"""Which model host is asked next, how long one in trouble is left out, and when none is left."""

import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import servers
from conftest import FakeStop
from hours import Stop

import immich_analyze as ia

A, B, C = "http://a", "http://b", "http://c"
HOUR = 3600.0


def busy(pause: float | None = None, url: str = A, status: int = 503) -> ia.AnalyzeError:
    return ia.Unavailable("host_busy", pause=pause, url=url, status=status, why="")


def refused(url: str = A) -> ia.AnalyzeError:
    return ia.Fatal("host_key_refused", url=url, status=401, said="")


BUSY = busy()
FAILED = ia.Retryable("host_failed", url=A, status=500, why="")
WRONG = ia.Unexpected("host_wrong", url=A, status=404, said="")
HUNG = ia.Retryable("timed_out", url=A, seconds="300")
NOTHING_THERE = ia.Unavailable("unreachable", url=A, why="Connection refused")


@pytest.fixture
def hosts(stop):
    """Makes Hosts on the invented clock."""

    def make(*urls: str, places: int = 4, longest: float = 60.0, **more) -> ia.Hosts:
        return ia.Hosts(urls, places, longest, **more)

    return make


def nobody(url: str) -> bool:
    raise AssertionError(f"{url} was probed")


def place(hosts: ia.Hosts, stop: threading.Event, avoid=(), probe=nobody):
    return hosts.place(stop, avoid, probe)


def asked(hosts: ia.Hosts, stop: threading.Event, number: int = 1, avoid=()) -> str:
    """The hosts that so many requests, one after the other, go to; their last letters."""
    found = ""
    for _ in range(number):
        with place(hosts, stop, avoid) as (url, _):
            found += url[-1]
    return found


def describe(hosts: ia.Hosts, stop: threading.Event) -> None:
    """Have the next host describe a picture."""
    with place(hosts, stop) as (url, number):
        hosts.answered(url, number)


def usable(hosts: ia.Hosts) -> bool:
    """Whether any host is well, as far as is known."""
    return any(host.why is None for host in hosts.seen())


def waited(stop: FakeStop, call, *args) -> float:
    began = stop.now
    call(*args)
    return stop.now - began


# --- Sharing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("urls", "order"), [((A,), "aaaa"), ((A, B), "abab"), ((A, B, C), "abca"), ((C, A), "caca")]
)
def test_equal_hosts_take_turns(hosts, stop, urls, order):
    assert asked(hosts(*urls), stop, 4) == order


def test_the_host_with_the_fewest_requests_in_flight_is_asked(hosts, stop):
    mine = hosts(A, B, places=5)
    with ExitStack() as on_a, ExitStack() as on_b:
        assert on_a.enter_context(place(mine, stop))[0] == A
        assert on_b.enter_context(place(mine, stop))[0] == B
        assert on_a.enter_context(place(mine, stop))[0] == A
        assert asked(mine, stop, 3) == "bbb"
        on_b.close()
        assert on_b.enter_context(place(mine, stop))[0] == B
        assert on_b.enter_context(place(mine, stop))[0] == B
        on_a.close()
        assert asked(mine, stop, 3) == "aaa"
    assert asked(mine, stop, 4) == "baba"


def test_a_slow_host_gets_less_and_holds_up_nobody(hosts, stop):
    mine = hosts(A, B)
    with place(mine, stop) as (slow, _):
        assert slow == A
        assert asked(mine, stop, 10) == "b" * 10


def test_a_host_that_failed_on_a_photo_gets_it_last(hosts, stop):
    mine = hosts(A, B, C)
    assert asked(mine, stop, 3, avoid={B}) == "aca"
    assert asked(mine, stop, 2, avoid={A, B, C}) == "bc"
    mine.unavailable(A, BUSY)
    mine.unavailable(C, BUSY)
    assert asked(mine, stop, 1, avoid={B}) == "b"


def test_a_request_that_fails_leaves_its_host_too(hosts, stop):
    mine = hosts(A, B)
    with pytest.raises(ia.Skip), place(mine, stop):
        raise ia.Skip("photo_gone")
    assert asked(mine, stop, 3) == "bab"


def test_requests_are_counted_with_the_time_they_took(hosts, stop):
    mine = hosts(A, B)
    for seconds in (2, 3, 5):
        with place(mine, stop):
            stop.now += seconds
    with place(mine, stop):
        seen = mine.seen()
    assert [(host.requests, host.seconds, host.in_flight) for host in seen] == [
        (2, 7, 0),
        (1, 3, 1),
    ]
    assert [host.in_flight for host in mine.seen()] == [0, 0]


# --- Unavailable -----------------------------------------------------------------------------


def test_a_host_in_trouble_is_left_out_while_the_others_work(hosts, stop):
    mine = hosts(A, B, C)
    mine.unavailable(B, busy(60))
    assert asked(mine, stop, 5) == "acaca"
    stop.now += 59.9
    assert asked(mine, stop, 2) == "ca"
    stop.now += 0.1
    assert asked(mine, stop, 3) == "bca"
    assert stop.waits == []


@pytest.mark.parametrize("trouble", [BUSY, FAILED, WRONG, HUNG], ids=lambda error: error.key)
@pytest.mark.parametrize(
    ("longest", "pauses"),
    [(60, [1, 2, 4, 8, 16, 32, 60, 60]), (5, [1, 2, 4, 5, 5]), (1, [1, 1]), (0.2, [0.2, 0.2])],
)
def test_the_pauses_double_up_to_the_setting_and_begin_anew(hosts, stop, trouble, longest, pauses):
    mine = hosts(A, longest=longest)
    for _ in range(2):
        for pause in pauses:
            mine.unavailable(A, trouble)
            assert waited(stop, asked, mine, stop) == pytest.approx(pause)
        describe(mine, stop)


def test_those_who_fail_in_the_same_moment_are_one_failure(hosts, stop):
    mine = hosts(A, places=9)
    for _ in range(8):
        stop.now += 0.1
        mine.unavailable(A, BUSY)
    assert waited(stop, asked, mine, stop) == pytest.approx(1)
    mine.unavailable(A, BUSY)
    assert waited(stop, asked, mine, stop) == 2


@pytest.mark.parametrize("seconds", [0.5, 7, 600])
def test_a_host_that_says_when_is_asked_then(hosts, stop, seconds):
    mine = hosts(A, longest=5)
    mine.unavailable(A, busy(seconds, status=429))
    assert waited(stop, asked, mine, stop) == seconds


def test_a_shorter_pause_takes_nothing_from_a_longer_one(hosts, stop):
    mine = hosts(A)
    for seconds in (600, None, 20):
        mine.unavailable(A, busy(seconds))
    assert waited(stop, asked, mine, stop) == 600


@pytest.mark.parametrize(
    ("pauses", "url", "waits"),
    [((60, 7), B, [7]), ((60, 90), A, [60]), ((7.5, 7), B, [7]), ((7, 7), A, [7])],
)
def test_when_all_are_left_out_the_first_to_be_back_is_waited_for(hosts, stop, pauses, url, waits):
    mine = hosts(A, B)
    for host, seconds in zip((A, B), pauses, strict=True):
        mine.unavailable(host, busy(seconds))
    with place(mine, stop) as (found, _):
        assert (found, stop.waits) == (url, waits)


def test_a_host_that_fell_ill_again_meanwhile_is_waited_for_again(hosts, stop, monkeypatch):
    mine = hosts(A)
    mine.unavailable(A, busy(5))
    wait = stop.wait

    def ill_again(seconds: float) -> bool:
        stopped = wait(seconds)
        if len(stop.waits) < 3:
            mine.unavailable(A, busy(8))
        return stopped

    monkeypatch.setattr(stop, "wait", ill_again)
    with place(mine, stop) as (url, _):
        assert (url, stop.waits) == (A, [5, 8, 8])


def test_one_that_hung_gets_one_request_at_a_time(hosts, stop):
    mine = hosts(A, B, places=5)
    mine.unavailable(A, HUNG)
    stop.now += 1
    with place(mine, stop) as (url, number):
        assert url == A
        assert asked(mine, stop, 4) == "bbbb"
        with place(mine, stop), place(mine, stop), place(mine, stop) as (url, _):
            assert url == B
        mine.answered(A, number)
        assert asked(mine, stop, 1) == "b"
        with place(mine, stop) as (url, _):
            assert url == B
            assert asked(mine, stop, 2) == "ab"


# --- What people are told --------------------------------------------------------------------


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, ia.log.name)
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def levels(lines) -> list[str]:
    return [level for level, _ in lines()]


def test_an_outage_is_a_line_when_it_begins_and_one_when_it_ends(hosts, stop, lines):
    mine = hosts(A, B)
    describe(mine, stop)
    for _ in range(3):
        mine.unavailable(A, BUSY)
    [(level, text)] = lines()
    assert (level, str(BUSY) in text) == ("WARNING", True)
    for _ in range(500):
        stop.now += 60
        mine.unavailable(A, BUSY)
    assert len(lines()) == 1
    stop.now += 60
    for _ in range(4):
        describe(mine, stop)
    assert lines()[1:] == [("INFO", ia.t("host_back", url=A))]


def test_passwords_in_addresses_are_not_told(hosts, stop, lines):
    secret = "http://me:pass@a"
    mine = hosts(secret)
    mine.unavailable(secret, BUSY)
    stop.now += 60
    describe(mine, stop)
    assert levels(lines) == ["WARNING", "INFO"]
    assert "pass" not in str(lines())
    assert "pass" not in repr(mine.seen())


def test_the_answer_to_a_question_of_before_is_no_recovery(hosts, stop, lines):
    mine = hosts(A)
    with place(mine, stop) as (url, number):
        mine.unavailable(A, busy(60))
        mine.answered(url, number)
    assert not usable(mine)
    assert waited(stop, asked, mine, stop) == 60
    describe(mine, stop)
    assert usable(mine)
    assert levels(lines) == ["WARNING", "INFO"]


def test_one_that_asks_for_a_moment_again_and_again_is_one_line(hosts, stop, lines):
    mine = hosts(A)
    for _ in range(20):
        mine.unavailable(A, busy(1, status=429))
        stop.now += 1
        describe(mine, stop)
    assert levels(lines) == ["WARNING", "INFO"]
    stop.now += ia.QUIET
    mine.unavailable(A, busy(1, status=429))
    assert levels(lines) == ["WARNING", "INFO", "WARNING"]


# --- Hosts that need a person ----------------------------------------------------------------


def test_a_host_that_needs_a_person_is_left_out_for_an_hour(hosts, stop, lines):
    mine = hosts(A, B)
    for _ in range(3):
        mine.unavailable(A, refused())
    assert asked(mine, stop, 3) == "bbb"
    stop.now += HOUR - 0.1
    assert asked(mine, stop, 2) == "bb"
    stop.now += 0.1
    assert asked(mine, stop) == "a"
    mine.unavailable(A, refused())
    assert asked(mine, stop, 2) == "bb"
    [(level, text)] = lines()
    assert (level, str(refused()) in text) == ("ERROR", True)
    assert [host.struck_off for host in mine.seen()] == [True, False]
    stop.now += HOUR
    describe(mine, stop)
    assert lines()[1:] == [("INFO", ia.t("host_back", url=A))]
    assert [host.struck_off for host in mine.seen()] == [False, False]


def test_one_in_trouble_that_turns_out_to_need_a_person_is_told_of_once_more(hosts, stop, lines):
    mine = hosts(A, B)
    for trouble in (BUSY, refused(), refused()):
        mine.unavailable(A, trouble)
        stop.now += HOUR
    assert levels(lines) == ["WARNING", "ERROR"]


def test_the_last_host_that_needs_a_person_ends_a_batch(hosts, stop, lines):
    mine = hosts(A, B)
    mine.unavailable(A, refused())
    for _ in range(2):
        with pytest.raises(ia.Fatal) as caught:
            mine.unavailable(B, refused(B))
        assert caught.value.key == "host_key_refused"
    with pytest.raises(ia.Fatal), place(mine, stop):
        pytest.fail("was given a host")
    assert len(lines()) == 1
    assert stop.waits == []


def test_one_that_is_busy_may_be_back_when_all_others_need_a_person(hosts, stop):
    mine = hosts(A, B)
    mine.unavailable(A, refused())
    mine.unavailable(B, busy(5))
    assert asked(mine, stop) == "b"
    assert stop.waits == [5]


@pytest.mark.parametrize("trouble", [WRONG, ia.Unexpected("redirected", url=A, target=B)])
def test_what_a_proxy_may_say_for_a_while_needs_no_person(hosts, stop, trouble):
    mine = hosts(A)
    mine.unavailable(A, trouble)
    assert waited(stop, asked, mine, stop) == 1


def test_a_service_outlasts_that_its_last_host_needs_a_person(hosts, stop, lines):
    mine = hosts(A, B, lasts=True)
    mine.unavailable(A, refused())
    mine.unavailable(B, refused(B))
    assert not usable(mine)
    assert waited(stop, asked, mine, stop) == HOUR
    mine.unavailable(A, refused())
    describe(mine, stop)
    assert usable(mine)
    assert levels(lines) == ["ERROR", "ERROR", "INFO"]


# --- Hosts where nothing answers -------------------------------------------------------------


def probing(stop: FakeStop, back: float = math.inf):
    """A probe, which finds a host once that time has come; and when each was probed."""
    began, seen = stop.now, []

    def probe(url: str) -> bool:
        seen.append((stop.now - began, url))
        return stop.now - began >= back

    return probe, seen


@pytest.mark.parametrize("trouble", [NOTHING_THERE, busy(status=502)])
def test_while_no_host_is_available_an_absent_one_is_probed_each_half_second(hosts, stop, trouble):
    mine = hosts(A)
    mine.unavailable(A, trouble)
    for _ in range(6):
        stop.now += 60
        mine.unavailable(A, trouble)
    probe, seen = probing(stop, back=1.7)
    with place(mine, stop, probe=probe) as (url, _):
        assert url == A
    assert seen == [(0.5, A), (1.0, A), (1.5, A), (2.0, A)]


def test_a_probe_that_promised_too_much_is_not_believed_again(hosts, stop):
    """A gateway may answer where the model behind it does not."""
    mine = hosts(A)
    mine.unavailable(A, NOTHING_THERE)
    for waits in ([0.5], [0.5] * 4, [0.5] * 8):  # it is asked at once, then after 2 and 4 s
        stop.waits.clear()
        with place(mine, stop, probe=lambda _: True):
            assert stop.waits == waits
            mine.unavailable(A, NOTHING_THERE)
    assert not usable(mine)


def test_several_absent_hosts_are_probed_in_turn(hosts, stop):
    mine = hosts(A, B, C)
    for url in (A, B):
        mine.unavailable(url, NOTHING_THERE)
    mine.unavailable(C, busy(3))
    for url in (A, B):
        stop.now += 1
        mine.unavailable(url, NOTHING_THERE)  # for longer than that
    probe, seen = probing(stop)
    with place(mine, stop, probe=probe):
        assert stop.waits
    assert [url for _, url in seen][:2] == [A, B]
    assert all(later[0] - one[0] >= 0.5 for one, later in zip(seen, seen[2:], strict=False))


@pytest.mark.parametrize("trouble", [BUSY, busy(5), busy(status=504), FAILED, WRONG, HUNG])
def test_one_that_answers_is_not_probed(hosts, stop, trouble):
    mine = hosts(A)
    mine.unavailable(A, trouble)
    assert asked(mine, stop) == "a"  # by `nobody`


def test_while_another_host_works_none_is_probed(hosts, stop):
    mine = hosts(A, B)
    mine.unavailable(A, NOTHING_THERE)
    stop.now += 0.9
    assert asked(mine, stop, 5) == "bbbbb"


# --- How long no host may be usable ----------------------------------------------------------


def fail_on(hosts: ia.Hosts, stop: FakeStop, trouble: ia.AnalyzeError) -> None:
    """Have every request fail."""
    while True:
        with place(hosts, stop, probe=lambda _: False) as (url, _):
            hosts.unavailable(url, trouble)


@pytest.mark.parametrize("trouble", [BUSY, busy(5), FAILED, NOTHING_THERE], ids=repr)
@pytest.mark.parametrize("most", [0.7, 30, 120])
def test_no_longer_than_wait_timeout_is_no_host_usable(hosts, stop, trouble, most):
    mine = hosts(A, B, wait_timeout=most)
    mine.unavailable(A, trouble)
    stop.now += 1000  # B is usable meanwhile
    mine.unavailable(B, trouble)
    began = stop.now
    with pytest.raises(ia.Fatal) as caught:
        fail_on(mine, stop, trouble)
    assert stop.now - began == pytest.approx(most)
    assert caught.value.key == "no_host"
    assert str(caught.value).count(str(trouble)) == 2


def test_a_description_begins_the_wait_anew(hosts, stop):
    mine = hosts(A, wait_timeout=30)
    for _ in range(5):
        mine.unavailable(A, busy(29))
        describe(mine, stop)
    assert sum(stop.waits) == 5 * 29


def test_with_no_limit_it_is_waited_for_ever(hosts, stop):
    mine = hosts(A)
    for _ in range(500):
        mine.unavailable(A, BUSY)
        asked(mine, stop)
    assert sum(stop.waits) == 63 + 494 * 60


# --- Whether a host looks at pictures --------------------------------------------------------

PICTURES = [ia.prepared(servers.own_picture(n), 0) for n in range(3)]


def never() -> bool:
    raise AssertionError("was tested")


def test_one_text_for_two_pictures_has_the_host_tested_once_for_that_text(hosts):
    for sees in (True, False):
        mine, tests = hosts(A, B), []

        def test(sees=sees, tests=tests) -> bool:
            tests.append(1)
            return sees

        assert mine.sees(A, "A wall.", PICTURES[0], never)
        assert mine.sees(A, "A wall.", PICTURES[0], never)  # the same once more
        assert mine.sees(A, "A door.", PICTURES[1], never)
        assert mine.sees(B, "A wall.", PICTURES[1], never)  # that another host said, too
        assert [mine.sees(A, "A wall.", PICTURES[n], test) for n in (1, 2, 0)] == [sees] * 3
        assert tests == [1]


def test_a_test_that_fails_is_made_again(hosts):
    mine = hosts(A)
    mine.sees(A, "A wall.", PICTURES[0], never)
    with pytest.raises(AssertionError):
        mine.sees(A, "A wall.", PICTURES[1], never)
    assert not mine.sees(A, "A wall.", PICTURES[1], lambda: False)


def test_what_a_host_said_is_not_remembered_for_ever(hosts):
    mine = hosts(A)
    for number in range(3 * ia.TEXTS):
        assert mine.sees(A, str(number), PICTURES[0], never)
    assert len(mine.seen()[0].texts) == ia.TEXTS
    assert mine.sees(A, "0", PICTURES[1], never)  # it is forgotten
    assert not mine.sees(A, str(3 * ia.TEXTS - 1), PICTURES[1], lambda: False)


def test_those_who_hear_one_text_at_once_wait_for_one_test(hours):
    mine, tests = ia.Hosts([A], 4, 60.0), []

    def test() -> bool:
        tests.append(1)
        hours.sleep(1)
        return False

    mine.sees(A, "A wall.", PICTURES[0], never)
    with ia.ThreadPoolExecutor(4) as pool:
        pictures = (PICTURES[1 + n % 2] for n in range(4))
        jobs = [pool.submit(mine.sees, A, "A wall.", picture, test) for picture in pictures]
    assert [job.result() for job in jobs] == [False] * 4
    assert tests == [1]


# --- Places ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("places", "workers"), [(1, 3), (2, 5), (4, 6), (6, 4)])
def test_no_more_requests_than_places(hosts, stop, places, workers):
    mine = hosts(A, B, places=places)
    inside, leave, lock = threading.Semaphore(0), threading.Semaphore(0), threading.Lock()
    counts = []

    def work() -> None:
        with place(mine, stop):
            with lock:
                counts.append(counts[-1] + 1 if counts else 1)
            inside.release()
            assert leave.acquire(timeout=servers.PATIENCE)
            with lock:
                counts.append(counts[-1] - 1)

    most = min(places, workers)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work) for _ in range(workers)]
        for number in range(workers):
            if number >= most:
                leave.release()
            assert inside.acquire(timeout=servers.PATIENCE)
        for _ in range(most):
            leave.release()
    assert [job.exception() for job in jobs] == [None] * workers
    assert (max(counts), counts[-1]) == (most, 0)


def test_a_place_is_free_again_after_an_error(hosts, stop):
    mine = hosts(A, places=1)
    for _ in range(3):
        with pytest.raises(ia.Skip), place(mine, stop):
            raise ia.Skip("photo_gone")
    assert asked(mine, stop) == "a"


def overrun(hosts: ia.Hosts, stop: FakeStop, number: int = 3, heard: int = 1) -> list[bool]:
    """So many requests at once, of which all but the first time out after 10 s, in turn.

    Request `heard` is being answered meanwhile. Which of them waited in the host's queue.
    """
    with ExitStack() as held:
        for _ in range(number):
            held.enter_context(place(hosts, stop))
        stop.now += 10
        hosts.heard(A, heard)
        stop.now += 1
        return [hosts.queued(A, other, 10) for other in range(2, number + 1)]


def most_at_once(hosts: ia.Hosts, stop: FakeStop) -> int:
    """How many requests a host gets at a time."""
    with ExitStack() as held:
        for number in range(1, 99):
            held.enter_context(place(hosts, stop))
            if hosts.seen()[0].full:
                return number
    return 0


def test_a_host_that_lets_requests_wait_gets_one_fewer_for_each_down_to_one(hosts, stop):
    mine = hosts(A, places=9)
    assert overrun(mine, stop) == [True, True]
    assert most_at_once(mine, stop) == 1
    assert not overrun(mine, stop, 1)
    assert usable(mine)


def test_it_gets_one_more_after_some_answers(hosts, stop):
    mine = hosts(A, places=9)
    overrun(mine, stop)
    for most in (1, 2, 3):
        assert most_at_once(mine, stop) == most
        for _ in range(ia.GROWTH):
            describe(mine, stop)


@pytest.mark.parametrize("heard", [3, 4])
def test_a_request_that_is_overtaken_does_not_wait_in_a_queue(hosts, stop, heard):
    mine = hosts(A, places=9)
    assert overrun(mine, stop, 3, heard) == [False, heard == 3]


def test_a_host_that_is_silent_to_all_has_no_queue(hosts, stop):
    mine = hosts(A, places=9)
    mine.heard(A, 0)
    with place(mine, stop), place(mine, stop) as (url, number):
        stop.now += 10
        assert not mine.queued(url, number, 10)


def begun(mine: ia.Hosts, hours) -> list[float]:
    """When five workers, who are there from the begin, are given a host for seven seconds each."""
    stop, began = Stop(hours), []

    def work() -> None:
        with place(mine, stop):
            began.append(hours.time)
            hours.sleep(7)

    with ia.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(work) for _ in range(5)]
    assert [job.exception() for job in jobs] == [None] * 5
    return began


def test_who_waits_for_a_full_host_asks_when_a_request_ends(hours):
    mine = ia.Hosts([A], 4, 60.0)
    mine._hosts[A].most = 2
    assert begun(mine, hours) == [0, 0, 7, 7, 14]


def test_alone_one_that_hung_has_the_others_wait(hours):
    mine = ia.Hosts([A], 4, 60.0)
    mine.unavailable(A, HUNG)
    assert begun(mine, hours) == [1, 8, 15, 22, 29]


# --- Stopping --------------------------------------------------------------------------------


def test_stopping_ends_the_wait_for_a_host(hosts, stop):
    stop._after = 1
    mine = hosts(A)
    mine.unavailable(A, busy(60))
    with pytest.raises(ia.Stopped), place(mine, stop):
        pytest.fail("was given a host")
    assert stop.waits == [60]


def test_nobody_is_asked_once_stopped(hosts, stop):
    mine = hosts(A)
    stop.set()
    with pytest.raises(ia.Stopped), place(mine, stop):
        pytest.fail("was given a host")
    assert stop.waits == []


def test_who_waits_for_a_place_does_not_ask_once_stopped(hosts):
    stop = threading.Event()
    mine = hosts(A, places=1)
    pool = ThreadPoolExecutor(1)
    with pool, place(mine, stop):
        job = pool.submit(asked, mine, stop)
        stop.set()
    with pytest.raises(ia.Stopped):
        job.result(timeout=servers.PATIENCE)
