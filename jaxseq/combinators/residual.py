"""Shortcuts around a cell."""

from typing import Any

import jax
from jaxtyping import Array

from jaxseq.core import errors
from jaxseq.core.unroll import Run
from jaxseq.core.wrapper import Wrapper


class Residual(Wrapper):
    """A cell whose output is added to its input: y = x + cell(x).

    K. He et al., Deep residual learning for image recognition, CVPR 2016.

    >>> import jax.numpy as jnp, jaxseq as js
    >>> js.Residual(js.Map("relu")).unroll((), jnp.array([[-1.0, 2.0]]))[1].tolist()
    [[-1.0, 4.0]]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if None not in (self.input_size, self.output_size) and self.input_size != self.output_size:
            raise ValueError(
                f"Residual adds input to output, but {self.cell} has {self.input_size} and {self.output_size}."
            )

    def step(self, params: Any, state: Any, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        state, y = self.cell.step(params, state, x, key)
        return state, self._add(x, y)

    def _unroll(self, params: Any, xs: Any, state: Any, run: Run) -> tuple[Any, Any]:
        state, ys = self.cell._unroll(params, xs, state, run)
        return state, self._add(xs, ys)

    def _add(self, x: Any, y: Any) -> Any:
        if jax.tree.map(jax.numpy.shape, x) != jax.tree.map(jax.numpy.shape, y):
            raise ValueError(f"{self} cannot add its input {errors.shape_of(x)} to the output {errors.shape_of(y)}.")
        return jax.tree.map(jax.numpy.add, x, y)
