import numpy as np
import pytest

from jaxseq.training import data
from jaxseq.training.errors import UserError


@pytest.mark.parametrize(("length", "batch", "time"), [(50, 3, 4), (13, 3, 4), (14, 1, 13), (99, 7, 2)])
def test_streams_are_contiguous_and_targets_are_next(length: int, batch: int, time: int):
    inputs, targets = data.windows(np.arange(length), batch, time)
    assert inputs.shape == targets.shape == ((length - 1) // (batch * time), batch, time)
    streams = inputs.swapaxes(0, 1).reshape(batch, -1)
    np.testing.assert_array_equal(np.diff(streams, axis=1), 1)
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(streams[:, 0], np.arange(batch) * ((length - 1) // batch))


def test_a_text_shorter_than_a_window_is_refused():
    data.windows(np.arange(13), 3, 4)
    with pytest.raises(UserError, match=r"12 tokens .* batch 3 x time 4 needs 13; give more text"):
        data.windows(np.arange(12), 3, 4)


@pytest.mark.parametrize("start", [1, 3, 20])
@pytest.mark.parametrize("stop", [21, 22, 40])
@pytest.mark.parametrize("batch", [1, 3, 25])
def test_each_token_of_a_part_is_scored_once_after_its_predecessor(start: int, stop: int, batch: int):
    tokens = np.arange(40)
    part = data.scoring_windows(tokens, start, stop, batch=batch, time=3, context=5)
    assert sorted(part.targets[part.scored]) == list(range(start, stop))
    np.testing.assert_array_equal(part.inputs[part.scored], part.targets[part.scored] - 1)
    assert part.exists[part.scored].all()


def test_scoring_begins_with_context_where_there_is_any():
    part = data.scoring_windows(np.arange(40), 10, 40, batch=3, time=4, context=6)
    readers = part.inputs.swapaxes(0, 1).reshape(3, -1)
    assert readers[:, 0].tolist() == [3, 13, 23] and part.exists.all()
    early = data.scoring_windows(np.arange(40), 2, 8, batch=1, time=4, context=4)
    assert early.exists[0, 0].tolist() == [False, False, False, True] and early.inputs[0, 0, 3] == 0
