"""Questions about stories in the format of the bAbI tasks: files in, arrays out."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxseq.training.errors import UserError


class Question(NamedTuple):
    """A question, its answer, and the sentences before it, all as words in lower case.

    `support` are the indices of the sentences that tell the answer. An answer of several words is one, "apple,milk".
    """

    story: tuple[tuple[str, ...], ...]
    question: tuple[str, ...]
    answer: str
    support: tuple[int, ...]


class QuestionArrays(NamedTuple):
    """Questions as tokens, padded on the right, with what a `MemoryNetwork` needs; the masks are True at words."""

    story: Int[np.ndarray, "question sentence word"]
    mask: Bool[np.ndarray, "question sentence word"]
    question: Int[np.ndarray, "question word"]
    question_mask: Bool[np.ndarray, "question word"]
    answer: Int[np.ndarray, " question"]


def read(path: str | pathlib.Path) -> list[Question]:
    """The questions of a file, each with the sentences of its story so far.

    A line is a number, which begins again at 1 with each story, and a sentence, or a question, its answer and the
    numbers of the sentences that support it, with tabs between them.

    Raises:
        UserError: if there is no such file, or a line is something else; it is named.
    """
    path = pathlib.Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    questions: list[Question] = []
    story: list[tuple[str, ...]] = []
    indices: dict[int, int] = {}  # of the story's sentences, by their numbers
    last = 0
    for line_number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue

        def wrong(needed: str, where: int = line_number, line: str = line) -> UserError:
            return UserError(f"line {where} of {path} needs {needed}, got {line[:60]!r}")

        number, _, text = line.lstrip().partition(" ")
        if not number.isdecimal() or int(number) not in (1, last + 1):
            raise wrong(f"a number first, {last + 1}, or 1 where a story begins")
        if (last := int(number)) == 1:
            story, indices = [], {}
        sentence, *rest = (part.strip() for part in text.split("\t"))
        if not words(sentence):
            raise wrong("words after its number")
        if not rest and "?" in sentence:
            raise wrong("tabs around the answer of a question, `number question<TAB>answer<TAB>support`")
        if not rest:
            indices[last] = len(story)
            story.append(words(sentence))
            continue
        answer, support = rest[0].lower(), rest[1].split() if len(rest) > 1 else []
        if not answer or len(rest) > 2:
            raise wrong("a question, its answer and the numbers of what supports it, with tabs between them")
        if not all(part.isdecimal() and int(part) in indices for part in support):
            raise wrong("as support numbers of sentences before it")
        found = tuple(indices[int(part)] for part in support)
        questions.append(Question(tuple(story), words(sentence), answer, found))
    if not questions:
        tabs = "" if "\t" in content else ": no line has a tab; a question is `number question<TAB>answer<TAB>support`"
        raise UserError(f"{path} holds no questions{tabs}")
    return questions


def words(sentence: str) -> tuple[str, ...]:
    """The words of a sentence in lower case, without the mark at its end.

    >>> words("Where is Mary? ")
    ('where', 'is', 'mary')
    """
    return tuple(sentence.strip().rstrip(".?!").lower().split())


def vocabulary(questions: Iterable[Question]) -> tuple[str, ...]:
    """All words of stories and questions, and all answers, in order.

    >>> vocabulary([Question((("mary", "left"),), ("who", "left"), "mary", (0,))])
    ('left', 'mary', 'who')
    """
    found: set[str] = set()
    for item in questions:
        found.update(item.question, (item.answer,), *item.story)
    return tuple(sorted(found))


def arrays(
    questions: Sequence[Question], vocabulary: Sequence[str], sentences: int, words: int | None = None
) -> QuestionArrays:
    """Questions as arrays: of each story the last `sentences`, and of each sentence all words, or at least `words`.

    Raises:
        ValueError: if there are no questions, or `sentences` is below 1.
        UserError: if a word is not in the vocabulary.

    >>> one = Question((("mary", "left"), ("bob", "sat")), ("who", "left"), "mary", (0,))
    >>> arrays([one], vocabulary([one]), sentences=1).story.tolist()
    [[[0, 3]]]
    """
    if not len(questions) or sentences < 1:
        raise ValueError(
            f"arrays needs at least 1 question and sentences >= 1, got {len(questions)} questions, {sentences=}."
        )
    tokens = {word: index for index, word in enumerate(vocabulary)}
    stories = [item.story[-sentences:] for item in questions]
    longest = max((len(s) for item, story in zip(questions, stories, strict=True) for s in (*story, item.question)))
    width = max(longest, words or 0)

    def encode(rows: Sequence[Sequence[str]], count: int) -> tuple[np.ndarray, np.ndarray]:
        found, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        for index, row in enumerate(rows):
            found[index, : len(row)] = [token(word) for word in row]
            mask[index, : len(row)] = True
        return found, mask

    def token(word: str) -> int:
        if word not in tokens:
            raise UserError(f"the vocabulary of {len(tokens)} words lacks {word!r}")
        return tokens[word]

    told = [encode(story, sentences) for story in stories]
    asked, asked_mask = encode([item.question for item in questions], len(questions))
    answers = np.array([token(item.answer) for item in questions], np.int32)
    return QuestionArrays(
        np.stack([t for t, _ in told]), np.stack([mask for _, mask in told]), asked, asked_mask, answers
    )
