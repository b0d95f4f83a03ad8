"""The Quick start of the README as a newcomer types it, against `mechctl serve` with its own engine."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
    """The `curl` command and the Python program get answers, the headers that the README names among them."""
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


def test_readme_shows_what_steer_prints() -> None:
    """`mechctl steer` refuses the README's prompt under the policy, and prints the revision that it shows."""
    (steer,) = (command for command in commands(README) if command.words[:2] == ["mechctl", "steer"])
    done = subprocess.run([*MECHCTL, *steer.words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    text = README.read_text(encoding="utf-8")
    (sample,) = re.findall(r"^(    without .*(?:\n    .+)+)", text, re.MULTILINE)
    shown = set(re.findall(r"jailbreak@[0-9a-f]{12}|I'm sorry, but I can't help with that", sample))
    assert len(shown) == 2
    printed = " ".join(done.stdout.split())
    assert all(piece in printed for piece in shown), done.stdout
