"""The rollout engine: a group of completions per prompt, decoded in few rows of key-value cache, on
any decoder of transformers.

Completions of prompts are *jobs*. A schedule says how many rows there are and which job takes a row
that is free:

| mode | rows | refill |
| --- | --- | --- |
| `full` | one per job | never: the whole group at once |
| `micro` | `slots` | when all rows are done: the paper's micro sampling groups |
| `continuous` | `slots` | at once: the paper's continuous sampling, with fixed slots |
| `dynamic`, the default | what fits `budget_tokens` | with free pages; else the youngest waits |

Rows of fixed slots for which no job waits any more are not computed, and prompts that are wanted at
the same time are read in one forward.

With `prefix` > 0 all jobs first generate that many tokens in rounds, then a predictor says what
remains of each, and the rest is decoded by a plan: the paper's full framework. A job that was put
aside keeps its tokens and gives up its cache; taken up again, its tokens are fed in one forward
(`reingests`), so that memory is that of micro groups. Nothing is ever cut short.

One *step* is one forward of all rows with one token each. The first token of a completion takes
none: it is drawn from the logits of the prompt's last token, which one forward per prompt gives
once for its whole group.

`fixed_shape` makes every forward of a rollout one of [slots, 1] tokens that sees the whole width of
the cache, tokens of a job that was put aside included: then float32 gives the same completions
under any schedule with as many slots. Otherwise a row of another batch size may differ in the last
bit and, seldom, tip a draw.
"""

from collections.abc import Callable, Mapping, Sequence

from projects.infinite_sampling.rollout import Completion, Rollout, Schedule, Stats
from projects.infinite_sampling.run import Run
from projects.infinite_sampling.sampler import Sampler
from projects.infinite_sampling.selfcheck import check_rows
from shared.errors import UserError


class Engine(Sampler):
    """Samples completions from a model; arguments as `Sampler` takes them."""

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        group: int | Sequence[tuple[int, int]],
        schedule: Schedule,
        on_completion: Callable[[Completion], object] = lambda completion: None,
        on_step: Callable[[Stats], object] = lambda stats: None,
        limits: Mapping[tuple[int, int], int] | None = None,
    ) -> Rollout:
        """Sample `group` completions of each prompt, or the (prompt, index) pairs that `group`
        lists.

        Args:
            prompts: tokens of each.
            on_completion: called with each completion as it ends.
            on_step: called after each step.
            limits: tokens of some (prompt, index) at most, where fewer than `max_new_tokens`:
                forced lengths, for a model with random
            weights.

        Raises:
            UserError: an empty prompt, one too long for the model, a model that gives other logits
                in rows of cache than in a plain forward or any that are not finite, a budget too
                small for a row.
        """
        pairs = (
            [(p, i) for p in range(len(prompts)) for i in range(group)]
            if isinstance(group, int)
            else list(group)
        )
        if not pairs:
            return Rollout([], Stats())
        for number, tokens in enumerate(prompts):
            if not len(tokens):
                raise UserError(
                    f"prompt {number + 1} is empty; a model needs at least one token to go on from"
                )
            if self.context is not None and len(tokens) + self.max_new_tokens > self.context:
                raise UserError(
                    f"prompt {number + 1} has {len(tokens)} tokens; with {self.max_new_tokens} new"
                    f" ones that is more than the model's context of {self.context}"
                )
        self.check([prompts[prompt] for prompt, _ in pairs])
        return Run(self, prompts, pairs, schedule, on_completion, on_step, limits or {}).go()

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Try whether the model may be decoded in rows of cache, for prompts that are to come.
        Rollouts do it for their own, where they have shorter or longer ones.

        Raises UserError, which names the model, where it may not.
        """
        check_rows(self, prompts)
