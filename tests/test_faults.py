"""The fault suite in its short form, and that it would see what it looks for."""

import faults
import pytest
import servers
from faults import Photo, Plan, Write

import immich_analyze as ia

pytestmark = pytest.mark.slow

PICTURE = servers.own_picture(1)
TOLD, OTHER = servers.told(PICTURE), servers.told(servers.own_picture(2))
MINE = "A person wrote this."


@pytest.mark.long
@pytest.mark.parametrize("access", ["api", "database"])
def test_whatever_fails_each_photo_ends_with_one_description(access, postgres):
    plan = Plan(photos=60, rounds=1, seed=1, **faults.SHORT)
    outcome = faults.tried(access, plan, postgres)
    print(*outcome.log, sep="\n")
    assert outcome.problems == []


def test_a_tool_that_ends_by_itself_is_seen(tmp_path):
    tool = tmp_path / "tool.py"
    tool.write_text("import sys; sys.exit('No more.')")
    outcome = faults.tried("api", Plan(tool=tool, **faults.SHORT))
    assert outcome.problems[0] == "the tool ended by itself, with exit code 1"
    assert outcome.log == ["No more."]


def seen(text: str, *written: tuple[str, str], typed: str = "") -> list[str]:
    """What is found wrong with a photo that has this text, after these writes of the tool."""
    writes = [Write("id", before, after) for before, after in written]
    return list(faults.wrongs([Photo("id", PICTURE, typed)], {"id": text}, writes))


def test_one_write_and_what_people_wrote_are_right():
    assert seen(TOLD, ("", TOLD)) == []
    assert seen(TOLD, (" \n", TOLD)) == []
    assert seen(MINE, typed=MINE) == []
    assert seen(MINE, ("", TOLD), typed=MINE) == []


@pytest.mark.parametrize(
    ("text", "written", "typed", "part"),
    [
        ("", [], "", "instead of"),
        (TOLD, [("", TOLD), (TOLD, TOLD)], "", "2 times"),
        (TOLD, [], "", "nobody"),
        (OTHER, [("", OTHER)], "", "described as"),
        (TOLD, [(MINE, TOLD)], MINE, "was replaced"),
        (TOLD, [("", TOLD)], MINE, "instead of"),
    ],
    ids=["nothing", "twice", "unseen", "mixed up", "replaced", "typed and lost"],
)
def test_what_is_wrong_in_the_end_is_seen(text, written, typed, part):
    assert any(part in line for line in seen(text, *written, typed=typed))


def test_an_outage_that_is_told_again_is_seen():
    url, why = "http://127.0.0.1:9", "http://127.0.0.1:9/api/chat cannot be reached: no"
    away = "WARNING " + ia.t("host_unavailable", why=why, url=url, seconds=1)
    back = "INFO " + ia.t("host_back", url=url)
    waiting, answers = "INFO " + ia.t("waiting", why="It"), "INFO " + ia.t("back", time=1)
    assert list(faults.repeated([away, waiting, back, away, answers, waiting])) == []
    assert list(faults.repeated([away, away, waiting, away])) == [away, away]
    assert list(faults.repeated([waiting, back, waiting])) == [waiting]
