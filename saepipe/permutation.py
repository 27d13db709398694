"""A keyed shuffle of `range(n)` that is computed index by index, so that nothing has to be stored or replayed.

The definition, in full, so that another language reproduces it (all arithmetic is unsigned, modulo 2**64; `>>` is a
logical shift; G = 0x9E3779B97F4A7C15, A = 0xBF58476D1CE4E5B9, B = 0x94D049BB133111EB are splitmix64's constants):

1. Round keys: k[r] = mix(key + (r + 1) * G) for r = 0 ... 5, where mix is splitmix64's finaliser:
   z = (z ^ z >> 30) * A;  z = (z ^ z >> 27) * B;  mix = z ^ z >> 31.
2. Let a = ceil(sqrt(n)) and b = ceil(n / a). An index x splits into L = x // b (0 to a - 1) and R = x % b.
3. Six Feistel rounds. f(x, r, m) spreads x over 0 to m - 1:
   z = (x + k[r]) * A;  z = (z ^ z >> 32) * B;  f = (z >> 32) * m >> 32.
   Even r: L = (L + f(R, r, a)) % a. Odd r: R = (R + f(L, r, b)) % b. The result is L * b + R.
4. Cycle walking: while the result is n or more, step 3 is applied to it again (rare: a * b exceeds n by less than a).

A family. `member` t of the permutations of one key has every round key increased by mix((t + 1) * G); each index of a
call may go through a member of its own, which is how thousands of small shuffles cost one call.

Each round can be undone, so step 3 is a bijection of range(a * b), and step 4 makes it one of range(n). It is a
shuffle, not a cipher. NumPy's own generators are not used because it does not promise their streams across versions.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

MAX_SIZE = 2**40
_ROUNDS = 6
_WORD = 2**64
_GOLDEN, _A, _B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Indices per pass: the buffers stay in a core's L2 cache, which makes a million indices up to twice as fast.
_CHUNK = 16_384


def derive_key(*parts: str | int) -> int:
    """Hash names and numbers to a 64-bit key.

    The key is the first 8 bytes, little-endian, of the SHA-256 of the parts one after the other, each written as
    `s` or `i`, its length in bytes, `:`, its UTF-8 text (a number in decimal) and `,`. So no two lists of parts
    share an encoding.
    """
    encoded = b""
    for part in parts:
        assert type(part) in (str, int), f"a key is made of str and int, not {type(part).__name__}"
        text = str(part).encode()
        encoded += b"%s%d:%s," % (b"s" if isinstance(part, str) else b"i", len(text), text)
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "little")


class Permutation:
    """A bijection of `range(n)` that the key picks.

    Args:
        key: 64-bit key, from `derive_key`.
        n: Size of the range, 1 to 2**40.
    """

    def __init__(self, key: int, n: int) -> None:
        assert 1 <= n <= MAX_SIZE, f"n={n} is not from 1 to 2**40"
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._round_keys = [_mix((key + (r + 1) * _GOLDEN) % _WORD) for r in range(_ROUNDS)]

    def __call__(
        self, indices: npt.NDArray[np.int64], member: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """Map indices in `range(n)`, of any shape, to their images.

        Args:
            indices: What to map.
            member: Which permutation of the key's family maps each index (same shape); None is the key's own.
        """
        flat = np.ascontiguousarray(indices, dtype=np.int64).reshape(-1)
        assert flat.size == 0 or (flat.min() >= 0 and flat.max() < self.n), f"indices outside range({self.n})"
        images = flat.astype(np.uint64)
        offsets = None if member is None else _mixed(np.asarray(member, np.int64).reshape(-1))
        for start in range(0, images.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            self._feistel(images[chunk], None if offsets is None else offsets[chunk])
        outside = np.flatnonzero(images >= self.n)
        while outside.size:
            walking = images[outside]
            self._feistel(walking, None if offsets is None else offsets[outside])
            images[outside] = walking
            outside = outside[walking >= self.n]
        return images.view(np.int64).reshape(np.shape(indices))

    def _feistel(self, values: npt.NDArray[np.uint64], offsets: npt.NDArray[np.uint64] | None) -> None:
        """Replace values by their images under the six rounds, with `offsets` added to the round keys."""
        a, b, half = np.uint64(self._a), np.uint64(self._b), np.uint64(32)
        left = values // b
        right = values - left * b
        work, shifted = np.empty_like(values), np.empty_like(values)
        for r, key in enumerate(self._round_keys):
            source, target, modulus = (right, left, a) if r % 2 == 0 else (left, right, b)
            np.add(source, np.uint64(key), out=work)
            if offsets is not None:
                np.add(work, offsets, out=work)
            np.multiply(work, np.uint64(_A), out=work)
            np.right_shift(work, half, out=shifted)
            np.bitwise_xor(work, shifted, out=work)
            np.multiply(work, np.uint64(_B), out=work)
            np.right_shift(work, half, out=work)
            np.multiply(work, modulus, out=work)
            np.right_shift(work, half, out=work)
            np.add(target, work, out=target)
            # target % modulus without a division: below the modulus, the difference wraps to a huge number.
            np.subtract(target, modulus, out=work)
            np.minimum(target, work, out=target)
        np.multiply(left, b, out=left)
        np.add(left, right, out=values)


def _mixed(members: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """`_mix` of (t + 1) * G for the number t of each member."""
    z = (members.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ z >> np.uint64(30)) * np.uint64(_A)
    z = (z ^ z >> np.uint64(27)) * np.uint64(_B)
    return z ^ z >> np.uint64(31)


def _mix(z: int) -> int:
    """splitmix64's finaliser."""
    z = (z ^ z >> 30) * _A % _WORD
    z = (z ^ z >> 27) * _B % _WORD
    return z ^ z >> 31
