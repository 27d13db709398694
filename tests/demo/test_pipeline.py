from pathlib import Path

import pytest

from saepipe.demo.pipeline import VERBS, demo, table
from saepipe.errors import UserError

SMALL = ["store.tokens=6000", "train.tokens=6144", "evaluate.tokens=2000", "analyze.tokens=2000", "sae.expansion=4"]


@pytest.mark.prove
def test_every_verb_runs_and_the_table_has_its_figures(tmp_path: Path) -> None:
    overrides = [*SMALL, f"store.dir={tmp_path}/store", f"run.dir={tmp_path}/run", "analyze.latents=4"]
    results = demo(overrides)
    assert tuple(results) == VERBS
    said = table(results)
    for words in ("L0 ", "explained variance", "CE score", "dead latents", *(f"{verb}, tokens/s" for verb in VERBS)):
        assert words in said
    assert Path(results["analyze"]["page"]).is_file()
    assert f"{tmp_path}/run/sae" in said
    assert "done before" in table(demo(overrides))  # the second time


def test_a_mistake_comes_back_as_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sae\.k=0"):
        demo(["sae.k=0", f"store.dir={tmp_path}/store"])
