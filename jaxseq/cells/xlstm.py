"""The extended LSTM: exponential gates, with a memory of scalars (sLSTM) or of matrices (mLSTM)."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.gated import GATED_AXES, Gated, GatedParams, Recurrent, init_gated
from jaxseq.core import masks
from jaxseq.core.precision import widen
from jaxseq.core.unroll import Run, scan_from_fresh

_NEVER = -1e30  # the logarithm of a weight that is 0, finite so that differences of two are


def _check_heads(cell: Any) -> None:
    if cell.heads < 1 or cell.hidden_size % cell.heads:
        raise ValueError(f"{type(cell).__name__} needs heads that divide hidden_size={cell.hidden_size}: {cell.heads}.")


class SLSTMState(NamedTuple):
    """The state of an sLSTM: cell and normalizer are multiplied by exp(stabilizer)."""

    hidden: Float[Array, "*batch hidden"]
    cell: Float[Array, "*batch hidden"]
    normalizer: Float[Array, "*batch hidden"]
    stabilizer: Float[Array, "*batch hidden"]


class SLSTM(Gated):
    """An LSTM with an exponential input gate and a normalised memory; its units are fed back within their head only.

        i, f, g, o = x W + h R + b
        m' = max(log σ(f) + m, i)
        c' = exp(log σ(f) + m - m') c + exp(i - m') tanh(g)
        n' = exp(log σ(f) + m - m') n + exp(i - m')
        h' = σ(o) c' / n',   y = h'

    m only keeps the exponentials in range; c and n start at 0, and the first m' is i. R is block-diagonal: a block for
    each of `heads`, `recurrent_kernel` is `[hidden, gate, hidden / heads]`. The forget gate's bias starts at 1. The
    block around the cell, with its norms and projections, is not part of it.

    M. Beck et al., xLSTM: extended long short-term memory, NeurIPS 2024 (the paper's z is g; its forget gate may be
    exponential too).

    >>> cell = SLSTM(input_size=2, hidden_size=6, heads=3)
    >>> params = cell.init(jax.random.key(0))
    >>> params.recurrent_kernel.shape, cell.unroll(params, jnp.ones((5, 2)))[1].shape
    ((6, 4, 2), (5, 6))
    """

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")
    free_state = False

    _: dataclasses.KW_ONLY
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_heads(self)

    def init(self, key: Array) -> GatedParams:
        params = super().init(key)
        size = self.hidden_size // self.heads
        heads = [init_gated(key, 1, self.gate_count, size) for key in jax.random.split(key, self.heads)]
        kernel = jnp.concatenate([head.recurrent_kernel for head in heads])
        return params._replace(recurrent_kernel=kernel, bias=params.bias.at[1].set(1))

    def axes(self) -> Any:
        return GATED_AXES._replace(recurrent_kernel=PartitionSpec("recurrent", "gate", "unit"))

    def initial_state(self, params: GatedParams, batch_shape: tuple[int, ...] = ()) -> SLSTMState:
        return SLSTMState(*(self.zeros(params, batch_shape) for _ in range(4)))

    def products(self, params: GatedParams, hidden: Array, x: Array) -> tuple[Array, Array]:
        from_input = self.product(x, params.input_kernel, params.bias)
        size = self.hidden_size // self.heads
        units = hidden.reshape(*hidden.shape[:-1], self.heads, size)
        kernel = params.recurrent_kernel.reshape(self.heads, size, *params.recurrent_kernel.shape[1:])
        return from_input, jnp.einsum("...hr,hrgu->...ghu", units, kernel).reshape(from_input.shape)

    def update(self, params: GatedParams, state: SLSTMState, from_input: Array, from_recurrent: Array) -> SLSTMState:
        i, f, g, o = self.split_gates(from_input + from_recurrent)
        kept = jax.nn.log_sigmoid(f) + state.stabilizer
        stabilizer = jnp.where(state.normalizer > 0, jnp.maximum(kept, i), i)  # as if m were -inf where all is empty
        forget, write = jnp.exp(jnp.minimum(kept - stabilizer, 0)), jnp.exp(i - stabilizer)
        cell = forget * state.cell + write * jnp.tanh(g)
        normalizer = forget * state.normalizer + write
        hidden = jax.nn.sigmoid(o) * cell / normalizer  # 1 at least, from a state of its own on
        return SLSTMState(hidden, cell, normalizer, stabilizer)


class MLSTMParams(NamedTuple):
    """The parameters of an mLSTM: those of q, k, v, o by unit, and those of the gates i, f by head."""

    input_kernel: Float[Array, "input 4 hidden"]
    bias: Float[Array, "4 hidden"]
    gate_kernel: Float[Array, "input 2 head"]
    gate_bias: Float[Array, "2 head"]


class MLSTMState(NamedTuple):
    """The state of an mLSTM: memory and normalizer are multiplied by exp(stabilizer)."""

    memory: Float[Array, "*batch head value key"]
    normalizer: Float[Array, "*batch head key"]
    stabilizer: Float[Array, "*batch head"]


class MLSTM(Recurrent):
    """An LSTM with a matrix as memory and nothing fed back, so that it is computed in parallel over chunks of steps.

        q, k, v, o = x W + b,   k divided by sqrt(d);   i, f = x G + a   (numbers, for each head)
        m' = max(log σ(f) + m, i)
        C' = exp(log σ(f) + m - m') C + exp(i - m') v kᵀ
        n' = exp(log σ(f) + m - m') n + exp(i - m') k
        h' = σ(o) C' q / max(|n'ᵀ q|, exp(-m')),   y = h'

    The units are split into `heads` of d = hidden / heads, each with its own memory `[d, d]`. m only keeps the
    exponentials in range; everything starts at 0, and the biases of f between 3 and 6, increasing over the heads.
    `chunk_size` steps are computed at once, by products `[chunk_size, chunk_size]`, which the gradient computes again
    from the state at the start of the chunk; 16 is best on a CPU. The block around the cell, with its norms,
    convolution and projections, is not part of it.

    M. Beck et al., xLSTM: extended long short-term memory, NeurIPS 2024 (its forget gate may be exponential too).

    >>> cell = MLSTM(input_size=2, hidden_size=6, heads=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape, state.memory.shape
    ((5, 6), (3, 2, 2))
    """

    gates: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")
    head_gates: ClassVar[tuple[str, ...]] = ("i", "f")
    free_state = False

    _: dataclasses.KW_ONLY
    heads: int = 4
    chunk_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_heads(self)

    def init(self, key: Array) -> MLSTMParams:
        key, gate_key = jax.random.split(key)
        units = super().init(key)
        gates = init_gated(gate_key, self.input_size, 2, self.heads)
        bias = gates.bias.at[1].set(jnp.linspace(3, 6, self.heads))
        return MLSTMParams(units.input_kernel, units.bias, gates.input_kernel, bias)

    def axes(self) -> Any:
        gates: Any = PartitionSpec("input", "gate", "head"), PartitionSpec("gate", "head")
        return MLSTMParams(GATED_AXES.input_kernel, GATED_AXES.bias, *gates)

    def initial_state(self, params: MLSTMParams, batch_shape: tuple[int, ...] = ()) -> MLSTMState:
        size = self.hidden_size // self.heads
        shapes = (self.heads, size, size), (self.heads, size), (self.heads,)
        return MLSTMState(*(self.zeros(params, (*batch_shape, *shape[:-1]), shape[-1]) for shape in shapes))

    def step(self, params: MLSTMParams, state: MLSTMState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        q, k, v, o, i, f = self._project(params, x)
        dtype, state = x.dtype, jax.tree.map(widen, state)
        kept = jax.nn.log_sigmoid(f) + state.stabilizer
        stabilizer = jnp.maximum(kept, i)
        forget, write = jnp.exp(kept - stabilizer), jnp.exp(i - stabilizer)
        memory = forget[..., None, None] * state.memory + write[..., None, None] * v[..., :, None] * k[..., None, :]
        normalizer = forget[..., None] * state.normalizer + write[..., None] * k
        value, norm = jnp.einsum("...vk,...k->...v", memory, q), jnp.sum(normalizer * q, axis=-1)
        hidden = self._output(o, value, norm, stabilizer)
        return _narrow(MLSTMState(memory, normalizer, stabilizer), dtype), hidden.astype(dtype)

    def _project(self, params: MLSTMParams, x: Array) -> list[Array]:
        """q, k, v and o `[..., head, d]`, and the gates i and f `[..., head]`, in float32 at least."""
        units = self.split_gates(self.product(x, params.input_kernel, params.bias))
        size = self.hidden_size // self.heads
        q, k, v, o = (widen(unit).reshape(*unit.shape[:-1], self.heads, size) for unit in units)
        gates = widen(jnp.tensordot(x, params.gate_kernel, 1))
        gates = gates + jnp.broadcast_to(widen(params.gate_bias), gates.shape)
        return [q, k / math.sqrt(q.shape[-1]), v, o, gates[..., 0, :], gates[..., 1, :]]

    def _output(self, o: Array, value: Array, norm: Array, stabilizer: Array) -> Array:
        limit = 0.45 * math.log(jnp.finfo(norm.dtype).max)  # beyond, the gradient of the quotient is no number
        norm = jnp.maximum(jnp.abs(norm), jnp.exp(-jnp.clip(stabilizer, -limit, limit)))
        hidden = jax.nn.sigmoid(o) * value / norm[..., None]
        return hidden.reshape(*hidden.shape[:-2], self.hidden_size)

    def _unroll(self, params: MLSTMParams, xs: Array, state: MLSTMState, run: Run) -> Any:
        if not (isinstance(run.length, int) and run.length > 0):  # none, or a symbol
            return super()._unroll(params, xs, state, run)
        return masks.contain(lambda xs, state: self._by_chunks(params, xs, state, run), params, xs, state, run)

    def _by_chunks(self, params: MLSTMParams, xs: Array, state: MLSTMState, run: Run) -> Any:
        keep = jnp.ones_like(xs[..., 0], bool) if run.keep is None else run.keep
        reset = jnp.zeros_like(keep) if run.reset is None else run.reset
        size = min(self.chunk_size, run.length)
        count = -(-run.length // size)

        heads = (*run.batch_shape, self.heads)

        def chunked(leaf, axis):
            """Chunks, the last padded by steps that are not kept, with their steps at `axis`, after batch and heads."""
            leaf = jnp.flip(leaf, axis=0) if run.reverse else leaf
            leaf = jnp.pad(leaf, [(0, count * size - run.length)] + [(0, 0)] * (leaf.ndim - 1))
            return jnp.moveaxis(leaf.reshape(count, size, *leaf.shape[1:]), 1, axis)

        def whole(leaf, axis):
            leaf = jnp.moveaxis(leaf, axis, 1)
            leaf = leaf.reshape(count * size, *leaf.shape[2:])[: run.length]
            return jnp.flip(leaf, axis=0) if run.reverse else leaf

        q, k, v, o, i, f = self._project(params, xs)
        flags = [jnp.broadcast_to(flag[..., None], (*flag.shape, self.heads)) for flag in (keep, reset)]
        inputs = [chunked(leaf, -2) for leaf in (q, k, v)] + [chunked(leaf, -1) for leaf in (i, f, *flags)]
        step = _chunk
        for _ in heads:
            step = jax.vmap(step)
        step = jax.checkpoint(step, prevent_cse=False)  # a loop needs no barriers
        wide = jax.tree.map(widen, state)
        wide, (value, norm, stabilizer) = scan_from_fresh(lax.scan, step, wide, inputs, count, False)
        ys = self._output(o, whole(value, -2), whole(norm, -1), whole(stabilizer, -1)).astype(xs.dtype)
        return _narrow(wide, xs.dtype), ys if run.keep is None else masks.zero_unless(keep, ys)


def _narrow(state: MLSTMState, dtype: Any) -> MLSTMState:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), state)


def _chunk(state: MLSTMState, chunk: Any) -> tuple[MLSTMState, Any]:
    """All steps of one head at once, each from the steps before it in its segment and from the state before all.

    Step t weighs what step s wrote by exp(D_ts - m_t), D_ts = i_s + log σ(f_{s+1}) + ... + log σ(f_t).
    """
    q, k, v, i, f, keep, reset = chunk
    segment = jnp.cumsum(reset)
    first = segment == 0
    finite = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in state]))
    reads = masks.select(finite & jnp.any(keep & first), state, jax.tree.map(jnp.zeros_like, state))

    i, decay = jnp.where(keep, i, _NEVER), jnp.where(keep, jax.nn.log_sigmoid(f), 0)
    seen = jnp.tril(segment[:, None] == segment[None])
    total = jnp.sum(jnp.where(seen, decay[None], 0), axis=1)  # since the start of the chunk or the segment
    log_weights = jnp.where(seen, total[:, None] - total[None] + i[None], _NEVER)
    kept = total + jnp.where(first, reads.stabilizer, 0)
    stabilizer = jnp.maximum(kept, jnp.max(log_weights, axis=1))
    weights = jnp.where(seen, jnp.exp(log_weights - stabilizer[:, None]), 0)
    carried = jnp.where(first, jnp.exp(kept - stabilizer), 0)

    scores = jnp.where(seen, q @ k.T * weights, 0)
    value = scores @ v + carried[:, None] * (q @ reads.memory.T)
    norm = jnp.sum(scores, axis=1) + carried * (q @ reads.normalizer)
    written = weights[-1][:, None] * k
    memory = carried[-1] * reads.memory + v.T @ written
    normalizer = carried[-1] * reads.normalizer + jnp.sum(written, axis=0)
    after = MLSTMState(memory, normalizer, stabilizer[-1])
    lost = first & ~finite  # 0 * NaN would go past the reset
    shown = ~keep | (~lost & jnp.isfinite(norm) & jnp.isfinite(value).all(axis=1))  # elsewhere the gradient stops
    value, norm = jnp.where(shown[:, None], value, jnp.nan), jnp.where(shown, norm, jnp.nan)
    return masks.select(jnp.any(keep | reset) & ~lost[-1], after, state), (value, norm, stabilizer)
