"""Train a small teacher on real text, distil a smaller student from it, and measure what that costs.

    python examples/demo.py [--out DIR] [--minutes-budget M]

The text is Python's own: the standard library's source and the language reference's topics, found
beside the running interpreter. Nothing is downloaded. Everything written goes to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from demo_corpus import Corpus, load_corpus
from demo_measure import measure, table
from demo_progress import progress
from tiny_lm import TinyLM
from torch import Tensor

import kd_kernels as kd
from kd_kernels import native

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

VOCAB = 16_384  # large enough for [tokens, vocab] to be what a step's memory goes to
LENGTH, BATCH = 128, 8
WARMUP = 10  # steps
HELD_OUT_WINDOWS = 64
TABLE_TOKENS = 4096
TABLE_SECONDS = 40  # what the table takes, about
TEACHER_SHARE = 0.6  # of the time for training
TEACHER, LABELS, DISTILLED = "teacher", "student on labels", "student distilled"
Curve = list[tuple[int, float]]
LossOf = Callable[[TinyLM, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """How long each model trains, at which peak learning rate, and what the student minimises."""

    teacher_steps: int = 180
    student_steps: int = 80
    teacher_rate: float = 3e-3
    student_rate: float = 8e-3  # of those tried, the best for labels alone
    hard_weight: float = 0.1
    soft_weight: float = 0.9


def new_model(corpus: Corpus, dim: int, layers: int, heads: int, seed: int) -> TinyLM:
    torch.manual_seed(seed)
    model = TinyLM(corpus.vocab, dim, layers, heads, LENGTH)
    model.start_from_frequencies(torch.bincount(corpus.train, minlength=corpus.vocab))
    return model


def new_teacher(corpus: Corpus) -> TinyLM:
    return new_model(corpus, dim=256, layers=4, heads=4, seed=0)


def new_student(corpus: Corpus) -> TinyLM:
    return new_model(corpus, dim=128, layers=2, heads=2, seed=1)


@torch.no_grad()
def held_out_loss(model: TinyLM, corpus: Corpus) -> float:
    """Mean cross-entropy in nats per token, always on the same windows of unseen documents."""
    tokens, targets = corpus.held_out_windows(HELD_OUT_WINDOWS, LENGTH)
    total = 0.0
    for some, following in zip(tokens.split(BATCH), targets.split(BATCH)):
        logits = model.head(model(some)).flatten(0, 1)
        total += F.cross_entropy(logits, following.flatten(), reduction="sum").item()
    return total / targets.numel()


def train(
    models: dict[str, tuple[TinyLM, LossOf]], corpus: Corpus, steps: int, rate: float, seconds: float
) -> dict[str, Curve]:
    """Train ``models`` side by side, each on its own loss of the same batches; returns a curve for each.

    Ends after ``steps`` or, on a slow machine, when ``seconds`` are over. The learning rate follows
    whichever is further along, so that it has always come down by the end.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(1)
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        for name, (model, _) in models.items()
    }
    curves: dict[str, Curve] = {
        name: [(0, held_out_loss(model, corpus))] for name, (model, _) in models.items()
    }
    bar = progress(range(1, steps + 1), desc=" & ".join(models), unit="step")
    for step in bar:
        done = min(max(step / steps, (time.perf_counter() - began) / seconds), 1.0)
        tokens, targets = corpus.train_batch(generator, BATCH, LENGTH)
        for name, (model, loss_of) in models.items():
            for group in optimizers[name].param_groups:
                group["lr"] = rate * min(step / WARMUP, 1.0, 1.02 - (done - 0.3) / 0.7)
            optimizers[name].zero_grad()
            loss_of(model, tokens, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
        if step % (steps // 8) == 0 or done >= 1:
            for name, (model, _) in models.items():
                curves[name].append((step, held_out_loss(model, corpus)))
            bar.set_postfix_str(
                "loss " + ", ".join(f"{c[-1][1]:.2f}" for c in curves.values()), refresh=False
            )
        if done >= 1:
            break
    bar.close()
    if step < steps:
        print(f"stopped after {step} of {steps} steps: time was up (--minutes-budget gives more)", flush=True)
    return curves


def label_loss(model: TinyLM, tokens: Tensor, targets: Tensor) -> Tensor:
    """Plain next-token cross-entropy."""
    return F.cross_entropy(model.head(model(tokens)).flatten(0, 1), targets.flatten())


def distillation_loss(teacher: TinyLM, plan: Plan) -> LossOf:
    """The labels, and beside them the teacher's opinion of every token in the vocabulary."""

    def loss_of(student: TinyLM, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_hidden = teacher(tokens)
        return kd.distill(
            student=kd.Head(student(tokens), student.head.weight, student.head.bias),
            teacher=kd.Head(teacher_hidden, teacher.head.weight, teacher.head.bias),
            objective=kd.ForwardKL(),
            labels=targets,
            hard_weight=plan.hard_weight,
            soft_weight=plan.soft_weight,
        )

    return loss_of


def draw(curves: dict[str, Curve], file: Path) -> None:
    """The student's held-out loss with and without distillation, and the teacher's last."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    for name, colour in ((LABELS, "tab:orange"), (DISTILLED, "tab:blue")):
        steps, losses = zip(*curves[name])
        axes.plot(steps, losses, marker="o", color=colour, label=f"{name}: {losses[-1]:.3f}")
    teacher = curves[TEACHER][-1][1]
    axes.axhline(teacher, color="tab:gray", linestyle="--", label=f"the trained teacher: {teacher:.3f}")
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("One student; same start, batches and steps, with and without a teacher")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@torch.no_grad()
def table_inputs(student: TinyLM, teacher: TinyLM, corpus: Corpus) -> dict[str, Tensor]:
    """Hidden states of unseen text and the heads of the trained models."""
    tokens, _ = corpus.held_out_windows(TABLE_TOKENS // LENGTH, LENGTH)
    inputs = {}
    for name, model in (("student", student), ("teacher", teacher)):
        inputs[f"{name}_hidden"] = model(tokens).flatten(0, 1).clone()
        inputs[f"{name}_weight"] = model.head.weight.detach().clone()
        inputs[f"{name}_bias"] = model.head.bias.detach().clone()
    return inputs


def summary(result: dict) -> str:
    """What was measured, in words: held-out losses, whether distilling won, and the table."""
    setting = result["table"]
    teacher, with_labels, distilled = (result["curves"][name] for name in (TEACHER, LABELS, DISTILLED))
    steps = distilled[-1][0]
    losses = {
        f"teacher, 256 wide, 4 layers, {teacher[-1][0]} steps": teacher[-1][1],
        "student, 128 wide, 2 layers, untrained": distilled[0][1],
        f"the same after {steps} steps on labels only": with_labels[-1][1],
        f"the same after {steps} steps distilled": distilled[-1][1],
    }
    tokens = HELD_OUT_WINDOWS * LENGTH
    lines = [f"Held-out loss in nats per token, {tokens:,} tokens of documents that no model trained on:"]
    lines += [f"  {name:45s} {loss:.3f}" for name, loss in losses.items()]
    gain = with_labels[-1][1] - distilled[-1][1]
    if gain > 0:
        lines.append(f"Distilling beat labels alone by {gain:.3f} nats per token after the same steps.")
    else:
        lines.append(f"Distilling did NOT beat labels alone in this run: it ended {-gain:.3f} nats behind.")
    lines += [
        "",
        "One step of the loss, forward and backward to the student's hidden states and head:",
        f"{setting['tokens']:,} tokens x {setting['vocab']:,} vocabulary, float32. Times are medians. "
        "Peak memory is the most that",
        "a fresh process held during the step, beyond what it held before.",
        "",
        table(setting["rows"]),
    ]
    return "\n".join(lines)


def run(out: Path, minutes: float) -> dict:
    """Everything the demo does, in order; returns all that was measured."""
    began = time.perf_counter()
    laps: dict[str, float] = {}

    def lap(name: str) -> None:
        laps[name] = round(time.perf_counter() - began - sum(laps.values()), 1)

    corpus = load_corpus(VOCAB, out)
    print(
        f"text: {corpus.documents} documents, {corpus.megabytes:.1f} MB; {corpus.train.numel():,} tokens to "
        f"train on, {corpus.held_out.numel():,} held out; vocabulary {corpus.vocab:,}",
        flush=True,
    )
    lap("text")
    plan = Plan()
    seconds = max(minutes * 60 - laps["text"] - TABLE_SECONDS, 20.0)  # for training
    teacher = new_teacher(corpus)
    models = {TEACHER: (teacher, label_loss)}
    curves = train(models, corpus, plan.teacher_steps, plan.teacher_rate, TEACHER_SHARE * seconds)
    lap("teacher")
    # A teacher that had to stop early has less to teach: the students then train for less, too.
    student_steps = max(plan.student_steps * curves[TEACHER][-1][0] // plan.teacher_steps, 8)
    student = new_student(corpus)
    models = {
        LABELS: (new_student(corpus), label_loss),
        DISTILLED: (student, distillation_loss(teacher, plan)),
    }
    curves |= train(models, corpus, student_steps, plan.student_rate, (1 - TEACHER_SHARE) * seconds)
    lap("students")
    draw(curves, out / "validation.png")
    rows = measure(table_inputs(student, teacher, corpus), out)
    lap("table")
    return {
        "plan": asdict(plan),
        "curves": curves,
        "table": {"tokens": TABLE_TOKENS, "vocab": corpus.vocab, "rows": rows},
        "seconds": laps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for what is written")
    parser.add_argument(
        "--minutes-budget", type=float, default=2.2, help="train less where this would not be enough"
    )
    options = parser.parse_args()
    if native.why_not():
        # The reference that then serves is there to be right: it is slow and holds whole logits.
        raise SystemExit(f"nothing to show without the compiled kernels: {native.why_not()}")
    options.out.mkdir(parents=True, exist_ok=True)
    environment = (
        f"{processor_name()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, kd_kernels {kd.__version__}"
    )
    print(environment, flush=True)
    result = run(options.out, options.minutes_budget)
    result["environment"] = environment
    numbers = options.out / "results.json"
    numbers.write_text(json.dumps(result, indent=1))
    spent = result["seconds"]
    print(f"\n{environment}\n\n{summary(result)}\n")
    print(
        f"{sum(spent.values()):.0f} s in all: " + "; ".join(f"{name} {s:.0f} s" for name, s in spent.items())
    )
    print(f"curves:  {options.out / 'validation.png'}\nnumbers: {numbers}")


if __name__ == "__main__":
    main()
