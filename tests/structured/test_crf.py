"""The random field of a tagger equals the enumeration of all its paths, and what torch derives of its formula."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies
from jax.test_util import check_grads

from jaxseq import from_json, length_mask, to_json
from jaxseq.structured import chains
from jaxseq.structured.crf import CRF, CRFParams, Forbidden, forbidden
from tests.peers import peer
from tests.structured.paths import TIME, all_paths, check, documents, flags, lengths

pytestmark = pytest.mark.usefixtures("float64")
SEEDS = strategies.integers(0, 2**31)
RULES = Forbidden((2,), ((0, 2), (1, 1)), (0,))


def random_field(seed, time=TIME, batch=(2,)):
    """Params, scores, tags and allowed tags, of three states."""
    generator = np.random.default_rng(seed)
    params = CRFParams(generator.normal(size=3), generator.normal(size=(3, 3)), generator.normal(size=3))
    scores = generator.normal(size=(*batch, time, 3))
    scores[generator.uniform(size=scores.shape) < 0.1] = -np.inf
    tags = generator.integers(3, size=(*batch, time))
    allowed = (generator.uniform(size=scores.shape) < 0.5) | (tags[..., None] == np.arange(3))
    return params, scores, tags, allowed


def paths_of(params, scores, steps, rules=RULES):
    """Every path of one document, and its score; -inf where it is forbidden."""
    potentials = params.start, np.broadcast_to(params.transition, (len(scores), 3, 3)), scores, params.end
    for path, score in all_paths(potentials, steps):
        broken = (
            path[0] in rules.start or path[-1] in rules.end or set(itertools.pairwise(path)) & set(rules.transition)
        )
        yield path, -np.inf if broken else score


@jax.jit
def program(params, scores, tags, allowed, mask, reset):
    crf = CRF(3, forbidden=RULES)

    def of(loss, labels):
        def total(params, scores):
            losses = loss(params, scores, labels, mask, reset=reset)
            return losses.sum(), losses

        gradients, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(params, scores)
        return losses, gradients

    path = chains.best_path(crf.chain(params, scores), mask, reset=reset)
    return of(crf.loss, tags), of(crf.partial_loss, allowed), path


@check(SEEDS, lengths() | flags(), flags())
def test_losses_equal_enumeration(seed, mask, reset):
    params, scores, tags, allowed = random_field(seed)
    given = np.where(mask[..., None], scores, np.nan)
    found = program(params, given, np.where(mask, tags, -1), allowed, mask, reset)
    (whole, whole_gradient), (partial, partial_gradient), best = jax.tree.map(np.asarray, found)
    for index in range(2):
        expected = expected_partial = best_score = 0
        for steps in documents(mask[index], reset[index]):
            paths, log_weights = map(np.array, zip(*paths_of(params, scores[index], steps), strict=True))
            log_z = scipy.special.logsumexp(log_weights)
            among = allowed[index][steps, paths].all(axis=-1)
            its = (paths == tags[index, steps]).all(axis=-1)
            expected += surprise(log_z, log_weights[its])
            expected_partial += surprise(log_z, log_weights[among])
            best_score += log_weights.max()
        np.testing.assert_allclose(whole[index], expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(partial[index], expected_partial, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(best.score[index], best_score, rtol=1e-12)
        for loss, gradient in ((whole, whole_gradient), (partial, partial_gradient)):
            if np.isinf(loss[index]):
                assert not gradient[1][index].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((whole_gradient, partial_gradient)))
    assert not whole_gradient[0].start[2] and not whole_gradient[0].transition[1, 1]


def surprise(log_z, log_weights):
    score = scipy.special.logsumexp(log_weights)
    return np.inf if score == -np.inf else log_z - score


def test_torch_derives_the_same_of_the_formula():
    """The forward recurrence of Lafferty et al., section 3, written in torch."""
    torch = peer("torch")
    params, _, tags, _ = random_field(0, time=6, batch=(3,))
    scores = np.random.default_rng(1).normal(size=(3, 6, 3))
    lengths = np.array([6, 1, 4])
    start, transition, end, given = (torch.tensor(leaf, requires_grad=True) for leaf in (*params, scores))
    total = 0.0
    for row, length in enumerate(lengths):
        alpha, score, z = start + given[row, 0], start[tags[row, 0]] + given[row, 0, tags[row, 0]], tags[row]
        for t in range(1, length):
            alpha = torch.logsumexp(alpha[:, None] + transition, dim=0) + given[row, t]
            score = score + transition[z[t - 1], z[t]] + given[row, t, z[t]]
        total = total + torch.logsumexp(alpha + end, dim=0) - score - end[z[length - 1]]
    total.backward()
    mask = length_mask(lengths, 6)

    def loss(params, scores):
        return CRF(3).loss(params, scores, tags, mask).sum()

    value, (of_params, of_scores) = jax.value_and_grad(loss, argnums=(0, 1))(params, jnp.asarray(scores))
    np.testing.assert_allclose(value, total.item(), rtol=1e-12)
    for ours, theirs in zip((*of_params, of_scores), (start, transition, end, given), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (2, 1)])
def test_lengths_0_and_1(batch):
    crf = CRF(3)
    params, scores, tags, _ = random_field(4, time=1, batch=batch)
    scores = np.abs(scores)
    alone = params.start + scores[..., 0, :] + params.end
    chosen = np.take_along_axis(alone, tags, axis=-1)[..., 0]
    expected = np.where(np.isinf(chosen), np.inf, scipy.special.logsumexp(alone, axis=-1) - chosen)
    np.testing.assert_allclose(crf.loss(params, scores, tags), expected, rtol=1e-12)
    assert crf.loss(params, scores[..., :0, :], tags[..., :0]).tolist() == np.zeros(batch).tolist()
    nowhere = np.zeros((*batch, 1), bool)
    assert crf.partial_loss(params, scores, np.zeros(scores.shape, bool), nowhere).tolist() == np.zeros(batch).tolist()


def test_packed_documents_have_the_loss_of_separate_ones():
    params, _, tags, _ = random_field(3, time=7, batch=())
    crf, scores = CRF(3), np.random.default_rng(2).normal(size=(7, 3))
    reset = np.arange(7) == 3
    apart = crf.loss(params, scores[:3], tags[:3]) + crf.loss(params, scores[3:], tags[3:])
    for parallel in (False, True):
        np.testing.assert_allclose(crf.loss(params, scores, tags, reset=reset, parallel=parallel), apart, rtol=1e-12)


def test_small_losses_of_long_texts():
    """The scores sum up to 70,000, of which float32 keeps no digit of such a loss; float64 is the reference."""
    generator, time = np.random.default_rng(0), 4096
    tags = generator.integers(3, size=time)
    scores = generator.normal(size=(time, 3)) + 17 * (tags[:, None] == np.arange(3))
    params = CRFParams(generator.normal(size=3), generator.normal(size=(3, 3)), generator.normal(size=3))
    mask, reset = np.arange(time) % 100 != 50, np.arange(time) == 1000
    run = jax.jit(jax.value_and_grad(lambda *given: CRF(3).loss(*given, reset=reset), argnums=1))
    exact, wide = run(params, scores, tags, mask)
    given = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (params, scores))
    found, narrow = run(*given, tags, mask)
    assert found.dtype == jnp.float32 and 1e-4 < exact < 1e-2
    np.testing.assert_allclose(found, exact, rtol=0.03)
    np.testing.assert_allclose(narrow, wide, atol=1e-5)


def test_derivatives_and_dtypes():
    crf, (params, _, tags, _) = CRF(3, forbidden=Forbidden((2,), ((1, 1),))), random_field(6, time=3, batch=())
    scores, tags = np.random.default_rng(3).normal(size=(3, 3)), np.array([0, 2, 1])
    check_grads(lambda params, scores: crf.loss(params, scores, tags), (params, scores), order=2)
    half_params, half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (params, scores))
    loss, gradient = jax.value_and_grad(crf.loss)(half_params, half, tags)
    assert loss.dtype == jnp.float32 and gradient.start.dtype == jnp.bfloat16
    exact = crf.loss(*jax.tree.map(lambda leaf: leaf.astype(float), (half_params, half)), tags)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)


def extracted(tags):
    """Whether a sequence of tags marks whole entities, read by a grammar: entities B I*, or S, or B I* E, else O."""
    text = " ".join(tags) + " "
    kinds = {tag[2:] for tag in tags if tag != "O"}
    bio = "|".join(rf"B-{kind} (I-{kind} )*" for kind in kinds)
    bioes = "|".join(rf"S-{kind} |B-{kind} (I-{kind} )*E-{kind} " for kind in kinds)
    return {
        "BIO": bool(re.fullmatch(f"(O |{bio})*" if bio else "(O )*", text)),
        "BIOES": bool(re.fullmatch(f"(O |{bioes})*" if bioes else "(O )*", text)),
    }


@pytest.mark.parametrize(("scheme", "letters"), [("BIO", "BI"), ("BIOES", "BIES")])
def test_a_scheme_allows_what_its_grammar_does(scheme, letters):
    tags = ("O", *(f"{letter}-{kind}" for kind in "XY" for letter in letters))
    rules = forbidden(tags, scheme)
    for path in itertools.product(range(len(tags)), repeat=3):
        breaks = (
            path[0] in rules.start or path[-1] in rules.end or set(itertools.pairwise(path)) & set(rules.transition)
        )
        assert extracted([tags[state] for state in path])[scheme] != bool(breaks)


def test_the_other_names_of_schemes():
    tags = ("O", "B-X", "I-X", "E-X", "S-X", "B-Y")
    assert forbidden(tags[:3], "IOB2") == forbidden(tags[:3], "BIO")
    renamed = [tag.replace("E-", "L-").replace("S-", "U-") for tag in tags]
    assert forbidden(renamed, "BILOU") == forbidden(tags, "BIOES")
    assert forbidden(("O", "B", "I"), "BIO") == Forbidden((2,), ((0, 2),), ())


def test_a_field_is_a_value():
    crf = CRF(3, forbidden=Forbidden((2,), ((0, 2),)))
    assert from_json(to_json(crf)) == crf
    assert hash(crf) == hash(CRF(3, forbidden=((2,), [[0, 2]], ())))
    assert crf == CRF(3, forbidden=Forbidden((2, 2), ((0, 2), (0, 2))))
    assert crf == CRF(3, forbidden=Forbidden(tuple(np.array([2])), tuple(np.array([[0, 2]]))))
    several = CRF(3, forbidden=Forbidden((2, 0), ((1, 2), (0, 2)), (1, 0)))
    assert several == CRF(3, forbidden=Forbidden((0, 2), ((0, 2), (1, 2)), (0, 1)))
    assert all(not leaf.any() for leaf in jax.tree.leaves(crf.init(jax.random.key(0))))


def test_errors():
    crf = CRF(3)
    params = crf.init(jax.random.key(0))
    tags = np.zeros(4, int)
    for call, error, message in (
        (lambda: CRF(0), ValueError, "states >= 1, got 0"),
        (lambda: CRF(3, forbidden=Forbidden((3,))), ValueError, "with states below 3"),
        (lambda: CRF(3, forbidden=Forbidden((), (1,))), ValueError, "pairs of them"),
        (lambda: CRF(3, forbidden=Forbidden((1.0,))), ValueError, "with states below 3"),
        (lambda: crf.loss(params, np.zeros((4, 2)), tags), ValueError, "scores with 2 features"),
        (lambda: crf.loss(params, np.zeros((4, 3), np.float16), tags), TypeError, "scores of float16"),
        (lambda: crf.loss(params, np.zeros((4, 3)), tags[:3]), ValueError, "integer states"),
        (lambda: crf.loss(params, np.zeros((4, 3)), tags, np.ones(4)), TypeError, "boolean mask"),
        (lambda: crf.partial_loss(params, np.zeros((4, 3)), tags), ValueError, "boolean allowed"),
        (lambda: crf.loss(params, np.zeros((4, 3)), [0, 1, 3, 0]), ValueError, r"the tag 3 at \(2,\); there are 3"),
        (lambda: forbidden(("O", "X-PER"), "BIO"), ValueError, "'X-PER'"),
        (lambda: forbidden(("O",), "BOI"), ValueError, "knows the schemes BIO, IOB2"),
    ):
        with pytest.raises(error, match=message):
            call()
