"""Sparse autoencoders on language-model activations: cache, train, evaluate, look at the features."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saepipe.activations_store import ActivationsStore
    from saepipe.hooked import HookedSAETransformer, load_model
    from saepipe.saelens import (
        BatchTopKTrainingSAEConfig,
        GatedTrainingSAEConfig,
        JumpReLUTrainingSAEConfig,
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        MatryoshkaBatchTopKTrainingSAEConfig,
        SAETrainingRunner,
        StandardTrainingSAEConfig,
        TopKTrainingSAEConfig,
    )
    from saepipe.saes.base import SAE

    TrainingSAE = SAE

__all__ = [
    "SAE",
    "ActivationsStore",
    "BatchTopKTrainingSAEConfig",
    "GatedTrainingSAEConfig",
    "HookedSAETransformer",
    "JumpReLUTrainingSAEConfig",
    "LanguageModelSAERunnerConfig",
    "LanguageModelSAETrainingRunner",
    "LoggingConfig",
    "MatryoshkaBatchTopKTrainingSAEConfig",
    "SAETrainingRunner",
    "StandardTrainingSAEConfig",
    "TopKTrainingSAEConfig",
    "TrainingSAE",
    "__version__",
    "load_model",
]
__version__ = "0.1.0"

_MODULES = ("analyze", "cache", "evaluate", "export", "formats", "neuronpedia", "pretrained", "train")
"""What `import saepipe` alone gives, too."""
_ONE_CLASS = "use SAE: it opens every architecture, and says which in sae.cfg.architecture"
_RUNS = "train with python -m saepipe.train, or with SAETrainingRunner"
_ELSEWHERE = {
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


class _NotHereError(ImportError):
    """Of a name of SAELens's: an AttributeError's words would not show in `from saepipe import name`."""


def __getattr__(name: str) -> Any:
    """Import what is behind a public name when it is first used: torch alone takes seconds."""
    if name in ("SAE", "TrainingSAE"):  # one class serves training and inference
        from saepipe.saes.base import SAE

        return SAE
    if name == "ActivationsStore":
        from saepipe.activations_store import ActivationsStore

        return ActivationsStore
    if name in ("HookedSAETransformer", "load_model"):
        from saepipe import hooked

        return getattr(hooked, name)
    if name in __all__:
        from saepipe import saelens

        return getattr(saelens, name)
    if name in _ELSEWHERE:
        raise _NotHereError(f"saepipe has no {name}; {_ELSEWHERE[name]}")
    if name in _MODULES:
        return importlib.import_module(f"saepipe.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
