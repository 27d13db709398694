import math
from typing import Any

import pytest

from saepipe import saes
from saepipe.saes.config import SAEConfig
from saepipe.targets import TARGETS, judged

GOOD = {
    "tokens": 200_000, "l0": 80.0, "explained_variance": 0.93, "ce_loss_score": 0.99, "dead_fraction": 0.01,
    "dense_fraction": 0.0,
}  # fmt: skip


def cures(architecture: str, *, keys: dict[str, Any] | None = None, **figures: float) -> dict[str, str]:
    cfg = saes.architecture(architecture).config_class(**(keys or {}))
    return {verdict.target.name: verdict.cure for verdict in judged(GOOD | figures, cfg) if not verdict.met}


@pytest.mark.parametrize("architecture", saes.registered())
def test_every_architecture_has_a_cure_for_every_target_that_it_misses(architecture: str) -> None:
    assert cures(architecture) == {}
    bad = {"l0": 900.0, "explained_variance": 0.4, "ce_loss_score": 0.2, "dead_fraction": 0.5, "dense_fraction": 0.1}
    found = cures(architecture, **bad)
    assert found.keys() == {target.name for target in TARGETS}
    assert all("sae." in cure for cure in found.values())


def test_the_direction_is_the_architectures_own() -> None:
    assert cures("topk", keys={"k": 32}, l0=32.0) == {"l0": "raise sae.k (32)"}
    assert cures("standard", keys={"l1_coefficient": 5.0}, l0=32.0) == {"l0": "lower sae.l1_coefficient (5)"}
    assert cures("jumprelu", keys={"l0_coefficient": 1.5}, l0=900.0) == {"l0": "raise sae.l0_coefficient (1.5)"}
    assert "lower sae.k (64)" in cures("batchtopk", keys={"k": 64}, dense_fraction=0.2)["dense_fraction"]
    assert cures("gated", dense_fraction=0.2)["dense_fraction"].endswith("sae=topk")
    assert "raise sae.d_sae (512)" in cures("topk", keys={"d_sae": 512}, ce_loss_score=0.5)["ce_loss_score"]


def test_an_architecture_of_the_users_own_is_told_in_words() -> None:
    own = SAEConfig()
    found = {verdict.target.name: verdict.cure for verdict in judged(GOOD | {"l0": 900.0}, own)}
    assert found["l0"] == "raise what makes sae= sparse"


def test_what_is_already_in_use_is_not_recommended() -> None:
    assert "sae.dead_method=auxk" in cures("topk", keys={"dead_method": "none"}, dead_fraction=0.2)["dead_fraction"]
    found = cures("topk", keys={"dead_method": "auxk"}, dead_fraction=0.2)["dead_fraction"]
    assert "sae.dead_method" not in found
    assert "raise sae.aux_loss_coefficient" in found
    assert "sae.dead_method=resample" in cures("standard", dead_fraction=0.2)["dead_fraction"]


def test_of_few_tokens_more_are_to_be_read_before_latents_are_called_dead() -> None:
    found = cures("topk", tokens=4_000, dead_fraction=0.2)["dead_fraction"]
    assert found.startswith("read more first: evaluate.tokens, since 4,000 miss what is rare; or ")
    assert "read more" not in cures("topk", dead_fraction=0.2)["dead_fraction"]
    assert cures("topk", tokens=4_000) == {}


def test_the_ends_of_a_range_are_in_it_and_what_is_undefined_is_not() -> None:
    assert cures("topk", l0=50.0, explained_variance=0.9, dead_fraction=0.05) == {}
    assert cures("topk", ce_loss_score=math.nan) == {"ce_loss_score": ""}
    assert [target.range for target in TARGETS][:4] == ["50 to 200", "at least 0.9", "at least 0.8", "at most 5%"]
