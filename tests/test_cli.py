"""The command line as a person, cron or a service meets it: exit codes, signals, output."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from typing import Any, Self

import psycopg2.extensions
import pytest
import sandbox
import servers
from forks import Tool
from servers import FakeKey, FakeLlamaCpp, FakeOllama, FakeServer, Reply
from worlds import (
    BUSY,
    CHATS,
    ROOT,
    ApiWorld,
    Running,
    SqlWorld,
    asking,
    check_note,
    failure,
    fill,
    mainly,
    others_long,
    tally,
)

import immich_analyze as ia

pytestmark = pytest.mark.slow

SECRET = "Zx9-s3cret"
NOWHERE = "http://127.0.0.1:9"  # nothing listens at the port for what is to be thrown away
API = ["--immich-api-url", NOWHERE, "--immich-api-keys", SECRET]


class Terminal:
    """The real command line on a terminal of its own, where a person may press Ctrl-C."""

    def __init__(self, *argv: str, columns: int = 100, begin: Any = Tool, **environ: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self.process = begin(*argv, environ=environ, start_new_session=True, **streams)
        os.close(theirs)
        self._columns = columns
        self.shown = ""

    def press_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def read_until(self, text: str = "\0") -> None:
        """Read on until this is shown, or to the end."""
        with suppress(OSError):  # how Linux says that the terminal's other side is closed
            while text not in self.shown and (some := os.read(self._ours, 2**16)):
                self.shown += some.decode()

    def end(self) -> int:
        """Its exit code; then `shown` is all that was shown."""
        self.read_until()
        return self.process.wait(servers.PATIENCE)

    def rows(self) -> list[str]:
        """What is on the screen."""
        rows, column = [""], 0
        for character in self.shown:
            if character == "\r":
                column = 0
            elif character == "\n" or column == self._columns:
                rows, column = [*rows, ""], 0
            if character not in "\r\n":
                rows[-1] = rows[-1][:column].ljust(column) + character + rows[-1][column + 1 :]
                column += 1
        return [row.rstrip() for row in rows]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()
        os.close(self._ours)


def on_terminal(*argv: str, **more: Any) -> tuple[int, str]:
    """Run the command line on a terminal to its end; its exit code, and all that was shown."""
    with Terminal(*argv, **more) as terminal:
        return terminal.end(), terminal.shown


# --- Exit codes and what is said -------------------------------------------------------------


@pytest.mark.measured
def test_what_was_done_is_told_also_when_the_run_cannot_go_on(api, ollama, command):
    fill(api, 1)
    assert command(*api.argv, *asking(ollama)).returncode == 0
    fill(api, 2)
    gone = Reply(404, {"error": "model 'tiny-vlm' not found"})
    ollama.script(*CHATS, gone, forever=True)
    done = command(*api.argv, *asking(ollama))
    assert done.returncode == 2
    why, last = done.stderr.splitlines()
    assert "tiny-vlm" in why
    assert last.startswith(tally(skipped=1))


def test_the_work_goes_on_when_nobody_reads_the_messages(api, ollama):
    wanted = fill(api, 3)
    for _ in range(6):  # more than there are workers, and newer: they come first
        api.add(picture=b"not a picture at all")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        argv = [sys.executable, str(ROOT / "immich_analyze.py"), *api.argv, *asking(ollama)]
        argv += ["--max-concurrent", "1"]
        done = subprocess.run(argv, stderr=writing, stdin=subprocess.DEVNULL)
    finally:
        os.close(writing)
    assert done.returncode in (1, 120)  # 120: Python could not flush standard error
    assert {id: api.texts()[id] for id in wanted} == wanted


def test_cron_hears_of_failures_and_of_nothing_else(library, ollama, command):
    fill(library, 2)
    argv = [*library.argv, *asking(ollama)]
    well = command(*argv)
    assert (well.returncode, well.stdout, well.stderr) == (0, "", "")
    id = library.add("bad.jpg", picture=b"not a picture at all")
    ill = command(*argv)
    assert (ill.returncode, ill.stdout) == (1, "")
    line, last = ill.stderr.splitlines()
    assert line == failure(id, "bad.jpg", "preview_unknown")
    skipped = 2 if isinstance(library, ApiWorld) else 0
    assert last.startswith(tally(failed=1, skipped=skipped))


@pytest.mark.parametrize(
    ("more", "environ", "lines"),
    [
        ([], {}, 2),
        (["--no-final-output"], {}, 1),
        ([], {"IMMICH_ANALYZE_NO_FINAL_OUTPUT": "true"}, 1),
        (["--log-level", "error"], {}, 1),
        ([], {"RUST_LOG": "immich_analyze=error"}, 1),
    ],
)
def test_how_much_is_said_of_a_failure(api, ollama, command, more, environ, lines):
    api.add(picture=b"not a picture at all")
    done = command(*api.argv, *asking(ollama), *more, **environ)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, lines)


@pytest.mark.parametrize(
    ("more", "environ"),
    [
        (["--log-level", "info"], {}),
        ([], {"IMMICH_ANALYZE_LOG_LEVEL": "info"}),
        ([], {"RUST_LOG": "info"}),
    ],
)
def test_the_tally_can_be_asked_for(api, ollama, command, more, environ):
    fill(api, 2)
    done = command(*api.argv, *asking(ollama), *more, **environ)
    [line] = done.stderr.splitlines()
    assert line.startswith(tally(described=2))


@mainly("api")
def test_a_terminal_shows_progress_and_the_tally(library, ollama):
    if isinstance(library, ApiWorld):
        library.server.keys[library.server.key] = FakeKey("alice", servers.EVERYTHING)
    fill(library, 6)
    for n in range(20):
        library.add(picture=servers.own_picture(n), description="By a person.")
    code, shown = on_terminal(*library.argv, *asking(ollama))
    assert code == 0
    step = r" ([1-6])/6 \d\d:\d\d, \d+/h, 0 failed"
    steps = [found[1] for found in re.finditer(step, shown)]
    assert steps[-1] == "6"
    assert steps == sorted(steps)
    skipped = 20 if isinstance(library, ApiWorld) else 0
    assert shown.splitlines()[-1].lstrip().startswith(tally(described=6, skipped=skipped))


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("columns", "end"),
    others_long(
        [(n, end) for n in (100, 40, 20) for end in ("in time", "pressed twice", "too late")],
        *((100, "too late"), (40, "pressed twice"), (20, "in time")),
    ),
)
def test_nothing_is_left_of_the_bar_after_ctrl_c(api, ollama, columns, end):
    api.server.keys[api.server.key] = FakeKey("alice", servers.EVERYTHING)
    fill(api, 3)
    ollama.hold(*CHATS)
    grace = ["--grace", "0.5" if end == "too late" else "600"]
    with Terminal(*api.argv, *asking(ollama), *grace, columns=columns) as terminal:
        ollama.wait_for(3)
        terminal.read_until("/3")
        terminal.press_ctrl_c()
        terminal.read_until(stopping(signal.SIGINT) + "\r\n")
        if end == "in time":
            ollama.gate.set()
        elif end == "pressed twice":
            terminal.press_ctrl_c()
        assert terminal.end() == 128 + signal.SIGINT
    said = [stopping(signal.SIGINT), tally(described=3 if end == "in time" else 0)]
    told = squeezed("".join(said[:1] if end == "pressed twice" else said))
    after = "" if end == "pressed twice" else r"In[0-9:]+\."
    assert re.fullmatch(re.escape(told) + after, squeezed("".join(terminal.rows())))
    assert terminal.rows()[-1] == ""  # where the shell goes on
    assert "^C" in terminal.shown  # it was there


class Seconds:
    """In place of the event that ends a progress bar: second after second, until it is over."""

    def __init__(self, clock: Any, *photos: Any) -> None:
        self._clock, self._left = clock, [*photos]

    def wait(self, seconds: float) -> bool:
        self._clock.now += seconds
        self._left.pop(0)()
        return not self._left


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def bars(monkeypatch, tally, seconds, columns, clock):
    """What a progress bar shows on a terminal so wide, one line a second."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with open(theirs, "w") as terminal, open(ours, "rb"), monkeypatch.context() as patch:
        patch.setattr("tqdm.std.time", clock)
        patch.setattr(sys, "stderr", terminal)
        ia.show_progress(tally, seconds)
        terminal.write("END")
        terminal.flush()
        shown = bytearray()
        while not shown.endswith(b"END"):
            shown += os.read(ours, 2**16)
    _, *lines, last = re.split("\r+", shown.decode().removesuffix("END").strip("\r"))
    assert last.strip() == ""  # nothing is left
    return lines


def test_the_bar_is_renewed_each_second_and_does_not_tire(monkeypatch):
    """A model that takes four seconds a photo; sixty photos and ten that are left alone."""
    tally, clock = ia.Tally(), Clock()
    tally.total = 70
    tally.add(ia.Outcome.SKIPPED, number=10)
    nothing, photo = (lambda: None), (lambda: tally.add(ia.Outcome.DESCRIBED))
    seconds = Seconds(clock, *[nothing, nothing, nothing, photo] * 15)
    lines = bars(monkeypatch, tally, seconds, 100, clock)
    told = [re.search(r"(\d+)/60 (.*), (.*), (.*)", line.rstrip()).groups() for line in lines]
    assert [int(done) for done, *_ in told] == [n // 4 for n in range(1, 61)]
    assert told[-1] == ("15", "03:00", "900/h", "0 failed")


def test_the_bar_tells_how_many_photos_failed(monkeypatch):
    tally, clock = ia.Tally(), Clock()
    tally.total = 10
    tally.add(ia.Outcome.DESCRIBED, number=3)
    tally.add(ia.Outcome.FAILED, "not_json", number=2)
    [line] = bars(monkeypatch, tally, Seconds(clock, lambda: None), 40, clock)
    assert re.search(r" 5/10 00:01, 18000/h, 2 failed *$", line)


@pytest.mark.parametrize("places", [1, 4])
def test_a_photo_counts_when_it_is_written_and_not_when_it_is_read_back(hours, api, ollama, places):
    fill(api, 60)
    hours.pace(ollama, seconds=4.0)
    with hours.service(api, ollama, "--max-concurrent", str(places)) as run:
        for now in (11, 21, 41):
            run.until(now)
            assert run.counts == {"described": len(hours.written(api))}
            assert len(hours.written(api)) >= places * (now // 4 - 1)


@pytest.mark.parametrize("language", ia.LANGUAGES)
@pytest.mark.parametrize(
    ("described", "total", "seconds"),
    [(0, 5, 1), (3, 5, 1), (1, 400, 125), (12_345, 40_000, 59_000), (99_999, 100_000, 360_000)],
)
def test_the_bar_fits_forty_columns(monkeypatch, language, described, total, seconds):
    ia.use_language(language)
    tally, clock = ia.Tally(), Clock()
    tally.total = total
    tally.add(ia.Outcome.DESCRIBED, number=described)

    def later() -> None:
        clock.now += seconds - 1

    [line] = bars(monkeypatch, tally, Seconds(clock, later), 40, clock)
    assert len(line) <= 40
    assert f"{described}/{total}" in line
    hourly = f"{3600 * described / seconds:.0f}"
    assert line.rstrip().endswith(ia.t("pace", rate=hourly, failed=0))


@pytest.mark.parametrize("total", [None, 0, 2])
def test_the_bar_counts_on_where_no_end_is_known(monkeypatch, total):
    """Or where more came than there were."""
    tally, clock = ia.Tally(), Clock()
    tally.total = total
    tally.add(ia.Outcome.DESCRIBED, number=3)
    for columns in (100, 40):
        [line] = bars(monkeypatch, tally, Seconds(clock, lambda: None), columns, clock)
        assert re.fullmatch(r"3 photos \[00:01, 10800/h, 0 failed\] *", line)
        assert len(line) <= columns


@pytest.mark.measured
@pytest.mark.parametrize("language", ia.LANGUAGES)
@pytest.mark.parametrize("form", ["tally", "tally_undo", "tally_undo_dry_run", "tally_dry_run"])
def test_the_sum_fits_eighty_columns(command, monkeypatch, language, form):
    ia.use_language(language)
    tally = ia.Tally()
    tally.form = form
    numbers = {"described": 123_456, "undone": 123_456, "skipped": 654_321, "not_ready": 1_234}
    for name, number in (numbers | {"failed": 1_234}).items():
        tally.add(ia.Outcome(name), "failed_before", number)
    tally.began -= 45_296
    said = []
    monkeypatch.setattr(ia.log, "isEnabledFor", lambda _: True)
    monkeypatch.setattr(ia.log, "handle", lambda record: said.append(record.getMessage()))
    ia.sum_up(ia.parse([], {}), tally, 0)
    assert len(said) == 2
    assert "12:34:56" in said[-1]
    assert max(map(len, said)) <= 80


def test_taking_back_is_progress_too(api, ollama, command):
    fill(api, 3)
    assert command(*api.argv, *asking(ollama)).returncode == 0
    code, shown = on_terminal(*api.argv, *asking(ollama), "--undo")
    assert code == 0
    assert re.search(r"\b3 photos \[\d\d:\d\d, ", shown)


def test_a_terminal_without_a_total_shows_progress_all_the_same(api, ollama):
    fill(api, 3)
    code, shown = on_terminal(*api.argv, *asking(ollama))
    assert code == 0
    assert re.search(r"\b3 photos \[\d\d:\d\d, ", shown)


def test_a_failure_on_a_terminal_is_a_line_of_its_own(api, ollama):
    fill(api, 3)
    id = api.add("bad.jpg", picture=b"not a picture at all")
    code, shown = on_terminal(*api.argv, *asking(ollama), "--no-final-output")
    assert code == 1
    lines = [line.rpartition("\r")[2].strip() for line in shown.split("\r\n")]
    assert lines.count(failure(id, "bad.jpg", "preview_unknown")) == 1
    assert tally(described=3, failed=1) not in shown


@pytest.mark.measured
def test_settings_for_both_libraries_mean_the_database_and_one_line(database, api, ollama):
    wanted = fill(database, 1)
    fill(api, 1)
    code, shown = on_terminal(*database.argv, *api.argv, *asking(ollama))
    assert (code, database.texts()) == (0, wanted)
    assert shown.count(ia.t("both_given")) == 1
    assert api.server.exchanges == []


SHARED = {"DB_HOSTNAME": "127.0.0.1", "DB_PORT": "9", "DB_USERNAME": "u", "DB_PASSWORD": SECRET}


def test_immichs_own_shared_variables_do_not_take_the_api_away(api, ollama, command):
    wanted = fill(api, 2)
    given = {"IMMICH_API_URL": api.server.url, "IMMICH_API_KEY": api.server.key}
    code, shown = on_terminal(*asking(ollama), **SHARED, **given)
    assert (code, api.texts()) == (0, wanted)
    assert shown.count(ia.t("both_given_api")) == 1
    done = command(*asking(ollama), **SHARED, **given)
    assert (done.returncode, done.stderr) == (0, "")
    done = command(*asking(ollama), "-d", "database", "--no-wait-for-immich", **SHARED, **given)
    assert_refused(done, "127.0.0.1", "refused")


def test_odd_settings_are_a_line_each_and_the_work_is_done(api, ollama, command):
    wanted = fill(api, 1)
    odd = {"IMMICH_ANALYZE_HOST": SECRET, "IMMICH_ANALYZE_MODE_": SECRET, "LANG": "C.UTF-8"}
    done = command(*api.argv, *asking(ollama), "--lang", "de", **odd)
    assert (done.returncode, api.texts()) == (0, wanted)
    variables, language = done.stderr.splitlines()
    assert "IMMICH_ANALYZE_HOST (IMMICH_ANALYZE_HOSTS?)" in variables
    assert "IMMICH_ANALYZE_MODE_ (IMMICH_ANALYZE_MODE?)" in variables
    assert language == ia.t("unknown_language", value="de")
    assert SECRET not in done.stderr


def test_a_prompt_that_is_not_utf8_is_sent_with_no_photo(api, ollama, process):
    fill(api, 2)
    prompt = os.fsdecode("Опиши снимок".encode("cp1251"))
    for argv, environ in ((["--prompt", prompt], {}), ([], {"IMMICH_ANALYZE_PROMPT": prompt})):
        assert_refused(process(*api.argv, *asking(ollama), *argv, **environ), "--prompt", "UTF-8")
    assert ollama.exchanges == api.server.exchanges == []


def test_what_the_last_run_gave_up_is_said_in_the_next_also_under_cron(library, ollama, command):
    library.add("bad.jpg", picture=b"not a picture at all")
    for n in range(3):
        library.add(picture=servers.own_picture(n))
        assert command(*library.argv, *asking(ollama)).returncode == 1
    for more in ([], ["--log-level", "warning"]):
        done = command(*library.argv, *asking(ollama), *more)
        [line] = done.stderr.splitlines()
        assert done.returncode == 0
        assert ia.t("tally_failed_before", number=1) in line
    quiet = command(*library.argv, *asking(ollama), "--log-level", "error")
    assert (quiet.returncode, quiet.stderr) == (0, "")


@pytest.mark.parametrize("variable", ["IMMICH_ANALYZE_IMMICH_HEADER", "IMMICH_ANALYZE_HOST_HEADER"])
def test_a_header_that_a_server_repeats_is_in_no_line(api, ollama, command, variable):
    fill(api, 1)
    refusal = Reply(
        403, {"message": f"permission: {SECRET}-{SECRET}", "error": f"{SECRET}-{SECRET}"}
    )
    for server in (api.server, ollama):
        server.script(".*", "", refusal, forever=True)
    given = {variable: f"X-Short: status\nX-Long: {SECRET}-{SECRET}"}
    argv = api.argv if "IMMICH_H" in variable else ["--no-preflight-model-check", *api.argv]
    done = command(*argv, *asking(ollama), "--log-level", "debug", "--no-wait-for-immich", **given)
    assert done.returncode == 2
    assert SECRET not in done.stderr
    assert done.stderr


def test_no_model_host_is_asked_before_the_first_photo_if_that_is_not_wanted(api, ollama, command):
    wanted = fill(api, 1)
    done = command(*api.argv, *asking(ollama), "--no-preflight-model-check")
    assert (done.returncode, api.texts()) == (0, wanted)
    assert [(x.method, x.path) for x in ollama.exchanges] == [("POST", "/api/chat")]


CLOSED = ("2>&-", ">&- 2>&-", "<&- >&- 2>&-")


@pytest.mark.parametrize(
    ("how", "closed"),
    others_long(
        [(how, closed) for how in ("well", "failing", "wrong") for closed in CLOSED],
        *zip(("wrong", "failing", "well"), CLOSED, strict=True),
    ),
)
def test_closed_streams_do_no_harm(api, ollama, closed, how):
    wanted = fill(api, 2)
    if how == "failing":
        api.add("bad.jpg", picture=b"not a picture at all")
    argv = [*api.argv, *asking(ollama), *(["--nonsense"] if how == "wrong" else [])]
    run = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, str(ROOT / "immich_analyze.py")]
    done = subprocess.run([*run, *argv], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == ({"well": 0, "failing": 1, "wrong": 2}[how], b"")
    if how != "wrong":
        assert {id: api.texts()[id] for id in wanted} == wanted


def test_a_name_cannot_steer_the_terminal(api, ollama, command):
    name = "\x1b[2J\x07\x9b31mevil\r\n.jpg"
    id = api.add(name, picture=b"not a picture at all")
    argv = [*api.argv, *asking(ollama)]
    code, shown = on_terminal(*argv)
    assert code == 1
    assert not re.search(r"\x1b\[2J|\x07|\x9b", shown)
    line, _ = command(*argv, "--retry-failed").stderr.splitlines()
    assert line.isprintable()
    assert id in line


def test_one_refused_key_of_two_is_told_and_the_other_works(api, ollama, command):
    wanted = fill(api, 2)
    argv = ["--immich-api-url", api.server.url, "--immich-api-keys", f"{SECRET},{api.server.key}"]
    done = command(*argv, *asking(ollama))
    assert (done.returncode, api.texts()) == (1, wanted)
    why = ia.t("immich_key_refused", why="Invalid API key")
    assert done.stderr.splitlines()[0] == ia.t("key_refused", number=1, why=why)


@mainly("database")
def test_python_has_nothing_to_warn_of(library, ollama, process):
    fill(library, 3)
    done = process(*library.argv, *asking(ollama), PYTHONWARNINGS="error", PYTHONDEVMODE="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


PROGRESS_ALONE = """
import multiprocessing, sys
multiprocessing.set_start_method("forkserver")  # as it is from Python 3.14 on
import immich_analyze
code = immich_analyze.main()
assert "multiprocessing.resource_tracker" not in sys.modules
sys.exit(code)
"""


def progress_alone(*argv: str, environ: Any, **how: Any) -> subprocess.Popen[bytes]:
    path = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRESS_ALONE, *argv]
    return subprocess.Popen(command, env=os.environ | path | environ, **how)


def test_the_bar_starts_no_process_beside_it(api, ollama):
    fill(api, 2)
    code, shown = on_terminal(*api.argv, *asking(ollama), begin=progress_alone)
    assert (code, "Error" in shown) == (0, False)
    assert "/h, 0 failed" in shown


# --- Help, version, languages ----------------------------------------------------------------


def test_the_version_is_told(process, command):
    done = process("--version")
    assert command("-V").stdout == done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"immich-analyze {ia.__version__}\n"


@pytest.mark.measured
@pytest.mark.parametrize(("argv", "code"), [("--help", 0), ("--version", 0), ("--mode=none", 2)])
def test_the_exit_code_is_the_same_if_nobody_reads(argv, code):
    for unread, other in (("stdout", "stderr"), ("stderr", "stdout")):
        with Tool(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tool:
            getattr(tool, unread).close()
            said = getattr(tool, other).read()
            assert tool.wait(servers.PATIENCE) == code
        assert "Broken pipe" not in said


@pytest.mark.parametrize(
    ("argv", "environ", "language"),
    [
        (["-h"], {}, "en"),
        (["--help"], {"LANG": "de_DE.UTF-8"}, "en"),
        (["-h"], {"LANG": "ru_RU.UTF-8"}, "ru"),
        (["-h", "--lang", "ru"], {}, "ru"),
        (["--lang=en", "-h"], {"LANG": "ru_RU.UTF-8"}, "en"),
    ],
)
def test_help_is_in_the_language_of_its_reader(command, argv, environ, language):
    done = command(*argv, **environ)
    assert (done.returncode, done.stderr) == (0, "")
    shown = " ".join(done.stdout.split())
    assert ia.catalogue(language)["help_description"] in shown
    assert ia.catalogue(language)["help_group_work"] in shown


@pytest.mark.parametrize(
    ("encoding", "language"),
    others_long(
        [("koi8-r", "ru"), ("cp1251", "ru"), ("latin-1", "en"), ("ascii", "en"), ("utf-8", "ru")],
        *(("koi8-r", "ru"), ("latin-1", "en")),
    ),
)
def test_help_is_readable_in_a_locale_of_another_encoding(tmp_path, encoding, language):
    argv = [sys.executable, str(ROOT / "immich_analyze.py"), "--help", "--lang", "ru"]
    environ = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(argv, env=environ, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = " ".join(done.stdout.decode(encoding).split())
    assert ia.catalogue(language)["help_description"] in shown
    assert shown.count("?") < 40


@pytest.mark.parametrize(
    ("more", "environ"),
    others_long(
        [(["--lang", "ru"], {}), ([], {"LANG": "ru_RU.UTF-8"})], ([], {"LANG": "ru_RU.UTF-8"})
    ),
)
def test_the_tally_is_in_the_language_of_its_reader(api, ollama, more, environ):
    fill(api, 1)
    code, shown = on_terminal(*api.argv, *asking(ollama), *more, **environ)
    ia.use_language("ru")
    assert code == 0
    assert tally(described=1) in shown
    assert ia.t("photos") in shown


# --- Waiting for Immich ----------------------------------------------------------------------

PATIENT = ["--log-level", "info", "--wait-retry-interval", "0.02"]


@mainly("api")
def test_a_run_begins_once_immich_is_there(library, ollama):
    wanted = fill(library, 2)
    library.begin("gone")
    with Running(*library.argv, *asking(ollama), *PATIENT) as tool:
        try:
            tool.wait_for(ia.t("waiting", why=""))
        finally:
            library.end("gone")
        assert tool.end() == 0
    assert tool.said[1].startswith(ia.t("back", time="")[:-1])
    assert tool.said[2].startswith(tally(described=2))
    assert len(tool.said) == 3
    assert library.texts() == wanted


# --- Signals ---------------------------------------------------------------------------------

NO_HURRY = ["--grace", "600"]  # what does not end by itself is not ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stopping(number: signal.Signals) -> str:
    return ia.t("finishing", signal=number.name)


@pytest.mark.parametrize(
    ("library", "number"),
    others_long(
        [(one, number) for one in ("api", "database") for number in SIGNALS],
        *(("api", signal.SIGINT), ("database", signal.SIGTERM)),
    ),
    indirect=["library"],
)
def test_a_signal_lets_finish_what_is_begun_and_nothing_else_begin(library, ollama, number):
    wanted = fill(library, 6)
    ollama.hold(*CHATS)
    with Running(*library.argv, *asking(ollama), "--max-concurrent", "2", *NO_HURRY) as tool:
        ollama.wait_for(2)
        tool.process.send_signal(number)
        tool.wait_for(stopping(number))
        ollama.gate.set()
        assert tool.end() == 128 + number
    assert tool.said == [stopping(number)]
    assert ollama.count(*CHATS) == 2
    written = dict(library.writes())
    assert len(written) == 2
    assert library.texts() == dict.fromkeys(wanted, "") | {id: wanted[id] for id in written}
    notes = library.notes()
    assert {id for id, note in notes.items() if note} == written.keys()
    for id in written:
        check_note(notes[id], wanted[id])


@pytest.mark.measured
@pytest.mark.parametrize("second", others_long(SIGNALS, signal.SIGTERM))
def test_a_second_signal_ends_at_once(api, ollama, second):
    first = signal.SIGINT
    fill(api, 6)
    ollama.hold(*CHATS)
    with Running(*api.argv, *asking(ollama), *NO_HURRY) as tool:
        ollama.wait_for(4)
        tool.process.send_signal(first)
        tool.wait_for(stopping(first))
        tool.process.send_signal(second)
        assert tool.end() == 128 + second
    assert tool.said == [stopping(first)]
    assert api.writes() == []


@pytest.mark.parametrize("number", others_long(SIGNALS, signal.SIGTERM))
def test_after_the_grace_it_ends_by_itself(api, ollama, number):
    fill(api, 2)
    ollama.hold(*CHATS)
    with Running(*api.argv, *asking(ollama), "--grace", "2") as tool:
        ollama.wait_for(2)
        tool.process.send_signal(number)
        assert tool.end() == 128 + number
    first, last = tool.said
    assert first == stopping(number)
    assert last.startswith(tally())
    assert api.writes() == []


def test_after_the_grace_it_ends_though_nobody_reads_what_it_says(api, ollama):
    fill(api, 2)
    ollama.hold(*CHATS)
    reading, writing = os.pipe()
    with Tool(*api.argv, *asking(ollama), "--grace", "0.1", stderr=writing) as process:
        try:
            ollama.wait_for(2)
            os.set_blocking(writing, False)
            with suppress(BlockingIOError):
                while os.write(writing, bytes(2**12)):  # the pipe is full
                    pass
            os.set_blocking(writing, True)
            process.terminate()
            assert process.wait(servers.PATIENCE) == 128 + signal.SIGTERM
        finally:
            process.kill()
            os.close(reading)
            os.close(writing)


def test_waiting_ends_with_a_signal(ollama):
    with Running(*API, *asking(ollama), *PATIENT, *NO_HURRY) as tool:
        tool.wait_for(ia.t("waiting", why=""))
        tool.process.send_signal(signal.SIGTERM)
        assert tool.end() == 128 + signal.SIGTERM
    assert len(tool.said) == 2


@pytest.mark.measured
def test_a_signal_during_the_first_check_begins_nothing(api, ollama):
    fill(api, 2)
    ollama.hold("POST", "/api/show")
    with Running(*api.argv, *asking(ollama), *NO_HURRY) as tool:
        ollama.wait_for()
        tool.process.send_signal(signal.SIGTERM)
        tool.wait_for(stopping(signal.SIGTERM))
        ollama.gate.set()
        assert tool.end() == 128 + signal.SIGTERM
    assert ollama.count(*CHATS) == 0


@pytest.mark.measured
def test_who_waits_for_a_resting_host_hears_a_signal(api, ollama):
    fill(api, 6)
    ollama.script(*CHATS, BUSY, forever=True)
    with Running(*api.argv, *asking(ollama), *NO_HURRY) as tool:
        tool.wait_for(ollama.url)
        tool.process.send_signal(signal.SIGTERM)
        assert tool.end() == 128 + signal.SIGTERM
    assert tool.said[1:] == [stopping(signal.SIGTERM)]
    assert api.writes() == []


@mainly("database")
def test_killed_while_the_model_thinks_nothing_is_written(library, ollama, command):
    wanted = fill(library, 6)
    ollama.hold(*CHATS)
    with Running(*library.argv, *asking(ollama)) as tool:
        ollama.wait_for(4)
        tool.process.kill()
        assert tool.end() == -signal.SIGKILL
    assert library.writes() == []
    ollama.gate.set()
    done = command(*library.argv, *asking(ollama))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(library.writes()) == sorted(wanted.items())


def test_killed_while_it_writes_nothing_is_half_and_the_next_run_does_the_rest(
    api, ollama, command
):
    api.server.keys[api.server.key] = FakeKey("alice", [*servers.MINIMAL, "user.read"])
    wanted = fill(api, 6)
    api.server.hold("PUT", "/assets/[0-9a-f-]{36}$")
    with Running(*api.argv, *asking(ollama), "--max-concurrent", "1") as tool:
        api.server.wait_for(2)  # all its workers
        tool.process.kill()
        assert tool.end() == -signal.SIGKILL
    api.server.close()
    api.server.start()
    assert set(api.texts().values()) == {""}
    done = command(*api.argv, *asking(ollama))
    assert (done.returncode, done.stderr) == (0, "")
    assert api.texts() == wanted
    assert ollama.count(*CHATS) == 2 + 6


# --- Bad input -------------------------------------------------------------------------------


CURIOUS = [*PATIENT, "--wait-timeout", "2"]  # who waits in vain says so, which is a second line


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One line that says all of this and no secret; exit code 2."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert line.isprintable()
    assert SECRET not in line
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--max-concurrent", "0"], ["--max-concurrent", "0"]),
        (["--timeout", "nan"], ["--timeout", "nan"]),
        (["--interface", "\x1b[2J\nxx"], ["--interface", "xx"]),
        (["--mode", "sometimes"], ["--mode", "sometimes", "batch"]),
        (["-m", "-c"], ["--combined", "--monitor"]),
        (["--hosts", f"http://me:{SECRET}@[host"], ["--hosts"]),
        (["--hosts", f"http://me:{SECRET}@host:port"], ["--hosts", "host:port"]),
        (["--immich-api-url", NOWHERE], ["IMMICH_API_KEY"]),
        (["--immich-api-keys", SECRET], ["IMMICH_API_URL"]),
        (["--api-key", f"{SECRET} {SECRET}"], ["--api-key"]),
        (["--api-key-file", "missing"], ["missing"]),
        (["--postgres-url", f"postgresql://immich:{SECRET}@[::1/immich"], ["--postgres-url"]),
        (["--postgres-url", f"host=db password='{SECRET}"], ["--postgres-url"]),
        (["--postgres-url", f"postgresql://immich:half@{SECRET}@db/immich"], ["--postgres-url"]),
        (["--config", "missing.conf"], ["missing.conf"]),
        ([f"--no-such-option={SECRET}", SECRET], ["--no-such-option"]),
        ([SECRET], ["-h"]),
    ],
)
def test_a_wrong_setting_is_one_line(command, argv, parts):
    assert_refused(command(*argv, "--no-wait-for-immich"), *parts)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("MAX_CONCURRENT", "many", "--max-concurrent"),
        ("MODE", "now and then", "now and then"),
        ("HEALTH_PORT", "65536", "65536"),
        ("WAIT_FOR_IMMICH", "perhaps", "WAIT_FOR_IMMICH"),
        ("NO_FINAL_OUTPUT", "perhaps", "FINAL_OUTPUT"),
        ("HOSTS", f"http://me:{SECRET}@", "--hosts"),
    ],
)
def test_a_wrong_variable_is_one_line(command, name, value, part):
    done = command("--wait-timeout", "1", **{f"IMMICH_ANALYZE_{name}": value})
    assert_refused(done, part)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (f"api-key = {SECRET}\nmax-concurrent = none\n".encode(), ["--max-concurrent", "none"]),
        (f"api-kez = {SECRET}\n".encode(), ["api-kez"]),
        (f"{SECRET}\n".encode(), []),
        (f"{SECRET} = \xff".encode("latin-1"), ["my.conf"]),
    ],
)
def test_a_wrong_file_is_one_line(command, tmp_path, content, parts):
    file = tmp_path / "my.conf"
    file.write_bytes(content)
    assert_refused(command("--config", str(file), "--no-wait-for-immich"), *parts)


def test_the_process_ends_as_the_command_does(process):
    assert_refused(process("--max-concurrent", "0"), "--max-concurrent", "0")


@pytest.fixture
def website() -> Any:
    """Some web server that is neither Immich nor a model host."""
    with FakeServer() as server:
        yield server


def test_without_waiting_an_absent_immich_is_one_line(command, ollama):
    done = command(*API, *asking(ollama), *CURIOUS, "--no-wait-for-immich")
    assert_refused(done, NOWHERE)


def test_when_the_wait_is_over_an_absent_immich_is_one_line(command, ollama):
    argv = ["--wait-timeout", "0.2", "--wait-retry-interval", "2"]
    assert_refused(command(*API, *asking(ollama), *argv), NOWHERE)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(404, "<html>Not here</html>"),
        Reply(200, "<html>Welcome</html>"),
        Reply(200, {"version": "3.1.0"}),
        Reply(200, [1, 2, 3]),
        Reply(301, None, {"Location": f"https://me:{SECRET}@example.org/?token={SECRET}"}),
    ],
)
def test_an_address_that_is_not_immichs_is_one_line(command, website, ollama, reply):
    website.script("GET", "", reply, forever=True)
    argv = ["--immich-api-url", website.url, "--immich-api-keys", SECRET]
    assert_refused(command(*argv, *asking(ollama), *CURIOUS), website.url)


def test_a_wrong_protocol_is_one_line(command, website, ollama):
    url = website.url.replace("http:", "https:")
    argv = ["--immich-api-url", url, "--immich-api-keys", SECRET]
    assert_refused(command(*argv, *asking(ollama), *CURIOUS), url)


def test_a_wrong_key_is_one_line(command, immich, ollama):
    argv = ["--immich-api-url", immich.url, "--immich-api-keys", SECRET]
    assert_refused(command(*argv, *asking(ollama), *CURIOUS), "Invalid API key")


@pytest.mark.parametrize("missing", servers.MINIMAL)
def test_a_missing_permission_is_named(command, immich, ollama, missing):
    others = [permission for permission in servers.MINIMAL if permission != missing]
    immich.keys = {SECRET: FakeKey("alice", others)}
    argv = ["--immich-api-url", immich.url, "--immich-api-keys", SECRET]
    assert_refused(command(*argv, *asking(ollama), *CURIOUS), missing)


def changed(library: SqlWorld, **parts: str) -> list[str]:
    """The options for a library, with other words in the database's address."""
    known = psycopg2.extensions.parse_dsn(library.photos.uri) | {"password": SECRET}
    known |= parts
    return ["--postgres-url", sandbox.libpq_uri(known), "--immich-root", str(library.photos.root)]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"dbname": "nowhere"}, ["nowhere"]),
        ({"user": "nobody-known"}, ["nobody-known"]),
        ({"dbname": "postgres"}, ["Immich"]),
        ({"sslmode": "perhaps"}, ["sslmode", "perhaps"]),
    ],
)
def test_a_wrong_database_is_one_line(command, database, ollama, parts, said):
    assert_refused(command(*changed(database, **parts), *asking(ollama), *CURIOUS), *said)


def test_without_waiting_an_absent_database_is_one_line(command, database, ollama):
    argv = changed(database, host="127.0.0.1", port="9")
    done = command(*argv, *asking(ollama), *CURIOUS, "--no-wait-for-immich")
    assert_refused(done, "127.0.0.1", "refused")


@pytest.mark.skipif(not sandbox.Postgres().own, reason="the server's address is given")
def test_a_database_that_does_not_let_one_in_is_one_line(command, ollama):
    with sandbox.Postgres(tcp=True) as server:
        uri = server.uri("postgres", "postgres", SECRET)
        wrong = command("--postgres-url", uri, *asking(ollama), *CURIOUS)
        plain = command("--postgres-url", f"{uri}?sslmode=require", *asking(ollama), *CURIOUS)
    assert_refused(wrong, "password authentication failed")
    assert_refused(plain, "SSL")


def test_a_missing_grant_is_named(command, database, ollama):
    uri = database.photos.restricted_role("reader", SECRET)
    database.photos.run('REVOKE UPDATE ("description") ON {exif} FROM reader')
    argv = ["--postgres-url", uri, "--immich-root", str(database.photos.root)]
    done = command(*argv, *asking(ollama), *CURIOUS)
    assert_refused(done, f"UPDATE (description) ON {database.photos.tables['exif']}")


@pytest.mark.parametrize("kind", ["missing", "a file", "without thumbs", "of another library"])
def test_a_wrong_root_is_one_line(command, database, ollama, tmp_path, kind):
    root = tmp_path / "root"
    if kind == "a file":
        root.write_text("")
    elif kind == "without thumbs":
        (root / "upload").mkdir(parents=True)
    elif kind == "of another library":
        (root / "thumbs").mkdir(parents=True)
        fill(database, 1)
    argv = ["--postgres-url", database.photos.uri, "--immich-root", str(root)]
    assert_refused(command(*argv, *asking(ollama), *CURIOUS), str(root), "--immich-root")


@pytest.mark.measured
@pytest.mark.parametrize("given", ["{name}", "./{name}", "../{folder}/{name}"])
def test_a_root_that_is_not_absolute_is_resolved_with_a_line(
    command, database, ollama, tmp_path, given
):
    wanted, root = fill(database, 2), database.photos.root
    assert root.parent == tmp_path  # where the command runs
    relative = given.format(name=root.name, folder=tmp_path.name)
    argv = ["--postgres-url", database.photos.uri, "--immich-root", relative]
    done = command(*argv, *asking(ollama))
    assert (done.returncode, database.texts()) == (0, wanted)
    assert done.stderr == ia.t("root_relative", root=tmp_path / relative) + "\n"


def test_a_missing_model_is_one_line(command, api, ollama):
    ollama.models = {"another": ("completion", "vision")}
    assert_refused(command(*api.argv, *asking(ollama), *CURIOUS), ollama.url, "tiny-vlm")


@pytest.mark.measured
def test_a_model_that_is_not_listed_is_one_line_and_the_first_photo_decides(command, api, llamacpp):
    llamacpp.models = ["first", "tiny-vlm-2"]
    api.add(picture=servers.picture())
    done = command(*api.argv, *asking(llamacpp), *CURIOUS)
    said, *_, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert "these are: first, tiny-vlm-2; the nearest name is tiny-vlm-2. The first" in said
    assert "does not have the model (model not found)" in last


def test_a_blind_model_is_one_line(command, api, ollama, llamacpp):
    ollama.models = {"tiny-vlm": ("completion",)}
    assert_refused(command(*api.argv, *asking(ollama), *CURIOUS), ollama.url)
    llamacpp.vision = False
    assert_refused(command(*api.argv, *asking(llamacpp), *CURIOUS), llamacpp.url, "--mmproj")


@pytest.mark.parametrize("make", [FakeOllama, FakeLlamaCpp])
def test_a_wrong_key_of_the_model_host_is_one_line(command, api, make):
    with make(api_key="right") as host:
        done = command(*api.argv, *asking(host), "--api-key", SECRET, *CURIOUS)
        assert_refused(done, host.url, "--api-key")


@pytest.mark.parametrize("interface", ["ollama", "llamacpp"])
def test_a_host_of_no_known_interface_is_one_line(command, api, website, interface):
    argv = ["--hosts", website.url, "--interface", interface]
    assert_refused(command(*api.argv, *argv, *CURIOUS), website.url, "--interface")


def test_absent_hosts_are_one_line(command, api):
    where = NOWHERE.replace("//", f"//me:{SECRET}@")
    done = command(*api.argv, *asking(where, "http://127.0.0.1:19"), *CURIOUS)
    assert_refused(done, NOWHERE, "http://127.0.0.1:19")
