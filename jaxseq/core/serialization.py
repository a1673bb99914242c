"""Cells as JSON and back, without importing or running anything that the text names."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxseq.core.cell import SequenceLayer


def to_json(layer: SequenceLayer) -> str:
    """The hyperparameters of a layer as JSON: `{"LSTM": {"input_size": 2, "hidden_size": 3, ...}}`.

    Functions are written by name. A lambda, a nested function or a partial has none to be found by: TypeError. Choices
    of implementation (fields with the metadata `{"json": False}`) are left out.

    >>> import jaxseq as js
    >>> print(to_json(js.Dense(2, 3)))
    {"Dense": {"input_size": 2, "output_size": 3}}
    """
    if not isinstance(layer, SequenceLayer):
        raise TypeError(f"to_json writes cells and layers, got {layer!r}.")
    return json.dumps(_encode(layer, type(layer).__name__))


def from_json(text: str, extra: Iterable[type | Callable[..., Any]] = ()) -> Any:
    """The layer that `to_json` wrote.

    It knows the classes of this library and those in `extra`: your own layers, and the functions that fields hold.

    Raises:
        ValueError: if the text is no JSON of a layer, or names an unknown class, function or field.

    >>> import jaxseq as js
    >>> from_json('{"Stack": {"layers": [{"OneHot": {"size": 4}}, {"GRU": {"input_size": 4, "hidden_size": 3}}]}}')
    Stack(layers=(OneHot(size=4), GRU(input_size=4, hidden_size=3)))
    """
    known = {cls.__name__: cls for cls in _library_classes(SequenceLayer)}
    known |= {thing.__name__: thing for thing in extra}
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"from_json needs JSON as to_json writes it: {error}.") from None
    layer = _decode(tree, known, "the text")
    if not isinstance(layer, SequenceLayer):
        raise ValueError(f"from_json needs the JSON of a layer, got {text[:80]!r}.")
    return layer


def _library_classes(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        if cls.__module__.split(".")[0] == __name__.split(".")[0]:
            yield cls
        yield from _library_classes(cls)


def _encode(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_encode(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, SequenceLayer):
        fields = [field for field in dataclasses.fields(value) if field.metadata.get("json", True)]  # pyright: ignore[reportArgumentType]
        encoded = {f.name: _encode(getattr(value, f.name), f"{place}.{f.name}") for f in fields}
        return {type(value).__name__: encoded}
    if callable(value):
        name = getattr(value, "__qualname__", getattr(value, "__name__", None))
        if name is None or not name.isidentifier():
            raise TypeError(
                f"{place} is {value!r}, which cannot be written: a lambda, nested function or partial has no name "
                "to be found by. Use a function at the top level of a module, or the name of an activation."
            )
        return {"function": name}
    raise TypeError(f"{place} is {value!r}, which cannot be written: fields hold plain data, layers and functions.")


def _decode(tree: Any, known: dict[str, Any], place: str) -> Any:
    if isinstance(tree, list):
        return tuple(_decode(item, known, f"{place}[{index}]") for index, item in enumerate(tree))
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise ValueError(f"{place} needs one class with its fields, got {sorted(tree)}.")
    ((name, fields),) = tree.items()
    wanted = fields if name == "function" else name
    if wanted not in known:
        raise ValueError(f"{place} names {wanted!r}, which is not known here: pass it in `extra`.")
    if name == "function":
        return known[wanted]
    if not isinstance(fields, dict) or not issubclass(known[name], SequenceLayer):
        raise ValueError(f"{place} needs the fields of a layer, got {name!r} with {fields!r}.")
    values = {field: _decode(value, known, f"{name}.{field}") for field, value in fields.items()}
    try:
        return known[name](**values)
    except TypeError as error:
        raise ValueError(f"{place} holds a wrong {name}: {error}.") from None
