"""The parts of the pipeline by themselves: plain calls, and time that is invented.

What becomes of whole runs is tested in other files.
"""

import logging
import math
import threading
import uuid
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
FOR_EVER = threading.TIMEOUT_MAX
MODEL, PROMPT = DEFAULTS.model_name, DEFAULTS.prompt_id


def photo(number, description="", **fields):
    fields = {"source": "", **fields}
    return ia.Photo(id=str(number), name=f"{number}.jpg", description=description, **fields)


def away(pause=0):
    return ia.Unavailable("database_down", why="away", pause=pause)


def hiccup(pause=0):
    return ia.Retryable("not_json", url="here", pause=pause)


def fatal():
    return ia.Fatal("database_refused", why="no")


def run_of(stop, *argv, library=None):
    """What the threads of a run share."""
    patience = ia.Patience(stop, pause=5, longest=60)
    return ia.Run(ia.parse(argv, {}), stop, None, patience, ia.Tally(), lambda: library)


@pytest.fixture
def run(stop):
    return run_of(stop)


# --- Which photo is next ---------------------------------------------------------------------


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
@pytest.mark.parametrize("counts", [True, False])
def test_each_listed_photo_is_taken_or_counted(stop, fields, none, all, counts):
    for policy, fate in (("none", none), ("all", all)):
        run = run_of(stop, "-O", policy)
        assert len([*ia.wanted([photo(1, **fields)], run, counts=counts)]) == (fate == "taken")
        counted = counts and fate != "taken"
        assert run.tally.counts == ({fate: 1} if counted else {})
        reason = "has_description" if fate == "skipped" else ""
        assert run.tally.reasons == ({(fate, reason): 1} if counted else {})
        assert run.tally.listed == counts


def test_a_photo_listed_twice_is_taken_once(run):
    listed = [photo(n) for n in (1, 2, 1, 2, 3)]
    assert [*ia.wanted(listed, run, counts=True)] == [photo(n) for n in (1, 2, 3)]
    assert run.tally.counts == {}


def test_shares_are_disjoint_and_together_all(stop):
    photos = [photo(n, "" if n % 3 else "By a person.") for n in range(200)]
    shares, skipped = [], 0
    for number in range(1, 6):
        run = run_of(stop, "--shard", f"{number}/5")
        shares.append([p.id for p in ia.wanted(photos, run, counts=True)])
        assert run.tally.listed == len(shares[-1]) + run.tally.counts[ia.Outcome.SKIPPED]
        skipped += run.tally.counts[ia.Outcome.SKIPPED]
    assert sorted(id for share in shares for id in share) == sorted(
        p.id for p in photos if not p.description
    )
    assert all(len(share) > 15 for share in shares)
    assert skipped == sum(bool(p.description) for p in photos)


def test_those_who_share_a_stream_get_each_photo_once(run):
    photos = iter([photo(n) for n in range(4)])
    one, other = (ia.in_turn(photos, Desk(), run) for _ in range(2))
    assert [next(one), next(other), next(other), next(one)] == [photo(n) for n in range(4)]
    assert list(one) == list(other) == []


def test_a_nap_ends_by_news_by_the_end_or_by_itself():
    stop, began = ia.Stop(), ia.time.monotonic()
    stop.nap(0.01)
    assert ia.time.monotonic() >= began + 0.01
    stop.news.set()
    stop.nap(FOR_EVER)
    assert not stop.is_set()
    stop.set()
    stop.nap(FOR_EVER)
    assert stop.is_set()


# --- What was taken --------------------------------------------------------------------------


def fails(taken: ia.Taken, number: int, *, soon: bool) -> bool:
    """Have a photo fail that somebody has; whether that is said."""
    return taken.leave(photo(number), ia.Outcome.FAILED, 5 if soon else math.inf)


def test_what_failed_in_passing_may_be_taken_after_pauses_that_double(stop):
    taken = ia.Taken()
    assert taken.take(photo(1))
    for first, pause in zip([True, False, False, False], [5, 10, 20, 40], strict=True):
        assert fails(taken, 1, soon=True) == first
        stop.now += pause - 0.1
        assert not taken.take(photo(1))
        stop.now += 0.2
        assert taken.take(photo(1))
        assert not taken.take(photo(1))  # as somebody has it


def test_what_failed_otherwise_may_be_taken_once_failures_are_forgotten(stop):
    taken = ia.Taken()
    assert [taken.take(photo(n)) for n in (1, 2, 3)] == [True] * 3
    assert fails(taken, 1, soon=False)
    assert fails(taken, 2, soon=True)
    stop.now += 1e9
    assert not taken.take(photo(1))
    for _ in range(2):
        taken.forget(described=False)
    assert [taken.take(photo(n)) for n in (1, 2, 3)] == [True, True, False]
    assert fails(taken, 1, soon=True)  # counted and said anew
    stop.now += 5.1
    assert taken.take(photo(1))


def test_what_was_described_may_be_taken_again_but_what_somebody_has():
    taken = ia.Taken()
    assert [taken.take(photo(n)) for n in (1, 2)] == [True] * 2
    taken.leave(photo(1), ia.Outcome.DESCRIBED)
    taken.forget(described=False)
    assert [taken.take(photo(n)) for n in (1, 2)] == [False] * 2
    taken.forget(described=True)
    assert [taken.take(photo(n)) for n in (1, 2)] == [True, False]


def test_a_photo_that_fails_after_it_was_left_alone_is_told_as_failed():
    taken = ia.Taken()
    taken.take(photo(1))
    outcomes = [ia.Outcome.SKIPPED, ia.Outcome.SKIPPED, ia.Outcome.FAILED, ia.Outcome.FAILED]
    told = [taken.leave(photo(1), outcome, 5) for outcome in outcomes]
    assert told == [True, False, True, False]


def test_what_was_taken_is_kept_in_eight_bytes_each():
    mine, known = ia.Taken(), [photo(uuid.UUID(int=n * 7**40)) for n in range(2000)]
    assert all(mine.take(each) for each in known)
    assert not any(mine.take(each) for each in known)
    assert mine._hashes.buffer_info()[1] * mine._hashes.itemsize == 8 * len(known)


# --- What became of the photos ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("tally", "Described: 2. Skipped: 1. No preview: 1. Failed: 1."),
        ("tally_undo", "Taken back: 1. Skipped: 1. Failed: 1."),
        ("tally_undo_dry_run", "Would be taken back: 1. Skipped: 1. Failed: 1."),
    ],
)
def test_a_tally_tells_what_a_run_is_for(form, said):
    tally = ia.Tally()
    tally.form = form
    for outcome in (*ia.Outcome, ia.Outcome.DESCRIBED):
        tally.add(outcome)
    assert str(tally) == said


def test_failures_are_noted_once_something_was_described(run):
    desk, note = Desk(), ia.Note(MODEL, PROMPT, failed="not_json")
    for number in (1, 2):
        run.tally.unnoted.append((photo(number), note))
        ia.note_failures(desk, run)
        assert desk.noted == []
    run.tally.add(ia.Outcome.DESCRIBED)
    ia.note_failures(desk, run)
    assert desk.noted == [(photo(1), note), (photo(2), note)]
    ia.note_failures(desk, run)
    assert len(desk.noted) == 2


@pytest.mark.parametrize(
    ("became", "outcome", "reason"),
    [
        (ia.Outcome.DESCRIBED, "described", ""),
        (ia.Skip("has_description"), "skipped", "has_description"),
        (ia.Skip("photo_gone"), "skipped", "photo_gone"),
        (ia.Skip("not_ready"), "not_ready", ""),
        (ia.Permanent("preview_missing"), "failed", "preview_missing"),
        (hiccup(), "failed", "not_json"),
        (ValueError("a bug"), "failed", "bug"),
        (RecursionError("a bug"), "failed", "bug"),
    ],
    ids=repr,
)
def test_what_became_of_a_photo_is_counted_and_the_others_go_on(
    caplog, monkeypatch, run, became, outcome, reason
):
    def story(photo, library, ai, run):
        if photo.id == "2" and isinstance(became, Exception):
            raise became
        return ia.Ending(photo, ia.Outcome.DESCRIBED)

    monkeypatch.setattr(ia, "story", story)
    ia.work([photo(n) for n in (1, 2, 3)], Desk(), None, run)
    assert run.tally.counts == Counter({"described": 2}) + Counter({outcome: 1})
    assert run.tally.reasons == Counter({("described", ""): 2}) + Counter({(outcome, reason): 1})
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == (outcome == "failed")
    for record in said:
        assert record.getMessage().startswith("2.jpg (2): ")
        assert bool(record.exc_info) is (reason == "bug")
        assert (ia.t("bug") in record.getMessage()) is (reason == "bug")


@pytest.mark.parametrize("error", [fatal(), ia.Stopped("stopped")], ids=["fatal", "stopped"])
def test_the_end_for_all_leaves_the_photo_in_hand_uncounted(monkeypatch, run, error):
    seen = []

    def story(photo, library, ai, run):
        seen.append(photo.id)
        if photo.id == "2":
            raise error
        return ia.Ending(photo, ia.Outcome.DESCRIBED)

    monkeypatch.setattr(ia, "story", story)
    with pytest.raises(ia.Fatal) if isinstance(error, ia.Fatal) else nullcontext():
        ia.work([photo(n) for n in (1, 2, 3)], Desk(), None, run)
    assert seen == ["1", "2"]
    assert run.tally.counts == {"described": 1}


def test_a_worker_that_waits_does_not_hide_why_another_ended_the_run():
    stop, waits = ia.Stop(), threading.Event()
    library = Desk()
    library.must_confirm = True  # so that the checker waits, too
    run = run_of(stop, library=library)
    run = replace(run, patience=ia.Patience(stop, pause=60, longest=math.inf))

    class Away(Desk):
        def claimed(self, photo):
            waits.set()
            raise away()

    def fails():
        assert waits.wait(servers.PATIENCE)
        raise fatal()

    def waiting():
        ia.work([photo(1)], Away(), None, run)

    with pytest.raises(ia.Fatal) as raised:
        ia.run_all([waiting, fails], run)
    assert raised.value.key == "database_refused"
    assert run.tally.counts == {}


# --- Patience ------------------------------------------------------------------------------------


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
        ([ia.Skip("photo_gone")], 60, "photo_gone", []),
        ([ia.Stopped("stopped")], 60, "stopped", []),
    ],
)
def test_trouble_that_stays_is_given_up_on(stop, errors, longest, key, waits):
    patience = ia.Patience(stop, pause=5, longest=longest)
    with pytest.raises(ia.AnalyzeError) as raised:
        patience(calling(errors))
    assert raised.value.key == key
    assert stop.waits == waits


@pytest.mark.parametrize("passes", [True, False])
def test_an_outage_may_show_in_other_errors_too(stop, passes):
    """A service waits at its start for what looks like a wrong address; a batch does not."""
    passing = (ia.Unavailable, ia.Unexpected) if passes else (ia.Unavailable,)
    patience = ia.Patience(stop, 5, 60, passing=passing)
    wrong = ia.Unexpected("immich_wrong", url="", status=404)
    with nullcontext() if passes else pytest.raises(ia.Unexpected):
        patience(calling([wrong] * 4))
    assert stop.waits == [5] * 4 * passes


def test_slow_failures_do_not_use_up_the_time_to_wait_for_a_library(stop):
    troubles = iter([hiccup(), hiccup(), away(), away()])

    def call():
        error = next(troubles, None)
        if error:
            stop.now += 0 if isinstance(error, ia.Unavailable) else 50  # until it timed out
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
BACK = "It is answering again, after 0:04:10."


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
        patience(calling([]))  # who did not wait cannot tell
        assert caplog.messages == [WAITING]
        patience(calling([away()] * 3))
        assert patience.away() == 0
        return "answer"

    patience(calling([away(), another]))
    assert caplog.messages == [WAITING, "It is answering again, after 0:00:20."]


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


# --- One photo -------------------------------------------------------------------------------


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

    def claimed(self, photo):
        return nullcontext(photo)

    def close(self):
        pass

    def look(self, photo):
        return replace(photo, description=self._next("look", self._found))

    def with_facts(self, photo):
        return photo

    def preview(self, photo):
        return self._next("preview", self._previews)

    def describe(self, question, check):
        assert len(question.pictures) == 1
        self.said.append("describe")
        return ia.Said("A photo.", 2.0, 5)

    def write(self, photo, text, note):
        assert note == ia.Note(MODEL, PROMPT, text=ia.text_id(text))
        return self._next(f"write {text}", self._writes)

    def remember(self, photo, note):
        self.noted.append((photo, note))


def tell(run, desk):
    """Have one photo's story told: what became of it, and why."""
    ending = ia.attempt(photo(1), ia.story, photo(1), desk, desk, run)
    return ending.outcome, ending.error


@pytest.mark.parametrize("must_confirm", [False, True])
@pytest.mark.parametrize(
    ("writes", "found", "said", "outcome"),
    [
        ([True], [], "W", "described"),
        ([False], ["by a person"], "WL", "skipped"),
        ([False, True], [" "], "WLW", "described"),
        ([False, False], ["", "by a person"], "WLWL", "skipped"),
        ([False] * 3, ["", " ", ""], "WLWLWL", "failed"),
        ([away(), away(), hiccup(), True], [], "WWWW", "described"),
        ([hiccup(), False], ["by a person"], "WWL", "skipped"),
        ([*[hiccup()] * 11, True], [], "W" * 12, "described"),
    ],
)
def test_the_model_is_asked_once_whatever_the_library_does(
    run, writes, found, said, outcome, must_confirm
):
    desk = Desk(writes=writes, found=found)
    desk.must_confirm = must_confirm
    became, error = tell(run, desk)
    words = {"W": "write A photo.", "L": "look"}
    assert desk.said == ["preview", "describe", *(words[letter] for letter in said)]
    assert desk.noted == []
    assert became == outcome
    key = {"described": "", "skipped": "has_description", "failed": "changed"}[outcome]
    assert (error.key if error else "") == key


def test_a_text_that_cannot_be_written_fails_in_the_end(run, stop):
    desk = Desk(writes=repeat(hiccup()))
    became, error = tell(run, desk)
    assert (became, error.key) == ("failed", "not_json")
    assert desk.said == ["preview", "describe", *["write A photo."] * 12]
    assert stop.waits == [5] * 11
    assert [*run.tally.unnoted] == []  # the next run tries it again, however often


@pytest.mark.parametrize(
    ("previews", "key", "noted"),
    [
        ([b"<html>no picture</html>"], "preview_unknown", True),
        ([ia.Permanent("preview_missing")], "preview_missing", False),
        ([ia.Skip("photo_gone")], "photo_gone", False),
        ([hiccup()] * 3, "not_json", False),
    ],
)
def test_without_a_preview_the_model_is_not_asked(run, previews, key, noted):
    desk = Desk(previews)
    _, error = tell(run, desk)
    assert error.key == key
    assert desk.said == ["preview"] * len(previews)
    note = ia.Note(MODEL, PROMPT, failed=key, why=str(error), tries=1)
    assert [*run.tally.unnoted] == [(photo(1), note)] * noted


# A preview that is being written


@pytest.mark.parametrize(
    ("previews", "used"),
    [
        ([WHOLE], WHOLE),
        ([None, None, WHOLE], WHOLE),
        ([b"", WHOLE[:100], WHOLE[:200], WHOLE], WHOLE),
        ([CUT, CUT], CUT),  # as broken as it will stay
        ([CUT, None, CUT, CUT], CUT),
        ([away(), CUT, hiccup(), WHOLE], WHOLE),
    ],
)
def test_a_preview_is_read_until_it_has_its_end_or_stays_the_same(run, stop, previews, used):
    desk = Desk(previews)
    assert ia.settled(photo(1), desk, run) == used
    assert desk.said == ["preview"] * len(previews)
    troubles = sum(isinstance(preview, Exception) for preview in previews)
    waits = [0.5] * (len(previews) - 1 - troubles) + [5] * troubles
    assert sorted(stop.waits) == waits


@pytest.mark.parametrize(
    ("previews", "key"),
    [(repeat(None), "preview_missing"), ((WHOLE[: n % 200] for n in range(1000)), "preview_cut")],
)
def test_a_preview_that_never_comes_is_waited_for_no_longer_than_asked(stop, previews, key):
    run = run_of(stop, "--file-write-timeout", "20", "--file-check-interval", "250")
    with pytest.raises(ia.Retryable) as raised:
        ia.settled(photo(1), Desk(previews), run)
    assert raised.value.key == key
    assert stop.waits == [0.25] * 80


def test_waiting_for_a_preview_ends_when_stopped(run, stop):
    stop._after = 3
    with pytest.raises(ia.Stopped):
        ia.settled(photo(1), Desk(repeat(None)), run)


# --- What Immich took is read back -----------------------------------------------------------


def written(before="", text="A boat.", said="A boat.", note=None, at=0.0, number=1, **fields):
    """How a photo ended that a text was written to, or taken back from."""
    outcome, said = ("described", ia.Said(said, 2.0, 5)) if said else ("undone", None)
    described = photo(number, before, **fields)
    return ia.Ending(described, ia.Outcome(outcome), text=text, note=note, said=said, at=at)


def wrote(number, at, library=""):
    return written(number=number, at=at, library=library)


def test_the_first_three_are_read_back_alone_and_the_others_together(stop):
    checks = ia.Checks()
    for number in range(8):
        checks.written.put(wrote(number, stop.now + number / 10))
    for number in range(3):
        [alone] = checks.next(stop)
        assert alone.photo.id == str(number)
        assert stop.now == pytest.approx(alone.at + 2)
        assert checks.count(alone.photo, lost=False) is False
    assert [each.photo.id for each in checks.next(stop)] == ["3", "4", "5", "6", "7"]
    late, later = wrote(8, stop.now), wrote(9, stop.now)
    checks.written.put(late)
    checks.written.put(later)
    checks.written.put(None)
    assert checks.next(stop) == [late, later]
    assert stop.now == late.at + 2
    now = stop.now
    assert checks.next(stop) == []
    assert stop.now == now


def test_those_of_a_new_library_do_not_wait_behind_others(stop):
    checks = ia.Checks()
    for number in range(3):
        checks.count(photo(number), lost=False)
    checks.written.put(wrote(1, stop.now - 1))
    checks.written.put(written := wrote(2, stop.now, library="another"))
    assert checks.next(stop) == [written]
    assert stop.now == written.at + 2
    assert [each.photo.id for each in checks.next(stop)] == ["1"]


def test_nothing_is_read_back_once_the_run_is_to_stop(stop):
    checks = ia.Checks()
    checks.written.put(wrote(1, stop.now))
    stop.set()
    assert checks.next(stop) == []


def test_a_library_is_given_up_after_three_losses_in_a_row():
    checks, one = ia.Checks(), photo(1, source="0")
    lost = [True, True, False, True, True]
    assert [checks.count(one, lost=each) for each in lost] == [False] * 5
    checks.check_library(one)
    assert checks.count(one, lost=True) is True
    with pytest.raises(ia.Skip) as raised:
        checks.check_library(one)
    assert raised.value.key == "library_loses"
    checks.check_library(replace(one, library="another"))
    checks.check_library(replace(one, source="1"))  # with another key
    assert checks.count(one, lost=True) is False  # it is said once


OLD = "[AI]\nA red boat.\n[/AI]"
NEW = "[AI]\nA boat.\n[/AI]"


@pytest.mark.parametrize(
    ("before", "stored", "now", "key"),
    [
        ("", "A boat.", "A boat.", ""),
        ("", "A boat.\n", " A boat.", ""),  # Immich trims
        ("", "A boat.", "A boat. By a person.", ""),
        (OLD, NEW, NEW + "\nBy a person.", ""),
        ("A boat. Older.", "A boat.", "A boat.", ""),
        ("", "A boat.", None, "photo_gone"),
        ("", "A boat.", "", "not_kept"),
        ("", "A boat.", " \n", "not_kept"),
        (OLD, NEW, OLD, "not_kept"),
        (OLD + "\n", NEW + "\n", OLD, "not_kept"),
        ("A boat. Older.", "A boat.", "A boat. Older.", "not_kept"),
        ("", "A boat.", "By a person.", "has_description"),
        (OLD, NEW, "By a person.", "has_description"),
        ("A boat. Older.", "A boat.", "A boat. Older. By a person.", "has_description"),
    ],
)
def test_what_became_of_a_text_is_told_by_what_is_read_back(before, stored, now, key):
    trouble = ia.judged(written(before, stored), now).error
    assert (trouble.key if trouble else "") == key
    assert isinstance(trouble, ia.Permanent) == (key == "not_kept")


@pytest.mark.parametrize(
    ("before", "left", "now", "key"),
    [
        (OLD, "", "", ""),
        ("Our car.\n\n" + OLD, "Our car.", "Our car.", ""),
        ("Our car.\n\n\n" + OLD, "Our car.\n", "Our car.", ""),  # Immich trims
        (OLD, "", OLD, "not_kept"),
        ("Our car.\n\n" + OLD, "Our car.", "", "not_kept"),
        (OLD, "", "By a person.", "has_description"),
        (OLD, "", None, "photo_gone"),
    ],
)
def test_the_same_of_a_text_that_was_taken_back(before, left, now, key):
    trouble = ia.judged(written(before, left, said=""), now).error
    assert (trouble.key if trouble else "") == key


NOTE = ia.Note(MODEL, PROMPT, text=ia.text_id("A boat.\n"), was=ia.text_id(OLD))
EARLIER = ia.Note("older", PROMPT, text=ia.text_id(OLD))


def test_a_note_names_the_text_as_immich_stored_it():
    each = written(OLD, "A boat.\n", note=NOTE)
    assert ia.judged(each, "A boat.").note == ia.Note(MODEL, PROMPT, text=ia.text_id("A boat."))


def test_the_note_of_a_text_that_a_person_went_on_with_does_not_call_theirs_ours():
    each = written(OLD, "A boat.\n", note=NOTE)
    kept = ia.judged(each, "A boat.\nBy a person.")
    assert kept.note == ia.Note(MODEL, PROMPT, text=ia.text_id("A boat.\n"))


@pytest.mark.parametrize("old", [None, EARLIER])
def test_a_note_of_what_was_not_kept_is_for_good_and_knows_what_may_be_back(old):
    each = written(OLD if old else "", "A boat.\n", note=NOTE)
    each = replace(each, photo=replace(each.photo, note=old))
    ending = ia.judged(each, OLD if old else "")
    assert ending.note == ia.Note(
        MODEL,
        PROMPT,
        text=old.text if old else "",
        failed="not_kept",
        why=str(ending.error),
        tries=ia.MOST_TRIES,
    )
    assert ia.note_in(ending.note.value(ia.datetime.now(ia.UTC))) == ending.note
    noted = replace(each.photo, note=ending.note)
    settings = replace(DEFAULTS, model_name=MODEL, policy=ia.Policy.ALL)
    assert ia.left_alone(noted, replace(settings, access=ia.API)) == "failed_before"


@pytest.mark.parametrize("text", ["Theirs.", None])
def test_a_note_is_left_as_it_is_where_a_person_was_quick(text):
    assert ia.judged(written(OLD, "A boat.\n", note=NOTE), text).note == NOTE


@pytest.mark.parametrize("text", ["", OLD])
def test_what_was_taken_back_gets_no_note(text):
    assert ia.judged(written(OLD, "", said=""), text).note is None
