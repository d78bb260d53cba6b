"""Models and adapters that change while a run works: reported in one line, and nothing made from them is kept."""

import os
import shutil
import threading
import time

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qcft import api
from qcft.errors import ChangedInput
from qcft.events import Mixed, StepBegun, StepEnded, Watch
from qcft.files import RECENT
from qcft.models.inputs import Inputs
from qcft.models.sources import resolve
from qcft.recipe import Model, recipe_from
from qcft.store import Store, read_run

from .helpers.tiny import make_recipe


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def retune(model):
    """Other weights, in a file of the same size; put in the place of one that may be in use."""
    file = model / "model.safetensors"
    save_file({key: one * 2 for key, one in load_file(file).items()}, model / "new", {"format": "pt"})
    (model / "new").replace(file)


def restore(model, tiny_model):
    shutil.copyfile(tiny_model / "model.safetensors", model / "new")
    (model / "new").replace(model / "model.safetensors")


def run(model, color_data, runs, listener=None):
    raw = make_recipe(model, color_data)
    raw["phases"] = raw["phases"][:1]
    return api.run_watched(recipe_from(raw), runs, Watch(listener))


def at(wanted, change):
    """A listener that makes a change once, at the first event that is wanted."""
    left = [change]

    def listen(event):
        if left and wanted(event):
            left.pop()()

    return listen


def done(runs):
    store = Store(runs)
    return [stage for stage, step in read_run(runs, "tiny").stages.items() if store.state(step) == "done"]


def test_a_model_changed_between_two_steps_and_while_one_works(model, tiny_model, color_data, tmp_path):
    """The next step does not begin; what was made before stays, and is reused when the model is back."""
    change = at(lambda e: isinstance(e, StepEnded) and e.title == "measure base, NF4", lambda: retune(model))
    with pytest.raises(ChangedInput, match=r"model\.safetensors' changed while it was in use"):
        run(model, color_data, tmp_path / "runs", change)
    assert done(tmp_path / "runs") == ["eval/base-16bit", "eval/base"]
    restore(model, tiny_model)
    during = at(lambda e: isinstance(e, Mixed), lambda: retune(model))
    with pytest.raises(ChangedInput):  # while the training works: it is not taken as done
        run(model, color_data, tmp_path / "runs", during)
    assert done(tmp_path / "runs") == ["eval/base-16bit", "eval/base"]
    assert not list((tmp_path / "runs" / ".steps").glob("train-*"))
    restore(model, tiny_model)
    begun = []
    run(model, color_data, tmp_path / "runs", lambda e: begun.append(e.state) if isinstance(e, StepBegun) else None)
    assert begun == ["reused", "reused", "new", "new"]


def test_a_model_that_is_rewritten_unmodified_is_the_same(model, color_data, tmp_path):
    change = at(lambda e: isinstance(e, StepEnded), lambda: restore(model, model))
    assert len(run(model, color_data, tmp_path / "runs", change).stages) == 4


WATCHED = ["config.json", "tokenizer.json", "chat_template.jinja", "new.jinja", "model.safetensors"]


@pytest.mark.parametrize("name", WATCHED)
def test_every_file_of_a_model_is_watched(model, name):
    source = resolve(Model(name=str(model)))
    inputs = Inputs([source])
    inputs.check()
    inputs.check(thorough=True)
    file = model / name
    if name == "model.safetensors":
        file.unlink()
    else:
        file.write_text((file.read_text() if file.exists() else "") + "\n")
    with pytest.raises(ChangedInput, match=name.replace(".", r"\.")):
        inputs.check()


def test_the_digest_finds_what_the_system_does_not(model, stale):
    """A disk that keeps no times, or a change within their resolution: the end of a run compares the digests."""
    time.sleep(2 * RECENT / 1e9)  # else it is read again anyway
    inputs = Inputs([resolve(Model(name=str(model)))])
    retune(model)
    inputs.check()
    with pytest.raises(ChangedInput, match=r"model\.safetensors"):
        inputs.check(thorough=True)


@pytest.fixture
def stale(monkeypatch):
    """A disk that keeps no times: what the system says of weights is what it said before."""
    first = {}
    real = os.stat

    def before(path, *more, **named):
        found = real(path, *more, **named)
        return first.setdefault(os.fspath(path), found) if str(path).endswith("model.safetensors") else found

    monkeypatch.setattr(os, "stat", before)


def test_a_run_whose_model_changed_unseen_keeps_no_step(model, color_data, tmp_path, stale):
    time.sleep(2 * RECENT / 1e9)
    change = at(lambda e: isinstance(e, StepEnded) and e.title == "train phase1", lambda: retune(model))
    with pytest.raises(ChangedInput, match=r"model\.safetensors"):
        run(model, color_data, tmp_path / "runs", change)
    assert done(tmp_path / "runs") == []


def test_an_adapter_changed_before_it_is_imported(model, color_data, tmp_path):
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    raw = make_recipe(model, color_data)
    raw["phases"] = [{"name": "phase1", "adapter": str(tmp_path / "adapter")}]
    change = at(
        lambda e: isinstance(e, StepEnded), lambda: save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    )
    with pytest.raises(ChangedInput, match="adapter' changed while it was in use"):
        api.run_watched(recipe_from(raw), tmp_path / "runs", Watch(change))
    assert done(tmp_path / "runs") == ["eval/base-16bit", "eval/base"]


def test_the_command_says_so_in_two_lines(model, color_data, tmp_path, qcft):
    raw = make_recipe(model, color_data)
    raw["phases"] = raw["phases"][:1]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))

    def change():
        while not list((tmp_path / "runs" / ".steps").glob("*/done.json")):
            time.sleep(0.01)
        retune(model)

    thread = threading.Thread(target=change)
    thread.start()
    code, out, err = qcft("run", "tiny.yaml", "-q")
    thread.join()
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 2, err
    assert "model.safetensors' changed while it was in use" in err
