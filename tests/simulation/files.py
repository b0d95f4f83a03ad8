"""The operator's files: policies and keys, as people and programs leave them behind."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from interpretops.records.api_keys import ApiKey, make_key, write_keys
from simulation.patches import Disk
from simulation.scenario import POLICIES, Scenario

_CRITERIA = "evaluation: {success_criteria: {collateral_damage_max: 0.05}}\n"


class Files:
    """One folder of policies, and the file of keys."""

    def __init__(self, folder: Path, scenario: Scenario, chance: random.Random, disk: Disk) -> None:
        self.folder = folder
        self.policies = folder / "policies"
        self._away = folder / "away"
        self._chance = chance
        self._disk = disk
        self._scales: set[tuple[str, float]] = set()
        """Policy and scale of all that was written."""
        self._texts: dict[str, list[str]] = {policy: [] for policy in POLICIES}
        """What each policy was, in order."""
        self._moved = 0
        """How often the audit log was moved away."""
        self.keys: dict[str, str] = {}
        """Tenant, or `operator`, to its key."""
        self._kept: dict[str, ApiKey] = {}
        self._key_file = folder / "keys.yaml" if scenario.keys else None
        self.policies.mkdir(parents=True)
        for policy in POLICIES:
            self.write(policy)
        if self._key_file is not None:
            for tenant in scenario.tenants:
                self.keys[tenant["id"]], self._kept[tenant["id"]] = make_key(tenant=tenant["id"])
            self.keys["operator"], self._kept["operator"] = make_key(role="operator")
            self.write_keys()

    def write(self, policy: str, *, layer: int | None = None, criteria: bool = False, name: str = "") -> None:
        """A new revision of a policy, in its own file or another: one that it never had before."""
        scale = self._scale()
        # Nobody could tell a change to what serves already from a change that is not taken.
        while (policy, scale) in self._scales:
            scale = self._scale()
        self._scales.add((policy, scale))
        layer = POLICIES[policy] if layer is None else layer
        text = (
            f"meta: {{id: {policy}}}\ninterventions:\n"
            f"  - {{type: head_scale, selector: {{layer: {layer}, heads: [0]}}, scale: {scale}}}\n"
        )
        self._texts[policy].append(text + (_CRITERIA if criteria else ""))
        self._put(name or policy, self._texts[policy][-1])

    def change_back(self, policy: str) -> None:
        """One of the last revisions that a policy had, perhaps the one that it has."""
        self._put(policy, self._chance.choice(self._texts[policy][-4:]))

    def spoil(self, policy: str) -> None:
        """A file that becomes no plan."""
        bad = ("meta: {", "meta: {id: " + policy + "}\ninterventions: [{type: unknown}]\n", "", "\0\xff")
        self._put(policy, self._chance.choice(bad))

    def delete(self, policy: str) -> None:
        """No file any more."""
        (self.policies / f"{policy}.yaml").unlink(missing_ok=True)

    def take_away(self) -> None:
        """The whole folder is gone, as when a mount is lost."""
        if self.policies.exists():
            self.policies.rename(self._away)

    def bring_back(self) -> None:
        """It is there again."""
        if self._away.exists():
            if self.policies.exists():
                shutil.rmtree(self.policies)
            self._away.rename(self.policies)

    def mend(self) -> None:
        """All as it should be, each policy in a new revision."""
        self.bring_back()
        for path in self.policies.glob("*.yaml"):
            if path.stem not in POLICIES:
                path.unlink()
        for policy in POLICIES:
            self.write(policy)

    def write_keys(self, *, without: str | None = None) -> None:
        """The file of keys, with or without one tenant's."""
        if self._key_file is not None:
            # People keep their files on another disk than the gateway's.
            full, self._disk.full = self._disk.full, False
            write_keys(self._key_file, [key for name, key in self._kept.items() if name != without])
            self._disk.full = full

    def spoil_keys(self) -> None:
        """A file of keys that cannot be read."""
        if self._key_file is not None:
            self._key_file.write_text("keys: [{id: 1")

    def delete_keys(self) -> None:
        """No file of keys any more."""
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)

    def move_audit_log(self) -> None:
        """As programs do that rotate logs."""
        log = self.folder / "audit.jsonl"
        if log.exists():
            self._moved += 1
            log.rename(self.folder / f"audit.jsonl.{self._moved}")

    def delete_audit_log(self) -> bool:
        """As people do who need the space; whether there was one."""
        log = self.folder / "audit.jsonl"
        there = log.exists()
        log.unlink(missing_ok=True)
        return there

    def _scale(self) -> float:
        return round(self._chance.uniform(0.1, 0.9), 4)

    def _put(self, name: str, text: str) -> None:
        if self.policies.exists():
            (self.policies / f"{name}.yaml").write_text(text)
