"""Flags, variables and files: what each means, which one wins, and what a wrong one says."""

import argparse
import dataclasses
import hashlib
import logging
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2.extensions
import pytest

import immich_analyze as ia

NAMES = ia.toml("settings.toml")
SECRET = "s3cret"
API = {"IMMICH_API_URL": "http://immich:2283", "IMMICH_API_KEY": "key"}
DB = {"DB_HOSTNAME": "db"}


@pytest.fixture
def settings(config, home):
    """Makes a Config of flags, variables and the user's configuration file."""

    def make(*argv: str, file: str = "", **environ: str) -> ia.Config:
        if file:
            path = home / ".config" / "immich-analyze.conf"
            path.parent.mkdir(exist_ok=True)
            path.write_text(file, encoding="utf-8")
        return config(*argv, environ=environ)

    return make


@pytest.fixture
def refused(settings):
    """The error that settings end in; it never holds the secret."""

    def make(*argv: str, **more: str) -> ia.Fatal:
        with pytest.raises(ia.Fatal) as caught:
            settings(*argv, **more)
        error = caught.value
        text = str(error)
        assert SECRET not in f"{text} {error!r} {error.fields}"
        assert text
        assert "\n" not in text
        return error

    return make


# The promised table

PROMPT = (
    "Create a detailed description for the image for proper image search functionality. In the "
    "response, provide only the description without introductory words. Also specify the image "
    "format (Wallpaper, Screenshot, Drawing, City photo, Selfie, etc.). The format must be "
    "correct. If in doubt, name the most likely option and don't think too long."
)
DEFAULTS = {
    "mode": ia.Mode.BATCH,
    "policy": ia.Policy.NONE,
    "shard": (1, 1),
    "overwrite_existing": False,
    "preserve_human": False,
    "disable_ai_wrapper": False,
    "retry_failed": False,
    "undo": False,
    "dry_run": False,
    "enrich_prompt": False,
    "ignore_descriptions": (),
    "access": ia.DATABASE,
    "access_ambiguous": False,
    "notices": (),
    "immich_root": Path("/var/lib/immich"),
    "thumbs_root": None,
    "postgres_url": "host=localhost user=postgres dbname=immich",
    "immich_api_url": "",
    "immich_api_keys": (),
    "immich_header": (),
    "thumbnail_size": "preview",
    "api_poll_interval": 10.0,
    "interface": "ollama",
    "model_name": "qwen3-vl:4b-thinking-q4_K_M",
    "hosts": ("http://localhost:11434",),
    "api_key": "",
    "host_header": (),
    "preflight_model_check": True,
    "prompt": PROMPT,
    "context": (),
    "description_language": "",
    "show_prompt": None,
    "check": False,
    "sources": {},
    "limit": None,
    "photo": (),
    "album": (),
    "taken_after": None,
    "taken_before": None,
    "favorites": False,
    "library": None,
    "videos": ("IMAGE",),
    "video_frames": 4,
    "link_url": "",
    "report": None,
    "compare": (),
    "prompt_files": (),
    "think": False,
    "max_tokens": 4096,
    "context_length": 0,
    "model_options": {},
    "max_image_size": 0,
    "max_concurrent": 4,
    "timeout": 300.0,
    "max_retries": 0,
    "retry_delay_seconds": 5.0,
    "unavailable_duration": 60.0,
    "file_write_timeout": 30.0,
    "file_check_interval": 0.5,
    "event_cooldown": 2.0,
    "wait_for_immich": True,
    "wait_timeout": 120.0,
    "wait_retry_interval": 5.0,
    "health_port": 0,
    "health_host": "127.0.0.1",
    "healthcheck": False,
    "grace": 30.0,
    "final_output": True,
    "lang": "en",
    "log_level": None,
}


def test_the_defaults_are_the_promised_ones(config):
    assert dataclasses.asdict(config()) == DEFAULTS


class Option(NamedTuple):
    """An option with a value, by two examples."""

    flag: str
    variable: str
    field: str
    text: str
    value: Any
    other: str
    other_value: Any
    extra: dict[str, str] = {}  # noqa: RUF012 - what else must be given

    @property
    def key(self) -> str:
        return self.flag.removeprefix("--")


def seconds(flag: str, field: str) -> Option:
    return Option(flag, f"IMMICH_ANALYZE_{field.upper()}", field, "1.5", 1.5, "2", 2.0)


def whole(flag: str, field: str) -> Option:
    return Option(flag, f"IMMICH_ANALYZE_{field.upper()}", field, "7", 7, "8", 8)


ONE, TWO = "http://one:1", "http://two:2"
ID, ID2 = ("0123abcd-0000-4000-8000-00000000000" + end for end in "12")
LINK = f"https://photos.example.org/photos/{ID2.upper()}"
PAIR, OTHER_PAIR = (("X-One", "1: a"),), (("cookie", "b=c; d"),)
OPTIONS = [
    Option(
        *("--mode", "IMMICH_ANALYZE_MODE", "mode"),
        *("monitor", ia.Mode.MONITOR, "Combined", ia.Mode.COMBINED),
    ),
    Option(
        *("--overwrite-policy", "IMMICH_ANALYZE_OVERWRITE_POLICY", "policy"),
        *("all", ia.Policy.ALL, "Outdated", ia.Policy.OUTDATED),
    ),
    Option(
        *("--ignore-descriptions", "IMMICH_ANALYZE_IGNORE_DESCRIPTIONS", "ignore_descriptions"),
        *("_cuva, A  b*,_cuva", ("_cuva", "A  b*"), "*", ("*",)),
    ),
    Option("--shard", "IMMICH_ANALYZE_SHARD", "shard", "2/5", (2, 5), "3/3", (3, 3)),
    whole("--limit", "limit"),
    Option("--photo", "IMMICH_ANALYZE_PHOTO", "photo", f"{ID}, {LINK}", (ID, ID2), ID2, (ID2,)),
    Option(
        *("--album", "IMMICH_ANALYZE_ALBUM", "album"),
        *("Home, 2019", ("Home, 2019",), "bob:Sea", ("bob:Sea",)),
    ),
    Option(
        *("--taken-after", "IMMICH_ANALYZE_TAKEN_AFTER", "taken_after"),
        *("2020-01-31", datetime(2020, 1, 31, tzinfo=UTC)),
        *("2020-01-31 17:30", datetime(2020, 1, 31, 17, 30, tzinfo=UTC)),
    ),
    Option(
        *("--taken-before", "IMMICH_ANALYZE_TAKEN_BEFORE", "taken_before"),
        *("2020-01-31", datetime(2020, 2, 1, tzinfo=UTC)),
        *("2020-01-31T17:30:05", datetime(2020, 1, 31, 17, 30, 5, tzinfo=UTC)),
    ),
    Option("--library", "IMMICH_ANALYZE_LIBRARY", "library", ID, ID, LINK, ID2),
    Option("--report", "IMMICH_ANALYZE_REPORT", "report", "a b.html", "a b.html", "/c", "/c"),
    Option(
        *("--compare", "IMMICH_ANALYZE_COMPARE", "compare"),
        *("a:1, hf.co/x/y", ("a:1", "hf.co/x/y"), "b", ("b",), {"IMMICH_ANALYZE_DRY_RUN": "yes"}),
    ),
    Option("--link-url", "IMMICH_ANALYZE_LINK_URL", "link_url", ONE, ONE, f"{TWO}/", TWO),
    Option(
        *("--data-access-mode", "IMMICH_ANALYZE_DATA_ACCESS_MODE", "access"),
        *("immich-api", ia.API, "database", ia.DATABASE, API),
    ),
    Option(
        *("--immich-root", "IMMICH_ANALYZE_IMMICH_ROOT", "immich_root"),
        *("/photos", Path("/photos"), "/a folder", Path("/a folder")),
    ),
    Option(
        *("--thumbs-root", "IMMICH_ANALYZE_THUMBS_ROOT", "thumbs_root"),
        *("/previews", Path("/previews"), "/a folder", Path("/a folder")),
    ),
    Option(
        *("--postgres-url", "IMMICH_ANALYZE_POSTGRES_URL", "postgres_url"),
        *("host=a password=b", "host=a password=b", "postgresql://c/d", "postgresql://c/d", DB),
    ),
    *[
        Option("--immich-api-url", name, "immich_api_url", ONE, f"{ONE}/api", TWO, f"{TWO}/api", DB)
        for name in ("IMMICH_API_URL", "IMMICH_ANALYZE_IMMICH_API_URL")
    ],
    *[
        Option("--immich-api-keys", name, "immich_api_keys", "a, b,,", ("a", "b"), "c", ("c",), DB)
        for name in ("IMMICH_API_KEY", "IMMICH_ANALYZE_IMMICH_API_KEYS")
    ],
    *[
        Option(flag, f"IMMICH_ANALYZE_{field.upper()}", field, "X-One: 1: a", PAIR, *other)
        for flag, field in (("--immich-header", "immich_header"), ("--host-header", "host_header"))
        for other in [("cookie:b=c; d", OTHER_PAIR)]
    ],
    Option(
        *("--thumbnail-size", "IMMICH_ANALYZE_THUMBNAIL_SIZE", "thumbnail_size"),
        *("fullsize", "fullsize", "Thumbnail", "thumbnail"),
    ),
    seconds("--api-poll-interval", "api_poll_interval"),
    Option(
        *("--model-name", "IMMICH_ANALYZE_MODEL_NAME", "model_name"),
        *("a:1", "a:1", "hf.co/x/y", "hf.co/x/y"),
    ),
    Option(
        *("--interface", "IMMICH_ANALYZE_INTERFACE", "interface"),
        *("llamacpp", "llamacpp", "Ollama", "ollama"),
    ),
    Option(
        *("--interface", "IMMICH_ANALYZE_INTERFACE", "interface"),
        *("OpenRouter", "openrouter", "openai", "llamacpp"),
    ),
    Option(
        *("--hosts", "IMMICH_ANALYZE_HOSTS", "hosts"),
        *(f"{ONE}, {TWO}", (ONE, TWO), "three:3", ("http://three:3",)),
    ),
    Option("--api-key", "IMMICH_ANALYZE_API_KEY", "api_key", "a", "a", "b", "b"),
    Option("--prompt", "IMMICH_ANALYZE_PROMPT", "prompt", "What's that?", "What's that?", "b", "b"),
    Option(
        *("--context", "IMMICH_ANALYZE_CONTEXT", "context"),
        *("Date, people,date", ("people", "date"), "gps", ("gps",)),
    ),
    Option(
        *("--description-language", "IMMICH_ANALYZE_DESCRIPTION_LANGUAGE", "description_language"),
        *("DE", "German", "Klingon", "Klingon"),
    ),
    whole("--max-concurrent", "max_concurrent"),
    seconds("--unavailable-duration", "unavailable_duration"),
    seconds("--timeout", "timeout"),
    seconds("--file-write-timeout", "file_write_timeout"),
    Option(
        *("--file-check-interval", "IMMICH_ANALYZE_FILE_CHECK_INTERVAL", "file_check_interval"),
        *("250", 0.25, "1500", 1.5),
    ),
    seconds("--event-cooldown", "event_cooldown"),
    Option("--lang", "IMMICH_ANALYZE_LANG", "lang", "ru", "ru", "EN", "en"),
    whole("--max-retries", "max_retries"),
    seconds("--retry-delay-seconds", "retry_delay_seconds"),
    seconds("--wait-timeout", "wait_timeout"),
    seconds("--wait-retry-interval", "wait_retry_interval"),
    Option(
        *("--log-level", "IMMICH_ANALYZE_LOG_LEVEL", "log_level"),
        *("debug", logging.DEBUG, "Warn", logging.WARNING),
    ),
    whole("--max-tokens", "max_tokens"),
    whole("--context-length", "context_length"),
    Option(
        *("--model-options", "IMMICH_ANALYZE_MODEL_OPTIONS", "model_options"),
        *('{"seed": 7, "stop": ["a", "b"]}', {"seed": 7, "stop": ["a", "b"]}, "{}", {}),
    ),
    whole("--max-image-size", "max_image_size"),
    Option(
        *("--videos", "IMMICH_ANALYZE_VIDEOS", "videos"),
        *("only", ("VIDEO",), "True", ("IMAGE", "VIDEO")),
    ),
    whole("--video-frames", "video_frames"),
    whole("--health-port", "health_port"),
    Option(
        *("--health-host", "IMMICH_ANALYZE_HEALTH_HOST", "health_host"),
        *("0.0.0.0", "0.0.0.0", "::", "::"),
    ),
    seconds("--grace", "grace"),
]
WITH_A_VALUE = pytest.mark.parametrize("option", OPTIONS, ids=lambda o: f"{o.flag} {o.variable}")


@WITH_A_VALUE
def test_an_option_is_set_by_flag_variable_and_file(settings, option):
    variable, file = {option.variable: option.text}, f"{option.key} = {option.text}"
    for made in (
        settings(option.flag, option.text, **option.extra),
        settings(f"{option.flag}={option.text}", **option.extra),
        settings(**option.extra | variable),
        settings(**option.extra, file=file),
    ):
        assert getattr(made, option.field) == option.value


@WITH_A_VALUE
def test_flag_beats_variable_beats_file(settings, option):
    low, high = (option.other, option.other_value), (option.text, option.value)
    for (wins, value), (loses, _) in ((high, low), (low, high)):
        variable, file = {option.variable: loses}, f"{option.key} = {loses}"
        extra = {k: v for k, v in option.extra.items() if k != option.variable}
        by_flag = settings(option.flag, wins, **extra | variable, file=file)
        by_variable = settings(**extra | {option.variable: wins}, file=file)
        assert [getattr(made, option.field) for made in (by_flag, by_variable)] == [value, value]


SWITCHES = [
    ("overwrite-existing", "policy", ia.Policy.ALL, ia.Policy.NONE),
    ("preserve-human", "preserve_human", True, False),
    ("disable-ai-wrapper", "preserve_human", False, False),  # the default, said aloud
    ("retry-failed", "retry_failed", True, False),
    ("favorites", "favorites", True, False),
    ("dry-run", "dry_run", True, False),
    ("enrich-prompt", "context", ia.ENRICHED, ()),
    ("think", "think", True, False),
    ("wait-for-immich", "wait_for_immich", True, False),
    ("preflight-model-check", "preflight_model_check", True, False),
    ("final-output", "final_output", True, False),
]
ON, OFF = ("true", "yes", "on", "1", "TRUE"), ("false", "no", "off", "0", "False")


@pytest.mark.parametrize(("name", "field", "on", "off"), SWITCHES)
def test_a_switch_goes_both_ways_by_flag_variable_and_file(settings, name, field, on, off):
    variable = f"IMMICH_ANALYZE_{name.replace('-', '_').upper()}"
    for word, value, flag in (("true", on, f"--{name}"), ("false", off, f"--no-{name}")):
        assert getattr(settings(flag), field) == value
        assert getattr(settings(**{variable: word}), field) == value
        assert getattr(settings(file=f"{name} = {word}"), field) == value


@pytest.mark.parametrize(
    ("word", "on"), [(word, words is ON) for words in (ON, OFF) for word in words]
)
def test_a_switch_knows_several_words(settings, word, on):
    assert settings(IMMICH_ANALYZE_FAVORITES=word).favorites is on
    assert settings(file=f"favorites = {word}").favorites is on


@pytest.mark.parametrize(("name", "field", "on", "off"), SWITCHES)
def test_a_switch_can_be_set_back(settings, name, field, on, off):
    variable = f"IMMICH_ANALYZE_{name.replace('-', '_').upper()}"
    for flag, wins, loses, value in (
        (f"--{name}", "true", "false", on),
        (f"--no-{name}", "false", "true", off),
    ):
        file = f"{name} = {loses}"
        assert getattr(settings(flag, **{variable: loses}, file=file), field) == value
        assert getattr(settings(**{variable: wins}, file=file), field) == value


@pytest.mark.parametrize(
    ("argv", "environ", "file", "field", "value"),
    [
        (["-o"], {}, "", "policy", ia.Policy.ALL),
        (["-O", "missing-ai"], {}, "", "policy", ia.Policy.MISSING_AI),
        (["-O", "none"], {}, "overwrite-existing", "policy", ia.Policy.NONE),
        (["-O", "none", "-o"], {}, "", "policy", ia.Policy.NONE),
        (["-o", "-O", "outdated"], {}, "", "policy", ia.Policy.OUTDATED),
        (["-po", "--overwrite-policy=missing-ai"], {}, "", "policy", ia.Policy.MISSING_AI),
        ([], {}, "overwrite-existing\noverwrite-policy = none", "policy", ia.Policy.NONE),
        (["-o"], {}, "overwrite-policy = none", "policy", ia.Policy.ALL),
        (
            [],
            {
                "IMMICH_ANALYZE_OVERWRITE_EXISTING": "true",
                "IMMICH_ANALYZE_OVERWRITE_POLICY": "outdated",
            },
            "",
            "policy",
            ia.Policy.OUTDATED,
        ),
        (["-o"], {"IMMICH_ANALYZE_OVERWRITE_POLICY": "outdated"}, "", "policy", ia.Policy.ALL),
        (["-p"], {}, "", "preserve_human", True),
        (["-O", "missing-ai"], {}, "", "preserve_human", True),
        (["-O", "missing-ai", "--no-preserve-human"], {}, "", "preserve_human", True),
        (["-O", "outdated"], {}, "", "preserve_human", False),
        (["--undo"], {}, "", "undo", True),
        (["--undo"], {}, "", "policy", ia.Policy.ALL),
        (["--shard", "2/5"], {}, "", "shard", (2, 5)),
        ([], {"IMMICH_ANALYZE_SHARD": " 5/5 "}, "", "shard", (5, 5)),
        (["--undo"], {}, "", "retry_failed", True),
        (["--undo", "--dry-run"], {}, "", "dry_run", True),
        (["-d", "database"], API, "", "access", ia.DATABASE),
        (["-m"], {}, "", "mode", ia.Mode.MONITOR),
        (["--monitor"], {}, "", "mode", ia.Mode.MONITOR),
        (["-c"], {}, "", "mode", ia.Mode.COMBINED),
        (["--combined"], {}, "", "mode", ia.Mode.COMBINED),
        (["-m"], {"IMMICH_ANALYZE_MODE": "combined"}, "", "mode", ia.Mode.MONITOR),
        (["-c"], {"IMMICH_ANALYZE_MODE": "batch"}, "mode = monitor", "mode", ia.Mode.COMBINED),
        (["-c"], {}, "monitor = true", "mode", ia.Mode.COMBINED),
        (["--mode", "batch"], {"IMMICH_ANALYZE_MODE": "monitor"}, "", "mode", ia.Mode.BATCH),
        ([], {}, "monitor = true", "mode", ia.Mode.MONITOR),
        ([], {"IMMICH_ANALYZE_MODE": "batch"}, "monitor = true", "mode", ia.Mode.BATCH),
        ([], {"IMMICH_ANALYZE_NO_FINAL_OUTPUT": "true"}, "", "final_output", False),
        ([], {"IMMICH_ANALYZE_NO_FINAL_OUTPUT": "1"}, "", "final_output", False),
        ([], {"IMMICH_ANALYZE_NO_FINAL_OUTPUT": "false"}, "", "final_output", True),
        ([], {}, "no-final-output = true", "final_output", False),
        ([], {}, "no-final-output", "final_output", False),
        ([], {}, "no-final-output = off", "final_output", True),
        ([], {}, "--no-final-output = true", "final_output", False),
        ([], {}, "no-wait-for-immich = yes", "wait_for_immich", False),
        (
            ["--final-output"],
            {"IMMICH_ANALYZE_NO_FINAL_OUTPUT": "true"},
            "no-final-output = true",
            *("final_output", True),
        ),
        (
            [],
            {"IMMICH_ANALYZE_NO_FINAL_OUTPUT": "false"},
            "no-final-output = true",
            *("final_output", True),
        ),
    ],
)
def test_short_flags_and_opposites_mean_the_same(settings, argv, environ, file, field, value):
    assert getattr(settings(*argv, **environ, file=file), field) == value


def variables() -> list[str]:
    actions = ia.build_parser()._actions
    known = [action.env_var for action in actions if getattr(action, "env_var", None)]
    database = [
        f"{name}{twin}" for name in (*NAMES["database"], "DB_URL") for twin in ("", "_FILE")
    ]
    return [*known, *database, *NAMES["older"], "LC_ALL", "LC_MESSAGES", "LANG"]


@pytest.mark.parametrize("empty", ["", "  ", "\t"])
def test_an_empty_variable_counts_as_unset(config, empty):
    assert config(environ=dict.fromkeys(variables(), empty)) == config()


ONLY_FLAGS = ("help", "version", "config", "monitor", "combined", "healthcheck", "undo")
ONLY_FLAGS += ("show_prompt", "check")


def test_every_option_with_a_value_has_a_variable_and_a_row_here():
    named = {"immich_api_url": "IMMICH_API_URL", "immich_api_keys": "IMMICH_API_KEY"}
    twins = {"immich_api_keys_file": "IMMICH_API_KEY_FILE"}
    for action in ia.build_parser()._actions:
        option = action.option_strings[0].removeprefix("--").replace("-", "_")
        if option in ONLY_FLAGS:
            assert not action.env_var
        else:
            usual = f"IMMICH_ANALYZE_{option.upper()}"
            assert action.env_var == (named | twins).get(option, usual)
            rows = {o.key for o in OPTIONS} | {name for name, *_ in SWITCHES}
            assert option.replace("_", "-").removesuffix("-file") in rows


def test_videos_without_a_value_are_described_beside_photos(settings):
    both = ("IMAGE", "VIDEO")
    assert settings("--videos").videos == settings(file="videos").videos == both
    assert settings("--videos", "--undo").videos == settings("--undo").videos == both
    assert settings("--videos", "--favorites").favorites
    assert settings("--undo", "--videos", "false").videos == ("IMAGE",)


@pytest.mark.parametrize("words", [("yes", "on", "1", "TRUE"), ("no", "off", "0", "False")])
def test_whether_videos_are_described_is_said_as_with_any_switch(settings, words):
    types = ("IMAGE", "VIDEO") if "yes" in words else ("IMAGE",)
    for word in words:
        assert settings("--videos", word).videos == types
        assert settings(IMMICH_ANALYZE_VIDEOS=word).videos == types
        assert settings(file=f"videos = {word}").videos == types


# Settings with rules of their own


@pytest.mark.parametrize(
    ("argv", "environ", "hosts"),
    [
        ([], {"IMMICH_ANALYZE_OLLAMA_HOSTS": "old:1"}, ("http://old:1",)),
        (["--interface", "ollama"], {"IMMICH_ANALYZE_OLLAMA_HOSTS": "old:1"}, ("http://old:1",)),
        (
            ["--interface", "llamacpp"],
            {"IMMICH_ANALYZE_OLLAMA_HOSTS": "old:1"},
            ("http://old:1",),
        ),
        (
            ["--interface", "openai"],
            {"IMMICH_ANALYZE_OLLAMA_HOSTS": "a:1", "IMMICH_ANALYZE_LLAMACPP_HOSTS": "b:2"},
            ("http://b:2",),
        ),
        (
            [],
            {"IMMICH_ANALYZE_OLLAMA_HOSTS": "a:1", "IMMICH_ANALYZE_LLAMACPP_HOSTS": "b:2"},
            ("http://a:1",),
        ),
        ([], {"IMMICH_ANALYZE_LLAMACPP_HOSTS": "b:2"}, ("http://localhost:11434",)),
        (["--interface", "openrouter"], {}, ("https://openrouter.ai/api",)),
        (["--hosts", "a:1", "--hosts=b:2,a:1"], {}, ("http://a:1", "http://b:2")),
        (["--hosts", "c:3"], {"IMMICH_ANALYZE_HOSTS": "a:1"}, ("http://c:3",)),
        ([], {"IMMICH_ANALYZE_HOSTS": "a:1\nb:2"}, ("http://a:1", "http://b:2")),
        ([], {"IMMICH_ANALYZE_HOSTS": '"a:1,b:2"'}, ("http://a:1", "http://b:2")),
        (["--hosts", "new:1"], {"IMMICH_ANALYZE_OLLAMA_HOSTS": "old:1"}, ("http://new:1",)),
        (
            [],
            {"IMMICH_ANALYZE_OLLAMA_HOSTS": "old:1", "IMMICH_ANALYZE_HOSTS": "new:1"},
            ("http://new:1",),
        ),
        (
            [],
            {"IMMICH_ANALYZE_OLLAMA_HOSTS": "old:1", "IMMICH_ANALYZE_HOSTS": ""},
            ("http://old:1",),
        ),
        (["--hosts", "a:1,b:2"], {}, ("http://a:1", "http://b:2")),
        (["--hosts", " a:1 , b:2, "], {}, ("http://a:1", "http://b:2")),
        (["--hosts", "a:1,http://a:1/,a:1"], {}, ("http://a:1",)),
        (["--hosts", "https://a.b/sub/path/"], {}, ("https://a.b/sub/path",)),
        (["--hosts", "http://a:1/v1,http://b/api/"], {}, ("http://a:1/v1", "http://b/api")),
        (["--hosts", "user:pass@a:1"], {}, ("http://user:pass@a:1",)),
        (["--hosts", "http://[::1]:11434"], {}, ("http://[::1]:11434",)),
        (["--hosts", "127.0.0.1"], {}, ("http://127.0.0.1",)),
        (["--hosts", "HTTP://a:1?x=1#y"], {}, ("http://a:1",)),
    ],
)
def test_hosts_are_a_list_of_addresses(config, argv, environ, hosts):
    assert config(*argv, environ=environ).hosts == hosts


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://immich:2283", "http://immich:2283/api"),
        ("http://immich:2283/", "http://immich:2283/api"),
        ("http://immich:2283/api", "http://immich:2283/api"),
        ("http://immich:2283/api/", "http://immich:2283/api"),
        ("https://photos.example/immich", "https://photos.example/immich/api"),
        ("https://photos.example/immich/api/", "https://photos.example/immich/api"),
        ("https://api", "https://api/api"),
        ("immich:2283", "http://immich:2283/api"),
        (" http://immich:2283 ", "http://immich:2283/api"),
        ("https://user:pass@immich", "https://user:pass@immich/api"),
    ],
)
def test_immichs_address_may_be_written_as_people_do(config, given, used):
    made = config(environ=API | {"IMMICH_API_URL": given})
    assert (made.immich_api_url, made.access) == (used, ia.API)


URL, KEY = ({name: API[name]} for name in API)


@pytest.mark.parametrize(
    ("argv", "environ", "access", "ambiguous"),
    [
        ([], {}, ia.DATABASE, False),
        ([], DB, ia.DATABASE, False),
        ([], {"DB_PASSWORD": "x"}, ia.DATABASE, False),
        ([], {"DB_URL": "postgresql://h/d"}, ia.DATABASE, False),
        (["--postgres-url", "host=h"], {}, ia.DATABASE, False),
        ([], API, ia.API, False),
        ([], API | DB, ia.API, True),
        ([], API | {"DB_USERNAME": "u", "DB_PASSWORD": "x"}, ia.API, True),
        ([], API | {"DB_URL": "postgresql://h/d"}, ia.API, True),
        ([], API | {"DB_PASSWORD": "x"}, ia.API, False),
        ([], API | {"DB_PORT": "1", "DB_DATABASE_NAME": "d"}, ia.API, False),
        ([], URL | DB, ia.DATABASE, False),
        ([], URL | {"DB_USERNAME": "u"}, ia.DATABASE, False),
        ([], KEY | DB, ia.DATABASE, True),
        (["--postgres-url", "host=h"], URL, ia.DATABASE, False),
        (["--postgres-url", "host=h"], API, ia.DATABASE, True),
        ([], API | DB | {"IMMICH_ANALYZE_POSTGRES_URL": "host=h"}, ia.DATABASE, True),
        (["-d", "immich-api", "--postgres-url", "host=h"], API, ia.API, False),
        (["-d", "immich-api"], API | DB, ia.API, False),
        (["-d", "database"], API | DB, ia.DATABASE, False),
        (["-d", "database"], API, ia.DATABASE, False),
        (["-d", "database"], URL, ia.DATABASE, False),
        (["-d", "database"], {}, ia.DATABASE, False),
        ([], API | dict.fromkeys(DB, ""), ia.API, False),
        ([], dict.fromkeys(API, ""), ia.DATABASE, False),
    ],
)
def test_the_library_whose_settings_are_given_is_used(config, argv, environ, access, ambiguous):
    made = config(*argv, environ=environ)
    assert (made.access, made.access_ambiguous) == (access, ambiguous)


@pytest.mark.parametrize(
    ("argv", "environ", "key"),
    [
        ([], URL, "api_key_missing"),
        ([], KEY, "api_url_missing"),
        ([], URL | {"DB_PASSWORD": "x"}, "api_key_missing"),
        ([], KEY | {"DB_PASSWORD": "x", "DB_PORT": "1"}, "api_url_missing"),
        (["-d", "immich-api"], {}, "api_url_missing"),
        (["-d", "immich-api"], URL | DB, "api_key_missing"),
        (["-d", "immich-api"], KEY | DB, "api_url_missing"),
        (["--immich-api-keys", " , "], URL, "api_key_missing"),
    ],
)
def test_half_of_the_apis_settings_are_not_enough(refused, argv, environ, key):
    assert refused(*argv, **environ).key == key


DATABASE = {"host": "database", "port": "5432", "user": "postgres", "dbname": "immich"}


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"DB_HOSTNAME": "db"}, {"host": "db"}),
        ({"DB_HOSTNAME": "/run/postgresql"}, {"host": "/run/postgresql"}),
        ({"DB_PORT": "5433"}, {"port": "5433"}),
        ({"DB_USERNAME": "immich"}, {"user": "immich"}),
        ({"DB_DATABASE_NAME": "photos"}, {"dbname": "photos"}),
        ({"DB_SSL_MODE": "verify-full"}, {"sslmode": "verify-full"}),
        ({"DB_PASSWORD": "simple"}, {"password": "simple"}),
        ({"DB_PASSWORD": "two words"}, {"password": "two words"}),
        ({"DB_PASSWORD": " around "}, {"password": " around "}),
        ({"DB_PASSWORD": "it's"}, {"password": "it's"}),
        ({"DB_PASSWORD": "'"}, {"password": "'"}),
        ({"DB_PASSWORD": "\\"}, {"password": "\\"}),
        ({"DB_PASSWORD": "a\\'b\\\\c\""}, {"password": "a\\'b\\\\c\""}),
        ({"DB_PASSWORD": "x' host='evil"}, {"password": "x' host='evil"}),
        ({"DB_PASSWORD": "p@ss:w/rd?#%20"}, {"password": "p@ss:w/rd?#%20"}),
        ({"DB_PASSWORD": "пароль"}, {"password": "пароль"}),
        ({"DB_PASSWORD": "x", "DB_USERNAME": "it's me"}, {"password": "x", "user": "it's me"}),
    ],
)
def test_immichs_own_variables_name_the_database(config, environ, parts):
    made = config(environ=environ).postgres_url
    assert psycopg2.extensions.parse_dsn(made) == DATABASE | parts


@pytest.mark.parametrize(
    ("argv", "environ", "url"),
    [
        ([], {"DB_URL": "postgresql://u@h/d"}, "postgresql://u@h/d"),
        ([], {"DB_URL": "postgresql://u@h/d", "DB_HOSTNAME": "db"}, "postgresql://u@h/d"),
        (["--postgres-url", "host=h"], {"DB_URL": "postgresql://u@h/d", **DB}, "host=h"),
        ([], {"IMMICH_ANALYZE_POSTGRES_URL": "host=h", **DB}, "host=h"),
    ],
)
def test_a_whole_address_beats_its_parts(config, argv, environ, url):
    assert config(*argv, environ=environ).postgres_url == url


KEYS = ("immich_api_keys", ("one", "two", "three"))
LINES = (("A", "b"), ("C", "d"))
TWINS = [
    ("--api-key", "IMMICH_ANALYZE_API_KEY", "api_key", SECRET),
    ("--immich-api-keys", "IMMICH_API_KEY", "immich_api_keys", (SECRET,)),
    ("--immich-api-keys", "IMMICH_ANALYZE_IMMICH_API_KEYS", "immich_api_keys", (SECRET,)),
    ("--postgres-url", "IMMICH_ANALYZE_POSTGRES_URL", "postgres_url", SECRET),
]
EDITORS = {  # how a text ends up in a file
    "a byte order mark": b"\xef\xbb\xbf%s",
    "CRLF": b"%s\r\n",
    "old line ends": b"\r%s\r",
    "quotes": b'"%s"\n',
    "single quotes": b"'%s'",
    "all of it": b"\xef\xbb\xbf\r\n '%s' \r\n\r\n",
}


@pytest.mark.parametrize(("flag", "variable", "field", "value"), TWINS)
@pytest.mark.parametrize("content", [SECRET, f"{SECRET}\n", f"\n {SECRET} \r\n"])
def test_a_secret_may_be_in_a_file(settings, tmp_path, flag, variable, field, value, content):
    path = tmp_path / "secret"
    path.write_bytes(content.encode())
    for made in (
        settings(f"{flag}-file", str(path), **DB),
        settings(**DB, **{f"{variable}_FILE": str(path)}),
        settings(**DB, file=f"{flag[2:]}-file = {path}"),
    ):
        assert getattr(made, field) == value


@pytest.mark.parametrize(("flag", "variable", "field", "value"), TWINS)
@pytest.mark.parametrize("left", EDITORS.values(), ids=EDITORS)
def test_what_an_editor_leaves_in_a_file_does_no_harm(
    settings, tmp_path, flag, variable, field, value, left
):
    path, config = tmp_path / "secret", tmp_path / "my.conf"
    path.write_bytes(left % SECRET.encode())
    config.write_bytes(left.replace(b"%s", f"{flag[2:]} = %s".encode()) % SECRET.encode())
    given = [(f"{flag}-file", str(path))]
    given += [] if b"'%s" in left or b'"%s' in left else [("--config", str(config))]
    for argv in given:
        assert getattr(settings(*argv, **DB), field) == value
    variables = settings(**DB, **{variable: (left % SECRET.encode()).decode().lstrip("\ufeff")})
    assert getattr(variables, field) == value


@pytest.mark.parametrize("name", [*NAMES["database"], "DB_URL"])
@pytest.mark.parametrize("left", EDITORS.values(), ids=EDITORS)
def test_nor_in_immichs_own_variables(config, tmp_path, name, left):
    path, text = tmp_path / "value", left % b"a word"
    path.write_bytes(text)
    kept = text.decode().lstrip("\ufeff")  # by docker --env-file
    assert config(environ={f"{name}_FILE": str(path)}) == config(environ={name: "a word"})
    assert config(environ={name: kept}) == config(environ={name: "a word"})


@pytest.mark.parametrize(
    ("flag", "content", "field", "value"),
    [
        ("--immich-api-keys", b"\xef\xbb\xbf'one'\r\n\r\n'two', three\r\n", *KEYS),
        ("--immich-api-keys", b'"one","two"\rthree', *KEYS),
        ("--immich-header", b"\xef\xbb\xbf\r\n'A: b'\r\n C :d \r\n", "immich_header", LINES),
        ("--host-header", b'"A: b"\nC:\td', "host_header", LINES),
    ],
)
def test_a_file_of_several_is_read_line_by_line(settings, tmp_path, flag, content, field, value):
    path = tmp_path / "several"
    path.write_bytes(content)
    assert getattr(settings(f"{flag}-file", str(path), **DB), field) == value


@pytest.mark.parametrize(
    ("flag", "variable", "first", "second", "field", "value"),
    [
        ("--hosts", "IMMICH_ANALYZE_HOSTS", ONE, f"{TWO},{ONE}", "hosts", (ONE, TWO)),
        ("--immich-api-keys", "IMMICH_API_KEY", "one,two", "three", *KEYS),
        ("--immich-header", "IMMICH_ANALYZE_IMMICH_HEADER", "A: b", "C: d", "immich_header", LINES),
        ("--host-header", "IMMICH_ANALYZE_HOST_HEADER", "A: b", "C: d", "host_header", LINES),
    ],
)
def test_a_list_adds_up(settings, tmp_path, flag, variable, first, second, field, value):
    files = [tmp_path / "first", tmp_path / "second"]
    for path, text in zip(files, (first, second), strict=True):
        path.write_text(text)
    name = flag[2:]
    ways = [
        settings(flag, first, f"{flag}={second}", **{variable: "c:3"}, **DB),
        settings(**{variable: f"{first}\n{second}"}, **DB),
        settings(file=f"{name} = {first}\nthink\n--{name}: {second}", **DB),
    ]
    if flag != "--hosts":
        by_file = [word for path in files for word in (f"{flag}-file", str(path))]
        ways.append(settings(*by_file, **{variable: "c:3"}, **DB))
    assert [getattr(made, field) for made in ways] == [value] * len(ways)


def test_an_empty_list_of_facts_takes_back_those_of_a_variable(settings):
    assert settings("--context", "", IMMICH_ANALYZE_CONTEXT="people", **DB).context == ()


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [("--max-tokens", "max_tokens", 2), ("--api-key", "api_key", "2"), ("--prompt", "prompt", "2")],
)
def test_what_is_no_list_is_what_was_said_last(settings, flag, field, value):
    for made in (
        settings(flag, "1", flag, "2"),
        settings(file=f"{flag[2:]} = 1\n{flag[2:]} = 2"),
    ):
        assert getattr(made, field) == value


@pytest.mark.parametrize(
    "header",
    [
        *(SECRET, f": {SECRET}", "X-A:", "X-A: ", f"X A: {SECRET}", f"X-A: {SECRET}\x00"),
        *(f"X-Ä: {SECRET}", f"X-A: {SECRET}ключ", f"X(A): {SECRET}", f"X-A: {SECRET}\x7f"),
        *(f"X-A: ok\n{SECRET}", f"Content-Length: {SECRET}", f"transfer-encoding: {SECRET}"),
    ],
)
@pytest.mark.parametrize("flag", ["--immich-header", "--host-header"])
def test_a_header_that_cannot_be_sent_is_not_quoted(refused, tmp_path, flag, header):
    path = tmp_path / "headers"
    path.write_text(header)
    variable = f"IMMICH_ANALYZE{flag[1:].replace('-', '_').upper()}"
    for error in (
        refused(flag, header),
        refused(f"{flag}-file", str(path)),
        refused(**{variable: header}),
    ):
        assert error.key == "bad_header"


@pytest.mark.parametrize(("flag", "variable", "field", "value"), TWINS)
def test_a_flag_beats_a_variable_whichever_of_them_names_a_file(
    settings, tmp_path, flag, variable, field, value
):
    path, other = tmp_path / "secret", tmp_path / "other"
    path.write_text(SECRET)
    other.write_text("other")
    file = f"{flag[2:]} = other"
    for argv, environ in (
        ([f"{flag}-file", str(path)], {variable: "other"}),
        ([flag, SECRET], {f"{variable}_FILE": str(other)}),
        ([], {f"{variable}_FILE": str(path)}),
    ):
        assert getattr(settings(*argv, **DB, **environ, file=file), field) == value


@pytest.mark.parametrize("name", [*NAMES["database"], "DB_URL"])
def test_immichs_own_variables_have_file_twins_too(config, tmp_path, name):
    path = tmp_path / "secret"
    text = "postgresql://u@h/d" if name == "DB_URL" else "it's"
    path.write_text(f"{text}\n")
    by_file = config(environ={f"{name}_FILE": str(path)}).postgres_url
    assert by_file == config(environ={name: text}).postgres_url != config().postgres_url


def test_several_keys_are_of_several_users(config):
    keys = "first,second ,, first"
    assert config(environ=API | {"IMMICH_API_KEY": keys}).immich_api_keys == ("first", "second")


@pytest.mark.parametrize(
    ("environ", "lang"),
    [
        ({}, "en"),
        ({"LANG": "ru_RU.UTF-8"}, "ru"),
        ({"LANG": "ru"}, "ru"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "ru_RU.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "ru_RU.UTF-8", "LC_ALL": ""}, "ru"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "ru_RU.UTF-8"}, "ru"),
        ({"LC_MESSAGES": "ru_RU.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "ru_RU.UTF-8", "IMMICH_ANALYZE_LANG": "en"}, "en"),
        ({"LANG": "ru_RU.UTF-8", "IMMICH_ANALYZE_LANG": ""}, "ru"),
        ({"IMMICH_ANALYZE_LANG": "ru"}, "ru"),
        ({"IMMICH_ANALYZE_LANG": "RU"}, "ru"),
    ],
)
def test_the_language_is_the_systems_unless_chosen(config, environ, lang):
    assert config(environ=environ).lang == lang
    assert ia.language([], environ) == lang


@pytest.mark.parametrize(
    ("argv", "lang"),
    [
        (["--lang", "ru"], "ru"),
        (["--lang=ru"], "ru"),
        (["--lang", "RU"], "ru"),
        (["--lang", "ru", "--lang", "en"], "en"),
        (["--lang", "de"], "en"),
        (["--lang"], "en"),
    ],
)
def test_the_language_is_known_before_the_options_are(argv, lang):
    assert ia.language(argv, {}) == lang
    environ = {"IMMICH_ANALYZE_LANG": "en" if lang == "ru" else "ru"}
    if argv[-1] == lang:
        assert ia.language(argv, environ) == lang


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({"RUST_LOG": "debug"}, logging.DEBUG),
        ({"RUST_LOG": "WARN"}, logging.WARNING),
        ({"RUST_LOG": "trace"}, logging.DEBUG),
        ({"RUST_LOG": "error"}, logging.ERROR),
        ({"RUST_LOG": "immich_analyze=debug"}, logging.DEBUG),
        ({"RUST_LOG": "immich_analyze=info,hyper=warn"}, logging.INFO),
        ({"RUST_LOG": "hyper=warn, immich_analyze=debug"}, logging.DEBUG),
        ({"RUST_LOG": "info,immich_analyze=debug"}, logging.DEBUG),
        ({"RUST_LOG": "immich_analyze=debug,info"}, logging.DEBUG),
        ({"RUST_LOG": "warn,hyper=debug"}, logging.WARNING),
        ({"RUST_LOG": "hyper=debug"}, None),
        ({"RUST_LOG": "nonsense"}, None),
        ({"RUST_LOG": "immich_analyze=nonsense"}, None),
        ({"RUST_LOG": "debug", "IMMICH_ANALYZE_LOG_LEVEL": "error"}, logging.ERROR),
        ({"RUST_LOG": "debug", "IMMICH_ANALYZE_LOG_LEVEL": ""}, logging.DEBUG),
        ({"IMMICH_ANALYZE_LOG_LEVEL": "warning"}, logging.WARNING),
    ],
)
def test_the_log_level_of_older_setups_is_understood(config, environ, level):
    assert config(environ=environ).log_level == level
    assert config("--log-level", "info", environ=environ).log_level == logging.INFO


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("max-tokens=5", "max_tokens", 5),
        ("max-tokens: 5", "max_tokens", 5),
        ("max-tokens 5", "max_tokens", 5),
        ("  max-tokens   =   5  ", "max_tokens", 5),
        ("max-tokens = 5  # short", "max_tokens", 5),
        ("max-tokens = 5 ; short", "max_tokens", 5),
        ("# max-tokens = 6\n; max-tokens = 7\n\nmax-tokens = 5\n", "max_tokens", 5),
        ("[any section]\nmax-tokens = 5", "max_tokens", 5),
        ("max-tokens = '5'", "max_tokens", 5),
        ('prompt = "What is this?"', "prompt", "What is this?"),
        ("prompt = What's this = that?", "prompt", "What's this = that?"),
        ("prompt = Что на снимке?", "prompt", "Что на снимке?"),
        ("postgres-url = host=db user=me", "postgres_url", "host=db user=me"),
        (f"hosts = {ONE}, {TWO}", "hosts", (ONE, TWO)),
        (f"hosts = [{ONE}, {TWO}]", "hosts", (ONE, TWO)),
        (f'hosts = ["{ONE}", "{TWO}"]', "hosts", (ONE, TWO)),
        ("think", "think", True),
        ("lang = ru", "lang", "ru"),
    ],
)
def test_a_file_holds_a_setting_a_line(settings, file, field, value):
    assert getattr(settings(file=file), field) == value


def test_a_named_file_beats_the_users_which_beats_the_systems(settings, tmp_path, monkeypatch):
    system, named = tmp_path / "system.conf", tmp_path / "named.conf"
    monkeypatch.setattr(ia, "CONFIG_FILES", (str(system), ia.CONFIG_FILES[1]))
    system.write_text("max-tokens = 1\nmax-retries = 1\ngrace = 1")
    named.write_text("max-tokens = 3")
    made = settings("--config", str(named), file="max-tokens = 2\nmax-retries = 2")
    assert (made.max_tokens, made.max_retries, made.grace) == (3, 2, 1)


# What is wrong

NOT_UTF8 = "Опиши снимок".encode("cp1251").decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("argv", "more", "named"),
    [
        (["--max-concurrent", "0"], {}, "--max-concurrent"),
        (["--max-concurrent", "-1"], {}, "--max-concurrent"),
        (["--max-concurrent", "1.5"], {}, "--max-concurrent"),
        (["--max-concurrent", "many"], {}, "--max-concurrent"),
        (["--max-tokens", "9" * 400], {}, "--max-tokens"),
        (["--max-tokens", "9" * 5000], {}, "--max-tokens"),
        (["--max-tokens", ""], {}, "--max-tokens"),
        (["--max-tokens"], {}, "--max-tokens"),
        (["--context-length", "-1"], {}, "--context-length"),
        *(
            (["--model-options", text], {}, "--model-options")
            for text in (
                *("", "{", "7", "null", '["a"]', '"a"', "temperature=0.2", "[" * 100_000),
                *('{"model": "x"}', '{"seed": 1, "messages": []}', '{"stream": false}'),
                *('{"seed": NaN}', '{"top_p": 1e999}', '{"stop": [-Infinity]}'),
            )
        ),
        (["--max-image-size", "-1"], {}, "--max-image-size"),
        (["--max-retries", "0.5"], {}, "--max-retries"),
        (["--timeout", "0"], {}, "--timeout"),
        (["--timeout", "-3"], {}, "--timeout"),
        (["--timeout", "nan"], {}, "--timeout"),
        (["--timeout", "inf"], {}, "--timeout"),
        (["--timeout", "5m"], {}, "--timeout"),
        (["--wait-timeout", "-1"], {}, "--wait-timeout"),
        ([], {"IMMICH_ANALYZE_TIMEOUT": "soon"}, "--timeout"),
        ([], {"file": "timeout = soon"}, "--timeout"),
        (["-O", "some"], {}, "--overwrite-policy"),
        *(
            (["--shard", text], {}, "--shard")
            for text in ("6/5", "0/5", "2", "2/", "-1/2", "a/b", "1/0")
        ),
        (["--undo=yes"], {}, "--undo"),
        (["--mode", "once"], {}, "--mode"),
        ([], {"IMMICH_ANALYZE_MODE": "once"}, "--mode"),
        (["-m", "-c"], {}, "--combined"),
        (["-m", "--mode", "batch"], {}, "--mode"),
        (["--interface", "claude"], {}, "--interface"),
        (["--thumbnail-size", "huge"], {}, "--thumbnail-size"),
        (["--unavailable-duration", "-1"], {}, "--unavailable-duration"),
        (["--prompt", NOT_UTF8], {}, "--prompt"),
        ([f"--model-name={NOT_UTF8}"], {}, "--model-name"),
        (["--hosts", NOT_UTF8], {}, "--hosts"),
        ([], {"IMMICH_ANALYZE_PROMPT": NOT_UTF8}, "--prompt"),
        ([], {"IMMICH_ANALYZE_HEALTH_HOST": NOT_UTF8}, "--health-host"),
        ([], {"IMMICH_API_URL": NOT_UTF8}, "--immich-api-url"),
        ([], {"DB_PASSWORD": NOT_UTF8}, "DB_PASSWORD"),
        ([], {"DB_URL": NOT_UTF8}, "DB_URL"),
        (["-d", "api"], {}, "--data-access-mode"),
        (["--log-level", "loud"], {}, "--log-level"),
        ([], {"IMMICH_ANALYZE_THINK": "maybe"}, "IMMICH_ANALYZE_THINK"),
        ([], {"IMMICH_ANALYZE_NO_FINAL_OUTPUT": "maybe"}, "FINAL_OUTPUT"),
        ([], {"file": "think = maybe"}, "think"),
        ([], {"file": "no-think = maybe"}, "think"),
        (["--hosts", ""], {}, "--hosts"),
        (["--hosts", ","], {}, "--hosts"),
        (["--hosts", "http://"], {}, "--hosts"),
        (["--hosts", "ftp://a"], {}, "--hosts"),
        (["--hosts", "a:port"], {}, "--hosts"),
        (["--hosts", "a:99999"], {}, "--hosts"),
        (["--hosts", "a b"], {}, "--hosts"),
        (["--hosts", "http://[::1"], {}, "--hosts"),
        (["--hosts", "ok:1,a:port"], {}, "--hosts"),
        (["--hosts", "http://a/b@c"], {}, "--hosts"),
        ([], {"IMMICH_ANALYZE_OLLAMA_HOSTS": "a:port"}, "--hosts"),
        (["--immich-api-url", "immich:port"], {}, "--immich-api-url"),
        ([], {"IMMICH_API_URL": "file:///etc"}, "--immich-api-url"),
        (["--config"], {}, "--config"),
        (["--api-key", "a", "--api-key-file", "b"], {}, "--api-key"),
    ],
)
def test_a_wrong_setting_is_named(refused, argv, more, named):
    error = refused(*argv, **more)
    assert error.key == "bad_setting"
    assert named in str(error)


@pytest.mark.parametrize(
    ("argv", "more", "name", "key", "fields"),
    [
        (["--timeout", "0"], {}, "--timeout", "not_above", {"value": "0", "least": "0"}),
        (["--grace", "-1"], {}, "--grace", "not_a_number", {"value": "-1", "least": "0"}),
        (
            *(["--max-concurrent", "0"], {}, "--max-concurrent"),
            *("not_a_whole_number", {"value": "0", "least": "1"}),
        ),
        (
            *(["--thumbnail-size", "l"], {}, "--thumbnail-size"),
            *("not_one_of", {"value": "l", "names": "preview, thumbnail, fullsize"}),
        ),
        (["--prompt", NOT_UTF8], {}, "--prompt", "not_utf8", {}),
        (["--hosts", "11434"], {}, "--hosts", "not_an_address", {"value": "11434"}),
        (["--hosts", "http://u:p@:1"], {}, "--hosts", "not_an_address", {"value": ":1"}),
        (["--timeout"], {}, "--timeout", "value_missing", {}),
        (["--think=yes"], {}, "--think/--no-think", "value_unwanted", {}),
        *[
            ([], {"IMMICH_ANALYZE_THINK": word}, "IMMICH_ANALYZE_THINK", "not_a_switch", {})
            for word in ("maybe", "2", "да")
        ],
    ],
)
def test_a_wrong_setting_is_told_in_the_persons_language(refused, argv, more, name, key, fields):
    for language in ia.LANGUAGES:
        ia.use_language(language)
        assert str(refused(*argv, **more)) == f"{name}: {ia.t(key, **fields)}"


@pytest.mark.parametrize(
    ("argv", "more", "key", "fields"),
    [
        (["--nonsense"], {}, "unknown_option", {"option": "--nonsense"}),
        (["--nonsense", SECRET], {}, "unknown_option", {"option": "--nonsense"}),
        ([f"--apikey={SECRET}"], {}, "unknown_option", {"option": "--apikey"}),
        (["--model", "x"], {}, "unknown_option", {"option": "--model"}),
        (["-x"], {}, "unknown_option", {"option": "-x"}),
        ([SECRET], {}, "unknown_word", {}),
        ([SECRET, "--apikey"], {}, "unknown_option", {"option": "--apikey"}),
        ([f"-k{SECRET}"], {}, "unknown_option", {"option": "-k"}),
        ([], {"file": f"apikey = {SECRET}"}, "unknown_option", {"option": "--apikey"}),
        ([], {"file": f"think\n{SECRET}\n"}, "unknown_word", {}),
        ([], {"file": f"no-hosts = {ONE}"}, "unknown_option", {"option": "--no-hosts"}),
        (["--config", "/no/such"], {}, "unreadable_file", {"file": "/no/such"}),
        (["--config", "/"], {}, "unreadable_file", {"file": "/"}),
        (["--api-key-file", "/no/such"], {}, "unreadable_file", {"file": "/no/such"}),
        (["--api-key-file", "/"], {}, "unreadable_file", {"file": "/"}),
        ([], {"IMMICH_API_KEY_FILE": "/no/such"}, "unreadable_file", {"file": "/no/such"}),
        ([], {"DB_PASSWORD_FILE": "/no/such"}, "unreadable_file", {"file": "/no/such"}),
        (["-p", "--disable-ai-wrapper"], {}, "wrapper_needed", {}),
        (["-O", "missing-ai", "--disable-ai-wrapper"], {}, "wrapper_needed", {}),
        (["-p"], {"IMMICH_ANALYZE_DISABLE_AI_WRAPPER": "yes"}, "wrapper_needed", {}),
        (["-p"], {"file": "disable-ai-wrapper"}, "wrapper_needed", {}),
        (["--undo", "-m"], {}, "batch_only", {}),
        (["--undo", "-c"], {}, "batch_only", {}),
        (["--undo"], {"IMMICH_ANALYZE_MODE": "combined"}, "batch_only", {}),
        (["--dry-run", "-c"], {}, "batch_only", {}),
        (["--api-key", f"{SECRET} x"], {}, "bad_key", {"option": "--api-key"}),
        (["--api-key", f"{SECRET}\r\nx"], {}, "bad_key", {"option": "--api-key"}),
        (["--api-key", f"{SECRET}ключ"], {}, "bad_key", {"option": "--api-key"}),
        (
            *([], API | {"IMMICH_API_KEY": f"good,{SECRET} x"}),
            *("bad_key", {"option": "--immich-api-keys"}),
        ),
    ],
)
def test_what_else_is_wrong_has_a_message_of_its_own(refused, argv, more, key, fields):
    error = refused(*argv, **more)
    assert error.key == key
    assert fields.items() <= error.fields.items()


@pytest.mark.parametrize("line", [f"= {SECRET}", f": {SECRET}", f"api-key = a\n={SECRET}"])
def test_a_line_that_is_no_setting_is_not_quoted(refused, line):
    error = refused(file=line)
    assert error.key == "bad_config_file"
    assert str(error.fields["file"]).endswith("immich-analyze.conf")


def test_a_file_that_is_no_text_is_refused(config, tmp_path):
    path = tmp_path / "binary.conf"
    path.write_bytes(b"prompt = \xff\xfe")
    with pytest.raises(ia.Fatal) as caught:
        config("--config", str(path))
    assert caught.value.key == "bad_config_file"
    with pytest.raises(ia.Fatal) as caught:
        config("--api-key-file", str(path))
    assert caught.value.key == "unreadable_file"


def test_a_default_file_that_cannot_be_read_is_no_reason_to_go_on_without(config, home):
    (home / ".config" / "immich-analyze.conf").mkdir(parents=True)
    with pytest.raises(ia.Fatal) as caught:
        config()
    assert caught.value.key == "unreadable_file"


WITH_SECRETS = [
    (["--api-key", SECRET], {}),
    (["--immich-api-keys", SECRET], URL),
    (["--postgres-url", f"postgresql://u:{SECRET}@h/d"], {}),
    (["--hosts", f"http://u:{SECRET}@h:1,http://h:2/?key={SECRET}"], {}),
    (["--immich-api-url", f"http://u:{SECRET}@h"], KEY),
    ([], {"DB_PASSWORD": SECRET}),
    ([], {"DB_URL": f"postgresql://u:{SECRET}@h/d"}),
    ([], {"IMMICH_ANALYZE_API_KEY": SECRET}),
    (["--immich-header", f"X-A: {SECRET}"], {}),
    ([], {"IMMICH_ANALYZE_HOST_HEADER": f"X-A: {SECRET}"}),
    ([], API | {"IMMICH_API_KEY": SECRET}),
]


@pytest.mark.parametrize(("argv", "environ"), WITH_SECRETS)
def test_a_config_does_not_show_its_secrets(config, argv, environ):
    made = config(*argv, environ=environ)
    assert SECRET in str(dataclasses.asdict(made))
    assert SECRET not in repr(made)
    assert SECRET not in str(made)


@pytest.mark.parametrize(("argv", "environ"), WITH_SECRETS)
@pytest.mark.parametrize(
    "wrong", [["--timeout", "x"], ["--nonsense"], ["--undo", "-c"], ["--immich-header", "x"]]
)
def test_another_mistake_does_not_show_them_either(refused, argv, environ, wrong):
    refused(*argv, *wrong, **environ)


@pytest.mark.parametrize(
    ("argv", "more"),
    [
        (["--hosts", f"http://u:{SECRET}@h:port"], {}),
        (["--hosts", f"http://u:{SECRET}@h h"], {}),
        (["--hosts", f"ftp://u:{SECRET}@h"], {}),
        (["--hosts", f"http://u:x@{SECRET}@:port"], {}),
        (["--hosts", f"http://u:x/{SECRET}@h:port"], {}),
        (["--hosts", f"http://u:1/{SECRET}@h"], {}),
        (["--hosts", f"http://u:1#{SECRET}@h"], {}),
        (["--hosts", f"u:1?{SECRET}@h"], {}),
        (["--hosts", f"http://h:port/?key={SECRET}"], {}),
        (["--hosts", f"ok:1,http://u:{SECRET}@h:port"], {}),
        (["--immich-api-url", f"http://u:{SECRET}@h:port"], {}),
        ([], {"IMMICH_API_URL": f"http://u:{SECRET}@h:port"}),
        ([], {"file": f"hosts = http://u:{SECRET}@h:port"}),
        ([], {"file": f"api-key = [{SECRET}, {SECRET}]\nnonsense = {SECRET}"}),
        (["--api-key", SECRET, "--api-key-file", "/no/such"], {}),
        (["--api-key", f"-{SECRET}"], {}),
    ],
)
def test_a_wrong_setting_does_not_show_a_secret_in_it(refused, argv, more):
    refused(*argv, **more)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SECRET}@h:port/d",
        f"postgresql://u:p@{SECRET}@h/d",
        f"postgresql://u:{SECRET}",
        f"postgresql://u:{SECRET}@h/d?nonsense=1",
        f"host=h password={SECRET} nonsense=1",
        f"host=h password='{SECRET}",
        SECRET,
    ],
)
def test_a_wrong_database_address_is_not_quoted(config, url):
    with pytest.raises(ia.Fatal) as caught:
        ia.postgres_url(config("--postgres-url", url).postgres_url)
    error = caught.value
    assert error.key == "bad_postgres_url"
    assert SECRET not in f"{error} {error!r} {error.fields}"


@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql://u:{SECRET}%def@h/d", f"postgresql://u:{SECRET}100%@h/d"),
        *(f"postgresql://u:{SECRET}%zz@h/d", f"postgresql://u:{SECRET}%00@h/d"),
        *(f"socket://u:{SECRET}%ff@/run?db=d", f"socket:///run?db={SECRET}%e", "socket://[u/run"),
        *(f"postgresql://u:pa/{SECRET}?wo=rd@h/d", f"host=h password={NOT_UTF8}"),
    ],
)
def test_an_escape_that_is_none_is_one_line(url):
    with pytest.raises(ia.Fatal) as caught:
        ia.postgres_url(url)
    error = caught.value
    assert (error.key, error.fields["unknown"]) == ("bad_postgres_url", "")
    assert SECRET not in f"{error} {error!r} {error.fields}"


@pytest.mark.parametrize(
    ("url", "keyword"),
    [
        (f"postgresql://u:{SECRET}@h/d?schema=public", "schema"),
        (f"postgresql://u:{SECRET}@h/d?sslmode=require&sslMod=x", "sslMod"),
        (f"host=h password={SECRET} pasword=x", "pasword"),
        (f"socket://u:{SECRET}@/run?db=d&pool=5", "pool"),
    ],
)
def test_a_keyword_that_libpq_does_not_know_is_named(url, keyword):
    with pytest.raises(ia.Fatal) as caught:
        ia.postgres_url(url)
    assert str(caught.value).endswith(ia.t("unknown_keyword", keyword=keyword))
    assert SECRET not in f"{caught.value} {caught.value.fields}"


URI = {"user": "u", "password": "p@ss", "dbname": "d", "host": "h"}
SOCKET = URI | {"host": "/run/postgresql"}


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("?sslmode=require&sslmode=no-verify", {"sslmode": "require"}),
        ("?sslmode=no-verify", {"sslmode": "require"}),
        ("?sslmode=no-verify&sslmode=disable", {"sslmode": "disable"}),
        (
            "?sslmode=verify-full&encoding=utf8",
            {"sslmode": "verify-full", "client_encoding": "utf8"},
        ),
    ],
)
def test_an_address_as_immich_documents_it_works(config, url, parts):
    made = config(environ={"DB_URL": f"postgresql://u:p%40ss@h/d{url}"}).postgres_url
    assert psycopg2.extensions.parse_dsn(ia.postgres_url(made)) == URI | parts


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("socket://u:p%40ss@/run/postgresql?db=d", SOCKET),
        (
            "socket://u:p%40ss@/run/postgresql?encoding=utf8&db=d",
            SOCKET | {"client_encoding": "utf8"},
        ),
        (
            "socket://u:@/run/postgresql?db=d",
            {"user": "u", "host": "/run/postgresql", "dbname": "d"},
        ),
        ("socket:///run/postgresql?db=d", {"host": "/run/postgresql", "dbname": "d"}),
        ("socket:/run/postgresql?db=d", {"host": "/run/postgresql", "dbname": "d"}),
        ("socket:/run/postgresql", {"host": "/run/postgresql"}),
    ],
)
def test_the_address_of_a_socket_works(config, url, parts):
    made = config(environ={"DB_URL": url}).postgres_url
    assert psycopg2.extensions.parse_dsn(ia.postgres_url(made)) == parts


def test_immichs_other_word_for_the_ssl_mode_works_alone(config):
    made = ia.postgres_url(config(environ={"DB_SSL_MODE": "no-verify"}).postgres_url)
    assert psycopg2.extensions.parse_dsn(made)["sslmode"] == "require"


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--unavailable-duration", "unavailable_duration", 0.5),
        ("--wait-retry-interval", "wait_retry_interval", 0.5),
        ("--file-check-interval", "file_check_interval", 0.5),
        ("--file-write-timeout", "file_write_timeout", 0.0),
    ],
)
def test_a_pause_of_0_is_a_short_one_and_a_limit_of_0_one_look(config, flag, field, value):
    assert getattr(config(flag, "0"), field) == value
    assert getattr(config(flag, "0.1"), field) in (0.1, 0.0001)


# What is odd


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"IMMICH_ANALYZE_HOST": "x"}, ["IMMICH_ANALYZE_HOST (IMMICH_ANALYZE_HOSTS?)"]),
        (
            {"IMMICH_ANALYZE_MODEL_NAMES": SECRET, "IMMICH_ANALYZE_IMMICH_API_KEY": SECRET},
            [
                "IMMICH_ANALYZE_IMMICH_API_KEY (IMMICH_ANALYZE_IMMICH_API_KEYS?)",
                "IMMICH_ANALYZE_MODEL_NAMES (IMMICH_ANALYZE_MODEL_NAME?)",
            ],
        ),
        ({"IMMICH_ANALYZE_MODEL": "x"}, ["IMMICH_ANALYZE_MODEL (IMMICH_ANALYZE_MODEL_NAME?)"]),
        ({"IMMICH_ANALYZE_HOST": "", "IMMICH_HOST": "x", "DB_HOST": "x"}, []),
        ({"IMMICH_ANALYZE_LLAMACPP_HOSTS": "x", "IMMICH_ANALYZE_OLLAMA_HOSTS": "x"}, []),
    ],
)
def test_an_unknown_variable_is_named_with_the_nearest(config, environ, names):
    notices = [(n.key, n.fields["names"]) for n in config(environ=environ).notices]
    assert notices == ([("unknown_variables", ", ".join(names))] if names else [])


@pytest.mark.parametrize(
    ("argv", "more"),
    [
        (["--lang", "de"], {}),
        (["--lang", ""], {}),
        (["--lang=de_DE.UTF-8"], {}),
        ([], {"IMMICH_ANALYZE_LANG": "de"}),
        ([], {"file": "lang = de"}),
    ],
)
@pytest.mark.parametrize(("locale", "lang"), [("ru_RU.UTF-8", "ru"), ("fr_FR.UTF-8", "en")])
def test_an_unknown_language_is_the_locales_and_told(settings, argv, more, locale, lang):
    made = settings(*argv, **more, LANG=locale)
    assert (made.lang, [n.key for n in made.notices]) == (lang, ["unknown_language"])


@pytest.mark.parametrize(
    "url", ["host=a,b port=1,2", "postgresql://u:p%40ss@h:5432/d?sslmode=require", "dbname=x"]
)
def test_a_good_database_address_stays_as_it_is(url):
    assert ia.postgres_url(url) == url


@pytest.mark.parametrize(
    "option",
    [o for o in OPTIONS if isinstance(o.value, float) and o.field != "file_check_interval"],
    ids=lambda o: o.flag,
)
def test_a_very_long_time_can_be_waited_for(config, option):
    made = getattr(config(option.flag, "1e15"), option.field)
    assert threading.TIMEOUT_MAX >= made > 10 * 365 * 24 * 3600


# Help


def test_help_lists_every_option_and_variable(config, capsys):
    with pytest.raises(SystemExit) as caught:
        config("-h", "--nonsense")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for action in ia.build_parser()._actions:
        assert action.help is not argparse.SUPPRESS
        assert all(flag in text for flag in action.option_strings)
        assert (action.env_var or "") in text


def test_help_is_in_the_persons_language(config, capsys):
    ia.use_language("ru")
    with pytest.raises(SystemExit):
        config("--help")
    text = capsys.readouterr().out
    assert ia.catalogue("ru")["help_prompt"] in " ".join(text.split())


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version_is_told(config, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        config(flag)
    assert (caught.value.code, capsys.readouterr().out) == (
        0,
        f"immich-analyze {ia.__version__}\n",
    )


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n"])
def test_a_variable_that_names_an_empty_file_counts_as_unset(config, tmp_path, content):
    (tmp_path / "empty").write_text(content)
    files = ["IMMICH_API_KEY_FILE", "IMMICH_ANALYZE_API_KEY_FILE", "DB_PASSWORD_FILE"]
    empty = dict.fromkeys(files, str(tmp_path / "empty"))
    given = {
        "IMMICH_API_URL": "http://immich",
        "IMMICH_API_KEY": "key",
        "DB_PASSWORD": "word",
        "IMMICH_ANALYZE_API_KEY": "model",
    }
    assert config(environ=given | empty) == config(environ=given)
    assert config(environ=empty) == config()


def test_further_parameters_of_the_model_make_another_prompt(config):
    made = [
        config(*(["--model-options", text] if text else []), "--prompt", "P")
        for text in ("", "{}", '{"seed": 1, "top_k": 2}', '{"top_k": 2, "seed": 1}', '{"seed": 2}')
    ]
    plain, empty, some, same, other = (settings.prompt_id for settings in made)
    assert plain == empty == hashlib.sha256(b"P").hexdigest()[:12]
    assert some == same
    assert len({plain, some, other}) == 3
