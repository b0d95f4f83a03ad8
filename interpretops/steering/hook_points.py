"""The hooks that run the op at a model's edit sites; the model's family says where these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interpretops.errors import ModelError
from interpretops.model.family import Family, family_of
from interpretops.plan import Point, Site
from interpretops.steering.plan_bank import PlanBank
from steering_kernels.ops import apply_edits, apply_edits_captured, update_gates
from steering_kernels.ops.site_op import claim_site_op, edit_site


def find_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The model's decoder layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.endswith("layers"):
            return module
    raise ModelError(f"{type(model).__name__} has no list of {num_layers} layers")


def site_module(layers: nn.ModuleList, family: Family, site: Site) -> nn.Module:
    """The module whose output is the site's activation; at ``attn_z``, whose input it is."""
    layer = layers[site.layer]
    name: dict[Point, str] = {
        "attn_z": family.attention_projection,
        "attn_proj": family.attention_projection,
        "attn_out": family.attention_out,
        "mlp_out": family.mlp_out,
        "resid_post": "",
    }
    return layer.get_submodule(name[site.point])


class SiteHooks:
    """Runs the op at the sites that resident revisions use, and nothing at other sites.

    Hooks are added and removed with the plans. A model that will be compiled has permanent hooks at its
    ``fixed`` sites: one opaque call each, whether or not a revision uses the site.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: PlanBank,
        *,
        residual_pair: bool,
        fixed: Sequence[Site] = (),
        in_place: bool = True,
    ) -> None:
        """``residual_pair``: layers return ``(hidden, residual)``, whose sum is the stream, as in vLLM.

        ``in_place``: whether an activation may be overwritten. It may not if others may hold it, such as a
        user's own hooks in a Hugging Face model. Fixed sites are always written in place.
        """
        self.bank = bank
        self.in_place = in_place
        self.family = family_of(bank.spec.architecture)
        self.layers = find_layers(model, bank.spec.num_layers)
        self.residual_pair = residual_pair
        self._handles: dict[Site, torch.utils.hooks.RemovableHandle] = {}
        self._fixed = tuple(sorted(fixed, key=lambda site: site.order))
        self.capturing = False
        """Whether to run the op's CUDA-graph form: set while graphs are captured and warmed up."""
        if self._fixed:
            claim_site_op(self)
            for number, site in enumerate(self._fixed):
                self._handles[site] = self._install_opaque(site, number)

    def refresh(self) -> None:
        """Install hooks at exactly the sites now in use, unless the sites are fixed."""
        if self._fixed:
            return
        wanted = self.bank.active_sites
        for site in list(self._handles):
            if site not in wanted:
                self._handles.pop(site).remove()
        for site in sorted(wanted - set(self._handles), key=lambda site: site.order):
            self._handles[site] = self._install(site)

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _install(self, site: Site) -> torch.utils.hooks.RemovableHandle:
        module = site_module(self.layers, self.family, site)
        if site.point == "attn_z":
            return module.register_forward_pre_hook(self._before(site))
        # attn_proj and attn_out may share a module: attn_proj must always run first.
        return module.register_forward_hook(self._after(site), prepend=site.point == "attn_proj")

    def _install_opaque(self, site: Site, number: int) -> torch.utils.hooks.RemovableHandle:
        """A hook that a compiler can trace: it calls the op unconditionally."""
        module = site_module(self.layers, self.family, site)
        pair = self.residual_pair and site.point == "resid_post"
        reads_input = site.point == "attn_proj"

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            edit_site(args[0], None, None, number)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            edit_site(hidden, output[1] if pair else None, args[0] if reads_input else None, number)

        if site.point == "attn_z":
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after, prepend=reads_input)

    def run_at(self, number: int, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        """Edit in place at the fixed site with this number."""
        if self.capturing:
            table = self.bank.tables[self._fixed[number]]
            if table.sum_ranks is None:  # else no pass that needs the table is replayed
                others = (None if other is None else _flat(other) for other in (residual, source))
                apply_edits_captured(_flat(hidden), table, self.bank.step, *others)
            return
        self.bank.step.check_laid_out()
        if not self.bank.step.active:
            return
        edited = self._run(self._fixed[number], hidden, residual, source)
        if edited is not hidden:
            hidden.copy_(edited)

    def _before(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            self.bank.step.check_laid_out()
            if not self.bank.step.active:
                return None
            edited = self._run(site, args[0], None)
            return None if edited is args[0] else (edited, *args[1:])

        return hook

    def _after(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        pair = self.residual_pair and site.point == "resid_post"

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self.bank.step.check_laid_out()
            if not self.bank.step.active:
                return None
            is_tuple = isinstance(output, tuple)
            hidden = output[0] if is_tuple else output
            source = args[0] if site.point == "attn_proj" else None
            edited = self._run(site, hidden, output[1] if pair else None, source)
            if edited is hidden:
                return None
            return (edited, *output[1:]) if is_tuple else edited

        return hook

    def _run(
        self, site: Site, hidden: Tensor, residual: Tensor | None, source: Tensor | None = None
    ) -> Tensor:
        flat = hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])
        if source is not None:
            source = source.reshape(-1, source.shape[-1])
        step = self.bank.step
        gates = self.bank.gates_at.get(site)
        if gates:
            stream = flat if residual is None else flat + residual
            update_gates(stream[: step.num_tokens], gates, step)
        table = self.bank.tables.get(site)
        if table is not None and table.views:
            if not self.in_place:
                if not any(row in table.views for row in step.rows):
                    return hidden
                flat = flat.clone()
            apply_edits(flat, table, step, residual, source)
        return hidden if flat.data_ptr() == hidden.data_ptr() else flat.view(hidden.shape)


def _flat(activation: Tensor) -> Tensor:
    """[T, D] in the same storage: vLLM's Transformers backend passes a batch of one."""
    return activation.view(-1, activation.shape[-1])
