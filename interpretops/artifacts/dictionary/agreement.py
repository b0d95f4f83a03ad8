"""Checks that a library's configuration, stored with the weights, agrees with our manifest.

Fields that the configuration omits are not checked. Neither are the model's name, because the manifest's
fingerprint decides, and the dtype, which only says how the library computed.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interpretops.artifacts.dictionary.manifest import MANIFEST_NAME, DictionaryManifest, Layout
from interpretops.errors import DictionaryError
from interpretops.files.json_file import object_in, read_json_object

Claims = list[tuple[str, Any, str, Any]]
"""A field of the configuration, its value, the manifest's field, and the value the manifest must have."""

_TRANSFORMER_LENS = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<hook>(?:attn\.)?hook_\w+)")
_HUGGING_FACE = re.compile(r"(?:model|gpt_neox)\.layers\.(?P<layer>\d+)(?P<module>(?:\.\w+)*)")
_SUBMODULE = re.compile(r"(?P<point>resid_post|attention_out|mlp_out)_layer_(?P<layer>\d+)")

_HOOKS = {
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
}
_MODULES = {"": "resid_post", ".mlp": "mlp_out", ".self_attn": "attn_out", ".attention": "attn_out"}
_SUBMODULES = {"resid_post": "resid_post", "mlp_out": "mlp_out", "attention_out": "attn_out"}


def check_agreement(folder: Path, manifest: DictionaryManifest) -> None:
    """Raise `DictionaryError` at the first field in which the configuration contradicts the manifest."""
    if manifest.layout not in _READERS:
        return
    name, read = _READERS[manifest.layout]
    path = folder / name
    for field, value, ours, meant in read(read_json_object(path, DictionaryError)):
        found = getattr(manifest, ours)
        if meant != found:
            means = "" if meant == value else f" ({meant})"
            raise DictionaryError(
                f"{path}: {field} = {value!r}{means}, but {MANIFEST_NAME} has {ours} = {found!r}; one of the "
                "two belongs to another dictionary"
            )


def _saelens(config: dict[str, Any]) -> Claims:
    metadata = object_in(config, "metadata")

    def named(*fields: str) -> tuple[str, Any]:
        """The first field that is set: in the metadata of newer files, at the top level of older ones."""
        for field in fields:
            for prefix, place in (("metadata.", metadata), ("", config)):
                if place.get(field) is not None:
                    return prefix + field, place[field]
        return fields[0], None

    claims = _sizes(config, "d_in", "d_sae")
    field, hook = named("hook_name", "hook_point")
    layer_field, layer = named("hook_layer", "hook_point_layer")
    site = _site_of_hook(hook)
    if site is not None:
        claims += [(field, hook, "layer", site[0]), (field, hook, "point", site[1])]
    elif layer is not None:
        claims.append((layer_field, layer, "layer", layer))
    if config.get("reshape_activations") == "hook_z":
        claims.append(("reshape_activations", "hook_z", "point", "attn_z"))
    normalised = config.get("normalize_activations")
    if normalised == "expected_average_only_in":  # else the scale would be applied twice
        claims.append(("normalize_activations", normalised, "normalisation", "none"))
    field, head = named("hook_head_index")
    if head is not None:
        claims.append((field, head, "point", f"head {head} alone"))
    return claims


def _site_of_hook(name: Any) -> tuple[int, str] | None:
    """Layer and point of a hook's name; a hook that is not an edit site keeps its own name as the point."""
    if not isinstance(name, str):
        return None
    if (match := _TRANSFORMER_LENS.fullmatch(name)) is not None:
        layer, hook = int(match["layer"]), match["hook"]
        if hook == "hook_resid_pre" and layer > 0:
            return layer - 1, "resid_post"
        return layer, _HOOKS.get(hook, hook)
    if (match := _HUGGING_FACE.fullmatch(name)) is not None and match["module"] in _MODULES:
        return int(match["layer"]), _MODULES[match["module"]]
    return None


def _sparsify(config: dict[str, Any]) -> Claims:
    width, factor, size = config.get("num_latents"), config.get("expansion_factor"), config.get("d_in")
    claims = _sizes(config, "d_in", "num_latents" if width else "")
    if not width and isinstance(factor, int) and isinstance(size, int):
        claims.append(("expansion_factor", factor, "width", factor * size))
    return claims


def _dictionary_learning(config: dict[str, Any]) -> Claims:
    trainer = object_in(config, "trainer")
    claims = _sizes(trainer, "activation_dim", "dict_size")
    if trainer.get("layer") is not None:
        claims.append(("layer", trainer["layer"], "layer", trainer["layer"]))
    submodule = trainer.get("submodule_name")
    match = _SUBMODULE.fullmatch(submodule) if isinstance(submodule, str) else None
    if match is not None:
        claims.append(("submodule_name", submodule, "point", _SUBMODULES[match["point"]]))
        claims.append(("submodule_name", submodule, "layer", int(match["layer"])))
    return [(f"trainer.{field}", *claim) for field, *claim in claims]


def _sizes(config: dict[str, Any], activation: str, features: str) -> Claims:
    fields = {activation: "hidden_size", features: "width"}
    return [
        (field, config[field], ours, config[field])
        for field, ours in fields.items()
        if config.get(field) is not None
    ]


_READERS: dict[Layout, tuple[str, Callable[[dict[str, Any]], Claims]]] = {
    "saelens": ("cfg.json", _saelens),
    "sparsify": ("cfg.json", _sparsify),
    "dictionary_learning": ("config.json", _dictionary_learning),
}
