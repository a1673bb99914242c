"""What a reservoir remembers, and whether it forgets where it began."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.pointwise import Dense, DenseParams
from jaxseq.combinators.stack import Stack
from jaxseq.combinators.unrolling import States
from jaxseq.core import errors
from jaxseq.core.cell import Cell, Params
from jaxseq.core.sharding import placed
from jaxseq.gradients.flow import stable_norm
from jaxseq.gradients.jacobians import flatten, is_floating
from jaxseq.reservoirs.cell import Reservoir, ReservoirParams
from jaxseq.reservoirs.readout import fit_readout
from jaxseq.reservoirs.spectrum import spectral_radius


def memory_capacity(
    cell: Cell,
    params: Params,
    xs: Float[Array, "*batch time 1"],
    *,
    delays: int,
    washout: int = 0,
    ridge: float | Float[Array, ""] = 0.0,
) -> Float[Array, "delays"]:
    """How well the outputs of a cell tell each of the inputs 1, 2, ... `delays` steps ago: squared correlations.

    Their sum is the memory capacity. For independent, equally distributed inputs it is at most the number of outputs. A
    linear reservoir reaches all of it but 1, with which it tells the present input. A linear readout for each delay is
    fitted on the first half of the sequences, and the correlation is taken on the second, so that it does not grow by
    fitting chance; take many times more steps than there are outputs.

    H. Jaeger, Short term memory in echo state networks, GMD report 152, 2001.

    Args:
        cell: any cell that reads one feature and gives a vector.
        params: its params.
        xs: independent, equally distributed numbers, such as those from U(-1, 1).
        delays: the number of delays.
        washout: the number of first steps that are read but not fitted; `delays` of them are not in any case.
        ridge: as in `fit_readout`.

    Raises:
        ValueError: if the inputs have more than one feature, `delays` is below 1, or the first half is no longer than
            what is washed out.
        TypeError: if the cell does not tell its `output_size`.

    >>> import jaxseq as js
    >>> cell = js.Reservoir(1, 20, activation="identity", input_scale=0.1)
    >>> xs = jax.random.uniform(jax.random.key(1), (2000, 1), minval=-1)
    >>> capacity = memory_capacity(cell, cell.init(jax.random.key(0)), xs, delays=40).sum()
    >>> bool(8 < capacity < 20)
    True
    """
    xs, delays = jnp.asarray(xs), operator.index(delays)
    errors.check_features(cell, xs, 1)
    half = xs.shape[-2] // 2
    washout = max(operator.index(washout), delays)
    if delays < 1 or half <= washout:
        raise ValueError(
            f"memory_capacity needs delays >= 1, and more than {2 * washout} steps for this washout and these delays; "
            f"got {delays} delays and {xs.shape[-2]} steps."
        )
    size = getattr(cell, "output_size", None)
    if not isinstance(size, int):
        raise TypeError(f"memory_capacity needs a cell that tells its output_size, got {cell}.")
    zeros = DenseParams(jnp.zeros((size, delays), xs.dtype), jnp.zeros(delays, xs.dtype))
    past = jnp.concatenate([jnp.zeros_like(xs[..., :1, :]).repeat(delays, axis=-2), xs], axis=-2)
    targets = jnp.concatenate(
        [past[..., delays - delay : past.shape[-2] - delay, :] for delay in range(1, delays + 1)], axis=-1
    )
    model = Stack((cell, Dense(size, delays)))
    first, second = (slice(half), slice(half, None))
    fitted = fit_readout(
        model, (params, zeros), xs[..., first, :], targets[..., first, :], washout=washout, ridge=ridge
    )
    ys = model.unroll(fitted, xs)[1][..., second, :].reshape(-1, delays)
    targets = targets[..., second, :].reshape(-1, delays)
    ys, targets = ys - ys.mean(axis=0, keepdims=True), targets - targets.mean(axis=0, keepdims=True)
    variances = (ys**2).sum(axis=0) * (targets**2).sum(axis=0)
    return (ys * targets).sum(axis=0) ** 2 / jnp.where(variances > 0, variances, 1)


def state_distances(
    cell: Cell, params: Params, xs: Any, key: Array, *, starts: int = 4, length: int | None = None
) -> Float[Array, "*batch time"]:
    """How far apart the states of a cell are after each step of one sequence, if they begin at random in [-1, 1].

    The echo state check: where the distances go to 0, the state is a function of the inputs, and a washout of so many
    steps is enough. The distance is the largest one of `starts` random beginnings from `initial_state`. How fast it
    falls in the long run is the largest of `diagnostics.lyapunov_exponents`.

    Raises:
        ValueError: if `starts` is below 1.
        TypeError: if the state of the cell holds no floating numbers.

    >>> import jaxseq as js
    >>> cell = js.Reservoir(1, 50, radius=0.5)
    >>> distances = state_distances(cell, cell.init(jax.random.key(0)), jnp.ones((60, 1)), jax.random.key(1))
    >>> bool(distances[0] > 0.1), bool(distances[-1] < 1e-5)
    (True, True)
    """
    starts = operator.index(starts)
    if starts < 1:
        raise ValueError(f"state_distances needs starts >= 1, got {starts}.")
    errors.check_key("state_distances", key)
    single = jax.eval_shape(cell.initial_state, params)
    if not any(is_floating(leaf) for leaf in jax.tree.leaves(single)):
        raise TypeError(f"state_distances needs a cell whose state holds floating numbers, got {cell}.")
    shapes = jax.eval_shape(lambda params: States(cell).unroll(params, xs, length=length)[0], params)
    rank = jax.tree.leaves(shapes)[0].ndim - jax.tree.leaves(single)[0].ndim
    start = cell.initial_state(params, jax.tree.leaves(shapes)[0].shape[:rank] if rank else ())

    def vectors(start):
        _, (states, _) = States(cell).unroll(params, xs, start, length=length)
        return flatten(states, rank + 1)[0]

    def disturbed(key):
        leaves, tree = jax.tree.flatten(start)
        drawn = [
            jax.random.uniform(key, leaf.shape, leaf.dtype, -1, 1) if is_floating(leaf) else leaf
            for key, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
        return vectors(jax.tree.unflatten(tree, drawn))

    apart = jax.vmap(disturbed)(jax.random.split(key, starts)) - vectors(start)[None]
    return stable_norm(apart).max(axis=0)


class EchoStateConditions(NamedTuple):
    """What the weights alone say about echo states.

    `sufficient` below 1: states converge under every input. `necessary` above 1, without a bias: under inputs of 0 they
    do not. Between the two `state_distances` tells, for the inputs that it is given.
    """

    sufficient: Float[Array, ""]
    necessary: Float[Array, ""]


def echo_state_conditions(reservoir: Reservoir, params: ReservoirParams) -> EchoStateConditions:
    """How much a step of a reservoir can stretch a difference of states, and the spectral radius of a step at 0.

        sufficient = 1 - a + a ρ σ(R),   necessary = ρ((1 - a) I + a ρ R)

    σ is the largest singular value. They hold for activations as steep as the identity at 0 and nowhere steeper, such
    as tanh.

    H. Jaeger et al., Optimization and applications of echo state networks with leaky-integrator neurons, Neural
    Networks 20, 2007.

    >>> cell = Reservoir(1, 30, radius=0.8, leak=0.5)
    >>> print(echo_state_conditions(cell, cell.init(jax.random.key(0))).necessary < 1)
    True
    """
    errors.check_params(reservoir, params)
    kernel = params.radius * placed(params.recurrent_kernel, PartitionSpec(None, None, None))[:, 0]
    step = (1 - params.leak) * jnp.eye(reservoir.hidden_size, dtype=kernel.dtype) + params.leak * kernel
    stretch = 1 - params.leak + params.leak * jnp.linalg.norm(kernel, ord=2)
    return EchoStateConditions(stretch, spectral_radius(step))
