"""Tasks that need a long memory, and the training that every contender gets."""

import functools
import gzip
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxseq as js
from benchmarks.timing import circumstances

Batch = tuple[jax.Array, jax.Array]
Init = Callable[[js.Cell, jax.Array], Any]


class Task(NamedTuple):
    """A task: batches, a loss of outputs, and what a model without a memory can reach."""

    draw: Callable[[jax.Array, int], Batch]  # (key, rows)
    inputs: int
    outputs: int
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (outputs [batch, time, outputs], targets)
    trivial: float
    tokens: bool = False


def adding(length: int) -> Task:
    """The sum of the two marked of `length` numbers in [0, 1); always saying 1 has a squared error of 1/6.

    Hochreiter and Schmidhuber 1997; one mark in each half as in Arjovsky et al. 2016.
    """

    def draw(key: jax.Array, rows: int) -> Batch:
        number_key, first_key, second_key = jax.random.split(key, 3)
        numbers = jax.random.uniform(number_key, (rows, length))
        first = jax.random.randint(first_key, (rows, 1), 0, length // 2)
        second = jax.random.randint(second_key, (rows, 1), length // 2, length)
        marks = (jnp.arange(length) == first) | (jnp.arange(length) == second)
        return jnp.stack([numbers, marks.astype(float)], axis=-1), (numbers * marks).sum(axis=1)

    def loss(ys: jax.Array, targets: jax.Array) -> jax.Array:
        return ((ys[:, -1, 0] - targets) ** 2).mean()

    return Task(draw, 2, 1, loss, trivial=1 / 6)


def copying(delay: int) -> Task:
    """Ten symbols of eight, then `delay` blanks, then the ten again: 10 ln 8 / (delay + 20) nats without a memory.

    Hochreiter and Schmidhuber 1997, as in Arjovsky et al. 2016 and Bai et al. 2018.
    """
    blank, go = 8, 9

    def draw(key: jax.Array, rows: int) -> Batch:
        symbols = jax.random.randint(key, (rows, 10), 0, 8)
        xs = jnp.full((rows, delay + 20), blank).at[:, :10].set(symbols).at[:, delay + 9].set(go)
        return xs, jnp.full((rows, delay + 20), blank).at[:, -10:].set(symbols)

    def loss(ys: jax.Array, targets: jax.Array) -> jax.Array:
        return js.losses.cross_entropy(ys, targets).mean()

    return Task(draw, 10, 9, loss, trivial=10 * float(jnp.log(8)) / (delay + 20), tokens=True)


def digits(folder: pathlib.Path, part: str = "train") -> Task:
    """Handwritten digits pixel by pixel, 14 x 14 after averaging 2 x 2, in the order of the rows: 196 steps.

    `folder` holds the files of MNIST, such as train-images-idx3-ubyte.gz; `part` is "train" or "t10k".
    """

    def read(kind: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{part}-{kind}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    labels = jnp.asarray(read("labels-idx1", 8))
    images = read("images-idx3", 16).reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196)
    images = jnp.asarray(images.astype(np.uint8))

    def draw(key: jax.Array, rows: int) -> Batch:
        chosen = jax.random.randint(key, (rows,), 0, len(labels))
        return images[chosen, :, None] / 255, labels[chosen].astype(int)

    def loss(ys: jax.Array, targets: jax.Array) -> jax.Array:
        return js.losses.cross_entropy(ys[:, -1], targets).mean()

    return Task(draw, 1, 10, loss, trivial=float(jnp.log(10)))


def agreement(distance: int) -> Task:
    """Singular or plural (the cat ... was, the cats ... were) after `distance` other words."""

    def draw(key: jax.Array, rows: int) -> Batch:
        subject_key, word_key = jax.random.split(key)
        subjects = jax.random.bernoulli(subject_key, shape=(rows, 1)).astype(int)
        words = jax.random.randint(word_key, (rows, distance), 2, 12)  # ten other words
        return jnp.concatenate([subjects, words], axis=1), subjects[:, 0]

    def loss(ys: jax.Array, targets: jax.Array) -> jax.Array:
        return js.losses.cross_entropy(ys[:, -1], targets).mean()

    return Task(draw, 12, 2, loss, trivial=float(jnp.log(2)), tokens=True)


def default(cell: js.Cell, key: jax.Array) -> Any:
    """The params that `init` makes."""
    return cell.init(key)


def identity(cell: js.Cell, key: jax.Array) -> Any:
    """Recurrent kernels that hand the state on as it is."""
    return js.initializers.identity(cell, cell.init(key))


def forget(value: float) -> Init:
    """Biases of forget gates that start at `value`."""
    return lambda cell, key: js.initializers.forget_bias(cell, cell.init(key), value)


def chrono(max_time: float) -> Init:
    """Biases of forget gates for memories of up to `max_time` steps."""
    return lambda cell, key: js.initializers.chrono(cell, cell.init(key), key, max_time=max_time)


def size(cell: js.Cell) -> int:
    """How many parameters a cell has."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.init, jax.random.key(0))))


def where() -> str:
    """The command, the date and the machine, in a sentence."""
    report = circumstances(["jax", "optax"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`{report['command']}` on {report['date']}: {report['processor']}, {report['cores']} cores, {versions}."


def model(task: Task, *cells: js.Cell, inputs: int) -> js.Cell:
    """Cells between what reads the task's inputs, `inputs` features wide, and what gives its outputs."""
    first = js.OneHot(task.inputs) if task.tokens else js.Map("identity")
    return js.Stack((first, *cells, js.Dense(inputs, task.outputs)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(task: Task, cell: js.Cell, batch: int, params: Any, keys: jax.Array, rate: jax.Array) -> Any:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss(params, key):
        xs, targets = task.draw(key, batch)
        _, ys = cell.unroll(params, xs)
        return task.loss(ys, targets)

    def update(carry, key):
        params, moments = carry
        value, gradients = jax.value_and_grad(loss)(params, key)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), value

    (params, _), values = jax.lax.scan(update, (params, optimizer.init(params)), keys)
    return params, values


def train(
    task: Task,
    cell: js.Cell,
    *,
    steps: int,
    seed: int = 0,
    batch: int = 32,
    rate: float = 2e-3,
    init: Init | None = None,
) -> tuple[Any, jax.Array, float]:
    """The trained params, the losses of the steps, and the seconds they took, compiling included."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    began = time.perf_counter()
    params, values = _train(
        task, cell, batch, (init or default)(cell, init_key), jax.random.split(train_key, steps), rate
    )
    values.block_until_ready()
    return params, values, time.perf_counter() - began


def error(task: Task, cell: js.Cell, params: Any, rows: int = 1000) -> float:
    """The loss on `rows` new examples."""
    xs, targets = task.draw(jax.random.key(12345), rows)
    return float(task.loss(cell.unroll(params, xs)[1], targets))
