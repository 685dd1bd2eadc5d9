"""How long forms of a model take: in alternation, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from distprune.data import Inputs
from distprune.training.logits import count_samples

MIN_ROUNDS = 9
SLICE_S = 0.03
"""A form runs for so long before the next has its turn."""
PAUSE_S = 0.02
"""Before a form's turn, which then begins with a run that is not timed: the threads of one runtime spin for a while
when they are done, and take the time of another's."""
CLEAR = 1.03
"""A ratio of times counts as a difference from here on, if nine of ten rounds show one."""


@dataclass(frozen=True)
class Form:
    """A model in one form.

    Attributes:
        name: of the form.
        device: on which it runs.
        run: computes its outputs.
        peer: the name of the dense model's form that is run the same way, if that is not the first.
    """

    name: str
    device: torch.device
    run: Callable[[Inputs], object]
    peer: str | None = None


@dataclass(frozen=True)
class Timing:
    """How long a form takes for one batch.

    Attributes:
        form: its name.
        device: cpu or cuda.
        threads: that compute on a CPU.
        batch: samples.
        median_ms: of all rounds.
        low_ms, high_ms: the tenth and the ninetieth percentile.
        samples_per_s: at the median.
        speedup: how many times as fast as the first form, the median over rounds of the ratio within a round.
        speedup_low, speedup_high: its tenth and ninetieth percentile.
        gain, gain_low, gain_high: the same against its peer, what pruning brings without what the way to run it
            brings; None where it has none.
        peak_bytes: of memory that one run takes beside weights and inputs; None where that is not known.
    """

    form: str
    device: str
    threads: int
    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    samples_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    peak_bytes: int | None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None

    @property
    def verdict(self) -> int:
        """1 where it is faster than the first form, -1 where it is slower, 0 where that cannot be told."""
        if self.speedup > 1:
            return int(self.speedup_low > 1 and self.speedup > CLEAR)
        return -int(self.speedup_high < 1 and self.speedup < 1 / CLEAR)


def measure(
    forms: Sequence[Form], inputs: Inputs, seconds: float, after_round: Callable[[], None] = lambda: None
) -> list[Timing]:
    """Time forms of one model on the same inputs, in rounds; in each every form has its turn, in alternating order.

    Args:
        forms: on one device; the first is what the others are compared with.
        inputs: one batch, on that device.
        seconds: for each form, at least, and for `MIN_ROUNDS`.
        after_round: called after each.
    """
    batch = count_samples(inputs)
    peaks = [peak_memory(form, inputs) for form in forms]
    repeats = [_repeats(form, inputs) for form in forms]
    times: list[list[float]] = [[] for _ in forms]
    began = time.perf_counter()
    while len(times[0]) < MIN_ROUNDS or time.perf_counter() - began < seconds * len(forms):
        order = range(len(forms)) if len(times[0]) % 2 == 0 else reversed(range(len(forms)))
        for place in order:
            time.sleep(PAUSE_S)
            forms[place].run(inputs)
            times[place].append(_time(forms[place], inputs, repeats[place]))
        after_round()
    timings = []
    for form, own, peak in zip(forms, times, peaks, strict=True):
        low, median, high = _percentiles(own)
        ms = (1e3 * median, 1e3 * low, 1e3 * high)
        peers = [theirs for other, theirs in zip(forms, times, strict=True) if other.name == form.peer]
        gain = _speedup(peers[0], own) if peers else ()
        where = (form.name, form.device.type, torch.get_num_threads(), batch)
        timings.append(Timing(*where, *ms, batch / median, *_speedup(times[0], own), peak, *gain))
    return timings


def of_model(
    name: str, model: nn.Module, device: torch.device, compiled: bool = False, peer: str | None = None
) -> Form:
    """The form of a bare model on a device, in evaluation mode and without gradients; compiled for each batch size."""
    model.eval()
    called = torch.compile(model, dynamic=False) if compiled else model

    def run(inputs: Inputs) -> object:
        with torch.inference_mode():
            return called(inputs) if isinstance(inputs, Tensor) else called(**inputs)

    return Form(name, device, run, peer)


def peak_memory(form: Form, inputs: Inputs) -> int | None:
    """Bytes that one run takes at most beside what is there before it, as torch's allocators count them; None where
    they know nothing of it."""
    form.run(inputs)
    if form.device.type == "cuda":
        before = torch.cuda.memory_allocated(form.device)
        torch.cuda.reset_peak_memory_stats(form.device)
        form.run(inputs)
        torch.cuda.synchronize(form.device)
        return torch.cuda.max_memory_allocated(form.device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains of GPUs that are not there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        form.run(inputs)
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak or None


def _repeats(form: Form, inputs: Inputs) -> int:
    """How often a form runs in its turn; warms up."""
    once = min(_time(form, inputs, 1) for _ in range(3))
    return max(1, round(SLICE_S / once))


def _time(form: Form, inputs: Inputs, repeats: int) -> float:
    """Seconds of one run, the mean of some in a row."""
    _wait(form.device)
    began = time.perf_counter()
    for _ in range(repeats):
        form.run(inputs)
    _wait(form.device)
    return (time.perf_counter() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speedup(base: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """The median of the ratios of times within a round, and their tenth and ninetieth percentile."""
    low, median, high = _percentiles([theirs / mine for theirs, mine in zip(base, own, strict=True)])
    return median, low, high


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The tenth, the median and the ninetieth."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[-1]
