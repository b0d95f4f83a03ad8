"""The op where engines have it on a GPU: inside a captured graph, and inside a compiled model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_kernels.ops import RowEdits, SiteTable, StepMap, apply_edits, apply_edits_captured, site_op

pytestmark = pytest.mark.gpu

WIDTH, ROOM = 96, 12
CUDA = torch.device("cuda")


def make_row(seed: int, units: int, gate: int = 0) -> RowEdits:
    rng = torch.Generator().manual_seed(seed)
    inf, zero = torch.full((units,), torch.inf), torch.zeros(units)
    return RowEdits(
        read=torch.randn(units, WIDTH, generator=rng) / WIDTH**0.5,
        write=torch.randn(units, WIDTH, generator=rng),
        bias=zero,
        threshold=-inf,
        gain=torch.randn(units, generator=rng),
        offset=zero,
        low=-inf,
        high=inf,
        max_norm=inf,
        gate=torch.full((units,), gate, dtype=torch.int32),
        topk=torch.full((units,), -1, dtype=torch.int32),
        scale=torch.zeros(0, WIDTH),
        scale_gate=torch.zeros(0, dtype=torch.int32),
    )


def begin(step: StepMap, rows: list[int]) -> None:
    ones = [1] * len(rows)
    step.begin(
        rows=rows, slots=list(range(len(rows))), num_tokens=ones, first_position=ones, prompt_length=ones
    )


def test_graph_that_was_captured_once_follows_rows_plans_and_gates() -> None:
    """Other tokens, rows, plans that come and go, a gate that opens: a replay does what holds then."""
    table = SiteTable(WIDTH, rows=6, units=64, scales=0, device=CUDA)
    step = StepMap(requests=ROOM, gates=2, device=CUDA, graph_tokens=ROOM)
    hidden, residual = torch.zeros(2, ROOM, WIDTH, device=CUDA, dtype=torch.bfloat16)
    apply_edits_captured(hidden, table, step, residual, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply_edits_captured(hidden, table, step, residual, None)

    def check(rows: list[int], open_gates: Any = ()) -> Tensor:
        """The tokens that a replay changed, held against the op outside of graphs."""
        begin(step, rows)
        for token in open_gates:
            step.gate_open[token, 1] = True
        given = torch.randn(2, ROOM, WIDTH, device=CUDA).bfloat16()
        hidden.copy_(given[0])
        residual.copy_(given[1])
        step.edited.zero_()
        graph.replay()
        expected = given[0].clone()
        counted = step.edited.clone()
        if any(rows):
            apply_edits(expected, table, step, given[1], backend="triton-token")
        assert torch.equal(hidden, expected)
        changed = (hidden != given[0]).any(dim=1)
        assert torch.equal(counted[: len(rows)] > 0, changed[: len(rows)])
        assert not changed[len(rows) :].any(), "a token past the batch was edited"
        return changed.cpu()

    assert not check([1, 2, 0]).any(), "no plan is resident yet"
    table.set_row(1, make_row(1, 5))
    table.set_row(2, make_row(2, 20, gate=1))
    assert check([1, 0, 1, 2])[[0, 2]].all()
    assert not check([0] * ROOM).any()
    assert check([2] * ROOM, open_gates=[3, 7])[[3, 7]].all()
    assert not check([2] * ROOM).any(), "the gates of an earlier pass still stand open"
    table.clear_row(1)
    assert not check([1] * ROOM).any()
    table.set_row(1, make_row(9, 3))
    assert check([1] * ROOM).all()
    step.clear()
    before = hidden.clone()
    graph.replay()
    assert torch.equal(hidden, before), "a dummy pass was edited"


class Adds:
    """An owner of sites whose edit is a number of the moment."""

    capturing = False
    amount = 0.0

    def run_at(self, number: int, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        hidden += self.amount


class Model(nn.Module):
    """Two layers with a site between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        between = self.first(x).relu()
        site_op.edit_site(between, None, None, 0)
        out: Tensor = self.second(between)
        return out


@torch.inference_mode()
def test_compiled_model_uses_the_state_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by inductor, and captured: refused unless the owner says that the op may be in the graph."""
    monkeypatch.setattr(site_op, "_OWNER", [])
    adds, model = Adds(), Model().to(CUDA)
    site_op.claim_site_op(adds)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, WIDTH, device=CUDA)
    plain = compiled(x)
    adds.amount = 1.0
    expected = model.second(model.first(x).relu() + 1.0)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="was about to be captured"), torch.cuda.graph(graph):
        compiled(x)
