"""What a grid expands to: the runs, folders and configurations that a sweep would have."""

from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from saepipe import entry, grid, saes
from saepipe.config import RunConfig
from saepipe.errors import UserError

TOPK = ["sae=topk", "run.dir=runs/x", "train.tokens=4096"]


def composed(*overrides: str) -> RunConfig:
    return entry.load_config("train", [*TOPK, *overrides])


def folders(*overrides: str) -> list[str]:
    return [point.run.dir for point in grid.points(composed(*overrides))]


def swept(*overrides: str) -> list[list[str]]:
    """What `-m` makes of the same values: the overrides of each point."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(point) for point in BasicSweeper.split_arguments(parsed, None)[0]]


def test_without_a_grid_the_run_is_the_only_point() -> None:
    for overrides in ([], ["grid={}"]):
        config = composed(*overrides)
        assert grid.points(config) == [config]
        assert config.run.dir == "runs/x"


def test_a_grid_is_the_product_of_its_lists() -> None:
    points = grid.points(composed("grid.k=[1,2,4]", "grid.lr=[0.1,0.2]", "grid.hook=[a,b]"))
    found = [(point.sae.k, point.optim.lr, point.stream.hook) for point in points]
    assert found == [(k, lr, hook) for k in (1, 2, 4) for lr in (0.1, 0.2) for hook in ("a", "b")]
    assert len({point.run.dir for point in points}) == len(points)


@pytest.mark.parametrize("overrides", [["grid={k: [1,2], lr: [0.1]}"], ["+grid.k=[1,2]", "++grid.lr=[0.1]"]])
def test_a_grid_may_be_written_in_other_ways(overrides: list[str]) -> None:
    assert grid.points(composed(*overrides)) == grid.points(composed("grid.k=[1,2]", "grid.lr=[0.1]"))
    assert folders(*overrides) == ["runs/x/optim.lr=0.1,sae.k=1", "runs/x/optim.lr=0.1,sae.k=2"]


@pytest.mark.parametrize(
    ("architecture", "lists"),
    [
        ("topk", {"sae.k": "1,2", "optim.lr": "1e-3,0.00001,2", "stream.hook": "a.b/c,d"}),
        ("topk", {"optim.betas": "[0.9,0.99],[0, 0.5]", "optim.grad_clip": "null,1.5"}),
        ("standard", {"sae.l1_coefficient": "1,2.5,3e2", "sae.normalize_sae_decoder": "true,false"}),
        ("jumprelu", {"sae.sparsity_loss": "step,tanh", "sae.d_sae": "16,32", "sae.target_l0": "4"}),
        ("matryoshka", {"sae.matryoshka_widths": "[1,2],[1, 3]", "sae.k": "1.5,2"}),
    ],
)
def test_the_points_are_those_of_a_sweep_in_the_same_folders(architecture: str, lists: dict[str, str]) -> None:
    """The folders that `-m` gives are `k=v,k=v` of its points' overrides, sorted, without slashes."""
    groups = [f"grid.{key.split('.')[1]}=[{values}]" for key, values in lists.items()]
    points = grid.points(composed(f"sae={architecture}", *groups))
    alone = swept(*(f"{key}={values}" for key, values in lists.items()))
    assert [point.run.dir for point in points] == [
        f"runs/x/{','.join(sorted(overrides)).replace('/', '_')}" for overrides in alone
    ]
    for point, overrides in zip(points, alone, strict=True):
        typed = composed(f"sae={architecture}", *overrides, f"run.dir={point.run.dir}")
        assert set(entry.differences(point, typed)) <= {"overrides"}
        assert type(point.sae) is saes.architecture(architecture).config_class
        # The same keys count as typed, and whoever types them gets the same run.
        assert point.overrides == [*TOPK, f"sae={architecture}", *overrides]
        assert not point.grid


def test_the_run_itself_stays_as_it_is() -> None:
    config = composed("grid.k=[1,2]", "grid.lr=[0.5]", "sae.k=7")
    grid.points(config)
    assert (config.sae.k, config.optim.lr, config.run.dir) == (7, 3e-4, "runs/x")
    assert config.grid == {"k": [1, 2], "lr": [0.5]}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grid.kk=[1]", "key=grid.kk is not known; did you mean grid.k"),
        ("grid.l1_coefficient=[1]", "key=grid.l1_coefficient is not known; "),  # another architecture's
        ("grid.architecture=[topk,gated]", "key=grid.architecture is not known; choose from grid.hook, grid.d_sae"),
        ("grid.batch_tokens=[64]", "key=grid.batch_tokens is not known"),
        ("grid={kk: [1]}", "key=grid.kk is not known; did you mean grid.k"),
        ("grid.k=[]", "grid.k=[] names no value; give some, or leave it out"),
        ("grid.k=[1,2,1]", "has the point sae.k=1 twice; give each value once"),
        ("grid.lr=[1e-3,2,0.001]", "has the point optim.lr=0.001 twice"),
        ("grid.lr=[1,1.0]", "has the point optim.lr=1.0 twice"),
        ("grid.k=[0]", "sae.k=0 is out of range; give a value of at least 1"),
        ("grid.k=[1,x]", "grid: sae.k=x does not fit"),
        ("grid.k=[1,null]", "grid: sae.k=None does not fit"),
        ("grid.k=[1.5]", "grid: sae.k=1.5 does not fit"),
        ("grid.lr=[0.1,-1]", "optim.lr=-1.0 is out of range"),
        ("grid.dead_method=[none,ghosts]", "sae.dead_method=ghosts is not known; did you mean ghost"),
        ("grid.k=3", "grid.k=3 does not fit: a grid takes keys without their group, and lists; write grid.k=[3]"),
        ("grid.sae.k=[1,2]", "write grid.k=[1,2]"),
        ("grid.k={a: 1}", "grid.k={a: 1} does not fit"),
        ("grid={k: 3}", "grid={k: 3} does not fit"),
        ("grid=3", "grid=3 does not fit"),
    ],
)
def test_a_mistake_is_one_sentence_as_soon_as_the_run_is_composed(override: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        composed(override)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_a_later_value_makes_impossible_is_refused_as_well() -> None:
    with pytest.raises(UserError, match=r"sae\.target_l0=null does not go with sae\.sparsity_loss=quadratic"):
        composed("sae=jumprelu", "grid.sparsity_loss=[step,quadratic]")


@pytest.mark.parametrize("name", saes.registered())
def test_every_key_of_the_architecture_has_its_group(name: str) -> None:
    config = composed(f"sae={name}")
    keys: dict[str, Any] = {**vars(config.sae), **dict.fromkeys(vars(config.optim))}
    del keys["architecture"]
    for key in keys:
        group, _, rest = grid.full_key(key, config.sae).partition(".")
        assert hasattr(getattr(config, group), rest)
    assert grid.full_key("hook", config.sae) == "stream.hook"
