"""The Triton kernels against a naive loop in float64.

Without a GPU they run in Triton's interpreter, in a process of its own (this file as a script):
what `triton.jit` makes of a function is settled by TRITON_INTERPRET when triton is first imported.
The interpreter runs the programs of a launch one after another, on which a barrier across them
never opens, so `triton_persistent` is tested there with one program, and with several in as many
processes that share the tensors' memory. How a GPU orders memory is not tested by that; that its
compiler takes the kernels is.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[3]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from projects.flashdp import FixedSampling, backends, kernels, make_private  # noqa: E402
from projects.flashdp.factors import TINY, Factors  # noqa: E402
from projects.flashdp.scratch import SCRATCH_BUFFER  # noqa: E402
from shared.errors import UserError  # noqa: E402

BACKENDS = ("triton_2k", "triton_persistent")
MARGIN = 130  # elements around each tensor, more than a tile; what a kernel reads there is NaN
CASE = {
    "backend": "triton_2k", "samples": 2, "positions": 17, "rows": 71, "columns": 50,
    "dtype": "float32", "out": "float32",
    "fresh": True, "transposed": False, "chunk": None, "enough": None, "poison": {}, "bound": 40.0,
    "scale": 1, "extra": False,
    "launches": 1, "programs": 1,
}  # fmt: skip


# ---- both sides ----


def framed(values: Tensor, transposed: bool) -> Tensor:
    """A copy in the middle of NaN, whose dimensions lie in memory in another order if
    `transposed`.
    """
    values = values.movedim(0, -1) if transposed else values
    frame = torch.full([size + 2 * MARGIN for size in values.shape], math.nan, dtype=values.dtype)
    inner = frame[tuple(slice(MARGIN, -MARGIN) for _ in values.shape)]
    inner.copy_(values)
    return inner.movedim(-1, 0) if transposed else inner


def make_inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """left, right, out before, extra."""
    generator = torch.Generator().manual_seed(5)
    # so that some samples are clipped, some not
    sizes = 0.1 + torch.rand(case["samples"], 1, 1, generator=generator)
    left = (
        torch.randn(case["samples"], case["positions"], case["rows"], generator=generator) * sizes
    )
    right = torch.randn(case["samples"], case["positions"], case["columns"], generator=generator)
    before = torch.randn(case["rows"], case["columns"], generator=generator)
    extra = 500 * torch.rand(case["samples"], generator=generator)
    for sample, value in case["poison"].items():
        right[int(sample), -1, -1] = float(value)
    dtype = getattr(torch, case["dtype"])
    return (
        left.to(dtype),
        right.to(dtype),
        before.to(getattr(torch, case["out"])),
        extra if case["extra"] else None,
    )


# ---- the process with the interpreter ----


def serve() -> None:
    """A reply in JSON for each case in JSON."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    for line in sys.stdin:
        case = json.loads(line)
        with pytest.MonkeyPatch.context() as patch:
            try:
                reply = globals()[case.pop("do")](patch, **case)
            except UserError as error:
                reply = {"refused": str(error)}
            except Exception:
                reply = {"failed": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


def launch(patch: pytest.MonkeyPatch, **case: Any) -> dict[str, Any]:
    """Run a backend as often as the case says. Returns the last result, and a hash of each."""
    left, right, before, extra = make_inputs(case)
    if case["chunk"]:
        size = 2 if case["dtype"] == "bfloat16" else 4
        patch.setattr(
            kernels, "L2_BYTES", case["chunk"] * case["rows"] * case["columns"] * size + 1
        )
    if case["enough"]:
        patch.setattr(kernels, "ENOUGH", case["enough"])
    if case["programs"] > 1:
        apart(patch, case["programs"])
    left, right = framed(left, case["transposed"]), framed(right, case["transposed"])
    hashes = []
    for _ in range(case["launches"]):
        SCRATCH_BUFFER.release()
        memory = torch.full([before.numel() + 2 * MARGIN], 7.0, dtype=before.dtype)
        out = memory[MARGIN:-MARGIN]
        out = (
            out.view(case["columns"], case["rows"]).T
            if case["transposed"]
            else out.view(before.shape)
        )
        out.fill_(math.nan) if case["fresh"] else out.copy_(before)
        norms: list[Tensor] = []
        factors = Factors(case["bound"], case["scale"], extra, norms)
        backends.BACKENDS[case["backend"]](left, right, out, case["fresh"], factors)
        found = factors.found()
        assert bool((torch.cat([memory[:MARGIN], memory[-MARGIN:]]) == 7).all()), (
            "a store outside of the sum"
        )
        hashes.append(
            hashlib.sha256(
                b"".join(t.double().contiguous().numpy().tobytes() for t in (out, found))
            ).hexdigest()
        )
    return {
        "out": out.double().tolist(),
        "norms": torch.cat(norms).tolist(),
        "c": found.tolist(),
        "hashes": hashes,
    }


def apart(patch: pytest.MonkeyPatch, programs: int) -> None:
    """From now on run each program of a launch in a process of its own, all at once, on shared
    memory.
    """
    from triton.runtime import interpreter

    run, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def run_apart(self: Any, *args: Any, **kwargs: Any) -> None:
        assert self.grid == (programs,)
        # without it a GPU may start a part of the programs, and never the rest
        assert kwargs["launch_cooperative_grid"]
        self.grid = (1,)
        for tensor in args:
            if isinstance(tensor, Tensor):
                tensor.share_memory_()
        children = []
        for program in range(programs):
            children.append(os.fork())
            if not children[-1]:
                builder.set_grid_dim = lambda *_: set_dim(programs, 1, 1)
                builder.set_grid_idx = lambda *_, program=program: set_index(program, 0, 0)
                status = 1
                try:
                    run(self, *args, **kwargs)
                    status = 0
                finally:
                    os._exit(status)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * programs

    patch.setattr(interpreter.GridExecutor, "__call__", run_apart)
    patch.setattr(kernels, "_resident_side", lambda *_: 64)


def fits(patch: pytest.MonkeyPatch, shapes: list[list[int]]) -> list[bool]:
    return [kernels.resident(*shape) for shape in shapes]


def train(patch: pytest.MonkeyPatch, backend: str) -> dict[str, Any]:
    """The gradient of a private model, and the backends that formed it."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(30, 140), nn.Tanh(), nn.Linear(140, 7), nn.Tanh(), nn.Linear(7, 5)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    private = make_private(
        model,
        optimizer,
        FixedSampling(100, 4),
        noise_multiplier=0.0,
        clip=0.5,
        loss_reduction="mean",
        backend=backend,
    )
    model(torch.randn(4, 3, 30)).square().sum((1, 2)).mean().backward()
    chosen = {name: chosen for (name, _, _), chosen in private.backends().items()}
    norms = {name: value.tolist() for name, value in private.norms().items()}
    return {
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters()]).tolist(),
        "chosen": chosen,
        "norms": norms,
    }


# ---- the tests' process ----


def naive(case: dict[str, Any]) -> tuple[Tensor, list[float], list[float]]:
    """The sum, the norms and the factors, a position at a time in float64."""
    left, right, before, extra = make_inputs(case)
    total = (
        torch.zeros(case["rows"], case["columns"], dtype=torch.float64)
        if case["fresh"]
        else before.double()
    )
    norms, factors = [], []
    for i in range(case["samples"]):
        gradient = torch.zeros_like(total)
        for t in range(case["positions"]):
            gradient += torch.outer(left[i, t].double(), right[i, t].double())
        square = float((gradient * gradient).sum()) + (
            float(extra[i]) if extra is not None else 0.0
        )
        norms.append(math.sqrt(square) * case["scale"] if math.isfinite(square) else math.inf)
        factors.append(
            case["scale"] * min(1.0, case["bound"] / (norms[-1] + 1e-10))
            if math.isfinite(square)
            else 0.0
        )
        if factors[-1]:
            total += factors[-1] * gradient
    return total, norms, factors


Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """A function that has the process with the interpreter do something, and returns its reply."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if int(triton.__version__.split(".")[1]) < 7:
        pytest.skip("the interpreter of triton before 3.7 cannot loop with numpy 2.4")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]

    def request(do: str, **case: Any) -> Any:
        timer = threading.Timer(60, process.kill)  # a barrier that does not open
        timer.start()
        process.stdin.write(json.dumps({"do": do, **case}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        timer.cancel()
        assert line, "the interpreter's process has ended"
        reply = json.loads(line)
        assert "failed" not in reply, reply["failed"]
        return reply

    yield request
    process.kill()
    process.wait()
    process.stdout.close()


def check(ask: Ask, tolerance: float = 1e-6, **changes: Any) -> dict[str, Any]:
    """The reply to a case, compared to the naive loop."""
    case = {**CASE, **changes}
    reply = ask("launch", **case)
    total, norms, factors = naive(case)
    out = torch.tensor(reply["out"], dtype=torch.float64)
    finite = [i for i, norm in enumerate(norms) if math.isfinite(norm)]
    assert float((out - total).abs().max()) <= tolerance * float(total.abs().max())
    assert [reply["norms"][i] for i in finite] == pytest.approx(
        [norms[i] for i in finite], rel=tolerance
    )
    assert reply["c"] == pytest.approx(factors, rel=tolerance)
    assert len(set(reply["hashes"])) == 1
    return reply


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("positions", [1, 3, 17, 33])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_naive_loop(ask: Ask, backend: str, positions: int, samples: int) -> None:
    reply = check(
        ask, backend=backend, positions=positions, samples=samples, bound=40 * math.sqrt(positions)
    )
    if samples == 5:
        assert 0 < sum(c < 1 for c in reply["c"]) < 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"fresh": False},
        {"transposed": True},
        {"transposed": True, "fresh": False, "out": "bfloat16"},
    ],
)
def test_adds_and_takes_any_strides(ask: Ask, backend: str, changes: dict[str, Any]) -> None:
    check(ask, backend=backend, samples=5, tolerance=1e-2 if "out" in changes else 1e-6, **changes)


@pytest.mark.parametrize(
    ("rows", "columns", "enough"),
    [(600, 70, None), (150, 200, None), (150, 200, 1), (1, 1, None), (64, 129, 1)],
)
def test_weights_of_many_tiles(ask: Ask, rows: int, columns: int, enough: int | None) -> None:
    """More than eight tiles down, sides 64 and 128, more elements than one program of the second
    kernel takes.
    """
    check(ask, rows=rows, columns=columns, enough=enough, fresh=False, samples=3)


def test_chunks_change_no_bit(ask: Ask) -> None:
    whole = check(ask, samples=5, fresh=False)
    for chunk in (1, 2, 4):
        assert check(ask, samples=5, fresh=False, chunk=chunk)["hashes"] == whole["hashes"]
    check(ask, samples=5, chunk=2, extra=True, dtype="bfloat16", tolerance=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_sample_that_is_not_finite_leaves_no_trace(ask: Ask, backend: str, fresh: bool) -> None:
    poison = {"1": "nan", "3": "inf", "4": "-inf"}
    reply = check(ask, backend=backend, samples=6, fresh=fresh, poison=poison, chunk=2)
    assert [c > 0 for c in reply["c"]] == [True, False, True, False, False, True]
    assert not any(map(math.isfinite, (reply["norms"][i] for i in (1, 3, 4))))
    alone = check(ask, backend=backend, samples=1, fresh=fresh, poison={"0": "nan"})
    assert fresh is (not any(map(any, alone["out"])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_what_else_is_in_the_group(ask: Ask, backend: str) -> None:
    check(ask, backend=backend, samples=5, scale=5, extra=True, bound=150.0, chunk=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs(ask: Ask, backend: str, dtype: str) -> None:
    check(ask, backend=backend, samples=5, dtype=dtype, fresh=False, chunk=2, tolerance=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_of_what_is_summed(ask: Ask, backend: str) -> None:
    """Not of the values before they are rounded to bfloat16, with which the bound would hold only
    nearly.
    """
    reply = ask(
        "launch", **{**CASE, "backend": backend, "samples": 1, "dtype": "bfloat16", "bound": 1e30}
    )
    summed = torch.tensor(reply["out"], dtype=torch.float64)
    assert reply["norms"] == pytest.approx([float(summed.square().sum().sqrt())], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_launch_finds_nothing_of_the_one_before(ask: Ask, backend: str) -> None:
    check(ask, backend=backend, samples=5, launches=3, chunk=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(ask: Ask, backend: str) -> None:
    for fresh in (True, False):
        reply = ask("launch", **{**CASE, "backend": backend, "samples": 0, "fresh": fresh})
        assert (
            reply["out"] == make_inputs({**CASE, "samples": 0})[2].mul(0 if fresh else 1).tolist()
        )
        assert reply["c"] == []


def test_the_barrier_across_programs(ask: Ask) -> None:
    """Six programs, more than there may be cores for, each in a process: all samples pass, with the
    factors that all norms give.
    """
    own = check(
        ask,
        backend="triton_persistent",
        rows=150,
        columns=100,
        samples=12,
        positions=3,
        programs=6,
        launches=3,
        extra=True,
    )
    assert 0 < sum(c < 1 for c in own["c"]) < 12


def test_persistent_runs_only_where_it_is_resident(ask: Ask) -> None:
    assert ask("fits", shapes=[[128, 128], [1, 1], [129, 1], [1, 129]]) == [
        True,
        True,
        False,
        False,
    ]
    large = {**CASE, "rows": 129, "samples": 3}
    assert ask("launch", **large) == ask("launch", **{**large, "backend": "triton_persistent"})


def test_a_private_model(ask: Ask) -> None:
    loop = ask("train", backend="loop")
    for backend, names in (("triton_2k", {"triton_2k"}), ("triton_persistent", set(BACKENDS))):
        reply = ask("train", backend=backend)
        assert set(reply["chosen"].values()) == names
        assert reply["gradient"] == pytest.approx(loop["gradient"], rel=1e-5, abs=1e-7)
        for name, norms in loop["norms"].items():
            assert reply["norms"][name] == pytest.approx(norms, rel=1e-5)


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "_interpreted", lambda: False)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make_private(
        model, optimizer, FixedSampling(10, 2), noise_multiplier=0.0, backend="triton_persistent"
    )
    with pytest.raises(
        UserError,
        match=(
            "takes float32, bfloat16 and float16 on a GPU, not float32, float32 and float32 on cpu"
        ),
    ):
        model(torch.ones(2, 3)).sum().backward()


def test_what_the_kernels_do_not_take(ask: Ask) -> None:
    for backend in BACKENDS:
        refused = ask(
            "launch", **{**CASE, "backend": backend, "dtype": "float64", "out": "float64"}
        )["refused"]
        assert (
            refused
            == f"backend '{backend}' takes float32, bfloat16 and float16 on a GPU, not float64,"
            " float64 and float64 on cpu; use backend 'auto'"
        )


@pytest.mark.parametrize(
    ("triton", "reason"), [(object(), "a CUDA device"), (None, "triton, which is not installed")]
)
def test_a_machine_without_gpu_or_triton(
    triton: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "_interpreted", lambda: False)
    monkeypatch.setattr(kernels, "triton", triton)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=f"backend 'triton_2k' needs {reason}.*use backend 'auto'"):
        make_private(
            model, optimizer, FixedSampling(10, 2), noise_multiplier=0.0, backend="triton_2k"
        )
    assert not kernels.available()
    assert not kernels.resident(8, 8)


def test_the_package_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import projects.flashdp.kernels as k; assert not"
        " k.available()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(("side", "positions"), [(64, 1), (64, 1024), (128, 1024)])
@pytest.mark.parametrize(
    ("dtype", "allowed"), [("bf16", False), ("fp16", False), ("fp32", False), ("fp32", True)]
)
def test_compiles_for_a_gpu(
    dtype: str,
    allowed: bool,
    side: int,
    positions: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For compute capability 9.0, on any machine; the interpreter knows neither types nor the size
    of shared memory.
    """
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if kernels._interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    like = torch.empty(
        0, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    )
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, allowed
    options = kernels._options(like, positions, side)
    torch.backends.cuda.matmul.allow_tf32 = before
    launched = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    assert options["PRECISION"] == ("ieee" if dtype == "fp32" and not allowed else "tf32")
    pointers = {
        "left": dtype,
        "right": dtype,
        "products": "fp32" if dtype == "fp16" else dtype,
        "counter": "i32",
    }
    pointers |= dict.fromkeys(("out", "extra", "partials", "norms", "c"), "fp32")

    def compiled(kernel: Any, constants: dict[str, Any], **launch: Any) -> Any:
        signature, attributes = {}, {}
        for place, name in enumerate(kernel.arg_names):
            kind = (
                f"*{pointers[name]}"
                if name in pointers
                else "fp32"
                if name in ("bound", "scale")
                else "i32"
            )
            signature[name] = "constexpr" if name in constants else kind
            if name in pointers or name in (
                "T",
                "L",
                "R",
                "left_b",
                "left_t",
                "right_b",
                "right_t",
            ):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch).metadata

    constants = {**options, "left_l": 1, "right_r": 1}
    flags = {"TINY": TINY, "EXTRA": True, "FRESH": False, "TILES": 128}
    two = compiled(kernels._products, constants, **launched)
    one = compiled(
        kernels._persistent, {**constants, **flags}, **launched, launch_cooperative_grid=True
    )
    # what a program may have on every GPU since Ampere
    assert max(two.shared, one.shared) <= 99 << 10
    assert one.launch_cooperative_grid
    compiled(kernels._add, {"FRESH": False, "FLAT": False, "BLOCK": kernels.BLOCK}, num_warps=4)


# ---- on a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 1e-2)]
)
@pytest.mark.parametrize(("rows", "columns"), [(71, 50), (768, 768), (900, 500)])
def test_on_a_gpu(
    backend: str,
    dtype: str,
    tolerance: float,
    rows: int,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the naive loop, and a thousand launches, each on memory that others have used, agree bit
    for bit.
    """
    monkeypatch.setattr(kernels, "EXACT", True)
    case = {
        **CASE,
        "samples": 5,
        "positions": 33,
        "rows": rows,
        "columns": columns,
        "dtype": dtype,
        "bound": 0.5 * rows,
        "extra": True,
    }
    left, right, before, extra = (tensor.cuda() for tensor in make_inputs(case))
    assert kernels.resident(rows, columns)
    left, right = framed(left.cpu(), False).cuda(), framed(right.cpu(), False).cuda()
    total, norms, factors = naive(case)
    first = None
    for _ in range(1000):
        torch.empty_like(before).fill_(math.nan)  # the allocator hands this out again
        out = torch.full_like(before, math.nan)
        found = Factors(case["bound"], 1, extra, measured := [])
        backends.BACKENDS[backend](left, right, out, True, found)
        result = (out, found.found(), torch.cat(measured))
        first = first or result
        assert all(torch.equal(one, other) for one, other in zip(first, result, strict=True))
    assert float((first[0].cpu() - total).abs().max()) <= tolerance * float(total.abs().max())
    assert first[1].tolist() == pytest.approx(factors, rel=tolerance)
    assert first[2].tolist() == pytest.approx(norms, rel=tolerance)


if __name__ == "__main__":
    serve()
