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
    k = m·2^e with m in [11863283/2^24, 11863283/2^23), that is from √½ to √2; exact in float32
    x = m - 1 (exact)     z = x·x
    y = L7;  y = y·x + L6;  …  y = y·x + L0;     y = y·x;  y = y·z
    E = e - 24 (exact)    y = y + E·LN2_LOW;  y = y - 0.5·z
    ln u1 = (x + y) + E·LN2_HIGH
r = sqrt(-2·ln u1), correctly rounded.

cos and sin of 2πu2, from the integer j = w1 >> 8:
    q = (j + 2^21) >> 22 quarter turns,  i = j - (q << 22) in [-2^21, 2^21)
    θ = i·TURN_HIGH (exact);  θ = θ + i·TURN_LOW;     t = θ·θ
    s = S2;  s = s·t + S1;  s = s·t + S0;  s = s·t;  s = s·θ;  s = s + θ
    c = C4;  c = c·t + C3;  c = c·t + C2;  c = c·t - 0.5;  c = c·t + 1
    q mod 4 = 0: (cos, sin) = (c, s)    1: (-s, c)    2: (-c, -s)    3: (s, -c)
z = (cos·r, sin·r).

L0 … L7, S0 … S2, C2 … C4, LN2 and TURN are the constants below; the code carries the logarithm times -2,
which scales every step exactly. Normals are within 3 ulp of the exact ones.
"""

import ctypes
import hashlib
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdedit.capi import shipped
from sdedit.checks import whole

SPECIFICATION = "philox-bm24-v1"
STREAM_STATE = 0  # the noise of x
STREAM_MASK = 1  # the noise of the mask composite

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of counter words 0 and 2
_KEY_BUMPS = (0x9E3779B9, 0xBB67AE85)  # of the key's low and high word
_WORD = 0xFFFFFFFF


def _constant(value: float | np.floating[Any], dtype: type[np.generic] = np.float32) -> NDArray[Any]:
    """A 0-d array: NumPy takes it faster than a scalar."""
    return np.array(value, dtype)


# Minimax polynomials: -2 (ln(1+x) - x + x²/2)/x³ on [√½-1, √2-1]; (sin θ - θ)/θ³ and (cos θ - 1 + θ²/2)/θ⁴
# in θ² on [0, π/4].
_LN = [
    _constant(-2 * np.float32(value))
    for value in (
        0.33333331, -0.2500082, 0.20001227, -0.16623357, 0.14201757, -0.13160184, 0.12761582, -0.076344974,
    )
]  # fmt: skip
_SIN = [_constant(value) for value in (-0.16666655, 0.00833216, -0.00019515282)]
_COS = [_constant(value) for value in (1, -0.5, 0.041666646, -0.0013887316, 2.4433157e-05)]
_LN2_HIGH = _constant(-2 * 0.693359375)
_LN2_LOW = _constant(-2 * np.float32(-2.12194440e-4))
_TURN_HIGH = _constant(6 / 2**24)  # 2π/2^24 in two parts: a 22-bit integer times the first is exact
_TURN_LOW = _constant((2 * np.pi - 6) / 2**24)
_ONE = _constant(1)
_HALF_ROOT = _constant(0x3F3504F3, np.int32)  # the float32 nearest √½, as bits
_MANTISSA = _constant(0x7FFFFF, np.int32)
_M0, _M2 = (_constant(value, np.uint64) for value in _MULTIPLIERS)
_LOW_WORD = _constant(_WORD, np.uint64)
_HALF = _constant(32, np.uint64)

_COUNTERS_AT_ONCE = 12288  # small images: several steps at once; large ones in pieces: scratch stays in cache
_MOST_AHEAD = 64  # steps
_MOST_BYTES = 2**24


class NoiseSource(Protocol):
    """What the loop draws from. Anything callable like this may stand in, for tests or other generators."""

    def __call__(self, step: int, repeat: int, stream: int) -> NDArray[np.floating]:
        """Standard normals (B, C, H, W) for one use; may return the same buffer every time."""
        ...


class Noise:
    """The specified noise of a batch: image i has key seeds[i], whatever else is in the batch.

    seeds: B integers in [0, 2^64). shape: (C, H, W) of the full model frame. steps: how many the loop will
    take, where that is known. Not thread-safe.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], *, steps: int | None = None) -> None:
        self._seeds = [checked_seed(seed) for seed in seeds]
        self._shape = (len(seeds), *shape)
        self._elements = int(np.prod(shape))
        library = shipped.open_library()
        self._maker = _NumPy(self._elements, steps) if library is None else _Compiled(library, self._elements)
        self._drawn: dict[int, tuple[int, int, NDArray[np.float32]]] = {}  # stream -> first step, repeat, normals
        self._drawing: threading.Thread | None = None

    def draw_ahead(self, repeat: int) -> None:
        """Begin to draw what the steps of this pass add to x, in a thread, while the network has its first turn.

        Where noise is compiled, there is nothing to gain by that, and nothing is done.
        """
        if not self._maker.worth_a_thread:
            return
        self._settle()

        def draw() -> None:
            self._drawn[STREAM_STATE] = 1, repeat, self._draw(1, repeat, STREAM_STATE, np.empty((0, 0, 0), np.float32))

        self._drawing = threading.Thread(target=draw, daemon=True)
        self._drawing.start()

    def _settle(self) -> None:
        if self._drawing is not None:
            self._drawing.join()
            self._drawing = None

    def __call__(self, step: int, repeat: int, stream: int) -> NDArray[np.float32]:
        """Standard normals (B, C, H, W) float32. The buffer is reused by a later call."""
        self._settle()
        first, drawn_repeat, normals = self._drawn.get(stream) or (0, -1, np.empty((0, 0, 0), np.float32))
        if drawn_repeat != repeat or not first <= step < first + len(normals):
            first, normals = step, self._draw(step, repeat, stream, normals)
            self._drawn[stream] = step, repeat, normals
        return normals[step - first, :, : self._elements].reshape(self._shape)

    def _draw(self, step: int, repeat: int, stream: int, spare: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normals of the steps from `step` on, (steps, images, elements rounded up to whole blocks)."""
        maker, blocks = self._maker, -(-self._elements // 4)
        size = (maker.steps_from(step, len(self._seeds)), len(self._seeds), 4 * blocks)
        normals = spare if spare.shape == size else np.empty(size, np.float32)
        for at in range(0, len(normals), maker.at_once):
            for image, seed in enumerate(self._seeds):
                part = normals[at : at + maker.at_once, image]
                if (same := self._seeds.index(seed)) < image:  # one seed from several t0, or a batch filled up
                    part[...] = normals[at : at + maker.at_once, same]
                else:
                    maker.fill(part, seed, step + at, repeat, stream)
        return normals


class _Compiled:
    """Makes the noise of one image by the library that the package ships: each step's when it is wanted."""

    at_once = 1
    worth_a_thread = False

    def __init__(self, library: ctypes.CDLL, elements: int) -> None:
        self._normals, self._elements = library.sdedit_normals, elements

    def steps_from(self, step: int, images: int) -> int:
        return 1

    def fill(self, out: NDArray[np.float32], seed: int, step: int, repeat: int, stream: int) -> None:
        self._normals(seed, step, repeat, stream, self._elements, out.ctypes.data)


class _NumPy:
    """Makes the noise of one image by NumPy, of many steps at once: that is faster than a little after each run of the
    network, when the caches are cold.
    """

    worth_a_thread = True

    def __init__(self, elements: int, steps: int | None) -> None:
        self._steps = steps
        blocks = -(-elements // 4)
        self._padded = 4 * blocks
        self.at_once = min(_MOST_AHEAD, max(1, _COUNTERS_AT_ONCE // blocks))  # steps of one call of `fill`
        self._pieces = [
            (start, min(_COUNTERS_AT_ONCE, blocks - start)) for start in range(0, blocks, _COUNTERS_AT_ONCE)
        ]
        self._generators = {count: _Generator(self.at_once, count) for _, count in self._pieces}  # at most two sizes

    def steps_from(self, step: int, images: int) -> int:
        """How many steps to draw from `step` on. Step 0 alone does not say that more will be wanted."""
        if step == 0 or self._steps is None:
            return self.at_once
        room = _MOST_BYTES // (4 * self._padded * images)
        wanted = min(self._steps - step + 1, _MOST_AHEAD, room)
        return self.at_once * max(1, -(-wanted // self.at_once))

    def fill(self, out: NDArray[np.float32], seed: int, step: int, repeat: int, stream: int) -> None:
        for start, count in self._pieces:
            part = out[:, 4 * start : 4 * (start + count)]
            self._generators[count].fill(part, seed, (start, step, repeat, stream))


def philox4x32(counter: Sequence[int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10: counter of four words, key of two -> four words of 32 bits."""
    words = _Generator(1, 1).words(key[0] | key[1] << 32, (counter[0], counter[1], counter[2], counter[3]))
    return tuple(int(word) for word in words.ravel())  # type: ignore[return-value]


class _Generator:
    """Scratch for consecutive blocks of consecutive steps of one image, so that drawing allocates little.

    In the code, c0 … c3 are the counter words, 64-bit arrays whose high halves are clean only where said.
    """

    def __init__(self, steps: int, blocks: int) -> None:
        self.steps, self.blocks = steps, blocks
        size = (steps, blocks)
        self._offsets = np.arange(blocks, dtype=np.uint64)
        self._c0, self._c2 = np.empty(size, np.uint64), np.empty(size, np.uint64)
        self._products = [(np.empty(size, np.uint64), np.empty(size, np.uint64)) for _ in range(2)]
        self._words = np.empty((4, *size), np.uint32)
        self._x, self._y, self._z = (np.empty((2, *size), np.float32) for _ in range(3))
        self._turn = np.empty((2, 2, *size), np.float32)
        self._i = np.empty((2, *size), np.int32)

    def words(self, seed: int, counter: tuple[int, int, int, int]) -> NDArray[np.uint32]:
        """Words 0 … 3, (4, steps, blocks), of the counters from (block, step, repeat, stream) on."""
        block, first_step, repeat, stream = counter
        keys = _key_schedule(seed)
        c0, c2 = self._c0, self._c2
        step = np.arange(first_step, first_step + self.steps, dtype=np.uint64)[:, None]
        # Round 1: words 1 to 3 are the same for every block, word 0 for every step.
        first = (self._offsets + np.uint64(block)) * _M0
        product = repeat * _MULTIPLIERS[1]
        c0_of_step = step ^ np.uint64(product >> 32 ^ keys[0][0])
        np.bitwise_xor(first >> _HALF, np.uint64(stream ^ keys[0][1]), out=c2[0])
        c2[1:] = c2[0]
        # Round 2: word 0 is the same for every block.
        product_of_step = c0_of_step * _M0
        p2, _ = self._products[0]
        np.multiply(c2, _M2, out=p2)
        np.right_shift(p2, _HALF, out=c0)
        np.bitwise_xor(c0, np.uint64(product & _WORD ^ keys[1][0]), out=c0)
        np.bitwise_xor(first & _LOW_WORD, product_of_step >> _HALF ^ np.uint64(keys[1][1]), out=c2)
        c1: NDArray[np.uint64] = p2
        c3: NDArray[np.uint64] = product_of_step & _LOW_WORD
        # Rounds 3 to 10; the last leaves its words to be cut to 32 bits below.
        for number, (key0, key1) in enumerate(keys[2:], start=3):
            p2, p0 = self._products[number % 2]
            np.multiply(c0, _M0, out=p0)
            np.multiply(c2, _M2, out=p2)
            np.right_shift(p2, _HALF, out=c0)
            np.bitwise_xor(c0, c1, out=c0)
            np.bitwise_xor(c0, key0, out=c0)
            np.right_shift(p0, _HALF, out=c2)
            np.bitwise_xor(c2, c3, out=c2)
            np.bitwise_xor(c2, key1, out=c2)
            if number < ROUNDS:
                np.bitwise_and(c0, _LOW_WORD, out=c0)
                np.bitwise_and(c2, _LOW_WORD, out=c2)
            c1, c3 = p2, p0
        for word, values in zip(self._words, (c0, c1, c2, c3), strict=True):
            np.copyto(word, values, casting="unsafe")
        return self._words

    def fill(self, out: NDArray[np.float32], seed: int, counter: tuple[int, int, int, int]) -> None:
        """Write standard normals to `out`, (steps, 4·blocks)."""
        words = self.words(seed, counter)
        np.right_shift(words, 8, out=words)
        whole = words.view(np.int32)
        radius = self._radius(whole[0::2])
        turn = self._cosine_and_sine(whole[1::2])
        target = out.reshape(self.steps, self.blocks, 2, 2).transpose(3, 2, 0, 1)
        np.multiply(turn, radius, out=target)

    def _radius(self, k: NDArray[np.int32]) -> NDArray[np.float32]:
        """sqrt(-2 ln((k + 1)·2^-24)), (2, steps, blocks), in the scratch x. Everything is scaled by -2, exactly."""
        x, y, z, e = self._x, self._y, self._z, self._i
        term = self._turn[0]
        np.add(k, 1, out=x, casting="unsafe", dtype=np.int32)
        bits = x.view(np.int32)
        np.subtract(bits, _HALF_ROOT, out=bits)
        np.right_shift(bits, 23, out=e)
        np.bitwise_and(bits, _MANTISSA, out=bits)
        np.add(bits, _HALF_ROOT, out=bits)  # x = m
        np.subtract(x, _ONE, out=x)
        np.multiply(x, x, out=z)
        np.multiply(x, _LN[7], out=y)
        for coefficient in _LN[6::-1]:
            np.add(y, coefficient, out=y)
            np.multiply(y, x, out=y)
        np.multiply(y, z, out=y)
        exponent = self._turn[1]
        np.subtract(e, 24, out=exponent, casting="unsafe", dtype=np.int32)
        np.multiply(exponent, _LN2_LOW, out=term)
        np.add(y, term, out=y)
        np.add(y, z, out=y)
        np.add(x, x, out=x)
        np.subtract(y, x, out=x)
        np.multiply(exponent, _LN2_HIGH, out=term)
        np.add(x, term, out=x)
        return np.sqrt(x, out=x)

    def _cosine_and_sine(self, j: NDArray[np.int32]) -> NDArray[np.float32]:
        """cos and sin of 2π j·2^-24, (2, 2, steps, blocks); overwrites j."""
        i, angle, t = self._i, self._y, self._z
        cosine, sine = self._turn
        q = np.add(j, 1 << 21, out=i)
        np.right_shift(q, 22, out=q)
        quarter = np.left_shift(q, 22, out=t.view(np.int32))
        np.subtract(j, quarter, out=j)  # i
        np.copyto(angle, j, casting="unsafe")
        np.multiply(angle, _TURN_LOW, out=t)
        np.multiply(angle, _TURN_HIGH, out=angle)
        np.add(angle, t, out=angle)
        np.multiply(angle, angle, out=t)
        np.multiply(t, _SIN[2], out=sine)
        for coefficient in _SIN[1::-1]:
            np.add(sine, coefficient, out=sine)
            np.multiply(sine, t, out=sine)
        np.multiply(sine, angle, out=sine)
        np.add(sine, angle, out=sine)
        np.multiply(t, _COS[4], out=cosine)
        for coefficient in _COS[3:0:-1]:
            np.add(cosine, coefficient, out=cosine)
            np.multiply(cosine, t, out=cosine)
        np.add(cosine, _ONE, out=cosine)

        cosine_bits, sine_bits = self._turn.view(np.int32)
        odd, swap = np.left_shift(q, 31, out=j), t.view(np.int32)
        np.right_shift(odd, 31, out=odd)  # all ones where q is odd: cosine and sine change places
        np.bitwise_xor(cosine_bits, sine_bits, out=swap)
        np.bitwise_and(swap, odd, out=swap)
        np.bitwise_xor(cosine_bits, swap, out=cosine_bits)
        np.bitwise_xor(sine_bits, swap, out=sine_bits)
        sign = np.bitwise_and(q, 2, out=swap)  # the sine is negative in quarters 2 and 3
        np.left_shift(sign, 30, out=sign)
        np.bitwise_xor(sine_bits, sign, out=sine_bits)
        np.add(q, 1, out=q)  # the cosine in 1 and 2
        np.bitwise_and(q, 2, out=sign)
        np.left_shift(sign, 30, out=sign)
        np.bitwise_xor(cosine_bits, sign, out=cosine_bits)
        return self._turn


def _key_schedule(seed: int) -> list[tuple[int, int]]:
    low, high = seed & _WORD, seed >> 32
    return [((low + n * _KEY_BUMPS[0]) & _WORD, (high + n * _KEY_BUMPS[1]) & _WORD) for n in range(ROUNDS)]


def checked_seed(seed: object) -> int:
    """`seed` as an int. Raises OptionError."""
    return whole("seed", seed, 0, 2**64 - 1, hint="any whole number below 2^64; leave it out for 0")


def result_seed(seed: int, j: int) -> int:
    """The seed of result number j of an edit."""
    return (seed + j) % 2**64


def file_seed(seed: int, relative: str) -> int:
    """The seed of a file of a folder job. relative: its path below the folder, with slashes on every system."""
    name = relative.encode("utf-8", "surrogateescape")  # a name that is not text counts as the bytes it is
    return (seed + int.from_bytes(hashlib.sha256(name).digest()[:8], "little")) % 2**64
