"""Linear recurrences against scipy's filters and a loop, with every derivative, and what their gradients store."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from scipy import signal

import jaxseq as js

IMPLEMENTATIONS = ["sequential", "associative"]
SHAPES = {  # of the decay, beside a drive [5, 2, 3]
    "each element": (5, 2, 3),
    "each key": (5, 2, 1),
    "each step": (5, 1, 1),
    "constant": (3,),
    "constant in rows": (2, 1),
    "a number": (),
}

pytestmark = pytest.mark.usefixtures("float64")


def problem(shape, dtype=np.float64):
    rng = np.random.default_rng(0)

    def draw(shape):
        real = rng.normal(size=shape)
        return real + 1j * rng.normal(size=shape) if dtype == np.complex128 else real

    return draw(shape) * 0.7, draw((5, 2, 3)), draw((2, 3))


def looped(decay, drive, state, reverse=False):
    """The recurrence as it is written, in NumPy or, to be differentiated, in JAX."""
    decay = jnp.broadcast_to(decay, drive.shape)
    states = [None] * len(drive)
    for t in reversed(range(len(drive))) if reverse else range(len(drive)):
        states[t] = state = decay[t] * state + drive[t]
    return state, jnp.stack(states)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_a_constant_decay_is_a_filter(implementation):
    rng = np.random.default_rng(1)
    xs, decay = rng.normal(size=(40, 3)), np.array([0.9, -0.5, 1.01])
    state = rng.normal(size=3)
    last, states = js.linear_scan(decay, xs, state, implementation=implementation)
    for channel in range(3):
        expected, _ = signal.lfilter([1], [1, -decay[channel]], xs[:, channel], zi=decay[channel] * state[[channel]])
        np.testing.assert_allclose(states[:, channel], expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(last, states[-1])


@pytest.mark.parametrize(("dtype", "reverse"), [(np.float64, False), (np.complex128, True)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_loop(shape, implementation, dtype, reverse):
    given = problem(shape, dtype)

    def scalar(scan, *given):
        last, states = scan(*given, reverse=reverse)
        weight = np.cos(np.arange(30)).reshape(5, 2, 3)
        return jnp.sum(jnp.abs(last) ** 2) + jnp.sum(weight * states.real + weight**2 * states.imag), (last, states)

    def all_of(scan):
        return jax.jit(jax.value_and_grad(functools.partial(scalar, scan), (0, 1, 2), has_aux=True))(*given)

    ours = all_of(functools.partial(js.linear_scan, implementation=implementation))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), ours, all_of(looped))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "implementation"), [((5, 2, 3), "sequential"), ((3,), "associative")])
def test_both_modes_and_second_derivatives(shape, implementation):
    scan = jax.jit(functools.partial(js.linear_scan, implementation=implementation))
    check_grads(scan, problem(shape), order=2, modes=("fwd", "rev"), rtol=1e-6)


def test_vmap_over_any_argument():
    decay, drive, state = problem((3,))
    rows = jax.vmap(js.linear_scan, in_axes=(None, 1, 0), out_axes=(0, 1))(decay, drive, state)
    jax.tree.map(np.testing.assert_allclose, rows, js.linear_scan(decay, drive, state))
    decays = np.stack([decay, -decay])
    several = jax.vmap(js.linear_scan, in_axes=(0, None, None))(decays, drive, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b), several, js.linear_scan(-decay, drive, state))


@pytest.mark.parametrize(
    "implementation",
    # the compiler of jax 0.11.2 ends the process at an empty array in shard_map, as lax.associative_scan makes it
    IMPLEMENTATIONS if jax.__version_info__ < (0, 11) else ["sequential"],
)
@pytest.mark.parametrize("shape", [(5, 2, 3), (3,)])
def test_shard_map(shape, implementation):
    given = problem(shape)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    over_rows = PartitionSpec(None, "data")
    specs = (over_rows if len(shape) == 3 else PartitionSpec(), over_rows, PartitionSpec("data"))

    def loss(*given):
        last, states = js.linear_scan(*given, implementation=implementation)
        return jnp.sum(states**2) + jnp.sum(last**3)

    def total(*given):
        return jax.lax.psum(loss(*given), "data")

    sharded = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    for ours, expected in zip(
        jax.jit(jax.value_and_grad(sharded, (0, 1, 2)))(*given),
        jax.value_and_grad(loss, (0, 1, 2))(*given),
        strict=True,
    ):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), ours, expected)


def products_of(jaxpr):
    """All products of a jaxpr, those of inner ones too, each with the number of times it runs."""
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"))
        inner = [getattr(leaf, "jaxpr", leaf) for leaf in inner if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]
        yield from ((found, times * count) for part in inner for found, count in products_of(part))
        if equation.primitive.name in ("mul", "dot_general"):
            yield equation, 1


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_the_gradient_costs_and_stores(implementation, constant, dtype):
    """A few products a step and, in the loop, the states and two arrays like them, at any number of steps."""

    def loss(decay, drive):
        return jnp.sum(jnp.abs(js.linear_scan(decay, drive, implementation=implementation)[1]) ** 2)

    def costs(time):
        drive = jnp.ones((time, 16), dtype)
        decay = jnp.full(drive.shape[constant:], 0.5, dtype)
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(decay, drive)
        work = sum(times * equation.outvars[0].aval.size for equation, times in products_of(traced.jaxpr.jaxpr))
        memory = 0
        if implementation == "sequential":
            memory = traced.lower().compile().memory_analysis().temp_size_in_bytes
        return np.array([work / drive.size, memory / drive.nbytes])

    products, arrays = costs(4096)
    assert products <= {"sequential": 7, "associative": 22}[implementation]
    assert arrays <= 3.01
    assert (costs(1024) >= 0.95 * np.array([products, arrays])).all()  # as many at a quarter of the steps


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_reset_stops_nan_in_values_and_gradients(implementation, reverse):
    """The segments on both sides of a reset are as if alone, though the first state of the first is NaN."""
    decay, drive, state = problem((5, 2, 3))
    reset = np.zeros((5, 2), bool)
    reset[1 if reverse else 3] = True

    def total(scan, decay, drive, state):
        last, states = scan(decay, drive, state)
        return (last * 2).sum() + (states[:2] if reverse else states[3:]).sum()

    def by_reset(decay, drive, state):
        return js.linear_scan(decay, drive, state, reset=reset, reverse=reverse, implementation=implementation)

    def alone(decay, drive, state):
        part = slice(0, 2) if reverse else slice(3, 5)
        last, states = looped(decay[part], drive[part], jnp.zeros_like(state), reverse)
        return last, jnp.zeros_like(drive).at[part].set(states)

    expected = jax.value_and_grad(functools.partial(total, alone), (0, 1))(decay, drive, state)
    for start in (state, np.full_like(state, np.nan)):
        ours = jax.value_and_grad(functools.partial(total, by_reset), (0, 1, 2))(decay, drive, start)
        (value, (of_decay, *others)), (expected_value, (expected_decay, expected_drive)) = ours, expected
        part = slice(0, 2) if reverse else slice(3, 5)  # the others' is 0 times what their state is
        of_decay, expected_decay = of_decay[part], expected_decay[part]
        pairs = zip(
            (value, of_decay, *others), (expected_value, expected_decay, expected_drive, 0 * state), strict=True
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"needs a boolean reset of leading axes of the drive \(5, 2, 3\)"):
        js.linear_scan(decay, drive, reset=reset[:4])


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_crosses_a_reset_in_either_direction(implementation, reverse, junk):
    """Three documents of two steps: junk in the second, or in the state, reaches neither the first nor the third."""
    rng = np.random.default_rng(0)
    decay, drive, state = rng.uniform(0.3, 0.9, 6), rng.normal(size=6), np.float64(0.4)
    reset = np.array([0, 1, 0, 1, 0, 0] if reverse else [0, 0, 1, 0, 1, 0], bool)  # in the order of reading
    others = np.array([0, 1, 4, 5])

    def loss(decay, drive, state):
        last, states = js.linear_scan(decay, drive, state, reset=reset, reverse=reverse, implementation=implementation)
        return jnp.sum(states[others] ** 2) + last**3, states[others]

    def slope(*given):
        gradients, _ = jax.grad(loss, (0, 1, 2), has_aux=True)(*given)
        return jnp.sum(gradients[0][others] ** 2) + jnp.sum(gradients[1][others] ** 2) + gradients[2] ** 2

    @jax.jit
    def all_of(*given):
        gradients, states = jax.grad(loss, (0, 1, 2), has_aux=True)(*given)
        second = jax.grad(slope, (0, 1, 2))(*given)
        return states, [(leaf[0][others], leaf[1][others], leaf[2]) for leaf in (gradients, second)]

    expected = all_of(decay, drive, state)
    for steps in ([2], [3], [2, 3]):
        spoil = jnp.zeros(6, bool).at[np.array(steps)].set(True)
        for given in ((jnp.where(spoil, junk, decay), drive), (decay, jnp.where(spoil, junk, drive))):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), all_of(*given, state), expected)


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_forms_agree_where_something_is_not_finite(reverse, junk):
    drive, decay, state = np.arange(1.0, 6), np.full(5, 0.5), np.float64(3.0)
    reset = np.arange(5) == 2
    for t in range(5):
        spoiled = np.where(np.arange(5) == t, junk, 1.0)
        for given in ((decay * spoiled, drive, state), (decay, drive * spoiled, state), (decay, drive, state * junk)):
            forms = [
                js.linear_scan(*given, reset=reset, reverse=reverse, implementation=implementation)[1]
                for implementation in IMPLEMENTATIONS
            ]
            np.testing.assert_allclose(forms[1], forms[0])
            assert (given[1] is not drive and t == 2) or forms[0][2] == 3
    constant = [js.linear_scan(junk, drive, reset=reset, implementation=form)[1][2] for form in IMPLEMENTATIONS]
    assert constant == [3, 3]


def test_no_steps():
    decay, drive, state = problem((3,))
    last, states = js.linear_scan(decay, drive[:0], state)
    np.testing.assert_array_equal(last, state)
    assert states.shape == (0, 2, 3)
    assert js.linear_scan(0.5, drive[:0])[0].shape == (2, 3)


def test_a_decay_of_zero_forgets_and_its_gradient_is_the_state_before():
    decay = jnp.array([0.5, 0.0, 0.5])
    gradient = jax.grad(lambda decay: js.linear_scan(decay, jnp.ones(3))[0])(decay)
    np.testing.assert_array_equal(gradient, [0.0, 0.5, 1.0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_underflowing_decays_give_no_nan(implementation):
    decay, drive = np.full((300, 1), 1e-30), np.full((300, 1), 1e300)
    out = jax.value_and_grad(lambda a, b: js.linear_scan(a, b, implementation=implementation)[0].sum(), (0, 1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out(decay, drive)))


def test_dtypes_promote():
    real, whole = jnp.ones(3, jnp.float32), jnp.ones(3, jnp.complex64)
    assert js.linear_scan(0.5, real)[1].dtype == jnp.float32
    assert js.linear_scan(real, whole)[1].dtype == js.linear_scan(whole, real)[1].dtype == jnp.complex64
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert js.linear_scan(real, jnp.ones((4, 2, 3), jnp.float32))[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("decay", "drive", "options", "message"),
    [
        (np.ones(4), np.ones((5, 3)), {}, r"decay of shape \(4,\).*drive \[time, ...\] of shape \(5, 3\).*aligned"),
        (np.ones((5, 3, 1)), np.ones((5, 3)), {}, r"decay of shape \(5, 3, 1\)"),
        (np.ones(3), np.ones((5, 3)), {"state": np.ones(2)}, r"state of shape \(2,\); .* needs \(3,\)"),
        (np.ones(3), np.float64(1), {}, r"drive \[time, ...\], got a number"),
        (np.ones(3), np.ones((5, 3)), {"implementation": "fast"}, '"sequential", "associative" or None, got .fast.'),
    ],
)
def test_shapes_that_do_not_fit(decay, drive, options, message):
    with pytest.raises(ValueError, match=message):
        js.linear_scan(decay, drive, **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"real or complex numbers, got a drive int64\[3\]"):
        js.linear_scan(0.5, np.ones(3, np.int64))
