"""What steps measure, as done.json and the files beside it hold it, where rooms below steps/ read it.

The metrics of a kind that nothing else reads stand beside the kind. `done.json` has one more key for every kind,
`peak_cpu_bytes` or `peak_cuda_bytes`.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict


class IntervalOf(TypedDict):
    """A difference with its interval: measure.intervals.Interval. Steps of earlier formats have `value`, `low` and
    `high` only."""

    value: float
    low: float | None
    high: float | None
    level: float
    clusters: int
    seeds: int
    method: str
    compared: int


class Paired(IntervalOf):
    """A difference of mean NLLs in nats per answer token, with its paired 95% interval over rows."""

    rows: int


class GroupScore(TypedDict):
    """A model's score on one group of held-out rows; NLL in nats per answer token. Of raw text also the UTF-8 bytes
    that were scored, and bits per byte."""

    phase: str
    lang: str
    nll: float
    accuracy: float
    rows: int
    answer_tokens: int
    left_out: dict[str, int]
    bytes: NotRequired[int]
    bits_per_byte: NotRequired[float]


class AnswerLengths(TypedDict):
    """The greedy answers to the English prompts: how many, mean tokens, the share that ended by themselves."""

    rows: int
    mean_tokens: float
    finished: float


class PromptAnswer(TypedDict):
    """An entry of answers.json: an English prompt by the key of its row, the greedy answer, and the row's own answer
    (not in steps of earlier versions)."""

    key: str
    prompt: str
    text: str
    tokens: int
    finished: bool
    reference: NotRequired[str | None]


class JudgedAnswer(TypedDict):
    """An answer in answers.json of a `suite` step, by its prompt's language: the language it was `found` to be in,
    whether that is the `right` one, and the row's own answer (not in steps of earlier versions)."""

    prompt: str
    text: str
    tokens: int
    finished: bool
    found: str | None
    right: bool | None
    reference: NotRequired[str | None]


class ProbeMetrics(TypedDict):
    """Of a `probe` step."""

    groups: dict[str, GroupScore]
    answers: AnswerLengths | None


class DeltaAmount(TypedDict):
    """How much of a phase's delta is taken: `scale` times all of it, or of each layer's what `by` says."""

    scale: NotRequired[float]
    by: NotRequired[str]


class DialPoint(ProbeMetrics, DeltaAmount):
    """The measurement at one point of a dial."""


class DialMetrics(TypedDict):
    """Of a `dial` step."""

    points: list[DialPoint]


class KeptMetrics(TypedDict):
    """Of a `kept` step: measure.stats.KeptGain and measure.distance.Distance over `groups`."""

    groups: list[str]
    share: float | None
    gain: Paired
    loss: Paired
    worse: bool
    kl: float
    agreement: float
    compared_tokens: int


class FedSource(TypedDict):
    """What a training was fed of one source, all epochs together."""

    source: str
    rows: int
    tokens: int
    answer_tokens: int


class MixSource(FedSource):
    """One source's part in an epoch (events.SourceShare)."""

    left_out: dict[str, int]


class EnglishNll(TypedDict):
    """One live probe: English NLL at an optimizer step, and its relative change since the phase began."""

    step: int
    nll: float
    change: float


class LiveProbe(TypedDict):
    """The results of a training's live probe; `share_of_time` of the training's."""

    rows: int
    tokens: int
    every: int
    probes: list[EnglishNll]
    stopped_at: int | None
    share_of_time: float


class LossTerms(TypedDict):
    """Of a loss with terms beside cross-entropy: all of it (`objective`), cross-entropy of new rows, and each term, in
    nats per answer token that bears it; None where none does."""

    objective: float | None
    new_loss: float | None
    anchor_kl: float | None
    distil_kl: float | None


class TrainMetrics(TypedDict):
    """Of a `train` step: training.sft.TrainingResult, and what was trained on what."""

    steps: int
    rows: int
    tokens: int
    loss: float
    resumed_from: int
    pass_limit: int | None
    recomputed: bool
    processes: int
    held: float
    exposure: list[FedSource]
    forgetting: LiveProbe | None
    terms: NotRequired[LossTerms | None]
    mix: list[MixSource]
    adapted_modules: int
    frozen_layers: list[int]
    prefix_cache: bool
    trainable_parameters: int


class GenerationCost(TypedDict):
    """What the answers that replay drew cost, whenever they were made."""

    answers: int
    tokens: int
    seconds: float
    tokens_per_second: float
    chunks_made: int
    chunks_reused: int
    batch: int


class CutAnswers(TypedDict):
    """Answers that had not ended at max_new_tokens: rows, and their answer tokens."""

    rows: int
    answer_tokens: int


class ReplayedPart(TypedDict):
    """One kind of replay in a mix; `pool`: rows that it was drawn from; steps of earlier versions lack `cut`."""

    kind: str
    rows: int
    answer_tokens: int
    repeated: int
    missing: int
    reason: str
    pool: int
    left_out: dict[str, int]
    generation: GenerationCost | None
    cut: NotRequired[CutAnswers]


class ReplayMetrics(TypedDict):
    """Of a `replay` step."""

    rows: int
    answer_tokens: int
    share_of_rows: float
    share_of_answer_tokens: float
    reason: str
    left_out: dict[str, int]
    parts: list[ReplayedPart]


class LayersMetrics(TypedDict):
    """Of a `layers` step."""

    measure: str
    modules: int


class LayersFile(TypedDict):
    """What layers.json holds: the measure of each module."""

    measure: str
    modules: dict[str, float]


class TaskMetrics(TypedDict):
    """Of a `suite` step on a task of lm-eval; `parts`: the scores of a group's tasks, with their items."""

    task: str
    lang: str
    metric: str
    score: float
    scores: dict[str, float]
    parts: dict[str, dict[str, float]]
    items: int
    paired: bool
    higher_is_better: bool
    shots: int
    generates: bool
    prompts: str
    batch: int


class AnsweredIn(TypedDict):
    """Answers to prompts in one language: the share in it (`right`) of those long enough to identify (`told`)."""

    rows: int
    told: int
    right: float | None
    mean_tokens: float
    unfinished: float


class FidelityMetrics(TypedDict):
    """Of a `suite` step on the language of answers."""

    task: str
    languages: dict[str, AnsweredIn]


class AlpacaMetrics(TypedDict):
    """Of a `suite` step on AlpacaEval's prompts."""

    task: str
    rows: int
    mean_tokens: float
    unfinished: float
    max_new_tokens: int


SuiteMetrics = TaskMetrics | FidelityMetrics | AlpacaMetrics
Pair = Literal["from-to", "base-from", "base-to"]


class ParameterDifference(TypedDict):
    """Model parameter difference of two models; `scaled` is relative to the largest of the `pairs`."""

    mpd: float | None
    scaled: dict[Pair, float | None]
    pairs: dict[Pair, float | None]
    norm: float | None
    matrices: int
    reason: str | None


class LayerDifference(TypedDict):
    """Model parameter difference of one layer."""

    mpd: float | None
    norm: float | None


class StateShift(TypedDict):
    """How far the states of a layer moved (measure.shifts.Shift)."""

    mean_shift: float
    covariance_shift: float
    cka: float


class LayerDrift(LayerDifference):
    """One layer's drift, its states' by language."""

    layer: int
    frozen: bool
    languages: dict[str, StateShift]


class TextSize(TypedDict):
    """Rows of text, and their tokens that were looked at."""

    rows: int
    tokens: int


# What drift.json holds: names of two models, the text they read by language, how far apart they are.
DriftFile = TypedDict(
    "DriftFile",
    {
        "from": str,
        "to": str,
        "cka": NotRequired[Literal["debiased"]],
        "text": dict[str, TextSize],
        "parameters": ParameterDifference,
        "layers": list[LayerDrift],
    },
)


class SeedFloor(TypedDict):
    """MPD of two seeds of one training, of `phase`: the mean over other `runs`, or the command that measures it."""

    phase: str | None
    mpd: float | None
    runs: list[str]
    measure: str | None


class DriftFound(DriftFile):
    """What a drift found, with the floor of its MPD; None where none was looked for."""

    floor: SeedFloor | None
