"""`mechctl eval`: a policy and a suite in, answers and a Risk Card out."""

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp

from discovery.errors import DiscoveryError
from discovery.evaluation.answers import AnswerFile, prompts_digest
from discovery.evaluation.baselines import SERVED_BASELINES, card_baselines
from discovery.evaluation.circuit_measures import circuit_measures
from discovery.evaluation.collect import Arm, Sampling, collect
from discovery.evaluation.endpoint import NONE, Endpoint
from discovery.evaluation.judges import Judge, ModelJudge, Moderation, PhraseJudge, is_degenerate
from discovery.evaluation.metrics import Outcome, answer_measures, merge, text_measure
from discovery.evaluation.suite import LoadedSuite, Prompt, load_suite
from discovery.progress import meter
from discovery.refusal import is_coherent
from discovery.run_record import run_record
from interpretops.atomic_file import write_atomically
from interpretops.compile import compile_policy
from interpretops.errors import PolicyError
from interpretops.model_source import resolve_model
from interpretops.model_spec import read_model_spec
from interpretops.plan import ModelSpec
from interpretops.policy import Policy, load_policy
from interpretops.riskcard import RiskCard, save_card, verdict
from interpretops.riskcard.card import (
    MEASURES,
    MeasureName,
    ModelReference,
    PolicyReference,
    Record,
)
from interpretops.riskcard.markdown import card_markdown
from interpretops.riskcard.page import card_html
from interpretops.settings import Settings

TIMEOUT_S = 600.0
NOT_TAKEN: dict[MeasureName, str] = {
    **dict.fromkeys(MEASURES, "not taken"),
    "causal_contribution": "no circuit; give --circuit FILE",
    "circuit_stability": "no circuit; give --circuit FILE",
    "latency_cost_overhead": "latency under this job's load says nothing; see `make bench`",
}
NOTES = (
    "Answers are greedy and cut at max_tokens; refusals and coherence are judged by the named judges.",
    "A prompt whose unsteered answer is already refused or degenerate is not counted in CD and over-refusal.",
    "A fluent, wrong answer to a benign prompt is not noticed.",
    "ΔCE is read from prompt tokens: edits that act only after the prompt do not show in it.",
)


@dataclass(frozen=True)
class JobOptions:
    """What the command line says."""

    policy: str
    suite: Path
    url: str
    out: Path
    data_folder: str | None = None
    max_tokens: int = 64
    concurrency: int = 16
    seed: int = 0
    judge_url: str | None = None
    judge_model: str | None = None
    moderation_url: str | None = None
    moderation_model: str | None = None
    circuit: Path | None = None
    baselines: tuple[str, ...] = ()
    """``<kind>=<policy id>`` each."""

    @property
    def command(self) -> str:
        """The command line, without folders of this machine."""
        words = ["mechctl eval", f"--policy {Path(self.policy).name}", f"--suite {self.suite.name}"]
        words += [f"--max-tokens {self.max_tokens}", f"--seed {self.seed}"]
        words += [f"--baseline {item}" for item in self.baselines]
        if self.circuit is not None:
            words.append(f"--circuit {self.circuit.name}")
        if self.judge_model is not None:
            words.append(f"--judge-model {self.judge_model}")
        if self.moderation_model is not None:
            words.append(f"--moderation-model {self.moderation_model}")
        return " ".join(words)


@dataclass(frozen=True)
class Subject:
    """What is measured: the policy as it stands here, compiled for the model as it lies here."""

    policy: Policy
    revision: str
    model: ModelSpec


def evaluate_policy(settings: Settings, options: JobOptions, *, say: Callable[[str], None]) -> RiskCard:
    """Measure a policy through the gateway and write its card to the folder ``options.out``."""
    loaded = load_suite(options.suite, options.data_folder)
    policy = _find_policy(options.policy, settings.paths.policies)
    folder = resolve_model(settings.model.name, settings.cache.dir, say, revision=settings.model.revision)
    model = read_model_spec(folder)
    if options.circuit is not None:  # a circuit that does not fit is told before hours of answers
        circuit_measures(options.circuit, model.fingerprint, options.seed)
    plan = compile_policy(policy, model=model, artifacts=settings.paths.artifacts)
    try:
        card = asyncio.run(measure(loaded, Subject(policy, plan.revision, model), options))
        save_card(card, options.out / "card.json")
        write_atomically(options.out / "card.md", card_markdown(card).encode())
        write_atomically(options.out / "card.html", card_html(card).encode())
    except OSError as error:
        raise DiscoveryError(
            f"--out = {options.out}: cannot be written ({error.strerror or error}); what was answered is "
            "kept, the same command goes on"
        ) from error
    found = verdict(card)
    for finding in found.findings:
        say(finding.line())
    say(f"{options.out / 'card.json'}: {card.policy.id}@{card.policy.revision[:12]}, verdict: {found.status}")
    return card


async def measure(loaded: LoadedSuite, subject: Subject, options: JobOptions) -> RiskCard:
    """Ask, judge, count."""
    arms = _arms(loaded, subject, options)
    async with AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        endpoint = Endpoint(session, options.url)
        sampling = Sampling(await endpoint.model(), options.max_tokens, options.seed)
        run = {
            "policy": subject.policy.meta.id,
            "revision": subject.revision,
            "suite_sha256": loaded.sha256,
            "prompts_sha256": prompts_digest([(p.id, p.text) for p in loaded.prompts]),
            "sampling": asdict(sampling),
            "system_prompt": loaded.suite.system_prompt,
        }
        expected = {NONE: NONE, subject.policy.meta.id: subject.revision}
        answers = stack.enter_context(AnswerFile(options.out, run, expected))
        await collect(endpoint, loaded.prompts, arms, sampling, answers, options.concurrency)
        judge, moderation = _judge(session, options), _moderation(session, options)
        judged = await _outcomes(loaded, answers, arms, judge, moderation, options.concurrency)
    _write_outcomes(options.out / "outcomes.jsonl", judged)
    judges = {"refusal": judge.name, "coherence": "words (discovery.refusal), loops (discovery.evaluation)"}
    if moderation is not None:
        judges["harm"] = moderation.name
    return _card(loaded, subject, options, answers, judged, judges)


def _find_policy(name: str, folder: Path) -> Policy:
    """The policy of a file, or of an id in the folder of policies."""
    if name.endswith((".yaml", ".yml")):
        return load_policy(Path(name))
    seen = []
    for path in sorted({*folder.glob("*.yaml"), *folder.glob("**/policy.yaml")}):
        try:
            policy = load_policy(path)
        except PolicyError:
            continue  # another policy's faults are told where that one is asked for
        if policy.meta.id == name:
            return policy
        seen.append(policy.meta.id)
    raise DiscoveryError(f"--policy = {name!r}, but {folder} holds {', '.join(seen) or 'none'}; name a file")


def _arms(loaded: LoadedSuite, subject: Subject, options: JobOptions) -> list[Arm]:
    arms = [Arm("off", NONE), Arm("on", subject.policy.meta.id)]
    if loaded.suite.system_prompt is not None:
        arms.append(Arm("system_prompt", NONE, loaded.suite.system_prompt))
    for item in options.baselines:
        kind, _, policy = item.partition("=")
        if kind not in SERVED_BASELINES or not policy:
            raise DiscoveryError(
                f"--baseline = {item!r}, but must be KIND=POLICY with a kind of {', '.join(SERVED_BASELINES)}"
            )
        arms.append(Arm(kind, policy))
    return arms


def _judge(session: aiohttp.ClientSession, options: JobOptions) -> Judge:
    if options.judge_url is None:
        return PhraseJudge()
    if options.judge_model is None:
        raise DiscoveryError("--judge-url needs --judge-model, the name of the model that judges")
    return ModelJudge(session, options.judge_url, options.judge_model)


def _moderation(session: aiohttp.ClientSession, options: JobOptions) -> Moderation | None:
    if options.moderation_url is None:
        return None
    return Moderation(session, options.moderation_url, options.moderation_model)


async def _outcomes(
    loaded: LoadedSuite,
    answers: AnswerFile,
    arms: Sequence[Arm],
    judge: Judge,
    moderation: Moderation | None,
    concurrency: int,
) -> dict[str, dict[str, Outcome]]:
    prompts = [prompt for prompt in loaded.prompts if prompt.role != "text"]
    judged: dict[str, dict[str, Outcome]] = {arm.name: {} for arm in arms}
    limit = asyncio.Semaphore(max(1, concurrency))
    with meter("eval: judging", len(prompts) * len(arms), "answers") as progress:

        async def one(arm: str, prompt: Prompt) -> None:
            text, harmful = answers.answers[arm, prompt.id].text, None
            async with limit:
                refused = await judge.refused(prompt.text, text)
                if moderation is not None and prompt.role == "harmful":
                    harmful = await moderation.flagged(text)
            judged[arm][prompt.id] = Outcome(refused, is_coherent(text), is_degenerate(text), harmful)
            progress.advance(1)

        await asyncio.gather(*(one(arm.name, prompt) for prompt in prompts for arm in arms))
    return judged


def _write_outcomes(path: Path, judged: dict[str, dict[str, Outcome]]) -> None:
    lines = [
        json.dumps({"arm": arm, "id": key, **asdict(outcome)})
        for arm, outcomes in sorted(judged.items())
        for key, outcome in sorted(outcomes.items())
    ]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _card(
    loaded: LoadedSuite,
    subject: Subject,
    options: JobOptions,
    answers: AnswerFile,
    judged: dict[str, dict[str, Outcome]],
    judges: dict[str, str],
) -> RiskCard:
    policy, seed = subject.policy, options.seed
    measures = answer_measures(loaded, judged["off"], judged["on"], seed)
    measures["delta_ce"] = text_measure(loaded, answers.answers, "on", seed)
    notes = []
    if options.circuit is not None:
        found, note = circuit_measures(options.circuit, subject.model.fingerprint, seed)
        measures |= found
        notes.append(note)
    record = run_record("eval", seed, {}, None)
    return RiskCard(
        policy=PolicyReference(
            id=policy.meta.id, revision=subject.revision, target_class=policy.meta.target_class
        ),
        model=ModelReference(name=subject.model.name, fingerprint=subject.model.fingerprint),
        criteria=policy.evaluation.success_criteria,
        measures=merge(measures, NOT_TAKEN),
        baselines=card_baselines(loaded, policy, answers, judged, seed),
        record=Record(
            command=options.command,
            suite=loaded.suite.name,
            suite_sha256=loaded.sha256,
            commit=record["commit"],
            versions=record["versions"],
            machine=record["machine"],
            judges=judges,
            settings={
                "max_tokens": options.max_tokens,
                "temperature": 0,
                "seed": seed,
                "answers_sha256": answers.sha256(),
            },
        ),
        notes=(*NOTES, *notes),
    )
