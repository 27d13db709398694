"""Tutorial 2: train SAEs from Python, and read what became of them.

python docs/tutorials/2_train.py FOLDER (where stores and runs go; a minute on two cores)
"""

# %% What to train on: the demo's model and text, cached once
import sys
from pathlib import Path

from saepipe import LanguageModelSAERunnerConfig, SAETrainingRunner
from saepipe.cache import cache
from saepipe.entry import load_config
from saepipe.evaluate import evaluate
from saepipe.train import train

OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/tutorial")
STORE = ["+experiment=demo", f"store.dir={OUT / 'store'}", "store.tokens=100000"]
TRAIN = [*STORE, "train.tokens=150000", "stream.batch_tokens=768", "stream.window_tokens=49152", "sae.d_sae=512"]
TRAIN += ["optim.lr_warm_up_steps=20", "optim.lr_decay_steps=40", "sae.dead_after_tokens=50000"]

cached = cache(load_config("cache", STORE))
print(f"{cached['dir']}: {cached['rows']:,} rows")

# %% Three architectures. What revives dead latents differs: ghost gradients where an L1 penalty kills them, an
# auxiliary loss where only the largest are kept.
SAES = {
    "standard": ["sae=standard", "sae.l1_coefficient=2", "sae.l1_warm_up_steps=50", "sae.dead_method=ghost"],
    "gated": ["sae=gated", "sae.l1_coefficient=2", "sae.l1_warm_up_steps=50"],
    "topk": ["sae=topk", "sae.k=16", "sae.dead_method=auxk"],
}
for name, keys in SAES.items():
    run = f"run.dir={OUT / name}"
    train(load_config("train", [*TRAIN, *keys, run]))
    figures = evaluate(load_config("evaluate", [run, "evaluate.tokens=10000"]))
    words = ("l0", "explained_variance", "ce_loss_score", "dead_fraction")
    print(name, {word: round(figures[word], 3) for word in words})

# %% Training code that was written for SAELens runs as well
config = LanguageModelSAERunnerConfig(
    model_name="demo",
    hook_name="blocks.2.hook_resid_post",
    hook_layer=2,
    d_in=128,
    d_sae=512,
    architecture="topk",
    activation_fn_kwargs={"k": 16},
    dataset_path="demo",
    context_size=128,
    lr=1e-3,
    train_batch_size_tokens=768,
    training_tokens=150_000,
    checkpoint_path=str(OUT / "saelens"),
)
trainer = SAETrainingRunner(config)
sae = trainer.run()
print(sae.cfg.d_sae, {name: round(trainer.metrics[name], 3) for name in ("l0", "explained_variance", "ce_loss_score")})
