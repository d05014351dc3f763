"""Whose text it is, in whole runs: policies, blocks, notes, failures, and taking back.

Immich's own metadata of a photo says what is ours; everything else is a person's.
"""

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import servers
from hours import Hours, Run
from servers import FakeImmich, FakeKey, FakeOllama, Reply
from worlds import (
    CHATS,
    PROMPT,
    ApiWorld,
    SqlWorld,
    World,
    answer_by_picture,
    asking,
    others_long,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow

KEY = "immich-analyze"
PROMPT_ID = hashlib.sha256(PROMPT.encode()).hexdigest()[:12]
NOWHERE = ["--hosts", "http://127.0.0.1:9"]
SAID = "A blue ship on a lake."
BLOCK = f"[AI]\n{SAID}\n[/AI]"
OLD = "[AI]\nA red boat.\n[/AI]"


@pytest.fixture(autouse=True)
def no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """No person is so quick that Immich loses one of two texts."""
    monkeypatch.setattr(servers, "RACE", timedelta(0))


@pytest.fixture
def ollama(ollama: FakeOllama) -> FakeOllama:
    """Says the same of all photos, which look the same, and something else of other pictures."""
    ollama.answer = said
    return ollama


def said(image: bytes, prompt: str) -> str:
    return SAID if image == servers.picture() else servers.told(image)


@pytest.fixture(params=["api", "database"])
def old_library(request: pytest.FixtureRequest) -> Iterator[World]:
    """A library of the last release that keeps no notes."""
    if request.param == "api":
        with FakeImmich("2.4.1") as server:
            yield ApiWorld(server)
        server.check()
    else:
        photos = request.getfixturevalue("photos")("2.4.1")
        yield SqlWorld(photos, request.getfixturevalue("postgres"))


@pytest.fixture
def run(hours: Hours) -> Callable[..., Run]:
    """Gives a batch that went to its end, in invented time."""

    def running(library: World, model: FakeOllama, *argv: str) -> Run:
        with hours.batch(library, model, *argv) as run:
            pass
        assert (run.fatal, run.complete) == ("", True)
        return run

    return running


def text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def noted(text: str, model: str = "tiny-vlm", prompt: str = PROMPT_ID) -> dict[str, Any]:
    """The note that goes with a text of ours."""
    own = {"v": 1, "text": text_id(text), "model": model, "prompt": prompt}
    return own | {"at": "2026-01-02T03:04:05.678Z"}


def failed(tries: int, key: str = "answer_empty", prompt: str = PROMPT_ID) -> dict[str, Any]:
    own = {"v": 1, "failed": key, "why": "no", "tries": tries, "model": "tiny-vlm"}
    return own | {"prompt": prompt, "at": "2026-01-02T03:04:05.678Z"}


def note_of(library: World, id: str) -> Any:
    """The note as it is stored, None without one."""
    if isinstance(library, ApiWorld):
        return library.server.assets[id].notes.get(KEY)
    return library.photos.notes(id).get(KEY)


def keep_note(library: World, id: str, value: Any) -> None:
    if isinstance(library, ApiWorld):
        library.server.assets[id].notes = {KEY: value}
    else:
        sql = 'INSERT INTO asset_metadata ("assetId", key, value) VALUES (%s, %s, %s::jsonb)'
        library.photos.run(sql, id, KEY, json.dumps(value))


def add(library: World, text: str = "", note: Any = None, name: str = "photo.jpg") -> str:
    id = library.add(name, picture=servers.picture(), description=text)
    if note is not None:
        keep_note(library, id, note)
    return id


def stored(library: World) -> dict[str, tuple[str, Any]]:
    """All texts and notes."""
    return {id: (text, note_of(library, id)) for id, text in library.texts().items()}


def without_time(note: dict[str, Any]) -> dict[str, Any]:
    """A note but for when it was made, which has one form."""
    note = dict(note)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", note.pop("at"))
    return note


def kept(library: World, text: str) -> str:
    """What becomes of a text that is stored: Immich trims what goes through a file."""
    return text.strip() if isinstance(library, ApiWorld) else text


def writes(library: World) -> int:
    """How often a description was written."""
    if isinstance(library, SqlWorld):
        return len(library.writes())
    puts = library.server.find("PUT", "/api/assets/[0-9a-f-]{36}$")
    return sum("description" in put.json for put in puts)


def left_out(done: Run) -> int:
    """How many photos were left out because they failed before."""
    return done.reasons.get("failed_before", 0)


# --- What is described, and what is left alone -----------------------------------------------

OTHER = {"prompt": "0123456789ab"}
DECIDED: list[tuple[str, Any, str, str]] = [
    # description, note, flags, why it is left alone
    ("", None, "", ""),
    (" \n\t\u00a0", None, "", ""),
    ("By Anna.", None, "", "has_description"),
    ("Ours.", noted("Ours."), "", "has_description"),
    (OLD, None, "", "has_description"),
    ("", None, "-p", ""),
    ("By Anna.", None, "-p", "has_description"),
    ("", None, "-O missing-ai", ""),
    ("By Anna.", None, "-O missing-ai", ""),
    ("Ours.", noted("Ours."), "-O missing-ai", "has_description"),
    ("Ours.", noted("Ours.", "older-vlm"), "-O missing-ai", "has_description"),
    ("Ours, by Anna.", noted("Ours."), "-O missing-ai", ""),
    (f"By Anna.\n\n{OLD}", None, "-O missing-ai", "has_description"),
    ("[AI]\nnever closed", None, "-O missing-ai", ""),
    ("", None, "-O outdated", ""),
    ("By Anna.", None, "-O outdated", "has_description"),
    ("By Anna.", noted("Ours.", "older-vlm"), "-O outdated", "has_description"),
    ("Ours.", noted("Ours."), "-O outdated", "has_description"),
    ("Ours.", noted("Ours.", "older-vlm"), "-O outdated", ""),
    ("Ours.", noted("Ours.", **OTHER), "-O outdated", ""),
    ("Ours.", noted("Ours."), "-O outdated --prompt New?", ""),
    ("Ours.", noted("Ours."), "-O outdated --model-name newer-vlm", ""),
    ("Ours. ", noted("Ours.", "older-vlm"), "-O outdated", "has_description"),
    (f"By Anna.\n\n{OLD}", noted("Whatever."), "-O outdated", "has_description"),
    (f"By Anna.\n\n{OLD}", noted("Whatever.", "older-vlm"), "-O outdated", ""),
    ("By Anna.", None, "-o", ""),
    ("Ours.", noted("Ours."), "-O all", ""),
    (f"By Anna.\n\n{OLD}", noted("Whatever."), "-O all -p", ""),
    ("", failed(3), "", "failed_before"),
    ("", failed(2), "", ""),
    ("", failed(3), "--retry-failed", ""),
    ("", failed(3), "--prompt New?", ""),
    ("", failed(3), "--model-name newer-vlm", ""),
    ("By Anna.", failed(3), "-O missing-ai", "failed_before"),
    ("By Anna.", failed(3), "-o", "failed_before"),
    ("By Anna.", failed(3), "-o --retry-failed", ""),
    ("", noted(""), "", ""),
    ("\n", noted(""), "--ignore-descriptions SONY*", ""),
    ("Ours.", noted("Ours.") | {"v": 2}, "-O outdated --prompt New?", "has_description"),
    ("Ours.", noted("Ours.") | {"v": 2}, "-O missing-ai", ""),
]


@pytest.mark.parametrize(("text", "note", "flags", "why"), DECIDED)
def test_what_is_described_and_what_is_left_alone_and_why(config, text, note, flags, why):
    asset = ia.Photo("id", "photo.jpg", text, "0", note=ia.note_in(note))
    assert ia.left_alone(asset, config("--model-name", "tiny-vlm", *flags.split())) == why


@pytest.mark.parametrize("policy", ["none", "missing-ai", "outdated", "all"])
def test_before_the_note_was_read_no_photo_is_left_alone_that_it_might_be_about(config, policy):
    """Only the note tells whether a text is ours, if it is not in a block."""
    asset = ia.Photo("id", "photo.jpg", "Ours?", "0", note=ia.UNREAD)
    why = ia.left_alone(asset, config("-O", policy))
    assert why == ("has_description" if policy == "none" else "")


# --- Policies, from end to end ---------------------------------------------------------------

FOUND: dict[str, tuple[str, Any]] = {
    "nothing": ("", None),
    "blanks": (" \n", None),
    "person": ("By Anna: $1 \\1 %s 👩‍👩‍👧‍👦 שלום\u200f.", None),
    "ours": ("A red boat.", noted("A red boat.")),
    "older prompt": ("A red boat.", noted("A red boat.", **OTHER)),
    "older model": ("A red boat.", noted("A red boat.", "older-vlm")),
    "edited": ("A red boat. Anna's.", noted("A red boat.", "older-vlm")),
    "newer note": ("A red boat.", noted("A red boat.", "older-vlm") | {"v": 2}),
    "block": (f"Anna.\n\n{OLD}\n\nLake.", noted(f"Anna.\n\n{OLD}\n\nLake.")),
    "older block": (f"Anna.\r\n{OLD}\nLake.", noted(f"Anna.\r\n{OLD}\nLake.", **OTHER)),
    "edited block": (f"Anna. {OLD}\n{OLD}\tLake.\n{OLD}", noted("Else.")),
    "two blocks": (f"A\n{OLD}\nB\n{OLD}\nC", noted("Else.", "older-vlm")),
}
BARE = dict.fromkeys(["nothing", "blanks"], SAID)
APART = {"nothing": BLOCK, "blanks": f" \n\n\n{BLOCK}"}
ADDED = {n: f"{FOUND[n][0]}\n\n{BLOCK}" for n in ("person", "edited", "newer note")}
OLDER = ("older prompt", "older model")
RENEWED = {"older block": f"Anna.\r\n{BLOCK}\nLake.", "two blocks": f"A\n{BLOCK}\nB\n\nC"}
POLICIES: dict[str, dict[str, str]] = {
    "-O none": BARE,
    "-O none -p": APART,
    "-O missing-ai": APART | ADDED,
    "-O outdated": BARE | dict.fromkeys(OLDER, SAID) | RENEWED,
    "-O outdated -p": APART | dict.fromkeys(OLDER, BLOCK) | RENEWED,
    "-o": dict.fromkeys(FOUND, SAID),
    "-O all -p": APART
    | ADDED
    | RENEWED
    | dict.fromkeys(("ours", *OLDER), BLOCK)
    | {"block": f"Anna.\n\n{BLOCK}\n\nLake."}
    | {"edited block": f"Anna. {OLD}\n{OLD}\tLake.\n{BLOCK}"},
}


@pytest.mark.parametrize("flags", POLICIES)
def test_a_policy_changes_just_what_it_says(library, ollama, run, flags):
    ids = {name: add(library, *found, name=name) for name, found in FOUND.items()}
    after = POLICIES[flags]
    done = run(library, ollama, *flags.split())
    assert done.counts.get("described", 0) == len(after)
    assert done.counts.get("failed", 0) == 0
    for name, (text, note) in FOUND.items():
        new, new_note = stored(library)[ids[name]]
        assert new == (kept(library, after[name]) if name in after else text), name
        if name in after:
            assert without_time(new_note) == without_time(noted(new)), name
        else:
            assert new_note == note, name
    assert ollama.count(*CHATS) == len(after)


def test_by_the_command_line_a_persons_text_is_kept_and_ours_added_once(library, ollama, command):
    long = "Ещё одна фраза $1. " * 3600
    found = {"long": (long, None)} | FOUND
    ids = {name: add(library, *photo, name=name) for name, photo in found.items()}
    argv = [*library.argv, *asking(ollama), "-O", "missing-ai"]
    after = APART | ADDED | {"long": f"{long}\n\n{BLOCK}"}
    states = []
    for _ in range(2):
        done = command(*argv)
        assert (done.returncode, done.stderr) == (0, "")
        assert ollama.count(*CHATS) == writes(library) == len(after)
        texts = {n: kept(library, after[n]) if n in after else found[n][0] for n in found}
        assert library.texts() == {ids[n]: text for n, text in texts.items()}
        states.append(library.state())
    assert states[0] == states[1]


def test_by_the_command_line_another_prompt_renews_ours_and_only_ours(library, ollama, command):
    mine, persons = add(library), add(library, "By Anna.")
    argv = [*library.argv, *asking(ollama), "-O", "outdated"]
    assert command(*argv).returncode == 0
    ollama.answer = lambda image, prompt: f"An answer to {prompt}"
    assert command(*argv).returncode == 0
    assert library.texts() == {mine: SAID, persons: "By Anna."}
    assert command(*argv, "--prompt", "New?").returncode == 0
    assert library.texts() == {mine: "An answer to New?", persons: "By Anna."}
    assert without_time(note_of(library, mine)) == without_time(
        noted("An answer to New?", prompt=hashlib.sha256(b"New?").hexdigest()[:12])
    )


def test_text_of_every_kind_survives_around_a_block(library, ollama, run):
    said = "Ships \\1 \\g<0> $1 👩‍👩‍👧‍👦 שלט: \u200fשלום\u200e [AI] \\n " + " ".join(
        map(str, range(1000))
    )
    ollama.answer = lambda image, prompt: said
    persons = "By Anna \\1 $1 %s {0} 🏖️ שלום\u200f\t\n[AI]\n" + "Фраза. " * 500
    id = add(library, persons)
    run(library, ollama, "-p", "-o", "--max-tokens", "99999")
    assert library.texts()[id] == f"{persons}\n\n[AI]\n{said}\n[/AI]"
    ollama.answer = lambda image, prompt: "Short.\n[/AI]\nIt goes on.\n[AI]"
    run(library, ollama, "-p", "-o")
    assert library.texts()[id] == f"{persons}\n\n[AI]\nShort.\n(/AI)\nIt goes on.\n(AI)\n[/AI]"


# --- The note --------------------------------------------------------------------------------


def test_a_note_has_just_these_fields_and_is_true(library, ollama, run):
    id = add(library)
    run(library, ollama, "--prompt", "What is it?")
    assert without_time(note_of(library, id)) == {
        "v": 1,
        "text": hashlib.sha256(SAID.encode()).hexdigest()[:16],
        "model": "tiny-vlm",
        "prompt": hashlib.sha256(b"What is it?").hexdigest()[:12],
    }


def test_a_note_is_of_the_text_that_immich_made_of_ours(library, ollama, run):
    id = add(library, "\n  By Anna.  ")
    done = run(library, ollama, "-O", "missing-ai")
    text = kept(library, f"\n  By Anna.  \n\n{BLOCK}")
    assert done.counts == {"described": 1}
    assert stored(library)[id][0] == text
    assert without_time(note_of(library, id)) == without_time(noted(text))


WHOLE, LOST = noted("Ours.", "older-vlm"), failed(3)
UNKNOWN: dict[str, Any] = {
    "newer": WHOLE | {"v": 2},
    "version as text": WHOLE | {"v": "1"},
    "version as truth": WHOLE | {"v": True},
    **{f"no {name}": {n: v for n, v in WHOLE.items() if n != name} for name in WHOLE},
    "no why": {n: v for n, v in LOST.items() if n != "why"},
    "no tries": {n: v for n, v in LOST.items() if n != "tries"},
    "tries as text": LOST | {"tries": "3"},
    "one more": WHOLE | {"language": "en"},
    "one more failed": LOST | {"language": "en"},
    "number for a model": WHOLE | {"model": 1},
    "list for a text": WHOLE | {"text": [WHOLE["text"]]},
    "empty": {},
}
NO_OBJECT = {"text": "Ours.", "list": [WHOLE], "number": 1, "truth": True, "null": None}


@pytest.mark.parametrize("name", [*UNKNOWN, *NO_OBJECT])
def test_a_note_of_another_shape_says_nothing(name):
    assert ia.note_in((UNKNOWN | NO_OBJECT)[name]) is None


@pytest.mark.parametrize("note", ["newer", "no model", "list for a text", "empty"])
def test_with_a_note_of_another_shape_a_text_is_a_persons(library, ollama, run, note):
    id = add(library, "Ours.", UNKNOWN[note])
    before = stored(library)
    for flags in ("-O outdated", "--undo"):
        assert run(library, ollama, *flags.split()).counts == {"skipped": 1}
        assert stored(library) == before
    run(library, ollama, "-O", "missing-ai")
    assert library.texts()[id] == f"Ours.\n\n{BLOCK}"


def test_other_programs_notes_are_left_alone(library, ollama, run):
    id = add(library)
    if isinstance(library, ApiWorld):
        library.server.assets[id].notes = {"mobile-app": {"iCloudId": "1"}}
    else:
        sql = 'INSERT INTO asset_metadata ("assetId", key, value) VALUES (%s, %s, %s::jsonb)'
        library.photos.run(sql, id, "mobile-app", '{"iCloudId": "1"}')
    run(library, ollama)
    run(library, ollama, "--undo")
    if isinstance(library, ApiWorld):
        assert library.server.assets[id].notes == {"mobile-app": {"iCloudId": "1"}}
    else:
        assert library.photos.notes(id) == {"mobile-app": {"iCloudId": "1"}}


# --- In the database: all or nothing ---------------------------------------------------------


def test_text_lock_and_note_are_of_one_transaction(database, ollama, run):
    id = add(database)
    run(database, ollama)
    sql = 'SELECT e.xmin::text, m.xmin::text, e."lockedProperties" FROM {exif} e'
    sql += ' JOIN asset_metadata m USING ("assetId") WHERE "assetId" = %s'
    [(text, note, locked)] = database.photos.run(sql, id)
    assert text == note
    assert locked == ["description"]


def test_without_the_note_nothing_is_written(database, ollama, run):
    id = add(database)
    database.photos.run(
        "CREATE FUNCTION seen.refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no notes today'; END $$"
    )
    database.photos.run(
        "CREATE TRIGGER refused BEFORE INSERT ON asset_metadata FOR EACH ROW"
        " EXECUTE FUNCTION seen.refuse()"
    )
    before = database.state()
    assert run(database, ollama).reasons == {"database_refused": 1}
    assert ollama.count(*CHATS) == 1
    assert database.state() == before
    assert database.texts() == {id: ""}


@pytest.mark.measured
def test_what_is_taken_back_goes_with_its_note_in_one_transaction(database, ollama, run):
    id = add(database)
    run(database, ollama)
    database.photos.run(
        "CREATE FUNCTION seen.refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no notes today'; END $$"
    )
    database.photos.run(
        "CREATE TRIGGER refused BEFORE DELETE ON asset_metadata FOR EACH ROW"
        " EXECUTE FUNCTION seen.refuse()"
    )
    undone = run(database, ollama, "--undo")
    assert undone.reasons == {"database_refused": 1}
    assert database.texts() == {id: SAID}
    assert database.photos.locked(id) == ["description"]


# --- Failures are kept in mind ---------------------------------------------------------------


TROUBLES = {  # what the host says of a photo that it cannot describe, and the key for that
    "no words": (servers.Answer("1.50"), "answer_empty", "without a description"),
    "cut": (servers.cut("A red"), "answer_cut", "--max-tokens"),
    "error": (Reply(500, {"error": "out of memory"}), "host_failed", "out of memory"),
    "refused": (Reply(400, {"error": "bad picture"}), "picture_refused", "bad picture"),
    "busy": (Reply(503, {"error": "slow down"}), "host_busy", "slow down"),
}


def fail_on(model: FakeOllama, reply: Any = TROUBLES["no words"][0]) -> None:
    """Have the host say this to whoever asks about the usual photo, and be well otherwise."""
    answer_by_picture(model, {servers.picture(): reply})


def add_well(library: World) -> str:
    """A photo that can be described: only then is what failed known to be no host's fault."""
    return library.add(picture=servers.own_picture(len(library.texts())))


@pytest.mark.parametrize(
    ("library", "trouble"),
    others_long(
        [(access, trouble) for access in ("api", "database") for trouble in TROUBLES],
        *zip(itertools.cycle(("api", "database")), TROUBLES, strict=False),
    ),
    indirect=["library"],
)
def test_a_photo_that_fails_is_tried_in_three_runs(library, ollama, run, trouble):
    reply, key, why = TROUBLES[trouble]
    fail_on(ollama, reply)
    id = add(library)
    for tries in (1, 2, 3):
        add_well(library)
        done = run(library, ollama)
        assert (done.counts["described"], done.counts["failed"]) == (1, 1)
        assert done.reasons[key] == 1
        note = without_time(note_of(library, id))
        assert why in note.pop("why")
        told = {"v": 1, "failed": key, "tries": tries, "model": "tiny-vlm", "prompt": PROMPT_ID}
        assert note == told
        assert library.texts()[id] == ""
    asked = ollama.count(*CHATS)
    done = run(library, ollama)
    assert ollama.count(*CHATS) == asked
    assert left_out(done) == 1
    add_well(library)
    run(library, ollama, "--prompt", "New?")
    assert note_of(library, id)["tries"] == 1


@pytest.mark.parametrize(
    "flags", [["--prompt", "New?"], ["--model-name", "newer-vlm"], ["--retry-failed"]], ids=str
)
def test_with_another_question_or_on_request_it_is_sent_again(library, ollama, run, flags):
    id = add(library, note=failed(3))
    ollama.models["newer-vlm"] = ("completion", "vision")
    done = run(library, ollama, *flags)
    assert done.counts == {"described": 1}
    assert library.texts() == {id: SAID}
    assert note_of(library, id)["text"] == text_id(SAID)
    assert "failed" not in note_of(library, id)


@pytest.mark.measured
def test_a_host_that_is_away_is_no_failure_of_the_picture(library, ollama, run):
    ollama.script(*CHATS, None, Reply(503, {"error": "busy"}), forever=True)
    ids = {add(library), add_well(library)}
    done = run(library, ollama, "--max-retries", "1", "--max-concurrent", "1")
    assert done.counts == {"described": 1, "failed": 1}
    notes = [note for note in map(functools.partial(note_of, library), ids) if note]
    assert [note.get("failed") for note in notes] == [None]


def test_a_renewal_that_fails_leaves_the_text_ours(library, ollama, run):
    id = add(library, "Ours.", noted("Ours.", "older-vlm"))
    fail_on(ollama)
    for _ in range(3):
        add_well(library)
        assert run(library, ollama, "-O", "outdated").counts["failed"] == 1
    asked = ollama.count(*CHATS)
    assert left_out(run(library, ollama, "-O", "outdated")) == 1
    assert ollama.count(*CHATS) == asked
    run(library, ollama, "--undo")
    assert library.texts()[id] == ""


def test_who_failed_before_is_counted_beside_who_has_a_text(library, ollama, run):
    add(library, note=failed(3)), add(library, note=failed(3)), add(library, "By Anna.")
    done = run(library, ollama, "-O", "outdated")
    assert (done.counts, left_out(done)) == ({"skipped": 3}, 2)


# --- What a person types while the model thinks ----------------------------------------------

TYPED = "Anna, while the model thought."
RACES: list[tuple[str, str, Any, str, str]] = [
    # flags, before, note, what is typed, after
    ("", "", None, TYPED, TYPED),
    ("-p", "", None, TYPED, f"{TYPED}\n\n{BLOCK}"),
    ("-O missing-ai", "", None, TYPED, f"{TYPED}\n\n{BLOCK}"),
    ("-O missing-ai", "Old.", None, TYPED, f"{TYPED}\n\n{BLOCK}"),
    ("-O missing-ai", "Old.", None, f"{TYPED}\n\n{OLD}", f"{TYPED}\n\n{OLD}"),
    ("-O outdated", "Ours.", noted("Ours.", "older-vlm"), TYPED, TYPED),
    ("-O outdated", "Ours.", noted("Ours.", "older-vlm"), f"Ours. {TYPED}", f"Ours. {TYPED}"),
    ("-O outdated -p", "Ours.", noted("Ours.", "older-vlm"), TYPED, f"{TYPED}\n\n{BLOCK}"),
    ("-O outdated -p", OLD, None, f"{TYPED}\n\n{OLD}", f"{TYPED}\n\n{BLOCK}"),
    ("-o", "Old.", None, TYPED, TYPED),
    ("-o", "", None, TYPED, TYPED),
    ("-o", "Old.", None, "", SAID),
    ("-o -p", "Old.", None, TYPED, f"{TYPED}\n\n{BLOCK}"),
    ("-o -p", OLD, None, f"{OLD}\n{TYPED}", f"{BLOCK}\n{TYPED}"),
]


@pytest.mark.parametrize(
    ("library", "flags", "before", "note", "typed", "after"),
    others_long(
        [(access, *race) for access in ("api", "database") for race in RACES],
        *((access, *race) for access, race in zip(itertools.cycle(("api", "database")), RACES)),
    ),
    indirect=["library"],
)
def test_who_types_while_the_model_thinks_wins(
    library, ollama, run, flags, before, note, typed, after
):
    id = add(library, before, note)

    def answer(image: bytes, prompt: str) -> str:
        library.describe(id, typed)
        return SAID

    ollama.answer = answer
    counts = run(library, ollama, *flags.split()).counts
    assert library.texts() == {id: after}
    ours = SAID in after
    assert counts == {"described" if ours else "skipped": 1}
    if ours:
        assert note_of(library, id)["text"] == text_id(after)
    else:
        assert note_of(library, id) == note


# --- Taking back -----------------------------------------------------------------------------

TAKEN: dict[str, tuple[str, Any, str]] = {
    # description, note, what is left
    "bare": ("A red boat.", noted("A red boat."), ""),
    "bare, older": ("A red boat.", noted("A red boat.", "older-vlm", "0123456789ab"), ""),
    "block": (OLD, noted(OLD), ""),
    "added": (f"Anna's.\n\n{OLD}", noted(f"Anna's.\n\n{OLD}"), "Anna's."),
    "between": (f"Anna's \\1.\n\n{OLD}\n\nLake 🏖️.", noted("Else."), "Anna's \\1.\n\nLake 🏖️."),
    "no note": (f"Anna's.\n\n{OLD}", None, "Anna's."),
}
THEIRS: dict[str, tuple[str, Any]] = {
    "person": ("By Anna.", None),
    "edited": ("A red boat. Anna's.", noted("A red boat.")),
    "newer note": ("A red boat.", noted("A red boat.") | {"v": 2}),
    "unclosed": ("[AI]\nBy Anna.", None),
    "nothing": ("", None),
    "failed": ("", failed(3)),
}


def fill_with_texts(library: World) -> dict[str, str]:
    """Put in texts of ours and of others; the ids by name."""
    found = {name: photo[:2] for name, photo in (TAKEN | THEIRS).items()}
    return {name: add(library, *photo, name=name) for name, photo in found.items()}


@pytest.mark.parametrize(
    "policy", others_long([None, "none", "missing-ai", "outdated", "all"], None, "outdated")
)
def test_what_is_still_ours_is_taken_back_whatever_policy_is_set(library, ollama, run, policy):
    ids = fill_with_texts(library)
    flags = ["--undo", *(["-O", policy] if policy else [])]
    done = run(library, ollama, *flags)
    after = {ids[n]: (left, None) for n, (_, _, left) in TAKEN.items()}
    assert stored(library) == after | {ids[n]: theirs for n, theirs in THEIRS.items()}
    assert done.counts == {"undone": len(TAKEN), "skipped": len(THEIRS)}
    assert ollama.exchanges == []
    again = run(library, ollama, *flags)
    assert again.counts == {"skipped": len(TAKEN) + len(THEIRS)}
    assert stored(library) == after | {ids[n]: theirs for n, theirs in THEIRS.items()}


def sum_of(form: str) -> str:
    """The beginning of the last line of such a run."""
    return ia.t(form, undone=len(TAKEN), skipped=len(THEIRS), failed=0)


def test_by_the_command_line_undo_needs_no_model_and_a_dry_run_only_tells(library, command):
    ids = fill_with_texts(library)
    before = library.state()
    argv = [*library.argv, *NOWHERE, "--undo", "--log-level", "info"]
    done = command(*argv, "--dry-run")
    assert done.returncode == 0
    *lines, last = done.stderr.splitlines()
    assert last.startswith(sum_of("tally_undo_dry_run"))
    assert len(lines) == len(TAKEN)
    for name, (_, _, left) in TAKEN.items():
        [line] = [line for line in lines if ids[name] in line]
        assert line.startswith(f"{name} ({ids[name]})")
        assert line.endswith((json.dumps(left), json.dumps(left, ensure_ascii=False)))
    assert library.state() == before

    done = command(*argv)
    assert done.returncode == 0
    assert done.stderr.startswith(sum_of("tally_undo"))
    after = {ids[n]: (left, None) for n, (_, _, left) in TAKEN.items()}
    assert stored(library) == after | {ids[n]: theirs for n, theirs in THEIRS.items()}


@pytest.mark.measured
@pytest.mark.parametrize(
    ("flags", "form"), [([], "tally_undo"), (["--dry-run"], "tally_undo_dry_run")], ids=str
)
def test_what_was_taken_back_is_counted_also_without_a_terminal(library, command, flags, form):
    fill_with_texts(library)
    done = command(*library.argv, *NOWHERE, "--undo", *flags)
    assert done.stderr.splitlines()[-1].startswith(sum_of(form))


def test_a_dry_run_shows_a_text_as_its_reader_writes(library, command):
    add(library, f"Озеро.\n\n{OLD}", name="lake.jpg")
    done = command(*library.argv, *NOWHERE, "--undo", "--dry-run")
    assert "Озеро." in done.stderr


def test_describing_and_taking_back_leaves_texts_and_notes_as_they_were(database, ollama, run):
    ids = [add(database), add(database, "By Anna.\n")]
    before = database.texts(), [database.photos.notes(id) for id in ids]
    run(database, ollama, "-O", "missing-ai")
    assert [database.photos.locked(id) for id in ids] == [["description"]] * 2
    assert run(database, ollama, "--undo").counts == {"undone": 2}
    assert (database.texts(), [database.photos.notes(id) for id in ids]) == before
    # or Immich would bring ours back from the XMP file, where it may have written it
    assert [database.photos.locked(id) for id in ids] == [["description"]] * 2


def test_undo_leaves_what_a_person_made_of_it_meanwhile(library, ollama, run):
    kept, changed = add(library), add(library)
    run(library, ollama)
    library.describe(changed, f"{SAID} With Anna.")
    note = note_of(library, changed)
    run(library, ollama, "--undo")
    assert stored(library) == {kept: ("", None), changed: (f"{SAID} With Anna.", note)}


def test_undo_asks_nothing_about_photos_without_a_text(api, immich, ollama, run):
    for _ in range(20):
        add(api)
    run(api, ollama, "--undo")
    assert immich.count("GET", "/metadata/") == 0


# --- Immich before 2.5, which keeps no notes -------------------------------------------------


@pytest.mark.measured
def test_without_notes_outdated_is_one_line(old_library, ollama, command):
    add(old_library, OLD)
    before = old_library.state()
    done = command(*old_library.argv, *asking(ollama), "-O", "outdated")
    lines = [line for line in done.stderr.splitlines() if line != ia.t("no_lock")]
    assert (done.returncode, lines) == (2, [ia.t("notes_needed")])
    assert old_library.state() == before
    assert ollama.count(*CHATS) == 0


def test_without_notes_all_else_works(old_library, ollama, run):
    nothing, persons = add(old_library), add(old_library, "By Anna.")
    bare = add(old_library)
    ollama.models["older-vlm"] = ("completion", "vision")
    old_library.describe(persons, "By Anna.")
    assert run(old_library, ollama, "-O", "missing-ai").counts == {"described": 3}
    texts = {nothing: BLOCK, persons: f"By Anna.\n\n{BLOCK}", bare: BLOCK}
    assert old_library.texts() == texts
    assert run(old_library, ollama, "-O", "missing-ai").counts.get("described", 0) == 0
    old_library.describe(bare, "")
    run(old_library, ollama)
    assert old_library.texts() == texts | {bare: SAID}
    done = run(old_library, ollama, "--undo")
    assert done.counts == {"undone": 2, "skipped": 1}
    assert old_library.texts() == {nothing: "", persons: "By Anna.", bare: SAID}


def test_without_notes_a_failure_is_just_tried_again(old_library, ollama, run):
    fail_on(ollama)
    add(old_library)
    for _ in range(4):
        add_well(old_library)
        counts = run(old_library, ollama).counts
        assert (counts["described"], counts["failed"]) == (1, 1)


# --- Settings that do not go together --------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ("-p --disable-ai-wrapper", "wrapper_needed"),
        ("-O missing-ai --disable-ai-wrapper", "wrapper_needed"),
        ("--undo -m", "batch_only"),
        ("--undo -c", "batch_only"),
        ("--dry-run -c", "batch_only"),
    ],
)
def test_what_does_not_go_together_is_one_line(command, flags, key):
    place = ["--immich-api-url", "http://127.0.0.1:9", "--immich-api-keys", "key"]
    done = command(*place, *NOWHERE, *flags.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", ia.t(key) + "\n")


def test_the_variables_mean_what_the_flags_do(config):
    given = {
        "IMMICH_ANALYZE_PRESERVE_HUMAN": "true",
        "IMMICH_ANALYZE_OVERWRITE_POLICY": "Outdated",
        "IMMICH_ANALYZE_RETRY_FAILED": "true",
    }
    settings = config(environ=given)
    assert (settings.preserve_human, settings.retry_failed) == (True, True)
    assert settings.policy is ia.Policy.OUTDATED
    bare = config(environ={"IMMICH_ANALYZE_DISABLE_AI_WRAPPER": "true"})
    assert (bare.preserve_human, bare.policy) == (False, ia.Policy.NONE)
    assert config("-O", "missing-ai").preserve_human
    assert config("-o").policy is ia.Policy.ALL
    with pytest.raises(ia.Fatal, match="--disable-ai-wrapper"):
        config("-p", environ={"IMMICH_ANALYZE_DISABLE_AI_WRAPPER": "true"})


def test_a_flag_outranks_the_others_variable(config):
    settings = config("-o", environ={"IMMICH_ANALYZE_OVERWRITE_POLICY": "none"})
    assert settings.policy is ia.Policy.ALL


# --- Reading back ----------------------------------------------------------------------------


def test_what_was_read_back_with_a_refused_key_costs_the_others_nothing(hours, api, ollama):
    immich = api.server
    immich.keys["bob-key"] = FakeKey("bob")
    mine = [add(api) for _ in range(5)]
    for _ in range(3):
        immich.add(owner="bob", preview=servers.picture())

    def answer(image: bytes, prompt: str) -> str:
        if len(ollama.asked) == 7:  # all are asked about before the first is read back
            del immich.keys["bob-key"]
        return SAID

    ollama.answer = answer
    keys = ["--immich-api-keys", "alice-key,bob-key", "--max-concurrent", "1"]
    with hours.batch(api, ollama, *keys) as run:
        pass
    assert (run.fatal, run.complete) == ("", False)
    assert run.counts == {"described": 5, "skipped": 3}
    assert [note_of(api, id)["text"] for id in mine] == [text_id(SAID)] * 5


def test_what_was_written_before_the_run_could_not_go_on_is_counted_and_noted(hours, api, ollama):
    add(api), add(api)

    def answer(image: bytes, prompt: str) -> str:
        ollama.api_key = "changed meanwhile"
        return SAID

    ollama.answer = answer
    with hours.batch(api, ollama, "--max-concurrent", "1") as run:
        pass
    assert run.fatal == "host_key_refused"
    [written] = [id for id, text in api.texts().items() if text]
    assert run.counts == {"described": 1}
    assert note_of(api, written)["text"] == text_id(SAID)


@pytest.mark.parametrize("before", ["", "Camera.", f"{SAID} With Anna."])
def test_a_text_that_was_lost_is_a_failure_and_noted(api, immich, ollama, run, before):
    id = immich.add(description=before, camera=before, read_only=True).id
    done = run(api, ollama, "-o")
    assert done.counts == {"failed": 1}
    assert done.reasons == {"not_kept": 1}
    assert note_of(api, id)["failed"] == "not_kept"
    asked = ollama.count(*CHATS)
    assert left_out(run(api, ollama, "-o")) == 1
    assert ollama.count(*CHATS) == asked


def test_a_renewal_that_was_lost_leaves_the_older_text_ours(api, immich, ollama, run):
    id = add(api, "Ours.", noted("Ours.", "older-vlm"))
    immich.assets[id].read_only = True  # as a folder may be from some day on
    assert run(api, ollama, "-O", "outdated").counts == {"failed": 1}
    assert api.texts() == {id: "Ours."}
    immich.assets[id].read_only = False
    assert run(api, ollama, "--undo").counts == {"undone": 1}
    assert api.texts() == {id: ""}


def test_a_text_that_would_be_too_long_for_immich_is_one_clear_failure(api, ollama, run):
    persons = "x" * (servers.BODY_LIMIT - 20)
    id = add(api, persons)
    for tries in (1, 2, 3):
        add_well(api)
        done = run(api, ollama, "-O", "missing-ai")
        assert done.reasons.get("description_too_long") == 1
        assert note_of(api, id)["tries"] == tries
    assert api.texts()[id] == persons
    asked = ollama.count(*CHATS)
    assert left_out(run(api, ollama, "-O", "missing-ai")) == 1
    assert ollama.count(*CHATS) == asked


# --- How often Immich is asked ---------------------------------------------------------------


def test_a_hundred_photos_are_about_five_requests_each(hours, api, immich, ollama, run):
    immich.keys[immich.key] = FakeKey("alice", [*servers.MINIMAL, "user.read"])
    ids = [add(api) for _ in range(100)]
    hours.pace(ollama, seconds=0.5)
    run(api, ollama)
    assert [stored(api)[id][0] for id in ids] == [SAID] * 100
    assert {note_of(api, id)["text"] for id in ids} == {text_id(SAID)}
    assert len(immich.exchanges) <= 5.3 * 100
    asked = Counter(exchange.operation.name for exchange in immich.exchanges)
    each = ("getAssetMetadataByKey", "viewAsset", "updateAssetMetadata", "updateAsset")
    assert {name: asked[name] for name in each} == dict.fromkeys(each, 100)
    assert (asked["getMyApiKey"], asked["getMyUser"]) == (1, 1)


def test_beside_a_slow_model_each_photo_is_read_back_alone(hours, api, immich, ollama, run):
    """Half a minute for each picture, one after another; six requests, and some at the start."""
    hours.pace(ollama, seconds=30)
    for _ in range(10):
        add(api)
    done = run(api, ollama, "--max-concurrent", "1")
    assert done.counts == {"described": 10}
    assert len(immich.exchanges) <= 6 * 10 + 8


def test_a_photo_that_is_deleted_before_it_is_noted_costs_no_other_its_note(
    api, immich, ollama, run, monkeypatch
):
    ids = [add(api) for _ in range(6)]
    real = immich.behave

    def behave(exchange: servers.Exchange) -> Reply:
        if exchange.method == "PUT" and exchange.path.endswith("/metadata"):
            immich.assets.pop(ids[0], None)
        return real(exchange)

    monkeypatch.setattr(immich, "behave", behave)
    assert run(api, ollama).counts == {"described": 5, "skipped": 1}
    assert {note_of(api, id)["text"] for id in ids[1:]} == {text_id(SAID)}


def test_a_note_that_immich_refuses_costs_no_other_and_no_photo(api, immich, ollama, run):
    ids = [add(api) for _ in range(4)]
    refused = Reply(400, {"message": ["value must be an object"]})
    immich.script("PUT", f"{ids[0]}/metadata", refused, forever=True)
    assert run(api, ollama).counts == {"described": 4}
    assert note_of(api, ids[0]) is None
    assert {note_of(api, id)["text"] for id in ids[1:]} == {text_id(SAID)}
