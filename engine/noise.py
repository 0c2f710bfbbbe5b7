"""Gaussian noise with the same bits on every machine: the specification `philox-bm24-v1`.

Philox4x32-10 (Salmon et al. 2011). Key: the low and high 32 bits of the image's seed. Counter:
(block, step, repeat, stream); block = element index // 4 in C order over (C, H, W). The four words
w0 … w3 make the normals of elements 4·block … 4·block + 3 by two Box-Muller pairs, (w0, w1) and (w2, w3):

    u1 = ((w0 >> 8) + 1)·2^-24      r = sqrt(-2 ln u1)
    u2 = (w1 >> 8)·2^-24            z = (r cos 2πu2, r sin 2πu2)

The logarithm and the sine are fixed sequences of IEEE float32 operations, each rounded by itself (no
fused multiply-add), so that NumPy, a CUDA kernel, C++ and an ONNX graph agree bit for bit. In their
notation every `·`, `+`, `-` is one rounded float32 operation, evaluated left to right, with Horner's rule
for polynomials; operations said to be exact round nothing.

ln u1, from the integer k = (w0 >> 8) + 1 in [1, 2^24]:
    k = m·2^e with m in [46341/65536, 2·46341/65536) or so: e = floor(log2(k / 11863283)) + 24 in exact
        integer terms, that is m·2^24 >= 11863283 > m·2^23; m is exact in float32
    x = m - 1 (exact)     z = x·x
    y = L7;  y = y·x + L6;  …  y = y·x + L0;     y = y·x;  y = y·z
    E = e - 24 (exact)    y = y + E·LN2_LOW;  y = y - 0.5·z
    ln u1 = (x + y) + E·LN2_HIGH
r = sqrt(-2·ln u1), correctly rounded.

cos and sin of 2πu2, from the integer j = w1 >> 8:
    q = (j + 2^21) >> 22 quarter turns,  i = j - (q << 22) in [-2^21, 2^21)
    θ = i·TURN_HIGH (exact);  θ = θ + i·TURN_LOW;     t = θ·θ
    s = S2;  s = s·t + S1;  s = s·t + S0;  s = s·t;  s = s·θ;  s = s + θ
    c = C2;  c = c·t + C1;  c = c·t + C0;  c = c·t;  c = c·t;  c = c - 0.5·t;  c = c + 1
    q mod 4 = 0: (cos, sin) = (c, s)    1: (-s, c)    2: (-c, -s)    3: (s, -c)
z = (cos·r, sin·r).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdedit.errors import OptionError

SPECIFICATION = "philox-bm24-v1"
STREAM_STATE = 0  # the noise of x
STREAM_MASK = 1  # the noise of the mask composite

_U64 = np.uint64
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], _U64)  # of counter words 0 and 2
_KEY_BUMPS = np.array([[0xBB67AE85], [0x9E3779B9]], _U64)  # of the key's high and low word
_WORD = _U64(0xFFFFFFFF)

# Minimax polynomials: (ln(1+x) - x + x²/2)/x³ on [√½-1, √2-1]; (sin θ - θ)/θ³ and (cos θ - 1 + θ²/2)/θ⁴
# in θ² on [0, π/4].
_LN = np.array(
    [0.33333331, -0.2500082, 0.20001227, -0.16623357, 0.14201757, -0.13160184, 0.12761582, -0.076344974], np.float32
)
_SIN = np.array([-0.16666655, 0.00833216, -0.00019515282], np.float32)
_COS = np.array([0.041666646, -0.0013887316, 2.4433157e-05], np.float32)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_TURN_HIGH = np.float32(6 / 2**24)  # 2π/2^24 in two parts: a 22-bit integer times the first is exact
_TURN_LOW = np.float32((2 * np.pi - 6) / 2**24)
_HALF_ROOT = np.int32(0x3F3504F3)  # the float32 nearest √½, as bits

_BLOCKS_AT_ONCE = 4096  # scratch of a few hundred KB: stays in a core's cache


class NoiseSource(Protocol):
    """What the loop draws from. Anything callable like this may stand in, for tests or other generators."""

    def __call__(self, step: int, repeat: int, stream: int) -> NDArray[np.floating]:
        """Standard normals (B, C, H, W) for one use; may return the same buffer every time."""
        ...


class Noise:
    """The specified noise of a batch: image i has key seeds[i], whatever else is in the batch.

    seeds: B integers in [0, 2^64). shape: (C, H, W) of the full model frame. Not thread-safe.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        for seed in seeds:
            if not 0 <= seed < 2**64:
                raise OptionError(f"seed is {seed}; wanted a whole number in [0, 2^64)", hint="try 0")
        self._seeds = [int(seed) for seed in seeds]
        blocks = -(-int(np.prod(shape)) // 4)
        self._padded = np.empty((len(seeds), blocks * 4), np.float32)
        self._out = self._padded[:, : int(np.prod(shape))].reshape(len(seeds), *shape)
        self._chunks = [
            (start, _Chunk(min(_BLOCKS_AT_ONCE, blocks - start))) for start in range(0, blocks, _BLOCKS_AT_ONCE)
        ]

    def __call__(self, step: int, repeat: int, stream: int) -> NDArray[np.float32]:
        """Standard normals (B, C, H, W) float32. The buffer is reused by the next call."""
        for seed, row in zip(self._seeds, self._padded, strict=True):
            for start, chunk in self._chunks:
                chunk.fill(row[4 * start : 4 * (start + chunk.blocks)], seed, (start, step, repeat, stream))
        if not np.shares_memory(self._out, self._padded):  # a padded last block: not a view
            self._out[...] = self._padded[:, : self._out[0].size].reshape(self._out.shape)
        return self._out


def philox4x32(counter: Sequence[int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10: counter of four words, key of two -> four words of 32 bits."""
    chunk = _Chunk(1)
    even, odd = chunk.words(key[0] | key[1] << 32, (counter[0], counter[1], counter[2], counter[3]))
    words = (even[0, 0], odd[0, 0], even[1, 0], odd[1, 0])
    return tuple(int(word) & 0xFFFFFFFF for word in words)  # type: ignore[return-value]


class _Chunk:
    """Scratch for `blocks` consecutive counters, so that drawing allocates nothing."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._index = np.arange(blocks, dtype=_U64)
        self._even = np.empty((2, blocks), _U64)  # counter words 0 and 2
        self._products = [np.empty((2, blocks), _U64) for _ in range(2)]
        self._k = np.empty((2, blocks), np.int32)
        self._j = np.empty((2, blocks), np.int32)
        self._i = np.empty((2, blocks), np.int32)
        self._q = np.empty((2, blocks), np.int32)
        self._x, self._y, self._z = (np.empty((2, blocks), np.float32) for _ in range(3))
        self._turn = np.empty((2, 2, blocks), np.float32)

    def words(self, seed: int, counter: tuple[int, int, int, int]) -> tuple[NDArray[_U64], NDArray[_U64]]:
        """Words (0, 2) and words (1, 3) of the blocks from counter[0] on; the latter with dirty high halves."""
        even, product, spare = self._even, *self._products
        np.add(self._index, _U64(counter[0]), out=even[0])
        even[1] = counter[2]
        odd = np.array([[counter[1]], [counter[3]]], _U64)
        key = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], _U64)
        for _ in range(10):
            np.multiply(even, _MULTIPLIERS, out=product)
            crossed = product[::-1]  # word 0 takes word 2's product, and the reverse
            np.right_shift(crossed, _U64(32), out=even)
            np.bitwise_xor(even, odd, out=even)
            np.bitwise_xor(even, key, out=even)
            np.bitwise_and(even, _WORD, out=even)
            odd = crossed
            product, spare = spare, product
            key = (key + _KEY_BUMPS[::-1]) & _WORD
        return even, odd

    def fill(self, out: NDArray[np.float32], seed: int, counter: tuple[int, int, int, int]) -> None:
        """Write 4·blocks standard normals to `out`."""
        even, odd = self.words(seed, counter)
        spare = self._products[0] if odd.base is self._products[1] else self._products[1]
        np.right_shift(even, _U64(8), out=even)
        np.add(even, _U64(1), out=self._k, casting="unsafe", dtype=_U64)
        np.right_shift(odd, _U64(8), out=spare)
        np.bitwise_and(spare, _U64(0xFFFFFF), out=self._j, casting="unsafe", dtype=_U64)

        radius = self._radius()
        q, i = self._q, self._i
        np.add(self._j, 1 << 21, out=q)
        np.right_shift(q, 22, out=q)
        np.left_shift(q, 22, out=i)
        np.subtract(self._j, i, out=i)

        angle, t = self._y, self._z
        cosine, sine = self._turn
        np.multiply(i, _TURN_LOW, out=t, dtype=np.float32, casting="unsafe")
        np.multiply(i, _TURN_HIGH, out=angle, dtype=np.float32, casting="unsafe")
        np.add(angle, t, out=angle)
        np.multiply(angle, angle, out=t)
        np.multiply(t, _SIN[2], out=sine)
        np.add(sine, _SIN[1], out=sine)
        np.multiply(sine, t, out=sine)
        np.add(sine, _SIN[0], out=sine)
        np.multiply(sine, t, out=sine)
        np.multiply(sine, angle, out=sine)
        np.add(sine, angle, out=sine)
        np.multiply(t, _COS[2], out=cosine)
        np.add(cosine, _COS[1], out=cosine)
        np.multiply(cosine, t, out=cosine)
        np.add(cosine, _COS[0], out=cosine)
        np.multiply(cosine, t, out=cosine)
        np.multiply(cosine, t, out=cosine)
        np.multiply(t, np.float32(0.5), out=t)
        np.subtract(cosine, t, out=cosine)
        np.add(cosine, np.float32(1), out=cosine)

        bits = self._turn.view(np.int32)
        np.bitwise_xor(bits[0], bits[1], out=i)  # swap cosine and sine where q is odd
        np.left_shift(q, 31, out=self._j)
        np.right_shift(self._j, 31, out=self._j)
        np.bitwise_and(i, self._j, out=i)
        np.bitwise_xor(bits, i, out=bits)
        np.bitwise_and(q, 2, out=i)  # the signs: sine's in quarters 2 and 3, cosine's in 1 and 2
        np.left_shift(i, 30, out=i)
        np.bitwise_xor(bits[1], i, out=bits[1])
        np.add(q, 1, out=q)
        np.bitwise_and(q, 2, out=i)
        np.left_shift(i, 30, out=i)
        np.bitwise_xor(bits[0], i, out=bits[0])
        np.multiply(self._turn, radius, out=out.reshape(self.blocks, 2, 2).transpose(2, 1, 0))

    def _radius(self) -> NDArray[np.float32]:
        """sqrt(-2 ln(k·2^-24)), (2, blocks), in place of the scratch x."""
        x, y, z, e = self._x, self._y, self._z, self._q
        np.copyto(x, self._k, casting="unsafe")
        bits = x.view(np.int32)
        np.subtract(bits, _HALF_ROOT, out=bits)
        np.right_shift(bits, 23, out=e)
        np.bitwise_and(bits, 0x7FFFFF, out=bits)
        np.add(bits, _HALF_ROOT, out=bits)  # x = m
        np.subtract(x, np.float32(1), out=x)
        np.multiply(x, x, out=z)
        np.multiply(x, _LN[7], out=y)
        for coefficient in _LN[6::-1]:
            np.add(y, coefficient, out=y)
            np.multiply(y, x, out=y)
        np.multiply(y, z, out=y)
        exponent, term = self._turn
        np.subtract(e, 24, out=exponent, casting="unsafe", dtype=np.int32)
        np.multiply(exponent, _LN2_LOW, out=term)
        np.add(y, term, out=y)
        np.multiply(z, np.float32(0.5), out=z)
        np.subtract(y, z, out=y)
        np.add(x, y, out=x)
        np.multiply(exponent, _LN2_HIGH, out=term)
        np.add(x, term, out=x)
        np.multiply(x, np.float32(-2), out=x)
        return np.sqrt(x, out=x)


def result_seed(seed: int, j: int) -> int:
    """The seed of result number j of an edit."""
    return (seed + j) % 2**64
