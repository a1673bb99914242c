"""The package as its users meet it: names, imports, README, wheel."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxseq
from tests.peers import peer

ROOT = pathlib.Path(__file__).parent.parent
OPTIONAL = {"torch", "orbax", "tyro", "rich", "matplotlib", "IPython", "haiku", "equinox"}


def public_objects(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """What a module and its submodules define or re-export from jaxseq, with the methods of classes, by dotted name."""
    for name, value in public(vars(module)):
        path = f"{module.__name__}.{name}"
        if isinstance(value, types.ModuleType):
            if value.__name__ == path:
                yield path, value
                yield from public_objects(value)
        elif getattr(value, "__module__", "").startswith("jaxseq"):
            yield path, value
            if isinstance(value, type):
                yield from public_methods(value, path)


def public_methods(owner: type, path: str) -> Iterator[tuple[str, object]]:
    """The methods and properties of a class, also those of bases that jaxseq does not export.

    Sizes and ranks, fields of one layer and properties of another, are explained once, by `SequenceLayer`.
    """
    for base in owner.__mro__:
        for name, value in public(vars(base)):
            if name in ("input_size", "output_size", "output_rank"):
                continue
            if base.__module__.startswith("jaxseq") and isinstance(value, (types.FunctionType, classmethod, property)):
                yield f"{path}.{name}", getattr(owner, name)


def public(names: Mapping[str, object]) -> list[tuple[str, object]]:
    """The items whose name starts without an underscore."""
    return [item for item in names.items() if not item[0].startswith("_")]


def own_docstring(value: object) -> str:
    """The docstring that someone wrote: not the signature that `dataclass` and `NamedTuple` put in its place."""
    doc = vars(value).get("__doc__") if isinstance(value, type) else inspect.getdoc(value)
    generated = isinstance(value, type) and (doc or "").startswith(f"{value.__name__}(")
    return "" if generated else (doc or "").strip()


def test_every_public_name_has_a_docstring():
    found = dict(public_objects(jaxseq))
    assert {"jaxseq.LSTM", "jaxseq.LSTM.unroll", "jaxseq.LSTM.step", "jaxseq.losses.cross_entropy"} <= set(found)
    assert [name for name, value in found.items() if not own_docstring(value)] == []


def imported_modules(file: pathlib.Path) -> set[str]:
    """Absolute names of all modules that a file imports, relative imports resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_core_imports_nothing_above_it():
    for file in (ROOT / "jaxseq" / "core").rglob("*.py"):
        above = {name for name in imported_modules(file) if f"{name}.".startswith("jaxseq.")}
        assert {name for name in above if not f"{name}.".startswith("jaxseq.core.")} == set(), file


def test_import_leaves_optional_dependencies_alone():
    code = f"import sys, jaxseq; print(*sorted({OPTIONAL!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_readme_opens_with_two_commands_that_set_up_everything():
    main_job, tests = blocks("README.md", "sh")[:2]
    for command in (main_job, tests):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert main_job.endswith(" && .venv/bin/jaxseq train characters\n")
    assert tests.endswith(" && .venv/bin/python -m pytest -n auto\n")  # .ci/run finds it by this ending


def run_examples(page: str) -> dict[str, Any]:
    """The names that the Python examples of a page define, run from top to bottom."""
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)
    return namespace


def test_readme_examples_run():
    namespace = run_examples("README.md")
    assert float(namespace["value"]) < 0.5  # nats: it has learned its text
    assert namespace["out"].tokens.shape == (20,)
    assert namespace["ys"].shape == (2, 50, 8)


@pytest.mark.slow
def test_gradients_page_runs():
    names = run_examples("docs/gradients.md")
    kept = names["kept"]
    assert sorted(kept, key=kept.get)[:2] == ["Elman, uniform", "LSTM, forget bias 0"]
    assert sorted(kept, key=kept.get)[-1] == "Elman, ReLU, identity"
    assert names["info"].converged and names["omega"].shape == () and len(names["points"].speed) >= 1
    assert names["value"] < 0.2


@pytest.mark.slow
def test_the_five_shapes_run():
    names = run_examples("docs/shapes.md")
    assert names["captions"].tokens.shape == (4, 10)
    assert names["points"].shape == (4, 20, 2)
    assert names["loss"].shape == ()
    assert names["tags"].shape == (4, 7, 5)
    assert names["written"].tokens.shape == (4, 9)
    assert names["logits"].shape == (4, 9, 12)
    assert all(leaf.any() for leaf in jax.tree.leaves(names["gradient"]))  # the encoder's too


@pytest.mark.slow
def test_the_designs_run():
    names = run_examples("docs/designs.md")
    assert {ys.shape for ys in (*names["taught"], *names["free"])} == {(4, 9, 3)} and names["one"].shape == (4, 3)
    assert names["shapes"] == names["around"] == {(4, 9, 8)}
    assert names["scales"] == {(4, 9, 3)} and names["levels"].shape == (4, 9, 8)


@pytest.mark.slow
def test_the_structured_page_runs():
    page = "docs/structured.md"
    names = run_examples(page)
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / page).read_text(), re.M)
    assert [tuple(map(int, row)) for row in rows] == list(zip(names["lengths"], *names["counts"].values(), strict=True))
    assert names["perplexity"] < 1.7 and names["transition"].shape == (3, 3)
    assert names["paths"].tolist() == [4**6, 4**3]
    assert (names["viterbi"] == names["states"])[names["hmm_mask"]].mean() > 0.9
    assert (jnp.diff(names["fitted"].trace) > -1e-2).all() and names["driven_likelihood"].shape == (8,)
    assert names["tagged"] == [["DET", "NOUN", "VERB"]]
    assert (names["found_tags"] == names["gold"])[names["text_mask"]].mean() > 0.95
    assert names["f1"] > 0.9 and names["read"].tokens.shape == (4, 8, 30)
    assert names["fits"].tolist() == [True, True, True, False] and jnp.isfinite(names["ctc_loss"])
    assert names["transducer_losses"].shape == (4,) and names["heard"].tokens.shape == (4, 4, 15)


@pytest.mark.slow
def test_the_memories_run():
    names = run_examples("docs/memory.md")
    assert names["wrong"] <= 5 and names["losses"][-10:].mean() < 0.2  # of 256 bits; from 0.69
    assert names["links"].shape == (1, 12, 12) and names["stacks"].actions.shape == (1, 2, 3)
    assert names["first"].support == (0,) and names["small"].story.shape == (1, 2, 5)
    assert names["answer_losses"][-10:].mean() < 0.2 and names["weights"].shape == (300, 2, 4)


def test_the_page_of_reservoirs_runs():
    names = run_examples("docs/reservoirs.md")
    assert names["error"][:20].max() < 0.1 and names["errors"].shape == (3, 6)
    assert names["apart"][0] > 100 * names["apart"][-1] and names["bounds"].necessary < 1 and names["exponent"] < 0
    assert all(map(jax.numpy.isfinite, names["slopes"])) and names["memory"].shape == (40,)


def test_wheel_ships_the_package_with_its_types_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("jaxseq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert "jaxseq/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"jaxseq"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "jaxseq = jaxseq.cli:main" in entry_points


def test_absent_peer_skips_unless_peers_are_required(monkeypatch):
    monkeypatch.delenv("JAXSEQ_REQUIRE_PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_peer is not installed"):
        peer("no_such_peer")
    monkeypatch.setenv("JAXSEQ_REQUIRE_PEERS", "1")
    with pytest.raises(ModuleNotFoundError, match="no_such_peer"):
        peer("no_such_peer")
