"""A hook's name may end with one of its heads: `blocks.3.attn.hook_z.head.7` is head 7 of `blocks.3.attn.hook_z`."""

import re

_HEAD = re.compile(r"(.*\bhook_\w+)\.head\.(0|[1-9][0-9]*)")


def split_head(name: str) -> tuple[str, int | None]:
    """Part a name into the hook point and the head; the head is None where the name selects none."""
    found = _HEAD.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def with_head(hook: str, head: int | None) -> str:
    """Put together what `split_head` parts."""
    return hook if head is None else f"{hook}.head.{head}"
