"""Pages of latents on Neuronpedia, for SAEs that have some there: the metadata's `neuronpedia_id` says where."""

import json
import webbrowser
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from saepipe.errors import UserError

if TYPE_CHECKING:
    from saepipe.pretrained import Published
    from saepipe.saes.base import SAE

_SITE = "https://www.neuronpedia.org"


def page(sae: "SAE | Published | str", latent: int) -> str:
    """Return the address of a latent's page.

    Args:
        sae: An SAE whose metadata has a `neuronpedia_id`, an entry of `saepipe.pretrained.list`, or such an id itself:
            `gpt2-small/8-res-jb`.
        latent: Number of the latent.

    Raises:
        UserError: The SAE has no pages there, or no such latent.
    """
    return f"{_SITE}/{quote(_place(sae, [latent]))}/{latent}"


def quick_list(sae: "SAE | Published | str", latents: Iterable[int], name: str = "latents") -> str:
    """Return the address of a list of several latents' pages.

    Args:
        sae: As for `page`.
        latents: Their numbers, in the order in which they are shown.
        name: Title of the list.

    Raises:
        UserError: As `page` does.
    """
    numbers = [int(latent) for latent in latents]
    model, layer = _place(sae, numbers).split("/", 1)
    listed = [{"modelId": model, "layer": layer, "index": str(number)} for number in numbers]
    return f"{_SITE}/quick-list/?{urlencode({'name': name, 'features': json.dumps(listed)})}"


def open_page(sae: "SAE | Published | str", latents: Any, name: str = "latents") -> str:
    """Open a latent's page, or the list of several, in the browser.

    Args:
        sae: As for `page`.
        latents: A latent's number, an integer of torch's or NumPy's too, or several.
        name: Title of the list of several.

    Returns:
        Its address.
    """
    if isinstance(latents, Iterable) and getattr(latents, "ndim", True):  # a tensor of no axis says that it is one
        address = quick_list(sae, [int(latent) for latent in latents], name)
    else:
        address = page(sae, int(latents))
    webbrowser.open(address)
    return address


def _place(sae: "SAE | Published | str", latents: list[int]) -> str:
    """Return the id of the SAE's pages, after checking that it has the latents."""
    from saepipe.pretrained import Published

    place: str | None
    limit: int | None
    if isinstance(sae, str):
        place, known, limit = sae, "", None
    elif isinstance(sae, Published):
        place, known, limit = sae.neuronpedia_id, f" of {sae.hook}", sae.width
    else:
        place, known, limit = sae.metadata.get("neuronpedia_id"), f" of {sae.metadata.get('hook_name')}", sae.d_sae
    if not place or place.count("/") != 1:
        raise UserError(
            f"neuronpedia_id={place}: the SAE{known} has no pages on Neuronpedia that are known here; give the id "
            "itself, such as gpt2-small/8-res-jb"
        )
    for latent in latents:
        if latent < 0 or (limit is not None and latent >= limit):
            raise UserError(f"latent={latent} is not among the {limit} of the SAE; give one from 0 on")
    return str(place)
