"""Steps of many kinds for the tests of the engine: each a model over explicit parameters, small."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TIME, BATCH, INPUT, HIDDEN = 4, 2, 3, 5

BODIES: dict[str, "Body"] = {}


@dataclasses.dataclass(frozen=True)
class Body:
    """A step that closes over parameters, its parameters' and carry's shapes, and the modes that `lax.scan` has."""

    make: Callable[[Any], Callable]  # params -> step
    params: Any  # a tree of shapes
    init: Any
    xs: Any = (TIME, BATCH, INPUT)
    forward: bool = True
    reverse: bool = True
    tolerance: float = 1e-10

    def arguments(self, seed: int = 0, dtype: Any = None):
        """Arrays for the trees of shapes; leaves that are arrays already stay as they are."""
        random = np.random.default_rng(seed)

        def array(leaf):
            return jnp.asarray(random.normal(size=leaf) * 0.7, dtype) if _is_shape(leaf) else leaf

        return jax.tree.map(array, (self.params, self.init, self.xs), is_leaf=_is_shape)


def _is_shape(leaf):
    return isinstance(leaf, tuple) and all(isinstance(size, int) for size in leaf)


def body(**fields):
    """Registers a function `params -> step`."""

    def register(make):
        BODIES[make.__name__] = Body(make, **fields)
        return make

    return register


GATED = {"input": (INPUT, 4, HIDDEN), "recurrent": (HIDDEN, 4 * HIDDEN), "bias": (4 * HIDDEN,)}
STATE = [(BATCH, HIDDEN), (BATCH, HIDDEN)]


@body(params=GATED, init=STATE)
def lstm(p):
    """The input kernel is stored with an axis of gates, and flattened in the step."""

    def step(state, x):
        h, c = state
        z = x @ p["input"].reshape(x.shape[-1], -1) + h @ p["recurrent"] + p["bias"]
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return [h, c], h

    return step


@body(
    params={"x": (INPUT, 3, HIDDEN), "h": (HIDDEN, 3, HIDDEN), "b": (3, HIDDEN), "bh": (3, HIDDEN)},
    init=(BATCH, HIDDEN),
)
def gru_reset_after(p):
    def step(h, x):
        zx = jnp.einsum("bi,igh->bgh", x, p["x"]) + p["b"]
        zh = jnp.einsum("bi,igh->bgh", h, p["h"]) + p["bh"]
        r, z = jax.nn.sigmoid(zx[:, 0] + zh[:, 0]), jax.nn.sigmoid(zx[:, 1] + zh[:, 1])
        n = jnp.tanh(zx[:, 2] + r * zh[:, 2])
        h = (1 - z) * n + z * h
        return h, h

    return step


@body(params={"x": (INPUT, 3 * HIDDEN), "h": (HIDDEN, 2 * HIDDEN), "n": (HIDDEN, HIDDEN)}, init=(BATCH, HIDDEN))
def gru_reset_before(p):
    def step(h, x):
        a, b, c = jnp.split(x @ p["x"], 3, axis=-1)
        r, z = jnp.split(jax.nn.sigmoid(jnp.concatenate([a, b], -1) + h @ p["h"]), 2, axis=-1)
        n = jnp.tanh(c + (r * h) @ p["n"])
        return (1 - z) * n + z * h, n

    return step


@body(params=[{**GATED, "input": (size, 4, HIDDEN)} for size in (INPUT, HIDDEN)], init=[STATE] * 2)
def deep_stack(layers):
    def step(states, x):
        after = []
        for p, state in zip(layers, states, strict=True):
            state, x = jax.jit(lstm(p))(state, x)
            after.append(state)
        return after, x

    return step


MEMORY = 7


@body(
    params={"memory": (BATCH, MEMORY, HIDDEN), "q": (HIDDEN, HIDDEN), "w": (2 * HIDDEN, HIDDEN), "x": (INPUT, HIDDEN)},
    init=(BATCH, HIDDEN),
)
def attention(p):
    def step(h, x):
        scores = jnp.einsum("bh,bmh->bm", h @ p["q"], p["memory"])
        context = jnp.einsum("bm,bmh->bh", jax.nn.softmax(scores), p["memory"])
        h = jnp.tanh(jnp.concatenate([h, context], -1) @ p["w"] + x @ p["x"])
        return h, (h, scores)

    return step


@body(
    params={"keys": (BATCH, MEMORY, HIDDEN), "q": (HIDDEN, HIDDEN), "v": (HIDDEN,), "x": (INPUT, HIDDEN)},
    init=(BATCH, HIDDEN),
)
def additive_attention(p):
    def step(h, x):
        energy = jnp.tanh((h @ p["q"])[:, None] + p["keys"]) @ p["v"]
        context = (jax.nn.softmax(energy)[..., None] * p["keys"]).sum(1)
        h = jnp.tanh(context + x @ p["x"])
        return h, energy

    return step


@body(params={"x": (3, 3, 2, 4), "h": (3, 3, 2, 4), "b": (4,)}, init=(BATCH, 4, 4, 2), xs=(TIME, BATCH, 4, 4, 2))
def convolutional(p):
    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def step(h, x):
        a, b = jnp.split(convolve(x, p["x"]) + convolve(h, p["h"]) + p["b"], 2, axis=-1)
        h = jax.nn.sigmoid(a) * jnp.tanh(b)
        return h, h.mean((1, 2))

    return step


@body(params={**GATED, "peephole": (3, HIDDEN), "scale": (4 * HIDDEN,), "decay": ()}, init=STATE)
def per_unit(p):
    """Peepholes, the scale of a normalisation, and a scalar."""

    def step(state, x):
        h, c = state
        z = jnp.tensordot(x, p["input"].reshape(INPUT, -1), 1) + h @ p["recurrent"]
        z = (z - z.mean(-1, keepdims=True)) * lax.rsqrt(z.var(-1, keepdims=True) + 1e-3) * p["scale"] + p["bias"]
        i, f, g, o = jnp.split(z, 4, axis=-1)
        i, f = jax.nn.sigmoid(i + p["peephole"][0] * c), jax.nn.sigmoid(f + p["peephole"][1] * c)
        c = f * c * p["decay"] + i * jnp.tanh(g)
        h = jax.nn.sigmoid(o + p["peephole"][2] * c) * jnp.tanh(c) - p["scale"][:HIDDEN]
        return [h, c], h

    return step


@body(params={"w": (HIDDEN, HIDDEN), "b": (HIDDEN,)}, init=(BATCH, HIDDEN), xs=(TIME, BATCH, HIDDEN))
def tied(p):
    """One kernel for the input and the state, also transposed, also nonlinearly."""

    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["w"] + jnp.sin(p["w"]).sum(0) + p["b"])
        return h * p["b"], h @ p["w"].T + jnp.cos(p["w"][0] * h)

    return step


@body(params={"x": (HIDDEN, INPUT), "h": (HIDDEN, HIDDEN)}, init=(BATCH, HIDDEN), tolerance=1e-6)
def transposed_and_cast(p):
    """The cast is to float32, so that the gradient is rounded too."""

    def step(h, x):
        kernel = (jnp.float32(p["h"]) * 2).T.astype(h.dtype)
        h = jnp.tanh(x @ p["x"].T + jnp.dot(kernel.T, h.T).T)
        return h, lax.dot_general(h, p["h"], (((1,), (1,)), ((), ())))

    return step


@body(
    params={"h": (HIDDEN, HIDDEN), "x": (INPUT, HIDDEN)},
    init={"h": (BATCH, HIDDEN), "count": np.int32(0), "odd": np.zeros(BATCH, bool), "key": jax.random.key(1)},
)
def other_carries(p):
    """A counter, flags, and a key from which noise is drawn."""

    def step(state, x):
        key, draw = jax.random.split(state["key"])
        h = jnp.tanh(x @ p["x"] + jnp.where(state["odd"][:, None], state["h"] @ p["h"], state["h"]))
        h = h * jax.random.bernoulli(draw, 0.5, h.shape)
        after = {"h": h, "count": state["count"] + 1, "odd": ~state["odd"], "key": key}
        return after, {"h": h * state["count"], "count": state["count"], "odd": state["odd"]}

    return step


@body(
    params={"embedding": (6, HIDDEN), "h": (HIDDEN, HIDDEN), "out": (HIDDEN, 6), "b": (6,)},
    init=[(BATCH, HIDDEN), np.zeros(BATCH, np.int32)],
    xs=[np.arange(TIME * BATCH).reshape(TIME, BATCH) % 6, jax.random.split(jax.random.key(0), TIME)],
)
def tokens_and_keys(p):
    """Embeds the token of the input and its own last one; one key a step."""

    def step(state, inputs):
        (h, last), (token, key) = state, inputs
        mask = jax.random.bernoulli(key, 0.7, h.shape)
        h = jnp.tanh(p["embedding"][token] + p["embedding"][last] + (h * mask) @ p["h"])
        logits = h @ p["out"] + p["b"]
        return [h, logits.argmax(-1).astype(jnp.int32)], jax.nn.log_softmax(logits)

    return step


@body(params={"h": (HIDDEN, HIDDEN), "x": (INPUT, HIDDEN)}, init=[(BATCH, HIDDEN), np.int32(0)])
def with_cond(p):
    def step(state, x):
        h, t = state
        h = lax.cond(t % 2 == 0, lambda h: jnp.tanh(h @ p["h"]), lambda h: jnp.sin(h) * p["h"][0], h)
        return [h + x @ p["x"], t + 1], h

    return step


@jax.custom_vjp
def doubled_gradient(x, w):
    return jnp.sin(x) @ w


doubled_gradient.defvjp(
    lambda x, w: (jnp.sin(x) @ w, (x, w)),
    lambda res, ct: (2 * jnp.cos(res[0]) * (ct @ res[1].T), jnp.sin(res[0]).T @ ct),
)


@body(params={"h": (HIDDEN, HIDDEN), "x": (INPUT, HIDDEN)}, init=(BATCH, HIDDEN), forward=False)
def with_custom_vjp(p):
    def step(h, x):
        h = doubled_gradient(h, p["h"]) + jnp.tanh(x @ p["x"])
        return h, h

    return step


@body(params={"h": (HIDDEN, HIDDEN), "x": (INPUT, HIDDEN)}, init=(BATCH, HIDDEN))
def inner_scan(p):
    def step(h, x):
        h, inner = lax.scan(
            lambda h, row: (jnp.tanh(h @ p["h"] + row), row * h), h, (x @ p["x"])[None] + p["x"][:, None]
        )
        return h, inner.sum(0)

    return step


@body(params={"h": (HIDDEN, HIDDEN), "x": (INPUT, HIDDEN)}, init=(BATCH, HIDDEN), reverse=False)
def inner_while(p):
    def step(h, x):
        h, _ = lax.while_loop(lambda s: s[1] < 3, lambda s: (jnp.tanh(s[0] @ p["h"]), s[1] + 1), (h + x @ p["x"], 0))
        return h, h

    return step


@body(params=(), init=[(BATCH, INPUT), (BATCH,)])
def no_params(_):
    def step(state, x):
        total, largest = state
        total = total * 0.9 + jax.nn.relu(x)
        return [total, jnp.maximum(largest, total.max(-1))], total * x

    return step


@body(params={"h": (HIDDEN, HIDDEN)}, init=[(BATCH, HIDDEN), (BATCH, HIDDEN), (BATCH, HIDDEN)], xs=None)
def carries_handed_on(p):
    """No inputs; one part of the carry never changes, and two change places."""

    def step(state, _):
        constant, a, b = state
        return [constant, jnp.tanh(b @ p["h"] + constant), a], (constant, p["h"], a)

    return step


@body(params={"h": (HIDDEN, HIDDEN), "x": (INPUT, HIDDEN)}, init=[(BATCH, HIDDEN), 0, 1.0])
def weak_carries(p):
    def step(state, x):
        h, count, total = state
        h = jnp.tanh(x @ p["x"] + h @ p["h"])
        return [h, count + 1, total + h.sum()], h

    return step


@body(params={"h": (HIDDEN, HIDDEN), "start": (BATCH, HIDDEN), "x": (INPUT, HIDDEN), "a": ()}, init=(BATCH, HIDDEN))
def resets(p):
    """Where a flag is set the state is a constant; a leaf read by a nonlinear function; a checkpointed part."""

    def step(h, x):
        h = jnp.where(x[:, :1] > 0, p["start"], h)
        h = jax.checkpoint(lambda h: jnp.tanh(x @ p["x"] + h @ p["h"]))(h)
        return jax.nn.silu(h * p["a"]) / (1 + p["start"] ** 2), jnp.broadcast_to(p["a"], (3,)) * h[0, 0]

    return step


@body(params={"h": (HIDDEN, HIDDEN), "x": (INPUT, HIDDEN)}, init=(HIDDEN,), xs=(TIME, INPUT))
def unbatched(p):
    def step(h, x):
        h = jnp.tanh(p["h"] @ h + x @ p["x"])
        return h, h[0]

    return step


@body(params={"a": (INPUT, 4), "b": (4, HIDDEN), "scale": (HIDDEN,), "h": (HIDDEN, HIDDEN)}, init=(BATCH, HIDDEN))
def network_of_the_input(p):
    """Two products of the input one after the other, and a normalisation of the result."""

    def step(h, x):
        z = jax.nn.relu(x @ p["a"]) @ p["b"]
        z = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 1e-3) * p["scale"]
        h = jnp.tanh(z + h @ p["h"])
        return h, jnp.exp(x) @ p["a"]

    return step


@body(
    params={"real": (HIDDEN, HIDDEN), "imaginary": (HIDDEN, HIDDEN), "phase": (HIDDEN,), "x": (INPUT, HIDDEN)},
    init=np.full((BATCH, HIDDEN), 0.5 + 0.3j),
)
def complex_carry(p):
    def step(h, x):
        h = 0.3 * h @ (p["real"] + 1j * p["imaginary"]) * jnp.exp(1j * (p["phase"] + h.real)) + x @ p["x"]
        return h, h.real

    return step
