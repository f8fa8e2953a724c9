"""Checks that several processes go through together, over gloo: each is a function ``(world, rank, mesh)`` of
a test module, found by the beginning of its name."""

from __future__ import annotations

import importlib
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def checks_of(module: str, prefix: str) -> dict[str, Callable]:
    """By their names without the prefix, in the order in which they are written."""
    found = vars(importlib.import_module(module)).items()
    return {name.removeprefix(prefix): check for name, check in found if name.startswith(prefix)}


def worker(rank: int, world: int, folder: str, module: str, prefix: str) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    mesh = dist.init_device_mesh("cpu", (world,))
    for name, check in checks_of(module, prefix).items():
        try:
            check(world, rank, mesh)
            said = "fine"
        except pytest.skip.Exception as reason:
            said = f"skip: {reason}"
        except (Exception, pytest.fail.Exception):
            said = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(said)
        if not said.startswith(("fine", "skip: ")):
            break  # the other process may wait for this one in a collective: let it time out
    dist.destroy_process_group()


def run_checks(world: int, tmp_path_factory, module: str, prefix: str) -> Path:
    """The processes go through all their checks once; each test reads what they said about its own. One that
    dies on its way out, where gloo's threads race each other, has said all of it by then."""
    if not dist.is_available():
        pytest.skip("this torch is built without distributed")
    folder = tmp_path_factory.mktemp(f"{world}_processes")
    try:
        mp.spawn(worker, (world, str(folder), module, prefix), nprocs=world)
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as died:
        warnings.warn(f"of {world} processes one died: {died}", stacklevel=1)
    return folder


def read(outcome: Path, world: int, name: str) -> None:
    for rank in range(world):
        said = outcome / f"{name}.{rank}"
        assert said.exists(), "not reached: an earlier check failed, or its process died"
        if said.read_text().startswith("skip: "):
            pytest.skip(said.read_text()[6:])
        assert said.read_text() == "fine", said.read_text()
