"""The plugin by which a vLLM engine edits activations per request; nothing else touches vLLM's internals.

It acts only where `VLLM_PLUGINS` names it. vLLM calls `register` in every process; whatever is wrong there
stops the process, because an engine that came up without the plugin would answer unsteered.
"""

import os


def register() -> None:
    """Entry point `vllm.general_plugins`: check the ground, then patch the running vLLM."""
    if "interpretops" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from steering_kernels.vllm_plugin.patch import apply_patches

    apply_patches()
