"""A program that configures engines with the plugin, as at boot, and reports why each is refused.

Usage: boot_program.py CASES RESULT. CASES: JSON, engine arguments by name. RESULT: JSON, the refusal of each,
or null; under `versions` that of each vLLM version tried; and under `graphs` the resulting mode for each CUDA
graph mode, by whether the runner supports the op in whole-model graphs.
"""

import json
import sys
from pathlib import Path

VERSIONS = ("0.31.2", "0.33.0", "1.0.0")


def main(cases: str, result: str) -> None:
    """Configure every case."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    from steering_kernels.vllm_plugin import register

    reported: dict[str, object] = {}
    real = vllm.__version__
    versions: dict[str, str | None] = {}
    for version in VERSIONS:
        vllm.__version__ = version
        try:
            register()
            versions[version] = None
        except RuntimeError as error:
            versions[version] = str(error)
    vllm.__version__ = real
    register()
    for name, arguments in json.loads(Path(cases).read_text()).items():
        try:
            EngineArgs(**arguments).create_engine_config()
            reported[name] = None
        except ValueError as error:
            reported[name] = str(error)
    Path(result).write_text(json.dumps(reported | {"versions": versions, "graphs": graphs()}))


def graphs() -> dict[str, dict[str, str]]:
    """Split graphs of every mode."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    from steering_kernels.ops.site_op import SITE_OP
    from steering_kernels.vllm_plugin.engine_config import split_graphs

    found: dict[str, dict[str, str]] = {}
    for whole in (True, False):
        for mode in CUDAGraphMode:
            compilation = CompilationConfig(
                mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=mode, splitting_ops=["vllm::attention"]
            )
            split_graphs(compilation, whole=whole)
            assert SITE_OP in compilation.splitting_ops
            found.setdefault("whole" if whole else "pieces", {})[mode.name] = compilation.cudagraph_mode.name
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
