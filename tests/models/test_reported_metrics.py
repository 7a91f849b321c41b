# SPDX-License-Identifier: Apache-2.0
"""Reported metrics are those of raw maps, and a validation that is missing is named."""

import logging
from pathlib import Path

import pytest
from anomalib.data import Folder
from anomalib.post_processing import PostProcessor
from conftest import make_tiles, small_engine, tile_arguments
from test_all_models import small_model

from anomalib_fractalad.post_processing import OrderPreservingPostProcessor
from anomalib_fractalad.registration import MODELS

pytestmark = pytest.mark.slow

METRICS = ("pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "image_AUROC")


@pytest.mark.parametrize("name", MODELS)
def test_reported_metrics_are_those_of_raw_maps(name: str, tile_root: Path, tmp_path: Path) -> None:
    model = small_model(name)
    engine = small_engine(tmp_path, max_epochs=4, check_val_every_n_epoch=4)
    engine.fit(model, datamodule=make_tiles(tile_root))
    post_processor = model.post_processor
    assert type(post_processor) is OrderPreservingPostProcessor

    def reported() -> dict[str, float]:
        (metrics,) = engine.test(model, datamodule=make_tiles(tile_root), verbose=False)
        return {metric: metrics[metric] for metric in METRICS}

    as_found = reported()
    # As low in the range as that of sigmoid maps, which are near 0 nearly everywhere.
    low, high = post_processor.pixel_min, post_processor.pixel_max
    post_processor._pixel_threshold.copy_(low + 0.03 * (high - low))
    with_low_threshold = reported()
    post_processor.enable_normalization = False
    raw = reported()
    assert as_found == pytest.approx(raw, abs=1e-3)
    assert with_low_threshold == pytest.approx(raw, abs=1e-3)

    checkpoint = {}
    post_processor.enable_normalization = True
    model.on_save_checkpoint(checkpoint)
    theirs = small_model(name, post_processor=PostProcessor())  # what a user gives is taken as it is
    theirs.load_state_dict(model.state_dict())
    theirs.on_load_checkpoint(checkpoint)
    assert type(theirs.post_processor) is PostProcessor
    model.load_state_dict(theirs.state_dict())


def test_a_missing_validation_is_named(tile_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="anomalib_fractalad")

    def messages() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.name.startswith("anomalib_fractalad")]
        caplog.clear()
        return said

    data = Folder(**{**tile_arguments(tile_root), "val_split_mode": "none"})
    model, engine = small_model("FractalAD"), small_engine(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"no validation images .its val_split_mode is 'none'"):
        engine.fit(model, datamodule=data)
    with pytest.raises(ValueError, match=r"no validation images .its val_split_mode is 'none'"):
        engine.validate(model, datamodule=data)

    engine = small_engine(tmp_path, max_epochs=1, limit_val_batches=0)
    engine.fit(model, datamodule=data)
    (metrics,) = engine.test(model, datamodule=data, verbose=False)
    assert set(metrics) == {"image_AUROC", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO"}
    (said,) = messages()  # once
    assert "FractalAD has no thresholds, because limit_val_batches is 0" in said
    assert "Run engine.validate" in said

    unvalidated = small_model("FractalAD")
    prediction, *_ = small_engine(tmp_path).predict(unvalidated, data_path=tile_root / "test/good")
    assert (prediction.pred_label, prediction.pred_mask) == (None, None)
    assert "FractalAD has no thresholds, because it was never validated" in messages()[0]

    late = small_engine(tmp_path, max_epochs=1, check_val_every_n_epoch=2)
    late.fit(small_model("FractalAD"), datamodule=make_tiles(tile_root))
    assert "because check_val_every_n_epoch is 2, and training has 1 epoch(s)" in messages()[0]
    trained = small_model("FractalAD")
    small_engine(tmp_path, max_epochs=1).fit(trained, datamodule=make_tiles(tile_root))
    assert not messages()
    small_engine(tmp_path, max_epochs=1, limit_val_batches=0).fit(trained, datamodule=make_tiles(tile_root))
    assert "keeps the thresholds and the normalization of an earlier validation" in messages()[0]
