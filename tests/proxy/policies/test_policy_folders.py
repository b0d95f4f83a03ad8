"""Unreadable policy folders and files: list, log and metric report each, and nothing is lost."""

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_gateway import Front, PolicyWriter, Start

from interpretops.artifacts import Artifacts
from interpretops.plan import ModelSpec
from proxy.policies.entry import ReloadReport
from proxy.policies.policy_folders import SOURCES, PolicyFolders

NOBODY = 65534
MODEL = ModelSpec("tiny-model", "f" * 64, "LlamaForCausalLM", 8, 4, 2, 2, 4, 32)


def broken(front: Front) -> dict[str, float]:
    """The metric's values other than 0."""
    sample = front.apps.gateway.metrics.registry.get_sample_value
    counted = {source: sample("interpretops_policy_sources_broken", {"source": source}) for source in SOURCES}
    assert None not in counted.values(), "every source is there from the start"
    return {source: value for source, value in counted.items() if value}


async def reported(front: Front, path: Path) -> tuple[Any, ...]:
    """The error of a file or folder in the list and, once, in the log."""
    listed = (await front.policy_list())["file_errors"].get(str(path))
    logged = [
        line["error"] for line in front.log if line["event"] == "policy_refused" and line["file"] == str(path)
    ]
    return listed, logged


async def look(front: Front, times: int = 3) -> ReloadReport:
    """Reload repeatedly, as the watch does."""
    for _ in range(times):
        report = await front.apps.gateway.intake.reload()
    return report


QUIET = {"gateway.watch_policies": False, "bindings": [{"policy": "calm", "mode": "mandatory"}]}


async def serves(front: Front) -> bool:
    """Mandatory and optional policies still answer."""
    status, headers, _ = await front.chat()
    return status == 200 and headers["X-Steering-Policy"].startswith("calm@")


VANISH = {
    "gone": shutil.rmtree,
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("no folder")),  # type: ignore[func-returns-value]
    "a link to itself": lambda folder: (shutil.rmtree(folder), folder.symlink_to(folder)),  # type: ignore[func-returns-value]
    "a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to(folder / "nothing")),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("how", VANISH)
async def test_lost_policy_folder_is_reported_and_withdraws_nothing(
    start: Start, policy_writer: PolicyWriter, how: str
) -> None:
    """All policies keep serving, mandatory or not; list, log and metric report the error until the folder is
    back."""
    front = await start("calm", "other", **QUIET)
    assert broken(front) == {}
    VANISH[how](front.policies)
    report = await look(front)
    assert list(report.failed) == [str(front.policies)]
    assert broken(front) == {"policies": 1}
    listed, logged = await reported(front, front.policies)
    assert listed.startswith(f"paths.policies = {front.policies}, but ")
    assert logged == [listed]
    assert {entry["state"] for entry in (await front.policy_list())["policies"]} == {"active"}
    assert await serves(front)
    front.policies.unlink(missing_ok=True)
    front.policies.mkdir()
    for name in ("calm", "other"):
        policy_writer(front.policies, name)
    assert (await look(front)).failed == {}
    assert broken(front) == {}
    assert (await reported(front, front.policies))[0] is None


@contextlib.contextmanager
def without_rights(*folders: Path) -> Iterator[Any]:
    """Run without read permission on the folders; root temporarily uses another uid."""
    for folder in folders:
        folder.chmod(0)
    libc = ctypes.CDLL(None)
    before = libc.setfsuid(NOBODY if os.geteuid() == 0 else -1)
    try:
        yield
    finally:
        libc.setfsuid(before)
        for folder in folders:
            folder.chmod(0o755)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder accessible to all users, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_unreadable_folder_is_not_an_empty_one(open_folder: Path, policy_writer: PolicyWriter) -> None:
    """Files in an unreadable folder are hidden, not treated as deleted."""
    policies, artifacts = open_folder / "policies", open_folder / "artifacts"
    for folder in (policies / "nested", policies / "cards", artifacts / "model"):
        folder.mkdir(parents=True)
    policy_writer(policies, "calm")
    shutil.copy(policies / "calm.yaml", policies / "nested" / "policy.yaml")
    folders = PolicyFolders(policies, artifacts)
    whole = folders.scan()
    assert {path.name for path in whole.files} == {"calm.yaml", "policy.yaml"}
    assert whole.hidden == {}
    with without_rights(policies):
        found = folders.scan()
    assert found.files is None
    assert {path: source for path, (source, _) in found.hidden.items()} == {policies: "policies"}
    assert "cannot be read (Permission denied)" in found.hidden[policies][1]
    with without_rights(policies / "nested", policies / "cards", artifacts / "model"):
        found = folders.scan()
        assert {path: source for path, (source, _) in found.hidden.items()} == {
            policies / "nested": "policies",
            policies / "cards": "cards",
            artifacts / "model": "artifacts",
        }
    assert list(found.files) == [policies / "calm.yaml"]
    assert found.hides(policies / "nested" / "policy.yaml")
    assert not found.hides(policies / "gone.yaml")
    with without_rights(artifacts):
        found = folders.scan()
        assert found.hidden.keys() == {artifacts}
        text = f"unreadable: {artifacts}: Permission denied"
        assert text in Artifacts(artifacts, MODEL)._what_there_is()


async def test_policy_in_an_unreadable_folder_keeps_serving(
    start: Start, monkeypatch: pytest.MonkeyPatch, policy_writer: PolicyWriter
) -> None:
    """The policy stays active although its file cannot be seen."""
    front = await start(**{"gateway.watch_policies": False})
    nested = front.policies / "nested"
    nested.mkdir()
    policy_writer(nested, "policy").rename(nested / "policy.yaml")
    await look(front)
    scandir = os.scandir

    def denied(folder: Path) -> Any:
        if Path(folder) == nested:
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    assert list((await look(front)).failed) == [str(nested)]
    assert broken(front) == {"policies": 1}
    status, headers, _ = await front.chat(model="tiny-model+policy")
    assert (status, headers["X-Steering-Policy"][:7]) == (200, "policy@")


@pytest.mark.parametrize(
    ("content", "source"),
    [
        ("meta: [", "file"),
        ("", "file"),
        ("{}", "file"),
        (
            "meta: {id: calm}\ninterventions:\n  - {type: head_scale, selector: {layer: 1, heads: [0]}}",
            "duplicate",
        ),
    ],
)
async def test_new_unusable_file_is_reported(start: Start, content: str, source: str) -> None:
    """A file that is not a policy, or whose id is taken, is counted until it is fixed or deleted."""
    front = await start("calm", **QUIET)
    new = front.policies / "new.yaml"
    new.write_text(content.replace("[0]}}", "[0]}, scale: 0.5}"))
    assert list((await look(front)).failed) in ([], [str(new)])
    assert broken(front) == {source: 1}
    listed, logged = await reported(front, new)
    assert listed.startswith(f"{new}: ")
    assert logged == [listed]
    assert await serves(front)
    new.unlink()
    await look(front)
    assert broken(front) == {}


async def test_unreadable_file_is_reported(start: Start) -> None:
    """A new file is counted; a known one sets its policy's own metric, and its revision keeps serving."""
    front = await start("calm", **QUIET)
    (front.policies / "new.yaml").mkdir()
    (front.policies / "calm.yaml").unlink()
    (front.policies / "calm.yaml").mkdir()
    await look(front)
    assert broken(front) == {"file": 1}
    assert await front.policy_error("calm")
    assert await serves(front)


async def test_file_whose_id_was_taken_serves_when_the_other_is_deleted(
    start: Start, policy_writer: PolicyWriter
) -> None:
    """It is tried again without being changed."""
    front = await start("other", **QUIET | {"bindings": [{"policy": "*"}]})
    policy_writer(front.policies, "other", scale=0.25).rename(front.policies / "second.yaml")
    policy_writer(front.policies, "other")
    await look(front)
    assert broken(front) == {"duplicate": 1}
    (front.policies / "other.yaml").unlink()
    await look(front)
    assert broken(front) == {}
    (entry,) = (await front.policy_list())["policies"]
    assert (entry["file"], entry["error"]) == (str(front.policies / "second.yaml"), None)


async def test_file_of_a_required_policy_may_be_renamed(start: Start) -> None:
    """The new file replaces the deleted one, and no request is refused meanwhile."""
    front = await start("calm", **QUIET)
    (front.policies / "calm.yaml").rename(front.policies / "renamed.yaml")
    await look(front)
    assert broken(front) == {}
    assert await front.policy_error("calm") is None
    assert await serves(front)
    assert (await look(front)).failed == {}


@pytest.mark.parametrize("source", ["artifacts", "cards"])
async def test_lost_artifact_and_card_folders_are_reported(start: Start, tmp_path: Path, source: str) -> None:
    """A folder that never existed is optional; a lost one is reported, and loaded policies keep serving."""
    folder = tmp_path / ("policies/cards" if source == "cards" else "artifacts")
    front = await start("calm", **QUIET, **{"paths.artifacts": tmp_path / "artifacts"})
    await look(front)
    assert broken(front) == {}
    folder.mkdir()
    await look(front)
    assert broken(front) == {}
    folder.rmdir()
    await look(front)
    assert broken(front) == {source: 1}
    listed, logged = await reported(front, folder)
    assert "there is no such folder" in listed
    assert logged == [listed]
    assert await serves(front)
    folder.mkdir()
    await look(front)
    assert broken(front) == {}
