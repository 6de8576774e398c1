"""Losses at each token against float64: ordinary logits, extreme ones, odd sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparsessm.kernels import likelihood
from sparsessm.kernels.likelihood import negative_log_likelihood


@pytest.mark.parametrize("vocabulary", [likelihood.LARGE, likelihood.LARGE + 7, 37])
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_those_of_float64(vocabulary, size, dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (size * torch.randn(35, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (35,), generator=generator)
    found = negative_log_likelihood(logits, targets)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=3e-6)


def test_one_outstanding_logit_and_logits_that_are_not_finite():
    logits, targets = torch.zeros(2, likelihood.LARGE), torch.tensor([0, likelihood.LARGE - 1])
    logits[1, -1] = 90
    assert negative_log_likelihood(logits, targets).tolist() == pytest.approx([math.log(likelihood.LARGE), 0], abs=1e-6)
    assert math.isnan(negative_log_likelihood(torch.full((1, likelihood.LARGE), math.nan), targets[:1]))
    logits[0, 5] = math.inf
    assert not math.isfinite(negative_log_likelihood(logits, targets)[0])
