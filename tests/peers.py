"""Libraries that the tests compare with: optional on a user's machine, required where JAXSEQ_REQUIRE_PEERS is set."""

import importlib
import os
import types
import warnings

import pytest


def peer(name: str) -> types.ModuleType:
    """Import the library `name`; where it is absent skip the test, or fail if JAXSEQ_REQUIRE_PEERS is set."""
    if not os.environ.get("JAXSEQ_REQUIRE_PEERS"):
        return pytest.importorskip(name, reason=f"{name} is not installed; `pip install -e '.[test,bench]'` has it")
    with warnings.catch_warnings(action="ignore"):  # warnings of its own import are not ours
        return importlib.import_module(name)
