"""A phase 2 that failed before it trained: its name is free for the corrected command, which inherits nothing of it."""

import json

import yaml

from qcft.files import read_json


def test_a_corrected_phase2_takes_the_name_and_no_setting_of_the_failed_one(qcft, raw_recipe, color_data, tmp_path):
    raw_recipe["phases"].pop()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": "mine"}))
    code, _, err = qcft("run", "recipe.yaml", "-q")
    assert code == 0, err
    before = {name: (tmp_path / "runs/mine" / name).read_text() for name in ("run.json", "recipe.yaml")}
    command = ["phase2", "mine", "--data", f"es={color_data / 'es.jsonl'}", "--replay", "0.2", "-q"]
    small = ["--set", "phase2.train={batch: 4, max_length: 64, steps: 2}"]
    bad = ["--set", "phase2.replay.max_new_tokens=1", "--set", "merge={warn_below: 1.0, refuse_below: 1.0}"]
    code, _, err = qcft(*command, *small, *bad)
    assert code == 1, err
    assert {name: (tmp_path / "runs/mine" / name).read_text() for name in before} == before
    assert [p.name for p in (tmp_path / "runs").iterdir() if not p.name.startswith(".")] == ["mine"]
    links = [p for p in (tmp_path / "runs/mine").rglob("*") if p.is_symlink()]
    assert links
    assert all(link.exists() for link in links)
    english = ["--set", "phase2.replay.kind=english", "--set", f"phase2.replay.data={color_data / 'en.jsonl'}"]
    code, out, err = qcft(*command, *small, *english, "--json")
    assert code == 0, err
    assert json.loads(out)["run"] == "mine"
    recipe = yaml.safe_load((tmp_path / "runs/mine/recipe.yaml").read_text())
    assert recipe["merge"]["refuse_below"] < 1
    assert recipe["phases"][1]["replay"]["max_new_tokens"] != 1
    assert read_json(tmp_path / "runs/mine/run.json")["stages"]["phase2"]
