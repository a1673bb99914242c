"""Windows of tokens for truncated back-propagation through time, and for scoring a part of a text."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxseq.training.errors import UserError


class Windows(NamedTuple):
    """Windows in the order in which they are read; the state at the end of one is where the next goes on."""

    inputs: Int[np.ndarray, "windows batch time"]
    targets: Int[np.ndarray, "windows batch time"]


class ScoringWindows(NamedTuple):
    """Windows that score each token of a part once; `exists` marks inputs, `scored` the targets that count."""

    inputs: Int[np.ndarray, "windows batch time"]
    targets: Int[np.ndarray, "windows batch time"]
    exists: Bool[np.ndarray, "windows batch time"]
    scored: Bool[np.ndarray, "windows batch time"]


def windows(tokens: Int[np.ndarray, " length"], batch: int, time: int, unit: str = "token") -> Windows:
    """Cuts a text into `batch` streams, and the streams into windows of `time` steps; targets are the next tokens.

    Stream b is the b-th contiguous part of the text, so a state carried from window to window stays in its stream.
    What does not fill a window at the end of a stream is left out.

    Raises:
        UserError: if the tokens, called by their `unit`, do not fill one window.

    >>> inputs, targets = windows(np.arange(10), batch=2, time=2)
    >>> inputs.tolist()
    [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    >>> targets[1].tolist()
    [[3, 4], [7, 8]]
    """
    count = (len(tokens) - 1) // (batch * time)
    if count < 1:
        raise UserError(
            f"{len(tokens):,} {unit}s of training text do not fill one window: batch {batch} x time {time} needs "
            f"{batch * time + 1:,}; give more text or a smaller batch or time"
        )
    length = (len(tokens) - 1) // batch

    def cut(stream: np.ndarray) -> np.ndarray:
        stream = stream[: batch * length].reshape(batch, length)[:, : count * time]
        return np.ascontiguousarray(stream.reshape(batch, count, time).swapaxes(0, 1))

    return Windows(cut(tokens[:-1]), cut(tokens[1:]))


def scoring_windows(
    tokens: Int[np.ndarray, " length"], start: int, stop: int, *, batch: int, time: int, context: int
) -> ScoringWindows:
    """Windows that score each of the tokens `start` to `stop` exactly once, each with all that stands before it.

    The part is read by `batch` readers at once. Each begins `context` tokens before the first that it scores, to
    warm up its state, so the first tokens of the part are scored in the light of the text before it. `start` is at
    least 1: the first token of a text has nothing before it.

    >>> part = scoring_windows(np.arange(9), 3, 9, batch=2, time=2, context=1)
    >>> part.targets[part.scored].tolist(), part.inputs[:, 1].tolist()
    ([3, 6, 4, 5, 7, 8], [[4, 5], [6, 7]])
    """
    share = -(-(stop - start) // batch)
    count = -(-(context + share) // time)
    first = start + share * np.arange(batch)[:, None]
    position = first - context + np.arange(count * time)
    scored = (position >= first) & (position < np.minimum(first + share, stop))
    exists = position >= 1
    position = np.clip(position, 1, max(len(tokens) - 1, 1))

    def cut(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.reshape(batch, count, time).swapaxes(0, 1))

    return ScoringWindows(cut(tokens[position - 1]), cut(tokens[position]), cut(exists), cut(scored & exists))
