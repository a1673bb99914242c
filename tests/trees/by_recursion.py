"""Trees as the papers write them: NumPy, one node after another, by recursion."""

import numpy as np
from hypothesis import strategies
from scipy.special import expit

import jaxseq as js

TREES = strategies.recursive(
    strategies.sampled_from("abcd"), lambda trees: strategies.lists(trees, min_size=1, max_size=3), max_leaves=8
)


def brackets(nested) -> str:
    """A tree given as nested lists of words."""
    if isinstance(nested, str):
        return f"({ord(nested) % 3} {nested})"
    return f"({len(nested)} {' '.join(map(brackets, nested))})"


def recursive(params, children, x=None):
    if not children:
        return x
    return np.tanh(sum(c @ params.recurrent_kernel[:, k] for k, c in enumerate(children)) + params.bias)


def rntn(params, children, x=None):
    if not children:
        return x
    z = sum(c @ params.recurrent_kernel[:, k] for k, c in enumerate(children)) + params.bias
    for k, a in enumerate(children):
        for j, b in enumerate(children):
            z = z + np.array([a @ params.tensor[:, k, :, j, unit] @ b for unit in range(len(z))])
    return np.tanh(z)


def from_input(params, x):
    return params.bias + (0 if x is None else np.einsum("n,ngh->gh", x, params.input_kernel))


def child_sum(params, children, x=None):
    """Tai et al. 2015, equations 2 to 8; W, U, b by gates i, f, u, o."""
    wx, u = from_input(params, x), np.moveaxis(params.recurrent_kernel, 1, 0)
    h_sum = sum((h for h, _ in children), np.zeros(wx.shape[1]))
    i, o, update = (expit(wx[0] + h_sum @ u[0]), expit(wx[3] + h_sum @ u[3]), np.tanh(wx[2] + h_sum @ u[2]))
    c = i * update
    for h_k, c_k in children:
        c = c + expit(wx[1] + h_k @ u[1]) * c_k
    return o * np.tanh(c), c


def nary(params, children, x=None):
    """Tai et al. 2015, equations 9 to 14; the gates of U are i, f_1, ..., f_N, u, o."""
    wx = from_input(params, x)
    count = params.recurrent_kernel.shape[1]

    def recurrent(gate):
        return sum(
            (h @ params.recurrent_kernel[:, k, gate] for k, (h, _) in enumerate(children)), np.zeros(wx.shape[1])
        )

    i, o = expit(wx[0] + recurrent(0)), expit(wx[3] + recurrent(2 + count))
    c = i * np.tanh(wx[2] + recurrent(1 + count))
    for k, (_, c_k) in enumerate(children):
        c = c + expit(wx[1] + recurrent(1 + k)) * c_k
    return o * np.tanh(c), c


def states(node, params, tree: js.trees.Tree, inputs) -> list:
    """The state of each node; `inputs` has that of each node, or None."""
    found = []
    for children, x in zip(tree.children, inputs, strict=True):
        found.append(node(params, [found[child] for child in children], x))
    return found
