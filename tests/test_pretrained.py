"""Published SAEs are found by name, downloaded by the real client, and found again without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_saes
import torch
from small_hub import COMMIT, SmallHub

from saepipe import SAE, pretrained
from saepipe.errors import UserError
from saepipe.formats import saelens

RELEASE, SAE_ID = "gpt2-small-res-jb", "blocks.8.hook_resid_pre"
REPO = "jbloom/GPT2-Small-SAEs-Reformatted"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An SAE as the repository has it, and another file."""
    folder = tmp_path_factory.mktemp("sae")
    saelens.save(small_saes.make("standard"), folder, metadata={"context_size": 64}, sparsity=torch.rand(48))
    found = {f"{SAE_ID}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return {**found, "other/large.bin": b"0", "README.md": b"no SAE"}


def opened(hub: SmallHub, home: Path, *call: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Open one in a process of its own, since the client reads its environment when it is imported."""
    script = (
        "import sys, json, torch\nfrom saepipe import SAE\nfrom saepipe.errors import UserError\n"
        "torch.manual_seed(0)\n"
        "try:\n    sae, cfg, sparsity = SAE.from_pretrained(*sys.argv[1:3], **json.loads(sys.argv[3]))\n"
        "except UserError as error:\n    sys.exit(str(error))\n"
        "print(json.dumps([sae.cfg.metadata.neuronpedia_id, cfg['hook_name'], sparsity.shape[0], sae.cfg.d_sae]))\n"
    )
    release, sae_id, *options = call
    return subprocess.run(
        [sys.executable, "-c", script, release, sae_id, *(options or ["{}"])],
        env={**os.environ, **hub.environment(home), **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_release_is_downloaded_once_and_then_found_without_a_network(files: dict[str, bytes], tmp_path: Path) -> None:
    hub = SmallHub({REPO: dict(files)})
    with hub.running():
        done = opened(hub, tmp_path, RELEASE, SAE_ID)
        assert json.loads(done.stdout) == ["gpt2-small/8-res-jb", SAE_ID, 48, 48], done.stderr
        assert sorted(hub.asked) == sorted(name for name in files if name.startswith(SAE_ID))  # and nothing else
        hub.asked.clear()
        assert opened(hub, tmp_path, RELEASE, SAE_ID, json.dumps({"revision": COMMIT})).returncode == 0
        assert hub.asked == []
        assert opened(hub, tmp_path, REPO, SAE_ID, json.dumps({"force_download": True})).returncode == 0
        assert len(hub.asked) == 3
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):  # the hub is gone now
        done = opened(hub, tmp_path, REPO, SAE_ID, **environment)
        assert json.loads(done.stdout)[0] == "gpt2-small/8-res-jb", done.stderr


def test_what_cannot_be_had_is_said_with_what_can(files: dict[str, bytes], tmp_path: Path) -> None:
    hub = SmallHub({REPO: dict(files), "owner/other": {"layer_1/cfg.json": b"{}"}})
    with hub.running():
        assert opened(hub, tmp_path, RELEASE, SAE_ID).returncode == 0
        for release, sae_id, words in (
            ("owner/absent", "x", "owner/absent is neither a file or folder here nor a model on the hub"),
            ("owner/other", "layer_2", "did you mean layer_1"),
            ("owner/other", "layer_1", "no SAE in a format that is known here"),
        ):
            done = opened(hub, tmp_path, release, sae_id)
            assert words in done.stderr, done.stderr
        done = opened(hub, tmp_path, REPO, SAE_ID, json.dumps({"revision": "absent"}))
        assert "revision=absent is no branch, tag or commit" in done.stderr
    done = opened(hub, tmp_path, "owner/other", "layer_3", HF_HUB_OFFLINE="1")
    assert f"cache on this machine, which has {REPO}" in done.stderr, done.stderr
    assert 'run `hf download owner/other --include "layer_3/*"`' in done.stderr


def test_a_folder_is_opened_by_the_same_call(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    sae = SAE.from_pretrained(str(tmp_path), SAE_ID)
    assert sae.d_sae == 48
    assert SAE.from_pretrained(str(tmp_path / SAE_ID), dtype="float64").W_dec.dtype == torch.float64
    _, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(str(tmp_path / SAE_ID), device="cpu")
    assert (cfg["d_in"], cfg["context_size"]) == (16, 64)
    assert sparsity is not None


def test_unknown_names_are_answered_with_close_ones() -> None:
    with pytest.raises(UserError, match=r"did you mean .*gpt2-small-res-jb"):
        pretrained.load("gpt2-small-res-jp")
    with pytest.raises(UserError, match=r"did you mean blocks\.8\.hook_resid_pre"):
        pretrained.load(RELEASE, "blocks.8.hook_resid_pr")
    with pytest.raises(UserError, match=r"sae_id is missing: release=gpt2-small-res-jb has 13 SAEs, such as blocks"):
        pretrained.load(RELEASE)
    with pytest.raises(UserError, match="release=gemma-scope"):
        pretrained.list(release="gemma-scope")


def test_releases_are_listed_with_what_is_known_of_them() -> None:
    everything = pretrained.list()
    assert len(everything) > 10_000
    assert len({(one.release, one.sae_id) for one in everything}) == len(everything)
    assert all("{" not in f"{one.sae_id}{one.path}{one.hook}{one.neuronpedia_id}" for one in everything)
    (one,) = pretrained.list("canonical", model="gemma-2-2b", hook="blocks.20.hook_resid_post", width=16384)
    assert (one.path, one.l0) == ("layer_20/width_16k/average_l0_71", 71)
    assert one.neuronpedia_id == "gemma-2-2b/20-gemmascope-res-16k"
    eighth = next(one for one in pretrained.list(release=RELEASE) if one.sae_id == SAE_ID)
    assert (eighth.l0, eighth.explained_variance, eighth.width) == (60, 0.9, 24576)
    assert eighth.metadata["compatibility_mode"]
    assert [one.path for one in pretrained.list(release="gemma-2b-res", hook="blocks.6.hook_resid_post")] == [
        "gemma_2b_blocks.6.hook_resid_post_16384_anthropic_fast_lr"
    ]
    assert [one.sae_id for one in pretrained.list(release=RELEASE, layer=8)] == [SAE_ID]
    scope = pretrained.list(release="llama_scope_lxr_8x")
    assert (len(scope), scope[31].path, scope[31].width) == (32, "Llama3_1-8B-Base-L31R-8x", 32768)
    lines = str(pretrained.list(release=RELEASE)).splitlines()
    assert len(lines) == 14
    assert lines[9].split() == [RELEASE, SAE_ID, "gpt2-small", SAE_ID, "24,576", "60", "0.9"]


def test_a_model_is_found_by_its_other_names_and_an_unknown_one_refused() -> None:
    assert {one.model for one in pretrained.list(model="gpt2")} == {"gpt2-small"}
    assert {one.model for one in pretrained.list(model="google/gemma-2-2b")} == {"gemma-2-2b"}
    with pytest.raises(UserError, match=r"model=gema-2-2b is not known; did you mean .*gemma-2-2b"):
        pretrained.list(model="gema-2-2b")


def test_the_command_line_lists_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "saepipe.pretrained", "res-jb", "blocks.8.hook_resid_pre", "--model", "gpt2-small"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ["gpt2-small-res-jb", "blocks.8.hook_resid_pre"] in [line.split()[:2] for line in done.stdout.splitlines()]
