"""Noise while training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxseq.cells.pointwise import Pointwise


class Dropout(Pointwise):
    """Zeros each feature of each step with probability `rate` and scales the others by 1 / (1 - rate).

    Without a key it changes nothing. N. Srivastava et al., Dropout, JMLR 15, 2014.

    >>> Dropout(0.5).unroll((), jnp.ones((2, 3)))[1].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    keeps_size = True

    rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < 1:
            raise ValueError(f"Dropout needs 0 <= rate < 1, got {self.rate}.")

    def apply(self, params: tuple[()], x: Array, key: Array | None = None) -> Array:
        if key is None or self.rate == 0:
            return x
        keep = jax.random.bernoulli(key, 1 - self.rate, jnp.shape(x))
        return jnp.where(keep, x / (1 - self.rate), 0)
