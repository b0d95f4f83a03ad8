"""The field reference matches the routes."""

from pathlib import Path

import pytest

from proxy.openai_api.fields_reference import fields_reference
from proxy.openai_api.routes import ROUTES


def test_page_in_docs_is_current(repository: Path) -> None:
    """docs/fields.md equals the output of `make docs`."""
    assert (repository / "docs" / "fields.md").read_text(encoding="utf-8") == fields_reference()


@pytest.mark.parametrize("path", ROUTES)
def test_page_names_every_field_with_its_reason(path: str) -> None:
    """No field of a route is missing."""
    section = fields_reference().split(f"\n## {path}\n")[1].split("\n## ")[0]
    for name, field in ROUTES[path].fields.items():
        assert f"| `{name}` | {field.reason} |" in section
