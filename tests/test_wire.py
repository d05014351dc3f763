"""Whatever a server or a database says or fails to say, one place knows who is to blame."""

import gzip
import json
import socket
import ssl
import struct
import threading
from contextlib import contextmanager, suppress

import psycopg2
import pytest
import requests
import sandbox
import servers
from servers import CUT, HANG, RESET, recorded
from urllib3.exceptions import ProxySchemeUnsupported

import immich_analyze as ia

SECRET = "s3cret"
MODEL, IMMICH = "model_host", "immich"


@pytest.fixture(scope="module")
def server():
    with servers.FakeServer() as running:
        yield running


@pytest.fixture
def ask():
    """Sends one request through `http`."""
    with ia.Session() as session:

        def request(url, method="GET", *, blame=MODEL, timeout=servers.PATIENCE, **options):
            return ia.http(session, method, url, server=blame, timeout=timeout, **options)

        yield request


def blamed(ask, *args, **options):
    """The error of a request as (class, key), and itself; not its frames: they hold connections."""
    try:
        ask(*args, **options)
    except ia.AnalyzeError as raised:
        error = raised.with_traceback(None)
    else:
        pytest.fail("no error")
    assert SECRET not in f"{error} {error!r} {error.fields}"
    return (type(error), error.key), error


# Statuses

STATUSES = [
    (400, (ia.Retryable, "picture_refused"), (ia.Permanent, "immich_refused")),
    (401, (ia.Fatal, "host_key_refused"), (ia.Unexpected, "immich_wrong")),
    (402, (ia.Fatal, "host_key_refused"), (ia.Permanent, "immich_refused")),
    (403, (ia.Fatal, "host_key_refused"), (ia.Unexpected, "immich_wrong")),
    (404, (ia.Unexpected, "host_wrong"), (ia.Unexpected, "immich_wrong")),
    (405, (ia.Unexpected, "host_wrong"), (ia.Unexpected, "immich_wrong")),
    (408, (ia.Unavailable, "host_busy"), (ia.Unavailable, "immich_failed")),
    (409, (ia.Retryable, "picture_refused"), (ia.Permanent, "immich_refused")),
    (413, (ia.Retryable, "picture_refused"), (ia.Permanent, "immich_refused")),
    (422, (ia.Retryable, "picture_refused"), (ia.Permanent, "immich_refused")),
    (429, (ia.Unavailable, "host_busy"), (ia.Unavailable, "immich_failed")),
    (500, (ia.Retryable, "host_failed"), (ia.Retryable, "immich_failed")),
    (501, (ia.Retryable, "host_failed"), (ia.Retryable, "immich_failed")),
    (502, (ia.Unavailable, "host_busy"), (ia.Unavailable, "immich_failed")),
    (503, (ia.Unavailable, "host_busy"), (ia.Unavailable, "immich_failed")),
    (504, (ia.Unavailable, "host_busy"), (ia.Unavailable, "immich_failed")),
    (507, (ia.Retryable, "host_failed"), (ia.Retryable, "immich_failed")),
    (524, (ia.Retryable, "host_failed"), (ia.Retryable, "immich_failed")),
]
PAGE = "<html><head><title>Error</title></head><body>nginx</body></html>"


@pytest.mark.parametrize("body", [None, PAGE])
@pytest.mark.parametrize(("status", "by_model", "by_immich"), STATUSES)
def test_a_status_alone_says_who_is_to_blame(ask, server, status, by_model, by_immich, body):
    for blame, expected in ((MODEL, by_model), (IMMICH, by_immich)):
        server.script("GET", "/x", servers.Reply(status, body))
        assert blamed(ask, f"{server.url}/x", blame=blame)[0] == expected


MODEL_HOSTS = {
    (ia.Fatal, "model_missing"): {"ollama": ["chat_model_not_found", "show_model_not_found"]},
    (ia.Fatal, "model_blind"): {
        "ollama": ["chat_image_to_text_model"],
        "llamacpp": ["text_only_model_given_image"],
    },
    (ia.Unexpected, "host_wrong"): {
        "ollama": ["unknown_route", "chat_get"],
        "llamacpp": ["api_version", "chat_get", "unknown_route"],
    },
    (ia.Fatal, "host_key_refused"): {
        "llamacpp": [
            "auth_missing_chat",
            "auth_missing_metrics",
            "auth_missing_models",
            "auth_missing_props",
            "auth_missing_slots",
            "auth_wrong_chat",
        ]
    },
    (ia.Unavailable, "host_busy"): {
        "ollama": ["chat_overloaded"],
        "llamacpp": [
            "chat_while_loading",
            "health_loading",
            "models_while_loading",
            "props_while_loading",
        ],
    },
    (ia.Retryable, "host_failed"): {
        "ollama": ["chat_bad_option_type", "chat_format_bad"],
        "llamacpp": ["chat_image_http_url", "metrics_off"],
    },
    (ia.Retryable, "picture_refused"): {
        "ollama": [
            "chat_bad_json",
            "chat_empty_body",
            "chat_image_empty_jpg",
            "chat_image_garbage_jpg",
            "chat_image_red_tiff",
            "chat_images_bad_base64",
            "chat_images_data_uri",
            "chat_images_empty_string",
            "chat_keep_alive_bad",
            "chat_no_model",
            "chat_prompt_exceeds_ctx",
            "chat_prompt_exceeds_ctx_no_truncate",
            "chat_think_true_unsupported",
        ],
        "llamacpp": [
            "chat_bad_json",
            "chat_context_exceeded",
            "chat_image_40MB_body",
            "chat_image_avif",
            "chat_image_bad_base64",
            "chat_image_empty_jpg",
            "chat_image_exceeds_context",
            "chat_image_file_url",
            "chat_image_garbage_jpg",
            "chat_image_garbage_with_ffmpeg",
            "chat_image_tiff",
            "chat_image_webp",
            "chat_no_messages",
            "chat_wrong_type",
        ],
    },
}
MODEL_CASES = [
    (server, case, expected)
    for expected, by_server in MODEL_HOSTS.items()
    for server, cases in by_server.items()
    for case in cases
]

IMMICH_ERRORS = {
    (ia.Skip, "photo_gone"): [
        "asset-get-after-force-delete",
        "asset-get-locked",
        "asset-get-not-owned",
        "asset-get-unknown-id",
        "asset-get-uppercase-uuid",
        "asset-metadata-bulk-put-one-unknown",
        "asset-metadata-unknown-asset",
        "asset-put-after-force-delete",
        "asset-put-description-locked",
        "asset-put-not-owned",
        "asset-put-partner",
        "asset-put-unknown-id",
        "search-metadata-visibility-locked",
        "thumbnail-not-owned",
        "thumbnail-preview-locked",
        "thumbnail-unknown-id",
    ],
    (ia.Refused, "immich_key_refused"): [
        "asset-get-no-key",
        "asset-get-wrong-key",
        "asset-put-no-key",
        "asset-put-wrong-key",
        "search-metadata-key-as-bearer",
        "search-metadata-no-key",
        "search-metadata-wrong-key",
        "thumbnail-no-key",
        "thumbnail-wrong-key",
    ],
    (ia.Refused, "immich_permission_missing"): [
        "asset-get-missing-permission",
        "asset-metadata-put-no-permission",
        "asset-put-missing-permission",
        "search-metadata-missing-permission",
        "thumbnail-missing-permission",
        "users-me-client-key",
    ],
    (ia.Missing, "preview_missing"): [
        "thumbnail-preview-before-ready",
        "thumbnail-preview-of-LIVE_0001.mov",
        "thumbnail-preview-of-broken.jpg",
    ],
    (ia.Unavailable, "immich_maintenance"): [
        "asset-patch-description",
        "maintenance-mode-asset-get",
        "maintenance-mode-put",
        "maintenance-mode-search",
        "maintenance-mode-thumbnail",
        "unknown-route",
    ],
    (ia.Retryable, "immich_failed"): [
        "asset-put-description-nul-char",
        "database-down-asset-get",
        "database-down-put",
        "database-down-search",
        "database-down-thumbnail",
    ],
    (ia.Missing, "note_missing"): ["asset-metadata-get-key-missing"],
    (ia.Permanent, "immich_refused"): [
        "asset-get-invalid-uuid",
        "asset-metadata-put-value-not-object",
        "asset-put-description-null",
        "asset-put-description-number",
        "asset-put-invalid-uuid",
        "search-metadata-bad-json",
        "search-metadata-no-body",
        "search-metadata-page-0",
        "search-metadata-page-string",
        "search-metadata-size-0",
        "search-metadata-size-1001",
        "thumbnail-invalid-uuid",
        "thumbnail-size-bogus",
        "thumbnail-size-original",
    ],
}


def recordings(name):
    return json.loads((servers.CONTRACTS / f"{name}.json").read_text(encoding="utf-8"))


IMMICH_CASES = [
    (f"immich-{version}", case, expected)
    for version in ("2.7.5", "3.1.0")
    for expected, cases in IMMICH_ERRORS.items()
    for case in cases
    if case in recordings("immich-errors")[version]
]


def test_every_recorded_error_is_in_these_tables():
    cases = {(server, case) for server, case, _ in MODEL_CASES + IMMICH_CASES}
    models = {
        (name, case) for name in ("ollama", "llamacpp") for case in recordings(name)["x-errors"]
    }
    immich = recordings("immich-errors")
    versions = [version for version in immich if version != "schemas"]
    assert cases == models | {(f"immich-{v}", case) for v in versions for case in immich[v]}


@pytest.mark.parametrize(("name", "case", "expected"), MODEL_CASES + IMMICH_CASES)
def test_a_recorded_error_says_who_is_to_blame(ask, server, name, case, expected):
    blame = IMMICH if name.startswith("immich") else MODEL
    server.script("POST", "/x", recorded(name, case))
    assert blamed(ask, f"{server.url}/x", "POST", blame=blame)[0] == expected


def test_a_missing_permission_is_named(ask, server):
    server.script("GET", "/x", recorded("immich-2.7.5", "thumbnail-missing-permission"))
    found = blamed(ask, f"{server.url}/x", blame=IMMICH)[1]
    assert found.fields["permission"] == "asset.view"


def error(text):
    return {"error": {"message": text, "type": "invalid_request_error"}}


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (404, error("The model `x` does not exist."), (ia.Fatal, "model_missing")),
        (400, error("No such model: x"), (ia.Fatal, "model_missing")),
        (400, error("model not found"), (ia.Fatal, "model_missing")),
        (404, {"detail": "no such model"}, (ia.Fatal, "model_missing")),
        (404, "model 'x' not found", (ia.Fatal, "model_missing")),
        (400, error("picture not found"), (ia.Retryable, "picture_refused")),
        (500, error("model runner not found"), (ia.Retryable, "host_failed")),
        (
            500,
            {"error": "this model is missing data required for image input"},
            (ia.Fatal, "model_blind"),
        ),
        (400, error("Image input is not supported"), (ia.Fatal, "model_blind")),
    ],
)
def test_other_servers_word_it_differently(ask, server, status, body, expected):
    server.script("POST", "/x", servers.Reply(status, body))
    assert blamed(ask, f"{server.url}/x", "POST")[0] == expected


@pytest.mark.parametrize(
    ("status", "body", "key", "words"),
    [
        (413, PAGE, "picture_refused", "client_max_body_size"),
        (504, PAGE, "host_busy", "proxy_read_timeout"),
        (400, "<html>You're speaking plain HTTP to an SSL port.", "https_needed", "https://"),
    ],
)
def test_what_a_proxy_before_a_host_says_is_told_with_a_remedy(
    ask, server, status, body, key, words
):
    server.script("POST", "/x", servers.Reply(status, body))
    error = blamed(ask, f"{server.url}/x", "POST")[1]
    assert (error.key, words in str(error)) == (key, True)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"error": "unexpected EOF"}, "unexpected EOF"),
        ({"error": {"message": "Loading model", "code": 503}}, "Loading model"),
        ({"error": '{"error":{"message":"nested","code":400}}'}, "nested"),
        ({"error": json.dumps({"error": json.dumps({"error": "deeper"})})}, "deeper"),
        ({"message": "Not found", "error": "Bad Request"}, "Not found"),
        ({"message": ["one", "two"], "error": "Bad Request"}, "one; two"),
        ({"detail": "not that"}, "not that"),
        ({"object": "error", "message": "said so"}, "said so"),
        ("plain  text\r\n\twith\nlines", "plain text with lines"),
        (PAGE, ""),
        (f"\n  {PAGE}", ""),
        ({"status": "failed"}, ""),
        ({"error": None}, ""),
        (None, ""),
        ([], ""),
        ("null", ""),
        ("{", "{"),
        (b"\xff\0", "\ufffd\0"),
        ("long " * 1000, ("long " * 60).strip()),
        ('{"error": ' * 1000, None),
    ],
)
def test_what_a_server_complains_of_is_one_short_line(ask, server, body, complaint):
    server.script("GET", "/x", servers.Reply(400, body))
    said = blamed(ask, f"{server.url}/x")[1].fields["why"]
    assert len(said) <= 300
    assert complaint is None or said.strip() == complaint


@pytest.mark.parametrize(
    ("text", "pause"),
    [
        ("30", 30.0),
        ("1", 1.0),
        ("0", 1.0),
        ("3600", 3600.0),
        ("86400", 3600.0),
        ("9" * 400, 3600.0),
        ("1.5", 0),
        ("-5", 0),
        ("soon", 0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0),
        ("Wed, 21 Oct 2076 07:28:00 GMT", 3600.0),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", 0),
        ("\xb2", 0),
        (None, 0),
    ],
)
@pytest.mark.parametrize(("blame", "status"), [(MODEL, 429), (MODEL, 503), (IMMICH, 503)])
def test_a_server_may_say_how_long_to_leave_it_alone(ask, server, text, pause, blame, status):
    headers = {} if text is None else {"Retry-After": text}
    server.script("GET", "/x", servers.Reply(status, None, headers))
    assert blamed(ask, f"{server.url}/x", blame=blame)[1].pause == pause


def test_each_class_of_error_is_in_the_tables():
    tables = ia.toml("verdicts.toml").values()
    values = vars(ia).items()
    classes = {name for name, value in values if ia.AnalyzeError in getattr(value, "__mro__", ())}
    elsewhere = {"AnalyzeError", "Stopped"}
    assert {kind for rows in tables for kind, *_ in rows.values()} == classes - elsewhere


# Answers


def test_a_2xx_is_an_answer(ask, server):
    server.script("GET", "/x", servers.Reply(200, {"a": 1}), servers.Reply(204))
    first, second = ask(f"{server.url}/x?key={SECRET}"), ask(f"{server.url}/x")
    assert (first.url, first.status, first.json()) == (f"{server.url}/x", 200, {"a": 1})
    assert (second.status, second.body) == (204, b"")


@pytest.mark.parametrize(
    "body",
    [None, PAGE, "not json", b"\xff\xfe\xfd", '{"a": 1', "[" * 100_000, '{"a":' * 100_000],
    ids=lambda body: str(body)[:10],
)
def test_an_answer_that_is_no_json_is_another_try(ask, server, body):
    server.script("GET", "/x", servers.Reply(200, body))
    reply = ask(f"{server.url}/x")
    assert blamed(reply.json)[0] == (ia.Retryable, "not_json")


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_of_50_mb_is_not_read_to_its_end(ask, server, packed):
    body, headers = bytes(50 * 2**20), {}
    if packed:
        body, headers = gzip.compress(body, 1), {"Content-Encoding": "gzip"}
    server.script("GET", "/x", servers.Reply(200, body, headers))
    expected = (ia.Retryable, "reply_too_large")
    assert blamed(ask, f"{server.url}/x", limit=ia.ANSWER_LIMIT)[0] == expected


@pytest.mark.parametrize(("size", "fits"), [(1000, True), (1001, False)])
def test_the_limit_is_exact(ask, server, size, fits):
    server.script("GET", "/x", servers.Reply(200, bytes(size)))
    if fits:
        assert ask(f"{server.url}/x", limit=1000).body == bytes(size)
    else:
        assert blamed(ask, f"{server.url}/x", limit=1000)[1].key == "reply_too_large"


# Redirects, cookies, headers


@pytest.mark.parametrize(
    ("status", "location", "target"),
    [
        (301, "{other}/x", "{other}/x"),
        (302, "{other}/x", "{other}/x"),
        (303, "{other}/x", "{other}/x"),
        (307, "{other}/x", "{other}/x"),
        (308, "{other}/x", "{other}/x"),
        (302, "http://user:s3cret@{place}/x?token=s3cret", "{other}/x"),
        (302, "/login", "/login"),
        (302, "https://[::1", ""),
        (302, "http://\xe4\xf6.invalid/", None),
        (302, None, ""),
    ],
)
def test_a_redirect_is_reported_and_not_followed(ask, server, status, location, target):
    with servers.FakeServer() as other:
        names = {"other": other.url, "place": other.url.removeprefix("http://")}
        headers = {"Location": location.format(**names)} if location else {}
        server.script("POST", "/x", servers.Reply(status, None, headers))
        found, error = blamed(ask, f"{server.url}/x", "POST", headers={"x-api-key": SECRET})
    assert found == (ia.Unexpected, "redirected")
    assert other.exchanges == []
    assert target is None or error.fields["target"] == target.format(**names)


LOGINS = [
    "https://auth.invalid/?rd=https%3A%2F%2Fphotos%2Fapi&token=s3cret",
    "https://me:s3cret@team.invalid/cdn-cgi/access/login/photos?kid=s3cret",
    "https://auth.invalid/application/o/authorize/",
    "http://127.0.0.1:1/login",
    "//auth.invalid/realms/home/protocol/openid-connect/auth?state=s3cret",
]


@pytest.mark.parametrize("location", LOGINS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_redirect_to_a_login_is_called_that(ask, server, location, method):
    server.script(method, "/x", servers.Reply(302, "<html>", {"Location": location}))
    found, error = blamed(ask, f"{server.url}/x", method)
    assert found == (ia.Unexpected, "login_page")
    assert error.fields["target"] == ia.public(location)
    assert "--immich-header" in str(error)


@pytest.mark.parametrize(
    "location",
    ["https://photos.invalid/sub/x?a=b", "https://photos.invalid/", "https://photos.invalid"],
)
def test_an_address_that_moved_is_no_login(ask, server, location):
    server.script("GET", "/x", servers.Reply(301, "", {"Location": location}))
    assert blamed(ask, f"{server.url}/x?a=b")[0] == (ia.Unexpected, "redirected")


AUTHORIZATION = [
    ([("authorization", f"Basic {SECRET}")], f"Basic {SECRET}"),
    ([("Cookie", "a=b; c=d")], None),
]


@pytest.mark.parametrize(("headers", "sent"), AUTHORIZATION)
def test_headers_go_with_each_request(server, headers, sent, home):
    (home / ".netrc").write_text("default login me password other\n")
    server.script(
        "POST", "/headers", servers.Reply(200, None, {"Set-Cookie": "a=stale"}), forever=True
    )
    before = server.count("POST", "/headers")
    with ia.Session([*headers, ("X-Two", "2"), ("x-two", "3")]) as session:
        for more in ({}, {"headers": {"x-api-key": "k"}}):
            url = f"{server.url}/headers"
            ia.http(session, "POST", url, server=MODEL, timeout=servers.PATIENCE, **more)
    for exchange in server.find("POST", "/headers")[before:]:
        assert exchange.headers.get("Authorization") == sent
        assert exchange.headers["X-Two"] == "3"
        name, value = headers[0]
        assert exchange.headers[name] == value


# Proxies

AWAY = "http://immich.invalid/api/x"  # of no address, so only a proxy can answer


@pytest.fixture
def proxy(monkeypatch):
    """Sets the proxy of the environment, and gives its place as messages show it."""

    def use(place, scheme="http://"):
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"{scheme}user:{SECRET}@{place}")
        return place

    return use


def assert_named(error, place, url):
    shown = ia.t("through_proxy", url=url, proxy=place)
    assert shown in str(error)
    assert "NO_PROXY" in str(error)
    assert SECRET not in str(error)


@pytest.mark.parametrize("url", [AWAY, AWAY.replace("http:", "https:")])
@pytest.mark.parametrize("scheme", ["http://", "https://", "", "socks5://", "nonsense://"])
def test_a_proxy_that_cannot_be_reached_is_named(ask, proxy, url, scheme):
    place = proxy(f"127.0.0.1:{closed_port()}", scheme)
    found, error = blamed(ask, url, timeout=2)
    assert issubclass(found[0], ia.Unavailable | ia.Fatal)
    assert_named(error, place, url)


@pytest.mark.parametrize("status", [403, 407, 502, 503])
@pytest.mark.parametrize("blame", [MODEL, IMMICH])
def test_a_proxy_that_refuses_is_named(ask, proxy, status, blame):
    with servers.FakeServer() as server:
        server.script("GET", "", servers.Reply(status, PAGE), forever=True)
        place = proxy(server.url.removeprefix("http://"))
        assert_named(blamed(ask, AWAY, blame=blame)[1], place, AWAY)


def test_a_proxy_that_makes_no_tunnel_is_named_with_its_reason(ask, proxy):
    url = AWAY.replace("http:", "https:")
    with saying(b"HTTP/1.1 403 Forbidden\r\n\r\n") as place:
        found, error = blamed(ask, url, timeout=2) if proxy(place) else None
    assert found == (ia.Unavailable, "unreachable")
    assert_named(error, place, url)
    assert "403 Forbidden" in str(error)


@pytest.mark.parametrize("no_proxy", [None, "elsewhere.invalid"])
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_this_machine_is_never_asked_through_a_proxy(
    ask, proxy, monkeypatch, server, name, no_proxy
):
    proxy(f"127.0.0.1:{closed_port()}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{closed_port()}")
    if no_proxy:
        monkeypatch.setenv("NO_PROXY", no_proxy)
    url = server.url.replace("127.0.0.1", name)
    server.script("GET", "/here", servers.Reply(200))
    assert ask(f"{url}/here").status == 200


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1]:1/x",
        "http://[::ffff:127.0.0.1]/",
        "http://LOCALHOST./",
        "http://127.0.0.2:1/",
        "http://a.localhost/",
    ],
)
def test_whatever_it_is_called(proxy, url):
    proxy("127.0.0.1:1")
    with ia.Session() as session:
        assert session.shown(url) == url
        assert session.shown("http://localhost.invalid/") != "http://localhost.invalid/"


def test_what_no_proxy_lists_is_asked_directly(ask, proxy, monkeypatch):
    proxy(f"127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NO_PROXY", "immich.invalid")
    error = blamed(ask, AWAY)[1]
    assert error.fields["url"] == AWAY


def test_cookies_are_not_kept(ask, server):
    cookie = {"Set-Cookie": "immich_access_token=stale; Path=/"}
    server.script("GET", "/cookies", servers.Reply(200, None, cookie), servers.Reply(200))
    ask(f"{server.url}/cookies")
    ask(f"{server.url}/cookies")
    assert [e.headers.get("Cookie") for e in server.find("GET", "/cookies")] == [None, None]


def test_a_server_is_told_who_asks(ask, server):
    server.script("GET", "/agent", servers.Reply(200))
    ask(f"{server.url}/agent")
    [exchange] = server.find("GET", "/agent")
    assert exchange.headers["User-Agent"] == f"immich-analyze/{ia.__version__}"


# Connections


@pytest.mark.parametrize(
    ("reply", "timeout", "key"),
    [
        (RESET, servers.PATIENCE, "connection_cut"),
        (CUT, servers.PATIENCE, "connection_cut"),
        (HANG, 0.05, "timed_out"),
    ],
)
def test_a_server_that_gives_up_on_a_request_costs_a_try(ask, reply, timeout, key):
    with servers.FakeServer() as server:
        server.script("POST", "/x", reply)
        found, error = blamed(ask, f"{server.url}/x?key={SECRET}", "POST", timeout=timeout)
    assert found == (ia.Retryable, key)
    assert error.fields["url"] == f"{server.url}/x"


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        (requests.exceptions.ReadTimeout(), (ia.Retryable, "timed_out")),
        (requests.exceptions.ConnectTimeout(), (ia.Unavailable, "unreachable")),
        (
            requests.exceptions.ConnectionError("Connection aborted."),
            (ia.Retryable, "connection_cut"),
        ),
        (requests.exceptions.ChunkedEncodingError(), (ia.Retryable, "connection_cut")),
        (requests.exceptions.ContentDecodingError(), (ia.Retryable, "connection_cut")),
        (requests.exceptions.InvalidHeader(), (ia.Retryable, "connection_cut")),
        (requests.exceptions.SSLError("certificate verify failed"), (ia.Unexpected, "tls_failed")),
        (requests.exceptions.InvalidURL(), (ia.Fatal, "not_an_address")),
        (requests.exceptions.InvalidSchema(), (ia.Fatal, "not_an_address")),
        (requests.exceptions.InvalidProxyURL(), (ia.Fatal, "not_an_address")),
        (ProxySchemeUnsupported("TLS in TLS"), (ia.Fatal, "not_an_address")),
        (OSError("no TLS CA certificate bundle, invalid path: /x"), (ia.Fatal, "tls_failed")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_requests_raises_says_who_is_to_blame(ask, monkeypatch, trouble, expected):
    def request(*_, **__):
        raise trouble

    monkeypatch.setattr(ia.Session, "request", request)
    assert blamed(ask, f"http://user:{SECRET}@host/x?key={SECRET}")[0] == expected


def test_a_certificate_that_is_not_trusted_is_told_in_its_own_words(ask, monkeypatch):
    cause = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED]")
    cause.verify_message = "self-signed certificate"

    def request(*_, **__):
        raise requests.exceptions.SSLError("certificate verify failed") from cause

    monkeypatch.setattr(ia.Session, "request", request)
    assert blamed(ask, "https://host/x")[1].fields["why"] == "self-signed certificate"


@contextmanager
def saying(data, *, hold=False, reset=False):
    """A server of one connection: reads a little, says this, and holds on, resets or hangs up."""
    done = threading.Event()

    def converse():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            with suppress(ConnectionError):  # a client may have had enough before the end
                connection.sendall(data)
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if hold:
                done.wait(servers.PATIENCE)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=converse, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        thread.join(servers.PATIENCE)


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("data", "how", "key"),
    [
        (b"", {}, "connection_cut"),
        (b"", {"reset": True}, "connection_cut"),
        (b"", {"hold": True}, "timed_out"),
        (HEAD, {"hold": True}, "timed_out"),
        (HEAD + b"Content-Length: 9\r\n\r\nhalf", {}, "connection_cut"),
        (HEAD + b"Content-Length: 9\r\n\r\nhalf", {"reset": True}, "connection_cut"),
        (HEAD + b"Content-Length: 9\r\n\r\nhalf", {"hold": True}, "timed_out_reading"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", {}, "connection_cut"),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nhalf", {}, "connection_cut"),
    ],
)
def test_half_an_answer_or_none_costs_a_try(ask, data, how, key):
    timeout = 2 if how.get("hold") else servers.PATIENCE
    with saying(data, **how) as place:
        assert blamed(ask, f"http://{place}/x", timeout=timeout)[0] == (ia.Retryable, key)


@pytest.mark.parametrize(
    ("body", "key"), [(b"", "timed_out"), (b"4\r\nhalf\r\n", "timed_out_reading")]
)
def test_headers_alone_are_no_answer_to_who_listens(ask, body, key):
    with saying(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body, hold=True) as place:
        found = blamed(ask, f"http://{place}/x", timeout=2, watch=lambda piece: None)[0]
    assert found == (ia.Retryable, key)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (f"127.0.0.1:{closed_port()}", "refused"),
        ("immich.invalid", ""),
        ("immich.invalid:8443", ""),
    ],
    ids=["nobody listens", "no such name", "no such name either"],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_cannot_be_reached_is_down(ask, scheme, place, why):
    url = f"{scheme}://user:{SECRET}@{place}/x?key={SECRET}"
    found, error = blamed(ask, url, timeout=2)
    assert found == (ia.Unavailable, "unreachable")
    assert error.fields["url"] == f"{scheme}://{place}/x"
    assert why in error.fields["why"]


def test_a_server_too_busy_to_take_a_connection_is_down(ask):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        crowd = [socket.socket() for _ in range(3)]
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        found, _ = blamed(ask, f"http://127.0.0.1:{listener.getsockname()[1]}/x", timeout=0.05)
        for one in crowd:
            one.close()
    assert found == (ia.Unavailable, "unreachable")


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\0\x02\x02\x28"]
)
def test_no_secure_connection_is_a_wrong_setting(ask, data):
    with saying(data) as place:
        found, error = blamed(ask, f"https://user:{SECRET}@{place}/x")
    assert found == (ia.Unexpected, "tls_failed")
    assert error.fields["url"] == f"https://{place}/x"
    assert "SSL" in error.fields["why"]


def test_tls_to_a_plain_server_is_a_wrong_setting(ask, server):
    url = server.url.replace("http:", "https:")
    assert blamed(ask, f"{url}/x")[0] == (ia.Unexpected, "tls_failed")


@pytest.mark.parametrize("how", [{}, {"reset": True}, {"hold": True}])
def test_a_tls_server_that_hangs_up_may_come_back(ask, how):
    with saying(b"", **how) as place, pytest.raises(ia.Retryable):
        ask(f"https://{place}/x", timeout=0.1)


@pytest.mark.parametrize(
    "place", [".leading", "a..b", f"{'a' * 64}.invalid", "*", "host:99999", "[::1", "[zz]"]
)
def test_an_address_that_cannot_be_one_is_a_wrong_setting(ask, place):
    found, _ = blamed(ask, f"http://user:{SECRET}@{place}/x")
    assert found == (ia.Fatal, "not_an_address")


# PostgreSQL


@contextmanager
def connected(**address):
    """A cursor on a connection made within `sql()`, as the tool's is."""
    with ia.sql():
        connection = psycopg2.connect(**address, connect_timeout=servers.PATIENCE)
        connection.autocommit = True
        try:
            yield connection.cursor()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def database(postgres):
    """The address of a database with one table, and roles that may do little."""
    uri = postgres.database()
    with sandbox.connected(uri) as cursor:
        cursor.execute("CREATE TABLE wire (id int PRIMARY KEY, text varchar(3))")
        cursor.execute("CREATE ROLE wire_reader LOGIN PASSWORD 'reader'")
        cursor.execute("CREATE ROLE wire_full LOGIN CONNECTION LIMIT 0 PASSWORD 'full'")
        cursor.execute("GRANT SELECT ON wire TO wire_reader")
        yield psycopg2.extensions.parse_dsn(uri)
        cursor.execute("DROP TABLE wire")
        cursor.execute("DROP ROLE wire_reader, wire_full")
    postgres.drop(uri)


READER = {"user": "wire_reader", "password": "reader"}


@pytest.mark.parametrize(
    ("statement", "change", "expected"),
    [
        ("SELECT * FROM no_such_table", {}, (ia.Unexpected, "database_refused")),
        ("SELECT no_such_column FROM wire", {}, (ia.Unexpected, "database_refused")),
        ("SELEC 1", {}, (ia.Unexpected, "database_refused")),
        ("UPDATE wire SET text = ''", READER, (ia.Unexpected, "database_refused")),
        ("CREATE TABLE more (id int)", READER, (ia.Unexpected, "database_refused")),
        (
            "BEGIN READ ONLY; INSERT INTO wire VALUES (1, '')",
            {},
            (ia.Unexpected, "database_refused"),
        ),
        ("SELECT 'no uuid'::uuid", {}, (ia.Permanent, "database_refused")),
        ("INSERT INTO wire VALUES (1, 'too long')", {}, (ia.Permanent, "database_refused")),
        ("SELECT 1/0", {}, (ia.Permanent, "database_refused")),
        (
            "SET statement_timeout = '1ms'; SELECT pg_sleep(5)",
            {},
            (ia.Retryable, "database_refused"),
        ),
        (
            "DO $$ BEGIN RAISE EXCEPTION 'a trigger objects'; END $$",
            {},
            (ia.Retryable, "database_refused"),
        ),
        ("SELECT pg_terminate_backend(pg_backend_pid())", {}, (ia.Unavailable, "database_down")),
        (
            "DO $$ BEGIN RAISE 'no space left' USING ERRCODE = 'disk_full'; END $$",
            {},
            (ia.Unavailable, "database_down"),
        ),
    ],
)
def test_what_a_statement_meets_says_who_is_to_blame(database, statement, change, expected):
    with pytest.raises(ia.AnalyzeError) as caught, connected(**database | change) as cursor:
        cursor.execute(statement)
    assert (type(caught.value), caught.value.key) == expected
    assert caught.value.fields["why"]
    assert "\n" not in caught.value.fields["why"]


def test_a_locked_row_costs_a_try(database):
    with connected(**database) as other:
        other.execute("BEGIN; LOCK TABLE wire")
        with pytest.raises(ia.Retryable) as caught, connected(**database) as cursor:
            cursor.execute("SET lock_timeout = '1ms'; SELECT * FROM wire")
    assert type(caught.value) is ia.Retryable
    assert (type(caught.value), caught.value.key) == (ia.Retryable, "database_refused")


def test_a_lost_connection_is_opened_anew(database):
    with connected(**database) as cursor:
        cursor.connection.close()
        with pytest.raises(ia.Unavailable) as caught, ia.sql():
            cursor.execute("SELECT 1")
    assert caught.value.key == "database_down"


def test_what_is_no_error_of_the_database_passes_through():
    with pytest.raises(ia.Skip), ia.sql():
        raise ia.Skip("photo_gone")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dbname": "no_such_database"}, (ia.Unexpected, "database_refused")),
        ({"user": "no_such_role"}, (ia.Unexpected, "database_refused")),
        ({"sslmode": "no_such_mode"}, (ia.Fatal, "database_refused")),
        ({"user": "wire_full", "password": "full"}, (ia.Unavailable, "database_down")),
        ({"port": "1"}, (ia.Unavailable, "database_down")),
        ({"host": "/no/such/folder"}, (ia.Unavailable, "database_down")),
        ({"host": "postgres.invalid"}, (ia.Unavailable, "database_down")),
    ],
    ids=str,
)
def test_what_a_connection_meets_says_who_is_to_blame(database, change, expected):
    with pytest.raises(ia.AnalyzeError) as caught, connected(**database | change):
        pass
    assert (type(caught.value), caught.value.key) == expected


@pytest.fixture(scope="module")
def tcp_address():
    with sandbox.Postgres(tcp=True) as server:
        yield dict(server.address) | {"dbname": "postgres"}


@pytest.mark.skipif(not sandbox.Postgres().own, reason="the server's address is given")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"password": SECRET}, (ia.Fatal, "database_refused")),
        ({"password": ""}, (ia.Fatal, "database_refused")),
        ({"sslmode": "require"}, (ia.Fatal, "database_refused")),
        ({"port": "1", "password": SECRET}, (ia.Unavailable, "database_down")),
    ],
    ids=str,
)
def test_what_a_connection_over_tcp_meets_says_who_is_to_blame(tcp_address, change, expected):
    with pytest.raises(ia.AnalyzeError) as caught, connected(**tcp_address | change):
        pass
    assert (type(caught.value), caught.value.key) == expected
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("FATAL:  the database system is starting up", ia.Unavailable),
        ("FATAL:  the database system is shutting down", ia.Unavailable),
        ("FATAL:  the database system is in recovery mode", ia.Unavailable),
        ("FATAL:  the database system is not yet accepting connections", ia.Unavailable),
        ("FATAL:  sorry, too many clients already", ia.Unavailable),
        ("FATAL:  remaining connection slots are reserved for roles with the", ia.Unavailable),
        ("timeout expired", ia.Unavailable),
        ('FATAL:  database "immich" is not currently accepting connections', ia.Unavailable),
        ("FATAL:  out of memory", ia.Unavailable),
        ("FATAL:  canceling authentication due to timeout", ia.Unavailable),
        ("FATAL:  pgbouncer cannot connect to server", ia.Unavailable),
        ("SSL SYSCALL error: EOF detected", ia.Unavailable),
        ("SSL connection has been closed unexpectedly", ia.Unavailable),
        ("server closed the connection unexpectedly", ia.Unavailable),
        ("FATAL:  terminating connection due to administrator command", ia.Unavailable),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1", no encryption', ia.Fatal),
        ("SSL error: certificate verify failed", ia.Fatal),
        ('invalid port number: "x"', ia.Fatal),
        ("fe_sendauth: no password supplied", ia.Fatal),
    ],
)
def test_the_words_of_a_refused_connection_tell_whether_to_wait(words, expected):
    with pytest.raises(ia.AnalyzeError) as caught, ia.sql():
        raise psycopg2.OperationalError(f'connection to server at "h" failed: {words}\n')
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('server at "ssl.lan" (10.0.0.1), port 5432 failed: Connection refused', ia.Unavailable),
        ('server on socket "/run/invalid/.s.PGSQL.5432" failed: No such file', ia.Unavailable),
        ('FATAL:  database "no password" does not exist', ia.Unexpected),
    ],
)
def test_a_name_in_the_words_does_not_count(text, expected):
    with pytest.raises(ia.AnalyzeError) as caught, ia.sql():
        raise psycopg2.OperationalError(text)
    assert type(caught.value) is expected


def test_what_psycopg2_refuses_by_itself_is_a_bug_or_a_wrong_setting(database):
    with pytest.raises(ia.Fatal), connected(**database) as cursor:
        cursor.fetchone()


def test_a_server_that_crashes_in_the_middle_of_a_statement_is_waited_for():
    """psycopg2 has no class of its own for it, and PostgreSQL had no time for a code."""
    with pytest.raises(ia.Unavailable), ia.sql():
        raise psycopg2.DatabaseError("error with status PGRES_TUPLES_OK and no message")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, ia.Unexpected) for code in ("0A000", "25006", "28000", "3D000", "42P01")),
        *((code, ia.Unavailable) for code in ("08006", "26000", "27000", "34000", "40P01")),
        *((code, ia.Unavailable) for code in ("53300", "57P01", "58030", "HV000")),
        *((code, ia.Retryable) for code in ("55P03", "57014", "P0001", "XX001")),
        *((code, ia.Permanent) for code in ("22021", "22P02")),
    ],
)
def test_the_code_of_a_database_error_says_who_is_to_blame(code, kind):
    assert type(ia.verdict("database", f"{code} some words", why="some words")) is kind


@pytest.mark.parametrize(
    ("server", "said", "verdict"),
    [
        ("database", "22021 \n", ("Permanent", "row_not_utf8")),
        ("immich", "407 \n", ("Unexpected", "immich_wrong")),
        ("immich", "600 \n", ("Retryable", "immich_failed")),
        ("model_host", "600 \n", ("Retryable", "host_failed")),
        ("model_host", "200 Server busy, please try again\n", ("Unavailable", "host_busy")),
        ("model_host", "400 \nThe plain HTTP request was sent to", ("Fatal", "https_needed")),
        ("model_host", "400 \nclient sent an HTTP request to an HTTPS", ("Fatal", "https_needed")),
    ],
)
def test_each_row_of_the_verdicts_is_needed(server, said, verdict):
    fields = dict.fromkeys(("url", "status", "why", "words", "said"), "")
    error = ia.verdict(server, said, **fields)
    assert (type(error).__name__, error.key) == verdict
