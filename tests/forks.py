"""The command line in processes of its own, at a fraction of what a new interpreter costs.

Most of that cost is to import what others wrote. So one process does it once for each that runs
tests, and its forks run `immich_analyze.py` from the first line to the end of their interpreter,
with arguments, an environment, a folder, streams and a terminal of their own. It is not shown
what an interpreter itself does by its environment or streams before the first line: a test of
this begins `sys.executable`.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

TOOL = Path(__file__).parent.parent / "immich_analyze.py"
IMPORTED = (
    *("concurrent.futures.thread", "configargparse", "coverage", "difflib", "html", "http.server"),
    *("jinja2.sandbox", "PIL.GifImagePlugin", "PIL.ImageChops", "PIL.ImageOps", "PIL.ImageStat"),
    *("PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.PpmImagePlugin", "psycopg2.errors"),
    *("requests", "tomllib", "tqdm", "watchdog.observers", "zipfile"),
)
MEASURE = "COVERAGE_PROCESS_CONFIG"
LARGEST = 2**20  # bytes of a request


class Tool(subprocess.Popen[str]):
    """`immich_analyze.py` with these arguments, as `Popen` runs programs.

    A session of its own has the terminal that is its standard input.
    """

    def __init__(self, *argv: str, environ: Mapping[str, str] | None = None, **how: Any) -> None:
        super().__init__(argv, env=os.environ | (environ or {}), text=True, **how)

    def _execute_child(self, args, *more: Any) -> None:
        """Stands in for the part of `Popen` that forks and executes a program."""
        cwd, env, pipes, session = more[4], more[5], more[9:15], more[-2]
        streams = [fd if fd >= 0 else own for own, fd in enumerate((pipes[0], pipes[3], pipes[5]))]
        request = {"argv": args, "env": env, "cwd": str(cwd or Path.cwd()), "session": session}
        with adopting():
            self.pid = kept().fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """A process whose parent ends is a child of ours from then on; see prctl(2)."""
    prctl = functools.partial(ctypes.CDLL(None).prctl, 36)  # PR_SET_CHILD_SUBREAPER
    prctl(1)
    yield
    prctl(0)


class Kept:
    """The process that has imported all; it ends with ours."""

    def __init__(self) -> None:
        environ = {name: value for name, value in os.environ.items() if name != MEASURE}
        self._connection, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            command = [sys.executable, __file__]
            self._process = subprocess.Popen(command, stdin=its, env=environ)

    def fork(self, request: Mapping[str, Any], streams: list[int]) -> int:
        """Begin the command line with these standard streams; its number."""
        socket.send_fds(self._connection, [json.dumps(request).encode()], streams)
        return int(self._connection.recv(LARGEST))


kept = functools.cache(Kept)


def serve(connection: socket.socket, code: CodeType) -> None:
    """Fork for each request; the fork's parent ends, and whoever asked adopts it."""
    while True:
        request, streams, *_ = socket.recv_fds(connection, LARGEST, 3)
        if not request:
            return None
        reading, writing = os.pipe()
        if not (between := os.fork()):
            if tool := os.fork():
                os.write(writing, b"%d" % tool)
                os._exit(0)
            for fd in (connection.detach(), reading, writing):
                os.close(fd)
            return run(code, streams, **json.loads(request))
        os.waitpid(between, 0)
        connection.send(os.read(reading, LARGEST))
        for fd in (reading, writing, *streams):
            os.close(fd)


def run(
    code: CodeType, streams: list[int], argv: list[str], env: Mapping, cwd: str, session: bool
) -> None:
    """Be the command line."""
    for own, fd in enumerate(streams):
        os.dup2(fd, own)
        os.close(fd)
    if session:
        os.login_tty(0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    lines = 1 if os.isatty(1) else -1
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", lines, errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.argv = [str(TOOL), *argv]
    sys.modules["__main__"] = ModuleType("__main__")
    sys.modules["__main__"].__file__ = str(TOOL)
    importlib.import_module("coverage").process_startup()  # only if it is to be measured
    exec(code, vars(sys.modules["__main__"]))


if __name__ == "__main__":
    sys.path[0] = str(TOOL.parent)
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module(TOOL.stem).patterns()  # `re` keeps what it compiles
    del sys.modules[TOOL.stem]
    program = compile(TOOL.read_bytes(), TOOL, "exec", dont_inherit=True)
    gc.freeze()  # a fork that collects garbage would copy all of it
    serve(socket.socket(fileno=os.dup(0)), program)
