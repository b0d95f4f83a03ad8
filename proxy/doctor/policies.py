"""Every policy file: whether it becomes a plan, how its Risk Card stands, and whether bindings find it."""

from __future__ import annotations

from collections.abc import Iterator

from interpretops.plan import ModelSpec
from interpretops.settings import Settings
from proxy.doctor.finding import Finding, fault, ok, warning
from proxy.policies.binding import demanded
from proxy.policies.binding_names import unmatched_policies
from proxy.policies.policy_files import BrokenPolicyError, Revision, compile_file
from proxy.policies.policy_folders import PolicyFolders


def check_policies(settings: Settings, model: ModelSpec | None) -> Iterator[Finding]:
    """Compile each file for the model; without a model say that none was compiled."""
    folder, artifacts = settings.paths.policies, settings.paths.artifacts
    listing = PolicyFolders(folder, artifacts).scan()
    for _, why in listing.hidden.values():
        yield from fault("policies", why)
    if listing.files is None:
        return
    if model is None:
        yield warning(
            "policies", f"{len(listing.files)} files in {folder} are not compiled: no model is known"
        )
        return
    wanted = demanded(settings.bindings)
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
                f"policy {revision.policy}", f"{path}: another file has this id; give it one of its own"
            )
            continue
        known.add(revision.policy)
        yield _standing(
            revision, required=settings.policies.require_cards, demanded=revision.policy in wanted
        )
    if not listing.files:
        yield warning("policies", f"{folder} holds no policy; every request is served as the model is")
    for unmatched in unmatched_policies(settings.bindings, known):
        yield from fault("bindings", unmatched.why)


def _standing(revision: Revision, *, required: bool, demanded: bool) -> Finding:
    subject = f"policy {revision.policy}"
    if revision.proven:
        return ok(subject, f"{revision.label}: {revision.card}")
    if required:
        what = "a binding demands it, so its requests are refused" if demanded else "it waits as a candidate"
        text = f"{revision.label} is not proven, and policies.require_cards is set: {what}; {revision.card}"
        return fault(subject, text)[0] if demanded else warning(subject, text)
    return warning(subject, f"{revision.label} serves unproven: {revision.card}")
