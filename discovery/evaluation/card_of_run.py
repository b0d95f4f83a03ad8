"""Makes the Risk Card of a run from its judged answers."""

from datetime import UTC, datetime

from discovery.evaluation.baselines.baselines import card_baselines
from discovery.evaluation.evaluation_run import Measured, Run
from discovery.evaluation.measures.circuit_stability import circuit_of
from discovery.evaluation.measures.contributions import contribution_measure, effect_of, score_effect
from discovery.evaluation.measures.latency import latency_measure
from discovery.evaluation.measures.likelihoods import forced_items, forced_measures, score_items
from discovery.evaluation.measures.metrics import (
    answer_measures,
    merge,
    stopped_attacks,
    task_loss_measure,
    task_measure,
    text_measure,
)
from discovery.evaluation.subject import without
from discovery.evaluation.suites.suite import LoadedSuite
from discovery.jobs.run_record import run_record
from interpretops.riskcard import RiskCard
from interpretops.riskcard.card import (
    MEASURES,
    NATS,
    Contribution,
    MeasureName,
    Measures,
    ModelReference,
    PolicyReference,
    Record,
)
from interpretops.riskcard.measures import absent

NOT_TAKEN: dict[MeasureName, str] = {
    **dict.fromkeys(MEASURES, "not taken"),
    "causal_contribution": "the model is not here, so that no part of the policy could be ablated",
}
NOTES = (
    "Answers are greedy and cut at max_tokens; refusals and coherence are judged by the named judges.",
    "A prompt whose unsteered answer is already refused or degenerate is not counted in CD and over-refusal.",
    "A fluent, wrong answer to a benign prompt is not noticed by CD.",
    "ΔCE text is read from prompt tokens; under a policy that acts from its gate's decision on, from the "
    "second half of each piece, behind the first as prompt.",
    "ΔCE answers, factual and bias likelihood are read from the model in this process, by the same edit op.",
)


def make_card(run: Run, measured: Measured) -> RiskCard:
    """Count what was judged, read likelihoods, and put all of it on a card."""
    loaded, subject, options, seed = run.loaded, run.subject, run.options, run.options.seed
    too_long = measured.answers.too_long
    loaded = without(loaded, too_long)
    answers = measured.answers.answers
    baselines = card_baselines(loaded, subject.policy, measured.answers, measured.judged, seed, measured.made)
    measures = answer_measures(loaded, measured.judged["off"], measured.judged["on"], seed)
    measures["delta_ce"] = text_measure(loaded, answers, "on", seed)
    measures["bleu"] = task_measure(loaded, answers, "on")
    unsteered: Measures = {"bleu": task_measure(loaded, answers, "off")}
    on, off = _likelihoods(run, measured)
    measures |= on
    unsteered |= {name: measure for name, measure in off.items() if name not in NATS}
    baselines["none"] = baselines["none"].model_copy(
        update={"measures": baselines["none"].measures | unsteered}
    )
    measures["bleu_loss"] = task_loss_measure(loaded, answers, "on", seed)
    measures["latency_cost_overhead"], latency, latency_note = latency_measure(
        measured.timed, loaded.sha256, run.price_per_hour
    )
    circuit, measures["circuit_stability"], circuit_note = circuit_of(
        subject.policy, subject.model, options.circuit, run.artifacts, run.circuits
    )
    contributions, parts_note = _contributions(run, measured, loaded, measures)
    notes = [note for note in (latency_note, parts_note, circuit_note) if note]
    if too_long:
        notes.append(f"{len(too_long)} prompts were longer than the model's context and are left out.")
    record = run_record("eval", seed, {}, None)
    return RiskCard(
        policy=PolicyReference(
            id=subject.policy.meta.id,
            revision=subject.revision,
            target_class=subject.policy.meta.target_class,
        ),
        model=ModelReference(name=subject.model.name, fingerprint=subject.model.fingerprint),
        criteria=subject.policy.criteria,
        measures=merge(measures, NOT_TAKEN),
        baselines=baselines,
        circuit=circuit,
        contributions=contributions,
        latency=latency,
        record=Record(
            command=options.command,
            suite=loaded.suite.name,
            suite_sha256=loaded.sha256,
            commit=record["commit"],
            versions=record["versions"],
            machine=record["machine"],
            measured_on=datetime.now(UTC).date().isoformat(),
            judges=measured.judges,
            settings={
                "max_tokens": options.max_tokens,
                "temperature": 0,
                "seed": seed,
                "cached_prompt_tokens": sum(answer.cached or 0 for answer in answers.values()),
                "answers_sha256": measured.answers.sha256(),
            },
        ),
        notes=(*NOTES, *notes),
    )


def _likelihoods(run: Run, measured: Measured) -> tuple[Measures, Measures]:
    """ΔCE on own answers, factual and bias likelihood, with and without the policy."""
    subject = run.subject
    if subject.plan is None or subject.folder is None:
        return {}, {}
    own = {key: answer.text for (arm, key), answer in measured.answers.answers.items() if arm == "off"}
    items = forced_items(run.loaded, own, run.options.answer_limit, subject.plan)
    scores = score_items(items, subject.plan, subject.folder, run.dtype, run.out / "likelihoods.jsonl")
    on, off = (forced_measures(run.loaded, items, scores, arm, run.options.seed) for arm in ("on", "off"))
    return on, off


def _contributions(
    run: Run, measured: Measured, loaded: LoadedSuite, measures: Measures
) -> tuple[tuple[Contribution, ...], str | None]:
    """Ablate each part of the policy where the model is here; CCS goes among the measures."""
    subject, seed = run.subject, run.options.seed
    if subject.plan is None or subject.folder is None:
        return (), None
    if not run.options.parts:
        measures["causal_contribution"] = absent("not asked for: --parts 0")
        return (), None
    effect = effect_of(
        subject.policy,
        subject.plan,
        run.artifacts,
        loaded,
        measured.answers.answers,
        seed,
        run.options.parts,
        stopped_attacks(loaded, measured.judged["off"], measured.judged["on"]),
    )
    scores = score_effect(effect, subject.plan, subject.folder, run.dtype, run.out / "contributions.jsonl")
    measures["causal_contribution"], parts, note = contribution_measure(effect, scores, loaded, seed)
    return parts, note
