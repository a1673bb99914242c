"""Entities in sequences of tags, and how well they are found."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxseq.structured.crf import SCHEMES


class Span(NamedTuple):
    """An entity: the steps from `start` up to before `end`, and its type."""

    start: int
    end: int
    kind: str


class SpanScore(NamedTuple):
    """Shares of the found entities that are right, of the right ones that were found, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def spans(tags: Iterable[str], scheme: str = "BIO") -> list[Span]:
    """The entities of tags such as "O", "B-PER", "I-PER", in a scheme of `crf.forbidden`, by the rules of conlleval.

    An entity begins at B, and at a tag that goes on (I, and E or L) after another type, after O or after an end. It
    ends at E or S (L or U), before the next beginning, or before O. So with "BIO" tags may be of IOB1 as well.
    Tags without a type, "B" and "I", are of the type "".

    >>> spans(["I-PER", "I-PER", "B-PER", "O", "B-LOC", "I-ORG"])
    [Span(start=0, end=2, kind='PER'), Span(start=2, end=3, kind='PER'), Span(start=4, end=5, kind='LOC'), \
Span(start=5, end=6, kind='ORG')]
    >>> spans(["B-PER", "E-PER", "S-PER"], "BIOES")
    [Span(start=0, end=2, kind='PER'), Span(start=2, end=3, kind='PER')]
    """
    if scheme not in SCHEMES:
        raise ValueError(f"spans knows the schemes {', '.join(SCHEMES)}, got {scheme!r}.")
    letters, (going_on, unfinished) = scheme.replace("IOB2", "BIO"), SCHEMES[scheme]
    found: list[Span] = []
    is_open = False  # the last entity may go on
    for step, tag in enumerate(_texts(tags)):
        prefix, _, kind = tag.partition("-")
        if len(prefix) != 1 or prefix not in letters or (prefix == "O" and tag != "O"):
            raise ValueError(f"spans needs tags such as 'O', 'B-PER' and 'I-PER' in the scheme {scheme}, got {tag!r}.")
        if prefix != "O":
            if prefix in going_on and is_open and found[-1].kind == kind:
                found[-1] = found[-1]._replace(end=step + 1)
            else:
                found.append(Span(step, step + 1, kind))
        is_open = prefix in (unfinished or "BI")
    return found


def _texts(tags: Iterable[str]) -> list[str]:
    """The tags of one sentence as a list; raises TypeError unless they are texts."""
    texts: list = list(tags) if isinstance(tags, Iterable) and not isinstance(tags, str) else [None]
    if not all(isinstance(tag, str) for tag in texts):
        raise TypeError(
            f"The tags of a sentence are a list of texts such as ['O', 'B-PER'], got {tags!r}: of ids give the names, "
            "[names[i] for i in ids], and of sentences a list of such lists."
        )
    return texts


def to_iob2(tags: Iterable[str], scheme: str = "BIO") -> list[str]:
    """The same entities in IOB2, where each begins with B: of tags in IOB1, or in another scheme.

    >>> to_iob2(["O", "I-PER", "I-PER", "B-PER"])
    ['O', 'B-PER', 'I-PER', 'B-PER']
    """
    tags = _texts(tags)
    found = ["O"] * len(tags)
    for start, end, kind in spans(tags, scheme):
        for step in range(start, end):
            found[step] = ("B" if step == start else "I") + (f"-{kind}" if kind else "")
    return found


def span_score(
    predicted: Iterable[Iterable[str]], expected: Iterable[Iterable[str]], *, scheme: str = "BIO"
) -> SpanScore:
    """How well the entities of sentences are found: one counts if its start, its end and its type are right.

    The tags of each sentence are as `spans` reads them. A share of none is 0.

    >>> span_score([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]])
    SpanScore(precision=0.5, recall=0.5, f1=0.5)
    """
    right = found = there = 0
    guesses, truths = ([_texts(tags) for tags in sentences] for sentences in (predicted, expected))
    if len(guesses) != len(truths):
        raise ValueError(f"span_score needs the same sentences twice, got {len(guesses)} and {len(truths)}.")
    for guess, truth in zip(guesses, truths, strict=True):
        if len(guess) != len(truth):
            raise ValueError(f"span_score needs tags for the same steps, got {len(guess)} for {len(truth)} steps.")
        guessed, true = set(spans(guess, scheme)), set(spans(truth, scheme))
        right, found, there = right + len(guessed & true), found + len(guessed), there + len(true)
    precision, recall = right / max(found, 1), right / max(there, 1)
    return SpanScore(precision, recall, 2 * right / max(found + there, 1))
