"""Cells against torch: outputs, final states, and gradients of torch's own weights, of inputs and of initial states."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests.numbers import close
from tests.peers import peer

BATCH, TIME, INPUT, HIDDEN, PROJECTION = 3, 6, 4, 5, 2


def blocks(kernel, gates):
    """torch's `[gate * hidden, features]` as `[features, gate, hidden]`."""
    return kernel.reshape(gates, -1, kernel.shape[-1]).transpose(2, 0, 1)


def gated(gates, weight_ih, weight_hh, bias_ih, bias_hh):
    bias = (bias_ih + bias_hh).reshape(gates, -1)
    return js.GatedParams(blocks(weight_ih, gates), blocks(weight_hh, gates), bias)


def projected(weight_hr, **weights):
    return js.ProjectedLSTMParams(*gated(4, **weights), projection_kernel=weight_hr.T)


def gru(weight_ih, weight_hh, bias_ih, bias_hh):
    return js.GRUParams(blocks(weight_ih, 3), blocks(weight_hh, 3), bias_ih.reshape(3, -1), bias_hh.reshape(3, -1))


class Case(NamedTuple):
    """A recurrent module of torch, and one layer of it as a cell with the params made of torch's weights."""

    module: str
    cell: Callable
    params: Callable
    options: dict = {}

    @property
    def state_sizes(self):
        output = self.options.get("proj_size", HIDDEN)
        return [output, HIDDEN] if self.module == "LSTM" else [output]


CASES = {
    "RNN": Case("RNN", js.Elman, functools.partial(gated, 1)),
    "RNN relu": Case(
        "RNN", functools.partial(js.Elman, activation="relu"), functools.partial(gated, 1), {"nonlinearity": "relu"}
    ),
    "LSTM": Case("LSTM", js.LSTM, functools.partial(gated, 4)),
    "LSTM proj_size": Case(
        "LSTM", functools.partial(js.ProjectedLSTM, projection_size=PROJECTION), projected, {"proj_size": PROJECTION}
    ),
    "GRU": Case("GRU", js.GRU, gru),
}


def of_torch(case, depth, lengths, loss):
    """Random weights, inputs and initial states, with the outputs and final states that torch makes of them, and the
    gradients of `loss`."""
    torch = peer("torch")
    torch.manual_seed(0)
    module = getattr(torch.nn, case.module)(INPUT, HIDDEN, depth, batch_first=True, **case.options)
    weights = {name: torch.randn_like(weight) / 2 for name, weight in module.named_parameters()}
    xs = torch.randn(BATCH, TIME, INPUT)
    start = [torch.randn(depth, BATCH, size) for size in case.state_sizes]
    given = [leaf.requires_grad_() for leaf in (*weights.values(), xs, *start)]

    def loaded(xs, start):
        return torch.func.functional_call(module, weights, (xs, tuple(start) if len(start) > 1 else start[0]))

    if lengths is None:
        ys, states = loaded(xs, start)
    else:
        rnn = torch.nn.utils.rnn
        packed = rnn.pack_padded_sequence(xs, lengths, batch_first=True, enforce_sorted=False)
        ys, states = loaded(packed, start)
        ys, _ = rnn.pad_packed_sequence(ys, batch_first=True)
    states = list(states) if isinstance(states, tuple) else [states]
    grads = torch.autograd.grad(loss(ys, states, torch.tensor), given)
    grads = dict(zip(weights, grads, strict=False)), grads[len(weights)], list(grads[len(weights) + 1 :])
    return jax.tree.map(lambda leaf: leaf.detach().numpy(), ((weights, xs, start), (ys, states), grads))


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's, about its own speed
@pytest.mark.parametrize("depth, lengths", [(1, None), (2, [4, 6, 1])], ids=["one layer", "two layers packed"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_torch(name, depth, lengths):
    case = CASES[name]
    output = case.state_sizes[0]
    rng = np.random.default_rng(0)
    weigh_ys = rng.normal(size=(BATCH, TIME, output)).astype(np.float32)
    weigh_states = [rng.normal(size=(depth, BATCH, size)).astype(np.float32) for size in case.state_sizes]

    def loss(ys, states, array=jnp.asarray):
        weighed = [(state * array(weigh)).sum() for state, weigh in zip(states, weigh_states, strict=True)]
        return (ys * array(weigh_ys)).sum() + sum(weighed)

    (weights, xs, start), values, grads = of_torch(case, depth, lengths, loss)
    cell = js.Stack([case.cell(INPUT if layer == 0 else output, HIDDEN) for layer in range(depth)])
    mask = None if lengths is None else js.length_mask(jnp.array(lengths), TIME)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def ours(weights, xs, start):
        params = tuple(
            case.params(**{name[:-3]: weight for name, weight in weights.items() if name.endswith(f"_l{layer}")})
            for layer in range(depth)
        )
        kinds = jax.eval_shape(cell.initial_state, params)
        state = tuple(type(kind)(*(part[layer] for part in start)) for layer, kind in enumerate(kinds))
        states, ys = cell.unroll(params, xs, state, mask=mask)
        states = [jnp.stack(parts) for parts in zip(*states, strict=True)]
        return loss(ys, states), (ys, states)

    our_grads, our_values = ours(weights, xs, start)
    close(our_values, values)
    close(our_grads, grads)
