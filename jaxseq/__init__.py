"""Pure functions for sequence models in JAX.

Cells: Elman, Jordan, LSTM, PeepholeLSTM, CoupledLSTM, ProjectedLSTM, LayerNormLSTM, GRU, GRUv1, MinimalGRU, Embed,
OneHot, Dense, FeatureNorm, Concatenate, Map.
Minimal and other recurrences: MGU, JANET, LiGRU, UGRNN, MUT1, MUT2, MUT3, IndRNN, AntisymmetricRNN,
GatedAntisymmetricRNN, CoRNN, RecurrentHighway, SLSTM, MLSTM, Reservoir; Phased, around a cell.
Over images: ConvLSTM, ConvGRU, Elman2D, LSTM2D.
Attention: TransformerBlock, rotary.
Combinators: Stack, Sequential, Parallel, Residual, Remat, Plain, States, Feedback.
Noise: Dropout, RecurrentDropout, WeightDrop, Zoneout, RandomState.
Norms and states: LayerNorm, RMSNorm, WeightNorm, SpectralBound, LearnedState, Clip, Frozen, MixedPrecision.
Depth, conditioning and time scales: DeepTransition, Skip, Highway, Conditioned, ClockworkRNN, Leaky, MovingAverage,
Delay, TimeSkip, DelayedElman, Hierarchical.
Linear recurrences, parallel in time: MinGRU, MinLSTM, RGLRU, LRU, S5, GatedLinearAttention, GatedDeltaNet, and
linear_scan.
Explicit memory: NTM, DNC, StackRNN, MemoryNetwork.
Layers that read whole sequences: Bidirectional, Pyramid; images: ReNet, Grid.
Functions: scan, generate, pad, length_mask, reset_where, to_json, from_json.
Structured models: MarkovChain, CRF; the modules chains (dynamic programs over paths), crf, ctc, graphical, markov,
semirings, spans, tagger, transducer.
Hidden Markov models: HMM, VaryingHMM, TokenHMM, of CategoricalEmission, GaussianEmission, FullGaussianEmission,
PoissonEmission or FunctionEmission; baum_welch, baum_welch_restarts, fit_labelled.
Gradients through time: truncated_unroll, newton_unroll; the modules diagnostics, initializers, online, regularizers.
Modules: losses, metrics, plots, pooling, reservoirs, samplers.
Trees: the module trees, with the compositions Recursive, RNTN, ChildSumTreeLSTM, NaryTreeLSTM.
To write your own: Cell, SequenceLayer, Layer, and the bases Gated, LinearRecurrence, Pointwise, Wrapper, Extended,
Machine. `help` of each has its equations, shapes and an example.
"""

from . import diagnostics as diagnostics
from . import losses as losses
from . import metrics as metrics
from . import plots as plots
from . import pooling as pooling
from . import reservoirs as reservoirs
from . import samplers as samplers
from . import trees as trees
from .bidirectional import Bidirectional as Bidirectional
from .bidirectional import Both as Both
from .cells.attention import TransformerBlock as TransformerBlock
from .cells.attention import TransformerParams as TransformerParams
from .cells.attention import TransformerState as TransformerState
from .cells.averages import MovingAverage as MovingAverage
from .cells.averages import MovingAverageState as MovingAverageState
from .cells.clockwork import ClockworkRNN as ClockworkRNN
from .cells.clockwork import ClockworkState as ClockworkState
from .cells.convolutional import ConvGRU as ConvGRU
from .cells.convolutional import ConvLSTM as ConvLSTM
from .cells.convolutional import ConvolutionalParams as ConvolutionalParams
from .cells.deep import DeepTransition as DeepTransition
from .cells.delayed import DelayedElman as DelayedElman
from .cells.delayed import DelayedElmanState as DelayedElmanState
from .cells.diagonal import LRU as LRU
from .cells.diagonal import S5 as S5
from .cells.diagonal import DiagonalState as DiagonalState
from .cells.diagonal import LRUParams as LRUParams
from .cells.diagonal import S5Params as S5Params
from .cells.differential import AntisymmetricRNN as AntisymmetricRNN
from .cells.differential import CoRNN as CoRNN
from .cells.differential import CoRNNState as CoRNNState
from .cells.differential import GatedAntisymmetricRNN as GatedAntisymmetricRNN
from .cells.elman import Elman as Elman
from .cells.elman import ElmanState as ElmanState
from .cells.feedback import Jordan as Jordan
from .cells.feedback import JordanParams as JordanParams
from .cells.gated import Gated as Gated
from .cells.gated import GatedParams as GatedParams
from .cells.gru import GRU as GRU
from .cells.gru import GRUParams as GRUParams
from .cells.gru import GRUState as GRUState
from .cells.gru import GRUv1 as GRUv1
from .cells.gru import MinimalGRU as MinimalGRU
from .cells.highway import RecurrentHighway as RecurrentHighway
from .cells.independent import IndRNN as IndRNN
from .cells.independent import IndRNNParams as IndRNNParams
from .cells.linear import RGLRU as RGLRU
from .cells.linear import LinearParams as LinearParams
from .cells.linear import LinearRecurrence as LinearRecurrence
from .cells.linear import LinearState as LinearState
from .cells.linear import MinGRU as MinGRU
from .cells.linear import MinLSTM as MinLSTM
from .cells.linear import RGLRUParams as RGLRUParams
from .cells.linear_attention import GatedDeltaNet as GatedDeltaNet
from .cells.linear_attention import GatedDeltaNetParams as GatedDeltaNetParams
from .cells.linear_attention import GatedLinearAttention as GatedLinearAttention
from .cells.linear_attention import GatedLinearAttentionParams as GatedLinearAttentionParams
from .cells.linear_attention import LinearAttentionState as LinearAttentionState
from .cells.lstm import LSTM as LSTM
from .cells.lstm import CoupledLSTM as CoupledLSTM
from .cells.lstm import LSTMState as LSTMState
from .cells.lstm import PeepholeLSTM as PeepholeLSTM
from .cells.lstm import PeepholeLSTMParams as PeepholeLSTMParams
from .cells.lstm import ProjectedLSTM as ProjectedLSTM
from .cells.lstm import ProjectedLSTMParams as ProjectedLSTMParams
from .cells.minimal import JANET as JANET
from .cells.minimal import MGU as MGU
from .cells.minimal import MUT1 as MUT1
from .cells.minimal import MUT2 as MUT2
from .cells.minimal import MUT3 as MUT3
from .cells.minimal import UGRNN as UGRNN
from .cells.minimal import LiGRU as LiGRU
from .cells.normalized import FeatureNorm as FeatureNorm
from .cells.normalized import FeatureNormParams as FeatureNormParams
from .cells.normalized import LayerNormLSTM as LayerNormLSTM
from .cells.normalized import LayerNormLSTMParams as LayerNormLSTMParams
from .cells.pointwise import Concatenate as Concatenate
from .cells.pointwise import Dense as Dense
from .cells.pointwise import DenseParams as DenseParams
from .cells.pointwise import Embed as Embed
from .cells.pointwise import EmbedParams as EmbedParams
from .cells.pointwise import Map as Map
from .cells.pointwise import OneHot as OneHot
from .cells.pointwise import Pointwise as Pointwise
from .cells.rotary import rotary as rotary
from .cells.two_dimensional import LSTM2D as LSTM2D
from .cells.two_dimensional import Elman2D as Elman2D
from .cells.two_dimensional import Recurrent2D as Recurrent2D
from .cells.two_dimensional import Recurrent2DParams as Recurrent2DParams
from .cells.xlstm import MLSTM as MLSTM
from .cells.xlstm import SLSTM as SLSTM
from .cells.xlstm import MLSTMParams as MLSTMParams
from .cells.xlstm import MLSTMState as MLSTMState
from .cells.xlstm import SLSTMState as SLSTMState
from .combinators.conditioning import Condition as Condition
from .combinators.conditioning import Conditioned as Conditioned
from .combinators.conditioning import ConditionedParams as ConditionedParams
from .combinators.hierarchical import Hierarchical as Hierarchical
from .combinators.hierarchical import HierarchicalState as HierarchicalState
from .combinators.noise import Dropout as Dropout
from .combinators.noise import RecurrentDropout as RecurrentDropout
from .combinators.noise import WeightDrop as WeightDrop
from .combinators.noise import Zoneout as Zoneout
from .combinators.normalization import LayerNorm as LayerNorm
from .combinators.normalization import LayerNormParams as LayerNormParams
from .combinators.normalization import RMSNorm as RMSNorm
from .combinators.normalization import SpectralBound as SpectralBound
from .combinators.normalization import WeightNorm as WeightNorm
from .combinators.normalization import WeightNormParams as WeightNormParams
from .combinators.parallel import Parallel as Parallel
from .combinators.phased import Phased as Phased
from .combinators.phased import PhasedParams as PhasedParams
from .combinators.precision import Frozen as Frozen
from .combinators.precision import MixedPrecision as MixedPrecision
from .combinators.residual import Highway as Highway
from .combinators.residual import HighwayParams as HighwayParams
from .combinators.residual import Residual as Residual
from .combinators.residual import Skip as Skip
from .combinators.stack import Sequential as Sequential
from .combinators.stack import Stack as Stack
from .combinators.states import Clip as Clip
from .combinators.states import LearnedState as LearnedState
from .combinators.states import LearnedStateParams as LearnedStateParams
from .combinators.states import RandomState as RandomState
from .combinators.timing import Delay as Delay
from .combinators.timing import Leaky as Leaky
from .combinators.timing import LeakyParams as LeakyParams
from .combinators.timing import TimeSkip as TimeSkip
from .combinators.timing import TimeSkipState as TimeSkipState
from .combinators.unrolling import Feedback as Feedback
from .combinators.unrolling import FeedbackState as FeedbackState
from .combinators.unrolling import Plain as Plain
from .combinators.unrolling import Remat as Remat
from .combinators.unrolling import States as States
from .core.cell import Cell as Cell
from .core.cell import SequenceLayer as SequenceLayer
from .core.layer import Layer as Layer
from .core.linear_scan import linear_scan as linear_scan
from .core.masks import length_mask as length_mask
from .core.masks import pad as pad
from .core.masks import reset_where as reset_where
from .core.scan import scan as scan
from .core.serialization import from_json as from_json
from .core.serialization import to_json as to_json
from .core.wrapper import Extended as Extended
from .core.wrapper import Wrapper as Wrapper
from .decoding import Generated as Generated
from .decoding import generate as generate
from .gradients import initializers as initializers
from .gradients import online as online
from .gradients import regularizers as regularizers
from .gradients.newton import NewtonInfo as NewtonInfo
from .gradients.newton import newton_unroll as newton_unroll
from .gradients.truncated import truncated_unroll as truncated_unroll
from .grid import Grid as Grid
from .grid import ReNet as ReNet
from .memory.dnc import DNC as DNC
from .memory.dnc import DNCState as DNCState
from .memory.machine import Machine as Machine
from .memory.machine import MachineParams as MachineParams
from .memory.networks import Answer as Answer
from .memory.networks import MemoryNetwork as MemoryNetwork
from .memory.networks import MemoryNetworkParams as MemoryNetworkParams
from .memory.ntm import NTM as NTM
from .memory.ntm import NTMState as NTMState
from .memory.stack import StackRNN as StackRNN
from .memory.stack import StackRNNState as StackRNNState
from .pyramid import Pyramid as Pyramid
from .reservoirs.cell import Reservoir as Reservoir
from .reservoirs.cell import ReservoirParams as ReservoirParams
from .reservoirs.cell import ReservoirState as ReservoirState
from .structured import chains as chains
from .structured import crf as crf
from .structured import ctc as ctc
from .structured import graphical as graphical
from .structured import markov as markov
from .structured import semirings as semirings
from .structured import spans as spans
from .structured import tagger as tagger
from .structured import transducer as transducer
from .structured.baum_welch import Fitted as Fitted
from .structured.baum_welch import baum_welch as baum_welch
from .structured.baum_welch import baum_welch_restarts as baum_welch_restarts
from .structured.baum_welch import fit_labelled as fit_labelled
from .structured.crf import CRF as CRF
from .structured.crf import CRFParams as CRFParams
from .structured.emissions import CategoricalEmission as CategoricalEmission
from .structured.emissions import CategoricalParams as CategoricalParams
from .structured.emissions import Emission as Emission
from .structured.emissions import FunctionEmission as FunctionEmission
from .structured.hmm import HMM as HMM
from .structured.hmm import Filtered as Filtered
from .structured.hmm import HMMParams as HMMParams
from .structured.hmm import HMMState as HMMState
from .structured.hmm import Simulated as Simulated
from .structured.hmm import TokenHMM as TokenHMM
from .structured.hmm import VaryingHMM as VaryingHMM
from .structured.markov import MarkovChain as MarkovChain
from .structured.vector_emissions import FullGaussianEmission as FullGaussianEmission
from .structured.vector_emissions import FullGaussianParams as FullGaussianParams
from .structured.vector_emissions import GaussianEmission as GaussianEmission
from .structured.vector_emissions import GaussianParams as GaussianParams
from .structured.vector_emissions import PoissonEmission as PoissonEmission
from .structured.vector_emissions import PoissonParams as PoissonParams
from .trees.recursive import RNTN as RNTN
from .trees.recursive import Recursive as Recursive
from .trees.recursive import RecursiveParams as RecursiveParams
from .trees.recursive import RNTNParams as RNTNParams
from .trees.tree_lstm import ChildSumTreeLSTM as ChildSumTreeLSTM
from .trees.tree_lstm import NaryTreeLSTM as NaryTreeLSTM
from .trees.tree_lstm import NaryTreeLSTMParams as NaryTreeLSTMParams
