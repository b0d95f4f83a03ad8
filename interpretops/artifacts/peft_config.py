"""Which PEFT LoRA configurations are an edit: ``W x + scaling * B A x`` with unchanged base weights.

Every field of PEFT's `LoraConfig` is in one of the three lists below; a test fails if PEFT adds one.
"""

from pathlib import Path
from typing import Any

from interpretops.errors import AdapterError

READ_FIELDS = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "lora_dropout"}
)
"""Fields that define the edit. Dropout acts only in training."""

DESCRIPTIVE_FIELDS = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "interpretops",
    }
)
"""Fields without effect on a trained adapter: its tensors show which layers it has."""

_CHANGES_THE_MODEL = "it changes the model outside the adapter"
_CHANGES_THE_FORM = "it computes something other than W x + scaling * B A x"

REFUSED_FIELDS: dict[str, str] = {
    "use_dora": "it scales every output by a learned magnitude",
    "fan_in_fan_out": "it is for layers that store their weights transposed",
    "bias": _CHANGES_THE_MODEL,
    "modules_to_save": _CHANGES_THE_MODEL,
    "trainable_token_indices": _CHANGES_THE_MODEL,
    "layer_replication": _CHANGES_THE_MODEL,
    "kasa_config": _CHANGES_THE_MODEL,
    "rank_pattern": "the scale differs from layer to layer; use one rank and alpha",
    "alpha_pattern": "the scale differs from layer to layer; use one rank and alpha",
    "lora_bias": _CHANGES_THE_FORM,
    "target_parameters": _CHANGES_THE_FORM,
    "alora_invocation_tokens": "it acts only after its invocation tokens; use a gate instead",
    "use_qalora": _CHANGES_THE_FORM,
    "use_bdlora": _CHANGES_THE_FORM,
    "arrow_config": _CHANGES_THE_FORM,
    "monteclora_config": _CHANGES_THE_FORM,
    "velora_config": "its results have not been compared with PEFT's",
    "megatron_config": "its layers are not those of transformers",
}
"""Fields that must be unset, and why."""

INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Values of ``init_lora_weights``, other than true and false, that do not change the base weights."""


def check_lora_config(path: Path, config: dict[str, Any]) -> None:
    """Raise `AdapterError` unless the configuration describes an adapter that is an edit."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type = {config.get('peft_type')!r}, but must be 'LORA'")
    _check_initialisation(path, config.get("init_lora_weights"))
    for field, value in config.items():
        if not value or (field, value) == ("bias", "none"):
            continue
        if field in REFUSED_FIELDS:
            raise AdapterError(
                f"{path}: {field} = {_shown(value)}, which is not supported: {REFUSED_FIELDS[field]}"
            )
        if field not in READ_FIELDS | DESCRIPTIVE_FIELDS:
            raise AdapterError(
                f"{path}: {field} = {_shown(value)}, an unknown field that may change what the "
                "adapter computes; save the adapter without it"
            )


def _check_initialisation(path: Path, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str) or value.lower() not in INITIALISATIONS:
        raise AdapterError(
            f"{path}: init_lora_weights = {_shown(value)}, an initialisation that changes the base weights: "
            "the adapter does not fit this model; have PEFT convert it to a plain LoRA where it was trained "
            "(save_pretrained with path_initial_model_for_weight_conversion), or train it again with "
            f"true, false or one of {', '.join(sorted(INITIALISATIONS))}"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
