"""How programs end: statuses, and what stands on which stream, as docs/commands.md says.

Each program is a process of its own under an ordinary shell's odd conditions.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dsv3.errors import UserError, missing_package, read_text, run_main, visible

ROOT = Path(__file__).parents[1]
ANSWER = "Hello! What would you like to know?\n"
STATISTICS = "[prompt 4 (0 reused)"


def shell(line: str, *names: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a line of bash; `$PY` is the interpreter, `$1` and so on are `names`."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *names],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PY": sys.executable, "OMP_NUM_THREADS": "1"} | env,
        timeout=120,
    )


@pytest.fixture(scope="module")
def demo(converted) -> Path:
    return converted("q4")


@pytest.mark.parametrize(
    "redirections, answer, statistics",
    [
        ("<&-", ANSWER, True),
        (">&-", "", True),
        ("2>&-", ANSWER, False),
        ("<&- >&- 2>&-", "", False),
    ],
)
def test_a_closed_descriptor_is_dev_null(demo, redirections, answer, statistics):
    """MLX refused the weight file that took descriptor 0; a print to None was an AttributeError."""
    done = shell(f'$PY chat.py "$1" -p Hello {redirections}', demo)
    assert (done.returncode, done.stdout.decode()) == (0, answer), done.stderr.decode()
    assert (STATISTICS in done.stderr.decode()) == statistics


@pytest.mark.parametrize(
    "line",
    [
        '$PY chat.py "$1" -p Hello | head -c 1',
        "$PY -m convert plan demo/checkpoint | head -1",
        '$PY -m convert verify "$1" | head -1',
        '$PY -m convert run demo/checkpoint "$2" --json | head -1',
        "$PY chat.py --frobnicate 2>&1 | true",
    ],
)
def test_a_reader_that_goes_away(demo, tmp_path, line):
    """`| head` ended each of them in a BrokenPipeError with its traceback."""
    done = shell(line, demo, tmp_path / "new")
    assert done.returncode in (0, 141), done.stderr.decode()  # 0: it was done before
    words = done.stderr.decode().splitlines()
    assert all(word.startswith(("[prompt", "continuing")) for word in words), words


def test_a_pipe_gets_the_answer_or_one_object(demo, tmp_path):
    """Must read the same in every locale: a JSON text with `\\xe9` in it is none."""
    ask = 'echo "of France?" | LANG=C LC_ALL=C $PY chat.py "$1" -p "What is the capital"'
    done = shell(f'{ask} > "$2/out.txt" && {ask} --json', demo, tmp_path)
    assert done.returncode == 0 and done.stderr.startswith(b"[prompt")
    assert done.stdout.count(b"\n") == 1 == done.stderr.count(b"\n")
    values = json.loads(done.stdout)
    assert (tmp_path / "out.txt").read_text() == values["text"] + "\n" and values["text"]
    assert values["usage"]["completion_tokens"] == values["statistics"]["reply_tokens"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("full", ["", "2"])
def test_an_output_that_takes_no_more(demo, full):
    """A full disk under stdout was a traceback, and a second one as Python ended."""
    done = shell(f'$PY chat.py "$1" -p Hello {full}> /dev/full', demo)
    words = "" if full else "error: a file or the output cannot be used: no space left on device\n"
    assert done.returncode == 2 and done.stderr.decode().startswith(words)
    assert "Traceback" not in done.stderr.decode() and "ignored" not in done.stderr.decode()


@pytest.mark.parametrize("env", [{"LANG": "C", "LC_ALL": "C"}, {"TERM": "dumb"}], ids=str)
def test_environments_of_old(demo, env):
    done = shell('$PY chat.py "$1" -p Hello', demo, **env)
    assert (done.returncode, done.stdout.decode()) == (0, ANSWER)


@pytest.mark.parametrize("encoding, shown", [("ascii", "\\xe9\\u4f60"), ("latin-1", "é\\u4f60")])
def test_an_encoding_that_lacks_a_character(encoding, shown):
    """The reply ended in a UnicodeEncodeError."""
    code = "from mlx_dsv3.errors import run_program; run_program(lambda: print('é你'))"
    done = shell(f'$PY -c "{code}"', PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout.decode(encoding)) == (0, f"{shown}\n")


# What `-X importtime` says as each module is there, from the first of ours to the last.
MODULES = ["mlx_dsv3.options", "numpy", "mlx.core", "transformers", "mlx_lm.utils"]
MODULES += ["mlx_dsv3.load", "mlx_dsv3.terminal.start"]  # then it loads
COMMANDS = {
    "chat": (["chat.py", "MODEL", "-p", "Hello"], MODULES),
    "convert": (["-m", "convert", "plan", "SOURCE"], ["numpy", "convert.run"]),
    "parity": (["-m", "mlx_dsv3.parity", "MODEL", "absent"], ["mlx.core", "mlx_lm.utils"]),
    "record": (["-m", "mlx_dsv3.reference.record", "SOURCE", "x"], ["torch.nn"]),
}


SLOW = {"numpy", "transformers", "mlx_lm.utils", "mlx_dsv3.terminal.start"}  # as the others


@pytest.mark.parametrize(
    "program, module",
    [
        pytest.param(program, module, marks=[pytest.mark.slow] if module in SLOW else [])
        for program, (_, modules) in COMMANDS.items()
        for module in modules
    ],
)
def test_ctrl_c_while_a_program_is_imported(demo, program, module):
    """The first seconds of each program were a traceback through the packages it imports."""
    names = {"MODEL": str(demo), "SOURCE": "demo/checkpoint"}
    argv = [names.get(word, word) for word in COMMANDS[program][0]]
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", *argv],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    with child:
        for line in child.stderr:
            if line.split("|")[-1].strip() == module:
                child.send_signal(signal.SIGINT)
                break
        said = child.stderr.read()
    others = [line for line in said.splitlines() if line and not line.startswith("import time:")]
    assert (child.wait(), others) == (130, [])


def test_a_background_program_keeps_ignoring_ctrl_c(demo):
    """A shell's `&` makes its commands ignore SIGINT: it is meant for what is in front."""
    code = "import signal; print(signal.getsignal(signal.SIGINT))"
    program = f"from mlx_dsv3.errors import run_program; run_program(lambda: exec('{code}'))"
    done = shell(f'trap "" INT; $PY -c "{program}"')
    assert done.stdout.decode() == f"{signal.SIG_IGN!s}\n"


def test_sigterm_ends_a_program(demo):
    """As the system does it: what it had begun, the next run completes."""
    argv = [sys.executable, "chat.py", demo, "-p", "Hello", "--temp", "1000", "--stats", "off"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as child:
        child.stdout.read(1)
        child.terminate()
        assert (child.wait(), child.stderr.read()) == (-signal.SIGTERM, b"")


def test_what_would_drive_a_terminal_is_escaped():
    """The name of a tensor could set the clipboard, or write a hint of its own."""
    error = UserError("`\x1b]52;c;cm0=\x07\n\nhint: rm\x9b2J` is\u202e bad", "`x\ty\r`")
    told = "error: `\\x1b]52;c;cm0=\\x07\\n\\nhint: rm\\x9b2J` is\\u202e bad\n\nhint: `x\ty\\x0d`"
    assert str(error) == told
    assert visible("a\n\tb \u200bé") == "a\n\tb \u200bé"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.mkdir(), "is not a file"),
        (os.mkfifo, "is not a file"),
        (lambda path: path.symlink_to("nowhere"), "cannot be used: no such file or directory"),
        (lambda path: path.write_bytes(b"ab\xff"), "is not text in UTF-8: byte 2 is 0xff"),
        (lambda path: path.write_text("x" * 101), "is too large: 101 bytes; 100 is the most"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, capsys, make, words):
    """A folder, a pipe that waits for ever, a dangling link, other encodings, a file too large."""
    make(path := tmp_path / "text")
    assert run_main(lambda: read_text(path, 100)) == 2
    error, _, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: `{path}` {words}") and hint.startswith("hint: ")


def test_text_may_begin_with_a_byte_order_mark(tmp_path):
    (path := tmp_path / "text").write_bytes("\ufeffé".encode())
    assert read_text(path) == "é"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda path: open(path / "absent"), "`{}/absent` cannot be used: no such file"),
        (lambda path: (path / "file" / "below").mkdir(), "`{}/file/below` cannot be used: not a"),
        (lambda path: open(path / ("x" * 300)), "cannot be used: file name too long"),
        (lambda path: os.rename(path / "a", path / "b"), "`{0}/a` and `{0}/b` cannot be used"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(tmp_path, capsys, call, words):
    """Each OSError was a traceback; its file's name was in the last line."""
    (tmp_path / "file").touch()
    assert run_main(lambda: call(tmp_path)) == 2
    error, _, hint = capsys.readouterr().err.splitlines()
    assert words.format(tmp_path) in error and hint.startswith("hint: ")


def test_an_error_without_a_number_is_a_bug():
    """Packages raise OSErrors of their own making; those keep their traceback."""
    with pytest.raises(OSError, match="as if"):
        run_main(lambda: (_ for _ in ()).throw(OSError("as if")))
    assert missing_package(ImportError("cannot import name")) is None


def test_ctrl_c_as_python_ends():
    """Torch's atexit function answered a second Ctrl-C with a traceback."""
    program = (
        "import atexit, time\nfrom mlx_dsv3.errors import run_program\n"
        "atexit.register(lambda: (print(flush=True), time.sleep(60)))\nrun_program(lambda: 0)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as child:
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert (child.wait(), child.stderr.read()) == (130, b"\n")


PROGRAMS = [*ROOT.glob("*.py"), *(ROOT / "demo").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
PROGRAMS += [*(ROOT / "mlx_dsv3").rglob("*.py"), *(ROOT / "convert").glob("*.py")]


def test_every_program_ends_in_one_way():
    texts = [path.read_text(encoding="utf-8") for path in PROGRAMS]
    ends = {text.partition('if __name__ == "__main__":')[2].strip() for text in texts}
    assert ends == {"", "run_program(main)"}


@pytest.mark.parametrize("tokens", [0, 3, 20])
def test_ctrl_c_while_it_answers(demo, tokens):
    """Half an answer with status 0: `chat.py -p ... > file && next` went on with it."""
    argv = [sys.executable, "chat.py", demo, "-p", "Hello", "--temp", "1000", "--stats", "off"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=ROOT, **pipes) as child:
        said = child.stdout.read(1 + tokens)
        child.send_signal(signal.SIGINT)
        said += child.stdout.read()
        assert (child.wait(), child.stderr.read()) == (130, b"(stopped)\n")
    assert said.endswith(b"\n") and len(said) > tokens + 1


@pytest.mark.parametrize(
    "line, words",
    [
        (
            'ulimit -n 1024; $PY chat.py "$1" -p Hello',
            "error: the system allows this process fewer",
        ),
        (
            'ulimit -n 1024; $PY -m mlx_dsv3.parity perplexity "$1" README.md',
            "error: the system allows this process fewer",
        ),
        (
            'ln -s loop "$2"; $PY -m convert run "$2" "$2.out"',
            "is not a folder\n\nhint: give a folder that holds config.json",
        ),
    ],
)
def test_what_is_refused_to_other_packages(demo, tmp_path, line, words):
    """Each ended in a ValueError or a RuntimeError with its traceback."""
    done = shell(line, demo, tmp_path / "loop")
    assert done.returncode == 2 and words in done.stderr.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that takes no folders")
def test_a_temporary_folder_that_takes_no_files():
    """MLX compiles its kernels for a CPU there, and says what fails in a RuntimeError."""
    line = "from mlx_dsv3.errors import *; import mlx.core as mx; "
    line += "f = mx.compile(lambda x: mx.exp(x) + 1); "
    line += "run_program(lambda: mx.eval(f(mx.ones((4,), stream=mx.cpu), stream=mx.cpu)))"
    line = line.replace(", stream=mx.cpu))", "))")
    done = shell(f"$PY -c '{line}'", TMPDIR="/proc")
    assert (done.returncode, b"set TMPDIR" in done.stderr) == (2, True), done.stderr.decode()


@pytest.mark.parametrize(
    "program", ["chat.py", "-m convert", "-m mlx_dsv3.parity", "-m mlx_dsv3.reference.generate"]
)
def test_a_python_without_docstrings(program):
    """`python -OO` has no docstrings, of which the help is made."""
    done = shell(f"$PY -OO {program} --help")
    assert done.returncode == 0 and done.stdout.startswith(b"usage:"), done.stderr.decode()


def test_a_terminal_of_one_column_gets_every_word(demo):
    """rich left the whole table out, and `verify` was silent on errors by role."""
    done = shell('$PY -m convert verify "$1"', demo, COLUMNS="1")
    assert b"experts_gate_up" in done.stdout, done.stdout.decode()


def test_a_name_on_one_line_and_without_escapes(demo, tmp_path):
    """A file's name ended the line, and the next one read as a verdict of ours."""
    folder = tmp_path / "x\x1b[2J\n`y` is good"
    shutil.copytree(demo, folder)
    (folder / "a\n`b` is good.json").touch()
    done = shell('$PY -m convert verify "$1"', folder)
    words = done.stdout + done.stderr
    assert done.returncode == 1 and b"\x1b" not in words
    assert not any(line.startswith((b"`y", b"`b")) for line in words.splitlines()), words.decode()
    golden = ROOT / "tests/golden/demo-fp8.safetensors"
    done = shell('$PY -m mlx_dsv3.parity "$1" "$2"', folder, golden)
    assert done.returncode == 0 and b"\x1b[2J" not in done.stdout, done.stderr.decode()
