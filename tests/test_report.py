"""The page of --report, and what several models or prompts make of the same photos."""

import base64
import io
import os
import re
import resource
import threading
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import servers
from facts import Person
from hours import with_health
from PIL import Image
from servers import FakeKey
from worlds import (
    CHATS,
    NO_PAUSE,
    PROMPT,
    ApiWorld,
    Running,
    about_photos,
    answer_by_picture,
    asking,
    fill,
    shown,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow

BROKEN = b"\xff\xd8\xff no picture \xff\xd9"


class Cell(NamedTuple):
    """What a column has for a photo."""

    text: str
    whose: str
    cost: str
    question: str


class Row(NamedTuple):
    """A photo in a report."""

    name: str
    link: str
    preview: str
    before: str
    whose: str
    cells: list[Cell]


def words(node: ElementTree.Element | None) -> str:
    return "" if node is None else "".join(node.itertext()).strip()


def find(node: ElementTree.Element, name: str) -> ElementTree.Element | None:
    """What has this class."""
    return next((one for one in node.iter() if name in one.get("class", "").split()), None)


def placed(node: ElementTree.Element) -> list[int]:
    """Its row and column."""
    return [int(n) for n in re.findall(r"--(?:row|column): (\d+)", node.get("style", ""))]


def rows(file: Path) -> list[Row]:
    """The photos of a report, which is a whole page."""
    page = file.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    found: dict[int, Row] = {}
    for node in tree.iter("article"):
        link, picture, before = node.find(".//a"), node.find(".//img"), find(node, "before")
        label = before[0].get("class", "").split()[-1] if before is not None else ""
        found[placed(node)[0]] = Row(
            words(node.find("h2")),
            "" if link is None else link.get("href", ""),
            "" if picture is None else picture.get("src", ""),
            "" if before is None else words(find(before, "words")),
            label,
            [],
        )
    for node in tree.iter("div"):
        if "text" in node.get("class", "").split():
            row, column = placed(node)
            asked = node.find("details")
            cell = Cell(
                words(find(node, "words")),
                find(node, "label").get("class").split()[-1],
                words(find(node, "cost")),
                "" if asked is None else words(find(asked, "words")),
            )
            assert len(found[row].cells) == column - 1
            found[row].cells.append(cell)
    assert [*found] == [*range(1, len(found) + 1)]
    return [*found.values()]


def figures(file: Path) -> dict[str, str]:
    """The totals at the end of a report."""
    page = file.read_text(encoding="utf-8")
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def pixels(source: str) -> tuple[int, int]:
    """The size of a picture in a page."""
    kind, data = source.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).size


# What a report shows


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "real"])
def test_a_report_shows_each_photo_with_what_it_got(command, library, ollama, tmp_path, dry):
    wanted = fill(library, 5)
    file = tmp_path / "report.html"
    argv = [*library.argv, *asking(ollama), "--report", str(file)]
    assert command(*argv, *dry).returncode == 0
    found = rows(file)
    assert sorted(row.cells[0].text for row in found) == sorted(wanted.values())
    for row in found:
        assert (row.name, row.before, row.whose) == ("photo.jpg", "", "")
        assert max(pixels(row.preview)) <= 320
        assert row.cells[0].whose == "ours"
        assert re.fullmatch(r"[\d.]+\xa0s · \d+ tokens", row.cells[0].cost)
        assert row.cells[0].question == PROMPT
    assert figures(file)[ia.t("page_described")] == "5"
    assert library.texts() == dict.fromkeys(wanted, "") if dry else wanted


@pytest.mark.measured
def test_a_report_tells_whose_a_text_was_and_is(command, library, ollama, tmp_path):
    texts = {"": servers.own_picture(0), "By a person.": servers.own_picture(1)}
    for text, picture in texts.items():
        library.add(picture=picture, description=text)
    file = tmp_path / "report.html"
    argv = [*library.argv, *asking(ollama), "--report", str(file)]
    assert command(*argv, "-O", "missing-ai", "-p").returncode == 0
    by_before = {row.before: row for row in rows(file)}
    assert by_before["By a person."].whose == "person"
    assert by_before["By a person."].cells[0].whose == "person"  # with ours added
    assert "By a person.\n\n[AI]\n" in by_before["By a person."].cells[0].text
    assert by_before[""].cells[0].whose == "ours"

    assert command(*argv, "-O", "outdated", "-p", "--prompt", "Anew.").returncode == 0
    again = {row.before: row for row in rows(file)}
    assert {row.whose for row in again.values()} == {"ours", "person"}
    assert all(row.before == row.cells[0].text for row in again.values())

    assert command(*argv, "-O", "outdated", "-p", "--prompt", "Anew.").returncode == 0
    assert rows(file) == []  # of what was left alone


def test_a_report_shows_what_failed_and_why(command, library, ollama, tmp_path):
    fill(library, 2)
    library.add("broken.jpg", picture=BROKEN)
    library.add("<script>.jpg", picture=servers.own_picture(7))
    answer_by_picture(ollama, {servers.own_picture(7): "I'm sorry, but I can't help with that."})
    file = tmp_path / "report.html"
    argv = [*library.argv, *asking(ollama), *NO_PAUSE, "--report", str(file)]
    assert command(*argv, "--dry-run").returncode == 1
    failed = {row.name: row for row in rows(file) if row.cells[0].whose == "failed"}
    assert failed["broken.jpg"].cells[0].text == ia.t("preview_broken")
    assert failed["broken.jpg"].preview == ""
    assert failed["<script>.jpg"].cells[0].text == ia.t("answer_declined")
    assert pixels(failed["<script>.jpg"].preview)
    assert figures(file)[ia.t("page_failed")] == "2"


@pytest.mark.measured
@pytest.mark.parametrize("size", [(600, 400), (200, 150)])  # the smaller one fits as it is
def test_a_picture_that_only_the_model_can_read_is_described_without_a_preview(
    command, library, ollama, tmp_path, size
):
    torn = servers.broken_picture(size)
    library.add("torn.jpg", picture=torn)
    library.add("whole.jpg", picture=servers.own_picture(0))
    answer_by_picture(ollama, {torn: "Noise."})
    file = tmp_path / "report.html"
    done = command(*library.argv, *asking(ollama), "--report", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    by_name = {row.name: row for row in rows(file)}
    assert (by_name["torn.jpg"].preview, by_name["torn.jpg"].cells[0].text) == ("", "Noise.")
    assert by_name["whole.jpg"].preview


def test_a_key_that_a_server_repeats_is_not_in_the_report(command, immich, api, ollama, tmp_path):
    fill(api, 1)
    keys = {"--api-key": "m0del-key", "--host-header": "X-Pass: l0ng-value"}
    said = f"no {immich.key}, m0del-key or l0ng-value fits this picture"
    answer_by_picture(ollama, {servers.own_picture(0): servers.Reply(400, {"error": said})})
    file = tmp_path / "report.html"
    argv = [*api.argv, *asking(ollama), *NO_PAUSE, "--dry-run", "--report", str(file)]
    assert command(*argv, *(part for option in keys.items() for part in option)).returncode == 1
    assert rows(file)[0].cells[0].text.endswith("no …, … or … fits this picture")
    page = file.read_text(encoding="utf-8")
    assert [secret for secret in (immich.key, "m0del-key", "l0ng-value") if secret in page] == []


def test_a_report_shows_the_facts_that_were_given(command, library, ollama, tmp_path):
    library.add(picture=servers.own_picture(0), people=[Person("Anna")])
    file = tmp_path / "report.html"
    argv = [*library.argv, *asking(ollama), "--context", "people", "--report", str(file)]
    assert command(*argv, "--dry-run").returncode == 0
    assert "People in it: Anna" in rows(file)[0].cells[0].question


def test_photos_are_linked_where_an_address_is_known(command, api, database, ollama, tmp_path):
    file = tmp_path / "report.html"
    for world in (api, database):
        [photo] = fill(world, 1)
        argv = [*world.argv, *asking(ollama), "--dry-run", "--report", str(file)]
        assert command(*argv).returncode == 0
        own = f"{world.server.url}/photos/{photo}" if isinstance(world, ApiWorld) else ""
        assert rows(file)[0].link == own
        done = command(*argv, "--link-url", "https://me:s3cret@photos.me")
        assert rows(file)[0].link == f"https://photos.me/photos/{photo}"
        assert f"\nhttps://photos.me/photos/{photo}\n" in done.stdout
        assert "s3cret" not in done.stdout + file.read_text(encoding="utf-8")
        world.set_address("https://me:s3cret@family.me/")
        assert command(*argv, "--link-url", "https://photos.me").returncode == 0
        assert rows(file)[0].link == f"https://family.me/photos/{photo}"
        assert "s3cret" not in file.read_text(encoding="utf-8")


def test_a_report_tells_how_long_the_rest_would_take(hours, immich, api, ollama, tmp_path):
    immich.keys[immich.key] = FakeKey("alice", (*servers.MINIMAL, "asset.statistics"))
    fill(api, 40)
    hours.pace(ollama, seconds=6.0)
    file = tmp_path / "report.html"
    argv = ["--dry-run", "--limit", "4", "--max-concurrent", "1", "--report", str(file)]
    with hours.batch(api, ollama, *argv) as run:
        pass
    assert run.counts == {"described": 4}
    told = figures(file)
    assert told[ia.t("page_left")] == "36"
    minutes = int(re.match(r"\d+", told[ia.t("page_time_left")])[0])
    assert 3 <= minutes <= 4  # 6 s each


def test_a_report_of_nothing_is_a_page_too(command, library, ollama, tmp_path):
    file = tmp_path / "report.html"
    assert command(*library.argv, *asking(ollama), "--report", str(file)).returncode == 0
    assert rows(file) == []
    assert figures(file)[ia.t("page_described")] == "0"


def test_a_text_that_immich_did_not_keep_is_shown_as_lost(command, immich, api, ollama, tmp_path):
    immich.sidecar_delay = 0.0
    id = api.add(picture=servers.own_picture(0), read_only=True)
    file = tmp_path / "report.html"
    done = command(*api.argv, *asking(ollama), "--report", str(file))
    assert (done.returncode, api.texts()[id]) == (1, "")
    assert [row.cells[0].whose for row in rows(file)] == ["ours", "failed"]
    assert rows(file)[1].cells[0].text == ia.t("not_kept")


# How it is written


def test_a_run_that_is_killed_leaves_a_whole_report(api, ollama, tmp_path):
    wanted = fill(api, 6)
    file = tmp_path / "report.html"
    argv = [*api.argv, *asking(ollama), "--max-concurrent", "1", "--report", str(file)]
    asked, over = threading.Semaphore(0), threading.Event()

    def fourth(exchange: servers.Exchange) -> None:
        asked.release()
        if len(about_photos(ollama)) > 3:
            over.wait(servers.PATIENCE)

    ollama.script(*CHATS, fourth, forever=True)
    with Running(*argv) as run:
        for _ in range(4):
            assert asked.acquire(timeout=servers.PATIENCE)
        run.process.kill()
        run.end()
    over.set()
    assert 2 <= len(rows(file)) <= 3  # the third may not have been written yet
    assert {row.cells[0].text for row in rows(file)} < {*wanted.values()}


@pytest.mark.measured
def test_a_report_that_cannot_be_written_is_told_before_a_model_is_asked(
    command, library, ollama, tmp_path
):
    fill(library, 1)
    for file in (tmp_path / "absent" / "report.html", tmp_path):
        done = command(*library.argv, *asking(ollama), "--report", str(file))
        assert done.returncode == 2
        assert f"{file} cannot be written" in done.stderr
    assert about_photos(ollama) == []
    assert not library.writes()


def test_a_shorter_end_leaves_nothing_of_a_longer_one(tmp_path):
    """What is left is no longer told once all is done."""
    file, tally = tmp_path / "report.html", ia.Tally()
    report = ia.Report(str(file), {"a model": ia.parse([], {})}, tally, "(?!)")
    photo, done, tally.total = ia.Photo("id", "a.jpg", "", "0"), ia.Outcome.DESCRIBED, 98_000
    tally.add(done)
    report.add(1, ia.Ending(photo, done, text="A cat.", said=ia.Said("A cat.", 8.0, 300)))
    assert figures(file)[ia.t("page_left")] == "98\u202f000"
    tally.listed = 98_000  # the rest has descriptions
    report.write()
    assert figures(file)[ia.t("page_left")] == "0"
    assert ia.t("page_time_left") not in figures(file)
    assert [row.cells[0].text for row in rows(file)] == ["A cat."]


def test_what_is_no_unicode_is_shown_as_far_as_it_goes(tmp_path):
    file, text = tmp_path / "report.html", "half a \ud83d cat"
    report = ia.Report(str(file), {"a model": ia.parse([], {})}, ia.Tally(), "(?!)")
    photo, done = ia.Photo("id", text, text, "0"), ia.Outcome.DESCRIBED
    report.add(1, ia.Ending(photo, done, text=text, said=ia.Said(text, 8.0, 300)))
    [row] = rows(file)
    assert {row.name, row.before, row.cells[0].text} == {"half a ? cat"}


def test_a_report_that_no_longer_fits_on_the_disk_is_told(command, process, api, ollama, tmp_path):
    """The operating system writes a part of it, and says so only to those who ask."""
    fill(api, 1)
    file = tmp_path / "report.html"
    argv = [*api.argv, *asking(ollama), "--dry-run", "--report", str(file)]
    assert command(*argv).returncode == 0
    limit = file.stat().st_size - 1
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        done = process(*argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert done.returncode == 2
    assert f"{file} cannot be written" in done.stderr


def test_a_run_that_does_not_start_leaves_an_older_report(command, api, ollama, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("older")
    argv = [*asking(ollama), "--report", str(file), "--no-wait-for-immich"]
    assert command("--immich-api-url", "http://127.0.0.1:1", *argv).returncode == 2
    assert file.read_text() == "older"


@pytest.mark.measured
@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--report", "x.html", "--undo"], "no_report"),
        (["--report", "x.html", "--combined"], "batch_only"),
        (["--compare", "other"], "compare_needs_dry_run"),
        (["--compare", "other", "--dry-run", "--undo"], "compare_needs_dry_run"),
        (["--prompt-file", "a", "--prompt-file", "b"], "compare_needs_dry_run"),
    ],
)
def test_what_does_not_go_together_is_one_line(command, api, ollama, tmp_path, argv, key):
    for name in "ab":
        (tmp_path / name).write_text(name)
    done = command(*api.argv, *asking(ollama), *argv)
    assert (done.returncode, done.stderr) == (2, ia.t(key) + "\n")
    assert ollama.exchanges == []


@pytest.mark.parametrize("number", [30, pytest.param(1000, marks=pytest.mark.long)])
def test_many_photos_stay_small(tmp_path, number):
    """Previews as noisy as photos get, with long texts."""
    file, tally = tmp_path / "report.html", ia.Tally()
    noise = Image.effect_noise((1440, 1080), 60).convert("RGB")
    target = io.BytesIO()
    noise.save(target, "JPEG", quality=80)
    asked = ia.Question(PROMPT, (ia.prepared(target.getvalue(), 0),))
    report = ia.Report(str(file), ["a model"], tally, "(?!)")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(number):
        photo = ia.Photo(str(n), f"{n}.jpg", "", "0")
        said = ia.Said("A word of many. " * 60, 8.0, 300)
        done = ia.Outcome.DESCRIBED
        report.add(1, ia.Ending(photo, done, text=said.text, asked=asked, said=said))
    assert file.stat().st_size < 30e3 * number
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB


# Several models and prompts


@pytest.fixture
def two_models():
    """An Ollama with two models."""
    sees = ("completion", "vision")
    with servers.FakeOllama({"tiny-vlm": sees, "other": sees}) as server:
        yield server
    server.check()


def test_models_describe_the_same_photos_one_after_the_other(
    command, library, two_models, tmp_path
):
    fill(library, 15)
    file = tmp_path / "report.html"
    argv = [*library.argv, *asking(two_models), "--dry-run", "--limit", "3", *with_health()]
    done = command(*argv, "--compare", "other", "--report", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    chats = two_models.find(*CHATS)
    assert [chat.json["model"] for chat in chats] == ["tiny-vlm"] * 3 + ["other"] * 3
    assert {shown(chat) for chat in chats[:3]} == {shown(chat) for chat in chats[3:]}
    assert [len(row.cells) for row in rows(file)] == [2, 2, 2]
    page = file.read_text(encoding="utf-8")
    assert [name in page for name in ("tiny-vlm", "other")] == [True, True]
    assert ia.t("page_left") not in figures(file)  # several models tell no time for the rest
    assert done.stdout.count("photo.jpg\n") == 6
    assert done.stdout.count("\nother\n\n") == 3
    assert not library.writes()


def test_models_are_compared_without_a_report_too(command, library, two_models):
    wanted = fill(library, 2)
    argv = [*library.argv, *asking(two_models), "--dry-run", "--compare", "other"]
    done = command(*argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert [done.stdout.count(text) for text in wanted.values()] == [2, 2]
    assert [done.stdout.count(f"\n{name}\n\n") for name in ("tiny-vlm", "other")] == [2, 2]


@pytest.mark.measured
def test_what_the_first_model_leaves_alone_no_other_describes(command, library, two_models):
    library.add(picture=servers.own_picture(0), description="By a person.")
    argv = [*library.argv, *asking(two_models), "--dry-run", "--compare", "other"]
    done = command(*argv)
    assert (done.returncode, done.stdout, two_models.find(*CHATS)) == (0, "", [])


def test_prompts_are_compared_too(command, api, two_models, tmp_path):
    api.add(picture=servers.own_picture(0), people=[Person("Anna")])
    for name, text in (
        ("short.txt", "Describe {{ people }}."),
        ("long.txt", "Describe at length."),
    ):
        (tmp_path / name).write_text(text)
    file = tmp_path / "report.html"
    files = ["--prompt-file", "short.txt", "--prompt-file", "long.txt"]
    argv = [*api.argv, *asking(two_models), "--dry-run", "--report", str(file)]
    assert command(*argv, *files, "--compare", "other").returncode == 0
    asked = [(c.json["model"], c.json["messages"][0]["content"]) for c in two_models.find(*CHATS)]
    assert asked == [
        ("tiny-vlm", "Describe Anna."),
        ("tiny-vlm", "Describe at length."),
        ("other", "Describe Anna."),
        ("other", "Describe at length."),
    ]
    assert len(rows(file)[0].cells) == 4


@pytest.mark.measured
def test_a_model_that_is_not_there_is_told_before_anything_is_asked(
    command, api, two_models, tmp_path
):
    fill(api, 1)
    argv = [*api.argv, *asking(two_models), "--dry-run", "--compare", "other,absent"]
    done = command(*argv, "--report", str(tmp_path / "report.html"))
    assert done.returncode == 2
    assert "absent" in done.stderr
    assert two_models.find(*CHATS) == []


@pytest.mark.measured
def test_a_photo_that_one_model_fails_on_is_described_by_the_other(
    command, api, two_models, tmp_path
):
    fill(api, 5)

    def refuse(exchange: servers.Exchange) -> servers.Reply | None:
        first = shown(about_photos(two_models)[0])
        refused = exchange.json["model"] == "tiny-vlm" and shown(exchange) == first
        return servers.Reply(400, {"error": "what a picture"}) if refused else None

    two_models.script(*CHATS, refuse, forever=True)
    file = tmp_path / "report.html"
    argv = [*api.argv, *asking(two_models), *NO_PAUSE, "--dry-run", "--report", str(file)]
    assert command(*argv, "--compare", "other", "--limit", "2").returncode == 1
    marks = sorted(tuple(cell.whose for cell in row.cells) for row in rows(file))
    assert marks == [("failed", "ours"), ("ours", "ours"), ("ours", "ours")]


def test_a_model_describes_what_it_described_or_failed_on_before(
    command, library, two_models, tmp_path
):
    """A comparison is of models, whatever the notes of a photo say of one of them."""
    fill(library, 3)
    bad = servers.own_picture(1)

    def refuse(exchange: servers.Exchange) -> servers.Reply | None:
        refused = exchange.json["model"] == "other" and shown(exchange) == bad
        return servers.Reply(400, {"error": "what a picture"}) if refused else None

    two_models.script(*CHATS, refuse, forever=True)
    argv = [*library.argv, *asking(two_models), *NO_PAUSE]
    for _ in range(ia.MOST_TRIES):
        command(*argv, "--model-name", "other", "-O", "outdated")
    file = tmp_path / "report.html"
    compared = [*argv, "--dry-run", "--compare", "other", "--report", str(file)]
    command(*compared, "-O", "outdated")
    marks = sorted(tuple(cell.whose for cell in row.cells) for row in rows(file))
    assert marks == [("ours", "failed"), ("ours", "ours"), ("ours", "ours")]


@pytest.mark.parametrize("change", ["delete", "describe"])
def test_a_photo_that_changes_meanwhile_does_not_end_a_comparison(
    command, library, two_models, tmp_path, change
):
    id, *_ = fill(library, 3)

    def last_of_the_first(exchange: servers.Exchange) -> None:
        if len(two_models.find(*CHATS)) == 3:
            library.delete(id) if change == "delete" else library.describe(id, "By a person.")

    two_models.script(*CHATS, last_of_the_first, forever=True)
    file = tmp_path / "report.html"
    argv = [*library.argv, *asking(two_models), "--dry-run", "--report", str(file)]
    assert command(*argv, "--compare", "other", "--max-concurrent", "1").returncode == 0
    cells = sorted(len(row.cells) for row in rows(file))
    assert cells == ([1, 2, 2] if change == "delete" else [2, 2, 2])


# In a browser


def test_a_report_of_a_run_is_fine_in_a_browser(command, database, ollama, chromium, tmp_path):
    fill(database, 3)
    name = "<b>\u202eevil \N{CAMERA}.jpg"
    database.add(name, picture=servers.own_picture(7), description="W" * 10_000)
    database.add("broken.jpg", picture=BROKEN)
    file = tmp_path / "report.html"
    argv = [*database.argv, *asking(ollama), "-O", "missing-ai", "-p", "--report", str(file)]
    assert command(*argv, "--dry-run").returncode == 1
    assert chromium.faults(file) == []
    assert os.path.getsize(file) < 300_000
