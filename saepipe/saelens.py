"""SAELens's training code on this pipeline: its configuration, by the names of its versions 3 to 6, and its runner.

    cfg = LanguageModelSAERunnerConfig(model_name="gpt2-small", hook_name="blocks.8.hook_resid_pre", d_in=768, ...)
    trainer = SAETrainingRunner(cfg)
    sae = trainer.run()

A run caches activations in a store (in `stores/`, or in `stores/` beside `checkpoint_path`), trains from it, and
measures the SAE. It has a folder of its own in `checkpoint_path`, or in `runs/`, named by the architecture and what
decides the run, so that a loop over a setting may share a `checkpoint_path`. The same configuration again goes on, or
finds all done; one that differs in training alone uses the same store. `saepipe.saelens_names` says what becomes of
each name, and the log which of those given have no effect. What is not given is SAELens 6's default, where it changes
results and there is a key for it; without model_name and dataset_path the demo stands in.
"""

import hashlib
import inspect
import logging
import signal
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from saepipe import cache, durable, entry, evaluate, train
from saepipe.config import ModelConfig, RunConfig
from saepipe.errors import UserError, unknown
from saepipe.in_memory import open_source
from saepipe.language_model import LanguageModel
from saepipe.runs import PLACES_MODEL, Run
from saepipe.saelens_names import ALIASES, DEFAULTS, KNOWN, LOGGING, names_of, translate
from saepipe.saes.base import SAE

log = logging.getLogger(__name__)

_NO_IDENTITY = ("logger.", "run.", "evaluate.", "model.device", "trainer.accelerator", "train.log_every_steps")
"""What begin the keys that do not make a run another one."""


_OWN = ("given", "sae", "logger", "keys")


class _Names:
    """Values by SAELens's names, of any of its versions; what is None was not given."""

    def __init__(self, *values: Any, **names: Any) -> None:
        if values:
            raise UserError(f"{type(self).__name__}({values[0]!r}, ...): give every value by its name, as d_in=768")
        for name in names:
            if name not in KNOWN:
                raise unknown(f"{type(self).__name__}: name", name, KNOWN)
        self.given = {ALIASES.get(name, name): value for name, value in names.items() if value is not None}
        """What was given."""

    def __getattr__(self, name: str) -> Any:
        """Read a value, or SAELens's default."""
        name = ALIASES.get(name, name)
        given = self.all_given()
        if name == "d_sae" and "d_sae" not in given and "d_in" in given:
            return given["d_in"] * given.get("expansion_factor", DEFAULTS["expansion_factor"])
        if name not in given and name not in KNOWN:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return given.get(name, DEFAULTS.get(name))

    def to_dict(self) -> dict[str, Any]:
        """Return what was given, and SAELens's defaults where they matter here."""
        return {**DEFAULTS, **self.all_given()}

    def all_given(self) -> dict[str, Any]:
        """What was given."""
        found: dict[str, Any] = vars(self).get("given", {})
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        """Give a value later, as the fields of a dataclass can be set."""
        if name in KNOWN:
            self.given[ALIASES.get(name, name)] = value
        elif name in _OWN:
            super().__setattr__(name, value)
        else:
            raise unknown(f"{type(self).__name__}: name", name, KNOWN)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


class LoggingConfig(_Names):
    """Version 6's names of what is logged, and where to; W&B is off unless `log_to_wandb=True` is given."""


class TrainingSAEConfig(_Names):
    """Version 6's names of what an SAE is; use the class of an architecture."""

    _architecture: ClassVar[str] = "standard"

    @classmethod
    def architecture(cls) -> str:
        """Name of the architecture."""
        return cls._architecture


class StandardTrainingSAEConfig(TrainingSAEConfig):
    """ReLU and an L1 penalty."""


class GatedTrainingSAEConfig(TrainingSAEConfig):
    """Gated."""

    _architecture = "gated"


class TopKTrainingSAEConfig(TrainingSAEConfig):
    """TopK."""

    _architecture = "topk"


class BatchTopKTrainingSAEConfig(TrainingSAEConfig):
    """BatchTopK."""

    _architecture = "batchtopk"


class MatryoshkaBatchTopKTrainingSAEConfig(TrainingSAEConfig):
    """Matryoshka."""

    _architecture = "matryoshka_batchtopk"


class JumpReLUTrainingSAEConfig(TrainingSAEConfig):
    """JumpReLU."""

    _architecture = "jumprelu"


class LanguageModelSAERunnerConfig(_Names):
    """What SAELens's runner is told: the flat names of its versions 3 to 5, or the nested ones of version 6.

    Args:
        sae: One of the configurations of architectures in this module, as in version 6.
        logger: A `LoggingConfig`, as in version 6.
        saepipe: Our own dotted keys, such as `{"store.dtype": "bfloat16"}`; they come last.
        **names: All other names, and without `sae` and `logger` those of theirs too.

    Raises:
        UserError: A name is not known, or given twice with different values.
    """

    def __init__(
        self,
        sae: Any = None,
        logger: Any = None,
        saepipe: Mapping[str, Any] | None = None,
        **names: Any,
    ) -> None:
        for name, value, kind in (("sae", sae, TrainingSAEConfig), ("logger", logger, LoggingConfig)):
            if not isinstance(value, kind | None):
                raise UserError(f"{name}={value!r} is no {kind.__name__}; give one, or all values by their names")
        super().__init__(**names)
        self.sae, self.logger, self.keys = sae, logger, dict(saepipe or {})
        self.all_given()

    def all_given(self) -> dict[str, Any]:
        """Put together what was given, here and in the nested configurations."""
        sae, logger = vars(self).get("sae"), vars(self).get("logger")
        nested = {} if sae is None else {"architecture": sae.architecture(), **sae.given}
        nested |= {} if logger is None else logger.given
        own = super().all_given()
        for name, value in nested.items():
            if own.get(name, value) != value:
                raise UserError(f"{name}={own[name]} differs from {name}={value} inside; give it once")
        return {**nested, **own}

    @property
    def checkpoint_path(self) -> str:
        """The run's folder; as in SAELens, one of its own in what was given."""
        return str(self.translated()[0]["run.dir"])

    @property
    def total_training_tokens(self) -> int:
        """Tokens to train on, in whole."""
        return int(self.training_tokens)

    @property
    def total_training_steps(self) -> int:
        """Steps of a training batch each."""
        return self.total_training_tokens // int(self.train_batch_size_tokens)

    def to_run_config(self) -> RunConfig:
        """Translate into a configuration of this pipeline.

        Its `data.column` may still be several, as for `saepipe.in_memory.open_source`; a run settles it.

        Raises:
            UserError: A value is out of range, or nothing here stands for it.
        """
        return _config(self.translated()[0])

    def translated(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Translate into our dotted keys; also tells the given names that have no effect -> why."""
        keys, ignored = translate(self.all_given(), self._width)
        keys |= self.keys
        name = f"{keys.get('run.name') or keys['sae.architecture']}-{_digest(keys)}"
        keys.setdefault("run.name", name)
        beside = Path(keys["run.dir"]).parent if "run.dir" in keys else Path()
        if "run.dir" not in self.keys:
            keys["run.dir"] = str(Path(keys.get("run.dir", "runs")) / name)
        if "store.dir" not in keys:
            keys["store.dir"] = str(beside / "stores" / _store_name(_config(keys)))
        return keys, ignored

    def _width(self) -> int:
        """Find the width of the activations."""
        given = {name: value for name, value in self.all_given().items() if name != "l1_coefficient"}
        keys = translate(given, lambda: 0)[0] | self.keys
        return _open(keys).width(keys["model.hooks"][0])


def _signed(cls: type[_Names], names: Iterable[str], *first: str) -> None:
    """Have `help` and editors show the names that a class takes, with the defaults that matter here."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in first]
        + [inspect.Parameter(name, keyword, default=DEFAULTS.get(name)) for name in sorted(names)]
    )


_signed(LoggingConfig, LOGGING)
_signed(TrainingSAEConfig, KNOWN)
for _cls in TrainingSAEConfig.__subclasses__():
    _signed(_cls, names_of(_cls.architecture()))
_signed(LanguageModelSAERunnerConfig, KNOWN, "sae", "logger", "saepipe")


class LanguageModelSAETrainingRunner:
    """Caches, trains and measures what a configuration asks for.

    Args:
        cfg: The configuration.
        override_dataset: Not taken; see the error.
        override_model: Not taken.
        override_sae: Not taken.

    Raises:
        UserError: Something was given that is not taken; or of a configuration that cannot be.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig,
        override_dataset: Any = None,
        override_model: Any = None,
        override_sae: Any = None,
    ) -> None:
        instead = {
            "override_dataset": (override_dataset, "save it (save_to_disk) and give its folder as dataset_path"),
            "override_model": (override_model, "save it (save_pretrained) and give its folder as model_name"),
            "override_sae": (override_sae, "save it (save_model) and give its folder as from_pretrained_path"),
        }
        for name, (value, cure) in instead.items():
            if value is not None:
                raise UserError(f"{name} is not taken, since a run can be resumed from its files alone; {cure}")
        self.cfg = cfg
        self.metrics: dict[str, Any] = {}
        """After `run`: l0, explained_variance, ce_loss_score, dead_fraction and the other figures of
        `eval/metrics.json`, and the last ones of training (`metrics/...`, `losses/...`)."""
        self.sae: SAE | None = None
        """After `run`: the SAE."""

    def run(self) -> SAE:
        """Do it all, or what is left of it; says first what has no effect, and what the store will need of the disk.

        Returns:
            The trained SAE.

        Raises:
            UserError: The configuration, the data, the model or the disk do not allow it; names the key and the cure.
            KeyboardInterrupt: Ctrl-C; a checkpoint was saved, and the same configuration goes on.
        """
        keys, ignored = self.cfg.translated()
        config = _config(keys)
        given = self.cfg.all_given()
        if "wandb_project" in given and "log_to_wandb" not in given:
            log.info("wandb_project=%s: nothing goes to W&B without log_to_wandb=True", given["wandb_project"])
        if ignored:
            log.warning("without effect: %s", "; ".join(f"{name} ({why})" for name, why in ignored.items()))
        output_path = self.cfg.all_given().get("output_path")
        if output_path is not None:
            if Path(output_path).is_file():
                raise UserError(f"output_path={output_path} is a file; give a folder")
            with durable.disk_errors("output_path", Path(output_path)):
                Path(output_path).mkdir(parents=True, exist_ok=True)
        self._check_width(keys)
        source = open_source(config.data, seed=config.store.seed)
        joined = config.data.pack and source.kind is not list  # lists of token ids are contexts
        config = _config(keys | {"data.column": source.data.column, "data.pack": joined})
        cache.cache(config)
        try:
            summary = train.train(config)
        except SystemExit as stop:  # what a command line ends with
            if stop.code == 128 + signal.SIGINT:
                raise KeyboardInterrupt from None
            raise
        self.metrics = {**summary["metrics"], **evaluate.evaluate(config)}
        self.sae = Run(config.run.dir).load_sae()
        if output_path is not None:
            with durable.disk_errors("output_path", Path(output_path)):
                self.sae.save_model(output_path)
        return self.sae

    def _check_width(self, keys: Mapping[str, Any]) -> None:
        if (given := self.cfg.all_given().get("d_in")) is not None:
            hook = keys["model.hooks"][0]
            if (width := _open(keys).width(hook)) != given:
                raise UserError(f"d_in={given} is not the width of hook_name={hook}, {width}; give d_in={width}")


SAETrainingRunner = LanguageModelSAETrainingRunner


def _open(keys: Mapping[str, Any]) -> LanguageModel:
    return LanguageModel.open(_config(keys).model)


_GROUPS = [item.name for item in fields(RunConfig) if is_dataclass(getattr(RunConfig(), item.name))] + ["sae"]


def _config(keys: Mapping[str, Any]) -> RunConfig:
    """Put keys where they belong; they count as typed, so that a store of another plan is refused."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    whole = RunConfig()
    for group, values in groups.items():
        if group == "sae":
            whole.sae = values
            continue
        known = (
            [item.name for item in fields(getattr(whole, group))] if is_dataclass(getattr(whole, group, None)) else []
        )
        if not group or not known:
            named = ".".join(part for part in (group, next(iter(values))) if part)
            raise unknown("saepipe key", named, _GROUPS, "Give one of these with a name behind it, as store.dtype.")
        for name in values:
            if name not in known:
                raise unknown("saepipe key", f"{group}.{name}", [f"{group}.{other}" for other in known])
        setattr(whole, group, replace(getattr(whole, group), **values))
    whole.overrides = [f"{'sae' if key == 'sae.architecture' else key}={_shown(keys[key])}" for key in keys]
    return entry.settled(whole)


def _shown(value: Any) -> str:
    """Write a value as one types it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)


def _digest(keys: Mapping[str, Any]) -> str:
    """Name what decides a run, so that another one has another folder."""
    kept = {key: value for key, value in keys.items() if not key.startswith(_NO_IDENTITY)}
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()[:8]


def _store_name(config: RunConfig) -> str:
    """Name a store by what decides its bytes."""
    model = replace(config.model, **{key: getattr(ModelConfig(), key) for key in PLACES_MODEL})
    identity = hashlib.sha256(repr((model, config.data, replace(config.store, dir="-"))).encode()).hexdigest()
    return f"{Path(model.name).name}-{identity[:8]}"
