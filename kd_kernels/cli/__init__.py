"""The package at a terminal: what it can do here, whether it is right, how fast it is, what it will need.

One file per command, each with ``HELP``, ``configure(parser)`` and ``run(args) -> exit code``.
Exit codes: 0 fine, 1 a check failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from typing import Optional

from kd_kernels.cli import bench, cache, info, plan, selftest
from kd_kernels.cli.common import UsageError

COMMANDS = {"info": info, "selftest": selftest, "bench": bench, "plan": plan, "cache": cache}


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m kd_kernels",
        description=__doc__.splitlines()[0],
        epilog="exit codes: 0 fine, 1 a check failed, 2 wrong usage, 130 interrupted",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, allow_abbrev=False, help=module.HELP, description=module.__doc__)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        module.configure(command)
    args = parser.parse_args(argv)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends quietly
    try:
        return COMMANDS[args.command].run(args)
    except UsageError as error:
        commands.choices[args.command].error(str(error))
    except KeyboardInterrupt:
        return 130
