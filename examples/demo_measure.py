"""Plain torch against the package on one distillation step: loss, time, and peak memory.

``measure`` starts fresh processes of this file: one per cell for memory, because a process that ran
anything before has a larger footprint already, and one for the times, because cells that take turns in
one process meet the same weather on the machine.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_progress import progress
from torch import Tensor

import kd_kernels as kd

OBJECTIVES = ("forward KL", "Jensen-Shannon(0.5)")
WAYS = ("plain torch", "kd.distill")
ROUNDS = 2


def plain_forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student), as most training scripts write it."""
    log_q = F.log_softmax(student_logits, dim=-1)
    log_p = F.log_softmax(teacher_logits, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def plain_jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """The generalised Jensen-Shannon divergence, as distillation trainers write it."""
    log_q = F.log_softmax(student_logits, dim=-1)
    log_p = F.log_softmax(teacher_logits, dim=-1)
    weight = torch.tensor(beta)
    log_m = torch.logsumexp(torch.stack([log_q + torch.log1p(-weight), log_p + torch.log(weight)]), dim=0)
    to_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    to_student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return weight * to_teacher + (1 - weight) * to_student


def step(way: str, objective: str, inputs: dict[str, Tensor]) -> float:
    """One step: the loss, and the gradients of the student's hidden states and head."""
    student = [inputs[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias")]
    teacher = [inputs[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias")]
    for tensor in student:
        tensor.grad = None
    if way == "plain torch":
        with torch.no_grad():
            teacher_logits = F.linear(*teacher)
        plain = plain_forward_kl if objective == "forward KL" else plain_jensen_shannon
        loss = plain(F.linear(*student), teacher_logits)
    else:
        chosen = kd.ForwardKL() if objective == "forward KL" else kd.JensenShannon(0.5)
        loss = kd.distill(kd.Head(*student), kd.Head(*teacher), chosen)
    loss.backward()
    return loss.item()


def resident_bytes(field: str) -> int:
    """This process's memory: ``VmRSS`` now, ``VmHWM`` at its highest."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # no such file: not Linux
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Start the highest mark anew at the present footprint (Linux; elsewhere the mark stands)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def memory_of(way: str, objective: str, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Peak memory of one step above what the process held before it, and the loss."""
    # A step on a few tokens loads libraries and starts threads, which are not the step's own.
    few = {name: tensor[:8] if name.endswith("hidden") else tensor for name, tensor in inputs.items()}
    step(way, objective, few)
    for tensor in few.values():
        tensor.grad = None
    kd.release_workspace()  # what the package keeps for its next call belongs to the step as well
    forget_peak()
    before = resident_bytes("VmRSS")
    loss = step(way, objective, inputs)
    return {"loss": loss, "peak_bytes": resident_bytes("VmHWM") - before}


def times_of(inputs: dict[str, Tensor]) -> dict[str, list[float]]:
    """Seconds of each step; the cells take turns, and the first round is thrown away."""
    seconds: dict[str, list[float]] = {f"{way}|{objective}": [] for objective in OBJECTIVES for way in WAYS}
    for turn in progress(range(ROUNDS + 1), desc="measuring time", unit="round"):
        for cell, found in seconds.items():
            start = time.perf_counter()
            step(*cell.split("|"), inputs)
            if turn:
                found.append(time.perf_counter() - start)
    return seconds


def in_fresh_process(*arguments: str) -> dict:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(inputs: dict[str, Tensor], folder: Path) -> list[dict]:
    """One row per objective and way: loss, median seconds and their range, peak bytes."""
    file = folder / "inputs.pt"
    torch.save(inputs, file)
    cells = [(objective, way) for objective in OBJECTIVES for way in WAYS]
    rows = []
    for objective, way in progress(cells, desc="measuring memory", unit="cell"):
        rows.append({"objective": objective, "way": way, **in_fresh_process(str(file), way, objective)})
    seconds = in_fresh_process(str(file))
    file.unlink()
    for row in rows:
        found = seconds[f"{row['way']}|{row['objective']}"]
        row |= {"seconds": statistics.median(found), "fastest": min(found), "slowest": max(found)}
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text, plain torch first, each with what it comes to against plain torch."""
    lines = [f"{'objective':20s} {'':12s} {'loss':>12s} {'step':>9s} {'range':>15s} {'peak memory':>13s}"]
    for row in rows:
        if row["way"] == WAYS[0]:
            plain = row
        spread = f"{row['fastest'] * 1e3:.0f}-{row['slowest'] * 1e3:.0f} ms"
        text = (
            f"{row['objective'] if row is plain else '':20s} {row['way']:12s} {row['loss']:12.7f} "
            f"{row['seconds'] * 1e3:6.0f} ms {spread:>15s} {row['peak_bytes'] / 2**20:9.0f} MiB"
        )
        lines.append(text)
        if row is not plain:
            apart = abs(row["loss"] - plain["loss"]) / abs(plain["loss"])
            faster = plain["seconds"] / row["seconds"]
            smaller = plain["peak_bytes"] / max(row["peak_bytes"], 1)
            relation = f"{apart:.0e} apart"
            speed = f"{faster:.1f}x faster" if faster >= 1 else f"{1 / faster:.1f}x slower"
            memory = f"{smaller:.1f}x less" if smaller >= 1 else f"{1 / smaller:.1f}x more"
            lines.append(f"{'':33s} {relation:>12s} {speed:>25s} {memory:>13s}")
    return "\n".join(lines)


if __name__ == "__main__":
    loaded = torch.load(sys.argv[1])
    print(json.dumps(memory_of(*sys.argv[2:], loaded) if len(sys.argv) > 2 else times_of(loaded)))
