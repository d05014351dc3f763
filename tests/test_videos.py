"""Videos, from the listing to the description."""

import base64
import io
import itertools
import re
import sys

import films
import pytest
import sandbox
import servers
from facts import Album
from PIL import Image
from servers import Reply
from worlds import (
    CHATS,
    NO_PAUSE,
    PROMPT,
    ApiWorld,
    asking,
    check_note,
    failure_notes,
    others_long,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow

FOUR = list(films.FOUR)
STILL = servers.picture("gray")
PLAYBACK = ("GET", "/video/playback")
HUMAN = "Our first day at the sea"


def add_video(library, name="clip.mp4", **more):
    """A video of four colours, whose preview is gray."""
    return library.add(name, **{"type": "VIDEO", "film": films.film(), "picture": STILL} | more)


def colours(pictures):
    return [servers.colour_of(picture) for picture in pictures]


def rows(picture):
    """The colours of four pictures that are one, row by row."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    width, height = image.width // 2, image.height // 2
    parts = []
    for top in (0, height):
        for left in (0, width):
            target = io.BytesIO()
            image.crop((left, top, left + width, top + height)).save(target, "PNG")
            parts.append(target.getvalue())
    return colours(parts)


def played(library):
    """The requests for parts of videos; none in a database."""
    return library.server.find(*PLAYBACK) if isinstance(library, ApiWorld) else []


# --- Which videos ----------------------------------------------------------------------------


@pytest.fixture
def run(command, ollama):
    """Runs the tool about a library; it must have nothing to complain about."""

    def run(library, *argv, **environ):
        done = command(*library.argv, *asking(ollama), *argv, **environ)
        assert done.returncode == 0
        if "--undo" not in argv:  # which says how many
            assert done.stderr.removeprefix(ia.t("no_lock") + "\n") == ""
        return done

    return run


def test_a_video_is_described_from_frames_in_their_order(library, run, ollama):
    id = add_video(library)
    run(library, "--videos")
    [shown], [(_, asked)] = ollama.shown, ollama.asked
    assert colours(shown) == FOUR
    assert asked.startswith(PROMPT)
    assert "4 moments of one video of 8 seconds, in order" in asked
    assert library.texts() == {id: servers.told(shown[0])}


def test_without_the_option_videos_are_left_alone(library, run, ollama):
    video, photo = add_video(library), library.add(picture=servers.picture("red"))
    for argv in ([], ["--videos", "false"], ["--videos=False"]):
        run(library, *argv, "-O", "all")
        assert library.texts()[video] == ""
        assert library.texts()[photo]
    assert {len(shown) for shown in ollama.shown} == {1}
    assert played(library) == []


def test_videos_can_be_all_that_is_described(library, run, ollama):
    video, photo = add_video(library), library.add(picture=servers.picture("red"))
    run(library, "--videos", "only")
    assert library.texts()[video]
    assert library.texts()[photo] == ""


@pytest.mark.parametrize("way", ["variable", "file", "variable only", "file only"])
def test_the_option_can_stand_in_a_file_or_a_variable(api, run, tmp_path, way):
    video, photo = add_video(api), api.add(picture=servers.picture("red"))
    value = "only" if "only" in way else "true"
    (tmp_path / "settings").write_text(f"videos = {value}\nvideo-frames = 2\n")
    if "file" in way:
        run(api, "--config", str(tmp_path / "settings"))
    else:
        run(api, IMMICH_ANALYZE_VIDEOS=value, IMMICH_ANALYZE_VIDEO_FRAMES="2")
    assert api.texts()[video]
    assert bool(api.texts()[photo]) == (value == "true")


def test_every_release_tells_videos_that_people_can_find(any_library, run, ollama):
    found = {add_video(any_library, visibility=where) for where in ("timeline", "archive")}
    found.add(any_library.add(picture=servers.picture("red")))
    add_video(any_library, "moving part of a photo.mp4", visibility="hidden")
    add_video(any_library, trashed=True)
    run(any_library, "--videos")
    assert {id for id, text in any_library.texts().items() if text} == found
    assert sorted(len(shown) for shown in ollama.shown) == [1, 4, 4]


@pytest.mark.parametrize("policy", ["none", "missing-ai", "outdated", "all"])
def test_policies_hold_for_videos(library, run, policy):
    human, new = add_video(library, description=HUMAN), add_video(library)
    run(library, "--videos", "-O", policy, *(["--preserve-human"] if policy == "all" else []))
    text = library.texts()[human]
    assert library.texts()[new]
    assert (text == HUMAN) == (policy in ("none", "outdated"))
    assert text.startswith(HUMAN) or policy == "all"


def test_a_persons_text_about_a_video_is_kept(library, run):
    id = add_video(library, description=HUMAN)
    run(library, "--videos", "-O", "all", "--preserve-human")
    text = library.texts()[id]
    assert text.startswith(HUMAN)
    assert len(text) > len(HUMAN)


@pytest.mark.parametrize(
    "any_library", [("api", "3.1.0"), ("database", sandbox.NEWEST)], indirect=True
)
def test_filters_hold_for_videos(any_library, run):
    library = any_library
    album = Album("Summer")
    more = {"albums": [album], "favorite": True, "taken": "2020-05-05T12:00:00"}
    wanted = add_video(library, **more)
    others = [
        add_video(library, **more | {key: no})
        for key, no in (("albums", []), ("favorite", False), ("taken", "2010-05-05T12:00:00"))
    ]
    filters = ["--favorites", "--taken-after", "2020-01-01", "--taken-before", "2020-12-31"]
    run(library, "--videos", *filters, "--album", "Summer")
    assert {id for id, text in library.texts().items() if text} == {wanted}
    run(library, "--videos", "--photo", others[0])
    assert {id for id, text in library.texts().items() if text} == {wanted, others[0]}


def test_a_description_of_a_video_is_noted_and_can_be_taken_back(library, run):
    video, photo = add_video(library), library.add(picture=servers.picture("red"))
    human = add_video(library, description=HUMAN)
    run(library, "--videos")
    check_note(library.notes()[video], library.texts()[video])
    run(library, "--undo")
    assert library.texts() == {video: "", photo: "", human: HUMAN}
    assert library.notes() == {video: {}, photo: {}, human: {}}


def test_undo_can_be_for_videos_alone_and_needs_no_decoder(library, run, monkeypatch):
    video, photo = add_video(library), library.add(picture=servers.picture("red"))
    run(library, "--videos")
    monkeypatch.setattr(ia, "find_spec", lambda name: None)
    run(library, "--undo", "--videos", "only")
    assert library.texts()[video] == ""
    assert library.texts()[photo]


def test_a_video_fails_alone(library, ollama, command):
    video, photo = add_video(library), library.add(picture=servers.picture("yellow"))
    ollama.answer = lambda picture, _: (
        "" if servers.colour_of(picture) == "red" else servers.told(picture)
    )
    done = command(*library.argv, *asking(ollama), *NO_PAUSE, "--videos")
    assert done.returncode == 1
    assert library.texts() == {video: "", photo: servers.told(servers.picture("yellow"))}
    assert failure_notes(library).keys() == {video}


@pytest.mark.measured
def test_a_dry_run_and_its_report_show_what_a_video_would_get(library, run, tmp_path):
    id = add_video(library)
    done = run(library, "--videos", "--dry-run", "--report", str(tmp_path / "page.html"))
    assert library.texts()[id] == ""
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "yellow" not in done.stdout
    assert "red tones" in done.stdout
    [picture] = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert rows(base64.b64decode(picture)) == FOUR
    assert "4 moments of one video of 8 seconds" in page


def test_the_prompt_of_a_video_says_what_its_frames_are(library, run):
    video, photo = add_video(library), library.add(picture=servers.picture("red"))
    asked = run(library, "--videos", "--show-prompt", video).stdout
    assert asked.startswith(PROMPT)
    assert "4 moments of one video, in order" in asked
    assert run(library, "--videos", "--show-prompt", photo).stdout.strip() == PROMPT
    one = ["--videos", "--video-frames", "1"]
    assert run(library, *one, "--show-prompt", video).stdout.strip() == PROMPT


# --- Its frames ------------------------------------------------------------------------------


@pytest.mark.measured
def test_the_preview_alone_needs_no_decoder_and_no_playback(
    library, run, ollama, command, monkeypatch
):
    id = add_video(library)
    monkeypatch.setattr(ia, "find_spec", lambda name: None)
    for argv in (["--videos"], ["--videos", "only", "--video-frames", "2"]):
        done = command(*library.argv, *asking(ollama), *argv)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "immich-analyze[video]" in done.stderr
    monkeypatch.setitem(sys.modules, "av", None)
    run(library, "--videos", "--video-frames", "1")
    assert (ollama.shown, played(library)) == ([[STILL]], [])
    assert ollama.asked[0][1] == PROMPT
    assert library.texts() == {id: servers.told(STILL)}


@pytest.mark.parametrize("number", [2, 3, 9])
def test_as_many_frames_are_shown_as_are_asked_for(library, run, ollama, number):
    add_video(library, film=films.film(*list(servers.COLOURS)[:9], seconds=20.0))
    run(library, "--videos", "--video-frames", str(number))
    [shown] = ollama.shown
    assert len(set(colours(shown))) == len(shown) == number


def test_the_first_and_the_last_second_are_left_out(api, run, ollama):
    add_video(api, film=films.film("purple", *FOUR, *FOUR, "pink", seconds=10.0))
    run(api, "--videos", "--video-frames", "8")
    assert {"purple", "pink"}.isdisjoint(colours(ollama.shown[0]))


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.9])
def test_a_short_video_is_shown_as_a_whole(api, run, ollama, seconds):
    add_video(api, film=films.film(seconds=seconds), seconds=seconds)
    run(api, "--videos")
    assert colours(ollama.shown[0]) == FOUR
    assert f"of one video of {max(1, round(seconds))} second" in ollama.asked[0][1]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (("red",), ["red"]),
        (("red", "red", "blue", "blue"), ["red", "blue"]),
        (("black", "red") * 4, ["red"]),
        (("black", "black", "black", "blue"), ["blue"]),
        (
            ("black", "red", "black", "green", "black", "blue", "black", "pink"),
            "red green blue pink",
        ),
    ],
    ids=str,
)
def test_frames_that_show_nothing_new_are_left_out(api, run, ollama, shown, expected):
    add_video(api, film=films.film(*shown, seconds=16.0, options=(("g", "5"),)))
    run(api, "--videos")
    expected = expected.split() if isinstance(expected, str) else expected
    assert colours(ollama.shown[0]) == expected
    sentence = f"{len(expected)} moments of one video"
    assert (sentence in ollama.asked[0][1]) == (len(expected) > 1)


@pytest.mark.parametrize(
    ("most", "size"), [([], (1024, 768)), (["--max-image-size", "400"], (400, 300))], ids=str
)
def test_a_frame_is_no_larger_than_it_should_be(api, run, ollama, most, size):
    film = films.film(size=(2048, 1536), times=tuple(range(0, 80, 8)))
    add_video(api, film=film)
    run(api, "--videos", *most)
    assert {Image.open(io.BytesIO(picture)).size for picture in ollama.shown[0]} == {size}


# --- Hosts that take one picture only --------------------------------------------------------

NESTED = {"error": {"code": 400, "message": "Only one image is supported", "type": "invalid"}}
REFUSALS = {
    "ollama": Reply(500, {"error": "this model only supports a single image per message"}),
    "vllm": Reply(
        400,
        {
            "object": "error",
            "message": "At most 1 image(s) may be provided in one request.",
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    "context": servers.recorded("llamacpp", "chat_context_exceeded"),
    "other": Reply(400, NESTED),
    "large": Reply(413, {"error": "too many images"}),
    "multi": Reply(400, {"error": {"message": "Multi-image input is not supported by this model"}}),
    "multiple": Reply(500, {"error": "multiple image input is not supported"}),
    "key": Reply(403, {"error": {"message": "Several images need another plan"}}),
    "router": Reply(404, {"error": {"message": "No endpoints that support multiple images"}}),
    "many": Reply(429, {"error": {"message": "too many images"}}),
    "proxy": Reply(503, {"error": {"message": "only one image at a time"}}),
    "mode": Reply(400, {"error": {"message": "model tiny does not exist in multi-image mode"}}),
    "dies": servers.RESET,
}


def number_of_pictures(chat):
    """How many pictures a model is asked about."""
    message = chat.json["messages"][0]
    return len(message.get("images") or [p for p in message["content"] if "image_url" in p])


def take_one_picture(model, refusal, times=None):
    """Have a host refuse more pictures than one at a time."""
    refuse = [lambda chat: refusal if number_of_pictures(chat) > 1 else None]
    model.script(*CHATS, *refuse * (times or 1), forever=times is None)


@pytest.fixture(params=["ollama", "llamacpp"])
def model(request):
    """A host of each interface."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("model", "refusal"),
    others_long(
        [(one, refusal) for one in ("ollama", "llamacpp") for refusal in REFUSALS],
        *zip(itertools.cycle(("llamacpp", "ollama")), REFUSALS, strict=False),
    ),
    indirect=["model"],
)
def test_a_host_that_takes_one_picture_gets_one_sheet(api, model, command, refusal):
    ids = [add_video(api, f"{n}.mp4") for n in range(2)]
    photo = api.add(picture=servers.picture("pink"))
    take_one_picture(model, REFUSALS[refusal])
    argv = [*api.argv, *asking(model), "--videos", "--max-concurrent", "1"]
    done = command(*argv)
    assert done.returncode == 0
    assert done.stderr.count("\n") <= 1
    chats = [number_of_pictures(chat) for chat in model.find(*CHATS)]
    assert sorted(chats) == [1, 1, 1, 4]  # no plain picture among them
    sheets = [rows(picture) for [picture] in model.shown if picture != servers.picture("pink")]
    assert sheets == [FOUR] * 2
    assert all("it shows them row by row" in asked for _, asked in model.asked if "video" in asked)
    assert api.texts()[photo] == servers.told(servers.picture("pink"))
    assert all(api.texts()[id] for id in ids)


def test_a_sheet_is_no_larger_than_one_picture_may_be(api, ollama, run):
    add_video(api, film=films.film("red", "green", "blue", size=(800, 600)))
    take_one_picture(ollama, REFUSALS["ollama"])
    run(api, "--videos", "--max-image-size", "500", "--video-frames", "3")
    [[sheet]] = ollama.shown
    assert Image.open(io.BytesIO(sheet)).size == (500, 376)
    assert rows(sheet) == ["red", "green", "blue", "black"]


@pytest.mark.parametrize("failures", [2, 4])
def test_a_failure_that_passes_does_not_end_in_sheets(api, ollama, command, failures):
    film = films.film("green", "blue", "pink", "yellow")
    first, second = add_video(api), add_video(api, film=film)
    ollama.script(*CHATS, *[Reply(500, {"error": "CUDA error: out of memory"})] * failures)
    argv = [*api.argv, *asking(ollama), *NO_PAUSE, "--videos", "--max-concurrent", "1"]
    done = command(*argv)
    assert done.returncode == 0
    assert api.texts()[first]
    assert api.texts()[second]
    about = [len(shown) for shown in ollama.shown if set(colours(shown)) != {"gray"}]
    assert about == [4, 4]


@pytest.mark.measured
def test_a_sheet_that_lacks_context_gets_more_of_it(api, ollama, run):
    add_video(api)
    lacking = servers.recorded("ollama", "chat_prompt_exceeds_ctx")
    ollama.script(
        *CHATS, lambda chat: None if "num_ctx" in chat.json["options"] else lacking, forever=True
    )
    run(api, "--videos")
    chats = [(number_of_pictures(c), "num_ctx" in c.json["options"]) for c in ollama.find(*CHATS)]
    assert chats == [(4, False), (1, False), (1, True)]


def test_a_real_model_is_shown_the_frames(library, real_llamacpp, command):
    film = films.film("red", "red")
    id = add_video(library, film=film)
    done = command(*library.argv, *asking(real_llamacpp), "--videos")
    assert (done.returncode, done.stderr) == (0, "")
    assert library.texts() == {id: sandbox.answer("red")}
