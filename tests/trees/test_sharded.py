"""Trees on two devices give what they give on one: values and gradients, whatever is sharded.

Under explicit sharding JAX raises while it traces, so that most compositions need no values.
"""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxseq as js
from tests.numbers import close, random_params

T = js.trees
RNG = np.random.default_rng(0)
MESH = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,))
FOREST = T.batch(T.parse("(1 (1 a) (1 (1 b) (1 c))) (1 d)"), arity=2, width=2, leaves=4, steps=2)
MASK = np.array([[True, True, True], [True, False, True]])
INPUTS = {"evaluate": RNG.normal(size=(4, 4)), "balanced": RNG.normal(size=(2, 3, 4))}
NETS = [js.NaryTreeLSTM(4, 2), js.ChildSumTreeLSTM(4, 2), js.Recursive(4), js.RNTN(4)]

pytestmark = pytest.mark.usefixtures("float64")


def program(name, net):
    def loss(params, xs, mask):
        states = T.evaluate(net, params, FOREST, xs) if name == "evaluate" else T.balanced(net, params, xs, mask)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(states)), states

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def sharded(what, net, params, xs):
    """The arguments with one thing over the devices: rows, features, or the units of the params."""
    spec = {"rows": PartitionSpec("devices"), "features": PartitionSpec(*[None] * (xs.ndim - 1), "devices")}
    if what in spec:
        return params, jax.device_put(xs, NamedSharding(MESH, spec[what]))

    def put(names, leaf):
        names = ("devices" if name == "hidden" else None for name in names)
        return jax.device_put(leaf, NamedSharding(MESH, PartitionSpec(*names)))

    return jax.tree.map(put, net.axes(), params, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)), xs


@pytest.mark.parametrize("name", INPUTS)
def test_gives_what_one_device_gives(name):
    net, xs = NETS[0], INPUTS[name]
    params = random_params(RNG, net)
    expected = program(name, net)(params, xs, MASK)
    for what in ("rows", "features", "units"):
        with jax.set_mesh(MESH):
            found = program(name, net)(*sharded(what, net, params, xs), MASK)
        close(jax.device_get(found), jax.device_get(expected), 1e-12)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("net", NETS[1:], ids=repr)
def test_traces(name, net):
    params, xs = net.init(jax.random.key(0)), INPUTS[name]
    for what in ("rows", "features", "units"):
        with jax.set_mesh(MESH):
            program(name, net).trace(*sharded(what, net, params, xs), MASK)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_quad_tree(axis):
    net, images = js.NaryTreeLSTM(2 * 2 * 2, 2, arity=4), RNG.normal(size=(2, 4, 6, 2))
    params = random_params(RNG, net)
    spec = PartitionSpec(*("devices" if index == axis else None for index in range(4)))
    with jax.set_mesh(MESH):
        found = T.quad_tree(net, params, jax.device_put(images, NamedSharding(MESH, spec)), patch_size=2)
        assert axis or jax.typeof(found.hidden).sharding.spec[0] == "devices"
    close(jax.device_get(found), T.quad_tree(net, params, images, patch_size=2), 1e-12)


def test_shard_map():
    """Rows of a batch on each device, and gradients summed over both."""
    net, xs = NETS[0], INPUTS["balanced"]
    params = random_params(RNG, net)
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))

    def loss(params, xs, mask):
        return sum((leaf**2).sum() for leaf in T.balanced(net, params, xs, mask))

    rows = PartitionSpec("devices")
    mapped = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=PartitionSpec())
    close(jax.device_get(jax.jit(mapped)(params, xs, MASK)), jax.grad(loss)(params, xs, MASK), 1e-12)
