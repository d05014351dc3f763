"""The fakes say what the real servers said, and notice what the real ones would not forgive."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import pytest
import requests
from facts import Album, Line, Person
from servers import (
    BODY_LIMIT,
    CONTRACTS,
    CUT,
    EVERYTHING,
    HANG,
    IMMICH_VERSIONS,
    MINIMAL,
    PATIENCE,
    RESET,
    FakeImmich,
    FakeKey,
    FakeLlamaCpp,
    FakeOllama,
    FakeServer,
    Reply,
    colour_of,
    cut,
    empty,
    immich_contract,
    model_contract,
    own_picture,
    picture,
    recorded,
    thinking,
    told,
)
from worlds import ApiWorld

pytestmark = pytest.mark.slow

RED = picture("red")
STRANGER = "bob"


def load(name):
    return json.loads((CONTRACTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def session():
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture
def run(request):
    """Start fakes that are closed, but not checked, at the end."""

    def start(fake):
        fake.start()
        request.addfinalizer(fake.close)
        return fake

    return start


@pytest.fixture
def call(session):
    """Send a request to a fake Immich with its first key."""

    def send(immich, method, path, **more):
        more.setdefault("headers", {"x-api-key": immich.key})
        return session.request(method, f"{immich.url}/api{path}", timeout=PATIENCE, **more)

    return send


class Clock:
    """The time of a fake: it stands still but for what a test lets pass."""

    def __init__(self):
        self.moment = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self):
        return self.moment

    def wait(self, seconds):
        self.moment += timedelta(seconds=seconds)


@pytest.fixture
def clock():
    return Clock()


def search(call, immich, **wanted):
    reply = call(immich, "POST", "/search/metadata", json=wanted)
    assert reply.status_code == 200, reply.text
    return reply.json()["assets"]


def names(call, immich, **wanted):
    return [item["originalFileName"] for item in search(call, immich, **wanted)["items"]]


# --- Immich as recorded ----------------------------------------------------------------------

NOT_MODELLED = {"thumbnail-size-original"}
RECORDED = load("immich-errors")
REPLIES = load("immich-replies")
ERRORS = [
    (version, case)
    for version in ("2.7.5", "3.1.0")
    for case in RECORDED[version]
    if case not in NOT_MODELLED
]


def headers_of(case):
    """What the recorded request said of itself, told by the name of the case."""
    if case.endswith("no-key"):
        return {}
    if case.endswith("key-as-bearer"):
        return {"Authorization": "Bearer alice-key"}
    return {"x-api-key": "wrong" if case.endswith("wrong-key") else "alice-key"}


def ids_in(entry):
    path = entry["request"].partition("?")[0].split("/")
    ids = [part for part in path if part.count("-") == 4]
    body = entry.get("json") or {}
    return ids + [item["assetId"] for item in body.get("items", ()) if "assetId" in item]


def library_of(version, case, entry):
    """A library in which the recorded request meets what it met then."""
    few = ("missing-permission", "no-permission")
    keys = {"alice-key": FakeKey("alice", ("memory.read",) if case.endswith(few) else MINIMAL)}
    immich = FakeImmich(version, keys, partners={"alice": [STRANGER]} if "partner" in case else {})
    ids = (
        []
        if any(word in case for word in ("unknown-id", "unknown-asset", "force-delete"))
        else (ids_in(entry))
    )
    for asset_id in ids[:1] if case.endswith("one-unknown") else ids:
        immich.add(
            id=asset_id.lower(),
            owner=STRANGER if case.endswith(("not-owned", "partner")) else "alice",
            visibility="locked" if case.endswith("locked") else "timeline",
            preview=None if "before-ready" in case or "preview-of" in case else RED,
        )
    immich.maintenance = case.startswith("maintenance")
    immich.database_down = case.startswith("database-down")
    return immich


@pytest.mark.parametrize(("version", "case"), ERRORS)
def test_immich_refuses_as_recorded(run, session, version, case):
    entry = RECORDED[version][case]
    immich = run(library_of(version, case, entry))
    method, path = entry["request"].split(" ")
    body = {"data": b'{"size":'} if case.endswith("bad-json") else {"json": entry.get("json")}
    reply = session.request(
        method, immich.url + path, headers=headers_of(case), timeout=PATIENCE, **body
    )
    assert reply.status_code == entry["status"]
    assert reply.headers["Content-Type"] == entry["type"]
    said, then = reply.json(), entry["body"]
    assert said.keys() == then.keys()
    assert said | {"correlationId": ""} == then | {"correlationId": ""}
    assert not [problem for problem in immich.problems if problem.startswith("reply")]


def alike(said, then, where="body"):
    """The same names and kinds of values, all the way down; null says nothing of its kind."""
    if said is None or then is None:
        return
    assert type(said) is type(then) or {type(said), type(then)} == {int, float}, where
    if isinstance(then, dict):
        assert said.keys() == then.keys(), where
        for name in then:
            alike(said[name], then[name], f"{where}/{name}")
    elif isinstance(then, list) and said and then:
        alike(said[0], then[0], f"{where}/0")


@pytest.mark.parametrize("version", ["2.7.5", "3.1.0"])
@pytest.mark.parametrize("case", REPLIES["3.1.0"])
def test_immich_answers_as_recorded(run, session, version, case):
    entry = REPLIES[version][case]
    immich = run(FakeImmich(version))
    note = {"v": 1, "text": "0123456789abcdef", "model": "m", "prompt": "0123456789ab", "at": "x"}
    notes = {} if case.endswith("empty") else {"immich-analyze": note}
    for asset_id in dict.fromkeys(ids_in(entry)):
        immich.add(id=asset_id, type="VIDEO" if "video" in case else "IMAGE", notes=notes)
    immich.add_many(24)
    immich.add("LIVE.mov", type="VIDEO", visibility="hidden", preview=None)
    method, path = entry["request"].split(" ")
    reply = session.request(
        method,
        immich.url + path,
        headers={"x-api-key": immich.key},
        json=entry.get("json"),
        timeout=PATIENCE,
    )
    assert reply.status_code == entry["status"]
    assert reply.headers["Content-Type"] == entry["type"]
    if entry["body"] is None:
        assert set(entry["headers"]) <= reply.headers.keys()
    else:
        alike(reply.json(), entry["body"])
    immich.check()


@pytest.mark.parametrize("version", ["2.7.5", "3.1.0"])
def test_the_contract_fits_the_recordings(version):
    contract = immich_contract(version)
    for entry in REPLIES[version].values():
        method, path = entry["request"].split(" ")
        operation, _ = contract.find(method, path.removeprefix("/api").partition("?")[0])
        if "json" in entry:
            operation.request.validate(entry["json"])
        if entry["body"] is not None:
            operation.reply(entry["status"]).validate(entry["body"])
    for entry in RECORDED[version].values():
        contract.error.validate(entry["body"])


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_every_release_keeps_its_own_contract(run, call, version):
    immich = run(FakeImmich(version, {"k": FakeKey("alice", EVERYTHING)}))
    photo, _ = immich.add(), immich.add("clip.mp4", type="VIDEO", preview=None)
    for method, path in [
        ("GET", "/server/ping"),
        ("GET", "/server/version"),
        ("GET", "/users/me"),
        ("GET", "/api-keys/me"),
        ("POST", "/auth/validateToken"),
        ("GET", f"/assets/{photo.id}"),
        ("GET", f"/assets/{photo.id}/thumbnail?size=preview&edited=true"),
        ("GET", f"/assets/{photo.id}/metadata"),
    ]:
        there = immich.contract.find(method, path.partition("?")[0])
        assert call(immich, method, path).status_code == (200 if there else 404), path
    assert call(immich, "PUT", f"/assets/{photo.id}", json={"description": "x"}).ok
    assert len(search(call, immich, withExif=True)["items"]) == 2
    if immich.contract.find("POST", "/search/statistics"):
        assert call(immich, "POST", "/search/statistics", json={}).json() == {"total": 2}
    immich.check()


# --- Immich beyond the recordings ------------------------------------------------------------


def test_a_description_is_stored_and_read_back(run, call):
    immich = run(FakeImmich())
    asset = immich.add()
    reply = call(immich, "PUT", f"/assets/{asset.id}", json={"description": "A cat\ud800."})
    assert reply.json()["exifInfo"]["description"] == "A cat\ufffd."
    assert asset.description == "A cat\ufffd."
    assert search(call, immich, withExif=True)["items"][0]["exifInfo"]["description"] == "A cat�."
    immich.check()


@pytest.mark.parametrize(
    ("version", "wanted", "found"),
    [
        ("1.132.3", {}, "timeline hidden"),
        ("1.132.3", {"isVisible": True}, "timeline"),
        ("1.132.3", {"withArchived": True}, "timeline archive hidden"),
        ("1.132.3", {"isArchived": True}, "archive"),
        ("2.7.5", {}, "timeline"),
        ("2.7.5", {"visibility": "archive"}, "archive"),
        ("3.1.0", {}, "timeline archive hidden"),
        ("3.1.0", {"visibility": "timeline"}, "timeline"),
        ("3.3.5", {}, "timeline archive hidden"),
    ],
)
def test_what_a_search_shows_depends_on_the_release(run, call, version, wanted, found):
    immich = run(FakeImmich(version))
    for visibility in ("timeline", "archive", "hidden", "locked"):
        if (version, visibility) != ("1.132.3", "locked"):
            immich.add(visibility, visibility=visibility)
    immich.add("trash", is_trashed=True)
    assert names(call, immich, order="asc", **wanted) == found.split()
    immich.check()


def test_a_search_with_exif_leaves_out_who_has_none(run, call):
    immich = run(FakeImmich())
    immich.add("a", exif=False)
    immich.add("b", extra={"rating": 5})
    assert names(call, immich) == ["b", "a"]
    immich.assets[search(call, immich)["items"][0]["id"]].description = "A red Cat"
    assert names(call, immich, description="cat") == ["b"]
    assert names(call, immich, description="dog") == []
    (only,) = search(call, immich, withExif=True)["items"]
    assert only["exifInfo"]["rating"] == 5
    assert "exifInfo" not in search(call, immich)["items"][0]


def test_pages_end_with_null(run, call):
    immich = run(FakeImmich())
    immich.add_many(5)
    pages = [search(call, immich, size=2, page=page) for page in (1, 2, 3, 4)]
    assert [(page["total"], page["nextPage"]) for page in pages] == [
        (2, "2"),
        (2, "3"),
        (1, None),
        (0, None),
    ]
    assert search(call, immich, size=5)["nextPage"] is None


@pytest.mark.parametrize(("version", "stable"), [("2.7.5", False), ("3.1.0", True)])
def test_photos_of_one_date_keep_their_order_only_from_3_1(run, call, version, stable):
    immich = run(FakeImmich(version))
    immich.add_many(40, created=datetime(2024, 1, 1, tzinfo=UTC))
    orders = {tuple(names(call, immich, size=40)) for _ in range(4)}
    assert (len(orders) == 1) is stable


def test_dates_are_compared_exactly_but_told_in_milliseconds(run, call):
    immich = run(FakeImmich())
    taken = datetime(2024, 1, 1, 12, 0, 0, 123456, UTC)
    immich.add("a", created=taken)
    (item,) = search(call, immich)["items"]
    assert item["fileCreatedAt"] == "2024-01-01T12:00:00.123Z"
    assert names(call, immich, takenBefore=item["fileCreatedAt"]) == []
    assert names(call, immich, takenBefore="2024-01-01T12:00:00.124Z") == ["a"]
    assert names(call, immich, takenAfter=item["fileCreatedAt"]) == ["a"]
    immich.check()


def test_uploads_are_found_from_their_moment_on(run, call):
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    immich = run(FakeImmich(now=lambda: moment))
    immich.add("old", created_at=moment - timedelta(seconds=1))
    immich.add("new")
    assert names(call, immich, createdAfter=moment.isoformat()) == ["new"]
    assert names(call, immich, createdBefore="2025-12-31T23:59:59Z") == ["old"]
    assert names(call, immich, updatedAfter=moment.isoformat(), type="IMAGE") == ["new"]
    assert names(call, immich, updatedBefore="2025-12-31T23:59:59Z") == ["old"]


@pytest.mark.parametrize(
    "change", [{"preview": RED}, {"is_trashed": True}, {"visibility": "archive"}]
)
def test_a_photo_is_updated_when_its_preview_is_made_or_it_is_moved(run, call, clock, change):
    immich = run(FakeImmich(now=clock))
    asset = immich.add("new", preview=None)
    added = clock()
    clock.wait(10)
    (name, value), visibility = *change.items(), change.get("visibility", "timeline")
    setattr(asset, name, value)
    wanted = {"withDeleted": True, "visibility": visibility}
    assert names(call, immich, updatedAfter=clock().isoformat(), **wanted) == ["new"]
    assert names(call, immich, createdAfter=clock().isoformat(), **wanted) == []
    assert (asset.created_at, asset.updated) == (added, clock())


def test_a_reply_may_depend_on_the_request(run, call):
    immich = run(FakeImmich())
    refused = Reply(500, {"message": "sick"})
    immich.script("GET", "", lambda exchange: refused if exchange.query else None, forever=True)
    assert call(immich, "GET", "/server/version?x=1").status_code == 500
    assert call(immich, "GET", "/server/version").status_code == 200


def test_the_date_is_that_of_its_clock(run, call, clock):
    immich = run(FakeImmich(now=clock))
    reply = call(immich, "GET", "/server/version")
    assert parsedate_to_datetime(reply.headers["Date"]) == clock().replace(microsecond=0)
    assert immich.exchanges[0].at == clock()


def test_a_moved_and_a_deleted_photo_are_sorted_anew(run, call):
    immich = run(FakeImmich())
    first, second = immich.add("a"), immich.add("b")
    assert names(call, immich) == ["b", "a"]
    first.created = second.created + timedelta(days=1)
    assert names(call, immich) == ["a", "b"]
    del immich.assets[first.id]
    assert names(call, immich) == ["b"]


def test_partners_photos_are_seen_but_not_written(run, call):
    keys = {"alice-key": "alice", "bob-key": "bob"}
    immich = run(FakeImmich(keys=keys, partners={"alice": ["bob"]}))
    his = immich.add(owner="bob")
    assert search(call, immich)["items"][0]["ownerId"] == immich.user("bob").id
    assert call(immich, "GET", f"/assets/{his.id}/thumbnail?size=preview").content == his.preview
    assert call(immich, "PUT", f"/assets/{his.id}", json={"description": "x"}).status_code == 400
    assert call(immich, "PUT", f"/assets/{his.id}", json={}).status_code == 400
    with_his_key = {"headers": {"x-api-key": "bob-key"}, "json": {"description": "x"}}
    assert call(immich, "PUT", f"/assets/{his.id}", **with_his_key).status_code == 200
    immich.check()


def test_a_grid_thumbnail_is_not_the_preview(run, call):
    immich = run(FakeImmich())
    asset = immich.add(preview=picture("red", "WEBP"), mime="image/webp")
    small = call(immich, "GET", f"/assets/{asset.id}/thumbnail").content
    large = call(immich, "GET", f"/assets/{asset.id}/thumbnail?size=preview")
    assert small != large.content == asset.preview
    assert large.headers["Content-Type"] == "image/webp"


@pytest.mark.parametrize(("version", "enforced"), [("1.135.3", False), ("1.144.1", True)])
def test_permissions_count_from_1_137_on(run, call, version, enforced):
    immich = run(FakeImmich(version, {"k": FakeKey("alice", ())}))
    reply = call(immich, "POST", "/search/metadata", json={})
    assert reply.status_code == (403 if enforced else 200)


@pytest.mark.parametrize(
    ("version", "key", "status"),
    [
        ("1.135.3", "mobile-app", 404),
        ("1.144.1", "mobile-app", 200),
        ("1.144.1", "immich-analyze", 400),
        ("2.4.1", "mobile-app", 200),
        ("2.4.1", "immich-analyze", 400),
        ("2.7.5", "immich-analyze", 200),
    ],
)
def test_notes_take_any_key_from_2_5_on(run, call, version, key, status):
    immich = run(FakeImmich(version))
    asset = immich.add()
    items = [{"key": key, "value": {"v": 1}}]
    reply = call(immich, "PUT", f"/assets/{asset.id}/metadata", json={"items": items})
    assert reply.status_code == status
    assert bool(asset.notes) == (status == 200)
    if status == 400:
        said = "items.0.key must be one of the following values: mobile-app"
        assert reply.json()["message"] == [said]
        assert "items/0/key" in complaint(immich)
    else:
        immich.check()


def test_notes_of_many_are_written_together_or_not_at_all(run, call):
    immich = run(FakeImmich())
    mine, his = immich.add_many(2), immich.add(owner=STRANGER)

    def put(*assets):
        items = [{"assetId": asset.id, "key": "k", "value": {"v": 1}} for asset in assets]
        return call(immich, "PUT", "/assets/metadata", json={"items": items})

    assert put(*mine, his).status_code == 400
    assert not any(asset.notes for asset in (*mine, his))
    assert [note["assetId"] for note in put(*mine).json()] == [asset.id for asset in mine]
    assert [asset.notes for asset in mine] == [{"k": {"v": 1}}] * 2
    immich.check()


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_notes_of_many_are_known_from_2_5_on(run, call, version):
    immich = run(FakeImmich(version))
    items = [{"assetId": immich.add().id, "key": "k", "value": {"v": 1}}]
    reply = call(immich, "PUT", "/assets/metadata", json={"items": items})
    assert reply.status_code == (200 if immich.version >= (2, 5) else 400)
    if reply.ok:
        immich.check()


def test_notes_are_kept_replaced_and_deleted(run, call):
    immich = run(FakeImmich())
    asset = immich.add()
    path = f"/assets/{asset.id}/metadata"
    for value in ({"v": 1}, {"v": 2}):
        call(immich, "PUT", path, json={"items": [{"key": "k", "value": value}]})
    assert asset.notes == {"k": {"v": 2}}
    assert call(immich, "GET", f"{path}/k").json()["value"] == {"v": 2}
    assert call(immich, "DELETE", f"{path}/k").status_code == 204
    assert call(immich, "GET", path).json() == []
    assert call(immich, "PUT", "/assets/metadata", json={"items": []}).status_code == 500
    immich.check()


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 500)])
def test_a_description_may_be_as_long_as_a_body(run, call, more, status):
    immich = run(FakeImmich())
    asset = immich.add(description="old")
    text = "x" * (BODY_LIMIT + more - len(json.dumps({"description": ""})))
    reply = call(immich, "PUT", f"/assets/{asset.id}", json={"description": text})
    assert reply.status_code == status
    assert asset.description == (text if status == 200 else "old")
    if status == 500:
        assert reply.json() == {"message": "Internal server error"}
    immich.check()


def test_a_description_with_a_nul_is_not_stored(run, call):
    immich = run(FakeImmich())
    asset = immich.add(description="old")
    reply = call(immich, "PUT", f"/assets/{asset.id}", json={"description": "a\0b"})
    assert (reply.status_code, reply.json()) == (500, {"message": "Failed to update asset"})
    assert asset.description == "old"
    assert immich.hasty == []
    immich.check()


def test_immich_below_a_path(run, call):
    immich = run(FakeImmich(prefix="/photos"))
    assert immich.url.endswith("/photos")
    assert call(immich, "GET", "/server/ping").json() == {"res": "pong"}
    assert call(immich, "GET", "/nope").json() == {"message": "Cannot GET /api/nope"}


# --- What Immich knows of photos -------------------------------------------------------------

NEEDED = (*MINIMAL, "album.read", "tag.read", "asset.statistics")


def known(version="3.1.0", **more):
    """An Immich whose first user is alice; bob is there, too."""
    keys = {"alice-key": FakeKey("alice", NEEDED), "bob-key": FakeKey("bob", NEEDED)}
    return FakeImmich(version, keys, **more)


def asked(call, immich, path, key="alice-key"):
    return call(immich, "GET", path, headers={"x-api-key": key})


def album_names(call, immich, query="", key="alice-key"):
    reply = asked(call, immich, f"/albums{query}", key)
    assert reply.status_code == 200, reply.text
    return sorted(album["albumName"] for album in reply.json())


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_people_come_with_a_search_that_asks_and_with_every_photo(run, call, version):
    immich = run(known(version))
    anna = Person("Anna", birth="1980-02-29", x=40)
    faces = [anna, Person("Ben", hidden=True), Person(""), Person("Eve", deleted=True)]
    photo = immich.add(people=[*faces, Person("Cut", visible=False), replace(anna, x=70)])
    assert search(call, immich)["items"][0]["people"] == []
    (item,) = search(call, immich, withPeople=True)["items"]
    assert item["people"] == asked(call, immich, f"/assets/{photo.id}").json()["people"]
    seen = [(one["name"], one["birthDate"], one["isHidden"]) for one in item["people"]]
    assert sorted(seen) == [("", None, False), ("Anna", "1980-02-29", False), ("Ben", None, True)]
    ids = [one["id"] for one in item["people"]]
    assert immich.version < (3,) or ids == sorted(ids)
    lefts = [face["boundingBoxX1"] for one in item["people"] for face in one.get("faces", ())]
    assert lefts == ([] if immich.version >= (3,) else [40, 70, 0, 0])
    found = ids[seen.index(("Anna", "1980-02-29", False))]
    immich.add("nobody")
    assert names(call, immich, personIds=[found]) == [photo.name]
    immich.check()


def test_each_user_names_a_person_and_no_photo_is_updated_by_it(run, call, clock):
    immich = run(known("3.3.5", now=clock))
    anna = Person("Anna")
    immich.add(people=[anna]), immich.add(people=[replace(anna, name="Mum")], owner="bob")
    before = search(call, immich, withPeople=True)["items"]
    clock.wait(10)
    immich.name_person(anna, "Anne")
    (item,) = search(call, immich, withPeople=True)["items"]
    assert [one["name"] for one in item["people"]] == ["Anne"]
    assert item["updatedAt"] == before[0]["updatedAt"]
    with_his_key = {"headers": {"x-api-key": "bob-key"}, "json": {"withPeople": True}}
    reply = call(immich, "POST", "/search/metadata", **with_his_key).json()
    (his,) = reply["assets"]["items"][0]["people"]
    assert (his["name"], his["id"]) == ("Mum", item["people"][0]["id"])
    immich.check()


def test_the_date_of_the_place_is_written_as_if_it_were_utc(run, call):
    world = ApiWorld(run(known()))
    world.add(
        picture=RED,
        taken="2019-07-14T15:30:00",
        place=("Warnemünde", "Mecklenburg-Vorpommern", "Germany"),
        gps=(54.18, 12.08),
        camera={"make": "Canon", "fNumber": 2.8},
    )
    (item,) = search(call, world.server, withExif=True)["items"]
    assert item["localDateTime"] == "2019-07-14T15:30:00.000Z"
    assert item["fileCreatedAt"] == "2019-07-14T13:30:00.000Z"
    there = {"city": "Warnemünde", "longitude": 12.08, "fNumber": 2.8, "model": None}
    assert item["exifInfo"].items() >= there.items()
    world.server.check()


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_tags_come_with_a_photo_and_in_a_list_but_with_no_search(run, call, clock, version):
    immich = run(known(version, now=clock))
    photo, _ = immich.add("sea", tags=["Travel/Sea"]), immich.add("none")
    (tag,) = asked(call, immich, f"/assets/{photo.id}").json()["tags"]
    listed = asked(call, immich, "/tags").json()
    above, below = listed
    assert (above["name"], above["value"], "parentId" in above) == ("Travel", "Travel", False)
    assert (below["name"], below["value"], below["parentId"]) == ("Sea", tag["value"], above["id"])
    assert "tags" not in search(call, immich)["items"][0]
    assert names(call, immich, tagIds=[above["id"]]) == ["sea"]
    assert names(call, immich, tagIds=[]) == ["none", "sea"]
    clock.wait(10)
    immich.tag(photo, "New")
    assert names(call, immich, updatedAfter=clock().isoformat()) == ["sea"]
    assert len(asked(call, immich, f"/assets/{photo.id}").json()["tags"]) == 2
    immich.check()


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_the_text_on_a_picture_is_there_from_2_2_on(run, call, version):
    immich = run(known(version))
    photo = immich.add(ocr=["HARBOUR", Line("cut off", visible=False), "No parking"])
    reply = asked(call, immich, f"/assets/{photo.id}/ocr")
    if immich.version < (2, 2):
        assert reply.status_code == 404
    else:
        assert [row["text"] for row in reply.json()] == ["HARBOUR", "No parking"]
        assert asked(call, immich, f"/assets/{immich.add().id}/ocr").json() == []
    immich.check()


OWN, HIS = Album("own", "alice"), Album("bob's own", "bob")
LENT, BORROWED = Album("shared by alice", "alice", ["bob"]), Album("by bob", "bob", ["alice"])


def with_albums(immich):
    for album in (OWN, HIS, LENT, BORROWED):
        immich.album(album)
    return immich


@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_albums_are_listed_in_one_call_from_3_0_on_and_in_two_before(run, call, version):
    immich = with_albums(run(known(version)))
    own, shared = [OWN.name, LENT.name], [BORROWED.name, LENT.name]
    if immich.version < (3,):
        assert album_names(call, immich) == own
        assert album_names(call, immich, "?shared=true") == shared
    else:
        every = sorted({*own, *shared})
        assert album_names(call, immich) == album_names(call, immich, "?shared=true") == every
        assert album_names(call, immich, "?isOwned=true") == own
        assert album_names(call, immich, "?isOwned=false&isShared=true") == [BORROWED.name]
        assert album_names(call, immich, "?name=own") == [OWN.name]
    immich.check()


def test_an_album_needs_album_read_and_the_list_of_tags_tag_read(run, call):
    immich = run(FakeImmich())
    for path, needed in (("/albums", "album.read"), ("/tags", "tag.read")):
        reply = call(immich, "GET", path)
        assert reply.status_code == 403
        assert reply.json()["message"] == f"Missing required permission: {needed}"


def test_a_search_in_an_album_finds_everybodys_photos_and_in_two_what_is_in_both(run, call, clock):
    immich = with_albums(run(known(now=clock)))
    mine, other, bobs = immich.add("mine"), immich.add("other"), immich.add("bobs", owner="bob")
    clock.wait(10)
    for photo, album in [(mine, LENT), (bobs, LENT), (mine, BORROWED), (other, BORROWED)]:
        immich.add_to_album(photo, album)
    assert names(call, immich, updatedAfter=clock().isoformat()) == []
    assert names(call, immich, albumIds=[LENT.id]) == ["bobs", "mine"]
    assert names(call, immich, albumIds=[LENT.id, BORROWED.id]) == ["mine"]
    assert names(call, immich, albumIds=[]) == ["other", "mine"]
    assert asked(call, immich, f"/assets/{bobs.id}").status_code == 200
    assert album_names(call, immich, f"?assetId={bobs.id}") == [LENT.name]
    for album_id in (HIS.id, mine.id):
        reply = call(immich, "POST", "/search/metadata", json={"albumIds": [album_id]})
        assert reply.status_code == 400
        assert reply.json()["message"] == "Not found or no album.read access"
    immich.check()


def test_before_1_135_a_search_in_an_album_finds_the_whole_library(run, call):
    immich = run(known("1.132.3", tolerated={"albumIds"}))
    immich.add("a"), immich.add("b")
    album = immich.add_to_album(immich.add("c"), "Summer")
    assert names(call, immich, albumIds=[album.id]) == ["c", "b", "a"]
    immich.check()


def test_favourites_and_libraries_can_be_searched_for(run, call):
    immich = run(known())
    immich.add("a", is_favorite=True), immich.add("b", library_id=LIBRARY)
    assert names(call, immich, isFavorite=True) == ["a"]
    assert names(call, immich, libraryId=LIBRARY) == ["b"]
    assert names(call, immich, libraryId=None) == ["b", "a"]
    immich.check()


def test_an_underscore_counts_the_photos_with_any_text(run, call):
    immich = run(known())
    for text in ("A cat.", " ", "", "100 %"):
        immich.add(description=text)

    def number(**wanted):
        return call(immich, "POST", "/search/statistics", json=wanted).json()["total"]

    assert (number(description="_"), number(), number(description=" ")) == (3, 4, 4)
    patterns = ("a c_t", "a%t", "0.")
    assert [number(description=pattern) for pattern in patterns] == [1, 1, 0]
    immich.check()


# --- What becomes of a description -----------------------------------------------------------

LIBRARY = "0b6b3e65-5f3a-4f0a-9a3d-3f1c6f0f5a11"


@pytest.fixture
def describe(call):
    """Send a description as a client does; gives the one in the answer."""

    def send(immich, asset, text):
        reply = call(immich, "PUT", f"/assets/{asset.id}", json={"description": text})
        assert reply.status_code == 200, reply.text
        return reply.json()["exifInfo"]["description"]

    return send


def shown(call, immich, asset):
    """The descriptions that a client sees: one photo's answer, and a search's."""
    (item,) = search(call, immich, id=asset.id, withExif=True)["items"]
    alone = call(immich, "GET", f"/assets/{asset.id}").json()
    return {alone["exifInfo"]["description"], item["exifInfo"]["description"]}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" \n A cat.\u00a0\n", "A cat."),
        ("1.50", "1.5"),
        ("2.00", "2"),
        ("12345", "12345"),
        ("007.50", "007.50"),
        ("1.50 m", "1.50 m"),
        ("One\n\ttwo <&> \U0001f408", "One\n\ttwo <&> \U0001f408"),
        ("   ", ""),
    ],
)
@pytest.mark.parametrize("version", ["1.144.1", "2.7.5", "3.1.0"])
def test_a_text_goes_through_a_file_soon_after_it_was_stored(
    run, call, clock, describe, version, text, kept
):
    immich = run(FakeImmich(version, now=clock))
    asset = immich.add()
    search(call, immich, withExif=True)
    assert describe(immich, asset, text) == text
    assert (asset.description, shown(call, immich, asset)) == (text, {text})
    clock.wait(0.099)
    assert (asset.description, shown(call, immich, asset)) == (text, {text})
    clock.wait(0.001)
    assert shown(call, immich, asset) == {kept}
    assert asset.description == kept
    immich.check()


def test_the_delay_can_be_chosen_and_the_answer_never_waits_for_it(run, clock, describe):
    immich = run(FakeImmich(now=clock, sidecar_delay=0))
    asset = immich.add()
    assert describe(immich, asset, " now ") == " now "
    assert asset.description == "now"
    clock.wait(1)
    immich.sidecar_delay = 5
    describe(immich, asset, " late ")
    clock.wait(4)
    assert asset.description == " late "
    clock.wait(1)
    assert asset.description == "late"


def test_a_photo_is_updated_again_when_its_text_comes_back(run, call, clock, describe):
    immich = run(FakeImmich(now=clock))
    asset = immich.add()
    clock.wait(10)
    describe(immich, asset, "A cat.")
    stored = asset.updated
    assert stored == clock()
    after = (stored + timedelta(milliseconds=1)).isoformat()
    assert names(call, immich, updatedAfter=after) == []
    clock.wait(60)
    assert names(call, immich, updatedAfter=after) == [asset.name]
    assert asset.updated == stored + timedelta(seconds=0.1)
    (item,) = search(call, immich)["items"]
    assert item["updatedAt"] == "2026-01-01T00:00:10.100Z"


@pytest.mark.parametrize("camera", ["", "By the camera"])
@pytest.mark.parametrize("version", IMMICH_VERSIONS)
def test_a_library_that_can_only_be_read_loses_texts_except_on_2_4(
    run, call, clock, describe, version, camera
):
    immich = run(FakeImmich(version, now=clock))
    asset = immich.add(read_only=True, library_id=LIBRARY, camera=camera)
    assert shown(call, immich, asset) == {camera}
    assert describe(immich, asset, "A cat. ") == "A cat. "
    assert asset.description == "A cat. "
    clock.wait(0.1)
    # On 2.4 the lock outlasts the write, and the text is not even trimmed.
    assert asset.description == ("A cat. " if version == "2.4.1" else camera)
    assert shown(call, immich, asset) == {asset.description}
    assert search(call, immich)["items"][0]["libraryId"] == LIBRARY
    immich.check()


def test_a_text_over_the_cameras_stays_where_immich_may_write(run, call, clock, describe):
    immich = run(FakeImmich(now=clock))
    asset = immich.add(camera="By the camera", library_id=LIBRARY)
    for text in ("A cat.", ""):
        clock.wait(1)
        describe(immich, asset, text)
        clock.wait(1)
        assert asset.description == text
        immich.refresh_metadata(asset)
        assert asset.description == text
    assert call(immich, "GET", f"/assets/{immich.add().id}").json()["libraryId"] is None


@pytest.mark.parametrize(
    ("pause", "kept"), [(0, "first"), (0.029, "first"), (0.03, "second"), (0.2, "second")]
)
@pytest.mark.parametrize("delay", [0.01, 0.1])
def test_a_second_text_at_once_is_lost(run, call, clock, describe, pause, kept, delay):
    immich = run(FakeImmich(now=clock, sidecar_delay=delay))
    asset, other = immich.add_many(2)
    describe(immich, asset, "first")
    clock.wait(pause)
    describe(immich, other, "of another photo")
    assert describe(immich, asset, "second") == "second"
    assert asset.description == "second"
    clock.wait(delay)
    assert asset.description == kept
    assert shown(call, immich, asset) == {kept}
    assert other.description == "of another photo"
    assert immich.count("PUT", "/assets/") == 3
    assert immich.hasty == [asset.id]
    immich.check()


def test_of_many_texts_at_once_the_first_is_kept_and_the_next_is_stored(run, clock, describe):
    immich = run(FakeImmich(now=clock))
    asset = immich.add()
    for text in ("one", "two", "three"):
        describe(immich, asset, text)
        clock.wait(0.02)
    clock.wait(1)
    assert asset.description == "one"
    describe(immich, asset, "four")
    clock.wait(1)
    assert asset.description == "four"
    assert immich.hasty == [asset.id] * 2


def test_what_is_sent_again_within_a_second_is_noted_once_it_took_effect(
    run, call, clock, describe
):
    immich = run(FakeImmich(now=clock))
    asset = immich.add()
    immich.script("PUT", "/assets/", RESET, Reply(502), CUT)
    for _ in range(3):
        with contextlib.suppress(requests.RequestException):
            call(immich, "PUT", f"/assets/{asset.id}", json={"description": "A cat."})
    assert immich.hasty == []
    clock.wait(0.999)
    assert call(immich, "PUT", f"/assets/{asset.id}", json={}).ok
    describe(immich, asset, "A cat.")
    assert immich.hasty == [asset.id]
    clock.wait(1)
    describe(immich, asset, "A cat.")
    assert immich.hasty == [asset.id]
    immich.check()


def test_what_a_test_writes_is_there_for_good(run, clock, describe):
    immich = run(FakeImmich(now=clock))
    asset = immich.add(description="old")
    immich.refresh_metadata(asset)
    assert asset.description == "old"
    describe(immich, asset, "By the client.")
    asset.description = "By a person."
    clock.wait(1)
    assert asset.description == "By a person."
    immich.refresh_metadata(asset)
    assert asset.description == "By a person."


@pytest.mark.parametrize(
    ("version", "fields", "kept"),
    [
        ("3.1.0", {"read_only": True}, "By the camera"),
        ("3.1.0", {"read_only": True, "locked": True}, "Typed."),
        ("3.1.0", {"read_only": True, "xmp": "Beside it"}, "Beside it"),
        ("3.1.0", {}, "Typed."),
        ("1.144.1", {"read_only": True}, "By the camera"),
    ],
)
def test_the_files_are_read_again_at_an_administrators_wish(
    run, call, clock, version, fields, kept
):
    immich = run(FakeImmich(version, now=clock))
    asset = immich.add(description="Typed.", camera="By the camera", **fields)
    assert shown(call, immich, asset) == {"Typed."}
    clock.wait(5)
    immich.refresh_metadata(asset)
    assert shown(call, immich, asset) == {kept}
    assert asset.updated == clock()


@pytest.mark.parametrize(
    ("version", "during"), [("1.144.1", ""), ("2.4.1", "new"), ("3.1.0", "new")]
)
def test_reading_the_files_again_does_not_overtake_a_text_on_its_way(
    run, clock, describe, version, during
):
    immich = run(FakeImmich(version, now=clock))
    asset = immich.add()
    describe(immich, asset, "new")
    immich.refresh_metadata(asset)
    assert asset.description == during
    clock.wait(1)
    immich.refresh_metadata(asset)
    assert (asset.updated, asset.description) == (clock(), "new")


def test_a_write_and_reading_the_files_make_an_exif_row(run, call, describe):
    immich = run(FakeImmich())
    written, read = immich.add(exif=False), immich.add(exif=False, camera="By the camera")
    assert search(call, immich, withExif=True)["items"] == []
    describe(immich, written, "A cat.")
    assert shown(call, immich, written) == {"A cat."}
    immich.refresh_metadata(read)
    assert shown(call, immich, read) == {"By the camera"}


def test_a_photo_may_be_deleted_while_its_text_is_on_its_way(run, call, clock, describe):
    immich = run(FakeImmich(now=clock))
    asset = immich.add()
    describe(immich, asset, "A cat. ")
    del immich.assets[asset.id]
    clock.wait(1)
    assert names(call, immich) == []
    immich.check()


def test_an_asset_starts_with_what_its_files_say(run, call):
    immich = run(FakeImmich())
    for fields in ({"camera": " a "}, {"camera": "b", "xmp": "a"}, {"camera": "b", "xmp": ""}):
        asset = immich.add(**fields)
        wanted = "a" if asset.xmp != "" else ""
        assert asset.description == wanted
        assert shown(call, immich, asset) == {wanted}


def test_a_write_takes_the_lock_off_what_cannot_be_kept(run, clock, describe):
    immich = run(FakeImmich(now=clock))
    asset = immich.add(read_only=True, locked=True, description="By SQL.")
    describe(immich, asset, "By the client.")
    clock.wait(1)
    assert (asset.description, asset.locked) == ("", False)


# --- What check() says -----------------------------------------------------------------------


def complaint(fake):
    with pytest.raises(AssertionError) as caught:
        fake.check()
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "path", "more", "text"),
    [
        ("PUT", "/assets/{id}", {"json": {"descripton": "x"}}, "descripton"),
        ("PUT", "/assets/{id}", {"json": {"description": 5}}, 'not of type "string"'),
        ("PUT", "/assets/{id}", {}, "lacks a JSON body"),
        ("PUT", "/assets/{id}", {"json": {"rating": 5}}, "cannot change rating"),
        ("PUT", "/assets/{id}", {"data": b"{}"}, "not called application/json"),
        ("POST", "/search/metadata", {"json": {"page": "2"}}, 'not of type "integer"'),
        ("POST", "/search/metadata", {"json": {"size": 1001}}, "maximum of 1000"),
        ("POST", "/search/metadata", {"json": {"takenAfter": "2024-01-01"}}, "date-time"),
        ("POST", "/search/metadata", {"json": {"city": "Ulm"}}, "cannot search by city"),
        ("GET", "/assets/{id}/thumbnail?size=huge", {}, "size"),
        ("GET", "/assets/{id}/thumbnail?size=fullsize", {}, "no fullsize pictures"),
        ("GET", "/assets/{id}/thumbnail?sise=preview", {}, "no query parameter sise"),
        ("GET", "/assets/1", {}, '"1" is not a "uuid"'),
        ("PUT", "/assets/metadata", {"json": {"items": [{"id": "1"}]}}, "'id' was unexpected"),
        ("GET", "/assets/{id}/thumbnial", {}, "no call of the contract"),
        ("GET", "/server/ping", {"data": b"x"}, "takes no body"),
    ],
)
def test_check_tells_what_a_request_had_wrong(run, call, method, path, more, text):
    immich = run(FakeImmich())
    asset = immich.add()
    immich.check()
    call(immich, method, path.format(id=asset.id), **more)
    assert text in complaint(immich)


def test_check_tells_what_a_reply_had_wrong(run, call):
    immich = run(FakeImmich())
    asset = immich.add(extra={"rating": "five"})
    call(immich, "GET", f"/assets/{asset.id}")
    assert "reply to GET" in complaint(immich)
    immich.problems.clear()
    search(call, immich, withExif=True)
    assert "exifInfo/rating" in complaint(immich)


def test_what_is_tolerated_and_what_other_releases_have_is_no_problem(run, call):
    immich = run(FakeImmich("1.132.3", tolerated={"visibility"}))
    search(call, immich, visibility="timeline")
    assert call(immich, "GET", "/api-keys/me").status_code == 404
    immich.check()


def test_a_request_outside_the_prefix_is_a_problem(run, session):
    immich = run(FakeImmich(prefix="/photos"))
    session.get(immich.url.replace("/photos", "/api/server/ping"), timeout=PATIENCE)
    assert "not below /photos/api" in complaint(immich)


def test_scripted_replies_are_checked_only_when_asked(run, call):
    immich = run(FakeImmich())
    immich.script("GET", "/server/ping", Reply(200, {"res": 1}))
    call(immich, "GET", "/server/ping")
    immich.check()
    immich.script("GET", "/server/ping", Reply(200, {"res": 1}), checked=True)
    call(immich, "GET", "/server/ping")
    assert "res" in complaint(immich)
    immich.problems.clear()
    immich.script("GET", "/server/ping", Reply(201, {"res": "pong"}), checked=True)
    call(immich, "GET", "/server/ping")
    assert "has no reply 201" in complaint(immich)


def test_a_fault_of_the_fake_fails_the_test(run, session):
    ollama = run(FakeOllama(answer=lambda image, prompt: 1 / 0))
    with pytest.raises(requests.ConnectionError):
        session.post(f"{ollama.url}/api/chat", json=asking(RED), timeout=PATIENCE)
    assert "ZeroDivisionError" in complaint(ollama)


# --- Any fake --------------------------------------------------------------------------------


def in_background(function):
    """Run in a thread; `join` gives its result or raises its error."""
    out = []

    def work():
        try:
            out.append(function())
        except requests.RequestException as error:
            out.append(error)

    thread = threading.Thread(target=work)
    thread.start()

    def join():
        thread.join(PATIENCE)
        return out[0]

    return join


def get(fake, path="/", timeout=PATIENCE):
    with requests.Session() as session:
        session.trust_env = False
        return session.get(fake.url + path, timeout=timeout)


def test_exchanges_are_remembered(run, call):
    immich = run(FakeImmich())
    asset = immich.add()
    call(immich, "PUT", f"/assets/{asset.id}", json={"description": "x"})
    call(immich, "GET", f"/assets/{asset.id}/thumbnail?size=preview")
    put, picture_of_it = immich.exchanges
    assert (put.method, put.path, put.json) == (
        "PUT",
        f"/api/assets/{asset.id}",
        {"description": "x"},
    )
    assert put.headers["X-API-Key"] == immich.key
    assert (put.status, put.reply["exifInfo"]["description"]) == (200, "x")
    assert picture_of_it.query == {"size": "preview"}
    assert picture_of_it.reply == asset.preview
    assert immich.count("PUT|POST", r"/assets/[^/]+$") == 1
    assert immich.count("GET", "/assets/") == 1


def test_scripts_come_in_turn_and_may_stay(run):
    fake = run(FakeServer())
    fake.script("GET", "^/a$", Reply(500), Reply(200, "fine", {"X-Was": "scripted"}))
    fake.script("GET", "^/b$", Reply(503, {"e": 1}), Reply(429), forever=True)
    assert [get(fake, "/a").status_code for _ in range(3)] == [500, 200, 404]
    assert [get(fake, "/b").status_code for _ in range(3)] == [503, 429, 429]
    assert fake.find("GET", "/a")[1].reply == b"fine"
    fake.forget_scripts()
    assert get(fake, "/b").status_code == 404


def test_a_reset_has_no_effect_and_a_cut_reply_has(run, call):
    immich = run(FakeImmich())
    asset = immich.add()
    immich.script("PUT", "/assets/", RESET, CUT)
    with pytest.raises(requests.ConnectionError):
        call(immich, "PUT", f"/assets/{asset.id}", json={"description": "one"})
    assert asset.description == ""
    with pytest.raises(requests.RequestException):
        call(immich, "PUT", f"/assets/{asset.id}", json={"description": "two"})
    assert asset.description == "two"
    immich.script("GET", "thumbnail", Reply(200, RED, cut=True))
    with pytest.raises(requests.RequestException):
        call(immich, "GET", f"/assets/{asset.id}/thumbnail?size=preview")
    immich.check()


def test_a_hanging_request_is_answered_when_the_gate_is_set(run):
    immich = run(FakeImmich())
    immich.script("GET", "ping", HANG)
    join = in_background(lambda: get(immich, "/api/server/ping"))
    immich.wait_for()
    assert immich.in_flight == 1
    assert immich.exchanges[0].status is None
    immich.gate.set()
    assert join().json() == {"res": "pong"}
    assert immich.in_flight == 0


def test_closing_ends_what_hangs_without_an_answer(run):
    fake = run(FakeServer())
    fake.script("GET", "", HANG)
    join = in_background(lambda: get(fake))
    fake.wait_for()
    fake.close()
    assert isinstance(join(), requests.ConnectionError)
    fake.check()


def test_a_client_may_leave(run):
    fake = run(FakeServer())
    fake.script("GET", "", Reply(200, b"x" * 5_000_000))
    fake.hold()
    with pytest.raises(requests.Timeout):
        get(fake, timeout=0.05)
    fake.wait_for()
    fake.gate.set()
    fake.close()
    fake.check()


def test_held_requests_are_counted(run):
    fake = run(FakeServer())
    fake.hold("GET", "^/slow")
    joins = [in_background(lambda: get(fake, "/slow")) for _ in range(3)]
    fake.wait_for(3)
    assert get(fake, "/quick").status_code == 404
    assert fake.in_flight == 3
    fake.gate.set()
    assert [join().status_code for join in joins] == [404] * 3
    assert (fake.in_flight, fake.most_in_flight) == (0, 4)


def test_a_server_comes_back_at_its_port(run):
    fake = run(FakeServer())
    url = fake.url
    assert get(fake).status_code == 404
    fake.close()
    with pytest.raises(requests.ConnectionError):
        get(fake)
    fake.start()
    assert fake.url == url
    assert get(fake).status_code == 404


def test_no_picture_is_told_like_another():
    pictures = [own_picture(number) for number in range(30)] + [RED, picture("red", "PNG")]
    assert len({told(image) for image in pictures}) == len(pictures)
    assert colour_of(own_picture(0)) == "red"
    assert colour_of(picture("blue", "WEBP")) == "blue"
    assert colour_of(b"no picture") == "gray"


# --- Ollama ----------------------------------------------------------------------------------

KINDS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
SAMPLES = {kind: base64.b64encode(picture("red", kind)).decode() for kind in KINDS}
SAMPLES["AVIF"] = base64.b64encode(b"\0\0\0\x1cftypavif" + bytes(40)).decode()
OLLAMA = load("ollama")
OLLAMA_MODELS = {
    "tiny-vlm": ("completion", "vision"),
    "tiny-text": ("completion",),
    "tiny-vlm-think": ("completion", "vision", "thinking"),
}
BY_CIRCUMSTANCE = {"chat_prompt_exceeds_ctx", "chat_prompt_exceeds_ctx_no_truncate"}
BY_CIRCUMSTANCE |= {"chat_overloaded"}


def asking(image, **more):
    message = {"role": "user", "content": "Describe.", "images": [base64.b64encode(image).decode()]}
    return {"model": "tiny-vlm", "messages": [message], "stream": False, **more}


def replay(session, fake, entry):
    """Send a recorded request again, with pictures in the places they were taken from."""
    method, path = entry["request"].split(" ")
    body = entry.get("json")
    if body is None or isinstance(body, str):
        data, headers = body, entry.get("headers", {})
    else:
        data = json.dumps(body)
        for kind, sample in SAMPLES.items():
            data = data.replace(f"<{kind}>", sample)
        headers = {"Content-Type": "application/json"} | entry.get("headers", {})
    return session.request(method, fake.url + path, data=data, headers=headers, timeout=PATIENCE)


@pytest.mark.parametrize("case", sorted(OLLAMA["x-errors"].keys() - BY_CIRCUMSTANCE))
def test_ollama_refuses_as_recorded(run, session, case):
    entry = OLLAMA["x-errors"][case]
    reply = replay(session, run(FakeOllama(OLLAMA_MODELS)), entry)
    assert (reply.status_code, reply.headers["Content-Type"]) == (entry["status"], entry["type"])
    said = reply.text if isinstance(entry["body"], str) else reply.json()
    assert said == entry["body"]


@pytest.mark.parametrize("case", OLLAMA["x-replies"])
def test_ollama_answers_as_recorded(run, session, case):
    entry = OLLAMA["x-replies"][case]
    ollama = run(FakeOllama({} if case.endswith("empty") else OLLAMA_MODELS))
    reply = replay(session, ollama, entry)
    assert (reply.status_code, reply.headers["Content-Type"]) == (entry["status"], entry["type"])
    if isinstance(entry["body"], str):
        assert reply.text == entry["body"]
        return
    said, then = reply.json(), entry["body"]
    shown = {"model_info", "projector_info", "modelfile", "template", "tensors"}
    alike(
        {name: value for name, value in said.items() if name not in shown},
        {name: value for name, value in then.items() if name not in shown},
    )
    assert (said.keys() & shown) >= (then.keys() & shown)
    assert said.get("done_reason") == then.get("done_reason")
    if "thinking" in said.get("message", {}):
        assert said["message"]["thinking"] == then["message"]["thinking"]
    ollama.check()


@pytest.mark.parametrize("name", ["ollama", "llamacpp"])
def test_the_model_contracts_fit_the_recordings(name):
    document, contract = load(name), model_contract(name)
    for entry in document["x-replies"].values():
        found = contract.find(*entry["request"].split(" "))
        if found:
            found[0].reply(200).validate(entry["body"])
            if isinstance(entry.get("json"), dict):
                found[0].request.validate(entry["json"])
    for entry in document["x-errors"].values():
        if isinstance(entry["body"], dict):
            contract.error.validate(entry["body"])


@pytest.mark.parametrize(("name", "kind"), [("ollama", FakeOllama), ("llamacpp", FakeLlamaCpp)])
@pytest.mark.parametrize("streams", [True, False])
def test_a_stream_comes_in_pieces_as_recorded(run, session, name, kind, streams):
    [entry] = load(name)["x-streams"].values()
    contract = model_contract(name)
    contract.find(*entry["request"].split(" "))[0].request.validate(entry["json"])
    for event in entry["events"]:
        contract.component("ChatEvent").validate(event)
    fake = run(kind(answer=lambda *_: "A photo.", streams=streams))
    reply = replay(session, fake, entry)
    if not streams:
        assert reply.json() == fake.exchanges[0].reply
        return
    assert (reply.status_code, reply.headers["Content-Type"]) == (entry["status"], entry["type"])
    assert reply.headers["Transfer-Encoding"] == "chunked"
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert (lines[-1] == "[DONE]") is (name == "llamacpp")
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    first, last = (1, 1) if name == "ollama" else (2, 2)  # before and after the tokens
    then = entry["events"]
    assert len(events) == first + 1 + last
    pairs = zip(events[:first] + events[-last:], then[:first] + then[-last:], strict=True)
    for ours, real in pairs:
        assert ours.keys() == real.keys()
        alike(ours | {"timings": None}, real | {"timings": None})
    fake.check()


def test_ollama_sees_the_picture_it_was_sent(run, session):
    ollama = run(FakeOllama())
    reply = session.post(f"{ollama.url}/api/chat", json=asking(RED), timeout=PATIENCE).json()
    assert reply["message"]["content"] == told(RED)
    assert ollama.asked == [(RED, "Describe.")]
    ollama.check()


@pytest.mark.parametrize(
    ("answer", "content", "thought", "reason"),
    [
        ("plain", "plain", None, "stop"),
        (cut("half a"), "half a", None, "length"),
        (empty(), "", None, "stop"),
        (thinking("so", "hm"), "so", "hm", "stop"),
        (thinking("", "hm"), "", "hm", "length"),
        ({"text": "made up", "finish": "length"}, "made up", None, "length"),
    ],
)
def test_answers_may_be_of_every_kind(run, session, answer, content, thought, reason):
    ollama = run(FakeOllama(answer=lambda image, prompt: answer))
    said = session.post(f"{ollama.url}/api/chat", json=asking(RED), timeout=PATIENCE).json()
    assert (said["message"]["content"], said["message"].get("thinking")) == (content, thought)
    assert said["done_reason"] == reason
    llama = run(FakeLlamaCpp(answer=lambda image, prompt: answer))
    (choice,) = session.post(
        f"{llama.url}/v1/chat/completions", json=asking_openai(RED), timeout=PATIENCE
    ).json()["choices"]
    assert choice["message"]["content"] == content
    assert choice["message"].get("reasoning_content") == thought
    assert choice["finish_reason"] == reason
    ollama.check()
    llama.check()


def test_a_key_in_front_of_ollama(run, session):
    ollama = run(FakeOllama(api_key="sk"))
    assert session.get(f"{ollama.url}/api/tags", timeout=PATIENCE).status_code == 401
    header = {"Authorization": "Bearer sk"}
    assert session.get(f"{ollama.url}/api/tags", headers=header, timeout=PATIENCE).ok


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"options": {"num_predct": 5}}, "num_predct"),
        ({"sream": False}, "sream"),
        ({"options": {"temperature": "hot"}}, 'not of type "number"'),
        ({"think": "hard"}, "think"),
    ],
)
def test_check_tells_what_a_model_request_had_wrong(run, session, change, text):
    ollama = run(FakeOllama())
    session.post(f"{ollama.url}/api/chat", json=asking(RED, **change), timeout=PATIENCE)
    assert text in complaint(ollama)


def test_recorded_errors_can_be_scripted(run, session):
    ollama = run(FakeOllama())
    ollama.script("POST", "/api/chat", recorded("ollama", "chat_overloaded"))
    reply = session.post(f"{ollama.url}/api/chat", json=asking(RED), timeout=PATIENCE)
    assert (reply.status_code, reply.json()) == (503, OLLAMA["x-errors"]["chat_overloaded"]["body"])
    assert recorded("immich-3.1.0", "asset-get-locked").status == 400


# --- llama.cpp -------------------------------------------------------------------------------

LLAMA = load("llamacpp")
LLAMA_CIRCUMSTANCE = {
    "chat_context_exceeded",
    "chat_image_exceeds_context",
    "chat_image_40MB_body",
    "metrics_off",
}


def asking_openai(image, **more):
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    parts = [
        {"type": "text", "text": "Describe."},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return {"model": "any", "messages": [{"role": "user", "content": parts}], **more}


def llama_of(case):
    fake = FakeLlamaCpp(
        "photo-model" if case.startswith("auth") else "/models/tiny-vlm.gguf",
        vision="text_only" not in case,
        api_key="sk-right" if case.startswith("auth") else None,
        thinks=case.startswith("think"),
    )
    fake.loading = "loading" in case
    return fake


@pytest.mark.parametrize("case", sorted(LLAMA["x-errors"].keys() - LLAMA_CIRCUMSTANCE))
def test_llamacpp_refuses_as_recorded(run, session, case):
    entry = LLAMA["x-errors"][case]
    reply = replay(session, run(llama_of(case)), entry)
    assert (reply.status_code, reply.headers["Content-Type"]) == (entry["status"], entry["type"])
    assert reply.json() == entry["body"]


@pytest.mark.parametrize("case", LLAMA["x-replies"])
def test_llamacpp_answers_as_recorded(run, session, case):
    entry = LLAMA["x-replies"][case]
    llama = run(llama_of(case))
    reply = replay(session, llama, entry)
    assert (reply.status_code, reply.headers["Content-Type"]) == (entry["status"], entry["type"])
    said, then = reply.json(), entry["body"]
    if entry["request"] == "GET /props":
        assert said.keys() <= then.keys()
        assert said["modalities"] == then["modalities"]
    elif "choices" in then:
        alike(said["choices"], then["choices"])
        assert said.keys() == then.keys()
        assert said["usage"].keys() == then["usage"].keys()
        said_choice, then_choice = said["choices"][0], then["choices"][0]
        assert said_choice["finish_reason"] == then_choice["finish_reason"]
        reasoning = then_choice["message"].get("reasoning_content")
        assert said_choice["message"].get("reasoning_content") == reasoning
    else:
        for row in then.get("data", ()):
            assert said["data"][0]["architecture"] == row["architecture"]
            row["meta"] = said["data"][0]["meta"]
        alike(said, then)
    llama.check()


def test_a_router_knows_its_models(run, session):
    llama = run(FakeLlamaCpp(models=["a", "b"]))
    url = f"{llama.url}/v1/chat/completions"
    models = session.get(f"{llama.url}/v1/models", timeout=PATIENCE).json()["data"]
    assert [row["id"] for row in models] == ["a", "b"]
    asked = asking_openai(RED) | {"model": "b"}
    assert session.post(url, json=asked, timeout=PATIENCE).json()["model"] == "b"
    assert session.post(url, json=asking_openai(RED), timeout=PATIENCE).status_code == 400
    llama.check()


def test_answers_fit_the_schema_asked_for(run, session):
    schema = {"type": "object", "properties": {"text": {"type": "string"}, "n": {"type": "number"}}}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    llama = run(FakeLlamaCpp())
    url = f"{llama.url}/v1/chat/completions"
    asked = asking_openai(RED, response_format=shape)
    reply = session.post(url, json=asked, timeout=PATIENCE).json()
    said = json.loads(reply["choices"][0]["message"]["content"])
    assert said == {"text": told(RED), "n": 0}
    llama.check()
