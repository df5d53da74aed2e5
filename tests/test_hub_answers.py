"""Answers that are not the hub's, or that lead astray: one sentence, status 2, nothing fetched."""

import shutil

import pytest
from hub_server import COMMIT, REPO, Hub, describe, know_only, serve
from refusal import refusal

import chat
from convert.__main__ import main as convert
from mlx_dsv3.checkpoint import headers
from mlx_dsv3.errors import run_main

INDEX = "model.safetensors.index.json"


@pytest.fixture
def server(folders, tmp_path, monkeypatch):
    with serve(folders / "mlx") as server:
        know_only(server, tmp_path, monkeypatch)
        yield server


ANSWERS = {
    "a page": (b"<html>log in</html>", "is not the hub"),
    "nothing": (b"", "is not the hub"),
    "a list": (b"[]", "is not the hub"),
    "an object": (b"{}", "is not the hub"),
    "no files": ({"siblings": None}, "has no config.json"),
    "files without sizes": ({"siblings": [{"rfilename": "x.safetensors"}]}, "tells no size of `x"),
    "files without names": ({"siblings": [{"size": 3}]}, "is not the hub"),
    "files that are words": ({"siblings": ["config.json"]}, "is not the hub"),
    "sizes that are words": (
        {"siblings": [{"rfilename": "config.json", "size": "7"}]},
        "tells no size of `config.json`",
    ),
    "a huge file": (
        {"siblings": [{"rfilename": "config.json", "size": 10**12}]},
        "`config.json` in `somebody/tiny-v3` has 1000.0 GB",
    ),
    "no commit": ({"sha": None}, "or no commit"),
    "a commit that leaves the cache": ({"sha": "../../../x"}, "or no commit"),
    "no shards": ({"siblings": [{"rfilename": "config.json", "size": 7}]}, "no "),
    "files outside": (
        {"siblings": [{"rfilename": n, "size": 7} for n in ("../config.json", "..", "a\0b")]},
        "has no config.json",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_is_not_the_hub(server: Hub, capsys, case):
    """A login page, a mirror that leaves sizes out: each was a traceback."""
    server.about, words = ANSWERS[case]
    for main, argv in ((chat.main, [REPO, "--plan"]), (convert, ["plan", REPO])):
        error = refusal(capsys, main, *argv)
        assert words in error and REPO in error


def test_files_that_lead_out_of_a_repository(server: Hub, folders, capsys):
    """They match `*.json` as well; nothing asks for them."""
    outside = [{"rfilename": name, "size": 7} for name in ("../x.json", "sub/x.json", "a\\x.json")]
    server.about = {"siblings": describe(folders / "mlx")["siblings"] + outside}
    assert run_main(lambda: chat.main([REPO, "--plan"])) == 0
    assert not any("x.json" in path for _, path, _ in server.requests if "index" not in path)


def test_headers_of_a_repository_are_bounded(server: Hub, capsys, monkeypatch):
    """Eight requests at once, and all that they bring is held until it is parsed."""
    monkeypatch.setattr(headers, "MAX_HEADERS_BYTES", 10_000)
    assert f"the headers of `{REPO}` have more than 10,000" in refusal(
        capsys, chat.main, REPO, "--plan"
    )


@pytest.mark.parametrize("status", [301, 400, 404, 410, 503])
def test_a_hub_that_refuses(server: Hub, capsys, status):
    """Redirects that lead to themselves, and statuses that no protocol foresees."""
    server.closed = status
    assert REPO in refusal(capsys, chat.main, REPO, "--plan") or status in (400, 410)


def test_weights_in_a_subfolder_of_a_repository(server: Hub, folders, capsys):
    """The names of the files matched `model*.safetensors`, and a KeyError ended the program."""
    inner = folders / "repository" / "models"
    shutil.copytree(folders / "mlx", inner)
    (inner / INDEX).unlink()
    shutil.copy(inner / "config.json", folders / "repository")
    server.commits[COMMIT] = folders / "repository"
    assert run_main(lambda: chat.main([REPO, "--plan"])) == 2
    error = capsys.readouterr().err
    assert f"`{REPO}` has no weights" in error and "there is `models/m" in error
    (folders / "repository" / "config.json").unlink()
    assert run_main(lambda: chat.main([REPO, "--plan"])) == 2
    error = capsys.readouterr().err
    assert f"`{REPO}` has no config.json" in error and "it has `models/config.json`" in error


def test_a_page_instead_of_a_shard(server: Hub, folders, capsys):
    """A proxy that answers everything: a header is checked whoever sends it."""
    shard = folders / "mlx" / "model-trunk-00001.safetensors"
    shard.write_bytes(b"<html>" + b"x" * 5000)
    assert "is truncated or not a safetensors file" in refusal(capsys, chat.main, REPO, "--plan")
