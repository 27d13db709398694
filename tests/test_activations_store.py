"""Activations in memory: what a batch is made of, that it is the same again, and every kind of model and data."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch

from saepipe import saes
from saepipe.activations_store import ActivationsStore
from saepipe.config import DataConfig, ModelConfig, RunConfig, StoreConfig, StreamConfig
from saepipe.errors import UserError
from saepipe.language_model import LanguageModel

HOOK, OTHER = "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"
TEXTS = [
    f"the dog number {number} runs through the garden and the cat sleeps in the house . " * 3 for number in range(60)
]
SMALL: dict[str, Any] = {
    "context_size": 16,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 4,
    "train_batch_size_tokens": 32,
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(ModelConfig())


class WithCache:
    """A model as TransformerLens has them: no `capture`, but `run_with_cache`, and heads on an axis of their own."""

    def __init__(self, model: LanguageModel) -> None:
        self.tokenizer, self.device, self._model = model.tokenizer, model.device, model

    def run_with_cache(self, ids: torch.Tensor, names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        found = self._model.capture(ids, names_filter)
        return None, {name: rows.unflatten(-1, (4, -1)) if "_z" in name else rows for name, rows in found.items()}


def test_tokens_and_activations_are_whole_contexts(model: LanguageModel) -> None:
    store = ActivationsStore(model, TEXTS, HOOK, **SMALL)
    tokens = store.get_batch_tokens(3)
    assert tokens.shape == (3, 16)
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    assert store.get_batch_tokens().shape == (4, 16)
    assert torch.equal(store.get_activations(tokens), model.capture(tokens, [HOOK])[HOOK])
    assert store.d_in == 128


def test_batches_are_ordinary_rows_of_the_data_each_once(model: LanguageModel) -> None:
    store = ActivationsStore(model, TEXTS, HOOK, **SMALL)
    every = ActivationsStore(model, TEXTS, HOOK, **SMALL)
    tokens = every.get_batch_tokens(40)
    special = torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))
    kept = every.get_activations(tokens)[~special & (torch.arange(16) != 0)]
    for _ in range(10):
        batch = store.next_batch()
        assert batch.shape == (32, 128)
        distances = torch.cdist(batch, kept, compute_mode="donot_use_mm_for_euclid_dist")
        assert distances.min(1).values.max() < 1e-2  # every row is one of the kept ones
    assert not torch.equal(store.next_batch(), kept[320:352])  # but in another order


def test_the_same_seed_gives_the_same_batches_and_reset_begins_again(model: LanguageModel) -> None:
    stores = [ActivationsStore(model, TEXTS, HOOK, seed=seed, **SMALL) for seed in (1, 1, 2)]
    first, again, other = ([next(store) for _ in range(5)] for store in stores)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    stores[0].reset()
    assert all(
        map(torch.equal, first, [batch for batch, _ in zip(stores[0].get_data_loader(), range(5), strict=False)])
    )


def test_special_tokens_are_kept_on_request(model: LanguageModel) -> None:
    rows = {
        choice: len(ActivationsStore(model, TEXTS, HOOK, exclude_special_tokens=choice, **SMALL).get_buffer(1))
        for choice in (True, False)
    }
    assert rows[False] == 64
    assert rows[True] < 64
    listed = [5]
    store = ActivationsStore(
        model, [[5, 6, 7, 5] * 4] * 9, HOOK, exclude_special_tokens=listed, prepend_bos=False, **SMALL
    )
    assert len(store.get_buffer(1)) == 4 * 8  # half of the tokens, position 0 among those listed


def test_positions_can_be_chosen(model: LanguageModel) -> None:
    store = ActivationsStore(model, TEXTS, HOOK, seqpos_slice=(3, 6), exclude_special_tokens=False, **SMALL)
    assert len(store.get_buffer(1)) == 4 * 3
    with pytest.raises(UserError, match="leaves no position"):
        ActivationsStore(model, TEXTS, HOOK, seqpos_slice=(0, 1), **SMALL)


def test_several_hooks_give_rows_of_the_same_tokens(model: LanguageModel) -> None:
    both = ActivationsStore(model, TEXTS, [HOOK, OTHER], **SMALL)
    alone = [ActivationsStore(model, TEXTS, hook, **SMALL) for hook in (HOOK, OTHER)]
    batch = next(both.get_multi_hook_data_loader())
    assert list(batch) == [HOOK, OTHER]
    for hook, store in zip((HOOK, OTHER), alone, strict=True):
        assert torch.equal(batch[hook], store.next_batch())


def test_the_data_begins_again_at_its_end(model: LanguageModel) -> None:
    store = ActivationsStore(model, TEXTS[:2], HOOK, **SMALL)
    first = store.get_batch_tokens(2)
    store.get_batch_tokens(2)
    with pytest.raises(StopIteration):
        store.get_batch_tokens(100, raise_at_epoch_end=True)
    assert torch.equal(store.get_batch_tokens(2), first)
    assert store.get_batch_tokens(100).shape == (100, 16)


def test_lists_of_token_ids_are_contexts_by_themselves(model: LanguageModel) -> None:
    bos = model.tokenizer.bos_token_id
    rows = [[bos, *range(10, 25)], [bos, *range(30, 45)]]
    for given in (rows, torch.tensor(rows), iter(rows), [{"tokens": row} for row in rows]):
        store = ActivationsStore(model, given, HOOK, **SMALL)
        assert store.get_batch_tokens(2).tolist() == rows


@pytest.mark.parametrize("streamed", [False, True])
def test_a_datasets_data_set_is_taken(model: LanguageModel, streamed: bool) -> None:
    rows = datasets.Dataset.from_dict({"number": list(range(60)), "text": TEXTS})
    store = ActivationsStore(model, rows.to_iterable_dataset() if streamed else rows, HOOK, **SMALL)
    assert torch.equal(store.get_batch_tokens(), ActivationsStore(model, TEXTS, HOOK, **SMALL).get_batch_tokens())


def test_a_file_is_read_and_its_column_found(model: LanguageModel, tmp_path: Path) -> None:
    bos = model.tokenizer.bos_token_id
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"input_ids": [bos, *range(n, n + 15)]}) for n in range(9))
    )
    for path in (str(tmp_path / "rows.jsonl"), tmp_path / "rows.jsonl"):
        store = ActivationsStore(model, path, HOOK, **SMALL)
        assert store.get_batch_tokens(1).tolist() == [[bos, *range(15)]]


def test_a_model_with_run_with_cache_is_taken(model: LanguageModel) -> None:
    theirs = ActivationsStore(WithCache(model), TEXTS, HOOK, **SMALL)
    assert theirs.d_in == 128
    assert torch.equal(theirs.next_batch(), ActivationsStore(model, TEXTS, HOOK, **SMALL).next_batch())
    heads = ActivationsStore(WithCache(model), TEXTS, "blocks.1.attn.hook_z", **SMALL)
    assert heads.next_batch().shape == (32, 128)


def test_a_run_s_configuration_reads_what_it_would_cache(model: LanguageModel) -> None:
    config = RunConfig(
        model=ModelConfig(hooks=[HOOK, OTHER]),
        data=DataConfig(context_size=16),
        store=StoreConfig(batch_prompts=4),
        stream=StreamConfig(hook=OTHER, batch_tokens=32, positions=[1, 9]),
    )
    store = ActivationsStore.from_config(model, config, n_batches_in_buffer=2)
    assert store.hook_names == [OTHER]
    assert store.next_batch().shape == (32, 128)
    assert len(store.get_buffer(1)) <= 4 * 9
    config.stream.max_norm = 10.0
    with pytest.raises(UserError, match=r"stream\.max_norm=10\.0 needs a store on disk"):
        ActivationsStore.from_config(model, config)


def test_an_sae_says_what_it_was_trained_on(model: LanguageModel) -> None:
    sae = saes.architecture("topk")(saes.architecture("topk").config_class(d_sae=64), 128)
    with pytest.raises(UserError, match="has no hook_name; give it"):
        ActivationsStore.from_sae(model, sae, TEXTS)
    sae.metadata = {"hook_name": HOOK, "context_size": 16, "prepend_bos": False, "hook_head_index": None}
    store = ActivationsStore.from_sae(model, sae, TEXTS, train_batch_size_tokens=32, n_batches_in_buffer=2, seed=3)
    assert store.get_batch_tokens(1)[0, 0] != model.tokenizer.bos_token_id
    assert sae.encode(store.next_batch()).shape == (32, 64)
    narrow = saes.architecture("topk")(saes.architecture("topk").config_class(d_sae=64), 64)
    narrow.metadata = sae.metadata
    with pytest.raises(UserError, match=r"d_in=64 is not the width of .* 128"):
        ActivationsStore.from_sae(model, narrow, TEXTS)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "holds no text"),
        (["short"], "fills no context"),
        ([1.5], "holds 1.5"),
        (["text", [1, 2]], "holds"),
    ],
)
def test_data_that_cannot_be_is_refused(model: LanguageModel, given: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ActivationsStore(model, given, HOOK, **SMALL).get_batch_tokens()


@pytest.mark.parametrize(
    "given",
    [{"text": TEXTS}, pandas.DataFrame({"text": TEXTS}), datasets.DatasetDict(text=datasets.Dataset.from_dict({}))],
)
def test_a_table_s_names_are_not_taken_for_its_texts(model: LanguageModel, given: Any) -> None:
    with pytest.raises(UserError, match=r"dataset=a \w+ in memory has several parts; .*dataset\['text'\]"):
        ActivationsStore(model, given, HOOK, **SMALL)


def test_an_unknown_hook_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="did you mean"):
        ActivationsStore(model, TEXTS, "blocks.2.hook_resid_pots", **SMALL)


@pytest.mark.parametrize("name", ["store_batch_size_prompts", "n_batches_in_buffer", "train_batch_size_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_that_are_none_are_refused(model: LanguageModel, name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"{name}={value} is out of range"):
        ActivationsStore(model, TEXTS, HOOK, **{**SMALL, name: value})


def test_a_device_that_is_not_there_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="device=cuda:77 is not on this machine"):
        ActivationsStore(model, ["a text"], HOOK, device="cuda:77")


def test_arguments_of_saelens_that_are_not_taken_say_what_to_do(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="ActivationsStore: hook_layer=2 is not taken; hook_name says the layer"):
        ActivationsStore(model, TEXTS, HOOK, hook_layer=2)
    with pytest.raises(UserError, match="ActivationsStore: argument=contxt_size is not known; did you mean"):
        ActivationsStore(model, TEXTS, HOOK, contxt_size=2)
    store = ActivationsStore(model, TEXTS, HOOK, **SMALL, normalize_activations="none", hook_head_index=None)
    assert repr(store) == f"ActivationsStore({HOOK} on {store.source.data.path})"
    with pytest.raises(UserError, match=r"batch_size=-1 is out of range; give at least 1"):
        store.get_batch_tokens(-1)
    with pytest.raises(UserError, match=r"seqpos_slice=\[\] is no run of positions"):
        ActivationsStore(model, TEXTS, HOOK, seqpos_slice=[])
    assert ActivationsStore(model, TEXTS, HOOK, **SMALL, dtype="bfloat16").next_batch().dtype == torch.bfloat16


def test_no_hook_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="hook_name is an empty list"):
        ActivationsStore(model, TEXTS, [], **SMALL)


def test_data_without_a_token_to_train_on_comes_to_an_end(model: LanguageModel) -> None:
    store = ActivationsStore(model, TEXTS[:3], HOOK, exclude_special_tokens=list(range(5000)), **SMALL)
    with pytest.raises(UserError, match="has no token that exclude_special_tokens and seqpos_slice leave to train on"):
        store.next_batch()
