"""Reservoirs: random recurrent networks of which only a linear readout is fitted, in closed form.

    Reservoir(input_size, hidden_size)                the cell
    fit_readout(model, params, xs, targets)           fits the Dense that ends a stack
    state_distances(cell, params, xs, key)            whether, and how fast, a cell forgets where it began
    echo_state_conditions(reservoir, params)          what its weights alone say of that
    memory_capacity(cell, params, xs, delays=)        how well its outputs tell inputs of long ago
    spectral_radius(matrix)                           the largest magnitude of an eigenvalue
    mackey_glass(length), narma(xs)                   two series to compare reservoirs on

>>> import jax, jaxseq as js
>>> series = mackey_glass(600)
>>> model = js.Stack((js.Reservoir(1, 100), js.Dense(100, 1)))
>>> params = fit_readout(model, model.init(jax.random.key(0)), series[:-1], series[1:], washout=100, ridge=1e-6)
>>> state, _ = model.unroll(params, series[:-1])
>>> _, forecast = js.Feedback(model).unroll(params, None, js.FeedbackState(state, series[-1]), length=20)
>>> forecast.shape
(20, 1)
"""

from .cell import Reservoir as Reservoir
from .diagnostics import EchoStateConditions as EchoStateConditions
from .diagnostics import echo_state_conditions as echo_state_conditions
from .diagnostics import memory_capacity as memory_capacity
from .diagnostics import state_distances as state_distances
from .readout import fit_readout as fit_readout
from .series import mackey_glass as mackey_glass
from .series import narma as narma
from .spectrum import spectral_radius as spectral_radius
