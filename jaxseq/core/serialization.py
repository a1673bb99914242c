"""Cells as JSON and back, without importing or running anything that the text names."""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from jaxseq.core.layer import Layer


def to_json(layer: Layer) -> str:
    """The hyperparameters of a layer as JSON: `{"LSTM": {"input_size": 2, "hidden_size": 3, ...}}`.

    Functions and your own layers are written by name. Choices of implementation (fields with the metadata
    `{"json": False}`) are left out.

    Raises:
        TypeError: if a name would not lead back: that of a lambda, a nested function or a partial, or of a class of
            yours that is called as one of this library; or if a field holds what is no plain data.

    >>> import jaxseq as js
    >>> print(to_json(js.Dense(2, 3)))
    {"Dense": {"input_size": 2, "output_size": 3}}
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"to_json writes cells and layers, got {type(layer).__name__}: the params are yours to save.")
    return json.dumps(_encode(layer, _library(), type(layer).__name__))


def from_json(text: str, extra: Iterable[type | Callable[..., Any]] = ()) -> Any:
    """The layer that `to_json` wrote.

    It knows the layers of this library and what is in `extra`: your own layers, and the functions that fields hold.

    Raises:
        ValueError: if the text is no JSON of a layer, or names an unknown class, function or field; or if two things
            of one name are known.
        TypeError: if `extra` holds something other than classes and functions with a name.

    >>> import jaxseq as js
    >>> from_json('{"Stack": {"layers": [{"OneHot": {"size": 4}}, {"GRU": {"input_size": 4, "hidden_size": 3}}]}}')
    Stack(layers=(OneHot(size=4), GRU(input_size=4, hidden_size=3)))
    """
    if not isinstance(text, str):
        raise TypeError(f"from_json needs a text, got {type(text).__name__}.")
    known = _known(extra)
    try:
        layer = _decode(json.loads(text), known, "the text")
    except json.JSONDecodeError as error:
        raise ValueError(f"from_json needs JSON as to_json writes it: {error}.") from None
    except RecursionError:
        raise ValueError("from_json needs JSON as to_json writes it, this is nested too deeply.") from None
    if not isinstance(layer, Layer):
        raise ValueError(f"from_json needs the JSON of a layer, got {text[:80]!r}.")
    return layer


def _library() -> dict[str, Any]:
    """The layers that this library exports by name, without the bases of others."""
    package = vars(sys.modules[__name__.split(".")[0]])
    return {name: cls for name, cls in package.items() if _is_layer_class(cls) and not inspect.isabstract(cls)}


def _known(extra: Iterable[Any]) -> dict[str, Any]:
    if not isinstance(extra, Iterable):
        raise TypeError(f"from_json needs a tuple of classes and functions as extra, got {extra!r}.")
    known = _library()
    for thing in extra:
        name = getattr(thing, "__name__", None)
        if name is None or not callable(thing):
            raise TypeError(f"from_json needs classes and functions with a name in extra, got {thing!r}.")
        if known.setdefault(name, thing) is not thing:
            raise ValueError(f"from_json knows {known[name]!r} and {thing!r} as {name!r}: rename the one in extra.")
    return known


def _encode(value: Any, library: dict[str, Any], place: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_encode(item, library, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Layer):
        name = type(value).__name__
        if library.get(name, type(value)) is not type(value) or name == "function":
            raise TypeError(
                f"{place} is {type(value)!r}, which cannot be written: {name!r} already has a meaning in the JSON, so "
                "it would be read as another. Rename the class."
            )
        fields = [field for field in dataclasses.fields(value) if field.metadata.get("json", True)]  # pyright: ignore[reportArgumentType]
        encoded = {f.name: _encode(getattr(value, f.name), library, f"{place}.{f.name}") for f in fields}
        return {name: encoded}
    if callable(value) and not _is_layer_class(value):
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
    if not isinstance(wanted, str) or wanted not in known:
        raise ValueError(f"{place} names {wanted!r}, which is not known here: pass it in `extra`.")
    if name == "function":
        if _is_layer_class(known[wanted]):
            raise ValueError(f"{place} needs a function, got the layer {wanted!r}.")
        return known[wanted]
    if not isinstance(fields, dict) or not _is_layer_class(known[name]):
        raise ValueError(f"{place} needs the fields of a layer, got {name!r} with {fields!r}.")
    values = {field: _decode(value, known, f"{name}.{field}") for field, value in fields.items()}
    try:
        return known[name](**values)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{place} holds a wrong {name}: {error}.") from None


def _is_layer_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Layer)
