# SPDX-License-Identifier: Apache-2.0
"""Choosing a candidate by held-out good images with synthetic defects, within a time."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning import seed_everything

from .candidates import Candidate
from .evaluation import Outcome, as_plain, evaluate, gflop, is_tie
from .split import data_module
from .state import Progress, State
from .training import seconds_per_image, seconds_per_step, train, trainer_length
from .trials import Trial

TRYING, CHOOSING, TRAINING = 0.1, 0.45, 0.4  # shares of the time; the rest is for thresholds, export and report
NO_TIME = "not tried: no time"
_LEAST_EFFORT = 1 / 16


@dataclass(frozen=True)
class Setting:
    """What a choice depends on beside the candidates.

    Attributes:
        train: Images to train on.
        trials: Held-out images and defects in them.
        folder: Where checkpoints lie.
        seconds: Time of the whole build.
        effort: Share of whole trainings to make in place of what the time allows.
        seed: Seed of all trainings.
        accelerator: Where they train.
        workers: Processes that read images.
    """

    train: Sequence[Path]
    trials: Sequence[Trial]
    folder: Path
    seconds: float
    effort: float | None = None
    seed: int = 0
    accelerator: str = "auto"
    workers: int = 0


@dataclass(frozen=True)
class Plan:
    """How much each candidate trains.

    Attributes:
        effort: Share of its whole training that the chosen candidate is trained for.
        rungs: For each round, the number of candidates and the share of the final training that they are trained for.
    """

    effort: float
    rungs: tuple[tuple[int, float], ...]

    @property
    def count(self) -> int:
        """Number of candidates that are compared; 1 where none is compared with another."""
        return self.rungs[0][0] if self.rungs else 1


def rungs(count: int) -> tuple[tuple[int, float], ...]:
    """Rounds of successive halving: half of the candidates stay, and train twice as long.

    Args:
        count: Number of candidates.

    Returns:
        For each round, the number of candidates and the share of the final training.
    """
    rounds = math.ceil(math.log2(count)) if count > 1 else 0
    return tuple((math.ceil(count / 2**number), 0.5 ** (rounds - number)) for number in range(rounds))


def make_plan(costs: Sequence[float], seconds: float, one_pass: Sequence[float] = ()) -> Plan:
    """Plan a choice within a time; efforts are powers of a half, so that a busy machine seldom changes them.

    Args:
        costs: Seconds of the whole training of candidates that train step by step, the recommended one first.
        seconds: Time of the whole build.
        one_pass: Seconds of those that train in one pass, which cannot be shortened; they are among the first.

    Returns:
        The plan, of fewer candidates where the time does not suffice for all: the first ones stay.
    """
    fixed = sum(one_pass)
    for count in range(len(costs), 0, -1):
        rounds = rungs(count + len(one_pass))
        kept = sorted(costs[:count], reverse=True)
        choosing = sum(share * sum(kept[:number]) for number, share in rounds)
        effort = 1.0
        while effort > _LEAST_EFFORT and (
            effort * choosing + fixed > CHOOSING * seconds or effort * kept[0] > TRAINING * seconds
        ):
            effort /= 2
        if effort > _LEAST_EFFORT:
            return Plan(effort, rounds)
    return Plan(_LEAST_EFFORT, rungs(len(one_pass)) if fixed <= CHOOSING * seconds else ())


def choose(candidates: Sequence[Candidate], setting: Setting, state: State, progress: Progress) -> dict[str, Any]:
    """Choose a candidate by successive halving.

    Whatever was done by an earlier call is not done again. Of candidates whose difference may come from which images
    were held out, the one of fewer operations is chosen.

    Args:
        candidates: The candidates, the recommended one first.
        setting: Data, time and seed.
        state: Where the table is kept, under ``choice``.
        progress: Tells how far it is.

    Returns:
        The table: ``plan``, ``rows`` by candidate, ``chosen`` and its ``score``, and ``why``.

    Raises:
        RuntimeError: If every candidate fails.
    """
    table: dict[str, Any] = state.content.get("choice", {"rows": {}})
    if "chosen" in table:
        return table
    running = _Choice(candidates, setting, state, progress, table)
    alive = running.try_out()
    plan = running.plan(alive)
    _note(table, alive[plan.count :], NO_TIME)
    alive = alive[: plan.count]
    counted_out = sorted({kind for candidate in alive for kind in candidate.trains_on})
    table["left_out"] = counted_out
    for number, (count, share) in enumerate(plan.rungs):
        ranked = running.ranked(alive)[:count] if number else alive
        for candidate in ranked:
            running.train(candidate, number, share, plan, counted_out)
        alive = [candidate for candidate in ranked if "failed" not in table["rows"][candidate.name]]
        if not alive:
            msg = f"every candidate failed; the first: {table['rows'][candidates[0].name]['failed']}"
            raise RuntimeError(msg)
    running.decide(alive)
    return table


def _best_way(outcomes: Sequence[Outcome]) -> Outcome:
    """The best way from maps to scores; the first one where it is level with it."""
    best = max(outcomes, key=lambda outcome: outcome.quality)
    return next(outcome for outcome in outcomes if outcome is best or is_tie(best.by_source, outcome.by_source))


def _note(table: dict[str, Any], candidates: Sequence[Candidate], text: str) -> None:
    for candidate in candidates:
        table["rows"][candidate.name]["note"] = text


class _Choice:
    """A choice in the making."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        setting: Setting,
        state: State,
        progress: Progress,
        table: dict[str, Any],
    ) -> None:
        self._candidates, self._setting, self._state, self._progress = candidates, setting, state, progress
        self._table = table

    def _save(self) -> None:
        self._state.save(choice=self._table)

    def try_out(self) -> list[Candidate]:
        """Train each candidate for a few steps; gives those that can be trained, one-pass ones before others.

        None is trained after the first that the time does not suffice for, or once trying has taken its share.
        """
        rows, begin = self._table["rows"], time.monotonic()
        first, *others = self._candidates
        in_order = [first, *sorted(others, key=lambda candidate: candidate.steps is not None)]
        for candidate in in_order:
            if candidate.name in rows:
                continue
            self._progress.step(f"trying {candidate.name}")
            row: dict[str, Any] = {"image_size": candidate.image_size}
            try:
                model = candidate.build()
                row["gflop"] = gflop(model, candidate.image_size)
                if candidate.steps is None or self._is_time_left(time.monotonic() - begin):
                    row["seconds"] = self._cost(candidate, model)
                else:
                    row["note"] = NO_TIME
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            rows[candidate.name] = row
            self._save()
        alive = [
            candidate for candidate in in_order if rows[candidate.name].keys() & {"seconds", "failed"} == {"seconds"}
        ]
        if not alive:
            msg = f"no candidate can be trained; {first.name}: {rows[first.name]['failed']}"
            raise RuntimeError(msg)
        return alive

    def _is_time_left(self, spent: float) -> bool:
        """Whether a candidate may be tried; ``spent`` is the seconds that trying took so far."""
        rows = self._table["rows"]
        tried = [candidate for candidate in self._candidates if "seconds" in rows.get(candidate.name, {})]
        if self._setting.effort is not None or not tried:
            return True
        one_pass, costs = self._costs(tried)
        plan = make_plan(costs, self._setting.seconds, one_pass)
        fits = not costs or (plan.effort > _LEAST_EFFORT and plan.count == len(tried))
        return fits and spent <= TRYING * self._setting.seconds

    def _costs(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        """Seconds of the whole training of candidates that train in one pass, and of those that train step by step."""
        rows = self._table["rows"]
        one_pass = [rows[candidate.name]["seconds"] for candidate in candidates if candidate.steps is None]
        return one_pass, [rows[candidate.name]["seconds"] for candidate in candidates if candidate.steps is not None]

    def _cost(self, candidate: Candidate, model: Any) -> float:
        """Seconds of a candidate's whole training."""
        if self._setting.effort is not None:
            return 0.0
        if candidate.steps is None:
            return len(self._setting.train) * seconds_per_image(model, candidate.image_size)
        data = self._data(candidate)
        step = seconds_per_step(model, data, self._setting.folder / "try", self._setting.accelerator)
        return step * candidate.steps

    def _data(self, candidate: Candidate) -> Any:
        return data_module(self._setting.train, batch_size=candidate.batch_size, workers=self._setting.workers)

    def plan(self, alive: Sequence[Candidate]) -> Plan:
        """The plan of an earlier call, or a new one."""
        if "plan" not in self._table:
            one_pass, costs = self._costs(alive)
            plan = make_plan(costs, self._setting.seconds, one_pass)
            if self._setting.effort is not None:
                plan = Plan(self._setting.effort, rungs(len(alive)))
            self._table["plan"] = {"effort": plan.effort, "rungs": plan.rungs}
            self._save()
        kept = self._table["plan"]
        return Plan(kept["effort"], tuple((count, share) for count, share in kept["rungs"]))

    def train(self, candidate: Candidate, number: int, share: float, plan: Plan, left_out: Sequence[str]) -> None:
        """Train a candidate in a round and keep how well it does, unless that is known."""
        row = self._table["rows"][candidate.name]
        if row.get("rung", -1) >= number:
            return
        if candidate.steps is None and "outcome" in row:  # it trains in one pass, and would learn the same
            row["rung"] = number
            return
        setting, label = self._setting, f"round {number + 1} of {len(plan.rungs)}: {candidate.name}"
        length = trainer_length(candidate, len(setting.train), share * plan.effort)
        folder = setting.folder / f"{self._candidates.index(candidate)}_{number}"
        begin = time.monotonic()
        try:
            seed_everything(setting.seed, workers=True, verbose=False)
            model = candidate.build()
            train(
                model,
                self._data(candidate),
                length,
                folder,
                accelerator=setting.accelerator,
                show=lambda text, left: self._progress.step(f"{label}, {text}", left),
            )
            outcomes = evaluate(
                model,
                setting.trials,
                scores=candidate.scores,
                left_out=left_out,
                batch_size=candidate.batch_size,
                accelerator=setting.accelerator,
                show=lambda text: self._progress.step(f"{label}, {text}"),
            )
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            best = _best_way(outcomes)
            row |= {"rung": number, "epochs": length["max_epochs"], "outcome": as_plain(best)}
            row["other_scores"] = {str(other.score): other.quality for other in outcomes if other is not best}
            row["trained_seconds"] = time.monotonic() - begin
            (folder / "training.ckpt").unlink(missing_ok=True)
            self._progress.line(
                f"      {label}: image AUROC {best.image_auroc:.3f}, pixel AP {best.pixel_ap:.3f} of synthetic defects"
            )
        self._save()

    def ranked(self, alive: Sequence[Candidate]) -> list[Candidate]:
        """Candidates, the best one first."""
        return sorted(alive, key=lambda candidate: -self._quality(candidate))

    def _outcome(self, candidate: Candidate) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self._table["rows"][candidate.name].get("outcome", {}))

    def _quality(self, candidate: Candidate) -> float:
        return cast("float", self._outcome(candidate).get("quality", 0.0))

    def decide(self, alive: Sequence[Candidate]) -> None:
        """Choose among the last candidates."""
        ranked, rows = self.ranked(alive), self._table["rows"]
        best = ranked[0]
        tied = [
            candidate
            for candidate in ranked
            if candidate is best or is_tie(self._outcome(best)["by_source"], self._outcome(candidate)["by_source"])
        ]
        chosen = min(tied, key=lambda candidate: (rows[candidate.name]["gflop"], ranked.index(candidate)))
        if len(self._candidates) == 1:
            why = "the only candidate"
        elif not self._outcome(best):
            why = "recommended; there was no time to compare others"
        elif chosen is not best:
            why = f"level with {best.name} within the spread over images, and cheaper"
        elif len(tied) > 1:
            why = f"level with {tied[1].name} within the spread over images, and no more expensive"
        else:
            why = "best on synthetic defects in held-out images"
        self._table |= {"chosen": chosen.name, "score": self._outcome(chosen).get("score"), "why": why}
        self._save()
