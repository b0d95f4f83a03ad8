"""The CPU path of the op against its reference, and both against an SAE spliced in by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_kernels.ops import (
    RowEdits,
    SiteTable,
    StepMap,
    TableFullError,
    apply_edits,
    apply_edits_reference,
)

GATES = 3


def make_row(
    seed: int, width: int, units: int, *, scales: int = 0, features: int = 0, k: int = 0
) -> RowEdits:
    """A row whose units are of every kind, by turns."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    kind = torch.arange(units) % 5
    inf = torch.full((units,), torch.inf)
    return RowEdits(
        read=torch.where((kind == 2)[:, None], 0.0, normal(units, width)),
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
        topk_read=normal(features, width) if features else None,
        topk_bias=normal(features) if features else None,
        topk_k=k,
    )


def make_table(width: int, rows: list[RowEdits]) -> SiteTable:
    table = SiteTable(width, rows=len(rows) + 3, units=128, scales=16, device=torch.device("cpu"))
    for index, row in enumerate(rows):
        table.set_row(index + 1, row)
    return table


def make_step(rows: list[int], seed: int = 0) -> StepMap:
    """One request per token; the gates are open at random."""
    step = StepMap(requests=len(rows) + 1, gates=GATES, device=torch.device("cpu"))
    ones = [1] * len(rows)
    step.begin(
        rows=rows, slots=list(range(len(rows))), num_tokens=ones, first_position=ones, prompt_length=ones
    )
    if step.active:
        step.gate_open = torch.rand(len(rows), GATES, generator=torch.Generator().manual_seed(seed)) < 0.5
        step.gate_open[:, 0] = True
    return step


@settings(deadline=None, max_examples=150)
@given(
    width=st.sampled_from([1, 7, 64, 130]),
    units=st.integers(1, 12),
    scales=st.integers(0, 3),
    features=st.sampled_from([0, 9]),
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=33),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    pair=st.booleans(),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**20),
)
def test_cpu_path_gives_what_the_reference_means(
    width: int,
    units: int,
    scales: int,
    features: int,
    rows: list[int],
    dtype: torch.dtype,
    pair: bool,
    padding: int,
    seed: int,
) -> None:
    """Every kind of edit, any batch mix, any float dtype: bit for bit what the reference gives."""
    table = make_table(
        width,
        [make_row(seed + i, width, units, scales=scales, features=features, k=4) for i in range(3)],
    )  # row 4 exists but is empty
    step = make_step(rows, seed)
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(rows) + padding, width, generator=rng).to(dtype)
    residual = torch.randn(len(rows) + padding, width, generator=rng).to(dtype) if pair else None
    before = hidden.clone()

    out = apply_edits(hidden, table, step, residual)

    gate_open = step.gate_open if step.active else torch.ones(len(rows), GATES, dtype=torch.bool)
    expected = apply_edits_reference(
        hidden[: len(rows)],
        table,
        torch.tensor(rows),
        gate_open,
        None if residual is None else residual[: len(rows)],
    )
    assert torch.equal(hidden, before)
    assert torch.equal(out[len(rows) :], before[len(rows) :])
    # float64 has no coarser rounding to hide the order of a sum behind.
    if dtype is torch.float64:
        assert torch.allclose(out[: len(rows)], expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(out[: len(rows)], expected)


def test_token_of_row_zero_is_bit_identical() -> None:
    """Row 0 leaves a token as it is, negative zeros and NaNs included."""
    table = make_table(4, [make_row(0, 4, 5)])
    hidden = torch.tensor([[-0.0, torch.nan, torch.inf, 1.0], [1.0, 2.0, 3.0, 4.0]])
    out = apply_edits(hidden, table, make_step([0, 1]))
    assert torch.equal(out[0].view(torch.int32), hidden[0].view(torch.int32))
    assert not torch.equal(out[1], hidden[1])


def test_token_at_which_no_edit_acts_is_bit_identical() -> None:
    """A revision whose features are silent at a token does not even flip the sign of a zero."""
    row = make_row(0, 4, 1)
    silent = replace(row, threshold=torch.full((1,), 1e9), max_norm=torch.full((1,), torch.inf))
    table = make_table(4, [silent])
    step = make_step([1])
    hidden = torch.tensor([[-0.0, 0.0, -1.0, 2.0]])
    out = apply_edits(hidden, table, step)
    assert torch.equal(out.view(torch.int32), hidden.view(torch.int32))
    assert step.edited.tolist() == [0, 0]


def test_row_behind_closed_gates_is_not_read() -> None:
    """With all gates of a row closed the activation is handed on as it came; one open token is edited."""
    row = replace(make_row(0, 4, 3), gate=torch.ones(3, dtype=torch.int32))
    table = make_table(4, [row])
    step = make_step([1, 1])
    hidden = torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 0.5, 1.0]])
    step.gate_open[:, 1] = False
    assert apply_edits(hidden, table, step) is hidden
    step.gate_open[1, 1] = True
    out = apply_edits(hidden, table, step)
    assert torch.equal(out[0], hidden[0])
    assert not torch.equal(out[1], hidden[1])


def test_result_of_a_token_does_not_depend_on_its_batch() -> None:
    """A token edited alone, among its own kind and among strangers comes out the same, bit for bit."""
    table = make_table(576, [make_row(i, 576, 8) for i in range(3)])
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 4, (257,), generator=rng).tolist()
    hidden = torch.randn(257, 576, generator=rng).bfloat16()
    together = apply_edits(hidden, table, make_step(rows))
    gates = make_step(rows).gate_open
    for token in range(0, 257, 16):
        step = make_step([rows[token]])
        if step.active:
            step.gate_open = gates[token : token + 1]
        alone = apply_edits(hidden[token : token + 1], table, step)
        assert torch.equal(alone[0], together[token])


def splice(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, theta: Tensor, change) -> Tensor:
    """Encode the whole dictionary, change some features, decode both, add the difference: the delta form."""
    u = encoder @ x + bias
    a = torch.where(u > theta, u, 0.0)
    changed = change(a.clone())
    return x + decoder.T @ changed - decoder.T @ a


@pytest.mark.parametrize("kind", ["scale", "clamp"])
@pytest.mark.parametrize("theta", [0.0, 0.7])
def test_feature_edits_are_an_sae_splice_in_delta_form(kind: str, theta: float) -> None:
    """Scaling or clamping features equals encode, change, decode in float64, the error left standing."""
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
    wide = [t.double() for t in (encoder, bias, decoder)]
    expected = torch.stack(
        [splice(t.double(), *wide, torch.full((features,), theta).double(), change) for t in x]
    )
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert not torch.allclose(out, x)


def test_topk_feature_is_scaled_only_where_the_whole_encoder_says_it_is_active() -> None:
    """Under TopK a feature with a positive pre-activation outside the k largest is left alone."""
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


def test_attention_sinks_are_never_edited() -> None:
    """A token whose norm exceeds the bound stays as it is, bit for bit."""
    row = replace(make_row(0, 8, 2), max_norm=torch.full((2,), 10.0), gate=torch.zeros(2, dtype=torch.int32))
    hidden = torch.stack([torch.full((8,), 100.0), torch.full((8,), 1.0)])
    out = apply_edits(hidden, make_table(8, [row]), make_step([1, 1]))
    assert torch.equal(out[0], hidden[0])
    assert not torch.equal(out[1], hidden[1])


def test_full_table_refuses_and_changes_nothing() -> None:
    """A row that does not fit is refused by name of what is short; a freed row makes room again."""
    table = SiteTable(4, rows=8, units=10, scales=2, device=torch.device("cpu"))
    for row in (1, 2, 3):
        table.set_row(row, make_row(row, 4, 3))
    with pytest.raises(TableFullError, match="3 units wanted, but 9 of 10 are taken"):
        table.set_row(4, make_row(4, 4, 3))
    table.clear_row(2)
    table.set_row(4, make_row(4, 4, 3))
    for row in (1, 3, 4):
        assert torch.equal(table.get_row(row).read, make_row(row, 4, 3).read)
    with pytest.raises(ValueError, match="row 1 is occupied"):
        table.set_row(1, make_row(1, 4, 1))


def test_misfit_shapes_are_named() -> None:
    """The public entry says which argument is wrong and what would fit."""
    table = make_table(4, [make_row(0, 4, 1)])
    step = make_step([1, 1])
    with pytest.raises(ValueError, match=r"hidden has shape \(2, 5\), but must be \[T, 4\]"):
        apply_edits(torch.zeros(2, 5), table, step)
    with pytest.raises(ValueError, match="laid out for 2"):
        apply_edits(torch.zeros(1, 4), table, step)
    with pytest.raises(ValueError, match="residual has shape"):
        apply_edits(torch.zeros(2, 4), table, step, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="must be a float"):
        apply_edits(torch.zeros(2, 4, dtype=torch.int64), table, step)
