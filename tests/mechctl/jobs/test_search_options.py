"""`mechctl search`: how many pairs and features it uses when the command line leaves that out."""

import sys
from pathlib import Path
from typing import Any

import pytest

from discovery.circuits import command
from mechctl.main import main


@pytest.mark.parametrize(
    ("arguments", "limit", "features", "chat"),
    [
        (("--pairs", "p.jsonl"), None, 32, None),
        (("--prompts", "p.json"), 12, 32, None),
        (("--prompts", "p.json", "--quick"), 8, 8, None),
        (("--pairs", "p.jsonl", "--quick", "--no-chat"), 8, 8, False),
        (("--pairs", "p.jsonl", "--quick", "--limit", "20", "--features", "32"), 20, 32, None),
    ],
)
def test_options_on_the_command_line_override_quick(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    limit: int | None,
    features: int,
    chat: bool | None,
) -> None:
    """`--quick` and `--prompts` decide only what is left out; naming a default counts as naming it."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(command, "run_search", lambda settings, **chosen: given.update(chosen))
    monkeypatch.setattr(sys, "argv", ["mechctl", "search", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = given["selection"].limit, given["chosen"].features, given["pair_format"].chat
    assert found == (limit, features, chat)
