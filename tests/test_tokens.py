"""Documents become contexts: where each token lands, which are special, and what is refused."""

import itertools
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import small_models
from small_store import files
from transformers import PreTrainedTokenizerFast

from saepipe import tokens
from saepipe.config import DataConfig
from saepipe.errors import UserError
from saepipe.sources import Source
from saepipe.token_store import TokenStore
from saepipe.token_writer import TokenStoreWriter
from saepipe.tokens import build

BOS, EOS = 0, 1
TOKENIZER = small_models.tokenizer()
CHAT_TOKENIZER = small_models.tokenizer()
CHAT_TOKENIZER.chat_template = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }}{{ eos_token }}{% endfor %}"
)
TEXTS = [" ".join(small_models.WORDS[number % 7 : number % 7 + 3 + number % 5]) + f" {number}" for number in range(400)]


def make(
    folder: Path,
    rows: list[object],
    *,
    tokens: int,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    seed: int = 0,
    **keys: object,
) -> TokenStore:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    data = DataConfig(path=str(folder / "a.jsonl"), **{"context_size": 16, "held_out": 0.0} | keys)
    source = Source.open(data, seed=seed)
    return build(folder / "tokens", source, tokenizer, tokens=tokens, vocab_size=small_models.VOCAB)


def joined(documents: list[list[int]], separator: list[int]) -> list[int]:
    return [token for document in documents for token in document + separator]


def ids_of(texts: list[str]) -> list[list[int]]:
    return TOKENIZER(texts, add_special_tokens=False)["input_ids"]


def test_packed_contexts(tmp_path: Path) -> None:
    store = make(tmp_path, TEXTS, tokens=1001)
    assert store.train.ids.shape == (63, 16)  # whole contexts
    assert (store.train.ids[:, 0] == BOS).all()
    expected = joined(ids_of(TEXTS), [EOS])[: 63 * 15]
    assert store.train.ids[:, 1:].reshape(-1).tolist() == expected
    np.testing.assert_array_equal(store.train.special, np.isin(store.train.ids, [BOS, EOS]))
    numbers = np.repeat(np.arange(400), [len(ids) + 1 for ids in ids_of(TEXTS)])[: 63 * 15]
    assert store.train.documents[:, 1:].reshape(-1).tolist() == numbers.tolist()
    assert (store.train.documents[:, 0] == store.train.documents[:, 1]).all()
    assert store.special_ids == [BOS, EOS]
    assert len(store.heldout) == 0


def test_without_bos_and_unpacked(tmp_path: Path) -> None:
    store = make(tmp_path / "a", TEXTS, tokens=500, prepend_bos=False)
    assert store.train.ids.reshape(-1).tolist() == joined(ids_of(TEXTS), [EOS])[: len(store.train) * 16]
    store = make(tmp_path / "b", TEXTS, tokens=500, pack=False, context_size=8)
    starts = [ids[start : start + 7] for ids in ids_of(TEXTS) for start in range(0, len(ids) - 6, 7)]
    assert store.train.ids.tolist() == [[BOS, *ids] for ids in starts[: len(store.train)]]
    assert all(len(set(row)) == 1 for row in store.train.documents.tolist())


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [[BOS, *range(2, 17)], [BOS, *range(30, 45)]] * 20
    store = make(tmp_path / "a", rows, tokens=320, pack=False)
    assert store.train.ids.tolist() == rows[:20]  # the rows' own bos is not doubled
    ended = [[5, 6, 7, EOS], [8, 9]] * 50
    store = make(tmp_path / "b", ended, tokens=160)
    assert store.train.ids[0].tolist() == [BOS, 5, 6, 7, EOS, 8, 9, EOS, 5, 6, 7, EOS, 8, 9, EOS, 5]


@pytest.mark.parametrize("token", [small_models.VOCAB, -1])
def test_ids_outside_the_vocabulary(tmp_path: Path, token: int) -> None:
    with pytest.raises(UserError, match=rf"data.column=text has the token id {token}, outside .*vocabulary of 320"):
        make(tmp_path, [[2, 3, token]] * 20, tokens=16)
    assert not (tmp_path / "tokens" / "plan.json").exists()


def test_a_tokenizer_that_knows_more_than_the_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    source = Source.open(DataConfig(path=str(tmp_path / "a.txt"), context_size=4, held_out=0.0), seed=0)
    with pytest.raises(
        UserError, match=r"model.name has a tokenizer .* the id 1 to stand between documents, outside .* 1;"
    ):
        build(tmp_path / "tokens", source, TOKENIZER, tokens=4, vocab_size=EOS)
    with pytest.raises(UserError, match=r"model.name has a tokenizer .* the id 0 to begin a context, outside .* 0;"):
        build(tmp_path / "tokens", source, TOKENIZER, tokens=4, vocab_size=BOS)
    assert not (tmp_path / "tokens").exists()
    with pytest.raises(UserError, match=r"model.name has a tokenizer .* the id \d+ for some text, outside .* 2;"):
        build(tmp_path / "tokens", source, TOKENIZER, tokens=4, vocab_size=EOS + 1)


def test_sides_share_no_document(tmp_path: Path) -> None:
    store = make(tmp_path / "a", TEXTS, tokens=1000, held_out=0.3)
    assert len(store.heldout) > 5
    assert not set(store.train.documents.reshape(-1)) & set(store.heldout.documents.reshape(-1))
    source = Source.open(DataConfig(path=str(tmp_path / "a" / "a.jsonl"), held_out=0.3), seed=0)
    assert all(source.holds_out(TEXTS[number]) for number in set(store.heldout.documents.reshape(-1)))
    assert make(tmp_path / "b", TEXTS, tokens=1000, held_out=0.3, seed=1).hash != store.hash


def test_nothing_held_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, TEXTS, tokens=1000, held_out=0.001)
    assert "data.held_out=0.001 left no whole context out" in caplog.text


def test_reading_stops_when_there_is_enough(tmp_path: Path) -> None:
    data = DataConfig(path="demo", context_size=32)  # endless
    store = build(tmp_path, Source.open(data, seed=0), TOKENIZER, tokens=5000, vocab_size=small_models.VOCAB)
    assert len(store.train) == 157
    assert len(store.heldout) > 0


def test_tokenizers_without_special_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = small_models.tokenizer(bos=False, eos=False)
    with pytest.raises(UserError, match=r"data.prepend_bos=true needs .*set data.prepend_bos=false"):
        make(tmp_path / "a", TEXTS, tokens=500, tokenizer=bare)
    assert not (tmp_path / "a" / "tokens").exists()
    caplog.set_level("INFO")
    store = make(tmp_path / "b", TEXTS, tokens=500, tokenizer=bare, prepend_bos=False)
    assert "documents are joined by nothing" in caplog.text
    assert store.train.ids.reshape(-1).tolist() == joined(ids_of(TEXTS), [])[: len(store.train) * 16]
    only_bos = small_models.tokenizer(eos=False)
    store = make(tmp_path / "c", TEXTS, tokens=500, tokenizer=only_bos, prepend_bos=False)
    assert "documents are joined by its beginning-of-sequence token" in caplog.text
    assert store.train.ids.reshape(-1).tolist() == joined(ids_of(TEXTS), [BOS])[: len(store.train) * 16]


def test_too_few_tokens(tmp_path: Path) -> None:
    have = (sum(map(len, ids_of(TEXTS))) + len(TEXTS)) // 15 * 16
    with pytest.raises(UserError, match=rf"store.tokens=100000 is more than the {have} .*set store.tokens={have}"):
        make(tmp_path, TEXTS, tokens=100_000)
    assert not list((tmp_path / "tokens").iterdir())
    assert len(make(tmp_path, TEXTS, tokens=have).train) * 16 == have
    with pytest.raises(UserError, match=r"give more text or lower data.context_size, or set data.pack=true"):
        make(tmp_path / "b", TEXTS, tokens=100, context_size=60, pack=False)


def test_same_plan_is_reused_and_another_refused(tmp_path: Path) -> None:
    first = make(tmp_path, TEXTS, tokens=1000)
    modified = (tmp_path / "tokens" / "train.ids").stat().st_mtime_ns
    assert make(tmp_path, TEXTS, tokens=1000).hash == first.hash
    assert (tmp_path / "tokens" / "train.ids").stat().st_mtime_ns == modified
    for key, keys in {
        "store.tokens": {"tokens": 1016},
        "data.context_size": {"tokens": 1000, "context_size": 8},
        "model.name .tokenizer.": {"tokens": 1000, "tokenizer": small_models.tokenizer(eos=False)},
    }.items():
        with pytest.raises(UserError, match=rf"holds the tokens of another plan: {key} is .* there and"):
            make(tmp_path, TEXTS, **keys)


def test_reserved_special_tokens_count(tmp_path: Path) -> None:
    tokenizer = small_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    reserved = tokenizer.convert_tokens_to_ids("<reserved>")
    source = Source.open(DataConfig(path="demo", context_size=8), seed=0)
    store = build(tmp_path, source, tokenizer, tokens=8, vocab_size=reserved + 1)
    assert store.special_ids == [BOS, EOS, reserved]


# ---- conversations


def made_of_chat(folder: Path, rows: list[object], *, kind: str = "jsonl", **keys: object) -> TokenStore:
    folder.mkdir(exist_ok=True)
    path = folder / f"a.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_dict({"chat": rows}).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps({"chat": row}) for row in rows))
    options = {"context_size": 16, "held_out": 0.0, "column": "chat", "chat_template": "default"} | keys
    tokenizer = CHAT_TOKENIZER
    source = Source.open(DataConfig(path=str(path), **options), seed=0)
    return build(folder / "tokens", source, tokenizer, tokens=1600, vocab_size=small_models.VOCAB)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_conversations_are_packed_with_their_roles(tmp_path: Path, kind: str, prepend_bos: bool) -> None:
    rows = [talk(number) for number in range(400)]
    store = made_of_chat(tmp_path, rows, kind=kind, prepend_bos=prepend_bos)
    assert store.role_names == ["template", "user", "assistant", "guest 0"]
    ids: list[int] = []
    roles: list[str] = []
    for row in filter(None, rows):  # its own eos ends each; its own bos begins none where contexts have one
        parts = [] if prepend_bos else [("<bos>", "template")]
        for message in row:
            parts += [
                (f"<{message['role']}> ", "template"),
                (message["content"], message["role"]),
                ("<eos>", "template"),
            ]
        whole = "".join(text for text, _ in parts)
        owners = [role for text, role in parts for _ in text]
        encoded = CHAT_TOKENIZER(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        for start, stop in encoded["offset_mapping"]:
            roles.append(next((role for role in owners[start:stop] if role != "template"), "template"))
    train = store.train
    kept = slice(1, None) if prepend_bos else slice(None)
    n = train.ids[:, kept].size
    assert n > 1400
    assert train.ids[:, kept].reshape(-1).tolist() == ids[:n]
    assert train.roles is not None
    assert [store.role_names[role] for role in train.roles[:, kept].reshape(-1)] == roles[:n]
    if prepend_bos:
        assert (train.ids[:, 0] == BOS).all()
        assert (train.ids[:, 1:] != BOS).all()
        assert (train.roles[:, 0] == 0).all()
    rows_of = np.arange(train.ids.size)
    expected = train.roles.reshape(-1) == store.role_names.index("assistant")
    np.testing.assert_array_equal(train.in_roles(rows_of, ["assistant"]), expected)
    assert 0.1 < expected.mean() < 0.6
    store.verify()


def test_the_separator_is_no_ones_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        CHAT_TOKENIZER, "chat_template", "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    store = made_of_chat(tmp_path, [talk(number) for number in range(400)])
    assert store.train.roles is not None
    special = store.train.special
    assert (store.train.ids[:, 1:] == EOS).any()
    assert (store.train.roles[special] == 0).all()
    assert (store.train.roles[~special] > 0).all()


def test_another_template_is_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [talk(number) for number in range(400)]
    made_of_chat(tmp_path, rows)
    made_of_chat(tmp_path, rows)
    monkeypatch.setattr(CHAT_TOKENIZER, "chat_template", CHAT_TOKENIZER.chat_template + "\n")
    with pytest.raises(
        UserError, match=r"holds the tokens of another plan: data.chat_template \(hash of its text\) is"
    ):
        made_of_chat(tmp_path, rows)


def test_ids_of_a_template_outside_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": talk(4)}))
    data = DataConfig(path=str(tmp_path / "a.jsonl"), chat_template="default", context_size=4, held_out=0.0)
    with pytest.raises(UserError, match=r"model.name has a tokenizer .* the id \d+ for some text, outside .* 2;"):
        build(tmp_path / "tokens", Source.open(data, seed=0), CHAT_TOKENIZER, tokens=4, vocab_size=2)


# ---- killed and gone on with

# Tokenises in forked children and kills them one after the other at random moments, until one of them finishes. Most
# are given the time to save at least once, however busy the machine is, and none the time to save everything.
KILLS = """
import tqdm; tqdm.tqdm.monitor_interval = 0  # its thread may hold a lock when the process forks
import os, random, signal, sys, time
from pathlib import Path
from saepipe import tokens
from saepipe.token_writer import TokenStoreWriter
from test_tokens import resumable

folder, kind, chance = Path(sys.argv[1]), sys.argv[2], random.Random(sys.argv[2])
tokens._SAVE_EVERY_S, tokens._CHUNK_CHARACTERS = 0, {"ids": 1000, "demo": 2000}.get(kind, 4000)
resumable(folder / "undisturbed", kind)  # imports what the children need
save = TokenStoreWriter.save
TokenStoreWriter.save = lambda self, state: (save(self, state), time.sleep(0.05))

def saved():
    try:
        return (folder / "killed" / "tokens" / "partial" / "progress.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None

for n in range(300):
    before = saved()
    child = os.fork()
    if not child:
        store = resumable(folder / "killed", kind)
        os._exit(0 if store.train.ids.size else 1)
    ended = 0
    while n % 4 and not ended and saved() == before:
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        time.sleep(chance.random() * 0.1)
        ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        assert status == 0
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(n)
"""


def resumable(folder: Path, kind: str) -> TokenStore:
    """Tokenise text, ids or the demo's corpus; some rows are empty, some documents longer than a chunk."""
    rows: list[object] = [None if number % 11 == 0 else text * (number % 50) for number, text in enumerate(TEXTS * 10)]
    if kind == "ids":
        rows = [[] if number % 11 == 0 else [5 + number % 300] * (number % 100) for number in range(4000)]
    if kind == "chat":
        rows = [talk(number) for number in range(3000)]
    path = folder.parent / f"{kind if kind in ('ids', 'chat') else 'text'}.jsonl"
    if not path.exists():
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    keys = {"context_size": 16, "held_out": 0.2, "pack": kind != "unpacked"}
    keys |= {"chat_template": "default"} if kind == "chat" else {}
    source = Source.open(DataConfig(path="demo" if kind == "demo" else str(path), **keys), seed=0)
    wanted = 30_000 if kind == "demo" else 80_000
    return build(folder / "tokens", source, CHAT_TOKENIZER, tokens=wanted, vocab_size=small_models.VOCAB)


def talk(number: int) -> list[dict[str, str]]:
    """Write a conversation of some messages; the later ones bring roles that those before did not have."""
    roles = ["user", "assistant", "user", f"guest {number // 500}"]
    return [
        {"role": role, "content": f"{TEXTS[(number + turn) % 400]} é" if (number + turn) % 6 else ""}
        for turn, role in enumerate(roles[: number % 5])
    ]


@pytest.mark.parametrize(
    "kind", ["text", *(pytest.param(kind, marks=pytest.mark.prove) for kind in ("chat", "ids", "unpacked", "demo"))]
)
def test_sigkill_again_and_again_changes_no_byte(tmp_path: Path, kind: str) -> None:
    kills = run_script(KILLS, tmp_path, kind)
    print(f"{kills} kills")
    assert kills >= 3, "the work is done before anybody can disturb it"
    assert files(tmp_path / "killed" / "tokens") == files(tmp_path / "undisturbed" / "tokens")


def run_script(script: str, folder: Path, kind: str) -> int:
    """Run one of the scripts that fork, and return the number that it prints."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


# Kills a child before the n-th thing that it does to the disk, for every n, and lets another one finish.
STEPS = """
import tqdm; tqdm.tqdm.monitor_interval = 0  # its thread may hold a lock when the process forks
import os, shutil, sys
from pathlib import Path
from small_store import files, kill_before_step
from saepipe import durable, tokens
from saepipe.token_writer import TokenStoreWriter
from test_tokens import resumable

tokens._SAVE_EVERY_S, tokens._CHUNK_CHARACTERS = 0, 60000
root, kind = Path(sys.argv[1]), sys.argv[2]
os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote: no need to wait

def die(n):
    moved = [(Path, "replace"), (Path, "unlink"), (Path, "mkdir")]
    disk = [(os, "fsync"), (os, "unlink"), (os, "rmdir"), (durable, "temporary"), (TokenStoreWriter, "append")]
    kill_before_step(n, *moved, *disk)
    resumable(root / "killed", kind)

expected = files(resumable(root / "undisturbed", kind).folder)
for n in range(1, 1000):
    child = os.fork()
    if not child:
        die(n)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break
    assert files(resumable(root / "killed", kind).folder) == expected, n
    shutil.rmtree(root / "killed")
print(n)
"""


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_sigkill_before_every_step_changes_no_byte(tmp_path: Path, kind: str) -> None:
    assert run_script(STEPS, tmp_path, kind) > 50


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, *, after: int, error: BaseException) -> None:
    """End with an error while a chunk is written."""
    append, calls = TokenStoreWriter.append, itertools.count()

    def failing(*arguments: object) -> None:
        append(*arguments)
        if next(calls) == after:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_SAVE_EVERY_S", 0)
        patch.setattr(tokens, "_CHUNK_CHARACTERS", 5000)
        patch.setattr(TokenStoreWriter, "append", failing)
        with pytest.raises(type(error)):
            resumable(folder, kind)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), UserError("a bad row")])
def test_goes_on_after_an_error_where_it_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    monkeypatch.setattr(tokens, "_CHUNK_CHARACTERS", 5000)
    interrupted(monkeypatch, tmp_path / "a", "text", after=21, error=error)
    assert [path.name for path in (tmp_path / "a" / "tokens").iterdir()] == ["partial"]
    caplog.set_level(logging.INFO)
    read = []
    documents = Source.documents
    monkeypatch.setattr(Source, "documents", lambda self, first=0: read.append(first) or documents(self, first))
    resumable(tmp_path / "a", "text")
    done = re.search(r"resuming at ([\d,]+) of 80,000 tokens", caplog.text)
    assert done is not None
    assert int(done[1].replace(",", "")) > 2000
    assert read[0] == 0  # the first document, when the source is opened
    assert read[1] > 20
    resumable(tmp_path / "b", "text")
    assert files(tmp_path / "a" / "tokens") == files(tmp_path / "b" / "tokens")


def test_a_changed_configuration_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokens, "_CHUNK_CHARACTERS", 5000)
    interrupted(monkeypatch, tmp_path / "a", "text", after=21, error=KeyboardInterrupt())
    resumable(tmp_path / "a", "unpacked")
    assert "of another plan (data.pack differs), so tokenising starts over" in caplog.text
    resumable(tmp_path / "b", "unpacked")
    assert files(tmp_path / "a" / "tokens") == files(tmp_path / "b" / "tokens")


def test_what_is_left_beside_a_finished_store_goes(tmp_path: Path) -> None:
    """A run may be killed between its last two steps."""
    resumable(tmp_path, "text")
    before = files(tmp_path / "tokens")
    (tmp_path / "tokens" / "partial").mkdir()
    (tmp_path / "tokens" / "partial" / "progress.json").write_text("{}")
    resumable(tmp_path, "text")
    assert files(tmp_path / "tokens") == before


def test_too_few_tokens_leave_nothing_though_some_were_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_SAVE_EVERY_S", 0)
    monkeypatch.setattr(tokens, "_CHUNK_CHARACTERS", 1000)
    with pytest.raises(UserError, match=r"store.tokens=100000 is more than"):
        make(tmp_path, TEXTS, tokens=100_000)
    assert not list((tmp_path / "tokens").iterdir())


def test_a_full_disk_that_grows(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_SAVE_EVERY_S", 0)
    monkeypatch.setattr(tokens, "_CHUNK_CHARACTERS", 1000)
    expected = files(resumable(tmp_path / "a", "ids").folder)
    (tmp_path / "store").symlink_to(small_disk)
    states: list[dict[str, object] | None] = []
    go_on = tokens.Reading.go_on
    monkeypatch.setattr(
        tokens.Reading,
        "go_on",
        lambda self, writer, wanted: states.append(writer.state) or go_on(self, writer, wanted),
    )
    for size_kb in range(8, 4000, 200):
        subprocess.run(["mount", "-o", f"remount,size={size_kb}k", str(small_disk)], check=True)
        try:
            resumable(tmp_path / "store", "ids")
            break
        except UserError as error:
            said = str(error)
        assert said.startswith(f"store.dir={tmp_path / 'store'} has no space left on its disk")
    rows = [state["row"] if state else 0 for state in states]
    assert len(set(rows)) > 3
    assert rows == sorted(rows)
    assert files(small_disk / "tokens") == expected
