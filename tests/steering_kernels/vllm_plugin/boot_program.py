"""A program that configures engines with the plugin, as their boot does, and tells why each may not start.

Usage: boot_program.py CASES RESULT. CASES: JSON, engine arguments by name. RESULT: JSON, the refusal of
each, or null; and under `versions` that of each vLLM version tried.
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

    told: dict[str, object] = {}
    real, versions = vllm.__version__, {}
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
            told[name] = None
        except ValueError as error:
            told[name] = str(error)
    Path(result).write_text(json.dumps(told | {"versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
