"""A model that is closed, or dropped, gives back memory, threads and files."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from drafted import resident_bytes
from mlx_folder import write_mlx, write_tokenizer

from mlx_dsv3 import load as loading
from mlx_dsv3.errors import UserError
from mlx_dsv3.generate import make_state, stream
from mlx_dsv3.load import load, load_model

PACKING = {"bits": 4, "group_size": 64, "mode": "affine"}
CONFIG = tiny.D | {"num_hidden_layers": 2}
STREAMED = {"experts": "streamed", "expert_memory_gb": 0.0007}
MODES = {"resident": {"experts": "resident"}, "streamed": STREAMED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("closing")
    write_mlx(folder, CONFIG, tiny.random_tensors(CONFIG), packing=PACKING)
    write_tokenizer(folder, CONFIG["vocab_size"])
    return folder


def held() -> tuple[int, int, int]:
    """Return threads, open files and MLX's bytes, once threads had a moment to end."""
    for _ in range(100):
        if not any(thread.name.startswith("expert-reader") for thread in threading.enumerate()):
            break
        time.sleep(0.01)
    files = Path("/proc/self/fd")
    is_linux = files.is_dir()
    return threading.active_count(), len(os.listdir(files)) if is_linux else 0, active_bytes()


def active_bytes() -> int:
    mx.synchronize()
    return mx.get_active_memory()


def use(folder, **options) -> loading.Loaded:
    loaded = load_model(folder, **options)
    mx.eval(loaded.model(mx.array([[1, 2, 3]]), loaded.model.make_cache()))
    return loaded


def load_and_drop(folder, way: str, **options) -> None:
    if way == "with":
        with use(folder, **options):
            pass
    elif way == "error":
        with pytest.raises(ZeroDivisionError):
            use(folder, **options)
    else:
        use(folder, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["dropped", "with", "error"])
def test_loads_and_drops_leave_nothing(folder, mode, way, monkeypatch):
    """Twelve threads, a file each and all slots stayed for every model that was ever loaded."""
    if way == "error":  # the MTP module comes last, when everything else is there
        monkeypatch.setattr(loading, "load_mtp", lambda *_: 1 / 0)
    for _ in range(3):
        load_and_drop(folder, way, **MODES[mode])
    gc.collect()
    before, resident = held(), resident_bytes()
    for _ in range(50):
        load_and_drop(folder, way, **MODES[mode])
    gc.collect()
    assert held() == before
    assert resident_bytes() - resident < 8 << 20


def test_threads_are_for_reading_alone(folder):
    """With all experts in memory twelve threads waited for nothing."""
    threads = threading.active_count()
    loaded = use(folder, experts="resident")
    assert threading.active_count() == threads
    loaded = use(folder, **STREAMED)
    assert threading.active_count() > threads
    loaded.close()
    assert threading.active_count() == threads


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_model_says_so(folder, mode):
    with load(folder, **MODES[mode]) as loaded:
        state, tokens = make_state(loaded), [3, 4, 5]
        pieces = stream(loaded, tokens, state=state, max_tokens=4)
        next(pieces)
        pieces.close()
    loaded.close()
    with pytest.raises(UserError, match="the model was closed\n\nhint: load it again"):
        loaded.model(mx.array([tokens]))
    with pytest.raises(UserError, match="the model was closed"):
        next(stream(loaded, tokens, max_tokens=2))
    with pytest.raises(AttributeError, match="`Loaded` has no `modle`"):
        loaded.modle(1)


def test_experts_of_a_closed_model_are_not_read(folder):
    """The model itself may be kept; a streamed one can go no further."""
    loaded = load_model(folder, **STREAMED)
    model = loaded.model
    loaded.close()
    with pytest.raises(UserError, match="the model was closed"):
        model(mx.array([[1, 2, 3, 4, 5, 6, 7, 8]]))


def test_a_program_ends_without_closing(folder):
    """Threads that wait must not keep the interpreter."""
    program = (
        "import sys, mlx.core as mx\n"
        "mx.set_default_device(mx.cpu)\n"
        "from mlx_dsv3.load import load_model\n"
        "loaded = load_model(sys.argv[1], experts='streamed', expert_memory_gb=0.0007)\n"
        "loaded.model(mx.array([[1, 2, 3]]))\n"
        "loaded.again = loaded\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    assert subprocess.run(command, timeout=60, stderr=subprocess.PIPE).stderr == b""
