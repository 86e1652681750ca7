"""The Gaussian noise of a step, drawn from a key, and added so that no bit tells how.

**What is proved.** A sum s of clipped gradients leaves as g·m, where g is a power of two, and m is
(s + N) / g rounded to an integer, for a normal N of deviation τ. All that happens to m afterwards
is a function of m alone, so the release is post-processing of s + N in real numbers, which is what
the accountants are about. Nothing depends on which numbers a computer can draw.

That needs m to be right, and floating point makes it wrong now and then: N drawn as the quantile of
32 bits has gaps, about zero as in the tails, and a value in a gap tells that something was added to
the noise. So N is the quantile of 160 bits, and only as many are looked at as m depends on
(interval refining: Haney, Desfontaines, Hartman, Shrestha, Hay 2022, arXiv 2207.13793; the idea is
that of Ziv 1991 for elementary functions):

1. with 32 bits in float32: m is certain where (s + N) / g is further from the border between two
   integers than `MARGIN`, which bounds all errors (see there), and N is not in the far tail;
2. of the rest, 1 in 500, with 85 bits in float64: certain beyond `MARGIN_64`;
3. of the rest, about 1 in 10^10, with 160 bits in numbers as long as that takes.

**What it costs in delta.** With 160 bits, m differs from that of a real N with a probability of at
most 2^-160 for each border between integers, and 2^-159 beyond the last quantile (14.3 τ): for a
number at most 2^-145 (`SHORTFALL`). `delta_shortfall` counts it; `DPModel.epsilon` pays for it.

**Where the bits come from.** On a CPU from AES-256 in counter mode. Whoever sees a release sees
some noise bare (the rows of an embedding that no record touched); from torch's own Mersenne twister
that is enough to work out its state, and the noise on all the rest. **On a GPU** they are those of
torch's Philox generator, which is not made against an adversary, and N has the 53 bits of float64.
Its sum with s is rounded to the same grid, which closes the gaps about zero; but neither the tails
nor the generator are proved, and a report says so.
"""

import hashlib
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from shared.errors import UserError

# numbers drawn at a time on a CPU: with what they are made from, as much as its cache holds
BLOCK = 1 << 16
CHUNK = 1 << 24  # on a GPU
SECRET_BYTES = 80  # a cipher's key and first counter, and another's key

# A deviation is at least so many steps of the grid and less than twice as many. Rounding adds 1/12
# of a step squared to the noise's variance: 1 part in 3,000 at most. Fewer steps would add more,
# more of them leave more numbers uncertain in float32.
STEPS = 16
# |2U - 1| above 1 - FAR goes past float32 at once.
FAR = 2**-10
# Bounds the error of (s + N) / g in float32, in steps, where |2U - 1| <= 1 - FAR and the value is
# below `LIMIT`. A deviation is less than 32 steps. A uniform number is 2^-25 + 2^-31 off, which the
# slope of the quantile there, at most 288 deviations, takes to 2.8e-4 steps; erfinv is off by 4
# units in its last place at most (5e-5 steps), and three roundings below 2^10 by 3e-5 each.
MARGIN = 2**-11
_UP = torch.tensor(0.5 - MARGIN)
LIMIT = 1 << 10
# The same in float64, where a quantile is off by 1e-14 deviations at most.
MARGIN_64 = 1e-10
PENDING = 1 << 8  # blocks whose uncertain numbers wait for float64, at most
SHORTFALL = 2.0**-145


class Noise(Protocol):
    """A stream of independent normal numbers."""

    def release(self, sums: Tensor, deviation: float, divisor: float) -> None:
        """`sums` [n] becomes (sums + deviation times the stream's next numbers), rounded to
        multiples of `grid(deviation)`, over `divisor`. No number is taken for a deviation of 0.

        Some elements may be written only by `finish`.
        """

    def finish(self) -> None:
        """Write what is still to be written."""


def grid(deviation: float) -> float:
    """The power of two to whose multiples noise of this deviation is rounded, sum included.

    Raises:
        UserError: a deviation beyond float32.
    """
    if not 1e-30 < deviation < 1e30:
        raise UserError(
            f"noise of deviation {deviation:g} is beyond float32; choose clip and noise_multiplier"
            " so that their product is between 1e-30 and 1e30"
        )
    return 2.0 ** (math.frexp(deviation)[1] - 1) / STEPS


def delta_shortfall(numbers: float, epsilon: float) -> float:
    """What is to be added to delta because `numbers` normal numbers are made of finitely many
    bits: (1 + e^epsilon) times the distance in total variation.
    """
    return numbers * SHORTFALL * (1 + math.exp(min(epsilon, 500.0)))


class _Pending(NamedTuple):
    """Numbers of a part of the sums that are not certain in float32."""

    part: Tensor
    places: np.ndarray  # in `part`
    sums: np.ndarray  # as they were
    bits: np.ndarray
    numbers: np.ndarray
    deviation: float  # in steps
    step: float
    scale: float  # of what is written


class CipherNoise:
    """On a CPU.

    Args:
        secret: `SECRET_BYTES` of them.
    """

    def __init__(self, secret: bytes):
        self._bits = np.empty(BLOCK + 4, np.int32)  # 4: the cipher asks for room for 16 bytes more
        self._zeros = bytes(4 * BLOCK)
        self._numbers, self._values, self._steps = (torch.empty(BLOCK) for _ in range(3))
        self._mask = np.empty(BLOCK, bool)
        self._pending: list[_Pending] = []
        self._taken = BLOCK
        self._block = -1  # the number of the block that `_bits` holds
        self._cipher = Cipher(algorithms.AES256(secret[:32]), modes.CTR(secret[32:48])).encryptor()
        # The 128 further bits of number i are this cipher's block i: they do not depend on which
        # other numbers need theirs. No counter mode of one key meets those of another.
        self._further = Cipher(algorithms.AES256(secret[48:80]), modes.ECB()).encryptor()

    def release(self, sums: Tensor, deviation: float, divisor: float) -> None:
        if deviation == 0:
            sums.mul_(1 / divisor)
            return
        step = grid(deviation)
        done = 0
        while done < len(sums):
            if self._taken == BLOCK:
                self._draw()
            count = min(len(sums) - done, BLOCK - self._taken)
            part = sums[done : done + count]
            taken = slice(self._taken, self._taken + count)
            narrow = part.dtype == torch.float32
            unsure = self._round(part, taken, deviation, step) if narrow else np.arange(count)
            numbers = unsure + (self._block * BLOCK + self._taken)
            self._pending.append(
                _Pending(
                    part, unsure, part.numpy()[unsure].astype(np.float64),
                    self._bits[taken][unsure], numbers, deviation / step, step, step / divisor,
                )
            )  # fmt: skip
            if narrow:
                torch.mul(self._steps[:count], step / divisor, out=part)
            done, self._taken = done + count, self._taken + count
            if len(self._pending) >= PENDING:
                self.finish()

    def finish(self) -> None:
        if not self._pending:
            return
        lengths = [len(each.places) for each in self._pending]
        m = self._exactly(
            np.concatenate([each.sums / each.step for each in self._pending]),
            np.concatenate([each.bits for each in self._pending]),
            np.concatenate([each.numbers for each in self._pending]),
            np.repeat([each.deviation for each in self._pending], lengths),
        )
        pieces = np.split(m, np.cumsum(lengths)[:-1])
        for each, steps in zip(self._pending, pieces, strict=True):
            # The same two operations as for the others: what is written is a function of m.
            written = each.part.numpy()
            written[each.places] = steps.astype(written.dtype) * written.dtype.type(each.scale)
        self._pending.clear()

    def _round(self, sums: Tensor, taken: slice, deviation: float, step: float) -> np.ndarray:
        """m of each number into `_steps`, from 32 bits and in float32. Returns where it is not
        certain.
        """
        count = len(sums)
        value, m, certain = self._values[:count], self._steps[:count], self._mask[:count]
        s = sums.numpy()
        highest = max(float(s.max()), -float(s.min())) / step
        # Half a step up, floor rounds; MARGIN less, what is uncertain lies at one end.
        torch.add(_UP, sums, alpha=1 / step, out=value)
        value.add_(self._numbers[taken], alpha=math.sqrt(2) * deviation / step)
        torch.floor(value, out=m)
        # NaN compares false, whether a sum's or a far number's
        np.less(value.sub_(m).numpy(), 1 - 2 * MARGIN, out=certain)
        if not highest < LIMIT - 6 * STEPS:  # up to 4 deviations are not far
            certain &= np.abs(s) < (LIMIT - 6 * STEPS) * step
        return _where_not(certain)

    def _draw(self) -> None:
        """The next block of numbers, over the square root of 2; NaN where they are far."""
        self._cipher.update_into(self._zeros, memoryview(self._bits).cast("B"))
        self._block += 1
        bits = self._bits[:BLOCK]
        self._numbers.copy_(torch.from_numpy(bits)).mul_(2**-31).erfinv_()
        # wraps: both ends of int32 come to lie below 2 * edge
        edge = np.uint32(2**31 * FAR)
        place = self._values.numpy().view(np.uint32)
        np.subtract(bits.view(np.uint32), np.uint32(2**31) - edge, out=place)
        np.greater_equal(place, 2 * edge, out=self._mask)
        self._numbers.numpy()[_where_not(self._mask)] = np.nan
        self._taken = 0

    def _exactly(
        self, s: np.ndarray, bits: np.ndarray, numbers: np.ndarray, deviation: np.ndarray
    ) -> np.ndarray:
        """m of sums `s` with the stream's given numbers, of which `bits` are the first 32; sums and
        deviations in steps of the grid.
        """
        from scipy.special import ndtri

        blocks = np.zeros((len(s), 2), "<u8")
        blocks[:, 0] = numbers
        further = np.frombuffer(self._further.update(blocks.tobytes()), "<u8").reshape(-1, 2)
        # A number below zero is the quantile of p <= 1/2, one above zero its mirror image.
        upper = bits >= 0
        tail = np.where(upper, 2**31 - 1 - bits.astype(np.int64), bits.astype(np.int64) + 2**31)
        p = (tail + ((further[:, 0] >> np.uint64(11)) + 0.5) / 2**53) / 2**32
        quantile = ndtri(p)
        # A step is a power of two: s is exact, and so are its integer part and the rest.
        whole = np.rint(s)
        rest = s - whole
        value = rest + np.where(upper, -quantile, quantile) * deviation
        m = np.rint(value)
        for i in np.flatnonzero(~(np.abs(value - m) < 0.5 - MARGIN_64) | (tail == 0)):
            if math.isfinite(rest[i]):
                low = int(further[i, 0]) << 64 | int(further[i, 1])
                p_exact = Fraction((int(tail[i]) << 129) + 2 * low + 1, 1 << 161)
                m[i] = _nearest(rest[i], p_exact, bool(upper[i]), deviation[i])
        return whole + m + 0.0  # -0, which would tell two negative parts, becomes 0


def _where_not(mask: np.ndarray) -> np.ndarray:
    """`np.flatnonzero(~mask)` of a mask with few zeros, three times as fast: by eights first."""
    whole = len(mask) // 8 * 8
    groups = np.flatnonzero(mask[:whole].view(np.uint64) != 0x0101010101010101)
    places = (groups[:, None] * 8 + np.arange(8)).ravel()
    return np.concatenate([places[~mask[places]], whole + np.flatnonzero(~mask[whole:])])


def _nearest(rest: float, p: Fraction, upper: bool, deviation: float) -> int:
    """rest + deviation times the normal quantile of p (or its mirror image), rounded."""
    import mpmath

    with mpmath.workprec(512):
        quantile = mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * mpmath.mpf(p.numerator) / p.denominator)
        value = mpmath.mpf(rest) + (quantile if upper else -quantile) * mpmath.mpf(deviation)
        return int(mpmath.floor(value + mpmath.mpf(0.5)))


class GeneratorNoise:
    """On other devices: torch's own generator, in float64, and the grid."""

    def __init__(self, secret: bytes, device: torch.device):
        self._generator = torch.Generator(device).manual_seed(
            int.from_bytes(secret[:8], "big") >> 1
        )

    def release(self, sums: Tensor, deviation: float, divisor: float) -> None:
        if deviation == 0:
            sums.mul_(1 / divisor)
            return
        step = grid(deviation)
        for part in sums.split(CHUNK):
            noise = torch.empty(len(part), dtype=torch.float64, device=part.device)
            noise.normal_(0, deviation / step, generator=self._generator)
            m = noise.add_(part.double() / step).round_().add_(0.0)
            part.copy_(m).mul_(step / divisor)

    def finish(self) -> None:
        pass


def streams(
    key: bytes, step: int, devices: Iterable[torch.device], rewound: int = 0
) -> dict[torch.device, Noise]:
    """The noise of a step by device: the same on all ranks, unknown without the key.

    Devices are told apart by their order: the first one of each rank has the same noise, whatever
    its number.
    """
    found: dict[torch.device, Noise] = {}
    for place, device in enumerate(sorted(set(devices), key=str)):
        label = f"noise {step} {place} {rewound}".encode()
        secret = hashlib.shake_256(key + label).digest(SECRET_BYTES)
        found[device] = (
            CipherNoise(secret) if device.type == "cpu" else GeneratorNoise(secret, device)
        )
    return found
