# SPDX-License-Identifier: Apache-2.0
"""Quality, cost and speed of one model on one data set."""

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from anomalib.visualization.image.functional import overlay_images, visualize_anomaly_map
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_fractalad.benchmark.config import import_class
from anomalib_fractalad.benchmark.job import Record, conditions, describe, missing_runtimes, state_of
from anomalib_fractalad.image_files import open_rgb
from anomalib_fractalad.transforms import FractalAnomalyGenerator

BATCH_SIZE = 8
# Processors that can would compute FP32 models in bfloat16.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
COMPRESSION = {"openvino_fp16": CompressionType.FP16, "openvino_int8": CompressionType.INT8_PTQ}

Inferencer = TorchInferencer | OpenVINOInferencer


def measure(record: Record) -> None:
    """Train, test, export and time a model, as far as its record says that it was not done yet.

    Args:
        record: The job's record, with its description; it is saved with each stage's name and results as they come.
    """
    spec, measuring = record.content["spec"], record.content["measuring"]
    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])
    record.save(stage="preparing", environment=environment())
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, datamodule = build(spec, root)
        if is_trained := record.is_trained:
            record.save(stage="loading the trained model")
        else:
            record.save(stage="training", inputs=state_of(_inputs(spec, datamodule)))
            cost = fit(model, datamodule, spec, root, record.checkpoint)
            record.save(cost=cost, stage="testing")
        prepare_test(model, datamodule, spec["accelerator"], root, record.checkpoint, is_trained)
        evaluator = ScoreCollector(_sheet_paths(datamodule, measuring["sheet_images"]), record.folder)
        quality, defects, device = test(model, datamodule, evaluator, spec["accelerator"], root)
        record.save(
            quality=quality,
            defects=defects,
            scores=evaluator.scores,
            sheet=evaluator.sheet,
            sheet_images=measuring["sheet_images"],
        )
        for runtime in missing_runtimes(record.content, measuring):
            record.save(stage=runtime)
            figures = conditions(runtime, measuring)
            try:
                figures |= speed(model, datamodule, runtime, device, spec["threads"], measuring["repetitions"], root)
            except Exception as error:  # the other runtimes go on
                figures["reason"] = describe(error)
            record.save(runtimes={**record.content.get("runtimes", {}), runtime: figures})


def _inputs(spec: dict[str, Any], datamodule: AnomalibDataModule) -> Iterator[Path]:
    """Folders of all images and masks, and files among the model's arguments."""
    for name in ("train_data", "val_data", "test_data"):
        samples = getattr(datamodule, name).samples if hasattr(datamodule, name) else {}
        for column in ("image_path", "mask_path"):
            yield from {Path(path).parent for path in samples.get(column, []) if isinstance(path, str) and path}
    for value in spec["model"]["init_args"].values():
        if isinstance(value, str) and Path(value).is_file():
            yield Path(value)


def environment() -> dict[str, Any]:
    """The machine: what the figures depend on and the description of a job does not hold."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"platform": platform.platform(), "cpu": _cpu_name(), "cores": os.cpu_count(), "cuda": cuda}


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def build(spec: dict[str, Any], root: Path) -> tuple[AnomalibModule, AnomalibDataModule]:
    """Build model and data module from a job's description.

    Images are divided before there is a model, whose weights take random numbers: each model has the same images.

    Args:
        spec: The job's description.
        root: An empty folder.

    Returns:
        The model, without its pictures and own metrics, and the data module, set up.
    """
    arguments = {**spec["model"]["init_args"]}
    if "dtd_dir" in arguments and arguments["dtd_dir"] is None:
        arguments["dtd_dir"] = str(root)  # a folder without images: noise instead of a download
    if spec["image_size"] is not None and arguments.get("pre_processor") is True:
        model_class = import_class(spec["model"]["class_path"])
        arguments["pre_processor"] = model_class.configure_pre_processor(image_size=tuple(spec["image_size"]))
    seed_everything(spec["seed"], workers=True)
    datamodule = _instantiate(AnomalibDataModule, spec["data"])
    datamodule.prepare_data()
    datamodule.setup(TrainerFn.FITTING)
    if spec["train_batch_size"] is not None:
        datamodule.train_batch_size = spec["train_batch_size"]
    seed_everything(spec["seed"], workers=True)
    model = _instantiate(AnomalibModule, {"class_path": spec["model"]["class_path"], "init_args": arguments})
    model.visualizer = None
    return model, datamodule


def _instantiate(base: type, entry: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "entry", required=True)
    return parser.instantiate_classes(parser.parse_object({"entry": entry})).entry


class _FitMeter(Callback):
    """Time of training and the number of images that it saw."""

    start: float
    seconds: float
    images = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        del trainer, pl_module
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        del trainer, pl_module, outputs, batch_idx
        self.images += len(batch.image)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        del trainer, pl_module
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start


def fit(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    spec: dict[str, Any],
    root: Path,
    checkpoint: Path,
) -> dict[str, Any]:
    """Train a model within its budget, without validation, and save it.

    Args:
        model: The model.
        datamodule: Its data.
        spec: The job's description.
        root: Folder for Lightning's files.
        checkpoint: Where the trained model goes, without its optimiser.

    Returns:
        The cost of training.
    """
    length: dict[str, Any] = {}
    if spec["epochs"] is not None:
        length = {"max_epochs": spec["epochs"]}
    elif spec["steps"] is not None:
        length = {"max_epochs": -1, "max_steps": spec["steps"]}
    meter = _FitMeter()
    engine = Engine(
        callbacks=[meter, ModelCheckpoint(save_top_k=0)],
        accelerator=spec["accelerator"],
        devices=1,
        default_root_dir=root,
        limit_val_batches=0,
        precision=spec["precision"],
        enable_model_summary=False,
        enable_progress_bar=False,
        **length,
    )
    engine.fit(model, datamodule=datamodule)
    trained = {id(p): p.numel() for o in engine.trainer.optimizers for group in o.param_groups for p in group["params"]}
    engine.trainer.save_checkpoint(checkpoint, weights_only=True)
    cost = {
        "trainable_parameters": sum(trained.values()),
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_mb": peak_memory(),
    }
    if engine.trainer.strategy.root_device.type == "cuda":
        cost["peak_cuda_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    if meter.images:
        cost["fit_seconds"] = meter.seconds
        cost["train_images_per_second"] = meter.images / meter.seconds
    return cost


def peak_memory() -> float | None:
    """Largest resident set of this process so far in MiB, without its data loaders' workers; none on Windows."""
    if sys.platform == "win32":
        return None
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage counts in the process that started this one
        (peak,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    import resource  # noqa: PLC0415

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class ScoreCollector(Evaluator):
    """The metrics of the comparison, each image's score, and pictures for the sheet of heat maps.

    Args:
        sheet_paths: Images for the sheet.
        folder: Where the pictures go.

    Attributes:
        scores: Path, label and score of each test image.
        sheet: For each image of the sheet its path, score, and whether there is a mask.
    """

    def __init__(self, sheet_paths: Sequence[str], folder: Path) -> None:
        image, maps = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
        super().__init__(
            test_metrics=[
                *(metric(image, "image_") for metric in (AUROC, AUPR, F1Max)),
                *(metric(maps, "pixel_", strict=False) for metric in (AUROC, AUPR, AUPRO)),
            ],
        )
        self.folder = folder
        self.scores: list[tuple[str, bool, float]] = []
        self.sheet: list[dict[str, Any]] = [{"image_path": path} for path in sheet_paths]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics, and note scores and pictures."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        places = {entry["image_path"]: number for number, entry in enumerate(self.sheet)}
        for i, path in enumerate(map(str, batch.image_path)):
            score = batch.pred_score[i].item()
            self.scores.append((path, bool(batch.gt_label[i]), score))
            if path in places and batch.anomaly_map is not None:
                self._draw(places[path], path, batch, i)
                self.sheet[places[path]]["score"] = score

    def _draw(self, number: int, path: str, batch: Any, i: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        heat_map = visualize_anomaly_map(batch.anomaly_map[i].detach().cpu().squeeze())
        picture = open_rgb(path).resize(heat_map.size)
        picture.save(self.folder / f"image_{number}.png")
        overlay_images(picture, heat_map).save(self.folder / f"map_{number}.png")
        if batch.gt_mask is not None:
            to_pil_image(batch.gt_mask[i].cpu().float().squeeze()).save(self.folder / f"mask_{number}.png")


def _sheet_paths(datamodule: AnomalibDataModule, count: int) -> list[str]:
    """Test images from each folder in turn, from the middle of each on."""
    folders: dict[str, list[str]] = {}
    for path in sorted(map(str, datamodule.test_data.samples.image_path)):
        folders.setdefault(Path(path).parent.name, []).append(path)
    halves = [paths[len(paths) // 2 :] + paths[: len(paths) // 2] for paths in folders.values()]
    return [path for path in chain.from_iterable(zip_longest(*halves)) if path is not None][:count]


def prepare_test(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    accelerator: str,
    root: Path,
    checkpoint: Path,
    is_trained: bool,
) -> None:
    """Set a model's thresholds on the validation images where there are any.

    Args:
        model: The model, with its own evaluator, whose state a checkpoint holds too.
        datamodule: Its data.
        accelerator: Lightning's accelerator.
        root: Folder for Lightning's files.
        checkpoint: The trained model; loaded if it is complete, and else written once more with the thresholds.
        is_trained: Whether the checkpoint is complete.
    """
    has_validation = hasattr(datamodule, "val_data")
    if not has_validation and not is_trained:
        return
    engine = Engine(accelerator=accelerator, devices=1, default_root_dir=root, enable_progress_bar=False)
    run = engine.validate if has_validation else engine.test
    run(model, datamodule=datamodule, ckpt_path=checkpoint if is_trained else None)
    if not is_trained:
        engine.trainer.save_checkpoint(checkpoint, weights_only=True)


def test(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    evaluator: ScoreCollector,
    accelerator: str,
    root: Path,
) -> tuple[dict[str, float], dict[str, float], str]:
    """Test a model.

    Args:
        model: A trained model.
        datamodule: Its data.
        evaluator: Metrics; holds the images' scores afterwards.
        accelerator: Lightning's accelerator.
        root: Folder for Lightning's files.

    Returns:
        Metrics by name, pixel metrics only where there are masks; image AUROC by type of defect; type of the device.
    """
    model.evaluator = evaluator
    engine = Engine(accelerator=accelerator, devices=1, default_root_dir=root, enable_progress_bar=False)
    (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    model.evaluator = None  # not to be exported
    quality = {name: float(value) for name, value in metrics.items()}
    return quality, defect_auroc(evaluator.scores), engine.trainer.strategy.root_device.type


def defect_auroc(scores: Sequence[tuple[str, bool, float]]) -> dict[str, float]:
    """Image AUROC of each type of defect, which the folder of its images names, against all normal images.

    Args:
        scores: Path, whether there is a defect, and score of each image.

    Returns:
        AUROC by folder name; empty without normal images.
    """
    normal = [score for _, anomalous, score in scores if not anomalous]
    defects: dict[str, list[float]] = {}
    for path, anomalous, score in scores:
        if anomalous:
            defects.setdefault(Path(path).parent.name, []).append(score)
    if not normal:
        return {}
    return {name: _auroc([0] * len(normal) + [1] * len(some), normal + some) for name, some in sorted(defects.items())}


def _auroc(labels: Sequence[int], scores: Sequence[float]) -> float:
    return float(binary_auroc(torch.tensor(scores, dtype=torch.float64), torch.tensor(labels)))


def speed(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    runtime: str,
    device: str,
    threads: int | None,
    repetitions: int,
    root: Path,
) -> dict[str, Any]:
    """Export a model for a runtime, and time it there from an image in memory to score and map.

    Args:
        model: A trained model.
        datamodule: Its data.
        runtime: Name of the runtime.
        device: Type of the device for the runtime torch; OpenVINO runs on the CPU.
        threads: CPU threads of OpenVINO; left out, it chooses.
        repetitions: Number of timed predictions.
        root: Folder for the exported files.

    Returns:
        Size of the files in MiB, median and 90 % quantile of one image's latency in ms, images per second in batches of
        8 and, for OpenVINO, the precision that it computes in and the image AUROC.
    """
    export_type = ExportType.TORCH if runtime == "torch" else ExportType.OPENVINO
    file = Engine(default_root_dir=root, accelerator="cpu").export(
        model,
        export_type,
        export_root=root,
        model_file_name=runtime,
        compression_type=COMPRESSION.get(runtime),
        datamodule=_Calibration(datamodule),  # type: ignore[arg-type]
        onnx_kwargs={"opset_version": 18},  # torch writes 18, and fails to go down to anomalib's 14
    )
    if file is None:
        msg = f"anomalib exported no file for {runtime}"
        raise RuntimeError(msg)
    result: dict[str, Any] = {"file_mb": sum(path.stat().st_size for path in file.parent.glob(f"{runtime}.*")) / 2**20}
    samples = datamodule.test_data.samples
    if runtime == "torch":
        os.environ["TRUST_REMOTE_CODE"] = "1"  # the file was written above
        inferencer: Inferencer = TorchInferencer(file, device)
        result["device"] = device
    else:
        inferencer = openvino_inferencer(file, runtime, threads)
        result["precision"] = inferencer.model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        scores = [_score(inferencer, path) for path in samples.image_path]
        result["image_AUROC"] = _auroc(list(samples.label_index), scores)
    images = [read_image(path, as_tensor=runtime == "torch") for path in islice(samples.image_path, BATCH_SIZE)]
    seconds = seconds_each(inferencer, islice(cycle(images), repetitions + 1))
    batches: list[Any] = [np.stack([images[0]] * BATCH_SIZE)] * (repetitions // BATCH_SIZE + 2)
    if runtime == "torch":
        batches = [torch.from_numpy(batch) for batch in batches]
    return {
        **result,
        "latency_ms": 1e3 * statistics.median(seconds),
        "latency_90_ms": 1e3 * float(np.quantile(seconds, 0.9)),
        "images_per_second": BATCH_SIZE / statistics.median(seconds_each(inferencer, batches)),
    }


class _Calibration(LightningDataModule):
    """The normal training images, each beside a copy with a fractal anomaly.

    anomalib's export would calibrate INT8 with validation images, which may be the test images. Normal images alone
    leave no room for the values that anomalies give: all scores come out alike.
    """

    def __init__(self, datamodule: AnomalibDataModule) -> None:
        super().__init__()
        self.images = datamodule.train_data
        self.generator = FractalAnomalyGenerator()

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, shuffle=True, collate_fn=self._pair)

    def _pair(self, items: list[Any]) -> dict[str, np.ndarray]:
        normal = items[0].image
        anomalous, _ = self.generator(normal)
        return {"image": torch.stack([normal, anomalous]).numpy()}


def _score(inferencer: OpenVINOInferencer, path: str) -> float:
    score: Any = inferencer.predict(path).pred_score
    return float(score.item())


def openvino_inferencer(file: Path, runtime: str, threads: int | None) -> OpenVINOInferencer:
    """Load an OpenVINO model, to compute in FP32 if its runtime is named so.

    Args:
        file: The model's .xml file.
        runtime: openvino_fp32, openvino_fp16 or openvino_int8.
        threads: Number of CPU threads; left out, OpenVINO chooses.
    """
    config: dict[str, Any] = dict(FLOAT32) if runtime == "openvino_fp32" else {}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    with working_directory(file.parent):  # the inferencer makes its cache there
        return OpenVINOInferencer(file, "CPU", config)


@contextlib.contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Go to a folder and back: OpenVINOInferencer keeps every model that it compiles below the current one.

    Args:
        folder: The folder.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@torch.inference_mode()
def seconds_each(inferencer: Inferencer, inputs: Any) -> list[float]:
    """Time each prediction but the first.

    Args:
        inferencer: A loaded model.
        inputs: Images, or batches of images.
    """
    seconds = []
    for image in inputs:
        start = time.perf_counter()
        torch.as_tensor(inferencer.predict(image).pred_score).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
