"""The operator's files: policies and keys, in every state that people and programs leave them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from interpretops.records.api_keys import ApiKey, make_key, write_keys
from simulation.patches import Disk
from simulation.scenario import POLICIES, Scenario

_CRITERIA = "evaluation: {success_criteria: {collateral_damage_max: 0.05}}\n"


class Files:
    """One policy folder, and the key file."""

    def __init__(self, folder: Path, scenario: Scenario, chance: random.Random, disk: Disk) -> None:
        self.folder = folder
        self.policies = folder / "policies"
        self._away = folder / "away"
        self._chance = chance
        self._disk = disk
        self._scales: set[tuple[str, float]] = set()
        """Policy and scale of everything written."""
        self._texts: dict[str, list[str]] = {policy: [] for policy in POLICIES}
        """The contents of each policy, in order."""
        self._moved = 0
        """How often the audit log was rotated."""
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
        """Write a new revision of a policy, one that it never had, in its own file or another."""
        scale = self._scale()
        # A change to the active content could not be distinguished from an ignored change.
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
        """Write one of a policy's recent revisions, perhaps the current one."""
        self._put(policy, self._chance.choice(self._texts[policy][-4:]))

    def spoil(self, policy: str) -> None:
        """Write a file that does not compile."""
        bad = ("meta: {", "meta: {id: " + policy + "}\ninterventions: [{type: unknown}]\n", "", "\0\xff")
        self._put(policy, self._chance.choice(bad))

    def delete(self, policy: str) -> None:
        """Delete a policy's file."""
        (self.policies / f"{policy}.yaml").unlink(missing_ok=True)

    def take_away(self) -> None:
        """Remove the whole folder, as when a mount is lost."""
        if self.policies.exists():
            self.policies.rename(self._away)

    def bring_back(self) -> None:
        """Restore the folder."""
        if self._away.exists():
            if self.policies.exists():
                shutil.rmtree(self.policies)
            self._away.rename(self.policies)

    def mend(self) -> None:
        """Write valid files, each policy in a new revision."""
        self.bring_back()
        for path in self.policies.glob("*.yaml"):
            if path.stem not in POLICIES:
                path.unlink()
        for policy in POLICIES:
            self.write(policy)

    def write_keys(self, *, without: str | None = None) -> None:
        """Write the key file, with or without one tenant's key."""
        if self._key_file is not None:
            # The operator's files are on another disk than the gateway's.
            full, self._disk.full = self._disk.full, False
            write_keys(self._key_file, [key for name, key in self._kept.items() if name != without])
            self._disk.full = full

    def spoil_keys(self) -> None:
        """Write an unreadable key file."""
        if self._key_file is not None:
            self._key_file.write_text("keys: [{id: 1")

    def delete_keys(self) -> None:
        """Delete the key file."""
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)

    def move_audit_log(self) -> None:
        """Rename the audit log, as log rotation does."""
        log = self.folder / "audit.jsonl"
        if log.exists():
            self._moved += 1
            log.rename(self.folder / f"audit.jsonl.{self._moved}")

    def delete_audit_log(self) -> bool:
        """Delete the audit log, as someone short of space does; returns whether there was one."""
        log = self.folder / "audit.jsonl"
        there = log.exists()
        log.unlink(missing_ok=True)
        return there

    def _scale(self) -> float:
        return round(self._chance.uniform(0.1, 0.9), 4)

    def _put(self, name: str, text: str) -> None:
        if self.policies.exists():
            (self.policies / f"{name}.yaml").write_text(text)
