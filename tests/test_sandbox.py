"""The parts of the sandbox keep their promises: what other tests build on."""

import base64
import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psycopg2
import pytest
import requests
import sandbox
import tiny_vlm
from facts import Album, Line, Person
from worlds import others_long

pytestmark = pytest.mark.slow


@pytest.fixture
def photos(postgres, tmp_path, request):
    uri = postgres.database(getattr(request, "param", sandbox.NEWEST))
    with sandbox.PhotoLibrary(uri, tmp_path) as library:
        yield library
    postgres.drop(uri)


def every_generation(test):
    """`make test` takes the oldest and the newest here; the tool is tested with each of them."""
    versions = others_long(sandbox.VERSIONS, sandbox.VERSIONS[0], sandbox.NEWEST)
    return pytest.mark.parametrize("photos", versions, indirect=True)(test)


def ask(server, picture=None):
    content = [{"type": "text", "text": "Describe this photo."}]
    if picture:
        url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 50}
    reply = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    reply.raise_for_status()
    return reply.json()["choices"][0]


# the tiny model


def test_answers_name_the_colour_of_the_picture(real_llamacpp):
    def answered(colour):
        return ask(real_llamacpp, sandbox.draw(colour))["message"]["content"]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(answered, tiny_vlm.COLOURS))
    assert answers == [sandbox.answer(colour) for colour in tiny_vlm.COLOURS]
    assert answers[0] == "A photo dominated by red tones with even lighting."


def test_without_a_picture_the_model_says_so(real_llamacpp):
    assert ask(real_llamacpp)["message"]["content"] == tiny_vlm.BLIND


def test_same_arguments_same_bytes(tmp_path):
    first, second = (
        [file.read_bytes() for file in tiny_vlm.write_model(folder)]
        for folder in (tmp_path, tmp_path)
    )
    assert first == second


def test_a_thinking_model_keeps_its_thoughts_apart():
    with sandbox.LlamaCpp(think=True) as server:
        message = ask(server, sandbox.draw("green"))["message"]
    assert message["content"] == sandbox.answer("green")
    assert message["reasoning_content"] == "The user wants a description"


def test_an_endless_model_stops_at_the_limit():
    with sandbox.LlamaCpp(endless=True) as server:
        assert ask(server, sandbox.draw("blue"))["finish_reason"] == "length"


def test_a_server_can_be_blind_and_ask_for_a_key():
    with sandbox.LlamaCpp(vision=False) as server, pytest.raises(requests.HTTPError, match="500"):
        ask(server, sandbox.draw("red"))
    with sandbox.LlamaCpp(api_key="key") as server, pytest.raises(requests.HTTPError, match="401"):
        ask(server)


def test_a_server_that_cannot_start_says_why(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_text("not a model")
    with pytest.raises(sandbox.SandboxError, match="did not start"):
        sandbox.LlamaCpp(str(broken)).__enter__()


# the library


@every_generation
def test_every_generation_can_be_filled(photos):
    plain = photos.add("plain.jpg", colour="yellow")
    told = photos.add("told.jpg", description="by a person", visibility="archive")
    photos.add("bin.jpg", trashed=True)
    photos.add("gone.jpg", offline=True, preview=False)
    photos.add("raw.jpg", exif=False, extracted=False)
    photos.add_person(plain, Person("Ann"))
    photos.add_tag(plain, "Holidays/Sea")
    texts = photos.descriptions()
    assert len(texts) == 4
    assert (texts[plain], texts[told]) == ("", "by a person")
    assert photos.preview_file(plain).read_bytes() == sandbox.draw("yellow")
    assert photos.locked(plain) == []
    assert photos.notes(plain) == {}


def names_on(photos, id):
    """Who is on a photo, by the names that its owner gave, from left to right."""
    joined = 'p."id" = f."personId"'
    if photos._has("person", "personGroupId"):
        joined = 'p."personGroupId" = f."personGroupId" AND p."ownerId" = a."ownerId"'
    rows = photos.run(
        'SELECT p."name" FROM {face} f JOIN {asset} a ON a."id" = f."assetId"'
        f' JOIN {{person}} p ON {joined} WHERE f."assetId" = %s AND f."deletedAt" IS NULL'
        ' ORDER BY f."boundingBoxX1"',
        id,
    )
    return [name for (name,) in rows]


def albums_of(photos, id):
    """The albums that a photo is in, and how many users see each."""
    album, asset = (
        ("albumId", "assetId")
        if photos._has("album_asset", "albumId")
        else ("albumsId", "assetsId")
    )
    return photos.run(
        f'SELECT "albumName", (SELECT count(*) FROM {{album_user}} u WHERE u."{album}" = a."id")'
        f' FROM {{album}} a JOIN {{album_asset}} m ON m."{album}" = a."id"'
        f' WHERE m."{asset}" = %s ORDER BY 1',
        id,
    )


@every_generation
def test_every_generation_holds_what_is_known_of_a_photo(photos):
    anna, ben = Person("Anna", birth="1980-02-29", x=40), Person("Ben", x=20)
    id = photos.add(
        people=[anna, ben, Person("Nobody", deleted=True)],
        place=("Warnemünde", None, "Germany"),
        gps=(54.18, 12.08),
        taken="2019-07-14T15:30:00",
        camera={"make": "Canon", "iso": 100},
        tags=["Travel/Sea"],
        ocr=["HARBOUR", Line("cut off", visible=False)],
        albums=["Summer", Album("Ours", owner="bob", shared=["someone"])],
        favorite=True,
    )
    bobs = photos.add(owner="bob", people=[replace(anna, name="Mum")])
    photos.name_person(anna, "Anne")
    assert (names_on(photos, id), names_on(photos, bobs)) == (["Ben", "Anne"], ["Mum"])
    times = 'SELECT "localDateTime" - "fileCreatedAt", "isFavorite" FROM {asset} WHERE "id" = %s'
    assert photos.run(times, id) == [(timedelta(hours=2), True)]
    exif = 'SELECT "city", "state", "latitude", "make", "iso" FROM {exif} WHERE "assetId" = %s'
    assert photos.run(exif, id) == [("Warnemünde", None, 54.18, "Canon", 100)]
    assert photos.run('SELECT "value" FROM {tag} ORDER BY 1') == [("Travel",), ("Travel/Sea",)]
    owners = 0 if photos._has("album", "ownerId") else 1
    assert albums_of(photos, id) == [("Ours", owners + 1), ("Summer", owners)]
    if "asset_ocr" in photos._columns:
        seen = ' WHERE "isVisible"' if photos._has("asset_ocr", "isVisible") else ""
        assert photos.run(f'SELECT "text" FROM asset_ocr{seen}') == [("HARBOUR",)]


@every_generation
def test_a_tag_updates_a_photo_but_an_album_does_not(photos):
    id = photos.add()
    stamp = 'SELECT "updatedAt" FROM {asset} WHERE "id" = %s'
    before = photos.run(stamp, id)
    photos.add_to_album(id, "Summer")
    assert photos.run(stamp, id) == before
    photos.tag(id, "Sea")
    assert photos.run(stamp, id) > before


def test_the_restricted_role_may_be_given_more_to_read(photos):
    uri = photos.restricted_role("curious", "it's secret", "person", "face", "album_asset")
    with sandbox.connected(uri) as cursor:
        for table in ("person", "asset_face", "album_asset"):
            cursor.execute(f"SELECT * FROM {table}")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute("SELECT * FROM album")


@every_generation
def test_an_update_is_stamped_by_the_trigger(photos):
    id = photos.add()
    stamp = 'SELECT "updatedAt", "updateId" FROM {exif} WHERE "assetId" = %s'
    [before] = photos.run(stamp, id)
    photos.describe(id, "changed")
    [after] = photos.run(stamp, id)
    assert after > before
    assert photos.description(id) == "changed"


@every_generation
def test_the_restricted_role_writes_descriptions_and_nothing_else(photos):
    id = photos.add()
    uri = photos.restricted_role("describer", "it's secret")
    exif, asset = photos.tables["exif"], photos.tables["asset"]
    with sandbox.connected(uri) as cursor:
        cursor.execute(f'UPDATE "{exif}" SET "description" = %s', ("written",))
        assert photos.description(id) == "written"
        for statement in (
            f'UPDATE "{exif}" SET "city" = NULL',
            f'UPDATE "{asset}" SET "isFavorite" = true',
            f'DELETE FROM "{asset}"',
            f'INSERT INTO "{exif}" ("assetId") VALUES (gen_random_uuid())',
            "SELECT * FROM system_metadata",
        ):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                cursor.execute(statement)


@every_generation
def test_a_deleted_note_is_listed_with_the_rights_of_whoever_deletes_it(photos):
    if "asset_metadata_audit" not in photos._columns or not photos._has("asset", "isEdited"):
        return
    id = photos.add()
    note = 'INSERT INTO asset_metadata ("assetId", key, value) VALUES (%s, %s, %s::jsonb)'
    photos.run(note, id, "a-key", "{}")
    uri = photos.restricted_role(f"deleter_{uuid.uuid4().hex[:8]}", "it's secret")
    with sandbox.connected(uri) as cursor:
        cursor.execute("DELETE FROM asset_metadata")
    assert photos.run('SELECT "assetId"::text, key FROM asset_metadata_audit') == [(id, "a-key")]


def test_an_edited_picture_has_two_previews(photos):
    id = photos.add(colour="red", edited_preview="cyan")
    rows = photos.run('SELECT "isEdited", "path" FROM {file} ORDER BY 1')
    assert [edited for edited, _ in rows] == [False, True]
    assert rows[1][1].endswith(f"{id}_preview_edited.jpeg")
    assert photos.preview_file(id).read_bytes() == sandbox.draw("red")


def test_many_assets_at_once(photos):
    ids = photos.add_many(500, files=False)
    assert set(photos.descriptions()) == set(ids)


@pytest.mark.skipif(not sandbox.Postgres().own, reason="the server is not ours to stop")
def test_the_library_outlives_a_restart(postgres, photos):
    postgres.restart()
    photos.add()
    assert len(photos.descriptions()) == 1


@pytest.mark.skipif(not sandbox.Postgres().own, reason="the server's address is given")
def test_over_tcp_a_password_is_asked_for():
    with sandbox.Postgres(tcp=True) as postgres:
        psycopg2.connect(postgres.uri("postgres")).close()
        with pytest.raises(psycopg2.OperationalError, match="password"):
            psycopg2.connect(postgres.uri("postgres", "postgres", "wrong"))


# the demonstration


@pytest.fixture
def demonstrated(postgres, tmp_path):
    """The exit code of the demonstration, its lines, and what it leaves in its temporary folder."""
    own = {name: value for name, value in os.environ.items() if name not in ("HOSTS", "REPORT")}
    folder = tmp_path / "temporary"
    folder.mkdir()

    def run(*argv, **environ):
        places = {"TMPDIR": str(folder), "TEST_DATABASE_URL": postgres.uri("postgres")}
        done = subprocess.run(
            [sys.executable, sandbox.__file__, *argv],
            cwd=tmp_path,
            env=own | places | environ,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.splitlines(), sorted(folder.rglob("*"))

    return run


def test_the_demonstration_ends_by_naming_its_page(demonstrated):
    code, lines, left = demonstrated()
    head, _, name = lines[-1].rpartition(" ")
    page = Path(name)
    assert (code, head, left) == (0, "The page of this run:", [page.parent, page])
    described = [line.split(maxsplit=1) for line in lines if "A photo dominated" in line]
    assert len(described) == 10
    shown = page.read_text(encoding="utf-8")
    assert [text for pair in described for text in pair if text not in shown] == []


def test_the_demonstration_keeps_its_page_where_it_is_told(demonstrated, tmp_path):
    file = tmp_path / "photos.html"
    code, lines, left = demonstrated("--limit", "2", REPORT="photos.html")
    assert (code, lines[-1], left) == (0, f"The page of this run: {file}", [])
    assert "sunset.jpg" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(("argv", "code"), [(["--limit", "x"], 2), (["--undo"], 0)])
def test_a_demonstration_without_a_page_leaves_nothing(demonstrated, argv, code):
    done, lines, left = demonstrated(*argv)
    assert (done, left) == (code, [])
    assert "The page" not in "".join(lines)
