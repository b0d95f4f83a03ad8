"""The gateway is a small process."""

import subprocess
import sys

HEAVY = ("torch", "vllm", "transformers", "huggingface_hub", "fastapi")


def test_gateway_imports_no_model_libraries() -> None:
    """Importing everything that `mechctl serve` needs brings in no torch, vllm or transformers."""
    code = f"import sys, mechctl.main, proxy.serve; print([m for m in {HEAVY} if m in sys.modules])"
    reported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert reported.stdout.strip() == "[]"
