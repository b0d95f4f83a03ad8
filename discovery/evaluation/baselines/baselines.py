"""The baselines of a Risk Card: what the policy must beat, on the same prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import yaml

from discovery.data.sources import sha256_of_file
from discovery.errors import DiscoveryError
from discovery.evaluation.answers.answer_file import AnswerFile
from discovery.evaluation.baselines.baseline_policies import SUFFIX, Derived, baseline_id, derive_baselines
from discovery.evaluation.measures.metrics import answer_measures, text_measure
from discovery.evaluation.subject import Subject
from discovery.evaluation.suites.suite import LoadedSuite
from discovery.jobs.whole_file import write_json
from discovery.judges.outcome import Outcomes, blocked
from interpretops.files.json_file import read_json_object
from interpretops.plan import Array
from interpretops.policy import ALWAYS_GATE, Policy
from interpretops.riskcard.card import BASELINES, Baseline, BaselineKind

SERVED_BASELINES: tuple[BaselineKind, ...] = tuple(SUFFIX)
"""Baselines that are policies themselves, measured where the gateway serves one."""
OWN_CONTRAST = Path(__file__).resolve().parents[2] / "prompts" / "contrast.yaml"


def make_baselines(
    subject: Subject, artifacts: Path, out: Path, *, contrast: Path | None, data_folder: str | None, seed: int
) -> Derived:
    """Derive the baselines of a policy into ``out``; what is there from the same inputs already is kept."""
    assert subject.folder is not None
    record = out / "derived.json"
    inputs = {
        "revision": subject.revision,
        "seed": seed,
        "contrast": _hash_of(contrast or _contrast_of(subject.policy.meta.target_class)),
    }
    if record.exists():
        found = read_json_object(record, DiscoveryError)
        if found.get("inputs") == inputs:
            return Derived(out / "policies", out / "artifacts", found["ids"], found["notes"])
    made = derive_baselines(
        subject.policy,
        subject.model,
        artifacts,
        out,
        seed=seed,
        direction=_direction(subject, contrast, data_folder, seed),
    )
    write_json(record, {"inputs": inputs, "ids": made.ids, "notes": made.notes})
    return made


def _hash_of(path: Path | None) -> str | None:
    return None if path is None else sha256_of_file(path)


def _direction(
    subject: Subject, contrast: Path | None, data_folder: str | None, seed: int
) -> Callable[[int], tuple[Array, str]] | str:
    """How to get the DiffMean vector: from the given contrast, else from the one that we bring."""
    assert subject.folder is not None
    from discovery.evaluation.baselines.diffmean import diffmean

    given, contrast = contrast, contrast or _contrast_of(subject.policy.meta.target_class)
    if contrast is None:
        return "no contrast of this class; give --contrast FILE"
    if contrast == OWN_CONTRAST:
        lists = yaml.safe_load(OWN_CONTRAST.read_text(encoding="utf-8"))
        return diffmean(subject.folder, lists["harmful"], lists["benign"], OWN_CONTRAST.name)
    from discovery.gates.contrast import read_contrast

    folder = None if data_folder is None else Path(data_folder)
    try:
        found = read_contrast(contrast, folder, seed, subject.policy.meta.target_class)
    except DiscoveryError as error:
        if given is not None:
            raise
        return f"the contrast of the class cannot be read ({str(error).splitlines()[0].rsplit('/', 1)[-1]})"
    target, benign = found["discovery", "target"], found["discovery", "benign"]
    towards, away = (benign, target) if found.aim == "avoid" else (target, benign)
    return diffmean(subject.folder, towards, away, contrast.name, chat="chat" in found.formats)


def _contrast_of(target_class: str) -> Path | None:
    """The contrast prompts that come with the project for a class; None when there are none."""
    if target_class == "jailbreak":
        return OWN_CONTRAST
    path = OWN_CONTRAST.with_name(f"{target_class}.yaml")
    return path if path.is_file() else None


def served_baselines(
    policy: Policy, names: Sequence[str], given: Sequence[str], made: Derived | None
) -> dict[BaselineKind, str]:
    """Policy id of each baseline that the gateway serves: derived, found by its name, or given by hand."""
    found: dict[BaselineKind, str] = {}
    offered = {name.partition("+")[2] for name in names}
    for kind in SERVED_BASELINES:
        name = baseline_id(policy.meta.id, kind)
        if (made is not None and made.ids.get(kind) == name) or (made is None and name in offered):
            found[kind] = name
    for item in given:
        kind, _, name = item.partition("=")  # type: ignore[assignment]  # checked next
        if kind not in SERVED_BASELINES or not name:
            raise DiscoveryError(
                f"--baseline = {item!r}, but must be KIND=POLICY with a kind of {', '.join(SERVED_BASELINES)}"
            )
        found[kind] = name
    return found


def card_baselines(
    loaded: LoadedSuite,
    policy: Policy,
    answers: AnswerFile,
    judged: Mapping[str, Outcomes],
    seed: int,
    made: Mapping[BaselineKind, str],
) -> dict[BaselineKind, Baseline]:
    """Each baseline, measured from what the arms answered, or why it is absent.

    made  how each derived baseline was made, or why it was not
    """
    off = judged["off"]
    found: dict[BaselineKind, Baseline] = {
        "none": Baseline(
            measures=answer_measures(loaded, off, off, seed), note="DE and CD are 0 by definition"
        )
    }
    for kind in get_args(BaselineKind):
        if kind in judged:
            measures = answer_measures(loaded, off, judged[kind], seed)
            if kind in SERVED_BASELINES:
                measures["delta_ce"] = text_measure(loaded, answers.answers, kind, seed)
            notes = [loaded.suite.system_prompt or ""] if kind == "system_prompt" else []
            if kind in SERVED_BASELINES:
                notes += [made.get(kind, ""), _served(answers, kind)]
            if len(judged[kind]) < len(off):
                notes.append(f"asked {len(judged[kind])} of the {len(off)} prompts")
            found[kind] = Baseline(measures=measures, note="; ".join(note for note in notes if note))
    gates = policy.gates
    gated = any(edit.gate != ALWAYS_GATE and gates[edit.gate].conditions for edit in policy.interventions)
    fired = {key: answers.answers["on", key].fired for key in off}
    if gated and all(count is not None for count in fired.values()):
        block = blocked(off, {key: bool(count) for key, count in fired.items()})
        found["block"] = Baseline(
            measures=answer_measures(loaded, off, block, seed),
            note="computed from the receipts' gate firings; coherent by construction; not steering",
        )
    reasons: dict[BaselineKind, str] = {
        "system_prompt": "the suite leaves it out",
        "block": "the policy acts without a condition, or the receipts do not tell its firings",
    }
    for kind in BASELINES:
        reason = reasons.get(kind) or made.get(kind) or f"not served; give --baseline {kind}=POLICY"
        found.setdefault(kind, Baseline(absent=reason))
    return found


def _served(answers: AnswerFile, kind: str) -> str:
    answer = next(
        a for (arm, _), a in answers.answers.items() if arm == kind and not (a.too_long or a.not_told)
    )
    return f"policy {answer.policy}@{answer.revision[:12]}"
