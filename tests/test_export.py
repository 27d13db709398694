"""An SAE goes to other libraries and to the hub, with what is known of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_saes
import torch
import yaml
from small_hub import SmallHub

from saepipe import SAE, durable, entry
from saepipe.errors import UserError
from saepipe.export import export
from saepipe.formats import saelens
from saepipe.runs import Run

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished and measured run."""
    found = Run(tmp_path / "run")
    entry.save_config(entry.load_config("train", [f"run.dir={found.folder}", "sae.k=4"]), found.config_file)
    metadata = {"model_name": "EleutherAI/pythia-70m", "hook_name": HOOK, "context_size": 64, "prepend_bos": True}
    saelens.save(small_saes.make("topk", k=4), found.sae_folder, metadata=metadata, sparsity=torch.rand(48))
    found.finish({"steps": 1, "store": {"identity": "x"}})
    (found.folder / "eval").mkdir()
    measured = {"l0": 4.0, "explained_variance": 0.875, "ce_loss_score": None, "tokens": 184400}
    (found.folder / "eval/metrics.json").write_text(json.dumps(measured))
    return found.folder


def verb(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "saepipe.export", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_folder_opens_again_and_has_a_card(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = verb(str(run), "--to", "saelens", str(out))
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    first, second, x = SAE.load(run / "sae"), SAE.load(out), small_saes.data()
    assert torch.equal(first.encode(x), second.encode(x))
    assert torch.equal(first(x), second(x))
    assert second.metadata["context_size"] == 64
    assert second.log_sparsity is not None
    _, head, body = (out / "README.md").read_text().split("---", 2)
    assert yaml.safe_load(head)["base_model"] == "EleutherAI/pythia-70m"
    for words in (f"| hook | `{HOOK}` |", "| L0 | 4 |", "| explained variance | 0.875 |", "| 184,400 |", "k: 4"):
        assert words in body, body
    assert "CE score" not in body
    assert str(tmp_path) not in body  # where it lay is nobody's business
    assert export(out, out) == str(out)  # an SAE is as good as a run, and its own folder is no other one


def test_a_published_sae_is_opened_by_its_name(run: Path, tmp_path: Path) -> None:
    hub = SmallHub({})
    with hub.running():
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_x"}
        done = verb(str(run), "--to", "hub", "owner/saes", "--private", **environment)
        assert done.returncode == 0, done.stderr
        assert f'SAE.from_pretrained("owner/saes", "{HOOK}")' in done.stdout
        assert hub.private == {"owner/saes"}
        names = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
        assert set(hub.repositories["owner/saes"]) - {".gitattributes"} == {
            "README.md",
            *(f"{HOOK}/{n}" for n in names),
        }
        assert f'"{HOOK}"'.replace('"', "'") in hub.repositories["owner/saes"]["README.md"].decode()
        script = f"from saepipe import SAE; print(SAE.from_pretrained('owner/saes', '{HOOK}').metadata.model_name)"
        opened = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert opened.stdout.strip() == "EleutherAI/pythia-70m", opened.stderr
    assert "does not take the SAE" in verb(str(run), "--to", "hub", "owner/saes", **environment).stderr
    assert "HF_HUB_OFFLINE" in verb(str(run), "--to", "hub", "owner/saes", HF_HUB_OFFLINE="1").stderr
    assert "OUT=saes is no hub repository" in verb(str(run), "--to", "hub", "saes").stderr


def test_an_export_that_was_killed_is_begun_anew(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    begun = durable.temporary(out / "sae_weights.safetensors")
    begun.with_name(begun.name.replace(f"-{os.getpid()}-", "-999999999-")).touch()
    export(run, out)
    assert SAE.load(out).d_sae == 48
    assert not list(out.glob(".*.tmp"))


def test_a_name_that_is_too_long_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"OUT=.* cannot be written \(File name too long"):
        export(run, tmp_path / ("a" * 300))


def test_a_readme_of_the_user_s_own_stays(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("mine")
    export(run, tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == "mine"


def test_a_card_of_strange_metadata(tmp_path: Path) -> None:
    saelens.save(small_saes.make("topk", k=4), tmp_path / "sae", metadata={"model_name": 5, "hook_name": 5})
    export(tmp_path / "sae", tmp_path / "out")
    assert "base_model" not in (tmp_path / "out/README.md").read_text()


def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for source, out, words in (
        (tmp_path / "absent", tmp_path / "out", "does not exist"),
        (run, tmp_path / "full", "full holds something else than a saelens SAE"),
        (run, tmp_path / "full" / "thesis.tex", "holds something else"),
    ):
        with pytest.raises(UserError, match=words):
            export(source, out)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="did you mean saelens"):
        export(run, tmp_path / "out", to="saelense")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
