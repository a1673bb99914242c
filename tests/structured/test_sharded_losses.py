"""Rows on two devices, by their type, give what they give on one; and `shard_map` takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxseq as js
from jaxseq.structured import chains, ctc, transducer

TIME, COUNT, VOCAB = 4, 2, 4
ROWS = PartitionSpec("rows")


@functools.cache
def given():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4, TIME, VOCAB)).astype(np.float32)
    predicted = generator.normal(size=(4, COUNT + 1, VOCAB)).astype(np.float32)
    labels, tags = generator.integers(1, VOCAB, size=(4, COUNT)), generator.integers(VOCAB, size=(4, TIME))
    flags = js.length_mask(np.array([4, 1, 3, 0]), TIME), js.length_mask(np.array([2, 1, 2, 0]), COUNT)
    return jax.tree.map(jnp.asarray, (logits, predicted, labels, tags)), (*flags, jnp.asarray(tags == 2))


def of_ctc(logits, predicted, labels, tags, mask=None, label_mask=None, reset=None):
    out = ctc.align(logits, labels, mask, label_mask), ctc.greedy(logits, mask)
    return ctc.loss(logits, labels, mask, label_mask), ctc.feasible(logits, labels, mask, label_mask), out


def of_transducer(logits, predicted, labels, tags, mask=None, label_mask=None, reset=None):
    def joint(encoded, predicted):
        return jnp.tanh(encoded + predicted)

    lattice = transducer.joint_lattice(joint, logits, predicted, labels, mask, label_mask)
    return transducer.loss(lattice, mask, label_mask), transducer.begin(labels)


def of_field(logits, predicted, labels, tags, mask=None, label_mask=None, reset=None):
    crf = js.CRF(VOCAB, forbidden=js.crf.Forbidden((1,), ((0, 2),)))
    params = crf.init(jax.random.key(0))
    best = chains.best_path(crf.chain(params, logits), mask, reset=reset)
    return crf.loss(params, logits, tags, mask, reset=reset), best


PROGRAMS = {"ctc": of_ctc, "transducer": of_transducer, "field": of_field}


def with_gradient(program, logits, *others):
    """What a program gives, and the gradient of its first part."""

    def total(logits):
        out = program(logits, *others)
        return jnp.where(jnp.isfinite(out[0]), out[0], 0).sum(), out

    return jax.grad(total, has_aux=True)(logits)


@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_on_two_devices(name):
    run = functools.partial(with_gradient, PROGRAMS[name])
    arrays, flags = given()
    expected = jax.jit(run)(*arrays, *flags)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    explicit = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        placed = jax.device_put((arrays, flags), NamedSharding(explicit, ROWS))
        found = jax.jit(run)(*placed[0], *placed[1])
        for leaf in jax.tree.leaves((found, jax.eval_shape(run, *placed[0]))):
            assert leaf.sharding.spec[0] == "rows"
    jax.tree.map(close, found, expected)
    automatic = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(run, mesh=automatic, in_specs=ROWS, out_specs=ROWS))
    for these in (arrays, (*arrays, *flags)):  # what shard_map refuses it refuses as it traces
        jax.eval_shape(mapped, *these)


def test_searches_under_shard_map():
    cell = js.Stack((js.Embed(VOCAB, 4), js.GRU(4, VOCAB)))
    params = cell.init(jax.random.key(0))

    def run(logits, mask):
        heard = transducer.beam_search(cell, params, jnp.add, logits, mask, beams=3, max_labels=2)
        return heard, ctc.beam_search(logits, mask, beams=3, cell=cell, params=params)

    (logits, *_), (mask, *_) = given()
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=ROWS, out_specs=ROWS)
    out, expected = jax.jit(mapped)(logits, mask), jax.jit(run)(logits, mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), out, expected)
    explicit = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="go through jax.shard_map"):
        run(*jax.device_put((logits, mask), NamedSharding(explicit, ROWS)))
