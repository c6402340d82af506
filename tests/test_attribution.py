"""Rows against TransformerLens's own, against autograd, and against taking a part away.

What each architecture needs is in `test_architectures.py`; here are the promises of the one entry
point, on models of each kind.
"""

from collections import Counter

import pytest
import torch
from transformer_lens.tools.analysis import direct_logit_attribution as transformer_lens_own

from tests.support.models import all_in_float64, counted, either, load, of_4, strong
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tests.zoo.reference import reference
from tl_dla import direct_logit_attribution, required_hooks

UNITS = ["component", "layer", "head"]

# Grouped heads, mixture of experts, parallel blocks, b_U, attention only, no positions added.
FOLDED = either("gpt2", "gptj", "gpt_neox", "llama", "qwen2", "mixtral", "phi_mha")
FOLDED += either("ln", "rms", "grouped", "attn_only", "parallel", "rotary")
PARALLEL = ["gptj", "gpt_neox", "phi_mha", "parallel"]  # attention and MLP read the same stream
# LayerNorm with β, b_U where the model has one; RMSNorm; norms after sublayers; a soft cap.
STRONG = either("gpt2", "gptj", "phi", "gpt_neox", "llama", "gemma2", "granite", "olmo2")
STRONG += [pytest.param("cohere", marks=of_4)]  # TransformerLens 3 computes another model
STRONG += either("ln", "parallel", "attn_only", "grouped", "sandwich", "post_norm_ln", "softcap")


# ---- TransformerLens's own numbers -------------------------------------------------------------


@pytest.mark.parametrize("pos", [-1, None])
@pytest.mark.parametrize("name", FOLDED)
def test_on_a_folded_model_rows_are_those_of_transformer_lens(name, pos):
    model = load(name, folded=True)
    for unit in UNITS:
        if unit == "layer" and name in [*PARALLEL, "attn_only"]:
            continue  # TransformerLens asks for a hook_resid_mid that these do not have
        # One answer for all: with one per prompt, TransformerLens 3 mixes prompts and positions.
        theirs = transformer_lens_own(model, tokens(), 5, 7, unit=unit, pos=pos)
        ours = direct_logit_attribution(
            model, tokens(), 5, 7, unit=unit, pos=pos, include_bias=False
        )
        n = len(theirs.labels) - (unit == "head")
        assert ours.labels[:n] == theirs.labels[:n]
        close(ours.attribution[:n], theirs.attribution[:n], 2e-6)
        if unit == "head":
            assert theirs.labels[n] == "remainder"
            close(ours.attribution[n:].sum(0), theirs.attribution[n], 5e-6)
        else:
            assert len(ours.labels) == n


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_unembedding_bias_is_a_row_of_its_own(name):
    model = load(name, folded=True)
    result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT)
    without = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, include_bias=False)
    own = model(tokens())[:, -1].detach()
    difference = own[[0, 1], ANSWERS] - own[[0, 1], INCORRECT]
    b_U = model.b_U[ANSWERS] - model.b_U[INCORRECT]
    close(result.attribution.sum(0), difference, 1e-5)
    close(without.attribution.sum(0), difference - b_U, 1e-5)
    close(without.logit, difference - b_U, 1e-5)
    assert [label for label in result.labels if label not in without.labels] == (
        ["b_U"] if b_U.any() else []
    )


# ---- autograd, in float64 ----------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize("name", STRONG)
def test_on_an_unfolded_model_rows_are_those_of_autograd(name, unit):
    model, plain = strong(name)
    for incorrect in (None, INCORRECT):
        with all_in_float64():
            result = direct_logit_attribution(
                model, tokens(), ANSWERS, incorrect, unit=unit, pos=None
            )
        expected = reference(plain, tokens(), ANSWERS, incorrect)
        check_rows(result, expected.heads if unit == "head" else expected.components)
        close(result.logit, expected.logit, 1e-9)
        close(result.attribution.sum(0), expected.logit, 1e-9)


@pytest.mark.parametrize("name", either("gpt2", "gptj", "llama", "ln", "parallel"))
def test_a_layer_row_is_the_logit_that_the_stream_would_give_there(name):
    """With the last scale frozen: the plain module's own final norm and unembedding."""
    model, plain = strong(name)
    with all_in_float64():
        result = direct_logit_attribution(model, tokens(), ANSWERS, unit="layer", pos=None)
    rows = reference(plain, tokens(), ANSWERS).components
    running, seen = rows["start"].clone(), {"0_pre": rows["start"]}
    for layer in range(3):
        seen[f"{layer}_pre"] = running.clone()
        running += rows[f"{layer}_attn_out"]
        seen[f"{layer}_mid"] = running.clone()
        running += rows.get(f"{layer}_mlp_out", 0)
    seen["final_post"] = running
    sights = [label for label in result.labels if label not in ("ln_final.b", "b_U")]
    assert set(sights) <= set(seen) and {"0_pre", "2_pre", "final_post"} <= set(sights)
    assert ("1_mid" in sights) != (name in PARALLEL)
    for label in sights:
        close(result[label], seen[label], 1e-9)


# ---- taking a part away ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:A forward hook edited")
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=of_4) for name in ("gpt2", "gptj", "phi")),
        *either("ln", "parallel", "rms", "post_norm_ln"),
    ],
)
def test_taking_a_write_out_of_the_final_stream_moves_the_logit_by_its_row(name):
    model, _ = strong(name)
    with all_in_float64():
        logits, cache = model.run_with_cache(tokens())
        result = direct_logit_attribution(model, tokens(), ANSWERS)
        last = model.cfg.n_layers - 1
        stream = f"blocks.{last}.hook_resid_post"
        written = {
            label: cache[f"blocks.{label[0]}.hook_{label[2:]}"]
            for label in result.labels
            if label[0].isdigit()
        }
        written["embed"] = cache["hook_embed"]
        if "pos_embed" in result.labels:
            written["pos_embed"] = cache["hook_pos_embed"]
        assert set(result.labels) - set(written) <= {"ln_final.b", "b_U"}
        scale = cache["ln_final.hook_scale"]
        for label, write in written.items():
            changed = model.run_with_hooks(
                tokens(),
                fwd_hooks=[
                    (stream, lambda x, hook, write=write: x - write),
                    ("ln_final.hook_scale", lambda x, hook: scale.clone()),
                ],
            )
            moved = (logits - changed)[[0, 1], -1, ANSWERS].detach()
            close(result[label], moved, 1e-9)
            assert moved.abs().min() > 1e-4


@pytest.mark.parametrize("name", either("gpt2", "llama", "ln", "grouped"))
def test_a_hook_of_the_user_is_seen_and_left_in_place(name):
    model = load.__wrapped__(name)

    def knock_out(z, hook):
        z = z.unflatten(-1, (4, -1)).clone() if z.ndim == 3 else z.clone()
        z[:, :, 2] = 0
        return z if hook.name.endswith("attn.hook_z") else z.flatten(2)

    before = direct_logit_attribution(model, tokens(), ANSWERS, unit="head")
    model.add_hook("blocks.1.attn.hook_z", knock_out)
    ablated = model(tokens())[[0, 1], -1, ANSWERS].detach()
    after = direct_logit_attribution(model, tokens(), ANSWERS, unit="head")
    close(after["L1H2"], torch.zeros(2), 0)
    close(after.attribution.sum(0), ablated, 1e-5)
    close(model(tokens())[[0, 1], -1, ANSWERS].detach(), ablated, 0)
    assert before["L1H2"].abs().min() > 1e-4
    assert (after["L2H1"] - before["L2H1"]).abs().min() > 1e-6


# ---- what is attributed ------------------------------------------------------------------------


def test_answers_and_baselines_may_differ_at_every_position():
    model, plain = strong("gptj")
    answers, incorrect = tokens().roll(-1, 1), tokens().roll(-2, 1)
    with all_in_float64():
        result = direct_logit_attribution(model, tokens(), answers, incorrect, pos=None)
    for pos in (0, 4, 10):
        expected = reference(plain, tokens(), answers[:, pos], incorrect[:, pos])
        for label in result.labels[1:]:
            close(result[label][:, pos], expected.components[label][:, pos], 1e-9)


@pytest.mark.parametrize("name", ["gptj", "gemma2"])
def test_several_incorrect_answers_are_averaged(name):
    model, plain = strong(name)
    several = torch.tensor([[7, 20, 31], [8, 2, 90]])
    with all_in_float64():
        result = direct_logit_attribution(model, tokens(), ANSWERS, several)
    each = [reference(plain, tokens(), ANSWERS, several[:, i]) for i in range(3)]
    for label in result.labels[1:]:
        mean = sum(rows.components[label][:, -1] for rows in each) / 3
        close(result[label], mean, 1e-9)
    close(result.logit, sum(rows.logit[:, -1] for rows in each) / 3, 1e-9)


@pytest.mark.parametrize("name", ["gptj", "gemma2"])
def test_the_baseline_can_be_the_mean_of_the_vocabulary(name):
    model, plain = strong(name)
    with all_in_float64():
        result = direct_logit_attribution(model, tokens()[:1], 5, "mean")
    # One copy of the prompt for every token of the vocabulary.
    copies, vocabulary = tokens()[:1].repeat(97, 1), torch.arange(97)
    expected = reference(plain, copies, torch.full((97,), 5), vocabulary)
    logit = expected.logit[:, -1].mean()
    close(result.logit, logit[None], 1e-9)
    if name == "gptj":  # one cap a token does not average into one cap of the mean
        for label in result.labels[1:]:
            close(result[label], expected.components[label][:, -1].mean()[None], 1e-9)


def test_candidates_are_an_axis():
    model, plain = strong("gemma2")
    candidates = [5, 7, 60]
    with all_in_float64():
        result = direct_logit_attribution(
            model, tokens(), candidate_tokens=candidates, unit="head", pos=[2, -1]
        )
        against = direct_logit_attribution(
            model, tokens(), candidate_tokens=torch.tensor(candidates), incorrect_tokens=INCORRECT
        )
    assert result.attribution.shape == (len(result.labels), 2, 2, 3)
    assert against.attribution.shape == (len(against.labels), 2, 3)
    for c, token in enumerate(candidates):
        answer = torch.full((2,), token)
        expected = reference(plain, tokens(), answer)
        close(result.logit[..., c], expected.logit[:, [2, -1]], 1e-9)
        for label in expected.heads.keys() & set(result.labels):
            close(result[label][..., c], expected.heads[label][:, [2, -1]], 1e-9)
        expected = reference(plain, tokens(), answer, INCORRECT)
        for label in against.labels[1:]:
            close(against[label][..., c], expected.components[label][:, -1], 1e-9)


@pytest.mark.filterwarnings("ignore:The answer.* one token:UserWarning")
def test_an_answer_against_itself_is_nothing():
    result = direct_logit_attribution(load("gemma2"), tokens(), ANSWERS, ANSWERS, unit="head")
    assert not result.attribution.any() and not result.logit.any()


# ---- one pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", either("gpt2", "llama", "ln"))
def test_the_model_runs_once_and_unembeds_only_what_is_asked(name, unit):
    model = load(name)
    for pos, unembedded in [(-1, 1), ([1, 4, -1], 3), (slice(2, 6), 4), (None, 11)]:
        with counted(model) as shapes:
            direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit=unit, pos=pos)
        assert shapes == [(2, 11, 32), (2, unembedded, 97)]


@pytest.mark.parametrize("name", either("gpt2", "ln"))
def test_nothing_is_left_behind(name):
    model = load.__wrapped__(name)

    def state():
        hooks = [len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values()]
        handles = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        grads = [p.requires_grad for p in model.parameters()]
        return sum(hooks), sum(handles), grads, model(tokens()).detach()

    model(tokens())  # the first run of a bridge sets hooks of its own
    before = state()
    direct_logit_attribution(model, tokens(), ANSWERS, unit="head")
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", stop)]):
        with pytest.raises(RuntimeError, match="stop"):
            direct_logit_attribution(model, tokens(), ANSWERS, unit="head")
    after = state()
    assert after[:3] == before[:3]
    close(after[3], before[3], 0)


def test_a_cached_run_is_not_run_again():
    model = load("gpt2")
    _, cache = model.run_with_cache(tokens())
    with counted(model) as shapes:
        direct_logit_attribution(model, None, ANSWERS, cache=cache)
    assert shapes == []


# ---- caches ------------------------------------------------------------------------------------

CACHED = either("gpt2", "gptj", "gemma2", "granite", "ln", "sandwich", "softcap", "attn_only")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", CACHED)
def test_a_cache_gives_what_a_run_gives(name, unit):
    model = load(name)
    _, full = model.run_with_cache(tokens())
    names = required_hooks(model, unit)
    _, partial = model.run_with_cache(tokens(), names_filter=names)
    assert len(partial.cache_dict) < len(full.cache_dict) / 2
    for pos in (-1, [0, 5], None):
        ran = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit=unit, pos=pos)
        for cache in (full, partial):
            read = direct_logit_attribution(
                model, None, ANSWERS, INCORRECT, unit=unit, pos=pos, cache=cache
            )
            assert read.labels == ran.labels
            close(read.attribution, ran.attribution, 1e-5)
            close(read.logit, ran.logit, 1e-5)
            assert "cache" in str(read.reconstruction)


@pytest.mark.parametrize("name", either("gpt2", "llama", "ln"))
def test_a_cache_without_a_batch_has_a_result_without_one(name):
    model, prompt = load(name), tokens()[:1]
    for unit in UNITS:
        ran = direct_logit_attribution(model, prompt, 5, 7, unit=unit, pos=None)
        _, cache = model.run_with_cache(prompt, remove_batch_dim=True)
        read = direct_logit_attribution(model, None, 5, 7, unit=unit, pos=None, cache=cache)
        close(read.attribution, ran.attribution[:, 0], 1e-5)
        close(read.logit, ran.logit[0], 1e-5)
        last = direct_logit_attribution(model, None, 5, 7, unit=unit, cache=cache)
        assert last.attribution.shape == (len(last.labels),)
        close(last.attribution, ran.attribution[:, 0, -1], 1e-5)
        assert last.top(1)[0][0] in last.labels and "logit" in repr(last)


@pytest.mark.parametrize("name", either("gpt2", "ln"))
def test_a_cache_of_the_last_position_alone(name):
    model = load(name)
    _, cache = model.run_with_cache(tokens(), pos_slice=slice(-1, None))
    for unit in UNITS:
        ran = direct_logit_attribution(model, tokens(), ANSWERS, unit=unit)
        read = direct_logit_attribution(model, None, ANSWERS, unit=unit, cache=cache)
        close(read.attribution, ran.attribution, 1e-5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", either("gpt2", "gemma2", "ln"))
def test_every_hook_that_a_cache_lacks_is_named(name, unit):
    model = load(name)
    names = required_hooks(model, unit)
    for left_out in names:
        _, cache = model.run_with_cache(
            tokens(), names_filter=[name for name in names if name != left_out]
        )
        with pytest.raises(KeyError, match=f"{left_out}.*required_hooks") as error:
            direct_logit_attribution(model, None, ANSWERS, unit=unit, cache=cache)
        assert "\n" not in str(error.value) and "\\n" not in str(error.value)


def test_a_cache_of_another_run_is_noticed():
    model = load("gpt2")
    _, cache = model.run_with_cache(tokens())
    with pytest.raises(ValueError, match=r"\(2, 9\).*\(2, 11\).*not of the same run"):
        direct_logit_attribution(model, tokens(pos=9), ANSWERS, cache=cache)


def test_what_no_writer_explains_is_a_row_where_it_happened():
    model, _ = strong("gptj")
    _, cache = model.run_with_cache(tokens())
    before = direct_logit_attribution(model, None, ANSWERS, cache=cache)
    for point in ("blocks.2.hook_in", "ln_final.hook_in"):
        cache.cache_dict[point] = cache.cache_dict[point] + 1.5
        cache.cache_dict[point][..., 7] += 0.25
    after = direct_logit_attribution(model, None, ANSWERS, cache=cache)
    assert set(after.labels) - set(before.labels) == {"1_rest"}
    assert after.kinds[after.labels.index("1_rest")] == "rest"
    # Read out with the last norm, by its own module: γ ⊙ (x - mean) / s.
    added = torch.zeros(32, dtype=torch.float64)
    added[7] = 0.25
    norm = strong("gptj")[1].transformer.ln_f
    scale = cache.cache_dict["ln_final.hook_scale"][:, -1, 0]
    gain = norm.weight * (added - added.mean())
    expected = strong("gptj")[1].lm_head.weight[ANSWERS] @ gain / scale
    close(after["1_rest"], expected, 1e-9)


# ---- helpers -----------------------------------------------------------------------------------


def check_rows(result, expected):
    """Every row, where the reference has the embeddings as one row and no rows of zeros."""
    ours = Counter()
    for label, values in zip(result.labels, result.attribution, strict=True):
        ours["start" if label in ("embed", "pos_embed", "embed_rest") else label] += values
    zero = torch.zeros_like(result.logit)
    for label in ours.keys() | expected.keys():
        close(ours.get(label, zero), expected.get(label, zero), 1e-9, label)


def close(actual, expected, atol, label=""):
    torch.testing.assert_close(
        actual, expected.detach(), atol=atol, rtol=0, msg=lambda message: f"{label}: {message}"
    )


def stop(*args, **kwargs):
    raise RuntimeError("stop")
