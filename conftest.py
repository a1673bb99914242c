"""Order of the whole test run, and what stays together where it is spread over processes (`pytest -n auto`)."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests and docstring examples before slow tests; a file, or one `name` in it, shares what it compiles."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        item.add_marker(pytest.mark.xdist_group(f"{item.path}-{parameters.get('name', '')}"))
