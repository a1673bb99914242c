"""Hidden Markov models equal the enumeration of all paths, and their emissions equal SciPy's."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from hypothesis import strategies
from jax.test_util import check_grads

import jaxseq as js
from jaxseq.structured import chains
from jaxseq.structured.semirings import logsumexp
from tests.structured.paths import check, documents, flags

pytestmark = pytest.mark.usefixtures("float64")
TIME, STATES, VOCAB = 4, 3, 4
EMISSIONS = {
    "categorical": js.CategoricalEmission(STATES, VOCAB),
    "gaussian": js.GaussianEmission(STATES, 2),
    "full": js.FullGaussianEmission(STATES, 2),
    "poisson": js.PoissonEmission(STATES, 2),
}
ALL = pytest.mark.parametrize("name", EMISSIONS)


def random_params(hmm, seed=0):
    """Params whose every number is normal."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape), hmm.init(jax.random.key(0)))


def random_xs(emission, seed, leading, missing=0.2):
    """Observations of which some are missing."""
    random = np.random.default_rng(seed)
    if emission.input_rank == 0:
        xs = random.integers(0, emission.vocab_size, leading)
        return np.where(random.uniform(size=leading) < missing, -1, xs)
    shape = (*leading, emission.input_size)
    xs = random.poisson(2, shape) * 1.0 if isinstance(emission, js.PoissonEmission) else random.normal(size=shape)
    return np.where(random.uniform(size=shape) < missing, np.nan, xs)


def log_likelihoods(emission, params, x):
    """`log p(x | state)` of one observation by SciPy."""
    if emission.input_rank == 0:
        return np.zeros(STATES) if x < 0 else scipy.special.log_softmax(params.logits, axis=-1)[:, x]
    seen = ~np.isnan(x)
    if isinstance(emission, js.PoissonEmission):
        return scipy.stats.poisson.logpmf(x[seen], np.exp(params.log_rate[:, seen])).sum(axis=-1)
    if isinstance(emission, js.GaussianEmission):
        scale = np.exp(params.log_scale[:, seen])
        return scipy.stats.norm.logpdf(x[seen], params.mean[:, seen], scale).sum(axis=-1)
    if not seen.all():
        return np.zeros(STATES)
    lower = [np.tril(f, -1) + np.diag(np.exp(np.diag(f))) for f in params.factor]
    covariances = [factor @ factor.T for factor in lower]
    return np.array([scipy.stats.multivariate_normal.logpdf(x, *c) for c in zip(params.mean, covariances, strict=True)])


@ALL
def test_likelihoods_are_those_of_scipy(name):
    emission = EMISSIONS[name]
    hmm = js.HMM(emission)
    params, xs = random_params(hmm), random_xs(emission, 1, (2, 20))
    expected = [[log_likelihoods(emission, params.emission, x) for x in row] for row in xs]
    chain = hmm.chain(params, xs)
    np.testing.assert_allclose(chain.emission, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(chain.start, scipy.special.log_softmax(params.prior), rtol=1e-12)
    np.testing.assert_allclose(chain.transition, scipy.special.log_softmax(params.transition, axis=-1), rtol=1e-12)


@functools.cache
def program(hmm):
    """What is asked of a model, compiled once."""

    def run(params, xs, states, mask, reset):
        chain = hmm.chain(params, xs, mask)
        options = {"mask": mask, "reset": reset}
        return {
            "joint": chains.path_score(chain, states, **options),
            "log_likelihood": chains.log_partition(chain, **options),
            "smoothed": chains.marginals(chain, **options),
            "filtered": hmm.unroll(params, xs, **options)[1],
            "state": hmm.unroll(params, xs, **options)[0].predicted,
        }

    return jax.jit(run)


@pytest.mark.parametrize("kind", [js.HMM, js.VaryingHMM])
def test_everything_equals_enumeration(kind):
    """In probabilities, for each document of a row: the joint one, and filtering as smoothing of each beginning."""
    emission = js.CategoricalEmission(STATES, VOCAB)
    hmm, plain = kind(emission), js.HMM(emission)

    @check(strategies.integers(0, 2**31), flags(), flags())
    def examples(seed, mask, reset):
        random = np.random.default_rng(seed)
        params, xs = random_params(plain, seed), random_xs(emission, seed, (2, TIME))
        states = random.integers(0, STATES, (2, TIME))
        transition = random.normal(size=(2, TIME, STATES, STATES))
        given = xs
        if kind is js.HMM:
            transition = np.broadcast_to(params.transition, transition.shape)
        else:
            junk = np.where(mask[..., None, None], transition, np.nan)
            params, given = params._replace(transition=None), (xs, junk)
        found = jax.tree.map(np.asarray, program(hmm)(params, given, states, mask, reset))
        first, moves = scipy.special.softmax(params.prior), scipy.special.softmax(transition, axis=-1)
        seen = np.exp([[log_likelihoods(emission, params.emission, x) for x in row] for row in xs])

        def probability(row, steps, path):
            value = first[path[0]] * np.prod([seen[row, t, z] for t, z in zip(steps, path, strict=True)])
            return value * np.prod([moves[row, t, i, j] for t, i, j in zip(steps, path, path[1:], strict=False)])

        for row in range(2):
            joint = total = 1.0
            for steps in documents(mask[row], reset[row]):
                joint *= probability(row, steps, states[row, steps])
                before = 1.0
                for count in range(1, len(steps) + 1):  # what is known after so many steps
                    share = np.zeros((count, STATES))
                    for path in itertools.product(range(STATES), repeat=count):
                        share[range(count), path] += probability(row, steps[:count], path)
                    t, so_far = steps[count - 1], share[0].sum()
                    filtered = jax.tree.map(lambda leaf, at=(row, t): leaf[at], found["filtered"])
                    np.testing.assert_allclose(np.exp(filtered.log_probs), share[-1] / so_far, rtol=1e-10)
                    np.testing.assert_allclose(np.exp(filtered.log_likelihood), so_far / before, rtol=1e-10)
                    before = so_far
                total *= before
                np.testing.assert_allclose(found["smoothed"][row, steps], share / before, rtol=1e-9)
            np.testing.assert_allclose(np.exp(found["joint"][row]), joint, rtol=1e-10)
            np.testing.assert_allclose(np.exp(found["log_likelihood"][row]), total, rtol=1e-10)
        increments = found["filtered"].log_likelihood.sum(axis=-1)
        np.testing.assert_allclose(increments, found["log_likelihood"], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(np.exp(found["state"]).sum(axis=-1), 1, rtol=1e-10)

    examples()


@pytest.mark.parametrize("batch", [(), (2, 1)])
@pytest.mark.parametrize("time", [0, 1, 5])
def test_shapes(time, batch):
    hmm = js.HMM(EMISSIONS["gaussian"])
    params, xs = random_params(hmm), random_xs(hmm.emission, 0, (*batch, time))
    state, filtered = hmm.unroll(params, xs)
    assert state.predicted.shape == (*batch, STATES)
    chain = hmm.chain(params, xs)
    np.testing.assert_allclose(filtered.log_likelihood.sum(-1), chains.log_partition(chain), atol=1e-12)
    drawn = hmm.simulate(jax.random.key(0), params, time, batch)
    assert drawn.states.shape == (*batch, time) and drawn.xs.shape == (*batch, time, 2)


def test_what_is_impossible_is_so_until_the_next_document():
    """From left to right, and out of the last state nothing leads: no NaN, in gradients neither."""
    hmm = js.HMM(js.CategoricalEmission(2, 3))
    params = js.HMMParams(
        prior=np.array([0.0, -np.inf]),
        transition=np.array([[0.0, 0.0], [-np.inf, -np.inf]]),
        emission=js.CategoricalParams(np.array([[0.0, -np.inf, 0.0], [-np.inf, 0.0, 0.0]])),
    )
    xs = jnp.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    reset = jnp.array([[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def filtered(params):
        found = hmm.unroll(params, xs, reset=reset)[1].log_likelihood
        possible = jnp.isfinite(found)
        return jnp.where(possible, found, 0).sum() + found.sum(axis=-1)[2], found

    (_, found), gradients = filtered(params)
    half, quarter = np.log([0.5, 0.25])
    expected = [[half, quarter, half, quarter], [-np.inf, -np.inf, half, quarter], [half, *[quarter] * 3]]
    np.testing.assert_allclose(found, expected)
    whole = jax.grad(lambda params: chains.log_partition(hmm.chain(params, xs), reset=reset).sum())(params)
    for leaf in jax.tree.leaves((gradients, whole)):
        assert np.isfinite(leaf).all()
    drawn = hmm.simulate(jax.random.key(0), params, 3, (50,)).states
    assert set(map(tuple, drawn.tolist())) <= {(0, 0, 0), (0, 0, 1)}


@pytest.mark.parametrize("name", ["gaussian", "full", "poisson"])
def test_what_is_infinite_is_impossible(name):
    """Missing features beside it do not count, but of a vector that is missing as a whole nothing does."""
    hmm = js.HMM(EMISSIONS[name])
    params = random_params(hmm)
    xs = jnp.array([[1.0, jnp.inf], [-jnp.inf, 1.0], [jnp.inf, jnp.nan], [1.0, 2.0]])[:, None]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(params, xs):
        value = chains.log_partition(hmm.chain(params, xs))
        return value.sum(), value

    (_, found), gradient = total(params, xs)
    last = scipy.special.logsumexp(
        scipy.special.log_softmax(params.prior) + log_likelihoods(hmm.emission, params.emission, np.array([1.0, 2.0]))
    )
    np.testing.assert_allclose(found, [-np.inf, -np.inf, 0 if name == "full" else -np.inf, last], atol=1e-12)
    missing = jnp.where(jnp.isfinite(xs).all(axis=-1, keepdims=True), xs, jnp.nan)  # has no gradient
    expected = total(params, missing)[1]
    jax.tree.map(np.testing.assert_array_equal, gradient.emission, expected.emission)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_tokens_of_narrow_dtypes():
    for vocab_size, dtype in ((300, np.uint8), (200, np.int8)):
        hmm = js.HMM(js.CategoricalEmission(2, vocab_size))
        params, tokens = random_params(hmm), np.array([0, 5, 100, 127], dtype)
        expected = scipy.special.log_softmax(params.emission.logits, axis=-1)[:, tokens].T
        np.testing.assert_allclose(hmm.chain(params, tokens).emission, expected, rtol=1e-12)
        found = hmm.emission.maximize(params.emission, tokens, jnp.ones((4, 2))).logits
        np.testing.assert_allclose(np.exp(found)[:, tokens], 0.25, rtol=1e-12)


def test_draws_in_bfloat16_are_as_fine_as_others():
    states = jnp.zeros(20_000, int)

    def draw(emission, params):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
        return np.asarray(emission.simulate(jax.random.key(0), params, states), float)

    tokens = draw(js.CategoricalEmission(1, 64), js.CategoricalParams(np.zeros((1, 64))))
    np.testing.assert_allclose(tokens.mean(), 31.5, atol=0.7)
    numbers = draw(js.GaussianEmission(1, 1), js.GaussianParams(np.zeros((1, 1)), np.zeros((1, 1))))
    assert np.abs(numbers).max() > 3.3  # noise of 8 bits ends at 2.7
    vectors = draw(js.FullGaussianEmission(1, 1), js.FullGaussianParams(np.zeros((1, 1)), np.zeros((1, 1, 1))))
    assert np.abs(vectors).max() > 3.3
    counts = draw(js.PoissonEmission(1, 1), js.PoissonParams(np.full((1, 1), 6.90625)))
    np.testing.assert_allclose(counts.mean(), np.exp(6.90625), atol=1)  # which is 1000 in bfloat16


def test_the_best_paths_and_drawn_ones_are_those_of_enumeration():
    hmm = js.HMM(js.CategoricalEmission(STATES, VOCAB))
    params, xs = random_params(hmm, 3), random_xs(hmm.emission, 3, (TIME,))
    prior, moves = scipy.special.log_softmax(params.prior), scipy.special.log_softmax(params.transition, axis=-1)
    seen = np.array([log_likelihoods(hmm.emission, params.emission, x) for x in xs])
    paths = np.array(list(itertools.product(range(STATES), repeat=TIME)))
    scores = prior[paths[:, 0]] + moves[paths[:, :-1], paths[:, 1:]].sum(axis=-1)
    scores += seen[np.arange(TIME), paths].sum(axis=-1)
    order = np.argsort(-scores)[:5]
    chain = hmm.chain(params, xs)
    best = chains.best_paths(chain, 5)
    np.testing.assert_array_equal(best.states, paths[order])
    np.testing.assert_allclose(best.score, scores[order], rtol=1e-10)
    keys = jax.random.split(jax.random.key(0), 5000)
    drawn = np.asarray(jax.vmap(lambda key: chains.sample_path(key, chain).states)(keys))
    shares = (drawn[:, None] == paths).all(axis=-1).mean(axis=0)
    np.testing.assert_allclose(shares, scipy.special.softmax(scores), atol=0.02)


def test_logits_of_the_next_token_are_conditional_probabilities():
    emission = js.CategoricalEmission(STATES, VOCAB)
    hmm, cell = js.HMM(emission), js.TokenHMM(emission)
    params, xs = random_params(hmm), random_xs(emission, 2, (5,))
    _, logits = cell.unroll(params, xs)

    def log_likelihood(tokens):
        return chains.log_partition(hmm.chain(params, jnp.array(tokens)))

    for t in range(5):
        seen = xs[: t + 1].tolist()
        expected = [log_likelihood([*seen, token]) - log_likelihood(seen) for token in range(VOCAB)]
        np.testing.assert_allclose(logits[t], expected, rtol=1e-10)
    out = js.generate(cell, params, xs[None], key=jax.random.key(0), max_new_tokens=3)
    extended = log_likelihood([*xs.tolist(), *out.tokens[0].tolist()]) - log_likelihood(xs.tolist())
    np.testing.assert_allclose(out.log_probs.sum(), extended, rtol=1e-5)


@pytest.mark.parametrize("name", EMISSIONS)
def test_simulations_have_the_frequencies_of_the_model(name):
    emission = EMISSIONS[name]
    hmm = js.HMM(emission)
    params = random_params(hmm, 4)
    states, xs = map(np.asarray, jax.jit(hmm.simulate, static_argnums=(2, 3))(jax.random.key(1), params, 4, (20_000,)))
    prior, moves = scipy.special.softmax(params.prior), scipy.special.softmax(params.transition, axis=-1)
    np.testing.assert_allclose(np.bincount(states[:, 0], minlength=3) / 20_000, prior, atol=0.015)
    for state in range(STATES):
        after = states[:, 1:][states[:, :-1] == state]
        np.testing.assert_allclose(np.bincount(after, minlength=3) / len(after), moves[state], atol=0.03)
        own = xs[states == state]
        p = jax.tree.map(lambda leaf, state=state: leaf[state], params.emission)
        if name == "categorical":
            shares = np.bincount(own, minlength=VOCAB) / len(own)
            np.testing.assert_allclose(shares, scipy.special.softmax(p.logits), atol=0.03)
            continue
        if name == "poisson":
            mean, covariance = np.exp(p.log_rate), np.diag(np.exp(p.log_rate))
        elif name == "gaussian":
            mean, covariance = p.mean, np.diag(np.exp(2 * p.log_scale))
        else:
            lower = np.tril(p.factor, -1) + np.diag(np.exp(np.diag(p.factor)))
            mean, covariance = p.mean, lower @ lower.T
        scale = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose((own.mean(axis=0) - mean) / scale, 0, atol=0.05)
        np.testing.assert_allclose(
            np.cov(own.T) / np.outer(scale, scale), covariance / np.outer(scale, scale), atol=0.1
        )


@ALL
def test_what_the_padding_holds_has_no_effect(name):
    emission = EMISSIONS[name]
    hmm = js.HMM(emission)
    params, xs = random_params(hmm), random_xs(emission, 3, (2, TIME))
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)

    @jax.jit
    @jax.grad
    def gradient(params, xs):
        return chains.log_partition(hmm.chain(params, xs, mask), mask).sum()

    expected = gradient(params, xs)
    for junk in (7e8, 1e300, np.nan, np.inf) if emission.input_rank else (-5, 10**9):
        spoilt = np.where(np.expand_dims(mask, tuple(range(2, xs.ndim))), xs, np.asarray(junk, xs.dtype))
        jax.tree.map(np.testing.assert_array_equal, gradient(params, spoilt), expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))


@ALL
def test_gradients_are_finite_differences(name):
    emission = EMISSIONS[name]
    hmm = js.HMM(emission)
    params, xs = random_params(hmm), random_xs(emission, 5, (2, TIME))
    check_grads(lambda params: chains.log_partition(hmm.chain(params, xs)), (params,), order=1)


@pytest.mark.slow
def test_a_fit_by_gradients():
    hmm = js.HMM(js.GaussianEmission(2, 1))
    truth = js.HMMParams(
        np.zeros(2), np.array([[2.0, 0.0], [0.0, 2.0]]), js.GaussianParams(np.array([[-2.0], [2.0]]), np.zeros((2, 1)))
    )
    xs = hmm.simulate(jax.random.key(0), truth, 50, (8,)).xs
    optimizer = optax.adam(0.05)

    @jax.value_and_grad
    def loss(params):
        return -chains.log_partition(hmm.chain(params, xs)).mean()

    def update(carry, _):
        params, moments = carry
        value, gradients = loss(params)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), value

    params = hmm.init(jax.random.key(2))
    (params, _), losses = jax.jit(lambda carry: jax.lax.scan(update, carry, length=300))(
        (params, optimizer.init(params))
    )
    assert losses[-1] < loss(truth)[0] < losses[0]
    np.testing.assert_allclose(np.sort(params.emission.mean.ravel()), [-2, 2], atol=0.3)


def laplace(params, x):
    """The log-density of a vector under Laplace distributions, of one location in each state."""
    away = x[..., None, :] - jnp.expand_dims(params, tuple(range(x.ndim - 1)))
    return -(jnp.abs(away) + jnp.log(2.0)).sum(axis=-1)


def locations(key):
    return jax.random.normal(key, (STATES, 2))


def wrong(params, x):
    return x


def of_one(params, x):
    return -((x - params) ** 2).sum(axis=-1)


def test_transitions_that_are_not_read_have_no_effect():
    """Off the mask and out of the last step, NaN too."""
    hmm = js.VaryingHMM(js.GaussianEmission(STATES, 2))
    params, xs = hmm.init(jax.random.key(0)), random_xs(hmm.emission, 0, (3, TIME))
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    moves = np.random.default_rng(0).normal(size=(3, TIME, STATES, STATES))
    spoilt = moves.copy()
    spoilt[[0, 1, 1, 1, 2], [3, 1, 2, 3, 0]] = np.nan

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(params, moves):
        return chains.log_partition(hmm.chain(params, (xs, moves), mask), mask).sum()

    jax.tree.map(np.testing.assert_array_equal, total(params, spoilt), total(params, moves))
    unmasked = np.where(np.arange(TIME)[:, None, None] == TIME - 1, np.nan, moves)
    assert jnp.isfinite(hmm.chain(params, (xs, unmasked)).transition).all()


def test_a_likelihood_of_ones_own():
    hmm = js.HMM(js.FunctionEmission(STATES, laplace, locations, input_size=2))
    params = hmm.init(jax.random.key(0))
    xs = random_xs(js.GaussianEmission(STATES, 2), 0, (3, TIME))
    expected = scipy.stats.laplace.logpdf(xs[..., None, :], params.emission).sum(axis=-1)
    chain = hmm.chain(params, xs)
    np.testing.assert_allclose(chain.emission, np.where(np.isnan(expected), 0, expected), rtol=1e-10)
    total = hmm.unroll(params, xs)[1].log_likelihood.sum(-1)
    np.testing.assert_allclose(total, chains.log_partition(chain), rtol=1e-10)
    gradients = jax.grad(lambda params: chains.log_partition(hmm.chain(params, xs)).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert js.from_json(js.to_json(hmm), extra=(laplace, locations)) == hmm


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_narrow_params_are_read_in_float32(dtype):
    hmm = js.HMM(EMISSIONS["full"])
    params, xs = random_params(hmm), random_xs(hmm.emission, 0, (30,), missing=0)
    params, xs = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, xs))
    found = chains.log_partition(hmm.chain(params, xs))
    assert found.dtype == jnp.float32
    exact = chains.log_partition(hmm.chain(*jax.tree.map(lambda leaf: leaf.astype(float), (params, xs))))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_the_filter_is_a_cell_among_cells():
    """The gradient of a classifier on top of the filtered states reaches the model."""
    cell = js.HMM(js.GaussianEmission(STATES, 2))
    params, xs = random_params(cell), random_xs(cell.emission, 0, (TIME,), missing=0)

    def first(params):
        return cell.unroll(params, xs)[1].log_probs[-1, 0]

    posterior = chains.marginals(cell.chain(params, xs))[-1, 0]
    np.testing.assert_allclose(np.exp(first(params)), posterior, rtol=1e-10)
    check_grads(first, (params,), order=1)


def test_logits_without_a_possible_one():
    from jaxseq.structured.emissions import normalized

    logits = jnp.array([[-jnp.inf, -jnp.inf], [0.0, -jnp.inf]])
    np.testing.assert_array_equal(normalized(logits), logits)
    assert not np.isnan(jax.grad(lambda logits: jnp.exp(normalized(logits)).sum())(logits)).any()
    assert logsumexp(normalized(logits), -1).tolist() == [-np.inf, 0]


def test_errors():
    hmm = js.HMM(js.GaussianEmission(2, 3))
    params = hmm.init(jax.random.key(0))
    bare = params._replace(transition=None)
    tokens = js.HMM(js.CategoricalEmission(2, 3))
    other = js.HMM(js.GaussianEmission(3, 3)).init(jax.random.key(0))
    key, varying = jax.random.key(0), js.VaryingHMM(hmm.emission)
    mine = js.HMM(js.FunctionEmission(3, of_one, locations, input_size=2))
    batch, flags = jnp.ones((4, 5, 3)), jnp.ones((4, 5), bool)
    cases = [
        (ValueError, "params of another layer", lambda: hmm.chain(other, batch)),
        (ValueError, "params of another layer", lambda: hmm.unroll(other, batch)),
        (ValueError, "params of another layer", lambda: hmm.simulate(key, other, 3)),
        (ValueError, "params of another layer", lambda: hmm.chain(bare, batch)),
        (TypeError, r"such as hmm.init\(key\) or hmm.spread\(key, xs\)", lambda: hmm.chain(key, batch)),
        (TypeError, "needs HMMParams", lambda: hmm.unroll(key, batch)),
        (ValueError, "jaxseq.pad", lambda: hmm.chain(params, [jnp.ones((2, 3)), jnp.ones((1, 3))])),
        (ValueError, "jaxseq.pad", lambda: hmm.spread(key, [np.ones((2, 3)), np.ones((1, 3))])),
        (ValueError, "mask of shape", lambda: hmm.spread(key, batch, flags.T)),
        (ValueError, "length of 0 or more", lambda: hmm.simulate(key, params, -1)),
        (TypeError, r"\[\*batch, state\] = \(5, 3\)", lambda: mine.chain(mine.init(key), jnp.ones((5, 2)))),
        (
            ValueError,
            r"= \(4, 5, 2, 2\), got shape \(4, 4, 2, 2\)",
            lambda: varying.chain(bare, (batch, jnp.zeros((4, 4, 2, 2))), flags),
        ),
        (
            ValueError,
            r"= \(4, 5, 2, 2\), got shape \(5, 2, 2\)",
            lambda: varying.chain(bare, (batch, jnp.zeros((5, 2, 2))), flags),
        ),
        (
            ValueError,
            r"VaryingHMM.* = \(3, 2, 2\) to simulate",
            lambda: varying.simulate(key, bare, 3, transition=jnp.zeros((2, 2, 2))),
        ),
        (TypeError, "HMM needs an Emission", lambda: js.HMM(3)),
        (TypeError, "TokenHMM needs a CategoricalEmission", lambda: js.TokenHMM(js.GaussianEmission(2, 3))),
        (ValueError, "states >= 1", lambda: js.PoissonEmission(0, 3)),
        (ValueError, "input_size >= 1", lambda: js.PoissonEmission(2, 0)),
        (ValueError, "least_variance above 0", lambda: js.GaussianEmission(2, 3, least_variance=0.0)),
        (ValueError, r"observations \[\*batch, time, \*features\]", lambda: hmm.chain(params, jnp.ones(3))),
        (ValueError, "2 features", lambda: hmm.chain(params, jnp.ones((5, 2)))),
        (TypeError, "reads tokens", lambda: tokens.chain(tokens.init(jax.random.key(0)), jnp.ones(5))),
        (TypeError, "boolean mask", lambda: hmm.chain(params, jnp.ones((5, 3)), jnp.ones(5))),
        (TypeError, "float32", lambda: hmm.chain(params, jnp.ones((5, 3), jnp.float32))),
        (TypeError, "needs one key", lambda: hmm.simulate(0, params, 3)),
        (
            ValueError,
            "give transition=",
            lambda: js.VaryingHMM(hmm.emission).simulate(jax.random.key(0), params._replace(transition=None), 3),
        ),
        (ValueError, "a pair", lambda: js.VaryingHMM(hmm.emission).chain(bare, jnp.ones((5, 3)))),
        (
            ValueError,
            "transition is None",
            lambda: js.VaryingHMM(hmm.emission).chain(params, (jnp.ones((5, 3)), jnp.ones((5, 2, 2)))),
        ),
        (
            ValueError,
            "logits of transitions",
            lambda: js.VaryingHMM(hmm.emission).chain(bare, (jnp.ones((5, 3)), jnp.ones((5, 3, 3)))),
        ),
        (
            ValueError,
            "of its function",
            lambda: js.HMM(js.FunctionEmission(3, wrong, locations)).chain(mine.init(key), jnp.ones((5, 2))),
        ),
        (
            TypeError,
            "how to draw",
            lambda: mine.simulate(key, mine.init(key), 3),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
