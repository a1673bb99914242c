"""Choices `(key, logits) -> token`; without a key there is no noise, and they take the most probable."""

import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxseq.samplers.logits import check_logits, per_row, wide


def categorical(key: Array | None, logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    """A token of each row, drawn with the probabilities `softmax(logits)`.

    Without a key there is no noise, and that is `greedy`: the draw takes the largest logit plus Gumbel noise. A token
    at `-inf` is drawn only if the whole row is, and then it is token 0.

    >>> categorical(jax.random.key(0), jnp.log(jnp.array([[0.0, 1.0], [1.0, 0.0]]))).tolist()
    [1, 0]
    """
    logits = check_logits("categorical", logits)
    if key is None:
        return greedy(None, logits)
    return jax.random.categorical(key, wide(logits), axis=-1)


def greedy(key: Array | None, logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    """The most probable token of each row, the smallest of equal ones; the key is not used.

    >>> greedy(None, jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])).tolist()
    [1, 0]
    """
    return jnp.argmax(check_logits("greedy", logits), axis=-1)


def gumbel(key: Array | None, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
    """Logits, at least float32, plus Gumbel noise: the largest is where `categorical` draws its token.

    The k largest are k draws without replacement. Without a key there is no noise.

    >>> gumbel(None, jnp.array([0.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    logits = wide(check_logits("gumbel", logits))
    return logits if key is None else logits + jax.random.gumbel(key, logits.shape, logits.dtype)


def without_replacement(key: Array | None, logits: Float[Array, "*batch vocab"], k: int) -> Int[Array, "*batch k"]:
    """`k` different tokens of each row, drawn one after the other, the first as `categorical` draws it.

    They are the k largest of the logits plus Gumbel noise (Kool, van Hoof and Welling, Stochastic Beams and Where to
    Find Them, 2019, arXiv:1903.06059). Tokens at `-inf` come last, when there are no others. Without a key: the k most
    probable.

    >>> without_replacement(None, jnp.array([[0.0, 2.0, 1.0]]), 2).tolist()
    [[1, 2]]
    """
    noisy = gumbel(key, check_logits("without_replacement", logits))
    if not 1 <= operator.index(k) <= noisy.shape[-1]:
        raise ValueError(f"without_replacement needs k from 1 to the vocab {noisy.shape[-1]}, got {k}.")
    return jax.lax.top_k(noisy, k)[1]


def gumbel_softmax(
    key: Array | None,
    logits: Float[Array, "*batch vocab"],
    temperature: float | Float[Array, "..."] = 1.0,
    *,
    straight_through: bool = True,
) -> Float[Array, "*batch vocab"]:
    """A token of each row as a one-hot vector with gradients: those of `softmax((logits + noise) / temperature)`.

    `straight_through=False` gives that softmax itself, which is no token but near one at low temperatures (Jang, Gu and
    Poole, Categorical Reparameterization with Gumbel-Softmax, 2017, arXiv:1611.01144; Maddison, Mnih and Teh, 2017,
    arXiv:1611.00712). `temperature` may differ by row: it broadcasts against `[*batch]`.

    >>> gumbel_softmax(None, jnp.array([0.0, 2.0, 1.0])).tolist()
    [0.0, 1.0, 0.0]
    """
    noisy = gumbel(key, check_logits("gumbel_softmax", logits))
    soft = jax.nn.softmax(noisy / per_row("gumbel_softmax", "temperature", temperature, noisy), axis=-1)
    if straight_through:
        hard = jax.nn.one_hot(noisy.argmax(axis=-1), noisy.shape[-1], dtype=noisy.dtype)
        soft = hard + (soft - jax.lax.stop_gradient(soft))
    return soft.astype(logits.dtype)
