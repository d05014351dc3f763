"""The wheel, built and installed the way users get it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipapp
import zipfile
from pathlib import Path

import pytest
from worlds import others_long

import immich_analyze as ia

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*command: str | Path, **environ: str) -> str:
    """Run a command in a folder that knows nothing of the checkout; what it says.

    Coverage is of the checkout's module, not of a copy of it.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    with tempfile.TemporaryDirectory() as home:  # where pip keeps what it got
        done = subprocess.run(
            [str(word) for word in command],
            cwd="/",
            env=own | {"HOME": home} | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel; its builder comes from the package registry unless it is here already."""
    folder = tmp_path_factory.mktemp("wheel")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", *here, "--wheel-dir", folder, ROOT)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but this package; the dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--target", folder, wheel)
    return folder


def immich_analyze(installed: Path, *argv: str) -> str:
    return run(installed / "bin" / "immich-analyze", *argv, PYTHONPATH=str(installed))


def test_the_wheel_holds_the_module_and_what_it_reads(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    data = {f"immich_analyze_i18n/{file.name}" for file in (ROOT / "i18n").iterdir()}
    assert {n for n in names if ".dist-info/" not in n} == data | {"immich_analyze.py"}


def test_the_installed_command_tells_its_version(installed):
    told = immich_analyze(installed, "--lang", "ru", "--version")
    assert told == f"immich-analyze {ia.__version__}\n"


@pytest.mark.parametrize("language", ia.LANGUAGES)
def test_the_installed_command_finds_its_texts(installed, language):
    told = " ".join(immich_analyze(installed, "--lang", language, "-h").split())
    assert ia.catalogue(language)["help_description"] in told


def test_the_installed_module_finds_its_patterns(installed):
    code = "import immich_analyze as ia; print(ia.clean('Description: A cat.'))"
    assert run(sys.executable, "-c", code, PYTHONPATH=str(installed)) == "A cat.\n"


STARTING = re.search(r"echo '(.*)' > build/__main__.py", README)[1]
CHECKOUT, INSTALLED = "i18n", "immich_analyze_i18n"


@pytest.mark.parametrize(
    ("main", "texts"),
    others_long(
        [(m, t) for m in (None, "immich_analyze:main") for t in (CHECKOUT, INSTALLED)],
        *((None, CHECKOUT), ("immich_analyze:main", INSTALLED)),
    ),
)
def test_it_runs_out_of_a_zip_archive(installed, tmp_path, texts, main):
    """Made of a checkout, or of what is installed; README's keeps the exit code as well."""
    folder, archive = tmp_path / "build", tmp_path / "immich-analyze.pyz"
    home = ROOT if texts == CHECKOUT else installed
    shutil.copytree(home / texts, folder / texts)
    shutil.copy(home / "immich_analyze.py", folder)
    if not main:
        (folder / "__main__.py").write_text(STARTING)
    zipapp.create_archive(folder, archive, main=main, compressed=True)
    told = run(sys.executable, archive, "--lang", "ru", "-h")
    assert ia.catalogue("ru")["help_description"] in " ".join(told.split())
    wrong = [sys.executable, archive, "--max-concurrent", "none"]
    done = subprocess.run(wrong, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0 if main else 2, b"")
    assert done.stderr.startswith(b"--max-concurrent: ")


def test_the_source_archive_holds_what_the_tests_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    left_out = {".git", ".ci", ".gitignore", "pyproject.toml"}  # the last two come by themselves
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", ROOT, "ls-files"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a checkout")
    tops = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    assert {f"/{top}" for top in tops - left_out} == {*included}


def test_what_it_runs_on_is_told():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = "Programming Language :: Python :: "
    told = [line.removeprefix(python) for line in project["classifiers"] if python in line]
    assert told == ["3.11", "3.12", "3.13", "3.14"]
    assert project["requires-python"] == f">={told[0]}"
    assert all(url.startswith("https://") for url in project["urls"].values())
