"""Memory machines beside NumPy, written from the papers' equations, one sequence, head and place after the other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.memory import addressing
from jaxseq.memory.dnc import allocation
from tests.numbers import close, random_params

KEY = jax.random.key(0)
TIME = 7


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softplus(z):
    return np.log(1 + np.exp(z))


def similarity(key, word):
    return key @ word / np.sqrt((key @ key + 1e-6) * (word @ word + 1e-6))


def by_content(memory, key, strength):
    return softmax(np.array([strength * similarity(key, word) for word in memory]))


class Reader:
    """Takes numbers off a vector, one part after the other."""

    def __init__(self, numbers):
        self.rest = numbers

    def __call__(self, *shape):
        size = int(np.prod(shape))
        part, self.rest = self.rest[:size], self.rest[size:]
        return part.reshape(shape) if shape else part[0]


def controlled(params, xs, reads, access):
    """A machine with an Elman controller: the outputs, given what the memory does with the interface."""
    cell, kernel, bias = params
    hidden, ys = np.zeros(cell.bias.shape[-1]), []
    for x in xs:
        z = np.concatenate([x, reads.ravel()])
        hidden = np.tanh(z @ cell.input_kernel[:, 0] + hidden @ cell.recurrent_kernel[:, 0] + cell.bias[0])
        reads = access(Reader(hidden @ kernel + bias))
        ys.append(np.concatenate([hidden, reads.ravel()]))
    return np.array(ys)


def numpy_ntm(params, xs, places, word, readers, writers, reach):
    memory = np.full((places, word), 1e-6)
    at_0 = np.eye(places)[0]
    weights = {"read": [at_0] * readers, "write": [at_0] * writers}

    def address(before, key, strength, gate, shift, power):
        w = sigmoid(gate) * by_content(memory, key, softplus(strength)) + (1 - sigmoid(gate)) * before
        kernel = softmax(shift)
        turned = np.zeros(places)
        for i in range(places):
            for n in range(-reach, reach + 1):
                turned[i] += w[(i - n) % places] * kernel[n + reach]
        raised = turned ** (1 + softplus(power))
        return raised / raised.sum()

    def access(take):
        nonlocal memory

        def heads(count):
            return [take(count, word), take(count), take(count), take(count, 2 * reach + 1), take(count)]

        read, write = heads(readers), heads(writers)
        erase, add = sigmoid(take(writers, word)), take(writers, word)
        assert not take.rest.size
        weights["write"] = [address(w, *(part[h] for part in write)) for h, w in enumerate(weights["write"])]
        for h in range(writers):
            memory = memory * (1 - np.outer(weights["write"][h], erase[h]))
        for h in range(writers):
            memory = memory + np.outer(weights["write"][h], add[h])
        weights["read"] = [address(w, *(part[h] for part in read)) for h, w in enumerate(weights["read"])]
        return np.array(weights["read"]) @ memory

    ys = controlled(params, xs, np.zeros((readers, word)), access)
    return ys, memory, np.array(weights["read"]), np.array(weights["write"])


def numpy_dnc(params, xs, places, word, readers):
    memory, usage, precedence = np.zeros((places, word)), np.zeros(places), np.zeros(places)
    links, written, read = np.zeros((places, places)), np.zeros(places), np.zeros((readers, places))

    def access(take):
        nonlocal memory, usage, precedence, links, written, read
        keys, strengths, free, modes = take(readers, word), take(readers), take(readers), take(readers, 3)
        key, strength, erase, add = take(word), take(), sigmoid(take(word)), take(word)
        allocate, write = sigmoid(take()), sigmoid(take())
        assert not take.rest.size

        retention = np.ones(places)
        for r in range(readers):
            retention *= 1 - sigmoid(free[r]) * read[r]
        usage = (usage + written - usage * written) * retention
        order = sorted(range(places), key=lambda place: usage[place])  # a stable sort
        allocation, product = np.zeros(places), 1.0
        for place in order:
            allocation[place] = (1 - usage[place]) * product
            product *= usage[place]
        content = by_content(memory, key, 1 + softplus(strength))
        written = write * (allocate * allocation + (1 - allocate) * content)
        memory = memory * (1 - np.outer(written, erase)) + np.outer(written, add)
        before = links
        links = np.zeros((places, places))
        for i in range(places):
            for j in range(places):
                if i != j:
                    links[i, j] = (1 - written[i] - written[j]) * before[i, j] + written[i] * precedence[j]
        precedence = (1 - written.sum()) * precedence + written
        for r in range(readers):
            backward, content, forward = softmax(modes[r])
            read[r] = (
                backward * links.T @ read[r]
                + content * by_content(memory, keys[r], 1 + softplus(strengths[r]))
                + forward * links @ read[r]
            )
        return read @ memory

    ys = controlled(params, xs, np.zeros((readers, word)), access)
    return ys, memory, usage, precedence, links, written, read


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("heads", "reach"), [((1, 1), 1), ((2, 3), 2), ((3, 2), 0)])
def test_ntm_is_that_of_the_paper(heads, reach):
    random, (readers, writers) = np.random.default_rng(0), heads
    cell = js.NTM(js.Elman(2 + 3 * readers, 4), 6, 3, read_heads=readers, write_heads=writers, shift=reach)
    params, xs = random_params(random, cell), random.normal(size=(TIME, 2))
    state, ys = cell.unroll(params, xs)
    expected = numpy_ntm(params, xs, 6, 3, readers, writers, reach)
    close((ys, state.memory, state.read_weights, state.write_weights), expected, 1e-11)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("readers", [1, 2])
def test_dnc_is_that_of_the_paper(readers):
    random = np.random.default_rng(1)
    cell = js.DNC(js.Elman(2 + 3 * readers, 4), 5, 3, read_heads=readers)
    params, xs = random_params(random, cell), random.normal(size=(TIME, 2))
    state, ys = cell.unroll(params, xs)
    close((ys, *state[1:-1]), numpy_dnc(params, xs, 5, 3, readers), 1e-11)


def test_weights_are_states_to_look_at():
    cell = js.States(js.NTM(js.LSTM(2 + 3, 4), 5, 3, write_heads=2))
    params = cell.init(KEY)
    _, (states, _) = cell.unroll(params, jnp.ones((2, 6, 2)))
    assert states.read_weights.shape == (2, 6, 1, 5) and states.write_weights.shape == (2, 6, 2, 5)
    np.testing.assert_allclose(states.read_weights.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("machine", [js.NTM, js.DNC])
def test_any_cell_controls(machine):
    """No recurrence, several layers, a vector attached: what a controller can do goes on inside a machine."""
    feed_forward = js.Stack((js.Dense(2 + 3, 4), js.Map("tanh")))
    deep = js.Stack((js.Skip(js.GRU(2 + 3, 4)), js.Dropout(0.5), js.LSTM(2 + 3 + 4, 4)))
    conditioned = js.Conditioned(js.GRU(2 + 3 + 5, 4), 5)
    xs = jnp.ones((2, 6, 2))
    for controller in (feed_forward, deep, conditioned):
        cell = machine(controller, 6, 3)
        params = jax.eval_shape(lambda cell=cell: cell.attach(cell.init(KEY), jnp.ones((2, 5))))
        assert cell.input_size == 2 and cell.output_size == 4 + 3
        assert jax.eval_shape(cell.unroll, params, xs)[1].shape == (2, 6, 7)


def test_an_initial_memory_is_learned():
    cell = js.LearnedState(js.NTM(js.Elman(2 + 3, 4), 5, 3))
    params = cell.init(KEY)
    gradients = jax.grad(lambda params: jnp.square(cell.unroll(params, jnp.ones((6, 2)))[1]).sum())(params)
    assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in gradients.state)
    with pytest.raises(TypeError, match="those of .*DNC.* belong together"):
        js.LearnedState(js.DNC(js.Elman(2 + 3, 4), 5, 3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("machine", [js.NTM, js.DNC])
def test_extreme_interfaces_give_finite_numbers(machine, dtype):
    """Keys of zeros and huge ones, powers and strengths that overflow a power or an exponential."""
    cell = machine(js.Elman(2 + 3, 4), 5, 3)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), cell.init(KEY))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        state, ys = cell.unroll(params, jnp.ones((6, 2), dtype))
        return ys[:, :4].sum() + sum(leaf.sum() for leaf in state[2:-1])

    for scale in (0.0, 1e3, -1e3, 1e6):
        value, gradients = loss(params._replace(interface_kernel=params.interface_kernel * jnp.asarray(scale, dtype)))
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)), scale


def test_sharpening_of_weights_that_are_none():
    weights = jnp.array([[0.0, 1.0, 0.0], [1e-30, 1e-30, 1.0], [0.5, 0.25, 0.25]])
    for power in (1.0, 3.0, 1e15):
        sharp, slope = jax.vjp(jax.jit(addressing.sharpen), weights, jnp.full(3, power))
        np.testing.assert_allclose(sharp.sum(axis=-1), 1, rtol=1e-6)
        assert all(jnp.isfinite(leaf).all() for leaf in slope(jnp.arange(9.0).reshape(3, 3)))
    np.testing.assert_allclose(addressing.sharpen(weights, jnp.full(3, 2.0))[2], [2 / 3, 1 / 6, 1 / 6], rtol=1e-6)


def test_a_place_of_zeros_has_no_direction():
    memory, keys = jnp.zeros((4, 3)), jnp.zeros((2, 3))
    weights, slope = jax.vjp(addressing.content_weights, keys, jnp.ones(2), memory)
    np.testing.assert_allclose(weights, 0.25)
    assert all(jnp.isfinite(leaf).all() for leaf in slope(jnp.ones((2, 4)).at[0, 0].set(3.0)))


@pytest.mark.usefixtures("float64")
def test_allocation_is_a_product_over_what_is_less_used():
    random = np.random.default_rng(2)
    for usage in (random.uniform(size=6), np.zeros(6), np.ones(6), np.array([1, 0, 0.5, 0.5, 0, 1.0])):
        expected = []
        for i in range(6):
            less = [usage[j] for j in range(6) if (usage[j], j) < (usage[i], i)]
            expected.append((1 - usage[i]) * np.prod(less))
        np.testing.assert_allclose(allocation(jnp.asarray(usage)), expected, atol=1e-14)
        assert jnp.isfinite(jax.jacobian(allocation)(jnp.asarray(usage))).all()


REFUSED = {
    "tokens": (
        lambda: js.NTM(js.Embed(3, 4), 5, 3),
        "embedded before it: Stack((Embed(vocab_size, size), NTM(cell",
    ),
    "sizes": (lambda: js.NTM(js.Map("tanh"), 5, 3), "needs a controller that reads and gives vectors of known sizes"),
    "input": (lambda: js.DNC(js.LSTM(3, 4), 5, 3), "reads 3 in all: give it the input_size of both together."),
    "heads": (lambda: js.NTM(js.LSTM(8, 4), 5, 3, read_heads=0), "NTM needs read_heads >= 1, got 0."),
    "writers": (lambda: js.NTM(js.LSTM(8, 4), 5, 3, write_heads=0), "NTM needs write_heads >= 1, got 0."),
    "readers": (lambda: js.DNC(js.LSTM(8, 4), 5, 3, read_heads=-1), "DNC needs read_heads >= 1, got -1."),
    "places": (lambda: js.NTM(js.LSTM(8, 4), 2, 3), "got shift=1 and memory_size=2."),
    "shift": (lambda: js.NTM(js.LSTM(8, 4), 5, 3, shift=-1), "got shift=-1 and memory_size=5."),
    "layer": (lambda: js.NTM(js.Bidirectional(js.LSTM(8, 4), js.LSTM(8, 4)), 5, 3), "it reads whole sequences"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


def test_inputs_of_another_size():
    cell = js.NTM(js.LSTM(2 + 3, 4), 5, 3)
    params = cell.init(KEY)
    with pytest.raises(ValueError, match="got inputs with 5 features"):
        cell.step(params, cell.initial_state(params), jnp.ones(5))
    with pytest.raises(TypeError, match="params of float32 but got inputs of bfloat16"):
        cell.step(params, cell.initial_state(params), jnp.ones(2, jnp.bfloat16))
