"""Other packages give the same numbers, so that a table which shows them shows them at
their best.
"""

import sys
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from shared.errors import UserError
from shared.influence import baselines, peers
from shared.influence.ekfac import EKFAC
from shared.influence.solvers import dense


def cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


@pytest.fixture
def at_optimum(convex):
    """The model itself holds the optimum, as the peers want it."""
    convex.parameters.load(convex.w)
    return convex


@pytest.mark.parametrize("method", ["explicit", "cg"])
def test_dattri_has_the_same_influence(at_optimum, method):
    pytest.importorskip("dattri")
    ours = baselines.influence(
        at_optimum.objective,
        at_optimum.w,
        at_optimum.metric,
        partial(dense, at_optimum.objective.hessian(at_optimum.w)),
    )
    found = peers.dattri_influence(
        at_optimum.model,
        at_optimum.objective.data,
        at_optimum.query,
        cross_entropy,
        l2=0.03,
        method=method,
    )
    assert found.shape == ours.shape == (61, 5)
    error = (found - ours).norm() / ours.norm()
    assert error < (1e-6 if method == "explicit" else 1e-3)  # dattri adds up in float32
    if method == "cg":
        given = (at_optimum.model, at_optimum.objective.data, at_optimum.query, cross_entropy)
        few, many = (
            peers.dattri_influence(*given, l2=0.03, method="cg", iterations=count)
            for count in (2, 40)
        )
        assert (many - ours).norm() < error * ours.norm() < (few - ours).norm()


def test_kronfluence_has_the_same_ekfac(net):
    pytest.importorskip("kronfluence")
    net.parameters.load(net.w)
    fit = EKFAC.fit(net.parameters, net.w, net.objective.losses, net.objective.data)
    ours = baselines.influence(net.objective, net.w, net.metric, fit.solve)
    found = peers.kronfluence_ekfac(
        net.model, net.objective.data, net.query, cross_entropy, empirical=True
    )
    assert torch.allclose(found, ours, rtol=1e-6, atol=1e-9 * float(ours.abs().max()))
    drawn = peers.kronfluence_ekfac(net.model, net.objective.data, net.query, cross_entropy)
    assert float(torch.corrcoef(torch.stack([drawn.flatten(), ours.flatten()]))[0, 1]) > 0.8


def test_captum_has_the_same_tracin(net):
    pytest.importorskip("captum")
    states = [net.parameters.unflatten(w) for w in (net.w, net.w + 0.05)]
    ours = baselines.tracin(net.objective, [net.w, net.w + 0.05], [0.3, 0.7], net.metric)
    before = net.parameters.flat()
    found = peers.captum_tracin(
        net.model,
        net.objective.data,
        net.query,
        cross_entropy,
        checkpoints=states,
        learning_rates=[0.3, 0.7],
    )
    assert torch.allclose(found, ours, rtol=1e-9, atol=1e-14)
    assert torch.equal(net.parameters.flat(), before)  # the model stayed as it was


def test_a_peer_that_is_absent_is_named_with_the_way_to_get_it(net, monkeypatch):
    calls = {
        "dattri": lambda: peers.dattri_influence(
            net.model, net.objective.data, net.query, cross_entropy, l2=0.1
        ),
        "kronfluence": lambda: peers.kronfluence_ekfac(
            net.model, net.objective.data, net.query, cross_entropy
        ),
        "captum": lambda: peers.captum_tracin(
            net.model,
            net.objective.data,
            net.query,
            cross_entropy,
            checkpoints=[{}],
            learning_rates=[1],
        ),
    }
    for name, call in calls.items():
        for module in [one for one in sys.modules if one.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            UserError,
            match=(
                rf"{name} is not installed; run: pip install -c constraints\.txt -e '\.\[peers\]'"
            ),
        ):
            call()


def test_wrong_options_are_refused(net):
    with pytest.raises(UserError, match="one of explicit, cg, datainf, not newton"):
        peers.dattri_influence(
            net.model, net.objective.data, net.query, cross_entropy, l2=0.1, method="newton"
        )
    pytest.importorskip("captum")
    with pytest.raises(UserError, match="a learning rate per checkpoint"):
        peers.captum_tracin(
            net.model,
            net.objective.data,
            net.query,
            cross_entropy,
            checkpoints=[],
            learning_rates=[],
        )
