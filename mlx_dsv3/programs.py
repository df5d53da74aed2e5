"""The installed programs: each is imported within `run_main`, which tells what is not installed."""

import sys
from importlib import import_module

from mlx_dsv3.errors import run_main


def run(module: str) -> None:
    sys.exit(run_main(lambda: import_module(module).main()))


def chat() -> None:
    run("chat")


def convert() -> None:
    run("convert.__main__")


def parity() -> None:
    run("mlx_dsv3.parity.__main__")
