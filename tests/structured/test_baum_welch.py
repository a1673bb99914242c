"""Fits of hidden Markov models equal an expectation maximisation that enumerates paths, and counting."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxseq as js
from tests.structured.paths import documents
from tests.structured.test_hmm import EMISSIONS, STATES, laplace, locations, log_likelihoods, random_params, random_xs

pytestmark = pytest.mark.usefixtures("float64")
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
RESET = np.array([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)


def expected_counts(emission, params, xs):
    """First states, transitions, states at each step, and the log-likelihood, from all paths of each document."""
    prior, moves = scipy.special.softmax(params.prior), scipy.special.softmax(params.transition, axis=-1)
    first, pairs, each, total = np.zeros(STATES), np.zeros((STATES, STATES)), np.zeros((*xs.shape[:2], STATES)), 0.0
    for row in range(len(xs)):
        for steps in documents(MASK[row], RESET[row]):
            seen = np.exp([log_likelihoods(emission, params.emission, xs[row, t]) for t in steps])
            paths = list(itertools.product(range(STATES), repeat=len(steps)))
            moved = [np.prod([moves[pair] for pair in itertools.pairwise(path)]) for path in paths]
            seen_along = [seen[range(len(path)), path].prod() for path in paths]
            shares = prior[[path[0] for path in paths]] * moved * seen_along
            total += np.log(shares.sum())
            for path, share in zip(paths, shares / shares.sum(), strict=True):
                first[path[0]] += share
                np.add.at(pairs, (path[:-1], path[1:]), share)
                each[row, steps, path] += share
    return first, pairs, each, total


def best_fit(emission, old, xs, each):
    """The weighted best fit of one emission, state by state in NumPy."""
    xs, weights = xs.reshape(-1, *xs.shape[2:]), each.reshape(-1, STATES)
    if emission.input_rank == 0:
        counts = np.array([[w[xs == v].sum() for v in range(emission.vocab_size)] for w in weights.T])
        with np.errstate(divide="ignore"):  # a token that is never seen
            return js.CategoricalParams(np.log(counts / counts.sum(axis=-1, keepdims=True)))
    if isinstance(emission, js.FullGaussianEmission):
        whole = ~np.isnan(xs).any(axis=-1)
        mean = np.array([np.average(xs[whole], axis=0, weights=w[whole]) for w in weights.T])
        lower = [np.linalg.cholesky(np.cov(xs[whole].T, aweights=w[whole], ddof=0)) for w in weights.T]
        return js.FullGaussianParams(mean, np.array([np.tril(f, -1) + np.diag(np.log(np.diag(f))) for f in lower]))
    mean, variance = np.zeros((2, STATES, xs.shape[-1]))
    for state, feature in np.ndindex(mean.shape):
        seen = ~np.isnan(xs[:, feature])
        x, w = xs[seen, feature], weights[seen, state]
        mean[state, feature] = np.average(x, weights=w)
        variance[state, feature] = np.average((x - mean[state, feature]) ** 2, weights=w)
    if isinstance(emission, js.PoissonEmission):
        return js.PoissonParams(np.log(mean))
    return js.GaussianParams(mean, 0.5 * np.log(variance))


@pytest.mark.parametrize("name", EMISSIONS)
def test_updates_are_those_of_enumeration(name):
    """Ragged rows, gaps, resets, missing observations."""
    emission = EMISSIONS[name]
    hmm = js.HMM(emission)
    params, xs = random_params(hmm), random_xs(emission, 7, MASK.shape, missing=0.15)
    fitted = js.baum_welch(hmm, params, xs, MASK, reset=RESET, steps=2, tolerance=None)
    trace = []
    for _ in range(2):
        first, pairs, each, total = expected_counts(emission, params, xs)
        trace.append(total)
        shares = pairs / pairs.sum(axis=-1, keepdims=True)
        params = js.HMMParams(np.log(first / first.sum()), np.log(shares), best_fit(emission, params, xs, each))
    found, expected = (jax.tree.map(np.asarray, tree) for tree in (fitted.params, params))
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.exp(a), np.exp(e), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fitted.trace[:2], trace, rtol=1e-9)


@pytest.mark.parametrize("name", EMISSIONS)
def test_two_hundred_updates_in_float32_never_fall(name):
    emission = EMISSIONS[name]
    hmm = js.HMM(emission)
    xs = random_xs(emission, 8, (6, 40), missing=0.1)
    xs = jnp.asarray(xs, None if emission.input_rank == 0 else jnp.float32)
    mask = js.length_mask(jnp.array([40, 0, 1, 30, 17, 40]), 40)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), hmm.spread(jax.random.key(1), xs, mask))
    fitted = js.baum_welch(hmm, params, xs, mask, steps=200, tolerance=None)
    trace = np.asarray(fitted.trace, float)
    assert fitted.trace.dtype == jnp.float32 and fitted.iterations == 200 and not fitted.converged
    assert np.isfinite(trace).all() and trace[-1] > trace[0] + 1
    assert (np.diff(trace) > -1e-5 * np.abs(trace).max()).all()
    for leaf in jax.tree.leaves(fitted.params):
        assert not np.isnan(leaf).any() and leaf.dtype == jnp.float32


@pytest.mark.slow
def test_restarts_find_the_model():
    hmm = js.HMM(js.GaussianEmission(3, 1))
    moves = np.array([[0.8, 0.2, 0.0], [0.0, 0.8, 0.2], [0.2, 0.0, 0.8]])
    truth = js.HMMParams(
        np.zeros(3), np.log(moves + 1e-9), js.GaussianParams(np.array([[-4.0], [0.0], [4.0]]), np.zeros((3, 1)))
    )
    _, xs = hmm.simulate(jax.random.key(0), truth, 100, (10,))
    fitted = js.baum_welch_restarts(hmm, jax.random.key(1), xs, restarts=6, steps=60)
    keys = jax.random.split(jax.random.key(1), 6)
    each = jax.vmap(lambda key: js.baum_welch(hmm, hmm.spread(key, xs), xs, steps=60).trace[-1])(keys)
    np.testing.assert_allclose(fitted.trace[-1], each.max(), rtol=1e-10)
    order = np.argsort(fitted.params.emission.mean.ravel())
    np.testing.assert_allclose(fitted.params.emission.mean.ravel()[order], [-4, 0, 4], atol=0.2)
    np.testing.assert_allclose(np.exp(fitted.params.transition)[order][:, order], moves, atol=0.06)
    assert fitted.converged and fitted.iterations < 60
    np.testing.assert_array_equal(fitted.trace[fitted.iterations :], fitted.trace[-1])
    chain = hmm.chain(fitted.params, xs)
    np.testing.assert_allclose(js.chains.log_partition(chain).sum(), fitted.trace[-1], rtol=1e-10)


def test_smoothing_is_a_prior_and_what_is_forbidden_stays_so():
    hmm = js.HMM(js.CategoricalEmission(2, 3))
    params = js.HMMParams(
        np.array([0.0, -np.inf]), np.array([[0.0, 0.5], [-np.inf, 0.0]]), js.CategoricalParams(np.eye(2, 3))
    )
    xs = np.array([[0, 1, 0, 1], [0, 0, 0, 1]])
    fitted = js.baum_welch(hmm, params, xs, smoothing=0.5, steps=40, tolerance=None)
    assert (np.diff(fitted.trace) > -1e-10).all()
    np.testing.assert_array_equal(fitted.params.prior, [0, -np.inf])
    np.testing.assert_array_equal(fitted.params.transition[1], [-np.inf, 0])
    assert (np.exp(fitted.params.emission.logits[:, 2]) > 0.01).all()  # a token that is never seen
    exact = js.chains.log_partition(hmm.chain(fitted.params, xs)).sum() + 0.5 * (
        fitted.params.transition[0].sum() + fitted.params.emission.logits.sum()
    )
    np.testing.assert_allclose(fitted.trace[-1], exact, rtol=1e-10)


@pytest.mark.slow
def test_states_without_observations_keep_their_params_and_variances_their_floor():
    for kind in (js.GaussianEmission, js.FullGaussianEmission):
        hmm = js.HMM(kind(2, 2, least_variance=0.01))
        params = random_params(hmm)._replace(prior=np.array([0.0, -np.inf]))
        params = params._replace(transition=np.array([[0.0, -np.inf], [0.0, 0.0]]))
        xs = np.ones((3, 4, 2))  # all alike
        found = js.baum_welch(hmm, params, xs, steps=3, tolerance=None).params
        np.testing.assert_array_equal(found.transition, [[0.0, -np.inf], [0.0, 0.0]])
        for old, new in zip(params.emission, found.emission, strict=True):
            np.testing.assert_array_equal(old[1], new[1])
        np.testing.assert_allclose(found.emission.mean[0], 1)
        scale = found.emission.log_scale[0] if kind is js.GaussianEmission else np.diag(found.emission.factor[0])
        np.testing.assert_allclose(np.exp(2 * scale), 0.01, rtol=1e-6)
    nothing = js.baum_welch(hmm, params, xs, np.zeros((3, 4), bool), steps=2)
    jax.tree.map(np.testing.assert_array_equal, nothing.params, params)
    jax.tree.map(np.testing.assert_array_equal, js.baum_welch(hmm, params, xs[:, :0], steps=2).params, params)
    lost = js.baum_welch(hmm, params, np.full((3, 4, 2), np.nan), steps=2)
    assert lost.trace[-1] == 0 and all(not np.isnan(leaf).any() for leaf in jax.tree.leaves(lost.params))
    spread = hmm.spread(jax.random.key(0), np.full((3, 4, 2), np.nan))
    assert all(not np.isnan(leaf).any() for leaf in jax.tree.leaves(spread))


@pytest.mark.parametrize("name", ["gaussian", "full", "poisson"])
def test_what_the_padding_holds_has_no_effect(name):
    hmm = js.HMM(EMISSIONS[name])
    params, xs = random_params(hmm), random_xs(hmm.emission, 2, MASK.shape)
    fits = []
    for junk in (0.0, np.nan, 1e300, np.inf):
        spoilt = np.where(MASK[..., None], xs, junk)
        labelled = js.fit_labelled(hmm, params, spoilt, np.ones(MASK.shape, int), MASK)
        fits.append(
            (js.baum_welch(hmm, params, spoilt, MASK, steps=2), labelled, hmm.spread(jax.random.key(0), spoilt, MASK))
        )
    for other in fits[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, fits[0])


@pytest.mark.parametrize("name", ["categorical", "gaussian", "full"])
def test_batches_stay_sharded(name):
    """Over rows that are on two devices by their type, fits equal those on one."""
    hmm = js.HMM(EMISSIONS[name])
    params, xs = random_params(hmm), jnp.asarray(random_xs(hmm.emission, 4, MASK.shape))
    states = jnp.asarray(np.random.default_rng(0).integers(0, STATES, MASK.shape))

    @jax.jit
    def run(xs, states, mask, reset):
        fitted = js.baum_welch(hmm, params, xs, mask, reset=reset, steps=2, tolerance=None)
        labelled = js.fit_labelled(hmm, params, xs, states, mask, reset=reset)
        return fitted, labelled, hmm.spread(jax.random.key(0), xs, mask)

    given = (xs, states, jnp.asarray(MASK), jnp.asarray(RESET))
    expected = run(*given)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        xs, states, *flags = (jax.sharding.reshard(leaf, jax.sharding.PartitionSpec("rows")) for leaf in given)
        found = run(xs, states, *flags)
        with pytest.raises(ValueError, match=rf"state {STATES} at \(0, 0\)"):
            js.fit_labelled(hmm, params, xs, jnp.full_like(states, STATES), flags[0])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, jax.tree.map(np.asarray, found), expected)


def test_padded_rows_are_fitted_as_packed_ones():
    """Of random lengths, 0 and 1 among them; the packed row has a reset before each."""
    hmm = js.HMM(js.GaussianEmission(STATES, 2))
    params, random = random_params(hmm), np.random.default_rng(0)
    for _ in range(3):
        lengths = random.permutation([0, 1, *random.integers(0, 7, 3)])
        mask = np.arange(6) < lengths[:, None]
        xs = np.where(mask[..., None], random.normal(size=(5, 6, 2)), np.nan)
        packed, begins, keep = np.full((1, 30, 2), np.inf), np.zeros((1, 30), bool), np.arange(30)[None] < mask.sum()
        packed[keep] = xs[mask]
        begins[0, np.cumsum(lengths)[lengths > 0] - lengths[lengths > 0]] = True
        found = js.baum_welch(hmm, params, xs, mask, steps=2, tolerance=None)
        expected = js.baum_welch(hmm, params, packed, keep, reset=begins, steps=2, tolerance=None)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10), found, expected)


def test_ten_thousand_steps_in_float32():
    """Filter and update equal the scaled recursions in float64 (Rabiner, 1989)."""
    hmm, time = js.HMM(js.CategoricalEmission(STATES, 4)), 10_000
    params, xs = random_params(hmm), random_xs(hmm.emission, 0, (time,), missing=0)
    prior, moves = scipy.special.softmax(params.prior), scipy.special.softmax(params.transition, axis=-1)
    seen = scipy.special.softmax(params.emission.logits, axis=-1)[:, xs].T
    forward, backward, scale = np.zeros((time, STATES)), np.ones((time, STATES)), np.zeros(time)
    for t in range(time):
        here = (forward[t - 1] @ moves if t else prior) * seen[t]
        scale[t], forward[t] = here.sum(), here / here.sum()
    for t in reversed(range(time - 1)):
        backward[t] = moves @ (seen[t + 1] * backward[t + 1]) / scale[t + 1]
    pairs = np.einsum("ti,ij,tj->ij", forward[:-1], moves, (seen * backward / scale[:, None])[1:])
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    filtered = hmm.unroll(narrow, xs)[1]
    np.testing.assert_allclose(np.exp(filtered.log_probs), forward, atol=1e-5)
    np.testing.assert_allclose(filtered.log_likelihood, np.log(scale), atol=1e-5)
    fitted = js.baum_welch(hmm, narrow, xs, steps=1, tolerance=None)
    assert fitted.trace.dtype == jnp.float32
    np.testing.assert_allclose(fitted.trace[0], np.log(scale).sum(), rtol=1e-5)
    np.testing.assert_allclose(np.exp(fitted.params.transition), pairs / pairs.sum(axis=-1, keepdims=True), rtol=1e-3)


def test_counts_that_are_integers():
    hmm = js.HMM(js.PoissonEmission(2, 1))
    xs = jnp.array([[3, 300], [2, 257]])[..., None]
    spread = [jax.jit(hmm.spread)(jax.random.key(0), given) for given in (xs, xs.astype(float))]
    jax.tree.map(np.testing.assert_array_equal, *spread)
    best = [hmm.emission.maximize(spread[1].emission, given, jnp.ones((2, 2, 2))) for given in (xs, xs.astype(float))]
    jax.tree.map(np.testing.assert_array_equal, *best)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), spread[1])
    exact = hmm.chain(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow), xs.astype(jnp.float32))
    np.testing.assert_allclose(hmm.chain(narrow, xs).emission, exact.emission, rtol=1e-6)


@pytest.mark.parametrize("name", EMISSIONS)
def test_states_that_are_none_are_found_or_spoil_the_params(name):
    hmm = js.HMM(EMISSIONS[name])
    params, xs = random_params(hmm), random_xs(hmm.emission, 0, MASK.shape)
    for state in (-1, STATES):
        states = np.zeros(MASK.shape, int)
        states[1, 2] = state  # off the mask
        fitted = js.fit_labelled(hmm, params, xs, states, MASK)
        assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(fitted))
        states[1, 3] = state
        with pytest.raises(ValueError, match=rf"state {state} at \(1, 3\); the model has 3 states"):
            js.fit_labelled(hmm, params, xs, states, MASK)
    traced = jax.jit(lambda states: js.fit_labelled(hmm, params, xs, states, MASK))(states)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(traced))


def test_what_is_lost_is_named_and_ends_the_fit():
    hmm = js.HMM(js.CategoricalEmission(2, 3))
    params = hmm.init(jax.random.key(0))
    params = params._replace(emission=js.CategoricalParams(params.emission.logits.at[:, 2].set(-jnp.inf)))
    tokens = jnp.zeros(MASK.shape, int)
    impossible, none = tokens.at[3, 0].set(2), tokens.at[1, 3].set(3)
    cases = [
        (r"at \(3, 0\) whose log-likelihood is -inf", lambda: js.baum_welch(hmm, params, impossible, MASK)),
        (r"at \(1, 3\) whose log-likelihood is nan", lambda: js.baum_welch(hmm, params, none, MASK)),
        (r"vocabulary, at \(1, 3\)", lambda: js.fit_labelled(hmm, params, none, tokens, MASK)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    traced = jax.jit(lambda xs: js.baum_welch(hmm, params, xs, MASK))(impossible)
    assert traced.iterations == 0 and not traced.converged and np.isneginf(traced.trace).all()
    nothing = js.baum_welch(hmm, params, tokens, np.zeros_like(MASK))
    assert nothing.converged and nothing.iterations == 1 and nothing.trace[-1] == 0


@pytest.mark.slow
def test_restarts_name_what_is_lost():
    hmm, xs = js.HMM(js.GaussianEmission(2, 1)), jnp.zeros((4, 4, 1)).at[2, 1].set(jnp.inf)
    with pytest.raises(ValueError, match=r"restarts got an observation at \(2, 1\)"):
        js.baum_welch_restarts(hmm, jax.random.key(0), xs, restarts=2)


def test_transitions_out_of_the_last_step_are_not_read():
    hmm = js.VaryingHMM(EMISSIONS["gaussian"])
    params, xs = hmm.init(jax.random.key(0)), random_xs(hmm.emission, 1, MASK.shape)
    moves = np.zeros((*MASK.shape, STATES, STATES))
    spoilt = moves.copy()
    spoilt[[0, 1, 1, 2, 3], [3, 3, 2, 0, 0]] = np.nan
    fits = [js.baum_welch(hmm, params, (xs, given), MASK, steps=2, tolerance=None) for given in (moves, spoilt)]
    jax.tree.map(np.testing.assert_array_equal, *fits)


def test_given_transitions_are_not_fitted():
    emission = EMISSIONS["gaussian"]
    params, xs = random_params(js.HMM(emission)), random_xs(emission, 1, (2, 6))
    same = np.broadcast_to(np.zeros((STATES, STATES)), (2, 6, STATES, STATES))
    varying = js.baum_welch(js.VaryingHMM(emission), params._replace(transition=None), (xs, same), steps=1)
    plain = js.baum_welch(js.HMM(emission), params._replace(transition=same[0, 0]), xs, steps=1)
    assert varying.params.transition is None
    for part in ("prior", "emission"):
        a, b = getattr(varying.params, part), getattr(plain.params, part)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), a, b)
    states = np.arange(12).reshape(2, 6) % STATES
    bare = params._replace(transition=None)
    labelled = js.fit_labelled(js.VaryingHMM(emission), bare, (xs, same), states)
    known = js.fit_labelled(js.HMM(emission), params, xs, states)
    jax.tree.map(np.testing.assert_array_equal, labelled, known._replace(transition=None))


def test_labelled_paths_are_counted():
    hmm = js.HMM(js.CategoricalEmission(STATES, 4))
    random, params = np.random.default_rng(0), random_params(hmm)
    states, xs = random.integers(0, 2, MASK.shape), random_xs(hmm.emission, 0, MASK.shape)
    found = js.fit_labelled(hmm, params, xs, states, MASK, reset=RESET, smoothing=0.5)
    first, pairs, tokens = np.full(STATES, 0.5), np.full((STATES, STATES), 0.5), np.full((STATES, 4), 0.5)
    for row in range(len(xs)):
        for steps in documents(MASK[row], RESET[row]):
            first[states[row, steps[0]]] += 1
            np.add.at(pairs, (states[row, steps[:-1]], states[row, steps[1:]]), 1)
            for t in steps:
                if xs[row, t] >= 0:
                    tokens[states[row, t], xs[row, t]] += 1
    expected = js.HMMParams(first, pairs, js.CategoricalParams(tokens))
    expected = jax.tree.map(lambda counts: counts / counts.sum(axis=-1, keepdims=True), expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), jax.tree.map(np.exp, found), expected)
    bare = js.fit_labelled(hmm, params, xs, states, MASK, reset=RESET)
    np.testing.assert_array_equal(bare.emission.logits[2], params.emission.logits[2])  # a state that is not there
    np.testing.assert_array_equal(bare.transition[2], params.transition[2])


def test_labelled_vectors():
    emission = js.FullGaussianEmission(2, 2)
    hmm, random = js.HMM(emission), np.random.default_rng(0)
    xs, states = random.normal(size=(50, 2)), np.arange(50) % 2
    found = js.fit_labelled(hmm, hmm.init(jax.random.key(0)), xs, states).emission
    lower = emission.cholesky(found)
    for state in range(2):
        np.testing.assert_allclose(found.mean[state], xs[states == state].mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(lower[state] @ lower[state].T, np.cov(xs[states == state].T, ddof=0), rtol=1e-8)


def test_errors():
    hmm = js.HMM(js.FunctionEmission(STATES, laplace, locations, input_size=2))
    params, xs = hmm.init(jax.random.key(0)), np.zeros((3, 2))
    tokens = js.HMM(js.CategoricalEmission(2, 3))
    token_params, ids = tokens.init(jax.random.key(0)), np.zeros((2, 4), int)
    other = js.HMM(js.CategoricalEmission(2, 4)).init(jax.random.key(0))
    cases = [
        (ValueError, "params of another layer", lambda: js.baum_welch(tokens, other, ids)),
        (ValueError, "params of another layer", lambda: js.fit_labelled(tokens, other, ids, ids)),
        (TypeError, r"such as hmm.init\(key\)", lambda: js.baum_welch(tokens, jax.random.key(0), ids)),
        (TypeError, r"such as hmm.init\(key\)", lambda: js.fit_labelled(tokens, jax.random.key(0), ids, ids)),
        (ValueError, "mask of shape", lambda: js.baum_welch(tokens, token_params, ids, np.ones((4, 2), bool))),
        (ValueError, "jaxseq.pad", lambda: js.baum_welch(tokens, token_params, [ids[0], ids[1, :3]])),
        (ValueError, "smoothing >= 0", lambda: js.fit_labelled(tokens, token_params, ids, ids, smoothing=-1)),
        (ValueError, "smoothing >= 0", lambda: js.baum_welch(tokens, token_params, ids, smoothing=jnp.array(-1.0))),
        (TypeError, "fit it by gradients", lambda: js.baum_welch(hmm, params, xs)),
        (ValueError, "steps >= 0", lambda: js.baum_welch(hmm, params, xs, steps=-1)),
        (ValueError, "smoothing >= 0", lambda: js.baum_welch(hmm, params, xs, smoothing=-1.0)),
        (ValueError, "restarts >= 1", lambda: js.baum_welch_restarts(hmm, jax.random.key(0), xs, restarts=0)),
        (TypeError, "needs one key", lambda: js.baum_welch_restarts(hmm, 0, xs)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
