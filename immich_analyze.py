#!/usr/bin/env python3
"""Describe every photo in an Immich library.

A vision model on the user's own machine looks at the preview that Immich made.
Its description is written back to Immich, so that search finds the photo by what it shows.
One stream of arrivals and listings feeds identical workers; each takes its photo from start to
finish on its own, over its own connections.

The photos that lack a description are the work list; all state is in Immich. `stream` chooses
the next photo, and only it knows the modes; `story` decides what happens to the photo. To stop
the tool is to end the stream. The sections below follow a photo on its way, and each of them
uses only those above it.

Exit codes: 0 all well, nothing to do, or a service that was asked to stop · 1 some
photos failed · 2 the settings or the environment are wrong and nothing will work ·
128+n interrupted by signal n.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import difflib
import errno
import functools
import html
import io
import json
import logging
import math
import os
import re
import signal
import socket
import socketserver
import stat
import sys
import threading
import time
import tomllib
import traceback
import unicodedata
import warnings
import zipfile
import zlib
from array import array
from bisect import bisect_left
from codecs import BOM_UTF8
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from hashlib import sha256
from http.cookiejar import DefaultCookiePolicy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar, TypeVarTuple
from urllib.parse import urlsplit, urlunsplit

import configargparse
import psycopg2.errors
import psycopg2.extensions
import requests
from PIL import ExifTags, Image, ImageChops, ImageOps, ImageStat
from tqdm import tqdm
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader
from watchdog import events as fs
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

__version__ = "0.1.0"

T = TypeVar("T")
Args = TypeVarTuple("Args")
log = logging.getLogger("immich_analyze")


# ------------------------------------------------------------------------------
# 1 Messages: texts for people, in their language. Knows no key's text.

LANGUAGES = ("en", "ru")
DATA_FOLDERS = ("i18n", "immich_analyze_i18n")  # in a checkout; once installed
_language = "en"


@functools.cache
def data_file(*names: str) -> str:
    """Read data files, one after the other, beside this module, which may be in a zip archive."""
    home = Path(__file__).parent
    root = home if home.is_dir() else zipfile.Path(home)
    files = (next(f for d in DATA_FOLDERS if (f := root / d / name).is_file()) for name in names)
    return "".join(file.read_text(encoding="utf-8") for file in files)


@functools.cache
def toml(name: str) -> dict[str, Any]:
    """A data file in TOML."""
    return tomllib.loads(data_file(name))


@functools.cache
def template(text: str, html: bool = False) -> Any:
    """Compile a Jinja template that sees only the values it is given."""
    from jinja2 import StrictUndefined, sandbox  # here, as it would slow down every start

    kind = sandbox.ImmutableSandboxedEnvironment
    made = kind(keep_trailing_newline=True, undefined=StrictUndefined, autoescape=html)
    made.globals.clear()  # with `range`, nested loops could run for ever
    return made.from_string(text)


@functools.cache
def catalogue(language: str) -> dict[str, str]:
    """The texts of a language, by key."""
    return dict(json.loads(data_file(f"{language}.json")))


def use_language(code: str) -> None:
    """Set the language of all texts if stdout can encode it; main does this before any thread."""
    global _language
    with suppress(UnicodeEncodeError):
        catalogue(code).get("photos", "").encode(sys.stdout.encoding or "utf-8")
        _language = code


def t(key: str, **fields: object) -> str:
    """A text for people in their language, or in English if that language lacks it."""
    return (catalogue(_language).get(key) or catalogue("en")[key]).format(**fields)


# ------------------------------------------------------------------------------
# 2 Errors: the class says who is to blame, and so what happens next. They carry keys, not text.


class AnalyzeError(Exception):
    """Anything that went wrong, as a message key and its fields."""

    def __init__(self, key: str, *, pause: float = 0, words: str = "", **fields: Any) -> None:
        super().__init__(key)
        self.key = key
        self.pause = pause  # seconds that the server asks us to wait; 0 if it does not ask
        self.words = words  # the server's whole reply
        self.fields = fields

    def __str__(self) -> str:
        return t(self.key, **self.fields)

    def as_kind(self, kind: type[AnalyzeError]) -> AnalyzeError:
        """The same error as another class, which puts the blame elsewhere."""
        return kind(self.key, pause=self.pause, words=self.words, **self.fields)


class Retryable(AnalyzeError):
    """This call failed; a retry may succeed."""


class Unavailable(Retryable):
    """The other side is down or overloaded; no photo is to blame."""


class Permanent(AnalyzeError):
    """This photo will fail every time; others may succeed."""


class Missing(AnalyzeError):
    """Immich has no such preview or note."""


class Skip(AnalyzeError):
    """Leave the photo alone: it has a description, or was meanwhile deleted, locked or claimed."""


class Fatal(AnalyzeError):
    """A person must act before this host, this key or the whole run can work."""


class Refused(Fatal):
    """Immich does not accept this key, or not for this request."""


class Unexpected(Fatal):
    """An answer that a healthy server never gives: fatal at the start, waited out later on."""


class Stopped(AnalyzeError):
    """The tool was asked to stop while it waited."""


def verdict(table: str, told: str, **fields: Any) -> AnalyzeError:
    """The error for what was told: the first row of a table in verdicts.toml that fits."""
    rows = toml("verdicts.toml")[table].items()
    fitting = ((match, row) for start, row in rows if (match := re.match(start, told)))
    found, (kind, key, *hints) = next(fitting)
    fields["why"] = " ".join([*map(t, hints), fields["why"]]).strip()
    error: AnalyzeError = globals()[kind](key, **fields | found.groupdict())  # a class above
    return error


# ------------------------------------------------------------------------------
# 3 Settings: flags, environment and file become one frozen record. Opens no other files.


class Mode(StrEnum):
    """Which photos are looked at."""

    BATCH = "batch"
    MONITOR = "monitor"
    COMBINED = "combined"

    @property
    def backlog(self) -> bool:
        """Whether what is in the library already is described."""
        return self is not Mode.MONITOR

    @property
    def monitors(self) -> bool:
        """Whether it keeps describing what arrives: a service."""
        return self is not Mode.BATCH


class Policy(StrEnum):
    """Which photos get a text."""

    NONE = "none"  # those without one
    MISSING_AI = "missing-ai"  # and those without ours, which is added to a person's
    OUTDATED = "outdated"  # those without one, and ours by another model, prompt or facts
    ALL = "all"


# What can be known of a photo, by the names of the placeholders.
ENRICHED = ("people", "place", "date", "tags", "camera", "file")
FACTS = (*ENRICHED, "gps", "albums", "text", "description")
PLACEHOLDERS = (*FACTS, "context", "language")
TAG = "{[{%#]"  # how a placeholder, a statement or a comment of a template begins
DATABASE, API = "database", "immich-api"  # how the library is reached
INTERFACES = ("ollama", "llamacpp", "openrouter")
SIZES = ("preview", "thumbnail", "fullsize")  # of a picture, as Immich calls them
SHORTEST_PAUSE = 0.5  # seconds, where 0 is asked for
CONFIG_FILES = ("/etc/immich-analyze.conf", "~/.config/immich-analyze.conf")
OURS = ("IMMICH_", "DB_")  # how the names of variables begin
# In logging's numbers; `warn` and `trace` as in RUST_LOG.
LOG_LEVELS = {"error": 40, "warning": 30, "warn": 30, "info": 20, "debug": 10, "trace": 10}
Convert = Callable[[str], Any]  # what turns an option's text into its value
Header = tuple[str, str]  # name and value
HEADER = r"(?!content-length|transfer-enc)([\w!#-'*+.^`|~-]+)[ \t]*:[ \t]*([!-~][\t -~]*)"
ID = "(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # the form of every id in Immich
ZONES = timedelta(hours=14)  # the most by which a local time differs from UTC
NOT_UTF8 = "[\ud800-\udfff]"  # how Python reads other bytes
UNSAFE = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"  # in a line or in JSON


def number(
    least: float, kind: type = float, *, most: int = 0, above: bool = False, zero: float = 0
) -> Convert:
    """Converter for a finite number from `least` on (or strictly above it), `zero` for 0."""
    key = "not_a_whole_number" if kind is int else "not_above" if above else "not_a_number"

    def convert(text: str) -> float:
        with suppress(ValueError, OverflowError):
            value = kind(text)
            high_enough = value > least if above else value >= least
            if high_enough and value <= (most or sys.float_info.max):
                return value if kind is int else min(value or zero, threading.TIMEOUT_MAX)
        problem = t("not_a_port", value=text) if most else t(key, value=text, least=f"{least:g}")
        raise argparse.ArgumentTypeError(problem)

    return convert


def share(text: str) -> tuple[int, int]:
    """Converter for a share of the photos such as 2/5, the second of five."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    which, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= which <= count:
        raise argparse.ArgumentTypeError(t("not_a_shard", value=text))
    return which, count


def parameters(text: str) -> dict[str, Any]:
    """Converter for further parameters of the model: a JSON object, without what is ours."""
    with suppress(ValueError, RecursionError):
        json.dumps(value := json.loads(text), allow_nan=False)  # no server takes NaN or 1e999
        if isinstance(value, dict) and not value.keys() & {"model", "messages", "stream"}:
            return value
    raise argparse.ArgumentTypeError(t("not_model_options", value=text))


def one_of(names: Iterable[str], **values: Any) -> Convert:
    """Converter for one of a few words, in any case; `values` says what some stand for."""
    known = {str(name): name for name in names} | values

    def convert(text: str) -> Any:
        if text.lower() in known:
            return known[text.lower()]
        raise argparse.ArgumentTypeError(t("not_one_of", value=text, names=", ".join(names)))

    return convert


def asset_types(text: str) -> tuple[str, ...]:
    """Converter for whether videos are described: the types of asset, as Immich calls them."""
    return tuple(one_of(("false", "true", "only"), **toml("settings.toml")["videos"])(text))


def unicode_text(text: str) -> str:
    """Converter for any text; bytes that are not UTF-8 would fail with each photo."""
    if re.search(NOT_UTF8, text):
        raise argparse.ArgumentTypeError(t("not_utf8"))
    return text


def plain(text: str) -> str:
    """A value without the line ends and quotes that files leave around it."""
    quoted = re.fullmatch(r"""\s*(["'])((?:(?!\1).)*)\1\s*""", text, re.S)
    return quoted[2] if quoted else text.strip("\r\n")


def headers(text: str) -> tuple[Header, ...]:
    """Converter for lines of `Name: value`, which are never quoted, as they are secrets."""
    lines = filter(None, (plain(line.strip()) for line in text.splitlines()))
    found = [re.fullmatch(HEADER, line, re.ASCII | re.IGNORECASE) for line in lines]
    if not all(found):
        raise Fatal("bad_header")
    return tuple((match[1], match[2]) for match in found if match)


def public(url: str) -> str:
    """A URL as it may be shown: without user, password and query."""
    with suppress(ValueError):
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return ""


def web_address(text: str) -> str:
    """Converter for an http(s) address; `http://` may be left out."""
    given = unicode_text(text).strip()
    url = given if "://" in given else f"http://{given}"
    with suppress(ValueError):
        parts = urlsplit(url)
        host, _ = parts.hostname or "0", parts.port  # which raises for what is no port
        strange = host.isdecimal() or re.search(r"\s|[/?#].*@", url.partition("://")[2])  # a port
        if parts.scheme in ("http", "https") and not strange:
            return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
    shown = re.sub(r".*@|[?#].*", "", text, flags=re.S)  # the rest may be a password
    raise argparse.ArgumentTypeError(t("not_an_address", value=shown))


def words(text: str) -> tuple[str, ...]:
    """Converter for a list, separated by commas or lines."""
    return tuple(filter(None, (part.strip(" \t\r\"'") for part in re.split("[,\n]", text))))


def each(convert: Convert, none: Sequence[str] = ("",)) -> Convert:
    """Converter for such a list, each part of which is converted, too; `none` stands for none."""
    return lambda text: [convert(word) for word in words(text) or none]


def ids_in(text: str) -> list[str]:
    """The ids in the path of a link, or the one that a text is."""
    parts = re.split("[?#]", text.lower().strip())[0].split("/")
    return [part for part in parts if re.fullmatch(ID, part)]


def id_in(text: str) -> str:
    """Converter for an Immich id, or for a link, whose last id counts."""
    if found := ids_in(text):
        return found[-1]
    raise argparse.ArgumentTypeError(t("not_an_id", value=text))


def albums(text: str) -> list[str]:
    """Converter for albums, one per line: names, ids, or links, whose first id is the album's."""
    lines = filter(None, map(str.strip, unicode_text(text).splitlines()))
    return [(ids_in(line) or [unicodedata.normalize("NFC", line)])[0] for line in lines] or [""]


def wall_clock(text: str, *, end: bool = False) -> datetime:
    """Converter for a local time, or for a day: its beginning or, with `end`, the next one's."""
    with suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(text.strip())
        later = found + timedelta(days=1)
        if not found.tzinfo and found - ZONES:
            whole = end and not re.search(r"\d[T ]\d", text)
            return (later if whole else found).replace(tzinfo=UTC)
    raise argparse.ArgumentTypeError(t("not_a_date", value=text))


def language_name(text: str) -> str:
    """Converter for a language: its name in English, or the text as it is for an unknown one."""
    given = unicode_text(text).strip()
    known, code = toml("languages.toml").items(), given.lower().replace("_", "-")
    return next((name for name, row in known if code in (name.lower(), *row["codes"])), given)


def file_text(file: str) -> str:
    """What a file that holds a setting says; Fatal if it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise Fatal("unreadable_file", file=file, why=why) from error


def option(metavar: str, convert: Convert = unicode_text, *, shown: bool = True, **row: Any) -> Any:
    """A field that an option sets; `add_setting` and argparse tell what its row may hold."""
    return field(repr=shown, metadata={"metavar": metavar, "type": convert} | row)


def secret(metavar: str, convert: Convert = unicode_text, **row: Any) -> Any:
    """A field that is never shown, and that a file may hold, which a second option names."""
    return option(metavar, convert, shown=False, in_file=plain, **row)


def switch(**row: Any) -> Any:
    """A field that is on or off; the opposite of its option begins with --no-."""
    return field(metadata={"action": argparse.BooleanOptionalAction, "default": False} | row)


@dataclass(frozen=True, slots=True)
class Config:
    """What was asked: each setting with its option, in the order of --help, which explains them.

    Durations are seconds. Lists add up when they are repeated. Secrets never show in the repr.
    """

    notices: tuple[AnalyzeError, ...]  # what is odd about the settings, for people to know
    access_ambiguous: bool  # both libraries were given, and nothing said which to take
    prompt_files: tuple[str, ...]  # of which the last one counts, if there is no comparison
    sources: Mapping[str, str] = field(compare=False)  # of what was set: variable, file or ""

    mode: Mode = option("MODE", one_of(Mode), default="batch", alone=(Mode.MONITOR, Mode.COMBINED))
    policy: Policy = option("POLICY", one_of(Policy), flags=("--overwrite-policy", "-O"))
    overwrite_existing: bool = switch(flags=("--overwrite-existing", "-o"))  # then policy is all
    preserve_human: bool = switch(flags=("--preserve-human", "-p"))
    disable_ai_wrapper: bool = switch()  # refused with preserve_human
    retry_failed: bool = switch()
    ignore_descriptions: tuple[str, ...] = option("TEXTS", words, action="extend")
    shard: tuple[int, int] = option("K/N", share, default="1/1")  # which, of how many
    limit: int | None = option("N", number(1, int))  # photos to describe; a service: each day
    photo: tuple[str, ...] = option("ID", each(id_in), action="extend")
    album: tuple[str, ...] = option("ALBUM", albums, action="extend")  # ids, once it is open
    taken_after: datetime | None = option("DATE", wall_clock)  # by the local clock, as if in UTC
    taken_before: datetime | None = option("DATE", functools.partial(wall_clock, end=True))
    favorites: bool = switch()
    library: str | None = option("ID", id_in)  # an external one
    videos: tuple[str, ...] = option("WHICH", asset_types, nargs="?", const="true")
    video_frames: int = option("N", number(1, int), default=4)
    undo: bool = switch(action="store_true", env="")
    dry_run: bool = switch()  # also true with show_prompt
    report: str | None = option("FILE")  # the page to write
    compare: tuple[str, ...] = option("NAMES", words, action="extend")  # further models
    prompt: str = option("TEXT", in_file=str)  # a template, if it has a TAG
    context: tuple[str, ...] = option("LIST", each(one_of((*FACTS, "all")), ()), action="extend")
    enrich_prompt: bool = switch()  # then they are ENRICHED at least
    description_language: str = option("LANGUAGE", language_name, default="")
    show_prompt: str | None = option("ID", id_in, env="")  # of a photo
    check: bool = switch(action="store_true", env="")
    access: str = option("ACCESS", one_of((DATABASE, API)), flags=("--data-access-mode", "-d"))
    immich_root: Path = option("FOLDER", Path, default=Path("/var/lib/immich"))
    thumbs_root: Path | None = option("FOLDER", Path)
    postgres_url: str = secret("URL")
    immich_api_url: str = option("URL", web_address, shown=False, env="IMMICH_API_URL")
    immich_api_keys: tuple[str, ...] = secret("KEYS", words, action="extend", env="IMMICH_API_KEY")
    immich_header: tuple[Header, ...] = secret("HEADER", headers, action="extend")
    thumbnail_size: str = option("SIZE", one_of(SIZES), default=SIZES[0])
    api_poll_interval: float = option("S", number(0, above=True), default=10)
    link_url: str = option("URL", web_address, shown=False)  # of Immich, for people; or ""
    wait_for_immich: bool = switch(default=True)
    wait_timeout: float = option("S", number(0), default=120)
    wait_retry_interval: float = option("S", number(0, zero=SHORTEST_PAUSE), default=5)
    interface: str = option("NAME", one_of(INTERFACES, openai="llamacpp"), default="ollama")
    hosts: tuple[str, ...] = option("URLS", each(web_address), shown=False, action="extend")
    model_name: str = option("NAME", default="qwen3-vl:4b-thinking-q4_K_M")
    api_key: str = secret("KEY")
    host_header: tuple[Header, ...] = secret("HEADER", headers, action="extend")
    preflight_model_check: bool = switch(default=True)
    max_concurrent: int = option("N", number(1, int), default=4)
    timeout: float = option("S", number(0, above=True), default=300)
    max_tokens: int = option("N", number(1, int), default=4096)
    context_length: int = option("N", number(0, int), default=0)
    model_options: dict[str, Any] = option("JSON", parameters, default="{}")
    think: bool = switch()
    max_image_size: int = option("PIXELS", number(0, int), default=0)
    max_retries: int = option("N", number(0, int), default=0)
    retry_delay_seconds: float = option("S", number(0), default=5)
    unavailable_duration: float = option("S", number(0, zero=SHORTEST_PAUSE), default=60)
    file_write_timeout: float = option("S", number(0), default=30)
    file_check_interval: float = option("MS", number(0, zero=1000 * SHORTEST_PAUSE), default=500)
    event_cooldown: float = option("S", number(0), default=2)
    health_port: int = option("PORT", number(0, int, most=65535), default=0)
    health_host: str = option("HOST", default="127.0.0.1")
    healthcheck: bool = switch(action="store_true", env="")
    lang: str = option("LANG")
    log_level: int | None = option("LEVEL", one_of(LOG_LEVELS, **LOG_LEVELS))  # None: by the output
    final_output: bool = switch(default=True)
    grace: float = option("S", number(0), default=30)

    @property
    def prompt_id(self) -> str:
        """What notes call all that shapes an answer: 12 hex digits of its SHA-256."""
        options = json.dumps(self.model_options, sort_keys=True) if self.model_options else ""
        more = [*self.context, self.description_language]
        further = json.dumps(more) if any(more) else ""
        return sha256((self.prompt + options + further).encode()).hexdigest()[:12]

    @property
    def secrets(self) -> str:
        """An expression for what a server may repeat and nobody may see."""
        # a short header value may be a common word such as `https`
        sent = [value for _, value in self.immich_header + self.host_header if len(value) > 7]
        given = filter(None, (self.api_key, *self.immich_api_keys, *sent))
        return "|".join(map(re.escape, given)) or "(?!)"


class FileParser(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """`key = value` lines, lists as [a, b]; errors quote no line, as it may hold a secret."""

    def parse(self, file: str) -> dict[str, str]:
        read, settings = super().parse, dict[str, str]()
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
            items = [item for line in lines for item in read([line]).items()]
        except OSError as error:
            raise Fatal("unreadable_file", file=file, why=error.strerror) from error
        except (configargparse.ConfigFileParserException, UnicodeDecodeError) as error:
            raise Fatal("bad_config_file", file=file) from error
        lists = [f.name for f in fields(Config) if f.metadata.get("action") == "extend"]
        opposites = toml("settings.toml")["opposites"]
        for name, value in items:
            key = name.lstrip("-")
            text = "\n".join(map(str, value)) if isinstance(value, list) else value
            if key.startswith("no-") and text.lower() in opposites:
                key, text = key.removeprefix("no-"), opposites[text.lower()]
            adds_up = key in settings and key.replace("-", "_") in lists
            settings[key] = f"{settings[key]}\n{text}" if adds_up else text
        return settings


class Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """Reports a wrong setting as Fatal, in one line."""

    def _option_strings_that_override(self, action: argparse.Action) -> list[str]:
        """The flags that win over a variable; a policy's has another name, but goes beside it."""
        flags: list[str] = super()._option_strings_that_override(action)
        return flags + ["-o", "--overwrite-existing", "--no-overwrite-existing"] * ("-O" in flags)

    def error(self, message: str) -> NoReturn:
        raise verdict("options", message, why="")


def add(group: Any, *flags: str, env: str | None = None, **more: Any) -> None:
    """Add an option; its variable is IMMICH_ANALYZE_<OPTION> unless named."""
    option = flags[0].lstrip("-").replace("-", "_")
    variable = f"IMMICH_ANALYZE_{option.upper()}" if env is None else env
    text, default = t(f"help_{option}"), more.get("default", group.get_default(option))
    if default not in (None, False, "", argparse.SUPPRESS):
        text += f" ({default})".replace("%", "%%")
    text += f" [{variable}]" if variable else ""
    group.add_argument(*flags, env_var=variable, help=text, **more)


def add_setting(group: Any, name: str, row: dict[str, Any]) -> None:
    """Add a field's option; beside it those that say one value alone, or name a file with it."""
    flags = row.pop("flags", [f"--{name.replace('_', '-')}"])
    alone, in_file = row.pop("alone", ()), row.pop("in_file", False)
    ways = group.add_mutually_exclusive_group()
    add(ways, *flags, dest=name, **row)
    for value in alone:
        const = {"action": "store_const", "const": value, "default": argparse.SUPPRESS}
        add(ways, f"--{value}", f"-{value[0]}", env="", dest=name, **const)
    if in_file:
        env = row.get("env")
        more = {"action": "extend", "type": lambda file: [unicode_text(file)], "metavar": "FILE"}
        add(ways, f"{flags[0]}-file", env=env and f"{env}_FILE", **more)


def build_parser() -> Parser:
    """All options: those of Config, and the parser's own."""
    read = toml("settings.toml")
    parser = Parser(
        **read["parser"],
        description=t("help_description"),
        epilog=t("help_epilog"),
        default_config_files=CONFIG_FILES,
        config_file_open_func=str,  # FileParser opens it
        config_file_parser_class=FileParser,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32),
    )
    parser.set_defaults(prompt=read["prompt"])
    group: Any = parser
    for setting in fields(Config):
        if heading := read["headings"].get(setting.name):
            group = parser.add_argument_group(t(f"help_group_{heading}"))
        if setting.metadata:
            add_setting(group, setting.name, dict(setting.metadata))
    add(group, "--config", env="", type=str, is_config_file=True, metavar="FILE")
    add(group, "--help", "-h", env="", action="help")
    add(group, "--version", "-V", env="", action="version", version=f"%(prog)s {__version__}")
    return parser


def known_names(environ: Mapping[str, str], interface: str = "") -> dict[str, str]:
    """The environment without empty variables, and with older names translated."""
    known = {n: plain(text) if n.startswith(OURS) else text for n, text in environ.items()}
    for name in [name for name in known if name.startswith(OURS) and name.endswith("_FILE")]:
        with suppress(Fatal):  # complained about where it is read
            known[name] *= bool(plain(file_text(known[name])).strip())
    known = {name: text for name, text in known.items() if text.strip()}
    off = {f"IMMICH_ANALYZE_{name}_HOSTS".upper() for name in INTERFACES[1:] if name != interface}
    opposites: dict[str, str] = toml("settings.toml")["opposites"]
    for older, (name, pattern) in toml("settings.toml")["older"].items():
        if older not in off and (found := re.match(pattern, known.get(older, ""))):
            text = found[found.lastindex or 0]
            known.setdefault(name, opposites.get(text.lower(), text) if "_NO_" in older else text)
    return known


def language(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The language of all texts; complaints about options need it before they are parsed."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--lang", nargs="?", default=environ.get("IMMICH_ANALYZE_LANG"))
    chosen = (finder.parse_known_args(argv)[0].lang or "").lower()
    locale = next((v for n in ("LC_ALL", "LC_MESSAGES", "LANG") if (v := environ.get(n))), "")
    return next((code for code in (chosen, locale[:2]) if code in LANGUAGES), "en")


def like(name: str, names: Iterable[str]) -> str:
    """The name that was meant: the shortest that begins with this one, else the nearest."""
    longer = min((other for other in names if other.startswith(name)), key=len, default=None)
    return longer or difflib.get_close_matches(name, names, 1, 0.0)[0]


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Read flags, environment and file, where the first one wins; Fatal shows no secret."""
    parser = build_parser()
    options, _ = parser.parse_known_args(list(argv), env_vars=known_names(environ))
    known = known_names(environ, options.interface)
    options, unknown = parser.parse_known_args(list(argv), env_vars=known)
    if unknown:
        # Only an option's name is told: its value may be a secret, and so may a line of the file
        # without a value, which became "--line=true".
        found = (re.match(r"(?!.*=true$)(--[^=]+|-.)", word, re.S) for word in unknown)
        names = [match[0] for match in found if match]
        raise Fatal("unknown_option", option=names[0]) if names else Fatal("unknown_word")
    variables = [action.env_var for action in parser._actions if action.env_var]
    variables += toml("settings.toml")["older"]
    strange = sorted(n for n in known if n.startswith("IMMICH_ANALYZE_") and n not in variables)
    near = (f"{name} ({like(name, variables)}?)" for name in strange)
    options.notices = [AnalyzeError("unknown_variables", names=", ".join(near))] if strange else []
    if options.lang is not None and options.lang.lower() not in LANGUAGES:
        options.notices.append(AnalyzeError("unknown_language", value=options.lang))
    options.lang = language([f"--lang={options.lang}"] if options.lang else [], known)
    flags = {match[0] for word in argv if (match := re.match("--[^=]+|-[^-]", word))}
    sources = {one.dest: "" for one in parser._actions if flags & {*one.option_strings}}
    for where, given in parser.get_source_to_settings_dict().items():
        if where not in ("command_line", "defaults"):
            sources |= {a.dest: where.partition("|")[2] or a.env_var for a, _ in given.values()}
    options.sources = {name.removesuffix("_file"): source for name, source in sources.items()}
    return config_from(options, known)


def contradiction(options: argparse.Namespace) -> str:
    """Why settings do not go together, as a key; "" if they do."""
    ends = options.undo or options.dry_run or options.report
    compares = options.compare or len(options.prompt_file or ()) > 1
    if compares and (options.undo or not options.dry_run):
        return "compare_needs_dry_run"
    if options.undo and options.report:
        return "no_report"
    if ends and options.mode.monitors:
        return "batch_only"
    decodes = "VIDEO" in (options.videos or ()) and options.video_frames > 1
    if decodes and not options.undo and not find_spec("av"):
        return "no_pyav"
    return "wrapper_needed" if options.preserve_human and options.disable_ai_wrapper else ""


def config_from(options: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Apply the rules that span several options; Fatal where they contradict each other."""
    given = vars(options)
    for name, row in ((setting.name, setting.metadata) for setting in fields(Config)):
        adds_up = row.get("action") == "extend"
        if files := given.get(f"{name}_file"):
            read = [row["in_file"](file_text(file)) for file in (files if adds_up else files[-1:])]
            given[name] = row["type"]("\n".join(read))
        if adds_up:
            given[name] = tuple(dict.fromkeys(given[name] or ()))
    roots = {n: root.absolute() for n in ("immich_root", "thumbs_root") if (root := given[n])}
    moved = [root for name, root in roots.items() if root != given[name]]
    url, (database_url, named) = (options.postgres_url or "").strip(), database(environ)
    api_url, keys = re.sub("(?<!/)/api$", "", options.immich_api_url or ""), options.immich_api_keys
    wanted = (api_url and keys) or ((api_url or keys) and not named)
    access = options.access or (API if wanted and not url else DATABASE)
    if access == API and not (api_url and keys):
        raise Fatal("api_key_missing" if api_url else "api_url_missing")
    if options.undo:  # of all that is ours
        given |= {"policy": Policy.ALL, "retry_failed": True, "ignore_descriptions": ()}
    policy = options.policy or (Policy.ALL if options.overwrite_existing else Policy.NONE)
    preserve = options.preserve_human or policy is Policy.MISSING_AI
    given |= {"policy": policy, "preserve_human": preserve}
    if why := contradiction(options):
        raise Fatal(why)
    asked = placeholders(options.prompt)[0].union(options.context, ENRICHED * options.enrich_prompt)
    given |= roots | {
        "context": tuple(n for n in FACTS if n in asked or ("all" in asked and n != "gps")),
        "access": access,
        "dry_run": options.dry_run or bool(options.show_prompt),
        "videos": options.videos or asset_types("true" if options.undo else "false"),
        "prompt_files": tuple(dict.fromkeys(options.prompt_file or ())),
        "link_url": public(options.link_url or (api_url if access == API else "")),
        "access_ambiguous": bool((url or named) and keys and not options.access),
        "notices": (*options.notices, *(AnalyzeError("root_relative", root=r) for r in moved)),
        "postgres_url": url or database_url or "host=localhost user=postgres dbname=immich",
        "immich_api_url": api_url and api_url + "/api",
        "api_key": (options.api_key or "").strip(),
        "hosts": options.hosts or (toml("dialects.toml")[options.interface]["host"],),
        "file_check_interval": options.file_check_interval / 1000,
    }
    for name in ("immich_api_keys", "api_key"):
        if re.search("[^!-~]", "".join(given[name])):  # it could not be sent as a header
            raise Fatal("bad_key", option=f"--{name.replace('_', '-')}")
    return Config(**{name: given[name] for name in Config.__slots__})


def marked(text: str) -> Any:
    """A template in which a form feed marks each line that is empty on purpose."""
    return template(re.sub(r"(?m)^[ \t\r]*$", "\f", text))


def tidy(text: str) -> str:
    """What a marked template became, without the lines in which nothing was filled in."""
    text = re.sub(r"(?m)(?:\n[ \t]*)+\Z|^[ \t]*\n", "", text)
    return re.sub("\f(?:\n\f)+", "\f", text).replace("\f", "")


@contextmanager
def template_trouble(kind: type[AnalyzeError]) -> Iterator[None]:
    """Turn what a template raises into an error of ours, with the line."""
    from jinja2 import TemplateError

    usual = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError)
    try:
        yield
    except (TemplateError, ValueError, *usual) as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
        line, why = getattr(error, "lineno", [1, *lines][-1]), str(error).partition("\n")[0]
        trouble = Fatal("bad_template", line=line, why=why or type(error).__name__)
        raise trouble.as_kind(kind) from error


@functools.cache
def placeholders(text: str) -> tuple[set[str], set[str]]:
    """The names that a template uses, and which of them it shows, not only asks about.

    Fatal, with the line, if it cannot be filled in.
    """
    if not re.search(TAG, text):
        return set(), set()
    from jinja2 import TemplateAssertionError, meta, nodes

    with template_trouble(Fatal):
        tree = template(text).environment.parse(text)
        names = meta.find_undeclared_variables(tree)
        for node in tree.find_all(nodes.Name):
            if node.name in names.difference(PLACEHOLDERS):
                why = t("not_one_of", value=node.name, names=", ".join(PLACEHOLDERS))
                raise TemplateAssertionError(why, node.lineno)
        for sample in ("", "1"):
            marked(text).render(dict.fromkeys(PLACEHOLDERS, sample))
    for part in tree.find_all((nodes.If, nodes.For)):
        part.test = nodes.Const(True)
    return names, meta.find_undeclared_variables(tree)


def database(environ: Mapping[str, str]) -> tuple[str, bool]:
    """The database of Immich's own variables, as libpq takes it, and whether they name one."""
    given: dict[str, str] = {}
    rows = toml("settings.toml")["database"]
    for name in ("DB_URL", *rows):
        file = environ.get(f"{name}_FILE")
        given[name] = plain(file_text(file)) if file else environ.get(name, "")
        if re.search(NOT_UTF8, given[name]):
            raise Fatal("bad_setting", name=name, why=t("not_utf8"))
    named = any(given[name] for name in ("DB_URL", "DB_HOSTNAME", "DB_USERNAME"))
    if given["DB_URL"] or not any(given.values()):
        return given["DB_URL"], named
    parts = {keyword: given[name] or usual or None for name, (keyword, usual) in rows.items()}
    return psycopg2.extensions.make_dsn(**parts), named  # without those that are None


# ------------------------------------------------------------------------------
# 4 Records and text: what flows, and pure functions on it. No I/O.


@dataclass(frozen=True, slots=True)
class Note:
    """What the tool keeps of a photo in Immich's metadata of it, under the key KEY."""

    model: str
    prompt: str  # Config.prompt_id
    text: str = ""  # text_id of the description as Immich stored it
    was: str = ""  # the same of our own text that it replaces, until it was read back
    failed: str = ""  # or the key of the error for which there is none
    why: str = ""
    tries: int = 0  # runs, or days, in which it failed so
    facts: str = ""  # names_id of the photo

    def value(self, at: datetime) -> dict[str, Any]:
        """As it is stored, in JSON."""
        always = ("model", "prompt", *(("failed", "why", "tries") if self.failed else ("text",)))
        own = {n: item for n in self.__slots__ if (item := getattr(self, n)) or n in always}
        return {"v": 1, "at": iso(at)} | own


FAR_FUTURE = datetime(9999, 12, 31, tzinfo=UTC)
KEY = "immich-analyze"
MOST_TRIES = 3
UNREAD = Note("", "")  # stands for a note that the listing does not show


def note_in(value: object) -> Note | None:
    """The note in stored JSON; None for none, or one that another version or a person wrote."""
    given = value if isinstance(value, dict) else {}
    typed = all(type(i) is (int if name in ("v", "tries") else str) for name, i in given.items())
    with suppress(TypeError):  # it lacks a model or a prompt, or has more
        note = Note(**{name: item for name, item in given.items() if name not in ("v", "at")})
        if typed and given.get("v") == 1 and note.value(FAR_FUTURE).keys() == given.keys():
            return note
    return None


def text_id(text: str) -> str:
    """What notes call a description: the first 16 hex digits of its SHA-256."""
    return sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def iso(moment: datetime) -> str:
    """A moment as all releases of Immich take it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo as Immich showed it last."""

    id: str
    name: str
    description: str
    source: str  # how its library gets at it: number of the key (API), path of the preview (SQL)
    ready: bool = True  # whether Immich has made its preview
    note: Note | None = None
    library: str = ""  # id of its external library
    told: Mapping[str, Any] = field(default_factory=dict)  # what Immich's API tells, for facts
    video: bool = False
    site: str = ""  # Immich's address for people; "" if it is not known

    @property
    def link(self) -> str:
        """Where people find it in Immich; "" if that is not known."""
        return self.site and f"{self.site}/photos/{self.id}"

    @property
    def home(self) -> tuple[str, str]:
        """Where it is read and written: what it is reached by, and its external library."""
        return self.source, self.library


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG ready to be sent; its base64 is made once for all tries."""

    base64: bytes
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked about a photo, or about frames of a video in their order."""

    text: str
    pictures: tuple[Picture, ...]

    def about(self, colour: str, size: tuple[int, int] | None = None) -> Question:
        """The same about plain pictures, as large as its own if no `size` is given."""
        plain = (plain_picture(size or picture.size, colour) for picture in self.pictures)
        return replace(self, pictures=tuple(plain))


@dataclass(frozen=True, slots=True)
class Said:
    """What a model said of a picture."""

    text: str
    seconds: float  # that it took
    tokens: int


# Our text among a person's: from a line [AI] to the next line [/AI] with no other [AI] between.
BLOCK = re.compile(r"^\[AI\][^\S\n]*\n(?:(?!\[AI\][^\S\n]*$).*\n)*?\[/AI\][^\S\n]*$", re.MULTILINE)
# The same with the GAP before it, or after it where it comes first.
BLOCK_IN_GAP = re.compile(rf"(?m)\A(?:{BLOCK.pattern}\n{{0,2}})+|\n{{0,2}}{BLOCK.pattern}")
PLAIN_SIZE = (448, 448)
SHORTEST_SIDE = 56  # pixels: servers of Qwen's models crash below 28 to 32
USUAL_PIXELS, USUAL_SIDE = 50_000_000, 4096  # above the first, pictures are shrunk to the second
MOST_PIXELS = 270_000_000  # a gigabyte in memory
JPEG_SIDE = 65_500  # the longest that JPEG can have
FRAME_SIDE = 1024  # pixels of a frame, if --max-image-size allows as many
# Where in its part of a video a frame may be, and how much earlier if that is easier to get.
LOOKS = {0.5: 0.5, 0.625: 0.125, 0.75: 0.125, 0.875: 0.125}
DARK, MOVES = 32, 4  # of 255: no pixel of a black frame is lighter; how far frames differ at least
HDR = (16, 18)  # the transfer functions PQ and HLG, as ITU-T H.273 numbers them
SRGB = {"dst_color_trc": 13, "dst_color_primaries": 1}
GAP = "\n\n"  # between a person's text, or a prompt, and what is added


def is_ours(photo: Photo) -> bool:
    """Whether the description is, to the letter, as the tool left it."""
    return bool(photo.note and text_id(photo.description) in (photo.note.text, photo.note.was))


def has_ours(photo: Photo) -> bool:
    """Whether a text of ours is in the description."""
    return is_ours(photo) or bool(BLOCK.search(photo.description))


@functools.cache
def expression(texts: tuple[str, ...]) -> str:
    """What matches, in Python and PostgreSQL, white space and these texts, `*` being any part."""
    # a $ always has a backslash before it
    either = "|".join(".*".join(map(re.escape, text.split("*"))) for text in ("", *texts))
    # in any case: PostgreSQL may know only that of ASCII
    either = re.sub(r"[^\W\d_]", lambda c: f"(?:{c[0].lower()}|{c[0].upper()})", either)
    return rf"\A\s*(?:{either})\s*\Z"


def whose(photo: Photo) -> str:
    """Whose the description is: "ours", "person", "both", or "" for none."""
    if BLOCK.search(photo.description):
        return "both" if unmerge(photo).strip() else "ours"
    return "ours" if is_ours(photo) else "person" if photo.description.strip() else ""


def undescribed(photo: Photo, config: Config) -> bool:
    """Whether a photo has no description, or one of those to ignore that is not ours."""
    text = photo.description.strip()
    ignored = re.match(expression(config.ignore_descriptions), text, re.S)
    return not text or (bool(ignored) and not has_ours(photo))


def left_alone(photo: Photo, config: Config) -> str:
    """Why a photo is not to be described, as a key; "" if it is, or if its note must tell."""
    note = photo.note or Note("", "")
    same = note.model == config.model_name and note.prompt == config.prompt_id
    # what Immich did not keep through its API, the database may keep
    other_way = note.failed == "not_kept" and config.access == DATABASE
    if same and note.failed and note.tries >= MOST_TRIES and not (config.retry_failed or other_way):
        return "failed_before"
    if undescribed(photo, config):
        return "has_description" if config.undo else ""
    current = same and not note.failed and note.was != text_id(photo.description)
    current = current and (not note.facts or note.facts == names_id(photo, config))
    if config.policy is Policy.MISSING_AI:
        wanted = not has_ours(photo)
    elif config.policy is Policy.OUTDATED and note is not UNREAD:
        wanted = has_ours(photo) and not current
    else:
        wanted = config.policy is not Policy.NONE
    return "" if wanted else "has_description"


def merge(photo: Photo, text: str, config: Config) -> str:
    """The whole description that a photo gets with our text."""
    # where there is a block, or a person's text is to be kept, all outside ours stays to the
    # byte; only `all` without `--preserve-human` replaces what a person wrote
    ignored = undescribed(photo, config) and photo.description.strip()
    current = "" if ignored else photo.description
    block, first = f"[AI]\n{text}\n[/AI]", BLOCK.search(current)
    if not config.preserve_human and (config.policy is Policy.ALL or not first):
        return text
    if not first:
        return block if is_ours(photo) or not current else current + GAP + block
    before, after = current[: first.start()] + block, current[first.end() :]
    alone = before + BLOCK.sub("", after)
    # a person's own tags may look like a block once another one between them is gone
    return alone if len(BLOCK.findall(alone)) == 1 else before + after


def unmerge(photo: Photo) -> str:
    """The description without our text."""
    rest, blocks = BLOCK_IN_GAP.subn("", photo.description)
    return "" if is_ours(photo) and not blocks else rest


def dig(data: object, *path: str | int) -> Any:
    """The value at a path into JSON; None where it does not lead anywhere."""
    for step in path:
        if isinstance(step, int):
            data = data[step] if isinstance(data, list) and len(data) > step else None
        else:
            data = data.get(step) if isinstance(data, dict) else None
    return data


def dig_list(data: object, *path: str | int) -> list[Any]:
    """The list at a path into JSON; an empty one for anything else."""
    value = dig(data, *path)
    return value if isinstance(value, list) else []


def one_line(data: object, *path: str | int) -> str:
    """A text, or the one at a path into JSON, in one line; "" for anything else."""
    text = dig(data, *path)
    return " ".join(text.split()) if isinstance(text, str) else ""


def number_at(data: object, *path: str | int) -> float:
    """The number at a path into JSON; 0 where there is none."""
    value = dig(data, *path)
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else 0.0


def taken_at(told: object) -> datetime | None:
    """When a photo was taken, by the local clock; None where it is not known."""
    with suppress(ValueError):
        return datetime.fromisoformat(str(dig(told, "localDateTime"))).replace(tzinfo=UTC)
    return None


def in_period(told: object, config: Config) -> bool:
    """Whether a photo was taken in the period that the settings give, if any."""
    first, end = config.taken_after, config.taken_before
    taken = taken_at(told) if first or end else FAR_FUTURE
    return bool(taken and (not first or taken >= first) and (not end or taken < end))


def age_at(born: object, taken: datetime | None) -> str:
    """What is added to a name to tell the age; "" where it is not known, or cannot be true."""
    with suppress(ValueError):
        birth = date.fromisoformat(str(born)[:10])
        if taken:  # who was born on 29 February is a year older on 1 March in common years
            age = taken.year - birth.year - ((taken.month, taken.day) < (birth.month, birth.day))
            return f" (aged {age})" if 0 <= age <= 120 else ""
    return ""


def people_in(told: object) -> list[str]:
    """People with a name and their age, left to right where Immich tells, else by name."""
    found, taken = [], taken_at(told)
    for person in dig_list(told, "people"):
        name, faces = one_line(person, "name"), dig_list(person, "faces")
        if name and dig(person, "isHidden") is not True:
            xs = [number_at(f, "boundingBoxX1") / (number_at(f, "imageWidth") or 1) for f in faces]
            age = age_at(dig(person, "birthDate"), taken)
            found.append((min(xs, default=math.inf), name, age))
    return [name + age for _, name, age in sorted(found)]


def names(told: object) -> dict[str, list[str]]:
    """What has a name on a photo, by fact, each once; our text is outdated once it changes."""
    tags = [one_line(tag, "value") for tag in dig_list(told, "tags")]
    inner = [tag for tag in tags if not any(other.startswith(f"{tag}/") for other in tags)]
    found = {
        "people": people_in(told),
        "place": [one_line(told, "exifInfo", part) for part in ("city", "state", "country")],
        "albums": map(one_line, dig_list(told, "albums")),
        "tags": [tag.rpartition("/")[2] for tag in inner],
    }
    return {fact: list(dict.fromkeys(filter(None, listed))) for fact, listed in found.items()}


def names_id(photo: Photo, config: Config) -> str:
    """What notes call the names that are asked for; "" where none are."""
    known = names(photo.told).items()
    asked = {fact: sorted(listed) for fact, listed in known if fact in config.context}
    return text_id(json.dumps(asked)) if asked else ""


def question(photo: Photo, config: Config, frames: int = 1, seconds: float = 0.0) -> str:
    """What is asked about a photo, or about so many frames of a video that lasts so long.

    That is the prompt, then the facts and the language that it leaves out.
    """
    prompt, language = config.prompt, config.description_language
    if frames == 1 and not (config.context or language or re.search(TAG, prompt)):
        return prompt
    told, typed = photo.told, replace(photo, description=unmerge(photo))
    ways = {"one_line": one_line, "number_at": number_at, "dig_list": dig_list}
    chosen = patterns()["unchosen_name"].sub("", one_line(told, "originalFileName"))
    found = {"names": names(told), "taken": taken_at(told), "file_name": chosen}
    found["persons_text"] = "" if undescribed(typed, config) else typed.description
    words = marked(data_file("question.jinja")).make_module({"told": told} | ways | found)
    # in one line, whatever people wrote
    facts = {n: one_line(getattr(words, n)() if n in config.context else "") for n in FACTS}
    _, shown = placeholders(prompt)
    context = tidy(words.context(**facts | dict.fromkeys(shown & {*FACTS}, "")))
    if re.search(TAG, prompt):
        with template_trouble(Permanent):  # what fails for this photo alone
            prompt = tidy(marked(prompt).render(facts, context=context, language=language))
    request = "" if "language" in shown else tidy(words.request(language))
    moments = tidy(words.moments(frames, seconds))
    rest = GAP.join(filter(None, [moments, "" if shown - {"language"} else context, request]))
    return prompt.rstrip("\n") + GAP + rest if rest else prompt or toml("settings.toml")["prompt"]


def picture_type(data: bytes) -> tuple[str, bool]:
    """A picture's kind, "" for one that we do not know, and whether it is whole."""
    tail = data[-64:]  # previews are rewritten in place, and seen cut then
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", b"\xff\xd9" in tail
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", b"IEND" in tail
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP", len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return "", len(data) >= 12


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """A picture as a JPEG."""
    target = io.BytesIO()
    image.save(target, "JPEG", quality=quality)
    return target.getvalue()


def prepared(data: bytes, max_size: int, quality: int = 90) -> Picture:
    """Check a picture and make it ready to be sent; Retryable while it is being written."""
    # Decoding costs four times all the rest. It is done only for a JPEG that is too large, too
    # narrow or on its side, to see whether one without its usual end is whole, and for other kinds:
    # llama.cpp and some releases of Ollama cannot read WebP.
    kind, whole = picture_type(data)
    cut = Permanent("preview_broken") if whole else Retryable("preview_cut")
    if not kind:
        raise Permanent("preview_unknown") if whole else cut
    Image.MAX_IMAGE_PIXELS = None  # ours is MOST_PIXELS: previews are the user's own
    try:
        with Image.open(io.BytesIO(data)) as image:
            usual = USUAL_SIDE if math.prod(image.size) > USUAL_PIXELS else JPEG_SIDE
            most = min(max_size or usual, JPEG_SIDE)
            fits = min(image.size) >= SHORTEST_SIDE and max(image.size) <= most
            upright = kind == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            if whole and fits and upright:
                return Picture(base64.b64encode(data), image.size)
            picture = plain_copy(image, most)
    except (OSError, ValueError, SyntaxError) as error:  # by Pillow
        raise cut from error
    return Picture(base64.b64encode(jpeg(picture, quality)), picture.size)


def plain_copy(image: Image.Image, most: int) -> Image.Image:
    """A picture in RGB, no longer than `most`; what is too narrow has its mean colour around."""
    image.draft("RGB", (most, most))  # a JPEG is decoded at a part of its size
    image = ImageOps.exif_transpose(image)  # as people see it; an original may lie on its side
    if math.prod(image.size) > MOST_PIXELS:
        raise ValueError("too large")
    if math.prod(image.size) > USUAL_PIXELS:  # the copies below would take gigabytes
        image.thumbnail((2 * USUAL_SIDE, 2 * USUAL_SIDE), Image.Resampling.NEAREST)
    image = opaque(image)
    image.thumbnail((most, most))
    width, height = (max(side, SHORTEST_SIDE) for side in image.size)
    mean: Any = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return ImageOps.pad(image, (width, height), color=mean)


def opaque(image: Image.Image) -> Image.Image:
    """A picture in RGB, on white where it was transparent, or on black if it is light itself."""
    if image.mode.startswith("I"):  # of 16 bits, which convert would cut off
        image = image.convert("F").point(lambda value: value / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    shades = image.convert("L").histogram(image.getchannel("A"))
    ground = "white" if sum(shades[:128]) >= sum(shades[128:]) else "black"
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")


@functools.lru_cache(8)
def plain_picture(size: tuple[int, int], colour: str = "gray") -> Picture:
    """A picture of one colour, which every model can take."""
    return prepared(jpeg(Image.new("RGB", size, colour)), 0)


def sheet(pictures: Sequence[Picture], side: int, quality: int = 90) -> Picture:
    """All pictures as one that is no longer than `side`, row by row."""
    columns = math.ceil(math.sqrt(len(pictures)))
    cells = [prepared(base64.b64decode(one.base64), side // columns) for one in pictures]
    width, height = size = cells[0].size  # the others may have another one
    whole = Image.new("RGB", (columns * width, math.ceil(len(cells) / columns) * height))
    for number, cell in enumerate(cells):
        image = ImageOps.pad(Image.open(io.BytesIO(base64.b64decode(cell.base64))), size)
        whole.paste(image, (number % columns * width, number // columns * height))
    return prepared(jpeg(whole, quality), side)


@functools.cache
def patterns() -> dict[str, re.Pattern[str]]:
    """What models and servers say, and the like, by the names in patterns.toml."""
    texts: dict[str, str] = {}
    for name, text in toml("patterns.toml")["patterns"].items():  # may name those above it
        texts[name] = re.sub(r"\{([a-z_]+)\}", lambda part: f"(?:{texts[part[1]]}\n)", text)
    return {name: re.compile(text, re.VERBOSE) for name, text in texts.items()}


def is_spoken_of(tag: re.Match[str]) -> bool:
    """Whether a tag is part of what is described: quoted, or between words of a sentence."""
    text, (start, end) = tag.string, tag.span()
    around = text[max(0, start - 3) : start] + "\0" + text[end : end + 12]
    return tag.lastgroup == "spoken" or bool(patterns()["spoken_of"].search(around))


def without_thoughts(text: str) -> str:
    """What is said after thoughts, up to the first token that ends an answer."""
    said, at, thinks = "", 0, False
    for tag in patterns()["tag"].finditer(text):
        kind = tag.lastgroup
        if is_spoken_of(tag) and not (thinks and kind == "closes"):
            continue
        piece, at = text[at : tag.start()], tag.end()
        if not thinks and (said or piece.strip()):
            said += piece
        if kind == "ends" and said and not thinks:
            return said
        if kind == "closes" and not thinks:
            said = ""
        thinks = kind == "opens" or (thinks and kind != "closes")
    return said + ("" if thinks else text[at:])


def meaning(mark: re.Match[str]) -> str:
    """What an entity or a tag of HTML stands for."""
    if mark[0].startswith("&"):
        return html.unescape(mark[0]).replace("\xa0", " ")
    return mark[0] if is_spoken_of(mark) else "\n" if mark["breaks"] else ""


def from_json(text: str) -> str:
    """The description in an answer that is JSON, or is escaped as in JSON; else as it is."""
    if re.match(r'(?:\[\s*)?\{\s*"', text) and (fields := patterns()["json_field"].findall(text)):
        text = said = max(fields, key=lambda one: ("descri" in one[0].lower(), len(one[1])))[1]
    else:
        said = text if "\n" not in text and patterns()["escaped"].match(text) else ""
    quoted = re.sub(r'(?<!\\)"', r"\"", said.replace("\\'", "'"))
    with suppress(ValueError):
        return json.loads(f'"{quoted}"', strict=False) or text
    return text


def clean(text: str) -> str:
    """What a model said, as a description: nothing but what it says of the picture."""
    places = toml("patterns.toml")["places"] | {"html": meaning}
    for _ in range(5):  # as one thing is wrapped into another
        before, text = text, from_json(without_thoughts(text))
        for name, place in places.items():
            text = patterns()[name].sub(place, text)
        text = (text[:-600] + patterns()["offer"].sub("", text[-600:])).strip()  # as Immich does
        if text == before:
            break
    return text


def repeats(text: str) -> bool:
    """Whether a text, as far as it was said, is one thing again and again, or counts on and on."""
    # what follows a sample of its words is held against what follows the next such words
    words = re.sub(r"[\W_]+", " ", text[-20_000:].lower())
    for said, times in ((words, 1), (re.sub(r"\d+", "0", words), 4)):
        for at in range(0, len(said) - 30, 23):
            again = said.find(said[at : at + 24], at + 1, at + 1024)
            period = again - at
            length = times * (30 + min(10 * period, 200 + 3 * period))
            piece = said[again : again + length]
            again_and_again = period > 0 and len(piece) == length and said.startswith(piece, at)
            if again_and_again and re.search(r"[^\W\d]", piece):
                return True
    return False


def refusal(text: str) -> str:
    """Why a text in which a model speaks only of itself and its user is none, as a key, or ""."""
    known = patterns()
    said = known["quotation"].sub("", text[:2000])
    reason = known["refusal"].match(said)
    more = [one for one in known["clause_end"].split(said) if known["describes"].search(one)]
    if not reason or len(text) >= 2000 or sum(map(len, more)) > 15:
        return ""
    return "answer_declined" if reason["declined"] else "answer_no_picture"


def is_foreign(text: str, language: str) -> bool:
    """Whether a text is mainly in scripts that a language does not use, but for quotations."""
    scripts, letters = dig_list(toml("languages.toml"), language, "scripts"), Counter[bool]()
    said = unicodedata.normalize("NFKC", patterns()["quotation"].sub("", text))
    for letter in filter(str.isalpha, said):
        script = re.split("[ -]", unicodedata.name(letter, ""))[0]
        # a wide one, such as a Chinese one, says as much as some of an alphabet
        letters[script in scripts] += 2 if unicodedata.east_asian_width(letter) == "W" else 1
    few = 0 if "LATIN" in scripts else 10  # names and brands are written in Latin everywhere
    return bool(scripts) and letters[False] > max(few, letters[True])


def description_in(answer: str, language: str = "") -> str:
    """The description in a model's answer; Retryable if there is none."""
    text = clean(answer)
    # no bare number: Immich would store 1.50 as 1.5
    if not any(c.isalpha() for c in text) or patterns()["nothing"].match(text):
        raise Retryable("answer_empty")
    if why := ("answer_repeats" if repeats(text) else refusal(text)):
        raise Retryable(why)
    if language and is_foreign(text, language):
        raise Retryable("answer_foreign", language=language)
    return text


# ------------------------------------------------------------------------------
# 5 Wire: only it handles exceptions of requests, psycopg2 and PyAV. It says who is to blame.

CONNECT_TIMEOUT = 10.0
LONGEST_TIMEOUT = 2e6  # sockets count milliseconds in 31 bits
# Names of this machine.
LOOPBACK = r"(.*\.|ip6-)?localhost(\.localdomain)?\.?|(::ffff:)?127\.[\d.]+|0\.0\.0\.0|::1?"
JSON_BODY = {"Content-Type": "application/json"}  # for JSON that we encode ourselves
REPLY_LIMIT = 64 * 2**20  # bytes; a page of 1,000 photos is about 1.3 MB
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,asf,flv,mxf,ogg"  # FFmpeg's names of containers
PIECE = 200_000  # bytes of a remote file
LEAST_PIECES, MOST_PIECES = 10, 60  # of it, at most; between them, a twentieth of the file


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response whose body has been read."""

    url: str  # without user, password and query
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body parsed as JSON; Retryable if it is anything else, such as a proxy's page."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise Retryable("not_json", url=self.url) from error


def words_in(said: object) -> str:
    """The error message in a JSON value; Ollama nests more JSON in a string."""
    if isinstance(said, str):
        with suppress(ValueError, RecursionError):
            inner = json.loads(said)
            return said if isinstance(inner, int | float) else words_in(inner)
        return said
    if isinstance(said, list):
        return "; ".join(words_in(one) or str(one) for one in said)
    if isinstance(said, dict):
        places = ("message", "error", "detail", "errors")  # `error` may be only the status
        return next(filter(None, (words_in(said.get(place)) for place in places)), "")
    return str(said or "")


class Session(requests.Session):
    """One worker's session. It keeps no cookies, as a stale one would override the API key."""

    def __init__(self, headers: Iterable[Header] = (), direct: str = LOOPBACK) -> None:
        super().__init__()
        self._direct = direct  # names of servers to which no request goes through a proxy
        self.trust_env = False  # .netrc would override a key, and looking it up is slow
        self._settings: dict[str, Any] = {}
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self.headers["User-Agent"] = f"immich-analyze/{__version__}"
        self.headers.update(headers)
        if "Authorization" in self.headers:
            self.auth = lambda request: request  # else a user name in the URL would override it

    def merge_environment_settings(self, url: Any, *given: Any) -> Any:
        """The proxy and certificates that the environment names, looked up once per server."""
        # requests would search all variables each time, which takes longer than all the rest
        server = "/".join(str(url).split("/", 3)[:3])
        if server not in self._settings:
            self._settings[server] = requests.Session().merge_environment_settings(url, *given)
            if re.fullmatch(self._direct, urlsplit(str(url)).hostname or ""):
                self._settings[server]["proxies"] = {"no_proxy": "*"}
        return self._settings[server]

    def shown(self, url: str) -> str:
        """The URL without secrets, and the proxy that requests to it go through."""
        with suppress(ValueError):
            proxies = self.merge_environment_settings(url, {}, True, None, None)["proxies"]
            if proxy := requests.utils.select_proxy(url, proxies):
                return t("through_proxy", url=public(url), proxy=proxy.rpartition("@")[2])
        return public(url)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Follow only Immich's own redirects to a full-size picture."""
        # any other could turn a POST into a GET, or send the key to another server
        target = resp.headers.get("Location", "")
        return target if re.match(r"(original|thumbnail)\?", target) else None


def http(
    session: Session,
    method: str,
    url: str,
    *,
    server: str,
    timeout: float,
    limit: int = REPLY_LIMIT,
    watch: Callable[[bytes], None] | None = None,
    **options: Any,
) -> Reply:
    """Send one request and read the response; `server` is a table of verdicts.toml."""
    # `watch` gets the body of a successful response piece by piece; if it raises, the connection is
    # closed, so that the server stops, too
    shown, body = session.shown(url), bytearray()
    limits = (min(timeout, CONNECT_TIMEOUT), min(timeout, LONGEST_TIMEOUT))
    try:
        with session.request(method, url, timeout=limits, stream=True, **options) as response:
            # without chunked encoding, a piece is only delivered once it is full
            for piece in response.iter_content(2**10 if watch else 2**20):
                body += piece
                if len(body) > limit:
                    raise Retryable("reply_too_large", url=shown)
                if watch and response.ok:
                    watch(piece)
            reply = Reply(shown, response.status_code, response.headers, bytes(body))
    except (OSError, ValueError) as error:  # all that requests and urllib3 raise
        told = f"{'silent' if watch and not body else 'heard'} {type(error).__name__} {error}"
        fields = {"url": shown, "value": shown, "seconds": f"{timeout:g}"}
        raise verdict("connection", told, why=innermost(error), **fields) from error
    if 200 <= reply.status < 300:
        return reply
    if 300 <= reply.status < 400:
        location = reply.headers.get("Location", "")
        kept = urlsplit(public(location)).path.endswith(urlsplit(url).path)
        told = f"{'kept' if kept else 'other'} {location}"
        raise verdict("redirect", told, url=shown, target=public(location), why="")
    raise http_error(server, reply)


def innermost(error: BaseException) -> str:
    """The root cause of a chain of exceptions, in the system's words."""
    seen = [error]
    while (inner := seen[-1].__cause__ or seen[-1].__context__) and inner not in seen:
        seen.append(inner)
    reasons = [getattr(e, "verify_message", getattr(e, "strerror", None)) for e in reversed(seen)]
    reasons += [str(e) for e in seen if type(e) is OSError]  # from a proxy that refuses the tunnel
    return next((reason for reason in reasons if isinstance(reason, str)), type(error).__name__)


def http_error(server: str, reply: Reply) -> AnalyzeError:
    """The error for a status, or for an error message in a response of status 200."""
    words = reply.body.decode("utf-8", "replace")
    why = one_line(words_in(words[:4000].strip()))[:300]
    why = "" if why.startswith("<") else why  # a page says nothing that people can read
    fields = {"url": reply.url, "status": reply.status, "why": why, "words": words}
    fields["said"] = f" “{why}”" if why else ""
    error = verdict(server, f"{reply.status} {why}\n{words}", **fields)
    with suppress(InvalidHeader, ValueError, OverflowError):  # neither seconds nor a date
        asked = Retry().parse_retry_after(reply.headers.get("Retry-After", ""))
        error.pause = min(max(asked, 1.0), 3600.0) if isinstance(error, Unavailable) else 0.0
    return error


class RemoteFile:
    """A file on a server, to be read as any other; `fetch` gets one of its pieces by number.

    Each piece is fetched once; Permanent once too many were. After an error, it is at its end.
    """

    def __init__(self, fetch: Callable[[int], Reply]) -> None:
        first, self._fetch, self._at = fetch(0), fetch, 0
        self._pieces = {0: first.body}
        size = first.headers.get("Content-Range", "").rpartition("/")[2]
        self._size = int(size[:15]) if size.isdecimal() else len(first.body)
        self._most = min(max(LEAST_PIECES, self._size // 20 // PIECE), MOST_PIECES)

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        number, start = divmod(self._at, PIECE)
        if number not in self._pieces and self._at < self._size:
            end, self._size = self._size, 0  # PyAV prints all errors but the last
            if len(self._pieces) == self._most:
                raise Permanent("video_scattered")
            self._pieces[number] = self._fetch(number).body
            self._size = end
        data = self._pieces.get(number, b"")[start : start + size]
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go on elsewhere; returns where."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Where it is read next."""
        return self._at


def frame_picture(scaler: Any, aspect: float, side: int, frame: Any) -> Image.Image | None:
    """A frame, if any, as people see it, no longer than `side`; `aspect` is that of a pixel."""
    if not frame:
        return None
    scale = min(1.0, side / max(frame.width * aspect, frame.height))
    width, height = (max(1, round(scale * n)) for n in (frame.width * aspect, frame.height))
    colours = SRGB if frame.color_trc in HDR else {}  # else grey; a scaler needs seconds, once
    image: Image.Image = scaler.reformat(frame, width, height, "rgb24", **colours).to_image()
    return image.rotate(frame.rotation, expand=True)


def is_dull(image: Image.Image, others: Iterable[Image.Image]) -> bool:
    """Whether a frame is black, or nearly the same as one of the others."""
    few = [one.resize((16, 16), Image.Resampling.BOX) for one in (image, *others)]
    changes = [ImageStat.Stat(ImageChops.difference(few[0], other)).mean for other in few[1:]]
    return max(few[0].convert("L").tobytes()) < DARK or any(max(one) < MOVES for one in changes)


def seconds_until(end: float) -> float:
    """The seconds until a monotonic time; Retryable once it is over."""
    if (left := end - time.monotonic()) <= 0:
        raise Retryable("video_slow")
    return left


def frame_at(stream: Any, at: float, early: float, end: float) -> Any:
    """The frame at a time, or a key frame that is not too early; else the last one, if any."""
    frame, start = None, stream.start_time or 0
    stream.container.seek(start + int(at / stream.time_base), stream=stream)  # to a key frame
    for packet in stream.container.demux(stream):
        seconds_until(end)
        for frame in packet.decode():
            if frame.time is None or frame.time - start * stream.time_base >= at - early:
                return frame
    return frame


def frames_of(files: Iterable[Any], count: int, side: int, end: float) -> tuple[list[bytes], float]:
    """Frames of a video as JPEGs, out of the first file that has some, and the seconds it lasts.

    They are spread over it without its first and last second, and dull ones give way to later
    ones. By the monotonic time `end`, what was found is enough. Unavailable if the server is away.
    """
    import av  # here, as it is an extra, and would slow down every start
    from av.video.reformatter import VideoReformatter

    trouble: AnalyzeError = Missing("video_missing")
    lax = {"metadata_errors": "ignore"} if av.__version__.startswith("18.") else {}  # 19 does so
    options: Any = lax | {"container_options": {"format_whitelist": VIDEO_FORMATS}}  # no playlists
    for file in files:
        found, seconds, trouble = list[Image.Image](), 0.0, Permanent("video_blank")
        try:
            with av.open(file, **options) as container:
                stream: Any = container.streams.best("video")
                if not (stream and stream.codec_context):  # FFmpeg does not know its kind
                    continue
                stream.codec_context.thread_count = 1  # each would keep frames in memory
                seconds = float(container.duration or 0) / av.time_base
                edge = 1.0 if seconds > 3 else 0.0
                step, aspect = (seconds - 2 * edge) / count, float(stream.sample_aspect_ratio or 1)
                look = functools.partial(frame_picture, VideoReformatter(), aspect, side)
                for part in range(count):
                    times = ((edge + step * (part + at), step * gap) for at, gap in LOOKS.items())
                    looks = (look(frame_at(stream, *time, end)) for time in times)  # one at a time
                    found += next(([one] for one in looks if one and not is_dull(one, found)), [])
        except (Retryable, Permanent) as error:
            trouble = error
        except (av.FFmpegError, ArithmeticError, LookupError, OSError, ValueError) as error:
            trouble = Permanent("video_unreadable", why=getattr(error, "strerror", None) or error)
        if found and not isinstance(trouble, Unavailable):
            return [jpeg(image) for image in found], seconds
    raise trouble


@contextmanager
def sql() -> Iterator[None]:
    """Turn psycopg2's exceptions into our errors."""
    try:
        yield
    except (psycopg2.Error, UnicodeDecodeError) as error:
        why = re.sub(r"\s*Is the server running[^?]*\?", "", " ".join(str(error).split()))
        words = re.sub(r'"[^"]*"', "", why)  # names may contain any word
        told = f"{getattr(error, 'pgcode', None) or type(error).__name__} {words}"
        raise verdict("database", told, why=why) from error


def postgres_url(url: str) -> str:
    """Check a connection string here, as an error message of libpq could quote the password."""
    try:
        for immichs, libpqs in toml("settings.toml")["postgres_url"].items():
            url = re.sub(immichs, libpqs, url)
        parts = psycopg2.extensions.parse_dsn(url)
    except (psycopg2.ProgrammingError, ValueError) as error:  # ValueError: not UTF-8
        named = re.search(r'invalid (?:connection|URI query) \w+:? "([a-z_]+)"', str(error), re.I)
        unknown = named[1] if named and "@" not in url.rpartition(named[1])[2] else ""
        shown = t("unknown_keyword", keyword=unknown) if unknown else ""  # never part of a password
        raise Fatal("bad_postgres_url", unknown=shown) from error
    ports = str(parts.get("port", "")).replace(",", "")
    if "@" in parts.get("host", "") + parts.get("dbname", "") or not (ports or "1").isdecimal():
        raise Fatal("bad_postgres_url", unknown="")
    return url


# ------------------------------------------------------------------------------
# 6 AI: who describes. Knows nothing of Immich.

ANSWER_LIMIT = 4 * 2**20  # bytes, and for long answers
TOKEN_LIMIT = 2**10  # bytes a token, with all that a server says with it
LEAST_CONTEXT = 256  # tokens
CONTEXT_STEP = 4096  # a server reloads its model for each other size
LEAD_IN = 100  # tokens that a model may say before its answer
CHECK_STEP = 400  # characters between two looks at an answer that is being made
CHECK_TIMEOUT = 15.0
PICTURE_TRIES = 3  # of one photo, at hosts that are well
STRUCK_OFF = 3600.0  # seconds until a host that needs a person is asked again
PROBE_INTERVAL = 0.5  # seconds between two probes of a host, while no host is available
PROBE_TIMEOUT = 1.0
GROWTH = 16  # answers until a host with a queue gets one request more; its parts add up exactly
QUIET = 600.0  # seconds between two lines about a host that is unavailable for moments
TEXTS = 1000  # answers of a host that are remembered
TIMED_OUT = ("timed_out", "timed_out_reading")
SEES, BLIND = 0, -1  # in Host.texts: no hash of a picture, but what a plain one showed
CUT = ("answer_cut", "context_full")
REFUSALS = ("picture_refused", "host_failed", "connection_cut")
PICTURE = "immich-analyze puts a picture here"  # stands for it in a question
WHOLE = ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "load")  # no cut answers


def first(data: object, names: Iterable[str], kind: type = object) -> Any:
    """What JSON has under the first of these names that is anything of this kind, or None."""
    found = (dig(data, name) for name in names)
    return next((one for one in found if one and isinstance(one, kind)), None)


def text_of(found: object) -> str:
    """A text, or those of the parts that it comes in."""
    if isinstance(found, list):
        return "".join(map(text_of, found))
    text = dig(found, "text") if isinstance(found, dict) else found
    return text if isinstance(text, str) else ""


@dataclass(frozen=True)
class Dialect:
    """How a host is asked, by dialects.toml, and what it tells of the model."""

    config: Config
    server: dict[str, Any]  # what dialects.toml says of this kind
    refused: frozenset[str] = frozenset()  # parts of a question, as the host told
    one_picture: bool = False  # whether it takes no more at a time

    def body(self, asked: Question) -> bytes:
        """A question as JSON, without what the host refused."""
        shown = asked.pictures
        if self.one_picture and len(shown) > 1:
            shown = (sheet(shown, self.config.max_image_size or FRAME_SIDE),)
        pictures = {f"<{PICTURE} {n}>": one for n, one in enumerate(shown)}
        said = {"text": asked.text, "pictures": [*pictures], "refused": self.refused}
        rest = json.loads(template(self.server["question"]).render(said, config=self.config))
        question = self.server["thinks" if self.config.think else "thinks_not"] | rest
        question = {name: part for name, part in question.items() if name not in self.refused}
        body = json.dumps(question).encode()
        for mark, picture in pictures.items():  # JSON's encoder would take a millisecond for it
            body = body.replace(mark.encode(), picture.base64)
        return body

    def sees(self, ask: Callable[..., Reply]) -> bool | None:
        """Whether the model takes pictures, where the server tells; an error if it is not there."""
        model = self.config.model_name
        if "show" not in self.server:
            return self._listed(ask)
        try:
            shown = ask("POST", self.server["show"], json={"model": model}).json()
        except Fatal as error:
            if error.key == "model_missing":
                with suppress(AnalyzeError):
                    rows = dig_list(ask("GET", "/api/tags").json(), "models")
                    error.fields["why"] += nearest(model, [str(dig(row, "name")) for row in rows])
            raise
        capabilities = dig(shown, "capabilities")  # older releases tell none
        return "vision" in capabilities if isinstance(capabilities, list) else None

    def _listed(self, ask: Callable[..., Reply]) -> bool | None:
        """GET /v1/models lists the models; llama.cpp answers by any name if it serves one.

        Only llama.cpp tells whether a model can see: `input_modalities`, in older builds
        `modalities` of GET /props. Ollama lists names with their tag, llama-swap no aliases.
        """
        model, listed = self.config.model_name, dig_list(ask("GET", "/v1/models").json(), "data")
        models = {str(dig(entry, "id")).removesuffix(":latest"): entry for entry in listed}
        for entry in listed:
            names = dig_list(entry, "aliases") + dig_list(entry, "meta", "llamaswap", "aliases")
            models |= {n: entry for n in names if isinstance(n, str) and n not in models}
        alone = len(listed) == 1 and dig(listed, 0, "owned_by") == "llamacpp"
        known = dig(listed, 0) if alone else models.get(model.removesuffix(":latest"))
        if models and not known:
            some = ", ".join(sorted(models)[:10]) + nearest(model, models)
            raise Retryable("model_not_listed", model=model, models=some)
        modalities = dig(known, "architecture", "input_modalities")
        if isinstance(modalities, list):
            return "image" in modalities
        vision = dig(ask("GET", "/props").json(), "modalities", "vision") if alone else None
        return vision if isinstance(vision, bool) else None

    def adapted(self, error: AnalyzeError, asked: Question) -> Dialect:
        """How else to ask, by what a host said; re-raises the error if there is no other way."""
        config, known, lacks = self.config, patterns(), lacks_context(error)
        several = len(asked.pictures) > 1 and not self.one_picture
        if lacks and not several:
            told = known["prompt_tokens"].search(error.words)
            prompt = int(told[1]) if told else error.fields.get("prompt", 0)
            tokens = -(-(prompt + config.max_tokens) // CONTEXT_STEP) * CONTEXT_STEP
            if not (self.server["takes_context"] and prompt and tokens > config.context_length):
                raise error
            return replace(self, config=replace(config, context_length=tokens))
        refused = set() if lacks else set(known["refusable"].findall(error.words))
        if not refused and known["thinking"].search(error.words):
            refused = set(self.server["thinks_not"])
        if not refused <= self.refused:
            return replace(self, refused=self.refused | refused)
        if several and (lacks or error.key in REFUSALS):
            return replace(self, one_picture=True)
        raise error


def nearest(model: str, names: Iterable[str]) -> str:
    """The most similar name, tags aside, to add to a message; "" if none is similar."""
    by_base = {name.lower().partition(":")[0]: name for name in names}
    found = difflib.get_close_matches(model.lower().partition(":")[0], by_base, 1)
    return t("nearest_name", name=by_base[found[0]]) if found else ""


def lacks_context(error: AnalyzeError) -> bool:
    """Whether a host says that picture, prompt and answer do not fit into its context."""
    return error.key == "context_full" or bool(patterns()["no_context"].search(error.words))


@dataclass(slots=True)
class Host:
    """What is known of one model host. Its requests have numbers, to tell which came first."""

    url: str = field(repr=False)
    why: AnalyzeError | None = None  # the trouble; None since it described a picture
    since: float = math.inf  # when that began
    failed: int = 0  # the latest request to any host then
    pause: float = 0.0  # seconds that it was unavailable for the last time
    unavailable_until: float = 0.0
    told_at: float = -math.inf  # when people were last told of a trouble
    probed_at: float = -math.inf
    gone: bool = False  # whether the latest probe found nothing
    texts: dict[str, int] = field(default_factory=dict)  # what it said of pictures, by hash
    in_flight: int = 0
    most: float = math.inf  # requests at a time, once it was found to queue them
    latest: int = 0  # its latest request
    begun: int = 0  # the latest request that it said something to, and when it last did
    heard_at: float = -math.inf
    answered: int = 0  # the latest request that it answered with a description
    requests: int = 0  # that ended, and the seconds they took, all together
    seconds: float = 0.0

    @property
    def struck_off(self) -> bool:
        """Whether a person must act: it refuses the key, lacks the model, or cannot see."""
        return isinstance(self.why, Fatal) and not isinstance(self.why, Unexpected)

    @property
    def absent(self) -> bool:
        """Whether nothing answers there: a request that costs nothing tells when it is back."""
        why = self.why
        return why is not None and (why.key == "unreachable" or why.fields.get("status") == 502)

    @property
    def full(self) -> bool:
        """Whether it has all the requests it may have: one after it hung or was struck off."""
        tried = self.struck_off or (self.why and self.why.key in TIMED_OUT)
        return self.in_flight + 1 > (1 if tried else self.most)

    def wait(self, now: float) -> float:
        """Seconds until it is available."""
        return max(self.unavailable_until - now, 0.0)


@dataclass(eq=False, repr=False)
class Hosts:
    """The host rotation, shared by all workers.

    The next host is the one with the fewest of our requests in flight, the longest unused
    among equals: equal hosts get equal work, and a fast one gets more. A host in trouble is
    unavailable for 1, 2, 4 ... seconds; one that needs a person, for an hour.
    """

    urls: Sequence[str]
    places: int  # for requests at a time
    longest_pause: float
    wait_timeout: float = math.inf  # how long no host may be usable
    lasts: bool = False  # hosts that need a person are waited for, too

    def __post_init__(self) -> None:
        self._lock = threading.Condition()  # told when a request ends
        self._places = threading.BoundedSemaphore(self.places)
        self._testing = threading.Lock()
        self._hosts, self._latest = {url: Host(url) for url in self.urls}, 0
        self.retrying = threading.Lock()  # held by the worker that asks about a photo again
        self.moved = time.monotonic()  # when a request last began or ended
        self.dialects: dict[str, Dialect] = {}  # of hosts that refused the usual question

    @contextmanager
    def place(
        self, stop: threading.Event, avoid: Container[str], probe: Callable[[str], bool]
    ) -> Iterator[tuple[str, int]]:
        """Hold a place for a request: which host to ask, one of `avoid` last, and its number.

        Waits for an available host, and meanwhile calls `probe` for those that are absent.
        Raises Stopped; Fatal if no host was usable for too long, or all need a person.
        """
        with self._places:
            if stop.is_set():
                raise Stopped("stopped")
            while not (picked := self._pick(avoid)):
                if stop.wait(self._wait()):
                    raise Stopped("stopped")
                self._look_for_absent(probe)
            host, number = picked
            began = self.moved = time.monotonic()
            try:
                yield host.url, number
            finally:
                with self._lock:
                    self._lock.notify_all()
                    self.moved = time.monotonic()
                    host.in_flight -= 1
                    host.requests += 1
                    host.seconds += self.moved - began

    def _pick(self, avoid: Container[str]) -> tuple[Host, int] | None:
        """The host to ask next, and the request's number; None while no host is available."""
        with self._lock:
            now = time.monotonic()
            hosts = [h for h in self._hosts.values() if not h.wait(now) and not h.full]
            if not hosts:
                return None
            host = min(hosts, key=lambda host: (host.url in avoid, host.in_flight, host.latest))
            host.in_flight += 1
            return host, self.number(host.url)

    def _wait(self) -> float:
        """Seconds until a host may be available; Fatal where none is worth waiting for."""
        with self._lock:
            self._check_last()
            now, hosts = time.monotonic(), self._hosts.values()
            left = max(host.since for host in hosts) + self.wait_timeout - now
            if left <= 0:
                raise Fatal("no_host", why="; ".join(str(host.why) for host in hosts))
            waits = [host.wait(now) for host in hosts if not host.full]
            waits += [PROBE_INTERVAL for host in hosts if host.absent]
            seconds = min([left, *waits])
            if not any(host.full for host in hosts):
                return seconds
            self._lock.wait(min(seconds, threading.TIMEOUT_MAX))  # until a request ends
            return 0.0

    def _check_last(self) -> None:
        """Fatal if all hosts need a person, unless that is outlasted."""
        whys = [host.why for host in self._hosts.values() if host.why and host.struck_off]
        if len(whys) == len(self._hosts) and not self.lasts:
            raise whys[-1].as_kind(Fatal)

    def _look_for_absent(self, probe: Callable[[str], bool]) -> None:
        """Probe the absent host that was not probed for longest: one that came is available."""
        with self._lock:
            now = time.monotonic()
            absent = [host for host in self._hosts.values() if host.absent]
            host = min(absent, key=lambda host: host.probed_at, default=None)
            if not host or host.probed_at > now - PROBE_INTERVAL:
                return
            host.probed_at = now
        before, host.gone = host.gone, not probe(host.url)
        if before and not host.gone:
            host.unavailable_until = 0.0

    def number(self, url: str) -> int:
        """The next number: of a request outside the rotation, or of a failure."""
        with self._lock:
            self._latest += 1
            self._hosts[url].latest = self._latest
            return self._latest

    def unavailable(self, url: str, error: AnalyzeError) -> None:
        """Leave a host out for a time, and tell people once. Fatal if it was the last."""
        with self._lock:
            host, now = self._hosts[url], time.monotonic()
            again = host.why and lacks_context(host.why) and lacks_context(error)
            if again and not host.answered and host.in_flight <= 1:  # it is no single panorama's
                error = Fatal("context_small", url=public(url), why=error)
            if host.why is None:
                host.since, host.failed, host.gone = now, self._latest, True
            known = host.struck_off
            if now >= host.unavailable_until:  # else it is one more request of the same moment
                host.why = error
                host.pause = min(max(1.0, 2 * host.pause), self.longest_pause)
            seconds = STRUCK_OFF if host.struck_off else error.pause or host.pause
            host.unavailable_until = max(host.unavailable_until, now + seconds)
            self._check_last()
            # one that asks for a moment may do so again and again
            lately = host.told_at >= host.since or now < host.told_at + QUIET
            told = known if host.struck_off else lately
            host.told_at = host.told_at if told else now
            say = log.error if host.struck_off else log.warning
            key = "host_struck_off" if host.struck_off else "host_unavailable"
        if not told:
            say("%s", t(key, why=error, url=public(url), seconds=f"{seconds:g}"))

    def answered(self, url: str, number: int) -> None:
        """Note that a host answered a request with a description, and so is well."""
        with self._lock:
            host = self._hosts[url]
            host.answered = max(host.answered, number)
            host.most += 1 / GROWTH
            if host.why is None or number <= host.failed:
                return  # an answer to a question of before is no recovery
            told = host.told_at >= host.since
            host.why, host.since, host.pause, host.unavailable_until = None, math.inf, 0.0, 0.0
        if told:
            log.info("%s", t("host_back", url=public(url)))

    def heard(self, url: str, number: int) -> None:
        """Note that a host works on a request."""
        host = self._hosts[url]
        host.begun = max(host.begun, number)
        self.moved = host.heard_at = time.monotonic()

    def answered_since(self, url: str, number: int) -> bool:
        """Whether a host described a picture that it was asked about after this request."""
        return self._hosts[url].answered > number

    def queued(self, url: str, number: int, seconds: float) -> bool:
        """Whether a request found no room beside others at its host, which then gets fewer.

        It was refused at once, or got no word in so many seconds, in which the host worked on
        earlier requests, and on no later one.
        """
        with self._lock:
            host = self._hosts[url]
            listened = host.begun <= number and host.heard_at > time.monotonic() - seconds
            if host.most < 2 or not (listened if seconds else host.in_flight > 1):
                # one that refuses a single request lacks no room
                host.most = host.most if seconds else math.inf
                return False
            host.most = max(1, min(host.most, host.in_flight) - 1)
        log.debug("%s has too many requests: %d at a time", public(url), host.most)
        return True

    def sees(self, url: str, text: str, shown: object, test: Callable[[], bool]) -> bool:
        """Whether a host looks at what is shown; once it says the same of two, `test` tells."""
        texts, key, one = self._hosts[url].texts, text_id(text), hash(shown)
        with self._lock:
            known = texts.setdefault(key, one)
            if len(texts) > TEXTS:
                del texts[next(iter(texts))]
        if known not in (one, SEES, BLIND):
            with self._testing:  # one test for each text
                if texts.get(key) == known:
                    texts[key] = SEES if test() else BLIND
        return texts.get(key) != BLIND

    def seen(self) -> list[Host]:
        """The hosts as they are now: copies to look at."""
        with self._lock:
            return [replace(host) for host in self._hosts.values()]


class Tries:
    """What one photo met at the hosts, and who is to blame for it; only its worker knows.

    A failure counts against the photo once its host is shown to be well: it described another
    picture since.
    """

    def __init__(self, hosts: Hosts, config: Config) -> None:
        self.error: AnalyzeError = Stopped("stopped")  # of the latest failure
        self.failed: set[str] = set()  # hosts
        self.alone = False  # whether it is asked about when no other such photo is
        self._hosts, self._timeout = hosts, config.timeout
        self._waits = config.max_retries or math.inf  # that are left
        self._most = min(PICTURE_TRIES, self._waits + 1)
        self._counted = 0.0  # tries
        # by host, the request after which it must answer another one, and the tries that count then
        self._open: dict[str, tuple[int, float]] = {}

    def blame(self, url: str, number: int, error: AnalyzeError) -> None:
        """Note that request `number`, about the photo, failed.

        A host is unavailable if it says that it is away or has too much to do, or is silent to
        all. Of all else, its next answer tells whose fault it is.
        """
        status = error.fields.get("status")
        busy, timed_out = status in (429, 503), error.key in TIMED_OUT
        seconds = 0.0 if busy else self._timeout
        if (busy or error.key == "timed_out") and self._hosts.queued(url, number, seconds):
            if error.pause:
                self._hosts.unavailable(url, error)
            # no try, unless it is refused alone too: then it was the picture's fault
            if busy and not self.enough(1):
                self._counted += 1
        else:
            of_host = error.key in ("unreachable", "model_says_the_same")  # whatever it is shown
            silent = timed_out and not self._hosts.answered_since(url, number)
            if of_host or silent or isinstance(error, Unavailable):
                self._wait_for(url, error)
            if of_host:
                return
            # one that refuses the photo again lives; else it may have died meanwhile
            lives = url in self.failed and error.key == "picture_refused"
            tries = 0.25 if status == 429 else 1.0  # mostly it is the others'
            tries = self._most if error.key in CUT else tries  # it would be cut again
            self._open[url] = (-1 if lives else self._hosts.number(url), tries)
        self.alone = self.alone or bool(self.failed) or not timed_out  # one is no reason yet
        self.failed.add(url)
        self.error = error

    def excuse(self, url: str, error: AnalyzeError) -> None:
        """Note that a host fails on a plain picture too; an outage counts once at all hosts."""
        if url in self._open:
            number, tries = self._open.pop(url)
            elsewhere = any(tries for _, tries in self._open.values())
            self._open[url] = (number, 0.0 if elsewhere else min(tries, 1.0))
        self._wait_for(url, error)

    def _wait_for(self, url: str, error: AnalyzeError) -> None:
        """Leave a host out for a time; Unavailable once that was often enough."""
        self._hosts.unavailable(url, error)
        self._waits -= 1
        if self._waits < 0:
            raise error.as_kind(Unavailable)

    def enough(self, more: int = 0) -> bool:
        """Whether the failures would be enough, with `more` of them and if all counted."""
        return self._counted + sum(tries for _, tries in self._open.values()) + more >= self._most

    def judge(self) -> bool:
        """Count the failures whose hosts are well by now; whether those are enough."""
        for url, (number, tries) in [*self._open.items()]:
            if self._hosts.answered_since(url, number):
                self._counted += tries
                del self._open[url]
        return self._counted >= self._most

    def doubtful(self, url: str) -> set[str]:
        """The hosts to be shown a plain picture before `url` is asked about the photo (again)."""
        self.judge()
        now = time.monotonic()
        available = {host.url: host.why for host in self._hosts.seen() if not host.wait(now)}
        why = available.get(url)
        sick = {url} if why and not isinstance(why, Unavailable) else set()
        return (self._open.keys() | sick) & available.keys()


class Answer:
    """A host's answer, put together while it comes: one JSON object, lines of them, or events.

    What is wrong with it is raised as soon as it shows, so that the host stops making it.
    """

    def __init__(self, url: str, config: Config, heard: Callable[[], None]) -> None:
        self._url, self._config, self._tell = public(url), config, heard
        self._unread = bytearray()  # a line whose end is still to come
        self._text = ""
        self._finish: str | None = None  # why it ended; None until the host says that it did
        self._tokens = self._prompt = 0  # tokens of answer and prompt, where the host tells
        self._objects = self._pieces = 0  # JSON objects, and those of them with a token
        self._streamed = False
        self._began = self._heard = time.monotonic()

    def listen(self, data: bytes) -> None:
        """Take what came, as far as its lines are whole."""
        pieces = self._pieces
        self._unread += data
        if b"\n" in data:
            lines, _, self._unread = self._unread.rpartition(b"\n")
            self._take_lines(lines)
        if self._pieces > pieces:
            self._heard = time.monotonic()
            self._tell()
        elif time.monotonic() > self._heard + self._config.timeout:  # only a proxy says "wait"
            raise Retryable("timed_out", url=self._url, seconds=f"{self._config.timeout:g}")

    def _take_lines(self, lines: bytearray) -> None:
        for line in bytes(lines).removeprefix(BOM_UTF8).splitlines():
            kind, _, event = line.partition(b":")
            is_event = kind in (b"data", b"error")
            text = event.strip() if is_event else line
            self._streamed |= is_event
            try:
                said = json.loads(text.decode("utf-8", "replace"), strict=False)
            except (ValueError, RecursionError) as error:
                if text == b"[DONE]":
                    self._finish = self._finish or ""
                elif is_event and text:  # else it is a comment, or a line of one large object
                    raise Retryable("connection_cut", url=self._url) from error
            else:
                self._take({"error": said} if kind == b"error" else said)

    def _take(self, said: Any) -> None:
        """Take an event, a line, or the whole."""
        if isinstance(said, list):
            for one in said:
                self._take(one)
            return
        if dig(said, "error") or dig(said, "object") == "error":
            code = str(dig(said, "error", "code") or dig(said, "code"))
            status = int(code) if re.fullmatch(r"[45]\d\d", code) else 200
            raise http_error("model_host", Reply(self._url, status, {}, json.dumps(said).encode()))
        choice, usage = dig(said, "choices", 0) or said, dig(said, "usage") or said
        done, finish = dig(said, "done"), first(choice, ("done_reason", "finish_reason"))
        if finish or done is True:
            self._finish = str(finish or self._finish or "").lower()
        self._tokens = first(usage, ("eval_count", "completion_tokens"), int) or self._tokens
        self._prompt = first(usage, ("prompt_eval_count", "prompt_tokens"), int) or self._prompt
        self._objects += isinstance(said, dict)
        self._streamed |= done is False or self._objects > 1
        message = first(choice, ("delta", "message")) or choice
        text = first(message, ("content", "text"))
        if text or first(message, ("thinking", "reasoning_content", "reasoning")):
            self._add(text_of(text))

    def _add(self, text: str) -> None:
        """Add a token, and raise what shows by now to be wrong with the answer."""
        before = len(self._text)
        self._text += text
        self._pieces += 1
        if self._pieces > self._config.max_tokens:  # which the server ignores
            raise Retryable("answer_cut", tokens=self._config.max_tokens)
        lead_in = max(self._config.max_tokens // 4, LEAD_IN)
        if self._pieces == lead_in and not (self._config.think or clean(self._text)):
            raise Retryable("answer_thinks")
        looks = len(self._text) // CHECK_STEP > before // CHECK_STEP
        if looks and repeats(self._text) and repeats(clean(self._text)):  # it may be end tokens
            raise Retryable("answer_repeats")

    def said(self, reply: Reply) -> Said:
        """The description in it, once all of it is there."""
        self._take_lines(self._unread)
        if not self._objects:
            self._take(reply.json())
        if self._finish in ("length", "max_tokens"):
            raise self._cut()
        if self._finish not in WHOLE and (self._finish or self._streamed):
            raise verdict("ending", self._finish or "", url=self._url, why="")
        text = self._text.encode("utf-16", "surrogatepass")  # a letter may come in two pieces
        language = self._config.description_language
        described = description_in(text.decode("utf-16", "ignore"), language)
        return Said(described, time.monotonic() - self._began, self._tokens or self._pieces)

    def _cut(self) -> Retryable:
        """What cut it: the context, if the host made fewer tokens than it may; else the limit."""
        most, tokens, prompt = self._config.max_tokens, self._tokens, self._prompt
        if not tokens and self._streamed and 2 * self._pieces < most:
            tokens = self._pieces
        if 0 < tokens < most - 1 and not 0 < prompt < LEAST_CONTEXT - tokens:
            return Retryable("context_full", url=self._url, tokens=tokens, prompt=prompt)
        return Retryable("answer_cut", tokens=most)


class Ai:
    """Describes pictures; one for each worker, all on the same Hosts."""

    def __init__(self, config: Config, hosts: Hosts, stop: threading.Event) -> None:
        self._config, self._hosts, self._stop = config, hosts, stop
        kinds = toml("dialects.toml")
        self._dialect = Dialect(config, kinds["llamacpp"] | kinds[config.interface])
        key = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        usual = self._dialect.server["headers"] | key
        self._session = Session([*usual.items(), *config.host_header])
        self.close = self._session.close

    def describe(self, asked: Question, check: Callable[[], None]) -> Said:
        """Have a question answered by a host that is well; waits for one.

        `check` is called just before each request, and may raise. Raises Permanent once the
        photo is to blame, Unavailable after `--max-retries` waits, Fatal when no host is worth
        waiting for, Stopped. Photos that failed are retried one at a time, so that one that kills
        its host does not take the others down with it twice.
        """
        met = Tries(self._hosts, self._config)
        while not met.judge():
            with (
                self._hosts.retrying if met.alone else nullcontext(),
                self._hosts.place(self._stop, met.failed, self._probe) as (url, number),
            ):
                if number == 1:  # else all workers compile them, at the first answers
                    threading.Thread(target=patterns, name="patterns", daemon=True).start()
                check()
                if not (met.doubtful(url) or met.judge()):  # it may count by now
                    try:
                        return self._described(url, asked, number)
                    except AnalyzeError as error:
                        met.blame(url, number, error)
                doubtful = met.doubtful(url)
                away = [host for host in doubtful if self._is_away(host, asked, met)]
            # where no other host is left, others go first; one that is away may soon be back
            again = doubtful and not away and met.failed >= set(self._config.hosts)
            waits = (again or met.enough()) and not met.judge()
            if waits and self._stop.wait(self._config.retry_delay_seconds):
                raise Stopped("stopped")
        raise met.error.as_kind(Permanent)

    def _is_away(self, url: str, asked: Question, met: Tries) -> bool:
        """Show a host plain pictures of the same size; whether it says that it is away."""
        try:
            self._described(url, asked.about("gray"), self._hosts.number(url))
        except AnalyzeError as error:
            if error.key == met.error.key == "answer_no_picture":  # of neither picture
                error = Fatal("model_blind", url=public(url))
            met.excuse(url, error)
            return isinstance(error, Unavailable)
        return False

    def _described(self, url: str, asked: Question, number: int) -> Said:
        """What a host says of a photo; Fatal if it says the same of all."""
        said = self._said(url, asked, number)
        plain = (asked.about(colour, PLAIN_SIZE) for colour in ("gray", "red"))
        differs = (self._said(url, one, number).text != said.text for one in plain)
        if not self._hosts.sees(url, said.text, asked.pictures, lambda: any(differs)):
            raise Fatal("model_says_the_same", url=public(url))
        self._hosts.answered(url, number)
        return said

    def _said(self, url: str, asked: Question, number: int) -> Said:
        """The description in a host's answer, which is asked in another way if it wants that."""
        dialect = self._hosts.dialects.get(url, self._dialect)
        while True:
            body = {"data": dialect.body(asked), "headers": JSON_BODY}
            answer = Answer(url, self._config, functools.partial(self._hosts.heard, url, number))
            log.debug("asking %s", public(url))
            try:
                reply = self._call(url, "POST", dialect.server["chat"], watch=answer.listen, **body)
                said = answer.said(reply)
                if dialect.one_picture:  # only now it is known that it takes no more
                    self._hosts.dialects[url] = dialect
                return said
            except Retryable as error:
                dialect = dialect.adapted(error, asked)
                if not dialect.one_picture:
                    self._hosts.dialects[url] = dialect

    def _probe(self, url: str) -> bool:
        """Whether a host that was absent is back, by a request that costs it nothing."""
        try:
            self._call(url, "GET", self._dialect.server["alive"], timeout=PROBE_TIMEOUT)
        except AnalyzeError as error:  # it may be there, though it says no more
            return not isinstance(error, Retryable) or error.key == "host_failed"
        return True

    def _call(self, url: str, method: str, path: str, **options: Any) -> Reply:
        options["limit"] = max(ANSWER_LIMIT, TOKEN_LIMIT * self._config.max_tokens)
        options.setdefault("timeout", self._config.timeout)
        address = re.sub(f"(?<!/){self._dialect.server['root']}$", "", url) + path
        return http(self._session, method, address, server="model_host", **options)

    def check(self) -> None:
        """Ask all hosts for the model; Unavailable if none is there, Fatal if all need a person."""
        with ThreadPoolExecutor(len(self._config.hosts), "check") as pool:
            jobs = {url: pool.submit(self._trouble, url) for url in self._config.hosts}
        troubles = {url: error for url, job in jobs.items() if (error := job.result())}
        lasting = all(Host(url, why=error).struck_off for url, error in troubles.items())
        if len(troubles) == len(self._config.hosts) and not lasting:
            raise Unavailable("no_host", why="; ".join(map(str, troubles.values())))
        for url, error in troubles.items():
            self._hosts.unavailable(url, error)

    def _trouble(self, url: str) -> AnalyzeError | None:
        """Why a host cannot describe photos, as far as it tells; None for one that is loading."""
        ask = functools.partial(self._call, url, timeout=CHECK_TIMEOUT)
        try:
            if self._dialect.sees(ask) is False:
                return Fatal("model_blind", url=public(url))
        except AnalyzeError as error:
            if error.key == "picture_refused":  # there is no picture yet
                return Fatal("host_refused", **error.fields)
            says = error.fields.get("why") or error.fields.get("status") == 501
            if error.key == "model_not_listed" or (error.key == "host_failed" and says):
                log.warning("%s", t("first_photo_tells", why=error, url=public(url)))
            elif error.key != "host_busy":
                return error
        return None

    def about(self, url: str, asked: Question) -> dict[str, Any]:
        """A host's trouble, or what it tells of itself and the seconds for a plain picture."""
        told: dict[str, Any] = {"url": public(url), "trouble": self._trouble(url)}
        try:
            for colour in () if told["trouble"] else ("gray", "red"):  # the first loads the model
                number = self._hosts.number(url)
                told["seconds"] = self._described(url, asked.about(colour), number).seconds
                self.close()  # as llama.cpp may close a connection after an answer
        except AnalyzeError as error:
            told["trouble"] = error
        with suppress(AnalyzeError):
            if not told["trouble"]:
                path = self._dialect.server["about"]
                told["tells"] = self._call(url, "GET", path, timeout=CHECK_TIMEOUT).json()
        return told


# ------------------------------------------------------------------------------
# 7 Library: where photos come from and descriptions go; each worker has its own. Knows no AI.

PAGE = 1000  # photos on one page of a listing; Immich's maximum
IMMICH_TIMEOUT = 60.0  # if Redis hangs, Immich stores a write but answers late
UPLOAD_TIME = timedelta(minutes=1)  # how long after its date a photo may appear in a listing
BODY_LIMIT = 10 * 2**20  # bytes; Immich's limit for a request
SWEEP_SPAN = timedelta(days=2)  # how long after the upload a preview may appear
MANY = 20  # photos that may share a description by chance
REOPEN_AFTER = 3600.0  # seconds; by then, an upgrade of Immich may have changed its tables
PREVIEW_NAME = re.compile(r"([0-9a-f]{8}(-[0-9a-f]{4,12}){4})[-_]preview(_edited)?\.(jpe?g|webp)")
RENEW_AFTER = 3600.0  # seconds between two starts of the watch, as each is expensive
WRITTEN = [fs.FileCreatedEvent, fs.FileModifiedEvent, fs.FileClosedEvent, fs.FileMovedEvent]
NOTES_SINCE = (2, 5, 0)  # Immich's first release that lets API keys write metadata of photos
NEEDED_PERMISSIONS = ("asset.read", "asset.view", "asset.update")  # the last one to write
# Groups of photos by the path that lists them: the permission needed, and the field to search by.
GROUPS = {"albums": ("album.read", "albumIds"), "tags": ("tag.read", "tagIds")}

Cursor = Any  # a position in a listing; opaque to all but the library that made it
Page = tuple[list[Photo], Cursor | None]  # and the next cursor; None at the end
Library: TypeAlias = "ApiLibrary | DbLibrary"
Opened = tuple[Callable[[], Library], Callable[[], bool]]  # factory; whether it reaches all


@contextmanager
def blame(check: Callable[[], object]) -> Iterator[None]:
    """Turn an error into Unavailable if `check` fails, too: then the whole library is down."""
    # a status cannot tell: Immich answers 500 both for a broken photo and without its database
    try:
        yield
    except (Retryable, Permanent, Unexpected) as error:
        if isinstance(error, Unavailable) and error.fields.get("status") not in (502, 504):
            raise  # a proxy may say these two because of a single request
        kind = Permanent if isinstance(error, Permanent) else Retryable
        try:
            check()
        except AnalyzeError:
            kind = Unavailable
        raise error.as_kind(kind) from error


@dataclass(slots=True)
class Account:
    """One user's API key. Only listings, one at a time, change what is known of the user."""

    key: str = field(repr=False)
    number: int  # of the key among those in the settings, from 0
    user_id: str = ""  # "" until it is known; some keys may not ask for it
    strangers: set[str] = field(default_factory=set)  # ids of partners who share their photos
    groups: Mapping[str, Mapping[str, Sequence[Any]]] | None = None  # by photo and kind, once read
    refused: Fatal | None = None  # why the key is no longer used
    may: Sequence[Any] = ()  # its permissions
    name: str = ""  # the user's, if the key may ask for it


@dataclass(slots=True)
class Server:
    """What is known of one Immich server, shared by all threads that talk to it."""

    version: tuple[int, ...] = (0, 0, 0)  # may rise: each call of `clock` updates it
    accounts: dict[str, Account] = field(default_factory=dict)  # by Photo.source
    users: Sequence[Account] = ()  # also those whose key was refused at the start
    groups: Sequence[str] = ()  # those of GROUPS that a listing reads in full


@dataclass(frozen=True, slots=True)
class Walk:
    """A listing's cursor in the API, which asks for photos taken no later than `before`.

    At 50,000 photos this is four times as fast as page numbers, and none is lost although
    releases before 3.1.0 return photos of one date in no fixed order.
    """

    part: int = 0  # index of the key and visibility
    before: datetime | None = None  # the latest date taken
    page: int = 1  # above 1 only while a whole page lies within one millisecond
    seen: frozenset[str] = frozenset()  # ids of photos that may come again
    quiet: int = 0  # consecutive pages without a new photo

    def onward(self, ids: frozenset[str], last: datetime, more: bool, stable: bool) -> Walk | None:
        """The cursor after a page of photos back to the `last` date; None at the end of the part.

        If the order of photos of one date is not `stable`, pages within one millisecond are
        requested again until they bring nothing new.
        """
        quiet = self.quiet + 1 if ids <= self.seen else 0
        seen = ids | self.seen
        bound = last + timedelta(milliseconds=1)  # as the database has microseconds, too
        within = more and self.before and bound >= self.before  # still the same millisecond
        if within or (self.page > 1 and not stable and quiet < 4 * self.page):
            return replace(self, page=self.page + 1 if within else 1, seen=seen, quiet=quiet)
        return Walk(self.part, bound, seen=seen if self.page > 1 else ids) if more else None


def chosen(config: Config) -> list[dict[str, Any]]:
    """The filters of the searches that together list what the settings choose."""
    # several albums in one search would mean photos that are in all of them
    common: dict[str, Any] = {"isFavorite": True} if config.favorites else {}
    common |= {"libraryId": config.library} if config.library else {}
    common |= {"type": config.videos[0]} if len(config.videos) == 1 else {}
    common |= {"takenAfter": iso(config.taken_after - ZONES)} if config.taken_after else {}
    common |= {"takenBefore": iso(config.taken_before + ZONES)} if config.taken_before else {}
    photos = [{"id": photo} for photo in config.photo] or [{}]
    albums = [{"albumIds": [album]} for album in config.album] or [{}]
    return [common | photo | album for photo in photos for album in albums]


class ApiLibrary:
    """Immich's REST API, 1.132 to 3.3; polled, as only unrestricted keys are told of uploads.

    Each photo is read and written with its owner's key. An odd JSON field affects only itself. All
    public methods, here and in DbLibrary, raise only our own errors: Unavailable if the library is
    down, Retryable and Permanent if this call failed, Skip if the photo is to be left alone.
    """

    must_confirm: Literal[True] = True  # as a text can be lost after it was written
    most_workers = sys.maxsize  # that can each have a library at the same time
    previews: Path | None = None  # the folder in which they appear, if it can be watched

    def __init__(self, config: Config, server: Server) -> None:
        self._config, self._server, self._accounts = config, server, server.accounts
        self._session = Session(config.immich_header)
        self.close = self._session.close
        users, visible = server.accounts.values(), ("timeline", "archive")
        self._parts = [(user, v, one) for user in users for v in visible for one in chosen(config)]

    def read_version(self) -> Reply:
        """GET /server/version, which needs no key and also works during maintenance."""
        reply, told = self.send("", "GET", "/server/version", timeout=CHECK_TIMEOUT), None
        with suppress(Retryable):  # it is no JSON
            told = reply.json()
        version = tuple(dig(told, part) for part in ("major", "minor", "patch"))
        if not all(isinstance(number, int) for number in version):
            raise Unexpected("immich_wrong", url=reply.url, status=reply.status)
        self._server.version = version
        return reply

    def permissions(self, key: str) -> list[Any]:
        """A key's permissions, by GET /api-keys/me; older releases tell only that it is valid."""
        if self._server.version < (1, 139, 0):
            self.send(key, "POST", "/auth/validateToken", timeout=CHECK_TIMEOUT).json()
            return ["all"]
        told = self.send(key, "GET", "/api-keys/me", timeout=CHECK_TIMEOUT).json()
        return dig_list(told, "permissions")

    def identify(self, account: Account, needed: Sequence[str]) -> None:
        """Ask what the key may do and, if it may ask, for its user; Fatal if it cannot work."""
        account.may = allowed = self.permissions(account.key)
        if missing := [p for p in needed if p not in allowed and "all" not in allowed]:
            raise Refused("immich_permission_missing", permission=", ".join(missing))
        with suppress(Refused):
            told = self.send(account.key, "GET", "/users/me", timeout=CHECK_TIMEOUT).json()
            account.user_id, account.name = one_line(told, "id"), one_line(told, "email")

    def send(self, key: str, method: str, path: str, **options: Any) -> Reply:
        """Send one request with a user's key, or without a key if it is ""."""
        url = self._config.immich_api_url + path
        headers = {"x-api-key": key or None} | options.pop("headers", {})
        own = {"timeout": IMMICH_TIMEOUT, "headers": headers} | options
        return http(self._session, method, url, server="immich", **own)

    def _call(
        self, account: Account, method: str, path: str, *, raw: bool = False, **options: Any
    ) -> Any:
        """The response's JSON, or itself if `raw`; Skip once the key has been refused."""
        if account.refused:
            raise account.refused.as_kind(Skip)
        try:
            with blame(functools.partial(self.permissions, account.key)):
                reply = self.send(account.key, method, path, **options)
                page = "text/html" in reply.headers.get("Content-Type", "")  # by a proxy
                return reply if raw and not page else reply.json()
        except Refused as error:
            first = not account.refused
            account.refused = Fatal("key_refused", number=account.number + 1, why=error)
            if all(other.refused for other in self._accounts.values()):
                raise
            if first:
                log.error("%s", account.refused)
            raise account.refused.as_kind(Skip) from error

    def _ask(self, photo: Photo, method: str, path: str = "", **options: Any) -> Any:
        """Send a request about one photo, with its owner's key."""
        account = self._accounts[photo.source]
        return self._call(account, method, f"/assets/{photo.id}{path}", **options)

    def clock(self) -> datetime:
        """The Date header of GET /server/version; our own time if a proxy removed it."""
        key = next(account.key for account in self._accounts.values() if not account.refused)
        with blame(functools.partial(self.permissions, key)):
            reply = self.read_version()
        with suppress(ValueError):
            return parsedate_to_datetime(reply.headers.get("Date", "")).astimezone(UTC)
        return datetime.now(UTC)

    def page(self, cursor: Walk | None, since: datetime | None = None) -> Page:
        """The next page of the listing; with `since`, only photos uploaded from then on."""
        for account in () if cursor else self._accounts.values():
            with suppress(Skip):  # its key was refused
                account.groups = self._groups(account)
        return self._page(cursor or Walk(), {"createdAfter": iso(since)} if since else {})

    def _page(self, walk: Walk, query: dict[str, Any]) -> Page:
        """One page of photos, and the next cursor."""
        account, visibility, given = self._parts[walk.part]
        query = query | self._filter(visibility) | given | {"withExif": True}
        query |= {"withPeople": True} if "people" in self._config.context else {}
        items, step = self._step(account, walk, query)
        found = (self._photo(item, account) for item in items if in_period(item, self._config))
        if step is None and walk.part + 1 < len(self._parts):
            step = Walk(walk.part + 1)
        return [*filter(None, found)], step

    def _step(self, account: Account, walk: Walk, query: Any) -> tuple[list[Any], Walk | None]:
        """POST /search/metadata, in the flat form of all releases: new items; next cursor."""
        body = {"size": PAGE} | query | {"page": walk.page, "order": "desc"}
        body |= {"takenBefore": iso(walk.before)} if walk.before else {}
        try:
            found = dig(self._call(account, "POST", "/search/metadata", json=body), "assets")
        except Skip:  # the key was refused, or the album was deleted meanwhile
            return [], None
        if not isinstance(found, dict):
            raise Retryable("not_json", url=public(self._config.immich_api_url))
        items = [item for item in dig_list(found, "items") if isinstance(dig(item, "id"), str)]
        last = walk.before or FAR_FUTURE
        with suppress(IndexError, ValueError, OverflowError):  # Python lacks dates before Christ
            told = datetime.fromisoformat(str(items[-1].get("fileCreatedAt")))
            last = min(last, told.astimezone(UTC))
        more, stable = dig(found, "nextPage") is not None, self._server.version >= (3, 1, 0)
        fresh = [item for item in items if item["id"] not in walk.seen]
        return fresh, walk.onward(frozenset(item["id"] for item in items), last, more, stable)

    def _filter(self, visibility: str) -> dict[str, Any]:
        """The filter for one visibility, always explicit, as the default differs by release."""
        if self._server.version >= (1, 133, 0):
            return {"visibility": visibility}
        return {"isArchived": visibility == "archive", "isVisible": True}

    def _photo(self, item: Any, account: Account) -> Photo | None:
        """The photo in an item of a response; None for one that this user may not describe."""
        hidden = item.get("type") not in self._config.videos
        hidden = hidden or item.get("visibility") in ("hidden", "locked")
        hidden = hidden or True in (item.get("isTrashed"), item.get("isOffline"))
        if hidden or not self._owns(account, item):
            return None
        if account.groups is None:
            account.groups = self._groups(account)
        description = dig(item, "exifInfo", "description")
        return Photo(
            id=item["id"],
            name=str(item.get("originalFileName") or item["id"]),
            description=description if isinstance(description, str) else "",
            source=str(account.number),
            ready=bool(item.get("thumbhash")),  # null until the preview is made
            note=UNREAD if self._server.version >= NOTES_SINCE else None,
            library=str(item.get("libraryId") or ""),
            told={**item, **account.groups.get(item["id"], {})} if self._config.context else {},
            video=item["type"] == "VIDEO",
            site=self._config.link_url,
        )

    def _owns(self, account: Account, item: dict[str, Any]) -> bool:
        """Whether the key's user owns a photo, as searches also return those of partners.

        A key without user.read cannot ask who its user is. Then an empty update of one photo
        per owner tells, as only the owner may update a photo.
        """
        owner: Any = item.get("ownerId")
        if (self._config.dry_run or self._config.check) and not account.user_id:
            return True
        others = (other.user_id for other in self._accounts.values())
        if not (account.user_id or owner in account.strangers or owner in others):
            path = f"/assets/{item['id']}"
            try:
                self._call(account, "PUT", path, json={})
                account.user_id = owner
            except Skip:
                with suppress(Skip):
                    self._call(account, "GET", path)  # it still exists, so somebody else owns it
                    account.strangers.add(owner)
        return bool(owner) and owner == account.user_id

    def _groups(self, account: Account) -> Mapping[str, Mapping[str, Sequence[Any]]]:
        """A user's albums and tags by photo and kind, by one search for each album and tag."""
        groups = defaultdict[str, Any](functools.partial(defaultdict, list))
        for kind in () if self._config.check else self._server.groups:
            for group_id, told in self.listed_groups(account, kind).items():
                for photo_id in self._members(account, {GROUPS[kind][1]: [group_id]}):
                    groups[photo_id][kind].append(told)
        return groups

    def listed_groups(self, account: Account, kind: str) -> dict[str, Any]:
        """GET /tags, or the names of a user's own and shared albums by GET /albums, by id."""
        paths = [f"/{kind}"]
        if kind == "albums" and self._server.version < (3, 0, 0):
            paths.append("/albums?shared=true")
        listed = [one for path in paths for one in dig_list(self._call(account, "GET", path))]
        told = {str(dig(one, "id")): one for one in listed}
        return {n: one_line(o, "albumName") for n, o in told.items()} if kind == "albums" else told

    def known_albums(self, ids: Sequence[str], *, named: bool) -> Iterator[tuple[str, str]]:
        """Id and name of each album in `ids` that a user sees; of all albums if `named`."""
        for account in self._accounts.values():
            for album in ids:  # searches for the photos of one that is not seen are refused
                with suppress(Skip, Permanent):
                    body = {"albumIds": [album], "size": 1}
                    self._call(account, "POST", "/search/metadata", json=body)
                    yield album, album
            if named:
                yield from self.listed_groups(account, "albums").items()

    def _members(self, account: Account, query: dict[str, Any]) -> Iterator[str]:
        """The ids of the photos in a group, including some of other users."""
        all_at_once = self._server.version >= (3, 0, 0)  # its search returns archived photos, too
        for part in [{}] if all_at_once else [self._filter(v) for v in ("timeline", "archive")]:
            walk: Walk | None = Walk()
            while walk:
                items, walk = self._step(account, walk, part | query)
                yield from (item["id"] for item in items)

    def total(self, **more: str) -> int:
        """POST /search/statistics, which needs asset.statistics; `more` narrows the search."""
        # not by _call, which would retire a key that lacks this right but can do the work
        ask = functools.partial(self.send, method="POST", path="/search/statistics")
        queries = [(user.key, self._filter(v) | given | more) for user, v, given in self._parts]
        totals = (number_at(ask(key, json=query).json(), "total") for key, query in queries)
        return len(self._config.photo) or int(sum(totals))

    def about(self) -> dict[str, Any]:
        """What `--check` tells, by a few requests for each key, which may not be allowed to count.

        `samples` has a few photos, each as its id and Photo.source.
        """
        told: dict[str, Any] = {"version": self._server.version, "keys": self._server.users}
        with suppress(AnalyzeError):  # not every key may ask
            told |= {"photos": self.total(), "described": self.total(description="_")}
        photos, _ = self._page(Walk(), {"size": 20})
        return told | {"samples": [(one.id, one.source) for one in photos if one.ready]}

    def news(self, since: datetime, started: datetime | None) -> list[Photo]:
        """Photos updated since then, as Immich updates a photo when it makes the preview.

        With `started`, none that was uploaded long before.
        """
        query = {"updatedAfter": iso(since)}
        query |= {"createdAfter": iso(started - UPLOAD_TIME)} if started else {}
        updated: list[Photo] = []
        walk: Walk | None = Walk()
        while walk:
            photos, walk = self._page(walk, query)
            updated += (photo for photo in photos if photo.ready)
        return updated

    def read_back(self, photos: Sequence[Photo], age: float) -> dict[str, str]:
        """The descriptions, written in the last `age` seconds; photos that are gone have none.

        One search for recently updated photos, then GET /assets/{id} for each of the others.
        """
        stored: dict[str, str] = {}
        if len(photos) > len(self._parts):  # else that would take more requests
            since = self.clock() - timedelta(seconds=age + 2)  # the clock counts whole seconds
            stored = {photo.id: photo.description for photo in self.news(since, None)}
        for photo in photos:
            if photo.id not in stored:
                with suppress(Skip):
                    stored[photo.id] = dig(self._read(photo), "exifInfo", "description") or ""
        return stored

    def _read(self, photo: Photo) -> dict[str, Any]:
        """GET /assets/{id}; Retryable if the response is not about this photo."""
        told = self._ask(photo, "GET")
        if dig(told, "id") != photo.id:
            raise Retryable("not_json", url=public(self._config.immich_api_url))
        return dict(told)

    @contextmanager
    def claimed(self, photo: Photo) -> Iterator[Photo]:
        """GET /assets/{id}/metadata/{key}; only `--shard` keeps instances apart."""
        told = None
        with suppress(Missing):
            if self._server.version >= NOTES_SINCE:
                told = self._ask(photo, "GET", f"/metadata/{KEY}")
        yield replace(photo, note=note_in(dig(told, "value")))

    def look(self, photo: Photo) -> Photo:
        """The photo as it is now, with its note."""
        if not (found := self._photo(self._read(photo), self._accounts[photo.source])):
            raise Skip("photo_excluded")
        with self.claimed(found) as noted:
            return noted

    def with_facts(self, photo: Photo) -> Photo:
        """GET /assets/{id} for tags, GET /assets/{id}/ocr for the text in the picture."""
        context, told = self._config.context, dict[str, Any]()
        if "tags" in context and not photo.told.get("tags"):  # no search had new photos yet
            told["tags"] = self._read(photo).get("tags")
        if "text" in context and self._server.version >= (2, 2, 0):
            told["ocr"] = self._ask(photo, "GET", "/ocr")
        return replace(photo, told={**photo.told, **told})

    def preview(self, photo: Photo) -> bytes | None:
        """GET /assets/{id}/thumbnail; `edited` (2.5 on) is the version that the user cropped."""
        data: bytes | None = None
        with suppress(Missing):
            for size in dict.fromkeys((self._config.thumbnail_size, "preview")):  # may be a GIF
                params = {"size": size, "edited": "true"}
                data = self._ask(photo, "GET", "/thumbnail", raw=True, params=params).body
                if picture_type(data)[0]:
                    break
        return data

    def video(self, photo: Photo, end: float) -> list[RemoteFile]:
        """GET /assets/{id}/video/playback: what Immich transcoded, else the original."""

        def fetch(piece: int) -> Any:
            part = {"Range": f"bytes={piece * PIECE}-{(piece + 1) * PIECE - 1}"}
            options = {"headers": part, "limit": PIECE, "timeout": seconds_until(end), "raw": True}
            options["watch"] = lambda _: seconds_until(end)  # a slow server may never be silent
            try:
                return self._ask(photo, "GET", "/video/playback", **options)
            except Unavailable as error:  # perhaps only for videos, by a proxy's limits
                with blame(functools.partial(self.permissions, self._accounts[photo.source].key)):
                    raise error.as_kind(Retryable) from error

        return [RemoteFile(fetch)]

    def write(self, photo: Photo, text: str, note: Note | None) -> bool:
        """GET, then PUT /assets/{id}: the API has no conditional write, so read just before it.

        The GET also tells whether a write that timed out succeeded: a second PUT soon after the
        first could be lost. The note goes first, so that no text of ours ever lacks one. False,
        with nothing written, if the description is neither the photo's nor `text`.
        """
        if self._config.dry_run:
            return True
        current, new = self._read(photo), {"description": text}
        stored = dig(current, "exifInfo", "description") or ""
        if dig(current, "isTrashed") is True:
            raise Skip("photo_gone")
        if stored not in (text, photo.description):
            return False
        if len(json.dumps(new)) > BODY_LIMIT:
            raise Permanent("description_too_long")
        if note:
            self.remember(photo, note)
        if stored != text:
            self._ask(photo, "PUT", json=new)
        return True

    def remember(self, photo: Photo, note: Note | None) -> None:
        """PUT or DELETE /assets/{id}/metadata; if that is refused, no harm is done."""
        if self._server.version < NOTES_SINCE:
            return
        with suppress(Permanent, Skip, Missing):
            if note:
                item = {"key": KEY, "value": note.value(datetime.now(UTC))}
                self._ask(photo, "PUT", "/metadata", json={"items": [item]})
            else:
                self._ask(photo, "DELETE", f"/metadata/{KEY}", raw=True)


def with_album_ids(config: Config, known: Sequence[tuple[str, ...]]) -> Config:
    """The settings with ids for albums; Fatal unless each stands for exactly one of `known`.

    `known` has each album's id and its names, the one to show first.
    """
    found: list[str] = []
    for album in config.album:
        same = {one[0] for one in known if album in (unicodedata.normalize("NFC", n) for n in one)}
        if len(same) != 1:
            shown = sorted({f"{name} ({n})" for n, name, *_ in known if n in same or not same})
            raise Fatal("unknown_album", album=album, albums=", ".join(shown) or "-")
        found += same
    return replace(config, album=tuple(dict.fromkeys(found)))


def with_site(config: Config, site: object) -> Config:
    """The settings with Immich's address for people, where its administrator has set one."""
    return replace(config, link_url=public(one_line(site)).rstrip("/") or config.link_url)


def open_api(config: Config) -> Opened:
    """Check Immich's address and each key; keys that are refused are left out."""
    renews = config.policy is Policy.OUTDATED
    by_id = [album for album in config.album if re.fullmatch(ID, album)]
    named = len(by_id) < len(config.album)
    groups = [n for n in config.context if n == "albums" or (n == "tags" and renews)]
    server = Server(groups=groups)
    needed = [*NEEDED_PERMISSIONS, *(GROUPS[n][0] for n in sorted({*groups, *["albums"] * named}))]
    if config.dry_run:
        needed.remove("asset.update")
    accounts: dict[str, Account] = {}  # by user, as two keys may belong to one
    with closing(ApiLibrary(config, server)) as library:
        library.read_version()
        for number, key in enumerate(config.immich_api_keys):
            account = Account(key, number)
            try:
                library.identify(account, needed)
            except Refused as error:
                account.refused = Fatal("key_refused", number=number + 1, why=error)
            accounts.setdefault(account.user_id or key, account)
        users = server.users = [*accounts.values()]
        server.accounts |= {str(one.number): one for one in users if not one.refused}
        for trouble in (one.refused for one in users if one.refused):
            if not server.accounts:
                raise trouble
            log.error("%s", trouble)
        if renews and server.version < NOTES_SINCE:
            raise Fatal("notes_needed")
        if "albums" in groups and server.version < (1, 135, 0):
            groups.remove("albums")
            log.warning("%s", t("no_albums"))
        if config.album and server.version < (1, 135, 0):  # its searches ignore albums
            raise Fatal("albums_too_old")
        config = with_album_ids(config, [*library.known_albums(by_id, named=named)])
        with suppress(AnalyzeError):
            told = library.send("", "GET", "/server/config", timeout=CHECK_TIMEOUT).json()
            config = with_site(config, dig(told, "externalDomain"))
    return lambda: ApiLibrary(config, server), lambda: not any(one.refused for one in users)


def statements(tables: Mapping[str, set[str]], config: Config) -> dict[str, Any]:
    """The SQL of immich.sql for tables with these columns; Unexpected if they are not Immich's."""
    given = {"tables": tables, "config": config, "ignored": expression(config.ignore_descriptions)}
    named: dict[str, Any] = vars(template(data_file("immich.sql")).make_module(given))
    if not tables.keys() >= {*named["needed"]}:
        raise Unexpected("no_immich_tables")
    return named


class DbLibrary:
    """Immich's own tables, 1.132 to 3.3, on PostgreSQL 14 and newer.

    Its connection is opened on first use, and reopened every hour and after it was lost. A
    description is changed only together with its note, and only if it still is as listed.
    """

    must_confirm: Literal[False] = False  # what is committed stays
    statements: Mapping[str, Any]  # statements for the tables that this connection found

    def __init__(self, config: Config, most_workers: int = 1) -> None:
        self._config, self._opened = config, 0.0
        self._given = {one.name: getattr(config, one.name) for one in fields(config)} | {"key": KEY}
        self._connection: psycopg2.extensions.connection | None = None
        self._root = config.thumbs_root or config.immich_root
        self.previews = config.thumbs_root or config.immich_root / "thumbs"
        self.most_workers = most_workers

    def rows(self, name: str, **parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement in a transaction of its own; return its rows, if any."""
        kept = self._connection is not None  # from an earlier call, so it may be dead
        try:
            with sql(), self._open().cursor() as cursor:
                cursor.execute(self.statements[name], self._given | parameters)
                return cursor.fetchall() if cursor.description else [()] * cursor.rowcount
        except (Unavailable, Unexpected) as error:  # the tables may have changed
            self.close()
            if not kept or isinstance(error, Unexpected):
                raise
        return self.rows(name, **parameters)

    def _open(self) -> psycopg2.extensions.connection:
        now, old = time.monotonic(), self._connection
        if old and not old.closed and now < self._opened + REOPEN_AFTER:
            return old
        self.close()
        own = psycopg2.extensions.parse_dsn(postgres_url(self._config.postgres_url))
        given = toml("settings.toml")["connection"] | own | {"client_encoding": "UTF8"}
        new: psycopg2.extensions.connection = psycopg2.connect(**given)
        new.autocommit = True
        with new.cursor() as cursor:
            cursor.execute(data_file("connection.sql"))
            tables = {name: set(columns) for name, columns in cursor}
        self.statements = statements(tables, self._config)
        self._connection, self._opened = new, now
        return new

    def _rows(self, name: str, note: Note | None = None, **values: object) -> list[tuple[Any, ...]]:
        stored = json.dumps(note.value(datetime.now(UTC))) if note else None
        with blame(self.check):
            return self.rows(name, note=stored, **values)

    def check(self) -> None:
        """Unexpected if the database is read-only, or none of a few previews is in the folder."""
        [(read_only, samples)] = self.rows("check")
        if read_only == "on":
            self.close()  # another connection may take writes
            raise Unexpected("database_read_only")
        for path in samples:
            with suppress(Missing, Permanent):
                self._file(path)
                return
        first = self.previews / "".join(samples[:1]).rpartition("thumbs/")[2]
        try:
            read_file(first)
        except (Missing, Permanent) as error:
            if isinstance(error.__cause__, PermissionError):  # it may well be there
                raise
        if not os.path.isdir(self.previews):
            key = "thumbs_wrong" if self._config.thumbs_root else "root_wrong"
            raise Unexpected(key, root=self._root)
        if samples:
            raise Unexpected("root_empty", root=self._root, path=first)

    def _file(self, path: str) -> bytes:
        _, found, rest = path.rpartition("thumbs/")  # before: a path in Immich's container
        file = inside(self._root, self.previews / rest) if found else None
        if not file:
            raise Permanent("preview_outside", path=path)
        return read_file(file)

    def clock(self) -> datetime:
        """The server's time."""
        now: datetime = self._rows("clock")[0][0]
        return now

    def _listed(self, name: str, **bounds: Any) -> list[tuple[Any, ...]]:
        """The rows of photos; with bare ids if one cannot be decoded, so that it fails alone."""
        try:
            return self._rows(name, **bounds)
        except Permanent:
            return self._rows(f"bare_{name}", **bounds)

    def _photo(self, row: Sequence[Any]) -> Photo:
        """The photo in a row that a statement returned."""
        return replace(Photo(*row[:9]), note=note_in(row[5]), site=self._config.link_url)

    def page(self, cursor: str | None, since: datetime | None = None) -> Page:
        """One page, by id or the newest first: only photos with work to do."""
        rows = self._listed("listing", since=since, after=cursor, page=PAGE)
        return [*map(self._photo, rows)], rows[-1][-1] if len(rows) == PAGE else None

    def total(self) -> int:
        """How many photos a listing has."""
        return int(self._rows("count")[0][0])

    def about(self) -> dict[str, Any]:
        """What `--check` tells, by one statement."""
        return dict(self._rows("about")[0][0])

    def news(self, since: datetime, started: datetime | None) -> list[Photo]:
        """New preview rows, ordered by `asset_file."updateId"`: only photos with work to do."""
        uploaded = started and started - SWEEP_SPAN  # as previews made anew appear, too
        return [*map(self._photo, self._listed("news", since=since, uploaded=uploaded))]

    @contextmanager
    def claimed(self, photo: Photo) -> Iterator[Photo]:
        """Take an advisory lock, which ends with this connection; then look."""
        if self._rows("claim", id=photo.id) != [(True,)]:
            raise Skip("claimed_elsewhere")
        try:
            yield self.look(photo)
        finally:
            try:
                self._rows("release", id=photo.id)
            except AnalyzeError:
                self.close()

    def look(self, photo: Photo) -> Photo:
        """The photo as it is now, with its note and all facts."""
        if not (rows := self._rows("look", id=photo.id)):
            raise Skip("photo_excluded")
        return self._photo(rows[0])

    def with_facts(self, photo: Photo) -> Photo:
        """The photo, as `look` has read all facts."""
        return photo

    def preview(self, photo: Photo) -> bytes | None:
        """The file at `asset_file.path`; Unavailable if all are missing, as on an absent disk."""
        with suppress(Missing, Permanent):
            return self._file(photo.source)
        with blame(self.check):
            self.check()
        # the file may have moved, or the disk may just have come back
        with suppress(Missing):
            return self._file(self.look(photo).source or photo.source)
        return None

    def video(self, photo: Photo, end: float) -> list[Path]:
        """What Immich transcoded, then the original, as far as they are in Immich's folder."""
        root, folder = self._config.immich_root, photo.source.rpartition("thumbs/")[0]
        paths = (path.removeprefix(folder) for path, _ in self._rows("video", id=photo.id))
        return [file for path in paths if (file := inside(root, path)) and os.path.isfile(file)]

    def write(self, photo: Photo, text: str, note: Note | None) -> bool:
        """UPDATE the row if it still has the listed text, lock the property, store the note."""
        values = {"id": photo.id, "text": text, "listed": photo.description}
        if self._rows("write" if note else "forget", note, **values):
            return True
        stored = self.look(photo)
        if not stored.ready:
            raise Skip("photo_gone")
        return stored.description == text

    def remember(self, photo: Photo, note: Note | None) -> None:
        """Store a note; none is deleted alone, as nothing is read back."""
        self._rows("remember", note, id=photo.id)

    def close(self) -> None:
        """Close the connection; the next statement opens another."""
        if self._connection:
            self._connection.close()
        self._connection = None


class PreviewWatch(fs.FileSystemEventHandler):
    """Reports by inotify when a preview is written, each at most once per `cooldown` seconds.

    What it misses is found in the database later, so a problem with it is a warning, no error.
    """

    def __init__(self, folder: Path, event: Callable[[], None], cooldown: float) -> None:
        self.events = 0  # how many it reported
        self._folder, self._event, self._cooldown = folder, event, cooldown
        self._quiet: dict[str, float] = {}  # end of cooldown by id; observer's thread only
        self._missed = False
        self._observer: BaseObserver | None = None
        self._renew()

    def _renew(self) -> None:
        """Start in a thread of its own, as a large library has 65,536 folders to walk through."""
        self.close()
        self.since = math.inf  # when it began to see everything
        self._renewed = time.monotonic()
        threading.Thread(target=self._begin, name="watch", daemon=True).start()

    def _begin(self) -> None:
        try:
            os.scandir(self._folder).close()  # watchdog would skip it silently
            self._observer = observer = Observer()
            observer.schedule(self, str(self._folder), recursive=True, event_filter=WRITTEN)
            observer.start()
            self.since = time.monotonic()
            # folders beyond the limit are skipped silently, but then one more raises an error
            observer.unschedule(observer.schedule(self, str(self._folder.parent), event_filter=[]))
        except OSError as error:
            if error.errno == errno.ENOSPC or self.since == math.inf:
                keys = {errno.ENOSPC: "watch_limit", errno.EMFILE: "watch_instances"}
                key = keys.get(error.errno or 0, "watch_failed")
                log.warning("%s", t(key, folder=self._folder, why=error.strerror))

    def on_any_event(self, event: fs.FileSystemEvent) -> None:
        """Handle an event, in the observer's thread."""
        name = os.path.basename(os.fsdecode(event.dest_path or event.src_path))
        match, now = PREVIEW_NAME.fullmatch(name), time.monotonic()
        if match and self._quiet.get(match[1], now) <= now:
            while self._quiet and self._quiet[oldest := next(iter(self._quiet))] <= now:
                del self._quiet[oldest]
            self._quiet[match[1]] = now + self._cooldown
            self.events += 1
            self._event()

    def missed(self) -> None:
        """Warn once that photos arrived unseen; watch anew, as the folder may be a new one."""
        if not self._missed:
            self._missed = True
            log.warning("%s", t("watch_missed"))
        if time.monotonic() > self._renewed + RENEW_AFTER:
            self._renew()

    def close(self) -> None:
        """Stop the observer."""
        if self._observer:
            self._observer.stop()


def inside(root: Path, path: Path | str) -> Path | None:
    """A file of Immich's on this machine; None if it is outside `root`."""
    real = Path(os.path.realpath(root / path))  # unlike resolve(), it takes links that form a loop
    return real if real.is_relative_to(os.path.realpath(root)) else None


def read_file(path: Path) -> bytes:
    """A regular file's content; Missing, Permanent without rights, Retryable on a disk error."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would block for ever
            raise Missing("preview_missing")
        with path.open("rb") as file:
            return file.read(REPLY_LIMIT)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        raise verdict("file", name, file=path, why=error.strerror) from error


def open_database(config: Config) -> Opened:
    """Check the connection, the tables, the rights and the folder of previews."""
    with closing(DbLibrary(config)) as library, closing(DbLibrary(config)) as other:
        spare = library.rows("spare")[0][0]
        if missing := library.rows("grants"):
            raise Fatal("grants_missing", grants="; ".join(grant for (grant,) in missing))
        library.check()
        config = with_album_ids(config, library.rows("known_albums") if config.album else ())
        config = with_site(config, library.rows("site")[0][0])
        lock = os.urandom(8).hex()
        with suppress(Unavailable):  # without a second connection, it cannot be tested
            taken = [each.rows("claim", id=lock) for each in (library, other) * 10]
            # a busy pooler may get it right by chance; a dry run claims nothing
            if taken != [[(True,)], [(config.dry_run,)]] * 10:
                raise Fatal("pooled_by_transaction")
        with suppress(Permanent):
            say_repeated(dict(library.rows("repeated", many=MANY)), config)
    if config.policy is Policy.OUTDATED and not library.statements["notes"]:
        raise Fatal("notes_needed")
    if not library.statements["locks"]:
        log.warning("%s", t("no_lock"))
    most = max(1, spare * 3 // 4 - 1)  # a quarter is for other programs, two for the stream
    if most < 2 * config.max_concurrent:
        log.warning("%s", t("few_connections", free=spare + 1, number=most))
    return lambda: DbLibrary(config, most), lambda: True


def say_repeated(texts: Mapping[str, int], config: Config) -> None:
    """Name the descriptions that so many photos share that a camera may have written them."""
    ignored = expression(config.ignore_descriptions)
    many = [(text, n) for text, n in Counter(texts).most_common() if n > MANY]
    shown = [f"“{text:.50}” ({n})" for text, n in many if not re.match(ignored, text, re.S)]
    if shown and not config.undo:
        log.info("%s", t("same_description", texts=", ".join(shown[:3])))


def find(photo_id: str, library: Library, config: Config) -> Photo:
    """The photo with an id, by whichever key can read it; Fatal if it cannot be described."""
    for source in range(max(1, len(config.immich_api_keys))):
        with suppress(Skip, Permanent, LookupError):  # LookupError: two keys of one user
            return library.look(Photo(photo_id, "", "", str(source)))
    raise Fatal("unknown_photo", photo=photo_id)


def open_library(config: Config, photos: Iterable[str] = ()) -> Opened:
    """Check a library and photos; return what makes one per worker, and tells if all is reached."""
    try:
        opened = open_api(config) if config.access == API else open_database(config)
        with closing(opened[0]()) as library:
            for photo_id in photos:
                find(photo_id, library, config)
        return opened
    except (Retryable, Permanent, Missing, Skip) as error:
        raise error.as_kind(Unavailable if isinstance(error, Retryable) else Unexpected) from error


# ------------------------------------------------------------------------------
# 8 Pipeline: which photo is next, and what happens to it. Knows no HTTP, no SQL, no signals.

LIBRARY_TRIES = 3  # for a call that fails while the library is up; an outage costs none
VALUABLE_TRIES = 12  # for a write, whose text took minutes to make, and for a page
LONGEST_PAUSE = 60.0  # even if the library asks for a longer one
PROMPT_SPAN = timedelta(seconds=5)  # how far back a look goes if an event triggered it
PROMPT_PAUSE = 0.15  # Immich writes a preview's row 20 to 110 ms after its file
SILENCE = 5.0  # seconds beyond the interval in which photos may arrive without an event
RETAKE_PAUSE = 5.0  # before a failed photo may be taken again; doubles each time
MOST_TEXTS = 10_000  # different descriptions counted at a time
PAGE_WAIT = 0.5  # seconds after which arrivals have a turn while a page is being fetched
PAGE_PAUSE = 60.0  # after a page could not be fetched; doubles each time
SWEEP_INTERVAL = 3600.0
WHOLE_SWEEP = 24  # one in so many sweeps covers the whole library
CHECK_PAUSE = 2.0  # seconds; by then Immich has lost a text that it cannot keep
MOST_LOSSES = 3
SLOT, SLOTS = 300.0, 288  # seconds in which photos are counted together, and how many of these
MAY_COME_BACK = ("photo_gone", "photo_excluded", "claimed_elsewhere")


class Outcome(StrEnum):
    """What became of a photo."""

    DESCRIBED = "described"
    UNDONE = "undone"  # its description was taken back, or would be in a dry run
    SKIPPED = "skipped"  # has a description, got one meanwhile, or is gone
    NOT_READY = "not_ready"  # Immich has not made its preview yet
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of one photo."""

    photo: Photo  # as it was before
    outcome: Outcome
    error: AnalyzeError | None = None
    text: str = ""  # the whole description that it got or, in a dry run, would get
    note: Note | None = None  # that was stored with it
    asked: Question | None = None
    said: Said | None = None
    at: float = field(default_factory=time.monotonic)  # when, by the monotonic clock


class Stop(threading.Event):
    """Set when the process is to end; news, too, wakes a thread that naps."""

    def __init__(self) -> None:
        super().__init__()
        self.news = threading.Event()  # ends the current nap or, if nobody naps, the next one

    def set(self) -> None:
        """End all waiting for good."""
        super().set()
        self.news.set()

    def nap(self, seconds: float) -> None:
        """Wait until the time is up, news comes, or the process is to end."""
        self.news.wait(seconds)
        self.news.clear()


class Taken:
    """The photos taken in this run; one that failed can be taken again after a pause."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_hand: set[str] = set()  # ids
        self._hashes = array("q")  # of ids, sorted; compact, as a service may run for months
        # by id: when it can be taken again, the pause until then, and its outcome
        self._failed: dict[str, tuple[float, float, str]] = {}

    def take(self, photo: Photo) -> bool:
        """Take a photo; False if a worker has it, or had it before."""
        value = hash(photo.id)
        with self._lock:
            at = bisect_left(self._hashes, value)
            if self._hashes[at : at + 1] != array("q", [value]):
                self._hashes.insert(at, value)
            else:
                free, *_ = self._failed.get(photo.id, (math.inf,))
                if photo.id in self._in_hand or free > time.monotonic():
                    return False
            self._in_hand.add(photo.id)
        return True

    def leave(self, photo: Photo, outcome: Outcome, pause: float | None = None) -> bool:
        """Let go of a photo, for good or until a `pause` is over, which doubles each time.

        False if it had this outcome before, and can have it again.
        """
        with self._lock:
            self._in_hand.discard(photo.id)
            _, last, before = self._failed.pop(photo.id, (0.0, 0.0, ""))
            if pause is None:
                return True
            pause = max(pause, 2 * last)
            self._failed[photo.id] = time.monotonic() + pause, pause, outcome
            return before != outcome

    def forget(self, *, described: bool) -> None:
        """Let failed photos be taken again at once; if `described`, all that no worker has."""
        with self._lock:
            self._failed = dict.fromkeys(self._failed, (0.0, 0.0, ""))
            if described:
                self._hashes = array("q", sorted(map(hash, self._in_hand)))


class Tally:
    """Counts the outcomes of photos for all workers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.form = "tally"  # key of its text
        self.unnoted: deque[tuple[Photo, Note]] = deque()  # failures, until others succeed
        self.counts: Counter[Outcome] = Counter()
        self.reasons: Counter[tuple[Outcome, str]] = Counter()  # the same by message key
        self.total: int | None = None  # photos in the backlog, if known
        self.listed = 0  # how many of these so far
        self.most: float = math.inf  # photos to describe
        self.began = self.moved = time.monotonic()  # when the stream or a photo last made progress
        self.slots: Counter[int] = Counter()  # photos described in the last day, by time in SLOTs
        self.failed: deque[tuple[Photo, AnalyzeError]] = deque(maxlen=20)  # the latest first

    def add(self, outcome: Outcome, reason: str = "", number: int = 1) -> None:
        """Count one photo, or take one off with -1."""
        with self._lock:
            self.counts[outcome] += number
            self.reasons[outcome, reason] += number
            self.moved = time.monotonic()
            if outcome is Outcome.DESCRIBED:
                self.slots[now := int(self.moved // SLOT)] += number
                self.slots = Counter({at: n for at, n in self.slots.items() if at > now - SLOTS})

    def left(self) -> int | None:
        """How many photos of the backlog are not listed yet, if known."""
        return None if self.total is None else max(0, self.total - self.listed)

    def __str__(self) -> str:
        return t(self.form, **{outcome.value: self.counts[outcome] for outcome in Outcome})


@dataclass
class Patience:
    """Retries calls of the library on errors that may pass; shared by all workers.

    It waits out an outage of the library, for `longest` seconds at most, and gives up a call that
    fails without an outage after some tries. An outage is two log lines, however many wait.
    """

    stop: threading.Event
    pause: float  # between two tries
    longest: float  # after which an outage is Fatal
    passing: tuple[type[AnalyzeError], ...] = (Unavailable,)  # the errors of an outage
    why: AnalyzeError | None = None  # the error of the current outage
    _since: float = math.inf  # when its first call failed
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, call: Callable[[*Args], T], *args: *Args, tries: int = LIBRARY_TRIES) -> T:
        """The result of the call; Stopped if asked to stop meanwhile."""
        began = None  # when this call first met the outage
        while True:
            try:
                answer = call(*args)
            except self.passing as error:
                began = time.monotonic() if began is None else began
                left = began + self.longest - time.monotonic()
                if left <= 0:
                    raise Fatal("library_away", why=error) from error
                self._turn(error, began)
                self._wait(error, left)
            except AnalyzeError as error:
                self._turn(None, began)
                tries -= 1
                if tries <= 0 or not isinstance(error, Retryable):
                    raise
                self._wait(error, math.inf)
            else:
                self._turn(None, began)
                return answer

    def _wait(self, error: AnalyzeError, most: float) -> None:
        if self.stop.wait(min(most, error.pause or self.pause, max(self.pause, LONGEST_PAUSE))):
            raise Stopped("stopped") from error

    def _turn(self, why: AnalyzeError | None, began: float | None) -> None:
        if began is None:  # a call that never waited proves nothing
            return
        with self._lock:
            before, away, self.why = self.why, self.away(), why
            self._since = min(self._since, time.monotonic()) if why else math.inf
        if why and not before:
            log.info("%s", t("waiting", why=why))
        elif before and not why:
            log.info("%s", t("back", time=timedelta(seconds=round(away))))

    def away(self) -> float:
        """How long the current outage has lasted, in seconds; 0 if there is none."""
        return max(0.0, time.monotonic() - self._since)


class Checks:
    """Descriptions written through the API, to be read back once Immich could have lost them.

    The first three texts of a library are read back one by one, the others in bulk. After
    it has lost three in a row, it gets no more. Only one thread, the checker, takes from the queue
    and counts.
    """

    def __init__(self) -> None:
        self.written: SimpleQueue[Ending | None] = SimpleQueue()  # None after the last one
        self._waiting: list[Ending | None] = []  # out of the queue, in the order of their writes
        self._checked: Counter[tuple[str, str]] = Counter()
        self._losses: Counter[tuple[str, str]] = Counter()  # in a row

    def next(self, stop: threading.Event) -> list[Ending]:
        """Wait for the next batch to read back; empty at the end, or when stopped."""
        while not (self._waiting and self.written.empty()):
            self._waiting.append(self.written.get())
        written = [ending for ending in self._waiting if ending]
        alone = [w for w in written if self._checked[w.photo.home] < MOST_LOSSES][:1]
        pause = alone[0].at + CHECK_PAUSE - time.monotonic() if alone else CHECK_PAUSE
        if not written or stop.wait(max(0.0, pause)):
            return []
        due = alone or written
        self._waiting = [ending for ending in self._waiting if ending not in due]
        return due

    def count(self, photo: Photo, *, lost: bool) -> bool:
        """Count whether a photo's library kept a text; True if that was one loss too many."""
        self._checked[photo.home] += 1
        self._losses[photo.home] = self._losses[photo.home] + 1 if lost else 0
        return self._losses[photo.home] == MOST_LOSSES

    def check_library(self, photo: Photo) -> None:
        """Skip if the photo's library keeps no descriptions."""
        if self._losses[photo.home] >= MOST_LOSSES:
            raise Skip("library_loses", library=photo.library or "-")


@dataclass(frozen=True, slots=True)
class Run:
    """All that the threads of a run share; each part is thread-safe."""

    config: Config
    stop: Stop
    hosts: Hosts
    patience: Patience
    tally: Tally
    new_library: Callable[[], Library]
    checks: Checks = field(default_factory=Checks)
    taken: Taken = field(default_factory=Taken)
    turn: threading.Lock = field(default_factory=threading.Lock)  # to ask for the next photo
    busy: set[int] = field(default_factory=set)  # threads of workers that have a photo
    # one video at a time, in one thread, as the memory for each stays with its thread
    decoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "decoder"))
    show: Callable[[Ending], None] = lambda ending: None


def wanted(photos: Iterable[Photo], run: Run, *, counts: bool = False) -> Iterator[Photo]:
    """Take the listed photos that this run is to describe, as far as the listing can tell."""
    number, shards = run.config.shard
    for photo in photos:
        if shards > 1 and zlib.crc32(photo.id.encode()) % shards != number - 1:
            continue
        run.tally.listed += counts
        reason = left_alone(photo, run.config)
        if photo.ready and not reason:
            if run.taken.take(photo):
                yield photo
        elif counts:
            run.tally.add(Outcome.SKIPPED if reason else Outcome.NOT_READY, reason)


def listing(run: Run, since: datetime | None = None, *, counts: bool) -> Iterator[Photo | None]:
    """The photos of a listing that need a description; None while a page is being fetched."""
    with closing(run.new_library()) as library, ThreadPoolExecutor(1, "listing") as pool:
        fetch = functools.partial(fetched, library, run, since)
        texts: Counter[str] = Counter()  # rare ones are dropped once there are many
        page: Future[Page] | None = pool.submit(fetch, None)  # fetched while one is in use
        while page:
            while not page.done():
                wait([page], PAGE_WAIT)
                yield None
            photos, cursor = page.result()
            page = pool.submit(fetch, cursor) if cursor else None
            for photo in wanted(photos, run, counts=counts):
                pool.submit(library.close)  # the next page may be a long way off
                yield photo
            if counts:
                texts.update(photo.description for photo in photos)
            if len(texts) > MOST_TEXTS:
                texts = Counter({text: n for text, n in texts.items() if n > 1})
        say_repeated(texts, run.config)


def fetched(library: Library, run: Run, since: datetime | None, cursor: Cursor | None) -> Page:
    """Fetch a page; a service waits for it as long as it takes, a batch run ends without it."""
    service, pause = run.config.mode.monitors, PAGE_PAUSE
    while True:
        try:
            return run.patience(library.page, cursor, since, tries=1 if service else VALUABLE_TRIES)
        except (Retryable, Permanent, Skip) as error:
            if not service:
                raise error.as_kind(Fatal) from error
            log.warning("%s", t("listing_failed", why=error, seconds=f"{pause:g}"))
        if run.stop.wait(pause):
            raise Stopped("stopped")
        pause = min(2 * pause, SWEEP_INTERVAL)


class News:
    """Looks for photos that arrived: at intervals, and soon after a file system event."""

    def __init__(self, library: Library, run: Run, watch: PreviewWatch | None) -> None:
        self._library, self._run, self._watch = library, run, watch
        self._mark: datetime | None = None  # of the latest look
        self._started: datetime | None = None  # only in monitor mode, which ignores older photos
        self._arrived: list[Photo] = []  # the newest is next
        self._next = 0.0  # when to look, by the monotonic clock
        self._next_prompt, self._pause = math.inf, PROMPT_PAUSE
        self._events, self._event_at = 0, -math.inf  # of the watch, up to the latest
        self._complained = False
        self._sweeps, self._next_sweep = 0, time.monotonic() + SWEEP_INTERVAL

    def next(self) -> Photo | None:
        """A photo that arrived, if there is one."""
        interval, now = self._run.config.api_poll_interval, time.monotonic()
        watch = self._watch
        if watch and watch.events > self._events:
            self._events, self._event_at, self._pause = watch.events, now, PROMPT_PAUSE
            self._next_prompt = min(self._next_prompt, now + PROMPT_PAUSE)
        if now >= self._next:
            self._next = now + interval
            found = self._look(prompt=False)
            if found and watch and max(self._event_at, watch.since) < now - interval - SILENCE:
                watch.missed()
        elif now >= self._next_prompt:
            self._pause *= 2
            self._next_prompt = now + self._pause if self._pause < interval else math.inf
            self._look(prompt=True)
        return self._arrived.pop() if self._arrived else None

    def seconds_left(self) -> float:
        """Seconds until the next look or sweep."""
        return max(0.0, min(self._next, self._next_prompt, self._next_sweep) - time.monotonic())

    def _look(self, *, prompt: bool) -> bool:
        """Find what arrived since the last look; True if there was anything."""
        run = self._run
        try:
            now = run.patience(self._library.clock, tries=1)
            if not self._mark:  # what is there already is in the backlog
                self._mark, self._started = now, None if run.config.mode.backlog else now
                return False
            span = PROMPT_SPAN + timedelta(seconds=self._pause) if prompt else UPLOAD_TIME
            since = (now if prompt else min(self._mark, now)) - span
            news = run.patience(self._library.news, since, self._started, tries=1)
        except (Retryable, Permanent, Skip) as error:
            if not self._complained:
                log.warning("%s", t("look_failed", why=error))
            self._complained = True
            return False
        fresh = list(wanted(news, run))
        self._arrived += reversed(fresh)
        self._complained = False
        if not prompt:
            self._mark = now
        return bool(fresh)

    def sweep(self) -> Iterator[Photo | None] | None:
        """Once an hour, a listing of the last two days' uploads; once a day, of all photos."""
        if time.monotonic() < self._next_sweep:
            return None
        self._next_sweep = time.monotonic() + SWEEP_INTERVAL
        if not self._mark:
            return None
        self._sweeps += 1
        if whole := self._sweeps % WHOLE_SWEEP == 0:
            # names may have changed since then; other policies do nothing about that
            self._run.taken.forget(described=self._run.config.policy is Policy.OUTDATED)
        bounds = (self._started, None if whole else self._mark - SWEEP_SPAN)
        return listing(self._run, max(filter(None, bounds), default=None), counts=False)


def stream(run: Run, library: Library) -> Generator[Photo, None, None]:
    """Photos to describe, up to the limit: arrivals first, then listings.

    A batch run ends with its listing. A service has a limit for each day.
    """
    mode, counts, cooldown = run.config.mode, run.tally.counts, run.config.event_cooldown
    listings = [listing(run, counts=True)] if mode.backlog else []
    folder = library.previews if mode.monitors else None
    watch = PreviewWatch(folder, run.stop.news.set, cooldown) if folder else None
    before: dict[date | None, int] = {}  # photos described by the time that each day began
    with closing(watch) if watch else nullcontext():
        news = News(library, run, watch) if mode.monitors else None
        while not run.stop.is_set() and (news or listings):
            run.tally.moved = time.monotonic()
            # who is busy comes first: a story that ends now may count twice, but never not at all
            busy, done = len(run.busy), counts[Outcome.DESCRIBED] + counts[Outcome.UNDONE]
            today = datetime.now(UTC).astimezone().date() if news else None
            left = run.tally.most + before.setdefault(today, done) - done
            if left <= 0 and not news:
                return
            if left <= busy:  # one of those that are being described may fail
                run.stop.nap(1.0)
                continue
            if news and len(listings) < 2 and (sweep := news.sweep()):
                listings.append(sweep)
            if news and (photo := news.next()):
                yield photo
            elif listings:
                current = listings.pop()
                for photo in current:
                    listings.insert(0, current)  # two listings take turns
                    if photo:
                        yield photo
                    break
            elif news:
                run.stop.nap(news.seconds_left())


def story(photo: Photo, library: Library, ai: Ai, run: Run) -> Ending:
    """Take one photo from the listing to its description, or that back.

    Raises Skip if it is left alone, Retryable or Permanent if it fails before a model is asked, and
    Stopped or Fatal if the run ends.
    """
    if run.config.undo:
        return take_back(photo, library, run)
    with ExitStack() as claims:  # each try makes one of its own
        photo = run.patience(lambda: claims.enter_context(library.claimed(photo)))
        if reason := left_alone(photo, run.config) if photo.ready else "not_ready":
            raise Skip(reason)
        run.checks.check_library(photo)
        photo = run.patience(library.with_facts, photo)
        (shown, seconds), asked = pictures(photo, library, run), None
        try:
            ready = (prepared(picture, run.config.max_image_size) for picture in shown)
            asked = Question(question(photo, run.config, len(shown), seconds), tuple(ready))
            said = ai.describe(asked, functools.partial(run.checks.check_library, photo))
            return replace(store(photo, said, library, run), asked=asked)
        except Permanent as error:
            run.tally.unnoted.append((photo, failure_note(photo, error, run.config)))
            return Ending(photo, Outcome.FAILED, error, asked=asked)


def pictures(photo: Photo, library: Library, run: Run) -> tuple[list[bytes], float]:
    """What a model is to see: a preview, or frames of a video and the seconds that it lasts."""
    config = run.config

    def decode() -> tuple[list[bytes], float]:
        if run.stop.is_set():
            raise Stopped("stopped")
        side, end = config.max_image_size or FRAME_SIDE, time.monotonic() + config.timeout
        return frames_of(library.video(photo, end), config.video_frames, side, end)

    if photo.video and config.video_frames > 1:
        try:
            return run.patience(lambda: run.decoder.submit(decode).result(), tries=1)
        except (Retryable, Permanent, Missing) as error:
            log.warning("%s", t("video_still", name=photo.name, id=photo.id, why=error))
    return [settled(photo, library, run)], 0.0


def settled(photo: Photo, library: Library, run: Run) -> bytes:
    """The preview, read again while it is being written: until it is complete or stops changing.

    Raises Retryable if neither happens in time.
    """
    deadline = time.monotonic() + run.config.file_write_timeout
    before: bytes | None = None
    while True:
        data = run.patience(library.preview, photo)
        if data is not None and (picture_type(data)[1] or data == before):
            return data
        if time.monotonic() >= deadline:
            raise Retryable("preview_missing" if data is None else "preview_cut")
        if run.stop.wait(run.config.file_check_interval):
            raise Stopped("stopped")
        before = data


def failure_note(photo: Photo, error: AnalyzeError, config: Config) -> Note:
    """The note for a photo that failed in this run, and perhaps in earlier ones."""
    old, model, prompt = photo.note or Note("", ""), config.model_name, config.prompt_id
    tries = 1 + (old.tries if (old.model, old.prompt) == (model, prompt) else 0)
    why = re.sub(f"{config.secrets}|{UNSAFE}", "…", str(error))  # PostgreSQL's JSON takes no NUL
    # the old text tells whose the description is
    return Note(model, prompt, text=old.text, failed=error.key, why=why, tries=tries)


def store(photo: Photo, said: Said, library: Library, run: Run) -> Ending:
    """Write a description; if the photo's has changed, merge again or leave the photo alone."""
    config, facts = run.config, names_id(photo, run.config)
    for _ in range(LIBRARY_TRIES):
        text = merge(photo, said.text, config)
        was = text_id(photo.description) if library.must_confirm and is_ours(photo) else ""
        note = Note(config.model_name, config.prompt_id, text_id(text), was=was, facts=facts)
        if run.patience(library.write, photo, text, note, tries=VALUABLE_TRIES):
            log.debug("%s (%s), written: %s", photo.name, photo.id, text)
            return Ending(photo, Outcome.DESCRIBED, text=text, note=note, said=said)
        before, photo = photo, run.patience(library.look, photo)
        typed = not undescribed(photo, config) and not config.preserve_human
        if typed or (has_ours(photo) and not has_ours(before)):  # by another instance
            raise Skip("has_description")
    raise Retryable("changed")


def take_back(photo: Photo, library: Library, run: Run) -> Ending:
    """Take back the description of one photo, if it is ours."""
    photo = run.patience(library.look, photo)
    left = unmerge(photo)
    nothing = left == photo.description or left_alone(photo, run.config)
    if nothing or not run.patience(library.write, photo, left, None, tries=VALUABLE_TRIES):
        raise Skip("has_description")
    return Ending(photo, Outcome.UNDONE, text=left)


def attempt(photo: Photo, call: Callable[[*Args], T], *args: *Args) -> T | Ending:
    """The result of a call, or how it ended for its photo, which does not stop the others."""
    try:
        return call(*args)
    except (Stopped, Fatal):
        raise
    except Skip as skip:
        outcome = Outcome.NOT_READY if skip.key == "not_ready" else Outcome.SKIPPED
        return Ending(photo, outcome, skip)
    except Exception as trouble:  # noqa: BLE001 - a bug costs only the photo that meets it
        error = trouble if isinstance(trouble, AnalyzeError) else AnalyzeError("bug", bug=trouble)
        return Ending(photo, Outcome.FAILED, error)


def conclude(ending: Ending, run: Run) -> None:
    """Count a photo's outcome; if that may change, it is retried, but counted once a day."""
    photo, outcome, error = ending.photo, ending.outcome, ending.error
    reason, pause = error.key if error else "", None
    if outcome in (Outcome.FAILED, Outcome.NOT_READY) or reason in MAY_COME_BACK:
        pause = RETAKE_PAUSE if isinstance(error, Retryable | Skip) else math.inf
    if not run.taken.leave(photo, outcome, pause):
        return
    if error and outcome is Outcome.FAILED:
        run.tally.failed.appendleft((photo, error))
        bug = error.fields.get("bug")
        log.error("%s", t("photo_failed", name=photo.name, id=photo.id, why=error), exc_info=bug)
    run.tally.add(outcome, "" if reason == "not_ready" else reason)
    run.show(ending)


def work(photos: Iterable[Photo], library: Library, ai: Ai, run: Run) -> None:
    """One worker: it finishes each photo before it takes the next."""
    with suppress(Stopped):
        for photo in photos:
            ending = attempt(photo, story, photo, library, ai, run)
            conclude(ending, run)
            if run.config.dry_run:
                continue
            if library.must_confirm and ending.outcome in (Outcome.DESCRIBED, Outcome.UNDONE):
                run.checks.written.put(ending)
            attempt(photo, note_failures, library, run)


def note_failures(library: Library, run: Run) -> None:
    """Note what failed, once a described photo shows that others succeed."""
    with suppress(IndexError):  # when nothing is left
        while run.tally.counts[Outcome.DESCRIBED]:
            run.patience(library.remember, *run.tally.unnoted.popleft())


def check_written(run: Run) -> None:
    """The checker: reads back what was written until nothing is left and no worker writes."""
    with suppress(Stopped), closing(run.new_library()) as library:
        while library.must_confirm and (batch := run.checks.next(run.stop)):
            found = attempt(batch[0].photo, read_back, batch, library, run)
            if isinstance(found, Ending):  # the call failed, for all of them
                found = [replace(e, outcome=Outcome.FAILED, error=found.error) for e in batch]
            for before, ending in zip(batch, found, strict=True):
                if ending.error:  # it was counted when its text was written
                    run.tally.add(before.outcome, number=-1)
                    conclude(ending, run)


def read_back(batch: Sequence[Ending], library: ApiLibrary, run: Run) -> list[Ending]:
    """Compare what Immich stored with what was written, and correct the notes and endings."""
    age, photos = time.monotonic() - batch[0].at, [ending.photo for ending in batch]
    found = run.patience(library.read_back, photos, age, tries=VALUABLE_TRIES)
    endings = []
    for before in batch:
        photo = before.photo
        ending = judged(before, found.get(photo.id))
        if ending.outcome is Outcome.FAILED and len(batch) > 1:  # a search may lag
            again = run.patience(library.read_back, [photo], age, tries=VALUABLE_TRIES)
            ending = judged(before, again.get(photo.id))
        if run.checks.count(photo, lost=ending.outcome is Outcome.FAILED):
            log.error("%s", t("library_loses", library=photo.library or "-"))
        if ending.note != before.note or not (ending.note or ending.error):
            run.patience(library.remember, photo, ending.note, tries=VALUABLE_TRIES)
        endings.append(ending)
    return endings


def judged(ending: Ending, text: str | None) -> Ending:
    """The ending of a photo by the text that is read back; the same but for its note if kept.

    The text is lost if the description is empty or the old one again. Any other description
    is by a person who edited it meanwhile.
    """
    note, photo, added = ending.note, ending.photo, ending.said.text if ending.said else ""
    if text is None:
        return replace(ending, outcome=Outcome.SKIPPED, error=Skip("photo_gone"))
    same = text.strip() == ending.text.strip()
    if same or (added and added in text and added not in photo.description):
        kept = note and replace(note, text=text_id(text) if same else note.text, was="")
        return replace(ending, note=kept)
    if text.strip() not in ("", photo.description.strip()):
        return replace(ending, outcome=Outcome.SKIPPED, error=Skip("has_description"))
    why = Permanent("not_kept")
    if note:
        before = photo.note.text if photo.note else ""  # which may be back
        note = replace(note, text=before, was="", failed=why.key, why=str(why), tries=MOST_TRIES)
    return replace(ending, outcome=Outcome.FAILED, error=why, note=note)


def run_all(workers: Sequence[Callable[[], None]], run: Run) -> None:
    """Run them and the checker until the stream ends; an error in one of them ends them all."""
    with ThreadPoolExecutor(len(workers) + 1, "worker") as pool:
        jobs = [*map(pool.submit, workers), pool.submit(check_written, run)]
        for job in jobs:
            job.add_done_callback(lambda done: run.stop.set() if done.exception() else None)
        wait(jobs[: len(workers)])
        run.checks.written.put(None)
    for job in jobs:
        job.result()


# ------------------------------------------------------------------------------
# 9 Process: signals, output, health, main. The only place that reads the environment.


class Signals:
    """The first SIGINT or SIGTERM ends the stream; the second, or the end of `grace`, the process.

    A thread waits for them, as a signal handler that sets an Event can deadlock. It must be the
    first thread, so that the others inherit the blocked signals.
    """

    def __init__(self, stop: threading.Event) -> None:
        self.number = 0  # of the signal that came
        self.grace = 30.0
        self.sum_up: Callable[[int], object] = int  # reports before `grace` ends the process
        self._stop = stop
        self._wanted = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._wanted)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        self.number = signal.sigwait(self._wanted)
        timer = threading.Timer(self.grace, self._quit, (self.number, self.sum_up))
        timer.daemon = True
        timer.start()
        log.handlers[0].acquire()  # no line about the end comes before this one
        self._stop.set()
        log.warning("%s", t("finishing", signal=signal.Signals(self.number).name))
        log.handlers[0].release()
        self._quit(signal.sigwait(self._wanted))

    def _quit(self, number: int, last: Callable[[int], object] = int) -> None:
        threading.Timer(1.0, os._exit, (128 + number,)).start()  # even if nobody reads the output
        last(128 + number)
        tqdm.get_lock().acquire()  # from here on, the progress bar is not drawn
        with suppress(OSError):  # without a terminal, there is none to wipe
            os.write(2, b"\r" + b" " * os.get_terminal_size(2).columns + b"\r")
        os._exit(128 + number)

    def exit_code(self, mode: Mode) -> int:
        """The exit code after a signal; 0 for a service, which usually ends by one."""
        return 0 if mode.monitors else 128 + self.number


class Lines(logging.Handler):
    """Writes log lines to standard error, above the progress bar if there is one.

    No file name or server message can forge a line, control the terminal or reveal a secret.
    """

    secrets: str  # as in Config
    lead = ""  # of each line

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        record.msg, record.args = re.sub(UNSAFE, "\ufffd", record.getMessage()), ()
        text = re.sub(self.secrets, "…", self.format(record))  # a traceback keeps its lines
        text = re.sub("(?m)^", self.lead.format(PRIORITIES[record.levelno]), text)
        with suppress(OSError):  # if nobody reads the log any more, the work goes on
            tqdm.write(text, file=sys.stderr)


PRIORITIES = {50: 2, 40: 3, 30: 4, 20: 6, 10: 7}  # sd-daemon(3), by the level of logging


def set_up_logging(config: Config | None = None) -> None:
    """Choose the level and format of the log by who reads it.

    People on a terminal get messages, cron only gets problems, a service writes a log with
    times, and systemd's journal gets its priorities.
    """
    tqdm.set_lock(threading.RLock())  # the default, for processes, starts one on Python 3.14
    terminal, service = sys.stderr.isatty(), bool(config and config.mode.monitors)
    here = os.fstat(sys.stderr.fileno())
    form = "%(message)s" if terminal or not service else "%(asctime)s %(levelname)s %(message)s"
    handler = Lines()
    if os.environ.get("JOURNAL_STREAM") == f"{here.st_dev}:{here.st_ino}":
        form, handler.lead = "%(message)s", "<{}>"
    handler.secrets = config.secrets if config else "(?!)"  # which matches nothing
    handler.setFormatter(logging.Formatter(form))
    log.handlers[:], log.propagate = [handler], False
    usual = logging.INFO if terminal or service else logging.WARNING
    log.setLevel((config and config.log_level) or usual)
    # what watchdog misses is found anyway, and it warns of harmless races
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="watchdog")


BAR = "{bar} {n_fmt}/{total_fmt} {remaining}{postfix}"
ENDLESS = "{n_fmt} {unit} [{elapsed}{postfix}]{bar}"  # where the total is unknown


def show_progress(tally: Tally, over: threading.Event) -> None:
    """Draw the progress bar every second until the end; skipped photos are no progress."""
    form = {"unit": t("photos"), "bar_format": ENDLESS, "dynamic_ncols": True, "leave": False}
    last = False
    with suppress(OSError), tqdm(**form) as bar:  # if nobody reads it any more
        # return to the start of the line at once, so that an echoed ^C is drawn over
        bar.sp = lambda line: bar.fp.write(f"\r{line.ljust(bar.ncols or 79)}\r")
        while not last:
            last = over.wait(1.0)
            left_out = tally.counts[Outcome.SKIPPED] + tally.counts[Outcome.NOT_READY]
            bar.n = tally.counts.total() - left_out
            bar.total = min(max(0, (tally.total or 0) - left_out), tally.most)
            bar.bar_format = BAR if 0 < bar.total >= bar.n else ENDLESS
            hourly = f"{3600 * bar.n / max(bar.format_dict['elapsed'], 1.0):.0f}"
            bar.set_postfix_str(t("pace", rate=hourly, failed=tally.counts[Outcome.FAILED]))


def harmless(error: AnalyzeError) -> str:
    """An error in our words alone, without what a server or a model said."""
    return t(error.key, **error.fields | {"why": "…", "said": ""})


def show_text(ending: Ending, column: str) -> None:
    """Print the description that a photo would get; for `--undo`, log what would be left."""
    photo, text = ending.photo, ending.text
    if ending.outcome is Outcome.UNDONE:
        shown = json.dumps(text, ensure_ascii=False)
        log.warning("%s", t("would_undo", name=photo.name, id=photo.id, text=shown))
    elif ending.outcome is Outcome.DESCRIBED:
        place = "\n".join(filter(None, (photo.link or photo.id, column)))
        said = f"{one_line(photo.name)}\n{place}\n\n{text}\n"
        with suppress(OSError):  # the reader may be gone
            tqdm.write(re.sub(rf"(?!\n){UNSAFE}", "\ufffd", said), file=sys.stdout)


class Report:
    """The page of `--report`: each photo is written over its end, and a new end behind that."""

    def __init__(self, file: str, columns: Sequence[str], tally: Tally, secrets: str) -> None:
        self.photos: list[str] = []  # ids, by row
        self._compares, self._tally = len(columns) > 1, tally
        self._lock, self._file, self._size = threading.Lock(), file, 0  # bytes before the end
        said = {"t": t, "lang": _language, "version": __version__, "hide": re.compile(secrets).sub}
        self._page = template(data_file("words.jinja", "report.jinja"), html=True).make_module(said)
        self._head = self._page.head(columns)
        self._save(b"", "ab")  # whether it can be written, before a model is asked

    def add(self, column: int, ending: Ending) -> None:
        """Add what became of a photo in a column; in the first one, the photo itself as well."""
        photo, asked, preview, piece = ending.photo, ending.asked, "", ""
        if ending.outcome not in (Outcome.DESCRIBED, Outcome.FAILED):
            return
        if asked and column == 1:
            with suppress(AnalyzeError, OSError):  # a model may read what Pillow cannot
                small = sheet(asked.pictures, PREVIEW_SIDE, quality=70)
                preview = f"data:image/jpeg;base64,{small.base64.decode()}"
        after = replace(photo, description=ending.text, note=Note("", "", text_id(ending.text)))
        with self._lock:
            if column == 1:
                self.photos.append(photo.id)
                piece = self._page.photo(len(self.photos), photo, preview, whose(photo))
            row = len(self.photos) - self.photos[::-1].index(photo.id)
            self.write(piece + self._page.text(row, column, ending, whose(after)))

    def write(self, piece: str = "") -> None:
        """Write a piece of the page, if any, and its end."""
        seconds = time.monotonic() - self._tally.began
        data, self._head = (self._head + piece).encode("utf-8", "replace"), ""
        end = self._page.tail(self._tally, seconds, self._compares).encode().ljust(2000)
        self._save(data + end, "r+b" if self._size else "wb")  # over an end that may be longer
        self._size += len(data)

    def _save(self, data: bytes, mode: str) -> None:
        try:
            with open(self._file, mode) as file:
                file.seek(self._size)
                file.write(data)
        except OSError as error:
            raise Fatal("unwritable_file", file=self._file, why=error.strerror) from error


AWAY_LIMIT = 300.0  # seconds that Immich or the database may be down before the run is unhealthy
LONGEST_CALL = 300.0  # seconds that a PostgreSQL query may take
STALL_LIMIT = 60.0  # seconds beyond the longest normal wait
POST_INTERVAL = 10.0
PREVIEW_SIDE = 320  # pixels of a preview in a report
IDLE = 1.0  # seconds without a photo after which a worker closes its connection
LINE_INTERVAL = 3600.0  # seconds between two summary lines


class Status:
    """The state of a run, in the same words for /health, /metrics and systemd."""

    def __init__(self, config: Config, hosts: Hosts, waits: Patience, tally: Tally) -> None:
        self.ready = False  # whether the start-up check is over
        self.waits = waits  # what waits for a library or, at the start, for a model host
        self._tally, self._hosts, self.hidden = tally, hosts, f"{config.secrets}|{UNSAFE}"
        usual = (config.timeout, config.api_poll_interval, config.retry_delay_seconds)
        self._longest = max(*usual, config.file_write_timeout, LONGEST_CALL) + STALL_LIMIT

    def trouble(self) -> str:
        """Why the run is unhealthy, in a word; "" if it is healthy, as slow and idle runs are."""
        away, moved = self.waits.away(), max(self._tally.moved, self._hosts.moved)
        if not self.ready:
            return "starting"
        if away > AWAY_LIMIT:
            return "library_away"
        if all(host.why for host in self._hosts.seen()):
            return "no_model_host"
        return "stalled" if not away and time.monotonic() - moved > self._longest else ""

    def waiting(self, tell: Callable[[Any], str] = str) -> str:
        """What the run waits for, with the reasons as `tell` puts them; "" if it can go on."""
        if why := self.waits.why:
            return t("waiting", why=tell(why))
        troubles = [host.why for host in self._hosts.seen()]
        if self.ready and all(troubles):
            return t("no_host", why="; ".join(map(tell, troubles)))
        return "" if self.ready else t("checking")

    def figures(self) -> dict[str, Any]:
        """What the pages at the health port are made of."""
        now = time.monotonic()
        slots = range(int(now // SLOT) - SLOTS + 1, int(now // SLOT) + 1)
        return {
            "t": t,
            "lang": _language,
            "waiting": self.waiting(harmless),
            "slots": [max(0, self._tally.slots[slot]) for slot in slots],
            "harmless": harmless,
            "trouble": self.trouble(),
            "version": __version__,
            "away": self.waits.away() if self.ready else 0.0,
            "hosts": self._hosts.seen(),
            "tally": self._tally,
            "now": now,
            "public": public,
            "json": functools.partial(json.dumps, ensure_ascii=False),
        }


def serve_health(status: Status, host: str, number: int) -> None:
    """Answer GET for the pages in threads; if the port is in use, only these are lost."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a client that says nothing

        def do_GET(self) -> None:
            pages = toml("pages.toml")
            code, kind, body = 404, "text/plain", " ".join(pages) + "\n"
            if self.path in pages:
                (files, kind), figures = pages[self.path], status.figures()
                code = 503 if self.path == "/health" and figures["trouble"] else 200
                body = template(data_file(*files), "html" in kind).render(figures)
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body.encode("utf-8", "replace"))

        def log_message(self, *_: object) -> None:
            """Do not log requests."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server_bind = socketserver.TCPServer.server_bind  # HTTPServer's looks our name up in DNS

        def handle_error(self, *_: object) -> None:
            """Do not log clients that hang up."""

    try:
        server = Server((host, number), Handler)
    except OSError as error:
        log.error("%s", t("no_health", host=host, port=number, why=error.strerror))
    else:
        threading.Thread(target=server.serve_forever, name="health", daemon=True).start()


def ask_health(config: Config) -> int:
    """Ask the tool running with these settings for its health; 0 if healthy or without a port."""
    if not config.health_port:
        return 0
    host = f"[{config.health_host}]" if ":" in config.health_host else config.health_host
    url = f"http://{host}:{config.health_port}/health"  # 0.0.0.0 and :: reach this machine
    with closing(Session(direct=".*")) as session:
        try:
            http(session, "GET", url, server="health", timeout=10.0)
        except AnalyzeError as error:
            log.critical("%s", error)
            return 1
    return 0


def notify(message: str) -> None:
    """Tell systemd the state of the service, by sd_notify(3); do nothing if nobody listens."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), re.sub("^@", "\0", address))


def keep_posted(status: Status, tally: Tally, stop: Stop) -> None:
    """Tell systemd the state of the run, and that it moves, until the end; log it once an hour."""
    watchdog = float(os.environ.get("WATCHDOG_USEC") or math.inf) / 1e6
    told, said, settled = time.monotonic(), str(tally), False
    while True:
        if not settled and (status.ready or status.waits.why):  # no outage may hold up the boot
            settled = True
            notify("READY=1")
        alive = "" if status.trouble() == "stalled" else "\nWATCHDOG=1"
        notify("STATUS=" + re.sub(status.hidden, "…", status.waiting() or str(tally)) + alive)
        if stop.wait(min(watchdog / 2, POST_INTERVAL if status.ready else 1.0)):
            break
        if time.monotonic() >= told + LINE_INTERVAL and said != str(tally):
            told, said = time.monotonic(), str(tally)
            log.info("%s", said)
    notify("STOPPING=1")


def in_turn(photos: Iterator[Photo], library: Library, run: Run) -> Iterator[Photo]:
    """One worker's share of a stream; it holds `turn` while it waits for the next photo."""
    while True:
        if not run.turn.acquire(timeout=IDLE):
            library.close()
            run.turn.acquire()
        try:
            photo = next(photos, None)
            run.busy.add(threading.get_ident())
        finally:
            run.turn.release()
        if not photo:
            return
        yield photo
        run.busy.discard(threading.get_ident())


def describe_library(run: Run) -> None:
    """Describe what is there and what arrives, with as many workers as the settings ask for."""
    config, tally = run.config, run.tally
    tally.most = config.limit or (10 if config.dry_run and not config.undo else math.inf)

    def worker() -> None:
        with closing(run.new_library()) as library, closing(Ai(config, run.hosts, run.stop)) as ai:
            work(in_turn(photos, library, run), library, ai, run)

    with ExitStack() as stack:
        library = stack.enter_context(closing(run.new_library()))
        terminal = sys.stderr.isatty()
        shown = tally.total is None and (terminal or config.health_port or config.report)
        if config.mode.backlog and shown:
            with suppress(AnalyzeError):  # optional, as not every key may ask for it
                tally.total = library.total() // config.shard[1]
        if terminal:
            over, pool = threading.Event(), stack.enter_context(ThreadPoolExecutor(1, "progress"))
            pool.submit(show_progress, tally, over)
            stack.callback(over.set)
        photos = stack.enter_context(closing(stream(run, library)))
        stack.enter_context(run.decoder)
        # two workers for each place at a host, so that a photo that waits does not hold up others
        run_all([worker] * min(2 * config.max_concurrent, library.most_workers), run)


def serve(config: Config, stop: Stop, tally: Tally, show: Callable[[Ending], None]) -> bool:
    """Carry out one run, from its settings to its end; True if all photos could be reached."""
    service, longest = config.mode.monitors, config.wait_timeout or math.inf
    passing = (Unavailable, Unexpected) if service else (Unavailable,)
    at_start = functools.partial(Patience, stop, config.wait_retry_interval, passing=passing)
    limit = math.inf if service else longest
    hosts = Hosts(config.hosts, config.max_concurrent, config.unavailable_duration, limit, service)
    status = Status(config, hosts, at_start(longest if config.wait_for_immich else 0.0), tally)
    if config.health_port:
        serve_health(status, config.health_host, config.health_port)
    if config.access_ambiguous:
        log.info("%s", t("both_given_api" if config.access == API else "both_given"))
    if service:
        threading.Thread(target=keep_posted, args=(status, tally, stop), daemon=True).start()
    named = () if tally.counts else config.photo  # what was described for a column may be gone
    new_library, complete = status.waits(open_library, config, named)
    if config.preflight_model_check and not config.undo:
        status.waits = at_start(longest if service else 0.0)
        with closing(Ai(config, hosts, stop)) as ai:
            status.waits(ai.check)
    status.waits = Patience(stop, max(1.0, config.retry_delay_seconds), limit)
    status.ready = True
    if service:
        log.info("%s", t("ready"))
    describe_library(Run(config, stop, hosts, status.waits, tally, new_library, show=show))
    return complete()


def columns_of(arguments: Sequence[str], config: Config) -> dict[str, Config]:
    """The settings to compare, one for each model and file with a prompt, by these names."""
    if not config.compare and len(config.prompt_files) < 2:
        return {config.model_name: config}
    found: dict[str, Config] = {}
    for model in (config.model_name, *config.compare):
        for file in config.prompt_files or ("",):
            more = [f"--model-name={model}", *([f"--prompt-file={file}"] if file else [])]
            found[", ".join(filter(None, (model, file)))] = parse([*arguments, *more], os.environ)
    return found


def serve_columns(columns: Mapping[str, Config], stop: Stop, tally: Tally) -> bool:
    """Carry out a run for each column, all about the photos of the first; True as from `serve`."""
    config, *others = columns.values()
    file = config.report or (os.devnull if others else "")
    report = Report(file, [*columns], tally, config.secrets) if file else None

    def show(column: int, ending: Ending) -> None:
        if config.dry_run:
            show_text(ending, [*columns][column - 1] if others else "")
        if report:
            report.add(column, ending)

    for other in others if config.preflight_model_check else ():  # before any model is asked
        with closing(Ai(other, Hosts(other.hosts, 1, other.unavailable_duration), stop)) as ai:
            ai.check()
    complete = serve(config, stop, tally, functools.partial(show, 1))
    for column, other in enumerate(others, 2):
        if report and report.photos and not stop.is_set():
            photos = tuple(report.photos)
            same = replace(other, photo=photos, album=(), limit=len(photos), health_port=0)
            same = replace(same, policy=Policy.ALL, retry_failed=True)  # whatever its notes say
            serve(same, stop, tally, functools.partial(show, column))
    if report:
        report.write()
    return complete


def show_prompt(config: Config) -> int:
    """Print what would be asked about one photo, without asking a model or writing anything."""
    with closing(open_library(config)[0]()) as library:
        photo = library.with_facts(find(str(config.show_prompt), library, config))
    with suppress(OSError):  # the reader may be gone
        sys.stdout.write(question(photo, config, config.video_frames if photo.video else 1) + "\n")
    return 0


def check_up(config: Config, stop: Stop) -> int:
    """Print whether all is in place, and write nothing; 2 if a run would not work."""
    told = dict[str, Any](library={}, trouble=None, config=config, t=t, public=public, toml=toml)
    picture = plain_picture(PLAIN_SIZE)
    try:
        with closing(open_library(config, config.photo)[0]()) as library:
            told["library"] = library.about()
            samples = told["library"]["samples"][:3]
            for tried, (photo, source) in enumerate(samples, 1):  # some may be broken
                with suppress(*(Skip, Retryable, Permanent) * (tried < len(samples))):
                    data = library.preview(Photo(photo, "", "", source))
                    picture = prepared(data or b"", config.max_image_size)
                    break
    except AnalyzeError as error:
        told["trouble"] = error
    asked = Question(question(Photo("", "", "", ""), config), (picture,))
    with closing(Ai(config, Hosts(config.hosts, 1, 0.0), stop)) as ai:
        hosts = [ai.about(url, asked) for url in config.hosts]
    told |= {"hide": re.compile(f"{config.secrets}|{UNSAFE}").sub, "hosts": hosts}
    told["env"] = {name for name, text in os.environ.items() if text.strip()}
    with suppress(OSError):  # the reader may be gone
        page = template(data_file("words.jinja", "check.jinja"))
        sys.stdout.write(page.render(told, fields=fields(config)))
    return 2 if told["trouble"] or all(host["trouble"] for host in hosts) else 0


def sum_up(config: Config, tally: Tally, code: int) -> None:
    """Log the final summary, just before the end."""
    level = logging.WARNING if code or config.undo else logging.INFO
    spent = tqdm.format_interval(time.monotonic() - tally.began)
    if config.final_output:
        if number := tally.reasons[Outcome.SKIPPED, "failed_before"]:
            log.warning("%s", t("tally_failed_before", number=number))
        log.log(level, "%s", t("tally_time", tally=tally, time=spent))


def let_go() -> None:
    """Drop what nobody reads, or Python 3.14 ends with a complaint and an exit code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return one of the exit codes at the top of this file."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - closed by the caller
    sys.stdout = sys.stdout or sys.stderr
    atexit.register(let_go)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # for any letter, at once
    stop, tally = Stop(), Tally()
    signals = Signals(stop)
    arguments = sys.argv[1:] if argv is None else list(argv)
    set_up_logging()
    try:
        use_language(language(arguments, os.environ))
        config = parse(arguments, os.environ)
        use_language(config.lang)
        set_up_logging(config)
        for notice in config.notices:
            log.warning("%s", notice)
        if config.healthcheck:
            return ask_health(config)
        if config.check or config.show_prompt:
            signals.grace = 0.0  # as no photo is in progress
            return check_up(config, stop) if config.check else show_prompt(config)
        tally.form += "_undo" * config.undo + "_dry_run" * config.dry_run
        signals.grace, signals.sum_up = config.grace, functools.partial(sum_up, config, tally)
        complete = serve_columns(columns_of(arguments, config), stop, tally)
        code = 0 if complete and not tally.counts[Outcome.FAILED] else 1
    except Stopped:
        return signals.exit_code(config.mode)
    except AnalyzeError as error:
        log.critical("%s", error)
        if not tally.counts:
            return 2
        code = 2
    sum_up(config, tally, code)
    return signals.exit_code(config.mode) if signals.number else code


if __name__ == "__main__":
    sys.exit(main())
