"""Minimal recurrences against transcriptions of their papers: column vectors, and each unit's letters as printed there.

A transcription is a function of the cell's weights by letters, the state and one input, all of one sequence. `W` with
a letter multiplies the input, `U` with a letter the hidden state, both from the left.
"""

import jax
import numpy as np
import pytest
from scipy.special import expit

import jaxseq as js

BATCH, TIME, INPUT, HIDDEN = 2, 6, 3, 4
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.usefixtures("float64")


def letters(params, inputs, recurrents, biases):
    """The weights by letter, as matrices that stand left of column vectors."""
    named = {f"W{letter}": params.input_kernel[:, i].T for i, letter in enumerate(inputs)}
    named |= {f"U{letter}": params.recurrent_kernel[:, i].T for i, letter in enumerate(recurrents)}
    return named | {f"b{letter}": params.bias[i] for i, letter in enumerate(biases)}


def mgu(params, h, x):
    w = letters(params, "fh", "fh", "fh")
    f = expit(w["Wf"] @ x + w["Uf"] @ h + w["bf"])
    candidate = np.tanh(w["Wh"] @ x + w["Uh"] @ (f * h) + w["bh"])
    return (1 - f) * h + f * candidate


def janet(params, h, x):
    w = letters(params, "fc", "fc", "fc")
    s = w["Uf"] @ h + w["Wf"] @ x + w["bf"]
    candidate = np.tanh(w["Uc"] @ h + w["Wc"] @ x + w["bc"])
    return expit(s) * h + (1 - expit(s - 0.75)) * candidate


def ligru(params, h, x):
    w = letters(params, "zh", "zh", "zh")
    z = expit(w["Wz"] @ x + w["bz"] + w["Uz"] @ h)
    return z * h + (1 - z) * np.maximum(w["Wh"] @ x + w["bh"] + w["Uh"] @ h, 0)


def ugrnn(params, h, x):
    w = letters(params, "gc", "gc", "gc")
    c = np.tanh(w["Uc"] @ h + w["Wc"] @ x + w["bc"])
    g = expit(w["Ug"] @ h + w["Wg"] @ x + w["bg"])
    return g * h + (1 - g) * c


def mut1(params, h, x):
    w = letters(params, "rz", "rh", "rzh")
    z = expit(w["Wz"] @ x + w["bz"])
    r = expit(w["Wr"] @ x + w["Ur"] @ h + w["br"])
    return np.tanh(w["Uh"] @ (r * h) + np.tanh(x) + w["bh"]) * z + h * (1 - z)


def mut2(params, h, x):
    w = letters(params, "zh", "rzh", "rzh")
    z = expit(w["Wz"] @ x + w["Uz"] @ h + w["bz"])
    r = expit(x + w["Ur"] @ h + w["br"])
    return np.tanh(w["Uh"] @ (r * h) + w["Wh"] @ x + w["bh"]) * z + h * (1 - z)


def mut3(params, h, x):
    w = letters(params, "rzh", "rzh", "rzh")
    z = expit(w["Wz"] @ x + w["Uz"] @ np.tanh(h) + w["bz"])
    r = expit(w["Wr"] @ x + w["Ur"] @ h + w["br"])
    return np.tanh(w["Uh"] @ (r * h) + w["Wh"] @ x + w["bh"]) * z + h * (1 - z)


def ind_rnn(params, h, x):
    return np.maximum(params.input_kernel[:, 0].T @ x + params.recurrent_weights * h + params.bias[0], 0)


def antisymmetric(params, h, x):
    w = letters(params, "h", "h", "h")
    matrix = w["Uh"] - w["Uh"].T - 0.3 * np.eye(HIDDEN)
    return h + 0.2 * np.tanh(matrix @ h + w["Wh"] @ x + w["bh"])


def gated_antisymmetric(params, h, x):
    w = letters(params, "zh", "h", "zh")
    matrix = w["Uh"] - w["Uh"].T - 0.3 * np.eye(HIDDEN)
    z = expit(matrix @ h + w["Wz"] @ x + w["bz"])
    return h + 0.2 * z * np.tanh(matrix @ h + w["Wh"] @ x + w["bh"])


def co_rnn(params, state, x):
    y, z = state
    of_y, of_z = np.split(params.recurrent_kernel[:, 0], 2)
    force = np.tanh(of_y.T @ y + of_z.T @ z + params.input_kernel[:, 0].T @ x + params.bias[0])
    z = z + 0.2 * force - 0.2 * 1.5 * y - 0.2 * 0.5 * z
    return y + 0.2 * z, z


def recurrent_highway(params, h, x):
    w = letters(params, "HT", "", "")
    for layer in range(3):
        r_h, r_t = (params.recurrent_kernel[:, 2 * layer + gate].T for gate in range(2))
        b_h, b_t = params.bias[2 * layer : 2 * layer + 2]
        first = 1.0 if layer == 0 else 0.0
        candidate = np.tanh(first * (w["WH"] @ x) + r_h @ h + b_h)
        t = expit(first * (w["WT"] @ x) + r_t @ h + b_t)
        h = candidate * t + h * (1 - t)
    return h


CASES = [
    (js.MGU(INPUT, HIDDEN), mgu),
    (js.JANET(INPUT, HIDDEN, shift=0.75), janet),
    (js.LiGRU(INPUT, HIDDEN), ligru),
    (js.UGRNN(INPUT, HIDDEN), ugrnn),
    (js.MUT1(HIDDEN, HIDDEN), mut1),
    (js.MUT2(HIDDEN, HIDDEN), mut2),
    (js.MUT3(INPUT, HIDDEN), mut3),
    (js.IndRNN(INPUT, HIDDEN), ind_rnn),
    (js.AntisymmetricRNN(INPUT, HIDDEN, time_step=0.2, damping=0.3), antisymmetric),
    (js.GatedAntisymmetricRNN(INPUT, HIDDEN, time_step=0.2, damping=0.3), gated_antisymmetric),
    (js.CoRNN(INPUT, HIDDEN, time_step=0.2, frequency=1.5, damping=0.5), co_rnn),
    (js.RecurrentHighway(INPUT, HIDDEN, depth=3), recurrent_highway),
]


@pytest.mark.parametrize(("cell", "transcribed"), CASES, ids=[type(cell).__name__ for cell, _ in CASES])
def test_equals_its_paper(cell, transcribed):
    shapes = jax.eval_shape(cell.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), shapes)
    start = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), cell.initial_state(params, (BATCH,)))
    xs = RNG.normal(size=(BATCH, TIME, cell.input_size))
    last, ys = cell.unroll(params, xs, start)

    for row in range(BATCH):
        state = tuple(leaf[row] for leaf in start)
        state = state if len(state) > 1 else state[0]
        for t in range(TIME):
            state = transcribed(params, state, xs[row, t])
            np.testing.assert_allclose(ys[row, t], state[0] if isinstance(state, tuple) else state, atol=1e-12)
        ended = state if isinstance(state, tuple) else (state,)
        for ours, theirs in zip(last, ended, strict=True):
            np.testing.assert_allclose(ours[row], theirs, atol=1e-12)


def test_an_antisymmetric_network_without_drive_turns_and_damping_shrinks_it():
    """The Jacobian of a small step at h = 0 is I + ε (R - Rᵀ - γ I): its eigenvalues are 1 - ε γ ± iω."""
    cell = js.AntisymmetricRNN(INPUT, HIDDEN, time_step=0.1, damping=0.5)
    params = cell.init(jax.random.key(0))

    def step(hidden):
        return cell.step(params, js.ElmanState(hidden), np.zeros(INPUT))[1]

    jacobian = jax.jacobian(step)(np.zeros(HIDDEN))
    np.testing.assert_allclose(np.linalg.eigvals(jacobian).real, 1 - 0.1 * 0.5, atol=1e-12)


@pytest.mark.parametrize("kind", [js.MUT1, js.MUT2])
def test_what_adds_its_input_needs_as_many_units(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__} .* input_size == hidden_size, got 3 and 4: put a Dense\(3"):
        kind(3, 4)


def test_a_highway_needs_a_layer():
    with pytest.raises(ValueError, match="RecurrentHighway needs depth >= 1, got 0"):
        js.RecurrentHighway(2, 3, depth=0)
