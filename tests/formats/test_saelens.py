import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saepipe
from saepipe import formats, saes
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.saes.base import SAE
from saepipe.saes.standard import StandardConfig, StandardSAE
from saepipe.saes.topk import TopKConfig, TopKSAE

ROOT = Path(__file__).parents[1]


def make(**values: Any) -> TopKSAE:
    sae = TopKSAE(TopKConfig(d_sae=20, k=3, **values), 8)
    sae.initialise(torch.Generator().manual_seed(0), mean=torch.ones(8), norm_scale=0.5)
    return sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saelens.save(make(), tmp_path / "sae", metadata={"model_name": "m"}, sparsity=torch.linspace(0, 1, 20))
    return tmp_path / "sae"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    for key, value in changes.items():
        config.pop(key) if value is None else config.update({key: value})
    (folder / "cfg.json").write_text(json.dumps(config))


def test_folder_is_what_saelens_opens(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
    config = json.loads((folder / "cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "topk",
        "d_in": 8,
        "d_sae": 20,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "k": 3,
        "rescale_acts_by_decoder_norm": False,
    }
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6
    assert metadata["model_name"] == "m"
    assert metadata["saepipe_version"] == saepipe.__version__
    weights = load_file(folder / "sae_weights.safetensors")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert shapes == {"W_enc": (8, 20), "b_enc": (20,), "W_dec": (20, 8), "b_dec": (8,)}
    torch.testing.assert_close(weights["b_dec"], torch.ones(8))  # the raw mean
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.full((20,), 1 / 0.5))
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(sparsity, torch.log10(torch.linspace(0, 1, 20) + 1e-10))


def test_standard_keeps_the_norms_of_its_decoder(tmp_path: Path) -> None:
    sae = StandardSAE(StandardConfig(d_sae=20), 8)
    sae.initialise(torch.Generator().manual_seed(0), norm_scale=0.5)
    saelens.save(sae, tmp_path, metadata={})
    weights = load_file(tmp_path / "sae_weights.safetensors")
    torch.testing.assert_close(weights["W_dec"], sae.W_dec.detach() / 0.5)
    torch.testing.assert_close(weights["W_enc"], sae.W_enc.detach() * 0.5)
    assert not (tmp_path / "sparsity.safetensors").exists()


def test_loaded_sae_knows_how_it_was_trained(folder: Path) -> None:
    sae = saepipe.SAE.load(folder)
    assert isinstance(sae, TopKSAE)
    assert sae.cfg == TopKConfig(d_sae=20, k=3, normalize_activations="none", rescale_acts_by_decoder_norm=False)
    assert sae.metadata["training_architecture_details"]["rescale_acts_by_decoder_norm"]
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    assert SAE.load(str(folder), dtype=torch.bfloat16).W_dec.dtype == torch.bfloat16


def test_a_head_has_saelens_names_in_the_folder_and_ours_in_python(tmp_path: Path) -> None:
    for hook, parts in {
        "blocks.1.attn.hook_z.head.3": ("blocks.1.attn.hook_z", 3),
        "blocks.1.attn.hook_z": ("blocks.1.attn.hook_z", None),
        "model.layers.5.mlp.input": ("model.layers.5.mlp.input", None),
    }.items():
        named = {"hook_name": hook, "hook_head_index": None, "hook_name_out": hook}
        saelens.save(make(), tmp_path / "one", metadata=named)
        saelens.save(make(), tmp_path / "two", metadata=saelens.load(tmp_path / "one").metadata)
        for folder in (tmp_path / "one", tmp_path / "two"):
            metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
            assert (metadata["hook_name"], metadata["hook_head_index"]) == parts
            assert (metadata["hook_name_out"], metadata["hook_head_index_out"]) == parts
            found = saelens.load(folder).metadata
            assert found["hook_name"] == found["hook_name_out"] == hook


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("standard", "transcoder"),
        ("gated", "gated_transcoder"),
        ("jumprelu", "jumprelu_transcoder"),
        ("topk", "topk_transcoder"),
        ("batchtopk", "jumprelu_transcoder"),
        ("matryoshka", "jumprelu_transcoder"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_named_as_saelens_does(
    name: str, architecture: str, skip: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cls = saes.architecture(name)
    cfg = cls.config_class(d_sae=20, apply_b_dec_to_input=False, skip_connection=skip)
    if "k" in vars(cfg):
        cfg.k = 3
    saelens.save(cls(cfg, 8, 5), tmp_path, metadata={"hook_name": "a", "hook_name_out": "b"})
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == (architecture.replace("transcoder", "skip_transcoder") if skip else architecture)
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (8, 5, False)
    assert (config["metadata"]["hook_name"], config["metadata"]["hook_name_out"]) == ("a", "b")
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert ("W_skip" in weights) == skip
    assert ("opens in saepipe alone" in caplog.text) == (
        name in ("gated", "topk")
    )  # which SAELens has no transcoders of


def test_a_transcoder_that_does_not_describe_itself_is_refused(tmp_path: Path) -> None:
    sae = StandardSAE(StandardConfig(d_sae=20, apply_b_dec_to_input=False), 8, 5)
    for changes, words in {
        ("d_out", None): "no valid d_out",
        ("d_out", 0): "no valid d_out",
        ("d_out", 6): r"W_dec of shape \(20, 5\)",
        ("apply_b_dec_to_input", True): "transcoder SAE: sae.apply_b_dec_to_input=True",
        ("architecture", "skip_transcoder"): r"W_skip of shape \(missing\)",
        ("architecture", "skip_topk_transcoder"): "is not known; did you mean .*topk_skip_transcoder",
    }.items():
        saelens.save(sae, tmp_path, metadata={})
        edit(tmp_path, **dict([changes]))
        with pytest.raises(UserError, match=words):
            saelens.load(tmp_path)


def test_a_transcoder_without_our_metadata_opens(tmp_path: Path) -> None:
    sae = StandardSAE(StandardConfig(d_sae=20, apply_b_dec_to_input=False, skip_connection=True), 8, 5)
    saelens.save(sae, tmp_path, metadata={})
    edit(tmp_path, metadata=None, apply_b_dec_to_input=None)
    loaded = saelens.load(tmp_path)
    assert (loaded.is_transcoder, loaded.cfg.skip_connection, loaded.cfg.apply_b_dec_to_input) == (True, True, False)


def test_an_sae_of_another_architecture_than_its_training_s_opens(tmp_path: Path) -> None:
    """Keys of the one need not be fit for the other: jumprelu knows no auxk."""
    cls = saes.architecture("batchtopk")
    saelens.save(cls(cls.config_class(d_sae=20, k=3.0, dead_method="auxk"), 8), tmp_path, metadata={})
    loaded = saelens.load(tmp_path)
    assert (loaded.cfg.architecture, loaded.cfg.dead_method) == ("jumprelu", "none")
    assert loaded.metadata["training_architecture_details"]["dead_method"] == "auxk"


def test_folder_without_our_metadata_opens(folder: Path) -> None:
    edit(folder, metadata=None)
    assert saelens.load(folder).cfg.k == 3


def test_second_export_replaces_the_first(folder: Path) -> None:
    sae = StandardSAE(StandardConfig(d_sae=10), 8)
    saelens.save(sae, folder, metadata={})
    assert saelens.load(folder).d_sae == 10
    assert not (folder / "sparsity.safetensors").exists()


def test_how_often_latents_fire_stays_as_it_was_from_copy_to_copy(folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        copied = tmp_path / f"copy{number}"
        formats.save(formats.load(folder), copied)
        assert (copied / "sparsity.safetensors").read_bytes() == (folder / "sparsity.safetensors").read_bytes()
        folder = copied


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from saepipe import durable
from saepipe.formats import saelens
from saepipe.saes.standard import StandardConfig, StandardSAE
folder, names, commit = Path(sys.argv[1]), sys.argv[2:], durable.commit
def save(d_sae):
    saelens.save(StandardSAE(StandardConfig(d_sae=d_sae), 8), folder, metadata={}, sparsity=torch.zeros(d_sae))
for name in names:
    save(20)
    if not (child := os.fork()):
        die = lambda file, path: os.kill(os.getpid(), signal.SIGKILL)
        durable.commit = lambda file, path: (die if path.name == name else commit)(file, path)
        save(10)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    try:
        print(name, saelens.load(folder).d_sae)
    except saelens.UserError as error:
        print(name, str(error).split(", ")[1].split(";")[0])
save(10)
print("then", saelens.load(folder).d_sae)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported once")
def test_killed_export_never_opens_as_a_mixture(tmp_path: Path) -> None:
    """SIGKILL before each rename, over an older export: what is left does not open, and the next export mends it."""
    names = ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "sae"), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*(f"{name} it has no cfg.json" for name in names), "then 10"]


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no exported SAE"):
        saelens.load(tmp_path / "nowhere")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"it has no sae_weights\.safetensors"):
        saelens.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "topkk"}, ["architecture=topkk", "did you mean topk", "cfg.json"]),
        ({"architecture": None}, ["no valid architecture"]),
        ({"d_in": None}, ["no valid d_in"]),
        ({"d_sae": "20"}, ["no valid d_sae (found 20)"]),
        ({"d_in": -8}, ["no valid d_in (found -8)"]),
        ({"metadata": []}, ["no valid metadata"]),
        ({"k": 21}, ["cfg.json does not describe a topk SAE", "sae.k=21"]),
        ({"normalize_activations": "expected_average_only_in"}, ["normalize_activations=expected_average_only_in"]),
        ({"normalize_activations": "covariance_whitening"}, ["normalize_activations=covariance_whitening"]),
        ({"reshape_activations": "by_token"}, ["reshape_activations=by_token"]),
        ({"d_sae": 21}, ["W_enc of shape (8, 20)", "(8, 21)"]),
    ],
)
def test_impossible_configurations_are_refused(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError) as caught:
        saelens.load(folder)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_damaged_configuration_is_refused(folder: Path, content: bytes) -> None:
    (folder / "cfg.json").write_bytes(content)
    with pytest.raises(UserError, match=r"cfg\.json is damaged"):
        saelens.load(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    for content in (b"", whole[:-1], bytes(len(whole))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            saelens.load(folder)
    without = {name: value for name, value in weights.items() if name != "b_enc"}
    save_file(without, path)
    with pytest.raises(UserError, match=r"b_enc of shape \(missing\)"):
        saelens.load(folder)
    save_file(weights | {"threshold": torch.zeros(20)}, path)
    with pytest.raises(UserError, match=r"threshold .* \(no such tensor\)"):
        saelens.load(folder)
    weights["b_dec"][3] = torch.nan
    save_file(weights, path)
    with pytest.raises(UserError, match=r"b_dec .* NaN"):
        saelens.load(folder)


def test_diverged_sae_is_not_exported_over_a_good_one(folder: Path) -> None:
    sae = make()
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.inf
    with pytest.raises(UserError, match="W_enc"):
        saelens.save(sae, folder, metadata={})
    assert saelens.load(folder).d_sae == 20
