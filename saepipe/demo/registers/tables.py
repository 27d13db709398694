"""JSON and CSV data: one schema per document, the totals of the tables right."""

from __future__ import annotations

from saepipe.demo.grammar import Writer
from saepipe.demo.lexicon import LEXICON

FIELDS = {
    "name": ("woman", "man"),
    "city": ("city",),
    "country": ("country",),
    "animal": ("animal",),
    "food": ("food",),
    "colour": ("colour",),
    "job": ("profession",),
    "month": ("month",),
    "surname": ("surname",),
    "weekday": ("weekday",),
}
"""What a text field holds: the lexicon's symbols."""

LABEL_OF_FIELD = {
    "name": "entity:person",
    "surname": "entity:person",
    "city": "entity:place",
    "country": "entity:place",
    "animal": "entity:animal",
    "food": "entity:food",
    "colour": "colour",
    "job": "entity:profession",
    "month": "entity:date",
    "weekday": "entity:date",
}
NUMBER_FIELDS = {"id": (1, 999), "year": (1900, 2025), "age": (18, 90), "price": (1, 200), "count": (1, 50),
                 "score": (0, 100), "weight": (2, 120), "stock": (0, 80)}  # fmt: skip
SUMMABLE = tuple(NUMBER_FIELDS)[2:]
COLLECTIONS = ("users", "orders", "items", "pets", "guests", "members", "products", "visits", "results", "stations")


def _text_value(writer: Writer, field: str) -> tuple[str, str]:
    return writer.pick(LEXICON.words(writer.pick(FIELDS[field]))), LABEL_OF_FIELD[field]


def json(writer: Writer) -> None:
    """An object with a list of records of the same keys; `total` counts them."""
    keys = writer.sample((*FIELDS, *NUMBER_FIELDS, "active"), writer.integer(3, 5))
    records = writer.integer(3, 7)
    writer.add("{\n  ")
    _key(writer, writer.pick(COLLECTIONS))
    writer.add("[\n")
    for record in range(records):
        writer.add("    {")
        for position, key in enumerate(keys):
            if position:
                writer.add(", ")
            _key(writer, key)
            _json_value(writer, key)
        writer.add("},\n" if record < records - 1 else "}\n")
    writer.add("  ],\n  ")
    _key(writer, "total")
    writer.add(str(records), "json:number")
    writer.add("\n}\n")


def _key(writer: Writer, key: str) -> None:
    writer.add(f'"{key}"', "json:key")
    writer.add(": ")


def _json_value(writer: Writer, key: str) -> None:
    if key in FIELDS:
        text, label = _text_value(writer, key)
        writer.add('"')
        writer.add(text, "json:string", label)
        writer.add('"')
    elif key == "active":
        writer.add(writer.pick(("true", "false", "null")), "json:literal")
    else:
        writer.add(str(writer.integer(*NUMBER_FIELDS[key])), "json:number")


def csv(writer: Writer) -> None:
    """A header, rows of the same columns, and a row of sums."""
    columns = writer.sample(tuple(FIELDS), writer.integer(2, 3))
    numbers = writer.sample(SUMMABLE, writer.integer(1, 2))
    separator = writer.pick((",", ";", "\t", ","))
    writer.add(separator.join((*columns, *numbers)), "csv:header")
    writer.add("\n")
    totals = [0] * len(numbers)
    for _ in range(writer.integer(8, 16)):
        for column in columns:
            text, label = _text_value(writer, column)
            writer.add(text, "csv:cell", label)
            writer.add(separator)
        values = [writer.integer(*NUMBER_FIELDS[number]) for number in numbers]
        totals = [total + value for total, value in zip(totals, values, strict=True)]
        _number_cells(writer, values, separator, "csv:number")
    writer.add("total" + separator * len(columns))
    _number_cells(writer, totals, separator, "csv:total")


def _number_cells(writer: Writer, values: list[int], separator: str, label: str) -> None:
    for position, value in enumerate(values):
        if position:
            writer.add(separator)
        writer.add(str(value), label)
    writer.add("\n")
