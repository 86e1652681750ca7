from .engine import Engine
from .rollout import Completion, Rollout, Schedule, Stats
from .scheduler import Plan, Queue, lower_bound, plan, replay

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
