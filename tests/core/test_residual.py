"""`decompose` is `ActivationCache`'s own stacks where those are right, and adds up where not.

Read out, it equals the attribution: two ways to the same numbers, vectors and pulled-back
directions.
"""

import pytest
import torch

from tests.support.models import all_in_float64, either, load, of_4, strong
from tests.support.walk import walk
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import Readout, decompose, direct_logit_attribution, required_hooks
from tl_dla.core.rows import RowKey
from tl_dla.core.vectors import ResidualStack
from tl_dla.errors import ArgumentError

UNITS = ["component", "layer", "head"]
# TransformerLens asks for a hook_resid_mid that these do not have.
WITHOUT_MIDDLE = ["gptj", "gpt_neox", "parallel", "attn_only"]

# Where TransformerLens's stacks are right: nothing between a sublayer and the stream.
PLAIN = either("gpt2", "gptj", "gpt_neox", "llama", "qwen2", "mixtral", "native_ln")
PLAIN += either("ln", "rms", "none", "parallel", "grouped", "attn_only", "rotary", "attn_result")
# Norms after sublayers, multipliers, caps, norms of the stream itself, scaled embeddings.
OTHERS = either(
    "gemma2", "gemma3", "olmo2", "glm4", "granite", "cohere", "sandwich", "post_norm_ln"
)
OTHERS += either("softcap", "final_rms", "post_embedding_ln", "shortformer")
# The whole stream rescaled, no attention, outputs rescaled before they are added.
OF_4 = ["gemma4_scalar", "falcon_mamba", "falcon_h1"]
OTHERS += [pytest.param(name, marks=of_4) for name in OF_4]
# Its stream passes through norms, and TransformerLens cannot cache all of it.
NORMED = [pytest.param("opt_350m", marks=of_4)]
UNITS_OF = {"falcon_mamba": ["component", "layer"]}


@pytest.mark.parametrize("name", PLAIN)
def test_stacks_are_those_of_activation_cache(name):
    model = load(name)
    _, cache = model.run_with_cache(tokens())
    for pos in (-1, [0, 5], None):
        options = dict(pos_slice=pos, return_labels=True)
        theirs = {"component": cache.decompose_resid(**options)}
        if name not in WITHOUT_MIDDLE:
            theirs["layer"] = cache.accumulated_resid(incl_mid=True, **options)
        theirs["head"] = cache.stack_head_results(incl_remainder=True, **options)
        for unit, (vectors, labels) in theirs.items():
            stack = decompose(cache, unit, pos=pos)
            n = len(labels) - (unit == "head")
            assert stack.labels[:n] == labels[:n]
            close(stack.vectors[:n], vectors[:n], 1e-5)
            if unit == "head":
                assert stack.kinds[:n] == ["head"] * n
                close(stack.vectors[n:].sum(0), vectors[n], 1e-5)
            else:
                assert len(stack.labels) == n
            assert stack.vectors.shape == (len(stack.labels), *vectors.shape[1:])


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_a_direction_pulled_back_reads_what_a_vector_pushed_forward_is(name):
    model = load(name)
    _, cache = model.run_with_cache(tokens())
    for unit in ("component", "head"):
        if unit in UNITS_OF.get(name, [unit]):
            stack = decompose(cache, unit, pos=None)
            rows = walk(model, cache, heads=unit == "head")
            known = [label for label in stack.labels if not label.endswith("_rest")]
            assert sorted(known) == sorted(rows)
            for label in known:
                close(stack[label], rows[label].expand_as(stack[label]), 2e-5)


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_vectors_add_up_to_the_final_stream(name):
    model = load(name)
    _, cache = model.run_with_cache(tokens())
    final = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    for unit in UNITS_OF.get(name, UNITS):
        if unit == "layer":
            continue
        stack = decompose(cache, unit, pos=None)
        assert "rest" not in stack.kinds
        close(stack.vectors.sum(0), final, 2e-5)


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS, *NORMED])
def test_read_out_vectors_equal_the_attribution(name):
    model = load(name)
    for unit in UNITS_OF.get(name, UNITS):
        for pos in (-1, None):
            result = direct_logit_attribution(
                model, tokens(), ANSWERS, INCORRECT, unit=unit, pos=pos
            )
            _, cache = model.run_with_cache(tokens(), names_filter=required_hooks(model, unit))
            check_read_out(result, decompose(cache, unit, pos=pos), 2e-5)


@pytest.mark.parametrize("name", either("gptj", "gemma2", "granite", "ln", "post_norm_ln"))
def test_read_out_vectors_equal_the_attribution_in_float64(name):
    model, _ = strong(name)
    with all_in_float64():
        for unit in UNITS:
            result = direct_logit_attribution(model, tokens(), ANSWERS, unit=unit, pos=None)
            _, cache = model.run_with_cache(tokens())
            check_read_out(result, decompose(cache, unit, pos=None), 1e-11)


def test_a_readout_of_several_incorrect_answers_reads_their_mean():
    model = load("gemma2")
    several = torch.tensor([[7, 20, 31], [8, 2, 90]])
    result = direct_logit_attribution(model, tokens(), ANSWERS, several)
    _, cache = model.run_with_cache(tokens())
    check_read_out(result, decompose(cache), 1e-5)


def check_read_out(result, stack, atol):
    """The rows of the stream; the bias rows are not in it."""
    n = len(stack.labels)
    assert stack.labels == result.labels[:n] and stack.kinds == result.kinds[:n]
    assert stack.layers == result.layers[:n]
    assert set(result.labels[n:]) <= {"ln_final.b", "b_U"}
    close(result.readout.of(stack), result.attribution[:n], atol)


def test_the_readout_of_a_final_stream_is_the_logit_less_its_biases():
    """The final norm and the unembedding of the plain module, on the stream that a user has."""
    model, plain = strong("gptj")
    with all_in_float64():
        result = direct_logit_attribution(model, tokens(), ANSWERS, pos=None)
        _, cache = model.run_with_cache(tokens())
        final = cache["blocks.2.hook_resid_post"]
        logits = plain.lm_head(plain.transformer.ln_f(final))[[0, 1], :, ANSWERS]
    biases = result["ln_final.b"] + result["b_U"]
    close(result.readout.of(final[None])[0] + biases, logits, 1e-10)


def test_a_readout_of_ones_own_is_a_projection():
    model = load("gpt2")
    _, cache = model.run_with_cache(tokens())
    stack = decompose(cache, "head", pos=None)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5))
    expected = torch.stack([stack[label] @ direction for label in stack.labels])
    close(Readout(direction).of(stack), expected, 1e-5)


# ---- what it is given --------------------------------------------------------------------------


@pytest.mark.parametrize("name", either("gpt2", "ln"))
def test_positions_and_batches_of_a_cache(name):
    model = load(name)
    _, cache = model.run_with_cache(tokens())
    every = decompose(cache, pos=None).vectors
    close(decompose(cache, pos=-2).vectors, every[:, :, -2], 0)
    close(decompose(cache, pos=slice(2, 5)).vectors, every[:, :, 2:5], 0)
    close(decompose(cache, pos=[4, 0]).vectors, every[:, :, [4, 0]], 0)
    _, single = model.run_with_cache(tokens()[:1], remove_batch_dim=True)
    close(decompose(single, pos=None).vectors, every[:, 0], 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_of_half_precision_are_float32_and_add_up(dtype):
    model = load("gemma2", dtype)
    _, cache = model.run_with_cache(tokens())
    for unit in ("component", "head"):
        stack = decompose(cache, unit, pos=None)
        assert stack.vectors.dtype == torch.float32
        assert "rest" not in stack.kinds
        final = cache["blocks.2.hook_resid_post"].float()
        miss = (stack.vectors.sum(0) - final).norm() / final.norm()
        assert 0 < miss < 4 * torch.finfo(dtype).eps


def test_what_the_cache_lacks_is_named():
    model = load("gemma2")
    names = required_hooks(model, "head")
    for left_out in names:
        _, cache = model.run_with_cache(
            tokens(), names_filter=[name for name in names if name != left_out]
        )
        if left_out == "ln_final.hook_scale":  # a scale of the readout, not of any vector
            decompose(cache, "head")
            continue
        with pytest.raises(KeyError, match=left_out):
            decompose(cache, "head")


@pytest.mark.usefixtures("unchecked")
def test_other_units_have_no_vectors():
    _, cache = load("gpt2").run_with_cache(tokens())
    with pytest.raises(ValueError, match="unit"):
        decompose(cache, "nothing")
    with pytest.raises(KeyError, match="'L9H9'.*embed, pos_embed"):
        decompose(cache)["L9H9"]


def test_a_row_by_its_label():
    stack = ResidualStack(
        torch.arange(6.0).reshape(2, 3),
        [RowKey("attn", 0, "attn_out"), RowKey("mlp", 0, "mlp_out")],
    )
    close(stack["0_mlp_out"], torch.tensor([3.0, 4.0, 5.0]), 0)


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected.detach(), atol=atol, rtol=0)


def test_the_readout_of_edited_weights_is_not_given_for_the_result_s():
    model = load.__wrapped__("gpt2")
    result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT)
    own = result.readout.direction
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.weight.mul_(1.5)
    torch.testing.assert_close(result.readout.direction, own)  # the stream is read as it was
    with torch.no_grad():
        model.ln_final.original_component.weight.mul_(1.5)
    with pytest.raises(ArgumentError, match="the model was changed since"):
        _ = result.readout
