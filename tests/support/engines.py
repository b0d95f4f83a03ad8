"""The engines of a test run: in-process ones by configuration, and one server for all HTTP tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from vllm_fork_server import ForkServer

from interpretops.model.spec import read_model_spec
from interpretops.plan import ALWAYS, Gate, ModelSpec, Plan, Site, SiteEdits, Units

PROGRAM = Path(__file__).with_name("engine_program.py")
ANSWER_S = 600
KEPT_ENGINES = 1 if Path("/dev/nvidiactl").exists() else 3
"""Most in-process engines alive at a time, each of about 2 GiB. On a GPU vLLM expects to be alone."""

RunEngine = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def spec(default_model_dir: Path) -> ModelSpec:
    return read_model_spec(default_model_dir)


def vector_plan(
    spec: ModelSpec, strength: float, *, layer: int = 12, seed: int = 0, gate: Gate | None = None
) -> Plan:
    """A plan that adds ``strength`` times a random unit direction to the residual stream after a layer."""
    direction = np.random.default_rng(seed).normal(size=(1, spec.hidden_size)).astype(np.float32)
    direction /= np.linalg.norm(direction)
    infinite = np.full(1, np.inf, np.float32)
    zero = np.zeros(1, np.float32)
    units = Units(
        read=np.zeros_like(direction),
        write=direction,
        bias=zero,
        threshold=-infinite,
        gain=zero,
        offset=np.full(1, strength, np.float32),
        low=-infinite,
        high=infinite,
        max_norm=infinite,
        gate=np.full(1, 0 if gate is None else 1, np.int32),
        topk=np.full(1, -1, np.int32),
    )
    gates = (ALWAYS,) if gate is None else (ALWAYS, gate)
    return Plan(f"vector-{seed}", "test", spec, {Site(layer, "resid_post"): SiteEdits(units)}, gates)


@pytest.fixture(scope="session")
def make_plan(spec: ModelSpec) -> Callable[..., Plan]:
    """`vector_plan` for the default model."""

    def make(strength: float, **options: Any) -> Plan:
        return vector_plan(spec, strength, **options)

    return make


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """One process for the whole run that has imported vLLM, and runs programs in forks."""
    running = ForkServer()
    yield running
    running.close()


class BatchEngine:
    """An engine in a fork of the fork server; answers one job after another."""

    def __init__(
        self, fork_server: ForkServer, folder: Path, options: dict[str, Any], *, plugin: bool
    ) -> None:
        self._fork_server, self._folder = fork_server, folder
        address = str(folder / "jobs.sock")
        with Listener(address, "AF_UNIX") as listener:
            self._pid = fork_server.start(
                *(PROGRAM, address),
                log=folder / "log.txt",
                VLLM_PLUGINS="interpretops" if plugin else "none",
                VLLM_CPU_KVCACHE_SPACE="1",
            )
            self._jobs = listener.accept()
        self._jobs.send_bytes(json.dumps(options).encode())

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """What came out. Fails with the end of the engine's log when it has ended or does not answer."""
        try:
            self._jobs.send_bytes(json.dumps(job).encode())
            if not self._jobs.poll(ANSWER_S):
                raise TimeoutError(f"no answer in {ANSWER_S} s")
            result: dict[str, Any] = json.loads(self._jobs.recv_bytes())
        except (EOFError, OSError) as error:
            raise AssertionError((self._folder / "log.txt").read_text()[-3000:]) from error
        return result

    def close(self) -> None:
        self._jobs.close()
        self._fork_server.wait(self._pid, 60)


@pytest.fixture(scope="session")
def run_engine(
    default_model_dir: Path, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunEngine]:
    """Run batches through the engine of a given configuration; recent engines are kept for later tests."""
    alive: dict[tuple[bool, str], BatchEngine] = {}

    def run(
        batches: list[list[dict[str, Any]]],
        *,
        plans: list[Plan] | None = None,
        plugin: bool = True,
        **engine: Any,
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engine")
        options = {
            "model": str(default_model_dir),
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "block_size": 32,
            **engine,
        }
        wanted = (plugin, json.dumps(options, sort_keys=True))
        found = alive.pop(wanted, None)
        if found is None:
            while len(alive) >= KEPT_ENGINES:
                alive.pop(next(iter(alive))).close()
            found = BatchEngine(fork_server, folder, options, plugin=plugin)
        # Kept only once it has answered: one that failed is not asked again.
        result = found.answer({"plans": [str(plan.save(folder)) for plan in plans or []], "batches": batches})
        alive[wanted] = found
        return result

    yield run
    for engine in alive.values():
        engine.close()


class EngineServer:
    """An engine server on its own socket."""

    def __init__(self, model: Path, folder: Path, name: str, environ: dict[str, str] | None = None) -> None:
        self.log, self.socket = folder / "log.txt", folder / "engine.sock"
        self._environ = {"VLLM_PLUGINS": "interpretops", "VLLM_CPU_KVCACHE_SPACE": "1"} | (environ or {})
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--uds", str(self.socket), "--served-model-name", name, "--enforce-eager"),
            *("--max-num-seqs", "16", "--additional-config", json.dumps({"interpretops": {"rows": 8}})),
        ]
        self.process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self, *arguments: str) -> None:
        """Start the process; returns long before it answers."""
        self._command += arguments
        self.socket.unlink(missing_ok=True)
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                self._command,
                env=os.environ | self._environ,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 300
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"no answer in 300 s\n{self.log.read_text()[-3000:]}"
            try:
                with self.client() as client:
                    if client.get("/health").status_code == 200:
                        return
            except httpx.TransportError:
                time.sleep(0.5)

    def answered(self) -> float:
        """Number of requests answered so far."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def client(self) -> httpx.Client:
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://engine", timeout=120
        )


@pytest.fixture(scope="session")
def engine_server(
    default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineServer]:
    """One server with the plugin, for every test that needs its HTTP routes."""
    server = EngineServer(default_model_dir, tmp_path_factory.mktemp("server"), "m")
    server.start("--max-model-len", "512")
    try:
        server.wait()
        yield server
    finally:
        server.stop()
