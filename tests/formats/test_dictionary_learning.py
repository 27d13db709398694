import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_saes import D_IN, D_SAE, data, make, make_transcoder
from torch import Tensor
from torch.nn.functional import linear

from saepipe import formats, saes
from saepipe.errors import UserError
from saepipe.formats import dictionary_learning

K = 5
LINEAR = {"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE)}
OWN = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
BIASED = LINEAR | {"encoder.bias": (D_SAE,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": BIASED | {"bias": (D_IN,)},
    "AutoEncoderNew": BIASED | {"decoder.bias": (D_IN,)},
    "GatedAutoEncoder": LINEAR
    | {"decoder_bias": (D_IN,), "gate_bias": (D_SAE,), "mag_bias": (D_SAE,), "r_mag": (D_SAE,)},
    "JumpReluAutoEncoder": OWN | {"threshold": (D_SAE,)},
    "AutoEncoderTopK": BIASED | {"b_dec": (D_IN,)},
    "BatchTopKSAE": BIASED | {"b_dec": (D_IN,)},
    "MatryoshkaBatchTopKSAE": OWN,
}
OURS = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}


def tensors(name: str, threshold: float = 0.7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES[name].items()}
    if "TopK" in name:
        drawn |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    if "Matryoshka" in name:
        drawn["group_sizes"] = torch.tensor([8, 16, 24])
    return drawn


def write(folder: Path, name: str, weights: dict[str, Any], **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    named = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "gpt2", "k": K}
    named = {key: item for key, item in (named | trainer).items() if item is not None}
    (folder / "config.json").write_text(json.dumps({"trainer": named, "buffer": {"ctx_len": 128}}))
    torch.save(weights, folder / "ae.pt")
    return folder


def reference(name: str, w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction, as dictionary_learning computes them."""
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        encoder, decoder, bias = w["W_enc"].T, w["W_dec"].T, w["b_dec"]
    else:
        encoder, decoder = w["encoder.weight"], w["decoder.weight"]
        bias = next(w[key] for key in ("bias", "decoder.bias", "decoder_bias", "b_dec") if key in w)
    centred = x if name in ("JumpReluAutoEncoder", "AutoEncoderNew") else x - bias
    pre = linear(centred, encoder, w.get("encoder.bias", w.get("b_enc")))
    if name == "GatedAutoEncoder":
        f = torch.relu(w["r_mag"].exp() * pre + w["mag_bias"]) * (pre + w["gate_bias"] > 0)
    elif name == "AutoEncoderTopK":
        top = torch.relu(pre).topk(K)
        f = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    else:
        f = torch.relu(pre) * (torch.relu(pre) > w.get("threshold", torch.zeros(())))
    return f, linear(f, decoder) + bias


@pytest.mark.parametrize("threshold", [0.7, -1.0])
@pytest.mark.parametrize("name", OURS)
def test_does_what_dictionary_learning_does(name: str, threshold: float, tmp_path: Path) -> None:
    weights = tensors(name, threshold)
    folder = write(tmp_path, name, weights)
    assert formats.detect(folder) == "dictionary_learning"
    sae = formats.load(folder)
    assert sae.cfg.architecture == OURS[name]
    f, out = reference(name, weights, data())
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.decode(f), out, rtol=1e-5, atol=1e-5)
    assert sae.metadata == {"model_name": "gpt2", "context_size": 128, "hook_name": "blocks.3.hook_resid_post"}


def test_a_checkpoint_of_training_is_opened_by_its_file(tmp_path: Path) -> None:
    folder = write(tmp_path, "AutoEncoderTopK", tensors("AutoEncoderTopK"))
    whole = formats.load(folder)
    (folder / "checkpoints").mkdir()
    file = folder / "ae.pt"
    for name in ("checkpoints/ae_100.pt", "ae_100.pt", "ae.pt"):
        place = file = file.rename(folder / name)
        assert formats.detect(place) == "dictionary_learning"
        assert torch.equal(formats.load(place).encode(data()), whole.encode(data()))
    (folder / "config.json").unlink()
    assert formats.detect(folder / "ae.pt") == "openai"  # whose files are of any name


def test_k_and_the_groups_are_kept(tmp_path: Path) -> None:
    sae = formats.load(write(tmp_path, "MatryoshkaBatchTopKSAE", tensors("MatryoshkaBatchTopKSAE")))
    assert (sae.cfg.k, sae.inner_widths) == (K, [8, 24])
    weights = tensors("AutoEncoderTopK")
    del weights["k"], weights["threshold"]  # early versions had neither
    assert formats.load(write(tmp_path, "AutoEncoderTopK", weights, k=7)).cfg.k == 7


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("name", saes.registered())
def test_written_and_read_it_does_the_same(name: str, apply_b_dec: bool, tmp_path: Path) -> None:
    sae = make(name, apply_b_dec_to_input=apply_b_dec)
    if name in ("batchtopk", "matryoshka"):
        sae.threshold.fill_(0.03)
    formats.save(sae, tmp_path, format="dictionary_learning", metadata={"hook_name": "blocks.2.hook_mlp_out"})
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["submodule_name"]) == (2, "blocks.2.hook_mlp_out")
    loaded = formats.load(tmp_path)
    assert type(loaded) is type(sae)
    f = sae.encode(data())
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(loaded.encode(data()), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(data()), sae(data()), rtol=1e-5, atol=1e-5)
    assert loaded.metadata["hook_name"] == "blocks.2.hook_mlp_out"
    formats.save(loaded, tmp_path / "again", format="dictionary_learning")
    first, second = (torch.load(folder / "ae.pt", weights_only=True) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_class_keeps_latents_as_they_are(tmp_path: Path) -> None:
    """The loader of AutoEncoder rescales rows that have not norm 1."""

    def written(sae: Any) -> str:
        formats.save(sae, tmp_path, format="dictionary_learning")
        return json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"]

    sae = make("standard", normalize_activations="none")
    assert written(sae) == "AutoEncoderNew"
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    assert written(sae) == "AutoEncoder"
    assert torch.equal(formats.load(tmp_path).encode(data()), sae.encode(data()))
    assert written(make("batchtopk", k=2.5)) == "JumpReluAutoEncoder"  # their k is a whole number


def test_what_no_class_does_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this gated transcoder cannot be written for dictionary_learning"):
        formats.save(make_transcoder("gated"), tmp_path, format="dictionary_learning")
    sae = make("standard")
    sae.token_norm = "layer_norm"
    with pytest.raises(UserError, match="has no normalize_activations=layer_norm"):
        formats.save(sae, tmp_path, format="dictionary_learning")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"dict_class": "CrossCoder"}, r"dict_class=CrossCoder is not known; .*It is from .*config\.json"),
        ({"dict_class": None}, "no valid dict_class"),
        ({"dict_size": None}, "no valid dict_size"),
        ({"activation_dim": 8}, r"W_enc of shape \(16, 48\) where config\.json asks for \(8, 48\)"),
        ({"dict_class": "AutoEncoder"}, "has b_dec, k, threshold, which an SAE of its kind does not have"),
    ],
)
def test_impossible_configurations_are_refused(trainer: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        dictionary_learning.load(write(tmp_path, "BatchTopKSAE", tensors("BatchTopKSAE"), **trainer))


def test_a_transcoder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "AutoEncoder", tensors("AutoEncoder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"buffer": {"io": "in_and_out"}}))
    with pytest.raises(UserError, match="is of a transcoder"):
        dictionary_learning.load(folder)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit",)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    name, weights = "MatryoshkaBatchTopKSAE", tensors("MatryoshkaBatchTopKSAE")
    for changes, words in (
        ({"b_dec": torch.full((D_IN,), torch.inf)}, "b_dec of .* infinity"),
        ({"b_dec": torch.zeros(3)}, r"b_dec of shape \(3,\)"),
        ({"b_dec": Trap()}, "could run code"),
        ({"k": torch.tensor(49)}, r"sae\.k=49"),
        ({"k": torch.tensor(0)}, "no valid k"),
        ({"group_sizes": torch.tensor([8, 16])}, "no group_sizes that make up its 48 latents"),
        ({"group_sizes": torch.tensor([-8, 56])}, "no group_sizes"),
        ({"threshold": torch.zeros(D_SAE)}, r"threshold of shape \(48,\)"),
    ):
        with pytest.raises(UserError, match=words):
            dictionary_learning.load(write(tmp_path, name, weights | changes))
    del weights["W_enc"]
    with pytest.raises(UserError, match="no tensor W_enc"):
        dictionary_learning.load(write(tmp_path, name, weights))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        dictionary_learning.load(tmp_path)
