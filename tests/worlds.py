"""What whole runs are tested with: a library behind either way of access, and the command line."""

import base64
import queue
import re
import subprocess
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import facts
import pytest
import sandbox
import servers
from facts import Album, Person
from forks import Tool
from servers import Exchange, FakeImmich, FakeLlamaCpp, FakeServer, Reply

import immich_analyze as ia

ROOT = Path(__file__).parent.parent
PROMPT = ia.toml("settings.toml")["prompt"]
CHATS = ("POST", "/api/chat|/v1/chat/completions")
NO_PAUSE = ["--retry-delay-seconds", "0"]
BUSY = replace(  # for longer than any test takes
    servers.recorded("ollama", "chat_overloaded"), headers={"Retry-After": "1000"}
)


PLAIN = [  # what hosts are shown to see whether they are well; the first is as big as most photos
    ia.plain_picture(size, colour).base64
    for size, colour in (((80, 60), "gray"), (ia.PLAIN_SIZE, "gray"), (ia.PLAIN_SIZE, "red"))
]


def about_photos(model: FakeServer) -> list[Exchange]:
    """What a model host was asked about photos, and not to see whether it is well."""
    asked = model.find(*CHATS)
    return [chat for chat in asked if not any(plain in chat.data for plain in PLAIN)]


def answer_by_picture(model: FakeServer, answers: Mapping[bytes, Any]) -> None:
    """Make the model say this to these pictures: a Reply as it is, all else as its words."""
    behave = model.behave

    def behaving(exchange: Exchange) -> Reply:
        sent = (picture for picture in answers if base64.b64encode(picture) in exchange.data)
        answer = answers.get(next(sent, b""))
        return answer if isinstance(answer, Reply) else behave(exchange)

    model.behave = behaving
    model.answer = lambda image, _: answers.get(image) or servers.told(image)


# --- A library, behind either way of access --------------------------------------------------

State = dict[Any, dict[str, Any]]


class ApiWorld:
    """A library behind the REST API, as a test fills it and looks at it."""

    def __init__(self, server: FakeImmich) -> None:
        self.server = server
        self.argv = ["--immich-api-url", server.url, "--immich-api-keys", server.key]

    def add(
        self,
        name: str = "photo.jpg",
        *,
        picture: bytes,
        ready: bool = True,
        taken: str | None = None,
        albums: Iterable[Album | str] = (),
        **more,
    ) -> str:
        own = {"trashed": "is_trashed", "offline": "is_offline"}
        own |= {"favorite": "is_favorite", "library": "library_id"}
        exif = {fact: more.pop(fact, None) for fact in ("place", "gps", "camera")}
        more = {own.get(field, field): value for field, value in more.items()}
        more |= facts.times(taken) | {"extra": facts.exif(taken=taken, **exif)}
        asset = self.server.add(name, preview=picture if ready else None, **more)
        for album in albums:
            self.server.add_to_album(asset, album)
        return asset.id

    def name_person(self, person: Person, name: str, owner: str = "") -> None:
        self.server.name_person(person, name, owner)

    def add_album(self, album: Album | str) -> str:
        return self.server.album(album).id

    def add_to_album(self, id: str, album: Album | str) -> str:
        return self.server.add_to_album(self.server.assets[id], album).id

    def tag(self, id: str, tag: str) -> None:
        self.server.tag(self.server.assets[id], tag)

    def set_address(self, url: str) -> None:
        """Have Immich's administrator say where people open it."""
        self.server.external_domain = url

    def texts(self) -> dict[str, str]:
        return {asset.id: asset.description for asset in self.server.assets.values()}

    def describe(self, id: str, text: str) -> None:
        self.server.assets[id].description = text

    def trash(self, id: str) -> None:
        self.server.assets[id].is_trashed = True

    def delete(self, id: str) -> None:
        del self.server.assets[id]

    def lose_preview(self, id: str) -> None:
        lost = servers.recorded("immich-3.1.0", "thumbnail-preview-of-broken.jpg")
        self.server.script("GET", f"{id}/thumbnail", lost, forever=True)

    def writes(self) -> list[tuple[str, str]]:
        """Each description the server took from the tool; empty updates ask who owns a photo."""
        puts = (put for put in self.server.find("PUT", "/api/assets/") if put.status == 200)
        puts = (put for put in puts if put.operation.name == "updateAsset" and put.json)
        return [(put.params["id"], put.json["description"]) for put in puts]

    def state(self) -> State:
        """Every asset with all its fields; `updated` and `put` say only that somebody wrote."""
        own = {"rendered", "updated", "put"}
        return {
            id: {name: value for name, value in vars(asset).items() if name not in own}
            for id, asset in self.server.assets.items()
        }

    def notes(self) -> dict[str, dict[str, Any]]:
        """All that clients keep with each photo, by key."""
        return {asset.id: dict(asset.notes) for asset in self.server.assets.values()}

    def changes_since(self, before: State) -> State:
        """What became of the assets; with a description goes its note."""
        changes = differences(before, self.state())
        for fields in changes.values():
            check_note(fields.pop("notes"), fields["description"])
            assert fields.pop("noted").keys() == {ia.KEY}
            assert fields.pop("xmp") == fields["description"]
        return changes

    def begin(self, trouble: str) -> None:
        """Be away, in one of several ways."""
        if trouble == "gone":
            self.server.close()
        elif trouble == "bad gateway":
            page = "<html><h1>502 Bad Gateway</h1></html>"
            self.server.script(".*", "", Reply(502, page), forever=True)
        else:
            setattr(self.server, trouble, True)

    def end(self, trouble: str) -> None:
        if trouble == "gone":
            self.server.start()
        elif trouble == "bad gateway":
            self.server.forget_scripts()
        else:
            setattr(self.server, trouble, False)


class SqlWorld:
    """A library in PostgreSQL, as a test fills it and looks at it.

    A trigger notes what is written by anybody but the test itself.
    """

    def __init__(self, photos: sandbox.PhotoLibrary, server: sandbox.Postgres) -> None:
        self.photos, self.server = photos, server
        self.argv = ["--postgres-url", photos.uri, "--immich-root", str(photos.root)]
        self.texts, self.describe, self.trash = photos.descriptions, photos.describe, photos.trash
        self.name_person, self.tag = photos.name_person, photos.tag
        self.add_album, self.add_to_album = photos.add_album, photos.add_to_album
        photos.run("SET application_name = 'the test'")
        photos.run("CREATE SCHEMA seen")
        photos.run('CREATE TABLE seen.writes (n serial, id uuid, "text" text)')
        photos.run(
            "CREATE FUNCTION seen.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$"
            " BEGIN"
            ' INSERT INTO seen.writes (id, "text") VALUES (NEW."assetId", NEW.description);'
            " RETURN NULL; END $$"
        )
        photos.run(
            "CREATE TRIGGER noted AFTER UPDATE ON {exif} FOR EACH ROW"
            " WHEN (current_setting('application_name') <> 'the test')"
            " EXECUTE FUNCTION seen.note()"
        )

    def add(self, name: str = "photo.jpg", *, picture: bytes, ready: bool = True, **more) -> str:
        return self.photos.add(name, preview=ready, preview_bytes=picture, **more)

    def set_address(self, url: str) -> None:
        """Have Immich's administrator say where people open it."""
        self.photos.set_address(url)

    def delete(self, id: str) -> None:
        for table in ("file", "status", "exif"):
            self.photos.run(f'DELETE FROM {{{table}}} WHERE "assetId" = %s', id)
        self.photos.run('DELETE FROM {asset} WHERE "id" = %s', id)

    def lose_preview(self, id: str) -> None:
        self.photos.preview_file(id).unlink()

    def writes(self) -> list[tuple[str, str]]:
        """Each description the tool wrote, in order."""
        return self.photos.run('SELECT id::text, "text" FROM seen.writes ORDER BY n')

    def state(self) -> State:
        """Every row of every table of Immich."""
        keys = self.photos.run(
            "SELECT table_name::text, array_agg(column_name::text ORDER BY ordinal_position)"
            " FROM information_schema.key_column_usage NATURAL JOIN"
            " (SELECT constraint_name, table_name FROM information_schema.table_constraints"
            " WHERE constraint_type = 'PRIMARY KEY' AND table_schema = 'public') AS keys"
            " GROUP BY table_name"
        )
        return {
            (table, *(row[name] for name in key)): row
            for table, key in keys
            for (row,) in self.photos.run(f'SELECT to_jsonb(t) FROM "{table}" t')
        }

    def notes(self) -> dict[str, dict[str, Any]]:
        """All that clients keep with each photo, by key."""
        return {id: self.photos.notes(id) for id in self.texts()}

    def changes_since(self, before: State) -> State:
        """What became of the rows; a description is locked and stamped, and has its note."""
        after, changes = self.state(), {}
        notes = {key: after.pop(key) for key in after.keys() - before.keys()}
        assert {table for table, *_ in notes} <= {"asset_metadata"}
        for (table, id), columns in differences(before, after).items():
            assert table == self.photos.tables["exif"]
            assert columns.pop("lockedProperties") == ["description"]
            assert columns.keys() == {"description", "updatedAt", "updateId"}
            changes[id] = {"description": columns["description"]}
            check_note(self.photos.notes(id), columns["description"])
        assert sorted(row["assetId"] for row in notes.values()) == sorted(changes)
        return changes

    def begin(self, _: str) -> None:
        if not self.server.own:
            pytest.skip("the server is not ours to stop")
        self.server.stop()

    def end(self, _: str) -> None:
        self.server.start()


World = ApiWorld | SqlWorld


def others_long(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases of a test, of which `make test` runs these and `make faults` the others."""
    return [
        case
        if case in kept
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for case in cases
    ]


def mainly(access: str) -> Any:
    """For a test that is not about libraries: this one is enough, the other is `long`."""
    return pytest.mark.parametrize(
        "library", others_long(["api", "database"], access), indirect=True
    )


READABLE = ("asset.read", "asset.view", "asset.update", "album.read", "tag.read")


def readable_immich(version: str, *, partners: bool = False) -> FakeImmich:
    """A server whose one key may read albums and tags."""
    keys = {"key": servers.FakeKey("alice", READABLE)}
    return FakeImmich(version, keys, partners={"alice": ["bob"]} if partners else {})


def differences(before: State, after: State) -> State:
    """The new values where something changed; nothing was added or taken away."""
    assert before.keys() == after.keys()
    changed = {key: (before[key], row) for key, row in after.items() if row != before[key]}
    return {
        key: {name: value for name, value in row.items() if value != old[name]}
        for key, (old, row) in changed.items()
    }


def fill(library: World, number: int) -> dict[str, str]:
    """Put in photos, each of its own look; what the fakes will say of them, by id."""
    pictures = [servers.own_picture(n) for n in range(number)]
    return {library.add(picture=picture): servers.told(picture) for picture in pictures}


def failure_notes(library: World) -> dict[str, Any]:
    """What is noted of photos that failed, by id."""
    kept = {id: notes[ia.KEY] for id, notes in library.notes().items() if ia.KEY in notes}
    return {id: note for id, note in kept.items() if "failed" in note}


# --- Runs ------------------------------------------------------------------------------------


def asking(*hosts: FakeServer | sandbox.LlamaCpp | str) -> list[str]:
    """The options that name these model hosts."""
    urls = [host if isinstance(host, str) else host.url for host in hosts]
    spoken = "llamacpp" if isinstance(hosts[0], FakeLlamaCpp | sandbox.LlamaCpp) else "ollama"
    return ["--hosts", ",".join(urls), "--interface", spoken, "--model-name", "tiny-vlm"]


def shown(chat: Exchange) -> bytes:
    """The picture a model was asked about."""
    found = re.search(rb'"images": ?\["([^"]+)"|;base64,([^"]+)"', chat.data)
    return base64.b64decode(found[1] or found[2])


def asked_about(picture: bytes, *hosts: FakeServer) -> list[Exchange]:
    """The requests about a picture, in their order."""
    found = (chat for host in hosts for chat in host.find(*CHATS) if shown(chat) == picture)
    return sorted(found, key=lambda chat: chat.at)


class Running:
    """The real command line at work; it ends with the block at the latest."""

    def __init__(self, *argv: str, **environ: str) -> None:
        self.process = Tool(
            *argv,
            environ=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.said: list[str] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self._lines.put(line.rstrip("\n"))

    def wait_for(self, text: str) -> None:
        """Return once it says this."""
        while not self.said or text not in self.said[-1]:
            self.said.append(self._lines.get(timeout=servers.PATIENCE))

    def end(self) -> int:
        """Its exit code; then `said` is all that it said."""
        code = self.process.wait(servers.PATIENCE)
        self._reader.join(servers.PATIENCE)
        while not self._lines.empty():
            self.said.append(self._lines.get())
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()
        self.process.stderr.close()


def tally(**counts: int) -> str:
    """The last line of a run, but for the time it took."""
    numbers = {outcome.value: counts.get(outcome.value, 0) for outcome in ia.Outcome}
    return ia.t("tally", **numbers)


def failure(id: str, name: str, key: str, **fields: Any) -> str:
    """The line about a photo that failed."""
    return ia.t("photo_failed", id=id, name=name, why=ia.t(key, **fields))


def check_note(
    notes: dict[str, Any], text: str, model: str = "tiny-vlm", prompt: str = PROMPT
) -> None:
    """All that is kept of a photo is the one note for a text of ours, made just now."""
    [(key, note)] = notes.items()
    assert key == "immich-analyze"
    at = note["at"]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(at)) < timedelta(minutes=5)
    assert note == {
        "v": 1,
        "model": model,
        "prompt": sha256(prompt.encode()).hexdigest()[:12],
        "text": sha256(text.encode()).hexdigest()[:16],
        "at": at,
    }
