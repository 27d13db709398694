from dataclasses import dataclass

import pytest

from saepipe.errors import UserError
from saepipe.keys import LARGEST, Group, key


@dataclass
class Kitchen(Group, group="kitchen"):
    cooks: int = key(2, least=1)
    salt_g: float | None = key(None, above=0)
    dish: str = key("soup", choices=("soup", "stew"))
    guest: str = key("Ann", filled="invite somebody")
    note: str = ""


@dataclass
class Cellar(Group, group="cellar"):
    shelf: str = key("shelf", folder=True)


@dataclass
class Bakery(Kitchen):
    dish: str = "bread"
    ovens: int = key(1, least=1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"cooks": 0}, "kitchen.cooks=0 is out of range; give a value of at least 1"),
        (
            {"cooks": LARGEST + 1},
            f"kitchen.cooks={LARGEST + 1} is no number that can be used; give one up to {LARGEST}",
        ),
        ({"salt_g": 0}, "kitchen.salt_g=0 is out of range; give a value above 0"),
        ({"salt_g": float("nan")}, f"kitchen.salt_g=nan is no number that can be used; give one up to {LARGEST}"),
        ({"dish": "stewe"}, "kitchen.dish=stewe is not known; did you mean stew?"),
        ({"cooks": "2"}, "kitchen.cooks='2' is no number; give one, without quotes"),
        ({"guest": 5}, "kitchen.guest=5 is no text; give it as a string"),
        ({"guest": " "}, "kitchen.guest is empty; invite somebody"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_sentence(values: dict, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Kitchen(**values)
    assert str(caught.value) == sentence


def test_bounds_and_none_and_keys_without_a_range_pass() -> None:
    assert Kitchen(cooks=1, salt_g=1e-9, dish="stew", guest="Bea").cooks == 1
    assert Kitchen(cooks=LARGEST, salt_g=None).salt_g is None
    assert Kitchen(note="").note == ""


def test_a_subclass_keeps_the_group_and_the_ranges_and_replaces_a_key_with_its_range() -> None:
    assert Bakery().dish == "bread"
    with pytest.raises(UserError, match=r"^kitchen\.ovens=0"):
        Bakery(ovens=0)
    with pytest.raises(UserError, match=r"^kitchen\.cooks=0"):
        Bakery(cooks=0)


def test_a_tilde_that_is_no_users_home_is_a_folders_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert Cellar("~/wine").shelf == "/home/ann/wine"
    assert Cellar("~nobody-of-this-name/wine").shelf == "~nobody-of-this-name/wine"
