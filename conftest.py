"""Order of the whole test run: what fails fast comes first."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick tests and the docstring examples before the slow tests."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
