"""Reading a sequence from both ends."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxseq.core import errors
from jaxseq.core.cell import Params, SequenceLayer
from jaxseq.core.layer import Layer
from jaxseq.core.unroll import Run

_MERGES: dict[str, Callable[..., Any]] = {
    "concatenate": lambda *ys: jnp.concatenate(ys, axis=-1),
    "sum": lambda *ys: functools.reduce(jnp.add, ys),
    "mean": lambda *ys: functools.reduce(jnp.add, ys) / len(ys),
    "product": lambda *ys: functools.reduce(jnp.multiply, ys),
}


class Both(NamedTuple):
    """Something for each direction: params, states, or outputs."""

    forward: Any
    backward: Any


class Bidirectional(SequenceLayer):
    """Two layers that read the same sequence, one from each end.

        y_t = merge(forward(x_1 … x_t), backward(x_T … x_t))

    `merge` is "concatenate" (of the features), "sum", "mean", "product", or "both", which gives the pair
    `Both(forward, backward)`. Params and states are such pairs too; the state after the sequence holds what each reader
    knows at its own end. `backward` begins each segment where `reset` begins the next one, at the segment's last step,
    and the whole sequence from the state it is given. The layers may be different; they are cells, or layers of any
    kind.

    M. Schuster and K. K. Paliwal, Bidirectional recurrent neural networks, IEEE Transactions on Signal Processing 45,
    1997.

    >>> import jaxseq as js
    >>> layer = js.Sequential((Bidirectional(js.LSTM(2, 3), js.LSTM(2, 3)), js.Dense(6, 1)))
    >>> state, ys = layer.unroll(layer.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape, state[0].backward.hidden.shape
    ((5, 1), (3,))
    """

    forward: SequenceLayer
    backward: SequenceLayer
    merge: Literal["concatenate", "sum", "mean", "product", "both"] = "concatenate"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, layer in zip(Both._fields, self._readers, strict=True):
            if not isinstance(layer, SequenceLayer):
                raise TypeError(f"Bidirectional needs a layer as {name}, got {layer!r}.")
        if self.merge != "both":
            check_merge(self, self.merge, "both")
        if self.forward.input_rank != self.backward.input_rank and not any(layer.any_rank for layer in self._readers):
            raise ValueError(
                f"Bidirectional reads one input twice, but {self.forward} reads rank {self.forward.input_rank} and "
                f"{self.backward} rank {self.backward.input_rank}."
            )
        reads, gives = self._sizes("input_size"), self._sizes("output_size")
        if None not in reads and reads.forward != reads.backward:
            raise ValueError(f"Bidirectional reads one input twice, but its layers need {_listed(reads)} features.")
        if self.merge in ("sum", "mean", "product") and None not in gives and gives.forward != gives.backward:
            raise ValueError(
                f"Bidirectional cannot take the {self.merge} of {_listed(gives)} features: make the sizes equal, or "
                'merge by "concatenate".'
            )

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._fixing.input_rank

    @property
    def any_rank(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._fixing.any_rank

    @property
    def output_rank(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._fixing.output_rank if self.merge != "both" else None

    @property
    def keeps_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.merge in ("sum", "mean", "product") and all(layer.keeps_size for layer in self._readers)

    @property
    def input_size(self) -> Any:
        sizes = self._sizes("input_size")
        return sizes.backward if sizes.forward is None else sizes.forward

    @property
    def output_size(self) -> Any:
        sizes = self._sizes("output_size")
        if None in sizes:
            return None
        if self.merge == "both":
            return sizes
        return sizes.forward + sizes.backward if self.merge == "concatenate" else sizes.forward

    def init(self, key: Array) -> Both:
        errors.check_key(self, key)
        return Both(*(layer.init(key) for layer, key in zip(self._readers, jax.random.split(key), strict=True)))

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> Both:
        return self._each(lambda layer, p: layer.initial_state(p, batch_shape), params)

    def draw(self, params: Any, key: Array) -> Both:
        keys = Both(*jax.random.split(key))
        return self._each(lambda layer, p, key: layer.draw(p, key), params, keys)

    def attach(self, params: Any, memory: Any, mask: Bool[Array, "*batch memory"] | None = None) -> Both:
        return self._each(lambda layer, p: layer.attach(p, memory, mask), params)

    def axes(self) -> Both:
        return Both(self.forward.axes(), self.backward.axes())

    def map_layers(self, function: Callable[[Layer, Params], Params], params: Any) -> Both:
        return self._each(lambda layer, p: layer.map_layers(function, p), params)

    def zero_input(self, params: Any, batch_shape: tuple[int, ...] = ()) -> Any:
        return self._fixing.zero_input(params.backward if self.forward.any_rank else params.forward, batch_shape)

    def output_run(self, run: Run) -> Run:
        return self.forward.output_run(run)

    def _unroll(self, params: Any, xs: Any, state: Any, run: Run) -> tuple[Both, Any]:
        self._check(params)
        keys = (None, None)
        if run.keys is not None:
            keys = jax.vmap(jax.random.split, out_axes=1)(run.keys)
        from_end = run._replace(reverse=not run.reverse, reset=segment_ends(run.reset, run.reverse), keys=keys[1])
        with jax.named_scope("forward"):
            forward, forward_ys = self.forward._unroll(params.forward, xs, state.forward, run._replace(keys=keys[0]))
        with jax.named_scope("backward"):
            backward, backward_ys = self.backward._unroll(params.backward, xs, state.backward, from_end)
        ys = Both(forward_ys, backward_ys)
        return Both(forward, backward), ys if self.merge == "both" else merged(self, self.merge, ys)

    @property
    def _fixing(self) -> SequenceLayer:
        """The layer that fixes the rank of the inputs."""
        return self.backward if self.forward.any_rank else self.forward

    @property
    def _readers(self) -> tuple[SequenceLayer, SequenceLayer]:
        return self.forward, self.backward

    def _sizes(self, name: str) -> Both:
        return Both(*(getattr(layer, name, None) for layer in self._readers))

    def _each(self, function: Callable[..., Any], params: Any, *others: Both) -> Both:
        """`function` of each layer, its params, and its part of `others`."""
        self._check(params)
        return Both(*map(function, self._readers, params, *others))

    def _check(self, params: Any) -> None:
        if not isinstance(params, Both):
            raise TypeError(f"Bidirectional needs params Both(forward, backward), got {errors.shape_of(params)}.")


def check_merge(layer: SequenceLayer, merge: Any, *others: str) -> None:
    """Raises ValueError unless `merge` is the name of a way to merge; `others` are further names that it could be."""
    if merge not in _MERGES:
        raise ValueError(f"{type(layer).__name__} merges by {', '.join((*_MERGES, *others))}, got {merge!r}.")


def merged(layer: SequenceLayer, merge: str, outputs: Sequence[Any]) -> Any:
    """The outputs of several readers as one."""
    kept = -1 if merge == "concatenate" else None  # the axes that have to be equal
    shapes = [jax.tree.map(lambda leaf: jnp.shape(leaf)[:kept], ys) for ys in outputs]
    if any(shape != shapes[0] for shape in shapes):
        listed = " and ".join(str(errors.shape_of(ys)) for ys in outputs)
        raise ValueError(f"{layer} cannot {merge} outputs {listed}: they need to have the same shape.")
    return jax.tree.map(_MERGES[merge], *outputs)


def segment_ends(reset: Bool[Array, "time *batch"] | None, reverse: bool = False) -> Bool[Array, "time *batch"] | None:
    """Where a reader from the other end resets: at the last steps of segments, given where they begin.

    >>> segment_ends(jnp.array([True, False, True, False])).tolist()
    [False, True, False, False]
    """
    if reset is None:
        return None
    none = jnp.zeros_like(reset[:1])
    return jnp.concatenate([none, reset[:-1]] if reverse else [reset[1:], none])


def _listed(sizes: Both) -> str:
    return f"{sizes.forward} and {sizes.backward}"
