"""Tokens in a plane, and the matrix of a head from tokens, or vectors, to tokens."""

import numpy as np
import pytest
import torch

from tests.support.models import load
from tests.support.pages import bridge
from tests.zoo.build import hf_reference
from tl_dla import token_map, unembedding_pca
from tl_dla.errors import ArgumentError


def test_tokens_stand_where_their_components_say_and_are_joined_in_order():
    pca = unembedding_pca(bridge(), ["<!--", "cat", "dog", "mat"], n_components=3)
    figure = pca.plot()
    np.testing.assert_allclose(np.stack([figure.data[0].x, figure.data[0].y], 1),
                               pca.coordinates[:, :2], atol=1e-6)  # fmt: skip
    assert list(figure.data[0].text) == ["&lt;!--", "cat", "dog", "mat"]
    assert "lines" in figure.data[0].mode and figure.layout.yaxis.scaleanchor == "x"
    assert f"{float(pca.explained_variance[0]):.0%}" in figure.layout.xaxis.title.text
    assert "lines" not in pca.plot(connect=False).data[0].mode
    with pytest.raises(ArgumentError, match="needs two components"):
        unembedding_pca(bridge(), ["cat", "dog"], n_components=1).plot()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_matrix_of_a_head_maps_vectors_of_ones_own(name):
    """Written out: γ of the norm before, W_V, W_O, γ of those after, W_U."""
    plain, targets, head = hf_reference(name), [5, 7, 11], 2
    promote, vectors = token_map(load(name), 1, head), torch.randn(4, 32)
    block, offset = plain.model.layers[1], float(name == "gemma2")
    norms = [block.post_attention_layernorm] * (name == "gemma2") + [plain.model.norm]
    W_V = block.self_attn.v_proj.weight.unflatten(0, (2, 8))[head // 2]
    W_O = block.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8]
    x = (vectors * (block.input_layernorm.weight + offset)) @ W_V.T @ W_O.T
    for norm in norms:
        x = x * (norm.weight + offset)
    expected = (x @ plain.lm_head.weight.T)[:, targets].detach()
    torch.testing.assert_close(promote(vectors, targets), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vectors @ promote.matrix(targets), expected, atol=1e-5, rtol=1e-4)
    figure = promote.plot(vectors, targets)
    np.testing.assert_allclose(figure.data[0].z, expected, atol=1e-5)
    assert list(figure.data[0].y) == [f"vector {i}" for i in range(4)]
    assert list(promote.to_dataframe(vectors, targets).index) == list(figure.data[0].y)
    tokens = promote.plot(["w3", "w4"], targets, title="x")
    np.testing.assert_allclose(tokens.data[0].z, promote(["w3", "w4"], targets), atol=1e-6)
    assert list(tokens.data[0].y) == ["w3", "w4"]
    with pytest.raises(ArgumentError, match=r"\[source, d_model\] with d_model 32; \[4, 31\]"):
        promote(vectors[:, 1:], targets)
