"""A text made ready for a model of its characters: tokens, parts, and the baselines that the model has to beat."""

import math
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxseq.structured import markov
from jaxseq.training import text
from jaxseq.training.errors import UserError


class Corpus(NamedTuple):
    """A text as tokens, with the vocabulary of its training part, and the positions at which its parts end."""

    source: text.Text
    vocabulary: text.Vocabulary
    tokens: Int[np.ndarray, " length"]
    cuts: tuple[int, int, int]

    @property
    def train(self) -> Int[np.ndarray, " train"]:
        """The tokens to learn from."""
        return self.tokens[: self.cuts[0]]

    @property
    def scored(self) -> dict[str, tuple[int, int]]:
        """Where each part that is scored begins and ends; a test part of no characters is left out."""
        ends = {"validation": self.cuts[:2], "test": self.cuts[1:]}
        return {name: (start, stop) for name, (start, stop) in ends.items() if stop > start}


def read(path: pathlib.Path | None, fractions: tuple[float, float, float]) -> Corpus:
    """The corpus of a file or folder (see `text.read`), split by position into training, validation and test part.

    Raises:
        UserError: if the text cannot be read, or is too short to leave a character for validation.
    """
    source = text.read(path)
    train, validation, test = text.split(len(source.content), fractions)
    if not 0 < train < validation:
        raise UserError(f"{source.source} is too short: its {len(source.content)} characters leave a part empty")
    vocabulary = text.Vocabulary.of(source.content[:train])
    return Corpus(source, vocabulary, vocabulary.encode(source.content), (train, validation, test))


def baselines(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Bits per character of the smoothed unigram and the interpolated 5-gram, on each part that is scored.

    They are Markov chains of order 0 and 4. They learn from the same training part as the model and score the same
    tokens: a character that the training part does not have is the one unknown token to all of them.
    """
    orders = {"unigram": 0, "5-gram": 4}
    chains = {name: markov.fit(corpus.train, corpus.vocabulary.size, order) for name, order in orders.items()}

    def bits(chain, params, span):
        return float(-markov.log_probabilities(chain, params, corpus.tokens, *span).mean() / math.log(2))

    return {
        part: {name: bits(*fitted, span) for name, fitted in chains.items()} for part, span in corpus.scored.items()
    }
