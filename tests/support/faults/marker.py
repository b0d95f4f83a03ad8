"""A policy under which the model can only say one word, so that every answer shows whether it was steered."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers

POLICY = "marker"
WORD = "firehose"
"""A token of the default model's vocabulary whose unembedding is far from all others."""
_STRENGTH = 1e4

POLICY_YAML = """
meta: {{id: {policy}}}
interventions:
  - type: steering_vector
    selector: {{layer: {layer}}}
    vector: {{file: {policy}.safetensors}}
    strength: {strength}
"""


def write_marker_policy(folder: Path, model: Path) -> Path:
    """The policy and its vector: after the last layer the residual stream is almost only the word's
    direction."""
    config = json.loads((model / "config.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for file in model.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    assert head.dtype in (np.float32, ml_dtypes.bfloat16)
    token = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(WORD)
    direction = head[token].astype(np.float32)
    direction /= np.linalg.norm(direction)
    scores = head.astype(np.float32) @ (direction * tensors["model.norm.weight"].astype(np.float32))
    assert int(scores.argmax()) == token
    safetensors.numpy.save_file({"vector": direction}, folder / f"{POLICY}.safetensors")
    path = folder / f"{POLICY}.yaml"
    last = config["num_hidden_layers"] - 1
    path.write_text(POLICY_YAML.format(policy=POLICY, layer=last, strength=_STRENGTH))
    return path


def steered_only(text: str) -> bool:
    """Whether ``text`` is only the word, repeated, possibly truncated."""
    return re.fullmatch(f"(?:{WORD})*", text) is not None
