"""The points of a sweep, composed before anything is submitted."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from saepipe import entry
from saepipe.composition_errors import CONF, sentence
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.overrides import parsed

_GRID_GROUPS = ("sae", "optim")


def load(overrides: Sequence[str]) -> tuple[list[RunConfig], Path]:
    """Compose a configuration for each job that trains.

    Args:
        overrides: What was typed; several values of a key, and `+sweep=NAME`, make a sweep. With `fused=true` its
            points are a grid in one job.

    Returns:
        The configurations, and the folder of the sweep (of a single run, its own).

    Raises:
        UserError: A key, type or value is wrong, of any point.
    """
    plain, swept = _parted(overrides)
    names, lists = list(swept), list(swept.values())
    if not names:
        config = entry.settled(entry.load_config("launch", plain))
        return [config], Path(config.run.dir)
    points = [
        [f"{name}={value}" for name, value in zip(names, chosen, strict=True)] for chosen in itertools.product(*lists)
    ]
    configs = [entry.load_config("launch", [*plain, *chosen], point=entry.point_name(chosen)) for chosen in points]
    root = Path(configs[0].run.dir).parent
    if configs[0].fused:
        grids = [f"grid.{_grid_key(name)}=[{','.join(values)}]" for name, values in swept.items()]
        return [entry.load_config("launch", [*plain, *grids])], root
    return configs, root


def _parted(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Part what was typed into what all points share, and key -> values of what differs."""
    try:
        found = parsed(overrides)
        swept = {one.key_or_group: list(one.sweep_string_iterator()) for one in found if one.is_sweep_override()}
        plain = [text for text, one in zip(overrides, found, strict=True) if not one.is_sweep_override()]
        typed = {one.key_or_group for one in found}
        group = _of_sweep_group([*plain, *(f"{key}={values[0]}" for key, values in swept.items())])
        swept |= {key: values for key, values in group.items() if key not in typed}
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(sentence(error)) from None
    return plain, swept


def _of_sweep_group(overrides: list[str]) -> dict[str, list[str]]:
    """Read what `+sweep=NAME` asks for."""
    if not any(text.lstrip("+").startswith("sweep=") for text in overrides):
        return {}
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="launch"):
        params = compose("launch", overrides, return_hydra_config=True).hydra.sweeper.params or {}
    found = parsed([f"{key}={values}" for key, values in params.items()])
    return {
        one.key_or_group: list(one.sweep_string_iterator())
        if one.is_sweep_override()
        else [one.get_value_element_as_str()]
        for one in found
    }


def _grid_key(key: str) -> str:
    """Return what a swept key is called in a grid."""
    group, _, name = key.partition(".")
    if key == "stream.hook":
        return "hook"
    if group not in _GRID_GROUPS or not name:
        raise UserError(
            f"fused=true does not go with a sweep over {key}: one job can differ in keys of the sae and optim groups "
            "and in stream.hook; leave fused out"
        )
    return name
