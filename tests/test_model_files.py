"""A model's files are found and read, or refused in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import small_models
import torch

from saepipe.config import ModelConfig
from saepipe.errors import UserError
from saepipe.model_files import ModelFiles
from saepipe.placement import Placement

CPU = Placement(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("model") / "gpt2", "gpt2")


def opened(folder: Path, **keys: object) -> ModelFiles:
    return ModelFiles.open(ModelConfig(name=str(folder), **keys))


def test_identity_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    before = opened(folder).identity
    assert before == opened(folder).identity
    json.dumps(before)
    shutil.copytree(folder, tmp_path / "copy")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(content)
    assert opened(tmp_path / "copy").identity["weights"] != before["weights"]
    assert opened(folder, dtype="bfloat16").identity != before


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no readable config.json"):
        opened(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"has no readable tokenizer"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"model.name=/nowhere/model does not exist"):
        opened(Path("/nowhere/model"))


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, e.g. transformer.h.1.mlp.c_fc.weight"):
        opened(tmp_path / "copy").load(CPU)


def test_hub_id_offline() -> None:
    with pytest.raises(UserError, match=r"the hub cannot be reached .*`hf download owner/absent`") as refused:
        ModelFiles.open(ModelConfig(name="owner/absent"))
    assert "set HF_HUB_OFFLINE=1" not in str(refused.value)  # it is set


def configured(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"n_embd": 48},
        {"vocab_size": 400},
        {"n_head": 5},
        {"n_head": 0},
        {"n_layer": None},
        {"activation_function": "nosuch"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_one_sentence(
    folder: Path, tmp_path: Path, keys: dict[str, object]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    configured(copy, **keys)
    with pytest.raises(UserError, match=rf"model.name={copy} has no .*; give another Hugging Face model \(") as error:
        opened(copy).load(CPU)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("content", [b"", b"\xff" * 200, (1 << 40).to_bytes(8, "little") + b"{}", None], ids=str)
def test_damaged_weights_are_named(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(UserError, match=rf"model.name={copy} has no weights"):
        opened(copy).load(CPU)
    if content is not None:  # a cut at the end shows when the weights load
        with pytest.raises(UserError, match=rf"model.name={copy} has damaged weights"):
            _ = opened(copy).identity


def test_a_cut_pytorch_file_is_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    copy = shutil.copytree(folder, tmp_path / "copy")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    path = copy / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"model.name={copy} has no weights"):
        opened(copy).load(CPU)


@pytest.mark.parametrize("kind", ["bert", "roberta", "vit", "resnet", "t5"])
def test_models_that_are_no_causal_language_model(folder: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig

    copy = shutil.copytree(folder, tmp_path / "copy")
    AutoConfig.for_model(kind).save_pretrained(copy)
    with pytest.raises(UserError, match=rf"is no causal language model .*model_type={kind}\); give one such as"):
        opened(copy)


def test_an_encoder_made_a_decoder_is_accepted(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    copy = shutil.copytree(folder, tmp_path / "copy")
    AutoConfig.for_model("bert", is_decoder=True).save_pretrained(copy)
    assert opened(copy).text_config.num_hidden_layers == 12


def test_running_out_of_memory_is_not_blamed_on_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*args: object, **keys: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"loading model.name=.* ran out of memory; try model.dtype=bfloat16"):
        opened(folder).load(CPU)


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model.revision=main has no meaning for model.name=.*leave model.revision"):
        opened(folder, revision="main")


def test_a_device_map_spreads_the_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU there is one place to put them; that they are put there by transformers shows in that nothing moves."""
    monkeypatch.setattr(torch.nn.Module, "to", None)
    model = opened(folder).load(Placement(torch.device("cpu"), {"": "cpu"}))
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert not any(weight.requires_grad for weight in model.parameters())


def test_layers_that_find_no_gpu_are_refused(folder: Path) -> None:
    spread = {"transformer.h.0": 0, "transformer.h.1": "cpu", "lm_head": "disk"}
    placement = Placement(torch.device("cuda", 0), "auto", (0, 1))
    message = r"does not fit the GPUs of model.n_devices=2 \(transformer.h.1 and what follows .* model.dtype=bfloat16"
    with pytest.raises(UserError, match=message):
        opened(folder)._check_fits(spread, placement)
    opened(folder)._check_fits({"": 1}, placement)
    opened(folder)._check_fits({"": "cpu"}, CPU)
