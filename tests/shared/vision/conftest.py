"""Before torchvision is imported anywhere: see shared/torchvision_cpu.py."""

import shared  # noqa: F401
