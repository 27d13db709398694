"""SAELens's training code: every name has its effect or is said to have none, and runs end in an SAE and metrics."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import saepipe
from saepipe import entry
from saepipe.activations_store import ActivationsStore
from saepipe.config import ModelConfig
from saepipe.errors import UserError
from saepipe.language_model import LanguageModel
from saepipe.saelens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainingRunner,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from saepipe.saelens_names import IGNORED, KNOWN, RULES, TRANSLATED

HOOK = "blocks.2.hook_resid_post"
FLAT: dict[str, Any] = {
    "model_name": "demo",
    "hook_name": HOOK,
    "hook_layer": 2,
    "dataset_path": "demo",
    "d_in": 128,
    "d_sae": 192,
    "context_size": 32,
    "training_tokens": 8192,
    "train_batch_size_tokens": 512,
    "dead_feature_window": 4,
    "n_eval_batches": 1,
    "lr": 1e-3,
}

# Name -> what else is given; a value; our keys that it becomes.
EFFECTS: list[tuple[dict[str, Any], str, Any, dict[str, Any]]] = [
    ({"dataset_path": "demo"}, "model_name", "someone/model", {"model.name": "someone/model"}),
    ({"dataset_path": "demo"}, "model_name", "pythia-70m", {"model.name": "EleutherAI/pythia-70m"}),
    ({}, "hook_name", HOOK, {"model.hooks": [HOOK]}),
    ({"hook_name": "blocks.{layer}.hook_mlp_out"}, "hook_layer", 1, {"model.hooks": ["blocks.1.hook_mlp_out"]}),
    (
        {"hook_name": "blocks.1.attn.hook_z"},
        "hook_head_index",
        2,
        {"model.hooks": ["blocks.1.attn.hook_z.head.2"]},
    ),
    (
        {},
        "model_from_pretrained_kwargs",
        {"torch_dtype": "bfloat16", "center_writing_weights": True},
        {"model.dtype": "bfloat16", "model.compatibility_mode": True},
    ),
    ({}, "architecture", "gated", {"sae.architecture": "gated"}),
    ({}, "activation_fn", "topk", {"sae.architecture": "topk", "sae.k": 100}),
    ({"activation_fn": "topk"}, "activation_fn_kwargs", {"k": 50}, {"sae.k": 50}),
    ({}, "is_dataset_tokenized", True, {"data.column": "tokens|input_ids"}),
    ({}, "disable_concat_sequences", True, {"data.pack": False}),
    ({}, "use_chat_formatting", True, {"data.chat_template": "default"}),
    ({}, "exclude_special_tokens", True, {"data.exclude_special_tokens": True}),
    ({}, "seqpos_slice", (5, -5), {"stream.positions": [5, 122]}),
    ({}, "dtype", "torch.bfloat16", {"store.dtype": "bfloat16"}),
    ({}, "dtype", "float64", {"trainer.precision": "64-true"}),
    ({}, "device", "cuda:1", {"model.device": "cuda:1", "trainer.accelerator": "cuda"}),
    ({"device": "cpu"}, "llm_device", "cuda", {"model.device": "cuda", "trainer.accelerator": "cpu"}),
    ({}, "autocast", True, {"trainer.precision": "bf16-mixed"}),
    ({}, "autocast_lm", True, {"model.dtype": "bfloat16"}),
    ({"adam_beta2": 0.99}, "adam_beta1", 0.0, {"optim.betas": [0.0, 0.99]}),
    ({}, "adam_beta2", 0.99, {"optim.betas": [0.9, 0.99]}),
    ({}, "l1_coefficient", 5.0, {"sae.l1_coefficient": 5.0}),
    ({}, "l1_coefficient", 0.01, {"sae.l1_coefficient": 0.01}),
    ({"d_in": 1000}, "l1_coefficient", 8e-5, {"sae.l1_coefficient": 0.08}),
    ({}, "l1_coefficient", 8e-5, {"sae.l1_coefficient": 8e-5 * 128}),
    (
        {"architecture": "matryoshka_batchtopk"},
        "matryoshka_widths",
        [16, 32],
        {"sae.architecture": "matryoshka", "sae.matryoshka_widths": [16, 32]},
    ),
    ({}, "decoder_heuristic_init", False, {"sae.decoder_init_norm": 1.0}),
    ({}, "use_ghost_grads", True, {"sae.dead_method": "ghost"}),
    ({"train_batch_size": 100}, "dead_feature_window", 7, {"sae.dead_after_tokens": 700}),
    ({}, "log_to_wandb", True, {"logger.name": "wandb"}),
    ({"wandb_log_frequency": 30}, "eval_every_n_wandb_logs", 2, {"train.evaluate_every_steps": 60}),
    ({}, "compile_sae", True, {"train.compile": True}),
    ({"eval_batch_size_prompts": 3, "context_size": 10}, "n_eval_batches", 2, {"evaluate.tokens": 60}),
]
OF_THE_RUN = {"d_in", "output_path", "checkpoint_path"}
"""Names that a run itself reads; tests of runs are below."""
OWNERS = {
    "gated": ("l1_coefficient",),
    "topk": ("aux_loss_coefficient", "rescale_acts_by_decoder_norm", "k"),
    "batchtopk": ("topk_threshold_lr",),
    "jumprelu": ("l0_", "target_l0", "jumprelu_", "pre_act"),
}
VALUES = {"lr_scheduler_name": "cosineannealing", "jumprelu_sparsity_loss_mode": "tanh", "b_dec_init_method": "mean"}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_timing: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("others", "name", "value", "keys"), EFFECTS)
def test_a_rule_has_its_effect(others: dict[str, Any], name: str, value: Any, keys: dict[str, Any]) -> None:
    found, ignored = LanguageModelSAERunnerConfig(**{**others, name: value}).translated()
    assert {key: found.get(key) for key in keys} == keys
    assert name not in ignored


@pytest.mark.parametrize("name", ["model_name", "dataset_path", "cached_activations_path", "checkpoint_path"])
def test_paths_are_as_good_as_texts(name: str, tmp_path: Path) -> None:
    found = [
        LanguageModelSAERunnerConfig(**{"dataset_path": "demo", name: kind(tmp_path)}).to_run_config()
        for kind in (str, Path)
    ]
    assert found[0] == found[1]


def test_no_rule_is_without_a_test() -> None:
    assert {name for _, name, *_ in EFFECTS} | OF_THE_RUN == set(RULES)


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_name_that_passes_as_it_is_arrives(name: str) -> None:
    owner = next((owner for owner, begins in OWNERS.items() if name.startswith(begins)), "standard")
    default = LanguageModelSAERunnerConfig(architecture=owner, d_sae=4096).to_run_config()
    keys = TRANSLATED[name]
    group, key = keys[0].split(".")
    before = getattr(getattr(default, group), key)
    value = VALUES.get(name, _another(before, text=name.endswith(("path", "name", "project", "entity"))))
    given = LanguageModelSAERunnerConfig(architecture=owner, **{name: value})
    assert name not in given.translated()[1]
    config = given.to_run_config()
    for key in keys:
        group, own = key.split(".")
        assert getattr(getattr(config, group), own) == value != before


def _another(value: Any, *, text: bool) -> Any:
    if isinstance(value, bool):
        return not value
    if text or isinstance(value, str):
        return "none" if value == "expected_average_only_in" else "expected_average_only_in" if value == "none" else "x"
    if value is None:
        return 3
    return value / 2 if isinstance(value, float) else value + 1


def test_a_name_is_translated_or_ignored_with_a_reason() -> None:
    assert not set(IGNORED) & (set(TRANSLATED) | set(RULES))
    for name, why in IGNORED.items():
        keys, ignored = LanguageModelSAERunnerConfig(**{name: 1}).translated()
        assert ignored == {name: why}
        assert keys == LanguageModelSAERunnerConfig().translated()[0]


def test_what_has_no_effect_in_part_is_said_too() -> None:
    for name, value, says in [
        ("exclude_special_tokens", [3, 4], "not those listed"),
        ("model_from_pretrained_kwargs", {"fold_ln": True}, "no key for fold_ln"),
        ("k", 5, "standard has no sae.k"),
        ("l0_coefficient", 1.0, "standard has no"),
    ]:
        assert says in LanguageModelSAERunnerConfig(**{name: value}).translated()[1][name]
    ghosts = LanguageModelSAERunnerConfig(architecture="topk", use_ghost_grads=True)
    assert "auxiliary loss" in ghosts.translated()[1]["use_ghost_grads"]
    assert ghosts.to_run_config().sae.dead_method == "auxk"


@pytest.mark.parametrize(
    ("sae", "architecture"),
    [
        (StandardTrainingSAEConfig(d_in=128, d_sae=64, l1_coefficient=2.0), "standard"),
        (GatedTrainingSAEConfig(d_in=128, d_sae=64), "gated"),
        (TopKTrainingSAEConfig(d_in=128, d_sae=64, k=8), "topk"),
        (BatchTopKTrainingSAEConfig(d_in=128, d_sae=64, k=8.0), "batchtopk"),
        (MatryoshkaBatchTopKTrainingSAEConfig(d_in=128, d_sae=64, k=8, matryoshka_widths=[]), "matryoshka"),
        (JumpReLUTrainingSAEConfig(d_in=128, d_sae=64, jumprelu_bandwidth=0.1), "jumprelu"),
    ],
)
def test_nested_names_do_as_flat_ones(sae: Any, architecture: str) -> None:
    cfg = LanguageModelSAERunnerConfig(sae=sae, logger=LoggingConfig(log_to_wandb=False, run_name="x"), lr=1e-3)
    flat = LanguageModelSAERunnerConfig(
        architecture=sae.architecture(), log_to_wandb=False, run_name="x", lr=1e-3, **sae.given
    )
    assert cfg.to_run_config() == flat.to_run_config()
    assert cfg.to_run_config().sae.architecture == architecture
    assert re.fullmatch("runs/x-[0-9a-f]{8}", cfg.checkpoint_path)
    assert cfg.sae.d_sae == cfg.d_sae == 64


def test_partial_calls_construct_and_defaults_are_theirs() -> None:
    cfg = LanguageModelSAERunnerConfig()
    assert (cfg.seed, cfg.train_batch_size_tokens, cfg.all_given().get("checkpoint_path")) == (42, 4096, None)
    config = cfg.to_run_config()
    assert (config.optim.grad_clip, config.sae.normalize_activations, config.store.seed) == (1.0, "none", 42)
    assert config.data.exclude_special_tokens is False
    assert LanguageModelSAERunnerConfig(architecture="topk").to_run_config().sae.k == 100
    assert "d_sae=3" in repr(LanguageModelSAERunnerConfig(d_sae=3))
    with pytest.raises(AttributeError, match="has no d_sea"):
        _ = cfg.d_sea


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"l1_coeficient": 1.0}, "did you mean l1_coefficient"),
        ({"sae": StandardTrainingSAEConfig(d_in=3), "d_in": 4}, "d_in=4 differs from d_in=3"),
        ({"hook_name": HOOK, "hook_layer": 1}, "hook_layer=1 is not the layer"),
        ({"architecture": "gated", "activation_fn": "topk"}, "activation_fn=topk does not go with architecture=gated"),
        ({"architecture": "abstopk"}, "architecture=abstopk is not known"),
        ({"model_name": "gpt2-small"}, "dataset_path is missing"),
        ({"seqpos_slice": (0, 10, 2)}, "is no run of positions"),
        ({"lr": -1.0}, "optim.lr=-1.0 is out of range"),
        ({"d_sae": "many"}, "sae.d_sae"),
        ({"normalize_activations": "layer_norm"}, "sae.normalize_activations=layer_norm is not known"),
        ({"saepipe": {"store.type": "int8"}}, "store.type is not known"),
        ({"saepipe": {"overrides.x": 1}}, "overrides.x is not known"),
        ({"saepipe": {"foo": 1}}, r"saepipe key=foo is not known; .*as store.dtype"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        LanguageModelSAERunnerConfig(**given).to_run_config()


def test_runs_that_differ_in_training_share_a_store_and_no_folder() -> None:
    one, two = (LanguageModelSAERunnerConfig(**FLAT, l1_coefficient=value).to_run_config() for value in (1.0, 2.0))
    assert one.store.dir == two.store.dir
    assert one.run.dir != two.run.dir
    given = {**FLAT, "checkpoint_path": "out/runs", "saepipe": {"store.dtype": "int8"}}
    kept = LanguageModelSAERunnerConfig(**given).to_run_config()
    assert re.fullmatch(r"out/runs/standard-[0-9a-f]{8}", kept.run.dir)
    assert kept.store.dir.startswith("out/stores/demo-")
    assert kept.store.dtype == "int8"
    # A loop over a setting, as it is written for SAELens
    loop = [LanguageModelSAERunnerConfig(**given, run_name="l1", l1_coefficient=value) for value in (1.0, 2.0, 1.0)]
    assert loop[0].checkpoint_path == loop[2].checkpoint_path != loop[1].checkpoint_path
    assert re.fullmatch(r"out/runs/l1-[0-9a-f]{8}", loop[0].checkpoint_path)
    chosen = LanguageModelSAERunnerConfig(**{**given, "saepipe": {"run.dir": "out/mine"}})
    assert chosen.checkpoint_path == "out/mine"


METRICS = {"l0", "explained_variance", "ce_loss_score", "dead_fraction", "metrics/l0", "losses/mse_loss"}


@pytest.mark.parametrize(
    ("more", "loss"),
    [
        ({"l1_coefficient": 8e-5, "l1_warm_up_steps": 4, "use_ghost_grads": True}, "ghost_grad_loss"),
        ({"architecture": "gated", "l1_coefficient": 1.0, "l1_warm_up_steps": 4}, "l1_loss"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 8}}, "auxiliary_reconstruction_loss"),
    ],
)
def test_a_run_ends_in_an_sae_and_metrics(
    more: dict[str, Any], loss: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO", "saepipe")
    trainer = SAETrainingRunner(LanguageModelSAERunnerConfig(**FLAT, **more, noise_std=0.0, output_path="out"))
    sae = trainer.run()
    assert isinstance(sae, saepipe.TrainingSAE)
    assert (sae.d_in, sae.d_sae, sae.metadata["hook_name"]) == (128, 192, HOOK)
    assert set(trainer.metrics) >= METRICS | {f"losses/{loss}"}
    assert (tmp_path / "out" / "sae_weights.safetensors").is_file()
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "noise_std" in line] == ["without effect: noise_std (no noise is added)"]
    disk = next(at for at, line in enumerate(said) if "GB on disk" in line)
    assert not any("training" in line or "is complete" in line for line in said[:disk])
    if more.get("l1_coefficient") == 8e-5:
        assert any("times 128" in line for line in said)

    caplog.clear()
    again = SAETrainingRunner(LanguageModelSAERunnerConfig(**FLAT, **more, noise_std=0.0))
    again.run()
    assert "is complete already" in caplog.text
    assert "already trained" in caplog.text
    assert again.metrics["l0"] == trainer.metrics["l0"]


def test_the_command_in_the_summary_makes_the_same_configuration() -> None:
    config = LanguageModelSAERunnerConfig(**FLAT, activation_fn="topk", device="cpu").to_run_config()
    assert entry.load_config("train", config.overrides).sae == config.sae
    assert entry.load_config("train", config.overrides).optim == config.optim


def test_a_wrong_width_is_refused_with_both() -> None:
    with pytest.raises(UserError, match=rf"d_in=64 is not the width of hook_name={HOOK}, 128"):
        SAETrainingRunner(LanguageModelSAERunnerConfig(**{**FLAT, "d_in": 64})).run()


@pytest.mark.parametrize(("code", "error"), [(130, KeyboardInterrupt), (143, SystemExit)])
def test_ctrl_c_is_what_it_is_in_a_notebook(
    monkeypatch: pytest.MonkeyPatch, code: int, error: type[BaseException]
) -> None:
    def stopped(_: object) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("saepipe.train.train", stopped)
    with pytest.raises(error):
        SAETrainingRunner(LanguageModelSAERunnerConfig(**FLAT)).run()


def test_a_file_in_the_place_of_the_output_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_path=.* is a file; give a folder"):
        SAETrainingRunner(LanguageModelSAERunnerConfig(**FLAT, output_path=str(tmp_path / "file"))).run()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux has a folder where nobody can make one")
def test_an_output_that_cannot_be_made_is_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"output_path=/proc/x cannot be written"):
        SAETrainingRunner(LanguageModelSAERunnerConfig(**FLAT, output_path="/proc/x")).run()
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["override_dataset", "override_model", "override_sae"])
def test_objects_are_refused_with_what_to_do_instead(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is not taken.*; save it"):
        SAETrainingRunner(LanguageModelSAERunnerConfig(), **{name: object()})


def test_a_store_in_memory_takes_the_same_configuration() -> None:
    cfg = LanguageModelSAERunnerConfig(**FLAT, n_batches_in_buffer=2)
    store = ActivationsStore.from_config(LanguageModel.open(ModelConfig()), cfg)
    assert (store.n_batches_in_buffer, store.hook_name, store.context_size) == (2, HOOK, 32)
    assert store.next_batch().shape == (512, 128)


def test_names_are_at_the_front_door() -> None:
    assert saepipe.SAETrainingRunner is saepipe.LanguageModelSAETrainingRunner is SAETrainingRunner
    assert saepipe.LanguageModelSAERunnerConfig is LanguageModelSAERunnerConfig
    assert saepipe.ActivationsStore is ActivationsStore
    assert saepipe.TrainingSAE is saepipe.SAE
    assert len(KNOWN) == len(set(KNOWN))


def test_names_that_are_elsewhere_say_what_to_use() -> None:
    with pytest.raises(ImportError, match=r"saepipe has no run_evals; use saepipe.evaluate.evaluate"):
        from saepipe import run_evals  # noqa: F401
    with pytest.raises(ImportError, match=r"saepipe has no JumpReLUSAE; use SAE: it opens every architecture"):
        from saepipe import JumpReLUSAE  # noqa: F401
    with pytest.raises(ImportError, match=r"use saepipe.pretrained.list"):
        from saepipe import get_pretrained_saes_directory  # noqa: F401
    with pytest.raises(ImportError, match=r"cannot import name 'Sae' from 'saepipe'"):
        from saepipe import Sae  # noqa: F401
    assert {"pretrained", "neuronpedia", "SAE"} <= {*dir(saepipe)}
    assert saepipe.neuronpedia.page("gpt2-small/8-res-jb", 1).endswith("/1")


def test_a_configuration_shows_its_names_and_says_what_it_holds() -> None:
    shown = inspect.signature(LanguageModelSAERunnerConfig).parameters
    assert [*shown][:3] == ["sae", "logger", "saepipe"]
    assert {*shown} == {"sae", "logger", "saepipe", *KNOWN}
    assert {"k", "d_sae", "aux_loss_coefficient"} <= {*inspect.signature(TopKTrainingSAEConfig).parameters}
    assert "l1_coefficient" not in inspect.signature(TopKTrainingSAEConfig).parameters
    with pytest.raises(UserError, match=r"TopKTrainingSAEConfig\(128, ...\): give every value by its name"):
        TopKTrainingSAEConfig(128, 512)
    with pytest.raises(UserError, match=r"sae='demo' is no TrainingSAEConfig"):
        LanguageModelSAERunnerConfig("demo")
    assert shown["context_size"].default == 128
    config = LanguageModelSAERunnerConfig(sae=TopKTrainingSAEConfig(k=4), training_tokens=10_000)
    assert (config.total_training_tokens, config.total_training_steps) == (10_000, 2)
    found = config.to_dict()
    assert (found["k"], found["architecture"], found["context_size"]) == (4, "topk", 128)


def test_the_page_for_those_who_come_from_saelens_is_true() -> None:
    page = (Path(__file__).parents[1] / "docs" / "coming_from_saelens.md").read_text()
    imports = page.split("## Imports")[1].split("##")[0]
    for line in imports.splitlines():
        if "the same name" in line:
            for name in re.findall(r"`([A-Za-z]+)`", line):
                assert hasattr(saepipe, name), name
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    made: dict[str, Any] = {}
    exec(code.partition("runner =")[0], made)
    found = made["cfg"].to_run_config()
    assert (found.sae.k, found.model.name, found.store.dtype, found.train.tokens) == (32, "gpt2", "int8", 100_000_000)
    differ = page.split("What differs")[1].split("##")[0]
    for name in ("n_batches_in_buffer", "act_store_device", "prefetch_llm_batches", "resume_from_checkpoint"):
        assert f"`{name}" in differ
        assert name in IGNORED


def test_values_can_be_set_later_as_fields_of_a_dataclass_can() -> None:
    config = LanguageModelSAERunnerConfig(sae=TopKTrainingSAEConfig(d_in=128, d_sae=512, k=4), lr=1e-3)
    config.lr, config.sae.k, config.train_batch_size = 3e-4, 9, 768
    found = config.to_run_config()
    assert (found.optim.lr, found.sae.k, found.stream.batch_tokens) == (3e-4, 9, 768)
    assert (config.k, config.d_sae) == (9, 512)
    assert LanguageModelSAERunnerConfig(d_in=512, expansion_factor=16).d_sae == 8192
    assert copy.deepcopy(config).lr == 3e-4
    with pytest.raises(UserError, match="name=bogus is not known"):
        config.bogus = 1
    config.d_sae = 64
    with pytest.raises(UserError, match="d_sae=64 differs from d_sae=512 inside"):
        config.to_run_config()
