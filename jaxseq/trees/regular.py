"""Trees that need no data: a balanced one over a sequence, and one of quarters over an image."""

from numbers import Integral

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxseq.core import errors, masks, sharding
from jaxseq.core.layer import Params
from jaxseq.trees.composition import Composition, State, check_composition, combine, pad, whole


def balanced(
    composition: Composition,
    params: Params,
    xs: Float[Array, "*batch time input"],
    mask: Bool[Array, "*batch time"] | None = None,
) -> State:
    """The state of the root of a balanced binary tree over each sequence, `[*batch, ...]`.

    Neighbours are composed in pairs, then pairs of pairs: ceil(log2 T) compositions one after the other, where a chain
    has T - 1. What has no partner goes up as it is, so that a row of length 1 gives the state of its leaf. Steps off
    the mask are as if they were not there, gaps too: a row with n of them is a tree of depth ceil(log2 n), but as many
    compositions are computed as for T. A row without any gives zeros.

    Raises:
        ValueError, TypeError: if the inputs or the mask have another shape or dtype.

    >>> import jaxseq as js
    >>> net = js.trees.NaryTreeLSTM(2, 3)
    >>> mask = js.length_mask(jnp.array([5, 0]), 5)
    >>> root = balanced(net, net.init(jax.random.key(0)), jnp.ones((2, 5, 2)), mask)
    >>> root.hidden.shape, root.hidden[1].tolist()
    ((2, 3), [0.0, 0.0, 0.0])
    """
    xs = jnp.asarray(xs)
    if xs.ndim < 2:
        raise ValueError(f"balanced needs inputs [*batch, time, input], got {errors.shape_of(xs)}.")
    check_composition("balanced", composition)
    if mask is not None:
        mask = jnp.asarray(mask)
        errors.check_flags(composition, mask, "mask", xs.shape[:-1])
    return _balanced(composition, params, xs, mask)


@jax.jit(static_argnums=0)
def _balanced(composition, params, xs, mask):
    *batch_shape, time, _ = xs.shape
    xs, mask = whole((xs, mask), sharding.leading_spec((xs, mask), len(batch_shape)))
    params = sharding.placed(params, PartitionSpec())
    present = jnp.ones_like(xs[..., 0], bool)
    if mask is not None:
        order = jnp.argsort(~mask, axis=-1, stable=True)  # what is there moves to the front
        xs = jnp.take_along_axis(masks.zero_unless(mask, xs), order[..., None], axis=-2)
        present = jnp.take_along_axis(mask, order, axis=-1)
    if time == 0:
        xs, present = pad(xs, xs.ndim - 2, 1), pad(present, xs.ndim - 2, 1)
    states, axis = composition.leaf(params, xs), present.ndim - 1
    while present.shape[-1] > 1:
        pairs = jax.tree.map(lambda leaf: _halve(leaf, axis), states)
        states, present = _join(composition, params, pairs, _halve(present, axis))
    return jax.tree.map(lambda leaf: jnp.squeeze(leaf, axis), masks.zero_unless(present, states))


def quad_tree(
    composition: Composition, params: Params, images: Float[Array, "*batch height width channel"], patch_size: int = 1
) -> State:
    """The state of the root of a tree of quarters over each image, `[*batch, ...]`.

    Leaves are patches of `patch_size` x `patch_size` pixels, row by row as one vector; four of them, the upper left,
    upper right, lower left and lower right, are the children of a node, four such nodes those of the next, up to the
    root. Where the image ends, children are absent, and what is alone goes up as it is.

    Raises:
        ValueError, TypeError: if the image is empty, or does not divide into patches of so many pixels.

    >>> import jaxseq as js
    >>> net = js.trees.NaryTreeLSTM(2 * 2 * 3, 5, arity=4)
    >>> quad_tree(net, net.init(jax.random.key(0)), jnp.ones((7, 16, 12, 3)), patch_size=2).hidden.shape
    (7, 5)
    """
    images = jnp.asarray(images)
    if images.ndim < 3 or 0 in images.shape[-3:-1]:
        raise ValueError(f"quad_tree needs images [*batch, height, width, channel], got {errors.shape_of(images)}.")
    check_composition("quad_tree", composition)
    if isinstance(patch_size, bool) or not isinstance(patch_size, Integral) or patch_size < 1:
        raise ValueError(f"quad_tree needs an integer patch_size >= 1, got {patch_size!r}.")
    height, width = images.shape[-3:-1]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"quad_tree needs a height and width that are multiples of patch_size={patch_size}, got {height} x {width}:"
            " pad or crop the images."
        )
    return _quad_tree(composition, params, images, int(patch_size))


@jax.jit(static_argnums=(0, 3))
def _quad_tree(composition, params, images, size):
    *batch_shape, height, width, channels = images.shape
    rows, columns, axis = height // size, width // size, len(batch_shape)
    images = whole(images, sharding.leading_spec(images, axis))
    params = sharding.placed(params, PartitionSpec())
    patches = _reshape(images, axis, 2, (rows, size, columns, size)).swapaxes(-4, -3)
    states = composition.leaf(params, _reshape(patches, axis + 2, 3, (size * size * channels,)))
    present = jnp.ones_like(patches[..., 0, 0, 0], bool)

    def quarters(leaf):  # [*batch, rows, 2, columns, 2, ...] -> [*batch, rows, columns, 4, ...]
        leaf = jnp.moveaxis(_halve(_halve(leaf, axis + 1), axis), axis + 1, axis + 2)
        return _reshape(leaf, axis + 2, 2, (4,))

    while max(present.shape[-2:]) > 1:
        states, present = _join(composition, params, jax.tree.map(quarters, states), quarters(present))
    return jax.tree.map(lambda leaf: jnp.squeeze(leaf, (axis, axis + 1)), states)


def _join(composition: Composition, params: Params, children: State, present: Array) -> tuple[State, Array]:
    """The states of nodes and whether they are there, from those of their children; one alone goes up as it is."""
    together = combine(composition, params, children, present)
    children, axis = masks.zero_unless(present, children), present.ndim - 1
    alone = jax.tree.map(lambda leaf: leaf.sum(axis, dtype=leaf.dtype), children)
    return masks.select(present.sum(-1) > 1, together, alone), present.any(-1)


def _halve(leaf: Array, axis: int) -> Array:
    """An axis in pairs `[..., count / 2, 2, ...]`, the last one's partner being zeros where the count is odd."""
    leaf = pad(leaf, axis, leaf.shape[axis] % 2)
    return _reshape(leaf, axis, 1, (leaf.shape[axis] // 2, 2))


def _reshape(leaf: Array, axis: int, count: int, sizes: tuple[int, ...]) -> Array:
    """So many axes from one on, whole on every device, as others of these sizes; the rest is sharded as it was."""
    shape, spec = leaf.shape, jax.typeof(leaf).sharding.spec
    spec = PartitionSpec(*spec[:axis], *[None] * len(sizes), *spec[axis + count :])
    new = (*shape[:axis], *sizes, *shape[axis + count :])
    return jnp.reshape(leaf, new, out_sharding=sharding.out_sharding(spec, leaf))
