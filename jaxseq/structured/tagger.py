"""A tagger of words: a hidden Markov model whose states are the tags, fitted by counting."""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core.masks import pad
from jaxseq.structured import chains
from jaxseq.structured.baum_welch import fit_labelled
from jaxseq.structured.emissions import CategoricalEmission
from jaxseq.structured.hmm import HMM, HMMParams

_SHAPES = ("number", "capitals", "initial", "hyphen", "lower", "other")
_CLASS = re.compile(rf"<({'|'.join(_SHAPES)})( .*)?>", re.DOTALL)
_ENOUGH = 10  # rare words that a class by their suffix is made for
_SHORTEST = 16  # lengths are padded to this times a power of 2, so that few programs are compiled


def word_classes(word: str) -> tuple[str, str]:
    """The classes of an unknown word: by its shape and last three letters, and by its shape alone.

    >>> word_classes("Walking"), word_classes("1996-08-30")
    (('<initial ing>', '<initial>'), ('<number -30>', '<number>'))
    """
    letters = word.replace("-", "").replace(".", "")
    if any(letter.isdigit() for letter in word):
        shape = "number"
    elif letters.isupper() and len(letters) > 1:
        shape = "capitals"
    elif word[:1].isupper():
        shape = "initial"
    elif "-" in word[1:-1]:
        shape = "hyphen"
    else:
        shape = "lower" if letters.isalpha() else "other"
    return f"<{shape} {word[-3:].lower()}>", f"<{shape}>"


@dataclasses.dataclass(frozen=True)
class Words:
    """The ids of words and of classes of rare ones (`word_classes`), of which the shapes are always there."""

    ids: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def encode(
        self, sentences: Iterable[Iterable[str | None]]
    ) -> tuple[Int[Array, "sentence time"], Bool[Array, "sentence time"]]:
        """Ids, -1 for a missing word (None), and the mask."""
        return padded([[self.find(word) for word in sentence] for sentence in _checked(sentences)])

    def find(self, word: str | None) -> int:
        """The id of a word, or of its class; -1 for None."""
        if word is None:
            return -1
        names = word_classes(word) if _CLASS.fullmatch(word) else (word, *word_classes(word))
        return next(self.ids[name] for name in names if name in self.ids)


def _checked(sentences: Iterable[Iterable[str | None]]) -> list[list[str | None]]:
    """A list of sentences. Raises TypeError unless each is a list of words or None."""
    found: list[list] = []
    for sentence in sentences if _is_list(sentences) else [sentences]:
        found.append(list(sentence) if _is_list(sentence) else [0])
        if not all(isinstance(word, str | None) for word in found[-1]):
            raise TypeError(
                f"A list of sentences is needed, each a list of words or None, got one that is {sentence!r}."
            )
    return found


def _is_list(value):
    return isinstance(value, Iterable) and not isinstance(value, str)


def find_words(sentences: Iterable[Sequence[str]], minimum_count: int = 2) -> Words:
    """The words that are there `minimum_count` times or more, and classes for the others.

    A word that reads as the name of a class, `"<lower>"`, counts as rare.

    >>> words = find_words([["a", "dog", "a", "cat"]])
    >>> tokens, mask = words.encode([["a", "bird", None]])
    >>> [list(words.ids)[token] for token in tokens[0, :2]], tokens[0, 2].item()
    (['a', '<lower>'], -1)
    """
    if minimum_count < 1:
        raise ValueError(f"find_words needs minimum_count >= 1, got {minimum_count}.")
    counts = collections.Counter(word for sentence in sentences for word in sentence)
    known = {word: None for word, n in counts.items() if n >= minimum_count and not _CLASS.fullmatch(word)}  # in order
    rare = collections.Counter(word_classes(word)[0] for word in counts if word not in known)
    classes = [name for name, count in rare.items() if count >= _ENOUGH]
    names = [*known, *classes, *(f"<{shape}>" for shape in _SHAPES)]
    return Words({name: index for index, name in enumerate(dict.fromkeys(names))})


@dataclasses.dataclass(frozen=True, eq=False)  # it holds arrays
class Tagger:
    """A hidden Markov model of words, whose states are the tags."""

    hmm: HMM
    params: HMMParams
    words: Words
    tags: tuple[str, ...]

    def tag(self, sentences: Iterable[Sequence[str | None]]) -> list[list[str]]:
        """The most probable tags of the words of each sentence; a word that is None is missing, and gets one too.

        Where `log_likelihood` is -inf, after a fit without smoothing, they mean nothing.
        """
        sentences = _checked(sentences)
        states = np.asarray(_best(self.hmm, self.params, *self.words.encode(sentences)))
        return [[self.tags[state] for state in row[: len(s)]] for row, s in zip(states, sentences, strict=True)]

    def log_likelihood(self, sentences: Iterable[Sequence[str | None]]) -> np.ndarray:
        """`log p(words)` in nats of each sentence; unknown words count as their class."""
        return np.asarray(_log_likelihood(self.hmm, self.params, *self.words.encode(sentences)))

    def simulate(self, key: Array, length: int) -> list[tuple[str, str]]:
        """A new sentence of pairs of a word, or a class of rare ones, and its tag."""
        drawn = self.hmm.simulate(key, self.params, length)
        names = list(self.words.ids)
        pairs = zip(drawn.xs.tolist(), drawn.states.tolist(), strict=True)
        return [(names[token], self.tags[state]) for token, state in pairs]


@functools.partial(jax.jit, static_argnums=0)
def _best(hmm, params, tokens, mask):
    return chains.best_path(hmm.chain(params, tokens, mask), mask).states


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihood(hmm, params, tokens, mask):
    return chains.log_partition(hmm.chain(params, tokens, mask), mask)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Rows of integers as an array `[row, time]`, and its mask."""
    time = _SHORTEST
    while time < max(map(len, rows), default=0):
        time *= 2
    tokens, mask = pad([np.array(row, int) for row in (*rows, ())], time)  # with one row more there is always one
    return tokens[:-1], mask[:-1]


def _checked_pairs(sentences: Iterable[Iterable[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    """A list of sentences. Raises TypeError unless each is a list of pairs of texts."""

    def is_pair(pair):
        return isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)

    found: list[list] = []
    for sentence in sentences if _is_list(sentences) else [sentences]:
        found.append(list(sentence) if _is_list(sentence) else [sentence])
        wrong = [pair for pair in found[-1] if not is_pair(pair)]
        if wrong:
            raise TypeError(
                "fit_tagger needs a list of sentences, each a list of pairs (word, tag) of texts, got a sentence that "
                f"holds {wrong[0]!r}; of one sentence give [sentence]."
            )
    return found


def fit_tagger(
    sentences: Iterable[Sequence[tuple[str, str]]],
    *,
    minimum_count: int = 2,
    smoothing: float | Float[Array, ""] = 0.01,
) -> Tagger:
    """The tagger of the highest likelihood of sentences of pairs `(word, tag)`, with `smoothing` added to each count.

    Words seen less often than `minimum_count` are read as their classes, and so are words never seen: what the rare
    ones of a shape and suffix were tagged as is the guess for those (Brants, TnT: A Statistical Part-of-Speech Tagger,
    ANLP 2000, https://aclanthology.org/A00-1031, has the suffixes). With `smoothing=0` a word whose class was not seen,
    as none is with `minimum_count=1`, makes its sentence impossible: its `log_likelihood` is -inf.

    Raises:
        TypeError: if the sentences are not lists of pairs of texts.
        ValueError: if there are none, or smoothing is below 0.

    >>> tagger = fit_tagger([[("the", "DET"), ("dog", "NOUN")], [("the", "DET"), ("cat", "NOUN")]])
    >>> tagger.tag([["the", "bird"], [None, "fish"]])
    [['DET', 'NOUN'], ['DET', 'NOUN']]
    """
    sentences = _checked_pairs(sentences)
    if not any(sentences):
        raise ValueError("fit_tagger needs sentences of pairs (word, tag), got none.")
    words = find_words([[word for word, _ in sentence] for sentence in sentences], minimum_count)
    tags = tuple(sorted({tag for sentence in sentences for _, tag in sentence}))
    index = {tag: state for state, tag in enumerate(tags)}
    hmm = HMM(CategoricalEmission(len(tags), len(words)))
    # all in one row, each sentence after a reset: no padding
    pairs = [pair for sentence in sentences for pair in sentence]
    tokens = jnp.array([words.find(word) for word, _ in pairs])
    states = jnp.array([index[tag] for _, tag in pairs])
    reset = jnp.array([step == 0 for sentence in sentences for step in range(len(sentence))])
    even = jax.tree.map(jnp.zeros_like, hmm.init(jax.random.key(0)))
    everything = jnp.ones_like(reset)  # an array, not a constant of the program that XLA would work on
    params = fit_labelled(hmm, even, tokens, states, everything, reset=reset, smoothing=smoothing)
    return Tagger(hmm, params, words, tags)
