"""What the SDK refuses reaches a script as one line for each fault, and not as pages of libraries."""

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_families import save_family

from interpretops import HookedModel, SteeringSession
from interpretops.errors import InterpretOpsError
from interpretops.policy import load_policy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return HookedModel(save_family("LlamaForCausalLM", tmp_path_factory.mktemp("model")), dtype="float32")


def broken(folder: Path) -> Path:
    """A folder that names an architecture we know and holds no weights."""
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


CASES: dict[str, tuple[Callable[[HookedModel, Path], object], str]] = {
    "no such model": (lambda m, f: HookedModel("gone"), "model.name = 'gone'"),
    "not in the cache": (lambda m, f: HookedModel("nobody/nothing"), "model.name = 'nobody/nothing'"),
    "no model in it": (lambda m, f: HookedModel(broken(f)), "config.json"),
    "no such device": (lambda m, f: HookedModel(device="tpu"), "device = 'tpu'"),
    "no such dtype": (lambda m, f: HookedModel(dtype="int4"), "dtype = 'int4'"),
    "no such policy": (lambda m, f: SteeringSession(m, f / "gone.yaml"), "gone.yaml: cannot be read"),
    "no such plan": (lambda m, f: SteeringSession(m, f / "gone.safetensors"), "gone.safetensors: cannot"),
    "no plan": (
        lambda m, f: SteeringSession(m, written(f / "p.safetensors", "abc")),
        "p.safetensors: plan file has 3 bytes",
    ),
    "no policy": (lambda m, f: SteeringSession(m, 3), "policy = 3, but must be"),  # type: ignore[arg-type]
    "a wrong policy": (
        lambda m, f: load_policy(written(f / "p.yaml", "meta: {id: p}\ninterventions: []\nx: 1\n")),
        "p.yaml: ",
    ),
    "a policy of another model": (
        lambda m, f: SteeringSession(
            m,
            written(
                f / "p.yaml",
                "meta: {id: p}\n"
                "interventions: [{type: head_scale, selector: {layer: 99, heads: [0]}, scale: 0.5}]\n",
            ),
        ),
        "layer = 99",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refusal_is_short_and_names_what_was_given(name: str, model: HookedModel, tmp_path: Path) -> None:
    """One line a fault, and above it the script's own line and one of ours: no chain of causes."""
    ask, expected = CASES[name]
    with pytest.raises(InterpretOpsError) as caught:
        ask(model, tmp_path)
    assert expected in str(caught.value)
    lines = str(caught.value).splitlines()
    assert all(line.strip() for line in lines)
    shown = "".join(traceback.format_exception(caught.value))
    assert "Traceback" not in shown.partition("Traceback")[2]
    frames = traceback.extract_tb(caught.value.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    assert len(own) == 1


@pytest.mark.parametrize("text", ["", 3, None])
def test_what_is_no_text_is_refused(model: HookedModel, text: object) -> None:
    """Neither an empty text nor another type goes any deeper."""
    with pytest.raises(InterpretOpsError, match="but must be text that is not empty"):
        model.generate(text)  # type: ignore[arg-type]
