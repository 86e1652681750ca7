"""What the experiments share: a data set, heads on its features, and a converged fit."""

from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from projects.ecif import Contrastive, Heads, Pairs, TwoTower
from projects.ecif.data import Dataset, Name, Part, load
from projects.ecif.fit import Fit, fit
from shared import experiment
from shared.influence.noise import shuffle_captions
from shared.seeding import step_seed


class SplitConfig(experiment.Config):
    """Sizes of a data set's parts, and of the heads that are trained on its features; the test part
    has its size elsewhere.
    """

    train: PositiveInt
    """Training pairs."""
    validation: PositiveInt
    """Clean pairs whose loss scores are about."""
    batch: PositiveInt
    """Pairs of a batch, which are one another's negatives."""
    dimensions: PositiveInt
    """Principal components that stand for a caption, and for a picture."""
    size: PositiveInt
    """Dimensions of the embedding."""
    delta: PositiveFloat
    """Weight of the regulariser beside the sum of the batches' losses, as in the paper."""
    smoothing: NonNegativeFloat
    """What the cosine's squared lengths are raised by."""
    device: str = "cpu"
    """Where tensors live: cpu, or cuda."""


class ProblemConfig(SplitConfig):
    """The same with one size of the test part."""

    test: PositiveInt
    """Pairs that the accuracy is of."""


@dataclass(frozen=True, eq=False)
class Case:
    """A trained problem and what it is judged by. `corrupted` [n] says whose caption was exchanged;
    scores do not see it.
    """

    data: Dataset
    fitted: Fit
    start: Tensor
    validation: Contrastive
    test: Contrastive
    corrupted: Tensor
    repeated_share: float

    @property
    def problem(self) -> Contrastive:
        return self.fitted.problem

    def accuracy(self, w: Tensor) -> float:
        """Share of test pictures that are nearest to their class's caption or, without classes, to
        their own among a batch's captions.
        """
        towers, data = self.problem.towers, self.data
        with torch.no_grad():
            if data.class_texts is None:
                s = towers.logits(w, self.test.pairs.inputs)
                right = s.argmax(-2) == torch.arange(s.shape[-1], device=s.device)
                return float(right[self.test.pairs.present].double().mean())
            texts, images = data.class_texts.to(w.device), data.test.images.to(w.device)
            unit = torch.nn.functional.normalize
            u, v, _ = towers.embed(w, (texts, images))
            labels = torch.tensor(
                [data.class_captions.index(one) for one in data.test.captions], device=w.device
            )
            return float(
                ((unit(v, dim=-1) @ unit(u, dim=-1).T).argmax(1) == labels).double().mean()
            )


def build(
    config: SplitConfig,
    name: Name,
    seed: int,
    test: int,
    shuffled_share: float = 0.0,
    delta: float | None = None,
) -> Case:
    """Load, exchange captions of a share of the training pairs, train to a minimum, take the
    Hessian there.
    """
    data = load(name, config.train, config.validation, test, config.dimensions, seed)
    source = list(range(len(data.train)))
    corrupted = torch.zeros(len(data.train), dtype=torch.bool)
    if shuffled_share:
        source, corrupted = shuffle_captions(data.train.captions, shuffled_share, seed)
    texts, images = data.train.texts[source], data.train.images
    towers = TwoTower(
        Heads(texts.shape[1], images.shape[1], config.size, step_seed(seed, "heads")).to(
            config.device
        ),
        config.smoothing,
    )
    start = towers.parameters.flat()

    def problem(inputs: tuple[Tensor, Tensor], weight: float) -> Contrastive:
        pairs = Pairs.of([one.to(config.device) for one in inputs], config.batch, seed)
        return Contrastive(towers, pairs, weight, start)

    training = problem((texts, images), config.delta if delta is None else delta)
    repeated = training.pairs.repeated_share([data.train.captions[i] for i in source])

    def held_out(part: Part) -> Contrastive:
        return problem(part.inputs, 0.0)

    return Case(
        data,
        fit(training),
        start,
        held_out(data.validation),
        held_out(data.test),
        corrupted,
        repeated,
    )
