import csv
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

from saepipe import entry
from saepipe.errors import UserError
from saepipe.loggers import CSVMetrics, log_density, open_loggers, opened


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_step_is_one_row(tmp_path: Path) -> None:
    log = CSVMetrics(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 0.5, "l0": 3}, step=1)
    log.log_metrics({"loss": 0.25, "l0": 2}, step=2)
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "0.5", "l0": "3.0"},
        {"step": "2", "loss": "0.25", "l0": "2.0"},
    ]


def test_a_metric_that_comes_later_adds_a_column(tmp_path: Path) -> None:
    log = CSVMetrics(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 0.5}, step=1)
    log.log_metrics({"loss": 0.25, "rate": 9.0}, step=2)
    log.log_metrics({"loss": 0.125, "rate": 8.0}, step=3)
    assert [row["rate"] for row in rows(tmp_path / "metrics.csv")] == ["", "9.0", "8.0"]


def test_what_is_logged_of_a_step_later_joins_its_row(tmp_path: Path) -> None:
    log = CSVMetrics(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 0.5}, step=1)
    log.log_metrics({"held": 9.0}, step=1)
    log.log_metrics({"held": 8.0}, step=2)
    log.log_metrics({"loss": 0.25, "held": 7.0}, step=3)
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "0.5", "held": "9.0"},
        {"step": "2", "loss": "", "held": "8.0"},
        {"step": "3", "loss": "0.25", "held": "7.0"},
    ]
    CSVMetrics(tmp_path / "metrics.csv", start_step=2).log_metrics({"loss": 0.125, "held": 6.0}, step=3)
    assert [row["loss"] for row in rows(tmp_path / "metrics.csv")] == ["0.5", "", "0.125"]


def test_a_resume_keeps_the_rows_up_to_its_step(tmp_path: Path) -> None:
    first = CSVMetrics(tmp_path / "metrics.csv")
    for step in range(1, 6):
        first.log_metrics({"loss": 1 / step}, step=step)
    resumed = CSVMetrics(tmp_path / "metrics.csv", start_step=3)
    resumed.log_metrics({"loss": 0.25}, step=4)
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["1", "2", "3", "4"]
    CSVMetrics(tmp_path / "metrics.csv")  # a fresh start
    assert rows(tmp_path / "metrics.csv") == []


@pytest.mark.parametrize("tail", [b"4", b"4,0.", b"\xff\xfe", b"x,y\n", b"4,1.0,2,3\n"])
def test_a_torn_last_row_is_dropped(tmp_path: Path, tail: bytes) -> None:
    log = CSVMetrics(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        log.log_metrics({"loss": 0.5, "l0": 1}, step=step)
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(tail)
    CSVMetrics(tmp_path / "metrics.csv", start_step=9).log_metrics({"loss": 0.5, "l0": 1}, step=10)
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["1", "2", "3", "10"]


@pytest.mark.parametrize("tail", [b"\0" * 200_000, b"9" * 200_000 + b"\n"])
def test_a_long_torn_tail_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.csv"
    CSVMetrics(path).log_metrics({"loss": 1.0}, step=1)
    before = path.read_bytes()
    path.write_bytes(before + tail)
    CSVMetrics(path, start_step=1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_other_loggers_write_beside_the_csv(tmp_path: Path, logger: str) -> None:
    config = entry.load_config("train", [f"run.dir={tmp_path}", f"logger={logger}", "logger.offline=true"])
    with opened(config, start_step=0) as found:
        for log in found:
            log.log_metrics({"loss": 0.5}, step=1)
            log_density(log, torch.rand(64), 1)
    assert rows(tmp_path / "metrics.csv")
    assert [path for path in (tmp_path / logger).rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("folder", "more", "expected"),
    [("runs/one", [], None), ("runs/s/sae.k=4", [], "runs/s"), ("runs/s/sae.k=8", ["logger.group=mine"], "mine")],
)
def test_the_points_of_a_sweep_are_a_group_in_wandb_and_without_a_network_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    more: list[str],
    expected: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it reads the environment once
    entry.prepare_process()
    ids = set()
    for _ in range(2):  # a requeue goes on in the same run
        config = entry.load_config("train", ["logger=wandb", *more])
        config.run.dir = folder
        Path(folder).mkdir(parents=True, exist_ok=True)
        with opened(config, start_step=0) as (_, found):
            assert isinstance(found, WandbLogger)
            assert found.experiment.settings.mode == "offline"
            assert found.experiment.group == (expected or "")
            ids.add(found.experiment.id)
    wandb.teardown()
    assert len(ids) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().out


def test_a_logger_that_is_not_installed_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    config = entry.load_config("train", [f"run.dir={tmp_path}", "logger=tensorboard"])
    with pytest.raises(UserError, match=r"saepipe\[tensorboard\]"):
        open_loggers(config, start_step=0)
