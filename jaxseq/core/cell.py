"""The protocol: a layer unrolls over a whole sequence; a cell also advances one step, and the two agree."""

import abc
import inspect
import operator
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool

from jaxseq.core import errors
from jaxseq.core.layer import Layer, Params
from jaxseq.core.scan import scan
from jaxseq.core.unroll import Run, unroll_checked, unroll_steps

State = Any


def _takes(method: Any, count: int) -> bool:
    """Whether a method can be called with so many arguments by position."""
    try:
        inspect.signature(method).bind(*range(count))
    except TypeError:
        return False
    return True


class SequenceLayer(Layer, is_value=False):
    """A layer that reads a whole sequence and gives a whole sequence: the base of everything that has `unroll`.

    What a subclass may declare: `input_rank`, the rank of one step's input, without batch and time (0 for tokens, 1,
    the default, for vectors, 3 for images; for a tree of inputs the tree of their ranks, such as
    `{"word": 0, "features": 1}`; None for no inputs); and `input_size` (of features, or of the vocabulary of tokens)
    and `output_size`, fields or properties, by which chains are checked; `any_rank = True` if it reads the last axis
    alone, so that before images in a chain it reads images; and `output_rank`, by which chains are checked as well.
    """

    input_rank: ClassVar[Any] = 1
    any_rank: ClassVar[bool] = False  # a chain takes the rank of the first layer that is not so
    output_rank: ClassVar[int | None] = None  # of one step's output; None where it is not known
    input_names: ClassVar[tuple[str, ...]] = ()  # of the parts of a tuple of inputs, for messages
    keeps_size: ClassVar[bool] = False  # one step's output has the shape of its input

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "unroll" in cls.__dict__ and cls.__module__ != __name__:
            raise TypeError(f"{cls.__name__} overrides unroll, which is final: override _unroll to be faster.")
        for name, given in (("init", 2), ("initial_state", 3), ("step", 5)):
            if name in cls.__dict__ and not _takes(cls.__dict__[name], given):
                wanted = inspect.signature(getattr(Cell, name))
                raise TypeError(f"{cls.__name__}.{name}{inspect.signature(cls.__dict__[name])} needs to take {wanted}.")
        super().__init_subclass__(**kwargs)

    def _hint(self, name: str) -> str:
        if name == "step":
            return ": it reads the whole sequence; a Stack of cells steps"
        if name in ("apply", "forward"):
            return ": unroll(params, xs) reads a sequence, a cell's step(params, state, x) one step"
        return ""

    def initial_state(self, params: Params, batch_shape: tuple[int, ...] = ()) -> State:
        """The state before the first step, a tree of arrays `[*batch, ...]`; `()` for a layer that has none."""
        return ()

    def draw(self, params: Params, key: Array) -> Params:
        """The params with the noise that lasts a whole sequence; `unroll` calls it once if it has a key."""
        return params

    def zero_input(self, params: Params, batch_shape: tuple[int, ...] = ()) -> Any:
        """The x = 0 of one step: token 0 for cells that read tokens, else zeros of `input_size` features."""
        dtype = errors.float_dtype(params) or jnp.zeros(()).dtype

        def zeros(rank, size):
            if rank == 0:
                return jnp.zeros(batch_shape, int)
            if rank == 1 and size is not None:
                return jnp.zeros((*batch_shape, size), dtype)
            raise TypeError(f"{self} does not tell the shape of its inputs: declare input_size or override zero_input.")

        sizes = getattr(self, "input_size", None)
        if jax.tree.structure(sizes) != jax.tree.structure(self.input_rank):
            return jax.tree.map(lambda rank: zeros(rank, None), self.input_rank)
        return jax.tree.map(zeros, self.input_rank, sizes)

    def output_run(self, run: Run) -> Run:
        """What goes with the outputs of `_unroll`: the `run` of its inputs, unless they have other steps."""
        return run

    @final
    def output_mask(self, mask: Bool[Array, "*batch time"]) -> Bool[Array, "*batch steps"]:
        """The mask of the outputs, given that of the inputs: the same, unless a layer changes the number of steps."""
        mask = jnp.asarray(mask)
        errors.check_flags(self, mask, "mask", mask.shape)
        keep = jnp.moveaxis(mask, -1, 0)
        run = self.output_run(Run(mask.shape[-1], mask.shape[:-1], False, keep=keep, reset=None, keys=None))
        return jnp.moveaxis(run.keep, 0, -1)  # pyright: ignore[reportArgumentType]

    @final
    def unroll(
        self,
        params: Params,
        xs: Any,
        state: State = None,
        *,
        mask: Bool[Array, "*batch time"] | None = None,
        reset: Bool[Array, "*batch time"] | None = None,
        reverse: bool = False,
        key: Array | None = None,
        length: int | None = None,
    ) -> tuple[State, Any]:
        """Reads a whole sequence.

        It is compiled once for equal layers and shapes, also when called outside of `jit`.

        Args:
            params: what `init` made.
            xs: the inputs `[*batch, time, *features]`, a tree of them, or None for a layer without inputs.
            state: the state to start from; by default `initial_state`.
            mask: False at padding. There the state is held, the output is zero, and nothing that the inputs hold
                has any effect. Gaps and empty rows are allowed.
            reset: True where a new segment begins: the state returns to `initial_state` before that step.
            reverse: read from the last step to the first; `ys` keep the order of `xs`.
            key: for the noise of layers that have any; None means no noise.
            length: the number of steps, needed only where neither inputs nor masks tell it.

        Returns:
            The state after the last step read, and the outputs `[*batch, time, ...]`.

        Raises:
            ValueError, TypeError: if a shape, rank, dtype or tree is not what the layer needs.

        With a key, `draw_key, step_key = jax.random.split(key)`: `draw` gets the first, and step t the key
        `jax.random.split(step_key, time)[t]`.
        """
        try:
            hash(self)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__} cannot be hashed, so it cannot be compiled: its fields must be plain data, "
                f"layers or module-level functions ({error})."
            ) from None
        if isinstance(reverse, Tracer) or isinstance(length, Tracer):
            raise TypeError(f"{type(self).__name__} needs a static reverse and length: bind them before jit or vmap.")
        length = length if length is None else operator.index(length)
        if key is not None:
            errors.check_key(self, key)
        mask, reset = (flags if flags is None else jnp.asarray(flags) for flags in (mask, reset))
        return unroll_checked(self, bool(reverse), length, params, xs, state, mask, reset, key)

    @abc.abstractmethod
    def _unroll(self, params: Params, xs: Any, state: State, run: Run) -> tuple[State, Any]:
        """What `unroll` does once everything is checked, filled in and time-major.

        `xs` is zero off `run.keep`, and so must `ys` be. An override may only be faster than the default of `Cell`.
        """


class _CellType(abc.ABCMeta):
    """Asks the layer, as for a protocol: a wrapper is a cell if what it wraps is one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) and (cls is not Cell or instance._is_cell)


class Cell(SequenceLayer, metaclass=_CellType):
    """A causal layer: it also advances one step at a time.

    A new cell gives `init`, `initial_state` and `step` and inherits the rest; one that reads tokens declares
    `input_rank = 0`. At padded steps it is given x = 0, so
    values and gradients must be finite there: x / |x| is not, x / (|x| + 1) is.

    `free_state = False` says that the arrays of the state belong together, as a sum and its count do: wrappers that
    draw, learn, mix or clip states refuse such a cell.
    """

    free_state: ClassVar[bool] = True
    _is_cell: ClassVar[bool] = True

    @abc.abstractmethod
    def initial_state(self, params: Params, batch_shape: tuple[int, ...] = ()) -> State:
        """The state before the first step, a tree of arrays `[*batch, ...]`; `()` for a cell that has none."""

    @abc.abstractmethod
    def step(self, params: Params, state: State, x: Any, key: Array | None = None) -> tuple[State, Any]:
        """One step, `(params, state, x) -> (state, y)` with x `[*batch, *features]`: the definition of the cell.

        The state keeps its tree, shapes and dtypes. With `key=None` there is no noise.
        """

    def _unroll(self, params: Params, xs: Any, state: State, run: Run) -> tuple[State, Any]:
        return unroll_steps(scan, self, params, xs, state, run)
