"""The reference page of every field that reaches the engine, written from the routes: `make docs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from proxy.openai_api.routes import DROPPED, ROUTES, Route

_INTRO = """# Fields of the served routes

<!-- Written by `make docs` from proxy/openai_api/routes.py: edit there. -->

No answer may hold anything that the demanded policy would have changed, had it been generated rather than
sent. Below is every field that reaches the engine, with the reason why it cannot carry such a thing. A field
that is not here is refused (`field_not_allowed`). Some fields of OpenAI's are accepted and not passed on:
{dropped}.

*Text*: its strings become text of the prompt. Where one would spell a special token of the tokenizer, or
could complete one together with its neighbours, the gateway puts an invisible character (U+2060) into it; all
other text passes as it is, byte for byte.

*Reads the prompt*: refused, in any value that is not off, under a policy that acts otherwise at positions of
the prompt than at generated ones. That is every policy with a gate of scope `prompt` or `prompt_end`, or with
a gate of one phase. Requests under `none` and under all other policies keep it.
"""


def fields_reference() -> str:
    """The page, in Markdown."""
    dropped = ", ".join(f"`{name}`" for name in sorted(DROPPED))
    parts = [_INTRO.format(dropped=dropped)]
    parts += ["\n".join(_section(route)) for route in ROUTES.values()]
    return "\n".join(parts)


def _section(route: Route) -> Iterator[str]:
    yield f"## {route.path}\n"
    yield "| field | why it carries nothing unsteered | kind |"
    yield "|---|---|---|"
    for name, field in sorted(route.fields.items()):
        kind = "text" if field.text else "reads the prompt" if field.reads_prompt else ""
        yield f"| `{name}` | {field.reason} | {kind} |"
    for name, value in sorted(route.fixed.items()):
        yield f"| `{name}` | set by the gateway to `{str(value).lower()}`, whatever the caller says | |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(fields_reference())
