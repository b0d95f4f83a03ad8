"""Unsupported engine configurations are refused at boot, by name (promises 1 and 7)."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_families import save_family
from vllm_fork_server import ForkServer

pytestmark = pytest.mark.engine

PROGRAM = Path(__file__).with_name("boot_program.py")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dual-batch overlap": (
        {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
        "dual-batch overlap",
    ),
    "KV-sharing fast prefill": ({"kv_sharing_fast_prefill": True}, "KV-sharing fast prefill"),
    "pipeline parallel": ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "priority scheduling": ({"scheduling_policy": "priority"}, "priority scheduling"),
    "prompt embeddings": ({"enable_prompt_embeds": True}, "prompt embeddings"),
}
"""Engine arguments, and what the refusal names."""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> dict[str, Any]:
    """The plugin's result for every configuration and version."""
    folder = tmp_path_factory.mktemp("boot")
    known = save_family("LlamaForCausalLM", folder)
    unknown = folder / "unknown"
    transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(unknown)
    plain = {"model": str(known), "enforce_eager": True, "skip_tokenizer_init": True}
    cases = {name: plain | arguments for name, (arguments, _) in REFUSED.items()}
    cases |= {
        "plain": plain,
        "compiled": plain | {"enforce_eager": False},
        "two ranks": plain | {"tensor_parallel_size": 2},
        "unknown architecture": plain | {"model": str(unknown)},
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments, log = (folder / "cases.json", folder / "result.json"), folder / "log.txt"
    status = fork_server.run(PROGRAM, *arguments, log=log, VLLM_PLUGINS="interpretops")
    assert status == 0, log.read_text()[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.mark.parametrize("name", REFUSED)
def test_configuration_that_would_break_the_row_map_is_refused(name: str, reported: dict[str, Any]) -> None:
    """The refusal is one line that names the setting."""
    assert reported[name].startswith(f"interpretops refuses to boot this engine with {REFUSED[name][1]}")
    assert "\n" not in reported[name]


def test_unknown_architecture_is_refused(reported: dict[str, Any]) -> None:
    """An unsupported architecture is named, with the supported ones."""
    assert "architecture ['GPT2LMHeadModel'], which is unknown" in reported["unknown architecture"]
    assert "LlamaForCausalLM" in reported["unknown architecture"]


def test_other_versions_of_vllm_are_refused(reported: dict[str, Any]) -> None:
    """The version is checked before anything is patched; the error names the supported one."""
    for version, refusal in reported["versions"].items():
        assert refusal is not None
        assert refusal.startswith(f"vllm = {version}, but the interpretops plugin supports 0.32.x")


def test_supported_configurations_boot(reported: dict[str, Any]) -> None:
    """The plain engine, compilation and tensor parallelism are accepted."""
    assert reported["plain"] is None
    assert reported["compiled"] is None
    assert reported["two ranks"] is None


def test_whole_model_graphs_need_a_runner_that_supports_the_op(reported: dict[str, Any]) -> None:
    """Such graphs are for decode steps only; with other runners they become piecewise. Disabled graphs stay
    disabled."""
    left = {"NONE": "NONE", "PIECEWISE": "PIECEWISE"}
    full = ("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
    assert reported["graphs"] == {
        "whole": left | dict.fromkeys(full, "FULL_AND_PIECEWISE"),
        "pieces": left | dict.fromkeys(full, "PIECEWISE"),
    }
