"""`jaxseq.scan` takes what `lax.scan` takes, fails as it fails, and runs where it runs."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxseq as js
from jaxseq.core.scan import scan

from .bodies import BATCH, BODIES, HIDDEN, INPUT, TIME

MODELS = ["lstm", "attention"]


def assert_equal_trees(got, expected, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (type(a), jax.typeof(a).update(sharding=None)) == (type(b), jax.typeof(b).update(sharding=None))
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b), initial=0), 1e-30))


def values_and_gradients(name, engine=scan, transform=lambda run: run, **options):
    """The function `arguments -> (results, gradients)` of a body, for comparison."""

    def run(params, init, xs):
        return engine(BODIES[name].make(params), init, xs, **options)

    def loss(arguments):
        results = transform(run)(*arguments)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results)), results

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{"reverse": True}, {"unroll": 3}, {"length": TIME, "reverse": True, "unroll": True}], ids=str
)
def test_options(name, options):
    arguments = BODIES[name].arguments()
    got, expected = (jax.jit(values_and_gradients(name, engine, **options))(arguments) for engine in (scan, lax.scan))
    assert_equal_trees(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_under_checkpoint(name):
    arguments = BODIES[name].arguments()
    got = jax.jit(values_and_gradients(name, transform=jax.checkpoint))(arguments)
    assert_equal_trees(got, jax.jit(values_and_gradients(name, lax.scan))(arguments))


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_stays_bfloat16(name):
    arguments = BODIES[name].arguments(dtype=jnp.bfloat16)
    got, expected = (jax.jit(values_and_gradients(name, engine))(arguments) for engine in (scan, lax.scan))
    assert_equal_trees(got, expected, 0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


def batch_specs(arguments):
    """The partition of each argument over its batch axis; the memory is the one parameter that has one."""
    params, init, xs = arguments
    spec = lambda key: P("batch") if key == "memory" else P()  # noqa: E731
    return {key: spec(key) for key in params}, jax.tree.map(lambda _: P("batch"), init), P(None, "batch")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_sharded_inputs(name, axis_type):
    arguments = BODIES[name].arguments()
    expected = jax.jit(values_and_gradients(name, lax.scan))(arguments)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        specs = batch_specs(arguments)
        placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), arguments, specs)
        got = jax.jit(values_and_gradients(name))(placed)
    assert_equal_trees(got, expected)
    if axis_type is AxisType.Explicit:
        (_, (_, ys)), gradients = got
        assert all(leaf.sharding.spec[1] == "batch" for leaf in jax.tree.leaves(ys))
        assert gradients[2].sharding.spec[1] == "batch"


@pytest.mark.parametrize("name", MODELS)
def test_inside_shard_map(name):
    arguments = BODIES[name].arguments()
    expected = jax.jit(values_and_gradients(name, lax.scan))(arguments)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))

    def mapped(run):
        specs = {"in_specs": batch_specs(arguments), "out_specs": (P("batch"), P(None, "batch"))}
        return jax.shard_map(run, mesh=mesh, **specs)

    assert_equal_trees(jax.jit(values_and_gradients(name, transform=mapped))(arguments), expected)


@pytest.mark.parametrize("length", [0, 1])
def test_short_sequences(length):
    params, init, xs = BODIES["lstm"].arguments()
    arguments = params, init, xs[:length]
    got, expected = (jax.jit(values_and_gradients("lstm", engine))(arguments) for engine in (scan, lax.scan))
    assert_equal_trees(got, expected)


def test_empty_batch():
    params, init, xs = BODIES["lstm"].arguments()
    arguments = params, [leaf[:0] for leaf in init], xs[:, :0]
    got, expected = (jax.jit(values_and_gradients("lstm", engine))(arguments) for engine in (scan, lax.scan))
    assert_equal_trees(got, expected)


@pytest.mark.parametrize(
    "name", ["lstm", "gru_reset_after", "attention", "convolutional", "per_unit", "tokens_and_keys"]
)
def test_as_on_an_accelerator(name, monkeypatch):
    """There all products of inputs leave the loop, and gradients are formed in the layout that comes by itself."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    params, init, xs = BODIES[name].arguments()

    def loss(engine, params):
        results = engine(BODIES[name].make(params), init, xs)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results))

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, engine)))(params) for engine in (scan, lax.scan)
    )
    assert_equal_trees(got, expected)


def test_a_scan_within_a_scan():
    kernel, xs = jnp.full((HIDDEN, HIDDEN), 0.3), jnp.ones((TIME, 2, BATCH, HIDDEN))

    def loss(engine, kernel, xs):
        def inner(h, x):
            h = jnp.tanh(h @ kernel + x)
            return h, h

        def outer(h, x):
            h, ys = engine(inner, h, x)
            _, alone = engine(inner, x[0], x)
            return h + alone[-1], ys

        return engine(outer, jnp.zeros((BATCH, HIDDEN)), xs)[1].sum()

    gradients = (jax.jit(jax.grad(functools.partial(loss, engine), (0, 1)))(kernel, xs) for engine in (scan, lax.scan))
    assert_equal_trees(*gradients)


class Pair(collections.namedtuple("Pair", "first second")):
    pass


def test_structures_and_weak_types_are_those_of_lax_scan():
    def step(carry, x):
        pair, none, count = carry
        return (Pair(pair.second, pair.first + x["a"]), none, count), {"one": 1.0, "none": None, "pair": pair}

    init = (Pair(jnp.ones(2), jnp.zeros(2)), None, 0)
    xs = {"a": jnp.ones((3, 2))}
    got, expected = (jax.jit(functools.partial(engine, step))(init, xs) for engine in (scan, lax.scan))
    assert_equal_trees(got, expected)
    got, expected = (engine(step, init, xs) for engine in (scan, lax.scan))
    assert_equal_trees(got, expected)


def test_nothing_at_all():
    assert jax.jit(lambda: scan(lambda carry, x: (carry, None), (), None, length=3))() == ((), None)


def test_a_function_is_traced_once():
    calls = []

    def step(h, x):
        calls.append(None)
        return jnp.tanh(h + x), h

    xs = jnp.ones((TIME, 2))
    for _ in range(2):
        scan(step, jnp.zeros(2), xs)
    assert len(calls) == 1
    jax.grad(lambda xs: scan(step, jnp.zeros(2), xs)[0].sum())(xs)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "step, init, xs",
    [
        (lambda h, x: (h[:1], h), jnp.ones(2), jnp.ones((3, 2))),
        (lambda h, x: ((h, h), h), jnp.ones(2), jnp.ones((3, 2))),
        (lambda h, x: (h.astype(jnp.bfloat16), h), jnp.ones(2), jnp.ones((3, 2))),
        (lambda h, x: h, {"h": jnp.ones(2)}, jnp.ones((3, 2))),
        (lambda h, x: (h, x), jnp.ones(2), None),
        (lambda h, x: (h, x), jnp.ones(2), [jnp.ones(3), jnp.ones(4)]),
        (lambda h, x: (h, x["missing"]), jnp.ones(2), {"a": jnp.ones(3)}),
    ],
)
def test_errors_are_those_of_lax_scan(step, init, xs):
    with pytest.raises(Exception) as expected:  # noqa: PT011
        jax.eval_shape(functools.partial(lax.scan, step), init, xs)
    with pytest.raises(expected.type) as got:
        jax.eval_shape(functools.partial(scan, step), init, xs)
    assert str(got.value) == str(expected.value)


def test_a_callback_runs_in_every_step():
    seen = []

    def step(h, x):
        jax.debug.callback(lambda x: seen.append(float(x)), x, ordered=True)
        return h + x, h * x

    gradient = jax.grad(lambda xs: scan(step, 1.0, xs)[1].sum())(jnp.arange(3.0))
    jax.effects_barrier()
    assert seen == [0.0, 1.0, 2.0]
    expected = jax.grad(lambda xs: lax.scan(lambda h, x: (h + x, h * x), 1.0, xs)[1].sum())(jnp.arange(3.0))
    np.testing.assert_allclose(gradient, expected)


def test_a_pure_callback_of_the_input_runs_once_a_step():
    """`vmap`, over all steps at once, would refuse it."""

    def step(h, x):
        looked_up = jax.pure_callback(lambda x: np.float32(2 * x), jax.ShapeDtypeStruct((), jnp.float32), x)
        return jnp.tanh(h + looked_up), h

    def loss(engine, h):
        return engine(step, h, jnp.arange(3))[1].sum()

    got, expected = (jax.jit(functools.partial(loss, engine))(0.5) for engine in (scan, lax.scan))
    assert_equal_trees(got, expected)


def test_a_gradient_without_jit_runs_no_step_that_the_loop_does_not():
    """In reverse the first carry never meets the first input, of which the root would be none."""

    def step(a, carry, x):
        return carry + 5 * a, a * jnp.sqrt(carry - x)

    def loss(a):
        return scan(functools.partial(step, a), jnp.float32(1), jnp.array([2.0, 0.0]), reverse=True)[1].sum()

    with jax.debug_nans(True):
        assert jax.grad(loss)(1.0) == 4.25  # of a √1 + a √(5 a - 1)


def test_symbolic_shapes():
    """As `jax.export` has them."""
    batch, time = export.symbolic_shape("batch, time")
    cell = js.LSTM(INPUT, HIDDEN)
    params = cell.init(jax.random.key(0))

    def loss(xs):
        return cell.unroll(params, xs)[1].sum()

    for leading in ((batch, TIME), (BATCH, time), (batch, time)):
        shape = jax.ShapeDtypeStruct((*leading, INPUT), jnp.float32)
        assert export.export(jax.jit(jax.grad(loss)))(shape).out_avals[0].shape == (*leading, INPUT)


def test_a_step_may_write_to_a_ref():
    total = jax.new_ref(jnp.zeros(()))

    def step(h, x):
        total[...] += x
        return h + x, None

    h, _ = jax.jit(lambda xs: scan(step, 0.0, xs))(jnp.arange(4.0))
    assert (float(h), float(total[...])) == (6.0, 6.0)


@pytest.mark.parametrize("explicit", [True, False])
def test_checkify(explicit):
    def step(h, x):
        if explicit:
            checkify.check(x > 0, "x is {x}", x=x)
        return h + jnp.log(x), h

    checked = checkify.checkify(
        jax.jit(lambda xs: scan(step, 0.0, xs)), errors=checkify.user_checks if explicit else checkify.float_checks
    )
    assert checked(jnp.ones(3))[0].get() is None
    message = checked(jnp.array([1.0, -1.0, 1.0]))[0].get()
    assert ("x is -1.0" if explicit else "nan") in message


def test_disable_jit_runs_the_python_function_in_every_step():
    calls = []

    def step(h, x):
        calls.append(None)
        return h + x, h

    with jax.disable_jit():
        assert float(scan(step, 0.0, jnp.arange(4.0))[0]) == 6.0
    assert len(calls) == 4


def test_parameters_closed_over_by_a_users_class():
    class Model:
        def __init__(self, kernel):
            self.kernel = kernel

        def __call__(self, h, x):
            h = jnp.tanh(h @ self.kernel + x)
            return h, h

    kernel, xs = jnp.full((HIDDEN, HIDDEN), 0.3), jnp.ones((TIME, BATCH, HIDDEN))

    def loss(engine, kernel):
        return engine(Model(kernel), jnp.zeros((BATCH, HIDDEN)), xs)[1].sum()

    got, expected = (jax.grad(functools.partial(loss, engine))(kernel) for engine in (scan, lax.scan))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_rbg_keys_give_the_bits_of_lax_scan():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), TIME)
    step = lambda h, key: (h, jax.random.normal(key, (INPUT,)) + h)  # noqa: E731
    got, expected = (jax.jit(functools.partial(engine, step))(0.0, keys)[1] for engine in (scan, lax.scan))
    np.testing.assert_array_equal(got, expected)


def test_python_numbers_have_derivatives():
    def last(w, h):
        return scan(lambda h, x: (h * w + x, h), h, jnp.arange(3.0))[0]

    value, tangent = jax.jvp(last, (1.0, 2.0), (1.0, 1.0))
    assert (float(value), float(tangent)) == (5.0, 1.0 + 3 * 2.0 + 1.0)  # h w^3 + w + 2
