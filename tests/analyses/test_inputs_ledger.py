"""The rows and verbs of a result of `attribute_inputs`."""

import pytest

from tests.support.models import strong
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import attribute_inputs, attribute_path
from tl_dla.effects.interventions import ablate
from tl_dla.errors import ArgumentError


def test_rows_are_asked_for_as_any_result_s_are():
    result = attribute_inputs(strong("gpt2")[0], tokens(), ANSWERS, INCORRECT)
    assert result.labels[:2] == ["embed←0", "embed←1"] and result.unit == "input"
    assert {"pos_embed←10", "0_ln1.b", "1_b_V", "2_mlp_bias", "ln_final.b"} <= set(result.labels)
    assert set(result.kinds) == {"embed", "bias"}
    frame = result.to_dataframe()
    token = frame[frame.label == "embed←3"].source_token.iloc[0]
    assert token.strip() == f"w{int(tokens()[0, 3])}"
    best = result.top(1, kind="embed", by="magnitude")[0][0]
    assert result[best].mean().abs() == max(result[row].mean().abs() for row in result.labels[:22])
    with pytest.raises(ArgumentError, match="written at no one place"):
        ablate(result, ["embed←3"], progress=False)
    with pytest.raises(ArgumentError, match="written at no one place"):
        attribute_path(result, "L1H0", 2)


def test_the_flow_of_a_mean_says_that_it_is_one():
    mean = attribute_inputs(strong("gpt2")[0], tokens(), ANSWERS, INCORRECT).mean()
    with pytest.raises(ArgumentError, match="a mean over 2 prompts"):
        mean.plot_flow()
