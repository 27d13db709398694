import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from saepipe import config, saes
from saepipe.config import RunConfig
from saepipe.errors import UserError

BAD: list[tuple[type, dict[str, Any], str]] = [
    (config.ModelConfig, {"dtype": "float8"}, "model.dtype=float8"),
    (config.ModelConfig, {"name": ""}, "model.name"),
    (config.ModelConfig, {"hooks": []}, "model.hooks"),
    (config.ModelConfig, {"hooks": ["a", "a"]}, "model.hooks"),
    (config.DataConfig, {"context_size": 1}, "data.context_size=1"),
    (config.DataConfig, {"held_out": 0.6}, "data.held_out=0.6"),
    (config.StoreConfig, {"tokens": 0}, "store.tokens=0"),
    (config.StoreConfig, {"dtype": "int4"}, "store.dtype=int4"),
    (config.StoreConfig, {"shuffle_tokens": 100_000}, "nearest is 131072"),
    (config.StreamConfig, {"batch_tokens": 0}, "stream.batch_tokens=0"),
    (config.StreamConfig, {"prefetch_batches": -1}, "stream.prefetch_batches=-1"),
    (config.StreamConfig, {"lanes": 7}, "nearest batch is 4095"),
    (config.OptimConfig, {"lr": 0.0}, "optim.lr=0.0"),
    (config.OptimConfig, {"betas": [0.9]}, "optim.betas"),
    (config.OptimConfig, {"betas": [0.9, 1.0]}, "optim.betas"),
    (config.OptimConfig, {"lr_scheduler_name": "linear"}, "optim.lr_scheduler_name=linear"),
    (config.OptimConfig, {"grad_clip": 0.0}, "optim.grad_clip=0.0"),
    (config.TrainConfig, {"tokens": 0}, "train.tokens=0"),
    (config.TrainerConfig, {"precision": "16-mixed"}, "trainer.precision=16-mixed"),
    (config.TrainerConfig, {"accelerator": "tpu"}, "trainer.accelerator=tpu"),
    (config.LoggerConfig, {"name": "wand"}, "logger.name=wand"),
    (config.OptimConfig, {"eps": float("inf")}, "optim.eps=inf"),
    (config.TrainConfig, {"seed": -1}, "train.seed=-1"),
    (config.TrainConfig, {"seed": 10**26}, "train.seed=1000"),
    (config.DataConfig, {"path": " "}, "data.path is empty"),
    (config.DataConfig, {"chat_template": " "}, "data.chat_template is empty"),
    (config.StoreConfig, {"dir": ""}, "store.dir is empty"),
    (config.RunFolder, {"dir": ""}, "run.dir is empty"),
    (config.StreamConfig, {"prefetch_batches": 1025}, "stream.prefetch_batches=1025"),
    (config.StreamConfig, {"positions": [5]}, "stream.positions=[5]"),
    (config.StreamConfig, {"positions": [5, 3]}, "stream.positions=[5, 3]"),
    (config.StreamConfig, {"max_norm": 0}, "stream.max_norm=0"),
    (config.StreamConfig, {"roles": []}, "stream.roles=[]"),
    (config.CacheConfig, {"workers": 0}, "cache.workers=0"),
    (config.CacheConfig, {"poor_shuffle": "hide"}, "cache.poor_shuffle=hide"),
    (config.EvaluateConfig, {"tokens": 0}, "evaluate.tokens=0"),
    (config.AnalyzeConfig, {"latents": 0}, "analyze.latents=0"),
    (config.AnalyzeConfig, {"latents": []}, "analyze.latents=[] is neither"),
    (config.AnalyzeConfig, {"latents": "ab"}, "analyze.latents=ab is neither"),
    (config.AnalyzeConfig, {"latents": 1.5}, "analyze.latents=1.5 is neither"),
    (config.AnalyzeConfig, {"latents": True}, "analyze.latents=True is neither"),
    (config.AnalyzeConfig, {"latents": [1, [2]]}, "is neither"),
    (config.AnalyzeConfig, {"latents": [3, -1]}, "analyze.latents=[3, -1] is out of range"),
    (config.AnalyzeConfig, {"latents": [3, 3]}, "names a latent twice"),
]


@pytest.mark.parametrize(("group", "values", "named"), BAD)
def test_a_value_out_of_range_is_refused_by_key_and_value(group: type, values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named.replace("[", r"\[")):
        group(**values)


def test_nan_is_out_of_range() -> None:
    with pytest.raises(UserError, match=r"optim\.lr=nan"):
        config.OptimConfig(lr=float("nan"))


def test_every_key_is_documented() -> None:
    groups = [type(group) for group in vars(RunConfig()).values() if is_dataclass(group)]
    groups += [saes.architecture(name).config_class for name in saes.registered()]
    assert {config.ModelConfig, config.AnalyzeConfig} < set(groups)
    for group in groups:
        # its own source alone: another group may have a key of the same name
        source = [line for cls in group.__mro__[:-1] for line in inspect.getsource(cls).splitlines()]
        for item in fields(group):
            line = next(number for number, text in enumerate(source) if text.startswith(f"    {item.name}: "))
            assert source[line + 1].strip().startswith('"""'), f"{group.__name__}.{item.name} has no docstring"


def test_typed_knows_keys_and_groups() -> None:
    run = RunConfig(overrides=["+experiment=demo", "model.name=x", "data=pile", "~train.seed"])
    assert run.typed("model.name")
    assert run.typed("data.context_size")  # the whole group was chosen
    assert not run.typed("model.dtype")
    assert not run.typed("store.tokens")
