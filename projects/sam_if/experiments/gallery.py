"""The most helpful and the most harmful training images for some test images, by SAM-HIF. The same
in every run.
"""

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import cross_entropy

from projects.sam_if.estimators import sam_hif
from projects.sam_if.problems import Case, Dataset, Solution, load
from shared import experiment


class Config(experiment.Config):
    """For each data set the first test image that is classified right and the first that is not are
    the queries.
    """

    datasets: list[Dataset] = ["mnist", "fashion-mnist", "cifar10"]
    top: int = Field(default=5, ge=1)
    n: int = Field(default=1000, ge=20)
    features: int = Field(default=32, ge=1)
    rho: float = Field(default=0.1, ge=0)
    l2: float = Field(default=0.01, gt=0)
    device: str = "cpu"


def run(config: Config, run: experiment.Run) -> None:
    for dataset in run.progress(config.datasets, "data sets"):
        images = load(
            dataset,
            config.n,
            features=config.features,
            seed=config.seed,
            validation=0,
            test=500,
            device=config.device,
        )
        case = Case.of(images, l2=config.l2, rho=config.rho)
        w = Solution.of(case).w
        right = case.predictions(w) == images.y_test
        queries = [int(right.int().argmax()), int((~right).int().argmax())]
        pictures = []
        for query in queries:
            x, y = images.x_test[query : query + 1], images.y_test[query : query + 1]
            scores = sam_hif(
                case.problem,
                w,
                lambda at, x=x, y=y, case=case: cross_entropy(case.parameters.call(at, x), y),
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
                        *(images.pictures[one].numpy() for one in shown),
                    ]
                )
            )
        run.array(dataset.replace("-", "_"), np.stack(pictures))
