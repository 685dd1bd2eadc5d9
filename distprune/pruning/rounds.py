"""Iterative pruning: round by round, some of which may be refused."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, repeat

from distprune.pruning.schedule import CubicSchedule


@dataclass(frozen=True)
class Attempt:
    """One attempt at a round.

    Attributes:
        round: the number of the round, from 1; an attempt after one that was refused is of the same round.
        begin: optimizer step at which it prunes.
        end: the step behind its last.
        sparsity: that it prunes to, a fraction of the prunable weights.
        again: whether the attempt before it was refused, so that it begins from what was there before that.
    """

    round: int
    begin: int
    end: int
    sparsity: float
    again: bool


class RoundsSchedule:
    """In each of some rounds the same share of what is left is pruned at once, and training goes on for `every` steps
    (Han et al. 2015, arXiv:1506.02626; Frankle and Carbin 2019, arXiv:1803.03635). The share is
    1 - (1 - final)^(1 / rounds).

    A round may be refused when it is done: call `judge(False)`, and take weights, optimizer and pruner back to where it
    began. It is tried again with half the step, of which two prune what a whole one does, and so are those that
    follow; once half a step is less than `min_step`, there are no more.

    Args:
        final: sparsity after the last round, a fraction in [0, 1).
        begin: optimizer step at which the first round prunes.
        every: optimizer steps of a round.
        rounds: how many.
        min_step: the smallest step that is tried after a round was refused: the share that it prunes of what is left.

    Raises:
        ValueError: a value lies outside its range; the message names it.
    """

    def __init__(self, final: float, begin: int, every: int, rounds: int, min_step: float = 0.01) -> None:
        CubicSchedule(final, begin, begin, every)  # checks these
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        if not 0.0 < min_step < 1.0:
            raise ValueError(f"min_step must lie in (0, 1), got {min_step}; 0.01 prunes 1 % of what is left")
        self.final = final
        self._begin = begin
        self._every = every
        self._rounds = rounds
        self._min_step = min_step
        self._judge(())

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Those that were judged, and those to come if none of them is refused."""
        return self._attempts

    @property
    def outcomes(self) -> tuple[bool, ...]:
        """Of the attempts that were judged: False of one that was refused."""
        return self._outcomes

    def judge(self, within: bool) -> None:
        """Accept or refuse the attempt that is done; after a refusal the attempts to come are others.

        Raises:
            ValueError: all attempts were judged.
        """
        if len(self._outcomes) == len(self._attempts):
            raise ValueError("all rounds were judged")
        self._judge((*self._outcomes, within))

    def sparsity(self, step: int) -> float:
        """1 - (1 - final)^(r / rounds) in round r, where none was refused."""
        index = bisect_right(self._steps, step)
        return self._levels[index - 1] if index else 0.0

    def is_update(self, step: int) -> bool:
        """Where an attempt begins."""
        return step in self._begins

    def _judge(self, outcomes: Sequence[bool]) -> None:
        self._outcomes = tuple(outcomes)
        attempts = list[Attempt]()
        done, step, again, begin = Fraction(0), Fraction(1, self._rounds), False, self._begin
        number = 1
        for within in chain(outcomes, repeat(True)):
            if done == 1 or (again and self._after(step) < self._min_step):
                break
            attempts.append(Attempt(number, begin, begin + self._every, self._after(done + step), again))
            begin += self._every
            done, number, step = (done + step, number + 1, step) if within else (done, number, step / 2)
            again = not within
        self._attempts = tuple(attempts)
        self._begins = frozenset(attempt.begin for attempt in attempts)
        self._steps, self._levels = [a.begin for a in attempts], [a.sparsity for a in attempts]
        if again:  # the last was refused, and no other follows
            self._steps.append(begin)
            self._levels.append(self._after(done))

    def _after(self, rounds: Fraction) -> float:
        """Sparsity after a part of all rounds; so much of what is left goes in as many at any time."""
        return self.final if rounds == 1 else 1.0 - math.pow(1.0 - self.final, float(rounds))
