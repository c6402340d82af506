"""The public names: type checkers read them here, and `__init__.py` imports them from here."""

from .analyses.attention_scores import attribute_attention as attribute_attention
from .analyses.cache_methods import accumulated_resid as accumulated_resid
from .analyses.cache_methods import apply_ln_to_stack as apply_ln_to_stack
from .analyses.cache_methods import decompose_resid as decompose_resid
from .analyses.cache_methods import logit_attrs as logit_attrs
from .analyses.cache_methods import stack_head_results as stack_head_results
from .analyses.check_model import check_model as check_model
from .analyses.comparison import compare as compare
from .analyses.completion import attribute_answer as attribute_answer
from .analyses.completion import attribute_completion as attribute_completion
from .analyses.geometry import unembedding_pca as unembedding_pca
from .analyses.head_patterns import top_heads_with_patterns as top_heads_with_patterns
from .analyses.logit_lens import logit_lens as logit_lens
from .analyses.paths import attribute_path as attribute_path
from .analyses.token_map import token_map as token_map
from .attribution import DirectLogitAttribution as DirectLogitAttribution
from .attribution import direct_logit_attribution as direct_logit_attribution
from .core.certificate import Reconstruction as Reconstruction
from .core.readout import Readout as Readout
from .core.run import required_hooks as required_hooks
from .core.saved import load_result as load_result
from .core.vectors import decompose as decompose
from .datasets.dataset import attribute_dataset as attribute_dataset
from .datasets.dataset import summarize as summarize
from .effects.erasure import erasures as erasures
from .effects.interventions import ablate as ablate
from .effects.recomputed import direct_effect_recomputed as direct_effect_recomputed
from .effects.repair import self_repair as self_repair
from .effects.suppression import copy_suppression as copy_suppression
from .errors import ArgumentError as ArgumentError
from .errors import IncompleteCacheError as IncompleteCacheError
from .errors import ModelNotFoundError as ModelNotFoundError
from .errors import OutputFolderError as OutputFolderError
from .errors import ReconstructionError as ReconstructionError
from .errors import TlDlaError as TlDlaError
from .errors import TokenError as TokenError
from .errors import UnsupportedModelError as UnsupportedModelError
from .input_attribution import attribute_inputs as attribute_inputs
from .loading import load_model as load_model

__version__: str
