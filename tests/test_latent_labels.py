from pathlib import Path

import pytest

from saepipe import latent_labels
from saepipe.errors import UserError


def test_names_are_read_by_number(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"12": "HTTP requests", "0": "שלום"}', encoding="utf-8")
    assert latent_labels.read(tmp_path / "names.json", 13) == {12: "HTTP requests", 0: "שלום"}


def test_a_byte_order_mark_is_no_part_of_them(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"1": "x"}', encoding="utf-8-sig")  # as Windows' editor does
    assert latent_labels.read(tmp_path / "names.json", 13) == {1: "x"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"13": "beyond"}', "names latent '13'; the SAE has 0 to 12"),
        ('{"-1": "before"}', "names latent '-1'"),
        (f'{{"{"1" * 5000}": "no number"}}', "names latent '1111"),
        ('{"one": "a word"}', "names latent 'one'"),
        ('{"²": "no digit"}', "names latent '²'"),
        ('{"1": 2}', "holds no names of latents; write them as JSON"),
        ('["a"]', "holds no names of latents"),
        ("{", "holds no names of latents"),
        ("[" * 100_000, "holds no names of latents"),
        (None, "cannot be read \\(No such file"),
    ],
)
def test_what_names_no_latents_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"analyze.labels={path} {said}"):
        latent_labels.read(path, 13)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="holds no names of latents"):
        latent_labels.read(tmp_path / "names.json", 13)
