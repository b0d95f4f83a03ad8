"""Policy files: whether they compile, whether their Risk Cards pass, and whether bindings match them."""

from __future__ import annotations

from collections.abc import Iterator

from interpretops.plan import ModelSpec
from interpretops.settings import Settings
from proxy.doctor.finding import Finding, fault, ok, warning
from proxy.policies.binding import required_policies
from proxy.policies.binding_names import unmatched_policies
from proxy.policies.policy_files import BrokenPolicyError, Revision, compile_file
from proxy.policies.policy_folders import PolicyFolders


def check_policies(settings: Settings, model: ModelSpec | None) -> Iterator[Finding]:
    """Compile each policy file for the model. Without a model, warn that none was compiled."""
    folder, artifacts = settings.paths.policies, settings.paths.artifacts
    listing = PolicyFolders(folder, artifacts).scan()
    for _, why in listing.hidden.values():
        yield from fault("policies", why)
    if listing.files is None:
        return
    if model is None:
        yield warning(
            "policies", f"{len(listing.files)} files in {folder} were not compiled: the model is unknown"
        )
        return
    required_ids = required_policies(settings.bindings)
    known: set[str] = set()
    for path in listing.files:
        try:
            revision = compile_file(path, model, artifacts, folder)
        except BrokenPolicyError as error:
            known |= {error.policy} if error.policy else set()
            yield from fault(f"policy {error.policy or path.name}", error)
            continue
        if revision.policy in known:
            yield from fault(
                f"policy {revision.policy}", f"{path}: another file already uses this id; choose another"
            )
            continue
        known.add(revision.policy)
        yield _card_finding(
            revision, require_card=settings.policies.require_cards, bound=revision.policy in required_ids
        )
    if not listing.files:
        yield warning("policies", f"{folder} holds no policies; all requests are served unsteered")
    for unmatched in unmatched_policies(settings.bindings, known):
        yield from fault("bindings", unmatched.why)


def _card_finding(revision: Revision, *, require_card: bool, bound: bool) -> Finding:
    subject = f"policy {revision.policy}"
    if revision.proven:
        return ok(subject, f"{revision.label}: {revision.card}")
    if require_card:
        what = "a binding requires it, so its requests are refused" if bound else "it waits as a candidate"
        text = f"{revision.label} has no passing Risk Card (policies.require_cards): {what}; {revision.card}"
        return fault(subject, text)[0] if bound else warning(subject, text)
    return warning(subject, f"{revision.label} serves without a passing Risk Card: {revision.card}")
