"""What a command line's sweep comes to, before anything is submitted."""

import pytest

from launch import points
from saepipe.errors import UserError

DEMO = "+experiment=demo"


def folders(*overrides: str) -> list[str]:
    return [config.run.dir for config in points.load(overrides)[0]]


def test_one_run_is_its_own_folder() -> None:
    configs, root = points.load([DEMO])
    assert [config.run.dir for config in configs] == ["runs/demo"] == [str(root)]


def test_points_are_the_product_of_what_is_swept_in_the_folders_of_a_multirun() -> None:
    configs, root = points.load([DEMO, "sae.k=8,16", "optim.lr=1e-3,2e-3"])
    names = ["lr=0.001,sae.k=8", "lr=0.002,sae.k=8", "lr=0.001,sae.k=16", "lr=0.002,sae.k=16"]
    assert [config.run.dir for config in configs] == [f"runs/demo/optim.{name}" for name in names]
    assert [(config.sae.k, config.optim.lr) for config in configs] == [(8, 1e-3), (8, 2e-3), (16, 1e-3), (16, 2e-3)]
    assert str(root) == "runs/demo"
    assert configs[1].overrides == [DEMO, "sae.k=8", "optim.lr=0.002"]


def test_a_sweep_by_name_is_overridden_by_what_is_typed() -> None:
    assert len(folders(DEMO, "+sweep=k_grid")) == 4
    assert folders(DEMO, "+sweep=k_grid", "sae.k=3,4") == ["runs/demo/sae.k=3", "runs/demo/sae.k=4"]
    assert folders(DEMO, "+sweep=k_grid", "sae.k=3") == ["runs/demo"]


def test_fused_points_are_a_grid_in_one_job() -> None:
    configs, root = points.load([DEMO, "sae.k=8,16", "stream.hook=a,b", "fused=true"])
    assert len(configs) == 1
    assert configs[0].grid == {"k": [8, 16], "hook": ["a", "b"]}
    assert configs[0].run.dir == str(root) == "runs/demo"
    with pytest.raises(UserError, match=r"fused=true does not go with a sweep over store\.tokens"):
        points.load([DEMO, "store.tokens=1000,2000", "fused=true"])
    with pytest.raises(UserError, match="fused=true does not go with a sweep over sae:"):
        points.load([DEMO, "sae=topk,batchtopk", "fused=true"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sae.k=8,0", "sae.k=0 is out of range"),
        ("sae.kk=8,9", "did you mean sae.k"),
        ("sae.k=8,x", "k does not fit"),
        ("+sweep=none", "sweep=none is not known"),
        ("slurm=none", "slurm=none is not known"),
        (
            "slurm.signal_delay_s=99999",
            "is not less than slurm.time_min=240, in seconds; try slurm.signal_delay_s=2400",
        ),
        ("slurm.stages.trian.time_min=3", "slurm.stages=trian is not known; did you mean train"),
        ("slurm.stages.train.tme_min=3", "did you mean slurm.stages.train.time_min"),
        ("slurm.stages.train.time_min=0", "slurm.time_min=0 is out of range"),
        ("slurm.time_min=0", "slurm.time_min=0 is out of range"),
    ],
)
def test_a_mistake_in_one_point_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        points.load([DEMO, override])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
