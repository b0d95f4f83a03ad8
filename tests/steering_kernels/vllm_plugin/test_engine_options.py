"""The plugin's section of ``--additional-config``: errors name value, type and what would be valid."""

import re
from typing import Any

import pytest

from steering_kernels.vllm_plugin.engine_config import EngineOptions


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rows": 1}, "rows = 1, but must be at least 2"),
        ({"rows": "1"}, "rows = '1' (str), but must be of type int"),
        ({"rows": True}, "rows = True (bool), but must be of type int"),
        ({"units_per_site": 2.0}, "units_per_site = 2.0 (float), but must be of type int"),
        ({"pass_through": "no"}, "pass_through = 'no' (str), but must be of type bool"),
        ({"row": 3}, "row: unknown key; known are"),
        ([1], "interpretops = [1], but must be an object of options"),
    ],
)
def test_invalid_option_is_refused_with_its_type(section: Any, words: str) -> None:
    """A quoted number is distinguished from a number, and a range error from a type error."""
    with pytest.raises(ValueError, match=re.escape(words)):
        EngineOptions.read({"interpretops": section})


def test_valid_options_are_accepted() -> None:
    """Missing options have defaults."""
    assert EngineOptions.read({"interpretops": {"rows": 2}}) == EngineOptions(rows=2)
    assert EngineOptions.read(None) == EngineOptions()
