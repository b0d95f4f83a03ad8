"""Imports go down only, and the gateway and the library start without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("interpretops", "mechctl", "proxy", "discovery", "steering_kernels")

LAYERS = {
    "mechctl": 3,
    "proxy": 2,
    "discovery": 2,
    "steering_kernels.vllm_plugin": 2,
    "interpretops": 1,
    "steering_kernels": 0,
}
"""Layer by longest prefix."""

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


def unit_of(module: str) -> str:
    """The entry of `LAYERS` that a module belongs to."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len)


def imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """(imported name, line) of every import in a file, those inside functions included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                start = ".".join([*above, start] if start else above)
            # `from package import name` may import a module.
            yield from ((f"{start}.{alias.name}", node.lineno) for alias in node.names)


def violation(importer: str, imported: str) -> str | None:
    """Why one module may not import another, or None. Names that are not ours are free here."""
    if imported.split(".")[0] not in PACKAGES:
        return None
    here, there = unit_of(importer), unit_of(imported)
    if here == there or LAYERS[there] < LAYERS[here]:
        return None
    return f"{importer} (layer {LAYERS[here]}) imports {imported} (layer {LAYERS[there]})"


def test_imports_go_down_only() -> None:
    """No module imports one of a higher layer or of a neighbour in its own, not even inside a function."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {why}"
        for module, path in module_files().items()
        for imported, line in imports(module, path)
        if (why := violation(module, imported))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("interpretops.plan", "proxy.serve"),
        ("interpretops.plan", "mechctl.policy.app"),
        ("proxy.serve", "discovery.data.trace"),
        ("proxy.serve", "steering_kernels.vllm_plugin.core.engine_core"),
        ("steering_kernels.ops.reference", "interpretops.plan"),
        ("steering_kernels.ops", "steering_kernels.vllm_plugin"),
    ],
)
def test_upward_and_sideways_imports_are_found(importer: str, imported: str) -> None:
    """The check itself tells each forbidden direction."""
    assert violation(importer, imported)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("mechctl.main", "proxy.serve"),
        ("mechctl.main", "mechctl.policy"),
        ("discovery.data.trace", "interpretops.plan"),
        ("steering_kernels.vllm_plugin.core.engine_core", "steering_kernels.ops.edit"),
        ("interpretops.steering.hooked_model", "steering_kernels.ops.edit"),
        ("proxy.serve", "aiohttp.web"),
    ],
)
def test_downward_imports_are_free(importer: str, imported: str) -> None:
    """The check lets through what the layers allow."""
    assert violation(importer, imported) is None


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
