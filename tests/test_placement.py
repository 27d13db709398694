"""A model is put on devices that are there, or refused in one sentence."""

import pytest
import torch

from saepipe.config import ModelConfig
from saepipe.errors import UserError
from saepipe.placement import Placement, choose, here


def chosen(local_rank: int = 0, n_gpus: int = 8, has_mps: bool = False, **keys: object) -> Placement:
    return choose(ModelConfig(**keys), local_rank=local_rank, n_gpus=n_gpus, has_mps=has_mps)


@pytest.mark.parametrize(
    ("keys", "local_rank", "expected"),
    [
        ({}, 0, Placement(torch.device("cuda:0"), None, (0,))),
        ({"device": "cuda"}, 7, Placement(torch.device("cuda:7"), None, (7,))),
        ({"device": "cuda:5"}, 0, Placement(torch.device("cuda:5"), None, (5,))),
        ({"n_devices": 2}, 0, Placement(torch.device("cuda:0"), "auto", (0, 1))),
        ({"n_devices": 2}, 3, Placement(torch.device("cuda:6"), "auto", (6, 7))),
        ({"n_devices": 3, "device": "cuda:4"}, 0, Placement(torch.device("cuda:4"), "auto", (4, 5, 6))),
        ({"n_devices": 2, "device_map": "sequential"}, 1, Placement(torch.device("cuda:2"), "sequential", (2, 3))),
        ({"device_map": "auto"}, 2, Placement(torch.device("cuda:2"), "auto", (2,))),
        ({"device": "cpu"}, 3, Placement(torch.device("cpu"))),
        ({"device": "cpu", "device_map": "auto"}, 0, Placement(torch.device("cpu"), {"": "cpu"})),
    ],
)
def test_each_worker_has_its_own_gpus(keys: dict[str, object], local_rank: int, expected: Placement) -> None:
    assert chosen(local_rank, **keys) == expected


def test_auto_takes_what_there_is() -> None:
    assert chosen(n_gpus=0).device.type == "cpu"
    assert chosen(n_gpus=0, has_mps=True).device.type == "mps"
    assert chosen(5, n_gpus=0) == Placement(torch.device("cpu"))  # workers share the CPU
    assert chosen(n_gpus=0, device="mps", has_mps=True, device_map="auto").device_map == {"": "mps"}


@pytest.mark.parametrize(
    ("keys", "local_rank", "n_gpus", "message"),
    [
        ({"device": "cuda:9"}, 0, 8, r"model.device=cuda:9 is not on this machine, which has 8 CUDA devices"),
        ({"device": "cuda"}, 0, 0, r"model.device=cuda is not on this machine, which has 0 CUDA devices; try .*=auto"),
        ({"device": "mps"}, 0, 8, r"model.device=mps is not on this machine"),
        ({"device": "xpu"}, 0, 8, r"model.device=xpu is not on this machine"),
        ({"device": "gpu0"}, 0, 8, r"model.device=gpu0 is no device; give auto, cpu, cuda, cuda:1 or mps"),
        ({}, 8, 8, r"model.device=auto with model.n_devices=1 gives worker 8 .* from 8 on, .* 8; start at most 8 work"),
        ({"n_devices": 3, "device": "cuda"}, 2, 8, r"=cuda with model.n_devices=3 .* 8; start at most 2 workers here"),
        ({"n_devices": 9}, 0, 8, r"model.n_devices=9 .* which has 8 CUDA devices; .*n_devices to at most 8"),
        ({"n_devices": 2, "device": "cuda:7"}, 0, 8, r"model.n_devices=2 from model.device=cuda:7 on are not on"),
        (
            {"device": "cuda:1"},
            1,
            8,
            r"model.device=cuda:1 names one place .* this is worker 1; give model.device=cuda,",
        ),
        (
            {"n_devices": 2},
            0,
            0,
            r"model.n_devices=2 needs as many CUDA GPUs, .* runs on cpu here; set model.n_devices=1",
        ),
        ({"n_devices": 2, "device": "cpu"}, 0, 8, r"with model.device=cpu the model runs on cpu here"),
    ],
)
def test_devices_that_are_not_there(keys: dict[str, object], local_rank: int, n_gpus: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(local_rank, n_gpus, **keys)


def test_keys_are_checked_by_themselves() -> None:
    with pytest.raises(UserError, match=r"model.n_devices=0 is out of range"):
        ModelConfig(n_devices=0)
    with pytest.raises(UserError, match=r"model.device_map=autp is not known; did you mean auto"):
        ModelConfig(device_map="autp")


def test_arguments_of_from_pretrained() -> None:
    assert here(ModelConfig(device="cpu")).loading() == {}
    assert here(ModelConfig(device="cpu", device_map="auto")).loading() == {"device_map": {"": "cpu"}}


def test_memory_is_that_of_the_workers_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (gpu * 10, 100))
    assert chosen(1, n_devices=2).loading() == {"device_map": "auto", "max_memory": {2: 18, 3: 27}}
    assert chosen(3, device_map="balanced").loading() == {"device_map": "balanced", "max_memory": {3: 27}}
