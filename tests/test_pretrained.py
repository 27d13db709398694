"""Published SAEs are found by name, downloaded by the real client, and found again without a network."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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


OPENER = """
import json, os, sys
from saepipe import SAE
from saepipe.errors import UserError
for line in sys.stdin:
    words, options, environment = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(environment)
        try:
            sae, cfg, sparsity = SAE.from_pretrained(*words, **options)
            answer = [sae.cfg.metadata.neuronpedia_id, cfg["hook_name"], sparsity.shape[0], sae.cfg.d_sae]
        except UserError as error:
            answer = str(error)
        print("answer", json.dumps(answer), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


class Opener:
    """Opens SAEs, each in a process of its own, since the hub's client reads its environment when it is imported.

    The processes are copies of one that has loaded what takes long, torch.
    """

    def __init__(self, hub: SmallHub, home: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", OPENER],
            env={**os.environ, **hub.environment(home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, environment: dict[str, str] | None = None, **options: Any) -> Any:
        """Return what is known of an SAE, or the text of the error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([words, options, environment or {}]), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise AssertionError("the process has ended")

    def __enter__(self) -> "Opener":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def test_a_release_is_downloaded_once_and_then_found_without_a_network(files: dict[str, bytes], tmp_path: Path) -> None:
    hub, known = SmallHub({REPO: dict(files)}), ["gpt2-small/8-res-jb", SAE_ID, 48, 48]
    with ExitStack() as stack:
        with hub.running():
            opened = stack.enter_context(Opener(hub, tmp_path))
            assert opened(RELEASE, SAE_ID) == known
            assert sorted(hub.asked) == sorted(name for name in files if name.startswith(SAE_ID))  # and nothing else
            hub.asked.clear()
            assert opened(RELEASE, SAE_ID, revision=COMMIT) == known
            assert hub.asked == []
            assert opened(REPO, SAE_ID, force_download=True) == known
            assert len(hub.asked) == 3
        assert opened(REPO, SAE_ID) == known  # the hub is gone now
        assert opened(REPO, SAE_ID, environment={"HF_HUB_OFFLINE": "1"}) == known


def test_what_cannot_be_had_is_said_with_what_can(files: dict[str, bytes], tmp_path: Path) -> None:
    hub = SmallHub({REPO: dict(files), "owner/other": {"layer_1/cfg.json": b"{}"}})
    with hub.running(), Opener(hub, tmp_path) as opened:
        assert opened(RELEASE, SAE_ID)[1] == SAE_ID
        for release, sae_id, words in (
            ("owner/absent", "x", "owner/absent is neither a file or folder here nor a model on the hub"),
            ("owner/other", "layer_2", "did you mean layer_1"),
            ("owner/other", "layer_1", "no SAE in a format that is known here"),
        ):
            assert words in opened(release, sae_id)
        assert "revision=absent is no branch, tag or commit" in opened(REPO, SAE_ID, revision="absent")
        told = opened("owner/other", "layer_3", environment={"HF_HUB_OFFLINE": "1"})
        assert f"cache on this machine, which has {REPO}" in told
        assert 'run `hf download owner/other --include "layer_3/*"`' in told


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
