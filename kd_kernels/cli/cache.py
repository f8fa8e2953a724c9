"""Teachers on disk: what a cache holds, and whether every shard of it is as it was written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kd_kernels.cache import CacheError, TeacherCache
from kd_kernels.cli.common import Progress, UsageError, emit

HELP = "what a teacher cache holds; check every shard"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("info", "verify"), help="describe it, or read and check all of it")
    parser.add_argument("path", help="directory of the cache")


def describe(cache: TeacherCache) -> dict[str, Any]:
    """Everything that ``info`` prints, as plain data."""
    size = sum(shard.bytes for shard in cache.shards)
    return {
        "path": str(cache.path),
        **cache.manifest.to_json(),
        "sequences": len(cache),
        "tokens": cache.tokens,
        "shards": len(cache.shards),
        "bytes": size,
        "bytes_per_token": round(size / cache.tokens, 2) if cache.tokens else None,
        "unlisted": cache.unlisted(),
    }


def faults(cache: TeacherCache) -> list[str]:
    """What is wrong with each shard that is damaged."""
    found = []
    with Progress("verify, shards", len(cache.shards)) as progress:
        for shard in cache.shards:
            try:
                cache.verify(shard)
            except CacheError as error:
                found.append(str(error))
            progress.step(shard.name)
    return found


def run(args: argparse.Namespace) -> int:
    if not Path(args.path).is_dir():
        raise UsageError(f"{args.path}: there is no such directory")
    try:
        cache = TeacherCache.open(args.path)
    except ImportError as error:
        raise UsageError(str(error)) from None
    except (CacheError, OSError) as error:
        found: dict[str, Any] = {"path": args.path, "faults": [str(error)]}
    else:
        found = describe(cache)
        if args.action == "verify":
            found["faults"] = faults(cache)
    if args.json:
        emit(found)
    else:
        show(found)
    return 1 if found.get("faults") else 0


def show(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name not in ("unlisted", "faults"):
            print(f"{name:16s} {value}")
    for name in found.get("unlisted", ()):
        print(f"not a part       {name} (a killed writer left it; a writer that goes on replaces it)")
    for fault in found.get("faults", ()):
        print(f"DAMAGED          {fault}")
    if found.get("faults") == []:
        print(f"all {found['shards']} shards are as they were written")
