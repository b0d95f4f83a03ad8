"""The configuration page says what the settings are."""

from pathlib import Path

import yaml

from interpretops.settings import load_settings
from interpretops.settings.reference import settings_reference


def test_page_in_docs_is_current(repository: Path) -> None:
    """docs/configuration.md is what `make docs` writes."""
    assert (repository / "docs" / "configuration.md").read_text(encoding="utf-8") == settings_reference()


def test_example_on_the_page_loads(tmp_path: Path) -> None:
    """The YAML that the page shows is a configuration as it stands."""
    example = settings_reference().split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "config.yaml"
    path.write_text(example)
    assert load_settings(path, environ={}).gateway.port == yaml.safe_load(example)["gateway"]["port"]
