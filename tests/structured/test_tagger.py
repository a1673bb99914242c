"""A tagger counts, guesses unknown words by their classes, and entities are scored as conlleval does."""

import itertools

import jax
import numpy as np
import pytest

import jaxseq as js
from jaxseq.structured.spans import Span, SpanScore, span_score, spans, to_iob2
from jaxseq.structured.tagger import find_words, fit_tagger, word_classes

SENTENCES = [
    [("the", "D"), ("dog", "N"), ("sees", "V"), ("the", "D"), ("cat", "N")],
    [("the", "D"), ("cat", "N"), ("runs", "V")],
    [("Ann", "P"), ("sees", "V"), ("the", "D"), ("dog", "N")],
    [("Bob", "P"), ("runs", "V")],
    [],
]


def test_the_params_are_shares():
    tagger = fit_tagger(SENTENCES, smoothing=0.0)
    assert tagger.tags == ("D", "N", "P", "V")
    prior, moves = np.exp(tagger.params.prior), np.exp(tagger.params.transition)
    np.testing.assert_allclose(prior, [0.5, 0, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(moves[0], [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(moves[1], [0, 0, 0, 1], atol=1e-6)  # sentences end without a step
    np.testing.assert_allclose(moves[3], [1, 0, 0, 0], atol=1e-6)
    tokens = np.exp(tagger.params.emission.logits)
    np.testing.assert_allclose(tokens[1, [tagger.words.ids[word] for word in ("dog", "cat")]], 0.5, rtol=1e-6)
    np.testing.assert_allclose(tokens[2, tagger.words.ids["<initial>"]], 1, rtol=1e-6)  # Ann and Bob are rare


def test_unknown_and_missing_words():
    tagger = fit_tagger(SENTENCES)
    assert tagger.tag([["the", "bird", "sees", "Eve"], [None, "dog"], [], ["Zoe", None, "the"]])[:3] == [
        ["D", "N", "V", "P"],
        ["D", "N"],
        [],
    ]
    given = [["the", None], ["the"], []]
    missing, one, none = tagger.log_likelihood(given)
    np.testing.assert_allclose(missing, one, rtol=1e-5)  # it says nothing
    assert none == 0
    drawn = tagger.simulate(jax.random.key(0), 5)
    assert len(drawn) == 5 and all(word in tagger.words.ids and tag in tagger.tags for word, tag in drawn)


def test_classes_of_words():
    assert [word_classes(word)[1] for word in ("1996", "U.S.", "I", "Ann", "so-called", "dog", "--", "don't")] == [
        "<number>",
        "<capitals>",
        "<initial>",
        "<initial>",
        "<hyphen>",
        "<lower>",
        "<other>",
        "<other>",
    ]
    words = find_words([[f"w{letter}ing" for letter in "abcdefghij"], ["a", "a"]])
    assert "<lower ing>" in words.ids and "a" in words.ids and "waing" not in words.ids
    assert words.find("singing") == words.ids["<lower ing>"] and words.find("sung") == words.ids["<lower>"]
    assert len(words) == 8


def test_words_that_read_as_classes():
    words = find_words([["<lower>", "<lower>", "<lower ing>", "<b>", "<b>", "a", "a"]])
    assert list(words.ids)[:2] == ["<b>", "a"] and len(words) == 8
    assert words.find("<lower>") == words.find("<lower ing>") == words.ids["<other>"] != words.find("bird")


def test_sentences_are_read_once():
    tagger = fit_tagger(list(sentence) for sentence in SENTENCES)
    assert tagger.words == fit_tagger(SENTENCES).words
    given = [["the", "dog"], ["Ann"]]
    assert tagger.tag(iter(given)) == tagger.tag(given) == [["D", "N"], ["P"]]
    assert tagger == tagger and tagger != fit_tagger(SENTENCES) and len({tagger, tagger}) == 1


def test_what_was_never_seen_is_impossible_without_smoothing():
    tagger = fit_tagger(SENTENCES, minimum_count=1, smoothing=0.0)
    assert np.isneginf(tagger.log_likelihood([["the", "bird"], ["the", "dog"]])).tolist() == [True, False]


def test_an_equal_language_model():
    """The probability of words does not depend on how they are read."""
    tagger = fit_tagger(SENTENCES)
    tokens, mask = tagger.words.encode([["the", "dog", "runs"]])
    steps = tagger.hmm.unroll(tagger.params, tokens, mask=mask)[1].log_likelihood.sum()
    np.testing.assert_allclose(steps, tagger.log_likelihood([["the", "dog", "runs"]])[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], []),
        (["O", "O"], []),
        (["I-A", "I-A"], [Span(0, 2, "A")]),
        (["B-A", "I-A", "B-A"], [Span(0, 2, "A"), Span(2, 3, "A")]),
        (["I-A", "B-A", "I-B", "O", "I-B"], [Span(0, 1, "A"), Span(1, 2, "A"), Span(2, 3, "B"), Span(4, 5, "B")]),
        (["B-A-B", "I-A-B"], [Span(0, 2, "A-B")]),
    ],
)
def test_spans(tags, expected):
    assert spans(tags) == expected
    assert spans(to_iob2(tags)) == expected


@pytest.mark.parametrize("scheme", ["BIOES", "BILOU"])
def test_spans_of_schemes_that_mark_ends(scheme):
    cases = [
        ("S", [(0, 1)]),
        ("BE", [(0, 2)]),
        ("BIE S", [(0, 3), (4, 5)]),
        ("BEBES", [(0, 2), (2, 4), (4, 5)]),
        ("BIB", [(0, 2), (2, 3)]),  # from here on in no scheme
        ("EI", [(0, 1), (1, 2)]),
        ("SE", [(0, 1), (1, 2)]),
        ("II E", [(0, 2), (3, 4)]),
    ]
    for kind in ("-A", ""):
        for letters, expected in cases:
            if scheme == "BILOU":
                letters = letters.replace("E", "L").replace("S", "U")
            tags = ["O" if letter == " " else letter + kind for letter in letters]
            entities = [Span(*place, kind[1:]) for place in expected]
            assert spans(tags, scheme) == spans(to_iob2(tags, scheme), "IOB2") == entities
            assert span_score([tags], [tags], scheme=scheme).f1 == 1
    tags = ["B-A", "I-B", "E-A"] if scheme == "BIOES" else ["B-A", "I-B", "L-A"]
    assert spans(tags, scheme) == [Span(0, 1, "A"), Span(1, 2, "B"), Span(2, 3, "A")]


def test_all_that_a_scheme_allows_can_be_scored():
    """Every path that is not forbidden has the entities that its tags begin."""
    for scheme in ("BIO", "IOB2", "BIOES", "BILOU"):
        tags = sorted({"IOB2": "BIO"}.get(scheme, scheme))
        rules = js.crf.forbidden(tags, scheme)
        for path in itertools.product(range(len(tags)), repeat=4):
            pairs = set(itertools.pairwise(path))
            if path[0] in rules.start or path[-1] in rules.end or pairs & set(rules.transition):
                continue
            named = [tags[state] for state in path]
            starts = [step for step, tag in enumerate(named) if tag in ("B", "S", "U")]
            assert [span.start for span in spans(named, scheme)] == starts
            assert sum(span.end - span.start for span in spans(named, scheme)) == sum(tag != "O" for tag in named)


def test_scores_of_spans():
    expected = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"]]
    assert span_score(expected, expected) == SpanScore(1, 1, 1)
    # IOB1 finds the same; one entity of another type; one too short
    guess = [["I-A", "I-A", "O", "I-A"], ["O", "I-A"]]
    assert span_score(guess, expected) == SpanScore(2 / 3, 2 / 3, 2 / 3)
    assert span_score([["B-A", "O", "O", "B-B"], ["B-A", "B-A"]], expected) == SpanScore(0.5, 2 / 3, 4 / 7)
    assert span_score([["O"] * 4, ["O"] * 2], expected) == SpanScore(0, 0, 0)
    assert span_score([], []) == SpanScore(0, 0, 0)


def test_iterators_are_read_once():
    tagger = fit_tagger(iter([iter(sentence) for sentence in SENTENCES]))
    given = ["the", "dog"]
    assert tagger.tag(iter([iter(given)])) == tagger.tag([given])
    np.testing.assert_array_equal(tagger.log_likelihood([iter(given)]), tagger.log_likelihood([given]))
    assert spans(iter(["B-X", "I-X"])) == spans(["B-X", "I-X"])
    assert span_score([iter(["B-X"])], iter([["B-X"]])).f1 == 1


def test_errors():
    tagger = fit_tagger(SENTENCES)
    cases = [
        (ValueError, "got none", lambda: fit_tagger([[]])),
        (ValueError, "minimum_count >= 1", lambda: fit_tagger(SENTENCES, minimum_count=0)),
        (ValueError, "'B-PER'", lambda: spans(["PER"])),
        (ValueError, "'B-PER'", lambda: spans(["E-PER"])),
        (ValueError, "'B-PER'", lambda: spans(["O-PER"])),
        (ValueError, "'B-PER'", lambda: spans([""])),
        (ValueError, "BIO, IOB2", lambda: spans(["O"], "IOB1")),
        (TypeError, "of ids give the names", lambda: spans([0, 1])),
        (ValueError, "the same sentences twice, got 1 and 2", lambda: span_score([["O"]], [["O"], ["O"]])),
        (TypeError, "list of sentences is needed", lambda: tagger.tag(3)),
        (TypeError, r"of one sentence give \[sentence\]", lambda: fit_tagger(SENTENCES[0])),
        (TypeError, "list of such lists", lambda: span_score(["O", "B-X"], ["O", "B-X"])),
        (TypeError, "list of such lists", lambda: span_score([0, 1], [0, 1])),
        (TypeError, "list of sentences is needed.* 'the'", lambda: tagger.tag(["the", "dog"])),
        (TypeError, "list of sentences is needed.* 'the dog'", lambda: tagger.tag("the dog")),
        (TypeError, "list of sentences is needed", lambda: tagger.log_likelihood(["the", "dog"])),
        (TypeError, "list of sentences is needed", lambda: tagger.tag([[("the", "D")]])),
        (TypeError, "pairs .* 'the'", lambda: fit_tagger([["the", "dog"]])),
        (TypeError, "pairs .* 'dog'", lambda: fit_tagger([("dog", "D")])),
        (TypeError, "pairs", lambda: fit_tagger([[(None, "N")]])),
        (TypeError, "pairs", lambda: fit_tagger([[("dog", None)]])),
        (TypeError, "list of sentences is needed", lambda: tagger.tag([0])),
        (ValueError, "smoothing >= 0", lambda: fit_tagger(SENTENCES, smoothing=-1)),
        (ValueError, "3 for 2 steps", lambda: span_score([["O"] * 3], [["O"] * 2])),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert js.tagger.fit_tagger is fit_tagger and js.spans.spans is spans
