"""The commands of README and docs: each is run by a test, or listed here with the reason why not."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest
import typer
from documents import DOCUMENTS, ROOT, Command, blocks, commands, name_of

from mechctl.main import app

RUN_BY: Final = {
    "README.md: curl": "test_quick_start_answers_as_the_readme_says",
    "README.md: mechctl steer": "test_readme_shows_what_steer_prints",
    "README.md: mechctl policy": "test_policy_of_the_readme_is_valid_and_compiles",
    "docs/demo.md: mechctl circuits": "test_circuits_are_listed_newest_first",
    "docs/demo.md: mechctl": "test_every_line_works_as_it_stands",
    "docs/deploy.md: cd": "test_secrets_of_the_compose_page_are_made",
    "docs/deploy.md: mechctl keys": "test_secrets_of_the_compose_page_are_made",
    "docs/deploy.md: openssl": "test_secrets_of_the_compose_page_are_made",
    "docs/deploy.md: chmod": "test_secrets_of_the_compose_page_are_made",
    "docs/gateway.md: mechctl doctor": "test_healthy_setup_has_no_fault",
    "docs/gateway.md: mechctl config show": "test_looking_commands_of_the_gateway_page_run",
    "docs/gateway.md: mechctl policy diff": "test_looking_commands_of_the_gateway_page_run",
    "docs/gateway.md: mechctl keys": "test_keys_of_the_gateway_page_are_made_rotated_and_revoked",
    "docs/gateway.md: mechctl audit verify": "test_head_kept_elsewhere_proves_what_the_files_cannot",
    "docs/gateway.md: mechctl transcripts": "test_command_makes_keys_and_reads_back",
    "docs/new-risk-class.md: ": "test_the_walk_ends_in_a_served_policy_that_acts",
    "docs/risk-cards.md: mechctl eval --compare": "test_cards_are_shown_and_compared_as_the_page_says",
    "docs/risk-cards.md: mechctl report": "test_cards_are_shown_and_compared_as_the_page_says",
    "docs/risk-cards.md: mechctl eval --suite": "test_every_line_works_as_it_stands",
    "docs/scaling.md: python -m benchmarks.capacity": "test_capacity_is_computed_for_engines_of_ones_own",
    "docs/simulation.md: make simulate": "test_several_processes_find_the_same_as_one",
}
"""Which test runs a command, by page and beginning; the longest entry that fits counts."""

NOT_RUN: Final = {
    "CONTRIBUTING.md: make": "they are the checks and tests themselves, and CI runs check and test",
    "CONTRIBUTING.md: .venv/bin/pre-commit": "changes the checkout's git hooks",
    "README.md: git clone": "the address is the reader's own",
    "README.md: make run": "installs packages; the test of the Quick start runs its server, `mechctl serve`",
    "docs/circuits.md: mechctl search": "up to an hour of search, partly on data that we do not ship",
    "docs/deploy.md: useradd": "changes the machine",
    "docs/deploy.md: git clone": "the address is the reader's own",
    "docs/deploy.md: install": "changes the machine",
    "docs/deploy.md: cp": "changes the machine",
    "docs/deploy.md: systemctl": "changes the machine",
    "docs/deploy.md: docker": "needs a container engine",
    "docs/deploy.md: kubectl": "needs a cluster",
    "docs/deploy.md: helm": "needs a cluster; tests/deploy renders the chart",
    "docs/discovery.md: mechctl": "hours, on public data that we do not ship; the demo runs small ones",
    "docs/discovery.md: torchrun": "needs several machines",
    "docs/fleet.md: mechctl serve": "needs engines at these addresses",
    "docs/fleet.md: ray": "needs several machines with GPUs",
    "docs/fleet.md: VLLM_PLUGINS=interpretops vllm serve": "needs several machines with GPUs",
    "docs/gateway.md: curl": "address and key are the reader's own; tests/proxy asks /admin/resolve",
    "docs/gateway.md: pip install": "needs a package index",
    "docs/risk-cards.md: mechctl eval": "an hour, partly on data that is not shipped; the demo runs less",
    "docs/risk-cards.md: mechctl baselines": "reads public data that we do not ship",
    "docs/scaling.md: python": "a quarter of an hour, and a figure only on a quiet machine",
    "docs/scaling.md: locust": "needs a deployed gateway",
    "docs/scaling.md: make soak": "half an hour",
    "docs/testing.md: make": "they are the tests themselves",
    "docs/sdk.md: mechctl steer": "the page's programs make the policy; the README's `mechctl steer` is run",
}
"""Why no test runs a command, in the same form."""

PROGRAMS: Final = {
    "README.md": "test_quick_start_answers_as_the_readme_says",
    "docs/circuits.md": "test_program_of_the_circuits_page_reads_the_shipped_circuit",
    "docs/risk-cards.md": "test_program_of_the_cards_page_reads_a_shipped_card",
    "docs/sdk.md": "test_the_page_of_the_sdk_holds",
}
"""Which test runs the Python blocks of a page."""

ALL: Final = [command for document in DOCUMENTS for command in commands(document)]
PLACEHOLDER: Final = re.compile(r"<[^>]+>|…")

Shell = Callable[..., str]


def entry_of(command: Command) -> str | None:
    """The longest entry of the two lists that fits a command."""
    line = f"{command.document}: {re.sub(' +', ' ', command.text)}"
    return max((entry for entry in {**RUN_BY, **NOT_RUN} if line.startswith(entry)), key=len, default=None)


def of_page(document: str, *beginnings: str) -> list[str]:
    """The commands of one page that begin so."""
    here = (command.text for command in ALL if command.document == document)
    return [text for text in here if text.startswith(beginnings)]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs a line with bash in an empty folder, with `mechctl` and `python` on its path; gives its output."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("mechctl", " -m mechctl.main"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (programs / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(line: str, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line], cwd=cwd, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        return done.stdout

    return run


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.document}: {command.text[:60]}")
def test_command_is_run_or_listed_with_its_reason(command: Command) -> None:
    """Each shell command of README and docs is run by a test, or stands in `NOT_RUN`."""
    assert entry_of(command) is not None


def test_lists_hold_nothing_that_is_gone() -> None:
    """Every entry fits a command, no entry is in both lists, and every test that they name exists."""
    assert {*RUN_BY, *NOT_RUN} == {entry_of(command) for command in ALL}
    assert not RUN_BY.keys() & NOT_RUN.keys()
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"def (test_\w+)\(", source))
    assert {*RUN_BY.values(), *PROGRAMS.values()} <= there


def test_python_blocks_are_run() -> None:
    """Each page with Python blocks has a test that runs them."""
    assert {name_of(document) for document in DOCUMENTS if blocks(document, "python")} == set(PROGRAMS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_stand_in_shell_blocks(document: Path) -> None:
    """No command hides in an indented block, where the tests of this file would not see it."""
    known = {command.words[0] for command in ALL}
    indented = re.findall(r"^    (?:\$ )?(\S+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert known.isdisjoint(indented)


def check_options(words: list[str]) -> None:
    """Raise click's `UsageError` when a command line of `mechctl` names what there is not."""
    rest = [word for word in words[1:] if word not in ("&", ">", "…")]
    part = typer.main.get_command(app)
    while rest and hasattr(part, "commands"):
        part = part.commands[rest.pop(0)]
    part.make_parser(part.context_class(part)).parse_args(rest)


@pytest.mark.parametrize(
    "command",
    [command for command in ALL if command.words[0] == "mechctl"],
    ids=lambda command: f"{command.document}: {command.text[:60]}",
)
def test_options_of_mechctl_exist(command: Command) -> None:
    """Each `mechctl` command names commands and options that there are, run or not."""
    check_options(command.words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_mechctl_named_in_a_sentence_exists(document: Path) -> None:
    """What a page's sentences name, as `mechctl keys rotate`, are commands and options that there are."""
    named = re.findall(r"`(mechctl [^`]+)`", document.read_text(encoding="utf-8"))
    for words in map(shlex.split, named):
        value = ["value"] if words[-1].startswith("--") else []  # an option that is named without one
        check_options([*words, *value])


@pytest.mark.parametrize(
    "command",
    [command for command in ALL if command.words[:2] == ["python", "-m"]],
    ids=lambda command: command.text[:60],
)
def test_modules_exist(command: Command) -> None:
    """Each `python -m` of the pages names a module of the repository."""
    assert find_spec(command.words[2]) is not None


def test_files_that_commands_name_are_part_of_the_repository() -> None:
    """What a command reads under our own folders is there."""
    named = {
        word
        for command in ALL
        for word in command.words
        if re.match(r"(benchmarks|data|deploy|discovery|policies|docs)/", word)
        and not PLACEHOLDER.search(word)
    }
    made = {"policies/calm.yaml", "policies/toxicity.yaml", "deploy/compose"}
    assert {word for word in named if not (ROOT / word).exists()} <= made


def test_page_of_the_demo_has_the_lines_of_the_demo() -> None:
    """docs/demo.md shows lines of tests/fixtures/reference-demo.sh, which a test runs as they stand."""
    reference = (ROOT / "tests/fixtures/reference-demo.sh").read_text(encoding="utf-8").splitlines()
    page = [line for line in of_page("docs/demo.md", "mechctl") if not line.startswith("mechctl circuits")]
    assert page == [line for line in reference if line in page]
    assert len(page) == 5


def test_policy_of_the_readme_is_valid_and_compiles(shell: Shell, default_model_dir: Path) -> None:
    """README's policy and the commands below it work together, on the default model and its dictionary."""
    del default_model_dir
    text = blocks(ROOT / "README.md", "yaml")[0]
    lines = of_page("README.md", "mechctl policy")
    assert len(lines) == 2
    folder = Path(shell("mkdir checkout && cd checkout && pwd").strip())
    for name in ("sae_artifacts", "policies/cards"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    (folder / "policies/calm.yaml").write_text(text, encoding="utf-8")
    for line in lines:
        assert "calm-v1" in shell(line, folder)


def test_looking_commands_of_the_gateway_page_run(shell: Shell, default_model_dir: Path) -> None:
    """`mechctl config show` and `mechctl policy diff` of docs/gateway.md run in a checkout."""
    del default_model_dir
    show, diff = of_page("docs/gateway.md", "mechctl config", "mechctl policy")
    assert "model.name" in shell(show, ROOT)
    assert shell(diff, ROOT).startswith("the same: ")


def test_keys_of_the_gateway_page_are_made_rotated_and_revoked(shell: Shell, tmp_path: Path) -> None:
    """The `mechctl keys` commands of docs/gateway.md run in their order, with the page's own settings."""
    (settings,) = (text for text in blocks(ROOT / "docs/gateway.md", "yaml") if "paths: {keys" in text)
    (tmp_path / "config.yaml").write_text(settings, encoding="utf-8")
    add, role, show, rotate, revoke = of_page("docs/gateway.md", "mechctl keys")
    key = shell(add).split()[-1]
    (public,) = re.findall(r"iops_([0-9a-f]+)_", key)
    assert "iops_" in shell(role)
    assert public in shell(show)
    assert f"iops_{public}_" in shell(rotate.replace("0123456789ab", public))
    shell(revoke.replace("0123456789ab", public))
    assert public not in shell(show)


def test_secrets_of_the_compose_page_are_made(shell: Shell, tmp_path: Path) -> None:
    """The commands of docs/deploy.md before `docker compose up` leave the secrets that compose mounts."""
    (tmp_path / "deploy/compose").mkdir(parents=True)
    shell("\n".join(of_page("docs/deploy.md", "cd deploy/compose", "mechctl keys", "openssl", "chmod")))
    secrets = tmp_path / "deploy/compose/secrets"
    assert (secrets / "viewer").read_text().strip().startswith("iops_")
    assert len((secrets / "grafana").read_text().strip()) == 32
    assert (secrets / "gateway/keys.yaml").stat().st_mode & 0o044


def test_cards_are_shown_and_compared_as_the_page_says(shell: Shell, tmp_path: Path) -> None:
    """`mechctl eval --compare` and `mechctl report` of docs/risk-cards.md show cards."""
    for folder in ("before", "after", "runs/cached", "runs/uncached", "runs/eval-jailbreak"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(ROOT / "policies/cards/jailbreak.json", tmp_path / folder / "card.json")
    compared = of_page("docs/risk-cards.md", "mechctl eval --compare")
    assert len(compared) == 2
    for line in compared:
        assert "jailbreak@" in shell(line)
    (report,) = of_page("docs/risk-cards.md", "mechctl report")
    shell(report)
    assert "jailbreak" in (tmp_path / "card.html").read_text(encoding="utf-8")


def test_capacity_is_computed_for_engines_of_ones_own(shell: Shell) -> None:
    """The capacity command of docs/scaling.md prints tables for the engine that it is given."""
    (line,) = of_page("docs/scaling.md", "python -m benchmarks.capacity")
    assert "Engines of 5000 tokens/s (batch 128)" in shell(line, ROOT)


def run_programs(page: str) -> dict[str, object]:
    """Run the Python blocks of a page one after another; gives their names."""
    names: dict[str, object] = {}
    for text in blocks(ROOT / page, "python"):
        exec(compile(text, page, "exec"), names)  # noqa: S102 (our own page)
    return names


def test_program_of_the_circuits_page_reads_the_shipped_circuit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of docs/circuits.md finds components and features in the shipped circuit."""
    shutil.copy(ROOT / "sae_artifacts/smollm2-135m-instruct/circuits/jailbreak.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = run_programs("docs/circuits.md")
    assert names["heads_and_mlps"]
    assert names["features"]


def test_program_of_the_cards_page_reads_a_shipped_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program of docs/risk-cards.md prints a card's verdict."""
    shutil.copy(ROOT / "policies/cards/toxicity.json", tmp_path / "card.json")
    monkeypatch.chdir(tmp_path)
    run_programs("docs/risk-cards.md")
    verdict = capsys.readouterr().out.strip()
    assert verdict in ("pass", "fail")
    assert f"**{verdict}**" in (ROOT / "policies/cards/toxicity.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_figures_are_those_of_cards_and_benchmarks(page: str) -> None:
    """The figures of the shipped policies and of the gateway are those of the Risk Cards and results."""
    text = (ROOT / page).read_text(encoding="utf-8")

    def measured(policy: str, measure: str) -> str:
        card = json.loads((ROOT / f"policies/cards/{policy}.json").read_text(encoding="utf-8"))
        found = card["measures"][measure]
        low, high = (100 * found["interval"][end] for end in ("low", "high"))
        return f"{100 * found['value']:.1f} % [{low:.1f}, {high:.1f}]"

    for policy, measures in {
        "jailbreak": ("defense_efficacy", "collateral_damage", "over_refusal"),
        "toxicity": ("defense_efficacy",),
        "jailbreak-sae": ("defense_efficacy", "collateral_damage"),
    }.items():
        for measure in measures:
            assert measured(policy, measure) in text, (policy, measure)
    steering = json.loads((ROOT / "benchmarks/results/steering.json").read_text())
    gateway = json.loads((ROOT / "benchmarks/results/gateway.json").read_text())
    for batch in ("batch_16", "batch_1"):
        assert f"{steering[batch]['steered']['over_vanilla']:.3f}" in text, batch
    low, high = gateway["added_p50_ms_range"]
    assert f"{gateway['added_p50_ms']:.3f} ms" in text
    assert f"{low:.3f} to {high:.3f})" in text
    assert f"{gateway['gateway_cpu_us'] / 1000:.2f} ms" in text
