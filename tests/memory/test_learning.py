"""Machines whose controllers remember nothing by themselves learn what needs a memory."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxseq as js

KEY = jax.random.key(0)


def trained(cell, loss, steps, rate):
    """The mean of the last losses of some steps of Adam."""
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))

    def update(carry, key):
        params, moments = carry
        value, slope = jax.value_and_grad(loss)(params, key)
        updates, moments = optimizer.update(slope, moments)
        return (optax.apply_updates(params, updates), moments), value

    params = cell.init(KEY)
    run = jax.jit(lambda carry: jax.lax.scan(update, carry, jax.random.split(KEY, steps))[1])
    return run((params, optimizer.init(params)))[-10:].mean()


@pytest.mark.slow
def test_a_dnc_learns_to_copy():
    """Three pairs of bits, a mark, and then the pairs again; by chance it is ln 2 = 0.69 a bit."""
    controller = js.Stack((js.Dense(3 + 6, 24), js.Map("tanh")))
    cell = js.Stack((js.DNC(controller, memory_size=6, word_size=6), js.Dense(24 + 6, 2)))

    def loss(params, key):
        bits = jax.random.bernoulli(key, shape=(16, 3, 2)).astype(float)
        mark = jnp.zeros((16, 7, 1)).at[:, 3].set(1)
        xs = jnp.concatenate([jnp.pad(bits, ((0, 0), (0, 4), (0, 0))), mark], axis=2)
        return optax.sigmoid_binary_cross_entropy(cell.unroll(params, xs)[1][:, 4:], bits).mean()

    assert trained(cell, loss, 400, 1e-2) < 0.02


@pytest.mark.slow
def test_a_stack_learns_to_count():
    """Of a^n b^n, and then the end, all is known from the first b on, if n is."""
    controller = js.Stack((js.Dense(3 + 1, 8), js.Map("sigmoid")))
    cell = js.Stack((js.OneHot(3), js.StackRNN(controller, memory_size=8), js.Dense(8 + 1, 3)))

    def loss(params, key):
        count, steps = jax.random.randint(key, (16, 1), 1, 5), jnp.arange(11)
        tokens = jnp.where(steps < count, 0, jnp.where(steps < 2 * count, 1, 2))
        losses = js.losses.cross_entropy(cell.unroll(params, tokens[:, :-1])[1], tokens[:, 1:])
        return js.losses.mean(losses, (steps[:-1] >= count) & (steps[:-1] < 2 * count))

    assert trained(cell, loss, 600, 2e-2) < 0.02
