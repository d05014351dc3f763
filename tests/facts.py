"""What is known of a photo besides its picture, as tests say it to either kind of library."""

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

AHEAD = timedelta(hours=2)  # of UTC: the clocks where photos are taken, so that nobody mixes them
FACE = 8  # how wide and high faces are


def new_id() -> str:
    return str(uuid.uuid4())


def own_id(*parts: str) -> str:
    """An id that is always the same for the same parts."""
    digest = hashlib.md5("\0".join(parts).encode(), usedforsecurity=False).digest()
    return str(uuid.UUID(bytes=digest, version=4))


@dataclass(frozen=True)
class Person:
    """Somebody, and where the face is on a photo; `replace(anna, x=40)` is the same person.

    Persons of one id are one to Immich, which lets each user give them a name from 3.2 on and
    keeps them apart by their users before.
    """

    name: str = ""
    birth: str | None = None
    hidden: bool = False
    x: int = 0  # the left edge of the face
    deleted: bool = False  # the face, by a user
    visible: bool = True  # the face: editing the picture may cut it off
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Album:
    """An album of a user, or of the owner of its first photo, shared with others."""

    name: str
    owner: str | None = None
    shared: Sequence[str] = ()
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Line:
    """Words that Immich read on a photo; editing the picture may cut them off."""

    text: str
    visible: bool = True


def album_of(album: Album | str, owner: str) -> Album:
    """The album meant: a mere name is the one of that name which the photo's owner has."""
    return album if isinstance(album, Album) else Album(album, owner, id=own_id(owner, album))


def lines_of(texts: Iterable[Line | str]) -> list[Line]:
    """The lines meant: mere text is visible."""
    return [text if isinstance(text, Line) else Line(text) for text in texts]


def box(place: int, number: int) -> dict[str, float]:
    """Where a line of so many is, from top to bottom; 0 to 1 from the left and from the top."""
    top, bottom = place / number, (place + 1) / number
    across = {"x1": 0.1, "x2": 0.9, "x3": 0.9, "x4": 0.1}
    return across | {"y1": top, "y2": top, "y3": bottom, "y4": bottom}


def face_box(person: Person) -> dict[str, int]:
    """Where a face is, in pixels of a picture."""
    corners = {"boundingBoxX1": person.x, "boundingBoxX2": person.x + FACE}
    corners |= {"boundingBoxY1": 0, "boundingBoxY2": FACE}
    return corners | {"imageWidth": 1000, "imageHeight": 1000}


def with_parents(tag: str) -> list[str]:
    """A tag and those above it, which Immich makes with it: "Travel/Sea" lies below "Travel"."""
    parts = tag.split("/")
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def parent(tag: str) -> str:
    """The tag above, or "" for one at the top."""
    return tag.rpartition("/")[0]


def times(taken: str | None) -> dict[str, datetime]:
    """The wall clock of the place, written as if it were UTC, and the true moment."""
    if taken is None:
        return {}
    local = datetime.fromisoformat(taken).replace(tzinfo=UTC)
    return {"local": local, "created": local - AHEAD}


def exif(
    place: Sequence[str | None] | None = None,
    gps: Sequence[float] | None = None,
    taken: str | None = None,
    camera: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the exif row holds of this, by the names that the API and the tables share."""
    found = dict(camera or {})
    found |= zip(("city", "state", "country"), place or (), strict=bool(place))
    found |= zip(("latitude", "longitude"), gps or (), strict=bool(gps))
    if taken is not None:
        found |= {"dateTimeOriginal": times(taken)["created"].isoformat(), "timeZone": "UTC+2"}
    return found
