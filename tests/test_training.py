"""Training on real NF4: adapters learn, the base stays, a killed run resumes to the same adapter."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcft import InputError, Interrupted, QcftError
from qcft.data.encode import IGNORED, Encoder
from qcft.data.rows import Message, Row
from qcft.events import Progress, Watch
from qcft.files import seal
from qcft.layers import adapted_modules
from qcft.models.adapters import add_lora
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Lora, Model, parse_freeze
from qcft.training.batches import Fed, make_batches
from qcft.training.checkpoints import last_whole
from qcft.training.settings import check_settings, sft_config
from qcft.training.trainer import Shortcuts

from .helpers.training import TRAIN, adapter_of, log_of, rows_of, same, train


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """A training that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "step"
    trained, model = train(tiny_model, folder)
    return folder, trained, model


def test_lora_trains_in_fp32_on_a_4_bit_base(whole):
    folder, trained, model = whole
    log = log_of(folder)
    assert len(log) == trained.steps == 18
    assert trained.rows == 72
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert not list(folder.rglob("README.md"))  # PEFT's blank card
    factors = adapter_of(folder)
    assert {f.dtype for f in factors.values()} == {torch.float32}
    assert all(f.abs().max() > 0 for name, f in factors.items() if "lora_B" in name)
    assert not any(".layers.0." in name for name in factors)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora" in n for n in trainable)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("fused", [True, False])
def test_dft_weighs_each_token_by_its_probability(tiny_model, tokenizer, tmp_path, fused):
    """Through TRL's head, and from the model's own logits, for which TRL takes no loss but its own."""
    settings = TRAIN.model_copy(update={"sft": {"loss_type": "dft"}, "steps": 1, "batch": 24})
    train(tiny_model, tmp_path / "dft", settings=settings, lora=Lora(r=4), shortcuts=Shortcuts(fused=fused))
    model = load_model(tiny_model, Model(name="tiny"))  # what the first step sees: its adapter adds nothing yet
    each = []
    for row in rows_of(tokenizer):
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        each.append(logits.log_softmax(dim=-1)[labels != IGNORED].gather(1, labels[labels != IGNORED][:, None]))
    logs = torch.cat(each)
    (entry,) = log_of(tmp_path / "dft")
    assert entry["loss"] == pytest.approx(float(-(logs.exp() * logs).mean()), rel=0.02)
    assert entry["loss"] < 0.5 * float(-logs.mean())


def test_trls_loss_and_the_models_own_logits_smooth_labels_equally(tiny_model, tmp_path):
    """Which is seen once the model has learned: at first all tokens are about equally likely."""

    def losses(name, fused, smoothing):
        settings = TRAIN.model_copy(update={"sft": {"label_smoothing_factor": smoothing}, "steps": 12, "lr": 2e-2})
        train(tiny_model, tmp_path / name, settings=settings, lora=Lora(r=4), shortcuts=Shortcuts(fused=fused))
        return [entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry]

    smoothed, own, plain = losses("trl", True, 0.5), losses("own", False, 0.5), losses("plain", False, 0.0)
    assert own == pytest.approx(smoothed, rel=0.02)
    assert own[-1] > 1.1 * plain[-1]


def test_what_is_trained_is_counted_by_source(whole, tokenizer):
    trained = whole[1]
    rows = rows_of(tokenizer)
    epochs = trained.rows / len(rows)
    assert epochs == 3
    assert {e["source"]: e["rows"] for e in trained.exposure} == {"odd": 36, "even": 36}
    for entry in trained.exposure:
        own = [row for row in rows if row.source == entry["source"]]
        assert entry["tokens"] == 3 * sum(len(row.input_ids) for row in own)
        assert entry["answer_tokens"] == 3 * sum(row.answer_tokens for row in own)


def test_a_pass_other_than_the_one_laid_out_is_an_error(tokenizer):
    rows = rows_of(tokenizer)
    fed = Fed(make_batches(rows, lambda epoch: list(range(len(rows))), TRAIN))
    with pytest.raises(QcftError, match=r"was fed items \[1\] at step 1, where the mix has \[0\]"):
        fed.take(0, [1])


def test_a_label_that_is_lost_on_the_way_to_the_loss_is_an_error(tiny_model, tmp_path, monkeypatch):
    """As by a collator that masks more than it did."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    plain = DataCollatorForLanguageModeling.torch_call

    def masking(self, examples):
        batch = plain(self, examples)
        batch["labels"][0, (batch["labels"][0] != IGNORED).nonzero()[-1]] = IGNORED
        return batch

    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", masking)
    with pytest.raises(QcftError, match=r"\d+ tokens of \d+ rows would bear loss, where the rows have \d+"):
        train(tiny_model, tmp_path / "step")


def test_every_entry_of_lora_a_moves(whole, tiny_model):
    """In bf16 many would not: updates round away."""
    folder, _, _ = whole
    model = load_model(tiny_model, Model(name="tiny"))
    torch.manual_seed(0)
    fresh = add_lora(model, adapted_modules(model, "all-linear", parse_freeze("first:1"), 0), Lora(r=4, dropout=0.1))
    before = {n.replace(".default", ""): p for n, p in fresh.named_parameters() if "lora_A" in n}
    after = adapter_of(folder)
    # TRL rounds the fresh factors to bf16 once before they are held in fp32 again.
    still = sum(int((after[n] == p.to(torch.bfloat16).float()).sum()) for n, p in before.items())
    assert still < 0.01 * sum(p.numel() for p in before.values())


def test_a_training_of_one_step_learns(tiny_model, tmp_path):
    """Without warm-up, which would be all of it."""
    trained, _ = train(tiny_model, tmp_path / "one", settings=TRAIN.model_copy(update={"steps": 1, "warmup": 0.5}))
    assert trained.steps == 1
    assert [entry["lr"] for entry in log_of(tmp_path / "one")] == [TRAIN.lr]
    moved = {name for name, weight in adapter_of(tmp_path / "one").items() if "lora_B" in name and weight.any()}
    assert moved


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"])
def test_warm_up_starts_above_zero(scheduler, tiny_model, tmp_path):
    """And ends where it did: at the peak, after as many steps, from where the schedule is transformers' own."""
    settings = TRAIN.model_copy(update={"steps": 5, "warmup": 0.6, "scheduler": scheduler, "lr": 0.01})
    train(tiny_model, tmp_path / "run", settings=settings)
    rates = [entry["lr"] for entry in log_of(tmp_path / "run")]
    after = {"cosine": 0.5, "linear": 0.5, "constant_with_warmup": 1, "inverse_sqrt": (3 / 4) ** 0.5}[scheduler]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01 * after])


def test_no_pickled_arguments_and_the_adapter_is_pefts(whole, tiny_model):
    from peft import AutoPeftModelForCausalLM

    folder, _, _ = whole
    assert not list(folder.rglob("training_args.bin"))
    AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")


def test_a_request_to_stop_writes_a_checkpoint_and_resuming_gives_the_same_adapter(whole, tiny_model, tmp_path):
    watch = Watch(lambda event: watch.ask_to_stop(143) if isinstance(event, Progress) and event.done == 7 else None)
    with pytest.raises(Interrupted, match="step 8 of 18") as stopped:
        train(tiny_model, tmp_path / "step", watch)
    assert stopped.value.exit_code == 143
    trained, _ = train(tiny_model, tmp_path / "step")
    assert trained.resumed_from == 8
    assert trained.exposure == whole[1].exposure
    assert [entry["step"] for entry in log_of(tmp_path / "step")] == list(range(1, 19))
    assert same(adapter_of(tmp_path / "step"), adapter_of(whole[0]))


def test_a_killed_training_resumes_to_the_same_adapter(whole, tiny_model, tmp_path):
    """SIGKILL in the middle, in a process of its own; then the same call again."""
    code = (
        "import sys, time; from pathlib import Path; from tests.helpers.training import train\n"
        "from qcft.events import Watch\n"
        "train(Path(sys.argv[1]), Path(sys.argv[2]), Watch(lambda event: time.sleep(0.2)))"
    )
    step = tmp_path / "step"
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    process = subprocess.Popen([sys.executable, "-c", code, str(tiny_model), str(step)], env=environment, cwd=root)
    deadline = time.monotonic() + 120
    while not (step / "checkpoints" / "checkpoint-6" / "files.sha256").exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trained, _ = train(tiny_model, step)
    assert 6 <= trained.resumed_from < 18
    assert [entry["step"] for entry in log_of(step)] == list(range(1, 19))  # none logged twice
    assert same(adapter_of(step), adapter_of(whole[0]))


def test_a_damaged_checkpoint_is_never_used(tmp_path):
    for number, whole in ((2, True), (4, True), (6, False)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"x" * 100)
        if whole:
            seal(folder)
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"x" * 99 + b"y")
    assert last_whole(tmp_path, Watch()) == tmp_path / "checkpoint-2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]


def test_packing_does_not_leak(tiny_model, tokenizer):
    """Rows run in one pack give the losses they give alone."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = load_model(tiny_model, Model(name="tiny"), "none").float()
    rows = rows_of(tokenizer, 3)
    item = {
        "input_ids": [t for r in rows for t in r.input_ids],
        "labels": [t for r in rows for t in r.labels],
        "seq_lengths": [len(r.input_ids) for r in rows],
    }
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([item])
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]  # as TRL calls it
        alone = torch.cat([model(torch.tensor([r.input_ids])).logits[0] for r in rows])
    assert torch.allclose(packed, alone, atol=1e-4)
    starts = [0, len(rows[0].input_ids), len(rows[0].input_ids) + len(rows[1].input_ids)]
    assert all(labels[0, s] == -100 for s in starts), "the first token of a row is never predicted from another row"


def test_gradient_checkpointing_gives_the_same_adapter_without_walking_below_it(whole, tiny_model, tmp_path):
    settings = TRAIN.model_copy(update={"gradient_checkpointing": True, "steps": 3})
    _, model = train(tiny_model, tmp_path / "with", settings=settings)
    embeddings = model.get_input_embeddings()
    assert not embeddings._forward_hooks, "a hook asks for gradients below the lowest adapted layer"
    train(tiny_model, tmp_path / "without", settings=TRAIN.model_copy(update={"steps": 3}))
    a, b = adapter_of(tmp_path / "with"), adapter_of(tmp_path / "without")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        ({"sft": {"neftune_noise_alfa": 5}}, "no field 'neftune_noise_alfa'", "neftune_noise_alpha"),
        ({"scheduler": "cosin"}, "no scheduler 'cosin'", "did you mean 'cosine'"),
        ({"optimizer": "adam_torch"}, "no optimizer 'adam_torch'", "adamw_torch"),
        ({"report_to": ["wanb"]}, "'wanb' is not known", "wandb"),
        ({"report_to": ["trackio"]}, "trackio is not installed", "pip install trackio"),
    ],
)
def test_settings_only_trl_can_judge(change, says, hint):
    settings = TRAIN.model_copy(update=change)
    with pytest.raises(InputError, match=says) as error:
        check_settings(settings)
    assert hint in error.value.hint


def test_every_field_qcft_sets_is_owned_and_exists():
    """An extra field that qcft sets too would be a clash: it must be refused with the key to use."""
    import dataclasses

    from trl import SFTConfig

    from qcft.recipe.schema import OWNED
    from qcft.training.batches import Batches

    settings = TRAIN.model_copy(update={"warmup": 3, "scheduler": "constant", "report_to": ["tensorboard"]})
    made = sft_config(settings, Path("x"), Batches([[]] * 9, 3, 2, True), 7, True, True)
    plain = SFTConfig("y", bf16=made.bf16, fp16=made.fp16, use_cpu=made.use_cpu)
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    changed = {name for name in names if getattr(made, name) != getattr(plain, name)}
    assert {"learning_rate", "per_device_train_batch_size", "seed", "warmup_steps"} <= changed
    assert changed - {"router_aux_loss_coef"} <= OWNED.keys() <= names  # its default may be changed


def test_tensorboard_writes_into_the_step(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    settings = TRAIN.model_copy(update={"report_to": ["tensorboard"], "steps": 2})
    check_settings(settings)
    for name in ("one", "two"):
        train(tiny_model, tmp_path / name, settings=settings)
        assert list((tmp_path / name / "tensorboard").glob("events*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_extra_fields_reach_trl(tiny_model, tmp_path):
    settings = TRAIN.model_copy(update={"sft": {"max_grad_norm": 1e-9, "adam_beta1": 0.5}, "steps": 2})
    train(tiny_model, tmp_path / "step", settings=settings)
    clipped = adapter_of(tmp_path / "step")
    train(tiny_model, tmp_path / "plain", settings=settings.model_copy(update={"sft": {}}))
    plain = adapter_of(tmp_path / "plain")
    assert any(not torch.equal(clipped[k], plain[k]) for k in plain)


@pytest.mark.parametrize("packing", [True, False])
def test_no_end_of_turn_is_trained_after_an_answer_that_was_cut(tiny_model, tmp_path, monkeypatch, packing):
    """In what the model is given of each pass, packed or padded."""
    from qcft.training import trainer

    tokenizer = load_tokenizer(tiny_model, Model(name="tiny"))
    made = [
        Row(
            (Message("user", f"what number is {i}"),),
            (Message("assistant", "red dog " * (1 + i % 3), finished=i % 2 > 0),),
        )
        for i in range(12)
    ]
    rows = [
        replace(tokens, source="finished" if row.completion[0].finished else "cut")
        for row, tokens in zip(made, Encoder(tokenizer).encode_all(made).encoded, strict=True)
    ]
    passes, check = [], trainer.check_collated
    monkeypatch.setattr(
        trainer, "check_collated", lambda labels, rows: passes.append((labels.clone(), rows)) or check(labels, rows)
    )
    settings = TRAIN.model_copy(update={"packing": packing, "epochs": 1.0})
    train(tiny_model, tmp_path / "t", settings=settings, rows=rows)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [(int((labels == end).sum()), sum(row.source == "finished" for row in rows)) for labels, rows in passes]
    assert sum(found for found, _ in ends) == 6
    assert all(found == wanted for found, wanted in ends)
    assert {row.source for _, rows in passes for row in rows} == {"finished", "cut"}
