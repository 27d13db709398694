"""How a group declares its keys: a range stands beside the default, and what lies outside is refused by key and value.

Such as `tokens: int = key(4_000_000, least=1)` in a `class TrainConfig(Group, group="train")`.
"""

import math
import numbers
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from saepipe.errors import UserError, unknown

T = TypeVar("T")

LARGEST = 2**62
"""Largest number of any key: what PyTorch counts with."""


def key(
    default: T,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    filled: str = "",
    folder: bool = False,
) -> T:
    """Declare a key and what its value is held to; None means "derived" and passes a bound.

    Args:
        default: Value where nothing else is said.
        least: Smallest number allowed.
        above: Bound that a number must exceed.
        most: Largest number allowed.
        choices: The names allowed.
        filled: Refuse an empty text; this is the cure that the message gives.
        folder: Take ~ at the beginning for the home folder, which a shell leaves alone behind a key.
    """
    rules = {"least": least, "above": above, "most": most, "choices": choices, "filled": filled, "folder": folder}
    found: T = field(default=default, metadata=rules)
    return found


@dataclass
class Group:
    """A group of keys, checked when it is made; a subclass inherits the name of its group or gives one."""

    _group: ClassVar[str]

    def __init_subclass__(cls, group: str = "") -> None:
        if group:
            cls._group = group

    def __post_init__(self) -> None:
        """Check the range of every key."""
        for item in fields(self):
            name, value, rule = f"{self._group}.{item.name}", getattr(self, item.name), item.metadata
            if value is None and item.default is None:
                continue
            if rule.get("choices") and value not in rule["choices"]:
                raise unknown(name, value, rule["choices"])
            if (rule.get("filled") or rule.get("folder")) and not isinstance(value, str):
                raise UserError(f"{name}={value} is no text; give it as a string")
            if rule.get("filled") and not value.strip():
                raise UserError(f"{name} is empty; {rule['filled']}")
            if rule.get("folder") and value.startswith("~"):
                with suppress(RuntimeError):  # no user of that name: a folder's own
                    setattr(self, item.name, str(Path(value).expanduser()))
            bounds = (rule.get("least"), rule.get("above"), rule.get("most"))
            if value is not None and bounds != (None, None, None):
                _refuse_out_of_range(name, value, *bounds)


def _refuse_out_of_range(name: str, value: Any, least: float | None, above: float | None, most: float | None) -> None:
    is_number = isinstance(value, numbers.Real)
    if not is_number:
        raise UserError(f"{name}={value!r} is no number; give one, without quotes")
    if not math.isfinite(value) or value > LARGEST:
        raise UserError(f"{name}={value} is no number that can be used; give one up to {LARGEST}")
    if least is not None and not value >= least:
        raise UserError(f"{name}={value} is out of range; give a value of at least {least}")
    if above is not None and not value > above:
        raise UserError(f"{name}={value} is out of range; give a value above {above}")
    if most is not None and not value <= most:
        raise UserError(f"{name}={value} is out of range; give at most {most}")
