"""What SAELens calls its settings, in versions 3 to 6, and what becomes of each here.

TRANSLATED and RULES say which keys a name stands for, IGNORED why some names have no effect; `translate` applies them.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from saepipe import saes
from saepipe.errors import UserError, unknown
from saepipe.hook_names import with_head
from saepipe.model_names import hub_id

log = logging.getLogger(__name__)

OLD_L1 = 0.01
"""L1 coefficients below this are of the scale that goes with a squared error averaged over d_in (8e-5 and such): they
are multiplied by d_in. With the sum, published values are of order 1."""

DEFAULTS: dict[str, Any] = {
    "model_name": "demo",
    "hook_name": "blocks.0.hook_mlp_out",
    "streaming": True,
    "context_size": 128,
    "training_tokens": 2_000_000,
    "store_batch_size_prompts": 32,
    "n_batches_in_buffer": 20,
    "train_batch_size_tokens": 4096,
    "seed": 42,
    "dtype": "float32",
    "exclude_special_tokens": False,
    "architecture": "standard",
    "expansion_factor": 4,
    "normalize_activations": "none",
    "b_dec_init_method": "zeros",
    "k": 100,
    "dead_feature_window": 1000,
    "wandb_log_frequency": 10,
}
"""Names -> SAELens's values, where ours differ or a rule needs them."""
FIXED: dict[str, Any] = {"optim.grad_clip": 1.0}
"""Our keys -> what SAELens does and has no name for."""
ARCHITECTURES = {"matryoshka_batchtopk": "matryoshka"}
"""SAELens's names of architectures -> ours, where they differ."""
ALIASES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "train_batch_size": "train_batch_size_tokens",
    "store_batch_size": "store_batch_size_prompts",
    "decoder_heuristic_init_norm": "decoder_init_norm",
}
"""Names of earlier versions -> later ones."""

TRANSLATED: dict[str, tuple[str, ...]] = {
    "dataset_path": ("data.path",),
    "streaming": ("data.streaming",),
    "context_size": ("data.context_size",),
    "prepend_bos": ("data.prepend_bos",),
    "cached_activations_path": ("store.dir",),
    "training_tokens": ("store.tokens", "train.tokens"),
    "store_batch_size_prompts": ("store.batch_prompts",),
    "train_batch_size_tokens": ("stream.batch_tokens",),
    "seed": ("store.seed", "stream.seed", "train.seed"),
    "from_pretrained_path": ("train.init_from",),
    "n_checkpoints": ("train.n_checkpoints",),
    "wandb_log_frequency": ("train.log_every_steps",),
    "run_name": ("run.name",),
    "wandb_project": ("logger.project",),
    "wandb_entity": ("logger.entity",),
    "eval_batch_size_prompts": ("evaluate.batch_prompts",),
    **{
        name: (f"optim.{name}",)
        for name in ("lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles")
    },
    "expansion_factor": ("sae.expansion",),
    "jumprelu_init_threshold": ("sae.init_threshold",),
    "jumprelu_bandwidth": ("sae.bandwidth",),
    "jumprelu_sparsity_loss_mode": ("sae.sparsity_loss",),
    "jumprelu_tanh_scale": ("sae.tanh_scale",),
    "jumprelu_ste_to_input": ("sae.ste_to_input",),
    **{
        name: (f"sae.{name}",)
        for name in (
            *("d_sae", "normalize_activations", "apply_b_dec_to_input", "b_dec_init_method", "decoder_init_norm"),
            *("normalize_sae_decoder", "l1_warm_up_steps", "k", "aux_loss_coefficient", "rescale_acts_by_decoder_norm"),
            *("topk_threshold_lr", "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "target_l0"),
        )
    },
}
"""Names whose values pass as they are -> our keys."""

_WHY_IGNORED: dict[str, str] = {
    "the model is read by forward hooks on the Hugging Face model, whatever its class": "model_class_name model_kwargs",
    "hook_name alone is evaluated": "hook_eval",
    "it no longer exists in datasets": "dataset_trust_remote_code",
    "documents are joined by the end-of-sequence token": "sequence_separator_token",
    "activations always go to a store on disk, shuffled as a whole": "use_cached_activations n_batches_in_buffer "
    "activations_mixing_fraction act_store_device prefetch_llm_batches",
    "norms come from the whole store": "n_batches_for_norm_estimate",
    "dead is what did not fire for dead_feature_window steps": "feature_sampling_window dead_feature_threshold",
    "not compiled here": "compile_llm llm_compilation_mode",
    "as torch chooses": "sae_compilation_mode",
    "the same configuration resumes by itself": "resume resume_from_checkpoint",
    "the run's folder always keeps the last checkpoint": "save_final_checkpoint",
    "W&B gets metrics alone, under an id of the run's folder": "wandb_id log_weights_to_wandb "
    "log_activations_store_to_wandb log_optimizer_state_to_wandb",
    "a log level decides it": "verbose",
    "this is saepipe": "sae_lens_version sae_lens_training_version metadata",
    "the penalty is L1, weighed by the norms of decoder rows": "lp_norm scale_sparsity_penalty_by_decoder_norm",
    "the squared error is summed over d_in, as it is": "mse_loss_normalization",
    "no noise is added": "noise_std noise_scale",
    "an encoder always starts as its decoder transposed, in random directions": "init_encoder_as_decoder_transpose "
    "decoder_orthogonal_init",
    "heads are joined where a hook has several": "reshape_activations",
    "steps are sparse where that is faster": "use_sparse_activations",
    "the auxiliary loss is that of the whole width": "use_matryoshka_aux_loss",
    "there is one phase of training": "finetuning_tokens finetuning_method",
}
IGNORED = {name: why for why, names in _WHY_IGNORED.items() for name in names.split()}
"""Names that have no effect -> why."""

Values = Mapping[str, Any]
"""What was given and SAELens's defaults, by name."""


def _hook(name: str, values: Values) -> dict[str, Any]:
    layer = values.get("hook_layer")
    hook = name.format(layer=layer) if "{layer}" in name and layer is not None else name
    if layer is not None and hook.startswith("blocks.") and hook.split(".")[1] != str(layer):
        raise UserError(f"hook_layer={layer} is not the layer of hook_name={hook}; leave hook_layer out")
    return {"model.hooks": [with_head(hook, values.get("hook_head_index"))]}


def _model_options(options: dict[str, Any], values: Values) -> dict[str, Any]:
    known = {"dtype": "dtype", "torch_dtype": "dtype"} | {
        name: name for name in ("n_devices", "device_map", "revision", "trust_remote_code")
    }
    found = {f"model.{known[name]}": _dtype_name(value) for name, value in options.items() if name in known}
    if options.get("center_writing_weights"):
        found["model.compatibility_mode"] = True
    left = [name for name in options if name not in known and name != "center_writing_weights"]
    return found | ({"ignored": f"there is no key for {', '.join(left)}"} if left else {})


def _positions(given: tuple[int | None, ...], values: Values) -> dict[str, Any]:
    kept = range(values["context_size"])[slice(*given)]
    if kept.step != 1 or not kept:
        raise UserError(f"seqpos_slice={given} is no run of positions in a context; give (first, past the last)")
    whole = len(kept) == values["context_size"]
    return {} if whole else {"stream.positions": [kept[0], kept[-1]]}


def _l1(given: float, values: Values) -> dict[str, Any]:
    if not 0 < given < OLD_L1 or "l1_coefficient" not in _keys_of(values):
        return {"sae.l1_coefficient": given}
    d_in = values["d_in"]() if callable(values["d_in"]) else values["d_in"]
    log.info(
        "l1_coefficient=%g is of the scale of a squared error averaged over d_in: with the sum it is %g (times %d)",
        *(given, given * d_in, d_in),
    )
    return {"sae.l1_coefficient": given * d_in}


def _ghost(given: bool, values: Values) -> dict[str, Any]:
    if "rescale_acts_by_decoder_norm" in _keys_of(values):
        return {"ignored": f"{_architecture(values)} revives dead latents by its auxiliary loss"}
    return {"sae.dead_method": "ghost" if given else "none"}


def _dtype(given: Any, values: Values) -> dict[str, Any]:
    name = _dtype_name(given)
    return {"store.dtype": "float32", "trainer.precision": "64-true"} if name == "float64" else {"store.dtype": name}


def _compile(given: bool, values: Values) -> dict[str, Any]:
    if given and saes.architecture(_architecture(values)).sparse_step:
        return {"ignored": f"the sparse step of {_architecture(values)} would only be slower"}
    return {"train.compile": given}


def _exclude(given: bool | list[int], values: Values) -> dict[str, Any]:
    chosen = {"data.exclude_special_tokens": bool(given)}
    return chosen if isinstance(given, bool) else chosen | {"ignored": "special tokens are left out, not those listed"}


RULES: dict[str, Callable[[Any, Values], dict[str, Any]]] = {
    "model_name": lambda name, values: {"model.name": hub_id(name)},
    "model_from_pretrained_kwargs": _model_options,
    "hook_name": _hook,
    "hook_layer": lambda layer, values: {},  # in _hook
    "hook_head_index": lambda head, values: {},  # in _hook
    "architecture": lambda name, values: {"sae.architecture": _architecture(values)},
    "activation_fn": lambda name, values: {},  # in _architecture
    "activation_fn_kwargs": lambda options, values: {"sae.k": options["k"]} if "k" in options else {},
    "d_in": lambda width, values: {},  # checked before a run
    "output_path": lambda folder, values: {},  # written after a run
    "is_dataset_tokenized": lambda given, values: {"data.column": "tokens|input_ids" if given else "text"},
    "disable_concat_sequences": lambda given, values: {"data.pack": not given},
    "use_chat_formatting": lambda given, values: (
        {"data.chat_template": "default", "data.column": "messages|conversation|conversations"} if given else {}
    ),
    "exclude_special_tokens": _exclude,
    "compile_sae": _compile,
    "checkpoint_path": lambda folder, values: {"run.dir": str(folder)},
    "seqpos_slice": _positions,
    "dtype": _dtype,
    "device": lambda name, values: {"model.device": str(name), "trainer.accelerator": str(name).split(":")[0]},
    "llm_device": lambda name, values: {"model.device": str(name)},
    "autocast": lambda given, values: {"trainer.precision": "bf16-mixed"} if given else {},
    "autocast_lm": lambda given, values: {"model.dtype": "bfloat16"} if given else {},
    "adam_beta1": lambda beta, values: {"optim.betas": [beta, values.get("adam_beta2", 0.999)]},
    "adam_beta2": lambda beta, values: {"optim.betas": [values.get("adam_beta1", 0.9), beta]},
    "l1_coefficient": _l1,
    "matryoshka_widths": lambda widths, values: {"sae.matryoshka_widths": list(widths) or None},
    "decoder_heuristic_init": lambda given, values: (
        {} if given or "decoder_init_norm" in values else {"sae.decoder_init_norm": 1.0}
    ),
    "use_ghost_grads": _ghost,
    "dead_feature_window": lambda steps, values: {"sae.dead_after_tokens": steps * values["train_batch_size_tokens"]},
    "log_to_wandb": lambda given, values: {"logger.name": "wandb" if given else "csv"},
    "eval_every_n_wandb_logs": lambda n, values: {"train.evaluate_every_steps": n * values["wandb_log_frequency"]},
    "n_eval_batches": lambda n, values: {
        "evaluate.tokens": n
        * values.get("eval_batch_size_prompts", values["store_batch_size_prompts"])
        * values["context_size"]
    },
}
"""Names whose values are worked out -> how: our keys, and under `ignored` why it has no (whole) effect."""
KNOWN = [*TRANSLATED, *RULES, *ALIASES, *IGNORED]
LOGGING = (
    "log_to_wandb",
    "wandb_project",
    "wandb_entity",
    "run_name",
    "wandb_log_frequency",
    "eval_every_n_wandb_logs",
)
"""Those that say what is logged, and where to."""


def names_of(architecture: str) -> list[str]:
    """List the names that mean something to an architecture's SAEs, by SAELens's name of it."""
    own = _keys_of({"architecture": architecture})
    passed = {name: keys[0] for name, keys in TRANSLATED.items()} | {
        name: f"sae.{name}" for name in ("l1_coefficient", "matryoshka_widths")
    }
    return ["d_in", *(name for name, key in passed.items() if key.removeprefix("sae.") in own and key[:4] == "sae.")]


def _architecture(values: Values) -> str:
    """Tell the architecture: before version 6, TopK was standard with another activation function."""
    name, function = values["architecture"], values.get("activation_fn", values["architecture"])
    name = ARCHITECTURES.get(name, name)
    if function == "topk" and name in ("standard", "topk"):
        return "topk"
    if name not in saes.registered():
        raise unknown("architecture", name, [*saes.registered(), *ARCHITECTURES])
    if "activation_fn" in values and function != "relu":
        raise UserError(f"activation_fn={function} does not go with architecture={name}; leave it out")
    return name


def _keys_of(values: Values) -> set[str]:
    return {item.name for item in fields(saes.architecture(_architecture(values)).config_class)}


def _dtype_name(given: Any) -> Any:
    return str(given).removeprefix("torch.") if "torch." in str(given) else given


def translate(given: Values, d_in: Callable[[], int]) -> tuple[dict[str, Any], dict[str, str]]:
    """Turn SAELens's names into our keys.

    Args:
        given: What a user gave, by name; what is None was not given.
        d_in: Finds the width of the activations, where it is needed and not given.

    Returns:
        Our dotted keys -> their values; and the given names that have no effect, or not all of it -> why.

    Raises:
        UserError: A value that nothing here stands for, or data is missing for a model.
    """
    if given.get("model_name", "demo") != "demo" and not given.get("dataset_path"):
        raise UserError(f"dataset_path is missing; give the data for model_name={given['model_name']} to read")
    values = {"d_in": d_in, **DEFAULTS, **given}
    if "d_sae" in given and "expansion_factor" not in given:
        del values["expansion_factor"]
    own = {f"sae.{name}" for name in _keys_of(values)}
    keys, ignored = dict(FIXED), {name: IGNORED[name] for name in given if name in IGNORED}
    for name in (*TRANSLATED, *RULES):
        if name not in values:
            continue
        value = str(values[name]) if isinstance(values[name], Path) else values[name]
        found = dict.fromkeys(TRANSLATED[name], value) if name in TRANSLATED else RULES[name](value, values)
        why = found.pop("ignored", None)
        if foreign := [key for key in found if key.startswith("sae.") and key not in own]:
            found, why = {}, f"{_architecture(values)} has no {foreign[0]}"
        keys |= found
        if why and name in given:
            ignored[name] = why
    return keys, ignored
