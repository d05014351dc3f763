"""The stream of photos and what becomes of them: plain lists, and time that is invented."""

import logging
import math
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, repeat

import pytest
import servers

import immich_analyze as ia

WHOLE = servers.picture()
CUT = WHOLE[:-20]
DEFAULTS = ia.parse((), {})
MODEL, PROMPT = DEFAULTS.model_name, DEFAULTS.prompt_id


def photo(number, **fields):
    fields = {"name": f"{number}.jpg", "description": "", "source": "", **fields}
    return ia.Asset(id=str(number), **fields)


def away(pause=None):
    return ia.HostDown("database_down", why="away", pause=pause)


def hiccup(pause=None):
    return ia.Retryable("not_json", url="here", pause=pause)


def fatal():
    return ia.Fatal("database_refused", why="no")


class Listing:
    """A library that lists these pages; `trouble` has errors for a page, raised in turn."""

    def __init__(self, *pages, trouble=None):
        self.pages = pages
        self.trouble = {number: iter(errors) for number, errors in (trouble or {}).items()}
        self.asked = []

    def page(self, cursor, since=None):
        number = cursor or 0
        self.asked.append(number)
        self.since = since
        error = next(self.trouble.get(number, iter(())), None)
        if error:
            raise error
        return self.pages[number], number + 1 if number + 1 < len(self.pages) else None


@pytest.fixture
def patience(stop):
    return ia.Patience(stop, pause=5, longest=60)


@pytest.fixture
def state(stop, patience, config):
    """What the threads of a batch share."""
    return state_of(config(), stop, patience, lasting=0)


def state_of(config, stop, patience, lasting):
    hosts = ia.Hosts(["http://host"], 1, 60)
    agenda = ia.Agenda(stop.rouse, lasting)
    return ia.State(config, stop, hosts, patience, agenda, ia.Checks(), ia.Tally())


def work(assets, story, state):
    """Have photos worked on by a library that keeps what it takes: nothing is read back."""
    ia.work(([ia.Job(asset)] for asset in assets), story, nothing_to_confirm, state)


def nothing_to_confirm(jobs):
    raise AssertionError(jobs)


class Jobs:
    """A listing that is given."""

    def __init__(self, jobs):
        self.next_time = 0.0
        self._jobs = iter(jobs)

    def next(self):
        job = next(self._jobs, None)
        self.next_time = 0.0 if job else math.inf
        return job


# the backlog


def backlog(library, state):
    """The photos to describe that a batch is given by a library."""
    for [job] in ia.stream(state, ia.Listings(ia.Listing(library, state, counts=True)), None, None):
        yield job.asset
        state.tally.hand(-1)


def test_pages_come_in_order_and_only_when_they_are_needed(state):
    photos = [photo(n) for n in range(5)]
    library = Listing(photos[:2], [], photos[2:4], photos[4:])
    stream = backlog(library, state)
    assert library.asked == []
    assert [next(stream), next(stream)] == photos[:2]
    assert library.asked == [0]
    assert next(stream) == photos[2]
    assert library.asked == [0, 1, 2]
    assert list(stream) == photos[3:]
    assert library.asked == [0, 1, 2, 3]
    assert state.tally.listed == 5


@pytest.mark.parametrize(
    ("errors", "waits"),
    [
        ([away()], [5]),
        ([away()] * 7, [5] * 7),
        ([hiccup()] * 7, [5] * 7),
        ([hiccup(), away(), away(), hiccup(0.5)], [5, 5, 5, 0.5]),
    ],
    ids=["away", "away for long", "hiccups", "both"],
)
@pytest.mark.parametrize("sick", [0, 1, 2])
def test_trouble_with_a_page_repeats_only_that_page(state, stop, sick, errors, waits):
    photos = [photo(n) for n in range(6)]
    library = Listing(photos[:2], photos[2:4], photos[4:], trouble={sick: errors})
    assert list(backlog(library, state)) == photos
    assert Counter(library.asked) == Counter([0, 1, 2]) + Counter({sick: len(errors)})
    assert library.asked == sorted(library.asked)
    assert stop.waits == waits


@pytest.mark.parametrize(
    ("errors", "key"),
    [
        (repeat(hiccup()), "not_json"),
        ([ia.Permanent("immich_refused", status=418, why="")], "immich_refused"),
        ([ia.Gone("photo_gone")], "photo_gone"),
        (repeat(away()), "library_away"),
        ([fatal()], "database_refused"),
    ],
)
def test_a_page_that_will_not_come_ends_the_run(state, errors, key):
    library = Listing([photo(1)], [photo(2)], trouble={1: errors})
    stream = backlog(library, state)
    assert next(stream) == photo(1)
    with pytest.raises(ia.Fatal) as raised:
        next(stream)
    assert raised.value.key == key


def test_a_stopped_stream_asks_for_nothing(state, stop):
    library = Listing([photo(1)])
    stop.set()
    assert list(backlog(library, state)) == []
    assert library.asked == []


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_stream_stops_within_a_page_and_between_pages(state, stop, taken):
    library = Listing([photo(1), photo(2), photo(3)], [photo(4)])
    stream = backlog(library, state)
    for number in range(1, taken + 1):
        assert next(stream) == photo(number)
    stop.set()
    assert list(stream) == []
    assert library.asked == [0]


def test_a_stream_stops_between_pages_that_have_nothing_to_do(state, stop):
    described = [photo(n, description="By a person.") for n in range(3)]

    class Slow(Listing):
        def page(self, cursor, since=None):
            if cursor == 2:
                stop.set()
            return super().page(cursor, since)

    library = Slow(*[described] * 9)
    assert list(backlog(library, state)) == []
    assert library.asked == [0, 1, 2]


@pytest.mark.parametrize("sick", [0, 1])
def test_a_stream_that_is_stopped_while_the_library_is_away_just_ends(stop, state, sick):
    stop._after = 2
    library = Listing([photo(1)], [photo(2)], trouble={sick: repeat(away())})
    assets = backlog(library, state)
    ran = []
    work(assets, lambda job: ran.append(job.asset) or ia.Outcome.DESCRIBED, state)
    assert ran == [photo(1)][:sick]
    assert stop.waits == [5, 5]


def test_a_worker_that_waits_does_not_hide_why_another_ended_the_run(config):
    stop, listing_waits = ia.Stop(), threading.Event()

    class Away(Listing):
        def page(self, cursor, since):
            listing_waits.set()
            raise away()

    state = state_of(config(), stop, ia.Patience(stop, pause=60, longest=math.inf), lasting=0)

    def lists():
        work(backlog(Away(), state), lambda _: ia.Outcome.DESCRIBED, state)

    def fails():
        assert listing_waits.wait(5)
        raise fatal()

    roles = iter([lists, fails])
    with pytest.raises(ia.Fatal):
        ia.run(lambda: next(roles)(), 2, stop)


# what is sifted out


@pytest.mark.parametrize(
    ("fields", "none", "all"),
    [
        ({}, "taken", "taken"),
        ({"description": " \n"}, "taken", "taken"),
        ({"description": "by a person"}, "skipped", "taken"),
        ({"ready": False}, "not_ready", "not_ready"),
        ({"ready": False, "description": "by a person"}, "skipped", "not_ready"),
    ],
)
def test_each_photo_is_taken_or_counted(stop, patience, config, fields, none, all):
    for policy, fate in (("none", none), ("all", all)):
        settings, asset = config("-O", policy), photo(1, **fields)
        state = state_of(settings, stop, patience, lasting=0)
        taken = list(backlog(Listing([asset]), state))
        assert taken == ([asset] if fate == "taken" else [])
        assert state.tally.counts == ({} if fate == "taken" else {fate: 1})
        reason = "has_description" if fate == "skipped" else ""
        assert state.tally.reasons == ({} if fate == "taken" else {(fate, reason): 1})


def test_shares_are_disjoint_and_together_all(stop, patience, config):
    photos = [photo(n, description="" if n % 3 else "By a person.") for n in range(200)]
    shares, skipped = [], 0
    for number in range(1, 6):
        state = state_of(config("--shard", f"{number}/5"), stop, patience, lasting=0)
        shares.append(list(backlog(Listing(photos), state)))
        skipped += state.tally.counts[ia.Outcome.SKIPPED]
    assert {p.id for s in shares for p in s} == {p.id for p in photos if not p.description}
    assert sum(map(len, shares)) == sum(not p.description for p in photos)
    assert all(len(share) > 15 for share in shares)
    assert skipped == sum(bool(p.description) for p in photos)


def test_a_photo_listed_twice_is_taken_once(state):
    pages = [photo(1), photo(2), photo(1), photo(1, description=" ")], [photo(2), photo(3)]
    assert list(backlog(Listing(*pages), state)) == [photo(1), photo(2), photo(3)]
    assert state.tally.counts == {}


def test_those_who_share_a_stream_get_each_photo_once():
    shared = ia.Shared(iter([photo(n) for n in range(4)]))
    one, other = iter(shared), iter(shared)
    assert [next(one), next(other), next(other), next(one)] == [photo(n) for n in range(4)]
    assert list(one) == list(other) == []


# the work


@pytest.mark.parametrize(
    ("became", "outcome"),
    [
        (ia.Outcome.DESCRIBED, "described"),
        (ia.Outcome.SKIPPED, "skipped"),
        (ia.Gone("photo_gone"), "skipped"),
        (ia.Permanent("preview_missing"), "failed"),
        (hiccup(), "failed"),
        (away(), "failed"),
        (ValueError("a bug"), "failed"),
        (KeyError("a bug"), "failed"),
        (RecursionError("a bug"), "failed"),
    ],
    ids=repr,
)
def test_what_became_of_a_photo_is_counted_and_the_others_go_on(caplog, state, became, outcome):
    def analyze(job):
        if job.asset.id == "2" and isinstance(became, Exception):
            raise became
        return became if job.asset.id == "2" else ia.Outcome.DESCRIBED

    work([photo(n) for n in (1, 2, 3)], analyze, state)
    assert state.tally.counts == Counter({"described": 2}) + Counter({outcome: 1})
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == (outcome == "failed")
    for record in said:
        bug = not isinstance(became, ia.AnalyzeError)
        assert record.getMessage().startswith("2.jpg (2): ")
        assert bool(record.exc_info) is bug
        assert (ia.t("bug") in record.getMessage()) is bug


@pytest.mark.parametrize("error", [fatal(), ia.Stopped("stopped")], ids=["fatal", "stopped"])
def test_the_end_for_all_leaves_the_photo_in_hand_uncounted(state, error):
    seen = []

    def analyze(job):
        seen.append(job.asset.id)
        if job.asset.id == "2":
            raise error
        return ia.Outcome.DESCRIBED

    with pytest.raises(ia.Fatal) if isinstance(error, ia.Fatal) else nullcontext():
        work([photo(n) for n in (1, 2, 3)], analyze, state)
    assert seen == ["1", "2"]
    assert state.tally.counts == {"described": 1}


def test_every_photo_taken_ends_in_exactly_one_outcome(state):
    fates = {
        0: ia.Outcome.DESCRIBED,
        1: ia.Outcome.SKIPPED,
        2: ia.Gone("photo_gone"),
        3: ia.Permanent("preview_missing"),
        4: hiccup(),
        5: ValueError("a bug"),
    }
    pages = [[photo(n) for n in range(start, start + 10)] for start in range(0, 60, 10)]
    extra = [photo(60, description="by a person"), photo(61, ready=False), photo(3), photo(17)]
    library = Listing(*pages, extra, trouble={2: [away()], 4: [hiccup()]})
    tally, taken = state.tally, []

    def analyze(job):
        assert sum(tally.counts.values()) == len(taken)  # all but the one in hand
        taken.append(job.asset.id)
        fate = fates[int(job.asset.id) % 6]
        if isinstance(fate, Exception):
            raise fate
        return fate

    stream = ia.stream(state, ia.Listings(ia.Listing(library, state, counts=True)), None, None)
    ia.work(ia.Shared(stream), analyze, nothing_to_confirm, state)
    assert taken == [str(n) for n in range(60)]
    assert tally.in_hand == 0
    assert tally.counts == {"described": 10, "skipped": 21, "failed": 30, "not_ready": 1}


def test_the_counts_are_shown_after_each_photo():
    shown = []
    tally = ia.Tally()
    tally.show = lambda counts: shown.append(dict(counts))
    tally.add(ia.Outcome.DESCRIBED)
    tally.add(ia.Outcome.FAILED)
    tally.add(ia.Outcome.DESCRIBED)
    assert shown == [{"described": 1}, {"described": 1, "failed": 1}, {"described": 2, "failed": 1}]


# patience


def calling(errors, answer="answer"):
    """A call that raises these, in turn, before it answers; what is no error is called."""
    rest = iter(errors)

    def call():
        error = next(rest, None)
        if isinstance(error, Exception):
            raise error
        return error() if error else answer

    return call


@pytest.mark.parametrize(
    ("errors", "longest", "waits"),
    [
        ([], 60, []),
        ([], 0, []),
        ([away()] * 3, 60, [5, 5, 5]),
        ([away()] * 12, 60, [5] * 12),
        ([away()] * 1000, math.inf, [5] * 1000),
        ([hiccup()], 0, [5]),
        ([hiccup()] * 2, 60, [5, 5]),
        ([hiccup(), away(), hiccup(), away()], 60, [5] * 4),
        ([away(7), away(0.5), away()], 60, [7, 0.5, 5]),
        ([hiccup(0.2), hiccup(1)], 60, [0.2, 1]),
        ([away(3600), hiccup(3600)], 600, [ia.LONGEST_PAUSE] * 2),
        ([ia.Unexpected("immich_wrong", url="", status=404)] * 2, 60, [5, 5]),
    ],
)
def test_trouble_that_passes_is_waited_for(stop, errors, longest, waits):
    patience = ia.Patience(stop, pause=5, longest=longest)
    assert patience(calling(errors)) == "answer"
    assert stop.waits == waits


@pytest.mark.parametrize(
    ("errors", "longest", "key", "waits"),
    [
        (repeat(away()), 60, "library_away", [5] * 12),
        (repeat(away()), 58, "library_away", [5] * 11 + [3]),
        (repeat(away()), 4, "library_away", [4]),
        (repeat(away()), 0, "library_away", []),
        (repeat(hiccup()), 60, "not_json", [5, 5]),
        (chain([away()] * 4, repeat(hiccup())), 60, "not_json", [5] * 6),
        ([fatal()], 60, "database_refused", []),
        ([hiccup(), fatal()], 60, "database_refused", [5]),
        ([ia.Permanent("preview_missing")], 60, "preview_missing", []),
        ([ia.Gone("photo_gone")], 60, "photo_gone", []),
        ([ia.Stopped("stopped")], 60, "stopped", []),
    ],
)
def test_trouble_that_stays_is_given_up_on(stop, errors, longest, key, waits):
    patience = ia.Patience(stop, pause=5, longest=longest)
    with pytest.raises(ia.AnalyzeError) as raised:
        patience(calling(errors))
    assert raised.value.key == key
    assert stop.waits == waits


def test_at_the_start_what_is_wrong_is_not_waited_for(stop):
    wrong = ia.Unexpected("immich_wrong", url="", status=404)
    patience = ia.Patience(stop, 5, 60, what_passes=(ia.HostDown,))
    with pytest.raises(ia.Unexpected):
        patience(calling([wrong]))
    assert stop.waits == []


def test_slow_failures_do_not_use_up_the_time_to_wait_for_a_library(stop):
    troubles = iter([hiccup(), hiccup(), away(), away()])

    def call():
        error = next(troubles, None)
        if error:
            stop.now += 0 if isinstance(error, ia.HostDown) else 50  # until it timed out
            raise error
        return "answer"

    assert ia.Patience(stop, pause=5, longest=60)(call) == "answer"


@pytest.mark.parametrize("asked", [61, 500, 3600])
def test_nobody_is_waited_for_longer_than_the_setting_says(stop, asked):
    patience = ia.Patience(stop, pause=5, longest=60)
    with pytest.raises(ia.Fatal):
        patience(calling(repeat(away(asked))))
    assert sum(stop.waits) <= 60


def test_a_bug_is_not_tried_again(stop):
    patience = ia.Patience(stop, pause=5, longest=60)
    with pytest.raises(ZeroDivisionError):
        patience(calling([ZeroDivisionError()]))
    assert stop.waits == []


@pytest.mark.parametrize("error", [away(), hiccup()], ids=["away", "hiccup"])
def test_waiting_ends_when_stopped(stop, error):
    stop._after = 2
    patience = ia.Patience(stop, pause=5, longest=60)
    with pytest.raises(ia.Stopped) as raised:
        patience(calling(repeat(error)))
    assert raised.value.__cause__ is error
    assert stop.waits == [5, 5]


WAITING = "PostgreSQL does not answer: away. Waiting."
BACK = "It answers again, after 0:04:10."


def test_an_outage_is_two_lines(stop, caplog):
    caplog.set_level(logging.INFO)
    patience = ia.Patience(stop, pause=5, longest=math.inf)
    patience(calling([]))
    patience(calling([hiccup()]))
    assert caplog.messages == []
    patience(calling([away()] * 50))
    assert caplog.messages == [WAITING, BACK]
    assert patience.away() == 0


def test_an_outage_that_several_meet_is_two_lines(stop, caplog):
    caplog.set_level(logging.INFO)
    patience = ia.Patience(stop, pause=5, longest=math.inf)

    def another():
        assert caplog.messages == [WAITING]
        patience(calling([away()] * 3))
        assert patience.away() == 20
        return "answer"

    patience(calling([away(), another]))
    assert caplog.messages == [WAITING, "It answers again, after 0:00:20."]


@pytest.mark.parametrize("longest", [0, 60])
def test_nobody_says_that_an_outage_is_over_which_is_not(stop, caplog, longest):
    caplog.set_level(logging.INFO)
    patience = ia.Patience(stop, pause=5, longest=longest)
    with pytest.raises(ia.Fatal):
        patience(calling(repeat(away())))
    assert caplog.messages == [WAITING][: longest and 1]
    stop.set()
    with pytest.raises(ia.AnalyzeError):
        patience(calling(repeat(away())))
    assert BACK[:20] not in "".join(caplog.messages)


# one photo


class Desk:
    """A library and a model in one, that note what they are asked.

    `found` is what a photo is found to say once a write met another text than the listed one.
    """

    must_confirm = False

    def __init__(self, previews=(WHOLE,), writes=(True,), found=("by a person",)):
        self.said, self.noted = [], []
        self._previews, self._writes, self._found = iter(previews), iter(writes), iter(found)

    def _next(self, what, answers):
        self.said.append(what)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def recall(self, asset):
        return asset

    claim = question = recall

    def release(self, asset):
        pass

    def find(self, asset):
        return replace(asset, description=self._next("find", self._found), ready=True)

    def preview(self, asset):
        return self._next("preview", self._previews)

    def describe(self, picture, failed_at, *, last):
        assert picture.mime == "image/jpeg"
        self.said.append("describe")
        return "A photo."

    def write(self, asset, text, note):
        assert note == ia.Note(MODEL, PROMPT, text=ia.text_id(text))
        return self._next(f"write {text}", self._writes)

    def remember(self, notes):
        self.noted += notes


@pytest.mark.parametrize("must_confirm", [False, True])
@pytest.mark.parametrize(
    ("previews", "writes", "found", "said", "outcome"),
    [
        ([WHOLE], [True], [], "PDW", "described"),
        ([WHOLE], [False], ["by a person"], "PDWF", "skipped"),
        ([WHOLE], [False, True], [" "], "PDWFW", "described"),
        ([WHOLE], [False, False], ["", "by a person"], "PDWFWF", "skipped"),
        ([WHOLE], [False] * 3, ["", " ", ""], "PDWFWFWF", "failed"),
        ([CUT, b"", WHOLE], [True], [], "PPPDW", "described"),
        ([CUT, CUT + b"more", WHOLE], [True], [], "PPPDW", "described"),
        ([away(), hiccup(), WHOLE], [True], [], "PPPDW", "described"),
        ([WHOLE], [away(), away(), hiccup(), True], [], "PDWWWW", "described"),
        ([WHOLE], [hiccup(), False], ["by a person"], "PDWWF", "skipped"),
        ([WHOLE], [*[hiccup()] * 11, True], [], "PD" + "W" * 12, "described"),
    ],
)
def test_the_model_is_asked_once_whatever_the_library_does(
    state, previews, writes, found, said, outcome, must_confirm
):
    desk, job = Desk(previews, writes, found), ia.Job(photo(1))
    desk.must_confirm = must_confirm
    became, error = ia.attempt(lambda: ia.analyze(job, desk, desk, state))
    words = {"P": "preview", "D": "describe", "W": "write A photo.", "F": "find"}
    assert desk.said == [words[letter] for letter in said]
    assert desk.noted == []
    if outcome == "described":
        assert became == (None if must_confirm else "described")
        assert (job.stored, error) == ("A photo.", None)
    else:
        assert became == outcome
        assert error.key == {"skipped": "has_description", "failed": "changed"}[outcome]
        assert job.stored == ""


def test_a_text_that_cannot_be_written_fails_in_the_end(state, stop):
    desk = Desk(writes=repeat(hiccup()))
    with pytest.raises(ia.Retryable):
        ia.analyze(ia.Job(photo(1)), desk, desk, state)
    assert desk.said[1:] == ["describe"] + ["write A photo."] * ia.VALUABLE_TRIES
    assert stop.waits == [5] * (ia.VALUABLE_TRIES - 1)
    assert desk.noted == []


@pytest.mark.parametrize(
    ("previews", "kind", "tries", "noted"),
    [
        ([CUT] * 2, ia.Retryable, 2, ""),
        ([b"", CUT, b"", b""], ia.Retryable, 4, ""),
        ([b"<html>no picture</html>"], ia.Permanent, 1, "preview_unknown"),
        ([ia.Permanent("preview_missing")], ia.Permanent, 1, ""),
        ([ia.Gone("photo_gone")], ia.Gone, 1, ""),
        ([fatal()], ia.Fatal, 1, ""),
    ],
)
def test_without_a_preview_the_model_is_not_asked(state, previews, kind, tries, noted):
    desk = Desk(previews)
    with pytest.raises(kind) as raised:
        ia.analyze(ia.Job(photo(1)), desk, desk, state)
    assert desk.said == ["preview"] * tries
    failed = {"failed": noted, "why": str(raised.value), "tries": ia.MOST_TRIES}
    assert desk.noted == ([(photo(1), ia.Note(MODEL, PROMPT, **failed))] if noted else [])


def test_a_preview_that_is_being_written_is_read_again_soon(state, stop):
    growing = [WHOLE[:n] for n in (0, 100, 200)]
    ia.analyze(ia.Job(photo(1)), desk := Desk([*growing, WHOLE]), desk, state)
    assert stop.waits == [0.5] * 3


def test_a_preview_that_never_gets_its_end_is_given_up(state, stop):
    desk = Desk(WHOLE[: n % 200] for n in range(1000))
    with pytest.raises(ia.Retryable):
        ia.analyze(ia.Job(photo(1)), desk, desk, state)
    assert sum(stop.waits) == state.config.file_write_timeout
