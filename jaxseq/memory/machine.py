"""What cells with a memory beside them share: a controller that reads it, and what it says to the memory."""

import abc
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.core import errors
from jaxseq.core.cell import Cell
from jaxseq.core.wrapper import Extended

_lecun = initializers.lecun_normal()


class MachineParams(NamedTuple):
    """The parameters of a memory machine: those of its controller, and of what that says to the memory."""

    cell: Any
    interface_kernel: Float[Array, "input interface"]
    interface_bias: Float[Array, "interface"]


class Machine(Extended):
    """A cell, the controller, with a memory that it reads and writes at each step.

        s', h = cell(s, [x; r])
        memory', r' = access(memory, h W + b)

    Any cell of vectors is a controller, a stack of cells too; its `input_size` is that of x and of what it reads, r,
    together. A subclass gives a NamedTuple of the state with a field `controller`, `start` (that state before the first
    step), `access`, `reads` and the sizes of the interface and of what is read.
    """

    any_rank = False  # pyright: ignore[reportAssignmentType]
    keeps_size = False  # pyright: ignore[reportAssignmentType]
    output_rank = 1  # pyright: ignore[reportAssignmentType]

    cell: Cell

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        inputs, outputs = getattr(self.cell, "input_size", None), getattr(self.cell, "output_size", None)
        if self.cell.input_rank != 1 or not isinstance(inputs, int) or not isinstance(outputs, int):
            raise TypeError(
                f"{name} needs a controller that reads and gives vectors of known sizes, got {self.cell}; tokens are "
                f"embedded before it: Stack((Embed(vocab_size, size), {name}(cell, ...)))."
            )
        if inputs <= self.read_size:
            raise ValueError(
                f"{name} gives its controller the inputs and {self.read_size} features that it reads in the memory, "
                f"but {self.cell} reads {inputs} in all: give it the input_size of both together."
            )

    @property
    @abc.abstractmethod
    def read_size(self) -> int:
        """How many features the controller reads in the memory."""

    @property
    @abc.abstractmethod
    def interface_size(self) -> int:
        """How many numbers the controller gives to the memory at each step."""

    @property
    def input_size(self) -> int:
        return self.cell.input_size - self.read_size  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def output_size(self) -> int:
        return self.cell.output_size + self.read_size  # pyright: ignore[reportAttributeAccessIssue]

    @abc.abstractmethod
    def start(self, controller: Any, batch_shape: tuple[int, ...], dtype: Any) -> Any:
        """The state before the first step, with that of the controller."""

    @abc.abstractmethod
    def reads(self, state: Any) -> Float[Array, "*batch read"]:
        """What the controller reads at the next step."""

    @abc.abstractmethod
    def access(self, state: Any, interface: Float[Array, "*batch interface"]) -> Any:
        """The state after the memory was used as the controller says."""

    def init(self, key: Array) -> MachineParams:
        errors.check_key(self, key)
        cell_key, interface_key = jax.random.split(key)
        size: int = self.cell.output_size  # pyright: ignore[reportAttributeAccessIssue]
        kernel = _lecun(interface_key, (size, self.interface_size))
        return MachineParams(self.cell.init(cell_key), kernel, jnp.zeros(self.interface_size))

    def axes(self) -> Any:
        return MachineParams._make((self.cell.axes(), PartitionSpec("input", "interface"), PartitionSpec("interface")))

    def initial_state(self, params: MachineParams, batch_shape: tuple[int, ...] = ()) -> Any:
        controller = self.cell.initial_state(params.cell, batch_shape)
        return self.start(controller, batch_shape, params.interface_kernel.dtype)

    def zero_input(self, params: MachineParams, batch_shape: tuple[int, ...] = ()) -> Array:
        return super().zero_input(params, batch_shape)[..., : self.input_size]

    def step(
        self, params: MachineParams, state: Any, x: Float[Array, "*batch input"], key: Array | None = None
    ) -> tuple[Any, Float[Array, "*batch output"]]:
        errors.check_features(self, x, self.input_size)
        errors.check_dtype(self, x, params.interface_kernel.dtype)
        read = self.reads(state)
        controller, h = self.cell.step(params.cell, state.controller, jnp.concatenate([x, read], axis=-1), key)
        interface = h @ params.interface_kernel
        interface = interface + jnp.broadcast_to(params.interface_bias, interface.shape)
        state = self.access(state._replace(controller=controller), interface)
        return state, jnp.concatenate([h, self.reads(state)], axis=-1)


def split(interface: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """The parts of an interface `[*batch, size]`, of these shapes after the batch axes, one after the other."""
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    parts = jnp.split(interface, ends[:-1], axis=-1)
    return [part.reshape(*interface.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
