# SPDX-License-Identifier: Apache-2.0
"""Going on from a checkpoint as if nothing had happened."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from .random_state import random_state, set_random_state

# Lightning does not know that an epoch's data are taken up where the checkpoint left them, and takes a teacher's
# evaluation mode for an oversight.
_WRONG_WARNINGS = (
    "You're resuming from a checkpoint that ended before the epoch ended",
    r"Found \d+ module\(s\) in eval mode",
)

_FAST_FORWARD = "increment_progress_to_evaluation_end"  # Lightning's method


class ExactResume(Callback):
    """Keeps the states of torch's random number generators, of every process, and passes over the data of an epoch.

    A training that is resumed from a checkpoint, within an epoch too, ends with the weights of one that ran through.
    """

    def __init__(self) -> None:
        self._filters: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self._random_states: Sequence[dict[str, Any]] = ()
        self._batches_done = 0
        self._epoch_is_over = False  # but for its validation
        self._validation_is_due = False
        self._epoch_state: dict[str, Any] = {}
        self._start_state: dict[str, Any] = {}
        self._stopped_state: dict[str, Any] | None = None
        self._shuffled = False  # for the epoch that a fit begins or goes on with

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the training before."""
        del trainer, pl_module, stage
        self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random numbers of the checkpoint that training resumes from."""
        before = list(warnings.filters)
        for message in _WRONG_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        self._filters = [entry for entry in warnings.filters if entry not in before]
        pl_module.train()  # an export or a prediction leaves evaluation mode behind, and Lightning goes on in it
        if resumed := self._resumed_state(trainer):
            set_random_state(resumed["epoch"] if self._batches_done and resumed.get("epoch") else resumed)
            if self._validation_is_due and trainer.enable_validation:
                # Lightning shuffles first now. Before, a number would have been drawn for the validation's loader.
                torch.empty((), dtype=torch.int64).random_()
        elif trainer.global_rank > 0:  # the anomalies of each process are its own
            torch.manual_seed(torch.initial_seed() + (trainer.global_rank << 32))
        # What Lightning does next is to shuffle the data.
        self._epoch_state = self._start_state = random_state()
        self._shuffled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume within an epoch: pass over the batches that it has had."""
        del pl_module
        self._restore_warnings()
        if self._batches_done and (resumed := self._resumed_state(trainer)):
            # Lightning counts the batches that the epoch has had, but does not pass over them.
            for _ in range(self._batches_done):
                next(trainer.fit_loop._combined_loader)  # type: ignore[arg-type]  # noqa: SLF001
            set_random_state(resumed)
        self._start_state = random_state()
        if self._epoch_is_over:
            _draw_nothing_for_a_validation_passed_over(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the caller's process as it was."""
        del trainer, pl_module, exception
        self._restore_warnings()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the caller's process, and Lightning's loop, as they were."""
        del pl_module, stage
        self._restore_warnings()
        vars(trainer.fit_loop.epoch_loop.val_loop).pop(_FAST_FORWARD, None)

    def _restore_warnings(self) -> None:
        for entry in self._filters:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]
        self._filters = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where training resumes with a validation, let it go on as if the data had been shuffled afterwards."""
        del pl_module
        if self._shuffled and trainer.state.fn == "fit":
            set_random_state(self._start_state)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the random state that the data of the epoch are shuffled from."""
        del trainer, pl_module
        if not self._shuffled:
            self._epoch_state = random_state()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Note that from now on, data are shuffled where an epoch starts, and the state where an epoch is cut short."""
        del args, kwargs
        self._shuffled = False
        cut_short = trainer.should_stop and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._stopped_state = random_state() if cut_short else None  # Lightning validates next, which draws numbers

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where an epoch is resumed after its last batch, let the next one shuffle as if nothing had happened."""
        del pl_module
        if self._shuffled and (resumed := self._resumed_state(trainer)):
            set_random_state(resumed)
            self._shuffled = False

    def _resumed_state(self, trainer: Trainer) -> dict[str, Any] | None:
        """This process's random state in the checkpoint that training resumes from, if it does."""
        rank = trainer.global_rank
        return self._random_states[rank] if trainer.ckpt_path and rank < len(self._random_states) else None

    def state_dict(self) -> dict[str, Any]:
        """The random states of every process; to be asked for in all of them at once."""
        # Before the first step of a fit, what counts is what the data were shuffled from.
        before_a_step = self._shuffled and not self._batches_done
        state = self._epoch_state if before_a_step else self._stopped_state or random_state()
        state = {**state, "epoch": self._epoch_state}
        states = [state]
        if dist.is_available() and dist.is_initialized():
            states *= dist.get_world_size()
            dist.all_gather_object(states, state)
        return {"random_states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the random states."""
        self._random_states = state_dict["random_states"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where an epoch is cut short, by a limit of time for example, record that it is not over."""
        del pl_module
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        at_end = trainer.state.fn == "fit" and epochs["processed"] > epochs["completed"]
        if at_end and not batches["is_last_batch"] and batches["current"]["ready"] < trainer.num_training_batches:
            for progress in loop["epoch_progress"].values():
                progress["processed"] -= 1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find out where in an epoch the checkpoint was written."""
        del pl_module
        if "random_states" in checkpoint:  # as this package's checkpoints had it at first
            self._random_states = checkpoint["random_states"]
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        progress = loop.get("epoch_loop.batch_progress")
        if progress is not None:
            current, is_last = progress["current"], progress["is_last_batch"]
            self._batches_done = 0 if is_last else current["ready"]
            self._epoch_is_over = is_last and current["completed"] < current["ready"]
            every = trainer.check_val_every_n_epoch or 1
            epochs = loop["epoch_progress"]["current"]["processed"] + 1
            self._validation_is_due = self._epoch_is_over and epochs % every == 0


def _draw_nothing_for_a_validation_passed_over(trainer: Trainer) -> None:
    """Keep Lightning, which goes on with the next epoch, from drawing a number for the loader of a validation."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    pass_over = loop.increment_progress_to_evaluation_end

    def pass_over_silently() -> None:
        state = random_state()
        pass_over()
        set_random_state(state)

    setattr(loop, _FAST_FORWARD, pass_over_silently)
