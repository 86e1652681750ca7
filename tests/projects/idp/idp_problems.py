"""Small problems for IDP's tests: cells, a network with odd sizes, tasks, and slow computations."""

import torch
from torch import nn

from projects.idp.network import ResidualNet


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def network(width=7, seed=0):
    """A small network whose running statistics are not those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ResidualNet(3, 5, 3, [6, width]).train()
        for n in range(3):
            made(uniform(8, 3, 13, 13, seed=n))
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return made.eval()


def tasks(count=3, ways=3, shots=2, queries=2, size=13, seed=5):
    """Support [count, ways * shots, 3, size, size] and query images."""
    return (
        uniform(count, ways * shots, 3, size, size, seed=seed),
        uniform(count, ways * queries, 3, size, size, seed=seed + 1),
    )
