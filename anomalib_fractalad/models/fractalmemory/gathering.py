# SPDX-License-Identifier: Apache-2.0
"""The first stage: normal features, and some images that the head is never trained on."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .statistics import Moments, Reservoir, extended_average, fill_memory
from .torch_model import FractalMemoryModel

HELD_EVERY = 8
MOST_HELD = 16


class Gathering:
    """What one process gathers, and after :meth:`finish` what all have gathered.

    It holds moments, a reservoir of features (232 MB by default) and up to 16 images, whatever the number of images.

    Args:
        channels: Channels of the teacher's levels.
        reservoir_size: Number of places that are sampled.
        device: Where features come from, and where they are gathered if it knows double precision; else, on the CPU.
        most_held: Most images that are kept aside.

    Attributes:
        held_images: Images (3, H, W), every eighth and at most 16, that the head is not trained on.
        held_owners: Numbers of the parts that they show, (n,), on the CPU.
    """

    def __init__(
        self, channels: Sequence[int], reservoir_size: int, device: torch.device, most_held: int = MOST_HELD
    ) -> None:
        self.most_held = most_held
        device = torch.device("cpu") if device.type == "mps" else device
        self.device = device
        self.moments = Moments(channels).to(device)
        self.reservoir = Reservoir(reservoir_size, sum(channels) + len(channels)).to(device)
        self.held_images: list[Tensor] = []
        self.held_owners = torch.empty(0, dtype=torch.int64)
        self.images = 0
        self.finished = False

    @torch.no_grad()
    def add(
        self,
        teacher: nn.Module,
        images: Tensor,
        owner: Tensor,
        inside: Tensor | None = None,
        *,
        copies: bool = False,
    ) -> None:
        """Take in normal images.

        Args:
            teacher: Gives the features.
            images: (B, 3, H, W), values in [0, 1].
            owner: Numbers of the parts that they show, (B,), on the CPU.
            inside: Pixels that count, boolean (B, 1, H, W). Left out, all count.
            copies: Whether these are changed copies of images that were taken in; of them none is held.
        """
        features = [level.float().to(self.device) for level in teacher(images)]
        inside = None if inside is None else inside.to(self.device)
        averages = extended_average(features)
        self.moments.update(features, averages, inside)
        self.reservoir.offer(averages, owner, inside)
        if copies:
            return
        first = (-self.images) % HELD_EVERY
        for i in range(first, len(images), HELD_EVERY):
            if len(self.held_images) < self.most_held:
                self.held_images.append(images[i].half().cpu())
                self.held_owners = torch.cat([self.held_owners, owner[i : i + 1]])
        self.images += len(images)

    def finish(self, model: FractalMemoryModel, level_weights: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        """Fill the model's memory, the same in every process.

        Args:
            model: The network.
            level_weights: As for :func:`level_scales`.
        """
        values, owners = self.reservoir.sample
        if dist.is_available() and dist.is_initialized():
            values, owners = self._share(values, owners)
        usual, spread = fill_memory(model.memory, model.descriptor, self.moments, values, owners, level_weights)
        model.saturation.usual.copy_(usual)
        model.saturation.spread.copy_(spread)
        self.moments, self.reservoir = Moments(self.moments.channels), Reservoir(1, 1)  # no longer needed
        self.finished = True

    def _share(self, values: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Join what the processes have gathered; each has seen as many images."""
        device, world = values.device, dist.get_world_size()
        share = max(len(self.reservoir.values) // world, 1)
        chosen = torch.randperm(len(values))[:share].to(device)
        mine = (values[chosen].cpu(), owners[chosen].cpu(), self.held_images, self.held_owners)
        all_parts: list[Any] = [None] * world
        dist.all_gather_object(all_parts, mine)
        for total in self.moments.buffers():
            dist.all_reduce(total)
        held = [pair for part in all_parts for pair in zip(part[2], part[3], strict=True)][: self.most_held]
        self.held_images = [image for image, _ in held]
        self.held_owners = torch.tensor([int(owner) for _, owner in held], dtype=torch.int64)
        values, owners = (torch.cat([part[i] for part in all_parts]).to(device) for i in (0, 1))
        return values, owners

    def states(self) -> list[dict[str, Any]]:
        """What every process has to remember to go on, as plain data; a single entry where it is the same for all."""
        state = {
            "held_images": self.held_images,
            "held_owners": self.held_owners,
            "images": self.images,
            "finished": self.finished,
        }
        if self.finished:
            return [state]
        state |= {"moments": self.moments.state_dict(), "reservoir": self.reservoir.state_dict()}
        states = [state]
        if dist.is_available() and dist.is_initialized():
            states *= dist.get_world_size()
            dist.all_gather_object(states, state)
        return states

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: An entry of :meth:`states`.

        Raises:
            ValueError: If the reservoir has another size there.
        """
        self.held_images = list(state["held_images"])
        self.held_owners = state["held_owners"].cpu()
        self.images, self.finished = state["images"], state["finished"]
        if not self.finished:
            here, there = len(self.reservoir.values), len(state["reservoir"]["values"])
            if here != there:
                msg = f"reservoir_size is {here} here, and {there} in the checkpoint: go on with {there}"
                raise ValueError(msg)
            self.moments.load_state_dict(state["moments"])
            self.reservoir.load_state_dict(state["reservoir"])
