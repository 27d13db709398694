import json
from pathlib import Path

import pytest
import torch
from small_saes import D_IN, data, make

from saepipe import formats, saes
from saepipe.errors import UserError
from saepipe.formats import writing


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("name", saes.registered())
def test_centring_moves_into_the_biases(name: str, wanted: bool) -> None:
    sae = make(name, torch.float64, normalize_activations="none", apply_b_dec_to_input=not wanted)
    values, weights = sae.folded()
    moved = writing.centred(values, weights, wanted=wanted)
    biases = [key for key in weights if not torch.equal(weights[key], moved[key])]
    assert biases == (["b_gate", "b_mag"] if name == "gated" else ["b_enc"])
    x = data().double()
    before = x - weights["b_dec"] if not wanted else x
    after = x - weights["b_dec"] if wanted else x
    for key in biases:
        scale = weights["r_mag"].exp() if key == "b_mag" else 1
        ours = before @ weights["W_enc"] * scale + weights[key]
        torch.testing.assert_close(after @ moved["W_enc"] * scale + moved[key], ours)
    assert writing.centred(values, weights, wanted=not wanted) is weights


def test_weights_get_the_names_and_sides_of_another_library() -> None:
    sae = make("standard", torch.bfloat16)
    _, weights = sae.folded()
    found = writing.finished(sae, weights, {"W_enc": "encoder.weight.T", "b_dec": "bias"})
    assert {name: (tensor.dtype, tensor.shape[-1]) for name, tensor in found.items()} == {
        "encoder.weight": (torch.bfloat16, D_IN),
        "bias": (torch.bfloat16, D_IN),
    }
    weights["W_enc"][0, 0] = torch.inf
    with pytest.raises(UserError, match="W_enc of the SAE to export holds NaN or infinity"):
        writing.finished(sae, weights)


def test_a_folder_opens_only_when_it_is_whole(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        assert not (tmp_path / "cfg.json").exists()
        raise OSError("the disk is full")

    writing.folder(tmp_path, "cfg.json", {"a": 1}, {"x": lambda file: file.write(b"1"), "y": lambda file: None})
    assert json.loads((tmp_path / "cfg.json").read_text()) == {"a": 1}
    with pytest.raises(OSError, match="the disk is full"):
        writing.folder(tmp_path, "cfg.json", {"a": 2}, {"y": None, "x": fail})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", formats.WRITTEN)
def test_a_folder_never_holds_two_formats(name: str, tmp_path: Path) -> None:
    other = next(one for one in formats.WRITTEN if one != name)
    sae = make("topk", k=3)
    formats.save(sae, tmp_path, format=name)
    formats.save(sae, tmp_path, format=name)  # over itself
    assert formats.detect(tmp_path) == name
    with pytest.raises(UserError, match=f"has an SAE in the format {name}"):
        formats.save(sae, tmp_path, format=other)
    assert formats.detect(tmp_path) == name


def test_formats_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format=sparsfy is not known; did you mean sparsify"):
        formats.save(make("topk", k=3), tmp_path, format="sparsfy")
    with pytest.raises(UserError, match="format=gemmascope is not known; did you mean gemma_scope"):
        formats.load(tmp_path, format="gemmascope")
    with pytest.raises(UserError, match=r"no SAE in a format .* sparsify: cfg\.json and sae\.safetensors"):
        formats.detect(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        formats.detect(tmp_path / "nowhere")
