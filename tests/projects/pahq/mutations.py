"""Mutations of PAHQ, each of which must turn the tests red.

    python tests/projects/pahq/mutations.py          # all; some minutes on two cores
    python tests/projects/pahq/mutations.py head     # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

ENGINE, SEARCH, GRAPH, POLICY, QUANTISE, FAMILIES, ATTRIBUTION, ROC, SCHEDULER = (
    f"projects/pahq/{name}.py"
    for name in (
        *("engine", "search", "graph", "policy", "quantise", "families", "attribution", "roc"),
        "scheduler",
    )
)
DISCOVER, TASKS = "projects/pahq/discover.py", "projects/pahq/tasks.py"
ORACLES, FORMATS, SCORES, COMMAND, STREAMS = (
    *("oracles", "quantise", "attribution", "command", "scheduler"),
)

MUTATIONS = [
    Mutation(
        ENGINE,
        "self.mask[receiver].tobytes()",
        "self.mask[receivers[0]].tobytes()",
        "all heads read head 0's input",
        (ORACLES,),
    ),
    Mutation(
        ENGINE,
        "normed = part.attention_norm(x).flatten(1, 2)",
        "normed = (x * (part.attention_norm(x[:1]) / x[:1])).flatten(1, 2)",
        "the norm's scale of one input for all",
        (ORACLES,),
    ),
    Mutation(
        ENGINE,
        "of_head = [kv_heads.index(head // graph.group) for head in heads]",
        "of_head = [kv_heads.index(kv_heads[head % len(kv_heads)]) for head in heads]",
        "heads read another group's keys",
        (ORACLES,),
    ),
    Mutation(
        ENGINE,
        "total = self._sums[place] - wave.old_total if wave.senders else self._sums[place]",
        "total = self._sums[place]",
        "old outputs are counted beside the new ones",
        (ORACLES,),
    ),
    Mutation(
        ENGINE,
        "            if biases and bias is not None:",
        "            if False and bias is not None:",
        "biases of the output projections are forgotten",
        (ORACLES,),
    ),
    Mutation(
        SEARCH,
        "if (abs(effect) if absolute else effect) < threshold:",
        "if (abs(effect) if absolute else effect) <= threshold:",
        "an edge goes at equality",
        (ORACLES,),
    ),
    Mutation(
        SEARCH,
        'return senders if order == "normal" else senders[::-1]',
        "return senders",
        "the order of senders is ignored",
        (ORACLES,),
    ),
    Mutation(
        SEARCH,
        "engine.remove(receiver, batch[:gone], trial, gone - 1)",
        "engine.remove(receiver, batch[:gone], trial, 0)",
        "look-ahead keeps the outputs of its first variant",
        (ORACLES,),
    ),
    Mutation(
        SEARCH,
        "found = Found(mask, np.full(mask.shape, np.nan), _now(engine, metric))",
        "found = Found(mask, np.full(mask.shape, np.nan), 0.0)",
        "the floor is taken for nothing",
        (FORMATS,),
    ),
    Mutation(
        GRAPH,
        "counts[self.mlp_receiver(layer)] += self.heads",
        "counts[self.mlp_receiver(layer)] += 0",
        "MLPs do not read the heads of their layer",
        (ORACLES,),
    ),
    Mutation(
        GRAPH,
        "first = kv_head * self.group\n            return tuple(",
        "first = kv_head\n            return tuple(",
        "a key feeds the wrong heads",
        (ORACLES,),
    ),
    Mutation(
        POLICY,
        "for receiver in graph.inputs_of(graph.head(layer, head))",
        "for receiver in graph.inputs_of(graph.head(layer, 0))",
        "head 0 is the high one",
        (FORMATS,),
    ),
    Mutation(
        POLICY,
        "if self._last is None or self._last[0] is not x:",
        "if self._last is None:",
        "rounded activations of another input are used again",
        (FORMATS,),
    ),
    Mutation(
        QUANTISE,
        "scaled = (x * (1 / scale)).clamp_(-largest, largest)",
        "scaled = x * (1 / scale)",
        "values beyond the largest code are not clamped",
        (FORMATS,),
    ),
    Mutation(
        QUANTISE,
        "return product.mul_(x.scale).mul_(scale.flatten(0, -2).T)",
        "return product.mul_(x.scale).mul_(scale.mean())",
        "one scale for all heads",
        (FORMATS,),
    ),
    Mutation(
        FAMILIES,
        "qkv=torch.cat([weight[letter::3] for letter in range(3)]).contiguous(),",
        "qkv=weight.contiguous(),",
        "GPT-NeoX's Q, K and V are taken letter by letter",
        (ORACLES,),
    ),
    Mutation(
        FAMILIES,
        "    if q_norm is not None:\n        q, k = q_norm(q), k_norm(k)\n",
        "",
        "Qwen3's norms of heads are forgotten",
        (ORACLES,),
    ),
    Mutation(
        ATTRIBUTION,
        "return -products.cpu().numpy() * engine.graph.full()",
        "return products.cpu().numpy() * engine.graph.full()",
        "EAP has the other sign",
        (SCORES,),
    ),
    Mutation(
        ATTRIBUTION,
        "share = (step + 0.5) / steps",
        "share = 1.0",
        "EAP-IG does not integrate",
        (SCORES,),
    ),
    Mutation(
        ROC,
        "return _area(curve(points), lambda left, right: left)",
        "return _area(curve(points), lambda left, right: right)",
        "the staircase credits what nobody found",
        (SCORES,),
    ),
    Mutation(
        SCHEDULER,
        "            self._stream.wait_stream(torch.cuda.current_stream(self.device))\n",
        "",
        "a slice is overwritten while it is read",
        (STREAMS,),
    ),
    Mutation(
        SCHEDULER,
        "        if self._current in self._come:\n",
        "        if False:\n",
        "a slice is read before it has come",
        (STREAMS,),
    ),
    Mutation(
        DISCOVER,
        "                fresh=True,\n",
        "",
        "a run that goes on has another state",
        (COMMAND,),
    ),
    Mutation(
        TASKS,
        "if len(pieces) != 1:",
        "if not pieces:",
        "answers of several tokens are cut",
        (COMMAND,),
    ),
]

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "pahq", sys.argv[1:]))
