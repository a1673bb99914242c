"""Gradients forward in time are those of back-propagation, or of the published approximation."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq import online
from jaxseq.core.activations import ACTIVATIONS, activation
from jaxseq.gradients.forms import form_of

ROWS, TIME = 2, 7

pytestmark = pytest.mark.usefixtures("float64")


CELLS = {
    "elman": js.Elman(2, 3),
    "stack": js.Stack((js.LSTM(2, 2), js.Dropout(0.5), js.LearnedState(js.GRU(2, 2)), js.Dense(2, 3))),
    "weight_drop": js.WeightDrop(js.Elman(2, 3), 0.5),
    "indrnn": js.IndRNN(2, 3),
    "lru": js.LearnedState(js.LRU(2, 3)),
    "s5": js.S5(2, 4),
    "minlstm": js.MinLSTM(2, 3),
    "rglru": js.RGLRU(2),
    "between": js.Stack((js.Dense(2, 4), js.Zoneout(js.MinGRU(4, 3), 0.5), js.Dense(3, 3))),
}
DIAGONAL = {  # what each array of the params changes
    "indrnn": ["unit"] * 3,
    "lru": ["unit"] * 4 + ["none"] * 2 + ["unit"] * 2,
    "s5": ["unit"] * 4 + ["none"] * 2,
    "minlstm": ["unit"] * 2,
    "rglru": ["unit"] * 3,
    "between": ["all"] * 2 + ["unit"] * 2 + ["none"] * 2,
}


def problem(cell):
    keys = jax.random.split(jax.random.key(0), 5)
    params = jax.tree.map(lambda leaf: leaf + 0.1, cell.init(keys[0]))
    xs, targets = (jax.random.normal(key, (ROWS, TIME, size)) for key, size in zip(keys[1:3], (2, 3), strict=True))
    mask, reset = jnp.ones((ROWS, TIME), bool).at[0, 3].set(False), jnp.zeros((ROWS, TIME), bool).at[1, 4].set(True)
    return params, xs, targets, {"mask": mask, "reset": reset, "key": keys[4]}


def loss(y, target):
    return jnp.sum((y - target) ** 2, axis=-1)


def backward(cell, params, xs, targets, mask, **options):
    """The value and gradient by back-propagation."""

    def total(params):
        _, ys = cell.unroll(params, xs, mask=mask, **options)
        return jnp.sum(jnp.where(mask, loss(ys, targets), 0))

    return jax.value_and_grad(total)(params)


def assert_close(actual, expected, tolerance=1e-10):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance), actual, expected)


@pytest.mark.parametrize(
    "name", ["elman", *(pytest.param(n, marks=pytest.mark.slow) for n in ("stack", "weight_drop"))]
)
def test_rtrl_is_back_propagation(name):
    cell = CELLS[name]
    params, xs, targets, options = problem(cell)
    _, value, slopes = online.gradient(cell, params, xs, loss, targets, **options)
    assert_close((value, slopes), backward(cell, params, xs, targets, **options))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "lru")) for n in DIAGONAL])
def test_diagonal_recurrences_are_exact_and_cheap(name):
    cell = CELLS[name]
    params, xs, _, options = problem(cell)
    options["reset"] = options["reset"].at[0, 3].set(True)
    xs = jnp.where(options["mask"][..., None], xs, jnp.nan)
    targets = jnp.zeros((ROWS, TIME, cell.output_size))
    carry, value, slopes = online.gradient(cell, params, xs, loss, targets, **options)
    assert_close((value, slopes), backward(cell, params, xs, targets, **options))
    arrays = len(jax.tree.leaves(carry.state))
    for leaf, influence, reach in zip(jax.tree.leaves(params), carry.influence, DIAGONAL[name], strict=True):
        units = {"unit": arrays, "all": carry.state[1].hidden.shape[-1] if name == "between" else None, "none": 0}
        assert influence is None if reach == "none" else influence.shape == (ROWS, units[reach], *leaf.shape)


class Mixing(js.Cell):
    """h' = tanh(a mix(h) + x W), where `mix` is any function of the state."""

    input_size: int
    size: int
    _: dataclasses.KW_ONLY
    mix: Callable[[jax.Array], jax.Array]

    def init(self, key):
        return jnp.linspace(0.5, 0.9, self.size), jax.random.normal(key, (self.input_size, self.size))

    def initial_state(self, params, batch_shape=()):
        return jnp.zeros((*batch_shape, self.size))

    def step(self, params, state, x, key=None):
        state = jnp.tanh(params[0] * self.mix(state) + jnp.dot(x, params[1]))
        return state, state


def written(h):
    return jnp.zeros((*h.shape[:-1], 4)).at[..., 1:].set(h)[..., :3]


def placed(h):
    return jax.lax.dynamic_update_slice(jnp.zeros((*h.shape[:-1], 4)), h, (0,) * (h.ndim - 1) + (1,))[..., :3]


def looked_up(h):
    places = jnp.clip(jnp.floor(3 * h[..., ::-1]).astype(int) + 1, 0, 2)
    return jnp.linspace(-0.5, 0.9, 3)[places] + jnp.take_along_axis(h, places, axis=-1)


def chosen(h):
    return jax.lax.cond(h.sum() > 0.1, lambda h: h[..., ::-1], jnp.sin, h)


def looped(h):
    return jax.lax.fori_loop(0, 2, lambda i, total: total + jnp.roll(h, i, axis=-1), jnp.zeros_like(h))


def sorted_by(h):
    places = jnp.broadcast_to(jnp.array([2.0, 0.0, 1.0]), h.shape)
    return jax.lax.sort((places, h), num_keys=1)[1]


@jax.custom_jvp
def straight_through(h):
    return jnp.sign(h)


@straight_through.defjvp
def _(primals, tangents):
    weights = jax.nn.softmax(primals[0])
    along = weights * tangents[0]
    return jnp.sign(primals[0]), along - weights * along.sum(axis=-1, keepdims=True)


@jax.custom_jvp
def centred(h):
    return 1 * h


@centred.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] - tangents[0].mean(axis=-1, keepdims=True)


MIXING = [straight_through, centred, written, placed, looked_up, chosen, looped, sorted_by]


@pytest.mark.parametrize("mix", MIXING, ids=lambda mix: mix.__name__)
def test_whatever_mixes_units_is_dense(mix):
    cell = Mixing(2, 3, mix=mix)
    params, xs, targets, _ = problem(cell)
    xs, targets = xs[:, :3], targets[:, :3]
    carry, *found = jax.jit(lambda params: online.gradient(cell, params, xs, loss, targets))(params)
    expected = jax.jit(lambda params: backward(cell, params, xs, targets, jnp.ones((ROWS, 3), bool)))(params)
    assert_close(tuple(found), expected)
    assert carry.influence[0].shape == (ROWS, 3, 3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_pointwise_activations_leave_units_alone(name):
    cell = Mixing(2, 3, mix=lambda h: activation(name)(h) + jax.lax.stop_gradient(h.sum(axis=-1, keepdims=True)))
    form = form_of(cell, cell.init(jax.random.key(0)), (ROWS,), "rtrl")
    assert form.size == (None if "softmax" in name else 3)


@pytest.mark.slow
def test_vmap_over_params_and_second_derivatives():
    cell = js.MinGRU(2, 3)
    params, xs, _, _ = problem(cell)
    forward = lambda params: online.gradient(cell, params, xs, lambda y, target: jnp.sum(y**2, axis=-1))[2]  # noqa: E731
    total = lambda params: jnp.sum(cell.unroll(params, xs)[1] ** 2)  # noqa: E731
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    assert_close(jax.vmap(forward)(several), jax.vmap(jax.grad(total))(several))
    norm = lambda slopes: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(slopes))  # noqa: E731
    found, expected = (jax.grad(lambda params, of=of: norm(of(params)))(params) for of in (forward, jax.grad(total)))
    assert_close(found, expected)


def flops(cell, method, loss=jnp.sum):
    """Of one step of online learning, as it is compiled."""
    params = jax.eval_shape(cell.init, jax.random.key(0))
    carry = jax.eval_shape(lambda params: online.start(cell, params, (2,), method=method), params)
    x = jax.eval_shape(lambda params: cell.zero_input(params, (2,)), params)
    run = jax.jit(lambda params, carry, x: online.step(cell, params, carry, x, loss, method=method))
    return run.lower(params, carry, x).compile().cost_analysis()["flops"]


def growth(cell, method):
    """By how much the cost grows where the units are doubled."""
    return flops(cell(64), method) / flops(cell(32), method)


@pytest.mark.slow
def test_a_step_of_snap1_costs_no_more_than_its_params():
    assert growth(lambda units: js.LSTM(units, units), "snap1") < 4.5  # the square
    assert growth(lambda units: js.LRU(2, units), "rtrl") < 2.2
    assert growth(lambda units: js.Elman(2, units), "rtrl") > 12  # the fourth power


@pytest.mark.slow
def test_two_batch_axes_and_noise_in_each_row():
    cell = js.Zoneout(js.LSTM(2, 3), 0.5)
    params, xs, targets, options = problem(cell)
    xs, targets = xs[:, :1], targets[:, :1]  # at the first step nothing is approximated
    key = options["key"]
    run = functools.partial(online.gradient, cell, params, loss=loss, method="snap1", key=key)
    carry, value, slopes = run(xs=xs, targets=targets)
    assert_close((value, slopes), backward(cell, params, xs, targets, jnp.ones((ROWS, 1), bool), key=key))
    more = run(xs=xs[None], targets=targets[None])
    assert_close(more, (jax.tree.map(lambda leaf: leaf[None], carry), value, slopes))


def test_snap1_is_exact_where_units_do_not_read_each_other():
    cell = CELLS["indrnn"]
    params, xs, targets, options = problem(cell)
    _, value, slopes = online.gradient(cell, params, xs, loss, targets, method="snap1", **options)
    assert_close((value, slopes), backward(cell, params, xs, targets, **options))
    mixing = js.Elman(2, 3)
    params = mixing.init(jax.random.key(0))
    _, _, slopes = online.gradient(mixing, params, xs, loss, targets, method="snap1", **options)
    exact = backward(mixing, params, xs, targets, **options)[1].recurrent_kernel
    assert np.abs(slopes.recurrent_kernel - exact).max() > 1e-3
    assert np.sum(slopes.recurrent_kernel * exact) > 0  # yet it descends


@pytest.mark.parametrize("cell", [js.Elman(2, 3), js.LSTM(2, 3)])
def test_snap1_keeps_the_block_of_each_unit(cell):
    """The full influence in NumPy, of which after each step all entries are put to 0 but those on the own unit."""
    params, xs, _, _ = problem(cell)
    carry = online.start(cell, params, (ROWS,), method="snap1")
    run = jax.jit(lambda carry, x: online.step(cell, params, carry, x, jnp.sum, method="snap1")[0])
    full = None
    for t in range(3):
        flat = lambda state: jnp.stack(jax.tree.leaves(state), axis=-2)  # noqa: E731 [row, array, unit]
        tree = jax.tree.structure(carry.state)
        arrays = len(jax.tree.leaves(carry.state))

        def advance(params, stacked, x, tree=tree, arrays=arrays, flat=flat):
            state = jax.tree.unflatten(tree, [stacked[:, i] for i in range(arrays)])
            return flat(cell.step(params, state, x)[0])

        stacked = flat(carry.state)
        local = np.asarray(jax.jacobian(advance, 1)(params, stacked, xs[:, t]))  # [row, a, u, row, b, v]
        now = jax.tree.leaves(jax.jacobian(advance, 0)(params, stacked, xs[:, t]))  # [row, a, u, *param]
        full = [np.zeros(part.shape) for part in now] if full is None else full
        full = [np.einsum("rausbv,sbv...->rau...", local, f) + np.asarray(n) for f, n in zip(full, now, strict=True)]
        for part in full:
            for unit in range(3):
                part[:, :, unit, ..., np.arange(3) != unit] = 0
        carry = run(carry, xs[:, t])
    own = [sum(np.moveaxis(part, 2, 0)[unit] for unit in range(3)) for part in full]
    assert_close(carry.influence, own)


def test_steps_add_up_to_the_gradient_of_the_sequence():
    cell = js.GRU(2, 3)
    params, xs, targets, _ = problem(cell)

    @jax.jit
    def advance(carry, x, target):
        return online.step(cell, params, carry, x, lambda y: loss(y, target).sum())

    carry, total, sum_of_slopes = online.start(cell, params, (ROWS,)), 0.0, jax.tree.map(jnp.zeros_like, params)
    for t in range(TIME):
        carry, value, slopes = advance(carry, xs[:, t], targets[:, t])
        total, sum_of_slopes = total + value, jax.tree.map(jnp.add, sum_of_slopes, slopes)
    assert_close((total, sum_of_slopes), backward(cell, params, xs, targets, jnp.ones((ROWS, TIME), bool)))


def test_a_sequence_in_two_parts():
    cell = js.Elman(2, 3)
    params, xs, targets, _ = problem(cell)
    run = functools.partial(online.gradient, cell, params)
    carry, first, early = run(xs[:, :4], loss, targets[:, :4])
    _, second, late = run(xs[:, 4:], loss, targets[:, 4:], carry)
    _, value, slopes = run(xs, loss, targets)
    assert_close((first + second, jax.tree.map(jnp.add, early, late)), (value, slopes))


@pytest.mark.parametrize(
    "cell", [js.GRUv1(2, 3), js.MGU(2, 3), js.Stack((js.Elman(3, 3), js.Elman(3, 3))), js.LayerNormLSTM(2, 3)]
)
def test_snap1_refuses_cells_whose_units_mix(cell):
    with pytest.raises(TypeError, match="units mix within a step: use rtrl|whose last axis is the units"):
        online.start(cell, cell.init(jax.random.key(0)), method="snap1")


def test_snap1_starts_under_jit():
    cell = js.GRU(2, 3)
    params = cell.init(jax.random.key(0))
    carry = jax.jit(lambda params: online.start(cell, params, (ROWS,), method="snap1"))(params)
    assert not carry.state.hidden.any()


def test_long_sums_of_narrow_numbers():
    cell = js.Elman(1, 1, activation="identity")
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bfloat16), cell.init(jax.random.key(0)))
    xs = jnp.zeros((1000, 1), jnp.bfloat16)
    _, value, slopes = online.gradient(cell, params, xs, lambda y, target: 1 + y[..., 0])
    assert value.dtype == slopes.bias.dtype == jnp.bfloat16
    assert value == 1000 and slopes.bias[0, 0] == 1000


@pytest.mark.parametrize("cell", [js.Elman(1, 2, activation="identity"), js.IndRNN(1, 2)])
def test_long_influences_of_narrow_numbers(cell):
    """The state counts the biases, so its derivative counts the steps."""
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bfloat16), cell.init(jax.random.key(0)))
    recurrent = jnp.ones(2) if isinstance(cell, js.IndRNN) else jnp.eye(2)[:, None]
    params = params._replace(**{params._fields[1]: recurrent.astype(jnp.bfloat16)})
    params = params._replace(bias=params.bias + jnp.bfloat16(2**-120))  # above 0, where relu has its slope
    _, _, slopes = online.gradient(cell, params, jnp.zeros((1000, 1), jnp.bfloat16), lambda y, target: y.sum())
    assert slopes.bias.dtype == jnp.bfloat16
    np.testing.assert_allclose(slopes.bias.astype(float), 500500, rtol=2**-8)


@pytest.mark.parametrize("method", ["rtrl", "snap1"])
def test_no_rows(method):
    cell = js.LSTM(2, 3)
    params = cell.init(jax.random.key(0))
    per_row = lambda y, target: jnp.sum(y, axis=-1)  # noqa: E731
    carry, value, slopes = online.gradient(cell, params, jnp.ones((0, 4, 2)), per_row, method=method)
    assert carry.state.hidden.shape == (0, 3) and value == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(slopes))


class Phase(js.Cell):
    """A cell of a complex state beside a real one."""

    input_size: int = 2

    def init(self, key):
        return jnp.ones(3)

    def initial_state(self, params, batch_shape=()):
        zeros = jnp.zeros((*batch_shape, 3))
        return zeros, jax.lax.complex(zeros, zeros)

    def step(self, params, state, x, key=None):
        return (state[0] + params, state[1] * 1j), state[0]


def test_complex_states_are_refused():
    cell = Phase()
    params, xs = cell.init(None), jnp.ones((4, 2))
    complaint = r"the state holds complex ones: .*complex128\[3\]"
    with pytest.raises(TypeError, match=complaint):
        online.gradient(cell, params, xs, lambda y, target: jnp.sum(y))
    with pytest.raises(TypeError, match=complaint):
        js.diagnostics.lyapunov_exponents(cell, params, xs)
    with pytest.raises(TypeError, match=complaint):
        js.diagnostics.state_gradients(cell, params, xs, jnp.sum)


def test_errors():
    cell = js.Elman(2, 3)
    params, xs, targets, _ = problem(cell)
    with pytest.raises(ValueError, match='online learning is "rtrl" or "snap1", got'):
        online.start(cell, params, method="bptt")
    stack = CELLS["stack"]
    with pytest.raises(TypeError, match="units mix within a step.*Stack"):
        online.start(stack, stack.init(jax.random.key(0)), method="snap1")
    cell = js.Stack((js.LSTM(2, 2), js.GRU(2, 3)))
    with pytest.raises(TypeError, match="snap1 needs params and a state whose last axis is the units.*Stack"):
        online.start(cell, cell.init(jax.random.key(0)), method="snap1")
    cell = js.Elman(2, 3)
    with pytest.raises(ValueError, match=r"targets \[\*batch, time, ...\] = \(2, 7\), got float64\[2,6,3\]"):
        online.gradient(cell, params, xs, loss, targets[:, 1:])
    carry = online.start(cell, params, (ROWS,), method="snap1")
    with pytest.raises(ValueError, match="influences of another cell or method.*with the same cell, batch axes and"):
        online.gradient(cell, params, xs, loss, targets, carry)
    with pytest.raises(ValueError, match=r"loss of one step needs to give \[\*batch\] = \(2,\), it gave \(2, 3\)"):
        online.gradient(cell, params, xs, lambda y, target: y)
