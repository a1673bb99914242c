"""The page about trees: its examples run, and its table says what the compositions do."""

import re

import jax
import jax.numpy as jnp
import pytest

import jaxseq as js
from tests.test_documents import products
from tests.test_package import ROOT, run_examples

ROWS = re.findall(r"^\| `(\w+\(.*?\))` \|[^|]*\| `([^`]+)` \| `([^`]+)` \|", (ROOT / "docs/trees.md").read_text(), re.M)


@pytest.mark.parametrize(("call", "parameters", "multiplications"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_table(call, parameters, multiplications):
    sizes = {"n": 5, "h": 8}
    net = eval(call, {**vars(js), **sizes})
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == eval(parameters, sizes)
    children = jax.eval_shape(net.leaf, params, jax.ShapeDtypeStruct((2, net.input_size), jnp.float32))
    jaxpr = jax.make_jaxpr(lambda params, children: net.compose(params, children, jnp.ones(2, bool)))(params, children)
    assert products(jaxpr.jaxpr) == eval(multiplications, sizes)


def test_all_compositions_are_in_the_table():
    found = {
        name for name, value in vars(js).items() if isinstance(value, type) and issubclass(value, js.trees.Composition)
    }
    assert {row[0].split("(")[0] for row in ROWS} == found


@pytest.mark.slow
def test_the_page_runs():
    names = run_examples("docs/trees.md")
    assert names["accuracy"] == 1 and names["value"] < 0.5
    assert names["predicted"].shape == (1,)
    assert names["root"].hidden.shape == names["seen"].hidden.shape == (4, 16)
    assert not names["root"].hidden[3].any() and 0 < names["wasted"] < 1
    assert jnp.isfinite(names["states"]).all() and str(names["dog"]) == "( barks ( dog ( the)))"
