import numpy as np
import pytest

from saepipe.permutation import Permutation, derive_key


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_is_a_bijection_of_every_small_range(key: int) -> None:
    for n in range(1, 301):
        assert np.array_equal(np.sort(Permutation(key, n)(np.arange(n))), np.arange(n)), n


def test_is_a_bijection_of_a_range_of_several_passes() -> None:
    n = 100_003
    assert np.array_equal(np.sort(Permutation(7, n)(np.arange(n))), np.arange(n))


@pytest.mark.parametrize("n", [2**20 + 1, 2**31 - 1, 2**31 + 11, 10**12 + 39, 2**40])
def test_large_ranges_are_injective_where_sampled(n: int) -> None:
    ends = np.concatenate([np.arange(30_000), n - 1 - np.arange(30_000)])
    random = np.random.default_rng(0).integers(0, n, 40_000)
    indices = np.unique(np.concatenate([ends, random]))
    images = Permutation(3, n)(indices)
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(indices)


def reference(key: int, n: int, index: int) -> int:
    """The definition in the module's docstring, written again with Python's own integers."""
    word, golden, a64, b64 = 2**64, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * a64 % word
        z = (z ^ (z >> 27)) * b64 % word
        return z ^ (z >> 31)

    def f(x: int, r: int, m: int) -> int:
        z = (x + mix((key + (r + 1) * golden) % word)) % word * a64 % word
        z = (z ^ (z >> 32)) * b64 % word
        return ((z >> 32) * m) >> 32

    a = next(root for root in range(n + 1) if root * root >= n)
    b = -(-n // a)
    while True:
        left, right = divmod(index, b)
        for r in range(6):
            if r % 2 == 0:
                left = (left + f(right, r, a)) % a
            else:
                right = (right + f(left, r, b)) % b
        index = left * b + right
        if index < n:
            return index


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 1000, 65_537])
def test_follows_the_written_definition(n: int) -> None:
    key = derive_key("definition", n)
    indices = range(0, n, max(1, n // 100))
    assert Permutation(key, n)(np.array(indices)).tolist() == [reference(key, n, index) for index in indices]


def test_golden_values() -> None:
    """Stores and checkpoints depend on these: they never change."""
    assert derive_key() == 0x141CFC9842C4B0E3
    assert derive_key("rows", 12, -3) == 0x98BFE9A047504E1A
    assert Permutation(0, 10)(np.arange(10)).tolist() == [8, 1, 4, 7, 0, 3, 5, 2, 9, 6]
    assert Permutation(derive_key("golden"), 10**6)(np.arange(6)).tolist() == [
        467062,
        485335,
        116383,
        410546,
        680941,
        244589,
    ]
    assert Permutation(derive_key("golden"), 2**40)(np.array([0, 1, 2**40 - 1])).tolist() == [
        579235624444,
        548765536055,
        392977847542,
    ]


def test_keys_of_different_parts_differ() -> None:
    lists: list[tuple[str | int, ...]] = [
        ("a",),
        ("a", ""),
        ("", "a"),
        ("a", "b"),
        ("ab",),
        ("1",),
        (1,),
        (-1,),
        (1, 1),
        (11,),
    ]
    assert len({derive_key(*parts) for parts in lists}) == len(lists)
    assert derive_key("é") != derive_key("e")


def test_keeps_the_shape_and_takes_no_index_outside() -> None:
    shuffle = Permutation(1, 12)
    square = np.arange(12).reshape(3, 4)
    assert np.array_equal(shuffle(square), shuffle(square.reshape(-1)).reshape(3, 4))
    assert shuffle(np.arange(0)).shape == (0,)
    with pytest.raises(AssertionError):
        shuffle(np.array([12]))


def test_the_input_stays_as_it_is() -> None:
    indices = np.arange(100)
    Permutation(1, 100)(indices)
    assert np.array_equal(indices, np.arange(100))


@pytest.mark.parametrize("n", [1000, 21_845])
def test_has_no_obvious_order(n: int) -> None:
    """Correlations stay within five standard deviations (1 / sqrt(n)) of none."""
    bound = 5 / n**0.5
    for key in range(20):
        images = Permutation(derive_key("order", key), n)(np.arange(n))
        for lag in (1, 2, 64, round(n**0.5)):
            assert abs(np.corrcoef(images[:-lag], images[lag:])[0, 1]) < bound
        assert abs(np.corrcoef(images, np.arange(n))[0, 1]) < bound
        assert (np.diff(images) == 1).sum() <= 10  # a random permutation has 1 on average


def test_every_index_goes_everywhere() -> None:
    """Over many keys, each of 20 stretches of indices reaches each of 20 stretches of images equally often."""
    n, stretches, keys = 1000, 20, 500
    counts = np.zeros((stretches, stretches))
    places = np.arange(n) * stretches // n
    for key in range(keys):
        np.add.at(counts, (places, places[Permutation(derive_key("everywhere", key), n)(np.arange(n))]), 1)
    expected = n * keys / stretches**2
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    degrees = (stretches - 1) ** 2
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


def test_keys_give_unrelated_orders() -> None:
    n = 1000
    orders = [Permutation(key, n)(np.arange(n)) for key in range(20)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).sum() <= 10  # 1 on average
