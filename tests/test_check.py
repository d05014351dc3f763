"""--check: what is in place, what is to be done and how long it will take; nothing is written."""

import json
import re
import signal
import subprocess
from typing import Any

import pytest
import servers
from conftest import Done
from forks import Tool
from servers import FakeKey, FakeOllama, Reply
from worlds import (
    CHATS,
    ApiWorld,
    SqlWorld,
    World,
    asking,
    fill,
    others_long,
    readable_immich,
    shown,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow

OPTIONAL = ("user.read", "asset.statistics", "album.read", "tag.read")
SECRET = "a-secret-of-ours"


@pytest.fixture(params=ia.LANGUAGES)
def check(command: Any, request: Any) -> Any:
    """Runs --check in each language; whatever it prints is well formed."""

    def run(*argv: str, **environ: str) -> Done:
        done = command("--check", *argv, **{"LANG": f"{request.param}_XX.UTF-8", **environ})
        lines = done.stdout.splitlines()
        assert [line for line in lines if not re.match(r"(ok|!!|--|  ) \S", line)] == []
        assert [line for line in lines if len(line) > 80] == []
        assert done.returncode in (0, 2)
        return done

    ia.use_language(request.param)
    return run


def facts(done: Done, mark: str = "") -> list[str]:
    """What is said, each fact on one line again, without its mark."""
    whole = re.sub(r"\n   (?=\S)", " ", done.stdout).splitlines()
    return [line[3:] for line in whole if line.startswith(mark)]


def as_told(text: object) -> str:
    """A message as it comes out of lines."""
    return " ".join(str(text).split())


def allow(library: World, *permissions: str) -> None:
    """Give the key of a library these permissions besides those that a run needs."""
    if isinstance(library, ApiWorld):
        keys = library.server.keys
        keys[library.server.key] = FakeKey("alice", (*servers.MINIMAL, *permissions))


def photos_line(**numbers: Any) -> str:
    """The line about the photos; what is not given is unknown."""
    unknown = dict.fromkeys(("photos", "described", "ours", "left"), ia.t("page_unknown"))
    return ia.t("check_photos", **unknown | numbers)


# --- All is well -------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["en"], indirect=True)
def test_every_generation_is_told_and_nothing_is_written(command, check, any_library, ollama):
    fill(any_library, 4)
    person = any_library.add(picture=servers.own_picture(4), description="By a person.")
    any_library.add(picture=servers.own_picture(5), ready=False)
    any_library.add(picture=servers.own_picture(6), trashed=True)
    allow(any_library, *OPTIONAL)
    model = asking(ollama)
    assert command(*any_library.argv, *model, "--limit", "1").returncode == 0
    before, written = any_library.state(), any_library.writes()
    asked = len(ollama.find(*CHATS))

    done = check(*any_library.argv, *model)
    assert (done.returncode, facts(done, "!!")) == (0, [])
    assert (any_library.state(), any_library.writes()) == (before, written)
    pictures = {servers.own_picture(n) for n in range(7)}
    assert not pictures & {shown(chat) for chat in ollama.find(*CHATS)[asked:]}
    said = facts(done, "ok")
    if isinstance(any_library, ApiWorld):
        version = any_library.server.version
        expected = {"photos": 6} if version >= (1, 135) else {}
        expected |= {"described": 2, "left": 4} if (3, 0) <= version < (3, 2) else {}
        told = ia.t("check_key", number=1, user="alice@example.test")
        assert told.replace(any_library.server.key, "…") in said  # which may be a common word
    else:
        ours = int(any_library.photos._has("asset", "isEdited"))
        expected = {"photos": 6, "described": 2, "ours": ours, "left": 3}
    assert photos_line(**expected) in said
    assert ia.t("check_preview") in said

    assert command(*any_library.argv, *model).returncode == 0  # nothing is in its way
    assert any_library.texts()[person] == "By a person."


@pytest.mark.parametrize("check", ["ru"], indirect=True)
def test_the_release_decides_what_lasts(check, any_library, ollama):
    fill(any_library, 1)
    said = facts(check(*any_library.argv, *asking(ollama)))
    if isinstance(any_library, ApiWorld):
        version, lasts = any_library.server.version, "check_lasts_if_written"
        assert any(".".join(map(str, version)) in fact for fact in said)
    else:
        photos = any_library.photos
        locks, notes = photos._has("exif", "lockedProperties"), photos._has("asset", "isEdited")
        lasts = "check_lasts_database" if notes else "check_lasts" if locks else "check_not_lasting"
        assert (ia.t("check_locks") in said) is locks
        assert (ia.t("check_notes") in said) is notes
    assert said[-1] == as_told(ia.t(lasts))


def test_in_2_4_the_api_keeps_descriptions_also_where_originals_are_read_only(check, ollama):
    with servers.FakeImmich("2.4.1") as server:
        said = facts(check(*ApiWorld(server).argv, *asking(ollama)))
    server.check()
    assert said[-1] == ia.t("check_lasts_xmp")


POLICIES = [
    [],
    ["--favorites"],
    ["--retry-failed"],
    ["--ignore-descriptions", "OLYMPUS*"],
    ["-O", "missing-ai"],
    ["-O", "outdated", "--prompt", "Another one."],
    ["-O", "outdated"],
    ["-O", "all"],
]


@pytest.mark.parametrize("check", others_long(ia.LANGUAGES, "en"), indirect=True)
@pytest.mark.parametrize("argv", POLICIES, ids=" ".join)
def test_as_many_are_left_as_are_described_then(command, check, database, ollama, argv):
    texts = [
        "",
        "  \n",
        "By a person.",
        "OLYMPUS DIGITAL CAMERA",
        "Mine.\n\n[AI]\nA lake.\n[/AI]",
        "",
    ]
    ids = [
        database.add(picture=servers.own_picture(n), description=text, favorite=n % 2 == 0)
        for n, text in enumerate(texts)
    ]
    photos = database.photos
    prompt = ia.parse([], {}).prompt_id
    for id, note in (
        (ids[4], {"text": ia.text_id(texts[4])}),
        (ids[5], {"failed": "answer_empty", "why": "", "tries": 3}),
    ):
        note = {"v": 1, "model": "tiny-vlm", "prompt": prompt, "at": "2026-01-01T00:00:00Z"} | note
        photos.run(
            "INSERT INTO asset_metadata VALUES (%s, 'immich-analyze', %s)", id, json.dumps(note)
        )
    said = facts(check(*database.argv, *asking(ollama), *argv), "ok")
    before = len(database.writes())
    assert command(*database.argv, *asking(ollama), *argv).returncode == 0
    left = len(database.writes()) - before
    number = 3 if "--favorites" in argv else 6
    described, ours = (2, 1) if "--favorites" in argv else (3, 1)
    assert photos_line(photos=number, described=described, ours=ours, left=left) in said
    assert left > 0


def test_it_takes_few_requests_however_large_the_library_is(check, ollama):
    numbers = []
    for many in (30, 3000):
        with readable_immich("3.1.0") as server:
            library = ApiWorld(server)
            server.add_many(many)
            for album in range(many // 30):
                server.add_to_album(next(iter(server.assets.values())), f"Album {album}")
            allow(library, *OPTIONAL)
            done = check(*library.argv, *asking(ollama), "--context", "albums,tags,people")
            assert photos_line(photos=many, described=0, left=many) in facts(done, "ok")
            numbers.append(len(server.find(".*", "")))
            listed = [reply.reply for reply in server.find("POST", "/search/metadata")]
            assert sum(len(one["assets"]["items"]) for one in listed) <= 20
        server.check()
    assert numbers[0] == numbers[1] <= 10


def test_time_left_goes_by_the_places_that_hosts_tell(check, api, llamacpp):
    fill(api, 2)
    argv = [*api.argv, *asking(llamacpp)]
    for places, more in ((4, []), (3, ["--max-concurrent", "3"])):
        said = facts(check(*argv, *more), "ok")
        time = ia.t("check_time", time="…", number=places).partition("…")
        assert any(fact.startswith(time[0]) and fact.endswith(time[2]) for fact in said)
        assert any(ia.t("check_slots", number=4) in fact and "b0-unknown" in fact for fact in said)


def test_time_left_is_what_it_takes_for_all_that_is_left(config):
    told = {
        "library": {
            "photos": 9,
            "described": 5,
            "ours": 1,
            "left": 4000,
            "samples": [],
            "role": "r",
        },
        "hosts": [
            {"url": "a", "trouble": None, "seconds": 4.0, "tells": {"total_slots": 3}},
            {"url": "b", "trouble": None, "seconds": 8.0, "tells": "Hello"},
            {"url": "c", "trouble": ia.Fatal("notes_needed")},
        ],
    }
    told["library"] |= {"notes": True, "locks": True}

    def shown(*argv: str) -> str:
        given = {"t": ia.t, "public": ia.public, "toml": ia.toml, "config": config(*argv)}
        given |= {"fields": [], "env": set(), "hide": lambda _, text: text, "trouble": None}
        return ia.template(ia.data_file("words.jinja", "check.jinja")).render(told | given)

    hours = ia.t("page_hours", hours=1, minutes=40)  # 4,000 of 6 s, four at a time
    assert ia.t("check_time", time=hours, number=4) in shown()
    assert ia.t("check_time", time=ia.t("page_minutes", minutes=5), number=2) in shown(
        "--limit", "100", "--max-concurrent", "2"
    )
    assert ia.t("check_time", time=ia.t("page_minutes", minutes=50), number=4) in shown(
        "--shard", "1/2"
    )
    assert ia.t("check_time", time=ia.t("page_minutes", minutes=3), number=4) in shown(
        "--shard", "1/2", "--limit", "120"
    )
    assert ia.t("check_time", time=ia.t("page_unknown"), number=4) in shown("--undo")


# --- What is to be done ------------------------------------------------------------------------


def test_an_api_key_is_told_what_more_it_could_do(check, api, ollama):
    fill(api, 1)
    allow(api)
    done = check(*api.argv, *asking(ollama))
    gains = ("check_user_read", "check_statistics", "check_albums", "check_tags")
    assert done.returncode == 0
    assert facts(done, "--") == [
        as_told(ia.t("check_lacks", number=1, permission=one, gain=ia.t(gain)))
        for one, gain in zip(OPTIONAL, gains, strict=True)
    ]
    assert photos_line() in facts(done, "ok")
    allow(api, "all")
    assert facts(check(*api.argv, *asking(ollama)), "--") == []
    assert api.server.find("PUT", "") == []  # not even to find out whose the photos are


def test_a_key_that_is_refused_is_told_beside_those_that_work(check, immich, api, ollama):
    fill(api, 1)
    done = check(*api.argv, "--immich-api-keys", "another", *asking(ollama))
    [refused] = facts(done, "!!")
    assert refused.startswith(as_told(ia.t("key_refused", number=2, why="")))
    assert done.returncode == 0


def troubled(library: World, trouble: str) -> tuple[list[str], str]:
    """Bring a library into trouble; the options to reach it, and the message that tells."""
    argv = list(library.argv)
    if trouble == "away":
        if isinstance(library, ApiWorld):
            library.begin("gone")
            return argv, "unreachable"
        return ["--postgres-url", "host=127.0.0.1 port=9", *argv[2:]], "database_down"
    if trouble == "refused":
        if isinstance(library, ApiWorld):
            return [*argv[:3], "another-key"], "immich_key_refused"
        return [*argv[:3], "/nowhere"], "root_wrong"
    if trouble == "right":
        if isinstance(library, ApiWorld):
            library.server.keys[library.server.key] = FakeKey("alice", servers.MINIMAL[:2])
            return argv, "immich_permission_missing"
        uri = library.photos.reading_role("reads", "its secret")
        return ["--postgres-url", uri, *argv[2:]], "grants_missing"
    library.add(picture=b"GIF89a and more of it")
    return argv, "preview_unknown"


def beginning(key: str) -> str:
    """The longest piece of a message that is the same whatever it is about."""
    return max(re.split(r"\{\w+\}", ia.catalogue(ia._language)[key]), key=len).strip()


@pytest.mark.measured
@pytest.mark.parametrize("trouble", ["away", "refused", "right", "preview"])
def test_a_library_that_would_not_work_is_told_at_once(
    check, library, ollama, postgres, monkeypatch, trouble
):
    if trouble == "right" and isinstance(library, SqlWorld) and not postgres.own:
        pytest.skip("roles belong to the whole server")
    argv, key = troubled(library, trouble)
    monkeypatch.delattr(ia, "Patience")  # what waits for a library
    done = check(*argv, *asking(ollama))
    [told] = facts(done, "!!")
    assert as_told(beginning(key)) in told
    assert done.returncode == 2
    assert any(fact.startswith(ollama.url) for fact in facts(done, "ok"))  # hosts are told, too


@pytest.mark.measured
def test_one_photo_with_a_broken_preview_does_not_stand_for_all(check, api, ollama):
    api.add(picture=servers.own_picture(0), taken="2020-01-01 10:00:00")
    api.add(picture=b"GIF89a and more of it", taken="2024-01-01 10:00:00")
    lost = api.add(picture=servers.own_picture(1), taken="2025-01-01 10:00:00")
    api.lose_preview(lost)
    done = check(*api.argv, *asking(ollama))
    assert (facts(done, "!!"), done.returncode) == ([], 0)
    assert ia.t("check_preview") in facts(done, "ok")


@pytest.mark.measured
@pytest.mark.parametrize("table", ["asset_face", "album"])
def test_a_table_that_is_missing_as_while_it_is_restored_is_told(check, database, ollama, table):
    fill(database, 1)
    database.photos.run(f'DROP TABLE "{table}" CASCADE')
    done = check(*database.argv, *asking(ollama), "--context", "people,albums")
    [told] = facts(done, "!!")
    assert as_told(beginning("database_refused")) in told
    assert table in told
    assert done.returncode == 2


def test_a_role_that_may_not_read_the_version_is_enough(check, database, ollama, postgres):
    if not postgres.own:
        pytest.skip("roles belong to the whole server")
    fill(database, 1)
    for more, version in ((), ia.t("page_unknown")), (("version_history",), "3.3.5"):
        uri = database.photos.restricted_role(f"role{len(more)}", "its secret", *more)
        done = check("--postgres-url", uri, *database.argv[2:], *asking(ollama))
        told = ia.t("check_database", version=version, role=f"role{len(more)}")
        assert told in facts(done, "ok")
        assert done.returncode == 0


def test_a_dry_run_is_checked_without_rights_to_write(check, api, ollama):
    fill(api, 1)
    api.server.keys[api.server.key] = FakeKey("alice", servers.MINIMAL[:2])
    done = check(*api.argv, *asking(ollama), "--dry-run")
    assert (done.returncode, facts(done, "!!")) == (0, [])
    assert ia.t("check_dry_run") in facts(done, "--")


HOSTS = {  # what is wrong with a host, and the message that tells
    "away": (FakeOllama, "unreachable"),
    "lacks the model": (lambda: FakeOllama({"another": ("vision",)}), "model_missing"),
    "says that it is blind": (lambda: FakeOllama({"tiny-vlm": ("completion",)}), "model_blind"),
    "is blind": (lambda: FakeOllama(answer=lambda *_: "A photo."), "model_says_the_same"),
    "says nothing": (lambda: FakeOllama(answer=lambda *_: servers.empty()), "answer_empty"),
    "refuses the key": (lambda: FakeOllama(api_key="another"), "host_key_refused"),
}


@pytest.mark.measured
@pytest.mark.parametrize("trouble", HOSTS)
def test_a_host_that_would_not_describe_is_told_and_one_of_two_is_enough(
    check, api, ollama, trouble
):
    fill(api, 1)
    make, key = HOSTS[trouble]
    with make() as sick:
        if trouble == "away":
            sick.close()
        alone = check(*api.argv, *asking(sick))
        [told] = facts(alone, "!!")
        assert as_told(beginning(key)) in told
        assert sick.url in told
        assert alone.returncode == 2

        both = check(*api.argv, *asking(sick, ollama))
        assert (facts(both, "!!"), both.returncode) == ([told], 0)
        assert any(fact.startswith(ollama.url) for fact in facts(both, "ok"))


def test_a_host_need_not_tell_of_itself_soon(hours, command, api, ollama):
    fill(api, 1)
    ollama.script("GET", "/api/version", hours.hang)
    began = hours.now()
    done = command("--check", *api.argv, *asking(ollama))
    assert (done.returncode, facts(done, "!!")) == (0, [])
    assert (hours.now() - began).total_seconds() < 30


def test_a_host_may_tell_a_version_of_any_length(check, api, ollama):
    fill(api, 1)
    ollama.script("GET", "/api/version", Reply(200, {"version": "1" * 5000}), forever=True)
    [said] = [f for f in facts(check(*api.argv, *asking(ollama)), "ok") if f.startswith(ollama.url)]
    assert ia.t("check_version", version="1" * 39 + "…") in said


# --- Settings ----------------------------------------------------------------------------------


def setting(name: str, value: str, source: str) -> str:
    return f"{name} = {value} ({source})"


def test_each_setting_is_told_with_where_it_came_from(check, api, ollama, tmp_path):
    file = tmp_path / "x.conf"
    file.write_text("timeout = 7\nmax-tokens = 99\nfavorites = yes\n")
    (tmp_path / "key").write_text(api.server.key)
    done = check(
        *["--config", str(file), "-O", "all", "-c", "--max-tokens=98", "--shard", "1/2"],
        *["--hosts", ollama.url, "--no-final-output", "--taken-after", "2020-01-01"],
        IMMICH_API_URL=api.server.url,
        IMMICH_API_KEY_FILE=str(tmp_path / "key"),
        IMMICH_ANALYZE_MODEL_NAME="tiny-vlm",
        IMMICH_ANALYZE_FILE_CHECK_INTERVAL="250",
        RUST_LOG="debug",
    )
    flag = ia.t("check_flag")
    expected = [
        setting("--mode", "combined", flag),
        setting("--overwrite-policy", "all", flag),
        setting("--shard", "1/2", flag),
        setting("--taken-after", "2020-01-01 00:00:00+00:00", flag),
        setting("--favorites", "true", str(file)),
        setting("--immich-api-url", f"{api.server.url}/api", "IMMICH_API_URL"),
        setting("--immich-api-keys", "…", "IMMICH_API_KEY_FILE"),
        setting("--hosts", ollama.url, flag),
        setting("--model-name", "tiny-vlm", "IMMICH_ANALYZE_MODEL_NAME"),
        setting("--timeout", "7", str(file)),
        setting("--max-tokens", "98", flag),
        setting("--file-check-interval", "250", "IMMICH_ANALYZE_FILE_CHECK_INTERVAL"),
        setting("--log-level", "debug", "RUST_LOG"),
        setting("--final-output", "false", flag),
    ]
    said = [fact for fact in facts(done) if fact.startswith("--")]
    assert [re.sub(r"\s", "", fact) for fact in said] == [re.sub(r"\s", "", e) for e in expected]


def test_the_database_of_immichs_own_variables_is_told(check, ollama):
    done = check(
        *asking(ollama), DB_HOSTNAME="127.0.0.1", DB_PORT="9", DB_PASSWORD=SECRET, DB_URL=""
    )
    own = "DB_HOSTNAME, DB_PASSWORD, DB_PORT"
    assert setting("--postgres-url", "…", own) in facts(done, "ok")
    assert SECRET not in done.stdout + done.stderr


def test_large_numbers_are_told_as_they_are_typed(check, ollama):
    done = check("--limit", "1234567", *asking(ollama))
    assert setting("--limit", "1234567", ia.t("check_flag")) in facts(done, "ok")


def test_a_long_value_is_cut(check, ollama):
    done = check("--prompt", "Describe\nthis photo. " * 99, *asking(ollama))
    [said] = [fact for fact in facts(done, "ok") if fact.startswith("--prompt")]
    assert said.startswith("--prompt = Describe this photo. Describe")
    assert said.endswith(f"… ({ia.t('check_flag')})")
    assert len(said) == 74


def test_an_address_is_told_in_full_however_long_the_name_of_its_file(check, tmp_path):
    file = tmp_path / f"{'long' * 9}.conf"
    file.write_text("hosts = http://localhost:1, http://127.0.0.1:2\n")
    done = check("--config", str(file))
    assert "ok --hosts = http://localhost:1, http://127.0.0.1:2" in done.stdout


@pytest.mark.measured
def test_no_secret_is_shown_even_if_a_server_repeats_it(check, api, ollama):
    ollama.script(".*", "", Reply(401, {"error": f"no {SECRET}, \x1b[31m {SECRET}"}), forever=True)
    host = ollama.url.replace("://", f"://user:{SECRET}@")
    done = check(*api.argv, *asking(host), "--api-key", SECRET, "--host-header", f"X-Key: {SECRET}")
    assert done.returncode == 2
    assert "no …" in done.stdout
    said = done.stdout + done.stderr
    assert SECRET not in said
    assert "\x1b" not in said
    assert not any(key in said for key in api.server.keys)


# --- Output ------------------------------------------------------------------------------------


def test_it_ends_in_peace_if_nobody_reads_it(api, ollama):
    fill(api, 1)
    argv = ["--check", *api.argv, *asking(ollama)]
    with Tool(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tool:
        tool.stdout.close()
        said = tool.stderr.read()
        assert (tool.wait(servers.PATIENCE), said) == (0, "")


def test_a_signal_ends_it_at_once(api, ollama):
    fill(api, 1)
    ollama.hold(*CHATS)
    with Tool("--check", *api.argv, *asking(ollama), stderr=subprocess.DEVNULL) as tool:
        ollama.wait_for(1)
        tool.send_signal(signal.SIGINT)
        assert tool.wait(ia.parse([], {}).grace / 2) == 128 + signal.SIGINT


def test_its_language_is_that_of_messages(command, api, ollama):
    done = command("--check", *api.argv, *asking(ollama), "--lang", "ru")
    assert ia.catalogue("ru")["check_notes"] in facts(done, "ok")


def test_llamacpp_itself_tells_its_version_and_how_many_at_a_time(
    check, api, real_llamacpp, monkeypatch
):
    monkeypatch.setattr(ia, "CHECK_TIMEOUT", servers.PATIENCE)  # also on a slow machine
    fill(api, 1)
    done = check(*api.argv, *asking(real_llamacpp))
    assert facts(done, "!!") == []
    [said] = [fact for fact in facts(done, "ok") if fact.startswith(real_llamacpp.url)]
    assert done.returncode == 0
    assert re.search(re.escape(ia.t("check_slots", number="N")).replace("N", r"\d+"), said)
