"""The noise is what the accountant is told, and the accountant says what published ones say."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from projects.flashdp import FixedSampling, PoissonSampling, noise_multiplier
from projects.flashdp.accounting import Mechanism, epsilon
from projects.flashdp.noise import grid
from projects.flashdp.sampling import micro_batches
from shared.errors import UserError

WIDE, TALL = 331, 317  # more than 1e5 coordinates a weight


def wide():
    """Three layers, of which two weights have as many coordinates."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDE, TALL),
        nn.Linear(TALL, WIDE, bias=False),
        nn.LayerNorm(WIDE),
        nn.Linear(WIDE, 3),
    )


def every_kind():
    """Every layer there is a rule for."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.pytorch_utils import Conv1D

    norms = (nn.LayerNorm(40), nn.RMSNorm(40), LlamaRMSNorm(40))
    return nn.Sequential(
        nn.Embedding(50, 40, padding_idx=0), *norms, Conv1D(30, 40), nn.Linear(30, 20)
    )


def noise_of(model, optimizer):
    """The gradients of a step without data."""
    optimizer.zero_grad()
    optimizer.step()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


# ---- the noise -----------------------------------------------------------------------------------

BOUNDS = {"0": 0.5, "1": 2.0, "2": 0.1, "3": 1.0}
DELTA = math.sqrt(0.25 + 4 + 0.01 + 1)


@pytest.mark.parametrize(
    ("allocation", "deviations"),
    [
        ("uniform", dict.fromkeys("0123", 1.3 * DELTA)),
        # sqrt(4) = 2 groups
        ("equal", {group: 1.3 * 2 * bound for group, bound in BOUNDS.items()}),
    ],
)
def test_the_deviation_is_the_stated_one_over_the_expected_batch_size(
    allocation, deviations, helpers
):
    model = wide()
    options = {
        "noise_multiplier": 1.3,
        "clip": BOUNDS,
        "noise_allocation": allocation,
        "expected": 8.5,
    }
    dp, optimizer = helpers.wrap(model, **options)
    assert dp.sensitivity == pytest.approx(DELTA)
    found = noise_of(model, optimizer)
    for name in ("0.weight", "1.weight"):
        assert found[name].numel() > 1e5
        wanted = deviations[name[0]] / 8.5
        assert float(found[name].double().square().mean().sqrt()) == pytest.approx(wanted, rel=0.01)
        assert abs(float(found[name].double().mean())) < 4 * wanted / math.sqrt(found[name].numel())
    for name in ("0.bias", "2.weight", "2.bias", "3.weight"):  # a few hundred coordinates
        assert float(found[name].double().square().mean().sqrt()) == pytest.approx(
            deviations[name[0]] / 8.5, rel=0.2
        )


@pytest.mark.parametrize("groups", ["layer", "parameter"])
@pytest.mark.parametrize("allocation", ["uniform", "equal"])
def test_with_even_bounds_the_deviation_is_sigma_times_the_total_bound(groups, allocation, helpers):
    """Not sigma * C * sqrt(L), and not sigma * C / sqrt(L)."""
    model = wide()
    options = {
        "noise_multiplier": 0.8,
        "clip": 1.7,
        "groups": groups,
        "noise_allocation": allocation,
        "expected": 5,
    }
    _, optimizer = helpers.wrap(model, **options)
    found = noise_of(model, optimizer)
    for name in ("0.weight", "1.weight"):
        assert float(found[name].double().square().mean().sqrt()) == pytest.approx(
            0.8 * 1.7 / 5, rel=0.01
        )


@pytest.mark.parametrize("groups", ["layer", "parameter"])
def test_both_allocations_are_one_gaussian_mechanism_with_the_stated_multiplier(groups, helpers):
    for allocation, clip in itertools.product(("uniform", "equal"), (0.3, BOUNDS)):
        if groups == "parameter" and clip is BOUNDS:
            clip = {"0.*": 0.5, "1.*": 2.0, "*.bias": 0.2, "*": 1.0}
        dp, _ = helpers.wrap(
            wide(), noise_multiplier=1.7, clip=clip, groups=groups, noise_allocation=allocation
        )
        assert sum((group.bound / group.noise) ** 2 for group in dp.groups) == pytest.approx(
            1.7**-2, rel=1e-12
        )


def test_the_noise_is_gaussian(helpers):
    model = wide()
    _, optimizer = helpers.wrap(model, noise_multiplier=1.0, clip=1.0, expected=4)
    found = noise_of(model, optimizer)
    for name in ("0.weight", "1.weight"):
        standard = found[name].double().flatten().numpy() * 4
        # what the rounding took, or the test would see the grid
        standard += grid(1.0) * np.random.default_rng(0).uniform(-0.5, 0.5, len(standard))
        assert scipy.stats.kstest(standard, "norm").pvalue > 0.01
        assert abs(scipy.stats.skew(standard)) < 0.03
        assert abs(scipy.stats.kurtosis(standard)) < 0.06


def test_the_noise_of_layers_and_of_steps_is_uncorrelated(helpers):
    model = wide()
    _, optimizer = helpers.wrap(model, noise_multiplier=1.0, clip=1.0)
    steps = [noise_of(model, optimizer) for _ in range(3)]
    flat = [one[name].flatten() for one in steps for name in ("0.weight", "1.weight")]
    correlations = torch.corrcoef(torch.stack(flat).double()) - torch.eye(
        len(flat), dtype=torch.float64
    )
    assert float(correlations.abs().max()) < 4.5 / math.sqrt(flat[0].numel())
    halves = flat[0][: flat[0].numel() // 2 * 2].view(2, -1).double()
    assert abs(float(torch.corrcoef(halves)[0, 1])) < 4.5 / math.sqrt(halves.shape[1])


def test_no_part_of_a_large_tensor_repeats_another(helpers):
    """Noise may be drawn piece by piece; a million coordinates are more than a piece, and an odd
    number of them is no multiple of one.
    """
    model = nn.Sequential(nn.Linear(1031, 997, bias=False))
    _, optimizer = helpers.wrap(model, noise_multiplier=1.0, clip=1.0, expected=2)
    noise = noise_of(model, optimizer)["0.weight"].flatten().double()
    assert float(noise.square().mean().sqrt()) == pytest.approx(0.5, rel=0.005)
    assert len(noise.float().unique()) > 100  # of the grid
    for tail in (1, 15, 16, 100):
        assert (noise[-tail:] != 0).double().mean() > 0.8  # one in 40 is rounded to 0
    for power in range(12, 20):  # pieces of any size that is likely
        correlation = float(
            torch.corrcoef(torch.stack([noise[: -(1 << power)], noise[1 << power :]]))[0, 1]
        )
        assert abs(correlation) < 5 / math.sqrt(len(noise) - (1 << power))


def test_a_parameter_that_is_not_contiguous_is_trained_as_its_copy_is(helpers):
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    found = []
    for contiguous in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 14))
        if not contiguous:
            model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
            assert not model[0].weight.is_contiguous()
        _, optimizer = helpers.wrap(model, noise_multiplier=1.0, clip=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            for rows in x.split(4):
                model(rows).square().sum().backward()
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(float((a - b).abs().max()) <= 1e-6 for a, b in zip(*found, strict=True))


def test_a_stage_of_a_pipeline_has_the_noise_of_the_whole_model(helpers):
    stage = nn.Sequential(nn.Linear(WIDE, TALL))
    dp, optimizer = helpers.wrap(
        stage, noise_multiplier=0.6, clip={"*": 0.5}, sensitivity=2.0, stage=0, expected=3
    )
    assert dp.sensitivity == 2
    assert float(
        noise_of(stage, optimizer)["0.weight"].double().square().mean().sqrt()
    ) == pytest.approx(0.6 * 2 / 3, rel=0.01)


def test_stages_with_one_key_have_different_noise(helpers):
    stages = [nn.Sequential(nn.Linear(WIDE, TALL)) for _ in range(2)]
    found = []
    for number, stage in enumerate(stages):
        _, optimizer = helpers.wrap(stage, noise_multiplier=1.0, sensitivity=2.0, stage=number)
        found.append(noise_of(stage, optimizer)["0.weight"])
    assert abs(float(torch.corrcoef(torch.stack([one.flatten() for one in found]))[0, 1])) < 0.02


def test_what_is_accounted_for_is_what_is_added(helpers):
    """Noise, sensitivity and bounds are those of the beginning; nothing can set them apart from the
    noise.
    """
    dp, _ = helpers.wrap(wide(), noise_multiplier=1.0)
    for change in (
        lambda: setattr(dp, "noise_multiplier", 10.0),
        lambda: setattr(dp, "sensitivity", 0.1),
        lambda: setattr(dp.groups[0], "bound", 50.0),
        lambda: setattr(dp.groups[0], "noise", 0.0),
    ):
        with pytest.raises(AttributeError):
            change()


def test_every_trainable_tensor_has_its_noise(helpers):
    for batches in (0, 1, 3):  # none: an empty batch
        model = every_kind()
        dp, optimizer = helpers.wrap(model, noise_multiplier=1.0, clip=1.0, expected=2)
        quiet = every_kind()
        quiet.load_state_dict(model.state_dict())
        _, without = helpers.wrap(quiet, clip=1.0, expected=2)
        for seed, one in itertools.product(range(batches), (model, quiet)):
            one(
                torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(seed))
            ).square().sum().backward()
        optimizer.step()
        without.step()
        assert dp.steps == 1
        for (name, p), q in zip(model.named_parameters(), quiet.parameters(), strict=True):
            noise = (p.grad - q.grad).double()
            assert float((noise != 0).double().mean()) > 0.9, name
            assert float(noise.square().mean().sqrt()) == pytest.approx(0.5, rel=0.5), name


def test_noise_is_added_once_however_many_micro_batches(helpers):
    found = []
    for parts in (1, 2, 7):
        model = wide()
        _, optimizer = helpers.wrap(model, noise_multiplier=1.0, clip=1e-3)
        for rows in torch.randn(7, WIDE, generator=torch.Generator().manual_seed(1)).tensor_split(
            parts
        ):
            model(rows).square().sum().backward()
        optimizer.step()
        found.append([p.grad.clone() for p in model.parameters()])
    for other in found[1:]:
        assert all(float((a - b).abs().max()) <= 1e-7 for a, b in zip(other, found[0], strict=True))


def test_the_noise_comes_with_the_clipped_sum_and_not_in_place_of_it(helpers):
    sums = []
    x = torch.randn(6, WIDE, generator=torch.Generator().manual_seed(1))
    for sigma in (0.0, 0.5):
        model = wide()
        _, optimizer = helpers.wrap(model, noise_multiplier=sigma, clip=1.0, expected=3)
        model(x).square().sum().backward()
        optimizer.step()
        sums.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model = wide()
    _, optimizer = helpers.wrap(model, noise_multiplier=0.5, clip=1.0, expected=3)
    noise = noise_of(model, optimizer)
    # rounded together or apart: a step of the grid
    step = grid(0.5) / 3
    assert all(torch.allclose(sums[1][n], sums[0][n] + noise[n], atol=1.01 * step) for n in noise)


def test_an_empty_batch_is_a_step_of_pure_noise_and_counted(helpers):
    model = wide()
    dp, optimizer = helpers.wrap(model, noise_multiplier=1.0, clip=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert dp.steps == 1
    assert all(bool((p != q).any()) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert dp.steps == 2


# ---- seeds ---------------------------------------------------------------------------------------


def _noise_with(seed, helpers, steps=1):
    model = wide()
    _, optimizer = helpers.wrap(model, noise_multiplier=1.0, noise_seed=seed)
    return [noise_of(model, optimizer) for _ in range(steps)]


def test_the_same_seed_gives_the_same_bits_and_another_one_others(helpers):
    torch.manual_seed(5)
    one = _noise_with(11, helpers, 2)
    torch.manual_seed(6)
    again = _noise_with(11, helpers, 2)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(one, again, strict=True) for n in a)
    # torch's own seeds on a CPU have 32 bits
    for other in (12, 11 + 2**32, 11 + 2**64, 11 + 2**255):
        found = _noise_with(other, helpers)[0]
        assert (
            abs(
                float(
                    torch.corrcoef(
                        torch.stack([one[0]["0.weight"].flatten(), found["0.weight"].flatten()])
                    )[0, 1]
                )
            )
            < 0.015
        )


def test_noise_is_a_function_of_the_key_and_all_its_bits_count(helpers):
    def first(key, data=b"records"):
        model = wide()
        secret = {"noise_seed": None, "key": key, "data": data}
        dp, optimizer = helpers.wrap(model, noise_multiplier=1.0, **secret)
        assert "seed of the noise" not in str(dp.report(1e-5))
        return noise_of(model, optimizer)["0.weight"].flatten()

    key = bytes(range(32))
    one = first(key)
    assert torch.equal(one, first(key))
    # nor do other records get the noise of these: their difference would have none
    assert not torch.equal(one, first(key, b"other records"))
    for place in (0, 15, 31):
        other = first(key[:place] + bytes([key[place] ^ 1]) + key[place + 1 :])
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.015


def test_without_a_seed_two_runs_differ(helpers):
    torch.manual_seed(5)
    one = _noise_with(None, helpers)[0]
    torch.manual_seed(5)
    other = _noise_with(None, helpers)[0]
    assert (
        abs(
            float(
                torch.corrcoef(
                    torch.stack([one["0.weight"].flatten(), other["0.weight"].flatten()])
                )[0, 1]
            )
        )
        < 0.015
    )


def test_noise_takes_nothing_from_the_global_generator(helpers):
    model = wide()
    _, optimizer = helpers.wrap(model, noise_multiplier=1.0)
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_continued_run_has_the_noise_of_the_uninterrupted_one(helpers):
    whole = _noise_with(4, helpers, 4)
    model = wide()
    dp, optimizer = helpers.wrap(model, noise_multiplier=1.0, noise_seed=4)
    for _ in range(2):
        noise_of(model, optimizer)
    state = dp.state_dict()
    model = wide()
    dp, optimizer = helpers.wrap(model, noise_multiplier=1.0, noise_seed=4)
    dp.load_state_dict(state)
    for wanted in whole[2:]:
        found = noise_of(model, optimizer)
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert dp.steps == 4


def test_going_back_to_an_earlier_state_does_not_bring_back_its_noise(helpers):
    model = wide()
    dp, optimizer = helpers.wrap(model, noise_multiplier=1.0, noise_seed=None)
    state = dp.state_dict()
    first = noise_of(model, optimizer)
    dp.load_state_dict(state)
    assert dp.steps == 1  # its release is not taken back
    second = noise_of(model, optimizer)["0.weight"]
    assert dp.steps == 2
    assert not torch.equal(second, first["0.weight"])
    key = dp._key
    model = wide()
    later, optimizer = helpers.wrap(
        model, noise_multiplier=1.0, noise_seed=None, key=key, data=b"records"
    )
    # another process, back at the beginning
    later.load_state_dict({**dp.state_dict(), "history": []})
    third = noise_of(model, optimizer)["0.weight"]
    assert not any(torch.equal(third, one) for one in (first["0.weight"],))


# ---- accounting ----------------------------------------------------------------------------------


def spent(sigma, accountant="rdp", rate=0.01, steps=1000, delta=1e-5):
    return epsilon([Mechanism(sigma, rate, steps)], delta, accountant)


@pytest.mark.parametrize(
    ("accountant", "sigma", "wanted"),
    [
        *(("rdp", 1.0, 2.101), ("rdp", 0.8655, 2.992), ("pld", 1.0, 1.828), ("pld", 0.8655, 2.551)),
        *(
            ("rdp", 1.5234, 1.0),
            ("rdp", 0.6158, 8.0),
            ("prv", 1.4258, 1.0),
            ("prv", 0.8154, 3.0),
            ("prv", 0.5865, 8.0),
        ),
    ],
)
def test_epsilon_at_points_of_reference(accountant, sigma, wanted):
    assert spent(sigma, accountant) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(
    ("accountant", "target", "sigma"),
    [
        *(("rdp", 1.0, 1.523), ("rdp", 3.0, 0.8655), ("rdp", 8.0, 0.6158)),
        *(("prv", 1.0, 1.4258), ("prv", 3.0, 0.8154), ("prv", 8.0, 0.5865)),
        ("pld", 1.828, 1.0),
    ],
)
def test_the_multiplier_for_a_target_keeps_it_and_hardly_more(accountant, target, sigma):
    found = noise_multiplier(target, 1e-5, 0.01, 1000, accountant)
    assert target - 0.02 <= spent(found, accountant) <= target
    assert spent(found, accountant) == pytest.approx(spent(sigma, accountant), abs=0.02)


@pytest.mark.parametrize(
    ("target", "steps", "rate", "sigma"),
    # with the default of dp-accounting at an interval of 1e-6, by hand
    [(0.1, 1000, 0.01, 9.797), (0.01, 1000, 0.01, 77.13), (0.604, 100_000, 0.001, 2.0)],
)
def test_at_a_small_epsilon_or_many_steps_the_multiplier_is_right_too(target, steps, rate, sigma):
    found = noise_multiplier(target, 1e-5, rate, steps, "pld")
    assert found == pytest.approx(sigma, rel=5e-4)
    assert spent(found, "pld", rate=rate, steps=steps) <= target


@pytest.mark.parametrize(("accountant", "most"), [("rdp", 12), ("prv", 10.5)])
def test_a_small_epsilon_is_reached_by_every_accountant(accountant, most):
    found = noise_multiplier(0.1, 1e-5, 0.01, 1000, accountant)
    assert 9.79 < found < most
    assert spent(found, accountant) <= 0.1


def test_high_orders_are_those_of_opacus():
    from opacus.accountants.analysis.rdp import compute_rdp

    from projects.flashdp.accounting import _renyi

    for rate, sigma, order in ((0.01, 1.5, 64), (0.2, 3.0, 100), (1.0, 4.0, 80), (1e-4, 20.0, 300)):
        wanted = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])
        assert _renyi(Mechanism(sigma, rate, 1), order) == pytest.approx(float(wanted[0]), rel=1e-6)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_epsilon_falls_with_noise_and_grows_with_rate_steps_and_certainty(accountant):
    def falls(values):
        return all(a > b for a, b in itertools.pairwise(values))

    assert falls([spent(s, accountant, steps=200) for s in (0.7, 1.0, 2.0)])
    assert falls([spent(1.0, accountant, rate=q, steps=200) for q in (0.1, 0.03, 0.01)])
    assert falls([spent(1.0, accountant, steps=n) for n in (2000, 500, 100)])
    assert falls([spent(1.0, accountant, steps=200, delta=d) for d in (1e-8, 1e-6, 1e-4)])


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_a_history_in_parts_composes(accountant):
    whole = spent(1.0, accountant, steps=300)
    parts = [Mechanism(1.0, 0.01, 100), Mechanism(1.0, 0.01, 199), Mechanism(1.0, 0.01, 1)]
    assert epsilon(parts, 1e-5, accountant) == pytest.approx(whole, abs=0.02)
    mixed = [Mechanism(1.0, 0.01, 150), Mechanism(2.0, 0.02, 150)]
    assert epsilon(mixed, 1e-5, accountant) == pytest.approx(
        epsilon(mixed[::-1], 1e-5, accountant), abs=0.02
    )
    assert epsilon(mixed, 1e-5, accountant) > spent(1.0, accountant, steps=150)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_the_accountants_keep_a_plain_gaussian_mechanism(accountant):
    """At rate 1, n steps are one Gaussian mechanism of multiplier sigma / sqrt(n), whose curve has
    a closed form.
    """
    for sigma, steps in ((2.0, 1), (4.0, 9)):
        mu = math.sqrt(steps) / sigma
        found = spent(sigma, accountant, rate=1.0, steps=steps)
        cdf = scipy.stats.norm.cdf
        exact = cdf(-found / mu + mu / 2) - math.exp(found) * cdf(-found / mu - mu / 2)
        assert exact <= 1e-5 * 1.01
        assert found < (1.35 if accountant == "rdp" else 1.05) * _gaussian_epsilon(mu, 1e-5)


def _gaussian_epsilon(mu, delta):
    from scipy.optimize import brentq

    def excess(e):
        return (
            scipy.stats.norm.cdf(-e / mu + mu / 2)
            - math.exp(e) * scipy.stats.norm.cdf(-e / mu - mu / 2)
            - delta
        )

    return brentq(excess, 0, 60)


def test_epsilon_is_infinite_without_noise_and_zero_without_steps(helpers):
    assert spent(0.0) == math.inf
    assert epsilon([Mechanism(1.0, 0.01, 500), Mechanism(0.0, 0.01, 1)], 1e-5) == math.inf
    assert epsilon([], 1e-5) == 0
    dp, optimizer = helpers.wrap(wide(), noise_multiplier=0.0)
    assert dp.epsilon(1e-5) == 0
    optimizer.step()
    assert dp.epsilon(1e-5) == math.inf
    assert dp.report(1e-5).epsilon == math.inf


def test_an_accountant_that_gives_out_does_not_say_zero(monkeypatch):
    from projects.flashdp import accounting

    monkeypatch.setitem(accounting.ACCOUNTANTS, "rdp", lambda history, delta: float("nan"))
    try:
        found = epsilon([Mechanism(1.0, 0.01, 1)], 1e-5)
    except UserError:
        return
    assert found == math.inf or math.isnan(found)


def test_a_run_is_accounted_step_by_step(helpers):
    model = wide()
    dp, optimizer = helpers.wrap(model, noise_multiplier=1.1, size=500, expected=5)
    for step in range(7):
        optimizer.zero_grad()
        batch = dp.sampling.batch(1, step)
        model(torch.ones(len(batch), WIDE)).sum().backward()
        optimizer.step()
    assert dp.history == [Mechanism(1.1, 0.01, 7)]
    assert dp.epsilon(1e-5) == spent(1.1, steps=7)
    state = dp.state_dict()
    other, _ = helpers.wrap(wide(), noise_multiplier=1.1, size=500, expected=5)
    other.load_state_dict(state)
    assert other.history == dp.history
    louder, again = helpers.wrap(wide(), noise_multiplier=0.9, size=500, expected=5)
    louder.load_state_dict(state)
    again.step()
    assert louder.history == [Mechanism(1.1, 0.01, 7), Mechanism(0.9, 0.01, 1)]


def test_the_report_says_all_that_the_guarantee_rests_on(helpers):
    model = wide()
    dp, optimizer = helpers.wrap(
        model, noise_multiplier=1.25, clip=0.75, size=400, expected=3, noise_seed=None
    )
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step()
    report = dp.report(1e-6, "prv")
    assert (report.epsilon, report.delta, report.accountant) == (
        dp.epsilon(1e-6, "prv"),
        1e-6,
        "prv",
    )
    text = str(report)
    for part in (
        f"{report.epsilon:.3f}",
        "1e-06",
        "1.25",
        "0.0075",
        "3 steps",
        "prv",
        "400 records",
        "0.75",
        "4 groups",
    ):
        assert part in text
    for assumption in (
        "one record",
        "drawn on its own",
        "depends on that sample alone",
        "losses, norms",
        "AES-256",
    ):
        assert any(assumption in one for one in report.assumptions)
        assert assumption in text
    assert "seed" not in text
    seeded, step = helpers.wrap(wide(), noise_multiplier=1.0, noise_seed=0)
    step.step()
    assert "seed of the noise was given" in str(seeded.report(1e-6))


# ---- sampling ------------------------------------------------------------------------------------


def test_poisson_batches_have_the_rate_and_independent_members():
    sampling = PoissonSampling(200, 6.0)
    drawn = np.zeros((3000, 200), dtype=bool)
    for step in range(3000):
        batch = sampling.batch(1, step)
        assert (np.diff(batch) > 0).all()
        drawn[step, batch] = True
    sizes, q = drawn.sum(1), 0.03
    assert sampling.sample_rate == q
    assert abs(drawn.mean() - q) < 4 * math.sqrt(q * (1 - q) / drawn.size)
    assert sizes.var() == pytest.approx(200 * q * (1 - q), rel=0.1)  # a fixed size would have none
    of_each = drawn.sum(0)
    assert of_each.var() == pytest.approx(3000 * q * (1 - q), rel=0.4)
    expected = scipy.stats.binom(200, q).pmf(np.arange(15)) * 3000
    kept = expected > 20
    counts = np.array([(sizes == k).sum() for k in range(15)])[kept]
    assert (
        scipy.stats.chisquare(counts, expected[kept] * counts.sum() / expected[kept].sum()).pvalue
        > 0.001
    )
    pairs = np.corrcoef(drawn.astype(float).T) - np.eye(200)
    assert abs(pairs).max() < 6 / math.sqrt(3000)
    later = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert abs(later) < 4.5 / math.sqrt(drawn[1:].size)


def test_poisson_batches_may_be_empty_or_everything():
    assert any(len(PoissonSampling(20, 0.5).batch(0, step)) == 0 for step in range(50))
    assert len(PoissonSampling(7, 7).batch(0, 3)) == 7


def test_a_batch_is_a_pure_function_of_seed_and_step():
    for sampling in (PoissonSampling(90, 9), FixedSampling(90, 9)):
        np.random.default_rng(0)
        forwards = [sampling.batch(3, step) for step in range(25)]
        backwards = [sampling.batch(3, step) for step in reversed(range(25))][::-1]
        assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
        assert not all(
            np.array_equal(a, sampling.batch(4, step)) for step, a in enumerate(forwards)
        )
        assert len({tuple(a) for a in forwards}) == 25


def test_fixed_batches_go_through_the_data_in_passes():
    sampling = FixedSampling(10, 3)
    for start in (0, 3):
        seen = np.concatenate([sampling.batch(0, step) for step in range(start, start + 3)])
        assert len(set(seen)) == 9


def test_micro_batches_hold_every_sample_once():
    batch = PoissonSampling(100, 20).batch(0, 0)
    parts = list(micro_batches(batch, 6))
    assert np.array_equal(np.concatenate(parts), batch)
    assert max(map(len, parts)) <= 6
    assert list(micro_batches(batch[:0], 6)) == []


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_fixed_batches_never_have_an_epsilon(accountant, helpers):
    dp, optimizer = helpers.wrap(wide(), noise_multiplier=1.0, sampling=FixedSampling(100, 4))
    for _ in range(2):
        for ask in (dp.epsilon, dp.report):
            with pytest.raises(UserError, match=r"fixed size.*PoissonSampling") as caught:
                ask(1e-5, accountant)
            assert "\n" not in str(caught.value)
        optimizer.zero_grad()
        optimizer.step()


def test_steps_with_fixed_batches_are_not_forgotten_when_a_run_goes_on_with_poisson(helpers):
    dp, optimizer = helpers.wrap(wide(), noise_multiplier=1.0, sampling=FixedSampling(100, 4))
    optimizer.step()
    later, _ = helpers.wrap(wide(), noise_multiplier=1.0)
    try:
        later.load_state_dict(dp.state_dict())
        found = later.epsilon(1e-5)
    except UserError:
        return
    assert found == math.inf
