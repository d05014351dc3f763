"""Whole runs: what a library and the model hosts see of one batch, counted exactly."""

import base64
import copy
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sandbox
import servers
import tiny_vlm
from servers import CUT, Answer, FakeImmich, FakeKey, FakeOllama, FakeServer, Reply
from worlds import (
    BUSY,
    CHATS,
    NO_PAUSE,
    ROOT,
    ApiWorld,
    Running,
    SqlWorld,
    World,
    about_photos,
    answer_by_picture,
    asking,
    failure,
    fill,
    mainly,
    tally,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow


@pytest.fixture(params=["ollama", "llamacpp"])
def model(request: pytest.FixtureRequest) -> FakeServer:
    return request.getfixturevalue(request.param)


# --- The main job ----------------------------------------------------------------------------

LEFT_ALONE: list[dict[str, Any]] = [
    {"description": "By a person."},
    {"description": "By a person.", "visibility": "archive"},
    {"trashed": True},
    {"offline": True},
    {"visibility": "hidden"},
    {"visibility": "locked"},
    {"type": "VIDEO"},
    {"ready": False},
]


def fill_among_others(library: World) -> dict[str, str]:
    """30 photos to describe among 15 of every kind that is left alone."""
    wanted = {}
    for n in range(45):
        picture, rest = servers.own_picture(n), n % 3 == 2
        if rest:
            library.add(picture=picture, **LEFT_ALONE[n % len(LEFT_ALONE)])
        else:
            visibility = "archive" if n % 10 == 0 else "timeline"
            wanted[library.add(picture=picture, visibility=visibility)] = servers.told(picture)
    return wanted


def test_what_has_no_description_gets_one_and_nothing_else_is_touched(library, ollama, command):
    wanted = fill_among_others(library)
    before = library.state()
    done = command(*library.argv, *asking(ollama))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert library.changes_since(before) == {id: {"description": wanted[id]} for id in wanted}
    assert sorted(library.writes()) == sorted(wanted.items())
    assert ollama.count(*CHATS) == len(ollama.asked) == len(wanted) == 30

    again = command(*library.argv, *asking(ollama))
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert ollama.count(*CHATS) == len(library.writes()) == 30


def listings(server: FakeImmich) -> Counter[str]:
    """How many requests listed photos of each visibility."""
    return Counter(search.json["visibility"] for search in server.find("POST", "/search/metadata"))


def test_the_api_is_asked_five_times_for_each_described_photo(hours, api, immich, ollama):
    immich.keys[immich.key] = FakeKey("alice", [*servers.MINIMAL, "user.read"])
    wanted = fill(api, 50)
    for picture in (servers.picture("red"), servers.picture("blue")):
        api.add(picture=picture, description="By a person.")
    with hours.batch(api, ollama) as run:
        pass
    assert (run.counts["described"], api.texts().items() >= wanted.items()) == (50, True)
    asked = Counter(exchange.operation.name for exchange in immich.exchanges)
    each = ("getAssetMetadataByKey", "viewAsset", "getAssetInfo", "updateAssetMetadata")
    each += ("updateAsset",)
    alone = Counter({"getAssetInfo": 3})  # the first are read back at once, the others together
    once = Counter({"getServerVersion": 2, "getServerConfig": 1, "getMyApiKey": 1, "getMyUser": 1})
    searches = Counter({"searchAssets": 4})  # the listing and what was updated since
    assert asked == Counter(dict.fromkeys(each, 50)) + alone + once + searches
    for call in each:
        ids = {x.params["id"] for x in immich.exchanges if x.operation.name == call}
        assert ids == wanted.keys()
    assert listings(immich) == {"timeline": 2, "archive": 2}


def test_a_real_model_names_the_colour_of_each_photo(library, real_llamacpp, command):
    colours = [*tiny_vlm.COLOURS] * 2
    wanted = {
        library.add(picture=sandbox.draw(colour)): sandbox.answer(colour) for colour in colours
    }
    done = command(*library.argv, *asking(real_llamacpp), "--max-concurrent", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert library.texts() == wanted


def test_a_picture_the_real_model_cannot_decode_fails_alone(library, real_llamacpp, command):
    broken = library.add("broken.jpg", picture=servers.broken_picture())
    whole = library.add(picture=sandbox.draw("green"))
    done = command(*library.argv, *asking(real_llamacpp), *NO_PAUSE)
    assert done.returncode == 1
    why, last = done.stderr.splitlines()
    assert why.startswith(f"broken.jpg ({broken}): {real_llamacpp.url}")
    assert last.startswith(tally(described=1, failed=1))
    assert library.texts() == {broken: "", whole: sandbox.answer("green")}


# --- Model hosts -----------------------------------------------------------------------------


def test_no_more_requests_are_in_flight_than_allowed_and_no_fewer(hours, api, model):
    wanted, ended = fill(api, 15), []

    def answer(image: bytes, prompt: str) -> str:
        hours.takes(1)
        ended.append(hours.time)
        return servers.told(image)

    model.answer = answer
    with hours.batch(api, model, "--max-concurrent", "3"):
        pass
    assert ended == [second for second in range(1, 6) for _ in range(3)]
    assert model.most_in_flight == 3
    assert api.texts() == wanted


def test_whoever_finds_no_free_place_waits_with_a_picture(hours, api, immich, ollama):
    wanted = fill(api, 8)
    hours.pace(ollama, seconds=10)
    seen = []
    with hours.batch(api, ollama, "--max-concurrent", "3") as run:
        run.at(5, lambda: seen.append((ollama.in_flight, immich.count("GET", "/thumbnail"))))
    assert seen == [(3, 6)]
    assert api.texts() == wanted


@pytest.fixture
def other() -> Iterator[FakeOllama]:
    """Another model host."""
    with FakeOllama() as server:
        yield server
    server.check()


def test_a_host_that_is_down_costs_one_line(api, ollama, command):
    wanted = fill(api, 6)
    down = f"http://127.0.0.1:{sandbox.free_port()}"
    done = command(*api.argv, *asking(down, ollama))
    assert done.returncode == 0
    assert [down in line for line in done.stderr.splitlines()] == [True]
    assert api.texts() == wanted


def test_a_host_without_the_model_is_never_asked(api, ollama, other, command):
    wanted = fill(api, 6)
    other.models = {"another": ("completion", "vision")}
    done = command(*api.argv, *asking(ollama, other))
    assert done.returncode == 0
    assert [other.url in line for line in done.stderr.splitlines()] == [True]
    assert api.texts() == wanted
    assert other.count(*CHATS) == 0


def test_a_busy_host_is_left_alone_and_its_photo_goes_to_the_other(api, ollama, other, command):
    wanted = fill(api, 6)
    other.script(*CHATS, BUSY, forever=True)
    done = command(*api.argv, *asking(other, ollama), "--max-concurrent", "1")
    assert done.returncode == 0
    assert [other.url in line for line in done.stderr.splitlines()] == [True]
    assert api.texts() == wanted
    assert (other.count(*CHATS), ollama.count(*CHATS)) == (1, 6)


def test_two_hosts_share_the_photos(api, ollama, other, command):
    wanted = fill(api, 6)
    assert command(*api.argv, *asking(ollama, other), "--max-concurrent", "1").returncode == 0
    assert api.texts() == wanted
    assert (ollama.count(*CHATS), other.count(*CHATS)) == (3, 3)


def test_a_poisonous_picture_is_tried_on_each_host_and_costs_no_other(api, ollama, other, command):
    wanted, poison = fill(api, 12), servers.own_picture(1000)
    id = api.add("poison.jpg", picture=poison)
    for server in (ollama, other):
        answer_by_picture(server, {poison: Reply(500, {"error": "out of memory"})})
    done = command(*api.argv, *asking(ollama, other), *NO_PAUSE, "--log-level", "info")
    line, _ = done.stderr.splitlines()
    assert (done.returncode, line.startswith("poison.jpg")) == (1, True)
    assert api.texts() == wanted | {id: ""}
    encoded = base64.b64encode(poison).decode()
    tries = [
        sum(encoded in str(exchange.json) for exchange in server.find(*CHATS))
        for server in (ollama, other)
    ]
    assert sorted(tries) == [1, 2]
    assert api.server.count("GET", f"{id}/thumbnail") == 1


@mainly("api")
def test_a_host_that_dies_costs_no_photo(library, ollama, other):
    wanted = fill(library, 20)
    ollama.hold(*CHATS)
    other.hold(*CHATS)  # else it might answer for all before the first one has its share
    argv = [*library.argv, *asking(ollama, other), "--max-concurrent", "8"]
    with Running(*argv, *NO_PAUSE, "--log-level", "warning") as tool:
        ollama.wait_for(4)
        ollama.close()
        other.gate.set()
        assert tool.end() == 0
    ollama.gate.set()
    assert len([line for line in tool.said if ollama.url in line]) == 1
    assert library.texts() == wanted
    assert sorted(library.writes()) == sorted(wanted.items())


@mainly("api")
@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_a_host_that_is_sick_from_then_on_costs_no_photo(hours, library, ollama, other, trouble):
    wanted = fill(library, 30)
    sick = hours.hang if trouble == "hangs" else Reply(500, {"error": "no memory"})
    ollama.script(*CHATS, hours.between(5, math.inf, sick), forever=True)
    hours.pace(ollama, other, seconds=2)
    with hours.batch(library, ollama, other, "--max-concurrent", "8") as run:
        pass
    assert len(run.lines(ollama.url)) == 1
    assert library.texts() == wanted
    assert sorted(library.writes()) == sorted(wanted.items())


def test_several_instances_share_a_library(database, ollama):
    """Each photo is asked about once, whoever takes it."""
    wanted = fill(database, 40)
    argv = [*database.argv, *asking(ollama), "--max-concurrent", "2"]
    with Running(*argv) as one, Running(*argv) as two, Running(*argv) as three:
        assert [tool.end() for tool in (one, two, three)] == [0, 0, 0]
    assert database.texts() == wanted
    assert sorted(database.writes()) == sorted(wanted.items())
    assert ollama.count(*CHATS) == 40


def test_shares_of_a_library_are_disjoint_and_together_all(api, ollama, command):
    wanted = fill(api, 15)
    for number in range(1, 4):
        before = set(dict(api.writes()))
        assert command(*api.argv, *asking(ollama), "--shard", f"{number}/3").returncode == 0
        assert set(dict(api.writes())) - before
    assert sorted(api.writes()) == sorted(wanted.items())


# --- Bad pictures ----------------------------------------------------------------------------


def test_a_bad_preview_costs_only_its_photo(hours, library, ollama):
    jpeg = servers.picture("green")
    bad = {
        "words.jpg": (b"This is no picture.", "preview_unknown"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "preview_cut"),
        "empty.jpg": (b"", "preview_cut"),
        "lost.jpg": (jpeg, "preview_missing"),
    }
    ids = {name: library.add(name, picture=picture) for name, (picture, _) in bad.items()}
    library.lose_preview(ids["lost.jpg"])
    good = fill(library, 3)
    with hours.batch(library, ollama) as run:
        pass
    lines = [failure(ids[name], name, key) for name, (_, key) in bad.items()]
    assert sorted(run.lines(level="ERROR")) == sorted(lines)
    assert (run.code, run.counts) == (1, {"described": 3, "failed": 4})
    assert library.texts() == dict.fromkeys(ids.values(), "") | good
    assert ollama.count(*CHATS) == 3
    notes = library.notes()
    failed = {id: notes[id][ia.KEY]["failed"] for id in ids.values() if notes[id]}
    assert failed == {ids["words.jpg"]: "preview_unknown"}  # the others may pass


@pytest.mark.parametrize(
    "reply",
    [
        servers.recorded("immich-2.7.5", "database-down-thumbnail"),  # what older releases say
        Reply(404, {"message": "Not Found"}),  # and newer ones
    ],
    ids=["500", "404"],
)
def test_a_preview_that_immich_has_lost_costs_only_its_photo(hours, api, immich, ollama, reply):
    good = fill(api, 5)
    lost = api.add(picture=servers.picture())
    immich.script("GET", f"{lost}/thumbnail", reply, forever=True)
    with hours.batch(api, ollama) as run:
        pass
    assert run.counts == {"described": 5, "failed": 1}
    assert api.texts() == good | {lost: ""}


@pytest.mark.measured
@pytest.mark.parametrize("keys", [1, 2])
def test_a_key_that_is_revoked_stops_only_the_photos_of_its_user(hours, api, ollama, keys):
    immich = api.server
    immich.keys["bob-key"] = FakeKey("bob")
    mine = [immich.add(f"{n}.jpg").id for n in range(12)]
    theirs = [immich.add(owner="bob").id for _ in range(12)]

    def answer(image: bytes, prompt: str) -> str:
        immich.keys.pop("alice-key", None)
        return servers.told(image)

    ollama.answer = answer
    given = ["--immich-api-keys", ",".join(["alice-key", "bob-key"][:keys])]
    with hours.batch(api, ollama, *given, "--max-concurrent", "2") as run:
        pass
    assert run.code == (1 if keys == 2 else 2)
    refusal = ia.t("immich_key_refused", why="Invalid API key")
    said = ia.t("key_refused", number=1, why=refusal) if keys == 2 else refusal
    assert run.lines(refusal) == [said]
    assert {immich.assets[id].description for id in mine} == {""}
    assert all(immich.assets[id].description for id in theirs) == (keys == 2)
    if keys == 2:
        assert run.counts == {"described": 12, "skipped": 12}


def test_webp_reaches_the_model_as_jpeg(library, model, command):
    id = library.add(picture=servers.picture("blue", "WEBP"))
    done = command(*library.argv, *asking(model))
    assert (done.returncode, done.stderr) == (0, "")
    [(image, _)] = model.asked
    assert image.startswith(b"\xff\xd8\xff")
    assert library.texts() == {id: servers.told(image)}
    assert "blue" in servers.told(image)


def test_a_preview_outside_the_root_is_never_read(database, tmp_path, ollama, command):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "private.jpeg").write_bytes(servers.picture("red"))
    root = database.photos.root
    (root / "thumbs" / "linked").symlink_to(outside)
    (root / "thumbs" / "link.jpeg").symlink_to(outside / "private.jpeg")
    paths = [
        "/data/thumbs/../../outside/private.jpeg",
        f"/data/thumbs/{outside}/private.jpeg",
        f"{outside}/private.jpeg",
        "/data/thumbs/linked/private.jpeg",
        "/data/thumbs/link.jpeg",
    ]
    good = fill(database, 6)
    ids = [database.add(picture=servers.picture("red")) for _ in paths]
    for id, path in zip(ids, paths, strict=True):
        database.photos.run('UPDATE {file} SET "path" = %s WHERE "assetId" = %s', path, id)
    done = command(*database.argv, *asking(ollama))
    assert done.returncode == 1
    *lines, last = done.stderr.splitlines()
    assert sorted(lines) == sorted(
        failure(id, "photo.jpg", "preview_outside", path=path)
        for id, path in zip(ids, paths, strict=True)
    )
    assert last.startswith(tally(described=6, failed=5))
    assert database.texts() == dict.fromkeys(ids, "") | good


def test_the_root_itself_may_be_a_link(database, tmp_path, ollama, command):
    wanted = fill(database, 2)
    link = tmp_path / "link"
    link.symlink_to(database.photos.root)
    done = command(*database.argv, *asking(ollama), "--immich-root", str(link))
    assert (done.returncode, database.texts()) == (0, wanted)


# --- Odd answers -----------------------------------------------------------------------------


UNUSABLE = {
    "empty": (servers.empty(), "answer_empty"),
    "blank": (Answer(" \n\t "), "answer_empty"),
    "digits": (Answer("1.50"), "answer_empty"),
    "only thoughts": (Answer("<think>A red square? Or"), "answer_empty"),
    "cut": (servers.cut("A red"), "answer_cut"),
    "endless": (Answer("a red square and " * 200), "answer_repeats"),
    "no JSON": (Reply(200, b'{"message": '), "not_json"),
    "HTML": (Reply(200, "<html><body>Sign in</body></html>"), "not_json"),
    "other JSON": (Reply(200, b'["a red square"]'), "answer_empty"),
    "deep JSON": (Reply(200, b"[" * 100_000), "not_json"),
    "50 MB": (Reply(200, b" " * 50_000_000), "reply_too_large"),
    "500": (Reply(500, b'{"error": "out of memory"}'), "host_failed"),
}
USABLE = {
    "control characters": "A \0red\x1b[31m\r\n squ\x07are\u0085.\x7f",
    "thoughts": "<think>It is red.</think>\n\nA red square.",
    "lead-in": "Here is a description of the photo: A red square.",
    "surrogate": "A red \ud83d square.",
    "quotes": '"A red square."',
}
CLEANED = {
    "control characters": "A red[31m\n square.",
    "surrogate": "A red  square.",
}


def test_an_unusable_answer_fails_its_photo_after_three_tries(api, model, command):
    good = fill(api, 2)
    pictures = {name: servers.own_picture(n) for n, name in enumerate(UNUSABLE, 100)}
    ids = {name: api.add(name, picture=picture) for name, picture in pictures.items()}
    answer_by_picture(model, {pictures[name]: UNUSABLE[name][0] for name in UNUSABLE})
    done = command(*api.argv, *asking(model), *NO_PAUSE)
    assert done.returncode == 1
    [chat] = {exchange.path for exchange in model.find(*CHATS)}
    fields = {"url": model.url + chat, "tokens": 4096, "status": 500, "why": "out of memory"}
    *lines, last = done.stderr.splitlines()
    assert sorted(lines) == sorted(
        failure(ids[name], name, key, **fields) for name, (_, key) in UNUSABLE.items()
    )
    assert last.startswith(tally(described=2, failed=len(UNUSABLE)))
    assert api.texts() == dict.fromkeys(ids.values(), "") | good
    assert len(about_photos(model)) == 2 + 3 * len(UNUSABLE) - 2  # one would be cut again
    notes = api.notes()
    failed = {name: notes[id][ia.KEY]["failed"] for name, id in ids.items()}
    assert failed == {name: key for name, (_, key) in UNUSABLE.items()}


def test_what_an_answer_has_too_much_is_taken_away(api, model, command):
    pictures = {name: servers.own_picture(n) for n, name in enumerate(USABLE)}
    wanted = {
        api.add(picture=picture): CLEANED.get(name, "A red square.")
        for name, picture in pictures.items()
    }
    answer_by_picture(model, {pictures[name]: Answer(text) for name, text in USABLE.items()})
    done = command(*api.argv, *asking(model))
    assert (done.returncode, done.stderr) == (0, "")
    assert api.texts() == wanted
    assert len(about_photos(model)) == len(USABLE)


# --- People and the model at the same time ---------------------------------------------------


def meanwhile(act: Callable[[], Any]) -> Callable[[bytes, str], str]:
    """A model that thinks while this happens."""

    def answer(image: bytes, prompt: str) -> str:
        act()
        return servers.told(image)

    return answer


def test_what_a_person_types_meanwhile_stays(hours, library, ollama):
    id = library.add(picture=servers.picture())
    ollama.answer = meanwhile(lambda: library.describe(id, "Our first car."))
    with hours.batch(library, ollama) as run:
        pass
    assert run.counts == {"skipped": 1}
    assert library.texts() == {id: "Our first car."}
    assert library.writes() == []
    assert library.notes() == {id: {}}


@pytest.mark.parametrize("fate", ["trash", "delete"])
def test_a_photo_that_goes_meanwhile_is_no_failure(hours, library, fate, ollama):
    id = library.add(picture=servers.picture())
    ollama.answer = meanwhile(lambda: getattr(library, fate)(id))
    with hours.batch(library, ollama) as run:
        pass
    assert (run.code, run.counts) == (0, {"skipped": 1})
    assert library.writes() == []


# --- Immich and PostgreSQL away --------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "trouble"),
    [
        ("api", "gone"),
        ("api", "bad gateway"),
        ("api", "maintenance"),
        ("api", "database_down"),
        ("database", "gone"),
    ],
)
def test_a_short_outage_costs_nothing_but_time(hours, access, trouble, ollama, request):
    library = request.getfixturevalue(access)
    wanted = fill(library, 12)

    def answer(image: bytes, prompt: str) -> str:
        if len(ollama.asked) == 3:  # two have written, and keep a connection that will break
            library.begin(trouble)
        return servers.told(image)

    ollama.answer = answer
    with hours.batch(library, ollama, "--max-concurrent", "2") as run:
        run.at(60, lambda: library.end(trouble))
    assert run.counts == {"described": 12}
    assert (
        len(run.lines(ia.t("waiting", why=""))) == len(run.lines(ia.t("back", time="")[:-1])) == 1
    )
    assert library.texts() == wanted
    assert sorted(library.writes()) == sorted(wanted.items())
    assert ollama.count(*CHATS) == 12


def test_a_write_whose_answer_is_lost_is_not_repeated(hours, api, immich, ollama):
    immich.keys[immich.key] = FakeKey("alice", [*servers.MINIMAL, "user.read"])
    wanted = fill(api, 3)
    immich.script("PUT", "/api/assets/[0-9a-f-]{36}$", CUT)
    with hours.batch(api, ollama) as run:
        pass
    assert run.counts == {"described": 3}
    assert sorted(api.writes()) == sorted(wanted.items())


@pytest.mark.measured
def test_a_long_outage_ends_the_run_with_one_line(hours, library, ollama):
    fill(library, 6)
    ollama.script(*CHATS, lambda _: library.begin("gone"))
    try:
        with hours.batch(library, ollama, "--max-concurrent", "1") as run:
            pass
    finally:
        library.end("gone")
    assert (run.fatal, run.ended) == ("library_away", 120)  # as --wait-timeout has it
    assert len(run.said) == 2  # that it waits, and that it gave up
    assert set(library.texts().values()) == {""}


# --- Memory ----------------------------------------------------------------------------------

# getrusage would tell the parent's memory where that is more
PEAK = """
import sys, immich_analyze
code = immich_analyze.main()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def peak(*argv: str) -> float:
    """The most memory a run took, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=servers.PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout) / 1024


def multiply(library: World, number: int) -> None:
    """Bring the only photo to so many that are all alike, sooner than one could add them."""
    if isinstance(library, SqlWorld):
        multiply_rows(library.photos, number)
    else:
        multiply_assets(library.server, number)


def multiply_rows(photos: sandbox.PhotoLibrary, number: int) -> None:
    new = "lpad(to_hex(n), 32, '0')"
    for table, own in {
        "asset": f"'id', {new}, 'checksum', '\\x' || {new}",
        "exif": f"'assetId', {new}",
        "status": f"'assetId', {new}",
        "file": f"'assetId', {new}, 'id', {new}",
    }.items():
        photos.run(
            f"INSERT INTO {{{table}}} SELECT row.*"
            f" FROM (SELECT t FROM {{{table}}} t) first, generate_series(2, {number}) n,"
            f" jsonb_populate_record(first.t, jsonb_build_object({own})) row"
        )
    photos.run("ANALYZE")


def multiply_assets(server: FakeImmich, number: int) -> None:
    [first] = server.assets.values()
    item = server._item(first, True).decode()
    taken = servers._milliseconds(first.created)
    for n in range(1, number):
        asset = copy.copy(first)
        id, created = server._uuid(), first.created + timedelta(minutes=n)
        own = item.replace(first.id, id).replace(taken, servers._milliseconds(created)).encode()
        vars(asset).update(id=id, created=created, rendered={True: own})
        server.assets[id] = asset


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_described_photos_take_no_memory_and_few_requests(library, ollama):
    library.add(picture=servers.picture(), description="By a person.")
    few = peak(*library.argv, *asking(ollama))
    multiply(library, 30_000)
    assert peak(*library.argv, *asking(ollama)) < few + 15  # a leak of half a kB a photo shows
    assert ollama.count(*CHATS) == 0
    if isinstance(library, ApiWorld):
        listed = listings(library.server)
        assert listed["timeline"] <= 1 + 30_000 / 990 + 2
        assert listed["archive"] <= 1 + 2
        assert len(library.server.find("GET|PUT", "/api/assets/")) <= 2
