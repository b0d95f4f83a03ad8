"""`mechctl eval`: measures one policy, or all active ones behind one gateway, and writes the report."""

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import aiohttp

from discovery.errors import DiscoveryError
from discovery.evaluation.answers.endpoint import Endpoint
from discovery.evaluation.answers.own_gateway import own_gateway
from discovery.evaluation.job import TIMEOUT_S, Evaluation, evaluate
from discovery.evaluation.options import JobOptions
from discovery.evaluation.report_file import write_report
from discovery.evaluation.subject import open_suites
from interpretops.settings import Settings

Say = Callable[[str], None]


def run_eval(settings: Settings, options: JobOptions, report: Path | None, say: Say) -> list[Evaluation]:
    """Measure the policy that the options name, or every active one, and write ``report`` if it is given."""
    found = [evaluate(settings, options, say=say)] if options.policy else _active(settings, options, say)
    if report is not None:
        write_report(report, [(one.card, one.suites) for one in found])
        say(f"{report}: report of {', '.join(one.card.policy.id for one in found)}")
    return found


def _active(settings: Settings, options: JobOptions, say: Say) -> list[Evaluation]:
    """Measure all policies that a gateway offers, behind one gateway and one engine.

    Answers without a policy are asked for once. Baselines that need policies of their own are left out; use
    `--policy` for them.
    """
    out = options.out or Path("runs") / f"eval-active-{_digest(settings, options)}"
    with ExitStack() as stack:
        url = options.url
        if url is None:
            out.mkdir(parents=True, exist_ok=True)
            paths = settings.paths
            url = stack.enter_context(
                own_gateway(
                    settings,
                    paths.policies,
                    paths.artifacts,
                    out,
                    options.prefix_cache,
                    say,
                    sections=("policies",),
                )
            )
        names = asyncio.run(_offered(url))
        if not names:
            raise DiscoveryError(
                f"{url}: no policy is active; GET /admin/policies says why, or name one with --policy"
            )
        say(f"active policies: {', '.join(names)}")
        chosen = [replace(options, policy=name, url=url, out=out / name) for name in names]
        found: list[Evaluation] = []
        for one in chosen:
            earlier = found[-1].unsteered if found else None
            found.append(evaluate(settings, one, say=say, unsteered=earlier))
        return found


def _digest(settings: Settings, options: JobOptions) -> str:
    """12 hex digits that change with the suites. Faults in a suite show here, before an engine starts."""
    of = [settings.model.name, str(options.max_tokens), str(options.seed), str(options.limit)]
    if options.suites:
        loaded = open_suites(options.suites, None, options.data_folder, settings.store.s3_endpoint)
        of += [loaded.sha256, *loaded.hashes.values()]
    return hashlib.sha256("\n".join(of).encode()).hexdigest()[:12]


async def _offered(url: str) -> list[str]:
    """Ids of the policies that clients may choose: the active ones."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        endpoint = Endpoint(session, url)
        model = await endpoint.model()
        names = await endpoint.names()
    start = f"{model}+"
    return sorted(name.removeprefix(start) for name in names if name.startswith(start))
