"""Adapters that PEFT itself wrote: a `lora_gate` policy does what PEFT does, and its heads can be chosen."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import PROMPT, save_family

from interpretops import HookedModel, SteeringSession
from interpretops.artifacts.adapter import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from interpretops.artifacts.dictionary.manifest import (
    AdapterManifest,
    ModelReference,
    TrainingRecord,
    WeightsReference,
    sha256_of,
    write_manifest,
)
from interpretops.artifacts.peft_config import (
    DESCRIPTIVE_FIELDS,
    READ_FIELDS,
    REFUSED_FIELDS,
    check_lora_config,
)
from interpretops.errors import AdapterError
from interpretops.model.spec import read_model_spec
from interpretops.plan import ModelSpec, Site
from interpretops.policy import load_policy

POLICY = """
meta: {{id: calm, target_class: calm}}
interventions:
  - type: lora_gate
    selector: {{block: attn{heads}}}
    alpha: {alpha}
"""


def write_peft_adapter(
    network: torch.nn.Module, module: str, folder: Path, artifacts: Path, **options: Any
) -> torch.nn.Module:
    """A PEFT adapter with random A and B on one module, saved by PEFT; returns PEFT's own model."""
    import peft

    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": [module], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**given | options)
    prepare(network, config)
    wrapped = peft.get_peft_model(network, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    spec = read_model_spec(folder)
    target = artifacts / spec.name / "adapters" / "calm"
    wrapped.save_pretrained(target)
    write_manifest_beside(target, spec)
    return wrapped


def write_manifest_beside(target: Path, spec: ModelSpec) -> None:
    manifest = AdapterManifest(
        id="calm",
        target_class="calm",
        model=ModelReference(name=spec.name, fingerprint=spec.fingerprint),
        weights=WeightsReference(file=WEIGHTS_NAME, sha256=sha256_of(target / WEIGHTS_NAME)),
        license=None,
        training=TrainingRecord(),
    )
    write_manifest(target, manifest)
    assert (target / CONFIG_NAME).exists()


def prepare(network: torch.nn.Module, config: Any) -> None:
    """What two of PEFT's initialisations want to know of the data before."""
    ids = torch.tensor([PROMPT])
    if config.init_lora_weights == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(network, config, run_model=lambda: network(ids))
    if config.init_lora_weights == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        def train_step() -> None:
            network(ids, labels=ids).loss.backward()

        preprocess_loraga(network, config, train_step=train_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "module"),
    [("LlamaForCausalLM", "o_proj"), ("Gemma2ForCausalLM", "o_proj"), ("GPTNeoXForCausalLM", "dense")],
)
def test_lora_gate_gives_the_logits_of_peft(architecture: str, module: str, tmp_path: Path) -> None:
    """Alpha 1 is PEFT's own model; alpha 0 is the untouched one; no head named is all heads."""
    folder = save_family(architecture, tmp_path)
    model = HookedModel(model_name=str(folder), dtype="float32", device="cpu")
    untouched = model.logprobs(PROMPT)
    artifacts = tmp_path / "artifacts"

    def steered(alpha: float, heads: str = "") -> torch.Tensor:
        path = tmp_path / "calm.yaml"
        path.write_text(POLICY.format(alpha=alpha, heads=heads))
        with SteeringSession(model, load_policy(path), artifacts=artifacts) as session:
            return session.logprobs(PROMPT)

    import transformers

    fresh = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    wrapped = write_peft_adapter(fresh, module, folder, artifacts).eval()
    with torch.no_grad():
        expected = wrapped(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert set(open_adapter(artifacts / architecture / "adapters" / "calm").sites) == {
        Site(layer, "attn_proj") for layer in range(3)
    }
    assert not torch.allclose(expected, untouched, atol=1e-2)
    assert torch.allclose(steered(1.0), expected, atol=1e-4)
    assert torch.equal(steered(0.0), untouched)
    everyone = range(model.spec.num_heads)
    assert torch.allclose(steered(1.0, f", heads: [{', '.join(map(str, everyone))}]"), expected, atol=1e-4)
    assert not torch.allclose(steered(1.0, ", heads: [1]"), expected, atol=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return HookedModel(save_family("LlamaForCausalLM", tmp_path_factory.mktemp("model")), dtype="float32")


def fresh(model: HookedModel) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)


def steered(model: HookedModel, tmp_path: Path) -> torch.Tensor:
    """Log-probabilities under a policy that only applies the adapter."""
    path = tmp_path / "calm.yaml"
    path.write_text(POLICY.format(alpha=1.0, heads=""))
    with SteeringSession(model, load_policy(path), artifacts=tmp_path / "artifacts") as session:
        return session.logprobs(PROMPT)


def own(wrapped: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = wrapped.eval()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return found


def lora_ga() -> dict[str, Any]:
    from peft.tuners.lora.config import LoraGAConfig

    return {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"init_lora_weights": True}, True),
        ({"init_lora_weights": False}, True),
        ({"init_lora_weights": "gaussian"}, True),
        ({"init_lora_weights": "orthogonal"}, True),
        ({"init_lora_weights": "mica"}, True),
        ({"init_lora_weights": "eva"}, True),
        ({"init_lora_weights": "pissa"}, False),
        ({"init_lora_weights": "pissa_niter_4"}, False),
        ({"init_lora_weights": "olora"}, False),
        ({"init_lora_weights": "OLoRA"}, False),
        ({"init_lora_weights": "corda"}, False),
        (lora_ga, False),
    ],
    ids=lambda value: str(value.get("init_lora_weights")) if isinstance(value, dict) else "",
)
def test_initialisation_that_changes_the_base_weights_is_refused(
    model: HookedModel, tmp_path: Path, options: Any, accepted: bool
) -> None:
    """Each that PEFT has: those that leave the base as it is give PEFT's numbers, the others are refused."""
    network = fresh(model)
    before = network.model.layers[1].self_attn.o_proj.weight.detach().clone()
    options = options if isinstance(options, dict) else options()
    wrapped = write_peft_adapter(network, "o_proj", model.folder, tmp_path / "artifacts", **options)
    inner: Any = wrapped.base_model
    base = inner.model.model.layers[1].self_attn.o_proj.base_layer.weight
    assert torch.equal(base, before) == accepted
    if accepted:
        assert torch.allclose(steered(model, tmp_path), own(wrapped), atol=1e-4)
        assert not torch.allclose(own(wrapped), model.logprobs(PROMPT), atol=1e-2)
        return
    with pytest.raises(AdapterError, match=rf"init_lora_weights = '{options['init_lora_weights']}'.*convert"):
        open_adapter(tmp_path / "artifacts" / "LlamaForCausalLM" / "adapters" / "calm")


@pytest.mark.parametrize("value", ["loftq", "pissa_niter_16", "LORA_GA", "novel", 1, ["eva"]])
def test_initialisation_that_is_not_known_to_keep_the_base_is_refused(value: Any) -> None:
    """Also those that need what is not installed here, and those of a later PEFT."""
    with pytest.raises(
        AdapterError, match=r"adapter_config.json: init_lora_weights = .*changes the base weights"
    ):
        check_lora_config(Path("adapter_config.json"), {"peft_type": "LORA", "init_lora_weights": value})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapter_that_peft_has_converted_gives_pefts_numbers(
    model: HookedModel, tmp_path: Path, kind: str
) -> None:
    """The remedy that the refusal names: a plain LoRA over the original base weights."""
    import peft

    options = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(fresh(model), peft.LoraConfig(init_lora_weights=kind, **options))
    wrapped.save_pretrained(tmp_path / "initial")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path / "artifacts" / "LlamaForCausalLM" / "adapters" / "calm"
    wrapped.save_pretrained(folder, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    write_manifest_beside(folder, model.spec)
    assert torch.allclose(steered(model, tmp_path), own(wrapped), atol=1e-3)


EXAMPLES: dict[str, Any] = {
    "r": 5,
    "lora_alpha": 11,
    "use_rslora": True,
    "lora_dropout": 0.5,
    "layers_to_transform": [1],
    "exclude_modules": ["q_proj"],
    "inference_mode": True,
    "revision": "main",
    "qalora_group_size": 8,
    "megatron_core": "other",
    "ensure_weight_tying": True,
}
"""Values of fields that an accepted adapter may have; PEFT's numbers must come out."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", EXAMPLES)
def test_field_that_is_accepted_gives_pefts_numbers(model: HookedModel, tmp_path: Path, field: str) -> None:
    """Whatever stands in it, the session computes what PEFT computes."""
    options = {field: EXAMPLES[field]}
    wrapped = write_peft_adapter(fresh(model), "o_proj", model.folder, tmp_path / "artifacts", **options)
    expected = own(wrapped)
    assert torch.allclose(steered(model, tmp_path), expected, atol=1e-4)
    assert not torch.allclose(expected, model.logprobs(PROMPT), atol=1e-2)


REFUSED: dict[str, Any] = {
    "use_dora": True,
    "fan_in_fan_out": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2], [1, 3]],
    "kasa_config": {"beta": 1.0},
    "rank_pattern": {"o_proj": 8},
    "alpha_pattern": {"o_proj": 8},
    "lora_bias": True,
    "target_parameters": ["o_proj.weight"],
    "alora_invocation_tokens": [5, 6],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"num_groups": 2},
    "megatron_config": {"hidden_size": 64},
}


def test_every_field_of_pefts_configuration_is_decided() -> None:
    """A field that a later PEFT brings is in none of the lists, and this fails until somebody has looked."""
    peft = pytest.importorskip("peft")
    there = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    lists = [READ_FIELDS, DESCRIPTIVE_FIELDS - {"interpretops"}, REFUSED_FIELDS.keys()]
    assert there == set().union(*lists)
    assert sum(map(len, lists)) == len(there)
    assert REFUSED.keys() == REFUSED_FIELDS.keys()


@pytest.mark.parametrize("field", REFUSED)
def test_field_that_changes_the_numbers_is_refused_by_name(field: str) -> None:
    """File, field, value and reason; unset, as PEFT writes it, the field is no obstacle."""
    path, plain = Path("adapter_config.json"), {"peft_type": "LORA"}
    with pytest.raises(
        AdapterError, match=rf"adapter_config.json: {field} = .*, which is not supported: \w+"
    ):
        check_lora_config(path, plain | {field: REFUSED[field]})
    unset: Any
    for unset in (None, False, [], {}, "none" if field == "bias" else None):
        check_lora_config(path, plain | {field: unset})


def test_field_that_nobody_knows_is_refused_when_it_is_set() -> None:
    """A later PEFT's field may change what the adapter computes."""
    path = Path("adapter_config.json")
    check_lora_config(path, {"peft_type": "LORA", "use_novel": False})
    with pytest.raises(AdapterError, match="use_novel = True, an unknown field that"):
        check_lora_config(path, {"peft_type": "LORA", "use_novel": True})


def test_rank_of_the_tensors_must_be_the_configurations(model: HookedModel, tmp_path: Path) -> None:
    """The scale is alpha / r: with another r every edit would be off by their ratio."""
    write_peft_adapter(fresh(model), "o_proj", model.folder, tmp_path / "artifacts")
    folder = tmp_path / "artifacts" / "LlamaForCausalLM" / "adapters" / "calm"
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(
        AdapterError, match=r"site 0.attn_proj has rank 4, but adapter_config.json says r = 8"
    ):
        open_adapter(folder)
