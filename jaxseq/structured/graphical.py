"""Sequence models as graphical models: what one says of whole sequences, and how many numbers it takes to say it."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxseq import losses
from jaxseq.core import errors, masks, sharding
from jaxseq.core.cell import Cell, Params, State
from jaxseq.structured.markov import MarkovChain


def joint_log_probability(
    cell: Cell,
    params: Params,
    tokens: Int[Array, "*batch time"],
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    start: int | Int[Array, "..."] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    state: State = None,
) -> Float[Array, "*batch"]:
    """`log p(x_1, ..., x_T) = Σ_t log p(x_t | x_1, ..., x_(t-1))` in nats, under a cell from tokens to logits.

    The chain rule holds whatever the cell: the probabilities of all sequences of one length sum to 1. To tell the first
    token the cell reads `start`, one for all rows or one a row, as in `generate`; by default its `zero_input`, token 0.
    A reset begins another sequence with `start`; the result is that of all sequences of a row.

    Goodfellow, Bengio and Courville, Deep Learning, 2016, section 10.2.3.

    Raises:
        TypeError: if the cell does not read tokens and give logits.
        ValueError: if a shape does not fit.

    >>> import jaxseq as js
    >>> cell = js.Stack((js.Embed(3, 4), js.Elman(4, 5), js.Dense(5, 3)))
    >>> params = cell.init(jax.random.key(0))
    >>> sequences = jnp.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]])
    >>> print(jnp.exp(joint_log_probability(cell, params, sequences)).sum().round(5))
    1.0
    """
    _check_cell("joint_log_probability", cell)
    tokens = jnp.asarray(tokens)
    errors.check_tokens(cell, tokens)
    if tokens.ndim == 0:
        raise ValueError("joint_log_probability needs tokens [*batch, time], got a single one.")
    for flags, name in ((mask, "mask"), (reset, "reset")):
        if flags is not None:
            errors.check_flags("joint_log_probability", flags, name, tokens.shape)
    if start is None:
        start = cell.zero_input(params)
    tokens, start = tokens.astype(int), jnp.asarray(start)
    errors.check_tokens(cell, start)
    if start.shape not in ((), tokens.shape[:-1]):
        raise ValueError(
            f"joint_log_probability needs one start token, or one a row {tokens.shape[:-1]}, got shape {start.shape}."
        )
    start = sharding.spread(start.astype(int)[..., None], tokens)
    mask, reset = (None if flags is None else jnp.asarray(flags) for flags in (mask, reset))
    places = masks.places(tokens.shape, mask, reset)
    before = jnp.take_along_axis(tokens, jnp.maximum(places.preceding, 0), axis=-1)
    _, logits = cell.unroll(params, masks.select(places.first, start, before), state, mask=mask, reset=reset)
    return -losses.cross_entropy(logits, tokens, mask).sum(axis=-1)


def joint_table(
    cell: Cell, params: Params, length: int, vocab_size: int, *, start: int | Int[Array, ""] | None = None
) -> Float[Array, "..."]:
    """`log p` of every sequence of a length, an array of as many axes, each `vocab_size` long, by enumeration.

    It takes O(vocab_size^length) memory: for small vocabularies and short sequences.

    >>> import jaxseq as js
    >>> cell = js.Stack((js.Embed(2, 4), js.Elman(4, 5), js.Dense(5, 2)))
    >>> table = joint_table(cell, cell.init(jax.random.key(0)), length=3, vocab_size=2)
    >>> table.shape, jnp.exp(table).sum().round(5).item()
    ((2, 2, 2), 1.0)
    """
    _check_cell("joint_table", cell)
    logits = jax.eval_shape(lambda params: cell.unroll(params, jnp.zeros(1, int))[1], params)
    if logits.shape[-1:] != (vocab_size,):
        raise ValueError(f"joint_table got vocab_size={vocab_size}, but the cell gives {logits.shape[-1]} logits.")
    if length < 1 or vocab_size**length > 2**24:
        raise ValueError(
            f"joint_table needs a length of 1 or more and at most 2**24 sequences, got length={length} and "
            f"vocab_size={vocab_size}."
        )
    sequences = jnp.stack(jnp.meshgrid(*[jnp.arange(vocab_size)] * length, indexing="ij"), axis=-1)
    return joint_log_probability(cell, params, sequences, start=start)


def _check_cell(name, cell):
    if not isinstance(cell, Cell) or cell.input_rank != 0:
        raise TypeError(f"{name} needs a Cell that reads tokens and gives logits, got {cell}.")


def free_parameters(model: Cell | int | Literal["table"], vocab_size: int, length: int) -> int:
    """How many numbers say the joint distribution of `length` tokens.

    Of a full "table" V^T - 1, one for each sequence, less one since they sum to 1. Of a Markov chain, or of its order k
    alone, `(V - 1) V^m` for each length m = 0, ..., k of the context: O(V^(k+1)), the same for all T > k. Of any other
    cell as many as it has params, for any T: the recurrence shares them.

    >>> [free_parameters("table", 10, length) for length in (1, 2, 6)]
    [9, 99, 999999]
    >>> [free_parameters(1, 10, length) for length in (1, 2, 6)]
    [9, 99, 99]
    """
    if length < 1 or vocab_size < 1:
        raise ValueError(f"free_parameters needs vocab_size >= 1 and length >= 1, got {vocab_size} and {length}.")
    if isinstance(model, MarkovChain):  # its params are sorted codes and what belongs to them
        model = model.order
    if model == "table":
        return vocab_size**length - 1
    if isinstance(model, int) and not isinstance(model, bool) and model >= 0:
        return (vocab_size - 1) * sum(vocab_size**context for context in range(min(model + 1, length)))
    if isinstance(model, Cell):
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    raise TypeError(f'free_parameters needs a Cell, the order of a chain, or "table", got {model!r}.')
