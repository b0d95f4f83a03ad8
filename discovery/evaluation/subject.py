"""What an evaluation is of: the policy as it stands, compiled for the model here, and its suites."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from discovery.errors import DiscoveryError
from discovery.evaluation.suites.suite import LoadedSuite, Role
from discovery.evaluation.suites.suite_files import join_suites, load_suites, local_copy
from interpretops.compile import compile_policy
from interpretops.errors import PolicyError
from interpretops.model.source import resolve_model
from interpretops.model.spec import read_model_spec
from interpretops.plan import ModelSpec, Plan
from interpretops.policy import Policy, load_policy
from interpretops.settings import Settings

SUITES = Path(__file__).with_name("suites")
"""The suites that come with `mechctl eval`."""


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    policy: Policy
    revision: str
    model: ModelSpec
    plan: Plan | None = None
    """None where only answers are asked for and nothing is computed here."""
    folder: Path | None = None
    """The model's folder, with the plan."""


def open_subject(name: str, settings: Settings, say: Callable[[str], None]) -> Subject:
    """The policy of a file, or of an id in the folder of policies, compiled."""
    policy = _find_policy(name, settings.paths.policies)
    folder = resolve_model(settings.model.name, settings.cache.dir, say, revision=settings.model.revision)
    model = read_model_spec(folder)
    plan = compile_policy(policy, model=model, artifacts=settings.paths.artifacts)
    return Subject(policy, plan.revision, model, plan, folder)


def open_suites(
    names: Sequence[str], policy: Policy | None, data_folder: str | None, s3_endpoint: str | None = None
) -> LoadedSuite:
    """The suites that are named, or else those of the policy, as one."""
    if not names and (policy is None or not policy.evaluation.suites):
        where = "" if policy is None else f"{policy.document.source}: evaluation.suites is empty; "
        raise DiscoveryError(f"{where}name a suite there, or give --suite" if where else "eval needs --suite")
    named = names or [suite.path or suite.name for suite in policy.evaluation.suites] if policy else names
    loaded = []
    for name in named:
        with local_copy(_suite_place(name, policy), Path(), None, s3_endpoint) as file:
            loaded += load_suites(file, data_folder, s3_endpoint)
    return join_suites(loaded)


def cut(loaded: LoadedSuite, limit: int, roles: Sequence[Role] | None = None) -> LoadedSuite:
    """At most ``limit`` prompts of each role, from every file its share, always the first ones."""
    kept = []
    for role in dict.fromkeys(prompt.role for prompt in loaded.prompts):
        prompts = loaded.of(role)
        if roles is not None and role not in roles:
            continue
        for source in dict.fromkeys(prompt.source for prompt in prompts):
            own = [prompt for prompt in prompts if prompt.source == source]
            kept += own[: math.ceil(min(1.0, limit / len(prompts)) * len(own))]
    return replace(loaded, prompts=tuple(kept))


def without(loaded: LoadedSuite, ids: Collection[str]) -> LoadedSuite:
    """The suite without some prompts."""
    return replace(loaded, prompts=tuple(prompt for prompt in loaded.prompts if prompt.id not in ids))


def _suite_place(name: str, policy: Policy | None) -> str:
    """A URL as it is; a file beside the policy or from here; else a suite that comes with the command."""
    places = [Path(name), SUITES / f"{name}.yaml"]
    if policy is not None and policy.folder is not None:
        places.insert(0, policy.folder / name)
    for place in places:
        if place.is_file():
            return str(place)
    if "://" in name:
        return name
    there = ", ".join(sorted(path.stem for path in SUITES.glob("*.yaml")))
    raise DiscoveryError(f"suite = {name!r}, but there is no such file, and the suites here are {there}")


def _find_policy(name: str, folder: Path) -> Policy:
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
