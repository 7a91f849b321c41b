# SPDX-License-Identifier: Apache-2.0
"""What needs a GPU: the same as on the CPU, and no waiting for it within a step."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from conftest import small_engine, small_model

from anomalib_fractalad.registration import MODELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trained_on_cuda_predicts_the_same_on_the_cpu(name: str, tiles: Folder, tmp_path: Path) -> None:
    model = small_model(name)
    engine = small_engine(tmp_path, accelerator="gpu", devices=1, max_epochs=2, precision="bf16-mixed")
    engine.fit(model, datamodule=tiles)
    images = torch.rand(3, 3, 64, 64)
    network = model.model.eval()
    with torch.inference_mode():
        expected = network.cpu()(images)
        found = network.cuda()(images.cuda())
    torch.testing.assert_close(found.anomaly_map.cpu(), expected.anomaly_map, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.pred_score.cpu(), expected.pred_score, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_training_on_cuda_is_resumed(name: str, tiles: Folder, tmp_path: Path) -> None:
    def trained(epochs: int, checkpoint: Path | None = None) -> torch.Tensor:
        model = small_model(name)
        torch.manual_seed(1)
        engine = small_engine(tmp_path, accelerator="gpu", devices=1, max_epochs=epochs)
        engine.fit(model, datamodule=tiles, ckpt_path=checkpoint)
        engine.trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return torch.cat([value.double().flatten().cpu() for value in model.model.state_dict().values()])

    torch.manual_seed(0)
    trained(2)
    resumed = trained(4, tmp_path / "2.ckpt")
    torch.manual_seed(0)
    assert torch.allclose(resumed, trained(4), rtol=1e-3, atol=1e-3)
