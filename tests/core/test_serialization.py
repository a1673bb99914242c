"""JSON: what is written, what is refused with its reason, and that reading runs nothing that the text names."""

import functools
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxseq as js


def double(x):
    return 2 * x


class Own(js.Dense):
    """A layer of a user's own."""


class Labelled(js.Dense):
    """A layer of a user's own with a field of any type."""

    label: Any


def nested():
    def inner(x):
        return x

    return inner


def foreign(name: str, base: Any = js.Dense) -> Any:
    """A user's subclass that is called `name`."""
    return type(base)(name, (base,), {"__module__": "elsewhere"})


def test_implementation_is_not_written():
    cell = js.LSTM(2, 3, gate_layout="flat")
    assert "gate_layout" not in js.to_json(cell)
    assert js.to_json(cell) == js.to_json(js.LSTM(2, 3))
    assert js.from_json(js.to_json(cell)) == js.LSTM(2, 3)


def test_own_layers_and_functions_through_extra():
    layer = js.Stack((Own(2, 3), js.Map(double), js.Map(jax.nn.relu), js.Map("tanh")))
    text = js.to_json(layer)
    assert js.from_json(text, extra=(Own, double, jax.nn.relu)) == layer
    assert js.from_json(text, extra=iter([Own, double, jax.nn.relu, double, js.LSTM])) == layer  # twice the same
    with pytest.raises(ValueError, match="'Own', which is not known here: pass it in `extra`"):
        js.from_json(text, extra=[double, jax.nn.relu])
    with pytest.raises(ValueError, match="'double', which is not known here"):
        js.from_json(text, extra=[Own])


@pytest.mark.parametrize(
    "layer, message",
    [
        (js.Map(lambda x: x), r"Map\.function is .*lambda.*top level of a module"),
        (js.Stack((js.Dense(2, 2), js.Map(nested()))), r"Stack\.layers\[1\]\.function is .*nested function"),
        (js.Map(functools.partial(jnp.clip, min=0)), r"Map\.function is functools\.partial.*partial has no name"),
        (js.Map(js.LSTM), r"Map\.function is .*LSTM.*cannot be written"),
        (Labelled(2, 3, label=1j), r"Labelled\.label is .*plain data"),
        (foreign("LSTM", js.LSTM)(2, 3), "elsewhere.LSTM.*Rename the class"),
        (js.Residual(foreign("Dense")(2, 2)), r"Residual\.\w+ is .*elsewhere.Dense.*Rename the class"),
        (foreign("function")(2, 3), "elsewhere.function.*Rename the class"),
        (double, "writes cells and layers, got function"),
        (js.Dense(2, 3).init(jax.random.key(0)), "got DenseParams: the params are yours to save"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_reason(layer, message):
    with pytest.raises(TypeError, match=message):
        js.to_json(layer)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "needs JSON as to_json writes it"),
        ('{"LSTM": ', "needs JSON as to_json writes it"),
        ("[" * 50_000, "nested too deeply"),
        ("3", "the JSON of a layer, got '3'"),
        ('[{"OneHot": {"size": 4}}]', "the JSON of a layer"),
        ("{}", "one class with its fields"),
        ('{"OneHot": {"size": 4}, "GRU": {}}', r"one class with its fields, got \['GRU', 'OneHot'\]"),
        ('{"Transformer": {"size": 4}}', "names 'Transformer', which is not known"),
        ('{"OneHot": 4}', "the fields of a layer, got 'OneHot' with 4"),
        ('{"OneHot": {"sizes": 4}}', "a wrong OneHot.*sizes"),
        ('{"LSTM": {"input_size": 4}}', "a wrong LSTM.*hidden_size"),
        ('{"LSTM": {"input_size": "4", "hidden_size": 3}}', "LSTM"),
        ('{"LSTM": {"input_size": [4], "hidden_size": 3}}', "LSTM"),
        ('{"LSTM": {"input_size": null, "hidden_size": 3}}', "LSTM"),
        ('{"LSTM": {"input_size": Infinity, "hidden_size": 3}}', "LSTM"),
        ('{"LSTM": {"input_size": {"OneHot": {"size": 4}}, "hidden_size": 3}}', "LSTM"),
        ('{"Stack": {"layers": [1, 2]}}', "Stack"),
        ('{"Stack": {"layers": 1}}', "Stack"),
        ('{"Residual": {"cell": 1}}', "Residual"),
        ('{"function": ["a"]}', r"names \['a'\], which is not known"),
        ('{"Map": {"function": {"function": "LSTM"}}}', "needs a function, got the layer 'LSTM'"),
        ('{"Map": {"function": "os.system"}}', "os.system"),
        ('{"Map": {"function": 3}}', "3"),
        ('{"Map": {"function": ["a"]}}', "a"),
        *(
            (f'{{"{name}": {{}}}}', f"names '{name}', which is not known")
            for name in ("SequenceLayer", "Cell", "Gated", "Recurrent", "Pointwise", "GRUBase")
        ),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ValueError, match=message):
        js.from_json(text)


def test_deep_layers():
    depth = 10_000
    with pytest.raises(ValueError, match="nested too deeply"):
        js.from_json('{"Residual": {"cell": ' * depth + '{"GRU": {"input_size": 2, "hidden_size": 2}}' + "}}" * depth)


@pytest.mark.parametrize(
    "text",
    [
        '{"os.system": {"command": "true"}}',
        '{"system": {"command": "true"}}',
        '{"function": "os.system"}',
        '{"Map": {"function": {"function": "os.system"}}}',
        '{"Map": {"function": {"os.system": {"command": "true"}}}}',
        '{"antigravity.Cell": {}}',
        '{"function": "antigravity.geohash"}',
        '{"__import__": {"name": "antigravity"}}',
        '{"function": "eval"}',
    ],
)
def test_nothing_named_in_the_text_is_imported_or_run(text, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    before = set(sys.modules)
    with pytest.raises(ValueError, match="not known here"):
        js.from_json(text)
    assert not ran and set(sys.modules) == before


@pytest.mark.parametrize(
    "extra, error, message",
    [
        ([foreign("LSTM", js.LSTM)], ValueError, "as 'LSTM': rename the one in extra"),
        ([Own, foreign("Own")], ValueError, "as 'Own': rename the one in extra"),
        ([nested(), nested()], ValueError, "as 'inner'"),
        ([functools.partial(double)], TypeError, "with a name in extra, got functools.partial"),
        ([js], TypeError, "classes and functions with a name"),
        ("Own", TypeError, "classes and functions with a name in extra, got 'O'"),
        (Own, TypeError, "a tuple of classes and functions as extra, got .*Own"),
    ],
)
def test_wrong_extra(extra, error, message):
    with pytest.raises(error, match=message):
        js.from_json('{"OneHot": {"size": 4}}', extra=extra)
