"""The plan file: the same bytes for the same plan, all of it back, and only `PlanError` for damage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interpretops.errors import PlanError
from interpretops.plan import (
    ALWAYS,
    POINTS,
    UNIT_FIELDS,
    Gate,
    HeadScaling,
    ModelSpec,
    Plan,
    Site,
    SiteEdits,
    TopK,
    Units,
    read_plan,
)

MODEL = ModelSpec("tiny", "ab" * 32, "LlamaForCausalLM", 12, 4, 2, 1, 4, 50)


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of every shape that the format knows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gates = [ALWAYS]
    for _ in range(draw(st.integers(0, 3))):
        phase: Any = draw(st.sampled_from(("both", "prefill", "decode")))
        count = draw(st.integers(0, 3))
        if count == 0:
            gates.append(Gate(None, ALWAYS.read, ALWAYS.bias, ALWAYS.cut, phase=phase))
            continue
        gates.append(
            Gate(
                Site(0, "resid_post"),
                rows(rng, count, MODEL.width("resid_post")),
                rows(rng, count),
                rows(rng, count),
                combine=draw(st.sampled_from(("any", "all"))),
                scope=draw(st.sampled_from(("token", "prompt_end"))),
                latched=draw(st.booleans()),
                phase=phase,
                max_norm=draw(st.sampled_from((float("inf"), 1000.5))),
                refusal=draw(st.sampled_from((None, "No.", "Nein – „so nicht“."))),
            )
        )
    edits = {}
    for layer, point in draw(
        st.lists(st.tuples(st.integers(1, 3), st.sampled_from(POINTS)), unique=True, max_size=3)
    ):
        edits[Site(layer, point)] = draw_edits(draw, rng, Site(layer, point), len(gates))
    provenance = draw(st.dictionaries(st.text(max_size=5), st.integers(-9, 9), max_size=2))
    return Plan("a-policy", "jailbreak", MODEL, edits, tuple(gates), provenance)


def draw_edits(draw: st.DrawFn, rng: np.random.Generator, site: Site, gates: int) -> SiteEdits:
    width, count = MODEL.width(site.point), draw(st.integers(0, 4))
    read_width = MODEL.read_width(site.point)
    topk = (
        TopK(rows(rng, 6, read_width), rows(rng, 6), draw(st.integers(1, 6))) if draw(st.booleans()) else None
    )
    infinite = np.full(count, np.inf, np.float32)
    units = Units(
        read=rows(rng, count, read_width),
        write=rows(rng, count, width),
        bias=rows(rng, count),
        threshold=rng.choice(np.array([-np.inf, 0, 1.5], np.float32), count),
        gain=rows(rng, count),
        offset=rows(rng, count),
        low=-infinite,
        high=infinite,
        max_norm=infinite,
        gate=rng.integers(0, gates, count).astype(np.int32),
        topk=rng.integers(-1, 6 if topk else 0, count).astype(np.int32),
    )
    scale = None
    if site.point == "attn_z" and draw(st.booleans()):
        scale = HeadScaling(rows(rng, 2, width), np.zeros(2, np.int32))
    return SiteEdits(units, scale, topk)


@given(plans())
def test_plan_comes_back_whole_and_with_the_same_bytes(plan: Plan) -> None:
    """Writing twice gives the same bytes; reading gives an equal plan, number by number."""
    data = plan.to_bytes()
    assert plan.to_bytes() == data
    back = read_plan(data)
    assert back.to_bytes() == data
    assert back.revision == plan.revision
    assert back.digest() == plan.digest()
    for site, edits in plan.edits.items():
        for name in UNIT_FIELDS:
            np.testing.assert_array_equal(getattr(back.edits[site].units, name), getattr(edits.units, name))
    assert [(g.site, g.combine, g.scope, g.latched, g.phase, g.max_norm) for g in back.gates] == [
        (g.site, g.combine, g.scope, g.latched, g.phase, g.max_norm) for g in plan.gates
    ]


@given(plans(), st.data())
@settings(max_examples=200)
def test_truncated_plan_is_refused(plan: Plan, data: st.DataObject) -> None:
    """A plan file cut anywhere raises `PlanError`."""
    whole = plan.to_bytes()
    with pytest.raises(PlanError):
        read_plan(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(plans(), st.data())
@settings(max_examples=600)
def test_flipped_bit_is_refused_or_makes_another_revision(plan: Plan, data: st.DataObject) -> None:
    """Damage raises `PlanError` and nothing else; what can still be read is another plan by name."""
    whole = bytearray(plan.to_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    end = data.draw(st.sampled_from((header, len(whole))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = read_plan(bytes(whole))
    except PlanError:
        return
    assert read.to_bytes() == bytes(whole)


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_with_plan_error(data: bytes) -> None:
    """What was never a plan raises `PlanError`."""
    with pytest.raises(PlanError):
        read_plan(data)


def test_saved_plan_is_named_by_its_revision(tmp_path: Path) -> None:
    """The file's name is the sha256 of its bytes."""
    path = Plan("p", "c", MODEL, {}).save(tmp_path)
    assert path.name == f"{read_plan(path.read_bytes()).revision}.safetensors"
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_same_numbers_written_otherwise_are_refused() -> None:
    """A file has to be the one writing of its plan, or its sha256 would not be the plan's revision."""
    plan = Plan("p", "c", MODEL, {})
    data = plan.to_bytes()
    size = int.from_bytes(data[:8], "little")
    spaced = (size + 8).to_bytes(8, "little") + data[8 : 8 + size] + b" " * 8 + data[8 + size :]
    with pytest.raises(PlanError, match="differs from what this build writes"):
        read_plan(spaced)


def test_gate_that_reads_after_its_edit_is_refused() -> None:
    """An edit cannot wait for what the model computes later."""
    fields: dict[str, Any] = {
        name: np.zeros((1, 12) if name in ("read", "write") else 1, np.float32) for name in UNIT_FIELDS
    }
    fields |= {"gate": np.ones(1, np.int32), "topk": -np.ones(1, np.int32)}
    units = Units(**fields | {"max_norm": np.ones(1, np.float32)})
    one = np.zeros(1, np.float32)
    gate = Gate(Site(3, "resid_post"), np.zeros((1, 12), np.float32), one, one)
    plan = Plan("p", "c", MODEL, {Site(2, "resid_post"): SiteEdits(units)}, (ALWAYS, gate))
    with pytest.raises(PlanError, match=r"reads at 3.resid_post, which comes after the edit"):
        read_plan(plan.to_bytes())


def test_refusal_makes_another_revision_and_another_digest() -> None:
    """The flag is attested with the numbers, its text names another revision; without it, no byte changes."""
    one = np.zeros(1, np.float32)
    gate = Gate(Site(0, "resid_post"), np.zeros((1, 12), np.float32), one, one)
    plans = [
        Plan("p", "t", MODEL, {}, (ALWAYS, replace(gate, refusal=text))) for text in (None, "No.", "Never.")
    ]
    assert len({plan.revision for plan in plans}) == 3
    assert plans[0].digest() != plans[1].digest() == plans[2].digest()
    assert b"refusal" not in plans[0].to_bytes()
    assert read_plan(plans[1].to_bytes()).gates[1].refusal == "No."


@pytest.mark.parametrize("lost", ["text", "flag"])
def test_half_a_refusal_is_refused(lost: str) -> None:
    """A plan whose gate has the flag without its text, or the text without the flag, is not read."""
    one = np.zeros(1, np.float32)
    gate = Gate(Site(0, "resid_post"), np.zeros((1, 12), np.float32), one, one, refusal="No.")
    data = Plan("p", "t", MODEL, {}, (ALWAYS, gate)).to_bytes()
    old, new = {
        "text": (rb"\"refusal\":\"No.\"", rb"\"refusal\":null "),
        "flag": (b"gates.1.refusal", b"gates.1.refusam"),
    }[lost]
    changed = data.replace(old, new.ljust(len(old)))
    assert changed != data
    with pytest.raises(PlanError, match="half a refusal"):
        read_plan(changed)
