"""The typical activation is the mean where a latent is active."""

import pytest
import torch
from small_finished import HOOK
from small_hooked import make

from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer, load_model
from saepipe.reading import Texts
from saepipe.typical import Typical

TEXTS = ["GET /index.html HTTP/1.1", "Dear Sir or Madam,", "def add(a, b):"]


@pytest.fixture(scope="module")
def model() -> HookedSAETransformer:
    return load_model("demo", device="cpu")


def test_it_is_the_mean_where_the_latent_is_active(model: HookedSAETransformer) -> None:
    sae = make(HOOK, 128)
    with torch.no_grad():
        sae.b_enc[:2] = torch.tensor([-1e6, 1e6])
    typical = Typical.measure(model, sae, Texts(model, TEXTS).batches(2))
    every = [sae.encode(model.run_with_cache(text, names_filter=[HOOK])[1][HOOK])[0, 1:] for text in TEXTS]
    f = torch.cat(every).detach()
    assert typical.tokens == len(f)
    assert typical.fired.tolist() == (f > 0).sum(0).tolist()
    for latent in range(1, 24):
        if typical.fired[latent]:
            assert typical.of(latent) == pytest.approx(float(f[:, latent][f[:, latent] > 0].mean()), rel=1e-4)
    assert typical.fired[1] == len(f)
    with pytest.raises(UserError, match=f"latent 0 fired on none of the {len(f)} tokens"):
        typical.of(0)
