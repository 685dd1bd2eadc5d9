"""Results of evaluations, kept one by one as they come, by whatever rank, and found again by the next start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distprune.errors import ConfigError
from distprune.training.evaluation import EvalResult
from distprune.training.folder import Folder

RESULTS = "sensitivity-rank-*.jsonl"


@dataclass(frozen=True)
class Trial:
    """One layer, pruned alone to a sparsity; None is the dense model."""

    layer: str | None = None
    sparsity: float = 0.0


class SensitivityFolder(Folder):
    """A folder that holds the results of `distprune sensitivity` for one model on one set of images."""

    key = "--out"

    @property
    def settings(self) -> Path:
        """What the results depend on."""
        return self.path / "settings.json"

    @property
    def stop_file(self) -> Path:
        """Whoever makes this file asks all ranks to stop."""
        return self.path / "stop"

    @property
    def figures(self) -> Path:
        """All that was measured."""
        return self.path / "sensitivity.json"

    def allocation(self, sparsity: float) -> Path:
        """The sparsity of each layer, for that of the model. One file for each: a run may still go on with another."""
        return self.path / f"allocation-{sparsity:g}.yaml"

    @property
    def heat_map(self) -> Path:
        """The picture."""
        return self.path / "sensitivity.png"

    def begin(self, settings: Mapping[str, Any]) -> dict[Trial, EvalResult]:
        """Make the folder ready for results under `settings`, and read those that are there.

        Call it on one rank, which has claimed the folder, before any rank calls `add`.

        Raises:
            ConfigError: the results that are there were made under other settings; lists them.
        """
        # As they will be read again.
        now = json.loads(json.dumps(settings, default=str))
        if any(self.path.glob(RESULTS)):
            before = self._read_json(self.settings.name) or {}
            faults = [
                f"{key}: was {before.get(key)!r} when the results in {self.path} were begun, now {now.get(key)!r}; go "
                f"on with the same, or choose another {self.key}"
                for key in before | now
                if before.get(key) != now.get(key)
            ]
            if faults:
                raise ConfigError(*faults)
        self.write_json(self.settings.name, now)
        self.stop_file.unlink(missing_ok=True)
        return self.results(mend=True)

    def results(self, mend: bool = False) -> dict[Trial, EvalResult]:
        """What all ranks have found.

        Args:
            mend: whether to drop a last line that is not whole, so that others may follow; while no rank writes.
        """
        found: dict[Trial, EvalResult] = {}
        for path in sorted(self.path.glob(RESULTS)):
            text = path.read_text(encoding="utf-8", errors="replace")
            whole = text[: text.rfind("\n") + 1]
            for line in whole.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # damaged on the disk, and made again
                    row = json.loads(line)
                    top1, loss, samples = float(row["top1"]), float(row["loss"]), int(row["samples"])
                    found[Trial(row["layer"], float(row["sparsity"]))] = EvalResult(top1, loss, samples)
            if mend and whole != text:
                self.write_text(path.name, whole)
        return found

    def add(self, rank: int, trial: Trial, result: EvalResult) -> None:
        """Append a result to the file of this rank."""
        line = json.dumps(asdict(trial) | asdict(result)) + "\n"
        with (self.path / RESULTS.replace("*", f"{rank:05d}")).open("a", encoding="utf-8") as file:
            file.write(line)
