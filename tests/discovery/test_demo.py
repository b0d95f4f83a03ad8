"""The ten-minute demo: every line as it stands in the reference file, from a fresh checkout's files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from discovery.data.sources import Source, read_prompts
from discovery.evaluation.subject import open_suites
from interpretops.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "fixtures" / "reference-demo.sh"
LINES = [line for line in REFERENCE.read_text(encoding="utf-8").splitlines() if line.startswith("mechctl ")]
LATER = {"report", "serve-ui"}
"""Commands that come with the control plane."""
SHIPPED = ("config.yaml", "data", "policies", "sae_artifacts")
"""What the lines need of a checkout, besides the package."""

Shell = Callable[[str], subprocess.CompletedProcess[str]]


def command(line: str) -> str:
    return line.split()[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what a fresh checkout has of its own, and nothing that an earlier run has left."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, folder / name)
    return folder


@pytest.fixture
def shell(checkout: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Shell:
    """Runs a line with bash in the checkout, `mechctl` on its path, in a user's home of its own."""
    program = tmp_path / "bin" / "mechctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mechctl.main "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }

    if request.node.get_closest_marker("long"):  # which has the machine to itself, as a user has
        environment.pop("OMP_NUM_THREADS", None)

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run


def refused(done: subprocess.CompletedProcess[str], word: str) -> bool:
    """Whether a command ended with status 2 and one line that holds a word."""
    return done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and word in done.stderr


def test_files_that_the_lines_name_are_part_of_the_repository() -> None:
    """Nothing that git ignores or does not know is needed: a clone has it all."""
    named = {word for line in LINES for word in line.split() if (ROOT / word).is_file()}
    assert {"config.yaml", "data/demo_prompts.json", "data/jailbreak_eval.json"} < named
    suites = yaml.safe_load((ROOT / "data" / "eval_suites.yaml").read_text(encoding="utf-8"))["suites"]
    named |= {f"data/{suite['dataset_uri']}" for suite in suites} | {"data/README.md"}
    subprocess.run(["git", "ls-files", "--error-unmatch", *sorted(named)], cwd=ROOT, check=True)


def test_page_of_the_demo_has_these_lines() -> None:
    """docs/demo.md shows what is tested here, word for word, and then how the circuit is found again."""
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    shown = re.findall(r"^(?:    )?(mechctl .*)$", page, re.MULTILINE)
    assert shown == [*LINES[:5], "mechctl circuits  --latest"]


def test_shipped_settings_have_the_sections_of_the_reference() -> None:
    """The file at the top names what the reference names, and runs on any machine."""
    reference = yaml.safe_load((ROOT / "tests" / "fixtures" / "reference-config.yaml").read_text())
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    assert set(shipped) == set(reference)
    assert set(shipped["model"]) == set(reference["model"])
    settings = load_settings(ROOT / "config.yaml", environ={})
    assert settings.model == load_settings(None, environ={}).model
    assert settings.cache.dir == ROOT / ".io_cache"


def test_prompts_of_the_demo_are_of_many_kinds() -> None:
    """Enough to trace, in many scripts and in lower case too; no prompt is in two files."""
    demo = read_prompts(Source(ROOT / "data" / "demo_prompts.json", "prompts"))
    attacks = read_prompts(Source(ROOT / "data" / "jailbreak_eval.json", "prompts"))
    asked = open_suites([str(ROOT / "data" / "eval_suites.yaml")], None, None).prompts
    everything = [*demo, *attacks, *(prompt.text for prompt in asked)]
    assert len(set(everything)) == len(everything)
    assert len(demo) >= 150
    for script in ("[а-я]", "[一-龥]", "[ぁ-ん]", "[가-힣]", "[ء-ي]", "[א-ת]", "[ऀ-ॿ]", "[α-ω]", "[ąęłżß¿é]"):
        assert any(re.search(script, prompt) for prompt in demo), script
    assert sum(prompt == prompt.lower() and prompt.isascii() for prompt in demo) >= 10


def test_missing_settings_file_is_refused(shell: Shell) -> None:
    """A file that a line names and that is not there stops it: no defaults are taken in its place."""
    done = shell(LINES[0].replace("config.yaml", "gone.yaml"))
    assert refused(done, "gone.yaml")


@pytest.mark.slow
def test_lines_of_the_offline_jobs_work_on_a_small_model(
    shell: Shell, checkout: Path, tiny_folder: Path
) -> None:
    """Trace, dictionary, circuit and its id: the lines as they stand, with another model in the settings and
    a part of the prompts."""
    config = checkout / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["model"]["name"] = str(tiny_folder)
    config.write_text(yaml.safe_dump(settings))
    prompts = checkout / "data" / "demo_prompts.json"
    prompts.write_text(json.dumps(json.loads(prompts.read_text())[::5]))
    for line in LINES[:3]:
        assert command(line) in ("trace", "sae-train", "search")
        done = shell(line)
        assert done.returncode == 0, done.stderr
        assert re.search(r"\d (tokens/s|s per pair|pairs/s)", done.stderr), done.stderr
    cache = checkout / ".io_cache"
    (circuit,) = (cache / "circuits").iterdir()
    identifier = shell("mechctl circuits --latest --id-only").stdout
    assert identifier == circuit.stem + "\n"
    found = json.loads(circuit.read_text())
    assert found["id"] == circuit.stem
    assert [dictionary["id"] for dictionary in found["dictionaries"]] == ["sae"]
    for line in LINES[5:]:
        assert command(line) in LATER
        assert refused(shell(line), "control plane")


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(3600)
def test_every_line_works_as_it_stands(shell: Shell, checkout: Path) -> None:
    """The reference file's own lines, one after another, on the default model and the shipped policies."""
    begun = time.monotonic()
    for line in LINES:
        done = shell(line)
        print(f"{time.monotonic() - begun:7.1f} s  {command(line)}")
        if command(line) in LATER:
            assert refused(done, "control plane"), done.stderr
        else:
            assert done.returncode == 0, done.stderr
        if command(line) == "steer":
            assert done.stdout.count("receipt: ") == 4
            assert "the answers are the same" in done.stdout
    report = json.loads((checkout / ".io_cache" / "reports" / "jailbreak_report.json").read_text())
    by_id = {policy["id"]: policy for policy in report["policies"]}
    assert set(by_id) == {"jailbreak", "jailbreak-sae", "toxicity"}
    success = by_id["jailbreak"]["suites"]["jailbreak_demo_v1"]["metrics"]["attack_success_rate"]
    assert success["with"]["value"] < success["without"]["value"]
