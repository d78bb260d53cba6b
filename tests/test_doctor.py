"""qcft doctor: what it tries, and its exit code."""

import json
import sys

from qcft.check import doctor


def finding(name, runs):
    return next(one for one in doctor.examine(runs) if one.name == name)


def test_doctor_tries_everything(qcft):
    code, out, _ = qcft("doctor", "--json")
    found = {one["name"]: one for one in json.loads(out)}
    assert code == 0
    assert set(found) == {
        "Python", "packages", "GPU", "fused head", "16 bits", "bitsandbytes", "runs folder", "cache", "model hub",
    }  # fmt: skip
    assert found["bitsandbytes"]["ok"]
    assert "transformers" in found["packages"]["found"]
    hub = found["model hub"]  # offline in tests, which is not an error
    assert not hub["ok"]
    assert not hub["needed"]
    assert hub["mend"] == "unset HF_HUB_OFFLINE"


def test_a_wrong_product_is_broken(qcft, monkeypatch):
    import bitsandbytes as bnb

    right = bnb.matmul_4bit
    monkeypatch.setattr(bnb, "matmul_4bit", lambda *a, **k: 2 * right(*a, **k))
    code, out, _ = qcft("doctor")
    assert code == 1
    assert "BROKEN" in out
    assert out.splitlines()[-2].startswith("to fix bitsandbytes: ")
    assert "-m pip install --force-reinstall --no-deps 'bitsandbytes<0.51,>=" in out.splitlines()[-2]
    assert out.splitlines()[-1] == "to fix model hub: unset HF_HUB_OFFLINE"


def test_an_import_that_fails_is_reported(monkeypatch, tmp_path):
    import bitsandbytes as bnb

    def broken(*arguments, **options):
        raise RuntimeError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", broken)
    found = finding("bitsandbytes", tmp_path)
    assert not found.ok
    assert "libcudart" in found.found


def test_a_runs_folder_that_cannot_be_written(qcft, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, _ = qcft("doctor", "--runs", tmp_path / "file" / "runs", "--json")
    found = next(one for one in json.loads(out) if one["name"] == "runs folder")
    assert code == 1
    assert found["needed"]
    assert not found["ok"]


def test_a_package_that_is_missing_or_too_old(monkeypatch, tmp_path):
    there = {"qcft": "1", **doctor.package_versions(), "torch": "2.4.1"}
    del there["peft"]
    monkeypatch.setattr(doctor, "package_versions", lambda: there)
    found = finding("packages", tmp_path)
    assert not found.ok
    assert found.found.startswith("missing: peft; torch must be <")
    assert "install 'peft<0.22,>=" in found.mend
    assert "'torch<" in found.mend
    assert "trl" not in found.mend


def test_what_cannot_be_imported_is_reported_and_the_rest_is_tried(qcft, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, out, _ = qcft("doctor", "--json")
    found = {one["name"]: one for one in json.loads(out)}
    assert code == 1
    assert {name for name, one in found.items() if not one["ok"]} == {
        "GPU",
        "fused head",
        "16 bits",
        "bitsandbytes",
        "model hub",
    }
    assert "torch" in found["GPU"]["found"]
    assert "pip install" in found["GPU"]["mend"]
