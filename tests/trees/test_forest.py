"""Trees of all shapes in one program: against one node after another, with gradients."""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests.numbers import close, random_params
from tests.trees import by_recursion

T = js.trees
RNG = np.random.default_rng(0)
LAYOUT = dict(width=3, leaves=24, steps=8)  # one shape for any three of these trees
TEXTS = ["(3 (2 a) (4 (2 b) (4 (2 c) (0 d))))", "(1 a)", "(2 (1 (1 d) (2 c)) (0 (0 (3 b) (1 a)) (1 (2 a) (2 a))))"]
TREES = [tree for text in TEXTS for tree in T.parse(text)]
NETS = {
    "recursive": (js.Recursive(2), by_recursion.recursive),
    "rntn": (js.RNTN(2), by_recursion.rntn),
    "child_sum": (js.ChildSumTreeLSTM(2, 3), by_recursion.child_sum),
    "nary": (js.NaryTreeLSTM(2, 3), by_recursion.nary),
}

pytestmark = pytest.mark.usefixtures("float64")


def token(word):
    return "abcd".index(word)


def rows_of(forest, states):
    """The state of each node of each tree `{(tree, node): state}`."""
    where = zip(np.asarray(forest.tree), np.asarray(forest.node), strict=True)
    return {pair: jax.tree.map(lambda leaf, r=r: leaf[r], states) for r, pair in enumerate(where) if pair[0] >= 0}


def check_layout(forest, trees):
    """Each node has a row, after those of its children, in another step."""
    forest = jax.tree.map(np.asarray, forest)
    rows = {(int(t), int(n)): r for r, (t, n) in enumerate(zip(forest.tree, forest.node, strict=True)) if t >= 0}
    steps, width, _ = forest.children.shape
    assert sorted(rows) == sorted(
        (number, node) for number, tree in enumerate(trees) for node in range(len(tree.labels))
    )

    def step_of(row):
        return -1 if row < forest.leaves else (row - forest.leaves) // width

    for (number, node), row in rows.items():
        kept = trees[number].children[node]
        if row < forest.leaves:
            assert not kept
            continue
        found = forest.children.reshape(steps * width, -1)[row - forest.leaves]
        assert [rows[number, child] for child in kept] == [child for child in found if child >= 0]
        assert all(step_of(rows[number, child]) < step_of(row) for child in kept)
    assert [rows[number, len(tree.labels) - 1] for number, tree in enumerate(trees)] == forest.roots.tolist()


def heights(tree):
    found = []
    for kept in tree.children:
        found.append(1 + max(found[child] for child in kept) if kept else 0)
    return found


@hypothesis.settings(deadline=None, derandomize=True, max_examples=50)
@hypothesis.given(hypothesis.strategies.lists(by_recursion.TREES, max_size=4), hypothesis.strategies.integers(1, 4))
def test_lays_out_any_trees_in_the_fewest_steps(shapes, width):
    trees = [tree for shape in shapes for tree in T.parse(by_recursion.brackets(shape))]
    forest = T.batch(trees, width=width, leaves=1, steps=1)
    check_layout(forest, trees)
    inner = [height for tree in trees for height in heights(tree) if height]
    far = np.array([distance for tree in trees for distance in distances(tree)])
    # nodes at a distance of at least d need so many steps, and then one for each distance below: no plan has fewer
    fewest = [d - (-(far >= d).sum() // width) for d in range(far.max() + 1)] if len(far) else [0]
    assert len(forest.children) == max(*fewest, *inner, 1)
    nodes = sum(len(tree.labels) for tree in trees)
    assert T.padding(forest) == pytest.approx(1 - nodes / len(forest.tree))


def distances(tree):
    """How far inner nodes are from the root."""
    found = [0] * len(tree.labels)
    for node in reversed(range(len(found))):
        for child in tree.children[node]:
            found[child] = found[node] + 1
    return [distance for distance, kept in zip(found, tree.children, strict=True) if kept]


def program(net, traces):
    """States and gradients of a weighted sum of them; `traces` gets an entry whenever it is traced."""

    @jax.jit
    def run(params, forest, xs, weights):
        traces.append(net)

        def loss(params, xs):
            states = T.evaluate(net, params, forest, xs)
            return sum((w * leaf).sum() for w, leaf in zip(weights, jax.tree.leaves(states), strict=True)), states

        gradients, states = jax.grad(loss, (0, 1), has_aux=True)(params, xs)
        return states, gradients

    return run


@pytest.mark.parametrize("name", NETS)
def test_one_program_computes_any_trees(name):
    """Values at all nodes as by recursion, whatever the padding holds; gradients as by finite differences."""
    net, node = NETS[name]
    params, traces = random_params(RNG, net), []
    run = program(net, traces)
    chosen = [TREES, TREES[::-1], [TREES[2]] * 3, [TREES[1]] * 3]
    for trees in chosen:
        forest = T.batch(trees, token=token, **LAYOUT)
        check_layout(forest, trees)
        rows = len(forest.tree)
        xs = RNG.normal(size=(forest.leaves, 2))
        junk = np.where(np.asarray(forest.mask)[: forest.leaves, None], xs, np.nan)
        width = 2 if isinstance(net, js.Recursive) else 3
        weights = [RNG.normal(size=(rows, width)) for _ in range(1 if width == 2 else 2)]
        states, (by_params, by_xs) = run(params, forest, junk, weights)
        found = rows_of(forest, states)

        def total(params, xs, forest=forest, trees=trees, weights=weights):
            """The weighted sum of all states by recursion, and the states."""
            rows, states, value = {}, {}, 0.0
            for row, pair in enumerate(zip(forest.tree.tolist(), forest.node.tolist(), strict=True)):
                rows[pair] = row
            for number, tree in enumerate(trees):
                given = [None if kept else xs[rows[number, n]] for n, kept in enumerate(tree.children)]
                for n, state in enumerate(by_recursion.states(node, params, tree, given)):
                    states[number, n] = state
                    parts = state if isinstance(state, tuple) else (state,)
                    value += sum(w[rows[number, n]] @ part for w, part in zip(weights, parts, strict=True))
            return value, states

        _, expected = total(params, xs)
        for pair, state in expected.items():
            close(tuple(jax.tree.leaves(found[pair])), state if isinstance(state, tuple) else (state,), 1e-12)
        assert not any(leaf[~np.asarray(forest.mask)].any() for leaf in jax.tree.leaves(states))
        direction = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), (params, xs))
        moved = [jax.tree.map(lambda a, d, e=e: a + e * d, (params, xs), direction) for e in (1e-6, -1e-6)]
        ahead, behind = (total(*given)[0] for given in moved)
        pairs = zip(jax.tree.leaves((by_params, by_xs)), jax.tree.leaves(direction), strict=True)
        assert sum((a * b).sum() for a, b in pairs) == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)
    assert len(traces) == 1


def test_inputs_at_inner_nodes():
    """Dependency trees: every node has a word, and any number of children."""
    net, params = js.ChildSumTreeLSTM(2, 3), random_params(RNG, js.ChildSumTreeLSTM(2, 3))
    trees = [
        T.Tree(("",) * 5, ("a", "b", "a", "c", "d"), ((), (), (0, 1), (), (2, 3))),
        T.Tree(("",) * 4, ("d", "b", None, "c"), ((), (), (), (0, 1, 2))),
    ]
    forest = T.batch(trees, token=token, width=2, leaves=4, steps=2)
    vectors = RNG.normal(size=(4, 2))
    has_word = forest.tokens >= 0
    xs = jnp.where(has_word[:, None], vectors[forest.tokens], 0)
    found = rows_of(forest, T.evaluate(net, params, forest, xs))
    for number, tree in enumerate(trees):
        inputs = [np.zeros(2) if word is None else vectors[token(word)] for word in tree.words]
        for node, (h, c) in enumerate(by_recursion.states(by_recursion.child_sum, params, tree, inputs)):
            close(tuple(found[number, node]), (h, c), 1e-12)
    assert has_word.sum() == 8


def test_labels_and_losses_over_nodes():
    """The loss of each labelled node, and the accuracy of the roots."""
    (tree,) = T.parse("(S (1 a) ( (2 b) (0 c)))")
    forest = T.batch([tree, *T.parse("(1 d)")], token=token, label=lambda text: None if text == "S" else int(text))
    assert forest.labels[forest.roots].tolist() == [-1, 1] and int(forest.labelled.sum()) == 4
    logits = jnp.where(forest.labelled[:, None], jnp.array([0.0, 1.0, 0.0]), jnp.nan)
    losses = js.losses.cross_entropy(logits, forest.labels, forest.labelled)
    one = np.log(2 + np.e) - np.array([0, 1, 0])
    assert losses.sum() == pytest.approx(one[1] + one[2] + one[0] + one[1])
    roots = forest.roots
    assert js.metrics.accuracy(logits[roots], forest.labels[roots], forest.labelled[roots]) == 1


def test_forests_of_one_shape_side_by_side():
    """`vmap` over forests, and second derivatives."""
    net = js.Recursive(2)
    params = random_params(RNG, net)
    forests = [T.batch(trees, token=token, **LAYOUT) for trees in (TREES, TREES[::-1])]
    xs = RNG.normal(size=(2, forests[0].leaves, 2))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *forests)
    side_by_side = jax.vmap(lambda forest, xs: T.evaluate(net, params, forest, xs))(both, xs)
    apart = [T.evaluate(net, params, forest, x) for forest, x in zip(forests, xs, strict=True)]
    close(side_by_side, jnp.stack(apart), 1e-12)
    forest = T.batch(TREES[:1], leaves=4, width=1, steps=3)

    def root(params):
        return T.evaluate(net, params, forest, xs[0, :4])[forest.roots[0]].sum()

    @jax.jit
    def slope(params):
        return sum(leaf.sum() for leaf in jax.tree.leaves(jax.grad(root)(params)))

    ones = jax.tree.map(jnp.ones_like, params)
    slope_of_slope = jax.jit(jax.grad(slope))(params)
    curvature = sum(leaf.sum() for leaf in jax.tree.leaves(slope_of_slope))
    moved = [slope(jax.tree.map(lambda leaf, one, e=e: leaf + e * one, params, ones)) for e in (1e-5, -1e-5)]
    assert float(curvature) == pytest.approx(float(moved[0] - moved[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_keeps_dtypes(dtype):
    net = js.NaryTreeLSTM(2, 3)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(RNG, net))
    forest = T.batch(TREES, **LAYOUT)
    states = T.evaluate(net, params, forest, jnp.ones((forest.leaves, 2), dtype))
    assert {leaf.dtype for leaf in states} == {jnp.dtype(dtype)}


def test_takes_trees_one_by_one_and_sizes_of_numpy():
    forest = T.batch((tree for tree in TREES), token="abcd".index, width=np.int64(3), leaves=24, steps=8)
    assert len(forest.roots) == len(TREES)
    jax.tree.map(np.testing.assert_array_equal, forest, T.batch(TREES, token=token, **LAYOUT))
    known = T.batch(T.parse("(1 (1 a) (1 z))"), token={"a": 0}.get, leaves=2)
    assert known.tokens[:2].tolist() == [0, -1]


def test_no_trees_and_trees_of_one_leaf():
    net, params = js.Recursive(2), random_params(RNG, js.Recursive(2))
    empty = T.batch([])
    assert not T.evaluate(net, params, empty, jnp.ones((empty.leaves, 2))).any() and empty.roots.shape == (0,)
    leaves = T.batch(T.parse("(1 a) (2 b)"), leaves=2, width=1, steps=1)
    assert T.evaluate(net, params, leaves, jnp.eye(2)).tolist() == [[1, 0], [0, 1], [0, 0]]


def test_a_deep_tree():
    depth = 2000
    (tree,) = T.parse("(_ (_ a) " * depth + "(_ b)" + ")" * depth)
    forest = T.batch([tree], width=1, steps=1000)
    net = js.Recursive(1, activation="identity")
    params = js.RecursiveParams(np.full((1, 2, 1), 1.0), np.zeros(1))
    assert T.evaluate(net, params, forest, jnp.ones((forest.leaves, 1)))[forest.roots].item() == depth + 1


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_errors():
    net, params = js.Recursive(2), random_params(RNG, js.Recursive(2))
    for width in (0, True, 2.0):
        with says(ValueError, f"batch needs an integer width >= 1, got {width}"):
            T.batch(TREES, width=width)
    with says(TypeError, "batch needs several trees, got one: batch([tree]) takes it alone"):
        T.batch(TREES[0])
    with says(TypeError, "batch needs integers or None from label, got 3.7 for '3.7'"):
        T.batch(T.parse("(3.7 a)"), label=float)
    for number in (-5, 2**31):
        with says(ValueError, f"batch needs integers of 32 bits, 0 or more, from token, got {number} for 'a'"):
            T.batch(T.parse("(1 a)"), token={"a": number}.get)
    with says(TypeError, "call it outside of jit"):
        jax.jit(T.padding)(T.batch(TREES))
    with says(TypeError, "batch needs trees, as trees.parse and trees.read give them, got str"):
        T.batch(["(1 a)"])
    with says(TypeError, "evaluate needs a forest, as trees.batch makes it of trees, got list"):
        T.evaluate(net, params, TREES, jnp.ones((3, 2)))
    with says(
        TypeError,
        "evaluate takes a Composition, such as NaryTreeLSTM, which computes a node from its",
    ):
        T.evaluate(js.LSTM(2, 3), params, T.batch(TREES), jnp.ones((64, 2)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[T.batch(TREES)] * 2)
    with says(ValueError, "evaluate takes one forest, got (2,) stacked: vmap takes several"):
        T.evaluate(net, params, stacked, jnp.ones((2, stacked.leaves, 2)))
    forest = T.batch(TREES, leaves=16, width=3, steps=1)
    with says(ValueError, "[rows, input]; got float64[16,5,2]"):
        T.evaluate(net, params, forest, jnp.ones((16, 5, 2)))
    with says(TypeError, "Recursive(hidden_size=2) reads vectors, but got int64[16,2]: integers that are"):
        T.evaluate(net, params, forest, jnp.ones((16, 2), int))
    with says(ValueError, "evaluate needs the inputs of the 16 leaves of this forest, or of all"):
        T.evaluate(net, params, forest, jnp.ones((3, 2)))
    with says(ValueError, "reads no inputs at inner nodes: give those of the leaves alone"):
        T.evaluate(net, params, forest, jnp.ones((len(forest.tree), 2)))
    three = T.batch(T.parse("(1 (1 a) (2 b) (3 c))"))
    with says(ValueError, "composes 2 children, but there are nodes with 3: binarise the trees"):
        T.evaluate(net, params, three, jnp.ones((three.leaves, 2)))
