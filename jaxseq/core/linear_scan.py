"""Linear recurrences: each state is a multiple of the one before it plus something."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Inexact

from jaxseq.core import errors
from jaxseq.core.unroll import scan_from_fresh


@functools.partial(jax.jit, static_argnames=("reverse", "implementation"))
def linear_scan(
    decay: Inexact[Array, "..."],
    drive: Inexact[Array, "time ..."],
    state: Inexact[Array, "..."] | None = None,
    *,
    reset: Bool[Array, "time ..."] | None = None,
    reverse: bool = False,
    implementation: Literal["sequential", "associative"] | None = None,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "time ..."]]:
    """All states of the recurrence h_t = a_t h_{t-1} + b_t, elementwise, over the leading axis, as `scan` has it.

    The gradient is analytic: the tangent is a recurrence of the same decays, and the cotangent one that reads from the
    other end. So both cost O(T) and keep the decays and the states alone. All modes and higher derivatives work.

    Args:
        decay: a, real or complex. It broadcasts against `drive` as NumPy does: `[time, batch, hidden]` for a decay of
            each element, `[time, head, key, 1]` for one of each key beside a drive `[time, head, key, value]`, and
            without the time axis, as `[hidden]`, for one that is the same at all steps (and, here, in all rows). It is
            never broadcast in memory, but for one of each step over the rows of `reset`.
        drive: b `[time, ...]`, of the shape of all states. For `[batch, time, ...]` use `jax.vmap`.
        state: the state before the first step, `drive.shape[1:]`; zeros by default.
        reset: `[time, ...]`, leading axes of the drive: True where the state before the step counts as zero, in the
            order of reading. Unlike a decay of 0 it also stops what is infinite or NaN, the decay of its own step too.
        reverse: h_t = a_t h_{t+1} + b_t, from the last step to the first.
        implementation: "sequential" is a loop over the steps, "associative" a tree of O(log T) levels. None is the
            first on a CPU, where it is faster at every size that was measured (`benchmarks/linear_scan.py`), and the
            second elsewhere. The tree multiplies decays with each other, so where |a| > 1 over long stretches their
            products overflow before any state does: use "sequential" there.

    Returns:
        The state after the last step read, and all states `[time, ...]`, in the dtype that the arguments promote to.

    Raises:
        ValueError, TypeError: if a shape or dtype does not fit, or there is no such implementation.

    >>> last, states = linear_scan(0.5, jnp.ones(4))
    >>> states.tolist()
    [1.0, 1.5, 1.75, 1.875]
    """
    decay, drive = jnp.asarray(decay), jnp.asarray(drive)
    if implementation not in (*_FORMS, None):
        raise ValueError(f'implementation is "sequential", "associative" or None, got {implementation!r}.')
    _check(decay, drive, state, reset)
    dtype = jnp.result_type(decay, drive, *([] if state is None else [state]))
    decay, drive = decay.astype(dtype), drive.astype(dtype)
    state = jnp.zeros(drive.shape[1:], dtype) if state is None else jnp.asarray(state, dtype)
    if not drive.shape[0]:
        return state, drive
    decay = jnp.expand_dims(decay, tuple(range(drive.ndim - decay.ndim)))
    if implementation is None:
        implementation = "sequential" if jax.default_backend() == "cpu" else "associative"
    if reset is not None:
        reset = jnp.expand_dims(reset, tuple(range(jnp.ndim(reset), drive.ndim)))
        if decay.shape[0] == drive.shape[0]:
            decay = _unless(reset, decay)  # NaN there would go back in time, times a cotangent of 0
    return _run(_FORMS[implementation], reverse, decay, state, drive, reset)


def _check(decay: Array, drive: Array, state: Any, reset: Any) -> None:
    for name, array in (("decay", decay), ("drive", drive), ("state", state)):
        if array is not None and not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
            raise TypeError(f"linear_scan needs real or complex numbers, got a {name} {errors.shape_of(array)}.")
    if drive.ndim == 0:
        raise ValueError("linear_scan needs a drive [time, ...], got a number.")
    ranks_fit = decay.ndim <= drive.ndim
    trailing = drive.shape[drive.ndim - decay.ndim :]
    if not ranks_fit or any(size not in (1, whole) for size, whole in zip(decay.shape, trailing, strict=True)):
        raise ValueError(
            f"linear_scan got a decay of shape {decay.shape}, which does not broadcast against a drive [time, ...] of "
            f"shape {drive.shape}: it needs the same sizes or 1, aligned at the last axis."
        )
    if reset is not None and (
        jnp.result_type(reset) != jnp.bool_ or jnp.shape(reset) != drive.shape[: jnp.ndim(reset)] or not jnp.ndim(reset)
    ):
        raise ValueError(
            f"linear_scan needs a boolean reset of leading axes of the drive {drive.shape}, got "
            f"{errors.shape_of(reset)}."
        )
    if state is not None and jnp.shape(state) != drive.shape[1:]:
        raise ValueError(
            f"linear_scan got a state of shape {jnp.shape(state)}; a drive {drive.shape} needs {drive.shape[1:]}."
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _run(
    form: Callable, reverse: bool, decay: Array, state: Array, drive: Array, reset: Array | None
) -> tuple[Array, Array]:
    return form(reverse, decay, state, drive, reset)


@functools.partial(_run.defjvp, symbolic_zeros=True)
def _run_jvp(form: Callable, reverse: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The tangent is the recurrence of the same decays that db + da h' drives, h' the states before."""
    decay, state, drive, reset = primals
    last, states = _run(form, reverse, *primals)
    decay_dot, state_dot, drive_dot, _ = tangents
    driven = _instantiated(drive_dot, drive)
    if not isinstance(decay_dot, SymbolicZero):
        before = jnp.concatenate([states[1:], state[None]] if reverse else [state[None], states[:-1]])
        driven = driven + decay_dot * _unless(reset, before)
    return (last, states), _run(form, reverse, decay, _instantiated(state_dot, state), driven, reset)


def _instantiated(dot: Any, primal: Array) -> Array:
    return jnp.zeros_like(primal) if isinstance(dot, SymbolicZero) else dot


def _unless(reset: Array | None, values: Array) -> Array:
    """The values, zero at resets."""
    return values if reset is None else jnp.where(reset, 0, values)


def _sequential(reverse: bool, decay: Array, state: Array, drive: Array, reset: Array | None) -> tuple[Array, Array]:
    changes = decay.shape[0] == drive.shape[0]  # a decay that is the same at all steps is not read anew

    def step(state, inputs):
        a, b, starts = inputs
        state = _unless(starts, (decay[0] if a is None else a) * state) + b
        return state, state

    inputs = (decay if changes else None, drive, reset)
    return scan_from_fresh(lax.scan, step, state, inputs, drive.shape[0], reverse)


def _associative(reverse: bool, decay: Array, state: Array, drive: Array, reset: Array | None) -> tuple[Array, Array]:
    def combine(first, second):
        (a, b, reset), (next_a, next_b, next_reset) = first, second
        either = None if reset is None else reset | next_reset
        # products over a reset are 0 themselves: they multiply cotangents too
        return _unless(either, a * next_a), next_b + _unless(next_reset, next_a * b), either

    decay = jnp.broadcast_to(decay, (drive.shape[0], *decay.shape[1:]))
    products, states, since = lax.associative_scan(combine, (decay, drive, reset), reverse=reverse)
    states = states + _unless(since, products * state[None])
    return states[0 if reverse else -1], states


_FORMS = {"sequential": _sequential, "associative": _associative}
