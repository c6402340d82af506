"""Parameters as they are stored: a weight is read as it lies, and in the dtype of what reads it."""

import pytest
import torch

from tl_dla.model.hooks import product


@pytest.mark.parametrize("stored", ["by rows", "by columns"])
@pytest.mark.parametrize("n", [1, 7, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_product_is_that_of_the_widened_weight(dtype, n, stored):
    places, d = 1031, 515  # several blocks, the last of another size
    weight = torch.randn(places, d).to(dtype)
    weight = weight if stored == "by rows" else weight.mT.contiguous().mT
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    directions = torch.randn(n, 1, d, dtype=wide)
    exact = torch.einsum("pd,nkd->nkp", weight.double(), directions.double())
    found = product(weight, directions)
    assert found.dtype == wide
    assert found.shape == (n, 1, places)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-4)
    if wide == torch.float64:
        torch.testing.assert_close(found, exact)
