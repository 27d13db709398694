"""What holds for every architecture: each test runs over whatever is registered."""

import copy
import dataclasses
import io
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_saes import D_IN, D_SAE, DEAD, TOKENS, data, make

from saepipe import saes
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.saes.base import SAE, Step

CONF = Path(__file__).parents[2] / "conf" / "sae"

pytestmark = pytest.mark.parametrize("name", saes.registered())


def test_configuration_and_yaml_have_the_same_keys_and_values(name: str) -> None:
    config_class = saes.architecture(name).config_class
    shared, values = (yaml.safe_load((CONF / f"{file}.yaml").read_text()) for file in ("_base", name))
    assert values.pop("defaults") == ["_base", "_self_"]
    assert not values.items() & shared.items()  # it says what is its own
    values = shared | values
    assert set(values) == {field.name for field in dataclasses.fields(config_class)}
    assert config_class(**values) == config_class()
    assert config_class().architecture == name


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 3, 4)])
def test_shapes_with_any_leading_axes(name: str, batch: tuple[int, ...]) -> None:
    sae, x = make(name), torch.randn(*batch, D_IN, generator=torch.Generator().manual_seed(0))
    f = sae.encode(x)
    assert f.shape == (*batch, D_SAE)
    assert sae.decode(f).shape == sae(x).shape == x.shape
    torch.testing.assert_close(f.reshape(-1, D_SAE), sae.encode(x.reshape(-1, D_IN)))
    assert (f >= 0).all()


def test_weights_have_the_field_s_names_and_shapes(name: str) -> None:
    shapes = {name: tuple(value.shape) for name, value in make(name).named_parameters()}
    vectors = dict.fromkeys(saes.architecture(name).latent_parameters, (D_SAE,))
    assert shapes == {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), **vectors}
    assert make(name).W_enc.T.is_contiguous()  # a latent is a row of memory: sparse gradients need it to be fast


def test_initialise_is_a_function_of_the_generator(name: str) -> None:
    first, again, other = (make(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["W_dec"], other["W_dec"])


def test_loss_gives_finite_gradients_and_what_the_logs_need(name: str) -> None:
    sae, x = make(name), data()
    losses = sae.loss(x, x, Step(dead=DEAD))
    losses.total.backward()
    for key, parameter in sae.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key
    assert "mse_loss" in losses.terms
    assert losses.total.item() == pytest.approx(sum(term.item() for term in losses.terms.values()))
    squared = (losses.target - losses.reconstruction).square().sum(1).mean()
    torch.testing.assert_close(losses.terms["mse_loss"].detach(), squared)
    if "topk_threshold" in losses.notes:  # it encodes with a threshold that it learns: here the batch's own
        sae.threshold.copy_(torch.nextafter(losses.notes["topk_threshold"], torch.zeros(())))
    f = sae.encode(x)
    assert torch.equal(losses.fired, (f > 0).sum(0).float())
    assert losses.l0.item() == pytest.approx((f > 0).sum(1).float().mean().item())
    assert not any(t.requires_grad for t in (losses.target, losses.reconstruction, losses.fired))
    torch.testing.assert_close(losses.reconstruction / sae.norm_scale, sae(x))


def test_decoder_rows_are_held_at_norm_one_where_asked(name: str) -> None:
    sae, x = make(name, normalize_sae_decoder=True), data()
    fresh = saes.architecture(name)(sae.cfg, D_IN)
    fresh.initialise(torch.Generator().manual_seed(0))
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(D_SAE))
    losses = sae.loss(x, x, Step(dead=DEAD))
    losses.total.backward()
    assert sae.W_dec.grad is not None
    before, rows = sae.W_dec.grad.clone(), sae.W_dec.detach()
    sae.before_step()
    along = (sae.W_dec.grad * rows).sum(1)
    torch.testing.assert_close(along, torch.zeros(D_SAE), rtol=0, atol=1e-5 * float(before.norm()))
    removed = before - sae.W_dec.grad
    assert removed.norm() > 1e-3 * before.norm()
    torch.testing.assert_close(removed, (removed * rows).sum(1, keepdim=True) * rows / rows.square().sum(1)[:, None])
    direction = rows / rows.norm(dim=1, keepdim=True)
    sae.after_step(losses)
    torch.testing.assert_close(sae.W_dec.detach(), direction)


def test_decoder_rows_are_free_by_default(name: str) -> None:
    sae, x = make(name), data()
    losses = sae.loss(x, x, Step(dead=DEAD))
    losses.total.backward()
    assert sae.W_dec.grad is not None
    gradient, rows = sae.W_dec.grad.clone(), sae.W_dec.detach().clone()
    sae.before_step()
    sae.after_step(losses)
    assert torch.equal(sae.W_dec.grad, gradient)
    assert torch.equal(sae.W_dec, rows)


def test_training_lowers_the_loss(name: str) -> None:
    sae, x = make(name), data(256)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3, fused=True)
    totals = []
    for step in range(30):
        losses = sae.loss(x, x, Step(step, DEAD))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.terms["mse_loss"].item())
    assert totals[-1] < 0.7 * totals[0]


def test_fused_adam_steps_as_plain_adam_on_contiguous_weights(name: str) -> None:
    sae, x = make(name), data()
    plain = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in sae.named_parameters()}
    fused = torch.optim.Adam(sae.parameters(), fused=True)
    reference = torch.optim.Adam([value.requires_grad_() for value in plain.values()], fused=False)
    for step in range(3):
        fused.zero_grad()
        sae.loss(x, x, Step(step, DEAD)).total.backward()
        for key, value in sae.named_parameters():
            assert value.grad is not None
            plain[key].grad = value.grad.clone(memory_format=torch.contiguous_format)
        fused.step()
        reference.step()
    for key, value in sae.named_parameters():
        torch.testing.assert_close(value, plain[key])


@pytest.mark.parametrize("keys", [{}, {"dead_method": "ghost"}], ids=str)
def test_bfloat16_autocast_trains_float32_weights(name: str, keys: dict[str, str]) -> None:
    sae, x = make(name, **keys), data()
    exact = sae.loss(x, x, Step(dead=DEAD))
    with torch.autocast("cpu", torch.bfloat16):
        losses = sae.loss(x, x, Step(dead=DEAD))
        assert losses.total.dtype == torch.float32
        losses.total.backward()
    torch.testing.assert_close(losses.total, exact.total, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sae.parameters())
    expected = torch.autograd.grad(exact.total, list(sae.parameters()))
    for parameter, theirs in zip(sae.parameters(), expected, strict=True):
        assert torch.cosine_similarity(parameter.grad.flatten(), theirs.flatten(), dim=0) > 0.99


def test_bfloat16_activations_and_weights(name: str) -> None:
    sae, x = make(name), data()
    assert sae.encode(x.bfloat16()).dtype == torch.float32
    low = make(name, torch.bfloat16)
    assert low(x).dtype == torch.bfloat16
    assert torch.cosine_similarity(low(x).float(), sae(x), dim=1).min() > 0.9


def test_state_goes_round_and_the_copy_trains_on_as_fast(name: str) -> None:
    sae, x = make(name), data()
    buffer = io.BytesIO()
    torch.save(sae.state_dict(), buffer)
    buffer.seek(0)
    restored = saes.architecture(name)(sae.cfg, D_IN)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (restored, copy.deepcopy(sae)):
        assert torch.equal(other(x), sae(x))
        strides = [(a.stride(), b.stride()) for a, b in zip(sae.parameters(), other.parameters(), strict=True)]
        assert all(a == b for a, b in strides), strides


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_export_does_the_same_on_raw_activations(name: str, dtype: torch.dtype, limit: float, tmp_path: Path) -> None:
    sae, x = make(name, dtype), data().to(dtype)
    saelens.save(sae, tmp_path / "sae", metadata={"hook_name": "blocks.0.hook_resid_post"})
    loaded = SAE.load(tmp_path / "sae", dtype=dtype)
    f = sae.encode(x)
    torch.testing.assert_close(loaded.encode(x), f, rtol=limit, atol=limit)
    torch.testing.assert_close(loaded.decode(f), sae.decode(f), rtol=limit, atol=10 * limit)
    assert loaded.norm_scale == loaded.target_scale == 1
    assert loaded.metadata["hook_name"] == "blocks.0.hook_resid_post"


def test_a_file_is_all_it_takes_to_add_an_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(saes.__path__[0], f"{name}.py").read_text()
    (tmp_path / "novel.py").write_text(source.replace(f'architecture: str = "{name}"', 'architecture: str = "novel"'))
    monkeypatch.setattr(saes, "__path__", [*saes.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "saepipe.saes.novel", raising=False)
    monkeypatch.delattr(saes, "novel", raising=False)
    assert "novel" in saes.registered()
    cls = saes.architecture("novel")
    assert cls.config_class.architecture == "novel"
    assert cls(cls.config_class(d_sae=D_SAE), D_IN).encode(data()).shape == (TOKENS, D_SAE)
    sys.modules.pop("saepipe.saes.novel")


def test_folding_the_norms_of_decoder_rows_changes_no_reconstruction(name: str) -> None:
    sae, x = make(name, torch.float64), data().double()
    ranked = hasattr(sae.cfg, "rescale_acts_by_decoder_norm")  # whose latents have the norms already
    with torch.no_grad():
        sae.W_dec[7] = 0
        before, latents, norms = sae(x), sae.encode(x), sae.W_dec.norm(dim=1)
        sae.fold_W_dec_norm()
        assert set(sae.W_dec.norm(dim=1).round(decimals=9).tolist()) == {0.0, 1.0}
        torch.testing.assert_close(sae(x), before)
        expected = latents if ranked else latents * norms
        torch.testing.assert_close(sae.encode(x)[:, 8:], expected[:, 8:])
    if ranked:
        with pytest.raises(UserError, match="rescale_acts_by_decoder_norm=False"):
            make(name, rescale_acts_by_decoder_norm=False).fold_W_dec_norm()


def test_what_is_set_through_its_configuration_is_kept(name: str) -> None:
    sae = make(name)
    sae.metadata = {"hook_name": "blocks.1.hook_z", "model_name": "m"}
    sae.cfg.hook_name = "blocks.2.hook_z"
    sae.cfg.metadata.neuronpedia_id = "m/2-x"
    assert (sae.metadata["hook_name"], sae.metadata["neuronpedia_id"]) == ("blocks.2.hook_z", "m/2-x")
    assert sae.cfg.to_dict()["hook_name"] == sae.cfg.metadata.to_dict()["hook_name"] == "blocks.2.hook_z"
    assert sae.cfg.metadata.model_from_pretrained_kwargs is None
    with pytest.raises(AttributeError, match="no hook_nam"):
        _ = sae.cfg.metadata.hook_nam
    assert f"d_in={D_IN}, d_sae={D_SAE}, hook_name=blocks.2.hook_z" in repr(sae)


def test_its_configuration_says_what_saelens_says_there(name: str) -> None:
    sae = make(name)
    sae.metadata = {"hook_name": "blocks.11.hook_resid_pre"}
    assert (sae.cfg.hook_layer, sae.cfg.dtype, sae.cfg.device, sae.cfg.neuronpedia_id) == (11, "float32", "cpu", None)
    sae.to(torch.bfloat16)
    wanted = {"hook_layer": 11, "dtype": "bfloat16", "device": "cpu", "hook_name": "blocks.11.hook_resid_pre"}
    assert sae.cfg_dict.items() >= wanted.items()
    sae.cfg.neuronpedia_id = "m/11-x"  # which the metadata did not have yet
    assert sae.metadata["neuronpedia_id"] == "m/11-x"
    sae.metadata = {"hook_name": "hook_embed"}
    assert sae.cfg.hook_layer is None


def test_only_heads_are_joined(name: str) -> None:
    sae, x = make(name), data()
    heads = x.unflatten(1, (2, -1))
    with pytest.raises(UserError, match=rf"are not d_in={D_IN} wide; give those of hook None"):
        sae.encode(heads)
    sae.metadata = {"hook_name": "blocks.1.attn.hook_z"}
    assert torch.equal(sae.encode(heads), sae.encode(x))
    assert torch.equal(sae(heads), sae(x))
    with pytest.raises(UserError, match="not d_in"):
        sae.encode(x[:, :3])


def test_its_own_error_term_makes_a_reconstruction_exact(name: str) -> None:
    sae, x = make(name, torch.float64), data().double().requires_grad_()
    assert not sae.use_error_term
    plain = sae(x)
    sae.use_error_term = True
    torch.testing.assert_close(sae(x), x)
    (found,), (expected,) = torch.autograd.grad(sae(x).sum(), x), torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(found, expected)  # the error is held fixed
