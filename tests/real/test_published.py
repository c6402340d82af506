"""Numbers that others published, where the model hub is reachable; skipped elsewhere."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.models import of_4
from tl_dla import direct_logit_attribution
from tl_dla.datasets.ioi import classic_prompts
from tl_dla.loading import load_model

HERE = Path(__file__).parent
CASES = json.loads((HERE / "published.json").read_text())["cases"]
IOI = json.loads((HERE / "ioi_gpt2_small.json").read_text())
CASES += [
    {
        "name": f"gpt2-ioi-{unit}s",
        "model": "gpt2",
        "folded": True,
        "classic": True,
        "unit": unit,
        "within": 0.002,
        "rows": rows,
    }
    for unit, rows in (
        ("component", IOI["components"]),
        ("head", {f"L{i}H{j}": x for i, row in enumerate(IOI["heads"]) for j, x in enumerate(row)}),
    )
]


def misses(case, model):
    """The rows that are further from what was published than may be, with ours."""
    asked = (case.get("prompt"), case.get("answer"), case.get("incorrect"))
    if case.get("classic"):
        prompts = classic_prompts(model)
        asked = tuple([p[field] for p in prompts] for field in ("prompt", "answer", "incorrect"))
    options = {name: case[name] for name in ("unit", "prepend_bos", "top_neurons") if name in case}
    result = direct_logit_attribution(model, *asked, **options)
    ours = {label: float(result[label].mean()) for label in case["rows"]}
    return {
        x: ours[x] for x, value in case["rows"].items() if abs(ours[x] - value) > case["within"]
    }


@of_4
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_rows_are_those_that_were_published(case):
    model = load_model(case["model"], device="cpu")
    if case.get("folded"):  # heads without the bias of their values, as published
        model.enable_compatibility_mode(disable_warnings=True)
    assert not misses(case, model)


@of_4
def test_a_value_that_is_not_ours_is_a_miss():
    """The same on the bundled model, whose rows are read by TransformerLens's own method."""
    model = load_model("demo")
    model.enable_compatibility_mode(disable_warnings=True)
    prompts = classic_prompts(model)
    ids = [[model.to_single_token(p[x]) for p in prompts] for x in ("answer", "incorrect")]
    own = {}
    for prompt, answer, incorrect in zip([p["prompt"] for p in prompts], *ids, strict=True):
        _, cache = model.run_with_cache(prompt)
        rows, labels = cache.decompose_resid(pos_slice=-1, return_labels=True)
        values = cache.logit_attrs(rows, answer, incorrect, pos_slice=-1)[:, 0].tolist()
        own = {x: own.get(x, 0.0) + v / 8 for x, v in zip(labels, values, strict=True)}
    case = {"classic": True, "unit": "component", "within": 0.002, "rows": own}
    assert len(prompts) == 8 and not misses(case, model)
    largest = max(own, key=lambda label: abs(own[label]))
    assert list(misses(case | {"rows": own | {largest: own[largest] + 0.01}}, model)) == [largest]


def test_what_was_published_adds_up():
    """The 26 components of GPT-2 are its mean logit difference, and the lens ends at it."""
    cases = {case["name"]: case["rows"] for case in CASES}
    mean = sum(IOI["per_prompt_logit_diff"]) / 8
    assert sum(cases["gpt2-ioi-components"].values()) == pytest.approx(mean, abs=1e-3)
    assert cases["gpt2-ioi-lens"]["final_post"] == pytest.approx(mean, abs=1e-3)
    heads = torch.tensor(IOI["heads"]).sum(1)
    layers = torch.tensor([IOI["components"][f"{i}_attn_out"] for i in range(12)])
    torch.testing.assert_close(heads, layers, atol=0.02, rtol=0)
