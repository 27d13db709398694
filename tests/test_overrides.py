"""What people type and what Hydra's grammar is given for it; whole commands are in tests/test_entry.py."""

import pytest

from saepipe.overrides import arguments, parsed, quoted


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("sae.k=16", "sae.k=16"),
        ("sae.k=8,16", "sae.k=8,16"),  # a sweep
        ("run.dir=runs/x/sae.k=16", "run.dir='runs/x/sae.k=16'"),
        ("run.dir=[runs/x,runs/sae.k=16]", "run.dir=[runs/x,'runs/sae.k=16']"),
        ("steer.prompt=def add(a, b):", "steer.prompt='def add(a, b):'"),
        ("optim.lr=interval(1,2)", "optim.lr=interval(1,2)"),
        ("grid.k=[8,16]", "++grid.k=[8,16]"),
        ("~logger", "~logger"),
    ],
)
def test_a_value_that_the_grammar_would_trip_over_is_quoted(typed: str, given: str) -> None:
    assert quoted(typed) == given


def test_flags_come_first() -> None:
    assert arguments(["sae.k=8", "-m", "run.dir=a=b", "--help"]) == ["-m", "--help", "sae.k=8", "run.dir='a=b'"]


def test_what_is_parsed_has_the_value_that_was_typed() -> None:
    (prompt, k) = parsed(["steer.prompt=f(x)", "sae.k=8,16"])
    assert prompt.value() == "f(x)"
    assert k.is_sweep_override()
