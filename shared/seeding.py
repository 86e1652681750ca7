"""Seeds that depend on what they are for, not on what was drawn before them.

`step_seed(seed, "noise", step)` gives the same number in any process, on any platform, whichever
seeds were asked for before.
"""

import hashlib
import json
import operator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def step_seed(seed: int, *keys: int | str) -> int:
    """An independent seed in [0, 2**63) for each (seed, keys).

    The tuple is hashed first, because SeedSequence's own entropy lists are ambiguous: [2**32] and
    [0, 1] give the same words.
    """
    parts = [key if isinstance(key, str) else operator.index(key) for key in (seed, *keys)]
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    state = np.random.SeedSequence(np.frombuffer(digest, dtype="<u4").tolist()).generate_state(
        1, np.uint64
    )
    return int(state[0]) >> 1


def generator(seed: int, *keys: int | str, device: str = "cpu") -> "torch.Generator":
    """A torch generator of its own, seeded by `step_seed(seed, *keys)`; the global one is not
    touched.
    """
    import torch

    return torch.Generator(device=device).manual_seed(step_seed(seed, *keys))
