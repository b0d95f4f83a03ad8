"""`mechctl doctor` reports what prevents the gateway from serving, and the remedy."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

MODEL_POLICY = {
    "meta": {"id": "calm", "target_class": "toxicity"},
    "interventions": [{"type": "head_scale", "selector": {"layer": 0, "heads": [0]}, "scale": 0.5}],
}


def doctor(
    settings: dict[str, object], folder: Path, model: Path
) -> tuple[int, dict[str, tuple[str, str]], str]:
    """Exit status, `{subject: (state, text)}`, and what was printed, of `mechctl doctor --json`."""
    (folder / "policies").mkdir(exist_ok=True)
    file = folder / "config.yaml"
    defaults: dict[str, dict[str, object]] = {
        "model": {"name": str(model)},
        "gateway": {"port": free_port(), "admin_port": free_port()},
        "paths": {"policies": "policies", "artifacts": "artifacts", "state": "state"},
        "cache": {"dir": "cache"},
    }
    for section, values in settings.items():
        defaults[section] = {**defaults.get(section, {}), **values} if isinstance(values, dict) else values  # type: ignore[assignment]
    file.write_text(yaml.safe_dump(defaults))
    command = [sys.executable, "-m", "mechctl.main", "doctor", "--json", "--config", str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INTERPRETOPS_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert "Traceback" not in done.stderr
    return done.returncode, {each["subject"]: (each["state"], each["text"]) for each in found}, done.stdout


def free_port() -> int:
    """An unused port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def write_policy(folder: Path, **changes: object) -> None:
    """A policy for any model."""
    (folder / "policies").mkdir(exist_ok=True)
    (folder / "policies" / "calm.yaml").write_text(yaml.safe_dump({**MODEL_POLICY, **changes}))


def test_healthy_setup_has_no_fault(tmp_path: Path, default_model_dir: Path) -> None:
    """Model, memory, engine, plugin, listeners, policy and folders are checked, and all pass."""
    write_policy(tmp_path)
    status, found, printed = doctor({}, tmp_path, default_model_dir)
    assert (status, {state for state, _ in found.values()}) == (0, {"ok"}), printed
    listeners = [subject for subject in found if subject.startswith("listener ")]
    assert len(listeners) == 2
    assert {"model", "memory", "machine", "engine", "keys", "policy calm", "audit log"} <= found.keys()


def test_port_that_is_taken_and_host_without_keys_are_faults(tmp_path: Path, default_model_dir: Path) -> None:
    """Each fault names the setting, its value and the remedy."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        gateway = {"port": port, "admin_host": "0.0.0.0"}  # noqa: S104
        status, found, printed = doctor({"gateway": gateway}, tmp_path, default_model_dir)
    assert status == 1
    assert f"gateway.port = {port}, but another program uses it" in printed
    assert "gateway.admin_host = '0.0.0.0', but other machines can reach that address" in printed
    assert found[f"listener 127.0.0.1:{port}"][0] == "fault"


def test_policy_that_does_not_compile_and_binding_without_policy_are_faults(
    tmp_path: Path, default_model_dir: Path
) -> None:
    """The fault is the compiler's message; a misspelt binding suggests the right policy."""
    interventions = [{"type": "head_scale", "selector": {"layer": 99, "heads": [0]}, "scale": 0.5}]
    write_policy(tmp_path, interventions=interventions)
    bindings = [{"policy": "clam", "mode": "mandatory"}]
    status, found, printed = doctor({"bindings": bindings}, tmp_path, default_model_dir)
    assert status == 1
    assert "layer = 99" in found["policy calm"][1]
    assert "bindings[0].policy = 'clam'" in printed
    assert "calm" in found["bindings"][1]


def test_missing_keys_and_unreachable_redis_are_faults(tmp_path: Path, default_model_dir: Path) -> None:
    """Redis' address is not printed: it may contain a password."""
    settings: dict[str, object] = {
        "paths": {"keys": "keys.yaml"},
        "limits": {"redis_url": f"redis://user:geheim@127.0.0.1:{free_port()}/0"},
    }
    status, found, printed = doctor(settings, tmp_path, default_model_dir)
    assert status == 1
    assert "`mechctl keys add`" in found["keys"][1]
    assert found["Redis"][0] == "fault"
    assert "geheim" not in printed


def test_audit_log_that_was_changed_is_a_fault(tmp_path: Path, default_model_dir: Path) -> None:
    """The hash chain is verified, and the first altered line is named."""
    (tmp_path / "audit.jsonl").write_text('{"seq":1,"prev":"' + "0" * 64 + '"}\n')
    status, found, _ = doctor({"audit": {"path": "audit.jsonl"}}, tmp_path, default_model_dir)
    assert (status, found["audit log"][0]) == (1, "fault")


@pytest.mark.parametrize("folder", ["state", "cache"])
def test_file_in_the_place_of_a_folder_is_a_fault(
    folder: str, tmp_path: Path, default_model_dir: Path
) -> None:
    """Folders that must be writable are checked."""
    (tmp_path / folder).write_text("")
    status, found, _ = doctor({}, tmp_path, default_model_dir)
    field = {"state": "paths.state", "cache": "cache.dir"}[folder]
    assert (status, found[field][0]) == (1, "fault")
    assert "is not a folder" in found[field][1]


def test_unreachable_remote_engine_is_a_fault(tmp_path: Path, default_model_dir: Path) -> None:
    """An engine that does not answer is a fault; nothing else about it can be checked."""
    url = f"http://127.0.0.1:{free_port()}"
    status, found, _ = doctor({"engine": {"url": url}}, tmp_path, default_model_dir)
    assert (status, found[f"engine {url}"][0]) == (1, "fault")
