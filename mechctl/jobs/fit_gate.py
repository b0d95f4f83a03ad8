"""`mechctl fit-gate`: learns a gate and an edit from labelled prompts; an interrupted run resumes."""

from pathlib import Path
from typing import Annotated

import typer

from discovery.gates.gate_settings import EditSettings, GateSettings
from mechctl.options.from_settings import Options, Spelled, options_from_models
from mechctl.options.shared_options import Artifacts, Config, DataFolder, Model


@options_from_models
def fit_gate(
    *,
    data: Annotated[Path, typer.Option("--data", help="YAML list of prompt files, split by source.")],
    adapter: Annotated[str, typer.Option("--adapter", help="Id of the adapter to write.")],
    data_folder: DataFolder = None,
    target_class: Annotated[str, typer.Option(help="Behaviour that the edit acts against.")] = "jailbreak",
    policy_id: Annotated[str, typer.Option(help="Id of the policy to write.")] = "jailbreak",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Policy file to write; default: in --work.", show_default=False),
    ] = None,
    work: Annotated[
        Path, typer.Option("--work", help="Folder of checkpoints; an unfinished run resumes.")
    ] = Path("runs/fit-gate"),
    join: Annotated[
        list[Path] | None,
        typer.Option(
            "--join",
            metavar="<path>",
            help="Probe file trained earlier, used as a further probe. May be repeated.",
            show_default=False,
        ),
    ] = None,
    gate: Annotated[
        GateSettings,
        Options(
            {"layers": "--gate-layers", "weights": Spelled(("--weight",), metavar="GROUP=N")},
            without=("batch_tokens", "learning_rate"),
        ),
    ],
    edit: Annotated[EditSettings, Options(without=("firing_weight",))],
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Learn a conditional refusal: an attention probe that opens a gate, and a low-rank edit behind it."""
    from discovery.gates.command import run_fit_gate
    from interpretops.settings import load_settings

    run_fit_gate(
        load_settings(config, {"model.name": model, "paths.artifacts": artifacts}),
        data=data,
        data_folder=data_folder,
        adapter=adapter,
        target_class=target_class,
        policy_id=policy_id,
        out=out,
        work=work,
        join=join or (),
        gate=gate,
        edit=edit,
        say=typer.echo,
    )
