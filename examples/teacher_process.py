"""The teacher in another process, served as hidden states through shared memory.

    python examples/teacher_process.py [--tiny]

Hidden states are ``[tokens, width]`` where logits are ``[tokens, vocab]``: a hundredth of the traffic.
The teacher's head travels once. While the student works on a batch, the teacher is at the next one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor
from toy_loops import FULL, TINY, Batch, Record, Size, arguments, batches, compare, models

import kd_kernels as kd

SLOTS = 2  # hidden states under way: one being read, one being written
TIMEOUT = 120.0  # seconds without an answer after which the teacher counts as lost


def serve(connection: Connection, size: Size, seed: int, slots: Tensor, head: Tensor, threads: int) -> None:
    """The teacher's process: writes each requested batch's hidden states into its slot.

    Requests are ``(slot, input_ids, attention_mask)``, None to end; answers None, or what went wrong.
    """
    try:
        torch.set_num_threads(threads)
        _, teacher = models(size, seed)  # in earnest: from_pretrained
        head.copy_(teacher.get_output_embeddings().weight.detach())
        connection.send(None)
        while (request := connection.recv()) is not None:
            slot, ids, mask = request
            ids, mask = torch.tensor(ids), torch.tensor(mask)
            with torch.inference_mode():
                hidden = teacher.model(ids, attention_mask=mask).last_hidden_state
                slots[slot, : hidden.shape[0], : hidden.shape[1]].copy_(hidden)
            connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        pass  # the trainer is gone
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


class TeacherProcess:
    """Starts the teacher and asks it, one batch ahead. A context manager: leaving it ends the process."""

    def __init__(self, size: Size, seed: int) -> None:
        # Threads and fork do not go together: spawn. The tensors are shared, not sent.
        context = torch.multiprocessing.get_context("spawn")
        self.slots = torch.zeros(SLOTS, size.batch, size.length, size.teacher_width).share_memory_()
        self.head = torch.zeros(size.vocab, size.teacher_width).share_memory_()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve,
            args=(theirs, size, seed, self.slots, self.head, torch.get_num_threads()),
            daemon=True,
        )
        self.process.start()
        theirs.close()  # so that a teacher that dies is an end of file here

    def __enter__(self) -> TeacherProcess:
        try:
            self._answer("starting the teacher")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        try:
            self.connection.send(None)
        except OSError:
            pass
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()
        self.connection.close()

    def hidden_states(self, data: list[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with the teacher's hidden states, ``[batch, length, width]``.

        They are valid until the next batch is asked for.
        """
        for index in range(len(data) + 1):
            if index < len(data):
                ids, mask = data[index]["input_ids"], data[index]["attention_mask"]
                self._ask(index % SLOTS, ids.tolist(), mask.tolist())
            if index == 0:
                self._answer("the teacher's first batch")
                continue
            batch = data[index - 1]
            rows, length = batch["input_ids"].shape
            yield batch, self.slots[(index - 1) % SLOTS, :rows, :length]
            if index < len(data):
                self._answer("the teacher's next batch")

    def _ask(self, *request: object) -> None:
        try:
            self.connection.send(request)
        except OSError as error:
            raise RuntimeError(f"the teacher's process ended ({error})") from None

    def _answer(self, what: str) -> None:
        start, told = time.monotonic(), False
        while not self.connection.poll(0.2):
            waited = time.monotonic() - start
            if not told and waited > 2:
                print(f"waiting for {what} ...", file=sys.stderr)
                told = True
            if waited > TIMEOUT:
                raise RuntimeError(f"no answer within {TIMEOUT:.0f} s: {what}")
        try:
            failure = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the teacher's process ended: {what}") from None
        if failure is not None:
            raise RuntimeError(f"the teacher's process failed: {failure}")


def dense_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    counts = labels[:, 1:] != -100
    log_p = teacher_logits[:, :-1][counts].log_softmax(-1)
    log_q = student_logits[:, :-1][counts].log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    size = TINY if args.tiny else FULL
    with TeacherProcess(size, args.seed) as served:

        def prepare(name: str, steps: int):
            student, teacher = models(size, args.seed)
            data, record = batches(size, steps, args.seed), Record()
            optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

            def losses() -> Iterator[Tensor]:
                if name == "dense":
                    for batch in data:
                        inputs = (batch["input_ids"], batch["attention_mask"])
                        with torch.no_grad():
                            teacher_logits = teacher(*inputs).logits
                        yield dense_loss(student(*inputs).logits, teacher_logits, batch["labels"])
                    return
                for batch, teacher_hidden in served.hidden_states(data):
                    hidden = student.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
                    yield kd.distill(
                        kd.Head(hidden, student.get_output_embeddings().weight),
                        kd.Head(teacher_hidden, served.head),
                        kd.ForwardKL(),
                        labels=kd.next_token_labels(batch["labels"]),
                    )

            def run() -> Record:
                for loss in losses():
                    loss.backward()
                    record(loss, student)
                    optimizer.step()
                    optimizer.zero_grad()
                return record

            return run

        return compare(prepare, size.steps)


if __name__ == "__main__":
    sys.exit(main())
