"""Linear state-space models with a complex diagonal: LRU and S5."""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Complex, Float

from jaxseq.cells.linear import LinearRecurrence
from jaxseq.core import errors
from jaxseq.core.precision import widen


class DiagonalState(NamedTuple):
    """A complex state."""

    real: Float[Array, "*batch hidden"]
    imag: Float[Array, "*batch hidden"]


class Diagonal(LinearRecurrence):
    """A recurrence h' = λ h + B x, y = Re(C h') + D x of complex numbers, as many outputs as inputs.

    Complex kernels are real ones with an axis for the two parts. A subclass gives `init`, `axes`, `state_size` and
    `discretize`. Complex numbers are computed with in float32 at least.
    """

    keeps_size: ClassVar[bool] = True

    @property
    def output_size(self) -> int:
        return self.input_size

    @property
    @abc.abstractmethod
    def state_size(self) -> int:
        """The number of complex units."""

    @abc.abstractmethod
    def discretize(self, params: Any) -> tuple[Complex[Array, "hidden"], Array]:
        """The decay λ, and the factor that B x is scaled by."""

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> DiagonalState:
        zeros = self.zeros(params, batch_shape, self.state_size)
        return DiagonalState(zeros, zeros)

    def pack(self, state: DiagonalState) -> Complex[Array, "*batch hidden"]:
        return lax.complex(widen(state.real), widen(state.imag))

    def unpack(self, hidden: Complex[Array, "*batch hidden"], dtype: Any) -> DiagonalState:
        return DiagonalState(hidden.real.astype(dtype), hidden.imag.astype(dtype))

    def coefficients(self, params: Any, x: Array) -> tuple[Array, Array]:
        decay, scale = self.discretize(params)
        real, imag = jnp.moveaxis(widen(jnp.tensordot(x, params.input_kernel, 1)), -2, 0)
        return decay, jnp.broadcast_to(scale.astype(decay.dtype), real.shape) * lax.complex(real, imag)

    def read(self, params: Any, hidden: Array, x: Array) -> Array:
        state = self.unpack(hidden, params.output_kernel.dtype)
        y = state.real @ params.output_kernel[:, 0] - state.imag @ params.output_kernel[:, 1]
        return y + jnp.broadcast_to(params.skip, x.shape) * x


class LRUParams(NamedTuple):
    """The parameters of a linear recurrent unit: ν and θ in logarithms, B, log γ, C and D."""

    log_decay: Float[Array, "hidden"]
    log_phase: Float[Array, "hidden"]
    log_scale: Float[Array, "hidden"]
    input_kernel: Float[Array, "input 2 hidden"]
    output_kernel: Float[Array, "hidden 2 output"]
    skip: Float[Array, "output"]


class LRU(Diagonal):
    """Linear recurrent unit: a complex diagonal on a ring inside the unit circle.

        λ = exp(-exp(ν) + i exp(θ))
        h' = λ h + γ (x B),   y = Re(h' C) + D x

    |λ| < 1 always. λ starts uniform on the ring r_min <= |λ| <= r_max with phases in [0, max_phase], and γ at
    √(1 - |λ|²). A layer of it has `hidden_size` complex units and as many outputs as inputs; a pointwise layer follows.

    A. Orvieto et al., Resurrecting recurrent neural networks for long sequences, ICML 2023.

    >>> cell = LRU(input_size=2, hidden_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> state.real.shape, ys.shape
    ((3,), (5, 2))
    """

    hidden_size: int
    _: dataclasses.KW_ONLY
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"LRU needs 0 <= r_min < r_max <= 1, got r_min={self.r_min} and r_max={self.r_max}.")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"LRU needs 0 < max_phase <= 2π, got {self.max_phase}.")

    @property
    def state_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array) -> LRUParams:
        errors.check_key(self, key)
        ring, phase, inputs, outputs, skip = jax.random.split(key, 5)
        size = (self.hidden_size,)
        tiny = jnp.finfo(jnp.zeros(()).dtype).eps
        square = jax.random.uniform(ring, size, minval=max(self.r_min**2, tiny), maxval=min(self.r_max**2, 1 - tiny))
        return LRUParams(
            log_decay=jnp.log(-jnp.log(square) / 2),
            log_phase=jnp.log(self.max_phase * jax.random.uniform(phase, size, minval=tiny)),
            log_scale=jnp.log1p(-square) / 2,
            input_kernel=jax.random.normal(inputs, (self.input_size, 2, *size)) / math.sqrt(2 * self.input_size),
            output_kernel=jax.random.normal(outputs, (*size, 2, self.input_size)) / math.sqrt(self.hidden_size),
            skip=jax.random.normal(skip, (self.input_size,)),
        )

    def axes(self) -> Any:
        unit = PartitionSpec("hidden")
        return LRUParams._make((unit, unit, unit, *DIAGONAL_AXES))

    def discretize(self, params: Any) -> tuple[Array, Array]:
        log_decay, log_phase, log_scale = map(widen, params[:3])
        return jnp.exp(lax.complex(-jnp.exp(log_decay), jnp.exp(log_phase))), jnp.exp(log_scale)


DIAGONAL_AXES: Any = (
    PartitionSpec("input", "part", "hidden"),
    PartitionSpec("input", "part", "output"),
    PartitionSpec("output"),
)


class S5Params(NamedTuple):
    """The parameters of S5: -Re Λ in logarithms, Im Λ, log Δ, B, C and D."""

    log_decay: Float[Array, "hidden"]
    frequency: Float[Array, "hidden"]
    log_step: Float[Array, "hidden"]
    input_kernel: Float[Array, "input 2 hidden"]
    output_kernel: Float[Array, "hidden 2 output"]
    skip: Float[Array, "output"]


class S5(Diagonal):
    """S5: a continuous state-space model, diagonalised, and discretised with a learned step.

        dh/dt = Λ h + x B,   y = 2 Re(h C) + D x;   held over a step Δ of each unit, Λ̄ = exp(Λ Δ):
        h' = Λ̄ h + Λ⁻¹ (Λ̄ - 1) (x B)

    The `hidden_size` units are conjugate pairs, of which one each is computed: the state holds half as many. Re Λ < 0
    always. It starts as a real system with the normal part of HiPPO-LegS (in `blocks` equal blocks) as its matrix and
    Δ log-uniform in [min_step, max_step]. As many outputs as inputs; a pointwise layer follows.

    J. T. H. Smith, A. Warrington and S. W. Linderman, Simplified state space layers for sequence modeling, ICLR 2023.

    >>> cell = S5(input_size=2, hidden_size=6)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> state.real.shape, ys.shape
    ((3,), (5, 2))
    """

    hidden_size: int
    _: dataclasses.KW_ONLY
    blocks: int = 1
    min_step: float = 0.001
    max_step: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1 or self.hidden_size % (2 * self.blocks):
            raise ValueError(
                f"S5 needs an even number of units in each block, got hidden_size={self.hidden_size} and "
                f"blocks={self.blocks}."
            )
        if not 0 < self.min_step <= self.max_step:
            raise ValueError(f"S5 needs 0 < min_step <= max_step, got {self.min_step} and {self.max_step}.")

    @property
    def state_size(self) -> int:
        return self.hidden_size // 2

    def init(self, key: Array) -> S5Params:
        errors.check_key(self, key)
        inputs, outputs, steps, skip = jax.random.split(key, 4)
        frequencies, vectors = _hippo(self.hidden_size // self.blocks)
        dtype = jnp.zeros(()).dtype
        basis = np.kron(np.eye(self.blocks), vectors)  # of the kept half of the units
        real, imag = jnp.asarray(np.real(basis), dtype), jnp.asarray(np.imag(basis), dtype)
        kernel = jax.random.normal(inputs, (self.input_size, self.hidden_size)) / math.sqrt(self.input_size)
        readout = jax.random.normal(outputs, (self.hidden_size, self.input_size)) / math.sqrt(self.hidden_size)
        log_range = math.log(self.min_step), math.log(self.max_step)
        return S5Params(
            log_decay=jnp.full(self.state_size, math.log(0.5)),
            frequency=jnp.asarray(np.tile(frequencies, self.blocks), dtype),
            log_step=jax.random.uniform(steps, (self.state_size,), minval=log_range[0], maxval=log_range[1]),
            input_kernel=jnp.stack([kernel @ real, -kernel @ imag], axis=1),
            output_kernel=jnp.stack([real.T @ readout, imag.T @ readout], axis=1),
            skip=jax.random.normal(skip, (self.input_size,)),
        )

    def axes(self) -> Any:
        unit = PartitionSpec("hidden")
        return S5Params._make((unit, unit, unit, *DIAGONAL_AXES))

    def discretize(self, params: Any) -> tuple[Array, Array]:
        log_decay, frequency, log_step = map(widen, params[:3])
        rate, step = lax.complex(-jnp.exp(log_decay), frequency), jnp.exp(log_step)
        exponent = rate * step.astype(rate.dtype)
        return jnp.exp(exponent), jnp.expm1(exponent) / rate

    def read(self, params: Any, hidden: Array, x: Array) -> Array:
        return super().read(params, 2 * hidden, x)  # the conjugates read as much


@functools.lru_cache(maxsize=64)
def _hippo(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the normal part of the HiPPO-LegS matrix, -1/2 + a skew matrix: its positive frequencies and their vectors."""
    root = np.sqrt(np.arange(size) + 0.5)
    skew = np.triu(np.outer(root, root), 1) - np.tril(np.outer(root, root), -1)
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    return frequencies[size // 2 :], vectors[:, size // 2 :]
