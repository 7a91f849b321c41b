# SPDX-License-Identifier: Apache-2.0
"""What needs a GPU: the same as on the CPU, and no waiting for it within a step."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from conftest import small_engine, small_model
from lightning import Callback, Trainer
from test_checkpoints import Interrupt

from anomalib_fractalad.registration import MODELS

GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
LAST = 5  # step of the training that is broken off

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trained_on_cuda_predicts_the_same_on_the_cpu(name: str, tiles: Folder, tmp_path: Path) -> None:
    model = small_model(name)
    engine = small_engine(tmp_path, max_epochs=2, precision="bf16-mixed", **GPU)
    engine.fit(model, datamodule=tiles)
    images = torch.rand(3, 3, 64, 64)
    network = model.model.eval()
    with torch.inference_mode():
        expected = network.cpu()(images)
        found = network.cuda()(images.cuda())
    torch.testing.assert_close(found.anomaly_map.cpu(), expected.anomaly_map, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.pred_score.cpu(), expected.pred_score, atol=1e-3, rtol=1e-3)


class Losses(Callback):
    """Notes each step's loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        del trainer, pl_module
        self.values.append(float(outputs["loss"]))


@pytest.mark.parametrize("name", MODELS)
def test_a_training_on_cuda_is_resumed(name: str, tiles: Folder, tmp_path: Path) -> None:
    """But for the order in which a GPU adds up, which the weights amplify."""
    tiles.train_batch_size = 4

    def trained(
        folder: str, losses: Losses, *callbacks: Callback, checkpoint: Path | None = None, ends: Any = None
    ) -> torch.Tensor:
        torch.manual_seed(1 if checkpoint else 0)
        model = small_model(name)
        engine = small_engine(tmp_path / folder, callbacks=[losses, *callbacks], max_epochs=4, **GPU)
        with ends or nullcontext():
            engine.fit(model, datamodule=tiles, ckpt_path=checkpoint)
        return torch.cat([parameter.double().flatten().cpu() for parameter in model.model.parameters()])

    whole, broken, resumed = Losses(), Losses(), Losses()
    expected = trained("whole", whole)
    away = pytest.raises(RuntimeError, match="away")
    before = trained("broken", broken, Interrupt(LAST, RuntimeError("away")), ends=away)
    (checkpoint,) = (tmp_path / "broken").rglob("*.ckpt")
    found = trained("resumed", resumed, checkpoint=checkpoint)
    assert broken.values == pytest.approx(whole.values[:LAST], rel=1e-2)
    assert len(resumed.values) < len(whole.values)
    same = whole.values[-len(resumed.values) :]
    assert resumed.values[0] == pytest.approx(same[0], rel=2e-3)
    assert resumed.values == pytest.approx(same, rel=1e-2)
    assert (found - expected).norm() < 0.1 * (before - expected).norm()
