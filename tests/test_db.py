"""The library behind Immich's own tables, on real PostgreSQL and all generations of them."""

import errno
import os
import secrets
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psycopg2
import pytest
import sandbox

import immich_analyze as ia

pytestmark = pytest.mark.slow

OLDEST, NEWEST = sandbox.VERSIONS[0], sandbox.NEWEST
LOCKING = [v for v in sandbox.VERSIONS if tuple(map(int, v.split("."))) >= (2, 4)]
NOTING = [v for v in sandbox.VERSIONS if tuple(map(int, v.split("."))) >= (2, 5)]
NOTE = ia.Note("tiny-vlm", "0123456789ab", text="0123456789abcdef")
UNLOCKED = sandbox.VERSIONS[sandbox.VERSIONS.index(LOCKING[0]) - 1]
own_server = pytest.mark.skipif(
    "TEST_DATABASE_URL" in os.environ, reason="the server is not ours to stop"
)


@pytest.fixture
def settings(config):
    """The settings for a filled database, or for another address or folder."""

    def make(photos=None, *options, uri=None, root=None):
        place = ["--postgres-url", uri or photos.uri]
        place += ["--immich-root", str(root or (photos and photos.root) or "/nonexistent")]
        return config("-d", "database", *place, *options)

    return make


@pytest.fixture
def opened(settings):
    """Opens the library of a filled database; it is closed at the end."""
    with ExitStack() as stack:

        def make(photos, *options, **places):
            new_library, complete = ia.open_library(settings(photos, *options, **places))
            assert complete() is True
            return stack.enter_context(closing(new_library()))

        yield make


@pytest.fixture(scope="module")
def over_tcp():
    """A server that asks for a password and knows no TLS."""
    with sandbox.Postgres(tcp=True) as server:
        yield server


@pytest.fixture
def statements(monkeypatch):
    """Counts the statements of all libraries."""
    seen = []
    rows = ia.DbLibrary.rows

    def counted(self, name, **parameters):
        seen.append(name)
        return rows(self, name, **parameters)

    monkeypatch.setattr(ia.DbLibrary, "rows", counted)
    return seen


def listing(library):
    """All photos, page by page."""
    assets, cursor = library.page(None)
    while cursor is not None:
        more, cursor = library.page(cursor)
        assets += more
    return assets


def everything(photos):
    """All rows of the tables that matter, as JSON, by table and asset."""
    names = {photos.tables[name]: "assetId" for name in ("exif", "status")}
    names |= {photos.tables[name]: "id" for name in ("asset", "file")}
    names |= {"asset_metadata": "assetId"} if "asset_metadata" in photos._columns else {}
    return {
        (table, str(id)): row
        for table, key in names.items()
        for id, row in photos.run(f'SELECT "{key}", to_jsonb(t) FROM {table} t')
    }


def move(photos, id, path):
    """Let the database name another file as the preview."""
    photos.run('UPDATE {file} SET "path" = %s WHERE "assetId" = %s', path, id)


def cut_off(photos):
    """End the tool's connections, as an administrator or a restart does; wait until it is done."""
    [(ended,)] = photos.run(
        "SELECT bool_and(pg_terminate_backend(pid, 60000)) FROM pg_stat_activity"
        " WHERE application_name = 'immich-analyze' AND datname = current_database()"
    )
    assert ended


@contextmanager
def without_privileges():
    """Root reads everything, so for a moment it is somebody else."""
    me = os.geteuid()
    os.seteuid(me or 65534)
    try:
        yield
    finally:
        os.seteuid(me)


def on_its_connection(tool, statement):
    """What this gives where the tool runs its own statements."""
    with tool._connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def error_of(call, kind):
    with pytest.raises(kind) as raised:
        call()
    return raised.value


# every generation


@pytest.mark.parametrize("version", sandbox.VERSIONS)
def test_every_generation_is_listed_read_and_written(photos, opened, version):
    library = photos(version)
    colours = {library.add(visibility=v): v for v in ("timeline", "archive")}
    for unwanted in ({"visibility": "hidden"}, {"trashed": True}, {"status": "deleted"}):
        library.add(**unwanted)
    for unwanted in ({"offline": True}, {"type": "VIDEO"}, {"extracted": False}):
        library.add(**unwanted)
    library.add(preview=False)
    library.add(description="by a person")
    tool = opened(library)
    assets = listing(tool)
    assert {asset.id for asset in assets} == colours.keys()
    assert [asset.id for asset in assets] == sorted(colours)
    assert tool.total() == 2
    now = tool.clock() + timedelta(minutes=1)
    assert {asset.id for asset in tool.news(now - timedelta(minutes=5), now)} == colours.keys()
    assert [tool.look(asset) for asset in assets] == assets
    for asset in assets:
        assert tool.preview(asset) == library.preview_file(asset.id).read_bytes()
        assert tool.write(asset, f"Photo {asset.id}.", NOTE) is True
        assert library.description(asset.id) == f"Photo {asset.id}."
        assert library.notes(asset.id).keys() == ({ia.KEY} if version in NOTING else set())
        note = NOTE if version in NOTING else None
        stored = replace(asset, description=f"Photo {asset.id}.", note=note)
        assert tool.look(asset) == stored
    assert tool.total() == 0
    assert listing(tool) == []


@pytest.mark.parametrize("version", sandbox.VERSIONS)
def test_a_write_locks_the_text_and_touches_nothing_else(photos, settings, caplog, version):
    library = photos(version)
    id, _ = library.add(), library.add()
    new_library, _ = ia.open_library(settings(library))
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ([] if version in LOCKING else [ia.t("no_lock")])
    before = everything(library)
    with closing(new_library()) as tool:
        tool.write(next(asset for asset in listing(tool) if asset.id == id), "Written.", NOTE)
    after = everything(library)
    exif = library.tables["exif"], id
    added = {key: after.pop(key) for key in after.keys() - before.keys()}
    assert [key for key in before if before[key] != after.get(key)] == [exif]
    old, new = before[exif], after[exif]
    changed = {"description", "updatedAt", "updateId"}
    changed |= {"lockedProperties"} if version in LOCKING else set()
    assert {name for name in old if old[name] != new[name]} == changed
    assert new["updatedAt"] > old["updatedAt"]
    assert library.locked(id) == (["description"] if version in LOCKING else [])
    assert added.keys() == ({("asset_metadata", id)} if version in NOTING else set())
    for row in added.values():
        at = row["value"].pop("at")
        assert abs(datetime.now(UTC) - datetime.fromisoformat(at)) < timedelta(minutes=1)
        told = {"v": 1, "model": NOTE.model, "prompt": NOTE.prompt, "text": NOTE.text}
        assert (row["key"], row["value"]) == ("immich-analyze", told)


def test_what_a_person_locked_stays_locked(photos, opened):
    library = photos("2.4.1")
    after = {
        library.add(locked=locked): sorted({*locked, "description"})
        for locked in (
            (),
            ("description",),
            ("rating", "dateTimeOriginal"),
            ("tags", "description", "latitude"),
        )
    }
    tool = opened(library)
    for asset in listing(tool):
        tool.write(asset, "Written.", NOTE)
    assert {id: library.locked(id) for id in after} == after


# the listing


def test_three_pages_are_three_statements(photos, opened, statements, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 20)
    library = photos()
    ids = [library.add(), *library.add_many(45, files=False)]  # the start looks for a file
    tool = opened(library)
    statements.clear()
    listed = [asset.id for asset in listing(tool)]
    assert len(statements) == 3
    assert listed == sorted(ids)


def test_pages_are_no_more_than_needed(photos, opened, statements, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 10)
    library = photos()
    tool = opened(library)
    for more, number, pages in ((0, 0, 1), (9, 9, 1), (1, 10, 2), (1, 11, 2), (9, 20, 3)):
        library.add_many(more)
        statements.clear()
        assert len(listing(tool)) == number
        assert len(statements) == pages


def test_photos_described_meanwhile_let_no_other_be_skipped(photos, opened, monkeypatch):
    monkeypatch.setattr(ia, "PAGE", 10)
    library = photos()
    ids = library.add_many(35)
    tool = opened(library)
    listed, cursor = tool.page(None)
    while cursor is not None:
        for asset in listed:
            tool.write(asset, "Described before the next page is asked for.", NOTE)
        more, cursor = tool.page(cursor)
        listed += more
    assert [asset.id for asset in listed] == sorted(ids)


def test_overwriting_counts_and_lists_described_photos_too(photos, opened):
    library = photos()
    described, plain = library.add(description="by a person"), library.add(description=" \n")
    tool = opened(library, "-o")
    assert {asset.id: asset.description for asset in listing(tool)} == {
        described: "by a person",
        plain: " \n",
    }
    assert tool.total() == 2
    assert opened(library).total() == 1


def test_a_description_that_is_null_is_none(photos, opened):
    library = photos()
    id = library.add()
    library.run('ALTER TABLE {exif} ALTER "description" DROP NOT NULL')
    library.run('UPDATE {exif} SET "description" = NULL')
    tool = opened(library)
    [asset] = listing(tool)
    assert asset.description == ""
    assert tool.write(asset, "Written.", NOTE) is True
    assert library.description(id) == "Written."


# the write


def test_only_the_listed_text_is_replaced(photos, opened):
    library = photos()
    id = library.add(description="old")
    tool = opened(library, "-o")
    [asset] = listing(tool)
    assert tool.write(replace(asset, description="older"), "New.", NOTE) is False
    assert tool.write(replace(asset, description="old "), "New.", NOTE) is False
    assert library.description(id) == "old"
    assert tool.write(asset, "New.", NOTE) is True
    assert tool.write(asset, "Newer.", NOTE) is False
    assert library.description(id) == "New."


@pytest.mark.measured
def test_each_sign_of_a_photo_that_is_not_there_counts_by_itself(photos, opened):
    library = photos()
    signs = [
        'UPDATE {asset} SET "deletedAt" = now() WHERE "id" = %s',
        'UPDATE {asset} SET "status" = \'trashed\' WHERE "id" = %s',
        'UPDATE {asset} SET "status" = \'deleted\' WHERE "id" = %s',
        'UPDATE {asset} SET "isOffline" = true WHERE "id" = %s',
        'UPDATE {asset} SET "visibility" = \'hidden\' WHERE "id" = %s',
        'UPDATE {asset} SET "visibility" = \'locked\' WHERE "id" = %s',
        'UPDATE {asset} SET "type" = \'VIDEO\' WHERE "id" = %s',
        'UPDATE {status} SET "metadataExtractedAt" = NULL WHERE "assetId" = %s',
        'DELETE FROM {status} WHERE "assetId" = %s',
        'DELETE FROM {exif} WHERE "assetId" = %s',
    ]
    library.add_many(len(signs))
    tool = opened(library)
    for left, (asset, sign) in enumerate(reversed(list(zip(listing(tool), signs, strict=True)))):
        library.run(sign, asset.id)
        error_of(partial(tool.write, asset, "Too late.", NOTE), ia.Skip)
        assert tool.total() == len(listing(tool)) == len(signs) - left - 1, sign
    assert set(library.descriptions().values()) == {""}
    assert library.run("SELECT count(*) FROM asset_metadata") == [(0,)]


def test_a_photo_without_exif_row_gets_none(photos, opened):
    library = photos()
    id = library.add()
    tool = opened(library)
    [asset] = listing(tool)
    library.run('DELETE FROM {exif} WHERE "assetId" = %s', id)
    error_of(partial(tool.write, asset, "Nowhere.", NOTE), ia.Skip)
    assert library.run("SELECT count(*) FROM {exif}") == [(0,)]
    assert library.notes(id) == {}


def test_a_row_that_somebody_holds_is_tried_again(photos, opened):
    library = photos()
    id = library.add()
    tool = opened(library)
    [asset] = listing(tool)
    on_its_connection(tool, "SET lock_timeout = '20ms'")
    with closing(psycopg2.connect(library.uri)) as immich, immich.cursor() as cursor:
        cursor.execute(f'UPDATE {library.tables["exif"]} SET "city" = %s', ("Oslo",))
        error = error_of(partial(tool.write, asset, "Written.", NOTE), ia.Retryable)
        assert not isinstance(error, ia.Unavailable)  # the others can be written meanwhile
        immich.commit()
    assert tool.write(asset, "Written.", NOTE) is True
    assert library.run('SELECT "city" FROM {exif} WHERE "assetId" = %s', id) == [("Oslo",)]


def test_a_statement_waits_neither_for_ever_nor_in_a_transaction(photos, opened):
    library = photos()
    tool = opened(library)
    listing(tool)
    limits = ("lock_timeout", "statement_timeout")
    shown = [on_its_connection(tool, f"SHOW {name}") for name in limits]
    assert shown == [[("10s",)], [("5min",)]]
    states = "SELECT state FROM pg_stat_activity WHERE application_name = 'immich-analyze'"
    assert library.run(f"{states} AND datname = current_database()") == [("idle",)]


def test_a_server_that_is_read_only_by_now_is_waited_for(photos, opened):
    """As after a failover: no photo is to blame, and the others fare no better."""
    library = photos()
    id = library.add()
    tool = opened(library)
    [asset] = listing(tool)
    [(name,)] = library.run("SELECT current_database()")
    library.run(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    cut_off(library)
    error_of(partial(tool.write, asset, "Not yet.", NOTE), ia.Unavailable)
    library.run(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    assert tool.write(asset, "Written.", NOTE) is True
    assert library.description(id) == "Written."


# a connection that is lost


@pytest.mark.parametrize("call", ["page", "total", "write"])
def test_a_connection_that_was_lost_meanwhile_is_replaced_in_silence(photos, opened, call):
    library = photos()
    id = library.add()
    tool = opened(library)
    [asset] = listing(tool)
    calls = {
        "page": lambda: [listed.id for listed in tool.page(None)[0]] == [id],
        "total": lambda: tool.total() == 1,
        "write": lambda: tool.write(asset, "Written.", NOTE),
    }
    for _ in range(3):
        assert calls[call]() is True
        cut_off(library)
    assert calls[call]() is True


@pytest.mark.parametrize("away", [1, 3])
def test_a_new_connection_that_is_lost_as_well_is_an_outage(
    photos, opened, stop, monkeypatch, away
):
    library = photos()
    id = library.add()
    tool = opened(library)
    [asset] = listing(tool)
    cut_off(library)
    connect, troubles = psycopg2.connect, iter([True] * away)

    def starting_up(*dsn, **options):
        if next(troubles, False):
            raise psycopg2.OperationalError("FATAL:  the database system is starting up")
        return connect(*dsn, **options)

    monkeypatch.setattr(ia.psycopg2, "connect", starting_up)
    patience = ia.Patience(stop, pause=5, longest=60)
    assert patience(partial(tool.write, asset, "Written once.", NOTE)) is True
    assert stop.waits == [5] * away
    assert library.description(id) == "Written once."


@own_server
def test_a_server_that_restarts_is_waited_for(postgres, photos, opened, settings):
    library = photos()
    library.add()
    tool = opened(library)
    [asset] = listing(tool)
    postgres.stop()
    try:
        error_of(tool.total, ia.Unavailable)
        error_of(tool.total, ia.Unavailable)
        error_of(partial(tool.write, asset, "Written.", NOTE), ia.Unavailable)
        error_of(partial(ia.open_library, settings(library)), ia.Unavailable)
    finally:
        postgres.start()
    assert tool.write(asset, "Written.", NOTE) is True
    assert library.description(asset.id) == "Written."


def test_libpqs_words_tell_what_passes_from_what_does_not():
    passing = [
        "connection to server at 127.0.0.1, port 5432 failed: Connection refused",
        'could not translate host name "database" to address: Name or service not known',
        "FATAL:  the database system is starting up",
        "FATAL:  the database system is shutting down",
        "FATAL:  the database system is not yet accepting connections",
        "FATAL:  sorry, too many clients already",
        "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
        'FATAL:  too many connections for role "immich"',
        "server closed the connection unexpectedly",
        "timeout expired",
    ]
    lasting = [
        'FATAL:  password authentication failed for user "immich"',
        'FATAL:  no pg_hba.conf entry for host "172.18.0.1", user "postgres"',
        "server does not support SSL, but SSL was required",
        'invalid sslmode value: "sometimes"',
        'root certificate file "/root/.postgresql/root.crt" does not exist',
    ]
    unexpected = [
        'FATAL:  role "nobody" does not exist',
        'FATAL:  database "nothing" does not exist',
    ]
    kinds = {ia.Unavailable: passing, ia.Fatal: lasting, ia.Unexpected: unexpected}
    for kind, words in [(kind, words) for kind, all in kinds.items() for words in all]:
        with pytest.raises(ia.AnalyzeError) as raised, ia.sql():
            raise psycopg2.OperationalError(words)
        assert type(raised.value) is kind, words


SQLSTATES = {
    ia.Unavailable: ("57P01", "53300", "53100", "40P01", "40001", "08006"),
    ia.Retryable: ("55P03", "57014", "23514", "P0001"),  # one row or statement, not the server
    ia.Permanent: ("22P02", "22021", "22001"),
    ia.Unexpected: ("42501", "42P01", "42703", "25006"),
}


def test_postgresqls_codes_tell_who_is_to_blame_whatever_it_says(photos):
    def run(statement):
        with ia.sql(), connection.cursor() as cursor:
            cursor.execute(statement)

    connection = psycopg2.connect(photos().uri)
    connection.autocommit = True
    raising = "DO $$ BEGIN RAISE 'FATAL: invalid SSL' USING ERRCODE = '{}'; END $$"
    with closing(connection):
        for kind, codes in SQLSTATES.items():
            for code in codes:
                error = error_of(partial(run, raising.format(code)), ia.AnalyzeError)
                assert type(error) is kind, code
    with pytest.raises(ia.Unavailable), ia.sql():
        raise psycopg2.InterfaceError("connection already closed")


# rights


@pytest.fixture
def restricted(photos):
    """A filled database and the URI of a role that may do just what is needed."""

    def make(version=NEWEST):
        library = photos(version)
        name = f"describer_{secrets.token_hex(4)}"
        library.role = name
        return library, library.restricted_role(name, "its secret")

    return make


@pytest.mark.parametrize("version", sandbox.VERSIONS)
def test_a_restricted_role_is_enough(restricted, opened, version):
    library, uri = restricted(version)
    id = library.add()
    tool = opened(library, uri=uri)
    [asset] = listing(tool)
    assert tool.total() == 1
    assert tool.preview(asset) == sandbox.draw("red")
    assert tool.write(asset, "Written.", NOTE) is True
    assert tool.write(asset, "Written.", NOTE) is True
    assert library.description(id) == "Written."
    tool.remember(asset, replace(NOTE, text="another"))
    assert tool.look(asset).note == (replace(NOTE, text="another") if version in NOTING else None)
    assert tool.write(tool.look(asset), "", None) is True
    assert (library.description(id), library.notes(id)) == ("", {})


NOTES_RIGHTS = ["SELECT", "INSERT", "UPDATE", "DELETE"]


@pytest.mark.parametrize("version", [OLDEST, "2.3.1", "2.4.1", NEWEST])
def test_exactly_the_missing_grants_are_named(restricted, settings, version):
    library, uri = restricted(version)
    library.add()
    exif = library.tables["exif"]
    grants = [f"SELECT ON {library.tables[table]}" for table in ("asset", "exif", "file", "status")]
    grants += [f"UPDATE (description) ON {exif}"]
    grants += [f'UPDATE ("lockedProperties") ON {exif}'] * (version in LOCKING)
    rights = NOTES_RIGHTS if version in NOTING else []
    grants += [f"{right} ON asset_metadata" for right in rights]
    for grant in grants:
        library.run(f'REVOKE {grant} FROM "{library.role}"')
        error = error_of(partial(ia.open_library, settings(library, uri=uri)), ia.Fatal)
        assert (error.key, error.fields) == (
            "grants_missing",
            {"grants": f"GRANT {grant} TO {library.role}"},
        )
        library.run(f'GRANT {grant} TO "{library.role}"')
    ia.open_library(settings(library, uri=uri))


def test_a_role_without_rights_is_told_all_it_needs(restricted, settings):
    library, uri = restricted()
    library.run(f'DROP OWNED BY "{library.role}"')
    error = error_of(partial(ia.open_library, settings(library, uri=uri)), ia.Fatal)
    tables = ("asset", "asset_exif", "asset_file", "asset_job_status")
    grants = [f"SELECT ON {table}" for table in tables]
    grants += ["UPDATE (description) ON asset_exif", 'UPDATE ("lockedProperties") ON asset_exif']
    grants += [f"{right} ON asset_metadata" for right in NOTES_RIGHTS]
    said = [f"GRANT {grant} TO {library.role}" for grant in grants]
    assert error.fields["grants"] == "; ".join(said)


def test_what_the_message_says_to_grant_is_enough(restricted, settings):
    library, uri = restricted("2.7.5")
    library.add()
    library.run(f'DROP OWNED BY "{library.role}"')
    error = error_of(partial(ia.open_library, settings(library, uri=uri)), ia.Fatal)
    library.run(error.fields["grants"])
    ia.open_library(settings(library, uri=uri))


# wrong databases


@pytest.mark.parametrize("options", [(), ("--context", "people,albums")])
def test_a_database_without_immichs_tables_is_said_to_be_one(photos, settings, options):
    library = photos()
    library.run("DROP TABLE asset_exif")
    error = error_of(partial(ia.open_library, settings(library, *options)), ia.Fatal)
    assert error.key == "no_immich_tables"


@pytest.mark.measured
def test_a_database_that_takes_no_writes_is_said_at_once(photos, settings):
    library = photos()
    library.add()
    name = psycopg2.extensions.parse_dsn(library.uri)["dbname"]
    library.run(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    error = error_of(partial(ia.open_library, settings(library)), ia.Fatal)
    assert error.key == "database_read_only"


@pytest.mark.measured
def test_a_library_whose_previews_all_lie_outside_is_said_at_once(photos, settings):
    library = photos()
    library.add_many(3)
    library.run("""UPDATE {file} SET "path" = '/data/thumbs/../../' || "id" """)
    error = error_of(partial(ia.open_library, settings(library)), ia.Fatal)
    assert error.key == "root_empty"


def test_a_database_that_is_not_there_is_said_at_once(photos, settings):
    library = photos()
    name = psycopg2.extensions.parse_dsn(library.uri)["dbname"]
    uri = library.uri.replace(name, "no_such_database")
    error = error_of(partial(ia.open_library, settings(library, uri=uri)), ia.Fatal)
    assert "no_such_database" in str(error)


@own_server
def test_a_wrong_password_is_said_at_once_and_not_quoted(over_tcp, settings):
    uri = over_tcp.uri("postgres", "postgres", "hunter2")
    error = error_of(partial(ia.open_library, settings(uri=uri)), ia.Fatal)
    assert "password authentication failed" in str(error)
    assert "hunter2" not in str(error)


@own_server
@pytest.mark.parametrize("sslmode", ["require", "verify-full"])
def test_tls_that_the_server_does_not_have_is_said_at_once(over_tcp, settings, sslmode):
    uri = f"{over_tcp.uri('postgres')}?sslmode={sslmode}"
    error = error_of(partial(ia.open_library, settings(uri=uri)), ia.Fatal)
    assert error.key == "database_refused"


@pytest.mark.parametrize(
    "uri",
    [
        f"postgresql://immich@127.0.0.1:{sandbox.free_port()}/immich",
        "host=/nowhere user=immich dbname=immich",
        "host=127.0.0.1 port=1 user=immich dbname=immich",
    ],
    ids=["closed port", "no socket", "port 1"],
)
def test_a_server_that_does_not_answer_is_one_to_wait_for(settings, uri):
    error_of(partial(ia.open_library, settings(uri=uri)), ia.Unavailable)


@pytest.mark.parametrize(
    "password",
    [
        *("hunter@two", "hunter/two", "hunter@two/three", "4242/two", "70000/two"),
        *("4242@two/three", "hunter?two", "hunter%two", "hunter#two", "hunter two"),
        *("hunter:two@three", "@two", "/two"),
    ],
)
def test_no_part_of_a_badly_written_password_is_quoted(settings, password):
    uri = f"postgresql://immich:{password}@127.0.0.1:{sandbox.free_port()}/immich"
    error = error_of(partial(ia.open_library, settings(uri=uri)), ia.AnalyzeError)
    for part in ("hunter", "two", "three", "4242", "70000"):
        assert part not in str(error)
        assert part not in repr(error)


@pytest.mark.measured
@pytest.mark.parametrize(
    "uri", ["postgresql://localhost:hunter/immich", "host=localhost port=hunter", "hunter", "h=u"]
)
def test_an_address_that_is_none_is_said_at_once_and_not_quoted(settings, uri):
    error = error_of(partial(ia.open_library, settings(uri=uri)), ia.Fatal)
    assert error.key == "bad_postgres_url"
    assert "hunter" not in str(error)


# previews


@pytest.mark.parametrize(
    ("version", "style"),
    [(OLDEST, "relative"), ("1.144.1", "container"), ("2.7.5", "container"), (NEWEST, "data")],
)
def test_immichs_paths_lead_to_the_folder_given(photos, opened, version, style):
    library = photos(version, path_style=style)
    id = library.add(colour="blue")
    [(path,)] = library.run('SELECT "path" FROM {file}')
    assert path.startswith({"relative": "upload/thumbs/"}.get(style, "/"))
    tool = opened(library)
    assert tool.preview(*listing(tool)) == library.preview_file(id).read_bytes()


LOCATIONS = ("/mnt/photos", "/thumbs", "/mnt/thumbs/immich", "/my-thumbs", "C:/x", "./upload", "")


def test_any_other_media_location_will_do(photos, opened):
    library, pictures = photos(), {}
    for number, location in enumerate(LOCATIONS):
        picture = b"%d" % number
        id = library.add(preview_bytes=picture)
        pictures[id] = picture
        file = library.preview_file(id).relative_to(library.root)
        move(library, id, f"{location}/{file}")
    tool = opened(library)
    assert {asset.id: tool.preview(asset) for asset in listing(tool)} == pictures


def test_an_edited_preview_goes_first_and_is_no_second_photo(photos, opened):
    library = photos("2.5.6")
    library.add(preview_bytes=b"as taken", edited_preview=b"as cropped")
    library.add(preview_bytes=b"plain")
    tool = opened(library)
    assert {tool.preview(asset) for asset in listing(tool)} == {b"as cropped", b"plain"}
    assert len(listing(tool)) == 2


@pytest.fixture
def preview_of(photos, opened):
    """Reads the preview that the database says is at that path; there is another one."""
    library = photos()
    library.add()
    [asset] = listing(tool := opened(library))

    def read(path):
        library.run('UPDATE asset_file SET path = %s WHERE "assetId" = %s', str(path), asset.id)
        return tool.preview(tool.look(asset))

    read.root, read.library = library.root, library
    library.add()
    return read


@pytest.mark.parametrize(
    "path",
    [
        *("/data/thumbs/../../outside.jpeg", "/data/thumbs/../../library/../outside.jpeg"),
        *("/data/thumbs//etc/passwd", "thumbs//etc/passwd", "/etc/passwd", "../outside.jpeg"),
        *("/data/thumbs/link.jpeg", "/data/thumbs/folder/outside.jpeg", "", "/data/thumbs"),
    ],
)
def test_a_path_that_leaves_the_folder_is_not_followed(preview_of, path):
    outside = preview_of.root.parent / "outside.jpeg"
    outside.write_bytes(sandbox.draw("red"))
    (preview_of.root / "thumbs/link.jpeg").symlink_to(outside)
    (preview_of.root / "thumbs/folder").symlink_to(outside.parent)
    error = error_of(partial(preview_of, path), ia.Permanent)
    assert (error.key, error.fields) == ("preview_outside", {"path": path})


def test_links_inside_the_folder_are_followed(preview_of):
    thumbs = preview_of.root / "thumbs"
    (thumbs / "real.jpeg").write_bytes(b"here")
    (thumbs / "link.jpeg").symlink_to(thumbs / "real.jpeg")
    (thumbs / "folder").symlink_to(".")
    assert preview_of("/data/thumbs/link.jpeg") == b"here"
    assert preview_of("/data/thumbs/folder/link.jpeg") == b"here"


def test_the_folder_itself_may_be_a_link(photos, opened, tmp_path):
    library = photos()
    library.add()
    (tmp_path / "link").symlink_to(library.root)
    tool = opened(library, root=tmp_path / "link")
    assert tool.preview(*listing(tool)) == sandbox.draw("red")


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "loop", "dangling", "long", "file/"])
def test_what_is_no_file_is_no_preview(preview_of, kind):
    path = preview_of.root / "thumbs" / ("x" * 300 if kind == "long" else "it.jpeg")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "dangling"):
        path.symlink_to(path if kind == "loop" else path.with_name("nothing"))
    elif kind == "file/":
        path.write_bytes(b"")
        path /= "below-a-file.jpeg"
    if kind == "long":  # which no system call takes
        assert error_of(partial(preview_of, path), ia.Permanent).key == "unreadable_file"
    else:
        assert preview_of(path) is None


@pytest.mark.measured
def test_a_file_that_may_not_be_read_fails_that_photo():
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's, which is private
        root, file = Path(folder), Path(folder) / "thumbs/it.jpeg"
        file.parent.mkdir()
        file.write_bytes(b"secret")
        file.chmod(0)
        root.chmod(0o755)
        with without_privileges():
            error = error_of(partial(ia.read_file, ia.inside(root, str(file))), ia.Permanent)
    assert error.key == "unreadable_file"


def test_a_library_whose_folder_is_away_is_waited_for(preview_of):
    (preview_of.root / "thumbs/it.jpeg").write_bytes(b"picture")
    (preview_of.root / "thumbs").rename(preview_of.root / "away")
    error = error_of(partial(preview_of, "/data/thumbs/it.jpeg"), ia.Unavailable)
    assert (error.key, error.fields["root"]) == ("root_wrong", preview_of.root)
    (preview_of.root / "thumbs").mkdir()  # where it was mounted
    error = error_of(partial(preview_of, "/data/thumbs/it.jpeg"), ia.Unavailable)
    assert (error.key, error.fields["root"]) == ("root_empty", preview_of.root)
    (preview_of.root / "thumbs").rmdir()
    (preview_of.root / "away").rename(preview_of.root / "thumbs")
    assert preview_of("/data/thumbs/it.jpeg") == b"picture"


@pytest.mark.measured
def test_a_preview_that_lies_elsewhere_by_now_is_read_there(photos, opened):
    library = photos()
    library.add()
    [asset] = listing(tool := opened(library))
    file = library.preview_file(asset.id)
    file.rename(file.with_suffix(".webp"))
    path = asset.source.removesuffix(".jpeg") + ".webp"
    library.run("UPDATE asset_file SET path = %s", path)
    assert tool.preview(asset) == sandbox.draw("red")


@pytest.mark.parametrize("call", ["stat", "open"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EHOSTDOWN])
def test_a_disk_that_fails_is_asked_again(preview_of, monkeypatch, number, call):
    usual = getattr(Path, call)

    def fails(path, *more, **options):
        if path.name == "it.jpeg":
            raise OSError(number, os.strerror(number))
        return usual(path, *more, **options)

    (preview_of.root / "thumbs/it.jpeg").write_bytes(b"picture")
    monkeypatch.setattr(Path, call, fails)
    error = error_of(partial(preview_of, "/data/thumbs/it.jpeg"), ia.Retryable)
    assert (type(error), error.key) == (ia.Retryable, "unreadable_file")


# other instances


@pytest.mark.measured
def test_a_photo_is_claimed_by_one_instance_at_a_time(photos, opened):
    library = photos()
    library.add_many(2)
    one, other = opened(library), opened(library)
    first, second = listing(one)
    with one.claimed(first) as found:
        assert found == first
        assert error_of(other.claimed(first).__enter__, ia.Skip).key == "claimed_elsewhere"
        with other.claimed(second) as found:
            assert found == second
    with other.claimed(first) as found:
        assert found == first
        one.close()
        other.close()  # as when it is killed
        with one.claimed(first) as found:
            assert found == first


def test_what_another_instance_wrote_is_seen_when_it_is_claimed(photos, opened):
    library = photos()
    library.add_many(2)
    one, other = opened(library), opened(library)
    first, second = listing(other)
    with one.claimed(first):
        one.write(first, "A lake.", NOTE)
    with other.claimed(first) as found:
        assert found.description == "A lake."
        library.trash(second.id)
        error_of(other.claimed(second).__enter__, ia.Skip)
        held = library.run("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        assert held == [(1,)]


# what changes while it runs


@pytest.mark.measured
def test_tables_that_change_are_met_by_other_statements(photos, opened):
    """As in an upgrade, or a restore, of Immich."""
    library = photos(UNLOCKED)
    library.add()
    tool = opened(library)
    assert tool.total() == 1
    library.run("ALTER TABLE asset_exif RENAME TO asset_exif_away")
    error = error_of(lambda: listing(tool), ia.Unavailable)
    assert "asset_exif" in str(error)
    assert error_of(lambda: listing(tool), ia.Unavailable).key == "no_immich_tables"
    library.run("ALTER TABLE asset_exif_away RENAME TO asset_exif")
    library.run('ALTER TABLE asset_exif ADD COLUMN "lockedProperties" character varying[]')
    [asset] = listing(tool)
    assert tool.write(asset, "A red square.", NOTE)
    locked = library.run('SELECT description, "lockedProperties" FROM asset_exif')
    assert locked == [("A red square.", ["description"])]


def test_a_connection_is_renewed_each_hour_for_what_changed_unnoticed(photos, opened, monkeypatch):
    library = photos(UNLOCKED)
    library.add_many(2)
    tool = opened(library)
    first, second = listing(tool)
    library.run('ALTER TABLE asset_exif ADD COLUMN "lockedProperties" character varying[]')
    assert tool.write(first, "A lake.", NOTE)
    later = time.monotonic() + ia.REOPEN_AFTER
    monkeypatch.setattr(ia.time, "monotonic", lambda: later)
    assert tool.write(second, "A hill.", NOTE)
    locked = library.run('SELECT description, "lockedProperties" FROM asset_exif ORDER BY 1')
    assert locked == [("A hill.", ["description"]), ("A lake.", None)]


def test_a_monitor_leaves_older_photos_alone_whatever_happens_to_their_previews(photos, opened):
    library, now = photos(), datetime.now(UTC)
    old, new = library.add_many(2)
    uploaded = 'UPDATE asset SET "createdAt" = %s WHERE id = %s'
    library.run(uploaded, now - timedelta(days=3), old)
    library.run(uploaded, now - timedelta(days=1), new)
    tool = opened(library)
    assert [asset.id for asset in tool.news(now - timedelta(days=9), now)] == [new]
    made_anew = [asset.id for asset in tool.news(now - timedelta(days=9), None)]
    assert sorted(made_anew) == sorted([old, new])  # which the modes with a backlog look at


def test_an_empty_file_is_one_that_is_being_written(preview_of):
    (preview_of.root / "thumbs/it.jpeg").touch()
    data = preview_of("/data/thumbs/it.jpeg")
    assert data == b""
    assert error_of(partial(ia.prepared, data, 0), ia.Retryable).key == "preview_cut"


# the folder


@pytest.mark.measured
@pytest.mark.parametrize("kind", ["missing", "without thumbs", "a file", "thumbs a file", "long"])
def test_a_folder_without_thumbs_is_said_to_be_wrong(photos, settings, tmp_path, kind):
    root = tmp_path / ("x" * 300 if kind == "long" else "root")
    if kind == "a file":
        root.write_text("")
    elif kind not in ("missing", "long"):
        root.mkdir()
    if kind == "thumbs a file":
        (root / "thumbs").write_text("")
    error = error_of(partial(ia.open_library, settings(photos(), root=root)), ia.Fatal)
    assert (error.key, error.fields) == ("root_wrong", {"root": root})


def test_a_folder_without_this_librarys_previews_is_said_to_be_wrong(photos, settings, tmp_path):
    library, root = photos(), tmp_path / "root"
    library.add_many(3)
    (root / "thumbs").mkdir(parents=True)
    (root / "thumbs/other.jpeg").write_bytes(sandbox.draw("red"))
    error = error_of(partial(ia.open_library, settings(library, root=root)), ia.Fatal)
    assert error.key == "root_empty"
    assert error.fields["root"] == root
    assert error.fields["path"].is_relative_to(root / "thumbs")


@pytest.mark.measured
@pytest.mark.parametrize("closed", [".", "thumbs"])
def test_a_folder_that_may_not_be_read_is_said_to_be_wrong(photos, settings, closed):
    library = photos()
    library.add()
    folder, asked = library.root / closed, settings(library)
    folder.chmod(0)
    try:
        with without_privileges():
            error = error_of(partial(ia.open_library, asked), ia.Fatal)
    finally:
        folder.chmod(0o755)
    assert error.key == "unreadable_file"
    assert error.fields["why"] == "Permission denied"
    assert error.fields["file"].is_relative_to(folder)
    assert isinstance(error, ia.Unexpected)  # a service waits for a disk that is mounted later


def test_some_previews_that_are_lost_are_no_wrong_folder(photos, opened):
    library = photos()
    library.add_many(4, files=False)
    library.add()
    tool = opened(library)
    read = 0
    for asset in listing(tool):
        if library.preview_file(asset.id).exists():
            read += tool.preview(asset) == sandbox.draw("red")
        else:
            assert tool.preview(asset) is None
    assert read == 1


def test_an_empty_library_may_have_an_empty_folder(photos, opened):
    assert listing(opened(photos())) == []


def test_the_address_may_be_written_in_keywords(photos, opened):
    library = photos()
    library.add()
    parts = psycopg2.extensions.parse_dsn(library.uri)
    assert len(listing(opened(library, uri=psycopg2.extensions.make_dsn(**parts)))) == 1


def test_paths_are_read_as_the_database_has_them(photos, opened):
    library = photos()
    id = library.add()
    file = library.root / "thumbs" / "Ünï%20 cödé" / "it's\\ here.jpeg"
    file.parent.mkdir()
    file.write_bytes(b"here")
    move(library, id, "/data/" + str(Path(file).relative_to(library.root)))
    tool = opened(library)
    assert tool.preview(*listing(tool)) == b"here"
