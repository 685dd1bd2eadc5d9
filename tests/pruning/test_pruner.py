import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from distprune.pruning import CubicSchedule, LayerSparsity, MaskMismatchError, Pruner
from tests.pruning.reference import Bag, Levels

OPTIMIZERS = {
    "momentum": lambda p, **kw: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **kw),
    "nesterov": lambda p, **kw: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **kw),
    "amsgrad": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True, **kw),
}
IMPLEMENTATIONS = {
    "plain": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
SCHEDULE = CubicSchedule(initial=0.1, final=0.8, begin=2, end=11, every=3)


def small_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))
    return net.to(memory_format=torch.channels_last)


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 5, 5, generator=generator)
    return F.cross_entropy(net(images), torch.randint(5, (8,), generator=generator))


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss_of(net, step).backward()
    optimizer.step()


def alive_where_pruned(pruner: Pruner, optimizer: torch.optim.Optimizer) -> list[str]:
    """What is not zero at pruned places, by name: weights and optimizer state."""
    found = []
    for tensor in pruner.tensors:
        pruned = ~pruner.masks[tensor.name]
        for kind, value in {"weight": tensor.weight, **optimizer.state.get(tensor.weight, {})}.items():
            if isinstance(value, torch.Tensor) and value.shape == pruned.shape and (value[pruned] != 0).any():
                found.append(f"{kind} of {tensor.name}")
    return found


def zeros_counted(pruner: Pruner) -> int:
    return sum(int((t.weight == 0).sum()) for t in pruner.tensors)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_lives_at_a_pruned_place_after_any_step(optimizer, implementation):
    net = small_net()
    optimizer = OPTIMIZERS[optimizer](net.parameters(), **IMPLEMENTATIONS[implementation])
    pruner = Pruner(net, optimizer, SCHEDULE)
    updated_at = []
    for step in range(1, 16):
        train_step(net, optimizer, step)
        assert alive_where_pruned(pruner, optimizer) == []
        report = pruner.step()
        assert alive_where_pruned(pruner, optimizer) == []
        if report:
            updated_at.append(step)
            assert zeros_counted(pruner) == round(SCHEDULE.sparsity(step) * 576)
    assert updated_at == [2, 5, 8, 11]
    assert zeros_counted(pruner) == round(0.8 * 576)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_lives_at_a_pruned_place_in_other_dtypes(optimizer, dtype):
    net = nn.Linear(30, 10).to(dtype)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    pruner = Pruner(net, optimizer, SCHEDULE)
    for step in range(1, 13):
        optimizer.zero_grad()
        net(torch.randn(4, 30, dtype=dtype)).square().mean().backward()
        optimizer.step()
        pruner.step()
        assert alive_where_pruned(pruner, optimizer) == []
        if SCHEDULE.is_update(step):
            assert pruner.zeros == round(SCHEDULE.sparsity(step) * 300)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_adam_does_not_turn_pruned_weights_into_nan(implementation):
    # Its eps of 1e-8 is 0 in float16, and 0 / 0 is NaN.
    model = Bag([torch.randn(20).half()])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, **IMPLEMENTATIONS[implementation])
    pruner = Pruner(model, optimizer, Levels([0.5]), include=["*"])
    pruner.step()
    model.tensors[0].grad = torch.ones(20).half()
    optimizer.step()
    assert alive_where_pruned(pruner, optimizer) == []


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_optimizer_that_mixes_the_elements_of_a_gradient_does_not_revive():
    net = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.Muon(net.parameters(), lr=0.1)
    pruner = Pruner(net, optimizer, Levels([0.5]))
    pruner.step()
    net.weight.grad = torch.randn(8, 8)
    optimizer.step()
    assert alive_where_pruned(pruner, optimizer) == []


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_gradients_computed_in_a_closure_do_not_revive(optimizer):
    net = small_net()
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    pruner = Pruner(net, optimizer, Levels([0.5]))
    pruner.step()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert alive_where_pruned(pruner, optimizer) == []


def test_gradient_clipping_counts_only_weights_that_are_left():
    net = small_net()
    pruner = Pruner(net, torch.optim.SGD(net.parameters(), lr=0.1), Levels([0.7]), exclude=["last"])
    pruner.step()
    loss_of(net, 0).backward()
    by_name = dict(net.named_parameters())
    left = [p.grad[pruner.masks[n]] if n in pruner.masks else p.grad.flatten() for n, p in by_name.items()]
    norm = torch.cat(left).double().norm().item()
    dense_norm = torch.cat([p.grad.flatten() for p in by_name.values()]).norm().item()
    pruner.mask_gradients()
    assert nn.utils.clip_grad_norm_(net.parameters(), 1.0).item() == pytest.approx(norm, rel=1e-5)
    assert norm < 0.99 * dense_norm


def test_masked_gradients_are_those_of_the_dense_backward_where_weights_are_left():
    net = small_net()
    pruner = Pruner(net, torch.optim.SGD(net.parameters(), lr=0.1), Levels([0.7]))
    pruner.step()
    loss_of(net, 0).backward()
    expected = {t.name: torch.where(pruner.masks[t.name], t.weight.grad, 0.0) for t in pruner.tensors}
    pruner.mask_gradients()
    assert all(torch.equal(t.weight.grad, expected[t.name]) for t in pruner.tensors)


def test_accumulated_gradients_make_one_step_and_revive_nothing():
    net = small_net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    pruner = Pruner(net, optimizer, Levels([0.0, 0.3, 0.6]))
    for step in range(1, 5):
        optimizer.zero_grad()
        for micro in range(3):
            loss_of(net, 10 * step + micro).backward()
            assert pruner.step() is None or pruner.zeros == 0
        optimizer.step()
        assert pruner.steps_done == step
        assert pruner.step().zeros == round(pruner.schedule.sparsity(step) * 576)
        assert alive_where_pruned(pruner, optimizer) == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_step_that_a_gradient_scaler_skips_does_not_count(optimizer, implementation):
    net = small_net()
    optimizer = OPTIMIZERS[optimizer](net.parameters(), **IMPLEMENTATIONS[implementation])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pruner = Pruner(net, optimizer, Levels([0.0, 0.3, 0.6]))

    def amp_step(factor: float):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, 0) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        return pruner.step()

    assert amp_step(1.0).zeros == round(0.3 * 576)
    weights = copy.deepcopy(net.state_dict())
    assert amp_step(float("inf")) is None
    assert all(torch.equal(v, weights[n]) for n, v in net.state_dict().items() if n in pruner.masks)
    assert (pruner.steps_done, pruner.zeros) == (1, round(0.3 * 576))
    assert amp_step(1.0).zeros == round(0.6 * 576)
    assert pruner.steps_done == 2
    assert alive_where_pruned(pruner, optimizer) == []


def test_gradient_scaler_that_unscales_first_counts_alike():
    net = small_net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pruner = Pruner(net, optimizer, Levels([0.3]))
    for factor, done in [(1.0, 1), (float("nan"), 1), (1.0, 2)]:
        optimizer.zero_grad()
        scaler.scale(loss_of(net, 0) * factor).backward()
        scaler.unscale_(optimizer)
        pruner.mask_gradients()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        assert pruner.steps_done == done
    assert alive_where_pruned(pruner, optimizer) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loading_a_dense_optimizer_state_revives_nothing(optimizer):
    net = small_net()
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    train_step(net, optimizer, 0)
    dense_state = copy.deepcopy(optimizer.state_dict())
    pruner = Pruner(net, optimizer, Levels([0.8]))
    pruner.step()
    optimizer.load_state_dict(dense_state)
    assert alive_where_pruned(pruner, optimizer) == []
    for step in range(3):
        train_step(net, optimizer, step)
        assert alive_where_pruned(pruner, optimizer) == []


def test_masks_are_applied_to_weights_loaded_later():
    net = small_net()
    dense = copy.deepcopy(net.state_dict())
    pruner = Pruner(net, torch.optim.SGD(net.parameters(), lr=0.1), Levels([0.8]))
    pruner.step()
    sparse = copy.deepcopy(net.state_dict())
    net.load_state_dict(dense)
    pruner.mask_weights()
    assert all(torch.equal(v, sparse[n]) for n, v in net.state_dict().items())


def test_optimizer_wrapped_as_accelerate_does_is_unwrapped():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step(closure)

    net = small_net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    wrapper = Wrapper(optimizer)
    pruner = Pruner(net, wrapper, Levels([0.0, 0.5]))
    for done in (1, 2, 3):
        optimizer.zero_grad()
        loss_of(net, done).backward()
        wrapper.step()
        assert pruner.steps_done == done
        pruner.step()
        assert alive_where_pruned(pruner, optimizer) == []


class Run:
    """A run that can be stopped, saved and taken up by another."""

    def __init__(self) -> None:
        self.net = small_net()
        self.optimizer = OPTIMIZERS["adamw"](self.net.parameters())
        self.pruner = Pruner(self.net, self.optimizer, SCHEDULE)
        self.parts = {"net": self.net, "optimizer": self.optimizer, "pruner": self.pruner}

    def train(self, start: int, stop: int) -> list:
        reports = []
        for step in range(start, stop):
            train_step(self.net, self.optimizer, step)
            reports.append(self.pruner.step())
        return [(r.step, r.zeros, r.newly_pruned, r.threshold) for r in reports if r]

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, file)
        file.seek(0)
        return file


@pytest.mark.parametrize("order", [("net", "optimizer", "pruner"), ("pruner", "optimizer", "net")])
@pytest.mark.parametrize("stop", [1, 5, 6, 13])
def test_run_taken_up_from_its_state_ends_with_the_same_bits(stop, order):
    whole = Run()
    whole.train(0, stop)
    saved = whole.save()
    expected = whole.train(stop, 15)
    again = Run()
    state = torch.load(saved, weights_only=True)
    for name in order:
        again.parts[name].load_state_dict(state[name])
    assert again.pruner.step() is None
    assert alive_where_pruned(again.pruner, again.optimizer) == []
    assert again.train(stop, 15) == expected
    assert again.pruner.mask_digest == whole.pruner.mask_digest
    assert again.pruner.layers() == whole.pruner.layers()
    assert all(torch.equal(v, again.pruner.masks[n]) for n, v in whole.pruner.masks.items())
    assert all(torch.equal(v, again.net.state_dict()[n]) for n, v in whole.net.state_dict().items())


def wrong_states(right: dict) -> dict[str, tuple[dict, str]]:
    masks = right["masks"]
    return {
        "missing": ({"0.weight": masks["0.weight"]}, r"missing \['4\.weight'\]"),
        "unexpected": ({**masks, "9.weight": masks["0.weight"]}, r"unexpected \['9\.weight'\]"),
        "short": ({**masks, "4.weight": masks["4.weight"][:-1]}, r"mask of 4\.weight is .* \(4, 9\), not .* \(5, 9\)"),
        "long": ({**masks, "4.weight": torch.zeros(5, 10, dtype=torch.uint8)}, r"mask of 4\.weight is .* \(5, 10\)"),
        "not packed": ({**masks, "4.weight": torch.zeros(5, 9, dtype=torch.bool)}, r"4\.weight is torch\.bool"),
    }


@pytest.mark.parametrize("fault", ["missing", "unexpected", "short", "long", "not packed"])
def test_state_of_another_model_is_refused_and_nothing_changes(fault):
    donor = Run()
    donor.train(0, 12)
    masks, message = wrong_states(donor.pruner.state_dict())[fault]
    run = Run()
    run.train(0, 5)
    before, weights = run.pruner.mask_digest, copy.deepcopy(run.net.state_dict())
    with pytest.raises(ValueError, match=message):
        run.pruner.load_state_dict({**donor.pruner.state_dict(), "masks": masks})
    assert (run.pruner.mask_digest, run.pruner.steps_done) == (before, 5)
    assert all(torch.equal(v, weights[n]) for n, v in run.net.state_dict().items())


def test_falling_schedule_is_refused_and_nothing_changes():
    net = small_net()
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    pruner = Pruner(net, optimizer, Levels([0.5, 0.5, 0.4]))
    assert pruner.step().zeros == 288
    optimizer.step()
    assert pruner.step().newly_pruned == 0
    optimizer.step()
    before = pruner.mask_digest
    with pytest.raises(ValueError, match=r"asks for 230 zeros .* at step 2, but 288 weights are pruned already"):
        pruner.step()
    assert (pruner.mask_digest, pruner.zeros, zeros_counted(pruner)) == (before, 288, 288)


@pytest.mark.parametrize(("steps", "due"), [(2, 2), (4, 2), (7, 5), (11, 11), (30, 11)])
def test_calls_left_out_are_made_up_for_by_the_newest_update(steps, due):
    net = small_net()
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    pruner = Pruner(net, optimizer, SCHEDULE)
    for _ in range(steps):
        optimizer.step()
    assert pruner.step().zeros == round(SCHEDULE.sparsity(due) * 576)
    assert pruner.step() is None


def test_begin_0_prunes_before_the_first_optimizer_step():
    net = small_net()
    pruner = Pruner(net, torch.optim.SGD(net.parameters()), CubicSchedule(final=0.5, begin=0, end=0))
    assert pruner.step().zeros == 288
    assert zeros_counted(pruner) == 288


def test_steps_without_an_update_report_nothing_and_change_nothing():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters())
    pruner = Pruner(net, optimizer, CubicSchedule(final=0.9, begin=3, end=5))
    assert pruner.step() is None
    optimizer.step()
    assert pruner.step() is None
    assert (pruner.zeros, pruner.sparsity, zeros_counted(pruner)) == (0, 0.0, 0)


def test_reports_and_layers_agree_with_what_is_counted_in_the_weights():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = Pruner(net, optimizer, Levels([0.25, 0.6]))
    first = pruner.step()
    optimizer.step()
    second = pruner.step()
    assert (first.step, first.target_sparsity, first.zeros, first.newly_pruned) == (0, 0.25, 144, 144)
    assert (second.step, second.zeros, second.newly_pruned, second.weights) == (1, 346, 202, 576)
    assert second.sparsity == pruner.sparsity == 346 / 576
    conv, linear = int((net[0].weight == 0).sum()), int((net[4].weight == 0).sum())
    assert pruner.layers() == {
        "0.weight": LayerSparsity((8, 3, 3, 3), conv, conv / 216),
        "4.weight": LayerSparsity((5, 72), linear, linear / 360),
    }


def test_memory_format_changes_no_mask():
    dense = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        dense[0].weight.mul_(8).round_()
    pruners = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = copy.deepcopy(dense).to(memory_format=memory_format)
        pruners.append(Pruner(net, torch.optim.SGD(net.parameters()), Levels([0.4])))
        pruners[-1].step()
    assert torch.equal(pruners[0].masks["0.weight"], pruners[1].masks["0.weight"])
    assert pruners[0].mask_digest == pruners[1].mask_digest


def test_memory_format_may_change_after_the_pruner_is_made():
    net = nn.Conv2d(4, 4, 3, bias=False)
    pruner = Pruner(net, torch.optim.SGD(net.parameters()), Levels([0.5]))
    expected = net.weight.detach().abs() > net.weight.detach().abs().flatten().sort().values[71]
    net.to(memory_format=torch.channels_last)
    pruner.step()
    assert torch.equal(pruner.masks["weight"], expected)
    assert torch.equal(net.weight != 0, expected)


def test_memory_format_may_change_between_updates():
    nets = [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.SGD(net.parameters()) for net in nets]
    pruners = [Pruner(net, o, Levels([0.3, 0.6])) for net, o in zip(nets, optimizers, strict=True)]
    for step in range(2):
        for net, optimizer, pruner in zip(nets, optimizers, pruners, strict=True):
            pruner.step()
            optimizer.step()
            if step == 0 and net is nets[1]:
                net.to(memory_format=torch.channels_last)
    assert torch.equal(pruners[0].masks["weight"], pruners[1].masks["weight"])
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert pruners[0].mask_digest == pruners[1].mask_digest


def test_digest_is_empty_before_the_first_update():
    net = small_net()
    pruner = Pruner(net, torch.optim.SGD(net.parameters()), Levels([0.5]))
    assert pruner.mask_digest == ""
    pruner.step()
    assert len(pruner.mask_digest) == 16


@pytest.mark.parametrize("act", ["verify", "step"])
def test_a_mask_that_changes_between_updates_is_found_and_named(act):
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters())
    pruner = Pruner(net, optimizer, Levels([0.5, 0.6]))
    pruner.step()
    optimizer.step()
    pruner.verify()
    pruner.masks["4.weight"].view(-1)[-1] ^= True
    with pytest.raises(MaskMismatchError, match=r"masks have changed .* at step 1: rank 0: 4\.weight$"):
        getattr(pruner, act)()


def test_digest_changes_with_one_weight_more():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters())
    pruner = Pruner(net, optimizer, Levels([i / 576 for i in range(20)]))
    digests = set()
    for _ in range(20):
        pruner.step()
        optimizer.step()
        digests.add(pruner.mask_digest)
    assert len(digests) == 20


def test_after_close_masks_are_readable_and_training_is_dense_again():
    net = small_net()
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    pruner = Pruner(net, optimizer, Levels([0.5]))
    pruner.step()
    digest = pruner.mask_digest
    pruner.close()
    pruner.close()
    train_step(net, optimizer, 0)
    assert pruner.steps_done == 0
    assert "weight of 4.weight" in alive_where_pruned(pruner, optimizer)
    assert (pruner.mask_digest, pruner.zeros) == (digest, 288)


def big_net(tensors: int, memory_format: torch.memory_format) -> nn.Module:
    convs = [nn.Conv2d(512, 4340 // tensors, 3, bias=False) for _ in range(tensors)]
    return nn.Sequential(*convs).to(memory_format=memory_format)


def peak_bytes(trace: dict) -> int:
    """The most that the allocator gave out at one time, counted event by event (a process's RSS says less)."""
    events = [e for e in trace["traceEvents"] if e["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: float(e["ts"])):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("tensors", "memory_format", "ties"),
    [
        pytest.param(10, torch.contiguous_format, False, id="ten tensors"),
        pytest.param(10, torch.channels_last, True, id="ten channels_last tensors with ties"),
        pytest.param(1, torch.contiguous_format, True, id="one tensor with ties"),
        pytest.param(1, torch.channels_last, False, id="one channels_last tensor"),
    ],
)
def test_an_update_takes_at_most_one_and_a_half_bytes_per_weight(tensors, memory_format, ties, tmp_path):
    net = big_net(tensors, memory_format)
    optimizer = torch.optim.SGD(net.parameters())
    if ties:
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(500).round_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        pruner = Pruner(net, optimizer, Levels([0.5, 0.8]))
        pruner.step()
        optimizer.step()
        pruner.step()
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    peak = peak_bytes(json.loads((tmp_path / "trace.json").read_text()))
    assert pruner.weights > 19_900_000
    assert pruner.weights <= peak  # the masks themselves were seen
    assert peak / pruner.weights <= 1.5
