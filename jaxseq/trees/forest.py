"""Trees of any shapes laid out side by side, so that one program computes them all, many nodes at once."""

import heapq
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxseq.core import errors, masks, sharding
from jaxseq.core.layer import Params
from jaxseq.core.scan import scan
from jaxseq.trees.composition import Composition, State, check_composition, combine, pad, whole
from jaxseq.trees.penn import Tree


class Forest(NamedTuple):
    """A batch of trees in rows, one a node: first all leaves, then the inner nodes of each step.

    `children` are the rows of each node's children, -1 where it has none: the nodes of one step have theirs in steps
    before it. `roots` are the rows of the roots, a tree each. `tree` and `node` say which node of which tree a row is,
    -1 at padding. `tokens` and `labels` are those of the rows, -1 where there is none: as an index that would be the
    last one, so choose what it reads, `jnp.where(tokens[:, None] >= 0, vectors[tokens], 0)`.
    """

    children: Int[Array, "steps width child"]
    roots: Int[Array, "trees"]
    tree: Int[Array, "rows"]
    node: Int[Array, "rows"]
    tokens: Int[Array, "rows"]
    labels: Int[Array, "rows"]

    @property
    def leaves(self) -> int:
        """How many rows are for leaves, padding included; of one forest, also where several are stacked for `vmap`."""
        steps, width, _ = self.children.shape[-3:]
        return self.tree.shape[-1] - steps * width

    @property
    def mask(self) -> Bool[Array, "rows"]:
        """Which rows are nodes."""
        return self.tree >= 0

    @property
    def labelled(self) -> Bool[Array, "rows"]:
        """Which rows have a label: the mask of a loss over nodes."""
        return self.labels >= 0


def batch(
    trees: Iterable[Tree],
    *,
    token: Callable[[str], int | None] | None = None,
    label: Callable[[str], int | None] | None = None,
    arity: int = 2,
    width: int = 32,
    leaves: int = 64,
    steps: int = 8,
) -> Forest:
    """Lays trees out.

    A step computes up to `width` nodes whose children are there already, those farthest from their root first: no
    other order takes fewer steps (T. C. Hu, Parallel sequencing and assembly line problems, Operations Research 9,
    1961). The number of rows for leaves is rounded up to a multiple of `leaves`, that of steps to one of `steps`, and
    there are places for `arity` children or as many as are needed, so that batches of about one size have one shape and
    need one program; `padding` says what this costs.

    Args:
        trees: the trees.
        token: from a word to its number, from 0 on, or to None, as the `get` of a dictionary; without it no row has a
            token.
        label: from a label to its class, from 0 on, or to None; without it no row has a label. It is not asked for "",
            the label of a node that has none.

    Raises:
        TypeError, ValueError: if a tree is none, a size is not positive, or what `token` or `label` gives is no integer
            of 0 or more.

    >>> from jaxseq.trees import parse
    >>> forest = batch(parse("(3 (2 It) (4 (2 's) (4 fun)))"), label=int, width=1, leaves=4, steps=1)
    >>> forest.children.tolist(), forest.labels.tolist()
    ([[[1, 2]], [[0, 4]]], [2, 2, 4, -1, 4, 3])
    """
    for name, number in (("arity", arity), ("width", width), ("leaves", leaves), ("steps", steps)):
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"batch needs an integer {name} >= 1, got {number!r}.")
    if isinstance(trees, Tree):
        raise TypeError("batch needs several trees, got one: batch([tree]) takes it alone.")
    trees = list(trees)
    for tree in trees:
        if not isinstance(tree, Tree):
            raise TypeError(f"batch needs trees, as trees.parse and trees.read give them, got {type(tree).__name__}.")
    nodes = [(number, node) for number, tree in enumerate(trees) for node in range(len(tree.labels))]
    ends = list(itertools.accumulate(len(tree.labels) for tree in trees))
    children = [
        [end - len(tree.labels) + child for child in kept]
        for end, tree in zip(ends, trees, strict=True)
        for kept in tree.children
    ]
    at_leaves = [index for index, kept in enumerate(children) if not kept]
    planned = _plan(children, width)
    at_leaves += [-1] * (-len(at_leaves) % leaves if at_leaves else leaves)
    planned += [[]] * (-len(planned) % steps if planned else steps)
    rows = at_leaves + [index for members in planned for index in members + [-1] * (width - len(members))]

    arity = max([arity, *map(len, children)])
    row_of = {index: row for row, index in enumerate(rows)}

    def children_of(index: int) -> list[int]:
        found = [row_of[child] for child in children[index]] if index >= 0 else []
        return found + [-1] * (arity - len(found))

    def describe(index: int) -> tuple[int, int, int, int]:
        if index < 0:
            return (-1, -1, -1, -1)
        number, node = nodes[index]
        tree = trees[number]
        return number, node, _number("token", token, tree.words[node]), _number("label", label, tree.labels[node])

    inner = np.reshape([children_of(index) for index in rows[len(at_leaves) :]], (len(planned), width, arity))
    roots = [row_of[end - 1] for end in ends]
    arrays = (inner, roots, *np.array([describe(index) for index in rows]).T)
    return Forest(*(jnp.asarray(np.asarray(array, np.int32)) for array in arrays))


def _number(name: str, function: Callable[[str], int | None] | None, text: str | None) -> int:
    """What a function makes of a text; -1 where there is none."""
    number = function(text) if function is not None and text else None
    if number is None:
        return -1
    try:
        found = operator.index(number)
    except TypeError:
        raise TypeError(f"batch needs integers or None from {name}, got {number!r} for {text!r}.") from None
    if not 0 <= found <= np.iinfo(np.int32).max:
        raise ValueError(f"batch needs integers of 32 bits, 0 or more, from {name}, got {found} for {text!r}.")
    return found


def _plan(children: Sequence[Sequence[int]], width: int) -> list[list[int]]:
    """The inner nodes of each step: of those that are ready the farthest from their root."""
    depth, parent = [0] * len(children), [-1] * len(children)
    waiting = [sum(bool(children[child]) for child in kept) for kept in children]
    for index in reversed(range(len(children))):
        for child in children[index]:
            depth[child], parent[child] = depth[index] + 1, index
    ready = [(-depth[index], index) for index, kept in enumerate(children) if kept and not waiting[index]]
    heapq.heapify(ready)
    planned = []
    while ready:
        planned.append([heapq.heappop(ready)[1] for _ in range(min(width, len(ready)))])
        for index in planned[-1]:
            above = parent[index]
            if above >= 0:
                waiting[above] -= 1
                if not waiting[above]:
                    heapq.heappush(ready, (-depth[above], above))
    return planned


def padding(forest: Forest) -> float:
    """The share of rows that are no nodes, and computed all the same.

    >>> from jaxseq.trees import parse
    >>> print(round(padding(batch(parse("(3 (2 It) (4 (2 's) (4 fun)))"), width=1, leaves=4, steps=1)), 4))
    0.1667
    """
    if isinstance(forest.tree, Tracer):
        raise TypeError("padding counts the rows of a forest whose numbers are known: call it outside of jit.")
    return 1 - float(np.mean(np.asarray(forest.mask)))


def evaluate(composition: Composition, params: Params, forest: Forest, xs: Array) -> State:
    """The states of all nodes of a batch of trees, `[rows, ...]`, zero at padding; at `forest.roots`, of whole trees.

    `xs` are the inputs of the leaves, `[leaves, input]` with `forest.leaves` rows, or of all nodes, `[rows, input]`,
    where the composition reads them (zeros where a node has none). What they hold at padding has no effect. Forests of
    one shape share one program, whatever their trees. Inputs that are sharded are gathered: any node may need any row.

    Raises:
        ValueError, TypeError: if the inputs have other rows, there are more children than the composition takes, or
            these are no composition and no forest.

    >>> import jaxseq as js
    >>> words = {"It": 0, "'s": 1, "fun": 2}
    >>> forest = js.trees.batch(js.trees.parse("(3 (2 It) (4 (2 's) (4 fine)))"), token=words.get)
    >>> net = js.trees.Recursive(2)
    >>> tokens = forest.tokens[: forest.leaves]
    >>> vectors = jnp.where(tokens[:, None] >= 0, jnp.eye(3, 2)[tokens], 0)  # "fine" is unknown
    >>> js.trees.evaluate(net, net.init(jax.random.key(0)), forest, vectors)[forest.roots].shape
    (1, 2)
    """
    if not isinstance(forest, Forest):
        raise TypeError(f"evaluate needs a forest, as trees.batch makes it of trees, got {type(forest).__name__}.")
    check_composition("evaluate", composition)
    if jnp.ndim(forest.tree) != 1:
        raise ValueError(f"evaluate takes one forest, got {jnp.shape(forest.tree)[:-1]} stacked: vmap takes several.")
    return _evaluate(composition, params, forest, jnp.asarray(xs))


@jax.jit(static_argnums=0)
def _evaluate(composition, params, forest, xs):
    rows, leaves = len(forest.tree), forest.leaves
    steps, width, _ = forest.children.shape
    if xs.ndim != 2 or len(xs) not in (rows, leaves):
        raise ValueError(
            f"evaluate needs the inputs of the {leaves} leaves of this forest, or of all {rows} rows, [rows, input]; "
            f"got {errors.shape_of(xs)}."
        )
    forest, xs = whole((forest, xs))
    params = sharding.placed(params, PartitionSpec())
    xs = masks.zero_unless(forest.mask[: len(xs)], xs)
    at_leaves = composition.leaf(params, xs[:leaves])
    inner = xs[leaves:].reshape(steps, width, *xs.shape[1:]) if len(xs) == rows else None

    def step(states, inputs):
        children, x, start = inputs
        given = jax.tree.map(lambda leaf: sharding.rows(leaf, children, "clip"), states)
        new = combine(composition, params, given, children >= 0, x)
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda all_of, part: put(all_of, part, start, 0), states, new), None

    states = jax.tree.map(lambda leaf: pad(leaf, 0, rows - leaves), at_leaves)
    starts = leaves + width * jnp.arange(steps)
    states, _ = scan(step, states, (forest.children, inner, starts))
    return masks.zero_unless(forest.mask, states)
