"""The protocol of a tree's node: what it computes from its children."""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxseq.core import errors, masks, sharding
from jaxseq.core.layer import Layer, Params

State = Any


class Composition(Layer, is_value=False):
    """What the node of a tree computes from its children; `trees.evaluate` and others run it over whole trees.

    A new composition gives `init` and `compose`, and `leaf` unless the state of a leaf is its input itself. It is a
    value, a frozen dataclass, as cells are. `arity` is the number of children that it takes, a field or a constant;
    None, the default, takes any.

    >>> import jaxseq as js
    >>> class Mean(js.trees.Composition):
    ...     def init(self, key):
    ...         return ()
    ...     def compose(self, params, children, mask, x=None):
    ...         count = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(children.dtype)
    ...         return children.sum(-2) / count
    >>> forest = js.trees.batch(js.trees.parse("(S (A a) (B b) (S (C c) (D d)))"), leaves=4)
    >>> states = js.trees.evaluate(Mean(), (), forest, jnp.array([[1.0], [2.0], [4.0], [8.0]]))
    >>> states[forest.roots].tolist()
    [[3.0]]
    """

    arity: ClassVar[Any] = None

    @abc.abstractmethod
    def compose(
        self,
        params: Params,
        children: State,
        mask: Bool[Array, "*batch child"],
        x: Float[Array, "*batch input"] | None = None,
    ) -> State:
        """The state of inner nodes, from the states of their children `[*batch, child, ...]`.

        Off the mask, where a node has no such child, the state is zero. A node of padding has no child at all: values
        and gradients must be finite there. `x` is the node's own input, None where only leaves have one.
        """

    def leaf(self, params: Params, x: Float[Array, "*batch input"]) -> State:
        """The state of leaves, a tree of arrays `[*batch, ...]`: by default their inputs."""
        return x


def combine(
    composition: Composition, params: Params, children: State, mask: Bool[Array, "*batch child"], x: Array | None = None
) -> State:
    """`compose` with as many children as it takes, those off the mask zero, whatever stands there.

    Raises:
        ValueError: if there are more.
        TypeError: if the state that `compose` gives is not as those of the children.
    """
    children, arity = masks.zero_unless(mask, children), composition.arity
    if arity is not None and mask.shape[-1] > arity:
        raise ValueError(
            f"{composition} composes {arity} children, but there are nodes with {mask.shape[-1]}: binarise the trees, "
            "or take a composition of more."
        )
    axis = mask.ndim - 1
    if arity is not None:
        children, mask = jax.tree.map(lambda leaf: pad(leaf, axis, arity - mask.shape[-1]), (children, mask))
    state = composition.compose(params, children, mask, x)
    expected = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf.sum(axis, dtype=leaf.dtype), children))
    if errors.shape_of(state) != errors.shape_of(expected):
        raise TypeError(
            f"{composition}.compose needs to give a state as those of the children, {errors.shape_of(expected)}; it "
            f"gave {errors.shape_of(state)}."
        )
    return jax.tree.map(lambda leaf, child: sharding.placed(leaf, _without(axis, child)), state, children)


def _without(axis: int, leaf: Array) -> PartitionSpec:
    """How an array is sharded, but for one axis."""
    spec = jax.typeof(leaf).sharding.spec
    return PartitionSpec(*spec[:axis], *spec[axis + 1 :])


def pad(leaf: Any, axis: int, count: int) -> Array:
    """An array with so many zeros more at the end of an axis."""
    return jnp.pad(leaf, [(0, count if index == axis else 0) for index in range(leaf.ndim)])


def whole(tree: Any, spec: PartitionSpec | None = None) -> Any:
    """Arrays whose axes are whole on every device, but for the first, sharded as `spec` says."""
    spec = PartitionSpec() if spec is None else spec

    def leaf(array):
        return sharding.placed(array, PartitionSpec(*spec, *[None] * (array.ndim - len(spec))))

    return jax.tree.map(leaf, tree)


def check_composition(name: str, composition: Any) -> None:
    """Raises TypeError unless this is a composition."""
    if not isinstance(composition, Composition):
        raise TypeError(
            f"{name} takes a Composition, such as NaryTreeLSTM, which computes a node from its children; got "
            f"{composition}."
        )
