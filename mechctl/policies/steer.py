"""`mechctl steer`: answers prompts twice, without and with a policy."""

from pathlib import Path
from typing import Annotated

import typer

from mechctl.options.shared_options import Artifacts, Config, Model


def steer(
    policy: Annotated[
        Path,
        typer.Option("--policy", help="Policy file, or a compiled plan (.safetensors).", show_default=False),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="<str>",
            help="User message; may be repeated.",
            show_default="examples beside the policy, else two of ours",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")
    ] = 64,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without the chat format.")
    ] = False,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Show the answers to prompts without and with a policy, side by side.

    Runs the model in this process, without engine or network, and decodes greedily. The last line for each
    prompt is the receipt: what the policy did.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers.utils import logging

    from interpretops.policy.examples import example_prompts
    from interpretops.settings import load_settings
    from interpretops.steering.hooked_model import HookedModel
    from interpretops.steering.session import SteeringSession

    logging.disable_progress_bar()  # we show our own
    settings = load_settings(config, {"model.name": model, "paths.artifacts": artifacts})
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    chat = False if raw else None
    prompts = tuple(prompt) if prompt else example_prompts(policy)
    with notes.status("Loading the model") as status:
        hooked = HookedModel(
            settings.model.name,
            dtype=settings.model.dtype,
            device=settings.model.device,
            cache_dir=settings.cache.dir,
            revision=settings.model.revision,
            progress=status.update,
        )
        session = SteeringSession(hooked, policy, artifacts=settings.paths.artifacts)
        for number, text in enumerate(prompts, start=1):
            of = f" (prompt {number} of {len(prompts)})" if len(prompts) > 1 else ""
            status.update(f"Answering without the policy{of}")
            before = hooked.generate(text, max_new_tokens, chat=chat)
            status.update(f"Answering with the policy{of}")
            with session as steered:
                after = steered.generate(text, max_new_tokens, chat=chat)
            receipt = session.receipt
            if len(prompts) > 1 or not prompt:
                console.print(Text(f"prompt: {text}", style="bold"), soft_wrap=True)
            table = Table(
                "without", f"with {receipt.policy_id}@{receipt.revision[:12]}", expand=True, show_lines=True
            )
            for column in table.columns:
                column.ratio = 1
            table.add_row(Text(before), Text(after))
            console.print(table)
            console.print(
                f"receipt: {receipt.tokens_evaluated} tokens evaluated, {receipt.edits_applied} edits "
                f"applied, gates open {receipt.gates_fired} times"
                + ("; the answers are the same" if before == after else ""),
                soft_wrap=True,
            )
