"""Stacks beside NumPy, written from the paper, and beside a list that is pushed and popped."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests.numbers import close, random_params

KEY = jax.random.key(0)


@pytest.mark.usefixtures("float64")
def test_stacks_are_those_of_the_paper():
    """h_t = σ(U x_t + R h_{t-1} + P s_{t-1}), a_t = softmax(A h_t), the stacks one after the other, place by place."""
    random, count, places, depth, empty = np.random.default_rng(0), 3, 4, 2, -1.0
    cell = js.StackRNN(js.Elman(2 + count * depth, 5, activation="sigmoid"), places, stacks=count, depth=depth)
    params, xs = random_params(random, cell), random.normal(size=(7, 2))
    inner, kernel, bias = params
    h, stacks, ys = np.zeros(5), np.full((count, places), empty), []
    for x in xs:
        z = np.concatenate([x, stacks[:, :depth].ravel()])
        h = 1 / (1 + np.exp(-(z @ inner.input_kernel[:, 0] + h @ inner.recurrent_kernel[:, 0] + inner.bias[0])))
        said = h @ kernel + bias
        after = np.zeros_like(stacks)
        for k in range(count):
            odds = np.exp(said[3 * k : 3 * k + 3])
            push, pop, stay = odds / odds.sum()
            pushed = 1 / (1 + np.exp(-said[3 * count + k]))
            for i in range(places):
                above = pushed if i == 0 else stacks[k, i - 1]
                below = empty if i == places - 1 else stacks[k, i + 1]
                after[k, i] = push * above + pop * below + stay * stacks[k, i]
        stacks = after
        ys.append(np.concatenate([h, stacks[:, :depth].ravel()]))
    state, ours = cell.unroll(params, xs)
    close((ours, state.stacks[..., 0]), (np.array(ys), stacks), 1e-12)


def test_hard_actions_are_those_of_a_stack():
    """A controller that hands on its inputs: push 0.5, 0.75 and 0.25, stay, and pop until nothing is left."""
    logits = {"push": [50.0, 0, 0], "pop": [0, 50.0, 0], "stay": [0, 0, 50.0]}
    wanted = [("push", 0.5), ("push", 0.75), ("stay", 0), ("push", 0.25), *[("pop", 0)] * 4, ("push", 0.5)]
    xs = jnp.array([[*logits[action], np.log(value / (1 - value)) if value else 0.0] for action, value in wanted])
    cell = js.StackRNN(js.Dense(4 + 1, 4), memory_size=3)
    params = cell.init(KEY)
    params = params._replace(
        cell=params.cell._replace(kernel=jnp.eye(5, 4)), interface_kernel=jnp.eye(4), interface_bias=jnp.zeros(4)
    )
    tops, held = [], []
    for action, value in wanted:
        held = [value, *held] if action == "push" else held[action == "pop" :]
        tops.append(held[0] if held else -1.0)
    state, ys = cell.unroll(params, xs)
    np.testing.assert_allclose(ys[:, 4], tops, atol=1e-6)
    np.testing.assert_allclose(state.actions[0], [1, 0, 0], atol=1e-6)


REFUSED = {
    "depth": (lambda: js.StackRNN(js.Elman(9, 4), 3, depth=4), "at most its memory_size, 3, got depth=4."),
    "none": (lambda: js.StackRNN(js.Elman(9, 4), 3, stacks=0), "StackRNN needs stacks >= 1, got 0."),
    "input": (
        lambda: js.StackRNN(js.Elman(2, 4), 3, stacks=2),
        "but Elman(input_size=2, hidden_size=4) reads 2 in all",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
