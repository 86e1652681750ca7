"""The most helpful and the most harmful training images for some test images, by SAM-HIF. The same
in every run.
"""

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch.nn.functional import cross_entropy

from projects.sam_if.estimators import Estimator
from projects.sam_if.experiments import common
from projects.sam_if.problems import Case, Dataset, Solution
from shared import experiment


class Config(common.Config):
    """For each image set the first test image that is classified right and the first that is not
    are the queries.
    """

    datasets: list[Dataset]
    """Image sets."""
    top: PositiveInt
    """Helpful images shown for a query, and as many harmful ones."""
    l2: PositiveFloat
    """Weight of the regulariser, without which there is no fixed point."""


def run(config: Config, run: experiment.Run) -> None:
    for dataset in run.progress(config.datasets, "data sets"):
        images = common.images_of(config, dataset, config.seed)
        case = Case.of(images, l2=config.l2, rho=config.rho)
        w = Solution.of(case).w
        right = case.predictions(w) == images.y_test
        queries = [int(right.int().argmax()), int((~right).int().argmax())]
        pictures = []
        for query in queries:
            x, y = images.x_test[query : query + 1], images.y_test[query : query + 1]
            scores = Estimator(case.problem.at(w)).scores(
                lambda at, x=x, y=y, case=case: cross_entropy(case.parameters.call(at, x), y)
            )
            order = torch.argsort(scores, descending=True, stable=True).tolist()
            shown = [*order[: config.top], *order[::-1][: config.top]]
            for place, index in enumerate(shown):
                run.row(
                    dataset=dataset,
                    query=query,
                    query_label=int(y),
                    predicted=int(case.predictions(w)[query]),
                    kind="helpful" if place < config.top else "harmful",
                    place=place % config.top + 1,
                    index=index,
                    label=int(images.y[index]),
                    influence_score=float(scores[index]),
                )
            pictures.append(
                np.stack(
                    [
                        images.test_pictures[query].numpy(),
                        *(images.pictures[index].numpy() for index in shown),
                    ]
                )
            )
        run.array(dataset.replace("-", "_"), np.stack(pictures))
