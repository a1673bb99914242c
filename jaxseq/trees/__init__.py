"""Networks over trees: what a node computes from its children, run up trees of any shapes.

Compositions: Recursive, RNTN, ChildSumTreeLSTM, NaryTreeLSTM, and the base Composition for your own.
Trees from outside: `parse` and `read` (brackets), `binarise`, `batch` them to a `Forest`, `evaluate` it, `padding`.
Trees that need no data: `balanced` over a sequence, `quad_tree` over an image.
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
