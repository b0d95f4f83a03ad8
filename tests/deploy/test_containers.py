"""Dockerfiles, compose files and the systemd unit: they refer to what exists and agree with the code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
import yaml
from helm_chart import Render

from interpretops.settings import Settings, load_settings
from interpretops.settings.environment import NOT_SETTINGS
from interpretops.settings.section import Section
from mechctl.main import app
from proxy.engines.command import engine_command, engine_environment

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("docker/*.Dockerfile"))
UNIT = DEPLOY / "systemd" / "interpretops.service"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The services of the compose file."""
    return dict(yaml.safe_load((DEPLOY / "compose/compose.yaml").read_bytes())["services"])


def texts() -> dict[str, str]:
    """All our text files under deploy/."""
    return {
        str(path.relative_to(DEPLOY)): path.read_text(encoding="utf-8")
        for path in DEPLOY.rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".tpl", ".service", ".Dockerfile", ".json")
    }


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfile_copies_what_exists_and_the_ignore_file_lets_through(
    dockerfile: Path, repository: Path
) -> None:
    """Each COPY from the build context names an existing path that is sent to the builder."""
    let_through = [
        line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile.read_text(), re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (repository / source).exists(), source
            assert source.split("/")[0] in let_through, source


def test_dockerfiles_are_linted(tools: Path) -> None:
    """hadolint, which also checks embedded shell, reports nothing."""
    done = subprocess.run([tools / "hadolint", *DOCKERFILES], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_base_images_are_pinned_by_digest(compose: dict[str, dict[str, Any]]) -> None:
    """Every image that is not built here is named by digest, so that a moved tag changes nothing."""
    images = [
        line.split()[1]
        for dockerfile in DOCKERFILES
        for line in dockerfile.read_text().splitlines()
        if line.startswith("FROM ")
    ]
    images += [service["image"] for service in compose.values() if "build" not in service]
    assert len(images) >= 7
    pinned = r"\S+:\S+@sha256:([0-9a-f]{64}|\$\{VLLM_DIGEST\})"
    assert [image for image in images if not re.fullmatch(pinned, image)] == []
    # The builder must supply this digest: without it the image has no name, and nothing is built.
    gpu = (DEPLOY / "docker" / "engine-gpu.Dockerfile").read_text()
    assert re.findall(r"^ARG (.*)$", gpu, re.MULTILINE) == ["VLLM_DIGEST"]


def test_compose_requires_the_base_image_digest(tools: Path, tmp_path: Path) -> None:
    """The GPU engine is never built on whatever a tag currently refers to."""
    chosen = [
        option
        for file in ("compose.yaml", "compose.gpu.yaml")
        for option in ("-f", DEPLOY / "compose" / file)
    ]
    done = subprocess.run(
        [tools / "docker-compose", *chosen, "config", "--quiet"],
        capture_output=True,
        text=True,
        env={"MODEL_DIR": "/models", "HOME": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "VLLM_DIGEST" in done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_everything_that_pip_fetches_is_checked_by_its_hash(dockerfile: Path) -> None:
    """pip only downloads packages that a lock pins by hash, build requirements of our wheel included."""
    text = dockerfile.read_text().replace("\\\n", " ")
    calls = re.findall(r"pip (?:install|wheel) [^&\n]*", text)
    assert len(calls) >= 2
    for call in calls:
        assert "--no-deps" in call, call
        built = "--no-build-isolation" in call and call.split()[-1] == "."
        assert (
            built
            or "--no-index" in call
            or "--require-hashes -r"
            in " ".join(word for word in call.split() if "index-url" not in word and "://" not in word)
        ), call


def test_lock_is_added_to_an_image_that_holds_some_of_it(tmp_path: Path, repository: Path) -> None:
    """Only missing packages are installed, with hashes; an unsupported version stops the build."""
    lock = tmp_path / "lock.txt"
    entry = "{}==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n    # via x\n"
    lock.write_text("# made\n" + entry.format("aiohttp") + entry.format("not-there"))
    program = repository / "locks" / "missing.py"
    asked = subprocess.run([sys.executable, program, lock], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == entry.format("not-there").strip()
    held = subprocess.run(
        [sys.executable, program, "--check", "interpretops"], capture_output=True, text=True
    )
    assert (held.returncode, held.stderr) == (0, "")
    info = tmp_path / "ours-1.dist-info"
    info.mkdir()
    needs = "Requires-Dist: aiohttp>=99\nRequires-Dist: redis>=99; extra == 'redis'\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ours\nVersion: 1\n{needs}")
    wrong = subprocess.run(
        [sys.executable, program, "--check", "ours"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert wrong.returncode == 1
    assert re.fullmatch(r"ours needs aiohttp>=99, but \S+ is installed\n", wrong.stderr)


def test_gateway_image_holds_no_torch(repository: Path) -> None:
    """It installs only the gateway's lock, and runs as an unprivileged user."""
    text = (DEPLOY / "docker" / "gateway.Dockerfile").read_text()
    assert re.findall(r"/opt/interpretops/bin/pip install .*-r (\S+)", text) == ["locks/gateway.txt"]
    assert not re.search(r"^(torch|vllm)", (repository / "locks/gateway.txt").read_text(), re.MULTILINE)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["65532:65532"]


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")])
def test_docker_compose_accepts_the_files(files: tuple[str, ...], tools: Path, tmp_path: Path) -> None:
    """`docker compose config` accepts the files, with and without the GPU override."""
    chosen = [option for file in files for option in ("-f", str(DEPLOY / "compose" / file))]
    done = subprocess.run(
        [tools / "docker-compose", *chosen, "config", "--quiet"],
        capture_output=True,
        text=True,
        env={"MODEL_DIR": "/models", "VLLM_DIGEST": "0" * 64, "HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_compose_mounts_what_exists(compose: dict[str, dict[str, Any]]) -> None:
    """Mounted files and folders exist in the repository; secrets are created first."""
    folder = DEPLOY / "compose"
    document = yaml.safe_load((folder / "compose.yaml").read_bytes())
    named = [volume.split(":")[0] for service in compose.values() for volume in service.get("volumes", ())]
    named += [config["file"] for config in document["configs"].values()]
    paths = [name for name in named if name.startswith(".")]
    assert len(paths) >= 8
    for path in paths:
        assert (folder / path).exists() or path.startswith("./secrets/"), path
    for service in compose.values():
        if "build" in service:
            assert (DEPLOY.parent / service["build"]["dockerfile"]).is_file()


def test_compose_gateway_accepts_its_settings(compose: dict[str, dict[str, Any]]) -> None:
    """The settings load; ports, engine and folders match the containers."""
    settings = load_settings(DEPLOY / "compose" / "gateway.yaml", environ={})
    (address,) = settings.engine.url
    engine = urlsplit(address)
    assert engine.hostname in compose
    assert f"--port={engine.port}" in compose["engine"]["command"]
    assert compose["gateway"]["ports"] == [f"127.0.0.1:{settings.gateway.port}:{settings.gateway.port}"]
    scrape = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_bytes())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"gateway:{settings.gateway.admin_port}"]
    mounts = [volume.split(":")[1] for volume in compose["gateway"]["volumes"]]
    for path in (settings.paths.keys, settings.paths.state, settings.paths.policies, settings.audit.path):
        assert any(Path(str(path)).is_relative_to(mount) for mount in mounts), path


def test_compose_engine_shares_a_network_only_with_the_gateway(compose: dict[str, dict[str, Any]]) -> None:
    """Only the gateway can reach the engine, and the engine can reach nothing outside."""
    document = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_bytes())
    assert compose["engine"]["networks"] == ["engine"]
    assert "ports" not in compose["engine"]
    assert [name for name, service in compose.items() if "engine" in service["networks"]] == [
        "gateway",
        "engine",
    ]
    assert document["networks"]["engine"] == {"internal": True}


def test_engines_are_started_as_the_gateway_starts_one(
    compose: dict[str, dict[str, Any]], default_model_dir: Path, render: Render
) -> None:
    """The flags equal those of the gateway's own engine, with an address instead of the private socket."""
    settings = load_settings(environ={}, overrides={"model.device": "cpu"})
    flags = [part for part in engine_command(settings, default_model_dir, Path("s")) if part.startswith("--")]
    wanted = {*flags} - {"--uds"} | {"--host", "--port"}
    (chart,) = (
        document["spec"]["template"]["spec"]["containers"][0]["args"]
        for document in render()
        if document["kind"] == "StatefulSet" and document["metadata"]["name"] == "guard-engine"
    )
    for command in (compose["engine"]["command"], chart):
        assert {argument.split("=")[0] for argument in command} == wanted
    gpu = yaml.safe_load(
        (DEPLOY / "compose/compose.gpu.yaml").read_text().replace("!override", "").replace("!reset", "")
    )
    assert {argument.split("=")[0] for argument in gpu["services"]["engine"]["command"]} <= wanted


def test_engine_images_have_the_environment_of_the_gateways_engine() -> None:
    """The images set the same variables as the gateway does for its engine."""
    for name, device in (("cpu", "cpu"), ("gpu", "cuda")):
        text = (DEPLOY / "docker" / f"engine-{name}.Dockerfile").read_text()
        variables = dict(re.findall(r"\b([A-Z_]+)=(\S+)", text.split("\nENV ")[1].split("\nUSER")[0]))
        settings = load_settings(environ={}, overrides={"model.device": device})
        meant = engine_environment(settings, Path("/private"), {})
        if device == "cuda":
            meant = {key: value for key, value in meant.items() if not key.startswith("VLLM_CPU")}
        missing = meant.keys() - variables.keys() - {"VLLM_CPU_KVCACHE_SPACE", "VLLM_RPC_BASE_PATH"}
        assert missing == set()
        for key in ("VLLM_PLUGINS", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
            assert variables[key] == meant[key]


def test_every_variable_named_is_a_setting() -> None:
    """Every `INTERPRETOPS_…` under deploy/ is a settings field."""
    known = {
        f"INTERPRETOPS_{section}_{field}".upper()
        for section, info in Settings.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        for field in info.annotation.model_fields
    }
    named = {name for text in texts().values() for name in re.findall(r"INTERPRETOPS_[A-Z_]+", text)}
    assert len(named) >= 3
    assert named - known - NOT_SETTINGS == set()


def test_every_mechctl_flag_exists() -> None:
    """mechctl commands and flags in containers and unit exist."""
    serve = typer.main.get_command(app).get_command(None, "serve")  # type: ignore[attr-defined]
    flags = {option for parameter in serve.params for option in parameter.opts}
    seen = set()
    for text in texts().values():
        for arguments in re.findall(r"(?:mechctl |\[)serve,?([^\]\n]*)", text):
            seen |= set(re.findall(r"--[a-z-]+", arguments))
    assert seen
    assert seen <= flags


@pytest.mark.skipif(
    "CI" not in os.environ and shutil.which("systemd-analyze") is None, reason="systemd is not installed"
)
def test_systemd_accepts_the_unit_and_rates_it_safe(tmp_path: Path) -> None:
    """`systemd-analyze` accepts the unit and reports little exposure."""
    unit = tmp_path / UNIT.name
    (started,) = re.findall(r"^ExecStart=(\S+)", UNIT.read_text(), re.MULTILINE)
    unit.write_text(UNIT.read_text().replace(started, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    judged = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(unit)]
    done = subprocess.run(judged, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    "CI" not in os.environ and shutil.which("promtool") is None,
    reason="Debian's package `prometheus` is not installed",
)
def test_compose_prometheus_loads(tmp_path: Path) -> None:
    """promtool accepts the configuration together with the rules."""
    text = (DEPLOY / "compose" / "prometheus.yaml").read_text()
    (tmp_path / "viewer").write_text("key")
    (tmp_path / "prometheus.yaml").write_text(text.replace("/run/secrets/viewer", str(tmp_path / "viewer")))
    shutil.copy(DEPLOY / "prometheus" / "rules.yaml", tmp_path)
    done = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
