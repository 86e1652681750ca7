"""The networks: a concept bottleneck (CBM), concept embeddings (CEM), and SSCBM, which is CEM with
a heat map per concept.

Shapes: n images, k concepts, l classes, m numbers in an embedding, a map of d channels at h x w
places. `given` [n, k] sets probabilities from outside (an expert's intervention, RandInt): 0 or 1,
or NaN where the model's own stands.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from shared.errors import UserError
from shared.seeding import step_seed
from shared.vision.backbones import Backbone, Layers, backbone

Method = Literal["cbm", "cem", "sscbm"]
EncoderOutput = Literal["pooled", "logits"]
Similarity = Literal["dot", "cosine"]
LOGITS = 1000  # of an ImageNet head, which the authors' code takes for the image's vector


class Output(NamedTuple):
    """Of a batch.

    Attributes:
        probabilities: [n, k], the model's own, before anything that is given.
        concept_logits: [n, k], of which these are the sigmoid.
        logits: [n, l], of the classes.
        alignment: [n, k], spatial means of the heat maps; None without heat maps.
    """

    probabilities: Tensor
    concept_logits: Tensor
    logits: Tensor
    alignment: Tensor | None


class Encoder(nn.Module):
    """Images (float from 0 to 1, or uint8) to a spatial map [n, d, h, w] and a vector [n, width]:
    the map's mean, or 1000 numbers of a last layer on top.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, backbone: Backbone, shape: tuple[int, int, int], output: EncoderOutput):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.zeros(1, shape[0], 1, 1))
        self.register_buffer("deviation", torch.ones(1, shape[0], 1, 1))
        with torch.no_grad():  # a backbone is in eval mode, so that this leaves it as it is
            self.channels = int(backbone.spatial_map(torch.zeros(1, *shape)).shape[1])
        self.head = nn.Linear(self.channels, LOGITS) if output == "logits" else nn.Identity()
        self.width = LOGITS if output == "logits" else self.channels

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        values = images / 255 if images.dtype == torch.uint8 else images
        found = self.backbone.spatial_map((values - self.mean) / self.deviation)
        return found, self.head(found.mean((2, 3)))


def named_backbone(name: str, shape: Sequence[int]) -> Backbone:
    """A network with a spatial map by its name: one of shared.vision.backbones, or
    maps-WIDTH[-WIDTH...], which keeps the places of a frozen network's map: a 1 x 1 convolution,
    and 3 x 3 ones after it, with batch norm.
    """
    kind, *widths = name.split("-")
    if kind != "maps" or not widths or not all(width.isdigit() for width in widths):
        return backbone(name, shape)
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(pairwise([shape[0], *map(int, widths)])):
        edge = 3 if number else 1
        convolution = nn.Conv2d(a, b, edge, padding=edge // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(b), nn.ReLU()]
    return Layers(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), width=int(widths[-1])).eval()


class ConceptEmbeddings(nn.Module):
    """A positive and a negative embedding for each concept, and one probability head for all (CEM;
    steps 2 to 4 of SSCBM's label anchor).
    """

    def __init__(self, width: int, concepts: int, size: int):
        super().__init__()
        self.concepts = concepts
        self.contexts = nn.Sequential(nn.Linear(width, concepts * 2 * size), nn.LeakyReLU())
        self.probability = nn.Linear(2 * size, 1)

    def forward(self, h: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings [n, k, m] = p c+ + (1 - p) c-, and logits [n, k] of the model's own p."""
        both = self.contexts(h).unflatten(1, (self.concepts, -1))
        logits = self.probability(both).squeeze(2)
        p = replaced(logits.sigmoid(), given).unsqueeze(2)
        positive, negative = both.chunk(2, dim=2)
        return p * positive + (1 - p) * negative, logits


class ConceptModel(nn.Module):
    """What all three have in common: the encoder, and one linear layer from concepts to classes."""

    encoder: Encoder

    def forward(self, images: Tensor, given: Tensor | None = None) -> Output:
        raise NotImplementedError

    def heat_maps(self, images: Tensor, given: Tensor | None = None) -> Tensor:
        """[n, k, h, w]. Raises UserError for a model that has none."""
        raise UserError("this model has no heat maps; train --method sscbm")


class CBM(ConceptModel):
    """Concepts as k sigmoids, classes from them (Koh et al. 2020), trained together."""

    def __init__(self, encoder: Encoder, concepts: int, classes: int):
        super().__init__()
        self.encoder = encoder
        self.concept_head = nn.Linear(encoder.width, concepts)
        self.class_head = nn.Linear(concepts, classes)

    def forward(self, images: Tensor, given: Tensor | None = None) -> Output:
        logits = self.concept_head(self.encoder(images)[1])
        p = logits.sigmoid()
        return Output(p, logits, self.class_head(replaced(p, given)), None)


class CEM(ConceptModel):
    """Concept embeddings (Zarlenga et al. 2022): classes from the k mixed embeddings."""

    def __init__(self, encoder: Encoder, concepts: int, classes: int, size: int):
        super().__init__()
        self.encoder = encoder
        self.embeddings = ConceptEmbeddings(encoder.width, concepts, size)
        self.class_head = nn.Linear(concepts * size, classes)

    def forward(self, images: Tensor, given: Tensor | None = None) -> Output:
        _, h = self.encoder(images)
        mixed, logits = self.embeddings(h, given)
        return Output(logits.sigmoid(), logits, self.class_head(mixed.flatten(1)), None)


class SSCBM(CEM):
    """CEM, and a heat map per concept: the product of its embedding with each place of the map
    (section on the alignment loss; reconstructed).
    """

    def __init__(
        self,
        encoder: Encoder,
        concepts: int,
        classes: int,
        size: int,
        similarity: Similarity = "dot",
    ):
        super().__init__(encoder, concepts, classes, size)
        # After all that CEM has, so that the same seed gives both the same weights.
        self.place = nn.Linear(encoder.channels, size)
        self.similarity = similarity

    def forward(self, images: Tensor, given: Tensor | None = None) -> Output:
        found, h = self.encoder(images)
        mixed, logits = self.embeddings(h, given)
        # A product is linear, so the mean of a heat map is the product with the map's mean: the
        # maps themselves need not be made to train.
        e, places = self._sides(mixed, found)
        alignment = torch.einsum("nkm,nm->nk", e, places.mean((2, 3)))
        return Output(logits.sigmoid(), logits, self.class_head(mixed.flatten(1)), alignment)

    def heat_maps(self, images: Tensor, given: Tensor | None = None) -> Tensor:
        found, h = self.encoder(images)
        mixed, _ = self.embeddings(h, given)
        return torch.einsum("nkm,nmhw->nkhw", *self._sides(mixed, found))

    def _sides(self, mixed: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [n, k, m], and the map in their space [n, m, h, w]."""
        places = self.place(found.movedim(1, 3)).movedim(3, 1)
        if self.similarity == "cosine":
            return normalize(mixed, dim=2), normalize(places, dim=1)
        return mixed, places


def replaced(p: Tensor, given: Tensor | None) -> Tensor:
    """Probabilities with those that are given in their place."""
    return p if given is None else torch.where(given.isnan(), p, given.to(p.dtype))


def build(
    method: Method,
    backbone: Callable[[], Backbone],
    shape: tuple[int, int, int],
    concepts: int,
    classes: int,
    *,
    size: int = 16,
    encoder_output: EncoderOutput = "pooled",
    similarity: Similarity = "dot",
    seed: int = 0,
) -> ConceptModel:
    """A model with weights of the seed; torch's generator is left as it was.

    Args:
        backbone: makes the network that gives the spatial map; called within the seed.
        shape: of an image, [channels, height, width].
        size: m, numbers in an embedding.
        encoder_output: the image's vector: the mean of the map (default), or 1000 numbers of a
            last layer as in the authors' code.
        similarity: of embedding and place: their product (default, the authors' code) or cosine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "concept model"))
        encoder = Encoder(backbone(), shape, encoder_output)
        if method == "cbm":
            return CBM(encoder, concepts, classes)
        if method == "cem":
            return CEM(encoder, concepts, classes, size)
        return SSCBM(encoder, concepts, classes, size, similarity)


def start_from(backbone: nn.Module, file: Path) -> None:
    """Give a backbone the weights of a safetensors file, under its own names or timm's; what the
    file has beside them, as a head of ImageNet, is left.

    Raises:
        UserError: the file cannot be read, or lacks a tensor of the backbone.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights {file}: {' '.join(str(error).split())}") from None
    own = backbone.state_dict()
    taken = {name: found.get(name, found.get(name.removeprefix("model."))) for name in own}
    for name, value in taken.items():
        if name.endswith("num_batches_tracked"):
            taken[name] = own[name]
        elif value is None or value.shape != own[name].shape:
            has = "has no" if value is None else f"has, of shape {list(value.shape)},"
            raise UserError(f"the weights {file}: it {has} tensor '{name}' {list(own[name].shape)}")
    backbone.load_state_dict(taken)  # type: ignore[arg-type]
