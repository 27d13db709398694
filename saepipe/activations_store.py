"""Activations straight from a language model, shuffled in memory: for small jobs, without a store on disk.

Names and behaviour are those of SAELens's activations store. Text is packed as `saepipe.cache` packs it. What a large
run wants of a store on disk, several epochs in orders of their own, exact resuming, several processes, is not here.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepipe import mixing, not_taken
from saepipe.config import DataConfig
from saepipe.edits import per_token
from saepipe.encoding import Encoder
from saepipe.errors import UserError
from saepipe.formats import check_device
from saepipe.hook_names import split_head, with_head
from saepipe.in_memory import ANY_COLUMN, source_of
from saepipe.saes.stored import dtype_of
from saepipe.token_store import ordinary
from saepipe.tokens import Reading


class ActivationsStore:
    """An endless stream of shuffled activations at hook points of a language model.

    The data is read in its own order, from the beginning again when it ends. Its activations go through a buffer of
    `n_batches_in_buffer * store_batch_size_prompts * context_size` rows, half of which is drawn at random before it is
    filled up again. Two stores with the same model, data, sizes and `seed` give the same batches.

    Special tokens (beginning, end, padding ...) and position 0 are left out of batches and buffers, as in training from
    a store on disk; `exclude_special_tokens=False` keeps them, as SAELens does by default. `get_batch_tokens` and
    `get_activations` give whole contexts.

    Args:
        model: A `saepipe.language_model.LanguageModel`; or any model with a `tokenizer` and TransformerLens's
            `run_with_cache`.
        dataset: Path or hub id, `demo`, a `datasets.Dataset` (streamed or not), or a list (or other iterable) of texts
            or of token ids; an iterator is read to its end at once. Lists of token ids are taken as contexts by
            themselves, and cut where they are longer.
        hook_name: Hook point, or several: all are read in one forward pass, the first one is what the methods that know
            of one hook give.
        column: Column with text or token ids; None looks for text, tokens, input_ids.
        context_size: Tokens per context, special tokens included.
        prepend_bos: Begin every context with the beginning-of-sequence token; what begins with it gets no second one.
        pack: Join documents to fill contexts; None joins texts and leaves lists of token ids apart.
        streaming: Read a hub data set over the network as needed.
        exclude_special_tokens: As above; a list of token ids leaves out these, and position 0.
        seqpos_slice: Positions that batches are made of, as the arguments of `slice`.
        store_batch_size_prompts: Contexts per forward pass.
        n_batches_in_buffer: Forward passes that the buffer holds; at least two training batches are held.
        train_batch_size_tokens: Rows of a batch.
        seed: Decides the shuffle.
        device: Where rows are; None is the model's device.
        dtype: Type of rows.
        data: The data group of a `RunConfig`, which says all that column, context_size, prepend_bos, pack and streaming
            say; then `dataset` may be None, for that of the group. Its held-out documents are left out.
        **others: Arguments of SAELens's that have no meaning here, which say what to do instead.

    Raises:
        UserError: The data, a column, a hook or a token is not there, or nothing is left to train on.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        hook_name: str | Sequence[str],
        *,
        column: str | None = None,
        context_size: int = 128,
        prepend_bos: bool = True,
        pack: bool | None = None,
        streaming: bool = False,
        exclude_special_tokens: bool | Sequence[int] = True,
        seqpos_slice: Sequence[int | None] = (None,),
        store_batch_size_prompts: int = 32,
        n_batches_in_buffer: int = 16,
        train_batch_size_tokens: int = 4096,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        data: DataConfig | None = None,
        **others: Any,
    ) -> None:
        not_taken.refuse("ActivationsStore", others, not_taken.STORE, _OWN)
        self.model, self.seed, self.dtype = model, seed, dtype_of(dtype)
        self.hook_names = [hook_name] if isinstance(hook_name, str) else list(hook_name)
        if not self.hook_names:
            raise UserError("hook_name is an empty list; give the name of at least one hook point")
        counts = {
            "store_batch_size_prompts": store_batch_size_prompts,
            "n_batches_in_buffer": n_batches_in_buffer,
            "train_batch_size_tokens": train_batch_size_tokens,
        }
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value} is out of range; give a whole number, at least 1")
        self.store_batch_size_prompts, self.n_batches_in_buffer = store_batch_size_prompts, n_batches_in_buffer
        self.train_batch_size_tokens = train_batch_size_tokens
        data = data or DataConfig(
            column=column or ANY_COLUMN,
            context_size=context_size,
            prepend_bos=prepend_bos,
            pack=pack is not False,
            streaming=streaming,
            held_out=0.0,
        )
        self.source = source_of(dataset, data, seed=seed, tokens_apart=pack is None)
        self.context_size = data.context_size
        if hasattr(model, "check_hooks"):
            model.check_hooks(self.hook_names)
            model.check_context(self.context_size)
        self.device = torch.device(device if device is not None else _device_of(model))
        check_device(self.device)
        self._encoder = Encoder(self.source.data, model.tokenizer, _vocab_size(model))
        positions = np.arange(self.context_size)
        if not 1 <= len(seqpos_slice) <= 3:
            raise UserError(f"seqpos_slice={seqpos_slice} is no run of positions; give (first, past the last)")
        self._kept = np.isin(positions, positions[slice(*seqpos_slice)])
        self._special_ids: Sequence[int] | None = None
        if exclude_special_tokens is not False:
            ids = self._encoder.special_ids if exclude_special_tokens is True else exclude_special_tokens
            self._special_ids = list(ids)
            self._kept &= positions != 0
        if not self._kept.any():
            raise UserError(
                f"seqpos_slice={tuple(seqpos_slice)} leaves no position of a context of {self.context_size} to train "
                "on; widen it, or set exclude_special_tokens=False to keep position 0"
            )
        self._begun = 0
        self.reset()

    @classmethod
    def from_config(cls, model: Any, cfg: Any, override_dataset: Any = None, **options: Any) -> "ActivationsStore":
        """Read what a run would cache.

        Args:
            model: As for the class.
            cfg: A `RunConfig`, or a `saepipe.saelens.LanguageModelSAERunnerConfig`.
            override_dataset: Data in place of the configuration's.
            **options: As for the class, in place of the configuration's.

        Raises:
            UserError: Also for filters of the stream that are for stores on disk.
        """
        config = cfg.to_run_config() if hasattr(cfg, "to_run_config") else cfg
        stream = config.stream
        for key in ("max_norm", "roles"):
            if (wanted := getattr(stream, key)) is not None:
                raise UserError(f"stream.{key}={wanted} needs a store on disk; cache one, or leave it out")
        first, last = stream.positions or (None, None)
        values: dict[str, Any] = {
            "hook_name": stream.hook or config.model.hooks,
            "data": config.data,
            "exclude_special_tokens": config.data.exclude_special_tokens,
            "seqpos_slice": (first, None if last is None else last + 1),
            "store_batch_size_prompts": config.store.batch_prompts,
            "train_batch_size_tokens": stream.batch_tokens,
            "seed": config.store.seed,
        }
        if hasattr(cfg, "n_batches_in_buffer"):
            values["n_batches_in_buffer"] = cfg.n_batches_in_buffer
        return cls(model, override_dataset, **{**values, **options})

    @classmethod
    def from_sae(
        cls,
        model: Any,
        sae: Any,
        dataset: Any = None,
        context_size: int | None = None,
        store_batch_size_prompts: int = 8,
        n_batches_in_buffer: int = 16,
        train_batch_size_tokens: int = 4096,
        streaming: bool = True,
        **options: Any,
    ) -> "ActivationsStore":
        """Read the activations that an SAE was trained for: hook, context and beginning are those of its metadata.

        Args:
            model: As for the class.
            sae: The SAE.
            dataset: As for the class; None is what the SAE was trained on.
            context_size: As for the class; None is what the SAE was trained with.
            store_batch_size_prompts: As for the class.
            n_batches_in_buffer: As for the class.
            train_batch_size_tokens: As for the class.
            streaming: As for the class.
            **options: As for the class.

        Raises:
            UserError: Its metadata says no hook, or its width is not that of the hook.
        """
        known = sae.cfg.metadata
        hook, head = getattr(known, "hook_name", None), getattr(known, "hook_head_index", None)
        values: dict[str, Any] = {
            "hook_name": hook and with_head(hook, head),
            "context_size": context_size or getattr(known, "context_size", None),
            "dataset": getattr(known, "dataset_path", None) if dataset is None else dataset,
            **options,
        }
        for name, value in values.items():
            if value is None and name not in options:
                raise UserError(f"the SAE's metadata has no {name}; give it, as {name}=")
        prepend_bos = getattr(known, "prepend_bos", None)
        others: dict[str, Any] = {
            "prepend_bos": True if prepend_bos is None else prepend_bos,
            "seqpos_slice": getattr(known, "seqpos_slice", None) or (None,),
            "store_batch_size_prompts": store_batch_size_prompts,
            "n_batches_in_buffer": n_batches_in_buffer,
            "train_batch_size_tokens": train_batch_size_tokens,
            "streaming": streaming,
        }
        store = cls(model, **{**others, **values})
        if store.d_in != sae.cfg.d_in:
            raise UserError(
                f"the SAE's d_in={sae.cfg.d_in} is not the width of {store.hook_name}, {store.d_in}; give the model "
                "that it was trained on, or another hook_name"
            )
        return store

    def __repr__(self) -> str:
        return f"ActivationsStore({', '.join(self.hook_names)} on {self.source.data.path})"

    @property
    def hook_name(self) -> str:
        """The first hook point."""
        return self.hook_names[0]

    @cached_property
    def d_in(self) -> int:
        """Width of the first hook point's activations."""
        if hasattr(self.model, "width"):
            return int(self.model.width(self.hook_name))
        return self.get_activations(torch.zeros(1, 3, dtype=torch.int64)).shape[-1]

    def reset(self) -> None:
        """Begin anew: the same batches come again."""
        self.reset_input_dataset()
        self._generator = torch.Generator().manual_seed(self.seed)
        self._batches = self._mixed()

    def reset_input_dataset(self) -> None:
        """Begin the data anew; what is in the buffer stays there."""
        self._contexts = self._read()
        self._begun += 1

    def get_batch_tokens(
        self, batch_size: int | None = None, raise_at_epoch_end: bool = False
    ) -> Int[Tensor, "batch context"]:
        """Give the token ids of the next contexts, on the store's device.

        Args:
            batch_size: How many; None is store_batch_size_prompts.
            raise_at_epoch_end: Raise StopIteration where the data ends, and go on from its beginning at the next call;
                else it goes on at once.

        Raises:
            UserError: The data fills no context.
            StopIteration: See raise_at_epoch_end.
        """
        wanted = self.store_batch_size_prompts if batch_size is None else batch_size
        if wanted < 1:
            raise UserError(f"batch_size={batch_size} is out of range; give at least 1")
        found = list(islice(self._contexts, wanted))
        while len(found) < wanted:
            self.reset_input_dataset()
            if raise_at_epoch_end:
                raise StopIteration("the data is at its end; the next call begins it anew")
            more = list(islice(self._contexts, wanted - len(found)))
            if not more:
                raise UserError(
                    f"dataset={self.source.data.path} fills no context of {self.context_size} tokens; give more text, "
                    "a smaller context_size, or pack=True to join documents"
                )
            found += more
        return torch.from_numpy(np.stack(found).astype(np.int64)).to(self.device)

    def get_activations(self, batch_tokens: Int[Tensor, "batch context"]) -> Float[Tensor, "batch context d_in"]:
        """Run the model on token ids; gives the activations of every position, special tokens included."""
        return self.get_multi_hook_activations(batch_tokens)[self.hook_name]

    @torch.no_grad()
    def get_multi_hook_activations(
        self, batch_tokens: Int[Tensor, "batch context"]
    ) -> dict[str, Float[Tensor, "batch context _"]]:
        """Do as `get_activations` for all hook points; heads are joined where a hook has several."""
        if hasattr(self.model, "capture"):
            found = self.model.capture(batch_tokens, self.hook_names)
        else:
            points = list(dict.fromkeys(split_head(hook)[0] for hook in self.hook_names))
            seen = dict(self.model.run_with_cache(batch_tokens, names_filter=points)[1].items())
            shape = tuple(batch_tokens.shape)
            found = {hook: per_token(hook, seen.get(split_head(hook)[0]), shape) for hook in self.hook_names}
        return {hook: rows.to(self.device, self.dtype) for hook, rows in found.items()}

    def next_batch(self) -> Float[Tensor, "token d_in"]:
        """Give train_batch_size_tokens rows of the first hook point."""
        return next(self._batches)[self.hook_name]

    def __next__(self) -> Float[Tensor, "token d_in"]:
        """Do as `next_batch`."""
        return self.next_batch()

    def __iter__(self) -> Iterator[Float[Tensor, "token d_in"]]:
        """Give batches without end."""
        return self

    def get_data_loader(self) -> Iterator[Float[Tensor, "token d_in"]]:
        """Give batches without end, by SAELens's name."""
        return self

    def get_multi_hook_data_loader(self) -> Iterator[dict[str, Float[Tensor, "token _"]]]:
        """Give batches without end, of all hook points; a row is of the same token at each."""
        while True:
            yield next(self._batches)

    def get_buffer(
        self, n_batches_in_buffer: int | None = None, *, shuffle: bool = True
    ) -> Float[Tensor, "token d_in"]:
        """Give the rows of some forward passes at once, apart from the buffer that batches are drawn from.

        Args:
            n_batches_in_buffer: How many forward passes; None is the store's own number.
            shuffle: Give the rows in random order.
        """
        passes = n_batches_in_buffer or self.n_batches_in_buffer
        rows = torch.cat([self._rows()[self.hook_name] for _ in range(passes)])
        return rows[self._permutation(len(rows))] if shuffle else rows

    def _read(self) -> Iterator[np.ndarray]:
        """Read the data once, context by context."""
        for sides in Reading(self.source, self._encoder).contexts():
            yield from sides["train"][0]

    def _rows(self) -> dict[str, Tensor]:
        """Give each hook's rows of one forward pass, those that count."""
        tokens = self.get_batch_tokens()
        counted = torch.from_numpy(self._counts(tokens.cpu().numpy())).to(self.device)
        return {hook: found[counted] for hook, found in self.get_multi_hook_activations(tokens).items()}

    def _counts(self, ids: np.ndarray) -> Bool[np.ndarray, "batch context"]:
        kept = np.broadcast_to(self._kept, ids.shape)
        if self._special_ids is None:
            return kept.copy()
        return kept & ordinary(np.isin(ids, self._special_ids), np.arange(self.context_size))

    def _mixed(self) -> Iterator[dict[str, Tensor]]:
        size = self.n_batches_in_buffer * self.store_batch_size_prompts * self.context_size
        return mixing.mixed(self._passes(), size, self.train_batch_size_tokens, self._permutation)

    def _passes(self) -> Iterator[dict[str, Tensor]]:
        """Give the rows of one forward pass after another, as long as there are any."""
        begun = self._begun
        while True:
            rows = self._rows()
            if len(rows[self.hook_name]):
                begun = self._begun
            elif self._begun > begun + 1:  # the whole of the data since
                raise UserError(
                    f"dataset={self.source.data.path} has no token that exclude_special_tokens and seqpos_slice leave "
                    "to train on; exclude fewer"
                )
            yield rows

    def _permutation(self, n: int) -> Int[Tensor, " n"]:
        return torch.randperm(n, generator=self._generator).to(self.device)


_OWN = [name for name in ActivationsStore.__init__.__annotations__ if name not in ("others", "return")]


def _device_of(model: Any) -> Any:
    """Find where a model is: ours and SAELens's say it themselves, TransformerLens's in their configuration."""
    found = getattr(model, "device", None) or getattr(getattr(model, "cfg", None), "device", None)
    return found if found is not None else next(model.parameters()).device


def _vocab_size(model: Any) -> int:
    found = getattr(model, "vocab_size", None) or getattr(getattr(model, "cfg", None), "d_vocab", None)
    return int(found) if found else len(model.tokenizer)
