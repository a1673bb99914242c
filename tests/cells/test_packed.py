"""Documents packed into one row do not touch each other, whatever they hold: NaN, infinity, numbers that overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests import zoo
from tests.test_laws import QUICK, ROWS, TIME, assert_same, at, is_real, with_gradients

pytestmark = pytest.mark.usefixtures("float64")

FIRST = 2  # steps of the first document; what spoils it is at its second
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


@pytest.mark.parametrize("name", PARALLEL)
def test_what_spoils_a_document_stays_in_it(name):
    layer = zoo.ZOO[name].layer
    params, xs = given(layer, zoo.ZOO[name].memory)
    start = layer.initial_state(params, (ROWS,))
    reset = jnp.zeros((ROWS, TIME), bool).at[:, FIRST].set(True)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(xs, state):
        def second(params, xs, state):
            state, ys = layer.unroll(params, xs, state, reset=reset)
            return state, at(ys, np.s_[:, FIRST:])

        out = with_gradients(second, params, xs, state)
        ways = [way.unroll(params, xs, state, reset=reset)[1] for way in (layer, js.Plain(layer))]
        return (out["state"], out["ys"], at(out["xs"], np.s_[:, FIRST:])), ways

    expected, _ = run(xs, start)
    for junk in (jnp.nan, jnp.inf, 1e150, 1e300):
        found, ways = run(jax.tree.map(lambda leaf, junk=junk: leaf.at[:, FIRST - 1].set(junk), xs), start)
        assert_same(found, expected)
        if not np.isfinite(junk):
            np.testing.assert_array_equal(*(np.isfinite(ys) for ys in ways))
    lost = jax.tree.map(lambda leaf: leaf * jnp.nan if is_real(leaf) else leaf, start)
    assert_same(run(xs, lost)[0], expected)
