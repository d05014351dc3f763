"""A picture goes to a model host and a description comes back, whatever the host makes of it."""

import base64
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from itertools import cycle, pairwise, product
from typing import Any

import pytest
import servers
from hours import BEGIN, Stop
from servers import CUT, RESET, Exchange, FakeServer, Reply, Stream
from worlds import PROMPT, others_long

import immich_analyze as ia

pytestmark = pytest.mark.slow

ALIVE = {"ollama": "/api/version", "llamacpp": "/health"}
CHAT = {"ollama": "/api/chat", "llamacpp": "/v1/chat/completions"}
JPEG = servers.own_picture(1)
PICTURE = ia.prepared(JPEG, 0)
BUSY, BROKEN, REFUSED = Reply(503), Reply(500), Reply(401)
WELL = [None]


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
        server.interface, server.chat = fake.interface, fake.chat
        yield server
    server.check()


class Model(ia.Ai):
    """What describes pictures, and the hosts that it shares with others."""

    def __init__(self, settings: ia.Config, hosts: ia.Hosts, stop: ia.Stop) -> None:
        super().__init__(settings, hosts, stop)
        self.hosts, self.stop = hosts, stop

    def describe(self, picture=PICTURE, check=lambda: None) -> str:
        return super().describe(ia.Question(self._config.prompt, (picture,)), check).text

    def troubles(self) -> list[str | None]:
        """What is wrong with each host, as a key."""
        return [host.why and host.why.key for host in self.hosts.seen()]


@pytest.fixture
def make(config, hours):
    """Makes a Model for these servers, in invented time."""
    with ExitStack() as opened:

        def new(*fakes, argv=(), like=None, at=None, lasts=False) -> Model:
            urls = at or ",".join(server.url for server in fakes)
            interface = getattr(fakes[0], "interface", "ollama")
            known = ("--interface", interface, "--model-name", "tiny-vlm", "--hosts", urls)
            settings = config(*known, *argv)
            places, rest = settings.max_concurrent, settings.unavailable_duration
            hosts = like.hosts if like else ia.Hosts(settings.hosts, places, rest, lasts=lasts)
            stop = like.stop if like else Stop(hours)
            return opened.enter_context(closing(Model(settings, hosts, stop)))

        yield new


def error_of(call: Callable[..., Any], *args: Any) -> tuple[tuple[type, str], ia.AnalyzeError]:
    """The error as (class, key), and itself; not its frames: they hold connections."""
    try:
        call(*args)
    except ia.AnalyzeError as raised:
        error = raised.with_traceback(None)
        return (type(error), error.key), error
    return pytest.fail("no error")


def chats(*fakes: FakeServer) -> list[Exchange]:
    """All questions, in their order."""
    found = [x for server in fakes for x in server.find("POST", "/api/chat|/v1/chat/completions")]
    return sorted(found, key=lambda exchange: exchange.at)


def about(picture: ia.Picture, *fakes: FakeServer) -> list[Exchange]:
    """The questions about a picture."""
    return [exchange for exchange in chats(*fakes) if picture.base64 in exchange.data]


def times(exchanges: list[Exchange]) -> list[float]:
    """When requests came, in seconds since the test began."""
    return [(exchange.at - BEGIN) / timedelta(seconds=1) for exchange in exchanges]


def only(picture: ia.Picture, reply: Any) -> Callable[[Exchange], Any]:
    """For `script`: this reply to one picture, the usual one to all else."""

    def choose(exchange: Exchange) -> Any:
        if picture.base64 not in exchange.data:
            return None
        return reply(exchange) if callable(reply) else reply

    return choose


# --- The question ----------------------------------------------------------------------------


def body(interface, picture=JPEG, tokens=4096, prompt=PROMPT, think=False):
    """The whole body of a question."""
    encoded = base64.b64encode(picture).decode()
    if interface == "ollama":
        return {
            "model": "tiny-vlm",
            "messages": [{"role": "user", "content": prompt, "images": [encoded]}],
            "stream": True,
            "options": {"num_predict": tokens},
            "think": think,
        }
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
    content = [{"type": "text", "text": prompt}, image]
    return {
        "model": "tiny-vlm",
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "chat_template_kwargs": {"enable_thinking": think},
        **({} if think else {"reasoning_effort": "none"}),
    }


def test_a_picture_is_described_by_one_request(fake, make):
    assert make(fake).describe() == servers.told(JPEG)
    [exchange] = fake.exchanges
    assert (exchange.path, exchange.json) == (fake.chat, body(fake.interface))
    assert fake.asked == [(JPEG, PROMPT)]


def test_prompt_and_limit_are_as_set(fake, make):
    argv = ("--prompt", "Что здесь? <|im_end|>\n", "--max-tokens", "17")
    make(fake, argv=argv).describe()
    [exchange] = fake.exchanges
    assert exchange.json == body(fake.interface, tokens=17, prompt="Что здесь? <|im_end|>\n")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_every_picture_is_sent_as_a_jpeg(fake, make, kind):
    picture = ia.prepared(servers.picture("blue", kind), 0)
    sent = base64.b64decode(picture.base64)
    make(fake).describe(picture)
    [exchange] = fake.exchanges
    assert exchange.json == body(fake.interface, sent)
    assert servers.colour_of(sent) == "blue"


@pytest.mark.parametrize("argv", [[], ["--think"]])
def test_thinking_is_off_unless_asked_for(make, argv):
    with (
        servers.FakeOllama({"tiny-vlm": ("completion", "vision", "thinking")}) as ollama,
        servers.FakeLlamaCpp(thinks=True) as llamacpp,
    ):
        for interface, server in (("ollama", ollama), ("llamacpp", llamacpp)):
            server.interface = interface
            assert make(server, argv=argv).describe() == servers.told(JPEG)
            [exchange] = chats(server)
            assert exchange.json == body(interface, think=bool(argv))
            assert ("The user wants" in json.dumps(exchange.reply)) is bool(argv)
            server.check()


NO_SWITCH = {
    "ollama": servers.recorded("ollama", "chat_think_true_unsupported"),
    "llamacpp": Reply(422, {"error": {"message": "Unknown field: chat_template_kwargs"}}),
}


def plain_body(interface: str, think: bool = False) -> dict[str, Any]:
    """A question without the switch for thinking."""
    complete = body(interface, think=think)
    return {k: v for k, v in complete.items() if k not in ("think", "chat_template_kwargs")}


def test_a_host_that_refuses_the_switch_is_asked_without_it_from_then_on(fake, second, make):
    fake.script("POST", fake.chat, NO_SWITCH[fake.interface])
    model = make(fake, second)
    assert [model.describe() for _ in range(4)] == [servers.told(JPEG)] * 4
    complete, plain = body(fake.interface), plain_body(fake.interface)
    assert [exchange.json for exchange in chats(fake)] == [complete, plain, plain]
    assert [exchange.json for exchange in chats(second)] == [complete] * 2


def test_what_one_worker_learns_of_the_switch_all_know(fake, make):
    fake.script("POST", fake.chat, NO_SWITCH[fake.interface])
    one = make(fake)
    for model in (one, make(fake, like=one)):
        assert model.describe() == servers.told(JPEG)
    complete, plain = body(fake.interface), plain_body(fake.interface)
    assert [exchange.json for exchange in chats(fake)] == [complete, plain, plain]


def refuses(*names: str, words: str = "", status: int = 400) -> Callable[[Exchange], Reply | None]:
    """Refuses questions with one of these parameters, in such words."""

    def choose(exchange: Exchange) -> Reply | None:
        found = [name for name in names if name in exchange.json]
        return Reply(status, json.loads(words.replace("NAME", found[0]))) if found else None

    return choose


NAMED = [
    '{"error": {"message": "Unknown parameter.", "param": "NAME"}}',
    '{"error": "unknown field \\"NAME\\""}',
    '{"detail": [{"type": "extra_forbidden", "loc": ["body", "NAME"], "msg": "Not so"}]}',
    '[{"error": {"message": "Extra inputs: NAME"}}]',
    '{"errors": [{"message": "NAME?"}]}',
    '{"message": ["property NAME should not exist"], "error": "Bad Request"}',
]
SWITCHES = ["chat_template_kwargs", "reasoning_effort", "stream_options"]
REFUSALS = [400, 422, 500]


@pytest.mark.parametrize(
    ("name", "words", "status"),
    others_long(
        product(SWITCHES, NAMED, REFUSALS),
        *((*case, status) for case, status in zip(product(SWITCHES, NAMED), cycle(REFUSALS))),
    ),
)
def test_what_a_host_refuses_is_left_out_wherever_it_names_it(make, llamacpp, name, words, status):
    llamacpp.interface = "llamacpp"
    llamacpp.script(
        "POST", CHAT["llamacpp"], refuses(name, words=words, status=status), forever=True
    )
    model = make(llamacpp)
    for _ in range(2):
        assert model.describe() == servers.told(JPEG)
    complete = body("llamacpp")
    rest = {key: value for key, value in complete.items() if key != name}
    assert [exchange.json for exchange in chats(llamacpp)] == [complete, rest, rest]


def test_all_that_asks_for_thinking_is_left_out_where_a_host_names_none_of_it(make, llamacpp):
    llamacpp.interface = "llamacpp"
    words = '{"error": "\\"tiny-vlm\\" does not support thinking"}'
    refusal = refuses("reasoning_effort", "chat_template_kwargs", words=words)
    llamacpp.script("POST", CHAT["llamacpp"], refusal, forever=True)
    argv = ["--think", "--model-options", '{"reasoning_effort": "high"}']
    assert make(llamacpp, argv=argv).describe() == servers.told(JPEG)
    complete = body("llamacpp", think=True) | {"reasoning_effort": "high"}
    assert [exchange.json for exchange in chats(llamacpp)] == [
        complete,
        plain_body("llamacpp", think=True),
    ]


def test_each_of_several_that_a_host_refuses_is_left_out(make, llamacpp):
    llamacpp.interface = "llamacpp"
    names = ("chat_template_kwargs", "reasoning_effort", "stream_options")
    refusal = refuses(*names, words='{"error": {"message": "Unrecognized argument: NAME"}}')
    llamacpp.script("POST", CHAT["llamacpp"], refusal, forever=True)
    assert make(llamacpp).describe() == servers.told(JPEG)
    assert len(chats(llamacpp)) == 4
    assert not set(names) & chats(llamacpp)[-1].json.keys()


@pytest.mark.parametrize(
    "words",
    [
        "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.",
        "max_tokens: Extra inputs are not permitted",
    ],
)
@pytest.mark.parametrize(
    ("argv", "limit"),
    [([], body("llamacpp")["max_tokens"]), (["--model-options", '{"max_tokens": 700}'], 700)],
)
def test_a_server_that_wants_the_newer_name_of_the_limit_gets_it(
    make, llamacpp, words, argv, limit
):
    llamacpp.interface = "llamacpp"
    refusal = refuses("max_tokens", words=json.dumps({"error": {"message": words}}))
    llamacpp.script("POST", CHAT["llamacpp"], refusal, forever=True)
    model = make(llamacpp, argv=argv)
    for _ in range(2):
        assert model.describe() == servers.told(JPEG)
    asked = body("llamacpp") | {"max_tokens": limit}
    newer = dict(asked)
    newer["max_completion_tokens"] = newer.pop("max_tokens")
    assert [exchange.json for exchange in chats(llamacpp)] == [asked, newer, newer]


# The context


def context_of(own: int, needed: int) -> Callable[[Exchange], Reply | None]:
    """An Ollama with such a context, for pictures that need so much."""
    why = f"request ({needed} tokens) exceeds the available context size ({own} tokens)"
    inner = {"code": 400, "message": why, "type": "exceed_context_size_error"}
    nested = json.dumps({"error": inner | {"n_prompt_tokens": needed, "n_ctx": own}})

    def choose(exchange: Exchange) -> Reply | None:
        has = min(exchange.json["options"].get("num_ctx", own), 2 * own)
        return Reply(400, {"error": nested}) if has < needed else None

    return choose


@pytest.mark.parametrize(
    ("needed", "argv", "asked"),
    [
        (4867, [], [None, 12288, 12288]),
        (4867, ["--max-tokens", "100"], [None, 8192, 8192]),
        (8092, ["--max-tokens", "100"], [None, 8192, 8192]),
        (8093, ["--max-tokens", "100"], [None, 12288, 12288]),
        (4867, ["--context-length", "16384"], [16384, 16384]),
        (3000, ["--context-length", "2048"], [2048, 8192, 8192]),
        (900, [], [None, None]),
    ],
)
def test_a_context_too_small_is_asked_for_larger_from_then_on(make, ollama, needed, argv, asked):
    ollama.script("POST", "/api/chat", context_of(4096, needed), forever=True)
    one = make(ollama, argv=argv)
    for model in (one, make(ollama, like=one, argv=argv)):
        assert model.describe() == servers.told(JPEG)
    assert [chat.json["options"].get("num_ctx") for chat in chats(ollama)] == asked


def test_an_answer_that_fills_the_context_is_made_again_in_a_larger_one(make, ollama):
    def full(exchange: Exchange) -> Reply | None:
        if exchange.json["options"].get("num_ctx", 4096) > 4096:
            return None
        cut = line("A", done="length", eval_count=3000, prompt_eval_count=1096)
        return Reply(200, ndjson(line("A"), cut))

    ollama.script("POST", "/api/chat", full, forever=True)
    assert make(ollama).describe() == servers.told(JPEG)
    assert [chat.json["options"].get("num_ctx") for chat in chats(ollama)] == [None, 8192]


def test_a_context_that_cannot_be_larger_is_asked_for_once(make, ollama):
    refusal = context_of(10**6, 10**7)
    ollama.script("POST", "/api/chat", only(PICTURE, refusal), forever=True)
    model = make(ollama)
    assert error_of(model.describe)[0] == (ia.Permanent, "picture_refused")
    assert len(about(PICTURE, ollama)) == 4
    assert model.troubles() == WELL


# Further parameters

OPTIONS = {"temperature": 0.2, "seed": 7}


def test_further_parameters_are_sent_where_they_belong(fake, make):
    argv = ["--model-options", json.dumps(OPTIONS)]
    make(fake, argv=argv).describe()
    usual = body(fake.interface)
    wanted = usual | OPTIONS
    if fake.interface == "ollama":
        wanted = usual | {"options": usual["options"] | OPTIONS}
    assert [chat.json for chat in chats(fake)] == [wanted]


def test_how_long_ollama_keeps_a_model_is_no_option_of_it(ollama, make):
    make(ollama, argv=["--model-options", '{"keep_alive": "2h", "top_k": 3}']).describe()
    usual = body("ollama")
    wanted = usual | {"keep_alive": "2h", "options": usual["options"] | {"top_k": 3}}
    assert [chat.json for chat in chats(ollama)] == [wanted]


def test_another_refusal_is_no_matter_of_the_switch(fake, make):
    refusal = Reply(400, {"error": "Failed to load image or audio file"})
    fake.script("POST", fake.chat, only(PICTURE, refusal), forever=True)
    model = make(fake)
    assert error_of(model.describe)[0] == (ia.Permanent, "picture_refused")
    assert [exchange.json for exchange in about(PICTURE, fake)] == [body(fake.interface)] * 3


def test_a_host_that_refuses_a_question_without_the_switch_too_is_not_asked_for_ever(fake, make):
    fake.script("POST", fake.chat, only(PICTURE, NO_SWITCH[fake.interface]), forever=True)
    assert error_of(make(fake).describe)[0] == (ia.Permanent, "picture_refused")
    assert len(about(PICTURE, fake)) == 1 + 3


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
    model = make(fake, argv=argv, at=fake.url.replace("http://", f"http://{user}"))
    model.check()
    model.describe()
    assert {exchange.headers.get("Authorization") for exchange in fake.exchanges} == {sent}


def test_a_netrc_does_not_replace_the_key(fake, make, home):
    (home / ".netrc").write_text("default login me password other\n")
    fake.api_key = "k3y"
    make(fake, argv=["--api-key", "k3y"]).describe()
    assert [e.headers["Authorization"] for e in fake.exchanges] == ["Bearer k3y"]


@pytest.mark.parametrize(
    ("argv", "sent"),
    [
        (["--host-header", "X-Login: s3cret"], {"X-Login": "s3cret"}),
        (
            ["--host-header", "authorization: Basic abc", "--api-key", "k3y"],
            {"Authorization": "Basic abc"},
        ),
        (
            ["--host-header", "Cookie: a=b", "--api-key", "k"],
            {"Cookie": "a=b", "Authorization": "Bearer k"},
        ),
    ],
)
def test_headers_for_a_login_go_with_each_request(fake, make, argv, sent):
    model = make(fake, argv=argv)
    model.check()
    model.describe()
    assert model._probe(fake.url)
    assert len(fake.exchanges) >= 3
    for exchange in fake.exchanges:
        assert sent.items() <= {name: exchange.headers.get(name) for name in sent}.items()


def test_openrouter_is_asked_as_it_wants_to_be(make, config):
    with servers.FakeLlamaCpp(prefix="/api", models=["google/gemma:free", "tiny-vlm"]) as server:
        server.interface = "openrouter"
        server.script("GET", "/v1/key", Reply(200, {"data": {}}))
        model = make(server, at=f"{server.url}/v1", argv=["--api-key", "sk-or-1"])
        model.check()
        assert model.describe() == servers.told(JPEG)
        assert model._probe(f"{server.url}/v1")
        for exchange in server.exchanges:
            assert exchange.headers["Authorization"] == "Bearer sk-or-1"
            assert exchange.headers["X-Title"] == "immich-analyze"
            assert exchange.headers["HTTP-Referer"].startswith("http://localhost")
        [chat] = chats(server)
        assert chat.json["reasoning"] == {"enabled": False}


@pytest.mark.parametrize("written", ["{url}", "{url}/", "{url}{root}", "{url}{root}/"])
def test_an_address_may_end_in_the_interfaces_own_path(fake, make, written):
    root = {"ollama": "/api", "llamacpp": "/v1"}[fake.interface]
    model = make(fake, at=written.format(url=fake.url, root=root))
    model.check()
    assert model.describe() == servers.told(JPEG)


def test_a_server_may_be_below_a_path(make):
    with servers.FakeOllama(prefix="/below") as server:
        model = make(server)
        model.check()
        assert model.describe() == servers.told(JPEG)
    server.check()


# --- The answer ------------------------------------------------------------------------------


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
    assert make(fake).describe() == text


EMPTY, CUT_OFF, REPEATS = "answer_empty", "answer_cut", "answer_repeats"
FAILS = "host_failed"


@pytest.mark.measured
@pytest.mark.parametrize(
    ("said", "key"),
    [
        (servers.empty(), EMPTY),
        ("<think>I never come to", EMPTY),
        ("42", EMPTY),
        ("cat " * 200, REPEATS),
        (Reply(200, "<html>hello</html>"), "not_json"),
        (Reply(200, bytes(5 * 2**20)), "reply_too_large"),
        (Reply(200, "[" * 100_000), "not_json"),
        (Reply(200, None), "not_json"),
        (Reply(200, {}), EMPTY),
        (Reply(200, []), EMPTY),
        (Reply(200, {"error": "llama runner process has terminated"}), FAILS),
        (Reply(200, {"message": {"content": None}, "choices": [{"message": None}]}), EMPTY),
        (Reply(200, {"message": "A cat.", "choices": []}), EMPTY),
        (Reply(200, {"message": {"content": [7]}, "choices": "A cat."}), EMPTY),
    ],
)
def test_what_is_no_description_is_none_of_three_tries(fake, make, said, key):
    usual = fake.answer
    if isinstance(said, Reply):
        fake.script("POST", fake.chat, only(PICTURE, said), forever=True)
    else:
        fake.answer = lambda image, prompt: said if image == JPEG else usual(image, prompt)
    model = make(fake)
    assert error_of(model.describe)[0] == (ia.Permanent, key)
    assert times(about(PICTURE, fake)) == [0, 5, 10]
    assert model.troubles() == WELL


def test_the_limit_is_named_when_an_answer_was_cut(fake, make):
    fake.answer = lambda image, _: servers.cut("A cat") if image == JPEG else "A wall."
    error = error_of(make(fake, argv=["--max-tokens", "3"]).describe)[1]
    assert (error.key, error.fields) == (CUT_OFF, {"tokens": 3})


def test_garbage_is_refused_by_the_real_error(fake, make):
    garbage = ia.Picture(base64.b64encode(b"garbage"), ia.PLAIN_SIZE)
    error = error_of(make(fake).describe, garbage)[1]
    told = {"url": fake.url + fake.chat, "status": 400, "why": servers.NO_PICTURE}
    assert error.fields.items() >= told.items()
    assert str(error).count(servers.NO_PICTURE) == 1


# --- An answer that comes in pieces ----------------------------------------------------------


def line(text="", *, interface="ollama", thought="", done=None, **more):
    """A piece of an answer, or with `done` its end, as one JSON object."""
    if interface == "ollama":
        said = {"content": text} | ({"thinking": thought} if thought else {})
        return (
            {"message": said, "done": done is not None}
            | ({"done_reason": done} if done else {})
            | more
        )
    delta = {"content": text} | ({"reasoning_content": thought} if thought else {})
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": done}]} | more


def ndjson(*events):
    return "".join(json.dumps(event) + "\n" for event in events)


def sse(*events, end="\n\n"):
    lines = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return "".join(f"data: {one}{end}" for one in lines)


def told_in(interface, *texts, done="stop"):
    """A whole answer in these pieces."""
    return [
        *(line(text, interface=interface) for text in texts),
        line(interface=interface, done=done),
    ]


def openai(text, done="stop", **more):
    """An answer in one piece."""
    return {"choices": [{"message": {"content": text}, "finish_reason": done}]} | more


PARTS = [{"type": "text", "text": "A "}, {"type": "image"}, {"type": "text", "text": "cat."}]
PIECES = told_in("llamacpp", "A ", "cat.")
PRETTY = json.dumps(openai("A cat."), indent=2)


ANSWERS = [
    ("ollama", ndjson(*told_in("ollama", "A ", "cat."))),
    ("ollama", ndjson(line("A "), line("cat.", done=""))),
    ("ollama", ndjson(line("A cat.", done="stop")).rstrip()),
    ("ollama", ndjson({"message": {"content": "A cat."}})),
    ("ollama", ndjson(line(PARTS, done="stop"))),
    ("ollama", ndjson(line(thought="Hm."), *told_in("ollama", "A cat."))),
    ("ollama", sse(*told_in("ollama", "A ", "cat."))),
    ("llamacpp", sse(*PIECES, "[DONE]")),
    ("llamacpp", sse(*PIECES)),
    ("llamacpp", sse(*PIECES[:-1], "[DONE]")),
    ("llamacpp", sse(*PIECES, "[DONE]", end="\r\n\r\n")),
    ("llamacpp", sse(*PIECES, "[DONE]", end="\r\r")),
    ("llamacpp", ": wait\n\nevent: message\nid: 7\n" + sse(*PIECES, "[DONE]")),
    ("llamacpp", sse(*PIECES, {"choices": [], "usage": {"completion_tokens": 2}}, "[DONE]")),
    ("llamacpp", sse(*PIECES, "[DONE]").replace("data: ", "data:")),
    ("llamacpp", ndjson(*PIECES)),
    ("llamacpp", sse(line(PARTS, interface="llamacpp", done="stop"))),
    ("llamacpp", sse({"choices": [{"text": "A "}]}, {"choices": [{"text": "cat."}]}, "[DONE]")),
    ("llamacpp", sse(openai("A cat."), "[DONE]")),
    ("llamacpp", json.dumps(openai("A cat."))),
    ("llamacpp", json.dumps(openai("A cat.", None))),
    ("llamacpp", json.dumps(openai(PARTS))),
    ("llamacpp", json.dumps(openai(["A ", "cat."]))),
    ("llamacpp", json.dumps([openai("A cat.")])),
    ("llamacpp", PRETTY),
    ("llamacpp", PRETTY.replace("\n", "\r\n")),
    ("llamacpp", json.dumps({"error": None} | openai("A cat."))),
]
WAYS = ["whole", "chunks", "until it closes"]


@pytest.mark.parametrize(
    ("interface", "body", "way"),
    others_long(
        [(*answer, way) for answer in ANSWERS for way in ("bytes", *WAYS)],
        *((*answer, "bytes") for answer in ANSWERS),
        *((*answer, way) for answer, way in zip(ANSWERS, cycle(WAYS))),
    ),
)
def test_an_answer_is_put_together_however_it_comes(make, interface, body, way):
    data = body.encode()
    cuts = {
        "chunks": [data[i : i + 40] for i in range(0, len(data), 40)],
        "until it closes": [data],
    }
    pieces = cuts.get(way, [data[i : i + 1] for i in range(len(data))])
    whole = Reply(200, body)
    stream = Stream(tuple(pieces), "text/plain", chunked=way != "until it closes")
    with servers.FakeServer() as server:
        server.interface = interface
        server.script("POST", CHAT[interface], whole if way == "whole" else Reply(200, stream))
        assert make(server).describe() == "A cat."
        assert len(server.exchanges) == 1


NESTED = json.dumps({"error": {"code": 400, "message": servers.NO_PICTURE}})


@pytest.mark.measured
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("interface", "events", "key", "words"),
    [
        ("ollama", [{"error": "no memory"}], FAILS, "no memory"),
        ("ollama", [line("A"), {"error": "unexpected EOF"}], FAILS, "unexpected EOF"),
        ("ollama", [*told_in("ollama", "A cat."), {"error": "late"}], FAILS, "late"),
        ("ollama", [{"error": NESTED}], FAILS, servers.NO_PICTURE),
        ("ollama", [[{"error": {"message": "no memory"}}]], FAILS, "no memory"),
        (
            "llamacpp",
            [{"error": {"message": "no", "code": 400}}],
            "picture_refused",
            "(status 400) no",
        ),
        (
            "llamacpp",
            [*PIECES[:1], {"error": {"message": "no", "code": "500"}}],
            FAILS,
            "(status 500)",
        ),
        ("llamacpp", [{"error": [{"message": "one"}, {"message": "two"}]}], FAILS, "one; two"),
        ("llamacpp", [{"object": "error", "message": "no", "code": 40301}], FAILS, "no"),
        ("ollama", [{"error": "server busy, please try again."}], "host_busy", "server busy"),
        ("llamacpp", [{"error": {"message": "slow down", "code": 429}}], "host_busy", "slow down"),
        ("ollama", [{"error": f"x: {servers.NO_VISION}"}], "model_blind", ""),
        ("ollama", [{"error": "model 'tiny-vlm' not found"}], "model_missing", "not found"),
        ("ollama", [line("A cat.")], "connection_cut", ""),
        ("ollama", [line("A "), line("cat.")], "connection_cut", ""),
        ("llamacpp", PIECES[:-1], "connection_cut", ""),
        (
            "llamacpp",
            told_in("llamacpp", "A cat.", done="content_filter"),
            "answer_withheld",
            "content_filter",
        ),
        ("llamacpp", told_in("llamacpp", "A cat.", done="SAFETY"), "answer_withheld", ""),
        ("llamacpp", told_in("llamacpp", "A cat.", done="abort"), "connection_cut", ""),
        ("llamacpp", told_in("llamacpp", "A cat.", done="error"), "connection_cut", ""),
        ("ollama", told_in("ollama", "A cat.", done="unload"), "connection_cut", ""),
        ("ollama", [line("", done="load")], EMPTY, ""),
        ("ollama", told_in("ollama"), EMPTY, ""),
    ],
)
def test_what_is_wrong_with_an_answer_in_pieces_is_said(
    make, interface, events, key, words, streams
):
    body = sse(*events) if interface == "llamacpp" else ndjson(*events)
    stream = Stream(tuple(body.encode().splitlines(True)), "text/plain")
    with {"ollama": servers.FakeOllama, "llamacpp": servers.FakeLlamaCpp}[interface]() as server:
        server.interface = interface
        reply = Reply(200, stream if streams else body)
        server.script("POST", CHAT[interface], only(PICTURE, reply), forever=True)
        found, error = error_of(make(server).describe)
        assert found == (ia.Permanent, key)
        assert words in str(error)


@pytest.mark.measured
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'data: {"choices":[{"delta":{"content":"A caf\xc3"}}]}', "A caf\ufffd in snow."),
        (b'data: {"choices":[{"delta":{"content":"A\tbarn"}}]}', "A\tbarn in snow."),
        (b'\xef\xbb\xbfdata: {"choices":[{"delta":{"content":"A barn"}}]}', "A barn in snow."),
        (b'data: {"choices":[{"delta":{"content":"A barn', None),
        (b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}', "\U0001f600 in snow."),
        (b'error: {"code":500,"message":"slot unavailable"}', "slot unavailable"),
    ],
)
def test_no_piece_of_an_answer_is_left_out_in_silence(make, llamacpp, data, said):
    llamacpp.interface = "llamacpp"
    rest = "\\ude00 in snow." if b"ud83d" in data else " in snow."
    more = (
        b'data: {"choices":[{"delta":{"content":"' + rest.encode() + b'"},"finish_reason":null}]}'
    )
    end = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}'
    body = b"\n\n".join([data, more, end, b"data: [DONE]", b""])
    llamacpp.script("POST", CHAT["llamacpp"], only(PICTURE, Reply(200, body)), forever=True)
    if said and not data.startswith(b"error"):
        assert make(llamacpp).describe() == said
        return
    found, error = error_of(make(llamacpp).describe)
    assert found == (ia.Permanent, FAILS if said else "connection_cut")
    assert (said or "") in str(error)


@pytest.mark.parametrize("words", ["streaming is not supported", "must be verified to stream this"])
def test_a_host_that_may_not_stream_is_asked_for_the_whole(make, llamacpp, words):
    llamacpp.interface = "llamacpp"
    refusal = refuses("stream", words=json.dumps({"error": {"message": words}}))
    llamacpp.script("POST", CHAT["llamacpp"], refusal, forever=True)
    ai = make(llamacpp)
    assert ai.describe()
    asked = [chat.json for chat in llamacpp.find("POST", CHAT["llamacpp"])]
    assert ["stream" in question for question in asked] == [True, False]
    assert "stream_options" not in asked[-1]


@pytest.mark.measured
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("interface", CHAT)
@pytest.mark.parametrize(
    ("said", "argv", "key"),
    [
        ({"text": "a cat "}, [], REPEATS),
        ({"text": "long"}, ["--max-tokens", "50"], CUT_OFF),
        ({"text": "", "thought": "hm"}, ["--max-tokens", "400"], "answer_thinks"),
        ({"text": "", "thought": "hm"}, ["--max-tokens", "400", "--think"], CUT_OFF),
    ],
)
def test_an_answer_that_leads_nowhere_is_stopped_while_it_is_made(
    make, interface, said, argv, key, chunked
):
    piece = line(**said, interface=interface)
    text = sse(piece) if interface == "llamacpp" else ndjson(piece)
    sent: list[int] = []

    def pieces() -> Iterator[bytes]:
        sent.append(0)
        for _ in range(100_000):
            sent[-1] += 1
            yield text.encode()

    endless = lambda _: Reply(200, Stream(pieces(), "text/plain", chunked))  # noqa: E731
    with {"ollama": servers.FakeOllama, "llamacpp": servers.FakeLlamaCpp}[interface]() as server:
        server.interface = interface
        server.script("POST", CHAT[interface], only(PICTURE, endless), forever=True)
        assert error_of(make(server, argv=argv).describe)[0] == (ia.Permanent, key)
    assert len(sent) == (1 if key == CUT_OFF else 3)
    assert max(sent) < 90_000  # the rest was not made; some was on its way


@pytest.mark.parametrize("text", ["<think>", "<thinking>\nSo, "])
def test_thoughts_in_the_answer_itself_are_thoughts(make, ollama, text):
    pieces = [line(text), *(line(f" word{n}") for n in range(200)), line("", done="stop")]
    ollama.script("POST", "/api/chat", only(PICTURE, Reply(200, ndjson(*pieces))), forever=True)
    error = error_of(make(ollama, argv=["--max-tokens", "400"]).describe)[1]
    assert error.key == "answer_thinks"
    assert "--think" in str(error)


@pytest.mark.parametrize("text", ["<think>Let me see.</think>", ""])
def test_a_few_thoughts_before_an_answer_are_no_matter(make, ollama, text):
    pieces = [line(text), line("", thought="So."), *told_in("ollama", "A cat.", *[" x"] * 30)]
    ollama.script("POST", "/api/chat", Reply(200, ndjson(*pieces)))
    assert make(ollama, argv=["--max-tokens", "40"]).describe().startswith("A cat.")


@pytest.mark.measured
def test_words_of_a_proxy_that_keep_a_client_waiting_are_no_answer(make, hours, llamacpp):
    """The silence that counts is that of the model."""
    llamacpp.interface = "llamacpp"

    def pieces():
        while True:
            hours.time += 1
            yield b": still waiting\n\n"

    reply = lambda _: Reply(200, Stream(pieces(), "text/event-stream"))  # noqa: E731
    llamacpp.script("POST", CHAT["llamacpp"], only(PICTURE, reply), forever=True)
    model = make(llamacpp, argv=["--timeout", "30"])
    assert error_of(model.describe)[0] == (ia.Permanent, "timed_out")


# What cut an answer


@pytest.mark.measured
@pytest.mark.parametrize(
    ("interface", "events", "key"),
    [
        (
            "ollama",
            [line("A"), line(done="length", eval_count=4096, prompt_eval_count=86)],
            CUT_OFF,
        ),
        (
            "ollama",
            [line("A"), line(done="length", eval_count=170, prompt_eval_count=86)],
            "context_full",
        ),
        ("ollama", [line("A"), line(done="length")], "context_full"),
        ("ollama", [line("A", done="length")], CUT_OFF),
        ("llamacpp", told_in("llamacpp", "A", done="length"), "context_full"),
        (
            "llamacpp",
            [
                *told_in("llamacpp", "A", done="length"),
                {"choices": [], "usage": {"completion_tokens": 4096}},
            ],
            CUT_OFF,
        ),
        ("ollama", [line(done="length", eval_count=150, prompt_eval_count=86)], CUT_OFF),
        ("llamacpp", [openai("A", "length", usage={"completion_tokens": 100})], "context_full"),
    ],
)
def test_what_cut_an_answer_is_told_and_it_is_not_made_again(make, interface, events, key):
    body = ndjson(*events)
    with {"ollama": servers.FakeOllama, "llamacpp": servers.FakeLlamaCpp}[interface]() as server:
        server.interface = interface
        server.script("POST", CHAT[interface], only(PICTURE, Reply(200, body)), forever=True)
        found, error = error_of(make(server).describe)
        assert found == (ia.Permanent, key)
        assert ("--max-tokens" if key == CUT_OFF else "-c for llama.cpp") in str(error)
        contexts = [chat.json.get("options", {}).get("num_ctx") for chat in about(PICTURE, server)]
        larger = key != CUT_OFF and "prompt_eval_count" in body  # which may help
        assert contexts == ([None, 8192] if larger else [None])


@pytest.mark.parametrize("trouble", [BROKEN, RESET, Reply(200, "<html>")])
@pytest.mark.parametrize("failures", [1, 2])
def test_a_try_that_works_is_enough(fake, make, trouble, failures):
    replies = iter([trouble] * failures)
    fake.script("POST", fake.chat, only(PICTURE, lambda _: next(replies, None)), forever=True)
    assert make(fake, argv=["--retry-delay-seconds", "1.5"]).describe() == servers.told(JPEG)
    assert times(about(PICTURE, fake)) == [0, 1.5, 3][: failures + 1]


def test_what_the_caller_checks_is_checked_before_each_question(fake, make):
    fake.script("POST", fake.chat, only(PICTURE, BROKEN), forever=True)
    asked = []

    def check() -> None:
        asked.append(len(about(PICTURE, fake)))
        if len(about(PICTURE, fake)) == 2:
            raise ia.Skip("library_loses")

    model = make(fake)
    assert error_of(model.describe, PICTURE, check)[0] == (ia.Skip, "library_loses")
    assert sorted({*asked}) == [0, 1, 2]
    assert len(about(PICTURE, fake)) == 2


# --- Who is to blame -------------------------------------------------------------------------


def says(text: str, finish: str = "stop") -> Reply:
    """An answer of Ollama."""
    message = {"role": "assistant", "content": text}
    return Reply(200, {"model": "m", "message": message, "done": True, "done_reason": finish})


MISSING = Reply(404, {"error": "model 'tiny-vlm' not found"})
CANNOT_SEE = Reply(500, {"error": {"message": servers.NO_VISION}})
SILENCE = "silence"
HOSTS_WORD = ["408", "502", "503", "504", "429", "429, later"]  # that it has too much to do
PERSONS = ["401", "402", "403", "no model", "cannot see"]  # that a person must act
# a host's reply; the error that it is told as
TROUBLES: dict[str, tuple[Any, str]] = {
    "500": (BROKEN, "host_failed"),
    "501": (Reply(501), "host_failed"),
    "400": (Reply(400), "picture_refused"),
    "422": (Reply(422), "picture_refused"),
    "a page": (Reply(200, "<html>"), "not_json"),
    "error in a 200": (Reply(200, {"error": "no memory"}), FAILS),
    "empty": (says(""), EMPTY),
    "junk": (says("cat " * 300), REPEATS),
    "cut answer": (says("A red", "length"), CUT_OFF),
    "cut": (CUT, "connection_cut"),
    "closed": (RESET, "connection_cut"),
    "wrong": (Reply(404), "host_wrong"),
    "too large": (Reply(200, bytes(5 * 2**20)), "reply_too_large"),
    "redirected": (Reply(307, None, {"Location": "https://elsewhere/"}), "redirected"),
    "silence": (SILENCE, "timed_out"),
    "408": (Reply(408), "host_busy"),
    "502": (Reply(502), "host_busy"),
    "503": (BUSY, "host_busy"),
    "504": (Reply(504), "host_busy"),
    "429": (Reply(429), "host_busy"),
    "429, later": (Reply(429, None, {"Retry-After": "7"}), "host_busy"),
    "401": (REFUSED, "host_key_refused"),
    "402": (Reply(402), "host_key_refused"),
    "403": (Reply(403), "host_key_refused"),
    "no model": (MISSING, "model_missing"),
    "cannot see": (CANNOT_SEE, "model_blind"),
}
# each with so many hosts, and one of each kind with one, two and three
EACH_TROUBLE = [(trouble, 1 + n % 3) for n, trouble in enumerate(TROUBLES)]
TROUBLE_OF_SO_MANY = others_long(
    EACH_TROUBLE
    + [
        (trouble, number)
        for trouble in ("500", "silence", "503", "429", "401")
        for number in (1, 2, 3)
        if (trouble, number) not in EACH_TROUBLE
    ],
    *EACH_TROUBLE,
)
TIMEOUT = 20.0
ARGV = ["--timeout", f"{TIMEOUT}", "--unavailable-duration", "60"]
BEFORE = 100.0  # when sick hosts are well again


@pytest.fixture
def hosts() -> Iterator[Callable[[int], list[servers.FakeOllama]]]:
    """Makes so many model hosts."""
    with ExitStack() as stack:
        yield lambda number: [stack.enter_context(servers.FakeOllama()) for _ in range(number)]


@pytest.fixture
def reply(hours) -> Callable[[str], Any]:
    """The reply that a trouble consists of."""
    return lambda trouble: hours.hang if trouble == SILENCE else TROUBLES[trouble][0]


@pytest.fixture
def lines(caplog) -> Callable[[], list[str]]:
    """The levels of what was said of hosts."""
    caplog.set_level(logging.INFO, ia.log.name)
    return lambda: [record.levelname for record in caplog.records]


@pytest.mark.parametrize(("trouble", "number"), TROUBLE_OF_SO_MANY)
def test_a_picture_that_hosts_fail_on_is_given_up_after_three_tries_and_costs_no_host(
    hosts, make, reply, lines, trouble, number
):
    """The hosts are well, and show it by a plain picture of the same size."""
    fakes = hosts(number)
    for fake in fakes:
        fake.script("POST", "/api/chat", only(PICTURE, reply(trouble)), forever=True)
    model = make(*fakes, argv=ARGV)
    assert error_of(model.describe)[0] == (ia.Permanent, TROUBLES[trouble][1])
    # 429 is mostly the others' doing, and a cut answer would be cut again
    tries = 12 if "429" in trouble else 1 if trouble == "cut answer" else 3
    assert len(about(PICTURE, *fakes)) == tries
    assert min(len(about(PICTURE, fake)) for fake in fakes) == tries // number
    plain = [image for fake in fakes for image, _ in fake.asked if image != JPEG]
    assert 1 <= len(plain) <= tries
    assert {servers.Image.open(servers.io.BytesIO(image)).size for image in plain} == {(80, 60)}
    assert model.troubles() == WELL * number
    if trouble in (*HOSTS_WORD, SILENCE):
        assert lines().count("WARNING") == lines().count("INFO") <= tries
    else:
        assert lines() == []
    assert "ERROR" not in lines()


@pytest.mark.parametrize(("trouble", "number"), TROUBLE_OF_SO_MANY)
def test_hosts_that_fail_on_all_are_waited_for_and_cost_the_picture_nothing(
    hosts, make, hours, reply, lines, trouble, number
):
    fakes = hosts(number)
    for fake in fakes:
        sick = hours.between(0, BEFORE, reply(trouble))
        fake.script(".*", "", sick, forever=True)
    model = make(*fakes, argv=ARGV, lasts=True)
    assert model.describe() == servers.told(JPEG)
    assert len(about(PICTURE, *fakes)) <= number + 1
    longest = 3600 if trouble in PERSONS else BEFORE + 60 + TIMEOUT + 10
    assert BEFORE <= hours.time <= longest + 10
    level = "ERROR" if trouble in PERSONS else "WARNING"
    assert [lines().count(one) for one in ("WARNING", "ERROR") if one != level] == [0]
    assert 1 <= lines().count(level) <= number  # one an outage
    still = number - model.troubles().count(None)
    assert lines().count("INFO") == lines().count(level) - still >= 1
    assert len(chats(*fakes)) <= 30 * number


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_sick_host_costs_the_picture_no_time_beside_one_that_is_well(
    hosts, make, hours, reply, lines, trouble
):
    sick, well = hosts(2)
    sick.script("POST", "/api/chat", reply(trouble), forever=True)
    model = make(sick, well, argv=ARGV)
    assert model.describe() == servers.told(JPEG)
    assert hours.time == (TIMEOUT if trouble == SILENCE else 0)
    assert [len(about(PICTURE, fake)) for fake in (sick, well)] == [1, 1]
    assert model.troubles() == [TROUBLES[trouble][1], None]
    assert lines() == ["ERROR" if trouble in PERSONS else "WARNING"]
    for number in range(2, 6):  # which go to the other one meanwhile
        data = servers.own_picture(number)
        assert model.describe(ia.prepared(data, 0)) == servers.told(data)
    assert len(chats(sick)) <= 2


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_picture_that_kills_its_host_is_given_up_after_three_outages(hosts, make, hours, number):
    """Once or twice a host may be down by chance after it was asked about a picture."""
    fakes, killed = hosts(number), []

    def die(fake: FakeServer) -> Callable[[Exchange], Any]:
        dead_until = [0.0]

        def serve(exchange: Exchange) -> Any:
            if hours.time < dead_until[0]:
                return BUSY
            if PICTURE.base64 in exchange.data:
                killed.append(hours.time)
                dead_until[0] = hours.time + 15
                return RESET
            return None

        return serve

    for fake in fakes:
        fake.script(".*", "", die(fake), forever=True)
    model = make(*fakes, argv=ARGV)
    assert error_of(model.describe)[0] == (ia.Permanent, "connection_cut")
    assert 3 <= len(killed) <= 2 * number + 1  # as hosts that die together may have one outage
    assert model.troubles() == WELL * number


def test_a_picture_as_large_as_the_photo_tells_of_a_context_that_is_too_small(fake, make, hours):
    """A small plain one would be described, and the photo be blamed."""
    large = ia.prepared(servers.picture(size=(1440, 960)), 0)

    def too_large(exchange: Exchange) -> Reply | None:
        found = json.dumps(exchange.json).partition("/9j/")[2].partition('"')[0]
        image = servers.Image.open(servers.io.BytesIO(base64.b64decode("/9j/" + found)))
        why = {"error": {"message": "the request exceeds the available context size"}}
        return Reply(400, why) if image.size[0] > 1000 else None

    fake.script("POST", fake.chat, hours.between(0, 50, too_large), forever=True)
    model = make(fake, lasts=True)
    assert model.describe(large) == servers.told(base64.b64decode(large.base64))
    assert hours.time >= 50


def test_one_text_for_two_pictures_is_no_description_of_a_blind_host(fake, second, make, lines):
    fake.answer = lambda *_: "A nice picture."
    model = make(fake, second)
    pictures = [servers.own_picture(n) for n in range(1, 9)]
    found = [model.describe(ia.prepared(data, 0)) for data in pictures]
    assert found == ["A nice picture.", *map(servers.told, pictures[1:])]
    assert model.troubles() == ["model_says_the_same", None]
    assert lines() == ["ERROR"]


@pytest.mark.measured
def test_a_host_that_asks_for_a_picture_whatever_it_is_shown_is_blind(fake, second, make, lines):
    fake.answer = lambda *_: "Please provide the image you would like me to describe."
    model = make(fake, second)
    pictures = [servers.own_picture(n) for n in range(1, 6)]
    found = [model.describe(ia.prepared(data, 0)) for data in pictures]
    assert found == list(map(servers.told, pictures))
    assert model.troubles() == ["model_blind", None]
    assert lines() == ["ERROR"]


def test_a_picture_that_a_model_refuses_or_overlooks_is_no_trouble_of_its_host(fake, make):
    for said, key in (
        ("I don't see an image.", "answer_no_picture"),
        ("I'm sorry, I can't assist with that.", "answer_declined"),
    ):
        fake.answer = lambda image, _, said=said: said if image == JPEG else servers.told(image)
        model = make(fake, argv=["--retry-delay-seconds", "0"])
        assert error_of(model.describe)[0] == (ia.Permanent, key)
        assert model.troubles() == WELL


def test_one_text_for_pictures_that_are_alike_is_theirs(fake, make):
    alike = {servers.own_picture(n, "red") for n in range(8)}
    fake.answer = lambda image, _: "A red square." if image in alike else servers.told(image)
    model = make(fake)
    assert {model.describe(ia.prepared(data, 0)) for data in alike} == {"A red square."}
    assert len(chats(fake)) <= len(alike) + 2


# --- Hosts that are away ---------------------------------------------------------------------


def test_a_host_that_is_started_again_is_found_at_once(fake, make, hours):
    model = make(fake)
    fake.close()
    wait = model.stop.wait

    def waiting(seconds: float) -> bool:
        if hours.time >= 30 and not fake._listener:
            fake.start()
        return wait(seconds)

    model.stop.wait = waiting
    assert model.describe() == servers.told(JPEG)
    assert 30 <= hours.time <= 31  # though by then it would be asked each 16 s
    assert [exchange.path for exchange in fake.exchanges] == [ALIVE[fake.interface], fake.chat]


@pytest.mark.parametrize(
    ("alive", "counts"),
    [
        (Reply(200, "<html>"), True),
        (BROKEN, True),
        (Reply(404), True),
        (REFUSED, True),
        (BUSY, False),
        (Reply(502), False),
        (RESET, False),
        (SILENCE, False),
    ],
)
def test_what_a_probe_meets_tells_if_anything_is_there(fake, make, hours, alive, counts):
    fake.script("POST", fake.chat, Reply(502, None, {"Retry-After": "40"}))
    alive = hours.hang if alive == SILENCE else alive
    fake.script("GET", ALIVE[fake.interface], alive, forever=True)
    assert make(fake).describe() == servers.told(JPEG)
    assert (hours.time < 30) is counts


def test_a_host_that_answers_nothing_but_probes_is_asked_less_and_less_often(make, hours, ollama):
    ollama.script("POST", "/api/chat", hours.between(0, 100, Reply(502)), forever=True)
    assert make(ollama).describe() == servers.told(JPEG)
    assert len(chats(ollama)) < 15


def test_a_gone_host_is_probed_only_while_no_other_is_there(fake, second, make, hours):
    second.close()
    model = make(fake, second)
    for _ in range(3):
        assert model.describe() == servers.told(JPEG)
    assert hours.time == 0
    second.start()
    hours.sleep(61)
    model.describe()
    model.describe()
    assert [exchange.path for exchange in second.exchanges] == [fake.chat]


def test_what_one_worker_learns_of_a_host_all_know(fake, second, make):
    fake.script("POST", fake.chat, BUSY)
    one = make(fake, second)
    other = make(fake, second, like=one)
    for model in (one, other, one, other):
        model.describe()
    assert [len(about(PICTURE, server)) for server in (fake, second)] == [1, 4]


@pytest.mark.parametrize(
    ("most", "trouble", "expected", "number"),
    [
        (1, BUSY, (ia.Unavailable, "host_busy"), 1),
        (3, BUSY, (ia.Unavailable, "host_busy"), 1),
        (1, BROKEN, (ia.Permanent, "host_failed"), 2),
        (2, BROKEN, (ia.Permanent, "host_failed"), 3),
        (9, BROKEN, (ia.Permanent, "host_failed"), 3),
    ],
)
def test_max_retries_bounds_waits_and_tries(fake, make, most, trouble, expected, number):
    blamed = trouble if trouble is BUSY else only(PICTURE, trouble)
    fake.script("POST", fake.chat, blamed, forever=True)
    model = make(fake, argv=["--max-retries", str(most)])
    assert error_of(model.describe)[0] == expected
    assert len(about(PICTURE, fake)) == number
    if trouble is BUSY:
        assert len(chats(fake)) == most + 1


# --- Stopping --------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [BUSY, BROKEN], ids=["unavailable", "fails"])
def test_stopping_ends_the_wait(fake, make, hours, trouble):
    fake.script("POST", fake.chat, only(PICTURE, trouble), forever=True)
    model = make(fake, argv=["--retry-delay-seconds", "1000"])
    wait = model.stop.wait

    def waiting(seconds: float) -> bool:
        model.stop.set()
        return wait(seconds)

    model.stop.wait = waiting
    assert error_of(model.describe)[0] == (ia.Stopped, "stopped")
    assert hours.time == 0
    assert len(about(PICTURE, fake)) == 1


def test_nothing_is_asked_once_stopped(fake, make):
    model = make(fake)
    model.stop.set()
    assert error_of(model.describe)[0] == (ia.Stopped, "stopped")
    assert fake.exchanges == []


# --- Several workers -------------------------------------------------------------------------


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What these give, each in a thread of its own."""
    with ia.ThreadPoolExecutor(len(calls)) as pool:
        jobs = [pool.submit(call) for call in calls]
        return [job.result() for job in jobs]


def slowly(hours, *fakes: FakeServer) -> None:
    """Let each answer take a second."""

    def answer(image: bytes, _: str) -> str:
        hours.takes(1)
        return servers.told(image)

    for fake in fakes:
        fake.answer = answer


def test_answers_are_not_mixed_up(fake, second, make, hours):
    slowly(hours, fake, second)
    one = make(fake, second, argv=["--max-concurrent", "3"])
    models = [make(fake, second, like=one) for _ in range(5)]
    pictures = [servers.own_picture(number) for number in range(40)]

    def work(number: int) -> dict[bytes, str]:
        mine = pictures[number :: len(models)]
        return {data: models[number].describe(ia.prepared(data, 0)) for data in mine}

    shares = at_once(*(lambda n=n: work(n) for n in range(len(models))))
    assert {k: v for share in shares for k, v in share.items()} == {
        data: servers.told(data) for data in pictures
    }
    asked = [data for server in (fake, second) for data, _ in server.asked]
    assert sorted(asked) == sorted(pictures)
    assert 14 <= hours.time <= 20  # as three are described at a time


def test_pictures_that_failed_are_asked_about_again_one_at_a_time(make, hours, ollama):
    """One that kills its host takes no other down with it twice."""
    pictures = [ia.prepared(servers.own_picture(n), 0) for n in range(4)]
    failed: set[bytes] = set()
    in_flight, most = [0], [0]

    def first_fails(exchange: Exchange) -> Reply | None:
        [data] = [p.base64 for p in pictures if p.base64 in exchange.data] or [b""]
        if data and data not in failed:
            hours.takes(1)
            failed.add(data)
            return BROKEN
        if data:
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])
            hours.takes(1)
            in_flight[0] -= 1
        return None

    ollama.script("POST", "/api/chat", first_fails, forever=True)
    one = make(ollama)
    models = [make(ollama, like=one) for _ in pictures]
    pairs = zip(models, pictures, strict=True)
    at_once(*(lambda m=m, p=p: m.describe(p) for m, p in pairs))
    assert (len(failed), most) == (4, [1])


@pytest.mark.measured
def test_workers_that_wait_for_a_host_probe_it_no_more_often_than_one(make, hours, ollama):
    ollama.script(".*", "", hours.between(0, 20, Reply(502)), forever=True)
    one = make(ollama)
    models = [one, *(make(ollama, like=one) for _ in range(3))]
    assert at_once(*(model.describe for model in models)) == [servers.told(JPEG)] * 4
    probes = times(ollama.find("GET", "/api/version"))
    assert len(probes) > 10
    assert all(later - earlier >= 0.5 for earlier, later in pairwise(probes))


# --- The check at the start ------------------------------------------------------------------


def test_a_host_with_the_model_is_asked_once(fake, second, make):
    make(fake, second).check()
    asked = {"ollama": ("POST", "/api/show"), "llamacpp": ("GET", "/v1/models")}[fake.interface]
    for server in (fake, second):
        assert [(e.method, e.path) for e in server.exchanges] == [asked]


SHOW, MODELS, PROPS = "/api/show", "/v1/models", "/props"


@pytest.mark.parametrize("shown", [{}, {"details": {}}, {"capabilities": None}, [], "null"])
def test_an_ollama_that_does_not_tell_is_believed(ollama, make, shown):
    ollama.script("POST", SHOW, Reply(200, shown))
    make(ollama).check()
    assert len(ollama.exchanges) == 1


def model(name, **more):
    return {"id": name, "object": "model", **more}


LLAMA = {"owned_by": "llamacpp"}


def swapped(*names):
    """What llama-swap says of a model's other names."""
    return {"meta": {"llamaswap": {"aliases": list(names)}}}


def with_modalities(*modalities):
    return {"architecture": {"input_modalities": list(modalities)}}


@pytest.mark.measured
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
        ({"data": [model("tiny-vlm:latest", **with_modalities("text"))]}, None, "model_blind"),
        ({"data": [model("x"), model("y", **swapped("tiny-vlm"))]}, None, None),
        ({"data": [model("other", aliases=["tiny-vlm"]), model("third")]}, None, None),
        ({"data": []}, None, None),
        ({"data": None}, None, None),
        ({"data": {"tiny-vlm": {}}}, None, None),
        ({}, None, None),
        ([], None, None),
        ("null", None, None),
    ],
)
def test_what_an_openai_like_server_lists_decides(make, lines, listed, props, key):
    with servers.FakeServer() as server:
        server.interface = "llamacpp"
        server.script("GET", MODELS, Reply(200, listed))
        server.script("GET", PROPS, Reply(200, props))
        if key:
            assert error_of(make(server).check)[0] == (ia.Fatal, key)
        else:
            make(server).check()
        assert server.count("GET", PROPS) == (props is not None)
        assert "WARNING" not in lines()


NAMES = ["other", "tiny-vlm-2:7b", "llava:13b"]


def unlisted(*entries):
    """What a server lists that lacks the model."""
    return ("llamacpp", MODELS, Reply(200, {"data": list(entries)}))


@pytest.mark.parametrize(
    ("interface", "path", "reply", "said"),
    [
        (*unlisted(*map(model, NAMES)), "; the nearest name is tiny-vlm-2:7b. The first photo"),
        (*unlisted(model("tiny-vlm:7b")), "; the nearest name is tiny-vlm:7b. The first photo"),
        (*unlisted(model("other", owned_by="vllm")), "these are: other."),
        (*unlisted(model("other", aliases="tiny-vlm")), "these are: other."),
        ("llamacpp", MODELS, Reply(500, "Internal Server Error"), "Internal Server Error"),
        (
            "ollama",
            SHOW,
            Reply(501, "model show not supported in multi-instance proxy"),
            "(status 501)",
        ),
        ("ollama", SHOW, Reply(501), "(status 501)"),
    ],
)
def test_where_a_name_is_not_known_the_first_photo_decides(
    make, caplog, interface, path, reply, said
):
    with {"ollama": servers.FakeOllama, "llamacpp": servers.FakeLlamaCpp}[interface]() as server:
        server.interface = interface
        server.script(".*", path, reply)
        model = make(server)
        model.check()
        [line] = caplog.records
        assert line.levelname == "WARNING"
        assert said in line.getMessage()
        assert server.url in line.getMessage()
        assert model.describe() == servers.told(JPEG)
        server.script("POST", CHAT[interface], Reply(404, "model_not_found"), forever=True)
        assert error_of(model.describe)[0] == (ia.Fatal, "model_missing")


SEES = ("completion", "vision")


@pytest.mark.parametrize(
    ("kind", "options", "key"),
    [
        (servers.FakeOllama, {"models": {"other": SEES}}, "model_missing"),
        (servers.FakeOllama, {"models": {"tiny-vlm": SEES[:1]}}, "model_blind"),
        (servers.FakeOllama, {"api_key": "k3y"}, "host_key_refused"),
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
    assert len(server.exchanges) == (2 if key == "model_missing" else 1)
    assert "wr0ng" not in f"{error} {error.fields}"
    server.check()


@pytest.mark.parametrize(
    ("names", "meant"),
    [(["tiny-vlm:7b", "x"], "tiny-vlm:7b"), (["Tiny-VLM2"], "Tiny-VLM2"), (["x"], "")],
)
def test_the_name_that_was_meant_is_told_with_the_missing_one(make, names, meant):
    with servers.FakeOllama(dict.fromkeys(names, SEES)) as server:
        _, error = error_of(make(server).check)
    assert "model 'tiny-vlm:latest' not found" in str(error)
    assert (f"; the nearest name is {servers._tagged(meant)})" in str(error)) is bool(meant)
    assert ("nearest" in str(error)) is bool(meant)


@pytest.mark.parametrize(
    ("reply", "key", "words"),
    [
        (
            Reply(400, {"error": "invalid model name"}),
            "host_refused",
            "(status 400) invalid model name",
        ),
        (
            Reply(400, {"error": {"message": "No connected db.", "code": "400"}}),
            "host_refused",
            "(status 400) No connected db.",
        ),
        (Reply(422, [{"error": {"message": "No."}}]), "host_refused", "(status 422) No."),
        (
            Reply(400, "<html><title>400 The plain HTTP request was sent to HTTPS port</title>"),
            "https_needed",
            "https://",
        ),
        (Reply(400, "Client sent an HTTP request to an HTTPS server."), "https_needed", "https://"),
        (Reply(403), "host_key_refused", "OLLAMA_ORIGINS"),
    ],
)
def test_what_a_host_refuses_at_the_start_is_told_as_it_is(fake, make, reply, key, words):
    fake.script(".*", "", reply)
    found, error = error_of(make(fake).check)
    assert found == (ia.Fatal, key)
    assert words in str(error)


@pytest.mark.parametrize("interface", CHAT)
def test_the_wrong_interface_is_told_at_the_start(make, llamacpp, interface):
    with servers.FakeServer() as server:
        if interface == "llamacpp":
            server.script("GET", MODELS, servers.recorded("ollama", "unknown_route"))
        wrong = llamacpp if interface == "ollama" else server
        wrong.interface = interface
        found, error = error_of(make(wrong).check)
    assert found == (ia.Unavailable, "no_host")
    assert ia.t("host_wrong", url="", status=404, said="").split(" (")[0].strip() in str(error)


@pytest.mark.measured
@pytest.mark.parametrize("status", [400, 422])
def test_a_check_that_is_refused_ends_in_one_line(fake, make, status):
    fake.script(".*", "", Reply(status, {"error": "invalid model name"}))
    found, error = error_of(make(fake).check)
    assert found[0] is ia.Fatal
    assert "invalid model name" in str(error)


@pytest.mark.parametrize(
    "trouble", [None, SILENCE, RESET, BROKEN, Reply(200, "<html>")], ids=lambda it: str(it)[:9]
)
def test_no_host_at_all_ends_it(fake, second, make, hours, trouble):
    model = make(fake, second)
    for server in (fake, second):
        if trouble:
            server.script(".*", "", hours.hang if trouble == SILENCE else trouble, forever=True)
        else:
            server.close()
    found, error = error_of(model.check)
    assert found == (ia.Unavailable, "no_host")
    assert [str(error).count(server.url) for server in (fake, second)] == [1, 1]
    assert [len(server.exchanges) for server in (fake, second)] == [bool(trouble)] * 2
    assert hours.time == (ia.CHECK_TIMEOUT if trouble == SILENCE else 0)


@pytest.mark.parametrize("trouble", [RESET, BROKEN])
def test_one_host_that_is_away_is_left_out_for_a_while(fake, second, make, hours, trouble):
    fake.script(".*", "", trouble)
    model = make(fake, second)
    model.check()
    model.describe()
    model.describe()
    assert [len(chats(server)) for server in (fake, second)] == [0, 2]
    hours.sleep(1)
    model.describe()
    assert len(chats(fake)) >= 1
    assert model.troubles() == WELL * 2


@pytest.mark.parametrize("trouble", [BUSY, Reply(429)])
def test_a_host_that_is_busy_at_the_start_is_there(fake, make, hours, trouble):
    fake.script(".*", "", trouble)
    model = make(fake)
    model.check()
    assert model.describe() == servers.told(JPEG)
    assert hours.time == 0


@pytest.mark.measured
def test_a_model_that_still_loads_is_there(llamacpp, make):
    llamacpp.interface, llamacpp.loading = "llamacpp", True
    make(llamacpp).check()


@pytest.mark.measured
def test_one_host_that_cannot_work_is_left_out(fake, second, make, lines):
    fake.script(".*", "", REFUSED)
    model = make(fake, second)
    model.check()
    assert [model.describe() for _ in range(2)] == [servers.told(JPEG)] * 2
    assert [len(chats(server)) for server in (fake, second)] == [0, 2]
    assert lines() == ["ERROR"]


def test_a_service_outlasts_that_no_host_can_work(fake, make, hours):
    fake.script(".*", "", REFUSED)
    model = make(fake, lasts=True)
    model.check()
    assert model.describe() == servers.told(JPEG)
    assert hours.time == 3600


@pytest.mark.parametrize(("first", "then"), [(REFUSED, BROKEN), (BROKEN, REFUSED)])
def test_one_host_away_and_the_other_wrong_ends_it(fake, second, make, first, then):
    fake.script(".*", "", first)
    second.script(".*", "", then)
    assert error_of(make(fake, second).check)[0] == (ia.Unavailable, "no_host")
