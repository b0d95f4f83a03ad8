"""The page of fields says what the routes let through, and why."""

import pytest

from proxy.openai_api.fields_reference import fields_reference
from proxy.openai_api.routes import ROUTES


def test_page_in_docs_is_the_current_one(repository):
    """docs/fields.md is what `make docs` writes."""
    assert (repository / "docs" / "fields.md").read_text(encoding="utf-8") == fields_reference()


@pytest.mark.parametrize("path", ROUTES)
def test_page_names_every_field_with_its_reason(path):
    """No field of a route is left out."""
    section = fields_reference().split(f"\n## {path}\n")[1].split("\n## ")[0]
    for name, field in ROUTES[path].fields.items():
        assert f"| `{name}` | {field.reason} |" in section
