"""Attention as a cell: a causal Transformer block with a rolling cache."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxseq.cells.packing import Order, order_of, take
from jaxseq.cells.rotary import rotary
from jaxseq.core import errors, masks
from jaxseq.core.activations import Activation, activation
from jaxseq.core.cell import Cell, Run
from jaxseq.core.precision import widen

_lecun = initializers.lecun_normal()
_lecun_heads = initializers.lecun_normal(in_axis=0, out_axis=(2, 3), batch_axis=1)
_lecun_joined = initializers.lecun_normal(in_axis=(0, 1), out_axis=2)


class TransformerParams(NamedTuple):
    """The parameters of a Transformer block; `input_kernel` makes the queries, keys and values."""

    attention_scale: Float[Array, "size"]
    input_kernel: Float[Array, "input 3 head feature"]
    output_kernel: Float[Array, "head feature output"]
    mlp_scale: Float[Array, "size"]
    up_kernel: Float[Array, "input hidden"]
    down_kernel: Float[Array, "hidden output"]


class TransformerState(NamedTuple):
    """The last `window` keys and values, that of position p in place p modulo `window`, and the next position."""

    keys: Float[Array, "*batch window head feature"]
    values: Float[Array, "*batch window head feature"]
    position: Int[Array, "*batch"]


class TransformerBlock(Cell):
    """A causal Transformer block: attention over the last `window` steps, this one included, and a two-layer network.

        q, k, v = norm(x) W, each in `heads` parts;   q and k turned by their position (`rotary`)
        a = x + softmax(q K / sqrt(size / heads)) V O
        y = a + gelu(norm(a) U) D

    norm(x) = s x / sqrt(mean(x²) + 10⁻⁶) (RMSNorm), before each part. The products have no biases. `hidden_size`, the
    width of U, is 4 `size` by default. The state is a cache of `window` keys and values. `step` reads it; `unroll`
    computes all steps at once, in blocks of `window` steps, in memory O(T window). Positions count the steps that
    were read since the start or the last reset: masked steps have none, and a reset clears the cache. They are int32:
    a row can read 2³¹ - 1 steps without a reset, about 2 · 10⁹, and the last are as exact as the first.

    A. Vaswani et al., Attention is all you need, NIPS 2017; the norms first as R. Xiong et al., On layer normalization
    in the Transformer architecture, ICML 2020; RMSNorm: B. Zhang and R. Sennrich, NeurIPS 2019.

    >>> import jaxseq as js
    >>> block = TransformerBlock(size=8, heads=2, window=16)
    >>> model = js.Stack((js.Embed(5, 8), block, block, js.Dense(8, 5)))
    >>> state, logits = model.unroll(model.init(jax.random.key(0)), jnp.zeros((3, 40), int))
    >>> logits.shape, state[1].keys.shape
    ((3, 40, 5), (3, 16, 2, 4))
    """

    free_state = False

    size: int
    heads: int
    window: int
    hidden_size: int | None = None
    _: dataclasses.KW_ONLY
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"TransformerBlock needs {name} >= 1, got {getattr(self, name)}.")
        if self.size % (2 * self.heads):
            raise ValueError(
                f"TransformerBlock turns the features of each head in pairs: size needs to be a multiple of "
                f"2 * heads = {2 * self.heads}, got {self.size}."
            )

    @property
    def input_size(self) -> int:
        return self.size

    @property
    def output_size(self) -> int:
        return self.size

    def init(self, key: Array) -> TransformerParams:
        errors.check_key(self, key)
        keys = jax.random.split(key, 4)
        features, hidden = self.size // self.heads, self.hidden_size or 4 * self.size
        return TransformerParams(
            attention_scale=jnp.ones(self.size),
            input_kernel=_lecun_heads(keys[0], (self.size, 3, self.heads, features)),
            output_kernel=_lecun_joined(keys[1], (self.heads, features, self.size)),
            mlp_scale=jnp.ones(self.size),
            up_kernel=_lecun(keys[2], (self.size, hidden)),
            down_kernel=_lecun(keys[3], (hidden, self.size)),
        )

    def axes(self) -> Any:
        return TransformerParams._make(
            (
                PartitionSpec("size"),
                PartitionSpec("input", None, "head", "feature"),
                PartitionSpec("head", "feature", "output"),
                PartitionSpec("size"),
                PartitionSpec("input", "hidden"),
                PartitionSpec("hidden", "output"),
            )
        )

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> TransformerState:
        errors.check_params(self, params)
        shape = (*batch_shape, self.window, self.heads, self.size // self.heads)
        empty = jnp.zeros(shape, params.input_kernel.dtype)
        return TransformerState(empty, empty, position=jnp.zeros(batch_shape, jnp.int32))

    def step(self, params: Any, state: TransformerState, x: Float[Array, "*batch size"], key: Any = None) -> Any:
        self._check(params, state, x, x.shape[:-1])
        query, key_, value = self._heads(params, x, state.position)
        places = lax.broadcasted_iota(jnp.int32, (*state.position.shape, self.window), state.position.ndim)
        position = state.position[..., None]
        new = places == position % self.window
        keys = masks.select(new, key_[..., None, :, :], state.keys)
        values = masks.select(new, value[..., None, :, :], state.values)
        attended = attend(query[..., None, :, :], keys, values, (places <= position)[..., None, :])
        return TransformerState(keys, values, state.position + 1), self._finish(params, x, attended[..., 0, :, :])

    def _unroll(self, params: Any, xs: Array, state: TransformerState, run: Run) -> tuple[TransformerState, Array]:
        self._check(params, state, xs, run.batch_shape)
        if run.length == 0:
            return state, xs
        axis = len(run.batch_shape)
        xs, keep, reset = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, axis), (xs, run.keep, run.reset))
        if run.reverse:
            xs, keep, reset = jax.tree.map(lambda leaf: jnp.flip(leaf, axis), (xs, keep, reset))
        ys, state = self._read(params, xs, state, order_of(run, state.position, keep, reset))
        if run.reverse:
            ys = jnp.flip(ys, axis)
        return state, jnp.moveaxis(ys, axis, 0)

    def _read(self, params: Any, xs: Array, given: TransformerState, order: Order) -> tuple[Array, TransformerState]:
        """All steps at once, `[*batch, time, size]`."""
        axis, fresh = given.position.ndim, self.initial_state(params, given.position.shape)
        finite = jnp.isfinite(xs).all(axis=-1)  # what is not would reach all that it is masked for, by 0 * NaN
        xs = masks.zero_unless(finite, xs)
        packed, finite = (xs, finite) if order.index is None else (take(leaf, order.index) for leaf in (xs, finite))
        query, keys, values = self._heads(params, packed, order.position)

        # the cache before these steps, its oldest entry first
        read_any = order.read > 0  # the state of a row that reads nothing may be anything
        places = lax.broadcasted_iota(jnp.int32, (*given.position.shape, self.window), axis)
        start = given.position[..., None]
        cached = (places >= self.window - start) & read_any[..., None]
        cache = (take(leaf, (places + start) % self.window) for leaf in (given.keys, given.values))
        cache = [masks.zero_unless(cached, leaf) for leaf in cache]
        whole = jnp.stack([jnp.isfinite(leaf).all(axis=(-2, -1)) for leaf in cache]).all(axis=0)
        before = [masks.zero_unless(whole, leaf) for leaf in cache]
        segments = jnp.concatenate([jnp.where(cached, 0, -1), order.segment], axis)
        seen_keys, seen_values = (jnp.concatenate(pair, axis) for pair in zip(before, (keys, values), strict=True))
        ys = self._finish(params, packed, _banded(query, seen_keys, seen_values, segments, self.window))
        lost = _reached(jnp.concatenate([~whole, ~finite], axis), segments, self.window)[..., self.window :]
        ys = masks.lose(lost, ys, packed, params)
        keys, values = masks.lose(~finite, (keys, values), packed, params)

        # in each place of the cache the last step that wrote there, counted back from the last one that was read
        back = 1 + (order.last_position[..., None] - 1 - places) % self.window
        written = back <= order.last_read[..., None]
        index = jnp.clip(order.read[..., None] - back, 0, packed.shape[axis] - 1)
        kept = masks.select(order.was_reset, fresh, given)
        last_keys = masks.select(written, take(keys, index), kept.keys)
        last_values = masks.select(written, take(values, index), kept.values)
        if order.keep is not None:
            ys = masks.zero_unless(order.keep, take(ys, order.rank))
        return ys, TransformerState(last_keys, last_values, order.last_position)

    def _check(self, params: Any, state: Any, x: Array, batch_shape: tuple[int, ...]) -> None:
        errors.check_params(self, params)
        errors.check_features(self, x, self.size)
        errors.check_dtype(self, x, params.input_kernel.dtype)
        errors.check_state(self, state, jax.eval_shape(lambda p: self.initial_state(p, batch_shape), params))

    def _heads(self, params: Any, x: Array, position: Array) -> tuple[Array, Array, Array]:
        """The query, key and value of each step, `[..., head, feature]`."""
        projected = jnp.tensordot(_norm(x, params.attention_scale), params.input_kernel, 1)
        query, key, value = (projected[..., part, :, :] for part in range(3))
        return rotary(query, position), rotary(key, position), value

    def _finish(self, params: Any, x: Array, attended: Array) -> Array:
        x = x + jnp.tensordot(attended, params.output_kernel, 2)
        hidden = activation(self.activation)(_norm(x, params.mlp_scale) @ params.up_kernel)
        return x + hidden @ params.down_kernel


def attend(
    query: Float[Array, "*batch query head feature"],
    keys: Float[Array, "*batch memory head feature"],
    values: Float[Array, "*batch memory head feature"],
    mask: Bool[Array, "*batch query memory"],
) -> Float[Array, "*batch query head feature"]:
    """softmax(q K / sqrt(features)) V over what `mask` shows; at least one entry for each query."""
    from flax.linen import dot_product_attention  # imports much that nothing else needs

    given = (widen(leaf) for leaf in (query, keys, values))
    attended = dot_product_attention(*given, mask=mask[..., None, :, :])
    return attended.astype(values.dtype)


def _norm(x: Array, scale: Array) -> Array:
    """RMSNorm."""
    wide = widen(x)
    normal = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return normal.astype(x.dtype) * jnp.broadcast_to(scale, x.shape)


def _reached(flags: Bool[Array, "*batch step"], segments: Array, window: int) -> Bool[Array, "*batch step"]:
    """Whether one of the last `window` steps of the same segment has its flag."""
    place = jnp.cumsum(jnp.ones_like(flags, jnp.int32), axis=-1) - 1  # sharded as the steps are
    last = lax.cummax(jnp.where(flags, place, 0), axis=flags.ndim - 1)
    return (place - last < window) & take(flags, last) & (take(segments, last) == segments)


def _banded(query: Array, keys: Array, values: Array, segments: Array, window: int) -> Array:
    """Attention of each step to the last `window` of its segment, where `keys` begin `window` entries before `query`.

    It goes by chunks of as many steps, each of which sees itself and the one before.
    """
    axis, time = query.ndim - 3, query.shape[query.ndim - 3]
    chunk = min(time, window)
    count = -(-time // chunk)

    def padded(leaf, value=0):
        widths = [(0, count * chunk - time if a == axis else 0) for a in range(leaf.ndim)]
        return jnp.pad(leaf, widths, constant_values=value)

    def chunks(leaf, count, size):
        return leaf.reshape(*leaf.shape[:axis], count, size, *leaf.shape[axis + 1 :])

    def seen(leaf):
        if count == 1:
            return jnp.expand_dims(leaf, axis)
        parts = chunks(leaf, count + 1, window)
        ends = (lax.slice_in_dim(parts, 0, count, axis=axis), lax.slice_in_dim(parts, 1, count + 1, axis=axis))
        return jnp.concatenate(ends, axis + 1)

    segments = padded(segments, -2)
    own = chunks(lax.slice_in_dim(segments, window, None, axis=axis), count, chunk)
    i, j = (lax.broadcasted_iota(jnp.int32, (chunk, window + chunk), dimension) for dimension in range(2))
    mask = (own[..., None] == seen(segments)[..., None, :]) & jnp.expand_dims(
        (i < j) & (j <= i + window), range(axis + 1)
    )
    attended = attend(chunks(padded(query), count, chunk), seen(padded(keys)), seen(padded(values)), mask)
    attended = attended.reshape(*query.shape[:axis], count * chunk, *query.shape[axis + 1 :])
    return lax.slice_in_dim(attended, 0, time, axis=axis)
