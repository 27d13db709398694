"""A grid: several SAEs of one architecture from one stream, each in the folder that it would have alone.

`grid.l1_coefficient=[1,2]` trains in one job what `-m sae.l1_coefficient=1,2` trains one after the other: the same
folders, weights and metrics.
"""

import itertools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from saepipe.config import RunConfig
from saepipe.errors import UserError, unknown


def points(config: RunConfig) -> list[RunConfig]:
    """Expand a configuration with a grid into one for each combination; without one, it is the only one.

    Args:
        config: The run; what `grid` names is replaced, `run.dir` becomes a folder in it.

    Raises:
        UserError: A value that the key does not take, or a point that is there twice.
    """
    if not config.grid:
        return [config]
    names = {key: full_key(key, config.sae) for key in config.grid}
    if empty := [key for key, values in config.grid.items() if not values]:
        raise UserError(f"grid.{empty[0]}=[] names no value; give some, or leave it out")
    found: dict[str, RunConfig] = {}
    for values in itertools.product(*config.grid.values()):
        chosen = {names[key]: value for key, value in zip(config.grid, values, strict=True)}
        folder = ",".join(sorted(f"{key}={_shown(value)}" for key, value in chosen.items())).replace("/", "_")
        point = _point(config, folder, chosen)
        if any(_same(point, other) for other in found.values()):
            raise UserError(f"grid={dict(config.grid)} has the point {folder} twice; give each value once")
        found[folder] = point
    return list(found.values())


def full_key(key: str, sae: Any) -> str:
    """Return the dotted key that a key of a grid stands for.

    Raises:
        UserError: It is no key of the architecture or of the optimizer.
    """
    if key == "hook":
        return "stream.hook"
    groups = {"sae": fields(sae), "optim": fields(RunConfig().optim)}
    known = {item.name: f"{group}.{item.name}" for group, items in groups.items() for item in items}
    del known["architecture"]  # its keys are another's: a sweep with -m can do that
    if key not in known:
        raise unknown("key", key, ["hook", *known], prefix="grid.")
    return known[key]


def _point(config: RunConfig, folder: str, chosen: Mapping[str, Any]) -> RunConfig:
    """Make the configuration that the point would have alone."""
    typed = [override for override in config.overrides if not override.lstrip("+").startswith("grid")]
    point = replace(config, grid={}, overrides=[*typed, *(f"{key}={_shown(value)}" for key, value in chosen.items())])
    point.run = replace(config.run, dir=f"{config.run.dir}/{folder}")
    for key, value in chosen.items():
        group, name = key.split(".")
        setattr(point, group, _changed(getattr(point, group), key, name, value))
    return point


def _same(one: RunConfig, other: RunConfig) -> bool:
    """Tell whether two points are one, also where a value is written as 1 and as 1.0."""
    return (one.sae, one.optim, one.stream) == (other.sae, other.optim, other.stream)


def _changed(group: Any, key: str, name: str, value: Any) -> Any:
    """Return a group with another value for one of its keys, checked as any value is."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(group), {name: value}))
    except OmegaConfBaseException as error:
        raise UserError(f"grid: {key}={value} does not fit: {str(error).splitlines()[0]}") from None


def _shown(value: Any) -> str:
    """Write a value as Hydra does for a point of a sweep."""
    return "null" if value is None else str(value).replace(" ", "")
