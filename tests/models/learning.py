# SPDX-License-Identifier: Apache-2.0
"""One short training of each model, and the loss of a step worked out a second way, from the published equations."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import SIZE, make_tiles, small_engine
from lightning import Callback, seed_everything
from test_all_models import small_model
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad import FractalAnomalyGenerator
from anomalib_fractalad.models.components import Backbone

ANOMALIES = {"class_path": "FractalAnomalyGenerator", "init_args": {"position_margin": 0.0}}
# Enough for a network of random weights to tell anomalies from stripes, in about ten seconds.
LESSONS: dict[str, dict[str, Any]] = {
    "FractalAD": {"epochs": 25, "learning_rate": 3e-3},
    "ADPS": {"epochs": 40, "learning_rate": 3e-3, "anomaly_generator": ANOMALIES},
    "AAND": {"epochs": 60, "split": (1, 1), "anomaly_generator": ANOMALIES},
    "FractalMemory": {"epochs": 15},
}
EARLY, LATE = 2, 6  # steps that are recorded; of AAND, one of each stage
FIRST_STEPS = {"FractalAD": 3, "ADPS": 3, "AAND": 8, "FractalMemory": 6}
CLIPPED = {"FractalMemory"}  # whose gradient has a norm of 1 at most


@dataclass
class Step:
    """A step of a training: what it begins with, and what it comes to."""

    network: nn.Module
    images: Tensor
    random: Tensor
    owners: Tensor | None = None  # of the images, where a model tells parts
    held: Tensor | None = None  # owners of images that it does not learn from
    loss: Tensor = field(default_factory=torch.Tensor)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)


class Recorder(Callback):
    """Records some steps of a training."""

    def __init__(self) -> None:
        self.steps: dict[int, Step] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        del stage
        take = pl_module.training_step

        def training_step(batch: Any, *args: Any) -> Any:
            if trainer.global_step in {EARLY, LATE}:
                owners = (None, None)
                if hasattr(pl_module, "owners_of"):
                    owners = (pl_module.owners_of(batch), pl_module._gathering.held_owners.clone())
                network = copy.deepcopy(pl_module.model)
                self.steps[trainer.global_step] = Step(network, batch.image.clone(), torch.get_rng_state(), *owners)
            return take(batch, *args)

        pl_module.training_step = training_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        step = self.steps.get(trainer.global_step - 1)
        if step is None:
            return
        step.loss = outputs["loss"].detach().clone()
        for name, parameter in pl_module.model.named_parameters():
            if parameter.grad is not None:
                step.gradients[name] = parameter.grad.clone()
            if not torch.equal(parameter, step.network.get_parameter(name)):
                step.moved.add(name)


@dataclass
class Lesson:
    """A model before and after its training."""

    model: Any
    start: Any
    metrics: dict[str, float]


def teach(name: str, data: Path, folder: Path, seed: int = 1) -> Lesson:
    """Train a model and test it on blots, which it has never seen."""
    seed_everything(seed)
    model = small_model(name, **LESSONS[name])
    start = copy.deepcopy(model.model).eval()
    engine = small_engine(folder, check_val_every_n_epoch=LESSONS[name]["epochs"])
    engine.fit(model, datamodule=make_tiles(data))
    (metrics,) = engine.test(model, datamodule=make_tiles(data))
    return Lesson(model.eval(), start, metrics)


def record(name: str, data: Path, folder: Path) -> tuple[Any, dict[int, Step]]:
    """Take the first steps of a training; gives the model and what was recorded."""
    seed_everything(1)
    model, recorder = small_model(name, **{**LESSONS[name], "epochs": None}), Recorder()
    engine = small_engine(folder, callbacks=[recorder], max_steps=FIRST_STEPS[name], limit_val_batches=0)
    engine.fit(model, datamodule=make_tiles(data))
    return model, recorder.steps


def held_out(count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Plates that no training has seen: normal, with fractal anomalies, and the anomalies' masks."""
    random = np.random.default_rng(99)
    stripes = [
        120 + 40 * np.sin(np.arange(SIZE) / 2 + random.uniform(0, 6)) + random.normal(0, 6, (SIZE, SIZE))
        for _ in range(count)
    ]
    images = torch.tensor(np.stack(stripes).clip(0, 255) / 255).float().unsqueeze(1).expand(-1, 3, -1, -1)
    torch.manual_seed(5)
    return FractalAnomalyGenerator(position_margin=0.0).augment(images)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """1 - cosine of the features of each position, (B, H, W)."""
    return 1 - (one * other).sum(dim=1) / (one.norm(dim=1) * other.norm(dim=1)).clamp_min(1e-8)


def covered(mask: Tensor, features: Tensor) -> Tensor:
    """Share of anomalous pixels of each position, (B, H, W)."""
    return F.adaptive_avg_pool2d(mask.float(), features.shape[-2:]).squeeze(1)


def fractalad_loss(step: Step, generator: Any) -> Tensor:
    """FractalAD (arXiv 2301.12739): cross entropy and Dice of the anomalous images, distillation of the normal ones."""
    normal, anomalous, mask = generator.augment(step.images)
    network: Any = step.network
    with torch.no_grad():
        pairs = zip(network.teacher(anomalous), network.student(anomalous), strict=True)
        weighted = [distance(t, s).unsqueeze(1) / 2 * s for t, s in pairs]
    logits = network.head(weighted, mask.shape[-2:])
    entropy = -(mask * F.logsigmoid(logits) + (1 - mask) * F.logsigmoid(-logits)).mean()
    overlap = (logits.sigmoid() * mask).sum()
    dice = 1 - (2 * overlap + 1) / (logits.sigmoid().sum() + mask.sum() + 1)
    with torch.no_grad():
        teacher = network.teacher(normal)
    return entropy + dice + sum(distance(t, s).mean() for t, s in zip(teacher, network.student(normal), strict=True))


def adps_loss(step: Step, generator: Any) -> Tensor:
    """ADPS (arXiv 2210.10495): asymmetric distillation from whole images to patches, focal loss of the segmentation."""
    anomalous, mask = generator(step.images)
    network: Any = step.network
    with torch.no_grad():
        teacher = network.teacher(anomalous)
    distances = list(map(distance, teacher, patch_features(network.student, anomalous)))
    loss = torch.zeros(())
    for each in distances:
        share = covered(mask, each.unsqueeze(1))
        loss = loss + ((1 - share) * each + share * (1 - each)).mean()
    weighted = [each.unsqueeze(1) * t for each, t in zip(distances, teacher, strict=True)]
    probability = network.decoder(weighted).softmax(dim=1)
    of_the_truth = torch.where(mask > 0, probability[:, 1:], probability[:, :1])
    return loss - ((1 - of_the_truth) ** 2 * of_the_truth.log()).mean()


def patch_features(student: Any, images: Tensor) -> list[Tensor]:
    side = student.patches
    patches = torch.cat([patch for row in images.chunk(side, dim=2) for patch in row.chunk(side, dim=3)])
    stages = []
    for features in Backbone.forward(student, patches):
        cells = features.chunk(side**2)
        rows = [torch.cat(cells[row * side : (row + 1) * side], dim=3) for row in range(side)]
        stages.append(torch.cat(rows, dim=2))
    return stages


def aand_loss_one(step: Step, generator: Any) -> Tensor:
    """Stage I of AAND (arXiv 2405.02068), with all pairs of positions, which are few here, one matrix."""
    anomalous, mask = generator(step.images)
    network: Any = step.network
    loss = torch.zeros(())
    for amplifier, plain in zip(network.amplifiers, network.teacher(anomalous), strict=True):
        where = covered(mask, plain) > 0.3
        gate = amplifier.gate(plain).squeeze(1).sigmoid()
        focal = torch.where(where, -0.8 * (1 - gate) ** 2 * gate.log(), -0.2 * gate**2 * (1 - gate).log())
        advanced = plain + amplifier.residual(plain)
        normal, before, after = (
            F.normalize(features.movedim(1, -1)[at], dim=1)
            for features, at in ((plain, ~where), (plain, where), (advanced, where))
        )
        fallen = normal @ after.T - (normal @ before.T - 0.3)
        loss = loss + focal.mean() + 0.1 * fallen.relu().mean()
    return loss


def aand_loss_two(step: Step, generator: Any) -> Tensor:
    """Stage II of AAND: reverse distillation of the advanced features, and of the ten worst positions once more."""
    del generator
    network: Any = step.network
    advanced = advanced_features(network, step.images)
    loss = torch.zeros(())
    for teacher, student in zip(advanced, network.student(advanced), strict=True):
        whole = distance(teacher.flatten(1), student.flatten(1)).mean()
        worst = distance(teacher, student).flatten(1).sort(descending=True).values[:, :10]
        loss = loss + whole + worst.mean()
    return loss


def fractalmemory_loss(step: Step, generator: Any) -> Tensor:
    """FractalMemory's head: focal and Dice loss of residuals to a memory without the part itself, and with few others.

    After the fourth part of the images, as they are, come flips along either axis.
    """
    network: Any = step.network
    learned = torch.tensor([owner not in step.held for owner in step.owners])
    normal, owners = step.images[learned], step.owners[learned]
    anomalous, mask = generator(normal)
    chosen = torch.randperm(len(normal))[: -(-len(normal) // 4)]
    owners = torch.cat([owners, owners[chosen]])
    mask = torch.cat([mask, torch.zeros(len(chosen), *mask.shape[1:])])
    share = 16 ** -torch.rand(len(owners))
    passed = torch.rand(len(owners), *network.memory.owners.shape) >= share[:, None, None]
    passed |= network.memory.owners == owners[:, None, None]
    with torch.no_grad():
        query = network.descriptor(network.teacher(torch.cat([anomalous, normal[chosen]])))
        residuals, lengths, first = [], [], 0
        for level, places in enumerate(query):
            items = network.memory.items[:, first : first + places.shape[1]]
            distance = torch.cdist(places.flatten(2).mT, items.expand(len(places), -1, -1))
            nearest = distance.masked_fill(passed[:, None, :, level], torch.inf).argmin(dim=-1)
            residual = places - items[nearest].mT.reshape(places.shape)
            length = residual.square().mean(dim=1, keepdim=True).sqrt()
            for parts, part in ((residuals, residual), (lengths, length)):
                parts.append(F.interpolate(part, size=query[1].shape[-2:], mode="bilinear"))
            first += places.shape[1]
        residual, far = torch.cat(residuals, dim=1), torch.stack(lengths).sum(dim=0)
    mask = F.adaptive_avg_pool2d(mask.float(), [2 * side for side in far.shape[-2:]])
    flipped = [axis for axis in (3, 2) if torch.rand(()) < 0.5]
    residual, far, mask = (maps.flip(flipped) for maps in (residual, far, mask))
    typical = far.mean(dim=(2, 3), keepdim=True)
    rooted = residual.sign() * (residual.abs() / (typical * residual.shape[1] ** 0.5)).sqrt()
    head = network.head
    embedded = head.embed(torch.cat([rooted, far / typical - 1], dim=1))
    logits = head.classify(head.enlarge(embedded + head.spatial(embedded)))
    probability = logits.sigmoid()
    right = mask * probability + (1 - mask) * (1 - probability)
    entropy = -(mask * F.logsigmoid(logits) + (1 - mask) * F.logsigmoid(-logits))
    dice = 1 - (2 * (probability * mask).sum() + 1) / (probability.sum() + mask.sum() + 1)
    return 2 * ((1 - right) ** 2 * entropy).mean() + dice


@torch.no_grad()
def advanced_features(network: Any, images: Tensor) -> list[Tensor]:
    """F + gate x residual."""
    return [
        plain + amplifier.gate(plain).sigmoid() * amplifier.residual(plain)
        for amplifier, plain in zip(network.amplifiers, network.teacher(images), strict=True)
    ]


def gradients(
    loss: Callable[[Step, Any], Tensor], step: Step, generator: Any, *, clipped: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, with the random numbers that it had, and its gradients."""
    torch.set_rng_state(step.random)
    step.network.zero_grad()
    value = loss(step, generator)
    value.backward()
    if clipped:
        nn.utils.clip_grad_norm_(step.network.parameters(), 1.0)
    found = {name: p.grad for name, p in step.network.named_parameters() if p.grad is not None and p.grad.any()}
    return value.detach(), found


def parts(names: Sequence[str] | set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}
