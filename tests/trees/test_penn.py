"""Trees in brackets: as they are written, of any depth, and what is wrong with those that are none."""

import re

import hypothesis
import pytest

import jaxseq as js
from tests.trees import by_recursion

T = js.trees
WORDS = ["(", ")", "a", "1/2", "5\xa01", "-", "'s", "[x]", "ä"]  # a no-break space stands within words of the treebank


def nested(tree, node=None):
    """A tree as nested tuples of label, then word or nodes."""
    node = len(tree.labels) - 1 if node is None else node
    return (tree.labels[node], tree.words[node], *(nested(tree, child) for child in tree.children[node]))


def test_reads_the_two_treebanks():
    sentiment, penn = T.parse(
        "(3 (2 It) (4 (2 's) (4 fun)))\n\n( (S (NP-SBJ\n\t(DT The) (NN dog))\r\n (VP (VBZ barks))))"
    )
    assert nested(sentiment) == ("3", None, ("2", "It"), ("4", None, ("2", "'s"), ("4", "fun")))
    subject = ("NP-SBJ", None, ("DT", "The"), ("NN", "dog"))
    assert nested(penn) == ("", None, ("S", None, subject, ("VP", None, ("VBZ", "barks"))))
    assert [penn.words[leaf] for leaf in penn.leaves()] == ["The", "dog", "barks"]
    assert T.parse("") == T.parse(" \n") == []


def test_undoes_the_escapes():
    words = r"-LRB- -RRB- -LSB- -RSB- -LCB- -RCB- :--RRB- and\/or \*\* -LRB 1-2"
    (tree,) = T.parse("(X " + " ".join(f"(Y {word})" for word in words.split()) + ")")
    assert tree.words[:-1] == ("(", ")", "[", "]", "{", "}", ":-)", "and/or", "**", "-LRB", "1-2")
    assert T.parse("(2 5\xa01)")[0].words == ("5\xa01",)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=50)
@hypothesis.given(by_recursion.TREES)
def test_is_written_as_it_is_read(shape):
    (tree,) = T.parse(by_recursion.brackets(shape))
    words = [WORDS[index % len(WORDS)] for index in range(len(tree.labels))]
    tree = T.Tree(
        tree.labels,
        tuple(None if kept else word for word, kept in zip(words, tree.children, strict=True)),
        tree.children,
    )
    assert T.parse(str(tree)) == [tree]
    assert T.parse(f"{tree}\n{tree}") == [tree, tree]


def test_lists_make_a_tree_that_compares_and_hashes():
    tree = T.Tree(["1", "2", "3"], ["a", "b", None], [[], [], [0, 1]])
    assert tree == T.parse("(3 (1 a) (2 b))")[0] and len({tree, *T.parse(str(tree))}) == 1


def test_a_file_without_trees(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'empty.txt'} holds no trees.")):
        T.read(tmp_path / "empty.txt")


@pytest.mark.parametrize("side", ["left", "right"])
def test_depth_has_no_limit(side, tmp_path):
    depth = 50_000
    text = (
        "(_ (_ a) " * depth + "(_ b)" + ")" * depth if side == "right" else "(_ " * depth + "(_ a)" + " (_ b))" * depth
    )
    (tmp_path / "deep.txt").write_text(text)
    (tree,) = T.read(tmp_path / "deep.txt")
    assert len(tree.labels) == 2 * depth + 1 and len(tree.leaves()) == depth + 1
    assert str(tree) == text
    assert T.binarise(tree) == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(3 (2 It)\n (4 fun) 's)", 'the text, line 2, column 10: the word "\'s" stands beside nodes'),
        ("(3 It (2 is))", "line 1, column 7: a node stands beside the word 'It'; a node holds one word, or nodes."),
        ("(3 It is)", "line 1, column 7: a second word 'is' after 'It'; a node holds one word, or nodes."),
        ("(3 It))", "line 1, column 7: a tree begins with '(', got ')'."),
        ("It (3 is)", "line 1, column 1: a tree begins with '(', got 'It'."),
        ("(2 a)\n\n  (3 (2 It)\n (3", "line 3, column 3: this tree is not closed: 2 brackets are open at the end."),
        ("(3 (2 It) (4))", "line 1, column 11: the node (4 has neither a word nor nodes in it."),
        ("()", "line 1, column 1: the node ( has neither a word nor nodes in it."),
    ],
)
def test_says_what_is_malformed(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        T.parse(text)


def test_names_the_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("(2 a)\n(3")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2, column 1: this tree is not closed")):
        T.read(path)


def by_hand(shape, branching):
    """Nested lists without single ones, in twos."""
    if isinstance(shape, str):
        return shape
    parts = [by_hand(part, branching) for part in shape]
    while len(parts) > 2:
        parts = [*parts[:-2], parts[-2:]] if branching == "right" else [parts[:2], *parts[2:]]
    return parts if len(parts) == 2 else parts[0]


def shape_of(tree, node=None):
    node = len(tree.labels) - 1 if node is None else node
    return [shape_of(tree, child) for child in tree.children[node]] if tree.children[node] else tree.words[node]


@hypothesis.settings(deadline=None, derandomize=True, max_examples=50)
@hypothesis.given(by_recursion.TREES)
def test_binarise_makes_twos(shape):
    (tree,) = T.parse(by_recursion.brackets(shape))
    for branching in ("right", "left"):
        binary = T.binarise(tree, branching)
        assert shape_of(binary) == by_hand(shape, branching)
        assert T.binarise(binary) == binary and binary.labels[-1] == tree.labels[-1]


def test_binarise_keeps_the_upper_label():
    (tree,) = T.parse("( (S (NP (N it)) (VP (V is) (X (Y (Z so))) (N it))))")
    assert str(T.binarise(tree)) == "(S (NP it) (VP (V is) ( (X so) (N it))))"
    assert str(T.binarise(tree, "left")) == "(S (NP it) (VP ( (V is) (X so)) (N it)))"
    with pytest.raises(ValueError, match='branching is "right" or "left", got \'up\''):
        T.binarise(tree, "up")
    with pytest.raises(ValueError, match="words at leaves alone; node 1 has 'b'"):
        T.binarise(T.Tree(("", ""), ("a", "b"), ((), (0,))))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (((), (), ()), "at least one; got 0 labels, 0 words and 0 tuples"),
        ((("a",), (None, "b"), ((),)), "got 1 labels, 2 words and 1 tuples"),
        ((("a", "b"), (None, "b"), ((1,), ())), "children before their parents, but 1 is one of node 0"),
        ((("a", "b"), ("a", "b"), ((), ())), "one parent for each node but the last; node 0 has 0"),
        ((("a", "b"), ("a", None), ((), (0, 0))), "one parent for each node but the last; node 0 has 2"),
    ],
)
def test_a_tree_is_one(nodes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        T.Tree(*nodes)
