"""Options of chat.py on the demo model: statistics, traces, the plan, errors inside a reply."""

import json
import os
import re
import shutil

import pytest

import chat
from demo_model.test_chat import QUESTION, refused, run
from mlx_dsv3 import memory
from mlx_dsv3.terminal.kept import Kept
from mlx_dsv3.terminal.repl import Chat, answer_line

STREAMED = ("--expert-memory", "0.002")


@pytest.fixture
def open_chat(demo_q4):
    """Return a function arguments -> Chat, in this process; stores are closed at the end."""
    chats = []

    def start(*arguments: str) -> Chat:
        options = chat.make_parser().parse_args([str(demo_q4), *arguments])
        chats.append(chat.open_chat(options))
        return chats[-1]

    yield start
    for one in chats:
        one.session.loaded.store.close()


def test_a_context_that_shrank_is_told(open_chat, capsys, monkeypatch):
    """Its limit was met by surprise, with a hint to ask for what does not fit."""
    open_chat()
    assert "memory allows" not in capsys.readouterr().err
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 10**8)
    talk = open_chat()
    told = capsys.readouterr().err
    assert f"memory allows a context of {talk.session.loaded.plan.context:,} tokens\n" in told


def test_a_failure_after_the_reply_leaves_no_turn(open_chat, capsys, monkeypatch):
    """`The conversation is as it was before the turn`: also when the statistics fail."""
    talk = open_chat()
    monkeypatch.setattr(talk.screen, "show_end", lambda end: 1 / 0)
    answer_line(talk, QUESTION)
    assert "ZeroDivisionError" in capsys.readouterr().err and not talk.session.conversation.messages


@pytest.mark.parametrize("where", ["prompt", "reply"])
def test_no_failure_of_a_turn_ends_the_session(open_chat, capsys, monkeypatch, where):
    """A Metal allocation or a template that fails threw away the model, minutes of loading."""
    talk = open_chat("--stats", "off", "--drafts", "0")
    answer_line(talk, QUESTION)
    first = capsys.readouterr().out
    model, calls = talk.session.loaded.model, []
    original = type(model).hidden

    def fails_once(self, ids, cache=None):
        calls.append(ids)
        if len(calls) == (1 if where == "prompt" else 5):
            raise RuntimeError("[metal::malloc] out of memory\nat line 7")
        return original(self, ids, cache)

    monkeypatch.setattr(type(model), "hidden", fails_once)
    answer_line(talk, "And of Italy?")
    told = capsys.readouterr().err
    assert re.match(
        r"error: the turn failed at `test_chat_options.py` line \d+: RuntimeError: "
        r"\[metal::malloc\] out of memory\n\nhint: the conversation is as it was",
        told.lstrip("\n"),
    )
    roles = [message["role"] for message in talk.session.conversation.messages]
    assert roles == ["user", "assistant"]
    answer_line(talk, "And of Italy?")
    assert "Paris" in first and "Rome" in capsys.readouterr().out


def test_json_statistics_of_streamed_experts(open_chat, capsys):
    """One line a reply, nothing else, and figures of that reply: counters run since the load."""
    talk = open_chat("--stats", "json", *STREAMED, "--drafts", "2")
    for question in (QUESTION, "And of Italy?"):
        answer_line(talk, question)
        stats = json.loads(capsys.readouterr().err)
        drafts, experts = stats["drafts"], stats["experts"]
        assert stats["finish_reason"] == "stop" and stats["prompt_tps"] > 0 < stats["reply_tps"]
        assert drafts["mean_accepted"] == sum(drafts["accepted"]) / sum(drafts["steps"][1:])
        assert len(drafts["acceptance"]) <= 2 and drafts["tokens_per_forward"] >= 1
        assert "speed_up" in drafts
        assert experts["hit_rate"] == experts["hits"] / (experts["hits"] + experts["misses"])
        assert experts["bytes"] > 0 < experts["gb_per_s"] and experts["wait_s"] > 0
        assert experts["layers"].keys() == set(map(str, talk.session.loaded.store.banks))
        for name in ("hits", "misses", "bytes"):
            assert sum(layer[name] for layer in experts["layers"].values()) == experts[name]


def test_json_statistics_of_resident_experts(open_chat, capsys):
    talk = open_chat("--stats", "json", "--max-tokens", "2")
    answer_line(talk, QUESTION)
    stats = json.loads(capsys.readouterr().err)  # so `cut off` is no line of its own
    assert stats["experts"] is None and stats["finish_reason"] == "length"


def test_nothing_on_stderr_without_statistics(demo_q4):
    done = run(demo_q4, "-p", QUESTION, "--stats", "off", *STREAMED)
    assert done.returncode == 0 and done.stderr == ""


def test_stats_command_tells_the_last_reply(open_chat, capsys):
    """It told the sum since the load, so that one cold reply hid all later ones."""
    talk = open_chat("--stats", "off", *STREAMED, "--drafts", "0")
    answer_line(talk, "/stats")
    assert capsys.readouterr().err == "no reply yet\n"
    for _ in range(2):
        answer_line(talk, QUESTION)
        answer_line(talk, "/clear")
        capsys.readouterr()
    counts, store = talk.last.layers, talk.session.loaded.store
    assert 0 < sum(count.hits for count in counts.values()) < store.counters.hits
    answer_line(talk, "/stats")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("layer ")]
    assert len(lines) == len(counts)
    for line, (layer, count) in zip(lines, counts.items(), strict=True):
        capacity = store.banks[layer].capacity
        words = f"{count.hits:,} of {count.hits + count.misses:,} hits, {capacity} slots, "
        assert line.startswith(f"layer {layer} ") and words in line


def test_trace_is_json_lines(demo_q4, tmp_path):
    path = tmp_path / "trace"
    assert run(demo_q4, "-p", QUESTION, "--trace", path, "--drafts", "0").returncode == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    config = json.loads((demo_q4 / "config.json").read_text())
    for layer, tokens in lines:
        assert config["first_k_dense_replace"] <= layer < config["num_hidden_layers"]
        assert all(len(set(ids)) == config["num_experts_per_tok"] for ids in tokens)
    assert len(lines) > 10


def test_plan_names_what_takes_memory(demo_q4):
    done = run(demo_q4, "--plan", "--context", "2048")
    names = [line[:14].strip() for line in done.stdout.splitlines()]
    memory = ["trunk", "MTP module", "latent cache", "transients", "experts"]
    assert names == [*memory, "together", "allowed"]
    assert "2,048 tokens" in done.stdout and "resident: 32 of 32 per layer" in done.stdout
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("how", [["--plan"], ["-p", "Hi"]])
def test_refused_before_the_load(demo_q4, tmp_path, how):
    refused(run(demo_q4, *how, "--trace", tmp_path / "absent" / "trace"), "cannot be used")
    shutil.copytree(demo_q4, tmp_path / "bare", ignore=shutil.ignore_patterns("mtp.*"))
    done = run(tmp_path / "bare", *how, "--drafts", "2")
    refused(done, "has no `mtp.safetensors`", "python -m convert mtp SOURCE FOLDER")


def test_drafts_of_no_folder_is_no_folder(tmp_path):
    """Not `has no mtp.safetensors`, which is true of every folder that does not exist."""
    refused(run(tmp_path / "absent", "--plan", "--drafts", "2"), "is not a folder")


def test_a_read_error_inside_a_reply(open_chat, capsys, monkeypatch):
    """The error begins its own line, the session continues and knows nothing of the failed turn."""
    talk = open_chat(*STREAMED, "--stats", "off", "--drafts", "0")
    answer_line(talk, QUESTION)
    answer = capsys.readouterr().out
    answer_line(talk, "/clear")
    shown, preadv = [], os.preadv

    def failing(fd, buffers, offset):
        raise OSError(5, "Input/output error")

    class Break:
        """Text of the reply, after whose first pieces the disk fails and the banks are empty."""

        def write(self, text):
            shown.append(text)
            if len(shown) == 3:
                monkeypatch.setattr(os, "preadv", failing)
                for bank in talk.session.loaded.store.banks.values():
                    if not bank.is_resident:  # whose slots nothing fills again
                        bank.forget(bank.expert_in[bank.expert_in >= 0])

        def flush(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Break())
        answer_line(talk, QUESTION)
    monkeypatch.setattr(os, "preadv", preadv)
    text = "".join(shown)
    assert text.endswith("\n") and text[:-1] and answer.startswith(text[:-1]) and text != answer
    assert "Input/output error" in capsys.readouterr().err
    assert not talk.session.conversation.messages
    answer_line(talk, QUESTION)
    assert capsys.readouterr().out == answer


def test_ctrl_c_while_text_is_shown(open_chat, capsys, monkeypatch):
    """A slow terminal: the reply ends there, as when Ctrl-C strikes the model."""
    talk, shown = open_chat(), []

    class Slow:
        def write(self, text):
            shown.append(text)
            if len(shown) == 5:
                raise KeyboardInterrupt

        def flush(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Slow())
        answer_line(talk, QUESTION)
    assert "(stopped)\n[prompt" in capsys.readouterr().err
    kept = talk.session.conversation.messages[-1]["content"]
    assert kept and "".join(shown) == f"{kept}\n"


def test_the_command_line_goes_before_a_kept_chat(open_chat, demo_q4, tmp_path, monkeypatch):
    """`--continue` brings messages, settings and system prompt; what is asked for now counts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    talk = open_chat("-s", "Be brief.", "--temp", "0.5", "--seed", "7")
    talk.turn(QUESTION)
    Kept().save(talk.session, talk.model)
    messages = talk.session.conversation.messages
    assert talk.model == str(demo_q4.resolve()) and len(messages) == 2
    session = open_chat("--continue", "--seed", "8").session
    assert session.conversation.messages == messages
    assert session.conversation.system == "Be brief."
    assert (session.settings["temp"], session.settings["seed"]) == (0.5, 8)
    session = open_chat("--continue", "-s", "Be kind.", "--drafts", "2").session
    assert session.conversation.system == "Be kind." and session.drafts == "2"
    options = chat.make_parser().parse_args(["-c"])
    with chat.open_chat(options).session.loaded as loaded:  # the model is the chat's
        assert loaded.args.vocab_size == talk.session.loaded.args.vocab_size
    assert options.model == talk.model
