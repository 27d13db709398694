"""The error that a user's input can raise, and the ways to word it."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right: the message names the key, the value and the cure in one sentence.

    The command line prints the message alone and exits with code 2; in Python it is a `ValueError`.
    """


class DamageError(UserError):
    """A file that is not as it was written: `path`, `what` is wrong with it, and the cure."""

    def __init__(self, path: Path, what: str, cure: str) -> None:
        super().__init__(f"{path} {what}; {cure}")
        self.path = path
        self.what = what


def unknown(key: str, value: object, choices: Iterable[str], cure: str = "", *, prefix: str = "") -> UserError:
    """Build the error for a name that is not among the known ones, with the close matches first.

    Args:
        key: Configuration key or argument that held the name.
        value: The name that was given.
        choices: The names that exist.
        cure: What to do where none of the choices is meant.
        prefix: What stands before the value and before each choice.
    """
    names = list(choices)
    close = difflib.get_close_matches(str(value), names, n=5, cutoff=0.5)
    listed = ", ".join(prefix + name for name in close or names[:20]) + (
        "" if close or len(names) <= 20 else f", ... ({len(names)} in all)"
    )
    question = f"did you mean {listed}?" if close else f"choose from {listed}" + ("." if cure else "")
    return UserError(f"{key}={prefix}{value} is not known; {question}{' ' + cure if cure else ''}")


@contextmanager
def explained(key: str) -> Iterator[None]:
    """Name the key whose value a block is about, where its error does not.

    Args:
        key: Dotted key.
    """
    try:
        yield
    except UserError as error:
        if key in str(error):
            raise
        raise UserError(f"{key}: {error}") from error


@contextmanager
def explained_memory(stage: str, **lower: int | str) -> Iterator[None]:
    """Turn running out of memory, on a GPU or the host, into a `UserError` that names the keys to lower.

    Args:
        stage: What ran out, for the message.
        **lower: Key (with `__` for the dot) -> its value now, of which half is suggested; or the value to suggest.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
        if not (isinstance(error, MemoryError) or any(word in text for word in words)):
            raise
        values = {key: value if isinstance(value, str) else max(1, value // 2) for key, value in lower.items()}
        tries = " or ".join(f"{key.replace('__', '.')}={value}" for key, value in values.items())
        raise UserError(f"{stage} ran out of memory; try {tries}") from error
