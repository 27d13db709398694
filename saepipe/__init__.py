"""Sparse autoencoders on language-model activations: cache, train, evaluate, look at the features."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saepipe.hooked import HookedSAETransformer, load_model
    from saepipe.saes.base import SAE

__all__ = ["SAE", "HookedSAETransformer", "__version__", "load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is behind a public name when it is first used: torch alone takes seconds."""
    if name == "SAE":
        from saepipe.saes.base import SAE

        return SAE
    if name in ("HookedSAETransformer", "load_model"):
        from saepipe import hooked

        return getattr(hooked, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
