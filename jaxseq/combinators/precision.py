"""How a layer's params are treated: as constants, or multiplied in low precision."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxseq.core import errors
from jaxseq.core.unroll import Run
from jaxseq.core.wrapper import Wrapper


class Attached(NamedTuple):
    """The params of a frozen layer, constants, with a memory that is none."""

    cell: Any


class Frozen(Wrapper):
    """A layer whose params get no gradient: it is zero. Gradients pass through to its inputs and its state.

    An optimiser that changes params without a gradient, by weight decay or momentum, still needs a mask
    (`optax.masked`). It takes any layer.

    >>> import jaxseq as js
    >>> cell = Frozen(js.Dense(2, 3))
    >>> gradient = jax.grad(lambda params: cell.unroll(params, jnp.ones((5, 2)))[1].sum())
    >>> gradient(cell.init(jax.random.key(0))).bias.tolist()
    [0.0, 0.0, 0.0]
    """

    def inner(self, params: Any) -> Any:
        return params.cell if isinstance(params, Attached) else jax.tree.map(jax.lax.stop_gradient, params)

    def draw(self, params: Any, key: Array) -> Any:
        if isinstance(params, Attached):
            return Attached(self.cell.draw(params.cell, key))
        return self.cell.draw(params, key)

    def attach(self, params: Any, memory: Any, mask: Any = None) -> Any:
        params = params.cell if isinstance(params, Attached) else params
        attached = self.cell.attach(params, memory, mask)
        before = {id(leaf) for leaf in jax.tree.leaves(params)}
        if memory is None or all(id(leaf) in before for leaf in jax.tree.leaves(attached)):
            return attached
        return Attached(self.cell.attach(jax.tree.map(jax.lax.stop_gradient, params), memory, mask))


class MixedPrecision(Wrapper):
    """A layer that multiplies in bfloat16 and adds in float32; params, states, inputs and outputs stay float32.

    Its products, also those of the gradient, are traced with the precision `BF16_BF16_F32` of
    `jax.lax.DotAlgorithmPreset`. Accelerators round the factors; a CPU has no such products and computes them in
    float32. It takes any layer; params that are not of float32 are multiplied as they are.

    P. Micikevicius et al., Mixed precision training, ICLR 2018.

    >>> import jaxseq as js
    >>> cell = MixedPrecision(js.LSTM(2, 3))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].dtype
    dtype('float32')
    """

    def step(self, params: Any, state: Any, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        with _rounding(params):
            return super().step(params, state, x, key)

    def _unroll(self, params: Any, xs: Any, state: Any, run: Run) -> tuple[Any, Any]:
        with _rounding(params):
            return self.cell._unroll(params, xs, state, run)


def _rounding(params: Any) -> contextlib.AbstractContextManager[None]:
    """Where products are traced that round the factors, if the params are of float32."""
    if errors.float_dtype(params) == jnp.float32:
        return jax.default_matmul_precision("BF16_BF16_F32")
    return contextlib.nullcontext()
