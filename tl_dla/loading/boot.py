"""How each TransformerLens makes its model: 2 and 3 a `HookedTransformer`, 4 a `TransformerBridge`.

TransformerLens 3 has both, and a `HookedTransformer` only for the models on its list; 2 has no
bridge, and so only those models.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import transformer_lens
import transformers

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.sharded import are_sharded, is_sharded, team

DEMO = Path(__file__).parents[1] / "demo"  # the bundled model, as save_pretrained writes it
HAS_BRIDGE = util.find_spec("transformer_lens.model_bridge") is not None
HAS_HOOKED = "HookedTransformer" in getattr(  # 4.x raises when asked for the name; 2.x has no list
    transformer_lens, "__all__", ["HookedTransformer"]
)


def boot(
    source: str, device: str | torch.device | None, dtype: torch.dtype, *, hub_id: str = ""
) -> Any:
    """The model at `source`, a folder or a hub id; TransformerLens 2 and 3 may know it as `hub_id`.

    Raises:
        UnsupportedModelError: for a model that TransformerLens 2 does not know.
    """
    with quietly():
        if HAS_HOOKED and _is_known_to_hooked_transformer(hub_id):
            given = {}
            if source != hub_id:
                load = transformers.AutoModelForCausalLM.from_pretrained
                given["hf_model"] = load(source, dtype=dtype)
                given["tokenizer"] = transformers.AutoTokenizer.from_pretrained(source)
            return boot_hooked(hub_id, device=device, dtype=dtype, **given)
        return bridge(source, device=device, dtype=dtype)


def boot_loaded(model: Any, tokenizer: Any, *, device: Any, dtype: torch.dtype) -> Any:
    """A loaded model of `transformers`, wrapped; by TransformerLens 2 copied.

    Raises:
        UnsupportedModelError: for a model that TransformerLens 2 does not know, and for one whose
            quantised weights, or weights that processes share out, TransformerLens would have to
            split.
    """
    name, options = model.name_or_path, dict(hf_model=model, tokenizer=tokenizer)
    if team(model) is not None:
        _share_bias(model.get_output_embeddings())
    own = set(model.parameters())
    with quietly():
        if not HAS_BRIDGE and _is_known_to_hooked_transformer(name):
            return boot_hooked(name, device=device, dtype=dtype, **options).eval()
        options |= dict(device=device, dtype=dtype)
        try:
            wrapped = bridge(name or type(model).__name__, **options)
        except RuntimeError as error:  # it splits a joint weight of queries, keys and values
            if are_sharded(model):
                raise _joint(model) from error
            if not getattr(model, "is_quantized", False):
                raise
            raise UnsupportedModelError(
                f"TransformerLens cannot wrap this {type(model).__name__} with its weights kept"
                f" quantised ({error}): pass hf_model.dequantize()."
            ) from error
    if any(is_sharded(weight) and weight not in own for weight in wrapped.parameters()):
        raise _joint(model)
    return wrapped


def _joint(model: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"TransformerLens splits joint weights of this {type(model).__name__}, which processes"
        " share out, into others that it cannot run: load it whole in each process."
    )


def _share_bias(unembed: Any) -> None:
    """Give an unembedding of which each process makes some logits alone a bias of 0.

    TransformerLens gives one without a bias zeros for the whole vocabulary, in each process.
    """
    weight = getattr(unembed, "weight", None)
    if is_sharded(weight) and getattr(unembed, "bias", None) is None:
        zeros = torch.zeros_like(weight.detach()[:, 0])
        unembed.bias = torch.nn.Parameter(zeros, requires_grad=False)


def boot_demo(device: str | torch.device | None, dtype: torch.dtype) -> Any:
    """The bundled model."""
    if not HAS_HOOKED:
        return boot(str(DEMO), device, dtype)
    with quietly():
        return load_hooked(DEMO).to(dtype).to(device or _best_device())


def load_hooked(folder: Path) -> Any:
    """A GPT-2 in a folder as a `HookedTransformer`; nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoTokenizer, GPT2LMHeadModel

    # `HookedTransformer.from_pretrained` takes only names on its list: these are its own steps.
    config = convert_hf_model_config(str(folder)) | {"model_name": "demo", "device": "cpu"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HookedTransformer(HookedTransformerConfig(**config), tokenizer)
    pretrained = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    model.load_and_process_state_dict(
        convert_gpt2_weights(pretrained, model.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def bridge(name: str, **options: Any) -> Any:
    """A `TransformerBridge` in evaluation mode.

    Raises:
        UnsupportedModelError: where TransformerLens has none.
    """
    if not HAS_BRIDGE:
        raise UnsupportedModelError(
            f"TransformerLens {metadata.version('transformer-lens')} reads only the models on its"
            f" own list, by their hub ids, and {name!r} is none: install transformer-lens 3 or"
            " later."
        )
    from transformer_lens.model_bridge import TransformerBridge

    made = TransformerBridge.boot_transformers(name, **options).eval()
    # Some of TransformerLens 3.0 to 3.5 stay in training mode: they pass on what is set.
    for module in made.modules():
        vars(module)["training"] = False
    return made


def boot_hooked(name: str, **options: Any) -> Any:
    """A `HookedTransformer` with its weights as published."""
    return transformer_lens.HookedTransformer.from_pretrained_no_processing(name, **options)


def known_names() -> dict[str, str]:
    """The names that TransformerLens knows, by their lower case."""
    try:
        from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
    except ImportError:  # 2.x
        from transformer_lens.loading_from_pretrained import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    names = [alias for aliases in MODEL_ALIASES.values() for alias in aliases]
    return {name.lower(): name for name in [*names, *OFFICIAL_MODEL_NAMES]}


@contextmanager
def quietly() -> Iterator[None]:
    """Without what 3.x prints on stdout, nor its warnings that 4.x has no HookedTransformer."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
        yield


def _is_known_to_hooked_transformer(hub_id: str) -> bool:
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    return hub_id.lower() in make_model_alias_map()


def _best_device() -> Any:
    try:
        from transformer_lens.utilities.devices import get_device
    except ImportError:  # 2.x
        from transformer_lens.utils import get_device
    return get_device()
