"""Sparse autoencoders on language-model activations: cache, train, evaluate, look at the features."""

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

_ONE_CLASS = "use SAE: it opens every architecture, and says which in sae.cfg.architecture"
_RUNS = "train with python -m saepipe.train, or with SAETrainingRunner"
_ELSEWHERE = {
    **dict.fromkeys(
        (
            *("StandardSAE", "GatedSAE", "TopKSAE", "JumpReLUSAE", "Transcoder", "SkipTranscoder"),
            *("JumpReLUTranscoder", "JumpReLUSkipTranscoder"),
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
    "SAEConfig": "use saepipe.saes.config.SAEConfig",
    "SAETransformerBridge": "use HookedSAETransformer, which is one class over both",
}
"""Names that SAELens has at its front door -> what to use instead."""


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
        # Not an AttributeError, whose words `from saepipe import name` would not show
        raise ImportError(f"saepipe has no {name}; {_ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
