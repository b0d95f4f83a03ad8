"""A special or hanging file, in place of one that a running gateway reads, blocks nothing."""

import ast
import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from fake_engine import FakeEngine
from running_gateway import Front, PolicyWriter, Start, Until

from interpretops.artifacts.dictionary.manifest import read_manifest, sha256_of
from interpretops.errors import ConfigError
from interpretops.files.json_file import read_json_object
from interpretops.files.strict_yaml import read_yaml
from interpretops.files.tensor_file import TensorFile
from interpretops.records.api_keys import read_keys
from interpretops.records.transcript_file import Vault
from interpretops.settings import AuditSettings, load_settings
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics
from proxy.policies import policy_reading
from proxy.policies.drift import _read as read_baselines
from proxy.policies.policy_files import Revision, file_digest
from proxy.policies.policy_folders import Listing, PolicyFolders
from proxy.process.file_reader import Reader
from proxy.tenants.budget import _read as read_budgets
from proxy.verification.canary import read_suite


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


ODD = (a_pipe, a_folder, a_socket, an_endless_device, a_link_to_itself, a_huge_file)


async def reload(front: Front) -> dict[str, Any]:
    async with asyncio.timeout(20), front.admin.post("/admin/reload") as answer:
        return await answer.json()


@pytest.mark.parametrize("odd", ODD)
async def test_special_file_among_policies_affects_only_itself(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter, odd: Callable[..., Any]
) -> None:
    """The report names it; all other policies are reloaded, and nothing waits for it."""
    front = await start("calm", **{"gateway.watch_policies": False})
    (front.policies / "sub").mkdir()
    (front.policies / "cards").mkdir()
    places = [front.policies / "odd.yaml", front.policies / "sub" / "policy.yaml"]
    for path in places:
        odd(path)
    odd(front.policies / "cards" / "calm.json")
    text = policy_writer(front.policies, "calm", 0.25).read_text()
    (front.policies / "calm.yaml").write_text(
        text + "evaluation: {success_criteria: {collateral_damage_max: 0.05}}\n"
    )
    report = await reload(front)
    # A folder has no content: it is skipped or reported, and nothing else happens.
    assert set(report["failed"]) <= {*map(str, places)}
    assert odd is a_folder or set(report["failed"]) == {*map(str, places)}
    assert len(report["waiting"]) == 1
    (listed,) = (await front.policy_list())["policies"]
    body = {"revision": listed["candidate"]}
    async with front.admin.post("/admin/policies/calm/promote", json=body) as answer:
        assert answer.status == 409
    assert (await front.chat(model="tiny-model+calm"))[0] == 200


LOG = structlog.get_logger()
READERS = {
    "policies": file_digest,
    "settings": load_settings,
    "yaml": lambda path: read_yaml(path, ConfigError),
    "keys": read_keys,
    "json": lambda path: read_json_object(path, ConfigError),
    "tensors": lambda path: TensorFile(path, ConfigError),
    "checksum": sha256_of,
    "manifest": lambda path: read_manifest(path.parent),
    "canary": read_suite,
    "transcripts": lambda path: Vault("acme", f"file:{path}"),
    "budgets": read_budgets,
    "baselines": read_baselines,
    "audit": lambda path: AuditLog(path, AuditSettings(path=path), Metrics(), LOG),
    "head": lambda path: AuditLog(path.with_suffix(""), AuditSettings(path=path), Metrics(), LOG),
}


def test_every_file_that_a_gateway_reads_is_refused_at_once(tmp_path: Path) -> None:
    """No reader opens a pipe or device and waits: each raises at once."""
    program = "\n".join(
        [
            "import faulthandler, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])",
            "from test_odd_files import READERS; from interpretops.errors import InterpretOpsError",
            "faulthandler.dump_traceback_later(240, exit=True)",
            "for folder in sys.argv[2:]:",
            "    for name, read in READERS.items():",
            "        try:",
            "            got = read(Path(folder) / ('manifest.yaml' if name == 'manifest' else 'x.head'))",
            "            assert 'unreadable' in str(got), name",
            "        except (InterpretOpsError, OSError): pass",
        ]
    )
    for odd in ODD[:-1]:
        (tmp_path / odd.__name__).mkdir()
        odd(tmp_path / odd.__name__ / "x.head")
        odd(tmp_path / odd.__name__ / "manifest.yaml")
    folders = [*map(str, sorted(tmp_path.iterdir()))]
    command = [sys.executable, "-c", program, str(Path(__file__).parent), *folders]
    support = Path(__file__).resolve().parents[1] / "support"
    paths = os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths}
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


OWN = {
    "interpretops.files.regular_file": "opens what others wrote, and checks it",
    "interpretops.files.atomic_file": "writes",
    "interpretops.model.default_model": "runs in a process of its own, on files that it made",
    "interpretops.records.transcript_file": "appends to its own files; only `mechctl transcripts` reads them",
    "proxy.observe.audit_file": "appends to its own files, which it checks to be plain",
    "proxy.process.file_lock": "makes its own files",
    "proxy.engines.local_engine": "the log that it made itself",
    "proxy.engines.command": "what the kernel tells in /proc and /sys",
    "proxy.verification.canary": "the suite that is part of the package",
    "proxy.process.signals": "the terminal",
}
"""Modules of a gateway that open files directly, and why they may."""


def test_nothing_else_in_a_gateway_opens_files() -> None:
    """New code that opens files written by others must use the same function."""
    program = (
        "import sys, proxy.serve, interpretops.artifacts.adapter, interpretops.compile\n"
        "import interpretops.artifacts.dictionary\n"
        "for name, module in sorted(sys.modules.items()):\n"
        "    if name.split('.')[0] in ('proxy', 'interpretops'): print(name, module.__file__)"
    )
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = dict(line.split(" ", 1) for line in listed.stdout.splitlines())
    assert len(modules) > 90
    opening = {
        name
        for name, file in modules.items()
        for node in ast.walk(ast.parse(Path(file).read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", None))
        in ("open", "read_text", "read_bytes", "fdopen", "memmap", "load_file", "safe_open", "fromfile")
    }
    assert opening == OWN.keys()


async def test_rollback_does_not_wait_for_a_file_that_hangs(
    start: Start, policy_writer: PolicyWriter, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """While a reload hangs in the file system the catalogue's lock is free: requests are answered and a
    rollback works at once. The reload ends with an error that names the folder, and the watch continues."""
    front = await start("calm", **{"gateway.watch_policies": False})
    policy_writer(front.policies, "calm", 0.25)
    await reload(front)
    held, hanging = threading.Event(), threading.Event()
    look = PolicyFolders.scan

    def hang(folders: PolicyFolders) -> Listing:
        hanging.set()
        held.wait(30)
        return look(folders)

    monkeypatch.setattr(PolicyFolders, "scan", hang)
    monkeypatch.setattr(front.apps.gateway.intake._reading, "_listing", Reader("the folder", 3.0))
    reloading = asyncio.create_task(reload(front))
    await asyncio.to_thread(hanging.wait, 10)
    async with asyncio.timeout(5), front.admin.post("/admin/policies/calm/rollback") as answer:
        assert answer.status == 200
    assert not reloading.done()
    assert (await front.chat(model="tiny-model+calm"))[0] == 200
    report = await reloading
    assert "the folder: could not be read within 3 s" in report["failed"][str(front.policies)]
    held.set()

    async def well() -> bool:  # once the thread that hung has ended
        return (await reload(front))["ok"]

    await until(well)


async def test_hanging_or_crashing_file_affects_only_itself(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose compilation hangs, and one that raises an unexpected error, are reported without the
    error's text; the others are loaded."""
    front = await start("calm", **{"gateway.watch_policies": False})
    held, compile_file = threading.Event(), policy_reading.compile_file

    def odd(path: Path, *arguments: Any) -> Revision:
        if path.name == "a-hangs.yaml":
            held.wait(30)
        if path.name == "b-fails.yaml":
            raise ZeroDivisionError("secret")
        return compile_file(path, *arguments)

    monkeypatch.setattr(policy_reading, "compile_file", odd)
    monkeypatch.setattr(policy_reading, "_COMPILE_S", 0.2)
    for name in ("a-hangs", "b-fails", "calm", "new"):
        policy_writer(front.policies, name, 0.25)
    for _ in range(2):
        report = await reload(front)
        assert [Path(path).name for path in report["failed"]] == ["a-hangs.yaml", "b-fails.yaml"]
        got = json.dumps(report["failed"])
        assert "could not be read within 0.2 s" in got
        assert "unexpected ZeroDivisionError" in got
        assert "secret" not in got
    assert (await front.chat(model="tiny-model+new"))[0] == 200
    held.set()
