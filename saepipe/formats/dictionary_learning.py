"""SAE <-> folder of dictionary_learning, in any of its classes.

- `config.json`: `trainer` with `dict_class` and the sizes, `buffer` with `ctx_len`; ours also has `metadata`.
- `ae.pt`: the tensors of the class by name, and nothing else.

A threshold below 0 says that training had not found one: then every positive pre-activation passes. A TopK's threshold
is for another way of encoding than the one that it was trained with, and is left out. Its loader rescales the decoder
rows of an AutoEncoder to norm 1, and the latents with them, where they are not; what is read here is as it was trained,
and AutoEncoder is written only where the rows have norm 1.
"""

import dataclasses
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.errors import UserError, unknown
from saepipe.formats import assembling, reading, writing
from saepipe.formats.assembling import Found
from saepipe.saes.base import SAE
from saepipe.saes.matryoshka import MatryoshkaSAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
SIGN = f"{CONFIG} and {WEIGHTS}"
_ENCODER = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T"}
_LINEAR = _ENCODER | {"b_enc": "encoder.bias"}
_OWN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


@dataclasses.dataclass(frozen=True)
class _Class:
    """One of their classes."""

    architecture: str
    names: dict[str, str]
    """Our name of each tensor -> theirs."""
    centred: bool = True
    """Whether it subtracts b_dec from its input."""
    extra: tuple[str, ...] = ()
    """Tensors that are no weights."""


CLASSES = {
    "AutoEncoder": _Class("standard", _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Class("standard", _LINEAR | {"b_dec": "decoder.bias"}, centred=False),
    "GatedAutoEncoder": _Class(
        "gated", _ENCODER | {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
    ),
    "JumpReluAutoEncoder": _Class("jumprelu", _OWN, centred=False),
    "AutoEncoderTopK": _Class("topk", _LINEAR | {"b_dec": "b_dec"}, extra=("k", "threshold")),
    "BatchTopKSAE": _Class("batchtopk", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, extra=("k",)),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka", _OWN, extra=("k", "group_sizes")),
}
"""Their classes that we have too."""


def recognises(path: Path) -> bool:
    """Whether dictionary_learning wrote a folder, or a file as a checkpoint of its training."""
    return (path / WEIGHTS).is_file() or _of_checkpoint(path) is not None


def _of_checkpoint(path: Path) -> Path | None:
    """Find the configuration of a file such as `checkpoints/ae_1000.pt`; None where it is no such file."""
    if not (path.is_file() and re.fullmatch(r"ae(_\d+)?\.pt", path.name)):
        return None
    return next((folder / CONFIG for folder in path.absolute().parents[:2] if (folder / CONFIG).is_file()), None)


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """Open an SAE of dictionary_learning.

    Args:
        path: Folder, or one of the files that its training left as checkpoints.
        device: Where to put it.
        dtype: Type of the weights.

    Raises:
        UserError: Something is missing, damaged or unknown, or the file holds more than tensors.
    """
    of_checkpoint = _of_checkpoint(Path(path))
    config_path, weights_path = (of_checkpoint, Path(path)) if of_checkpoint else reading.find(path, CONFIG, WEIGHTS)
    config = reading.json_object(config_path)
    trainer = reading.value(config, "trainer", dict, config_path)
    name = reading.value(trainer, "dict_class", str, config_path)
    if name not in CLASSES:
        raise unknown("dict_class", name, CLASSES, f"It is from {config_path}.")
    buffer: Any = config.get("buffer")
    buffer = buffer if isinstance(buffer, dict) else {}
    if buffer.get("io") == "in_and_out":
        raise UserError(f"{config_path} is of a transcoder, which nothing here reads from this format; choose an SAE")
    kind = CLASSES[name]
    tensors = reading.pickled(weights_path)
    found = Found(
        config_path,
        kind.architecture,
        reading.value(trainer, "activation_dim", int, config_path),
        reading.value(trainer, "dict_size", int, config_path),
        values={"apply_b_dec_to_input": kind.centred, "rescale_acts_by_decoder_norm": False},
        metadata=_metadata(config, trainer, buffer),
    )
    if "k" in kind.extra:
        found.values["k"] = _k(tensors, trainer, config_path)
    if "group_sizes" in kind.extra:
        found.values["matryoshka_widths"] = _widths(tensors, found.d_sae, weights_path)
    weights = assembling.renamed(weights_path, tensors, kind.names, ignored=kind.extra)
    return assembling.assemble(found, weights, weights_path, device=device, dtype=dtype)


def save(
    sae: SAE, folder: str | Path, *, metadata: dict[str, Any], sparsity: Float[Tensor, " d_sae"] | None = None
) -> None:
    """Write an autoencoder as the class that encodes and decodes as it does.

    Args:
        sae: The SAE; it stays as it is.
        folder: Where to.
        metadata: What it was trained on, under SAELens's names.
        sparsity: Left out: dictionary_learning has no place for it.

    Raises:
        UserError: No class does what the SAE does, or a weight is not finite.
    """
    if sae.is_transcoder:
        raise writing.refuse(sae, "dictionary_learning", "does not say of a dictionary that it is a transcoder")
    values, weights = writing.folded(sae, "dictionary_learning")
    name = _class_of(sae, values, weights)
    kind = CLASSES[name]
    weights = writing.centred(values, weights, wanted=kind.centred)
    if kind.architecture in ("batchtopk", "matryoshka"):
        weights["threshold"] = weights["threshold"][0]
    tensors = writing.finished(sae, weights, kind.names)
    trainer = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae, **_trained_on(metadata)}
    if "k" in kind.extra:
        trainer["k"] = int(sae.cfg.k)
        tensors["k"] = torch.tensor(trainer["k"], dtype=torch.int)
    if name == "AutoEncoderTopK":
        tensors["threshold"] = torch.tensor(-1.0)  # its word for none
    if "group_sizes" in kind.extra:
        assert isinstance(sae, MatryoshkaSAE)
        widths = [0, *sae.inner_widths, sae.d_sae]
        trainer["group_sizes"] = [end - start for start, end in pairwise(widths)]
        tensors["group_sizes"] = torch.tensor(trainer["group_sizes"])
    config = {
        "trainer": trainer,
        "buffer": {"ctx_len": metadata.get("context_size")},
        "metadata": writing.record(sae, metadata),
    }
    writing.folder(Path(folder), CONFIG, config, {WEIGHTS: writing.pickled(tensors)})


def _class_of(sae: SAE, values: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """Choose the class; where its loader would rescale an AutoEncoder, the one that is left alone."""
    architecture = sae.cfg.architecture
    if architecture == "standard":
        norms = weights["W_dec"].norm(dim=1)
        return "AutoEncoder" if values["apply_b_dec_to_input"] and (norms - 1).abs().max() < 1e-6 else "AutoEncoderNew"
    if architecture in ("batchtopk", "matryoshka") and sae.cfg.k != int(sae.cfg.k):
        return "JumpReluAutoEncoder"  # k has to be a whole number there, and encoding asks for the threshold alone
    names = [name for name, kind in CLASSES.items() if kind.architecture == architecture]
    if not names:
        raise writing.refuse(sae, "dictionary_learning", f"has none of {', '.join(CLASSES)} for it")
    return names[0]


def _k(tensors: dict[str, Any], trainer: dict[str, Any], path: Path) -> int:
    """Find k, which early versions kept in the configuration alone."""
    k = tensors.get("k")
    if isinstance(k, Tensor) and k.numel() == 1 and not k.is_floating_point():
        return reading.value({"k": int(k)}, "k", int, path)
    return reading.value(trainer, "k", int, path)


def _widths(tensors: dict[str, Any], d_sae: int, path: Path) -> list[int]:
    sizes = tensors.get("group_sizes")
    if isinstance(sizes, Tensor) and sizes.ndim == 1 and sizes.numel() and int(sizes.min()) > 0:
        widths = [int(width) for width in sizes.cumsum(0)]
        if widths[-1] == d_sae:
            return widths
    raise UserError(f"{path} has no group_sizes that make up its {d_sae} latents; {reading.AGAIN}")


def _metadata(config: dict[str, Any], trainer: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config.get("metadata"), dict):
        return dict(config["metadata"])
    named = {"model_name": trainer.get("lm_name"), "context_size": buffer.get("ctx_len")}
    module, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    if re.search(r"\bhook_\w+", module):
        named["hook_name"] = module
    elif isinstance(layer, int) and buffer.get("io", "out") == "out":
        side = "hook_mlp_out" if "mlp" in module else "hook_attn_out" if "att" in module else "hook_resid_post"
        named["hook_name"] = f"blocks.{layer}.{side}"
    return {key: item for key, item in named.items() if item is not None}


def _trained_on(metadata: dict[str, Any]) -> dict[str, Any]:
    hook = metadata.get("hook_name")
    layer = re.search(r"\b(?:blocks|layers|h)\.(\d+)\b", str(hook))
    return {
        "lm_name": metadata.get("model_name"),
        "layer": int(layer[1]) if layer else None,
        "submodule_name": hook,
    }
