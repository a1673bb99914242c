"""Networks over trees: what a node computes from its children, run up trees of any shapes.

Compositions: Recursive, RNTN, ChildSumTreeLSTM, NaryTreeLSTM, and the base Composition for your own.

    parse(text)                                  the trees of a text in brackets; read(path), those of a file
    binarise(tree)                               two children at every inner node
    batch(trees, token=, label=)                 a Forest: trees of any shapes laid out side by side
    evaluate(composition, params, forest, xs)    the states of all nodes
    padding(forest)                              the share of its rows that are no nodes
    balanced(composition, params, xs, mask)      the root of a balanced tree over each sequence
    quad_tree(composition, params, images)       the root of a tree of quarters over each image
"""

from .composition import Composition as Composition
from .forest import Forest as Forest
from .forest import batch as batch
from .forest import evaluate as evaluate
from .forest import padding as padding
from .penn import Tree as Tree
from .penn import binarise as binarise
from .penn import parse as parse
from .penn import read as read
from .recursive import RNTN as RNTN
from .recursive import Recursive as Recursive
from .recursive import RecursiveParams as RecursiveParams
from .recursive import RNTNParams as RNTNParams
from .regular import balanced as balanced
from .regular import quad_tree as quad_tree
from .tree_lstm import ChildSumTreeLSTM as ChildSumTreeLSTM
from .tree_lstm import NaryTreeLSTM as NaryTreeLSTM
from .tree_lstm import NaryTreeLSTMParams as NaryTreeLSTMParams
