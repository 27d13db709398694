"""SAE <-> folder of EleutherAI's sparsify: TopK, as autoencoder or transcoder, with or without a skip connection.

- `cfg.json`: sparsify's configuration and `d_in`; ours also has `metadata`, which sparsify passes over.
- `sae.safetensors`: encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_in], b_dec, W_skip [d_in, d_in].

What the run was is in `config.json` of the folder above, and the hook is the folder's name. `multi_topk` and
`normalize_decoder` say how training went, and nothing of what the SAE does.
"""

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.errors import UserError
from saepipe.formats import assembling, reading, writing
from saepipe.formats.assembling import Found
from saepipe.saes.base import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
SIGN = f"{CONFIG} and {WEIGHTS}"
_NAMES = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_SKIP = {"W_skip": "W_skip"}
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(mlp|attn|attention|self_attn))?")
_OUTPUTS = {None: "hook_resid_post", "mlp": "hook_mlp_out"}


def recognises(path: Path) -> bool:
    """Whether sparsify wrote a folder."""
    return (path / WEIGHTS).is_file()


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """Open an SAE of sparsify.

    Args:
        path: Folder.
        device: Where to put it.
        dtype: Type of the weights.

    Raises:
        UserError: Something is missing or damaged, or activations are chosen otherwise than by TopK.
    """
    config_path, weights_path = reading.find(path, CONFIG, WEIGHTS)
    config = reading.json_object(config_path)
    for key, known in {"activation": "topk", "signed": False}.items():
        if config.get(key, known) != known:
            raise UserError(
                f"{config_path} says {key}={config[key]}, which no architecture here does; choose an SAE with "
                f"{key}={known}"
            )
    d_in = reading.value(config, "d_in", int, config_path)
    d_sae = config.get("num_latents") or d_in * reading.value(config, "expansion_factor", int, config_path)
    reading.value({"num_latents": d_sae}, "num_latents", int, config_path)
    skip, transcode = bool(config.get("skip_connection")), bool(config.get("transcode"))
    weights = assembling.renamed(weights_path, reading.safetensors(weights_path), _NAMES | (_SKIP if skip else {}))
    if skip and not transcode:
        # It subtracts b_dec before its encoder, but not before its skip connection: a transcoder with another b_enc.
        wide = {name: tensor.double() for name, tensor in weights.items()}
        weights["b_enc"] = wide["b_enc"] - wide["b_dec"] @ wide["W_enc"]
    found = Found(
        config_path,
        "topk",
        d_in,
        d_sae,
        d_in if skip or transcode else None,
        values={
            "k": reading.value(config, "k", int, config_path),
            "rescale_acts_by_decoder_norm": False,
            "apply_b_dec_to_input": not (skip or transcode),
            "skip_connection": skip,
        },
        metadata=_metadata(config, Path(path), transcode=transcode, skip=skip),
    )
    return assembling.assemble(found, weights, weights_path, device=device, dtype=dtype)


def save(
    sae: SAE, folder: str | Path, *, metadata: dict[str, Any], sparsity: Float[Tensor, " d_sae"] | None = None
) -> None:
    """Write a TopK SAE, or a transcoder between activations of one width.

    Args:
        sae: The SAE; it stays as it is.
        folder: Where to.
        metadata: What it was trained on, under SAELens's names.
        sparsity: Left out: sparsify has no place for it.

    Raises:
        UserError: sparsify cannot say what the SAE is, or a weight is not finite.
    """
    if sae.cfg.architecture != "topk":
        raise writing.refuse(sae, "sparsify", "has TopK alone")
    if sae.d_out != sae.d_in:
        raise writing.refuse(sae, "sparsify", "wants as many outputs as inputs")
    values, weights = writing.folded(sae, "sparsify")
    if not sae.is_transcoder:
        weights = writing.centred(values, weights, wanted=True)
    names = _NAMES | (_SKIP if sae.cfg.skip_connection else {})
    config = {
        "activation": "topk",
        "expansion_factor": max(sae.d_sae // sae.d_in, 1),
        "normalize_decoder": False,  # else its training would normalise the rows anew
        "num_latents": sae.d_sae,
        "k": values["k"],
        "multi_topk": False,
        "skip_connection": sae.cfg.skip_connection,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
        "metadata": writing.record(sae, metadata),
    }
    files = {WEIGHTS: writing.tensors(writing.finished(sae, weights, names))}
    writing.folder(Path(folder), CONFIG, config, files)


def _metadata(config: dict[str, Any], folder: Path, *, transcode: bool, skip: bool) -> dict[str, Any]:
    """Collect what is known of the training: ours from the folder, sparsify's from its run."""
    if isinstance(config.get("metadata"), dict):
        return dict(config["metadata"])
    run_path = folder.absolute().parent / "config.json"
    run = reading.json_object(run_path) if run_path.is_file() else {}
    named = {"model_name": "model", "dataset_path": "dataset", "context_size": "ctx_len"}
    metadata = {name: run[theirs] for name, theirs in named.items() if theirs in run}
    module = folder.absolute().name
    block = _BLOCK.fullmatch(module)
    if block is None and module != "embed_tokens":
        return metadata
    hook = "hook_embed"
    if block is not None:
        hook = f"blocks.{block[1]}.{_OUTPUTS.get(block[2], 'hook_attn_out')}"
    if not transcode:
        return metadata | {"hook_name": hook} | ({"hook_name_out": hook} if skip else {})
    # It reads what its module is given; the folder has the module's path in the model without its head.
    neox = re.search("pythia|neox", str(metadata.get("model_name")))
    root = {"h": "transformer.", "layers": "gpt_neox." if neox else "model."}.get(module.split(".")[0], "")
    return metadata | {"hook_name": f"{root}{module}.input", "hook_name_out": hook}
