"""Whole runs in invented time: texts, notes and previews, as a user sees them."""

import itertools
import json
import secrets
from hashlib import sha256
from typing import Any

import pytest
import servers
from hours import Hours
from servers import Exchange, Reply
from worlds import PROMPT, ApiWorld, SqlWorld, World, asked_about, failure_notes, fill, others_long

pytestmark = pytest.mark.slow

KEY = "immich-analyze"
MISSING = servers.recorded("immich-3.1.0", "thumbnail-preview-of-broken.jpg")
SAID = servers.told(servers.picture())
OLD = "An older text of ours."


def text_id(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def keep_note(library: World, id: str, **fields: Any) -> None:
    """Put a note in, made by this model and prompt unless told otherwise."""
    own = {"v": 1, "model": "tiny-vlm", "prompt": sha256(PROMPT.encode()).hexdigest()[:12]}
    note = own | {"at": "2026-01-02T03:04:05.678Z"} | fields
    if isinstance(library, ApiWorld):
        library.server.assets[id].notes = {KEY: note}
    else:
        sql = 'INSERT INTO asset_metadata ("assetId", key, value) VALUES (%s, %s, %s::jsonb)'
        library.photos.run(sql, id, KEY, json.dumps(note))


def add_ours(library: World, text: str = OLD, **fields: Any) -> str:
    id = library.add(picture=servers.picture(), description=text)
    keep_note(library, id, text=text_id(text), **fields)
    return id


# --- Libraries that keep no texts ------------------------------------------------------------

EXTERNAL = "6e1b8d1e-0f4c-4f0e-9d55-2f6b6a1c7d10"


@pytest.mark.measured
@pytest.mark.parametrize("most", others_long([1, 4, 12], 1, 4))
def test_little_is_asked_for_a_library_that_keeps_nothing(hours, api, immich, ollama, most):
    lost, wanted = {}, {}
    for n in range(24 + 4 * most):
        picture = servers.own_picture(n)
        if n % 4:
            id = immich.add(preview=picture, library_id=EXTERNAL, read_only=True).id
            lost[id] = picture
        else:
            wanted[immich.add(preview=picture).id] = servers.told(picture)
    hours.pace(ollama)
    with hours.batch(api, ollama, "--max-concurrent", str(most)) as run:
        pass
    texts = api.texts()
    assert {id: texts[id] for id in wanted} == wanted
    assert {texts[id] for id in lost} == {""}
    third = sorted(time for id, time in hours.written(api).items() if id in lost)[2]
    asked = [hours.since_begin(chat) for p in lost.values() for chat in asked_about(p, ollama)]
    assert max(asked) <= third + 3
    assert run.code == 1
    assert len(run.lines(EXTERNAL)) == 1


def hide(immich: servers.FakeImmich, *ids: str) -> None:
    """Let searches for what was updated show these photos without their texts."""

    def stale(search: Exchange) -> Reply | None:
        if "updatedAfter" not in search.json:
            return None
        found = json.loads(b"".join(immich.behave(search).body))
        for item in found["assets"]["items"]:
            if item["id"] in ids:
                item["exifInfo"]["description"] = ""
        return Reply(200, found)

    immich.script("POST", "/search/metadata", stale, forever=True)


@pytest.mark.parametrize("stale", [1, 12])
def test_a_text_that_a_search_does_not_show_is_read_before_it_is_lost(
    hours, api, immich, ollama, stale
):
    wanted = fill(api, 12)
    hide(immich, *list(wanted)[:stale])
    with hours.batch(api, ollama) as run:
        pass
    assert (run.counts, run.code) == ({"described": 12}, 0)
    assert failure_notes(api) == {}
    for id in list(wanted)[:stale]:
        reads = [hours.since_begin(get) for get in immich.find("GET", f"/api/assets/{id}$")]
        assert max(reads) > hours.written(api)[id]


# --- Notes come first ------------------------------------------------------------------------


def notes_and_texts(immich: servers.FakeImmich) -> list[tuple[str, str, Any]]:
    """What was written, in its order: kind, id and value."""
    found: list[tuple[str, str, Any]] = []
    for put in immich.find("PUT", "/api/assets"):
        name = put.operation.name if put.status == 200 else ""
        if name == "updateAsset" and put.json:
            found.append(("text", put.params["id"], put.json["description"]))
        for item in (put.json or {}).get("items", ()) if "Metadata" in name else ():
            found.append(("note", item.get("assetId") or put.params["id"], item["value"]))
    return found


@pytest.mark.parametrize("before", ["nothing", "our text", "an older model's text"])
def test_each_text_goes_after_a_note_that_fits_it(hours, api, immich, ollama, before):
    if before == "nothing":
        ids, policy = list(fill(api, 6)), "none"
    else:
        older = {"model": "older-vlm"} if before == "an older model's text" else {}
        ids = [add_ours(api, f"{OLD} {n}", **older) for n in range(6)]
        policy = "outdated" if older else "all"
    old = {id: text for id, text in api.texts().items() if text}
    with hours.batch(api, ollama, "--overwrite-policy", policy) as run:
        pass
    assert run.counts == {"described": 6}
    noted: dict[str, Any] = {}
    described = set()
    for kind, id, value in notes_and_texts(immich):
        if kind == "note":
            noted[id] = value
        else:
            described.add(id)
            assert noted[id]["text"] == text_id(value)
            assert noted[id].get("was") == (text_id(old[id]) if old else None)
    assert described == set(ids)
    for id, text in api.texts().items():
        note = api.notes()[id][KEY]
        assert (note["text"], note["model"], "was" in note) == (text_id(text), "tiny-vlm", False)


@pytest.mark.parametrize("policy", ["none", "all", "outdated", "missing-ai"])
def test_a_note_that_names_two_texts_makes_both_ours(hours, api, ollama, policy):
    """A run was killed between a note and its text; the older text still stands."""
    id = api.add(picture=servers.picture(), description=OLD)
    keep_note(api, id, text=text_id("What was to come."), was=text_id(OLD))
    with hours.batch(api, ollama, "--overwrite-policy", policy) as run:
        pass
    renewed = policy in ("all", "outdated")  # it is ours, but not up to date
    assert run.counts == {"described" if renewed else "skipped": 1}
    assert (api.texts()[id] == OLD) == (not renewed)
    with hours.batch(api, "--undo") as run:
        pass
    assert (run.counts, api.texts()) == ({"undone": 1}, {id: ""})
    assert KEY not in api.notes()[id]


def test_what_immich_did_not_keep_is_described_in_database_mode(hours, library, ollama):
    ids = [library.add(picture=servers.picture()) for _ in range(3)]
    for id in ids:
        keep_note(library, id, failed="not_kept", why="not kept", tries=3)
    with hours.batch(library, ollama) as run:
        pass
    if isinstance(library, SqlWorld):
        assert run.counts == {"described": 3}
        assert library.texts() == dict.fromkeys(ids, SAID)
        assert failure_notes(library) == {}
    else:
        assert (run.counts, run.reasons) == ({"skipped": 3}, {"failed_before": 3})


# --- A person who types meanwhile ------------------------------------------------------------

OURS = f"[AI]\n{SAID}\n[/AI]"


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ([], "Our first car."),
        (["--preserve-human"], f"Our first car.\n\n{OURS}"),
        (["--overwrite-policy", "missing-ai"], f"Our first car.\n\n{OURS}"),
    ],
    ids=["alone", "preserve-human", "missing-ai"],
)
def test_a_person_may_type_while_the_model_thinks(hours, library, ollama, flags, left):
    id = library.add(picture=servers.picture())
    hours.pace(ollama, seconds=10)
    with hours.batch(library, ollama, *flags) as run:
        run.at(5, lambda: library.describe(id, "Our first car."))
    assert library.texts() == {id: left}
    assert run.counts == {"described" if flags else "skipped": 1}
    assert len(asked_about(servers.picture(), ollama)) == 1
    assert not flags or library.notes()[id][KEY]["text"] == text_id(left)


# --- Taking back -----------------------------------------------------------------------------


@pytest.fixture
def restricted(database) -> SqlWorld:
    """The database, opened by a role that has README's rights."""
    role = f"describer_{secrets.token_hex(4)}"
    uri = database.photos.restricted_role(role, "its secret")
    database.role = role
    database.argv = ["--postgres-url", uri, "--immich-root", str(database.photos.root)]
    return database


def test_the_documented_role_may_describe_and_take_back(hours, restricted, ollama):
    ids = list(fill(restricted, 3))
    with hours.batch(restricted, ollama) as run:
        pass
    assert run.counts == {"described": 3}
    with hours.batch(restricted, "--undo") as run:
        pass
    assert (run.counts, run.code) == ({"undone": 3}, 0)
    assert restricted.texts() == dict.fromkeys(ids, "")
    assert restricted.notes() == {id: {} for id in ids}


def test_only_undo_asks_for_the_right_to_list_deleted_notes(hours, restricted, ollama):
    grant = "INSERT ON asset_metadata_audit"
    restricted.photos.run(f'REVOKE {grant} FROM "{restricted.role}"')
    wanted = fill(restricted, 3)
    with hours.batch(restricted, ollama) as run:
        pass
    assert (run.counts, run.code) == ({"described": 3}, 0)
    with hours.batch(restricted, "--undo") as run:
        pass
    assert (run.code, run.fatal, run.ended) == (2, "grants_missing", 0)
    [line] = run.lines(level="CRITICAL")
    assert f"GRANT {grant} TO {restricted.role}" in line
    assert restricted.texts() == wanted


def test_what_is_taken_back_stays_locked(hours, database, ollama):
    """Or the XMP file would bring our text back as if a person had written it."""
    id = database.add(picture=servers.picture())
    with hours.batch(database, ollama):
        pass
    with hours.batch(database, "--undo") as run:
        pass
    assert (run.counts, database.texts()) == ({"undone": 1}, {id: ""})
    assert database.photos.locked(id) == ["description"]


NOWHERE = ["--hosts", "http://127.0.0.1:9", "--model-name", "none"]


@pytest.mark.parametrize("ours", [3, 0])
def test_a_rehearsal_of_undo_does_not_say_that_anything_was_taken_back(library, command, ours):
    ids = [add_ours(library) for _ in range(ours)]
    library.add(picture=servers.picture(), description="By a person.")
    done = command(*library.argv, *NOWHERE, "--undo", "--dry-run")
    assert done.returncode == 0
    last = done.stderr.splitlines()[-1]
    assert not last.startswith("Taken back")
    assert str(ours) in last
    assert "Described" not in done.stderr
    assert [library.texts()[id] for id in ids] == [OLD] * ours


def test_an_undo_with_nothing_to_do_does_not_talk_of_describing(library, command):
    library.add(picture=servers.picture(), description="By a person.")
    done = command(*library.argv, *NOWHERE, "--undo", "--log-level", "info")
    assert done.returncode == 0
    assert "Described" not in done.stderr
    assert "Taken back: 0" in done.stderr


# --- Previews that are late ------------------------------------------------------------------


def hide_preview(library: World, id: str) -> bytes:
    """Let a preview be missing, though its photo is listed as ready."""
    if isinstance(library, SqlWorld):
        file = library.photos.preview_file(id)
        picture = file.read_bytes()
        file.unlink()
        return picture
    library.server.script("GET", f"{id}/thumbnail", MISSING, forever=True)
    return b""


def show_preview(library: World, id: str, picture: bytes) -> None:
    if isinstance(library, SqlWorld):
        library.photos.preview_file(id).write_bytes(picture)
    else:
        library.server.forget_scripts()


@pytest.mark.parametrize("seconds", [0.2, 3, 25])
def test_a_preview_that_is_not_there_yet_is_asked_for_again(hours, library, ollama, seconds):
    wanted = fill(library, 3)
    id = list(wanted)[1]
    picture = hide_preview(library, id)
    with hours.batch(library, ollama) as run:
        run.at(seconds, lambda: show_preview(library, id, picture))
    assert (run.counts, run.code, run.said) == ({"described": 3}, 0, [])
    assert library.texts() == wanted
    assert run.ended <= seconds + 5


@pytest.mark.parametrize("timeout", [10, 60])
def test_a_preview_that_never_comes_costs_its_photo_after_a_while(hours, library, ollama, timeout):
    wanted = fill(library, 3)
    id = list(wanted)[1]
    hide_preview(library, id)
    with hours.batch(library, ollama, "--file-write-timeout", str(timeout)) as run:
        pass
    assert (run.counts, run.code) == ({"described": 2, "failed": 1}, 1)
    assert run.reasons == {"preview_missing": 1}
    assert timeout <= run.ended <= timeout + 5
    assert library.texts() == wanted | {id: ""}


def add_unready(library: World, number: int) -> list[str]:
    if isinstance(library, SqlWorld):
        return library.photos.add_many(number, preview=False)
    return [asset.id for asset in library.server.add_many(number, preview=None)]


def make_preview(library: World, id: str, picture: bytes) -> None:
    if isinstance(library, SqlWorld):
        library.photos.write_preview(id, picture)
        library.photos.add_preview(id)
    else:
        library.server.assets[id].preview = picture


@pytest.mark.parametrize(
    ("library", "mode", "soon"),
    others_long(
        itertools.product(("api", "database"), ("combined", "monitor"), (7, 50)),
        *(("api", "combined", 7), ("database", "monitor", 7)),
    ),
    indirect=["library"],
)
def test_previews_that_come_late_are_described_within_a_look(
    hours: Hours, library, ollama, mode, soon
):
    fill(library, 3)
    pictures = [servers.own_picture(n) for n in range(100, 105 + soon)]
    came = dict.fromkeys(pictures[:soon], 145) | dict.fromkeys(pictures[soon:], 1300)
    ids: dict[str, bytes] = {}

    def make(number: int) -> None:
        for id, picture in ids.items():
            if came[picture] == number:
                make_preview(library, id, picture)

    with hours.service(library, ollama, "--mode", mode) as run:
        run.at(100, lambda: ids.update(zip(add_unready(library, len(came)), came, strict=True)))
        run.at(145, lambda: make(145))
        run.at(1300, lambda: make(1300))
        run.until(1400)
    for picture, time in came.items():
        [chat] = asked_about(picture, ollama)
        assert time <= hours.since_begin(chat) <= time + 10 + 1
    texts = library.texts()
    assert {id: texts[id] for id in ids} == {id: servers.told(p) for id, p in ids.items()}
    if isinstance(library, ApiWorld):
        single = [x for x in library.server.exchanges if x.params.get("id") in ids]
        assert single
        early = [x for x in single if hours.since_begin(x) < came[ids[x.params["id"]]]]
        assert early == []
