"""Reading questions about stories, and what is wrong with a file."""

import numpy as np
import pytest

from jaxseq.training import questions
from jaxseq.training.errors import UserError

TEXT = """1 Mary got the milk.
2 Mary moved to the kitchen.
3 Where is Mary? \tkitchen\t2
4 Mary got the apple.
5 What is Mary carrying?\tmilk,apple\t1 4
1 Bob sat.
2 Who sat?\tBob\t1
"""


def write(folder, text):
    path = folder / "task.txt"
    path.write_text(text)
    return path


def test_stories_go_on_and_begin_anew(tmp_path):
    first, second, third = questions.read(write(tmp_path, TEXT))
    assert first.story == (("mary", "got", "the", "milk"), ("mary", "moved", "to", "the", "kitchen"))
    assert (first.question, first.answer, first.support) == (("where", "is", "mary"), "kitchen", (1,))
    assert len(second.story) == 3 and (second.answer, second.support) == ("milk,apple", (0, 2))
    assert third == ((("bob", "sat"),), ("who", "sat"), "bob", (0,))


def test_a_path_may_be_text_and_lines_indented(tmp_path):
    path = write(tmp_path, TEXT)
    assert questions.read(str(path)) == questions.read(path)
    assert questions.read(write(tmp_path, "  1 Bob sat. \r\n 2 Who sat?\tBob\t1 \r\n"))[0].story == (("bob", "sat"),)


def test_arrays_of_nothing(tmp_path):
    items = questions.read(write(tmp_path, TEXT))
    for given, sentences in (([], 2), (items, 0), (items, -1)):
        with pytest.raises(ValueError, match=f"at least 1 question and sentences >= 1, got {len(given)} questions"):
            questions.arrays(given, questions.vocabulary(items), sentences)


def test_arrays_hold_the_last_sentences(tmp_path):
    items = questions.read(write(tmp_path, TEXT))
    words = questions.vocabulary(items)
    assert "milk,apple" in words and list(words) == sorted(set(words))
    data = questions.arrays(items, words, sentences=2)
    assert data.story.shape == data.mask.shape == (3, 2, 5) and data.question.shape == (3, 5)

    def told(row):
        return [tuple(np.array(words)[s[m]]) for s, m in zip(data.story[row], data.mask[row], strict=True) if m.any()]

    for row, item in enumerate(items):
        assert told(row) == list(item.story[-2:])
        assert tuple(np.array(words)[data.question[row][data.question_mask[row]]]) == item.question
        assert words[data.answer[row]] == item.answer
    assert questions.arrays(items, words, sentences=3, words=7).story.shape == (3, 3, 7)
    with pytest.raises(UserError, match="the vocabulary of 2 words lacks 'got'"):
        questions.arrays(items, ("mary", "the"), sentences=2)


WRONG = {
    "number": ("1 A b.\nMary left.\n", "line 2 of .*task.txt needs a number first, 2, or 1 where a story begins"),
    "order": ("1 A b.\n\n3 C d.\n", "line 3 of .* needs a number first, 2, or 1 .* got '3 C d.'"),
    "empty": ("1 A b.\n2 .\n", "line 2 of .* needs words after its number"),
    "answer": ("1 A b.\n2 Who?\t\t1\n", "line 2 of .* needs a question, its answer and the numbers"),
    "fields": ("1 A b.\n2 Who?\ta\t1\t2\n", "line 2 of .* needs a question, its answer and the numbers"),
    "support": ("1 A b.\n2 Who?\ta\t2\n", "line 2 of .* needs as support numbers of sentences before it"),
    "no answer": ("1 A b.\n2 Who?\t\n", r"line 2 of .* needs a question, its answer .*, got '2 Who\?\\t'"),
    "spaces": ("1 A b.\n2 Who?\ta\t1\n3 Who? a 1\n", "line 3 of .* needs tabs around the answer of a question"),
    "nothing": (
        "1 A b.\n",
        "task.txt holds no questions: no line has a tab; a question is `number question<TAB>answer",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lines_are_named(tmp_path, name):
    text, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        questions.read(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot read .*absent.txt: No such file"):
        questions.read(tmp_path / "absent.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe1")
    with pytest.raises(UserError, match="bytes.txt is not UTF-8 text"):
        questions.read(tmp_path / "bytes.txt")
