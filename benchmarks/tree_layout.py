"""How batches of trees are best laid out: padding and the time of a training step, by the nodes that a step computes.

python -m benchmarks.tree_layout --sst FOLDER
"""

import argparse
import pathlib
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxseq as js
from benchmarks import sentiment, tasks, timing


def trainer(model: sentiment.Model, groups: Sequence[Sequence[js.trees.Tree]], **layout: int) -> Callable[[], None]:
    """A call that trains on each of the groups once."""
    forests = [js.trees.batch(group, token=len, label=int, **layout) for group in groups]  # any tokens do for timing
    params = model.init(jax.random.key(0))
    state = [params, jax.tree.map(jnp.zeros_like, params)]

    def train() -> None:
        for forest in forests:
            *state[:], value = sentiment.train_step(model, *state, forest, jax.random.key(0))
        value.block_until_ready()

    return train


def heights(tree: js.trees.Tree) -> list[int]:
    """Of all inner nodes, how many nodes are below them one under the other."""
    found: list[int] = []
    for children in tree.children:
        found.append(1 + max(found[child] for child in children) if children else 0)
    return [height for height in found if height]


def by_height(groups: Sequence[Sequence[js.trees.Tree]]) -> tuple[float, float]:
    """Steps, and the share of padding, if a step computed all nodes of one height and were as wide as the widest."""
    steps, shares = [], []
    for group in groups:
        counts = np.bincount([height for tree in group for height in heights(tree)])[1:]
        leaves = sum(len(tree.leaves()) for tree in group)
        steps.append(len(counts))
        shares.append(1 - (leaves + counts.sum()) / (leaves + len(counts) * counts.max()))
    return statistics.fmean(steps), statistics.fmean(shares)


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sst", type=pathlib.Path, help="a folder with train.txt, dev.txt and test.txt; else a toy")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 24, 32, 64, 128])
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path, default=sentiment.RESULTS)
    options = parser.parse_args(arguments)
    data = sentiment.read(options.sst)
    trees = [data.parts["train"][index] for index in np.random.default_rng(0).permutation(len(data.parts["train"]))]
    groups = [trees[start : start + sentiment.BATCH] for start in range(0, len(trees), sentiment.BATCH)]
    groups = groups[: options.batches]

    model = sentiment.Model(sentiment.SETTINGS["Tree-LSTM"], len(data.words) + 1, sentiment.CLASSES["fine"])
    timed, calls, rows = groups[:4], {}, {}
    for width in options.widths:
        exact = [js.trees.batch(group, width=width, leaves=1, steps=1) for group in groups]
        rows[width] = (
            statistics.fmean(len(forest.children) for forest in exact),
            statistics.fmean(map(js.trees.padding, exact)),
        )
        most = max(len(js.trees.batch(group, width=width, leaves=1, steps=1).children) for group in timed)
        calls[str(width)] = trainer(model, timed, width=width, leaves=sentiment.LEAVES, steps=most)
    seconds = timing.interleave(calls, options.rounds, seconds=0)

    lines = ["| nodes a step | steps | padding, % | ms a training step |", "| --- | ---: | ---: | ---: |"]
    for width, (steps, share) in rows.items():
        milliseconds = 1e3 * min(seconds[str(width)]) / len(timed)
        lines.append(f"| {width} | {steps:.1f} | {100 * share:.0f} | {milliseconds:.0f} |")
    steps, share = by_height(groups)
    lines.append(f"| all of one height | {steps:.1f} | {100 * share:.0f} | |")
    nodes = statistics.fmean(sum(len(tree.labels) for tree in group) for group in groups)
    output = options.output / "tree-layout.md"
    tasks.write(
        output,
        [
            "# How batches of trees are laid out",
            tasks.where("python -m benchmarks.tree_layout --sst FOLDER"),
            f"{len(groups)} batches of {sentiment.BATCH} trees of the Stanford sentiment treebank, on average of "
            f"{nodes:.0f} nodes, laid out by `trees.batch` with as many rows and steps as each needs. The time is that "
            "of a training step of the Tree-LSTM of [sentiment.md](sentiment.md), the fastest of "
            f"{options.rounds} rounds in turns over {len(timed)} batches with {sentiment.LEAVES} rows for leaves. The "
            "last line is what a step for each height would need, as wide as the widest one.",
            "\n".join(lines),
        ],
    )
    return output


if __name__ == "__main__":
    main()
