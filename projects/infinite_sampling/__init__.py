"""Infinite Sampling: rollouts of grouped RL in few rows of key-value cache, with completions that
no schedule changes.

L. Wang, H. Xie, X. Wang, T. Huang, M. Li, D. Wang: "Infinite Sampling: Efficient and Stable Grouped
RL Training for Large Language Models", arXiv 2506.22950.
"""

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.rollout import Completion, Rollout, Schedule, Stats
from projects.infinite_sampling.scheduler import Plan, Queue, lower_bound, plan, replay

__all__ = [
    "Completion",
    "Engine",
    "Plan",
    "Queue",
    "Rollout",
    "Schedule",
    "Stats",
    "lower_bound",
    "plan",
    "replay",
]
