"""Documents packed into one row do not touch each other, whatever they hold: NaN, infinity, numbers that overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.cells.linear import LinearRecurrence
from tests import zoo
from tests.test_laws import ROWS, TIME, assert_same, at, is_real, with_gradients

pytestmark = pytest.mark.usefixtures("float64")

STARTS = (2, 4)  # of the second and third document
SPOILED = 3  # the last step of the second
PARALLEL = [  # what computes many steps at once: the others go step by step
    name
    for name, line in zoo.ZOO.items()
    if isinstance(line.layer, js.Cell)
    and line.layer.input_rank
    and type(line.layer)._unroll.__module__.startswith("jaxseq.cells")
]


def given(layer, memory):
    keys = jax.random.split(jax.random.key(1))
    params = jax.jit(layer.init)(keys[0])
    if memory is not None:
        params = layer.attach(params, jax.random.normal(keys[1], (memory,)))
    return params, jax.tree.map(jnp.asarray, zoo.inputs(layer, np.random.default_rng(2), (ROWS, TIME)))


OVERFLOWS = ["gated_linear_attention"]  # products within a chunk, so that the gradient before a huge number is lost
LINEAR = [name for name in PARALLEL if isinstance(zoo.ZOO[name].layer, LinearRecurrence)]


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "cpu") for name in PARALLEL), *((name, "gpu") for name in LINEAR)]
)
def test_what_spoils_a_document_stays_in_it(name, backend, monkeypatch):
    """Three documents: what spoils the second reaches neither the first nor the third."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # chooses the form of `linear_scan`
    jax.clear_caches()
    layer = zoo.ZOO[name].layer
    params, xs = given(layer, zoo.ZOO[name].memory)
    start = layer.initial_state(params, (ROWS,))
    reset = jnp.zeros((ROWS, TIME), bool).at[:, np.array(STARTS)].set(True)
    others = np.r_[: STARTS[0], STARTS[1] : TIME]

    @jax.jit
    def run(xs, state):
        def others_alone(params, xs, state):
            state, ys = layer.unroll(params, xs, state, reset=reset)
            return state, at(ys, np.s_[:, others])

        out = with_gradients(others_alone, params, xs, state)
        ways = [way.unroll(params, xs, state, reset=reset)[1] for way in (layer, js.Plain(layer))]
        return (out["state"], out["ys"], at(out["xs"], np.s_[:, others])), ways

    expected, _ = run(xs, start)
    for junk in (jnp.nan, jnp.inf, 1e150, 1e300):
        found, ways = run(jax.tree.map(lambda leaf, junk=junk: leaf.at[:, SPOILED].set(junk), xs), start)
        compared = np.s_[:, STARTS[0] if np.isfinite(junk) and name in OVERFLOWS else 0 :]
        assert_same(*((*out[:2], at(out[2], compared)) for out in (found, expected)))
        if not np.isfinite(junk):
            np.testing.assert_array_equal(*(np.isfinite(ys) for ys in ways))


@pytest.mark.parametrize("name", PARALLEL)
def test_a_state_that_is_lost_ends_at_a_reset(name):
    layer = zoo.ZOO[name].layer
    params, xs = given(layer, zoo.ZOO[name].memory)
    start = layer.initial_state(params, (ROWS,))
    reset = jnp.zeros((ROWS, TIME), bool).at[:, STARTS[0]].set(True)

    @jax.jit
    def run(state):
        def later(params, xs, state):
            state, ys = layer.unroll(params, xs, state, reset=reset)
            return state, at(ys, np.s_[:, STARTS[0] :])

        out = with_gradients(later, params, xs, state)
        return out["state"], out["ys"], at(out["xs"], np.s_[:, STARTS[0] :])

    assert_same(run(jax.tree.map(lambda leaf: leaf * jnp.nan if is_real(leaf) else leaf, start)), run(start))


@pytest.mark.parametrize("name", ["gated_linear_attention", "gated_delta_net", "mlstm", "transformer"])
def test_what_loses_the_loss_loses_the_gradient(name):
    """NaN in a loss is found in the gradients, and a loss without the lost document has finite ones."""
    layer = zoo.ZOO[name].layer
    params, xs = given(layer, zoo.ZOO[name].memory)
    xs = xs.at[:, SPOILED].set(jnp.nan)
    reset = jnp.zeros((ROWS, TIME), bool).at[:, np.array(STARTS)].set(True)

    @jax.jit
    def gradients(weights, params, xs):
        def loss(params, xs):
            ys = layer.unroll(params, xs, reset=reset)[1]
            return jnp.where(weights[:, None] > 0, ys, 0).sum(where=weights[:, None] > 0)

        return jax.value_and_grad(loss, (0, 1))(params, xs)

    others = np.array([1, 1, 0, 0, 1, 1])
    value, (of_params, of_xs) = gradients(np.ones(TIME), params, xs)
    assert np.isnan(value)
    assert not any(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))
    clean, (clean_params, clean_xs) = gradients(others, params, xs)
    assert np.isfinite(clean) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((clean_params, clean_xs)))
    np.testing.assert_allclose(of_xs[:, others > 0], clean_xs[:, others > 0], rtol=1e-12)
    assert not np.isfinite(of_xs[:, SPOILED]).any() or name == "transformer"
