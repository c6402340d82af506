"""Exact direct logit attribution for TransformerLens models."""

from tl_dla.attribution import direct_logit_attribution as direct_logit_attribution
from tl_dla.checking import check_model as check_model
from tl_dla.errors import IncompleteCacheError as IncompleteCacheError
from tl_dla.errors import ReconstructionError as ReconstructionError
from tl_dla.errors import TlDlaError as TlDlaError
from tl_dla.errors import TokenError as TokenError
from tl_dla.errors import UnsupportedModelError as UnsupportedModelError
from tl_dla.lens import LogitLens as LogitLens
from tl_dla.lens import logit_lens as logit_lens
from tl_dla.loading import load_model as load_model
from tl_dla.readout import Readout as Readout
from tl_dla.reconstruction import Reconstruction as Reconstruction
from tl_dla.residual import ResidualStack as ResidualStack
from tl_dla.residual import decompose as decompose
from tl_dla.result import DirectLogitAttribution as DirectLogitAttribution
from tl_dla.units import required_hooks as required_hooks
