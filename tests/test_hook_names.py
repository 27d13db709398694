"""A head's name parts into the hook point and the head, and back."""

import pytest

from saepipe.hook_names import split_head, with_head


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("blocks.3.attn.hook_z.head.7", ("blocks.3.attn.hook_z", 7)),
        ("blocks.3.attn.hook_q.head.10", ("blocks.3.attn.hook_q", 10)),
        ("hook_embed.head.0", ("hook_embed", 0)),
        ("blocks.3.attn.hook_z", ("blocks.3.attn.hook_z", None)),
        ("blocks.3.attn.hook_z.head", ("blocks.3.attn.hook_z.head", None)),
        ("blocks.3.attn.hook_z.head.07", ("blocks.3.attn.hook_z.head.07", None)),
        ("blocks.3.attn.hook_z.head.-1", ("blocks.3.attn.hook_z.head.-1", None)),
        ("blocks.3.attn.hook_z.head.\u0663", ("blocks.3.attn.hook_z.head.\u0663", None)),
        ("model.decoder.head.3", ("model.decoder.head.3", None)),  # the path of a module
    ],
)
def test_split_head(name: str, parts: tuple[str, int | None]) -> None:
    assert split_head(name) == parts
    assert with_head(*parts) == name
