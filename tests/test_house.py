"""The house rules, for whoever changes the module."""

import ast
import functools
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

import psycopg2
import pytest
import requests

import immich_analyze as ia

SOURCE = Path(ia.__file__)
ROOT = SOURCE.parent
TEXT = SOURCE.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
BANNERS = {
    number: int(section)
    for number, line in enumerate(TEXT.splitlines(), 1)
    if (section := "".join(re.findall(r"^# (\d) [A-Z]", line)))
}
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
LONGEST_MODULE, LONGEST_PIPELINE = 4300, 720  # the pipeline is section 8
LONGEST_FUNCTION, USUAL_FUNCTION, MOST_BRANCHES, WIDEST_SUMMARY = 45, 8, 10, 95


def section(node: ast.AST) -> int:
    return max((s for line, s in BANNERS.items() if line <= node.lineno), default=0)


def dotted(node: ast.AST) -> str:
    """A name such as os.environ, or "" for what is none."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


@functools.cache
def named() -> list[tuple[str, int]]:
    """The dotted names in the module, by line."""
    return [(name, node.lineno) for node in ast.walk(TREE) if (name := dotted(node))]


def places(*wanted: str) -> list[tuple[str, int]]:
    """Where the module says one of these dotted names, by line."""
    return [(name, line) for name, line in named() if name in wanted]


def bound(node: ast.AST) -> set[str]:
    """What a definition or assignment at the top gives a name to."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_sections_are_in_order():
    assert list(BANNERS.values()) == list(range(1, 10))


# What a section may use


def local(function: ast.FunctionDef | ast.Lambda) -> set[str]:
    """Names of its own that a function gives: parameters and what it assigns to."""
    arguments = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    inner = (node for part in ast.iter_child_nodes(function) for node in ast.walk(part))
    return arguments | {
        node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def used(node: ast.AST, known: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Each name of the module that is read in a piece of it, annotations too."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in known:
        yield node
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        known |= local(node)
    for part in ast.iter_child_nodes(node):
        yield from used(part, known)


def test_a_section_uses_only_those_above_it():
    home = {name: section(node) for node in TREE.body for name in bound(node)}
    forward = [
        (name.id, name.lineno)
        for node in TREE.body
        for name in used(node)
        if home.get(name.id, 0) > section(name)
    ]
    assert forward == []


def test_a_name_is_given_once():
    counts = Counter(name for node in TREE.body for name in bound(node))
    assert [name for name, number in counts.items() if number > 1] == []


def test_only_the_last_section_looks_around():
    seen = places("os.environ", "os.getenv", "os.environb", "sys.argv")
    outside = [(name, line) for name, line in seen if line < max(BANNERS)]
    assert outside == []
    assert {name for name, _ in seen} == {"os.environ", "sys.argv"}


def test_only_the_wire_knows_the_exceptions_of_libraries():
    modules = {"requests": requests, "psycopg2": psycopg2}
    found = Counter()
    for node in ast.walk(TREE):
        root, _, rest = dotted(node).partition(".")
        if root in modules and rest:
            value = functools.reduce(getattr, rest.split("."), modules[root])
            if isinstance(value, type) and issubclass(value, Exception):
                found[section(node)] += 1
    assert set(found) == {5}
    imports = [node for node in TREE.body if isinstance(node, ast.ImportFrom)]
    named = {alias.asname or alias.name for node in imports for alias in node.names}
    named &= {name for name, value in vars(ia).items() if from_one_of(value, modules)}
    assert [name for name in named if issubclass(getattr(ia, name), Exception)] == []


def from_one_of(value: object, modules: Container[str]) -> bool:
    """Whether it is a class of one of these libraries."""
    return isinstance(value, type) and value.__module__.partition(".")[0] in modules


def test_who_asks_the_mode_is_the_mode_itself_the_stream_or_main():
    asking = []
    for node in TREE.body:
        for inner in ast.walk(node):
            parts = [inner.left, *inner.comparators] if isinstance(inner, ast.Compare) else []
            if isinstance(inner, ast.Match):
                parts = [inner.subject, *inner.cases]
            said = " ".join(map(ast.unparse, parts))
            if re.search(r"\bMode\.|\.mode\b", said):
                asking.append(next(iter(bound(node)), ""))
    assert set(asking) <= {"Mode", "stream", "main"}


def test_nobody_asks_for_the_interface():
    words = r"|".join(map(re.escape, ia.INTERFACES))
    asking = [
        text
        for node in ast.walk(TREE)
        if isinstance(node, ast.Compare | ast.Match)
        and re.search(rf"""['"]({words})['"]|\binterface\b""", text := ast.unparse(node))
    ]
    assert sorted(asking) == [
        "dig(listed, 0, 'owned_by') == 'llamacpp'",  # a server's word, not a setting
        "name != interface",  # whose variable counts, by the table of interfaces
    ]
    assert tuple(ia.toml("dialects.toml")) == ia.INTERFACES


# What a module may do

CONSTANT = {
    "replace",
    "re.compile",
    "logging.getLogger",
    "TypeVar",
    "TypeVarTuple",
    "datetime",
    "timedelta",
    "Note",
}
QUIET = (
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef),
    *(ast.Assign, ast.AnnAssign, ast.If, ast.Expr),
)


def test_importing_does_nothing_but_define():
    for node in TREE.body:
        assert isinstance(node, QUIET)
        if isinstance(node, ast.Expr):
            assert node is TREE.body[0]
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            calls = [dotted(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            assert set(calls) <= CONSTANT, ast.unparse(node)


@pytest.mark.parametrize("name", ["print", "input", "time.sleep", "sleep", "exit", "breakpoint"])
def test_some_calls_are_never_made(name):
    assert places(name) == []


@pytest.mark.slow
def test_nothing_sleeps_in_the_tests_either():
    sleeping = [
        (path.name, node.lineno)
        for path in [*ROOT.glob("tests/test_*.py"), *ROOT.glob("tests/conftest.py")]
        if "sleep" in (text := path.read_text(encoding="utf-8"))  # to parse all takes two seconds
        for node in ast.walk(ast.parse(text))
        if dotted(node) in ("time.sleep", "sleep")
    ]
    assert sleeping == []


def test_only_a_photo_is_shielded_from_any_error():
    broad = [
        (function.name, ast.unparse(handler.type) if handler.type else "")
        for function in FUNCTIONS
        for handler in ast.walk(function)
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or dotted(handler.type) in ("Exception", "BaseException"))
    ]
    assert broad == [("attempt", "Exception")]


# How big and how plain


def test_the_module_fits_in_a_head():
    assert len(TEXT.splitlines()) <= LONGEST_MODULE


def test_the_pipeline_fits_in_a_head():
    begin, end = (line for line, number in BANNERS.items() if number in (8, 9))
    assert end - begin <= LONGEST_PIPELINE


SIZES = {node: node.end_lineno - node.lineno + 1 for node in FUNCTIONS}


def test_a_function_fits_on_a_page():
    assert [node.name for node, size in SIZES.items() if size > LONGEST_FUNCTION] == []


def test_most_functions_are_a_few_lines():
    assert statistics.median(SIZES.values()) <= USUAL_FUNCTION


def test_no_function_branches_more_than_one_can_follow():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert settings["lint"]["mccabe"] == {"max-complexity": MOST_BRANCHES}
    check = [sys.executable, "-m", "ruff", "check", "--no-cache", "--ignore-noqa"]
    ruff = [*check, "--select", "C901", str(SOURCE)]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def public() -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """What others may use: at the top and in classes, but for methods that a library names."""
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef):
            above = getattr(ia, node.name).__mro__[1:]
            methods = (one for one in node.body if isinstance(one, ast.FunctionDef))
            yield from (one for one in methods if not any(hasattr(c, one.name) for c in above))


def test_what_is_public_says_in_a_line_what_it_is():
    named = [node for node in public() if not node.name.startswith("_")]
    first = {node: (ast.get_docstring(node) or "").partition("\n")[0] for node in named}
    assert [node.name for node, line in first.items() if not line] == []
    assert [node.name for node, line in first.items() if len(line) > WIDEST_SUMMARY] == []


def test_private_names_have_one_underscore():
    named = {node.name for node in [*FUNCTIONS, *TREE.body] if hasattr(node, "name")}
    named |= {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    assert [name for name in named if re.match(r"__.*[^_]$", name)] == []


# The repository


@pytest.fixture(scope="module")
def tracked():
    """Every text file that git keeps, by path."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_the_repository_needs_nothing_from_beside_it(tracked):
    outside = b"../" + b"shared"
    assert SOURCE in tracked
    assert [path for path, data in tracked.items() if outside in data] == []


def test_the_repository_does_not_know_where_it_lies(tracked):
    folders = [ROOT, ROOT.with_name("shared")]
    folders += [Path(sys.prefix)] if sys.prefix != sys.base_prefix else []
    pattern = re.compile("|".join(rf"(?<![\w.-]){re.escape(str(f))}\b" for f in folders).encode())
    assert [path for path, data in tracked.items() if pattern.search(data)] == []
