"""Real text at a small scale: WordNet's glosses, one gloss a record and so the unit of privacy.

The nouns' glosses are the private data. The tokenizer is trained on those of verbs, adjectives and
adverbs, which count as public: one trained on the private records would itself be a release of
them.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from projects.flashdp.losses import IGNORED
from shared.seeding import step_seed

END, UNKNOWN = "<|end|>", "<|unknown|>"


@dataclass(frozen=True)
class Glosses:
    """Token ids of each private record, [T] at most, ending with the end token; and of the held-out
    ones.
    """

    train: list[list[int]]
    held_out: list[list[int]]
    vocabulary: int

    @staticmethod
    def batch(records: list[list[int]], tokens: int) -> tuple[Tensor, Tensor]:
        """`ids` and `labels` [B, T], T the longest of the records but at most `tokens`; padding has
        id 0 and no loss.
        """
        longest = min(tokens, max(len(record) for record in records))
        ids = torch.zeros(len(records), longest, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for row, record in enumerate(records):
            kept = torch.tensor(record[:longest])
            ids[row, : len(kept)] = labels[row, : len(kept)] = kept
        return ids, labels

    def pieces(self, batch_size: int, tokens: int) -> Tensor:
        """Ids [B, T] of running text: records one after another, for tables of speed and memory."""
        wanted, found = batch_size * tokens, []
        for record in self.train:
            found += record
            if len(found) >= wanted:
                break
        return torch.tensor(found[:wanted]).view(batch_size, tokens)


@cache
def glosses(vocabulary: int, records: int | None, held_out: int, seed: int = 0) -> Glosses:
    """The glosses as tokens.

    Args:
        vocabulary: tokens of the tokenizer.
        records: takes the first ones alone; None: all.
        held_out: how many of them are held out, drawn at random.

    Raises:
        UserError: WordNet has not been fetched.
    """
    from shared.data.loaders import wordnet

    public = [text for part in ("verb", "adj", "adv") for text in wordnet(part)[0]["gloss"]]
    private = list(wordnet("noun")[0]["gloss"])[:records]
    tokenizer = _tokenizer(public, vocabulary)
    end = tokenizer.token_to_id(END)
    tokens = [[end, *encoding.ids, end] for encoding in tokenizer.encode_batch(private)]
    order = np.random.default_rng(step_seed(seed, "held out")).permutation(len(tokens))
    return Glosses(
        [tokens[i] for i in order[held_out:]],
        [tokens[i] for i in order[:held_out]],
        tokenizer.get_vocab_size(),
    )


def _tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END, UNKNOWN],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer
