"""The wheel, built and installed the way users get it."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import immich_analyze as ia

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **environ: str) -> str:
    """Run a command in a folder that knows nothing of the checkout; what it says.

    Coverage is of the checkout's module, not of a copy of it.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd="/",
        env=own | environ,
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


def test_the_wheel_holds_the_module_its_texts_and_patterns(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {
        "immich_analyze.py",
        "immich_analyze_i18n/answers.toml",
        "immich_analyze_i18n/en.json",
        "immich_analyze_i18n/ru.json",
    }


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
