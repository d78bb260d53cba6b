"""Folders and users that are out of the ordinary: brackets in every path, no home folder."""

import json
import os
import pwd
import shutil
from pathlib import Path

import pytest
import yaml

from qcft import InputError
from qcft.cache import cache_folder, ensure_home
from qcft.measure.local import check_local

from .helpers.tiny import make_recipe

ODD = "a [b] [/] [bold]"  # a pattern to glob, and markup to Rich


def test_every_path_may_hold_brackets(qcft, tmp_path, tiny_model, color_data):
    place = tmp_path / ODD
    place.mkdir(parents=True)
    shutil.copytree(tiny_model, place / "model [m]")
    shutil.copytree(color_data, place / "data [d]")
    raw = make_recipe(place / "model [m]", place / "data [d]")
    raw["phases"] = raw["phases"][:1]
    (place / "recipe [r].yaml").write_text(yaml.safe_dump(raw))
    runs = place / "runs [x]"
    where = ("--runs", str(runs))

    def ok(*arguments):
        code, out, err = qcft(*arguments)
        assert code == 0, err
        return out, err

    ok("check", place / "recipe [r].yaml", *where)
    _, err = ok("run", place / "recipe [r].yaml", *where)
    assert f"report: {runs / 'tiny' / 'report' / 'report.html'}" in err
    assert json.loads(ok("ls", *where, "--json")[0])[0]["state"] == "done"
    assert json.loads(ok("ls", *where, "--json")[0])[0]["model"] == str(place / "model [m]")
    assert "[m]" in ok("ls", *where)[0]
    ok("show", *where)
    assert ok("report", *where)[0].strip().endswith(str(runs / "tiny" / "report" / "report.html"))
    ok("phase2", "tiny", "--data", f"es={place / 'data [d]' / 'es.jsonl'}", "--take", "12", *where, "--dry-run")
    ok("phase1", "folder", "--model", place / "model [m]", "--data", place / "data [d]", *where, "--dry-run")
    assert ok("export", "--to", place / "out [o]", *where)[0].strip() == str(place / "out [o]")
    assert (place / "out [o]" / "config.json").is_file()
    ok("drift", *where, "--rows", "2")
    ok("layers", "tiny", *where)
    shutil.rmtree(runs / "tiny" / "report")
    ok("rm", "tiny", *where)
    ok("gc", "--delete", *where)
    assert not [p for p in (runs / ".steps").iterdir() if not p.name.startswith(".")]


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No HOME, and a user whom the system does not know; temporary files go to `tmp_path`."""

    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "USER", "QCFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"qcft-home-{os.getuid()}"


def test_without_a_home_folder_caches_go_to_one_of_the_users_own(homeless, qcft):
    assert qcft("ls")[0] == 0
    assert cache_folder() == homeless / ".cache" / "qcft"
    assert homeless.stat().st_mode & 0o777 == 0o700
    ensure_home()  # and so every time


@pytest.mark.parametrize("planted", ["a folder of all", "a link", "a file"])
def test_a_home_that_others_may_write_is_not_used(homeless, qcft, planted, tmp_path):
    if planted == "a folder of all":
        homeless.mkdir()
        homeless.chmod(0o777)
    elif planted == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        homeless.symlink_to("theirs")
    else:
        homeless.write_text("")
    code, out, err = qcft("ls")
    assert (code, out) == (2, "")
    assert "other users can access" in err
    assert "set HOME" in err
    assert "HOME" not in os.environ


def test_the_home_of_nobody_is_a_path_like_any_other():
    with pytest.raises(InputError, match="there is no file '~nobody-here/x'"):
        check_local("task", "~nobody-here/x")
    assert Path("~nobody-here").exists() is False
