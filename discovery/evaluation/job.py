"""Measures one policy on its suites through a gateway, and writes its Risk Card."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from discovery.errors import DiscoveryError
from discovery.evaluation.answers.answer_file import AnswerFile, Unsteered, prompts_digest
from discovery.evaluation.answers.collect import Arm, Sampling, collect
from discovery.evaluation.answers.endpoint import NONE, Endpoint
from discovery.evaluation.answers.own_gateway import own_gateway
from discovery.evaluation.baselines.baseline_policies import Derived
from discovery.evaluation.baselines.baselines import make_baselines, served_baselines
from discovery.evaluation.card_of_run import make_card
from discovery.evaluation.evaluation_run import Measured, Run
from discovery.evaluation.judging import JudgePanel, judge_answers, write_outcomes
from discovery.evaluation.measures.circuit_stability import circuit_of
from discovery.evaluation.measures.latency import Rounds, time_policy, why_not_here
from discovery.evaluation.options import JobOptions
from discovery.evaluation.report_file import SuiteResult, suite_results
from discovery.evaluation.subject import cut, open_subject, open_suites, without
from discovery.evaluation.suites.suite import LoadedSuite
from discovery.jobs.stopping import interruptible
from interpretops.files.atomic_file import write_atomically
from interpretops.riskcard import RiskCard, card_path, save_card, verdict
from interpretops.riskcard.card import BaselineKind
from interpretops.riskcard.markdown import card_markdown
from interpretops.riskcard.page import card_html
from interpretops.settings import Settings

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of one policy."""

    card: RiskCard
    suites: list[SuiteResult]
    """The results of each suite; the card covers all suites together."""
    unsteered: Unsteered | None = None


def evaluate_policy(settings: Settings, options: JobOptions, *, say: Callable[[str], None]) -> RiskCard:
    """As `evaluate`; gives the card alone."""
    return evaluate(settings, options, say=say).card


def evaluate(
    settings: Settings,
    options: JobOptions,
    *,
    say: Callable[[str], None],
    unsteered: Unsteered | None = None,
) -> Evaluation:
    """Measure a policy through the gateway and write its card to the folder ``options.out``.

    unsteered: answers that the same gateway gave before without a policy; reused for the same prompts
    """
    subject = open_subject(options.policy, settings, say)
    loaded = open_suites(options.suites, subject.policy, options.data_folder, settings.store.s3_endpoint)
    loaded = loaded if options.limit is None else cut(loaded, options.limit)
    # Refuse a circuit that does not fit now, not after hours of answers.
    circuit_of(
        subject.policy, subject.model, options.circuit, settings.paths.artifacts, settings.circuits_dir
    )
    out = options.out or Path("runs") / f"eval-{subject.policy.meta.id}"
    run = Run(
        loaded,
        subject,
        options,
        out,
        settings.model.dtype,
        settings.paths.artifacts,
        settings.circuits_dir,
        settings.engine.url,
        settings.runtime.price_per_hour,
    )
    try:
        with interruptible(f"the answers so far are in {out}"):
            with ExitStack() as stack:
                made = None
                if options.url is None:
                    out.mkdir(parents=True, exist_ok=True)
                    made = _derive(run, settings)
                    url = stack.enter_context(
                        own_gateway(settings, made.policies, made.artifacts, out, options.prefix_cache, say)
                    )
                    run = replace(run, options=replace(options, url=url))
                measured = asyncio.run(measure(run, made, unsteered))
            card = make_card(run, measured)
            _write(card, out / "card")
            if options.publish:
                published = card_path(card.policy.id, settings.paths.policies)
                _write(card, published.with_suffix(""))
                say(f"{published}: published")
    except OSError as error:
        raise DiscoveryError(
            f"--out = {out}: cannot be written ({error.strerror or error}); the answers so far are "
            "kept; run the same command to resume"
        ) from error
    counted = without(run.loaded, measured.answers.too_long)
    results = suite_results(counted, measured.judged, measured.answers.answers, options.seed)
    for result in results:
        for line in result.lines():
            say(line)
    found = verdict(card)
    for finding in found.findings:
        say(finding.line())
    say(f"{out / 'card.json'}: {card.policy.id}@{card.policy.revision[:12]}, verdict: {found.status}")
    return Evaluation(card, results, measured.unsteered)


def _derive(run: Run, settings: Settings) -> Derived:
    """The policy and its baselines in folders that this run's gateway serves."""
    return make_baselines(
        run.subject,
        settings.paths.artifacts,
        run.out / "served",
        contrast=run.options.contrast,
        data_folder=run.options.data_folder,
        seed=run.options.seed,
    )


def _write(card: RiskCard, stem: Path) -> None:
    """The card in its three forms."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    save_card(card, stem.parent / f"{stem.name}.json")
    write_atomically(stem.parent / f"{stem.name}.md", card_markdown(card).encode())
    write_atomically(stem.parent / f"{stem.name}.html", card_html(card).encode())


async def measure(run: Run, made: Derived | None, unsteered: Unsteered | None = None) -> Measured:
    """Ask and judge."""
    loaded, subject, options = run.loaded, run.subject, run.options
    assert options.url is not None
    async with AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        endpoint = Endpoint(session, options.url)
        sampling = Sampling(
            await endpoint.model(), options.max_tokens, options.seed, context=loaded.suite.context
        )
        served = served_baselines(
            subject.policy, await endpoint.names() if made is None else (), options.baselines, made
        )
        arms = _arms(run, served)
        identity = {
            "policy": subject.policy.meta.id,
            "revision": subject.revision,
            "suite_sha256": loaded.sha256,
            "prompts_sha256": prompts_digest([(p.id, p.text) for p in loaded.prompts]),
            "sampling": asdict(sampling),
            "system_prompt": loaded.suite.system_prompt,
        }
        expected = {NONE: NONE, subject.policy.meta.id: subject.revision}
        answers = AnswerFile(run.out, identity, expected)
        of = _asked(identity)
        for answer in unsteered.answers if unsteered is not None and unsteered.of == of else ():
            if (answer.arm, answer.id) not in answers.answers:
                answers.add(answer)
        await collect(endpoint, loaded.prompts, arms, sampling, answers, options.concurrency)
        loaded = without(loaded, answers.too_long)
        timed = await _time(run, endpoint, loaded, sampling)
        bench = JudgePanel(session, options)
        judged = await judge_answers(loaded, answers, arms, bench, options.concurrency)
    write_outcomes(run.out / "outcomes.jsonl", judged)
    plain = tuple(answer for answer in answers.answers.values() if answer.policy == NONE)
    notes = {} if made is None else made.notes
    return Measured(answers, {**judged}, bench.names, notes, timed, Unsteered(of, plain))


def _asked(identity: dict[str, Any]) -> str:
    """sha256 of what is asked, whatever the policy."""
    plain = {key: value for key, value in identity.items() if key not in ("policy", "revision")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


async def _time(run: Run, endpoint: Endpoint, loaded: LoadedSuite, sampling: Sampling) -> Rounds | str:
    """Times for LCO, or why there are none."""
    rounds = run.options.latency_rounds
    if not rounds:
        return Measured.timed
    if (reason := why_not_here(endpoint.url, run.engines)) is not None:
        return reason
    policy, revision = run.subject.policy.meta.id, run.subject.revision
    return await time_policy(endpoint, loaded, sampling, policy, revision, run.out / "latency.jsonl", rounds)


def _arms(run: Run, served: dict[BaselineKind, str]) -> list[Arm]:
    arms = [Arm("off", NONE), Arm("on", run.subject.policy.meta.id)]
    if run.loaded.suite.system_prompt is not None:
        arms.append(Arm("system_prompt", NONE, run.loaded.suite.system_prompt))
    if run.options.baseline_limit:
        few = frozenset(prompt.id for prompt in cut(run.loaded, run.options.baseline_limit).prompts)
        arms += [Arm(kind, policy, only=few) for kind, policy in served.items()]
    return arms
