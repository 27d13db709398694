"""The door of every verb: a command line or a list of overrides in, a typed `RunConfig` or one clear sentence out.

Hydra composes `conf/<verb>.yaml`; the result becomes dataclasses here, once. Ranges are checked by the dataclasses, so
a wrong value is refused before any model, device or file is touched.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from saepipe import durable, grid
from saepipe.composition_errors import CONF, keys_of, known_keys, sentence, unknown_key
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.overrides import arguments, parsed, quoted
from saepipe.stopping import GOES_ON

_SHARED = "hydra.job.config.override_dirname.exclude_keys"
"""Where Hydra keeps which keys are none of a sweep's point."""
_GROUP_VALUE = "a group such as sae, model or logger takes the name of one of its files, e.g. sae=topk, not"

ConfigStore.instance().store(name="schema", node=RunConfig)


def main(verb: str, function: Callable[[RunConfig], object]) -> None:
    """Run a verb from the command line: `key=value` overrides in, exit code 0, or 2 with one sentence for user errors.

    Args:
        verb: Name of the root config in `conf/`.
        function: The verb; called once per point of a sweep.
    """
    prepare_process()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print, and the exit code is ours

    failed: list[str] = []

    def task(composed: DictConfig) -> None:
        prepare_process()  # a launcher may have started another one
        overrides = list(HydraConfig.get().overrides.task)
        point = _point(overrides)
        try:
            function(_typed(composed, overrides, point=point))
        except UserError as error:  # raised past this frame, Hydra would add lines of its own
            failed.append(f"{point}: {error}" if point else str(error))  # the other points of a sweep are tried
            if _among_ranks() or "SUBMITIT_EXECUTOR" in os.environ:
                refuse(failed[-1])

    sys.argv[1:] = arguments(sys.argv[1:])
    sys.argv[1:] += _not_swept(sys.argv[1:])
    try:
        with polite_end():
            hydra_main(config_path=str(CONF), config_name=verb, version_base="1.3")(task)()
        if failed:
            refuse("\nsaepipe: ".join(failed))
    except (HydraException, OmegaConfBaseException) as error:
        refuse(sentence(error))
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        refuse(f"{_GROUP_VALUE}: {' '.join(sys.argv[1:])}")


def _among_ranks() -> bool:
    """Tell whether srun or torchrun started others beside this process, which must not go on to different points."""
    from saepipe.launched import Launch

    launch = Launch.here()
    return launch is not None and launch.ranks.world_size > 1


@contextmanager
def polite_end() -> Iterator[None]:
    """End the process in one sentence where a user can put it right, at Ctrl-C, and in silence where nobody reads."""
    try:
        yield
    except UserError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        interrupted()
    except BrokenPipeError:  # `| head`: whoever read has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def load_config(verb: str, overrides: Sequence[str] = (), *, point: str | None = None) -> RunConfig:
    """Compose a verb's configuration in Python, as the command line would.

    Args:
        verb: Name of a root config in `conf/`, such as cache, train, evaluate, steer or launch.
        overrides: What one would type behind the command, e.g. `["+experiment=demo", "sae.k=16"]`.
        point: Name of the point that it is of a sweep, and of its folder.

    Raises:
        UserError: A key, type or value is wrong; the message names it and the cure.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name=verb):
            return _typed(compose(verb, [quoted(override) for override in overrides]), overrides, point=point)
    except (HydraException, OmegaConfBaseException) as error:  # some of which are ValueErrors
        raise UserError(sentence(error)) from None
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        raise UserError(f"{_GROUP_VALUE}: {' '.join(overrides)}") from None


def settled(config: RunConfig, *, several_runs: bool = False) -> RunConfig:
    """Take a configuration that may have been put together in Python to where the command line's are at the door.

    `${run.name}` in a folder is filled in, the architecture is typed, and types are checked; the caller's own object
    stays as it is. `sae` may be an architecture's dataclass, its name, or a dictionary with the key `architecture`;
    None is topk, as on the command line. Where nobody has set up logging, messages go to standard error.

    Args:
        config: The configuration.
        several_runs: Whether `run.dir` may be a list of folders.

    Raises:
        UserError: A value has another type than its key; the message names it.
    """
    if isinstance(config.run.dir, list) and not several_runs:
        raise UserError(f"run.dir={config.run.dir} is several runs, which evaluate alone takes; name one of them")
    if not logging.getLogger("saepipe").hasHandlers():
        _say("saepipe", "stderr")  # like the bars; a script's standard output is its own
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    for group, value in values.items():
        try:
            if is_dataclass(value):
                OmegaConf.structured(value)
        except OmegaConfBaseException as error:
            raise UserError(f"{group}.{sentence(error)}") from None
    sae = values.pop("sae")
    try:
        copied = OmegaConf.to_object(OmegaConf.structured(RunConfig(**values)))
    except OmegaConfBaseException as error:
        raise UserError(sentence(error)) from None
    assert isinstance(copied, RunConfig)
    if sae is None or isinstance(sae, str):
        sae = {"architecture": sae or "topk"}
    copied.sae = _architecture_config(sae) if isinstance(sae, dict) else replace(sae)
    return copied


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as YAML that `read_config` reads back."""
    durable.write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_config(path: Path) -> RunConfig:
    """Read a configuration that `save_config` wrote.

    Raises:
        UserError: The file is missing, or no longer fits this version's keys.
    """
    if not path.exists():
        if points := sorted(str(point.parent) for point in path.parent.glob(f"*/{path.name}")):
            raise UserError(f"run.dir={path.parent} holds several runs; name one of them: {', '.join(points)}")
        raise UserError(
            f"run.dir={path.parent} holds no {path.name}; train a run there first (python -m saepipe.train)"
        )
    try:
        saved = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path))
        assert isinstance(saved, DictConfig)
        return _typed(saved, saved.overrides, point=None)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise UserError(
            f"run.dir={path.parent}: {path.name} is damaged or of another version; choose another run.dir "
            f"({sentence(error)})"
        ) from None


def differences(mine: object, theirs: object, prefix: str = "") -> dict[str, tuple[object, object]]:
    """Compare two configurations, key by key.

    Returns:
        Dotted key -> (mine, theirs), for the keys that differ.
    """
    if not (is_dataclass(mine) and is_dataclass(theirs) and type(mine) is type(theirs)):
        return {} if mine == theirs else {prefix: (mine, theirs)}
    found: dict[str, tuple[object, object]] = {}
    for item in fields(mine):
        key = f"{prefix}.{item.name}" if prefix else item.name
        found |= differences(getattr(mine, item.name), getattr(theirs, item.name), key)
    return found


def agree(typed: object, kept: object) -> bool:
    """Compare a typed value with the one that a store or run keeps: lists in any order, paths however written."""
    if isinstance(typed, list) and isinstance(kept, list):
        return sorted(typed) == sorted(kept)
    return typed == kept or (isinstance(typed, str) and str(Path(typed).expanduser().resolve()) == kept)


def _typed(composed: DictConfig, overrides: Iterable[str], point: str | None) -> RunConfig:
    """Turn a composed config into dataclasses: the one place where a DictConfig ends."""
    if foreign := keys_of(composed) - set(known_keys()):  # +group.key=value adds what no dataclass knows
        raise UserError(unknown_key(min(foreign)))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    config.overrides = list(overrides)
    config.sae = _architecture_config(config.sae)
    grid.points(config)  # what does not fit is told now
    if point:
        config.run.dir = f"{config.run.dir}/{point}"
    return config


def _architecture_config(values: Any) -> Any:
    """Check the `sae` group against its architecture's own dataclass."""
    from saepipe import saes  # imports torch: here, so that --help and a typo in a key do not wait for it

    if not isinstance(values, dict) or "architecture" not in values:
        raise UserError(
            f"sae={values} is no architecture; choose one, e.g. sae=topk (of {', '.join(saes.registered())})"
        )
    schema = OmegaConf.structured(saes.architecture(values["architecture"]).config_class)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise UserError(f"sae.{sentence(error)}") from None


def _not_swept(arguments: Sequence[str]) -> list[str]:
    """Tell Hydra which keys all points of a sweep share; so does every process that a launcher starts know it."""
    try:
        found = parsed([argument for argument in arguments if not argument.startswith("-")])
    except HydraException:
        return []  # which Hydra will say itself
    swept = {one.key_or_group for one in found if one.is_sweep_override()}
    shared = {one.key_or_group for one in found} - swept
    return [f"{_SHARED}=[{','.join(sorted(shared))}]"] if swept or "sweep" in shared else []


def _point(overrides: Sequence[str]) -> str | None:
    """Name the folder of one point of a sweep by its swept keys, `k=v,k=v` sorted; None outside a sweep."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return None
    shared = set(hydra.job.config.override_dirname.exclude_keys)
    return point_name(text for text in overrides if text.lstrip("+").split("=")[0] not in shared)


def point_name(chosen: Iterable[str]) -> str | None:
    """Name a point of a sweep, and its folder, by what was chosen for it; None where nothing was."""
    return ",".join(sorted(text.lstrip("+") for text in chosen)).replace("/", "_") or None


def sweep_of(run_dir: str | Path) -> Path | None:
    """Return the sweep's folder of a run that is a point of one, as its folder's name tells."""
    folder = Path(run_dir)
    return folder.parent if "=" in folder.name else None


def prepare_process(messages_to: str = "stdout") -> None:
    """Set up a process that was started to run a verb: plain messages, threads that wait politely, large pages.

    Args:
        messages_to: stdout, or stderr where the output is for programs.
    """
    # OpenMP's idle threads spin by default: on a machine with other work, a sparse step took five times as long. It is
    # read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Large tensors get memory anew in every step, and to be given it page by page took up to a sixth of one. Linux has
    # large pages for who asks for them; read when torch first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.raiseExceptions = False  # a closed or full standard output is no reason for a traceback per message
    for name in ("saepipe", "__main__"):  # a verb run by `python -m` is __main__
        _say(name, messages_to)


def _say(name: str, stream: str) -> None:
    """Have a logger write plain lines."""
    handler = _Plain(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger(name)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Plain(logging.StreamHandler[Any]):
    """Writes to what `sys.stdout` or `sys.stderr` is at the moment: a notebook puts others in their place."""

    def __init__(self, name: str) -> None:
        logging.Handler.__init__(self)
        self._stream_name = name

    @property
    def stream(self) -> Any:
        return getattr(sys, self._stream_name)


def interrupted(then: str = GOES_ON) -> NoReturn:
    """End the process after Ctrl-C.

    Args:
        then: How to go on.
    """
    sys.stderr.write(f"saepipe: interrupted; {then}\n")
    sys.exit(130)


def refuse(sentence: str) -> NoReturn:
    """End the process the way every user error does: one sentence on standard error, exit code 2."""
    sys.stdout.flush()
    sys.stderr.write(f"saepipe: {sentence}\n")
    sys.exit(2)
