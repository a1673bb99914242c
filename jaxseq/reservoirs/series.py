"""Two series on which reservoirs are compared."""

import math
import operator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.core import errors, sharding


def mackey_glass(
    length: int,
    *,
    delay: float = 17.0,
    start: float | Float[Array, ""] = 1.2,
    discard: int = 1000,
    resolution: int = 10,
) -> Float[Array, "time 1"]:
    """The Mackey-Glass series, a chaotic delay equation, sampled once per unit of time.

        dx/dt = 0.2 x(t - delay) / (1 + x(t - delay)^10) - 0.1 x(t)

    From a constant past, `start`, and without the first `discard` samples. It is integrated by a Runge-Kutta method of
    order 4 with `resolution` steps per unit. Between them the past is interpolated by cubics through the values and
    slopes at the ends of a step, so that the kink at 0 costs no accuracy. The series is chaotic: rounding grows, so
    other dtypes and devices give other numbers in the long run. `vmap` over `start` gives several.

    M. C. Mackey and L. Glass, Oscillation and chaos in physiological control systems, Science 197, 1977.

    Raises:
        ValueError: if `length` or `discard` is negative, `start` is no single number, or the delay is no whole number
            of at least two steps.

    >>> mackey_glass(5).shape
    (5, 1)
    """
    length, discard, resolution = (operator.index(number) for number in (length, discard, resolution))
    if length < 0 or discard < 0 or resolution < 1:
        raise ValueError(
            f"mackey_glass needs length >= 0, discard >= 0 and resolution >= 1, got {length}, {discard}, {resolution}."
        )
    past = round(delay * resolution) if math.isfinite(delay) else 0
    if past < 2 or abs(past - delay * resolution) > 1e-6:
        raise ValueError(f"mackey_glass needs a delay of two or more steps of 1/{resolution}, got {delay}.")
    start = jnp.asarray(start, float)
    if start.ndim:
        raise ValueError(f"mackey_glass needs one number as start, got {errors.shape_of(start)}: vmap gives several.")
    size = 1 / resolution

    def slope(now, delayed):
        return 0.2 * delayed / (1 + delayed**10) - 0.1 * now

    def step(history, _):  # points from now - delay to now, and what lies between each two
        points, middles = history
        delayed, middle, after, now = points[0], middles[0], points[1], points[-1]
        k1 = slope(now, delayed)
        k2 = slope(now + size / 2 * k1, middle)
        k3 = slope(now + size / 2 * k2, middle)
        k4 = slope(now + size * k3, after)
        new = now + size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        between = (now + new) / 2 + size / 8 * (k1 - slope(new, after))
        return (jnp.append(points[1:], new), jnp.append(middles[1:], between)), None

    def sample(history, _):
        return jax.lax.scan(step, history, length=resolution)[0], history[0][-1]

    history = (jnp.full(past + 1, start), jnp.full(past, start))
    _, series = jax.lax.scan(sample, history, length=discard + length)
    return series[discard:, None]


def narma(xs: Float[Array, "*batch time 1"], order: int = 10) -> Float[Array, "*batch time 1"]:
    """The nonlinear moving average of inputs, which are usually drawn from U(0, 0.5).

        y' = 0.3 y + 0.05 y (the sum of the last `order` y) + 1.5 x_(t - order + 1) x_t + 0.1

    The output of step t is what follows on x_t; before the first step all are 0.

    A. F. Atiya and A. G. Parlos, New results on recurrent network training, IEEE Transactions on Neural Networks 11,
    2000.

    Raises:
        ValueError: if the inputs are no single feature, or `order` is below 1.
        TypeError: if the inputs are no floating numbers.

    >>> ys = narma(jnp.zeros((2, 1)))[:, 0]
    >>> bool(jnp.allclose(ys, jnp.array([0.1, 0.3 * 0.1 + 0.05 * 0.1 * 0.1 + 0.1])))
    True
    """
    xs, order = jnp.asarray(xs), operator.index(order)
    if xs.ndim < 2 or xs.shape[-1] != 1:
        raise ValueError(f"narma needs inputs [*batch, time, 1], got {xs.shape}.")
    if not jnp.issubdtype(xs.dtype, jnp.floating):
        raise TypeError(f"narma needs floating inputs, got {errors.shape_of(xs)}: cast them with .astype(float).")
    if order < 1:
        raise ValueError(f"narma needs order >= 1, got {order}.")

    def step(histories, x):  # of inputs and outputs, the newest at the end
        inputs, outputs = histories
        inputs = jnp.concatenate([inputs[1:], x[None]])
        y = outputs[-1]
        y = 0.3 * y + 0.05 * y * outputs.sum(axis=0) + 1.5 * inputs[0] * inputs[-1] + 0.1
        return (inputs, jnp.concatenate([outputs[1:], y[None]])), y

    whole = sharding.placed(xs, PartitionSpec(*sharding.leading_spec(xs, xs.ndim - 2), None, None))
    past = jnp.stack([jnp.zeros_like(whole.sum(axis=-2))] * order)
    _, ys = jax.lax.scan(step, (past, past), jnp.moveaxis(whole, -2, 0))
    return jnp.moveaxis(ys, 0, -2)
