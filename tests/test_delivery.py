"""Folders that models are delivered to: found usable before any work, and whole or not there, mount points too."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qcft import InputError
from qcft.files import SEAL, is_whole
from qcft.runner.delivery import INSIDE, check_place, whole_folder

from .helpers.bad_input import listing

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def deliver(to):
    with whole_folder(to) as work:
        for name in FILES:
            (work / name).write_text(name)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """A folder that the system neither removes nor renames onto, as it is a mount point."""
    place = tmp_path / "mounted"
    place.mkdir()
    real = {name: getattr(os, name) for name in ("rmdir", "rename")}

    def busy(name, at):
        def call(*paths, **more):
            if os.fspath(paths[at]) == str(place) and not more:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(place))
            return real[name](*paths, **more)

        return call

    monkeypatch.setattr(os, "rmdir", busy("rmdir", 0))
    monkeypatch.setattr(os, "rename", busy("rename", 1))
    return place


def test_a_new_folder_and_an_empty_one(tmp_path):
    check_place(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "empty").mkdir(mode=0o750)
    for to in (tmp_path / "a" / "b", tmp_path / "empty"):
        deliver(to)
        assert names(to) == sorted(FILES)
    assert names(tmp_path) == ["a", "empty"]
    assert names(tmp_path / "a") == ["b"]


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    check_place(tmp_path / "link")
    deliver(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == sorted(FILES)
    (tmp_path / "nowhere").symlink_to("gone")
    with pytest.raises(InputError, match="a link that leads nowhere"):
        check_place(tmp_path / "nowhere")


def test_a_mount_point_is_filled_file_by_file(mounted):
    (mounted / "lost+found").mkdir()
    check_place(mounted)
    assert names(mounted) == ["lost+found"]
    deliver(mounted)
    assert names(mounted) == sorted([*FILES, SEAL, "lost+found"])
    assert is_whole(mounted)
    with pytest.raises(InputError, match="already exists"):
        check_place(mounted)


def test_a_failed_delivery_leaves_a_mount_point_empty(mounted):
    with pytest.raises(FileNotFoundError), whole_folder(mounted) as work:
        (work / "config.json").write_text((work / "nothing").read_text())
    assert names(mounted) == []


KILLED = """
import errno, os, sys
from pathlib import Path
from qcft.runner import delivery
place, last = Path(sys.argv[1]), sys.argv[2]
rename = os.rename
def killing(source, target, **more):
    if Path(target) == place:  # as of a mount point
        raise OSError(errno.EBUSY, "busy")
    rename(source, target, **more)
    if Path(target) == place / last:
        os.kill(os.getpid(), 9)
os.rename = killing
with delivery.whole_folder(place) as work:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (work / name).write_text(name)
"""


@pytest.mark.parametrize("last", ["model.safetensors", "tokenizer.json"])
def test_a_killed_delivery_to_a_mount_point_is_not_taken_for_complete(tmp_path, last):
    place = tmp_path / "mounted"
    place.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(place), last], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (place / last).exists()
    assert not (place / "config.json").exists()
    assert not (place / SEAL).exists()
    with pytest.raises(InputError, match="holds an interrupted delivery"):
        check_place(place)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
@pytest.mark.parametrize("there", [False, True])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, code, there):
    to = tmp_path / "out"
    if there:
        to.mkdir()
    before, real = listing(tmp_path), os.mkdir

    def refusing(path, *more, **named):
        if Path(path) != tmp_path:
            raise OSError(code, os.strerror(code), os.fspath(path))
        return real(path, *more, **named)

    monkeypatch.setattr(os, "mkdir", refusing)
    with pytest.raises(InputError, match="out' cannot be written") as refused:
        check_place(to)
    monkeypatch.undo()
    assert "--to" in refused.value.hint
    assert listing(tmp_path) == before


def test_a_name_too_long_for_the_disk(tmp_path):
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        check_place(tmp_path / ("x" * 252))  # what is beside it has a longer name
    assert not (tmp_path / INSIDE).exists()
