"""Published SAEs by the names that the field gives them: list, download, open.

`releases.yaml` beside this file has the names; any hub repository and any local folder can be opened as well.
"""

import argparse
import logging
import re
import sys
from builtins import list as _list
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from saepipe import formats, hub_files
from saepipe.errors import UserError, unknown
from saepipe.hub import local

if TYPE_CHECKING:
    from saepipe.saes.base import SAE

log = logging.getLogger(__name__)

_ALSO = {"gpt2": "gpt2-small"}
"""The hub's name of a model -> the releases'."""
_AXES = ("layer", "width", "size", "trainer")
_WIDTHS = {"1k": 2**10, "2k": 2**11, "4k": 2**12, "8k": 2**13, "16k": 2**14, "32k": 2**15, "65k": 2**16}
_WIDTHS |= {"131k": 2**17, "262k": 2**18, "524k": 2**19, "1m": 2**20}


@dataclass(frozen=True)
class Published:
    """An SAE that somebody published."""

    release: str
    sae_id: str
    """Its name in the release."""
    model: str
    hook: str
    """Hook that it reads."""
    width: int | None
    """Latents; None where the names do not say."""
    l0: float | None
    """Latents active per token, as published."""
    explained_variance: float | None
    """As published."""
    neuronpedia_id: str | None
    """Model and set of its pages on Neuronpedia, such as gpt2-small/8-res-jb."""
    repo: str
    """Hub repository."""
    path: str
    """Folder (or file) in it."""
    norm_scale: float | None = None
    """What its inputs were multiplied by in training, where its folder does not say."""
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)
    """What is known of its training, under SAELens's names."""


class Listing(_list[Published]):
    """Published SAEs, which print as a table."""

    def __str__(self) -> str:
        if not self:
            return "no published SAE"
        names = [item.name for item in fields(Published)][:7]
        rows = [names, *([_shown(getattr(one, name)) for name in names] for one in self)]
        widths = [max(len(row[at]) for row in rows) for at in range(len(names))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)

    __repr__ = __str__


def list(
    search: str = "",
    *,
    release: str | None = None,
    model: str | None = None,
    hook: str | None = None,
    layer: int | None = None,
    width: int | None = None,
) -> Listing:
    """List published SAEs.

    Args:
        search: Words that all must occur somewhere in the line (`"gemma-2-2b resid_post canonical"`).
        release: Name of a release.
        model: Name of a model, also one of its other names (gpt2 and gpt2-small are the same).
        hook: Hook that the SAE reads.
        layer: Number of the decoder block of that hook.
        width: Number of latents.

    Raises:
        UserError: There is no such release, or none for the model; the message lists those that come close.
    """
    found = _entries(release) if release is not None else [one for name in _releases() for one in _entries(name)]
    alike = None if model is None else _models_called(model, {one.model for one in found})
    asked = {"hook": hook, "width": width}
    asked = {key: value for key, value in asked.items() if value is not None}
    return Listing(
        one
        for one in found
        if (alike is None or one.model in alike)
        and all(getattr(one, key) == value for key, value in asked.items())
        and (layer is None or f".{layer}." in one.hook)
        and all(word in f"{one.release} {one.sae_id} {one.model} {one.hook}" for word in search.split())
    )


def load(
    release: str,
    sae_id: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    force_download: bool = False,
) -> "SAE":
    """Open a published SAE; what is downloaded stays in the hub's cache.

    Args:
        release: Name of a release, id of a hub repository, or a local folder.
        sae_id: Which SAE of it: its name in the release, or its folder in the repository. May be left out where there
            is only one.
        device: Where to put it.
        dtype: Type of the weights.
        revision: Branch, tag or commit of the repository.
        force_download: Download again what is in the cache.

    Raises:
        UserError: No such release or SAE (close matches are listed), no access, no network and nothing in the cache
            (what is there is listed), or files that cannot be opened.
    """
    if _resolved(release) is None and (folder := local(release)) is not None:
        return formats.load(folder / (sae_id or ""), device=device, dtype=dtype)
    published = _find(release, sae_id)
    place = hub_files.fetch(published.repo, published.path, revision=revision, again=force_download)
    sae = formats.load(place, device=device, dtype=dtype, norm_scale=published.norm_scale)
    known = {"model_name": published.model, "hook_name": published.hook, "neuronpedia_id": published.neuronpedia_id}
    known |= published.metadata | {"release": published.release, "sae_id": published.sae_id}
    own = {key: value for key, value in sae.metadata.items() if value is not None}
    sae.metadata = {key: value for key, value in known.items() if value} | own
    return sae


def _models_called(name: str, models: set[str]) -> set[str]:
    """Find the models that a name means: the owner on the hub may be left out or given."""
    leaf = _leaf(name)
    found = {model for model in models if _leaf(model) in (leaf, _ALSO.get(leaf))}
    if not found:
        raise unknown("model", name, sorted(models))
    return found


def _leaf(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


def main() -> None:
    """List published SAEs on the command line."""
    parser = argparse.ArgumentParser(prog="python -m saepipe.pretrained", description="List published SAEs.")
    parser.add_argument("words", nargs="*", help="words that all must occur in the line: gemma-2-2b resid_post")
    parser.add_argument("--release", help="name of a release")
    parser.add_argument("--model", help="name of a model")
    given = parser.parse_args()
    from saepipe import entry

    with entry.polite_end():
        sys.stdout.write(f"{list(' '.join(given.words), release=given.release, model=given.model)}\n")


def _find(release: str, sae_id: str | None) -> Published:
    """Find the SAE that two names mean."""
    if _resolved(release) is not None:
        entries = _entries(release)
        if sae_id is None and len(entries) == 1:
            return entries[0]
        found = next((one for one in entries if one.sae_id == sae_id), None)
        if found is None and sae_id is None:
            raise UserError(
                f"sae_id is missing: release={release} has {len(entries):,} SAEs, such as {entries[0].sae_id}; "
                f"saepipe.pretrained.list(release={release!r}) lists them"
            )
        if found is None:
            raise unknown("sae_id", sae_id, [one.sae_id for one in entries], f"It is to be one of release={release}.")
        return found
    if release.count("/") != 1:
        raise unknown("release", release, _releases(), "Or give a hub repository (owner/name) or a local folder.")
    same = [name for name, about in _releases().items() if about["repo"] == release]
    known = next((one for name in same for one in _entries(name) if one.path == sae_id), None)
    return known or Published(release, sae_id or "", "", "", None, None, None, None, release, sae_id or "")


@cache
def _releases() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("releases.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found


def _resolved(release: str) -> str | None:
    """Return a release's own name; None where nothing is called so."""
    if release in _releases():
        return release
    return next((name for name, about in _releases().items() if release in about.get("also", [])), None)


@cache
def _entries(release: str) -> tuple[Published, ...]:
    name = _resolved(release)
    if name is None:
        raise unknown("release", release, _releases())
    about = _releases()[name]
    return tuple(one for family in about["saes"] for one in _members(name, about, family))


def _members(release: str, about: dict[str, Any], family: dict[str, Any]) -> Iterator[Published]:
    """Give each SAE that a family stands for."""
    axes = [axis for axis in _AXES if axis in family]
    places = [dict(zip(axes, values, strict=True)) for values in product(*(_values(family[axis]) for axis in axes))]
    if "l0_of" in family:
        places = [
            {**place, "layer": layer, "l0": l0}
            for place in places
            for layer, several in family["l0_of"].items()
            for l0 in several
        ]
    metadata = about.get("metadata", {}) | ({"compatibility_mode": True} if about.get("hooked") else {})
    for number, place in enumerate(places):
        l0 = place.get("l0", _one_of(family.get("l0"), number))
        words = {**place, "l0": l0}
        sae_id = str(family["id"]).format(**words)
        width: Any = place.get("width", family.get("width"))
        yield Published(
            release=release,
            sae_id=sae_id,
            model=about["model"],
            hook=family["hook"].format(**words),
            width=_WIDTHS.get(width, width),
            l0=l0,
            explained_variance=_one_of(family.get("explained_variance"), number),
            neuronpedia_id=family["neuronpedia"].format(**words) if "neuronpedia" in family else None,
            repo=about["repo"],
            path=str(family.get("path", family["id"])).format(**words),
            norm_scale=_one_of(family.get("norm_scale"), number),
            metadata=metadata,
        )


def _values(axis: Any) -> _list[Any]:
    """Read an axis: a list, one value, or ranges such as 0-5,7."""
    if isinstance(axis, _list):
        return axis
    found: _list[Any] = []
    for part in str(axis).split(","):
        ends = re.fullmatch(r"(\d+)-(\d+)", part)
        found += range(int(ends[1]), int(ends[2]) + 1) if ends else [int(part) if part.isdecimal() else part]
    return found


def _one_of(value: Any, number: int) -> Any:
    return value[number] if isinstance(value, _list) else value


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
