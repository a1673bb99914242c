"""The benchmarks over trees: what they read, how they train, and what they write."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxseq as js
from benchmarks import sentiment, tree_layout
from tests.numbers import close


def test_reads_the_parts_and_counts_the_words(tmp_path):
    """Development trees that follow in the file of the training trees are left out."""
    (tmp_path / "train.txt").write_text("(2 (2 A) (3 film))\n" * 8543 + "(3 (2 a) (2 Film))\n" + "(0 bad)\n" * 5)
    (tmp_path / "dev.txt").write_text("(1 b)\n")
    (tmp_path / "test.txt").write_text("(1 c)\n(2 d)\n")
    data = sentiment.read(tmp_path)
    assert [len(trees) for trees in data.parts.values()] == [8544, 1, 2]
    assert data.words == {"a": 8544, "film": 8544}
    assert [data.token()(word) for word in ("A", "film", "bad")] == [1, 2, 0]
    rare = sentiment.Data({}, {"a": 2, "once": 1})
    assert [rare.token(lambda: False)(word) for word in ("a", "Once")] == [1, 0] and rare.token()("once") == 2


def test_labels_of_the_two_tasks():
    assert [sentiment.label_of("fine")(str(label)) for label in range(5)] == [0, 1, 2, 3, 4]
    assert [sentiment.label_of("binary")(str(label)) for label in range(5)] == [0, 0, None, 1, 1]


@pytest.mark.slow
def test_a_step_is_adagrad_on_all_params():
    """Also for word vectors, of which it touches those in the batch alone."""
    setting = sentiment.Setting(js.Recursive(3), 3, rate=0.1, vector_rate=0.2, dropout=0.0, decay=0.01)
    model = sentiment.Model(setting, words=6, classes=5)
    trees = js.trees.parse("(1 (2 a) (3 (0 b) (4 a))) (2 d)")
    forest = js.trees.batch(trees, token="_abcd".index, label=int, leaves=8, steps=1, width=2)

    def loss(params):
        logits = model.logits(params, forest, jnp.maximum(forest.tokens[: forest.leaves], 0))
        rows = forest.labels >= 0
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(forest.labels, 0)[:, None], 1)[:, 0]
        decayed = sum((leaf**2).sum() for leaf in jax.tree.leaves(params[1:]))
        return -jnp.where(rows, picked, 0).sum() / 2 + 0.005 * decayed

    rates = {name: optax.adagrad(rate, 0.0, 1e-20) for name, rate in (("vectors", 0.2), ("rest", 0.1))}
    optimizer = optax.multi_transform(rates, sentiment.Params("vectors", "rest", "rest"))
    params = model.init(jax.random.key(0))
    expected, moments, squares = params, optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    params = jax.tree.map(jnp.copy, params)
    for _ in range(3):
        updates, moments = optimizer.update(jax.grad(loss)(expected), moments)
        expected = optax.apply_updates(expected, updates)
        params, squares, _ = sentiment.train_step(model, params, squares, forest, jax.random.key(0))
    close(params, expected, 1e-4)
    untouched = np.array([0, 3, 5])
    np.testing.assert_array_equal(params.vectors[untouched], model.init(jax.random.key(0)).vectors[untouched])


@pytest.mark.slow
def test_writes_a_table_and_goes_on_where_it_stopped(tmp_path, capsys):
    settings = ["--epochs", "4", "--output", str(tmp_path), "--nets", "recursive network"]
    sentiment.main([*settings, "--seeds", "1"])
    once = capsys.readouterr().out.splitlines()
    output = sentiment.main([*settings, "--seeds", "2"])
    again = capsys.readouterr().out.splitlines()
    assert len(once) == len(again) == 2 * 4  # tasks, epochs: seed 0 was not trained again
    runs = json.loads(output.with_suffix(".json").read_text())
    assert [(run["task"], run["seed"]) for run in runs] == [("fine", 0), ("binary", 0), ("fine", 1), ("binary", 1)]
    for run in runs:
        assert len(run["curve"]) == 4
        assert round(run["dev"], 2) == max(run["curve"]) == run["curve"][run["epoch"] - 1]
    assert "| recursive network | fine | 1,405 | 0.05, 0.1 | 2 |" in output.read_text()


@pytest.mark.slow
def test_layouts_are_compared(tmp_path):
    settings = "--widths 2 8 --batches 2 --rounds 1 --output".split()
    text = tree_layout.main([*settings, str(tmp_path)]).read_text()
    assert text.count("\n| 2 |") == text.count("\n| 8 |") == text.count("\n| all of one height |") == 1
    (tree,) = js.trees.parse("(_ (_ (_ a) (_ b)) (_ c))")
    assert tree_layout.heights(tree) == [1, 2]
    assert tree_layout.by_height([[tree, tree]]) == (2, 0)
