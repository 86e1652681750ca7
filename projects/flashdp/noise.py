"""The Gaussian noise of a step, drawn from a key.

Whoever sees what a step releases sees some of its noise bare: the rows of an embedding that no
record touched hold nothing else. From a Mersenne twister, torch's generator on a CPU, that is
enough to work out its state, and with it the noise on all the rest. So on a CPU the bits are those
of AES-256 in counter mode, of which nobody can work out some from others. On a GPU they are those
of torch's Philox generator, which is not made against an adversary.
"""

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from projects.flashdp.scratch import SCRATCH_BUFFER

# numbers drawn at a time on a CPU: with what they are made from, as much as its cache holds
BLOCK = 1 << 17
CHUNK = 1 << 26  # on a GPU


class Noise(Protocol):
    """A stream of independent normal numbers."""

    def release(self, sums: Tensor, deviation: float, divisor: float) -> None:
        """`sums` [n] becomes (sums + deviation times the stream's next numbers) / divisor. No
        number is taken for a deviation of 0.
        """


class CipherNoise:
    """On a CPU. A number is the normal quantile of 32 bits, so the tails end at 6.2 standard
    deviations.

    Args:
        secret: 48 bytes, AES's key and the first counter.
    """

    def __init__(self, secret: bytes):
        self._bits = np.empty(BLOCK + 4, np.int32)  # 4: the cipher asks for room for 16 bytes more
        self._zeros = bytes(4 * BLOCK)
        self._numbers = torch.empty(BLOCK)  # over sqrt(2)
        self._taken = BLOCK
        self._cipher = Cipher(algorithms.AES256(secret[:32]), modes.CTR(secret[32:])).encryptor()

    def release(self, sums: Tensor, deviation: float, divisor: float) -> None:
        if deviation == 0:
            sums.mul_(1 / divisor)
            return
        done = 0
        while done < len(sums):
            if self._taken == BLOCK:
                self._draw()
            count = min(len(sums) - done, BLOCK - self._taken)
            numbers = self._numbers[self._taken : self._taken + count]
            sums[done : done + count].add_(numbers, alpha=math.sqrt(2) * deviation).mul_(
                1 / divisor
            )
            done, self._taken = done + count, self._taken + count

    def _draw(self) -> None:
        self._cipher.update_into(self._zeros, memoryview(self._bits).cast("B"))
        bits = self._bits[:BLOCK]
        self._numbers.copy_(torch.from_numpy(bits)).mul_(2**-31).erfinv_()
        # In float32 1 - 2^-24 is next to 1. Where that would coarsen the tails (one number in a
        # thousand) float64 takes over.
        # wraps: both ends of int32
        far = np.flatnonzero(bits.view(np.uint32) - np.uint32(2**31 - 2**21) < np.uint32(2**22))
        self._numbers[torch.from_numpy(far)] = (
            torch.from_numpy((bits[far] + 0.5) / 2**31).erfinv_().float()
        )
        self._taken = 0


class GeneratorNoise:
    """On other devices: torch's own generator."""

    def __init__(self, secret: bytes, device: torch.device):
        self._generator = torch.Generator(device).manual_seed(
            int.from_bytes(secret[:8], "big") >> 1
        )

    def release(self, sums: Tensor, deviation: float, divisor: float) -> None:
        for part in sums.split(CHUNK):
            if deviation:
                part.add_(
                    SCRATCH_BUFFER.get(part, len(part)).normal_(
                        0, deviation, generator=self._generator
                    )
                )
            part.mul_(1 / divisor)


def streams(
    key: bytes, step: int, devices: set[torch.device], rewound: int = 0
) -> dict[torch.device, Noise]:
    """The noise of a step by device: the same on all ranks, unknown without the key.

    Devices are told apart by their order: the first one of each rank has the same noise, whatever
    its number.
    """
    found: dict[torch.device, Noise] = {}
    for place, device in enumerate(sorted(devices, key=str)):
        secret = hashlib.shake_256(key + f"noise {step} {place} {rewound}".encode()).digest(48)
        found[device] = (
            CipherNoise(secret) if device.type == "cpu" else GeneratorNoise(secret, device)
        )
    return found
