# SPDX-License-Identifier: Apache-2.0
"""The states of torch's random number generators, on every kind of device that it knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ACCELERATORS = ("cuda", "xpu")  # with one generator for each device


def random_state() -> dict[str, Any]:
    """The states of the generators of this process, as tensors."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    for kind in _ACCELERATORS:
        device = getattr(torch, kind, None)
        state[kind] = device.get_rng_state_all() if device is not None and device.is_available() else []
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators; those of devices that are not there are left out.

    Args:
        state: What :func:`random_state` gave, here or elsewhere.
    """
    torch.set_rng_state(state["cpu"].cpu())
    for kind in _ACCELERATORS:
        device = getattr(torch, kind, None)
        count = device.device_count() if device is not None and device.is_available() else 0
        for index in range(min(count, len(state.get(kind, [])))):
            getattr(torch, kind).set_rng_state(state[kind][index].cpu(), index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed on the CPU for the duration.

    Afterwards its generator goes on as before. Those of other devices are not seeded.

    Args:
        seed: The seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators, too
        yield
