# SPDX-License-Identifier: Apache-2.0
"""What a frozen network makes of images, kept so that it looks at each image once."""

import logging
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MEMORY = 2**30  # bytes
DISK_SHARE = 0.25  # of what is free at the beginning


class FeatureStore:
    """Computes features of images, or has them from before.

    Images are known by their content, so an augmented image is another image. Features lie in memory, and beyond 1 GiB
    in a temporary folder, for which each process uses at most a quarter of what is free there. What has no room is
    computed again. Where temporary folders lie in memory, TMPDIR names another place.

    Args:
        compute: Gives features of images (B, 3, H, W), each (B, ...).
        memory: Bytes of features that are held in memory.

    Attributes:
        hits: Different images of this epoch's batches whose features were there.
        misses: Different images of this epoch's batches whose features were not.
    """

    def __init__(self, compute: Callable[[Tensor], list[Tensor]], memory: int = MEMORY) -> None:
        self._compute = compute
        self._memory_left = memory
        self._held: dict[bytes, list[Tensor]] = {}
        self._files: dict[bytes, Path] = {}
        self._folder = TemporaryDirectory(prefix="features-", ignore_cleanup_errors=True)
        self._disk_left = int(DISK_SHARE * shutil.disk_usage(self._folder.name).free)
        self._given_up = False
        self._epochs_without_hits = 0
        self.hits = self.misses = 0

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Features of images.

        Args:
            images: (B, 3, H, W), on the CPU.

        Returns:
            What ``compute`` gives of them.
        """
        if self._given_up:
            return self._compute(images)
        keys = [blake2b(image.contiguous().view(torch.uint8).numpy(), digest_size=16).digest() for image in images]
        found = {key: features for key in set(keys) if (features := self._find(key)) is not None}
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        self.hits += len(found)
        self.misses += len(missing)
        if missing:
            computed = self._compute(images[list(missing.values())])
            for position, key in enumerate(missing):
                found[key] = [level[position : position + 1].clone() for level in computed]
                self._keep(key, found[key])
        return [torch.cat(level) for level in zip(*(found[key] for key in keys), strict=True)]

    def end_epoch(self) -> None:
        """Keep nothing any more after two epochs in which no image came again."""
        self._epochs_without_hits = self._epochs_without_hits + 1 if self.misses and not self.hits else 0
        self.hits = self.misses = 0
        if self._epochs_without_hits > 1 and not self._given_up:
            logger.info("No image came twice, as with random augmentations, so that no features are kept any more")
            self.close()

    def close(self) -> None:
        """Forget all features, and keep none from now on."""
        self._given_up = True
        self._held, self._files = {}, {}
        self._folder.cleanup()

    def _find(self, key: bytes) -> list[Tensor] | None:
        if key in self._files and self._files[key].exists():  # temporary folders are swept
            loaded: list[Tensor] = torch.load(self._files[key], weights_only=True)
            return loaded
        return self._held.get(key)

    def _keep(self, key: bytes, features: list[Tensor]) -> None:
        size = sum(level.nbytes for level in features)
        if size <= self._memory_left:
            self._memory_left -= size
            self._held[key] = features
        elif size <= self._disk_left:
            self._disk_left -= size
            file = Path(self._folder.name) / f"{key.hex()}.pt"
            try:
                torch.save(features, file)
            except (OSError, RuntimeError) as error:  # torch raises the latter where the disk is full
                logger.warning("No more features are kept in %s: %s", self._folder.name, error)
                file.unlink(missing_ok=True)
                self._disk_left = 0
            else:
                self._files[key] = file
