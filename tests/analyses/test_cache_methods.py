"""`ActivationCache`'s methods: TransformerLens's own where they are right, autograd elsewhere."""

import inspect
from itertools import product

import pytest
import torch
from transformer_lens import ActivationCache

import tl_dla
from tests.support.models import all_in_float64, either, load, strong
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tests.zoo.reference import reference
from tl_dla import (
    accumulated_resid,
    apply_ln_to_stack,
    decompose,
    decompose_resid,
    direct_logit_attribution,
    logit_attrs,
    stack_head_results,
)
from tl_dla.errors import ArgumentError
from tl_dla.inputs.positions import slice_class

METHODS = [decompose_resid, accumulated_resid, stack_head_results, apply_ln_to_stack, logit_attrs]
PLACES = [{}, {"layer": -1}, {"layer": 2}, {"layer": 0}, {"layer": 1, "mlp_input": True}]


def cached(name, folded=False, **options):
    model = load(name, folded=folded)
    _, cache = model.run_with_cache(tokens(), **options)
    return model, cache


def same(ours, theirs, atol=1e-5):
    if isinstance(theirs, tuple):
        assert ours[1] == theirs[1]
        ours, theirs = ours[0], theirs[0]
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("ours", METHODS, ids=lambda f: f.__name__)
def test_parameters_and_defaults_are_transformer_lens_own(ours):
    theirs = list(inspect.signature(getattr(ActivationCache, ours.__name__)).parameters.values())
    mine = list(inspect.signature(ours).parameters.values())
    assert mine[0].name == "cache"
    pairs = [(p.name, p.default) for p in mine[1:] if p.name != "incl_bias"]
    assert pairs == [(p.name, p.default) for p in theirs[1:]]
    assert getattr(tl_dla, ours.__name__) is ours


# ---- where TransformerLens is right: folded models of the plain layout ---------------------------


@pytest.mark.parametrize("name", either("gpt2", "llama", "ln"))
@pytest.mark.parametrize("pos", [None, -1, (1, 4), [0, 5]])
def test_folded_stacks_are_transformer_lens_own_value_by_value(name, pos):
    _, cache = cached(name, folded=True)
    options = dict(pos_slice=pos, return_labels=True)
    for place in PLACES:
        same(decompose_resid(cache, **place, **options), cache.decompose_resid(**place, **options))
        for more in ({}, {"incl_mid": True}):
            same(
                accumulated_resid(cache, **place, **more, **options),
                cache.accumulated_resid(**place, **more, **options),
            )
        if "mlp_input" in place or place == {"layer": 0}:
            continue
        for more in ({}, {"incl_remainder": True}):
            same(
                stack_head_results(cache, **place, **more, **options),
                cache.stack_head_results(**place, **more, **options),
            )
    for more in ({"mode": "mlp"}, {"mode": "attn"}, {"incl_embeds": False}):
        same(decompose_resid(cache, **more, **options), cache.decompose_resid(**more, **options))


@pytest.mark.parametrize("name", either("gpt2", "llama", "ln"))
@pytest.mark.parametrize("pos", [None, -1])
def test_folded_norms_and_logits_are_transformer_lens_own(name, pos):
    _, cache = cached(name, folded=True)
    for place in PLACES:
        options = dict(pos_slice=pos, apply_ln=True, **place)
        same(decompose_resid(cache, **options), cache.decompose_resid(**options), 1e-4)
        same(accumulated_resid(cache, **options), cache.accumulated_resid(**options), 1e-4)
    for answers in [(5,), (5, 7), (ANSWERS, INCORRECT)]:
        stack = cache.decompose_resid(pos_slice=pos)
        got = logit_attrs(cache, stack, *answers, pos_slice=pos)
        same(got, cache.logit_attrs(stack, *answers, pos_slice=pos), 1e-4)


def test_a_batch_slice_is_transformer_lens_own():
    _, cache = cached("gpt2", folded=True)
    for batch, answers in ((1, 5), ([1], ANSWERS[1:]), ((0, 1), ANSWERS[:1])):
        options = dict(pos_slice=-1, batch_slice=batch)
        stack = cache.decompose_resid(pos_slice=-1)
        same(
            apply_ln_to_stack(cache, stack, -1, **options),
            cache.apply_ln_to_stack(stack, -1, **options),
        )
        same(
            logit_attrs(cache, stack, answers, **options),
            cache.logit_attrs(stack, answers, **options),
            1e-4,
        )


def test_a_stack_without_rows_or_without_prompts_is_read_too():
    model, cache = cached("gpt2", folded=True)
    final = cache["resid_post", -1][:, -1]
    same(
        apply_ln_to_stack(cache, final, layer=-1, pos_slice=-1),
        cache.apply_ln_to_stack(final, layer=-1, pos_slice=-1),
    )
    _, single = model.run_with_cache(tokens()[:1], remove_batch_dim=True)
    for pos in (-1, None):
        stack = single.decompose_resid(pos_slice=pos)
        same(decompose_resid(single, pos_slice=pos), stack)
        options = dict(pos_slice=pos, has_batch_dim=False)
        same(
            logit_attrs(single, stack, 5, 7, **options),
            single.logit_attrs(stack, 5, 7, **options),
            1e-4,
        )


@pytest.mark.parametrize("pos", [None, -1])
def test_a_stack_of_one_prompt_is_read_beside_the_cache_of_all(pos):
    """`batch_slice` then says which prompt of the cache the stack is of."""
    _, cache = cached("gpt2", folded=True)
    stack = cache.decompose_resid(pos_slice=pos)
    for batch in (1, -2, slice_class()(1)):
        options = dict(pos_slice=pos, batch_slice=batch)
        one = stack[:, 1 if batch != -2 else 0]
        for method, more in (("apply_ln_to_stack", ()), ("logit_attrs", (5, 7))):
            ours, theirs = getattr(tl_dla, method), getattr(cache, method)
            same(
                ours(cache, one, *more, **options, has_batch_dim=False),
                got := theirs(stack, *more, **options),
                1e-4,
            )
            same(theirs(one, *more, **options, has_batch_dim=False), got, 1e-4)
    with pytest.raises(ArgumentError, match="before d_model"):
        logit_attrs(cache, one, 5, pos_slice=pos, batch_slice=[0, 1], has_batch_dim=False)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_of_one_prompt_gives_its_row_of_the_batch(name):
    _, cache = cached(name)
    alone = cache.apply_slice_to_batch_dim(1)
    for layer, pos, apply_ln in product([1, -1], [None, (1, 3), -1], [False, True]):
        options = dict(layer=layer, pos_slice=pos, apply_ln=apply_ln)
        for method in METHODS[:3]:
            same(method(alone, **options), method(cache, **options)[:, 1])


def test_the_last_layer_has_three_names_and_before_the_first_there_are_no_heads():
    model, cache = cached("gpt2")
    for method in METHODS[:3]:
        last, *others = (method(cache, layer=layer, return_labels=True) for layer in (-1, None, 3))
        for vectors, labels in others:
            assert labels == last[1] and torch.equal(vectors, last[0])
    none, labels = stack_head_results(cache, layer=0, pos_slice=-1, return_labels=True)
    assert labels == [] and none.shape == (0, 2, model.cfg.d_model)
    rest, labels = stack_head_results(cache, 0, True, incl_remainder=True)
    assert labels == ["remainder"]
    same(rest[0], cache["resid_pre", 0])  # theirs is the end of the stream: layer −1
    outs = torch.stack([cache["attn_out", layer] for layer in range(2)])
    same(decompose_resid(cache, 1, mlp_input=True, mode="attn", incl_embeds=False), outs)


# ---- elsewhere: autograd on the plain module ----------------------------------------


@pytest.mark.parametrize("name", either("gptj", "gemma2", "cohere", "granite", "ln"))
def test_attributions_on_weights_as_published_are_the_gradients(name):
    model, plain = strong(name)
    with all_in_float64():
        truth = reference(plain, tokens(), ANSWERS, INCORRECT)
        _, cache = model.run_with_cache(tokens())
        for pos in (None, -1):
            components = decompose_resid(cache, pos_slice=pos, return_labels=True)
            heads = stack_head_results(cache, pos_slice=pos, return_labels=True)
            for (vectors, labels), rows in (
                (components, truth.components),
                (heads, truth.heads),
            ):
                got = logit_attrs(cache, vectors, ANSWERS, INCORRECT, pos_slice=pos)
                for label, value in zip(labels, got, strict=True):
                    if label in rows:
                        want = rows[label] if pos is None else rows[label][:, -1]
                        torch.testing.assert_close(value, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "olmo2", "ln"))
def test_the_rows_and_the_bias_add_up_to_what_the_norm_returned(name):
    model, _ = strong(name)
    with all_in_float64():
        _, cache = model.run_with_cache(tokens())
        rows = decompose_resid(cache)
        through = apply_ln_to_stack(cache, rows, incl_bias=True)
        norm = model.ln_final
        want = norm(rows.sum(0))
        torch.testing.assert_close(through.sum(0), want, atol=1e-9, rtol=1e-9)
        assert len(through) - len(rows) in (0, 1)
        own = apply_ln_to_stack(cache, accumulated_resid(cache), recompute_ln=True)
        torch.testing.assert_close(own[-1], want, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(own[0], norm(rows[:2].sum(0) if len(rows) % 2 == 0 else rows[0]))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("mlp_input", [False, True])
def test_the_input_of_a_layer_is_what_its_norm_was_given(name, mlp_input):
    model, _ = strong(name)
    given = []
    block = model.blocks[1]
    norm = block.ln2 if mlp_input else block.ln1

    def keep(_module, args, output):
        given.append((args[0], output))

    handle = norm.register_forward_hook(keep)
    with all_in_float64():
        _, cache = model.run_with_cache(tokens())
        handle.remove()
        x, y = given[0]
        place = dict(layer=1, mlp_input=mlp_input)
        rows = decompose_resid(cache, **place)
        torch.testing.assert_close(rows.sum(0), x, atol=1e-10, rtol=1e-10)
        through = apply_ln_to_stack(cache, rows, incl_bias=True, **place)
        torch.testing.assert_close(through.sum(0), y, atol=1e-9, rtol=1e-9)
        heads = decompose(cache, "head", pos=None, incl_remainder=True, **place)
        torch.testing.assert_close(heads.vectors.sum(0), x, atol=1e-10, rtol=1e-10)
        assert heads.labels[-1] == "remainder"


def test_decompose_takes_the_options_of_all_three():
    _, cache = cached("gpt2")
    vectors, labels = decompose(cache, layer=2, pos_slice=(0, 3), return_labels=True)
    same((vectors, labels), cache.decompose_resid(layer=2, pos_slice=(0, 3), return_labels=True))
    ends = decompose(cache, "layer", incl_mid=False)
    same(tuple(ends), cache.accumulated_resid(pos_slice=-1, return_labels=True))
    result = direct_logit_attribution(cache.model, tokens(), ANSWERS)
    read = decompose(cache, apply_ln=True).vectors @ cache.model.W_U[:, ANSWERS]
    got = torch.stack([read[:, i, i] for i in range(2)], 1)
    torch.testing.assert_close(got, result.attribution[: len(got)], atol=1e-4, rtol=1e-4)


# ---- readouts, and what does not fit ----------------------------------------


def test_a_single_prompt_of_a_stack_is_read_or_refused():
    model, cache = cached("gpt2")
    stack = decompose(cache)
    result = direct_logit_attribution(model, tokens(), ANSWERS)
    with pytest.raises(ArgumentError, match=r"\[row, 2, d\].*take the\s+prompt"):
        result.readout.of(stack.vectors[:, 0])
    alone = direct_logit_attribution(model, tokens()[:1], ANSWERS[:1])
    same(alone.readout.of(stack.vectors[:, 0]), alone.attribution[: len(stack.labels), 0])
    with pytest.raises(ArgumentError, match="take both at the same ones"):
        result.readout.of(decompose(cache, pos=None))


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_said():
    _, cache = cached("gpt2")
    rows = decompose_resid(cache)
    with pytest.raises(ArgumentError, match="layer must be 0 to 3"):
        decompose_resid(cache, layer=7)
    with pytest.raises(ArgumentError, match="mlp_input is for the input of a layer"):
        decompose_resid(cache, mlp_input=True)
    with pytest.raises(ArgumentError, match='mode must be "all"'):
        decompose_resid(cache, mode="nothing")
    with pytest.raises(ArgumentError, match="take the stack with the same pos_slice"):
        logit_attrs(cache, rows, 5, pos_slice=-1)
    one = cache.apply_slice_to_batch_dim(0)
    with pytest.raises(ArgumentError, match="batch_slice is for a cache with an axis of prompts"):
        logit_attrs(one, rows[:, 0], 5, batch_slice=0)
    with pytest.raises(ArgumentError, match="incl_bias adds a row"):
        apply_ln_to_stack(cache, rows[0], incl_bias=True)
