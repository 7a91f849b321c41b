# SPDX-License-Identifier: Apache-2.0
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from anomalib.data.utils.tiler import ImageUpscaleMode
from anomalib.models import get_model
from anomalib.pre_processing import PreProcessor
from conftest import assert_same_weights, make_tiles, save, small_engine
from lightning import seed_everything
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform

from anomalib_fractalad import ADPS, FractalAnomalyGenerator


def small_model(**arguments: Any) -> ADPS:
    defaults = {
        "backbone": "test_resnet",
        "pre_trained": False,
        "patches": 2,
        "pre_processor": PreProcessor(Resize((64, 64))),
        "visualizer": False,
    }
    return ADPS(**{**defaults, **arguments})


def train(root: Path, datamodule: Folder, *, max_epochs: int = 2, **arguments: Any) -> ADPS:
    seed_everything(1)
    model = small_model(**arguments)
    small_engine(root, max_epochs=max_epochs).fit(model, datamodule=datamodule)
    return model


def test_training_moves_student_and_decoder(tmp_path: Path, tiles: Folder) -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    engine = small_engine(tmp_path, max_epochs=1)
    (results,) = engine.train(model, datamodule=tiles)
    after = model.model.state_dict()
    moved = {name.partition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"student", "decoder"}
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPR", "pixel_AUPRO"} == set(results)


def test_losses_are_logged_under_their_names(tmp_path: Path, tiles: Folder) -> None:
    engine = small_engine(tmp_path, max_epochs=1)
    engine.fit(small_model(segmentation_weight=3.0), datamodule=tiles)
    metrics = engine.trainer.callback_metrics
    assert {"train_loss", "train_distillation", "train_segmentation"} <= engine.trainer.progress_bar_metrics.keys()
    expected = metrics["train_distillation"] + 3 * metrics["train_segmentation"]
    torch.testing.assert_close(metrics["train_loss"], expected)


@pytest.mark.parametrize(
    ("trainer", "model", "steps"),
    [
        ({"max_epochs": 10}, {}, 20),
        ({"max_epochs": 99}, {"epochs": 5}, 10),
        ({"max_steps": 10, "max_epochs": -1}, {}, 10),
    ],
)
def test_the_learning_rate_falls_at_80_and_90_percent(
    tmp_path: Path,
    tiles: Folder,
    trainer: dict[str, int],
    model: dict[str, int],
    steps: int,
) -> None:
    rates = []

    class Watched(ADPS):
        def on_train_batch_start(self, *_: Any) -> None:
            rates.append(self.optimizers().param_groups[0]["lr"])

        def training_step(self, *_: Any) -> torch.Tensor:
            return sum(p.sum() for p in self.model.decoder.classify.parameters())

    adps = Watched(backbone="test_resnet", pre_trained=False, patches=2, visualizer=False, learning_rate=0.01, **model)
    small_engine(tmp_path, limit_val_batches=0, **trainer).fit(adps, datamodule=tiles)
    first, second = round(0.8 * steps), round(0.9 * steps)
    assert rates == pytest.approx([0.01] * first + [0.002] * (second - first) + [0.0004] * (steps - second))


def test_epochs_set_the_training_length(tmp_path: Path, tiles: Folder) -> None:
    engine = small_engine(tmp_path)
    engine.fit(small_model(epochs=2), datamodule=tiles)
    assert engine.trainer.current_epoch == 2


def test_a_single_step_gives_a_usable_model(tmp_path: Path, tiles: Folder) -> None:
    model = small_model()
    small_engine(tmp_path, fast_dev_run=True).fit(model, datamodule=tiles)
    assert model.eval()(torch.rand(1, 3, 80, 70)).anomaly_map.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"segmentation_weight": 0.0}, "segmentation_weight is 0.0"),
        ({"segmentation_weight": math.inf}, "segmentation_weight is inf"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"smoothing": math.nan}, "smoothing is nan"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be above 0 and a whole number"),
        ({"patches": 0}, "patches is 0"),
        ({"patches": 2.0}, "patches is 2.0; it must be above 0 and a whole number"),
        ({"anomaly_generator": "Nope"}, "'Nope'.*is unknown"),
        ({"anomaly_source_path": "no/such/folder"}, "'no/such/folder' holds no images"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


def test_sizes_that_do_not_divide_are_refused_before_training(tmp_path: Path, tiles: Folder) -> None:
    pre_processor = PreProcessor(Resize((64, 80)))
    with pytest.raises(ValueError, match=r"64x80.*patches=4.*multiples of 64.*64x64 or 64x128"):
        small_engine(tmp_path, max_epochs=1).fit(small_model(patches=4, pre_processor=pre_processor), datamodule=tiles)


@pytest.mark.parametrize("mode", ["padding", "interpolation"])
def test_tiles_are_what_has_to_divide(mode: str, tmp_path: Path, tiles: Folder) -> None:
    """80x80 does not divide into 2 x 2 patches of stride 16, but its tiles, of 64x64, do."""
    tiler = TilerConfigurationCallback(enable=True, tile_size=64, stride=48, mode=ImageUpscaleMode(mode))
    model = small_model(pre_processor=PreProcessor(Resize((80, 80))))
    engine = small_engine(tmp_path, max_epochs=1, callbacks=[tiler])
    engine.fit(model, datamodule=tiles)
    assert engine.test(model, datamodule=tiles, verbose=False)
    (batch, *_) = engine.predict(model, datamodule=tiles)
    assert batch.anomaly_map.shape[-2:] == (80, 80)
    model.to_torch(tmp_path)


@pytest.mark.parametrize(
    ("size", "tile", "message"),
    [
        (128, 80, r"a tile of 80x80.*multiples of 32.*Take tiles of 64x64 or 96x96, or choose fewer patches"),
        (64, 128, r"an image of 64x64 .* is smaller than a tile of 128x128\. Take smaller tiles"),
    ],
)
def test_tiles_that_do_not_divide_are_refused_before_anything_else(
    size: int, tile: int, message: str, tmp_path: Path, tiles: Folder
) -> None:
    tiler = TilerConfigurationCallback(enable=True, tile_size=tile, stride=tile)
    model = small_model(pre_processor=PreProcessor(Resize((size, size))))
    for use in ("fit", "validate", "test", "predict"):
        with pytest.raises(ValueError, match=message):
            getattr(small_engine(tmp_path, callbacks=[tiler]), use)(model, datamodule=tiles)
    for export in (model.to_torch, model.to_onnx, model.to_openvino):
        with pytest.raises(ValueError, match=message):
            export(tmp_path)
    model.model.tiler = None
    model.pre_processor = None
    with pytest.raises(ValueError, match="an image of 80x64"):
        model.to_onnx(tmp_path, input_size=(80, 64))


def test_a_normalizing_pre_processor_is_refused(tmp_path: Path, tiles: Folder) -> None:
    transform = Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)])
    with pytest.raises(ValueError, match="pre-processor of ADPS must not contain Normalize"):
        small_engine(tmp_path, max_epochs=1).fit(small_model(pre_processor=PreProcessor(transform)), datamodule=tiles)


def test_the_network_sees_anomalies_in_0_to_1(tmp_path: Path, tiles: Folder) -> None:
    seen = []
    model = small_model(anomaly_generator={"class_path": "PerlinAnomalyGenerator", "init_args": {"probability": 1.0}})
    compare = model.model.compare
    model.model.compare = lambda images: seen.append(images) or compare(images)
    small_engine(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, datamodule=tiles)
    values = torch.cat(seen)
    assert values.min() >= 0
    assert values.max() <= 1


@pytest.mark.parametrize(
    "generator",
    [None, FractalAnomalyGenerator(), PerlinAnomalyGenerator(probability=0.9, dual_mask=True)],
)
def test_a_resumed_training_ends_with_the_same_weights(
    tmp_path: Path,
    tile_root: Path,
    generator: Transform | None,
) -> None:
    arguments = {"anomaly_generator": generator}
    unbroken = train(tmp_path / "unbroken", make_tiles(tile_root), max_epochs=2, **arguments)
    seed_everything(1)
    broken = small_engine(tmp_path / "broken", max_epochs=2)
    stopped = small_model(**arguments)
    stopped.on_train_epoch_end = lambda: setattr(stopped.trainer, "should_stop", True)
    broken.fit(stopped, datamodule=make_tiles(tile_root))
    assert broken.trainer.current_epoch == 1
    (checkpoint,) = (tmp_path / "broken").rglob("*.ckpt")
    torch.manual_seed(99)
    resumed = small_model(**arguments)
    engine = small_engine(tmp_path / "resumed", max_epochs=2)
    engine.fit(resumed, datamodule=make_tiles(tile_root), ckpt_path=checkpoint)
    assert_same_weights(unbroken, resumed)


def test_a_checkpoint_is_plain_data_and_rebuilds_the_model(tmp_path: Path, tiles: Folder) -> None:
    save(torch.randint(0, 256, (20, 30, 3)).numpy(), tmp_path / "textures/one.png")
    arguments = {"layers": ["layer1", 8, 16], "split_layers": [8], "smoothing": 2.0, "segmentation_weight": 2.0}
    texture = {"anomaly_source_path": tmp_path / "textures"}
    generator = PerlinAnomalyGenerator(probability=0.9, blend_factor=(0.1, 0.2))
    model = train(tmp_path / "run", tiles, max_epochs=1, anomaly_generator=generator, **texture, **arguments)
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    record = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["anomaly_generator"]
    assert record["init_args"]["blend_factor"] == (0.1, 0.2)
    assert not any("generator" in name for name in model.state_dict())
    loaded = ADPS.load_from_checkpoint(checkpoint, visualizer=False)
    assert loaded.generator.spec == model.generator.spec
    assert_same_weights(model, loaded)
    assert loaded.model.student.size_multiple == model.model.student.size_multiple
    images = torch.rand(1, 3, 50, 80)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images))
    torch.manual_seed(0)
    anomalous, _ = model.generator(torch.rand(4, 3, 64, 64))
    torch.manual_seed(0)
    again, _ = loaded.generator(torch.rand(4, 3, 64, 64))
    assert torch.equal(anomalous, again)


class Stripes(Transform):
    """A generator that the package does not know."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros_like(images[:, :1])
        mask[..., :8] = 1
        return images * (1 - mask), mask


def test_a_generator_of_ones_own_has_to_be_passed_again_to_train_on(tmp_path: Path, tiles: Folder) -> None:
    train(tmp_path / "run", tiles, max_epochs=1, anomaly_generator=Stripes())
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    loaded = ADPS.load_from_checkpoint(checkpoint, visualizer=False)
    assert loaded.eval()(torch.rand(1, 3, 50, 80)).anomaly_map.isfinite().all()
    with pytest.raises(ValueError, match=r"Stripes.*pass anomaly_generator"):
        small_engine(tmp_path, max_epochs=1).fit(loaded, datamodule=tiles)
    again = ADPS.load_from_checkpoint(checkpoint, visualizer=False, anomaly_generator=Stripes())
    small_engine(tmp_path, max_epochs=1).fit(again, datamodule=tiles)


SMALL = {"backbone": "test_resnet", "pre_trained": False}


@pytest.mark.parametrize("class_path", ["ADPS", "anomalib.models.ADPS", "anomalib_fractalad.ADPS"])
def test_get_model_takes_a_description_of_the_generator(class_path: str) -> None:
    generator = {"class_path": "FractalAnomalyGenerator", "init_args": {"probability": 0.75}}
    model = get_model({"class_path": class_path, "init_args": {**SMALL, "anomaly_generator": generator}})
    assert type(model) is ADPS
    assert model.generator.spec["init_args"]["probability"] == 0.75


@pytest.mark.parametrize("name", ["ADPS", "adps"])
def test_get_model_by_name(name: str) -> None:
    model = get_model(name, **SMALL, anomaly_generator="FractalAnomalyGenerator")
    assert type(model) is ADPS
    assert model.generator.spec["class_path"] == "FractalAnomalyGenerator"


FRACTAL = {"class_path": "anomalib_fractalad.FractalAnomalyGenerator", "init_args": {"probability": 0.25}}


@pytest.mark.parametrize(
    ("arguments", "name", "probability"),
    [
        ([], "PerlinAnomalyGenerator", 0.5),
        (["--model.anomaly_generator=FractalAnomalyGenerator"], "FractalAnomalyGenerator", 1.0),
        (
            ["--model.anomaly_generator=PerlinAnomalyGenerator", "--model.anomaly_generator.probability=0.75"],
            "PerlinAnomalyGenerator",
            0.75,
        ),
        (
            [f"--model.anomaly_generator={json.dumps(FRACTAL)}"],
            "FractalAnomalyGenerator",
            0.25,
        ),
    ],
)
def test_the_command_line_chooses_the_generator(arguments: list[str], name: str, probability: float) -> None:
    small = ["--model.backbone=test_resnet", "--model.pre_trained=false", "--model.layers=[4,layer3]"]
    cli = AnomalibCLI(["fit", "--model=ADPS", *small, *arguments, "--data=MVTecAD"], run=False)
    assert cli.model.generator.spec["class_path"] == name
    assert cli.model.generator.spec["init_args"]["probability"] == probability
    assert cli.model.model.teacher.strides == [4, 16]


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("config", ["adps.yaml", "adps_quickstart.yaml"])
def test_configs(config: str, tmp_path: Path) -> None:
    arguments = ["--model.pre_trained=false", f"--data.root={tmp_path}", f"--default_root_dir={tmp_path}"]
    cli = AnomalibCLI(["train", "--config", str(CONFIGS / config), *arguments], run=False)
    assert type(cli.model) is ADPS
    cli.model.model.student.check_size(cli.model.input_size)


def test_the_published_config() -> None:
    config = yaml.safe_load((CONFIGS / "adps.yaml").read_text())
    arguments = config["model"]["init_args"]
    assert arguments["backbone"] == "wide_resnet50_2"
    assert (arguments["patches"], arguments["learning_rate"]) == (8, 1e-4)
    assert config["data"]["init_args"]["train_batch_size"] == 32
    assert config["trainer"]["max_epochs"] == 300
