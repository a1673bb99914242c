"""The textbooks' equations, once in NumPy and column vectors, equal `unroll` and `jax.grad` in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxseq as js
from jaxseq import losses
from tests import numbers

TIME, INPUT, HIDDEN, CLASSES = 5, 3, 4, 6

pytestmark = pytest.mark.usefixtures("float64")


def random(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


close = functools.partial(numbers.close, tolerance=1e-10)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))  # of complex numbers as well, for complex steps


# The simple recurrent network: Goodfellow, Bengio and Courville, Deep Learning, 2016, section 10.2.

XS, TARGETS, START = random(TIME, INPUT), np.array([3, 0, 5, 1, 1]), random(HIDDEN)
WEIGHTS = {
    "U": random(HIDDEN, INPUT),
    "W": random(HIDDEN, HIDDEN) / 2,
    "V": random(CLASSES, HIDDEN),
    "b": random(HIDDEN, seed=1),
    "c": random(CLASSES),
}
NETWORK = js.Stack((js.Elman(INPUT, HIDDEN), js.Dense(HIDDEN, CLASSES)))


def textbook_forward(U, W, V, b, c, xs, h):
    """Equations 10.8 to 10.11: the hidden states h(0) ... h(τ) and the probabilities of each step."""
    hs, probabilities = [h], []
    for x in xs:
        a = b + W @ hs[-1] + U @ x
        hs.append(np.tanh(a))
        o = c + V @ hs[-1]
        probabilities.append(np.exp(o) / np.exp(o).sum())
    return hs, probabilities


def textbook_backward(weights, xs, targets, h):
    """Equations 10.18 to 10.28, down to h(0); the gradient of each weight is given for each step, before the sum."""
    hs, probabilities = textbook_forward(**weights, xs=xs, h=h)
    W, V = weights["W"], weights["V"]
    grad_h = np.zeros(HIDDEN)  # what comes from the later steps: nothing at the last one, equation 10.19
    steps = []
    for t in reversed(range(len(xs))):
        grad_o = probabilities[t] - np.eye(CLASSES)[targets[t]]
        grad_h = grad_h + V.T @ grad_o
        grad_a = (1 - hs[t + 1] ** 2) * grad_h
        outer = {"U": np.outer(grad_a, xs[t]), "W": np.outer(grad_a, hs[t]), "V": np.outer(grad_o, hs[t + 1])}
        steps.insert(0, {**outer, "b": grad_a, "c": grad_o})
        grad_h = W.T @ grad_a
    return {name: np.stack([step[name] for step in steps]) for name in weights}, grad_h


def network_params(U, W, V, b, c):
    """The textbook's weights as the params of `NETWORK`."""
    elman = js.GatedParams(input_kernel=U.T[:, None], recurrent_kernel=W.T[:, None], bias=b[None])
    return elman, js.DenseParams(kernel=V.T, bias=c)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 2), has_aux=True)
def network_gradient(weights, xs, h):
    state, logits = NETWORK.unroll(network_params(**weights), xs, (js.ElmanState(h), ()))
    return losses.cross_entropy(logits, TARGETS).sum(), (state[0].hidden, jax.nn.softmax(logits))


def test_elman_with_softmax_is_the_textbooks():
    hs, probabilities = textbook_forward(**WEIGHTS, xs=XS, h=START)
    (loss, values), _ = network_gradient(WEIGHTS, XS, START)
    close(values, (hs[-1], np.stack(probabilities)))
    close(loss, -np.log([p[y] for p, y in zip(probabilities, TARGETS, strict=True)]).sum())


def test_gradient_is_back_propagation_through_time():
    steps, grad_h = textbook_backward(WEIGHTS, XS, TARGETS, START)
    _, grads = network_gradient(WEIGHTS, XS, START)
    close(grads, ({name: grad.sum(axis=0) for name, grad in steps.items()}, grad_h))


def test_gradient_is_the_sum_over_copies_with_separate_parameters():
    @jax.jit
    @jax.grad
    def unfolded(copies):
        state, loss = (js.ElmanState(START), ()), 0.0
        for t in range(TIME):
            params = network_params(**{name: copy[t] for name, copy in copies.items()})
            state, logits = NETWORK.step(params, state, XS[t])
            loss += losses.cross_entropy(logits, TARGETS[t])
        return loss

    of_copies = unfolded({name: np.stack([weight] * TIME) for name, weight in WEIGHTS.items()})
    close(of_copies, textbook_backward(WEIGHTS, XS, TARGETS, START)[0])
    _, (shared, _) = network_gradient(WEIGHTS, XS, START)
    close({name: copies.sum(axis=0) for name, copies in of_copies.items()}, shared)


# Cells with gates, in the form W [a, x] + b of a kernel for the state beside the input: A. Ng, Sequence Models, 2018.


def elman(w, state, x):
    (a,) = state
    return (np.tanh(w["a"] @ np.concatenate([a, x]) + w["b_a"]),)


def elman_relu(w, state, x):
    (a,) = state
    return (np.maximum((w["a"] @ np.concatenate([a, x]) + w["b_a"]).real, 0),)


def elman_arctan(w, state, x):
    (a,) = state
    return (np.arctan(w["a"] @ np.concatenate([a, x]) + w["b_a"]),)


def simplified_gru(w, state, x):
    (c,) = state
    update = sigmoid(w["u"] @ np.concatenate([c, x]) + w["b_u"])
    candidate = np.tanh(w["c"] @ np.concatenate([c, x]) + w["b_c"])
    return (update * candidate + (1 - update) * c,)


def full_gru(w, state, x):
    (c,) = state
    update = sigmoid(w["u"] @ np.concatenate([c, x]) + w["b_u"])
    relevance = sigmoid(w["r"] @ np.concatenate([c, x]) + w["b_r"])
    candidate = np.tanh(w["c"] @ np.concatenate([relevance * c, x]) + w["b_c"])
    return (update * candidate + (1 - update) * c,)


def lstm(w, state, x):
    a, c = state
    candidate = np.tanh(w["c"] @ np.concatenate([a, x]) + w["b_c"])
    update, forget, output = (sigmoid(w[g] @ np.concatenate([a, x]) + w["b_" + g]) for g in "ufo")
    c = update * candidate + forget * c
    return output * np.tanh(c), c


def peephole_lstm(w, state, x):
    a, c = state
    candidate = np.tanh(w["c"] @ np.concatenate([a, x]) + w["b_c"])
    update, forget, output = (sigmoid(w[g] @ np.concatenate([a, x]) + w["p_" + g] * c + w["b_" + g]) for g in "ufo")
    c = update * candidate + forget * c
    return output * np.tanh(c), c


def gers_peephole_lstm(w, state, x):
    a, previous = state
    ax = np.concatenate([a, x])
    c = sigmoid(w["f"] @ ax + w["p_f"] * previous + w["b_f"]) * previous
    c = c + sigmoid(w["u"] @ ax + w["p_u"] * previous + w["b_u"]) * np.tanh(w["c"] @ ax + w["b_c"])
    return sigmoid(w["o"] @ ax + w["p_o"] * c + w["b_o"]) * np.tanh(c), c


def coupled_lstm(w, state, x):
    a, c = state
    ax = np.concatenate([a, x])
    forget = sigmoid(w["f"] @ ax + w["b_f"])
    c = forget * c + (1 - forget) * np.tanh(w["c"] @ ax + w["b_c"])
    return sigmoid(w["o"] @ ax + w["b_o"]) * np.tanh(c), c


def gated_params(w, gates):
    """The kernels `w[g]` of [a, x], split and in the order `gates`; "-u" is the kernel of 1 - σ(u)."""
    blocks = [-w[g[1:]] if g[0] == "-" else w[g] for g in gates]
    biases = [-w["b_" + g[1:]] if g[0] == "-" else w["b_" + g] for g in gates]
    return js.GatedParams(
        input_kernel=jnp.stack([block[:, HIDDEN:].T for block in blocks], axis=1),
        recurrent_kernel=jnp.stack([block[:, :HIDDEN].T for block in blocks], axis=1),
        bias=jnp.stack(biases),
    )


def peephole_params(w, gates):
    return js.PeepholeLSTMParams(*gated_params(w, gates), peepholes=jnp.stack([w["p_u"], w["p_f"], w["p_o"]]))


LSTM_GATES = ("u", "f", "c", "o")
TEXTBOOK_CELLS = {
    "concatenated": (elman, js.Elman(INPUT, HIDDEN), gated_params, ("a",)),
    "simplified GRU": (simplified_gru, js.MinimalGRU(INPUT, HIDDEN), gated_params, ("-u", "c")),
    "full GRU": (full_gru, js.GRUv1(INPUT, HIDDEN), gated_params, ("r", "-u", "c")),
    "LSTM": (lstm, js.LSTM(INPUT, HIDDEN), gated_params, LSTM_GATES),
    "peephole LSTM": (
        peephole_lstm,
        js.PeepholeLSTM(INPUT, HIDDEN, output_gate_sees="previous"),
        peephole_params,
        LSTM_GATES,
    ),
    "peephole LSTM of Gers": (gers_peephole_lstm, js.PeepholeLSTM(INPUT, HIDDEN), peephole_params, LSTM_GATES),
    "coupled LSTM": (coupled_lstm, js.CoupledLSTM(INPUT, HIDDEN), gated_params, ("f", "c", "o")),
    "function": (elman_arctan, js.Elman(INPUT, HIDDEN, activation=jnp.arctan), gated_params, ("a",)),
}


def fold(step, w, xs, state):
    outputs = []
    for x in xs:
        state = step(w, state, x)
        outputs.append(state[0])
    return np.stack(outputs), state


def complex_step_gradient(f, tree):
    """The gradient of an analytic real function by Im f(x + iε) / ε, exact to rounding: nothing is subtracted."""
    leaves, treedef = jax.tree.flatten(tree)
    grads = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, grad in enumerate(grads):
        for index in np.ndindex(grad.shape):
            moved = [value.astype(complex) for value in leaves]
            moved[leaf][index] += 1e-30j
            grad[index] = f(treedef.unflatten(moved)).imag / 1e-30
    return treedef.unflatten(grads)


@pytest.mark.parametrize("name", TEXTBOOK_CELLS)
def test_gated_cells_are_the_textbooks(name):
    step, cell, convert, gates = TEXTBOOK_CELLS[name]
    letters = [gate.lstrip("-") for gate in gates]
    w = {g: random(HIDDEN, HIDDEN + INPUT, seed=ord(g)) / 2 for g in letters}
    w |= {"b_" + g: random(HIDDEN, seed=ord(g)) for g in letters}
    if convert is peephole_params:
        w |= {"p_" + g: random(HIDDEN, seed=100 + ord(g)) for g in "ufo"}
    start = tuple(random(2, HIDDEN))[: 2 if "LSTM" in name else 1]
    weigh_ys, weigh_state = random(TIME, HIDDEN), random(HIDDEN, seed=2)

    def textbook_loss(arguments):
        ys, state = fold(step, *arguments)
        return (ys * weigh_ys).sum() + (state[-1] * weigh_state).sum()

    @jax.jit
    def unrolled(w, xs, start):
        state_type = type(jax.eval_shape(cell.initial_state, convert(w, gates)))
        state, ys = cell.unroll(convert(w, gates), xs, state_type(*start))
        return (ys * weigh_ys).sum() + (state[-1] * weigh_state).sum(), (ys, tuple(state))

    grads, values = jax.grad(unrolled, argnums=(0, 1, 2), has_aux=True)(w, XS, start)
    close(values, fold(step, w, XS, start))
    close(grads, complex_step_gradient(textbook_loss, (w, XS, start)))


def test_relu_is_the_textbooks():
    w = {"a": random(HIDDEN, HIDDEN + INPUT), "b_a": random(HIDDEN)}
    cell = js.Elman(INPUT, HIDDEN, activation="relu")
    _, ys = cell.unroll(gated_params(w, ("a",)), XS, js.ElmanState(START))
    close(ys, fold(elman_relu, w, XS, (START,))[0])


# Symbols.


def test_one_hot_inputs_read_rows_of_the_kernel():
    vocab = 7
    tokens = np.random.default_rng(0).integers(0, vocab, size=(2, TIME))
    one_hot = js.Stack((js.OneHot(vocab), js.Elman(vocab, HIDDEN)))
    embed = js.Stack((js.Embed(vocab, HIDDEN), js.Elman(HIDDEN, HIDDEN)))
    params = js.GatedParams(random(vocab, 1, HIDDEN), random(HIDDEN, 1, HIDDEN), random(1, HIDDEN))
    identity = params._replace(input_kernel=np.eye(HIDDEN)[:, None])
    of_rows = embed.unroll((js.EmbedParams(params.input_kernel[:, 0]), identity), tokens)
    close(one_hot.unroll(((), params), tokens), of_rows)


def test_three_hidden_units_learn_hello():
    h, e, l, o = range(4)  # noqa: E741
    cell = js.Stack((js.OneHot(4), js.Elman(4, 3), js.Dense(3, 4)))
    optimizer = optax.adam(0.05)

    def loss(params):
        _, logits = cell.unroll(params, jnp.array([h, e, l, l]))
        return losses.cross_entropy(logits, jnp.array([e, l, l, o])).sum()

    def descend(carry, _):
        params, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    def say(carry, _):
        params, state, token = carry
        state, logits = cell.step(params, state, token)
        token = jnp.argmax(logits)
        return (params, state, token), token

    @jax.jit
    @jax.vmap
    def learn_and_continue(key):
        params = cell.init(key)
        (params, _), _ = jax.lax.scan(descend, (params, optimizer.init(params)), length=300)
        return jax.lax.scan(say, (params, cell.initial_state(params), jnp.array(h)), length=4)[1]

    continued = learn_and_continue(jax.random.split(jax.random.key(0), 3))
    assert continued.tolist() == [[e, l, l, o]] * 3


# A dynamical system without inputs: Goodfellow et al., equations 10.1 to 10.3.


class Logistic(js.Cell):
    """s(t) = f(s(t - 1); θ) with f(s; θ) = θ s (1 - s)."""

    input_rank = None

    def init(self, key):
        return jnp.array(3.7)

    def initial_state(self, params, batch_shape=()):
        return jnp.full(batch_shape, 0.5, params.dtype)

    def step(self, params, state, x, key=None):
        state = params * state * (1 - state)
        return state, state


def test_three_steps_without_inputs_are_three_applications():
    def f(s):
        return 3.7 * s * (1 - s)

    s = np.array([0.1, 0.6])
    state, ys = Logistic().unroll(3.7, None, s, length=3)
    close(state, f(f(f(s))))
    close(ys, np.stack([f(s), f(f(s)), f(f(f(s)))], axis=-1))
