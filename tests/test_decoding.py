"""Generation: exact against enumeration on five tokens, and equal to scoring with `unroll` on real cells."""

import collections
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.tree_util import Partial

import jaxseq as js
from jaxseq import losses, samplers
from jaxseq.decoding import generate

VOCAB, END = 5, 4


class Trigram(js.Cell):
    """A table of logits for each pair of tokens, so that the chain rule can be written down by hand."""

    input_rank = 0

    def init(self, key):
        return 1.5 * jax.random.normal(key, (VOCAB, VOCAB, VOCAB))

    def initial_state(self, params, batch_shape=()):
        return jnp.zeros(batch_shape, int)  # the token before

    def step(self, params, state, x, key=None):
        return x.astype(int), params[state, x]


class Counted(Trigram):
    """A trigram that notes each step it is asked for."""

    def step(self, params, state, x, key=None):
        jax.debug.callback(lambda: STEPS.append(None))
        return super().step(params, state, x)


STEPS = []
TABLE = Trigram().init(jax.random.key(5))
# token t is followed by t + 1, with certainty
SUCCESSOR = jnp.where(jnp.arange(1, VOCAB + 1)[:, None] == jnp.arange(VOCAB), 0.0, -jnp.inf)
SUCCESSOR = jnp.broadcast_to(SUCCESSOR, (VOCAB, VOCAB, VOCAB))

LAYERS = js.Embed(VOCAB, 4), js.LSTM(4, 6), js.Dropout(0.5), js.Dense(6, VOCAB)
MODEL = js.Stack(LAYERS)
PARAMS = jax.tree.map(lambda leaf: 3 * leaf, MODEL.init(jax.random.key(0)))  # far from uniform
PROMPT = jnp.array([[1, 2, 3, 0], [2, 0, 1, 1], [3, 3, 0, 2]])
# full, with a gap, empty
MASK = jnp.array([[True, True, True, True], [True, False, True, False], [False, False, False, False]])


def chain_rule(prompt, new):
    """The factors of the probability of `new` after `prompt` under TABLE; without a prompt token 0 is read."""
    table = np.asarray(TABLE, np.float64)
    table = table - np.log(np.exp(table).sum(-1, keepdims=True))
    read = [0, *(prompt or [0])]
    factors = []
    for token in new:
        factors.append(table[read[-2], read[-1], token])
        read.append(token)
    return factors


def complete(length):
    """All sequences that end with END, or are `length` long without it."""
    for new in itertools.product(range(VOCAB), repeat=length):
        stop = new.index(END) + 1 if END in new else length
        if all(token == END for token in new[stop:]):
            yield new[:stop]


def score(tokens, cell=MODEL, params=PARAMS):
    """Log-probabilities of all but the first of `tokens`, by one `unroll`."""
    _, logits = cell.unroll(params, tokens[..., :-1])
    return -losses.cross_entropy(logits, tokens[..., 1:])


def trees_close(ours, theirs, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), ours, theirs)


@pytest.mark.parametrize("prompt", [[], [1, 2], [3, 0, 1]])
def test_frequencies_and_log_probs_equal_enumeration(prompt):
    """A chi-square test that right code fails once in ten thousand (for one seed: never, or always)."""
    rows, length = 20_000, 3
    prompts = jnp.broadcast_to(jnp.array(prompt, int), (rows, len(prompt)))
    out = generate(Trigram(), TABLE, prompts, key=jax.random.key(1), max_new_tokens=length, end=END)
    exact = {new: chain_rule(prompt, new) for new in complete(length)}
    assert sum(np.exp(sum(factors)) for factors in exact.values()) == pytest.approx(1)

    counts = collections.Counter()
    log_probs = {}
    for new, own, row in zip(*map(np.asarray, (out.tokens, out.lengths, out.log_probs)), strict=True):
        assert (new[own:] == END).all() and not row[own:].any()
        new = tuple(new[:own].tolist())
        counts[new] += 1
        log_probs[new] = row[:own]
    assert set(counts) <= set(exact)
    for new, row in log_probs.items():
        np.testing.assert_allclose(row, exact[new], rtol=0, atol=2e-5)

    expected = {new: rows * np.exp(sum(factors)) for new, factors in exact.items()}
    often = [new for new in exact if expected[new] >= 5]
    observed = [counts[new] for new in often] + [rows - sum(counts[new] for new in often)]
    frequencies = [expected[new] for new in often] + [rows - sum(expected[new] for new in often)]
    assert scipy.stats.chisquare(observed, frequencies).pvalue > 1e-4


def test_greedy_takes_the_best_at_each_step():
    prompts = jnp.array(list(itertools.product(range(VOCAB), repeat=2)))
    out = generate(Trigram(), TABLE, prompts, max_new_tokens=4)
    for prompt, tokens, log_probs in zip(prompts.tolist(), out.tokens.tolist(), out.log_probs, strict=True):
        best = []
        for _ in range(4):
            best.append(max(range(VOCAB), key=lambda token, best=best: chain_rule(prompt, [*best, token])[-1]))
        assert tokens == best
        np.testing.assert_allclose(log_probs, chain_rule(prompt, best), rtol=0, atol=2e-5)


def test_log_probs_are_those_before_the_sampler_filters():
    out = generate(Trigram(), TABLE, jnp.array([1]), key=jax.random.key(0), max_new_tokens=6, sample=one_of_two)
    np.testing.assert_allclose(out.log_probs, chain_rule([1], out.tokens.tolist()), rtol=0, atol=2e-5)
    worst = generate(Trigram(), TABLE, jnp.array([1]), max_new_tokens=6, sample=lambda key, logits: logits.argmin(-1))
    np.testing.assert_allclose(worst.log_probs, chain_rule([1], worst.tokens.tolist()), rtol=0, atol=2e-5)


def one_of_two(key, logits):
    return samplers.categorical(key, samplers.top_k(logits, 2))


def test_rows_end_by_themselves_and_the_loop_with_the_last():
    STEPS.clear()
    out = generate(Counted(), SUCCESSOR, jnp.array([[0], [2], [3]]), max_new_tokens=50, end=END)
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert len(STEPS) == 4
    assert out.lengths.tolist() == [4, 2, 1]
    assert out.tokens[:, :5].tolist() == [[1, 2, 3, 4, 4], [3, 4, 4, 4, 4], [4, 4, 4, 4, 4]]
    assert (out.tokens[:, 5:] == END).all() and not out.log_probs.any()
    assert out.state.tolist() == [3, 3, 3]  # what was read before END


def test_generated_rows_score_the_same_alone():
    """Padding, gaps, empty prompts and ended neighbours change nothing; and no dropout while generating."""
    out = generate(MODEL, PARAMS, PROMPT, mask=MASK, key=jax.random.key(0), max_new_tokens=6, end=1)
    assert len(set(out.lengths.tolist())) > 1
    for row in range(3):
        own = out.lengths[row]
        prompt = PROMPT[row][MASK[row]] if MASK[row].any() else jnp.array([0])
        alone = jnp.concatenate([prompt, out.tokens[row, :own]])
        trees_close(out.log_probs[row, :own], score(alone)[len(prompt) - 1 :])
        state, _ = MODEL.unroll(PARAMS, alone[:-1])
        trees_close(jax.tree.map(lambda leaf, row=row: leaf[row], out.state), state)


def test_generated_batch_scores_the_same_padded():
    out = generate(MODEL, PARAMS, PROMPT[:2], mask=MASK[:2], key=jax.random.key(0), max_new_tokens=6, end=2)
    tokens = jnp.concatenate([PROMPT[:2], out.tokens], axis=1)
    own = js.length_mask(out.lengths, 6)
    # a gap holds the state but outputs nothing, so the prompts are moved up to their new tokens
    order = jnp.argsort(MASK[:2], axis=1, stable=True)
    tokens = tokens.at[:, :4].set(jnp.take_along_axis(PROMPT[:2], order, axis=1))
    mask = jnp.concatenate([jnp.take_along_axis(MASK[:2], order, axis=1), own], axis=1)
    _, logits = MODEL.unroll(PARAMS, tokens[:, :-1], mask=mask[:, :-1])
    trees_close(out.log_probs, -losses.cross_entropy(logits[:, 3:], out.tokens, own))


@pytest.mark.parametrize("mask", [None, MASK])
def test_going_on_equals_not_having_stopped(mask):
    whole = generate(MODEL, PARAMS, PROMPT, mask=mask, max_new_tokens=7)
    first = generate(MODEL, PARAMS, PROMPT, mask=mask, max_new_tokens=3)
    second = generate(MODEL, PARAMS, first.tokens[:, -1:], state=first.state, max_new_tokens=4)
    np.testing.assert_array_equal(jnp.concatenate([first.tokens, second.tokens], axis=1), whole.tokens)
    trees_close(jnp.concatenate([first.log_probs, second.log_probs], axis=1), whole.log_probs)
    trees_close(second.state, whole.state)


def test_going_on_after_the_end_with_more_text():
    """A conversation: the state, the last token and the next text are all that is needed."""
    first = generate(MODEL, PARAMS, PROMPT, key=jax.random.key(5), max_new_tokens=5, end=3)
    more = jnp.concatenate([first.tokens[:, -1:], jnp.array([[0, 1]] * 3)], axis=1)
    second = generate(MODEL, PARAMS, more, state=first.state, max_new_tokens=4)
    for row in range(3):
        text = jnp.concatenate([PROMPT[row], first.tokens[row, : first.lengths[row]], jnp.array([0, 1])])
        alone = generate(MODEL, PARAMS, text, max_new_tokens=4)
        assert alone.tokens.tolist() == second.tokens[row].tolist()
        trees_close(alone.log_probs, second.log_probs[row])


def test_fewer_tokens_are_the_first_of_more():
    few, many = (generate(MODEL, PARAMS, PROMPT, key=jax.random.key(3), max_new_tokens=n) for n in (2, 5))
    np.testing.assert_array_equal(few.tokens, many.tokens[:, :2])


def test_start_is_read_before_the_prompt():
    start = jnp.array([1, 2, 3])
    text = jnp.concatenate([start[:, None], PROMPT], axis=1)
    expected = generate(MODEL, PARAMS, text, max_new_tokens=3)
    trees_close(generate(MODEL, PARAMS, PROMPT, start=start, max_new_tokens=3), expected)
    masked = generate(MODEL, PARAMS, PROMPT, mask=MASK, start=3, max_new_tokens=3)
    alone = generate(MODEL, PARAMS, jnp.array([3]), max_new_tokens=3)  # its row has no prompt
    trees_close(jax.tree.map(lambda leaf: leaf[2], masked), alone)
    trees_close(generate(MODEL, PARAMS, jnp.zeros(0, int), start=3, max_new_tokens=3), alone)


def test_without_a_prompt_the_zero_input_is_read():
    expected = generate(MODEL, PARAMS, jnp.zeros((2, 1), int), max_new_tokens=3)
    trees_close(generate(MODEL, PARAMS, jnp.zeros((2, 0), int), max_new_tokens=3), expected)
    nothing = jnp.zeros((2, 4), bool)
    trees_close(generate(MODEL, PARAMS, PROMPT[:2], mask=nothing, max_new_tokens=3), expected)


def test_padding_may_hold_anything():
    clean = generate(MODEL, PARAMS, PROMPT, mask=MASK, max_new_tokens=3)
    dirty = generate(MODEL, PARAMS, jnp.where(MASK, PROMPT, -(2**31)), mask=MASK, max_new_tokens=3)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("shape", [(), (2,), (2, 1, 3)])
def test_any_batch_axes(shape):
    single = generate(MODEL, PARAMS, PROMPT[0], max_new_tokens=3)
    out = generate(MODEL, PARAMS, jnp.broadcast_to(PROMPT[0], (*shape, 4)), max_new_tokens=3)
    trees_close(out, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), single))


def test_no_new_tokens():
    out = generate(MODEL, PARAMS, PROMPT, max_new_tokens=0)
    assert out.tokens.shape == out.log_probs.shape == (3, 0) and out.lengths.tolist() == [0, 0, 0]
    trees_close(out.state, MODEL.unroll(PARAMS, PROMPT[:, :-1])[0])


def test_no_rows():
    assert generate(MODEL, PARAMS, PROMPT[:0], max_new_tokens=3).tokens.shape == (0, 3)


def test_under_jit_and_vmap():
    expected = generate(MODEL, PARAMS, PROMPT, mask=MASK, max_new_tokens=4, end=END)

    def row(prompt, mask):
        return generate(MODEL, PARAMS, prompt, mask=mask, max_new_tokens=4, end=END)

    trees_close(jax.jit(row)(PROMPT, MASK), expected)
    trees_close(jax.vmap(row)(PROMPT, MASK), expected)
    keys = jax.random.split(jax.random.key(0), 3)
    several = jax.vmap(lambda key: generate(MODEL, PARAMS, PROMPT[0], key=key, max_new_tokens=4))(keys)
    for index, key in enumerate(keys):
        one = generate(MODEL, PARAMS, PROMPT[0], key=key, max_new_tokens=4)
        trees_close(jax.tree.map(lambda leaf, index=index: leaf[index], several), one)


def test_logits_are_made_for_new_tokens_only():
    vocab, time = 5000, 256
    cell = js.Stack((js.Embed(vocab, 4), js.Elman(4, 4), js.Dense(4, vocab)))
    params = jax.eval_shape(cell.init, jax.random.key(0))
    prompt = jax.ShapeDtypeStruct((time,), jnp.int32)
    compiled = jax.jit(lambda *args: generate(cell, *args, max_new_tokens=2)).lower(params, prompt).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < time * vocab * 4 / 10  # the logits of the prompt


TRACES = []


def nucleus(key, logits, *, temperature, k, p):
    TRACES.append(None)
    return samplers.categorical(key, samplers.top_p(samplers.top_k(logits / temperature, k), p))


def test_new_numbers_compile_nothing():
    def run(seed, temperature, k, p, end, start):
        sample = Partial(nucleus, temperature=temperature, k=k, p=p)
        cell = js.Stack(tuple(LAYERS))  # equal, not the same
        key = jax.random.key(seed)
        return generate(cell, PARAMS, PROMPT, key=key, max_new_tokens=4, sample=sample, start=start, end=end)

    run(0, 1.0, 5, 0.9, END, 0)
    traces = len(TRACES)
    cold = run(1, 1e-3, 4, 0.8, 3, 1)
    best = run(2, 1e3, 1, 0.8, 3, 1)
    assert len(TRACES) == traces > 0
    np.testing.assert_array_equal(cold.tokens, best.tokens)


def test_tokens_keep_the_dtype_of_the_prompt():
    out = generate(MODEL, PARAMS, PROMPT.astype(jnp.uint8), max_new_tokens=3, end=END)
    assert out.tokens.dtype == jnp.uint8
    np.testing.assert_array_equal(out.tokens, generate(MODEL, PARAMS, PROMPT, max_new_tokens=3, end=END).tokens)


def last_token(key, logits):
    return jnp.full(logits.shape[:-1], logits.shape[-1] - 1)


def test_the_dtype_of_the_prompt_has_to_hold_the_vocabulary():
    def run(vocab, dtype):
        cell = js.Stack((js.OneHot(vocab), js.Map("identity")))
        out = generate(cell, ((), ()), jnp.array([7], dtype), max_new_tokens=2, sample=last_token)
        assert out.tokens.dtype == dtype and (out.tokens == vocab - 1).all()

    run(256, jnp.uint8)
    run(300, jnp.int16)
    for dtype in (jnp.uint8, jnp.int8):
        with pytest.raises(TypeError, match=r"int8 cannot hold a vocabulary of 300: cast the prompt"):
            run(300, dtype)


def test_one_end_a_row():
    ends = jnp.array([4, 2, 4])
    out = generate(Trigram(), SUCCESSOR, jnp.array([[0], [0], [2]]), max_new_tokens=4, end=ends)
    assert out.lengths.tolist() == [4, 2, 2]
    assert out.tokens.tolist() == [[1, 2, 3, 4], [1, 2, 2, 2], [3, 4, 4, 4]]


def test_an_end_in_the_prompt_ends_nothing():
    out = generate(Trigram(), SUCCESSOR, jnp.array([[2, 0], [0, 2]]), max_new_tokens=2, end=2)
    assert out.tokens.tolist() == [[1, 2], [3, 4]] and out.lengths.tolist() == [2, 2]
    out = generate(Trigram(), SUCCESSOR, jnp.array([2, 0]), max_new_tokens=3, end=2)
    assert out.tokens.tolist() == [1, 2, 2] and out.lengths == 2


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT.astype(jnp.uint8)])
@pytest.mark.parametrize("mask", [None, MASK])
def test_under_strict_promotion(prompt, mask):
    def run():
        options = {"key": jax.random.key(0), "start": jnp.array([1, 2, 3]), "end": jnp.array([END, 1, 2])}
        return generate(MODEL, PARAMS, prompt, mask=mask, max_new_tokens=4, **options)

    expected = run()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.tree.map(np.testing.assert_array_equal, run(), expected)


def test_half_and_double_precision():
    half = generate(MODEL, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS), PROMPT, max_new_tokens=3)
    assert half.log_probs.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(half.state)} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMS)
        out = generate(MODEL, params, PROMPT, max_new_tokens=3)
        assert out.log_probs.dtype == jnp.float64
        trees_close(out.log_probs, score(jnp.concatenate([PROMPT, out.tokens], 1), params=params)[:, 3:], 1e-12)


class NoisyState(NamedTuple):
    """The smallest and the largest value that `draw` gave."""

    low: jax.Array
    high: jax.Array


class Noisy(js.Cell):
    """Outputs noise, and keeps what noise its params were drawn with."""

    input_rank = 0

    def init(self, key):
        return jnp.zeros(())

    def draw(self, params, key):
        return params + jax.random.normal(key)

    def initial_state(self, params, batch_shape=()):
        return NoisyState(jnp.full(batch_shape, jnp.inf), jnp.full(batch_shape, -jnp.inf))

    def step(self, params, state, x, key=None):
        logits = jnp.zeros((*x.shape, VOCAB)) if key is None else jax.random.normal(key, (*x.shape, VOCAB))
        return NoisyState(jnp.minimum(state.low, params), jnp.maximum(state.high, params)), logits


def test_the_cell_has_noise_of_its_own_only_if_asked():
    quiet = generate(Noisy(), jnp.zeros(()), PROMPT, key=jax.random.key(0), max_new_tokens=5)
    np.testing.assert_allclose(quiet.log_probs, -np.log(VOCAB), rtol=1e-6)
    assert not quiet.state.low.any() and not quiet.state.high.any()
    loud = generate(Noisy(), jnp.zeros(()), PROMPT, noise_key=jax.random.key(0), max_new_tokens=5)
    assert len(set(loud.log_probs.ravel().tolist())) == loud.log_probs.size  # new noise at each step of each row
    np.testing.assert_array_equal(loud.state.low, loud.state.high)  # prompt and new tokens share one draw
    assert loud.state.low.all()


HEADLESS = js.Stack((js.Embed(VOCAB, 4), js.LSTM(4, 6)))
HEADLESS_PARAMS = HEADLESS.init(jax.random.key(0))


def float_token(key, logits):
    return logits[..., 0]


def column_token(key, logits):
    return logits.argmax(-1, keepdims=True)


def same_token(key, logits):
    return 3


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cell": js.Sequential(LAYERS)}, TypeError, "needs a Cell, which can advance one step, got Sequential"),
        ({"cell": js.LSTM(4, 6)}, TypeError, "reads inputs of rank 1: put Embed or OneHot"),
        ({"cell": js.States(MODEL)}, TypeError, r"gives logits \[\*batch, vocab\].*States.*float32\[3,5\]"),
        ({"cell": js.Stack((js.OneHot(5), js.Map(jnp.argmax))), "params": ((), ())}, TypeError, "Dense"),
        ({"prompt": jnp.ones((3, 4))}, TypeError, r"reads tokens, integers, but got float32\[3,4\]"),
        ({"prompt": jnp.array(1)}, ValueError, "give it a time axis"),
        ({"prompt": "hello"}, TypeError, r"needs token ids \[\*batch, time\] as prompt"),
        ({"prompt": [[1, 2, 3], [1]]}, TypeError, "pad rows of other lengths, and give a mask"),
        (
            {"cell": HEADLESS, "params": HEADLESS_PARAMS},
            TypeError,
            r"6 logits and reads 5 tokens: let it end with Dense",
        ),
        ({"mask": jnp.ones((3, 5), bool)}, ValueError, r"mask of shape \(3, 5\).*\(3, 4\)"),
        ({"mask": jnp.ones((3, 4))}, TypeError, "boolean mask, got float32"),
        ({"start": 1.0}, TypeError, "reads tokens, integers"),
        ({"end": 1.0}, TypeError, "reads tokens, integers"),
        ({"start": jnp.array([1, 2])}, ValueError, r"one start token, or one a row \(3,\), got start of shape \(2,\)"),
        ({"start": VOCAB}, ValueError, r"a token below the vocab 5 as start, got 5"),
        ({"start": -1}, ValueError, r"below the vocab 5 as start, got -1"),
        ({"end": 300, "prompt": PROMPT.astype(jnp.uint8)}, ValueError, r"below the vocab 5 as end, got 300"),
        ({"end": [1, 2]}, ValueError, r"one end token, or one a row \(3,\)"),
        ({"end": jnp.array([1, 2])}, ValueError, r"one end token, or one a row \(3,\), got end of shape \(2,\)"),
        ({"state": MODEL.initial_state(PARAMS)}, ValueError, "batch axes of the inputs"),
        ({"state": 1.0}, TypeError, "state of another cell"),
        ({"key": 0}, TypeError, r"needs one key, such as jax.random.key\(0\), got 0"),
        ({"noise_key": 0}, TypeError, "needs one key"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens >= 0, got -1"),
        ({"max_new_tokens": 2.0}, TypeError, "float"),
        ({"sample": float_token}, TypeError, r"integers of shape \(3,\).*gave float32\[3\]"),
        ({"sample": column_token}, TypeError, r"integers of shape \(3,\).*gave int32\[3,1\]"),
        ({"sample": same_token}, TypeError, r"integers of shape \(3,\).*gave 3"),
        ({"sample": same_token, "prompt": PROMPT[0]}, TypeError, r"integers of shape \(\).*gave 3"),
    ],
)
def test_wrong_use(change, error, message):
    arguments = {"cell": MODEL, "params": PARAMS, "prompt": PROMPT, "max_new_tokens": 2}
    with pytest.raises(error, match=message):
        generate(**arguments | change)
