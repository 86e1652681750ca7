"""The same scores from other packages, in this package's convention. They are an extra: pip install
-c constraints.txt -e '.[peers]'.

Each takes a model, the training data and the queries as (inputs, labels), and a loss (outputs,
labels) -> [samples]; scores are [n, q]: the predicted change of each query's loss when a sample is
removed. The model is copied, so that it stays as it is.
"""

import contextlib
import copy
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shared.errors import UserError
from shared.influence.ekfac import draw_labels
from shared.influence.params import refuse_train_mode
from shared.seeding import generator

Pairs = tuple[Tensor, Tensor]
SampleLoss = Callable[[Tensor, Tensor], Tensor]
DATTRI = {
    "explicit": "IFAttributorExplicit",
    "cg": "IFAttributorCG",
    "datainf": "IFAttributorDataInf",
}


def dattri_influence(
    model: nn.Module,
    train: Pairs,
    query: Pairs,
    loss: SampleLoss,
    *,
    l2: float,
    method: str = "explicit",
    iterations: int = 10,
) -> Tensor:
    """dattri's influence functions with Hessian + l2 I: "explicit" (the whole matrix), "cg" or
    "datainf". In float32, as dattri adds up.

    `iterations` are cg's at most, by default as many as dattri's default.
    """
    if method not in DATTRI:
        raise UserError(f"dattri's method is one of {', '.join(DATTRI)}, not {method}")
    algorithms, tasks = _import("dattri.algorithm.influence_function"), _import("dattri.task")
    copied = _copied(model)

    def mean_loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(copied, parameters, data[0])
        # dattri turns labels into floats here and there
        return loss(outputs, data[1].to(train[1].dtype)).mean()

    n = len(train[0])
    task = tasks.AttributionTask(loss_func=mean_loss, model=copied, checkpoints=copied.state_dict())
    with _quiet():
        options = {"max_iter": iterations} if method == "cg" else {}
        attributor = getattr(algorithms, DATTRI[method])(
            task=task, regularization=l2, device=str(train[0].device), **options
        )
        attributor.cache(DataLoader(TensorDataset(*train), batch_size=n))
        found = attributor.attribute(
            DataLoader(TensorDataset(*train), batch_size=n),
            DataLoader(TensorDataset(*query), batch_size=len(query[0])),
        )
    return found.detach() / n


def kronfluence_ekfac(
    model: nn.Module,
    train: Pairs,
    query: Pairs,
    loss: SampleLoss,
    *,
    damping: float | None = None,
    empirical: bool = False,
    seed: int = 0,
) -> Tensor:
    """kronfluence's EK-FAC influence over all Linear and Conv2d layers.

    Args:
        damping: None is a tenth of the mean eigenvalue of each layer.
        empirical: take the data's labels for the factors, not labels drawn from the model's
            softmax.
    """
    analyzer, tasks, arguments = (
        _import("kronfluence.analyzer"),
        _import("kronfluence.task"),
        _import("kronfluence.arguments"),
    )
    draw = generator(seed, "kronfluence", device=str(train[0].device))

    class Pointwise(tasks.Task):  # type: ignore[name-defined]
        def compute_train_loss(
            self, batch: Pairs, model: nn.Module, sample: bool = False
        ) -> Tensor:
            outputs = model(batch[0])
            return loss(outputs, draw_labels(outputs, draw) if sample else batch[1]).sum()

        def compute_measurement(self, batch: Pairs, model: nn.Module) -> Tensor:
            return loss(model(batch[0]), batch[1]).sum()

    dtype = next(model.parameters()).dtype
    task = Pointwise()
    factors = arguments.FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=empirical,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    scores = arguments.ScoreArguments(
        damping_factor=damping,
        score_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        precondition_dtype=dtype,
    )
    with _quiet(), tempfile.TemporaryDirectory(prefix="kronfluence-") as folder:
        run = analyzer.Analyzer(
            analysis_name="scores",
            model=analyzer.prepare_model(_copied(model), task),
            task=task,
            cpu=train[0].device.type == "cpu",
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=folder,
        )
        batch = min(len(train[0]), 256)
        run.fit_all_factors(
            "factors", TensorDataset(*train), per_device_batch_size=batch, factor_args=factors
        )
        run.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=TensorDataset(*query),
            train_dataset=TensorDataset(*train),
            per_device_query_batch_size=len(query[0]),
            per_device_train_batch_size=batch,
            score_args=scores,
        )
        found = run.load_pairwise_scores("scores")
    return found["all_modules"].T / len(train[0])


def captum_tracin(
    model: nn.Module,
    train: Pairs,
    query: Pairs,
    loss: SampleLoss,
    *,
    checkpoints: Sequence[dict[str, Tensor]],
    learning_rates: Sequence[float],
) -> Tensor:
    """captum's TracInCP over checkpoints given as state dicts, each with its learning rate."""
    tracin = _import("captum.influence").TracInCP
    if len(checkpoints) != len(learning_rates) or not checkpoints:
        raise UserError(
            f"TracIn needs a learning rate per checkpoint; there are {len(learning_rates)} for"
            f" {len(checkpoints)}"
        )

    def load(into: nn.Module, number: str) -> float:
        into.load_state_dict(checkpoints[int(number)])
        return learning_rates[int(number)]

    with _quiet():
        method = tracin(
            _copied(model),
            TensorDataset(*train),
            [str(number) for number in range(len(checkpoints))],
            checkpoints_load_func=load,
            loss_fn=loss,
            batch_size=256,
        )
        found: Tensor = method.influence(query)
    return found.detach().T / len(train[0])


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package = name.split(".")[0]
        raise UserError(
            f"{package} is not installed; run: pip install -c constraints.txt -e '.[peers]'"
        ) from None


def _copied(model: nn.Module) -> nn.Module:
    refuse_train_mode(model)
    return copy.deepcopy(model)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Without the peers' warnings, which are about their own insides, and without their progress
    bars.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
