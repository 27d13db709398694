import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_finished
import torch

from saepipe import entry
from saepipe.contrast import contrast
from saepipe.demo import corpus
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.hooked import load_model

PLANTED = 4


def texts(register: str, n: int, seed: int) -> list[str]:
    """The beginnings of some documents of a register."""
    found = (document for document in corpus.documents(seed) if document.register == register)
    return [next(found).text[:120].replace("\n\n", "\n") for _ in range(n)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which one latent that is silent else is planted to tell HTTP from recipes."""
    folder = small_finished.make(tmp_path_factory.mktemp("made"))
    model, sae = load_model("demo", device="cpu"), saelens.load(folder / "run/sae")
    hook = small_finished.HOOK
    http, recipes = (
        torch.cat([model.run_with_cache(text, names_filter=[hook])[1][hook][0, 1:] for text in texts(register, 12, 1)])
        for register in ("http", "recipe")
    )
    direction = http.mean(0) - recipes.mean(0)
    with torch.no_grad():
        sae.W_enc[:, PLANTED] = direction
        sae.b_enc[PLANTED] = -(direction @ ((http.mean(0) + recipes.mean(0)) / 2 - sae.b_dec))
    saelens.save(sae, folder / "run/sae", metadata={"hook_name": hook, "model_name": "demo"})
    for name, register in (("http", "http"), ("recipes", "recipe")):
        (folder / f"{name}.txt").write_text("\n\n".join(texts(register, 12, 2)))
    (folder / "one.txt").write_text("one alone")
    (folder / "long.txt").write_text("word " * 300 + "\n\nshort")
    (folder / "half.jsonl").write_text('{"text": "half \\ud83d"}\n{"text": "some"}\n')
    (folder / "empty.jsonl").write_text('{"text": "some"}\n{"text": ""}\n')
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return contrast(entry.load_config("contrast", [f"run.dir={folder}/run", "contrast.resamples=200", *overrides]))


def test_a_planted_latent_separates_texts_of_which_none_was_used_to_plant_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "saepipe")
    result = run(folder, f"contrast.a={folder}/http.txt", f"contrast.b={folder}/recipes.txt", "contrast.latents=96")
    rows = {one["latent"]: one for one in result["latents"]}
    planted = rows[PLANTED]
    assert planted["auroc"] > 0.95
    assert planted["auroc_interval"][0] > 0.7
    low, high = planted["difference_interval"]
    assert 0 < low < planted["difference"] < high
    assert planted["difference"] == pytest.approx(planted["mean_a"] - planted["mean_b"], rel=1e-4)
    assert planted["p_adjusted"] < 0.01
    distances = [round(abs(one["auroc"] - 0.5), 6) for one in result["latents"]]
    assert distances == sorted(distances, reverse=True)
    assert (result["a"]["texts"], result["b"]["texts"]) == (12, 12)
    assert json.loads(Path(result["file"]).read_text()) == {k: v for k, v in result.items() if k != "file"}
    assert re.fullmatch(f"{folder}/run/contrast/http-recipes-[0-9a-f]{{6}}.json", result["file"])
    said = caplog.text
    assert f"{result['tested']:,} were looked at: the best of so many look better than they are" in said


def test_the_other_way_round_gives_the_opposite(folder: Path) -> None:
    there = run(folder, f"contrast.a={folder}/http.txt", f"contrast.b={folder}/recipes.txt", "contrast.measure=max")
    back = run(folder, f"contrast.a={folder}/recipes.txt", f"contrast.b={folder}/http.txt", "contrast.measure=max")
    first, again = ({one["latent"]: one["auroc"] for one in result["latents"]} for result in (there, back))
    assert first.keys() == again.keys()
    for latent, auroc in first.items():
        assert again[latent] == pytest.approx(1 - auroc, abs=1e-6)


def test_long_texts_are_cut_where_that_is_asked_for_and_few_are_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(folder, f"contrast.a={folder}/long.txt", f"contrast.b={folder}/http.txt", "contrast.truncate=true")
    assert result["a"]["texts"] == 2
    assert "long.txt holds 2 texts, with which intervals are wide" in caplog.text


@pytest.mark.parametrize("key", ["contrast.resamples=20000000", f"contrast.seed={2**70}", f"contrast.seed=-{2**70}"])
def test_numbers_that_nothing_can_be_drawn_with_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=key.split("=")[0]):
        entry.load_config("contrast", [key])


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("half.jsonl", "http.txt", "contrast.a: text 1, .* is no text that has an encoding"),
        (None, "http.txt", "contrast.a is not set; give a local file or folder"),
        ("http.txt", None, "contrast.b is not set; give a local file or folder"),
        ("nowhere.txt", "http.txt", "contrast.a=.*nowhere.txt does not exist"),
        ("http.txt", "one.txt", "contrast.b=.*one.txt holds one text; give several"),
        ("long.txt", "http.txt", r"contrast.a: text 1, 'word .* more than the 256"),
        ("http.txt", "empty.jsonl", "contrast.b: text 2, '' holds no token that counts"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(made: Path, a: str | None, b: str | None, said: str) -> None:
    given = [f"contrast.{name}={made}/{file}" for name, file in (("a", a), ("b", b)) if file]
    with pytest.raises(UserError, match=said):
        run(made, *given)
    assert not (made / "run" / "contrast").exists()
