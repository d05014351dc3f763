"""What the pipeline may rely on, whichever library it talks to.

Every test runs twice: through the API of a fake Immich, and on a real database.
"""

import itertools
import uuid
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta

import pytest
import servers

import immich_analyze as ia

pytestmark = pytest.mark.slow

TEXTS = {
    "one line": "A red boat on a lake.",
    "several lines": "First line.\n\nThird line,\tafter a tab.",
    "emoji": "A family 👩‍👩‍👧‍👦 at the beach 🏖️, flag 🇺🇦.",
    "quotes": """It's a "sign" that says ''''; DROP TABLE asset; --""",
    "percent": "100 % wool, %s %d %(id)s %%",
    "backslashes": r"C:\new\table \' E'\n' \\ \u0041 \x00",
    "braces and markup": "{} {0} ${HOME} <b>&amp;</b> $1",
    "right to left": "שלט בעברית: \u200fשלום\u200e, ولافتة بالعربية",
    "100 kB": "Ещё одна фраза. " * 3600 + "End.",
}
UNWANTED = {
    "video": {"type": "VIDEO"},
    "sound": {"type": "AUDIO"},
    "trashed": {"trashed": True},
    "deleted": {"status": "deleted"},
    "offline": {"offline": True},
    "hidden": {"visibility": "hidden"},
    "locked": {"visibility": "locked"},
    "without exif row": {"exif": False, "extracted": False},
    "not extracted": {"extracted": False},
    "without preview": {"preview": False},
}


NOTE = ia.Note("tiny-vlm", "0123456789ab", text="0123456789abcdef")


class ApiStore:
    """The fake Immich, filled and read by the names the sandbox has for things."""

    def __init__(self, immich):
        self.immich = immich
        immich.keys = {immich.key: servers.FakeKey(immich.owner, servers.EVERYTHING)}
        self.settings = ["-d", "immich-api", "--immich-api-url", immich.url]
        self.settings += ["--immich-api-keys", immich.key]

    def add(self, name="photo.jpg", *, preview=True, picture=b"", extracted=True, **properties):
        names = {"trashed": "is_trashed", "offline": "is_offline"}
        properties = {names.get(key, key): value for key, value in properties.items()}
        if properties.pop("status", "active") != "active":
            properties["is_trashed"] = True
        made = (picture or servers.picture()) if preview and extracted else None
        return self.immich.add(name, preview=made, **properties).id

    def text(self, id):
        return self.immich.assets[id].description

    def notes(self, id):
        return dict(self.immich.assets[id].notes)

    def others_write(self, id, text):
        self.immich.assets[id].description = text

    def stamp(self, id):
        """What differs after each write."""
        return self.immich.count("PUT", f"{id}$")

    def trash(self, id):
        self.immich.assets[id].is_trashed = True

    def lock(self, id):
        self.immich.assets[id].visibility = "locked"

    def backdate(self, id, moment):
        """Make an upload of another time of it."""
        self.immich.assets[id].created_at = moment

    def make_preview(self, id):
        self.immich.assets[id].preview = servers.picture()

    def delete(self, id):
        del self.immich.assets[id]

    def vanish(self):
        self.immich.close()


class DbStore:
    """The sandbox's library on a real database."""

    def __init__(self, photos, drop):
        self.photos, self._drop = photos, drop
        self.settings = ["-d", "database", "--postgres-url", photos.uri]
        self.settings += ["--immich-root", str(photos.root)]
        self.text, self.trash = photos.description, photos.trash
        self.others_write, self.notes = photos.describe, photos.notes

    def add(self, name="photo.jpg", *, picture=None, **properties):
        return self.photos.add(name, preview_bytes=picture, **properties)

    def stamp(self, id):
        """What differs after each write."""
        return self.photos.run('SELECT "updateId" FROM {exif} WHERE "assetId" = %s', id)

    def lock(self, id):
        self.photos.run("UPDATE {asset} SET visibility = 'locked' WHERE id = %s", id)

    def backdate(self, id, moment):
        """Make an upload of another time of it."""
        self.photos.run('UPDATE {asset} SET "createdAt" = %s WHERE id = %s', moment, id)
        mark = int(moment.timestamp() * 1000) << 80
        sql = 'ALTER TABLE {file} DISABLE TRIGGER USER; UPDATE {file} SET "updateId" = %s'
        sql += ' WHERE "assetId" = %s; ALTER TABLE {file} ENABLE TRIGGER USER'
        self.photos.run(sql, str(uuid.UUID(int=mark)), id)

    def make_preview(self, id):
        where = self.photos.owner(), self.photos.prefix
        self.photos._previews([id], *where, servers.picture(), edited=False)

    def delete(self, id):
        self.photos.run("DELETE FROM {asset} WHERE id = %s", id)

    def vanish(self):
        self._drop(self.photos.uri)


@pytest.fixture(params=["api", "database"])
def store(request):
    if request.param == "api":
        return ApiStore(request.getfixturevalue("immich"))
    drop = request.getfixturevalue("postgres").drop
    return DbStore(request.getfixturevalue("photos")(), drop)


@pytest.fixture
def opened(store, config):
    """Opens the store's library as a worker does; more options may be given."""
    with ExitStack() as stack:

        def make(*options):
            new_library, complete = ia.open_library(config(*store.settings, *options))
            assert complete()
            return stack.enter_context(closing(new_library()))

        yield make


def listing(library):
    """All photos, page by page."""
    assets, cursor = library.page(None)
    assets = [*assets]
    while cursor is not None:
        more, cursor = library.page(cursor)
        assets += more
    return assets


def ready(library):
    return [asset for asset in listing(library) if asset.ready]


def wanted(library, policy=ia.Policy.NONE):
    config = ia.parse(["-O", policy], {})
    return [asset for asset in ready(library) if not ia.left_alone(asset, config)]


def names(assets):
    return sorted(asset.name for asset in assets)


# the listing


def test_the_listing_brings_live_photos_and_nothing_else(store, opened):
    for name, properties in UNWANTED.items():
        store.add(name, **properties)
    store.add("timeline")
    store.add("archive", visibility="archive")
    assert names(ready(opened())) == ["archive", "timeline"]


def test_a_photo_without_a_preview_is_never_one_to_describe(store, opened):
    store.add("without preview", preview=False)
    assert wanted(opened()) == []
    assert all(not asset.ready for asset in listing(opened()))


def test_each_photo_is_listed_once_over_many_pages(store, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 3)
    ids = {store.add(visibility=("timeline", "archive")[n % 2]) for n in range(14)}
    listed = [asset.id for asset in listing(opened())]
    assert len(listed) == 14
    assert set(listed) == ids


def test_an_empty_library_lists_nothing(opened):
    library = opened()
    assert listing(library) == []
    assert library.total() == 0


def test_a_page_can_be_asked_for_again(store, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 3)
    for _ in range(7):
        store.add()
    library = opened()
    _, cursor = library.page(None)
    (once, after), (again, after_too) = library.page(cursor), library.page(cursor)
    assert ([*once], after) == ([*again], after_too)
    assert [*library.page(cursor)[0]] != []


def test_white_space_is_no_description(store, opened):
    for name, text in {"none": "", "blanks": "  ", "lines": " \n\t\r\n", "text": " x "}.items():
        store.add(name, description=text)
    assert names(wanted(opened())) == ["blanks", "lines", "none"]


def test_overwriting_lists_described_photos_too(store, opened):
    store.add("described", description="by a person")
    store.add("plain")
    overwriting = wanted(opened("-o"), ia.Policy.ALL)
    assert {asset.name: asset.description for asset in overwriting} == {
        "described": "by a person",
        "plain": "",
    }
    assert names(wanted(opened())) == ["plain"]


def test_the_total_counts_what_the_listing_brings(store, opened):
    for visibility in ("timeline", "timeline", "archive", "hidden"):
        store.add(visibility=visibility)
    store.add(trashed=True)
    store.add(type="VIDEO")
    assert opened().total() == 3


# what arrives


def test_the_clock_is_the_servers(opened):
    library = opened()
    assert abs(library.clock() - datetime.now(UTC)) < timedelta(seconds=5)


def seconds(number):
    return timedelta(seconds=number)


def test_a_listing_may_be_of_the_uploads_since_a_moment(store, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 2)
    library = opened()
    now = library.clock()
    ids = {age: store.add() for age in (0, 30, 59, 61, 90, 5000)}
    for age, id in ids.items():
        store.backdate(id, now - seconds(age))
    pages, cursor = library.page(None, now - seconds(60))
    pages = [*pages]
    while cursor:
        more, cursor = library.page(cursor, now - seconds(60))
        pages += more
    assert {asset.id for asset in pages} == {ids[age] for age in (0, 30, 59)}
    assert len(pages) == 3


def test_the_news_are_what_arrived_since_a_moment_over_many_pages(store, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 2)
    library = opened()
    now = library.clock()
    ids = {age: store.add() for age in (3, 10, 20, 30, 61, 90)}
    for age, id in ids.items():
        store.backdate(id, now - seconds(age))
    news = library.news(now - seconds(60), now)
    assert {asset.id for asset in news} == {ids[age] for age in (3, 10, 20, 30)}
    assert len(news) == 4
    assert all(asset.ready for asset in news)
    for asset in news:
        assert library.preview(asset)
        assert library.write(asset, "New.", NOTE)


@pytest.mark.parametrize("kind", UNWANTED)
def test_no_news_are_made_of_what_is_not_to_be_described(store, opened, kind):
    library = opened()
    now = library.clock()
    id = store.add(**UNWANTED[kind])
    news = library.news(now - seconds(60), now + seconds(60))
    assert [asset for asset in news if asset.ready] == []
    assert {asset.id for asset in news} <= {id}  # which may become ready


@pytest.mark.measured
def test_a_photo_is_found_as_it_is_now(store, opened):
    library = opened()
    id = store.add("lake.jpg", preview=False)
    asset = next(iter(listing(library)), ia.Photo(id, "", "", "0", ready=False))
    assert not asset.ready
    assert not library.look(asset).ready
    store.make_preview(id)
    found = library.look(asset)
    assert (found.id, found.name, found.description, found.ready) == (id, "lake.jpg", "", True)
    assert library.preview(found) == servers.picture()
    store.others_write(id, "By a person.")
    assert library.look(asset).description == "By a person."
    assert library.write(found, "By the tool.", NOTE) is False


@pytest.mark.parametrize("kind", ["video", "trashed", "offline", "hidden", "locked"])
def test_what_is_not_to_be_described_is_not_found(store, opened, kind):
    library = opened()
    id = store.add(**UNWANTED[kind])
    with pytest.raises(ia.Skip):
        library.look(ia.Photo(id, "", "", "0", ready=False))


def test_what_does_not_exist_is_not_found(opened):
    with pytest.raises(ia.Skip):
        opened().look(ia.Photo(str(uuid.uuid4()), "", "", "0", ready=False))


def test_the_preview_is_the_files_bytes(store, opened):
    pictures = {store.add(picture=servers.own_picture(n)): servers.own_picture(n) for n in range(3)}
    library = opened()
    assert {asset.id: library.preview(asset) for asset in listing(library)} == pictures


def test_a_photo_without_a_preview_has_none(store, opened):
    id, _ = store.add(), store.add()
    library = opened()
    asset = next(asset for asset in listing(library) if asset.id == id)
    if isinstance(store, DbStore):
        store.photos.preview_file(id).unlink()
    else:
        store.immich.assets[id].preview = None
    assert library.preview(asset) is None


# the write


def test_the_store_holds_exactly_what_was_written(store, opened):
    ids = {store.add(name): text for name, text in TEXTS.items()}
    other = store.add("other", description="kept")
    library = opened()
    for asset in wanted(library):
        assert library.write(asset, ids[asset.id], NOTE) is True
    assert {id: store.text(id) for id in ids} == ids
    assert store.text(other) == "kept"


def test_what_was_written_is_listed_as_written(store, opened):
    store.add()
    library = opened("-o")
    [before] = listing(library)
    library.write(before, TEXTS["emoji"], NOTE)
    [after] = listing(library)
    assert (after.id, after.description) == (before.id, TEXTS["emoji"])


def test_another_worker_can_write_what_one_has_listed(store, opened):
    id = store.add()
    [asset] = listing(opened())
    worker = opened()
    assert worker.preview(asset) != b""
    assert worker.write(asset, "By a worker.", NOTE) is True
    assert store.text(id) == "By a worker."


def test_the_listed_text_is_replaced(store, opened):
    ids = [store.add(description=listed) for listed in ("", " \n", "old text")]
    library = opened("-o")
    for asset in listing(library):
        assert library.write(asset, f"New text for {asset.id}.", NOTE) is True
    assert [store.text(id) for id in ids] == [f"New text for {id}." for id in ids]


def test_what_somebody_typed_meanwhile_is_left_alone(store, opened):
    cases = itertools.product(["", "old text"], ["typed meanwhile", " "])
    typed = {store.add(description=listed): text for listed, text in cases}
    library = opened("-o")
    assets = listing(library)
    for id, text in typed.items():
        store.others_write(id, text)
    stamps = {id: store.stamp(id) for id in typed}
    assert [library.write(asset, "Too late.", NOTE) for asset in assets] == [False] * 4
    assert {id: store.text(id) for id in typed} == typed
    assert {id: store.stamp(id) for id in typed} == stamps
    assert [store.notes(id) for id in typed] == [{}] * 4


def test_writing_twice_is_one_write(store, opened):
    id = store.add()
    library = opened()
    [asset] = listing(library)
    untouched = store.stamp(id)
    assert library.write(asset, "Once.", NOTE) is True
    written = store.stamp(id)
    assert library.write(asset, "Once.", NOTE) is True
    assert store.stamp(id) == written != untouched


@pytest.mark.measured
@pytest.mark.parametrize("fate", ["trash", "lock", "delete"])
def test_a_photo_taken_away_meanwhile_is_gone(store, opened, fate):
    id = store.add()
    library = opened()
    [asset] = listing(library)
    getattr(store, fate)(id)
    with pytest.raises(ia.Skip):
        library.write(asset, "Too late.", NOTE)
    if fate != "delete":
        assert store.text(id) == ""
        assert store.notes(id) == {}


# trouble


def test_a_library_that_vanished_raises_only_errors_of_ours(store, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 1)
    for _ in range(3):
        store.add()
    library = opened()
    [asset], cursor = library.page(None)
    store.vanish()
    calls = {
        "page": lambda: library.page(cursor),
        "first page": lambda: library.page(None),
        "total": library.total,
        "write": lambda: library.write(asset, "Never written.", NOTE),
        "remember": lambda: library.remember(asset, NOTE),
    }
    for _ in range(2):  # the second time there is no connection left to lose
        for call in calls.values():
            with pytest.raises(ia.AnalyzeError):
                call()


def test_closing_twice_is_fine(store, opened):
    store.add()
    unused, used = opened(), opened()
    listing(used)
    for library in (unused, used):
        library.close()
        library.close()
