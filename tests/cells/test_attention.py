"""The Transformer block: against torch's attention, its two forms against each other, and a language model of it."""

import functools
import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests import test_laws
from tests.peers import peer
from tests.test_laws import GAPS, NEVER, RESETS, ROWS, TIME, assert_same, with_gradients

SIZE, HEADS = 8, 2
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.usefixtures("float64")


def random(block, *leading):
    shapes = jax.eval_shape(block.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape) / 2, shapes)
    return params, RNG.normal(size=(*leading, SIZE))


def of_torch(params, xs, window):
    """The block in torch: positions by complex numbers, every pair of steps behind one mask."""
    torch = peer("torch")

    def norm(x, scale):
        return torch.nn.functional.rms_norm(x, (SIZE,), scale, eps=1e-6)

    def turned(x):
        half = x.shape[-1] // 2
        rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * rates
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], -1)

    time = xs.shape[1]
    q, k, v = torch.einsum("bti,ijhf->jbhtf", norm(xs, params.attention_scale), params.input_kernel)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    mask = (0 <= distance) & (distance < window)
    attended = torch.nn.functional.scaled_dot_product_attention(turned(q), turned(k), v, mask)
    x = xs + torch.einsum("bhtf,hfo->bto", attended, params.output_kernel)
    hidden = torch.nn.functional.gelu(norm(x, params.mlp_scale) @ params.up_kernel, approximate="tanh")
    return x + hidden @ params.down_kernel


@pytest.mark.parametrize("window", [1, 3, 7, 12])
def test_equals_torch(window):
    torch = peer("torch")
    block = js.TransformerBlock(SIZE, HEADS, window, hidden_size=5)
    given = random(block, 3, 7)
    weigh = RNG.normal(size=(3, 7, SIZE))
    leaves, tree = jax.tree.flatten(given)
    tensors = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    theirs = of_torch(*tree.unflatten(tensors), window)
    gradients = tree.unflatten(torch.autograd.grad((theirs * torch.tensor(weigh)).sum(), tensors))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def ours(params, xs):
        _, ys = block.unroll(params, xs)
        return (ys * weigh).sum(), ys

    our_gradients, ys = ours(*given)
    assert_same(ys, theirs.detach().numpy())
    assert_same(our_gradients, jax.tree.map(lambda leaf: leaf.numpy(), gradients))


@pytest.mark.parametrize("window, reverse", [(1, False), (4, True), (9, False)])
def test_unroll_is_folded_steps_from_a_filled_cache(window, reverse):
    """As the laws say, but from a cache with an entry less than it can hold, full ones, and an empty one."""
    block = js.TransformerBlock(SIZE, HEADS, window, hidden_size=3)
    params, xs = random(block, ROWS, TIME)
    lengths = jnp.array([window - 1, 0, window, 2 * window + 1])
    _, before = random(block, ROWS, 2 * window + 1)
    state, _ = block.unroll(params, before, mask=js.length_mask(lengths, 2 * window + 1))
    assert state.position.tolist() == lengths.tolist()

    def gradients(unroll):
        unroll = functools.partial(unroll, reverse=reverse)
        run = jax.jit(functools.partial(with_gradients, unroll))
        return [run(params, xs, state, mask=GAPS, reset=reset) for reset in (NEVER, RESETS)]

    assert_same(gradients(block.unroll), gradients(functools.partial(test_laws.folded, block)))


def test_segments_do_not_see_each_other():
    block = js.Stack((js.TransformerBlock(SIZE, HEADS, 3), js.TransformerBlock(SIZE, HEADS, 8)))
    params = tuple(random(layer)[0] for layer in block.layers)
    _, xs = random(block.layers[0], 9)
    reset = np.arange(9) == 4
    state, ys = block.unroll(params, xs, reset=reset)
    _, first = block.unroll(params, xs[:4])
    last, second = block.unroll(params, xs[4:])
    assert_same(ys, jnp.concatenate([first, second]))
    assert_same(state, last)


def test_memory_grows_with_steps_times_window():
    block = js.TransformerBlock(SIZE, HEADS, window=16)
    params, _ = random(block)
    time = 4096

    def loss(params, xs):
        return block.unroll(params, xs)[1].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, jnp.zeros((time, SIZE)))
    largest = max(math.prod(shape) for shape in shapes(jaxpr.jaxpr))
    assert largest == HEADS * time * 2 * 16


def shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes(inner)


def test_a_language_model_generates_what_unrolling_anew_would():
    """Step by step with the cache, over more steps than it holds, from prompts of different lengths."""
    vocab, new = 7, 8
    blocks = [js.TransformerBlock(SIZE, HEADS, window=5) for _ in range(2)]
    model = js.Stack((js.Embed(vocab, SIZE), *blocks, js.Dense(SIZE, vocab)))
    params = jax.tree.map(lambda leaf: 2 * leaf, model.init(jax.random.key(1)))
    prompt = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0], [2, 0, 0, 6]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1]], bool)
    out = js.generate(model, params, prompt, mask=mask, max_new_tokens=new)
    tokens, keep = jnp.pad(prompt, ((0, 0), (0, new))), jnp.pad(mask, ((0, 0), (0, new)))
    for end in range(4, 4 + new):
        _, logits = model.unroll(params, tokens, mask=keep)
        last = jnp.where(keep, jnp.arange(4 + new), 0).max(axis=1)
        tokens = tokens.at[:, end].set(jnp.argmax(logits[jnp.arange(3), last], axis=-1))
        keep = keep.at[:, end].set(True)
    assert out.tokens.tolist() == tokens[:, 4:].tolist()
    assert len(set(out.tokens.ravel().tolist())) > 2


def test_rotary_tells_distances():
    q, k = RNG.normal(size=(2, 1, 6))

    def product(p, s):
        return (js.rotary(q, jnp.array(p)) * js.rotary(k, jnp.array(s))).sum()

    assert_same(product(3, 1), product(103, 101))
    assert abs(product(3, 1) - product(3, 2)) > 1e-3
    assert_same(js.rotary(q, jnp.array(0)), jnp.asarray(q))
    angles = 5 * 10_000.0 ** (-np.arange(3) / 3)
    z = (q[..., :3] + 1j * q[..., 3:]) * np.exp(1j * angles)
    assert_same(js.rotary(q, jnp.array(5)), np.concatenate([z.real, z.imag], -1))
    assert js.rotary(jnp.ones((2, 1, 4), jnp.bfloat16), jnp.arange(2)).dtype == jnp.bfloat16


@pytest.mark.parametrize("start", [-(2**31), -300, 0, 2**24, 2**30, 2**31 - 64])
def test_rotary_is_as_exact_at_far_positions_as_at_near_ones(start):
    positions = start + np.arange(64)
    rates = 10_000.0 ** (-np.arange(3) / 3)
    angles = positions[:, None] * rates
    ones = jnp.tile(jnp.array([1, 1, 1, 0, 0, 0], jnp.float32), (64, 1, 1))
    turned = js.rotary(ones, jnp.array(positions, jnp.int32))[:, 0]
    np.testing.assert_allclose(turned, np.concatenate([np.cos(angles), np.sin(angles)], -1), rtol=0, atol=1.5e-6)
    product = positions[:, None].astype(np.float32) * rates.astype(np.float32)
    loss = np.abs(np.cos(product.astype(np.float64)) - np.cos(angles)).max()
    assert loss > 0.5 or abs(start) < 2**24, "a product in float32 is as exact"


@pytest.mark.parametrize("start", [2**24, 2**31 - 16])
def test_a_block_reads_the_same_after_many_steps(start):
    """The first steps attend to the cache of zeros that it starts with, later ones to themselves alone."""
    block = js.TransformerBlock(SIZE, HEADS, window=4)
    params, xs = jax.tree.map(lambda leaf: leaf.astype(np.float32), random(block, 15))
    fresh = block.initial_state(params)
    state, ys = block.unroll(params, xs, fresh._replace(position=jnp.int32(start)))
    assert state.position == start + 15
    np.testing.assert_allclose(ys[4:], block.unroll(params, xs)[1][4:], rtol=0, atol=1e-5)


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_errors():
    with says(ValueError, "size needs to be a multiple of 2 * heads = 6, got 8"):
        js.TransformerBlock(8, 3, 4)
    with says(ValueError, "TransformerBlock needs window >= 1, got 0"):
        js.TransformerBlock(8, 2, 0)
    with says(ValueError, "TransformerBlock needs heads >= 1, got 0"):
        js.TransformerBlock(8, 0, 4)
    with says(ValueError, "TransformerBlock needs hidden_size >= 1, got 0"):
        js.TransformerBlock(8, 2, 4, 0)
    block = js.TransformerBlock(8, 2, 4)
    params, xs = random(block, 5)
    with says(ValueError, "window=4) got inputs with 7 features"):
        block.unroll(params, xs[:, :7])
    other = js.TransformerBlock(8, 2, 6)
    with says(ValueError, "got a state.keys of shape (6, 2, 4); these inputs need (4, 2, 4)"):
        block.step(params, other.initial_state(params), xs[0])
