"""The documents hold: their links lead somewhere and their examples are accepted as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documents import DOCUMENTS, GENERATED, ROOT, blocks, name_of

from interpretops.artifacts.dictionary import read_manifest
from interpretops.artifacts.norm_bounds import read_norm_bounds
from interpretops.policy import load_policy
from interpretops.settings import load_settings


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """Every relative link names a file or folder of the repository."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    missing = [
        target for target in targets if "://" not in target and not (document.parent / target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
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
            r"(?:^|`)make ([a-z][a-z-]*)", document.read_text(encoding="utf-8"), re.MULTILINE
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


def plain(text: str) -> str:
    """Text as it is compared: in lower case, with single spaces, without the marks of code."""
    return " ".join(text.replace("`", "").split()).lower()


def test_phrases_that_were_replaced_do_not_come_back() -> None:
    """No page but docs/style.md holds a phrase of the left column of its table (generated pages apart)."""
    style = ROOT / "docs" / "style.md"
    table = style.read_text(encoding="utf-8").partition("| not | but |\n|---|---|\n")[2].partition("\n\n")[0]
    phrases = [plain(row.split("|")[1]) for row in table.splitlines()]
    assert len(phrases) >= 20
    written = [
        page
        for page in DOCUMENTS
        if page not in (style, ROOT / "CHANGELOG.md") and name_of(page) not in GENERATED
    ]
    found = [
        (name_of(page), phrase)
        for page in written
        for phrase in phrases
        if phrase in plain(page.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_architecture_names_every_room() -> None:
    """Each room of the packages has its sentence in docs/architecture.md, under its package's heading."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in ("proxy", "interpretops", "discovery", "steering_kernels"):
        part = text.partition(f"### `{package}/`")[2].partition("\n##")[0]
        named = set(re.findall(r"^\| `([\w/]+)` \|", part, re.MULTILINE))
        inner = (ROOT / package).glob("*/__init__.py" if package != "steering_kernels" else "**/__init__.py")
        rooms = {str(path.parent.relative_to(ROOT / package)) for path in inner} - {".", "vllm_plugin"}
        assert rooms <= named, (package, rooms - named)
        assert all((ROOT / package / name).is_dir() for name in named)


def test_readme_is_at_most_a_few_screens() -> None:
    """The README has at most 150 lines: details have pages of their own."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_index_lists_every_page() -> None:
    """docs/README.md links every page of docs (decisions by their folder)."""
    index = ROOT / "docs" / "README.md"
    linked = set(re.findall(r"\]\(([\w./-]+)\)", index.read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {index.name} <= linked
