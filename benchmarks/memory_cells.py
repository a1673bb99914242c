"""Cells with an explicit memory on tasks of the neural Turing machine: copying, and associative recall.

python -m benchmarks.memory_cells
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxseq as js
from benchmarks import tasks

RESULTS = pathlib.Path(__file__).parent / "results"
CHUNK = 100  # steps of training in one compiled loop, and between two lines of progress


class Examples(NamedTuple):
    """Inputs, and the bits to give at the steps of the mask."""

    xs: jax.Array  # [batch, time, features]
    bits: jax.Array  # [batch, time, bits]
    mask: jax.Array  # [batch, time]


class Task(NamedTuple):
    """A task of a size, the shortest and longest it is trained on, and those it is tested on."""

    draw: Callable[[jax.Array, int, int, int], Examples]  # (key, rows, shortest, longest)
    inputs: int
    outputs: int
    train: tuple[int, int]
    test: tuple[int, ...]
    steps: int
    rate: float
    clip: float  # of the norm of a gradient
    heads: int  # that read, and that write
    about: str


def copy(key: jax.Array, rows: int, shortest: int, longest: int) -> Examples:
    """Vectors of 8 bits, a mark, and then, without any input, the vectors again."""
    length_key, bit_key = jax.random.split(key)
    length = jax.random.randint(length_key, (rows, 1), shortest, longest + 1)
    vectors = jax.random.bernoulli(bit_key, shape=(rows, longest, 8)).astype(float)
    step = jnp.arange(2 * longest + 1)[None]
    shown = jnp.pad(vectors, ((0, 0), (0, longest + 1), (0, 0))) * (step < length)[..., None]
    xs = jnp.concatenate([shown, (step == length)[..., None].astype(float)], axis=-1)
    mask = (step > length) & (step <= 2 * length)
    source = jnp.where(mask, step - length - 1, 0)
    return Examples(xs, jnp.take_along_axis(vectors, source[..., None], axis=1), mask)


def recall(key: jax.Array, rows: int, shortest: int, longest: int) -> Examples:
    """Items of 3 vectors of 6 bits, a mark before each; then between two other marks one of them: give the next."""
    count_key, bit_key, query_key = jax.random.split(key, 3)
    count = jax.random.randint(count_key, (rows, 1), shortest, longest + 1)
    items = jax.random.bernoulli(bit_key, shape=(rows, longest, 3, 6)).astype(float)
    chosen = jax.random.randint(query_key, (rows, 1), 0, count - 1)
    query, answer = (jnp.take_along_axis(items, at[..., None, None], axis=1)[:, 0] for at in (chosen, chosen + 1))
    step = jnp.arange(4 * longest + 8)[None]
    place = jnp.broadcast_to(step % 4 - 1, (rows, step.size))  # within an item, -1 at its mark
    listed = step < 4 * count
    asked = ~listed & (step < 4 * count + 4)
    end, mask = step == 4 * count + 4, (step > 4 * count + 4)

    def at(vectors: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(vectors, index[..., None], axis=1)

    item = jnp.where(listed, step // 4 * 3 + jnp.maximum(place, 0), 0)
    bits = jnp.where(listed[..., None], at(items.reshape(rows, -1, 6), item), at(query, jnp.maximum(place, 0)))
    bits = jnp.where(((listed | asked) & (place >= 0))[..., None], bits, 0)
    marks = jnp.stack([listed & (place < 0), (asked & (place < 0)) | end], axis=-1)
    xs = jnp.concatenate([bits, marks.astype(float)], axis=-1)
    target = at(answer, jnp.clip(step - 4 * count - 5, 0, 2))
    return Examples(xs, target, mask & (step <= 4 * count + 7))


TASKS = {
    "copy": Task(
        copy,
        inputs=9,
        outputs=8,
        train=(1, 20),
        test=(10, 20, 40, 80),
        steps=2000,
        rate=2e-3,
        clip=10.0,
        heads=1,
        about="Vectors of 8 random bits, a mark, and then the vectors again. Trained on 1 to 20 of them.",
    ),
    "recall": Task(
        recall,
        inputs=8,
        outputs=6,
        train=(2, 6),
        test=(6, 8, 10, 12),
        steps=8000,
        rate=1e-3,
        clip=0.1,
        heads=2,
        about="Items of 3 vectors of 6 random bits, then one of them: the item that followed it. Trained on 2 to 6.",
    ),
}


def contenders(task: Task) -> dict[str, js.Cell]:
    """Cells that read the inputs of a task and give the logits of its bits."""
    n, read, heads = task.inputs, 20 * task.heads, task.heads

    def machine(controller: js.Cell) -> js.Cell:
        memory = js.NTM(controller, 128, 20, read_heads=heads, write_heads=heads)
        return js.Stack((memory, js.Dense(100 + read, task.outputs)))

    return {
        "NTM, feed-forward controller": machine(js.Stack((js.Dense(n + read, 100), js.Map("tanh")))),
        "NTM, LSTM controller": machine(js.LSTM(n + read, 100)),
        "LSTM alone": js.Stack((js.LSTM(n, 100), js.Dense(100, task.outputs))),
    }


def loss(cell: js.Cell, params: Any, examples: Examples) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy in nats a bit, and the wrong bits of each sequence."""
    _, logits = cell.unroll(params, examples.xs)
    mask = jnp.broadcast_to(examples.mask[..., None], logits.shape)
    nats = jnp.where(mask, optax.sigmoid_binary_cross_entropy(logits, examples.bits), 0)
    wrong = mask & ((logits > 0) != (examples.bits > 0.5))
    return nats.sum() / mask.sum(), wrong.sum(axis=(1, 2))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(name: str, cell: js.Cell, rows: int, carry: Any, keys: jax.Array, rate: float, steps: int) -> Any:
    """The params and moments after a step for each key, and the losses."""
    task = TASKS[name]
    optimizer = optimizer_of(name, rate, steps)

    def update(carry: Any, key: jax.Array) -> Any:
        params, moments = carry
        examples = task.draw(key, rows, *task.train)
        (value, _), gradients = jax.value_and_grad(functools.partial(loss, cell), has_aux=True)(params, examples)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), value

    return jax.lax.scan(update, carry, keys)


def optimizer_of(name: str, rate: Any, steps: Any) -> optax.GradientTransformation:
    """Adam at a rate that falls to 0 over all steps."""
    return optax.chain(optax.clip_by_global_norm(TASKS[name].clip), optax.adam(lambda step: rate * (1 - step / steps)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def wrong_bits(name: str, cell: js.Cell, rows: int, size: int, params: Any, key: jax.Array) -> jax.Array:
    """The wrong bits of each of `rows` new sequences of a size."""
    return loss(cell, params, TASKS[name].draw(key, rows, size, size))[1]


def train_once(name: str, label: str, seed: int, steps: int, rows: int, rate: float) -> dict[str, Any]:
    """Trains a contender: how soon its loss was low, and its wrong bits by size."""
    task, cell = TASKS[name], contenders(TASKS[name])[label]
    init_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    params = cell.init(init_key)
    carry, losses, begun = (params, optimizer_of(name, rate, steps).init(params)), [], time.perf_counter()
    for chunk in range(-(-steps // CHUNK)):
        keys = jax.random.split(jax.random.fold_in(train_key, chunk), min(CHUNK, steps - chunk * CHUNK))
        carry, values = train(name, cell, rows, carry, keys, rate, steps)
        losses.append(float(values.mean()))
        print(f"{name}, {label}, seed {seed}: {(chunk + 1) * CHUNK} steps, loss {losses[-1]:.5f}", flush=True)
    below = [chunk for chunk, value in enumerate(losses) if value < 0.01]
    sizes = {size: wrong_bits(name, cell, 100, size, carry[0], test_key) for size in task.test}
    return {
        "parameters": tasks.size(cell),
        "loss": losses[-1],
        "learned_after": (below[0] + 1) * CHUNK if below else None,
        "minutes": (time.perf_counter() - begun) / 60,
        "wrong": {str(size): float(wrong.mean()) for size, wrong in sizes.items()},
        "perfect": {str(size): float(100 * (wrong == 0).mean()) for size, wrong in sizes.items()},
    }


def table(name: str, runs: Sequence[dict[str, Any]]) -> str:
    """A row for each contender: how soon it learned the task, and its errors by size."""
    sizes = [str(size) for size in TASKS[name].test]
    columns = ["cell", "parameters", "seeds", "learned by", "steps until then"]
    columns += [f"wrong bits at {size}" for size in sizes] + [f"% perfect at {size}" for size in sizes]
    rows = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for label in contenders(TASKS[name]):
        own = [run for run in runs if run["cell"] == label]
        if not own:
            continue
        needed = [run["learned_after"] for run in own if run["learned_after"] is not None]
        row = [label, f"{own[0]['parameters']:,}", str(len(own)), str(len(needed)), spread(needed, "{:.0f}")]
        row += [spread([run["wrong"][size] for run in own], "{:.2f}") for size in sizes]
        row += [spread([run["perfect"][size] for run in own], "{:.0f}") for size in sizes]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spread(figures: Sequence[float], form: str) -> str:
    """The median, and the lowest and highest if there are several."""
    if not figures:
        return "-"
    middle, low, high = (form.format(value) for value in (statistics.median(figures), min(figures), max(figures)))
    return middle if low == high else f"{middle} ({low} to {high})"


def report(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The paragraphs around the tables of all runs."""
    parts = [
        "# Cells with an explicit memory",
        tasks.where("python -m benchmarks.memory_cells"),
        "The memory has 128 places of 20 numbers; controllers and the LSTM beside them have 100 units. Adam at a rate "
        "that falls to 0, each batch new. Learned means that the mean loss of 100 steps fell below 0.01 nats a bit. "
        "Tested on 100 new sequences of each size after the last step: the wrong bits of a sequence, and the sequences "
        "without any. Where there are several seeds: median (lowest to highest).",
    ]
    for name in TASKS:
        own = [run for run in runs if run["task"] == name]
        if own:
            task, run = TASKS[name], own[0]
            budget = (
                f"{run['steps']} steps of {run['rows']} sequences from a rate of {run['rate']:g}, gradients clipped "
            )
            budget += f"at a norm of {task.clip:g}; heads: {task.heads} to read, {task.heads} to write."
            parts += [f"## {name.capitalize()}", f"{task.about} {budget}", table(name, own)]
    return parts


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the cells to run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="another budget, for all tasks")
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--rate", type=float, help="another one, for all tasks")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    output = options.output / "memory-cells.md"
    stored = output.with_suffix(".json")
    runs = json.loads(stored.read_text()) if stored.exists() else []
    for seed in range(options.seeds):
        for name in options.tasks:
            steps, rate = options.steps or TASKS[name].steps, options.rate or TASKS[name].rate
            for label in contenders(TASKS[name]):
                key = dict(task=name, cell=label, seed=seed, steps=steps, rows=options.rows, rate=rate)
                if not any(part in label for part in options.only) or any(key.items() <= run.items() for run in runs):
                    continue
                runs.append({**key, **train_once(name, label, seed, steps, options.rows, rate)})
                stored.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
                tasks.write(output, report(runs))
    return output


if __name__ == "__main__":
    main()
