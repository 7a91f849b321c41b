# SPDX-License-Identifier: Apache-2.0
"""What repairs of anomalib do for the package's models."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anomalib.data import MVTecLOCO
from anomalib.data.datasets.image.mvtec_loco import make_dataset
from conftest import save, small_engine, small_model
from packaging.version import Version

from anomalib_fractalad.__main__ import main
from anomalib_fractalad.repairs import REPAIRS, Repair, mend, state


def test_mvtec_loco_trains_with_pandas_3(tmp_path: Path) -> None:
    root, random = tmp_path / "pushpins", np.random.default_rng(0)
    for i in range(2):
        for folder in ("train/good", "validation/good", "test/good", "test/logical_anomalies"):
            save(random.integers(0, 255, (64, 64)), root / folder / f"{i:03}.png")
        for j in range(i + 1):
            save(np.full((64, 64), 255), root / f"ground_truth/logical_anomalies/{i:03}/{j:03}.png")
    data = MVTecLOCO(tmp_path, "pushpins", train_batch_size=2, eval_batch_size=2, num_workers=0)
    engine, model = small_engine(tmp_path, max_epochs=1), small_model("FractalAD")
    engine.fit(model, datamodule=data)
    assert model.trainer.global_step == 1
    if Version(pd.__version__).major >= 3:  # and models that are not the package's are left as they are
        with pytest.raises(TypeError, match="Invalid value for dtype"):
            make_dataset(root)


def test_the_status_names_models_data_and_every_repair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    told = capsys.readouterr().out
    assert "models: AAND, ADPS, FractalAD, FractalMemory" in told
    assert "data: SurfaceDefects" in told
    assert all(f"  {repair.name}: for this package's models\n    {repair.defect}" in told for repair in REPAIRS)


def test_a_repair_of_another_version_or_that_fails_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    applied: list[bool] = []
    other = Repair("other", "Something.", ">=99", (), applied.append)
    for _ in range(2):
        mend(other)
    assert applied == []
    assert caplog.text.count("the repair 'other' is for anomalib>=99 and does nothing") == 1
    assert "not needed" in state(other)

    failing = Repair("failing", "Something.", ">=2", (), lambda _: 1 // 0)
    mend(failing)
    assert caplog.text.count("the repair 'failing' of anomalib could not be applied (ZeroDivisionError") == 1
    assert "register" not in caplog.text
    assert "could not be applied" in state(failing)

    monkeypatch.setenv("ANOMALIB_FRACTALAD_REPAIRS", "All")
    mend(Repair("working", "Something.", ">=2", (), applied.append))
    assert applied == [True]
    monkeypatch.setenv("ANOMALIB_FRACTALAD_REPAIRS", "sometimes")
    mend(Repair("working", "Something.", ">=2", (), applied.append))
    assert applied == [True, False]
    assert "ANOMALIB_FRACTALAD_REPAIRS is 'sometimes'; it must be one of own, all, none" in caplog.text
