"""Cells against flax and haiku: outputs and final states with the same weights, named as each library does."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxseq as js
from tests.numbers import close, random_params
from tests.peers import peer

BATCH, TIME, INPUT, HIDDEN = 2, 5, 3, 4
RNG = np.random.default_rng(0)
XS = RNG.normal(size=(BATCH, TIME, INPUT)).astype(np.float32)
HIDDEN_START, CELL_START = RNG.normal(size=(2, BATCH, HIDDEN)).astype(np.float32)


def linen(cell, params):
    """The weights of each gate under the names of `flax.linen`."""
    names = {js.Elman: [""], js.LSTM: "ifgo", js.GRU: "rzn"}[type(cell)]
    tree = {}
    for gate, name in enumerate(names):
        tree["i" + name] = {"kernel": params.input_kernel[:, gate]}
        tree["h" + name] = {"kernel": params.recurrent_kernel[:, gate]}
        if isinstance(cell, js.GRU) and name == "n":  # the only gate with a bias in each product
            tree["in"]["bias"], tree["hn"]["bias"] = params.bias[gate], params.recurrent_bias[gate]
        elif isinstance(cell, js.GRU):
            tree["i" + name]["bias"] = params.bias[gate] + params.recurrent_bias[gate]
        else:
            tree[("h" if isinstance(cell, js.LSTM) else "i") + name]["bias"] = params.bias[gate]
    return tree


def by_linen(cell, params):
    module = {js.Elman: nn.SimpleCell, js.LSTM: nn.OptimizedLSTMCell, js.GRU: nn.GRUCell}[type(cell)](HIDDEN)
    carry = (CELL_START, HIDDEN_START) if isinstance(cell, js.LSTM) else HIDDEN_START
    rnn = nn.RNN(module, return_carry=True)
    return rnn.apply({"params": {"cell": linen(cell, params)}}, XS, initial_carry=carry)


def by_nnx(cell, params):
    classes = {js.Elman: nnx.SimpleCell, js.LSTM: nnx.OptimizedLSTMCell, js.GRU: nnx.GRUCell}
    module = classes[type(cell)](INPUT, HIDDEN, rngs=nnx.Rngs(0))
    module.dense_i.kernel = nnx.Param(jnp.reshape(params.input_kernel, (INPUT, -1)))
    module.dense_h.kernel = nnx.Param(jnp.reshape(params.recurrent_kernel, (HIDDEN, -1)))
    (module.dense_h if isinstance(cell, js.LSTM) else module.dense_i).bias = nnx.Param(params.bias.reshape(-1))
    carry = (CELL_START, HIDDEN_START) if isinstance(cell, js.LSTM) else HIDDEN_START
    return nnx.RNN(module, return_carry=True)(XS, initial_carry=carry)


@pytest.mark.parametrize("peer_unrolls", [by_linen, by_nnx])
@pytest.mark.parametrize("cell", [js.Elman(INPUT, HIDDEN), js.LSTM(INPUT, HIDDEN), js.GRU(INPUT, HIDDEN)], ids=repr)
def test_equals_flax(cell, peer_unrolls):
    params = random_params(RNG, cell)
    if peer_unrolls is by_nnx and isinstance(cell, js.GRU):  # nnx has no bias in the recurrent product
        params = params._replace(recurrent_bias=np.zeros_like(params.recurrent_bias))
    carry, theirs = peer_unrolls(cell, params)
    if isinstance(cell, js.LSTM):
        last_cell, last_hidden = carry
        state, ys = cell.unroll(params, XS, js.LSTMState(hidden=HIDDEN_START, cell=CELL_START))
        close(state, js.LSTMState(hidden=last_hidden, cell=last_cell))
    else:
        state_type = {js.Elman: js.ElmanState, js.GRU: js.GRUState}[type(cell)]
        state, ys = cell.unroll(params, XS, state_type(HIDDEN_START))
        close(state, state_type(carry))
    close(ys, theirs)


def test_reset_before_the_product_equals_haiku():
    hk = peer("haiku")
    cell = js.GRUv1(INPUT, HIDDEN)
    params = random_params(RNG, cell)

    def theirs(blocks):
        """haiku's gates are z, r, a with h' = (1 - z) h + z a."""
        r, z, n = (blocks[..., gate, :] for gate in range(3))
        return np.concatenate([-z, r, n], axis=-1)

    weights = {"w_i": theirs(params.input_kernel), "w_h": theirs(params.recurrent_kernel), "b": theirs(params.bias)}
    unroll = hk.transform(lambda xs, state: hk.dynamic_unroll(hk.GRU(HIDDEN), xs, state))
    ys, last = unroll.apply({"gru": weights}, None, XS.swapaxes(0, 1), HIDDEN_START)
    close(cell.unroll(params, XS, js.GRUState(HIDDEN_START)), (js.GRUState(last), ys.swapaxes(0, 1)))
