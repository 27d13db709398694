"""What is wrong with a command line, in one sentence: Hydra's and OmegaConf's errors, with close matches and a cure."""

import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from saepipe.config import RunConfig
from saepipe.errors import unknown

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "conf"
"""The YAML files: inside an installed package, or beside it in a checkout."""


def sentence(error: BaseException) -> str:
    """Make one sentence of a composition error, with the close matches of a mistyped key or group."""
    chain = [error]
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(link).strip() for link in chain)
    if "Could not override 'experiment'" in text:
        return f"an experiment is added with a plus: +experiment=NAME, one of {', '.join(_options('experiment'))}"
    if several := re.search(r"Ambiguous value for argument '\+*([^=']+)=([^']*)'", text):
        return _several(several[1], several[2])
    if points := re.search(r"Error merging override \+*grid\.([\w.]+)=(.*)", text):
        name = points[1].split(".")[-1]  # of grid.sae.k, too: a grid's keys have no group
        values = points[2] if points[2].startswith("[") else f"[{points[2]}]"
        return (
            f"grid.{points[1]}={points[2]} does not fit: a grid takes keys without their group, and lists; write "
            f"grid.{name}={values}"
        )
    if mistyped := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(mistyped[1])
    if option := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        return str(unknown(option[1], option[2], _options(option[1])))
    if unparsed := getattr(error, "override", None):  # Hydra's OverrideParseException
        return (
            f"{unparsed} is no override; write key=value, and a text that begins as a list, a quotation or a "
            "function does in quotation marks of its own: 'key=\"[text]\"'"
        )
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    key = re.search(r"full_key: (\S+)", text)
    given = re.search(r"Error merging override (.*)", text)
    where = given[1].lstrip("+") if given else key[1] if key else "configuration"
    if key and "is not a ListConfig" in text:
        return f"{where} is no list; give its items in brackets, {key[1]}=[...]"
    cure = "; write a whole number such as 1_000_000" if "to Integer" in text else ""
    return f"{where} does not fit: {lines[0] if lines else type(error).__name__}{cure}"


def _several(key: str, values: str) -> str:
    """Word several values of one key, without a flag that makes a sweep of them."""
    group, _, name = key.partition(".")
    if group == "grid":
        return f"{key}={values} is no list; write {key}=[{values}]"
    together = f", or grid.{name}=[{values}] to train them in one job" if group in ("sae", "optim") and name else ""
    return f"{key}={values} has several values; add -m for a run of each{together}"


def unknown_key(key: str) -> str:
    """Word a key that this configuration has not: another architecture's, or none's."""
    groups = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "sae").glob("*.yaml"))}
    whole = {name: keys for name, keys in groups.items() if keys.get("architecture") == name}
    owners = [f"sae={name}" for name, keys in whole.items() if key.startswith("sae.") and key[4:] in keys]
    if owners:
        return f"{key} is a key of another architecture; leave it out, or choose {' or '.join(owners)}"
    known = known_keys()
    if same := [name for name in known if name.split(".")[-1] == key]:  # the group was left out
        return str(unknown("key", key, same, f"A key has its group before it: {same[0]}=..."))
    return str(unknown("key", key, known))


def known_keys() -> list[str]:
    """List every key of the schema in dotted form, with those of every architecture."""
    keys = keys_of(OmegaConf.structured(RunConfig))
    for path in (CONF / "sae").glob("*.yaml"):
        keys |= {f"sae.{name!s}" for name in OmegaConf.load(path) if name != "defaults"}
    return sorted(keys)


def keys_of(composed: DictConfig) -> set[str]:
    """List the keys of a config in dotted form."""
    groups = {str(group): composed[group] for group in composed if group != "grid"}  # checked by `saepipe.grid`
    nested = {f"{group}.{key!s}" for group, value in groups.items() if isinstance(value, DictConfig) for key in value}
    return nested | {group for group, value in groups.items() if not isinstance(value, DictConfig)}


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))  # what others share begins with _
