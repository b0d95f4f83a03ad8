"""The Quick start of the README as a newcomer types it, against `mechctl serve` with its own engine."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, blocks, commands

README = ROOT / "README.md"
MECHCTL = [sys.executable, "-m", "mechctl.main"]

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, default_model_dir: Path) -> Iterator[str]:
    """What `make run` starts, at free ports; gives its address."""
    del default_model_dir
    errors = tmp_path_factory.mktemp("serve") / "stderr.txt"
    command = [*MECHCTL, "serve", "--port", "0", "--admin-port", "0"]
    with errors.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:"), errors.read_text()
        yield line.split()[1].removesuffix("/v1")
    finally:
        process.terminate()
        process.wait(60)


def test_quick_start_answers_as_the_readme_says(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The `curl` command and the Python program get the right answer, with headers as the README says."""
    (curl,) = (command for command in commands(README) if command.words[0] == "curl")
    words = [word.replace("http://127.0.0.1:8000", url) for word in curl.words]
    done = subprocess.run([*words, "-s", "-i"], capture_output=True, text=True, check=True)
    head, _, body = done.stdout.replace("\r", "").rpartition("\n\n")
    assert "Paris" in json.loads(body)["choices"][0]["message"]["content"]
    assert re.search(r"^x-steering-policy: ", head, re.MULTILINE | re.IGNORECASE), head
    assert re.search(r"^x-steering-receipt: \{", head, re.MULTILINE | re.IGNORECASE), head

    (program,) = blocks(README, "python")
    exec(  # noqa: S102 (our own page)
        compile(program.replace("http://127.0.0.1:8000", url), "README.md", "exec"), {}
    )
    assert "Paris" in capsys.readouterr().out


def columns(lines: list[Any], cut: Callable[[Any], tuple[str, str]]) -> tuple[str, str]:
    """The texts of two columns, each in one line."""
    left, right = zip(*map(cut, lines), strict=True)
    return " ".join(" ".join(left).split()), " ".join(" ".join(right).split())


def test_readme_shows_what_steer_prints() -> None:
    """The README's sample is what `mechctl steer` prints: revision, receipt and both answers, cut short."""
    (steer,) = (command for command in commands(README) if command.words[:2] == ["mechctl", "steer"])
    done = subprocess.run([*MECHCTL, *steer.words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    *table, receipt = done.stdout.strip().splitlines()
    rows = [row.replace("┃", "│").split("│") for row in table if row[0] in "┃│"]
    printed = [columns(part, lambda row: (row[1], row[2])) for part in (rows[:1], rows[1:])]
    (sample,) = blocks(README, "text")
    *shown, last = sample.strip().splitlines()
    place = shown[0].index("with jailbreak")
    head, answers = (columns(part, lambda row: (row[:place], row[place:])) for part in (shown[:1], shown[1:]))
    assert head == printed[0]
    assert all(whole.startswith(text.rstrip("… ")) for whole, text in zip(printed[1], answers, strict=True))
    assert receipt.strip() == last
