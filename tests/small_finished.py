"""A store's plan and tokens and a finished run on the demo model, as cache and train leave them, in no time."""

import json
from pathlib import Path

import numpy as np
import torch

from saepipe import entry
from saepipe.config import ModelConfig, StoreConfig
from saepipe.demo import corpus
from saepipe.formats import saelens
from saepipe.language_model import LanguageModel
from saepipe.plan import Plan
from saepipe.saes.topk import TopKConfig, TopKSAE
from saepipe.token_writer import TokenStoreWriter

HOOK, SEQ, HELD_OUT, TRAIN, D_SAE, DEAD = "blocks.1.hook_resid_post", 32, 12, 6, 96, 5
"""The first `DEAD` latents never fire."""
ALL = (HELD_OUT + TRAIN) * SEQ


def make(folder: Path) -> Path:
    """Write `store` and `run` into a folder; the SAE is random."""
    model = LanguageModel.open(ModelConfig(hooks=[HOOK]))
    tokenizer = model.tokenizer
    ids: list[int] = []
    for document in corpus.documents(5):
        ids += [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id]
        if len(ids) >= ALL:
            break
    packed = np.array(ids[:ALL], np.int32).reshape(-1, SEQ)
    special = np.isin(packed, tokenizer.all_special_ids)
    with TokenStoreWriter(folder / "store" / "tokens", context_size=SEQ, source={}) as writer:
        for side, rows in (("heldout", slice(HELD_OUT)), ("train", slice(HELD_OUT, None))):
            writer.append(side, packed[rows], np.zeros_like(packed[rows]), special[rows])
        tokens = writer.finish(special_ids=tokenizer.all_special_ids)
    plan = Plan.make(
        tokens,
        StoreConfig(tokens=TRAIN * SEQ),
        model={"name": "demo"},
        hooks={HOOK: model.width(HOOK)},
        capture="huggingface",
        device_kind="cpu",
        threads=2,
        data={"path": "demo"},
    )
    plan.save(folder / "store")
    run = folder / "run"
    run.mkdir()
    overrides = [f"store.dir={folder}/store", f"run.dir={run}", f"model.hooks=[{HOOK}]"]
    entry.save_config(entry.load_config("train", overrides), run / "config.yaml")
    (run / "summary.json").write_text(json.dumps({"steps": 1, "store": {"identity": plan.identity}}))
    sae = TopKSAE(TopKConfig(d_sae=D_SAE, k=6, normalize_activations="none"), model.width(HOOK))
    sae.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc[:DEAD] = -1e9
    saelens.save(sae, run / "sae", metadata={"hook_name": HOOK, "model_name": "demo"})
    return folder
