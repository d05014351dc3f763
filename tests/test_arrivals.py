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
    """A watch on a folder that is at work; `next` waits until it tells of a preview."""

    def __init__(self, folder, cooldown=60.0):
        self.told = queue.Queue()
        self.watch = ia.PreviewWatch(folder, lambda: self.told.put(True), cooldown)
        self.close = self.watch.close
        self._threads = [t for t in ia.threading.enumerate() if t.name == "watch"]

    def begin(self):
        for thread in self._threads:
            thread.join(servers.PATIENCE)
        return self

    def next(self):
        return self.told.get(timeout=servers.PATIENCE)

    def events(self):
        """How often it told of a preview that nobody waited for."""
        return self.told.qsize()


@pytest.fixture
def watching(folder):
    with closing(Watching(folder).begin()) as watching:
        assert watching.watch.since <= ia.time.monotonic()
        yield watching


def write(file, data=b"picture"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def test_a_preview_in_new_nested_folders_is_told(watching, folder):
    ids = [str(uuid.uuid4()) for _ in range(30)]
    for asset_id in ids:
        write(folder / "owner" / asset_id[:2] / asset_id[2:4] / f"{asset_id}_preview.jpeg")
    assert all(watching.next() for _ in ids)  # each once, as the cooldown is long
    assert watching.events() == 0


def test_a_preview_that_is_moved_in_is_told(watching, folder, tmp_path):
    write(tmp_path / "elsewhere" / f"{ID}-preview.webp")
    shutil.move(tmp_path / "elsewhere", folder / "owner")
    assert watching.next()
    write(folder / "other.tmp")
    (folder / "other.tmp").rename(folder / f"{uuid.uuid4()}-preview.webp")
    assert watching.next()
    assert watching.events() == 0


def test_reading_and_deleting_tell_nothing(folder):
    file = folder / f"{ID}_preview.jpeg"
    write(file)
    with closing(Watching(folder).begin()) as watching:
        file.read_bytes()
        file.chmod(0o600)
        file.unlink()
        write(folder / f"{uuid.uuid4()}_preview.jpeg")
        assert watching.next()
        assert watching.events() == 0


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
        watching.watch.on_any_event(FileCreatedEvent(f"/thumbs/a/b/{name}"))
        watching.watch.on_any_event(FileMovedEvent("/thumbs/x.tmp", f"/thumbs/{name}"))
        assert watching.events() == told


def test_the_events_of_one_preview_are_one_within_the_cooldown(folder, monkeypatch):
    now, other, told = 1000.0, str(uuid.uuid4()), []
    with closing(Watching(folder, cooldown=2.0).begin()) as watching:
        watch = watching.watch
        monkeypatch.setattr(ia.time, "monotonic", lambda: now)
        for now, asset_id in [
            *((1000, ID), (1000.01, ID), (1001, other), (1001.9, ID)),
            *((1002, ID), (1002.5, other), (1003, other), (1003.5, ID)),
        ]:
            before = watching.events()
            watch.on_any_event(FileClosedEvent(f"/{asset_id}_preview.jpeg"))
            told += [now] * (watching.events() - before)
        assert told == [1000, 1001, 1002, 1003]
        now = 5000
        watch.on_any_event(FileClosedEvent(f"/{ID}_preview.jpeg"))
        assert watch._quiet.keys() == {ID}  # what is past is not kept


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
        assert watching.watch.since == float("inf")
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
        assert watching.next()
    assert lines_of(caplog) == [("WARNING", ia.t("watch_limit", folder=folder))]


def test_too_many_watching_programs_are_said(folder, caplog, monkeypatch):
    def refuse():
        inotify_c.ctypes.set_errno(errno.EMFILE)
        return -1

    monkeypatch.setattr(inotify_c, "inotify_init", refuse)
    with closing(Watching(folder).begin()) as watching:
        assert watching.watch.since == float("inf")
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
        assert watching.next()
    assert lines_of(caplog) == []


def test_what_it_missed_is_said_once(watching, caplog):
    caplog.set_level(logging.INFO)
    watching.watch.missed()
    watching.watch.missed()
    assert lines_of(caplog) == [("WARNING", ia.t("watch_missed"))]


def test_a_folder_that_is_taken_away_ends_the_watch_and_nothing_else(watching, folder, caplog):
    shutil.rmtree(folder)
    watching.close()
    assert lines_of(caplog) == []
