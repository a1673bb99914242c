"""A model on two devices gives what it gives on one: values and gradients, however it is told to be sharded.

Under explicit sharding JAX raises where it is not told how a result is sharded. It does so while it traces, so that the
laws over all layers of the zoo need no values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxseq as js
from tests import zoo

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
        if e.dtype == jax.dtypes.float0:
            continue
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


EXPLICIT = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,))
OVER_ROWS = NamedSharding(EXPLICIT, PartitionSpec("devices"))


def example(name, rows=4):
    """The params, inputs, state, mask and resets of a line of the zoo."""
    layer, _, _, memory, pairs = zoo.ZOO[name]
    random = np.random.default_rng(1)
    params = layer.init(jax.random.key(1))
    if memory is not None:
        params = layer.attach(params, jnp.ones(memory))
    state = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(random.uniform(size=leaf.shape)).astype(leaf.dtype),
        layer.initial_state(params, (rows,)),
    )
    xs = jax.tree.map(jnp.asarray, zoo.inputs(layer, random, (rows, 6)))
    mask, reset = jnp.asarray(random.uniform(size=(2, rows, 6)) < [[[0.7]], [[0.3]]])
    return params, xs, state, mask, None if pairs else reset


def with_gradients(layer, params, xs, state, mask, reset, key=None):
    """The state and outputs, and the gradients of a weighted sum of them."""

    def loss(params, xs, state):
        out = layer.unroll(params, xs, state, mask=mask, reset=reset, key=key, length=6)
        floats = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)) for leaf in floats), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)(params, xs, state)
    return gradients[0], (gradients[1:], out)


def sharded_axes(leaf):
    return [axis for axis, name in enumerate(leaf.sharding.spec if leaf.sharding else ()) if name is not None]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_batch_stays_sharded(name):
    line = zoo.ZOO[name]
    params, *given = jax.eval_shape(lambda: example(name))
    xs, state, mask, reset = jax.tree.map(lambda leaf: leaf.update(sharding=OVER_ROWS), given)
    key = jax.random.key(2) if line.noisy else None
    with jax.set_mesh(EXPLICIT):
        for start, keep, fresh, noise in ((state, None, None, None), (None, mask, reset, key)):
            run = functools.partial(with_gradients, line.layer, key=noise)
            of_params, rows = jax.eval_shape(run, params, xs, start, keep, fresh)
            for leaf in jax.tree.leaves(rows):
                assert sharded_axes(leaf) == [0] or leaf.dtype == jax.dtypes.float0
            assert not any(map(sharded_axes, jax.tree.leaves(of_params)))


@pytest.mark.parametrize("name", ["conv_gru", "transformer", "gated_delta_net", "zoneout", "moving_average"])
def test_explicit_sharding_changes_no_values(name):
    line, (params, *given) = zoo.ZOO[name], jax.jit(example, static_argnums=0)(name)
    run = functools.partial(with_gradients, line.layer, key=jax.random.key(2) if line.noisy else None)
    expected = jax.jit(run)(params, *given)
    with jax.set_mesh(EXPLICIT):
        out = jax.jit(run)(params, *jax.device_put(given, OVER_ROWS))
    assert_close(out, expected)


@pytest.mark.parametrize("name", ["conv_lstm", "conv_gru", "gru", "rg_lru", "transformer"])
def test_the_second_of_two_batch_axes_is_sharded(name):
    line, (params, *given) = zoo.ZOO[name], jax.jit(example, static_argnums=0)(name)
    given = jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.flip(leaf, axis=0)]), given)
    run = jax.jit(functools.partial(with_gradients, line.layer))
    expected = run(params, *given)
    with jax.set_mesh(EXPLICIT):
        out = run(params, *jax.device_put(given, NamedSharding(EXPLICIT, PartitionSpec(None, "devices"))))
    assert all(sharded_axes(leaf) == [1] for leaf in jax.tree.leaves(out[1]) if leaf.dtype != jax.dtypes.float0)
    assert_close(out, expected)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_batch_of_no_rows(name):
    params, xs, state, mask, reset = jax.eval_shape(lambda: example(name, rows=0))
    of_params, ((of_xs, of_state), (last, ys)) = jax.eval_shape(
        functools.partial(with_gradients, zoo.ZOO[name].layer), params, xs, state, mask, reset
    )
    shapes = functools.partial(jax.tree.map, jnp.shape)
    assert shapes((of_params, of_xs, of_state, last)) == shapes((params, xs, state, state))
    assert all(leaf.shape[0] == 0 for leaf in jax.tree.leaves(ys))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_params_under_vmap(name):
    """Two sets of params read the same inputs."""
    params, *given = jax.eval_shape(lambda: example(name))
    run = functools.partial(with_gradients, zoo.ZOO[name].layer)
    two = jax.tree.map(lambda leaf: leaf.update(shape=(2, *leaf.shape)), params)
    out = jax.eval_shape(jax.vmap(run, in_axes=(0, None, None, None, None), axis_size=2), two, *given)
    each = jax.eval_shape(run, params, *given)
    assert jax.tree.map(lambda leaf: (2, *leaf.shape), each) == jax.tree.map(jnp.shape, out)


def total(ys):
    return jnp.sum(ys**2)


CELL_ALONE = js.GRU(2, 3)
READERS = {
    "newton_unroll": lambda params, xs, **flags: js.newton_unroll(CELL_ALONE, params, xs, **flags)[:2],
    "quasi_newton": lambda params, xs, **flags: js.newton_unroll(CELL_ALONE, params, xs, method="quasi", **flags)[:2],
    "jacobian_singular_values": functools.partial(js.diagnostics.jacobian_singular_values, CELL_ALONE),
    "lyapunov_exponents": lambda params, xs, **_: js.diagnostics.lyapunov_exponents(CELL_ALONE, params, xs),
    "gradient_flow": functools.partial(js.diagnostics.gradient_flow, CELL_ALONE, loss=total),
    "constant_flow": functools.partial(js.regularizers.constant_flow, CELL_ALONE, loss=total),
}


TRACED_ONLY = {"lyapunov_exponents": "JAX's QR decomposition does not compile: it chooses between two shardings"}


@pytest.mark.parametrize(
    "reader", [pytest.param(reader, marks=pytest.mark.slow if "newton" in reader else ()) for reader in READERS]
)
def test_what_reads_derivatives(reader):
    params, xs, _, mask, reset = example("gru")

    def sums(params, xs, mask, reset):
        out = READERS[reader](params, xs, mask=mask, reset=reset)
        return sum(map(jnp.sum, jax.tree.leaves(out))), out

    run = jax.jit(jax.grad(sums, has_aux=True))
    given = jax.device_put((xs, mask, reset), OVER_ROWS)
    with jax.set_mesh(EXPLICIT):
        _, out = jax.eval_shape(sums, params, *given)
        assert all(sharded_axes(leaf) == [0] for leaf in jax.tree.leaves(out))
        if reader not in TRACED_ONLY:
            sharded = run(params, *given)
    if reader not in TRACED_ONLY:
        assert_close(sharded, run(params, xs, mask, reset))


@pytest.mark.parametrize("method, layers", [("rtrl", (js.GRU(2, 3), js.Dense(3, 2))), ("snap1", (js.GRU(2, 2),))])
def test_learning_online(method, layers):
    cell, (_, xs, _, mask, reset) = js.Stack(layers), example("gru")
    params = cell.init(jax.random.key(0))

    def run(params, xs, mask, reset):
        options = {"mask": mask, "reset": reset, "method": method}
        return js.online.gradient(cell, params, xs, squared_error, xs, **options)

    run = jax.jit(run)
    with jax.set_mesh(EXPLICIT):
        sharded = run(params, *jax.device_put((xs, mask, reset), OVER_ROWS))
    assert_close(sharded, run(params, xs, mask, reset))
    assert all(sharded_axes(leaf) == [0] for leaf in jax.tree.leaves(sharded[0]))


def squared_error(y, target):
    return jnp.sum((y - target) ** 2, axis=-1)
