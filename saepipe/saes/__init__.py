"""Sparse autoencoders: one file per architecture, found by its name.

To add one, write `saepipe/saes/<name>.py` with a `SAEConfig` whose `architecture` is `<name>` and the `SAE` that uses
it (its `_activate` and `_pass`, see `base.py`), and `conf/sae/<name>.yaml` with a value for each of its own keys.
Nothing else changes; the README has an example.
"""

import importlib
import pkgutil

from saepipe.errors import unknown
from saepipe.saes.base import SAE, Losses, SAEConfig

__all__ = ["SAE", "Losses", "SAEConfig", "architecture", "registered"]

_OTHER_FILES = {"base", "config", "dead", "l1", "ranked", "start", "step", "stored", "token_norm"}


def registered() -> list[str]:
    """Names of the architectures, which are the names of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _OTHER_FILES)


def architecture(name: str) -> type[SAE]:
    """The class of the architecture called `name`.

    Raises:
        UserError: There is no such file; the message names those that come close.
    """
    if name not in registered():
        raise unknown("sae", name, registered())
    module = importlib.import_module(f"{__name__}.{name}")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, SAE)]
    (cls,) = [value for value in found if value.__module__ == module.__name__]
    return cls
