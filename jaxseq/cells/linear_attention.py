"""Linear attention with gates: memories of keys and values, read step by step or by chunks of steps."""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.chunkwise import Terms, chunkwise
from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell
from jaxseq.core.precision import widen
from jaxseq.core.unroll import Run

_glorot = initializers.glorot_uniform(in_axis=0, out_axis=-1, batch_axis=1)
_glorot_matrix = initializers.glorot_uniform()


class LinearAttentionState(NamedTuple):
    """The memory of each head, as a matrix from keys to values."""

    memory: Float[Array, "*batch head key value"]


class LinearAttention(Cell):
    """A cell of `heads` memories S `[key, value]`, written by outer products, that decay as the input says.

        S' = diag(α) S + k uᵀ,   o = S'ᵀ q,   y = (gate * norm(o)) W_o

    u is the value v or, with the delta rule, β (v - (diag(α) S)ᵀ k). A subclass gives `init`, `axes`, `terms` and
    `gate`. `unroll` takes chunks of `chunk_size` steps, within which all is matrix products; decays stay logarithms
    relative to a step of the chunk, none of them above 0. Numbers are computed in float32 at least.

    The gradient of `unroll` saves arrays `[time, head, key]` and `[time, head, value]` and the memories at the starts
    of the chunks, `[time / chunk_size, head, key, value]`; products within a chunk are computed again.
    """

    keeps_size: ClassVar[bool] = True
    centred: ClassVar[bool]  # whether the norm subtracts the mean

    input_size: int
    key_size: int
    value_size: int
    _: dataclasses.KW_ONLY
    heads: int = 1
    chunk_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"{type(self).__name__} needs heads >= 1, got {self.heads}.")

    @property
    def output_size(self) -> int:
        return self.input_size

    @abc.abstractmethod
    def terms(self, params: Any, x: Array) -> Terms:
        """The terms of inputs `[*leading, features]`, of one step or of any number at once, widened."""

    @abc.abstractmethod
    def gate(self, params: Any, x: Array) -> Float[Array, "*leading head value"]:
        """What scales the normalised readings, widened."""

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> LinearAttentionState:
        errors.check_params(self, params)
        shape = (*batch_shape, self.heads, self.key_size, self.value_size)
        return LinearAttentionState(jnp.zeros(shape, params.output_kernel.dtype))

    def output(self, params: Any, reading: Float[Array, "*leading head value"], x: Array) -> Array:
        """The output, from what was read and the input."""
        if self.centred:
            reading = reading - jnp.mean(reading, axis=-1, keepdims=True)
        reading = reading * lax.rsqrt(jnp.mean(reading**2, axis=-1, keepdims=True) + 1e-5)
        reading = reading * jnp.broadcast_to(widen(params.norm_scale), reading.shape) * self.gate(params, x)
        flat = reading.reshape(*reading.shape[:-2], self.heads * self.value_size)
        return flat.astype(params.output_kernel.dtype) @ params.output_kernel

    def step(self, params: Any, state: Any, x: Float[Array, "*batch input"], key: Array | None = None) -> Any:
        errors.check_params(self, params)
        errors.check_features(self, x, self.input_size)
        errors.check_dtype(self, x, params.output_kernel.dtype)
        errors.check_state(self, state, jax.eval_shape(lambda p: self.initial_state(p, x.shape[:-1]), params))
        query, key, value, log_decay, strength = self.terms(params, x)
        memory = jnp.exp(log_decay)[..., None] * widen(state.memory)
        if strength is not None:
            value = strength * (value - _times(key, memory))
        memory = memory + key[..., None] * value[..., None, :]
        y = self.output(params, _times(query, memory), x)
        return LinearAttentionState(memory.astype(state.memory.dtype)), y

    def _unroll(self, params: Any, xs: Array, state: Any, run: Run) -> Any:
        if not run.length:
            return super()._unroll(params, xs, state, run)
        return masks.contain(lambda xs, state: self._by_chunks(params, xs, state, run), params, xs, state, run)

    def _by_chunks(self, params: Any, xs: Array, state: Any, run: Run) -> Any:
        terms, reset = self.terms(params, xs), run.reset
        if run.keep is not None:  # nothing decays, is written or is read
            terms = masks.zero_unless(run.keep, terms)
        if run.reverse:
            terms, reset = jax.tree.map(functools.partial(jnp.flip, axis=0), (terms, reset))
        memory, readings = chunkwise(terms, widen(state.memory), reset, min(self.chunk_size, run.length))
        if run.reverse:
            readings = jnp.flip(readings, axis=0)
        if run.keep is not None:
            readings = masks.zero_unless(run.keep, readings)
        ys = self.output(params, readings, xs)
        state = LinearAttentionState(memory.astype(state.memory.dtype))
        return state, ys if run.keep is None else masks.zero_unless(run.keep, ys)


def _times(row: Array, matrix: Array) -> Array:
    """Rows `[..., key]` times matrices `[..., key, value]`."""
    return (row[..., None, :] @ matrix)[..., 0, :]


class GatedLinearAttentionParams(NamedTuple):
    """The parameters of gated linear attention."""

    query_kernel: Float[Array, "input head key"]
    key_kernel: Float[Array, "input head key"]
    value_kernel: Float[Array, "input head value"]
    decay_down: Float[Array, "input rank"]
    decay_up: Float[Array, "rank head key"]
    decay_bias: Float[Array, "head key"]
    gate_kernel: Float[Array, "input head value"]
    gate_bias: Float[Array, "head value"]
    norm_scale: Float[Array, "head value"]
    output_kernel: Float[Array, "values output"]


class GatedLinearAttention(LinearAttention):
    """Gated linear attention: each key of the memory decays as the input says.

        q, k, v = x W_q / √d, x W_k, x W_v;   α = σ(x W₁ W₂ + b)^(1 / τ),   for each head
        S' = diag(α) S + k vᵀ,   o = S'ᵀ q
        y = (silu(x W_r + b_r) * LayerNorm(o)) W_o

    Sizes of keys and values are those of one head; the paper has `heads` 4, keys of half the width of the model in
    all, and values of the whole. `rank` is that of W₁ W₂, `temperature` is τ.

    S. Yang et al., Gated linear attention transformers with hardware-efficient training, ICML 2024.

    >>> cell = GatedLinearAttention(input_size=4, key_size=2, value_size=3, heads=2)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 4)))
    >>> state.memory.shape, ys.shape
    ((2, 2, 3), (5, 4))
    """

    centred: ClassVar[bool] = True

    _: dataclasses.KW_ONLY
    rank: int = 16
    temperature: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.temperature > 0:
            raise ValueError(
                f"GatedLinearAttention needs rank >= 1 and temperature > 0, got {self.rank} and {self.temperature}."
            )

    def init(self, key: Array) -> GatedLinearAttentionParams:
        errors.check_key(self, key)
        keys = jax.random.split(key, 7)
        to_keys, to_values = (self.heads, self.key_size), (self.heads, self.value_size)
        return GatedLinearAttentionParams(
            query_kernel=_glorot(keys[0], (self.input_size, *to_keys)),
            key_kernel=_glorot(keys[1], (self.input_size, *to_keys)),
            value_kernel=_glorot(keys[2], (self.input_size, *to_values)),
            decay_down=_glorot_matrix(keys[3], (self.input_size, self.rank)),
            decay_up=_glorot(keys[4], (self.rank, *to_keys)),
            decay_bias=jnp.zeros(to_keys),
            gate_kernel=_glorot(keys[5], (self.input_size, *to_values)),
            gate_bias=jnp.zeros(to_values),
            norm_scale=jnp.ones(to_values),
            output_kernel=_glorot_matrix(keys[6], (self.heads * self.value_size, self.input_size)),
        )

    def axes(self) -> Any:
        to_keys, to_values = PartitionSpec("input", "head", "key"), PartitionSpec("input", "head", "value")
        keys, values = PartitionSpec("head", "key"), PartitionSpec("head", "value")
        decay = (PartitionSpec("input", "hidden"), to_keys, keys)
        last = PartitionSpec("input", "output")
        return GatedLinearAttentionParams._make((to_keys, to_keys, to_values, *decay, to_values, values, values, last))

    def terms(self, params: GatedLinearAttentionParams, x: Array) -> Terms:
        query, key, value = (widen(jnp.tensordot(x, kernel, 1)) for kernel in params[:3])
        logits = widen(jnp.tensordot(x @ params.decay_down, params.decay_up, 1))
        logits = logits + jnp.broadcast_to(widen(params.decay_bias), logits.shape)
        log_decay = jax.nn.log_sigmoid(logits) / self.temperature
        return Terms(query / math.sqrt(self.key_size), key, value, log_decay, None)

    def gate(self, params: GatedLinearAttentionParams, x: Array) -> Array:
        logits = widen(jnp.tensordot(x, params.gate_kernel, 1))
        return jax.nn.silu(logits + jnp.broadcast_to(widen(params.gate_bias), logits.shape))


class GatedDeltaNetParams(NamedTuple):
    """The parameters of a gated delta network: kernels of q, k, v, the gates α and β, and of the output."""

    query_kernel: Float[Array, "input head key"]
    key_kernel: Float[Array, "input head key"]
    value_kernel: Float[Array, "input head value"]
    step_kernel: Float[Array, "input head"]
    step_bias: Float[Array, "head"]
    log_rate: Float[Array, "head"]
    strength_kernel: Float[Array, "input head"]
    gate_kernel: Float[Array, "input head value"]
    norm_scale: Float[Array, "head value"]
    output_kernel: Float[Array, "values output"]


class GatedDeltaNet(LinearAttention):
    """Gated delta network: a key's old value is replaced, and each head's whole memory decays.

        q, k = unit(silu(x W_q)) / √d, unit(silu(x W_k));   v = silu(x W_v),   for each head
        α = exp(-exp(a) softplus(x w_α + b)),   β = σ(x w_β)
        S' = α (I - β k kᵀ) S + β k vᵀ,   o = S'ᵀ q
        y = (silu(x W_r) * RMSNorm(o)) W_o

    Sizes of keys and values are those of one head. `log_rate` is a. The paper's block also has a short causal
    convolution of q, k and v, which is not part of this cell. The decays start as those of Mamba-2.

    S. Yang, J. Kautz and A. Hatamizadeh, Gated delta networks: improving Mamba2 with delta rule, ICLR 2025.

    >>> cell = GatedDeltaNet(input_size=4, key_size=2, value_size=3, heads=2)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 4)))
    >>> state.memory.shape, ys.shape
    ((2, 2, 3), (5, 4))
    """

    centred: ClassVar[bool] = False

    def init(self, key: Array) -> GatedDeltaNetParams:
        errors.check_key(self, key)
        keys = jax.random.split(key, 9)
        to_keys, to_values = (self.heads, self.key_size), (self.heads, self.value_size)
        steps = jnp.exp(jax.random.uniform(keys[4], (self.heads,), minval=math.log(0.001), maxval=math.log(0.1)))
        return GatedDeltaNetParams(
            query_kernel=_glorot(keys[0], (self.input_size, *to_keys)),
            key_kernel=_glorot(keys[1], (self.input_size, *to_keys)),
            value_kernel=_glorot(keys[2], (self.input_size, *to_values)),
            step_kernel=_glorot_matrix(keys[3], (self.input_size, self.heads)),
            step_bias=steps + jnp.log(-jnp.expm1(-steps)),  # whose softplus they are
            log_rate=jnp.log(jax.random.uniform(keys[5], (self.heads,), minval=1.0, maxval=16.0)),
            strength_kernel=_glorot_matrix(keys[6], (self.input_size, self.heads)),
            gate_kernel=_glorot(keys[7], (self.input_size, *to_values)),
            norm_scale=jnp.ones(to_values),
            output_kernel=_glorot_matrix(keys[8], (self.heads * self.value_size, self.input_size)),
        )

    def axes(self) -> Any:
        to_keys, to_values = PartitionSpec("input", "head", "key"), PartitionSpec("input", "head", "value")
        to_heads, heads = PartitionSpec("input", "head"), PartitionSpec("head")
        rest = (to_heads, heads, heads, to_heads, to_values, PartitionSpec("head", "value"))
        return GatedDeltaNetParams._make((to_keys, to_keys, to_values, *rest, PartitionSpec("input", "output")))

    def terms(self, params: GatedDeltaNetParams, x: Array) -> Terms:
        query, key, value = (jax.nn.silu(widen(jnp.tensordot(x, kernel, 1))) for kernel in params[:3])
        step = widen(x @ params.step_kernel)
        step = jax.nn.softplus(step + jnp.broadcast_to(widen(params.step_bias), step.shape))
        log_decay = -jnp.broadcast_to(jnp.exp(widen(params.log_rate)), step.shape) * step
        strength = jax.nn.sigmoid(widen(x @ params.strength_kernel))
        query = _unit(query) / math.sqrt(self.key_size)
        return Terms(query, _unit(key), value, log_decay[..., None], strength[..., None])

    def gate(self, params: GatedDeltaNetParams, x: Array) -> Array:
        return jax.nn.silu(widen(jnp.tensordot(x, params.gate_kernel, 1)))


def _unit(x: Array) -> Array:
    """`x` of length 1, and 0 for 0, with a finite gradient there."""
    return x * lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
