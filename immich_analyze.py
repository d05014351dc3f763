#!/usr/bin/env python3
"""Give every photo of an Immich library a description.

A vision model on the user's own machine looks at the preview that Immich made,
and what it says is written back, so that search finds the photo by what is on it:

    arrivals, backlog ──► preview ──► model host ──► description ──► Immich
       └─ one stream, pulled by a few identical workers; each takes a photo
          through all four steps alone, with connections of its own

What still lacks a description is the work; there is no state besides Immich. The
modes differ only in what the stream brings, and stopping means that it ends. The
sections below follow the way of a photo, and each uses only the ones above it.

Exit codes: 0 all well, nothing to do, or a service that was asked to stop · 1 some
photos failed · 2 the settings or the surroundings are wrong and nothing will work ·
128+n interrupted by signal n.
"""

from __future__ import annotations

import argparse
import base64
import errno
import functools
import heapq
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import socket
import socketserver
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from hashlib import blake2b, sha256
from http.cookiejar import DefaultCookiePolicy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import configargparse
import psycopg2
import psycopg2.errors
import psycopg2.extensions
import requests
from PIL import Image
from tqdm import tqdm
from watchdog.events import (
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

__version__ = "0.1.0"

T = TypeVar("T")
log = logging.getLogger("immich_analyze")


# ------------------------------------------------------------------------------
# 1 Messages: texts for people, in their language. Knows no key's text.
# ------------------------------------------------------------------------------

LANGUAGES = ("en", "ru")
CATALOGUE_FOLDERS = ("i18n", "immich_analyze_i18n")  # in a checkout, once installed
_language = "en"


@functools.cache
def catalogue(language: str) -> dict[str, str]:
    """Texts by key, from the file that lies beside this one."""
    here = Path(__file__)
    files = (here.with_name(folder) / f"{language}.json" for folder in CATALOGUE_FOLDERS)
    file = next(file for file in files if file.is_file())
    texts: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return texts


def use_language(code: str) -> None:
    """Choose the language of all texts; called by main before any thread."""
    global _language
    _language = code


def t(key: str, **fields: object) -> str:
    """Text for people, in their language; English where a text is missing."""
    text = catalogue(_language).get(key) or catalogue("en")[key]
    return text.format(**fields)


# ------------------------------------------------------------------------------
# 2 Errors: who is to blame decides what happens next. They carry keys, not text.
# ------------------------------------------------------------------------------


class AnalyzeError(Exception):
    """Anything that went wrong, as a message key with its fields."""

    def __init__(self, key: str, **fields: object) -> None:
        super().__init__(key)
        self.key = key
        self.fields = fields

    def __str__(self) -> str:
        return t(self.key, **self.fields)


class Retryable(AnalyzeError):
    """This photo, another try may work: after `pause` seconds, if that is known."""

    def __init__(self, key: str, *, pause: float | None = None, **fields: object) -> None:
        super().__init__(key, **fields)
        self.pause = pause


class HostDown(Retryable):
    """Not the photo's fault: whoever should have answered is away or overloaded."""


class Permanent(AnalyzeError):
    """This photo will never work; the others may."""


class Gone(AnalyzeError):
    """The photo was deleted, locked or taken away meanwhile: nothing left to do."""


class Fatal(AnalyzeError):
    """Nothing will work until a person acts: at this host, with this key, or at all."""


class Unexpected(Fatal):
    """Nothing this server says when it is well: a wrong address, or a passing state.

    At the start it is as final as any Fatal; what has worked before is waited for.
    """


class Stopped(AnalyzeError):
    """Asked to stop while waiting."""


# ------------------------------------------------------------------------------
# 3 Settings: flags, environment and file become one frozen record. Opens nothing
#   but the configuration file and files that hold a secret.
# ------------------------------------------------------------------------------


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
        """Whether it goes on for ever with what arrives: a service."""
        return self is not Mode.BATCH


class Access(StrEnum):
    """How the library is reached."""

    DATABASE = "database"
    API = "immich-api"


class Policy(StrEnum):
    """Which photos get a text."""

    NONE = "none"  # those without one
    MISSING_AI = "missing-ai"  # and those without ours, which is added to a person's
    OUTDATED = "outdated"  # those without one, and ours by another model or prompt
    ALL = "all"


PROMPT = (
    "Create a detailed description for the image for proper image search functionality."
    " In the response, provide only the description without introductory words."
    " Also specify the image format (Wallpaper, Screenshot, Drawing, City photo, Selfie, etc.)."
    " The format must be correct."
    " If in doubt, name the most likely option and don't think too long."
)
INTERFACES = ("ollama", "llamacpp")
CONFIG_FILES = ("/etc/immich-analyze.conf", "~/.config/immich-analyze.conf")
OTHER_NAMES = {
    "IMMICH_ANALYZE_IMMICH_API_URL": "IMMICH_API_URL",
    "IMMICH_ANALYZE_IMMICH_API_KEYS": "IMMICH_API_KEY",
    "IMMICH_ANALYZE_IMMICH_API_KEYS_FILE": "IMMICH_API_KEY_FILE",
}
DB_KEYWORDS = {  # Immich's own variables: keyword of libpq and default
    "DB_HOSTNAME": ("host", "database"),
    "DB_PORT": ("port", "5432"),
    "DB_USERNAME": ("user", "postgres"),
    "DB_PASSWORD": ("password", ""),
    "DB_DATABASE_NAME": ("dbname", "immich"),
    "DB_SSL_MODE": ("sslmode", ""),
}
# In logging's numbers; `warn` and `trace` as in RUST_LOG.
LOG_LEVELS = {"error": 40, "warning": 30, "warn": 30, "info": 20, "debug": 10, "trace": 10}


@dataclass(frozen=True, slots=True)
class Config:
    """What was asked. Durations are seconds; secrets never show in its repr."""

    mode: Mode
    policy: Policy
    preserve_human: bool  # our text in a block of its own, all else as it was
    retry_failed: bool
    undo: bool
    dry_run: bool
    access: Access
    access_ambiguous: bool  # both libraries were given, the database was taken
    immich_root: Path
    postgres_url: str = field(repr=False)
    immich_api_url: str = field(repr=False)
    immich_api_keys: tuple[str, ...] = field(repr=False)
    api_poll_interval: float
    interface: str
    model_name: str
    hosts: tuple[str, ...] = field(repr=False)
    api_key: str = field(repr=False)
    prompt: str
    think: bool
    max_tokens: int
    max_image_size: int  # pixels of the longer side, 0 = as Immich made it
    max_concurrent: int
    shard: tuple[int, int]  # which, from 1 on, of how many
    timeout: float
    max_retries: int  # 0 = no limit
    retry_delay_seconds: float
    unavailable_duration: float
    file_write_timeout: float
    file_check_interval: float
    event_cooldown: float
    wait_for_immich: bool
    wait_timeout: float  # 0 = no limit
    wait_retry_interval: float
    health_port: int  # 0 = off
    health_host: str
    healthcheck: bool
    grace: float
    final_output: bool
    lang: str
    log_level: int | None  # None = by where the output goes

    @property
    def prompt_id(self) -> str:
        """What notes call the prompt: the first 12 hex digits of its SHA-256."""
        return sha256(self.prompt.encode()).hexdigest()[:12]


def language(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """Language of the texts, needed before the options can be parsed."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--lang", nargs="?", default=environ.get("IMMICH_ANALYZE_LANG"))
    chosen = (finder.parse_known_args(argv)[0].lang or "").lower()
    if chosen in LANGUAGES:
        return chosen
    locale = next((v for n in ("LC_ALL", "LC_MESSAGES", "LANG") if (v := environ.get(n))), "")
    return locale[:2] if locale[:2] in LANGUAGES else "en"


def number(least: float, *, whole: bool = False, above: bool = False) -> Callable[[str], float]:
    """Converter for a finite number from `least` on (or strictly above it)."""

    def convert(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
            valid = math.isfinite(value) and (value > least or (value == least and not above))
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            key = "not_a_whole_number" if whole else "not_above" if above else "not_a_number"
            raise argparse.ArgumentTypeError(t(key, value=text, least=f"{least:g}"))
        return value if whole else min(value, threading.TIMEOUT_MAX)

    return convert


def port(text: str) -> int:
    """Converter for a TCP port, 0 for none."""
    value = int(number(0, whole=True)(text))
    if value > 65535:
        raise argparse.ArgumentTypeError(t("not_a_port", value=text))
    return value


def shard(text: str) -> tuple[int, int]:
    """Converter for a share of the photos such as 2/5, the second of five."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(t("not_a_shard", value=text))
    return number, count


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Converter for a word out of a list."""

    def convert(text: str) -> str:
        if text.lower() not in names:
            raise argparse.ArgumentTypeError(t("not_one_of", value=text, names=", ".join(names)))
        return text.lower()

    return convert


def public(url: str) -> str:
    """A URL as it may be shown: without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def web_address(text: str) -> str:
    """Converter for an http(s) address; `http://` may be left out."""
    url = text.strip() if "://" in text else f"http://{text.strip()}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and (parts.port or True)
        valid = valid and not (parts.hostname or "0").isdecimal()  # a port taken for a name
    except ValueError:
        valid = False
    if not valid or re.search(r"\s|[/?#].*@", url.partition("://")[2]):
        shown = re.sub(r".*@|[?#].*", "", text, flags=re.S)  # the rest may be a password
        raise argparse.ArgumentTypeError(t("not_an_address", value=shown))
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def without_end(url: str, end: str) -> str:
    """An address without the end of its path that people often give too."""
    return url.removesuffix(end) if urlsplit(url).path.endswith(end) else url


def words(text: str) -> tuple[str, ...]:
    """Converter for a comma-separated list; repeats are dropped."""
    return tuple(dict.fromkeys(word for part in text.split(",") if (word := part.strip())))


def web_addresses(text: str) -> tuple[str, ...]:
    """Converter for a comma-separated list of addresses."""
    addresses = tuple(dict.fromkeys(web_address(word) for word in words(text)))
    if not addresses:
        raise argparse.ArgumentTypeError(t("not_an_address", value=""))
    return addresses


def opposite(switch: str) -> str:
    """The other setting of a switch given by word; nonsense stays, to be complained about."""
    off = {"true": "no", "yes": "no", "on": "no", "1": "no"}
    return (off | dict.fromkeys(("false", "no", "off", "0"), "yes")).get(switch.lower(), switch)


class FileParser(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """`key = value` lines; a list may be written [a, b].

    An error names no line's text, as it may hold a secret.
    """

    def parse(self, stream: Any) -> dict[str, str]:
        try:
            items = super().parse(stream)
        except (configargparse.ConfigFileParserException, UnicodeDecodeError) as error:
            raise Fatal("bad_config_file", file=stream.name) from error
        settings = {}
        for name, value in items.items():
            key = name.lstrip("-")
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            if key.startswith("no-") and opposite(text) != text:
                key, text = key.removeprefix("no-"), opposite(text)
            settings[key] = text
        return settings


def open_config(file: str) -> IO[str]:
    """Open a configuration file; Fatal if that cannot be done."""
    try:
        return open(file, encoding="utf-8")
    except OSError as error:
        raise Fatal("unreadable_file", file=file, why=error.strerror) from error


class Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """Reports a wrong setting as Fatal, in one line."""

    def error(self, message: str) -> NoReturn:
        if isinstance(cause := sys.exception(), Fatal):
            raise cause
        name, _, problem = message.removeprefix("argument ").partition(": ")
        if problem == "expected one argument":
            problem = t("value_missing")
        elif problem.startswith("ignored explicit argument"):
            problem = t("value_unwanted")
        elif name.startswith("Unexpected value for "):
            name, problem = name.removeprefix("Unexpected value for "), t("not_a_switch")
        raise Fatal("bad_setting", problem=f"{name}: {problem}")


def build_parser() -> Parser:  # noqa: PLR0915 - a table, one row an option
    """The table of options: name, variable, converter, default."""
    parser = Parser(
        prog="immich-analyze",
        usage="%(prog)s [options]",
        description=t("help_description"),
        epilog=t("help_epilog"),
        add_help=False,
        allow_abbrev=False,
        add_config_file_help=False,
        add_env_var_help=False,
        default_config_files=CONFIG_FILES,
        config_file_open_func=open_config,
        config_file_parser_class=FileParser,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32),
    )

    def add(group: Any, *flags: str, env: str | None = None, **more: Any) -> None:
        """Add an option; its variable is IMMICH_ANALYZE_<OPTION> unless named."""
        option = flags[0].lstrip("-").replace("-", "_")
        variable = f"IMMICH_ANALYZE_{option.upper()}" if env is None else env
        text = t(f"help_{option}")
        default = more.get("default")
        if default not in (None, False, argparse.SUPPRESS):
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            text += f" ({shown})".replace("%", "%%")
        text += f" [{variable}]" if variable else ""
        group.add_argument(*flags, env_var=variable, help=text, **more)

    switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    seconds = number(0, above=True)

    work = parser.add_argument_group(t("help_group_work"))
    mode = work.add_mutually_exclusive_group()
    add(mode, "--mode", type=one_of(list(Mode)), default=Mode.BATCH.value, metavar="MODE")
    for flag, value in (("-m", Mode.MONITOR), ("-c", Mode.COMBINED)):
        more = {"const": value.value, "default": argparse.SUPPRESS}
        add(mode, f"--{value}", flag, env="", action="store_const", dest="mode", **more)
    overwrite = work.add_mutually_exclusive_group()
    add(overwrite, "--overwrite-policy", "-O", type=one_of(list(Policy)), metavar="POLICY")
    add(overwrite, "--overwrite-existing", "-o", default=False, **switch)
    add(work, "--preserve-human", "-p", default=False, **switch)
    add(work, "--disable-ai-wrapper", default=False, **switch)
    add(work, "--retry-failed", default=False, **switch)
    add(work, "--shard", type=shard, default="1/1", metavar="K/N")
    add(work, "--undo", env="", action="store_true")
    add(work, "--dry-run", env="", action="store_true")
    add(work, "--prompt", default=PROMPT, metavar="TEXT")

    library = parser.add_argument_group(t("help_group_library"))
    add(library, "--data-access-mode", "-d", type=one_of(list(Access)), metavar="ACCESS")
    add(library, "--immich-root", type=Path, default=Path("/var/lib/immich"), metavar="FOLDER")
    url = library.add_mutually_exclusive_group()
    add(url, "--postgres-url", metavar="URL")
    add(url, "--postgres-url-file", metavar="FILE")
    add(library, "--immich-api-url", env="IMMICH_API_URL", type=web_address, metavar="URL")
    keys = library.add_mutually_exclusive_group()
    add(keys, "--immich-api-keys", env="IMMICH_API_KEY", metavar="KEYS")
    add(keys, "--immich-api-keys-file", env="IMMICH_API_KEY_FILE", metavar="FILE")
    add(library, "--api-poll-interval", type=seconds, default=10.0, metavar="S")
    add(library, "--wait-for-immich", default=True, **switch)
    add(library, "--wait-timeout", type=number(0), default=120.0, metavar="S")
    add(library, "--wait-retry-interval", type=seconds, default=5.0, metavar="S")

    model = parser.add_argument_group(t("help_group_model"))
    add(model, "--interface", type=one_of(INTERFACES), default=INTERFACES[0], metavar="NAME")
    hosts = "http://localhost:11434"
    add(model, "--hosts", type=web_addresses, default=hosts, metavar="URLS")
    add(model, "--model-name", default="qwen3-vl:4b-thinking-q4_K_M", metavar="NAME")
    key = model.add_mutually_exclusive_group()
    add(key, "--api-key", metavar="KEY")
    add(key, "--api-key-file", metavar="FILE")
    add(model, "--max-concurrent", type=number(1, whole=True), default=4, metavar="N")
    add(model, "--timeout", type=seconds, default=300.0, metavar="S")
    add(model, "--max-tokens", type=number(1, whole=True), default=4096, metavar="N")
    add(model, "--think", default=False, **switch)
    add(model, "--max-image-size", type=number(0, whole=True), default=0, metavar="PIXELS")
    add(model, "--max-retries", type=number(0, whole=True), default=0, metavar="N")
    add(model, "--retry-delay-seconds", type=number(0), default=5.0, metavar="S")
    add(model, "--unavailable-duration", type=seconds, default=60.0, metavar="S")

    files = parser.add_argument_group(t("help_group_files"))
    add(files, "--file-write-timeout", type=seconds, default=30.0, metavar="S")
    add(files, "--file-check-interval", type=seconds, default=500.0, metavar="MS")
    add(files, "--event-cooldown", type=number(0), default=2.0, metavar="S")

    health = parser.add_argument_group(t("help_group_health"))
    add(health, "--health-port", type=port, default=0, metavar="PORT")
    add(health, "--health-host", default="127.0.0.1", metavar="HOST")
    add(health, "--healthcheck", env="", action="store_true")

    output = parser.add_argument_group(t("help_group_output"))
    add(output, "--lang", type=one_of(LANGUAGES), metavar="LANG")
    add(output, "--log-level", type=one_of(LOG_LEVELS), metavar="LEVEL")
    add(output, "--final-output", default=True, **switch)
    add(output, "--grace", type=number(0), default=30.0, metavar="S")
    add(output, "--config", env="", is_config_file=True, metavar="FILE")
    add(output, "--help", "-h", env="", action="help")
    add(output, "--version", "-V", env="", action="version", version=f"%(prog)s {__version__}")
    return parser


def is_blank(name: str, value: str) -> bool:
    """Whether a variable says nothing: it is empty, or names a file that is."""
    if name.startswith(("IMMICH_", "DB_")) and name.endswith("_FILE"):
        with suppress(OSError, UnicodeDecodeError):  # complained about where it is read
            return not Path(value).read_text(encoding="utf-8").strip()
    return not value.strip()


def known_names(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without empty variables, and with older names translated."""
    known = {name: value for name, value in environ.items() if not is_blank(name, value)}
    for other, name in OTHER_NAMES.items():
        if other in known:
            known.setdefault(name, known[other])
    if "IMMICH_ANALYZE_OVERWRITE_POLICY" in known:  # beside what was all there was
        known.pop("IMMICH_ANALYZE_OVERWRITE_EXISTING", None)
    if hidden := known.get("IMMICH_ANALYZE_NO_FINAL_OUTPUT"):
        known["IMMICH_ANALYZE_FINAL_OUTPUT"] = opposite(hidden)
    # RUST_LOG is "level", "target=level" or several of these; other targets are not ours
    parts = (part.strip().rpartition("=") for part in known.get("RUST_LOG", "").lower().split(","))
    levels = {target: level for target, _, level in parts if level in LOG_LEVELS}
    if level := levels.get("immich_analyze", levels.get("")):
        known.setdefault("IMMICH_ANALYZE_LOG_LEVEL", level)
    return known


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Read flags, environment and file, in this order of precedence.

    Raises Fatal with one line that names the wrong setting, and never a secret.
    """
    known, parser = known_names(environ), build_parser()

    def read() -> argparse.Namespace:
        options: argparse.Namespace
        options, unknown = parser.parse_known_args(list(argv), env_vars=known)
        if unknown:
            # only an option's name, since the rest may be a secret, as may be a line of the file
            # that has no value and so became "--line=true"
            found = (re.match(r"(?!.*=true$)(--[^=]+|-.)", word, re.S) for word in unknown)
            names = [match[0] for match in found if match]
            raise Fatal("unknown_option", option=names[0]) if names else Fatal("unknown_word")
        return options

    options = read()
    old_hosts = f"IMMICH_ANALYZE_{options.interface}_HOSTS".upper()
    if old_hosts in known and "IMMICH_ANALYZE_HOSTS" not in known:
        known["IMMICH_ANALYZE_HOSTS"] = known[old_hosts]
        options = read()
    return config_from(options, known)


def config_from(options: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Apply the rules that span several options."""
    given = vars(options)
    url, database_url = secret(given, "postgres_url").strip(), postgres_url_from(environ)
    keys = words(secret(given, "immich_api_keys").replace("\n", ","))
    api_url = options.immich_api_url or ""
    database_given, api_given = bool(url or database_url), bool(api_url or keys)
    access = options.data_access_mode or (
        Access.API if api_given and not database_given else Access.DATABASE
    )
    if access == Access.API and not (api_url and keys):
        raise Fatal("api_key_missing" if api_url else "api_url_missing")
    policy = Policy(options.overwrite_policy or ("all" if options.overwrite_existing else "none"))
    policy = Policy.ALL if options.undo else policy
    preserve = options.preserve_human or policy is Policy.MISSING_AI
    if preserve and options.disable_ai_wrapper:
        raise Fatal("wrapper_needed")
    if (options.undo and Mode(options.mode).monitors) or (options.dry_run and not options.undo):
        raise Fatal("undo_alone")
    return Config(
        **{name: given[name] for name in given.keys() & Config.__slots__}
        | {
            "mode": Mode(options.mode),
            "policy": policy,
            "preserve_human": preserve,
            "retry_failed": options.retry_failed or options.undo,
            "access": Access(access),
            "access_ambiguous": database_given and api_given and not options.data_access_mode,
            "postgres_url": url or database_url or "host=localhost user=postgres dbname=immich",
            "immich_api_url": api_url and without_end(api_url, "/api") + "/api",
            "immich_api_keys": tuple(header_safe(key, "--immich-api-keys") for key in keys),
            "api_key": header_safe(secret(given, "api_key").strip(), "--api-key"),
            "file_check_interval": options.file_check_interval / 1000,
            "lang": options.lang or language((), environ),
            "log_level": LOG_LEVELS.get(options.log_level),
        }
    )


def secret(given: Mapping[str, str | None], name: str, twin: str = "_file") -> str:
    """A setting given directly, or by the file that its twin names; "" for neither."""
    file = given.get(name + twin)
    if not file:
        return given.get(name) or ""
    try:
        return Path(file).read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise Fatal("unreadable_file", file=file, why=why) from error


def header_safe(key: str, option: str) -> str:
    """A key that can be sent as a header."""
    if not re.fullmatch(r"[!-~]*", key):
        raise Fatal("bad_key", option=option)
    return key


def postgres_url_from(environ: Mapping[str, str]) -> str:
    """The connection by Immich's own DB_* variables, in libpq's keywords; "" without any.

    Each has a twin, DB_*_FILE, as in Immich itself.
    """
    names = ("DB_URL", *DB_KEYWORDS)
    given = {name: text for name in names if (text := secret(environ, name, "_FILE"))}
    if not given or "DB_URL" in given:
        return given.get("DB_URL", "")
    return " ".join(
        "{}='{}'".format(keyword, text.replace("\\", "\\\\").replace("'", "\\'"))
        for name, (keyword, default) in DB_KEYWORDS.items()
        if (text := given.get(name, default))
    )


# ------------------------------------------------------------------------------
# 4 Records and text: what flows, and pure functions on it. No I/O.
# ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Note:
    """What the tool keeps of a photo in Immich's metadata of it, under the key KEY."""

    model: str
    prompt: str  # Config.prompt_id
    text: str = ""  # text_id of the description as Immich stored it
    failed: str = ""  # or the key of the error for which there is none
    why: str = ""
    tries: int = 0  # runs, or days, in which it failed so

    def value(self, at: datetime) -> dict[str, Any]:
        """As it is stored, in JSON."""
        own = {"v": 1, "model": self.model, "prompt": self.prompt, "at": iso(at)}
        failure = {"failed": self.failed, "why": self.why, "tries": self.tries}
        own |= failure if self.failed else {}
        return own | ({"text": self.text} if self.text or not self.failed else {})


KEY = "immich-analyze"
MOST_TRIES = 3


NOTE = {"v": int, "model": str, "prompt": str, "at": str}
FAILURE = {"failed": str, "why": str, "tries": int}
NOTES = (NOTE | {"text": str}, NOTE | FAILURE, NOTE | FAILURE | {"text": str})


def note_in(value: object) -> Note | None:
    """The note in stored JSON; None for none, or one that another version or a person wrote."""
    given = value if isinstance(value, dict) else {}
    if {name: type(item) for name, item in given.items()} not in NOTES or given["v"] != 1:
        return None
    return Note(**{name: item for name, item in given.items() if name not in ("v", "at")})


def text_id(text: str) -> str:
    """What notes call a description: the first 16 hex digits of its SHA-256."""
    return sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def iso(moment: datetime) -> str:
    """A moment as all releases of Immich take it."""
    text = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Asset:
    """A photo as the listing showed it."""

    id: str
    name: str
    description: str
    source: str  # how its library gets at it: number of the key (API), path of the preview (SQL)
    ready: bool = (
        True  # False: it is to be looked up before use, Immich may not have made a preview
    )
    note: Note | None = None
    noted: bool = True  # False: the note is still to be read
    library: str = ""  # id of its external library


@dataclass(frozen=True, slots=True)
class Picture:
    """A preview ready to be sent; its base64 is made once for all tries."""

    mime: str
    base64: bytes


# Our text among a person's: from a line [AI] to the next line [/AI] with no other [AI] between.
BLOCK = re.compile(r"^\[AI\][^\S\n]*\n(?:(?!\[AI\][^\S\n]*$).*\n)*?\[/AI\][^\S\n]*$", re.MULTILINE)
GAP = "\n\n"  # between a person's text and a block that is added


def is_ours(asset: Asset) -> bool:
    """Whether the description is, to the letter, as the tool left it."""
    return bool(asset.note and asset.note.text == text_id(asset.description))


def left_alone(asset: Asset, config: Config) -> str:
    """Why a photo is not to be described, as a key; "" if it is, or if its note must tell."""
    note = asset.note
    same = note is not None and (note.model, note.prompt) == (config.model_name, config.prompt_id)
    if note and note.failed and same and note.tries >= MOST_TRIES and not config.retry_failed:
        return "failed_before"
    if not asset.description.strip():
        return "has_description" if config.undo else ""
    if config.policy is Policy.NONE:
        return "has_description"
    ours = is_ours(asset) or bool(BLOCK.search(asset.description))
    match config.policy:
        case Policy.MISSING_AI:
            wanted = not ours
        case Policy.OUTDATED:
            wanted = not asset.noted or (ours and not (same and note and not note.failed))
        case _:
            wanted = True
    return "" if wanted else "has_description"


def merge(asset: Asset, text: str, config: Config) -> str:
    """The whole description that a photo gets with our text.

    Where there is a block, or a person's text is to be kept, all outside ours stays to the
    byte; only `all` without `--preserve-human` replaces what a person wrote.
    """
    current = asset.description
    block = f"[AI]\n{text}\n[/AI]"
    if not config.preserve_human and (config.policy is Policy.ALL or not BLOCK.search(current)):
        return text
    first = BLOCK.search(current)
    if not first:
        return block if is_ours(asset) or not current else current + GAP + block
    before, after = current[: first.start()] + block, current[first.end() :]
    alone = before + BLOCK.sub("", after)
    # a person's own tags may look like a block once another one between them is gone
    return alone if len(BLOCK.findall(alone)) == 1 else before + after


def unmerge(asset: Asset) -> str | None:
    """The description without our text; None if there is nothing of ours in it."""
    current, kept, at = asset.description, "", 0
    for block in BLOCK.finditer(current):
        kept += current[at : block.start()]
        at = block.end()
        if kept:
            kept = kept.removesuffix("\n").removesuffix("\n")  # which is GAP
        else:
            at += len(current[at : at + 2]) - len(current[at : at + 2].lstrip("\n"))
    if at:
        return kept + current[at:]
    return "" if current and is_ours(asset) else None


def picture_type(data: bytes) -> tuple[str | None, bool]:
    """MIME type by the first bytes, None for what is no picture we know; and if it is whole.

    Previews are rewritten in place, and seen cut then: a whole one has its last bytes.
    """
    tail = data[-64:]
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg", b"\xff\xd9" in tail
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png", b"IEND" in tail
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp", len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return None, len(data) >= 12


def prepared(data: bytes, max_size: int) -> Picture:
    """Check a preview by its first and last bytes and make it ready to be sent.

    Decoding costs four times all the rest, so it is done only to shrink a picture to
    `max_size` pixels, to see whether one without its usual end is whole, or to turn WebP
    into JPEG: llama.cpp cannot read WebP, nor can the releases of Ollama that hand it on
    unchanged.

    Raises Retryable for a file that is being written, Permanent for no picture.
    """
    mime, whole = picture_type(data)
    if not mime and whole:
        raise Permanent("preview_unknown")
    try:
        if mime == "image/webp" or max_size or not whole:
            mime, data = "image/jpeg", as_jpeg(data, max_size)
    except Permanent as error:
        if whole:
            raise
        raise Retryable("preview_cut") from error
    return Picture(mime or "", base64.b64encode(data))


def as_jpeg(data: bytes, max_size: int) -> bytes:
    """Decode a picture and write it as JPEG, shrunk to `max_size` unless that is 0."""
    target = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB")
            if max_size:
                picture.thumbnail((max_size, max_size))
            picture.save(target, "JPEG", quality=90)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Permanent("preview_broken") from error
    return target.getvalue()


THOUGHTS = re.compile(r"<(think(?:ing)?)>.*?</\1>", re.S | re.I)
CUT_THOUGHTS = re.compile(r"^.*</think(?:ing)?>|<think(?:ing)?>.*$", re.S | re.I)
LEAD_IN = re.compile(
    r"""^[\s*_#]*
        (?:(?:sure|certainly|of\ course|okay|конечно|хорошо)\b\W{0,3})?
        (?:(?:here(?:[’']s|\ is)|this\ is|below\ is)\s+
           (?:(?:an?|the|your|my|detailed|concise|short|brief|full|possible|image|photo)\s+){0,4}
           (?:description|caption|summary)(?:\s+(?:of|for|based|suitable|you)\b[^.:\n]{0,60})?
         |(?:вот|ниже)\s+
           (?:(?:приведено|ваше|подробное|детальное|краткое|полное)\s+){0,3}
           описание(?:\s+(?:изображ|фото|снимк|картин|для)[^.:\n]{0,60})?
         |(?:the\s+)?(?:(?:image|photo|full)\s+)?(?:description|caption)
         |описание(?:\s+(?:изображения|фотографии|фото|снимка))?
        )[*_]*:[\s*_]*""",
    re.VERBOSE | re.IGNORECASE,
)
HTML = re.compile(r"\s*<(?:!doctype|html)\b", re.I)


def is_storable(character: str) -> bool:
    """Whether Immich, its XMP files and PostgreSQL can all hold a character."""
    bad = unicodedata.category(character) in ("Cc", "Cs") or character in "\ufeff\ufffe\uffff"
    return not bad or character in "\n\t"


def clean(answer: str) -> str:
    """What a model said, as a description: no thoughts, lead-ins or control characters.

    Trimmed, as Immich trims what it stores.
    """
    text = answer.replace("\r\n", "\n").replace("\r", "\n")
    text = CUT_THOUGHTS.sub("", THOUGHTS.sub("", text))
    text = LEAD_IN.sub("", "".join(filter(is_storable, text))).strip()
    if text[:1] + text[-1:] in ('""', "“”", "«»") and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    text = re.sub(r"^\[(/?AI)\]", r"(\1)", text, flags=re.MULTILINE)  # they would end a block
    return re.sub(r"\n{3,}", "\n\n", text)


def description_in(answer: object) -> str:
    """The description in a model's answer.

    Raises Retryable when there is none: empty, a web page, a bare number (Immich would
    store 1.50 as 1.5), or one phrase again and again, which shows in how well it compresses.
    """
    text = clean(answer) if isinstance(answer, str) else ""
    if not any(c.isalpha() for c in text) or HTML.match(text):
        raise Retryable("answer_empty")
    data = text.encode()
    if len(data) > 200 and len(data) > 6 * len(zlib.compress(data)):
        raise Retryable("answer_repeats")
    return text


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


# ------------------------------------------------------------------------------
# 5 Wire: the only place that meets exceptions of requests and psycopg2, and that
#   says who is to blame for a status. Does not try again.
# ------------------------------------------------------------------------------

CONNECT_TIMEOUT = 10.0
LONGEST_TIMEOUT = 2e6  # sockets count milliseconds in 31 bits
JSON_BODY = {"Content-Type": "application/json"}  # where the JSON is made by us
REPLY_LIMIT = 64 * 2**20  # bytes; a page of 1,000 photos has about 1.3 MB


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer with its body read."""

    url: str  # without user, password and query
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body's JSON; Retryable for anything else, such as a proxy's page."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise Retryable("not_json", url=self.url) from error

    def complaint(self) -> str:
        """What the server says is wrong: one line, "" if it says nothing to people."""
        text = self.body[:4000].decode("utf-8", "replace").strip()
        for _ in range(3):  # Ollama hands on llama.cpp's JSON as a string in its own
            try:
                said = json.loads(text)
            except (ValueError, RecursionError):
                break
            paths = (("error", "message"), ("message",), ("error",), ("detail",))
            inner = next((found for path in paths if (found := dig(said, *path))), "")
            text = "; ".join(map(str, inner)) if isinstance(inner, list) else str(inner or "")
        return "" if text.startswith("<") else " ".join(text.split())[:300]


class Session(requests.Session):
    """A session for one worker.

    It keeps no cookies, as a stale one outranks an API key, and follows no redirects: a
    POST would arrive as a GET, and the key at another server.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, Any] = {}
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self.headers["User-Agent"] = f"immich-analyze/{__version__}"

    def merge_environment_settings(self, url: Any, *given: Any) -> Any:
        """The proxy and certificates that the environment names, read once for each server.

        They are looked for among all variables, which takes longer than the rest of a request.
        """
        server = "/".join(str(url).split("/", 3)[:3])
        if server not in self._settings:
            self._settings[server] = super().merge_environment_settings(url, *given)
        return dict(self._settings[server])

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Nowhere, which is how requests is kept from following redirects."""


def http(
    session: requests.Session,
    method: str,
    url: str,
    *,
    blame: Callable[[Reply], AnalyzeError],
    timeout: float,
    limit: int = REPLY_LIMIT,
    **options: Any,
) -> Reply:
    """Send one request and read the answer, `limit` bytes at most.

    A status other than 2xx is raised as the error that `blame` makes of it.
    """
    shown = public(url)
    try:
        with session.request(
            method,
            url,
            timeout=(min(timeout, CONNECT_TIMEOUT), min(timeout, LONGEST_TIMEOUT)),
            stream=True,
            **options,
        ) as response:
            body = bytearray()
            for chunk in response.iter_content(2**16):
                body += chunk
                if len(body) > limit:
                    raise Retryable("reply_too_large", url=shown)
            reply = Reply(shown, response.status_code, response.headers, bytes(body))
    except requests.exceptions.ReadTimeout as error:
        raise Retryable("timed_out", url=shown, seconds=f"{timeout:g}") from error
    except requests.exceptions.SSLError as error:
        kind = HostDown if "EOF" in str(error) else Unexpected  # hung up on, or no such thing
        raise kind("tls_failed", url=shown, why=innermost(error)) from error
    except requests.exceptions.InvalidHeader as error:  # in a broken answer
        raise Retryable("connection_cut", url=shown) from error
    except ValueError as error:  # an address that neither requests nor urllib3 can read
        raise Fatal("not_an_address", value=shown) from error
    except OSError as error:  # everything else that requests raises
        raise connection_error(error, shown) from error
    if 200 <= reply.status < 300:
        return reply
    if 300 <= reply.status < 400:
        raise Unexpected("redirected", url=shown, target=public(reply.headers.get("Location", "")))
    raise blame(reply)


def connection_error(error: OSError, shown: str) -> AnalyzeError:
    """Tell a server that cannot be reached from one that hung up on a request.

    The second may be the picture's doing, so it counts as a try of the picture.
    """
    if not isinstance(error, requests.exceptions.RequestException):
        return Fatal("tls_failed", url=shown, why=error)  # REQUESTS_CA_BUNDLE names no file
    cause = error.args[0] if error.args else None
    if isinstance(error, requests.exceptions.ConnectTimeout) or hasattr(cause, "reason"):
        return HostDown("unreachable", url=shown, why=innermost(error))
    if "timed out" in str(error):  # while the body was read
        return Retryable("timed_out_reading", url=shown)
    return Retryable("connection_cut", url=shown)


def innermost(error: BaseException) -> str:
    """The reason at the bottom of a chain of exceptions, in the system's words."""
    seen = [error]
    while (inner := seen[-1].__cause__ or seen[-1].__context__) and inner not in seen:
        seen.append(inner)
    reasons = (getattr(e, "verify_message", getattr(e, "strerror", None)) for e in reversed(seen))
    return next((reason for reason in reasons if isinstance(reason, str)), type(error).__name__)


def retry_after(reply: Reply) -> float | None:
    """Seconds the server asks to be left alone, an hour at most; None if it does not say."""
    text = reply.headers.get("Retry-After", "")
    with suppress(ValueError):
        seconds = float(text) if text.isdecimal() else date_in(text).timestamp() - time.time()
        return min(max(seconds, 1.0), 3600.0)
    return None


def date_in(header: str) -> datetime:
    """The date in a header; ValueError for anything else."""
    return parsedate_to_datetime(header).astimezone(UTC)


BUSY = {408, 429, 502, 503, 504}
NO_MODEL = re.compile(r"model\b.*\b(not found|not exist)|no such model", re.I)
BLIND = re.compile(r"image input is not supported|missing data required for image input", re.I)


def model_host_error(reply: Reply) -> AnalyzeError:
    """Who is to blame for a model host's status (Ollama, llama.cpp, OpenAI-compatible)."""
    url, why = reply.url, reply.complaint()
    match reply.status:
        case _ if BLIND.search(why):
            return Fatal("model_blind", url=url)
        case 401 | 403:
            return Fatal("host_key_refused", url=url, status=reply.status)
        case 400 | 404 if NO_MODEL.search(why):
            return Fatal("model_missing", url=url, why=why)
        case 404 | 405:
            return Unexpected("host_wrong", url=url, status=reply.status)
        case status if status in BUSY:
            return HostDown("host_busy", pause=retry_after(reply), url=url, status=status, why=why)
        case status if status >= 500:
            return Retryable("host_failed", url=url, status=status, why=why)
        case status:
            return Permanent("picture_refused", url=url, status=status, why=why)


KEY_REFUSED = re.compile("Invalid (API key|user token)|Authentication required")


def immich_error(reply: Reply) -> AnalyzeError:
    """Who is to blame for a status of Immich.

    Immich says 400 for a photo that is not there, and 404 "Cannot …" to everything
    while it is in maintenance. What it never says is a proxy's.
    """
    url, why = reply.url, reply.complaint()
    match reply.status:
        case 400 if why.startswith("Not found or no "):
            return Gone("photo_gone")
        case 401 if "Elevated permission" in why:
            return Gone("photo_gone")
        case 401 if KEY_REFUSED.search(why):
            return Fatal("immich_key_refused", why=why)
        case 403 if "permission" in why:
            return Fatal("immich_permission_missing", permission=why.rpartition(": ")[2])
        case 404 if why == "Asset media not found":
            return Permanent("preview_missing")
        case 404 if why.startswith("Cannot "):
            return HostDown("immich_maintenance", url=url, status=404)
        case status if status in BUSY:
            return HostDown("immich_failed", pause=retry_after(reply), url=url, status=status)
        case status if status >= 500:  # its database, a proxy, one photo
            return Retryable("immich_failed", url=url, status=status)
        case status if status in (401, 403, 404, 405):
            return Unexpected("immich_wrong", url=url, status=status)
        case status:
            return Permanent("immich_refused", status=status, why=why)


# libpq gives no code when it cannot connect, only words: these need a person, and of any
# other the server may have more tomorrow
REFUSED = re.compile(
    r"authentication failed|no password|no pg_hba|not permitted to log in|certificate"
    r"|support SSL|invalid .*(?:value|port|option)",
    re.I,
)
ONE_ROW = (psycopg2.errors.LockNotAvailable, psycopg2.errors.QueryCanceled)
# SQLSTATE classes: no such database, role, table, column or right; a server on standby. A
# restore or an upgrade of Immich goes through them.
UNEXPECTED = ("0A", "25", "28", "3D", "42")


@contextmanager
def sql() -> Iterator[None]:
    """Turn what psycopg2 raises into our errors."""
    try:
        yield
    except psycopg2.Error as error:
        why = re.sub(r"\s*Is the server running[^?]*\?", "", " ".join(str(error).split()))
        raise database_error(error, why) from error


def database_error(error: psycopg2.Error, why: str) -> AnalyzeError:
    """Who is to blame for an error of PostgreSQL or its driver."""
    words, code = re.sub(r'"[^"]*"', "", why), error.pgcode or ""  # names may hold any word
    at_fault = isinstance(error, psycopg2.ProgrammingError) or REFUSED.search(words)
    match error:
        case _ if isinstance(error, ONE_ROW):
            return Retryable("database_refused", why=why)
        case _ if not code and at_fault:
            return Fatal("database_refused", why=why)
        case _ if code.startswith(UNEXPECTED) or "does not exist" in words:
            return Unexpected("database_refused", why=why)
        case psycopg2.OperationalError() | psycopg2.InterfaceError():
            return HostDown("database_down", why=why)
        case _ if not code:  # a crash
            return HostDown("database_down", why=why)
        case psycopg2.DataError():
            return Permanent("database_refused", why=why)
        case _:  # a trigger that objects, a page that cannot be read
            return Retryable("database_refused", why=why)


def postgres_url(url: str) -> str:
    """Check a connection string, as libpq's own complaints could quote the password."""
    try:
        parts = psycopg2.extensions.parse_dsn(url)
    except psycopg2.ProgrammingError as error:
        raise Fatal("bad_postgres_url") from error
    ports = str(parts.get("port", "")).replace(",", "")
    if "@" in parts.get("host", "") + parts.get("dbname", "") or not (ports or "1").isdecimal():
        raise Fatal("bad_postgres_url")
    return url


# ------------------------------------------------------------------------------
# 6 AI: who describes. Knows nothing of Immich.
# ------------------------------------------------------------------------------

ANSWER_LIMIT = 4 * 2**20  # bytes
CHECK_TIMEOUT = 15.0
SICK_AFTER = 3  # pictures that a host failed on, without an answer in between, make it doubtful
STRUCK_REST = 3600.0  # somebody may have given it the model
PROBE_PAUSE = 0.5  # seconds between two probes of a host that is gone, while all rest
PROBE_TIMEOUT = 1.0
QUIET = 600.0  # seconds between two lines about a host that rests for a moment only
THINK_REFUSED = re.compile(r"think|chat_template_kwargs", re.I)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one kind of model server wants and says: facts, no code path of their own."""

    root: str  # what its paths begin with; people often give it with the address
    chat: str
    question: Callable[[str, str, str, int], dict[str, Any]]  # model, prompt, MIME type, tokens
    thinking: Callable[[bool], dict[str, Any]]  # the switch to add to a question
    text: tuple[str | int, ...]  # where the answer is
    finish: tuple[str | int, ...]  # where it says why it ended; "length" = cut
    sees: Callable[[Callable[..., Any], str], bool | None]  # is the model there, and can it see?
    alive: str  # a path that is answered whenever the server is up


# What stands for the picture in a question: JSON's encoder would take a millisecond for it.
PICTURE = "immich-analyze puts the picture here"


def ollama_question(model: str, prompt: str, _: str, tokens: int) -> dict[str, Any]:
    """Body of POST /api/chat; images are bare base64 there."""
    message = {"role": "user", "content": prompt, "images": [PICTURE]}
    options = {"num_predict": tokens}
    return {"model": model, "messages": [message], "stream": False, "options": options}


def ollama_sees(ask: Callable[..., Any], model: str) -> bool | None:
    """POST /api/show is 404 for a model that is not there; `capabilities` are newer."""
    capabilities = dig(ask("POST", "/api/show", json={"model": model}), "capabilities")
    return "vision" in capabilities if isinstance(capabilities, list) else None


def openai_question(model: str, prompt: str, mime: str, tokens: int) -> dict[str, Any]:
    """Body of POST /v1/chat/completions."""
    image = {"url": f"data:{mime};base64,{PICTURE}"}
    content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": image}]
    message = {"role": "user", "content": content}
    return {"model": model, "messages": [message], "stream": False, "max_tokens": tokens}


def openai_sees(ask: Callable[..., Any], model: str) -> bool | None:
    """GET /v1/models lists the models; llama.cpp answers by any name if it serves one.

    Only llama.cpp tells whether a model can see: `input_modalities`, in older builds
    `modalities` of GET /props.
    """
    listed = dig_list(ask("GET", "/v1/models"), "data")
    models = {str(dig(entry, "id")): entry for entry in listed}
    alone = len(models) == 1 and dig(listed, 0, "owned_by") == "llamacpp"
    if alone:
        known = dig(listed, 0)
    else:
        aliased = (m for m in models.values() if model in dig_list(m, "aliases"))
        known = models.get(model) or next(aliased, None)
        if models and not known:
            raise Fatal("model_not_listed", model=model, models=", ".join(sorted(models)[:10]))
    modalities = dig(known, "architecture", "input_modalities")
    if isinstance(modalities, list):
        return "image" in modalities
    vision = dig(ask("GET", "/props"), "modalities", "vision") if alone else None
    return vision if isinstance(vision, bool) else None


DIALECTS = {
    "ollama": Dialect(
        root="/api",
        chat="/api/chat",
        question=ollama_question,
        thinking=lambda think: {"think": think},
        text=("message", "content"),
        finish=("done_reason",),
        sees=ollama_sees,
        alive="/api/version",
    ),
    "llamacpp": Dialect(
        root="/v1",
        chat="/v1/chat/completions",
        question=openai_question,
        thinking=lambda think: {"chat_template_kwargs": {"enable_thinking": think}},
        text=("choices", 0, "message", "content"),
        finish=("choices", 0, "finish_reason"),
        sees=openai_sees,
        alive="/health",
    ),
}


class Question:
    """What is asked about one picture: the bodies of requests, each made once for all tries.

    `plain` is without the switch for thinking, which some hosts refuse.
    """

    def __init__(self, picture: Picture, question: dict[str, Any], switch: dict[str, Any]) -> None:
        self.picture = picture
        self._kinds = {True: question, False: question | switch}
        self._bodies: dict[bool, bytes] = {}

    def body(self, *, plain: bool) -> bytes:
        """JSON, with the picture in its place."""
        if plain not in self._bodies:
            text = json.dumps(self._kinds[plain]).encode()
            self._bodies[plain] = text.replace(PICTURE.encode(), self.picture.base64)
        return self._bodies[plain]


@functools.cache
def good_picture() -> Picture:
    """A picture that every model can take, though not say much about."""
    target = io.BytesIO()
    Image.new("RGB", (448, 448), "gray").save(target, "JPEG")
    return prepared(target.getvalue(), 0)


@dataclass(slots=True)
class Host:
    """What is known of one model host."""

    url: str = field(repr=False)
    in_flight: int = 0
    used: int = 0  # when it was picked last, counted in picks
    rests_until: float = 0.0
    away: bool = False  # since its last answer, and said so
    said: float = -math.inf  # when that was said last
    struck: bool = False  # it has a wrong key or lacks the model
    gone: bool = False  # nothing answers at its address: a request that costs nothing tells more
    probed: float = -math.inf  # when such a request was made
    doubted: bool = False  # it rests while somebody finds out whether it is sick
    failed: frozenset[int] = frozenset()  # pictures since its last answer
    requests: int = 0  # that ended, and the seconds they took, all together
    seconds: float = 0.0


class Hosts:
    """Which model host is asked next, shared by all workers.

    It is the one with the fewest of our requests in flight, the longest unused among
    equals, so equal hosts get equal work and a fast one gets more. A host in trouble
    rests; one with a wrong key or without the model is struck off, for an hour.
    """

    def __init__(
        self,
        urls: Sequence[str],
        places: int,
        rest: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(places)
        self._hosts = {url: Host(url) for url in urls}
        self._rest = rest
        self._clock = clock
        self._picks = 0
        self.moved = clock()  # when a request last began or ended
        self.no_switch: set[str] = set()  # hosts that refuse the switch for thinking

    @contextmanager
    def place(
        self, stop: threading.Event, avoid: Container[str], answers: Callable[[str], bool]
    ) -> Iterator[str]:
        """Hold one of the places for a request, at the host to ask: none of `avoid` if possible.

        While all hosts rest, those that are gone are probed by `answers`.
        """
        with self._places:
            if stop.is_set():
                raise Stopped("stopped")
            url, seconds = self.pick(avoid)
            while seconds:
                sooner = any(host.gone or host.doubted for host in self.seen())  # perhaps
                if stop.wait(min(seconds, PROBE_PAUSE) if sooner else seconds):
                    raise Stopped("stopped")
                if (lost := self._to_probe()) and answers(lost):
                    self.wake(lost)
                url, seconds = self.pick(avoid)
            self.moved = began = self._clock()
            try:
                yield url
            finally:
                with self._lock:
                    self.moved = self._clock()
                    host = self._hosts[url]
                    host.in_flight -= 1
                    host.requests += 1
                    host.seconds += self.moved - began

    def pick(self, avoid: Container[str] = ()) -> tuple[str, float]:
        """The host to ask; with seconds to wait first while all of them rest."""
        with self._lock:
            now = self._clock()
            awake = [host for host in self._hosts.values() if host.rests_until <= now]
            if not awake:
                soonest = min(self._hosts.values(), key=lambda host: host.rests_until)
                return soonest.url, soonest.rests_until - now
            wanted = [host for host in awake if host.url not in avoid] or awake
            host = min(wanted, key=lambda host: (host.in_flight, host.used))
            self._picks += 1
            host.in_flight, host.used = host.in_flight + 1, self._picks
            return host.url, 0.0

    def _to_probe(self) -> str:
        """The host that is gone and unprobed for longest, for the caller alone; "" for none."""
        with self._lock:
            now = self._clock()
            due = [h for h in self._hosts.values() if h.gone and h.probed <= now - PROBE_PAUSE]
            if not due:
                return ""
            host = min(due, key=lambda host: host.probed)
            host.probed = now
            return host.url

    def __len__(self) -> int:
        return len(self._hosts)

    def seen(self) -> list[Host]:
        """The hosts as they are now: copies to look at."""
        with self._lock:
            return [replace(host) for host in self._hosts.values()]

    def usable(self) -> bool:
        """Whether any host may be asked now."""
        now = self._clock()
        return any(host.rests_until <= now for host in self.seen())

    def down(self, url: str, error: AnalyzeError) -> None:
        """Let a host rest, for as long as it asks or the setting says; one line an outage."""
        asked = getattr(error, "pause", None)
        seconds = self._rest if asked is None else asked
        with self._lock:
            host, now = self._hosts[url], self._clock()
            host.rests_until, host.doubted = max(host.rests_until, now + seconds), False
            host.gone = error.key == "unreachable" or error.fields.get("status") in (502, 504)
            # a busy one may ask to be left alone for a second, again and again
            first = not host.away and (seconds >= self._rest or now > host.said + QUIET)
            if first:
                host.away, host.said = True, now
        if first:
            log.warning("%s", t("host_rests", why=error, seconds=f"{seconds:g}"))

    def doubtful(self, url: str, picture: Picture, after: int) -> bool:
        """Note that a host failed on a picture; whether it did on so many, with no answer since.

        Then it rests until somebody found out what is wrong.
        """
        with self._lock:
            host = self._hosts[url]
            host.failed |= {hash(picture)}
            if len(host.failed) < after:
                return False
            host.rests_until = max(host.rests_until, self._clock() + self._rest)
            host.doubted = True
            return True

    def resting(self, url: str) -> bool:
        """Whether a host rests."""
        with self._lock:
            return self._hosts[url].rests_until > self._clock()

    def wake(self, url: str) -> None:
        """End a host's rest."""
        with self._lock:
            host = self._hosts[url]
            host.rests_until = self._clock()
            host.gone = host.doubted = False

    def up(self, url: str) -> None:
        """Note that a host answered."""
        with self._lock:
            host = self._hosts[url]
            host.failed, host.gone = frozenset(), False
            if not host.away or host.rests_until > self._clock():
                return  # an answer to a question of earlier is no recovery
            host.away = host.struck = False
        log.info("%s", t("host_back", url=public(url)))

    def strike(self, url: str, error: Fatal) -> None:
        """Leave a host out; raise the error if it was the last one."""
        with self._lock:
            host, others = self._hosts[url], [h for u, h in self._hosts.items() if u != url]
            if all(other.struck for other in others):
                raise error
            first, host.struck, host.away = not host.struck, True, True
            host.rests_until = self._clock() + STRUCK_REST
        if first:
            log.error("%s", t("host_struck", why=error))


class Ai:
    """Describes pictures; one for each worker, all on the same Hosts."""

    def __init__(self, config: Config, hosts: Hosts, stop: threading.Event) -> None:
        self._config = config
        self._dialect = DIALECTS[config.interface]
        self._hosts = hosts
        self._stop = stop
        self._session = Session()
        if config.api_key:
            # as a function, since .netrc would outrank a plain header
            self._session.auth = self._sign

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._config.api_key}"
        return request

    def question(self, picture: Picture) -> Question:
        """Make ready what is asked, before a place at a host is taken for it."""
        config, dialect = self._config, self._dialect
        model, prompt, tokens = config.model_name, config.prompt, config.max_tokens
        asked = dialect.question(model, prompt, picture.mime, tokens)
        question = Question(picture, asked, dialect.thinking(config.think))
        question.body(plain=bool(self._hosts.no_switch))
        return question

    def describe(self, question: Question, failed_at: set[str], *, last: bool) -> str:
        """Have a picture described, by a host that did not fail on it if there is one.

        `last`: it is given up if it fails once more.

        A host that is away or sick is waited for (`--max-retries` bounds that), HostDown
        after that. Raises Retryable or Permanent for the picture, and adds the host to
        `failed_at`; Fatal when no host is left; Stopped.
        """
        most = self._config.max_retries or math.inf
        waits = 0
        while True:
            with self._hosts.place(self._stop, failed_at, self._answers) as url:
                try:
                    answer = self._ask(url, question)
                    self._hosts.up(url)
                    return self._description(answer)
                except (Retryable, Unexpected) as error:
                    if not self._is_sick(url, question.picture, error, last=last):
                        failed_at.add(url)
                        raise
                    waits += 1
                    if waits > most:
                        raise
                except Permanent:
                    failed_at.add(url)
                    raise
                except Fatal as error:
                    self._hosts.strike(url, error)

    def _is_sick(self, url: str, picture: Picture, error: AnalyzeError, *, last: bool) -> bool:
        """Whether the host is to blame for an error, not the picture; then it rests.

        One that failed on several pictures, or on one that would be given up, is shown one
        that is known to be good.
        """
        if isinstance(error, HostDown | Unexpected):
            self._hosts.down(url, error)
            return True
        if self._hosts.resting(url):
            return True
        if not self._hosts.doubtful(url, picture, after=1 if last else SICK_AFTER):
            return False
        try:
            self._ask(url, self.question(good_picture()))
        except AnalyzeError as trouble:  # which may tell more: that nobody is there any more
            self._hosts.down(url, trouble)
            return True
        self._hosts.wake(url)
        self._hosts.up(url)
        return False

    def _answers(self, url: str) -> bool:
        """Whether a host that was gone is back, by a request that costs it nothing."""
        try:
            self._call(url, "GET", self._dialect.alive, timeout=PROBE_TIMEOUT)
        except Retryable as error:
            return error.key in ("not_json", "host_failed")  # it is there, if it says no more
        except AnalyzeError:
            return True
        return True

    def _ask(self, url: str, question: Question) -> Any:
        """One question to one host; asked again without the switch it refuses."""
        plain = url in self._hosts.no_switch
        ask = functools.partial(self._call, url, "POST", self._dialect.chat, headers=JSON_BODY)
        log.debug("asking %s", public(url))
        try:
            return ask(data=question.body(plain=plain))
        except Permanent as error:
            if plain or not THINK_REFUSED.search(str(error.fields["why"])):
                raise
            self._hosts.no_switch.add(url)
            return ask(data=question.body(plain=True))

    def _description(self, answer: Any) -> str:
        """What the answer says of the picture; Retryable if that is no description."""
        if dig(answer, *self._dialect.finish) == "length":
            raise Retryable("answer_cut", tokens=self._config.max_tokens)
        return description_in(dig(answer, *self._dialect.text))

    def _call(self, url: str, method: str, path: str, **options: Any) -> Any:
        own: dict[str, Any] = {"timeout": self._config.timeout, "limit": ANSWER_LIMIT}
        address = without_end(url, self._dialect.root) + path
        return http(self._session, method, address, blame=model_host_error, **own | options).json()

    def check(self) -> None:
        """Ask each host for the model once, before the first photo.

        A host that is busy, or still loads its model, is there. Raises HostDown when no
        host is, Fatal when the last one cannot do the work.
        """
        away: dict[str, AnalyzeError] = {}
        for url in self._config.hosts:
            ask = functools.partial(self._call, url, timeout=CHECK_TIMEOUT)
            try:
                if self._dialect.sees(ask, self._config.model_name) is False:
                    raise Fatal("model_blind", url=public(url))
            except Unexpected as error:
                away[url] = error
            except Fatal as error:
                self._hosts.strike(url, error)
            except Permanent as error:
                why = error.fields["why"]
                self._hosts.strike(url, Fatal("model_missing", url=public(url), why=why))
            except Retryable as error:
                if error.key != "host_busy":
                    away[url] = error
        if len(away) == sum(not host.struck for host in self._hosts.seen()):
            raise HostDown("no_host", why="; ".join(map(str, away.values())))
        for url, trouble in away.items():
            self._hosts.down(url, trouble)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()


# ------------------------------------------------------------------------------
# 7 Library: where photos come from and descriptions go. Two of a kind, with one
#   protocol; each worker has its own. Knows nothing of the AI.
# ------------------------------------------------------------------------------

PAGE = 1000  # photos a listing asks for at once; the most that Immich gives
IMMICH_TIMEOUT = 60.0  # with Redis hung, Immich answers a write late but has done it
PREVIEW_LIMIT = 64 * 2**20  # bytes
BODY_LIMIT = 10 * 2**20  # bytes that Immich takes of a request

SWEEP_SPAN = timedelta(days=2)  # how late a preview may come after the upload

NEEDED_PERMISSIONS = ("asset.read", "asset.view", "asset.update")

Version = tuple[int, int, int]
Cursor = Any  # where a listing stands; only the library that made it looks inside


class Library(Protocol):
    """What the pipeline asks of a library; every method raises only our errors."""

    def clock(self) -> datetime:
        """The time by the server's clock; ours may be wrong, or jump."""

    def page(
        self, cursor: Cursor | None, since: datetime | None = None
    ) -> tuple[list[Asset], Cursor | None]:
        """The next photos of a listing, and where it goes on; None at its end.

        Only live photos (no videos, nothing hidden, locked, trashed or offline), and with
        `since` only those uploaded from then on.
        """

    def total(self) -> int:
        """About how many photos the whole listing brings; an extra, so not all may ask."""

    def news(self, since: datetime, now: datetime) -> list[Asset]:
        """The photos that arrived between these times, ready or not, maybe some before."""

    def watch(self, seen: Callable[[str], None], cooldown: float) -> Arrivals | None:
        """Calls `seen` with the id of each photo whose preview is written, if it can tell."""

    def find(self, asset: Asset) -> Asset:
        """A photo as it is now, ready or not; Gone if it is not to be described."""

    def claim(self, asset: Asset) -> Asset:
        """The photo as it is now, kept from other instances; Gone if one of them has it."""

    def release(self, asset: Asset) -> None:
        """Leave a claimed photo to others; raises nothing."""

    def preview(self, asset: Asset) -> bytes:
        """The preview's file as it is."""

    def recall(self, asset: Asset) -> Asset:
        """A photo with its note."""

    def write(self, asset: Asset, text: str, note: Note | None) -> bool:
        """Store a description in place of the listed one, and a note, or take the note away.

        False, and nothing written, if there is another one by now. May be called
        again after an error: a text that is there already counts as written.
        """

    must_confirm: bool  # a text may be lost after it was written, and its note comes later

    def read_back(self, assets: Sequence[Asset], age: float) -> dict[str, str]:
        """By id, the descriptions of photos that were written in the last `age` seconds.

        Those that are gone are left out.
        """

    def remember(self, notes: Sequence[tuple[Asset, Note | None]]) -> None:
        """Store the notes, or take them away, where this Immich keeps notes."""

    def close(self) -> None:
        """Close the connections; twice is fine."""


def whole_library(call: Callable[[], T]) -> Callable[[], T]:
    """The call, with all its trouble the library's, not one photo's: to be waited for, or final."""

    def strict() -> T:
        try:
            return call()
        except HostDown:
            raise
        except Retryable as error:
            raise HostDown(error.key, pause=error.pause, **error.fields) from error
        except (Permanent, Gone) as error:
            raise Fatal(error.key, **error.fields) from error

    return strict


@dataclass(slots=True)
class Account:
    """One user's API key. What is learned of the user only the listing changes, one at a time."""

    key: str = field(repr=False)
    number: int  # of the key as it was given, for messages
    user_id: str | None  # None until known, as some keys may not ask for it
    strangers: set[str] = field(default_factory=set)  # partners, who share their photos
    refused: Fatal | None = None  # why the key is not used any more
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class Server:
    """What is known of one Immich, shared by all who talk to it."""

    version: Version  # which may grow: each look at the clock tells
    accounts: Sequence[Account]


@dataclass(frozen=True, slots=True)
class Walk:
    """Where a listing through the API stands.

    It walks by date, newest first: each step asks for photos not newer than `before`,
    which is four times as fast as page numbers at 50,000 photos, and loses none where
    releases before 3.1.0 shuffle those of one date between pages.
    """

    part: int = 0  # which key and visibility
    before: datetime | None = None  # when taken
    page: int = 1  # more only while a whole page lies within one millisecond
    seen: Mapping[str, datetime] = field(default_factory=dict)  # what can be listed again
    quiet: int = 0  # pages in a row that brought nothing new


FAR_FUTURE = datetime(9999, 12, 31, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)  # answers carry these, the database microseconds


def moment(text: object) -> datetime | None:
    """A date of Immich's; None for one that Python's calendar does not have."""
    try:
        return min(datetime.fromisoformat(str(text)).astimezone(UTC), FAR_FUTURE)
    except (ValueError, OverflowError):
        return None


def onward(walk: Walk, listed: Mapping[str, datetime], more: bool, stable: bool) -> Walk | None:
    """The step after one that listed these photos; None at the end of the part.

    `stable`: the server orders photos of one date the same way each time. Where it
    does not, pages within one millisecond are gone through until they bring nothing new.
    """
    quiet = 0 if listed.keys() - walk.seen.keys() else walk.quiet + 1
    seen = {**walk.seen, **listed}
    bound = min(listed.values(), default=FAR_FUTURE) + MILLISECOND
    if more and walk.before and bound >= walk.before:
        return replace(walk, page=walk.page + 1, seen=seen, quiet=quiet)
    if walk.page > 1 and not stable and quiet < 4 * walk.page:
        return replace(walk, page=1, seen=seen, quiet=quiet)
    if not more:
        return None
    again = {asset_id: date for asset_id, date in seen.items() if date <= bound}
    return Walk(walk.part, bound, seen=again)


class Immich(Session):
    """A session with Immich's REST interface at one address."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def call(self, key: str, method: str, path: str, **options: Any) -> Reply:
        """Send one request with a user's key; without one for "", where none is needed."""
        headers = {"x-api-key": key or None} | options.pop("headers", {})
        own: dict[str, Any] = {"timeout": IMMICH_TIMEOUT, "headers": headers}
        return http(self, method, self.url + path, blame=immich_error, **own | options)


class ApiLibrary:
    """Immich's REST API, 1.132 to 3.3.

    Every photo is read and written with the key of its owner, and JSON is read
    leniently: an odd field never costs more than that field.
    """

    must_confirm = True

    def __init__(self, immich: Immich, server: Server) -> None:
        self._immich = immich
        self._server = server
        self._accounts = server.accounts
        users = range(len(server.accounts))
        self._parts = [(number, v) for number in users for v in ("timeline", "archive")]
        self._ahead: timedelta | None = None  # of the server's clock before ours

    def clock(self) -> datetime:
        """The Date header of GET /server/version; a proxy may have taken it away.

        What the version is counts from then on: Immich may have been upgraded.
        """
        reply, self._server.version = immich_version(self._immich)
        with suppress(ValueError):
            return date_in(reply.headers.get("Date", ""))
        return datetime.now(UTC)

    def _keeps_notes(self) -> bool:
        """Whether this release has metadata of photos that keys may write."""
        return self._server.version >= (2, 5, 0)

    def _now(self) -> datetime:
        """The server's time, which is asked for once."""
        if self._ahead is None:
            self._ahead = whole_library(self.clock)() - datetime.now(UTC)
        return datetime.now(UTC) + self._ahead

    def page(
        self, cursor: Walk | None, since: datetime | None = None
    ) -> tuple[list[Asset], Walk | None]:
        """POST /search/metadata, in the flat shape that all releases understand."""
        walk = cursor or Walk()
        number, visibility = self._parts[walk.part]
        query = {"size": PAGE, "page": walk.page, "order": "desc", "withExif": True}
        if walk.before:
            query["takenBefore"] = iso(walk.before)
        if since:
            query["createdAfter"] = iso(since)
        body = query | self._filter(visibility)
        try:
            told = self._call(number, "POST", "/search/metadata", assets_found, json=body)
        except Gone:  # with its key: on to the next one
            told = {}
        items = [i for i in dig_list(told, "items") if isinstance(dig(i, "id"), str)]
        listed: dict[str, datetime] = {}
        date = walk.before or FAR_FUTURE
        for item in items:
            date = moment(item.get("fileCreatedAt")) or date
            listed[item["id"]] = date
        fresh = (item for item in items if item["id"] not in walk.seen)
        noted = not self._keeps_notes()
        photos = ((item, photo_listed(item, str(number), noted=noted)) for item in fresh)
        assets = [photo for item, photo in photos if photo and self._owns(number, item)]
        more, stable = dig(told, "nextPage") is not None, self._server.version >= (3, 1, 0)
        step = onward(walk, listed, more, stable)
        if step is None and walk.part + 1 < len(self._parts):
            step = Walk(walk.part + 1)
        return assets, step

    def _filter(self, visibility: str) -> dict[str, Any]:
        """Always an explicit visibility: what goes without saying differs by release."""
        if self._server.version >= (1, 133, 0):
            return {"type": "IMAGE", "visibility": visibility}
        return {"type": "IMAGE", "isArchived": visibility == "archive", "isVisible": True}

    def _owns(self, number: int, item: dict[str, Any]) -> bool:
        """Whether the key's user owns a photo: searches list those of partners too.

        A key without user.read does not know its user; then one photo of each owner
        tells, since only its owner may update it. The update is empty.
        """
        owner, account = dig(item, "ownerId"), self._accounts[number]
        if account.user_id is None and owner not in account.strangers:
            path = f"/assets/{item['id']}"
            ask = functools.partial(self._call, number, path=path, read=Reply.json)
            try:
                ask("PUT", json={})
                if owner in [other.user_id for other in self._accounts]:
                    account.strangers.add(owner)  # another key of the same user
                else:
                    account.user_id = owner
            except Gone:
                with suppress(Gone):
                    ask("GET")  # it is there still, so it is somebody else's
                    account.strangers.add(owner)
        return bool(owner) and owner == account.user_id

    def total(self) -> int:
        """POST /search/statistics, which needs asset.statistics."""
        count = 0
        for number, visibility in self._parts:
            # not by _call: a key without this right is as good as any for the work
            key, body = self._accounts[number].key, self._filter(visibility)
            told = self._immich.call(key, "POST", "/search/statistics", json=body).json()
            counted = dig(told, "total")
            count += counted if isinstance(counted, int) else 0
        return count

    def news(self, since: datetime, now: datetime) -> list[Asset]:
        """What was uploaded since then: all pages of it, mostly one."""
        assets, cursor = self.page(None, since)
        while cursor:
            more, cursor = self.page(cursor, since)
            assets += more
        return assets

    def watch(self, seen: Callable[[str], None], cooldown: float) -> None:
        """Nothing to watch: Immich tells of uploads only to keys that may do everything."""

    def find(self, asset: Asset) -> Asset:
        """GET /assets/{id}."""
        found = photo_listed(self._read(asset), asset.source, noted=asset.noted)
        if not found:
            raise Gone("photo_excluded")
        return replace(found, note=asset.note)

    def claim(self, asset: Asset) -> Asset:
        """As it was listed: nothing arbitrates between instances but `--shard`."""
        return asset

    def release(self, asset: Asset) -> None:
        """Nothing was claimed."""

    def preview(self, asset: Asset) -> bytes:
        """GET /assets/{id}/thumbnail; `edited` (2.5 on) is how the user cropped it."""
        ask = functools.partial(self._call, int(asset.source), limit=PREVIEW_LIMIT)
        query = {"size": "preview", "edited": "true"}
        return ask("GET", f"/assets/{asset.id}/thumbnail", no_web_page, params=query)

    def recall(self, asset: Asset) -> Asset:
        """GET /assets/{id}/metadata/{key}, which is 400 where there is none."""
        if asset.noted:
            return asset
        try:
            path = f"/assets/{asset.id}/metadata/{KEY}"
            value = dig(self._call(int(asset.source), "GET", path, Reply.json), "value")
        except Permanent:
            value = None
        return replace(asset, note=note_in(value), noted=True)

    def write(self, asset: Asset, text: str, note: Note | None) -> bool:
        """GET and PUT /assets/{id}: there is no write on condition, so read just before.

        The GET also tells whether a write that timed out was done after all. A second
        PUT close to the first could be lost.
        """
        current = self._read(asset)
        stored = dig(current, "exifInfo", "description") or ""
        if stored == text:
            return True
        if dig(current, "isTrashed") is True:
            raise Gone("photo_gone")
        if stored != asset.description:
            return False
        body = json.dumps({"description": text}).encode()
        if len(body) > BODY_LIMIT:
            raise Permanent("description_too_long")
        path = f"/assets/{asset.id}"
        self._call(int(asset.source), "PUT", path, Reply.json, data=body, headers=JSON_BODY)
        return True

    def read_back(self, assets: Sequence[Asset], age: float) -> dict[str, str]:
        """POST /search/metadata for many that were updated, GET /assets/{id} for each other."""
        stored: dict[str, str] = {}
        if len(assets) > 1:
            query = {"size": PAGE, "withExif": True, "order": "desc"}
            query["updatedAfter"] = iso(self._now() - timedelta(seconds=age + 10))
            for number, visibility in self._parts:
                own = {asset.id for asset in assets if asset.source == str(number)}
                if own <= stored.keys():
                    continue
                body = query | self._filter(visibility)
                with suppress(Gone):  # with its key
                    told = self._call(number, "POST", "/search/metadata", assets_found, json=body)
                    for item in dig_list(told, "items"):
                        if (asset_id := dig(item, "id")) in own:
                            text = dig(item, "exifInfo", "description")
                            stored[asset_id] = text if isinstance(text, str) else ""
        for asset in assets:
            if asset.id not in stored:
                with suppress(Gone):
                    stored[asset.id] = dig(self._read(asset), "exifInfo", "description") or ""
        return stored

    def remember(self, notes: Sequence[tuple[Asset, Note | None]]) -> None:
        """PUT /assets/metadata for many, /assets/{id}/metadata for each where that is refused."""
        if not self._keeps_notes():
            return
        now = datetime.now(UTC)
        for number in range(len(self._accounts)):
            own = [(asset, note) for asset, note in notes if asset.source == str(number)]
            kept = [(asset, {"key": KEY, "value": note.value(now)}) for asset, note in own if note]
            items = [{"assetId": asset.id, **item} for asset, item in kept]
            try:
                if items:
                    self._call(number, "PUT", "/assets/metadata", Reply.json, json={"items": items})
            except (Permanent, Gone):  # one that is gone stands for all
                for asset, item in kept:
                    with suppress(Permanent, Gone):
                        path = f"/assets/{asset.id}/metadata"
                        self._call(number, "PUT", path, Reply.json, json={"items": [item]})
            for asset in (asset for asset, note in own if not note):
                with suppress(Permanent, Gone):
                    path = f"/assets/{asset.id}/metadata/{KEY}"
                    self._call(number, "DELETE", path, no_web_page)

    def _read(self, asset: Asset) -> dict[str, Any]:
        """GET /assets/{id}; Retryable if something else answers."""
        told = self._call(int(asset.source), "GET", f"/assets/{asset.id}", Reply.json)
        if dig(told, "id") != asset.id:
            raise Retryable("not_json", url=public(self._immich.url))
        return dict(told)

    def _call(
        self, number: int, method: str, path: str, read: Callable[[Reply], T], **options: Any
    ) -> T:
        """A request by one of the keys, and its answer read.

        Gone once the key is refused, Fatal if it was the last.
        """
        account = self._accounts[number]
        try:
            if not account.refused:
                return read(self._immich.call(account.key, method, path, **options))
        except (Retryable, Unexpected) as error:
            raise self._blamed(error, account.key) from error
        except Fatal as error:
            if error.key not in ("immich_key_refused", "immich_permission_missing"):
                raise
            with account.lock:
                first, account.refused = not account.refused, error
            if all(other.refused for other in self._accounts):
                raise
            if first:
                log.error("%s", t("key_refused", number=account.number, why=error))
        raise Gone("key_refused", number=account.number, why=account.refused)

    def _blamed(self, error: AnalyzeError, key: str) -> Retryable:
        """Trouble with this request alone, or HostDown if Immich answers nothing else either.

        Its statuses do not tell: it says 500 about one photo, and about everything while
        its database is away; and a proxy may say anything.
        """
        kind, pause = Retryable, getattr(error, "pause", None)
        try:
            granted(self._immich, key, self._server.version)
        except AnalyzeError:
            kind = HostDown
        return kind(error.key, pause=pause, **error.fields)

    def close(self) -> None:
        """Close the connections."""
        self._immich.close()


def assets_found(reply: Reply) -> dict[str, Any]:
    """The photos in the answer of POST /search/metadata; Retryable if it is another's answer."""
    found = dig(reply.json(), "assets")
    if not isinstance(found, dict):
        raise Retryable("not_json", url=reply.url)
    return found


def no_web_page(reply: Reply) -> bytes:
    """The body of an answer; Retryable for a page that a proxy shows to people."""
    if "text/html" in reply.headers.get("Content-Type", ""):
        raise Retryable("not_json", url=reply.url)
    return reply.body


def photo_listed(item: Mapping[str, Any], source: str, *, noted: bool) -> Asset | None:
    """A photo as POST /search/metadata lists it; None for what the search let through besides.

    No preview was made if thumbhash is null.
    """
    if item.get("type") != "IMAGE" or item.get("visibility") in ("hidden", "locked"):
        return None
    if item.get("isTrashed") is True or item.get("isOffline") is True:
        return None
    description = dig(item, "exifInfo", "description")
    return Asset(
        id=item["id"],
        name=str(item.get("originalFileName") or item["id"]),
        description=description if isinstance(description, str) else "",
        source=source,
        ready=bool(item.get("thumbhash")),
        noted=noted,
        library=str(item.get("libraryId") or ""),
    )


def open_api(config: Config) -> tuple[Callable[[], Library], Callable[[], bool]]:
    """Check Immich's address and each key; one that is refused is left out."""
    url = config.immich_api_url
    accounts: dict[str, Account] = {}  # by user, as two keys may be of one
    refused: list[Fatal] = []
    with closing(Immich(url)) as immich:
        _, version = immich_version(immich)
        for number, key in enumerate(config.immich_api_keys, 1):
            try:
                user_id = user_of(immich, key, version)
                accounts.setdefault(user_id or key, Account(key, number, user_id))
            except Unexpected:  # says nothing of the key
                raise
            except Fatal as error:
                refused.append(Fatal("key_refused", number=number, why=error))
    if not accounts:
        raise refused[0]
    for trouble in refused:
        log.error("%s", trouble)
    if config.policy is Policy.OUTDATED and version < (2, 5, 0):
        raise Fatal("notes_needed")
    server = Server(version, list(accounts.values()))
    return (
        lambda: ApiLibrary(Immich(url), server),
        lambda: not refused and not any(account.refused for account in server.accounts),
    )


def immich_version(immich: Immich) -> tuple[Reply, Version]:
    """GET /server/version, which needs no key and answers in maintenance too."""
    try:
        reply = immich.call("", "GET", "/server/version", timeout=CHECK_TIMEOUT)
        told = reply.json()
        major, minor, patch = (int(dig(told, part)) for part in ("major", "minor", "patch"))
    except (Retryable, TypeError, ValueError) as error:
        if getattr(error, "key", "not_json") not in ("not_json", "immich_maintenance"):
            raise
        status = getattr(error, "fields", {}).get("status", 200)
        raise Unexpected("immich_wrong", url=public(immich.url), status=status) from error
    return reply, (major, minor, patch)


def granted(immich: Immich, key: str, version: Version) -> list[Any]:
    """What a key may do, by GET /api-keys/me; releases before it say only that it is valid."""
    if version < (1, 139, 0):
        immich.call(key, "POST", "/auth/validateToken", timeout=CHECK_TIMEOUT).json()
        return ["all"]
    told = immich.call(key, "GET", "/api-keys/me", timeout=CHECK_TIMEOUT).json()
    return dig_list(told, "permissions")


def user_of(immich: Immich, key: str, version: Version) -> str | None:
    """The id of a key's user, None if it may not ask; Fatal for a key that cannot work."""
    allowed = granted(immich, key, version)
    missing = [p for p in NEEDED_PERMISSIONS if p not in allowed and "all" not in allowed]
    if missing:
        raise Fatal("immich_permission_missing", permission=", ".join(missing))
    try:
        user_id = dig(immich.call(key, "GET", "/users/me", timeout=CHECK_TIMEOUT).json(), "id")
    except Fatal as error:
        if error.key != "immich_permission_missing":
            raise
        return None
    return user_id if isinstance(user_id, str) else None


@dataclass(frozen=True, slots=True)
class Statements:
    """The SQL for one generation of Immich's tables."""

    listing: str  # since, after, limit → the columns of an Asset
    news: str  # since, now, after, limit → the same and a mark to go on after, in its order
    find: str  # id → the same, and whether it is live and whether it is ready
    count: str
    write: str  # id, text, listed, note
    forget: str  # the same, and takes the note away
    remember: str  # id, note
    samples: str  # → paths of some previews
    locks: bool  # a description can be kept from being extracted anew (2.4 on)
    notes: bool  # Immich keeps them (2.5 on)
    reads: list[str]  # tables
    exif: str  # the table to write to, and its columns
    writes: list[str]


# A text is kept from being extracted anew; where ours is taken back, the camera's may return.
LOCK = """, "lockedProperties" = CASE WHEN %(text)s = ''
    THEN nullif(array_remove(e."lockedProperties", 'description'), '{}')
    ELSE (SELECT array_agg(DISTINCT p) FROM unnest(
        coalesce(e."lockedProperties", '{}') || ARRAY['description']::varchar[]) p) END"""
SOURCE = """FROM {asset} a {memory}
    LEFT JOIN {exif} e ON e."assetId" = a.id
    LEFT JOIN asset_job_status j ON j."assetId" = a.id
    LEFT JOIN LATERAL (SELECT path FROM {file} WHERE "assetId" = a.id AND type = 'preview'
                       {edited} LIMIT 1) f ON true"""
MEMORY = 'LEFT JOIN asset_metadata m ON m."assetId" = a.id AND m.key = %(key)s'
CHANGE = """WITH written AS (UPDATE {exif} e SET description = %(text)s {lock}
    FROM {asset} a JOIN asset_job_status j ON j."assetId" = a.id
    WHERE e."assetId" = %(id)s::uuid AND a.id = e."assetId" AND {ready}
    AND coalesce(e.description, '') = %(listed)s RETURNING a.id) {kept}
    SELECT id FROM written"""
KEEP_NOTE = """INSERT INTO asset_metadata ("assetId", key, value)
    SELECT id::uuid, %(key)s, %(note)s::jsonb FROM {}
    ON CONFLICT ("assetId", key) DO UPDATE SET value = excluded.value"""
DROP_NOTE = (
    """DELETE FROM asset_metadata WHERE key = %(key)s AND "assetId" IN (SELECT id FROM {})"""
)
FEED_LAG = timedelta(seconds=2)  # a row shows only when its transaction ends
# The UUID version 7 that an `updateId` of this moment begins with.
UUID_AT = """(lpad(to_hex((extract(epoch FROM {}) * 1000)::bigint), 12, '0')
    || repeat('0', 20))::uuid"""


# Not by coalesce(), which hides from the planner how few those are.
EMPTY = "(e.description IS NULL OR e.description !~ '[^[:space:]]')"


def table_names(tables: Mapping[str, set[str]]) -> tuple[str, str, str]:
    """Immich's names for the tables of photos, EXIF and files; Unexpected if it has none."""
    newer = "asset_exif" in tables  # 1.136 renamed them
    names = ("asset", "asset_exif", "asset_file") if newer else ("assets", "exif", "asset_files")
    if not {*names, "asset_job_status"} <= tables.keys():
        raise Unexpected("no_immich_tables")
    return names


def statements(
    tables: Mapping[str, set[str]], policy: Policy, oldest: str = "-infinity"
) -> Statements:
    """Choose SQL by tables and columns, not by version, for photos uploaded since `oldest`."""
    asset, exif, file = names = table_names(tables)
    edited = 'ORDER BY "isEdited" DESC' if "isEdited" in tables[file] else ""
    old = "visibility" not in tables[asset]  # before 1.133
    live = f"""a."deletedAt" IS NULL AND a.status = 'active' AND NOT a."isOffline"
        AND {'a."isVisible"' if old else "a.visibility IN ('timeline', 'archive')"}
        AND a.type = 'IMAGE' AND a."createdAt" >= '{oldest}'"""
    extracted = 'j."metadataExtractedAt" IS NOT NULL'
    ready = f'{extracted} AND e."assetId" IS NOT NULL AND f.path IS NOT NULL'
    locks, notes = "lockedProperties" in tables[exif], "isEdited" in tables[asset]
    columns = f"""a.id, a."originalFileName", coalesce(e.description, ''), f.path,
        {"m.value" if notes else "NULL"}, a."libraryId\""""
    memory, kept = (MEMORY, ", kept AS ({})") if notes else ("", "")
    source = SOURCE.format(asset=asset, exif=exif, file=file, edited=edited, memory=memory)
    wanted = f"{live} AND {ready} AND {EMPTY if policy is Policy.NONE else 'true'}"
    row = {"exif": exif, "asset": asset, "lock": LOCK if locks else ""}
    row["ready"] = f"{live} AND {extracted}"
    return Statements(
        listing=f"""SELECT {columns} {source} WHERE {wanted}
            AND (%(since)s IS NULL OR a."createdAt" >= %(since)s)
            AND a.id > %(after)s::uuid AND e."assetId" > %(after)s::uuid
            AND j."assetId" > %(after)s::uuid ORDER BY a.id LIMIT %(limit)s""",
        news=f"""SELECT {columns}, n."updateId" {source}
            JOIN {file} n ON n."assetId" = a.id AND n.type = 'preview'
            WHERE {wanted} AND n."updateId" < {UUID_AT.format("%(now)s")}
            AND n."updateId" > greatest(%(after)s::uuid, {UUID_AT.format("%(since)s")})
            ORDER BY n."updateId" LIMIT %(limit)s""",
        find=f"SELECT {columns}, {live}, {ready} {source} WHERE a.id = %(id)s::uuid",
        count=f"SELECT count(*) {source} WHERE {wanted}",
        write=CHANGE.format(**row, kept=kept.format(KEEP_NOTE.format("written"))),
        forget=CHANGE.format(**row, kept=kept.format(DROP_NOTE.format("written"))),
        remember=KEEP_NOTE.format("(SELECT %(id)s AS id) one") if notes else "",
        samples=f"SELECT path FROM {file} WHERE type = 'preview' LIMIT 50",  # noqa: S608
        locks=locks,
        notes=notes,
        reads=[*names, "asset_job_status"],
        exif=exif,
        writes=["description", "lockedProperties"][: 1 + locks],
    )


TABLES = """
    SELECT c.relname, array_agg(a.attname::text)
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE pg_table_is_visible(c.oid) AND c.relkind IN ('r', 'p')
    GROUP BY c.relname"""
MISSING_GRANTS = """
    SELECT format('GRANT SELECT ON %%I TO %%I', name, current_user) FROM unnest(%(reads)s) name
    WHERE NOT has_any_column_privilege(quote_ident(name)::regclass, 'SELECT')
    UNION ALL
    SELECT format('GRANT UPDATE (%%I) ON %%I TO %%I', name, %(exif)s, current_user)
    FROM unnest(%(writes)s) name
    WHERE NOT has_column_privilege(quote_ident(%(exif)s)::regclass, name, 'UPDATE')
    UNION ALL
    SELECT format('GRANT %%s ON asset_metadata TO %%I', name, current_user)
    FROM unnest(%(notes)s::text[]) name
    WHERE NOT has_table_privilege(to_regclass('asset_metadata'), name)"""
# Two numbers, as Immich's own locks have one; the first says whose they are.
CLAIM = "SELECT pg_try_advisory_lock(1229802817, hashtext(%(id)s))"
RELEASE = "SELECT pg_advisory_unlock(1229802817, hashtext(%(id)s))"
BEFORE_ALL_IDS = "00000000-0000-0000-0000-000000000000"
REOPEN_AFTER = 3600.0  # seconds; Immich may have been upgraded, which changes its tables


CONNECTION: dict[
    str, Any
] = {  # unless the setting says otherwise; a lost connection is noticed in a minute
    "application_name": "immich-analyze",
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60000,  # ms
}


class Database:
    """One connection, opened when it is first needed, again after it was lost, and each hour."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg2.extensions.connection | None = None
        self._opened = 0.0
        self._tables: dict[str, set[str]] = {}

    def rows(self, statement: str, **parameters: object) -> list[tuple[Any, ...]]:
        """Run one statement as a transaction of its own; the rows, if it gives any."""
        kept = self._connection is not None  # since an earlier call, and maybe dead since then
        try:
            with sql(), self._open().cursor() as cursor:
                cursor.execute(statement, parameters | {"key": KEY})
                return cursor.fetchall() if cursor.description else [()] * cursor.rowcount
        except HostDown:
            self.close()
            if not kept:
                raise
        except Unexpected:  # the tables may be others by now
            self.close()
            raise
        return self.rows(statement, **parameters)

    def tables(self) -> dict[str, set[str]]:
        """The columns of each table, as they were when the connection was made."""
        with sql():
            self._open()
        return self._tables

    def _open(self) -> psycopg2.extensions.connection:
        now, old = time.monotonic(), self._connection
        if old and not old.closed and now < self._opened + REOPEN_AFTER:
            return old
        self.close()
        own = psycopg2.extensions.parse_dsn(self._url)
        new: psycopg2.extensions.connection = psycopg2.connect(**(CONNECTION | own))
        new.autocommit = True
        new.set_client_encoding("UTF8")
        with new.cursor() as cursor:
            cursor.execute("SET lock_timeout = '10s'; SET statement_timeout = '5min'")
            cursor.execute(TABLES)
            self._tables = {name: set(columns) for name, columns in cursor}
        self._connection, self._opened = new, now
        return new

    def close(self) -> None:
        """Close the connection; twice is fine."""
        if self._connection:
            with sql():
                self._connection.close()
            self._connection = None


class DbLibrary:
    """Immich's own tables, 1.132 to 3.3, on PostgreSQL 14 and newer.

    Only one description is changed at a time, only while it is as listed, and with its note.
    """

    must_confirm = False

    def __init__(
        self, database: Database, choose: Callable[[Mapping[str, set[str]]], Statements], root: Path
    ) -> None:
        self._database = database
        self._choose = choose
        self._root = root
        self._known: tuple[Mapping[str, set[str]], Statements] | None = None

    @property
    def _statements(self) -> Statements:
        tables = self._database.tables()
        if not self._known or self._known[0] is not tables:
            try:
                self._known = (tables, self._choose(tables))
            except Unexpected:  # in the middle of a restore: look again the next time
                self._database.close()
                raise
        return self._known[1]

    def clock(self) -> datetime:
        """PostgreSQL's clock."""
        now: datetime = self._database.rows("SELECT clock_timestamp()")[0][0]
        return now

    def page(
        self, cursor: str | None, since: datetime | None = None
    ) -> tuple[list[Asset], str | None]:
        """One page by id: only photos with work to do, each with its preview's path."""
        listing, after = self._statements.listing, cursor or BEFORE_ALL_IDS
        rows = self._database.rows(listing, since=since, after=after, limit=PAGE)
        assets = [row_listed(row) for row in rows]
        return assets, assets[-1].id if len(assets) == PAGE else None

    def total(self) -> int:
        """The exact number of photos that the listing brings."""
        return int(self._database.rows(self._statements.count)[0][0])

    def news(self, since: datetime, now: datetime) -> list[Asset]:
        """The feed of preview rows by `asset_file."updateId"`: only photos with work to do."""
        assets: list[Asset] = []
        rows: list[tuple[Any, ...]] = []
        after = BEFORE_ALL_IDS
        while not assets or len(rows) == PAGE:
            bounds = {"since": since, "now": now - FEED_LAG, "after": after, "limit": PAGE}
            rows = self._database.rows(self._statements.news, **bounds)
            assets += map(row_listed, rows)
            if not rows:
                break
            after = rows[-1][-1]
        return assets

    def watch(self, seen: Callable[[str], None], cooldown: float) -> Arrivals:
        """Watch `thumbs/`."""
        return Arrivals(self._root / "thumbs", seen, cooldown)

    def find(self, asset: Asset) -> Asset:
        """Look a photo up by its id."""
        rows = self._database.rows(self._statements.find, id=asset.id)
        if not rows or not rows[0][-2]:
            raise Gone("photo_excluded")
        return replace(row_listed(rows[0]), ready=rows[0][-1])

    def recall(self, asset: Asset) -> Asset:
        """The note came with the listing."""
        return asset

    def claim(self, asset: Asset) -> Asset:
        """Take an advisory lock on this connection, with which it ends; then look the photo up."""
        if self._database.rows(CLAIM, id=asset.id) != [(True,)]:
            raise Gone("claimed_elsewhere")
        try:
            return self.find(asset)
        except AnalyzeError:
            self.release(asset)
            raise

    def release(self, asset: Asset) -> None:
        """Give the lock back, if need be with the connection."""
        try:
            self._database.rows(RELEASE, id=asset.id)
        except AnalyzeError:
            self._database.close()

    def preview(self, asset: Asset) -> bytes:
        """Read the file that `asset_file.path` names, or names by now.

        Unexpected if the folder has none of the previews: the disk or share is away.
        """
        try:
            return read_file(inside(self._root, asset.source))
        except Permanent as error:
            now = self.find(asset)
            if trouble := root_trouble(self._root, self._database, self._statements):
                raise trouble from error
            # it may lie elsewhere by now, or the disk may just have come back
            return read_file(inside(self._root, now.source or asset.source))

    def write(self, asset: Asset, text: str, note: Note | None) -> bool:
        """UPDATE the row if it still holds what was listed, lock the property, keep the note."""
        statement = self._statements.write if note else self._statements.forget
        values = {"id": asset.id, "text": text, "listed": asset.description}
        if self._database.rows(statement, note=as_json(note), **values):
            return True
        stored = self.find(asset)
        if not stored.ready:
            raise Gone("photo_gone")
        return stored.description == text

    def read_back(self, assets: Sequence[Asset], age: float) -> dict[str, str]:
        """Nothing to read back: PostgreSQL keeps what it took."""
        return {}

    def remember(self, notes: Sequence[tuple[Asset, Note | None]]) -> None:
        """INSERT or UPDATE the rows of `asset_metadata`."""
        for asset, note in notes:
            if note and self._statements.notes:
                self._database.rows(self._statements.remember, id=asset.id, note=as_json(note))

    def close(self) -> None:
        """Close the connection."""
        self._database.close()


def row_listed(row: Sequence[Any]) -> Asset:
    """A photo as the statements list it."""
    asset_id, name, description, path, note, library = row[:6]
    return Asset(
        id=str(asset_id),
        name=name,
        description=description,
        source=path or "",
        note=note_in(note),
        library=str(library or ""),
    )


def as_json(note: Note | None) -> str | None:
    """A note as PostgreSQL takes it."""
    return json.dumps(note.value(datetime.now(UTC))) if note else None


PREVIEW_NAME = re.compile(
    r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})[-_]preview(?:_edited)?\.(?:jpeg|jpg|webp)"
)
RENEW_AFTER = 3600.0  # seconds between two beginnings of the watch, as each is hard work
WRITTEN = [FileCreatedEvent, FileModifiedEvent, FileClosedEvent, FileMovedEvent]


class Arrivals(FileSystemEventHandler):
    """Tells by inotify of previews that are written, each once in `cooldown` seconds.

    It only makes things prompt: what it misses, the database has. So trouble with it is
    one line, and no error.
    """

    def __init__(self, folder: Path, seen: Callable[[str], None], cooldown: float) -> None:
        self.since = math.inf  # when it began to see everything
        self._folder = folder
        self._seen = seen
        self._cooldown = cooldown
        self._quiet: dict[str, float] = {}  # id: until when; only the observer's thread asks
        self._missed = False
        self._observer: BaseObserver | None = None
        self._renew()

    def _renew(self) -> None:
        """Begin, in a thread of its own: a large library has 65,536 folders to walk through."""
        self.close()
        self.since, self._renewed = math.inf, time.monotonic()
        threading.Thread(target=self._begin, name="watch", daemon=True).start()

    def _begin(self) -> None:
        try:
            os.scandir(self._folder).close()  # watchdog would leave it out in silence
            self._observer = observer = Observer()
            observer.schedule(self, str(self._folder), recursive=True, event_filter=WRITTEN)
            observer.start()
        except OSError as error:
            self._complain(error)
            return
        try:
            # folders that go beyond the limit are left out in silence, but then one more does too
            nothing, parent = FileSystemEventHandler(), str(self._folder.parent)
            observer.unschedule(observer.schedule(nothing, parent, event_filter=[]))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._complain(error)
        self.since = time.monotonic()

    def _complain(self, error: OSError) -> None:
        full, many = error.errno == errno.ENOSPC, error.errno == errno.EMFILE
        key = "watch_limit" if full else "watch_instances" if many else "watch_failed"
        log.warning("%s", t(key, folder=self._folder, why=error.strerror))

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Called by the observer, in its thread."""
        name = os.path.basename(os.fsdecode(event.dest_path or event.src_path))
        if not (match := PREVIEW_NAME.fullmatch(name)):
            return
        now, asset_id = time.monotonic(), match[1]
        while self._quiet and (first := next(iter(self._quiet))) and self._quiet[first] <= now:
            del self._quiet[first]
        if asset_id not in self._quiet:
            self._quiet[asset_id] = now + self._cooldown
            self._seen(asset_id)

    def missed(self) -> None:
        """Say, once, that photos arrived without being seen; the folder may be another by now."""
        if not self._missed:
            self._missed = True
            log.warning("%s", t("watch_missed"))
        if time.monotonic() > self._renewed + RENEW_AFTER:
            self._renew()

    def close(self) -> None:
        """End the observer."""
        if self._observer:
            self._observer.stop()


def inside(root: Path, path: str) -> Path:
    """Where a preview lies on this machine.

    Immich's paths begin with the folder as its container sees it (/data, /usr/src/app/
    upload, or none), but all previews lie under `thumbs/`. Permanent for one outside.
    """
    _, thumbs, rest = path.rpartition("thumbs/")
    try:
        real = (root / thumbs / rest).resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise Permanent("preview_missing") from error
    if not thumbs or not real.is_relative_to(root.resolve()):
        raise Permanent("preview_outside", path=path)
    return real


def read_file(path: Path) -> bytes:
    """A regular file's content; Permanent if there is none to read, Retryable for a sick disk."""
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise Permanent("preview_missing")
        with path.open("rb") as file:
            return file.read(PREVIEW_LIMIT)
    except OSError as error:
        lasting = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
        kind = Permanent if error.errno in lasting else Retryable
        raise kind("unreadable_file", file=path, why=error.strerror) from error


def open_database(config: Config) -> tuple[Callable[[], Library], Callable[[], bool]]:
    """Check the connection, tables, rights and the folder of the previews."""
    url, root = postgres_url(config.postgres_url), config.immich_root
    with closing(Database(url)) as database:
        oldest = "-infinity"
        if not config.mode.backlog:
            [(now,)] = database.rows("SELECT clock_timestamp()")
            oldest = (now - SWEEP_SPAN).isoformat()
        choose = functools.partial(statements, policy=config.policy, oldest=oldest)
        chosen = choose(database.tables())
        if database.rows("SHOW transaction_read_only") != [("off",)]:
            raise Unexpected("database_read_only")
        needs = {"reads": chosen.reads, "exif": chosen.exif, "writes": chosen.writes}
        needs["notes"] = ["SELECT", "INSERT", "UPDATE", "DELETE"] if chosen.notes else []
        if missing := database.rows(MISSING_GRANTS, **needs):
            raise Fatal("grants_missing", grants="; ".join(grant for (grant,) in missing))
        if trouble := root_trouble(root, database, chosen):
            raise trouble
    if config.policy is Policy.OUTDATED and not chosen.notes:
        raise Fatal("notes_needed")
    if not chosen.locks:
        log.warning("%s", t("no_lock"))
    return lambda: DbLibrary(Database(url), choose, root), lambda: True


def root_trouble(root: Path, database: Database, chosen: Statements) -> Unexpected | None:
    """What is wrong with the folder of the previews, judged by some that it should hold."""
    if not os.path.isdir(root / "thumbs"):  # also where it may not be looked at
        return Unexpected("root_wrong", root=root)
    samples = [path for (path,) in database.rows(chosen.samples)]
    if not samples or any(is_preview(root, path) for path in samples):
        return None
    looked_for = root / "thumbs" / samples[0].rpartition("thumbs/")[2]
    return Unexpected("root_empty", root=root, path=looked_for)


def is_preview(root: Path, path: str) -> bool:
    """Whether the file that a path of the database names can be read here."""
    try:
        return os.access(inside(root, path), os.R_OK)
    except Permanent:
        return False


def open_library(config: Config) -> tuple[Callable[[], Library], Callable[[], bool]]:
    """Check the library once; what makes one for each worker, and what tells if all was reached."""
    opener = open_api if config.access is Access.API else open_database
    return whole_library(lambda: opener(config))()


# ------------------------------------------------------------------------------
# 8 Pipeline: the way of a photo. Knows no HTTP, no SQL, no signals.
# ------------------------------------------------------------------------------

LIBRARY_TRIES = 3  # of a call that fails by itself; a library that is away costs none
PICTURE_TRIES = 3  # of one picture; a host that is away or sick costs none of them
VALUABLE_TRIES = 12  # of a write, whose text took minutes, and of a page
LONGEST_PAUSE = 60.0  # however long the library asks to be left alone

OVERLAP = timedelta(minutes=1)  # a photo may show in a listing so long after its time
HINT_PAUSE = 0.05  # Immich writes a preview's row 20 to 110 ms after its file
PENDING_PAUSE = 1.0  # until a photo without a preview is looked up
FAILED_PAUSE = 60.0
GROWTH = 1.5  # of each of these pauses
LASTING = 3600.0  # how long they go on; what is left then is left to the sweep
MOST_HINTS = 1000
CHECK_PAUSE = 2.0  # seconds in which Immich loses a text that it cannot keep
CHECK_WAIT = 120.0  # for others to be read back with
CHECK_MOST = 50
MOST_LOSSES = 3
MAY_COME_BACK = ("photo_gone", "photo_excluded", "claimed_elsewhere")
FOR_GOOD = {  # what a picture fails with that it will fail with again
    *("picture_refused", "preview_unknown", "preview_broken", "not_kept"),
    "description_too_long",
    *("answer_empty", "answer_repeats", "answer_cut"),
}
PAGE_PAUSE = 60.0  # after a page that could not be had, growing too
SWEEP_INTERVAL = 3600.0
DAY = 86400.0


class Outcome(StrEnum):
    """What became of a photo."""

    DESCRIBED = "described"
    UNDONE = "undone"  # its description was taken back
    SKIPPED = "skipped"  # has a description, got one meanwhile, or is gone
    NOT_READY = "not_ready"  # Immich has not made its preview yet
    FAILED = "failed"


class Stop(threading.Event):
    """Set once the process is to end. Who naps is also woken by news."""

    def __init__(self) -> None:
        super().__init__()
        self._news = threading.Event()

    def set(self) -> None:
        """End all waiting, for good."""
        super().set()
        self._news.set()

    def rouse(self) -> None:
        """End the nap of whoever naps now, or the next nap."""
        self._news.set()

    def nap(self, seconds: float) -> None:
        """Wait for so long, for news, or for the end."""
        self._news.wait(seconds)
        self._news.clear()


@dataclass(slots=True)
class Job:
    """A photo on its way, and what is known of it from earlier tries."""

    asset: Asset
    text: str = ""  # what the model said, also while it cannot be stored
    stored: str = ""  # the whole description that was stored
    written: float = 0.0  # when, by the monotonic clock
    pause: float = 0.0  # until it is looked at again, growing
    until: float = 0.0  # when it is left to the sweep, by the monotonic clock
    failed: bool = False  # which was said and counted once
    question: Question | None = None  # what hosts are asked, until one answered
    failed_at: set[str] = field(default_factory=set)  # hosts, in the tries of this time
    tries: int = 0  # of this time


class Agenda:
    """Photos to be looked at again, each at its time; shared by all.

    They hold no worker meanwhile. `lasting` is how long a photo that fails is tried again,
    in seconds: 0 in a batch, where the next run does that.
    """

    def __init__(self, wake: Callable[[], None], lasting: float) -> None:
        self._lock = threading.Lock()
        self._due: list[tuple[float, int, Job]] = []  # a heap; the number keeps their order
        self._numbers = itertools.count()
        self._wake = wake
        self._lasting = lasting

    def put(self, job: Job, pause: float = 0.0) -> None:
        """Have a photo looked at after so many seconds."""
        with self._lock:
            heapq.heappush(self._due, (time.monotonic() + pause, next(self._numbers), job))
        self._wake()

    def plan(self, job: Job, pause: float, lasting: float | None = None) -> None:
        """Let a photo be put off from now on, first for `pause` seconds."""
        job.pause = pause
        job.until = time.monotonic() + (self._lasting if lasting is None else lasting)

    def again(self, job: Job) -> bool:
        """Put a photo off, longer each time; False once that went on for long enough."""
        if time.monotonic() >= job.until:
            return False
        job.asset = replace(job.asset, ready=False)  # a person may have written meanwhile
        self.put(job, job.pause)
        job.pause *= GROWTH
        return True

    def due(self) -> Job | None:
        """A photo whose time has come."""
        with self._lock:
            come = self._due and self._due[0][0] <= time.monotonic()
            return heapq.heappop(self._due)[-1] if come else None

    def next_time(self) -> float:
        """When the next one is due, by the monotonic clock."""
        with self._lock:
            return self._due[0][0] if self._due else math.inf

    def __len__(self) -> int:
        return len(self._due)


class Checks:
    """Descriptions that Immich took, to be read back once it could have lost them.

    They are read back together where that saves requests, and hold no worker meanwhile.
    Three losses in a row from one library are enough.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: list[Job] = []  # in the order of their writes
        self._losses: Counter[tuple[str, str]] = Counter()  # in a row, by key and library

    def add(self, job: Job) -> None:
        """Have a description read back that was written just now."""
        job.written = time.monotonic()
        with self._lock:
            self._jobs.append(job)

    def due(self, *, idle: bool) -> list[Job]:
        """What is to be read back now: many, or old ones, or, with nothing else to do, all."""
        with self._lock:
            now = time.monotonic()
            old = sum(job.written + CHECK_PAUSE <= now for job in self._jobs)
            waited = bool(old) and self._jobs[0].written + CHECK_WAIT <= now
            ripe = old >= CHECK_MOST or waited or (idle and old == len(self._jobs))
            count = min(old, CHECK_MOST) if ripe else 0
            due, self._jobs = self._jobs[:count], self._jobs[count:]
            return due

    def next_time(self) -> float:
        """When all can be read back, by the monotonic clock."""
        with self._lock:
            return self._jobs[-1].written + CHECK_PAUSE if self._jobs else math.inf

    def rest(self) -> list[Job]:
        """All that were not read back yet, at the end of a run."""
        with self._lock:
            rest, self._jobs = self._jobs, []
            return rest

    def count(self, asset: Asset, *, lost: bool) -> bool:
        """Note whether a library kept a text; True when that was one loss too many."""
        library = (asset.source, asset.library)
        with self._lock:
            self._losses[library] = self._losses[library] + 1 if lost else 0
            return self._losses[library] == MOST_LOSSES

    def hopeless(self, asset: Asset) -> bool:
        """Whether a photo's library keeps nothing."""
        with self._lock:
            return self._losses[asset.source, asset.library] >= MOST_LOSSES


class Ids:
    """A set of ids at eight bytes each, as a service may run for months."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def _find(self, asset_id: str) -> tuple[int, int, bool]:
        value = int.from_bytes(blake2b(asset_id.encode(), digest_size=8).digest())
        at = bisect_left(self._hashes, value)
        return value, at, self._hashes[at : at + 1] == array("Q", [value])

    def add(self, asset_id: str) -> bool:
        """Put an id in; False if it was there."""
        value, at, there = self._find(asset_id)
        if not there:
            self._hashes.insert(at, value)
        return not there

    def remove(self, asset_id: str) -> None:
        """Take an id out."""
        _, at, there = self._find(asset_id)
        if there:
            self._hashes.pop(at)


class Tally:
    """Which photos were taken and what became of them, shared by all workers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = Ids()
        self._failed: list[str] = []
        self.counts: Counter[Outcome] = Counter()
        self.reasons: Counter[tuple[Outcome, str]] = Counter()  # the same by message key
        self.total: int | None = None  # photos of the backlog, where that is known
        self.listed = 0  # of these, by now
        self.in_hand = 0  # turns that workers have
        self.moved = time.monotonic()  # when the stream or a photo last went on
        self.show: Callable[[Counter[Outcome]], None] | None = None  # told of each photo

    def take(self, asset: Asset) -> bool:
        """Claim a photo; False if somebody has or had it in this run."""
        with self._lock:
            return self._taken.add(asset.id)

    def release(self, asset: Asset) -> None:
        """Let a photo be taken again."""
        with self._lock:
            self._taken.remove(asset.id)

    def give_up(self, asset: Asset) -> None:
        """Leave a photo that failed alone, until `forgive`."""
        with self._lock:
            self._failed.append(asset.id)

    def forgive(self) -> None:
        """Let the photos that failed be taken again."""
        with self._lock:
            for asset_id in self._failed:
                self._taken.remove(asset_id)
            self._failed.clear()

    def hand(self, number: int) -> int:
        """Count a turn that a worker takes (1) or is done with (-1); those in hand now."""
        with self._lock:
            self.in_hand += number
            return self.in_hand

    def add(self, outcome: Outcome, reason: str = "") -> None:
        """Count one photo."""
        with self._lock:
            self.counts[outcome] += 1
            self.reasons[outcome, reason] += 1
            self.moved = time.monotonic()
        if self.show:
            self.show(self.counts)

    def __str__(self) -> str:
        counts = {outcome.value: self.counts[outcome] for outcome in Outcome}
        said = t("tally_undo" if self.counts[Outcome.UNDONE] else "tally", **counts)
        if number := self.reasons[Outcome.SKIPPED, "failed_before"]:
            said += " " + t("tally_failed_before", number=number)
        return said


class Shared:
    """Lets threads take turns pulling from one iterator.

    The lock is held while the iterator looks or waits for work, on purpose: whoever
    waits behind it has nothing else to do.
    """

    def __init__(self, turns: Iterator[list[Job]]) -> None:
        self._turns = turns
        self._turn = threading.Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Job]:
        with self._turn:
            return next(self._turns)


class Patience:
    """Calls the library again on trouble that may pass; shared by all workers.

    A library that is away is waited for, and Fatal after `longest` seconds; a call that
    fails by itself is given up after some tries, with its last error. An outage is two
    lines, however many wait. `what_passes` tells which errors are an outage.
    """

    def __init__(
        self,
        stop: threading.Event,
        pause: float,
        longest: float,
        what_passes: tuple[type[AnalyzeError], ...] = (HostDown, Unexpected),
    ) -> None:
        self._lock = threading.Lock()
        self._stop = stop
        self._pause = pause
        self._longest = longest
        self._what_passes = what_passes
        self._waiting = 0
        self._since = 0.0  # when the first of those who wait began to

    def __call__(self, call: Callable[[], T], tries: int = LIBRARY_TRIES) -> T:
        """What the call gives; Stopped when asked to stop meanwhile."""
        began = None
        try:
            while True:
                try:
                    return call()
                except self._what_passes as error:
                    now = time.monotonic()
                    left = self._longest - (now - (began or now))
                    if left <= 0:
                        raise Fatal("library_away", why=error) from error
                    if began is None:
                        began = now
                        self._begin(error)
                    self._wait(error, left)
                except Retryable as error:
                    tries -= 1
                    if tries <= 0:
                        raise
                    self._wait(error, math.inf)
        finally:
            if began is not None:
                self._end(answered=not isinstance(sys.exception(), Fatal | Stopped))

    def _wait(self, error: AnalyzeError, most: float) -> None:
        asked = getattr(error, "pause", None) or self._pause
        if self._stop.wait(min(most, asked, max(self._pause, LONGEST_PAUSE))):
            raise Stopped("stopped") from error

    def _begin(self, error: AnalyzeError) -> None:
        with self._lock:
            self._waiting += 1
            first = self._waiting == 1
            if first:
                self._since = time.monotonic()
        if first:
            log.info("%s", t("waiting", why=error))

    def _end(self, *, answered: bool) -> None:
        with self._lock:
            self._waiting -= 1
            last = self._waiting == 0
            away = time.monotonic() - self._since
        if last and answered:
            log.info("%s", t("back", time=timedelta(seconds=round(away))))

    def away(self) -> float:
        """For how many seconds the library has been waited for; 0 while it is there."""
        with self._lock:
            return time.monotonic() - self._since if self._waiting else 0.0


@dataclass(frozen=True, slots=True)
class State:
    """All that the threads of a run share; each part guards itself."""

    config: Config
    stop: Stop
    hosts: Hosts
    patience: Patience
    agenda: Agenda
    checks: Checks
    tally: Tally


def in_shard(asset: Asset, shard: tuple[int, int]) -> bool:
    """Whether a photo is in this instance's share, whoever lists it and in whatever order."""
    number, count = shard
    return zlib.crc32(asset.id.encode()) % count == number - 1


def hint(asset_id: str, state: State) -> None:
    """Have a photo looked up whose preview is being written, until it is there.

    In a flood of hints the rest is left to the next look for news.
    """
    asset = Asset(asset_id, asset_id, description="", source="", ready=False)
    wanted = len(state.agenda) < MOST_HINTS and in_shard(asset, state.config.shard)
    if wanted and state.tally.take(asset):
        job = Job(asset)
        state.agenda.plan(job, HINT_PAUSE, state.config.file_write_timeout)
        state.agenda.put(job)


def job_for(asset: Asset, state: State) -> Job | None:
    """Work on a photo, unless it is to be left alone or somebody took it before."""
    wanted = in_shard(asset, state.config.shard) and not left_alone(asset, state.config)
    return Job(asset) if wanted and state.tally.take(asset) else None


class Listing:
    """A listing of the library, a page at a time: the photos that need a description.

    Where it stands is kept, so trouble with a page repeats that page only. A service
    does so later, as other work goes on meanwhile; for a batch it is the end.
    """

    def __init__(
        self, library: Library, state: State, since: datetime | None = None, *, counts: bool
    ) -> None:
        self.next_time = 0.0  # when it has more, by the monotonic clock; never again at its end
        self._library = library
        self._state = state
        self._since = since
        self._counts = counts  # whether what is left out is counted
        self._page: Iterator[Asset] = iter(())
        self._cursor: Cursor | None = None
        self._pause = PAGE_PAUSE
        self._last = False

    def next(self) -> Job | None:
        """The next photo to describe; None after each page, for other work to have its turn."""
        for asset in self._page:
            if job := self._job(asset):
                return job
        if self._last:
            self.next_time = math.inf
        elif time.monotonic() >= self.next_time:
            self._turn_page()
        return None

    def _job(self, asset: Asset) -> Job | None:
        tally, shard = self._state.tally, self._state.config.shard
        if self._counts and in_shard(asset, shard):
            tally.listed += 1
            if reason := left_alone(asset, self._state.config):
                tally.add(Outcome.SKIPPED, reason)
            elif not asset.ready:
                tally.add(Outcome.NOT_READY)
        return job_for(asset, self._state) if asset.ready else None

    def _turn_page(self) -> None:
        service = self._state.config.mode.monitors
        page = functools.partial(self._library.page, self._cursor, self._since)
        try:
            assets, self._cursor = self._state.patience(page, 1 if service else VALUABLE_TRIES)
        except (Retryable, Permanent, Gone) as error:
            if not service:
                raise Fatal(error.key, **error.fields) from error
            log.warning("%s", t("listing_failed", why=error, seconds=f"{self._pause:g}"))
            self.next_time = time.monotonic() + self._pause
            self._pause = min(self._pause * GROWTH, SWEEP_INTERVAL)
        else:
            self._page, self._last, self._pause = iter(assets), self._cursor is None, PAGE_PAUSE


class Listings:
    """Listings to go through, the last one first."""

    def __init__(self, *listings: Listing) -> None:
        self._stack = list(listings)

    def add(self, listing: Listing) -> None:
        """Go through this one before the others go on."""
        self._stack.append(listing)

    def next(self) -> Job | None:
        """The next photo to describe; None after each page."""
        while self._stack:
            job = self._stack[-1].next()
            if job or self._stack[-1].next_time < math.inf:
                return job
            self._stack.pop()
        return None

    @property
    def next_time(self) -> float:
        """When there is more, by the monotonic clock; never if all are at their end."""
        return self._stack[-1].next_time if self._stack else math.inf

    def __len__(self) -> int:
        return len(self._stack)


class Newsreader:
    """Looks for photos that arrived since its last look, and sweeps up what was missed."""

    def __init__(self, library: Library, state: State) -> None:
        self._library = library
        self._state = state
        self._began = self._mark = self._clock()
        self._listed = state.config.mode.backlog  # the first look is for previews still to be made
        if self._listed:
            self._mark -= SWEEP_SPAN
        self._complained = False
        self._whole_after = time.monotonic() + DAY

    def _clock(self) -> datetime:
        return self._state.patience(whole_library(self._library.clock))

    def look(self) -> bool:
        """Put what arrived on the agenda, to be done first; whether there was anything."""
        state, now = self._state, self._clock()
        since = min(self._mark, now) - OVERLAP
        try:
            news = state.patience(lambda: self._library.news(since, now), 1)
        except (Retryable, Permanent, Gone) as error:
            if not self._complained:
                log.warning("%s", t("look_failed", why=error))
            self._complained = True
            return False
        listed, self._listed, self._complained = self._listed, False, False
        # what is ready at the first look is in the backlog
        fresh = (asset for asset in news if not (listed and asset.ready))
        found = (job_for(replace(a, noted=not a.description.strip()), state) for a in fresh)
        jobs = list(filter(None, found))
        for job in jobs:
            state.agenda.plan(job, PENDING_PAUSE)
            state.agenda.put(job, 0.0 if job.asset.ready else PENDING_PAUSE)
        self._mark = now
        return bool(jobs)

    def sweep(self, *, whole: bool) -> Listing:
        """What needs a description among the uploads of two days; once a day, if `whole`, of all.

        In monitor mode: among those since the start.
        """
        state, monitor = self._state, not self._state.config.mode.backlog
        since: datetime | None = self._clock() - SWEEP_SPAN
        if whole and time.monotonic() >= self._whole_after:
            self._whole_after = time.monotonic() + DAY
            state.tally.forgive()
            since = None
        if monitor:
            since = max(since or self._began, self._began)
        return Listing(self._library, state, since, counts=False)


def stream(
    state: State, listings: Listings, news: Newsreader | None, watch: Arrivals | None
) -> Iterator[list[Job]]:
    """What to do next: what is due, arrivals first, then the listings; mostly one photo.

    Several are descriptions to be read back. Ends when stopped; without news to wait for,
    when the listings have ended and nothing is in hand or to be read back any more.
    """
    interval, tally = state.config.api_poll_interval, state.tally
    next_look, next_sweep = 0.0, time.monotonic() + SWEEP_INTERVAL
    if not news:
        next_look = next_sweep = math.inf
    while not state.stop.is_set():
        now = tally.moved = time.monotonic()
        if news and now >= next_look:
            next_look = now + interval
            if news.look() and watch and watch.since < now - interval - FEED_LAG.total_seconds():
                watch.missed()
        if news and now >= next_sweep:
            next_sweep = now + SWEEP_INTERVAL
            if len(listings) < 2:  # the backlog may take weeks, and so may a sweep in trouble
                listings.add(news.sweep(whole=len(listings) == 0))
        busy = tally.in_hand > 0  # looked at before all else: what is in hand may come back
        turn = state.checks.due(idle=False)
        if not turn and (job := state.agenda.due() or listings.next()):
            turn = [job]
        if turn := turn or state.checks.due(idle=listings.next_time > now):
            tally.hand(1)
            yield turn
        else:
            times = (next_look, next_sweep, listings.next_time, state.agenda.next_time())
            soonest = min(*times, state.checks.next_time())
            if soonest == math.inf and not busy:
                return
            state.stop.nap(min(soonest - time.monotonic(), interval))


def settled(read: Callable[[], bytes], config: Config, stop: threading.Event) -> bytes:
    """A preview, read again while it is being written: until it has its end, or stays the same.

    Raises Retryable if neither comes in time.
    """
    deadline, data = time.monotonic() + config.file_write_timeout, read()
    before = None
    while not picture_type(data)[1] and data != before:
        if time.monotonic() >= deadline:
            raise Retryable("preview_cut")
        if stop.wait(config.file_check_interval):
            raise Stopped("stopped")
        before, data = data, read()
    return data


def look_up(job: Job, library: Library, state: State) -> None:
    """Learn of a photo what the listing did not tell; Gone if it is to be left alone."""
    asset = job.asset
    if not asset.ready:
        asset = job.asset = state.patience(lambda: library.find(asset))
    if asset.ready:
        asset = job.asset = state.patience(lambda: library.recall(asset))
        if reason := left_alone(asset, state.config):
            raise Gone(reason)


def describe(job: Job, library: Library, ai: Ai, state: State) -> bool:
    """Have a photo described; False if that failed and is tried again soon, on another host.

    A note of a failure spares the next runs the same.
    """
    config, data = state.config, b""
    if not job.question:
        preview = functools.partial(library.preview, job.asset)
        data = settled(lambda: state.patience(preview), config, state.stop)
    last = job.tries + 1 >= most_tries(config)
    try:
        job.question = job.question or ai.question(prepared(data, config.max_image_size))
        job.text = ai.describe(job.question, job.failed_at, last=last)
    except HostDown:
        raise
    except (Retryable, Permanent) as error:
        if try_soon(job, error, state):
            return False
        if not job.failed and error.key != "preview_cut":
            note_failure(job, error, library, state)
        raise
    job.question = None
    return True


def most_tries(config: Config) -> float:
    """How often a picture is tried."""
    return min(PICTURE_TRIES, (config.max_retries or math.inf) + 1)


def try_soon(job: Job, error: AnalyzeError, state: State) -> bool:
    """Whether a picture that a host failed on is to be tried again, after `job.pause`."""
    others = len(job.failed_at) < len(state.hosts)
    job.tries += 1
    enough = job.tries >= most_tries(state.config) or (isinstance(error, Permanent) and not others)
    if enough or not job.failed_at:
        return False
    log.debug("%s: %s", job.asset.id, error)
    job.pause = 0.0 if others else state.config.retry_delay_seconds
    return True


def note_failure(job: Job, error: AnalyzeError, library: Library, state: State) -> None:
    """Keep in mind that a photo failed: for good, or once more."""
    old, (model, prompt) = job.asset.note, (state.config.model_name, state.config.prompt_id)
    again = old and old.failed and (old.model, old.prompt) == (model, prompt)
    tries = MOST_TRIES if error.key in FOR_GOOD else 1 + (old.tries if old and again else 0)
    text = old.text if old else ""  # which says whose the description is
    note = Note(model, prompt, text=text, failed=error.key, why=str(error), tries=tries)
    asset, job.asset = job.asset, replace(job.asset, note=note)
    with suppress(Retryable, Permanent, Gone):
        state.patience(lambda: library.remember([(asset, note)]))


def analyze(job: Job, library: Library, ai: Ai, state: State) -> Outcome | None:
    """The whole story of one photo; None if it goes on later, as with a reading back."""
    claimed = job.asset = state.patience(lambda: library.claim(job.asset))
    try:
        outcome = analyze_claimed(job, library, ai, state)
    finally:
        library.release(claimed)
    if not outcome and not job.written:  # only now, as another worker may take it at once
        state.agenda.put(job, job.pause)
    return outcome


def analyze_claimed(job: Job, library: Library, ai: Ai, state: State) -> Outcome | None:
    """The same, with other instances kept off."""
    config, patience = state.config, state.patience
    look_up(job, library, state)
    if not job.asset.ready:
        return Outcome.NOT_READY
    if state.checks.hopeless(job.asset):
        raise Gone("library_loses", library=job.asset.library or "-")
    if not job.text and not describe(job, library, ai, state):
        return None
    for _ in range(LIBRARY_TRIES):
        asset, stored = job.asset, merge(job.asset, job.text, config)
        note = Note(config.model_name, config.prompt_id, text=text_id(stored))
        write = functools.partial(library.write, asset, stored, note)
        try:
            written = patience(write, VALUABLE_TRIES)
        except Permanent as error:
            note_failure(job, error, library, state)
            raise
        if written:
            log.debug("%s (%s), written: %s", asset.name, asset.id, stored)
            job.stored = stored
            return stored_well(job, Outcome.DESCRIBED, library, state)
        job.asset = replace(asset, ready=False)
        look_up(job, library, state)
        if job.asset.description.strip() and not config.preserve_human:
            raise Gone("has_description")  # typed while the model was thinking
    raise Retryable("changed")


def take_back(job: Job, library: Library, state: State) -> Outcome | None:
    """The story of one photo whose description is taken back, if it is ours."""
    look_up(job, library, state)
    asset, left = job.asset, unmerge(job.asset)
    if left is None:
        raise Gone("has_description")
    job.stored = left
    if state.config.dry_run:
        shown = json.dumps(left, ensure_ascii=False)
        log.warning("%s", t("would_undo", name=asset.name, id=asset.id, text=shown))
        return Outcome.UNDONE
    if not state.patience(lambda: library.write(asset, left, None), VALUABLE_TRIES):
        raise Gone("has_description")
    return stored_well(job, Outcome.UNDONE, library, state)


def stored_well(job: Job, outcome: Outcome, library: Library, state: State) -> Outcome | None:
    """The outcome of a write; None if what was written is to be read back first."""
    if not library.must_confirm:
        return outcome
    state.checks.add(job)
    return None


def confirm(jobs: Sequence[Job], library: Library, state: State) -> None:
    """Read back what Immich said it stored; a note goes with what it kept, or that it did not."""
    age = time.monotonic() - min(job.written for job in jobs)
    assets = [job.asset for job in jobs]
    stored = state.patience(lambda: library.read_back(assets, age), VALUABLE_TRIES)
    found = [(job, stored.get(job.asset.id)) for job in jobs]
    notes = [(job.asset, note) for job, text in found for note in notes_for(job, text, state)]
    state.patience(lambda: library.remember(notes), VALUABLE_TRIES)
    for job, text in found:
        trouble = lost(job, text)
        losing = isinstance(trouble, Permanent)
        if state.checks.count(job.asset, lost=losing):
            log.error("%s", t("library_loses", library=job.asset.library or "-"))
        outcome = Outcome.DESCRIBED if job.text else Outcome.UNDONE
        if trouble:
            outcome = Outcome.FAILED if losing else Outcome.SKIPPED
        conclude(job, outcome, trouble, state)


def lost(job: Job, text: str | None) -> AnalyzeError | None:
    """What became of a text that was written, by what is read back; None if it was kept.

    Lost is what gave way to what was there before, or to nothing. Anything else is a
    person's, who was quick.
    """
    if text is None:
        return Gone("photo_gone")
    added = job.text and job.text in text and job.text not in job.asset.description
    if text.strip() == job.stored.strip() or added:
        return None
    if text.strip() in ("", job.asset.description.strip()):
        return Permanent("not_kept")
    return Gone("has_description")


def notes_for(job: Job, text: str | None, state: State) -> Iterator[Note | None]:
    """The note for a photo that was read back, if it gets another one; None takes it away."""
    model, prompt = state.config.model_name, state.config.prompt_id
    match lost(job, text):
        case None if not job.text:
            yield None
        case None:
            same = text is not None and text.strip() == job.stored.strip()
            yield Note(model, prompt, text=text_id(text if text and same else job.stored))
        case Permanent() as error if job.text:
            old = job.asset.note.text if job.asset.note else ""  # which may be back
            why = str(error)
            yield Note(model, prompt, old, failed=error.key, why=why, tries=MOST_TRIES)


def conclude(job: Job, outcome: Outcome, error: Exception | None, state: State) -> None:
    """Count what became of a photo, or put it off: what may pass is tried again later."""
    tally, agenda, asset = state.tally, state.agenda, job.asset
    reason = error.key if isinstance(error, AnalyzeError) else "bug" if error else ""
    if reason == "claimed_elsewhere" and agenda.again(job):
        return
    if outcome is Outcome.FAILED and not job.failed:
        job.failed = True
        agenda.plan(job, FAILED_PAUSE)
        tally.add(outcome, reason)
        why, bug = (t("bug"), error) if reason == "bug" else (error, None)
        log.error("%s", t("photo_failed", name=asset.name, id=asset.id, why=why), exc_info=bug)
    if outcome is Outcome.FAILED:
        job.question, job.tries = None, 0
        job.failed_at.clear()
        for_good = not isinstance(error, Retryable) or reason in FOR_GOOD
        if for_good or not agenda.again(job):
            tally.give_up(asset)
    elif outcome is not Outcome.NOT_READY:
        if reason in MAY_COME_BACK:
            tally.release(asset)
        tally.add(outcome, reason)
    elif not agenda.again(job):
        tally.add(outcome)
        tally.release(asset)


def attempt(call: Callable[[], T]) -> tuple[T | Outcome, Exception | None]:
    """What became of a photo; one that fails does not stop the others."""
    try:
        return call(), None
    except (Stopped, Fatal):
        raise
    except Gone as gone:
        return Outcome.SKIPPED, gone
    except Exception as trouble:  # noqa: BLE001 - a bug costs only the photo that meets it
        return Outcome.FAILED, trouble


def work(
    turns: Iterable[list[Job]],
    story: Callable[[Job], Outcome | None],
    confirm: Callable[[list[Job]], None],
    state: State,
) -> None:
    """Take photos through their story until there are no more."""
    with suppress(Stopped):
        for jobs in turns:
            if jobs[0].written:
                _, error = attempt(functools.partial(confirm, jobs))
                for job in jobs if error else ():
                    conclude(job, Outcome.FAILED, error, state)
            else:
                outcome, error = attempt(functools.partial(story, jobs[0]))
                if outcome:
                    conclude(jobs[0], outcome, error, state)
            state.tally.hand(-1)
            state.stop.rouse()


def take_on_trust(jobs: Sequence[Job], library: Library, state: State) -> None:
    """At the end of a run there is no time to read back: what was lost, the next run describes."""
    notes = [(job.asset, note) for job in jobs for note in notes_for(job, job.stored, state)]
    with suppress(AnalyzeError):
        library.remember(notes)
    for job in jobs:
        conclude(job, Outcome.DESCRIBED if job.text else Outcome.UNDONE, None, state)


def run(worker: Callable[[], None], workers: int, stop: threading.Event) -> None:
    """Run the workers until the stream ends; the first error of one ends it for all."""
    with ThreadPoolExecutor(workers, "worker") as pool:
        jobs = [pool.submit(worker) for _ in range(workers)]
        wait(jobs, return_when=FIRST_EXCEPTION)
        stop.set()
    for job in jobs:
        job.result()


# ------------------------------------------------------------------------------
# 9 Process: signals, output, health, main. The only place that reads the environment.
# ------------------------------------------------------------------------------


class Signals:
    """The first SIGINT or SIGTERM ends the stream; the second, or `grace`, the process.

    They are waited for by a thread: setting an Event in a signal handler can deadlock.
    Made before any other thread, as those inherit what is blocked.
    """

    def __init__(self, stop: threading.Event) -> None:
        self.number = 0  # of the signal that came
        self.grace = 30.0
        self._stop = stop
        self._told = threading.Event()
        self._wanted = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._wanted)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        self.number = signal.sigwait(self._wanted)
        timer = threading.Timer(self.grace, os._exit, (128 + self.number,))
        timer.daemon = True
        timer.start()
        self._stop.set()
        log.warning("%s", t("finishing", signal=signal.Signals(self.number).name))
        self._told.set()
        os._exit(128 + signal.sigwait(self._wanted))

    def exit_code(self, mode: Mode) -> int:
        """What a signal makes of it, once the line about it is out: services are ended by one."""
        self._told.wait(self.grace)
        return 0 if mode.monitors else 128 + self.number


class Lines(logging.Handler):
    """Writes log lines to standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # nobody reads it any more; the work goes on
            self.handleError(record)


class OneLine(logging.Formatter):
    """Keeps file names and servers' words from faking lines, steering a terminal, or
    quoting one of the `secrets`."""

    secrets: tuple[str, ...] = ()

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message with control characters replaced; tracebacks come after it."""
        unsafe = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
        record.message = re.sub(unsafe, "\ufffd", record.message)
        record.priority = PRIORITIES[record.levelno]
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """The whole text of a record."""
        text = super().format(record)
        for secret in filter(None, self.secrets):
            text = text.replace(secret, "…")
        return text


PRIORITIES = {50: 2, 40: 3, 30: 4, 20: 6, 10: 7}  # sd-daemon(3), by the level of logging
TO_PEOPLE = "%(message)s"
TO_A_FILE = "%(asctime)s %(levelname)s %(message)s"
TO_THE_JOURNAL = "<%(priority)d>%(message)s"


def set_up_logging(config: Config | None = None, journal: str = "") -> None:
    """Choose what is said, and how, by who reads it.

    For people on a terminal, messages; for cron, only what is wrong; for a service, a log;
    for systemd's journal (`journal` is its JOURNAL_STREAM), its priorities.
    """
    terminal, service = sys.stderr.isatty(), bool(config and config.mode.monitors)
    here = os.fstat(sys.stderr.fileno())
    form = TO_PEOPLE if terminal or not service else TO_A_FILE
    lines = OneLine(TO_THE_JOURNAL if journal == f"{here.st_dev}:{here.st_ino}" else form)
    lines.secrets = (config.api_key, *config.immich_api_keys) if config else ()
    handler = Lines()
    handler.setFormatter(lines)
    log.handlers[:] = [handler]
    log.propagate = False
    usual = logging.INFO if terminal or service else logging.WARNING
    log.setLevel((config and config.log_level) or usual)
    # what watchdog misses is noticed anyway, and it warns of races that cost nothing
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="watchdog")


class Progress:
    """A bar on a terminal: photos done, rate and time left. Skipped ones are no progress."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        form = {"unit": " " + t("photos"), "dynamic_ncols": True, "leave": False}
        self._bar = tqdm(total=total, miniters=1, **form)  # each photo counts

    def show(self, counts: Counter[Outcome]) -> None:
        """Move on to what the counts say."""
        left_out = counts[Outcome.SKIPPED] + counts[Outcome.NOT_READY]
        with self._bar.get_lock():
            if self._total is not None:
                self._bar.total = max(0, self._total - left_out)
            done = counts.total() - left_out
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


AWAY_LIMIT = 300.0  # seconds Immich or the database may be away before that is ill health
LONGEST_CALL = 300.0  # seconds a query of PostgreSQL may take
STALL_LIMIT = 60.0  # beyond the longest wait that is usual
POST_INTERVAL = 10.0
LINE_INTERVAL = 3600.0  # between two lines that sum up


class Status:
    """How a run stands, told in the same words to /health, /metrics and systemd."""

    def __init__(self, state: State) -> None:
        self.ready = False  # whether the check at the start is over
        self._tally = state.tally
        self._hosts = state.hosts
        self._patience = state.patience
        config = state.config
        waits = (config.timeout, config.api_poll_interval, config.retry_delay_seconds)
        self._longest = max(*waits, config.file_write_timeout, LONGEST_CALL) + STALL_LIMIT

    def stalled(self) -> bool:
        """Whether nothing moves, though nobody waits for a library or a model host."""
        moved = max(self._tally.moved, self._hosts.moved)
        waits = not self.ready or self._patience.away() or not self._hosts.usable()
        return not waits and time.monotonic() - moved > self._longest

    def trouble(self) -> str:
        """Why it is not healthy, in a word; "" when it is. Slow and idle are healthy."""
        if not self.ready:
            return "starting"
        if self._patience.away() > AWAY_LIMIT:
            return "library_away"
        if not self._hosts.usable():
            return "no_model_host"
        return "stalled" if self.stalled() else ""

    def left(self) -> int | None:
        """How much of the backlog is left, where that is known."""
        total = self._tally.total
        return None if total is None else max(0, total - self._tally.listed)

    def report(self) -> dict[str, Any]:
        """What GET /health answers."""
        hosts = self._hosts.seen()
        return {
            "status": self.trouble() or "ok",
            "version": __version__,
            "library_away_seconds": round(self._patience.away()),
            "model_hosts": {public(host.url): condition(host) for host in hosts},
            "in_flight": sum(host.in_flight for host in hosts),
            "backlog_left": self.left(),
            **{outcome.value: self._tally.counts[outcome] for outcome in Outcome},
        }

    def metrics(self) -> str:
        """What GET /metrics answers: Prometheus' text format."""
        now, left = time.monotonic(), self.left()
        hosts = [(label(host=public(host.url)), host) for host in self._hosts.seen()]
        reasons = sorted(self._tally.reasons.items())
        families: list[tuple[str, str, list[tuple[str, float]]]] = [
            ("healthy", "gauge", [("", not self.trouble())]),
            ("photos_total", "counter", [(label(outcome=o, reason=r), n) for (o, r), n in reasons]),
            ("library_away_seconds", "gauge", [("", self._patience.away())]),
            ("backlog_left", "gauge", [] if left is None else [("", left)]),
            ("in_flight", "gauge", [(name, host.in_flight) for name, host in hosts]),
            ("requests_total", "counter", [(name, host.requests) for name, host in hosts]),
            ("request_seconds_total", "counter", [(name, host.seconds) for name, host in hosts]),
            ("rest_seconds", "gauge", [(n, max(0.0, h.rests_until - now)) for n, h in hosts]),
        ]
        lines = []
        for name, kind, samples in families:
            lines.append(f"# TYPE immich_analyze_{name} {kind}")
            lines += (f"immich_analyze_{name}{labels} {value:.12g}" for labels, value in samples)
        return "\n".join(lines) + "\n"


def condition(host: Host) -> str:
    """How a model host is, in a word."""
    return "struck" if host.struck else "away" if host.away else "ok"


def label(**labels: str) -> str:
    """Labels of a sample; Prometheus escapes as JSON does."""
    pairs = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"


def serve_health(status: Status, host: str, number: int) -> None:
    """Answer GET /health and /metrics from threads; a port in use costs only these."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # of a client that says nothing

        def do_GET(self) -> None:
            code, kind, body = 404, "text/plain", "/health /metrics\n"
            if self.path == "/health":
                report = status.report()
                code = 200 if report["status"] == "ok" else 503
                kind, body = "application/json", json.dumps(report) + "\n"
            elif self.path == "/metrics":
                code, kind, body = 200, "text/plain; version=0.0.4; charset=utf-8", status.metrics()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing of each request."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server_bind = socketserver.TCPServer.server_bind  # the other asks for our name in DNS

        def handle_error(self, *_: object) -> None:
            """Say nothing of clients that hang up."""

    try:
        server = Server((host, number), Handler)
    except OSError as error:
        log.error("%s", t("no_health", host=host, port=number, why=error.strerror))
    else:
        threading.Thread(target=server.serve_forever, name="health", daemon=True).start()


def ask_health(config: Config) -> int:
    """Ask the running tool's /health by the same settings; 0 if it is well, or does not tell."""
    if not config.health_port:
        return 0
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where it may listen
    host = everywhere.get(config.health_host, config.health_host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.health_port}/health"
    with closing(Session()) as session:
        session.trust_env = False  # no proxy stands between
        try:
            http(session, "GET", url, timeout=10.0, blame=unhealthy)
        except AnalyzeError as error:
            log.critical("%s", error)
            return 1
    return 0


def unhealthy(reply: Reply) -> AnalyzeError:
    """What /health said."""
    return Retryable("unhealthy", why=reply.body.decode("utf-8", "replace").strip())


def notify(address: str, message: str) -> None:
    """Tell systemd how the service stands, by sd_notify(3); nothing where nobody listens."""
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), re.sub("^@", "\0", address))


def keep_posted(
    status: Status, tally: Tally, stop: threading.Event, environ: Mapping[str, str]
) -> None:
    """Tell systemd the counts, and that all moves, until the end; and the log once an hour."""
    address = environ.get("NOTIFY_SOCKET", "")
    watchdog = float(environ.get("WATCHDOG_USEC") or math.inf) / 1e6
    notify(address, "READY=1")
    told, said = time.monotonic(), str(tally)
    while not stop.wait(min(watchdog / 2, POST_INTERVAL)):
        notify(address, f"STATUS={tally}" + ("" if status.stalled() else "\nWATCHDOG=1"))
        if time.monotonic() >= told + LINE_INTERVAL and said != str(tally):
            told, said = time.monotonic(), str(tally)
            log.info("%s", said)
    notify(address, "STOPPING=1")


def upcoming(library: Library, state: State, stack: ExitStack) -> Iterator[list[Job]]:
    """The stream of this run's mode; what has to be closed in the end goes on the stack."""
    config, news, watch = state.config, None, None
    listings = Listings()
    if config.mode.backlog:
        listings.add(Listing(library, state, counts=True))
    if config.mode.monitors:
        news = Newsreader(library, state)
        watch = library.watch(lambda seen: hint(seen, state), config.event_cooldown)
    if watch:
        stack.callback(watch.close)
    return stream(state, listings, news, watch)


def describe_library(state: State, new_library: Callable[[], Library]) -> None:
    """Describe what is there and what arrives, with as many workers as were asked for."""
    config, tally = state.config, state.tally
    with ExitStack() as stack:
        library = stack.enter_context(closing(new_library()))
        terminal = sys.stderr.isatty()
        if config.mode.backlog and (terminal or config.health_port):
            with suppress(AnalyzeError):  # an extra, that not every key may ask for
                tally.total = library.total() // config.shard[1]
        if terminal:
            progress = stack.enter_context(closing(Progress(tally.total)))
            tally.show = progress.show
        turns = Shared(upcoming(library, state, stack))

        def worker() -> None:
            with (
                closing(new_library()) as own,
                closing(Ai(config, state.hosts, state.stop)) as ai,
            ):
                check = functools.partial(confirm, library=own, state=state)
                story = functools.partial(analyze, library=own, ai=ai, state=state)
                undo = functools.partial(take_back, library=own, state=state)
                work(turns, undo if config.undo else story, check, state)

        # more workers than places at the hosts: the next pictures are fetched meanwhile
        try:
            run(worker, config.max_concurrent + max(2, config.max_concurrent // 4), state.stop)
        finally:
            take_on_trust(state.checks.rest(), library, state)


def serve(config: Config, stop: Stop, tally: Tally) -> bool:
    """One run from its settings to its end; whether all photos could be reached."""
    service, longest = config.mode.monitors, config.wait_timeout or math.inf
    passing = (HostDown, Unexpected) if service else (HostDown,)
    at_start = functools.partial(Patience, stop, config.wait_retry_interval, what_passes=passing)
    pause = max(1.0, config.retry_delay_seconds)
    state = State(
        config,
        stop,
        hosts=Hosts(config.hosts, config.max_concurrent, config.unavailable_duration),
        patience=Patience(stop, pause, math.inf if service else longest),
        agenda=Agenda(stop.rouse, LASTING if service else 0.0),
        checks=Checks(),
        tally=tally,
    )
    status = Status(state)
    if config.health_port:
        serve_health(status, config.health_host, config.health_port)
    if config.access_ambiguous:
        log.warning("%s", t("both_given"))
    library_wait = at_start(longest if config.wait_for_immich else 0.0)
    new_library, complete = library_wait(lambda: open_library(config))
    if not config.undo:
        with closing(Ai(config, state.hosts, stop)) as ai:
            at_start(longest if service else 0.0)(ai.check)
    status.ready = True
    if service:
        log.info("%s", t("ready"))
        posts = (status, tally, stop, os.environ)
        threading.Thread(target=keep_posted, args=posts, name="posts", daemon=True).start()
    describe_library(state, new_library)
    return complete()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of those at the top of this file."""
    stop = Stop()
    signals = Signals(stop)
    arguments = sys.argv[1:] if argv is None else list(argv)
    journal = os.environ.get("JOURNAL_STREAM", "")
    began, tally = time.monotonic(), Tally()
    set_up_logging(None, journal)
    try:
        use_language(language(arguments, os.environ))
        config = parse(arguments, os.environ)
        use_language(config.lang)
        set_up_logging(config, journal)
        signals.grace = config.grace
        if config.healthcheck:
            return ask_health(config)
        complete = serve(config, stop, tally)
        code = 0 if complete and not tally.counts[Outcome.FAILED] else 1
    except Stopped:
        return signals.exit_code(config.mode)
    except Fatal as error:
        log.critical("%s", error)
        if not tally.counts:
            return 2
        code = 2
    if config.final_output:
        level = logging.WARNING if code or config.undo else logging.INFO
        spent = timedelta(seconds=round(time.monotonic() - began))
        log.log(level, "%s", t("tally_time", tally=tally, time=spent))
    return signals.exit_code(config.mode) if signals.number else code


if __name__ == "__main__":
    sys.exit(main())
