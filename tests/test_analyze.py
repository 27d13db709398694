import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_finished
import torch
from small_finished import ALL, D_SAE, DEAD, HELD_OUT, HOOK, SEQ, TRAIN
from small_pages import generation, latents_of

from saepipe import entry, latent_labels
from saepipe.analyze import analyze
from saepipe.config import ModelConfig
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.language_model import LanguageModel
from saepipe.saes.topk import TopKConfig, TopKSAE


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(ModelConfig(hooks=[HOOK]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_finished.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to change; its store has moved."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def run(folder: Path, *overrides: str) -> dict[str, object]:
    return analyze(entry.load_config("analyze", [f"run.dir={folder}/run", f"store.dir={folder}/store", *overrides]))


def test_page_agrees_with_brute_force(folder: Path, model: LanguageModel) -> None:
    before = {path for path in folder.rglob("*") if path.is_file()}
    result = run(folder, "analyze.contexts=3", "analyze.batch_prompts=5")
    page = folder / "run" / "features" / "index.html"
    added = {path for path in folder.rglob("*") if path.is_file()} - before
    names = page.parent / "labels.json"
    assert added - {page, page.parent / ".lock", names} == set(generation(page).iterdir())
    latents = {latent["index"]: latent for latent in latents_of(page)}
    assert latent_labels.read(names, D_SAE).keys() == latents.keys()

    ids = torch.from_numpy(np.fromfile(folder / "store/tokens/heldout.ids", "<i4").reshape(-1, SEQ).astype(np.int64))
    ids = torch.cat(
        [ids, torch.from_numpy(np.fromfile(folder / "store/tokens/train.ids", "<i4").reshape(-1, SEQ).astype(np.int64))]
    )
    counted = ~torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))
    counted[:, 0] = False
    f = saelens.load(folder / "run/sae").encode(model.capture(ids, [HOOK])[HOOK]) * counted[..., None]
    fired = (f > 0).sum((0, 1))
    assert result["live"] == int((fired > 0).sum())
    assert result["dead"] == D_SAE - int((fired > 0).sum())
    assert int(result["dead"]) >= DEAD
    assert result["latents_shown"] == result["live"]
    assert set(latents) == set(fired.nonzero().squeeze(1).tolist())
    assert result["tokens"] == ALL
    sae = saelens.load(folder / "run/sae")
    rows = torch.nn.functional.normalize(sae.W_dec[sorted(latents)], dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-1).max(1).values.tolist()
    norm = model.outer.hf_model.get_decoder().norm.weight
    lens = (sae.W_dec * norm) @ model.outer.W_U
    lens = lens - lens.mean(1, keepdim=True)
    for (index, latent), cosine in zip(latents.items(), cosines, strict=True):
        peaks, at = f[:, :, index].max(1)
        assert latent["density"] == pytest.approx(float(fired[index] / counted.sum()), rel=1e-3)
        assert latent["maximum"] == pytest.approx(float(peaks.max()), rel=1e-3)
        assert latent["typical"] == pytest.approx(float(f[:, :, index].sum() / fired[index]), rel=1e-3)
        assert sum(latent["h"]) == fired[index]
        strongest = sorted((value for value in peaks.tolist() if value > 0), reverse=True)
        assert peaks_of(latent["t"]) == pytest.approx([1000 * value / strongest[0] for value in strongest[:3]], abs=0.6)
        assert len(latent["r"]) == min(4, len(strongest))
        high = strongest[0] * 1.001
        assert latent["b"][-1][0] == 0
        for low, *drawn in latent["b"]:
            inside = [1000 * value / strongest[0] for value in strongest if low <= value < high]
            assert min(1, len(inside)) <= len(drawn) <= min(2, len(inside))
            assert all(min(abs(shown - share) for share in inside) < 0.6 for shown in peaks_of(drawn))
            high = low
        assert latent["nearest"] == pytest.approx(cosine, abs=1e-3)
        assert latent["effect"] == pytest.approx(strongest[0] * float(lens[index].max()), rel=1e-3)
        context = int(peaks.argmax())
        text = model.tokenizer.decode(ids[context, int(at[context])]).replace("\n", "↵")
        peak = latent["t"][0][latent["t"][0].index(1000) - 1]
        assert peak == text or "\ufffd" in text


def peaks_of(contexts: list[list[str | int]]) -> list[int]:
    return [max(part for part in parts if isinstance(part, int)) for parts in contexts]


def test_held_out_documents_are_enough(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(folder, f"analyze.tokens={5 * SEQ}", "analyze.latents=4")
    assert (result["tokens"], result["latents_shown"]) == (5 * SEQ, 4)
    html = Path(str(result["page"])).read_text(encoding="utf-8")
    assert f"Read {5 * SEQ} tokens of held-out documents; special tokens and position 0 are left out" in html
    assert "of training documents" not in html


def test_training_documents_help_out_and_the_page_says_so(folder: Path) -> None:
    html = Path(str(run(folder)["page"])).read_text(encoding="utf-8")
    said = f"Read all {HELD_OUT * SEQ} tokens of held-out documents and, for want of more, {TRAIN * SEQ} of training"
    assert said in html


def test_latents_have_the_names_that_a_file_gives(folder: Path) -> None:
    first = latents_of(Path(str(run(folder, "analyze.latents=4")["page"])))
    named = first[2]["index"]
    (folder / "names.json").write_text(json.dumps({str(named): "a name"}))
    again = latents_of(Path(str(run(folder, "analyze.latents=4", f"analyze.labels={folder}/names.json")["page"])))
    assert [latent["label"] for latent in again] == [
        "a name" if latent["index"] == named else latent["label"] for latent in first
    ]
    assert all(latent["label"] for latent in first)


def test_latents_are_named_by_a_list_and_what_is_left_out_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = [latent["index"] for latent in latents_of(Path(str(run(folder)["page"])))]
    dead = min(set(range(D_SAE)) - set(live))
    (folder / "names.json").write_text(json.dumps({str(latent): "a name" for latent in (*live[:4], dead)}))
    caplog.set_level("INFO")
    asked = f"analyze.latents=[{live[3]},{dead},{live[1]}]"
    result = run(folder, asked, f"analyze.labels={folder}/names.json")
    assert [latent["index"] for latent in latents_of(Path(str(result["page"])))] == [live[1], live[3]]
    assert result["latents_shown"] == 2
    assert "are shown, those named." in Path(str(result["page"])).read_text(encoding="utf-8")
    none = f"{dead} did not fire on these tokens"
    assert f"analyze.latents: not on the page: 1 of the 3 latents that it names; {none}" in caplog.text
    others = f"analyze.latents=null would show {live[0]}, {live[2]}"
    assert f"analyze.labels: not on the page: 3 of the 5 latents that it names; {others}; {none}" in caplog.text
    caplog.clear()
    run(folder, f"analyze.latents=[{live[1]}]")
    assert "not on the page" not in caplog.text
    with pytest.raises(UserError, match=f"analyze.latents names latent {D_SAE}; the SAE has 0 to {D_SAE - 1}"):
        run(folder, f"analyze.latents=[{D_SAE}]")


def test_the_same_command_writes_the_same_page(folder: Path) -> None:
    first, second = (Path(str(run(folder, f"analyze.batch_prompts={size}")["page"])).read_bytes() for size in (7, 7))
    assert first == second  # the name of the blocks' folder, their hash, is in it


def test_a_transcoder_is_looked_at_by_what_it_reads(folder: Path) -> None:
    run(folder)
    page = folder / "run/features/index.html"
    before = latents_of(page)
    sae = saelens.load(folder / "run/sae")
    keys = {"apply_b_dec_to_input": False, "skip_connection": True, "normalize_activations": "none"}
    transcoder = TopKSAE(TopKConfig(d_sae=D_SAE, k=6, **keys), sae.d_in, 7)
    with torch.no_grad():  # what the autoencoder's encoder does, whose b_dec is zero
        transcoder.W_enc.copy_(sae.W_enc)
        transcoder.b_enc.copy_(sae.b_enc)
        transcoder.W_dec[:, 0] = 1.0
    assert not sae.b_dec.any()
    saelens.save(transcoder, folder / "run/sae", metadata={"hook_name": HOOK, "hook_name_out": "blocks.2.hook_mlp_out"})
    run(folder)
    html = page.read_text(encoding="utf-8")
    read = ("index", "density", "maximum", "label", "h", "t", "b", "r")
    assert [[latent[key] for key in read] for latent in latents_of(page)] == [
        [old[key] for key in read] for old in before
    ]
    assert "No effects on logits: the unembedding reads 128 numbers, and blocks.2.hook_mlp_out has 7" in html
    assert "blocks.2.hook_mlp_out" in html


def test_no_latent_fires(folder: Path) -> None:
    sae = saelens.load(folder / "run/sae")
    sae.b_enc.data.fill_(-1e9)
    saelens.save(sae, folder / "run/sae", metadata={"hook_name": HOOK})
    result = run(folder)
    assert (result["live"], result["dead"], result["latents_shown"]) == (0, D_SAE, 0)


def broken(folder: Path, what: str) -> None:
    if what == "store":
        shutil.rmtree(folder / "store")
    elif what == "tokens":
        shutil.rmtree(folder / "store/tokens")
    elif what == "sae":
        shutil.rmtree(folder / "run/sae")
    elif what == "summary":
        (folder / "run/summary.json").unlink()
    elif what == "run":
        shutil.rmtree(folder / "run")
    else:
        (folder / "run/summary.json").write_text(json.dumps({"steps": 1, "store": {"identity": "another"}}))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("store", "store.dir=.*is not there"),
        ("tokens", "no token.* in .*store/tokens"),
        ("sae", "give the folder of an SAE"),
        ("summary", "run.dir=.* is not finished"),
        ("run", "run.dir=.* holds no config.yaml"),
        ("other store", "store.dir=.* is another store"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(folder: Path, what: str, said: str) -> None:
    broken(folder, what)
    with pytest.raises(UserError, match=said):
        run(folder)
    assert not (folder / "run/features").exists()


def test_activations_that_are_not_finite_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = LanguageModel.capture

    def overflowing(self: LanguageModel, *arguments: object) -> dict[str, torch.Tensor]:
        return {hook: values.clone().fill_(torch.inf) for hook, values in capture(self, *arguments).items()}

    monkeypatch.setattr(LanguageModel, "capture", overflowing)
    with pytest.raises(UserError, match=rf"{HOOK} that are not finite"):
        run(folder)


@pytest.mark.parametrize("key", ["tokens", "latents", "contexts", "batch_prompts"])
def test_counts_below_one_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"analyze.{key}=0"):
        entry.load_config("analyze", [f"analyze.{key}=0"])
