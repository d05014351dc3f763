"""A library that a tool is let loose on, which is killed again and again while people type.

Nothing but the end of a process at any moment happens here; see faults.py for the rest.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import sandbox
import servers
from servers import FakeImmich, FakeOllama, FakeServer
from test_notes import note_of, text_id
from test_service import note_arrivals
from worlds import ApiWorld, Running, SqlWorld, World, asking

pytestmark = pytest.mark.slow


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.getfixturevalue("access") == "api":
        with FakeImmich(sidecar_delay=0.0) as server:
            yield ApiWorld(server)
        server.check()
    else:
        photos: Callable[..., Any] = request.getfixturevalue("photos")
        postgres: sandbox.Postgres = request.getfixturevalue("postgres")
        yield SqlWorld(photos(), postgres)


def filled(library: World, number: int) -> dict[str, bytes]:
    """Photos that look different, by id."""
    pictures = [servers.own_picture(n) for n in range(number)]
    return {library.add(picture=picture): picture for picture in pictures}


def watched(library: World, model: FakeOllama) -> list[FakeServer]:
    """Servers whose requests tell of moments in the tool's work."""
    seen: list[FakeServer] = [model]
    if isinstance(library, ApiWorld):
        seen.append(library.server)
    return seen


def kill_within(tool: Running, there: FakeServer, requests: int) -> None:
    """Kill the tool when it made so many requests, if it does not end before."""
    while requests and tool.process.poll() is None:
        requests -= there.arrived.acquire(timeout=0.1)
    tool.process.kill()
    tool.end()


@pytest.mark.parametrize(
    ("access", "policy", "photos_there", "kills"),
    [
        ("api", "none", 40, 2),
        ("database", "missing-ai", 40, 2),
        pytest.param("api", "none", 1000, 50, marks=pytest.mark.long),
        pytest.param("api", "missing-ai", 200, 10, marks=pytest.mark.long),
        pytest.param("database", "none", 200, 10, marks=pytest.mark.long),
        pytest.param("database", "missing-ai", 1000, 50, marks=pytest.mark.long),
    ],
)
def test_no_word_is_lost_and_no_photo_is_described_twice(
    access, library, ollama, command, policy, photos_there, kills
):
    chance, pictures = random.Random(policy), filled(library, photos_there)
    argv = [*library.argv, *asking(ollama), "--mode", "batch", "-O", policy]
    typed: dict[str, list[str]] = {id: [] for id in pictures}
    for number in range(kills):
        there = chance.choice(watched(library, ollama))
        note_arrivals(there, ".*", "")
        with Running(*argv) as tool:
            kill_within(tool, there, chance.randrange(1, 100))
        there.close()  # what is on its way from the dead arrives now, or never
        there.start()
        for id in chance.sample(sorted(pictures), 2):
            typed[id].append(f"What I saw on day {number}.\n[AI] is not my thing.")
            library.describe(id, typed[id][-1])
    with Running(*argv) as tool:
        assert tool.end() == 0
    ends_well(library, pictures, typed, policy)
    asked = len(ollama.asked)
    assert command(*argv).returncode == 0
    assert len(ollama.asked) == asked


def ends_well(
    library: World, pictures: dict[str, bytes], typed: dict[str, list[str]], policy: str
) -> None:
    """Texts, writes and notes are as they should be."""
    texts, writes = library.texts(), library.writes()
    for id, picture in pictures.items():
        told, words = servers.told(picture), typed[id]
        if policy == "none":
            assert texts[id] == (words[-1] if words else told)
        else:
            block = f"[AI]\n{told}\n[/AI]"
            assert texts[id] == (f"{words[-1]}\n\n{block}" if words else block)
        written = [text for written_id, text in writes if written_id == id]
        assert len(written) == len(set(written)) <= 1 + len(words)
        if not words or policy != "none":
            assert note_of(library, id)["text"] == text_id(texts[id])


def each_text_has_its_note(library: World, ids: Iterable[str]) -> int:
    """How many texts there are, all of them known as ours by the note or what it replaces."""
    texts = {id: text for id, text in library.texts().items() if text and id in ids}
    for id, text in texts.items():
        note = note_of(library, id) or {}
        assert text_id(text) in (note.get("text"), note.get("was")), (text, note)
    return len(texts)


@pytest.mark.parametrize(
    ("access", "policy", "photos_there", "kills"),
    [
        ("api", "none", 40, 2),
        ("api", "all", 12, 2),
        pytest.param("api", "none", 1000, 50, marks=pytest.mark.long),
        pytest.param("api", "all", 40, 50, marks=pytest.mark.long),
        pytest.param("database", "all", 40, 10, marks=pytest.mark.long),
    ],
)
def test_after_a_kill_each_text_is_known_as_ours(
    access, library, ollama, policy, photos_there, kills
):
    """Also where one of ours is being replaced by another: each run has its own words."""
    chance, pictures = random.Random(policy), filled(library, photos_there)
    argv = [*library.argv, *asking(ollama), "--mode", "batch", "-O", policy]
    there = watched(library, ollama)[-1]  # the notes and texts go to Immich
    # five requests a photo; `all` begins anew each time
    most = 20 + (8 * photos_there // kills if policy == "none" else 5 * photos_there // 2)
    for number in range(kills):
        ollama.answer = lambda image, _, number=number: f"{servers.told(image)} Seen in {number}."
        note_arrivals(there, ".*", "")
        with Running(*argv) as tool:
            kill_within(tool, there, chance.randrange(20, most))
        there.close()  # what is on its way from the dead arrives now, or never
        there.start()
        each_text_has_its_note(library, pictures)
    with Running(*argv) as tool:
        assert tool.end() == 0
    assert each_text_has_its_note(library, pictures) == photos_there
