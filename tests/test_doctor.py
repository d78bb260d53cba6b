"""qcft doctor: what it tries, and its exit code."""

import json

from qcft.pipeline import doctor


def test_doctor_tries_everything(qcft):
    code, out, _ = qcft("doctor", "--json")
    found = {one["name"]: one for one in json.loads(out)}
    assert code == 0
    assert set(found) == {"Python", "packages", "GPU", "16 bits", "bitsandbytes", "runs folder", "cache", "model hub"}
    assert found["bitsandbytes"]["ok"]
    assert "transformers" in found["packages"]["found"]
    hub = found["model hub"]  # offline in tests, which is no error
    assert not hub["ok"]
    assert not hub["needed"]
    assert hub["mend"]


def test_a_wrong_product_is_broken(qcft, monkeypatch):
    import bitsandbytes as bnb

    right = bnb.matmul_4bit
    monkeypatch.setattr(bnb, "matmul_4bit", lambda *a, **k: 2 * right(*a, **k))
    code, out, _ = qcft("doctor")
    assert code == 1
    assert "BROKEN" in out
    assert "install --force-reinstall bitsandbytes" in " ".join(out.split())


def test_an_import_that_fails_is_told(monkeypatch):
    import bitsandbytes as bnb

    def broken(*arguments, **options):
        raise RuntimeError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", broken)
    found = doctor._four_bits()
    assert not found.ok
    assert "libcudart" in found.found


def test_a_runs_folder_that_cannot_be_written(qcft, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, _ = qcft("doctor", "--runs", tmp_path / "file" / "runs", "--json")
    found = next(one for one in json.loads(out) if one["name"] == "runs folder")
    assert code == 1
    assert found["needed"]
    assert not found["ok"]


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "package_versions", lambda: {"qcft": "1"})
    found = doctor._packages()
    assert not found.ok
    assert "torch" in found.found
