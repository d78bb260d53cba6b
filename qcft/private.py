"""Names of other libraries that are not public, and what fails without each.

There is no public alternative to them, and any release may remove them. Each is looked up by `private` when it is
needed: a missing one is an error that names the library and its version, never a fallback, which could give other
results. The upper bounds in pyproject.toml are the newest minor versions that were tested with all of them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any

from qcft.errors import QcftError
from qcft.installing import install

NAMES = {
    "trl.kernels:ChunkedLogProbFunction": "the estimate of the head's cost and the first step on a card",
    "trl.kernels.chunked_logprob:_TRITON_AVAILABLE": "training without Triton",
    "trl.trainer.sft_trainer:DataCollatorForLanguageModeling": "training: rows that are padded or packed",
    "trl.trainer.utils:add_fused_lm_head": "the check that the fused head agrees with the model's own",
    "trl:SFTTrainer.create_model_card": "training: checkpoints without a model card",
    "transformers:Trainer._load_from_checkpoint": "training: resuming with all adapters",
    "transformers:Trainer._save_optimizer_and_scheduler": "training: the optimizer's state of several processes",
    "transformers:Trainer._load_optimizer_and_scheduler": "training: the optimizer's state of several processes",
    "transformers:AutoModelForCausalLM._model_mapping": "the class of a model",
    "transformers:AutoModelForImageTextToText._model_mapping": "the class of a model with an image encoder",
    "transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS": "the rotary embeddings of a GGUF file",
    "transformers.integrations.sdpa_attention:sdpa_attention_forward": "attention row by row",
    "transformers.utils.chat_template_utils:render_jinja_template": "chat templates",
    "transformers.quantizers.base:get_keys_to_not_convert": "which modules are loaded in 4 bits",
    "transformers.quantizers.quantizers_utils:should_convert_module": "which modules are loaded in 4 bits",
    "transformers.conversion_mapping:get_model_conversion_mapping": "the names of stored weights",
    "transformers.core_model_loading:rename_source_key": "the names of stored weights",
    "transformers.core_model_loading:WeightConverter": "the names of stored weights",
    "transformers.core_model_loading:WeightRenaming": "the names of stored weights",
    "peft.utils.other:get_pattern_key": "the scale of an adapter",
    "accelerate:PartialState._shared_state": "FSDP on CPUs",
    "lm_eval.tasks._factory:TaskFactory": "the tasks of lm-eval",
    "lm_eval.tasks._yaml_loader:load_yaml": "the tasks of lm-eval",
}
# Attributes that instances have, but not their class.
ATTRIBUTES = {
    "transformers:PreTrainedModel.all_tied_weights_keys": "weights that are tied",
    "transformers:BaseModelOutput.last_hidden_state": "a head that scores answer tokens only",
    "peft:BaseTunerLayer._active_adapter": "the model that a phase starts from, beside the one that it trains",
}
TRAINING = [path for path, needed in NAMES.items() if needed.startswith("training: ")]


def private(path: str) -> Any:
    """The object behind a `module:name` of NAMES. Raises QcftError when the library no longer has it."""
    module, _, names = path.partition(":")
    try:
        found: Any = import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        raise _gone(path) from None
    return found


def of(instance: Any, path: str) -> Any:
    """An attribute of an instance, by its path in ATTRIBUTES. Raises QcftError where instances lack it."""
    try:
        return getattr(instance, path.rpartition(".")[2])
    except AttributeError:
        raise _gone(path) from None


def in_order(path: str, function: Any, given: dict[str, Any]) -> list[Any]:
    """Arguments in the order of a function that takes them by position only, after its first. Raises QcftError where
    its parameters are others."""
    wanted = list(signature(function).parameters)[1:]
    if set(wanted) != set(given):
        raise _gone(path)
    return [given[name] for name in wanted]


def check_training() -> None:
    """Raise QcftError where a name is missing that a training overrides or uses late, which would not be noticed."""
    for path in TRAINING:
        private(path)


def _gone(path: str) -> QcftError:
    library = path.partition(":")[0].partition(".")[0].replace("_", "-")
    try:
        found = version(library)
    except PackageNotFoundError:
        return QcftError(f"{library} is not installed", install([library]))
    return QcftError(
        f"{library} {found} has no {path.partition(':')[2]} as qcft expects it, which it needs for "
        f"{(NAMES | ATTRIBUTES)[path].removeprefix('training: ')}",
        f"install a version that qcft was tested with: {install([library])}",
    )
