# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from anomalib.models.components import GaussianBlur2d

from anomalib_fractalad.models.components import gaussian_blur


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("sigma", [0.5, 1.3, 4.0])
def test_one_direction_after_the_other_is_the_same_as_both_at_once(sigma: float, padding: str) -> None:
    torch.manual_seed(0)
    anomaly_map = torch.rand(2, 1, 40, 53, dtype=torch.float64)
    blurred = gaussian_blur(sigma, padding).double()(anomaly_map)
    torch.testing.assert_close(blurred, GaussianBlur2d(sigma, padding=padding).double()(anomaly_map), atol=1e-6, rtol=0)
