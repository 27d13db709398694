"""A folder or file of a hub repository, downloaded into the hub's own cache, or found there without a network."""

import logging
from pathlib import Path
from typing import Any

from saepipe import hub
from saepipe.errors import UserError, unknown

log = logging.getLogger(__name__)


def fetch(repo: str, path: str, *, revision: str | None = None, again: bool = False) -> Path:
    """Make sure that a part of a repository is on this machine.

    `HF_HUB_OFFLINE=1`, `HF_TOKEN`, `HF_HOME` work as everywhere; without a network, what is in the cache is used.

    Args:
        repo: Hub id.
        path: Folder or file in it; empty is what lies at its top.
        revision: Branch, tag or commit.
        again: Download what is in the cache already.

    Returns:
        Where it is.

    Raises:
        UserError: The repository or the part is not there, closed to the user, or out of reach and not in the cache.
    """
    try:
        hub.check(repo, "model", revision, key="release")
        if not hub.offline():
            return _download(repo, path, revision, again)
        why = "HF_HUB_OFFLINE is set"
    except hub.OutOfReachError as error:
        why = error.why
    found = _cached(repo, path, revision)
    if found is None:
        there = ", ".join(one.repo_id for one in _repositories())
        there = f"which has {there}" if there else "which is empty"
        part = f' --include "{path}/*"' if path else ""
        raise UserError(
            f"{repo}{f', {path},' if path else ''} is not in the hub's cache on this machine, {there}, and the hub "
            f"cannot be reached ({why}); run `hf download {repo}{part}` where there is a network, and give the local "
            "folder"
        )
    log.info("the hub is not asked (%s): %s %s is as the cache has it", why, repo, path)
    return found


def _download(repo: str, path: str, revision: str | None, again: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    names = HfApi().list_repo_files(repo, revision=revision)
    wanted = [name for name in names if name == path or name.startswith(f"{path}/")]
    if not path:
        wanted = [name for name in names if "/" not in name]
    if not wanted:
        folders = sorted({name.rpartition("/")[0] for name in names} - {""})
        raise unknown("sae_id", path, folders or names, f"It is to be a folder of release={repo}.")
    root = snapshot_download(repo, revision=revision, allow_patterns=wanted, force_download=again)
    return Path(root) / path


def _cached(repo: str, path: str, revision: str | None) -> Path | None:
    """Find a part in the cache as it is, since the client asks for all of a repository or for none."""
    for found in _repositories():
        if found.repo_id == repo:
            for version in found.revisions:
                if (revision or "main") in (version.commit_hash, *version.refs):
                    place: Path = version.snapshot_path / path
                    return place if place.exists() else None
    return None


def _repositories() -> list[Any]:
    """List the model repositories in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return sorted(
            (found for found in scan_cache_dir().repos if found.repo_type == "model"), key=lambda one: one.repo_id
        )
    except CacheNotFound:
        return []
