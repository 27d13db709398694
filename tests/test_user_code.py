"""Code as users of SAELens write it: nothing but names of models, and imports, was changed for saepipe and the demo."""

from pathlib import Path

import pytest
import torch

from saepipe import SAE, HookedSAETransformer, LanguageModelSAERunnerConfig, SAETrainingRunner

device = "cpu"


def runner_config(folder: Path, architecture: str, **more: object) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        model_name="demo",
        hook_name="blocks.2.hook_resid_post",
        hook_layer=2,
        d_in=128,
        d_sae=512,
        architecture=architecture,
        dataset_path="demo",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=128,
        lr=1e-3,
        lr_warm_up_steps=10,
        lr_decay_steps=20,
        train_batch_size_tokens=1024,
        training_tokens=65_536,
        store_batch_size_prompts=16,
        n_batches_in_buffer=16,
        log_to_wandb=False,
        seed=0,
        device=device,
        dtype="float32",
        checkpoint_path=str(folder / architecture),
        n_checkpoints=0,
        **more,
    )


@pytest.fixture(scope="module")
def topk(tmp_path_factory: pytest.TempPathFactory) -> tuple[SAE, SAETrainingRunner]:
    cfg = runner_config(tmp_path_factory.mktemp("user"), "topk", activation_fn_kwargs={"k": 16})
    trainer = SAETrainingRunner(cfg)
    return trainer.run(), trainer


def test_load_a_model_and_an_sae_and_look_at_what_is_active(topk: tuple[SAE, SAETrainingRunner]) -> None:
    release, sae_id = str(Path(topk[1].cfg.checkpoint_path)), "sae"

    model = HookedSAETransformer.from_pretrained_no_processing("demo", device=device)
    sae, cfg_dict, sparsity = SAE.from_pretrained(release=release, sae_id=sae_id, device=device)

    prompt = "The quick brown fox jumps over the lazy dog."
    logits, cache = model.run_with_cache(prompt, prepend_bos=True)
    tokens = model.to_tokens(prompt)
    hidden = cache[sae.cfg.hook_name]
    assert torch.equal(hidden, cache["resid_post", 2])
    feature_acts = sae.encode(hidden)
    active = (feature_acts > 0).sum(dim=-1)
    vals, inds = torch.topk(feature_acts, 5, dim=-1)
    sae_out = sae.decode(feature_acts)
    error = (sae_out - hidden).pow(2).sum(-1)

    assert logits.shape == (1, tokens.shape[1], model.cfg.d_vocab)
    assert active.tolist() == [[16] * tokens.shape[1]]
    assert torch.equal(feature_acts.gather(-1, inds), vals)
    assert len(model.to_str_tokens(prompt)) == tokens.shape[1] == inds.shape[1]
    assert 0 < float((error / hidden.pow(2).sum(-1))[0, 1:].mean()) < 0.8
    assert (cfg_dict["hook_name"], cfg_dict["d_sae"]) == ("blocks.2.hook_resid_post", sae.cfg.d_sae)
    assert sparsity is not None
    assert sparsity.shape == (512,)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("standard", {"l1_coefficient": 2 / 128 / 10, "l1_warm_up_steps": 30, "use_ghost_grads": True}),
        ("gated", {"l1_coefficient": 2.0, "l1_warm_up_steps": 30, "dead_feature_window": 20}),
    ],
)
def test_configure_train_and_read_metrics(architecture: str, more: dict[str, object], tmp_path: Path) -> None:
    cfg = runner_config(tmp_path, architecture, **more)
    trainer = SAETrainingRunner(cfg)
    sae = trainer.run()

    metrics = trainer.metrics
    print(f"L0 {metrics['l0']:.1f}, explained variance {metrics['explained_variance']:.3f}")
    assert sae.W_dec.shape == (cfg.d_sae, cfg.d_in)
    assert metrics["explained_variance"] > 0.6
    assert 0.8 < metrics["ce_loss_score"] <= 1
    assert 0 <= metrics["dead_fraction"] < 0.5
    assert metrics["l0"] > 1


def test_find_what_activates_a_feature_steer_and_attribute(topk: tuple[SAE, SAETrainingRunner]) -> None:
    sae, trainer = topk
    assert trainer.metrics["l0"] == pytest.approx(16, abs=0.01)
    model = HookedSAETransformer.from_pretrained_no_processing("demo", device=device)
    hook_name = sae.cfg.metadata.hook_name

    # Which of some texts activate a feature most
    texts = ["GET /index.html HTTP/1.1", "Dear Sir or Madam,", "def add(a, b):", "POST /users HTTP/1.1"]
    max_acts = []
    for text in texts:
        _, cache = model.run_with_cache(text, names_filter=[hook_name])
        max_acts.append(sae.encode(cache[hook_name])[0, 1:].max(dim=0).values)
    acts = torch.stack(max_acts)
    feature = int((acts[[0, 3]].min(0).values - acts[[1, 2]].max(0).values).argmax())
    assert sorted(acts[:, feature].topk(2).indices.tolist()) == [0, 3]

    # Steering with its decoder direction, at every step of generation
    calls = []

    def steering_hook(resid: torch.Tensor, hook: object) -> torch.Tensor:
        calls.append(resid.shape[1])
        return resid + 4 * acts[:, feature].max() * sae.W_dec[feature]

    tokens = model.to_tokens("The")
    plain = model.generate(tokens, max_new_tokens=8, temperature=0, verbose=False, stop_at_eos=False)
    with model.hooks(fwd_hooks=[(hook_name, steering_hook)]):
        steered = model.generate(tokens, max_new_tokens=8, temperature=0, verbose=False, stop_at_eos=False)
    given = model.generate(
        tokens,
        max_new_tokens=8,
        temperature=0,
        verbose=False,
        stop_at_eos=False,
        fwd_hooks=[(hook_name, steering_hook)],
    )
    assert len(calls) == 16
    assert torch.equal(steered, given)
    assert not torch.equal(steered, plain)

    # Attributing a logit to features, by their directions and the unembedding
    prompt = "GET /index.html"
    target = model.to_single_token(" HTTP")
    _, cache = model.run_with_cache(prompt)
    feature_acts = sae.encode(cache["resid_post", 2])[0, -1]
    attribution = feature_acts * (sae.W_dec @ model.W_U[:, target])
    top = attribution.topk(5)
    assert torch.isfinite(top.values).all()
    assert float(top.values[0]) > 0
    assert set(top.indices.tolist()) <= set(feature_acts.nonzero().flatten().tolist())

    # What the model does without the strongest of them
    def ablate(features: torch.Tensor, hook: object) -> torch.Tensor:
        features[:, :, top.indices[0]] = 0
        return features

    with torch.no_grad():
        with_sae = model.run_with_saes(prompt, saes=[sae])
        ablated = model.run_with_hooks_with_saes(
            prompt, saes=[sae], fwd_hooks=[(f"{hook_name}.hook_sae_acts_post", ablate)]
        )
    assert float(with_sae[0, -1, target]) != float(ablated[0, -1, target])
