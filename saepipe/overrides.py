"""Overrides as people type them, put into the words of Hydra's grammar."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

_OPEN = ("grid", "slurm.stages.", "slurm.environment.", "slurm.sbatch_args.")
"""What keys begin with that are nowhere written down, which Hydra wants to be told with two plus signs."""
_TAKEN_APART = re.compile(
    r"""["'].*["']|[\[{].*|(bool|choice|extend_list|float|glob|int|interval|json_str|range|shuffle|sort|str|tag)\(.*""",
    re.DOTALL,
)
"""Values that Hydra's grammar takes apart itself: what is quoted, lists, dictionaries and its functions."""
_PLAIN_LIST = re.compile(r"""\[([^][{}()'"$]*)\]""")
"""A list whose items are as they are meant, such as the folders of runs."""


def arguments(given: Sequence[str]) -> list[str]:
    """Put flags first: argparse, which Hydra uses, takes no `-m` between two overrides."""
    flags = [argument for argument in given if argument in ("-m", "--multirun", "-h", "--help")]
    return [*flags, *(quoted(argument) for argument in given if argument not in flags)]


def quoted(override: str) -> str:
    """Quote a value that Hydra's grammar would trip over, such as the folder of a sweep's point, `runs/x/sae.k=16`."""
    key, equals, value = override.partition("=")
    if key.startswith(_OPEN):
        return f"++{override}"
    if plain := _PLAIN_LIST.fullmatch(value):
        return f"{key}=[{','.join(_quoted_text(item.strip()) for item in plain[1].split(','))}]"
    if not equals or _TAKEN_APART.fullmatch(value):
        return override
    return f"{key}={_quoted_text(value)}"


def _quoted_text(value: str) -> str:
    """Put quotation marks around what the grammar would not take for a text, but for a comma, which makes a sweep."""
    if "=" not in value and not re.search(r"[^\w./:+*\\@%?|,$-]", value, re.ASCII):
        return value
    # Before a quotation mark, the grammar reads two backslashes as one; elsewhere each is itself
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides as Hydra does."""
    return OverridesParser.create().parse_overrides([quoted(override) for override in overrides])
