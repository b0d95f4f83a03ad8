"""The vLLM plugin that edits activations per request. Only this package touches vLLM's internals.

It is active only if `VLLM_PLUGINS` names it. vLLM calls `register` in every process. Any error there stops
the process, because an engine that started without the plugin would answer unsteered.
"""

import os


def register() -> None:
    """Entry point `vllm.general_plugins`: check the vLLM version, then patch vLLM."""
    if "interpretops" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from steering_kernels.vllm_plugin.patch import apply_patches

    apply_patches()
