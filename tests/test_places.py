"""A hook's name means a place, which the configuration or the paths of the modules tell."""

import pytest
import small_models

from saepipe.places import IN_BLOCK, Place, find, listed, mistyped, paths

MODULES = ["", "model", "model.layers.0", "model.layers.0.input"]


def test_places_need_the_configuration_only() -> None:
    names = listed(small_models.CONFIGS["gpt_neox"]())
    assert "blocks.2.hook_mlp_out" in names
    assert "blocks.2.hook_resid_mid" not in names  # attention and MLP run side by side
    sequential = small_models.CONFIGS["gpt_neox sequential"]()
    leaves = {"hook_resid_pre", "hook_resid_post", "attn.hook_z", "mlp.hook_in", "mlp.hook_post"}
    assert {name.split(".", 2)[2] for name in listed(sequential)} == leaves
    assert listed(sequential)["blocks.1.attn.hook_z"].heads == 4


def test_inside_attention_and_mlp() -> None:
    for kind in IN_BLOCK:
        assert {"blocks.0.attn.hook_z", "blocks.1.mlp.hook_in", "blocks.2.mlp.hook_post"} <= listed(
            small_models.CONFIGS[kind]()
        ).keys()


def test_listed_architectures_are_all_tested() -> None:
    assert IN_BLOCK.keys() <= {config().model_type for config in small_models.CONFIGS.values()}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.0.hook_resid_pre", Place(is_input=True, block=0)),
        ("model", Place("model")),
        ("model.input", Place("model", is_input=True)),
        ("model.layers.0.input", Place("model.layers.0.input")),  # a module of that very name
        ("model.layers.0.input.input", Place("model.layers.0.input", is_input=True)),
        ("", None),
        (".input", None),
        ("input", None),
        ("model.layers.1", None),
    ],
)
def test_find(name: str, place: Place | None) -> None:
    assert find(name, {"blocks.0.hook_resid_pre": Place(is_input=True, block=0)}, MODULES) == place


def test_paths_name_both_sides() -> None:
    assert paths(MODULES[:2]) == ["model", "model.input"]


def test_mistyped() -> None:
    assert mistyped("blocks.1.hook_resid_pots")
    assert not mistyped("blocks.1.hook_resid_post")
    assert mistyped("blocks.1.attn.hook_zz")
    for leaf in ("hook_q", "hook_k", "hook_v", "hook_pre", "hook_in", "hook_out", "hook_result", "hook_pattern"):
        assert not mistyped(f"blocks.1.attn.{leaf}")
