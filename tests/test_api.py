"""The library behind Immich's API: paging, keys, odd replies, and how many requests it takes."""

import itertools
import json
import logging
import re
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime, timedelta

import pytest
import servers
from servers import CUT, EVERYTHING, HANG, IMMICH_VERSIONS, MINIMAL, RESET, FakeKey, Reply
from worlds import others_long

import immich_analyze as ia

pytestmark = pytest.mark.slow

KNOWING = (*MINIMAL, "user.read")  # a key that may ask whose it is
TAKEN = datetime(2024, 1, 1, tzinfo=UTC)
SEARCH = ("POST", "/search/metadata")
WRITE = ("PUT", "/assets/[0-9a-f-]{36}$")
NOTE = ia.Note("tiny-vlm", "0123456789ab", text="0123456789abcdef")
GONE = servers.recorded("immich-3.1.0", "asset-get-unknown-id")
MAINTENANCE = servers.recorded("immich-3.1.0", "maintenance-mode-search")


@pytest.fixture
def fake():
    """Makes fake Immichs; what was said to them is checked at the end."""
    made = []
    with ExitStack() as stack:

        def make(version="3.1.0", keys=None, **options):
            keys = keys or {"alice-key": FakeKey("alice", KNOWING)}
            made.append(stack.enter_context(servers.FakeImmich(version, keys, **options)))
            return made[-1]

        yield make
    for server in made:
        server.check()


@pytest.fixture
def settings(config):
    """The settings for a fake Immich: all its keys unless others are given."""

    def make(server, *keys, url=None):
        given = ["--immich-api-url", url or server.url]
        return config(*given, "--immich-api-keys", ",".join(keys or server.keys))

    return make


@pytest.fixture
def opened(settings):
    """Opens the library of a fake Immich; it is closed at the end."""
    with ExitStack() as stack:

        def make(server, *keys):
            new_library, _ = ia.open_library(settings(server, *keys))
            return stack.enter_context(closing(new_library()))

        yield make


def walk(library):
    """The pages of the whole listing, each with the cursor behind it."""
    cursor = None
    for _ in range(1000):
        assets, cursor = library.page(cursor)
        yield [*assets], cursor
        if cursor is None:
            return
    pytest.fail("the listing does not end")


def listing(library):
    return [asset for assets, _ in walk(library) for asset in assets]


def claimed(library, asset):
    """The photo as it is while it is claimed."""
    with library.claimed(asset) as found:
        return found


def ids(assets):
    return [asset.id for asset in assets]


def said(server, method=".*", path=""):
    """The requests so far, as pairs of method and path below /api, without ids."""
    found = server.find(method, path)
    return [(e.method, e.operation.name if e.operation else e.path) for e in found]


def visibility(exchange):
    asked = exchange.json
    return asked.get("visibility") or ("archive" if asked["isArchived"] else "timeline")


# paging


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_three_pages_take_three_requests_and_come_newest_first(fake, opened, monkeypatch, version):
    monkeypatch.setattr(ia, "PAGE", 20)
    server = fake(version)
    server.add_many(50, created=lambda n: TAKEN + timedelta(minutes=n * 7919 % 50))
    server.add_many(3, visibility="archive")
    listed = ids(listing(opened(server)))
    newest_first = sorted(server.assets.values(), key=lambda a: a.created, reverse=True)
    timeline = [asset.id for asset in newest_first if asset.visibility == "timeline"]
    archive = [asset.id for asset in newest_first if asset.visibility == "archive"]
    assert listed == timeline + archive
    asked = [visibility(exchange) for exchange in server.find(*SEARCH)]
    assert asked == ["timeline"] * 3 + ["archive"]


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_every_release_lists_timeline_and_archive_only(fake, opened, version):
    server = fake(version)
    locked = ["locked"] if server.version >= (1, 133) else []
    for visibility in ["timeline", "archive", "hidden", *locked]:
        server.add(visibility, visibility=visibility)
    for fields in ({"is_trashed": True}, {"is_offline": True}, {"type": "VIDEO"}, {"exif": False}):
        server.add(**fields)
    assert sorted(asset.name for asset in listing(opened(server))) == ["archive", "timeline"]


@pytest.mark.parametrize("number", [0, 1, 98, 99, 100, 101, 990, 1980])
def test_a_listing_costs_a_request_for_a_page_of_new_photos(fake, opened, monkeypatch, number):
    monkeypatch.setattr(ia, "PAGE", 100)
    server = fake()
    server.add_many(number)
    assert len(set(ids(listing(opened(server))))) == number
    requests = [visibility(exchange) for exchange in server.find(*SEARCH)]
    assert requests.count("archive") == 1
    assert requests.count("timeline") == max(1, -(-(number - 1) // 99))  # one is seen again


NUMBERS = [2, 3, 7, 9, 10, 11, 12, 25]


@pytest.mark.parametrize(
    ("version", "together"),
    others_long(
        itertools.product(["2.7.5", "3.1.0"], NUMBERS),
        *zip(itertools.cycle(["2.7.5", "3.1.0"]), NUMBERS, strict=False),
    ),
)
def test_microseconds_apart_across_pages_none_is_lost(fake, opened, monkeypatch, version, together):
    monkeypatch.setattr(ia, "PAGE", 10)
    server = fake(version)

    def moment(n):
        instant, place = divmod(n, together)
        return TAKEN + timedelta(milliseconds=instant, microseconds=place * 900 // together)

    server.add_many(60, created=moment)
    listed = ids(listing(opened(server)))
    assert len(listed) == 60
    assert set(listed) == set(server.assets)


@pytest.mark.parametrize("ties", [30, 52])
@pytest.mark.parametrize("version", ["2.7.5", "3.1.0"])
def test_pages_of_photos_of_one_instant_are_all_listed(fake, opened, monkeypatch, version, ties):
    monkeypatch.setattr(ia, "PAGE", 20)
    server = fake(version)
    server.add_many(ties, created=TAKEN)
    server.add_many(3)  # newer
    server.add_many(3, created=lambda n: TAKEN - timedelta(days=n + 1))
    listed = ids(listing(opened(server)))
    assert len(listed) == ties + 6
    assert set(listed) == set(server.assets)


def test_however_ties_are_shuffled_none_is_lost(fake, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 10)
    server = fake("2.7.5")  # each search of it has an order of its own
    server.add_many(26, created=TAKEN)
    library = opened(server)
    lost = [len(server.assets.keys() - ids(listing(library))) for _ in range(10)]
    assert lost == [0] * 10


@pytest.mark.measured
@pytest.mark.parametrize(("version", "most"), [("3.1.0", 5), ("2.7.5", 60)])
def test_ties_cost_more_requests_only_where_they_are_shuffled(
    fake, opened, monkeypatch, version, most
):
    monkeypatch.setattr(ia, "PAGE", 10)
    server = fake(version)
    server.add_many(26, created=TAKEN)
    listing(opened(server))
    timeline = [e for e in server.find(*SEARCH) if visibility(e) == "timeline"]
    assert len(timeline) <= most


def test_the_cursor_never_holds_more_than_two_pages(fake, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 20)
    server = fake()
    server.add_many(600, created=lambda n: TAKEN + timedelta(microseconds=n * 60))  # 16 in a ms
    held = [len(cursor.seen) for _, cursor in walk(opened(server)) if cursor]
    assert len(held) > 30
    assert max(held) <= 40


def test_photos_added_and_taken_away_meanwhile_disturb_no_other(fake, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 10)
    server = fake()
    stay = {asset.id for asset in server.add_many(50)}
    listed = []
    for number, (assets, _) in enumerate(walk(opened(server))):
        listed += ids(assets)
        server.add(created=TAKEN + timedelta(days=400))  # newer: all later photos move on
        if number < 2:
            del server.assets[listed[-10]]
    assert stay <= set(listed)
    assert len(listed) == len(set(listed))


# odd JSON


def altered(server, library, change):
    """Let the server say what it would, changed; the next listing gets that."""
    library.page(None)
    body = server.find(*SEARCH)[-1].reply
    change(body["assets"])
    server.script(*SEARCH, Reply(200, body))


ODD_FIELDS = {
    "rating": {"exifInfo": {"rating": -1, "description": ""}},
    "exif null": {"exifInfo": None},
    "exif of nulls": {"exifInfo": {"description": None, "rating": None, "dateTimeOriginal": None}},
    "exif a list": {"exifInfo": []},
    "description a number": {"exifInfo": {"description": 5}},
    "unknown visibility": {"visibility": "sparkling"},
    "no visibility": {"visibility": None},
    "trashed null": {"isTrashed": None, "isOffline": None},
    "name null": {"originalFileName": None},
    "name a number": {"originalFileName": 7},
    "people null": {"people": None, "tags": None, "stack": 3},
    "duration null": {"duration": None, "checksum": None, "livePhotoVideoId": 1},
    "unknown field": {"isSparkling": True},
}
ODD_DATES = [
    *("0000-01-01T00:00:00.000Z", "-000044-03-15T00:00:00.000Z", "0001-01-01T00:00:00+14:00"),
    *("+010000-01-01T00:00:00.000Z", "2024-13-01T00:00:00.000Z", "yesterday", ""),
    *(None, 5, {}, [], True, 1e300),
]
ENDS = [
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(9999, 1, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
]


@pytest.mark.parametrize("fields", ODD_FIELDS.values(), ids=ODD_FIELDS)
def test_an_odd_field_costs_only_itself(fake, opened, fields):
    server = fake()
    server.add_many(3)
    library = opened(server)
    altered(server, library, lambda assets: assets["items"][1].update(fields))
    assets = [*library.page(None)[0]]
    assert sorted(ids(assets)) == sorted(server.assets)
    assert [asset.description for asset in assets] == [""] * 3
    assert all(isinstance(asset.name, str) and asset.ready for asset in assets)


@pytest.mark.parametrize("date", ODD_DATES, ids=repr)
def test_an_odd_date_costs_only_itself(fake, opened, monkeypatch, date):
    monkeypatch.setattr(ia, "PAGE", 10)
    server = fake()
    server.add_many(25)
    library = opened(server)
    for places in ([0], [4], [9], range(10)):

        def change(assets, places=places):
            for place in places:
                assets["items"][place]["fileCreatedAt"] = date

        altered(server, library, change)
        assert sorted(ids(listing(library))) == sorted(server.assets), places


@pytest.mark.parametrize("more", [0, 9, 25])
@pytest.mark.parametrize("moment", ENDS, ids=str)
def test_the_ends_of_the_calendar_can_be_listed(fake, opened, monkeypatch, moment, more):
    monkeypatch.setattr(ia, "PAGE", 10)
    server = fake()
    server.add(created=moment)
    server.add_many(more)
    listed = ids(listing(opened(server)))
    assert sorted(listed) == sorted(server.assets)


@pytest.mark.parametrize("item", [{}, None, 5, "text", [], {"id": None}, {"id": ""}, {"id": []}])
def test_an_item_without_id_costs_only_itself(fake, opened, item):
    server = fake()
    server.add_many(2)
    library = opened(server)
    altered(server, library, lambda assets: assets["items"].insert(1, item))
    assert sorted(ids(listing(library))) == sorted(server.assets)


@pytest.mark.parametrize("items", [None, {}, "text", 5, True, []], ids=repr)
def test_a_page_without_items_costs_only_that_page(fake, opened, monkeypatch, items):
    monkeypatch.setattr(ia, "PAGE", 10)
    server = fake()
    server.add_many(30)
    library = opened(server)
    first, cursor = library.page(None)
    server.script(*SEARCH, Reply(200, {"assets": {"items": items, "nextPage": "2"}}))
    empty, cursor = library.page(cursor)
    later, _ = library.page(cursor)
    assert (len([*first]), [*empty]) == (10, [])
    assert len([*later]) >= 9


def test_what_the_search_should_not_have_found_is_left_out(fake, opened):
    server = fake()
    server.add_many(6)
    odd = [{"type": "VIDEO"}, {"type": None}, {"isTrashed": True}, {"isOffline": True}]
    odd += [{"visibility": "hidden"}, {"visibility": "locked"}]
    library = opened(server)
    altered(server, library, lambda a: [i.update(o) for i, o in zip(a["items"], odd, strict=True)])
    assert listing(library) == []


def test_a_photo_whose_preview_is_not_made_yet_is_not_ready(fake, opened):
    server = fake()
    server.add("later.jpg", preview=None)
    server.add("now.jpg")
    library = opened(server)
    assets = listing(library)
    assert {asset.name: asset.ready for asset in assets} == {"later.jpg": False, "now.jpg": True}
    [later] = [asset for asset in assets if not asset.ready]
    assert library.preview(later) is None


# several keys


@pytest.fixture(params=[KNOWING, MINIMAL], ids=["with user.read", "without user.read"])
def family(request, fake):
    """Alice sees what Bob and Carl share; she and Bob gave their keys."""
    keys = {f"{name}-key": FakeKey(name, request.param) for name in ("alice", "bob")}
    server = fake(keys=keys, partners={"alice": ["bob", "carl"], "bob": ["carl"]})
    for number, owner in enumerate(["carl", "bob", "alice", "alice", "bob", "carl"]):
        server.add(f"{owner}-{number}.jpg", owner=owner)
    return server


def test_each_photo_is_read_and_written_with_the_key_of_its_owner(family, opened):
    library = opened(family)
    assets = listing(library)
    owned = [asset for asset in family.assets.values() if asset.owner != "carl"]
    assert sorted(asset.name for asset in assets) == sorted(asset.name for asset in owned)
    listed = len(family.exchanges)
    for asset in assets:
        assert library.preview(asset) == family.assets[asset.id].preview
        assert claimed(library, asset).note is None
        assert library.write(asset, f"By the key of {asset.name}.", NOTE) is True
    written = {asset.id: family.assets[asset.id].description for asset in assets}
    assert library.read_back(assets, 0) == written
    for asset in assets:
        library.remember(asset, NOTE)
    for exchange in family.exchanges[listed:]:
        one = exchange.params.get("id")
        sent = exchange.json if isinstance(exchange.json, dict) else {}
        for id in [one] if one else [item["assetId"] for item in sent.get("items", [])]:
            assert exchange.headers["x-api-key"] == f"{family.assets[id].owner}-key"
    assert all("By the key" in asset.description for asset in owned)
    assert all(asset.notes.keys() == {ia.KEY} for asset in owned)
    assert [claimed(library, asset).note for asset in assets] == [NOTE] * 4


def test_partners_photos_are_never_written(family, opened):
    library = opened(family)
    for asset in listing(library):
        library.write(asset, "New.", NOTE)
        library.remember(asset, NOTE)
    shared = [asset for asset in family.assets.values() if asset.owner == "carl"]
    assert [(asset.description, asset.notes) for asset in shared] == [("", {})] * 2
    texts = [exchange.json for exchange in family.find("PUT", "/assets/")]
    assert sum("description" in text for text in texts) == 4


@pytest.mark.parametrize(
    ("permissions", "newest_first", "extra"),
    [
        (KNOWING, ["alice", "bob", "carl"], []),
        (KNOWING, ["carl", "bob", "alice"], []),
        (MINIMAL, ["alice", "bob", "carl"], ["PUT"]),
        (MINIMAL, ["bob", "alice", "carl"], ["PUT", "GET", "PUT"]),
        (MINIMAL, ["carl", "carl", "bob", "alice", "bob"], ["PUT", "GET", "PUT", "GET", "PUT"]),
    ],
)
def test_whose_a_photo_is_costs_a_question_for_each_owner(
    fake, opened, permissions, newest_first, extra
):
    keys = {"alice-key": FakeKey("alice", permissions)}
    server = fake(keys=keys, partners={"alice": ["bob", "carl"]})
    for owner in reversed(newest_first * 3):
        server.add(owner=owner, description="as it was")
    library = opened(server)
    assert {server.assets[asset.id].owner for asset in listing(library)} == {"alice"}
    listing(library)  # and never again
    assert [exchange.method for exchange in server.find("GET|PUT", "/assets/")] == extra
    assert all(exchange.json == {} for exchange in server.find("PUT", "/assets/"))
    assert {asset.description for asset in server.assets.values()} == {"as it was"}


@pytest.mark.measured
def test_a_photo_that_goes_while_its_owner_is_asked_for_costs_only_itself(fake, opened):
    server = fake(keys={"alice-key": FakeKey("alice", MINIMAL)})
    kept, going = server.add(), server.add()
    library = opened(server)
    server.script("PUT|GET", f"/assets/{going.id}", GONE, forever=True)
    assert ids(listing(library)) == [kept.id]


@pytest.mark.parametrize("permissions", [KNOWING, MINIMAL], ids=["with", "without"])
def test_two_keys_of_one_user_list_once(fake, opened, permissions):
    keys = {"first": FakeKey("alice", permissions), "second": FakeKey("alice", permissions)}
    server = fake(keys=keys)
    server.add_many(3)
    assert sorted(ids(listing(opened(server)))) == sorted(server.assets)


@pytest.mark.measured
@pytest.mark.parametrize(
    ("version", "bad", "why"),
    [
        ("3.1.0", "unknown", "Immich refuses the API key: Invalid API key"),
        ("3.1.0", "narrow", "the API key lacks permissions: asset.view, asset.update"),
        ("1.144.1", "narrow", "the API key lacks permissions: asset.view, asset.update"),
        ("1.135.3", "unknown", "Immich refuses the API key: Invalid API key"),
    ],
)
def test_a_key_that_is_refused_is_left_out_with_one_line(fake, settings, caplog, version, bad, why):
    keys = {"good": FakeKey("alice", KNOWING), "narrow": FakeKey("bob", ("asset.read",))}
    server = fake(version, keys)
    mine, _ = server.add(), server.add(owner="bob")
    new_library, complete = ia.open_library(settings(server, "good", bad))
    assert complete() is False
    assert [record.getMessage() for record in caplog.records] == [f"API key 2: {why}"]
    with closing(new_library()) as library:
        assert ids(listing(library)) == [mine.id]
    with pytest.raises(ia.Fatal) as raised:
        ia.open_library(settings(server, bad))
    assert str(raised.value) == f"API key 1: {why}"
    assert bad not in str(raised.value).split()


@pytest.mark.measured
def test_a_key_that_is_refused_later_costs_the_others_nothing(fake, config):
    """Not even where the albums of each user are asked for first."""
    keys = {name: FakeKey(name, (*KNOWING, "album.read")) for name in ("alice", "bob")}
    server = fake(keys=keys)
    mine, _ = server.add(), server.add(owner="bob")
    given = ["--immich-api-url", server.url, "--immich-api-keys", "bob,alice"]
    new_library, complete = ia.open_library(config(*given, "--context", "albums"))
    del server.keys["bob"]
    with closing(new_library()) as library:
        assert ids(listing(library)) == [mine.id]
    assert complete() is False


@pytest.mark.parametrize("version", ["1.144.1", "2.7.5", "3.3.5"])
@pytest.mark.parametrize("lacking", MINIMAL)
def test_the_permission_that_is_missing_is_named(fake, settings, version, lacking):
    server = fake(version, {"key": FakeKey("alice", [p for p in KNOWING if p != lacking])})
    with pytest.raises(ia.Fatal) as raised:
        ia.open_library(settings(server))
    assert str(raised.value) == f"API key 1: the API key lacks permissions: {lacking}"


@pytest.mark.parametrize("permissions", [MINIMAL, KNOWING, EVERYTHING])
def test_enough_permissions_are_enough(fake, settings, permissions):
    new_library, complete = ia.open_library(
        settings(fake(keys={"key": FakeKey("alice", permissions)}))
    )
    new_library().close()
    assert complete() is True


# the address


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_opening_asks_for_the_version_and_each_key(fake, settings, version):
    server = fake(version)
    ia.open_library(settings(server))
    check = "getMyApiKey" if server.version >= (1, 139) else "validateAccessToken"
    asked = ["getServerVersion", check, "getMyUser", "getServerConfig"]
    assert [name for _, name in said(server)] == asked


def test_every_worker_opens_without_a_request(fake, settings):
    server = fake()
    new_library, _ = ia.open_library(settings(server))
    before = len(server.exchanges)
    for _ in range(3):
        new_library().close()
    assert len(server.exchanges) == before


@pytest.mark.parametrize("ending", ["", "/", "/api", "/api/"])
@pytest.mark.parametrize("prefix", ["", "/photos", "/a/b"])
def test_the_address_may_be_given_in_many_ways(fake, settings, prefix, ending):
    server = fake(prefix=prefix)
    server.add()
    new_library, _ = ia.open_library(settings(server, url=server.url + ending))
    with closing(new_library()) as library:
        [asset] = listing(library)
        assert library.preview(asset) == server.assets[asset.id].preview
    assert {exchange.path.removeprefix(prefix)[:5] for exchange in server.exchanges} == {"/api/"}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, "<!doctype html><title>Immich</title>"),
        Reply(200, ""),
        Reply(200, {}),
        Reply(200, []),
        Reply(200, {"version": "0.9.1"}),
        Reply(200, {"major": "three", "minor": 1, "patch": 0}),
        Reply(200, {"major": None, "minor": 1, "patch": 0}),
        Reply(404, "404 page not found"),
        Reply(404, {"message": "Not Found"}),
        Reply(404, {"message": "Cannot GET /api/server/version", "statusCode": 404}),
        Reply(301, "", {"Location": "https://photos.example/"}),
    ],
    ids=lambda reply: f"{reply.status} {reply.body}",
)
def test_a_wrong_address_is_said_at_once(fake, settings, reply):
    server = fake()
    server.script("GET", "/server/version", reply)
    with pytest.raises(ia.Fatal) as raised:
        ia.open_library(settings(server))
    assert server.url in str(raised.value)
    assert len(server.exchanges) == 1


@pytest.mark.measured
@pytest.mark.parametrize("trouble", ["maintenance", "database_down", "closed", "starting"])
def test_an_immich_that_is_away_is_one_to_wait_for(fake, settings, trouble):
    server = fake()
    if trouble == "closed":
        server.close()
    elif trouble == "starting":
        server.script("GET", "/server/version", Reply(502, "<html>Bad Gateway</html>"))
    else:
        setattr(server, trouble, True)
    with pytest.raises(ia.Unavailable):
        ia.open_library(settings(server))
    if trouble == "closed":
        server.start()
    server.maintenance = server.database_down = False
    ia.open_library(settings(server))


FIRST_CALLS = ("/server/version", "/api-keys/me", "/users/me")
REFUSALS = ("CUT", "RESET", 400, 401, 403, 404, 418, 429, 500)


@pytest.mark.parametrize(
    ("path", "trouble"),
    others_long(
        itertools.product(FIRST_CALLS, REFUSALS),
        *zip(itertools.cycle(FIRST_CALLS), REFUSALS, strict=False),
    ),
)
def test_trouble_at_the_start_that_stays_is_one_line(fake, settings, stop, path, trouble):
    server = fake()
    special = {"CUT": CUT, "RESET": RESET}.get(trouble)
    server.script("GET", path, special or Reply(trouble, {"message": "no"}), forever=True)
    with pytest.raises(ia.Fatal):
        ia.serve_columns({"a": settings(server)}, stop, ia.Tally())
    assert sum(stop.waits) <= 120


def test_an_upgrade_that_one_worker_sees_all_know_of(fake, settings):
    server = fake()
    server.add()
    server.script("GET", "/server/version", Reply(200, {"major": 2, "minor": 4, "patch": 1}))
    new_library, _ = ia.open_library(settings(server))
    with closing(new_library()) as one, closing(new_library()) as other:
        [asset] = listing(one)
        one.remember(asset, NOTE)
        assert server.assets[asset.id].notes == {}
        other.clock()
        one.remember(asset, NOTE)
    assert server.assets[asset.id].notes.keys() == {ia.KEY}


@pytest.mark.parametrize("status", [302, 401, 403, 404])
@pytest.mark.parametrize("path", ["/api-keys/me", "/users/me"])
def test_what_a_proxy_says_at_the_start_is_not_laid_to_the_key(fake, settings, status, path):
    server = fake(keys={"alice-key": "alice", "bob-key": "bob"})
    page = Reply(status, "<html>Sign in</html>", {"Location": "https://sign.in/"})
    server.script("GET", path, page)
    with pytest.raises(ia.Unexpected):
        ia.open_library(settings(server))


@pytest.mark.measured
@pytest.mark.parametrize("trouble", ["maintenance", "database_down", "closed"])
def test_an_immich_in_trouble_later_costs_no_photo(fake, opened, trouble):
    server = fake()
    server.add_many(2)
    library = opened(server)
    [asset, _] = listing(library)
    if trouble == "closed":
        server.close()
    else:
        setattr(server, trouble, True)
    for call in (
        lambda: library.page(None),
        lambda: library.preview(asset),
        lambda: claimed(library, asset),
        lambda: library.write(asset, "Not now.", NOTE),
        lambda: library.read_back([asset], 0),
        lambda: library.read_back([asset] * 3, 0),
        lambda: library.remember(asset, NOTE),
        lambda: library.remember(asset, None),
    ):
        with pytest.raises(ia.Unavailable):
            call()


@pytest.mark.parametrize("version", ["1.132.3", "3.1.0"])
def test_a_500_about_one_photo_is_not_taken_for_an_outage(fake, opened, version):
    """Only when Immich cannot even say whose key it is, everything is away."""
    server = fake(version)
    server.add_many(1)
    library = opened(server)
    [asset] = listing(library)
    server.script("GET", "thumbnail", Reply(500, {"message": "Internal server error"}))
    with pytest.raises(ia.Retryable) as raised:
        library.preview(asset)
    assert not isinstance(raised.value, ia.Unavailable)
    server.script(".*", "", Reply(500, {"message": "Internal server error"}), forever=True)
    with pytest.raises(ia.Unavailable):
        library.preview(asset)


@pytest.mark.parametrize("told", [[], "no", {}, {"id": "another"}])
def test_what_is_no_photo_is_not_overwritten(fake, opened, told):
    server = fake()
    server.add_many(1)
    library = opened(server)
    [asset] = listing(library)
    server.script("GET", f"/assets/{asset.id}", Reply(200, told), forever=True)
    for call in (
        lambda: library.write(asset, "A lake.", NOTE),
        lambda: library.look(asset),
        lambda: library.read_back([asset], 0),
    ):
        with pytest.raises(ia.Retryable):
            call()
    assert server.count("PUT", "") == 0


# the way of one photo


@pytest.mark.parametrize(
    ("version", "number"),
    [(version, 2) for version in IMMICH_VERSIONS]
    + [(version, number) for version in ("1.132.3", "3.1.0") for number in (1, 3)]
    + [pytest.param("1.132.3", 50, marks=pytest.mark.long), ("3.1.0", 50)],
)
def test_a_described_photo_costs_few_requests(fake, opened, version, number):
    """Three, two more for its note if there are any, and a few for up to fifty together."""
    server = fake(version)
    server.add_many(number)
    library = opened(server)
    assets = listing(library)
    opening = len(server.exchanges)
    for asset in assets:
        claimed(library, asset)
        library.preview(asset)
        assert library.write(asset, "A photo.", NOTE) is True
    stored = library.read_back(assets, 2.5)
    assert stored == dict.fromkeys(server.assets, "A photo.")
    names = [name for _, name in said(server)[opening:]]
    keeps_notes = server.version >= (2, 5)
    each = ["getAssetMetadataByKey"] * keeps_notes
    each += ["viewAsset", "getAssetInfo"]
    each += ["updateAssetMetadata"] * keeps_notes  # before its text
    each += ["updateAsset"]
    assert names[: len(each) * number] == each * number
    read_back = names[len(each) * number :]
    assert len(read_back) <= min(number, 3)
    assert set(read_back) <= {"getAssetInfo", "getServerVersion", "searchAssets"}
    texts = [e.json for e in server.find("PUT", "") if e.operation.name == "updateAsset"]
    assert texts == [{"description": "A photo."}] * number


def test_the_preview_asked_for_is_the_edited_one(fake, opened):
    server = fake()
    server.add()
    library = opened(server)
    library.preview(*listing(library))
    [exchange] = server.find("GET", "/thumbnail")
    assert exchange.query == {"size": "preview", "edited": "true"}


@pytest.mark.parametrize(
    ("trouble", "requests"),
    [
        (CUT, ["GET", "PUT", "GET"]),  # it was done: seen by the second GET
        (RESET, ["GET", "PUT", "GET", "PUT"]),
        (Reply(502, "<html>Bad Gateway</html>"), ["GET", "PUT", "GET", "PUT"]),
        (Reply(500, {"message": "Internal server error"}), ["GET", "PUT", "GET", "PUT"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_write_that_failed_is_looked_at_before_it_is_repeated(fake, opened, trouble, requests):
    server = fake()
    photo = server.add()
    library = opened(server)
    [asset] = listing(library)
    server.script(*WRITE, trouble)
    with pytest.raises(ia.Retryable):
        library.write(asset, "Written.", NOTE)
    assert library.write(asset, "Written.", NOTE) is True
    assert photo.description == "Written."
    assert [exchange.method for exchange in server.find("GET|PUT", f"{photo.id}$")] == requests


def test_a_write_that_timed_out_but_was_done_is_not_repeated(fake, opened, monkeypatch):
    server = fake()
    photo = server.add()
    library = opened(server)
    [asset] = listing(library)
    server.script(*WRITE, HANG)
    patient = ia.http

    def hurried(session, method, url, *, timeout, **options):
        timeout = 1.0 if re.search(WRITE[1], url) and method == "PUT" else timeout
        return patient(session, method, url, timeout=timeout, **options)

    monkeypatch.setattr(ia, "http", hurried)
    with pytest.raises(ia.Retryable) as raised:
        library.write(asset, "Written late.", NOTE)
    assert raised.value.key == "timed_out"
    photo.description = "Written late."
    assert library.write(asset, "Written late.", NOTE) is True
    assert server.count(*WRITE) == 1


HEADERS = ("CF-Access-Client-Id: 1.access", "CF-Access-Client-Secret: s3cret-of-access")


def test_headers_for_a_login_go_with_each_request(fake, config):
    server = fake()
    server.add_many(2)
    argv = [word for header in HEADERS for word in ("--immich-header", header)]
    given = config("--immich-api-url", server.url, "--immich-api-keys", "alice-key", *argv)
    new_library, _ = ia.open_library(given)
    with closing(new_library()) as library:
        asset = listing(library)[0]
        library.preview(asset)
        claimed(library, asset)
        library.write(asset, "A text.", NOTE)
        library.clock()
    assert len(server.exchanges) > 6
    for exchange in server.exchanges:
        for header in HEADERS:
            name, _, value = header.partition(": ")
            assert exchange.headers[name] == value


ORIGINAL = servers.own_picture(7)
GIF = b"GIF89a" + bytes(20)


@pytest.mark.parametrize(
    ("size", "location", "original", "asked"),
    [
        ("preview", "", b"", ["preview"]),
        ("thumbnail", "", b"", ["thumbnail"]),
        ("fullsize", "original?edited=true", ORIGINAL, ["fullsize", "original"]),
        ("fullsize", "original?edited=true", GIF, ["fullsize", "original", "preview"]),
        ("fullsize", "thumbnail?edited=true&size=preview", b"", ["fullsize", "preview"]),
    ],
)
def test_the_picture_has_the_size_asked_for(
    fake, config, size, location, original, asked, monkeypatch
):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # which is not asked on the way either
    server = fake()
    photo = server.add(preview=servers.own_picture(1))
    given = config(
        *("--immich-api-url", server.url, "--immich-api-keys", "alice-key"),
        *("--thumbnail-size", size, "--immich-header", "X-Login: let me in"),
    )
    new_library, _ = ia.open_library(given)
    if location:
        server.script("GET", "/thumbnail", Reply(302, "", {"Location": location}))
    server.script("GET", "/original", Reply(200, original, {"Content-Type": "image/jpeg"}))
    with closing(new_library()) as library:
        [asset] = listing(library)
        data = library.preview(asset)
    small = {"thumbnail": servers.SMALL_PICTURE}.get(size, photo.preview)
    assert data == (ORIGINAL if original == ORIGINAL else small)
    seen = server.find("GET", "/thumbnail|/original")
    assert [x.query.get("size", "original") for x in seen] == asked
    assert {x.headers["x-api-key"] for x in seen} == {"alice-key"}
    assert {x.headers["X-Login"] for x in seen} == {"let me in"}
    assert {x.query["edited"] for x in seen} == {"true"}
    assert all("/original" in problem for problem in server.problems)  # not in the contract here
    server.problems.clear()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_named_and_not_followed(fake, opened, status):
    server, other = fake(), fake(keys={"alice-key": "alice"})
    server.add_many(2)
    library = opened(server)
    [asset, _] = listing(library)
    target = other.url.replace("//", "//user:secret@") + "/login?token=secret"
    server.script(".*", "/", Reply(status, "", {"Location": target}), forever=True)
    for call in (
        lambda: library.page(None),
        lambda: library.preview(asset),
        lambda: claimed(library, asset),
        lambda: library.write(asset, "Nowhere.", NOTE),
        lambda: library.read_back([asset], 0),
        lambda: library.remember(asset, NOTE),
    ):
        with pytest.raises(ia.Unavailable) as raised:
            call()
        assert f"{other.url}/login" in str(raised.value)
        assert "secret" not in str(raised.value)
    assert other.exchanges == []


@pytest.mark.parametrize(
    "case", ["asset-get-not-owned", "asset-get-locked", "search-metadata-visibility-locked"]
)
@pytest.mark.parametrize("version", ["2.7.5", "3.1.0"])
def test_a_photo_taken_away_is_gone_for_preview_and_write(fake, opened, version, case):
    server = fake(version)
    server.add()
    library = opened(server)
    [asset] = listing(library)
    server.script("GET|PUT", "/assets/", servers.recorded(f"immich-{version}", case), forever=True)
    with pytest.raises(ia.Skip):
        library.preview(asset)
    with pytest.raises(ia.Skip):
        library.write(asset, "Too late.", NOTE)
    assert library.read_back([asset], 0) == {}
    library.remember(asset, NOTE)  # nobody is told
    library.remember(asset, None)


# whatever the other side says

ODD_REPLIES = {
    "no body": Reply(204),
    "empty": Reply(200, ""),
    "HTML": Reply(200, "<html>Log in</html>"),
    "null": Reply(200, "null"),
    "list": Reply(200, "[]"),
    "text": Reply(200, '"text"'),
    "number": Reply(200, "5"),
    "odd total": Reply(200, {"total": "many", "assets": 5, "exifInfo": 5}),
    "no numbers": Reply(200, {"total": {}, "assets": {"items": 5}, "exifInfo": {"description": 5}}),
    "deep": Reply(200, "[" * 100_000),
    "bytes": Reply(200, b"\xff\xfe\x00"),
    "not gzip": Reply(200, "text", {"Content-Encoding": "gzip"}),
    "partial": Reply(206, b"\xff\xd8"),
    "not modified": Reply(304),
    "moved nowhere": Reply(302, ""),
    **{f"{n}": Reply(n, {"message": "no"}) for n in (400, 401, 402, 403, 404, 409, 413, 418, 429)},
    **{f"{n} HTML": Reply(n, "<p>Sorry</p>") for n in (400, 403, 404, 500, 502, 503, 504, 520)},
    "messages": Reply(400, {"message": ["one", "two"], "error": "Bad Request"}),
    "odd message": Reply(400, {"message": {"message": 5}}),
    "maintenance": MAINTENANCE,
    "cut": CUT,
    "reset": RESET,
}


@pytest.mark.measured
@pytest.mark.parametrize("reply", ODD_REPLIES.values(), ids=ODD_REPLIES)
def test_whatever_the_reply_only_our_errors_are_raised(fake, settings, opened, reply):
    server = fake(keys={"key": FakeKey("alice", EVERYTHING)})
    server.add_many(2)
    library = opened(server)
    [asset, _] = listing(library)
    server.script(".*", "/", reply, forever=True)
    calls = [
        lambda: library.page(None),
        lambda: library.preview(asset),
        lambda: claimed(library, asset),
        lambda: library.write(asset, "Perhaps.", NOTE),
        lambda: library.read_back([asset], 0),
        lambda: library.read_back([asset] * 3, 0),
        lambda: library.remember(asset, NOTE),
        lambda: library.remember(asset, None),
        library.total,
        lambda: ia.open_library(settings(server)),
    ]
    for call in calls:
        with suppress(ia.AnalyzeError):
            call()


@pytest.mark.parametrize(
    "path", ["/api-keys/me", "/users/me", "/server/version"], ids=lambda path: path[1:]
)
@pytest.mark.parametrize("body", ["null", "[]", "{}", '{"permissions": 5}', '{"major": []}'])
def test_whatever_is_said_at_the_start_only_our_errors_are_raised(fake, settings, path, body):
    server = fake()
    server.script("GET", path, Reply(200, body))
    with suppress(ia.AnalyzeError):
        new_library, _ = ia.open_library(settings(server))
        new_library().close()


# the total


def test_the_total_counts_all_keys_and_visibilities(fake, opened):
    keys = {f"{name}-key": FakeKey(name, EVERYTHING) for name in ("alice", "bob")}
    server = fake(keys=keys)
    for owner, visibility in itertools.product(("alice", "bob"), ("timeline", "archive", "hidden")):
        server.add(owner=owner, visibility=visibility)
    assert opened(server).total() == 4


def test_a_total_that_may_not_be_asked_for_is_an_error_of_ours(fake, opened):
    server = fake(keys={"key": FakeKey("alice", KNOWING)})
    with pytest.raises(ia.Fatal) as raised:
        opened(server).total()
    assert raised.value.fields["permission"] == "asset.statistics"


# secrets


def test_no_key_shows_in_errors_log_or_repr(fake, settings, opened, caplog):
    caplog.set_level(logging.DEBUG)
    keys = {"good-secret": FakeKey("alice", KNOWING), "bad-secret": FakeKey("bob", ())}
    server = fake(keys=keys)
    library = opened(server)
    with pytest.raises(ia.Fatal) as raised:
        ia.open_library(settings(server, "bad-secret", "wrong-secret"))
    told = [*caplog.messages, str(raised.value), repr(raised.value), repr(settings(server))]
    told += [repr(account) for account in library._accounts.values()]
    assert "secret" not in json.dumps(told)
