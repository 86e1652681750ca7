"""Figure 1, and the main rows at other shares of annotated images. The share of the main table is
in `main`.
"""

from pydantic import Field

from projects.sscbm import labels
from projects.sscbm.data import Name
from projects.sscbm.experiments.common import SETTINGS, TrainConfig, case, measured, trained
from shared import experiment

SWEPT = (labels.LABELLED_ONLY, labels.NO_PSEUDO, labels.CEM_SSL, labels.SSCBM)


class Config(TrainConfig):
    datasets: list[Name] = Field(min_length=1)
    """The sets."""
    ratios: list[float] = Field(min_length=1)
    """Shares at which all four methods are trained; the smallest is one image a class."""
    curve_ratios: list[float]
    """Shares at which CEM is trained on the annotated images alone (figure 1), on the first set."""


def run(config: Config, run: experiment.Run) -> None:
    jobs = [
        (name, ratio, seed)
        for name in config.datasets
        for ratio in [
            *config.ratios,
            *(config.curve_ratios if name == config.datasets[0] else []),
        ]
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    for name, ratio, seed in run.progress(jobs, "shares and seeds"):
        frozen = run.used_tensors("features", name)
        one = case(config, name, seed, ratio, frozen)
        pseudo = one.pseudo()
        for method in SWEPT if ratio in config.ratios else SWEPT[:1]:
            model, steps = trained(config, one, SETTINGS[method], pseudo)
            run.row(
                dataset=name,
                seed=seed,
                ratio_share=ratio,
                method=method,
                labelled=len(one.choice.rows),
                labelled_share=one.ratio,
                neighbours=one.neighbours,
                agreement_share=one.agreement(pseudo) if ratio < 1 else None,
                steps=steps,
                **measured(model, one),
            )
