"""Mutation tests of Infinite Sampling: each mutation must turn the tests red.

    python tests/projects/infinite_sampling/mutations.py          # all; some minutes on two cores
    python tests/projects/infinite_sampling/mutations.py cache    # those whose reason contains the
    word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

(
    ENGINE,
    ROLLOUT,
    SAMPLER,
    RUN,
    FIXED_ROWS,
    PAGED_ROWS,
    CACHE,
    SCHEDULER,
    STREAMS,
    GRPO,
    PREDICTOR,
    TRAIN,
    SAMPLE,
    PROMPTS,
    TRL,
    BASELINES,
) = (
    f"projects/infinite_sampling/{name}.py"
    for name in (
        "engine",
        "rollout",
        "sampler",
        "run",
        "fixed_rows",
        "paged_rows",
        "cache",
        "scheduler",
        "streams",
        "grpo",
        "predictor",
        "train",
        "sample",
        "prompts",
        "trl_rollout",
        "baselines",
    )
)

MUTATIONS = [
    # ---- random numbers ----
    Mutation(
        STREAMS,
        "cumulative[:, -1])[:, None], right=True)",
        "cumulative[:, -1])[:, None])",
        "a token of probability 0 can be drawn",
        ("streams",),
    ),
    Mutation(
        STREAMS,
        "repr((seed, index, tuple(",
        "repr((seed, 0, tuple(",
        "all completions of a group have one stream",
        ("streams",),
    ),
    # ---- cache ----
    Mutation(
        FIXED_ROWS,
        "[0] * self.count, [self.tokens - 1] * self.count, [0] * self.count",
        "[0] * self.count, [0] * self.count, [0] * self.count",
        "idle rows of the cache write over the prompt",
    ),
    Mutation(
        FIXED_ROWS,
        "if self._holds[row] != job.prompt:",
        "if self._holds[row] is None:",
        "a slot of the cache keeps another prompt",
    ),
    Mutation(
        SAMPLER,
        "torch.arange(width, device=self.device) <= positions",
        "torch.arange(width, device=self.device) < positions + 2",
        "a row sees one token of the cache too many",
    ),
    Mutation(
        CACHE,
        "self.users[page] += 1",
        "self.users[page] += 0",
        "shared pages of the cache are freed while they are in use",
    ),
    Mutation(
        PAGED_ROWS,
        "writes if pad is None else writes.masked_fill(pad, self.cache.scratch)",
        "writes",
        "padding of a forward writes over the prompt's page of the cache",
    ),
    # ---- the loop ----
    Mutation(
        RUN,
        "            job.fed = len(job.tokens) - 1\n",
        "            job.fed = max(0, len(job.tokens) - 2)\n",
        "a job taken up again feeds a token twice",
    ),
    Mutation(
        RUN,
        'barrier=schedule.mode in ("full", "micro")',
        'barrier=schedule.mode == "full"',
        "micro groups do not wait for one another",
    ),
    Mutation(
        SAMPLER,
        "if len(tokens) >= limit else None",
        "if len(tokens) >= limit - 1 else None",
        "a completion is cut one token short",
    ),
    Mutation(
        RUN,
        "len(job.tokens) == max(1, self.schedule.prefix):",
        "len(job.tokens) == 1:",
        "the hidden state is another token's",
        ("predictor",),
    ),
    # ---- plans ----
    Mutation(
        SCHEDULER,
        "ordered[slots - 1] + ordered[slots] if",
        "ordered[0] + ordered[1] if",
        "the lower bound is too high",
        ("scheduler",),
    ),
    Mutation(
        SCHEDULER,
        "step = eps * bound / len(durations)",
        "step = bound",
        "states are merged too coarsely",
        ("scheduler",),
    ),
    Mutation(
        SCHEDULER,
        'sign = 1 if self.refill == "plan_sjf" else -1',
        'sign = -1 if self.refill == "plan_sjf" else 1',
        "shortest and longest first are swapped",
        ("scheduler",),
    ),
    Mutation(
        SCHEDULER,
        "own = max(queues, key=lambda queue: sum(",
        "own = max(queues, key=lambda queue: -sum(",
        "a slot steals from the smallest queue",
        ("scheduler",),
    ),
    Mutation(
        SCHEDULER,
        "end = max(end, spans[-1][3])",
        "end = spans[-1][3]",
        "a round of the replay ends with its last row",
        ("scheduler",),
    ),
    # ---- GRPO ----
    Mutation(
        GRPO,
        "return per_token.sum() / of.tokens",
        "return per_token.sum() / mask.sum()",
        "a micro batch is divided by its own tokens",
        ("grpo",),
    ),
    Mutation(
        GRPO,
        "(per_token.sum(-1) / mask.sum(-1)).sum() / of.sequences",
        "(per_token.sum(-1) / mask.sum(-1)).mean()",
        "a micro batch is divided by its own completions",
        ("grpo",),
    ),
    Mutation(
        GRPO,
        "rewards.std(-1, keepdim=True)",
        "rewards.std(-1, keepdim=True, correction=0)",
        "the standard deviation is not Bessel's",
        ("grpo",),
    ),
    Mutation(
        GRPO,
        "return centred.masked_fill(equal, 0.0)",
        "return centred",
        "equal rewards leave a rounding error over delta",
        ("grpo",),
    ),
    Mutation(
        GRPO,
        "apart = (reference - logprobs)",
        "apart = (logprobs - reference)",
        "the divergence is the other way round",
        ("grpo",),
    ),
    Mutation(
        GRPO,
        "-torch.minimum(ratio * gain",
        "-torch.maximum(ratio * gain",
        "clipping takes the better of the two",
        ("grpo",),
    ),
    Mutation(
        GRPO,
        "start = len(row) - len(one.tokens) - 1\n",
        "start = len(row) - len(one.tokens)\n",
        "the first token of a completion has no loss",
        ("grpo",),
    ),
    Mutation(
        GRPO,
        "return per_token.sum() / (of.sequences * of.limit)",
        "return per_token.sum() / (mask.shape[0] * of.limit)",
        "dr_grpo is divided by a micro batch's completions and not as TRL does",
        ("trl_loss",),
    ),
    Mutation(GRPO, "DELTA = 1e-4", "DELTA = 1e-3", "delta is not TRL's", ("trl_loss",)),
    Mutation(
        GRPO,
        "(torch.exp(apart) - apart - 1)",
        "apart.square() / 2",
        "the divergence is not the k3 of TRL",
        ("trl_loss",),
    ),
    Mutation(
        GRPO,
        "((ratio > 1 + eps) & (gain > 0))",
        "(ratio > 1 + eps)",
        "tokens that still have a gradient are counted as clipped, unlike TRL",
        ("trl_loss",),
    ),
    # ---- TRL ----
    Mutation(
        TRL,
        "seen[number] += 1",
        "seen[number] += 0",
        "TRL gets one completion of a prompt several times",
        ("trl",),
    ),
    Mutation(
        TRL,
        "calls[step, training] += 1",
        "calls[step, training] += 0",
        "two batches of a TRL step have the same numbers",
        ("trl",),
    ),
    Mutation(
        TRL, "model, trainer.eos_token_ids,", "model, [],", "TRL's end tokens end nothing", ("trl",)
    ),
    Mutation(
        TRL,
        "temperature=trainer.temperature",
        "temperature=1.0",
        "TRL's temperature is not heeded",
        ("trl",),
    ),
    Mutation(
        TRL,
        "            **trainer.chat_template_kwargs",
        "            **{}",
        "TRL's arguments of the chat template are dropped",
        ("trl",),
    ),
    Mutation(
        TRL,
        "[c.tokens for c in made]",
        "[c.tokens[:-1] for c in made]",
        "TRL does not see the end token",
        ("trl",),
    ),
    Mutation(
        TRL,
        "model.train(training)",
        "model.train(False)",
        "TRL goes on with a model in eval mode",
        ("trl",),
    ),
    Mutation(
        TRL,
        "online is not None and training",
        "online is not None",
        "the predictor learns from TRL's evaluations",
        ("trl",),
    ),
    Mutation(TRL, '"top_k": (0, None),', "", "TRL's top_k is passed over in silence", ("trl",)),
    Mutation(
        BASELINES,
        "gradient_accumulation_steps=completions // micro_batch",
        "gradient_accumulation_steps=1",
        "the TRL that is measured takes smaller steps",
        ("trl",),
    ),
    Mutation(
        BASELINES,
        "model.generate = inside(model.generate)",
        "pass",
        "the rollout of the TRL that is measured has no time",
        ("trl",),
    ),
    # ---- predictors ----
    Mutation(
        PREDICTOR,
        "c.tokens[:prefix]) for c in kept]",
        "c.tokens[: prefix + 1]) for c in kept]",
        "a predictor sees a token beyond the prefix",
        ("predictor",),
    ),
    Mutation(
        PREDICTOR,
        "< target[:, None]",
        "<= target[:, None]",
        "a censored example excludes its own bin",
        ("predictor",),
    ),
    Mutation(
        PREDICTOR,
        "(p + t)[-_WINDOW:] for",
        "(p + t)[:_WINDOW] for",
        "a long prompt drives out the prefix",
        ("predictor",),
    ),
    Mutation(
        PREDICTOR,
        "np.where(censored, np.maximum(beyond",
        "np.where(~censored, np.maximum(beyond",
        "the wrong lengths are taken for censored",
        ("predictor",),
    ),
    Mutation(
        PREDICTOR,
        "places.index(place) for place in last",
        "0 for place in last",
        "a ridge sees another row's last token",
        ("predictor",),
    ),
    # ---- commands ----
    Mutation(
        TRAIN,
        'apart = max(line["mismatch"] for line in log.lines)',
        "apart = 0.0",
        "training does not say how far sampling is from it",
        ("command",),
    ),
    Mutation(
        TRAIN,
        'keep=lambda line: line["step"] <= done',
        "keep=lambda line: True",
        "a step that was logged but not kept stands in the log twice",
        ("command",),
    ),
    Mutation(
        TRAIN,
        '"source": source_digest(written)',
        '"source": ""',
        "a run goes on with a reward function that was changed",
        ("command",),
    ),
    Mutation(
        TRAIN,
        "check_trained(self.parameters.items())",
        "",
        "a model that has come apart is saved",
        ("command",),
    ),
    Mutation(
        PROMPTS,
        "longest + recipe.max_new_tokens,",
        "longest,",
        "prompts with their completions are longer than the model",
        ("command",),
    ),
    Mutation(
        SAMPLE,
        "for i in range(recipe.group) if (p, i) not in done",
        "for i in range(recipe.group)",
        "going on samples again what is there",
        ("command",),
    ),
    Mutation(
        SAMPLE,
        'begin(options.out / "run.json", known, begun(path))',
        "",
        "sampling goes on with other settings",
        ("command",),
    ),
]

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "infinite_sampling", sys.argv[1:]))
