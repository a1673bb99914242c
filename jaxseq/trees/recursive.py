"""Recursive networks: one function of the children, up a tree."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxseq.core import errors
from jaxseq.core.activations import Activation, activation
from jaxseq.core.sharding import placed
from jaxseq.trees.composition import Composition

_orthogonal = initializers.orthogonal()


class RecursiveParams(NamedTuple):
    """The parameters of a recursive network."""

    recurrent_kernel: Float[Array, "recurrent child hidden"]
    bias: Float[Array, "hidden"]


class Recursive(Composition):
    """The recursive network: a node is a function of its children side by side.

        p = tanh([c_1; ...; c_n] W + b)

    The state is one vector, that of a leaf its input: put a `Dense` before if it has another size. An absent child is
    a vector of zeros. `arity` is n. The kernel starts orthogonal, as a map of all children together, the bias at 0.

    R. Socher et al., Parsing natural scenes and natural language with recursive neural networks, ICML 2011.

    >>> import jaxseq as js
    >>> net = Recursive(3)
    >>> js.trees.balanced(net, net.init(jax.random.key(0)), jnp.ones((2, 5, 3))).shape
    (2, 3)
    """

    hidden_size: int
    _: dataclasses.KW_ONLY
    arity: int = 2
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arity(self)

    @property
    def input_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array) -> Any:
        errors.check_key(self, key)
        shape = (self.hidden_size, self.arity, self.hidden_size)
        return RecursiveParams(_orthogonal(key, shape), jnp.zeros(self.hidden_size))

    def axes(self) -> Any:
        return RecursiveParams._make((PartitionSpec("recurrent", "child", "hidden"), PartitionSpec("hidden")))

    def leaf(self, params: Any, x: Float[Array, "*batch input"]) -> Float[Array, "*batch hidden"]:
        check_leaf(self, params, x)
        return placed(x, PartitionSpec(*jax.typeof(x).sharding.spec[:-1], *jax.typeof(params.bias).sharding.spec))

    def compose(
        self,
        params: Any,
        children: Float[Array, "*batch child hidden"],
        mask: Bool[Array, "*batch child"],
        x: Float[Array, "*batch input"] | None = None,
    ) -> Float[Array, "*batch hidden"]:
        if x is not None:
            raise ValueError(f"{self} reads no inputs at inner nodes: give those of the leaves alone.")
        return activation(self.activation)(self.product(params, children))

    def product(self, params: Any, children: Float[Array, "*batch child hidden"]) -> Float[Array, "*batch hidden"]:
        """What the activation is applied to."""
        z = of_children(children, params.recurrent_kernel)
        return z + jnp.broadcast_to(params.bias, z.shape)


class RNTNParams(NamedTuple):
    """The parameters of a recursive neural tensor network."""

    recurrent_kernel: Float[Array, "recurrent child hidden"]
    bias: Float[Array, "hidden"]
    tensor: Float[Array, "recurrent child recurrent child hidden"]


class RNTN(Recursive):
    """The recursive neural tensor network, in which children also multiply each other.

        c = [c_1; ...; c_n]
        p_k = tanh(c V_k cᵀ + (c W + b)_k)

    The tensor V starts orthogonal, as a map of all products together.

    R. Socher et al., Recursive deep models for semantic compositionality over a sentiment treebank, EMNLP 2013.

    >>> net = RNTN(3)
    >>> net.init(jax.random.key(0)).tensor.shape
    (3, 2, 3, 2, 3)
    """

    def init(self, key: Array) -> RNTNParams:
        key, tensor_key = jax.random.split(key)
        shape = (self.hidden_size, self.arity) * 2 + (self.hidden_size,)
        return RNTNParams(*super().init(key), tensor=_orthogonal(tensor_key, shape))

    def axes(self) -> Any:
        return RNTNParams(*super().axes(), tensor=PartitionSpec("recurrent", "child", None, None, "hidden"))  # pyright: ignore[reportArgumentType]

    def product(self, params: RNTNParams, children: Float[Array, "*batch child hidden"]) -> Any:
        rows = of_children(children, params.tensor)
        return jnp.einsum("...ch,...hck->...k", children, rows) + super().product(params, children)


def check_arity(composition: Any) -> None:
    """Raises ValueError unless the arity is at least 1."""
    if composition.arity < 1:
        raise ValueError(f"{type(composition).__name__} needs arity >= 1, got {composition.arity}.")


def check_leaf(composition: Any, params: Any, x: Any) -> None:
    """Raises unless params and inputs are those of the composition, of one dtype."""
    errors.check_params(composition, params)
    errors.check_features(composition, x, composition.input_size)
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        raise TypeError(
            f"{composition} reads vectors, but got {errors.shape_of(x)}: integers that are features are cast with "
            ".astype(float)."
        )
    errors.check_dtype(composition, x, errors.float_dtype(params))


def of_children(
    children: Float[Array, "*batch child recurrent"], kernel: Float[Array, "recurrent child *units"]
) -> Any:
    """The product of all children side by side and a kernel, `[*batch, *units]`."""
    return jnp.tensordot(children, kernel.swapaxes(0, 1), 2)
