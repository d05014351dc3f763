"""The page at the health port, where people see how a run goes."""

import http.client
import re
from contextlib import closing
from datetime import timedelta

import pytest
import sandbox
import servers
from hours import STUCK, with_health
from servers import FakeKey
from worlds import CHATS, NO_PAUSE, Running, answer_by_picture, asking, failure, fill

import immich_analyze as ia

pytestmark = pytest.mark.slow

SECRET = "s3cret"


def page(port: int) -> str:
    """The page, which no cache keeps."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=STUCK)) as connection:
        connection.request("GET", "/")
        reply = connection.getresponse()
        assert (reply.status, reply.headers["Cache-Control"]) == (200, "no-store")
        assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
        return reply.read().decode()


def figures(html: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))


def bars(html: str) -> list[int]:
    """Photos by hour, the last one last."""
    said = re.search(rf"{re.escape(ia.t('page_bars'))} ([\d, ]+)</desc>", html)
    return [int(number) for number in said[1].split(", ")]


def test_the_page_tells_how_far_a_run_is(hours, immich, api, ollama):
    immich.keys[immich.key] = FakeKey("alice", servers.EVERYTHING)
    yesterday = hours.now() - timedelta(days=1)
    for number in range(30):
        picture = servers.own_picture(number)
        api.add(picture=picture, created_at=yesterday, updated=yesterday)
    hours.pace(ollama, seconds=600.0)
    argv = ["--max-concurrent", "1", "--timeout", "1000", "--api-poll-interval", "300"]
    with hours.service(api, ollama, *argv, *with_health()) as run:
        run.until(2.5 * 3600 - 1)
        html = page(run.config.health_port)
        told = figures(html)
        assert told[ia.t("page_described")] == "14"
        assert int(told[ia.t("page_left")]) in (14, 15)  # two are in the hands of workers
        assert re.match(r"2\xa0h", told[ia.t("page_time_left")])
        assert (sum(bars(html)), bars(html)[:21], max(bars(html))) == (14, [0] * 21, 6)
        assert ia.t("page_describing") in html
        assert ia.t("page_host_well") in html
        run.until(6 * 3600)
        assert ia.t("page_idle") in page(run.config.health_port)


def test_the_chart_forgets_what_is_older_than_a_day(stop):
    tally, patience = ia.Tally(), ia.Patience(stop, 1, 1)
    status = ia.Status(ia.parse([], {}), ia.Hosts(["http://model:1"], 1, 1.0), patience, tally)
    seen = []
    for _ in range(300):
        tally.add(ia.Outcome.DESCRIBED)
        stop.now += 300
        seen.append(sum(status.figures()["slots"]))
    assert seen == [*range(1, 288)] + [287] * 13  # the last slot has only begun
    stop.now += 24 * 3600
    assert sum(status.figures()["slots"]) == 0
    assert len(status.figures()["slots"]) == 288


def test_a_text_that_was_lost_later_takes_no_bar_below_nothing(stop):
    tally, patience = ia.Tally(), ia.Patience(stop, 1, 1)
    status = ia.Status(ia.parse([], {}), ia.Hosts(["http://model:1"], 1, 1.0), patience, tally)
    tally.add(ia.Outcome.DESCRIBED)
    stop.now += 2 * 3600  # Immich was away
    tally.add(ia.Outcome.DESCRIBED, number=-1)
    assert min(status.figures()["slots"]) == 0


def test_the_page_tells_what_failed_in_our_words(hours, library, ollama):
    fill(library, 2)
    evil = servers.own_picture(7)
    library.add("<b>evil.jpg", picture=evil)
    broken = library.add("broken.jpg", picture=b"\xff\xd8\xff no picture \xff\xd9")
    refusal = servers.Reply(400, {"error": f"what a {SECRET} picture"})
    answer_by_picture(ollama, {evil: refusal})
    linked = f"--link-url=https://me:{SECRET}@photos.me"
    with hours.service(library, ollama, *NO_PAUSE, linked, *with_health()) as run:
        run.until(120)
        html = page(run.config.health_port)
    assert SECRET not in html
    assert f'href="https://photos.me/photos/{broken}"' in html
    assert "A photo dominated" not in html
    assert "&lt;b&gt;evil.jpg" in html
    assert ia.t("preview_broken") in html
    assert html.index("<bdi>") < html.index("broken.jpg")
    assert figures(html)[ia.t("page_failed")] == "2"


def test_the_page_keeps_the_last_twenty_failures(hours, api, ollama):
    for number in range(25):
        api.add(f"{number:02}.jpg", picture=b"\xff\xd8\xff no picture \xff\xd9")
    with hours.service(api, ollama, "--max-concurrent", "1", *with_health()) as run:
        run.until(60)
        html = page(run.config.health_port)
    failed = re.findall(r"<bdi>(\d\d)\.jpg</bdi>", html)
    assert len(failed) == 20
    said = [re.search(r"(\d\d)\.jpg", line.text)[1] for line in run.said if "jpg" in line.text]
    assert failed == said[:-21:-1]  # the latest first


@pytest.mark.parametrize("status", [503, 401])
@pytest.mark.parametrize("lang", ia.LANGUAGES)
def test_the_page_tells_what_is_waited_for_without_secrets(hours, api, ollama, lang, status):
    fill(api, 1)
    refusal = servers.Reply(status, {"error": f"a {SECRET} queue"}, {"Retry-After": "1000"})
    ollama.script(*CHATS, refusal, forever=True)
    with hours.service(api, ollama, "--lang", lang, *with_health()) as run:
        ia.use_language(lang)
        run.until(60)
        html = page(run.config.health_port)
    assert f'<html lang="{lang}">' in html
    assert ia.t("page_unhealthy") in html
    assert ia.t("no_host", why="") in html
    assert ollama.url in html
    assert SECRET not in html


def test_the_page_of_a_real_run_is_fine_in_a_browser(api, ollama, chromium):
    fill(api, 3)
    broken = api.add("<script>broken.jpg", picture=b"\xff\xd8\xff no picture \xff\xd9")
    port = sandbox.free_port()
    argv = [*api.argv, *asking(ollama), "--combined", "--health-port", str(port)]
    with Running(*argv) as run:
        run.wait_for(failure(broken, "<script>broken.jpg", "preview_broken"))
        assert chromium.faults(f"http://127.0.0.1:{port}/") == []
        links = chromium.ask("return [...document.querySelectorAll('a')].map(a => a.href)")
        assert links == [f"{api.server.url}/photos/{broken}"]


def test_a_name_that_is_no_unicode_does_not_take_the_page_away(immich, api, ollama):
    broken = b"\xff\xd8\xff no picture \xff\xd9"
    id, port = api.add(picture=broken), sandbox.free_port()
    immich.assets[id].name = "half \ud83d.jpg"
    headers = {"Content-Type": "image/jpeg"}  # without the name, which no header can hold
    immich.script("GET", f"{id}/thumbnail", servers.Reply(200, broken, headers), forever=True)
    argv = [*api.argv, *asking(ollama), "--combined", "--health-port", str(port)]
    with Running(*argv) as run:
        run.wait_for(ia.t("preview_broken"))
        assert "half ?.jpg" in page(port)
