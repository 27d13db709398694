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

_MODULES = (
    "analyze",
    "attribute",
    "cache",
    "contrast",
    "evaluate",
    "export",
    "formats",
    "neuronpedia",
    "pretrained",
    "steer",
    "train",
)
"""What `import saepipe` alone gives, too."""


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
    if name in _MODULES:
        return importlib.import_module(f"saepipe.{name}")
    if name in (elsewhere := importlib.import_module("saepipe.not_taken").FRONT_DOOR):
        raise _NotHereError(f"saepipe has no {name}; {elsewhere[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
