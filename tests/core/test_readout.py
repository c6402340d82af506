"""A readout pulled back through a map is the gradient of the logit before that map.

Autograd through torch's own modules says what each direction must be.
"""

import pytest
import torch
from torch import nn

from tl_dla import Readout
from tl_dla.core.rows import RowKey
from tl_dla.core.vectors import ResidualStack
from tl_dla.model.hooks import Site
from tl_dla.model.norms import Norm

D, BATCH, POS = 6, 2, 3
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def layer_norm():
    norm = nn.LayerNorm(D, eps=1e-3, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(3 + randn(D))
        norm.bias.copy_(randn(D))
    return norm


def rms_norm():
    norm = nn.RMSNorm(D, eps=1e-3, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(3 + randn(D))
    return norm


def read(norm, name="norm"):
    """The norm as the package knows it."""
    gamma, beta = norm.weight.detach(), getattr(norm, "bias", None)
    beta = None if beta is None else beta.detach()
    site = Site(f"{name}.hook_in", norm)
    return Norm(name, site, gamma, beta, isinstance(norm, nn.LayerNorm), norm.eps)


@pytest.mark.parametrize("make", [layer_norm, rms_norm])
def test_through_a_norm_is_its_derivative_with_the_scale_held(make):
    norm, u, x = make(), randn(D), randn(BATCH, POS, D)
    known = read(norm)
    scale = known.scale_of(x)
    readout = Readout(u.reshape(1, 1, 1, D)).through_norm(known)
    assert readout.norms == (known,) and readout.scale is None

    # The module, with the scale of x whatever it is given: for x itself it is the module.
    def held(y):
        y = y - y.mean(-1, keepdim=True) if known.centred else y
        return y / scale[..., None] * norm.weight

    beta = 0 if known.beta is None else known.beta
    close(held(x) + beta, norm(x))
    x = x.requires_grad_()
    (held(x) @ u).sum().backward()
    frozen = readout.frozen({"norm": scale})
    close(readout.direction[0, 0, 0] / scale[..., None], x.grad)
    close(frozen.scale, scale)
    # And its value: the logit is what the readout says, plus β · u.
    value = readout.contract(x)[..., 0] / scale
    constant = Readout(u).of_bias(known.beta) if known.beta is not None else 0
    close(value + constant, norm(x) @ u)


def test_norms_in_a_row_multiply_their_scales():
    first, second, u = layer_norm(), rms_norm(), randn(D)
    x = randn(BATCH, POS, D)
    middle = first(x)
    readout = Readout(u.reshape(1, 1, 1, D)).through_norm(read(second, "b"))
    beta = readout.of_bias(first.bias.detach())[0, 0] / read(second).scale_of(middle)[..., None]
    readout = readout.through_norm(read(first, "a"))
    scales = {"a": read(first).scale_of(x), "b": read(second).scale_of(middle)}
    frozen = readout.frozen(scales)
    close(frozen.scale, scales["a"] * scales["b"])
    close(readout.contract(x)[..., 0] / frozen.scale + beta[..., 0], second(middle) @ u)


def test_a_norm_without_weights_only_centres():
    x, u = randn(BATCH, POS, D), randn(D)
    norm = Norm("norm", Site("norm.hook_scale", nn.Identity()), None, None, True, 1e-5)
    expected = torch.nn.functional.layer_norm(x, (D,))
    scale = norm.scale_of(x)
    value = Readout(u.reshape(1, 1, 1, D)).through_norm(norm).contract(x)[..., 0] / scale
    close(value, expected @ u)


def test_through_a_linear_map_is_its_transpose():
    weight, u = randn(4, 5, D), randn(1, 1, 2, D)  # [head, d_head, d_model]
    z = randn(BATCH, POS, 4, 5).requires_grad_()
    written = torch.einsum("bphk,hkd->bphd", z, weight)
    readout = Readout(u).through_linear(weight)
    assert readout.direction.shape == (1, 1, 2, 4, 5)
    for t in range(2):
        (gradient,) = torch.autograd.grad((written @ u[0, 0, t]).sum(), z, retain_graph=True)
        close(readout.direction[0, 0, t].expand_as(gradient), gradient)
    close(readout.contract(z.detach()).sum(-1), written.sum(2) @ u[0, 0].T)
    close(Readout(u).through_linear(weight[0]).direction, readout.direction[..., 0, :])


def test_times_a_number():
    readout = Readout(randn(1, 1, 1, D))
    assert readout.times(1.0) is readout
    close(readout.times(2.5).direction, 2.5 * readout.direction)


@pytest.mark.parametrize("pos", [1, POS])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_contracting_is_a_dot_product_for_every_token(batch, pos):
    """A direction that is shared, or one for every prompt, or for every position."""
    w = randn(batch, pos, 4, D)
    x = randn(BATCH, POS, D)
    expected = (x[:, :, None] * w).sum(-1)
    close(Readout(w).contract(x), expected)
    by_head = randn(batch, pos, 4, 3, D)
    z = randn(BATCH, POS, 3, D)
    expected = (z[:, :, None] * by_head).sum(-1)
    close(Readout(by_head).contract(z), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_contracting_happens_in_float32(dtype):
    w, x = randn(1, 1, 1, 512), (3 + randn(1, 1, 512)).to(dtype)
    got = Readout(w.to(dtype)).contract(x)
    assert got.dtype == torch.float32
    expected = (x.double() * w.to(dtype).double()).sum()
    assert abs(float(got) - float(expected)) < 1e-3  # 0.1 and more if summed in bfloat16


def test_reading_vectors_divides_by_the_scale():
    w, scale = randn(BATCH, POS, D), 1 + randn(BATCH, POS).abs()
    vectors = randn(4, BATCH, POS, D)
    stack = ResidualStack(vectors, [RowKey("attn", layer, "attn_out") for layer in range(4)])
    expected = torch.einsum("rbpd,bpd->rbp", vectors, w) / scale
    close(Readout(w, scale=scale).of(stack), expected)
    close(Readout(w, scale=scale).of(vectors), expected)
    close(Readout(w).of(vectors), expected * scale)


def close(actual, expected):
    torch.testing.assert_close(actual, expected.detach(), atol=1e-10, rtol=1e-10)
