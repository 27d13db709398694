"""Sparse autoencoders on language-model activations: cache, train, evaluate, look at the features."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saepipe.saes.base import SAE

__all__ = ["SAE", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is behind a public name when it is first used: torch alone takes seconds."""
    if name == "SAE":
        from saepipe.saes.base import SAE

        return SAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
