"""`mechctl circuits`: lists the circuits that `mechctl search` has found."""

from typing import TYPE_CHECKING, Annotated

import typer

from mechctl.options.shared_options import Config

if TYPE_CHECKING:
    from interpretops.circuit import Circuit


def circuits(
    latest: Annotated[bool, typer.Option("--latest", help="Only the newest circuit.")] = False,
    id_only: Annotated[
        bool, typer.Option("--id-only", help="Print only ids, one per line, for scripts.")
    ] = False,
    target_class: Annotated[
        str | None, typer.Option("--class", help="Only circuits of this behaviour.", show_default=False)
    ] = None,
    config: Config = None,
) -> None:
    """List the circuits that `mechctl search` has found, newest first."""
    from interpretops.circuit.store import CircuitStore, made_at
    from interpretops.errors import ConfigError
    from interpretops.settings import load_settings

    store = CircuitStore(load_settings(config).circuits_dir)
    found: list[tuple[str, Circuit | None]] = []
    for identifier in store.ids():
        if target_class is None and id_only:
            found.append((identifier, None))
        elif (circuit := store.load(identifier)).target_class == target_class or target_class is None:
            found.append((identifier, circuit))
        if latest and found:
            break
    if not found:
        of = "" if target_class is None else f" of class {target_class!r}"
        raise ConfigError(f"{store.folder}: holds no circuit{of}; `mechctl search` finds one")
    for identifier, known in found:
        if known is None or id_only:
            typer.echo(identifier)
            continue
        components = sum(node.dictionary is None for node in known.nodes)
        typer.echo(
            f"{identifier}  {made_at(identifier):%Y-%m-%d %H:%M} UTC  {known.target_class} in {known.model}: "
            f"{components} nodes, {len(known.edges)} edges"
        )
