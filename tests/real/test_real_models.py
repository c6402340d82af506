"""Real weights: rows add up to what plain `transformers` computes from the same folder.

SmolLM2-135M and Gemma-3-270M, float32, at the prompts of the README. Numbers that were seen are
written beside what they were compared with.
"""

from pathlib import Path

import pytest
import torch
from transformer_lens.tools.analysis import direct_logit_attribution as transformer_lens_own
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import TRANSFORMER_LENS, of_4
from tl_dla import direct_logit_attribution
from tl_dla.loading import gguf, load_model

pytestmark = [pytest.mark.real, pytest.mark.slow]

IOI = "When John and Mary went to the shops, John gave the bag to"
EIFFEL = "The Eiffel Tower is in the city of"
PROMPTS, ANSWERS, INCORRECT = [IOI, EIFFEL], [" Mary", " Paris"], [" John", " London"]
UNITS = ["component", "layer", "head"]
LAST = ["final_post", "ln_final.b", "b_U"]


def plain_logits(name):
    """The last logits of each prompt alone, and the ids of the answers, without TransformerLens."""
    [folder] = (gguf.cache_folder() / "models").glob(f"{name}-*")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        bos = torch.tensor([[tokenizer.bos_token_id]])
        with torch.no_grad():
            logits.append(model(torch.cat([bos, ids], 1)).logits[0, -1])

    def id_of(word):
        [token] = tokenizer(word, add_special_tokens=False).input_ids
        return token

    answers = torch.tensor([[id_of(a), id_of(b)] for a, b in zip(ANSWERS, INCORRECT, strict=True)])
    return torch.stack(logits), answers


@pytest.fixture(scope="module")
def smollm2():
    model = load_model("smollm2", device="cpu")
    return model, *plain_logits("smollm2")


@pytest.fixture(scope="module")
def folded(smollm2):
    """The same in compatibility mode: norms folded into the weights, unembedding centred."""
    model = load_model("smollm2", device="cpu")
    model.enable_compatibility_mode(disable_warnings=True)
    return model


@pytest.fixture(scope="module")
def gemma3():
    model = load_model("gemma3", device="cpu")
    return model, *plain_logits("gemma3")


def total(result):
    """The sum of the rows that add up to the logit."""
    kept = [i for i, label in enumerate(result.labels) if result.unit != "layer" or label in LAST]
    return result.attribution[kept].sum(0)


def check_units(model, logits, ids):
    """Each prompt in a ragged batch: the logit, and the logit difference."""
    answers, incorrect = ids.T
    own = logits[[0, 1], answers]
    difference = own - logits[[0, 1], incorrect]
    for unit in UNITS:
        result = direct_logit_attribution(model, PROMPTS, ANSWERS, INCORRECT, unit=unit)
        close(result.logit, difference, 2e-4)
        close(total(result), difference, 2e-4)
        assert result.reconstruction.passed and result.reconstruction.max_error < 1e-4
        alone = direct_logit_attribution(model, PROMPTS, ANSWERS, unit=unit)
        close(total(alone), own, 2e-4)
        assert "rest" not in result.kinds


def check_heads(model, atol):
    """The heads of each layer, and its bias if any, are its output."""
    heads = direct_logit_attribution(model, PROMPTS, ANSWERS, INCORRECT, unit="head")
    components = direct_logit_attribution(model, PROMPTS, ANSWERS, INCORRECT)
    for layer in range(model.cfg.n_layers):
        written = heads.heads[layer].sum(0)
        if f"{layer}_attn_bias" in heads.labels:
            written = written + heads[f"{layer}_attn_bias"]
        close(written, components[f"{layer}_attn_out"], atol)
    assert len(heads.reconstruction.parts) == model.cfg.n_layers
    return heads, components


def test_smollm2_as_published(smollm2):
    model, logits, ids = smollm2
    assert ids[1, 0] == logits[1].argmax()  # it knows where the tower is
    check_units(model, logits, ids)
    check_heads(model, 2e-5)


def test_smollm2_in_compatibility_mode(smollm2, folded):
    _, logits, ids = smollm2
    # A centred unembedding moves all logits of a position alike.
    centred = logits - logits.mean(-1, keepdim=True)
    check_units(folded, centred, ids)
    check_heads(folded, 2e-5)


def test_smollm2_gives_the_same_rows_either_way(smollm2, folded):
    """An RMSNorm has no centre to move: not only their sum is the same, each row is."""
    for unit in UNITS:
        published = direct_logit_attribution(smollm2[0], PROMPTS, ANSWERS, INCORRECT, unit=unit)
        processed = direct_logit_attribution(folded, PROMPTS, ANSWERS, INCORRECT, unit=unit)
        assert published.labels == processed.labels
        close(published.logit, processed.logit, 2e-4)
        close(published.attribution, processed.attribution, 5e-4)


def test_smollm2_folded_rows_are_those_of_transformer_lens(folded):
    for prompt, answer, incorrect in zip(PROMPTS, ANSWERS, INCORRECT, strict=True):
        for unit in UNITS:
            theirs = transformer_lens_own(folded, prompt, answer, incorrect, unit=unit)
            ours = direct_logit_attribution(
                folded, prompt, answer, incorrect, unit=unit, include_bias=False
            )
            n = len(theirs.labels) - (unit == "head")
            assert ours.labels[:n] == theirs.labels[:n]
            close(ours.attribution[:n], theirs.attribution[:n], 1e-4)
            if unit == "head":
                close(ours.attribution[n:].sum(0), theirs.attribution[n], 1e-4)


def test_every_logit_of_smollm2_is_certified_in_half_a_gigabyte(smollm2):
    """49,152 candidates × 61 components: 0.18 GB above the model."""
    model, logits, _ = smollm2
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("this system does not tell a process's peak memory")

    def peak():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e6

    model(EIFFEL)  # reads the weights from the file
    reset.write_text("5")  # the peak is now what is in use
    before = peak()
    result = direct_logit_attribution(model, EIFFEL, candidate_tokens="all")
    assert peak() - before < 0.5
    assert result.attribution.shape == (61, 1, 49152) and result.reconstruction.passed
    assert result.reconstruction.tolerance.max() < 1e-3
    close(result.attribution.sum(0)[0], logits[1], 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_smollm2_in_half_precision(smollm2, dtype):
    model = load_model("smollm2", device="cpu", dtype=dtype)
    result = direct_logit_attribution(model, PROMPTS, ANSWERS, INCORRECT, unit="head")
    assert result.attribution.dtype == torch.float32
    own = model(IOI)[0, -1].detach().float()[smollm2[2][0]]
    close(result.logit[:1], (own[0] - own[1])[None], 0.3 if dtype == torch.bfloat16 else 0.05)
    # What is explained is less than what the largest rows are.
    assert result.reconstruction.passed
    assert result.reconstruction.tolerance.max() < result.attribution.abs().amax(0).max()


def test_gemma3(gemma3):
    model, logits, ids = gemma3
    check_units(model, logits, ids)
    heads, components = check_heads(model, 1e-4)
    # Layer 11 writes most of the answer; what TransformerLens says of it is in the test below.
    close(heads.heads[11].sum(0)[0], components["11_attn_out"][0], 1e-4)
    assert float(components["11_attn_out"][0]) == pytest.approx(5.48, abs=0.02)


@of_4
def test_gemma3_heads_of_transformer_lens_leave_out_the_norm_after_attention(gemma3):
    """Seen with TransformerLens 4.3.0: its layer 11 heads add up to 0.007, its attn_out is 5.48."""
    model = load_model("gemma3", device="cpu")
    model.enable_compatibility_mode(disable_warnings=True)
    theirs = transformer_lens_own(model, IOI, " Mary", " John", unit="head")
    rows = dict(zip(theirs.labels, theirs.attribution[:, 0].tolist(), strict=True))
    layer_11 = sum(value for label, value in rows.items() if label.startswith("L11H"))
    output = transformer_lens_own(model, IOI, " Mary", " John")
    whole = output.attribution[output.labels.index("11_attn_out"), 0].item()
    assert layer_11 == pytest.approx(0.007, abs=0.001)
    assert whole == pytest.approx(5.48, abs=0.02)
    ours = direct_logit_attribution(model, IOI, " Mary", " John", unit="head")
    assert float(ours.heads[11].sum()) == pytest.approx(whole, abs=1e-3)
    published = direct_logit_attribution(gemma3[0], IOI, " Mary", " John", unit="head")
    close(published.logit, ours.logit, 1e-3)
    close(published.attribution, ours.attribution, 2e-3)


def test_the_class_is_the_one_that_transformer_lens_prefers(gemma3):
    expected = "HookedTransformer" if TRANSFORMER_LENS < 4 else "TransformerBridge"
    assert type(gemma3[0]).__name__ == expected


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected.detach(), atol=atol, rtol=0)
