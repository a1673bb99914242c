"""The systems compared: the same recurrent layer, from the same numbers, each in the layout that it likes best."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxseq as js
from benchmarks import timing

CELLS = {"lstm": js.LSTM, "gru": js.GRU}
MODES = ("forward", "train")


class Shape(NamedTuple):
    """The sizes of one layer and its inputs."""

    time: int
    batch: int
    input: int
    hidden: int


class Problem(NamedTuple):
    """A layer and all the arrays that a training step needs, as numpy has them and batch-major."""

    cell: js.Cell
    shape: Shape
    dtype: str
    params: Any
    xs: np.ndarray
    state: Any
    cotangent: np.ndarray  # the loss is sum(ys * cotangent) + sum(final state)


class Contender(NamedTuple):
    """A system ready to run a problem; a run returns when its results are there.

    `read` gives results as numbers to compare, in the names and layout of jaxseq.
    """

    run: dict[str, Callable[[], Any]]
    read: dict[str, Callable[[Any], dict[str, np.ndarray]]]

    def values(self, mode: str) -> dict[str, np.ndarray]:
        """Run once and read the numbers, in float32."""
        return {name: np.asarray(value, np.float32) for name, value in self.read[mode](self.run[mode]()).items()}


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


def make_problem(cell_name: str, shape: Shape, dtype: str = "float32") -> Problem:
    """A problem with random parameters, inputs, initial state and cotangent."""
    cell = CELLS[cell_name](shape.input, shape.hidden)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), cell.init(jax.random.key(0)))
    params = params._replace(bias=_normal(random, params.bias.shape, dtype))
    leading = (shape.batch, shape.time)
    state = jax.tree.map(lambda leaf: _normal(random, leaf.shape, dtype), cell.initial_state(params, (shape.batch,)))
    xs = _normal(random, (*leading, shape.input), dtype)
    return Problem(cell, shape, dtype, params, xs, state, _normal(random, (*leading, shape.hidden), dtype))


def _normal(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return random.normal(size=shape).astype(jnp.dtype(dtype))


def jaxseq(problem: Problem) -> Contender:
    """The cell with the engine of jaxseq; inputs `[batch, time, features]`."""
    return _jaxseq(problem.cell, problem)


def plain(problem: Problem) -> Contender:
    """The same cell under `lax.scan`."""
    return _jaxseq(js.Plain(problem.cell), problem)


def _jaxseq(cell: js.Cell, problem: Problem) -> Contender:
    def read_forward(result):
        state, ys = result
        return {"ys": ys, **state._asdict()}

    def read_train(result):
        _, (params, xs, state) = result
        return {"xs": xs, **params._asdict(), **state._asdict()}

    run = _jitted(cell.unroll, (problem.params, problem.xs, problem.state), problem.cotangent)
    return Contender(run, {"forward": read_forward, "train": read_train})


def flax(problem: Problem) -> Contender:
    """`flax.nnx.RNN` of `OptimizedLSTMCell` or `GRUCell`, split into pure functions; inputs time-major."""
    from flax import nnx

    lstm = isinstance(problem.cell, js.LSTM)
    dtype = jnp.dtype(problem.dtype)
    cell = (nnx.OptimizedLSTMCell if lstm else nnx.GRUCell)(
        problem.shape.input,
        problem.shape.hidden,
        dtype=dtype,
        param_dtype=dtype,
        recurrent_kernel_init=nnx.initializers.zeros_init(),  # orthogonal ones exist in float32 alone
        rngs=nnx.Rngs(0),
    )
    own = problem.params
    cell.dense_i.kernel[...] = jnp.asarray(_flat(own.input_kernel))
    cell.dense_h.kernel[...] = jnp.asarray(_flat(own.recurrent_kernel))
    (cell.dense_h if lstm else cell.dense_i).bias[...] = jnp.asarray(own.bias.reshape(-1))
    graph, params, rest = nnx.split(nnx.RNN(cell, time_major=True, return_carry=True, rngs=False), nnx.Param, ...)

    def unroll(params, xs, state):
        return nnx.merge(graph, params, rest)(xs, initial_carry=state)

    def read_state(carry):
        return {"hidden": carry[1], "cell": carry[0]} if lstm else {"hidden": carry}

    def read_forward(result):
        carry, ys = result
        return {"ys": jnp.swapaxes(ys, 0, 1), **read_state(carry)}

    def read_train(result):
        _, (params, xs, carry) = result
        dense = params["cell"]["dense_i"], params["cell"]["dense_h"]
        gates = own.bias.shape
        return {
            "xs": jnp.swapaxes(xs, 0, 1),
            "input_kernel": dense[0]["kernel"][...].reshape(-1, *gates),
            "recurrent_kernel": dense[1]["kernel"][...].reshape(-1, *gates),
            "bias": dense[lstm]["bias"][...].reshape(gates),
            **read_state(carry),
        }

    carry = (problem.state.cell, problem.state.hidden) if lstm else problem.state.hidden
    run = _jitted(unroll, (params, np.swapaxes(problem.xs, 0, 1), carry), np.swapaxes(problem.cotangent, 0, 1))
    return Contender(run, {"forward": read_forward, "train": read_train})


def _jitted(unroll: Callable[..., Any], arguments: tuple[Any, ...], cotangent: np.ndarray) -> dict[str, Any]:
    """What to run of a function `(params, xs, state) -> (state, ys)` in JAX."""

    def loss(params, xs, state, cotangent):
        state, ys = unroll(params, xs, state)
        return jnp.sum(ys * cotangent) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state))

    arguments, cotangent = jax.device_put((arguments, cotangent))
    forward = jax.jit(unroll)
    train = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return {
        "forward": lambda: jax.block_until_ready(forward(*arguments)),
        "train": lambda: jax.block_until_ready(train(*arguments, cotangent)),
    }


def torch(problem: Problem) -> Contender:
    """`torch.nn.LSTM` or `GRU` (cuDNN on a GPU; on a CPU oneDNN, which has the LSTM only); inputs time-major."""
    import torch

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise Unavailable("this torch has no CUDA")
    device = "cuda" if on_gpu else "cpu"
    torch.set_num_threads(timing.cores())  # as XLA does

    def tensor(array: np.ndarray, gradient: bool = True):
        return torch.tensor(
            np.asarray(array, np.float32), device=device, dtype=getattr(torch, problem.dtype)
        ).requires_grad_(gradient)

    lstm = isinstance(problem.cell, js.LSTM)
    own = problem.params
    layer = (torch.nn.LSTM if lstm else torch.nn.GRU)(problem.shape.input, problem.shape.hidden)
    layer.to(device, getattr(torch, problem.dtype))
    recurrent_bias = np.zeros_like(own.bias) if lstm else own.recurrent_bias
    values = (
        _flat(own.input_kernel).T,
        _flat(own.recurrent_kernel).T,
        own.bias.reshape(-1),
        recurrent_bias.reshape(-1),
    )
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.copy_(tensor(value, False))
    xs, cotangent = tensor(np.swapaxes(problem.xs, 0, 1)), tensor(np.swapaxes(problem.cotangent, 0, 1), False)
    leaves = [tensor(leaf[None]) for leaf in problem.state]
    state = tuple(leaves) if lstm else leaves[0]
    inputs = [*layer.parameters(), xs, *leaves]
    wait = torch.cuda.synchronize if on_gpu else lambda: None

    def forward():
        with torch.inference_mode():
            result = layer(xs, state)
        wait()
        return result

    def train():
        ys, final = layer(xs, state)
        loss = (ys * cotangent).sum() + sum(leaf.sum() for leaf in (final if lstm else [final]))
        gradients = torch.autograd.grad(loss, inputs)
        wait()
        return gradients

    def numbers(result) -> np.ndarray:
        return result.detach().float().cpu().numpy()

    def read_forward(result):
        ys, final = result
        final = [numbers(leaf)[0] for leaf in (final if lstm else [final])]
        return {"ys": np.swapaxes(numbers(ys), 0, 1), **dict(zip(problem.state._fields, final, strict=True))}

    def read_train(result):
        input_kernel, recurrent_kernel, bias, recurrent_bias, xs, *final = map(numbers, result)
        gates = own.bias.shape
        found = {
            "xs": np.swapaxes(xs, 0, 1),
            "input_kernel": input_kernel.T.reshape(-1, *gates),
            "recurrent_kernel": recurrent_kernel.T.reshape(-1, *gates),
            "bias": bias.reshape(gates),
            **{name: leaf[0] for name, leaf in zip(problem.state._fields, final, strict=True)},
        }
        return found if lstm else {**found, "recurrent_bias": recurrent_bias.reshape(gates)}

    return Contender({"forward": forward, "train": train}, {"forward": read_forward, "train": read_train})


def _flat(kernel: np.ndarray) -> np.ndarray:
    """A kernel `[features, gate, hidden]` with its gates side by side."""
    return kernel.reshape(kernel.shape[0], -1)


PEERS = {"torch": torch, "flax": flax, "plain": plain}


def contenders(problem: Problem, peers: Sequence[str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """jaxseq and those of `peers` that can run here, by name, and why the others cannot."""
    ready, missing = {"jaxseq": jaxseq(problem)}, {}
    for name in peers:
        if name != "plain" and importlib.util.find_spec(name) is None:
            missing[name] = "not installed"
            continue
        try:
            ready[name] = PEERS[name](problem)
        except Unavailable as reason:
            missing[name] = str(reason)
    return ready, missing


def check_agreement(ready: dict[str, Contender], mode: str, tolerance: float) -> None:
    """Fail unless all contenders find the numbers of jaxseq, up to `tolerance` of the largest of each array."""
    ours = ready["jaxseq"].values(mode)
    for name, contender in ready.items():
        theirs = contender.values(mode)
        for part, value in theirs.items():
            largest = np.abs(ours[part]).max()
            error = np.abs(value - ours[part]).max()
            if not error <= tolerance * largest:
                raise AssertionError(f"{name} and jaxseq differ in {mode}, {part}: by {error:.2g} of {largest:.2g}.")
