"""Texts, or contexts of a token store, as a model reads them: in batches, with the tokens that count.

Special tokens and position 0 count nowhere: an SAE is not trained on them, and a sink's activation is some hundred
times as long as any other.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saepipe import data_files, progress
from saepipe.config import DataConfig
from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer
from saepipe.latents import Contexts
from saepipe.saes.base import SAE
from saepipe.splicing import Splice


class Read(NamedTuple):
    """A batch of texts."""

    ids: Int[Tensor, "text seq"]
    """Token ids, padded on the right."""
    counted: Bool[Tensor, "text seq"]
    """Which of them count."""
    predicting: Bool[Tensor, "text before_last"]
    """Which of them, without the last, count and have a token behind them to predict."""


Reading = Iterable[Read]
"""What some texts are read in."""


class Texts:
    """A user's texts, as token ids.

    Args:
        model: The model that is to read them.
        texts: The texts.
        name: What they are, for errors: a key, or the name of an argument.
        truncate: Cut what is longer than the model's context, which is refused else.

    Raises:
        UserError: There is none, one holds no token that counts, or is longer than the context.
    """

    def __init__(
        self, model: HookedSAETransformer, texts: Sequence[str], *, name: str = "texts", truncate: bool = False
    ) -> None:
        if isinstance(texts, str):  # which is a sequence of texts as well, of one character each
            raise UserError(f"{name}={texts!r:.60} is one text; give a list, such as [text]")
        if not texts:
            raise UserError(f"{name} holds no text; give at least one")
        self._special = torch.tensor(model.special_ids)
        self.rows: list[Int[Tensor, " seq"]] = []
        """Token ids of each text."""
        for number, text in enumerate(texts, 1):
            which = f"{name}: text {number}, {text[:40]!r}"
            try:
                row = model.read(text, truncate=truncate).ids[0].cpu()
            except UserError as error:
                raise UserError(f"{which}: {error}") from error
            if not bool(self._counted(row).any()):
                raise UserError(
                    f"{which} holds no token that counts (special tokens and position 0 do not); leave it out or "
                    "lengthen it"
                )
            self.rows.append(row)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.rows)

    def _counted(self, row: Int[Tensor, " seq"]) -> Bool[Tensor, " seq"]:
        counted = ~torch.isin(row, self._special)
        counted[0] = False
        return counted

    def batches(self, size: int, step: str = "read") -> Iterator[Read]:
        """Read some texts at a time, in their order, with a bar.

        Args:
            size: How many at a time.
            step: What is going on, for the bar.
        """
        with progress.bar(step, sum(map(len, self.rows))) as bar:
            for start in range(0, len(self.rows), size):
                rows = self.rows[start : start + size]
                ids = pad_sequence(rows, batch_first=True)
                real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
                counted = pad_sequence([self._counted(row) for row in rows], batch_first=True)
                yield Read(ids, counted, counted[:, :-1] & real[:, 1:])
                bar.update(int(real.sum()))


def contexts(chosen: Contexts, size: int, step: str = "read") -> Iterator[Read]:
    """Read contexts of a token store, some at a time, with a bar; the arguments are those of `Texts.batches`."""
    for ids, counted in chosen.batches(size, step):
        yield Read(ids, counted, counted[:, :-1])


@torch.no_grad()
def activations(model: HookedSAETransformer, sae: SAE, read: Read) -> Float[Tensor, "text seq d_sae"]:
    """Run the model and the SAE: the activations of the latents, 0 at tokens that do not count.

    Args:
        model: The model.
        sae: The SAE.
        read: What to read.

    Raises:
        UserError: They are not finite.
    """
    hook = Splice(sae).hook_in
    block = re.match(r"blocks\.(\d+)\.", hook)
    stop = int(block[1]) + 1 if block else None
    _, cache = model.run_with_cache(read.ids, return_type=None, names_filter=[hook], stop_at_layer=stop)
    f = sae.encode(cache[hook].to(sae.device))
    f = f.masked_fill(~read.counted.to(f.device)[..., None], 0.0)
    if not f.isfinite().all():
        raise UserError(
            f"latents of the SAE at {hook} hold NaN or infinity; load the model with dtype=float32, or give the SAE of "
            "this model"
        )
    return f


def texts_of(path: str, column: str, key: str, column_key: str = "column") -> list[str]:
    """Read texts from a local file or folder: paragraphs between blank lines of a txt, or a column of a jsonl or table.

    Args:
        path: The file or folder.
        column: Column with the text, where there are columns.
        key: Key that the path is from, for errors.
        column_key: Key that the column is from, for errors.

    Raises:
        UserError: There is nothing, it cannot be read, or a text is none.
    """
    where = Path(path).expanduser()
    if not where.exists():
        raise UserError(f"{key}={path} does not exist; give a file or folder with texts (txt, jsonl, parquet)")
    data = DataConfig(path=str(where), column=column)
    try:
        files = data_files.find(data, where)
        if all(file.suffix == ".txt" for file in files):
            data.column = "text"
        found = list(data_files.read(files, data))
    except UserError as error:
        said = str(error).replace("data.path", key).replace("data.column", column_key)
        raise UserError(said if key in said else f"{key}={path}: {said}") from error
    if not found:
        raise UserError(f"{key}={path} holds no text; give a file with at least one")
    for number, text in enumerate(found, 1):
        if not isinstance(text, str):
            raise UserError(f"{key}={path}: row {number} of column {column} is {text!r:.40}, and no text; name another")
    return found
