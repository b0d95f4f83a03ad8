"""`mechctl config show` prints the settings in force, and where each comes from."""

import json
import os
import subprocess
import sys
from pathlib import Path

from interpretops.settings import Settings


def show(*arguments: object, **variables: str) -> dict[str, tuple[object, str]]:
    """`{field: (value, source)}`."""
    command = [sys.executable, "-m", "mechctl.main", "config", "show", "--json", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INTERPRETOPS_")}
    environment |= variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    found = map(json.loads, done.stdout.splitlines())
    return {each["field"]: (each["value"], each["source"]) for each in found}


def test_every_setting_has_its_source(tmp_path: Path) -> None:
    """A variable overrides the file, the file the default; the source names the line of the file."""
    file = tmp_path / "config.yaml"
    file.write_text("gateway:\n  port: 9000\n  admin_port: 9001\ntenants:\n  - id: acme\n")
    found = show("--config", file, INTERPRETOPS_GATEWAY_PORT="9100")
    assert found["gateway.port"] == (9100, "INTERPRETOPS_GATEWAY_PORT")
    assert found["gateway.admin_port"] == (9001, f"{file}:3")
    assert found["tenants"][1] == f"{file}:4"
    assert found["gateway.host"] == ("127.0.0.1", "default")
    assert {field.partition(".")[0] for field in found} == set(Settings.model_fields)


def test_changed_shows_only_settings_that_differ_from_the_default(tmp_path: Path) -> None:
    """`--changed` leaves out settings with their default."""
    file = tmp_path / "config.yaml"
    file.write_text("gateway: {port: 9000}\n")
    assert show("--config", file, "--changed") == {"gateway.port": (9000, f"{file}:1")}


def test_secrets_are_hidden() -> None:
    """Neither the Redis password nor an environment variable of the engine is shown."""
    found = show(
        INTERPRETOPS_LIMITS_REDIS_URL="redis://user:geheim@127.0.0.1/0",
        INTERPRETOPS_ENGINE_ENVIRONMENT="{HF_TOKEN: geheim}",
    )
    assert "geheim" not in json.dumps(list(found.items()))
    assert found["engine.environment"][0] == {"HF_TOKEN": "(hidden)"}
