"""Dictionaries: every layout read as its own library reads it, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interpretops.artifacts.dictionary import Dictionary, DictionaryManifest, open_dictionary
from interpretops.errors import DictionaryError

WIDTH, FEATURES, TOKENS = 24, 40, 50
Arrays = dict[str, np.ndarray]
Manifest = Callable[..., DictionaryManifest]


def activations() -> np.ndarray:
    return np.random.default_rng(11).normal(size=(TOKENS, WIDTH)).astype(np.float32)


def encode(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    """[T, F] by the formula of the plan, in float32."""
    rows = dictionary.encoder_rows()
    u = x @ rows.read.T + rows.bias
    a = np.where(u > rows.threshold, u, 0)
    if dictionary.k is not None:
        kth = np.sort(u, axis=1)[:, -dictionary.k, None]
        a = np.where(u >= kth, np.maximum(u, 0), 0)
    return a


def decode(dictionary: Dictionary, a: np.ndarray) -> np.ndarray:
    return a @ dictionary.decoder_rows() + dictionary.decoder_bias


def assert_reads_as(dictionary: Dictionary, acts: np.ndarray, recons: np.ndarray) -> None:
    """Our features and reconstruction of `activations()` are those given; rows can be taken singly."""
    ours = encode(dictionary, activations())
    assert (ours > 0).any(axis=0).mean() > 0.5, "the test's features must fire"
    np.testing.assert_allclose(ours, acts, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(decode(dictionary, ours), recons, rtol=1e-3, atol=2e-3)
    some, every = dictionary.encoder_rows([5, 0]), dictionary.encoder_rows()
    for few, all_rows in zip(some, every, strict=True):
        np.testing.assert_allclose(few, all_rows[[5, 0]], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(dictionary.decoder_rows([5, 0]), dictionary.decoder_rows()[[5, 0]])


@pytest.mark.slow
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "topk_rescaled", "jumprelu", "gated"])
def test_saelens_folder_reads_as_sae_lens_reads_it(
    tmp_path: Path, manifest_for: Manifest, architecture: str, dtype: str, subtract: bool
) -> None:
    """Folders saved by sae_lens give the features and reconstruction of its own forward pass."""
    torch = pytest.importorskip("torch")
    from sae_lens.registry import get_sae_class

    options: dict[str, Any] = {"k": 7} if "topk" in architecture else {}
    if architecture == "topk_rescaled":
        options["rescale_acts_by_decoder_norm"] = True
    sae_class, config_class = get_sae_class(architecture.split("_")[0])
    sae = sae_class(config_class(d_in=WIDTH, d_sae=FEATURES, apply_b_dec_to_input=subtract, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            if name == "threshold":
                parameter.abs_()
    if dtype != "float32":
        sae = sae.to(dtype=getattr(torch, dtype)).to(dtype=torch.float32)  # numbers that the dtype can hold
    expected_acts = sae.encode(torch.from_numpy(activations())).detach().numpy()
    expected = sae.decode(torch.from_numpy(expected_acts)).detach().numpy()
    sae.to(dtype=getattr(torch, dtype)).save_model(tmp_path)
    activation = {"standard": "relu", "topk": "topk"}.get(architecture.split("_")[0], "jumprelu")
    manifest_for(tmp_path, "sae_weights.safetensors", id="a", activation=activation)
    assert_reads_as(open_dictionary(tmp_path), expected_acts, expected)


@pytest.mark.slow
def test_batchtopk_trained_by_sae_lens_reads_as_jumprelu(tmp_path: Path, manifest_for: Manifest) -> None:
    """What SAELens' BatchTopK trainer saves for inference is a jumprelu dictionary to us."""
    torch = pytest.importorskip("torch")
    from sae_lens import SAE
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    training = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=FEATURES, k=5))
    with torch.no_grad():
        for parameter in training.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(len(parameter)))
    training.topk_threshold.fill_(0.5)
    training.save_inference_model(tmp_path)
    manifest_for(tmp_path, "sae_weights.safetensors", id="a")
    sae = SAE.load_from_disk(tmp_path)
    acts = sae.encode(torch.from_numpy(activations()))
    assert_reads_as(open_dictionary(tmp_path), acts.detach().numpy(), sae.decode(acts).detach().numpy())


def test_activation_scale_beside_the_weights_is_folded(make_dictionary: Callable[..., Path]) -> None:
    """With activation_scaler.json, x is scaled before encoding and the reconstruction scaled back."""
    plain = open_dictionary(make_dictionary("plain"))
    folder = make_dictionary("scaled", config={"normalize_activations": "expected_average_only_in"})
    with pytest.raises(DictionaryError, match=r"there is no activation_scaler.json"):
        open_dictionary(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    scaled = open_dictionary(folder)
    x = activations()
    np.testing.assert_allclose(encode(scaled, x * 4), encode(plain, x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        decode(scaled, encode(scaled, x * 4)), decode(plain, encode(plain, x)) * 4, rtol=1e-4, atol=1e-3
    )


def test_manifest_may_name_the_scale(make_dictionary: Callable[..., Path]) -> None:
    """`normalisation: scale` in the manifest does the same."""
    plain = open_dictionary(make_dictionary("plain"))
    scaled = open_dictionary(make_dictionary("scaled", normalisation="scale", scaling_factor=0.25))
    x = activations()
    np.testing.assert_allclose(encode(scaled, x * 4), encode(plain, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["npz", "safetensors"])
def test_gemma_scope_folder_reads_as_sae_lens_reads_it(
    tmp_path: Path, manifest_for: Manifest, saelens_weights: Arrays, release: str
) -> None:
    """Both releases are jumprelu, and do not take the decoder's bias off the input."""
    torch = pytest.importorskip("torch")
    from sae_lens.registry import get_sae_class

    if release == "npz":
        np.savez(tmp_path / "params.npz", **saelens_weights)  # type: ignore[arg-type]
    else:
        save_file({name.lower(): a for name, a in saelens_weights.items()}, tmp_path / "params.safetensors")
    manifest_for(tmp_path, f"params.{release}", id="g", layout="gemma_scope")
    sae_class, config_class = get_sae_class("jumprelu")
    sae = sae_class(config_class(d_in=WIDTH, d_sae=FEATURES, apply_b_dec_to_input=False))
    sae.load_state_dict({name: torch.from_numpy(array) for name, array in saelens_weights.items()})
    acts = sae.encode(torch.from_numpy(activations()))
    assert_reads_as(open_dictionary(tmp_path), acts.detach().numpy(), sae.decode(acts).detach().numpy())


def test_gemma_scope_archive_with_pickled_objects_is_refused(tmp_path: Path, manifest_for: Manifest) -> None:
    """An npz member that would need unpickling is never loaded."""
    np.savez(tmp_path / "params.npz", W_enc=np.array([object()], dtype=object))
    manifest_for(tmp_path, "params.npz", id="g", layout="gemma_scope")
    with pytest.raises(DictionaryError, match="archive of plain arrays"):
        open_dictionary(tmp_path)


def test_sparsify_folder_reads_as_its_formula(
    tmp_path: Path, manifest_for: Manifest, saelens_weights: Arrays
) -> None:
    """topk(relu(W (x - b_dec) + b)), decoded by rows of W_dec."""
    w = saelens_weights
    tensors = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, tmp_path / "sae.safetensors")
    config = {"d_in": WIDTH, "num_latents": FEATURES, "k": 6, "activation": "topk", "transcode": False}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    manifest_for(tmp_path, "sae.safetensors", id="s", layout="sparsify", activation="topk")
    acts = top(np.maximum((activations() - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0), 6)
    dictionary = open_dictionary(tmp_path)
    assert dictionary.k == 6
    assert_reads_as(dictionary, acts, acts @ w["W_dec"] + w["b_dec"])
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"activation": "groupmax"}))
    with pytest.raises(DictionaryError, match="activation = 'groupmax', but only 'topk' is supported"):
        open_dictionary(tmp_path)


def top(u: np.ndarray, k: int) -> np.ndarray:
    return np.where(u >= np.sort(u, axis=1)[:, -k, None], u, 0)


def dictionary_learning_case(kind: str, w: Arrays) -> tuple[Arrays, np.ndarray, np.ndarray, str]:
    """Tensors as the class saves them, its features of `activations()`, reconstruction, our activation."""
    x, norms = activations(), np.linalg.norm(w["W_dec"], axis=1)
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    centred = (x - w["b_dec"]) @ w["W_enc"]
    if kind == "AutoEncoder":
        a = np.maximum(centred + w["b_enc"], 0)
        # from_pretrained normalises this decoder alone, and multiplies the activations by its norms.
        return linear | {"bias": w["b_dec"]}, a * norms, a @ w["W_dec"] + w["b_dec"], "relu"
    if kind == "AutoEncoderNew":
        a = np.maximum(x @ w["W_enc"] + w["b_enc"], 0)
        return linear | {"decoder.bias": w["b_dec"]}, a, a @ w["W_dec"] + w["b_dec"], "relu"
    if kind == "GatedAutoEncoder":
        ratio, gate, magnitude = w["threshold"] - 0.5, w["b_enc"], w["b_enc"][::-1].copy()
        a = (centred + gate > 0) * np.maximum(np.exp(ratio) * centred + magnitude, 0)
        tensors = {name: linear[name] for name in ("encoder.weight", "decoder.weight")}
        tensors |= {"r_mag": ratio, "gate_bias": gate, "mag_bias": magnitude, "decoder_bias": w["b_dec"]}
        return tensors, a, a @ w["W_dec"] + w["b_dec"], "jumprelu"
    if kind == "JumpReluAutoEncoder":
        u = x @ w["W_enc"] + w["b_enc"]
        a = np.maximum(u * (u > w["threshold"]), 0)
        return w, a, a @ w["W_dec"] + w["b_dec"], "jumprelu"
    if kind == "AutoEncoderTopK":
        a = top(np.maximum(centred + w["b_enc"], 0), 6)
        tensors = linear | {"b_dec": w["b_dec"], "k": np.array(6), "threshold": np.array([-1], np.float32)}
        return tensors, a, a @ w["W_dec"] + w["b_dec"], "topk"
    u = np.maximum(centred + w["b_enc"], 0)
    a = u * (u > 1.5)
    tensors = {"b_dec": w["b_dec"], "k": np.array(6), "threshold": np.array(1.5, np.float32)}
    own = linear if kind == "BatchTopKSAE" else {name: w[name] for name in ("W_enc", "W_dec", "b_enc")}
    return own | tensors, a, a @ w["W_dec"] + w["b_dec"], "jumprelu"


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    ],
)
def test_dictionary_learning_folder_reads_as_its_formula(
    tmp_path: Path, manifest_for: Manifest, saelens_weights: Arrays, kind: str
) -> None:
    """Each class gives its own features, in the units of dictionary_learning 0.1.0, and reconstruction."""
    tensors, acts, recons, activation = dictionary_learning_case(kind, saelens_weights)
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind}}))
    manifest_for(tmp_path, "ae.safetensors", id="d", layout="dictionary_learning", activation=activation)
    assert_reads_as(open_dictionary(tmp_path), acts, recons)


def test_decoder_row_of_zeros_is_refused_where_rows_are_normalised(
    tmp_path: Path, manifest_for: Manifest, saelens_weights: Arrays
) -> None:
    """An AutoEncoder divides by the decoder's norms as it is loaded."""
    saelens_weights["W_dec"][3] = 0
    tensors, *_ = dictionary_learning_case("AutoEncoder", saelens_weights)
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    manifest_for(tmp_path, "ae.safetensors", id="d", layout="dictionary_learning", activation="relu")
    with pytest.raises(DictionaryError, match=r"decoder.weight of feature 3 is all zeros"):
        open_dictionary(tmp_path)


def hook(name: str) -> dict[str, Any]:
    return {"metadata": {"hook_name": name}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"d_in": 25}, r"d_in = 25, but manifest.yaml has hidden_size = 24"),
        ({"d_in": "24"}, r"d_in = '24', but manifest.yaml has hidden_size = 24"),
        ({"d_sae": 41}, r"d_sae = 41, but manifest.yaml has width = 40"),
        (hook("blocks.4.hook_resid_post"), r"metadata.hook_name = '.*' \(4\), but .* has layer = 3"),
        (hook("blocks.3.hook_resid_pre"), r"hook_name = '.*' \(2\), but .* has layer = 3"),
        (hook("blocks.3.hook_mlp_out"), r"hook_name = '.*' \(mlp_out\), but .* has point = 'resid_post'"),
        (hook("blocks.3.hook_resid_mid"), r"hook_name = '.*' \(hook_resid_mid\), but .* has point"),
        (hook("model.layers.5"), r"hook_name = '.*' \(5\), but .* has layer = 3"),
        ({"hook_name": "blocks.4.hook_resid_post"}, r": hook_name = .* has layer = 3"),
        ({"hook_point": "blocks.4.hook_resid_post"}, r": hook_point = .* has layer = 3"),
        ({"hook_point_layer": 2}, r"hook_point_layer = 2, but .* has layer = 3"),
        ({"metadata": {"hook_head_index": 1}}, r"hook_head_index = 1 \(head 1 alone\), but .* has point"),
        ({"reshape_activations": "hook_z"}, r"reshape_activations = 'hook_z' \(attn_z\), but .* has point"),
        ({"metadata": {"hook_name": "a", "hook_name_out": "b"}}, "hook_name_out differs .* transcoder"),
        ({"architecture": "standard"}, "activation = 'jumprelu', but the weights are of 'relu'"),
    ],
)
def test_configuration_that_contradicts_the_manifest_is_refused(
    make_dictionary: Callable[..., Path], config: dict[str, Any], words: str
) -> None:
    """Size, place, activation: two files that speak of different dictionaries are not read as one."""
    with pytest.raises(DictionaryError, match=words):
        open_dictionary(make_dictionary(config=config))


@pytest.mark.parametrize(
    "config",
    [
        hook("blocks.3.hook_resid_post"),
        hook("blocks.4.hook_resid_pre"),
        hook("model.layers.3"),
        hook("transformer.h.9.somewhere"),
        {"hook_layer": 3, "dtype": "bfloat16", "model_name": "another-name"},
        {"metadata": None, "hook_head_index": None},
    ],
)
def test_configuration_that_agrees_or_says_nothing_is_read(
    make_dictionary: Callable[..., Path], config: dict[str, Any]
) -> None:
    """The stream before a layer is the one after the last; names that are not known contradict nothing."""
    assert open_dictionary(make_dictionary(config=config)).site.layer == 3


def test_scale_is_not_applied_twice(make_dictionary: Callable[..., Path]) -> None:
    """A factor in activation_scaler.json and one in the manifest: one of them is in the other already."""
    config = {"normalize_activations": "expected_average_only_in"}
    folder = make_dictionary(config=config, normalisation="scale", scaling_factor=0.25)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    with pytest.raises(DictionaryError, match=r"normalize_activations = .* has normalisation = 'scale'"):
        open_dictionary(folder)


@pytest.mark.parametrize(
    ("layout", "file", "config", "words"),
    [
        ("sparsify", "cfg.json", {"d_in": 25}, "d_in = 25, but .* hidden_size = 24"),
        ("sparsify", "cfg.json", {"num_latents": 41}, "num_latents = 41, but .* width = 40"),
        ("sparsify", "cfg.json", {"d_in": 24, "expansion_factor": 2}, r"expansion_factor = 2 \(48\), but"),
        (
            "dictionary_learning",
            "config.json",
            {"dict_size": 41},
            "trainer.dict_size = 41, but .* width = 40",
        ),
        ("dictionary_learning", "config.json", {"layer": 2}, "trainer.layer = 2, but .* layer = 3"),
        (
            "dictionary_learning",
            "config.json",
            {"submodule_name": "mlp_out_layer_3"},
            r"trainer.submodule_name = '.*' \(mlp_out\), but .* point = 'resid_post'",
        ),
    ],
)
def test_other_libraries_configurations_are_held_against_the_manifest_too(
    tmp_path: Path, manifest_for: Manifest, layout: str, file: str, config: dict[str, Any], words: str
) -> None:
    """sparsify's and dictionary_learning's own files say the same things under other names."""
    (tmp_path / "weights.safetensors").write_bytes(b"not looked at before")
    (tmp_path / file).write_text(
        json.dumps({"trainer": config} if layout == "dictionary_learning" else config)
    )
    manifest_for(tmp_path, "weights.safetensors", id="d", layout=layout)
    with pytest.raises(DictionaryError, match=words):
        open_dictionary(tmp_path)


def test_pickled_dictionary_is_refused_with_its_conversion(tmp_path: Path, manifest_for: Manifest) -> None:
    """ae.pt is never opened; the message says how to make a safetensors file of it."""
    (tmp_path / "ae.pt").write_bytes(b"anything")
    manifest_for(tmp_path, "ae.pt", id="d", layout="dictionary_learning")
    with pytest.raises(DictionaryError, match=r"ae.pt is a pickle.*weights_only=True.*ae.safetensors"):
        open_dictionary(tmp_path)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_normalisation_that_cannot_be_folded_is_refused_by_name(
    make_dictionary: Callable[..., Path], normalisation: str
) -> None:
    """What depends on the token's own statistics cannot be part of a fixed row."""
    folder = make_dictionary(config={"normalize_activations": normalisation})
    with pytest.raises(DictionaryError, match=f"normalize_activations = '{normalisation}'"):
        open_dictionary(folder)


def test_changed_weights_are_refused(make_dictionary: Callable[..., Path]) -> None:
    """A file that is not the manifest's, by sha256, is not read."""
    folder = make_dictionary()
    path = folder / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DictionaryError, match=r"weights.sha256 = .*, but sae_weights.safetensors has"):
        open_dictionary(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"width": 41, "config": {"d_sae": None}},
            "width = 41, hidden_size = 24, but .* holds 40 features of an activation of 24",
        ),
        ({"activation": "topk"}, "activation = 'topk', but the weights are of 'jumprelu'"),
        ({"normalisation": "scale"}, "normalisation = 'scale' needs a scaling_factor"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(
    make_dictionary: Callable[..., Path], values: dict[str, Any], words: str
) -> None:
    """Width, activation and normalisation of the manifest are held against the weights."""
    with pytest.raises(DictionaryError, match=words):
        open_dictionary(make_dictionary(**values))


def test_weights_that_are_not_finite_are_refused(
    make_dictionary: Callable[..., Path], manifest_for: Manifest
) -> None:
    """A bias of NaN would reach every token."""
    folder = make_dictionary()
    weights = load_file(folder / "sae_weights.safetensors")
    weights["b_enc"][3] = np.nan
    save_file(weights, folder / "sae_weights.safetensors")
    manifest_for(folder, "sae_weights.safetensors")
    with pytest.raises(DictionaryError, match="bias must be 40 finite numbers"):
        open_dictionary(folder)


def test_missing_tensor_and_unknown_architecture_are_refused(make_dictionary: Callable[..., Path]) -> None:
    """The message says what is there and what could be."""
    with pytest.raises(DictionaryError, match="no tensor 'threshold'; it holds W_dec, W_enc, b_dec, b_enc"):
        open_dictionary(make_dictionary("a", drop=("threshold",)))
    with pytest.raises(DictionaryError, match="architecture = 'temporal', but must be one of standard"):
        open_dictionary(make_dictionary("b", config={"architecture": "temporal"}))


def test_manifest_with_an_unknown_key_is_refused(make_dictionary: Callable[..., Path]) -> None:
    """A manifest is as strict as a policy."""
    folder = make_dictionary()
    path = folder / "manifest.yaml"
    path.write_text(path.read_text() + "widht: 3\n")
    with pytest.raises(DictionaryError, match=r"manifest.yaml: widht is not a known key; did you mean"):
        open_dictionary(folder)


def test_bfloat16_rows_are_read_exactly(
    tmp_path: Path, manifest_for: Manifest, saelens_weights: Arrays
) -> None:
    """The numpy reader takes bfloat16 bits for what they are."""
    tensors = {name: a.astype(ml_dtypes.bfloat16) for name, a in saelens_weights.items()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": WIDTH, "d_sae": FEATURES}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    manifest_for(tmp_path, "sae_weights.safetensors", id="b")
    rows = open_dictionary(tmp_path).decoder_rows([7])
    np.testing.assert_array_equal(rows[0], tensors["W_dec"][7].astype(np.float32))
