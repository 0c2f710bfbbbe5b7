"""The noise `philox-bm24-v1` in ONNX operators: the same bits as sdedit.noise, which specifies it.

Integers are uint64 with clean high halves, numbers float32; every operator rounds once, as the specification wants.
ONNX cannot look at a float's bits. So the exponent of k comes from its logarithm, which may be off by one for any
runtime's reasons, and is put right by a comparison: exact wherever Log is right to 0.03.
"""

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from sdedit.export.expressions import Value, Writer
from sdedit.noise import ROUNDS

FLOAT, UINT32, UINT64 = TensorProto.FLOAT, TensorProto.UINT32, TensorProto.UINT64
F, U = np.float32, np.uint64
M0, M2 = U(0xD2511F53), U(0xCD9E8D57)
BUMPS = U(0x9E3779B9), U(0xBB67AE85)
WORD, HALF = U(0xFFFFFFFF), U(32)
LN = [  # the logarithm is carried times -2, as in sdedit.noise: exact, and its 0 has the same sign
    -2 * F(c)
    for c in (
        0.33333331, -0.2500082, 0.20001227, -0.16623357, 0.14201757, -0.13160184, 0.12761582, -0.076344974,
    )
]  # fmt: skip
LN2_HIGH, LN2_LOW = -2 * F(0.693359375), -2 * F(-2.12194440e-4)
SIN = [F(c) for c in (-0.16666655, 0.00833216, -0.00019515282)]
COS = [F(c) for c in (1, -0.5, 0.041666646, -0.0013887316, 2.4433157e-05)]
TURN_HIGH, TURN_LOW = F(6 / 2**24), F((2 * np.pi - 6) / 2**24)
QUARTER = F(2**22)
ROOT_2 = F(11863283 / 2**23)

Draw = Callable[[Value], Value]  # step, an int64 scalar -> normals (B, C, H, W)


class NoiseGraph:
    """Normals of a batch whose frame is that of `like`, (B, C, H, W). seeds: uint64 (B,).

    Counter words and keys are (1, B, blocks), each axis 1 until an operand says otherwise.
    """

    def __init__(self, w: Writer, seeds: Value, like: Value) -> None:
        self._w = w
        self._shape = w("Shape", like)
        self._elements = w("ReduceProd", w("Shape", like, start=1))
        count = w("Squeeze", (self._elements + np.int64([3])) / np.int64([4]))
        blocks = w("Reshape", w("Range", np.int64(0), count, np.int64(1)), np.int64([1, 1, -1]))
        self._rows = w("Concat", w("Shape", like, end=1), np.int64([-1]), axis=0)  # (B, all normals of an image)
        seeds = w("Reshape", seeds, np.int64([1, -1, 1]))
        self._keys = [(seeds & WORD, seeds >> HALF)]
        for _ in range(ROUNDS - 1):
            low, high = self._keys[-1]
            self._keys.append(((low + BUMPS[0]) & WORD, (high + BUMPS[1]) & WORD))
        self._first = blocks.to(UINT64) * M0

    def stream(self, repeat: Value, stream: int) -> Draw:
        """What draws the noise of one repeat (an int64 scalar) and stream, for any step.

        What two rounds make of the other counter words is written here, outside the loop over the steps.
        """
        (low1, high1), (low2, high2) = self._keys[:2]
        fixed = repeat.to(UINT64) * M2
        second = ((self._first >> HALF) ^ (high1 ^ U(stream))) * M2
        of_step = (fixed >> HALF) ^ low1
        c0, c1 = (second >> HALF) ^ ((fixed & WORD) ^ low2), second & WORD
        rest = (self._first & WORD) ^ high2

        def draw(step: Value) -> Value:
            p0 = (of_step ^ step.to(UINT64)) * M0
            return self._normals(self._philox(c0, c1, rest ^ (p0 >> HALF), p0 & WORD))

        return draw

    def _philox(self, c0: Value, c1: Value, c2: Value, c3: Value) -> tuple[Value, Value, Value, Value]:
        """Rounds 3 to 10. Salmon et al. 2011."""
        for low, high in self._keys[2:]:
            p0, p2 = c0 * M0, c2 * M2
            c0, c1, c2, c3 = (p2 >> HALF) ^ (c1 ^ low), p2 & WORD, (p0 >> HALF) ^ (c3 ^ high), p0 & WORD
        return c0, c1, c2, c3

    def _normals(self, words: tuple[Value, Value, Value, Value]) -> Value:
        w, (w0, w1, w2, w3) = self._w, words
        k, j = ((w("Concat", *pair, axis=0) >> U(8)).to(FLOAT) for pair in ((w0, w2), (w1, w3)))  # (pair, B, blocks)
        r = self._radius(k + F(1))
        parts = [w("Unsqueeze", part * r, np.int64([1])) for part in self._cosine_and_sine(j)]
        planes = w("Reshape", w("Concat", *parts, axis=1), np.int64([4, -1]))
        z = w("Reshape", w("Transpose", planes, perm=[1, 0]), self._rows)
        return w("Reshape", w("Slice", z, np.int64([0]), self._elements, np.int64([1])), self._shape)

    def _radius(self, k: Value) -> Value:
        """sqrt(-2 ln(k·2^-24)), k whole in [1, 2^24]."""
        w = self._w
        near = w("Floor", w("Log", k) * F(1 / np.log(2)) + F(0.45))  # e, or one less
        m = k / (w.value(np.uint32(1)) << near.to(UINT32)).to(FLOAT)  # exact
        more = w("GreaterOrEqual", m, ROOT_2).to(FLOAT)  # 1 where it was one less
        m = m - m * F(0.5) * more
        exponent = near + more - F(24)
        x = m - F(1)
        z = x * x
        y = x * LN[7]
        for coefficient in LN[6::-1]:
            y = (y + coefficient) * x
        y = y * z + exponent * LN2_LOW + z
        return w("Sqrt", y - (x + x) + exponent * LN2_HIGH)

    def _cosine_and_sine(self, j: Value) -> tuple[Value, Value]:
        """cos and sin of 2π j·2^-24, j whole in [0, 2^24)."""
        w = self._w
        q = w("Floor", j * (1 / QUARTER) + F(0.5))  # exact: 0 … 4 quarter turns
        i = j - q * QUARTER
        angle = i * TURN_HIGH + i * TURN_LOW
        t = angle * angle
        s = t * SIN[2]
        for coefficient in SIN[1::-1]:
            s = (s + coefficient) * t
        s = s * angle + angle
        c = t * COS[4]
        for coefficient in COS[3:0:-1]:
            c = (c + coefficient) * t
        c = c + COS[0]
        # The quarters' own cosine, and minus their sine, are 0 and ±1, so products and sums are exact. Their zeros
        # have the signs that leave -0 where the specification has it.
        half = w("Floor", q * F(0.5))
        odd = q - half * F(2)
        sign = w.value(F(1)) - w("Abs", half - F(1)) * F(2)  # -1 in quarters 0 and 1, then 1
        cosine, minus_sine = (odd - F(1)) * sign, odd * sign
        return c * cosine + s * minus_sine, s * cosine - c * minus_sine
