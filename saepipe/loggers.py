"""Where metrics go: `metrics.csv` in the run's folder, always, and Weights & Biases or tensorboard on request."""

import csv
import hashlib
import io
import logging
import os
import socket
import urllib.request
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jaxtyping import Float
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from saepipe import durable, entry
from saepipe.config import RunConfig
from saepipe.errors import UserError

log = logging.getLogger(__name__)

_ANSWER_S = 5.0
"""How long a server is waited for; W&B itself would wait for 90 s, at the start of every job."""


class CSVMetrics(Logger):
    """One row of metrics per logged step, appended to a CSV file that survives a resume.

    Lightning's own CSV logger forgets the earlier rows when a run resumes; this one keeps those up to the restored step
    and drops the rest, since the resumed steps write them again.

    Args:
        path: The file.
        start_step: Step that training starts from; rows beyond it are dropped.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        super().__init__()
        self._path = path
        self._rows: list[dict[str, str]] = []
        if start_step and path.is_file():
            self._rows = _rows(path, start_step)
        self._columns = list(self._rows[0]) if self._rows else []
        self._rewrite()

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one file per run, hence one version."""
        return "0"

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml in the same folder holds the configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row, or add to that of the same step; a metric that was not there before adds a column."""
        row = {"step": str(step), **{key: repr(float(value)) for key, value in metrics.items()}}
        again = bool(self._rows) and self._rows[-1]["step"] == row["step"]
        if again:
            self._rows[-1] |= row
        else:
            self._rows.append(row)
        if again or set(row) - set(self._columns):
            self._columns += [key for key in row if key not in self._columns]
            self._rewrite()
            return
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        if self._columns:
            writer.writeheader()
        writer.writerows(self._rows)
        durable.write_text(self._path, text.getvalue())


def _rows(path: Path, last_step: int) -> list[dict[str, str]]:
    """Read the whole rows of a CSV file up to a step; a full disk or a crash may have torn the last one."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = (line for line in file if len(line) < csv.field_size_limit() and "\0" not in line)
        found = [
            row
            for row in csv.DictReader(lines)
            if None not in (*row, *row.values()) and str(row.get("step")).isdecimal()
        ]
    return [row for row in found if int(row["step"]) <= last_step]


def open_loggers(config: RunConfig, start_step: int) -> list[Logger]:
    """Open the loggers of a run.

    Raises:
        UserError: The package of the chosen logger is not installed.
    """
    folder = Path(config.run.dir)
    opened: list[Logger] = [CSVMetrics(folder / "metrics.csv", start_step)]
    if config.logger.name == "wandb":
        opened.append(_wandb(config, folder))
    if config.logger.name == "tensorboard":
        opened.append(_tensorboard(folder))
    return opened


@contextmanager
def opened(config: RunConfig, start_step: int) -> Iterator[list[Logger]]:
    """Have the loggers of a run open while the block runs; an error in it leaves no W&B run that looks finished."""
    loggers = open_loggers(config, start_step)
    failed = True
    try:
        yield loggers
        failed = False
    finally:
        for logger in loggers:
            logger.finalize("failed" if failed else "success")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=int(failed))


def add_to_summary(config: RunConfig, figures: Mapping[str, float]) -> None:
    """Put figures into the summary of a run's W&B run, which is made where it was trained without one.

    Raises:
        UserError: W&B is not installed, or cannot start.
    """
    run = _wandb(config, Path(config.run.dir)).experiment
    run.summary.update(dict(figures))
    run.finish()


def log_density(logger: Logger, density: Float[Tensor, " d_sae"], step: int) -> None:
    """Show how often latents fire, as a histogram of log10, where the logger has pictures.

    Args:
        logger: The logger.
        density: Fraction of tokens on which each latent fires.
        step: Steps done.
    """
    if not isinstance(logger, WandbLogger | TensorBoardLogger):
        return
    logs = (density + 1e-10).log10().cpu()
    if isinstance(logger, WandbLogger):
        import wandb

        logger.log_metrics({"plots/feature_density_line_chart": wandb.Histogram(logs.numpy())}, step)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram("plots/feature_density_line_chart", logs, step)


def _wandb(config: RunConfig, folder: Path) -> WandbLogger:
    """Open a W&B run whose id is a hash of the run's folder, so that a resumed run continues its own charts."""
    try:
        import wandb
    except ImportError:
        raise UserError("logger=wandb needs the package wandb; pip install wandb, or logger=csv") from None
    group = config.logger.group or entry.sweep_of(folder)
    try:
        run = wandb.init(
            name=config.run.dir,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            project=config.logger.project,
            entity=config.logger.entity,
            group=None if group is None else str(group),
            dir=str(folder),
            mode="offline" if config.logger.offline or not _reachable(wandb.setup().settings.base_url) else None,
            resume="allow",
            reinit="create_new",  # the points of a grid have a run each
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"logger=wandb cannot start ({str(error).splitlines()[0]}); run `wandb login`, or set logger.offline=true"
        ) from error
    return WandbLogger(experiment=run)


def _reachable(url: str) -> bool:
    """Tell whether somebody answers at a server's address, or at the proxy before it; WANDB_MODE is believed."""
    if "WANDB_MODE" in os.environ:
        return True
    asked = urlsplit(url)
    proxy = None if urllib.request.proxy_bypass(asked.netloc) else urllib.request.getproxies().get(asked.scheme)
    where = urlsplit(proxy or url)
    try:
        socket.create_connection(
            (where.hostname, where.port or (443 if where.scheme == "https" else 80)), _ANSWER_S
        ).close()
    except OSError as error:
        log.warning("%s cannot be reached (%s): W&B's files stay here, for `wandb sync` later", proxy or url, error)
        return False
    return True


def _tensorboard(folder: Path) -> Logger:
    try:
        import tensorboard  # noqa: F401  (Lightning imports it later and would say less)
    except ImportError:
        raise UserError(
            "logger=tensorboard needs the package tensorboard; pip install 'saepipe[tensorboard]', or logger=csv"
        ) from None
    return TensorBoardLogger(save_dir=str(folder), name="", version="tensorboard")
