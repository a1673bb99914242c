"""Echo state networks on the two tasks that have published figures: Mackey-Glass forecasts and NARMA-10.

python -m benchmarks.reservoirs
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxseq as js
from benchmarks import tasks, ways

RESULTS = pathlib.Path(__file__).parent / "results"
RIDGES = (0.0, 1e-16, 1e-15, 1e-14, 1e-13, 1e-12)
CHOICES = tuple(itertools.product((0.8, 0.9, 0.95), (0.05, 0.1), (0.1, 0.2, 0.5)))  # radius, input scale, bias scale
PENALTIES = (1e-12, 1e-9, 1e-7)
STARTS, HELD_OUT, WARM_UP, HORIZON = 100, 50, 1000, 84
PUBLISHED = {
    ("mackey-glass", 400, 3000): ".00028",
    ("mackey-glass", 400, 21000): ".00012",
    ("narma", 50, 2000): ".166",
    ("narma", 100, 2000): ".0956",
    ("narma", 150, 2000): ".0514",
    ("narma", 200, 2000): ".0425",
}


@functools.partial(jax.jit, static_argnums=0)
def forecast_errors(model: js.Stack, key: jax.Array, train: jax.Array, starts: jax.Array) -> jax.Array:
    """Squared errors `[ridge, start]` at the horizon of a free run after a warm-up, over the variance."""
    params = model.init(key)
    warm, target = starts[:, :WARM_UP], starts[:, WARM_UP + HORIZON - 1]

    def errors(ridge):
        fitted = js.reservoirs.fit_readout(model, params, train[:-1], train[1:], washout=WARM_UP, ridge=ridge)
        state, _ = model.unroll(fitted, warm[:, :-1])
        state = js.FeedbackState(state, warm[:, -1])
        _, ys = js.Feedback(model).unroll(fitted, None, state, length=HORIZON)
        return (ys[:, -1, 0] - target[:, 0]) ** 2 / jnp.var(starts)

    return jax.vmap(errors)(jnp.array(RIDGES))


def mackey_glass(units: int, steps: int, seed: int) -> dict[str, float]:
    """NRMSE84 without a ridge, and with the one that is best on starts that are held out."""
    period = WARM_UP + HORIZON + 16
    series = jnp.tanh(js.reservoirs.mackey_glass(steps + 1 + (HELD_OUT + STARTS) * period) - 1)
    starts = series[steps + 1 :].reshape(HELD_OUT + STARTS, period, 1)
    # h' = (1 - C a) h + C tanh(...) with C = 0.44, a = 0.9 is a leak of 0.396 for h a, at the radius 0.79 / a
    cell = js.Reservoir(
        1, units, radius=0.79 / 0.9, leak=0.44 * 0.9, input_scale=0.56, bias_scale=0.2 * 0.14, density=5 / units
    )
    model = js.Stack((cell, js.Dense(units, 1), js.Map("tanh")))
    squares = np.asarray(forecast_errors(model, jax.random.key(seed), series[: steps + 1], starts))
    chosen = int(np.argmin(squares[:, :HELD_OUT].mean(axis=1)))
    tested = np.sqrt(squares[:, HELD_OUT:].mean(axis=1))
    return {"figure": float(tested[0]), "chosen": float(tested[chosen]), "ridge": RIDGES[chosen]}


@functools.partial(jax.jit, static_argnums=0)
def narma_errors(model: js.Stack, key: jax.Array, xs: jax.Array, targets: jax.Array, steps: jax.Array) -> jax.Array:
    """NMSE `[choice, ridge, 2]` on the two parts of what follows on the training steps."""
    params, length = model.init(key), steps.size
    parts = np.array_split(np.arange(length, xs.shape[0]), 2)

    def errors(choice, ridge):
        radius, input_scale, bias_scale = choice
        cell = params[0]._replace(radius=radius, input_scale=input_scale, bias_scale=bias_scale)
        fitted = js.reservoirs.fit_readout(
            model, (cell, params[1]), xs[:length], targets[:length], washout=min(200, length // 2), ridge=ridge
        )
        rest = model.unroll(fitted, xs)[1] - targets
        return jnp.stack([jnp.mean(rest[part] ** 2) / jnp.var(targets[part]) for part in parts])

    over_ridges = jax.vmap(errors, in_axes=(None, 0))
    return jax.lax.map(lambda choice: over_ridges(choice, jnp.array(PENALTIES)), jnp.array(CHOICES))


def narma(units: int, steps: int, seed: int) -> dict[str, float]:
    """NMSE on the last part of a sequence, with the setting that is best on the part before it."""
    data_key, key = jax.random.split(jax.random.key(seed))
    xs = jax.random.uniform(data_key, (4 * steps, 1), maxval=0.5)
    model = js.Stack((js.Reservoir(1, units), js.Dense(units, 1)))
    found = np.asarray(narma_errors(model, key, xs, js.reservoirs.narma(xs), jnp.arange(steps)))
    choice, ridge = np.unravel_index(np.argmin(found[..., 0]), found.shape[:2])
    radius, input_scale, bias_scale = CHOICES[choice]
    setting = {"radius": radius, "input_scale": input_scale, "bias_scale": bias_scale, "ridge": PENALTIES[ridge]}
    return {"figure": float(found[choice, ridge, 1]), **setting}


TASKS = {"mackey-glass": mackey_glass, "narma": narma}


def table(name: str, runs: Sequence[dict[str, Any]]) -> str:
    """A row for each size: the figures of its seeds, and the published one."""
    measure = {"mackey-glass": "NRMSE84", "narma": "NMSE"}[name]
    columns = ["units", "training steps", "seeds", f"{measure}: median (lowest to highest)"]
    columns += ["with a ridge"] * (name == "mackey-glass") + ["published"]
    rows = [columns, ["---:"] * len(columns)]
    for units, steps in sorted({(run["units"], run["steps"]) for run in runs}):
        own = [run for run in runs if (run["units"], run["steps"]) == (units, steps)]
        kinds = ["figure"] + ["chosen"] * (name == "mackey-glass")
        figures = [spread([run[kind] for run in own]) for kind in kinds]
        rows.append([f"{units}", f"{steps:,}", f"{len(own)}", *figures, PUBLISHED.get((name, units, steps), "")])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spread(figures: Sequence[float]) -> str:
    """Median, lowest and highest, with two digits; "diverged" where a figure is no number."""
    figures = [figure if math.isfinite(figure) else math.inf for figure in figures]
    numbers = (statistics.median(figures), min(figures), max(figures))
    return "{} ({} to {})".format(*("diverged" if number == math.inf else f"{number:.2g}" for number in numbers))


ABOUT = {
    "mackey-glass": "## Mackey-Glass\n\n"
    "The series of delay 17, as tanh(y - 1), forecast by a network that reads its own output. A reservoir with 5 "
    "connections a unit, radius 0.79, leaky units (C = 0.44, a = 0.9), fed back with weights in [-0.56, 0.56], a "
    "constant input of 0.2 with weights in [-0.14, 0.14], an output tanh; one training sequence, of which 1000 steps "
    "are washed out. The figure is the root of the mean squared error at step 84 of the free run over the standard "
    f"deviation, over {STARTS} starts, each after {WARM_UP} steps of the true series that were not in training. "
    f"Without a ridge as published; with one of {', '.join(f'{ridge:g}' for ridge in RIDGES)}, for each seed the best "
    f"on {HELD_OUT} other starts. Published: Jaeger 2001, GMD report 148, section 6.4.",
    "narma": "## NARMA-10\n\n"
    "One input of U(0, 0.5). Density 0.1, no leak, no input beside the states. 2000 training steps, 200 of them washed "
    "out, 3000 on which radius, input scale, bias scale and ridge are chosen for each seed "
    f"({len(CHOICES) * len(PENALTIES)} combinations), and 3000 that give the figure, the mean squared error over the "
    "variance. A seed is one sequence and one reservoir. Published: Rodan and Tino 2011, networks chosen in the same "
    "way from other settings.",
}


def learn(options: argparse.Namespace) -> pathlib.Path:
    """Fits what was not fitted yet, a seed after the other, and writes down every run at once."""
    output = options.output / "reservoirs.md"
    stored = output.with_suffix(".json")
    runs = json.loads(stored.read_text()) if stored.exists() else []
    sizes = {"mackey-glass": [(400, 3000), (400, 21000)], "narma": [(units, 2000) for units in (50, 100, 150, 200)]}
    for seed in range(options.seeds):
        for name in options.tasks:
            for units, steps in [(options.units, options.steps)] if options.units else sizes[name]:
                key = {"task": name, "units": units, "steps": steps, "seed": seed}
                if any(key.items() <= run.items() for run in runs):
                    continue
                runs.append({**key, **TASKS[name](units, steps, seed)})
                print(runs[-1], flush=True)
                stored.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
                parts = ["# Echo state networks", f"{tasks.where('python -m benchmarks.reservoirs')} Float64."]
                for each in TASKS:
                    if own := [run for run in runs if run["task"] == each]:
                        parts += [ABOUT[each], table(each, own)]
                tasks.write(output, parts)
    return output


class Gathered(js.Reservoir):
    """A reservoir that reads the state of the connected units alone."""

    def product(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        if kernel.shape[0] != self.hidden_size:
            return super().product(x, kernel, bias)
        count = max(1, round(self.density * self.hidden_size))
        indices = jnp.argsort(kernel[:, 0] == 0, axis=0)[:count]
        return jnp.sum(x[..., indices] * jnp.take_along_axis(kernel[:, 0], indices, axis=0), axis=-2)


def wait(cell: js.Cell, params: Any, xs: jax.Array) -> jax.Array:
    """The outputs of a cell, once they are there."""
    return cell.unroll(params, xs)[1].block_until_ready()


def speed(options: argparse.Namespace) -> pathlib.Path:
    """The forward pass with dense products, and with those of the connected units alone; 100 steps."""

    def cases():
        for units, density, batch in itertools.product((400, 1000, 2000), (0.01, 0.05), (1, 32)):
            units = options.units or units
            cells = {"dense": js.Reservoir(1, units, density=density), "gathered": Gathered(1, units, density=density)}
            params = cells["dense"].init(jax.random.key(0))
            xs = jax.random.normal(jax.random.key(1), (batch, 100, 1))
            calls = {name: functools.partial(wait, cell, params, xs) for name, cell in cells.items()}
            yield f"{units} units, density {density}, batch {batch}", calls

    return ways.compare("reservoirs-sparse", "Sparse reservoirs", cases(), options.output)


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--units", type=int, help="another size, with --steps")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--speed", action="store_true", help="time sparse products; run alone on a quiet machine")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.speed:
        return speed(options)
    with jax.enable_x64(True):
        return learn(options)


if __name__ == "__main__":
    main()
