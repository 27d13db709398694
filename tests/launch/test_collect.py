"""The table of a sweep."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from launch.collect import collect
from saepipe import entry
from saepipe.errors import UserError


def make(folder: Path, k: int, *, figures: dict[str, Any] | None = None, frozen: str | None = None) -> None:
    config = entry.load_config("train", ["sae=topk", f"sae.k={k}", f"run.dir={folder}"])
    entry.save_config(config, folder / "config.yaml")
    if figures is not None:
        store = {"dir": "acts", "identity": "0"}
        summary = {"store": store, "steps": 30, "tokens_per_s": 9, "metrics": {"sparsity/dead_features": 3.0}}
        (folder / "summary.json").write_text(json.dumps(summary))
        for name in ("eval/metrics.json", "features/index.html"):
            (folder / name).parent.mkdir()
            (folder / name).write_text(json.dumps(figures))
    if frozen:
        (folder / "failure.txt").write_text(frozen)


def test_points_are_compared_in_the_order_of_their_l0(tmp_path: Path) -> None:
    make(tmp_path / "sae.k=16", 16, figures={"l0": 16.0, "explained_variance": 0.9, "ce_loss_score": 0.99})
    make(tmp_path / "sae.k=4", 4, figures={"l0": 4.0, "explained_variance": 0.7, "ce_loss_score": 0.9})
    make(tmp_path / "sae.k=8", 8)
    make(tmp_path / "sae.k=9", 9, frozen="losses/mse_loss was not finite")
    make(tmp_path / "sae.k=2", 2, figures={"l0": 2.0})
    (tmp_path / "sae.k=2" / "eval" / "metrics.json").write_text("")  # what a full disk may leave
    collect(tmp_path)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sae.k"], row["state"]) for row in rows] == [
        *(("4", "evaluated"), ("16", "evaluated")),
        *(("2", "trained"), ("8", "not finished"), ("9", "frozen")),
    ]
    assert (rows[0]["explained_variance"], rows[0]["dead_in_training"], rows[0]["kl_div_score"]) == ("0.7", "3.0", "")
    assert "sae.k%3D4/features/index.html" in (tmp_path / "pareto.html").read_text()
    assert (tmp_path / "pareto.svg").read_text().startswith("<svg ")


@pytest.mark.parametrize(
    "content",
    ["[1]", "null", '{"l0": NaN}', '{"l0": 1e999}', '{"l0": "x"}', '{"targets": {"l0": {}}}', '{"targets": 3}'],
)
def test_what_holds_no_figures_is_told_and_left_out(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "sae.k=16", 16, figures={"l0": 16.0})
    (tmp_path / "sae.k=16" / "eval" / "metrics.json").write_text(content)
    (row,) = collect(tmp_path)
    assert (row["state"], row["l0"]) == ("trained", None)
    assert "is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    make(tmp_path / "sae.k=16", 16)
    (tmp_path / "sweep.csv").mkdir()
    with pytest.raises(UserError, match=f"runs={tmp_path} cannot be written"):
        collect(tmp_path)


def test_a_missed_target_is_marked_and_its_cure_is_in_the_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    targets = {"l0": {"met": False, "cure": "raise sae.k (16)"}, "dead_fraction": {"met": True, "cure": ""}}
    make(tmp_path / "sae.k=16", 16, figures={"l0": 16.0, "dead_fraction": 0.01, "targets": targets})
    caplog.set_level("INFO", "saepipe")
    (row,) = collect(tmp_path)
    assert (row["targets_missed"], row["cure"]) == ("l0", "raise sae.k (16)")
    assert "16*" in caplog.text
    assert "1.00%*" not in caplog.text
    page = (tmp_path / "pareto.html").read_text()
    assert '<span class="missed" title="misses the target">16</span>' in page
    assert "raise sae.k (16)" in page


def test_one_run_is_a_table_of_its_own_and_none_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "x", 4, figures={"l0": 4.0, "explained_variance": 0.7, "ce_loss_score": None})
    assert [row["point"] for row in collect(tmp_path / "x")] == ["x"]
    with pytest.raises(UserError, match="holds no run"):
        collect(tmp_path / "empty")
