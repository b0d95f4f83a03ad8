"""Folders and files of policies that cannot be taken: list, log and metric tell each, and nothing is lost."""

import contextlib
import ctypes
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from interpretops.artifacts import Artifacts
from interpretops.plan import ModelSpec
from proxy.policies.policy_folders import SOURCES, PolicyFolders

NOBODY = 65534
MODEL = ModelSpec("tiny-model", "f" * 64, "LlamaForCausalLM", 8, 4, 2, 2, 4, 32)


def broken(front):
    """What the metric counts, without what is well."""
    sample = front.apps.gateway.metrics.registry.get_sample_value
    counted = {source: sample("interpretops_policy_sources_broken", {"source": source}) for source in SOURCES}
    assert None not in counted.values(), "every source is there from the start"
    return {source: value for source, value in counted.items() if value}


async def told(front, path):
    """What operators are told of a file or folder: in the list and, once, in the log."""
    listed = (await front.policy_list())["file_errors"].get(str(path))
    logged = [
        line["error"] for line in front.log if line["event"] == "policy_refused" and line["file"] == str(path)
    ]
    return listed, logged


async def look(front, times=3):
    """As the watch does again and again."""
    for _ in range(times):
        report = await front.apps.gateway.intake.reload()
    return report


QUIET = {"gateway.watch_policies": False, "bindings": [{"policy": "calm", "mode": "mandatory"}]}


async def serves(front):
    """Mandatory and optional policies answer as before."""
    status, headers, _ = await front.chat()
    return status == 200 and headers["X-Steering-Policy"].startswith("calm@")


VANISH = {
    "gone": shutil.rmtree,
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("no folder")),  # type: ignore[func-returns-value]
    "a link to itself": lambda folder: (shutil.rmtree(folder), folder.symlink_to(folder)),  # type: ignore[func-returns-value]
    "a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to(folder / "nothing")),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("how", VANISH)
async def test_policies_folder_that_vanishes_is_told_and_takes_nothing_along(start, policy_writer, how):
    """Everything serves on, mandatory or not; list, log and metric say what is wrong until it is back."""
    front = await start("calm", "other", **QUIET)
    assert broken(front) == {}
    VANISH[how](front.policies)
    report = await look(front)
    assert list(report.failed) == [str(front.policies)]
    assert broken(front) == {"policies": 1}
    listed, logged = await told(front, front.policies)
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
    assert (await told(front, front.policies))[0] is None


@contextlib.contextmanager
def without_rights(*folders):
    """As somebody who may not look into the folders; the superuser looks with another's eyes meanwhile."""
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
def open_folder():
    """A folder that everybody may reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_folder_without_rights_is_not_an_empty_one(open_folder, policy_writer):
    """A folder, or one in it, that may not be looked into hides its files; they are not taken for deleted."""
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
        text = f"not readable: {artifacts}: Permission denied"
        assert text in Artifacts(artifacts, MODEL)._what_there_is()


async def test_policy_in_a_hidden_folder_goes_on(start, monkeypatch, policy_writer):
    """It is not taken out of service, though its file cannot be seen."""
    front = await start(**{"gateway.watch_policies": False})
    nested = front.policies / "nested"
    nested.mkdir()
    policy_writer(nested, "policy").rename(nested / "policy.yaml")
    await look(front)
    scandir = os.scandir

    def denied(folder):
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
async def test_new_file_that_serves_nothing_is_told(start, content, source):
    """One that is no policy, and one whose id is taken: counted until it is mended or deleted."""
    front = await start("calm", **QUIET)
    new = front.policies / "new.yaml"
    new.write_text(content.replace("[0]}}", "[0]}, scale: 0.5}"))
    assert list((await look(front)).failed) in ([], [str(new)])
    assert broken(front) == {source: 1}
    listed, logged = await told(front, new)
    assert listed.startswith(f"{new}: ")
    assert logged == [listed]
    assert await serves(front)
    new.unlink()
    await look(front)
    assert broken(front) == {}


async def test_file_that_cannot_be_read_is_told(start):
    """A new one is counted; a known one is the policy's own metric, and its revision serves on."""
    front = await start("calm", **QUIET)
    (front.policies / "new.yaml").mkdir()
    (front.policies / "calm.yaml").unlink()
    (front.policies / "calm.yaml").mkdir()
    await look(front)
    assert broken(front) == {"file": 1}
    assert await front.policy_error("calm")
    assert await serves(front)


async def test_file_whose_id_was_taken_serves_when_the_other_is_deleted(start, policy_writer):
    """It is tried again without being touched."""
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


async def test_file_of_a_demanded_policy_may_be_renamed(start):
    """The new file takes the place of the one that is gone, and nothing is refused meanwhile."""
    front = await start("calm", **QUIET)
    (front.policies / "calm.yaml").rename(front.policies / "renamed.yaml")
    await look(front)
    assert broken(front) == {}
    assert await front.policy_error("calm") is None
    assert await serves(front)
    assert (await look(front)).failed == {}


@pytest.mark.parametrize("source", ["artifacts", "cards"])
async def test_folders_beside_the_policies_are_missed_when_they_vanish(start, tmp_path, source):
    """One that never was is not needed; one that is gone is told, and what was loaded serves on."""
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
    listed, logged = await told(front, folder)
    assert "there is no such folder" in listed
    assert logged == [listed]
    assert await serves(front)
    folder.mkdir()
    await look(front)
    assert broken(front) == {}
