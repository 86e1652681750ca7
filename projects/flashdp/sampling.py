"""How batches are drawn. Privacy amplification by sampling is proved for Poisson sampling, so only
that has an epsilon here.
"""

from collections.abc import Iterator

import numpy as np

from shared.errors import UserError
from shared.seeding import step_seed


class PoissonSampling:
    """Each of `dataset_size` samples is in each batch with probability q = expected_batch_size /
    dataset_size, independently.

    A batch may be empty; the step is then taken with noise alone.
    """

    def __init__(self, dataset_size: int, expected_batch_size: float):
        if dataset_size < 1:
            raise UserError("the dataset is empty")
        if not 0 < expected_batch_size <= dataset_size:
            raise UserError(
                f"the expected batch size must be above 0 and at most the dataset's {dataset_size},"
                f" not {expected_batch_size}"
            )
        self.dataset_size, self.expected_batch_size = dataset_size, expected_batch_size
        self.sample_rate: float | None = expected_batch_size / dataset_size

    def batch(self, seed: int, step: int) -> np.ndarray:
        """The samples of a step, in ascending order: a pure function of (seed, step), so that a run
        can go on anywhere.

        The seed must not be known to those against whom the guarantee is to hold.
        """
        chosen = (
            np.random.default_rng(step_seed(seed, "poisson", step)).random(self.dataset_size)
            < self.sample_rate
        )
        return np.flatnonzero(chosen)


class FixedSampling:
    """Batches of one size, each pass over the data in a new order. For speed and for comparison; it
    has no epsilon here.
    """

    sample_rate: float | None = None

    def __init__(self, dataset_size: int, expected_batch_size: int):
        if dataset_size < 1:
            raise UserError("the dataset is empty")
        if not 0 < expected_batch_size <= dataset_size:
            raise UserError(
                f"the batch size must be above 0 and at most the dataset's {dataset_size}, not"
                f" {expected_batch_size}"
            )
        self.dataset_size, self.expected_batch_size = dataset_size, expected_batch_size

    def batch(self, seed: int, step: int) -> np.ndarray:
        """The samples of a step; what does not fill a batch at the end of a pass is left out."""
        per_pass = self.dataset_size // self.expected_batch_size
        order = np.random.default_rng(step_seed(seed, "order", step // per_pass)).permutation(
            self.dataset_size
        )
        return order[step % per_pass * self.expected_batch_size :][: self.expected_batch_size]


def micro_batches(batch: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The batch in parts of at most `size`; nothing for an empty one."""
    for start in range(0, len(batch), size):
        yield batch[start : start + size]
