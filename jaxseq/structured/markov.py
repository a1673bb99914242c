"""Markov chains of order k, estimated from counts: n-gram models that unroll and generate as any cell does.

The probability of a token w after the context h, its last m tokens, is interpolated with that after the last m - 1:

    p_m(w | h) = weight[h w] + backoff[h] p_(m-1)(w | h'),    h' = h without its first token,    p_(-1) = 1 / vocab

`fit` counts the n-grams of a text, and one of `AddAlpha`, `Interpolated` and `KneserNey` makes weights of them. The
n-grams are stored sorted, so a chain of order 4 over 100 tokens holds those of the text, not 100^5 numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks, sharding
from jaxseq.core.cell import Cell

_UNSEEN, _SHORT = -1, -2  # a context that the text does not have; one that is longer than what was read


class Grams(NamedTuple):
    """The n-grams of one length, sorted by `id of the first n - 1 tokens * vocab_size + last token`; ids count them."""

    codes: Int[Array | np.ndarray, " grams"]
    weights: Float[Array | np.ndarray, " grams"]
    backoff: Float[Array | np.ndarray, " contexts"]


class MarkovState(NamedTuple):
    """The ids of the last 0 to `order` tokens as n-grams; -1 if the text has none such, -2 if fewer were read."""

    contexts: Int[Array, "*batch lengths"]


class MarkovChain(Cell):
    """Order-k Markov chain: from a token to the logits of the next, by the last k tokens. `fit` makes it from a text.

        logits_t = log p_k(. | x_(t-k+1), ..., x_t)

    Tokens that no smoothing makes possible have -inf. Before k tokens are read the context is shorter. `counts` says
    how many n-grams of each length 1 to k + 1 there are; `interpolated` is False if what is not in the counts is
    uniform, as with `AddAlpha`, instead of taken from shorter contexts. Codes are integers and get no gradient. A token
    outside `[0, vocab_size)` is in no n-gram: a context with it is one that the text does not have.

    Shannon, A Mathematical Theory of Communication, 1948, doi:10.1002/j.1538-7305.1948.tb01338.x.

    >>> chain, params = fit(np.array([0, 1, 0, 2, 0]), vocab_size=3, order=1, smoothing=AddAlpha(0.0))
    >>> print(chain.table(params).round(2))
    [[0.  0.5 0.5]
     [1.  0.  0. ]
     [1.  0.  0. ]]
    """

    vocab_size: int
    counts: tuple[int, ...]
    interpolated: bool = True

    input_rank = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.counts, tuple) or not self.counts or not all(isinstance(n, int) for n in self.counts):
            raise TypeError(f"MarkovChain needs counts, the number of n-grams of each length, got {self.counts!r}.")
        for length, (count, shorter) in enumerate(zip(self.counts, (1, *self.counts), strict=False), 1):
            if not 0 <= count <= shorter * self.vocab_size:
                raise ValueError(f"MarkovChain got {count} {length}-grams: {shorter} of one token less allow fewer.")
            _check_codes(shorter, self.vocab_size)

    @property
    def order(self) -> int:
        """How many tokens the next one depends on."""
        return len(self.counts) - 1

    @property
    def input_size(self) -> int:
        """The size of the vocabulary."""
        return self.vocab_size

    @property
    def output_size(self) -> int:
        """The size of the vocabulary."""
        return self.vocab_size

    def init(self, key: Array) -> tuple[Grams, ...]:
        """The first n-grams in order, and all tokens equally probable: `fit` gives better ones."""
        contexts = (1, *self.counts)
        return tuple(
            Grams(jnp.arange(count), jnp.zeros(count), jnp.ones(before))
            for count, before in zip(self.counts, contexts, strict=False)
        )

    def initial_state(self, params: tuple[Grams, ...], batch_shape: tuple[int, ...] = ()) -> MarkovState:
        nothing = jnp.where(jnp.arange(self.order + 1) == 0, 0, _SHORT)
        return MarkovState(jnp.broadcast_to(nothing, (*batch_shape, self.order + 1)))

    def step(
        self, params: tuple[Grams, ...], state: MarkovState, x: Int[Array, "*batch"], key: Array | None = None
    ) -> tuple[MarkovState, Float[Array, "*batch vocab"]]:
        errors.check_params(self, params)
        params = jax.tree.map(jnp.asarray, params)  # of `fit` they are float64, whatever the default
        contexts = [jnp.zeros_like(state.contexts[..., 0])]
        for length in range(self.order):
            contexts.append(_find(params[length].codes, state.contexts[..., length], x, self.vocab_size))
        dtype = params[0].weights.dtype
        every = jnp.expand_dims(jnp.arange(self.vocab_size), tuple(range(x.ndim)))
        tokens = every + jnp.zeros_like(contexts[0])[..., None]
        uniform = jnp.full_like(tokens, 1 / self.vocab_size, dtype)
        probability = uniform
        for grams, context in zip(params, contexts, strict=True):
            gram = _find(grams.codes, jnp.broadcast_to(context[..., None], tokens.shape), tokens, self.vocab_size)
            shorter = probability if self.interpolated else uniform
            backoff = _take(grams.backoff, context, jnp.ones_like(context, dtype))
            longer = _take(grams.weights, gram, jnp.zeros_like(uniform)) + backoff[..., None] * shorter
            probability = masks.select(context == _SHORT, probability, longer)
        possible = probability > 0
        logits = jnp.where(possible, jnp.log(jnp.where(possible, probability, 1)), -jnp.inf)
        return MarkovState(jnp.stack(contexts, axis=-1)), logits

    def table(self, params: tuple[Grams, ...]) -> Float[Array, "..."]:
        """The probabilities of the next token after each context of k tokens, an array of k + 1 axes.

        Of order 1 it is the transition matrix `[from, to]`. It has vocab_size^(k + 1) numbers.
        """
        contexts = jnp.stack(jnp.meshgrid(*[jnp.arange(self.vocab_size)] * self.order, indexing="ij"), axis=-1)
        if self.order == 0:  # any token at all: the next does not depend on it
            contexts = jnp.zeros(1, int)
        return jnp.exp(self.unroll(params, contexts)[1][..., -1, :])


def _find(codes, context, token, vocab_size):
    """The id of the n-gram of a context and a token, by a binary search in the sorted codes."""
    code = jnp.maximum(context, 0) * vocab_size + token.astype(context.dtype)
    before = jnp.zeros_like(code)  # how many codes are smaller
    for bit in reversed(range(codes.shape[0].bit_length())):
        further = before + (1 << bit)
        before = jnp.where(_take(codes, further - 1, code) < code, further, before)
    inside = (context >= 0) & (token >= 0) & (token < vocab_size)
    found = inside & (_take(codes, before, -jnp.ones_like(code)) == code)
    return jnp.where(found, before, jnp.where(context == _SHORT, context, jnp.full_like(context, _UNSEEN)))


def _take(values, index, otherwise):
    """`values[index]`, and `otherwise` outside."""
    if not values.shape[0]:
        return otherwise
    taken = sharding.rows(values, index, mode="clip")
    return jnp.where((index >= 0) & (index < values.shape[0]), taken.astype(otherwise.dtype), otherwise)


def _check_codes(contexts, vocab_size):
    if contexts * vocab_size >= 2**31:
        raise ValueError(f"{contexts} contexts times {vocab_size} tokens are too many for codes of 32 bits.")


class Counted(NamedTuple):
    """What smoothing sees of the n-grams of one length: how often each occurs, how many different tokens stand before
    it, and the id of its context, one of `contexts`; and whether it is the longest length.
    """

    occurrences: Int[np.ndarray, " grams"]
    preceding: Int[np.ndarray, " grams"]
    context: Int[np.ndarray, " grams"]
    contexts: int
    vocab_size: int
    is_longest: bool

    def per_context(self, values: np.ndarray) -> Float[np.ndarray, " contexts"]:
        """Sums over the n-grams of each context."""
        return np.bincount(self.context, weights=values, minlength=self.contexts)


class AddAlpha(NamedTuple):
    """`p(w | h) = (c(h w) + alpha) / (c(h) + alpha vocab)`: 0 is maximum likelihood, 1 Laplace's rule.

    A context that the text does not have leaves all tokens equally probable.
    """

    alpha: float = 1.0
    interpolated = False

    def __call__(self, counted: Counted) -> tuple[np.ndarray, np.ndarray]:
        """Weights and backoff."""
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"AddAlpha needs a finite alpha >= 0, got {self.alpha}.")
        total = counted.per_context(counted.occurrences) + self.alpha * counted.vocab_size
        backoff = np.where(total > 0, self.alpha * counted.vocab_size / np.where(total > 0, total, 1), 1)
        return counted.occurrences / total[counted.context], backoff


class Interpolated(NamedTuple):
    """`p_m(w | h) = λ c(h w) / c(h) + (1 - λ) p_(m-1)(w | h')` (Jelinek and Mercer, 1980), one λ for all lengths."""

    share: float = 0.8
    interpolated = True

    def __call__(self, counted: Counted) -> tuple[np.ndarray, np.ndarray]:
        """Weights and backoff."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"Interpolated needs a share between 0 and 1, got {self.share}.")
        total = counted.per_context(counted.occurrences)
        return self.share * counted.occurrences / total[counted.context], np.where(total > 0, 1 - self.share, 1)


class KneserNey(NamedTuple):
    """`p_m(w | h) = (max(c_m(h w) - d_m, 0) + d_m types_m(h) p_(m-1)(w | h')) / c_m(h)`.

    c_m counts occurrences for the longest n-grams, and for the shorter ones the different tokens that stand before
    them; `types_m(h)` is the number of different tokens after h; d = n₁ / (n₁ + 2 n₂) from the numbers of n-grams with
    the counts 1 and 2. Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1999,
    doi:10.1006/csla.1999.0128.
    """

    interpolated = True

    def __call__(self, counted: Counted) -> tuple[np.ndarray, np.ndarray]:
        """Weights and backoff."""
        counts = counted.occurrences if counted.is_longest else counted.preceding
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        # a vocabulary whose tokens are all frequent has no n-gram to estimate the discount from
        discount = once / (once + 2 * twice) if once and twice else 0.5
        total = counted.per_context(counts)
        types = counted.per_context(counts > 0)
        weights = np.maximum(counts - discount, 0) / np.maximum(total, 1)[counted.context]
        return weights, np.where(total > 0, discount * types / np.maximum(total, 1), 1)


_KNESER_NEY = KneserNey()


def fit(
    tokens: Int[np.ndarray, "*batch time"],
    vocab_size: int,
    order: int,
    *,
    smoothing: AddAlpha | Interpolated | KneserNey = _KNESER_NEY,
    mask: Bool[np.ndarray, "*batch time"] | None = None,
    reset: Bool[np.ndarray, "*batch time"] | None = None,
) -> tuple[MarkovChain, tuple[Grams, ...]]:
    """The Markov chain of a text, and its params, in float64 NumPy: order 0 is the distribution of single tokens.

    No n-gram reaches over the rows of a batch or over a reset; masked tokens are as if they were not there. Counting
    needs the data at hand, so this does not run under `jit`.

    Raises:
        TypeError: if tokens are not integers, or mask or reset not boolean.
        ValueError: if a token that counts is not in `[0, vocab_size)`, the order negative, or a shape does not fit.

    >>> chain, params = fit(np.array([0, 1, 0, 1, 0, 1]), vocab_size=3, order=1)
    >>> print(log_probabilities(chain, params, np.array([0, 1]))[1:].round(2))
    [-0.1]
    """
    tokens = _tokens("fit", tokens)
    if not errors.are_sizes((vocab_size,)):
        raise ValueError(f"fit needs a vocab_size of 1 or more tokens, got {vocab_size!r}.")
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise ValueError(f"fit needs an order of 0 or more tokens, got {order!r}.")
    if isinstance(smoothing, type) or not hasattr(smoothing, "interpolated"):
        raise TypeError(f"fit needs KneserNey(), Interpolated(0.8) or AddAlpha(1.0) as smoothing, got {smoothing!r}.")
    for flags, name in ((mask, "mask"), (reset, "reset")):
        if flags is not None:
            errors.check_flags("fit", flags, name, tokens.shape)
    tokens, document = _flat(tokens, mask, reset)
    _check_range("fit", tokens, vocab_size)
    counted, ids = [], [np.where(document >= 0, 0, -1)]  # ids[n][i] is the n-gram that starts at i; -1 if none does
    codes = []
    for length in range(1, order + 2):
        contexts = len(codes[-1]) if codes else 1
        _check_codes(contexts, vocab_size)
        starts = np.arange(max(len(tokens) - length + 1, 0))
        starts = starts[document[starts] == document[starts + length - 1]]
        code = ids[-1][starts] * vocab_size + tokens[starts + length - 1]
        unique, inverse, occurrences = np.unique(code, return_inverse=True, return_counts=True)
        here = np.full(len(tokens), -1)
        here[starts] = inverse
        codes.append(unique)
        ids.append(here)
        counted.append(Counted(occurrences, occurrences, unique // vocab_size, contexts, vocab_size, length > order))
    for length in range(1, order + 1):  # what stands before a shorter n-gram: the different longer ones that end in it
        starts = np.unique(ids[length + 1], return_index=True)[1]
        starts = starts[ids[length + 1][starts] >= 0]
        preceding = np.bincount(ids[length][starts + 1], minlength=len(codes[length - 1]))
        counted[length - 1] = counted[length - 1]._replace(preceding=preceding)
    params = tuple(Grams(code, *smoothing(one)) for code, one in zip(codes, counted, strict=True))
    return MarkovChain(vocab_size, tuple(map(len, codes)), smoothing.interpolated), params


def _tokens(name, tokens):
    try:
        tokens = np.asarray(tokens)
    except ValueError as error:
        raise TypeError(f"{name} needs rows of one length: pad them, and mask what was padded.") from error
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim == 0:
        raise TypeError(f"{name} needs integer tokens [*batch, time], got {errors.shape_of(tokens)}.")
    return tokens


def _check_range(name, tokens, vocab_size):
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"{name} got tokens from {tokens.min()} to {tokens.max()}; the vocabulary has {vocab_size}.")


def _flat(tokens, mask, reset):
    """The unmasked tokens of all rows one after the other, and the document that each belongs to."""
    time = tokens.shape[-1]
    begins = np.zeros(tokens.shape, bool) if reset is None else np.array(reset)
    begins[..., :1] = True
    keep = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    document = np.cumsum(begins.reshape(-1)) if time else np.zeros(0, int)
    return tokens.reshape(-1)[keep.reshape(-1)].astype(np.int64), document[keep.reshape(-1)]


def log_probabilities(
    chain: MarkovChain,
    params: tuple[Grams, ...],
    tokens: Int[np.ndarray, " length"],
    start: int = 0,
    stop: int | None = None,
) -> Float[np.ndarray, " scored"]:
    """`log p` in nats of each of the tokens `start` to `stop` of a text, given all that stand before it.

    In float64 NumPy: what `unroll` computes for all next tokens, for those of a long text alone and all at once.

    Raises:
        TypeError: if tokens are not integers.
        ValueError: if they are not `[time]`, one is not in `[0, vocab_size)`, or the text has no such part.

    >>> chain, params = fit(np.array([0, 1, 0, 1, 0, 1]), vocab_size=3, order=1, smoothing=AddAlpha(1.0))
    >>> print(np.exp(log_probabilities(chain, params, np.array([0, 1, 1]))).round(3))
    [0.444 0.667 0.2  ]
    """
    tokens = _tokens("log_probabilities", tokens)
    stop = len(tokens) if stop is None else stop
    if tokens.ndim > 1 or not 0 <= start <= stop <= len(tokens):
        raise ValueError(
            f"log_probabilities needs tokens [time] and 0 <= start <= stop <= time, got shape {tokens.shape}, "
            f"start={start} and stop={stop}."
        )
    read = max(start - chain.order, 0)
    tokens = tokens[read:stop].astype(np.int64)
    _check_range("log_probabilities", tokens, chain.vocab_size)
    contexts, uniform = np.zeros(len(tokens), np.int64), np.full(len(tokens), 1 / chain.vocab_size)
    probability = uniform
    for grams in params:  # as in `step`, for all tokens at once
        gram = _found(np.asarray(grams.codes), contexts, tokens, chain.vocab_size)
        backoff = _taken(np.asarray(grams.backoff), contexts, 1)
        longer = _taken(np.asarray(grams.weights), gram, 0) + backoff * (probability if chain.interpolated else uniform)
        probability = np.where(contexts == _SHORT, probability, longer)
        contexts = np.concatenate([[_SHORT], gram])[:-1]  # with one more of the tokens before
    with np.errstate(divide="ignore"):  # -inf where no smoothing makes a token possible
        return np.log(probability[start - read :])


def _found(codes, context, token, vocab_size):
    """`_find` in NumPy, of tokens in range."""
    code = context * vocab_size + token
    place = np.searchsorted(codes, code)
    found = (context >= 0) & (_taken(codes, place, -1) == code)
    return np.where(found, place, np.where(context == _SHORT, context, _UNSEEN))


def _taken(values, index, otherwise):
    """`_take` in NumPy."""
    inside = (index >= 0) & (index < len(values))
    return np.append(values, otherwise)[np.where(inside, index, len(values))]
