"""Give an SAE to other libraries: `python -m saepipe.export RUN OUT --to saelens|dictionary_learning|sparsify|hub`.

RUN is the folder of a finished run, or an SAE in any format that saepipe reads. OUT is a folder, or a hub repository
(owner/name) with `--to hub`, which also gets a model card.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from saepipe import durable, entry
from saepipe.errors import UserError, unknown
from saepipe.runs import Run

if TYPE_CHECKING:
    from saepipe.saes.base import SAE

log = logging.getLogger(__name__)

HUB = "hub"
_MADE_BY = ("model", "data", "store", "stream", "sae", "optim", "train")
"""Groups of a run's configuration that decide its SAE."""
CARD = "README.md"


def export(
    run: str | Path,
    out: str | Path,
    *,
    to: str = "saelens",
    format: str = "saelens",
    path: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Write an SAE in a format of another library, or publish it on the hub.

    Args:
        run: Folder of a finished run, or an SAE in any format.
        out: Folder to write to; with `to="hub"` a repository, which is made where it does not exist.
        to: One of `formats.WRITTEN`, or hub.
        format: Format of the files on the hub.
        path: Folder in the repository; None is the name of the hook.
        private: Make a new repository private.
        revision: Branch of the repository to write to; None is its main one.

    Returns:
        The folder, or the address of the SAE on the hub.

    Raises:
        UserError: There is no such SAE, the format cannot say what it is, OUT holds something else, or the hub refuses.
    """
    from saepipe import formats

    if to not in (*formats.WRITTEN, HUB):
        raise unknown("--to", to, [*formats.WRITTEN, HUB])
    sae, about = _opened(Path(run))
    if to == HUB:
        return _publish(sae, about, str(out), format, path, private, revision)
    folder = Path(out)
    with durable.disk_errors("OUT", folder):
        if folder.is_file() or (not _is_empty(folder) and not _holds(folder, to)):
            raise UserError(f"{folder} holds something else than a {to} SAE; give a new folder")
        durable.remove_stale(folder)
        formats.save(sae, folder, format=to)
        _write_card(sae, about, folder, format=to)
    log.info("%s: a %s SAE of %s latents, as %s has it", folder, sae.cfg.architecture, f"{sae.d_sae:,}", to)
    return str(folder)


def _opened(run: Path) -> tuple["SAE", dict[str, Any]]:
    """Open an SAE, and find what its run knows of it."""
    from saepipe import formats

    found = Run(run)
    if not found.config_file.is_file():
        return formats.load(run), {}
    if found.summary() is None:
        raise UserError(f"{run} is not finished; go on with the same train command as before, then come back")
    measured = run / "eval" / "metrics.json"
    metrics = json.loads(measured.read_text()) if measured.is_file() else None
    return found.load_sae(), {"metrics": metrics, "config": _public(found.config_file)}


def _public(path: Path) -> str:
    """Take from a run's configuration what made the SAE, and leave out where and by whom."""
    kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups = {name: dict(kept[name]) for name in _MADE_BY}
    groups["store"].pop("dir", None)
    said = {name: {key: value for key, value in group.items() if value is not None} for name, group in groups.items()}
    for group in said.values():
        group |= {key: Path(value).name for key, value in group.items() if str(value).startswith(("/", "~"))}
    return yaml.safe_dump(said, sort_keys=False)


def _is_empty(folder: Path) -> bool:
    """Say whether nothing is in a folder, or only what an export that was killed had begun to write."""
    return not folder.is_dir() or all(durable.is_temporary(path) for path in folder.iterdir())


def _holds(folder: Path, to: str) -> bool:
    from saepipe import formats

    try:
        return formats.detect(folder) == to
    except UserError:
        return False


def _write_card(sae: "SAE", about: dict[str, Any], folder: Path, **where: Any) -> None:
    from saepipe.model_card import OURS, model_card

    card = folder / CARD
    if card.is_file() and OURS not in card.read_text(encoding="utf-8", errors="replace"):
        log.warning("%s is not by saepipe, and stays as it is", card)
        return
    durable.write_text(card, model_card(sae, **where, **about))


def _publish(
    sae: "SAE", about: dict[str, Any], repo: str, format: str, path: str | None, private: bool, revision: str | None
) -> str:
    """Upload an SAE with its card, in one commit."""
    from huggingface_hub import HfApi

    from saepipe import formats, hub

    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise UserError(f"OUT={repo} is no hub repository; give owner/name")
    if hub.offline():
        raise UserError(f"OUT={repo} cannot be uploaded while HF_HUB_OFFLINE is set; unset it")
    inside = (sae.metadata.get("hook_name") or "sae") if path is None else path.strip("/")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        formats.save(sae, folder / inside, format=format)
        _write_card(sae, about, folder, format=format, repo=repo, path=inside)
        try:
            HfApi().create_repo(repo, private=private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=f"Add {inside or 'an SAE'}"
            )
        except Exception as error:  # whatever the HTTP library of this hub version raises
            raise UserError(
                f"OUT={repo} does not take the SAE ({hub.fault(error)}); where it is not the network, run `hf auth "
                "login` or set HF_TOKEN to a token that may write there"
            ) from error
    address = f"{repo}/{inside}".rstrip("/")
    log.info('%s is on the hub: SAE.from_pretrained("%s", "%s")', address, repo, inside)
    return address


def main() -> None:
    """Run the verb from the command line."""
    from saepipe.formats import WRITTEN

    parser = argparse.ArgumentParser(
        prog="python -m saepipe.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, or an SAE in any format")
    parser.add_argument("out", metavar="OUT", help="folder to write to, or owner/name on the hub")
    parser.add_argument("--to", default="saelens", choices=(*WRITTEN, HUB), help="format, or hub (default: saelens)")
    parser.add_argument("--format", default="saelens", choices=WRITTEN, help="format of the files on the hub")
    parser.add_argument("--path", help="folder in the repository (default: the hook's name)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch of the repository to write to")
    given = parser.parse_args()
    entry.prepare_process()
    with entry.polite_end():
        export(**vars(given))


if __name__ == "__main__":
    main()
