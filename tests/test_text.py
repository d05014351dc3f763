"""Pure functions on pictures and texts: what is described, what is sent, what is stored."""

import base64
import io

import pytest
import servers
from PIL import Image

import immich_analyze as ia

JPEG, PNG, WEBP = (servers.picture("red", kind, (64, 48)) for kind in ("JPEG", "PNG", "WEBP"))
MIMES = {"image/jpeg": JPEG, "image/png": PNG, "image/webp": WEBP}


def label(value: object) -> str | None:
    """Bytes are no names for a test."""
    return "" if isinstance(value, bytes) else None


def opened(picture: ia.Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.base64)))


# Which photos


@pytest.mark.parametrize(
    ("description", "policy", "wanted"),
    [
        ("", "none", True),
        (" \n\t\xa0", "none", True),
        (".", "none", False),
        ("by a person", "none", False),
        ("", "all", True),
        ("by a person", "all", True),
    ],
)
def test_only_blank_descriptions_are_wanted_unless_all_are(config, description, policy, wanted):
    asset = ia.Photo("1", "lake.jpg", description, "0")
    assert ia.left_alone(asset, config("-O", policy)) == ("" if wanted else "has_description")


# Previews


@pytest.mark.parametrize(
    ("data", "mime"),
    [
        (JPEG, "image/jpeg"),
        (PNG, "image/png"),
        (WEBP, "image/webp"),
        (servers.picture("red", "GIF"), None),
        (servers.picture("red", "BMP"), None),
        (servers.picture("red", "TIFF"), None),
        (b"RIFF\x24\0\0\0WAVEfmt ", None),
        (b"<html>", None),
        (b"", None),
    ],
    ids=label,
)
def test_the_first_bytes_tell_the_type(data, mime):
    assert ia.picture_type(data)[0] == mime


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (JPEG, True),
        (JPEG + bytes(20), True),
        (JPEG[:-2], False),
        (JPEG[: len(JPEG) // 2], False),
        (PNG, True),
        (PNG[:-8], False),
        (WEBP, True),
        (WEBP + b"\0", True),
        (WEBP[:-1], False),
        (WEBP[:12], False),
    ],
    ids=label,
)
def test_the_last_bytes_tell_whether_it_is_whole(data, whole):
    assert ia.picture_type(data)[1] is whole


@pytest.mark.parametrize("mime", ["image/jpeg", "image/png"])
def test_a_picture_that_servers_read_is_sent_as_it_is(mime):
    picture = ia.prepared(MIMES[mime], 0)
    assert (picture.mime, base64.b64decode(picture.base64)) == (mime, MIMES[mime])


def test_webp_is_sent_as_jpeg_of_the_same_size():
    picture = ia.prepared(WEBP, 0)
    with opened(picture) as image:
        assert (picture.mime, image.format, image.size) == ("image/jpeg", "JPEG", (64, 48))
    assert servers.colour_of(base64.b64decode(picture.base64)) == "red"


@pytest.mark.parametrize("mime", MIMES)
@pytest.mark.parametrize(("most", "size"), [(32, (32, 24)), (64, (64, 48)), (1000, (64, 48))])
def test_a_limit_shrinks_the_longer_side_and_never_enlarges(mime, most, size):
    with opened(ia.prepared(MIMES[mime], most)) as image:
        assert (image.format, image.size) == ("JPEG", size)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "LA"])
def test_a_picture_of_any_mode_can_be_shrunk(mode):
    data = io.BytesIO()
    Image.new(mode, (64, 48)).save(data, "PNG")
    with opened(ia.prepared(data.getvalue(), 32)) as image:
        assert (image.mode, image.size) == ("RGB", (32, 24))


BROKEN_JPEG = JPEG[:4] + bytes(len(JPEG) - 8) + JPEG[-4:]
BROKEN_WEBP = WEBP[:16] + bytes(len(WEBP) - 16)
BROKEN_PNG = PNG[:30] + bytes(len(PNG) - 42) + PNG[-12:]


@pytest.mark.parametrize(
    ("data", "most", "error", "key"),
    [
        (b"", 0, ia.Retryable, "preview_cut"),
        (JPEG[:-2], 0, ia.Retryable, "preview_cut"),
        (PNG[:100], 0, ia.Retryable, "preview_cut"),
        (WEBP[:-1], 0, ia.Retryable, "preview_cut"),
        (b"<html>502</html>", 0, ia.Permanent, "preview_unknown"),
        (bytes(1000), 0, ia.Permanent, "preview_unknown"),
        (servers.picture("red", "GIF"), 0, ia.Permanent, "preview_unknown"),
        (BROKEN_WEBP, 0, ia.Permanent, "preview_broken"),
        (BROKEN_WEBP, 32, ia.Permanent, "preview_broken"),
        (BROKEN_JPEG, 32, ia.Permanent, "preview_broken"),
        (BROKEN_PNG, 32, ia.Permanent, "preview_broken"),
    ],
    ids=label,
)
def test_a_preview_that_cannot_be_sent_says_why(data, most, error, key):
    with pytest.raises(ia.AnalyzeError) as caught:
        ia.prepared(data, most)
    assert (type(caught.value), caught.value.key) == (error, key)


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    with pytest.raises(ia.Permanent, match="cannot be decoded"):
        ia.prepared(WEBP, 0)


@pytest.mark.parametrize("mime", ["image/jpeg", "image/png"])
def test_a_broken_inside_costs_nothing_on_the_usual_path(mime, monkeypatch):
    monkeypatch.setattr(ia.Image, "open", None)
    assert ia.prepared(MIMES[mime], 0).mime == mime


# Answers


@pytest.mark.parametrize(
    "answer",
    [
        "A cat.",
        "<think>Let me see.</think>A cat.",
        "<think>\nLet me see.\n</think>\n\nA cat.",
        "<thinking>Let me see.</thinking>A cat.",
        "<THINK>Let me see.</THINK>A cat.",
        "<think></think>A cat.",
        "Let me see.</think>A cat.",
        "Let me see.\nA dog?\n</think>\n\nA cat.",
        "<think>a <think> tag</think>A cat.",
        "A cat.<think>Was it one?",
        "A cat.<think>Was it one?</think>",
        "<think>Let me see.</think>A cat.<think>Was it one?</think>",
        "<think>Let me see.</think><think>Still.</think>A cat.",
    ],
)
def test_thoughts_are_no_part_of_the_description(answer):
    assert ia.description_in(answer) == "A cat."


LEAD_INS = [
    "Here is a description: ",
    "Here's a detailed description of the image:\n\n",
    "Here’s the description:\n",
    "Sure! Here is the description you asked for:\n\n",
    "Certainly! Below is a detailed description of the image:\n\n",
    "Of course. Here is a concise caption for the photo: ",
    "Okay, here's a description: ",
    "Here is a detailed description of the image for search:\n\n",
    "This is a description of the image: ",
    "**Here is a detailed description of the image:**\n\n",
    "Description: ",
    "**Description:** ",
    "**Description**: ",
    "## Description:\n",
    "Image description: ",
    "The image description: ",
    "Photo description:\n",
    "Full description: ",
    "Caption: ",
    "Вот описание изображения: ",
    "Вот подробное описание изображения:\n\n",
    "Конечно! Вот описание: ",
    "Хорошо, вот детальное описание фотографии:\n",
    "Ниже приведено подробное описание изображения:\n\n",
    "Описание: ",
    "**Описание:** ",
    "Описание изображения: ",
    "Описание фотографии:\n",
]


@pytest.mark.parametrize("lead_in", LEAD_INS)
def test_a_lead_in_is_removed(lead_in):
    assert ia.description_in(f"{lead_in}Кот A sits on a mat.") == "Кот A sits on a mat."


@pytest.mark.parametrize(
    "text",
    [
        "Here is a cat on a mat: it sleeps.",
        "This is a photo of a cat: black and white.",
        "This image shows a cat.",
        "This is the description panel of a museum: text in two columns.",
        "Here is a caption written on a wall: HELLO.",
        "Here is the summary of a book. On its cover: a cat.",
        "The description on the box says: fragile.",
        "A sign that reads: Description: closed.",
        "Description of goods on a label: apples.",
        "Sure-footed goats climb a cliff.",
        "Okay Street, a sign says: no parking.",
        "A caption: HELLO, printed on a shirt.",
        "Вот кошка на окне: она спит.",
        "Описание блюда на стене: борщ.",
        "Вот вывеска с описанием: открыто.",
        "Хорошо освещённая комната: стол и стул.",
    ],
)
def test_a_sentence_that_looks_like_a_lead_in_is_kept(text):
    assert ia.description_in(text) == text


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('"A cat."', "A cat."),
        ("“A cat.”", "A cat."),
        ("«Кот.»", "Кот."),
        ('Description: "A cat."', "A cat."),
        ('"Stop" and "Go" on signs, one "old"', '"Stop" and "Go" on signs, one "old"'),
        ('A sign: "Stop"', 'A sign: "Stop"'),
        ("“Stop” on a sign and “Go”", "“Stop” on a sign and “Go”"),
        ("  A cat.\n\n", "A cat."),
        ("\ufeffA cat.", "A cat."),
        ("A cat.\n\n\n\n\nA mat.", "A cat.\n\nA mat."),
        ("A cat.\r\nA mat.", "A cat.\nA mat."),
        ("A cat.\rA mat.", "A cat.\nA mat."),
        ("A cat\ton a mat.", "A cat\ton a mat."),
        ("A \0c\x07a\x1bt\x7f.\x85", "A cat."),
        ("A cat\ud83d.", "A cat."),
        ("\udc00A cat.", "A cat."),
        ("A cat\ufffe\uffff.", "A cat."),
        ("A cat 😀 👩\u200d👧 ☕\ufe0f.", "A cat 😀 👩\u200d👧 ☕\ufe0f."),
        ("A sign: \u202bשלום\u202c, \u2067مرحبا\u2069.",) * 2,
        ("한국어, 日本, ελληνικά, e\u0301",) * 2,
        ("12 apples, 1.50 each", "12 apples, 1.50 each"),
        ("<b>Bold</b> & 'quoted'; a < b", "<b>Bold</b> & 'quoted'; a < b"),
    ],
)
def test_what_is_stored_is_clean(answer, text):
    assert ia.description_in(answer) == text


def test_cleaning_twice_changes_nothing():
    for lead_in in LEAD_INS:
        once = ia.clean(f"<think>so</think>{lead_in}“A cat.”\r\n\r\n\r\nA mat.")
        assert ia.clean(once) == once


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        ["A cat."],
        {"text": "A cat."},
        "",
        " \n\t ",
        "\0\x07",
        "\ud83d",
        '""',
        "...",
        "🐈",
        "12345",
        "1.50",
        "<think>A cat.",
        "<think>A cat.</think>",
        "A cat.</think>",
        "Description:",
        "Here is a description: ",
        "Описание:",
        "<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>",
        "<html>\r\n<head><title>504 Gateway Time-out</title></head></html>",
    ],
)
def test_an_answer_without_a_description_is_another_try(answer):
    with pytest.raises(ia.Retryable) as caught:
        ia.description_in(answer)
    assert (type(caught.value), caught.value.key) == (ia.Retryable, "answer_empty")


LONG = (
    "A sunlit kitchen with pale wooden cupboards and a stone worktop. On the left a kettle "
    "steams beside two blue mugs; a loaf of bread lies on a board, half of it cut into slices. "
    "Through the window behind the sink a garden with apple trees can be seen, and a bicycle "
    "leans on the fence. A tabby cat sleeps on the sill between pots of basil and thyme. "
    "Format: indoor photo."
)


@pytest.mark.parametrize(
    "answer",
    ["A cat. " * 40, "кот " * 100, "a" * 1000, "The\n\n" * 60, f"Start of it. {'and so on ' * 80}"],
)
def test_an_answer_that_repeats_itself_is_another_try(answer):
    with pytest.raises(ia.Retryable) as caught:
        ia.description_in(answer)
    assert (type(caught.value), caught.value.key) == (ia.Retryable, "answer_repeats")


@pytest.mark.parametrize("answer", [LONG, LONG + "\n\n" + LONG, "A cat. A cat. A cat."])
def test_an_answer_that_hardly_repeats_itself_is_kept(answer):
    assert ia.description_in(answer) == answer


# JSON and addresses


@pytest.mark.parametrize(
    ("data", "path", "value"),
    [
        ({"a": [{"b": 1}]}, ("a", 0, "b"), 1),
        ({"a": [{"b": None}]}, ("a", 0, "b"), None),
        ({"a": []}, ("a", 0, "b"), None),
        ({"a": {"0": 1}}, ("a", 0), None),
        ({"a": "text"}, ("a", "b"), None),
        ({"a": "text"}, ("a", 0), None),
        ({"a": None}, ("a", "b", "c"), None),
        ([1, 2], (1,), 2),
        ([1, 2], (2,), None),
        ([1, 2], ("a",), None),
        (None, ("a",), None),
        ({"a": 1}, (), {"a": 1}),
    ],
)
def test_digging_leads_to_a_value_or_none(data, path, value):
    assert ia.dig(data, *path) == value


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:11434", "http://host:11434"),
        ("https://user:secret@host/sub/api", "https://host/sub/api"),
        ("http://user:se@cret@host", "http://host"),
        ("http://host/path?key=secret#secret", "http://host/path"),
        ("http://u:secret@[::1]:80/x", "http://[::1]:80/x"),
        ("//user:secret@host/x", "//host/x"),
        ("/login?token=secret", "/login"),
        ("http://u:secret@[::1", ""),
        ("", ""),
    ],
)
def test_a_shown_address_has_no_user_password_or_query(url, shown):
    assert ia.public(url) == shown
