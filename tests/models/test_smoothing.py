# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from anomalib.models.components import GaussianBlur2d

from anomalib_fractalad.models.components import GaussianSmoothing, gaussian_blur


@pytest.mark.parametrize("sigma", [0.5, 1.3, 4.0])
def test_the_filter_is_that_of_anomalib(sigma: float) -> None:
    torch.manual_seed(0)
    anomaly_map = torch.rand(2, 1, 40, 53, dtype=torch.float64)
    expected = GaussianBlur2d(sigma).double()(anomaly_map)
    torch.testing.assert_close(gaussian_blur(sigma)(anomaly_map), expected, atol=1e-6, rtol=0)


def test_older_checkpoints_hold_kernels() -> None:
    kernels = {"0.kernel": torch.ones(1, 1, 9, 1), "1.kernel": torch.ones(1, 1, 1, 9)}
    for module, prefix in ((gaussian_blur(4.0), ""), (GaussianSmoothing(4), "blur.")):
        assert not module.state_dict()
        whole = torch.nn.ModuleDict({"smooth": module})
        whole.load_state_dict({f"smooth.{prefix}{name}": kernel for name, kernel in kernels.items()})
        with pytest.raises(RuntimeError, match=r"smooth\.other"):
            whole.load_state_dict({"smooth.other": torch.ones(1)})
