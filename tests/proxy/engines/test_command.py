"""How the local engine is started, and when it is refused."""

import itertools
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from running_gateway import Until

from interpretops.errors import ConfigError
from interpretops.settings import load_settings
from proxy.engines import command as command_module
from proxy.engines import model_folder
from proxy.engines.command import check_memory, engine_command, engine_environment, slow_format
from proxy.engines.local_engine import LocalEngine

GIB = 2**30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 1024}))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 1000)
    return tmp_path


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_engine_listens_on_its_private_socket_only(model: Path) -> None:
    """The engine gets a unix socket, but no host and no port."""
    settings = load_settings(overrides={"model.name": str(model), "model.device": "cpu"}, environ={})
    command = engine_command(settings, model, Path("/run/e.sock"))
    assert option(command, "--model") == str(model)
    assert option(command, "--uds") == "/run/e.sock"
    assert option(command, "--served-model-name") == model.name
    assert option(command, "--max-model-len") == "1024"
    assert "--enforce-eager" in command
    assert not {"--host", "--port", "--api-key"} & set(command)


@pytest.mark.parametrize(
    ("set_to", "steps"),
    [
        ({}, ["512"]),
        ({"engine.max_num_seqs": 600}, ["600"]),
        ({"engine.extra_args": ("--max-num-batched-tokens=64",)}, []),
        ({"engine.extra_args": ("--no-enable-chunked-prefill",)}, []),
    ],
)
def test_step_on_a_cpu_is_short_unless_the_operator_says_otherwise(
    model: Path, set_to: dict[str, Any], steps: list[str]
) -> None:
    """A step has few tokens, but at least one per sequence. The operator's own setting wins."""
    settings = load_settings(
        overrides={"model.name": str(model), "model.device": "cpu", **set_to}, environ={}
    )
    command = engine_command(settings, model, Path("/run/e.sock"))
    assert [
        after for name, after in itertools.pairwise(command) if name == "--max-num-batched-tokens"
    ] == steps


@pytest.mark.parametrize(
    ("flags", "dtype", "reported"),
    [
        ("flags : fpu avx avx2 fma", "bfloat16", True),
        ("flags : fpu avx avx2 fma", "float32", False),
        ("flags : fpu avx512f avx512_bf16", "bfloat16", False),
        ("Features : fp asimd", "bfloat16", True),
        ("Features : fp asimd bf16", "bfloat16", False),
        ("", "bfloat16", False),
    ],
)
def test_cpu_without_bfloat16_is_reported(tmp_path: Path, flags: str, dtype: str, reported: bool) -> None:
    """On a CPU without bfloat16 instructions, the operator is told that float32 is faster."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\n{flags}\n")
    settings = load_settings(overrides={"model.dtype": dtype, "model.device": "cpu"}, environ={})
    line = slow_format(settings, cpuinfo)
    assert (line is not None) == reported
    assert line is None or "INTERPRETOPS_MODEL_DTYPE=float32" in line


@pytest.mark.parametrize("cpu_build", [True, False])
def test_unavailable_gpu_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, cpu_build: bool
) -> None:
    """`device: cuda` with the CPU engine or without a device is an error that says what to write instead."""
    monkeypatch.setattr(command_module, "_is_cpu_build", lambda: cpu_build)
    monkeypatch.setattr(command_module, "_GPU_DEVICES", (tmp_path / "nvidiactl",))
    asked = {"model.name": str(model), "model.device": "cuda"}
    settings = load_settings(overrides=asked, environ={})
    with pytest.raises(ConfigError, match=r"model\.device = 'cuda', but .* write device: auto") as error:
        engine_command(settings, model, Path("e.sock"))
    assert len(str(error.value).splitlines()) == 1
    engine_command(load_settings(overrides=asked | {"model.device": "auto"}, environ={}), model, Path("e"))


def test_available_gpu_is_accepted(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the GPU engine and a device that the driver reports, there is no error."""
    monkeypatch.setattr(command_module, "_is_cpu_build", lambda: False)
    monkeypatch.setattr(command_module, "_GPU_DEVICES", (tmp_path,))
    asked = {"model.name": str(model), "model.device": "cuda:0"}
    assert "--enforce-eager" not in engine_command(load_settings(None, asked, environ={}), model, Path("e"))


def test_environment_cannot_disable_the_plugin() -> None:
    """Whatever the environment holds, the plugin is named and development routes stay off."""
    hostile = {"VLLM_PLUGINS": "", "VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": "k", "HOME": "/h"}
    settings = load_settings(overrides={"model.device": "cpu", "engine.kv_cache_gib": 3}, environ={})
    environment = engine_environment(settings, Path("/private"), hostile)
    assert environment["VLLM_PLUGINS"] == "interpretops"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["HOME"] == "/h"
    assert not {"VLLM_SERVER_DEV_MODE", "VLLM_API_KEY"} & environment.keys()


SECRETS = {
    "ACME_KEYS": "hunter2",
    "INTERPRETOPS_LIMITS_REDIS_URL": "redis://:hunter2@r",
    "INTERPRETOPS_STORE_POSTGRES_DSN": "postgres://u:hunter2@p",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "VLLM_API_KEY": "hunter2",
    "VLLM_S3_ACCESS_KEY_ID": "hunter2",
    "HF_TOKEN": "hunter2",
    "RAY_AUTH_TOKEN": "hunter2",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=hunter2",
}


def test_engine_sees_what_it_needs_and_nothing_else() -> None:
    """vLLM, torch and device variables pass; others only if the operator names them."""
    needed = {
        "PATH": "/bin",
        "PYTHONPATH": "/code",
        "LD_PRELOAD": "/lib/libtcmalloc.so",
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_P2P_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "OMP_NUM_THREADS": "2",
        "TORCHINDUCTOR_CACHE_DIR": "/c",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": "/hf",
    }
    others = {"KUBERNETES_PORT": "1", "http_proxy": "http://u:p@proxy", **SECRETS}
    extra = {"LMCACHE_CONFIG_FILE": "/l", "AWS_SECRET_ACCESS_KEY": None, "NOT_THERE": None}
    settings = load_settings(overrides={"model.device": "cuda", "engine.environment": extra}, environ={})
    passed = engine_environment(settings, Path("/private"), {**needed, **others})
    assert {name: passed[name] for name in needed} == needed
    assert (passed["LMCACHE_CONFIG_FILE"], passed["VLLM_RPC_BASE_PATH"]) == ("/l", "/private")
    assert [name for name in passed if passed[name] == others.get(name)] == ["AWS_SECRET_ACCESS_KEY"]
    assert "NOT_THERE" not in passed


@pytest.mark.parametrize(
    "name", ["VLLM_PLUGINS", "VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_RPC_BASE_PATH"]
)
def test_operator_cannot_disable_the_plugin_either(name: str) -> None:
    """Variables that the guard sets itself are refused by name, without quoting values."""
    with pytest.raises(
        ConfigError, match=f"environment.{name} is given, but the guard sets it itself"
    ) as refused:
        load_settings(overrides={"engine.environment": {name: "hunter2"}}, environ={})
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        load_settings(overrides={"engine.environment": {"A": ["hunter2"]}}, environ={})
    assert "hunter2" not in str(refused.value)


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


CHILD = """
import os, socket, sys, time
folder = sys.argv[1]
for name in ("engine.sock", "rpc"):
    socket.socket(socket.AF_UNIX).bind(os.path.join(os.environ["VLLM_RPC_BASE_PATH"], name))
open(os.path.join(folder, "file"), "w").write(str(os.getpid()))
os.rename(os.path.join(folder, "file"), os.path.join(folder, "pid"))
time.sleep(600)
"""


async def test_processes_of_the_engine_hold_no_secret_and_are_private(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """The reaper and its children get none of our secrets; folder and sockets are private to our user."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(overrides={"model.device": "cpu"}, environ={})
    monkeypatch.setattr(
        "proxy.engines.local_engine.engine_command",
        lambda _settings, _model, _socket: [sys.executable, "-c", CHILD, str(tmp_path)],
    )
    engine = LocalEngine(settings, model, tmp_path / "log" / "engine.log")
    before = os.umask(0o022)
    try:
        await engine.start()
    finally:
        os.umask(before)
    try:

        async def begun() -> bool:
            return (tmp_path / "pid").exists()

        await until(begun)
        for pid in (engine.pid, int((tmp_path / "pid").read_text())):
            held = environment_of(pid)
            assert b"PATH=" in held
            assert b"hunter2" not in held
        folder = Path(engine.address.removeprefix("unix://")).parent
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
        assert modes == {folder.name: 0o700, "engine.sock": 0o700, "rpc": 0o700}
        assert stat.S_IMODE((tmp_path / "pid").stat().st_mode) == 0o600
        assert stat.S_IMODE(engine.log_file.stat().st_mode) == 0o600
    finally:
        await engine.stop()


async def test_process_that_finds_the_model_holds_only_the_key_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may download from Hugging Face, but sees none of our other secrets."""
    program = tmp_path / "program.py"
    program.write_text("import os\nfor item in sorted(os.environ.items()): print(*item)\nprint('folder: /f')")
    for name, value in {**SECRETS, "HF_TOKEN": "hf_1", "https_proxy": "http://proxy"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(model_folder, "__file__", str(program))
    seen = []
    assert await model_folder.find_model(load_settings(environ={}), seen.append) == Path("/f")
    assert {"HF_TOKEN hf_1", "https_proxy http://proxy"} <= set(seen)
    assert not [line for line in seen if "hunter2" in line]


def test_memory_is_checked_against_weights_and_cache(model: Path) -> None:
    """The check counts weights, KV cache and the engine's own memory."""
    settings = load_settings(overrides={"model.device": "cpu", "engine.kv_cache_gib": 3}, environ={})
    check_memory(settings, model, available_bytes=6 * GIB)
    with pytest.raises(ConfigError, match=r"kv_cache_gib = 3: .*needs about 5\.0 GiB, but 4\.0 GiB are free"):
        check_memory(settings, model, available_bytes=4 * GIB)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "(Worker pid=7) ERROR 01-01 [core.py:1] Traceback (most recent call last):\n"
            "(Worker pid=7) ERROR 01-01 [core.py:1] ValueError: block size 7 is not possible.\n"
            "(APIServer pid=6) RuntimeError: Engine core initialization failed.\n",
            "ValueError: block size 7 is not possible",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig\n"
            "  Value error, max_num_batched_tokens (1) is too small. [type=value_error, input_value=1]\n",
            "max_num_batched_tokens (1) is too small",
        ),
        (
            "usage: api_server.py\napi_server.py: error: unrecognized arguments: --x\n",
            "unrecognized arguments: --x",
        ),
        ("WARNING [x.py:1] this may raise `OSError: too many files`\nKilled\n", None),
    ],
)
def test_reason_for_exit_is_the_first_error_in_the_log(
    tmp_path: Path, model: Path, log: str, cause: str | None
) -> None:
    """From a long log, the line that gives the reason is shown."""
    engine = LocalEngine(load_settings(environ={}), model, tmp_path / "engine.log")
    assert engine._cause() is None
    engine.log_file.write_text(log)
    assert engine._cause() == cause
