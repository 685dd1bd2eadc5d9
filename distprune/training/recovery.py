"""Between rounds of iterative pruning: rounds that cost too much are rolled back, weights are rewound."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from accelerate.utils import broadcast_object_list

from distprune.config.schema import Guard
from distprune.pruning import Attempt
from distprune.tracking.logs import logger
from distprune.training.evaluation import EvalResult
from distprune.training.phases import Rounds
from distprune.training.run_state import ACCEPTED, REWIND, RunState


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt at a round.

    Attributes:
        round: its number, from 1.
        sparsity: that it pruned to.
        top1: accuracy in percent at its end, on the set of the guard.
        drop: what that is less than before pruning, in percentage points.
        accepted: whether the guard let it pass.
    """

    round: int
    sparsity: float
    top1: float
    drop: float
    accepted: bool


class Recovery:
    """Judges rounds and takes the run back, from checkpoints that are kept for that. Every method runs on all ranks.

    Args:
        rounds: of the run; None where there are none, and nothing is to be done.
        guard: what rounds must keep; None lets all pass.
        run_state: reads checkpoints.
    """

    def __init__(self, rounds: Rounds | None, guard: Guard | None, run_state: RunState) -> None:
        self._rounds = rounds
        self._guard = guard
        self._run_state = run_state
        self.outcomes: list[Outcome] = []

    def state(self) -> list[dict[str, Any]]:
        """JSON values for `resume`."""
        return [asdict(outcome) for outcome in self.outcomes]

    def resume(self, state: list[dict[str, Any]]) -> None:
        """Go on from what `state` gave."""
        for values in state:
            self._note(Outcome(**values))

    def mark(self, step: int) -> str | None:
        """The mark by which a checkpoint is kept that is written after `step` steps, if a later round may need it."""
        rounds = self._rounds
        if rounds is not None and rounds.rewinds_weights and step == rounds.rewind_to:
            return REWIND
        if rounds is None or self._guard is None:
            return None
        attempts, judged = rounds.schedule.attempts, len(self.outcomes)
        if not judged:
            return ACCEPTED if step == attempts[0].begin else None
        return ACCEPTED if self.outcomes[-1].accepted and step == attempts[judged - 1].end else None

    def judge(self, attempt: Attempt, sparsity: float, dense: EvalResult, now: EvalResult) -> dict[str, float]:
        """Accept or refuse an attempt that is done; figures for trackers.

        The counts come from all ranks; rank 0 decides, so that all do the same whatever their arithmetic.

        Args:
            attempt: that is done.
            sparsity: of the model, counted.
            dense, now: evaluations before pruning and at the end of the attempt.
        """
        before, after = (self._counted(result) for result in (dense, now))
        drop, within = 100 * (before.correct - after.correct) / before.samples, True
        if self._guard is not None:
            (within,) = broadcast_object_list([self._keeps(before, after)])
        outcome = Outcome(attempt.round, sparsity, after.top1, drop, within)
        self._note(outcome)
        self._tell(outcome)
        figures = {"prune/round": float(outcome.round)}
        return figures if self._guard is None else figures | {"guard/drop": drop, "guard/accepted": float(within)}

    @property
    def is_unguarded(self) -> bool:
        """Whether what a round prunes stays pruned."""
        return self._guard is None

    def ends_at(self, step: int) -> Attempt | None:
        """The attempt that ends after `step` steps and is still to be judged."""
        to_come = () if self._rounds is None else self._rounds.schedule.attempts[len(self.outcomes) :]
        return to_come[0] if to_come and to_come[0].end == step else None

    def begin(self, attempt: Attempt) -> None:
        """Before a round prunes: if the one before it was refused, take the run back to where that began."""
        if attempt.again:
            self._run_state.roll_back(ACCEPTED)

    def rewind(self) -> None:
        """Once a round has pruned: take weights back to where it is to train from."""
        if self._rounds is not None and self._rounds.rewinds_weights:
            self._run_state.rewind(REWIND)

    def roll_back_last(self) -> bool:
        """At the end: if the last round was refused, take the run back to where that began; whether it was."""
        if refused := bool(self.outcomes) and not self.outcomes[-1].accepted:
            self._run_state.roll_back(ACCEPTED)
            if not any(outcome.accepted for outcome in self.outcomes):
                logger.warning("no round was within prune.guard: the model is dense")
        return refused

    def summary(self) -> dict[str, Any]:
        """What the summary of the run says of it."""
        if self._rounds is None:
            return {}
        guard = {} if self._guard is None else {"prune/guard": self._guard.model_dump()}
        return {"prune/rounds": self.state(), **guard}

    def _note(self, outcome: Outcome) -> None:
        assert self._rounds is not None
        self.outcomes.append(outcome)
        self._rounds.schedule.judge(outcome.accepted)

    def _counted(self, result: EvalResult) -> EvalResult:
        name = None if self._guard is None else self._guard.set
        return result if name is None else result.sets[name]

    def _keeps(self, before: EvalResult, after: EvalResult) -> bool:
        assert self._guard is not None
        # As it is written in decimals: of 5000 samples 1.14 points are 57, which its nearest float is just below.
        return 100 * (before.correct - after.correct) <= Fraction(str(self._guard.max_drop)) * before.samples

    def _tell(self, outcome: Outcome) -> None:
        assert self._rounds is not None
        what = f"round {outcome.round}, sparsity {outcome.sparsity:.4f}: {outcome.top1:.2f} %"
        if self._guard is None:
            logger.info(what)
            return
        what += f", {outcome.drop:.2f} points below the dense model (prune.guard allows {self._guard.max_drop:g})"
        if outcome.accepted:
            logger.info(f"{what}: accepted")
            return
        to_come = self._rounds.schedule.attempts[len(self.outcomes) :]
        then = f"tried again at {to_come[0].sparsity:.4f}" if to_come else "a smaller step would be below min_step"
        logger.warning(f"{what}: rolled back; {then}")
