"""Images read by recurrences: rows are the steps, so what follows holds for any height."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxseq.bidirectional import check_merge, merged, segment_ends
from jaxseq.combinators.stack import Layers, Sequential
from jaxseq.core.unroll import Run


class ReNet(Sequential):
    """Layers that read an image `[*batch, height, width, channels]` by columns and by rows, in turns.

    The first layer reads each column by itself, over the height, the second each row of what the first gives, over the
    width, a third columns again. With `Bidirectional` layers, two of them let every place see the whole image. Time is
    the height: `mask` and `reset` tell of whole rows, and images may be packed one above the other. There is no state:
    each column and each row starts from the layers' own initial states.

    F. Visin et al., ReNet: a recurrent neural network based alternative to convolutional networks, arXiv:1505.00393,
    2015. (Its patches are pixels here: a reshape makes one step of several.)

    >>> import jaxseq as js
    >>> layer = ReNet((js.Bidirectional(js.GRU(1, 3), js.GRU(1, 3)), js.Bidirectional(js.GRU(6, 4), js.GRU(6, 4))))
    >>> _, ys = layer.unroll(layer.init(jax.random.key(0)), jnp.ones((2, 7, 5, 1)))
    >>> ys.shape
    (2, 7, 5, 8)
    """

    any_rank = False  # pyright: ignore[reportAssignmentType]
    input_rank = 2  # pyright: ignore[reportAssignmentType]
    output_rank = 2  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, layer in enumerate(self.layers):
            if layer.input_rank != 1:
                raise ValueError(f"ReNet needs layers that read vectors; {layer} (number {index}) does not.")

    def initial_state(self, params: tuple[Any, ...], batch_shape: tuple[int, ...] = ()) -> tuple[()]:
        self._check(params)
        return ()

    def zero_input(self, params: tuple[Any, ...], batch_shape: tuple[int, ...] = ()) -> Any:
        raise TypeError(f"{self} reads rows of any width: it does not tell the shape of its inputs.")

    def output_run(self, run: Run) -> Run:
        for layer in self.layers[::2]:
            run = layer.output_run(run)
        return run

    def _unroll(self, params: tuple[Any, ...], xs: Array, state: tuple[()], run: Run) -> tuple[tuple[()], Any]:
        self._check(params)
        run = self.split_keys(run)
        for index, (layer, p) in enumerate(zip(self.layers, params, strict=True)):
            own = run._replace(keys=None if run.keys is None else run.keys[:, index])
            if index % 2:
                xs = _read_rows(layer, p, xs, own)
            else:
                xs = _read_columns(layer, p, xs, own)
                run = layer.output_run(run)
        return state, xs


def _read_columns(layer: Any, params: Any, xs: Array, run: Run) -> Array:
    """What a layer makes of each column of `[height, *batch, width, channels]`."""
    batch_shape = (*run.batch_shape, xs.shape[-2])
    keep, reset = (
        None if flags is None else jnp.broadcast_to(flags[..., None], (run.length, *batch_shape))
        for flags in (run.keep, run.reset)
    )
    run = run._replace(batch_shape=batch_shape, keep=keep, reset=reset)
    return layer._unroll(params, xs, layer.initial_state(params, batch_shape), run)[1]


def _read_rows(layer: Any, params: Any, xs: Array, run: Run) -> Array:
    """What a layer makes of each row of `[height, *batch, width, channels]`."""
    batch_shape, width = (*run.batch_shape, run.length), xs.shape[-2]
    keep = None if run.keep is None else jnp.broadcast_to(jnp.moveaxis(run.keep, 0, -1), (width, *batch_shape))
    keys = None if run.keys is None or not run.length else jax.random.split(run.keys[0], width)
    run = Run(width, batch_shape, reverse=False, keep=keep, reset=None, keys=keys)
    xs = jnp.moveaxis(xs, (-2, 0), (0, -2))  # [width, *batch, height, channels]
    _, ys = layer._unroll(params, xs, layer.initial_state(params, batch_shape), run)
    return jnp.moveaxis(ys, (0, -2), (-2, 0))


class Grid(Layers):
    """Four layers that read an image `[*batch, height, width, channels]`, one from each corner.

    `layers` are those that start at the top left, the top right, the bottom left and the bottom right; each reads rows,
    as `LSTM2D` and `Elman2D` do. `merge` is "concatenate" (of the features), "sum", "mean" or "product". Time is the
    height: `mask` and `reset` tell of whole rows, as for `Bidirectional`; the state has a part for each layer.

    A. Graves and J. Schmidhuber, Offline handwriting recognition with multidimensional recurrent neural networks,
    NIPS 2008.

    >>> import jaxseq as js
    >>> layer = Grid((js.LSTM2D((5, 1), 3),) * 4, merge="mean")
    >>> state, ys = layer.unroll(layer.init(jax.random.key(0)), jnp.ones((2, 7, 5, 1)))
    >>> ys.shape
    (2, 7, 5, 3)
    """

    input_rank = 2
    output_rank = 2

    merge: Literal["concatenate", "sum", "mean", "product"] = "concatenate"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_merge(self, self.merge)
        if len(self.layers) != 4 or any(layer.input_rank != 2 for layer in self.layers):
            raise ValueError(f"Grid needs four layers that read rows, as LSTM2D does, one a corner, got {self.layers}.")
        for name in ("input_size", "output_size") if self.merge != "concatenate" else ("input_size",):
            sizes = {size for layer in self.layers if (size := getattr(layer, name, None)) is not None}
            if len(sizes) > 1:
                raise ValueError(f"Grid needs layers of one {name} to {self.merge}, got {sorted(sizes)}.")

    @property
    def input_size(self) -> Any:
        return getattr(self.layers[0], "input_size", None)

    @property
    def output_size(self) -> Any:
        sizes: list[Any] = [getattr(layer, "output_size", None) for layer in self.layers]
        if None in sizes:
            return None
        return sum(sizes) if self.merge == "concatenate" else sizes[0]

    def zero_input(self, params: tuple[Any, ...], batch_shape: tuple[int, ...] = ()) -> Any:
        return self.layers[0].zero_input(params[0], batch_shape)

    def _unroll(self, params: tuple[Any, ...], xs: Array, state: tuple[Any, ...], run: Run) -> Any:
        self._check(params)
        run = self.split_keys(run)
        states, outputs = [], []
        for index, layer in enumerate(self.layers):
            own = run._replace(keys=None if run.keys is None else run.keys[:, index])
            if index >= 2:
                own = own._replace(reverse=not run.reverse, reset=segment_ends(run.reset, run.reverse))
            with jax.named_scope(f"{index}_{type(layer).__name__}"):
                if index % 2:
                    last, ys = layer._unroll(params[index], jnp.flip(xs, -2), state[index], own)
                    ys = jnp.flip(ys, -2)
                else:
                    last, ys = layer._unroll(params[index], xs, state[index], own)
            states.append(last)
            outputs.append(ys)
        return tuple(states), merged(self, self.merge, outputs)
