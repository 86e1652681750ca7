"""Where heat maps point: on scenes of two digits, of which it is known where each is."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from projects.sscbm import labels
from projects.sscbm.data import Features, Name
from projects.sscbm.data import frozen as features_of
from projects.sscbm.experiments.common import (
    SETTINGS,
    Case,
    TrainConfig,
    case,
    loaded,
    measured,
    trained,
)
from projects.sscbm.model import ConceptModel
from projects.sscbm.saliency import box_hits, location_accuracy, peaks, quadrant_of, upsampled
from shared import experiment


class Config(TrainConfig):
    dataset: Name
    """A set with known places."""
    features: Features
    """The frozen network that neighbours are searched with; models are trained end to end."""
    ratio: float = Field(gt=0, le=1)
    """Share of the training images that is annotated."""
    lambdas: list[float]
    """Weights of the alignment besides 0 and `lambda_2`."""
    shown: int = Field(ge=0)
    """Test images whose maps are saved for the figure, of the first seed."""


def run(config: Config, run: experiment.Run) -> None:
    data = loaded(config, config.dataset)
    # Of its own, as it takes more scenes than the other experiments.
    frozen = {"pool": features_of(data.pool.pixels, config.features).features}
    for seed in run.progress(range(config.seed, config.seed + config.seeds), "seeds"):
        one = case(config, config.dataset, seed, config.ratio, frozen)
        common = {"dataset": config.dataset, "seed": seed, "labelled_share": one.ratio}
        run.row(**common, variant=labels.INK, **ink(one))
        for variant, lambda_2, model in variants(config, one, run):
            maps = heat_maps(model, one)
            where = {"variant": variant, "lambda_2_scale": lambda_2}
            run.row(**common, **where, **measured(model, one), **pointing(maps, one))
            if seed == config.seed and config.shown and variant in labels.MAP_ARRAYS:
                run.array(labels.MAP_ARRAYS[variant], maps[: config.shown].numpy())
        if seed == config.seed and config.shown:
            run.array("pictures", one.data.test.pixels[: config.shown].numpy())
            assert one.data.places is not None
            run.array("places", one.data.places[: config.shown].numpy())


def variants(
    config: Config, one: Case, run: experiment.Run
) -> Iterator[tuple[str, float, ConceptModel]]:
    """Models that differ in what their maps were trained on."""
    pseudo, setting = one.pseudo(), SETTINGS[labels.SSCBM]
    yield (
        labels.UNTRAINED_MAP,
        0.0,
        trained(config.model_copy(update={"lambda_2": 0.0}), one, setting, pseudo)[0],
    )
    yield labels.ALIGNED, config.lambda_2, trained(config, one, setting, pseudo)[0]
    for weight in config.lambdas:
        stronger = config.model_copy(update={"lambda_2": weight})
        yield labels.ALIGNED_MORE, weight, trained(stronger, one, setting, pseudo)[0]
    yield labels.TRUE_PSEUDO, config.lambda_2, trained(config, one, setting, one.truth)[0]


@torch.no_grad()
def heat_maps(model: ConceptModel, one: Case) -> Tensor:
    """Of the test images, [n, k, h, w]."""
    return torch.cat([model.heat_maps(part).cpu() for part in one.test.split(256)])


def pointing(maps: Tensor, one: Case) -> dict[str, float]:
    """Of the maps of concepts that are there: the peak lies in the concept's quadrant, in that of
    another that is there, in one without any; and the share of the positive map that lies in the
    own one.
    """
    places = one.data.places
    assert places is not None
    height, width = one.data.test.pixels.shape[2:]
    large = upsampled(maps, height, width)
    at = quadrant_of(peaks(large), height, width)
    there = places >= 0
    occupied = torch.stack([(places == q).any(1) for q in range(4)], dim=1)
    own, filled = at == places, occupied.gather(1, at)
    positive = large.clamp(min=0)
    halves = positive.unflatten(3, (2, width // 2)).unflatten(2, (2, height // 2))
    by_quadrant = halves.sum((3, 5)).flatten(2)  # [n, k, 4]
    total = by_quadrant.sum(2).clamp(min=1e-12)
    inside = by_quadrant.gather(2, places.clamp(min=0).unsqueeze(2)).squeeze(2) / total
    return {
        "pointing_accuracy": float(own[there].double().mean()),
        "other_share": float((filled & ~own)[there].double().mean()),
        "empty_share": float((~filled)[there].double().mean()),
        "inside_share": float(inside[there].double().mean()),
        "box_accuracy": location_accuracy(box_hits(maps, centres(places))),
    }


def centres(places: Tensor) -> Tensor:
    """The middle of each concept's quadrant as the one point of its part: [n, k, 1, 2]."""
    at = torch.stack([places // 2, places % 2], dim=2).float() / 2 + 0.25
    return at.masked_fill((places < 0).unsqueeze(2), torch.nan).unsqueeze(2)


def ink(one: Case) -> dict[str, float]:
    """What a map that points at a random pixel of ink has, exactly: the share of an image's ink in
    the concept's quadrant. It takes no training, and does not know the concepts apart.
    """
    places = one.data.places
    assert places is not None
    height, width = one.data.test.pixels.shape[2:]
    values = one.data.test.images().mean(1)
    quarters = values.unflatten(2, (2, width // 2)).unflatten(1, (2, height // 2))
    by_quadrant = quarters.sum((2, 4)).flatten(1)
    shares = by_quadrant / by_quadrant.sum(1, keepdim=True).clamp(min=1e-12)
    there = places >= 0
    own = shares.gather(1, places.clamp(min=0))
    return {
        "pointing_accuracy": float(own[there].double().mean()),
        "other_share": 1 - float(own[there].double().mean()),
        "empty_share": 0.0,
        "inside_share": float(own[there].double().mean()),
    }
