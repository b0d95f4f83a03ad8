"""A gateway for one evaluation: `mechctl serve` on free ports, with the policy and its baselines."""

import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from discovery.errors import DiscoveryError
from interpretops.files.atomic_file import PRIVATE, write_atomically
from interpretops.settings import Settings

STOP_S = 60.0
_READY = re.compile(r"ready: (http://\S+)/v1")
PREFIX_CACHE = {True: "--enable-prefix-caching", False: "--no-enable-prefix-caching"}


@contextmanager
def own_gateway(
    settings: Settings,
    policies: Path,
    artifacts: Path,
    folder: Path,
    prefix_cache: bool | None,
    say: Callable[[str], None],
    *,
    sections: Collection[str] = (),
) -> Iterator[str]:
    """Serve ``policies`` while the block runs; gives the gateway's URL. Its log is ``folder/gateway.log``.

    Model and engine, and the named further sections, are as in the settings; keys, tenants and bindings are
    left out, as both the policy and its absence must be had by asking.
    """
    extra = list(settings.engine.extra_args)
    if prefix_cache is not None:
        extra.append(PREFIX_CACHE[prefix_cache])
    content = settings.model_dump(
        mode="json", include={"model", "engine", "cache", *sections}, exclude_none=True
    )
    content["engine"]["extra_args"] = extra
    content["paths"] = {
        "policies": str(policies.resolve()),
        "artifacts": str(artifacts.resolve()),
        "state": str((folder / "state").resolve()),
    }
    config, log = folder / "gateway.yaml", folder / "gateway.log"
    write_atomically(config, yaml.safe_dump(content).encode(), PRIVATE)
    command = [sys.executable, "-m", "mechctl.main", "serve", "--config", str(config)]
    command += ["--port", "0", "--admin-port", "0"]
    say("Starting the engine and a gateway of this run's own (give --url to use a running one)")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(  # noqa: S603  # our own command
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_keep_log, args=(process, log, told), daemon=True)
    reader.start()
    try:
        yield _url(told, log)
    except DiscoveryError:
        say(f"{log}: what this run's gateway said")
        raise
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()


def _keep_log(process: "subprocess.Popen[bytes]", log: Path, told: "queue.SimpleQueue[str | None]") -> None:
    """Write all it says to the log; tell the URL once it is ready, None when it has ended."""
    assert process.stdout is not None
    with process.stdout, log.open("wb") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            if match := _READY.search(line.decode(errors="replace")):
                told.put(match[1])
    told.put(None)


def _url(told: "queue.SimpleQueue[str | None]", log: Path) -> str:
    if (url := told.get()) is None:
        raise DiscoveryError(
            f"the gateway of this run did not start: {_last_line(log)} (its log: {log.name} in --out)"
        )
    return url


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "it said nothing")
