"""The model at hand: what may be passed as one, and what a run needs of it."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.support.models import either, load, of_4, words
from tests.zoo.bases import LL
from tests.zoo.build import ANSWERS, INCORRECT, build, hf_reference, perturb, tokens
from tests.zoo.configs import CONFIGS, NATIVE
from tl_dla import (
    attribute_attention,
    attribute_inputs,
    check_model,
    direct_logit_attribution,
    load_model,
)
from tl_dla.errors import ArgumentError
from tl_dla.inputs.models import require_eval, require_model, scales_with_length


@pytest.fixture(scope="module")
def model():
    return load("gpt2")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        (lambda: None, r"None was given: load one, such as model = load_model\(\"demo\"\)"),
        (lambda: "gpt2", r"a name was given: model = load_model\('gpt2'\)"),
        (lambda: build("gpt2")[1], "a name was given"),
        (lambda: hf_reference("gpt2"), "a GPT2LMHeadModel of transformers was given: wrap it with"),
        (lambda: {"a": 1}, "a dict was given"),
        (lambda: torch.nn.Linear(2, 2), "a Linear was given"),
    ],
    ids="None name folder transformers dict module".split(),
)
def test_what_is_no_model_is_one_sentence_with_the_remedy(given, fragment):
    with pytest.raises(ArgumentError, match=fragment):
        direct_logit_attribution(given(), tokens(), 5)


@pytest.mark.usefixtures("unchecked")
def test_arguments_are_read_before_the_model():
    for options, fragment in [
        ({"unit": "atom"}, "unit must be one of"),
        ({}, "answer_tokens is required"),
    ]:
        with pytest.raises(ValueError, match=fragment):
            direct_logit_attribution(object(), tokens(), **options)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_model_is_the_model(model):
    compiled = torch.compile(model)
    assert require_model(compiled) is model
    result = direct_logit_attribution(compiled, tokens(), 5)
    assert result.attribution.equal(direct_logit_attribution(model, tokens(), 5).attribution)


def test_weights_that_are_nowhere_are_refused():
    model = load.__wrapped__("gpt2")
    model.to("meta")
    with pytest.raises(ArgumentError, match="meta device, where they hold no numbers"):
        direct_logit_attribution(model, tokens(), 5)


PARTS = {  # in order: what is before the blocks, the blocks, what is after them
    "gpt2": (["transformer.wte", "transformer.wpe"], "transformer.h", ["transformer.ln_f"]),
    "gptj": (["transformer.wte"], "transformer.h", ["transformer.ln_f"]),
    "llama_bias": (["model.embed_tokens"], "model.layers", ["model.norm"]),
}


def offloaded(name: str, where: str, folder: Path):
    """A model of transformers whose weights `accelerate` brings to the CPU as they are used."""
    from accelerate import cpu_offload, disk_offload

    if where == "on the CPU":
        return cpu_offload(hf_reference(name), torch.device("cpu"))
    if where == "on disk":
        return disk_offload(hf_reference(name), folder, torch.device("cpu"))
    first, blocks, last = PARTS[name]  # two devices
    tied = [*first, *last, "lm_head"]
    rest = {"model.rotary_emb": "cpu"} if name == "llama_bias" else {"transformer.drop": "cpu"}
    places = dict.fromkeys(tied, "disk" if where == "the ends on disk" else "cpu")
    places |= {f"{blocks}.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    return AutoModelForCausalLM.from_pretrained(
        build(name)[1],
        attn_implementation="eager",
        device_map=places | rest,
        offload_folder=folder,
    ).eval()


@of_4  # 3.9 refuses to wrap a model that is offloaded already
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("where", ["on the CPU", "on disk", "blocks on disk", "the ends on disk"])
def test_offloaded_weights_give_what_they_give_at_hand(name, where, tmp_path):
    model, plain = load_model(offloaded(name, where, tmp_path), words()), load(name)
    assert any(weight.is_meta for weight in model.parameters())
    question = (tokens(), ANSWERS, INCORRECT)
    for unit in ("component", "head", "neuron", "source"):
        found, expected = (
            direct_logit_attribution(x, *question, unit=unit, pos=None) for x in (model, plain)
        )
        assert found.reconstruction.passed
        torch.testing.assert_close(found.attribution, expected.attribution, atol=1e-6, rtol=1e-5)
    assert attribute_inputs(model, *question).reconstruction.passed
    why = attribute_attention(model, tokens()[:1], "L1H2", query=5, key=3, versus=2)
    assert why.reconstruction.passed
    assert check_model(model, tokens()).passed
    cache = model.run_with_cache(tokens())[1]
    assert direct_logit_attribution(model, *question, cache=cache).reconstruction.passed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("unit", ["component", "head", "neuron", "source"])
def test_a_model_on_two_devices_gives_what_it_gives_on_one(unit):
    from transformer_lens.model_bridge import TransformerBridge

    folder = str(build("llama_bias")[1])
    model = TransformerBridge.boot_transformers(folder, n_devices=2)
    assert len({weight.device for weight in model.parameters()}) == 2
    found, expected = (
        direct_logit_attribution(x, tokens(), ANSWERS, INCORRECT, unit=unit, pos=None)
        for x in (model, load("llama_bias"))
    )
    assert found.reconstruction.passed
    torch.testing.assert_close(found.attribution.cpu(), expected.attribution, atol=1e-4, rtol=1e-3)


# ---- positions that scale with the length of the batch ----------------------------------------

SHORT, WIDE = torch.tensor([[1, 5, 7, 9]]), torch.tensor([[1, 5, 7, 9] + [0] * 20])
LONG = dict(rope_theta=1e4, original_max_position_embeddings=8)
ROPES = {
    "default": ("LlamaConfig", dict(rope_type="default", rope_theta=1e4), False),
    "linear": ("LlamaConfig", dict(rope_type="linear", factor=2.0, rope_theta=1e4), False),
    "yarn": ("LlamaConfig", dict(rope_type="yarn", factor=4.0, **LONG), False),
    "dynamic": ("LlamaConfig", dict(rope_type="dynamic", factor=4.0, **LONG), True),
    "longrope": (
        "Phi3Config",
        dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[9.0] * 4, **LONG),
        True,
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_what_scales_with_the_length_of_the_batch_is_told(name):
    config_class, rope, expected = ROPES[name]
    kwargs = dict(LL if config_class == "LlamaConfig" else CONFIGS["phi3"][1])
    kwargs["max_position_embeddings"] = 8 if name == "dynamic" else 64
    config = getattr(transformers, config_class)(**kwargs | dict(rope_parameters=rope))
    if name == "longrope":
        config.original_max_position_embeddings = 8
    hf_model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    perturb(hf_model)
    with torch.no_grad():  # the same four tokens, in a wider batch
        change = hf_model.eval()(WIDE).logits[:, :4] - hf_model(SHORT).logits
    assert (float(change.abs().max()) > 1e-3) is expected
    model = load_model(hf_model, tokenizer=words())
    assert scales_with_length(model) is expected


NATIVE_OF_4 = [pytest.param(name, marks=of_4) for name in NATIVE]


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "rwkv", *NATIVE_OF_4, *either("ln", "rotary")])
def test_most_models_do_not_scale_with_length(name):
    assert not scales_with_length(load(name))


@pytest.mark.parametrize("option", ["use_logn_attn", "use_dynamic_ntk_rope"])
@pytest.mark.parametrize("name", either("rotary"))
def test_a_hooked_transformer_says_that_it_scales(name, option):
    model = load.__wrapped__(name)
    setattr(model.cfg, option, True)
    assert scales_with_length(model)


def test_one_module_in_training_mode_is_enough_to_refuse():
    model = copy.deepcopy(load("gpt2"))
    require_eval(model)
    for module in model.modules():
        module.training = True
        todo = r"\.$" if module is model else ", or, .* leaves parts out: for module in"
        with pytest.raises(ArgumentError, match=rf"in training mode .* model.eval\(\) first{todo}"):
            require_eval(model)
        module.training = False
