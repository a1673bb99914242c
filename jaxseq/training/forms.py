"""The form of JSON values that a user may have edited."""

import sys
from typing import Any


def find_fault(value: Any, form: Any, name: str = "") -> str | None:
    """The dotted name of a part of `value` that has not the given form or is absent; None if all is as it should be.

    A form is a type, a tuple of types of which one will do, `[form]` for a list of any length, or a dictionary: a
    form for each key that has to be there, and under `...` that of all other keys, which are not looked at without it.
    The type float takes every finite number, whole ones too.

    >>> form = {"name": str, "sizes": [int], "scores": {...: float}}
    >>> find_fault({"name": "a", "sizes": [1, 2], "scores": {"first": 0.5}, "more": None}, form)
    >>> find_fault({"name": "a", "sizes": [1, "2"], "scores": {}}, form), find_fault({"name": "a"}, form)
    ('sizes.1', 'sizes')
    """
    if isinstance(form, dict):
        if type(value) is not dict:
            return name
        others = {key: form[...] for key in value.keys() - form.keys()} if ... in form else {}
        parts = {key: part for key, part in {**form, **others}.items() if key is not ...}
        if absent := [key for key in parts if key not in value]:
            return _join(name, absent[0])
        faults = (find_fault(value[key], part, _join(name, key)) for key, part in parts.items())
    elif isinstance(form, list):
        if type(value) is not list:
            return name
        faults = (find_fault(item, form[0], _join(name, number)) for number, item in enumerate(value))
    elif form is float:
        return None if type(value) in (int, float) and abs(value) <= sys.float_info.max else name
    else:  # a bool is no int here
        return None if type(value) in (form if isinstance(form, tuple) else (form,)) else name
    return next((fault for fault in faults if fault is not None), None)


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)
