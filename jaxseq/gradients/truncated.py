"""Truncated back-propagation through time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from jaxseq.core.cell import Cell, Params, State
from jaxseq.core.unroll import Run
from jaxseq.core.wrapper import Reader


def truncated_unroll(
    cell: Cell,
    params: Params,
    xs: Any,
    state: State = None,
    *,
    window: int,
    reach: int | None = None,
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    reverse: bool = False,
    key: Array | None = None,
    length: int | None = None,
) -> tuple[State, Any]:
    """`cell.unroll`, through which gradients reach back a limited number of steps; the values are the same.

    The outputs are taken in windows of `window` steps, in the order in which they are read, the last one shorter if
    need be. What a window's outputs give to the gradient passes back through the `reach` steps that end with the
    window, and no further: there the state is a constant. (These are h' and h of BPTT(h; h') of Williams and Peng, k1
    and k2 of Sutskever.) With `reach=None`, the default, it is `window`, and windows share no step; else each step is
    computed about reach / window times. Where `reach` covers the sequence this is full back-propagation, also into the
    first state. The final state counts to the last window.

    To train window by window, with an update after each, call `cell.unroll` on one window after the other, with the
    state in which the one before ended: a state that is given is a constant.

    R. J. Williams and J. Peng, An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories, Neural Computation 2, 1990; I. Sutskever, Training recurrent neural networks, PhD thesis, University
    of Toronto, 2013.

    Args:
        cell: any cell; a whole model is one, as a Stack.
        params: its params.
        xs: the inputs, as for `unroll`; so are `state`, `mask`, `reset`, `reverse`, `key` and `length`.
        state: the state to start from, by default `initial_state`.
        window: how many steps of outputs share one stretch of back-propagation.
        reach: how many steps that is, `window` or more.
        mask: False at padding.
        reset: True where a new segment begins.
        reverse: read from the last step to the first.
        key: for noise, the same as that of `unroll`.
        length: the number of steps, needed only without inputs.

    Returns:
        The final state and the outputs.

    Raises:
        ValueError: if `window` or `reach` is out of its range, or as `unroll`.
        TypeError: if the layer is no cell, or as `unroll`.

    >>> import jaxseq as js
    >>> cell = js.LSTM(2, 3)
    >>> params, xs = cell.init(jax.random.key(0)), jnp.ones((50, 2))
    >>> def last(xs):
    ...     state, ys = truncated_unroll(cell, params, xs, window=5, reach=10)
    ...     return ys[-1].sum()
    >>> gradient = jax.grad(last)(xs)
    >>> bool((gradient[:40] == 0).all()), bool((gradient[40:] != 0).any(axis=1).all())
    (True, True)
    """
    reader = _Truncated(cell, window, reach)
    return reader.unroll(params, xs, state, mask=mask, reset=reset, reverse=reverse, key=key, length=length)


class _Truncated(Reader, function="truncated_unroll"):
    """Unrolls with a limited gradient."""

    window: int
    reach: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"truncated_unroll needs window >= 1 step, got {self.window}.")
        if self.reach is not None and self.reach < self.window:
            raise ValueError(
                f"truncated_unroll needs a reach of at least its window of {self.window} steps, got {self.reach}: else "
                "the gradient of the window's first outputs would not reach their own step."
            )

    def _unroll(self, params: Any, xs: Any, state: Any, run: Run) -> tuple[Any, Any]:
        reach = self.reach or self.window
        if run.length <= reach:
            return self.cell._unroll(params, xs, state, run)
        steps = (xs, run.keep, run.reset, run.keys)
        if run.reverse:
            steps = jax.tree.map(lambda leaf: leaf[::-1], steps)

        final, ys = self._read_windows(params, state, steps, run, reach)
        return final, jax.tree.map(lambda leaf: leaf[::-1], ys) if run.reverse else ys

    def _read_windows(self, params: Any, state: Any, steps: Any, run: Run, reach: int) -> tuple[Any, Any]:
        window = self.window
        head = reach // window * window  # steps of the first windows, which reach the first state
        count, rest = divmod(run.length - head, window)
        first = head + window - reach  # where the reach of the next window begins
        constant = functools.partial(jax.tree.map, lax.stop_gradient)

        def read(state, steps, where):
            xs, keep, reset, keys = jax.tree.map(lambda leaf: leaf[where], steps)
            length = len(range(*where.indices(run.length)))
            return self.cell._unroll(params, xs, state, Run(length, run.batch_shape, False, keep, reset, keys))

        middle, early = read(state, steps, slice(0, first))
        final, late = read(middle, steps, slice(first, head))
        outputs = [early, late]
        begin, start = 0, state  # of the reach before the last
        if count:

            def body(carry, steps):
                start, _ = carry
                after, early = read(start, steps, slice(0, window))
                final, late = read(after, steps, slice(window, reach))
                ys = jax.tree.map(lambda *parts: jnp.concatenate(parts)[-window:], early, late)
                return (constant(after), final), (start, ys)

            positions = first + window * np.arange(count)[:, None] + np.arange(reach)
            reaches = jax.tree.map(lambda leaf: leaf[positions], steps)
            (_, final), (starts, ys) = lax.scan(body, (constant(middle), final), reaches, length=count)
            outputs.append(jax.tree.map(lambda leaf: leaf.reshape(count * window, *leaf.shape[2:]), ys))
            begin, start = first + (count - 1) * window, jax.tree.map(lambda leaf: leaf[-1], starts)
        if rest:
            start, _ = read(start, steps, slice(begin, run.length - reach))
            final, ys = read(constant(start), steps, slice(run.length - reach, run.length))
            outputs.append(jax.tree.map(lambda leaf: leaf[-rest:], ys))
        return final, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
