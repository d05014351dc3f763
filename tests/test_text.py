"""Pure functions on pictures and texts: what is described, what is sent, what is stored."""

import base64
import io
import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import servers
from PIL import ExifTags, Image, ImageFile
from worlds import others_long

import immich_analyze as ia

JPEG, PNG, WEBP = (servers.picture("red", kind, (128, 96)) for kind in ("JPEG", "PNG", "WEBP"))
KINDS = {"JPEG": JPEG, "PNG": PNG, "WebP": WEBP}


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
    ("data", "kind"),
    [
        (JPEG, "JPEG"),
        (PNG, "PNG"),
        (WEBP, "WebP"),
        (servers.picture("red", "GIF"), ""),
        (servers.picture("red", "BMP"), ""),
        (servers.picture("red", "TIFF"), ""),
        (b"RIFF\x24\0\0\0WAVEfmt ", ""),
        (b"<html>", ""),
        (b"", ""),
    ],
    ids=label,
)
def test_the_first_bytes_tell_the_kind(data, kind):
    assert ia.picture_type(data)[0] == kind


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


@pytest.mark.parametrize("kind", ["PNG", "WebP"])
def test_what_is_no_jpeg_is_sent_as_one_of_the_same_size(kind):
    picture = ia.prepared(KINDS[kind], 0)
    with opened(picture) as image:
        assert (image.format, image.size) == ("JPEG", (128, 96))
    assert servers.colour_of(base64.b64decode(picture.base64)) == "red"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("most", "size"), [(80, (80, 60)), (128, (128, 96)), (1000, (128, 96))])
def test_a_limit_shrinks_the_longer_side_and_never_enlarges(kind, most, size):
    picture = ia.prepared(KINDS[kind], most)
    with opened(picture) as image:
        assert image.size == picture.size == size


@pytest.mark.parametrize("most", [0, 128])
def test_a_jpeg_within_the_limit_is_sent_as_it_is(most):
    assert base64.b64decode(ia.prepared(JPEG, most).base64) == JPEG


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "LA"])
def test_a_picture_of_any_mode_can_be_shrunk(mode):
    with opened(ia.prepared(encoded(Image.new(mode, (128, 96)), "PNG"), 80)) as image:
        assert (image.mode, image.size) == ("RGB", (80, 60))


# Transparency


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def drawn(colour: tuple[int, ...], mode: str = "RGBA") -> Image.Image:
    """A square in the middle of nothing, whose hidden colour is that of the square."""
    image = Image.new("RGBA", (120, 100), (*colour, 0))
    image.paste((*colour, 255), (40, 30, 80, 70))
    return image.convert(mode)


def palette(colour: tuple[int, ...]) -> bytes:
    """The same with a palette, and its transparency in bytes."""
    image = Image.new("P", (120, 100), 0)
    image.putpalette([*colour, *colour, 9, 9, 9])
    image.paste(1, (40, 30, 80, 70))
    return encoded(image, "PNG", transparency=bytes([0, 255, 128]))


def key_colour(mode: str, ground: object, colour: object) -> bytes:
    """The same in a mode that calls one colour transparent."""
    image = Image.new(mode, (120, 100), ground)
    image.paste(colour, (40, 30, 80, 70))
    return encoded(image, "PNG", transparency=ground)


BLACK, WHITE, NAVY, CREAM = (0, 0, 0), (255, 255, 255), (20, 20, 90), (250, 245, 220)
TRANSPARENT = {
    **{
        f"{kind} {colour}": (encoded(drawn(colour), kind, **options), colour)
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}))
        for colour in (BLACK, WHITE, NAVY, CREAM)
    },
    "grey and alpha": (encoded(drawn(BLACK, "LA"), "PNG"), BLACK),
    "palette, dark": (palette(BLACK), BLACK),
    "palette, light": (palette(WHITE), WHITE),
    "key colour": (key_colour("RGB", (255, 0, 255), BLACK), BLACK),
    "key grey": (key_colour("L", 7, 255), WHITE),
}


@pytest.mark.parametrize("most", [0, 60])
@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_drawn_on_nothing_can_be_seen(name, most, capfd):
    data, colour = TRANSPARENT[name]
    with warnings.catch_warnings(), opened(ia.prepared(data, most)) as image:
        warnings.simplefilter("error")
        width, height = image.size
        corner, middle = image.getpixel((2, 2)), image.getpixel((width // 2, height // 2))
    assert max(abs(a - b) for a, b in zip(middle, colour, strict=True)) < 40
    assert abs(sum(corner) - sum(middle)) > 300
    assert capfd.readouterr().err == ""


def test_what_cannot_be_seen_at_all_is_sent_all_the_same():
    with opened(ia.prepared(encoded(Image.new("RGBA", (80, 60)), "PNG"), 0)) as image:
        assert image.getpixel((40, 30)) == WHITE


# Sizes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("size", "most", "sent"),
    [
        ((1, 1), 0, (56, 56)),
        ((20, 30), 0, (56, 56)),
        ((55, 100), 0, (56, 100)),
        ((56, 56), 0, (56, 56)),
        ((300, 20), 0, (300, 56)),
        ((20, 300), 0, (56, 300)),
        ((2000, 100), 500, (500, 56)),
        ((100, 2000), 500, (56, 500)),
        ((2000, 2), 1000, (1000, 56)),
        ((200, 100), 100, (100, 56)),
        ((200, 200), 20, (56, 56)),
    ],
)
def test_no_side_of_what_is_sent_is_too_short_for_a_server(kind, size, most, sent):
    picture = ia.prepared(servers.picture("red", kind, size), most)
    with opened(picture) as image:
        assert image.size == picture.size == sent
    assert servers.colour_of(base64.b64decode(picture.base64)) == "red"


def test_what_was_too_narrow_is_in_the_middle():
    image = Image.new("RGB", (300, 20), "white")
    image.paste("black", (0, 0, 150, 20))
    with opened(ia.prepared(encoded(image, "PNG"), 0)) as sent:
        row = [sent.convert("L").getpixel((x, 28)) for x in (5, 140, 160, 295)]
        column = {sent.convert("L").getpixel((5, y)) // 32 for y in (2, 53)}
    assert [value // 128 for value in row] == [0, 0, 1, 1]
    assert column == {3}  # the mean of both


@pytest.mark.parametrize(
    ("kind", "mode", "most", "size"),
    [
        ("PNG", "P", 512, (512, 256)),
        ("JPEG", "L", 0, (4096, 2048)),
    ],
)
@pytest.mark.slow
def test_a_picture_of_200_million_pixels_is_shrunk(kind, mode, most, size):
    picture = ia.prepared(encoded(Image.new(mode, (20000, 10000), 1), kind), most)
    assert picture.size == size


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
        (BROKEN_JPEG, 0, ia.Permanent, "preview_broken"),
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
    monkeypatch.setattr(ia, "MOST_PIXELS", 128 * 96 - 1)
    with pytest.raises(ia.Permanent, match="cannot be decoded"):
        ia.prepared(WEBP, 0)


@pytest.mark.parametrize("most", [0, 200])
def test_nothing_but_the_header_is_read_on_the_usual_path(most, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert ia.prepared(JPEG, most).size == (128, 96)


# Answers

CASES = json.loads(Path(__file__).with_name("answers.json").read_text(encoding="utf-8"))


def test_every_pattern_is_used_by_the_module_or_in_another():
    module = Path(ia.__file__)
    text = module.with_name("i18n").joinpath("patterns.toml").read_text(encoding="utf-8")
    used = re.findall(r"\{([a-z_]+)\}", text)
    used += re.findall(r'"([a-z_]+)"', module.read_text(encoding="utf-8"))
    used += ia.toml("patterns.toml")["places"]
    assert set(ia.patterns()) - set(used) == set()


def outcome(answer: str) -> str | None:
    """What is stored, or None, with the reason as a key after a dash."""
    try:
        return ia.description_in(answer)
    except ia.Retryable as error:
        return f"- {error.key}"


@pytest.mark.parametrize("kind", sorted({case["case"] for case in CASES}))
def test_what_models_say_becomes_a_description_or_a_failed_try(kind):
    cases = [case for case in CASES if case["case"] == kind]
    found = {case["said"]: outcome(case["said"]) for case in cases}
    assert found == {case["said"]: case["stored"] or f"- {case['why']}" for case in cases}


@pytest.mark.parametrize("kind", ["control", "cleaned"])
def test_a_description_as_stored_stays_as_it_is(kind):
    stored = [case["stored"] for case in CASES if case["case"] == kind]
    assert [outcome(text) for text in stored] == stored


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
    "**Here is a detailed description of the image**: ",
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
    "Image Description:",
    "**Image Description:**\n\n",
    "**Description:**\n\n",
    "Here is the description: ",
    "Alright, here is a description of the image, focusing on details:\n\n---\n\n",
    "Sure, I can help you with that! Here is the description:\n\n",
    "Hier ist eine detaillierte Beschreibung des Bildes:\n\n",
    "## Description\n\n",
    "### Description:\n",
    "# Image Description\n",
    "**Description**\n\n",
    "Description\n\n",
    "**Detailed Image Description:**\n",
    "Absolutely! Here's a comprehensive, search-friendly description of the image:\n\n",
    "Here is a detailed description optimized for image search:\n\n",
    "Here's a description of the image you provided:\n\n",
    "Okay, here's a breakdown and description of the image:\n\n",
    "Based on the image provided, here is a detailed description:\n\n",
    "Certainly. The following is a detailed description of the photo:\n",
    "Here is a detailed description of the image in English:\n\n",
    "Hier ist die Beschreibung: ",
    "Natürlich! Hier ist eine ausführliche Beschreibung des Fotos:\n\n",
    "Gerne, hier ist eine Bildbeschreibung:\n\n",
    "Beschreibung: ",
    "**Bildbeschreibung:**\n\n",
    "Beschreibung des Bildes:\n",
    "Detaillierte Beschreibung: ",
    "Voici une description détaillée de l'image :\n\n",
    "Bien sûr ! Voici la description de l'image :\n\n",
    "Description de l'image :\n",
    "Description détaillée : ",
    "Voici la description : ",
    "Aquí tienes una descripción detallada de la imagen:\n\n",
    "¡Claro! Aquí está la descripción de la imagen:\n\n",
    "Descripción: ",
    "Descripción de la imagen:\n\n",
    "Por supuesto, aquí tienes una descripción detallada:\n\n",
    "A continuación, una descripción detallada de la imagen:\n\n",
    "Ecco una descrizione dettagliata dell'immagine:\n\n",
    "Descrizione: ",
    "Aqui está uma descrição detalhada da imagem:\n\n",
    "Descrição da imagem: ",
    "Конечно! Вот описание изображения:\n\n",
    "Вот описание: ",
    "Описание изображения:\n\n",
    "**Описание:**\n\n",
    "Подробное описание изображения:\n\n",
    "Хорошо, вот подробное описание изображения для поиска:\n\n",
    "Конечно, вот детальное описание фотографии на русском языке:\n\n",
    "## Описание\n\n",
    "Oto szczegółowy opis obrazu:\n\n",
    "Hier is een gedetailleerde beschrijving van de afbeelding:\n\n",
    "以下是对图片的详细描述：\n\n",
    "好的，以下是图片的描述：\n",
    "描述：",
    "图片描述：",
    "以下は画像の説明です：\n",
    "Sure! ",
    "Certainly! ",
    "Here you go:\n\n",
    "Sure, here you go:\n\n",
    "Alt text: ",
    "Here is the alt text for the image:\n\n",
    "> **Description:** ",
    "*Description:* ",
    "__Description:__ ",
    "***\n\n",
    "---\n\n",
    "Here is a description of the photo.\n\n",
    "Let me describe the image for you:\n\n",
    "Answer: ",
    "Final answer: ",
]


INTRODUCED = [
    "Кот A sits on a mat.",
    "A red barn in snow. Format: Photo",
    "**Overall:** A barn.\n\n**Format:** Photo",
    "* **Subject:** A barn\n* **Setting:** Snow",
    "- Barn\n- Snow",
    "_The Barn_ hangs on a wall.",
    "__init__.py is open on a screen.",
    "**A red barn** stands in snow.",
    "“Stop” on a sign and “Go”",
]


@pytest.mark.parametrize("lead_in", LEAD_INS)
def test_a_lead_in_is_removed_and_what_follows_keeps_its_marks(lead_in):
    assert {text: outcome(lead_in + text) for text in INTRODUCED} == {t: t for t in INTRODUCED}


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
        ("<b>Bold</b> & 'quoted'; a < b", "Bold & 'quoted'; a < b"),
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


WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
INNOCENT = {
    "a text": LONG,
    "a text twice": LONG + "\n\n" + LONG,
    "a menu": "A menu:\n- fish\n- meat\n- fish\n- meat",
    "ten bullets alike": "- A blue car\n" * 10,
    "ten bullets with a number": "\n".join(f"- A car with the number {n} on it" for n in range(10)),
    "a table": "| day | open |\n|---|---|\n" + "\n".join(f"| {day} | yes |" for day in WEEK * 2),
    "a table of numbers": "\n".join(f"| {n} | {n * n} | {n % 7} |" for n in range(100)),
    "a numbered table": "\n".join(f"| {n} | seat {n} | free |" for n in range(1, 31)),
    "a calendar": " ".join(map(str, range(1, 32))),
    "rules": "A form\n" + "-" * 120 + "\n" + "_" * 90 + "\n" + "." * 200 + " 7\n" + "| " * 90,
    "a poem": "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily,\n" * 4,
    "a refrain": "Na na na na na na na na na na na na, hey Jude.",
    "a long train": "A very, very, very long train.",
    "a cry": "A comic: Aaaaaaaaaaaaaaargh! Brrrrrrrrrr! Hahahahahaha!",
    "short lines": "Barn\nSnow\nDog\nFence\nTree\nHill\nPath\nDoor\nHouse\nSmoke\n" * 3,
    "zeros": "A display with 0 0 0 0 0 0 0 0 0 0 and 00000000000000000000000000000000.",
    "Russian": "\n".join(f"{n}. Красный автомобиль на стоянке у дома" for n in range(1, 13)),
    "Chinese": "图片中有一只猫坐在窗台上，窗外是雪景。" * 4 + "一辆红色的汽车。" * 8,
    "Japanese": "写真には赤い納屋があり、雪が積もっています。" * 4,
}
LOOPS = {
    "a letter": "G" * 60,
    "a letter of Chinese": "好" * 60,
    "a syllable": "ha" * 60,
    "a word": "very " * 30,
    "a word with commas": "very, " * 30,
    "a line": "- A blue car\n" * 25,
    "a sentence": "The sky is grey. " * 20,
    "a sentence of Russian": "Небо серое. " * 25,
    "a sentence of Chinese": "天空是灰色的。" * 25,
    "two sentences": "The sky is grey. The barn is red, and a dog sits before it. " * 12,
    "a paragraph": (LONG + "\n\n") * 8,
    "counting": ", ".join(f"barn {n}" for n in range(1, 90)),
    "counting in lines": "\n".join(f"- barn {n}" for n in range(1, 90)),
    "counting in Russian": ", ".join(f"дом {n}" for n in range(1, 90)),
    "counting with words": " ".join(f"Person {n} is a man in a suit." for n in range(60)),
}


@pytest.mark.parametrize("name", INNOCENT)
def test_no_part_of_an_innocent_text_repeats_itself(name):
    text = INNOCENT[name]
    assert [n for n in range(len(text) + 1) if ia.repeats(text[:n])] == []
    assert not ia.repeats(LONG + "\n" + text)


@pytest.mark.parametrize("before", ["", LONG, LONG * 2 + " Кот. "])
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_known_while_it_is_said_and_afterwards(name, before):
    assert ia.repeats(before + LOOPS[name])
    assert ia.repeats(before + LOOPS[name] + " red barn. " + LONG)
    assert not ia.repeats(before + LOOPS[name][:40])


PIECES = [
    *("<think>", "</think>", "<", "<|", "◁", "#", "*", "**", "_", "`", '"', '{"', '{"a":"'),
    *("&", "<b ", " \n", "\\n", "\r\n", "\0", "(", "“", "a. ", "I ", "---\n", " <|im_end|> a"),
    *("Here is a ", "no image ", "图", "analysis"),
]
BEGINNINGS = ("", "A red barn. ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "piece"),
    others_long(
        itertools.product(BEGINNINGS, PIECES),
        *zip(itertools.cycle(BEGINNINGS), PIECES, strict=False),
    ),
)
def test_no_answer_takes_for_ever(before, piece):
    """Time that grows with the square of the length would be hours here."""
    outcome(before + piece * (2**17 // len(piece)))


def test_no_apostrophes_after_a_refusal_take_for_ever():
    assert outcome("I can't help" + "'" * 1000) == "- answer_declined"


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


def test_an_original_that_lies_on_its_side_is_sent_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    target = io.BytesIO()
    drawn = Image.new("RGB", (300, 200), "red")
    drawn.paste("blue", (0, 0, 300, 100))
    drawn.save(target, "JPEG", exif=exif)
    for most, size in ((0, (200, 300)), (120, (80, 120))):
        sent = ia.prepared(target.getvalue(), most)
        with Image.open(io.BytesIO(base64.b64decode(sent.base64))) as shown:
            assert (sent.size, shown.size) == (size, size)
            assert shown.getpixel((size[0] - 10, 50))[2] > 200  # what was above is on the right
            assert not shown.getexif()


def test_a_scan_of_16_bits_keeps_its_shades():
    target = io.BytesIO()
    scan = Image.new("I;16", (200, 100))
    scan.putdata([5000 + 250 * (n % 200) for n in range(20_000)])
    scan.save(target, "PNG")
    sent = ia.prepared(target.getvalue(), 80)
    with Image.open(io.BytesIO(base64.b64decode(sent.base64))) as shown:
        dark, light = shown.convert("L").getextrema()
    assert dark < 30
    assert 200 < light < 230


def test_a_picture_longer_than_a_jpeg_can_be_is_shrunk():
    target = io.BytesIO()
    Image.new("L", (1, 66_000), 128).save(target, "PNG")
    assert ia.prepared(target.getvalue(), 0).size == (56, ia.JPEG_SIDE)
