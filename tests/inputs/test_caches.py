"""A supplied cache is held to its model and its input; what cannot be checked is said."""

import pytest
import torch

from tests.support.models import either, load, with_tokenizer, words
from tests.zoo.build import tokens
from tl_dla import attribute_inputs, direct_logit_attribution, required_hooks
from tl_dla.errors import ArgumentError, TokenError
from tl_dla.inputs.caches import check_cache, read_cache, read_cached_prompts

# Positions that are added or not, embeddings that are scaled, projected, normalised.
ARCHITECTURES = "gpt2 llama gemma gemma2 gemma3 bloom opt_350m gpt_neox falcon granite rwkv".split()
PAD = 0
LEFT = torch.tensor([[PAD, PAD, 1, 8, 6], [1, 40, 41, 42, 8]])


@pytest.fixture(scope="module")
def model():
    return with_tokenizer("gpt2", words("w0"))


def cache_of(model, batch, names=None, **options):
    keep = names if names is None else lambda name: name in names
    return model.run_with_cache(batch, names_filter=keep, **options)[1]


def checked(model, cache, input=None, **options):
    cache = read_cache(model, cache)
    return check_cache(model, cache, read_cached_prompts(model, input, cache, **options))


def test_a_cache_of_its_input_passes(model):
    batch = tokens()
    for names in (None, required_hooks(model, "component"), required_hooks(model, "layer")):
        assert checked(model, cache_of(model, batch, names), batch) == []
    assert checked(model, cache_of(model, batch)) == []  # its own tokens


@pytest.mark.parametrize("unit", ["component", "head", "layer", None])
def test_a_cache_of_another_input_is_refused(model, unit):
    other = tokens().clone()
    other[1, 4] = 50
    cache = cache_of(model, other, unit and required_hooks(model, unit))
    with pytest.raises(TokenError, match="differ at position 4 of prompt 1, where the input has"):
        direct_logit_attribution(model, tokens(), 5, unit=unit or "component", cache=cache)


def test_a_cache_of_another_model_is_refused(model):
    cache = cache_of(load.__wrapped__("gpt2"), tokens())
    with pytest.raises(ArgumentError, match="made by another model"):
        direct_logit_attribution(model, tokens(), 5, cache=cache)


def test_what_cannot_be_checked_is_said(model):
    nameless = cache_of(model, tokens())
    nameless.model = None
    assert checked(model, nameless, tokens()) == ["the cache's model (it names none)"]
    final = cache_of(model, tokens(), ["ln_final.hook_in", "blocks.2.hook_resid_post"])
    assert checked(model, final) == ["the cache's prompts (no input was given)"]
    assert checked(model, final, tokens()) == [
        "the cache's prompts (it holds neither tokens nor embeddings)"
    ]


def test_padding_on_the_left_must_have_been_masked(model):
    seen = cache_of(model, LEFT)
    mask = (LEFT != PAD).long()
    with pytest.raises(TokenError, match="attended to the padding on their left"):
        direct_logit_attribution(model, LEFT, 5, cache=seen)
    masked = cache_of(model, LEFT, attention_mask=mask)
    assert checked(model, masked, LEFT) == checked(model, masked, LEFT, attention_mask=mask) == []
    names = [*required_hooks(model, "component"), "ln_final.hook_scale"]
    partial = cache_of(model, LEFT, names, attention_mask=mask)
    (said,) = checked(model, partial, LEFT)
    assert said.startswith("that the padding on the left was masked")


@pytest.mark.parametrize("name", [*ARCHITECTURES, *either("ln", "rotary", "post_embedding_ln")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_of_every_architecture_are_told_apart(name, dtype):
    model = load(name, dtype)
    held = [x for x in ("hook_embed", "blocks.0.hook_resid_pre") if x in model.hook_dict]
    other = tokens().clone()
    other[0, 5] = 50
    for place in held:
        names = [place, "ln_final.hook_in", model.hook_dict[place].name]
        cache = cache_of(model, tokens(), names)
        assert checked(model, cache, tokens()) == []
        with pytest.raises(TokenError, match="differ at position 5 of prompt 0"):
            checked(model, cache, other)


def test_a_cache_may_be_a_dict(model):
    expected = direct_logit_attribution(model, tokens(), 5, 7).attribution
    _, plain = model.run_with_cache(tokens(), return_cache_object=False)
    result = direct_logit_attribution(model, tokens(), 5, 7, cache=plain)
    torch.testing.assert_close(result.attribution, expected, atol=2e-6, rtol=0)
    single = {name: x[0] for name, x in cache_of(model, tokens()[:1]).cache_dict.items()}
    assert not read_cache(model, single).has_batch_dim


@pytest.mark.parametrize(
    ("prompts", "sentence"), [([], "The prompt is empty"), (["w5", 7], "a list held a int")]
)
def test_what_is_no_prompt_is_one_sentence_beside_a_cache_too(model, prompts, sentence):
    with pytest.raises(TokenError, match=sentence):
        direct_logit_attribution(model, prompts, 5, cache=cache_of(model, tokens()))


def test_what_is_no_cache_is_one_sentence(model):
    pair = model.run_with_cache(tokens())
    for given, name in [(pair, "tuple"), (pair[0], "Tensor"), ("cache", "str")]:
        with pytest.raises(ArgumentError, match=f"a {name} was given: logits, cache = model.run"):
            direct_logit_attribution(model, tokens(), 5, cache=given)


@pytest.mark.parametrize("unit", ["component", "head", "input"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cache_in_half_precision_is_read_as_what_it_was_rounded_from(unit, dtype):
    model, batch = load("falcon"), tokens()
    _, cache = model.run_with_cache(batch)
    half = {name: x.to(dtype) for name, x in cache.items() if x.is_floating_point()}

    def attribute(**options):
        if unit == "input":
            return attribute_inputs(model, batch, 5, 9, pos=[-1, 3], **options)
        return direct_logit_attribution(model, batch, 5, 9, unit=unit, pos=[-1, 3], **options)

    whole, read = attribute(), attribute(cache=half)
    assert read.labels == whole.labels and read.reconstruction.passed  # no row of rounding
    miss = float((read.attribution - whole.attribution).abs().max())
    assert 0 < miss < 4 * torch.finfo(dtype).eps * float(whole.attribution.abs().max())
    other = batch.clone()
    other[1, 4] += 1
    with pytest.raises(TokenError, match="position 4 of prompt 1"):
        direct_logit_attribution(model, other, 5, cache=half)
