# SPDX-License-Identifier: Apache-2.0
"""What a comparison is to run, checked before anything runs."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict, get_args

from anomalib_fractalad.benchmark.provenance import package_digest, source_digest, versions

RUNTIMES = ("torch", "openvino_fp32", "openvino_fp16", "openvino_int8")
TEXTURE_ARGUMENTS = ("dtd_dir", "anomaly_source_path")


# A dataclass with a field class_path is taken for a class to be built by jsonargparse.
class ModelEntry(TypedDict, total=False):
    """A model, its arguments and its training budget.

    Attributes:
        class_path: Name of an anomalib model, for example ``FractalAD`` or ``Patchcore``, or its import path.
        init_args: Arguments of the model.
        name: Name in the report; the class's own unless given.
        epochs: Training length in epochs.
        steps: Training length in optimizer steps, in place of epochs.
        train_batch_size: Images in a training batch, in place of the data's own.
        precision: Precision of training, such as ``bf16-mixed``, in place of Lightning's ``32-true``.
    """

    class_path: str
    init_args: dict[str, object]  # of Any, jsonargparse would build the classes inside
    name: str
    epochs: int
    steps: int
    train_batch_size: int
    precision: str


class DataEntry(TypedDict, total=False):
    """A data module.

    Attributes:
        class_path: Name of an anomalib data module, for example ``SurfaceDefects`` or ``Folder``, or its import path.
        init_args: Arguments of the data module.
        name: Name in the report; the class's own and the category unless given.
    """

    class_path: str
    init_args: dict[str, object]  # of Any, jsonargparse would build the classes inside
    name: str


@dataclass(frozen=True)
class Settings:
    """How every job is run and measured.

    Attributes:
        image_size: Height and width that every model resizes to; ``None`` leaves each model its own.
        accelerator: Lightning's accelerator of training and of the runtime torch.
        threads: CPU threads of training and inference; ``None`` leaves the choice to each runtime.
        runtimes: Members of :data:`RUNTIMES` to measure.
        repetitions: Timed predictions of one image.
        sheet_images: Images on the sheet of heat maps.
    """

    image_size: tuple[int, int] | None = None
    accelerator: str = "auto"
    threads: int | None = None
    runtimes: tuple[str, ...] = RUNTIMES
    repetitions: int = 50
    sheet_images: int = 6

    def __post_init__(self) -> None:
        for name in ("threads", "repetitions", "sheet_images"):
            _check_positive("", name, getattr(self, name))
        for runtime in self.runtimes:
            if runtime not in RUNTIMES:
                msg = f"runtimes has {runtime!r}; known are {', '.join(RUNTIMES)}"
                raise ValueError(msg)
            package = {"openvino_int8": "nncf"}.get(runtime, "openvino")
            if runtime != "torch" and find_spec(package) is None:
                msg = (
                    f"the runtime {runtime} needs {package}, which is not installed: pip install "
                    f"'anomalib-fractalad[openvino]', or leave {runtime} out of runtimes"
                )
                raise ValueError(msg)


@dataclass(frozen=True)
class Job:
    """One model on one data set with one seed.

    Attributes:
        model: Name of the model in the report.
        data: Name of the data in the report.
        seed: Seed of the random numbers.
        spec: All that the trained model and its quality depend on, code included, as plain data.
        measuring: How it is measured: runtimes, repetitions and images on the sheet, as plain data.
        arguments: Arguments given to the model.
        notes: What the report has to say about the model.
    """

    model: str
    data: str
    seed: int
    spec: dict[str, Any]
    measuring: dict[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Digest of :attr:`spec`."""
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.model} on {self.data}, seed {self.seed}"


def make_jobs(
    models: Sequence[ModelEntry],
    data: Sequence[DataEntry],
    seeds: Sequence[int],
    settings: Settings,
) -> list[Job]:
    """Check a comparison and list its jobs.

    Args:
        models: Models to compare.
        data: Data to compare them on.
        seeds: Seeds of the random numbers.
        settings: How the jobs are run.

    Returns:
        One job for each model, data module and seed.

    Raises:
        ValueError: If an entry is missing, unknown, given twice or contradicts another.
    """
    for name, values in (("models", models), ("data", data), ("seeds", seeds)):
        if not values:
            msg = f"{name} is empty; give at least one"
            raise ValueError(msg)
    _check_unique("seeds", [str(seed) for seed in seeds], "leave one out")
    resolved_models = [_model(entry, f"models[{i}]") for i, entry in enumerate(models)]
    resolved_data = [_data(entry, f"data[{i}]") for i, entry in enumerate(data)]
    _check_unique("models", [name for name, *_ in resolved_models], "give each a name of its own")
    _check_unique("data", [name for name, _ in resolved_data], "give each a name of its own")
    common, measuring = _common(settings)
    return [
        Job(
            model_name,
            data_name,
            seed,
            # through JSON, so that a job read back from its file is the same
            json.loads(json.dumps({**model_spec, "data": data_spec, "seed": seed, **common})),
            json.loads(json.dumps(measuring)),
            model_arguments,
            notes,
        )
        for data_name, data_spec in resolved_data
        for model_name, model_spec, model_arguments, notes in resolved_models
        for seed in seeds
    ]


def _common(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the results of all jobs depend on, the code included, and how they are measured."""
    common = {
        "image_size": settings.image_size,
        "accelerator": settings.accelerator,
        "device": _device(settings.accelerator),
        "threads": settings.threads,
        "versions": versions(),
        "code": package_digest(),
    }
    return common, {name: asdict(settings)[name] for name in ("runtimes", "repetitions", "sheet_images")}


def _device(accelerator: str) -> str | None:
    """What ``auto`` and ``gpu`` come to depends on the machine."""
    import torch  # noqa: PLC0415

    return torch.cuda.get_device_name() if accelerator != "cpu" and torch.cuda.is_available() else None


def import_class(class_path: str) -> Any:
    """The class of an import path."""
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def _model(entry: ModelEntry, place: str) -> tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]:
    import anomalib.models  # noqa: PLC0415
    from anomalib.models.components import AnomalibModule  # noqa: PLC0415
    from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR  # noqa: PLC0415

    model_class, spec = _resolve(AnomalibModule, anomalib.models, entry, place)
    place = f"{place} ({model_class.__name__})"
    budget = {"epochs": entry.get("epochs"), "steps": entry.get("steps")}
    budget["train_batch_size"] = entry.get("train_batch_size")
    for name, value in budget.items():
        _check_positive(f"{place}: ", name, value)
    precision = entry.get("precision")
    if precision not in {None, *get_args(_PRECISION_INPUT_STR)}:
        msg = f"{place}: precision is {precision!r}; Lightning has {', '.join(get_args(_PRECISION_INPUT_STR))}"
        raise ValueError(msg)
    given = [name for name in ("epochs", "steps") if budget[name] is not None]
    if len(given) > 1:
        msg = f"{place} has epochs {budget['epochs']} and steps {budget['steps']}; give one of them"
        raise ValueError(msg)
    own_length = _sets_own_length(model_class, spec["init_args"])
    if given and own_length:
        msg = f"{place} has {given[0]} {budget[given[0]]}, but sets its training length itself; leave {given[0]} out"
        raise ValueError(msg)
    if not given and not own_length:
        msg = f"{place} has no training budget; give epochs or steps"
        raise ValueError(msg)
    arguments = entry.get("init_args", {})
    notes = _textures(arguments, spec["init_args"], place)
    described = {"model": spec, **budget, "precision": precision}
    return entry.get("name", model_class.__name__), described, arguments, notes


def _data(entry: DataEntry, place: str) -> tuple[str, dict[str, Any]]:
    import anomalib.data  # noqa: PLC0415
    from anomalib.data import AnomalibDataModule  # noqa: PLC0415

    data_class, spec = _resolve(AnomalibDataModule, anomalib.data, entry, place)
    arguments = spec["init_args"]
    default = [data_class.__name__, arguments.get("category")] if "category" in arguments else [arguments.get("name")]
    return entry.get("name") or " ".join(filter(None, default)) or data_class.__name__, spec


def _resolve(base: type, namespace: Any, entry: Any, place: str) -> tuple[type, dict[str, Any]]:
    """The class of an entry and the entry with all of its arguments, defaults included."""
    from jsonargparse import ArgumentError  # noqa: PLC0415

    class_path = entry.get("class_path")
    if not class_path:
        msg = f"{place} has no class_path; give the name of one of the classes of {namespace.__name__}"
        raise ValueError(msg)
    if "." not in class_path and not hasattr(namespace, class_path):
        known = sorted(
            name for name, kind in vars(namespace).items() if isinstance(kind, type) and issubclass(kind, base)
        )
        msg = f"{place}: {namespace.__name__} has no {class_path!r}; it has {', '.join(known)}"
        raise ValueError(msg)
    try:
        _, config = parse_entry(base, {"class_path": class_path, "init_args": entry.get("init_args", {})})
    except ArgumentError as error:
        msg = f"{place}: {error}"
        raise ValueError(msg) from None
    # jsonargparse's own dump makes text of a list where text is allowed, too.
    spec = _as_plain_data(config.entry.as_dict())
    found = import_class(spec["class_path"])
    resolved = {"class_path": spec["class_path"], "init_args": spec.get("init_args", {})}
    own_code = source_digest(found)
    return found, resolved if own_code is None else {**resolved, "code": own_code}


def parse_entry(base: type, entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """A parser for an entry and what it makes of it.

    Args:
        base: A class that the entry's is derived from.
        entry: Its class_path and init_args, which stay as they are.

    Raises:
        jsonargparse.ArgumentError: If the class or an argument is unknown or of another type.
    """
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "entry", required=True)
    return parser, parser.parse_object({"entry": deepcopy(dict(entry))})  # jsonargparse writes into lists


def _as_plain_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain_data(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _sets_own_length(model_class: Any, arguments: dict[str, Any]) -> bool:
    """Whether the model needs no training budget. It is not built for this, since that may fetch weights."""
    from anomalib import LearningType  # noqa: PLC0415

    if hasattr(model_class, "sets_own_length"):
        return bool(model_class.sets_own_length(arguments))
    unbuilt = SimpleNamespace(**arguments)
    try:
        zero_shot = model_class.learning_type.fget(unbuilt) in {LearningType.ZERO_SHOT, LearningType.FEW_SHOT}
        return zero_shot or "max_epochs" in model_class.trainer_arguments.fget(unbuilt)
    except AttributeError:
        return False


def _textures(given: dict[str, Any], arguments: dict[str, Any], place: str) -> tuple[str, ...]:
    """Settle the folder of texture images: the one that exists, or none; anomalib would download it."""
    notes: list[str] = []
    for name in TEXTURE_ARGUMENTS:
        if name not in arguments:
            continue
        folder = arguments[name]
        if folder is not None and Path(folder).is_dir():
            notes.append(f"texture images of {name}: {folder}")
        elif given.get(name) is not None:
            msg = f"{place}: {name} is {folder!r}, which is no folder; give a folder of images, or leave it out"
            raise ValueError(msg)
        else:
            arguments[name] = None
            notes.append(f"no texture images ({name} not given): anomalies come from noise")
    return tuple(notes)


def _check_positive(place: str, name: str, value: int | None) -> None:
    if value is not None and value <= 0:
        msg = f"{place}{name} is {value}; it must be above 0"
        raise ValueError(msg)


def _check_unique(what: str, values: Sequence[str], fix: str) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            msg = f"{what} has {value} {count} times; {fix}"
            raise ValueError(msg)
