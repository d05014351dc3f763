"""Immich's database and folders as people run them: scarce, pooled, moved, of odd encodings."""

import re
import secrets
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
import sandbox
import servers
from hours import Hours
from servers import FakeOllama
from worlds import SqlWorld, World, asking, failure, fill, tally

import immich_analyze as ia

pytestmark = pytest.mark.slow

OURS = "application_name = 'immich-analyze' AND datname = current_database()"
CONNECTED = f"SELECT count(*) FROM pg_stat_activity WHERE {OURS}"
own_server = pytest.mark.skipif(
    not sandbox.Postgres().own, reason="the server's settings are given"
)


# --- Few connections ---------------------------------------------------------------------------


@pytest.fixture
def role(database: SqlWorld) -> str:
    """The name of the user that the tool connects as, who is no superuser."""
    name = f"describer_{secrets.token_hex(4)}"
    uri = database.photos.restricted_role(name, "its secret")
    database.argv = ["--postgres-url", uri, "--immich-root", str(database.photos.root)]
    return name


def limit(database: SqlWorld, role: str, kind: str, number: int) -> None:
    """Let that many connections be made besides the one of the test."""
    [(name,)] = database.photos.run("SELECT current_database()")
    if kind == "role":
        database.photos.run(f'ALTER ROLE "{role}" CONNECTION LIMIT {number}')
    else:
        database.photos.run(f'ALTER DATABASE "{name}" CONNECTION LIMIT {number + 1}')


def watch_others(database: SqlWorld, model: FakeOllama) -> list[int]:
    """Have another program connect at each question; how many connections the tool had."""
    uri, answer, seen = database.argv[1], model.answer, []

    def behaving(image: bytes, prompt: str) -> Any:
        psycopg2.connect(uri).close()
        seen.append(database.photos.run(CONNECTED)[0][0])
        return answer(image, prompt)

    model.answer = behaving
    return seen


@pytest.mark.parametrize("kind", ["role", "database"])
def test_with_20_connections_for_64_workers_all_is_described(
    hours: Hours, database: SqlWorld, role: str, ollama: FakeOllama, kind: str
) -> None:
    wanted = fill(database, 24)
    limit(database, role, kind, 20)
    hours.pace(ollama)
    seen = watch_others(database, ollama)
    with hours.batch(database, ollama, "--max-concurrent", "32") as run:
        pass
    assert (run.code, database.texts()) == (0, wanted)
    assert [line.text for line in run.said] == [ia.t("few_connections", free=20, number=13)]
    assert 10 < max(seen) <= 15


@pytest.mark.measured
@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["role", "database"])
def test_the_fewest_connections_will_do(
    hours: Hours, database: SqlWorld, role: str, ollama: FakeOllama, kind: str, number: int
) -> None:
    wanted = fill(database, 5)
    limit(database, role, kind, number)
    with hours.batch(database, ollama) as run:
        pass
    assert (run.code, database.texts()) == (0, wanted)
    told = {"free": number, "number": max(1, (number - 1) * 3 // 4 - 1)}
    assert run.said[0].text == ia.t("few_connections", **told)


@own_server
def test_what_is_kept_for_superusers_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, config: Callable[..., ia.Config], tmp_path: Path, caplog: Any
) -> None:
    few = (*sandbox.Cluster.SETTINGS, "max_connections=12", "superuser_reserved_connections=4")
    monkeypatch.setattr(sandbox.Cluster, "SETTINGS", few)
    with sandbox.Postgres() as server:
        uri = server.database()
        (tmp_path / "thumbs").mkdir()
        options = "--postgres-url", uri, "--immich-root", str(tmp_path)
        ia.open_library(config(*options, "--max-concurrent", "1"))
        assert caplog.messages == []
        ia.open_library(config(*options, "--max-concurrent", "3"))
        # one that was closed just before may be counted still
        told = [ia.t("few_connections", free=free, number=free // 2) for free in (7, 8)]
        assert caplog.messages in ([told[0]], [told[1]])


def test_an_idle_service_gives_its_connections_back(
    hours: Hours, database: SqlWorld, ollama: FakeOllama
) -> None:
    fill(database, 20)
    hours.pace(ollama)
    seen = watch_others(database, ollama)
    with hours.service(database, ollama, "--max-concurrent", "8") as run:
        run.until(60)
        assert run.counts == {"described": 20}
        assert max(seen) > 10
        assert database.photos.run(CONNECTED)[0][0] <= 2  # for whoever looks for news
        later = fill(database, 2)
        run.until(120)
        assert run.counts == {"described": 22}
        assert later.items() <= database.texts().items()
        assert database.photos.run(CONNECTED)[0][0] <= 2


# --- Poolers -----------------------------------------------------------------------------------


class Pooler(socketserver.ThreadingTCPServer):
    """Stands before PostgreSQL as PgBouncer does: one connection by transaction, or one a client.

    It speaks as much of the protocol as simple queries take.
    """

    daemon_threads = True

    def __init__(self, server: dict[str, str], *, by_transaction: bool) -> None:
        self.place = f"{server['host']}/.s.PGSQL.{server['port']}"
        self.by_transaction = by_transaction
        self.shared: tuple[Any, bytes] | None = None
        self.turn = threading.Lock()
        super().__init__(("127.0.0.1", 0), Client)

    def backend(self, startup: bytes) -> tuple[Any, bytes]:
        """A connection to PostgreSQL, and what it said to begin with."""
        with self.turn:
            if self.shared and self.by_transaction:
                return self.shared
            backend = socket.socket(socket.AF_UNIX)
            backend.connect(self.place)
            backend.sendall(startup)
            stream = backend.makefile("rwb")
            backend.close()
            self.shared = stream, answer_of(stream)
            return self.shared


class Client(socketserver.StreamRequestHandler):
    """One client of the pooler."""

    server: Pooler

    def handle(self) -> None:
        while (startup := packet(self.rfile))[4:8] in (b"\4\xd2\x16\x2f", b"\4\xd2\x16\x30"):
            self.wfile.write(b"N")  # neither TLS nor GSSAPI
        backend, greeting = self.server.backend(startup)
        self.wfile.write(greeting)
        while (kind := self.rfile.read(1)) not in (b"", b"X"):
            with self.server.turn:
                backend.write(kind + packet(self.rfile))
                backend.flush()
                answer = answer_of(backend)
            self.wfile.write(answer)


def packet(stream: Any) -> bytes:
    """The rest of a message: its length, and so many bytes."""
    head = stream.read(4)
    return head + stream.read(int.from_bytes(head) - 4)


def answer_of(backend: Any) -> bytes:
    """All messages up to the one that says that it is ready."""
    answer, kind = b"", b""
    while kind != b"Z":
        kind = backend.read(1)
        answer += kind + packet(backend)
    return answer


@pytest.fixture
def pooled(database: SqlWorld) -> Iterator[Callable[..., Pooler]]:
    """Puts a pooler between the tool and the database."""
    if not database.server.own:
        pytest.skip("the server's address is given")
    begun: list[Pooler] = []

    def begin(*, by_transaction: bool) -> None:
        pooler = Pooler(database.server.address, by_transaction=by_transaction)
        begun.append(pooler)
        threading.Thread(target=pooler.serve_forever, daemon=True).start()
        place = {"host": "127.0.0.1", "port": str(pooler.server_address[1])}
        uri = sandbox.libpq_uri(psycopg2.extensions.parse_dsn(database.argv[1]) | place)
        database.argv = ["--postgres-url", uri, *database.argv[2:]]

    yield begin
    for pooler in begun:
        pooler.shutdown()
        pooler.server_close()


@pytest.mark.measured
def test_a_pooler_by_transaction_is_one_line(
    database: SqlWorld, ollama: FakeOllama, command: Any, pooled: Any
) -> None:
    fill(database, 2)
    pooled(by_transaction=True)
    done = command(*database.argv, *asking(ollama))
    assert (done.returncode, done.stderr) == (2, ia.t("pooled_by_transaction") + "\n")
    assert set(database.texts().values()) == {""}


def test_a_pooler_by_session_will_do(
    database: SqlWorld, ollama: FakeOllama, command: Any, pooled: Any
) -> None:
    wanted = fill(database, 2)
    pooled(by_transaction=False)
    done = command(*database.argv, *asking(ollama))
    assert (done.returncode, done.stderr, database.texts()) == (0, "", wanted)


# --- Texts that are no UTF-8 -------------------------------------------------------------------

LATIN = "E'caf\\351'"  # in SQL; an é of ISO 8859-1


@pytest.fixture(params=["SQL_ASCII", "UTF8"])
def latin(request: Any, photos: Any, postgres: sandbox.Postgres) -> SqlWorld:
    """A library in a database that holds any bytes, whatever encoding it says it has by now."""
    library = SqlWorld(photos(encoding="SQL_ASCII"), postgres)
    if request.param == "UTF8":
        known = "UPDATE pg_database SET encoding = 6 WHERE datname = current_database()"
        library.photos.run(known)
    return library


@pytest.mark.parametrize(
    ("column", "flags"),
    [
        ('{asset} SET "originalFileName"', []),
        ('{exif} SET "description"', ["-o"]),
        ('{exif} SET "description"', ["-O", "missing-ai"]),
    ],
)
def test_a_row_that_cannot_be_decoded_costs_only_its_photo(
    latin: SqlWorld, ollama: FakeOllama, command: Any, column: str, flags: list[str]
) -> None:
    wanted = fill(latin, 9)
    bad = sorted(wanted)[4]
    key = "id" if "asset}" in column else '"assetId"'
    latin.photos.run(f"UPDATE {column} = {LATIN} WHERE {key} = '{bad}'")
    kept = f"SELECT description::bytea FROM {{exif}} WHERE \"assetId\" = '{bad}'"
    before = bytes(latin.photos.run(kept)[0][0])
    done = command(*latin.argv, *asking(ollama), *flags)
    *lines, last = done.stderr.splitlines()
    assert (done.returncode, lines) == (1, [failure(bad, bad, "row_not_utf8")])
    assert last.startswith(tally(described=8, failed=1))
    assert bytes(latin.photos.run(kept)[0][0]) == before
    assert dict(latin.writes()).keys() == wanted.keys() - {bad}
    assert command(*latin.argv, *asking(ollama)).stderr.count("\n") == (2 if not flags else 0)


def test_a_row_that_cannot_be_decoded_is_on_one_page_of_many(
    latin: SqlWorld, ollama: FakeOllama, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ia, "PAGE", 3)
    wanted = fill(latin, 10)
    bad = sorted(wanted)[5]
    latin.photos.run(f"UPDATE {{asset}} SET \"originalFileName\" = {LATIN} WHERE id = '{bad}'")
    assert command(*latin.argv, *asking(ollama)).returncode == 1
    written = dict(latin.writes())
    assert written == {id: text for id, text in wanted.items() if id != bad}


@pytest.mark.measured
def test_an_arrival_that_cannot_be_decoded_holds_up_no_other(
    hours: Hours, latin: SqlWorld, ollama: FakeOllama
) -> None:
    with hours.service(latin, ollama) as run:
        run.until(30)
        wanted = fill(latin, 5)
        bad = sorted(wanted)[2]
        latin.photos.run(f"UPDATE {{asset}} SET \"originalFileName\" = {LATIN} WHERE id = '{bad}'")
        run.until(90)
        assert dict(latin.writes()).keys() == wanted.keys() - {bad}
        assert len(run.lines(bad, ia.t("row_not_utf8"))) == 1


# --- Previews on another disk ------------------------------------------------------------------


@pytest.fixture
def moved(database: SqlWorld, tmp_path: Path) -> Path:
    """Where the previews of three photos lie, as with THUMB_LOCATION on another disk."""
    fill(database, 3)
    place = tmp_path / "disk" / "immich-previews"
    place.parent.mkdir()
    (database.photos.root / "thumbs").rename(place)
    return place


@pytest.mark.parametrize("by", ["flag", "variable", "flag and no root"])
def test_previews_are_found_on_another_disk(
    database: SqlWorld, moved: Path, ollama: FakeOllama, command: Any, by: str
) -> None:
    argv, environ = database.argv, {}
    if by == "variable":
        environ = {"IMMICH_ANALYZE_THUMBS_ROOT": str(moved)}
    else:
        argv = [*argv[: 2 if "no root" in by else 4], "--thumbs-root", str(moved)]
    done = command(*argv, *asking(ollama), **environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(database.writes()) == 3


def test_another_disk_that_is_away_is_waited_for(
    hours: Hours, database: SqlWorld, moved: Path, ollama: FakeOllama
) -> None:
    away = moved.with_name("away")
    hours.pace(ollama)
    with hours.service(database, ollama, "--thumbs-root", str(moved)) as run:
        run.at(20, lambda: moved.rename(away))
        run.at(30, lambda: database.add(ready=True, picture=servers.picture()))
        run.until(15)
        assert run.counts == {"described": 3}
        run.until(100)
        assert run.counts == {"described": 3}
        away.rename(moved)
        move_previews(database, moved)
        run.until(200)
        assert run.counts == {"described": 4}
        assert len(run.lines(ia.t("thumbs_wrong", root=moved))) == 1


def move_previews(database: SqlWorld, place: Path) -> None:
    """Move what went to the root, where the test still has thumbs/."""
    for file in (database.photos.root / "thumbs").rglob("*_preview.jpeg"):
        target = place / file.relative_to(database.photos.root / "thumbs")
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)


@pytest.mark.parametrize("kind", ["missing", "file", "of another library", "the root"])
def test_a_wrong_folder_of_previews_is_one_line(
    database: SqlWorld, moved: Path, ollama: FakeOllama, command: Any, tmp_path: Path, kind: str
) -> None:
    place = {"the root": moved.parent}.get(kind, tmp_path / "place")
    if kind == "file":
        place.write_text("")
    elif kind == "of another library":
        place.mkdir()
    done = command(*database.argv, *asking(ollama), "--thumbs-root", str(place))
    [line] = done.stderr.splitlines()
    assert done.returncode == 2
    assert str(place) in line
    assert "--thumbs-root" in line


def test_no_path_and_no_link_leads_out_of_the_other_disk(
    database: SqlWorld, moved: Path, ollama: FakeOllama, command: Any
) -> None:
    (moved.parent / "private.jpeg").write_bytes(servers.picture())
    (moved / "link.jpeg").symlink_to(moved.parent / "private.jpeg")
    ids = sorted(database.texts())
    paths = "/data/thumbs/../private.jpeg", "/data/thumbs/link.jpeg"
    bad = list(zip(ids[:2], paths, strict=True))
    for id, path in bad:
        database.photos.run('UPDATE {file} SET "path" = %s WHERE "assetId" = %s', path, id)
    done = command(*database.argv, *asking(ollama), "--thumbs-root", str(moved))
    *lines, _ = done.stderr.splitlines()
    said = (failure(id, "photo.jpg", "preview_outside", path=p) for id, p in bad)
    assert (done.returncode, sorted(lines)) == (1, sorted(said))
    assert [id for id, _ in database.writes()] == ids[2:]


def test_the_folder_that_is_watched_is_the_one_on_the_other_disk(
    database: SqlWorld, moved: Path, config: Any
) -> None:
    new_library, _ = ia.open_library(config(*database.argv, "--thumbs-root", str(moved)))
    with closing(new_library()) as library:
        assert library.previews == moved


# --- Descriptions of cameras -------------------------------------------------------------------

CAMERAS = "OLYMPUS DIGITAL CAMERA, sony dsc,_cuva,DCIM\\100*MEDIA*,100%,Олимпус"
IGNORED = [
    "OLYMPUS DIGITAL CAMERA         ",
    " \nolympus Digital camera\t",
    "SONY DSC",
    "_CUVA",
    "DCIM\\100MEDIA",
    "dcim\\100ANDRO\nMEDIA (1)",
    "100%",
    "ОЛИМПУС",
]
KEPT = [
    "OLYMPUS DIGITAL CAMERA, and Anna.",
    "An OLYMPUS DIGITAL CAMERA",
    "OLYMPUS  DIGITAL CAMERA",
    "xcuva",
    "_cuvä",
    "DCIM/100MEDIA",
    "DCIM\\101MEDIA",
    "1000",
    "100\\%",
    "sony.dsc",
]


@pytest.mark.parametrize(
    ("flags", "form"),
    [("", "{}"), ("-p", "[AI]\n{}\n[/AI]"), ("-O outdated", "{}")],
)
def test_what_cameras_wrote_counts_as_no_description(
    hours: Hours, library: World, ollama: FakeOllama, flags: str, form: str
) -> None:
    pictures = [servers.own_picture(n) for n in range(len(IGNORED) + len(KEPT))]
    ids = [
        library.add(picture=picture, description=text)
        for picture, text in zip(pictures, IGNORED + KEPT, strict=True)
    ]
    said = [form.format(servers.told(picture)) for picture in pictures]
    with hours.batch(library, ollama, "--ignore-descriptions", CAMERAS, *flags.split()) as run:
        pass
    assert run.code == 0
    assert [library.texts()[id] for id in ids] == said[: len(IGNORED)] + KEPT
    with hours.batch(library, ollama, "--ignore-descriptions", CAMERAS, *flags.split()) as run:
        pass
    assert "described" not in run.counts


def test_beside_missing_ai_no_word_of_a_camera_is_kept_and_each_of_a_person(
    hours: Hours, library: World, ollama: FakeOllama
) -> None:
    camera = library.add(picture=servers.picture(), description="SONY DSC")
    person = library.add(picture=servers.picture(), description="SONY DSC, mine.")
    options = ["-O", "missing-ai", "--ignore-descriptions", CAMERAS]
    with hours.batch(library, ollama, *options):
        pass
    block = f"[AI]\n{servers.told(servers.picture())}\n[/AI]"
    assert library.texts() == {camera: block, person: f"SONY DSC, mine.\n\n{block}"}


def test_what_arrives_with_a_text_of_a_camera_is_described(
    hours: Hours, library: World, ollama: FakeOllama
) -> None:
    with hours.service(library, ollama, "--ignore-descriptions", "OLYMPUS*") as run:
        run.until(30)
        id = library.add(picture=servers.picture(), description="OLYMPUS DIGITAL CAMERA")
        library.add(picture=servers.picture(), description="By a person.")
        run.until(60)
        assert run.counts == {"described": 1}
        assert library.texts()[id] == servers.told(servers.picture())


def test_a_text_of_ours_is_none_of_a_cameras(
    hours: Hours, library: World, ollama: FakeOllama
) -> None:
    wanted = fill(library, 2)
    options = ["--ignore-descriptions", "*"]
    for counts in ({"described": 2}, {"skipped": 2}):
        with hours.batch(library, ollama, *options) as run:
            pass
        assert (run.counts, library.texts()) == (counts, wanted)
    with hours.batch(library, *options, "--undo") as run:
        pass
    assert (run.counts, library.texts()) == ({"undone": 2}, dict.fromkeys(wanted, ""))


def test_undo_leaves_texts_of_cameras_as_they_are(
    hours: Hours, library: World, ollama: FakeOllama
) -> None:
    id = library.add(picture=servers.picture(), description="SONY DSC")
    with hours.batch(library, "--ignore-descriptions", CAMERAS, "--undo") as run:
        pass
    assert (run.counts, library.texts()) == ({"skipped": 1}, {id: "SONY DSC"})


@pytest.mark.measured
def test_without_the_option_the_sql_is_the_same_to_the_letter(config: Any) -> None:
    tables = {name: {"visibility", "isEdited"} for name in ("asset", "asset_exif", "asset_file")}
    tables["asset_job_status"] = set()
    for policy in ia.Policy:
        usual = ia.statements(tables, config("-O", policy))
        assert "$re$" not in usual["listing"] + usual["news"] + usual["count"]
        options = ["-O", policy, "--ignore-descriptions", "SONY DSC"]
        other = ia.statements(tables, config(*options))
        assert (other["listing"] == usual["listing"]) is (policy is not ia.Policy.NONE)


def hint(*told: tuple[str, int]) -> str:
    return ia.t("same_description", texts=", ".join(f"“{text}” ({n})" for text, n in told))


def add_described(library: World, text: str, number: int) -> None:
    for _ in range(number):
        library.add(picture=servers.picture(), description=text)


@pytest.mark.parametrize("flags", ["", "-O outdated", "-O missing-ai --prompt x"])
def test_one_description_of_many_photos_is_said_in_one_line(
    hours: Hours, library: World, ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    long = "KONICA MINOLTA DIGITAL CAMERA, " * 3
    monkeypatch.setattr(ia, "MANY", 4)
    add_described(library, "SONY DSC", 5)
    add_described(library, "By Anna.", 4)
    add_described(library, "", 3)
    add_described(library, long, 6)
    with hours.batch(library, ollama, *flags.split()) as run:
        pass
    assert [line.text for line in run.said if "same" in line.text] == [
        hint((long[:50], 6), ("SONY DSC", 5))
    ]


def test_what_is_ignored_or_ours_or_of_few_photos_is_not_said(
    hours: Hours, library: World, ollama: FakeOllama
) -> None:
    add_described(library, "SONY DSC", 21)
    add_described(library, "By Anna.", 20)
    with hours.batch(library, ollama, "--ignore-descriptions", "sony dsc") as run:
        pass
    assert (run.counts["described"], run.said) == (21, [])


def test_a_service_says_it_once(
    hours: Hours, library: World, ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ia, "WHOLE_SWEEP", 1)
    add_described(library, "SONY DSC", 21)
    with hours.service(library, ollama, "--api-poll-interval", "900") as run:
        run.until(3 * 3600)
    assert len(run.lines("SONY DSC")) == 1


def test_under_cron_it_is_said_on_request(library: World, ollama: FakeOllama, command: Any) -> None:
    add_described(library, "SONY DSC", 21)
    assert command(*library.argv, *asking(ollama)).stderr == ""
    done = command(*library.argv, *asking(ollama), "--log-level", "info")
    assert (done.returncode, done.stderr.splitlines()[0]) == (0, hint(("SONY DSC", 21)))


@pytest.mark.measured
def test_rare_texts_are_forgotten_where_there_are_many(
    hours: Hours, library: World, ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ia, "MOST_TEXTS", 10)
    monkeypatch.setattr(ia, "PAGE", 5)
    for n in range(30):
        add_described(library, f"By person {n}.", 1)
        add_described(library, "SONY DSC", 1)
    with hours.batch(library, ollama, "-O", "outdated") as run:
        pass
    [line] = [line.text for line in run.said]
    assert re.search(r"“SONY DSC” \((2\d|30)\)", line)
