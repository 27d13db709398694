"""Training steps of other libraries, as the trainer of each takes them; in the environment of `make peers`.

Versions: constraints-peers.txt. No latent is dead for any of them, and nothing is logged.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saepipe.contest import Task
from saepipe.own_steps import LR, NEVER, Steps, autocast, set_l0

LIBRARIES = {"SAELens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
"""Name of each library -> the package that one imports."""
_MODULES = {
    "SAELens": "sae_lens.training.sae_trainer",
    "dictionary_learning": "dictionary_learning.trainers",
    "sparsify": "sparsify",
}
_OF_SAELENS = {
    "standard": "Standard",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "MatryoshkaBatchTopK",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
}


def offered(architecture: str) -> list[str]:
    """List the libraries that train an architecture, of those that are compared here."""
    others = {"topk": ["sparsify", "dictionary_learning"], "batchtopk": ["dictionary_learning"]}
    return (["SAELens"] if architecture in _OF_SAELENS else []) + others.get(architecture, [])


def maker(task: Task) -> Callable[[list[Tensor]], Steps]:
    """Load the library of a task, and give what makes its steps from the batches."""
    importlib.import_module(_MODULES[task.library])
    made = {"SAELens": _saelens, "dictionary_learning": _dictionary_learning, "sparsify": _sparsify}[task.library]

    def make(batches: list[Tensor]) -> Steps:
        torch.manual_seed(0)
        return made(task, batches)

    return make


def _saelens(task: Task, batches: list[Tensor]) -> Steps:
    """Make the step of its SAETrainer."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = _OF_SAELENS[task.architecture]
    keys: dict[str, Any] = {"normalize_activations": "none", "apply_b_dec_to_input": True}
    if task.architecture in ("topk", "batchtopk", "matryoshka"):
        keys["k"] = task.k
    if widths := task.sae.get("matryoshka_widths"):
        keys["matryoshka_widths"] = [*widths, task.d_sae]
    cfg = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=task.d_in, d_sae=task.d_sae, device=task.device, **keys)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(cfg).to(task.device)
    if task.l0 is not None:
        set_l0(task.architecture, dict(sae.named_parameters()), batches[0], task.l0)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=NEVER,
            train_batch_size_samples=task.batch_tokens,
            lr=LR,
            lr_end=LR,
            device=task.device,
            autocast=task.precision == "bf16-mixed",
            dead_feature_window=NEVER,
            feature_sampling_window=NEVER,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        iter(batches),
    )
    if task.fused:
        trainer.optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)

    def take(x: Tensor) -> Any:
        done = trainer.step(x)
        trainer.n_training_steps += 1
        return done

    return Steps(take, lambda done: float((done.feature_acts.detach() > 0).sum() / task.batch_tokens))


def _dictionary_learning(task: Task, batches: list[Tensor]) -> Steps:
    """Make the step of its TopKTrainer or BatchTopKTrainer, after the first, which finds a geometric median."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[task.architecture](
        steps=10**6,
        activation_dim=task.d_in,
        dict_size=task.d_sae,
        k=task.k,
        layer=0,
        lm_name="",
        lr=LR,
        seed=0,
        device=task.device,
    )
    trainer.dead_feature_threshold = NEVER
    trainer.ae.b_dec.data = batches[0].mean(0)
    if task.fused:
        trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=LR, fused=True)
    number = 0

    def take(x: Tensor) -> Any:
        nonlocal number
        number += 1
        with autocast(task):
            return trainer.update(number, x)

    return Steps(take, lambda _: float(task.k))


def _sparsify(task: Task, batches: list[Tensor]) -> Steps:
    """Make the step of its Trainer with Adam: unit decoder rows, no AuxK, and the mask of what fired.

    Left out is what its trainer does besides and is small: counts of tokens, means for the log, the schedule.
    """
    from sparsify import SparseCoder, SparseCoderConfig

    if task.device == "cuda":
        torch.set_float32_matmul_precision("high")
    sae = SparseCoder(
        task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k), device=task.device, dtype=torch.float32
    )
    sae.b_dec.data = batches[0].mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=task.fused or None)
    fired = torch.zeros(task.d_sae, dtype=torch.bool, device=task.device)

    def take(x: Tensor) -> Any:
        sae.set_decoder_norm_to_unit_norm()
        done = sae(x)
        fired[done.latent_indices.flatten()] = True
        done.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return done

    return Steps(take, lambda done: float(done.latent_indices.shape[1]))
