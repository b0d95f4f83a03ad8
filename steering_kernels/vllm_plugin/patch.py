"""Applies all patches in every process: vLLM loads plugins before the process's role is known."""

from steering_kernels.vllm_plugin.core.engine_core import patch_core
from steering_kernels.vllm_plugin.core.refusals import patch_refusals
from steering_kernels.vllm_plugin.engine_config import check_version
from steering_kernels.vllm_plugin.frontend.admission import patch_frontend
from steering_kernels.vllm_plugin.worker.extension import patch_worker
from steering_kernels.vllm_plugin.worker.runner_v1 import patch_runner_v1
from steering_kernels.vllm_plugin.worker.runner_v2 import patch_runner_v2


def apply_patches() -> None:
    """Check the version, then patch. Raises on anything unknown, which stops vLLM, as intended."""
    import vllm

    check_version(vllm.__version__)
    patch_frontend()
    patch_core()
    patch_refusals()
    patch_worker()
    patch_runner_v1()
    patch_runner_v2()
