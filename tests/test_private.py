"""What other libraries do not promise is looked up by name, and said in one line where it is gone."""

import ast
from importlib.metadata import version
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import yaml

from qcft import QcftError, api
from qcft.events import Note, Watch
from qcft.models.load import evaluating, load_model
from qcft.private import ATTRIBUTES, NAMES, TRAINING, check_training, of, private
from qcft.recipe import Model, load_recipe

PACKAGE = Path(__file__).parents[1] / "qcft"
# Modules that their libraries document, though they are not at the top.
DOCUMENTED = {
    "transformers.training_args", "transformers.modeling_outputs", "peft.tuners.lora", "peft.utils.save_and_load",
    "bitsandbytes.functional", "lm_eval.api.task", "lm_eval.api.instance", "lm_eval.defaults", "lm_eval.tasks",
    "lm_eval.models.huggingface", "lm_eval.utils", "trl.kernels",
}  # fmt: skip


@pytest.mark.parametrize("path", NAMES)
def test_a_name_exists_and_its_absence_is_reported(path, monkeypatch):
    pytest.importorskip(path.partition(":")[0].partition(".")[0])
    assert private(path) is not None
    library = path.partition(":")[0].partition(".")[0].replace("_", "-")
    module, _, names = path.partition(":")
    holder, _, last = names.rpartition(".")
    holder = private(f"{module}:{holder}") if holder else __import__(module, fromlist=["x"])
    for one in (holder, *getattr(holder, "__mro__", ())):  # a subclass may have it from another
        if last in vars(one):
            monkeypatch.delattr(one, last)
    with pytest.raises(QcftError) as error:
        private(path)
    assert f"{library} {version(library)} has no {names}" in error.value.message
    assert f"pip install '{library}" in error.value.hint
    if path in TRAINING:
        with pytest.raises(QcftError, match=f"has no {names}"):
            check_training()


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_a_missing_attribute_is_reported(path):
    with pytest.raises(QcftError, match=f"has no {path.partition(':')[2]}"):
        of(object(), path)


def test_no_other_name_of_a_private_module_is_imported():
    libraries = {"trl", "transformers", "peft", "bitsandbytes", "accelerate", "lm_eval"}
    found = []
    started_after_a_check = "render_worker.py"
    for file in PACKAGE.rglob("*.py"):
        if file.name == started_after_a_check:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in libraries:
                deep = "." in node.module and node.module not in DOCUMENTED
                found += [(file.name, node.module, one.name) for one in node.names if deep or one.name[0] == "_"]
    assert not found


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    raw = {**raw_recipe, "phases": raw_recipe["phases"][:1], "answers": {"prompts": 0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "recipe.yaml"


def train(recipe_file):
    notes = []
    watch = Watch(lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    api.run_watched(load_recipe(recipe_file), recipe_file.parent / "runs", watch)
    return notes


def test_row_lengths_that_do_not_arrive_end_a_training(recipe_file, monkeypatch):
    """Without them packed rows would see each other."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward",
        lambda self, *args, **options: forward(self, *args, **{k: v for k, v in options.items() if k != "row_lengths"}),
    )  # fmt: skip
    with pytest.raises(QcftError, match="does not pass row lengths to attention"):
        train(recipe_file)


def test_a_missing_method_that_a_training_overrides_ends_it(recipe_file, monkeypatch):
    """Else the Trainer would resume with one of several adapters."""
    from transformers import Trainer

    monkeypatch.delattr(Trainer, "_load_from_checkpoint")
    with pytest.raises(QcftError, match=r"has no Trainer\._load_from_checkpoint"):
        train(recipe_file)


def test_a_head_with_other_arguments_ends_no_run(recipe_file, monkeypatch):
    """The estimate alone calls it with arguments by place."""
    from trl.kernels import ChunkedLogProbFunction

    from qcft.runner import forecast

    plain = ChunkedLogProbFunction.forward

    def forward(ctx, hidden, weight, bias, targets, warmth, *others):
        return plain(ctx, hidden, weight, bias, targets, warmth, *others)

    monkeypatch.setattr(ChunkedLogProbFunction, "forward", staticmethod(forward))
    monkeypatch.setattr(forecast, "SMALL", 0)
    notes = train(recipe_file)
    assert any("cannot be estimated, as trl" in line and "has no ChunkedLogProbFunction" in line for line in notes)


def test_weights_that_are_repacked_in_evaluation_end_the_run(tiny_model):
    model = load_model(tiny_model, Model(name=str(tiny_model), quantize="nf4"))
    (first, *_) = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    with pytest.raises(QcftError, match="repacks the weights"), evaluating(model):
        first.weight.data = torch.clone(first.weight.data)
