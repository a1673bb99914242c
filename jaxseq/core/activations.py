"""The table of pointwise functions that a cell may name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = str | Callable[[jax.Array], jax.Array]


def _identity(x):
    return x


def _hard_tanh(x):
    return jnp.clip(x, -1, 1)


def _positive(x):
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


def _saturated_linear(x):
    return jnp.clip(x, 0, 1)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_tanh": _hard_tanh,
    "identity": _identity,
    "leaky_relu": jax.nn.leaky_relu,
    "log_softmax": jax.nn.log_softmax,
    "positive": _positive,
    "relu": jax.nn.relu,
    "saturated_linear": _saturated_linear,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "softmax": jax.nn.softmax,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "tanh": jnp.tanh,
}


def activation(name: Activation) -> Callable[[jax.Array], jax.Array]:
    """The function called `name` in the table, or `name` itself if it is a function.

    >>> activation("relu")(jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise ValueError(f"No activation is called {name!r}; there are {', '.join(ACTIVATIONS)}, or give a function.")
    return ACTIVATIONS[name]
