"""The paper's table 3: a test picture that gets another's caption is traced back to training pairs,
by relative influence and by others.

There is no truth to hold a trace against; a pair of the sub-category of the picture, or of the
caption that it got, is a plausible one.
"""

from functools import partial

import numpy as np
import torch
from pydantic import PositiveInt

from projects.ecif import labels, relative
from projects.ecif.data import Name
from projects.ecif.experiments.common import ProblemConfig, build
from shared import experiment
from shared.influence.baselines import chance, metric_gradient


class Config(ProblemConfig):
    """The problem, and the pictures that are traced back."""

    dataset: Name
    """The data set."""
    seeds: PositiveInt
    """Runs: each draws the split, the batches and the heads."""
    queries: PositiveInt
    """Wrongly captioned test pictures of a run."""
    top: PositiveInt
    """Training pairs that a ranking shows for a picture."""
    shown: PositiveInt
    """Pictures of the first run that go into the gallery."""


def run(config: Config, run: experiment.Run) -> None:
    gallery = []
    for seed in run.progress(range(config.seed, config.seed + config.seeds), "seeds"):
        case = build(config, config.dataset, seed, config.test)
        problem, w, data = case.problem, case.fitted.w, case.data
        a, b = problem.pair_effects(w, case.fitted.solve)
        test = case.test.pairs
        with torch.no_grad():
            s = problem.towers.logits(w, test.inputs)
            # [m, B]: the caption each picture gets
            got = s.masked_fill(~test.present.unsqueeze(-1), float("-inf")).argmax(-2)
            train_images = torch.nn.functional.normalize(
                problem.towers.embed(w, tuple(x.to(w.device) for x in data.train.inputs))[1], dim=-1
            )
            test_images = torch.nn.functional.normalize(
                problem.towers.embed(w, tuple(x.to(w.device) for x in data.test.inputs))[1], dim=-1
            )
        at = test.order.cpu()
        pair_at = {int(place): pair for pair, place in enumerate(at)}
        wrong = [(n, int(p) // config.batch, int(p) % config.batch) for n, p in enumerate(at)]
        wrong = [(n, m, place) for n, m, place in wrong if int(got[m, place]) != place][
            : config.queries
        ]
        groups = np.array(data.train.groups)

        def loss(at: torch.Tensor, m: int, place: int) -> torch.Tensor:
            """A picture's loss against the captions of its batch."""
            now = problem.towers.logits(at, tuple(x[m] for x in test.inputs))  # noqa: B023
            absent = ~test.present[m].unsqueeze(-1)  # noqa: B023
            return -now.masked_fill(absent, -1e30).log_softmax(0)[place, place]

        # all queries at once: what of a trace does not depend on the query is made once
        g = torch.stack(
            [metric_gradient(partial(loss, m=m, place=place), w) for _, m, place in wrong], 1
        )
        relatives, influences = relative(a, b, g), (a + b) @ g
        for number, (query, m, place) in enumerate(run.progress(wrong, "queries")):
            influence = influences[:, number]
            ranks = {
                labels.RELATIVE_INFLUENCE: relatives.span[:, number],
                labels.RELATIVE_INFLUENCE_SIGNED: -relatives.signed[:, number],
                labels.INFLUENCE: influence.abs(),
                labels.INFLUENCE_HARMFUL: -influence,
                labels.COSINE: train_images @ test_images[query],
                labels.RANDOM: chance(problem.pairs.n, seed * 1000 + query),
            }
            own = data.test.groups[query]
            taken = data.test.groups[pair_at[m * config.batch + int(got[m, place])]]
            tops = {
                name: rank.cpu().argsort(descending=True)[: config.top].numpy()
                for name, rank in ranks.items()
            }
            for name, top in tops.items():
                run.row(
                    seed=seed,
                    query=query,
                    ranking=name,
                    caption=data.test.captions[query],
                    got_caption=data.test.captions[pair_at[m * config.batch + int(got[m, place])]],
                    top_captions="; ".join(data.train.captions[i] for i in top),
                    same_share=float((groups[top] == own).mean()),
                    got_share=float((groups[top] == taken).mean()),
                    shown=seed == config.seed and number < config.shown,
                )
            if seed == config.seed and number < config.shown:
                pictures = [
                    [data.test.thumbnails[query], *data.train.thumbnails[tops[name]]]
                    for name in labels.GALLERY
                ]
                gallery.append(np.array(pictures)[:, :, ::2, ::2])
    run.array("gallery", np.array(gallery))
