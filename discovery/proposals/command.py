"""`mechctl propose`: turns a contrast into a policy and a record of how it was chosen."""

from collections.abc import Callable
from pathlib import Path

from discovery.errors import DiscoveryError
from discovery.gates.contrast import read_contrast
from discovery.jobs.stopping import interruptible
from discovery.proposals.artifact import ProposalPaths
from discovery.proposals.settings import ProposeSettings
from interpretops.settings import Settings

Say = Callable[[str], None]


def run_propose(
    settings: Settings,
    chosen: ProposeSettings,
    *,
    out: Path | None,
    record: Path | None,
    work: Path,
    say: Say,
) -> None:
    """Search strength and threshold on selection prompts, write the best policy; resumes a stopped run."""
    contrast = read_contrast(chosen.contrast, chosen.data_folder, chosen.seed, chosen.target_class)
    if chosen.method == "word-rows" and contrast.aim != "avoid":
        raise DiscoveryError(
            f"{chosen.contrast}: aim = {contrast.aim!r}, but word-rows suppress words in answers; "
            "use another --method, or aim 'avoid'"
        )
    policy_id = chosen.policy_id or f"{contrast.name}-{chosen.method}"
    policy = work / f"{policy_id}.yaml" if out is None else out
    record = policy.parent / "records" / f"{policy_id}.json" if record is None else record
    paths = ProposalPaths(policy_id, policy, record, settings.paths.artifacts)
    with interruptible(f"finished steps are in {work}"):
        if contrast.aim == "avoid":
            from discovery.proposals.avoid.proposal import propose_avoid

            propose_avoid(settings, chosen, contrast, paths, work, say)
        elif chosen.method == "gated-edit":
            from discovery.proposals.answer.gated_edit import propose_gated_edit

            propose_gated_edit(settings, chosen, contrast, paths, work, say)
        else:
            from discovery.proposals.answer.proposal import AnswerProposal

            AnswerProposal(settings, chosen, contrast, paths, work, say).run()
