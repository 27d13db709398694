"""What the feature page promises of a wider SAE: `make prove`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_pages import latents_of

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.prove, pytest.mark.long, pytest.mark.timeout(1200)]
TOKENS, D_SAE = 500_000, 4096
PEAK = """
import json, resource, sys, time
began = time.perf_counter()
from saepipe.analyze import analyze
from saepipe.entry import load_config
found = analyze(load_config("analyze", sys.argv[1:]))
found["whole_s"], found["cpu_s"] = time.perf_counter() - began, time.process_time()
found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
print(json.dumps(found))
"""


def python(*arguments: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}  # as a user's shell has it
    done = subprocess.run(
        [sys.executable, *arguments], env={**kept, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_4096_latents_from_500k_tokens(tmp_path: Path) -> None:
    store, run = f"store.dir={tmp_path}/store", f"run.dir={tmp_path}/run"
    python("-m", "saepipe.cache", "+experiment=demo", "store.tokens=460000", store)
    wider = [f"sae.d_sae={D_SAE}", "train.tokens=400000", "sae.dead_after_tokens=20000", "optim.lr_warm_up_steps=20"]
    python("-m", "saepipe.train", "+experiment=demo", store, run, *wider, "optim.lr_decay_steps=20")
    began = time.perf_counter()
    found = json.loads(python("-c", PEAK, run, store, f"analyze.tokens={TOKENS}").splitlines()[-1])
    whole_s = time.perf_counter() - began
    size = sum(file.stat().st_size for file in Path(found["page"]).parent.rglob("*")) / 1e6
    print(
        f"\n  the page of {found['latents_shown']:,} of {D_SAE:,} latents from {found['tokens']:,} tokens: "
        f"{whole_s:.0f} s with the start of Python ({found['cpu_s']:.0f} s of CPU), at most {found['peak_gb']:.2f} GB; "
        f"{size:.1f} MB on disk"
    )
    assert found["tokens"] > 0.99 * TOKENS
    latents = latents_of(Path(found["page"]))
    assert len(latents) == found["live"] > 0.75 * D_SAE
    assert all(latent["t"] and latent["r"] and latent["p"] and latent["n"] and latent["label"] for latent in latents)
    assert found["peak_gb"] < 2
    assert whole_s < 60
