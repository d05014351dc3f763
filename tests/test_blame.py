"""Whole runs in invented time: who is to blame for a failure, and what it costs the others."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import pytest
import servers
from hours import DAY, Hours, Run, with_health
from servers import CUT, RESET, Exchange, FakeOllama, Reply
from worlds import (
    CHATS,
    World,
    asked_about,
    failure_notes,
    fill,
    mainly,
    others_long,
    shown,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow

HOUR = 3600.0
POISON = servers.own_picture(1000)
SELDOM = ["--api-poll-interval", "3000"]
SWEPT = ["--api-poll-interval", str(10 * DAY)]  # photos are found by the hourly sweeps alone


@pytest.fixture
def hosts() -> Iterator[Callable[[int], list[FakeOllama]]]:
    """Makes so many model hosts."""
    with ExitStack() as stack:
        made: list[FakeOllama] = []

        def make(number: int) -> list[FakeOllama]:
            made.extend(stack.enter_context(FakeOllama()) for _ in range(number))
            return made

        yield make
    for host in made:
        host.check()


# --- Replies ---------------------------------------------------------------------------------


def only(picture: bytes, reply: Any) -> Callable[[Exchange], Any]:
    """For `script`: this reply to one picture, the usual one to others."""

    def choose(exchange: Exchange) -> Any:
        if shown(exchange) != picture:
            return None
        return reply(exchange) if callable(reply) else reply

    return choose


def says(text: str, finish: str = "stop") -> Reply:
    """An answer of Ollama."""
    message = {"role": "assistant", "content": text}
    return Reply(200, {"model": "m", "message": message, "done": True, "done_reason": finish})


# --- A sick picture costs no host, and is not asked about all day -----------------------------

SICK: dict[str, Any] = {
    "500": Reply(500, {"error": "out of memory"}),
    "400": Reply(400, {"error": "Failed to load image"}),
    "422": Reply(422, {"error": "unprocessable"}),
    "not JSON": Reply(200, b'{"message": '),
    "a page": Reply(200, "<html><body>Sign in</body></html>"),
    "an error in a 200": Reply(200, {"error": "llama runner process has terminated"}),
    "empty": says(""),
    "junk": says("a red square and " * 200),
    "cut answer": says("A red", "length"),
    "cut connection": CUT,
    "closed connection": RESET,
    "silence": Hours.hang,
}


def sick(name: str, hours: Hours) -> Any:
    reply = SICK[name]
    return hours.hang if reply is Hours.hang else reply


@pytest.mark.parametrize(
    ("trouble", "number"),
    others_long(
        [(name, 1 + n % 3) for n, name in enumerate(SICK)] + [("500", n) for n in (2, 3, 4)],
        *((name, 1 + n % 3) for n, name in enumerate(SICK)),
        ("500", 4),
    ),
)
def test_a_service_asks_about_a_sick_picture_three_times(hours, api, hosts, trouble, number):
    models, wanted = hosts(number), fill(api, 3)
    sick_one = api.add("poison.jpg", picture=POISON)
    for host in models:
        host.script(*CHATS, only(POISON, sick(trouble, hours)), forever=True)
    times = 1 if trouble == "cut answer" else 3  # which would be cut again
    with hours.service(api, *models, *SWEPT) as run:
        run.until(HOUR - 1)
        assert len(asked_about(POISON, *models)) == times
        run.until(2.5 * HOUR)
    assert len(asked_about(POISON, *models)) == times
    assert (run.counts, run.fatal) == ({"described": 3, "failed": 1}, "")
    assert api.texts() == wanted | {sick_one: ""}
    assert len(run.lines("poison.jpg")) == 1
    assert trouble == "silence" or not any(run.complaints(host) for host in models)
    assert failure_notes(api).keys() == {sick_one}


@pytest.mark.parametrize("number", others_long([1, 3], 3))
def test_on_the_next_day_a_sick_picture_is_tried_three_times_more(hours, api, hosts, number):
    models = hosts(number)
    fill(api, 3)
    api.add(picture=POISON)
    for host in models:
        host.script(*CHATS, only(POISON, SICK["500"]), forever=True)
    with hours.service(api, *models, *SWEPT) as run:
        run.until(0.95 * DAY)
        assert len(asked_about(POISON, *models)) == 3
        run.until(1.05 * DAY)
    assert len(asked_about(POISON, *models)) == 6
    assert failure_notes(api).popitem()[1]["tries"] == 2


@mainly("database")
def test_between_two_looks_for_arrivals_a_sick_picture_is_left_alone(hours, library, hosts):
    models = hosts(2)
    for host in models:
        host.script(*CHATS, only(POISON, SICK["500"]), forever=True)
    with hours.service(library, *models) as run:
        run.at(15, lambda: (fill(library, 3), library.add("poison.jpg", picture=POISON)))
        run.until(400)
    assert len(asked_about(POISON, *models)) == 3
    assert run.counts == {"described": 3, "failed": 1}
    assert len(run.lines("poison.jpg")) == 1


IMMICH_FAILS = {
    "500": Reply(500, {"message": "Internal server error"}),
    "404": servers.recorded("immich-3.1.0", "thumbnail-preview-of-broken.jpg"),
    "a page": Reply(200, "<html>", {"Content-Type": "text/html"}),
}


@pytest.mark.parametrize(
    ("trouble", "lasting", "most", "look"),
    others_long(
        [(trouble, *times, 10) for trouble in IMMICH_FAILS for times in ((10, 40), (40, 80))]
        + [("500", 600, HOUR + 300, 300)],
        *(("500", 10, 40, 10), ("404", 40, 80, 10), ("a page", 40, 80, 10)),
        ("500", 600, HOUR + 300, 300),
    ),
)
def test_a_photo_that_immich_fails_on_for_a_while_is_taken_again(
    hours, api, immich, ollama, trouble, lasting, most, look
):
    fill(api, 2)
    passing = hours.between(20, 20 + lasting, IMMICH_FAILS[trouble])
    ids: list[str] = []

    def arrive() -> None:
        ids.append(api.add("late.jpg", picture=servers.picture()))
        immich.script("GET", f"{ids[0]}/thumbnail", passing, forever=True)

    with hours.service(api, ollama, "--api-poll-interval", str(look)) as run:
        run.at(20, arrive)
        run.until(20 + most)
        assert api.texts()[ids[0]] == servers.told(servers.picture())
        assert run.counts["described"] == 3
    assert len(run.lines("late.jpg")) <= 1
    assert failure_notes(api) == {}


REQUESTS_OF_ONE = ["GET {}/thumbnail", "PUT {}/metadata", "PUT {}$"]


@pytest.mark.measured
@pytest.mark.parametrize(
    ("request_of_one", "status"),
    others_long(
        [(request, status) for request in REQUESTS_OF_ONE for status in (502, 504)],
        *zip(REQUESTS_OF_ONE, cycle((502, 504)), strict=False),
    ),
)
def test_a_proxy_that_fails_on_one_photo_of_immich_holds_up_no_other(
    hours, api, immich, ollama, request_of_one, status
):
    wanted = fill(api, 6)
    sick_one = list(wanted)[3]
    reply = Reply(status, "<html>the upstream said nothing</html>", {"Content-Type": "text/html"})
    immich.script(*request_of_one.format(sick_one).split(), reply, forever=True)
    with hours.batch(api, ollama) as run:
        pass
    assert (run.counts, run.code) == ({"described": 5, "failed": 1}, 1)
    assert api.texts() == wanted | {sick_one: ""}
    assert len(run.said) == 1
    assert run.ended < 60


def test_a_proxy_that_limits_requests_to_immich_costs_no_photo(hours, api, immich, ollama):
    wanted, passed = fill(api, 8), Counter[int]()

    def limited(_: Exchange) -> Reply | None:
        passed[int(hours.time)] += 1
        return Reply(503, "<html>too many requests</html>") if passed[int(hours.time)] > 5 else None

    immich.script(".*", "/api/assets/", limited, forever=True)
    with hours.batch(api, ollama) as run:
        pass
    assert (run.counts, run.code) == ({"described": 8}, 0)
    assert api.texts() == wanted


def test_a_run_that_described_nothing_notes_no_failure(hours, library, ollama):
    pictures = [servers.own_picture(n) for n in range(5)]
    ids = [library.add(picture=picture) for picture in pictures]
    script = lambda chat: SICK["500"] if shown(chat) in pictures else None  # noqa: E731
    ollama.script(*CHATS, script, forever=True)
    with hours.batch(library, ollama) as run:
        pass
    assert (run.counts, run.code) == ({"failed": 5}, 1)
    assert failure_notes(library) == {}
    good = library.add(picture=POISON)
    with hours.batch(library, ollama) as run:
        pass
    assert (run.counts, run.code) == ({"failed": 5, "described": 1}, 1)
    assert failure_notes(library).keys() == set(ids)
    assert library.texts()[good]


@pytest.mark.parametrize("bad", ["\0", "\ud800", "\x1b[2J"], ids=ascii)
def test_a_failure_is_noted_whatever_a_host_says_but_for_secrets(
    hours, library, ollama, monkeypatch, bad
):
    monkeypatch.setattr(ia.log, "propagate", False)  # xdist cannot send half a letter
    fill(library, 3)
    library.add("poison.jpg", picture=POISON)
    why = f"cannot read{bad} Authorization: Bearer host-key, X-Pass: proxy-password"
    ollama.script(*CHATS, only(POISON, Reply(400, {"error": why})), forever=True)
    access = ["--api-key", "host-key", "--host-header", "X-Pass: proxy-password"]
    with hours.batch(library, ollama, *access):
        pass
    [note] = failure_notes(library).values()
    assert note["why"].endswith("Authorization: Bearer …, X-Pass: …")


# --- A sick host costs no photo --------------------------------------------------------------

STATES = {
    "no model is loaded": (400, "No models loaded. Please load a model in the developer page."),
    "the model crashed": (400, "The model has crashed without additional information."),
    "a proxy": (407, "Proxy Authentication Required"),
    "too large": (413, "Payload Too Large"),
    "unprocessable": (422, "Unprocessable Entity"),
    "upgrade": (426, "Upgrade Required"),
    "for legal reasons": (451, "Unavailable For Legal Reasons"),
    "a teapot": (418, "I'm a teapot"),
    "failed": (500, "llama runner process has terminated"),
    "not implemented": (501, "Not Implemented"),
}


def assert_all_well(run: Run, library: World, wanted: dict[str, str]) -> None:
    """Each photo was described, once, and nothing is noted but that."""
    assert (run.counts, run.code) == ({"described": len(wanted)}, 0)
    assert library.texts() == wanted
    assert sorted(library.writes()) == sorted(wanted.items())
    assert failure_notes(library) == {}


@pytest.mark.parametrize(
    ("state", "seconds"),
    others_long(
        [*zip(STATES, [2, 100] * len(STATES), strict=False), ("the model crashed", 2)],
        *(("no model is loaded", 2), ("the model crashed", 2), ("the model crashed", 100)),
        *(("a proxy", 2), ("too large", 100), ("failed", 2), ("not implemented", 100)),
    ),
)
def test_a_host_in_trouble_for_a_while_costs_one_line_and_no_photo(
    hours, api, ollama, state, seconds
):
    wanted = fill(api, 10)
    status, why = STATES[state]
    trouble = hours.between(1, 1 + seconds, Reply(status, {"error": why}))
    ollama.script(*CHATS, trouble, forever=True)
    hours.pace(ollama)
    with hours.batch(api, ollama, "--unavailable-duration", "10") as run:
        pass
    assert_all_well(run, api, wanted)
    assert len(run.complaints(ollama)) == 1
    assert len(run.lines(level="ERROR")) == 0
    assert run.ended < seconds + 30


@mainly("database")
@pytest.mark.parametrize(
    "trouble", ["cut connection", "closed connection", "not JSON", "a page", "empty"]
)
def test_a_host_that_gives_no_answers_for_a_while_costs_no_photo(hours, library, ollama, trouble):
    wanted = fill(library, 10)
    ollama.script(*CHATS, hours.between(1, 30, SICK[trouble]), forever=True)
    hours.pace(ollama)
    with hours.batch(library, ollama, "--unavailable-duration", "5") as run:
        pass
    assert_all_well(run, library, wanted)
    assert len(run.complaints(ollama)) == 1


def test_the_other_host_does_the_work_meanwhile(hours, api, hosts):
    models, wanted = hosts(2), fill(api, 20)
    trouble = Reply(400, {"error": STATES["no model is loaded"][1]})
    models[1].script(*CHATS, hours.between(1, 4000, trouble), forever=True)
    hours.pace(*models)
    with hours.batch(api, *models) as run:
        pass
    assert_all_well(run, api, wanted)
    assert len(run.complaints(models[1])) == 1
    assert len(models[1].find(*CHATS)) < 10


def test_hosts_that_hang_at_the_start_hold_it_up_together_and_not_one_by_one(hours, api, hosts):
    models, wanted = hosts(4), fill(api, 8)
    for host in models[1:]:
        host.script("POST", "/api/show", hours.hang, forever=True)
    with hours.batch(api, *models) as run:
        pass
    assert_all_well(run, api, wanted)
    assert run.ended < 2 * ia.CHECK_TIMEOUT


# The context


def too_large(exchange: Exchange) -> Reply | None:
    """What llama.cpp says to a picture of more pixels than a small plain one has."""
    width, height = servers.Image.open(servers.io.BytesIO(shown(exchange))).size
    if width * height <= 448 * 448:
        return None
    why = "request (5431 tokens) exceeds the available context size (4096 tokens)"
    error = {"code": 400, "message": why, "type": "exceed_context_size_error"}
    return Reply(400, {"error": error | {"n_prompt_tokens": 5431, "n_ctx": 4096}})


def large(number: int, size: tuple[int, int] = (640, 480)) -> bytes:
    """A picture that is larger than the plain one, of its own look."""
    jpeg, comment = servers.picture("blue", size=size), str(number).encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment + jpeg[2:]


@pytest.mark.measured
@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("number", [1, 30])
def test_a_context_too_small_for_all_photos_strikes_the_host_off(
    hours, api, llamacpp, number, most
):
    for n in range(number):
        api.add(picture=large(n))
    llamacpp.script(*CHATS, too_large, forever=True)
    with hours.batch(api, llamacpp, "--max-concurrent", str(most)) as run:
        pass
    assert (run.code, run.counts, failure_notes(api)) == (2, {}, {})
    assert run.ended < 10
    [line] = run.lines(llamacpp.url, level="CRITICAL")
    assert "-c for llama.cpp" in line
    assert "5431 tokens" in line


def test_a_context_too_small_for_a_while_is_waited_for_where_photos_were_described(
    hours, api, llamacpp
):
    pictures = [large(n) for n in range(12)]
    wanted = {api.add(picture=picture): servers.told(picture) for picture in pictures}
    llamacpp.script(*CHATS, hours.between(1, 30, too_large), forever=True)
    hours.pace(llamacpp)
    with hours.batch(api, llamacpp, "--unavailable-duration", "10") as run:
        pass
    assert_all_well(run, api, wanted)
    assert len(run.complaints(llamacpp)) == 1


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("before", [0, 5])
def test_a_context_too_small_for_one_photo_costs_only_that(hours, api, llamacpp, before, most):
    wanted = fill(api, 5 - before)
    panorama = api.add("panorama.jpg", picture=large(1, (2000, 300)))
    pictures = [servers.own_picture(100 + n) for n in range(5 + before)]
    wanted |= {api.add(picture=picture): servers.told(picture) for picture in pictures}
    llamacpp.script(*CHATS, too_large, forever=True)
    hours.pace(llamacpp)
    argv = ["--unavailable-duration", "10", "--max-concurrent", str(most)]
    with hours.batch(api, llamacpp, *argv) as run:
        pass
    assert (run.counts, run.code) == ({"described": 10, "failed": 1}, 1)
    assert api.texts() == wanted | {panorama: ""}
    assert len(run.lines("panorama.jpg")) == 1


@pytest.mark.parametrize("number", [1, 6])
def test_a_context_too_small_for_the_first_photos_waits_for_what_others_show(
    hours, api, llamacpp, number
):
    wanted = fill(api, 6)
    wanted |= {api.add(picture=large(n, (2000, 300))): "" for n in range(number)}

    def refuse(exchange: Exchange) -> Reply | None:
        if refusal := too_large(exchange):
            hours.takes(0.2)  # meanwhile, others are asked about
        return refusal

    llamacpp.script(*CHATS, refuse, forever=True)
    hours.pace(llamacpp, seconds=20)
    with hours.batch(api, llamacpp) as run:
        pass
    assert (run.counts, run.code) == ({"described": 6, "failed": number}, 1)
    assert api.texts() == wanted


# Hosts that need a person

HOPELESS = {
    "401": Reply(401, {"error": "unauthorized"}),
    "402": Reply(402, {"error": "this model requires a subscription"}),
    "403": Reply(403, {"error": "forbidden"}),
    "no model": Reply(404, {"error": "model 'tiny-vlm' not found"}),
    "cannot see": Reply(500, {"error": servers.NO_VISION}),
}


@pytest.mark.parametrize(
    ("trouble", "number"),
    others_long(
        [(trouble, number) for trouble in HOPELESS for number in (1, 2)],
        *zip(HOPELESS, cycle((2, 1)), strict=False),
    ),
)
def test_a_batch_ends_when_its_last_host_needs_a_person(hours, api, hosts, trouble, number):
    models = hosts(number)
    fill(api, 12 * number)
    for begin, host in enumerate(models, 1):
        host.script(*CHATS, hours.between(begin, DAY, HOPELESS[trouble]), forever=True)
    hours.pace(*models)
    with hours.batch(api, *models) as run:
        pass
    assert run.code == 2
    assert run.ended < 60
    assert [len(run.complaints(host)) for host in models] == [1] * number
    assert failure_notes(api) == {}
    assert run.counts.get("failed", 0) == 0


@pytest.mark.parametrize(
    ("trouble", "mode"),
    others_long(
        [(trouble, mode) for trouble in HOPELESS for mode in ("combined", "monitor")],
        *(("401", "monitor"), ("402", "combined"), ("no model", "combined")),
        ("cannot see", "combined"),
    ),
)
def test_a_service_waits_until_its_last_host_is_well_again(hours, api, ollama, trouble, mode):
    ollama.script(*CHATS, hours.between(3, 9000, HOPELESS[trouble]), forever=True)
    hours.pace(ollama)
    wanted: dict[str, str] = {}
    options = ["--mode", mode, *SELDOM, *with_health()]
    with hours.service(api, ollama, *options) as run:
        run.at(1, lambda: wanted.update(fill(api, 8)))
        run.until(5000)
        assert run.ended is None
        assert run.health()[0] == 503
        run.until(13000)
        assert run.health()[0] == 200
    assert (run.counts, run.fatal) == ({"described": 8}, "")
    assert (api.texts(), failure_notes(api)) == (wanted, {})
    assert len(run.complaints(ollama)) == 1
    waited = [hours.since_begin(chat) for chat in ollama.find(*CHATS)]
    assert 2 <= len([time for time in waited if 2000 < time < 9000]) <= 6


@pytest.mark.parametrize("trouble", others_long(["401", "403", "402"], "401", "402"))
def test_a_host_that_needs_a_person_is_left_out(hours, api, hosts, trouble):
    models, wanted = hosts(2), fill(api, 16)
    models[0].script(*CHATS, hours.between(1, DAY, HOPELESS[trouble]), forever=True)
    hours.pace(*models)
    with hours.batch(api, *models) as run:
        pass
    assert_all_well(run, api, wanted)
    assert len(run.complaints(models[0])) == 1
    assert len([c for c in models[0].find(*CHATS) if c.status != 200]) <= 6


# --- A picture that makes a host say what only sick hosts say ---------------------------------


@pytest.mark.parametrize(
    ("status", "number"),
    others_long(
        [(502, 1), (503, 1), (504, 1), (403, 1), (401, 1), (402, 1), (504, 2), (402, 2), (503, 3)],
        *((502, 1), (403, 1), (504, 2), (402, 2), (503, 3)),
    ),
)
def test_one_picture_that_makes_hosts_look_sick_fails_alone(hours, api, hosts, status, number):
    models = hosts(number)
    hours.pace(*models)
    fill(api, 7)
    usual = 2  # seconds, at four a second
    poison = api.add("poison.jpg", picture=POISON)
    for host in models:
        host.script(*CHATS, only(POISON, Reply(status, {"error": "no"})), forever=True)
    with hours.batch(api, *models, "--unavailable-duration", "60") as run:
        pass
    assert (run.counts, run.code, run.fatal) == ({"described": 7, "failed": 1}, 1, "")
    assert len(asked_about(POISON, *models)) == 3
    assert max(hours.written(api).values()) <= usual + 10
    assert len(run.lines("poison.jpg")) == 1
    assert failure_notes(api).keys() == {poison}


@pytest.mark.parametrize("status", [503, 403])
def test_a_service_outlives_a_picture_that_makes_its_host_look_sick(hours, api, ollama, status):
    api.add("poison.jpg", picture=POISON)
    ollama.script(*CHATS, only(POISON, Reply(status, {"error": "no"})), forever=True)
    fill(api, 5)
    with hours.service(api, ollama, *with_health()) as run:
        run.until(95)
        assert run.counts == {"described": 5, "failed": 1}
        assert run.health()[0] == 200
        late = api.add(picture=servers.picture())
        run.until(125)
        assert api.texts()[late] == servers.told(servers.picture())
    assert (run.fatal, len(asked_about(POISON, ollama))) == ("", 3)


@pytest.mark.parametrize(
    "meanwhile", [Reply(503, {"error": "Loading model"}), RESET], ids=["loading", "closed"]
)
def test_a_picture_that_kills_the_server_three_times_fails(hours, api, ollama, meanwhile):
    wanted = fill(api, 8)
    poison = api.add("poison.jpg", picture=POISON)
    killed: list[float] = []

    def serve(exchange: Exchange) -> Any:
        if killed and hours.time < killed[-1] + 15:
            return meanwhile
        if exchange.path == "/api/chat" and shown(exchange) == POISON:
            killed.append(hours.time)
            return RESET
        return None

    ollama.script(".*", "", serve, forever=True)
    hours.pace(ollama)
    with hours.batch(api, ollama, "--unavailable-duration", "10") as run:
        pass
    assert (run.counts, run.code) == ({"described": 8, "failed": 1}, 1)
    assert api.texts() == wanted | {poison: ""}
    assert 1 <= len(killed) <= 3
    assert failure_notes(api).keys() == {poison}


# --- One text for all pictures ---------------------------------------------------------------

BLIND = "A photograph of a family on a sunny day. Format: Photo"
ASKS = "Please provide the image you would like me to describe."


@pytest.mark.measured
@mainly("database")
@pytest.mark.parametrize("most", [1, 4])
def test_one_text_for_all_pictures_shows_that_a_host_is_blind(hours, library, ollama, most):
    fill(library, 40)
    ollama.answer = lambda *_: BLIND
    hours.pace(ollama)
    with hours.batch(library, ollama, "--max-concurrent", str(most)) as run:
        pass
    assert (run.code, run.counts.get("failed", 0)) == (2, 0)
    texts = Counter(library.texts().values())
    assert texts.keys() == {BLIND, ""}
    assert 1 <= texts[BLIND] <= 1 + most
    assert len(run.complaints(ollama)) == 1
    assert failure_notes(library) == {}


def test_a_host_that_asks_for_the_picture_is_blind(hours, api, ollama):
    fill(api, 40)
    ollama.answer = lambda *_: ASKS
    hours.pace(ollama)
    with hours.batch(api, ollama) as run:
        pass
    assert (run.code, run.counts.get("failed", 0)) == (2, 0)
    assert set(api.texts().values()) == {""}
    assert len(run.complaints(ollama)) == 1
    assert failure_notes(api) == {}


@pytest.mark.parametrize("text", [BLIND, ASKS])
def test_a_blind_host_is_left_out_beside_one_that_sees(hours, api, hosts, text):
    seeing, blind = hosts(2)
    wanted = fill(api, 16)
    blind.answer = lambda *_: text
    hours.pace(seeing, blind)
    with hours.batch(api, seeing, blind) as run:
        pass
    assert (run.code, run.counts) == (0, {"described": 16})
    wrong = [id for id, text in api.texts().items() if text != wanted[id]]
    assert {api.texts()[id] for id in wrong} <= {BLIND}
    assert len(wrong) <= 5
    assert [len(run.complaints(host)) for host in (seeing, blind)] == [0, 1]


@pytest.mark.measured
def test_a_service_whose_only_host_is_blind_goes_on_waiting(hours, api, ollama):
    fill(api, 20)
    ollama.answer = lambda *_: BLIND
    hours.pace(ollama)
    with hours.service(api, ollama, *SELDOM, *with_health()) as run:
        run.until(2 * HOUR + 100)
        assert run.ended is None
        assert run.health()[0] == 503
    assert Counter(api.texts().values())[BLIND] <= 5
    assert len(run.complaints(ollama)) == 1


@mainly("database")
@pytest.mark.parametrize("different", [1, 2])
def test_a_series_that_rightly_gets_one_text_is_described_whole(hours, library, ollama, different):
    ids = [library.add(picture=servers.own_picture(n, "red")) for n in range(20)]
    pictures = {servers.own_picture(n, "red"): n for n in range(20)}

    def answer(image: bytes, _: str) -> str:
        return f"A red square, {pictures[image] % different}." if image in pictures else "A wall."

    ollama.answer = answer
    hours.pace(ollama)
    with hours.batch(library, ollama) as run:
        pass
    assert (run.code, run.counts) == (0, {"described": 20})
    assert library.texts() == {id: f"A red square, {n % different}." for n, id in enumerate(ids)}
    plain = [chat for chat in ollama.find(*CHATS) if shown(chat) not in pictures]
    assert len(plain) == different
    assert run.complaints(ollama) == []


# --- Hosts that can never answer -------------------------------------------------------------

NEVER: dict[str, Any] = {
    "busy": Reply(503, {"error": "server overloaded"}),
    "loading": Reply(503, {"error": "Loading model"}, {"Retry-After": "5"}),
    "a page": Reply(200, "<html><body>Sign in</body></html>"),
    "too big": Reply(500, {"error": "model requires more system memory (9 GiB) than is available"}),
    "no model is loaded": Reply(400, {"error": "No models loaded"}),
    "silence": Hours.hang,
    "closed": RESET,
}


@pytest.mark.parametrize(
    ("begin", "number", "trouble"),
    others_long(
        [(*since, trouble) for since in ((0, 1), (2, 2)) for trouble in NEVER],
        *(
            (*since, trouble)
            for since, trouble in zip(cycle(((0, 1), (2, 2))), NEVER, strict=False)
        ),
    ),
)
def test_a_batch_ends_when_no_host_was_usable_for_long_enough(
    hours, api, hosts, begin, number, trouble
):
    models, reply = hosts(number), NEVER[trouble]
    reply = hours.hang if reply is Hours.hang else reply
    fill(api, 24 if begin else 6)
    for host in models:
        host.script(*CHATS, hours.between(begin, 10 * DAY, reply), forever=True)
    hours.pace(*models)
    with hours.batch(api, *models, "--wait-timeout", "300", "--timeout", "30") as run:
        pass
    assert run.code == 2
    last = max(hours.written(api).values(), default=0)
    assert last + 290 <= run.ended <= last + 400
    assert len(run.lines(level="CRITICAL")) == 1
    assert (run.counts.get("failed", 0), failure_notes(api)) == (0, {})


def test_with_no_limit_a_batch_waits_for_its_host(hours, api, ollama):
    wanted = fill(api, 3)
    ollama.script(*CHATS, hours.between(0, DAY / 2, NEVER["busy"]), forever=True)
    argv = ["--wait-timeout", "0", "--unavailable-duration", "1000"]
    with hours.batch(api, ollama, *argv) as run:
        run.end(DAY)
    assert_all_well(run, api, wanted)
    assert DAY / 2 <= run.ended <= DAY / 2 + 1100


# --- A host that hangs -----------------------------------------------------------------------


def test_a_host_that_hangs_costs_the_photos_in_its_hands_one_timeout(hours, api, hosts):
    good, stuck = hosts(2)
    wanted = fill(api, 20)
    stuck.script(*CHATS, hours.between(1, DAY, hours.hang), forever=True)
    hours.pace(good, stuck)
    with hours.batch(api, good, stuck, "--timeout", "20", "--max-concurrent", "8") as run:
        pass
    assert_all_well(run, api, wanted)
    ids = {
        picture: id for id, picture in zip(wanted, map(servers.own_picture, range(20)), strict=True)
    }
    waited = [
        hours.written(api)[ids[shown(chat)]] - hours.since_begin(chat)
        for chat in stuck.find(*CHATS)
        if chat.answered is None and shown(chat) in ids
    ]
    assert 1 <= len(waited) <= 4
    assert max(waited) <= 20 + 5
    assert len(run.complaints(stuck)) == 1


# --- A host with a queue ---------------------------------------------------------------------


def in_turn(host: FakeOllama, hours: Hours, seconds: float, at_once: int = 1) -> list[int]:
    """Let a host work on so many requests at a time, as OLLAMA_NUM_PARALLEL does.

    The others wait and hear nothing. How many of them were there with each request is kept.
    """
    free, usual, waiting = [0.0] * at_once, host.answer, []

    def answer(image: bytes, prompt: str) -> Any:
        waiting.append(host.in_flight)
        begin = max(hours.time, min(free))
        if begin < hours.time + hours.patience:
            free[free.index(min(free))] = begin + seconds
        hours.takes(begin - hours.time)
        hours.patience = float("inf")  # its words come, slowly
        hours.takes(seconds)
        return usual(image, prompt)

    host.answer = answer
    return waiting


@pytest.mark.measured
@pytest.mark.parametrize(("at_once", "fits"), others_long([(1, 2), (2, 4)], (1, 2)))
def test_a_host_that_lets_requests_wait_gets_fewer_at_a_time(hours, api, ollama, at_once, fits):
    """Some wait too long and cost no photo a try; from time to time one more is tried again."""
    wanted = fill(api, 60)
    there = in_turn(ollama, hours, 14, at_once)
    with hours.batch(api, ollama, "--timeout", "25", "--max-concurrent", "6") as run:
        run.end(4 * HOUR)
    assert_all_well(run, api, wanted)
    assert run.complaints(ollama) == []
    assert there[:6] == [1, 2, 3, 4, 5, 6]
    later = Counter(there[10:])
    assert max(later) == fits + 1
    assert later[fits] > 40
    assert 2 <= later[fits + 1] <= 8
    assert run.ended <= 60 / at_once * 14 + 10


@pytest.mark.parametrize(
    ("at_once", "status", "pause"),
    others_long(
        [(n, status, pause) for n in (1, 2) for status in (503, 429) for pause in ("", "2")],
        *((1, 503, ""), (2, 429, "2")),
    ),
)
def test_a_host_that_refuses_the_surplus_costs_no_photo(hours, api, ollama, at_once, status, pause):
    wanted, there = fill(api, 24), []

    def serve(_: Exchange) -> Reply | None:
        there.append(ollama.in_flight)
        if ollama.in_flight > at_once:
            return Reply(status, {"error": "server busy"}, {"Retry-After": pause} if pause else {})
        return None

    ollama.script(*CHATS, serve, forever=True)
    hours.pace(ollama)
    with hours.batch(api, ollama, "--max-concurrent", "4", "--max-retries", "2") as run:
        pass
    assert_all_well(run, api, wanted)
    assert failure_notes(api) == {}
    assert Counter(there[6:])[at_once] >= 15
    assert len([number for number in there if number > at_once]) <= 6
    assert run.ended <= 24 / at_once + 10


def test_a_host_that_refused_all_for_a_time_gets_as_many_as_before(hours, api, ollama):
    wanted = fill(api, 16)
    refused = hours.slow(0.5, Reply(503, {"error": "Loading model"}))  # several at a time
    ollama.script(*CHATS, hours.between(0, 20, refused), forever=True)
    hours.pace(ollama)
    with hours.batch(api, ollama, "--max-concurrent", "4") as run:
        pass
    assert_all_well(run, api, wanted)
    assert run.ended <= 2 * 20 + 16 / 4 + 5


@pytest.mark.parametrize("number", others_long([1, 2, 3, 4], 1, 3))
def test_a_picture_that_hangs_its_whole_host_costs_no_other(hours, api, hosts, number):
    """What the host was asked before is answered meanwhile, as in a queue."""
    models, wanted = hosts(number), fill(api, 8)
    poison = api.add("poison.jpg", picture=POISON)
    pictures = [servers.own_picture(100 + n) for n in range(12)]
    wanted |= {api.add(picture=picture): servers.told(picture) for picture in pictures}
    for host in models:
        until = [0.0]

        def serve(chat: Exchange, until: list[float] = until) -> None:
            if shown(chat) == POISON:
                until[0] = hours.time + 20
            if hours.time < until[0]:
                hours.takes(float("inf"))

        host.script(*CHATS, serve, forever=True)
    hours.pace(*models)
    argv = ["--timeout", "20", "--max-concurrent", str(4 * number)]
    with hours.batch(api, *models, *argv) as run:
        pass
    assert (run.counts, run.code) == ({"described": 20, "failed": 1}, 1)
    assert api.texts() == wanted | {poison: ""}
    assert 3 <= len(asked_about(POISON, *models)) <= 6


def test_a_host_with_too_much_to_do_is_not_left_idle(hours, api, ollama):
    """While a model is loaded, Ollama refuses what does not fit into its queue."""
    wanted = fill(api, 8)

    def serve(chat: Exchange) -> Reply | None:
        if hours.time < 40 and ollama.in_flight > 2:
            return Reply(503, {"error": "server busy, please try again."})
        if hours.time < 40:
            hours.takes(40 - hours.time)
        return None

    ollama.script(*CHATS, serve, forever=True)
    hours.pace(ollama)
    with hours.batch(api, ollama) as run:
        pass
    assert_all_well(run, api, wanted)
    assert run.ended <= 50
