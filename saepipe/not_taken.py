"""What TransformerLens and SAELens have and we do not, arguments and names, and what to do instead."""

from collections.abc import Iterable, Mapping
from typing import Any

from saepipe.errors import UserError, unknown

_PADDING = "prompts of unequal length are padded on the right and computed as if each were alone; leave it out"
_CHECKPOINT = 'give the revision that the checkpoint has on the hub, such as revision="step1000"'
_QUANTISED = "load the model with transformers, and give it as hf_model, or to load_model"

FORWARD = {
    "attention_mask": _PADDING,
    "padding_side": _PADDING,
    "tokens": "give the token ids as the input",
    "start_at_layer": "put a function that returns the residual stream at blocks.N.hook_resid_pre",
    "past_kv_cache": "generate keeps keys and values by itself where that is exact",
    "shortformer_pos_embed": "models of that kind are not read here",
}
"""Arguments of `forward` -> what to do instead."""
CACHE = FORWARD | {"cache": "the cache that is returned is the same"}
"""Arguments of `run_with_cache`."""
GENERATE = FORWARD | {
    "num_return_sequences": "give the prompt as often as you want it extended",
    "output_logits": "run the model on the tokens that are returned",
    "return_dict_in_generate": "run the model on the tokens that are returned",
    "streamer": "verbose=True shows a bar",
}
"""Arguments of `generate`."""
OPEN = {
    "checkpoint_index": _CHECKPOINT,
    "checkpoint_value": _CHECKPOINT,
    "checkpoint_label": _CHECKPOINT,
    "default_padding_side": _PADDING,
    "first_n_layers": "use stop_at_layer when the model runs",
    "n_ctx": "the context is the model's own; a shorter prompt needs nothing",
    "move_to_device": "give device",
    "refactor_factored_attn_matrices": "it changes no activations of a hook that an SAE reads; leave it out",
    "torch_dtype": "give dtype",
    "cache_dir": "set HF_HOME, which the hub's client reads",
    "token": "log in with `hf auth login`, or set HF_TOKEN",
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "quantization_config": _QUANTISED,
}
"""Arguments of `from_pretrained`."""
STORE = {
    "hook_layer": "hook_name says the layer",
    "hook_head_index": "give the head in hook_name, as blocks.1.attn.hook_z.head.3",
    "d_in": "the model says it",
    "normalize_activations": "an SAE scales raw activations by itself",
    "total_training_tokens": "batches come without end",
    "dataset_trust_remote_code": "it no longer exists in datasets",
    "autocast_lm": 'open the model with dtype="bfloat16"',
    "disable_concat_sequences": "give pack=False",
    "sequence_separator_token": "documents are joined by the end-of-sequence token",
    "activations_mixing_fraction": "half of the buffer is drawn before it is filled again",
    "cached_activations_path": "train from a store on disk with python -m saepipe.train",
    "use_chat_formatting": "give data=DataConfig(chat_template=...)",
    "override_dataset": "give it as dataset",
}
"""Arguments of `ActivationsStore`."""

_ONE_CLASS = "use SAE: it opens every architecture, and says which in sae.cfg.architecture"
_RUNS = "train with python -m saepipe.train, or with SAETrainingRunner"
FRONT_DOOR = {
    **dict.fromkeys(
        (
            *("StandardSAE", "GatedSAE", "TopKSAE", "JumpReLUSAE", "Transcoder", "SkipTranscoder"),
            *("JumpReLUTranscoder", "JumpReLUSkipTranscoder", "PretrainedSaeDiskLoader"),
            "PretrainedSaeHuggingfaceLoader",
        ),
        _ONE_CLASS,
    ),
    **dict.fromkeys(
        (
            *("StandardTrainingSAE", "GatedTrainingSAE", "TopKTrainingSAE", "JumpReLUTrainingSAE"),
            *("BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE", "SAETrainer", "MultiSAETrainingRunner"),
        ),
        _RUNS,
    ),
    "CacheActivationsRunner": "use saepipe.cache.cache",
    "CacheActivationsRunnerConfig": "use saepipe.config.RunConfig with saepipe.cache.cache",
    **dict.fromkeys(
        ("PretokenizeRunner", "PretokenizeRunnerConfig", "pretokenize_runner"),
        "saepipe.cache.cache tokenizes by itself, and keeps the tokens beside the activations",
    ),
    "run_evals": "use saepipe.evaluate.evaluate, whose inclusive_ figures are defined as there",
    "upload_saes_to_huggingface": "use python -m saepipe.export RUN --to hub owner/name",
    **dict.fromkeys(
        (
            *("SAEConfig", "TrainingSAEConfig", "StandardSAEConfig", "GatedSAEConfig", "TopKSAEConfig"),
            *("JumpReLUSAEConfig", "TranscoderConfig", "SkipTranscoderConfig", "JumpReLUTranscoderConfig"),
            "JumpReLUSkipTranscoderConfig",
        ),
        "an SAE's own configuration is sae.cfg; the classes are in saepipe.saes",
    ),
    **dict.fromkeys(
        ("register_sae_class", "register_sae_training_class"),
        "a file in saepipe/saes is an architecture (see the README)",
    ),
    **dict.fromkeys(
        (
            *("AbsTopKSAE", "AbsTopKSAEConfig", "AbsTopKTrainingSAE", "AbsTopKTrainingSAEConfig", "TemporalSAE"),
            *("TemporalSAEConfig", "MatchingPursuitSAE", "MatchingPursuitTrainingSAE", "MatchingPursuitSAEConfig"),
            "MatchingPursuitTrainingSAEConfig",
        ),
        "that architecture is not here; a file in saepipe/saes would be one",
    ),
    "MultiSAEEvaluator": "use saepipe.evaluate.evaluate, run by run",
    "MultiSAETrainingRunnerConfig": _RUNS,
    "get_pretrained_saes_directory": "use saepipe.pretrained.list",
    "get_neuronpedia_quick_list": "use saepipe.neuronpedia.quick_list",
    "SAETransformerBridge": "use HookedSAETransformer, which is one class over both",
}
"""Names that SAELens has at its front door -> what to use instead."""

_NOTHING = {
    "normalize_activations": ("none",),
    "move_to_device": (True,),
    "default_padding_side": ("right",),
    "padding_side": ("right",),
}
"""Names -> values, beside None and False, that ask for what is done anyway."""


def refuse(caller: str, given: Mapping[str, Any], elsewhere: Mapping[str, str], known: Iterable[str]) -> None:
    """Refuse what a method was given beside its own arguments, unless it asks for nothing.

    Args:
        caller: Name of the method.
        given: The further arguments.
        elsewhere: Arguments that another library's method has -> what to do instead.
        known: Names of the method's own arguments, for close matches.

    Raises:
        UserError: There is one.
    """
    for name, value in given.items():
        if name not in elsewhere:
            raise unknown(f"{caller}: argument", name, known)
        if value is not None and value is not False and value not in _NOTHING.get(name, ()):
            shown = f"={value}" if isinstance(value, str | int | float) else ""  # not a tensor, nor a model
            raise UserError(f"{caller}: {name}{shown} is not taken; {elsewhere[name]}")
