"""What is known of a photo: who, where, when, in which album, and how it gets into a question."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sandbox
import servers
from facts import Album, Line, Person
from hours import Hours
from servers import FakeImmich, FakeOllama
from worlds import CHATS, PROMPT, ApiWorld, SqlWorld, World, asking, readable_immich, shown

import immich_analyze as ia

pytestmark = pytest.mark.slow

TAKEN = "2019-07-14T15:30:00.000Z"  # the clock of the place, although it ends with Z


@pytest.fixture
def known(config: Any) -> Any:
    """What is told of one fact, by what the API says of a photo; "" for nothing."""

    def tell(fact: str, **told: Any) -> str:
        photo = ia.Photo("id", "photo.jpg", "", "", told={"localDateTime": TAKEN} | told)
        asked = ia.question(photo, config("--prompt", f"Known: {{{{ {fact} }}}}"))
        return asked.removeprefix("Known: ")

    return tell


def person(name: Any, born: Any = None, *, hidden: Any = False, left: int | None = None) -> dict:
    faces = {} if left is None else {"faces": [{"boundingBoxX1": left, "imageWidth": 100}]}
    return {"name": name, "birthDate": born, "isHidden": hidden, **faces}


# --- Who ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("people", "names"),
    [
        ([person("Zoe"), person("Anna")], ["Anna", "Zoe"]),
        ([person("Anna", left=60), person("Zoe", left=10)], ["Zoe", "Anna"]),
        ([person("  Anna\n Maria ")], ["Anna Maria"]),
        ([person(""), person(" "), person(None), person(7), None, "x"], []),
        ([person("Anna", hidden=True)], []),
        ([person("Anna"), person("Anna")], ["Anna"]),
        ("nobody", []),
    ],
)
def test_people_are_those_with_a_name_who_are_not_hidden(known, people, names):
    assert known("people", people=people) == ", ".join(names)


@pytest.mark.measured
@pytest.mark.parametrize(
    ("born", "taken", "age"),
    [
        ("2012-07-14", "2019-07-14T00:00:00Z", 7),
        ("2012-07-15", "2019-07-14T23:59:59Z", 6),
        ("2012-02-29", "2019-02-28T12:00:00Z", 6),
        ("2012-02-29", "2019-03-01T12:00:00Z", 7),
        ("2012-02-29", "2020-02-29T12:00:00Z", 8),
        ("2019-07-14T00:00:00.000Z", "2019-07-14T10:00:00Z", 0),
        ("2019-07-15", "2019-07-14T10:00:00Z", None),
        ("0001-01-01", "2019-07-14T10:00:00Z", None),
        ("not a date", "2019-07-14T10:00:00Z", None),
        (None, "2019-07-14T10:00:00Z", None),
        ("2012-07-14", None, None),
        ("2012-07-14", "-0044-03-15T12:00:00Z", None),
    ],
)
def test_the_age_is_that_on_the_day_of_the_photo(known, born, taken, age):
    told = known("people", people=[person("Ben", born)], localDateTime=taken)
    assert told == ("Ben" if age is None else f"Ben (aged {age})")


# --- Where and when ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        (("Warnemünde", "Mecklenburg", "Germany"), ["Warnemünde", "Mecklenburg", "Germany"]),
        (("Berlin", "Berlin", "Germany"), ["Berlin", "Germany"]),
        (("", None, "Germany"), ["Germany"]),
        ((None, None, None), []),
        ((1, [], {}), []),
    ],
)
def test_a_place_is_told_from_small_to_large(known, place, parts):
    exif = dict(zip(("city", "state", "country"), place, strict=True))
    assert known("place", exifInfo=exif) == ", ".join(parts)


@pytest.mark.parametrize(
    ("north", "east", "parts"),
    [
        (54.18, 12.08, ["54.18000, 12.08000"]),
        (-33.9, 18.4, ["-33.90000, 18.40000"]),
        (0, 12.5, []),
        (0, 0, []),
        (91, 5, []),
        (5, 181, []),
        (None, 5, []),
        ("54", "12", []),
        (float("nan"), 0, []),
    ],
)
def test_a_position_is_in_degrees(known, north, east, parts):
    assert known("gps", exifInfo={"latitude": north, "longitude": east}) == "".join(parts)


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        ("2019-07-14T15:30:00.000Z", "Sunday, 14 July 2019, afternoon"),
        ("2019-07-01T00:00:00", "Monday, 1 July 2019, night"),
        ("2024-02-29T05:00:00+00:00", "Thursday, 29 February 2024, morning"),
        ("2019-07-14T10:59:59Z", "Sunday, 14 July 2019, morning"),
        ("2019-07-14T11:00:00Z", "Sunday, 14 July 2019, noon"),
        ("2019-07-14T14:00:00Z", "Sunday, 14 July 2019, afternoon"),
        ("2019-07-14T18:00:00Z", "Sunday, 14 July 2019, evening"),
        ("2019-07-14T23:59:59Z", "Sunday, 14 July 2019, night"),
        ("yesterday", None),
        (None, None),
        (5, None),
    ],
)
def test_the_date_is_by_the_clock_of_the_place(known, taken, told):
    assert known("date", localDateTime=taken) == (told or "")


# --- What it belongs to ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (["Travel/Sea", "Travel"], ["Sea"]),
        (["Travel", "Travelling"], ["Travel", "Travelling"]),
        (["A/B/C", "A/B", "A/D"], ["C", "D"]),
        (["Sea", "Travel/Sea"], ["Sea"]),
        (["", None, 5], []),
    ],
)
def test_of_a_path_of_tags_the_deepest_is_told(known, values, parts):
    assert known("tags", tags=[{"value": value} for value in values]) == ", ".join(parts)


def test_albums_are_told_once_each(known):
    told = known("albums", albums=["Summer", "Sea  side", "Summer", "", None, 5])
    assert told == "Summer, Sea side"


# --- How it was taken --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exif", "parts"),
    [
        ({"make": "Canon", "model": "Canon EOS R6"}, ["Canon EOS R6"]),
        ({"make": "NIKON CORPORATION", "model": "NIKON D750"}, ["NIKON D750"]),
        ({"make": "Apple", "model": "iPhone 12"}, ["Apple iPhone 12"]),
        ({"make": None, "model": "Pixel 7"}, ["Pixel 7"]),
        ({"make": "Google", "model": ""}, ["Google"]),
        (
            {"lensModel": "RF 50mm", "exposureTime": "1/250", "fNumber": 2.8, "iso": 100},
            ["RF 50mm", "1/250 s", "f/2.8", "ISO 100"],
        ),
        ({"exposureTime": "0.5", "focalLength": 50}, ["0.5 s", "50 mm"]),
        ({"exposureTime": "1.3", "iso": 3_280_000}, ["1.3 s", "ISO 3280000"]),
        ({"exposureTime": "0", "fNumber": 0, "iso": None, "focalLength": "50"}, []),
        ({"exposureTime": "0/1"}, []),
        ({"exposureTime": "inf", "fNumber": float("inf"), "iso": 10**400}, []),
        (None, []),
    ],
)
def test_a_camera_is_told_without_saying_its_make_twice(known, exif, parts):
    assert known("camera", exifInfo=exif) == ", ".join(parts)


OWN_NAMES = [
    "IMG_1234.JPG",
    "IMG_E1234.HEIC",
    "IMG_1234(2).jpg",
    "DSC01234.JPG",
    "_DSC1234.NEF",
    "DSCF0001.RAF",
    "DSCN1.jpg",
    "PXL_20230101_120000123.jpg",
    "PXL_20230101_120000123.MP.jpg",
    "MVIMG_20190714_093000.jpg",
    "GOPR0123.JPG",
    "GH010123.JPG",
    "DJI_0001.JPG",
    "P1010123.JPG",
    "IMG-20190714-WA0001.jpg",
    "WA0001.jpg",
    "20190714_093000.jpg",
    "20190714_093000~2.jpg",
    "2019-07-14.jpg",
    "100_1234.jpg",
    "SAM_0001.jpg",
    "3f2504e0-4f89-11d3-9a0c-0305e82c3301.jpg",
    "deadbeef01deadbeef.jpg",
    "image0.jpeg",
    "WhatsApp Image 2019-07-14 at 09.30.00.jpeg",
    "img_1.jpg",
    ".jpg",
    "VID_20190714_093000.mp4",
    "video_2019-07-14_09-30-00.mp4",
    "WhatsApp Video 2019-07-14 at 09.30.00.mp4",
    "Видео 1.mov",
    "deadbeef01-.jpg",
]
CHOSEN_NAMES = [
    "Anna.jpg",
    "Anna_2019.jpg",
    "20190714_Hochzeit.jpg",
    "海.jpg",
    "facade.jpg",
    "effaced-decade.jpg",
    "Screenshot_20190714-093000.png",
    "Screenshot_20190714_WhatsApp.png",
    "Дача_2019.jpg",
    "Oma.tar.gz",
    "BURST20190714_Anna.jpg",
    "Videoabend.mp4",
    "beef01.jpg",
    "1" + 200 * "a" + "_Anna.jpg",  # in no time
]


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_name_that_a_camera_or_messenger_gave_says_nothing(known, name):
    assert known("file", originalFileName=name) == ""


@pytest.mark.parametrize("name", CHOSEN_NAMES)
def test_a_name_that_a_person_chose_is_told_without_its_ending(known, name):
    assert known("file", originalFileName=name) == name.rpartition(".")[0]


def test_what_is_written_on_a_photo_is_told_in_order_up_to_500_letters(known):
    rows = [{"text": " HARBOUR\n"}, {"text": "hidden", "isVisible": False}, {"text": "café"}, {}]
    assert known("text", ocr=rows) == "HARBOUR café"
    assert known("text", ocr=[{"text": "x" * 400}] * 2) == f"{'x' * 400} {'x' * 99}"
    assert known("text", ocr=[]) == ""


# --- All together ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told", [{}, {"people": 5, "exifInfo": [], "tags": {}, "ocr": None, "localDateTime": []}]
)
def test_odd_answers_leave_no_trace(config, told):
    photo = ia.Photo("id", "photo.jpg", "", "", told=told)
    assert ia.question(photo, config("--prompt", "Look.", "--context", "all,gps")) == "Look."


def test_the_order_of_names_does_not_change_what_a_note_calls_them(config):
    def called(people: Any, context: str = "people") -> str:
        told = {"people": [person(name, left=x) for x, name in enumerate(people)]}
        return ia.names_id(ia.Photo("id", "photo.jpg", "", "", told=told), asked[context])

    asked = {c: config("--context", c) for c in ("people", "date,camera", "people,place")}
    assert len({called(names) for names in itertools.permutations("abc")}) == 1
    assert called("abc") not in (called("ab"), called("abc", "people,place"))
    assert called("abc", "date,camera") == ""


# --- In whole libraries, of all generations ----------------------------------------------------

ALL = "people,place,gps,date,albums,tags,camera,file,text"
CITIES = (("Warnemünde", "Mecklenburg-Vorpommern", "Germany"), ("Oslo", "", "Norway"))


def questions(model: FakeOllama) -> dict[bytes, str]:
    """What was asked about each photo, by its picture."""
    return {shown(chat): chat.json["messages"][0]["content"] for chat in model.find(*CHATS)}


def told(question: str) -> dict[str, str]:
    """The facts in a question, by the words before them; each is there once."""
    lines = [line.partition(": ")[::2] for line in question.splitlines() if ": " in line]
    names = {"People in it", "Place", "Coordinates", "Date", "Albums", "Tags", "Camera"}
    names |= {"File name", "Text in it", "A person's description"}
    found = [(name, text) for name, text in lines if name in names]
    assert len(found) == len(dict(found))
    return dict(found)


PEOPLE = [
    Person("Zoë", "1980-02-29", x=100),
    Person("Anna {{ x }}", x=500),
    Person("Ben", "2012-07-15", x=300),
    Person("", x=700),
    Person("Hidden", hidden=True, x=50),
]
TAKEN_ON = "2019-07-14T15:30:00"
NAMES = {"Zoë": "Zoë (aged 39)", "Anna {{ x }}": "Anna {{ x }}", "Ben": "Ben (aged 6)"}
CAMERA = {"make": "Canon", "model": "Canon EOS R6", "exposureTime": "1/250", "iso": 100}


def some_facts(rng: random.Random, library: World) -> tuple[dict[str, Any], dict[str, str]]:
    """What a photo is put in with, and what is to be told of it."""
    version = getattr(getattr(library, "server", None), "version", (99,))
    on_it = [person for person in PEOPLE if rng.random() < 0.5]
    known = [person for person in on_it if person.name in NAMES]
    boxes = isinstance(library, SqlWorld) or version < (3,)
    known.sort(key=lambda person: person.x if boxes else person.name)
    city, state, country = place = rng.choice(CITIES)
    tags = rng.sample(["Travel/Sea", "Travel", "Family"], rng.randint(0, 3))
    albums = rng.sample(["Summer", "Home, 2019"], rng.randint(0, 2))
    text = rng.choice([[], ["HARBOUR", Line("gone", visible=False), "café"]])
    fields = {"people": on_it, "place": place, "tags": tags, "albums": albums, "ocr": text}
    fields |= {"gps": (54.5, 12.25), "taken": TAKEN_ON, "camera": CAMERA}
    deepest = {tag.rpartition("/")[2] for tag in tags}
    deepest -= {"Travel"} if "Travel/Sea" in tags else set()
    wanted = {
        "People in it": ", ".join(NAMES[person.name] for person in known),
        "Place": f"{city}, {state}, {country}" if state else f"{city}, {country}",
        "Coordinates": "54.50000, 12.25000",
        "Date": "Sunday, 14 July 2019, afternoon",
        "Albums": ", ".join(sorted(albums)),
        "Tags": ", ".join(sorted(deepest)),
        "Camera": "Canon EOS R6, 1/250 s, ISO 100",
        "File name": "Our boat",
        "Text in it": "HARBOUR café" if text else "",
    }
    return fields, wanted


def knows_text(library: World) -> bool:
    """Whether the release reads what is written on photos: from 2.2 on."""
    if isinstance(library, ApiWorld):
        return library.server.version >= (2, 2)
    return bool(library.photos.run("SELECT to_regclass('asset_ocr')")[0][0])


def in_order(facts: dict[str, str]) -> dict[str, str]:
    """Facts whose order nobody chose, sorted."""
    split = {name: sorted(text.split(", ")) for name, text in facts.items()}
    return facts | {n: ", ".join(split[n]) for n in ("Albums", "Tags") if n in facts}


@pytest.mark.measured
@pytest.mark.parametrize("many", [6, pytest.param(1000, marks=pytest.mark.long)])
def test_each_question_holds_the_facts_of_its_photo_and_no_others(
    hours: Hours, any_library: World, ollama: FakeOllama, many: int
) -> None:
    rng, wanted, his = random.Random(11), {}, Album("His", "bob")
    known_to_bob = [replace(one, name=f"Bob's {one.name}", hidden=False) for one in PEOPLE]
    more = {"owner": "bob", "people": known_to_bob, "albums": [his], "tags": ["Bob's"]}
    any_library.add(picture=servers.picture(), **more)
    old = isinstance(any_library, ApiWorld) and any_library.server.version < (1, 135)
    silent = not knows_text(any_library)
    for number in range(many):
        fields, facts = some_facts(rng, any_library)
        facts |= {"Albums": ""} if old else {}
        facts |= {"Text in it": ""} if silent else {}
        picture = servers.own_picture(number)
        fields["albums"] = [*fields["albums"], his]
        any_library.add("Our boat.jpg", picture=picture, owner="alice", **fields)
        wanted[picture] = in_order({name: text for name, text in facts.items() if text})
    with hours.batch(any_library, ollama, "--context", ALL):
        pass
    asked = questions(ollama)
    asked.pop(servers.picture(), None)  # a partner's photo, which the database has, too
    assert {picture: in_order(told(text)) for picture, text in asked.items()} == wanted


# --- Nobody else's names -----------------------------------------------------------------------


@pytest.fixture(params=["api", "database"])
def two_users(request: Any, photos: Any, postgres: sandbox.Postgres) -> Iterator[World]:
    """A library of Alice, whose key it is, and of Bob, who shares his photos with her."""
    if request.param == "database":
        yield SqlWorld(photos(), postgres)
        return
    with readable_immich("3.3.5", partners=True) as server:  # where one person has several names
        yield ApiWorld(server)
    server.check()


def test_names_are_those_that_the_owner_of_the_photo_gave(
    hours: Hours, two_users: World, ollama: FakeOllama
) -> None:
    anna = Person("Anna", "1980-02-29")
    cut, hidden = Person("Cut", visible=False), Person("Removed", deleted=True)
    hers, his, both = Album("Hers", "alice"), Album("His", "bob"), Album("Both", "bob", ["alice"])
    people = [anna, cut, hidden]
    more = {"taken": TAKEN_ON, "owner": "alice", "people": people, "tags": ["Hers"]}
    id = two_users.add(picture=servers.own_picture(1), albums=[hers, both], **more)
    two_users.add_to_album(id, his)
    of_bob = replace(anna, name="Aunt")
    more = {
        "taken": TAKEN_ON,
        "owner": "bob",
        "people": [of_bob],
        "tags": ["Bob's"],
        "albums": [his, both],
    }
    two_users.add(picture=servers.own_picture(2), **more)
    with hours.batch(two_users, ollama, "--context", "people,albums,tags"):
        pass
    asked = {picture: told(text) for picture, text in questions(ollama).items()}
    alices = asked.pop(servers.own_picture(1))
    assert in_order(alices) == {
        "People in it": "Anna (aged 39)",
        "Albums": "Both, Hers",
        "Tags": "Hers",
    }
    bobs = {"People in it": "Aunt (aged 39)", "Albums": "Both, His", "Tags": "Bob's"}
    assert list(map(in_order, asked.values())) in ([], [bobs])  # through the API, only hers


# --- Made anew when they change ----------------------------------------------------------------

RENEWED = ["-O", "outdated", "--context", "people,place,date,albums,tags"]
CHANGES: dict[str, Any] = {
    "a name": lambda library, id, zoe: library.name_person(zoe, "Zoë", "alice"),
    "an album": lambda library, id, _: library.add_to_album(id, Album("New", "alice")),
    "a tag": lambda library, id, _: library.tag(id, "New"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_text_of_ours_is_made_anew_once_a_fact_changes(
    hours: Hours, two_users: World, ollama: FakeOllama, change: str
) -> None:
    zoe = Person("")
    more = {"owner": "alice", "taken": TAKEN_ON, "place": CITIES[0]}
    ids = [
        two_users.add(picture=servers.own_picture(n), people=[zoe] if n == 1 else [], **more)
        for n in range(3)
    ]
    typed = two_users.add(picture=servers.picture(), people=[zoe], description="Mine.", **more)
    asked = []
    for number in (3, 0, 1, 0):
        if number == 1:
            CHANGES[change](two_users, ids[1], zoe)
            CHANGES[change](two_users, typed, zoe)
        before = len(ollama.find(*CHATS))
        with hours.batch(two_users, ollama, *RENEWED):
            pass
        asked.append(len(ollama.find(*CHATS)) - before)
    assert asked == [3, 0, 1, 0]
    assert two_users.texts()[typed] == "Mine."
    assert ("Zoë" if change == "a name" else "New") in questions(ollama)[servers.own_picture(1)]


def test_a_text_that_a_person_changed_is_not_made_anew(
    hours: Hours, two_users: World, ollama: FakeOllama
) -> None:
    zoe = Person("")
    id = two_users.add(picture=servers.picture(), owner="alice", people=[zoe])
    with hours.batch(two_users, ollama, *RENEWED):
        pass
    two_users.describe(id, "Changed by hand.")
    two_users.name_person(zoe, "Zoë", "alice")
    with hours.batch(two_users, ollama, *RENEWED):
        pass
    assert two_users.texts() == {id: "Changed by hand."}


def test_a_service_makes_a_text_anew_within_a_day(
    hours: Hours, two_users: World, ollama: FakeOllama
) -> None:
    zoe = Person("")
    two_users.add(picture=servers.picture(), owner="alice", people=[zoe])
    with hours.service(two_users, ollama, *RENEWED, "--api-poll-interval", "10000") as run:
        run.until(60)
        two_users.name_person(zoe, "Zoë", "alice")
        run.until(25 * 3600)
    assert len(ollama.find(*CHATS)) == 2
    assert "Zoë" in questions(ollama)[servers.picture()]


def test_a_service_knows_the_tags_of_a_photo_that_arrives(
    hours: Hours, two_users: World, ollama: FakeOllama
) -> None:
    two_users.add(picture=servers.own_picture(0), owner="alice", tags=["Old"])
    with hours.service(two_users, ollama, *RENEWED, "--api-poll-interval", "10000") as run:
        run.until(60)
        two_users.add(picture=servers.own_picture(1), owner="alice", tags=["New", "Old"])
        run.until(25 * 3600)
    assert len(ollama.find(*CHATS)) == 2  # and not once more because of its tags
    assert told(questions(ollama)[servers.own_picture(1)])["Tags"] == "New, Old"


def test_photos_of_one_date_stay_in_their_album(
    hours: Hours, ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ia, "PAGE", 5)
    with readable_immich("2.7.5") as server:  # which shuffles them from page to page
        for number in range(12):
            picture = servers.own_picture(number)
            ApiWorld(server).add(picture=picture, taken=TAKEN_ON, albums=["Scans"])
        for _ in range(2):
            with hours.batch(ApiWorld(server), ollama, *RENEWED):
                pass
    assert len(ollama.find(*CHATS)) == 12
    assert all("Scans" in question for question in questions(ollama).values())


def test_what_shapes_a_question_outdates_texts_once(
    hours: Hours, two_users: World, ollama: FakeOllama
) -> None:
    two_users.add(picture=servers.picture(), owner="alice", place=CITIES[0])
    asked = []
    for options in ([], ["--context", "place"], ["--description-language", "de"]):
        for _ in range(2):
            with hours.batch(two_users, ollama, "-O", "outdated", *options):
                pass
            asked.append(len(ollama.find(*CHATS)))
    assert asked == [1, 1, 2, 2, 3, 3]


def test_a_note_without_facts_stays_valid(
    hours: Hours, two_users: World, ollama: FakeOllama
) -> None:
    id = two_users.add(picture=servers.picture(), owner="alice", place=CITIES[0])
    with hours.batch(two_users, ollama, *RENEWED):
        pass
    note = two_users.notes()[id][ia.KEY]
    assert re.fullmatch("[0-9a-f]{16}", note.pop("facts"))
    if isinstance(two_users, ApiWorld):
        two_users.server.assets[id].notes[ia.KEY] = note
    else:
        change = 'UPDATE asset_metadata SET value = %s WHERE "assetId" = %s'
        two_users.photos.run(change, json.dumps(note), id)
    with hours.batch(two_users, ollama, *RENEWED):
        pass
    assert len(ollama.find(*CHATS)) == 1


# --- What it costs and needs -------------------------------------------------------------------


def test_people_place_and_date_cost_no_request(
    hours: Hours, immich: FakeImmich, ollama: FakeOllama
) -> None:
    world, numbers = ApiWorld(immich), []
    for options in ([], ["--context", "people,place,date,camera,file,gps"]):
        immich.add_many(5, people=[Person("Zoë")])
        before = len(immich.exchanges)
        with hours.batch(world, ollama, *options):
            pass
        numbers.append(len(immich.exchanges) - before)
    assert numbers[0] == numbers[1]


def test_whether_facts_changed_costs_one_request_a_photo(
    hours: Hours, immich: FakeImmich, ollama: FakeOllama
) -> None:
    immich.add_many(5, people=[Person("Zoë")])
    argv = ["-O", "outdated", "--context", "people,place,date"]
    with hours.batch(ApiWorld(immich), ollama, *argv):
        pass
    immich.exchanges.clear()
    with hours.batch(ApiWorld(immich), ollama, *argv):
        pass
    assert immich.count("GET", f"/metadata/{ia.KEY}") == immich.count("GET", "/api/assets/") == 5


def test_albums_cost_one_search_each_and_text_and_tags_one_request_a_photo(
    hours: Hours, ollama: FakeOllama
) -> None:
    numbers = []
    for options in ([], ["--context", "albums,text,tags"]):
        with readable_immich("3.1.0") as server:
            world = ApiWorld(server)
            for number in range(4):
                albums = ["Summer", "Winter"][: number % 2 + 1]
                world.add(picture=servers.own_picture(number), albums=albums, ocr=["HARBOUR"])
            with hours.batch(world, ollama, *options):
                pass
            numbers.append(len(server.exchanges))
        server.check()
    searches = server.find("POST", "/api/search/metadata")
    assert sum("albumIds" in search.json for search in searches) == 2
    assert len(server.find("GET", "/api/albums")) == 1
    assert len(server.find("GET", "/ocr")) == 4
    assert server.find("GET", "/api/tags") == []
    assert numbers[1] - numbers[0] == 2 + 1 + 4 + 4  # the last for tags


@pytest.mark.parametrize(
    ("options", "permission"),
    [
        (["--context", "albums"], "album.read"),
        (["--context", "tags", "-O", "outdated"], "tag.read"),
        (["--context", "people,place,date,tags,camera,file,text"], ""),
    ],
)
def test_a_permission_that_is_missing_is_named_at_the_start(
    command: Any, immich: FakeImmich, ollama: FakeOllama, options: list[str], permission: str
) -> None:
    done = command(*ApiWorld(immich).argv, *asking(ollama), *options)
    assert done.returncode == (2 if permission else 0)
    said = ia.t("immich_permission_missing", permission=permission)
    assert (said in done.stderr) == bool(permission)
    assert immich.find("GET", "/api/(albums|tags)") == []  # it is not found out by trying


def test_a_grant_that_is_missing_is_named_at_the_start(
    command: Any, database: SqlWorld, ollama: FakeOllama
) -> None:
    own, secret = "reads_little", "its secret"
    uri = database.photos.restricted_role(own, secret, "person", "face")
    argv = ["--postgres-url", uri, "--immich-root", str(database.photos.root), *asking(ollama)]
    assert command(*argv, "--context", "people").returncode == 0
    done = command(*argv, "--context", "people,albums,tags,text")
    assert done.returncode == 2
    for table in ("album", "album_asset", "album_user", "tag", "tag_asset", "asset_ocr"):
        assert f"GRANT SELECT ON {table} TO {own}" in done.stderr
    assert "person" not in done.stderr


def test_before_1_135_a_line_says_that_albums_are_not_known(
    hours: Hours, ollama: FakeOllama
) -> None:
    with readable_immich("1.132.3") as server:
        world = ApiWorld(server)
        world.add(picture=servers.picture(), albums=["Summer"])
        with hours.batch(world, ollama, "--context", "albums") as run:
            pass
    assert run.counts == {"described": 1}
    assert run.lines(ia.t("no_albums"), level="WARNING")
    assert "Summer" not in questions(ollama)[servers.picture()]


def test_a_persons_text_is_told_without_ours(
    hours: Hours, two_users: World, ollama: FakeOllama
) -> None:
    text = "By Anna.\n\n[AI]\nOld.\n[/AI]"
    two_users.add(picture=servers.own_picture(1), owner="alice", description=text)
    two_users.add(picture=servers.own_picture(2), owner="alice")
    with hours.batch(two_users, ollama, "-O", "all", "--context", "description"):
        pass
    asked = questions(ollama)
    assert told(asked[servers.own_picture(1)]) == {"A person's description": "By Anna."}
    assert asked[servers.own_picture(2)] == PROMPT


@pytest.mark.measured
def test_the_question_about_a_photo_can_be_seen_without_asking(
    command: Any, two_users: World, ollama: FakeOllama
) -> None:
    facts = {"place": CITIES[0], "albums": ["Sea"], "ocr": ["HARBOUR"]}
    id = two_users.add(picture=servers.picture(), owner="alice", **facts)
    argv = [*two_users.argv, *asking(ollama), "--context", "place,albums,text"]
    before = two_users.state()
    for way in (id, f"http://photos.example/photos/{id}"):
        done = command(*argv, "--show-prompt", way)
        assert (done.returncode, done.stderr) == (0, "")
        place = ", ".join(CITIES[0])
        assert told(done.stdout) == {"Place": place, "Albums": "Sea", "Text in it": "HARBOUR"}
    unknown = command(*argv, "--show-prompt", "00000000-0000-4000-8000-000000000000")
    assert unknown.returncode == 2
    assert (two_users.state(), ollama.find(*CHATS)) == (before, [])
