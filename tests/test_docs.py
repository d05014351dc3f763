"""README says what is there, and all of it: settings, messages, exit codes, files, commands."""

import argparse
import ast
import re
import subprocess
from pathlib import Path

import psycopg2.extensions
import pytest
import sandbox
from worlds import PROMPT, check_note

import immich_analyze as ia

NAMES = ia.toml("settings.toml")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")


def section(title):
    """The text below a heading, up to the next one of its rank."""
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE
    )
    assert found, f"README has no section {title}"
    return found[1]


def table(text, heading):
    """The rows of the table with that heading, as lists of cells."""
    rows = iter(text.splitlines())
    assert any(row.startswith(heading) for row in rows), f"no table {heading}"
    next(rows)
    cells = []
    for row in rows:
        if not row.startswith("|"):
            break
        cells.append([cell.strip() for cell in row.strip("|").split("|")])
    return cells


SETTINGS = table(section("Settings"), "| flag | variable | default | meaning |")
VARIABLES = table(section("Settings"), "| variable | meaning |")
OPTIONS = [action for action in ia.build_parser()._actions if action.option_strings]


def row_of(action):
    rows = [row for row in SETTINGS if action.option_strings[0] in CODE.findall(row[0])]
    assert len(rows) == 1, f"README has {len(rows)} rows of {action.option_strings[0]}"
    return rows[0]


# settings


@pytest.mark.parametrize("action", OPTIONS, ids=lambda action: action.dest)
def test_every_option_is_documented_with_its_variable_and_default(action):
    flags, variable, default, meaning = row_of(action)
    assert set(CODE.findall(flags)) == set(action.option_strings)
    assert CODE.findall(variable) == ([action.env_var] if action.env_var else [])
    assert meaning
    literal = re.fullmatch(CODE, default)
    if action.default in (None, "", PROMPT, argparse.SUPPRESS):
        assert not literal, "a default that is no value of the setting is told in words"
    elif isinstance(action.default, bool):
        assert default == f"`{str(action.default).lower()}`"
    else:
        assert literal, f"{default} is not the default"
        assert (action.type or str)(literal[1]) == (action.type or str)(str(action.default))


def test_every_documented_option_exists():
    documented = [flag for row in SETTINGS for flag in CODE.findall(row[0])]
    known = [flag for action in OPTIONS for flag in action.option_strings]
    assert sorted(documented) == sorted(known)


def test_every_flag_and_variable_named_anywhere_exists():
    names = {row[0] for row in SETTINGS} | {row[1] for row in SETTINGS} | {v[0] for v in VARIABLES}
    known = {name for cell in names for name in CODE.findall(cell)}
    of_others = {"--mmproj", "--now"}  # llama.cpp, systemctl
    of_others |= {"--no-deps", "--target", "--upgrade"}  # pip
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - of_others
    variables = set(re.findall(r"\b(?:IMMICH|DB)_[A-Z_]+[A-Z]\b", README))
    assert sorted((flags | variables) - known) == []


def test_the_default_prompt_is_quoted_in_full():
    assert PROMPT in " ".join(section("Settings").split())


def test_the_default_database_is_told():
    assert ia.parse([], {}).postgres_url in section("Settings")


def documented_variables():
    return [name for row in VARIABLES for name in CODE.findall(row[0])]


def test_all_variables_of_immich_and_all_older_names_are_documented():
    of_immich = {"DB_URL", *NAMES["database"]}
    assert {*of_immich, *(f"{name}_FILE" for name in of_immich), *NAMES["older"]} <= {
        *documented_variables()
    }


@pytest.mark.parametrize("name", documented_variables())
def test_every_further_variable_has_an_effect(name, tmp_path):
    special = {"RUST_LOG": "debug", "IMMICH_ANALYZE_NO_FINAL_OUTPUT": "true"}
    special |= dict.fromkeys(("LC_ALL", "LC_MESSAGES", "LANG"), "ru_RU.UTF-8")
    value = special.get(name, "7432" if name.startswith("DB_") else "host7432")
    usual = {"IMMICH_API_URL": "http://immich", "IMMICH_API_KEY": "key"}
    environ = dict(usual)
    if "IMMICH_API" in name:
        del environ["IMMICH_API_URL" if name.endswith("URL") else "IMMICH_API_KEY"]
    environ[name] = value
    if name.endswith("_FILE"):
        (tmp_path / "value").write_text(value)
        environ[name] = str(tmp_path / "value")
    argv = ["--interface", "llamacpp"] if "LLAMACPP" in name else []
    config = ia.parse(argv, environ)
    assert config != ia.parse(argv, usual)
    if name not in special:
        secrets = (config.postgres_url, config.immich_api_url, config.immich_api_keys)
        assert value in f"{config} {config.hosts} {secrets}"


def test_immichs_defaults_are_told():
    """What is written beside the variables is what comes out when one is given alone."""
    told = {}
    for names, meaning in VARIABLES:
        words = re.search(r"defaults ([^;.]*)$", meaning)
        if words:
            defaults = words[1].replace("and ", "").split(", ")
            told |= dict(zip(CODE.findall(names), defaults, strict=True))
    known = {name: f"`{d}`" if d else "none" for name, (_, d) in NAMES["database"].items()}
    assert told == known


def test_the_configuration_file_of_the_readme_works(tmp_path):
    example = re.search(r"```ini\n(# /etc/immich-analyze.conf\n.*?)```", README, re.DOTALL)[1]
    key = tmp_path / "key"
    key.write_text("secret\n")
    file = tmp_path / "example.conf"
    file.write_text(example.replace("/etc/immich-analyze.key", str(key)))
    config = ia.parse(["--config", str(file)], {})
    assert config.immich_api_keys == ("secret",)
    assert config.hosts == ("http://localhost:11434", "http://gaming-pc:11434")
    assert config.prompt == "Describe this photo for a search, in four German sentences."
    assert config.access == ia.API


# exit codes


@pytest.mark.parametrize("told", [ia.__doc__, ia.catalogue("en")["help_epilog"]])
def test_the_exit_codes_are_the_same_everywhere(told):
    documented = [CODE.search(code)[1] for code, _ in table(section("Exit codes"), "| code |")]
    codes = re.findall(r"(\d|128\+n) [a-z]", told[told.index("Exit codes") :])
    assert documented == codes == ["0", "1", "2", "128+n"]


# troubleshooting

NEVER_SHOWN = {
    "bad_setting",  # shows one of the others
    "photo_excluded",  # as photo_gone
    "has_description",  # as photo_gone
    "failed_before",  # which the sum at the end says
    "photo_gone",  # such a photo is only left out
    "claimed_elsewhere",  # as photo_gone
    "not_ready",  # which the sum at the end says
    "note_missing",  # which is how most photos are
    "photos",  # a word of the progress bar
    "stopped",  # the exit code says it
}


def as_quoted(text):
    """A message as README quotes it: `…` for what differs."""
    return re.sub(r"\{\w+\}", "…", text)


MESSAGES = {
    key: as_quoted(text)
    for key, text in ia.catalogue("en").items()
    if not key.startswith(("help_", "page_", "check_")) and key not in NEVER_SHOWN
}
QUOTED = [
    quote
    for row in table(section("Troubleshooting"), "| message | cause and cure |")
    for quote in CODE.findall(row[0])
]


def is_quoted(message, quote):
    """A long message may end in `…` early."""
    return message == quote or (quote.endswith(" …") and message.startswith(quote.rstrip("… ")))


def test_every_quoted_message_exists():
    known = MESSAGES.values()
    assert [q for q in QUOTED if not any(is_quoted(message, q) for message in known)] == []


def test_every_message_is_under_troubleshooting():
    assert [m for m in MESSAGES.values() if not any(is_quoted(m, quote) for quote in QUOTED)] == []


def test_every_quoted_message_is_answered():
    rows = table(section("Troubleshooting"), "| message | cause and cure |")
    assert not [row[0] for row in rows if CODE.search(row[0]) and not row[1]]


# files and commands


def anchor(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "tests/BENCHMARKS.md"]
)
def test_every_local_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, place = target.partition("#")
        assert (ROOT / page).parent.joinpath(file).exists(), target
        assert not place or file or place in anchors, target


def test_the_readmes_links_work_wherever_it_is_read():
    """On a package index, or in an installed package, there are no files beside it."""
    targets = re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_the_readmes_pictures_are_small_and_have_a_text_for_where_they_are_not():
    pictures = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", README)
    assert pictures
    for text, file in pictures:
        assert len(text.split()) > 5
        assert (ROOT / file).stat().st_size < 100_000


def test_every_make_target_and_file_named_in_commands_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", CONTRIBUTING, re.MULTILINE)) <= targets
    files = set(
        re.findall(r"\b((?:tests/|i18n/)[\w./-]+|immich_analyze\.py)", README + CONTRIBUTING)
    )
    assert not [file for file in files if not (ROOT / file.rstrip(".")).exists()]


def test_the_first_commands_are_make_demo_and_make_test():
    block = re.search(r"```sh\n(.*?)```", README, re.DOTALL)[1]
    commands = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert commands == ["make demo", "make test"]


def test_the_shell_commands_are_valid():
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_the_permissions_are_those_the_tool_asks_for():
    keys = section("Least privilege").partition("**A database role**")[0]
    needed, extra = keys.split("Add", 1)
    assert tuple(CODE.findall(needed)) == ia.NEEDED_PERMISSIONS
    assert {"user.read", "asset.statistics"} <= {*CODE.findall(extra)}


@pytest.mark.parametrize("version", ["2.3.1", sandbox.NEWEST])
def test_the_grants_are_enough(photos, postgres, version, config):
    if not postgres.own:
        pytest.skip("roles belong to the whole server")
    library = photos(version)
    photo = library.add()
    grants = re.search(r"```sql\n(.*?)```", section("Least privilege"), re.DOTALL)[1]
    if version == "2.3.1":  # as README says
        grants = grants.replace(', "lockedProperties"', "")
    library.run(grants)
    library._roles.append("immich_analyze")  # the fixture removes it
    parts = psycopg2.extensions.parse_dsn(library.uri)
    uri = sandbox.libpq_uri(parts | {"user": "immich_analyze", "password": "choose one"})
    settings = config("--postgres-url", uri, "--immich-root", str(library.root))
    new_library, complete = ia.open_library(settings)
    assert complete()
    opened = new_library()
    [asset], _ = opened.page(None)
    assert opened.preview(asset)
    note = ia.Note("tiny-vlm", settings.prompt_id, text=ia.text_id("A lake."))
    assert opened.write(asset, "A lake.", note)
    opened.remember(asset, note)
    assert library.description(photo) == "A lake."
    if version != "2.3.1":
        check_note(library.notes(photo), "A lake.")
    assert opened.write(opened.look(asset), "", None)
    opened.close()
    assert (library.description(photo), library.notes(photo)) == ("", {})


def test_the_version_is_in_the_changelog():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (?:Unreleased|\[?[\d.]+)", changes, re.MULTILINE)
    assert ia.__version__ in changes


def test_both_catalogues_are_linked():
    assert {file.stem for file in (ROOT / "i18n").glob("*.json")} == {
        *re.findall(r"i18n/(\w+)\.json\)", CONTRIBUTING)
    }


def test_a_photo_is_followed_by_few_names_which_exist():
    told = re.search(r"names are all it takes to follow a photo:(.*?)\.\n", CONTRIBUTING, re.DOTALL)
    names = CODE.findall(told[1])
    tree = ast.parse(Path(ia.__file__).read_text(encoding="utf-8"))
    known = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert len(set(names)) == len(names) <= 20
    assert set(names) - known == set()
