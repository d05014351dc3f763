"""What a service is woken by and what it comes back to: invented time, no server, no thread."""

import logging
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise, repeat

import pytest
from test_stream import Desk, Jobs, Listing, away, hiccup, nothing_to_confirm, photo, state_of

import immich_analyze as ia

START = datetime(2026, 1, 1, tzinfo=UTC)


class Library:
    """A library whose photos a test lets arrive; its clock goes with the invented time."""

    def __init__(self, stop):
        self.stop, self.began = stop, stop.now
        self.photos, self.looks, self.sweeps = [], [], []
        self.bad_looks = iter(())
        self.trouble = iter(())
        self.skew = timedelta(0)

    def _meet_trouble(self):
        if error := next(self.trouble, None):
            raise error

    def clock(self):
        self._meet_trouble()
        return START + timedelta(seconds=self.stop.now - self.began) + self.skew

    def arrive(self, *photos):
        self.photos += [(self.clock(), photo) for photo in photos]

    def news(self, since, now):
        if error := next(self.bad_looks, None):
            raise error
        self.looks.append((since, now))
        return [photo for moment, photo in self.photos if since <= moment <= now]

    def page(self, cursor, since=None):
        self.sweeps.append(since)
        return [photo for moment, photo in self.photos if since is None or since <= moment], None


@pytest.fixture
def library(stop):
    return Library(stop)


@pytest.fixture
def service(stop, config):
    """What the threads of a service share."""

    def make(*argv):
        patience = ia.Patience(stop, 5, float("inf"))
        return state_of(config(*(argv or ["-c"])), stop, patience, ia.LASTING)

    return make


def ids(turns):
    return [job.asset.id for jobs in turns for job in jobs]


class Day:
    """A service at work: `pass_until` lets time go by and keeps what it described by when."""

    def __init__(self, state, library, analyze=lambda _: ia.Outcome.DESCRIBED, listing=None):
        self.state, self.library, self.done = state, library, []
        self.events = []  # moment and what happens then
        stop, nap = state.stop, state.stop.nap
        self.began = stop.now

        def eventful_nap(seconds):
            soonest = min([at for at, _ in self.events], default=float("inf"))
            nap(min(seconds, max(0.0, soonest - stop.now)))
            for event in [event for event in self.events if event[0] <= stop.now]:
                self.events.remove(event)
                event[1]()

        stop.nap = eventful_nap
        news = ia.Newsreader(library, state)
        turns = ia.stream(state, ia.Listings(*[listing] if listing else []), news, None)

        def noting(job):
            self.done.append((round(stop.now - self.began, 2), job.asset.id))
            return analyze(job)

        self.work = lambda: ia.work(turns, noting, nothing_to_confirm, state)

    def at(self, seconds, happens):
        self.events.append((self.began + seconds, happens))

    def until(self, seconds):
        self.at(seconds, self.state.stop.set)
        self.work()
        return self.done


# looks


def test_arrivals_are_found_within_the_poll_interval_and_done_once(service, library):
    day = Day(service("-c", "--api-poll-interval", "10"), library)
    day.at(3, lambda: library.arrive(photo(1)))
    day.at(25, lambda: library.arrive(photo(2), photo(3)))
    assert day.until(200) == [(10, "1"), (30, "2"), (30, "3")]


def test_each_look_goes_back_a_minute_before_the_one_before(service, library):
    Day(service("-m", "--api-poll-interval", "10"), library).until(25)
    seconds = [((s - START).total_seconds(), (n - START).total_seconds()) for s, n in library.looks]
    assert seconds == [(-60, 0), (-60, 10), (-50, 20)]


def test_a_photo_that_shows_late_in_a_listing_is_found(service, library):
    day = Day(service("-c", "--api-poll-interval", "10"), library)
    uploaded = library.clock() + timedelta(seconds=5)
    day.at(50, lambda: library.photos.append((uploaded, photo(1))))
    assert day.until(100) == [(50, "1")]


@pytest.mark.parametrize("hours", [-24, 24])
def test_a_clock_that_jumps_costs_no_photo(service, library, hours):
    """The server's clock jumps between two looks; what arrives around that is found."""

    def jump():
        library.skew = timedelta(hours=hours)

    day = Day(service("-c", "--api-poll-interval", "10"), library)
    day.at(14, lambda: library.arrive(photo(1)))
    day.at(15, jump)
    day.at(16, lambda: library.arrive(photo(2)))
    day.at(45, lambda: library.arrive(photo(3)))
    found = {asset_id: at for at, asset_id in day.until(100)}
    assert found.keys() == {"1", "2", "3"} if hours > 0 else found.keys() >= {"2", "3"}
    assert max(found["2"] - 16, found["3"] - 45) <= 10
    if hours < 0:  # it was uploaded in the future: the next sweep but not the next look has it
        assert library.page(None, library.clock())[0] == [photo(1)]


def test_what_has_a_description_is_no_news(service, library):
    day = Day(service("-m"), library)
    library.arrive(photo(1, description="By the camera."), photo(2))
    assert day.until(100) == [(0, "2")]
    assert day.state.tally.counts == {"described": 1}


def test_arrivals_overtake_the_backlog(service, library):
    state = service("-c", "--api-poll-interval", "10")
    backlog = [ia.Job(photo(n)) for n in range(100, 110)]
    stream = ia.stream(state, ia.Listings(Jobs(backlog)), ia.Newsreader(library, state), None)
    assert ids(islice(stream, 2)) == ["100", "101"]
    library.arrive(photo(1), photo(2))
    assert ids(islice(stream, 1)) == ["102"]
    state.stop.now += 10
    assert ids(islice(stream, 3)) == ["1", "2", "103"]


def test_what_is_listed_and_arrives_is_done_once(service, library):
    state = service("-c", "--api-poll-interval", "10")
    both = photo(1)
    library.arrive(both)
    listing = ia.Listing(Listing([both, photo(2)]), state, counts=True)
    assert Day(state, library, listing=listing).until(30) == [(0, "1"), (0, "2")]


def test_overwriting_does_each_arrival_once(service, library):
    day = Day(service("-m", "-o", "--api-poll-interval", "10"), library)
    library.arrive(photo(1, description="By the camera."))
    assert day.until(3 * 24 * 3600) == [(0, "1")]


def test_a_batch_has_no_news_and_ends(stop, config):
    state = state_of(config(), stop, None, lasting=0)
    jobs = [ia.Job(photo(n)) for n in range(3)]
    done = []
    for turn in ia.stream(state, ia.Listings(Jobs(jobs)), None, None):
        done.append(turn)
        state.tally.hand(-1)
    assert done == [[job] for job in jobs]
    assert stop.waits == []


def test_a_batch_ends_only_when_nothing_is_in_hand_or_to_be_read_back(stop, config):
    state = state_of(config(), stop, None, lasting=0)
    jobs = [ia.Job(photo(n)) for n in range(3)]
    stream = ia.stream(state, ia.Listings(Jobs(jobs)), None, None)
    assert [next(stream) for _ in jobs] == [[job] for job in jobs]
    began, nap = stop.now, stop.nap

    def finish_one(seconds):
        nap(seconds)
        if state.tally.in_hand:
            state.checks.add(jobs[state.tally.hand(-1)])

    stop.nap = finish_one
    assert next(stream) == [jobs[2], jobs[1], jobs[0]]
    assert state.tally.hand(-1) == 0
    assert stop.now - began <= 3 * state.config.api_poll_interval + ia.CHECK_PAUSE
    assert list(stream) == []


@pytest.mark.parametrize("error", [away(), hiccup()], ids=["away", "hiccup"])
def test_a_clock_that_cannot_be_read_is_asked_again(service, library, caplog, error):
    caplog.set_level(logging.INFO)
    day = Day(service("-m", "--api-poll-interval", "10"), library)
    library.arrive(photo(1))
    library.trouble = iter([error] * 1000)
    assert day.until(9999) == [(5000, "1")]
    assert len(caplog.messages) == 2  # an outage is two lines


def test_a_look_that_fails_is_made_again_and_holds_nothing_up(service, library, caplog):
    day = Day(service("-m", "--api-poll-interval", "10"), library)
    library.arrive(photo(1))
    library.bad_looks = iter([hiccup()] * 5)
    ia.hint("hinted", day.state)
    assert day.until(100) == [(0, "hinted"), (50, "1")]
    assert caplog.messages == [ia.t("look_failed", why=hiccup())]


def test_a_page_that_will_not_come_holds_nothing_up(service, library, caplog):
    """The backlog goes on with that page once it comes; arrivals do not wait for it."""
    state = service("-c", "--api-poll-interval", "10")
    bad = Listing([photo(1)], [photo(2)], trouble={1: [hiccup()] * 3})
    day = Day(state, library, listing=ia.Listing(bad, state, counts=True))
    day.at(95, lambda: library.arrive(photo(3)))
    assert day.until(1000) == [(0, "1"), (100, "3"), (285, "2")]
    assert bad.asked == [0, 1, 1, 1, 1]
    assert len(caplog.messages) == 3


def test_sweeps_are_made_while_the_backlog_lasts(service, library):
    state = service("-c", "--api-poll-interval", "100000")
    library.photos.append((library.clock() - timedelta(hours=1), photo(1)))
    backlog = Jobs([ia.Job(photo(n)) for n in range(1000, 1500)])
    found = []
    for [job] in islice(
        ia.stream(state, ia.Listings(backlog), ia.Newsreader(library, state), None), 300
    ):
        found.append(job.asset.id)
        state.stop.now += 600  # a model takes its time
    assert found.index("1") == 6
    assert len(library.sweeps) == 300 / 6 - 1
    assert None not in library.sweeps  # what the backlog lists is not listed at the same time


def test_sweeps_that_cannot_go_on_do_not_pile_up(service, library):
    state, listings = service("-c", "--api-poll-interval", "100000"), ia.Listings()
    library.page = lambda *_: (_ for _ in ()).throw(hiccup())
    stream = ia.stream(state, listings, ia.Newsreader(library, state), None)
    ia.hint("at the end", state)
    [(_, _, job)] = state.agenda._due
    state.agenda.due()
    state.agenda.put(job, 20 * 3600)
    assert next(stream) == [job]
    assert len(listings) == 2


def test_what_was_written_is_read_back_while_a_page_will_not_come(service, library, stop):
    state, job = service("-c", "--api-poll-interval", "1000"), ia.Job(photo(2))
    bad = ia.Listing(Listing([photo(1)], trouble={0: repeat(hiccup())}), state, counts=True)
    began = stop.now
    state.checks.add(job)
    stream = ia.stream(state, ia.Listings(bad), ia.Newsreader(library, state), None)
    assert next(stream) == [job]
    assert stop.now - began == ia.CHECK_PAUSE


def test_a_service_that_waits_for_its_library_can_be_stopped(service, library, stop):
    day = Day(service("-c"), library)
    library.trouble = iter(away, None)
    stop._after = 5
    day.work()
    assert stop.waits == [5] * 5


# photos whose preview is not there yet


def test_previews_that_are_still_to_be_made_at_the_start_are_waited_for(service, library, stop):
    """The backlog leaves them out; those that are ready are left to it."""

    def analyze(job):
        return ia.Outcome.DESCRIBED if stop.now - day.began > 30 else ia.Outcome.NOT_READY

    day = Day(service("-c"), library, analyze)
    hour, days = timedelta(hours=1), timedelta(days=3)
    library.photos = [
        (START - hour, photo(1, ready=False)),
        (START - hour, photo(2)),
        (START - days, photo(3, ready=False)),
    ]
    found = day.until(100)
    assert {asset_id for _, asset_id in found} == {"1"}
    assert 30 < found[-1][0] < 60


def test_a_photo_without_a_preview_is_looked_up_again_for_an_hour(service, library):
    day = Day(service("-c"), library, lambda _: ia.Outcome.NOT_READY)
    library.arrive(photo(1, ready=False))
    looks = [at for at, _ in day.until(5000)]
    pauses = [b - a for a, b in pairwise(looks)]
    assert looks[0] == 1
    assert all(a < b for a, b in pairwise(pauses))
    assert 3600 < looks[-1] < 5000
    assert max(pauses) < 1500
    assert len(looks) < 25
    assert day.state.tally.counts == {"not_ready": 1}


@pytest.mark.parametrize("made", [0.5, 1, 4, 8, 15])
def test_a_preview_that_comes_within_seconds_is_seen_within_the_poll_interval(
    service, library, stop, made
):
    """Default settings: a poll interval of 10 s."""

    def analyze(job):
        ready = stop.now - day.began >= made
        return ia.Outcome.DESCRIBED if ready else ia.Outcome.NOT_READY

    day = Day(service("-c"), library, analyze)
    library.arrive(photo(1, ready=False))
    assert day.until(100)[-1][0] <= made + 10


def test_after_that_hour_the_sweep_finds_it(service, library):
    day = Day(service("-c"), library, lambda _: ia.Outcome.NOT_READY)
    library.arrive(photo(1, ready=False))
    day.at(5000, lambda: library.photos.__setitem__(0, (START, photo(1))))
    last_look, first_sweep = [at for at, _ in day.until(8000) if at > 3600][-2:]
    assert last_look < 5000
    assert 7200 <= first_sweep < 7300


# photos that fail


def test_a_photo_that_fails_in_passing_is_taken_again_and_holds_no_worker(service, library, caplog):
    day = Day(service("-m", "--api-poll-interval", "10"), library)
    tries = Counter()

    def analyze(job):
        tries[job.asset.id] += 1
        if job.asset.id == "1" and tries["1"] < 4:
            raise hiccup()
        return ia.Outcome.DESCRIBED

    day = Day(service("-m", "--api-poll-interval", "10"), library, analyze)
    library.arrive(photo(1), photo(2))
    assert day.until(3000) == [(0, "1"), (0, "2"), (60, "1"), (150, "1"), (285, "1")]
    assert day.state.tally.counts == {"failed": 1, "described": 2}
    assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == 1


@pytest.mark.parametrize(
    ("reason", "times"), [("photo_excluded", 2), ("claimed_elsewhere", 2), ("has_description", 1)]
)
def test_what_was_gone_is_taken_again_when_it_comes_back(service, library, reason, times):
    seen = []

    def analyze(job):
        seen.append(job.asset.id)
        if len(seen) == 1:
            raise ia.Gone(reason)
        return ia.Outcome.DESCRIBED

    day = Day(service("-c", "--api-poll-interval", "1000"), library, analyze)
    library.arrive(photo(1))
    day.until(3999)
    assert len(seen) == times


def test_it_is_looked_up_before_it_is_tried_again(service, library):
    ready = []

    def analyze(job):
        ready.append(job.asset.ready)
        raise hiccup()

    day = Day(service("-c"), library, analyze)
    library.arrive(photo(1))
    day.until(100)
    assert ready == [True, False]


@pytest.mark.parametrize(
    ("error", "tries"),
    [(hiccup(), 10), (away(), 10), (ia.Permanent("preview_missing"), 1), (KeyError("a bug"), 1)],
)
def test_what_goes_on_failing_is_left_for_a_day(service, library, error, tries):
    def analyze(_):
        raise error

    day = Day(service("-c"), library, analyze)
    library.arrive(photo(1))
    looks = [at for at, _ in day.until(24 * 3600 + 50)]
    assert len(looks) == tries + 1
    assert looks[-2] < 2 * 3600
    assert looks[-1] >= 24 * 3600


def test_a_text_that_could_not_be_stored_is_kept(service, library):
    """The model is not asked again for what it said."""
    desk = Desk(writes=[*[hiccup()] * (ia.VALUABLE_TRIES * 2), True], found=[""] * 2)
    state = service("-c")
    day = Day(state, library, lambda job: ia.analyze(job, desk, desk, state))
    library.arrive(photo(1))
    day.until(3000)
    writes = ["write A photo."] * ia.VALUABLE_TRIES
    assert desk.said == ["preview", "describe", *writes, "find", *writes, "find", writes[0]]
    assert state.tally.counts == {"failed": 1, "described": 1}
    assert desk.noted == []


# sweeps


def test_sweeps_go_over_two_days_each_hour_and_over_all_each_day(service, library):
    Day(service("-c"), library).until(25 * 3600 + 60)
    began = {n: START + timedelta(hours=n) for n in range(1, 26)}
    two_days = timedelta(days=2)
    for number, since in enumerate(library.sweeps, 1):
        late = timedelta(seconds=60)
        if number == 24:
            assert since is None
        else:
            assert began[number] - two_days <= since <= began[number] - two_days + late
    assert len(library.sweeps) == 25


def test_in_monitor_mode_sweeps_begin_at_the_start(service, library):
    Day(service("-m"), library).until(72 * 3600 + 60)
    assert set(library.sweeps[:48]) == {START}
    assert library.sweeps[71] == START
    assert library.sweeps[60] > START


def test_a_sweep_counts_nothing_that_needs_nothing(service, library):
    day = Day(service("-c"), library)
    early = START - timedelta(hours=1)
    library.photos = [(early, photo(1, description="By a person."))]
    day.until(4000)
    assert len(library.sweeps) == 1
    assert day.state.tally.counts == {}


def test_a_sweep_finds_what_the_looks_missed(service, library):
    day = Day(service("-c"), library)
    day.at(100, lambda: library.photos.append((START - timedelta(hours=1), photo(1))))
    [(at, found)] = day.until(4000)
    assert found == "1"
    assert 3600 <= at <= 3660


# hints


def hinted(state, asset_id=None):
    asset_id = asset_id or str(uuid.uuid4())
    ia.hint(asset_id, state)
    return asset_id


def test_a_hint_has_its_photo_looked_up_until_its_row_is_there(service, library, stop):
    def analyze(job):
        assert not job.asset.ready
        return ia.Outcome.DESCRIBED if stop.now >= day.began + 0.11 else ia.Outcome.NOT_READY

    state = service("-c", "--api-poll-interval", "1000")
    day = Day(state, library, analyze)
    asset_id = hinted(state)
    looks = day.until(100)
    assert [at for at, _ in looks] == [0, 0.05, 0.12]
    assert {id for _, id in looks} == {asset_id}


def test_a_hint_that_leads_nowhere_is_dropped_and_leaves_the_photo_to_the_feed(
    service, library, stop
):
    state = service("-c", "--api-poll-interval", "1000", "--file-write-timeout", "30")

    def analyze(job):
        return ia.Outcome.DESCRIBED if stop.now > day.began + 100 else ia.Outcome.NOT_READY

    day = Day(state, library, analyze)
    asset_id = hinted(state)
    day.at(500, lambda: library.arrive(photo(asset_id)))
    looks = [at for at, _ in day.until(1990)]
    assert looks[-1] == 1000
    assert 25 < looks[-2] < 45
    assert len(looks) < 20


def test_hints_of_a_photo_in_hand_are_nothing_new(service):
    state = service("-c")
    asset_id = hinted(state)
    hinted(state, asset_id)
    assert len(state.agenda) == 1


def test_a_flood_of_hints_is_cut_off(service):
    state = service("-c")
    for _ in range(ia.MOST_HINTS + 50):
        hinted(state)
    assert len(state.agenda) == ia.MOST_HINTS
    assert state.tally.take(photo("the 1,001st is for the feed"))


class Watch:
    def __init__(self, since):
        self.since, self.misses = since, 0

    def missed(self):
        self.misses += 1


@pytest.mark.parametrize(("since", "misses"), [(0, 1), (87, 1), (88, 0), (float("inf"), 0)])
def test_photos_that_only_the_feed_finds_are_noticed(service, library, stop, since, misses):
    """A watch that has been there since before the last look should have told of them."""
    state = service("-m", "--api-poll-interval", "10")
    watch = Watch(stop.now + since)
    stream = ia.stream(state, ia.Listings(), ia.Newsreader(library, state), watch)
    stop.now += 100
    library.arrive(photo(1))
    assert ids(islice(stream, 1)) == ["1"]
    assert watch.misses == misses


# the parts


def test_a_nap_ends_by_news_by_the_end_or_by_itself():
    stop = ia.Stop()
    stop.nap(0.001)
    stop.rouse()
    stop.nap(60)
    assert not stop.is_set()
    stop.set()
    stop.nap(60)
    assert stop.is_set()


def test_the_agenda_gives_each_photo_at_its_time_and_in_order(stop):
    woken = []
    agenda = ia.Agenda(lambda: woken.append(stop.now), lasting=60)
    jobs = [ia.Job(photo(n)) for n in range(4)]
    for job, pause in zip(jobs, (5, 0, 5, 2), strict=True):
        agenda.put(job, pause)
    assert woken == [stop.now] * 4
    assert agenda.due() is jobs[1]
    assert agenda.due() is None
    assert agenda.next_time() == stop.now + 2
    stop.now += 5
    assert [agenda.due() for _ in range(4)] == [jobs[3], jobs[0], jobs[2], None]
    assert agenda.next_time() == float("inf")


def test_ids_are_a_set_in_eight_bytes_each():
    mine, known = ia.Ids(), [str(uuid.UUID(int=n * 7**40)) for n in range(2000)]
    assert all(mine.add(asset_id) for asset_id in known)
    assert not any(mine.add(asset_id) for asset_id in known)
    for asset_id in known[::2]:
        mine.remove(asset_id)
        mine.remove(asset_id)
    assert [mine.add(asset_id) for asset_id in known] == [True, False] * 1000
    assert mine._hashes.buffer_info()[1] * mine._hashes.itemsize == 8 * len(known)


def test_the_reasons_are_counted(service, library):
    gone = {"3": ia.Gone("photo_gone"), "4": ia.Gone("has_description")}
    fates = {"1": hiccup(), "2": KeyError(), **gone}

    def analyze(job):
        fate = fates.get(job.asset.id, ia.Outcome.DESCRIBED)
        if isinstance(fate, Exception):
            raise fate
        return fate

    day = Day(service("-m"), library, analyze)
    library.arrive(*[photo(n) for n in range(1, 6)])
    day.until(1)
    reasons = {f"{outcome} {reason}": n for (outcome, reason), n in day.state.tally.reasons.items()}
    assert reasons == {
        "failed not_json": 1,
        "failed bug": 1,
        "skipped photo_gone": 1,
        "skipped has_description": 1,
        "described ": 1,
    }
