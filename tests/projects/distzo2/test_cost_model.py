"""The cost model against what it models: counted operations and bytes, real lanes that wait, rates
that are known.
"""

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from projects.distzo2 import cost_model, tables
from projects.distzo2.command import main
from projects.distzo2.cost_model import (
    Lanes,
    Plan,
    Rates,
    Shape,
    busiest,
    fit,
    gpu_rates,
    predictions,
    schedule,
    sliced_compute_share,
)
from projects.distzo2.labels import MODES
from projects.distzo2.shapes import shape_of_model
from projects.zo2 import ZO2
from projects.zo2.data import random_tokens
from projects.zo2.lanes import Pager
from shared.errors import UserError
from shared.meters import count_flops
from shared.models import causal_lm_config, empty_causal_lm_of, random_causal_lm


def shape_of_config(config):
    """Of a transformers configuration."""
    return shape_of_model(empty_causal_lm_of(config))


def _beside(name: str):
    specification = importlib.util.spec_from_file_location(
        f"distzo2_{name}", Path(__file__).with_name(f"{name}.py")
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


make_cost = _beside("modelled").make_cost
RATES = Rates(2e-11, 5e-9, 3e-4, 1e-10, 4e-10, 2e-3)
SMALL = causal_lm_config("llama", 3, 48, 4, 101)


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 7), (3, 13)])
def test_operations_are_those_that_are_counted(family, rows, tokens):
    config = causal_lm_config(family, 3, 48, 4, 101, positions=32)
    shape = shape_of_config(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    counted = count_flops(lambda: model(input_ids=ids))
    assert counted == shape.blocks * shape.block_flops(rows, tokens) + shape.head_flops(
        rows, tokens
    )


@pytest.mark.parametrize("size", [(3, 48, 4, 101), (2, 256, 8, 2048), (1, 24, 2, 7)])
def test_the_llama_shapes_are_those_of_the_models(size):
    assert Shape.llama(*size) == shape_of_config(causal_lm_config("llama", *size))


def test_parameters_of_opt_are_those_of_its_formula():
    h, vocabulary = 12288, 50272
    shape = shape_of_config(causal_lm_config("opt", 96, h, 96))
    assert shape.blocks == 96
    assert shape.parameters == 12 * h**2 + 13 * h
    assert shape.matrix == 12 * h**2
    assert shape.head == vocabulary * h
    # two embeddings, positions, the last norm
    assert shape.resident == 2 * vocabulary * h + 2050 * h + 2 * h
    assert shape.blocks * shape.parameters + shape.resident == pytest.approx(175e9, rel=0.01)
    tied = shape_of_config(causal_lm_config("opt", 2, 64, 4, 100, tied=True))
    assert tied.resident == 100 * 64 + 2050 * 64 + 2 * 64


def test_blocks_that_are_not_alike_are_refused(monkeypatch):
    odd = AutoModelForCausalLM.from_config(SMALL)
    odd.model.layers[1].mlp = torch.nn.Linear(2, 2)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: odd)
    with pytest.raises(UserError, match="blocks are alike"):
        shape_of_config(SMALL)


def test_bytes_are_those_that_the_engine_moves():
    config = causal_lm_config("llama", 4, 64, 4, 101)
    engine = ZO2(random_causal_lm(config), storage="ram", lr=1e-3)
    before = []
    for step in range(3):
        engine.step(random_tokens(101, 1, 8, 1, step)[0])
        before.append((engine.traffic.bytes_up, engine.traffic.bytes_down))
    wanted = Plan().host_bytes(shape_of_config(config), 4)
    assert [b - a for a, b in zip(before[1], before[2], strict=True)] == [wanted, wanted]
    engine.close()


def test_slices_divide_the_link_and_meet_in_the_exchange():
    shape = shape_of_config(SMALL)
    whole = shape.blocks * shape.parameters * 2
    for ranks, dp, pert in ((2, 2, 1), (2, 1, 2), (3, 3, 1), (8, 4, 2)):
        sliced = Plan(dp, pert, "sliced")
        assert sliced.host_bytes(shape, 2) == pytest.approx(whole / ranks)
        assert sliced.exchanged_bytes(shape, 2) == pytest.approx(whole * (ranks - 1) / ranks)
        assert Plan(dp, pert).host_bytes(shape, 2) == whole
        assert Plan(dp, pert).exchanged_bytes(shape, 2) == 0
    alone, sliced = (
        plan.lanes(shape, RATES, [(1, 8)] * 4, 2) for plan in (Plan(2), Plan(2, 1, "sliced"))
    )
    assert (
        sliced.upload
        == sliced.offload
        == pytest.approx(alone.upload / 2)
        == pytest.approx(whole / 3 / 2 * 1e-10)
    )
    assert alone.exchange == 0
    assert sliced.exchange == pytest.approx(whole / 3 / 2 * 4e-10)
    assert alone.compute == sliced.compute


def test_a_mode_divides_forwards_and_not_noise():
    shape, batches = shape_of_config(SMALL), [(2, 9)] * 4
    alone = Plan().work(shape, batches, 2)
    assert alone["draws"] == 2 * 3 * shape.parameters + 4 * shape.resident
    assert alone["calls"] == 2 * 4 * 4
    for plan, part in ((Plan(1, 2), 2), (Plan(2), 2), (Plan(4), 4), (Plan(2, 2), 4)):
        found = plan.work(shape, batches, 2)
        assert found["flops"] == alone["flops"] / part
        assert found["calls"] == alone["calls"] / part
        assert found["draws"] == alone["draws"]
    # the fullest share has two of four
    assert Plan(3).work(shape, batches, 2)["flops"] == alone["flops"] / 2
    assert Plan().work(shape, batches, 4)["draws"] == 4 * (3 * shape.parameters + shape.resident)


def test_the_lanes_of_a_step_are_its_work_at_the_rates():
    shape, batches = shape_of_config(SMALL), [(2, 9), (2, 9)]
    for plan in (Plan(), Plan(1, 2), Plan(2, 2)):
        work, lanes = plan.work(shape, batches, 2), plan.lanes(shape, RATES, batches, 4)
        wanted = (
            2e-11 * work["flops"]
            + 5e-9 * work["draws"]
            + 3e-4 * work["calls"]
            + (2e-3 if plan.ranks > 1 else 0)
        )
        assert shape.blocks * lanes.compute + lanes.outside == pytest.approx(wanted)
    device = Plan(slots=5).device_bytes(shape, 2, 2), Plan(slots=5).device_bytes(shape, 2, 4)
    assert device == (
        2 * (6 * shape.parameters + shape.resident),
        2 * (5 * shape.parameters + shape.resident),
    )


# ---- the schedule --------------------------------------------------------------------------------


def test_the_slowest_lane_sets_the_pace():
    assert schedule(Lanes(1, 0, 5, 1, 2), 7).step == pytest.approx(7 * 5 + 2)
    assert schedule(Lanes(5, 0, 1, 1, 1), 40).step == pytest.approx(40 * 5, rel=0.02)
    assert schedule(Lanes(1, 0, 1, 5, 1), 40).step == pytest.approx(40 * 5, rel=0.02)
    found = schedule(Lanes(2, 3, 40, 4, 0), 5)
    assert found.fill == 5
    assert found.drain == pytest.approx(4)


def test_one_slot_makes_lanes_take_turns():
    assert schedule(Lanes(1, 2, 3, 4, 0), 6, slots=1).step == pytest.approx(6 * 10)
    assert schedule(Lanes(1, 2, 3, 4, 50), 6, slots=1).step == pytest.approx(
        6 * 10 + 50 - 4 - 1 - 2
    )  # beside the last drain and first upload


def test_four_lanes_want_a_fourth_slot():
    """With three, the next upload begins when the block before it does, so that upload and exchange
    follow one another.
    """
    lanes = Lanes(3, 3, 4, 3, 0)
    assert schedule(lanes, 24, slots=3).step == pytest.approx(24 * 6)
    assert schedule(lanes, 24, slots=4).step == pytest.approx(24 * 4)


# ---- rates ---------------------------------------------------------------------------------------


def _steps(shapes: dict[str, Shape], rates: Rates) -> pd.DataFrame:
    cases = [("a", 8, 2), ("a", 64, 2), ("b", 8, 3), ("b", 32, 1)]
    rows = [{"shape": s, "tokens": t, "batch_size": 2, "shares": m} for s, t, m in cases]
    return pd.DataFrame(
        [
            row
            | {
                "step_seconds": Plan().step_seconds(
                    shapes[row["shape"]], rates, cost_model.batches_of(row)
                )
            }
            for row in rows
        ]
    )


def test_rates_that_are_known_are_found():
    shapes = {
        "a": shape_of_config(SMALL),
        "b": shape_of_config(causal_lm_config("llama", 2, 96, 4, 101)),
    }
    wanted = Rates(2e-11, 5e-9, 3e-4)
    found = fit(_steps(shapes, wanted), shapes)
    for name in ("seconds_per_flop", "seconds_per_draw", "seconds_per_call"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-6)
    without = fit(_steps(shapes, replace(wanted, seconds_per_call=0.0)), shapes)
    assert 0 <= without.seconds_per_call < 1e-9  # a rate is never below nothing
    with pytest.raises(UserError, match="three kinds of steps"):
        fit(_steps(shapes, wanted)[:2], shapes)


def test_a_gpu_is_known_or_named():
    one, four = gpu_rates("a100-sxm", 1), gpu_rates("a100-sxm", 4)
    assert one == four  # a link each
    assert gpu_rates("a100-sxm", 4, links=1).seconds_per_host_byte == pytest.approx(
        4 * one.seconds_per_host_byte
    )
    assert gpu_rates("a100-sxm", 4, links=2).seconds_per_host_byte == pytest.approx(
        2 * one.seconds_per_host_byte
    )
    assert gpu_rates("a100-sxm", 1, links=2) == one
    assert one.seconds_per_flop == pytest.approx(1 / 156e12)
    assert one.seconds_per_host_byte == pytest.approx(1 / 25.6e9)
    assert gpu_rates("a100-sxm", 1, host_link=10).seconds_per_host_byte == pytest.approx(1 / 8e9)
    assert gpu_rates("a100-sxm", 1, exchange=10).seconds_per_exchanged_byte == pytest.approx(
        1 / 8e9
    )
    assert (cost_model.hardware()["source"].str.len() > 20).all()
    with pytest.raises(UserError, match="no GPU 'b300'; there are: a100-sxm"):
        gpu_rates("b300", 1)


def test_the_busiest_lane_and_what_slicing_leaves_it():
    assert (
        busiest(Lanes(5, 1, 2, 1, 1), 10) == busiest(Lanes(1, 1, 2, 5, 1), 10) == "link to the host"
    )
    assert busiest(Lanes(1, 5, 2, 1, 1), 10) == "exchange"
    assert busiest(Lanes(5, 1, 4, 1, 11), 10) == "computing"
    shape, batches = shape_of_config(SMALL), [(1, 8)] * 4
    whole, sliced = (
        Plan(4, 1, transfer).lanes(shape, RATES, batches, 4)
        for transfer in ("replicated", "sliced")
    )
    wanted = sliced.compute / (sliced.compute + sliced.upload + sliced.offload)
    assert sliced_compute_share(whole.compute, whole.upload + whole.offload, 4) == pytest.approx(
        wanted
    )


# ---- predictions ---------------------------------------------------------------------------------


def test_steps_that_keep_to_the_model_are_predicted_and_others_are_not():
    found, rates = predictions(pd.DataFrame(make_cost()), MODES)
    assert found["error_ratio"].abs().max() < 1e-6
    assert set(found["kind"]) == {"fit", "held out"}
    assert {"PertP, sliced", "DDP"} <= set(found["mode"])
    assert (found["link_gigabytes_per_second"] > 0).any()
    assert rates[2].seconds_per_flop == pytest.approx(2 * rates[1].seconds_per_flop)
    off = predictions(pd.DataFrame(make_cost(held_out=1.25)), MODES)[0].set_index("kind")[
        "error_ratio"
    ]
    assert off["held out"].tolist() == pytest.approx([-0.2] * len(off["held out"]))
    assert off["fit"].abs().max() < 1e-6


def test_the_slower_rank_is_the_step_and_the_faster_one_has_not_waited():
    rows = pd.DataFrame(make_cost())
    rank = rows["rank"] == 1
    rows.loc[rank, "step_seconds"] *= 0.5
    rows.loc[rank, "exchange_busy_seconds"] *= 3
    assert predictions(rows, MODES)[0]["error_ratio"].abs().max() < 1e-6


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_predicts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", "--model", "opt-1.3b", "--gpus", "4", "--links", "1", "--batch", "8"]) == 0
    said = capsys.readouterr().out
    shape, batches = shape_of_config(causal_lm_config("opt", 24, 2048, 32)), [(1, 2048)] * 8
    alone = Plan().tokens_per_second(shape, gpu_rates("a100-sxm", 1), batches, 2)
    for mode, plan in (
        ("DDP", Plan(4)),
        ("DDP", Plan(4, 1, "sliced")),
        ("2D", Plan(2, 2)),
        ("2D", Plan(2, 2, "sliced")),
    ):
        speed = plan.tokens_per_second(shape, gpu_rates("a100-sxm", 4, links=1), batches, 2)
        (line,) = [
            line
            for line in said.splitlines()
            if f" {mode} " in line and f" {plan.transfer} " in line
        ]
        assert f"{speed:,.0f}" in line
        assert f" {speed / alone:.2f} " in line
    assert "Predictions, not measurements: 8 sequences of 2048 tokens" in said
    assert main(["plan", "--model", "opt-1.3b", "--gpus", "1"]) == 0
    assert "DDP" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "2", "--gpu", "b300"], "no GPU 'b300'"),
        (["--gpus", "0"], "not an integer of at least 1"),
        (["--gpus", "2", "--links", "3"], "--links 3: there are 2 GPUs"),
        (["--gpus", "2", "--host-link", "0"], "not a number above 0"),
        (["--gpus", "2", "--model", "nowhere/at-all"], "no model 'nowhere/at-all'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, told, capsys):
    assert main(["plan", "--model", "opt-1.3b", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


# ---- the schedule, once more: real lanes, last because they take their time ----------------------


class _Slow:
    """A host tier whose reads and writes take so long."""

    def __init__(self, lanes: Lanes):
        self.lanes = lanes

    def read(self, block, buffer):
        time.sleep(self.lanes.upload)
        return 1

    def write(self, block, buffer, generator):
        time.sleep(self.lanes.offload)
        return 1

    def close(self):
        pass


def _run(lanes: Lanes, blocks: int, slots: int) -> float:
    """Seconds of a step on the real lanes, all of which sleep."""
    pager = Pager(
        _Slow(lanes), blocks, 16, torch.device("cpu"), slots, overlap=True, reuse=True, trace=False
    )
    if lanes.exchange:
        pager.exchange_through(lambda block, buffer: time.sleep(lanes.exchange), 16)
    ends = []
    for _ in range(6):
        for block in range(blocks):
            pager.acquire(block)
            time.sleep(lanes.compute)
            pager.release(block, write=True)
        time.sleep(lanes.outside)
        ends.append(time.perf_counter())
    pager.close()
    return (ends[-1] - ends[2]) / 3


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "lanes",
    [
        Lanes(0.008, 0, 0.032, 0.008, 0.024),
        Lanes(0.032, 0, 0.008, 0.024, 0.008),
        Lanes(0.008, 0, 0.012, 0.036, 0.008),
        Lanes(0.016, 0.024, 0.016, 0.016, 0.032),
    ],
    ids=["computing", "upload", "offload", "exchange"],
)
def test_the_schedule_is_that_of_the_engine_s_lanes(lanes, slots):
    """The engine's own lanes, which only sleep: no faster than the model, and at most a tenth
    slower in the best of some tries.
    """
    predicted, best = schedule(lanes, 5, slots).step, float("inf")
    for _ in range(10):
        best = min(best, _run(lanes, 5, slots))
        if best < 1.1 * predicted:
            break
    assert 0.99 * predicted < best < 1.1 * predicted


def test_rates_are_told_in_words_where_one_is_nothing_too():
    """Least squares of tiny steps may give no time to arithmetic."""
    assert tables._speed(Rates(2e-11, 5e-9, 3e-4)) == "50 GFLOP/s, 5.0 ns a number drawn"
    assert tables._speed(Rates(0.0, 5e-9, 3e-4)) == "arithmetic in no time, 5.0 ns a number drawn"
