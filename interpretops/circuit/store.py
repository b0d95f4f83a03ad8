"""The circuits that were found here: a copy of each by its id, in a folder of the user's state."""

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
        """Keep a circuit; one of the same id is replaced. Raises `CircuitError`."""
        if circuit.id is None:
            raise CircuitError("the circuit has no id, so that it cannot be kept; search it again")
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
        """The circuit of an id. Raises `CircuitError`."""
        if not _ID.match(identifier):
            raise CircuitError(
                f"circuit id = {identifier!r}, but an id is cx_ and 26 letters and digits; "
                "`mechctl circuits` lists those there are"
            )
        path = self._path(identifier)
        if not path.is_file():
            raise CircuitError(
                f"circuit {identifier}: is not in {self.folder}; `mechctl circuits` lists those there are"
            )
        return load_circuit(path)

    def _path(self, identifier: str) -> Path:
        return self.folder / f"{identifier}.json"


def made_at(identifier: str) -> datetime:
    """When an id was made."""
    return datetime.fromtimestamp(made_at_ms(identifier) / 1000, UTC)
