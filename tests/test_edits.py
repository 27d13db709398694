"""Edits see one vector per token, and meet at a hook point without getting in each other's way."""

import pytest
import torch
from torch import Tensor

from saepipe.edits import functions, per_token
from saepipe.errors import UserError

SHAPE = (2, 5)
CPU = torch.device("cpu")
Z = "blocks.0.attn.hook_z"
HEADS = torch.randn(*SHAPE, 4, 3, generator=torch.Generator().manual_seed(0))


def test_heads_are_joined_or_selected() -> None:
    torch.testing.assert_close(per_token(Z, HEADS, SHAPE), HEADS.reshape(2, 5, 12))
    torch.testing.assert_close(per_token(f"{Z}.head.3", HEADS, SHAPE), HEADS[:, :, 3])


@pytest.mark.parametrize(
    ("hook", "found", "message"),
    [
        (Z, None, r"hook_z is not passed by this model's forward pass"),
        (Z, HEADS.transpose(1, 2), r"hook_z has shape \[2, 4, 5, 3\], not one vector per token"),
        (Z, HEADS[:, :, 0, 0], r"hook_z has shape \[2, 5\], not one vector per token"),
        (f"{Z}.head.4", HEADS, r"head.4 names head 4 of a hook with 4; the last is blocks.0.attn.hook_z.head.3$"),
        (f"{Z}.head.0", HEADS[:, :, 0], r"head.0 names a head of .*hook_z, which has no heads; give .*hook_z$"),
    ],
)
def test_no_vector_per_token(hook: str, found: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        per_token(hook, found, SHAPE)


def test_edits_of_heads_change_these_only() -> None:
    edits = {f"{Z}.head.1": torch.zeros_like, f"{Z}.head.3": lambda found: found + 1}
    made = functions(edits, SHAPE, CPU)
    assert list(made) == [Z]
    expected = HEADS.clone()
    expected[:, :, 1] = 0
    expected[:, :, 3] += 1
    torch.testing.assert_close(made[Z](HEADS.clone()), expected, atol=0, rtol=0)


def test_edits_that_meet_apply_in_the_order_given() -> None:
    added, doubled = (lambda found: found + 1), (lambda found: found * 2)
    last = HEADS[:, :, 3]
    for edits, expected in (
        ({Z: added, f"{Z}.head.3": doubled}, (last + 1) * 2),
        ({f"{Z}.head.3": doubled, Z: added}, last * 2 + 1),
    ):
        found = functions(edits, SHAPE, CPU)[Z](HEADS)
        torch.testing.assert_close(found[:, :, 3], expected)
        torch.testing.assert_close(found[:, :, :3], HEADS[:, :, :3] + 1)


@pytest.mark.parametrize("mid_first", [True, False])
def test_an_edit_between_attention_and_mlp_sees_the_edits_before_it(mid_first: bool) -> None:
    pre, attention = HEADS[:, :, 0], HEADS[:, :, 1]
    seen: list[Tensor] = []
    edits = {
        "blocks.0.hook_resid_mid": lambda found: seen.append(found) or found * 2,
        "blocks.0.hook_attn_out": torch.zeros_like,
        "blocks.0.hook_resid_pre": lambda found: found + 1,
    }
    made = functions(edits if mid_first else dict(reversed(edits.items())), SHAPE, CPU)
    stream = made["blocks.0.hook_resid_pre"](pre)
    torch.testing.assert_close(stream + made["blocks.0.hook_attn_out"](attention), (pre + 1) * 2)
    torch.testing.assert_close(seen[0], pre + 1)
