"""Dynamic programs over chains equal the enumeration of all paths."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies
from jax.test_util import check_grads

from jaxseq.structured import chains, semirings
from tests.structured.paths import FORMS, TIME, all_paths, check, documents, flags, poisoned, random_chain, row

pytestmark = pytest.mark.usefixtures("float64")
PARALLEL = pytest.mark.parametrize("parallel", [False, True], ids=["loop", "tree"])
KEY = jax.random.key(0)
SEEDS = strategies.integers(0, 2**31)


@functools.cache
def program(parallel):
    """Everything a chain can be asked, compiled once per shape."""

    def run(chain, mask, reset, key):
        options = {"mask": mask, "reset": reset, "parallel": parallel}
        ones = jax.tree.map(jnp.ones_like, chain)
        return {
            "log_partition": chains.log_partition(chain, **options),
            "count": chains.total(semirings.COUNT, chain, **options),
            "max": chains.total(semirings.MAX, chain, **options),
            "marginals": chains.marginals(chain, **options),
            "pairs": chains.pair_marginals(chain, **options),
            "gradient": jax.grad(lambda chain: chains.log_partition(chain, **options).sum())(chain),
            "length": chains.expectation(chain, ones, **options),
            "entropy": chains.entropy(chain, **options),
            "best": chains.best_path(chain, **options),
            "three": chains.best_paths(chain, 3, **options),
            "sample": chains.sample_path(key, chain, **options),
        }

    return jax.jit(run)


def enumerated(chain, index, mask, reset):
    """Of one row: for each document its steps, paths and scores."""
    potentials = row(chain, index)
    for steps in documents(mask[index], reset[index]):
        paths, scores = zip(*all_paths(potentials, steps), strict=True)
        yield steps, np.array(paths), np.array(scores)


@PARALLEL
@pytest.mark.parametrize("form", FORMS)
def test_everything_equals_enumeration(form, parallel):
    @check(SEEDS, flags(), flags())
    def examples(seed, mask, reset):
        compare_rows(random_chain(seed, form), mask, reset, seed, parallel)

    examples()


def compare_rows(chain, mask, reset, seed, parallel):
    given = poisoned(chain, mask, reset)
    found = jax.tree.map(np.asarray, program(parallel)(given, mask, reset, jax.random.key(seed)))
    three, gradient = found.pop("three"), found.pop("gradient")
    for index in np.ndindex(*mask.shape[:-1]):
        docs = list(enumerated(chain, index, mask, reset))
        compare(docs, jax.tree.map(operator.itemgetter(index), found))
        best_three(docs, jax.tree.map(operator.itemgetter((slice(None), *index)), three))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(gradient.emission, found["marginals"], atol=1e-12)


def compare(docs, found):
    scores = [scores for _, _, scores in docs]
    log_z = sum(map(scipy.special.logsumexp, scores))
    np.testing.assert_allclose(found["log_partition"], log_z, rtol=1e-12, atol=1e-12)
    assert found["count"] == np.prod([np.isfinite(s).sum() for s in scores])
    best = sum(s.max() for s in scores)
    np.testing.assert_allclose([found["max"], found["best"].score], best, rtol=1e-12)
    if not np.isfinite(log_z):
        assert not found["marginals"][[t for steps, _, s in docs if not np.isfinite(s.max()) for t in steps]].any()
        assert found["sample"].score == -np.inf
        return
    marginals, pairs = np.zeros_like(found["marginals"]), np.zeros((len(found["marginals"]), 3, 3))
    length = entropy = best_score = sample_score = 0
    for steps, paths, scores in docs:
        probability = scipy.special.softmax(scores)
        length += 2 * len(steps) + 1
        entropy += scipy.special.entr(probability).sum()
        best_score += scores[(paths == found["best"].states[steps]).all(axis=-1)].item()
        sample_score += scores[(paths == found["sample"].states[steps]).all(axis=-1)].item()
        for path, p in zip(paths, probability, strict=True):
            marginals[steps, path] += p
            pairs[steps[:-1], path[:-1], path[1:]] += p
    np.testing.assert_allclose(found["marginals"], marginals, atol=1e-12)
    np.testing.assert_allclose(found["length"], length, atol=1e-10)
    np.testing.assert_allclose(found["entropy"], entropy, atol=1e-10)
    np.testing.assert_allclose([best_score, sample_score], [best, found["sample"].score], rtol=1e-12)
    if isinstance(found["pairs"], chains.Band):
        moves = found["pairs"].weights.shape[-2]
        pairs = np.stack([np.pad(pairs.diagonal(k, 1, 2), ((0, 0), (k, 0))) for k in range(moves)], axis=-2)
        np.testing.assert_allclose(found["pairs"].weights, pairs, atol=1e-12)
    else:
        np.testing.assert_allclose(found["pairs"], pairs, atol=1e-12)


def best_three(docs, found):
    if not docs:
        assert found.score.tolist() == [0, -np.inf, -np.inf]
        return
    expected = sum(np.sort(np.append(scores, [-np.inf] * 3))[::-1][:3] for _, _, scores in docs)
    np.testing.assert_allclose(found.score, expected, rtol=1e-12)
    for rank in np.flatnonzero(np.isfinite(expected)):
        own = [scores[(paths == found.states[rank, steps]).all(axis=-1)].item() for steps, paths, scores in docs]
        np.testing.assert_allclose(sum(own), expected[rank], rtol=1e-12)
    if len(docs) == 1:  # of several, a document with fewer paths may repeat one
        chosen = found.states[np.isfinite(expected)][:, docs[0][0]]
        assert len({tuple(path) for path in chosen.tolist()}) == len(chosen)


@PARALLEL
@pytest.mark.parametrize("time", [0, 1])
@pytest.mark.parametrize(("form", "batch"), [("constant", ()), ("varying band", (2, 1))])
def test_short_chains(form, batch, time, parallel):
    @check(SEEDS, flags(time, batch), flags(time, batch))
    def examples(seed, mask, reset):
        compare_rows(random_chain(seed, form, batch, time), mask, reset, seed, parallel)

    examples()


@PARALLEL
def test_of_equal_paths_that_with_smaller_states_at_the_end(parallel):
    @check(SEEDS, flags(), flags())
    def examples(seed, mask, reset):
        chain = jax.tree.map(np.round, random_chain(seed))
        found = jax.tree.map(np.asarray, program(parallel)(chain, mask, reset, jax.random.key(0)))
        for index in range(2):
            for steps, paths, scores in enumerated(chain, index, mask, reset):
                if np.isfinite(found["best"].score[index]):
                    best = min(paths[scores == scores.max()].tolist(), key=lambda path: path[::-1])
                    assert found["best"].states[index, steps].tolist() == best
                    assert found["three"].states[0, index, steps].tolist() == best

    examples()


@pytest.mark.parametrize(
    "ask",
    [chains.best_path, lambda chain: chains.best_paths(chain, 2), functools.partial(chains.sample_path, KEY)],
    ids=["best", "two", "sample"],
)
def test_asking_again_compiles_nothing(ask, caplog):
    chain = random_chain(0, batch=(3,))
    with jax.log_compiles():
        ask(chain)
        assert caplog.records
        caplog.clear()
        ask(chain)
    assert not caplog.records


@PARALLEL
def test_samples_have_the_probabilities_of_paths(parallel):
    chain = random_chain(3, batch=(), time=3)
    mask = np.array([True, False, True])
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: chains.sample_path(key, chain, mask, parallel=parallel).states))
    found = np.bincount(np.asarray(draw(keys)) @ [3, 0, 1], minlength=9) / len(keys)
    start, transition, emission, end = chain
    scores = (start + emission[0])[:, None] + transition + (emission[2] + end)
    expected = scipy.special.softmax(scores).ravel()
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=0.015)  # four standard deviations of a frequency


@pytest.mark.parametrize(
    ("form", "parallel", "order"), [("constant", False, 2), ("varying band", False, 1), ("constant", True, 1)]
)
def test_derivatives_are_finite_differences(form, parallel, order):
    chain = random_chain(5, form, impossible=0)
    mask, reset = np.array([[1, 0, 1, 1], [1, 1, 1, 0]], bool), np.array([[0, 0, 1, 0], [0, 0, 0, 0]], bool)
    program = jax.jit(functools.partial(chains.log_partition, parallel=parallel))
    check_grads(lambda chain: program(chain, mask, reset=reset), (chain,), order)


@pytest.mark.parametrize(("banded", "parallel"), [(True, False), (False, True), (True, True)])
def test_second_derivatives_equal_those_of_enumeration(banded, parallel):
    start, weights, emission, end = random_chain(6, "band", (), states=2, impossible=0)
    mask, reset = np.array([True, False, True, True]), np.array([False, False, False, False])

    def enumerated(start, weights, emission, end):
        (stay, rise) = weights
        transition = jnp.array([[stay[0], rise[1]], [-jnp.inf, stay[1]]]) if banded else weights
        (steps,) = documents(mask, reset)
        potentials = start, jnp.broadcast_to(transition, (TIME, 2, 2)), emission, end
        return jax.nn.logsumexp(jnp.stack([score for _, score in all_paths(potentials, steps)]))

    def ours(start, weights, emission, end):
        transition = chains.Band(weights) if banded else weights
        return chains.log_partition(chains.Chain(start, transition, emission, end), mask, parallel=parallel)

    given = (start, weights.weights, emission, end)
    found, wanted = (jax.jit(jax.hessian(function, argnums=(0, 1, 2, 3)))(*given) for function in (ours, enumerated))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), found, wanted)


@pytest.mark.parametrize("parallel", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["loop", "tree"])
def test_ten_thousand_steps_in_float32(parallel):
    """Factors a step down to 1e-20: float64, step by step, is the reference."""
    generator = np.random.default_rng(0)
    emission = generator.normal(size=(10_000, 2), scale=10) - 20
    chain = chains.Chain(np.zeros(2), np.log(generator.dirichlet(np.ones(2), 2)), emission)

    @functools.partial(jax.jit, static_argnums=0)
    def run(parallel, chain):
        def log_partition(emission):
            return chains.log_partition(chain._replace(emission=emission), parallel=parallel)

        return jax.value_and_grad(log_partition)(chain.emission)

    exact, found = run(False, chain), run(parallel, jax.tree.map(lambda leaf: leaf.astype(np.float32), chain))
    assert found[0].dtype == jnp.float32
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], exact[1], atol=2e-5)


def long_chain(banded):
    """Ten thousand steps in float32, far from 0, with impossible transitions and states; state 2 is always possible."""
    generator = np.random.default_rng(1)
    emission = generator.normal(size=(10_000, 3)) - 1000
    emission[:, :2] = np.where(generator.uniform(size=(10_000, 2)) < 0.1, -np.inf, emission[:, :2])
    transition = generator.normal(size=(2 if banded else 3, 3)) - 10
    transition[0, 1] = -np.inf
    chain = chains.Chain(np.zeros(3), chains.Band(transition) if banded else transition, emission, np.zeros(3))
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), chain)


def in_numpy(chain):
    """The log-partition, the entropy, how often state 1 is taken, and the scores of the three best paths."""
    start, transition, emission, end = row(jax.tree.map(lambda leaf: leaf.astype(float), chain), ())
    forward, backward, best = [start + emission[0]], [end], (start + emission[0])[:, None]
    for here, moves in zip(emission[1:], transition, strict=False):
        forward.append(here + np.logaddexp.reduce(forward[-1][:, None] + moves, axis=0))
        joined = (best[:, None, :] + moves[..., None]).swapaxes(1, 2).reshape(-1, 3)
        best = here[:, None] + np.sort(joined, axis=0)[::-1][:3].T
    for here, moves in zip(emission[:0:-1], transition[-2::-1], strict=True):
        backward.append(np.logaddexp.reduce(moves + here + backward[-1], axis=1))
    forward, backward = np.stack(forward), np.stack(backward[::-1])
    log_z = np.logaddexp.reduce(forward[-1] + end)
    states = np.exp(forward + backward - log_z)
    pairs = np.exp(forward[:-1, :, None] + transition[:-1] + (emission[1:] + backward[1:])[:, None] - log_z)

    def mean(probability, scores):
        return (probability * np.where(probability > 0, scores, 0)).sum()

    entropy = log_z - mean(states, emission) - mean(pairs, transition[:-1]) - mean(states[0], start)
    return {"log_z": log_z, "entropy": entropy, "often": states[:, 1].sum(), "three": np.sort(best, axis=None)[:-4:-1]}


@pytest.mark.parametrize(
    ("banded", "parallel"), [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
def test_what_is_asked_of_ten_thousand_steps_in_float32(banded, parallel):
    @jax.jit
    def run(chain):
        nothing = jax.tree.map(jnp.zeros_like, chain)
        often = nothing._replace(emission=nothing.emission.at[:, 1].set(1))
        return {
            "log_z": chains.log_partition(chain, parallel=parallel),
            "entropy": chains.entropy(chain, parallel=parallel),
            "often": chains.expectation(chain, often, parallel=parallel),
            "three": chains.best_paths(chain, 3, parallel=parallel).score,
        }

    chain = long_chain(banded)
    found, wanted = run(chain), in_numpy(chain)
    assert all(leaf.dtype == jnp.float32 for leaf in found.values())
    for name, tolerance in {"log_z": 1e-6, "three": 1e-6, "entropy": 1e-4, "often": 1e-4}.items():
        np.testing.assert_allclose(found[name], wanted[name], rtol=tolerance, atol=1e-5 * 10_000)


@pytest.mark.parametrize(("parallel", "time"), [(False, 10_000), (True, 100)], ids=["loop", "tree"])
def test_more_paths_than_a_float_can_say(parallel, time):
    """They are inf, and 0 if none is possible; in logs they are counted as well."""
    long = long_chain(False)
    chain = jax.tree.map(
        lambda leaf: np.where(leaf > -np.inf, leaf.dtype.type(0), leaf), long._replace(emission=long.emission[:time])
    )
    counts = jax.jit(functools.partial(chains.total, semirings.COUNT, parallel=parallel))
    assert counts(chain) == np.inf
    reset = np.arange(time) == time - 1
    chain.emission[-1] = -np.inf
    assert counts(chain) == counts(chain, reset=reset) == 0  # of one document, and of two
    chain.emission[-1] = 0
    logs = jax.jit(functools.partial(chains.log_partition, parallel=parallel))
    np.testing.assert_allclose(logs(chain), in_numpy(chain)["log_z"], rtol=1e-6)


def test_the_best_of_long_paths_in_float32():
    chain = random_chain(4, batch=(), time=10_000, impossible=0)
    wide, narrow = (
        chains.best_path(given) for given in (chain, jax.tree.map(lambda leaf: leaf.astype(np.float32), chain))
    )
    np.testing.assert_allclose(narrow.score, wide.score, rtol=1e-6)
    assert (narrow.states == wide.states).mean() > 0.999


@PARALLEL
def test_half_precision_is_computed_in_float32(parallel):
    chain = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_chain(1))
    found = chains.log_partition(chain, parallel=parallel)
    assert found.dtype == jnp.float32
    exact = chains.log_partition(jax.tree.map(lambda leaf: leaf.astype(float), chain))
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_vmap_is_a_batch():
    chain = random_chain(2, "rows", batch=(3,))
    one_by_one = jax.vmap(chains.log_partition, in_axes=(chains.Chain(None, 0, 0, 0),))(chain)
    np.testing.assert_allclose(one_by_one, chains.log_partition(chain), rtol=1e-12)


def test_the_gradient_keeps_no_array_of_all_transitions():
    """Its memory is that of the states, `[time, batch, state]`."""
    chain = random_chain(0, time=50, states=7)
    text = jax.jit(jax.grad(lambda chain: chains.log_partition(chain).sum())).lower(chain).as_text()
    assert "50x2x7x" in text
    assert "50x2x7x7x" not in text


def says(message, function, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_errors():
    chain = random_chain(0)
    says(r"best_path needs a Chain\(start", chains.best_path, chain.emission, error=TypeError)
    for ask in (chains.marginals, chains.pair_marginals, chains.entropy, chains.log_partition):
        says(f"^{ask.__name__} needs a Chain", ask, chain.emission, error=TypeError)
        says(f"^{ask.__name__} needs start", ask, chain._replace(start=np.zeros(4)))
    says(r"needs emission \[\*batch, time, state\]", chains.marginals, chain._replace(emission=np.zeros(3)))
    says(r"needs start \[state\]", chains.entropy, chain._replace(start=np.zeros(4)))
    says(r"needs transition \[state, state\]", chains.log_partition, chain._replace(transition=np.zeros((4, 3))))
    empty = chain._replace(transition=chains.Band(np.zeros((0, 3))))
    says(r"needs transition \[moves, state\].*got shape \(0, 3\)", chains.log_partition, empty)
    says("floating log potentials", chains.log_partition, chain._replace(start=np.zeros(3, int)), error=TypeError)
    says("boolean mask", chains.log_partition, chain, np.ones((2, TIME)), error=TypeError)
    says("k >= 1", chains.best_paths, chain, 0)
    says("integer states", chains.path_score, chain, np.zeros((2, 3), int))
    says("parts of the chain", chains.expectation, chain, chain._replace(end=None))
    wrong = chain._replace(emission=np.zeros((2, TIME, 2)))
    says(r"values of the shapes of the chain: \(2, 4, 3\), not \(2, 4, 2\)", chains.expectation, chain, wrong)
    says("needs one key", chains.sample_path, 0, chain, error=TypeError)


def test_potentials_may_be_lists():
    chain = chains.Chain([0.0, 1.0], [[0.0, 0.5], [0.25, 0.0]], [[0.0, 0.0], [1.0, 0.0]])
    arrays = chains.Chain(*(None if part is None else np.array(part) for part in chain))
    for ask in (chains.log_partition, chains.marginals, chains.pair_marginals, chains.entropy):
        np.testing.assert_array_equal(ask(chain), ask(arrays))
    paths = chains.best_path(chain), chains.sample_path(KEY, chain)
    wanted = chains.best_path(arrays), chains.sample_path(KEY, arrays)
    jax.tree.map(np.testing.assert_array_equal, paths, wanted)


@PARALLEL
@pytest.mark.parametrize("form", ["constant", "varying", "band"])
def test_a_sharded_batch(form, parallel):
    """Rows on two devices, by their type or under `shard_map`, give what they give on one."""
    chain = jax.tree.map(jnp.asarray, random_chain(7, form, impossible=0))
    mask, reset = jnp.array([[1, 0, 1, 1], [1, 1, 1, 0]], bool), jnp.array([[0, 0, 1, 0], [0, 0, 0, 0]], bool)

    def run(chain, mask, reset):
        options = {"mask": mask, "reset": reset, "parallel": parallel}
        best = chains.best_path(chain, **options)
        return chains.log_partition(chain, **options), chains.pair_marginals(chain, **options), best

    expected = run(chain, mask, reset)
    rows = chain._replace(start=None, transition=chain.transition if form == "varying" else None)
    whole = chain._replace(emission=None, end=None, transition=None if form == "varying" else chain.transition)

    def joined(rows, whole):
        return chains.Chain(whole.start, *(b if a is None else a for a, b in zip(rows[1:], whole[1:], strict=True)))

    explicit = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        split, shared = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
        placed = [jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, split), part) for part in (rows, mask, reset)]
        found = run(
            joined(placed[0], jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, shared), whole)), *placed[1:]
        )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    jax.tree.map(close, found, expected)

    automatic = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda rows, whole, *flags: run(joined(rows, whole), *flags),
        mesh=automatic,
        in_specs=(split, shared, split, split),
        out_specs=split,
    )
    jax.tree.map(close, jax.jit(mapped)(rows, whole, mask, reset), expected)


def test_the_gradient_of_a_band_over_sharded_rows():
    chain = jax.tree.map(jnp.asarray, random_chain(8, "band", impossible=0))
    gradient = jax.grad(lambda chain: chains.log_partition(chain).sum())
    explicit = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        rows, shared = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
        parts = chains.Chain(shared, chains.Band(shared), rows, rows)
        found = gradient(jax.tree.map(jax.sharding.reshard, chain, parts))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), found, gradient(chain))
