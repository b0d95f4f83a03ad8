"""The op behind PyTorch's compiler: its work is looked up at run time, never fixed at trace time."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from steering_kernels.ops import site_op


class Adds:
    """Adds a changeable number at site 1."""

    def __init__(self, amount: float) -> None:
        self.amount = amount
        self.capturing = False
        self.seen: list[tuple[int, bool, bool]] = []

    def run_at(self, number: int, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        self.seen.append((number, residual is not None, source is not None))
        hidden += self.amount if number == 1 else 0.0


class Model(nn.Module):
    """Two layers, each followed by a site."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.register_forward_hook(lambda _, args, out: site_op.edit_site(out, args[0], None, 0))
        self.second.register_forward_hook(lambda _, args, out: site_op.edit_site(out, None, args[0], 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out * 2


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_op, "_OWNER", [])


@torch.inference_mode()
def test_compiled_model_uses_the_state_at_run_time() -> None:
    """One graph, traced once: the added number and the number of tokens change afterwards."""
    model, adds = Model(), Adds(0.0)
    site_op.claim_site_op(adds)
    traced = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    x = torch.randn(3, 4)
    plain = compiled(x)
    adds.amount = 0.5
    torch.testing.assert_close(compiled(x), plain + 1.0)
    torch.testing.assert_close(compiled(torch.cat([x, x]))[3:], plain + 1.0)
    assert len(traced) == 1
    assert adds.seen[:2] == [(0, True, False), (1, False, True)]
    calls = [node for node in traced[0].graph.nodes if "edit_site" in str(node.target)]
    assert len(calls) == 2


def test_op_without_its_model_is_an_error() -> None:
    """A compiled model whose plans are gone raises instead of running unsteered."""
    with pytest.raises(RuntimeError, match="no steered model is registered in this process"):
        site_op.edit_site(torch.zeros(1, 4), None, None, 0)
    site_op.claim_site_op(Adds(1.0))  # and is garbage-collected at once
    with pytest.raises(RuntimeError, match="no steered model is registered in this process"):
        site_op.edit_site(torch.zeros(1, 4), None, None, 0)


def test_second_compiled_model_is_refused_while_the_first_lives() -> None:
    """The op can only run one model's sites, since calls do not identify their model."""
    first, second = Adds(1.0), Adds(2.0)
    site_op.claim_site_op(first)
    site_op.claim_site_op(first)
    with pytest.raises(RuntimeError, match="one compiled model"):
        site_op.claim_site_op(second)
    del first
    site_op.claim_site_op(second)


def test_op_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """During CUDA graph capture the op raises, since the graph would repeat its edits."""
    adds = Adds(1.0)
    site_op.claim_site_op(adds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured in a CUDA graph"):
        site_op._run(SimpleNamespace(is_cuda=True), None, None, 0)  # type: ignore[arg-type]
    assert adds.seen == []
