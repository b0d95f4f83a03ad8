"""Saved circuits: a copy of each, by id, in the user's state folder."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from interpretops.circuit.circuit_file import Circuit, CircuitError, load_circuit
from interpretops.ids import id_pattern, made_at_ms

_ID = re.compile(id_pattern("cx"))


@dataclass(frozen=True)
class CircuitStore:
    """A folder of circuit files, each named by its id."""

    folder: Path

    def add(self, circuit: Circuit) -> None:
        """Save a circuit, replacing one with the same id. Raises `CircuitError`."""
        if circuit.id is None:
            raise CircuitError("the circuit has no id, so it cannot be saved; run the search again")
        path = self._path(circuit.id)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            circuit.save(path)
        except OSError as error:
            raise CircuitError(
                f"{path}: cannot be written ({error.strerror or error}); set paths.state to another folder"
            ) from error

    def ids(self) -> list[str]:
        """All ids, newest first."""
        try:
            names = [path.stem for path in self.folder.glob("cx_*.json")]
        except OSError as error:
            raise CircuitError(f"{self.folder}: cannot be read ({error.strerror})") from error
        return sorted(filter(_ID.match, names), reverse=True)

    def load(self, identifier: str) -> Circuit:
        """Load the circuit with this id. Raises `CircuitError`."""
        if not _ID.match(identifier):
            raise CircuitError(
                f"circuit id = {identifier!r}, but an id is cx_ and 26 letters and digits; "
                "`mechctl circuits` lists the saved ones"
            )
        path = self._path(identifier)
        if not path.is_file():
            raise CircuitError(
                f"circuit {identifier}: is not in {self.folder}; `mechctl circuits` lists the saved ones"
            )
        return load_circuit(path)

    def _path(self, identifier: str) -> Path:
        return self.folder / f"{identifier}.json"


def made_at(identifier: str) -> datetime:
    """When the id was created."""
    return datetime.fromtimestamp(made_at_ms(identifier) / 1000, UTC)
