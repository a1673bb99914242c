"""Tasks that need a long memory, and the training that every contender gets."""

import functools
import gzip
import pathlib
from collections.abc import Callable, Iterable
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
    """A task: batches, a loss of outputs, and what a model without a memory can reach.

    `score` of test examples is what is reported, by default the loss; `test` gives them, by default 1000 new ones.
    """

    draw: Callable[[jax.Array, int], Batch]  # (key, rows)
    inputs: int
    outputs: int
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (outputs [batch, time, outputs], targets)
    trivial: float
    tokens: bool = False
    score: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    test: Callable[[], Batch] | None = None


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


def read_digits(folder: pathlib.Path, part: str, side: int) -> tuple[jax.Array, jax.Array]:
    """Images `[image, side * side]` of 0 to 255, row by row, and labels, from the files of MNIST in `folder`.

    The files are called `train-images-idx3-ubyte.gz` and so on, `part` is "train" or "t10k". At `side` 14 the images of
    28 x 28 are averaged 2 x 2.
    """

    def read(kind: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{part}-{kind}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    parts = 28 // side
    images = read("images-idx3", 16).reshape(-1, side, parts, side, parts).mean(axis=(2, 4)).reshape(-1, side * side)
    return jnp.asarray(images.astype(np.uint8)), jnp.asarray(read("labels-idx1", 8).astype(int))


def digits(folder: pathlib.Path, side: int) -> Task:
    """Handwritten digits, a pixel a step: 196 steps at `side` 14, 784 at 28.

    The score is the percentage of the test images, each once, that it gets wrong. Q. V. Le et al. 2015.
    """
    images, labels = read_digits(folder, "train", side)

    def draw(key: jax.Array, rows: int) -> Batch:
        chosen = jax.random.randint(key, (rows,), 0, len(labels))
        return images[chosen, :, None] / 255, labels[chosen]

    def test() -> Batch:
        images, labels = read_digits(folder, "t10k", side)
        return images[..., None] / 255, labels

    def loss(ys: jax.Array, targets: jax.Array) -> jax.Array:
        return js.losses.cross_entropy(ys[:, -1], targets).mean()

    def wrong(ys: jax.Array, targets: jax.Array) -> jax.Array:
        return 100 * (ys[:, -1].argmax(-1) != targets).mean()

    return Task(draw, 1, 10, loss, trivial=90, score=wrong, test=test)


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


def independent(length: int) -> Init:
    """IndRNNs whose input kernels start near 0, and whose last layer starts with a memory of about `length` steps.

    Recurrent weights are uniform up to 2^(1 / length), in the last layer from 2^(-1 / length) on (Li et al. 2018).
    """

    def init(cell: js.Cell, key: jax.Array) -> Any:
        params = list(cell.init(key))
        low, high = 2 ** (-1 / length), 2 ** (1 / length)
        for index in reversed([index for index, layer in enumerate(params) if isinstance(layer, js.IndRNNParams)]):
            layer, keys = params[index], jax.random.split(jax.random.fold_in(key, index))
            params[index] = layer._replace(
                input_kernel=0.001 * jax.random.normal(keys[0], layer.input_kernel.shape),
                recurrent_weights=jax.random.uniform(keys[1], layer.recurrent_weights.shape, minval=low, maxval=high),
            )
            low = 0
        return tuple(params)

    return init


def where(command: str) -> str:
    """The command, the machine and the versions, in a sentence."""
    report = circumstances(["jax", "optax"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`{command}`: {report['processor']}, {report['cores']} cores, {versions}."


FINDINGS = "## What it shows"


def write(output: pathlib.Path, parts: Iterable[str]) -> None:
    """Writes paragraphs to a file; a section "What it shows", written there by hand, stays at its end."""
    findings = "".join(output.read_text().partition(FINDINGS)[1:]) if output.exists() else ""
    output.write_text("\n\n".join([*parts, findings]).rstrip() + "\n")


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
    init: Init = default,
) -> tuple[Any, jax.Array]:
    """The trained params, and the losses of the steps."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    return _train(task, cell, batch, init(cell, init_key), jax.random.split(train_key, steps), rate)


def solved_after(losses: jax.Array, threshold: float, window: int = 50) -> int | None:
    """The steps until the mean of the last `window` losses is below `threshold`, None if it never is."""
    if len(losses) < window:
        return None
    below = np.flatnonzero(np.convolve(losses, np.ones(window) / window, mode="valid") < threshold)
    return int(below[0]) + window if len(below) else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(task: Task, cell: js.Cell, params: Any, examples: Batch) -> jax.Array:
    def score(example: Batch) -> jax.Array:
        xs, target = example
        return (task.score or task.loss)(cell.unroll(params, xs)[1][None], target[None])

    return jax.lax.map(score, examples, batch_size=100)


def error(task: Task, cell: js.Cell, params: Any) -> float:
    """The mean score of the test examples."""
    examples = task.test() if task.test else task.draw(jax.random.key(12345), 1000)
    return float(_scores(task, cell, params, examples).mean())
