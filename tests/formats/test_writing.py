import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_saes import D_IN, data, make

from saepipe import SAE, formats, saes
from saepipe.errors import UserError
from saepipe.formats import writing
from saepipe.model_card import model_card


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
    (tmp_path / "run" / "sae").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run is the folder of a run; give .*run/sae"):
        formats.detect(tmp_path / "run")
    with pytest.raises(UserError, match="does not exist"):
        formats.detect(tmp_path / "nowhere")


@pytest.mark.parametrize("name", formats.WRITTEN)
def test_an_sae_that_was_opened_keeps_what_is_known_of_its_training(name: str, tmp_path: Path) -> None:
    trained = make("topk", k=3, dead_after_tokens=77)
    formats.save(trained, tmp_path / "a", format=name)
    opened = formats.load(tmp_path / "a")
    for other in formats.WRITTEN:
        formats.save(opened, tmp_path / other, format=other)
        known = formats.load(tmp_path / other).metadata
        assert known["training_architecture"] == "topk"
        assert known["training_architecture_details"]["dead_after_tokens"] == 77
    opened.metadata = {}  # as in a folder that another library wrote
    formats.save(opened, tmp_path / "b")
    assert "training_architecture_details" not in formats.load(tmp_path / "b").metadata
    assert formats.load(tmp_path / "b").metadata["training_architecture"] == "topk"


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_an_sae_that_an_export_makes_another_one_is_still_known(name: str, tmp_path: Path) -> None:
    widths = {"matryoshka_widths": [8, 48]} if name == "matryoshka" else {}
    formats.save(make(name, k=5.0, **widths), tmp_path / "a")
    opened = formats.load(tmp_path / "a")
    assert opened.cfg.architecture == "jumprelu"
    formats.save(opened, tmp_path / "b")
    known = formats.load(tmp_path / "b").metadata
    assert known["training_architecture"] == name
    assert known["training_architecture_details"]["k"] == 5.0
    assert model_card(opened, format="saelens").count(f"jumprelu, trained as {name}") == 1


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux has a folder where nobody can make one")
def test_folders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder=/proc/x cannot be written"):
        make("topk", k=3).save_model("/proc/x")
    with pytest.raises(UserError, match=r"cannot be found .*; give another folder"):
        make("topk", k=3).save_model("~nobody-of-that-name/x")
    with pytest.raises(UserError, match="cannot be read"):
        formats.load(tmp_path / ("x" * 300))


@pytest.mark.parametrize("value", [float("nan"), torch.float32])
def test_metadata_that_is_no_json_is_refused_and_what_is_there_stays(value: Any, tmp_path: Path) -> None:
    sae = make("standard")
    formats.save(sae, tmp_path)
    with pytest.raises(UserError, match="the SAE's metadata is no JSON"):
        formats.save(sae, tmp_path, metadata={"x": value})
    assert formats.load(tmp_path).d_sae == sae.d_sae


def test_a_sparsity_of_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sparsity is of \(5,\) latents, and the SAE has 48"):
        formats.save(make("standard"), tmp_path, sparsity=torch.rand(5))


def test_home_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    formats.save(make("standard"), "~/sae")
    assert (tmp_path / "sae/cfg.json").is_file()
    assert formats.load("~/sae").d_in == SAE.load("~/sae").d_in
    assert SAE.load("~/sae").save_model("~/again")[1] == tmp_path / "again/cfg.json"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "device=gpu is not on this machine"),
        ({"device": "cuda:99"}, "device=cuda:99 is not on this machine"),
        ({"dtype": "floaty"}, "dtype=floaty is no type of torch's"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is no type for weights"),
    ],
)
def test_devices_and_types_that_are_none_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    formats.save(make("standard"), tmp_path)
    with pytest.raises(UserError, match=words):
        SAE.load(tmp_path, **options)
