"""Memory and time of one training step over a very long sequence, with `js.Remat` and without.

python -m benchmarks.long_memory
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

import jaxseq as js
from benchmarks import timing

GOAL = 8  # MB of temporaries, at most, for the longest sequence under Remat
INPUT = 2


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    """Run the benchmark as the command line says; return the path of the table."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.long_memory", description=__doc__.partition("\n")[0])
    options.add_argument("--times", type=lambda text: [int(t) for t in text.split(",")], default=[10_000, 100_000])
    options.add_argument("--hidden", type=int, default=64)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--steps", type=int, default=3, help="training steps that are timed")
    options.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = options.parse_args(arguments)
    lstm, dense = js.LSTM(INPUT, options.hidden), js.Dense(options.hidden, 1)
    contenders = {
        "Remat(Stack((LSTM, Dense)))": js.Remat(js.Stack((lstm, dense))),
        "Stack((Remat(LSTM), Dense))": js.Stack((js.Remat(lstm), dense)),
        "Stack((LSTM, Dense))": js.Stack((lstm, dense)),
        "Stack((Plain(LSTM), Dense)), lax.scan": js.Stack((js.Plain(lstm), dense)),
    }
    results = [
        measure(name, model, length, options.batch, options.steps)
        for length in options.times
        for name, model in contenders.items()
    ]
    circumstances = timing.circumstances(["jax", "jaxlib"])
    report = {**circumstances, "hidden": options.hidden, "batch": options.batch, "goal": GOAL, "results": results}
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"long-memory-{timing.device_name()}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path = stem.with_suffix(".md")
    path.write_text(markdown(report))
    print(path.read_text())
    return path


def measure(name: str, model: js.Cell, length: int, batch: int, steps: int) -> dict:
    """What the compiler sets aside for one training step, and the seconds that such steps take."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    xs = jax.random.normal(jax.random.key(1), (batch, length, INPUT))
    params = model.init(jax.random.key(0))
    training = params, optimizer.init(params)

    @jax.jit
    def train(training, xs):
        params, moments = training

        def loss(params):
            _, ys = model.unroll(params, xs)
            return jnp.mean((ys[..., 0] - jnp.cumsum(xs[..., 0], axis=-1) / length) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), value

    compiled = train.lower(training, xs).compile()
    memory = compiled.memory_analysis()
    losses, seconds = [], []
    for _ in range(steps + 1):  # the first warms up
        start = time.perf_counter()
        training, value = jax.block_until_ready(compiled(training, xs))
        seconds.append(time.perf_counter() - start)
        losses.append(float(value))
    return {
        "model": name,
        "time": length,
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "losses": losses,
        "seconds": statistics.median(seconds[1:]),
    }


def markdown(report: dict) -> str:
    """The report as a table to read."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    longest = max(result["time"] for result in report["results"])
    kept = next(r for r in report["results"] if r["time"] == longest and r["model"].startswith("Remat"))
    megabytes = kept["temporaries"] / 1e6
    lines = [
        "# Training over very long sequences",
        "",
        f"`{report['command']}` on {report['date']}: {report['processor']}, {report['cores']} cores, {versions}; "
        f"float32, batch {report['batch']}, an LSTM of {report['hidden']} units and a dense layer with a loss at every "
        "step, Adam. Memory is what the compiler sets aside for temporaries; seconds are of one training step, the "
        "median of a few on a machine that is not idle.",
        "",
        f"Goal: T = {longest:,} in at most {report['goal']} MB of temporaries with `Remat`: "
        f"{'holds' if megabytes <= report['goal'] else 'fails'}, {megabytes:.1f} MB. Around the whole model it saves "
        "neither the units' outputs nor what the dense layer needs.",
        "",
        "| steps | model | temporaries MB | seconds | loss before, after |",
        "| ---: | --- | ---: | ---: | --- |",
    ]
    for r in report["results"]:
        losses = f"{r['losses'][0]:.4f}, {r['losses'][-1]:.4f}"
        lines.append(f"| {r['time']:,} | {r['model']} | {r['temporaries'] / 1e6:.1f} | {r['seconds']:.2f} | {losses} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
