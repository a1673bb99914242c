"""Memory capacity and echo states, against what theory says of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.reservoirs import echo_state_conditions, memory_capacity, state_distances

pytestmark = pytest.mark.usefixtures("float64")


class Register(js.Cell):
    """Holds the last inputs: its memory is known exactly."""

    input_size: int
    output_size: int

    def init(self, key):
        return jnp.ones(())

    def initial_state(self, params, batch_shape=()):
        return jnp.zeros((*batch_shape, self.output_size), params.dtype)

    def step(self, params, state, x, key=None):
        return jnp.concatenate([x, state[..., :-1]], axis=-1), state


def numbers(time, rows=()):
    return jax.random.uniform(jax.random.key(1), (*rows, time, 1), minval=-1)


def test_a_register_remembers_as_many_inputs_as_it_holds():
    cell = Register(1, 5)
    for xs in (numbers(4000), numbers(1000, (2, 2))):
        found = memory_capacity(cell, cell.init(jax.random.key(0)), xs, delays=8)
        np.testing.assert_allclose(found[:5], 1, atol=1e-9)
        assert (found[5:] < 0.02).all()


def test_a_linear_reservoir_has_the_capacity_of_its_units_and_tanh_less():
    """Jaeger 2001, propositions 2 and 4; one unit's worth goes to the present input, which is not counted."""
    capacities = {}
    for name in ("identity", "tanh"):
        cell = js.Reservoir(1, 8, activation=name, density=1.0, radius=0.8)
        capacities[name] = float(memory_capacity(cell, cell.init(jax.random.key(0)), numbers(8000), delays=60).sum())
    assert abs(capacities["identity"] - (8 - 1)) < 0.1
    assert capacities["tanh"] < capacities["identity"] - 0.5


def test_a_memory_that_says_nothing_has_no_capacity():
    cell = js.Reservoir(1, 4, input_scale=0.0)
    found = memory_capacity(cell, cell.init(jax.random.key(0)), numbers(100), delays=3, ridge=0.1)
    np.testing.assert_allclose(found, 0, atol=1e-20)


class Pair(NamedTuple):
    hidden: jax.Array
    count: jax.Array


class Counting(js.Cell):
    """A state that also counts."""

    def init(self, key):
        return jnp.full((), 0.5)

    def initial_state(self, params, batch_shape=()):
        return Pair(jnp.zeros((*batch_shape, 2), params.dtype), jnp.zeros(batch_shape, int))

    def step(self, params, state, x, key=None):
        return Pair(params * state.hidden + x, state.count + 1), x


def test_distances_are_those_of_the_states():
    """They halve at each step, where the step halves them."""
    distances = state_distances(Counting(), jnp.full((), 0.5), jnp.ones((3, 7, 2)), jax.random.key(0), starts=5)
    assert distances.shape == (3, 7)
    assert (distances[:, 0] < np.sqrt(2) / 2).all() and (distances[:, 0] > 0.1).all()
    np.testing.assert_allclose(distances[:, 1:], distances[:, :-1] / 2, rtol=1e-12)
    closed = js.Feedback(js.Stack((js.Reservoir(1, 5), js.Dense(5, 1))))
    found = state_distances(closed, closed.init(jax.random.key(0)), None, jax.random.key(0), length=4)
    assert found.shape == (4,)


def test_echo_states_fade_at_a_small_radius_and_not_at_a_large_one():
    xs = np.zeros((200, 1))
    for radius, fades in ((0.5, True), (3.0, False)):
        cell = js.Reservoir(1, 30, radius=radius)
        params = cell.init(jax.random.key(0))
        distances = state_distances(cell, params, xs, jax.random.key(1))
        assert (distances[-1] < 1e-12) == fades
        exponent = js.diagnostics.lyapunov_exponents(cell, params, xs, count=1, discard=100)
        np.testing.assert_allclose(exponent, np.log(radius), rtol=0.1)  # the state stays at the origin
        assert (echo_state_conditions(cell, params).necessary < 1) == fades


def test_conditions_are_those_of_numpy():
    cell = js.Reservoir(1, 12, radius=0.8, leak=0.3, density=0.5)
    params = cell.init(jax.random.key(0))
    kernel = 0.8 * np.asarray(params.recurrent_kernel[:, 0])
    found = echo_state_conditions(cell, params)
    np.testing.assert_allclose(found.sufficient, 0.7 + 0.3 * np.linalg.svd(kernel)[1][0], rtol=1e-9)
    step = 0.7 * np.eye(12) + 0.3 * kernel
    np.testing.assert_allclose(found.necessary, np.abs(np.linalg.eigvals(step)).max(), rtol=1e-7)
    assert found.necessary <= found.sufficient


def test_errors():
    cell = js.Reservoir(1, 4)
    params = cell.init(jax.random.key(0))
    with pytest.raises(ValueError, match="needs delays >= 1, and more than 40 steps .* got 20 delays and 40 steps"):
        memory_capacity(cell, params, numbers(40), delays=20)
    with pytest.raises(ValueError, match="got inputs with 2 features"):
        memory_capacity(cell, params, jnp.ones((40, 2)), delays=2)
    with pytest.raises(TypeError, match="needs a cell that tells its output_size"):
        memory_capacity(Counting(), jnp.ones(()), numbers(40), delays=2)
    with pytest.raises(ValueError, match="starts >= 1, got 0"):
        state_distances(cell, params, numbers(4), jax.random.key(0), starts=0)
    with pytest.raises(TypeError, match=r"a cell whose state holds floating numbers, got Dense\("):
        state_distances(js.Dense(1, 2), js.Dense(1, 2).init(jax.random.key(0)), numbers(4), jax.random.key(0))
    with pytest.raises(ValueError, match="params of another layer"):
        echo_state_conditions(js.Reservoir(1, 5), params)
