"""Trees that need no data: against recursion, by depth, and what reaches the root."""

import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxseq as js
from tests.numbers import close, random_params
from tests.trees import by_recursion

T = js.trees
RNG = np.random.default_rng(0)
TIME = 6
LENGTHS = np.array([6, 5, 3, 2, 1, 0])
ROWS = 3
NET = js.Recursive(2)
PARAMS = js.RecursiveParams(RNG.normal(size=(2, 2, 2)), RNG.normal(size=2))

pytestmark = pytest.mark.usefixtures("float64")


def halves(node, params, row):
    """The root over a row: pairs, then pairs of pairs, what is left over going up."""
    states = [node(params, [], x) for x in row]
    while len(states) > 1:
        pairs = [states[k : k + 2] for k in range(0, len(states), 2)]
        states = [node(params, pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return states[0]


@pytest.mark.parametrize(
    ("net", "node"),
    [(js.Recursive(2), by_recursion.recursive), (js.NaryTreeLSTM(2, 3), by_recursion.nary)],
    ids=["recursive", "nary"],
)
def test_balanced_equals_recursion_whatever_the_padding(net, node):
    params, xs = random_params(RNG, net), RNG.normal(size=(len(LENGTHS), TIME, 2))
    mask = np.arange(TIME) < LENGTHS[:, None]
    gaps = np.argsort(RNG.random(mask.shape), axis=-1)
    gaps = np.take_along_axis(mask, gaps, axis=-1)

    @jax.jit
    def run(params, xs, mask):
        def loss(params, xs):
            root = T.balanced(net, params, xs, mask)
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(root)), root

        gradients, root = jax.grad(loss, (0, 1), has_aux=True)(params, xs)
        return root, gradients

    for flags in (mask, gaps):
        root, (by_params, by_xs) = run(params, np.where(flags[..., None], xs, np.nan), flags)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((by_params, by_xs)))
        assert not by_xs[~flags].any() and by_xs[flags].any(-1).all()
        for index, row in enumerate(xs):
            state = jax.tree.map(lambda leaf, index=index: leaf[index], root)
            parts = tuple(jax.tree.leaves(state))
            if not flags[index].any():
                assert not any(part.any() for part in parts)
                continue
            expected = halves(node, params, row[flags[index]])
            close(parts, expected if isinstance(expected, tuple) else (expected,), 1e-12)
        again = run(params, np.where(flags[..., None], xs, 1e30), flags)
        jax.tree.map(np.testing.assert_array_equal, again, (root, (by_params, by_xs)))


def test_balanced_at_any_length_and_batch():
    net = js.Recursive(2)
    params = random_params(RNG, net)
    for time in (0, 1, 2, 3, 7):
        xs = RNG.normal(size=(time, 2))
        root = T.balanced(net, params, xs)
        close(root, halves(by_recursion.recursive, params, xs) if time else np.zeros(2), 1e-12)
    wide = RNG.normal(size=(2, 1, 3, 2))
    assert_rows = jax.vmap(jax.vmap(lambda xs: T.balanced(net, params, xs)))(wide)
    close(T.balanced(net, params, wide), assert_rows, 1e-12)
    assert T.balanced(net, params, np.zeros((0, 3, 2))).shape == (0, 2)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=30)
@hypothesis.given(st.lists(st.integers(0, TIME), min_size=ROWS, max_size=ROWS), st.integers(0, 1000))
def test_balanced_and_evaluate_agree_at_random_lengths(lengths, seed):
    """A row with n steps in it is the tree that halves make of them, whichever steps they are."""
    random = np.random.default_rng(seed)
    mask = random.permuted(np.arange(TIME) < np.array(lengths)[:, None], axis=1)
    xs = random.normal(size=(ROWS, TIME, 2))
    rows = [row[flags] for row, flags in zip(xs, mask, strict=True)]
    trees = [T.parse(of_halves([f"{w}" for w in range(start, start + len(row))]))[0] for start, row in starts(rows)]
    forest = T.batch(trees, token=int, leaves=ROWS * TIME, width=2, steps=16)
    leaves = np.concatenate([*rows, np.zeros((1, 2))])[np.asarray(forest.tokens)[: forest.leaves]]
    expected = np.zeros((ROWS, 2))
    expected[mask.any(axis=1)] = np.asarray(T.evaluate(NET, PARAMS, forest, leaves))[forest.roots]
    close(T.balanced(NET, PARAMS, xs, mask), expected, 1e-12)


def starts(rows):
    """The rows that have steps, and at which of all steps each begins."""
    ends = np.cumsum([len(row) for row in rows])
    return [(end - len(row), row) for end, row in zip(ends, rows, strict=True) if len(row)]


def of_halves(words):
    nodes = [f"(_ {word})" for word in words]
    while len(nodes) > 1:
        pairs = [nodes[k : k + 2] for k in range(0, len(nodes), 2)]
        nodes = [f"(_ {' '.join(pair)})" if len(pair) == 2 else pair[0] for pair in pairs]
    return nodes[0]


def test_second_derivatives_of_balanced():
    xs, mask = RNG.normal(size=(2, 3, 2)), np.array([[True, True, True], [True, False, True]])
    check_grads(jax.jit(lambda params, xs: T.balanced(NET, params, xs, mask).sum()), (PARAMS, xs), 2, modes=["rev"])


def in_sequence(jaxpr, name):
    """The most equations of one name that wait for each other, through inner jaxprs."""

    def longest(jaxpr, inputs):
        depth = dict(zip(jaxpr.invars, inputs, strict=True))

        def of(atom):
            return 0 if isinstance(atom, jax.extend.core.Literal) else depth.get(atom, 0)

        for equation in jaxpr.eqns:
            given = [of(atom) for atom in equation.invars]
            inner = list(jax.extend.core.jaxprs_in_params(equation.params))
            if inner:
                (body,) = inner
                found = longest(getattr(body, "jaxpr", body), given)
            else:
                found = [max(given, default=0) + (equation.primitive.name == name)] * len(equation.outvars)
            depth.update(zip(equation.outvars, found, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    return max(longest(jaxpr, [0] * len(jaxpr.invars)))


@pytest.mark.parametrize("time", [1, 2, 3, 8, 9, 512, 1000])
def test_depth_is_logarithmic(time):
    net = js.Recursive(2)
    params = random_params(RNG, net)
    jaxpr = jax.make_jaxpr(lambda xs, mask: T.balanced(net, params, xs, mask))(np.ones((time, 2)), np.ones(time, bool))
    assert in_sequence(jaxpr.jaxpr, "tanh") == math.ceil(math.log2(time))


def test_the_gradient_reaches_the_leaves_of_a_balanced_tree_alone():
    """From the root to the first of 512 leaves, with one composition; over the chain it is 0 in float32."""
    time, net = 512, js.Recursive(8)
    kernel = 0.7 * net.init(jax.random.key(0)).recurrent_kernel.astype(np.float32)
    params = js.RecursiveParams(kernel, np.zeros(8, np.float32))
    xs = jax.random.normal(jax.random.key(1), (time, 8), np.float32)
    (chain,) = T.parse("(_ " * (time - 1) + "(_ a)" + " (_ a))" * (time - 1))
    forest = T.batch([chain], width=1, leaves=1, steps=1)
    order = np.argsort([chain.leaves().index(node) for node in np.asarray(forest.node)[:time]])

    def of_balanced(first):
        return T.balanced(net, params, xs.at[0].set(first))

    def of_chain(first):
        rows = xs.at[0].set(first)[np.argsort(order)]
        return T.evaluate(net, params, forest, rows)[forest.roots[0]]

    balanced, chained = (np.abs(jax.jit(jax.jacrev(root))(xs[0])).max() for root in (of_balanced, of_chain))
    assert balanced > 1e-4
    assert chained == 0
    assert np.abs(jax.jit(jax.jacrev(lambda last: of_last(net, params, forest, xs, order, last)))(xs[-1])).max() > 0.05


def of_last(net, params, forest, xs, order, last):
    """The chain's root reads its last leaf directly."""
    return T.evaluate(net, params, forest, xs.at[-1].set(last)[np.argsort(order)])[forest.roots[0]]


def quarters(node, params, grid):
    """The root over a square grid of inputs whose side is a power of two."""
    if len(grid) == 1:
        return node(params, [], grid[0, 0])
    half = len(grid) // 2
    parts = (grid[:half, :half], grid[:half, half:], grid[half:, :half], grid[half:, half:])
    return node(params, [quarters(node, params, part) for part in parts])


def test_quad_tree_equals_recursion():
    net = js.NaryTreeLSTM(2 * 2 * 3, 3, arity=4)
    params, images = random_params(RNG, net), RNG.normal(size=(2, 8, 8, 3))
    roots = T.quad_tree(net, params, images, patch_size=2)
    for index, image in enumerate(images):
        grid = np.array([[image[r : r + 2, c : c + 2].ravel() for c in range(0, 8, 2)] for r in range(0, 8, 2)])
        close(tuple(leaf[index] for leaf in roots), quarters(by_recursion.nary, params, grid), 1e-12)
    close(T.quad_tree(net, params, images[0], 2), jax.tree.map(lambda leaf: leaf[0], roots), 1e-12)


def test_quad_tree_over_any_rectangle():
    """Absent quarters are no children, and one quarter alone goes up as it is."""
    net = js.ChildSumTreeLSTM(1, 3)
    params, image = random_params(RNG, net), RNG.normal(size=(3, 1, 1))
    leaves = [by_recursion.child_sum(params, [], image[row, 0]) for row in range(3)]
    upper = by_recursion.child_sum(params, leaves[:2])
    close(tuple(T.quad_tree(net, params, image)), by_recursion.child_sum(params, [upper, leaves[2]]), 1e-12)
    close(tuple(T.quad_tree(net, params, image[:1])), leaves[0], 1e-12)
    gradient = jax.jit(jax.grad(lambda image: sum(leaf.sum() for leaf in T.quad_tree(net, params, image))))
    assert np.isfinite(gradient(RNG.normal(size=(3, 5, 1)))).all()


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_errors():
    net, params = js.Recursive(2), random_params(RNG, js.Recursive(2))
    with says(ValueError, "balanced needs inputs [*batch, time, input], got float64[2]"):
        T.balanced(net, params, np.ones(2))
    with says(ValueError, "needs 2 in the last axis"):
        T.balanced(net, params, np.ones((4, 3)))
    with says(TypeError, "needs a boolean mask, got int64[2]: length_mask(lengths, time) makes one"):
        T.balanced(net, params, np.ones((2, 4, 2)), np.array([4, 2]))
    with says(ValueError, "got a mask of shape (2, 3); these inputs need [*batch, time] = (2, 4)"):
        T.balanced(net, params, np.ones((2, 4, 2)), np.ones((2, 3), bool))
    for call in (T.balanced, T.quad_tree):
        with says(TypeError, f"{call.__name__} takes a Composition, such as NaryTreeLSTM"):
            call(js.LSTM(2, 3), params, np.ones((4, 4, 2)))
    for size in (2.0, True, 0):
        with says(ValueError, f"quad_tree needs an integer patch_size >= 1, got {size}"):
            T.quad_tree(net, params, np.ones((4, 4, 2)), patch_size=size)
    with says(ValueError, "quad_tree needs images [*batch, height, width, channel], got float64[4,2]"):
        T.quad_tree(net, params, np.ones((4, 2)))
    with says(ValueError, "multiples of patch_size=3, got 4 x 6: pad or crop the images"):
        T.quad_tree(net, params, np.ones((4, 6, 2)), patch_size=3)
    with says(ValueError, "composes 2 children, but there are nodes with 4"):
        T.quad_tree(net, params, np.ones((4, 4, 2)))
