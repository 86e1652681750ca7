from .engine import DistZO2
from .meshes import device_mesh, distributed
from .ranks import Ranks

__all__ = ["DistZO2", "Ranks", "device_mesh", "distributed"]
