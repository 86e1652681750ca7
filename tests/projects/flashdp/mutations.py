"""Mutation tests of FlashDP: each mutation must turn the tests red.

    python tests/projects/flashdp/mutations.py          # all; some minutes on two cores
    python tests/projects/flashdp/mutations.py noise    # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

(
    PRIVATE,
    CLIPPER,
    GROUPS,
    REFUSALS,
    LAYERS,
    BACKENDS,
    FACTORS,
    SCRATCH,
    ACCOUNTING,
    SAMPLING,
    LOSSES,
    NOISE,
    TRAIN,
    RECIPE,
) = (
    f"projects/flashdp/{name}.py"
    for name in (
        "private",
        "clipper",
        "groups",
        "refusals",
        "layers",
        "backends",
        "factors",
        "scratch",
        "accounting",
        "sampling",
        "losses",
        "noise",
        "train",
        "recipe",
    )
)

MUTATIONS = [
    # ---- noise ----
    Mutation(
        PRIVATE,
        "        noise = noise_multiplier * (sensitivity if noise_allocation",
        "        noise = noise_multiplier * (1.0 if noise_allocation",
        "the noise does not grow with the bound",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        "        equal = math.sqrt(len(bounds)) * bound\n",
        "        equal = bound\n",
        "equal allocation forgets the root of the number of groups",
        ("privacy",),
    ),
    Mutation(
        GROUPS,
        "        bounds = dict.fromkeys(members, float(clip) / math.sqrt(len(members)))\n",
        "        bounds = dict.fromkeys(members, float(clip))\n",
        "every group gets the whole bound, and the noise grows with the number of layers",
        ("oracles", "privacy"),
    ),
    Mutation(
        PRIVATE,
        "        noise = streams(self._key, self.steps, {p",
        "        noise = streams(self._key, 0, {p",
        "the noise is the same in every step",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        "        for name, parameter in self._named:\n            noise[",
        "        for name, parameter in self._named:\n"
        "            noise = streams(self._key, self.steps, {parameter.device})\n"
        "            noise[",
        "every parameter draws the same noise",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        "clipper.groups[name].noise, expected)",
        "clipper.groups[name].noise if clipper.groups[name].norms else 0.0, expected)",
        "an empty batch is a step without noise",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        "clipper.groups[name].noise, expected)",
        'clipper.groups[name].noise if name.endswith("weight") else 0.0, expected)',
        "biases get no noise",
        ("privacy",),
    ),
    Mutation(
        NOISE,
        "torch.mul(self._steps[:count], step / divisor, out=part)",
        "torch.mul(self._steps[:count], step, out=part)",
        "noise is not divided by the batch size",
        ("privacy",),
    ),
    Mutation(
        CLIPPER,
        "        self.wrote(weight)\n        c = factors.found()\n",
        "        if not fresh:\n"
        "            out.add_(torch.randn_like(out), alpha=group.noise)\n"
        "        self.wrote(weight)\n"
        "        c = factors.found()\n",
        "every micro-batch after the first adds noise of its own",
        ("privacy",),
    ),
    Mutation(
        NOISE,
        "hashlib.shake_256(key + label)",
        "hashlib.shake_256(key[-4:] + label)",
        "the noise on a CPU depends on 32 bits of the key",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        "        key = os.urandom(32) if noise_seed is None",
        "        key = bytes(32) if noise_seed is None",
        "without a seed the noise is always the same",
        ("privacy",),
    ),
    Mutation(
        NOISE,
        "        self._numbers.numpy()[_where_not(self._mask)] = np.nan\n",
        "",
        "the tails of the noise are those of float32",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "modes.CTR(secret[32:48])",
        "modes.CTR(bytes(16))",
        "all streams of a key begin alike",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "            if self._taken == BLOCK:\n                self._draw()\n",
        "            if self._taken == BLOCK:\n                self._taken = 0\n               "
        " self._draw() if done == 0 else None\n",
        "a large parameter has the same noise twice",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "alpha=math.sqrt(2) * deviation / step)",
        "alpha=deviation / step)",
        "the noise is too small by a root of two",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "return _where_not(certain)",
        "return np.arange(0)",
        "what float32 leaves open is taken as it is",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "    blocks[:, 0] = numbers\n",
        "    blocks[:, 0] = 0\n",
        "the further bits of all numbers are the same",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "return whole + m + 0.0",
        "return whole + m",
        "the sign of zero tells the sum's",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "< 0.5 - MARGIN_64) | (tail == 0)",
        "< 2) | (tail == 0)",
        "borders that float64 cannot tell are decided by it",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "        if not highest < LIMIT - 6 * STEPS:",
        "        if False:",
        "sums far above the noise lose their last steps",
        ("noise",),
    ),
    Mutation(
        PRIVATE,
        "        key += hashlib.shake_256(data).digest(32)\n",
        "        pass\n",
        "one key makes the same noise for other records",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        'if name != "_key"}',
        "if name}",
        "a pickle holds the key",
        ("refusals",),
    ),
    Mutation(
        PRIVATE,
        "        check_same_parameters(self.model, self._all_named)\n",
        "",
        "weights may be tied after they were bounded",
        ("refusals",),
    ),
    Mutation(
        PRIVATE,
        "kept.get(name) is not buffer or buffer._version != version",
        "kept.get(name) is not buffer",
        "running statistics leave without noise",
        ("refusals",),
    ),
    Mutation(
        PRIVATE,
        "            self._seen.check(self.sampling)\n",
        "            pass\n",
        "an epsilon for batches that are not those stated",
        ("refusals",),
    ),
    Mutation(
        PRIVATE,
        "max(own.get(kind, 0), theirs.get(kind, 0))",
        "theirs.get(kind, 0)",
        "going back forgets steps that are spent",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        '        if kwargs.get("labels") is not None and torch.is_grad_enabled():',
        "        if False:",
        "a loss over the tokens of the batch couples the samples",
        ("refusals",),
    ),
    Mutation(
        SAMPLING,
        "if abs(self.samples - self.expected) > allowed:",
        "if False:",
        "batches of any size count as Poisson ones",
        ("refusals",),
    ),
    Mutation(
        SAMPLING,
        "if self.steps * math.log(max(same, 1e-300)) < math.log(TAIL):",
        "if False:",
        "batches of one size count as Poisson ones",
        ("refusals",),
    ),
    # ---- norms and factors ----
    Mutation(
        CLIPPER,
        "        factors = self._factors(group, samples, square_norms([sums]) if joint"
        " else None)\n",
        "        factors = self._factors(group, samples, None)\n",
        "a layer's norm leaves the bias out",
    ),
    Mutation(
        CLIPPER,
        "square_norms(own))",
        "square_norms(own[:1]))",
        "a LayerNorm's norm leaves the bias out",
    ),
    Mutation(
        CLIPPER,
        "square_norms([sums]) if joint",
        "g_BTp.square().sum((1, 2)) if joint",
        "a bias's norm is taken before its positions are added",
    ),
    Mutation(
        CLIPPER,
        "index_add_(0, owner, torch.linalg.vector_norm(rows, dim=1).square())",
        "index_add_(0, sample, g_BTd.flatten(0, 1).to(rows.dtype).square().sum(1))",
        "an embedding's norm is taken before equal tokens are added",
    ),
    Mutation(
        FACTORS,
        "self.scale * (self.bound / (norms + TINY)).clamp(max=1), 0)",
        "self.scale * (self.bound / (norms + TINY)), 0)",
        "factors above 1: small samples are scaled up",
    ),
    Mutation(
        FACTORS,
        "c = self.scale * min(1.0, self.bound / (norm + TINY)) if",
        "c = self.scale * self.bound / (norm + TINY) if",
        "factors above 1 in the loop",
    ),
    Mutation(
        FACTORS,
        "        norms = flat.sqrt() * self.scale\n",
        "        norms = flat.sqrt()\n",
        "the mean's 1/B is not undone before a norm is compared with its bound",
    ),
    Mutation(
        PRIVATE,
        'loss_reduction == "mean")\n',
        "False)\n",
        "the mean's 1/B is not undone at all",
    ),
    Mutation(
        FACTORS,
        "        c = torch.where(norms.isfinite(), self.scale * (self.bound / (norms +"
        " TINY)).clamp(max=1), 0)\n",
        "        c = self.scale * (self.bound / (norms + TINY)).clamp(max=1)\n",
        "a sample that is not finite is not dropped",
    ),
    Mutation(
        BACKENDS,
        "            elif c:\n                out.add_(gradient, alpha=c)\n",
        "            else:\n                out.add_(gradient, alpha=c)\n",
        "the loop adds zero times what is not finite",
    ),
    Mutation(
        BACKENDS,
        "                out.mul_(c) if c else out.zero_()\n",
        "                out.mul_(c)\n",
        "the loop's first sample, when not finite, stays in the sum as NaN",
    ),
    Mutation(
        CLIPPER,
        "        if out.is_cuda or not factors.all():",
        "        if out.is_cuda:",
        "a bias takes zero times what is not finite",
    ),
    Mutation(
        CLIPPER,
        "        if out.is_cuda or not bool(factors.all()):  # 0 times what is not finite is not"
        " 0\n            rows",
        "        if out.is_cuda:  # 0 times what is not finite is not 0\n            rows",
        "an embedding takes zero times what is not finite",
    ),
    Mutation(
        FACTORS,
        "rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=dtype)\n    return"
        " torch.linalg.vecdot(rows, rows)",
        "return torch.linalg.vector_norm(gradient, dim=(-2, -1), dtype=dtype).square()",
        "norms are reduced in one level",
    ),
    # ---- sums ----
    Mutation(
        BACKENDS,
        "    direct = fresh and left.dtype == out.dtype\n",
        "    direct = left.dtype == out.dtype\n",
        "the loop overwrites the sum of earlier micro-batches",
    ),
    Mutation(
        BACKENDS,
        "    out.copy_(clipped) if fresh else out.add_(clipped)\n\n\ndef ghost",
        "    out.copy_(clipped)\n\n\ndef ghost",
        "the explicit backend overwrites the sum of earlier micro-batches",
    ),
    Mutation(
        BACKENDS,
        "torch.addmm(out, weighted, right.flatten(0, 1), beta=0 if fresh else 1, out=out)",
        "torch.addmm(out, weighted, right.flatten(0, 1), beta=1, out=out)",
        "a fresh sum begins with what was in memory",
    ),
    Mutation(
        BACKENDS,
        "weighted = (left * c[:, None, None].to(left.dtype))",
        "weighted = left.mul_(c[:, None, None].to(left.dtype))",
        "the gradient that arrives is changed in place",
    ),
    Mutation(
        LAYERS,
        "    return values.reshape(samples, -1, *shape).sum(1)",
        "    return values.reshape(samples, -1, *shape).sum((0, 1)).expand(samples, *shape) /"
        " samples",
        "an RMSNorm's gradient is summed over the batch",
    ),
    Mutation(
        LAYERS,
        "            g_BTd = g_BTd.masked_fill((ids == padding)[..., None], 0)\n",
        "            pass\n",
        "the padding row has a gradient",
    ),
    Mutation(
        LAYERS,
        "            input = input.expand(self.flow.samples, *input.shape[1:])\n",
        "            pass\n",
        "positions common to all samples are not given to each",
    ),
    Mutation(
        PRIVATE,
        "        expected = self.sampling.expected_batch_size\n",
        "        expected = max([1, *(sum(map(len, group.norms)) for group in self.groups)])\n",
        "the sum is divided by the batch's own size",
        ("oracles", "privacy"),
    ),
    Mutation(
        LOSSES,
        "    return losses.sum(1) / (targets != IGNORED).sum(1).clamp(min=1).to(losses.dtype)\n",
        "    return losses.sum(1) * len(losses) / (targets !="
        " IGNORED).sum().clamp(min=1).to(losses.dtype)\n",
        "losses are averaged over all tokens of the batch",
    ),
    Mutation(
        SCRATCH,
        "self._buffers[key] = torch.empty(size,",
        "self._buffers[key] = torch.empty(2 * size,",
        "the scratch is twice the largest layer",
    ),
    # ---- refusals ----
    Mutation(
        PRIVATE,
        "            *(p.register_hook(_Leak(name)) for name, p in self._named)",
        "            *()",
        "a gradient that comes past the layer is let through",
        ("refusals",),
    ),
    Mutation(
        LAYERS,
        "    if flow.checked and key in flow.spent:\n",
        "    if False:\n",
        "a second backward counts every sample twice",
        ("refusals",),
    ),
    Mutation(
        LAYERS,
        "ctx.number, ctx.weight, ctx.bias, ctx.transposed, ctx.samples = (\n            layer,\n   "
        "         layer.flow.forward,\n",
        "ctx.number, ctx.weight, ctx.bias, ctx.transposed, ctx.samples = (\n            layer,\n   "
        "         object(),\n",
        "a layer may be called twice under a reentrant checkpoint",
        ("refusals",),
    ),
    Mutation(
        LAYERS,
        "    if known is not None and len(x) != known:\n",
        "    if False:\n",
        "rows are taken for samples",
        ("refusals",),
    ),
    Mutation(
        CLIPPER,
        '        if self.state(parameter) == "released":\n',
        "        if False:\n",
        "a backward adds to what was released",
        ("refusals",),
    ),
    Mutation(
        PRIVATE,
        '            elif clipper.state(parameter, look=True) == "released":\n',
        "            elif False:\n",
        "one gradient may be released twice, or changed before",
        ("refusals",),
    ),
    Mutation(
        REFUSALS,
        "            if id(parameter) in owners:\n",
        "            if False:\n",
        "tied weights are let in",
        ("refusals",),
    ),
    Mutation(
        LAYERS,
        "    elif torch._C._current_graph_task_id() < 0:",
        "    elif False:",
        "layers may be called past the model's forward",
        ("refusals",),
    ),
    Mutation(
        PRIVATE,
        "            if id(parameter) not in own and parameter.grad is not None:\n",
        "            if False:\n",
        "the optimizer may move a parameter without noise",
        ("refusals",),
    ),
    Mutation(
        CLIPPER,
        "        if same and not (look and not torch.equal(known.fingerprint,"
        " _fingerprint(parameter.grad))):\n",
        "        if same:\n",
        "changes that torch does not count go unnoticed",
        ("refusals",),
    ),
    Mutation(
        LAYERS,
        "                output.register_hook(resume)\n",
        "                pass\n",
        "a recomputation takes the last forward for its own",
    ),
    Mutation(
        PRIVATE,
        "        if optimizer is private.optimizer:\n",
        "        if True:\n",
        "another optimizer may step with sums without noise",
        ("refusals",),
    ),
    Mutation(
        PRIVATE,
        "            if module.training:\n",
        "            if False:\n",
        "a BatchNorm may go back to training",
        ("refusals",),
    ),
    Mutation(
        BACKENDS,
        "    cancelled = squares < apart * CANCELLED",
        "    cancelled = squares < apart * 0",
        "a Gram norm is trusted where positions cancel",
    ),
    Mutation(
        PRIVATE,
        '        self._rewound = max(self._rewound, state.get("rewound", 0)) + back\n',
        '        self._rewound = max(self._rewound, state.get("rewound", 0))\n',
        "the noise of an earlier state comes back",
        ("privacy",),
    ),
    Mutation(
        ACCOUNTING,
        "max(0.0, found) if found == found else math.inf",
        "max(0.0, found)",
        "an accountant that gives out says that nothing was spent",
        ("privacy",),
    ),
    # ---- accounting, sampling, ranks, the model ----
    Mutation(
        PRIVATE,
        "        self._require_poisson()\n        spent = epsilon(",
        "        spent = epsilon(",
        "batches of fixed size have an epsilon",
        ("privacy",),
    ),
    Mutation(
        ACCOUNTING,
        "    if any(one.noise_multiplier == 0 for one in spent):\n        return math.inf\n",
        "    if any(one.noise_multiplier == 0 for one in spent):\n        return 0.0\n",
        "without noise nothing is spent",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        "Mechanism(last.noise_multiplier, last.sample_rate, last.steps + 1)",
        "Mechanism(last.noise_multiplier, last.sample_rate, last.steps +"
        " bool(self.clipped_share()))",
        "steps are counted only when a sample was clipped",
        ("privacy",),
    ),
    Mutation(
        SAMPLING,
        'step_seed(seed, "poisson", step)',
        'step_seed(seed, "poisson", step // 2)',
        "two steps have one batch",
        ("privacy",),
    ),
    Mutation(
        PRIVATE,
        "            waiting = [dist.all_reduce(p.grad, group=self.process_group, async_op=True)"
        " for _, p in self._named]\n",
        "            waiting = []\n",
        "ranks keep their gradients to themselves",
        ("distributed",),
    ),
    Mutation(
        PRIVATE,
        "    key = _agreed(key, model, process_group) +",
        "    key = [key, _agreed(key, model, process_group)][0] +",
        "every rank draws a noise of its own",
        ("distributed",),
    ),
    Mutation(
        LAYERS,
        'for name in ("flow", "layer_name", "flattened", "anchor", "public_class"):',
        'for name in ("flow", "layer_name", "flattened", "public_class"):',
        "unwrap leaves something behind",
    ),
    Mutation(
        LAYERS,
        "            grad = g @ (wide.T if ctx.transposed else wide)\n",
        "            grad = (g / g.norm().clamp(min=1)) @ (wide.T if ctx.transposed else wide)\n",
        "clipping reaches the gradient of the input",
    ),
    # ---- the command ----
    Mutation(
        TRAIN,
        '_same_settings(known, Recipe.resolved(options, known["records"]), out)',
        "",
        "a run goes on with other settings, and spends more than it says",
        ("train",),
    ),
    Mutation(
        TRAIN,
        'if _digest(key) != self.known["key_digest"]:',
        "if False:",
        "a run goes on with another key, under fresh noise",
        ("train",),
    ),
    Mutation(
        RECIPE,
        '"delta": default_delta(records),',
        '"delta": 1 / records,',
        "delta is as large as publishing a record",
        ("train",),
    ),
]


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "flashdp", sys.argv[1:]))
