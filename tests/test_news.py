"""Whole runs in invented time: what arrives, what the sweeps find, and pages that do not come."""

from datetime import datetime, timedelta
from itertools import pairwise

import pytest
import servers
from hours import BEGIN, DAY
from servers import Exchange, FakeServer, Reply
from worlds import CHATS, SqlWorld, World, asked_about, fill

import immich_analyze as ia

pytestmark = pytest.mark.slow

HOUR = 3600.0
ONE = ["--max-concurrent", "1"]
SELDOM = ["--api-poll-interval", "10000"]
NEW = servers.own_picture(1000)
OTHER = servers.own_picture(1001)
FAILS = Reply(500, {"message": "Internal server error"})
SEARCH = ("POST", "/search/metadata")


def asked_at(hours, picture: bytes, *hosts: FakeServer) -> list[float]:
    """When a model was asked about a picture."""
    return [hours.since_begin(chat) for chat in asked_about(picture, *hosts)]


def add_uploaded(library: World, picture: bytes, at: float, *, updated: float) -> str:
    """Put in a photo whose dates are those moments, in seconds since the beginning."""
    uploaded, made = (BEGIN + timedelta(seconds=seconds) for seconds in (at, updated))
    if not isinstance(library, SqlWorld):
        return library.server.add(preview=picture, created_at=uploaded, updated=made).id
    id, run = library.add(picture=picture), library.photos.run
    run("SET session_replication_role = replica")  # or a trigger would stamp the rows
    run('UPDATE {asset} SET "createdAt" = %s WHERE id = %s', uploaded, id)
    stamp = f"{f'{int(made.timestamp() * 1000):012x}':0<32}"
    run('UPDATE {file} SET "updateId" = %s WHERE "assetId" = %s', stamp, id)
    run("SET session_replication_role = DEFAULT")
    return id


def fill_early(library: World, number: int) -> dict[str, str]:
    """`fill`, but with photos that neither looks nor usual sweeps find."""
    pictures = [servers.own_picture(n) for n in range(number)]
    return {add_uploaded(library, p, -3 * DAY, updated=-DAY): servers.told(p) for p in pictures}


# --- Looks -----------------------------------------------------------------------------------


def test_each_look_goes_back_a_minute_before_the_one_before(hours, api, immich, ollama):
    with hours.service(api, ollama, "--mode", "monitor", "--api-poll-interval", "20") as run:
        run.until(119)
    looks = immich.find(*SEARCH)
    assert {look.json["createdAfter"] for look in looks} == {ia.iso(BEGIN - timedelta(minutes=1))}
    timeline = [look for look in looks if look.json["visibility"] == "timeline"]
    assert [hours.since_begin(look) for look in timeline] == [20, 40, 60, 80, 100]
    back = [datetime.fromisoformat(look.json["updatedAfter"]) - BEGIN for look in timeline]
    assert [each.total_seconds() for each in back] == [-60, -40, -20, 0, 20]


def test_arrivals_overtake_the_backlog(hours, library, ollama):
    fill_early(library, 20)
    hours.pace(ollama)
    with hours.service(library, ollama, *ONE) as run:
        run.at(15, lambda: [library.add(picture=picture) for picture in (NEW, OTHER)])
        run.until(45)
        assert run.counts == {"described": 22}
    for picture in (NEW, OTHER):
        [time] = asked_at(hours, picture, ollama)
        assert 15 <= time <= 20 + 4  # after those in hand


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
def test_a_clock_of_the_server_that_jumps_costs_no_photo(hours, api, immich, ollama, jump):
    skew = [0.0]
    immich.now = lambda: hours.now() + timedelta(seconds=skew[0])
    with hours.service(api, ollama) as run:
        run.at(55, lambda: skew.__setitem__(0, jump))
        run.at(56, lambda: api.add(picture=NEW))
        run.at(75, lambda: api.add(picture=OTHER))
        run.until(100)
    assert asked_at(hours, NEW, ollama) == [60]
    assert asked_at(hours, OTHER, ollama) == [80]


@pytest.mark.measured
def test_a_look_that_fails_is_said_once_and_made_up_for(hours, api, immich, ollama):
    def fail(search: Exchange) -> Reply | None:
        time = hours.since_begin(search)
        away = 15 <= time < 65 or 105 <= time < 165
        return FAILS if away and "updatedAfter" in search.json else None

    immich.script(*SEARCH, fail, forever=True)
    with hours.service(api, ollama) as run:
        run.at(18, lambda: api.add(picture=NEW))
        run.until(90)
        [line] = run.lines("Cannot check for new photos", level="WARNING")
        assert "500" in line
        assert asked_at(hours, NEW, ollama) == [70]
        run.until(200)
        assert len(run.lines("Cannot check for new photos")) == 2
    assert (run.counts, run.fatal) == ({"described": 1}, "")


def test_what_is_overwritten_is_no_news(hours, library, ollama):
    """What the tool writes makes Immich list the photo as updated, for each look and sweep."""
    ids = [library.add(picture=servers.own_picture(n), description="Old.") for n in range(3)]
    policy = ["--overwrite-policy", "all"]
    with hours.service(library, ollama, *policy, *SELDOM) as run:
        run.at(1000, lambda: library.add(picture=NEW, description="Old."))
        run.until(1.1 * DAY)
    assert run.counts == {"described": 4}
    assert len(ollama.find(*CHATS)) == 4
    assert library.texts().keys() > set(ids)


# --- Monitor mode ----------------------------------------------------------------------------


def test_what_was_there_long_before_is_left_alone_in_monitor_mode(hours, library, ollama):
    """Also if its preview is made anew: by the API, the upload tells; in SQL, two days are free."""
    tables = isinstance(library, SqlWorld)
    edge = 2 * DAY if tables else 60.0
    [ours, not_ours] = [
        add_uploaded(library, picture, -edge + sign * 20, updated=-edge + sign * 20)
        for picture, sign in ((NEW, 1), (OTHER, -1))
    ]

    def make_anew() -> None:
        for id in (ours, not_ours):
            if tables:
                library.photos.run('UPDATE {file} SET path = path WHERE "assetId" = %s', id)
            else:
                library.server.assets[id].is_favorite = True

    options = ["--mode", "monitor", "--api-poll-interval", "3500"]
    with hours.service(library, ollama, *options) as run:
        run.at(1000, make_anew)
        run.until(DAY + HOUR + 60)
    assert asked_at(hours, NEW, ollama) == [3500]
    assert library.texts()[not_ours] == ""
    assert run.counts == {"described": 1}


# --- Events ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("late", "seen"),
    [
        (0.0, 0.15),
        (0.11, 0.15),
        (0.3, 0.45),
        (4, 4.65),
        (30, 38.25),
    ],
)
def test_an_event_prompts_looks_until_the_row_is_there(hours, database, ollama, late, seen):
    [id, quiet] = database.photos.add_many(2, preview=False)
    database.photos.write_preview(quiet, OTHER)
    with hours.service(database, ollama, "--api-poll-interval", "1000") as run:
        run.at(10, lambda: database.photos.add_preview(quiet))
        run.until(60)
        hours.told_by_others(lambda: database.photos.write_preview(id, NEW))
        run.at(60 + late, lambda: database.photos.add_preview(id))
        run.until(1010)
    assert asked_at(hours, NEW, ollama) == [pytest.approx(60 + seen)]
    assert database.texts()[quiet] == servers.told(OTHER)  # by the next usual look, if not before


@pytest.mark.parametrize(("arrives", "said"), [(12, 0), (25, 1), (100, 1)])
def test_photos_that_arrive_without_an_event_are_noticed_once(
    hours, database, ollama, monkeypatch, arrives, said
):
    monkeypatch.setattr(ia.PreviewWatch, "on_any_event", lambda *_: None)  # as on a share
    with hours.service(database, ollama, "--api-poll-interval", "12") as run:
        run.at(arrives, lambda: database.add(picture=NEW))
        run.until(arrives + 12)
        assert len(run.lines("only by polling the database", level="WARNING")) == said
        run.at(200, lambda: database.add(picture=OTHER))
        run.until(300)
    assert run.counts == {"described": 2}
    assert len(run.lines("only by polling the database")) == 1


def test_an_event_says_that_the_watch_is_well_though_a_usual_look_finds_the_photo(
    hours, database, ollama
):
    [id] = database.photos.add_many(1, preview=False)
    with hours.service(database, ollama) as run:
        run.until(100)
        hours.told_by_others(lambda: database.photos.write_preview(id, NEW))
        run.at(109.9, lambda: database.photos.add_preview(id))
        run.until(150)
    assert asked_at(hours, NEW, ollama) == [110]
    assert run.lines(level="WARNING") == []


# --- Sweeps ----------------------------------------------------------------------------------


def test_sweeps_find_what_looks_missed(hours, library, ollama):
    """Each hour uploads of two days, each day all."""
    with hours.service(library, ollama, *SELDOM) as run:
        run.at(100, lambda: add_uploaded(library, NEW, -1.9 * DAY, updated=-HOUR))
        run.at(100, lambda: add_uploaded(library, OTHER, -2.5 * DAY, updated=-HOUR))
        run.at(100, lambda: library.add(picture=NEW, description="By a person."))
        run.until(DAY + HOUR)
    assert asked_at(hours, NEW, ollama) == [HOUR]
    assert asked_at(hours, OTHER, ollama) == [DAY]
    assert run.counts == {"described": 2}


def test_sweeps_do_not_wait_for_the_backlog(hours, library, ollama):
    fill_early(library, 20)
    hours.pace(ollama, seconds=250)
    with hours.service(library, ollama, *ONE, *SELDOM) as run:
        run.at(100, lambda: add_uploaded(library, NEW, -HOUR, updated=-HOUR))
        run.until(21 * 250 + 10)
        assert run.counts == {"described": 21}
    [time] = asked_at(hours, NEW, ollama)
    assert HOUR < time <= HOUR + 3 * 250


@pytest.mark.measured
def test_the_daily_sweep_tries_what_failed_again(hours, library, ollama):
    good, bad = library.add(picture=OTHER), library.add("bad.jpg", picture=NEW)
    library.lose_preview(bad)
    quick = ["--file-write-timeout", "1"]
    with hours.service(library, ollama, *SELDOM, *quick) as run:
        run.until(DAY - 60)
        assert run.counts == {"described": 1, "failed": 1}
        assert len(run.lines("bad.jpg", level="ERROR")) == 1
        run.until(DAY + 60)
    assert run.counts == {"described": 1, "failed": 2}
    assert len(run.lines("bad.jpg", level="ERROR")) == 2
    assert library.texts()[good]


# --- Photos that fail in passing --------------------------------------------------------------


def test_what_fails_in_passing_is_taken_again_after_pauses_that_double(hours, api, immich, ollama):
    """It is found by the looks, as long as these list it, and counted and said once."""
    fill(api, 1)
    tries: list[float] = []

    def fail(get: Exchange) -> Reply:
        tries.append(hours.since_begin(get))
        return FAILS

    def arrive() -> None:
        id = api.add("late.jpg", picture=NEW)
        immich.script("GET", f"{id}/thumbnail", fail, forever=True)

    pause = ["--retry-delay-seconds", "0", "--api-poll-interval", "1"]
    with hours.service(api, ollama, *pause) as run:
        run.at(10, arrive)
        run.until(75)
    rounds = tries[::3]  # three tries each time, a second apart
    assert [b - a - 2 for a, b in pairwise(rounds)] == [5, 10, 20]
    assert run.counts == {"described": 1, "failed": 1}
    assert len(run.lines("late.jpg")) == 1


def test_what_is_overwritten_after_it_failed_is_no_news_either(hours, api, immich, ollama):
    id = api.add(picture=NEW, description="Old.")
    immich.script("GET", f"{id}/thumbnail", *[FAILS] * 3)
    quick = ["--overwrite-policy", "all", "--retry-delay-seconds", "0"]
    with hours.service(api, ollama, *quick) as run:
        run.at(10, lambda: setattr(immich.assets[id], "is_favorite", True))  # lists it anew
        run.until(200)
    assert run.counts == {"described": 1, "failed": 1}
    assert len(ollama.find(*CHATS)) == 1


# --- Pages -----------------------------------------------------------------------------------


def fail_later_pages(hours, immich, until: float) -> list[float]:
    """Let Immich fail on all pages of the backlog but the first; when it was asked for them."""
    asked: list[float] = []

    def fail(search: Exchange) -> Reply | None:
        if "takenBefore" not in search.json or "updatedAfter" in search.json:
            return None
        asked.append(hours.since_begin(search))
        return FAILS if hours.time < until else None

    immich.script(*SEARCH, fail, forever=True)
    return asked


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ia, "PAGE", 3)


@pytest.mark.usefixtures("small_pages")
def test_a_page_that_does_not_come_holds_no_arrival_up(hours, api, immich, ollama):
    wanted = fill_early(api, 9)
    asked = fail_later_pages(hours, immich, 600)
    with hours.service(api, ollama, "--api-poll-interval", "50") as run:
        run.at(95, lambda: api.add(picture=NEW))
        run.until(800)
        assert run.counts == {"described": 4}
        run.until(1000)
        assert run.counts == {"described": 10}
    assert asked[:5] == [0, 60, 180, 420, 900]
    assert asked_at(hours, NEW, ollama) == [100]
    assert {id: api.texts()[id] for id in wanted} == wanted
    lines = [line for line in run.said if line.level == "WARNING"]
    assert [line.at for line in lines] == [0, 60, 180, 420]
    for line, pause in zip(lines, (60, 120, 240, 480), strict=True):
        assert "500" in line.text
        assert f" {pause} s" in line.text


@pytest.mark.measured
@pytest.mark.usefixtures("small_pages")
def test_a_service_that_waits_for_a_page_ends_when_asked(hours, api, immich, ollama):
    fill_early(api, 9)
    fail_later_pages(hours, immich, 1e9)
    with hours.service(api, ollama) as run:
        run.at(100, run.stop.set)
        run.end()
    assert (run.ended, run.fatal) == (100, "")


@pytest.mark.measured
@pytest.mark.usefixtures("small_pages")
def test_a_page_that_does_not_come_ends_a_batch(hours, api, immich, ollama):
    fill_early(api, 9)
    asked = fail_later_pages(hours, immich, 1e9)
    with hours.batch(api, ollama) as run:
        pass
    assert (run.fatal, run.code, run.counts) == ("immich_failed", 2, {"described": 3})
    assert len(asked) == 12
    assert len(run.lines(level="CRITICAL")) == 1


@pytest.mark.usefixtures("small_pages")
def test_the_next_page_is_fetched_while_one_is_worked_through(hours, api, immich, ollama):
    fill_early(api, 9)
    hours.pace(ollama, seconds=10)
    immich.script(*SEARCH, hours.slow(15), forever=True)
    with hours.batch(api, ollama, *ONE) as run:
        pass
    pages = [hours.since_begin(search) for search in immich.find(*SEARCH)]
    # two workers to a place; a page begins with the last photo of the one before
    assert pages == [0, 15, 35, 55, 75]
    chats = [hours.since_begin(chat) for chat in ollama.find(*CHATS)]
    assert chats == [15 + 10 * n for n in range(9)]  # the model never waits
    assert run.counts == {"described": 9}


def test_sweeps_are_hourly_however_seldom_it_looks(hours, api, immich, ollama):
    with hours.service(api, ollama, "--api-poll-interval", "100000") as run:
        run.until(5 * HOUR + 60)
    sweeps = [
        hours.since_begin(search)
        for search in immich.find("POST", "/search/metadata")
        if "createdAfter" in search.json and search.json["visibility"] == "timeline"
    ]
    assert sweeps == [hour * HOUR for hour in range(1, 6)]
