"""Measure trained SAEs on documents they were never trained on: `python -m saepipe.evaluate run.dir=runs/x`.

`run.dir=[runs/x,runs/y]`, or the folder of a sweep or grid, measures any number of runs, in one reading of the language
model for all runs of one store, and compares them. Heavy imports stand inside the functions, so that `--help` and a
mistyped key answer at once.
"""

import json
import logging
import math
import pickle
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import comparison, durable, entry
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained_memory
from saepipe.runs import Run, warn_of_another_model
from saepipe.stopping import without_interrupts
from saepipe.workers import end_with_parent

if TYPE_CHECKING:
    from saepipe.language_model import LanguageModel
    from saepipe.measure import Measured
    from saepipe.saes.base import SAE
    from saepipe.token_store import Side

log = logging.getLogger(__name__)


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Measure finished runs on held-out documents and write `eval/metrics.json` in the folder of each.

    With `evaluate.step`, an intermediate SAE of a run, finished or not; then it is `eval/step-<step>.json`. Where
    `logger` is wandb, for a run or typed here, the figures are put into the summary of its W&B run.

    Args:
        config: `run.dir` names a run, a list of runs, or a folder of runs; the evaluate group says how to read; all
            else is the runs' own.

    Returns:
        What metrics.json holds; of several runs `runs`, folder -> that.

    Raises:
        UserError: No finished run, no tokens, a model that cannot be loaded, out of memory.
    """
    config = entry.settled(config, several_runs=True)
    folders = _folders(config)
    found: dict[str, dict[str, Any]] = {}
    for group in _grouped([_Asked.of(folder, config) for folder in folders]):
        found |= _measured(group)
    found = {str(folder): found[str(folder)] for folder in folders}
    if len(found) == 1:
        return found[str(folders[0])]
    log.info("\n%s", comparison.table(list(found.values())))
    return {"runs": found}


@dataclass(frozen=True)
class _Asked:
    """A run to measure."""

    run: Run
    config: RunConfig
    """Its own configuration, with what was asked for at the door."""
    names_store: bool
    """Whether the user said where the store is."""

    @classmethod
    def of(cls, folder: Path, asked: RunConfig) -> "_Asked":
        """Open a run's folder."""
        run = Run(folder)
        config = run.finished_config(replace(asked, run=replace(asked.run, dir=str(folder))))
        if asked.typed("logger"):
            config.logger = asked.logger
        return cls(run, config, asked.typed("store.dir"))

    @property
    def reading(self) -> str:
        """What the language model has to read for it: runs of the same reading are measured together."""
        model = asdict(self.config.model) | {"hooks": None}
        return str((model, (self.run.summary() or {}).get("store"), str(Path(self.config.store.dir).resolve())))

    def load_sae(self) -> "SAE":
        """Open the SAE that is to be measured."""
        return self.run.load_sae(self.config.evaluate.step)


def _folders(config: RunConfig) -> list[Path]:
    """List the folders of the runs."""
    given = config.run.dir
    if isinstance(given, str):
        root = Path(given)
        inside = sorted(path.parent for path in root.glob("*/config.yaml"))
        if (root / "config.yaml").exists() or not inside:
            return [root]
        finished = [folder for folder in inside if Run(folder).summary() is not None]
        for folder in inside:
            if folder not in finished:
                log.warning("%s is not finished, and is left out", folder)
        if not finished:
            raise UserError(f"run.dir={root} holds no run that is finished; train one to its end first")
        given = finished
    folders = list(dict.fromkeys(map(Path, given)))
    if config.evaluate.step is not None and len(folders) > 1:
        raise UserError(
            f"evaluate.step={config.evaluate.step} is of one run, and run.dir={config.run.dir} is {len(folders)} of "
            "them; name one"
        )
    return folders


def _grouped(asked: Sequence[_Asked]) -> list[list[_Asked]]:
    groups: dict[str, list[_Asked]] = {}
    for one in asked:
        groups.setdefault(one.reading, []).append(one)
    return list(groups.values())


def _measured(group: Sequence[_Asked]) -> dict[str, dict[str, Any]]:
    """Measure runs of one store in one reading; write what was found, and tell it."""
    began = time.perf_counter()
    measured, *others = _shares(group, group[0].config.evaluate.workers)
    for other in others:
        for mine, theirs in zip(measured, other, strict=True):
            mine.merge(theirs)
    if not measured[0].ordinary.documents:
        raise UserError(
            f"evaluate.tokens={group[0].config.evaluate.tokens} reads {measured[0].contexts:,} held-out contexts that "
            "hold nothing but special tokens, and these do not count; read more, or cache a store of other text"
        )
    found = {}
    for asked, counted in zip(group, measured, strict=True):
        sae = asked.load_sae().to(counted.ordinary.device)
        result = counted.compute(sae)
        seconds = time.perf_counter() - began
        result |= {
            "hook": sae.metadata["hook_name"],
            "target_hook": _target_hook(sae),
            "run_dir": str(asked.run.folder),
            "step": asked.config.evaluate.step,
            "seconds": round(seconds, 2),
            "tokens_per_s": round(result["tokens"] / seconds),
        }
        result["targets"] = comparison.verdicts(result, asked.config.sae)
        _write(asked, result)
        found[str(asked.run.folder)] = result
        log.info("%s", comparison.figures(result))
    return found


def _shares(group: Sequence[_Asked], workers: int) -> "list[list[Measured]]":
    """Measure in this process, or in several, a part of the contexts in each."""
    if workers == 1:
        return [_share(group, 0, 1)]
    others = set(active_children())
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare_worker) as pool:  # CUDA survives no fork
        try:
            with without_interrupts():  # Ctrl-C is for this process to answer
                tasks = [pool.submit(_packed_share, group, part, workers) for part in range(workers)]
            return [pickle.loads(task.result()) for task in tasks]
        except BaseException as error:
            for process in set(active_children()) - others:
                process.kill()  # the pool would wait for what they do
            if not isinstance(error, BrokenProcessPool):
                raise
            raise UserError(
                f"evaluate.workers={workers}: a process was killed, which the system does where memory is short; use "
                "fewer, or a smaller evaluate.batch_prompts"
            ) from None


def _prepare_worker() -> None:
    end_with_parent()
    entry.prepare_process()


def _packed_share(group: Sequence[_Asked], part: int, parts: int) -> bytes:
    """Do `_share` in another process; bytes, since tensors between processes would share memory that ends with one."""
    return pickle.dumps([one.cpu() for one in _share(group, part, parts)])


def _share(group: Sequence[_Asked], part: int, parts: int) -> "list[Measured]":
    """Measure on one of several parts of the contexts, on the GPUs that are this part's."""
    from saepipe.language_model import LanguageModel
    from saepipe.measure import Subject, measure

    config = group[0].config
    hooks = list(dict.fromkeys(hook for asked in group for hook in asked.config.model.hooks))
    model = LanguageModel.open(replace(config.model, hooks=hooks), local_rank=part)
    side = _held_out(group[0], model)
    saes = [asked.load_sae().to(model.device) for asked in group]
    subjects = [Subject(sae, sae.metadata["hook_name"], _target_hook(sae)) for sae in saes]
    with explained_memory("evaluation", evaluate__batch_prompts=config.evaluate.batch_prompts):
        return measure(
            model,
            subjects,
            side,
            config.evaluate.tokens,
            batch_prompts=config.evaluate.batch_prompts,
            inclusive=config.evaluate.inclusive,
            share=(part, parts),
        )


def _target_hook(sae: "SAE") -> str:
    return str(sae.metadata.get("hook_name_out") or sae.metadata["hook_name"])


def _held_out(asked: _Asked, model: "LanguageModel") -> "Side":
    """Open the held-out contexts of a run's store, or, where the store is gone, read them from the data again."""
    config, folder = asked.config, Path(asked.config.store.dir)
    if (folder / "plan.json").is_file() or asked.names_store:
        tokens = asked.run.tokens(folder)
        warn_of_another_model(folder, model)
        side, where = tokens.heldout, f"of held-out documents in {tokens.folder}"
    else:
        from saepipe import tokens as tokenising
        from saepipe.sources import Source

        log.warning(
            "store.dir=%s is not there: held-out documents are read from data.path=%s again (store.dir= says where "
            "the store is now)",
            folder,
            config.data.path,
        )
        source = Source.open(config.data, seed=config.store.seed)
        side = tokenising.held_out(source, model.tokenizer, tokens=config.evaluate.tokens, vocab_size=model.vocab_size)
        where = f"of held-out documents in data.path={config.data.path}"
    if not len(side):
        raise UserError(
            f"data.held_out={config.data.held_out} left no whole context {where}; "
            "cache a store with more documents or a larger data.held_out"
        )
    return side


def _write(asked: _Asked, result: dict[str, Any]) -> None:
    """Put what was found into the run's folder, and into its W&B run where it has one."""
    step = asked.config.evaluate.step
    name = "metrics.json" if step is None else f"step-{step:09d}.json"
    with durable.disk_errors("run.dir", asked.run.folder):
        durable.write_text(asked.run.folder / "eval" / name, json.dumps(_finite(result), indent=1, allow_nan=False))
    if asked.config.logger.name == "wandb":
        from saepipe.loggers import add_to_summary

        figures = {key: value for key, value in result.items() if isinstance(value, int | float)}
        prefix = "evaluate" if step is None else f"evaluate/step-{step:09d}"
        add_to_summary(asked.config, {f"{prefix}/{key}": value for key, value in figures.items()})


def _finite(value: Any) -> Any:
    """Put None for what is not finite, which strict JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Run the verb from the command line."""
    entry.main("evaluate", evaluate)


if __name__ == "__main__":
    main()
