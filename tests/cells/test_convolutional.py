"""Convolutional cells against flax, and against equations written with torch's convolutions."""

import functools
import re

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests.numbers import close
from tests.peers import peer

BATCH, TIME, HIDDEN = 2, 4, 3
RNG = np.random.default_rng(0)
SHAPES = [((5, 2), (3,)), ((4, 3, 2), (3, 2)), ((3, 2, 4, 1), (2, 3, 1))]


def random(cell):
    shapes = jax.eval_shape(cell.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), shapes)
    state = jax.eval_shape(lambda params: cell.initial_state(params, (BATCH,)), params)
    state = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), state)
    return params, RNG.normal(size=(BATCH, TIME, *cell.input_shape)).astype(np.float32), state


@pytest.mark.parametrize("shape, window", SHAPES)
def test_lstm_equals_flax(shape, window):
    cell = js.ConvLSTM(shape, HIDDEN, window)
    params, xs, state = random(cell)

    def flat(weights):  # flax's gates are i, g, f, o, in one axis with the hidden units
        return weights[..., [0, 2, 1, 3], :].reshape(*weights.shape[:-2], -1)

    def kernel(weights):
        return np.moveaxis(flat(weights), 0, -2)

    bias = params.bias - np.array([[0], [1], [0], [0]], np.float32)  # flax adds 1 to the forget gate
    weights = {
        "ih": {"kernel": kernel(params.input_kernel), "bias": flat(bias)},
        "hh": {"kernel": kernel(params.recurrent_kernel), "bias": np.zeros(4 * HIDDEN, np.float32)},
    }
    rnn = nn.RNN(nn.ConvLSTMCell(HIDDEN, window), return_carry=True)
    (last_cell, last_hidden), theirs = rnn.apply(
        {"params": {"cell": weights}}, xs, initial_carry=(state.cell, state.hidden)
    )
    state, ys = cell.unroll(params, xs, state)
    close((state.hidden, state.cell, ys), (last_hidden, last_cell, theirs))


def gru_of_torch(params, xs, hidden):
    """The paper's equations, whose update gate lets in: h' = (1 - z) h + z n."""
    torch = peer("torch")
    convolution = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}

    def star(kernel, field):
        return convolution[field.ndim - 2](field, kernel, padding="same")

    w_r, w_z, w_n = (params.input_kernel[..., gate, :].movedim(-1, 0) for gate in range(3))
    u_r, u_z, u_n = (params.recurrent_kernel[..., gate, :].movedim(-1, 0) for gate in range(3))
    b_r, b_z, b_n = (params.bias[gate].reshape(1, -1, *[1] * (xs.ndim - 3)) for gate in range(3))
    hidden, ys = hidden.movedim(-1, 1), []
    for x in xs.movedim(-1, 2).unbind(1):
        z = torch.sigmoid(-(star(w_z, x) + star(u_z, hidden) + b_z))
        r = torch.sigmoid(star(w_r, x) + star(u_r, hidden) + b_r)
        n = torch.tanh(star(w_n, x) + star(u_n, r * hidden) + b_n)
        hidden = (1 - z) * hidden + z * n
        ys.append(hidden.movedim(1, -1))
    return torch.stack(ys, 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, about a copy
@pytest.mark.parametrize("shape, window", SHAPES)
def test_gru_equals_its_equations_in_torch(shape, window):
    torch = peer("torch")
    cell = js.ConvGRU(shape, HIDDEN, window)
    given = params, xs, state = random(cell)
    weigh = RNG.normal(size=(BATCH, TIME, *shape[:-1], HIDDEN)).astype(np.float32)
    leaves, tree = jax.tree.flatten(given)
    tensors = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    params, xs, state = tree.unflatten(tensors)
    theirs = gru_of_torch(params, xs, state.hidden)
    gradients = tree.unflatten(torch.autograd.grad((theirs * torch.tensor(weigh)).sum(), tensors))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def ours(params, xs, state):
        state, ys = cell.unroll(params, xs, state)
        return (ys * weigh).sum(), ys

    our_gradients, ys = ours(*given)
    close(ys, theirs.detach().numpy())
    close(our_gradients, jax.tree.map(lambda leaf: leaf.numpy(), gradients))


def test_convolutions_leave_the_loop(monkeypatch):
    """That of the inputs is taken for all steps at once, except on a CPU, and so are the gradients of both kernels."""
    cell = js.ConvLSTM((16, 16, 8), 8)
    params, xs = cell.init(jax.random.key(0)), jnp.zeros((4, 6, 16, 16, 8))

    def loss(params, xs):
        return cell.unroll(params, xs)[1].sum()

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert list(convolutions(jax.make_jaxpr(loss)(params, xs).jaxpr)) == [False, True]
    both = list(convolutions(jax.make_jaxpr(jax.grad(loss))(params, xs).jaxpr))
    assert both.count(True) == 2  # the state forward, and its cotangent backward


def convolutions(jaxpr, in_loop=False):
    """For each convolution, whether it is in a loop."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield in_loop
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from convolutions(inner, in_loop or equation.primitive.name == "scan")


def test_first_values():
    params = js.ConvLSTM((9, 9, 16), 32, (5, 3)).init(jax.random.key(0))
    assert params.bias.tolist() == np.repeat([[0.0], [1.0], [0.0], [0.0]], 32, 1).tolist()
    columns = params.recurrent_kernel.transpose(3, 0, 1, 2, 4).reshape(4, -1, 32)
    close(columns.swapaxes(1, 2) @ columns, np.tile(np.eye(32), (4, 1, 1)))
    limit = np.sqrt(6 / (15 * (16 + 32)))
    assert 0.99 * limit < abs(params.input_kernel).max() <= limit


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_errors():
    cell = js.ConvLSTM((4, 3, 2), HIDDEN)
    for shape in [(4,), (1, 1, 1, 1, 1), (4, 0, 1), (4, 3.0, 1), 4]:
        with says(ValueError, "needs an input_shape (*places, channels) with one to three axes of places, such as"):
            js.ConvLSTM(shape, HIDDEN)
    for size in [(3,), (3, 3, 3), 0, (3, 2.0)]:
        with says(ValueError, "needs a kernel_size that is one number, or one for each of the 2 axes of places, got"):
            js.ConvGRU((4, 3, 2), HIDDEN, size)
    with says(ValueError, "got inputs whose steps have the shape (3, 4, 2); they need its input_shape (4, 3, 2)"):
        cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 3, 4, 2)))
    with says(ValueError, "reads inputs [*batch, time, *features] with features of rank 3"):
        cell.unroll(cell.init(jax.random.key(0)), jnp.ones((4, 3, 2)))
    with says(ValueError, "needs 2 features, but it is given 3"):
        js.Stack((cell, js.ConvGRU((4, 3, 2), 1)))
