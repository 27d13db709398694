"""Every kind of data gives the same documents, and what cannot be read is refused in one sentence."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import pytest

from saepipe.config import DataConfig
from saepipe.errors import UserError
from saepipe.sources import Source

TEXTS = [f"document {number}\nwith a second line" for number in range(300)]
ROWS = {"id": list(range(300)), "text": TEXTS, "ids": [[number % 7, 2, 3] for number in range(300)]}


def read(path: Path, **keys: object) -> list[object]:
    return [document for _, document in Source.open(DataConfig(path=str(path), **keys), seed=0).documents()]


def _txt(path: Path, rows: dict[str, list]) -> None:
    path.write_text("\n\n".join(rows["text"]), encoding="utf-8")


def _jsonl(path: Path, rows: dict[str, list]) -> None:
    lines = (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def _arrow(path: Path, rows: dict[str, list]) -> None:
    with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
        writer.write_batch(rows)
        writer.finalize()


WRITERS: dict[str, Callable[[Path, dict[str, list]], object]] = {
    "parquet": lambda path, rows: datasets.Dataset.from_dict(rows).to_parquet(path),
    "jsonl": _jsonl,
    "json": _jsonl,
    "txt": _txt,
    "arrow": _arrow,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_file_and_folder(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / f"one.{kind}", ROWS)
    assert read(tmp_path / f"one.{kind}") == TEXTS
    folder = tmp_path / "several"
    (folder / "deeper").mkdir(parents=True)
    for name, part in (("a", slice(0, 100)), ("deeper/b", slice(100, 300))):
        WRITERS[kind](folder / f"{name}.{kind}", {key: values[part] for key, values in ROWS.items()})
    (folder / "notes.md").write_text("no data")
    assert sorted(read(folder)) == sorted(TEXTS)
    if kind != "txt":
        assert read(tmp_path / f"one.{kind}", column="ids")[8] == [1, 2, 3]


def test_splits_of_a_folder_follow_its_file_names(tmp_path: Path) -> None:
    _txt(tmp_path / "train.txt", {"text": ["to train on"]})
    _txt(tmp_path / "test.txt", {"text": ["to test on"]})
    assert read(tmp_path) == ["to train on"]
    assert read(tmp_path, split="test") == ["to test on"]
    with pytest.raises(UserError, match=r"data.split=dev is not known; choose from test, train"):
        read(tmp_path, split="dev")


def test_saved_to_disk(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict(ROWS)
    saved.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == TEXTS
    datasets.DatasetDict({"train": saved, "tiny": saved.select(range(3))}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits", split="tiny") == TEXTS[:3]
    with pytest.raises(UserError, match=r"data.split=tinny is not known; did you mean tiny"):
        read(tmp_path / "splits", split="tinny")


def test_paragraphs_and_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nstill one\r\n\r\ntwo\n\n\n\n \n\nthree\n", encoding="utf-8")
    assert [str(document).strip() for document in read(tmp_path / "a.txt")] == ["one\nstill one", "two", "three"]
    _jsonl(tmp_path / "a.jsonl", {"text": ["", None, "  ", "kept"]})
    assert read(tmp_path / "a.jsonl") == ["kept"]


def test_demo_is_endless() -> None:
    source = Source.open(DataConfig(path="demo"), seed=3)
    first, second = list(islice(source.documents(), 20)), list(islice(source.documents(), 20))
    assert first == second
    assert len({text for _, text in first}) > 15
    assert first != list(islice(Source.open(DataConfig(path="demo"), seed=4).documents(), 20))


def test_side_depends_on_text_and_seed_alone() -> None:
    source = Source.open(DataConfig(path="demo", held_out=0.2), seed=0)
    sides = [source.holds_out(text) for text in TEXTS]
    assert 0.1 < sum(sides) / len(sides) < 0.3
    assert sides == [source.holds_out(text) for text in TEXTS]
    other = Source.open(DataConfig(path="demo", held_out=0.2), seed=1)
    assert sides != [other.holds_out(text) for text in TEXTS]
    wider = Source.open(DataConfig(path="demo", held_out=0.4), seed=0)
    assert all(wider.holds_out(text) for text, side in zip(TEXTS, sides, strict=True) if side)
    assert not any(Source.open(DataConfig(path="demo", held_out=0.0), seed=0).holds_out(text) for text in TEXTS)
    assert isinstance(source.holds_out([1, 2, 3]), bool)


def test_identity_notices_other_data(tmp_path: Path) -> None:
    _txt(tmp_path / "a.txt", ROWS)
    before = Source.open(DataConfig(path=str(tmp_path / "a.txt")), seed=0).identity
    _txt(tmp_path / "a.txt", {"text": TEXTS[:-1]})
    assert Source.open(DataConfig(path=str(tmp_path / "a.txt")), seed=0).identity != before
    json.dumps(before)


def test_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data.path=no.parquet does not exist; check the path"):
        read(Path("no.parquet"))
    with pytest.raises(UserError, match=r"data.path=/nowhere/data does not exist"):
        read(Path("/nowhere/data"))
    with pytest.raises(UserError, match=r"data.path=owner/absent .*hub cannot be reached"):
        read(Path("owner/absent"))
    with pytest.raises(UserError, match=r"holds no data"):
        read(tmp_path)


def test_unknown_column_and_type(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"data.column=texts is not known; did you mean text"):
        read(tmp_path / "a.jsonl", column="texts")
    with pytest.raises(UserError, match=r"data.column=id holds 0 \(int\) in row 0"):
        read(tmp_path / "a.jsonl", column="id")
    with pytest.raises(UserError, match=r"data.column=ids is not known; choose from text"):
        read(Path("demo"), column="ids")


def test_mixed_kinds(tmp_path: Path) -> None:
    _txt(tmp_path / "a.txt", ROWS)
    _jsonl(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(UserError, match=r"holds files of several kinds \(.jsonl, .txt\); keep one kind"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"no parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text": '),
        ("a.txt", b"\xff\xfe\xfa"),
        ("a.txt", b""),
        ("a.jsonl", b""),
        ("a.json", b""),
        ("a.jsonl", b'{"text": null}'),
        ("a.jsonl", b'["text"]'),
        ("a.jsonl", b'{"text": "\\ud800"}'),
        ("a.arrow", b"no arrow"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read|has no rows"):
        read(tmp_path / name)


def test_damage_further_on(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "some words " * 1000})] * 2000
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + '\n{"text": ')
    with pytest.raises(UserError, match=r"cannot be read"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "value", [5, 1.5, True, {"a": 1}, [1, None], [1, True], [1.0, 2.0], [[1], [2]], ["a"], [2**63], [2**64], [1, "a"]]
)
@pytest.mark.parametrize("before", ["some text", [1, 2], None])
def test_every_row_is_checked(tmp_path: Path, value: object, before: object) -> None:
    _jsonl(tmp_path / "a.jsonl", {"text": [before] * 150 + [value]})
    with pytest.raises(UserError, match=r"data.column=text holds .* in row 150, counted from 0; give a column"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_types_do_not_change_from_file_to_file(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / f"a.{kind}", {"text": ["5"]})
    WRITERS[kind](tmp_path / f"b.{kind}", {"text": [5]})
    with pytest.raises(UserError, match=r"data.column=text holds 5 \(int\) in row 1"):
        read(tmp_path)
    WRITERS[kind](tmp_path / f"b.{kind}", {"text": [[5]]})
    with pytest.raises(UserError, match=r"data.column=text holds \[5\] \(list\) in row 1"):
        read(tmp_path)


@pytest.mark.parametrize("rows", [{"text": [b"bytes"]}, {"text": [[1, None]]}, {"text": [[True]]}, {"text": [[0.5]]}])
def test_types_of_tables(tmp_path: Path, rows: dict[str, list]) -> None:
    WRITERS["parquet"](tmp_path / "a.parquet", rows)
    with pytest.raises(UserError, match=r"data.column=text holds .* in row 0"):
        read(tmp_path / "a.parquet")


def test_layouts_of_json(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps([{"text": "2020-01-01"}, {"text": "b"}], indent=1))
    assert read(tmp_path / "array.json") == ["2020-01-01", "b"]
    (tmp_path / "row.json").write_text(json.dumps({"text": "a"}, indent=1))
    assert read(tmp_path / "row.json") == ["a"]


def test_a_folder_is_its_files(tmp_path: Path) -> None:
    """Neither a script, nor a card, nor special characters or the number of files decide what is read."""
    folder = tmp_path / "data[1]"
    (folder / ".cache").mkdir(parents=True)
    (folder / "data[1].py").write_text("raise RuntimeError")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: b.jsonl\n---\n")
    for name, text in (("a.jsonl", "a"), ("b.JSONL", "b"), ("test.jsonl", "t"), (".cache/c.jsonl", "c")):
        _jsonl(folder / name, {"text": [text]})
    assert read(folder) == ["a", "b"]
    assert read(folder, split="test") == ["t"]
    assert read(folder / "test.jsonl") == ["t"]
    WRITERS["parquet"](tmp_path / "a[1].parquet", {"text": ["p"]})
    assert read(tmp_path / "a[1].parquet") == ["p"]


@pytest.mark.parametrize("name", ["b.csv", "c.jsonl.gz", "d.zip"])
def test_data_of_another_kind_is_not_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text\n")
    with pytest.raises(UserError, match=r"holds no data that is known; give .parquet"):
        read(tmp_path)
    _jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"holds files of several kinds \(.*.jsonl.*\); keep one kind"):
        read(tmp_path)


def test_splits_where_there_are_none(tmp_path: Path) -> None:
    _jsonl(tmp_path / "test.jsonl", {"text": ["a"]})
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "test.jsonl", tmp_path / "saved", Path("demo")):
        with pytest.raises(UserError, match=r"data.split=test is not known; choose from train"):
            read(path, split="test")


def test_keys_that_local_data_would_ignore(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", {"text": ["a"]})
    for path in (tmp_path, tmp_path / "a.jsonl", Path("demo")):
        for key in ("name", "revision"):
            with pytest.raises(
                UserError, match=rf"data.{key}=v1 is for hub data sets, and data.path=.* is local; leave"
            ):
                read(path, **{key: "v1"})
    with pytest.raises(UserError, match=r"data.path is empty; give"):
        Source.open(DataConfig(path=""), seed=0)


def test_damaged_saved_data_set(tmp_path: Path) -> None:
    for name, content in {
        "data-00000-of-00001.arrow": b"\xff\xff\xff\xff",
        "state.json": b"[]",
        "dataset_info.json": None,
        "data-00000-of-00001.arrow ": None,
    }.items():
        folder = tmp_path / name.replace(" ", "_")
        datasets.Dataset.from_dict(ROWS).save_to_disk(folder)
        file = folder / name.strip()
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=r"data.path=.* (cannot be read|holds no data)"):
            read(folder)


def test_saved_format_does_not_matter(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).with_format("numpy").save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", column="ids")[8] == [1, 2, 3]


def test_files_are_known_by_their_place_in_the_folder(tmp_path: Path) -> None:
    for name, texts in (("x/part-0.jsonl", ["a"]), ("y/part-0.jsonl", ["bb"])):
        (tmp_path / name).parent.mkdir()
        _jsonl(tmp_path / name, {"text": texts})
    source = Source.open(DataConfig(path=str(tmp_path)), seed=0)
    assert source.files == {name: (tmp_path / name).stat().st_size for name in ("x/part-0.jsonl", "y/part-0.jsonl")}


def _saved(path: Path, rows: dict[str, list]) -> None:
    datasets.Dataset.from_dict(rows).save_to_disk(path)


@pytest.mark.parametrize("kind", [*WRITERS, "saved", "demo"])
def test_beginning_at_a_row_gives_what_is_left(tmp_path: Path, kind: str) -> None:
    """Empty documents count as rows, and rows are counted over all files."""
    rows = {"text": [text if number % 9 else "" for number, text in enumerate(TEXTS)]}
    if kind in ("saved", "demo"):
        _saved(tmp_path / "data", rows)
    else:
        (tmp_path / "data").mkdir()
        for name, part in (("a", slice(0, 100)), ("b", slice(100, 300))):
            WRITERS[kind](tmp_path / "data" / f"{name}.{kind}", {"text": rows["text"][part]})
    source = Source.open(DataConfig(path="demo" if kind == "demo" else str(tmp_path / "data")), seed=0)
    whole = list(islice(source.documents(), 300))
    assert [row for row, _ in whole] == sorted({row for row, _ in whole})
    for first in (290,) if kind == "demo" else (1, 9, 10, 64, 99, 100, 101, 250, 299, 300, 1000):
        left = list(islice(source.documents(first), 300))
        expected = [item for item in whole if item[0] >= first]
        assert (left if kind != "demo" else left[: len(expected)]) == expected


def test_a_later_beginning_knows_what_the_first_document_was(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", {"text": ["text", [1, 2]]})
    source = Source.open(DataConfig(path=str(tmp_path / "a.jsonl")), seed=0)
    with pytest.raises(UserError, match=r"data.column=text holds \[1, 2\] \(list\) in row 1"):
        list(source.documents(1))


TALK = [{"role": "user", "content": "a é"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "arrow", "saved"])
def test_conversations(tmp_path: Path, kind: str) -> None:
    """Tables give every message all keys that one has."""
    named = [{**message, "tool_calls": None} for message in TALK]
    rows = {"messages": [TALK, [], named, None, [TALK[0]]] * 20}
    WRITERS.get(kind, lambda path, rows: _saved(path, rows))(tmp_path / f"a.{kind}", rows)
    found = read(tmp_path / f"a.{kind}", column="messages", chat_template="default")
    assert found == [(("user", "a é"), ("assistant", "b"))] * 2 + [(("user", "a é"),)] + found[3:]
    assert len(found) == 60


def test_conversations_of_both_spellings_are_on_the_same_side(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "b"}] for number in range(300)]
    other = [[{"from": "human", "value": f"{number}"}, {"from": "gpt", "value": "b"}] for number in range(300)]
    _jsonl(tmp_path / "a.jsonl", {"text": rows})
    _jsonl(tmp_path / "b.jsonl", {"text": other})
    sides = []
    for name in ("a", "b"):
        data = DataConfig(path=str(tmp_path / f"{name}.jsonl"), chat_template="default", held_out=0.3)
        source = Source.open(data, seed=0)
        sides.append([source.holds_out(document) for _, document in source.documents()])
    assert sides[0] == sides[1]
    assert 50 < sum(sides[0]) < 130


def test_conversations_are_checked_row_by_row(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", {"text": [TALK] * 70 + ["text"]})
    with pytest.raises(
        UserError, match=r"data.column=text, row 70 \(counted from 0\) holds 'text' \(str\), which is no"
    ):
        read(tmp_path / "a.jsonl", chat_template="default")
    with pytest.raises(UserError, match=r"data.column=text holds \[\{.* in row 0"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"data.chat_template=defautl is no file; give 'default' for"):
        read(tmp_path / "a.jsonl", chat_template="defautl")


def test_the_template_is_part_of_the_identity(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", {"text": [TALK]})
    (tmp_path / "a.jinja").touch()
    for given, kept in (("default", "default"), (str(tmp_path / "x" / ".." / "a.jinja"), str(tmp_path / "a.jinja"))):
        (tmp_path / "x").mkdir(exist_ok=True)
        source = Source.open(DataConfig(path=str(tmp_path / "a.jsonl"), chat_template=given), seed=0)
        assert source.identity["data.chat_template"] == kept
