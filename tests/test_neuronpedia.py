"""Addresses of latents' pages."""

import json
import webbrowser
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import small_saes
import torch

from saepipe import neuronpedia, pretrained
from saepipe.errors import UserError
from saepipe.saes.base import SAE


@pytest.fixture
def sae() -> SAE:
    found = small_saes.make("standard")
    found.metadata = {"hook_name": "blocks.8.hook_resid_pre", "neuronpedia_id": "gpt2-small/8-res-jb"}
    return found


def test_a_latent_has_a_page(sae: SAE) -> None:
    assert neuronpedia.page(sae, 12) == "https://www.neuronpedia.org/gpt2-small/8-res-jb/12"
    assert neuronpedia.page("gpt2-small/8-res-jb", 1234).endswith("/gpt2-small/8-res-jb/1234")
    (entry,) = pretrained.list(release="gpt2-small-res-jb", layer=8)
    assert neuronpedia.page(entry, 12) == neuronpedia.page(sae, 12)
    with pytest.raises(UserError, match="latent=24576 is not among the 24576"):
        neuronpedia.page(entry, 24576)


def test_several_latents_have_a_list(sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    address = neuronpedia.open_page(sae, [3, 1], "dates & times")
    assert opened == [address]
    asked = parse_qs(urlsplit(address).query)
    assert asked["name"] == ["dates & times"]
    assert json.loads(asked["features"][0])[0] == {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "3"}
    for one in (3, torch.tensor(3), np.int64(3)):
        assert neuronpedia.open_page(sae, one) == neuronpedia.page(sae, 3)
    assert neuronpedia.open_page(sae, torch.tensor([3, 1]), "dates & times") == address


def test_what_has_no_page_is_refused(sae: SAE) -> None:
    with pytest.raises(UserError, match="latent=48 is not among the 48"):
        neuronpedia.page(sae, 48)
    with pytest.raises(UserError, match="latent=-1"):
        neuronpedia.quick_list(sae, [-1])
    sae.metadata = {"hook_name": "blocks.2.hook_resid_post"}
    with pytest.raises(UserError, match=r"neuronpedia_id=None: the SAE of blocks\.2\.hook_resid_post has no pages"):
        neuronpedia.page(sae, 1)
