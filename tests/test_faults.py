"""What goes wrong while a run is worked on: files damaged on disk, losses that diverge, folders moved, odd places."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qcft import InputError, QcftError, api
from qcft.data.encode import Encoder
from qcft.data.rows import Message, Row
from qcft.events import Note, Progress, StepBegun, Watch
from qcft.files import read_json, read_sealed
from qcft.layers import adapted_modules
from qcft.models.adapters import add_lora
from qcft.models.load import load_model
from qcft.recipe import Lora, Model, load_recipe, parse_freeze
from qcft.store import Store
from qcft.store.runs import read_run
from qcft.training.batches import make_batches
from qcft.training.sft import train_adapter

from .helpers.namespaces import skip_without_namespaces
from .helpers.runs import GENERATIVE, results
from .helpers.tiny import make_llama
from .helpers.training import TRAIN, adapter_of, same, train

ROOT = Path(__file__).parents[1]
RARE = "animal"  # a word that only the poisoned row has


def recipe_at(folder, raw, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**raw, **changes}))
    return folder / "recipe.yaml"


@pytest.fixture
def raw(raw_recipe):
    raw_recipe["phases"][1]["replay"] = GENERATIVE
    raw_recipe["phases"][0]["train"]["epochs"] = 6
    raw_recipe["merge"] = {"refuse_below": None}
    return raw_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A place where the module's run is made once."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def runs(made, raw):
    """A finished run, to copy and to damage."""
    if not (made / "runs").exists():
        api.run_watched(load_recipe(recipe_at(made, raw)), made / "runs", Watch())
    return made / "runs"


def go(recipe_file, runs):
    events = []
    done = api.run_watched(load_recipe(recipe_file), runs, Watch(events.append))
    warnings = [e.text for e in events if isinstance(e, Note) and e.level == "warning"]
    return done, warnings, {e.title for e in events if isinstance(e, StepBegun) and e.state != "reused"}


def flip(file, where=0.5):
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * where)] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGED = {
    "phase1": ("adapter/adapter_model.safetensors", "train phase1"),
    "merged": ("model/model.safetensors", "merge phase1"),
    "replay": ("replay.jsonl", "generate replay for phase2"),
    "eval/phase2": ("scores.json", "measure phase2"),
    "phase2": ("done.json", "train phase2"),
}


@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_files_are_named_and_rebuilt(raw, made, runs, tmp_path, damage):
    """All at once: each step is found by its digests, named, and rebuilt as it was."""
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    stages = read_json(copy / "tiny" / "run.json")["stages"]
    for stage, (name, _) in DAMAGED.items():
        damage(copy / ".steps" / stages[stage] / name)
    _, warnings, begun = go(made / "recipe.yaml", copy)
    assert begun == {title for _, title in DAMAGED.values()}
    for stage, (name, _) in DAMAGED.items():
        assert any(stages[stage] in text and name in text and "rebuilt" in text for text in warnings), stage
    assert results(copy) == results(runs)


def test_any_flipped_bit_of_done_json_is_found(made, runs, tmp_path):
    step = next((runs / ".steps").glob("kept-*"))
    whole = (step / "done.json").read_bytes()
    (tmp_path / ".steps" / step.name).mkdir(parents=True)
    place = tmp_path / ".steps" / step.name / "done.json"
    place.write_bytes(whole)
    same, key = read_sealed(place), whole.index(b'"seal"')
    assert same is not None
    for i in range(0, len(whole), 7):
        place.write_bytes(whole[:i] + bytes([whole[i] ^ 2]) + whole[i + 1 :])
        record = read_sealed(place)
        # The key of the seal itself, or a last digit that is beyond a float's precision.
        assert record is None or key <= i < key + 6 or record == same, whole[max(0, i - 20) : i + 20]


def test_a_sealed_object_without_its_seal_is_accepted(made, runs, tmp_path):
    """As an older version wrote it."""
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    for done in copy.glob(".steps/*/done.json"):
        record = read_json(done)
        record.pop("seal")
        record.pop("layout")
        done.write_text(json.dumps(record))
    for begun in copy.glob(".steps/*/step.json"):
        record = read_json(begun)
        record.pop("seal")
        record.pop("layout")
        begun.write_text(json.dumps(record))
    _, warnings, begun = go(made / "recipe.yaml", copy)
    assert (warnings, begun) == ([], set())


def test_what_a_newer_version_wrote_is_refused_in_words(made, runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    done = next(copy.glob(".steps/train-*/done.json"))
    record = read_json(done)
    record.pop("seal")
    done.write_text(json.dumps(record | {"layout": 9}))
    with pytest.raises(InputError, match=r"train-.* was written by a newer qcft \(layout 9") as refused:
        go(made / "recipe.yaml", copy)
    assert "update qcft" in refused.value.hint
    run = copy / "tiny" / "run.json"
    run.write_text(json.dumps(read_json(run) | {"version": 2}))
    with pytest.raises(InputError, match="the run 'tiny' was written by a newer qcft"):
        read_run(copy, "tiny")


def test_a_recipe_of_another_version_is_refused_in_words_and_hides_no_other_run(made, runs, qcft, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    other = shutil.copytree(copy / "tiny", copy / "old", symlinks=True)
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text + "sparkle: 1\n")
    with pytest.raises(InputError, match="the run 'old': recipe: unknown key 'sparkle'"):
        read_run(copy, "old").recipe()
    code, out, _ = qcft("ls", "--runs", copy)
    assert code == 0
    assert "unknown key 'sparkle'" in out
    assert "en > es, pt" in out
    (other / "recipe.yaml").unlink()
    code, _, err = qcft("show", "old", "--runs", copy)
    assert code == 2
    assert "no readable recipe.yaml" in err


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny_model, tmp_path, stopped, damage, name):
    step = shutil.copytree(stopped, tmp_path / "step")
    damage(step / "checkpoints" / "checkpoint-8" / name)
    events = []
    trained, _ = train(tiny_model, step, Watch(events.append))
    assert trained.resumed_from == 6
    assert "checkpoint-8 is altered" in next(e.text for e in events if isinstance(e, Note))
    assert same(adapter_of(step), adapter_of(stopped.parent / "whole"))


@pytest.fixture(scope="module")
def stopped(tiny_model, tmp_path_factory):
    """A training that was stopped at step 8; beside it `whole`, one that was not."""
    place = tmp_path_factory.mktemp("stopped")
    train(tiny_model, place / "whole")
    watch = Watch(lambda event: watch.ask_to_stop() if isinstance(event, Progress) and event.done == 7 else None)
    with pytest.raises(QcftError):
        train(tiny_model, place / "step", watch)
    assert sorted(p.name for p in (place / "step" / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    return place / "step"


def poisoned(folder, tiny_tokenizer, weight, value):
    """A model in which one word's embedding, or its row of the head, is not what it should be."""
    from safetensors.torch import save_file

    make_llama(folder, tiny_tokenizer, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    (word,) = tiny_tokenizer.encode(f" {RARE}", add_special_tokens=False)
    weights[weight][word] *= value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def train_poisoned(folder, step, tokenizer, events, **changes):
    """24 rows, of which the one whose id is r13 has the rare word; trained in the order they come, 4 a step."""
    words = [RARE if i == 13 else "cat" for i in range(24)]
    rows = [
        Row((Message("user", f"what {word} {i}"),), (Message("assistant", "red dog"),), f"r{i}")
        for i, word in enumerate(words)
    ]
    encoded = [
        replace(tokens, source="rows.jsonl", name=row.name)
        for row, tokens in zip(rows, Encoder(tokenizer).encode_all(rows).encoded, strict=True)
    ]
    settings = TRAIN.model_copy(update={"epochs": 1, "packing": False, "checkpoint_steps": 1, **changes})
    batches = make_batches(encoded, lambda _: list(range(24)), settings)
    model = load_model(folder, Model(name="tiny"))
    torch.manual_seed(0)
    adapted = add_lora(model, adapted_modules(model, "all-linear", parse_freeze("none"), 0), Lora(r=4))
    step.mkdir(exist_ok=True)
    return train_adapter(adapted, tokenizer, batches, settings, 0, step, Watch(events.append), "training")


def test_a_loss_that_is_not_finite_names_step_and_rows_and_keeps_the_last_good_checkpoint(tokenizer, tmp_path):
    folder, step = poisoned(tmp_path / "model", tokenizer, "model.embed_tokens.weight", float("nan")), tmp_path / "step"
    for attempt in range(2):  # the second resumes from the checkpoint, and says the same instead of looping
        events = []
        with pytest.raises(QcftError) as stopped:
            train_poisoned(folder, step, tokenizer, events)
        assert stopped.value.message == (
            "the loss is nan at step 4 of 6, on 4 rows (rows.jsonl: 'r12', 'r13', 'r14', 'r15')"
        )
        assert "lower train.lr" in stopped.value.hint
        assert stopped.value.exit_code == 1
        assert [e.done for e in events if isinstance(e, Progress)] == ([1, 2, 3] if not attempt else [])
        assert sorted(p.name for p in (step / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
        kept = load_file(step / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert not (step / "adapter").exists()


@pytest.mark.parametrize("value", [1e7, float("inf")])
def test_gradients_that_explode_stop_the_training(tokenizer, tmp_path, value):
    folder = poisoned(tmp_path / "model", tokenizer, "lm_head.weight", value)
    with pytest.raises(QcftError, match=r"(the gradients explode: their norm is|the loss is nan).* at step 1 of 6"):
        train_poisoned(folder, tmp_path / "step", tokenizer, [])
    assert not list((tmp_path / "step").glob("checkpoints/*"))


def test_with_the_clock_set_back_the_newest_checkpoints_are_kept(tiny_model, tmp_path, stopped):
    """By their steps, whatever their dates."""
    step = shutil.copytree(stopped, tmp_path / "step")
    tomorrow = time.time() + 86400
    for path in step.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    watch = Watch(lambda event: watch.ask_to_stop() if isinstance(event, Progress) and event.done == 13 else None)
    with pytest.raises(QcftError):
        train(tiny_model, step, watch)
    assert sorted(p.name for p in (step / "checkpoints").iterdir()) == ["checkpoint-12", "checkpoint-14"]
    train(tiny_model, step)
    assert same(adapter_of(step), adapter_of(stopped.parent / "whole"))


def test_a_kill_just_before_a_training_is_marked_done_costs_no_training(tiny_model, tmp_path, stopped):
    """The checkpoints go only once the step is done."""
    store = Store(tmp_path)
    with store.claim("train-x", {}, Watch()) as folder:
        shutil.copytree(stopped, folder, dirs_exist_ok=True)
        trained, _ = train(tiny_model, folder)
        assert trained.resumed_from == 8
        assert (folder / "checkpoints" / "checkpoint-18").is_dir()
        again, _ = train(tiny_model, folder)
        assert again.resumed_from == 18
        record = store.finish("train-x", {}, 1.0)
    assert not (folder / "checkpoints").exists()
    assert sorted(record["files"]) == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def test_a_moved_runs_folder_resumes_elsewhere(raw, made, runs, tmp_path):
    """Half done, then all of it moved: runs, recipe, data and model; into a place with spaces and other letters."""
    here, there = tmp_path / "here", tmp_path / "там далеко, 言語"
    for name in ("model", "data"):
        source = Path(raw["model"]["name"]) if name == "model" else Path(raw["phases"][0]["data"][0]["path"]).parent
        shutil.copytree(source, here / name)
    moved = json.loads(json.dumps(raw).replace(str(Path(raw["phases"][0]["data"][0]["path"]).parent), "data"))
    recipe_at(here, moved, model={"name": "model"})
    watch = Watch(lambda event: watch.ask_to_stop() if getattr(event, "label", "") == "training phase2" else None)
    with pytest.raises(QcftError, match="stopped"):
        api.run_watched(load_recipe(here / "recipe.yaml"), here / "runs", watch)
    here.rename(there)
    assert (there / "runs" / "tiny" / "phase1" / "done.json").is_file()  # at its new place, before anything is rerun
    _, warnings, begun = go(there / "recipe.yaml", there / "runs")
    assert warnings == []
    assert begun == {"train phase2", "measure phase2"}
    assert results(there / "runs") == results(runs)
    for stage in read_json(there / "runs" / "tiny" / "run.json")["stages"]:
        assert (there / "runs" / "tiny" / stage / "done.json").is_file()


def test_a_kill_while_a_run_is_named_makes_no_second_run(raw, made, runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    shutil.rmtree(copy / "tiny")
    (copy / "tiny").mkdir()
    (copy / "tiny" / ".run.json.77.partial").write_text("{")
    done, _, begun = go(made / "recipe.yaml", copy)
    assert (done.name, begun) == ("tiny", set())


def test_read_only_parents(raw, made, tmp_path):
    """Only the runs folder and the cache can be written; the rest of the tree is mounted read-only."""
    skip_without_namespaces()
    recipe_file = recipe_at(tmp_path / "locked", {**raw, "phases": raw["phases"][:1]})
    runs = tmp_path / "locked" / "runs"
    runs.mkdir()
    script = (
        f'cd "{tmp_path}/locked" && mount --bind "{tmp_path}" "{tmp_path}" && mount --bind "{runs}" "{runs}" && '
        f'mount -o remount,ro,bind "{tmp_path}" && cd "{tmp_path}/locked" && ! touch x 2>/dev/null && '
        f'exec "{sys.executable}" -m qcft run "{recipe_file}" -q'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (runs / "tiny" / "report" / "report.md").is_file()


def test_two_commands_on_one_run_share_the_work(raw, made, runs, tmp_path):
    """Both end well, each step is done by one of them, and the other says whom it waited for."""
    recipe_at(tmp_path, raw)
    command = [sys.executable, "-m", "qcft", "run", "recipe.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert results(tmp_path / "runs") == results(runs)
    assert [p.name for p in (tmp_path / "runs").glob("*/run.json")] == ["run.json"]
    ids = [str(process.pid) for process in both]
    for text, other in zip(said, reversed(ids), strict=True):
        assert "waiting for" not in text or f"process {other} on" in text
