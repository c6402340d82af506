"""The forward walk: every row of the stream as a vector, pushed through what happens after it.

The slow, plain way that `decompose` is held to, which pulls a direction back instead. From the
residual stream's steps and the activations of a cache, one step after the other:

    rows = walk(model, cache)          # label -> [batch, pos, d_model], as it ends up
"""

import torch

from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Rescale, ResidPoint, StreamNorm, Write


def walk(model, cache, heads=False):
    reader = ModelReader(model)
    rows: dict[str, torch.Tensor] = {}
    for step in reader.stream().steps:
        if isinstance(step, Write):
            value = _at(cache, step.site) * step.factor
            attention = reader.attention(step.layer) if step.name == "attn_out" else None
            if heads and attention is not None:
                rows |= _heads(attention, cache, step.factor)
            else:
                rows[step.label] = value
        elif isinstance(step, ResidPoint) and step.label == "0_pre" and list(rows) == ["embed"]:
            rows = {"embed": _at(cache, step.site)}  # rescaled, where it is rescaled
        elif isinstance(step, Rescale):
            rows = {label: value * step.factor for label, value in rows.items()}
        elif isinstance(step, StreamNorm):
            scale = step.norm.scale(_at(cache, step.norm.site))
            rows = {label: _through(step.norm, value, scale) for label, value in rows.items()}
            if step.norm.beta is not None:
                like = next(iter(rows.values()))
                rows[f"{step.layer}_{step.name}"] = step.norm.beta.to(like).expand_as(like)
    return rows


def _at(cache, site):
    value = cache[site.name]
    return value.double() if value.dtype == torch.float64 else value.float()


def _through(norm, x, scale):
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    x = x / scale[..., None]
    return x if norm.gamma is None else x * norm.gamma.to(x)


def _heads(attention, cache, factor):
    layer, W_O = attention.layer, attention.W_O
    z = _at(cache, attention.site).flatten(2).unflatten(2, (W_O.shape[0], -1))
    heads = torch.einsum("bphk,hkd->hbpd", z, W_O.to(z)) * attention.factor
    constant = torch.zeros_like(heads[0])
    if attention.b_O is not None:
        constant = constant + attention.b_O.to(z) * attention.factor
    if (norm := attention.post_norm) is not None:
        scale = norm.scale(_at(cache, norm.site))
        heads, constant = (_through(norm, v, scale) for v in (heads, constant))
        constant = constant if norm.beta is None else constant + norm.beta.to(z)
    rows = {f"L{layer}H{h}": v * factor for h, v in enumerate(heads)}
    if bool(constant.any()):
        rows[f"{layer}_attn_bias"] = constant * factor
    return rows
