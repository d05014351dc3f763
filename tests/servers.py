"""Servers that stand in for Immich, Ollama and llama.cpp, held to what the real ones publish.

Every request, and every reply that is not scripted, is checked against `contracts/`. What does
not fit is noted in `problems` and fails the *test* through `check()`; the client never notices.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import heapq
import http.server
import io
import itertools
import json
import random
import re
import socket
import sys
import threading
import traceback
import uuid
import weakref
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from enum import Enum
from http import HTTPStatus
from pathlib import Path
from types import EllipsisType
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import facts
import jsonschema_rs
from facts import Album, Line, Person
from PIL import Image

CONTRACTS = Path(__file__).with_name("contracts")
JSON = "application/json; charset=utf-8"
MISSING = object()
PATIENCE = 120  # seconds after which a test gives up waiting; no machine is so slow


# --- The contract ----------------------------------------------------------------------------

_NO_JSON_SCHEMA = {"nullable", "default", "deprecated", "readOnly", "writeOnly", "example"}


def as_json_schema(node: Any) -> Any:
    """OpenAPI 3.0's dialect as JSON Schema; an object with named properties takes no others."""
    if not isinstance(node, dict):
        return node
    schema = {
        key: _translated(key, value)
        for key, value in node.items()
        if key not in _NO_JSON_SCHEMA and not key.startswith("x-")
    }
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    if not node.get("nullable"):
        return schema
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _translated(keyword: str, value: Any) -> Any:
    if keyword == "properties":
        return {name: as_json_schema(schema) for name, schema in value.items()}
    if isinstance(value, list):
        return [as_json_schema(item) for item in value]
    return as_json_schema(value)


class Operation:
    """One call of a contract: where it is, what it takes and what it gives."""

    def __init__(self, contract: Contract, method: str, path: str, spec: dict[str, Any]) -> None:
        self.name: str = spec["operationId"]
        self.method = method.upper()
        self.secured = "security" in spec
        self.permission: str | None = spec.get("x-immich-permission")
        self.pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)))
        self.parameters = {entry["name"]: entry for entry in spec.get("parameters", ())}
        self.takes_body = "requestBody" in spec
        self._contract = contract
        self._spec = spec

    def parameter(self, name: str) -> Any:
        """The validator of a path or query parameter."""
        return self._contract.validator(self.parameters[name]["schema"])

    @property
    def request(self) -> Any:
        """The validator of the request's body."""
        return self._contract.validator(_json_content(self._spec["requestBody"]))

    def replies(self, status: int) -> bool:
        return str(status) in self._spec["responses"]

    def reply(self, status: int) -> Any:
        """The validator of a reply's body, or None when it is no JSON."""
        schema = _json_content(self._spec["responses"][str(status)])
        return None if schema is None else self._contract.validator(schema)


def _json_content(part: dict[str, Any]) -> Any:
    return part.get("content", {}).get("application/json", {}).get("schema")


class Contract:
    """A published interface, compiled: which calls there are and what they may carry."""

    def __init__(self, document: dict[str, Any], error: Any) -> None:
        self.schemas = {
            name: as_json_schema(schema)
            for name, schema in document["components"]["schemas"].items()
        }
        self._validators: dict[str, Any] = {}
        self.error = self.validator(error)
        operations = [
            Operation(self, method, path, spec)
            for path, methods in document["paths"].items()
            for method, spec in methods.items()
        ]
        self.operations = sorted(operations, key=lambda operation: operation.pattern.groups)

    def validator(self, schema: Any) -> Any:
        """A compiled validator, made once for each schema."""
        name = json.dumps(schema, sort_keys=True)
        if name not in self._validators:
            root = as_json_schema(schema) | {"components": {"schemas": self.schemas}}
            self._validators[name] = jsonschema_rs.Draft202012Validator(root, validate_formats=True)
        return self._validators[name]

    def component(self, name: str) -> Any:
        return self.validator({"$ref": f"#/components/schemas/{name}"})

    def properties(self, component: str) -> frozenset[str]:
        """The names an object of this release has."""
        return frozenset(self.schemas[component]["properties"])

    def find(self, method: str, path: str) -> tuple[Operation, dict[str, str]] | None:
        """The call a request means, and what its path carries."""
        for operation in self.operations:
            found = operation.pattern.fullmatch(path) if operation.method == method else None
            if found:
                return operation, {name: unquote(text) for name, text in found.groupdict().items()}
        return None


def _read(name: str) -> Any:
    return json.loads((CONTRACTS / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def immich_contract(version: str) -> Contract:
    """The interface of one Immich release; its error bodies by the recorded ones."""
    generation = "3" if int(version.partition(".")[0]) >= 3 else "2"
    return Contract(_read(f"immich-{version}"), _read("immich-errors")["schemas"][generation])


@functools.cache
def model_contract(name: str) -> Contract:
    """The interface of a model server: `ollama` or `llamacpp`."""
    return Contract(_read(name), {"$ref": "#/components/schemas/Error"})


IMMICH_VERSIONS = sorted(
    (path.stem.removeprefix("immich-") for path in CONTRACTS.glob("immich-[0-9]*.json")),
    key=lambda version: [int(number) for number in version.split(".")],
)


def recorded(server: str, case: str) -> Reply:
    """A recorded error reply of `immich-2.7.5`, `immich-3.1.0`, `ollama` or `llamacpp`."""
    if server.startswith("immich-"):
        entry = _read("immich-errors")[server.removeprefix("immich-")][case]
    else:
        entry = _read(server)["x-errors"][case]
    return Reply(entry["status"], entry["body"])


# --- Any server ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a server says: bytes are sent as they are, text as text, all else as JSON."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False  # the connection ends in the middle of the body
    witness: Any = MISSING  # what is checked in place of a body that is already rendered


@dataclass(frozen=True)
class Stream:
    """A body that is sent in pieces, each as soon as it is there."""

    pieces: Iterable[bytes]
    kind: str
    chunked: bool = True  # else it ends with the connection


class Rendered(tuple[bytes, ...]):
    """JSON text in pieces, so that a thousand photos are not copied for each record."""

    __slots__ = ()


class Special(Enum):
    """Replies that are none."""

    HANG = "holds until the gate is set or the server closes; then the real reply, or none"
    CUT = "the request takes effect, its reply ends in the middle"
    RESET = "closes the connection without a reply; the request takes no effect"


HANG, CUT, RESET = Special.HANG, Special.CUT, Special.RESET


class HungUp(Exception):
    """The client is gone by now: no reply."""


Scripted = Reply | Special | Callable[["Exchange"], Reply | Special | None]


class Gate(threading.Event):
    """Open by default. Setting it also frees what hangs."""

    def __init__(self) -> None:
        super().__init__()
        self._freed = threading.Event()
        super().set()

    def set(self) -> None:
        super().set()
        freed, self._freed = self._freed, threading.Event()
        freed.set()

    @property
    def freed(self) -> threading.Event:
        """Will be set with the gate, the next time."""
        return self._freed


class Exchange:
    """One request and, once there is one, the reply to it."""

    def __init__(self, method: str, target: str, headers: Mapping[str, str], data: bytes) -> None:
        parts = urlsplit(target)
        self.method = method
        self.target = target
        self.path = parts.path
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.headers = headers
        self.data = data
        self.operation: Operation | None = None
        self.params: dict[str, str] = {}
        self.failures: list[Any] = []  # what the contract refuses, unknown names aside
        self.freed = threading.Event()  # ends a HANG
        self.at: datetime | None = None  # when it came, by the server's clock
        self.answered: Reply | None = None

    @functools.cached_property
    def json(self) -> Any:
        """The request's body; MISSING without one, None when it is no JSON."""
        if not self.data:
            return MISSING
        try:
            return json.loads(self.data)
        except ValueError:
            return None

    @property
    def broken_json(self) -> bool:
        return self.json is None and self.data.strip() != b"null"

    @property
    def status(self) -> int | None:
        return self.answered and self.answered.status

    @property
    def reply(self) -> Any:
        """The reply's body as a client reads it."""
        if self.answered is None:
            return None
        if isinstance(self.answered.body, Stream):
            return self.answered.witness
        kind, pieces = _encoded(self.answered)
        body = b"".join(pieces)
        return json.loads(body) if kind == JSON else body

    def __repr__(self) -> str:
        return f"<{self.method} {self.target} {self.status}>"


def _encoded(reply: Reply) -> tuple[str, Sequence[bytes]]:
    """Content type and body of a reply."""
    if reply.body is None:
        return "", ()
    if isinstance(reply.body, Rendered):
        return JSON, reply.body
    if isinstance(reply.body, bytes):
        return "application/octet-stream", (reply.body,)
    if isinstance(reply.body, str):
        return "text/plain; charset=utf-8", (reply.body.encode(),)
    return JSON, (json.dumps(reply.body, separators=(",", ":")).encode(),)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Reads a request, hands it over, writes the reply; keeps the connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a kept connection would wait 40 ms for each reply
    wbufsize = -1
    server: _Listener

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        if len(data) < length:  # the client or the test hung up: no request came
            self.close_connection = True
            return
        exchange = Exchange(self.command, self.path, self.headers, data)
        reply = self.server.fake.serve(exchange)
        if reply is None:
            self.close_connection = True
        else:
            self._write(reply)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _serve

    def _write(self, reply: Reply) -> None:
        if isinstance(reply.body, Stream):
            self._write_stream(reply, reply.body)
            return
        kind, pieces = _encoded(reply)
        length = sum(map(len, pieces))
        headers = {"Content-Type": kind} if kind else {}
        headers |= {"Content-Length": str(length + reply.cut)}
        self.send_response(reply.status)
        for name, value in (headers | dict(reply.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"".join(pieces)[: length // 2 if reply.cut else length])
        self.wfile.flush()
        if reply.cut:
            self.close_connection = True

    def _write_stream(self, reply: Reply, body: Stream) -> None:
        ends = {"Transfer-Encoding": "chunked"} if body.chunked else {"Connection": "close"}
        self.send_response(reply.status)
        for name, value in ({"Content-Type": body.kind} | ends | dict(reply.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        pieces = tuple(body.pieces) if reply.cut else body.pieces
        for piece in pieces[: len(pieces) // 2] if reply.cut else pieces:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if body.chunked else piece)
            self.wfile.flush()
        if body.chunked and not reply.cut:
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()
        self.close_connection = reply.cut or not body.chunked

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date header, by the server's clock."""
        moment = self.server.fake.now().timestamp() if timestamp is None else timestamp
        return super().date_time_string(moment)

    def log_message(self, *_: object) -> None:
        """Say nothing: the exchanges are the log."""


class _Listener(http.server.ThreadingHTTPServer):
    """Listens for a fake and knows its connections, so that closing leaves nothing behind."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, fake: FakeServer) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.fake = fake
        self._lock = threading.Lock()
        self._open: dict[threading.Thread, Any] = {}
        self._thread = threading.Thread(target=self._listen, daemon=True, name="fake-listener")
        self._thread.start()

    def _listen(self) -> None:
        """Take in clients until `close` wakes it; `serve_forever` would look up now and then."""
        sys.settrace(None)  # coverage is measured of the tool alone; tracing slows all down
        with contextlib.suppress(OSError):
            while True:
                self.process_request(*self.get_request())

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self._converse, args=(request, client_address), daemon=True, name="fake"
        )
        with self._lock:
            self._open[thread] = request
        thread.start()

    def _converse(self, request: Any, client_address: Any) -> None:
        sys.settrace(None)
        self.process_request_thread(request, client_address)
        with self._lock:
            self._open.pop(threading.current_thread(), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave whenever it likes; anything else is a fault of the fake."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.fake.problem(f"the fake itself failed:\n{traceback.format_exc()}")

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self.server_close()
        with self._lock:
            conversations = list(self._open.items())
        for thread, request in conversations:
            with contextlib.suppress(OSError):  # its client may have been faster
                request.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)


@dataclass
class _Script:
    method: str
    path: str
    replies: deque[Scripted]
    forever: bool
    checked: bool
    unless: bytes = b""

    def next(self, exchange: Exchange) -> Scripted | None:
        if not self.replies or not _matches(exchange, self.method, self.path):
            return None
        if self.unless and self.unless in exchange.data:
            return None
        if self.forever and len(self.replies) == 1:
            return self.replies[0]
        return self.replies.popleft()


def _matches(exchange: Exchange, method: str, path: str) -> bool:
    return bool(re.fullmatch(method, exchange.method) and re.search(path, exchange.path))


class FakeServer:
    """A server in this process that remembers everything and forgives nothing.

    Subclasses say in `behave` what the real server does. Without a contract nothing is checked.
    """

    base = ""  # what the contract's paths are below

    @staticmethod
    def now() -> datetime:
        """Its clock."""
        return datetime.now(UTC)

    def __init__(
        self, contract: Contract | None = None, *, prefix: str = "", tolerated: Iterable[str] = ()
    ) -> None:
        self.contract = contract
        self.prefix = prefix
        self.tolerated = frozenset(tolerated)
        self.exchanges: list[Exchange] = []
        self.problems: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.gate = Gate()
        self.arrived = threading.Semaphore(0)
        self._held = (".*", "")
        self._lock = threading.RLock()
        self._scripts: list[_Script] = []
        self._listener: _Listener | None = None
        self._port = 0

    # Life

    def start(self) -> None:
        """Listen; after `close` again at the same port, as a restarted server does."""
        if not self._port:
            self._port = self._reserve()
        self._listener = _Listener(self._port, self)

    def _reserve(self) -> int:
        """A port that nobody else gets, also while nobody listens there."""
        place = socket.socket()
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        weakref.finalize(self, place.close)
        return place.getsockname()[1]

    def close(self) -> None:
        """Drop every connection, held ones too, and refuse new ones."""
        listener, self._listener = self._listener, None
        if listener:
            self.gate.set()
            listener.close()

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        assert self._port, "not started"
        return f"http://127.0.0.1:{self._port}{self.prefix}"

    # What a test arranges and asks

    def script(
        self,
        method: str,
        path: str,
        *replies: Scripted,
        forever: bool = False,
        checked: bool = False,
        unless: bytes = b"",
    ) -> None:
        """Answer the next matching requests with these, in turn; `forever` repeats the last.

        Method and path are regular expressions: the whole method, any part of the path.
        Scripted replies are taken on trust unless `checked`. Requests that hold `unless` are
        answered as usual. A function is called with the request; None from it means "as usual".
        """
        with self._lock:
            script = _Script(method, path, deque(replies), forever, checked, unless)
            self._scripts.append(script)

    def forget_scripts(self) -> None:
        """Back to the real behaviour."""
        with self._lock:
            self._scripts.clear()

    def hold(self, method: str = ".*", path: str = "") -> None:
        """Keep matching requests waiting until `gate.set()`; only they release `arrived`."""
        self._held = (method, path)
        while self.arrived.acquire(blocking=False):
            pass  # what came before is not waited for
        self.gate.clear()

    def wait_for(self, requests: int = 1) -> None:
        """Return once so many more requests have arrived."""
        for _ in range(requests):
            assert self.arrived.acquire(timeout=PATIENCE), "no request came"

    def find(self, method: str, path: str) -> list[Exchange]:
        """The matching requests so far, in the order of their arrival."""
        with self._lock:
            return [exchange for exchange in self.exchanges if _matches(exchange, method, path)]

    def count(self, method: str, path: str) -> int:
        return len(self.find(method, path))

    def problem(self, text: str) -> None:
        with self._lock:
            self.problems.append(text)

    def check(self) -> None:
        """Fail when a request or a real reply did not fit the contract."""
        if self.problems:
            raise AssertionError("\n".join(self.problems))

    # What happens to a request

    def behave(self, exchange: Exchange) -> Reply:
        """What the real server does."""
        return Reply(404, f"no {exchange.path} here")

    def serve(self, exchange: Exchange) -> Reply | None:
        """Take a request through to its reply; None closes the connection without one."""
        self._take(exchange)
        try:
            reply = self._decide(exchange)
        finally:
            with self._lock:  # before the client can know, or its next request counts too early
                self.in_flight -= 1
        exchange.answered = reply
        return reply

    def _take(self, exchange: Exchange) -> None:
        held = _matches(exchange, *self._held)
        exchange.at = self.now()
        exchange.freed = self.gate.freed  # before a test can know and set the gate
        with self._lock:
            self.exchanges.append(exchange)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.contract:
            self._inspect(exchange, self.contract)
        if held:
            self.arrived.release()
            self.gate.wait()

    def _decide(self, exchange: Exchange) -> Reply | None:
        try:
            return self._reply(exchange)
        except HungUp:
            return None

    def _reply(self, exchange: Exchange) -> Reply | None:
        script, scripted = self._scripted(exchange)
        reply = scripted(exchange) if callable(scripted) else scripted
        if reply is HANG:
            exchange.freed.wait()
        if reply is RESET or self._listener is None:
            return None
        if isinstance(reply, Reply):
            if script.checked:
                self._check_reply(exchange, reply)
            return reply
        real = self.behave(exchange)
        self._check_reply(exchange, real)
        return replace(real, cut=True) if reply is CUT else real

    def _scripted(self, exchange: Exchange) -> tuple[_Script, Scripted | None]:
        with self._lock:
            for script in self._scripts:
                reply = script.next(exchange)
                if reply is not None:
                    return script, reply
        return _Script("", "", deque(), False, False), None

    # The contract

    def _object(self, exchange: Exchange, text: str) -> None:
        self.problem(f"{exchange.method} {exchange.target}: {text}")

    def known(self, exchange: Exchange, path: str) -> bool:
        """Whether a call this contract does not have is one all the same, elsewhere."""
        return False

    def _inspect(self, exchange: Exchange, contract: Contract) -> None:
        """Hold a request to the contract, whatever it will be answered."""
        base = self.prefix + self.base
        path = exchange.path.removeprefix(base)
        if not exchange.path.startswith(base):
            self._object(exchange, f"is not below {base}")
            return
        found = contract.find(exchange.method, path)
        if found is None:
            if not self.known(exchange, path):
                self._object(exchange, "is no call of the contract")
            return
        exchange.operation, exchange.params = found
        self._inspect_parameters(exchange, exchange.operation)
        self._inspect_body(exchange, exchange.operation)

    def _inspect_parameters(self, exchange: Exchange, operation: Operation) -> None:
        for name in exchange.query.keys() - operation.parameters.keys() - self.tolerated:
            self._object(exchange, f"has no query parameter {name}")
        for name, entry in operation.parameters.items():
            given = exchange.params if entry["in"] == "path" else exchange.query
            if name in given:
                value = _from_text(given[name], entry["schema"])
                self._collect(exchange, operation.parameter(name), value, [name])

    def _inspect_body(self, exchange: Exchange, operation: Operation) -> None:
        if not operation.takes_body:
            if exchange.data:
                self._object(exchange, "takes no body")
        elif exchange.json is MISSING or exchange.broken_json:
            self._object(exchange, "lacks a JSON body")
        else:
            if exchange.headers.get("Content-Type", "").partition(";")[0] != "application/json":
                self._object(exchange, "its body is not called application/json")
            self._collect(exchange, operation.request, exchange.json, [])

    def _collect(self, exchange: Exchange, validator: Any, value: Any, path: list[str]) -> None:
        """Note what is wrong; real servers refuse wrong values but drop unknown names."""
        if validator.is_valid(value):
            return
        for error in validator.iter_errors(value):
            unknown = getattr(error.kind, "unexpected", None)
            if unknown is None:
                exchange.failures.append((path + list(error.instance_path), error))
            elif not set(unknown) - self.tolerated:
                continue
            where = "/".join(map(str, path + list(error.instance_path))) or "body"
            self._object(exchange, f"{where}: {error.message}")

    def _check_reply(self, exchange: Exchange, reply: Reply) -> None:
        """Hold a reply to the contract: the fake must not say what the real one would not."""
        operation = exchange.operation
        if self.contract is None or operation is None or isinstance(reply.body, bytes | str):
            return
        if reply.status >= 400:
            validator = self.contract.error
        elif operation.replies(reply.status):
            validator = operation.reply(reply.status)
        else:
            self._object(exchange, f"has no reply {reply.status}")
            return
        body = reply.body if reply.witness is MISSING else reply.witness
        if validator is not None:
            self.verify(f"reply to {exchange.method} {exchange.target}", validator, body)

    def verify(self, what: str, validator: Any, value: Any) -> None:
        """Note where a value of the fake's own making breaks its schema."""
        if not validator.is_valid(value):
            for error in validator.iter_errors(value):
                where = "/".join(map(str, error.instance_path)) or "body"
                self.problem(f"{what}: {where}: {error.message}")


def _from_text(text: str, schema: Mapping[str, Any]) -> Any:
    """A parameter's value: a URL has only text."""
    if schema.get("type") == "boolean":
        return {"true": True, "false": False}.get(text, text)
    return text


# --- Pictures --------------------------------------------------------------------------------

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 40),
    "blue": (40, 60, 200),
    "yellow": (230, 220, 40),
    "orange": (240, 140, 20),
    "purple": (130, 40, 170),
    "pink": (250, 150, 190),
    "brown": (120, 70, 30),
    "gray": (128, 128, 128),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}


@functools.cache
def picture(colour: str = "red", kind: str = "JPEG", size: tuple[int, int] = (80, 60)) -> bytes:
    """A picture of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(out, kind)
    return out.getvalue()


def own_picture(number: int, colour: str | None = None) -> bytes:
    """A JPEG no other photo has: its colour goes round, its comment is the number."""
    colour = colour or list(COLOURS)[number % len(COLOURS)]
    jpeg, comment = picture(colour), str(number).encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment + jpeg[2:]


def broken_picture(size: tuple[int, int] = (600, 400)) -> bytes:
    """A JPEG of a kind that decoders do not know, as they only find out when they try."""
    jpeg = picture("red", size=size)
    return jpeg.replace(b"\xff\xc0", b"\xff\xcb", 1)  # lossless, arithmetic coding


@functools.lru_cache(4096)
def colour_of(image: bytes) -> str:
    """The name nearest to a picture's mean colour."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            mean = opened.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    except OSError:
        return "gray"  # decoders show what a cut picture lacks as gray
    return min(
        COLOURS,
        key=lambda name: sum((a - b) ** 2 for a, b in zip(mean, COLOURS[name], strict=True)),
    )


def told(image: bytes, prompt: str = "") -> str:
    """What the fakes say of a picture by default: a mix-up of pictures cannot go unnoticed."""
    if not image:
        return "There is no image to describe."
    mark = hashlib.sha256(image).hexdigest()[:8]
    return f"A photo dominated by {colour_of(image)} tones, marked {mark}."


# --- Immich ----------------------------------------------------------------------------------

MINIMAL = ("asset.read", "asset.view", "asset.update")
EVERYTHING = ("all",)
BODY_LIMIT = 10 * 1024 * 1024
SMALL_PICTURE = picture("gray", "WEBP", (8, 8))  # a grid thumbnail: never what a model should see
SIDECAR_DELAY = 0.1  # seconds from a PUT until its text came back through the XMP file
RACE = timedelta(milliseconds=30)  # a text that follows another one so soon is lost
HASTE = timedelta(seconds=1)  # what a client should leave between two


@dataclass(frozen=True)
class FakeUser:
    """A user of the library."""

    name: str
    id: str

    @property
    def email(self) -> str:
        return f"{self.name}@example.test"


@dataclass(frozen=True)
class FakeKey:
    """An API key: it belongs to one user and may do what it lists."""

    user: str
    permissions: Sequence[str] = MINIMAL
    name: str = "immich-analyze"


class _Settled:
    """A column that Immich changes in the background: who reads it sees what is due by now."""

    def __init__(self, *default: Any) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, asset: FakeAsset | None, owner: type) -> Any:
        if asset is not None:
            asset.settle(asset)
            return asset.row(self._name)
        if not self._default:  # how a dataclass learns that there is none
            raise AttributeError(self._name)
        return self._default[0]

    def __set__(self, asset: FakeAsset, value: Any) -> None:
        vars(asset)[self._name] = value


@dataclass(frozen=True)
class Writing:
    """A text on its way into the XMP file, and back from there."""

    text: str | None  # None: it was overtaken, and only what the file holds comes back
    due: datetime


# What stands in an asset's own row, which a trigger stamps with each change.
_STAMPED = {"preview", "visibility", "is_favorite", "is_trashed", "is_offline"}


@dataclass(eq=False)
class FakeAsset:
    """A photo or video. Assign to change it, also `extra` and `notes`: replies are cached.

    `updated` moves with its own row in the database, as when its preview is made. A description
    that is assigned is there for good, as if written long ago.
    """

    moves = 0  # counts changes of date, so that a library knows when to sort again

    id: str
    owner: str
    name: str
    created: datetime  # when taken: fileCreatedAt
    created_at: datetime  # when uploaded
    updated: datetime = _Settled()
    preview: bytes | None = None  # None: not made (yet)
    mime: str = "image/jpeg"
    type: str = "IMAGE"
    film: bytes = b""  # what a video's playback gives: what was transcoded, else the original
    seconds: float = 4.0  # that a video lasts
    local: datetime | None = None  # localDateTime, if the clock there did not show UTC
    visibility: str = "timeline"
    library_id: str | None = None  # None: uploaded
    read_only: bool = False  # Immich cannot write beside the picture
    camera: str = ""  # the description inside the picture
    xmp: str | None = None  # the one beside it, which wins
    locked: bool = False  # the description stays when the files are read again
    put: datetime | None = None  # when a client last sent one
    writing: Writing | None = None
    settle: Callable[[FakeAsset], None] = field(default=lambda _: None, repr=False)
    description: str = _Settled("")
    is_favorite: bool = False
    is_trashed: bool = False
    is_offline: bool = False
    exif: bool = True  # whether there is an exif row at all
    extra: Mapping[str, Any] = field(default_factory=dict)  # more exif fields
    people: Sequence[Person] = ()  # a face each
    tags: Sequence[str] = ()  # by their full paths
    ocr: Sequence[Line | str] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)  # per-asset metadata by key
    noted: Mapping[str, datetime] = field(default_factory=dict)
    clock: Callable[[], datetime] | None = field(default=None, repr=False)  # set after all else

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        vars(self)["rendered"] = {}
        if name in _STAMPED and vars(self).get("clock"):
            self.updated = self.clock()
        if name == "created":
            FakeAsset.moves += 1
        if name == "description":
            self.writing = None
            if not self.read_only and value != self.filed:
                self.xmp = value

    def store(self, **columns: Any) -> None:
        """Change the row alone: not the files, nor what is due."""
        vars(self).update(columns, rendered={})

    def row(self, column: str) -> Any:
        """What the database holds, whatever is due."""
        return vars(self)[column]

    @property
    def filed(self) -> str:
        """The description that reading the files again would bring."""
        return _through_a_file(self.camera if self.xmp is None else self.xmp)


_BLANK = "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(
    map(chr, range(0x2000, 0x200B))
)  # white space to JavaScript


def _through_a_file(text: str) -> str:
    """What is left of a text: ExifTool tells one that looks like a number as a number."""
    if re.fullmatch(r"-?(\d|[1-9]\d{1,14})\.\d{1,16}", text, re.ASCII):
        text = text.rstrip("0").rstrip(".")
    return text.strip(_BLANK)


@dataclass(eq=False)
class FakeAlbum:
    """An album with the ids of its photos, whosever they are."""

    id: str
    name: str
    owner: str
    shared: Sequence[str]
    made: datetime
    assets: list[str] = field(default_factory=list)

    @property
    def users(self) -> list[str]:
        """Who may see it."""
        return [self.owner, *self.shared]


class Refused(Exception):
    """A request the server does not carry out."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.more = more


_DATE_BOUNDS = {
    "createdAfter": ("created_at", 1),
    "createdBefore": ("created_at", -1),
    "updatedAfter": ("updated", 1),
    "updatedBefore": ("updated", -1),
}
_SEARCHED = {
    *("page", "size", "order", "withExif", "withPeople", "withStacked", "withDeleted"),
    *("visibility", "isArchived", "isVisible", "withArchived", "isOffline", "isFavorite"),
    *("takenAfter", "takenBefore", "type", "id", "description"),
    *("libraryId", "albumIds", "personIds", "tagIds"),
    *_DATE_BOUNDS,
}


class FakeImmich(FakeServer):
    """One Immich release with its users, keys and photos.

    `keys` maps each API key to a FakeKey or just the name of its user; `partners` maps a user to
    those who share their photos with them. `seed` makes ids and the order of ties repeatable.

    A description is stored at once, and what becomes of it `sidecar_delay` seconds later, by the
    clock `now`, before the next request is answered or the asset's description is read: Immich
    writes it to an XMP file and reads that. `hasty` lists the assets whose description was sent
    again within a second, once for each time.
    """

    base = "/api"

    def __init__(
        self,
        version: str = "3.1.0",
        keys: Mapping[str, FakeKey | str] | None = None,
        *,
        partners: Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
        prefix: str = "",
        tolerated: Iterable[str] = (),
        now: Callable[[], datetime] | None = None,
        sidecar_delay: float = SIDECAR_DELAY,
    ) -> None:
        self.version = tuple(int(number) for number in version.split("."))
        ignored = {"edited"} if self.version < (2, 5) else set()
        ignored |= {"shared"} if self.version >= (3,) else set()
        super().__init__(immich_contract(version), prefix=prefix, tolerated={*tolerated, *ignored})
        self.lock = threading.RLock()  # around the assets; a test that adds meanwhile needs none
        if now:
            self.now = now
        self.sidecar_delay = sidecar_delay
        self.hasty: list[str] = []
        self.keys = {
            secret: FakeKey(key) if isinstance(key, str) else key
            for secret, key in (keys or {"alice-key": "alice"}).items()
        }
        self.key = next(iter(self.keys))
        self.partners = dict(partners or {})
        self.assets: dict[str, FakeAsset] = {}
        self.users: dict[str, FakeUser] = {}
        self.albums: dict[str, FakeAlbum] = {}
        self.people: dict[tuple[str, str], Person] = {}  # as their users know them, by id
        self.external_domain = ""  # Immich's address for people, as its administrator set it
        self.maintenance = False
        self.database_down = False
        self._random = random.Random(seed)
        self._due: list[tuple[datetime, str]] = []  # a heap of asset ids
        self._sorted: tuple[Any, list[FakeAsset], list[datetime]] = (None, [], [])
        self._item_names = self.contract.properties("AssetResponseDto")
        self._item_schema = self.contract.component("AssetResponseDto")
        self._no_exif = dict.fromkeys(sorted(self.contract.properties("ExifResponseDto")))
        self._calls = {
            "searchAssets": self._search,
            "searchAssetStatistics": self._statistics,
            "getAssetInfo": self._get_asset,
            "updateAsset": self._update_asset,
            "viewAsset": self._thumbnail,
            "playAssetVideo": self._playback,
            "getAssetOcr": self._get_ocr,
            "getAllAlbums": self._get_albums,
            "getAllTags": self._get_tags,
            "getAssetMetadata": self._get_notes,
            "updateAssetMetadata": self._put_notes,
            "getAssetMetadataByKey": self._get_note,
            "deleteAssetMetadata": self._delete_note,
            "updateBulkAssetMetadata": self._put_notes_of_many,
            "pingServer": lambda _: {"res": "pong"},
            "getServerVersion": lambda _: self._version(),
            "getServerConfig": lambda _: self._settings(),
            "getMyUser": self._get_user,
            "getMyApiKey": self._get_key,
            "validateAccessToken": lambda _: {"authStatus": True},
        }
        for key in self.keys.values():
            self.user(key.user)

    # What a test puts in

    def user(self, name: str) -> FakeUser:
        """The user of that name, made when first asked for."""
        return self.users.setdefault(name, FakeUser(name, self._uuid()))

    @property
    def owner(self) -> str:
        """The user of the first key."""
        return self.keys[self.key].user

    def add(
        self,
        name: str | None = None,
        *,
        preview: bytes | EllipsisType | None = ...,
        **fields: Any,
    ) -> FakeAsset:
        """Put an asset in. Left out: an owner, dates a minute apart, a preview of its own."""
        with self.lock:
            number = len(self.assets)
            fields = {
                "id": fields.pop("id", None) or self._uuid(),
                "owner": self.owner,
                "name": name or f"IMG_{number:04}.jpg",
                "created": datetime(2024, 5, 1, 8, 0, tzinfo=UTC) + timedelta(minutes=number),
                "created_at": self.now(),
                "preview": own_picture(number) if preview is ... else preview,
                **fields,
            }
            fields.setdefault("updated", fields["created_at"])
            filed = fields.get("xmp", fields.get("camera", ""))
            fields.setdefault("description", _through_a_file(filed))
            asset = FakeAsset(**fields, settle=self._settle, clock=lambda: self.now())
            self.user(asset.owner)
            for person in asset.people:
                self.people.setdefault((asset.owner, person.id), person)
            self.assets[asset.id] = asset
            return asset

    def add_many(self, number: int, **fields: Any) -> list[FakeAsset]:
        """Put in so many; a callable gives each its own value, called with 0, 1, 2 …"""
        return [
            self.add(**{k: v(n) if callable(v) else v for k, v in fields.items()})
            for n in range(number)
        ]

    def album(self, wanted: Album | str, owner: str = "") -> FakeAlbum:
        """An album, made when first asked for; a mere name is one of that user, or the first."""
        with self.lock:
            owner = owner or self.owner
            album = facts.album_of(wanted, owner)
            for user in (owner, album.owner or owner, *album.shared):
                self.user(user)
            made = (album.id, album.name, album.owner or owner, album.shared, self.now())
            return self.albums.setdefault(album.id, FakeAlbum(*made))

    def add_to_album(self, asset: FakeAsset, wanted: Album | str) -> FakeAlbum:
        """Put a photo into an album. The photo is not updated by it."""
        with self.lock:
            album = self.album(wanted, asset.owner)
            album.assets.append(asset.id)
            return album

    def name_person(self, person: Person, name: str, owner: str = "") -> None:
        """Give a person the name that a user, or the first, knows it by; no photo is updated."""
        with self.lock:
            mark = (owner or self.owner, person.id)
            self.people[mark] = replace(self.people[mark], name=name)
            for asset in self.assets.values():
                asset.store()

    def tag(self, asset: FakeAsset, tag: str) -> None:
        """Tag a photo, which is updated by it."""
        with self.lock:
            asset.tags = [*asset.tags, tag]
            asset.updated = self.now()

    def tag_id(self, tag: str, owner: str = "") -> str:
        """The id of a tag of that user, or of the first."""
        return facts.own_id(self.user(owner or self.owner).id, tag)

    # What Immich does in the background

    def settle(self) -> None:
        """Let happen what is due by now."""
        with self.lock:
            while self._due and self._due[0][0] <= self.now():
                _, asset_id = heapq.heappop(self._due)
                if asset_id in self.assets:
                    self._settle(self.assets[asset_id])

    def _settle(self, asset: FakeAsset) -> None:
        if asset.writing is None:  # nearly always
            return
        with self.lock:
            writing = asset.writing
            if writing is None or self.now() < writing.due:
                return
            asset.writing = None
            if writing.text is not None and not asset.read_only:
                asset.xmp = writing.text
            if self.version >= (2, 5):  # even if nothing was written
                asset.locked = False
            self._extract(asset, writing.due)

    def refresh_metadata(self, asset: FakeAsset) -> None:
        """Read the picture and the XMP file again, as an administrator may have Immich do."""
        with self.lock:
            self._settle(asset)
            self._extract(asset, self.now())

    def _extract(self, asset: FakeAsset, moment: datetime) -> None:
        text = asset.row("description") if asset.locked else asset.filed
        asset.store(description=text, updated=moment, exif=True)

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    # From request to reply

    def known(self, exchange: Exchange, path: str) -> bool:
        """A call of another release is a fair question, answered with 404."""
        return any(immich_contract(v).find(exchange.method, path) for v in IMMICH_VERSIONS)

    def behave(self, exchange: Exchange) -> Reply:
        with self.lock:
            self.settle()
            try:
                found = self._answer(exchange)
            except Refused as refusal:
                return self._refusal(refusal)
        return found if isinstance(found, Reply) else Reply(200, found, self._mark(self._cid()))

    def _answer(self, exchange: Exchange) -> Any:
        operation = exchange.operation
        public = {"pingServer"} if self.database_down else {"pingServer", "getServerVersion"}
        if operation is None or (self.maintenance and operation.name not in public):
            raise Refused(404, f"Cannot {exchange.method} {self._local(exchange)}")
        if self.database_down and operation.name not in public:
            raise Refused(500, "Internal server error", error=None)
        if len(exchange.data) > BODY_LIMIT:
            raise Refused(500, "Internal server error", error=None)
        if exchange.broken_json:
            raise Refused(400, "Unexpected end of JSON input", correlationId=None)
        if operation.secured:
            self._authorise(exchange, operation)
        self._validate(exchange)
        return self._calls[operation.name](exchange)

    def _local(self, exchange: Exchange) -> str:
        return exchange.target.removeprefix(self.prefix)

    def _authorise(self, exchange: Exchange, operation: Operation) -> None:
        """Sessions come before keys, so a stale one spoils a good key."""
        headers = exchange.headers
        session = headers.get("Authorization", "").startswith("Bearer ")
        if session or "immich_access_token" in headers.get("Cookie", ""):
            raise Refused(401, "Invalid user token")
        key = self._key_of(exchange)
        public = operation.name in {"getMyApiKey", "validateAccessToken"}
        if self.version < (1, 137) or public:
            return
        needed = operation.permission or "all"
        if not {needed, "all"} & set(key.permissions):
            raise Refused(403, f"Missing required permission: {needed}")

    def _key_of(self, exchange: Exchange) -> FakeKey:
        secret = exchange.headers.get("x-api-key") or exchange.query.get("apiKey")
        if not secret:
            raise Refused(401, "Authentication required")
        if secret not in self.keys:
            raise Refused(401, "Invalid API key")
        return self.keys[secret]

    def _validate(self, exchange: Exchange) -> None:
        if self.version >= (3,):
            body_due = exchange.operation.takes_body and exchange.json is MISSING
            if body_due:
                issues = [_issue([], "invalid_type", "object", "undefined")]
            else:
                issues = [_zod_issue(path, error) for path, error in exchange.failures]
            if issues:
                raise Refused(400, "Validation failed", errors=_first_by_path(issues))
            return
        texts = [_class_validator_text(path, e) for path, e in exchange.failures if not _numeric(e)]
        if texts:
            raise Refused(400, list(dict.fromkeys(texts)))

    def _refusal(self, refusal: Refused) -> Reply:
        cid = self._cid()
        body = {"message": refusal.message} | refusal.more
        if self.version < (3,):
            phrase = HTTPStatus(refusal.status).phrase
            rest = {"error": phrase, "statusCode": refusal.status, "correlationId": cid}
            body = {"message": refusal.message} | rest | refusal.more
        body = {name: value for name, value in body.items() if value is not None}
        return Reply(refusal.status, body, self._mark(cid))

    def _cid(self) -> str:
        return f"{self._random.getrandbits(40):08x}"[:8]

    def _mark(self, cid: str) -> dict[str, str]:
        return {"X-Correlation-ID" if self.version >= (3,) else "x-immich-cid": cid}

    # Assets

    def _user_of(self, exchange: Exchange) -> str:
        return self._key_of(exchange).user

    def _accessible(self, exchange: Exchange, right: str, asset_id: str = "") -> FakeAsset:
        """The asset meant, when the key's user may do this to it; the server tells no reasons."""
        asset = self.assets.get(asset_id or exchange.params["id"])
        user = self._user_of(exchange)
        if asset and asset.visibility != "locked":
            if asset.owner == user:
                return asset
            shared = asset.owner in self.partners.get(user, ()) and not asset.is_trashed
            album = any(asset.id in album.assets for album in self._albums_of(user))
            if (shared or album) and right != "asset.update":
                return asset
        raise Refused(400, f"Not found or no {right} access")

    def _get_asset(self, exchange: Exchange) -> Any:
        asset = self._accessible(exchange, "asset.read")
        owner = self._user_dto(self.user(asset.owner), "UserResponseDto")
        tags = [self._tag_dto(asset.owner, tag) for tag in asset.tags]
        more = {"owner": owner, "tags": tags, "stack": None, "unassignedFaces": []}
        return self._named(self._shape(asset, exif=True, people=True) | more)

    def _update_asset(self, exchange: Exchange) -> Any:
        asset = self._accessible(exchange, "asset.update")
        changes = _body(exchange)
        for name in changes.keys() - {"description"}:
            if name in self.contract.properties("UpdateAssetDto"):
                self._object(exchange, f"the fake cannot change {name}")
        if "description" in changes:
            if "\0" in changes["description"]:
                raise Refused(500, "Failed to update asset")
            self._describe(asset, changes["description"])
        asset.updated = self.now()
        return self._named(self._shape(asset, exif=True) | {"unassignedFaces": []})

    def _describe(self, asset: FakeAsset, text: str) -> None:
        """Store a text: as sent, but for what PostgreSQL cannot hold. How it lasts shows later."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        now, last, first = self.now(), asset.put, asset.writing
        raced = last is not None and now - last < RACE
        if last is not None and now - last < HASTE:
            self.hasty.append(asset.id)
        asset.store(description=text, exif=True)
        asset.locked = self.version >= (2, 4)
        asset.put = now
        written = first and first.text if raced else text
        asset.writing = Writing(written, now + timedelta(seconds=self.sidecar_delay))
        heapq.heappush(self._due, (asset.writing.due, asset.id))

    def _thumbnail(self, exchange: Exchange) -> Reply:
        asset = self._accessible(exchange, "asset.view")
        size = exchange.query.get("size", "thumbnail")
        if size not in {"preview", "thumbnail"}:
            self._object(exchange, f"the fake has no {size} pictures")
        if asset.preview is None:
            raise Refused(404, "Asset media not found")
        if size != "preview":
            return Reply(200, SMALL_PICTURE, {"Content-Type": "image/webp"})
        name = f"{Path(asset.name).stem}_preview.{asset.mime.partition('/')[2]}"
        mark = hashlib.sha1(asset.preview).hexdigest()[:11]
        headers = {
            "Content-Type": asset.mime,
            "Content-Disposition": f"inline; filename*=UTF-8''{name}",
            "Cache-Control": "private, max-age=86400, no-transform",
            "Accept-Ranges": "bytes",
            "Last-Modified": format_datetime(asset.created_at.astimezone(UTC), usegmt=True),
            "ETag": f'W/"{len(asset.preview):x}-{mark}"',
        }
        return Reply(200, asset.preview, headers | self._mark(self._cid()))

    def _playback(self, exchange: Exchange) -> Reply:
        """A video, or the part of it that is asked for."""
        asset = self._accessible(exchange, "asset.view")
        if asset.type != "VIDEO":
            raise Refused(404, "Asset media not found")
        size, part = len(asset.film), exchange.headers.get("Range", "")
        headers = {
            "Content-Type": "video/mp4",
            "Cache-Control": "private, max-age=86400, no-transform",
            "Accept-Ranges": "bytes",
        }
        if not (bounds := re.fullmatch(r"bytes=(\d+)-(\d*)", part)):
            return Reply(200, asset.film, headers | self._mark(self._cid()))
        first, last = int(bounds[1]), min(int(bounds[2] or size), size - 1)
        if first > last:
            raise Refused(416, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Reply(206, asset.film[first : last + 1], headers | self._mark(self._cid()))

    # What assets look like

    def _named(self, shape: dict[str, Any]) -> dict[str, Any]:
        """Only what this release has a name for."""
        return {name: value for name, value in shape.items() if name in self._item_names}

    def _shape(self, asset: FakeAsset, *, exif: bool, people: bool = False) -> dict[str, Any]:
        """An asset as search results show it, with the names of all releases."""
        owner, ready, video = self.users[asset.owner].id, asset.preview is not None, asset.type
        suffix = Path(asset.name).suffix
        seconds = asset.seconds if video == "VIDEO" else 0
        old_duration = f"00:00:{seconds:06.3f}" if seconds else "0:00:00.00000"
        taken, uploaded = _milliseconds(asset.created), _milliseconds(asset.created_at)
        shape = {
            "id": asset.id,
            "createdAt": uploaded,
            "deviceAssetId": f"{asset.name}-100000",
            "ownerId": owner,
            "deviceId": "test",
            "libraryId": asset.library_id,
            "type": asset.type,
            "originalPath": f"/data/upload/{owner}/{asset.id[:2]}/{asset.id}{suffix}",
            "originalFileName": asset.name,
            "originalMimeType": "video/mp4" if seconds else "image/jpeg",
            "thumbhash": "pegJDYJ3iJp/l4d3dpeHeWQgP+/v" if ready else None,
            "fileCreatedAt": taken,
            "fileModifiedAt": taken,
            "localDateTime": _milliseconds(asset.local or asset.created),
            "updatedAt": _milliseconds(asset.row("updated")),
            "isFavorite": asset.is_favorite,
            "isArchived": asset.visibility == "archive",
            "isTrashed": asset.is_trashed,
            "visibility": asset.visibility,
            "duration": (int(seconds * 1000) or None) if self.version >= (3,) else old_duration,
            "livePhotoVideoId": None,
            "people": self._people(asset) if people else [],
            "checksum": base64.b64encode(uuid.UUID(asset.id).bytes + b"\0\0\0\0").decode(),
            "isOffline": asset.is_offline,
            "hasMetadata": True,
            "duplicateId": None,
            "resized": True,
            "width": 4000 if ready else None,
            "height": 3000 if ready else None,
            "isEdited": False,
        }
        if exif and asset.exif:
            known = {"dateTimeOriginal": taken, "description": asset.row("description")}
            shape["exifInfo"] = self._no_exif | known | dict(asset.extra)
        return shape

    def _item(self, asset: FakeAsset, exif: bool, people: bool = False) -> bytes:
        """An asset's JSON in search results: made and checked once, until it changes."""
        found = asset.rendered.get((exif, people))
        if found is None:
            shape = self._named(self._shape(asset, exif=exif, people=people))
            self.verify(f"asset {asset.name}", self._item_schema, shape)
            found = json.dumps(shape, separators=(",", ":")).encode()
            asset.rendered[exif, people] = found
        return found

    # What is known of them: people, tags, text, albums

    def _shown_faces(self, asset: FakeAsset) -> list[Person]:
        return [face for face in asset.people if face.visible and not face.deleted]

    def _people(self, asset: FakeAsset) -> list[dict[str, Any]]:
        """Everybody on a photo once, also who is hidden or has no name."""
        faces: dict[str, list[Person]] = {}
        for face in self._shown_faces(asset):
            faces.setdefault(face.id, []).append(face)
        people = [self._person(asset, *each) for each in faces.items()]
        return sorted(people, key=lambda one: one["id"]) if self.version >= (3,) else people

    def _person_id(self, owner: str, person_id: str) -> str:
        """Users know a person by one id from 3.2 on, and by an id each before."""
        return person_id if self.version >= (3, 2) else facts.own_id(owner, person_id)

    def _person(self, asset: FakeAsset, person_id: str, faces: Sequence[Person]) -> dict[str, Any]:
        person = self.people.setdefault((asset.owner, person_id), faces[0])
        dto = {
            "id": self._person_id(asset.owner, person_id),
            "name": person.name,
            "birthDate": person.birth,
            "thumbnailPath": "",
            "isHidden": person.hidden,
            "isFavorite": False,
            "updatedAt": _milliseconds(asset.created_at),
            "faces": [self._face(asset, face) for face in faces],
            "otherPeople": [],
            "sharedBy": [],
            "sharedWith": [],
        }
        kind = "PersonResponseDto" if self.version >= (3,) else "PersonWithFacesResponseDto"
        names = self.contract.properties(kind)
        return {name: value for name, value in dto.items() if name in names}

    def _face(self, asset: FakeAsset, face: Person) -> dict[str, Any]:
        mark = facts.own_id(asset.id, face.id, str(face.x))
        return {"id": mark, "sourceType": "machine-learning", **facts.face_box(face)}

    def _tag_dto(self, owner: str, tag: str) -> dict[str, Any]:
        since = "2024-01-01T00:00:00.000Z"
        above = facts.parent(tag)
        dto = {"id": self.tag_id(tag, owner), "name": tag.rpartition("/")[2], "value": tag}
        dto |= {"parentId": self.tag_id(above, owner)} if above else {}
        return dto | {"createdAt": since, "updatedAt": since}

    def _get_tags(self, exchange: Exchange) -> Any:
        user = self._user_of(exchange)
        own = (asset for asset in self.assets.values() if asset.owner == user)
        tags = {tag for asset in own for leaf in asset.tags for tag in facts.with_parents(leaf)}
        return [self._tag_dto(user, tag) for tag in sorted(tags)]

    def _get_ocr(self, exchange: Exchange) -> Any:
        """One row for each line that can be seen."""
        asset = self._accessible(exchange, "asset.read")
        lines = facts.lines_of(asset.ocr)
        return [
            {
                "id": facts.own_id(asset.id, str(place)),
                "assetId": asset.id,
                "text": line.text,
                "textScore": 0.98,
                "boxScore": 0.95,
                **facts.box(place, len(lines)),
            }
            for place, line in enumerate(lines)
            if line.visible
        ]

    def _albums_of(self, user: str) -> list[FakeAlbum]:
        """The user's own albums and those shared with the user."""
        return [album for album in self.albums.values() if user in album.users]

    def _get_albums(self, exchange: Exchange) -> Any:
        """All that the user sees; before 3.0 the user's own or, in a second call, shared ones."""
        user, query = self._user_of(exchange), exchange.query
        asked = {name: query[name] for name in ("name", "id") if name in query}
        shared, owned = query.get("isShared"), query.get("isOwned")
        if self.version < (3,):
            shared = query.get("shared")
            owned = None if shared == "true" else "true"
        if "assetId" in query:  # nothing else counts then
            shared = owned = None
        albums = [
            album
            for album in self._albums_of(user)
            if shared in (None, _said(bool(album.shared)))
            and owned in (None, _said(album.owner == user))
            and all(getattr(album, name) == value for name, value in asked.items())
            and query.get("assetId", "") in ("", *album.assets)
        ]
        return [self._album_dto(album) for album in albums]

    def _album_dto(self, album: FakeAlbum) -> dict[str, Any]:
        users = [
            {"user": self._user_dto(self.user(name), "UserResponseDto"), "role": role}
            for name, role in [(album.owner, "owner"), *((name, "editor") for name in album.shared)]
        ]
        made = _milliseconds(album.made)
        there = [id for id in album.assets if id in self.assets and not self.assets[id].is_trashed]
        dto = {
            "id": album.id,
            "albumName": album.name,
            "description": "",
            "albumThumbnailAssetId": next(iter(there), None),
            "albumUsers": users if self.version >= (3,) else users[1:],
            "assetCount": len(there),
            "assets": [],
            "createdAt": made,
            "updatedAt": made,
            "hasSharedLink": False,
            "isActivityEnabled": True,
            "order": "desc",
            "owner": users[0]["user"],
            "ownerId": self.user(album.owner).id,
            "shared": bool(album.shared),
        }
        names = self.contract.properties("AlbumResponseDto")
        return {name: value for name, value in dto.items() if name in names}

    # Search

    def _search(self, exchange: Exchange) -> Reply:
        wanted = _body(exchange)
        page, size = int(wanted.get("page", 1)), int(wanted.get("size", 250))
        start = (page - 1) * size
        window = list(itertools.islice(self._found(exchange, wanted), start, start + size + 1))
        items, more = window[:size], len(window) > size
        exif, people = bool(wanted.get("withExif")), bool(wanted.get("withPeople"))
        pieces = [self._item(asset, exif, people) for asset in items]
        assets = {
            "total": len(items),
            "count": len(items),
            "items": [],
            "facets": [],
            "nextPage": str(page + 1) if more else None,
            "nextCursor": None,
        }
        names = self.contract.properties("SearchAssetResponseDto")
        assets = {name: value for name, value in assets.items() if name in names}
        albums = {"total": 0, "count": 0, "items": [], "facets": []}
        envelope = {"albums": albums, "assets": assets}
        before, after = json.dumps(envelope).rsplit('"items": []', 1)
        body = Rendered([f'{before}"items": ['.encode(), b",".join(pieces), f"]{after}".encode()])
        return Reply(200, body, self._mark(self._cid()), witness=envelope)

    def _statistics(self, exchange: Exchange) -> Any:
        return {"total": sum(1 for _ in self._found(exchange, _body(exchange)))}

    def _found(self, exchange: Exchange, wanted: dict[str, Any]) -> Iterator[FakeAsset]:
        """The assets a search finds, in the order of this release."""
        for name in wanted.keys() - _SEARCHED:
            if name in self.contract.properties("MetadataSearchDto"):
                self._object(exchange, f"the fake cannot search by {name}")
        assets, dates = self._by_date()
        first, last = 0, len(assets)
        if "takenAfter" in wanted:
            first = bisect_left(dates, _bound(wanted["takenAfter"]))
        if "takenBefore" in wanted:
            last = bisect_right(dates, _bound(wanted["takenBefore"]))
        upwards = wanted.get("order") == "asc"
        places = range(first, last) if upwards else range(last - 1, first - 1, -1)
        conditions = self._conditions(self._user_of(exchange), wanted)
        found = (
            assets[place]
            for place in places
            if all(condition(assets[place]) for condition in conditions)
        )
        return found if self.version >= (3, 1) else self._ties_anyhow(found)

    def _by_date(self) -> tuple[list[FakeAsset], list[datetime]]:
        state = (FakeAsset.moves, len(self.assets))
        if self._sorted[0] != state:
            assets = sorted(self.assets.values(), key=lambda asset: (asset.created, asset.id))
            self._sorted = (state, assets, [asset.created for asset in assets])
        return self._sorted[1:]

    def _ties_anyhow(self, found: Iterable[FakeAsset]) -> Iterator[FakeAsset]:
        """Before 3.1.0 nothing orders photos of one date: each request has its own order."""
        for _, group in itertools.groupby(found, key=lambda asset: asset.created):
            ties = list(group)
            if len(ties) > 1:
                self._random.shuffle(ties)
            yield from ties

    def _conditions(self, user: str, wanted: dict[str, Any]) -> list[Callable[[FakeAsset], bool]]:
        conditions = self._in_reach(user, wanted) + self._visibility(wanted)
        if not wanted.get("withDeleted", "isOffline" in wanted):
            conditions.append(lambda asset: not asset.is_trashed)
        if wanted.get("withExif"):  # an inner join: no exif row, no photo
            conditions.append(lambda asset: asset.exif)
        if wanted.get("description", "").strip():
            like = _like(wanted["description"])
            conditions.append(lambda asset: asset.exif and bool(like.search(asset.description)))
        if wanted.get("libraryId") is not None:
            conditions.append(_equal("library_id", wanted["libraryId"]))
        conditions += self._tagged(wanted) + self._shown(wanted)
        same = {"id": "id", "type": "type", "isFavorite": "is_favorite", "isOffline": "is_offline"}
        conditions += [_equal(attribute, wanted[n]) for n, attribute in same.items() if n in wanted]
        conditions += [
            _beyond(attribute, _bound(wanted[name]), sign)
            for name, (attribute, sign) in _DATE_BOUNDS.items()
            if name in wanted
        ]
        return conditions

    def _in_reach(self, user: str, wanted: dict[str, Any]) -> list[Callable[[FakeAsset], bool]]:
        """Photos of the user and partners; but in albums, all photos that are in each of them."""
        known = "albumIds" in self.contract.properties("MetadataSearchDto")  # from 1.135 on
        albums = wanted.get("albumIds", ()) if known else ()
        if not albums:
            owners = {user, *self.partners.get(user, ())}
            return [lambda asset: asset.owner in owners]
        seen = {album.id: set(album.assets) for album in self._albums_of(user)}
        if not seen.keys() >= set(albums):
            raise Refused(400, "Not found or no album.read access")
        common = set.intersection(*(seen[album] for album in albums))
        return [lambda asset: asset.id in common]

    def _tagged(self, wanted: dict[str, Any]) -> list[Callable[[FakeAsset], bool]]:
        """With all these tags, or tags below them; null: with none."""
        tags = wanted.get("tagIds", ())
        if tags is None:
            return [lambda asset: not asset.tags]

        def has(asset: FakeAsset) -> bool:
            paths = (path for tag in asset.tags for path in facts.with_parents(tag))
            return {self.tag_id(path, asset.owner) for path in paths} >= set(tags)

        return [has] if tags else []

    def _shown(self, wanted: dict[str, Any]) -> list[Callable[[FakeAsset], bool]]:
        """With all these people on them."""
        people = set(wanted.get("personIds", ()))

        def shows(asset: FakeAsset) -> bool:
            faces = self._shown_faces(asset)
            return {self._person_id(asset.owner, face.id) for face in faces} >= people

        return [shows] if people else []

    def _visibility(self, wanted: dict[str, Any]) -> list[Callable[[FakeAsset], bool]]:
        """What is shown by default changed with 1.133 and with 3.0."""
        if self.version < (1, 133):
            archived = wanted.get("isArchived", None if wanted.get("withArchived") else False)
            visible = wanted.get("isVisible")
            return [
                lambda asset: archived in (None, asset.visibility == "archive"),
                lambda asset: visible in (None, asset.visibility != "hidden"),
            ]
        visibility = wanted.get("visibility", None if self.version >= (3,) else "timeline")
        if visibility == "locked":
            raise Refused(401, "Elevated permission is required")
        if visibility is None:
            return [lambda asset: asset.visibility != "locked"]
        return [_equal("visibility", visibility)]

    # Notes: the metadata clients may keep with an asset

    def _note_dto(self, asset: FakeAsset, key: str) -> dict[str, Any]:
        updated = asset.noted.get(key, asset.updated)
        return {"key": key, "value": asset.notes[key], "updatedAt": _milliseconds(updated)}

    def _note(self, asset: FakeAsset, key: str, value: Any) -> dict[str, Any]:
        asset.notes = {**asset.notes, key: value}
        asset.noted = {**asset.noted, key: self.now()}
        return self._note_dto(asset, key)

    def _get_notes(self, exchange: Exchange) -> Any:
        asset = self._accessible(exchange, "asset.read")
        return [self._note_dto(asset, key) for key in asset.notes]

    def _get_note(self, exchange: Exchange) -> Any:
        asset = self._accessible(exchange, "asset.read")
        key = exchange.params["key"]
        if key not in asset.notes:
            where = f'for asset with id "{asset.id}"'
            raise Refused(400, f'Metadata with key "{key}" not found {where}')
        return self._note_dto(asset, key)

    def _put_notes(self, exchange: Exchange) -> Any:
        asset = self._accessible(exchange, "asset.update")
        return [
            self._note(asset, item["key"], item["value"])
            for item in _body(exchange).get("items", ())
        ]

    def _delete_note(self, exchange: Exchange) -> Reply:
        asset = self._accessible(exchange, "asset.update")
        asset.notes = {k: v for k, v in asset.notes.items() if k != exchange.params["key"]}
        return Reply(204, None, self._mark(self._cid()))

    def _put_notes_of_many(self, exchange: Exchange) -> Any:
        items = _body(exchange).get("items")
        if not items:
            raise Refused(500, "Internal server error", error=None)
        assets = [self._accessible(exchange, "asset.update", item["assetId"]) for item in items]
        return [
            {"assetId": asset.id, **self._note(asset, item["key"], item["value"])}
            for asset, item in zip(assets, items, strict=True)
        ]

    # The rest

    def _settings(self) -> dict[str, Any]:
        """What everybody may know of the settings, before they log in."""
        usual = {"string": "", "boolean": True, "integer": 7}
        types = self.contract.schemas["ServerConfigDto"]["properties"]
        settings = {name: usual[schema["type"]] for name, schema in types.items()}
        return settings | {"externalDomain": self.external_domain}

    def _version(self) -> dict[str, Any]:
        major, minor, patch = self.version
        version = {"major": major, "minor": minor, "patch": patch, "prerelease": None}
        names = self.contract.properties("ServerVersionResponseDto")
        return {name: number for name, number in version.items() if name in names}

    def _user_dto(self, user: FakeUser, component: str) -> dict[str, Any]:
        since = "2024-01-01T00:00:00.000Z"
        dto = {
            "id": user.id,
            "email": user.email,
            "name": user.name,
            "profileImagePath": "",
            "avatarColor": "orange",
            "profileChangedAt": since,
            "createdAt": since,
            "updatedAt": since,
            "deletedAt": None,
            "isAdmin": False,
            "license": None,
            "oauthId": "",
            "quotaSizeInBytes": None,
            "quotaUsageInBytes": 0,
            "shouldChangePassword": False,
            "status": "active",
            "storageLabel": None,
            "clusterGroupId": user.id,
        }
        names = self.contract.properties(component)
        return {name: value for name, value in dto.items() if name in names}

    def _get_user(self, exchange: Exchange) -> Any:
        return self._user_dto(self.user(self._user_of(exchange)), "UserAdminResponseDto")

    def _get_key(self, exchange: Exchange) -> Any:
        key = self._key_of(exchange)
        since = "2024-01-01T00:00:00.000Z"
        return {
            "id": str(uuid.uuid4()),
            "name": key.name,
            "createdAt": since,
            "updatedAt": since,
            "permissions": list(key.permissions),
        }


def _body(exchange: Exchange) -> dict[str, Any]:
    """What was sent; before 3.0 nothing at all is as good as an empty object."""
    return {} if exchange.json is MISSING else exchange.json


def _milliseconds(moment: datetime) -> str:
    """As answers carry it, though the database holds microseconds."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"


def _bound(text: str) -> datetime:
    """A date asked for, as exact as JavaScript's: to the millisecond."""
    moment = datetime.fromisoformat(text)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _said(value: bool) -> str:
    """As a URL says it."""
    return "true" if value else "false"


def _like(text: str) -> re.Pattern[str]:
    """SQL's ILIKE anywhere in a text; nobody escapes what has a meaning in a pattern there."""
    wild = {"_": ".", "%": ".*"}
    pattern = "".join(wild.get(letter, re.escape(letter)) for letter in text)
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


def _equal(attribute: str, value: Any) -> Callable[[FakeAsset], bool]:
    return lambda asset: getattr(asset, attribute) == value


def _beyond(attribute: str, bound: datetime, sign: int) -> Callable[[FakeAsset], bool]:
    if sign > 0:
        return lambda asset: getattr(asset, attribute) >= bound
    return lambda asset: getattr(asset, attribute) <= bound


# --- How Immich words what it refuses --------------------------------------------------------

_UUID = "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12})$"


def _kind(error: Any) -> str:
    return type(error.kind).__name__.rpartition(".")[2]


def _expected(path: list[Any], error: Any) -> str:
    name = next(kind for kind in error.kind.types if kind != "null")
    if name == "object" and path[-1:] == ["value"]:
        return "record"
    return "number" if name == "integer" else name


def _received(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return "null" if value is None else names.get(type(value), "object")


def _issue(path: list[Any], code: str, expected: str, received: str) -> dict[str, Any]:
    message = f"Invalid input: expected {expected}, received {received}"
    return {"expected": expected, "code": code, "path": path, "message": message}


def _zod_issue(path: list[Any], error: Any) -> dict[str, Any]:
    """A refusal in the words of 3.x."""
    kind = _kind(error)
    if kind == "Type":
        return _issue(path, "invalid_type", _expected(path, error), _received(error.instance))
    if kind == "Required":
        return _issue([*path, error.kind.property], "invalid_type", "nonoptional", "undefined")
    if kind in {"Minimum", "Maximum"}:
        small, limit = kind == "Minimum", error.kind.limit
        return {
            "origin": "number",
            "code": "too_small" if small else "too_big",
            kind.lower(): limit,
            "inclusive": True,
            "path": path,
            "message": f"Too {'small' if small else 'big'}: "
            f"expected number to be {'>' if small else '<'}={limit}",
        }
    if kind == "Enum":
        options = "|".join(f'"{option}"' for option in error.kind.options)
        return {
            "code": "invalid_value",
            "values": error.kind.options,
            "path": path,
            "message": f"Invalid option: expected one of {options}",
        }
    if _is_uuid(error):
        return {
            "origin": "string",
            "code": "invalid_format",
            "format": "uuid",
            "pattern": f"/{_UUID}/",
            "path": path,
            "message": "Invalid UUID",
        }
    return {"code": "custom", "path": path, "message": error.message}


def _is_uuid(error: Any) -> bool:
    kind = error.kind
    return getattr(kind, "format", "") == "uuid" or getattr(kind, "pattern", "") == _UUID


def _first_by_path(issues: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One issue for each place: the schema says format and pattern, the server says it once."""
    return list({tuple(issue["path"]): issue for issue in reversed(issues)}.values())[::-1]


def _class_validator_text(path: list[Any], error: Any) -> str:
    """A refusal in the words of 1.x and 2.x."""
    name, kind = ".".join(map(str, path)), _kind(error)
    if kind == "Type":
        article = {"object": "an object", "array": "an array", "boolean": "a boolean value"}
        expected = _expected([], error)
        return f"{name} must be {article.get(expected, f'a {expected}')}"
    if kind in {"Minimum", "Maximum"}:
        limit = f"{'less' if kind == 'Minimum' else 'greater'} than {error.kind.limit}"
        return f"{name} must not be {limit}"
    if kind == "Enum":
        return f"{name} must be one of the following values: {', '.join(error.kind.options)}"
    return f"{name} must be a UUID" if _is_uuid(error) else f"{name}: {error.message}"


def _numeric(error: Any) -> bool:
    """Before 3.0 a number may come as text."""
    numbers = {"number", "integer"} & set(getattr(error.kind, "types", ()))
    return bool(numbers) and isinstance(error.instance, str) and error.instance.isdigit()


# --- Model servers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a model says, before the limits of a request."""

    text: str
    thinking: str = ""
    finish: str = "stop"


Answering = Callable[[bytes, str], "str | Answer | dict[str, Any]"]


def cut(text: str) -> Answer:
    """An answer that ran into the token limit."""
    return Answer(text, finish="length")


def empty() -> Answer:
    """An answer without a word."""
    return Answer("")


def thinking(text: str, thought: str = "The user wants a description") -> Answer:
    """An answer with the thoughts that led to it; `cut` ones have no text."""
    return Answer(text, thought, "stop" if text else "length")


def _limited(answer: Answer, most: int) -> Answer:
    """What is left when it may be so many words long; thinking comes first and costs one more."""
    thought, text = (re.findall(r"\s*\S+", part) for part in (answer.thinking, answer.text))
    room = most - bool(thought)
    if most < 0 or len(thought) + len(text) <= room:
        return answer
    left = max(0, room - len(thought))
    return Answer("".join(text[:left]), "".join(thought[: max(0, room)]), "length")


NDJSON, SSE = "application/x-ndjson", "text/event-stream"


def _words(text: str) -> list[str]:
    """A text in pieces, as a model makes them."""
    return re.findall(r"\s*\S+|\s+$", text)


def _fitting(schema: Any, text: str) -> str:
    """An answer as JSON that fits a schema, as constrained sampling makes it."""
    if text.startswith("{"):
        return text
    if schema == "json" or "properties" not in schema:
        return json.dumps({text: text})
    words = {"string": text, "array": text.split()[:1], "boolean": False}
    properties = schema["properties"].items()
    return json.dumps({name: words.get(entry.get("type"), 0) for name, entry in properties})


def _is_picture(image: bytes, *, webp: bool) -> bool:
    """What the decoders take, by the first bytes; one that breaks off later is none the less."""
    if image.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")):
        return True
    return webp and image.startswith(b"RIFF") and image[8:12] == b"WEBP"


NO_VISION = (
    "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
)
NO_PICTURE = "Failed to load image or audio file"


class _FakeModels(FakeServer):
    """What both model servers share: a voice, a key, and a memory of what was asked."""

    kind: str  # of a stream

    def __init__(
        self,
        contract: str,
        answer: Answering,
        api_key: str | None,
        *,
        streams: bool = True,  # where it is asked to; some proxies never do
        **options: Any,
    ) -> None:
        super().__init__(model_contract(contract), **options)
        self.streams = streams
        self.answer = answer
        self.api_key = api_key
        self.asked: list[tuple[bytes, str]] = []
        self.shown: list[Sequence[bytes]] = []  # all pictures of each question

    def _said(self, images: Sequence[bytes], prompt: str) -> Answer:
        image = images[0] if images else b""
        with self._lock:
            self.asked.append((image, prompt))
            self.shown.append(images)
        said = self.answer(image, prompt)
        if isinstance(said, dict):
            return Answer(**said)
        return Answer(said) if isinstance(said, str) else said

    def streamed(self, whole: dict[str, Any], events: Sequence[dict[str, Any]]) -> Reply:
        """An answer in pieces, each held to the contract."""
        for event in events:
            self.verify("event", self.contract.component("ChatEvent"), event)
        lines = tuple(json.dumps(event, separators=(",", ":")).encode() for event in events)
        if self.kind == SSE:
            lines = tuple(b"data: " + line + b"\n" for line in (*lines, b"[DONE]"))
        return Reply(200, Stream(tuple(line + b"\n" for line in lines), self.kind), witness=whole)

    def _known_key(self, exchange: Exchange) -> bool:
        return self.api_key is None or self.api_key in (
            exchange.headers.get("Authorization", "").removeprefix("Bearer "),
            exchange.headers.get("X-Api-Key"),
        )


class FakeOllama(_FakeModels):
    """Ollama: `models` maps each name to its capabilities.

    Ollama itself knows no keys; `api_key` is that of a proxy in front of it.
    """

    kind = NDJSON

    def __init__(
        self,
        models: Mapping[str, Sequence[str]] | None = None,
        api_key: str | None = None,
        answer: Answering = told,
        *,
        version: str = "0.32.0",
        **options: Any,
    ) -> None:
        super().__init__("ollama", answer, api_key, **options)
        self.models = {"tiny-vlm": ("completion", "vision")} if models is None else dict(models)
        self.version = version

    def behave(self, exchange: Exchange) -> Reply:
        if not self._known_key(exchange):
            return Reply(401, {"error": "unauthorized"})
        if exchange.operation is None:
            return self._elsewhere(exchange)
        try:
            said = self._answer(exchange, exchange.operation.name)
        except Refused as refusal:
            return Reply(refusal.status, {"error": refusal.message})
        spoken = self.streams and "eval_count" in said
        if spoken and exchange.json.get("stream", True):
            return self.streamed(said, self._events(said))
        return Reply(200, said)

    def _events(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        """An answer as Ollama streams it: a token a line, the last has the rest."""
        message = said["message"]
        pieces = [{"content": "", "thinking": word} for word in _words(message.get("thinking", ""))]
        pieces += [{"content": word} for word in _words(message["content"])]
        head = {"model": said["model"], "created_at": said["created_at"]}
        events = [head | {"message": {"role": "assistant"} | p, "done": False} for p in pieces]
        return [*events, said | {"message": {"role": "assistant", "content": ""}}]

    def _elsewhere(self, exchange: Exchange) -> Reply:
        path = exchange.path.removeprefix(self.prefix)
        if path == "/":
            return Reply(200, "Ollama is running")
        others = (self.contract.find(method, path) for method in ("GET", "POST"))
        if any(others):
            return Reply(405, "405 method not allowed", {"Content-Type": "text/plain"})
        return Reply(404, "404 page not found", {"Content-Type": "text/plain"})

    def known(self, exchange: Exchange, path: str) -> bool:
        return (exchange.method, path) == ("GET", "/")

    def _answer(self, exchange: Exchange, call: str) -> Any:
        if call == "version":
            return {"version": self.version}
        if call == "tags":
            return {"models": [self._row(name) for name in self.models]}
        request = _ollama_body(exchange)
        return self._show(request) if call == "show" else self._chat(exchange, request)

    def _capabilities(self, name: str, shown: str) -> Sequence[str]:
        for model, capabilities in self.models.items():
            if _tagged(model) == _tagged(name):
                return capabilities
        raise Refused(404, f"model '{shown}' not found")

    def _row(self, name: str) -> dict[str, Any]:
        return {
            "name": _tagged(name),
            "model": _tagged(name),
            "modified_at": "2026-01-01T00:00:00.361278024Z",
            "size": 1496248,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": _DETAILS | {"context_length": 32768, "embedding_length": 384},
            "capabilities": list(self.models[name]),
        }

    def _show(self, request: dict[str, Any]) -> Any:
        name = request["model"]
        capabilities = self._capabilities(name, _tagged(name))
        shown = {
            "modelfile": f"FROM {_tagged(name)}\n",
            "template": "{{ .Prompt }}",
            "details": _DETAILS,
            "model_info": {"general.architecture": "llama", "llama.context_length": 32768},
            "tensors": [],
            "capabilities": list(capabilities),
            "modified_at": "2026-01-01T00:00:00.361278024Z",
        }
        if "vision" in capabilities:
            shown["projector_info"] = {"clip.has_vision_encoder": True}
        return shown

    def _chat(self, exchange: Exchange, request: dict[str, Any]) -> Any:
        capabilities = self._capabilities(request["model"], request["model"])
        if not request["messages"]:
            reason = "unload" if request.get("keep_alive") == 0 else "load"
            return self._spoken(request, Answer("", finish=reason))
        _check_ollama_request(request, capabilities)
        images = [image for message in request["messages"] for image in message.get("images", ())]
        if images and "vision" not in capabilities:
            raise Refused(500, _nested(500, NO_VISION, "server_error"))
        if not all(_is_picture(image, webp=True) for image in images):
            raise Refused(400, _nested(400, NO_PICTURE, "invalid_request_error"))
        said = self._said(images, request["messages"][-1]["content"])
        return self._spoken(request, _as_asked(said, request, capabilities))

    def _spoken(self, request: dict[str, Any], answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        if answer.thinking:
            message["thinking"] = answer.thinking
        spoken = {
            "model": request["model"],
            "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z"),
            "message": message,
            "done": True,
            "done_reason": answer.finish,
        }
        if answer.finish in {"load", "unload"}:
            return spoken
        return spoken | {
            "total_duration": 7834814,
            "load_duration": 801378,
            "prompt_eval_count": 105,
            "prompt_eval_duration": 472000,
            "eval_count": _tokens(answer),
            "eval_duration": 852000,
        }


_DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "333K",
    "quantization_level": "unknown",
}


def _tagged(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def _tokens(answer: Answer) -> int:
    return len(answer.text.split()) + len(answer.thinking.split())


def _nested(code: int, message: str, kind: str) -> str:
    """An error of the llama.cpp server inside Ollama: its JSON, as text."""
    error = {"error": {"code": code, "message": message, "type": kind}}
    return json.dumps(error, separators=(",", ":"))


def _ollama_body(exchange: Exchange) -> dict[str, Any]:
    """The request with its pictures decoded, as Go's JSON reader does it."""
    if exchange.json is MISSING:
        raise Refused(400, "missing request body")
    if exchange.broken_json:
        raise Refused(400, "unexpected EOF")
    request = {"messages": [], **exchange.json}
    request["messages"] = [
        message | {"images": [_from_base64(text) for text in message.get("images", ())]}
        for message in request["messages"]
    ]
    keep_alive = request.get("keep_alive")
    if isinstance(keep_alive, str) and not re.match(r"-?\d", keep_alive):
        raise Refused(400, f'time: invalid duration "{keep_alive}"')
    if not request.get("model"):
        raise Refused(400, "model is required")
    return request


def _from_base64(text: str) -> bytes:
    wrong = re.search(r"[^A-Za-z0-9+/=\r\n]", text)
    try:
        if not wrong:
            return base64.b64decode(text)
    except binascii.Error:
        pass
    raise Refused(400, f"illegal base64 data at input byte {wrong.start() if wrong else len(text)}")


def _check_ollama_request(request: dict[str, Any], capabilities: Sequence[str]) -> None:
    if request.get("think") and "thinking" not in capabilities:
        raise Refused(400, f'"{request["model"]}" does not support thinking')
    shape = request.get("format")
    if shape and shape != "json" and not isinstance(shape, dict):
        said = json.dumps(json.dumps(shape))
        raise Refused(500, f'invalid format: {said}; expected "json" or a valid JSON Schema object')
    if isinstance(request.get("options", {}).get("temperature"), str):
        raise Refused(500, 'option "temperature" must be of type float32')


def _as_asked(answer: Answer, request: dict[str, Any], capabilities: Sequence[str]) -> Answer:
    """An answer under the wishes of an Ollama request."""
    if "thinking" in capabilities:
        thought = answer.thinking or thinking("").thinking
        answer = replace(answer, thinking="" if request.get("think") is False else thought)
    if request.get("format"):
        answer = replace(answer, text=_fitting(request["format"], answer.text))
    return _limited(answer, request.get("options", {}).get("num_predict", -1))


class FakeLlamaCpp(_FakeModels):
    """llama.cpp's server: one model that answers to any name, or `models` behind a router."""

    kind = SSE

    def __init__(
        self,
        model: str = "/models/tiny-vlm.gguf",
        vision: bool = True,
        api_key: str | None = None,
        models: Sequence[str] = (),
        answer: Answering = told,
        *,
        thinks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__("llamacpp", answer, api_key, **options)
        self.model = model
        self.models = list(models)
        self.vision = vision
        self.thinks = thinks
        self.loading = False

    def behave(self, exchange: Exchange) -> Reply:
        try:
            said = self._answer(exchange)
            if self.streams and "choices" in said and exchange.json.get("stream"):
                options = exchange.json.get("stream_options", {})
                return self.streamed(said, self._events(said, options.get("include_usage")))
            return Reply(200, said, {"Server": "llama.cpp"})
        except Refused as refusal:
            error = {"code": refusal.status, "message": refusal.message, **refusal.more}
            return Reply(refusal.status, {"error": error}, {"Server": "llama.cpp"})

    def _events(self, said: dict[str, Any], counts: bool | None) -> list[dict[str, Any]]:
        """An answer as llama.cpp streams it: a token an event, then why it ended, and counts."""
        message, reason = said["choices"][0]["message"], said["choices"][0]["finish_reason"]
        deltas = [{"role": "assistant", "content": None}]
        thoughts = _words(message.get("reasoning_content", ""))
        deltas += [{"reasoning_content": word} for word in thoughts]
        deltas += [{"content": word} for word in _words(message["content"])]
        same = ("created", "id", "model", "system_fingerprint")
        head = {name: said[name] for name in same} | {"object": "chat.completion.chunk"}
        choices = [{"finish_reason": None, "index": 0, "delta": delta} for delta in deltas]
        choices.append({"finish_reason": reason, "index": 0, "delta": {}})
        events = [{"choices": [choice], **head} for choice in choices]
        numbers = {"timings": said["timings"]}
        if counts:
            return [*events, {"choices": [], **head, "usage": said["usage"]} | numbers]
        return [*events[:-1], events[-1] | numbers]

    def known(self, exchange: Exchange, path: str) -> bool:
        """Ollama's start-up questions are fair ones: that is how a client tells them apart."""
        return model_contract("ollama").find(exchange.method, path) is not None

    def _answer(self, exchange: Exchange) -> Any:
        name = exchange.operation and exchange.operation.name
        if name != "health" and not self._known_key(exchange):
            raise Refused(401, "Invalid API Key", type="authentication_error")
        if name is None:
            raise Refused(404, "File Not Found", type="not_found_error")
        if self.loading:
            raise Refused(503, "Loading model", type="unavailable_error")
        if name == "chat":
            return self._chat(exchange)
        return {"health": self._health, "models": self._models, "props": self._props}[name]()

    def _health(self) -> Any:
        return {"status": "ok"}

    def _models(self) -> Any:
        names = self.models or [self.model]
        return {
            "models": [self._ollama_row(name) for name in names],
            "object": "list",
            "data": [self._row(name) for name in names],
        }

    def _ollama_row(self, name: str) -> dict[str, Any]:
        details = dict.fromkeys(("parent_model", "family", "parameter_size"), "")
        return {
            "name": name,
            "model": name,
            **dict.fromkeys(("modified_at", "size", "digest", "description", "parameters"), ""),
            "type": "model",
            "tags": [""],
            "capabilities": ["completion", "multimodal"] if self.vision else ["completion"],
            "details": details | {"format": "gguf", "families": [""], "quantization_level": ""},
        }

    def _row(self, name: str) -> dict[str, Any]:
        sees = ["image", "video"] if self.vision else []
        row = {
            "id": name,
            "aliases": [name],
            "tags": [],
            "object": "model",
            "architecture": {"input_modalities": ["text", *sees], "output_modalities": ["text"]},
            "created": 1795357449,
            "owned_by": "llamacpp",
            "meta": {"n_ctx": 8192, "n_ctx_train": 32768},
        }
        return row | {"status": {"value": "loaded"}} if self.models else row

    def _props(self) -> Any:
        return {
            "default_generation_settings": {"params": {}, "n_ctx": 2048},
            "total_slots": 4,
            "build_info": "b0-unknown",
            "model_alias": self.model,
            "model_path": self.model,
            "modalities": {"vision": self.vision, "video": self.vision, "audio": False},
        }

    def _chat(self, exchange: Exchange) -> Any:
        request = _openai_body(exchange)
        if self.models and request.get("model") not in self.models:
            missing = "model not found" if request.get("model") else "model name is missing"
            raise Refused(400, missing, type="invalid_request_error")
        images, texts = _parts(request["messages"])
        if images and not self.vision:
            raise Refused(500, NO_VISION, type="server_error")
        pictures = [_from_url(url) for url in images]
        said = self._said(pictures, texts[-1] if texts else "")
        return self._spoken(request, self._as_asked(said, request))

    def _as_asked(self, answer: Answer, request: dict[str, Any]) -> Answer:
        """An answer under the wishes of a request."""
        if self.thinks:
            wanted = request.get("chat_template_kwargs", {}).get("enable_thinking", True)
            wanted = wanted and request.get("reasoning_effort") != "none"
            thought = answer.thinking or thinking("").thinking
            answer = replace(answer, thinking=thought if wanted else "")
        shape = request.get("response_format", {"type": "text"})
        if shape["type"] != "text":
            schema = shape.get("json_schema", {}).get("schema", "json")
            answer = replace(answer, text=_fitting(schema, answer.text))
        most = request.get("max_completion_tokens", request.get("max_tokens", -1))
        return _limited(answer, most if most < 0 else max(most, 1))

    def _spoken(self, request: dict[str, Any], answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        if answer.thinking and request.get("reasoning_format") == "none":
            message["content"] = f"<think>{answer.thinking}</think>{answer.text}"
        elif answer.thinking:
            message["reasoning_content"] = answer.thinking
        said = _tokens(answer)
        return {
            "choices": [{"finish_reason": answer.finish, "index": 0, "message": message}],
            "created": int(datetime.now(UTC).timestamp()),
            "model": request["model"] if self.models else self.model,
            "system_fingerprint": "b0-unknown",
            "object": "chat.completion",
            "usage": {
                "completion_tokens": said,
                "prompt_tokens": 105,
                "total_tokens": said + 105,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "timings": {"cache_n": 0, "prompt_n": 105, "prompt_ms": 4.6, "predicted_n": said},
        }


def _openai_body(exchange: Exchange) -> dict[str, Any]:
    if exchange.json is MISSING or exchange.broken_json:
        column = len(exchange.data) + 1
        raise Refused(
            400,
            f"[json.exception.parse_error.101] parse error at line 1, column {column}: syntax "
            "error while parsing value - unexpected end of input; expected '[', '{', or a literal",
            type="invalid_request_error",
        )
    request = exchange.json
    if "messages" not in request:
        raise Refused(400, "'messages' is required", type="invalid_request_error")
    if not isinstance(request["messages"], list):
        raise Refused(400, "Expected 'messages' to be an array", type="invalid_request_error")
    return request


def _parts(messages: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Picture URLs and texts of a conversation."""
    contents = [message["content"] for message in messages]
    parts = [
        part
        for content in contents
        for part in ([{"text": content}] if isinstance(content, str) else content)
    ]
    images = [part["image_url"]["url"] for part in parts if "image_url" in part]
    return images, [part["text"] for part in parts if "text" in part]


def _from_url(url: str) -> bytes:
    """A picture out of a data URI, or of base64 alone; its MIME type is not looked at."""
    if url.startswith("http"):
        raise Refused(500, "error: cannot make GET request", type="server_error")
    if url.startswith("file:"):
        text = "file:// URLs are not allowed unless --media-path is specified"
        raise Refused(400, text, type="invalid_request_error")
    try:
        image = base64.b64decode(url.partition(",")[2] if url.startswith("data:") else url)
    except binascii.Error:
        image = b""
    if not _is_picture(image, webp=False):
        raise Refused(400, NO_PICTURE, type="invalid_request_error")
    return image
