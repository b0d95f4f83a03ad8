"""Features of a residual-stream dictionary as nodes: integrated gradients for all, exact effects for some.

Shape letters: B sequences, T tokens, D width, F features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.metric import Metric, measure
from discovery.circuits.pairs import Pair, contrast_start
from discovery.errors import DiscoveryError
from interpretops.artifacts.dictionary import Dictionary
from interpretops.steering.dictionary_features import DictionaryFeatures

Group = Sequence[int]
"""Features that take their counterfactual values together."""


class FeatureSite:
    """A dictionary's features at their site: the residual stream after a layer."""

    def __init__(self, decoder: GraphDecoder, dictionary: Dictionary) -> None:
        manifest = dictionary.manifest
        if manifest.point != "resid_post":
            raise DiscoveryError(
                f"dictionary {manifest.id}: point = {manifest.point}, but features are searched in the "
                "residual stream; name a dictionary of resid_post"
            )
        self.decoder, self.manifest, self.max_norm = decoder, manifest, dictionary.max_norm
        self.features = DictionaryFeatures(
            dictionary.weights, decoder.network.get_input_embeddings().weight.detach()
        )
        self.write = self.features.write
        self.before = range(manifest.layer + 1)
        self.after = range(manifest.layer + 1, decoder.graph.layers)

    def activations(self, x: Tensor) -> Tensor:
        """Activations [..., F] of every feature; zero at an attention sink."""
        return torch.where(x.norm(dim=-1, keepdim=True) <= self.max_norm, self.features.encode(x), 0)

    @contextmanager
    def contrast(self, pairs: Sequence[Pair]) -> Iterator["Contrast"]:
        """Both sides of these pairs at the site, from the first differing token on."""
        start = contrast_start(pairs)
        with self.decoder.behind([pair.clean[:start] for pair in pairs]):
            with torch.no_grad():
                clean, corrupted = (
                    self.decoder.run(self.decoder.embed(tokens), layers=self.before)[0]
                    for tokens in ([p.clean[start:] for p in pairs], [p.corrupted[start:] for p in pairs])
                )
                gained = self.activations(clean) - self.activations(corrupted)
            yield Contrast(clean, corrupted, gained)

    def value(self, metric: Metric, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """The metric [B] if the stream after the site's layer is ``x``."""
        return measure(metric, self.decoder.logits(self.decoder.run(x, layers=self.after)[0]), pairs)


@dataclass(frozen=True, eq=False)
class Contrast:
    """The stream [B, T, D] of clean and corrupted prompts, and the feature difference: clean - corrupted."""

    clean: Tensor
    corrupted: Tensor
    gained: Tensor
    """[B, T, F]"""


def feature_scores(site: FeatureSite, pairs: Sequence[Pair], metric: Metric, steps: int) -> Tensor:
    """Integrated gradients [B, F + 1] of every feature and, last, of the reconstruction error, on the CPU.

        score(f) = sum_t (a_f(x) - a_f(x')) . 1/m sum_k dM(z' + c_k (z - z')) / da_f

    z and z' are the stream after the layer on the clean and the corrupted prompt, da_f acts along f's decoder
    row, c_k are midpoints; after Marks et al. 2024, "Sparse Feature Circuits" (arXiv:2403.19647). As there,
    the error node is the part of z - z' that the features do not explain. All scores of a pair sum to
    M(x) - M(x') up to the error of m.
    """
    with site.contrast(pairs) as found:
        change = found.clean - found.corrupted
        gradient = torch.zeros_like(change)
        for step in range(steps):
            point = (found.corrupted + (step + 0.5) / steps * change).requires_grad_()
            gradient += torch.autograd.grad(site.value(metric, point, pairs).sum(), point)[0] / steps
        features = torch.einsum("btf,btf->bf", gradient @ site.write.T, found.gained)
        whole = torch.einsum("btd,btd->b", gradient, change)
    return torch.cat([features, (whole - features.sum(1))[:, None]], 1).cpu()


@torch.no_grad()
def feature_effects(
    site: FeatureSite, pairs: Sequence[Pair], metric: Metric, groups: Sequence[Group]
) -> Tensor:
    """Exact effects M(x) - M(x edited), [B, G + 2]: of each group, then of all features, then of the error.

    The edit is the engine's: x' = x + (a_corrupted - a_clean) . decoder row, for every feature of a group, at
    every token. For the error, it is the remaining difference to the corrupted stream after all those edits.
    """
    with site.contrast(pairs) as found:
        whole = site.value(metric, found.clean, pairs)
        everything = found.gained @ site.write
        edits = [found.gained[..., list(group)] @ site.write[list(group)] for group in groups]
        edits += [everything, found.clean - found.corrupted - everything]
        effects = [whole - site.value(metric, found.clean - edit, pairs) for edit in edits]
    return torch.stack(effects, 1).cpu()
