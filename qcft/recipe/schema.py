"""The recipe's schema: every key, its type, its default. Unknown keys are errors."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, field_validator, model_validator
from pydantic_core import PydanticKnownError

from qcft.errors import InputError
from qcft.recipe.ablation import AblationSpec
from qcft.recipe.anchor import Anchor, check_anchor
from qcft.recipe.evaluate import Evaluate
from qcft.recipe.freeze import FreezeSpec, parse_freeze
from qcft.recipe.parts import NAME, Count, Name, Number, Part, Seed, Source, Sources, instead, named
from qcft.recipe.peft import Peft
from qcft.recipe.replay import Replay, ratio_alone
from qcft.recipe.stages import taken_for

TESTS = "test"  # the phase name under which the rows of heldout.data are measured
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 1e-8, which PyYAML reads as text


class Model(Part):
    """Which model, and the precision of its weights while training and measuring.

    `base` is the model it was tuned from: a first phase's most-changed and least-changed are measured against it.
    `special_tokens_in_text`: whether control tokens in the text of data are encoded as plain text or as control tokens.
    """

    name: Name
    revision: Name | None = None
    base: Name | None = None
    quantize: Literal["nf4", "none"] = "nf4"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    chat_template: Literal["chatml"] | None = None
    special_tokens_in_text: Literal["plain", "allow"] = "plain"


class Lora(Part):
    """The shape of the adapters. `targets`: all linear layers, or the last names of modules (`q_proj`).

    `peft`: further fields of PEFT's LoraConfig, passed on unmodified.
    """

    r: Annotated[Count, Field(ge=1)] = 16
    alpha: Annotated[Number, Field(gt=0)] = 32
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = False
    peft: Peft = Peft()


class Text(Part):
    """How raw text is trained on. Documents, and last pieces of long documents, that are shorter than `min_tokens` are
    dropped and counted."""

    min_tokens: Annotated[Count, Field(ge=2)] = 16


class Train(Part):
    """How a phase is trained. `batch` counts rows per optimizer step, whether rows are packed or not.

    `micro_batch`: rows per forward pass where rows are not packed; `auto`: as many as fit in memory, packed or not,
    with the same rows in every optimizer step. `batch: auto` is the default batch with `micro_batch: auto`.

    `prefix_cache`: store the output of the lowest, frozen layers for each row on disk, and train from it.
    `long_rows` is for conversations: long documents of raw text are always split into pieces.
    """

    lr: Annotated[Number, Field(gt=0)] = 2e-4
    epochs: Annotated[Number, Field(gt=0)] = 1.0
    steps: Annotated[Count, Field(ge=1)] | None = None
    batch: Annotated[Count, Field(ge=1)] = 16
    micro_batch: Annotated[Count, Field(ge=1)] | Literal["auto"] = 4
    max_length: Annotated[Count, Field(ge=8)] = 1024
    long_rows: Literal["drop", "cut"] = "drop"
    text: Text = Text()
    packing: bool = True
    scheduler: str = "cosine"
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.03
    optimizer: str = "auto"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    prefix_cache: bool | Literal["auto"] = "auto"
    checkpoint_steps: Annotated[Count, Field(ge=1)] | None = None
    report_to: list[str] = []
    sft: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _batch_to_fit(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("batch") == "auto":
            return {**{key: one for key, one in value.items() if key != "batch"}, "micro_batch": "auto"}
        return value

    @field_validator("sft")
    @classmethod
    def _not_owned(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in OWNED:
                raise ValueError(f"{key} is set by qcft itself | {instead(OWNED[key])}")
        return {key: float(v) if isinstance(v, str) and EXPONENT.fullmatch(v) else v for key, v in value.items()}


class Temperature(Part):
    """Each language gives rows in proportion to the `temperature`-th root of its rows: 1 is all, large is equal."""

    temperature: Annotated[Number, Field(ge=1)]


def _balance(value: Any) -> Any:
    known = isinstance(value, Temperature) or value in ("none", "equal")
    one = isinstance(value, dict) and [*value] == ["temperature"]
    if known or (one and type(value["temperature"]) in {int, float} and value["temperature"] >= 1):
        return value
    raise ValueError(
        f"{value!r} is not none, equal or {{temperature: T}} | T is a number of at least 1, as in {{temperature: 3}}"
    )


def _freeze(value: Any) -> FreezeSpec:
    if isinstance(value, FreezeSpec):
        return value
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    try:
        return parse_freeze(value)
    except InputError as error:
        raise ValueError(f"{error.message.removeprefix('freeze: ')} | {error.hint}") from None


class Phase(Part):
    """One phase: data to train on, or an adapter made elsewhere.

    `balance`: how many rows of each language an epoch has, drawn once without repeats: all, as many as the smallest
    has, or by a temperature. `thinking`: whether a thinking model's answers are trained with thoughts before them;
    `auto`: the answers that have thoughts.
    """

    name: str
    data: Sources = []
    adapter: Name | None = None
    start: Literal["merged", "stacked", "continue", "base"] = "merged"
    balance: Annotated[Literal["none", "equal"] | Temperature, BeforeValidator(_balance)] = "none"
    freeze: Annotated[FreezeSpec, PlainValidator(_freeze), PlainSerializer(str)] = FreezeSpec("none")
    replay: Annotated[Replay | None, BeforeValidator(ratio_alone)] = None
    anchor: Annotated[Anchor | None, BeforeValidator(check_anchor)] = None
    system: str | None = None
    thinking: Literal["auto", "on", "off"] = "auto"
    train: Train = Train()

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.adapter is None and not self.data:
            raise ValueError(f"phase {self.name!r} has no data | give it data: [{{path: ...}}], or adapter: PATH")
        if self.adapter is not None and self.data:
            raise ValueError(f"phase {self.name!r} has both data and an adapter | give one of them")
        if self.adapter is not None and self.anchor is not None:
            raise ValueError(f"phase {self.name!r} is an adapter made elsewhere and not trained | omit its anchor")
        terms = self.anchor is not None or (self.replay is not None and self.replay.loss == "distil")
        other = [key for key, plain in (("loss_type", "nll"), ("label_smoothing_factor", 0)) if terms
                 if self.train.sft.get(key, plain) != plain]  # fmt: skip
        if other:
            raise ValueError(
                f"train.sft.{other[0]} changes the cross-entropy, which an anchor and distilled replay need as it is | "
                "omit one of them"
            )
        return self

    def sources(self) -> list[Source]:
        """The phase's data, one source per language."""
        return [one for source in self.data for one in source.expanded()]


class MeasuredPhase(Part):
    """Held-out rows that are measured under a phase's name and limits, whether or not the recipe has that phase."""

    name: str
    data: Sources
    system: str | None = None
    thinking: Literal["auto", "on", "off"] = "auto"
    max_length: Annotated[Count, Field(ge=8)] = 1024
    long_rows: Literal["drop", "cut"] = "drop"

    @classmethod
    def of(cls, phase: Phase) -> MeasuredPhase:
        """The name and limits of a phase, without data."""
        return cls(
            name=phase.name,
            data=[],
            system=phase.system,
            thinking=phase.thinking,
            max_length=phase.train.max_length,
            long_rows=phase.train.long_rows,
        )


class HeldOut(Part):
    """Rows set aside for measuring: `share` of all rows, of which at most `rows` of each language are scored.

    `data`: your own test sets; all of their rows (or the first `take`) are also measured, and never trained on.
    `of`: the phases whose rows are measured, at most `rows` of each source, instead of the recipe's own:
    `qcft ablate` sets it so that every arm measures the rows of all arms.
    """

    share: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    rows: Annotated[Count, Field(ge=1)] = 48
    data: Sources = []
    of: list[MeasuredPhase] = []


class Answers(Part):
    """Greedy answers to held-out English prompts: often the first thing that gets worse."""

    prompts: Annotated[Count, Field(ge=0)] = 16
    max_new_tokens: Annotated[Count, Field(ge=1)] = 64


class MergeLimits(Part):
    """Limits for a merge. `warn_below`, `refuse_below`: warn, or stop, if it keeps a smaller share of what the phase
    learned (null: never). `max_kl` (nats per answer token) and `min_agreement` (share of answer tokens): stop if it is
    further from the live adapter. `dtype`: of the weights (null: the base's)."""

    warn_below: Annotated[Number, Field(le=1)] = 0.8
    refuse_below: Annotated[Number, Field(le=1)] | None = 0.5
    max_kl: Annotated[Number, Field(gt=0)] | None = None
    min_agreement: Annotated[Number, Field(gt=0, le=1)] | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None


class Forgetting(Part):
    """The live probe: English NLL on at most `rows` held-out rows, measured every `every` optimizer steps of a phase
    and compared with the model the phase starts from. `auto`: as often as possible within 5% of the work, counted in
    tokens. A relative rise of `warn` is reported once; at a rise of `stop` training ends and the adapter of the last
    probe below it is kept.
    """

    every: Annotated[Count, Field(ge=1)] | Literal["auto"] = "auto"
    rows: Annotated[Count, Field(ge=1)] = 16
    warn: Annotated[Number, Field(gt=0)] | None = 0.05
    stop: Annotated[Number, Field(gt=0)] | None = None


class Recipe(Part):
    """A whole experiment. `deterministic`: train with kernels that give the same bits each time, on CUDA too."""

    version: Literal[1] = 1
    name: str
    model: Annotated[Model, BeforeValidator(named("name"))]
    seed: Seed = 0
    deterministic: bool = False
    lora: Lora = Lora()
    heldout: HeldOut = HeldOut()
    answers: Answers = Answers()
    merge: MergeLimits = MergeLimits()
    forgetting: Forgetting | None = Forgetting()
    evaluate: Evaluate = Evaluate()
    probe: Sources = []
    phases: list[Phase] = Field(min_length=1)
    ablation: AblationSpec | None = None

    @field_validator("name")
    @classmethod
    def _run_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(
                f"{value!r} cannot name a run | use letters, digits, '.', '_' and '-' (no slash, at most 64)"
            )
        return value

    @model_validator(mode="after")
    def _phase_names(self) -> Self:
        seen: set[str] = set()
        for i, phase in enumerate(self.phases):
            if not NAME.fullmatch(phase.name):
                raise ValueError(f"phases: {phase.name!r} cannot name a phase | use letters, digits, '.', '_' and '-'")
            if phase.name in seen:
                raise ValueError(f"phases: two phases are named {phase.name!r} | rename one of them")
            if phase.name in Recipe.model_fields:
                raise ValueError(f"phases: {phase.name!r} is a key of the recipe | rename the phase")
            if what := taken_for(phase.name, (other.name for other in self.phases)):
                raise ValueError(f"phases: {phase.name!r} would be mistaken for {what} | rename the phase")
            seen.add(phase.name)
            if i and phase.adapter is not None:
                raise ValueError(
                    f"phases: {phase.name!r}: only the first phase can be an adapter made elsewhere | put it first"
                )
        return self

    @model_validator(mode="after")
    def _deltas_are_used_whole(self) -> Self:
        first, field = self.phases[0], self.lora.peft.beyond_factors
        for number, phase in enumerate(self.phases[1:], 1):
            if phase.start == "continue" and number == 1 and first.adapter and self.lora.peft.given():
                raise ValueError(
                    f"lora.peft: {phase.name} continues the adapter of {first.name}, whose own config applies | "
                    f"omit lora.peft, or set {phase.name}.start to merged"
                )
            if field and phase.start == "stacked":
                raise ValueError(
                    f"lora.peft.{field}: such an adapter cannot be part of a stack, which {phase.name}.start requires"
                    f" | set {phase.name}.start to merged, or omit lora.peft.{field}"
                )
            if field and phase.freeze.measure == "change" and not (number == 1 and first.adapter):
                raise ValueError(
                    f"lora.peft.{field}: how much such an adapter changed is not known, which {phase.name}.freeze "
                    f"({phase.freeze.text}) depends on | use another freeze, such as snr:0.5"
                )
        return self

    @model_validator(mode="after")
    def _tests_have_their_name(self) -> Self:
        if self.heldout.data and any(phase.name == TESTS for phase in self.phases):
            raise ValueError(f"phases: {TESTS!r} is the name for heldout.data in the results | rename the phase")
        return self

    @model_validator(mode="after")
    def _change_is_known(self) -> Self:
        first = self.phases[0]
        if self.measures_change_since_base() and self.model.base is None:
            raise ValueError(
                f"{first.name}.freeze: {first.freeze.text!r} depends on what an earlier phase changed, but "
                f"{first.name!r} is the first phase | set model.base to the model that it was tuned from"
            )
        return self

    def measures_change_since_base(self) -> bool:
        """Whether the first phase freezes by how much the model changed from `model.base`."""
        return self.phases[0].freeze.measure == "change"

    def phase(self, name: str) -> Phase:
        """The phase of that name. Raises KeyError."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)


# Fields of trl's SFTConfig that qcft sets itself, and the recipe key that stands for each.
OWNED = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch",
    "max_length": "train.max_length",
    "truncation_mode": "train.long_rows",
    "packing": "train.packing",
    "packing_strategy": "train.packing",
    "padding_free": "train.packing",
    "lr_scheduler_type": "train.scheduler",
    "warmup_steps": "train.warmup",
    "optim": "train.optimizer",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "save_strategy": "train.checkpoint_steps",
    "save_steps": "train.checkpoint_steps",
    "save_total_limit": "train.checkpoint_steps",
    "save_only_model": "train.checkpoint_steps",
    "report_to": "train.report_to",
    "seed": "seed",
    "data_seed": "seed",
    "full_determinism": "seed",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing (never reentrant)",
    "ignore_data_skip": "omit it: a killed run resumes exactly where it stopped",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    "chat_template_path": "model.chat_template",
    "eos_token": "model.chat_template",
    "pad_token": "model.chat_template",
    "bf16": "model.quantize (16-bit compute follows the device)",
    "fp16": "model.quantize (16-bit compute follows the device)",
    "use_cpu": "--cpu, or QCFT_DEVICE=cpu",
    "output_dir": "--runs",
    "completion_only_loss": "data (loss falls on answers only)",
    "assistant_only_loss": "data (loss falls on answers only)",
    "dataset_text_field": "data[].format",
    "dataset_kwargs": "data",
    "dataset_num_proc": "data",
    "shuffle_dataset": "seed",
    "train_sampling_strategy": "seed (rows are mixed before training)",
    "remove_unused_columns": "data",
    "eval_packing": "heldout",
    "eval_strategy": "heldout",
    "eval_steps": "heldout",
    "resume_from_checkpoint": "omit it: a killed run resumes by itself",
    "logging_strategy": "train.report_to",
    "logging_nan_inf_filter": "omit it: a loss that is not finite stops the training",
    "auto_find_batch_size": "train.micro_batch",
    "logging_steps": "train.report_to (every step is logged)",
    "disable_tqdm": "--quiet",
    "hub_token": "`hf auth login`, or HF_TOKEN in the environment",
    "push_to_hub": "omit it: qcft writes to the runs folder only",
    "load_best_model_at_end": "omit it: the last step is the result",
    "use_liger_kernel": "omit it: TRL's own fused loss is used",
}
