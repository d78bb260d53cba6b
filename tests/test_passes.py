"""Memory that runs out while training: smaller passes, the same rows in every step, the same result."""

import json

import pytest
import torch

from qcft import QcftError
from qcft.data.encode import EncodedRow
from qcft.data.mix import mixed_order
from qcft.events import Note, Watch
from qcft.layers import adapted_modules
from qcft.models.adapters import add_lora
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Lora, Model, Train, parse_freeze, recipe_from
from qcft.training.batches import make_batches
from qcft.training.memory import plan_training
from qcft.training.passes import FILE, Fit, divided
from qcft.training.sft import train_adapter

from .helpers.shapes import shape_of, tiny_meta
from .helpers.tiny import make_llama
from .helpers.training import adapter_of, log_of, rows_of

# SGD, whose step is in proportion to the gradient: one counted twice shows, and rounding does not grow, as by Adam's.
TRAIN = Train(lr=0.02, optimizer="sgd", batch=8, micro_batch=8, epochs=2, max_length=96, checkpoint_steps=1)


class Card:
    """A model that runs out of memory, as CUDA says it, when more than `tokens` are run at once; or once, in the
    backward pass of its `backward`-th pass."""

    def __init__(self, model, tokens=None, backward=None):
        self.seen, self.fell = [], 0
        self.tokens, self.backward = tokens, backward
        model.get_input_embeddings().register_forward_pre_hook(self.forward)
        model.model.layers[1].register_full_backward_pre_hook(self.back)

    def full(self):
        self.fell += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(self, module, arguments):
        if self.tokens and arguments[0].numel() > self.tokens:
            self.full()
        self.seen.append(arguments[0].numel())

    def back(self, module, gradient):
        if self.backward == len(self.seen) and not self.fell:
            self.full()


def train(model_folder, folder, settings=TRAIN, watch=None, fit=None, **card):
    tokenizer = load_tokenizer(model_folder, Model(name="tiny"))
    rows = rows_of(tokenizer)
    batches = make_batches(rows, lambda epoch: mixed_order(len(rows), 0, f"0:{epoch}"), settings)
    model = load_model(model_folder, Model(name="tiny"))
    torch.manual_seed(0)
    adapted = add_lora(model, adapted_modules(model, "all-linear", parse_freeze("none"), 0), Lora(r=4))
    on = Card(model, **card)
    folder.mkdir(exist_ok=True)
    trained = train_adapter(adapted, tokenizer, batches, settings, 0, folder, watch or Watch(), "training", fit=fit)
    return trained, on


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_model, folder)
    return folder


def close(a, b):
    """Up to the rounding of bf16 passes."""
    a, b = adapter_of(a), adapter_of(b)
    return a.keys() == b.keys() and all((a[k] - b[k]).norm() <= 0.05 * b[k].norm() for k in a)


@pytest.mark.parametrize("packing", [True, False])
def test_passes_that_do_not_fit_are_halved(tiny_model, tmp_path, packing):
    settings = TRAIN.model_copy(update={"packing": packing})
    plain, whole_card = train(tiny_model, tmp_path / "plain", settings)
    notes = []
    watch = Watch(lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    most = max(whole_card.seen)
    trained, card = train(tiny_model, tmp_path / "small", settings, watch, tokens=most // 3)
    assert max(card.seen) <= most // 3
    assert card.fell == len(notes) >= 1
    assert "memory ran out at step 1" in notes[0]
    assert trained.pass_limit < most
    assert plain.pass_limit is None
    assert (trained.steps, trained.exposure) == (plain.steps, plain.exposure)
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("plain", "small")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert close(tmp_path / "small", tmp_path / "plain")


def test_gradients_of_a_pass_that_failed_half_way_are_not_counted(tiny_model, tmp_path):
    """In the backward pass, with the upper layers' gradients there already, and another pass of the step finished."""
    settings = TRAIN.model_copy(update={"packing": False, "micro_batch": 4})
    train(tiny_model, tmp_path / "plain", settings)
    _, card = train(tiny_model, tmp_path / "fell", settings, backward=6)
    assert card.fell == 1
    assert close(tmp_path / "fell", tmp_path / "plain")


def test_resuming_starts_with_the_passes_that_fitted(tiny_model, tmp_path, whole):
    """Later in the training, then stopped, then resumed."""
    from qcft import Interrupted
    from qcft.events import Progress

    def stop(event):
        if isinstance(event, Progress) and event.done == 2:
            watch.ask_to_stop()

    watch = Watch(stop)
    with pytest.raises(Interrupted):
        train(tiny_model, tmp_path, watch=watch, tokens=60)
    kept = json.loads((tmp_path / "checkpoints" / FILE).read_text())
    trained, card = train(tiny_model, tmp_path, tokens=60)
    assert 0 < trained.resumed_from < trained.steps
    assert card.seen[0] <= kept["limit"]
    assert trained.pass_limit <= kept["limit"] < 120
    assert close(tmp_path, whole)


def test_one_row_that_does_not_fit_is_recomputed_then_reported(tiny_model, tmp_path):
    notes = []
    watch = Watch(lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    with pytest.raises(QcftError, match="one row of") as error:
        train(tiny_model, tmp_path, watch=watch, tokens=10)
    assert "max_length" in error.value.hint
    assert "recomputed" in notes[-1]
    assert not (tmp_path / "adapter").exists()


def test_other_errors_pass_through(tiny_model, tmp_path, monkeypatch):
    def wrong(card, module, arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Card, "forward", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tiny_model, tmp_path)


def rows(*lengths):
    return [EncodedRow(list(range(n)), list(range(n))) for n in lengths]


def test_rows_are_divided_in_their_order():
    given = rows(5, 5, 5, 9, 1, 1)
    assert [len(part) for part in divided(given, 10, False)] == [2, 1, 2, 1]
    assert [len(part) for part in divided(given, 10, True)] == [2, 1, 1, 2]
    assert [len(part) for part in divided(given, None, False)] == [6]
    assert [len(part) for part in divided(given, 1, False)] == [1] * 6
    assert [row for part in divided(given, 7, False) for row in part] == given


def test_batch_auto_keeps_the_rows_of_a_step_and_the_step_itself():
    auto, plain = Train(batch="auto", packing=False), Train(packing=False)
    assert (auto.batch, auto.micro_batch) == (16, "auto")
    given = rows(*[7] * 40)
    laid = [make_batches(given, lambda epoch: list(range(40)), one) for one in (auto, plain)]
    assert [one.per_pass * one.accumulation for one in laid] == [16, 16]
    assert laid[0].steps == laid[1].steps


def test_micro_batch_is_a_circumstance(raw_recipe):
    from qcft.plan import make_plan
    from qcft.prepare.digests import Digests

    digests = Digests("m", {"phase1": "a", "phase2": "b"}, {"phase2": ("c",)}, "d")
    plans = [
        make_plan(recipe_from(raw_recipe, {"phase1.train.micro_batch": one}), digests).stages() for one in (2, "auto")
    ]
    assert plans[0] == plans[1]


def laid_out(settings, count=32, length=64):
    given = [EncodedRow(list(range(length)), list(range(length))) for _ in range(count)]
    return make_batches(given, lambda epoch: list(range(count)), settings)


def test_passes_are_planned_to_fit():
    model = tiny_meta()
    shape = shape_of(model, device="cuda")
    settings = Train(batch="auto", max_length=2048)
    batches = laid_out(settings)
    roomy = plan_training(model, shape, batches, settings, True, 1 << 40)
    assert roomy.fit == Fit(None, False)
    tight = plan_training(model, shape, batches, settings, True, int(roomy.memory.total * 1.05))
    assert tight.fits
    assert tight.fit == Fit(None, True)
    tighter = plan_training(model, shape, batches, settings, True, int(tight.memory.total * 0.8))
    assert tighter.fits
    assert tighter.fit.limit < 1024
    assert tighter.memory.total < tight.memory.total < roomy.memory.total
    none = plan_training(model, shape, batches, settings, True, 1000)
    assert not none.fits
    assert none.largest.lengths == (64,)


def test_a_number_for_micro_batch_is_kept_whatever_fits():
    settings = Train(batch=16, packing=False, micro_batch=8)
    planned = plan_training(tiny_meta(), shape_of(tiny_meta()), laid_out(settings), settings, True, 1000)
    assert not planned.fits
    assert planned.fit.limit is None
    assert len(planned.largest.lengths) == 8


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_with_batch_auto(raw_recipe, tmp_path, packing, tokenizer, monkeypatch):
    """The whole pipeline, with so little memory said to be free that passes are divided."""
    import qcft
    import qcft.models.load as load

    raw_recipe["model"]["name"] = str(make_llama(tmp_path / "model", tokenizer, layers=2))
    raw_recipe["phases"] = raw_recipe["phases"][:1]
    train_ = raw_recipe["phases"][0]["train"]
    train_ |= {"batch": "auto", "packing": packing, "max_length": 512, "epochs": 1}
    monkeypatch.setattr(load, "free_bytes", lambda: 3_000_000)
    run = qcft.run(recipe_from(raw_recipe), runs=tmp_path / "runs")
    metrics = run.stages["phase1"].metrics
    assert metrics["recomputed"]
    assert metrics["pass_limit"] < 16 * 30
    assert metrics["exposure"][0]["rows"] == metrics["rows"]
