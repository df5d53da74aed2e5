"""MODEL as a hub id: planned from headers, refused before a download, fetched once, then local."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import REPO, Hub, know_only, serve, shard_requests

from mlx_dsv3.checkpoint.folder import open_model
from mlx_dsv3.errors import UserError
from mlx_dsv3.parity.__main__ import main as parity

from .test_chat import QUESTION, refused, run

PATCHES = {
    "available_bytes": "mlx_dsv3.memory.available_bytes",
    "disk_usage": "mlx_dsv3.checkpoint.folder.shutil.disk_usage",
    "is_offline": "huggingface_hub.constants.HF_HUB_OFFLINE",
}


@pytest.fixture
def server(demo_q4):
    with serve(demo_q4) as server:
        yield server


@pytest.fixture(scope="module")
def fetched_once(demo_q4, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    with serve(demo_q4) as server:
        done = ask(server, home, "-p", QUESTION)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    return home


@pytest.fixture
def home(fetched_once, tmp_path) -> Path:
    """Return a folder with a hub cache that holds everything, to be damaged."""
    return shutil.copytree(fetched_once, tmp_path / "home", symlinks=True)


def ask(server: Hub, home: Path, *options: str, **patches) -> subprocess.CompletedProcess:
    """Run chat.py's `main` on the repository, with the hub's own client and a cache in `home`.

    `patches` replace what this file has names for.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        know_only(server, home, monkeypatch)
        monkeypatch.setattr("mlx_dsv3.checkpoint.hub.WAITS_S", (0.05,) * 2)
        for name, value in patches.items():
            monkeypatch.setattr(PATCHES[name], value)
        return run(REPO, *options)


def whole_files(server: Hub) -> list[str]:
    """Return the weight files that were asked for without a range."""
    return sorted(Path(path).name for _, path, part in shard_requests(server) if part is None)


def without_sizes(plan: str) -> list[str]:
    """Return a plan's lines but what the machine had free at that time."""
    return [line for line in plan.splitlines() if not line.startswith("allowed")]


def test_fetched_once_and_then_without_the_hub(server, demo_q4, tmp_path):
    """The plan needs headers alone; after the first reply no request is made."""
    plan = ask(server, tmp_path, "--plan")
    assert plan.returncode == 0, plan.stderr
    assert without_sizes(plan.stdout) == without_sizes(run(demo_q4, "--plan").stdout)
    assert whole_files(server) == []
    first = ask(server, tmp_path, "-p", QUESTION, "--drafts", "2")
    assert first.returncode == 0 and "Paris" in first.stdout, first.stderr
    size = sum(file.stat().st_size for file in demo_q4.glob("*.safetensors"))
    assert f"fetching {size / 1e9:.3g} GB of `{REPO}`" in first.stderr
    assert whole_files(server) == sorted(file.name for file in demo_q4.glob("*.safetensors"))
    server.requests.clear()
    server.closed = 500
    second = ask(server, tmp_path, "-p", QUESTION, "--drafts", "2", "--stats", "off")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert server.requests == []


def test_parity_takes_a_hub_id(server, tmp_path, monkeypatch, capsys):
    know_only(server, tmp_path, monkeypatch)
    assert parity(["capacities", REPO, "--slots", "4", "--tokens", "16"]) == 0
    assert "equal, bit for bit" in capsys.readouterr().out


def test_a_sidecar_that_another_tool_left_out(server, home):
    """mlx-lm fetches `model*.safetensors`: drafts would be silently off for ever."""
    (sidecar,) = home.rglob("mtp.safetensors")
    sidecar.unlink()
    done = ask(server, home, "-p", QUESTION, "--drafts", "2")
    assert done.returncode == 0 and "Paris" in done.stdout
    assert {Path(r[1]).name for r in server.requests if r[2] is None} >= {"mtp.safetensors"}
    assert not any("model-" in name for name in whole_files(server))
    sidecar.unlink()
    server.closed = 500  # without drafts nothing is lacking
    assert ask(server, home, "-p", QUESTION, "--drafts", "0").returncode == 0


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"available_bytes": lambda: 2 * 10**7}, "this machine allows 0.0184 GB"),
        ({"disk_usage": lambda path: SimpleNamespace(free=10**6)}, "has 0.001 GB free"),
    ],
    ids=["memory", "disk"],
)
def test_what_cannot_run_is_not_fetched(server, tmp_path, patch, words):
    """Hours of download, and then `the model needs 390 GB`."""
    done = ask(server, tmp_path, "-p", QUESTION, **patch)
    refused(done, words)
    assert whole_files(server) == []


def test_drafts_of_a_repository_without_the_module(demo_q4, tmp_path):
    folder = shutil.copytree(demo_q4, tmp_path / "folder")
    (folder / "mtp.safetensors").unlink()
    with serve(folder) as server:
        refused(ask(server, tmp_path, "-p", QUESTION, "--drafts", "2"), "no `mtp.safetensors`")
        assert whole_files(server) == []


def test_a_checkpoint_is_sent_to_the_converter(checkpoint, tmp_path):
    """689 GB of FP8, of which chat.py can read nothing."""
    with serve(checkpoint) as server:
        done = ask(server, tmp_path, "-p", QUESTION)
        refused(done, f"`{REPO}` is a hub checkpoint", f"`python -m convert run {REPO} OUT`")
        assert shard_requests(server) == []


def test_a_tokenizer_that_does_not_load_is_told_before_the_fetch(demo_q4, tmp_path):
    folder = shutil.copytree(demo_q4, tmp_path / "folder")
    (folder / "tokenizer.json").write_text("{}")
    with serve(folder) as server:
        refused(ask(server, tmp_path, "-p", QUESTION), "the tokenizer of", "does not load")
        assert whole_files(server) == []


def test_what_a_cache_may_look_like(server, home):
    """Without its tokenizer it is not complete; a blob that lost its link is not fetched again."""
    (tokenizer,) = home.rglob("tokenizer.json")
    (tokenizer.parents[1] / ".DS_Store").touch()
    tokenizer.unlink()
    (tokenizer.parent / "model-experts-00002.safetensors").unlink()
    full = {"disk_usage": lambda path: SimpleNamespace(free=0)}
    done = ask(server, home, "-p", QUESTION, "--stats", "off", **full)
    assert done.returncode == 0 and "Paris" in done.stdout and done.stderr == "", done.stderr
    assert whole_files(server) == []


def test_other_revisions_come_after_main(server, home):
    """A newer snapshot of another branch must not stand in for the model's own."""
    (config,) = home.rglob("config.json")
    cache = config.parents[2]
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(config.parent.name)
    other = cache / "snapshots" / ("f" * 40)
    shutil.copytree(config.parent, other)
    (other / "config.json").write_text("{}")
    server.closed = 500
    assert ask(server, home, "-p", QUESTION).returncode == 0


def test_without_a_network(server, home, tmp_path):
    """What lacks only the sidecar says so; HF_HUB_OFFLINE is named."""
    (sidecar,) = home.rglob("mtp.safetensors")
    sidecar.unlink()
    server.closed = 503
    done = ask(server, home, "-p", QUESTION)
    refused(done, "cannot be reached: status 503", "only `mtp.safetensors` is not on this machine")
    done = ask(server, tmp_path / "other", "-p", QUESTION, is_offline=True)
    refused(done, f"`{REPO}` is not on this machine, and HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("name", ["models/r1--q4", "models/größe", "models/x.git", "q4", "a/b/c"])
def test_a_slip_of_the_pen_is_no_hub_id(name):
    """Names that no repository may have end as a missing folder does, without a request."""
    with pytest.raises(UserError, match=f"`{name}` is not a folder"):
        open_model(name)


def test_an_interrupted_fetch_goes_on(server, tmp_path):
    """Files that arrived are kept; a start on half of them asks the hub for the rest."""
    name = "model-experts-00002.safetensors"
    server.faults = {name: [("status", 503)] * 20}
    done = ask(server, tmp_path, "-p", QUESTION)
    assert done.returncode == 2 and done.stdout == ""
    assert f"error: `{REPO}` cannot be reached: status 503\n\nhint: " in done.stderr
    assert {"mtp.safetensors", "model-experts-00001.safetensors"} <= set(whole_files(server))
    server.faults = {}
    server.requests.clear()
    done = ask(server, tmp_path, "-p", QUESTION)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    assert set(whole_files(server)) >= {name, "model-experts-00003.safetensors"}
    assert not {"mtp.safetensors", "model-experts-00001.safetensors"} & set(whole_files(server))


def test_a_hub_that_is_not_there(server, tmp_path):
    """One attempt: the word may be a folder's name with a slip."""
    server.closed = 404
    refused(ask(server, tmp_path, "-p", QUESTION), f"no folder and no repository `{REPO}`")
    server.closed = 503
    server.requests.clear()
    done = ask(server, tmp_path, "-p", QUESTION)
    refused(done, f"`{REPO}` cannot be reached", "give a folder that exists")
    assert len(server.requests) == 1
