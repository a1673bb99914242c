"""`jaxseq.scan` is `lax.scan`: values and every derivative, for steps of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxseq.core.scan import scan

from .bodies import BODIES, TIME


def is_float(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def split_floats(tree):
    """The leaves that have derivatives, and a function that puts them back."""
    leaves, structure = jax.tree.flatten(tree)

    def merge(floats):
        floats = iter(floats)
        return jax.tree.unflatten(structure, [next(floats) if is_float(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if is_float(leaf)], merge


def data(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def assert_close(got, expected, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = np.asarray(data(a)), np.asarray(data(b))
        if is_float(a):
            scale = np.max(np.abs(b), initial=1e-300)
            np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def transforms(body, scan, **options):
    """A jitted function of the floats of (params, init, xs): outputs and every derivative that `lax.scan` has."""
    args = body.arguments()
    floats, merge = split_floats(args)

    def run(floats):
        params, init, xs = merge(floats)
        length = TIME if xs is None else None
        return scan(body.make(params), init, xs, length=length, **options)

    def outputs(floats):
        return split_floats(run(floats))[0]

    def loss(floats):
        return sum(jnp.sum(jnp.sin(out + i)).real for i, out in enumerate(outputs(floats)))

    def all_of(floats, tangents):
        results = {"value": run(floats)}
        results["vmap"] = jax.vmap(outputs)(jax.tree.map(lambda a, b: jnp.stack([a, a + b]), floats, tangents))
        if body.forward:
            results["jvp"] = jax.jvp(outputs, (floats,), (tangents,))
        if body.reverse:

            def directional(floats):
                gradient = jax.grad(loss)(floats)
                return sum(jnp.vdot(g, t).real for g, t in zip(gradient, tangents, strict=True))

            results["reverse over reverse"] = jax.grad(directional)(floats)
        if body.forward and body.reverse:
            results["gradient and forward over reverse"] = jax.jvp(jax.grad(loss), (floats,), (tangents,))
        elif body.reverse:
            results["gradient"] = jax.grad(loss)(floats)
        return results

    tangents, _ = split_floats(body.arguments(seed=1))
    # the programs are large and run once
    return jax.jit(all_of)(floats, tangents)


@pytest.mark.parametrize("name", BODIES)
def test_equals_lax_scan_with_all_derivatives(name):
    with jax.enable_x64(True):
        got, expected = (transforms(BODIES[name], engine) for engine in (scan, lax.scan))
        for key in expected:
            assert_close(got[key], expected[key], BODIES[name].tolerance)
