from typing import Any

import pytest

from jaxseq.training.forms import find_fault

FORM = {
    "name": (str, type(None)),
    "count": int,
    "rate": float,
    "sizes": [int],
    "bits": {"first": {}, ...: {...: float}},
}
GOOD = {"name": None, "count": 2, "rate": 1, "sizes": [], "bits": {"first": {"any": "thing"}, "test": {"a": 0.5}}}


def test_values_of_the_form_have_no_fault():
    assert find_fault(GOOD, FORM) is None
    assert find_fault({**GOOD, "name": "a", "sizes": [1, 2], "more": []}, FORM) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"name": 3}, "name"),
        ({"count": 2.0}, "count"),
        ({"count": True}, "count"),
        ({"rate": False}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": float("-inf")}, "rate"),
        ({"rate": 10**400}, "rate"),
        ({"sizes": {}}, "sizes"),
        ({"sizes": [1, None]}, "sizes.1"),
        ({"bits": [1]}, "bits"),
        ({"bits": {}}, "bits.first"),
        ({"bits": {"first": 3}}, "bits.first"),
        ({"bits": {"first": {}, "test": {"a": "b"}}}, "bits.test.a"),
    ],
)
def test_a_fault_is_named(change: dict[str, Any], fault: str):
    assert find_fault({**GOOD, **change}, FORM) == fault
