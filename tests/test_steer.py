import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_finished
from small_finished import D_SAE

from saepipe import entry
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.hooked import load_model
from saepipe.reading import Texts
from saepipe.steer import steer
from saepipe.steering import Steer
from saepipe.typical import Typical

FEW = ("steer.samples=2", "steer.tokens=5")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_finished.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def run(folder: Path, *overrides: str, dir: str = "run") -> dict[str, Any]:
    return steer(entry.load_config("steer", [f"run.dir={folder}/{dir}", f"store.dir={folder}/store", *FEW, *overrides]))


def live(folder: Path) -> int:
    """A latent that fires in every text."""
    model, sae = load_model("demo", device="cpu"), saelens.load(folder / "run/sae")
    texts = Texts(model, ["GET /index.html HTTP/1.1", "Dear Sir or Madam,"])
    return int(Typical.measure(model, sae, texts.batches(2)).fired.argmax())


def test_it_generates_as_the_same_call_in_python(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saepipe")
    latent = live(folder)
    (folder / "own.txt").write_text("GET /index.html HTTP/1.1\n\nDear Sir or Madam,\n")
    own = f"steer.texts={folder}/own.txt"
    result = run(folder, f"steer.latents=[{latent}]", "steer.strength=3", 'steer.prompt="GET /"', own)
    model, sae = load_model("demo", device="cpu"), saelens.load(folder / "run/sae")
    typical = Typical.measure(model, sae, Texts(model, ["GET /index.html HTTP/1.1", "Dear Sir or Madam,"]).batches(2))
    keys = {"max_new_tokens": 5, "seed": 0}
    assert result["plain"] == model.generate(["GET /"] * 2, **keys)
    hooks = Steer(sae, {latent: 3.0}, typical=typical).fwd_hooks
    assert result["steered"] == model.generate(["GET /"] * 2, fwd_hooks=hooks, **keys)
    (one,) = result["latents"]
    assert one == {"latent": latent, "label": None, "typical": typical.of(latent), "amount": 3 * typical.of(latent)}
    assert json.loads(Path(result["file"]).read_text()) == {k: v for k, v in result.items() if k != "file"}
    assert re.fullmatch(f"{folder}/run/steer/add-{latent}-3-GET-[0-9a-f]{{6}}.json", result["file"])
    said = caplog.text
    assert f"latent {latent} at {one['amount']:.4g}, 3 times the typical" in said
    assert json.dumps(result["steered"][1], ensure_ascii=False) in said


def test_the_typical_activation_is_that_of_the_run_s_held_out_tokens(folder: Path) -> None:
    latent = live(folder)
    first = run(folder, f"steer.latents=[{latent}]")
    assert run(folder, f"steer.latents=[{latent}]") == first
    typical = first["latents"][0]["typical"]
    shutil.rmtree(folder / "store")
    given = run(folder, f"steer.latents=[{latent}]", f"steer.typical={typical!r}")
    assert given["steered"] == first["steered"]
    with pytest.raises(UserError, match=r"store.dir=.* is not there; .*, or give texts of your own with steer.texts="):
        run(folder, f"steer.latents=[{latent}]")


def test_each_latent_may_have_a_strength_of_its_own(folder: Path) -> None:
    result = run(folder, "steer.latents=[9,4]", "steer.strength=[3,-0.5]", "steer.typical=2")
    assert [(one["latent"], one["amount"]) for one in result["latents"]] == [(9, 6.0), (4, -1.0)]
    assert Path(result["file"]).name.startswith("add-9-4-3--0.5-")
    other = run(folder, "steer.latents=[9,4]", "steer.strength=[3,-0.5]", "steer.typical=2", "steer.seed=1")
    assert other["file"] != result["file"]  # neither request takes the other's place


def test_a_latent_is_called_as_on_the_feature_page(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saepipe")
    (folder / "run/features").mkdir()
    (folder / "run/features/labels.json").write_text('{"9": "HTTP"}')
    result = run(folder, "steer.latents=[9,4]", "steer.mode=ablate")
    assert [one["label"] for one in result["latents"]] == ["HTTP", None]
    assert "latent 9 (HTTP)\n  latent 4\n" in caplog.text


def test_ablating_needs_no_typical_activation(folder: Path) -> None:
    shutil.rmtree(folder / "store")
    result = run(folder, "steer.latents=[0,9]", "steer.mode=ablate")
    assert [one["latent"] for one in result["latents"]] == [0, 9]
    assert Path(result["file"]).name.startswith("ablate-0-9-")
    assert run(folder, "steer.latents=[0]", "steer.mode=ablate")["steered"] == result["plain"]  # 0 never fires


@pytest.mark.parametrize("temperature", ["1e-30", "1e-40", "1e-320"])
def test_hardly_any_temperature_takes_the_likeliest_token(folder: Path, temperature: str) -> None:
    keys = ("steer.latents=[9]", "steer.mode=ablate")
    assert (
        run(folder, *keys, f"steer.temperature={temperature}")["plain"]
        == run(folder, *keys, "steer.temperature=0")["plain"]
    )


def test_a_prompt_of_any_script_names_the_file_and_is_shown_as_it_is(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "saepipe")
    result = run(folder, "steer.latents=[9]", "steer.mode=ablate", f"steer.prompt={'漢字' * 40}")
    assert Path(result["file"]).name.startswith("ablate-9-漢字")
    assert f'goes on from "{result["prompt"]}"' in caplog.text


def test_a_typed_model_is_that_of_an_exported_sae(folder: Path) -> None:
    keys = ("steer.latents=[9]", "steer.typical=2")
    with pytest.raises(UserError, match=r"model\.name=/nowhere does not exist"):
        run(folder, *keys, "model.name=/nowhere", dir="run/sae")
    cfg = folder / "run/sae/cfg.json"
    cfg.write_text(cfg.read_text().replace('"model_name": "demo"', '"model_name": 5'))
    assert run(folder, *keys, "model.name=demo", dir="run/sae")["steered"] == run(folder, *keys)["steered"]
    with pytest.raises(UserError, match=r"cfg\.json says model_name=5, which is no name; give model\.name="):
        run(folder, *keys, dir="run/sae")


def test_an_exported_sae_needs_no_run(folder: Path) -> None:
    shutil.copytree(folder / "run/sae", folder / "export")
    keys = ("steer.latents=[9]", "steer.typical=2")
    alone = run(folder, *keys, dir="export")
    assert alone["steered"] == run(folder, *keys)["steered"]
    with pytest.raises(
        UserError, match=r"is an exported SAE and has no store; name its run, or give texts of your own with steer"
    ):
        run(folder, "steer.latents=[9]", dir="export")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], r"steer.latents=\[\] names no latent; give some"),
        ([f"steer.latents=[{D_SAE}]"], rf"steer.latents: latents={D_SAE} is none of the SAE's {D_SAE}"),
        (
            ["steer.latents=[0]"],
            "steer.typical: latent 0 fired on none of the .* tokens that were read",
        ),
        (["steer.latents=[9]", "steer.tokens=256"], "steer.tokens=256 after a prompt of 1 tokens is more than the 256"),
        (["steer.latents=[9]", f"steer.prompt={'word ' * 300}"], "steer.prompt: input has .* more than the 256"),
        (["steer.latents=[9]", "steer.positions=[6]"], r"steer.positions=\[6\] goes beyond .* last position is 5"),
        (["steer.latents=[9]", "steer.positions=[-1]"], r"steer.positions=\[-1\] is no list of positions"),
        (
            ["steer.latents=[9,9]", "steer.mode=ablate"],
            r"steer.latents: latents=\[9, 9\] names a latent more than once",
        ),
        (["steer.latents=[9]", "steer.strength=nan"], "steer.strength=nan is no strength; give a number"),
        (["steer.latents=[9]", "steer.strength=strong"], "steer.strength=strong is no strength; give a number"),
        (
            ["steer.latents=[9]", "steer.strength=[1,2]"],
            "2 numbers and steer.latents=.9. are 1; give one number for all",
        ),
        (["steer.latents=9"], r"steer.latents=9 is no list; give its items in brackets, steer.latents=\[...\]"),
        (["steer.latents=[9]", "steer.strength=1e300"], "steer.strength=1e.300 is no strength; give a number"),
        (["steer.latents=[9]", f"steer.seed={2**70}"], "steer.seed=.* is no number that can be used"),
        (
            ["steer.latents=[9]", "steer.prompt=caf\udce9"],
            r"steer.prompt: 'caf\\udce9' is no text that has an encoding",
        ),
        (["steer.latents=[9]", "steer.mode=abblate"], "steer.mode=abblate is not known; did you mean ablate"),
        (["steer.latents=[9]", "steer.texts=/nowhere.txt"], "steer.texts=/nowhere.txt does not exist"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(made: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(made, *overrides)
    assert not (made / "run" / "steer").exists()
