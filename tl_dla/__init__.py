"""Exact direct logit attribution for TransformerLens models.

A public name is imported when it is first used: `tl-dla --help` then needs no PyTorch, and a name
costs only what it needs. A new one goes in both lists below, which a test holds equal.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_dla.answers import AnswerAttribution as AnswerAttribution
    from tl_dla.answers import attribute_answer as attribute_answer
    from tl_dla.attention import HeadPattern as HeadPattern
    from tl_dla.attention import top_heads_with_patterns as top_heads_with_patterns
    from tl_dla.attribution import direct_logit_attribution as direct_logit_attribution
    from tl_dla.checking import check_model as check_model
    from tl_dla.data.dataset import attribute_dataset as attribute_dataset
    from tl_dla.data.dataset import summarize as summarize
    from tl_dla.data.summary import DatasetAttribution as DatasetAttribution
    from tl_dla.effects.audit import Audit as Audit
    from tl_dla.effects.erasure import Erasures as Erasures
    from tl_dla.effects.erasure import erasures as erasures
    from tl_dla.effects.interventions import ablate as ablate
    from tl_dla.effects.recomputed import direct_effect_recomputed as direct_effect_recomputed
    from tl_dla.effects.repair import SelfRepair as SelfRepair
    from tl_dla.effects.repair import self_repair as self_repair
    from tl_dla.effects.suppression import copy_suppression as copy_suppression
    from tl_dla.embedding_map import TokenMap as TokenMap
    from tl_dla.embedding_map import token_map as token_map
    from tl_dla.errors import ArgumentError as ArgumentError
    from tl_dla.errors import IncompleteCacheError as IncompleteCacheError
    from tl_dla.errors import ModelNotFoundError as ModelNotFoundError
    from tl_dla.errors import OutputFolderError as OutputFolderError
    from tl_dla.errors import ReconstructionError as ReconstructionError
    from tl_dla.errors import TlDlaError as TlDlaError
    from tl_dla.errors import TokenError as TokenError
    from tl_dla.errors import UnsupportedModelError as UnsupportedModelError
    from tl_dla.geometry import UnembeddingPCA as UnembeddingPCA
    from tl_dla.geometry import unembedding_pca as unembedding_pca
    from tl_dla.lens import LogitLens as LogitLens
    from tl_dla.lens import logit_lens as logit_lens
    from tl_dla.loading import load_model as load_model
    from tl_dla.paths import attribute_path as attribute_path
    from tl_dla.promotion import PromotedTokens as PromotedTokens
    from tl_dla.readout import Readout as Readout
    from tl_dla.reconstruction import Reconstruction as Reconstruction
    from tl_dla.residual import ResidualStack as ResidualStack
    from tl_dla.residual import decompose as decompose
    from tl_dla.result import DirectLogitAttribution as DirectLogitAttribution
    from tl_dla.units import required_hooks as required_hooks

_MODULES = {
    "AnswerAttribution": "answers",
    "attribute_answer": "answers",
    "HeadPattern": "attention",
    "top_heads_with_patterns": "attention",
    "direct_logit_attribution": "attribution",
    "Audit": "effects.audit",
    "check_model": "checking",
    "attribute_dataset": "data.dataset",
    "summarize": "data.dataset",
    "TokenMap": "embedding_map",
    "token_map": "embedding_map",
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
    "UnembeddingPCA": "geometry",
    "unembedding_pca": "geometry",
    "ablate": "effects.interventions",
    "LogitLens": "lens",
    "logit_lens": "lens",
    "load_model": "loading",
    "attribute_path": "paths",
    "PromotedTokens": "promotion",
    "Readout": "readout",
    "direct_effect_recomputed": "effects.recomputed",
    "Reconstruction": "reconstruction",
    "SelfRepair": "effects.repair",
    "self_repair": "effects.repair",
    "ResidualStack": "residual",
    "decompose": "residual",
    "DirectLogitAttribution": "result",
    "DatasetAttribution": "data.summary",
    "copy_suppression": "effects.suppression",
    "required_hooks": "units",
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
