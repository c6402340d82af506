"""Twenty wrong solutions, written out as a learner would, and what the check says of each.

Unlike the cases of `tests/support/mistakes.py` they are whole programs, each wrong in its own way.
"""

import re

import pytest
import torch

from tl_dla.exercises import EXERCISES, load_lesson
from tl_dla.exercises.catalogue import judge


@pytest.fixture(scope="module")
def lesson():
    return load_lesson()


WRONG = []


def says(name, sentence):
    """Keep the function as a wrong solution of the exercise, of which this is said."""
    return lambda function: WRONG.append((name, function, sentence))


@says("choose_tokens", "a leading space is missing")
def by_split(model, prompt):
    words = prompt.replace(",", "").split(" ")
    names = [w for w in words[1:] if w.istitle()]
    foil = [n for n in names if names.count(n) == 2][0]
    answer = [n for n in names if n != foil][0]
    return model.to_tokens(answer)[0, 1].item(), model.to_tokens(foil)[0, 1].item()


@says("choose_tokens", "you take the first name for the answer")
def from_tokens(model, prompt):
    names = [t for t in model.to_str_tokens(prompt)[2:] if t[1:2].isupper()]
    return model.to_single_token(names[0]), model.to_single_token(names[1])


@says("choose_tokens", "the token that begins every prompt")
def first_column(model, prompt):
    return tuple(model.to_tokens([" Mary", " John"])[:, 0].tolist())


@says("logit_diff_directions", "prompts last")
def no_transpose(model, correct, incorrect):
    return model.ln_final.w[:, None] * (model.W_U[:, correct] - model.W_U[:, incorrect])


@says("logit_diff_directions", "it stops with RuntimeError: The size of tensor")
def gamma_on_the_wrong_axis(model, correct, incorrect):
    return model.ln_final.w * (model.W_U[:, correct] - model.W_U[:, incorrect])


@says("logit_diff_directions", ("First: you forgot γ", "Second: these directions have length 1"))
def cosine(model, correct, incorrect):
    d = (model.W_U[:, correct] - model.W_U[:, incorrect]).T
    return d / d.norm(dim=1, keepdim=True)


@says("residual_stack_to_logit_diff", "each row was divided by a scale recomputed")
def torch_layer_norm(stack, cache, directions, pos=-1):
    x = torch.nn.functional.layer_norm(stack, stack.shape[-1:])
    return (x * directions).sum(-1).mean(-1)


@says("residual_stack_to_logit_diff", "the scale is that of position 14; .* of position 3")
def apply_ln_at_the_end(stack, cache, directions, pos=-1):
    x = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    return torch.einsum("...bd,bd->...b", x, directions).mean(-1)


@says("residual_stack_to_logit_diff", "all your numbers are the same multiple")
def mean_over_d_model(stack, cache, directions, pos=-1):
    x = (stack - stack.mean(-1, keepdim=True)) / cache["ln_final.hook_scale"][:, pos]
    return (x * directions).mean(dim=(-1, -2))


@says("residual_stack_to_logit_diff", "a number for each prompt")
def forgot_the_mean(stack, cache, directions, pos=-1):
    x = (stack - stack.mean(-1, keepdim=True)) / cache["ln_final.hook_scale"][:, pos]
    return (x * directions).sum(-1)


@says("logit_lens", "the scale is frozen")
def lens_from_apply_ln(model, cache, correct, incorrect):
    x = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1)
    x = cache.apply_ln_to_stack(x, layer=-1, pos_slice=-1) * model.ln_final.w + model.ln_final.b
    logits = x @ model.W_U + model.b_U
    b = range(len(correct))
    return (logits[:, b, correct] - logits[:, b, incorrect]).mean(1)


@says("logit_lens", "a number for each prompt")
def lens_for_each_prompt(model, cache, correct, incorrect):
    logits = model.ln_final(cache.accumulated_resid(-1, incl_mid=True, pos_slice=-1)) @ model.W_U
    logits = logits + model.b_U
    b = range(len(correct))
    return logits[:, b, correct] - logits[:, b, incorrect]


@says("per_layer_logit_diff", "accumulated so far")
def layers_of_the_stream(cache, directions):
    stack = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1)
    return (cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1) * directions).sum(-1).mean(-1)


@says("per_head_logit_diff", "the heads are in the wrong places")
def heads_reshaped(model, cache, directions):
    stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    rows = (cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1) * directions).sum(-1).mean(-1)
    return rows.reshape(model.cfg.n_heads, model.cfg.n_layers).T


@says("top_heads", "the second list is by magnitude")
def top_by_magnitude(per_head, k):
    n = per_head.shape[1]
    flat = per_head.flatten()
    best = flat.topk(k).indices.tolist()
    worst = flat.abs().topk(k).indices.tolist()
    return [(i // n, i % n) for i in best], [(i // n, i % n) for i in worst]


@says("source_contributions", "two mistakes at once")
def attention_alone(model, cache, layer, head, directions):
    v = cache["v", layer][:, :, head] @ model.blocks[layer].attn.W_O[head]
    pattern = cache["pattern", layer][:, head, -1]
    return pattern * torch.einsum("bpd,bd->bp", v, directions)


@says("suppressing_head", "lowest row of the logit difference")
def negative_of_the_difference(model, cache, tokens):
    correct = torch.tensor([model.to_single_token(name) for name in (" Mary", " Paul", " Emma")])
    incorrect = torch.tensor([model.to_single_token(name) for name in (" John", " Tom", " Kate")])
    u = (model.W_U[:, correct] - model.W_U[:, incorrect]).T * model.ln_final.w
    stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    rows = (cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1) * u).sum(-1).mean(-1)
    return divmod(int(rows.argmin()), 4)


@says("logit_diff_lost", "your hook is still on the model")
def hook_left_on(model, tokens, correct, incorrect, layer, head):
    b = torch.arange(len(tokens))
    full = model(tokens)[:, -1]

    def zero(z, hook):
        z[:, -1, head] = 0
        return z

    model.add_hook(f"blocks.{layer}.attn.hook_z", zero)
    less = model(tokens)[:, -1]
    change = full - less
    return (change[b, correct] - change[b, incorrect]).mean().item()


@says("all_rows", ("First: did you forget b_U", "Second: β is not divided"))
def beta_with_the_scale(model, cache, correct, incorrect):
    u = (model.W_U[:, correct] - model.W_U[:, incorrect]).T
    stack = cache.decompose_resid(layer=-1, pos_slice=-1)
    stack = torch.cat(
        [
            stack - stack.mean(-1, keepdim=True),
            (model.ln_final.b / model.ln_final.w).expand(1, 3, -1),
        ]
    )
    rows = stack / cache["ln_final.hook_scale"][:, -1] * model.ln_final.w
    return (rows * u).sum(-1).mean(-1)


@says("adds_up", "make the tolerance grow")
def allclose(rows, expected):
    return bool(torch.isclose(rows.sum(), torch.tensor(expected), rtol=1e-6, atol=1e-5))


def test_there_are_twenty_for_ten_exercises_and_more():
    assert len(WRONG) == 20
    assert len({name for name, _, _ in WRONG}) >= 10


@pytest.mark.parametrize(("name", "wrong", "sentences"), WRONG, ids=[w[1].__name__ for w in WRONG])
def test_a_wrong_solution_is_told_what_is_wrong(name, wrong, sentences, lesson):
    sentences = (sentences,) if isinstance(sentences, str) else sentences
    try:
        verdict = judge(name, wrong, lesson)
    except RuntimeError as error:
        said = f"it stops with RuntimeError: {error}"
    else:
        assert verdict.points == 0 < EXERCISES[name].points
        said = verdict.says
    assert all(re.search(sentence, said) for sentence in sentences), said
