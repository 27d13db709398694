import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_finished
from small_finished import D_SAE, HELD_OUT, SEQ

from saepipe import entry
from saepipe.attribute import attribute
from saepipe.attribution import by_gradient, direct
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.hooked import load_model

PROMPT = "attribute.prompt=GET /index.html"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_finished.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    keys = [f"run.dir={folder}/run", f"store.dir={folder}/store", "attribute.steps=4", *overrides]
    return attribute(entry.load_config("attribute", keys))


def test_it_is_what_the_same_calls_give_in_python(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saepipe")
    result = run(folder, PROMPT, 'attribute.target=" HTTP"', 'attribute.against=" the"', "attribute.latents=3")
    model, sae = load_model("demo", device="cpu"), saelens.load(folder / "run/sae")
    call = (model, sae, "GET /index.html", " HTTP", " the")
    parts, gradient = direct(*call), by_gradient(*call, steps=4)
    assert result["logit"] == pytest.approx(gradient.logit)
    assert result["direct"]["total"] == pytest.approx(result["logit"], abs=1e-4)
    top = parts.latents.abs().topk(3).indices.tolist()
    assert [one["latent"] for one in result["direct"]["latents"]] == top
    assert result["direct"]["latents"][0]["adds"] == pytest.approx(float(parts.latents[top[0]]))
    first = result["gradient"]["latents"][0]
    assert first["effect"] == pytest.approx(float(gradient.latents[first["position"], first["latent"]]))
    assert abs(first["effect"]) == pytest.approx(float(gradient.latents.abs().max()))
    assert first["token"] == model.to_str_tokens("GET /index.html")[first["position"]]
    assert json.loads(Path(result["file"]).read_text()) == {k: v for k, v in result.items() if k != "file"}
    said = caplog.text
    assert f"{first['effect']:+.3f}" in said
    assert "integrated gradients, 4 steps" in said


def test_without_a_target_it_is_the_likeliest_token(folder: Path) -> None:
    model = load_model("demo", device="cpu")
    likeliest = int(model("GET /index.html")[0, -1].argmax())
    result = run(folder, PROMPT)
    assert result["target"] == model.to_single_str_token(likeliest)
    assert result["logit"] == pytest.approx(model("GET /index.html")[0, -1, likeliest].item(), abs=1e-4)


def test_the_likeliest_token_may_be_a_part_of_a_character(folder: Path) -> None:
    model = load_model("demo", device="cpu")
    likeliest = int(model("ב")[0, -1].argmax())
    assert "\ufffd" in model.to_single_str_token(likeliest)
    assert run(folder, "attribute.prompt=ב")["logit"] == pytest.approx(model("ב")[0, -1, likeliest].item(), abs=1e-4)


def test_ablation_is_measured_on_held_out_tokens(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saepipe")
    result = run(folder, "attribute.ablate=[0,9]", f"attribute.tokens={HELD_OUT * SEQ}")
    silent, other = result["ablation"]
    assert (silent["ce_increase"], silent["ce_increase_where_active"], silent["active"]) == (0.0, None, 0)
    assert other["active"] > 0
    assert other["ce_increase"] != 0
    assert 0 < other["tokens"] < HELD_OUT * (SEQ - 1)
    assert f"on {other['tokens']:,} tokens" in caplog.text
    assert "prompt" not in result


def test_an_sae_off_the_residual_stream_has_gradients_alone(folder: Path) -> None:
    sae = saelens.load(folder / "run/sae")
    saelens.save(sae, folder / "run/sae", metadata={"hook_name": "blocks.1.attn.hook_z"})
    result = run(folder, PROMPT)
    assert result["direct"] is None
    assert result["gradient"]["latents"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "attribute.prompt is not set, nor is attribute.ablate"),
        ([PROMPT, "attribute.target=zz qq"], "attribute.* target: string='zz qq' is .* tokens"),
        ([PROMPT, "attribute.target=\udce9"], "attribute: target: .* is no text that has an encoding"),
        (["attribute.ablate=[9,9]"], r"attribute.ablate: latents=\[9, 9\] names a latent more than once"),
        ([PROMPT, "attribute.position=99"], "attribute.position=99 is none of the prompt's"),
        ([f"attribute.prompt={'word ' * 300}"], "attribute.prompt: input has .* more than the 256"),
        (["attribute.prompt=''"], "attribute.prompt is empty; give a text"),
        ([f"attribute.ablate=[{D_SAE}]"], f"attribute.ablate: latents={D_SAE} is none of the SAE's"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(made: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(made, *overrides)
    assert not (made / "run" / "attribute").exists()
