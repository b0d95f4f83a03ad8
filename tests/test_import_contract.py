"""The gateway and the library start without torch, and importing has no side effect."""

import configparser
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("interpretops", "mechctl", "proxy", "discovery", "steering_kernels")

HEAVY = frozenset({"torch", "vllm", "transformers", "sae_lens", "transformer_lens", "peft", "accelerate"})
"""Not to be imported by the gateway, nor by a library module unless it is named below."""

TORCH_MODULES = frozenset({"interpretops.steering"})
"""The room of the library that works on a torch model; everything else imports without torch."""


def module_files() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_every_shipped_package_is_under_contract() -> None:
    """`.importlinter`, which `make check` runs, covers each package of the wheel; this file does the same."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    covered = contracts["importlinter"]["root_packages"].split()
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert sorted(covered) == sorted(shipped["packages"]) == sorted(PACKAGES)


IMPORT_ALL = """
import importlib, sys
heavy, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
    loaded = sorted(set(heavy.split(",")) & set(sys.modules))
    if loaded:
        sys.exit(f"importing {module} loads {', '.join(loaded)}: import it inside the function that needs it")
"""


def light_modules() -> list[str]:
    """The modules that must import without any of `HEAVY`."""
    return [
        module
        for module in module_files()
        if module.split(".")[0] in ("interpretops", "mechctl", "proxy")
        and not any(f"{module}.".startswith(f"{name}.") for name in TORCH_MODULES)
    ]


def test_gateway_and_library_import_without_torch() -> None:
    """All of proxy and interpretops, but for the modules that work on a torch model, load none of `HEAVY`."""
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(sorted(HEAVY)), *light_modules()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_importing_has_no_side_effect_on_disk_or_screen(tmp_path: Path) -> None:
    """Importing writes nothing, prints nothing and needs no checkout as working directory."""
    command = [sys.executable, "-c", IMPORT_ALL, "-", *light_modules()]
    environment = {
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        # This checkout, wherever another one is installed.
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_public_names_of_the_library() -> None:
    """`interpretops` offers exactly these names; more is a decision."""
    import interpretops

    assert sorted(interpretops.__all__) == ["HookedModel", "SteeringSession", "__version__"]
