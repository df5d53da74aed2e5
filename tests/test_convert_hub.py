"""Conversion from a repository: the real hub client against a server on this machine."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import hub_server
import pytest
from hub_server import COMMIT, HEADER_RANGE, REPO, Hub, environment, serve, shard_requests

from convert.__main__ import main
from convert.download import SMALL_BYTES, disk_peak
from convert.planner import build
from convert.recipe import RECIPES
from convert.source import open_folder
from tests.tiny import D, write_hub, write_tokenizer

ROOT = Path(__file__).parent.parent
CHILD = """
import sys
import huggingface_hub.constants
import mlx.core as mx
import mlx_dsv3.checkpoint.hub
from convert.__main__ import main
from mlx_dsv3.errors import run_main
mlx_dsv3.checkpoint.hub.WAITS_S = (0.05,) * 3
mx.set_default_device(mx.cpu)  # as the conversion that its files are compared with
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000  # of a piece that is cut nothing is kept
sys.exit(run_main(lambda: main(sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint of nine shards and what a local conversion makes of it."""
    folder = tmp_path_factory.mktemp("hub")
    hub = write_tokenizer(write_hub(folder / "hub", D, num_shards=9))
    assert main(["run", str(hub), str(folder / "out")]) == 0
    return hub, {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@pytest.fixture
def server(checkpoint):
    with serve(checkpoint[0]) as server:
        yield server


def start(server: Hub, home: Path, *argv) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(server, home), stdout=pipe, stderr=pipe, text=True
    )


def run(server: Hub, home: Path, *argv) -> tuple[int, str, str]:
    process = start(server, home, *argv)
    output, errors = process.communicate()
    return process.returncode, output, errors


def tensors_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "conversion.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_converted(out: Path, want: dict[str, bytes]) -> None:
    """The files of a local conversion; conversion.json names repository and revision besides."""
    found = contents(out)
    assert tensors_of(found) == tensors_of(want)
    source = json.loads(found["conversion.json"])["source"]
    assert (source["id"], source["revision"]) == (REPO, COMMIT)


def test_plan_downloads_no_shard(server, tmp_path):
    """One range request a shard; the totals are those of the local folder."""
    status, output, errors = run(server, tmp_path, "plan", REPO, "--json")
    assert status == 0, errors
    assert json.loads(output)["plan"] == build(open_folder(server.folder), RECIPES["q4"]).digest
    assert len(shard_requests(server)) == 9
    assert all(requested for _, _, requested in shard_requests(server))


def test_whole_run_with_discard(server, checkpoint, tmp_path):
    """Never more on the disk than planned; every shard is gone at the end and was fetched once."""
    out, most = tmp_path / "out", 0
    process = start(server, tmp_path, "run", REPO, out, "--discard-source")
    while process.poll() is None:
        most = max(most, disk_use(out))
        time.sleep(0.002)
    assert process.returncode == 0, process.stderr.read()
    process.communicate()
    assert_converted(out, checkpoint[1])
    plan = build(open_folder(server.folder), RECIPES["q4"])
    planned = disk_peak(plan, jobs=2)
    assert planned - SMALL_BYTES < 0.8 * (plan.source.nbytes + plan.nbytes)
    small = 1 << 20  # what journal and index are at this size
    assert 0 < most <= planned - SMALL_BYTES + small
    assert len([r for r in shard_requests(server) if r[2] is None]) == 9


def disk_use(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # passes over folders that are gone by then
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_blocks * 512
    return total


def test_run_that_keeps_the_source(server, checkpoint, tmp_path):
    """Without the flag shards go into the hub's cache and stay there."""
    status, _, errors = run(server, tmp_path, "run", REPO, tmp_path / "out")
    assert status == 0, errors
    assert_converted(tmp_path / "out", checkpoint[1])
    assert len(list((tmp_path / "hf").rglob("*.safetensors"))) == 9


def shard_of(server: Hub, number: int) -> tuple[str, int]:
    path = sorted(server.folder.glob("*.safetensors"))[number]
    return path.name, path.stat().st_size


def test_cut_connections_and_busy_answers(server, checkpoint, tmp_path):
    """A cut download continues where it stopped; a busy server is asked again."""
    (cut, size), (busy, _) = shard_of(server, 3), shard_of(server, 5)
    server.faults = {cut: [("cut", 200_000), ("cut", 100_000)], busy: [("status", 503)] * 2}
    status, _, errors = run(server, tmp_path, "run", REPO, tmp_path / "out", "--discard-source")
    assert status == 0, errors
    assert_converted(tmp_path / "out", checkpoint[1])
    assert server.bytes_sent[cut] == size


def test_a_server_that_stays_away(server, checkpoint, tmp_path):
    """After some attempts one sentence; then, with the server back, the rest is done."""
    name, size = shard_of(server, 6)
    server.faults = {name: [("cut", 300_000), *[("status", 503)] * 50]}
    out = tmp_path / "out"
    status, _, errors = run(server, tmp_path, "run", REPO, out, "--discard-source")
    assert status == 2
    assert f"error: `{REPO}` cannot be reached: status 503" in errors and "hint: " in errors
    assert not (out / "config.json").exists()
    server.faults = {}
    status, _, errors = run(server, tmp_path, "run", REPO, out, "--discard-source")
    assert status == 0, errors
    assert_converted(out, checkpoint[1])
    assert server.bytes_sent[name] == size, "what the first run had fetched was fetched again"


def test_killed_run_resumes(server, checkpoint, tmp_path):
    """SIGKILL while shards come and go; finished shards are not fetched again."""
    name, _ = shard_of(server, 7)
    server.faults = {name: [("status", 503)] * 10_000}
    out = tmp_path / "out"
    process = start(server, tmp_path, "run", REPO, out, "--discard-source")
    while not server.faults[name] or len(server.faults[name]) == 10_000:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    server.faults = {}
    status, _, errors = run(server, tmp_path, "run", REPO, out, "--discard-source")
    assert status == 0, errors
    assert_converted(out, checkpoint[1])


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "no repository `"), (404, "no repository `"), (403, "is gated")],
)
def test_closed_doors_are_explained(server, tmp_path, status, words):
    server.closed = status
    code, _, errors = run(server, tmp_path, "run", REPO, tmp_path / "out", "--discard-source")
    assert code == 2 and words in errors and "hint: " in errors
    assert "Traceback" not in errors and not (tmp_path / "out").exists()


def test_no_network(server, tmp_path):
    server.shutdown()
    server.server_close()
    code, _, errors = run(server, tmp_path, "plan", REPO)
    assert code == 2 and "cannot be reached: no connection" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("keeps_sha256", "place"), [(True, 40), (False, 40), (False, 3)])
def test_a_shard_that_is_another_than_its_header(
    server, checkpoint, tmp_path, monkeypatch, keeps_sha256, place
):
    """Found by the hub's sha256 or, where there is none, by the header; then fetched anew."""
    name, _ = shard_of(server, 4)
    real = Path.read_bytes

    def other(path):
        data = real(path)
        return data[:place] + b"?" + data[place + 1 :] if path.name == name and lies else data

    lies = False
    whole = hub_server.describe(server.folder)
    if not keeps_sha256:
        for entry in whole["siblings"]:
            entry.pop("lfs", None)
    monkeypatch.setattr(hub_server, "describe", lambda folder: dict(whole))
    out = tmp_path / "out"
    monkeypatch.setattr(Path, "read_bytes", other)
    process = start(server, tmp_path, "run", REPO, out, "--discard-source")
    while len([r for r in server.requests if r[2] == HEADER_RANGE]) < 9:
        time.sleep(0.001)
    lies = True
    _, errors = process.communicate()
    assert process.returncode == 2
    assert f"`{name}` " in errors and ("sha256" in errors) == keeps_sha256
    lies = False
    code, _, errors = run(server, tmp_path, "run", REPO, out, "--discard-source")
    assert code == 0, errors
    assert_converted(out, checkpoint[1])


def test_a_folder_after_the_hub_is_refused(server, tmp_path):
    """What was begun from the hub is not mixed with a folder."""
    name, _ = shard_of(server, 6)
    server.faults = {name: [("status", 503)] * 50}
    out = tmp_path / "out"
    assert run(server, tmp_path, "run", REPO, out)[0] == 2
    head = (out / ".partial" / "journal").read_bytes()
    assert COMMIT.encode() in head
    local = start(server, tmp_path, "run", server.folder, out)
    _, errors = local.communicate()
    assert local.returncode == 2 and f"begun from `{REPO}` at revision `{COMMIT}`" in errors


def test_mtp_from_a_repository(server, checkpoint, tmp_path):
    """Only the shards that hold the MTP layer are fetched."""
    from tests.test_convert import strip_mtp

    plain = tmp_path / "plain"
    stripped = strip_mtp(server.folder, tmp_path / "stripped")
    assert main(["run", str(stripped), str(plain)]) == 0
    (plain / "conversion.json").unlink()
    status, _, errors = run(server, tmp_path, "mtp", REPO, plain)
    assert status == 0, errors
    assert (plain / "mtp.safetensors").read_bytes() == checkpoint[1]["mtp.safetensors"]
    index = json.loads((server.folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in index.items() if name.startswith("model.layers.4.")}
    assert {Path(r[1]).name for r in shard_requests(server)} == needed
    assert len(needed) < 9
