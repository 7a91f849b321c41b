# SPDX-License-Identifier: Apache-2.0
"""The first stage: normal features, and some images that the head is never trained on."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .statistics import COARSE_SHARE, Moments, Reservoir, extended_average, fill_memory
from .torch_model import FractalMemoryModel

HELD_EVERY = 8
MOST_HELD = 16


class Gathering:
    """What one process gathers, and after :meth:`finish` what all have gathered.

    It holds moments, reservoirs of features (506 MB by default, when they are full) and up to 16 images, whatever the
    number of images.

    Args:
        channels: Channels of the teacher's levels.
        reservoir_size: Number of places that are sampled of the finer levels; of the coarse one, a quarter.
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
        *finer, _ = channels
        sizes = [*[reservoir_size for _ in finer], -(-reservoir_size // COARSE_SHARE)]
        self.moments = [Moments(count).to(device) for count in channels]
        self.reservoirs = [Reservoir(size, count + 1).to(device) for size, count in zip(sizes, channels, strict=True)]
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
        levels = zip(self.moments, self.reservoirs, features, extended_average(features), strict=True)
        for moments, reservoir, level, averages in levels:
            moments.update(level, averages, inside)
            reservoir.offer(averages, owner, inside)
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
        samples = [reservoir.sample for reservoir in self.reservoirs]
        if dist.is_available() and dist.is_initialized():
            samples = self._share(samples)
        usual, spread = fill_memory(model.memory, model.descriptor, self.moments, samples, level_weights)
        model.saturation.usual.copy_(usual)
        model.saturation.spread.copy_(spread)
        self.moments, self.reservoirs = [], []  # no longer needed
        self.finished = True

    def _share(self, samples: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Join what the processes have gathered; each has seen as many images."""
        world = dist.get_world_size()
        mine = []
        for (values, owners), reservoir in zip(samples, self.reservoirs, strict=True):
            share = max(len(reservoir.values) // world, 1)
            chosen = torch.randperm(len(values))[:share].to(values.device)
            mine.append((values[chosen].cpu(), owners[chosen].cpu()))
        all_parts: list[Any] = [None] * world
        dist.all_gather_object(all_parts, (mine, self.held_images, self.held_owners))
        for total in chain.from_iterable(level.buffers() for level in self.moments):
            dist.all_reduce(total)
        all_samples, all_images, all_owners = zip(*all_parts, strict=True)
        self.held_images = list(chain.from_iterable(all_images))[: self.most_held]
        self.held_owners = torch.cat(all_owners)[: self.most_held]
        joined = []
        for level in zip(*all_samples, strict=True):
            values, owners = (torch.cat(parts).to(self.device) for parts in zip(*level, strict=True))
            joined.append((values, owners))
        return joined

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
        state |= {
            "moments": [level.state_dict() for level in self.moments],
            "reservoirs": [level.state_dict() for level in self.reservoirs],
        }
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
            here, there = len(self.reservoirs[0].values), len(state["reservoirs"][0]["values"])
            if here != there:
                msg = f"reservoir_size is {here} here, and {there} in the checkpoint: go on with {there}"
                raise ValueError(msg)
            for name in ("moments", "reservoirs"):
                for level, saved in zip(getattr(self, name), state[name], strict=True):
                    level.load_state_dict(saved)
