"""Whole runs: what a library and the model hosts see of one batch, counted exactly."""

import base64
import copy
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
    asking,
    check_note,
    failure,
    fill,
    tally,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow


@pytest.fixture(params=["ollama", "llamacpp"])
def model(request: pytest.FixtureRequest) -> FakeServer:
    return request.getfixturevalue(request.param)


class Pause(ia.Stop):
    """A stop event whose waits take until the test lets them go, and none after that."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self._waits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.release()
        assert self.let_go.wait(servers.PATIENCE), "nobody let go"
        return self.is_set()

    def wait_for_a_wait(self) -> None:
        assert self._waits.acquire(timeout=servers.PATIENCE), "nothing was waited for"


def described(config: ia.Config, stop: threading.Event) -> tuple[Any, bool]:
    """Run to the end; the counts, and whether all of the library could be reached."""
    done = ia.Tally()
    complete = ia.serve(config, stop, done)
    return done.counts, complete


@contextmanager
def describing(library: World, model: FakeServer, stop: Pause, *more: str) -> Iterator[Future[Any]]:
    """A run in this process, with a stop event of the test's own; it ends with the block."""
    config = ia.parse([*library.argv, *asking(model), *more], {})
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(described, config, stop)
        finally:
            stop.set()
            stop.let_go.set()
            model.gate.set()


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


def fill_with_445(library: World) -> dict[str, str]:
    """300 photos to describe among 145 of every kind that is left alone."""
    wanted = {}
    for n in range(445):
        picture, rest = servers.own_picture(n), n % 3 == 2 and n < 435
        if rest:
            library.add(picture=picture, **LEFT_ALONE[n % len(LEFT_ALONE)])
        else:
            visibility = "archive" if n % 10 == 0 else "timeline"
            wanted[library.add(picture=picture, visibility=visibility)] = servers.told(picture)
    return wanted


def test_what_has_no_description_gets_one_and_nothing_else_is_touched(library, ollama, command):
    wanted = fill_with_445(library)
    before = library.state()
    done = command(*library.argv, *asking(ollama))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert library.changes_since(before) == {id: {"description": wanted[id]} for id in wanted}
    assert sorted(library.writes()) == sorted(wanted.items())
    assert ollama.count(*CHATS) == len(ollama.asked) == len(wanted) == 300

    again = command(*library.argv, *asking(ollama))
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert ollama.count(*CHATS) == len(library.writes()) == 300


def listings(server: FakeImmich) -> Counter[str]:
    """How many requests listed photos of each visibility."""
    return Counter(search.json["visibility"] for search in server.find("POST", "/search/metadata"))


def test_the_api_is_asked_four_times_for_each_described_photo(api, immich, ollama, process):
    immich.keys[immich.key] = FakeKey("alice", [*servers.MINIMAL, "user.read"])
    wanted = fill(api, 50)
    for picture in (servers.picture("red"), servers.picture("blue")):
        api.add(picture=picture, description="By a person.")
    assert process(*api.argv, *asking(ollama)).returncode == 0
    asked = Counter(exchange.operation.name for exchange in immich.exchanges)
    each = ("viewAsset", "getAssetMetadataByKey", "getAssetInfo", "updateAsset")
    searches = [search.json for search in immich.find("POST", "/search/metadata")]
    assert asked.pop("searchAssets") == len(searches)
    once = {"getServerVersion": 2, "getMyApiKey": 1, "getMyUser": 1, "updateBulkAssetMetadata": 1}
    assert asked == once | dict.fromkeys(each, 50)
    read_back = [search["visibility"] for search in searches if "updatedAfter" in search]
    assert read_back == ["timeline"]  # where all of them were found
    for call in each:
        ids = [x.params["id"] for x in immich.exchanges if x.operation.name == call]
        assert sorted(ids) == sorted(wanted)
    assert listings(immich).keys() == {"timeline", "archive"}
    assert max(listings(immich).values()) <= 50 / 990 + 2


def test_a_real_model_names_the_colour_of_each_photo(library, real_llamacpp, command):
    colours = [*tiny_vlm.COLOURS] * 2
    wanted = {
        library.add(picture=sandbox.draw(colour)): sandbox.answer(colour) for colour in colours
    }
    done = command(*library.argv, *asking(real_llamacpp), "--max-concurrent", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert library.texts() == wanted


def test_a_picture_the_real_model_cannot_decode_fails_alone(library, real_llamacpp, command):
    broken = library.add("broken.jpg", picture=b"\xff\xd8\xff" + bytes(5000) + b"\xff\xd9")
    whole = library.add(picture=sandbox.draw("green"))
    done = command(*library.argv, *asking(real_llamacpp))
    assert done.returncode == 1
    why, last = done.stderr.splitlines()
    assert why.startswith(f"broken.jpg ({broken}): {real_llamacpp.url}")
    assert last.startswith(tally(described=1, failed=1))
    assert library.texts() == {broken: "", whole: sandbox.answer("green")}


# --- Model hosts -----------------------------------------------------------------------------


def test_no_more_requests_are_in_flight_than_allowed_and_no_fewer(api, model):
    wanted = fill(api, 15)
    three = threading.Barrier(3, timeout=servers.PATIENCE)

    def answer(image: bytes, prompt: str) -> str:
        three.wait()
        return servers.told(image)

    model.answer = answer
    with Running(*api.argv, *asking(model), "--max-concurrent", "3") as tool:
        assert tool.end() == 0
    assert tool.said == []
    assert model.most_in_flight == 3
    assert api.texts() == wanted


def test_while_all_places_are_taken_the_next_previews_are_fetched(api, immich, ollama):
    wanted = fill(api, 8)
    fourth, fifth = list(wanted)[-4], list(wanted)[-5]  # the newest are listed first
    ollama.hold(*CHATS)
    immich.hold("GET", f"({fourth}|{fifth})/thumbnail")
    with Running(*api.argv, *asking(ollama), "--max-concurrent", "3") as tool:
        ollama.wait_for(3)
        immich.wait_for(2)
        immich.gate.set()
        ollama.gate.set()
        assert tool.end() == 0
    assert ollama.most_in_flight == 3
    assert api.texts() == wanted


@pytest.fixture
def nothing_free(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released whenever a worker finds all places at the model hosts taken."""
    told = threading.Semaphore(0)

    class Places(threading.BoundedSemaphore):
        def __enter__(self) -> bool:
            if not self.acquire(blocking=False):
                told.release()
                self.acquire()
            return True

    monkeypatch.setattr(threading, "BoundedSemaphore", Places)
    return told


def test_whoever_finds_no_free_place_waits_with_a_picture(api, immich, ollama, nothing_free):
    fill(api, 8)
    ollama.hold(*CHATS)
    with describing(api, ollama, Pause(), "--max-concurrent", "3") as job:
        ollama.wait_for(3)
        assert nothing_free.acquire(timeout=servers.PATIENCE)
        assert nothing_free.acquire(timeout=servers.PATIENCE)
        assert (ollama.in_flight, immich.count("GET", "/thumbnail")) == (3, 5)
        ollama.gate.set()
        assert job.result(servers.PATIENCE)[0] == {ia.Outcome.DESCRIBED: 8}
    assert ollama.most_in_flight == 3


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


def test_a_busy_host_rests_and_its_photo_goes_to_the_other(api, ollama, other, command):
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


def test_a_poisonous_picture_is_tried_on_each_host_and_rests_none(api, ollama, other, command):
    wanted, poison = fill(api, 30), servers.own_picture(1000)
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


@pytest.mark.parametrize("trouble", ["gone", "hangs", "fails"])
def test_a_host_that_dies_costs_no_photo(library, ollama, other, trouble):
    wanted = fill(library, 40)
    ollama.hold(*CHATS)
    limit = "3" if trouble == "hangs" else str(servers.PATIENCE)
    argv = [*library.argv, *asking(ollama, other), "--timeout", limit, "--max-concurrent", "8"]
    with Running(*argv, *NO_PAUSE, "--log-level", "warning") as tool:
        ollama.wait_for(4)
        if trouble == "gone":
            ollama.close()
        elif trouble == "fails":
            ollama.script(*CHATS, Reply(500, {"error": "no memory"}), forever=True)
            ollama.gate.set()
        assert tool.end() == 0
    ollama.gate.set()
    assert len([line for line in tool.said if ollama.url in line]) == 1
    assert library.texts() == wanted
    assert sorted(library.writes()) == sorted(wanted.items())


def test_several_instances_share_a_library(database, ollama):
    """Each photo is asked about once, whoever takes it."""
    wanted = fill(database, 60)
    argv = [*database.argv, *asking(ollama), "--max-concurrent", "2"]
    with Running(*argv) as one, Running(*argv) as two, Running(*argv) as three:
        assert [tool.end() for tool in (one, two, three)] == [0, 0, 0]
    assert database.texts() == wanted
    assert sorted(database.writes()) == sorted(wanted.items())
    assert ollama.count(*CHATS) == 60


def test_shares_of_a_library_are_disjoint_and_together_all(api, ollama, command):
    wanted = fill(api, 30)
    for number in range(1, 4):
        before = set(dict(api.writes()))
        assert command(*api.argv, *asking(ollama), "--shard", f"{number}/3").returncode == 0
        assert set(dict(api.writes())) - before
    assert sorted(api.writes()) == sorted(wanted.items())


# --- Bad pictures ----------------------------------------------------------------------------


def test_a_bad_preview_costs_only_its_photo(library, ollama, command):
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
    done = command(*library.argv, *asking(ollama))
    assert done.returncode == 1
    *lines, last = done.stderr.splitlines()
    assert sorted(lines) == sorted(failure(ids[name], name, key) for name, (_, key) in bad.items())
    assert last.startswith(tally(described=3, failed=4))
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
def test_a_preview_that_immich_has_lost_costs_only_its_photo(api, immich, ollama, stop, reply):
    good = fill(api, 5)
    lost = api.add(picture=servers.picture())
    immich.script("GET", f"{lost}/thumbnail", reply, forever=True)
    done = ia.Tally()
    ia.serve(ia.parse([*api.argv, *asking(ollama)], {}), stop, done)
    assert done.counts == {ia.Outcome.DESCRIBED: 5, ia.Outcome.FAILED: 1}
    assert api.texts() == good | {lost: ""}


@pytest.mark.parametrize("keys", [1, 2])
def test_a_key_that_is_revoked_stops_only_the_photos_of_its_user(command, immich, ollama, keys):
    immich.keys["bob-key"] = FakeKey("bob")
    mine = [immich.add(f"{n}.jpg").id for n in range(12)]
    theirs = [immich.add(owner="bob").id for _ in range(12)]
    ollama.hold(*CHATS)
    argv = ["--immich-api-url", immich.url, *asking(ollama), "--max-concurrent", "2"]
    argv += ["--immich-api-keys", ",".join(["alice-key", "bob-key"][:keys])]
    with Running(*argv) as tool:
        ollama.wait_for(2)
        del immich.keys["alice-key"]
        ollama.gate.set()
        assert tool.end() == (1 if keys == 2 else 2)
    refusal = ia.t("immich_key_refused", why="Invalid API key")
    [line] = [line for line in tool.said if refusal in line]
    assert line == (ia.t("key_refused", number=1, why=refusal) if keys == 2 else refusal)
    assert {immich.assets[id].description for id in mine} == {""}
    assert all(immich.assets[id].description for id in theirs) == (keys == 2)
    if keys == 2:
        assert tool.said[-1].startswith(tally(described=12, skipped=12))
        for asset in map(immich.assets.get, theirs):
            check_note(asset.notes, asset.description)


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


def answer_by_picture(model: FakeServer, answers: Mapping[bytes, Any]) -> None:
    """Make the model say this to these pictures: a Reply as it is, all else as its words."""
    behave = model.behave

    def behaving(exchange: servers.Exchange) -> Reply:
        sent = (picture for picture in answers if base64.b64encode(picture) in exchange.data)
        answer = answers.get(next(sent, b""))
        return answer if isinstance(answer, Reply) else behave(exchange)

    model.behave = behaving
    model.answer = lambda image, _: answers.get(image) or servers.told(image)


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
    one = ["--max-concurrent", "1"]  # or some would be asked about while the host is doubted
    done = command(*api.argv, *asking(model), *NO_PAUSE, *one)
    assert done.returncode == 1
    [chat] = {exchange.path for exchange in model.find(*CHATS)}
    fields = {"url": model.url + chat, "tokens": 4096, "status": 500, "why": "out of memory"}
    *lines, last = done.stderr.splitlines()
    assert sorted(lines) == sorted(
        failure(ids[name], name, key, **fields) for name, (_, key) in UNUSABLE.items()
    )
    assert last.startswith(tally(described=2, failed=len(UNUSABLE)))
    assert api.texts() == dict.fromkeys(ids.values(), "") | good
    good_one = ia.good_picture().base64.decode()
    asked = [exchange for exchange in model.find(*CHATS) if good_one not in str(exchange.json)]
    assert len(asked) == 2 + 3 * len(UNUSABLE)
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
    assert model.count(*CHATS) == len(USABLE)


# --- People and the model at the same time ---------------------------------------------------


def test_what_a_person_types_meanwhile_stays(library, ollama):
    id = library.add(picture=servers.picture())
    ollama.hold(*CHATS)
    with Running(*library.argv, *asking(ollama), "--log-level", "info") as tool:
        ollama.wait_for()
        library.describe(id, "Our first car.")
        ollama.gate.set()
        assert tool.end() == 0
    assert tool.said[-1].startswith(tally(skipped=1))
    assert library.texts() == {id: "Our first car."}
    assert library.writes() == []
    assert library.notes() == {id: {}}


@pytest.mark.parametrize("fate", ["trash", "delete"])
def test_a_photo_that_goes_meanwhile_is_no_failure(library, fate, ollama):
    id = library.add(picture=servers.picture())
    ollama.hold(*CHATS)
    with Running(*library.argv, *asking(ollama), "--log-level", "info") as tool:
        ollama.wait_for()
        getattr(library, fate)(id)
        ollama.gate.set()
        assert tool.end() == 0
    assert tool.said[-1].startswith(tally(skipped=1))
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
def test_a_short_outage_costs_nothing_but_time(access, trouble, ollama, request):
    library = request.getfixturevalue(access)
    wanted = fill(library, 12)
    ollama.hold(*CHATS)
    stop = Pause()
    with describing(library, ollama, stop, "--max-concurrent", "2") as job:
        ollama.wait_for(2)
        ollama.gate.set()  # so that two have written, and keep a connection that will break
        ollama.hold(*CHATS)
        ollama.wait_for(2)
        library.begin(trouble)
        ollama.gate.set()
        stop.wait_for_a_wait()
        library.end(trouble)
        stop.let_go.set()
        counts, _ = job.result(servers.PATIENCE)
    assert counts == {ia.Outcome.DESCRIBED: 12}
    assert library.texts() == wanted
    assert sorted(library.writes()) == sorted(wanted.items())
    assert ollama.count(*CHATS) == 12


def test_a_write_whose_answer_is_lost_is_not_repeated(api, immich, ollama):
    immich.keys[immich.key] = FakeKey("alice", [*servers.MINIMAL, "user.read"])
    wanted = fill(api, 3)
    immich.script("PUT", "/api/assets/", CUT)
    stop = Pause()
    stop.let_go.set()
    with describing(api, ollama, stop) as job:
        counts, _ = job.result(servers.PATIENCE)
    assert counts == {ia.Outcome.DESCRIBED: 3}
    assert sorted(api.writes()) == sorted(wanted.items())


def test_a_long_outage_ends_the_run_with_one_line(library, ollama):
    fill(library, 6)
    ollama.hold(*CHATS)
    argv = [*library.argv, *asking(ollama), "--max-concurrent", "2", "--wait-timeout", "0.5"]
    with Running(*argv) as tool:
        ollama.wait_for(2)
        library.begin("gone")
        try:
            ollama.gate.set()
            assert tool.end() == 2
        finally:
            library.end("gone")
    assert len(tool.said) == 1
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
    multiply(library, 100_000)
    assert peak(*library.argv, *asking(ollama)) < few + 30
    assert ollama.count(*CHATS) == 0
    if isinstance(library, ApiWorld):
        listed = listings(library.server)
        assert listed["timeline"] <= 1 + 100_000 / 990 + 2
        assert listed["archive"] <= 1 + 2
        assert len(library.server.find("GET|PUT", "/api/assets/")) <= 2
