"""Every text for people exists in every language, is used, and is needed for nothing else."""

import ast
import functools
import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
import servers
from jinja2.nodes import Call, Name
from worlds import about_photos

import immich_analyze as ia

SOURCE = Path(ia.__file__)
FOLDER = SOURCE.with_name("i18n")
TEXTS = {language: ia.catalogue(language) for language in ia.LANGUAGES}
TREE = ast.parse(SOURCE.read_text(encoding="utf-8"))
OURS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
SPEAKERS = {"t"} | {
    name
    for name, value in vars(ia).items()
    if isinstance(value, type) and issubclass(value, ia.AnalyzeError)
}


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def strings(node: ast.AST | None, known: Mapping[str, ast.AST]) -> set[str]:
    """The texts an expression may be; "" is none. Calls: of `get`, or of a function of ours."""
    match node:
        case ast.IfExp(body=one, orelse=other):
            return strings(one, known) | strings(other, known)
        case ast.Constant(value=str(text)):
            return {text} - {""}
        case ast.Dict(values=values):
            return set().union(*(strings(value, known) for value in values))
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="get"), args=[_, default]):
            return strings(known.get(name), known) | strings(default, known)
        case ast.Call(func=ast.Name(id=name)):
            returns = [n for n in ast.walk(OURS[name]) if isinstance(n, ast.Return)]
            return set().union(*(strings(n.value, known) for n in returns))
    return set()


def names(node: ast.AST | None) -> set[str]:
    """The names an expression may be."""
    if isinstance(node, ast.IfExp):
        return names(node.body) | names(node.orelse)
    return {node.id} if isinstance(node, ast.Name) else set()


@functools.cache
def spoken() -> list[tuple[ast.Call, set[str]]]:
    """Each place that makes a text or an error, with the keys it may have."""
    found = []
    for function in TREE.body:
        assigned = {
            target.id: node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign | ast.NamedExpr)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            callee = getattr(call.func, "id", "")
            if SPEAKERS & ({callee} | names(assigned.get(callee))):
                first = call.args[0]
                variable = assigned.get(getattr(first, "id", ""))
                found.append((call, strings(first, assigned) | strings(variable, assigned)))
    return found


@functools.cache
def spoken_on_pages() -> list[tuple[str, set[str]]]:
    """Each key in a template, with the fields that it is given."""
    calls = [
        call
        for file in FOLDER.glob("*.jinja")
        for call in jinja2.Environment().parse(file.read_text(encoding="utf-8")).find_all(Call)
        if isinstance(call.node, Name) and call.node.name == "t"
    ]
    return [(call.args[0].as_const(), {given.key for given in call.kwargs}) for call in calls]


VERDICTS = ia.toml("verdicts.toml")
BLAMED = [row for rows in VERDICTS.values() for row in rows.values()]
# The forms of a tally, by what a run is for.
FORMS = {f"tally{undo}{dry}" for undo in ("", "_undo") for dry in ("", "_dry_run")}
HELP = {
    f"help_{action.option_strings[0].removeprefix('--').replace('-', '_')}"
    for action in ia.build_parser()._actions
}
HELP |= {f"help_group_{heading}" for heading in ia.toml("settings.toml")["headings"].values()}


def test_each_language_has_a_catalogue():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(ia.LANGUAGES)


@pytest.mark.parametrize("language", ia.LANGUAGES)
def test_a_catalogue_is_sorted_and_says_each_thing_once(language):
    text = (FOLDER / f"{language}.json").read_text(encoding="utf-8")
    pairs = json.loads(text, object_pairs_hook=list)
    assert [key for key, _ in pairs] == sorted(TEXTS[language])
    assert text == json.dumps(dict(pairs), indent=2, ensure_ascii=False) + "\n"


def test_the_catalogues_have_the_same_keys():
    assert len({frozenset(texts) for texts in TEXTS.values()}) == 1


def test_a_text_has_the_same_fields_in_each_language():
    different = [
        key for key in TEXTS["en"] if len({frozenset(fields(t[key])) for t in TEXTS.values()}) > 1
    ]
    assert different == []


def test_a_text_is_one_line_that_says_something():
    for texts in TEXTS.values():
        assert [key for key, text in texts.items() if text != " ".join(text.split())] == []
        assert "" not in texts.values()


def test_a_text_differs_from_language_to_language():
    same = [key for key, text in TEXTS["en"].items() if TEXTS["ru"][key] == text]
    assert [key for key in same if re.search(r"\w", re.sub(r"{\w+}", "", TEXTS["en"][key]))] == []


def test_what_is_no_key_in_the_code_is_known_here():
    unknown = {ast.unparse(call.args[0]) for call, keys in spoken() if not keys}
    assert unknown == {
        "self.key",
        "error.key",
        "self.form",
        "f'help_{option}'",
        "f'help_group_{heading}'",
    }


def test_every_key_in_the_code_has_a_text_and_every_text_a_use():
    used = {key for _, keys in spoken() for key in keys} | HELP | FORMS
    used |= {key for _, *keys in BLAMED for key in keys} | {key for key, _ in spoken_on_pages()}
    assert used == set(TEXTS["en"])


def test_a_text_is_given_all_its_fields():
    lacking = [
        (key, call.lineno)
        for call, keys in spoken()
        for key in keys
        if all(keyword.arg for keyword in call.keywords)
        and fields(TEXTS["en"][key]) - {keyword.arg for keyword in call.keywords}
    ]
    lacking += [
        (key, given) for key, given in spoken_on_pages() if fields(TEXTS["en"][key]) != given
    ]
    assert lacking == []
    usual = {"url", "status", "why", "said"}
    own = {
        "options": {"why"},
        "file": {"file", "why"},
        "connection": {"url", "value", "seconds", "why"},
        "redirect": {"url", "target"},
    }
    for table, rows in VERDICTS.items():
        for start, (_, key, *hints) in rows.items():
            told = own.get(table, usual) | re.compile(start).groupindex.keys()
            assert fields(TEXTS["en"][key]) <= told, start
            assert [hint for hint in hints if fields(TEXTS["en"][hint])] == []
    assert [key for key in HELP if fields(TEXTS["en"][key])] == []
    outcomes = {outcome.value for outcome in ia.Outcome}
    assert [key for key in FORMS if not fields(TEXTS["en"][key]) <= outcomes] == []


def test_a_text_that_is_missing_is_told_in_english(monkeypatch):
    catalogues = {"en": {"one": "one {n}", "two": "two"}, "ru": {"one": "раз {n}"}}
    monkeypatch.setattr(ia, "catalogue", catalogues.get)
    ia.use_language("ru")
    assert (ia.t("one", n=1), ia.t("two")) == ("раз 1", "two")
    ia.use_language("en")
    assert ia.t("one", n=1) == "one 1"


def test_an_error_is_told_in_the_language_of_the_moment():
    error = ia.Retryable("timed_out", pause=3, url="U", seconds=5)
    told = []
    for language in ia.LANGUAGES:
        ia.use_language(language)
        told.append(str(error))
    assert told == [TEXTS[x]["timed_out"].format(url="U", seconds=5) for x in ia.LANGUAGES]


# Nothing depends on a text


@pytest.fixture
def poisoned(command: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with every text the same."""
    monkeypatch.setattr(ia, "catalogue", lambda _: dict.fromkeys(TEXTS["en"], "POISON"))
    monkeypatch.setattr(ia, "CONFIG_FILES", ("/poisoned",))  # or a parser of before would be kept
    return command


@pytest.mark.slow
def test_a_whole_run_depends_on_no_text(immich, ollama, poisoned):
    photos = immich.add_many(5)
    immich.add(description="by a person")
    immich.add(preview=None)
    immich.add(preview=b"GIF89a")
    ollama.script("POST", "/api/show", servers.Reply(503))
    ollama.script("POST", "/api/chat", servers.Reply(500, {"error": "a hiccup"}))
    done = poisoned(
        *("--immich-api-url", immich.url, "--immich-api-keys", immich.key),
        *("--hosts", ollama.url, "--model-name", "tiny-vlm", "--retry-delay-seconds", "0"),
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "POISON\nPOISON\n", 1)
    assert [photo.description for photo in photos] == [servers.told(p.preview) for p in photos]
    assert len(about_photos(ollama)) == 6


NOWHERE = ["--postgres-url", "host=127.0.0.1 port=9", "--no-wait-for-immich"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "code"),
    [(["--timeout", "x"], 2), (["-m", *NOWHERE], 2), (["-h"], 0), (["--version"], 0)],
)
def test_other_runs_depend_on_no_text_either(poisoned, argv, code):
    done = poisoned(*argv)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr == ("" if code == 0 else done.stderr)
    assert ("POISON" in done.stdout + done.stderr) is (argv != ["--version"])
