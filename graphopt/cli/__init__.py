"""The command line: ``graphopt opt``, ``explain``, ``bench``, ``tune``, ``db``, ``doctor``."""

from __future__ import annotations

import sys
from importlib import import_module

INTERRUPTED = 130  # exit status, as shells give for SIGINT


def run() -> None:
    """Entry point of the command ``graphopt``. The commands, and PyTorch with them, take seconds to import: Ctrl-C may come before."""
    try:
        import_module("graphopt.cli.main").main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
