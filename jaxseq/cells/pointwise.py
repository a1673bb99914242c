"""Cells without a state: each step is computed by itself, so a whole sequence is computed at once."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxseq.core import errors, masks, sharding
from jaxseq.core.activations import Activation, activation
from jaxseq.core.cell import Cell, Params, Run

_lecun = initializers.lecun_normal()
_normal = initializers.normal()


class Pointwise(Cell):
    """A cell without a state: a subclass gives `apply`, and `init` if it has parameters."""

    def init(self, key: Array) -> Params:
        return ()

    def initial_state(self, params: Params, batch_shape: tuple[int, ...] = ()) -> tuple[()]:
        return ()

    @abc.abstractmethod
    def apply(self, params: Params, x: Any, key: Array | None = None) -> Any:
        """The output of one step."""

    def step(self, params: Params, state: tuple[()], x: Any, key: Array | None = None) -> Any:
        return state, self.apply(params, x, key)

    def _unroll(self, params: Params, xs: Any, state: tuple[()], run: Run) -> Any:
        if run.keys is not None and differs_under_vmap(run.keys):
            return super()._unroll(params, xs, state, run)
        ys = jax.vmap(lambda x, key: self.apply(params, x, key))(xs, run.keys)
        return state, ys if run.keep is None else masks.zero_unless(run.keep, ys)


def differs_under_vmap(keys: Array) -> bool:
    """Whether `vmap` over these keys draws other numbers than one key after the other, as those of "rbg" do."""
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        keys = jax.random.wrap_key_data(keys)
    return "rbg" in str(jax.random.key_impl(keys))


class OneHot(Pointwise):
    """Tokens as one-hot vectors; a token out of range gives zeros.

    The ones and zeros are weakly typed, so they take the dtype of the params they meet.

    >>> OneHot(3).unroll((), jnp.array([2, 0]))[1].tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """

    input_rank = 0
    output_rank = 1

    size: int

    @property
    def input_size(self) -> int:
        return self.size

    @property
    def output_size(self) -> int:
        return self.size

    def apply(
        self, params: tuple[()], x: Int[Array, "*batch"], key: Array | None = None
    ) -> Float[Array, "*batch size"]:
        errors.check_tokens(self, x)
        return jnp.where(jax.nn.one_hot(x, self.size, dtype=bool), 1.0, 0.0)


class EmbedParams(NamedTuple):
    """The parameters of an embedding."""

    embedding: Float[Array, "vocab size"]


class Embed(Pointwise):
    """A learned vector for each token, drawn from N(0, 1).

    Token ids reach from 0 to `vocab_size` - 1. As everywhere in JAX an id out of range raises no error by itself: one
    too large reads the last row, a negative one the first. They are reported by
    `jax.experimental.checkify.checkify(f, errors=checkify.index_checks)`.

    >>> cell = Embed(vocab_size=5, size=3)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.array([[1, 4]]))[1].shape
    (1, 2, 3)
    """

    input_rank = 0
    output_rank = 1

    vocab_size: int
    size: int

    @property
    def input_size(self) -> int:
        return self.vocab_size

    @property
    def output_size(self) -> int:
        return self.size

    def init(self, key: Array) -> EmbedParams:
        errors.check_key(self, key)
        return EmbedParams(jax.random.normal(key, (self.vocab_size, self.size)))

    def axes(self) -> Any:
        return EmbedParams._make((PartitionSpec("vocab", "size"),))

    def apply(
        self, params: EmbedParams, x: Int[Array, "*batch"], key: Array | None = None
    ) -> Float[Array, "*batch size"]:
        errors.check_params(self, params)
        errors.check_tokens(self, x)
        return sharding.rows(params.embedding, x)


class DenseParams(NamedTuple):
    """The parameters of a dense layer."""

    kernel: Float[Array, "input output"]
    bias: Float[Array, "output"]


class Dense(Pointwise):
    """An affine map of each step: y = x W + b, W drawn with variance 1 / inputs (LeCun), b = 0.

    >>> cell = Dense(input_size=2, output_size=3)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((4, 2)))[1].shape
    (4, 3)
    """

    any_rank = True

    input_size: int
    output_size: int

    def init(self, key: Array) -> DenseParams:
        errors.check_key(self, key)
        return DenseParams(_lecun(key, (self.input_size, self.output_size)), jnp.zeros(self.output_size))

    def axes(self) -> Any:
        return DenseParams._make((PartitionSpec("input", "output"), PartitionSpec("output")))

    def apply(self, params: DenseParams, x: Float[Array, "*batch input"], key: Array | None = None) -> Any:
        errors.check_params(self, params)
        errors.check_features(self, x, self.input_size)
        errors.check_dtype(self, x, params.kernel.dtype)
        y = x @ params.kernel
        return y + jnp.broadcast_to(params.bias, y.shape)


class Concatenate(Pointwise):
    """A tuple of vectors joined to one, for the cell after it.

    With it a cell reads its input and the output before it: hidden-to-hidden and output-to-hidden recurrence at once.

    >>> from jaxseq import Elman, Feedback, Stack
    >>> cell = Feedback(Stack((Concatenate((2, 3)), Elman(5, 8), Dense(8, 3))))
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((4, 2)))
    >>> ys.shape
    (4, 3)
    """

    output_rank = 1

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sizes, tuple) or not self.sizes:
            raise TypeError(f"Concatenate needs a tuple of sizes, such as (2, 3), got {self.sizes!r}.")
        if not errors.are_sizes(self.sizes):
            raise ValueError(f"Concatenate needs sizes >= 1, got {self.sizes!r}.")

    @property
    def input_rank(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (1,) * len(self.sizes)

    @property
    def input_size(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def output_size(self) -> int:
        return sum(self.sizes)

    def apply(self, params: tuple[()], x: tuple[Array, ...], key: Array | None = None) -> Float[Array, "*batch size"]:
        return jnp.concatenate(check_parts(self, x, self.sizes), axis=-1)


def check_parts(cell: Pointwise, x: Any, sizes: tuple[int, ...], dtype: Any = None) -> tuple[Array, ...]:
    """The input if it is a tuple of vectors of these sizes, of one dtype and with the same batch axes; else raises."""
    if not isinstance(x, tuple) or len(x) != len(sizes):
        raise ValueError(f"{cell} reads a tuple of {len(sizes)} vectors of {sizes} features, got {errors.shape_of(x)}.")
    for part, size in zip(x, sizes, strict=True):
        errors.check_features(cell, part, size)
        errors.check_dtype(cell, part, dtype or jnp.result_type(x[0]))
    if len({part.shape[:-1] for part in x}) > 1:
        raise ValueError(f"{cell} got vectors whose batch axes differ: {errors.shape_of(x)}.")
    return x


class Map(Pointwise):
    """A function of each step, without parameters: a name of an activation, or a module-level function `x -> y`.

    `input_rank` is the rank of x without its batch axes, a tuple of ranks if x is a tuple. A named
    activation of rank 1 stands before images as well; a function then needs their rank, `Map(function, 3)`.

    >>> Map("relu").unroll((), jnp.array([[-1.0, 2.0]]))[1].tolist()
    [[0.0, 2.0]]
    """

    function: Activation
    input_rank: int | tuple[int, ...] | None = 1  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = self.input_rank if isinstance(self.input_rank, tuple) else (self.input_rank,)
        if ranks != (None,) and not all(isinstance(rank, int) and rank >= 0 for rank in ranks):
            raise ValueError(f"Map needs a rank, or a tuple of ranks, as input_rank, got {self.input_rank!r}.")

    @property
    def any_rank(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.keeps_size and self.input_rank == 1

    @property
    def keeps_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return isinstance(self.function, str)

    def apply(self, params: tuple[()], x: Any, key: Array | None = None) -> Any:
        return activation(self.function)(x)
