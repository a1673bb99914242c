"""Order of the whole test run, and what stays together where it is spread over processes (`pytest -n auto`)."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests and docstring examples before slow tests; a file, or one `name` in it, shares what it compiles."""
    first: dict[str, int] = {}  # where the tests of a group begin
    for index, item in enumerate(items):
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        group = f"{item.path}-{parameters.get('name', '')}"
        first.setdefault(group, index)
        item.add_marker(pytest.mark.xdist_group(group))
        item.stash[_BEGIN] = first[group]
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, item.stash[_BEGIN]))


_BEGIN = pytest.StashKey[int]()
