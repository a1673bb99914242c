"""Entities in sequences of tags, and how well they are found."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


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


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of tags such as "O", "B-PER", "I-PER", in IOB1 or IOB2, by the rules of conlleval.

    An entity begins at B, and at I after another type or after O. It ends before the next beginning, or O.

    >>> spans(["I-PER", "I-PER", "B-PER", "O", "B-LOC", "I-ORG"])
    [Span(start=0, end=2, kind='PER'), Span(start=2, end=3, kind='PER'), Span(start=4, end=5, kind='LOC'), \
Span(start=5, end=6, kind='ORG')]
    """
    found: list[Span] = []
    for step, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if tag == "O":
            continue
        if prefix not in ("B", "I") or not kind:
            raise ValueError(f"spans needs tags such as 'O', 'B-PER' and 'I-PER', got {tag!r}.")
        last = found[-1] if found else None
        if prefix == "I" and last is not None and last.end == step and last.kind == kind:
            found[-1] = last._replace(end=step + 1)
        else:
            found.append(Span(step, step + 1, kind))
    return found


def to_iob2(tags: Sequence[str]) -> list[str]:
    """Tags in which each entity begins with B, of tags in which it does so only after another one (IOB1).

    >>> to_iob2(["O", "I-PER", "I-PER", "B-PER"])
    ['O', 'B-PER', 'I-PER', 'B-PER']
    """
    starts = {span.start for span in spans(tags)}
    return [f"B-{tag[2:]}" if step in starts else tag for step, tag in enumerate(tags)]


def span_score(predicted: Iterable[Sequence[str]], expected: Iterable[Sequence[str]]) -> SpanScore:
    """How well the entities of sentences are found: one counts if its start, its end and its type are right.

    A share of none is 0.

    >>> span_score([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]])
    SpanScore(precision=0.5, recall=0.5, f1=0.5)
    """
    right = found = there = 0
    for guess, truth in zip(predicted, expected, strict=True):
        if len(guess) != len(truth):
            raise ValueError(f"span_score needs tags for the same steps, got {len(guess)} for {len(truth)} steps.")
        guessed, true = set(spans(guess)), set(spans(truth))
        right, found, there = right + len(guessed & true), found + len(guessed), there + len(true)
    precision, recall = right / max(found, 1), right / max(there, 1)
    return SpanScore(precision, recall, 2 * right / max(found + there, 1))
