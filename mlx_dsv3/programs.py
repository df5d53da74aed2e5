"""The installed programs: as `python -m` would run their modules."""

from importlib import import_module

from mlx_dsv3.errors import imports, run_program


def run(module: str) -> None:
    with imports("__main__"):
        main = import_module(module).main
    run_program(main)


def chat() -> None:
    run("chat")


def convert() -> None:
    run("convert.__main__")


def parity() -> None:
    run("mlx_dsv3.parity.__main__")
