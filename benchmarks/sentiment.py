"""Networks over trees on the Stanford sentiment treebank, from random vectors, beside published figures.

python -m benchmarks.sentiment --sst FOLDER
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxseq as js
from benchmarks import tasks

RESULTS = pathlib.Path(__file__).parent / "results"
BATCH, WIDTH, LEAVES, STEPS = 25, 24, 640, 32  # so that nearly all batches have one shape
CLASSES = {"fine": 5, "binary": 2}
PUBLISHED = {  # Tai et al. 2015; Socher et al. 2013
    "Tree-LSTM": {"fine": "43.9", "binary": "82.0"},
    "RNTN": {"fine": "45.7", "binary": "85.4"},
    "recursive network": {"fine": "43.2", "binary": "82.4"},
}
TOY = """(4 (3 good) (2 film)) (0 (1 bad) (2 film)) (3 (2 a) (3 (3 good) (2 film))) (1 (2 a) (1 (1 bad) (2 film)))
(1 (1 not) (3 (2 a) (3 (3 good) (2 film)))) (3 (1 not) (1 (2 a) (1 (1 bad) (2 film)))) (2 (2 a) (2 film))"""


class Setting(NamedTuple):
    """A composition, the size of its word vectors, and how it is trained."""

    net: js.trees.Composition
    vectors: int
    rate: float
    vector_rate: float
    dropout: float
    decay: float


SETTINGS = {
    "Tree-LSTM": Setting(js.NaryTreeLSTM(300, 150), 300, rate=0.05, vector_rate=0.05, dropout=0.5, decay=1e-4),
    "RNTN": Setting(js.RNTN(25), 25, rate=0.01, vector_rate=0.1, dropout=0.0, decay=1e-4),
    "recursive network": Setting(js.Recursive(25), 25, rate=0.05, vector_rate=0.1, dropout=0.0, decay=1e-4),
}


class Params(NamedTuple):
    """Word vectors `[words, size]`, the composition, and what reads its states."""

    vectors: Any
    net: Any
    head: Any


@dataclasses.dataclass(frozen=True)
class Model:
    """Classes of all nodes of trees, from their words."""

    setting: Setting
    words: int
    classes: int

    @property
    def head(self) -> js.Stack:
        return js.Stack((js.Dropout(self.setting.dropout), js.Dense(self.setting.net.hidden_size, self.classes)))

    def init(self, key: jax.Array) -> Params:
        vector_key, net_key, head_key = jax.random.split(key, 3)
        vectors = jax.random.uniform(vector_key, (self.words, self.setting.vectors), minval=-0.05, maxval=0.05)
        return Params(vectors, self.setting.net.init(net_key), self.head.init(head_key))

    def logits(
        self, params: Params, forest: js.trees.Forest, words: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Of all rows, the leaves having the word vectors in these rows of `params.vectors`."""
        states = js.trees.evaluate(self.setting.net, params.net, forest, params.vectors[words])
        return self.head.unroll(params.head, getattr(states, "hidden", states), key=key)[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    model: Model, params: Params, squares: Params, forest: js.trees.Forest, key: jax.Array
) -> tuple[Params, Params, jax.Array]:
    """One step of Adagrad, which touches the vectors of the batch's words alone: of others the gradient is zero."""
    tokens, setting = forest.tokens[: forest.leaves], model.setting
    tokens = jnp.where(tokens < 0, model.words, tokens)  # beyond all words: read clipped, and not written
    words, places = jnp.unique(tokens, return_inverse=True, size=forest.leaves, fill_value=model.words)

    def loss(params: Params) -> jax.Array:
        logits = model.logits(params, forest, places, key)
        losses = js.losses.cross_entropy(logits, forest.labels, forest.labelled)
        return losses.sum() / len(forest.roots) + setting.decay / 2 * optax.tree.norm(params[1:], squared=True)

    own, own_squares = (tree._replace(vectors=tree.vectors[words]) for tree in (params, squares))
    value, gradients = jax.value_and_grad(loss)(own)
    own_squares = jax.tree.map(lambda square, g: square + g**2, own_squares, gradients)
    rates = Params(setting.vector_rate, setting.rate, setting.rate)
    own = Params(
        *(
            jax.tree.map(lambda p, g, square, rate=rate: p - rate * g / (jnp.sqrt(square) + 1e-10), *parts)
            for rate, *parts in zip(rates, own, gradients, own_squares, strict=True)
        )
    )
    params, squares = (
        new._replace(vectors=old.vectors.at[words].set(new.vectors))
        for old, new in ((params, own), (squares, own_squares))
    )
    return params, squares, value


@functools.partial(jax.jit, static_argnums=0)
def count_right(model: Model, params: Params, forest: js.trees.Forest) -> tuple[jax.Array, jax.Array]:
    """How many roots, and how many labelled nodes, are classified as labelled."""
    logits = model.logits(params, forest, forest.tokens[: forest.leaves])
    right = (logits.argmax(-1) == forest.labels) & forest.labelled
    return right[forest.roots].sum(), right.sum()


class Data(NamedTuple):
    """The trees of each part, and the words of the training part by how often they stand there."""

    parts: dict[str, list[js.trees.Tree]]
    words: dict[str, int]

    def token(self, once: Callable[[], bool] = lambda: True) -> Callable[[str], int]:
        """From a word to its number, 0 for words that are not trained, and for those trained once unless `once()`."""
        numbers = {word: index for index, word in enumerate(self.words, start=1)}

        def number(word: str) -> int:
            word = word.lower()
            return numbers.get(word, 0) if self.words.get(word, 2) > 1 or once() else 0

        return number


def read(folder: pathlib.Path | None) -> Data:
    """The treebank, or a few trees of the same kind without a folder."""
    if folder is None:
        trees = js.trees.parse(TOY)
        parts = {"train": trees * 10, "dev": trees, "test": trees}
    else:
        parts = {name: js.trees.read(folder / f"{name}.txt") for name in ("train", "dev", "test")}
        parts["train"] = parts["train"][:8544]  # in some copies dev follows in the same file
    words: dict[str, int] = {}
    for tree in parts["train"]:
        for word in tree.words:
            if word is not None:
                words[word.lower()] = words.get(word.lower(), 0) + 1
    return Data(parts, words)


def label_of(task: str) -> Callable[[str], int | None]:
    """From a label of the treebank to a class: one of five, or negative and positive, and none if neutral."""
    return int if task == "fine" else {"0": 0, "1": 0, "2": None, "3": 1, "4": 1}.__getitem__


def forests(
    trees: Sequence[js.trees.Tree], token: Callable[[str], int], task: str
) -> Iterator[tuple[js.trees.Forest, int]]:
    """The trees in batches, of few shapes, and how many trees are in each."""
    for start in range(0, len(trees), BATCH):
        group = trees[start : start + BATCH]
        yield (
            js.trees.batch(group, token=token, label=label_of(task), width=WIDTH, leaves=LEAVES, steps=STEPS),
            len(group),
        )


def accuracy(model: Model, params: Params, trees: Sequence[js.trees.Tree], data: Data, task: str) -> dict[str, float]:
    """Percentages of the roots and of all labelled nodes that are classified as labelled."""
    roots = nodes = labelled = 0
    for forest, _ in forests(trees, data.token(), task):
        right_roots, right_nodes = count_right(model, params, forest)
        roots, nodes, labelled = roots + right_roots, nodes + right_nodes, labelled + forest.labelled.sum()
    return {"roots": 100 * float(roots) / len(trees), "nodes": 100 * float(nodes) / float(labelled)}


def train(name: str, task: str, data: Data, seed: int, epochs: int, setting: Setting | None = None) -> dict[str, Any]:
    """Trains once: the accuracies of the epoch whose roots are best on the development part."""
    of_class = label_of(task)
    parts = {
        part: [tree for tree in trees if of_class(tree.labels[-1]) is not None] for part, trees in data.parts.items()
    }
    model = Model(setting or SETTINGS[name], len(data.words) + 1, CLASSES[task])
    random, key = np.random.default_rng(seed), jax.random.key(seed)
    params = model.init(key)
    squares = jax.tree.map(jnp.zeros_like, params)
    begun, best, chosen, curve = time.perf_counter(), -1.0, params, []
    token = data.token(lambda: random.random() < 0.5)
    paddings = []
    for epoch in range(epochs):
        order = random.permutation(len(parts["train"]))
        shuffled, total = [parts["train"][index] for index in order], 0.0
        for index, (forest, count) in enumerate(forests(shuffled, token, task)):
            step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), index)
            params, squares, value = train_step(model, params, squares, forest, step_key)
            total += float(value) * count
            paddings.append(js.trees.padding(forest))
        dev = accuracy(model, params, parts["dev"], data, task)["roots"]
        curve.append(round(dev, 2))
        print(name, task, seed, epoch, f"{total / len(order):.3f}", curve[-1], flush=True)
        if dev > best:
            best, chosen = dev, jax.tree.map(jnp.copy, params)  # the step takes its arguments' memory
    test = accuracy(model, chosen, parts["test"], data, task)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params[1:])),
        "vectors": params.vectors.size,
        "epoch": 1 + curve.index(max(curve)),
        "dev": best,
        "test": test["roots"],
        "test nodes": test["nodes"],
        "curve": curve,
        "padding": statistics.fmean(paddings),
        "minutes": (time.perf_counter() - begun) / 60,
    }


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sst", type=pathlib.Path, help="a folder with train.txt, dev.txt and test.txt; else a toy")
    parser.add_argument("--nets", nargs="+", default=["Tree-LSTM"], choices=SETTINGS)
    parser.add_argument("--tasks", nargs="+", default=list(CLASSES), choices=CLASSES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    output = options.output / "sentiment.md"
    stored = output.with_suffix(".json")
    runs = json.loads(stored.read_text()) if stored.exists() else []
    data = read(options.sst)
    for seed, name, task in itertools.product(range(options.seeds), options.nets, options.tasks):
        key = dict(net=name, task=task, seed=seed, epochs=options.epochs, trees=len(data.parts["train"]))
        if not any(key.items() <= run.items() for run in runs):
            runs.append({**key, **train(name, task, data, seed, options.epochs)})
            stored.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
            tasks.write(output, report(runs))
    return output


def report(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The paragraphs and the table of all runs."""
    columns = [
        "net",
        "task",
        "parameters",
        "rates",
        "seeds",
        "test roots: mean (lowest to highest)",
        "published",
        "dev roots",
    ]
    columns += ["test, all nodes", "best epoch", "minutes, busy machine"]
    lines = [columns, ["---", "---"] + ["---:"] * (len(columns) - 2)]
    for name, task in sorted(
        {(run["net"], run["task"]) for run in runs}, key=lambda pair: (pair[0], pair[1] != "fine")
    ):
        own = [run for run in runs if (run["net"], run["task"]) == (name, task)]
        test = [run["test"] for run in own]
        lines.append(
            [
                name,
                task,
                f"{own[0]['parameters']:,}",
                f"{SETTINGS[name].rate:g}, {SETTINGS[name].vector_rate:g}",
                f"{len(own)}",
                f"{statistics.fmean(test):.1f} ({min(test):.1f} to {max(test):.1f})",
                PUBLISHED[name][task],
                *(f"{statistics.fmean(run[column] for run in own):.1f}" for column in ("dev", "test nodes")),
                ", ".join(str(run["epoch"]) for run in own),
                f"{statistics.fmean(run['minutes'] for run in own):.0f}",
            ]
        )
    first = runs[0]
    return [
        "# Sentiment of phrases",
        tasks.where("python -m benchmarks.sentiment --sst FOLDER"),
        f"The Stanford sentiment treebank, {first['trees']:,} trees to train on, all labelled nodes of which count in "
        "the loss. Figures are percentages: how many roots of the test part (2,210, or 1,821 without the neutral ones) "
        f"are classified as labelled, after that epoch of {first['epochs']} whose roots were best on the development "
        "part. Words are in lower case, their vectors drawn at random and trained; those never seen, and in training "
        "half of those seen once, are one unknown word. Batches of 25 trees, Adagrad at the two rates in the table, of "
        "the net and of the word vectors, weights decayed by 1e-4. The Tree-LSTM has vectors of 300 numbers, 150 units "
        "and dropout of 0.5 before the classifier, as in Tai et al. 2015; the others have vectors of 25 and no "
        "dropout. Published: Tai et al. 2015, with random vectors, and Socher et al. 2013.",
        f"A batch is laid out in steps of {WIDTH} nodes, so that nearly all batches share one program: "
        f"{100 * statistics.fmean(run['padding'] for run in runs):.0f} % of the rows are padding.",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
    ]


if __name__ == "__main__":
    main()
