"""The table of cells says what `init` and `step` say."""

import inspect
import math
import pathlib
import re

import jax
import jax.extend.core
import pytest

import jaxseq as js

TEXT = (pathlib.Path(__file__).parent.parent / "docs/cells.md").read_text()
ROWS = re.findall(r"^\| `(\w+\(.*?\))` \|[^|]*\| `([^`]+)` \| `([^`]+)` \| (.+?) \|", TEXT, re.M)


def inside(equation):
    """The jaxprs that an equation runs."""
    return [getattr(inner, "jaxpr", inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]


def products(jaxpr):
    """Multiplications in the products and convolutions of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(map(products, inside(equation))) * equation.params.get("length", 1)
        shapes = [variable.aval.shape for variable in equation.invars]
        outputs = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            output_axis = equation.params["dimension_numbers"].rhs_spec[0]
            total += outputs * math.prod(shapes[1]) // shapes[1][output_axis]
    return total


def loops(jaxpr):
    """The bodies of the loops of a jaxpr."""
    found = []
    for equation in jaxpr.eqns:
        bodies = inside(equation)
        found += bodies if equation.primitive.name in ("scan", "while") else sum(map(loops, bodies), [])
    return found


@pytest.mark.parametrize(("call", "parameters", "multiplications", "parallel"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_table(call, parameters, multiplications, parallel):
    sizes = {"n": 5, "h": 8}
    cell = eval(call, {**vars(js), **sizes})
    params = cell.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == eval(parameters, sizes)
    state, x = cell.initial_state(params), zero_input(cell, params)
    assert products(jax.make_jaxpr(cell.step)(params, state, x).jaxpr) == eval(multiplications, sizes)
    xs = jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * 7), x)
    found = loops(jax.make_jaxpr(lambda params: cell.unroll(params, xs))(params).jaxpr)
    assert bool(found) != parallel.startswith("yes")
    if parallel == "`linear_scan`":
        assert not any(map(products, found))


def zero_input(cell, params):
    return jax.numpy.zeros(3) if isinstance(cell, (js.Map, js.Dropout)) else cell.zero_input(params)


def test_every_cell_is_in_the_tables():
    named = set(re.findall(r"`(\w+)", TEXT))
    layers = {
        name
        for name, value in vars(js).items()
        if isinstance(value, type) and issubclass(value, js.SequenceLayer) and not inspect.isabstract(value)
    }
    assert layers - named == {"Wrapper", "Extended"}
