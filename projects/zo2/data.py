"""What the experiments train on: language-model batches, and the classification tasks of the
accuracy table.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import UserError

Batch = dict[str, Tensor]


def random_tokens(
    vocabulary: int, batch_size: int, tokens: int, steps: int, seed: int
) -> list[Batch]:
    """Batches of random token ids, as the authors' own speed and memory tests use: neither depends
    on the text.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randint(0, vocabulary, (batch_size, tokens), generator=generator)
        for _ in range(steps)
    ]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def text_tokens(
    tokenizer: Any, texts: Sequence[str], batch_size: int, tokens: int, steps: int
) -> list[Batch]:
    """Batches of consecutive pieces of real text: [batch_size, tokens] each. Raises UserError when
    the text is too short.
    """
    wanted = batch_size * tokens * steps
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text)["input_ids"])
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise UserError(
            f"the text has {len(ids)} tokens, {wanted} are needed; lower the steps, the batch size"
            " or the tokens"
        )
    pieces = torch.tensor(ids[:wanted]).view(steps, batch_size, tokens)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


class Classification(ABC):
    """A task whose model scores each label of a text.

    `texts` and `labels` per split, "train" and "test"; a batch is {"inputs": {...}, "labels":
    [batch]}.
    """

    def __init__(self, train: tuple[list[str], np.ndarray], test: tuple[list[str], np.ndarray]):
        self.splits = {"train": train, "test": test}

    @abstractmethod
    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """What the model reads, each [batch, tokens]."""

    @abstractmethod
    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Scores [batch, labels]."""

    def batch(self, split: str, rows: np.ndarray) -> dict[str, Any]:
        texts, labels = self.splits[split]
        return {
            "inputs": self.encode([texts[i] for i in rows]),
            "labels": torch.from_numpy(labels[rows]),
        }

    def train_batches(self, steps: int, batch_size: int, seed: int) -> list[dict[str, Any]]:
        """Batches drawn without replacement within an epoch."""
        generator = np.random.default_rng(seed)
        size = len(self.splits["train"][1])
        rows = np.concatenate(
            [generator.permutation(size) for _ in range(-(-steps * batch_size // size))]
        )
        return [
            self.batch("train", rows[i * batch_size : (i + 1) * batch_size]) for i in range(steps)
        ]

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Mean cross-entropy of the right label."""
        return nn.functional.cross_entropy(
            self.logits(model, batch["inputs"]).float(),
            batch["labels"].to(next(model.parameters()).device),
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, rows: int, batch_size: int = 50) -> tuple[float, float]:
        """Accuracy and loss on the first `rows` of the test split."""
        right, total, seen = 0, 0.0, min(rows, len(self.splits["test"][1]))
        for start in range(0, seen, batch_size):
            batch = self.batch("test", np.arange(start, min(start + batch_size, seen)))
            scores = self.logits(model, batch["inputs"]).float().cpu()
            right += int((scores.argmax(-1) == batch["labels"]).sum())
            total += float(nn.functional.cross_entropy(scores, batch["labels"], reduction="sum"))
        return right / seen, total / seen


class FineFood(Classification):
    """Amazon fine-food reviews, great or not, by the similarity of a MiniLM embedding to a
    description of each label.

    The embeddings of the labels are those of the pretrained model, and fixed. The word embeddings
    are frozen: the blocks are trained.
    """

    descriptions = (
        "This is a bad product, I did not like it.",
        "This is a great product, I loved it.",
    )
    temperature = 0.05

    def __init__(self, tokens: int):
        from shared.data.loaders import fine_food_reviews
        from shared.models import load_sentence_encoder

        train, test = fine_food_reviews()
        super().__init__(
            (list(train["text"]), train["label"].to_numpy()),
            (list(test["text"]), test["label"].to_numpy()),
        )
        self.tokens = tokens
        self._encoder = load_sentence_encoder()
        with torch.no_grad():
            self._labels = self._encoder(**self._encoder.tokens(list(self.descriptions)))

    def model(self) -> nn.Module:
        from shared.models import load_sentence_encoder

        model = load_sentence_encoder()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("encoder.layer" in name)
        return model

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        return self._encoder.tokens(texts, self.tokens)

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(**inputs) @ self._labels.T / self.temperature


class SST2(Classification):
    """SST-2 through a causal language model and MeZO's prompt: "<sentence> It was great/terrible".
    Needs model and " "dataset in the hub cache.
    """

    words = (" terrible", " great")

    def __init__(self, name_or_path: str, tokens: int, dtype: torch.dtype, examples: int = 1000):
        from datasets import load_dataset
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        from shared.models import load_tokenizer, local_model

        try:
            folder = snapshot_download(
                "stanfordnlp/sst2", repo_type="dataset", local_files_only=True
            )
        except LocalEntryNotFoundError:
            raise UserError(
                "SST-2 is not in the hub cache: hf download --repo-type dataset stanfordnlp/sst2"
            ) from None
        dataset = load_dataset(folder)
        parts = [dataset["train"].shuffle(seed=0).select(range(examples)), dataset["validation"]]
        super().__init__(*((list(part["sentence"]), np.array(part["label"])) for part in parts))
        self.tokens, self._name, self._dtype = tokens, name_or_path, dtype
        self._tokenizer = load_tokenizer(local_model(name_or_path))
        self._tokenizer.padding_side = self._tokenizer.truncation_side = "left"
        self._word_ids = torch.tensor(
            [self._tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in self.words]
        )

    def model(self) -> nn.Module:
        from shared.models import load_causal_lm

        return load_causal_lm(self._name, self._dtype)[0]

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        prompts = [f"{text.strip()} It was" for text in texts]
        batch = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        device = next(model.parameters()).device
        scores = model(
            **{name: tensor.to(device) for name, tensor in inputs.items()}, logits_to_keep=1
        ).logits
        return scores[:, -1, self._word_ids.to(device)]


TaskName = Literal["fine-food", "sst2"]


def classification(task: TaskName, model: str, tokens: int, dtype: torch.dtype) -> Any:
    """The task called `task`; `model` is the language model of "sst2"."""
    return FineFood(tokens) if task == "fine-food" else SST2(model, tokens, dtype)
