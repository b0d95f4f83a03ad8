"""How the local engine is started, and when it is not."""

import itertools
import json
from pathlib import Path

import pytest

from interpretops.errors import ConfigError
from interpretops.settings import load_settings
from proxy.engine_command import check_memory, engine_command, engine_environment, slow_format
from proxy.local_engine import LocalEngine

GIB = 2**30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 1024}))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 1000)
    return tmp_path


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_engine_listens_on_its_private_socket_only(model):
    """The engine gets a unix socket, and neither host nor port."""
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
def test_step_on_a_cpu_is_short_unless_the_operator_says_otherwise(model, set_to, steps):
    """A step holds few tokens, at least one of each sequence; the operator's own word stands."""
    settings = load_settings(
        overrides={"model.name": str(model), "model.device": "cpu", **set_to}, environ={}
    )
    command = engine_command(settings, model, Path("/run/e.sock"))
    assert [
        after for name, after in itertools.pairwise(command) if name == "--max-num-batched-tokens"
    ] == steps


@pytest.mark.parametrize(
    ("flags", "dtype", "told"),
    [
        ("flags : fpu avx avx2 fma", "bfloat16", True),
        ("flags : fpu avx avx2 fma", "float32", False),
        ("flags : fpu avx512f avx512_bf16", "bfloat16", False),
        ("Features : fp asimd", "bfloat16", True),
        ("Features : fp asimd bf16", "bfloat16", False),
        ("", "bfloat16", False),
    ],
)
def test_cpu_without_bfloat16_is_told(tmp_path, flags, dtype, told):
    """Whoever serves in a format that the CPU does not know hears of the faster one."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\n{flags}\n")
    settings = load_settings(overrides={"model.dtype": dtype, "model.device": "cpu"}, environ={})
    line = slow_format(settings, cpuinfo)
    assert (line is not None) == told
    assert line is None or "INTERPRETOPS_MODEL_DTYPE=float32" in line


def test_surroundings_cannot_take_the_plugin_away():
    """Whatever the environment says, the plugin is named and development routes stay shut."""
    hostile = {"VLLM_PLUGINS": "", "VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": "k", "HOME": "/h"}
    settings = load_settings(overrides={"model.device": "cpu", "engine.kv_cache_gib": 3}, environ={})
    environment = engine_environment(settings, hostile)
    assert environment["VLLM_PLUGINS"] == "interpretops"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["HOME"] == "/h"
    assert not {"VLLM_SERVER_DEV_MODE", "VLLM_API_KEY"} & environment.keys()


def test_memory_is_checked_against_weights_and_cache(model):
    """The bound counts weights, cache and the engine itself."""
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
def test_cause_of_death_is_the_first_error_of_the_log(tmp_path, model, log, cause):
    """Of a long log the words that say why are shown."""
    engine = LocalEngine(load_settings(environ={}), model, tmp_path / "engine.log")
    assert engine._cause() is None
    engine.log_file.write_text(log)
    assert engine._cause() == cause
