"""Values with parameters: frozen dataclasses of hyperparameters, from which everything that is trained derives."""

import abc
import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, dataclass_transform

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from jaxseq.core import errors
from jaxseq.core.activations import Activation, activation

Params = Any

# as types, and as text where the module of a cell defers its annotations
_NUMBERS = (int, float, "int", "float")
_NUMBERS_OR_NONE = (int | None, float | None, "int | None", "float | None")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class Layer(abc.ABC):
    """A value with parameters: the base of layers over sequences and of compositions over trees.

    Subclasses become frozen dataclasses of hyperparameters by themselves: they compare and hash by value, so equal
    layers compile once. Fields hold plain data, other layers, or module-level functions; arrays live in the params
    and states that the caller holds. A function under `jit` closes over them or takes them as static arguments.
    """

    def __init_subclass__(cls, is_value: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not is_value:  # a base that declares no fields, only what its subclasses may make one
            return
        if "__init__" in cls.__dict__:
            raise TypeError(f"{cls.__name__} defines __init__: declare its fields (size: int) instead, as a dataclass.")
        dataclasses.dataclass(frozen=True, repr=False)(cls)
        del cls.__setattr__, cls.__delattr__  # ours serve; the decorator, used again by a user, wants to write its own

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__} is a value: make another one to change {name}.")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__} is a value: it keeps {name}.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = _plain(self, field.name, getattr(self, field.name))
            if field.type == Activation:
                activation(value)
            elif field.type in _NUMBERS or (field.type in _NUMBERS_OR_NONE and value is not None):
                value = _number(self, field, value)
            object.__setattr__(self, field.name, value)

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        shown = ((field.name, getattr(self, field.name), field.default) for field in fields)
        named = (f"{name}={_show(value)}" for name, value, default in shown if value != default)
        return f"{type(self).__name__}({', '.join(named)})"

    def __format__(self, spec: str) -> str:
        """As messages name it, `f"{layer}"`: the beginning of a long `repr`; `f"{layer!r}"` is all of it."""
        return format(errors.shortened(repr(self)), spec)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if isinstance(failed := inspect.getattr_static(type(self), name, None), property):
                try:
                    return failed.__get__(self)
                except AttributeError as error:  # as such, it would read as if nothing were declared
                    raise TypeError(f"{type(self).__name__}.{name} fails: {error}") from error
            raise AttributeError(f"{type(self).__name__} has no {name}{self._hint(name)}.")

    def _hint(self, name: str) -> str:
        """What a message adds for one who looks for an attribute that is not there."""
        return ""

    @abc.abstractmethod
    def init(self, key: Array) -> Params:
        """New parameters, a tree of arrays; `jax.eval_shape(layer.init, key)` gives their shapes alone."""

    def attach(self, params: Params, memory: Any, mask: Bool[Array, "*batch memory"] | None = None) -> Params:
        """The params that also hold a constant `memory` to read; unchanged where nothing reads one.

        What is projected from the memory is computed here, with these params. So call it inside the loss: a gradient
        with regard to params that hold a memory already does not reach the kernels that project it.
        None takes it off again.
        """
        return params

    def axes(self) -> Any:
        """The tree of the params with the names of each array's axes, a `PartitionSpec`, for leaves.

        Sharding rules, weight-decay masks and initialisers go by them; `flax.linen.logical_to_mesh` maps them. What has
        an axis "input" or "recurrent" is a kernel: a bias of gates has two axes as well. A kernel whose last axis is
        "unit", one within a block, is block-diagonal: it holds the blocks one after the other.
        """
        params = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(lambda leaf: PartitionSpec(*[None] * leaf.ndim), params)

    def map_layers(self, function: Callable[["Layer", Params], Params], params: Params) -> Params:
        """The params, with those of each layer inside stacks and wrappers replaced by `function(layer, params)`.

        Wrappers are layers too: the function is given each after what is inside, with params that hold those.
        """
        return function(self, params)


def _plain(layer: Any, name: str, value: Any) -> Any:
    """A value that compares and hashes: lists as tuples and NumPy's numbers as Python's, in tuples too."""
    if isinstance(value, list | tuple):
        parts = [_plain(layer, name, part) for part in value]
        return getattr(value, "_make", tuple)(parts)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{type(layer).__name__} needs a number {name}, got nan.")
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{type(layer).__name__} cannot be hashed, so it cannot be compiled: its fields must be plain data, layers "
            f"or module-level functions, but {name} holds {value!r}."
        ) from None
    return value


def _number(layer: Any, field: dataclasses.Field, value: Any) -> int | float:
    """A number as a plain int or float; sizes are at least 1."""
    name = type(layer).__name__
    if isinstance(value, bool):
        raise TypeError(f"{name} needs a number {field.name}, got {value}.")
    if "float" in inspect.formatannotation(field.type):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} needs a number {field.name}, got {value!r}.")
        return float(value)
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} needs an integer {field.name}, got {value!r}.")
    number = int(value)
    if number < 1 and field.name.endswith("size"):
        raise ValueError(f"{name} needs {field.name} >= 1, got {number}.")
    return number


def _show(value: Any) -> str:
    """`repr`, with functions by their names."""
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)
