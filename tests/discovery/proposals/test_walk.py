"""docs/new-risk-class.md, typed in from top to bottom: a class that no code names becomes a served policy."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from discovery.data.sources import Source, read_prompts
from discovery.gates.contrast import read_contrast

MECHCTL = [sys.executable, "-m", "mechctl.main"]
WALK_S = 900
SMALLER = {
    "search": ["--limit", "2", "--edges", "20", "--resamples", "1"],
    "propose": ["--layers", "15", "--strengths", "2"],
    "eval": ["--max-tokens", "16"],
}
"""After what is printed, for a shorter walk: fewer pairs, one point of the grid, short answers."""


def commands(repository: Path) -> list[str]:
    """The commands of the page, in their order."""
    page = (repository / "docs" / "new-risk-class.md").read_text(encoding="utf-8")
    return re.findall(r"^((?:mechctl|curl) .*)$", page, re.MULTILINE)


def test_page_shows_the_class_file_as_it_is(repository: Path) -> None:
    """Every line of the page's excerpt is in the example's class file."""
    page = (repository / "docs" / "new-risk-class.md").read_text(encoding="utf-8")
    (excerpt,) = re.findall(r"^(    name: medical-dosage\n(?:    .*\n)+)", page, re.MULTILINE)
    folder = repository / "docs" / "examples" / "medical-dosage"
    whole = (folder / "class.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for line in excerpt.splitlines() if line[4:] not in whole] == []


def test_measured_prompts_are_in_neither_discovery_nor_selection(repository: Path) -> None:
    """The example's suite holds no prompt of its class file."""
    folder = repository / "docs" / "examples" / "medical-dosage"
    contrast = read_contrast(folder / "class.yaml", None, 0)
    seen = {prompt for sides in contrast.prompts.values() for prompts in sides.values() for prompt in prompts}
    for source in yaml.safe_load((folder / "suite.yaml").read_text())["sources"]:
        measured = read_prompts(Source(folder / source["path"], "prompts", name=source["name"]))
        assert len(measured) >= 5
        assert not seen & set(measured)


@contextmanager
def served(command: list[str], folder: Path) -> Iterator[str]:
    """The gateway of the page's `mechctl serve`, at free ports; gives its address."""
    errors = folder / "serve.txt"
    arguments = [*MECHCTL, *command, "--port", "0", "--admin-port", "0"]
    with errors.open("w") as file:
        process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), errors.read_text()
        yield line.split()[1].removesuffix("/v1")
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(2 * WALK_S)
@pytest.mark.parametrize(
    "more", [pytest.param({}, id="as printed", marks=pytest.mark.long), pytest.param(SMALLER, id="smaller")]
)
def test_the_walk_ends_in_a_served_policy_that_acts(
    repository: Path, tmp_path: Path, default_model_dir: Path, more: dict[str, list[str]]
) -> None:
    """Search, propose, compile, serve and eval run; the policy refuses doses not seen in training."""
    (tmp_path / "docs").symlink_to(repository / "docs")
    del default_model_dir
    typed = [shlex.split(line) for line in commands(repository)]
    names = [words[1] if words[0] == "mechctl" else words[0] for words in typed]
    assert names == ["search", "propose", "policy", "serve", "eval", "curl"]

    def run(words: list[str]) -> str:
        program = MECHCTL if words[0] == "mechctl" else [words[0]]
        command = [*program, *words[1:], *more.get(words[1], [])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WALK_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for words in typed[:3]:
        run(words)
    serve, evaluate, curl = typed[3:]
    assert serve[-1] == "&"
    with served(serve[1:-1], tmp_path) as url:
        here = [[word.replace("http://127.0.0.1:8000", url) for word in words] for words in (evaluate, curl)]
        run(here[0])
        answer = json.loads(run(here[1]))
    assert answer["choices"][0]["message"]["content"]
    card = json.loads((tmp_path / "runs" / "medical-dosage" / "eval" / "card.json").read_text())
    assert card["measures"]["defense_efficacy"]["value"] > 0
