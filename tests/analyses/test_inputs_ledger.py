"""`attribute_inputs`: each row against autograd on plain frozen modules, and what must fail."""

import re
from functools import cache

import pytest
import torch

from tests.support.frozen import rows_of
from tests.support.models import all_in_float64, of_4, strong
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import attribute_inputs

# LayerNorm and positions; parallel, one matrix for q, k and v; grouped heads and every bias; norms
# behind sublayers and a soft cap; norms on queries and keys; parallel with a logit scale; gate and
# up in one matrix; a parallel block that shares its norm; ReLU; a norm on the stream's start;
# multipliers; experts; experts with biases, sinks and a clip; a latent and a shared expert; gates
# on the mixed values, per coordinate; norms inside sublayers.
NAMES = [
    *("gpt2", "gpt_neox", "llama_bias", "gemma2", "gemma3", "cohere", "phi3", "gptj", "opt"),
    *("bloom", "granite_bias", "mixtral", "gpt_oss", "deepseek_v3", "afmoe", "bitnet"),
]
GATED = ["llama_bias", "gemma2", "phi3", "granite_bias", "mixtral", "gpt_oss", "deepseek_v3"]
CASES = [(name, "half") for name in NAMES] + [(name, "gate") for name in GATED]

pytestmark = of_4


@cache
def reference(name, rule):
    return rows_of(strong(name)[1], tokens(), ANSWERS, INCORRECT, rule)


def rows_by_place(result):
    """The rows, every embedding of a place as one, and what gpt-oss adds to a clip as one."""
    found = {}
    for label, value in zip(result.labels, result.attribution, strict=True):
        label = re.sub(r"^(pos_embed|embed_rest)", "embed", label)
        found[label] = found.get(label, 0.0) + value
    return found


def offsets_added(rows):
    """gpt-oss adds 1 to each expert's up-projection: a constant beside the bias."""
    found = {}
    for label, value in rows.items():
        label = re.sub(r"_(E\d+_b_in|offset)$", "_b_in", label)
        found[label] = found.get(label, 0.0) + value
    return found


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_every_row_is_what_autograd_finds_in_a_frozen_plain_module(name, rule):
    with all_in_float64():
        result = attribute_inputs(strong(name)[0], tokens(), ANSWERS, INCORRECT, mlp=rule)
    expected, found = reference(name, rule), rows_by_place(result)
    if name == "gpt_oss":
        expected, found = offsets_added(expected), offsets_added(found)
    assert set(expected) <= set(found)  # more where an expert is chosen for nothing at the end
    for label, value in found.items():
        own = expected.get(label, torch.zeros_like(value))
        torch.testing.assert_close(value, own, atol=1e-9, rtol=1e-8, msg=label)
