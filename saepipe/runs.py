"""A run's folder: what lies where in it, whose it is, and how the verbs after training open it.

config.yaml  metrics.csv  summary.json  checkpoints/  sae/  eval/metrics.json  features/index.html
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import durable, entry
from saepipe.config import RunConfig
from saepipe.errors import UserError, unknown

log = logging.getLogger(__name__)

PLACES_MODEL = ("device", "n_devices", "device_map", "trust_remote_code")
"""Keys of the model group that say how it is run here, and not what it is."""

AFTER_TRAINING = ("run", "evaluate", "analyze", "steer", "attribute", "contrast")
"""Groups that say what a verb after training is to do, and not what the run is."""

if TYPE_CHECKING:
    from saepipe.language_model import LanguageModel
    from saepipe.saes.base import SAE
    from saepipe.token_store import TokenStore

DECIDES_WEIGHTS = (
    "sae",
    "optim",
    "stream.hook",
    "stream.target_hook",
    "stream.positions",
    "stream.max_norm",
    "stream.roles",
    "stream.batch_tokens",
    "stream.window_tokens",
    "stream.lanes",
    "stream.seed",
    "train.tokens",
    "train.seed",
    "train.init_from",
    "train.compile",
    "trainer.precision",
    "data.exclude_special_tokens",
)
"""Groups and keys that may not differ when a run resumes; and the store may not."""


class Run:
    """The folder of one run.

    Args:
        folder: `run.dir`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.yaml"
        self.summary_file = self.folder / "summary.json"
        self.checkpoints = self.folder / "checkpoints"
        self.sae_folder = self.folder / "sae"
        self._failure_file = self.folder / "failure.txt"

    def summary(self) -> dict[str, Any] | None:
        """Read what training left as its last act; None while the run is not finished.

        Raises:
            UserError: The file is damaged.
        """
        if not self.summary_file.exists():
            return None
        try:
            found = json.loads(self.summary_file.read_text())
            return {**found, "store": dict(found["store"]), "steps": int(found["steps"])}
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"run.dir={self.folder}: summary.json is damaged; delete it and run the same train command again: it "
                "goes on from the last checkpoint"
            ) from None

    def step_folder(self, steps_done: int) -> Path:
        """Folder of the SAE as it was after some of the steps (`train.n_checkpoints`)."""
        return self.folder / "sae_steps" / f"{steps_done:09d}"

    def failure(self) -> str | None:
        """Read why this point of a grid was frozen; None where it was not."""
        return self._failure_file.read_text(errors="replace") if self._failure_file.exists() else None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train: it is finished, or frozen."""
        return self.summary() is not None or self.failure() is not None

    def fail(self, why: str) -> None:
        """Mark a point of a grid as frozen, so that the others go on without it when the grid is resumed."""
        durable.write_text(self._failure_file, why)

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        durable.write_text(self.summary_file, json.dumps(summary, indent=1))

    def refuse_another(self, config: RunConfig) -> None:
        """Refuse to go on with a folder that holds another run.

        Raises:
            UserError: A key that decides the weights differs; the message names it and both values.
        """
        if not self.config_file.exists():
            if self.summary_file.exists() or any(self.checkpoints.glob("step-*")):
                raise UserError(
                    f"run.dir={self.folder} holds a run without its config.yaml, so what it was cannot be told; choose "
                    "another run.dir"
                )
            return
        for key, (mine, there) in entry.differences(config, entry.read_config(self.config_file)).items():
            if not key.startswith(DECIDES_WEIGHTS):
                continue
            if key == "sae":
                there, mine = there.architecture, mine.architecture  # type: ignore[attr-defined]
            raise UserError(
                f"run.dir={self.folder} holds another run: {key} is {_shown(there)} there and {_shown(mine)} here; "
                "choose another run.dir"
            )

    def finished_config(self, config: RunConfig) -> RunConfig:
        """Take a finished run's configuration for a verb that comes after training.

        Args:
            config: What the user asked for: the groups of AFTER_TRAINING, how the model is run (PLACES_MODEL) and a
                typed store.dir are taken from it; all else is the run's, and a typed key that differs is refused.

        Raises:
            UserError: There is no run, it is not finished, or a typed key differs from the run's.
        """
        theirs = entry.read_config(self.config_file)
        if not self.summary_file.is_file() and config.evaluate.step is None:
            raise UserError(
                f"run.dir={self.folder} is not finished; go on with the same train command as before, then come back"
            )
        kept = {"store.dir", *(f"model.{key}" for key in PLACES_MODEL)}
        for group in ("model", "data", "store", "stream", "sae", "optim", "train"):
            for key, (mine, there) in entry.differences(getattr(config, group), getattr(theirs, group), group).items():
                if config.typed(key) and key not in kept and not entry.agree(mine, there):
                    raise UserError(
                        f"{key}={mine} differs from the run's: {self.folder} has {key}={there}; leave the key out"
                    )
        theirs.model = replace(theirs.model, **{key: getattr(config.model, key) for key in PLACES_MODEL})
        if config.typed("store.dir"):  # a store may have moved since
            theirs.store.dir = config.store.dir
        for group in AFTER_TRAINING:
            setattr(theirs, group, getattr(config, group))
        return theirs

    def load_sae(self, step: int | None = None) -> "SAE":
        """Open the run's SAE.

        Args:
            step: Steps after which it was exported; None is the final one.

        Raises:
            UserError: It is missing or damaged; training makes it anew from the last checkpoint.
        """
        from saepipe import formats

        if step is not None:
            there = sorted(int(path.name) for path in self.step_folder(step).parent.glob("[0-9]*"))
            if not there:
                raise UserError(
                    f"evaluate.step={step}: run.dir={self.folder} kept no SAE on the way; leave the key out, or train "
                    "a run with train.n_checkpoints=8"
                )
            if step not in there:
                raise unknown(
                    "evaluate.step", step, map(str, there), "Those are the steps that train.n_checkpoints left."
                )
            return _placed(formats.load(self.step_folder(step)), self.step_folder(step))
        try:
            return _placed(formats.load(self.sae_folder), self.sae_folder)
        except UserError as error:
            raise UserError(
                f"{error} (delete {self.summary_file} and run the same train command again: it exports the last "
                "checkpoint)"
            ) from error

    def tokens(self, store: str | Path) -> "TokenStore":
        """Open the tokens of the very store that the run was trained on.

        Args:
            store: `store.dir`, where the store is now.

        Raises:
            UserError: The store is gone or another one.
        """
        from saepipe.plan import Plan
        from saepipe.store import Store

        folder = Path(store)
        if not (folder / "plan.json").is_file():
            raise UserError(
                f"store.dir={folder}, on which run.dir={self.folder} was trained, is not there; say with store.dir= "
                "where it is now, or make it again with the same cache command as before"
            )
        finished = self.summary()
        if finished and Plan.load(folder).identity != finished["store"].get("identity"):
            raise UserError(
                f"store.dir={folder} is another store than the one on which run.dir={self.folder} was trained; say "
                "with store.dir= where that one is"
            )
        tokens = Store.open(folder, complete=False).tokens
        tokens.verify()
        return tokens


def warn_of_another_model(store: str | Path, model: "LanguageModel") -> None:
    """Say so where a language model is not as it was when the store was made: its SAEs were not trained on it.

    Args:
        store: `store.dir`.
        model: The model that is to be read.
    """
    from saepipe.plan import Plan

    there, here = Plan.load(Path(store)).model, model.identity
    for key in ("weights", "revision"):
        if there.get(key) and here[key] and there[key] != here[key]:
            log.warning(
                "model.name=%s is not as it was when store.dir=%s was made (%s %s then, and %s now): what follows is "
                "of the model as it is now",
                *(model.name, store, key, there[key], here[key]),
            )


def _placed(sae: "SAE", folder: Path) -> "SAE":
    """Refuse an SAE that does not say where in the model it belongs."""
    for key in ("hook_name", "hook_name_out") if sae.is_transcoder else ("hook_name",):
        if not isinstance(found := sae.metadata.get(key), str):
            raise UserError(f"{folder}/cfg.json has no valid {key} in its metadata (found {found}); write it there")
    return sae


def _shown(value: object) -> str:
    """Write a value as one types it: a number that may have a fraction without one where it has none."""
    return f"{value:g}" if isinstance(value, float) else str(value)
