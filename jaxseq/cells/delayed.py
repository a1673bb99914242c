"""A recurrent network without its short connections."""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxseq.cells.gated import GatedParams, Recurrent
from jaxseq.core import errors


class DelayedElmanState(NamedTuple):
    """The state of a delayed network: the hidden units, and those of the steps before, the newest first."""

    hidden: Float[Array, "*batch hidden"]
    past: tuple[Float[Array, "*batch hidden"], ...]


class DelayedElman(Recurrent):
    """A simple recurrent network in groups, of which each reads the hidden units of its own number of steps ago.

        h'_g = tanh(x W_g + h_{t - d_g} R_g + b_g)    for the groups g of units,   y = h' = [h'_1, h'_2, ...]

    With delays such as (1, 2, 4, 8) the connections over fewer steps than d_g are removed, so that group g has to work
    on that time scale. The groups are of equal size; their delays are given in order.

    S. El Hihi and Y. Bengio, Hierarchical recurrent neural networks for long-term dependencies, NeurIPS 1995; I.
    Goodfellow et al., Deep learning, 2016, section 10.9.3.

    >>> import jax
    >>> cell = DelayedElman(input_size=2, hidden_size=6, delays=(1, 2, 4))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 6)
    """

    free_state = False

    gates: ClassVar[tuple[str, ...]] = ("h",)

    delays: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.delays, tuple) or not self.delays:
            raise TypeError(f"DelayedElman needs a tuple of delays, such as (1, 2, 4), got {self.delays!r}.")
        if not errors.are_sizes(self.delays):
            raise ValueError(f"DelayedElman needs delays of at least one step, got {self.delays}.")
        if self.hidden_size % len(self.delays):
            raise ValueError(
                f"DelayedElman needs groups of equal size, but {self.hidden_size} units do not divide by the "
                f"{len(self.delays)} delays."
            )

    def initial_state(self, params: GatedParams, batch_shape: tuple[int, ...] = ()) -> DelayedElmanState:
        zeros = self.zeros(params, batch_shape)
        return DelayedElmanState(zeros, (zeros,) * (max(self.delays) - 1))

    def step(self, params: GatedParams, state: DelayedElmanState, x: Array, key: Any = None) -> Any:
        self.check(params, state, x)
        past = (state.hidden, *state.past)
        kernels = jnp.split(params.recurrent_kernel, len(self.delays), axis=-1)
        read = [self.product(past[delay - 1], kernel) for delay, kernel in zip(self.delays, kernels, strict=True)]
        hidden = jnp.tanh(self.product(x, params.input_kernel, params.bias) + jnp.concatenate(read, axis=-1))
        return DelayedElmanState(hidden, past[:-1]), hidden
