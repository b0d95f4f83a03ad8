"""LCO of a Risk Card: the same requests with and without the policy, in turn, on one engine."""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from discovery.errors import DiscoveryError
from discovery.evaluation.answers.collect import Sampling
from discovery.evaluation.answers.endpoint import NONE, Endpoint
from discovery.evaluation.suites.suite import ASKED, LoadedSuite, Prompt, spread
from discovery.jobs.progress import meter
from interpretops.machine import machine_name
from interpretops.riskcard.card import Interval, Latency, Measure, Source
from interpretops.riskcard.intervals import notch, quartiles
from interpretops.riskcard.latency import Timing
from interpretops.riskcard.measures import absent

REQUESTS = 8
"""Requests of a batch."""
TOKENS = 32
"""Tokens generated for each."""
FEWEST_ROUNDS = 5
"""With fewer, a median's interval means nothing."""
MOST_S = 60.0
"""No round begins later than so many seconds after the first."""
MOST_LETTERS = 2000
"""Prompts longer than that are left out: decoding is timed, and long prompts would take the time."""


@dataclass(frozen=True)
class Round:
    """One batch without and one with the policy, in seconds."""

    off_s: float
    on_s: float
    machine: str
    requests: int
    tokens: int


class Rounds:
    """Rounds of one run, a line each in a file, so that a stopped run resumes."""

    def __init__(self, path: Path, machine: str, requests: int) -> None:
        self.path = path
        self.machine, self.requests = machine, requests
        self.found: list[Round] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    one = Round(**json.loads(line))
                    fits = (one.machine, one.requests, one.tokens) == (machine, requests, TOKENS)
                except (ValueError, TypeError):
                    continue  # a line that was being written when the run was stopped
                if fits:
                    self.found.append(one)

    def add(self, off_s: float, on_s: float) -> None:
        """Keep a round: on disk when this returns."""
        one = Round(off_s, on_s, self.machine, self.requests, TOKENS)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(asdict(one)) + "\n")
        except OSError as error:
            raise DiscoveryError(
                f"{self.path}: cannot be written ({error.strerror}); run the same command to resume"
            ) from error
        self.found.append(one)


def why_not_here(url: str, engines: Sequence[str]) -> str | None:
    """Why times would not be those of an engine on this machine; None when they are."""
    if not _is_here(url):
        return (
            f"the gateway is on another machine ({urlsplit(url).hostname}), so that the network would be "
            "timed too; run `mechctl eval` beside it"
        )
    away = [engine for engine in engines if not engine.startswith("unix:") and not _is_here(engine)]
    if away:
        return "the engine runs on another machine (engine.url); run `mechctl eval` beside it"
    return None


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def time_policy(
    endpoint: Endpoint,
    loaded: LoadedSuite,
    sampling: Sampling,
    policy: str,
    revision: str,
    out: Path,
    rounds: int,
) -> Rounds | str:
    """Time batches under none and under ``policy``, in turn; or the reason why that cannot be done.

    Every request gets as many tokens, whatever the model would have said, and its prompt never comes from the
    prefix cache. The first round only warms up. What ``out`` holds already is not timed again. Raises
    `DiscoveryError` when another revision than ``revision`` answers.
    """
    prompts = _prompts(loaded)
    if not prompts:
        return f"the suite has no prompt to ask of at most {MOST_LETTERS} letters"
    kept = Rounds(out, machine_name(), len(prompts))
    if len(kept.found) >= rounds:
        return kept
    began = time.monotonic()
    with meter("eval: latency", rounds, "rounds", done=len(kept.found)) as progress:
        arms, proven = [NONE, policy], {NONE: NONE, policy: revision}
        for number in range(rounds - len(kept.found) + 1):
            if number and time.monotonic() - began > MOST_S:
                break
            took = {arm: await _batch(endpoint, prompts, sampling, arm, proven[arm]) for arm in arms}
            if short := next((f"{arm}: {why}" for arm, why in took.items() if isinstance(why, str)), None):
                return short
            arms.reverse()
            if number:
                kept.add(float(took[NONE]), float(took[policy]))
                progress.advance(1)
    return kept


async def _batch(
    endpoint: Endpoint, prompts: Sequence[Prompt], sampling: Sampling, arm: str, revision: str
) -> float | str:
    """Seconds for all prompts at once, or why they mean nothing."""
    salt = secrets.token_hex(8)
    forced = {"max_tokens": TOKENS, "ignore_eos": True, "cache_salt": salt}
    asked = [
        ("/v1/chat/completions", sampling.chat(prompt, None) | forced)
        if prompt.chat
        else ("/v1/completions", sampling.plain(prompt, None) | forced)
        for prompt in prompts
    ]
    began = time.perf_counter()
    answers = await asyncio.gather(*(endpoint.post(route, body, arm) for route, body in asked))
    took = time.perf_counter() - began
    for answer, proof in answers:
        if proof.revision != revision:
            raise DiscoveryError(
                f"{arm}@{proof.revision[:12]} answered while {arm}@{revision[:12]} was timed; leave the "
                "policy as it is, and name another --out"
            )
        usage = answer.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if count != TOKENS:
            return f"an answer has {count} tokens instead of {TOKENS}, so that times cannot be compared"
    return took


def _prompts(loaded: LoadedSuite) -> list[Prompt]:
    """A few prompts from all over the suite, always the same."""
    fit = [prompt for prompt in loaded.of(*ASKED) if len(prompt.text) <= MOST_LETTERS]
    return spread(fit, REQUESTS)


def latency_measure(
    timed: Rounds | str, sha256: str, price_per_hour: float | None
) -> tuple[Measure, Latency | None, str | None]:
    """LCO, the times behind it, and what they do not show.

    LCO is the median over rounds of time with / time without - 1, both of the same round, with its notch.
    """
    if isinstance(timed, str):
        return absent(timed), None, None
    if len(timed.found) < FEWEST_ROUNDS:
        return (
            absent(
                f"{len(timed.found)} rounds were timed, and a median needs {FEWEST_ROUNDS}: give more "
                "--latency-rounds, or a machine that takes them in a minute"
            ),
            None,
            None,
        )
    low, value, high = notch([one.on_s / one.off_s - 1 for one in timed.found])
    measure = Measure(
        value=value,
        n=len(timed.found),
        interval=Interval(low=low, high=high, method="notch"),
        data=(Source(name="suite", sha256=sha256, n=timed.requests),),
    )
    off, on = (
        Timing(lower_s=lower, median_s=middle, upper_s=upper)
        for lower, middle, upper in (
            quartiles([one.off_s for one in timed.found]),
            quartiles([one.on_s for one in timed.found]),
        )
    )
    section = Latency(
        requests=timed.requests,
        tokens=TOKENS,
        rounds=len(timed.found),
        off=off,
        on=on,
        machine=timed.machine,
        price_per_hour=price_per_hour,
    )
    note = (
        f"LCO is of {timed.requests} requests at once of exactly {TOKENS} tokens each, their prompts from "
        "the suite and not from the prefix cache, through the gateway. It does not show what the plugin "
        "costs an engine that steers nothing (`make bench` does), nor other batches, prompts or machines."
    )
    return measure, section, note
