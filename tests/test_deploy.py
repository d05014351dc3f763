"""The unit, the image, the flake and README's compose file agree with the tool and do their work.

Where systemd, hadolint or Nix is installed, it judges them too.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import psycopg2.extensions
import pytest
import yaml

import immich_analyze as ia

NAMES = ia.toml("settings.toml")
ROOT = Path(__file__).parent.parent
UNIT = (ROOT / "immich-analyze.service").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FLAKE = (ROOT / "flake.nix").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONS = ia.build_parser()
EXAMPLES = dict(re.findall(r"```ini\n# /etc/systemd/system/(\S+)\n(.*?)```", README, re.DOTALL))
NIGHTLY = EXAMPLES["immich-analyze-batch.service"]
TIMER = EXAMPLES["immich-analyze-batch.timer"]
[SCRIPT] = PROJECT["project"]["scripts"]


def default(option):
    return OPTIONS.get_default(option)


def seconds(duration):
    units = {"": 1, "s": 1, "m": 60, "min": 60}
    number, unit = re.fullmatch(r"(\d+)(\w*?)", duration).groups()
    return int(number) * units[unit]


def tool(name):
    """The command of that name, beside Python or in the path; else there is no test."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return path or pytest.skip(f"no {name} here")


def run(*command):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def compose_files():
    """The services of that name in README's compose examples."""
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    found = [yaml.safe_load(block) for block in blocks if f"{SCRIPT}:" in block]
    return [file["services"][SCRIPT] for file in found]


# names


@pytest.mark.parametrize("text", [UNIT, DOCKERFILE, FLAKE], ids=["unit", "image", "flake"])
def test_every_variable_and_flag_named_exists(text):
    of_immich = {"DB_URL", *NAMES["database"]}
    known = {action.env_var for action in OPTIONS._actions} | {*NAMES["older"]} | of_immich
    known |= {f"{name}_FILE" for name in of_immich}
    named = set(re.findall(r"\b(?:IMMICH|DB)_[A-Z_]+[A-Z]\b", text))
    assert named
    assert named <= known
    flags = {flag for action in OPTIONS._actions for flag in action.option_strings}
    ours = re.findall(r"^ExecStart=.*|(?<=# )More than .*|(?<= CMD ).*", text, re.MULTILINE)
    assert {*re.findall(r"--[a-z-]+", " ".join(ours))} <= flags


# the unit


def said(key, unit=UNIT):
    """All values that a unit gives to a key."""
    return re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)


def service(folder, more=(), unit=UNIT, **files):
    """The settings that systemd starts the tool with, by variables and the files of secrets."""
    for word in said("SetCredential", unit):
        name, value = word.split(":", 1)
        value = files.get(name, value.encode().decode("unicode_escape"))
        (folder / name).write_text(value, encoding="utf-8")
    given = (word.replace("%d", str(folder)) for word in said("Environment", unit))
    environ = dict(word.split("=", 1) for word in given)
    return ia.parse(said("ExecStart", unit)[0].split()[1:], environ | dict(more))


def test_the_service_starts_without_any_setting(tmp_path):
    config = service(tmp_path)
    assert (config.mode, config.access) == (ia.Mode.COMBINED, ia.DATABASE)
    assert config.postgres_url == ia.parse([], {}).postgres_url
    assert (config.wait_for_immich, config.wait_timeout) == (True, 0)


@pytest.mark.parametrize("where", ["variable", "file"])
@pytest.mark.parametrize("unit", [UNIT, NIGHTLY], ids=["service", "timer"])
def test_the_service_takes_each_secret_from_either_place(unit, where, tmp_path):
    url = {"IMMICH_API_URL": "http://immich:2283"}
    secrets = {"IMMICH_API_KEY": "one", "IMMICH_ANALYZE_API_KEY": "two"}
    files = {"immich-api-key": "one\n", "model-key": "two\n"}
    variables, files = (secrets, {}) if where == "variable" else ({}, files)
    config = service(tmp_path, url | variables, unit, **files)
    assert (config.access, config.immich_api_keys) == (ia.API, ("one",))
    assert config.api_key == "two"


@pytest.mark.parametrize("where", ["variable", "file"])
@pytest.mark.parametrize("unit", [UNIT, NIGHTLY], ids=["service", "timer"])
def test_the_service_takes_the_password_from_either_place(unit, where, tmp_path):
    settings = {"DB_HOSTNAME": "localhost"}
    files = {"db-password": "three\n"}
    variables, files = ({"DB_PASSWORD": "three"}, {}) if where == "variable" else ({}, files)
    config = service(tmp_path, settings | variables, unit, **files)
    assert config.access == ia.DATABASE
    parts = psycopg2.extensions.parse_dsn(config.postgres_url)
    assert (parts["host"], parts["password"]) == ("localhost", "three")


@pytest.mark.parametrize("unit", [UNIT, NIGHTLY], ids=["service", "timer"])
def test_a_secret_that_is_not_there_stops_no_service(unit):
    loaded = [word.split(":")[0] for word in said("LoadCredential", unit)]
    assert loaded == [word.split(":")[0] for word in said("SetCredential", unit)]
    assert [word.split("%d/")[1] for word in said("Environment", unit) if "%d" in word] == loaded


def test_what_the_timer_runs_is_a_batch_with_the_settings_of_the_service(tmp_path):
    mode = {"IMMICH_ANALYZE_MODE": "combined"}
    config = service(tmp_path, mode, NIGHTLY)
    assert (config.mode, config.log_level) == (ia.Mode.BATCH, logging.INFO)  # its summary is shown
    for key in ("LoadCredential", "SetCredential", "EnvironmentFile"):
        assert said(key, NIGHTLY) == said(key)
    assert said("ExecStart", NIGHTLY)[0].split()[0] == said("ExecStart")[0].split()[0]
    assert said("Type", NIGHTLY) == ["oneshot"]
    assert seconds(said("TimeoutStopSec", NIGHTLY)[0]) > default("grace")
    assert said("SuccessExitStatus", NIGHTLY) == [str(128 + signal.SIGTERM)]  # as it was asked to


def test_the_settings_come_before_the_start_and_their_paths_are_whole():
    told = README.partition("\n## systemd\n")[2].partition("\n## ")[0]
    steps = ["/etc/immich-analyze.env", "/etc/immich-analyze.key", "enable --now"]
    assert sorted(steps, key=told.index) == steps
    named = [line.split("=")[1] for line in UNIT.splitlines() if line.startswith("EnvironmentFile")]
    assert named == ["-" + steps[0]]


def test_the_service_is_patient_and_ends_in_time():
    assert said("Type") == ["notify"]
    assert said("TimeoutStartSec") == []  # it is ready long before that
    assert said("After") == ["multi-user.target"]  # so it is stopped before what it writes to
    assert seconds(said("TimeoutStopSec")[0]) > default("grace")
    assert seconds(said("WatchdogSec")[0]) >= 180
    assert said("Restart") == ["on-failure"]
    assert said("RestartPreventExitStatus") == ["2"]
    assert said("SuccessExitStatus") == [str(128 + signal.SIGTERM)]


@pytest.mark.parametrize("text", [UNIT, NIGHTLY, TIMER], ids=["service", "nightly", "timer"])
def test_systemd_finds_no_fault(tmp_path, text):
    own = tmp_path / ("immich-analyze-batch.timer" if text is TIMER else "immich-analyze.service")
    own.write_text(text.replace(said("ExecStart")[0].split()[0], sys.executable))
    night = NIGHTLY.replace(said("ExecStart")[0].split()[0], sys.executable)
    (tmp_path / "immich-analyze-batch.service").write_text(night)
    code, output = run(tool("systemd-analyze"), "verify", own)
    assert (code, [line for line in output.splitlines() if own.name in line]) == (0, [])
    assert len(said("Description", text)) == 1


def test_the_service_is_shut_in():
    unit = ROOT / "immich-analyze.service"
    judge = [tool("systemd-analyze"), "security", "--offline=true", "--threshold=20"]
    code, output = run(*judge, unit)
    assert code == 0, output


# the image


def instructions(name):
    """What the last stage says by an instruction."""
    stage = re.split(r"^FROM ", DOCKERFILE.replace("\\\n", " "), flags=re.MULTILINE)[-1]
    return re.findall(rf"^{name} +(.*)$", stage, re.MULTILINE)


def image_settings():
    return dict(word.split("=", 1) for line in instructions("ENV") for word in line.split())


def test_the_image_watches_what_is_in_data():
    config = ia.parse([], image_settings())
    assert (config.mode, config.immich_root) == (ia.Mode.COMBINED, Path("/data"))
    assert config.health_port


def test_the_image_runs_the_command_and_asks_it_how_it_is():
    [entry], [check] = instructions("ENTRYPOINT"), instructions("HEALTHCHECK")
    command, *flags = json.loads(check.partition("CMD ")[2])
    assert json.loads(entry) == [command] == [SCRIPT]
    assert ia.parse(flags, image_settings()).healthcheck
    assert instructions("STOPSIGNAL") == ["SIGTERM"]


def test_the_image_is_not_run_by_root():
    [user] = instructions("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_only_the_package_is_sent_to_the_builder():
    text = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    parts = {*wheel["include"], *wheel["force-include"], "pyproject.toml"}
    parts |= {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert lines[0] == "*"
    assert sorted(lines[1:]) == sorted(f"!{part}" for part in parts)


def test_hadolint_finds_no_fault():
    assert run(tool("hadolint"), ROOT / "Dockerfile") == (0, "")


# the compose file


@pytest.mark.parametrize("access", [ia.DATABASE, ia.API])
def test_the_compose_example_is_for_existing_setups(access):
    found = compose_files()
    of_immich = [{"DB_PASSWORD": "p"} if one.get("env_file") == ".env" else {} for one in found]
    configs = [
        ia.parse([], image_settings() | dotenv | one["environment"])
        for one, dotenv in zip(found, of_immich, strict=True)
    ]
    [(example, config)] = [
        pair for pair in zip(found, configs, strict=True) if pair[1].access == access
    ]
    database = {"env_file": ".env", "volumes": ["${UPLOAD_LOCATION}:/data:ro"]}
    expected = database if access == ia.DATABASE else {}
    assert {key: example[key] for key in database if key in example} == expected
    assert example["restart"] == "unless-stopped"
    assert seconds(example["stop_grace_period"]) > default("grace")
    [(name, _)] = [host.split(":") for host in example["extra_hosts"]]
    assert config.hosts == (f"http://{name}:11434",)


# the flake


def test_the_flake_takes_its_hardening_from_the_unit():
    keys = set(re.findall(r"^([A-Z]\w+)=", UNIT.partition("[Service]")[2], re.MULTILINE))
    assert keys & set(re.findall(r"\w+", FLAKE)) == {"EnvironmentFile", "LoadCredential"}
    assert "systemd.packages = [ cfg.package ];" in FLAKE
    [folder] = re.findall(r"--replace-fail (/\S+) \$out/bin/$", FLAKE, re.MULTILINE)
    assert f"{folder}{SCRIPT}" == said("ExecStart")[0].split()[0]


def test_the_flake_has_the_dependencies():
    listed = re.search(r"dependencies = with [\w.]+; \[(.*?)\]", FLAKE, re.DOTALL)[1].split()
    project = PROJECT["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["video"]
    asked = {re.match(r"[\w-]+", line)[0] for line in lines}
    assert {*listed} == asked - {"psycopg2-binary"} | {"psycopg2"}


def test_the_flake_knows_the_secrets_of_the_unit():
    names = re.findall(r"^ +([\w-]+) = secret ", FLAKE, re.MULTILINE)
    assert names == [word.split(":")[0] for word in said("LoadCredential")]


def test_the_flake_knows_the_settings_by_the_readme():
    pattern = re.search(r'rows = builtins.split "(.*)" \(', FLAKE)[1].replace(r"\n", "\n")
    named = {action.option_strings[0][2:] for action in OPTIONS._actions if action.env_var}
    assert {*re.findall(pattern, README)} == named


# As much of nixpkgs as the flake asks for.
NIXPKGS = """
rec {
  legacyPackages.x86_64-linux = {
    inherit lib;
    stdenv.hostPlatform.system = "x86_64-linux";
    python3Packages = { buildPythonApplication = made: made; hatchling = { }; };
  };
  lib = with builtins; rec {
    genAttrs = names: make: listToAttrs (map (name: { inherit name; value = make name; }) names);
    mapAttrsToList = make: set: map (name: make name set.${name}) (attrNames set);
    mapAttrs' = make: set: listToAttrs (mapAttrsToList make set);
    filterAttrs = keep: set:
      removeAttrs set (filter (name: !(keep name set.${name})) (attrNames set));
    optional = given: value: if given then [ value ] else [ ];
    boolToString = value: if value then "true" else "false";
    toUpper = replaceStrings LOWER UPPER;
    mkIf = given: value: if given then value else { };
    licenses.mit = { };
  };
}
"""


def nix_module(tmp_path, settings, more=""):
    """What the flake and its module say, with these settings."""
    nix = tool("nix-instantiate")
    assert run(nix, "--parse", ROOT / "flake.nix")[0] == 0
    lower = " ".join(f'"{letter}"' for letter in "abcdefghijklmnopqrstuvwxyz")
    stub = NIXPKGS.replace("LOWER", f"[ {lower} ]").replace("UPPER", f"[ {lower.upper()} ]")
    asked = f"""
    let
      flake = (import {ROOT}/flake.nix).outputs {{ self = flake; nixpkgs = {stub}; }};
      pkgs = ({stub}).legacyPackages.x86_64-linux;
      module = flake.nixosModules.default {{
        inherit pkgs;
        lib = pkgs.lib;
        config.services.immich-analyze = {{
          enable = true;
          package = "package";
          environmentFile = null;
          credentials = {{ immich-api-key = "/key"; model-key = null; }};
          settings = {{ {settings} }};
        }} // {{ {more} }};
      }};
      service = module.config.systemd.services.immich-analyze;
    in [
      flake.packages.x86_64-linux.default.version
      flake.packages.x86_64-linux.default.meta.mainProgram
      module.config.systemd.packages service.serviceConfig service.environment
      (builtins.concatMap (one: if one.assertion then [ ] else [ one.message ])
        module.config.assertions)
    ]"""
    code, output = run(nix, "--eval", "--strict", "--json", "--store", "dummy://", "-E", asked)
    assert code == 0, output
    return json.loads(output.splitlines()[0])


def test_nix_makes_the_service(tmp_path):
    settings = """hosts = [ "http://a" "http://b" ]; final-output = false; grace = 2.5;
                  immich-api-url = "http://immich";"""
    made = nix_module(tmp_path, settings, 'environmentFile = "/env";')
    version, program, packages, limits, environ, wrong = made
    assert (version, program, packages) == (ia.__version__, SCRIPT, ["package"])
    assert limits == {"EnvironmentFile": ["/env"], "LoadCredential": ["immich-api-key:/key"]}
    config = ia.parse([], environ | {"IMMICH_API_KEY": "key"})
    assert (config.hosts, config.final_output) == (("http://a", "http://b"), False)
    assert (config.grace, config.immich_api_url) == (2.5, "http://immich/api")
    assert wrong == []


@pytest.mark.parametrize(
    ("settings", "more", "wrong"),
    [
        ('immich-api-url = "http://immich"; modell-name = "a";', "", "modell-name"),
        ('immich-api-url = "http://immich"; dry-run = true;', "", "dry-run"),  # has no variable
        ('immich-api-url = "http://immich"; max_concurrent = 2;', "", "max_concurrent"),
        ('model-name = "a";', "", "immich-api-url"),
        ('postgres-url = "host=/run/postgresql";', "", ""),
        ('model-name = "a";', 'environmentFile = "/env";', ""),
    ],
)
def test_nix_refuses_what_cannot_work(tmp_path, settings, more, wrong):
    messages = nix_module(tmp_path, settings, more)[-1]
    assert len(messages) == bool(wrong)
    assert wrong in "".join(messages)
