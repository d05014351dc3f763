"""The pages for people, as a real browser shows them: the report, and the health port's status."""

import base64
import io
import json
import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from browser import DESKTOP, PHONE, served
from PIL import Image
from selenium.webdriver.support.ui import WebDriverWait
from servers import PATIENCE
from worlds import others_long

import immich_analyze as ia

pytestmark = pytest.mark.slow

HOSTILE = {
    "script": "</div></style><script>alert(1); hacked = 1</script>",
    "attribute": '"><img src=x onerror="hacked = 1">',
    "template": "{{ 7 * 7 }} {% raw %} ' \\ \" &lt; &amp;",
    "arabic": "قطة تنام على حافة النافذة (صورة 12)",
    "hebrew": "חתול ישן על אדן החלון, 2019",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 200,
    "long": "W" * 10_000,
    "lines": "line\n" * 2_000,
}
TEXTS = list(HOSTILE.values())
QUESTION = "Describe this photo.\n\n- date: Sunday, 14 July 2019, afternoon\n- place: Warnemünde"
MODELS = ["qwen3-vl:4b", 'gemma3:4b, it\'s \\ "two".txt', "llava:13b</style>"]
SITE = "https://immich.example"


def preview(colour):
    """A small picture as the report embeds it."""
    file = io.BytesIO()
    Image.new("RGB", (320, 213), colour).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def macros(lang="en"):
    """The macros of the report, in a language."""
    ia.use_language(lang)
    given = {"t": ia.t, "lang": lang, "version": "0.1.0", "hide": lambda _, text: text}
    return ia.template(ia.data_file("words.jinja", "report.jinja"), True).make_module(given)


def photo(name="a.jpg", before="", id="id", site=SITE):
    return ia.Photo(id, name, before, "0", site=site)


def ending(text, question=QUESTION, error=None, seconds=8.34, tokens=312):
    """What became of a photo that a model was asked about."""
    outcome = ia.Outcome.FAILED if error else ia.Outcome.DESCRIBED
    asked = ia.Question(question, (ia.plain_picture(ia.PLAIN_SIZE),))
    said = None if error else ia.Said(text, seconds, tokens)
    return ia.Ending(photo(), outcome, error, text, asked=asked, said=said)


def pieces(columns, lang="en", texts=TEXTS):
    """The pieces of a report without its tail: a photo for each text and one that failed."""
    page = macros(lang)
    yield page.head(columns)
    for column in range(1, len(columns) + 1):
        for row, text in enumerate(texts, 1):
            before, whose = (text, ("person", "ours")[row % 2]) if row % 3 else ("", "")
            if column == 1:
                yield page.photo(row, photo(text, before), preview("teal"), whose)
            both = "both" if whose == "person" else "ours"
            yield page.text(row, column, ending(text, QUESTION + text), both)
        row = len(texts) + 1
        if column == 1:
            yield page.photo(row, photo("broken.jpg", site=""), "", "")
        failed = ia.Ending(photo(), ia.Outcome.FAILED, ia.Permanent("preview_broken"))
        yield page.text(row, column, failed, "ours")


def tail(described, failed, seconds, left, lang="en"):
    """The end of a report."""
    counts = Counter(described=described, failed=failed)
    return macros(lang).tail(SimpleNamespace(counts=counts, left=lambda: left), seconds, False)


def report(columns=MODELS[:1], lang="en", texts=TEXTS):
    """A whole report."""
    end = tail(1205, 1, 10_123.0, 98_000, lang)
    return "".join([*pieces(columns, lang, texts), end])


def host(url, why=None, wait=0.0, most=math.inf, requests=0, struck_off=False):
    return SimpleNamespace(
        url=url, why=why, struck_off=struck_off, wait=lambda now: wait - now, in_flight=2,
        most=most, requests=requests, seconds=8.4 * requests,
    )  # fmt: skip


HOSTS = [
    host("http://me:secret@gaming-pc:11434/?token=secret", requests=1204),
    host("http://192.168.1.20:11434", ValueError("a model's words"), wait=8.0, most=3),
    host("https://models.example/v1", ValueError("secret"), wait=3100.0, struck_off=True),
]
FAILURES = [
    (ia.Photo(name, text, "", "0", site=SITE if name != "long" else ""), text)
    for name, text in HOSTILE.items()
]


COUNTS = Counter(described=18_204, failed=4, skipped=310, not_ready=12)


def status(lang="en", left=81_230, seconds=94_665.0, counts=COUNTS, failed=FAILURES, **figures):
    """The status page, in a language, so many seconds after the run began."""
    ia.use_language(lang)
    tally = SimpleNamespace(counts=counts, left=lambda: left, began=-seconds, failed=failed)
    usual = {
        "t": ia.t, "lang": lang, "version": "0.1.0", "public": ia.public, "waiting": "",
        "trouble": "", "tally": tally, "slots": [n // 12 for n in range(288)], "hosts": HOSTS,
        "now": 0.0, "harmless": str,
    }  # fmt: skip
    return ia.template(ia.data_file("words.jinja", "status.jinja"), True).render(usual | figures)


PAGES = {
    "report": report,
    "comparison": lambda lang: report(MODELS, lang),
    "status": status,
    "start": lambda lang: status(
        lang,
        trouble="starting",
        waiting=HOSTILE["attribute"],
        left=None,
        slots=[0] * 288,
        failed=[],
        counts=Counter(),
    ),
}


@pytest.fixture
def file(tmp_path):
    """Keeps a page in a file."""

    def keep(html):
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        return path

    return keep


# Every page


@pytest.mark.parametrize(
    ("name", "lang"),
    others_long(
        [(name, lang) for name in PAGES for lang in ia.LANGUAGES],
        *(("report", "en"), ("comparison", "ru"), ("status", "en"), ("status", "ru")),
        ("start", "ru"),
    ),
)
def test_a_page_is_whole_and_readable_on_every_screen(chromium, name, lang):
    html = PAGES[name](lang=lang)
    ElementTree.fromstring(html)
    with served(lambda: html) as url:
        assert chromium.faults(url) == []
    outline = "return [...document.querySelectorAll('h1, h2, h3')].map(e => e.tagName[1])"
    levels = [int(level) for level in chromium.ask(outline)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert chromium.ask("return document.documentElement.lang") == lang
    assert len(chromium.ask("return [...document.querySelectorAll('header, main, footer')]")) == 3
    assert chromium.driver.title.endswith("immich-analyze")


@pytest.mark.parametrize("name", PAGES)
def test_texts_are_shown_as_they_are_and_do_nothing(chromium, file, name):
    chromium.open(file(PAGES[name](lang="en")))
    assert chromium.ask("return typeof hacked") == "undefined"
    strange = "img:not([src^='data:image/jpeg']), style ~ style, script:not(body > script)"
    assert chromium.ask("return document.querySelectorAll(arguments[0]).length", strange) == 0
    shown = chromium.ask("return document.querySelector('main').textContent")
    for text in HOSTILE.values() if name != "start" else ():
        assert text in shown


@pytest.mark.parametrize("name", ["report", "status"])
def test_a_text_runs_in_its_own_direction(chromium, file, name):
    chromium.open(file(PAGES[name](lang="en")))
    texts = "[...document.querySelectorAll('main *')].filter(e => e.innerHTML === arguments[0])"
    asked = f"return {texts}.map(text => getComputedStyle(text).direction)"
    for text, direction in (("arabic", "rtl"), ("hebrew", "rtl"), ("long", "ltr")):
        assert {*chromium.ask(asked, HOSTILE[text])} == {direction}


@pytest.mark.parametrize("name", others_long(PAGES, "report", "status"))
def test_a_page_is_dark_where_one_likes_it_dark_and_light_on_paper(chromium, file, name):
    path, ground = file(PAGES[name](lang="en")), "return getComputedStyle(document.body)"
    red = f"{ground}.backgroundColor.match(/\\d+/)[0]"
    chromium.open(path)
    light, dark = (int(chromium.look(dark=dark).ask(red)) for dark in (False, True))
    assert light > 240
    assert dark < 40
    assert int(chromium.look(dark=True, media="print").ask(red)) > 240


@pytest.mark.parametrize("site", [SITE, "", "javascript:alert(1)//"])
def test_a_link_leads_to_the_web(site):
    one = photo(site=site)
    for shown in (macros().photo(1, one, "", ""), status(failed=[(one, "why")])):
        assert ("href=" in shown.split("<main")[-1]) == (site == SITE)


@pytest.mark.parametrize("name", others_long(PAGES, "report", "status"))
def test_the_keyboard_reaches_everything_and_one_sees_where_it_is(chromium, file, name):
    chromium.open(file(PAGES[name](lang="en"))).unfold()
    wanted = "a[href], summary, [tabindex]"
    expected = chromium.ask("return [...document.querySelectorAll(arguments[0])]", wanted)
    reached = list(chromium.tabbed())
    assert [element for element, visible in reached if not visible] == []
    assert {*expected} <= {element for element, _ in reached}
    assert expected or name == "start"


@pytest.mark.parametrize("name", others_long(PAGES, "report", "status"))
def test_a_page_can_be_printed(chromium, file, name):
    whole = chromium.open(file(PAGES[name](lang="en"))).printed()
    chromium.ask("document.body.replaceChildren()")
    assert len(whole) > 2 * len(chromium.printed())
    assert whole.startswith(b"%PDF")


# The report


@pytest.mark.parametrize("columns", [MODELS[:1], MODELS], ids=["report", "comparison"])
def test_a_report_that_is_cut_off_after_any_piece_is_a_whole_page(columns):
    so_far = ""
    for piece in pieces(columns):
        so_far += piece
        root = ElementTree.fromstring(so_far + tail(1, 0, 2.0, None))
        assert [child.tag for child in root.find("body")] == ["header", "main", "footer"]


def test_a_picture_is_named_by_its_file(chromium, file):
    chromium.open(file(report(texts=["IMG_1.jpg", 'a "quoted" <name>.jpg'])))
    alts = chromium.ask("return [...document.images].map(image => image.alt)")
    assert alts == ["IMG_1.jpg", 'a "quoted" <name>.jpg']
    assert chromium.ask("return [...document.images].every(image => image.naturalWidth === 320)")
    assert ia.t("page_no_preview") in chromium.ask("return document.body.innerText")


BOXES = """
return [...document.querySelectorAll(".photo, .text")].map(element => {
  const box = element.getBoundingClientRect(), style = element.style;
  const [row, column] = ["--row", "--column"].map(n => Number(style.getPropertyValue(n)));
  return {row, column, left: box.left, top: box.top, right: box.right, bottom: box.bottom};
});
"""


def test_on_a_phone_each_photo_is_followed_by_its_texts(chromium, file):
    boxes = chromium.open(file(report(MODELS)), width=PHONE).ask(BOXES)
    boxes.sort(key=lambda box: box["top"])
    places = [(box["row"], box["column"]) for box in boxes]
    assert places == [(row, column) for row in range(1, len(TEXTS) + 2) for column in range(4)]
    assert all(above["bottom"] <= below["top"] for above, below in pairwise(boxes))
    named = "return [...document.querySelectorAll('.text')].map(added => "
    said = chromium.ask(f"{named} getComputedStyle(added, '::before').content)")
    wanted = [json.dumps(name) for name in MODELS]
    assert said == [name for name in wanted for _ in range(len(TEXTS) + 1)]


def test_on_a_desktop_models_are_side_by_side_under_their_names(chromium, file):
    boxes = chromium.open(file(report(MODELS)), width=DESKTOP).ask(BOXES)
    by_place = {(box["row"], box["column"]): box for box in boxes}
    rows = [[by_place[row, column] for column in range(4)] for row in range(1, len(TEXTS) + 2)]
    for cells in rows:
        assert len({cell["top"] for cell in cells}) == 1
        assert all(one["right"] < two["left"] for one, two in pairwise(cells))
    for above, below in pairwise(rows):
        assert max(cell["bottom"] for cell in above) <= min(cell["top"] for cell in below)
    head = "const box = name.getBoundingClientRect(); return [name.innerText, box.left]"
    heads = f"return [...document.querySelectorAll('.name')].map(name => {{ {head} }})"
    lefts = [cell["left"] for cell in rows[0][1:]]
    assert chromium.ask(heads) == [list(pair) for pair in zip(MODELS, lefts, strict=True)]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_very_long_text_scrolls_in_its_box(chromium, file, width):
    chromium.open(file(report(texts=[HOSTILE["long"]])), width=width)
    box = "const box = document.querySelector('.text > .words');"
    height, inside = chromium.ask(f"{box} return [box.clientHeight, box.scrollHeight]")
    assert height <= 640
    assert inside > height
    chromium.ask(f"{box} box.focus()")
    assert chromium.ask(f"{box} return document.activeElement === box && box.tabIndex === 0")


def test_a_very_long_text_is_whole_on_paper(chromium, file):
    chromium.open(file(report(texts=[HOSTILE["long"]])))
    chromium.look(media="print")
    box = "const box = document.querySelector('.text > .words');"
    height, inside = chromium.ask(f"{box} return [box.clientHeight, box.scrollHeight]")
    assert inside == height > 640


def test_what_the_model_was_asked_is_folded_away(chromium, file):
    chromium.open(file(report(texts=["A cat."])))
    asked = "const [details] = document.querySelectorAll('details');"
    assert QUESTION not in chromium.ask("return document.querySelector('main').innerText")
    chromium.ask(f"{asked} details.firstElementChild.click()")
    assert QUESTION in chromium.ask(f"{asked} return details.innerText")


@pytest.mark.parametrize(
    ("whose", "error", "label"),
    [
        ("ours", None, "page_by_ours"),
        ("both", None, "page_by_both"),
        ("ours", ia.Permanent("preview_broken"), "page_failure"),
        ("ours", ia.AnalyzeError("bug", bug=ValueError("of no use to people")), "page_failure"),
    ],
)
def test_a_text_says_whose_it_is(whose, error, label):
    cell = macros().text(1, 1, ending("A cat.", error=error, tokens=1312), whose)
    assert f">{ia.t(label)}</p>" in cell
    assert (">A cat.</div>" in cell, "8.3\u00a0s · 1\u202f312 tokens" in cell) == (not error,) * 2
    why = ia.t("preview_broken" if isinstance(error, ia.Permanent) else "bug")
    assert (f">{why}</div>" in cell) == bool(error)


@pytest.mark.parametrize(("whose", "label"), [("ours", "ours"), ("person", "person")])
def test_what_stood_there_says_whose_it_was(whose, label):
    shown = macros().photo(1, photo("", "A dog.", "an id"), "", whose)
    assert f">{ia.t(f'page_before_{label}')}</p>" in shown
    assert ">A dog.</div>" in shown
    assert ">an id</bdi>" in shown


@pytest.mark.parametrize(
    ("seconds", "en", "ru"),
    [
        (0.0, "0 s", "0 с"),
        (8.34, "8.3 s", "8,3 с"),
        (59.4, "59 s", "59 с"),
        (59.6, "1 min", "1 мин"),
        (3_599.0, "1 h 0 min", "1 ч 0 мин"),
        (10_123.0, "2 h 49 min", "2 ч 49 мин"),
        (90_000.0, "1 d 1 h", "1 д 1 ч"),
    ],
)
def test_a_duration_is_told_as_people_do(seconds, en, ru):
    for lang, told in (("en", en), ("ru", ru)):
        text = told.replace(" ", "\u00a0")
        assert f"<dd>{text}</dd>" in tail(0, 0, seconds, None, lang)
        one = Counter(described=1)
        assert f"<dd>{text}</dd>" in status(lang, left=1, seconds=seconds, counts=one)


def test_the_time_for_the_rest_is_told_where_it_is_known():
    label = f"<dt>{ia.t('page_time_left')}</dt>"
    assert f"{label}<dd>1\u00a0h\u00a040\u00a0min</dd>" in tail(10, 0, 60.0, 1000)
    assert label not in tail(10, 0, 60.0, None)
    assert label not in tail(0, 3, 60.0, 1000)


def test_a_thousand_photos_stay_small():
    page = macros()
    shown = page.photo(1000, photo("n" * 50, "b" * 1000), "p" * 16_000, "person")
    shown += page.text(1000, 1, ending("t" * 2000, "q" * 4000), "both")
    assert len(shown) * 1000 < 30_000_000


# The status page


def shown_on(chromium):
    return " ".join(chromium.ask("return document.querySelector('main').innerText").split())


def test_the_status_tells_how_it_goes(chromium, file):
    text = shown_on(chromium.open(file(status())))
    for told in (
        "Described 18 204",
        "Left 81 230",
        "Failed 4",
        "Skipped 310",
        "Without a preview 12",
    ):
        assert told in text
    assert "Time for the rest" in text
    assert "All is well" in text
    assert "http://gaming-pc:11434" in text
    assert "working on 2 · 8.4 s a photo" in text
    assert "Unavailable; asked again in 8 s" in text
    assert "at most 3" in text
    assert "Needs attention; asked again in 52 min" in text
    source = chromium.driver.page_source
    assert "secret" not in source
    assert "a model's words" not in source
    assert "Taken back" not in text


def test_the_status_of_a_start_says_what_is_not_known_yet(chromium, file):
    text = shown_on(chromium.open(file(PAGES["start"]("en"))))
    assert "Described 0" in text
    assert "Left unknown" in text
    assert "Something is wrong" in text
    assert chromium.ask("return document.querySelector('main > .state').className") == "state waits"
    assert "None so far" in text


def test_the_chart_has_a_bar_for_each_hour_and_says_the_same_in_words(chromium, file):
    chromium.open(file(status(slots=[0] * 264 + [1] * 12 + [2] * 12)))
    bars = (
        "return [...document.querySelectorAll('rect')].map(e => e.getBoundingClientRect().height)"
    )
    *none, half, full = chromium.ask(bars)
    assert none == [0] * 22
    assert full == pytest.approx(2 * half, abs=1)
    assert full > 100
    label = chromium.tell("Accessibility.getFullAXTree")["nodes"]
    [name] = [n["name"]["value"] for n in label if n["role"].get("value") in ("image", "img")]
    assert name.startswith("Photos an hour Each hour")
    assert name.endswith(" 0, 12, 24")
    assert "24 in the last hour, at most 24, 36 in 24 hours" in shown_on(chromium)


HOLD = "window.setInterval = (work, pause) => { window.renewal = {work, pause}; }"
RENEW = "renewal.work().then(arguments[0])"


def test_the_status_renews_itself_and_keeps_scroll_and_focus(chromium):
    now = {"html": status()}
    held = chromium.tell("Page.addScriptToEvaluateOnNewDocument", source=HOLD)
    try:
        with served(lambda: now["html"]) as url:
            chromium.open(url, width=PHONE)
            assert chromium.ask("return renewal.pause") == 10_000
            chromium.ask("window.same = document.querySelector('dl'); scrollTo(0, 400)")
            focus = "document.querySelector('li:nth-child(2) a').focus({preventScroll: true})"
            chromium.ask(focus)
            focused = chromium.ask("return document.activeElement.href")
            chromium.driver.execute_async_script(RENEW)
            assert chromium.ask("return same.isConnected")

            newer = (photo("newest.jpg"), "why")
            now["html"] = status(left=77, failed=[newer, *FAILURES])
            chromium.driver.execute_async_script(RENEW)
            assert "Left 77" in shown_on(chromium)
            assert "newest.jpg" in shown_on(chromium)
            assert chromium.ask("return [scrollY, document.activeElement.href]") == [400, focused]

            now["html"] = "no page"
            chromium.driver.execute_async_script(RENEW)
            assert "Left 77" in shown_on(chromium)
            told = "return document.querySelector('header').innerText"
            assert ia.t("page_stale") in chromium.ask(told)
            now["html"] = status(left=76)
            chromium.driver.execute_async_script(RENEW)
            assert "Left 76" in shown_on(chromium)
            assert ia.t("page_stale") not in chromium.ask(told)
            assert chromium.console() == []
    finally:
        chromium.tell("Page.removeScriptToEvaluateOnNewDocument", **held)


def test_without_scripts_the_status_is_loaded_again(chromium):
    later = iter([status(left=78).replace('content="10"', 'content="0"')])
    with served(lambda: next(later, status(left=77))) as url:
        chromium.open(url, scripts=False)
        WebDriverWait(chromium.driver, PATIENCE).until(lambda _: "Left 77" in shown_on(chromium))
