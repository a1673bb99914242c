"""What the textbooks claim of recurrent networks, run: each claim small, over several seeds, in its honest form.

I. Goodfellow, Y. Bengio and A. Courville, Deep Learning, 2016, chapter 10, unless another source is named. What is only
reported, not asserted, is in `benchmarks/textbook.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxseq as js

pytestmark = pytest.mark.slow
SEEDS = jax.random.split(jax.random.key(0), 3)
TEST_ROWS = 4096
CHANCE = 0.025  # from it, at most: three standard deviations of 4096 guesses of a fair coin are 0.0234


def fit(loss, optimizer, steps, params, key):
    """The params after `steps` of training on `loss(params, key)`, which draws its own batch, and the last losses."""

    def update(carry, key):
        params, moments = carry
        value, gradients = jax.value_and_grad(loss)(params, key)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    (params, _), values = jax.lax.scan(update, (params, optimizer.init(params)), jax.random.split(key, steps))
    return params, values[-20:].mean()


def fit_seeds(init, loss, score, optimizer=None, steps=300):
    """Trains from each seed, all at once; the scores on new data, and the last losses."""
    optimizer = optimizer or optax.adam(1e-2)

    def run(seed):
        init_key, train_key, test_key = jax.random.split(seed, 3)
        params, value = fit(loss, optimizer, steps, init(init_key), train_key)
        return score(params, test_key), value

    return jax.jit(jax.vmap(run))(SEEDS)


def unrolled(layer, pool=js.pooling.last):
    """The logits of a layer after a sequence."""
    return lambda params, xs: pool(layer.unroll(params, xs)[1])


def classification(logits, draw):
    """`loss` and `score`, the accuracy on many rows, of `logits(params, xs)` on the batches of `draw(key, rows=64)`."""

    def loss(params, key):
        xs, labels = draw(key)
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, xs), labels).mean()

    def score(params, key, draw=draw):
        xs, labels = draw(key, TEST_ROWS)
        return (logits(params, xs).argmax(-1) == labels).mean()

    return loss, score


def classifier(hidden=16, inputs=2, **options):
    return js.Stack((js.OneHot(inputs), js.Elman(inputs, hidden, **options), js.Dense(hidden, 2)))


# Vanishing and exploding gradients: section 10.7, 10.11


def recall(length, key, rows=64):
    """A bit, and then nothing for `length` steps."""
    bits = jax.random.bernoulli(key, shape=(rows,)).astype(int)
    return jnp.concatenate([bits[:, None], jnp.full((rows, length), 2)], axis=1), bits


@pytest.mark.parametrize("clip", [False, True])
def test_clipping_cures_exploding(clip):
    """A linear map of radius 1.1 over 100 steps: plain descent ends in NaN; clipped by its norm it trains."""
    cell = js.Elman(1, 4, activation="identity")
    optimizer = optax.sgd(optax.linear_schedule(0.03, 0, 1000))
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def init(key):
        return js.initializers.orthogonal(cell, cell.init(key), key, scale=1.1)

    def loss(params, key):
        """Mean squared error of the first input, of variance 1, as the sum of the units after 100 steps."""
        first = jax.random.normal(key, (16, 1))
        state, _ = cell.unroll(params, jnp.zeros((16, 100, 1)).at[:, 0].set(first))
        return ((state.hidden.sum(axis=-1, keepdims=True) - first) ** 2).mean()

    after, _ = fit_seeds(init, loss, loss, optimizer, steps=1000)
    assert all(1e6 < loss(init(key), key) < np.inf for key in SEEDS)
    assert (after < 1e-4).all() if clip else np.isnan(after).all(), after


@pytest.mark.parametrize("clip", [False, True])
def test_clipping_does_not_cure_vanishing(clip):
    """A tanh network of radius 0.5 learns to recall a bit over 2 steps, not over 60; one of radius 1 does that too."""
    cell = classifier(inputs=3)
    optimizer = optax.sgd(0.03, momentum=0.9)
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def accuracy(radius, length):
        def init(key):
            return js.initializers.orthogonal(cell, cell.init(key), key, scale=radius)

        return fit_seeds(init, *classification(unrolled(cell), functools.partial(recall, length)), optimizer)[0]

    assert (accuracy(0.5, 2) == 1).all()
    assert (abs(accuracy(0.5, 60) - 0.5) < CHANCE).all()
    assert np.median(accuracy(1.0, 60)) == 1


def test_clipping_by_norm_keeps_the_direction_and_by_value_does_not():
    cell = js.LSTM(3, 4)
    params = cell.init(jax.random.key(0))
    gradient = jax.grad(lambda p: cell.unroll(p, jnp.ones((20, 3)))[1].sum())(params)

    def cosine(clip):
        clipped, _ = clip.update(gradient, clip.init(params))
        a, b = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (clipped, gradient))
        assert jnp.linalg.norm(a) < 0.5 * jnp.linalg.norm(b)
        return float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))

    assert cosine(optax.clip_by_global_norm(0.1)) == pytest.approx(1, abs=1e-6)
    assert cosine(optax.clip(0.1)) < 0.98


@pytest.mark.parametrize("seed", range(3))
def test_products_of_jacobians(seed):
    """Of a tanh network they are at most sigma_max^T; of a linear one they grow as its radius."""
    xs = jax.random.normal(jax.random.key(seed), (40, 3))

    def products(activation, scale):
        cell = js.Elman(3, 8, activation=activation)
        params = js.initializers.orthogonal(cell, cell.init(jax.random.key(seed)), jax.random.key(seed), scale=scale)
        kernel = np.asarray(params.recurrent_kernel[:, 0])
        return kernel, np.asarray(js.diagnostics.jacobian_singular_values(cell, params, xs).product[:, 0])

    steps = np.arange(1, 41)
    kernel, largest = products("tanh", 1.2)
    assert (largest <= 1.001 * np.linalg.norm(kernel, 2) ** steps).all() and largest[-1] < 0.5 * 1.2**40
    kernel, largest = products("identity", 1.1)
    radius = np.abs(np.linalg.eigvals(kernel)).max()
    np.testing.assert_allclose(largest, radius**steps, rtol=1e-3)  # an orthogonal matrix times 1.1 is normal


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_delay_of_d_steps_slows_decay_to_the_d_th_root(steps):
    """What fades by r a step fades by r^(T / d) over T steps of connections that skip d (section 10.9.1)."""
    cell = js.Delay(js.Elman(1, 1, activation="identity"), steps)
    params = js.GatedParams(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 0.8), jnp.zeros((1, 1)))
    time = 30
    gradient = jax.grad(lambda xs: cell.unroll(params, xs)[1][-1, 0])(jnp.zeros((time + 1, 1)))
    np.testing.assert_allclose(gradient[0, 0], 0.8 ** (time / steps), rtol=1e-5)


# Long short-term memory: section 10.10.1


def test_along_the_memory_path_an_lstm_multiplies_by_its_forget_gate():
    cell = js.LSTM(3, 5)
    params = cell.init(jax.random.key(0))
    state = js.LSTMState(*jax.random.normal(jax.random.key(1), (2, 5)))
    x = jax.random.normal(jax.random.key(2), (3,))

    def next_memory(memory):
        return cell.step(params, state._replace(cell=memory), x)[0].cell

    z = x @ params.input_kernel[:, 1] + state.hidden @ params.recurrent_kernel[:, 1] + params.bias[1]
    np.testing.assert_allclose(jax.jacobian(next_memory)(state.cell), np.diag(1 / (1 + np.exp(-z))), atol=1e-6)


def test_an_open_forget_gate_and_a_shut_input_gate_hold_the_memory_exactly():
    cell = js.LSTM(3, 5)
    params = cell.init(jax.random.key(0))
    params = params._replace(bias=params.bias.at[0].set(-1e3).at[1].set(1e3))
    memory = jax.random.normal(jax.random.key(1), (5,))
    state, _ = cell.unroll(params, jnp.ones((1000, 3)), js.LSTMState(jnp.zeros(5), memory))
    assert np.array_equal(state.cell, memory)


def test_a_gru_has_three_quarters_of_an_lstms_parameters():
    def count(cell):
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.init, jax.random.key(0))))

    assert count(js.GRUv1(50, 70)) / count(js.LSTM(50, 70)) == 3 / 4
    gru, lstm = (jax.eval_shape(cell.init, jax.random.key(0)) for cell in (js.GRU(50, 70), js.LSTM(50, 70)))
    for name in ("input_kernel", "recurrent_kernel"):  # this form has a second bias
        assert getattr(gru, name).size / getattr(lstm, name).size == 3 / 4


# Depth: section 10.5


def test_eight_uniform_layers_lose_the_first_layers_gradient_and_a_shortcut_restores_it():
    xs = jax.random.normal(jax.random.key(0), (4, 20, 32))

    def share(wrap, seed):
        """The gradient norm of the first layer's biases, relative to the last layer's."""
        layers = tuple(wrap(js.Elman(32, 32)) for _ in range(8))
        cell = js.Stack(layers)
        params = cell.init(seed)
        for role in ("input", "recurrent"):
            key = jax.random.fold_in(seed, len(role))
            params = js.initializers.uniform(cell, params, key, role=role)  # up to 1 / sqrt(units), as torch has it
        weights = jax.random.normal(seed, (32,))
        gradient = jax.grad(lambda p: (cell.unroll(p, xs)[1][:, -1] @ weights).sum())(params)
        first, last = (jnp.linalg.norm(gradient[layer].bias) for layer in (0, -1))
        return float(first / last)

    plain, shortcut = (np.median([share(wrap, seed) for seed in SEEDS]) for wrap in (lambda cell: cell, js.Residual))
    assert plain < 0.05 and 1 < shortcut < 100, (plain, shortcut)


# Output feedback: sections 10.2.1 and 10.2.3


def test_output_only_recurrence_cannot_recall_a_bit_over_silent_steps_and_elman_can():
    """A bit, seven steps whose output has to be 2, a signal, and then the bit: what is fed back knows nothing of it."""
    silent = 7

    def draw(key, rows=64):
        bits = jax.random.bernoulli(key, shape=(rows,)).astype(int)
        tokens = jnp.full((rows, silent + 2), 2).at[:, 0].set(bits).at[:, -1].set(3)
        outputs = jnp.full((rows, silent + 2), 2).at[:, -1].set(bits)
        return tokens, outputs

    jordan = js.Jordan(4, 16, 3)
    elman = js.Stack((js.OneHot(4), js.Elman(4, 16), js.Dense(16, 3)))

    def jordan_logits(params, xs, outputs):
        before = jnp.concatenate([jnp.full_like(outputs[:, :1], 2), outputs[:, :-1]], axis=1)
        return jordan.unroll(params, (jax.nn.one_hot(xs, 4), jax.nn.one_hot(before, 3)))[1]

    def run(init, logits):
        def loss(params, key):
            xs, outputs = draw(key)
            return js.losses.cross_entropy(logits(params, xs, outputs), outputs).mean()

        def score(params, key):
            xs, outputs = draw(key, TEST_ROWS)
            return (logits(params, xs, outputs)[:, -1].argmax(-1) == outputs[:, -1]).mean()

        return fit_seeds(init, loss, score)[0]

    assert (abs(run(jordan.init, jordan_logits) - 0.5) < CHANCE).all()
    assert (run(elman.init, lambda params, xs, outputs: elman.unroll(params, xs)[1]) == 1).all()
    text = str(jax.make_jaxpr(lambda p: jordan_logits(p, *draw(jax.random.key(0))))(jordan.init(jax.random.key(0))))
    assert "scan" not in text and "while" not in text  # and it trains at all steps at once


def test_output_feedback_makes_the_outputs_joint():
    """On sequences of only 0 or only 1, who reads no outputs stays at T ln 2, and who reads them comes to ln 2."""
    time = 8

    def draw(key):
        return jnp.broadcast_to(jax.random.bernoulli(key, shape=(64, 1)).astype(int), (64, time))

    def entropy(cell, reads):
        def loss(params, key):
            ys = draw(key)
            before = jnp.concatenate([jnp.full_like(ys[:, :1], 2), ys[:, :-1]], axis=1)
            _, logits = cell.unroll(params, before if reads else jnp.full_like(before, 2))
            return js.losses.cross_entropy(logits, ys).sum(axis=1).mean()

        return fit_seeds(cell.init, loss, loss, steps=500)[1]

    cell = js.Stack((js.OneHot(3), js.Elman(3, 8), js.Dense(8, 2)))
    assert (abs(entropy(cell, reads=False) - time * np.log(2)) < 0.1).all()
    assert (abs(entropy(cell, reads=True) - np.log(2)) < 0.1).all()


# What a recurrent network can compute: section 10.2


def test_an_elman_network_set_by_hand_recognises_brackets_to_a_depth_of_12():
    """A stack as a number of base 4, digits 1 and 3 (Siegelmann and Sontag 1995): two of float32's 24 bits a bracket.

    Units: four that hold the stack (after "(", "[", ")", "]"), three that see a wrong bracket, one that remembers it.
    """
    push_0, push_1, pop_0, pop_1, wrong_0, wrong_1, empty, error = range(8)
    shut = -4  # what keeps a unit at 0 without its own bracket
    recurrent, inputs, bias = np.zeros((8, 8)), np.zeros((4, 8)), np.zeros(8)
    stack = [push_0, push_1, pop_0, pop_1]  # one of them holds it, the others are 0
    units = [  # own bracket, slope over the stack, offset
        (push_0, 0, 1 / 4, 1 / 4),
        (push_1, 1, 1 / 4, 3 / 4),
        (pop_0, 2, 4, -1),
        (pop_1, 3, 4, -3),
        (wrong_0, 2, 4, -2),  # the top is 3: at least 3/4
        (wrong_1, 3, -4, 3),  # the top is 1, or there is none: below 1/2
        (empty, 2, -4, 1),
    ]
    for unit, bracket, slope, offset in units:
        recurrent[stack, unit] = slope
        bias[unit] = offset + shut
        inputs[bracket, unit] = -shut
    recurrent[[wrong_0, wrong_1, empty, error], error] = 1
    params = (
        (),
        js.GatedParams(*(jnp.asarray(w, jnp.float32) for w in (inputs[:, None], recurrent[:, None], bias[None]))),
    )
    cell = js.Stack((js.OneHot(4), js.Elman(4, 8, activation="saturated_linear")))

    def accepts(words, lengths):
        state, _ = cell.unroll(params, words, mask=js.length_mask(lengths, words.shape[1]))
        return np.asarray(state[1].hidden).sum(axis=-1) == 0  # no stack left and nothing wrong

    def balanced(rng, depth, pairs):
        """A random word of brackets ("()[]" as 0, 2, 1, 3) that reaches `depth`."""
        word, open_ = list(rng.integers(0, 2, depth)), []
        open_ = word.copy()
        while open_ or len(word) < 2 * pairs:
            if open_ and (len(open_) == depth or len(word) + len(open_) >= 2 * pairs or rng.random() < 0.5):
                word.append(open_.pop() + 2)
            else:
                open_.append(int(rng.integers(0, 2)))
                word.append(open_[-1])
        return word

    def is_balanced(word):
        open_ = []
        for bracket in word:
            if bracket < 2:
                open_.append(bracket)
            elif not open_ or open_.pop() != bracket - 2:
                return False
        return not open_

    def batch(depth, pairs=40):
        rng = np.random.default_rng(depth)
        words = [balanced(rng, depth, pairs) for _ in range(100)]
        for word in words[50:]:  # spoil one place, or cut the end
            if rng.random() < 0.3:
                del word[-1 - rng.integers(3) :]
            else:
                word[rng.integers(len(word))] = int(rng.integers(4))
        lengths = np.array([len(word) for word in words])
        padded = np.zeros((100, lengths.max()), int)
        for row, word in zip(padded, words, strict=True):
            row[: len(word)] = word
        return jnp.asarray(padded), jnp.asarray(lengths), np.array([is_balanced(word) for word in words])

    for depth in (1, 5, 12):
        words, lengths, expected = batch(depth)
        assert 50 <= expected.sum() < 90
        assert np.array_equal(accepts(words, lengths), expected)
    words, lengths, expected = batch(30)
    assert not np.array_equal(accepts(words, lengths), expected)  # deeper, the digits do not fit


# Parameters shared over time: section 10 and 10.1


def adjacent(first, last, time, key, rows=64):
    """Two tokens 0 between the positions `first` and `last` of random others: side by side (label 1), or one apart."""
    place_key, label_key, token_key = jax.random.split(key, 3)
    labels = jax.random.bernoulli(label_key, shape=(rows,)).astype(int)
    place = jax.random.randint(place_key, (rows, 1), first, last - 2)
    tokens, steps = jax.random.randint(token_key, (rows, time), 1, 4), jnp.arange(time)
    return jnp.where((steps == place) | (steps == place + 2 - labels[:, None]), 0, tokens), labels


def test_what_is_learned_at_one_position_is_found_at_others():
    early, late = (functools.partial(adjacent, *where, 20) for where in ((0, 10), (10, 20)))
    elman = classifier(inputs=4)
    dense = js.Stack((js.Dense(80, 32), js.Map("tanh"), js.Dense(32, 2)))

    def dense_logits(params, xs):
        """One network over all positions of a sequence, each with weights of its own."""
        return dense.step(params, dense.initial_state(params), jax.nn.one_hot(xs, 4).reshape(len(xs), 80))[1]

    def recurrent_logits(params, xs):
        return js.pooling.max(elman.unroll(params, xs)[1])

    def scores(cell, logits):
        loss, score = classification(logits, early)

        def both(params, key):
            return score(params, key), score(params, key, late)

        return fit_seeds(cell.init, loss, both, steps=1000)[0]

    seen, new = scores(elman, recurrent_logits)
    assert (seen > 0.95).all() and (new > 0.8).all(), (seen, new)
    seen, new = scores(dense, dense_logits)
    assert (seen > 0.95).all() and (new < 0.7).all(), (seen, new)


def test_what_is_learned_on_short_sequences_holds_on_sequences_of_twice_the_length():
    short, long = (functools.partial(adjacent, 0, time, time) for time in (20, 40))
    cell = classifier(inputs=4)
    loss, score = classification(unrolled(cell, js.pooling.max), short)
    accuracy, _ = fit_seeds(cell.init, loss, functools.partial(score, draw=long), steps=1000)
    assert (accuracy > 0.9).all(), accuracy


def test_order_is_seen_where_a_bag_of_words_is_at_chance():
    def draw(key, rows=64):
        """Ten tokens with a 1 and a 2 among zeros: does the 1 come first?"""
        tokens = jnp.broadcast_to(jnp.where(jnp.arange(10) < 3, jnp.arange(10), 0), (rows, 10))
        xs = jax.random.permutation(key, tokens, axis=1, independent=True)
        return xs, ((xs == 1).argmax(axis=1) < (xs == 2).argmax(axis=1)).astype(int)

    elman = classifier(inputs=3)
    ordered, _ = fit_seeds(elman.init, *classification(unrolled(elman), draw))
    bag = js.Stack((js.Embed(3, 16), js.Dense(16, 2)))
    unordered, _ = fit_seeds(bag.init, *classification(unrolled(bag, js.pooling.mean), draw))
    assert (ordered > 0.95).all() and (abs(unordered - 0.5) < CHANCE).all(), (ordered, unordered)


# Reading both ways: section 10.3


def test_some_labels_need_the_future():
    """Each label is the next token: a causal network is at chance, one that reads both ways is right."""

    def draw(key, rows=64):
        xs = jax.random.bernoulli(key, shape=(rows, 12)).astype(int)
        return xs, xs[:, 1:]

    def logits(layer):
        return lambda params, xs: layer.unroll(params, xs)[1][:, :-1]  # the last token has no next one

    causal = classifier()
    both = js.Sequential((js.OneHot(2), js.Bidirectional(js.Elman(2, 16), js.Elman(2, 16)), js.Dense(32, 2)))
    at_chance, _ = fit_seeds(causal.init, *classification(logits(causal), draw))
    right, _ = fit_seeds(both.init, *classification(logits(both), draw))
    assert (abs(at_chance - 0.5) < CHANCE).all() and (right > 0.99).all(), (at_chance, right)
