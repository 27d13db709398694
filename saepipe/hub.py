"""Asking the Hugging Face hub first, so that what cannot be had is refused within seconds and in one sentence.

The libraries' own loaders try five times over half a minute before they say that there is no network.
"""

from pathlib import Path
from typing import Literal

from saepipe.errors import UserError

_TIMEOUT_S = 10


class OutOfReachError(UserError):
    """The hub cannot be asked: `why` says what stood in the way."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def local(name: str) -> Path | None:
    """Say which file or folder a name means; None where it can only be a hub id."""
    path = Path(name).expanduser()
    return path.resolve() if path.exists() else None


def offline() -> bool:
    """Say whether the user has switched the network off (`HF_HUB_OFFLINE=1`)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def check(name: str, kind: Literal["model", "dataset"], revision: str | None, *, key: str) -> str | None:
    """Make sure that a hub repository is there, open to the user and reachable.

    With `HF_HUB_OFFLINE` nothing is asked: the loader then finds the repository in the local cache, or fails at once.

    Args:
        name: Hub id.
        kind: What the repository holds.
        revision: Branch, tag or commit; None is the default branch.
        key: Configuration key that holds the name.

    Returns:
        The commit that the revision is at now; None offline.

    Raises:
        UserError: The repository is missing, gated or out of reach.
    """
    from huggingface_hub import HfApi, errors

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}={name} does not exist; give an existing path or a hub id such as owner/name")
    if offline():
        return None
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_S)
        if getattr(info, "gated", False):
            HfApi().auth_check(name, repo_type=kind)
    except errors.GatedRepoError:
        raise UserError(
            f"{key}={name} is gated; accept its licence on its hub page, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{key}={name} is neither a file or folder here nor a {kind} on the hub that you may read; check the name, "
            "or run `hf auth login` or set HF_TOKEN if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{key.split('.')[0]}.revision={revision} is no branch, tag or commit of {name}; leave it out, or give one"
        ) from None
    except Exception as error:  # whatever the HTTP library of this hub version raises without a network
        raise out_of_reach(name, kind, type(error).__name__, key=key) from error
    return info.sha


def out_of_reach(name: str, kind: str, why: str, *, key: str) -> OutOfReachError:
    """Build the error for a repository that is not on this machine while the hub cannot be asked.

    Args:
        name: Hub id.
        kind: `model` or `dataset`.
        why: What stood in the way.
        key: Configuration key that holds the name.
    """
    in_cache = "" if offline() else ", or set HF_HUB_OFFLINE=1 if it is in the local cache already"
    repo_type = "" if kind == "model" else f" --repo-type {kind}"
    return OutOfReachError(
        f"{key}={name} is no file or folder here, and the hub cannot be reached ({why}); run `hf download {name}"
        f"{repo_type}` where there is a network (with HF_TOKEN set if it is private), then give the local "
        f"folder{in_cache}",
        why,
    )


def fault(error: Exception, limit: int = 250) -> str:
    """Put another library's message into one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ..."
