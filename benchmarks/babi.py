"""End-to-end memory networks on the bAbI tasks.

python -m benchmarks.babi --babi FOLDER
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxseq as js
from benchmarks import tasks
from jaxseq.training import questions as babi
from jaxseq.training.errors import UserError

RESULTS = pathlib.Path(__file__).parent / "results"
BATCH, MEMORY, CLIP, NOISE = 32, 50, 40.0, 0.1
PUBLISHED = {"single": 13.8, "joint": 12.4}
QUICK = (1, 4, 16)  # the last is not learned without a linear start


class Schedule(NamedTuple):
    """Epochs with a linear start, those after it, and after how many of these the rate is halved."""

    size: int
    linear: int
    epochs: int
    halve: int
    linear_rate: float = 0.005
    rate: float = 0.01


SINGLE = Schedule(size=20, linear=20, epochs=100, halve=25)
JOINT = Schedule(size=50, linear=30, epochs=60, halve=15)


def files(folder: pathlib.Path, task: int) -> list[pathlib.Path]:
    """The training and test file of a task; one in the subfolder "v1.2" takes the place of that beside it."""
    found = []
    for part in ("train", "test"):
        paths = [*folder.glob(f"v1.2/qa{task}_*_{part}.txt"), *folder.glob(f"qa{task}_*_{part}.txt")]
        if not paths:
            raise UserError(f"{folder} has no file qa{task}_*_{part}.txt")
        found.append(paths[0])
    return found


def name_of(folder: pathlib.Path, task: int) -> str:
    """What a task is called."""
    return files(folder, task)[0].name.split("_")[1].replace("-", " ")


def batch_loss(network: js.MemoryNetwork, params: Any, batch: Any, linear: Any, key: jax.Array) -> jax.Array:
    """The sum of the cross-entropies of a batch, as the rate of the paper is for sums."""
    story, mask, question, question_mask, answer = batch
    logits, _ = network.answer(
        params, story, question, mask=mask, question_mask=question_mask, linear=linear, noise=NOISE, key=key
    )
    return js.losses.cross_entropy(logits, answer).sum()


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, None, None, None))
def train_epoch(network: Any, params: Any, key: jax.Array, data: Any, linear: Any, rate: Any) -> Any:
    """One epoch of gradient descent, the same of each restart: the params, and the mean loss of a question."""
    count = data[0].shape[0]
    order_key, noise_key = jax.random.split(key)
    order = jax.random.permutation(order_key, count)[: count // BATCH * BATCH].reshape(-1, BATCH)

    def clipped(slope):  # each table by itself, as the authors do
        norm = jnp.sqrt((slope**2).sum(axis=(-2, -1), keepdims=True))
        return slope * CLIP / jnp.maximum(norm, CLIP)

    def update(params, given):
        rows, key = given
        batch = jax.tree.map(lambda leaf: leaf[rows], data)
        loss, gradients = jax.value_and_grad(functools.partial(batch_loss, network))(params, batch, linear, key)
        return jax.tree.map(lambda leaf, slope: leaf - rate * clipped(slope), params, gradients), loss

    params, losses = jax.lax.scan(update, params, (order, jax.random.split(noise_key, len(order))))
    return params, losses.sum() / order.size


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, None))
def predict(network: Any, params: Any, data: Any) -> tuple[jax.Array, jax.Array]:
    """Which questions each restart answers wrongly, and their losses."""

    def one(item):
        story, mask, question, question_mask, answer = item
        logits, _ = network.answer(params, story, question, mask=mask, question_mask=question_mask)
        return logits.argmax(-1) != answer, js.losses.cross_entropy(logits, answer)

    return jax.lax.map(one, data, batch_size=250)


def train(
    network: js.MemoryNetwork, schedule: Schedule, data: Any, restarts: int, seed: int = 0, about: str = ""
) -> tuple[Any, jax.Array]:
    """The trained params of all restarts, and their mean losses in the last epoch."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params, loss = jax.vmap(network.init)(jax.random.split(init_key, restarts)), jnp.zeros(restarts)
    for epoch in range(schedule.linear + schedule.epochs):
        linear = epoch < schedule.linear
        halvings = 0 if linear else (epoch - schedule.linear) // schedule.halve
        rate = schedule.linear_rate if linear else schedule.rate / 2**halvings
        keys = jax.random.split(jax.random.fold_in(train_key, epoch), restarts)
        params, loss = train_epoch(network, params, keys, data, linear, rate)
        if epoch % 10 == 9:
            print(f"{about}: epoch {epoch + 1}, loss {float(loss.min()):.4f} to {float(loss.max()):.4f}", flush=True)
    return params, loss


def run(folder: pathlib.Path, kind: str, task: int, hops: int, restarts: int, epochs: int | None) -> dict[str, Any]:
    """Trains one network on a task, or on all for task 0: errors of each restart, and of the one that is chosen."""
    chosen_tasks = range(1, 21) if kind == "joint" else (task,)
    parts = [[babi.read(path) for path in files(folder, number)] for number in chosen_tasks]
    items = [item for part in parts for half in part for item in half]
    sentences = min(MEMORY, max(len(item.story) for item in items))
    width = max(len(sentence) for item in items for sentence in (*item.story, item.question))
    words = babi.vocabulary(items)
    train_data = tuple(babi.arrays([item for part in parts for item in part[0]], words, sentences, width))
    schedule = JOINT if kind == "joint" else SINGLE
    if epochs:
        schedule = schedule._replace(epochs=epochs, linear=max(1, epochs // 5), halve=max(1, epochs // 4))
    network = js.MemoryNetwork(len(words), schedule.size, sentences, hops=hops, empty_places=True)
    begun = time.perf_counter()
    params, losses = train(network, schedule, train_data, restarts, about=f"{kind}, task {task}, {hops} hops")
    train_wrong, train_losses = predict(network, params, train_data)
    chosen = int(train_losses.mean(axis=1).argmin())
    errors = {}
    for number, part in zip(chosen_tasks, parts, strict=True):
        wrong, _ = predict(network, params, tuple(babi.arrays(part[1], words, sentences, width)))
        errors[str(number)] = [round(float(value), 2) for value in 100 * wrong.mean(axis=1)]
    return {
        "train_error": [round(float(value), 2) for value in 100 * train_wrong.mean(axis=1)],
        "train_loss": [float(value) for value in train_losses.mean(axis=1)],
        "chosen": chosen,
        "test_errors": errors,
        "minutes": (time.perf_counter() - begun) / 60,
    }


def find(runs: Sequence[dict[str, Any]], number: int, **wanted: Any) -> tuple[float, list[float]] | None:
    """The test error of the chosen restart on a task, and those of all, of the run that is wanted."""
    for one in runs:
        if wanted.items() <= one.items() and str(number) in one["test_errors"]:
            errors = one["test_errors"][str(number)]
            return errors[one["chosen"]], errors
    return None


def report(folder: pathlib.Path, runs: Sequence[dict[str, Any]]) -> list[str]:
    """The paragraphs and tables of all runs."""
    numbers = sorted({int(number) for one in runs for number in one["test_errors"]})

    def cell(found: tuple[float, list[float]] | None) -> str:
        if found is None:
            return ""
        chosen, errors = found
        return f"{chosen:.1f}" + (f" ({min(errors):.1f} to {max(errors):.1f})" if len(errors) > 1 else "")

    rows = [["task", "single", "joint"], ["---", "---:", "---:"]]
    columns: dict[str, list[float]] = {"single": [], "joint": []}
    for number in numbers:
        found = {
            "single": find(runs, number, kind="single", hops=3, task=number),
            "joint": find(runs, number, kind="joint"),
        }
        for kind, value in found.items():
            columns[kind] += [] if value is None else [value[0]]
        rows.append([f"{number} {name_of(folder, number)}", *map(cell, found.values())])
    means = [f"**{np.mean(values):.1f}** ({len(values)} tasks)" if values else "" for values in columns.values()]
    failed = [str(sum(value > 5 for value in values)) if values else "" for values in columns.values()]
    rows += [["**mean**", *means], ["tasks with more than 5 %", *failed]]
    rows.append(["published mean", *(str(PUBLISHED[kind]) for kind in columns)])
    hops = [["task", "1 hop", "2 hops", "3 hops"], ["---", "---:", "---:", "---:"]]
    for number in [number for number in numbers if number <= 3]:
        found = [find(runs, number, kind="single", task=number, hops=count) for count in (1, 2, 3)]
        hops.append([f"{number} {name_of(folder, number)}", *map(cell, found)])

    def table(rows: list[list[str]]) -> str:
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    counts = {kind: {one["restarts"] for one in runs if one["kind"] == kind} for kind in ("single", "joint")}
    said = "; ".join(f"{kind} {'/'.join(map(str, sorted(found)))}" for kind, found in counts.items() if found)
    return [
        "# Memory networks on the bAbI tasks",
        tasks.where("python -m benchmarks.babi --babi FOLDER --joint"),
        "1000 questions a task to train and 1000 to test (en-1k), version 1.2: the files of version 1.1, of which task "
        "16 alone was replaced. `MemoryNetwork` with 3 hops, adjacent tying, position encoding, a linear start and "
        "random noise (PE LS RN of the paper), empty places in its memory, the last 50 sentences. Single: a network of "
        "20 features for each task; 20 epochs without the softmax at a rate of 0.005, then 100 at 0.01, halved every "
        "25. Joint: one of 50 features for all; 30 and 60 epochs, halved every 15. Gradient descent on sums over 32 "
        f"questions, each table's clipped at a norm of {CLIP:.0f}. Of several restarts ({said}) that with the lowest "
        "loss in training is chosen, without a look at test questions.",
        "## Test errors in %",
        "The chosen restart, and in brackets the lowest and highest of all restarts. Published: Sukhbaatar et al. "
        "2015, 10 restarts.",
        table(rows),
        "## Hops",
        table(hops),
    ]


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--babi", type=pathlib.Path, required=True, help="a folder with qa1_..._train.txt and so on")
    parser.add_argument("--tasks", nargs="+", type=int, help="some of the tasks 1 to 20, one network each")
    parser.add_argument("--quick", action="store_true", help=f"tasks {QUICK} alone with 3 restarts: minutes")
    parser.add_argument("--joint", action="store_true", help="also one network for all tasks, which takes hours")
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--joint-restarts", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="another budget, after a linear start of a fifth of it")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    restarts = 3 if options.quick else options.restarts
    chosen = options.tasks or (QUICK if options.quick else range(1, 21))
    wanted = [("single", task, 3, restarts) for task in chosen]
    wanted += [("single", task, hops, restarts) for task in chosen if task <= 3 for hops in (1, 2)]
    wanted += [("joint", 0, 3, options.joint_restarts)] * options.joint
    output = options.output / "babi.md"
    stored = output.with_suffix(".json")
    runs = json.loads(stored.read_text()) if stored.exists() else []
    shown = []
    for kind, task, hops, count in wanted:
        key = dict(kind=kind, task=task, hops=hops, restarts=count, epochs=options.epochs)
        if not any(key.items() <= one.items() for one in runs):
            runs.append({**key, **run(options.babi, kind, task, hops, count, options.epochs)})
            stored.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
        shown.append(next(one for one in runs if key.items() <= one.items()))
        tasks.write(output, report(options.babi, shown))
    return output


if __name__ == "__main__":
    main()
