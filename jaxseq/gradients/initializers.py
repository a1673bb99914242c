"""Other first values for the params of any cell, stack or wrapper, by the role of each array.

Every function takes `(layer, params)`, then `key` if it draws, then options by keyword, and returns new params of the
same shapes and dtypes, so they compose by application. Kernels are found by `axes()`, whose first name is "input" or
"recurrent"; each gate `[features, hidden]` is drawn for itself. Biases are found by the names of the cells' gates. What
a function does not speak of it leaves as it is; a layer of which it would change nothing is a TypeError.

>>> import jaxseq as js
>>> cell = js.Stack((js.Embed(5, 3), js.LSTM(3, 4), js.Dense(4, 5)))
>>> params = cell.init(jax.random.key(0))
>>> params = uniform(cell, params, jax.random.key(1), role="recurrent")
>>> params = forget_bias(cell, params, 2.0)
>>> params[1].bias[1].tolist()
[2.0, 2.0, 2.0, 2.0]
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array

from jaxseq.cells.clockwork import connected
from jaxseq.combinators.normalization import WeightNorm
from jaxseq.core.kernels import Role, map_kernels
from jaxseq.core.layer import Layer, Params


def orthogonal(layer: Layer, params: Params, key: Array, *, scale: float = 1.0, role: Role = "recurrent") -> Params:
    """Orthogonal kernels times `scale`: as maps they keep lengths, and so do their transposes with gradients.

    A. M. Saxe et al., Exact solutions to the nonlinear dynamics of learning in deep linear neural networks, ICLR 2014.

    >>> import jaxseq as js
    >>> cell = js.Elman(2, 3)
    >>> kernel = orthogonal(cell, cell.init(jax.random.key(0)), jax.random.key(1)).recurrent_kernel[:, 0]
    >>> bool(jnp.allclose(kernel @ kernel.T, jnp.eye(3), atol=1e-6))
    True
    """
    return _draw(layer, params, key, role, initializers.orthogonal(scale))


def glorot(layer: Layer, params: Params, key: Array, *, role: Role = "input") -> Params:
    """Kernels from U(-a, a), a = sqrt(6 / (features + units)): the default of input kernels.

    X. Glorot and Y. Bengio, Understanding the difficulty of training deep feedforward neural networks, AISTATS 2010.
    """
    return _draw(layer, params, key, role, initializers.glorot_uniform(in_axis=0))


def uniform(
    layer: Layer, params: Params, key: Array, *, scale: float | None = None, role: Role = "recurrent"
) -> Params:
    """Kernels from U(-scale, scale), by default torch's scale 1 / sqrt(units).

    >>> import jaxseq as js
    >>> cell = js.GRU(2, 16)
    >>> kernel = uniform(cell, cell.init(jax.random.key(0)), jax.random.key(1)).recurrent_kernel
    >>> bool(abs(kernel).max() <= 1 / 4)
    True
    """

    def initializer(key, shape, dtype):
        width = 1 / math.sqrt(shape[-1]) if scale is None else scale
        return jax.random.uniform(key, shape, dtype, -width, width)

    return _draw(layer, params, key, role, initializer)


def identity(layer: Layer, params: Params, *, scale: float = 1.0) -> Params:
    """Recurrent kernels that are `scale` times the identity, for `Elman(..., activation="relu")` with biases of 0.

    Q. V. Le et al., A simple way to initialize recurrent networks of rectified linear units, arXiv:1504.00941, 2015.

    Raises:
        ValueError: if a recurrent kernel is not square, as that of a projected LSTM.

    >>> import jaxseq as js
    >>> cell = js.Elman(1, 2, activation="relu")
    >>> identity(cell, cell.init(jax.random.key(0)), scale=0.5).recurrent_kernel[:, 0].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """

    def fill(_, kernel):
        _, *features, units = kernel.shape
        if features != [units]:
            raise ValueError(
                f"identity needs square recurrent kernels, but one of {layer} maps {' x '.join(map(str, features))} "
                f"features to {units}: orthogonal serves it."
            )
        return jnp.broadcast_to(scale * jnp.eye(units, dtype=kernel.dtype), kernel.shape)

    return _set_kernels(layer, params, fill, "recurrent")


def forget_bias(layer: Layer, params: Params, value: float = 1.0) -> Params:
    """The biases of the gates that keep the state, f or a GRU's z, set to `value`: at 1 the state is kept at first.

    Where a gate lets in, such as the u of an MGU, its bias is -value.

    F. A. Gers et al., Learning to forget, Neural Computation 12, 2000; R. Jozefowicz et al., An empirical exploration
    of recurrent network architectures, ICML 2015.

    >>> import jaxseq as js
    >>> cell = js.LSTM(2, 3)
    >>> forget_bias(cell, cell.init(jax.random.key(0)), 0).bias.sum().item()
    0.0
    """
    return _set_biases(layer, params, "forget_bias", lambda index, bias: {"keep": jnp.full_like(bias, value)})


def chrono(layer: Layer, params: Params, key: Array, *, max_time: float) -> Params:
    """Biases for memories of 1 to `max_time` steps: log U(1, max_time - 1) where a gate keeps, minus that of gate i.

    The gates that keep are the forget gates f (LSTM, JANET) and the z of a GRU, which has no gate i; where a gate lets
    in, such as the u of an MGU, it is minus that. A cell with several gates that keep, as one for each direction of an
    image, is a TypeError.

    C. Tallec and Y. Ollivier, Can recurrent neural networks warp time?, ICLR 2018.

    >>> import jaxseq as js
    >>> cell = js.LSTM(2, 3)
    >>> i, f, g, o = chrono(cell, cell.init(jax.random.key(0)), jax.random.key(1), max_time=100).bias
    >>> bool((f == -i).all()), bool((f >= 0).all())
    (True, True)
    """
    if not max_time > 2:
        raise ValueError(f"chrono needs max_time > 2 steps, the longest memory, got {max_time}.")

    def draw(index, bias):
        keep = jnp.log(jax.random.uniform(jax.random.fold_in(key, index), bias.shape, bias.dtype, 1, max_time - 1))
        return {"keep": keep, "i": -keep}

    return _set_biases(layer, params, "chrono", draw, several=False)


def _draw(layer: Layer, params: Params, key: Array, role: Role, initializer: Callable) -> Params:
    """New kernels of a role, each gate `[features, units]` for itself."""

    def fill(index, kernel):
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)  # no QR decomposition in less
        keys = jax.random.split(jax.random.fold_in(key, index), len(kernel))
        return jax.vmap(lambda key: initializer(key, kernel.shape[1:], dtype))(keys).astype(kernel.dtype)

    return _set_kernels(layer, params, fill, role)


def _set_kernels(layer: Layer, params: Params, fill: Callable[[int, Array], Array], role: Role) -> Params:
    """`map_kernels` that a WeightNorm does not undo: it takes the lengths of what it now holds."""

    def settle(inner: Layer, params: Any) -> Any:
        return inner.measured(params, role) if isinstance(inner, WeightNorm) else connected(inner, params)

    return layer.map_layers(settle, map_kernels(layer, params, fill, role))


def _set_biases(
    layer: Layer, params: Params, name: str, biases: Callable[[int, Array], dict], several: bool = True
) -> Params:
    """`biases(index, old)` of the gate that keeps the state, and of gate i where there is one, in each cell."""
    reached = []

    def replace(inner: Any, params: Any) -> Any:
        by_unit, by_head = getattr(inner, "gates", ()), getattr(inner, "head_gates", ())
        places: dict[str, tuple[str, int]] = {gate: ("bias", index) for index, gate in enumerate(by_unit)}
        places |= {gate: ("gate_bias", index) for index, gate in enumerate(by_head)}
        keeps = getattr(inner, "keeps", ("f",) if "f" in places else ())
        if len(keeps) > 1 and not several:
            raise TypeError(f"{name} sets one gate that keeps the state, but {inner} has several.")
        for keep in keeps:
            gate = keep.removeprefix("-")
            field, index = places[gate]
            values = biases(len(reached), getattr(params, field)[index])
            values[gate] = values.pop("keep") if keep == gate else -values.pop("keep")
            reached.append(inner)
            for gate in values.keys() & places.keys():
                params = _with_bias(params, *places[gate], values[gate])
        return params

    params = layer.map_layers(replace, params)
    if not reached:
        raise TypeError(
            f"{name} sets the bias b of a gate σ(... + b) that keeps the state, f or a GRU's z, but {layer} has none."
        )
    return params


def _with_bias(params: Any, field: str, index: int, value: Array) -> Any:
    params = params._replace(**{field: getattr(params, field).at[index].set(value)})
    if hasattr(params, "recurrent_bias"):  # the two are added
        params = params._replace(recurrent_bias=params.recurrent_bias.at[index].set(0))
    return params
