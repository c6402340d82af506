"""Dictionaries with random weights: exactness needs no quality."""

import torch
from torch import Tensor, nn


class RandomDictionary(nn.Module):
    """A sparse autoencoder, or a transcoder where the widths differ: relu, b_dec, unequal norms."""

    def __init__(
        self, d_in: int, n: int = 50, d_out: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(d_in + n)

        def random(*shape: int) -> nn.Parameter:
            values = 0.3 * torch.randn(*shape, generator=generator)
            return nn.Parameter(values.to(dtype))

        d_out = d_in if d_out is None else d_out
        self.W_enc, self.b_enc = random(d_in, n), random(n)
        self.W_dec, self.b_dec = random(n, d_out), random(d_out)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc + self.b_enc)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.W_dec + self.b_dec


class Squashing(RandomDictionary):
    """One whose decoder is not affine, so that no latent has a share of what it gives."""

    def decode(self, latents: Tensor) -> Tensor:
        return torch.tanh(super().decode(latents))
