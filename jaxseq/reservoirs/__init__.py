"""Reservoirs: random recurrent networks of which only a linear readout is fitted, in closed form."""

from .cell import Reservoir as Reservoir
from .readout import fit_readout as fit_readout
from .spectrum import spectral_radius as spectral_radius
