"""SAELens' own evaluation of a dictionary on the same tokens as ours, to cross-check our numbers.

SAELens cannot skip attention sinks, but it can skip token *ids*. So each sink gets a marked id above the
vocabulary, and the model's wrapper removes the mark. SAELens then splices and counts the same tokens as we
do. Its ``ce_loss_score`` compares with a zero activation, our ``ce_recovered`` with the mean activation.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from discovery.frozen_model import FrozenModel, hook_name


@torch.no_grad()
def saelens_metrics(
    model: FrozenModel, layer: int, max_norm: float, folder: Path, tokens: Tensor, mask: Tensor
) -> dict[str, float]:
    """SAELens' variance, sparsity and cross-entropy metrics of the dictionary in ``folder`` on [B, T] ids."""
    from sae_lens import SAE
    from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    vocabulary = model.spec.vocab_size
    sequences: list[Tensor] = []
    for ids, live in zip(tokens, mask, strict=True):
        row = ids[live.bool()][None].to(model.device)
        x = model.residuals(row, torch.ones_like(row), [layer])[layer].float()
        sequences.append(torch.where(x.norm(dim=-1) > max_norm, row + vocabulary, row))
    seen = torch.cat([row[0] for row in sequences])
    marked = sorted(set(seen[seen >= vocabulary].tolist())) or [2 * vocabulary]

    def store() -> Any:
        left = iter(sequences)
        return SimpleNamespace(get_batch_tokens=lambda _size: next(left))

    sae = SAE.load_from_disk(folder, dtype="float32", device=str(model.device))
    sae.cfg.metadata.hook_name = hook_name(layer)
    wrapped: Any = _Unmarked(model, vocabulary)
    told: dict[str, Any] = {
        "n_batches": len(sequences),
        "eval_batch_size_prompts": 1,
        "ignore_tokens": marked,
    }
    variance, density = get_sparsity_and_variance_metrics(
        sae,
        wrapped,
        store(),
        ActivationScaler(),
        compute_l2_norms=False,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        model_kwargs={},
        **told,
    )
    downstream = get_downstream_reconstruction_metrics(
        sae, wrapped, store(), ActivationScaler(), compute_kl=False, compute_ce_loss=True, **told
    )
    dead = sum(share == 0 for share in density["feature_density"]) / len(density["feature_density"])
    chosen = {name: variance[name] for name in ("explained_variance", "l0", "mse", "cossim")}
    return {
        name: round(float(value), 6) for name, value in (chosen | downstream | {"dead_share": dead}).items()
    }


class _Unmarked:
    """A model with the interface that SAELens expects (TransformerLens' bridge), for marked ids."""

    def __init__(self, model: FrozenModel, vocabulary: int) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.vocabulary = vocabulary
        self.bridge = TransformerBridge.boot_transformers(
            str(model.folder), device=model.device, dtype=model.network.dtype, tokenizer=model.tokenizer
        )

    def __call__(self, tokens: Tensor, **told: Any) -> Any:
        return self.bridge(tokens % self.vocabulary, prepend_bos=False, **told)

    def run_with_hooks(
        self, tokens: Tensor, fwd_hooks: list[tuple[str, Callable[..., Any]]], **told: Any
    ) -> Any:
        return self.bridge.run_with_hooks(
            tokens % self.vocabulary, fwd_hooks=fwd_hooks, prepend_bos=False, **told
        )

    def run_with_cache(self, tokens: Tensor, **told: Any) -> Any:
        return self.bridge.run_with_cache(tokens % self.vocabulary, **told)
