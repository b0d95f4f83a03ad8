"""Every backend of the op against the reference, and all against a manual SAE splice.

The Triton kernel runs in Triton's interpreter where there is no GPU.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_kernels.ops import (
    RowEdits,
    SiteTable,
    StepMap,
    TableFullError,
    apply_edits_reference,
)
from steering_kernels.ops import apply_edits as apply_edits_in_place

GATES = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ["triton-token", "triton-tile"]
BACKENDS = ["grouped", *KERNELS]


def apply_edits(
    hidden: Tensor, table: SiteTable, step: StepMap, *others: Tensor | None, backend: Any = None
) -> Tensor:
    """The edited activation, and a copy of the input. The memory around the input is poisoned with NaN."""
    room = torch.full(
        (hidden.shape[0] + 2, hidden.shape[1] + 3), torch.nan, dtype=hidden.dtype, device=DEVICE
    )
    inner = room[1:-1, : hidden.shape[1]]
    inner.copy_(hidden)
    step.spill(table.read.shape[0]).fill_(torch.nan)
    apply_edits_in_place(
        inner, table, step, *(None if t is None else t.to(DEVICE) for t in others), backend=backend
    )
    assert room[0].isnan().all()
    assert room[-1].isnan().all()
    assert room[:, hidden.shape[1] :].isnan().all()
    return inner.cpu()


def is_decided(stream: Tensor, table: SiteTable, rows: list[int]) -> Tensor:
    """[T] tokens at which no unit's result depends on the last bits of a float32 sum."""
    decided = []
    for x, row in zip(stream.double(), rows, strict=True):
        edits = table.get_row(row)
        u = edits.read.double().cpu() @ x + edits.bias.double().cpu()
        clear = (u - edits.threshold.cpu()).abs() > 1e-4
        clear &= (x.norm() - edits.max_norm.double().cpu()).abs() > 1e-4
        decided.append(bool(clear.all()))
    return torch.tensor(decided, dtype=torch.bool)


def make_row(
    seed: int,
    width: int,
    units: int,
    *,
    scales: int = 0,
    features: int = 0,
    k: int = 0,
    read_width: int | None = None,
) -> RowEdits:
    """A row with units of every kind in turn."""
    read_width = read_width or width
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    kind = torch.arange(units) % 5
    inf = torch.full((units,), torch.inf)
    return RowEdits(
        read=torch.where((kind == 2)[:, None], 0.0, normal(units, read_width)),
        write=normal(units, width),
        bias=torch.where(kind == 2, 0.0, normal(units)),
        threshold=torch.where((kind == 0) | (kind == 1), normal(units).abs(), -inf),
        gain=torch.where((kind == 0) | (kind >= 3), normal(units), 0.0),
        offset=torch.where(kind == 2, normal(units), 0.0),
        low=torch.where(kind == 1, torch.full((units,), -0.5), -inf),
        high=torch.where(kind == 1, torch.full((units,), 0.5), inf),
        max_norm=torch.where(torch.arange(units) % 3 == 0, torch.full((units,), 1.1 * width**0.5), inf),
        gate=(torch.arange(units) % GATES).int(),
        topk=torch.where((kind == 0) & (features > 0), torch.arange(units) % max(features, 1), -1).int(),
        scale=normal(scales, width),
        scale_gate=(torch.arange(scales) % GATES).int(),
        topk_read=normal(features, read_width) if features else None,
        topk_bias=normal(features) if features else None,
        topk_k=k,
    )


def make_table(
    width: int, rows: list[RowEdits], read_width: int | None = None, device: torch.device = DEVICE
) -> SiteTable:
    table = SiteTable(width, rows=len(rows) + 3, units=128, scales=16, device=device, read_width=read_width)
    for index, row in enumerate(rows):
        table.set_row(index + 1, row)
    return table


def make_step(rows: list[int], seed: int = 0) -> StepMap:
    """One request per token, with random open gates."""
    step = StepMap(requests=len(rows) + 1, gates=GATES, device=DEVICE)
    ones = [1] * len(rows)
    step.begin(
        rows=rows, slots=list(range(len(rows))), num_tokens=ones, first_position=ones, prompt_length=ones
    )
    if step.active:
        drawn = torch.rand(len(rows), GATES, generator=torch.Generator().manual_seed(seed)) < 0.5
        step.gate_open = drawn.to(DEVICE)
        step.gate_open[:, 0] = True
    return step


CASES = {
    "width": st.sampled_from([1, 7, 64, 130]),
    "units": st.sampled_from([0, 1, 5, 8, 16, 17, 35]),
    "scales": st.integers(0, 3),
    "features": st.sampled_from([0, 0, 9]),
    "rows": st.one_of(
        st.lists(st.integers(0, 4), min_size=1, max_size=33),
        st.lists(st.just(2), min_size=1, max_size=33),
        st.lists(st.just(0), min_size=1, max_size=4),
    ),
    "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    "reads": st.sampled_from(["hidden", "pair", "source"]),
    "padding": st.integers(0, 3),
    "seed": st.integers(0, 2**20),
}


@settings(deadline=None, max_examples=150)
@given(**CASES)
def test_cpu_path_equals_the_reference(**case: Any) -> None:
    """Every kind of edit, batch mix and float dtype: bit-identical to the reference.

    Within 1e-12 in float64, which has no coarser rounding that hides the order of summation.
    """
    check_against_reference("grouped", **case)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=12, derandomize=True, phases=[Phase.generate])
@given(**CASES)
def test_fused_kernel_equals_the_reference(kernel: str, **case: Any) -> None:
    """Within 1e-4 and two last bits of the dtype, since its sums are float32.

    Tokens within 1e-4 of a threshold or norm bound are not compared. Triton's interpreter truncates bfloat16
    where a GPU rounds, so the summands are chosen such that their sum needs no rounding.
    """
    check_against_reference(kernel, **case)


def check_against_reference(
    backend: str,
    *,
    width: int,
    units: int,
    scales: int,
    features: int,
    rows: list[int],
    dtype: torch.dtype,
    reads: str,
    padding: int,
    seed: int,
) -> None:
    """One case of `CASES`."""
    read_width = width + 3 if reads == "source" else width
    made = [
        make_row(
            seed + i,
            width,
            units,
            scales=0 if reads == "source" else scales,
            features=features if units else 0,
            k=4,
            read_width=read_width,
        )
        for i in range(3)
    ]
    made[1] = replace(
        made[1], topk=torch.full_like(made[1].topk, -1), topk_read=None, topk_bias=None, topk_k=0
    )
    table = make_table(width, made, read_width)  # row 4 exists but is empty
    step = make_step(rows, seed)
    rng = torch.Generator().manual_seed(seed)
    tokens = len(rows)
    hidden = torch.randn(tokens + padding, width, generator=rng).to(dtype)
    other = torch.randn(tokens + padding, read_width, generator=rng).to(dtype)
    if backend in KERNELS and dtype is torch.bfloat16 and reads == "pair":
        other = -2 * hidden
    residual = other if reads == "pair" else None
    source = other if reads == "source" else None

    out = apply_edits(hidden, table, step, residual, source, backend=backend)

    gate_open = step.gate_open if step.active else torch.ones(tokens, GATES, dtype=torch.bool)
    expected = apply_edits_reference(
        hidden[:tokens],
        make_table(width, made, read_width, torch.device("cpu")),
        torch.tensor(rows),
        gate_open.cpu(),
        None if residual is None else residual[:tokens],
        None if source is None else source[:tokens],
    )
    changed = (out != hidden)[:tokens].any(dim=1)
    assert torch.equal(out[tokens:], hidden[tokens:])
    assert not changed[step.edited[:tokens].cpu() == 0].any()
    if backend in KERNELS:
        stream = hidden if reads == "hidden" else other if reads == "source" else hidden + other
        sure = is_decided(stream[:tokens], table, rows)
        rtol = max(2 * torch.finfo(dtype).eps, 1e-5)
        assert torch.allclose(out[:tokens][sure].double(), expected[sure].double(), rtol=rtol, atol=1e-4)
        assert step.edited[:tokens].max() <= 1
    elif dtype is torch.float64:
        assert torch.allclose(out[:tokens], expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(out[:tokens], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_of_row_zero_is_bit_identical(backend: str) -> None:
    """Row 0 leaves a token bit-identical, negative zeros and NaNs included."""
    table = make_table(4, [make_row(0, 4, 5)])
    hidden = torch.tensor([[-0.0, torch.nan, torch.inf, 1.0], [1.0, 2.0, 3.0, 4.0]])
    out = apply_edits(hidden, table, make_step([0, 1]), backend=backend)
    assert torch.equal(out[0].view(torch.int32), hidden[0].view(torch.int32))
    assert not torch.equal(out[1], hidden[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_at_which_no_edit_acts_is_bit_identical(backend: str) -> None:
    """A revision whose features are inactive at a token does not even flip the sign of a zero."""
    row = make_row(0, 4, 1)
    silent = replace(row, threshold=torch.full((1,), 1e9), max_norm=torch.full((1,), torch.inf))
    table = make_table(4, [silent])
    step = make_step([1])
    hidden = torch.tensor([[-0.0, 0.0, -1.0, 2.0]])
    out = apply_edits(hidden, table, step, backend=backend)
    assert torch.equal(out.view(torch.int32), hidden.view(torch.int32))
    assert step.edited.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_behind_closed_gates_is_not_read(backend: str) -> None:
    """With all gates of a row closed, the activation passes unchanged; one open token is edited."""
    row = replace(make_row(0, 4, 3), gate=torch.ones(3, dtype=torch.int32))
    table = make_table(4, [row])
    step = make_step([1, 1])
    hidden = torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 0.5, 1.0]])
    step.gate_open[:, 1] = False
    assert torch.equal(apply_edits(hidden, table, step, backend=backend), hidden)
    step.gate_open[1, 1] = True
    out = apply_edits(hidden, table, step, backend=backend)
    assert torch.equal(out[0], hidden[0])
    assert not torch.equal(out[1], hidden[1])


@pytest.mark.parametrize(
    ("backend", "tokens", "width"),
    [("grouped", 257, 576), ("grouped", 48, 576), ("triton-token", 33, 64), ("triton-tile", 33, 64)],
)
def test_result_of_a_token_does_not_depend_on_its_batch(backend: str, tokens: int, width: int) -> None:
    """A token is edited bit-identically alone, in a batch of its own row, and in a mixed batch."""
    table = make_table(width, [make_row(i, width, 8) for i in range(3)])
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 4, (tokens,), generator=rng).tolist()
    hidden = torch.randn(tokens, width, generator=rng).bfloat16()
    together = apply_edits(hidden, table, make_step(rows), backend=backend)
    gates = make_step(rows).gate_open
    for token in range(0, tokens, 16):
        step = make_step([rows[token]])
        if step.active:
            step.gate_open = gates[token : token + 1]
        alone = apply_edits(hidden[token : token + 1], table, step, backend=backend)
        assert torch.equal(alone[0], together[token])


def splice(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, theta: Tensor, change: Any) -> Tensor:
    """Encode with the whole dictionary, change some features, decode both, add the difference: the delta
    form."""
    u = encoder @ x + bias
    a = torch.where(u > theta, u, 0.0)
    changed = change(a.clone())
    return x + decoder.T @ changed - decoder.T @ a


@pytest.mark.parametrize("kind", ["scale", "clamp"])
@pytest.mark.parametrize("theta", [0.0, 0.7])
def test_feature_edits_are_an_sae_splice_in_delta_form(kind: str, theta: float) -> None:
    """Scaling or clamping features equals encode, change, decode in float64, with the reconstruction error
    kept."""
    rng = torch.Generator().manual_seed(3)
    features, width, ids = 40, 24, [3, 17, 31]
    encoder, decoder = (torch.randn(features, width, generator=rng) for _ in range(2))
    bias = torch.randn(features, generator=rng)
    inf = torch.full((3,), torch.inf)
    row = RowEdits(
        read=encoder[ids],
        write=decoder[ids],
        bias=bias[ids],
        threshold=torch.full((3,), theta),
        gain=torch.full((3,), 0.35 - 1 if kind == "scale" else 0.0),
        offset=torch.zeros(3),
        low=torch.full((3,), -0.5) if kind == "clamp" else -inf,
        high=torch.full((3,), 0.5) if kind == "clamp" else inf,
        max_norm=inf,
        gate=torch.zeros(3, dtype=torch.int32),
        topk=torch.full((3,), -1, dtype=torch.int32),
        scale=torch.zeros(0, width),
        scale_gate=torch.zeros(0, dtype=torch.int32),
    )
    x = torch.randn(19, width, generator=rng)

    def change(a: Tensor) -> Tensor:
        a[ids] = a[ids] * 0.35 if kind == "scale" else a[ids].clamp(-0.5, 0.5)
        return a

    out = apply_edits(x, make_table(width, [row]), make_step([1] * 19))
    wide = (encoder.double(), bias.double(), decoder.double(), torch.full((features,), theta).double())
    expected = torch.stack([splice(t.double(), *wide, change) for t in x])
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert not torch.allclose(out, x)


def test_topk_feature_is_scaled_only_where_the_whole_encoder_says_it_is_active() -> None:
    """Under TopK, a feature with a positive pre-activation outside the k largest is not edited."""
    width, features, k = 12, 20, 3
    rng = torch.Generator().manual_seed(5)
    encoder, decoder = torch.randn(features, width, generator=rng), torch.randn(width, generator=rng)
    row = replace(
        make_row(0, width, 1),
        gain=torch.tensor([-1.0]),
        write=decoder[None],
        topk=torch.tensor([7], dtype=torch.int32),
        max_norm=torch.tensor([torch.inf]),
        topk_read=encoder,
        topk_bias=torch.zeros(features),
        topk_k=k,
    )
    x = torch.randn(200, width, generator=rng)
    out = apply_edits(x, make_table(width, [row]), make_step([1] * 200))
    u = x.double() @ encoder.double().T
    active = (u[:, 7] >= u.topk(k, dim=1).values[:, -1]) & (u[:, 7] > 0)
    assert 0 < int(active.sum()) < int((u[:, 7] > 0).sum())
    expected = x.double() - torch.where(active, u[:, 7], 0.0)[:, None] * decoder.double()
    assert torch.allclose(out.double(), expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_sinks_are_never_edited(backend: str) -> None:
    """A token whose norm exceeds the bound stays bit-identical."""
    row = replace(make_row(0, 8, 2), max_norm=torch.full((2,), 10.0), gate=torch.zeros(2, dtype=torch.int32))
    hidden = torch.stack([torch.full((8,), 100.0), torch.full((8,), 1.0)])
    out = apply_edits(hidden, make_table(8, [row]), make_step([1, 1]), backend=backend)
    assert torch.equal(out[0], hidden[0])
    assert not torch.equal(out[1], hidden[1])


def test_full_table_refuses_and_changes_nothing() -> None:
    """A row that does not fit is refused, naming what is short; a freed row makes space again."""
    table = SiteTable(4, rows=8, units=10, scales=2, device=DEVICE)
    for row in (1, 2, 3):
        table.set_row(row, make_row(row, 4, 3))
    with pytest.raises(TableFullError, match="3 units needed, but 9 of 10 are in use"):
        table.set_row(4, make_row(4, 4, 3))
    table.clear_row(2)
    table.set_row(4, make_row(4, 4, 3))
    for row in (1, 3, 4):
        assert torch.equal(table.get_row(row).read.cpu(), make_row(row, 4, 3).read)
    with pytest.raises(ValueError, match="row 1 is occupied"):
        table.set_row(1, make_row(1, 4, 1))


def test_wrong_shapes_are_reported() -> None:
    """The public function names the wrong argument and what would be valid."""
    table = make_table(4, [make_row(0, 4, 1)])
    step = make_step([1, 1])
    with pytest.raises(
        ValueError, match=r"hidden has shape \(2, 5\) and strides \(5, 1\), but must be \[T, 4\]"
    ):
        apply_edits_in_place(torch.zeros(2, 5), table, step)
    with pytest.raises(ValueError, match="laid out for 2"):
        apply_edits_in_place(torch.zeros(1, 4), table, step)
    with pytest.raises(ValueError, match="residual has shape"):
        apply_edits_in_place(torch.zeros(2, 4), table, step, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="must be a float"):
        apply_edits_in_place(torch.zeros(2, 4, dtype=torch.int64), table, step)
