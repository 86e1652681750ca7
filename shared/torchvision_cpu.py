"""Let PyPI's torchvision import beside a CPU build of torch.

PyPI's torchvision wheel links its compiled operators against CUDA. Beside a CPU torch that library
cannot be loaded, and then `import torchvision` (and with it timm, peft and parts of transformers)
fails with "operator torchvision::nms does not exist". Everything used here is pure Python; it only
needs the *schemas* of two operators to exist. `install()` registers an import hook that defines
them just before torchvision is first imported, and only when torchvision's own library cannot be
loaded, so that a proper torchvision is left untouched. Detection operators stay unavailable.
"""

import importlib.machinery
import sys
from types import ModuleType

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# a torch.library.Library takes its definitions along when it is collected
_keep_alive: list[object] = []


class _BeforeTorchvision:
    """A finder that finds nothing: it mends the operators when torchvision is asked for, and lets
    the import go on.
    """

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name)
            if spec is not None and spec.submodule_search_locations:
                define_missing_operators(spec.submodule_search_locations[0])
        return None


def install() -> None:
    """Register the hook once; without effect when torchvision is already imported."""
    if "torchvision" not in sys.modules and not any(
        isinstance(f, _BeforeTorchvision) for f in sys.meta_path
    ):
        sys.meta_path.insert(0, _BeforeTorchvision())


def define_missing_operators(package_dir: str) -> bool:
    """Define torchvision's operator schemas unless the library in `package_dir` loads. True when
    they had to be defined.
    """
    from pathlib import Path

    import torch

    libraries = sorted(Path(package_dir).glob("_C*.so")) + sorted(Path(package_dir).glob("_C*.pyd"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    definitions = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        definitions.define(operator + _SIGNATURE)
    _keep_alive.append(definitions)
    return True
