"""Compositions: against the papers' equations in NumPy, against the cells that they are over chains, and as values."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxseq as js
from jaxseq.trees.composition import combine
from tests.numbers import close, random_params
from tests.trees import by_recursion

RNG = np.random.default_rng(0)
NODES = {
    "recursive": (js.Recursive(3), by_recursion.recursive),
    "recursive_of_4": (js.Recursive(2, arity=4), by_recursion.recursive),
    "rntn": (js.RNTN(3), by_recursion.rntn),
    "rntn_of_3": (js.RNTN(2, arity=3), by_recursion.rntn),
    "child_sum": (js.ChildSumTreeLSTM(2, 3), by_recursion.child_sum),
    "nary": (js.NaryTreeLSTM(2, 3), by_recursion.nary),
    "nary_of_3": (js.NaryTreeLSTM(2, 3, arity=3), by_recursion.nary),
}
each = pytest.mark.parametrize("name", NODES)

pytestmark = pytest.mark.usefixtures("float64")


def of_children(net, count):
    """Random states of `count` children of one node."""
    params = random_params(RNG, net)
    leaf = jax.eval_shape(net.leaf, params, jax.ShapeDtypeStruct((count, net.input_size), np.float64))
    return params, jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), leaf)


def has_inputs(net):
    return not isinstance(net, js.Recursive)


@each
def test_equals_the_papers(name):
    net, node = NODES[name]
    params, children = of_children(net, net.arity or 4)
    rows = [jax.tree.map(lambda leaf, k=k: leaf[k], children) for k in range(net.arity or 4)]
    x = RNG.normal(size=net.input_size)
    mask = np.ones(len(rows), bool)
    close(tuple(jax.tree.leaves(net.leaf(params, x))), tuple(jax.tree.leaves(node(params, [], x))), 1e-12)
    for given in (None, x) if has_inputs(net) else (None,):
        ours = net.compose(params, children, mask, given)
        close(tuple(jax.tree.leaves(ours)), tuple(jax.tree.leaves(node(params, rows, given))), 1e-12)


@each
def test_absent_children_and_any_batch_axes(name):
    """What stands at a child that is absent does not count, and batch axes are `vmap`; so in gradients."""
    net, node = NODES[name]
    params, children = of_children(net, 2)
    one = jax.tree.map(lambda leaf: leaf[0], children)
    mask = np.array([True, False])
    junk = jax.tree.map(lambda leaf: np.stack([leaf[0], leaf[1] + np.nan]), children)
    rows = [one, *[jax.tree.map(np.zeros_like, one)] * ((net.arity or 1) - 1)]
    join = jax.jit(lambda params, children, mask: combine(net, params, children, mask))
    expected = node(params, rows, None)
    close(tuple(jax.tree.leaves(join(params, junk, mask))), tuple(jax.tree.leaves(expected)), 1e-12)

    @jax.jit
    def loss(params, children, mask):
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(join(params, children, mask)))

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    for flags in (mask, np.array([False, False])):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params, junk, flags)))
    wide = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1])[None], children)
    masks = np.array([[[True, False], [True, True]]])
    vmapped = jax.jit(jax.vmap(jax.vmap(join, (None, 0, 0)), (None, 0, 0)))
    close(join(params, wide, masks), vmapped(params, wide, masks), 1e-12)
    check_grads(lambda *given: loss(*given, np.array([True, True])), (params, children), 1, modes=["rev"])


@each
def test_is_a_value(name):
    net, _ = NODES[name]
    assert js.from_json(js.to_json(net)) == net == pickle.loads(pickle.dumps(net))
    assert eval(repr(net), vars(js)) == net and hash(net) == hash(eval(repr(net), vars(js)))
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    specs = jax.tree.leaves(net.axes(), is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))
    assert [len(spec) for spec in specs] == [leaf.ndim for leaf in jax.tree.leaves(shapes)]
    with pytest.raises(AttributeError, match="is a value: make another one to change hidden_size"):
        net.hidden_size = 2


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_keeps_dtypes(name, dtype):
    net, _ = NODES[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), net.init(jax.random.key(0)))
    states = net.leaf(params, jnp.ones((2, net.input_size), dtype))
    root = combine(net, params, states, jnp.ones(2, bool))
    assert {leaf.dtype for leaf in jax.tree.leaves((states, root))} == {jnp.dtype(dtype)}


def test_initialisers_and_penalties_find_the_kernels():
    """Gates are named, so forget biases are found, and kernels are orthogonal as maps of all children."""
    for net in (js.NaryTreeLSTM(2, 3), js.ChildSumTreeLSTM(2, 3)):
        params = js.initializers.forget_bias(net, net.init(jax.random.key(0)), 5.0)
        assert params.bias[1].tolist() == [5.0] * 3 and not params.bias[0].any()
        assert net.init(jax.random.key(0)).bias[1].tolist() == [1.0] * 3
    for net in (js.RNTN(3), js.NaryTreeLSTM(2, 3)):
        for params in (net.init(jax.random.key(0)), js.initializers.orthogonal(net, *random_and_key(net))):
            kernel = params.recurrent_kernel.reshape(6, -1, 3)
            for gate in range(kernel.shape[1]):
                close(kernel[:, gate].T @ kernel[:, gate], np.eye(3), 1e-6)
    flat = js.RNTN(3).init(jax.random.key(0)).tensor.reshape(36, 3)
    close(flat.T @ flat, np.eye(3), 1e-6)
    flags = js.regularizers.kernel_mask(js.RNTN(3), js.RNTN(3).init(jax.random.key(0)))
    assert flags == js.RNTNParams(True, False, True)


def random_and_key(net):
    return random_params(RNG, net), jax.random.key(1)


def chain(words):
    """A tree of one child a node."""
    count = len(words)
    return js.trees.Tree(("",) * count, tuple(words), ((), *((k,) for k in range(count - 1))))


@pytest.mark.parametrize("net", [js.ChildSumTreeLSTM(2, 3), js.NaryTreeLSTM(2, 3, arity=1)], ids=repr)
def test_over_a_chain_a_tree_lstm_is_an_lstm(net):
    """With an input at each node, and the LSTM's own params."""
    cell, time = js.LSTM(2, 3), 7
    params, xs = random_params(RNG, cell), RNG.normal(size=(time, 2))
    own = params
    if net.arity == 1:
        own = js.NaryTreeLSTMParams(params.input_kernel, params.recurrent_kernel[:, None], params.bias)
    forest = js.trees.batch([chain("abcdefg")], token="abcdefg".index, arity=1, leaves=1, width=1, steps=1)
    states = js.trees.evaluate(net, own, forest, xs[forest.tokens])
    state, ys = cell.unroll(params, xs)
    close(states.hidden, ys[forest.tokens], 1e-12)
    close(jax.tree.map(lambda leaf: leaf[forest.roots[0]], states), state, 1e-12)


def left_branching(words):
    """(((a b) c) d)"""
    text = f"(_ {words[0]})"
    for word in words[1:]:
        text = f"(_ {text} (_ {word}))"
    return js.trees.parse(text)[0]


def test_a_left_branching_tree_is_a_recurrent_network():
    """Its left kernel is the recurrent one, its right kernel that of the input, its first leaf the initial state."""
    size, time = 3, 8
    net, cell = js.Recursive(size), js.Elman(size, size)
    params, xs = random_params(RNG, cell), RNG.normal(size=(time, size))
    kernel = np.stack([params.recurrent_kernel[:, 0], params.input_kernel[:, 0]], axis=1)
    forest = js.trees.batch([left_branching("abcdefgh")], token="abcdefgh".index, leaves=1, steps=1, width=1)

    def last_of_tree(kernel, bias, xs):
        states = js.trees.evaluate(net, js.RecursiveParams(kernel, bias), forest, xs[forest.tokens[: forest.leaves]])
        return states[forest.roots[0]]

    def last_of_cell(kernel, bias, xs):
        own = js.GatedParams(kernel[:, 1, None], kernel[:, 0, None], bias[None])
        return cell.unroll(own, xs[1:], js.ElmanState(xs[0]))[0].hidden

    given = (kernel, params.bias[0], xs)
    close(last_of_tree(*given), last_of_cell(*given), 1e-12)
    ours, theirs = (jax.jacobian(last, (0, 1, 2))(*given) for last in (last_of_tree, last_of_cell))
    close(ours, theirs, 1e-10)


class Shrink(js.trees.Composition):
    """A user's composition that forgets a feature."""

    def init(self, key):
        return ()

    def compose(self, params, children, mask, x=None):
        return children.sum(-2)[..., :1]


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_errors():
    with says(ValueError, "NaryTreeLSTM needs arity >= 1, got 0"):
        js.NaryTreeLSTM(2, 3, arity=0)
    with says(ValueError, "RNTN needs hidden_size >= 1, got 0"):
        js.RNTN(0)
    with says(ValueError, "No activation is called 'tan'"):
        js.Recursive(2, activation="tan")
    net = js.Recursive(2)
    params = net.init(jax.random.key(0))
    states, three = jnp.ones((2, 2)), np.ones(3, bool)
    with says(ValueError, "Recursive(hidden_size=2) got inputs with 3 features (shape (5, 3)); it needs 2"):
        net.leaf(params, jnp.ones((5, 3)))
    with says(TypeError, "has params of float64 but got inputs of float32"):
        net.leaf(params, jnp.ones((5, 2), jnp.float32))
    with says(ValueError, "Recursive(hidden_size=2) got params of another layer"):
        net.leaf(js.Recursive(3).init(jax.random.key(0)), states)
    with says(ValueError, "Recursive(hidden_size=2) reads no inputs at inner nodes"):
        net.compose(params, states, np.ones(2, bool), jnp.ones(2))
    with says(ValueError, "composes 2 children, but there are nodes with 3: binarise the trees"):
        combine(net, params, jnp.ones((3, 2)), three)
    with says(TypeError, "Shrink().compose needs to give a state as those of the children, float64[2]; it gave"):
        combine(Shrink(), (), states, np.ones(2, bool))
