"""Checks the engine's configuration at boot: refuses what would break the mapping of tokens to rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from interpretops.model.family import FAMILIES
from interpretops.plan.sites import POINTS
from steering_kernels.ops import OP_VERSION
from steering_kernels.ops.site_op import SITE_OP

CONFIG_KEY = "interpretops"
SUPPORTED_VERSION = "0.32."
WORKER_EXTENSION = "steering_kernels.vllm_plugin.worker.extension.SteeringWorker"


@dataclass(frozen=True)
class EngineOptions:
    """The plugin's section of ``--additional-config``: ``{"interpretops": {…}}``."""

    rows: int = 64
    """Most resident revisions, plus one."""
    units_per_site: int = 512
    """Most rank-one edits of all resident revisions together at one site."""
    pass_through: bool = True
    """Whether requests without a policy are allowed."""
    points: str = "resid_post"
    """Points at which plans may act in a compiled model, separated by commas. Each costs one call per
    layer."""
    op_version: str = OP_VERSION
    """Set by the plugin. Part of the compile-cache key, so that no stale compiled model is used."""

    @classmethod
    def read(cls, additional_config: Any) -> EngineOptions:
        """Read the section. Raises ValueError that names an unknown or ill-typed key."""
        section = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, dict) else {}
        if not isinstance(section, dict):
            text = f"--additional-config {CONFIG_KEY} = {section!r}, but must be an object of options"
            raise ValueError(text)  # noqa: TRY004  a setting is wrong, not a call
        known = {item.name: item for item in fields(cls)}
        for key, value in section.items():
            if key not in known:
                raise ValueError(
                    f"--additional-config {CONFIG_KEY}.{key}: unknown key; known are {sorted(known)}"
                )
            expected = type(known[key].default)
            if type(value) is not expected:
                raise ValueError(
                    f"--additional-config {CONFIG_KEY}.{key} = {value!r} ({type(value).__name__}), but must "
                    f"be of type {expected.__name__}"
                )
            if isinstance(value, int) and expected is int and value < 2:
                raise ValueError(f"--additional-config {CONFIG_KEY}.{key} = {value}, but must be at least 2")
        found = cls(**section)
        if wrong := [point for point in found.compiled_points if point not in POINTS]:
            raise ValueError(
                f"--additional-config {CONFIG_KEY}.points: {wrong[0]!r} must be one of {', '.join(POINTS)}"
            )
        return found

    @property
    def compiled_points(self) -> tuple[str, ...]:
        """`points` as a tuple, without duplicates."""
        return tuple(dict.fromkeys(point.strip() for point in self.points.split(",")))


def check_version(version: str) -> None:
    """Raises RuntimeError for a vLLM version that the plugin does not support."""
    if not version.startswith(SUPPORTED_VERSION):
        raise RuntimeError(
            f"vllm = {version}, but the interpretops plugin supports {SUPPORTED_VERSION}x; "
            "install that version, or remove interpretops from VLLM_PLUGINS"
        )


def refusals(config: Any) -> list[str]:
    """Why an engine with this `VllmConfig` may not boot; empty if it may."""
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    architectures = list(getattr(model.hf_config, "architectures", None) or [])
    unknown = not architectures or architectures[0] not in FAMILIES
    found = {
        f"architecture {architectures}, which is unknown (supported: {sorted(FAMILIES)})": unknown,
        "dual-batch overlap (--enable-dbo)": parallel.use_ubatching,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "data parallelism within one engine, because its cores cannot be proven one by one; start one "
        "engine per replica, and give all of them to the gateway (--engine-url, repeated)": (
            parallel.data_parallel_size > 1
        ),
        "several API servers, because they do not share receipts (use --api-server-count=1)": (
            parallel._api_process_count > 1
        ),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "KV-sharing fast prefill": cache.kv_sharing_fast_prefill,
        "priority scheduling (preempted requests could exceed the request slots)": (
            config.scheduler_config.policy != "fcfs"
        ),
        "speculative decoding": config.speculative_config is not None,
        "LoRA adapters (use lora_gate policies)": config.lora_config is not None,
        "an external KV cache (KV transfer)": config.kv_transfer_config is not None,
        "prompt embeddings": model.enable_prompt_embeds,
        "a pooling model": model.runner_type != "generate",
    }
    return [what for what, refused in found.items() if refused]


def prepare(config: Any) -> None:
    """Refuse unsupported settings, set our worker extension, and add the op's version to the cache key."""
    reasons = refusals(config)
    if reasons:
        raise ValueError("interpretops refuses to boot this engine with " + "; with ".join(reasons))
    options = EngineOptions.read(config.additional_config)
    extension = config.parallel_config.worker_extension_cls
    if extension not in ("", WORKER_EXTENSION):
        raise ValueError(f"--worker-extension-cls = {extension}, but interpretops needs {WORKER_EXTENSION}")
    config.parallel_config.worker_extension_cls = WORKER_EXTENSION
    section = {item.name: getattr(options, item.name) for item in fields(options)} | {
        "op_version": OP_VERSION
    }
    config.additional_config = dict(config.additional_config) | {CONFIG_KEY: section}
    if not config.model_config.enforce_eager:
        split_graphs(config.compilation_config, whole=config.use_v2_model_runner)


def split_graphs(compilation: Any, *, whole: bool) -> None:
    """Split piecewise CUDA graphs at our op, since its work changes with every step.

    ``whole``: the runner supports the op in graphs of the whole model too (`runner_v2`), for decode steps
    whose gates are decided beforehand. With other runners such graphs would repeat the captured edits, so
    they are replaced by piecewise graphs, or none.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    piecewise = compilation.mode == CompilationMode.VLLM_COMPILE
    if piecewise and compilation.splitting_ops is not None and SITE_OP not in compilation.splitting_ops:
        compilation.splitting_ops.append(SITE_OP)
    split = piecewise and bool(compilation.splitting_ops)
    mode = compilation.cudagraph_mode
    if not split:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
    elif mode is None or mode.has_full_cudagraphs():
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE if whole else CUDAGraphMode.PIECEWISE
