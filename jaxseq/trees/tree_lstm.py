"""Tree-structured long short-term memory: a memory cell for each node, and a forget gate for each child."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxseq.cells.gated import GATED_AXES, GatedParams, init_gated
from jaxseq.cells.lstm import LSTMState
from jaxseq.core import errors
from jaxseq.trees.composition import Composition
from jaxseq.trees.recursive import check_arity, check_leaf, of_children

_orthogonal = initializers.orthogonal()
_sigma = jax.nn.sigmoid


class TreeLSTM(Composition):
    """What Tree-LSTMs share: their sizes, and a leaf, a node without children.

    c = σ(i) tanh(g),   h = σ(o) tanh(c)        where i, g, o = x W + b
    """

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")

    input_size: int
    hidden_size: int

    def leaf(self, params: Any, x: Float[Array, "*batch input"]) -> LSTMState:
        check_leaf(self, params, x)
        i, _, g, o = _from_input(params, x)
        return _state(_sigma(i) * jnp.tanh(g), o)


class ChildSumTreeLSTM(TreeLSTM):
    """A Tree-LSTM for any number of children in no order, as those of dependency trees.

        i, g, o = x W + (Σ_k h_k) R + b
        f_k = x W_f + h_k R_f + b_f                                for each child k
        c = σ(i) tanh(g) + Σ_k σ(f_k) c_k
        h = σ(o) tanh(c)

    A leaf has no children. Where inner nodes have no inputs their x is 0. Over a chain it is an `LSTM`, with the same
    params. The forget gate's bias starts at 1.

    K. S. Tai, R. Socher and C. D. Manning, Improved semantic representations from tree-structured long short-term
    memory networks, ACL 2015.

    >>> import jaxseq as js
    >>> net = ChildSumTreeLSTM(2, 3)
    >>> js.trees.balanced(net, net.init(jax.random.key(0)), jnp.ones((4, 5, 2))).hidden.shape
    (4, 3)
    """

    def init(self, key: Array) -> GatedParams:
        errors.check_key(self, key)
        params = init_gated(key, self.input_size, 4, self.hidden_size)
        return params._replace(bias=params.bias.at[1].set(1))

    def axes(self) -> Any:
        return GATED_AXES

    def compose(
        self,
        params: Any,
        children: LSTMState,
        mask: Bool[Array, "*batch child"],
        x: Float[Array, "*batch input"] | None = None,
    ) -> LSTMState:
        i, f, g, o = _from_input(params, x, children.hidden.shape[:-2])
        kernel = params.recurrent_kernel
        of_sum = _gates(children.hidden.sum(-2), jnp.concatenate([kernel[:, :1], kernel[:, 2:]], axis=1), jnp.matmul)
        i, g, o = (z + from_children for z, from_children in zip((i, g, o), of_sum, strict=True))
        f = f[..., None, :] + children.hidden @ kernel[:, 1]
        return _state(_sigma(i) * jnp.tanh(g) + (_sigma(f) * children.cell).sum(-2), o)


class NaryTreeLSTMParams(NamedTuple):
    """The parameters of an n-ary Tree-LSTM."""

    input_kernel: Float[Array, "input 4 hidden"]
    recurrent_kernel: Float[Array, "recurrent child gate hidden"]
    bias: Float[Array, "4 hidden"]


class NaryTreeLSTM(TreeLSTM):
    """A Tree-LSTM for at most `arity` children in an order, each with kernels of its own: constituency trees.

        i, g, o = x W + Σ_l h_l R_l + b
        f_k = x W_f + Σ_l h_l R_fkl + b_f                          for each child k
        c = σ(i) tanh(g) + Σ_k σ(f_k) c_k
        h = σ(o) tanh(c)

    The gates of `recurrent_kernel` are i, f_1, ..., f_n, g, o; those of `input_kernel` and `bias` are i, f, g, o. A
    leaf has no children, and an absent child is one of zeros. Where inner nodes have no inputs their x is 0. Recurrent
    kernels start orthogonal, each gate as a map of all children together, the forget gate's bias at 1.

    K. S. Tai, R. Socher and C. D. Manning, Improved semantic representations from tree-structured long short-term
    memory networks, ACL 2015.

    >>> import jaxseq as js
    >>> net = NaryTreeLSTM(2, 3)
    >>> net.init(jax.random.key(0)).recurrent_kernel.shape
    (3, 2, 5, 3)
    >>> js.trees.balanced(net, net.init(jax.random.key(0)), jnp.ones((4, 5, 2))).hidden.shape
    (4, 3)
    """

    _: dataclasses.KW_ONLY
    arity: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arity(self)

    def init(self, key: Array) -> NaryTreeLSTMParams:
        errors.check_key(self, key)
        key, recurrent_key = jax.random.split(key)
        params = init_gated(key, self.input_size, 4, self.hidden_size)
        shape, keys = (self.hidden_size, self.arity, self.hidden_size), jax.random.split(recurrent_key, 3 + self.arity)
        return NaryTreeLSTMParams(
            input_kernel=params.input_kernel,
            recurrent_kernel=jax.vmap(lambda key: _orthogonal(key, shape), out_axes=2)(keys),
            bias=params.bias.at[1].set(1),
        )

    def axes(self) -> Any:
        recurrent: Any = PartitionSpec("recurrent", "child", "gate", "hidden")
        return NaryTreeLSTMParams(GATED_AXES.input_kernel, recurrent, GATED_AXES.bias)

    def compose(
        self,
        params: Any,
        children: LSTMState,
        mask: Bool[Array, "*batch child"],
        x: Float[Array, "*batch input"] | None = None,
    ) -> LSTMState:
        i, f, g, o = _from_input(params, x, children.hidden.shape[:-2])
        from_i, *from_f, from_g, from_o = _gates(children.hidden, params.recurrent_kernel, of_children)
        cell = _sigma(i + from_i) * jnp.tanh(g + from_g)
        for k, from_k in enumerate(from_f):
            cell = cell + _sigma(f + from_k) * children.cell[..., k, :]
        return _state(cell, o + from_o)


def _gates(x: Array, kernel: Float[Array, "*features gate hidden"], product: Any) -> list[Array]:
    """The products with each gate's kernel: one of all side by side, unless units are sharded over devices."""
    if jax.typeof(kernel).sharding.spec[-1] is not None:
        return [product(x, gate) for gate in jnp.unstack(kernel, axis=-2)]
    flat = kernel.reshape(*kernel.shape[:-2], -1)
    return jnp.split(product(x, flat), kernel.shape[-2], axis=-1)


def _from_input(params: Any, x: Array | None, batch_shape: tuple[int, ...] = ()) -> list[Array]:
    """x W + b for each gate; b alone without an input."""
    if x is None:
        return [jnp.broadcast_to(bias, (*batch_shape, *bias.shape)) for bias in params.bias]
    products = _gates(x, params.input_kernel, jnp.matmul)
    return [z + jnp.broadcast_to(bias, z.shape) for z, bias in zip(products, params.bias, strict=True)]


def _state(cell: Array, o: Array) -> LSTMState:
    return LSTMState(hidden=_sigma(o) * jnp.tanh(cell), cell=cell)
