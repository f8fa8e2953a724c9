"""When iterations end: at once on a CPU, on a GPU when the answer to a look has come; nobody waits for it."""

from types import SimpleNamespace

import pytest
import torch
from transport import Problems

import kd_kernels as kd
from kd_kernels.convergence import Convergence
from kd_kernels.drivers import sinkhorn_shared
from kd_kernels.reference import sinkhorn as reference


class Late:
    """Says so ``steps`` questions after it came true; None: never."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self, done):
        if self.left is None or not bool(done.all()):
            return False
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("shared", [False, True], ids=["own cost", "shared cost"])
@pytest.mark.parametrize("late", [3, None])
def test_late_ends_change_no_bit(late, shared, monkeypatch):
    options = {"epsilon": 0.3, "tolerance": 1e-3, "backend": "reference", "return_plan": True}
    if shared:
        options["domain"] = "scaling"
    made = []

    def run():
        leaves = Problems(3, 9, 7, shared=shared).leaves(torch.float32)
        found = kd.sinkhorn(*leaves, **options)
        assert 1 < found.iterations.max() < 100
        (found.transport_cost.sum() + found.value.sum() + found.plan.square().sum()).backward()
        return *vars(found).values(), *(x.grad for x in leaves)

    def convergence():
        made.append(Late(late))
        return made[-1]

    exact = run()
    for module in (sinkhorn_shared, reference):
        monkeypatch.setattr(module, "Convergence", convergence)
    assert all(torch.equal(x, y) for x, y in zip(exact, run()) if x is not None)
    assert len(made) == 2  # to the tolerance, and the adjoint
    assert late is None or all(x.left < 0 for x in made)


class Device:
    """As much of a GPU as a look needs: answers lie in memory when ``ahead`` more have been asked for."""

    def __init__(self, monkeypatch, ahead=2):
        self.events, self.capturing, empty = [], False, torch.empty

        def event():
            left = iter([*[False] * ahead, True])
            self.events.append(SimpleNamespace(record=lambda stream: None, query=lambda: next(left)))
            return self.events[-1]

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))

    def flags(self, *values):
        device = torch.device("cuda", 0)
        return SimpleNamespace(device=device, all=lambda: torch.tensor(values).all())


def test_an_answer_is_taken_when_it_is_there(monkeypatch):
    device, converged = Device(monkeypatch), Convergence()
    asked = [converged(device.flags(True, step >= 1)) for step in range(8)]
    # Sent at 0, when it was not; that answer comes at 3, the next look goes at 4, its answer comes at 7.
    assert asked == [False] * 7 + [True] and len(device.events) == 2


def test_nothing_is_asked_while_a_graph_is_captured(monkeypatch):
    device, converged = Device(monkeypatch), Convergence()
    device.capturing = True
    assert not any(converged(device.flags(True)) for _ in range(8)) and not device.events


def test_a_cpu_is_asked_at_once():
    assert [Convergence()(torch.tensor(x)) for x in ([True, False], [True, True], [])] == [False, True, True]
