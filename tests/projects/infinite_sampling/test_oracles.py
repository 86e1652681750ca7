"""The property the paper rests on: completions do not depend on the schedule. Against a sampler
without a cache, token for token.
"""

import itertools

import numpy as np
import pytest
import torch

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.paged_rows import PagedRows
from projects.infinite_sampling.rollout import Schedule
from projects.infinite_sampling.scheduler import Queue, lower_bound, replay, replay_framework
from projects.infinite_sampling.streams import draw, stream
from shared.errors import UserError

PROMPT = [3, 1, 4, 1, 5]
LIMIT = 20


class Oracle:
    """Knows what remains: from the lengths of a rollout that was made before."""

    needs_hidden = False

    def __init__(self, lengths: dict[tuple[int, int], int], prefix: int) -> None:
        self.lengths, self.prefix = lengths, prefix

    def predict(self, prefixes):
        assert all(len(tokens) == self.prefix for tokens in prefixes.tokens)
        return np.array([float(self.lengths[job] - self.prefix) for job in prefixes.jobs])


class Wrong(Oracle):
    def predict(self, prefixes):
        return np.array([float((7 * p + 11 * i) % 13 + 1) for p, i in prefixes.jobs])


def schedules(lengths):
    found = [Schedule("full")]
    found += [Schedule("micro", slots) for slots in (1, 2, 3, 5, 8, 16)]
    found += [Schedule("continuous", slots) for slots in (1, 4, 8)]
    for refill, prefix in itertools.product(
        ("fifo", "sjf_global", "lpt_global", "plan_static", "plan_sjf", "plan_lpt"), (0, 1, 4)
    ):
        found.append(Schedule("continuous", 4, refill, prefix, Oracle(lengths, prefix)))
    found += [Schedule("continuous", 4, "plan_sjf", 4, Wrong(lengths, 4))]
    # Jobs that lost their row are taken up again beside ones that have their prefix alone.
    found += [
        Schedule("dynamic", 4, "fifo", 2, Wrong(lengths, 2), budget_tokens=tokens, page=4)
        for tokens in (32, 40, 48, 60)
    ]
    found += [Schedule("dynamic", 4, page=page) for page in (3, 16)]
    found += [
        Schedule("dynamic", 2, "lpt_global", 3, Oracle(lengths, 3), page=4),
        Schedule("dynamic", 4, budget_tokens=28, page=4),
    ]
    return found


def rollout(model, schedule, prompts=(PROMPT,), group=16, limit=LIMIT, **options):
    return Engine(model, [0], limit, seed=7, **options).run(prompts, group, schedule)


@pytest.fixture(scope="module")
def lengths(llama):
    full = rollout(llama, Schedule("full"))
    return {(c.prompt, c.index): len(c.tokens) for c in full.completions}


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gpt2", "sdpa"), ("gpt2", "eager")],
)
def test_completions_are_those_of_a_sampler_without_a_cache(helpers, family, attention):
    model = helpers.make(family, attention=attention)
    prompts = [PROMPT, [2], [7, 8, 9, 10, 11, 12, 13, 14]]
    wanted = [helpers.naive(model, prompt, i, 7, LIMIT) for prompt in prompts for i in range(6)]
    # lengths differ, or there is nothing to schedule
    assert len({len(tokens) for tokens, _ in wanted}) > 4
    for schedule in (
        Schedule("full"),
        Schedule("continuous", 4),
        Schedule("continuous", 3, "plan_sjf", 3, Wrong({}, 3)),
        Schedule("dynamic", 3, page=4),
    ):
        made = rollout(model, schedule, prompts, 6)
        assert [c.tokens for c in made.completions] == [tokens for tokens, _ in wanted]
        for completion, (_, logprobs) in zip(made.completions, wanted, strict=True):
            # eager softmax is float32
            assert completion.logprobs == pytest.approx(
                logprobs, abs=1e-10 if attention == "sdpa" else 1e-6
            )
        # once for each prompt, whatever its group, and several in a forward
        assert 1 <= made.stats.prefills <= 3


def test_every_schedule_gives_the_same_completions_in_float64(llama, lengths):
    full = rollout(llama, Schedule("full"))
    reference = [c.tokens for c in full.completions]
    assert len({len(tokens) for tokens in reference}) > 5
    assert {c.finish for c in full.completions} == {"eos", "length"}
    for schedule in schedules(lengths):
        made = rollout(llama, schedule)
        assert [c.tokens for c in made.completions] == reference, schedule
        assert [c.finish for c in made.completions] == [c.finish for c in full.completions]
        assert made.stats.tokens == sum(map(len, reference))


def test_every_schedule_gives_the_same_completions_in_float32_with_fixed_shapes(helpers):
    model = helpers.make(dtype=torch.float32)
    reference = None
    for mode, refill, prefix in (
        ("micro", "fifo", 0),
        ("continuous", "fifo", 0),
        ("continuous", "sjf_global", 0),
        ("continuous", "lpt_global", 3),
        ("continuous", "plan_sjf", 5),
    ):
        made = rollout(
            model, Schedule(mode, 4, refill, prefix, Wrong({}, prefix)), fixed_shape=True
        )
        found = [(c.tokens, c.logprobs) for c in made.completions]
        reference = reference or found
        assert found == reference  # bit for bit, log-probabilities too
        assert made.stats.reingests == 0
        assert made.stats.occupancy < 1 or mode == "continuous"


def test_steps_are_those_of_the_replay(llama, lengths):
    durations = [n - 1 for n in lengths.values()]
    order = list(lengths.values())
    for slots in (1, 3, 4, 16):
        micro, continuous = (
            rollout(llama, Schedule("micro", slots)).stats,
            rollout(llama, Schedule("continuous", slots)).stats,
        )
        for stats, barrier in ((micro, True), (continuous, False)):
            wanted = replay(durations, slots, Queue(durations, slots), barrier)
            assert (stats.steps, stats.busy) == (wanted.steps, wanted.busy)
            assert sorted(stats.spans) == sorted(wanted.spans)
            assert stats.occupancy == pytest.approx(wanted.occupancy)
        assert continuous.steps <= micro.steps
        assert continuous.steps >= lower_bound(durations, slots)
    for refill, prefix in itertools.product(("plan_sjf", "plan_lpt", "lpt_global"), (0, 1, 4)):
        stats = rollout(
            llama, Schedule("continuous", 4, refill, prefix, Oracle(lengths, prefix))
        ).stats
        wanted, made = replay_framework(
            order, 4, prefix, lambda jobs, k=prefix: [order[j] - k for j in jobs], refill
        )
        assert (stats.steps, stats.busy) == (wanted.steps, wanted.busy)
        assert sorted(stats.spans) == sorted(wanted.spans)
        assert stats.plan == made
        unfinished = sum(n > prefix for n in order)
        assert (
            (unfinished / 4 <= stats.reingests <= unfinished)
            if prefix > 1
            else stats.reingests == 0
        )
        assert stats.reingested_tokens == unfinished * max(0, prefix - 1)
    full = rollout(llama, Schedule("full")).stats
    assert full.steps == max(durations)


def test_greedy_completions_are_those_of_generate(helpers):
    for family in ("llama", "gpt2"):
        model = helpers.make(family, seed=3)
        made = rollout(model, Schedule("continuous", 2), group=3, temperature=0)
        wanted = model.generate(
            torch.tensor([PROMPT]),
            do_sample=False,
            max_new_tokens=LIMIT,
            eos_token_id=0,
            pad_token_id=0,
        )
        assert [c.tokens for c in made.completions] == [wanted[0, len(PROMPT) :].tolist()] * 3


def test_one_forward_over_a_completion_draws_it_again(llama):
    for completion in rollout(
        llama, Schedule("continuous", 3, "plan_sjf", 4, Wrong({}, 4))
    ).completions:
        with torch.no_grad():
            logits = llama(input_ids=torch.tensor([PROMPT + completion.tokens[:-1]])).logits[
                0, len(PROMPT) - 1 :
            ]
        uniforms = torch.from_numpy(
            stream(7, PROMPT, completion.index, LIMIT)[: len(completion.tokens)]
        )
        tokens, logprobs = draw(logits, uniforms, 1.0)
        assert tokens.tolist() == completion.tokens
        assert logprobs.tolist() == pytest.approx(completion.logprobs, abs=1e-10)


def test_the_cache_is_what_the_formula_says_and_does_not_grow_with_the_group(llama):
    one = 2 * 2 * 2 * 8 * 8  # keys and values, layers, heads, head size, bytes
    for group in (8, 32, 64):
        for schedule in (
            Schedule("micro", 8),
            Schedule("continuous", 8),
            Schedule("continuous", 8, "plan_sjf", 4, Wrong({}, 4)),
        ):
            stats = rollout(llama, schedule, group=group).stats
            assert stats.token_bytes == one
            assert stats.cache_bytes == one * 8 * (len(PROMPT) + LIMIT)
            assert stats.prompt_bytes == one * len(PROMPT)
        paged = rollout(llama, Schedule("dynamic", 8, page=5), group=group).stats
        assert paged.cache_bytes == one * (8 * (len(PROMPT) + LIMIT) + 5)  # one page of scratch
    assert rollout(llama, Schedule("full"), group=32).stats.cache_bytes == one * 32 * (
        len(PROMPT) + LIMIT
    )


def test_dynamic_rows_are_more_than_fixed_ones_in_equal_memory_and_lose_theirs_without_pages(
    llama, lengths
):
    fixed = rollout(llama, Schedule("continuous", 4)).stats
    dynamic = rollout(llama, Schedule("dynamic", 4, page=4)).stats
    assert dynamic.rows / dynamic.steps > 4
    assert dynamic.steps < fixed.steps
    tight = rollout(llama, Schedule("dynamic", 4, budget_tokens=48, page=4)).stats
    assert tight.preemptions > 0
    assert tight.reingests > 0
    told = rollout(
        llama, Schedule("dynamic", 4, budget_tokens=48, page=4, predictor=Oracle(lengths, 0))
    ).stats
    assert told.preemptions < tight.preemptions
    with pytest.raises(UserError, match="too small for one row"):
        rollout(llama, Schedule("dynamic", 4, budget_tokens=24, page=4))
    with pytest.raises(UserError, match="fixed slots"):
        rollout(llama, Schedule("dynamic", 4), fixed_shape=True)


def test_many_prompts_share_a_small_pool(llama):
    prompts = [[i + 1] * (4 + i) for i in range(6)]
    wanted = [c.tokens for c in rollout(llama, Schedule("full"), prompts, 3).completions]
    made = rollout(llama, Schedule("dynamic", 2, budget_tokens=40, page=4), prompts, 3)
    assert [c.tokens for c in made.completions] == wanted
    # another order of the jobs: prompts come and go
    pairs = [(p, i) for i in range(3) for p in range(6)]
    made = rollout(llama, Schedule("dynamic", 2, budget_tokens=40, page=4), prompts, pairs)
    assert {(c.prompt, c.index): c.tokens for c in made.completions} == dict(
        zip([(p, i) for p in range(6) for i in range(3)], wanted, strict=True)
    )
    made = rollout(llama, Schedule("continuous", 4), prompts, pairs)
    assert [c.tokens for c in made.completions] == [wanted[3 * p + i] for p, i in pairs]


def test_prompts_are_read_together_and_completions_are_the_same(helpers):
    model, prompts = helpers.make(), [[i + 1] * (3 + 2 * i) for i in range(6)]
    wanted = [helpers.naive(model, prompt, i, 7, LIMIT)[0] for prompt in prompts for i in range(2)]
    for schedule, forwards in (
        (Schedule("full"), 1),
        (Schedule("continuous", 4), 5),
        (Schedule("continuous", 4, "plan_sjf", 2, Wrong({}, 2)), 5),
        (Schedule("dynamic", 8, page=4), 3),
    ):
        made = rollout(model, schedule, prompts, 2)
        assert [c.tokens for c in made.completions] == wanted
        assert made.stats.prefills <= forwards
    # one at a time where bits must not depend on what is beside
    single = rollout(model, Schedule("continuous", 4), prompts, 2, fixed_shape=True)
    assert single.stats.prefills == 6


def test_rows_for_which_no_job_waits_are_not_computed(llama, lengths):
    seen = []
    hook = llama.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        for schedule in (Schedule("full"), Schedule("micro", 5), Schedule("continuous", 5)):
            seen.clear()
            stats = rollout(llama, schedule).stats
            rows = [shape[0] for shape in seen if shape[1] == 1][-stats.steps :]
            durations = [n - 1 for n in lengths.values()]
            if schedule.mode == "full":
                assert rows == [sum(d > step for d in durations) for step in range(stats.steps)]
            assert rows[0] == (16 if schedule.mode == "full" else 5)
            assert rows[-1] < 5
            assert sorted(rows, reverse=True) == rows
        rollout(llama, Schedule("continuous", 5), fixed_shape=True)
        assert seen[-1] == (5, 1)
    finally:
        hook.remove()


def test_a_row_that_moved_leaves_no_prompt_behind(helpers, llama):
    """When rows are dropped at the end of the prefix phase, the third moves to where the first was;
    the next to come there is of the first's prompt again.
    """
    prompts = [[3, 1, 4], [7, 8, 9], [2, 5, 11]]
    pairs = [(1, 1), (2, 1), (0, 1), (0, 0), (1, 0), (2, 0)]
    made = Engine(llama, [], LIMIT, seed=7).run(
        prompts, pairs, Schedule("continuous", 3, "fifo", 4), limits={(0, 0): 2}
    )
    for completion, (prompt, index) in zip(made.completions, pairs, strict=True):
        wanted, _ = helpers.naive(llama, prompts[prompt], index, 7, LIMIT, eos=())
        assert completion.tokens == wanted[: 2 if (prompt, index) == (0, 0) else None]


def test_the_youngest_row_makes_room_and_none_that_was_there_before(llama, monkeypatch):
    admitted, lost = [], []
    admit, make_room = PagedRows.admit, PagedRows.make_room

    def watched_admit(self, row, job, totals):
        done = admit(self, row, job, totals)
        admitted.extend([job.number] if done else [])
        return done

    def watched_room(self):
        jobs = make_room(self)
        # the last time that each was given a row
        order = {number: place for place, number in enumerate(admitted)}
        for job in jobs:
            lost.append(job.number)
            assert all(order[live.number] < order[job.number] for live in self.live.values())
        return jobs

    monkeypatch.setattr(PagedRows, "admit", watched_admit)
    monkeypatch.setattr(PagedRows, "make_room", watched_room)
    made = rollout(llama, Schedule("dynamic", 4, budget_tokens=48, page=4))
    assert len(lost) == made.stats.preemptions > 0


@pytest.mark.parametrize("mode", ["continuous", "dynamic"])
def test_a_prompt_whose_group_is_done_leaves_the_memory(llama, mode):
    import gc
    import weakref

    prompts, held, most = [[i + 1] * 8 for i in range(10)], [], []

    class Watched(Engine):
        def prefill(self, prompts):
            logits, prefixes, at = super().prefill(prompts)
            held.extend(weakref.ref(prefix[0][0]) for prefix in prefixes)
            return logits, prefixes, at

    def alive(_):
        gc.collect()
        most.append(sum(ref() is not None for ref in held))

    engine = Watched(llama, [0], LIMIT, seed=7)
    engine.check(prompts)
    held.clear()
    made = engine.run(prompts, 2, Schedule(mode, 2, page=4), on_completion=alive)
    assert len(held) == 10
    assert max(most) <= (3 if mode == "continuous" else 7)
    assert most[-1] <= 1
    # keys and values, layers, heads, head size, bytes
    assert made.stats.prompt_bytes <= max(most) * 8 * 2 * 2 * 2 * 8 * 8


def test_a_larger_group_keeps_the_completions_of_the_smaller_one_and_seeds_differ(llama):
    small, large = (
        rollout(llama, Schedule("continuous", 4), group=5),
        rollout(llama, Schedule("continuous", 4), group=10),
    )
    assert [c.tokens for c in large.completions[:5]] == [c.tokens for c in small.completions]
    other = Engine(llama, [0], LIMIT, seed=8).run([PROMPT], 5, Schedule("continuous", 4))
    assert [c.tokens for c in other.completions] != [c.tokens for c in small.completions]


def test_a_single_token_an_end_at_once_and_the_longest_context(helpers, llama):
    one = rollout(llama, Schedule("continuous", 2), limit=1)
    assert [len(c.tokens) for c in one.completions] == [1] * 16
    assert one.stats.steps == 0
    everything = Engine(llama, range(23), LIMIT).run([PROMPT], 5, Schedule("micro", 2))
    assert [(len(c.tokens), c.finish) for c in everything.completions] == [(1, "eos")] * 5
    model = helpers.make("gpt2", positions=25)
    assert len(rollout(model, Schedule("continuous", 2)).completions) == 16
    with pytest.raises(UserError, match="more than the model's context of 24"):
        rollout(helpers.make("gpt2", positions=24), Schedule("continuous", 2))


def test_lengths_and_first_tokens_are_distributed_as_those_of_generate(helpers):
    from scipy.stats import chi2_contingency, ks_2samp

    model = helpers.make(dtype=torch.float32)
    made = Engine(model, [0], LIMIT, seed=1).run(
        [PROMPT], 2000, Schedule("continuous", 256, "plan_sjf", 3, Wrong({}, 3))
    )
    torch.manual_seed(0)
    theirs = model.generate(
        torch.tensor([PROMPT]),
        do_sample=True,
        top_k=0,
        num_return_sequences=2000,
        max_new_tokens=LIMIT,
        eos_token_id=0,
        pad_token_id=0,
    )[:, len(PROMPT) :]
    lengths = [
        (row == 0).int().argmax().item() + 1 if (row == 0).any() else LIMIT for row in theirs
    ]
    assert ks_2samp([len(c.tokens) for c in made.completions], lengths).pvalue > 0.01
    counts = np.stack(
        [
            np.bincount([c.tokens[0] for c in made.completions], minlength=23),
            np.bincount(theirs[:, 0], minlength=23),
        ]
    )
    assert chi2_contingency(counts[:, counts.sum(0) > 10]).pvalue > 0.01


def test_a_stop_string_ends_a_completion_when_its_text_holds_it(llama, lengths):
    class Letters:
        def decode(self, tokens):
            return "".join(chr(97 + token) for token in tokens)

    full = rollout(llama, Schedule("full"))
    texts = [Letters().decode(c.tokens) for c in full.completions]
    pair = next(text[5:7] for text in texts if len(text) > 10)
    made = rollout(llama, Schedule("continuous", 3), stop=[pair], tokenizer=Letters())
    ended = 0
    for completion, text in zip(made.completions, texts, strict=True):
        got = Letters().decode(completion.tokens)
        assert text.startswith(got)
        if pair in text:
            assert got == text[: text.index(pair) + 2]
            ended += completion.finish == "stop"
        else:
            assert got == text
    assert ended


def test_completions_are_told_of_as_they_end(llama, lengths):
    heard, steps = [], []
    engine = Engine(llama, [0], LIMIT, seed=7)
    made = engine.run(
        [PROMPT],
        16,
        Schedule("continuous", 4),
        on_completion=heard.append,
        on_step=lambda stats: steps.append(stats.steps),
    )
    assert sorted(heard, key=lambda c: c.index) == made.completions
    assert [c.index for c in heard] != list(range(16))
    assert steps == list(range(1, made.stats.steps + 1))


def test_what_cannot_be_driven_is_refused(helpers, llama):
    from transformers import (
        AutoModelForCausalLM,
        OpenAIGPTConfig,
        T5Config,
        T5ForConditionalGeneration,
    )

    for prompts in ([[]], [PROMPT, []]):
        with pytest.raises(UserError, match="is empty"):
            rollout(llama, Schedule(), prompts)
    uncached = AutoModelForCausalLM.from_config(
        OpenAIGPTConfig(vocab_size=23, n_embd=16, n_layer=1, n_head=2, attn_implementation="eager")
    )
    with pytest.raises(UserError, match="key-value cache"):
        rollout(uncached.eval(), Schedule())
    with pytest.raises(UserError, match="decoder"):
        Engine(
            T5ForConditionalGeneration(
                T5Config(vocab_size=23, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            [0],
            4,
        )
    with pytest.raises(UserError, match="eval"):
        Engine(helpers.make().train(), [0], 4)
    with pytest.raises(UserError, match="at least 1"):
        Engine(llama, [0], 0)
    with pytest.raises(ValueError, match="prefix phase"):
        Schedule("micro", prefix=3)
    with pytest.raises(ValueError, match="planned"):
        Schedule("dynamic", refill="plan_sjf")
