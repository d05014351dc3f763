"""The invented time itself: it is exact, and a run in it takes the same course each time."""

import threading
from datetime import timedelta

import pytest
import servers
from hours import BEGIN, STUCK, with_health
from servers import Reply
from worlds import CHATS, fill

import immich_analyze as ia

pytestmark = pytest.mark.slow

SELDOM = ["--api-poll-interval", "600"]


def times(hours, exchanges) -> list[float]:
    """When requests came, in seconds since the test began."""
    return [hours.since_begin(exchange) for exchange in exchanges]


def test_a_day_passes_at_once_and_what_is_planned_happens_in_time(hours, api, ollama):
    with hours.service(api, ollama, "--api-poll-interval", "2400") as run:
        run.at(86000, lambda: api.add(picture=servers.picture()))
        run.until(85999)
        assert (run.time, api.texts()) == (85999, {})
        run.until(86400)
    assert run.counts == {"described": 1}
    assert times(hours, ollama.find(*CHATS)) == [86400]  # the next look after 84000


def test_a_run_takes_the_same_course_each_time(hours, library, ollama):
    wanted = fill(library, 12)
    pace = dict(zip(map(servers.own_picture, range(12)), [2, 0.5, 3] * 4, strict=True))
    ollama.answer = lambda image, _: hours.takes(pace[image]) or servers.told(image)
    courses = []
    for _ in range(2):
        began = hours.time
        with hours.batch(library, ollama, "--max-concurrent", "3") as run:
            pass
        assert (run.counts, library.texts()) == ({"described": 12}, wanted)
        came = [time - began for time in times(hours, ollama.find(*CHATS)[-12:])]
        courses.append((came, ollama.asked[-12:]))
        for id in wanted:
            library.describe(id, "")
    assert courses[0] == courses[1]
    assert ollama.most_in_flight == 3


def test_answers_take_their_time_and_no_longer_than_the_client_waits(hours, api, ollama):
    fill(api, 3)
    ollama.script(*CHATS, hours.slow(40), hours.slow(50), hours.hang)
    with hours.batch(api, ollama, "--max-concurrent", "1", "--timeout", "45") as run:
        pass
    first, second, third = times(hours, ollama.find(*CHATS))[:3]
    assert (first, second) == (0, 40)
    assert 85 <= third < 95
    assert run.counts == {"described": 3}


def test_a_host_may_be_in_trouble_for_a_while(hours, api, ollama):
    wanted = fill(api, 10)
    busy = hours.between(5, 30, Reply(503, {"error": "busy"}))
    ollama.script(*CHATS, busy, forever=True)
    hours.pace(ollama)
    options = ["--max-concurrent", "1", "--unavailable-duration", "10"]
    with hours.batch(api, ollama, *options) as run:
        pass
    assert api.texts() == wanted
    assert run.counts == {"described": 10}
    failed = [exchange for exchange in ollama.find(*CHATS) if exchange.status == 503]
    assert times(hours, failed)[0] == 5
    assert len(run.lines(ollama.url, level="WARNING")) == 1


def test_postgresql_goes_by_the_invented_clock(hours, database, ollama):
    with hours.service(database, ollama, *SELDOM) as run:
        run.until(7200)
        id = database.add(picture=servers.picture())
        for table, column in (
            ("asset", "createdAt"),
            ("file", "updatedAt"),
            ("asset", "updatedAt"),
        ):
            [(moment,)] = database.photos.run(f'SELECT "{column}" FROM {{{table}}}')
            assert moment == hours.now() == BEGIN + timedelta(hours=2)
        [(stamp,)] = database.photos.run('SELECT "updateId"::text FROM {file}')
        assert int(stamp.replace("-", "")[:12], 16) == BEGIN.timestamp() * 1000 + 7_200_000
        run.until(7200 + 1200)
    assert database.texts() == {id: servers.told(servers.picture())}


def test_what_a_watch_tells_of_is_waited_for(hours, database, ollama):
    [id] = database.photos.add_many(1, preview=False)
    with hours.service(database, ollama, "--api-poll-interval", "100000") as run:
        run.until(60)
        database.photos.add_preview(id)
        hours.told_by_others(lambda: database.photos.write_preview(id, servers.picture()))
        run.until(70)
        assert run.counts == {"described": 1}


def test_health_can_be_asked_for_at_any_time(hours, api, ollama):

    with hours.service(api, ollama, *SELDOM, *with_health()) as run:
        run.until(30)
        fill(api, 1)
        assert run.health()[0] == 200
        run.until(700)
        assert run.health()[1]["described"] == 1


def test_a_run_that_ends_with_an_error_tells_its_key(hours, api, ollama):
    api.server.keys.clear()
    with hours.batch(api, ollama) as run:
        pass
    assert (run.fatal, run.code, len(run.said)) == ("key_refused", 2, 1)


# --- What the tool uses to wait --------------------------------------------------------------


def together(*calls) -> list:
    """What these give, called at the same time."""
    with ia.ThreadPoolExecutor(len(calls)) as pool:
        done = [pool.submit(call) for call in calls]
        ia.wait(done)
    return [job.result() for job in done]


def test_locks_and_places_are_held_by_as_many_as_may(hours):
    for lock, at_once in ((ia.threading.Lock(), 1), (ia.threading.BoundedSemaphore(2), 2)):
        began = hours.time

        def hold(lock=lock, began=began) -> float:
            with lock:
                hours.sleep(10)
                return hours.time - began

        assert together(hold, hold, hold, hold) == [10 * (n // at_once + 1) for n in range(4)]


def test_a_lock_in_time_or_not(hours):
    lock = ia.threading.Lock()

    def hold() -> None:
        with lock:
            hours.sleep(10)

    def early() -> tuple[bool, float]:
        hours.sleep(1)
        return lock.acquire(timeout=5), hours.time

    assert together(hold, early, lambda: lock.acquire(blocking=False))[1:] == [(False, 6), False]


def test_a_lock_may_be_taken_again_by_whoever_has_it(hours):
    lock = ia.threading.RLock()

    def hold() -> float:
        with lock, lock:
            hours.sleep(1)
        return hours.time

    assert together(hold, hold) == [1, 2]


def test_a_condition_wakes_those_who_wait(hours):
    condition, box = ia.threading.Condition(), []

    def take() -> tuple[bool, float]:
        with condition:
            return condition.wait_for(lambda: bool(box), 10) and box.pop(), hours.time

    def put() -> None:
        for thing in ("first", "second"):
            hours.sleep(3)
            with condition:
                box.append(thing)
                condition.notify_all()

    assert together(take, take, take, put)[:3] == [("first", 3), ("second", 6), (False, 10)]


def test_an_event_is_waited_for_with_and_without_an_end(hours):
    event = ia.threading.Event()

    def setting() -> None:
        hours.sleep(5)
        event.set()

    waits = [lambda: (event.wait(), hours.time), lambda: (event.wait(2), hours.time)]
    assert together(*waits, setting)[:2] == [(True, 5), (False, 2)]


def test_a_pool_has_as_many_threads_as_it_may(hours):
    def work() -> float:
        hours.sleep(10)
        return hours.time

    def fail() -> None:
        hours.sleep(1)
        raise ValueError("it failed")

    with ia.ThreadPoolExecutor(2) as pool:
        done = [pool.submit(call) for call in (work, fail, work, work)]
        ia.wait(done, return_when="FIRST_EXCEPTION")
        assert hours.time == 1
        assert [job.result() for job in (done[0], done[2], done[3])] == [10, 11, 20]
        with pytest.raises(ValueError, match="it failed"):
            done[1].result()


def test_a_thread_without_a_turn_may_tell_and_be_told(hours):
    asked, answered = ia.threading.Event(), ia.threading.Event()

    def outside() -> None:
        assert asked.wait(STUCK)
        answered.set()

    thread = threading.Thread(target=outside)
    thread.start()

    def ask() -> bool:
        hours.sleep(5)
        asked.set()
        return answered.wait()

    assert together(ask) == [True]
    thread.join()


def test_who_never_lets_time_go_on_is_found_out(hours):
    def spin() -> None:
        while True:
            ia.time.monotonic()

    with pytest.raises(AssertionError, match="spinning"):
        together(spin)


# --- A pause of 0 spins nowhere --------------------------------------------------------------

NO_PAUSES = [
    "--unavailable-duration",
    "0",
    "--wait-retry-interval",
    "0",
    "--file-check-interval",
    "0",
]


@pytest.mark.parametrize("trouble", [Reply(503, {"error": "busy"}), Reply(500, {"error": "sick"})])
def test_a_host_in_trouble_is_asked_twice_a_second_at_most(hours, api, ollama, trouble):
    wanted = fill(api, 2)
    ollama.script(*CHATS, hours.between(0, 20, trouble), forever=True)
    with hours.batch(
        api, ollama, *NO_PAUSES, "--max-concurrent", "1", "--retry-delay-seconds", "0"
    ) as run:
        pass
    assert (run.counts, api.texts()) == ({"described": 2}, wanted)
    early = [time for time in times(hours, ollama.find(*CHATS)) if time < 20]
    assert 10 < len(early) <= 2 * 42  # a request, and one about a plain picture
    assert 20 <= run.ended < 23


def test_an_immich_that_is_away_is_asked_twice_a_second_at_most(hours, api, ollama):
    wanted = fill(api, 2)
    away = hours.between(0, 20, Reply(502, "<html>"))
    api.server.script("GET", "/server/version", away, forever=True)
    with hours.service(api, ollama, *NO_PAUSES) as run:
        run.until(25)
    early = [t for t in times(hours, api.server.find("GET", "/server/version")) if t < 20]
    assert 30 < len(early) <= 42
    assert api.texts() == wanted


@pytest.mark.parametrize(("seconds", "looks"), [("0", 1), ("10", 21)])
def test_a_preview_that_is_being_written_is_read_twice_a_second_at_most(
    hours, api, ollama, seconds, looks
):
    id = api.add(picture=servers.picture()[:-200])
    grow = iter(range(1, 1000))
    whole = servers.picture()
    half = lambda _: Reply(200, whole[: 200 + next(grow)], {"Content-Type": "image/jpeg"})  # noqa: E731
    api.server.script("GET", "/thumbnail", half, forever=True)
    with hours.batch(api, ollama, *NO_PAUSES, "--file-write-timeout", seconds) as run:
        pass
    assert (run.counts, api.texts()[id]) == ({"failed": 1}, "")
    assert len(api.server.find("GET", "/thumbnail")) == looks
