"""Infinite Sampling: rollouts of grouped RL in few rows of key-value cache, with completions that
no schedule changes.

L. Wang, H. Xie, X. Wang, T. Huang, M. Li, D. Wang: "Infinite Sampling: Efficient and Stable Grouped
RL Training for Large Language Models", arXiv 2506.22950.
"""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
