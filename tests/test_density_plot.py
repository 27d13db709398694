import re

import pytest

from saepipe.density_plot import density_plot


def test_every_latent_is_counted_once() -> None:
    densities = [0.0] * 5 + [1e-6, 0.001, 0.0011, 0.5, 1.0]  # 1e-6 is below what 1000 tokens can tell
    told = re.findall(r"<title>([\d,]+) latents (are dead|with a density)", density_plot(densities, 1000))
    assert ("5", "are dead") in told
    assert sum(int(count) for count, kind in told if kind == "with a density") == 5


@pytest.mark.parametrize("tokens", [0, 1])
def test_nothing_was_read(tokens: int) -> None:
    assert "2 latents are dead" in density_plot([0.0, 0.0], tokens)
