"""Mutations of the engine, each of which must turn the tests red.

    python tests/projects/zo2/mutations.py            # all; four minutes on two cores
    python tests/projects/zo2/mutations.py flush      # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

CHANGES = "projects/zo2/changes.py"
WALK = "projects/zo2/walk.py"
PERTURBATION = "projects/zo2/perturbation.py"
ENGINE = "projects/zo2/engine.py"
LANES = "projects/zo2/lanes.py"
STORAGE = "projects/zo2/storage.py"
OPTIONS = "projects/zo2/options.py"
NOISE = "projects/zo2/noise.py"
UNITS = "projects/zo2/units.py"
STREAMS = "projects/zo2/streams.py"
MEZO = "projects/zo2/mezo.py"
RUNS = "projects/zo2/runs.py"
STEPLOG = "projects/zo2/steplog.py"
BUDGET = "projects/zo2/budget.py"

MUTATIONS = [
    Mutation(
        "projects/zo2/placement.py",
        "                    self._take_back(store, range(index))\n",
        "",
        "a model whose memory could not be had stays half away",
        ("engine",),
    ),
    Mutation(
        "projects/zo2/placement.py",
        "() if in_place else range(len(self.layouts))",
        "()",
        "a model that the device has no room for stays away",
        ("engine",),
    ),
    Mutation(
        "projects/zo2/tables.py",
        'return "holds" if same and seeds >= 5 else "partly"',
        'return "holds" if same else "partly"',
        "one seed shows that a model has learnt",
        ("claims",),
    ),
    Mutation(
        "projects/zo2/command.py",
        '"inplace" if options.dtype == "float32" else "fresh"',
        '"inplace"',
        "in bfloat16 the weights drift by default",
        ("finetune",),
    ),
    Mutation(
        STEPLOG,
        "        self._log.write(line)\n",
        "        self._log.write(line, sync=False)\n",
        "the log's lines are not on the disk when the run goes on",
        ("steplog",),
    ),
    Mutation(
        BUDGET,
        "return waiting + inside + scores,",
        "return inside + scores,",
        "a plan forgets the activations that wait between the blocks",
        ("finetune",),
    ),
    Mutation(
        LANES,
        "upcoming = (block + step) % self.blocks",
        "upcoming = min(block + step, self.blocks - 1)",
        "the first block is not uploaded ahead of the next step",
        ("lanes",),
    ),
    Mutation(
        CHANGES,
        "            signal.signal(signal.SIGINT, lambda number, frame:"
        " interrupted.append(number))\n",
        "            pass\n",
        "Ctrl-C ends the engine's arithmetic in its midst",
        ("engine",),
    ),
    Mutation(
        CHANGES,
        """        if interrupted:
            raise KeyboardInterrupt
""",
        "",
        "Ctrl-C is forgotten",
        ("engine",),
    ),
    Mutation(
        WALK,
        """                self.changes.unusable = True
                error.add_note(UNUSABLE)
""",
        "                pass\n",
        "a failure in the midst of a change is passed over",
        ("engine",),
    ),
    Mutation(
        PERTURBATION,
        """            for parameter, home, _, _ in visit.tensors:
                parameter.data = home
""",
        "            pass\n",
        "loading into an unusable engine leaves parameters bound to their perturbed copies",
        ("engine",),
    ),
    Mutation(
        ENGINE,
        "lr = self.options.rate(self.steps) if lr is None else lr",
        "lr = self.options.rate(self.steps + 1) if lr is None else lr",
        "the schedule of the learning rate is a step ahead",
    ),
    Mutation(
        ENGINE,
        "        self.model.eval()\n        sides = self.forwards.sides\n",
        """        if self._perturbation.pending is not None:
            self._perturbation.pending.lr = lr
        self.model.eval()
        sides = self.forwards.sides
""",
        "the pending update uses the learning rate of the next step",
    ),
    Mutation(
        PERTURBATION,
        """        if self.pending is not None:
            self.update_noise.seed(self.pending.seed)

    def apply_pending""",
        "\n    def apply_pending",
        "the update stream is not seeded in each step",
    ),
    Mutation(
        ENGINE,
        """        self.flush()
        self.model.eval()
        return self._walk.forward(""",
        """        self.model.eval()
        return self._walk.forward(""",
        "no flush before an evaluation",
        ("engine",),
    ),
    Mutation(
        PERTURBATION,
        "[(plus, home, 1.0), (home, plus, -2.0)], self.options.eps)",
        """[(plus, home, 1.0)], self.options.eps)
            self.probe_noise.add([(home, plus, -2.0)], self.options.eps)""",
        "the second copy of a shared parameter has a noise of its own",
    ),
    Mutation(
        PERTURBATION,
        '("plus", "minus"): -2.0',
        '("plus", "minus"): -1.0',
        "the second probe is at theta and not at theta - eps z",
    ),
    Mutation(
        WALK,
        '        self.move(visit, "home")\n',
        "",
        "the perturbation is not taken away when a unit is left",
    ),
    Mutation(
        PERTURBATION,
        """            if self.options.probe == "inplace":
                self.probe_noise.restore(self._twin_states[parameter])
                self.probe_noise.add([(home, home, 1.0)], self.options.eps)
""",
        "",
        "shared parameters are not restored",
    ),
    Mutation(
        LANES,
        "for f in (slot.ready, slot.drained, self._written.get(block))",
        "for f in (slot.ready, slot.drained)",
        "a prefetch does not wait for the block's own write",
        ("lanes",),
    ),
    Mutation(
        LANES,
        "for f in (slot.ready, slot.drained, self._written.get(block))",
        "for f in (slot.ready, self._written.get(block))",
        "an upload does not wait until its slot has drained",
        ("lanes",),
    ),
    Mutation(
        LANES,
        "free = [s for s in self._slots if s.block is None] or [s for s in"
        " self._slots if evict and not s.in_use]",
        "free = [s for s in self._slots if s.block is None] or [s for s in self._slots if evict]",
        "a slot in use is given away",
        ("lanes", "engine"),
    ),
    Mutation(
        STORAGE,
        "            self.nbytes += round_up(f.nbytes, alignment)\n",
        "            self.nbytes += f.nbytes\n",
        "tensors in a slot are not padded to the alignment",
        ("storage",),
    ),
    Mutation(
        STORAGE,
        "self.fields = sorted(fields, key=lambda f: not f.writable)",
        "self.fields = list(fields)",
        "frozen tensors travel back",
        ("storage", "oracles"),
    ),
    Mutation(
        WALK,
        "write=self.placement.changes_something(visit.unit)",
        "write=True",
        "a frozen block is written back",
    ),
    Mutation(
        OPTIONS,
        "return 0.0 if any(part in name for part in self.no_decay) else self.weight_decay",
        "return self.weight_decay",
        "biases and norms decay",
    ),
    Mutation(
        ENGINE,
        "Pending(seed, g, lr) if math.isfinite(g) else None",
        "Pending(seed, g, lr)",
        "an update that is not finite is not dropped",
    ),
    Mutation(
        ENGINE,
        "Pending(seed, g, lr) if math.isfinite(g) else None",
        "Pending(seed, g, lr) if g and math.isfinite(g) else None",
        "a projected gradient of zero does not decay",
    ),
    Mutation(
        ENGINE,
        "if seed is None else seed\n",
        "if not seed else seed\n",
        "seed 0 is treated as none",
    ),
    Mutation(
        WALK,
        "        torch.set_autocast_cache_enabled(False)\n",
        "",
        "autocast serves the first forward's weights to the second",
    ),
    Mutation(
        STORAGE,
        "< (steps - inner).abs_()",
        "< (steps - inner).abs_().sqrt_()",
        "stochastic rounding is biased outwards",
        ("storage",),
    ),
    Mutation(
        STORAGE,
        "exponent.sub_(mantissa_bits)",
        "exponent.sub_(mantissa_bits - 1)",
        "stochastic rounding uses steps twice as long",
        ("storage",),
    ),
    Mutation(
        STORAGE,
        ".clamp_(min=smallest_exponent)",
        "",
        "stochastic rounding forgets the subnormal numbers",
        ("storage",),
    ),
    Mutation(
        NOISE,
        "while numel - start >= piece + 16:",
        "while numel - start > piece:",
        "the last piece of noise may be shorter than 16",
        ("noise",),
    ),
    Mutation(
        NOISE,
        """        for piece in self._pieces(tensor):
            self._z(tensor, piece)
""",
        "        return\n",
        "skip() does not advance the stream",
        ("noise", "engine"),
    ),
    Mutation(
        NOISE,
        "        if all(tensor.is_contiguous() for tensor in tensors):\n",
        "        if True:\n",
        "tensors that are not contiguous are taken for flat ones",
        ("noise",),
    ),
    Mutation(
        NOISE,
        "    return dtype != torch.float16\n",
        "    return True\n",
        "float16 noise is doubled after it was rounded",
        ("noise", "oracles"),
    ),
    Mutation(
        NOISE,
        "            z.mul_(g)\n            if decay:",
        "            z.mul_(g * lr)\n            lr = 1.0\n            if decay:",
        "the update is rounded once less than published",
        ("published",),
    ),
    Mutation(
        ENGINE,
        "return losses[0].item(), ((losses[0] - losses[1]) / (2 * self.options.eps)).item()",
        "return losses[0].item(), (plus - minus) / (2 * self.options.eps)",
        "the projected gradient is rounded in float64",
        ("published",),
    ),
    Mutation(
        MEZO,
        'NO_DECAY = ("bias", "layer_norm", "layernorm")',
        'NO_DECAY = ("bias", "layer_norm", "layernorm", "ln")',
        "parameters do not decay that do in the published trainer",
        ("published",),
    ),
    Mutation(
        RUNS,
        'if began.get("tokenizer") != header["tokenizer"]:',
        "if False:",
        "a run goes on with another tokenizer",
        ("finetune",),
    ),
    Mutation(
        ENGINE,
        "if not math.isfinite(lr):",
        "if False:",
        "a learning rate that is no number reaches the weights",
        ("published",),
    ),
    Mutation(
        WALK,
        "        self.order = [self.root, *self.visited]\n",
        "        self.order = [self.root, *self.units.values()]\n",
        "units update in the order of the module tree",
        ("oracles", "engine"),
    ),
    Mutation(
        WALK,
        "        for late in left:\n",
        "        for late in left[:0]:\n",
        "what the next forward does not reach loses its update",
        ("engine",),
    ),
    Mutation(
        WALK,
        "                if self._lockstep.active == self._streams - 1:\n",
        "                if self._lockstep.active == 0:\n",
        "a block leaves after the first forward",
    ),
    Mutation(
        WALK,
        "        elif self._lockstep.active == self._plus:\n",
        "        elif self._lockstep.active == self._streams - 1:\n",
        "with micro-batches only the last one sees theta - eps z",
    ),
    Mutation(
        WALK,
        "        minus = self._lockstep.active >= self._plus\n",
        "        minus = False\n",
        "both forwards see the same copy of a shared parameter",
    ),
    Mutation(
        WALK,
        """        if self.visit is not None:
            self.depart()
        self.end_twins()
""",
        "        self.end_twins()\n",
        "a fault inside a block leaves it perturbed",
        ("engine",),
    ),
    Mutation(
        PERTURBATION,
        """            if unit.name in self.pending.applied:
                self.update_noise.skip(parameter.data)
            else:
""",
        "            if True:\n",
        "after a fault an update is applied twice",
        ("engine",),
    ),
    Mutation(
        ENGINE,
        "        model.eval()  # a dropout",
        "        # a dropout",
        "dropout stays on until the first step",
    ),
    Mutation(
        ENGINE,
        """        self.model.eval()
        sides = self.forwards.sides
""",
        "        sides = self.forwards.sides\n",
        "a step does not switch dropout off",
    ),
    Mutation(
        UNITS,
        "{p for p, n in users.items() if n > 1} | set(root.values())",
        "set(root.values())",
        "tied weights are probed twice",
        ("units", "oracles"),
    ),
    Mutation(
        STREAMS,
        "                    _set_torch_context(contexts[index])\n",
        "",
        "one forward's autocast leaks into the other",
        ("streams",),
    ),
    Mutation(
        ENGINE,
        """        self._perturbation.pending = None
        if self._changes.unusable:
""",
        "        if self._changes.unusable:\n",
        "loading keeps the pending update of before",
        ("engine",),
    ),
    Mutation(
        ENGINE,
        """        if flush:
            self.flush()
        yield from self._placement.tensors()
""",
        "        yield from self._placement.tensors()\n",
        "no flush before saving",
        ("engine",),
    ),
    Mutation(
        WALK,
        "(unit.block is not None or not all(p in self._shared for p in unit.parameters.values()))",
        "not all(p in self._shared for p in unit.parameters.values())",
        "a frozen block may run twice, the second time without its weights",
        ("engine",),
    ),
    Mutation(
        PERTURBATION,
        '1.0 if phase == "plus" else -1.0, noise)',
        '1.0 if phase == "plus" else -2.0, noise)',
        "the fresh probe is not symmetric",
    ),
    Mutation(
        ENGINE,
        'step_seed(self.options.seed, "rounding", self.steps, block)',
        'step_seed(self.options.seed, "rounding", block)',
        "stochastic rounding draws the same numbers in every step",
    ),
    Mutation(
        ENGINE,
        "        self.steps += 1\n",
        "        self.steps += g != 0\n",
        "a step without a gradient is not counted",
    ),
    Mutation(
        PERTURBATION,
        "noise, cache_at = self._carve(self._cache, cache_at, home)",
        "noise, _ = self._carve(self._cache, 0, home)",
        "the cached noises of a block lie on top of each other",
    ),
    Mutation(
        LANES,
        "            done.set_exception(error)\n",
        "            raise\n",
        "without overlap a failed upload leaves a slot that claims to hold the block",
        ("lanes",),
    ),
    Mutation(
        STREAMS,
        "            coroutine.gr_context = copy_context()",
        "            pass",
        "context variables do not reach the loss",
        ("streams",),
    ),
    Mutation(
        STORAGE,
        "codec.encode(device, raw, generator) if self.part[1] == 1 else",
        "None if self.part[1] == 1 else",
        "low-bit blocks are not written back to the file",
    ),
    Mutation(
        WALK,
        "            if needed and (self.visit is None or self.visit.unit is not unit):\n",
        "            if False:\n",
        "layers that are called behind their unit's back are not trained",
        ("engine",),
    ),
    Mutation(
        UNITS,
        " or isinstance(module, nn.ModuleList | nn.ModuleDict):",
        ":",
        "a list of modules outside the blocks is not trained",
        ("units", "oracles"),
    ),
    Mutation(
        MEZO,
        "self.perturb(seed, -2)",
        "self.perturb(seed + 1, -2)",
        "the reference itself probes another direction",
        ("mezo",),
    ),
    Mutation(
        MEZO,
        "theta.data - lr * (g * z + self.weight_decay * theta.data)",
        "theta.data - lr * (g * z) - lr * (self.weight_decay * theta.data)",
        "the reference itself rounds otherwise than published",
        ("mezo", "oracles"),
    ),
    Mutation(
        ENGINE,
        "check_trained([(name, tensor)])",
        "pass",
        "weights that are not finite are saved",
        ("finetune",),
    ),
    Mutation(
        RUNS,
        "lost >= LOST_STEPS or (lost and done == steps)",
        "lost >= LOST_STEPS",
        "a run ends in a loss that is not finite",
        ("finetune",),
    ),
    Mutation(
        STEPLOG,
        "known is not None and known.steps != []",
        "known is not None",
        "a run without a step goes on with the header of another",
        ("steplog",),
    ),
    # ---- on a GPU ----
    Mutation(
        LANES,
        """            if computed is not None:
                computed.synchronize()
            assert slot.buffer is not None""",
        """            assert slot.buffer is not None""",
        "GPU: an offload does not wait for what computes the block",
        ("races",),
    ),
    Mutation(
        LANES,
        "self._offload.submit(computed.synchronize) if computed is not None else None",
        "None",
        "GPU: a block that is not written back is overwritten while it computes",
        ("races",),
    ),
    Mutation(
        LANES,
        """            task()
        self._stream.synchronize()""",
        """            task()""",
        "GPU: a lane's task ends before its stream has finished",
        ("races",),
    ),
    Mutation(
        STORAGE,
        "if self.pinned:\n            memory",
        "if False:\n            memory",
        "GPU: blocks in memory are not page-locked",
        ("races",),
    ),
    Mutation(
        STORAGE,
        'pin_memory=device.type == "cuda"',
        "pin_memory=False",
        "GPU: staging memory is not page-locked",
        ("races",),
    ),
    Mutation(
        STORAGE,
        """            if device.is_cuda:
                torch.cuda.current_stream(device.device).synchronize()
""",
        "",
        "GPU: a file is written from memory that is still being filled",
        ("races",),
    ),
]

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "zo2", sys.argv[1:]))
