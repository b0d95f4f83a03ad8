"""The documents hold: their links lead somewhere and their examples are accepted as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from interpretops.artifacts.dictionary import read_manifest
from interpretops.artifacts.norm_bounds import read_norm_bounds
from interpretops.policy import load_policy
from interpretops.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(document: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """Every relative link names a file or folder of the repository."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    missing = [
        target for target in targets if "://" not in target and not (document.parent / target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_examples_load(document: Path, tmp_path: Path) -> None:
    """A YAML example is a policy, a manifest or a configuration, and is accepted (cut digests apart)."""
    for number, text in enumerate(blocks(document, "yaml")):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "manifest.yaml"
        path.write_text(re.sub(r"\b[0-9a-f]+…", "0" * 64, text), encoding="utf-8")
        keys = yaml.safe_load(text)
        if "meta" in keys:
            load_policy(path)
        elif keys.get("kind") == "dictionary":
            read_manifest(folder.rename(tmp_path / keys["id"]))
        elif keys.get("kind") == "norm_bounds":
            read_norm_bounds(path)
        else:
            load_settings(path, environ={})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_examples_are_python(document: Path) -> None:
    """A Python example parses."""
    for text in blocks(document, "python"):
        compile(text, str(document), "exec")


def test_make_targets_named_in_documents_exist() -> None:
    """Each `make target` that a document tells people to type is a target."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        word
        for document in DOCUMENTS
        for word in re.findall(
            r"(?:^    |`)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert named <= targets


def test_capacity_tables_are_what_the_command_prints() -> None:
    """The figures in docs/scaling.md follow from the results in benchmarks/; `make docs` writes them anew."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.capacity"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- python -m benchmarks.capacity -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown.strip() == done.stdout.strip()
