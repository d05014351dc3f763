"""A picture goes to a model host and a description comes back, whatever the host makes of it."""

import base64
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import servers
from conftest import FakeStop
from servers import HANG, RESET, Answer, Reply
from test_stream import photo

import immich_analyze as ia

ALIVE = {"ollama": "/api/version", "llamacpp": "/health"}
CHAT = {"ollama": "/api/chat", "llamacpp": "/v1/chat/completions"}
JPEG = servers.own_picture(1)
PICTURE = ia.prepared(JPEG, 0)
BUSY, BROKEN, REFUSED = Reply(503), Reply(500), Reply(401)


@pytest.fixture(params=CHAT)
def fake(request):
    """A fake of each model server, called `interface`, whose chat is at `chat`."""
    server = request.getfixturevalue(request.param)
    server.interface, server.chat = request.param, CHAT[request.param]
    return server


@pytest.fixture
def second(fake):
    """Another server of the same kind."""
    with type(fake)() as server:
        yield server
    server.check()


class Persistent(ia.Ai):
    """Tries a picture again as the pipeline does."""

    def describe(self, picture):
        job, question = ia.Job(photo(1)), self.question(picture)
        state = SimpleNamespace(config=self._config, hosts=self._hosts)
        while True:
            try:
                last = job.tries + 1 >= ia.most_tries(self._config)
                return super().describe(question, job.failed_at, last=last)
            except ia.HostDown:
                raise
            except (ia.Retryable, ia.Permanent) as error:
                if not ia.try_soon(job, error, state):
                    raise
            if job.pause and self._stop.wait(job.pause):
                raise ia.Stopped("stopped")


@pytest.fixture
def make(config, stop):
    """Makes an Ai, and what it shares with others, for these servers."""
    opened = []

    def new(*fakes, argv=(), like=None, at=None, stop=stop):
        hosts = at or ",".join(server.url for server in fakes)
        interface = getattr(fakes[0], "interface", "ollama")
        known = ("--interface", interface, "--model-name", "tiny-vlm", "--hosts", hosts)
        settings = config(*known, *argv)
        shared = like._hosts if like else hosts_of(settings, stop)
        opened.append(Persistent(settings, shared, stop))
        return opened[-1]

    yield new
    for one in opened:
        one.close()


def hosts_of(settings, stop):
    rest = settings.unavailable_duration
    return ia.Hosts(settings.hosts, settings.max_concurrent, rest, stop.clock)


def error_of(call, *args):
    """The error as (class, key), and itself; not its frames: they hold connections."""
    try:
        call(*args)
    except ia.AnalyzeError as raised:
        error = raised.with_traceback(None)
        return (type(error), error.key), error
    return pytest.fail("no error")


GOOD = ia.good_picture().base64  # which hosts are shown that a picture failed at


def requests(server):
    """The questions, but for those about the good picture."""
    asked = server.find("POST", CHAT[server.interface])
    return [exchange.json for exchange in asked if GOOD not in exchange.data]


# The question


def body(interface, picture=JPEG, mime="image/jpeg", tokens=4096, prompt=ia.PROMPT, think=False):
    """The whole body of a question."""
    encoded = base64.b64encode(picture).decode()
    if interface == "ollama":
        return {
            "model": "tiny-vlm",
            "messages": [{"role": "user", "content": prompt, "images": [encoded]}],
            "stream": False,
            "options": {"num_predict": tokens},
            "think": think,
        }
    image = {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{encoded}"}}
    content = [{"type": "text", "text": prompt}, image]
    return {
        "model": "tiny-vlm",
        "messages": [{"role": "user", "content": content}],
        "stream": False,
        "max_tokens": tokens,
        "chat_template_kwargs": {"enable_thinking": think},
    }


def test_a_picture_is_described_by_one_request(fake, make):
    assert make(fake).describe(PICTURE) == servers.told(JPEG)
    assert requests(fake) == [body(fake.interface)]
    assert fake.asked == [(JPEG, ia.PROMPT)]
    assert len(fake.exchanges) == 1


def test_prompt_and_limit_are_as_set(fake, make):
    argv = ("--prompt", "Что здесь? <|im_end|>\n", "--max-tokens", "17")
    make(fake, argv=argv).describe(PICTURE)
    assert requests(fake) == [body(fake.interface, tokens=17, prompt="Что здесь? <|im_end|>\n")]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_data_uri_names_the_true_type(fake, make, kind):
    data = servers.picture("blue", kind)
    picture = ia.prepared(data, 0)
    sent = base64.b64decode(picture.base64)
    make(fake).describe(picture)
    mime = {"PNG": "image/png", "WEBP": "image/jpeg"}[kind]
    assert requests(fake) == [body(fake.interface, sent, mime)]
    assert servers.colour_of(sent) == "blue"


@pytest.mark.parametrize("argv", [[], ["--think"]])
def test_thinking_is_off_unless_asked_for(config, stop, argv):
    with (
        servers.FakeOllama({"tiny-vlm": ("completion", "vision", "thinking")}) as ollama,
        servers.FakeLlamaCpp(thinks=True) as llamacpp,
    ):
        for interface, server in (("ollama", ollama), ("llamacpp", llamacpp)):
            known = ("--interface", interface, "--model-name", "tiny-vlm", "--hosts", server.url)
            settings = config(*known, *argv)
            with closing(ia.Ai(settings, hosts_of(settings, stop), stop)) as ai:
                assert ai.describe(ai.question(PICTURE), set(), last=False) == servers.told(JPEG)
            [exchange] = server.find("POST", CHAT[interface])
            assert exchange.json == body(interface, think=bool(argv))
            assert ("The user wants" in json.dumps(exchange.reply)) is bool(argv)
            server.check()


NO_SWITCH = {
    "ollama": servers.recorded("ollama", "chat_think_true_unsupported"),
    "llamacpp": Reply(422, {"error": {"message": "Unknown field: chat_template_kwargs"}}),
}


def test_a_host_that_refuses_the_switch_is_asked_without_it_from_then_on(fake, second, make):
    fake.script("POST", fake.chat, NO_SWITCH[fake.interface])
    ai = make(fake, second)
    assert [ai.describe(PICTURE) for _ in range(4)] == [servers.told(JPEG)] * 4
    complete = body(fake.interface)
    plain = {k: v for k, v in complete.items() if k not in ("think", "chat_template_kwargs")}
    assert requests(fake) == [complete, plain, plain]
    assert [exchange.json for exchange in second.find("POST", fake.chat)] == [complete] * 2


def test_what_one_worker_learns_of_the_switch_all_know(fake, make):
    fake.script("POST", fake.chat, NO_SWITCH[fake.interface])
    one = make(fake)
    for ai in (one, make(fake, like=one)):
        assert ai.describe(PICTURE) == servers.told(JPEG)
    assert [question == body(fake.interface) for question in requests(fake)] == [True, False, False]


def test_another_refusal_is_no_matter_of_the_switch(fake, make):
    fake.script("POST", fake.chat, Reply(400, {"error": "Failed to load image or audio file"}))
    found, _ = error_of(make(fake).describe, PICTURE)
    assert found == (ia.Permanent, "picture_refused")
    assert len(requests(fake)) == 1


def test_a_host_that_refuses_a_question_without_the_switch_too_is_not_asked_for_ever(fake, make):
    fake.script("POST", fake.chat, NO_SWITCH[fake.interface], forever=True)
    assert error_of(make(fake).describe, PICTURE)[0] == (ia.Permanent, "picture_refused")
    assert len(requests(fake)) == 2


@pytest.mark.parametrize(
    ("argv", "user", "sent"),
    [
        ([], "", None),
        (["--api-key", "k3y"], "", "Bearer k3y"),
        (["--api-key", "k3y"], "me:pass@", "Bearer k3y"),
        ([], "me:pass@", f"Basic {base64.b64encode(b'me:pass').decode()}"),
    ],
)
def test_the_key_is_sent_as_bearer(fake, make, argv, user, sent):
    ai = make(fake, argv=argv, at=fake.url.replace("http://", f"http://{user}"))
    ai.check()
    ai.describe(PICTURE)
    assert {exchange.headers.get("Authorization") for exchange in fake.exchanges} == {sent}


def test_a_netrc_does_not_replace_the_key(fake, make):
    (Path.home() / ".netrc").write_text("default login me password other\n")
    fake.api_key = "k3y"
    make(fake, argv=["--api-key", "k3y"]).describe(PICTURE)
    assert [e.headers["Authorization"] for e in fake.exchanges] == ["Bearer k3y"]


@pytest.mark.parametrize("written", ["{url}", "{url}/", "{url}{root}", "{url}{root}/"])
def test_an_address_may_end_in_the_interfaces_own_path(fake, make, written):
    root = {"ollama": "/api", "llamacpp": "/v1"}[fake.interface]
    ai = make(fake, at=written.format(url=fake.url, root=root))
    ai.check()
    assert ai.describe(PICTURE) == servers.told(JPEG)


def test_a_server_may_be_below_a_path(make):
    with servers.FakeOllama(prefix="/below") as server:
        ai = make(server)
        ai.check()
        assert ai.describe(PICTURE) == servers.told(JPEG)
    server.check()


# The answer

EMPTY, CUT, REPEATS = "answer_empty", "answer_cut", "answer_repeats"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("<think>So.</think>\nHere is a description: A cat.", "A cat."),
        (servers.thinking("A cat."), "A cat."),
        ("  A \0cat\x1b.\n", "A cat."),
    ],
)
def test_only_the_description_is_kept(fake, make, said, text):
    fake.answer = lambda *_: said
    assert make(fake).describe(PICTURE) == text


@pytest.mark.parametrize(
    ("said", "key"),
    [
        (servers.empty(), EMPTY),
        (servers.cut("A cat sits on"), CUT),
        (Answer("", "Let me think", "length"), CUT),
        ("<think>I never come to", EMPTY),
        ("42", EMPTY),
        ("cat " * 200, REPEATS),
        (HANG, "timed_out"),
        (RESET, "connection_cut"),
        (servers.CUT, "connection_cut"),
        (BROKEN, "host_failed"),
        (Reply(200, "<html>hello</html>"), "not_json"),
        (Reply(200, bytes(5 * 2**20)), "reply_too_large"),
        (Reply(200, "[" * 100_000), "not_json"),
        (Reply(200, None), "not_json"),
        (Reply(200, {}), EMPTY),
        (Reply(200, []), EMPTY),
        (Reply(200, {"message": {"content": None}, "choices": [{"message": None}]}), EMPTY),
        (Reply(200, {"message": "A cat.", "choices": []}), EMPTY),
        (Reply(200, {"message": {"content": ["A cat."]}, "choices": "A cat."}), EMPTY),
    ],
)
def test_a_sick_picture_is_given_up_on_after_three_tries(fake, make, stop, said, key):
    if isinstance(said, str | Answer):
        fake.answer = lambda *_: said
    else:
        fake.script("POST", fake.chat, said, forever=True, unless=GOOD)
    timeout = "0.05" if said is HANG else "5"
    error = error_of(make(fake, argv=["--timeout", timeout]).describe, PICTURE)[0]
    assert error == (ia.Retryable, key)
    assert len(requests(fake)) == 3
    assert stop.waits == [5, 5]


def test_the_limit_is_named_when_an_answer_was_cut(fake, make):
    ai = make(fake, argv=["--max-tokens", "3"])
    error = error_of(ai.describe, PICTURE)[1]
    assert (error.key, error.fields) == (CUT, {"tokens": 3})


@pytest.mark.parametrize("trouble", [BROKEN, RESET, Reply(200, "<html>")])
@pytest.mark.parametrize("times", [1, 2])
def test_a_try_that_works_is_enough(fake, make, stop, trouble, times):
    fake.script("POST", fake.chat, *[trouble] * times)
    ai = make(fake, argv=["--retry-delay-seconds", "1.5"])
    assert ai.describe(PICTURE) == servers.told(JPEG)
    assert len(requests(fake)) == times + 1
    assert stop.waits == [1.5] * times


def test_a_sick_picture_leaves_its_hosts_in_rotation(fake, second, make, stop):
    for server in (fake, second):
        server.interface = fake.interface
        server.script("POST", fake.chat, BROKEN, BROKEN, unless=GOOD)
    ai = make(fake, second)
    assert error_of(ai.describe, PICTURE)[0] == (ia.Retryable, "host_failed")
    assert [len(requests(server)) for server in (fake, second)] == [2, 1]
    assert stop.waits == [5]  # it went to the second one at once


def test_a_picture_that_a_host_fails_on_goes_to_another_at_once(fake, second, make, stop):
    fake.script("POST", fake.chat, BROKEN)
    assert make(fake, second).describe(PICTURE) == servers.told(JPEG)
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [1, 1]
    assert stop.waits == []


def test_a_picture_that_one_host_refuses_goes_to_the_other(fake, second, make, stop):
    for server in (fake, second):
        server.script("POST", fake.chat, Reply(400))
    ai = make(fake, second)
    assert error_of(ai.describe, PICTURE)[0] == (ia.Permanent, "picture_refused")
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [1, 1]
    assert ai.describe(PICTURE) == servers.told(JPEG)
    assert stop.waits == []


def test_a_gone_host_is_probed_only_while_all_rest(fake, second, make, stop):
    """With another one at work, it comes back when its rest is over."""
    second.close()
    ai = make(fake, second)
    for _ in range(3):
        assert ai.describe(PICTURE) == servers.told(JPEG)
    assert stop.waits == []
    second.start()
    stop.now += 61
    ai.describe(PICTURE)
    ai.describe(PICTURE)
    assert [exchange.path for exchange in second.exchanges] == [fake.chat]


@pytest.mark.parametrize("trouble", [Reply(503), Reply(429, None, {"Retry-After": "7"})])
def test_one_that_is_busy_is_not_probed(fake, make, stop, trouble):
    fake.script("POST", fake.chat, trouble)
    assert make(fake).describe(PICTURE) == servers.told(JPEG)
    assert [exchange.path for exchange in fake.exchanges] == [fake.chat] * 2
    assert stop.waits in ([60], [7])


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_picture_is_given_up_on_at_once(fake, make, stop, status):
    fake.script("POST", fake.chat, Reply(status))
    error = error_of(make(fake).describe, PICTURE)[0]
    assert error == (ia.Permanent, "picture_refused")
    assert len(requests(fake)) == 1
    assert stop.waits == []


def test_garbage_is_refused_by_the_real_error(fake, make):
    garbage = ia.Picture("image/jpeg", base64.b64encode(b"garbage"))
    error = error_of(make(fake).describe, garbage)[1]
    assert error.fields == {"url": fake.url + fake.chat, "status": 400, "why": servers.NO_PICTURE}


# Sick hosts


def test_a_sick_host_rests_and_another_is_asked(fake, second, make, stop):
    fake.script("POST", fake.chat, BUSY)
    ai = make(fake, second)
    for _ in range(3):
        assert ai.describe(PICTURE) == servers.told(JPEG)
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [1, 3]
    stop.now += 60
    ai.describe(PICTURE)
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [2, 3]
    assert stop.waits == []


def test_what_one_worker_learns_of_a_host_all_know(fake, second, make):
    fake.script("POST", fake.chat, BUSY)
    one = make(fake, second)
    other = make(fake, second, like=one)
    for ai in (one, other, one, other):
        ai.describe(PICTURE)
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [1, 4]


@pytest.mark.parametrize(
    ("trouble", "waits"),
    [
        ([BUSY], [60]),
        ([BUSY] * 12, [60] * 12),
        ([Reply(429, None, {"Retry-After": "7"}), BUSY], [7, 60]),
        ([BUSY, BROKEN, BUSY, BROKEN], [60, 5, 60, 5]),
    ],
)
def test_a_sick_host_is_waited_for_and_costs_the_picture_nothing(fake, make, stop, trouble, waits):
    fake.script("POST", fake.chat, *trouble)
    assert make(fake).describe(PICTURE) == servers.told(JPEG)
    assert len(requests(fake)) == len(trouble) + 1
    assert stop.waits == waits


def test_a_host_that_is_started_again_is_found(fake, make, stop, monkeypatch):
    ai, wait = make(fake, argv=["--unavailable-duration", "3"]), stop.wait
    fake.close()

    def restart(seconds):
        if len(stop.waits) == 2:
            fake.start()
        return wait(seconds)

    monkeypatch.setattr(stop, "wait", restart)
    assert ai.describe(PICTURE) == servers.told(JPEG)
    assert stop.waits == [ia.PROBE_PAUSE] * 3  # which is sooner than its rest is over
    assert [exchange.path for exchange in fake.exchanges] == [ALIVE[fake.interface], fake.chat]


@pytest.mark.parametrize(
    ("most", "trouble", "expected", "number"),
    [
        (1, BUSY, (ia.HostDown, "host_busy"), 2),
        (3, BUSY, (ia.HostDown, "host_busy"), 4),
        (1, BROKEN, (ia.Retryable, "host_failed"), 2),
        (2, BROKEN, (ia.Retryable, "host_failed"), 3),
        (9, BROKEN, (ia.Retryable, "host_failed"), 3),
    ],
)
def test_max_retries_bounds_both(fake, make, most, trouble, expected, number):
    fake.script("POST", fake.chat, trouble, forever=True, unless=GOOD)
    ai = make(fake, argv=["--max-retries", str(most)])
    assert error_of(ai.describe, PICTURE)[0] == expected
    assert len(requests(fake)) == number


@pytest.mark.parametrize(
    ("trouble", "key"),
    [
        (REFUSED, "host_key_refused"),
        (Reply(403), "host_key_refused"),
        (Reply(404, {"error": "model 'tiny-vlm' not found"}), "model_missing"),
        (Reply(500, {"error": {"message": servers.NO_VISION}}), "model_blind"),
    ],
)
def test_a_host_with_wrong_settings_is_struck_off(fake, second, make, stop, caplog, trouble, key):
    caplog.set_level(logging.ERROR, ia.log.name)
    for server in (fake, second):
        server.script("POST", fake.chat, trouble)
    ai = make(fake, second)
    assert error_of(ai.describe, PICTURE)[0] == (ia.Fatal, key)
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [1, 1]
    assert len(caplog.records) == 1
    assert stop.waits == []


def test_a_struck_host_costs_the_picture_nothing(fake, second, make):
    fake.script("POST", fake.chat, REFUSED)
    second.script("POST", fake.chat, BROKEN, BROKEN)
    ai = make(fake, second)
    assert [ai.describe(PICTURE) for _ in range(2)] == [servers.told(JPEG)] * 2
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [1, 4]


@pytest.mark.parametrize(
    ("trouble", "key"),
    [
        (Reply(404), "host_wrong"),
        (Reply(307, None, {"Location": "https://elsewhere/"}), "redirected"),
    ],
)
def test_what_only_a_proxy_says_lets_the_host_rest(fake, make, stop, trouble, key):
    fake.script("POST", fake.chat, trouble, trouble)
    assert make(fake).describe(PICTURE) == servers.told(JPEG)
    assert stop.waits == [60, 60]


@pytest.mark.parametrize("trouble", [BROKEN, RESET, HANG], ids=["fails", "hangs up", "hangs"])
def test_a_host_that_fails_on_every_picture_rests_and_costs_them_nothing(
    fake, second, make, stop, caplog, trouble
):
    caplog.set_level(logging.WARNING, ia.log.name)
    fake.script("POST", fake.chat, trouble, forever=True)
    ai = make(fake, second, argv=["--timeout", "0.05"] if trouble is HANG else [])
    pictures = [servers.own_picture(number) for number in range(8)]
    told = [ai.describe(ia.prepared(data, 0)) for data in pictures]
    assert told == list(map(servers.told, pictures))
    assert fake.count("POST", fake.chat) == ia.SICK_AFTER + 1  # and a picture that is good
    assert len(caplog.records) == 1


def test_pictures_that_are_all_bad_rest_no_host_and_fail_each_after_three_tries(fake, make, stop):
    behave, good = fake.behave, ia.good_picture().base64.decode()
    error = {"code": 500, "message": "no memory", "type": "server_error"}
    broken = Reply(500, {"error": error if fake.interface == "llamacpp" else "no memory"})
    fake.behave = lambda x: behave(x) if good in json.dumps(x.json) else broken
    ai = make(fake)
    for number in range(5):
        picture = ia.prepared(servers.own_picture(number), 0)
        assert error_of(ai.describe, picture)[0] == (ia.Retryable, "host_failed")
    assert set(stop.waits) == {5}


def test_a_host_that_is_sick_and_alone_is_waited_for(fake, make, stop):
    pictures = [ia.prepared(servers.own_picture(number), 0) for number in range(4)]
    fake.script("POST", fake.chat, *[BROKEN] * (3 + 1 + 3 * 2))
    assert make(fake).describe(pictures[0]) == servers.told(servers.own_picture(0))
    assert stop.waits == [5, 5] + [60] * 4  # three tries, a good picture, and so on


def test_a_picture_that_no_host_can_take_rests_none(fake, make, stop):
    bad = [ia.prepared(servers.own_picture(number), 0) for number in range(8)]
    ai = make(fake)
    for picture in bad:
        fake.script("POST", fake.chat, BROKEN, BROKEN, BROKEN, unless=GOOD)
        assert error_of(ai.describe, picture)[0] == (ia.Retryable, "host_failed")
        assert ai.describe(PICTURE) == servers.told(JPEG)
    assert set(stop.waits) == {5}
    shown = sum(GOOD in exchange.data for exchange in fake.find("POST", fake.chat))
    assert shown == len(bad)  # each before it was given up


# Stopping


@pytest.mark.parametrize(("trouble", "waits"), [(BUSY, [60, 60]), (BROKEN, [5, 5])])
def test_stopping_ends_the_wait(fake, make, trouble, waits):
    fake.script("POST", fake.chat, trouble, forever=True)
    ends = FakeStop(after=2)
    assert error_of(make(fake, stop=ends).describe, PICTURE)[0][0] is ia.Stopped
    assert ends.waits == waits
    assert len(requests(fake)) == 2


def test_nothing_is_asked_once_stopped(fake, make, stop):
    stop.set()
    assert error_of(make(fake).describe, PICTURE)[0][0] is ia.Stopped
    assert fake.exchanges == []


# Several workers


def test_answers_are_not_mixed_up(fake, second, make):
    one = make(fake, second, argv=["--max-concurrent", "3"])
    workers = [make(fake, second, like=one) for _ in range(5)]
    pictures = [servers.own_picture(number) for number in range(40)]

    def work(number):
        mine = pictures[number :: len(workers)]
        return [(data, workers[number].describe(ia.prepared(data, 0))) for data in mine]

    fake.hold()
    with ThreadPoolExecutor(len(workers)) as pool:
        jobs = [pool.submit(work, number) for number in range(len(workers))]
        fake.wait_for()
        fake.gate.set()
        told = dict(pair for job in jobs for pair in job.result())
    assert told == {data: servers.told(data) for data in pictures}
    asked = [data for server in (fake, second) for data, _ in server.asked]
    assert sorted(asked) == sorted(pictures)
    assert fake.most_in_flight + second.most_in_flight <= 2 * 3


def test_no_more_requests_at_a_time_than_allowed(fake, make):
    one = make(fake, argv=["--max-concurrent", "2"])
    workers = [make(fake, like=one) for _ in range(4)]
    fake.hold()
    with ThreadPoolExecutor(len(workers)) as pool:
        jobs = [pool.submit(ai.describe, PICTURE) for ai in workers]
        fake.wait_for(2)
        fake.gate.set()
    assert [job.result() for job in jobs] == [servers.told(JPEG)] * 4
    assert fake.most_in_flight == 2


# The check at the start


def test_a_host_with_the_model_is_asked_once(fake, second, make, stop):
    ai = make(fake, second)
    ai.check()
    asked = {"ollama": ("POST", "/api/show"), "llamacpp": ("GET", "/v1/models")}[fake.interface]
    for server in (fake, second):
        assert [(e.method, e.path) for e in server.exchanges] == [asked]
    assert stop.waits == []


SHOW, MODELS, PROPS = "/api/show", "/v1/models", "/props"


@pytest.mark.parametrize("shown", [{}, {"details": {}}, {"capabilities": None}, [], "null"])
def test_an_ollama_that_does_not_tell_is_believed(ollama, make, shown):
    ollama.script("POST", SHOW, Reply(200, shown))
    make(ollama).check()
    assert len(ollama.exchanges) == 1


def model(name, **more):
    return {"id": name, "object": "model", **more}


LLAMA = {"owned_by": "llamacpp"}


def with_modalities(*modalities):
    return {"architecture": {"input_modalities": list(modalities)}}


@pytest.mark.parametrize(
    ("listed", "props", "key"),
    [
        ({"data": [model("other", **LLAMA, **with_modalities("text", "image"))]}, None, None),
        ({"data": [model("x", **LLAMA, **with_modalities("text"))]}, None, "model_blind"),
        ({"data": [model("x", **LLAMA)]}, {"modalities": {"vision": True}}, None),
        ({"data": [model("x", **LLAMA)]}, {"modalities": {"vision": False}}, "model_blind"),
        ({"data": [model("x", **LLAMA)]}, {"modalities": None}, None),
        ({"data": [model("x", **LLAMA)]}, [], None),
        ({"data": [model("tiny-vlm"), model("other")]}, None, None),
        ({"data": [model("tiny-vlm", **with_modalities("text"))]}, None, "model_blind"),
        ({"data": [model("other"), model("another")]}, None, "model_not_listed"),
        ({"data": [model("other", owned_by="vllm")]}, None, "model_not_listed"),
        ({"data": [model("other", aliases=["tiny-vlm"]), model("third")]}, None, None),
        ({"data": [model("other", aliases="tiny-vlm")]}, None, "model_not_listed"),
        ({"data": []}, None, None),
        ({"data": None}, None, None),
        ({"data": {"tiny-vlm": {}}}, None, None),
        ({}, None, None),
        ([], None, None),
        ("null", None, None),
    ],
)
def test_what_an_openai_like_server_lists_decides(config, stop, listed, props, key):
    with servers.FakeServer() as server:
        server.script("GET", MODELS, Reply(200, listed))
        server.script("GET", PROPS, Reply(200, props))
        known = ("--interface", "llamacpp", "--model-name", "tiny-vlm", "--hosts", server.url)
        settings = config(*known)
        with closing(ia.Ai(settings, hosts_of(settings, stop), stop)) as ai:
            if key:
                assert error_of(ai.check)[0] == (ia.Fatal, key)
            else:
                ai.check()
        assert server.count("GET", PROPS) == (props is not None)


SEES = ("completion", "vision")


@pytest.mark.parametrize(
    ("kind", "options", "key"),
    [
        (servers.FakeOllama, {"models": {"other": SEES}}, "model_missing"),
        (servers.FakeOllama, {"models": {"tiny-vlm": SEES[:1]}}, "model_blind"),
        (servers.FakeOllama, {"api_key": "k3y"}, "host_key_refused"),
        (servers.FakeLlamaCpp, {"models": ["other", "another"]}, "model_not_listed"),
        (servers.FakeLlamaCpp, {"vision": False}, "model_blind"),
        (servers.FakeLlamaCpp, {"api_key": "k3y"}, "host_key_refused"),
    ],
)
@pytest.mark.parametrize("argv", [[], ["--api-key", "wr0ng"]])
def test_what_cannot_work_is_told_at_the_start(make, kind, options, key, argv):
    with kind(**options) as server:
        server.interface = "llamacpp" if kind is servers.FakeLlamaCpp else "ollama"
        found, error = error_of(make(server, argv=argv).check)
    assert found == (ia.Fatal, key)
    assert len(server.exchanges) == 1
    assert "wr0ng" not in f"{error} {error.fields}"
    server.check()


@pytest.mark.parametrize("interface", CHAT)
def test_the_wrong_interface_is_told_at_the_start(make, llamacpp, interface):
    with servers.FakeServer() as server:
        if interface == "llamacpp":
            server.script("GET", MODELS, servers.recorded("ollama", "unknown_route"))
        wrong = llamacpp if interface == "ollama" else server
        wrong.interface = interface
        found, error = error_of(make(wrong).check)
    assert found == (ia.HostDown, "no_host")
    assert ia.t("host_wrong", url="", status=404).split(" (")[0].strip() in str(error)


@pytest.mark.parametrize("status", [400, 422])
def test_a_check_that_is_refused_ends_in_one_line(fake, make, status):
    fake.script(".*", "", Reply(status, {"error": "invalid model name"}))
    found, error = error_of(make(fake).check)
    assert found[0] is ia.Fatal
    assert "invalid model name" in str(error)


@pytest.mark.parametrize(
    "trouble",
    [None, HANG, RESET, BROKEN, Reply(200, "<html>")],
    ids=["away", "hangs", "hangs up", "fails", "says no JSON"],
)
def test_no_host_at_all_ends_it(fake, second, make, stop, monkeypatch, trouble):
    monkeypatch.setattr(ia, "CHECK_TIMEOUT", 0.05)
    ai = make(fake, second)
    for server in (fake, second):
        if trouble:
            server.script(".*", "", trouble, forever=True)
        else:
            server.close()
    found, error = error_of(ai.check)
    assert found == (ia.HostDown, "no_host")
    assert [str(error).count(server.url) for server in (fake, second)] == [1, 1]
    assert [len(server.exchanges) for server in (fake, second)] == [bool(trouble)] * 2
    assert stop.waits == []


@pytest.mark.parametrize("trouble", [RESET, BROKEN])
def test_one_host_that_is_away_rests(fake, second, make, stop, trouble):
    fake.script(".*", "", trouble)
    ai = make(fake, second)
    ai.check()
    ai.describe(PICTURE)
    ai.describe(PICTURE)
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [0, 2]
    stop.now += 60
    ai.describe(PICTURE)
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [1, 2]


def test_a_host_that_is_busy_at_the_start_is_there(fake, make, stop):
    fake.script(".*", "", BUSY)
    ai = make(fake)
    ai.check()
    assert ai.describe(PICTURE) == servers.told(JPEG)
    assert stop.waits == []


def test_a_model_that_still_loads_is_there(llamacpp, make):
    llamacpp.interface, llamacpp.loading = "llamacpp", True
    make(llamacpp).check()


def test_one_host_that_cannot_work_is_left_out(fake, second, make, caplog):
    caplog.set_level(logging.ERROR, ia.log.name)
    fake.script(".*", "", REFUSED)
    ai = make(fake, second)
    ai.check()
    assert [ai.describe(PICTURE) for _ in range(2)] == [servers.told(JPEG)] * 2
    assert [server.count("POST", fake.chat) for server in (fake, second)] == [0, 2]
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("first", "then"), [(REFUSED, BROKEN), (BROKEN, REFUSED)])
def test_one_host_away_and_the_other_wrong_ends_it(fake, second, make, first, then):
    fake.script(".*", "", first)
    second.script(".*", "", then)
    assert error_of(make(fake, second).check)[0] == (ia.HostDown, "no_host")
