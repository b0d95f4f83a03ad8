"""Hostile bytes for parsers: a corpus of small files, and variations of them."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""Settings of a fuzz test: few examples in `make test`, `FUZZ_EXAMPLES` in `make fuzz`."""


def corpus(parser: str) -> list[bytes]:
    """The corpus of a parser."""
    return [path.read_bytes() for path in sorted((CORPUS / parser).iterdir())]


def hostile(parser: str) -> st.SearchStrategy[bytes]:
    """Variations of the corpus, and bytes of any kind."""
    seeds = corpus(parser)
    pieces = st.one_of(
        st.binary(max_size=8),
        st.sampled_from(
            [b"\n", b"\n\n", b"\r\n", b"\r\n\r\n", b" ", b"\x00", b"{", b"[", b'"', b":", b"0", b"-1"]
        ),
    )

    @st.composite
    def variation(draw: st.DrawFn) -> bytes:
        data = draw(st.sampled_from(seeds))
        for _ in range(draw(st.integers(0, 3))):
            start = draw(st.integers(0, len(data)))
            end = min(len(data), start + draw(st.integers(0, 12)))
            middle = draw(st.one_of(pieces, st.just(data[start:end] * 2), st.sampled_from(seeds)))
            data = data[:start] + middle + data[end:]
        return data

    return st.one_of(variation(), st.binary(max_size=64))


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """The bytes split as a network may deliver them."""
    marks = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(marks)]


places = st.lists(st.integers(0, 4096), max_size=6)
"""Positions at which to split."""
