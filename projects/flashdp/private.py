"""`make_private`: DP-SGD with per-layer clipping on a model and an optimizer as they are.

A backward writes the sum of clipped per-sample gradients into `.grad`, layer by layer, in one pass.
Just before the optimizer's step the sums of all ranks are added, noise is added once, and the
result is divided by the expected batch size. Nothing else of the data ever reaches a trainable
parameter: what has no rule is refused before training, and a gradient that reaches a parameter by
another way raises when it arrives.

Notation: clip group l with bound C_l, sample i, norm n_il; factor c_il = min(1, C_l / n_il); noise
multiplier σ; sensitivity Δ = sqrt(Σ_l C_l²); expected batch size B̄.
"""

import fnmatch
import hashlib
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from projects.flashdp import backends, layers
from projects.flashdp.accounting import Mechanism, PrivacyReport, epsilon
from projects.flashdp.clipper import PerLayerClipper
from projects.flashdp.groups import Group, clip_bounds
from projects.flashdp.noise import delta_shortfall, streams
from projects.flashdp.refusals import (
    check_optimizer,
    check_same_parameters,
    check_unwrapped,
    covered,
    mixes,
)
from projects.flashdp.sampling import FixedSampling, PoissonSampling, Seen
from projects.flashdp.scratch import SCRATCH_BUFFER
from shared.errors import UserError


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sampling: "PoissonSampling | FixedSampling",
    *,
    noise_multiplier: float,
    clip: float | Mapping[str, float] = 1.0,
    groups: Literal["layer", "parameter"] = "layer",
    noise_allocation: Literal["uniform", "equal"] = "uniform",
    loss_reduction: Literal["sum", "mean"] = "sum",
    backend: str = "auto",
    flattened: Sequence[str] = (),
    key: bytes | None = None,
    data: bytes | None = None,
    noise_seed: int | None = None,
    process_group: Any = None,
    sensitivity: float | None = None,
    stage: int | None = None,
) -> "DPModel":
    """Make `model` and `optimizer` private in place: `loss.backward()` clips, `optimizer.step()`
    adds the noise.

    Args:
        model: its trainable parameters must lie in supported layers (listed in the README); freeze
            the others.
        optimizer: any of torch.optim's kind, over parameters of the model.
        sampling: how batches are drawn; it gives the expected batch size and the rate.
        noise_multiplier: σ, the noise's standard deviation over the sensitivity. 0 trains without
            noise (epsilon is infinite).
        clip: the total bound C, of which each of L groups gets C/sqrt(L); or a bound for each
            group, by name or pattern of names.
        groups: clip each layer as a whole, or each parameter (as Opacus's per-layer clipping does).
        noise_allocation: "uniform", the same deviation σΔ on all groups, or "equal", σ·sqrt(L)·C_l
            on group l: the same privacy.
        loss_reduction: whether the backward starts from the sum or from the mean of the losses of
            the samples. A loss averaged over all tokens of the batch is neither: it couples the
            samples (see `per_sample_loss`).
        backend: one of `backends.BACKENDS`, or "auto" (by a model of the cost).
        flattened: patterns of names of layers whose input is [B*T, d] with each sample's positions
            one after another.
        key: 32 secret bytes. The noise of step t is a function of them and of t, so that a run that
            goes on in another process can take its last steps again as they were. Who has them can
            take the noise away. Left out, they come from the operating system.
        data: with a key: a digest of the records. The noise is a function of it too, since one key
            for two data sets would make the same noise for both, and their difference bare.
        noise_seed: for tests, in place of a key.
        process_group: of data-parallel ranks, each with its part of the batch.
        sensitivity: Δ of the whole model, where `model` is one stage of a pipeline: sqrt(Σ C_l²)
            over the groups of all stages. Give each stage `clip={"*": C / sqrt(L)}` with the number
            L of all groups, and this C. (A stage that took its own groups for all there are would
            add too little noise.)
        stage: its number, where stages share a key.

    Raises:
        UserError: naming the layer or the value that does not allow privacy, and what to do.
    """
    if not noise_multiplier >= 0 or math.isinf(noise_multiplier):
        raise UserError(f"noise_multiplier must be a number of at least 0, not {noise_multiplier}")
    backends.check(backend)
    choices = {
        "groups": (groups, ("layer", "parameter")),
        "noise_allocation": (noise_allocation, ("uniform", "equal")),
    }
    for option, (given, known) in {
        **choices,
        "loss_reduction": (loss_reduction, ("sum", "mean")),
    }.items():
        if given not in known:
            raise UserError(f"{option} must be one of {', '.join(known)}, not '{given}'")
    if noise_seed is not None and noise_seed < 0:
        raise UserError(f"noise_seed must be at least 0, not {noise_seed}")
    check_unwrapped(model)
    trained = covered(model)
    check_optimizer(model, optimizer)
    if key is not None and (len(key) != 32 or noise_seed is not None):
        raise UserError("key must be 32 secret bytes, and noise_seed is then left out")
    if (key is None) != (not data):
        raise UserError(
            "a key needs data=, a digest of the records (and only a key does): with other records"
            " the same noise would come again and could be taken away"
        )
    bounds = clip_bounds(trained, clip, groups)
    own = math.sqrt(sum(bound**2 for _, bound in bounds.values()))
    if sensitivity is None:
        sensitivity = own
    elif noise_allocation != "uniform" or not own * (1 - 1e-9) <= sensitivity < math.inf:
        raise UserError(
            f"sensitivity is that of the whole model, at least this stage's {own:g}, with uniform"
            " noise_allocation"
        )
    elif stage is None and (key is not None or noise_seed is not None):
        raise UserError(
            "stages of a pipeline with one key need numbers of their own (stage=), or their noise"
            " would be the same"
        )
    grouped: dict[str, Group] = {}
    for name, (members, bound) in bounds.items():
        equal = math.sqrt(len(bounds)) * bound
        noise = noise_multiplier * (sensitivity if noise_allocation == "uniform" else equal)
        grouped.update(dict.fromkeys(members, Group(name, bound, members, noise)))
    clipper = PerLayerClipper(grouped, backend, loss_reduction == "mean")
    flow = layers.Flow(clipper)
    for name, (layer, private) in trained.items():
        layers.privatise(
            layer,
            private,
            name,
            flow,
            any(fnmatch.fnmatchcase(name, pattern) for pattern in flattened),
        )
    if key is None:
        key = os.urandom(32) if noise_seed is None else noise_seed.to_bytes(32, "big")
    key = _agreed(key, model, process_group) + (
        b"" if stage is None else f"stage {stage} ".encode()
    )
    if data:
        key += hashlib.shake_256(data).digest(32)
    return DPModel(
        model,
        optimizer,
        sampling,
        clipper,
        flow,
        noise_multiplier,
        key,
        noise_seed is not None,
        process_group,
        sensitivity,
    )


class DPModel:
    """A model under per-layer DP-SGD; made by `make_private`.

    `steps` is how many releases there have been, `groups` the clip groups, `sensitivity` Δ.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sampling: "PoissonSampling | FixedSampling",
        clipper: PerLayerClipper,
        flow: layers.Flow,
        noise_multiplier: float,
        key: bytes,
        known_key: bool,
        process_group: Any,
        sensitivity: float,
    ):
        self.model, self.optimizer, self.sampling, self.clipper = (
            model,
            optimizer,
            sampling,
            clipper,
        )
        self.process_group = process_group
        self._noise_multiplier, self._sensitivity = noise_multiplier, sensitivity
        self.groups = list({id(group): group for group in clipper.groups.values()}.values())
        self.history: list[Mechanism] = []
        self.dropped = 0  # (sample, group) pairs left out because their norm was not finite
        self._flow, self._key, self._known_key = flow, key, known_key
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._batch_norms = [
            (name, module) for name, module in model.named_modules() if mixes(module)
        ]
        self._all_named = dict(model.named_parameters(remove_duplicate=False))
        # Rotary tables and the like are buffers that no save holds, and data does not change them.
        self._buffers: list[tuple[str, Tensor, int]] = []
        self._seen = Seen()
        # how often an earlier state was loaded: its noise must not come back with other data
        self._rewound = 0
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
            optimizer.register_step_pre_hook(self._release),
            *(p.register_hook(_Leak(name)) for name, p in self._named),
        ]
        _ALIVE.add(self)

    @property
    def noise_multiplier(self) -> float:
        """σ. The noise is fixed when the model is made private, so that what is accounted for is
        what is added.
        """
        return self._noise_multiplier

    @property
    def sensitivity(self) -> float:
        """Δ, of the whole model."""
        return self._sensitivity

    @property
    def steps(self) -> int:
        return sum(one.steps for one in self.history)

    def epsilon(self, delta: float, accountant: str = "rdp") -> float:
        """What has been spent. UserError when batches are of fixed size: no accountant here covers
        that.
        """
        self._require_poisson()
        spent = epsilon(self.history, delta, accountant)
        # what the noise's finitely many bits cost
        numbers = self.steps * sum(p.numel() for _, p in self._named)
        left = delta - delta_shortfall(2 * numbers, spent)
        if left == delta or not math.isfinite(spent):
            return spent
        return epsilon(self.history, left, accountant) if left > 0 else math.inf

    def report(self, delta: float, accountant: str = "rdp") -> PrivacyReport:
        """Everything that a reader needs to judge the guarantee. Raises as `epsilon` does."""
        self._require_poisson()
        notes = [
            f"noise on {kind}: {NOISE_NOTES['cpu' if kind == 'cpu' else 'other']}"
            for kind in sorted({p.device.type for _, p in self._named})
        ]
        notes += (
            [
                "the seed of the noise was given: the guarantee holds only against those who do not"
                " know it"
            ]
            if self._known_key
            else []
        )
        return PrivacyReport.of(
            self.history,
            delta,
            accountant,
            self.sensitivity,
            len(self.groups),
            self.sampling,
            notes,
            self.epsilon(delta, accountant),
        )

    def backends(self) -> dict[tuple[str, int, int], str]:
        """Which backend each (layer, batch size, positions) has met."""
        return dict(self.clipper.chosen)

    def norms(self) -> dict[str, Tensor]:
        """Per group the norms of the samples since the last step, before clipping. Not private: for
        inspection only.
        """
        return {group.name: torch.cat(group.norms) for group in self.groups if group.norms}

    def clipped_share(self) -> float:
        """The share of (sample, group) pairs since the last step whose norm was above the bound.
        Not private.
        """
        pairs = [(norms > group.bound).float() for group in self.groups for norms in group.norms]
        return float(torch.cat(pairs).mean()) if pairs else 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> "DPModel":
        raise UserError(
            "a private model cannot be copied: the copy would train without noise; copy it before"
            " make_private or after unwrap()"
        )

    def unwrap(self) -> nn.Module:
        """The model with its own classes and no hooks, as `make_private` got it. Sums that have no
        noise yet are dropped.
        """
        for _, parameter in self._named:
            if parameter.grad is not None and self.clipper.state(parameter) != "released":
                parameter.grad = None
        SCRATCH_BUFFER.release()
        for handle in self._handles:
            handle.remove()
        _ALIVE.discard(self)
        for module in self.model.modules():
            if isinstance(module, layers.Private):
                layers.restore(module)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What the accountant needs to go on; plain numbers, nothing secret."""
        history = [[one.noise_multiplier, one.sample_rate, one.steps] for one in self.history]
        return {"history": history, "rewound": self._rewound, "seen": self._seen.record()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Steps that this object has made since stay spent: their releases are
        not taken back by going back. The noise that follows is another: the old one with other data
        would tell them.
        """
        own, theirs = (
            _by_kind(self.history),
            _by_kind([Mechanism(*one) for one in state["history"]]),
        )
        back = sum(theirs.values()) < self.steps
        self.history = [
            Mechanism(*kind, max(own.get(kind, 0), theirs.get(kind, 0)))
            for kind in {**theirs, **own}
        ]
        self._seen = Seen.of(state.get("seen"))
        self._rewound = max(self._rewound, state.get("rewound", 0)) + back

    def __getstate__(self) -> dict[str, Any]:
        """Without the key: whoever has it can take the noise away."""
        return {name: value for name, value in self.__dict__.items() if name != "_key"}

    def _require_poisson(self) -> None:
        if self.sampling.sample_rate is None:
            raise UserError(
                "batches of fixed size have no epsilon here: the accountants assume Poisson"
                " sampling; use PoissonSampling"
            )
        if self.process_group is None:  # a rank sees its part alone
            self._seen.check(self.sampling)

    # ---- hooks ----

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = next((tensor for tensor in _tensors((args, kwargs)) if tensor.ndim), None)
        if batch is None:
            raise UserError(
                "the model was called without a tensor, so nobody knows how many samples there are;"
                " give it the batch as tensors"
            )
        check_unwrapped(model)
        if kwargs.get("labels") is not None and torch.is_grad_enabled():
            raise UserError(
                "labels= makes the model average its loss over the tokens of the whole batch, which"
                " couples the samples; leave it out and give the logits to per_sample_loss"
            )
        persistent = model.state_dict(keep_vars=True)
        self._buffers = [
            (name, buffer, buffer._version)
            for name, buffer in model.named_buffers()
            if name in persistent
        ]
        self._flow.enter(batch)
        # a new sum: what was abandoned does not count
        if all(parameter.grad is None for _, parameter in self._named):
            for group in self.groups:
                group.norms.clear()
        for name, module in self._batch_norms:
            if module.training:
                raise UserError(
                    f"{name} is a {type(module).__name__} in training mode, which mixes the"
                    " samples; keep it in eval mode"
                )

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._flow.leave(_tensors(output))
        kept = dict(model.named_buffers())
        for name, buffer, version in self._buffers:
            if kept.get(name) is not buffer or buffer._version != version:
                raise UserError(
                    f"the forward changes the buffer {name}: it would leave with the model, and"
                    " hold data without noise; switch its statistics off (eval mode)"
                )

    @torch.no_grad()
    def _release(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """`.grad` = (Σ over ranks and samples + noise) / B̄, for every trainable parameter, also
        after an empty batch.
        """
        if any(callable(value) for value in (*args, *kwargs.values())):
            raise UserError(
                "optimizer.step(closure) would compute gradients after the noise; call backward and"
                " step() apart"
            )
        if "_key" not in self.__dict__:
            raise UserError(
                "this private model came out of a pickle, which leaves its key behind; call"
                " make_private on the model"
            )
        check_same_parameters(self.model, self._all_named)
        clipper = self.clipper
        own = {id(parameter) for _, parameter in self._named}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if id(parameter) not in own and parameter.grad is not None:
                name = next(
                    (name for name, p in self.model.named_parameters() if p is parameter),
                    "a parameter that is not the model's",
                )
                raise UserError(
                    f"the optimizer would move {name} by a gradient without noise; freeze it before"
                    " make_private, without a grad"
                )
        for _, parameter in self._named:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            elif clipper.state(parameter, look=True) == "released":
                raise UserError(
                    "optimizer.step() twice with one gradient: call optimizer.zero_grad() and a"
                    " backward before the next step"
                )
        if self.process_group is not None:
            waiting = [
                dist.all_reduce(p.grad, group=self.process_group, async_op=True)
                for _, p in self._named
            ]
            for work in waiting:
                work.wait()
        expected = self.sampling.expected_batch_size
        noise = streams(self._key, self.steps, {p.device for _, p in self._named}, self._rewound)
        for name, parameter in self._named:
            noise[parameter.device].release(
                parameter.grad.view(-1), clipper.groups[name].noise, expected
            )
        for stream in noise.values():
            stream.finish()
        for _, parameter in self._named:
            clipper.wrote(parameter, released=True)
        self._account()

    def _account(self) -> None:
        norms = [each for group in self.groups for each in group.norms]
        for device in {each.device for each in norms}:
            self.dropped += int(
                (~torch.cat([each for each in norms if each.device == device]).isfinite()).sum()
            )
        self._seen.add(
            max((sum(map(len, group.norms)) for group in self.groups), default=0),
            self.sampling.expected_batch_size,
        )
        for group in self.groups:
            group.norms.clear()
        self._flow.spent.clear()
        rate = self.sampling.sample_rate
        last = self.history[-1] if self.history else None
        if last and (last.noise_multiplier, last.sample_rate) == (self.noise_multiplier, rate):
            self.history[-1] = Mechanism(last.noise_multiplier, last.sample_rate, last.steps + 1)
        else:
            self.history.append(Mechanism(self.noise_multiplier, rate, 1))


_ALIVE: "weakref.WeakSet[DPModel]" = weakref.WeakSet()


def _others(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before any optimizer's step: UserError where it would step with sums that have no noise yet,
    the optimizer not being theirs.
    """
    for private in list(_ALIVE):
        if optimizer is private.optimizer:
            continue
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in private._named:
            if (
                id(parameter) in theirs
                and parameter.grad is not None
                and private.clipper.state(parameter) != "released"
            ):
                raise UserError(
                    f"another optimizer would move {name} by a sum without noise; step with the one"
                    " given to make_private"
                )


# once: torch runs through its hooks while models come and go
register_optimizer_step_pre_hook(_others)


NOISE_NOTES = {
    "cpu": (
        "a normal number of 160 bits from AES-256, added and rounded without error; what those bits"
        " lack is counted in delta"
    ),
    "other": (
        "torch's Philox generator in float64, rounded with the sum to a grid; neither made against"
        " an adversary who sees its bits nor proved in floating point: the guarantee is for one who"
        " does not"
    ),
}


def _by_kind(history: Sequence[Mechanism]) -> dict[tuple[float, float | None], int]:
    """How many steps there were of each noise multiplier and rate."""
    steps: dict[tuple[float, float | None], int] = {}
    for one in history:
        kind = (one.noise_multiplier, one.sample_rate)
        steps[kind] = steps.get(kind, 0) + one.steps
    return steps


class _Leak:
    """A gradient that autograd brings to a parameter has not been clipped."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, gradient: Tensor) -> None:
        raise UserError(
            f"{self.name} is used outside its layer's forward, where its gradient is not clipped;"
            " freeze it or use the layer itself"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or outputs, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def untie(model: nn.Module) -> int:
    """Give each of several modules that share a parameter a copy of its own. Returns how many were
    copied.

    A tied parameter takes a gradient from each use. Clipped apart they may add up in the same
    coordinates, so that the sensitivity is C_1 + C_2 and not the root of the sum of squares.
    """
    seen: set[int] = set()
    copied = 0
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(
                    module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                )
                copied += 1
            seen.add(id(parameter))
    config = getattr(model, "config", None)
    if copied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return copied


def _agreed(key: bytes, model: nn.Module, process_group: Any) -> bytes:
    """The key of rank 0, and its parameters, on all ranks."""
    if process_group is None:
        return key
    source = dist.get_global_rank(process_group, 0)
    device = next(model.parameters()).device
    shared = torch.tensor(list(key), dtype=torch.uint8, device=device)
    dist.broadcast(shared, source, group=process_group)
    with torch.no_grad():
        for parameter in model.parameters():
            dist.broadcast(parameter, source, group=process_group)
    return bytes(shared.tolist())
