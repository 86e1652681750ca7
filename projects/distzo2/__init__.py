"""DistZO2 (arXiv 2507.03211): ZO2 over several processes and machines, bit for bit what one process
computes.
"""

from projects.distzo2.engine import DistZO2
from projects.distzo2.meshes import device_mesh, distributed
from projects.distzo2.ranks import Ranks

__all__ = ["DistZO2", "Ranks", "device_mesh", "distributed"]
