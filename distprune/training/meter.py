"""Means of what is logged, kept on the device until somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass
class Meter:
    """Means of scalars over samples and ranks, kept on the device until somebody asks."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    grad_norm: Tensor | float = 0.0

    def add(self, figures: dict[str, Tensor], samples: int) -> None:
        """Count the batch means of `samples` samples."""
        for name, value in figures.items():
            # Exact in float64, so that it does not matter where a run was stopped in between.
            total = value.double() * samples
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.samples += samples

    def total(self, accelerator: Accelerator) -> dict[str, float]:
        """The sums over all ranks, and samples. One collective and one wait for the device."""
        if not self.sums:
            return {}
        local = torch.stack([*self.sums.values(), next(iter(self.sums.values())).new_tensor(self.samples)])
        return dict(zip([*self.sums, "samples"], accelerator.reduce(local, "sum").tolist(), strict=True))

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks since the last call."""
        sums = self.total(accelerator)
        samples = sums.pop("samples")
        self.sums, self.samples = {}, 0
        return {name: total / samples for name, total in sums.items()}

    def restore(self, total: dict[str, float], accelerator: Accelerator) -> None:
        """Go on from the sums that `total` gave, on whatever number of ranks."""
        mine = total if accelerator.is_main_process else dict.fromkeys(total, 0.0)
        self.sums = {
            n: torch.tensor(v, dtype=torch.float64, device=accelerator.device)
            for n, v in mine.items()
            if n != "samples"
        }
        self.samples = round(mine.get("samples", 0))
