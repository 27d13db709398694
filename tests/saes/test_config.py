import pytest

from saepipe.errors import UserError
from saepipe.saes.standard import StandardConfig
from saepipe.saes.topk import TopKConfig


def test_width_is_d_sae_or_expansion_or_the_default() -> None:
    assert StandardConfig(d_sae=100).resolve(16) == 100
    assert (
        StandardConfig(d_sae=100, expansion=4).resolve(16) == 100
    )  # an experiment's expansion yields to a typed width
    assert StandardConfig(expansion=4).resolve(16) == 64
    assert StandardConfig().resolve(16) == 128


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"d_sae": 0}, ["sae.d_sae=0", "at least 1"]),
        ({"expansion": -2}, ["sae.expansion=-2"]),
        ({"normalize_activations": "layer_norm"}, ["sae.normalize_activations=layer_norm", "expected_average_only_in"]),
        ({"mse_reduction": "men"}, ["sae.mse_reduction=men", "mean"]),
        ({"decoder_init_norm": 0.0}, ["sae.decoder_init_norm=0.0", "above 0"]),
        ({"dead_after_tokens": 0}, ["sae.dead_after_tokens=0"]),
        ({"b_dec_init_method": "median"}, ["sae.b_dec_init_method=median", "geometric_median"]),
        ({"dead_method": "auxk"}, ["sae.dead_method=auxk", "none, ghost, resample"]),
        ({"resample_every_steps": 0}, ["sae.resample_every_steps=0"]),
        ({"resample_times": 0}, ["sae.resample_times=0"]),
        ({"resample_scale": 0.0}, ["sae.resample_scale=0.0", "above 0"]),
        ({"architecture": "topk"}, ["sae.architecture=topk", "sae=topk"]),
        ({"l1_coefficient": -1.0}, ["sae.l1_coefficient=-1.0"]),
        ({"l1_warm_up_steps": -1}, ["sae.l1_warm_up_steps=-1"]),
    ],
)
def test_impossible_values_are_refused_by_key(values: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        StandardConfig(**values)
    assert all(word in str(caught.value) for word in words), caught.value


def test_dead_latents_are_resampled_some_times_and_then_no_more() -> None:
    config = StandardConfig(dead_method="resample", resample_every_steps=10, resample_times=3)
    assert [step for step in range(100) if config.resamples(step)] == [10, 20, 30]
    assert not any(StandardConfig(resample_every_steps=10).resamples(step) for step in range(100))


def test_the_ranked_architectures_alone_have_auxk_and_have_it_by_default() -> None:
    assert TopKConfig().dead_method == "auxk"
    assert TopKConfig(dead_method="ghost").dead_method == "ghost"
    assert StandardConfig().dead_method == "none"
