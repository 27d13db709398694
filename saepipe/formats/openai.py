"""OpenAI's autoencoders -> SAE: one file of `torch.save`, with the tensors by name and the activation function's name.

Those with TopK were trained behind a layer norm of each token, which `SAE.token_norm` keeps; those with ReLU were not.
Source: Gao et al. 2024 (arXiv 2406.04093) and its code. What the latents did in training (when they last fired, how
often) is left out.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saepipe.errors import UserError
from saepipe.formats import assembling, reading
from saepipe.formats.assembling import Found
from saepipe.saes.base import SAE

SIGN = "a .pt file of OpenAI's"
_NAMES = {"W_enc": "encoder.weight.T", "b_enc": "latent_bias", "W_dec": "decoder.weight.T", "b_dec": "pre_bias"}
_SAID = ("activation", "activation_state_dict")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_TIED = "decoder.linear.weight"
_HOOKS = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "mlp_post_act": "mlp.hook_post",
}
"""Their name of a place in GPT-2's block -> TransformerLens's."""


def recognises(path: Path) -> bool:
    """Whether it is a file as OpenAI publishes them; only opening it shows more."""
    return path.is_file() and path.suffix == ".pt"


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """Open an autoencoder of OpenAI's.

    Args:
        path: The file.
        device: Where to put it.
        dtype: Type of the weights.

    Raises:
        UserError: It is missing, damaged, holds more than tensors and plain values, or has another activation function
            than ReLU and TopK with ReLU.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give the .pt file of an autoencoder")
    content = reading.pickled(path)
    names = dict(_NAMES)
    if _TIED in content:
        names["W_dec"] = _TIED  # the encoder's weights, which its decoder uses the other way round
    weights = assembling.renamed(path, content, names, ignored=(*_SAID, *_STATISTICS))
    d_in, d_sae = weights["W_enc"].shape
    activation = content.get("activation", "ReLU")
    values: dict[str, Any] = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
    if activation == "TopK":
        values["k"] = _k(content.get("activation_state_dict"), path)
    elif activation != "ReLU":
        raise UserError(f"{path} says activation={activation}, which no architecture here has; choose ReLU or TopK")
    top = activation == "TopK"
    found = Found(
        path,
        "topk" if top else "standard",
        d_in,
        d_sae,
        values=values,
        metadata=_metadata(path),
        token_norm="layer_norm" if top else "none",
    )
    return assembling.assemble(found, weights, path, device=device, dtype=dtype)


def _k(state: Any, path: Path) -> int:
    state = state if isinstance(state, dict) else {}
    if state.get("postact_fn", "ReLU") != "ReLU":
        raise UserError(f"{path} says postact_fn={state['postact_fn']} of its TopK, which here is ReLU; choose another")
    k = state.get("k")
    return reading.value({"k": int(k) if isinstance(k, Tensor) and k.numel() == 1 else k}, "k", int, path)


def _metadata(path: Path) -> dict[str, Any]:
    """Read what the path says, where it is as published: gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt."""
    *_, model, place, _folder, _name = ("", "", "", *path.parts)
    hook = next((hook for name, hook in _HOOKS.items() if place.startswith(name)), None)
    if hook is None or not path.stem.isdecimal():
        return {}
    return {"model_name": model, "hook_name": f"blocks.{int(path.stem)}.{hook}"}
