"""Penalties against NumPy, and what they leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxseq as js
from jaxseq import regularizers

pytestmark = pytest.mark.usefixtures("float64")


CELL = js.Stack((js.Embed(4, 2), js.ProjectedLSTM(2, 4, 3), js.Residual(js.GRU(3, 3)), js.Dense(3, 4)))


def test_kernels_alone_are_punished_and_decayed():
    params = jax.tree.map(lambda leaf: leaf + 2.0, CELL.init(jax.random.key(0)))
    kernels = [
        *(params[1].input_kernel, params[1].recurrent_kernel, params[1].projection_kernel),
        *(params[2].input_kernel, params[2].recurrent_kernel, params[3].kernel),
    ]
    np.testing.assert_allclose(regularizers.l1(CELL, params), sum(np.abs(k).sum() for k in kernels))
    np.testing.assert_allclose(regularizers.l2(CELL, params), sum(np.square(k).sum() for k in kernels))
    for penalty in (regularizers.l1, regularizers.l2):
        gradient = jax.grad(functools.partial(penalty, CELL))(params)
        touched = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(gradient) if leaf.any()]
        assert len(touched) == 6 and all("kernel" in path for path in touched)
    decay = optax.add_decayed_weights(0.1, mask=functools.partial(regularizers.kernel_mask, CELL))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    np.testing.assert_allclose(updates[3].kernel, 0.1 * params[3].kernel)
    assert not updates[3].bias.any() and not updates[0].embedding.any()


def test_frozen_kernels_and_directions_are_left_alone():
    cell = js.Stack((js.Frozen(js.GRU(2, 3)), js.WeightNorm(js.Stack((js.LSTM(3, 2), js.Dense(2, 1))))))
    params = jax.tree.map(lambda leaf: 2 * leaf, cell.init(jax.random.key(0)))
    lstm, dense = cell.layers[1].inner(params[1])
    kernels = [lstm.input_kernel, lstm.recurrent_kernel, dense.kernel]
    np.testing.assert_allclose(regularizers.l1(cell, params), sum(np.abs(k).sum() for k in kernels))
    np.testing.assert_allclose(regularizers.l2(cell, params), sum(np.square(k).sum() for k in kernels))
    slopes = jax.grad(functools.partial(regularizers.l2, cell))(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(slopes[0]))
    for leaf in jax.tree.leaves(slopes[1].cell):
        np.testing.assert_allclose(leaf, 0, atol=1e-12)

    mask = regularizers.kernel_mask(cell, params)
    decayed = jax.tree.map(lambda leaf, flag: leaf * 0.9 if flag else leaf, params, mask)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), decayed, params)
    assert changed[1].scales == (True,) * 3 and not any(jax.tree.leaves((changed[0], changed[1].cell)))
    for new, old in zip(jax.tree.leaves(cell.layers[1].inner(decayed[1])[1]), (dense.kernel, dense.bias), strict=True):
        np.testing.assert_allclose(new, old * 0.9)  # the bias is 0
    frozen = js.WeightNorm(js.Stack((js.Frozen(js.Elman(2, 3)), js.Dense(3, 1))))
    assert regularizers.kernel_mask(frozen, frozen.init(jax.random.key(0))).scales == (False, False, True)


def test_activation_penalties_of_the_steps_that_count():
    ys = np.random.default_rng(0).normal(size=(2, 5, 3))
    mask, reset = np.ones((2, 5), bool), np.zeros((2, 5), bool)
    mask[0, 3:], mask[1, 2], reset[1, 1] = False, False, True
    ys[~mask] = 1e3
    kept = ys[mask]
    np.testing.assert_allclose(regularizers.activation(ys, mask), np.mean(kept**2))
    np.testing.assert_allclose(regularizers.activation(ys), np.mean(ys**2))
    changes = [ys[0, 1] - ys[0, 0], ys[0, 2] - ys[0, 1], ys[1, 4] - ys[1, 3]]
    np.testing.assert_allclose(regularizers.temporal_activation(ys, mask, reset), np.mean(np.square(changes)))
    np.testing.assert_allclose(regularizers.temporal_activation(ys), np.mean(np.diff(ys, axis=1) ** 2))
    assert regularizers.temporal_activation(ys, np.zeros((2, 5), bool)) == 0


def test_nan_at_padding_reaches_neither_values_nor_gradients():
    ys = jax.random.normal(jax.random.key(0), (2, 5, 3))
    mask = jnp.ones((2, 5), bool).at[0, 3:].set(False).at[1, 0].set(False)
    for penalty in (regularizers.activation, regularizers.temporal_activation):
        expected = jax.value_and_grad(penalty)(ys, mask)
        padded = jnp.where(mask[..., None], ys, jnp.nan)
        found = jax.value_and_grad(penalty)(padded, mask)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert found[0] > 0 and not found[1][~mask].any()


def test_constant_flow_of_an_explosion_is_not_0():
    cell = js.Elman(1, 2, activation="identity")
    params = js.initializers.identity(cell, cell.init(jax.random.key(0)), scale=1e200)
    assert not jnp.isfinite(regularizers.constant_flow(cell, params, jnp.zeros((5, 1)), lambda ys: ys[-1].sum()))


def omega(kernel, inputs, hidden, gradients):
    """Pascanu's penalty of a tanh network with the states and gradients given, in NumPy."""
    total = 0.0
    for t in range(len(inputs)):
        new = np.tanh(inputs[t] + hidden[t] @ kernel)
        back = (gradients[t] * (1 - new**2)) @ kernel.T
        total += (np.linalg.norm(back) / np.linalg.norm(gradients[t]) - 1) ** 2
    return total


def states_and_gradients(w, r, xs, last):
    """States h_0 ... h_T of a tanh network, and the gradients that reach h_1 ... h_T from `last` at h_T, in NumPy."""
    hidden, gradients = [np.zeros(3)], [last]
    for x in xs:
        hidden.append(np.tanh(x @ w + hidden[-1] @ r))
    for t in reversed(range(1, len(xs))):
        gradients.insert(0, (gradients[0] * (1 - hidden[t + 1] ** 2)) @ r.T)
    return hidden, gradients


def test_constant_flow_is_that_of_its_paper():
    cell = js.Elman(2, 3)
    params = cell.init(jax.random.key(0))
    xs, last = np.asarray(jax.random.normal(jax.random.key(1), (5, 2))), np.cos(np.arange(3.0))
    w, r = np.asarray(params.input_kernel[:, 0]), np.asarray(params.recurrent_kernel[:, 0])
    hidden, gradients = states_and_gradients(w, r, xs, last)

    def penalty(params, xs, **options):
        return regularizers.constant_flow(cell, params, xs, lambda ys: jnp.sum(ys[..., -1, :] * last), **options)

    np.testing.assert_allclose(penalty(params, xs), omega(r, xs @ w, hidden, gradients), rtol=1e-10)
    gradient = jax.grad(penalty)(params, xs).recurrent_kernel[:, 0]
    for index in np.ndindex(3, 3):
        change = np.zeros((3, 3))
        change[index] = 1e-6
        values = [omega(r + sign * change, xs @ w, hidden, gradients) for sign in (1, -1)]
        np.testing.assert_allclose(gradient[index], (values[0] - values[1]) / 2e-6, atol=1e-7)

    reset, mask = jnp.zeros((2, 5), bool).at[1, 2].set(True), jnp.ones((2, 5), bool).at[0, 0].set(False)
    found = penalty(params, np.stack([xs, xs]), mask=mask, reset=reset)
    hidden, gradients = states_and_gradients(w, r, xs[1:], last)
    np.testing.assert_allclose(found[0], omega(r, xs[1:] @ w, hidden, gradients), rtol=1e-10)
    hidden, gradients = states_and_gradients(w, r, xs[2:], last)
    np.testing.assert_allclose(found[1], omega(r, xs[3:] @ w, hidden[1:], gradients[1:]), rtol=1e-10)


def test_constant_flow_lowers_what_it_measures():
    cell = js.LSTM(2, 4)
    params = js.initializers.forget_bias(cell, cell.init(jax.random.key(0)), 0.0)
    xs = jax.random.normal(jax.random.key(1), (3, 12, 2))

    @jax.jit
    def penalty(params):
        return regularizers.constant_flow(cell, params, xs, lambda ys: jnp.sum(ys[:, -1] ** 2)).mean()

    before, step = penalty(params), jax.jit(jax.grad(penalty))
    for _ in range(30):
        params = jax.tree.map(lambda leaf, slope: leaf - 0.05 * slope, params, step(params))
    assert penalty(params) < before / 2


def test_errors():
    with pytest.raises(TypeError, match=r"Embed.* has no kernel"):
        regularizers.l1(js.Embed(4, 3), js.Embed(4, 3).init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"activation needs outputs \[\*batch, time, features\], got float64\[3\]"):
        regularizers.activation(jnp.ones(3))
    with pytest.raises(ValueError, match=r"got a mask or reset of shape \(3,\)"):
        regularizers.temporal_activation(jnp.ones((3, 4, 2)), jnp.ones(3, bool))
