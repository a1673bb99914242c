"""A vector that a whole sequence depends on: an image to describe, a speaker, what an encoder has read."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.pointwise import DenseParams
from jaxseq.core import errors, masks
from jaxseq.core.sharding import leading_spec, placed
from jaxseq.core.unroll import Run
from jaxseq.core.wrapper import Extended, check_free, check_steps

_lecun = initializers.lecun_normal()


class Condition(NamedTuple):
    """What an attached vector gives the cell: all that is computed from it, once."""

    drive: Float[Array, "*batch features"] | None  # at each step
    state: tuple[Float[Array, "*batch units"], ...]  # before the first one, for each floating array of the state


class ConditionedParams(NamedTuple):
    """The parameters of a conditioned cell; `condition` is None until a vector is attached."""

    cell: Any
    input_kernel: Float[Array, "size input"] | None
    state: tuple[DenseParams, ...]
    condition: Condition | None = None


class Conditioned(Extended):
    """A cell that a vector v conditions: as extra input at each step, as its initial state, or both.

        input="concatenate":  step reads [x; v]        input="add":  step reads x + v W
        state=True:           s_0 = tanh(v A + a)      for each floating array s of the state

    `attach(params, v)` puts v, `[*batch, size]` or `[size]` for all rows, into the params; what is computed from it
    alone is computed there, once, with the W and A of those params. So attach inside the loss, as below: attached
    before, the gradient with regard to W and A is zero, and an optimiser would change the vector instead.

    To concatenate, `cell` reads `size` features more than the conditioned one: in a gated cell this is a term v R of
    each hidden unit and gate. To add costs no product at each step, but says no more than x could. A cell inside that
    reads a memory of its own is attached to it by `params.cell`.

    I. Goodfellow et al., Deep learning, 2016, section 10.2.4 and figure 10.9.

    >>> import jaxseq as js
    >>> cell = Conditioned(js.LSTM(2 + 5, 3), 5, state=True)
    >>> params, v = cell.init(jax.random.key(0)), jnp.ones((4, 5))
    >>> def loss(params):
    ...     state, ys = cell.unroll(cell.attach(params, v), jnp.ones((4, 6, 2)))
    ...     return ys.sum()
    >>> bool(jax.grad(loss)(params).state[0].kernel.any())
    True
    """

    any_rank = False  # pyright: ignore[reportAssignmentType]

    size: int
    _: dataclasses.KW_ONLY
    input: Literal["concatenate", "add"] | None = "concatenate"
    state: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input not in ("concatenate", "add", None):
            raise ValueError(f'Conditioned needs input="concatenate", "add" or None, got {self.input!r}.')
        if not isinstance(self.state, bool):
            raise TypeError(f"Conditioned needs state=True or False, got {self.state!r}.")
        if self.state:
            check_steps(self, self.cell)
            check_free(self, self.cell)
        if self.input is None and not self.state:
            raise ValueError("Conditioned with input=None and state=False conditions nothing: choose one of them.")
        reads: Any = getattr(self.cell, "input_size", None) if self.cell.input_rank == 1 else None
        if self.input is not None and not isinstance(reads, int):
            raise TypeError(f"Conditioned needs a cell that reads vectors of a known input_size, got {self.cell}.")
        if self.input == "concatenate" and reads <= self.size:
            raise ValueError(
                f"Conditioned gives {self.cell} its inputs and a vector of {self.size} features, but it reads {reads} "
                f"in all: give it the input_size of both together."
            )

    @property
    def keeps_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.keeps_size and self.input != "concatenate"

    @property
    def input_size(self) -> Any:
        size = super().input_size
        return size - self.size if self.input == "concatenate" else size

    def init(self, key: Array) -> ConditionedParams:
        cell_key, input_key, state_key = jax.random.split(key, 3)
        cell = self.cell.init(cell_key)
        kernel = _lecun(input_key, (self.size, self.input_size)) if self.input == "add" else None
        state = ()
        if self.state:
            single = jax.eval_shape(lambda: self.cell.initial_state(cell))
            sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(single) if _is_float(leaf)]
            if not sizes:
                raise ValueError(f"Conditioned with state=True needs a cell with a floating state, got {self.cell}.")
            keys = jax.random.split(state_key, len(sizes))
            state = tuple(
                DenseParams(_lecun(k, (self.size, size)), jnp.zeros(size)) for k, size in zip(keys, sizes, strict=True)
            )
        return ConditionedParams(cell, kernel, state)

    def axes(self) -> Any:
        params = jax.eval_shape(self.init, jax.random.key(0))
        dense = DenseParams._make((PartitionSpec("input", "output"), PartitionSpec("output")))
        kernel = None if params.input_kernel is None else PartitionSpec("input", "output")
        return ConditionedParams._make((self.cell.axes(), kernel, (dense,) * len(params.state), None))

    def attach(self, params: ConditionedParams, memory: Any, mask: Any = None) -> ConditionedParams:
        if memory is None:
            return params._replace(cell=self.cell.attach(params.cell, None), condition=None)
        vector = jnp.asarray(memory)
        errors.check_features(self, vector, self.size, "a vector")
        dtype = errors.float_dtype(params._replace(condition=None))
        if dtype is not None:
            errors.check_dtype(self, vector, dtype, "a vector")
            vector = vector.astype(dtype)
        drive = vector if self.input == "concatenate" else None
        if params.input_kernel is not None:
            drive = vector @ params.input_kernel
        products = [(vector @ dense.kernel, dense.bias) for dense in params.state]
        state = tuple(jnp.tanh(z + jnp.broadcast_to(bias, z.shape)) for z, bias in products)
        return params._replace(condition=Condition(drive, state))

    def initial_state(self, params: ConditionedParams, batch_shape: tuple[int, ...] = ()) -> Any:
        start = self.cell.initial_state(params.cell, batch_shape)
        if params.condition is None or not self.state:
            return start
        leaves = iter(params.condition.state)
        return jax.tree.map(
            lambda leaf: self._spread(next(leaves), batch_shape).reshape(leaf.shape) if _is_float(leaf) else leaf, start
        )

    def zero_input(self, params: ConditionedParams, batch_shape: tuple[int, ...] = ()) -> Any:
        x = super().zero_input(params, batch_shape)
        return x[..., : self.input_size] if self.input == "concatenate" else x

    def step(self, params: ConditionedParams, state: Any, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        return super().step(params, state, self._read(params, x, None), key)

    def _unroll(self, params: ConditionedParams, xs: Any, state: Any, run: Run) -> tuple[Any, Any]:
        if self.state and run.reset is not None:  # the cell alone would return to its own initial state
            return super()._unroll(params, xs, state, run)
        xs = self._read(params, xs, run.batch_shape)
        xs = xs if run.keep is None else masks.zero_unless(run.keep, xs)
        return self.cell._unroll(params.cell, xs, state, run)

    def _read(self, params: ConditionedParams, x: Any, batch_shape: tuple[int, ...] | None) -> Any:
        """What the cell reads at one step, or at all of them, where the batch axes are not all of x before the last."""
        if params.condition is None:
            raise ValueError(
                f"{self} has no vector to read: params = cell.attach(params, vector) with one of {self.size} features, "
                "[*batch, size]."
            )
        if self.input is None:
            return x
        errors.check_features(self, x, self.input_size)
        drive = self._spread(params.condition.drive, x.shape[:-1] if batch_shape is None else batch_shape)
        drive = jnp.broadcast_to(drive, (*x.shape[:-1], drive.shape[-1]))
        drive = placed(drive, leading_spec(x, x.ndim - 1))
        return x + drive if self.input == "add" else jnp.concatenate([x, drive], axis=-1)

    def _spread(self, values: Any, batch_shape: tuple[int, ...]) -> Array:
        """Values `[*batch, size]` for all of `batch_shape`, which may have further axes, such as beams."""
        given = values.shape[:-1]
        if tuple(batch_shape[: len(given)]) != given:
            raise ValueError(
                f"{self} has vectors of the batch axes {given} attached, but reads a batch of {tuple(batch_shape)}: "
                "attach one vector [size] for all, or one for each row; without inputs give the initial_state of that "
                "batch."
            )
        values = jnp.expand_dims(values, tuple(range(len(given), len(batch_shape))))
        return jnp.broadcast_to(values, (*batch_shape, values.shape[-1]))


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
