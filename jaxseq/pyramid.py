"""Layers between which time halves."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxseq.combinators.stack import Sequential
from jaxseq.core.unroll import Run


class Pyramid(Sequential):
    """Layers one after another, each reading the outputs of the one before in pairs, so that time halves.

        x^{l+1}_i = [y^l_{2i}, y^l_{2i+1}]

    n layers give T / 2^(n - 1) steps, rounded up: a last step without a partner is paired with zeros. So each layer but
    the first reads twice the features that the one before gives. A pair counts if one of its steps does, what is masked
    in it being zeros; `output_mask` gives the mask of the outputs, for a loss or for attention. Pairs are of neighbours
    in the array from its first step on, in both directions; gaps in the mask are not closed up.

    A `reset` is refused: it might come between the two steps of a pair.

    W. Chan et al., Listen, attend and spell, ICASSP 2016.

    >>> import jaxseq as js
    >>> layer = Pyramid((js.LSTM(2, 3), js.LSTM(6, 4), js.LSTM(8, 4)))
    >>> state, ys = layer.unroll(layer.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape
    (2, 4)
    >>> layer.output_mask(js.length_mask(jnp.array([1, 5]), 5)).tolist()
    [[True, False], [True, True]]
    """

    _joined: ClassVar[int] = 2
    keeps_size = False  # pyright: ignore[reportAssignmentType]

    @property
    def input_size(self) -> Any:
        return getattr(self.layers[0], "input_size", None)

    @property
    def output_size(self) -> Any:
        return getattr(self.layers[-1], "output_size", None)

    def zero_input(self, params: tuple[Any, ...], batch_shape: tuple[int, ...] = ()) -> Any:
        return self.layers[0].zero_input(params[0], batch_shape)

    def _unroll(self, params: tuple[Any, ...], xs: Any, state: tuple[Any, ...], run: Run) -> Any:
        if run.reset is not None:
            raise ValueError("Pyramid takes no reset, which might come inside a pair of steps: unroll segments apart.")
        return super()._unroll(params, xs, state, run)

    def _between(self, xs: Any, run: Run) -> tuple[Any, Run]:
        def pairs(leaf):
            """The two steps of each pair, the one that is read first before the other."""
            leaf = jnp.pad(leaf, [(0, run.length % 2)] + [(0, 0)] * (leaf.ndim - 1))
            return (leaf[1::2], leaf[::2]) if run.reverse else (leaf[::2], leaf[1::2])

        def join(leaf):
            if leaf.ndim < 2 + len(run.batch_shape):
                raise ValueError(f"Pyramid joins the features of two steps, but a layer in {self} gives no features.")
            return jnp.concatenate(pairs(leaf), axis=-1)

        keep = None if run.keep is None else jnp.logical_or(*pairs(run.keep))
        keys = None if run.keys is None else run.keys[::2]
        return jax.tree.map(join, xs), run._replace(length=(run.length + 1) // 2, keep=keep, keys=keys)
