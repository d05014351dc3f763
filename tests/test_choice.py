"""Which photos a run describes (--limit, --album …), and --dry-run, which writes nothing."""

import random
import re
import time
from collections.abc import Iterator
from typing import Any

import facts
import pytest
import servers
from facts import Album
from hours import with_health
from servers import FakeImmich, FakeKey
from worlds import (
    CHATS,
    NO_PAUSE,
    READABLE,
    ApiWorld,
    SqlWorld,
    World,
    answer_by_picture,
    asking,
    failure_notes,
    fill,
    mainly,
    readable_immich,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow

LIBRARY = facts.own_id("an external library")
NOBODY = facts.own_id("no such thing")


@pytest.fixture
def readable() -> Iterator[ApiWorld]:
    """A library behind a key that may list albums."""
    with readable_immich("3.1.0") as server:
        yield ApiWorld(server)
    server.check()


def described(library: World) -> set[str]:
    """The photos that got a text."""
    return {id for id, text in library.texts().items() if text}


# --- Filters -----------------------------------------------------------------------------------

ALBUMS = ("Summer", "Home, 2019", "Empty of these")
DAYS = ["2019-12-31T23:30", "2020-01-01T00:00", "2020-01-01T12:00", "2020-01-02T00:00"]
FILTERS: list[tuple[list[str], Any]] = [
    ([], lambda photo: True),
    (["--album", "Summer"], lambda photo: "Summer" in photo["albums"]),
    (["--album", "Summer", "--album", "Home, 2019"], lambda photo: photo["albums"]),
    (["--favorites"], lambda photo: photo["favorite"]),
    (["--library", LIBRARY], lambda photo: photo["library"]),
    (["--taken-after", "2020-01-01"], lambda photo: photo["taken"] >= "2020-01-01"),
    (["--taken-after", "2020-01-01T12:00"], lambda photo: photo["taken"] >= "2020-01-01T12"),
    (["--taken-before", "2020-01-01"], lambda photo: photo["taken"] < "2020-01-02"),
    (["--taken-before", "2020-01-01 12:00"], lambda photo: photo["taken"] < "2020-01-01T12"),
    (
        ["--album=Summer", "--favorites", "--taken-after=2020-01-01", "--taken-before=2020-01-01"],
        lambda photo: (
            "Summer" in photo["albums"] and photo["favorite"] and "2020-01-01" in photo["taken"]
        ),
    ),
]


def fill_at_random(library: World) -> dict[str, dict[str, Any]]:
    """Put in photos that differ in all that can be asked for; what each was put in with."""
    rng, known = random.Random(12), {}
    for album in ALBUMS:
        library.add_album(Album(album, "alice", id=facts.own_id("alice", album)))
    for number in range(12):
        photo = {
            "albums": rng.sample(ALBUMS[:2], rng.randint(0, 2)),
            "favorite": rng.random() < 0.7,
            "library": rng.choice([None, LIBRARY]),
            "taken": rng.choice(DAYS),
            "visibility": rng.choice(["timeline", "archive"]),
        }
        picture = servers.own_picture(number)
        known[library.add(picture=picture, owner="alice", **photo)] = photo
    return known


@pytest.mark.parametrize(
    ("argv", "chosen"), FILTERS, ids=[" ".join(f[0]) or "all" for f in FILTERS]
)
def test_only_what_all_filters_choose_is_described(hours, choosable, ollama, argv, chosen):
    known = fill_at_random(choosable)
    with hours.batch(choosable, ollama, *argv) as run:
        pass
    wanted = {id for id, photo in known.items() if chosen(photo)}
    assert (run.code, described(choosable)) == (0, wanted)
    assert len(ollama.find(*CHATS)) == len(wanted) > 0


def test_only_what_all_filters_choose_is_taken_back(hours, choosable, ollama):
    argv, chosen = FILTERS[-1]
    known = fill_at_random(choosable)
    with hours.batch(choosable, ollama):
        pass
    with hours.batch(choosable, "--undo", *argv) as run:
        pass
    assert run.code == 0
    assert known.keys() - described(choosable) == {id for id in known if chosen(known[id])} != set()


@pytest.fixture(params=["api", "database"])
def choosable(request: Any) -> World:
    """Each of the two, where albums can be listed."""
    return request.getfixturevalue({"api": "readable"}.get(request.param, request.param))


def test_every_generation_lists_what_is_chosen(hours, any_library, ollama):
    known = fill_at_random(any_library)
    old = isinstance(any_library, ApiWorld) and any_library.server.version < (1, 135)
    argv = ["--favorites", "--library", LIBRARY, "--taken-before", "2020-01-01"]
    argv += [] if old else ["--album", "Summer"]
    with hours.batch(any_library, ollama, *argv, "--limit", "1000") as run:
        pass
    wanted = {
        id
        for id, photo in known.items()
        if photo["favorite"] and photo["library"] and photo["taken"] < "2020-01-02"
        if old or "Summer" in photo["albums"]
    }
    assert (run.code, described(any_library)) == (0, wanted)
    assert wanted


@pytest.mark.parametrize("mode", ["combined", "monitor"])
def test_a_service_describes_only_what_is_chosen(hours, choosable, ollama, mode):
    options = ["--mode", mode, "--favorites", "--taken-after", "2020-01-01"]
    options += ["--api-poll-interval", "1000"]
    old = choosable.add(picture=servers.own_picture(0), favorite=True, taken="2020-02-02T10:00")
    with hours.service(choosable, ollama, *options) as run:
        run.until(60)
        more = {"taken": "2020-01-01T00:00"}
        new = choosable.add(picture=servers.own_picture(1), favorite=True, **more)
        choosable.add(picture=servers.own_picture(2), **more)
        choosable.add(picture=servers.own_picture(3), favorite=True, taken="2019-12-31T23:59")
        run.until(3700)  # there is an hourly sweep
    assert described(choosable) == {old, new}  # one of just before the start arrives, too


def test_photos_are_named_by_id_or_link(command, library, ollama):
    ids = [library.add(picture=servers.own_picture(n)) for n in range(5)]
    link = f"https://photos.example.org/albums/{NOBODY}/photos/{ids[1].upper()}"
    done = command(*library.argv, *asking(ollama), "--photo", f"{ids[0]},{link}", "--photo", ids[3])
    assert (done.returncode, done.stderr) == (0, "")
    assert described(library) == {ids[0], ids[1], ids[3]}


def test_a_photo_that_is_named_still_obeys_the_policy(command, library, ollama):
    id = library.add(picture=servers.own_picture(0), description="By a person.")
    assert command(*library.argv, *asking(ollama), "--photo", id).returncode == 0
    assert library.texts() == {id: "By a person."}
    done = command(*library.argv, *asking(ollama), "--photo", id, "-O", "all")
    assert done.returncode == 0
    assert library.texts() == {id: servers.told(servers.own_picture(0))}


@pytest.mark.measured
def test_a_photo_or_album_that_is_not_there_ends_the_run(command, choosable, ollama):
    known = choosable.add(picture=servers.own_picture(0), owner="alice", albums=["Summer"])
    trashed = choosable.add(picture=servers.own_picture(1), trashed=True)
    argv, seen = [*choosable.argv, *asking(ollama)], "Summer"
    for id in (NOBODY, trashed):
        done = command(*argv, "--photo", known, "--photo", id)
        assert (done.returncode, done.stderr) == (2, ia.t("unknown_photo", photo=id) + "\n")
    link = f"https://photos.example.org/albums/{NOBODY}?at={known}"
    no_uuid = "00000000-0000-0000-0000-000000000001"
    for album in ("Winter", "summer", NOBODY, link, f"https://x/albums/{NOBODY}/photos/{known}"):
        done = command(*argv, "--album", "Summer", "--album", album)
        assert done.returncode == 2
        assert (NOBODY if NOBODY in album else album) in done.stderr
        assert seen in done.stderr
    if isinstance(choosable, SqlWorld):  # the fake would not let the tool ask for it
        assert no_uuid in command(*argv, "--album", no_uuid).stderr
    assert ollama.find(*CHATS) == []


def test_an_album_name_that_two_albums_have_is_refused(command, choosable, ollama):
    for id in "12":
        choosable.add_album(Album("Summer", "alice", id=facts.own_id("album", id)))
    argv = [*choosable.argv, *asking(ollama)]
    assert command(*argv, "--album", "Summer").returncode == 2
    assert command(*argv, "--album", facts.own_id("album", "1")).returncode == 0


@pytest.mark.measured
def test_an_album_id_needs_no_right_to_list_albums(command, api, immich, ollama):
    inside = api.add(picture=servers.own_picture(0), albums=[Album("Summer", id=LIBRARY)])
    api.add(picture=servers.own_picture(1))
    done = command(*api.argv, *asking(ollama), "--album", LIBRARY)
    assert (done.returncode, described(api)) == (0, {inside})
    done = command(*api.argv, *asking(ollama), "--album", "Summer")
    assert (done.returncode, immich.find("GET", "/api/albums")) == (2, [])
    assert ia.t("immich_permission_missing", permission="album.read") in done.stderr


def test_of_a_shared_album_only_photos_of_the_own_user_are_described(hours, readable, ollama):
    shared = Album("Party", "bob", shared=["alice"])
    theirs = readable.add(picture=servers.own_picture(0), owner="bob", albums=[shared])
    ours = readable.add(picture=servers.own_picture(1), owner="alice", albums=[shared])
    with hours.batch(readable, ollama, "--album", "Party") as run:
        pass
    assert (run.code, described(readable)) == (0, {ours})
    assert theirs not in described(readable)


def test_the_owner_tells_albums_of_one_name_apart_in_the_database(command, database, ollama):
    ids = {
        owner: database.add(picture=servers.own_picture(n), owner=owner, albums=["Summer"])
        for n, owner in enumerate(("alice", "bob"))
    }
    argv = [*database.argv, *asking(ollama)]
    done = command(*argv, "--album", "Summer")
    assert done.returncode == 2
    assert re.search(r": alice:Summer \([0-9a-f-]{36}\), bob:Summer \([0-9a-f-]{36}\)", done.stderr)
    assert command(*argv, "--album", "bob:Summer").returncode == 0
    assert described(database) == {ids["bob"]}
    assert command(*argv, "--album", "alice@example.org:Summer").returncode == 0
    assert described(database) == {*ids.values()}


def test_all_rights_that_albums_need_in_the_database_are_named_at_once(command, database, ollama):
    inside = database.add(picture=servers.own_picture(0), albums=[Album("Summer", id=LIBRARY)])
    tables = ("album", "album_asset", "album_user", "user")
    for role, read in (("describes", ()), ("reads_albums", tables)):
        uri = database.photos.restricted_role(role, "its secret", *read)
        argv = ["--postgres-url", uri, "--immich-root", str(database.photos.root)]
        done = command(*argv, *asking(ollama), "--album", LIBRARY)
        assert done.returncode == (0 if read else 2)
        grants = re.findall(r'GRANT SELECT( \([a-z, ]+\))? ON "?(\w+)"? TO', done.stderr)
        wanted = [(" (id, name, email)" * (table == "user"), table) for table in tables]
        assert sorted(grants) == ([] if read else sorted(wanted))
    assert described(database) == {inside}


@pytest.mark.measured
def test_releases_that_ignore_albums_are_not_asked_for_them(command, ollama):
    with readable_immich("1.132.3") as server:
        world = ApiWorld(server)
        world.add(picture=servers.own_picture(0))
        done = command(*world.argv, *asking(ollama), "--album", LIBRARY)
        assert (done.returncode, done.stderr) == (2, ia.t("albums_too_old") + "\n")
        assert described(world) == set()
    server.check()


@pytest.mark.measured
@pytest.mark.parametrize(
    "argv",
    [
        "--photo x",
        "--photo=",
        "--library Family",
        "--taken-after yesterday",
        "--taken-before 2020-02-30",
        "--taken-after 2020-01-01T10:00Z",
        "--taken-before 9999-12-31",
        "--limit 0",
        "--dry-run -c",
    ],
)
def test_nonsense_is_refused_at_once(command, api, ollama, argv):
    done = command(*api.argv, *asking(ollama), *argv.split())
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert api.server.exchanges == []


# --- The limit ---------------------------------------------------------------------------------


def test_a_limit_takes_the_newest_and_counts_only_what_was_described(hours, library, ollama):
    days = random.Random(3).sample(range(1, 29), 20)
    ids = {
        day: library.add(picture=servers.own_picture(day), taken=f"2024-05-{day:02}T10:00")
        for day in days
    }
    newest = sorted(ids, reverse=True)
    library.describe(ids[newest[0]], "By a person.")
    answer_by_picture(ollama, {servers.own_picture(newest[1]): "..."})
    with hours.batch(library, ollama, "--limit", "5", "--max-concurrent", "3", *NO_PAUSE) as run:
        pass
    wanted = {ids[day] for day in newest[2:7]}
    assert described(library) - {ids[newest[0]]} == wanted
    assert (run.counts["described"], run.counts["failed"]) == (5, 1)
    with hours.batch(library, ollama, "--limit", "100") as run:
        pass
    assert described(library) == {*ids.values()} - {ids[newest[1]]}


def test_few_photos_of_many_take_few_requests(hours, immich, api, ollama):
    for number in range(1200):
        taken = f"2020-{number % 12 + 1:02}-{number % 28 + 1:02}T10:00"
        api.add(picture=servers.own_picture(number % 20), taken=taken)
    with hours.batch(api, ollama, "--dry-run", "--limit", "3") as run:
        pass
    assert run.counts == {"described": 3}
    assert len(immich.find("POST", "/search/metadata")) <= 3
    assert len(immich.exchanges) <= 2 + 3 + 2 + 3 * 3  # start, listing, progress, the photos


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's clock is that of Tokyo."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("tokyo")
@mainly("database")
def test_a_service_describes_its_limit_each_day(hours, library, ollama):
    """On the first day of a backlog of five, on the second the rest of it and one that arrives."""
    fill(library, 5)
    now, day = hours.now().astimezone(), 24 * 3600.0
    midnight = day - (now - now.replace(hour=0, minute=0, second=0)).total_seconds()
    hours.sleep(midnight - 300)
    options = ["--limit", "3", "--max-concurrent", "1", "--api-poll-interval", "120"]
    with hours.service(library, ollama, *options, *with_health()) as run:
        for moment, number in ((290, 3), (310, 5)):
            run.until(moment)
            assert len(described(library)) == number
            assert run.health()[1]["status"] == "ok"
        for n in (30, 31):
            library.add(picture=servers.own_picture(n))
        run.until(900)
        assert len(described(library)) == 6
        assert run.health()[1]["status"] == "ok"


# --- Nothing is written ------------------------------------------------------------------------


def test_a_dry_run_prints_and_writes_nothing(command, library, ollama):
    wanted = fill(library, 12)
    failing = library.add("broken.jpg", picture=b"\xff\xd8\xff no picture \xff\xd9")
    before, notes = library.state(), library.notes()
    done = command(*library.argv, *asking(ollama), "--dry-run", "--limit", "50")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        ia.t("tally_dry_run", described=12, skipped=0, not_ready=0, failed=1)
    )
    for id, text in wanted.items():
        place = f"{library.server.url}/photos/{id}" if isinstance(library, ApiWorld) else id
        assert f"photo.jpg\n{place}\n\n{text}\n\n" in done.stdout
    assert (library.state(), library.notes(), library.writes()) == (before, notes, [])
    assert failing not in failure_notes(library)

    library.add(
        "\x1b[2J\nevil.jpg", picture=servers.own_picture(40), description="\x1b[0mOurs.\nYes."
    )
    done = command(
        *library.argv,
        *asking(ollama),
        "--dry-run",
        "--link-url",
        "photos.me/",
        "-p",
        "-O",
        "missing-ai",
    )
    assert done.stdout.count("http://photos.me/photos/") == 10
    assert "\ufffd[2J evil.jpg\n" in done.stdout
    assert "\ufffd[0mOurs.\nYes.\n\n[AI]\n" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_dry_run_needs_no_right_to_write(command, immich, api, database, ollama):
    immich.keys[immich.key] = FakeKey("alice", ("asset.read", "asset.view"))
    uri = database.photos.reading_role("reads", "its secret")
    sql = ["--postgres-url", uri, "--immich-root", str(database.photos.root)]
    for world, argv in ((api, api.argv), (database, sql)):
        fill(world, 3)
        done = command(*argv, *asking(ollama), "--dry-run")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("photo.jpg\n") == 3
        assert command(*argv, *asking(ollama)).returncode == 2
    assert not [x for x in immich.exchanges if x.method == "PUT"]


# --- Odd ways to name what is meant --------------------------------------------------------------


def test_albums_are_named_in_a_variable_one_per_line(command, choosable, ollama):
    wanted = {
        choosable.add(picture=servers.own_picture(n), owner="alice", albums=[name])
        for n, name in enumerate(["Summer", "Home, 2019", "Mu\u0308ller", "Ko\u00e4la"])
    }
    choosable.add(picture=servers.own_picture(9), owner="alice", albums=["Winter"])
    argv = [*choosable.argv, *asking(ollama)]
    names = " Summer \n\nHome, 2019\nM\u00fcller\nKoa\u0308la"
    assert command(*argv, IMMICH_ANALYZE_ALBUM=names).returncode == 0
    assert described(choosable) == wanted
    assert command(*argv, "--album", "").returncode == 2


def test_a_link_names_the_album_that_is_open(command, choosable, ollama):
    album, other = (facts.own_id("album", n) for n in "12")
    inside = choosable.add(
        picture=servers.own_picture(0), owner="alice", albums=[Album("Summer", "alice", id=album)]
    )
    choosable.add(
        picture=servers.own_picture(1), owner="alice", albums=[Album("Winter", "alice", id=other)]
    )
    for link in (f"albums/{album}?at={other}", f"albums/{album.upper()}/photos/{inside}/"):
        argv = [*choosable.argv, *asking(ollama), "-O", "all"]
        assert command(*argv, "--album", f"https://h/{link}").returncode == 0
        assert described(choosable) == {inside}
        choosable.describe(inside, "")
    query = (
        f"https://h/search/photos/{inside}?query=%7B%22personIds%22:[%22{other}%22]%7D&x=/{other}"
    )
    assert command(*argv, "--photo", query).returncode == 0
    assert described(choosable) == {inside}


def test_a_named_photo_outside_the_period_is_no_unknown_one(command, library, ollama):
    old, new = (
        library.add(picture=servers.own_picture(n), taken=f"{2020 + n}-06-01T12:00") for n in (0, 1)
    )
    argv = [*library.argv, *asking(ollama), "--taken-after", "2021-01-01"]
    assert command(*argv, "--photo", f"{old},{new}").returncode == 0
    assert described(library) == {new}
    assert command(*argv, "--show-prompt", old).returncode == 0


def test_each_key_finds_what_its_user_can_see(command, ollama):
    keys = {name: FakeKey(user, READABLE) for name, user in (("a", "alice"), ("b", "bob"))}
    with FakeImmich("3.1.0", keys) as server:
        world = ApiWorld(server)
        party = Album("Party", "bob")
        world.add(picture=servers.own_picture(0), owner="alice")
        his = world.add(picture=servers.own_picture(1), owner="bob", albums=[party])
        argv = ["--immich-api-url", server.url, "--immich-api-keys", "a,b", *asking(ollama)]
        for chosen in (["--album", "Party"], ["--album", party.id], ["--photo", his]):
            assert command(*argv, "-O", "all", *chosen).returncode == 0
            assert described(world) == {his}
            world.describe(his, "")
    server.check()


def test_searches_name_the_period_widened_by_the_clocks_of_the_world(command, immich, api, ollama):
    taken = ["--taken-after", "2020-01-01", "--taken-before", "2020-01-31"]
    assert command(*api.argv, *asking(ollama), *taken).returncode == 0
    searches = immich.find("POST", "/search/metadata")
    bounds = {(x.json["takenAfter"], x.json["takenBefore"]) for x in searches}
    assert bounds == {("2019-12-31T10:00:00.000Z", "2020-02-01T14:00:00.000Z")}


def test_albums_that_were_deleted_or_are_shared_do_not_count_as_further_ones(
    command, database, ollama
):
    shared = Album("Summer", "alice", shared=["bob"])
    inside = database.add(picture=servers.own_picture(0), owner="alice", albums=[shared])
    database.add(picture=servers.own_picture(1), owner="bob")
    gone = database.add_album(Album("Summer", "bob"))
    database.photos.run('UPDATE album SET "deletedAt" = now() WHERE id = %s', gone)
    assert command(*database.argv, *asking(ollama), "--album", "Summer").returncode == 0
    assert described(database) == {inside}


# --- More about the limit, and about trying -----------------------------------------------------


def test_no_more_are_asked_about_than_the_limit_allows(hours, library, ollama):
    fill(library, 12)
    hours.pace(ollama, seconds=60)
    with hours.batch(library, ollama, "--limit", "3", "--max-concurrent", "4") as run:
        pass
    assert len(described(library)) == len(ollama.find(*CHATS)) == run.counts["described"] == 3


def test_the_limit_holds_for_undo_as_well(hours, library, ollama):
    fill(library, 5)
    with hours.batch(library, ollama):
        pass
    with hours.batch(library, ollama, "--undo", "--limit", "2") as run:
        pass
    assert run.counts["undone"] == 2
    assert len(described(library)) == 3


def test_a_service_that_rests_at_its_limit_can_be_stopped(hours, library, ollama):
    fill(library, 3)
    with hours.service(library, ollama, "--limit", "1") as run:
        run.until(600)
    assert run.time < 700
    assert len(described(library)) == 1


def test_of_two_photos_of_a_day_the_later_one_is_the_newest(command, library, ollama):
    early, late = (
        library.add(picture=servers.own_picture(n), taken=f"2020-06-01T1{n}:00") for n in (0, 1)
    )
    argv = [*library.argv, *asking(ollama), "--limit", "1"]
    assert command(*argv).returncode == 0
    assert described(library) == {late}
    assert command(*argv).returncode == 0
    assert described(library) == {late, early}


def test_a_dry_run_of_undo_lists_all_of_ours_with_rights_to_read(command, database, ollama):
    fill(database, 12)
    assert command(*database.argv, *asking(ollama)).returncode == 0
    uri = database.photos.reading_role("reads", "its secret")
    readonly = f"{database.photos.uri}&options=-c%20default_transaction_read_only%3Don"
    for address in (uri, readonly):
        argv = ["--postgres-url", address, "--immich-root", str(database.photos.root)]
        done = command(*argv, "--undo", IMMICH_ANALYZE_DRY_RUN="true")
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.count(ia.t("would_undo", name="photo.jpg", id="", text="")[:9]) == 12
        assert command(*argv, *asking(ollama), "-O", "all", "--dry-run").returncode == 0
    assert len(described(database)) == 12


def test_a_secret_in_the_address_for_links_is_not_printed(command, api, ollama):
    fill(api, 1)
    link = ["--link-url", "http://user:s3cret@photos.me"]
    done = command(*api.argv, *asking(ollama), "--dry-run", *link)
    assert "http://photos.me/photos/" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr
