"""Every field of SAELens's own configurations is translated, or said to have no effect (`make peers`)."""

import dataclasses

import pytest

import saepipe
from saepipe import saelens
from saepipe.saelens_names import DEFAULTS, IGNORED, KNOWN, RULES, TRANSLATED

sae_lens = pytest.importorskip("sae_lens")

NESTED = {"sae", "logger"}
CONFIGS = ["LanguageModelSAERunnerConfig", "LoggingConfig", "TrainingSAEConfig"]
CONFIGS += [name for name in vars(saelens) if name.endswith("TrainingSAEConfig") and name != "TrainingSAEConfig"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_known(name: str) -> None:
    theirs = {item.name for item in dataclasses.fields(getattr(sae_lens, name))} - NESTED
    assert len(theirs) > 5
    assert theirs <= set(KNOWN)
    assert theirs <= {*TRANSLATED, *RULES, *IGNORED}


@pytest.mark.parametrize("name", [name for name in CONFIGS if "Training" in name and name != "TrainingSAEConfig"])
def test_an_architecture_has_its_name(name: str) -> None:
    assert getattr(saelens, name).architecture() == getattr(sae_lens, name).architecture()


@pytest.mark.parametrize("name", sae_lens.__all__)
def test_a_name_of_the_front_door_is_here_or_says_what_to_use(name: str) -> None:
    if name not in saepipe.__all__:
        with pytest.raises(ImportError, match=f"saepipe has no {name}; "):
            getattr(saepipe, name)


def test_defaults_are_theirs() -> None:
    cfg = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.TopKTrainingSAEConfig(d_in=8, d_sae=8), logger=sae_lens.LoggingConfig(log_to_wandb=False)
    )
    ours = {"model_name", "architecture", "expansion_factor", "b_dec_init_method"}  # other, or of earlier versions
    for name, value in DEFAULTS.items():
        if name not in ours:
            holder = next(one for one in (cfg, cfg.sae, cfg.logger) if hasattr(one, name))
            assert getattr(holder, name) == value, name
