"""Trees as they are written, and read from files of brackets."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Literal

_TOKENS = re.compile(r"[()]|[^() \t\r\n\f\v]+")  # a no-break space is a part of a word
_ESCAPED = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}", r"\/": "/", r"\*": "*"}
_ESCAPES = re.compile("|".join(map(re.escape, _ESCAPED)))
_BRACKETS = {"(": "-LRB-", ")": "-RRB-"}


@dataclasses.dataclass(frozen=True)
class Tree:
    """A tree as three tuples with an entry for each node, children before their parents and the root last.

    So a tree may be as deep as it likes. `labels` are texts, "" where there is none; `words` are those of the leaves,
    None at inner nodes without one; `children` are the numbers of a node's children, `()` for a leaf.

    `str(tree)` is what `parse` reads. That tells all of a tree whose leaves have labels, whose inner nodes have no
    words, and whose texts are free of blanks, brackets in labels and, in words, of escapes such as -LRB-.

    Raises:
        ValueError: if they are not of one tree.

    >>> tree = Tree(labels=("2", "4", "3"), words=("very", "good", None), children=((), (), (0, 1)))
    >>> print(tree)
    (3 (2 very) (4 good))
    """

    labels: tuple[str, ...]
    words: tuple[str | None, ...]
    children: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "words", tuple(self.words))
        object.__setattr__(self, "children", tuple(map(tuple, self.children)))
        count = len(self.labels)
        if not count == len(self.words) == len(self.children) or count == 0:
            raise ValueError(
                f"A tree needs a label, a word or None, and children for each of its nodes, at least one; got "
                f"{count} labels, {len(self.words)} words and {len(self.children)} tuples of children."
            )
        parents = [0] * count
        for node, children in enumerate(self.children):
            for child in children:
                if not 0 <= child < node:
                    raise ValueError(f"A tree needs children before their parents, but {child} is one of node {node}.")
                parents[child] += 1
        if any(number != 1 for number in parents[:-1]):
            node = next(node for node, number in enumerate(parents) if number != 1)
            raise ValueError(f"A tree needs one parent for each node but the last; node {node} has {parents[node]}.")

    def __str__(self) -> str:
        """The tree in brackets; round brackets of words are escaped."""
        parts, stack = [], [(len(self.labels) - 1, False)]
        while stack:
            node, is_done = stack.pop()
            if is_done:
                parts.append(")")
                continue
            word = self.words[node]
            parts.append(f" ({self.labels[node]}" + (f" {_escape(word)}" if word is not None else ""))
            stack.append((node, True))
            stack += [(child, False) for child in reversed(self.children[node])]
        return "".join(parts).lstrip()

    def leaves(self) -> list[int]:
        """The numbers of the leaves, from left to right."""
        found, stack = [], [len(self.labels) - 1]
        while stack:
            node = stack.pop()
            stack += reversed(self.children[node])
            if not self.children[node]:
                found.append(node)
        return found


def read(path: str | os.PathLike[str]) -> list[Tree]:
    """The trees of a file, as `parse` reads them; the file is UTF-8.

    Raises:
        ValueError: if the text is malformed, or holds no trees.
    """
    trees = parse(pathlib.Path(path).read_text("utf-8-sig"), str(path))
    if not trees:
        raise ValueError(f"{path} holds no trees.")
    return trees


def parse(text: str, source: str = "the text") -> list[Tree]:
    """The trees of a text in brackets, each node `(label word)` or `(label node ...)`, over any number of lines.

    So are the Penn treebank, whose outermost node has no label, and the Stanford sentiment treebank, whose labels are
    classes. The escapes of the Penn treebank in words, such as -LRB- for a bracket and a backslash before a slash, are
    undone.

    Raises:
        ValueError: if the text is malformed, with the line and column, and `source`.

    >>> for tree in parse("(3 (2 It) (4 (2 's) (4 fun)))  ( (S (NP She) (VP left)) )"):
    ...     print(tree.labels, tree)
    ('2', '2', '4', '4', '3') (3 (2 It) (4 (2 's) (4 fun)))
    ('NP', 'VP', 'S', '') ( (S (NP She) (VP left)))
    >>> parse("(3 (2 It) 's)")
    Traceback (most recent call last):
    ...
    ValueError: the text, line 1, column 11: the word "'s" stands beside nodes; a node holds one word, or nodes.
    """

    def fail(place: int, problem: str) -> ValueError:
        line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
        return ValueError(f"{source}, line {line}, column {column}: {problem}")

    trees, growing, begun = [], _Growing(), []
    for match in _TOKENS.finditer(text):
        token, place = match.group(), match.start()
        if token == "(":
            if begun and begun[-1].word is not None:
                raise fail(place, f"a node stands beside the word {begun[-1].word!r}; a node holds one word, or nodes.")
            begun.append(_Open(place, after=match.end()))
        elif not begun:
            raise fail(place, f"a tree begins with '(', got {token!r}.")
        elif token != ")":
            begun[-1].take(token, place, fail)
        else:
            node = begun.pop()
            if node.word is None and not node.children:
                raise fail(node.place, f"the node ({node.label} has neither a word nor nodes in it.")
            number = growing.add(node.label, node.word, tuple(node.children))
            if begun:
                begun[-1].children.append(number)
            else:
                trees.append(growing.tree())
                growing = _Growing()
    if begun:
        raise fail(begun[0].place, f"this tree is not closed: {len(begun)} brackets are open at the end.")
    return trees


def binarise(tree: Tree, branching: Literal["right", "left"] = "right") -> Tree:
    """The tree with two children at every inner node.

    Of more, (a (b (c d))) is made, or (((a b) c) d) with `branching` "left"; the new nodes have the label "". A node
    with one child becomes that child, with its own label unless that is "".

    Raises:
        ValueError: if an inner node has a word.

    >>> (tree,) = parse("(S (NP (DT a) (JJ big) (NN dog)) (VP (V barks)))")
    >>> print(binarise(tree))
    (S (NP (DT a) ( (JJ big) (NN dog))) (VP barks))
    """
    if branching not in ("right", "left"):
        raise ValueError(f'branching is "right" or "left", got {branching!r}.')
    labels, words, kept = list(tree.labels), list(tree.words), list(tree.children)

    def joined(pair: tuple[int, ...]) -> int:
        labels.append("")
        words.append(None)
        kept.append(pair)
        return len(kept) - 1

    for node, children in enumerate(tree.children):  # children first, so a chain of single ones folds in one pass
        if children and words[node] is not None:
            raise ValueError(f"binarise takes trees with words at leaves alone; node {node} has {words[node]!r}.")
        if len(children) == 1:
            (child,) = children
            labels[node], words[node], kept[node] = labels[node] or labels[child], words[child], kept[child]
        elif branching == "right":
            while len(kept[node]) > 2:
                kept[node] = (*kept[node][:-2], joined(kept[node][-2:]))
        else:
            while len(kept[node]) > 2:
                kept[node] = (joined(kept[node][:2]), *kept[node][2:])
    return _below(len(tree.labels) - 1, labels, words, kept)


def _below(root: int, labels: Sequence[str], words: Sequence[str | None], children: Sequence[Sequence[int]]) -> Tree:
    """The tree of a node and what is below it, numbered as `parse` numbers it."""
    growing, numbers, stack = _Growing(), {}, [(root, False)]
    while stack:
        node, is_ready = stack.pop()
        if is_ready:
            numbers[node] = growing.add(labels[node], words[node], tuple(numbers[child] for child in children[node]))
        else:
            stack += [(node, True), *((child, False) for child in reversed(children[node]))]
    return growing.tree()


class _Growing:
    """The nodes of a tree so far."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, str | None, tuple[int, ...]]] = []

    def add(self, label: str, word: str | None, children: tuple[int, ...]) -> int:
        self.nodes.append((label, word, children))
        return len(self.nodes) - 1

    def tree(self) -> Tree:
        return Tree(*zip(*self.nodes, strict=True))


class _Open:
    """A node whose bracket is not closed yet."""

    def __init__(self, place: int, after: int) -> None:
        self.place = place
        self.label, self.word, self.children = "", None, []
        self.is_new = True

    def take(self, token: str, place: int, fail) -> None:
        """A label, if it is the first thing after the bracket, or the word."""
        if self.children:
            raise fail(place, f"the word {token!r} stands beside nodes; a node holds one word, or nodes.")
        if self.is_new:
            self.label, self.is_new = token, False
        elif self.word is None:
            self.word = _ESCAPES.sub(lambda match: _ESCAPED[match.group()], token)
        else:
            raise fail(place, f"a second word {token!r} after {self.word!r}; a node holds one word, or nodes.")


def _escape(word: str) -> str:
    return "".join(_BRACKETS.get(character, character) for character in word)
