"""What the gradient of `jaxseq.scan` computes inside and outside its loops, read from jaxprs and compiled programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxseq.core.scan import scan

from .bodies import BATCH, BODIES, HIDDEN, TIME


def gradient(run):
    """The gradient of the sum of squares of all results, with respect to all floats of the arguments."""

    def loss(*arguments):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(run(*arguments)) if leaf.dtype == jnp.float32)

    return jax.grad(loss, argnums=(0, 1, 2), allow_int=True)


def equations(jaxpr):
    """All equations of a jaxpr, with those inside of others."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


def loops(name, engine=scan):
    """The forward and the backward loop of a body's gradient, as jaxprs, and the backward loop's carry."""
    body = BODIES[name]
    run = gradient(lambda params, init, xs: engine(body.make(params), init, xs))
    jaxpr = jax.make_jaxpr(run)(*body.arguments())
    forward, backward = (e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan")
    assert backward.params["reverse"] and not forward.params["reverse"]
    steps = [leaf.aval.shape[0] == TIME if leaf.aval.ndim else False for leaf in backward.outvars]
    carry = [var.aval.shape for var, stacked in zip(backward.outvars, steps, strict=True) if not stacked]
    return forward, backward, carry


def products(loop):
    inner = [equation.primitive.name for equation in equations(loop.params["jaxpr"].jaxpr)]
    return sum(inner.count(name) for name in ("dot_general", "conv_general_dilated"))


# the products by which a gradient reaches the step before: one for each product with what the loop computes
@pytest.mark.parametrize(
    "name, expected",
    [
        ("lstm", 1),
        ("gru_reset_after", 1),
        ("gru_reset_before", 2),
        ("deep_stack", 3),
        ("per_unit", 1),
        ("tied", 2),
        ("transposed_and_cast", 2),
        ("attention", 4),
        ("unbatched", 1),
    ],
)
def test_the_backward_loop_holds_one_product_per_kernel_and_carries_none(name, expected):
    _, backward, carry = loops(name)
    shapes = {leaf.shape for leaf in jax.tree.leaves(BODIES[name].arguments()[1])}
    assert products(backward) == expected
    assert set(carry) <= shapes
    # so the check can fail: lax.scan adds to each gradient in the loop
    _, plain, plain_carry = loops(name, lax.scan)
    assert products(plain) > expected
    assert not set(plain_carry) <= shapes


# gates, activations and states (the GRU's for its product and for its update): nothing that a multiplication gives back
@pytest.mark.parametrize("name, expected", [("lstm", 7), ("gru_reset_after", 6)])
def test_few_arrays_are_saved(name, expected):
    forward, _, _ = loops(name)
    saved = [var.aval.size for var in forward.outvars if var.aval.shape[:1] == (TIME,)]
    assert set(saved) == {TIME * BATCH * HIDDEN}
    assert len(saved) - 1 <= expected  # besides the output


def test_products_of_inputs_alone_leave_the_loop_where_that_is_faster(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    forward, _, _ = loops("lstm")
    assert products(forward) == 1


def test_gradients_of_an_embedding_read_by_the_carry_are_summed_once():
    _, backward, carry = loops("tokens_and_keys")
    names = [equation.primitive.name for equation in equations(backward.params["jaxpr"].jaxpr)]
    assert "scatter-add" not in names
    assert (6, HIDDEN) not in carry


def temporary_bytes(engine, batch=4, time=32, memory=128, depth=64):
    """What the gradient of additive attention over a long memory stores."""
    params = {
        "keys": (batch, memory, depth),
        "q": (HIDDEN, depth),
        "v": (depth,),
        "x": (3, HIDDEN),
        "c": (depth, HIDDEN),
    }
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in params.items()}

    def run(p, h, xs):
        def step(h, x):
            energy = jnp.tanh((h @ p["q"])[:, None] + p["keys"]) @ p["v"]
            context = jnp.einsum("bm,bmd->bd", jax.nn.softmax(energy), p["keys"])
            return jnp.tanh(context @ p["c"] + x @ p["x"]), None

        return engine(step, h, xs)

    arguments = shapes, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((batch, HIDDEN), (time, batch, 3)))
    analysis = jax.jit(gradient(run)).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes, 4 * time * batch * memory * depth


def test_additive_attention_does_not_store_time_by_memory_by_depth():
    stored, all_energies = temporary_bytes(scan)
    assert stored < all_energies / 4
    plain, _ = temporary_bytes(lax.scan)  # so the check can fail
    assert plain > all_energies


def temporary_memory(run, *shapes):
    """What a gradient stores, in bytes."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(gradient_of_sum(run)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def gradient_of_sum(run):
    return jax.grad(lambda *arguments: jnp.sum(run(*arguments)))


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.nothing_saveable], ids=["", "policy"])
def test_a_checkpoint_in_the_step_is_obeyed(policy):
    time, batch, size = 64, 4, 32

    def stored(engine, mark):
        @mark
        def deep(h, kernel):
            for _ in range(6):
                h = jnp.tanh(jnp.sin(h) @ kernel)
            return h

        def run(kernel, h):
            return engine(lambda h, _: (deep(h, kernel), None), h, None, length=time)[0]

        return temporary_memory(run, (size, size), (batch, size))

    mark = functools.partial(jax.checkpoint, policy=policy)
    assert stored(scan, mark) <= 1.1 * stored(lax.scan, mark)
    assert stored(scan, lambda f: f) > 3 * stored(scan, mark)  # so the check can fail


def test_rows_that_the_carry_looks_up_are_stored_only_where_the_carry_is_as_large():
    def stored(engine):
        def run(table):
            def step(index, _):
                return (index + 1) % len(table), table[index].sum(-1)

            return engine(step, jnp.arange(8), None, length=256)[1]

        return temporary_memory(run, (1000, 64))

    assert stored(scan) <= 1.1 * stored(lax.scan)


def test_names_survive_in_the_compiled_program():
    def run(kernel, h, xs):
        @jax.jit
        def inner(z):
            with jax.named_scope("squash"):
                return jnp.tanh(z)

        def step(h, x):
            with jax.named_scope("recurrence"):
                h = inner(h @ kernel + x)
            return h, h

        return scan(step, h, xs)

    arguments = jnp.ones((3, 3)), jnp.ones((2, 3)), jnp.ones((TIME, 2, 3))
    text = jax.jit(gradient(run)).lower(*arguments).compile().as_text()
    names = [line.split('op_name="')[1].split('"')[0] for line in text.splitlines() if 'op_name="' in line]
    for operation in ("recurrence/dot_general", "squash/tanh"):
        assert any(name.endswith(operation) for name in names)
    assert any("transpose(" in name and "recurrence" in name for name in names)
