"""How batches are drawn. Privacy amplification by sampling is proved for Poisson sampling, so only
that has an epsilon here.
"""

import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import UserError
from shared.seeding import step_seed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset

# How improbable under Poisson sampling batches must be for it to be denied.
TAIL = 1e-12


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


class Seen:
    """The sizes of the batches of a run, held against what Poisson sampling gives."""

    def __init__(self) -> None:
        self.steps, self.samples, self.expected = 0, 0, 0.0
        self.size: int | None = None  # of every batch, while all have the same

    def add(self, samples: int, expected: float) -> None:
        """A step with a batch of so many samples."""
        self.size = samples if self.size == samples or not self.steps else None
        self.steps += 1
        self.samples += samples
        self.expected += expected

    def check(self, sampling: PoissonSampling) -> None:
        """UserError where the samples seen are as improbable as `TAIL` under `sampling`: far more
        or fewer than the steps times q N (Bernstein's inequality), or all batches of one size.
        """
        if not self.steps:
            return
        from scipy.stats import binom

        rate = sampling.sample_rate
        assert rate is not None
        variance = self.expected * (1 - rate)
        # P(|sum - mean| >= t) <= 2 exp(-t^2 / (2 (variance + t/3)))
        nats = math.log(2 / TAIL)
        allowed = nats / 3 + math.sqrt((nats / 3) ** 2 + 2 * nats * variance)
        if abs(self.samples - self.expected) > allowed:
            raise UserError(
                f"{self.samples} samples were seen in {self.steps} steps, where Poisson sampling at"
                f" rate {rate:.3g} gives {self.expected:g} (off by more than {allowed:.0f} once in"
                f" {1 / TAIL:.0e}): batches are not as stated, or their first dimension is not the"
                " samples; draw them with private_loader"
            )
        if self.size is not None:
            same = binom.pmf(self.size, sampling.dataset_size, rate)
            if self.steps * math.log(max(same, 1e-300)) < math.log(TAIL):
                raise UserError(
                    f"all {self.steps} batches had {self.size} samples, which is not Poisson"
                    " sampling, and no accountant here covers it; draw them with private_loader"
                )

    def record(self) -> list[float | None]:
        return [self.steps, self.samples, self.expected, self.size]

    @classmethod
    def of(cls, record: list[Any] | None) -> "Seen":
        """From what `record` gave; from nothing, a new one."""
        made = cls()
        if record is not None:
            made.steps, made.samples, made.expected, made.size = record
        return made


class _PoissonBatches:
    """A batch sampler: the indices of each step, none for an empty batch."""

    def __init__(self, sampling: PoissonSampling, steps: int):
        self.sampling, self.steps = sampling, steps
        # nobody else may know it
        self._seed, self._next = int.from_bytes(os.urandom(16), "big"), 0

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            # a second pass over the loader has other batches
            self._next += 1
            yield self.sampling.batch(self._seed, self._next).tolist()

    def __len__(self) -> int:
        return self.steps


def private_loader(
    data: "Dataset[Any] | DataLoader[Any]", rate: float, steps: int, **options: Any
) -> "DataLoader[Any]":
    """A DataLoader of `steps` Poisson batches: each record is in each with probability `rate`.

    Its attribute `sampling` is what `make_private` takes. An empty batch comes as None: take the
    step all the same, which is then noise alone.

    Args:
        data: a data set with a length, or a DataLoader, whose data set, `collate_fn`, workers and
            pinning are taken over (its sampler and batch size are not).
        options: of DataLoader.

    Raises:
        UserError: a data set that is a stream, or a rate not above 0 and at most 1.
    """
    from torch.utils.data import DataLoader, IterableDataset, default_collate

    if isinstance(data, DataLoader):
        taken: Mapping[str, Any] = {
            name: getattr(data, name) for name in ("collate_fn", "num_workers", "pin_memory")
        }
        options = {**taken, **options}
        data = data.dataset
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise UserError(
            "a stream of records has no Poisson batches: nobody knows how many there are; give a"
            " data set with a length"
        )
    if not 0 < rate <= 1:
        raise UserError(f"the sampling rate must be above 0 and at most 1, not {rate}")
    sampling = PoissonSampling(len(data), rate * len(data))
    collate = options.pop("collate_fn", None) or default_collate
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=_PoissonBatches(sampling, steps),  # type: ignore[arg-type]
        collate_fn=_OrNone(collate),
        **options,
    )
    loader.sampling = sampling  # type: ignore[attr-defined]
    return loader


class _OrNone:
    """Collates a batch; None for an empty one. (A class, since workers are sent it.)"""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, records: list[Any]) -> Any:
        return self.collate(records) if records else None


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
