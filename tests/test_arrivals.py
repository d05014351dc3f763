"""The watch on the folder of the previews: real inotify, and what it cannot see."""

import errno
import logging
import queue
import shutil
import uuid
from contextlib import closing

import pytest
import servers
from watchdog.events import FileClosedEvent, FileCreatedEvent, FileMovedEvent
from watchdog.observers import inotify_c

import immich_analyze as ia

ID = "0123abcd-4567-89ef-a123-456789abcdef"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "thumbs"
    folder.mkdir()
    return folder


class Watching:
    """A watch on a folder that is at work; `next` is the id of the next photo it tells of."""

    def __init__(self, folder, cooldown=60.0):
        self.seen = queue.Queue()
        self.arrivals = ia.Arrivals(folder, self.seen.put, cooldown)
        self.close = self.arrivals.close
        self._threads = [t for t in ia.threading.enumerate() if t.name == "watch"]

    def begin(self):
        for thread in self._threads:
            thread.join(servers.PATIENCE)
        return self

    def next(self):
        return self.seen.get(timeout=servers.PATIENCE)


@pytest.fixture
def watching(folder):
    with closing(Watching(folder).begin()) as watching:
        assert watching.arrivals.since <= ia.time.monotonic()
        yield watching


def write(file, data=b"picture"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def test_a_preview_in_new_nested_folders_is_told(watching, folder):
    ids = [str(uuid.uuid4()) for _ in range(30)]
    for asset_id in ids:
        write(folder / "owner" / asset_id[:2] / asset_id[2:4] / f"{asset_id}_preview.jpeg")
    assert {watching.next() for _ in ids} == {*ids}


def test_a_preview_that_is_moved_in_is_told(watching, folder, tmp_path):
    write(tmp_path / "elsewhere" / f"{ID}-preview.webp")
    shutil.move(tmp_path / "elsewhere", folder / "owner")
    assert watching.next() == ID
    other = str(uuid.uuid4())
    write(folder / "other.tmp")
    (folder / "other.tmp").rename(folder / f"{other}-preview.webp")
    assert watching.next() == other


def test_reading_and_deleting_tell_nothing(folder):
    file = folder / f"{ID}_preview.jpeg"
    write(file)
    with closing(Watching(folder).begin()) as watching:
        file.read_bytes()
        file.chmod(0o600)
        file.unlink()
        other = str(uuid.uuid4())
        write(folder / f"{other}_preview.jpeg")
        assert watching.next() == other


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"{ID}_preview.jpeg", True),
        (f"{ID}-preview.jpeg", True),
        (f"{ID}_preview_edited.jpeg", True),
        (f"{ID}_preview.webp", True),
        (f"{ID}-preview.jpg", True),
        (f"{ID}_thumbnail.webp", False),
        (f"{ID}_fullsize.jpeg", False),
        (f"{ID}.jpeg", False),
        (f"{ID}_preview.jpeg.tmp", False),
        (f"x{ID}_preview.jpeg", False),
        (f"{'-' * 36}_preview.jpeg", False),
        (f"{ID.upper()}_preview.jpeg", False),
    ],
)
def test_a_preview_is_known_by_its_name(folder, name, told):
    with closing(Watching(folder).begin()) as watching:
        watching.arrivals.on_any_event(FileCreatedEvent(f"/thumbs/a/b/{name}"))
        watching.arrivals.on_any_event(FileMovedEvent("/thumbs/x.tmp", f"/thumbs/{name}"))
        assert [*watching.seen.queue] == [ID] * told


def test_the_events_of_one_preview_are_one_within_the_cooldown(folder, monkeypatch):
    now = 1000.0
    with closing(Watching(folder, cooldown=2.0).begin()) as watching:
        arrivals = watching.arrivals
        monkeypatch.setattr(ia.time, "monotonic", lambda: now)
        other = str(uuid.uuid4())
        for now, asset_id in [  # noqa: B007 - the clock of the lambda above
            *((1000, ID), (1000.01, ID), (1001, other), (1001.9, ID)),
            *((1002, ID), (1002.5, other), (1003, other), (1003.5, ID)),
        ]:
            arrivals.on_any_event(FileClosedEvent(f"/{asset_id}_preview.jpeg"))
        assert [*watching.seen.queue] == [ID, other, ID, other]
        now = 5000
        arrivals.on_any_event(FileClosedEvent(f"/{ID}_preview.jpeg"))
        assert arrivals._quiet.keys() == {ID}  # what is past is not kept


def lines_of(caplog):
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == ia.log.name]


@pytest.mark.parametrize(
    ("number", "key"), [(errno.ENOSPC, "watch_limit"), (errno.EACCES, "watch_failed")]
)
def test_a_folder_that_cannot_be_watched_is_one_line(folder, caplog, monkeypatch, number, key):
    def refuse(*_):
        inotify_c.ctypes.set_errno(number)
        return -1

    def unreadable(path):
        raise PermissionError(number, "Permission denied", path)

    monkeypatch.setattr(inotify_c, "inotify_add_watch", refuse)
    if number == errno.EACCES:  # about which watchdog says nothing
        monkeypatch.setattr(ia.os, "scandir", unreadable)
    with closing(Watching(folder).begin()) as watching:
        assert watching.arrivals.since == float("inf")
    [(level, line)] = lines_of(caplog)
    why = {errno.EACCES: "Permission denied", errno.ENOSPC: ""}[number]
    assert (level, line) == ("WARNING", ia.t(key, folder=folder, why=why))
    assert ("fs.inotify.max_user_watches" in line) is (number == errno.ENOSPC)


def test_too_many_folders_are_said_though_some_are_watched(folder, caplog, monkeypatch):
    for n in range(20):
        (folder / str(n)).mkdir()
    really, left = inotify_c.inotify_add_watch, iter(range(10))

    def limited(fd, path, mask):
        if next(left, None) is None:
            inotify_c.ctypes.set_errno(errno.ENOSPC)
            return -1
        return really(fd, path, mask)

    monkeypatch.setattr(inotify_c, "inotify_add_watch", limited)
    with closing(Watching(folder).begin()) as watching:
        write(folder / f"{ID}_preview.jpeg")
        assert watching.next() == ID
    assert lines_of(caplog) == [("WARNING", ia.t("watch_limit", folder=folder))]


def test_too_many_watching_programs_are_said(folder, caplog, monkeypatch):
    def refuse():
        inotify_c.ctypes.set_errno(errno.EMFILE)
        return -1

    monkeypatch.setattr(inotify_c, "inotify_init", refuse)
    with closing(Watching(folder).begin()) as watching:
        assert watching.arrivals.since == float("inf")
    [(_, line)] = lines_of(caplog)
    assert "fs.inotify.max_user_instances" in line


def test_a_parent_that_may_not_be_watched_is_no_trouble(folder, caplog, monkeypatch):
    really = inotify_c.inotify_add_watch

    def picky(fd, path, mask):
        if path == bytes(folder.parent):
            inotify_c.ctypes.set_errno(errno.EACCES)
            return -1
        return really(fd, path, mask)

    monkeypatch.setattr(inotify_c, "inotify_add_watch", picky)
    with closing(Watching(folder).begin()) as watching:
        write(folder / f"{ID}_preview.jpeg")
        assert watching.next() == ID
    assert lines_of(caplog) == []


def test_what_it_missed_is_said_once(watching, caplog):
    caplog.set_level(logging.INFO)
    watching.arrivals.missed()
    watching.arrivals.missed()
    assert lines_of(caplog) == [("WARNING", ia.t("watch_missed"))]


def test_a_folder_that_is_taken_away_ends_the_watch_and_nothing_else(watching, folder, caplog):
    shutil.rmtree(folder)
    watching.close()
    assert lines_of(caplog) == []
