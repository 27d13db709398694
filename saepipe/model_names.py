"""The names that a language model goes by: TransformerLens' short ones, the hub's, and where one stands for another."""

from functools import cache
from pathlib import Path

_COMMON = {
    "gpt2-small": "gpt2",
    "gpt2": "gpt2",
    "gpt2-medium": "gpt2-medium",
    "gpt2-large": "gpt2-large",
    "gpt2-xl": "gpt2-xl",
}
"""Short name -> hub id. These are asked for most, and TransformerLens' own table costs the seconds of its import."""


def hub_id(name: str) -> str:
    """Return the hub id that a short name of TransformerLens stands for; any other name stays as it is.

    Args:
        name: `gpt2-small`, `gemma-2b`, `pythia-70m` ..., a hub id, a folder or `demo`.
    """
    if name == "demo" or "/" in name or Path(name).expanduser().exists():
        return name
    return _COMMON.get(name.lower()) or _short_names().get(name.lower(), name)


def same(one: str, other: str) -> bool:
    """Say whether two names mean one model, as far as names tell: the owner on the hub may be left out."""
    if _leaf(one) == _leaf(other):
        return True
    return _leaf(hub_id(one)) == _leaf(hub_id(other))


def _leaf(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


@cache
def _short_names() -> dict[str, str]:
    """Read TransformerLens' table, which it keeps from the official names to the others."""
    from transformer_lens.supported_models import MODEL_ALIASES

    return {alias.lower(): official for official, aliases in MODEL_ALIASES.items() for alias in aliases}
