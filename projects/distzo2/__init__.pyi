from .engine import DistZO2
from .meshes import device_mesh, distributed

__all__ = ["DistZO2", "device_mesh", "distributed"]
