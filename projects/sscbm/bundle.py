"""A trained model with all that it takes to use it: names, groups, the size of images. It is kept
as model.safetensors and model.json.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from projects.sscbm.metrics import Predictions, predict
from projects.sscbm.model import (
    ConceptModel,
    EncoderOutput,
    Method,
    Similarity,
    build,
    named_backbone,
)
from shared.errors import UserError
from shared.files import atomic_json, atomic_save, read_json
from shared.vision.reading import Mode, read_image

WEIGHTS, SETTINGS = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Settings:
    """What model.json says."""

    method: Method
    backbone: str
    edge: int
    mode: Mode
    size: int
    encoder_output: EncoderOutput
    similarity: Similarity
    classes: tuple[str, ...]
    concepts: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3 if self.mode == "RGB" else 1, self.edge, self.edge)

    def build(self, seed: int = 0) -> ConceptModel:
        """An untrained model."""
        return build(
            self.method,
            lambda: named_backbone(self.backbone, self.shape),
            self.shape,
            len(self.concepts),
            len(self.classes),
            size=self.size,
            encoder_output=self.encoder_output,
            similarity=self.similarity,
            seed=seed,
        )


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model in eval mode, and its settings."""

    model: ConceptModel
    settings: Settings

    def read(self, file: Path) -> Tensor:
        """An image file as the model takes it, [channels, edge, edge]. Raises UserError."""
        return read_image(file, self.settings.mode, self.settings.edge)

    def predict(self, images: Tensor, given: Tensor | None = None) -> Predictions:
        """Probabilities of concepts and logits of classes, of images [n, channels, edge, edge]."""
        return predict(self.model, images, given)

    @torch.no_grad()
    def heat_maps(self, images: Tensor) -> Tensor:
        """[n, concepts, h, w]. Raises UserError for a method that has none."""
        device = next(self.model.parameters()).device
        return self.model.heat_maps(images.to(device)).cpu()

    def column(self, concept: str) -> int:
        """Raises UserError: there is no such concept."""
        if concept not in self.settings.concepts:
            raise UserError(
                f"there is no concept '{concept}'; there are {', '.join(self.settings.concepts)}"
            )
        return self.settings.concepts.index(concept)


@dataclass(frozen=True)
class Answer:
    """What an intervention changed: the probabilities of all classes before and after, and those of
    the concepts by the model itself.
    """

    before: dict[str, float]
    after: dict[str, float]
    concepts: dict[str, float]


def intervene(bundle: Bundle, image: Path | Tensor, values: Mapping[str, float]) -> Answer:
    """Set concepts of an image, and see what the class becomes.

    Args:
        image: a file, or pixels [channels, edge, edge].
        values: 0 or 1 by the concept's name; all others stay the model's own.

    Raises:
        UserError: no such concept, or another value.
    """
    pixels = (bundle.read(image) if isinstance(image, Path) else image).unsqueeze(0)
    given = torch.full((1, len(bundle.settings.concepts)), torch.nan)
    for name, value in values.items():
        if value not in (0, 1):
            raise UserError(f"'{name}' is set to {value}; a concept is 0 or 1")
        given[0, bundle.column(name)] = value
    own, changed = bundle.predict(pixels), bundle.predict(pixels, given)
    before, after = (
        dict(zip(bundle.settings.classes, one.logits[0].softmax(0).tolist(), strict=True))
        for one in (own, changed)
    )
    concepts = zip(bundle.settings.concepts, own.probabilities[0].tolist(), strict=True)
    return Answer(before, after, dict(concepts))


def save(bundle: Bundle, folder: Path) -> None:
    """Write the model; model.json comes last, so that it is there when all is."""
    weights = {name: value.cpu() for name, value in bundle.model.state_dict().items()}
    atomic_save(weights, folder / WEIGHTS, {"format": "pt"})
    atomic_json(folder / SETTINGS, asdict(bundle.settings))


def load(folder: Path, device: str | torch.device = "cpu") -> Bundle:
    """A model that `save` (or the command) wrote.

    Raises:
        UserError: the folder holds none, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record: dict[str, Any] | None = read_json(folder / SETTINGS)
    if record is None:
        raise UserError(f"--model {folder} holds no trained model; `train` makes one")
    try:
        groups = tuple(tuple(group) for group in record.pop("groups"))
        names = {name: tuple(record.pop(name)) for name in ("classes", "concepts")}
        settings = Settings(**record, **names, groups=groups)
        model = settings.build()
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (KeyError, TypeError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--model {folder} is damaged or of another version ({reason})") from None
    return Bundle(model.to(device).eval(), settings)


def picture(pixels: Tensor) -> Image.Image:
    """An image of a model's size as RGB, from its pixels."""
    values = pixels if pixels.dtype == torch.uint8 else (255 * pixels).round().byte()
    return Image.fromarray(values.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
