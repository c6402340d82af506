"""Exact direct logit attribution for TransformerLens models.

A public name is imported when it is first used: `tl-dla --help` then needs no PyTorch, and a name
costs only what it needs. A new one goes in both lists below, which a test holds equal.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_dla.analyses.check_model import check_model as check_model
    from tl_dla.analyses.completion import AnswerAttribution as AnswerAttribution
    from tl_dla.analyses.completion import attribute_answer as attribute_answer
    from tl_dla.analyses.geometry import UnembeddingPCA as UnembeddingPCA
    from tl_dla.analyses.geometry import unembedding_pca as unembedding_pca
    from tl_dla.analyses.head_patterns import HeadPattern as HeadPattern
    from tl_dla.analyses.head_patterns import top_heads_with_patterns as top_heads_with_patterns
    from tl_dla.analyses.logit_lens import LogitLens as LogitLens
    from tl_dla.analyses.logit_lens import logit_lens as logit_lens
    from tl_dla.analyses.paths import attribute_path as attribute_path
    from tl_dla.analyses.promotion import PromotedTokens as PromotedTokens
    from tl_dla.analyses.token_map import TokenMap as TokenMap
    from tl_dla.analyses.token_map import token_map as token_map
    from tl_dla.attribution import direct_logit_attribution as direct_logit_attribution
    from tl_dla.core.certificate import Reconstruction as Reconstruction
    from tl_dla.core.decomposition import required_hooks as required_hooks
    from tl_dla.core.readout import Readout as Readout
    from tl_dla.core.residual import ResidualStack as ResidualStack
    from tl_dla.core.residual import decompose as decompose
    from tl_dla.core.result import DirectLogitAttribution as DirectLogitAttribution
    from tl_dla.datasets.dataset import attribute_dataset as attribute_dataset
    from tl_dla.datasets.dataset import summarize as summarize
    from tl_dla.datasets.summary import DatasetAttribution as DatasetAttribution
    from tl_dla.effects.audit import Audit as Audit
    from tl_dla.effects.erasure import Erasures as Erasures
    from tl_dla.effects.erasure import erasures as erasures
    from tl_dla.effects.interventions import ablate as ablate
    from tl_dla.effects.recomputed import direct_effect_recomputed as direct_effect_recomputed
    from tl_dla.effects.repair import SelfRepair as SelfRepair
    from tl_dla.effects.repair import self_repair as self_repair
    from tl_dla.effects.suppression import copy_suppression as copy_suppression
    from tl_dla.errors import ArgumentError as ArgumentError
    from tl_dla.errors import IncompleteCacheError as IncompleteCacheError
    from tl_dla.errors import ModelNotFoundError as ModelNotFoundError
    from tl_dla.errors import OutputFolderError as OutputFolderError
    from tl_dla.errors import ReconstructionError as ReconstructionError
    from tl_dla.errors import TlDlaError as TlDlaError
    from tl_dla.errors import TokenError as TokenError
    from tl_dla.errors import UnsupportedModelError as UnsupportedModelError
    from tl_dla.loading import load_model as load_model

_MODULES = {
    "AnswerAttribution": "analyses.completion",
    "attribute_answer": "analyses.completion",
    "HeadPattern": "analyses.head_patterns",
    "top_heads_with_patterns": "analyses.head_patterns",
    "direct_logit_attribution": "attribution",
    "Audit": "effects.audit",
    "check_model": "analyses.check_model",
    "attribute_dataset": "datasets.dataset",
    "summarize": "datasets.dataset",
    "TokenMap": "analyses.token_map",
    "token_map": "analyses.token_map",
    "Erasures": "effects.erasure",
    "erasures": "effects.erasure",
    "ArgumentError": "errors",
    "ModelNotFoundError": "errors",
    "OutputFolderError": "errors",
    "IncompleteCacheError": "errors",
    "ReconstructionError": "errors",
    "TlDlaError": "errors",
    "TokenError": "errors",
    "UnsupportedModelError": "errors",
    "UnembeddingPCA": "analyses.geometry",
    "unembedding_pca": "analyses.geometry",
    "ablate": "effects.interventions",
    "LogitLens": "analyses.logit_lens",
    "logit_lens": "analyses.logit_lens",
    "load_model": "loading",
    "attribute_path": "analyses.paths",
    "PromotedTokens": "analyses.promotion",
    "Readout": "core.readout",
    "direct_effect_recomputed": "effects.recomputed",
    "Reconstruction": "core.certificate",
    "SelfRepair": "effects.repair",
    "self_repair": "effects.repair",
    "ResidualStack": "core.residual",
    "decompose": "core.residual",
    "DirectLogitAttribution": "core.result",
    "DatasetAttribution": "datasets.summary",
    "copy_suppression": "effects.suppression",
    "required_hooks": "core.decomposition",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
