"""The loss of CTC and its gradient, beside optax and torch.

python -m benchmarks.alignments
"""

import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxseq as js
from benchmarks import tasks, timing

RESULTS = pathlib.Path(__file__).parent / "results"


class Shape(NamedTuple):
    """Of the logits and labels."""

    batch: int
    time: int
    labels: int
    vocab: int


SHAPES = (Shape(16, 400, 50, 64), Shape(1, 400, 50, 64), Shape(32, 100, 10, 32), Shape(16, 400, 50, 1024))


def contenders(shape: Shape) -> dict[str, dict[str, Callable[[], Any]]]:
    """For the loss alone and with its gradient, a call of each contender; raises unless they find the same."""
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(size=(shape.batch, shape.time, shape.vocab)), jnp.float32)
    labels = jnp.asarray(generator.integers(1, shape.vocab, size=(shape.batch, shape.labels)))
    no_steps, no_labels = jnp.zeros(logits.shape[:2]), jnp.zeros(labels.shape)
    losses = {
        "jaxseq": lambda logits: js.ctc.loss(logits, labels).sum(),
        "optax": lambda logits: optax.ctc_loss(logits, no_steps, labels, no_labels).sum(),
    }
    found: dict[str, dict[str, Callable[[], Any]]] = {"loss": {}, "loss and gradient": {}}
    for name, loss in losses.items():
        for mode, function in zip(found, (loss, jax.value_and_grad(loss)), strict=True):
            program = jax.jit(function).lower(logits).compile()
            found[mode][name] = lambda program=program: jax.block_until_ready(program(logits))
    if importlib.util.find_spec("torch"):
        for mode, call in zip(found, torch_calls(np.asarray(logits), np.asarray(labels)), strict=True):
            found[mode]["torch"] = call
    totals = [float(call()) for call in found["loss"].values()]
    gradients = [np.asarray(call()[1]) for call in found["loss and gradient"].values()]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-5)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, gradients[0], atol=5e-3)
    return found


def torch_calls(logits: np.ndarray, labels: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The loss of torch, and that with the gradient."""
    import torch

    torch.set_num_threads(timing.cores())
    given, wanted = torch.tensor(logits), torch.tensor(labels)
    lengths = [torch.full((len(logits),), size) for size in (logits.shape[1], labels.shape[1])]

    def loss(given):
        log_probs = torch.log_softmax(given, dim=-1).transpose(0, 1)
        return torch.nn.functional.ctc_loss(log_probs, wanted, *lengths, reduction="sum")

    def alone():
        with torch.no_grad():
            return loss(given)

    def both():
        leaf = given.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        return value, leaf.grad

    return alone, both


def main(
    shapes: Sequence[Shape] = SHAPES, results: pathlib.Path = RESULTS, rounds: int = 9, seconds: float = 0.3
) -> pathlib.Path:
    """Times all shapes; returns the path of the table."""
    names = ["jaxseq", "optax", *["torch"] * bool(importlib.util.find_spec("torch"))]
    lines = [
        "| "
        + " | ".join(["batch, time, labels, vocab", "what", *names, *(f"{name} / jaxseq" for name in names[1:])])
        + " |"
    ]
    lines.append("| --- | --- |" + " ---: |" * (2 * len(names) - 1))
    for shape in shapes:
        for mode, calls in contenders(shape).items():
            figures = timing.interleave(calls, rounds, seconds)
            fastest = {name: min(figures[name]) for name in names}
            times = [f"{1e3 * fastest[name]:.3g} ms" for name in names]
            speeds = [f"{fastest[name] / fastest['jaxseq']:.2f}" for name in names[1:]]
            lines.append("| " + " | ".join([", ".join(map(str, shape)), mode, *times, *speeds]) + " |")
            print(lines[-1], flush=True)
    output = results / f"alignments-{timing.device_name()}.md"
    about = (
        f"float32, one core for all. The times are the fastest call of {rounds} rounds in turns, for other processes "
        "only ever add time; the last columns say how many times as fast jaxseq is. All contenders found the same "
        "losses and gradients."
    )
    tasks.write(output, ["# CTC", tasks.where("python -m benchmarks.alignments"), about, "\n".join(lines)])
    return output


if __name__ == "__main__":
    timing.limit_cores(1)  # on a busy machine threads mostly wait for each other
    main()
