import dataclasses
import re
from pathlib import Path

import pytest
from small_store import HOOKS, big, make_plan, make_tokens

from saepipe.durable import read_sealed, write_sealed
from saepipe.errors import UserError
from saepipe.plan import Plan
from saepipe.token_store import TokenStore


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_tokens(tmp_path_factory.mktemp("plan") / "tokens")


def test_golden_identity() -> None:
    # A change here makes every store that exists unreadable: raise FORMAT with it
    assert big().identity == "a1ed779ae4df1c4b78ac58ba71a8b2072c949043f203c5cd1adcecaddddc5a16"


def test_keeps_at_most_65536_held_out_rows(tokens: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_plan(tokens).held_out_contexts == 5
    monkeypatch.setattr("saepipe.plan.HELD_OUT_ROWS", 31)
    assert make_plan(tokens).held_out_rows == 24


def test_is_read_back_as_it_was_saved(tmp_path: Path, tokens: TokenStore) -> None:
    plan = make_plan(tokens, model={"name": "m", "sizes": (1, 2)}, hooks=dict(reversed(HOOKS.items())))
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert Plan.load(tmp_path).identity == plan.identity == make_plan(tokens, model=plan.model).identity


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "other"}}, "model.name is small there and other here"),
        ({"model": {"name": "small", "revision": "v2"}}, "model.revision is not set there and v2 here"),
        ({"hooks": {"a.b": 6}}, "model.hooks is ['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post'] there"),
        ({"hooks": dict.fromkeys(HOOKS, 9)}, "model (widths) is {'blocks.0.hook_resid_post': 6, "),
        ({"data": {"path": "b.txt"}}, "data.path is small.txt there and b.txt here"),
        ({"dtype": "float32"}, "store.dtype is bfloat16 there and float32 here"),
        ({"tokens": 100}, "store.tokens is 190 there and 100 here"),
        ({"seed": 6}, "store.seed is 5 there and 6 here"),
    ],
)
def test_names_the_first_key_that_differs(tokens: TokenStore, changes: dict[str, object], words: str) -> None:
    plan = make_plan(tokens)
    plan.check(make_plan(tokens), folder=Path("acts"))
    with pytest.raises(UserError, match=re.escape(f"store.dir=acts belongs to another plan: {words}")) as error:
        plan.check(make_plan(tokens, **changes), folder=Path("acts"))
    assert str(error.value).endswith("choose another store.dir")


def test_names_a_difference_that_is_no_configuration_key(tokens: TokenStore) -> None:
    plan = make_plan(tokens)
    for field, value, words in (
        ("token_store", "ab", "data (hash of the text's tokens) is "),
        ("device_kind", "cuda", "model.device (kind) is cpu there and cuda here"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            plan.check(dataclasses.replace(plan, **{field: value}), folder=Path("acts"))


@pytest.mark.parametrize(
    "hook", ["../x", "a/b", "/etc", "..", ".", "", "a..b", "a\\b", "tokens", "heldout", "plan.json"]
)
def test_a_hook_cannot_lead_out_of_the_store(hook: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.hooks: {hook!r} cannot name a folder")):
        big(hooks={hook: 4}, block_rows={hook: 16})


def test_refuses_more_tokens_than_there_are() -> None:
    with pytest.raises(UserError, match=r"store.tokens=12800001 is more than the 12800000 training tokens"):
        big(tokens=12_800_001)


def test_names_a_plan_that_is_not_there_or_of_another_version(tmp_path: Path, tokens: TokenStore) -> None:
    with pytest.raises(UserError, match=f"there is no store in store.dir={tmp_path}; make one with `python -m saepipe"):
        Plan.load(tmp_path)
    make_plan(tokens).save(tmp_path)
    document = read_sealed(tmp_path / "plan.json", cure="")
    for other in ({**document, "format": 99}, {**document, "new": 1}, {"format": 1}):
        write_sealed(tmp_path / "plan.json", other)
        with pytest.raises(
            UserError, match=rf"another version of saepipe \(format {other['format']}, and this one reads 2"
        ):
            Plan.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hooks": 5},
        {"hooks": {"a": "x"}},
        {"tokens": "x"},
        {"model": None},
        {"dtype": "int4"},
        {"block_rows": {}},
        {"context_size": 0},
    ],
)
def test_names_a_sealed_plan_that_describes_no_store(
    tmp_path: Path, tokens: TokenStore, change: dict[str, object]
) -> None:
    make_plan(tokens).save(tmp_path)
    path = tmp_path / "plan.json"
    write_sealed(path, read_sealed(path, cure="") | change)
    with pytest.raises(UserError, match=re.escape(f"{path} does not describe a store; choose another store.dir")):
        Plan.load(tmp_path)
