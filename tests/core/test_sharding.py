"""A model on two devices gives what it gives on one: values and gradients, however it is told to be sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxseq as js

LAYERS = (js.Embed(5, 3), js.LSTM(3, 4), js.Remat(js.GRU(4, 4), every=2), js.ProjectedLSTM(4, 6, 4), js.Dense(4, 5))
CELL = js.Stack(LAYERS)
TOKENS = jax.random.randint(jax.random.key(1), (4, 6), 0, 5)
MASK = js.length_mask(jnp.array([6, 2, 0, 5]), 6)
RESET = jnp.zeros((4, 6), bool).at[0, 3].set(True)


def loss(params, tokens, mask, reset):
    state, logits = CELL.unroll(params, tokens, mask=mask, reset=reset)
    return jnp.sum(logits**2) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state))


@functools.cache
def on_one_device():
    params = CELL.init(jax.random.key(0))
    return params, jax.jit(jax.value_and_grad(loss))(params, TOKENS, MASK, RESET)


def assert_close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(e).max())))


def shard(mesh, params, rules):
    """The params with the axes that `rules` names over the mesh."""

    def put(axes, leaf):
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*(rules.get(name) for name in axes))))

    return jax.tree.map(put, CELL.axes(), params, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


@pytest.mark.parametrize("rules", [{}, {"hidden": "devices"}], ids=["data", "hidden"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays(kind, rules):
    params, expected = on_one_device()
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(kind,))
    rows = NamedSharding(mesh, PartitionSpec(None if rules else "devices"))
    with jax.set_mesh(mesh):
        given = jax.device_put((TOKENS, MASK, RESET), rows)
        assert_close(jax.jit(jax.value_and_grad(loss))(shard(mesh, params, rules), *given), expected)


def test_shard_map():
    params, expected = on_one_device()
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))

    def local(params, *given):
        value, gradients = jax.value_and_grad(loss)(params, *given)  # of the replicated params: summed over devices
        return jax.lax.psum(value, "devices"), gradients

    rows = PartitionSpec("devices")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), rows, rows, rows), out_specs=(PartitionSpec(), PartitionSpec())
    )
    assert_close(jax.jit(mapped)(params, TOKENS, MASK, RESET), expected)


PROMPTS = {
    "prompt": {"prompt": TOKENS},
    "lengths": {"prompt": TOKENS, "mask": MASK},
    "start": {"prompt": TOKENS[:, :2], "start": jnp.array(1)},
    "empty": {"prompt": TOKENS[:, :0]},
}


@pytest.mark.parametrize(
    "kind, name",
    # the compiler of jax 0.11.2 ends the process at an empty array in shard_map
    [(kind, name) for kind in AxisType for name in PROMPTS if (kind, name) != (AxisType.Manual, "empty")],
)
def test_generate(kind, name):
    params = CELL.init(jax.random.key(0))

    def run(params, given):
        return js.generate(CELL, params, max_new_tokens=4, end=2, **given)

    expected = run(params, PROMPTS[name])
    specs = {key: PartitionSpec("devices") if value.ndim else PartitionSpec() for key, value in PROMPTS[name].items()}
    if kind == AxisType.Manual:
        mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
        run = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), specs), out_specs=PartitionSpec("devices"))
        out = jax.jit(run)(params, PROMPTS[name])
    else:
        mesh = jax.make_mesh((2,), ("devices",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            out = run(params, jax.device_put(PROMPTS[name], shardings))
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert_close(out, expected)
