"""The checks before weights are loaded: data, lengths, layers, adapters, tasks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, QcftError
from qcft.files import read_json
from qcft.measure.alpaca import alpaca_prompts
from qcft.models.adapter_config import CONFIG
from qcft.models.adapter_fit import check_fit
from qcft.models.adapters import check_adaptable
from qcft.models.deltas import check_biases, check_factors, check_shape, check_stack, read_adapter
from qcft.models.merge import MARK
from qcft.models.names import missing_weights, stored_names
from qcft.models.size import quantised_share
from qcft.models.tensors import stored_weights
from qcft.prepare.prepared import Prepared
from qcft.recipe import ALPACA_EVAL, Phase
from qcft.replay.rows import check_replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_IN_4_BITS = {"mamba", "falcon_mamba"}  # families of transformers 5.24
FEW = 0.5  # warn if a smaller share of the model's weights is in 4 bits
MOST_ROWS = 10**8  # in all epochs: a consumer GPU would need years


def check_prepared(prepared: Prepared, weights: bool = True) -> None:
    """Check everything that needs only the model's config and tokenizer; with `weights`, also the names of the weights,
    which are then downloaded but not loaded. Raises InputError."""
    from qcft.training.settings import check_settings

    folder = prepared.folder if weights else prepared.described
    mark = read_json(folder / MARK) or {}
    if mark.get("merged_onto") == "dequantised" and prepared.recipe.model.quantize != "none":
        raise InputError(
            f"model: {prepared.recipe.model.name!r} was merged onto a dequantised base, for use in 16 bits; "
            "in 4 bits it would lose what it learned",
            "merge it without --base dequantised, or --set model.quantize=none",
        )
    if weights and any(one.dtype.startswith("F8") for one in stored_weights(folder).values()):
        raise InputError(
            f"model: {prepared.recipe.model.name!r} has weights in 8-bit floats, but no config that says how they "
            "are scaled",
            "give its 16-bit weights: phase 1 is merged onto them, and qcft quantises them itself",
        )
    if weights and (missing := missing_weights(prepared.meta_model, folder)):
        raise InputError(
            f"model: {prepared.recipe.model.name!r} lacks {len(missing)} weights, such as {missing[0]}, which would be "
            "random numbers",
            "download the model again, or give a complete one",
        )
    _check_tokenizer(prepared)
    for group in prepared.groups:
        prepared.held_out(group)
    for phase in prepared.recipe.phases:
        if phase.adapter:
            check_adapter(prepared, Path(os.path.expanduser(phase.adapter)))
            continue
        _check_layers(prepared, phase, weights)
        check_settings(phase.train)
        _check_text(prepared, phase)
        new = prepared.encoded(phase)
        _check_length(phase, sum(len(one.rows) for one in new))
        if phase.replay and phase.replay.ratio > 0:
            replayed = check_replay(phase, prepared.pools[phase.name], new, prepared.replay_encoder(phase))
            if warning := replayed.warning(phase.name):
                prepared.once(
                    ("warned", warning), partial(prepared.watch.note, warning, "warning")
                )  # once, not for each arm
    if prepared.recipe.model.quantize == "nf4" and (share := quantised_share(prepared.meta_model)) < FEW:
        prepared.watch.note(
            f"only {share:.0%} of the weights of {_config(prepared).model_type} (without embeddings and head) are in "
            "linear modules: the rest, such as experts, stays in 16 bits and gets no adapter",
            "warning",
        )


def _check_tokenizer(prepared: Prepared) -> None:
    """Check that the embedding has a row for every token, and that the template can think where thinking is on."""
    rows = int(prepared.meta_model.get_input_embeddings().weight.shape[0])
    beyond = prepared.template.beyond(rows)
    if beyond:
        number = prepared.tokenizer.convert_tokens_to_ids(beyond[0])
        raise InputError(
            f"model: the embedding of {prepared.recipe.model.name!r} has {rows:,} rows, but {len(beyond)} of its "
            f"tokenizer's tokens have larger ids, such as {beyond[0]!r} ({number:,})",
            "use the tokenizer that came with the weights, or save the model after resize_token_embeddings",
        )
    for phase in prepared.recipe.phases:
        if phase.thinking == "on" and not prepared.template.thinks:
            raise InputError(
                f"{phase.name}.thinking: the chat template of {prepared.recipe.model.name!r} has no place for thoughts",
                f"keep {phase.name}.thinking: auto",
            )


def _check_text(prepared: Prepared, phase: Phase) -> None:
    """Check that a phase that trains only on raw text sets no keys of the chat template, which it does not use."""
    rows = [row for rows in prepared.rows[phase.name] for row in rows]
    for key, given in (("system", bool(phase.system)), ("thinking", phase.thinking != "auto")):
        if given and rows and all(row.text is not None for row in rows):
            raise InputError(
                f"{phase.name}.{key}: {phase.name} trains on raw text, which uses no chat template",
                f"omit {phase.name}.{key}, or give the phase instructions",
            )


def check_tasks(prepared: Prepared, tasks: Iterable[str]) -> None:
    """Check that the tasks' data, columns and packages are available. Raises InputError."""
    for task in tasks:
        assert prepared.catalog is not None
        prepared.catalog.check(task)
        if task == ALPACA_EVAL:
            alpaca_prompts(prepared.recipe.evaluate.local.get(ALPACA_EVAL))


def _check_layers(prepared: Prepared, phase: Phase, weights: bool) -> None:
    """Check that the freeze spec and the targets fit the model, and that the deltas can be merged."""
    from qcft.layers import adapted_in, linear_modules

    modules = adapted_in(prepared.meta_model, prepared.recipe, phase)
    targets = linear_modules(prepared.meta_model, prepared.recipe.lora.targets)
    full = max(min(module.shape) for module in targets)
    ranks = {f"peft.rank_pattern.{key}": rank for key, rank in prepared.recipe.lora.peft.rank_pattern.items()}
    for key, rank in {"r": prepared.recipe.lora.r, **ranks}.items():
        if rank > full:
            raise InputError(
                f"recipe: lora.{key}: {rank} is more than the rank that any change of this model can have",
                f"use at most {full}, the smaller side of its largest matrix; 8 to 64 are common",
            )
    _check_peft(prepared, [module.name for module in targets])
    if prepared.meta_model.base_model is prepared.meta_model:
        raise InputError(
            f"model: {_config(prepared).model_type} has no inner model separate from its head, which training needs",
            "use another model",
        )
    if prepared.recipe.model.quantize == "nf4" and (family := _config(prepared).model_type) in NOT_IN_4_BITS:
        raise InputError(
            f"model: {family} multiplies with its projection weights directly, so they cannot be in 4 bits",
            "train it in 16 bits: --set model.quantize=none",
        )
    check_adaptable(prepared.meta_model, _of_each_kind(prepared.meta_model, modules), prepared.recipe.lora)
    if not weights or phase.name == prepared.recipe.phases[-1].name:
        return
    unmergeable = {f"{name}.weight" for name in modules} - stored_names(prepared.meta_model, prepared.folder).keys()
    if unmergeable:
        raise InputError(
            f"model: {prepared.recipe.model.name!r} has no separate tensor for {min(unmergeable)}, onto which "
            f"{phase.name} could be merged",
            "name other modules with lora.targets, or start the next phase stacked",
        )


def _check_peft(prepared: Prepared, targets: list[str]) -> None:
    """Check that each pattern of `lora.peft` matches a module (by full name), and that what it trains beside the
    factors can be merged, and saved by processes that share the weights."""
    from qcft.private import private
    from qcft.training.distributed.ranks import sharded

    peft = prepared.recipe.lora.peft
    matched = private("peft.utils.other:get_pattern_key")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(peft, field):
            if all(matched([pattern], name) != pattern for name in targets):
                raise InputError(
                    f"recipe: lora.peft.{field}: no adapted module's name ends in {pattern!r}",
                    f"name a module of lora.targets, such as {targets[0]}, or a pattern of several",
                )
    if peft.lora_bias and (without := [n for n in targets if prepared.meta_model.get_submodule(n).bias is None]):
        raise InputError(
            f"recipe: lora.peft.lora_bias: {without[0]} has no bias that the adapter's could be merged into",
            "omit lora_bias, or name modules with a bias in lora.targets",
        )
    if peft.beyond_factors and sharded():
        raise InputError(
            f"recipe: lora.peft.{peft.beyond_factors} is not trained by processes that share the weights (FSDP)",
            "omit it, or launch with --multi_gpu instead of --use_fsdp",
        )


def _config(prepared: Prepared) -> Any:
    return prepared.meta_model.config.get_text_config()


def _of_each_kind(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """The modules in the first layer of each kind: layers with the same structure are treated in the same way."""
    from qcft.layers import decoder_layers

    prefix, count = decoder_layers(model)
    adapted: list[list[str]] = [[] for _ in range(count)]
    for name in modules:
        adapted[int(name[len(prefix) + 1 :].partition(".")[0])].append(name)
    kinds: dict[object, list[str]] = {}
    layers: Any = model.get_submodule(prefix)
    for number, layer in enumerate(layers):
        made_of = tuple((name, type(module)) for name, module in layer.named_modules())
        types = tuple(name[len(f"{prefix}.{number}.") :] for name in adapted[number])
        kinds.setdefault((made_of, types), adapted[number])
    return [name for names in kinds.values() for name in names]


def check_adapter(prepared: Prepared, folder: Path) -> None:
    """Check that an adapter made elsewhere fits the model."""
    weights = {name: tuple(weight.shape) for name, weight in prepared.meta_model.state_dict().items()}
    hint = f"it was made for another model than {prepared.recipe.model.name!r}"
    check_fit(folder, prepared.meta_model)
    adapter = read_adapter(folder)
    if any(phase.start == "stacked" for phase in prepared.recipe.phases[1:]):
        check_stack([adapter, adapter])
    if any(phase.freeze.measure == "change" for phase in prepared.recipe.phases[1:]):
        check_factors(adapter)
    check_biases(adapter, weights)
    for name, change in adapter.changes.items():
        if name not in weights:
            raise InputError(f"adapter: {str(folder)!r} changes {name}, which the model lacks", hint)
        try:
            check_shape(name, change, weights[name], adapter.transposed)
        except QcftError as error:
            raise InputError(f"adapter: {str(folder)!r}: {error.message}", hint) from None
    said = str((read_json(folder / CONFIG) or {}).get("base_model_name_or_path") or "")
    if said and _last(said) not in {_last(prepared.recipe.model.name), _last(str(prepared.described))}:
        prepared.watch.note(
            f"the adapter {str(folder)!r} was made for {said!r}, not {prepared.recipe.model.name!r}", "warning"
        )


def _last(model: str) -> str:
    """A model's name without owner or folders, which differ between machines."""
    return Path(model).name.lower()


def _check_length(phase: Phase, rows: int) -> None:
    """Refuse a training that is too long for any machine, and whose order of rows would not fit in memory."""
    train = phase.train
    total = train.steps * train.batch if train.steps else train.epochs * rows
    if total > MOST_ROWS:
        key = "steps" if train.steps else "epochs"
        raise InputError(
            f"recipe: {phase.name}.train.{key}: {getattr(train, key):g} means {total:.2g} rows to train on",
            f"qcft trains on at most {MOST_ROWS:,}",
        )
