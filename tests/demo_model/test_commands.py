"""Every command of a chat with the demo model, in this process; what is kept of a chat."""

import json
import os
import stat

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_dsv3.conversation.session import Session
from mlx_dsv3.conversation.settings import DEFAULTS
from mlx_dsv3.conversation.transcript import read
from mlx_dsv3.errors import UserError
from mlx_dsv3.terminal.clipboard import code_block
from mlx_dsv3.terminal.commands import COMMANDS, choices
from mlx_dsv3.terminal.kept import Kept, chats, newest
from mlx_dsv3.terminal.lines import Lines
from mlx_dsv3.terminal.repl import Chat, answer_line
from mlx_dsv3.terminal.screen import Screen

from .test_chat import QUESTION

ITALY = "And what is the capital of Italy?"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chat(loaded, home):
    chat = Chat(Session(loaded, settings={"max_tokens": 12}, drafts=1), Screen(), model="demo")
    chat.kept = Kept()
    return chat


@pytest.fixture
def say(chat, capsys):
    """Return a function: a line -> what stdout and stderr got."""

    def answered(line: str) -> tuple[str, str]:
        answer_line(chat, line)
        return capsys.readouterr()

    return answered


def messages(chat) -> list[str]:
    return [message["content"] for message in chat.session.conversation.messages]


def test_help_names_every_command_and_every_command_can_be_asked(say):
    told = say("/help")[1]
    assert say("/?")[1] == told
    for name, command in COMMANDS.items():
        assert command.usage in told and command.help in told
        assert command.usage.startswith(name) and command.help in say(f"/help {name[1:]}")[1]
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/regne", "unknown command `/regne`\n\nhint: did you mean `/regen`? `//regne` sends"),
        ("/xyzzy", "unknown command `/xyzzy`\n\nhint: `/help` lists the commands; `//xyzzy`"),
        ("/set tmep 1", "there is no setting `tmep`\n\nhint: did you mean `/set temp`?"),
        ("/set temp hot", "`/set temp` is `hot`; it takes a number from 0 to 1000"),
        ("/set temp 5000", "hint: `/set temp 0` is greedy, `/set temp 0.6` is usual for R1"),
        ("/set max-tokens 0", "hint: `/set max-tokens off` for no limit"),
        ("/set temp", "(temp is 0.0)"),
        ("/set system", "(system is none)"),
        ("/set parameter top_k many", "`/set top-k` is `many`"),
        ("/clear is a command", "`/clear` takes nothing after it, and `is a command` follows"),
        ("/set seed " + "9" * 400, "`/set seed` has more than 100 digits"),
        ("/set stats all", "`/set stats` is `all`\n\nhint: choose line, json or off"),
        ("/set markdown maybe", "hint: choose off or on"),
        ("/set drafts 9", "`/drafts` is `9`"),
        ("/drafts many", "`/drafts` is `many`"),
        ("/think on", "has no variable for thinking"),
        ("/think", "(think is up to the model)"),
        ("/show all", "there is no `/show all`"),
        ("/regen", "there is no question yet"),
        ("/undo", "there is no question to take back"),
        ("/retry", "`/retry N` lacks a number\n\nhint: `/retry 1` takes the first"),
        ("/retry ٣", "there is no question yet"),
        ("/retry 1", "there is no question yet"),
        ("/retry " + "9" * 5000, "takes a number"),
        ("/read", "`/read FILE` lacks the name of a file"),
        ("/read no-such-file", "`no-such-file` cannot be used: no such file"),
        ("/read .", "`.` is not a file"),
        ("/read a\x00b", "a file's name holds no zero byte"),
        ("/read ~no-such-user/x", "`~no-such-user/x` cannot be used"),
        ("/save " + "x" * 300, "file name too long"),
        ("/save", "`/save FILE` lacks the name of a file"),
        ("/save .", "`"),
        ("/save no/folder/chat", "cannot be used: no such file"),
        ("/save two names", "`/save FILE` takes one name, and `names` follows"),
        ("/load no-such-file", "`no-such-file` cannot be used: no such file"),
        ("/copy", "there is no answer yet"),
        ("/trace no/folder/file", "`no/folder/file` cannot be used: no such file"),
        ("/trace .", "`.` cannot be used: is a directory"),
        ("/editor", "there is no line to edit here"),
        ("/stats", "no reply yet"),
        ("/\x1b[2J", r"unknown command `/\x1b[2J`"),
        ("/" + "x" * 10_000, "unknown command"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(chat, say, line, told):
    """An unknown command once went to the model; nothing typed ends the chat."""
    out, err = say(line)
    assert told in err and "Traceback" not in err and "the turn failed" not in err
    assert out == "" and messages(chat) == [] and not chats()


def test_a_whole_conversation(chat, say):
    """/undo, /retry and /regen; /show numbers the questions that /retry takes."""
    first, second = say(QUESTION)[0], say(ITALY)[0]
    assert "Paris" in first and "Rome" in second and len(messages(chat)) == 4
    told = say("/show")[1]
    assert f"1 user: {QUESTION}" in told and f"2 user: {ITALY}" in told
    assert say("/undo")[1] == f"(took back: {ITALY})\n" and len(messages(chat)) == 2
    out, err = say("/regen")
    assert out == first and "at temperature 0 the reply will be the same" in err
    say(ITALY)
    assert say("/retry 1")[0] == first and len(messages(chat)) == 2
    assert "there is no question 2; the chat has 1" in say("/retry 2")[1]
    assert "reply" in say("/stats")[1] and "questions" in say("/context")[1]
    assert "<" in say("/show prompt")[1] and "demo" in say("/show model")[1]
    assert "experts" in say("/plan")[1]
    assert say("/clear") == ("", "(cleared)\n") and messages(chat) == []


def test_a_message_may_begin_with_a_slash(chat, say):
    say("//no command")
    assert messages(chat)[0] == "/no command"


@pytest.mark.parametrize("drafts", ["0", "2"])
def test_settings_count_from_the_next_reply_on(chat, say, drafts):
    """Same seed, same reply, with and without drafts; `off` is as if nothing were set."""
    greedy = say(QUESTION)[0]
    for line in (f"/drafts {drafts}", "/set temp 9", "/set top-k 50", "/set seed 7"):
        assert say(line)[1].startswith("(")
    replies = [say("/retry 1")[0], say("/set seed 8")[0] + say("/retry 1")[0]]
    say("/set seed 7"), say("/drafts auto" if drafts == "0" else "/drafts 0")
    assert say("/retry 1")[0] == replies[0] != replies[1]
    say("/set temp off")
    assert say("/regen")[0] == greedy
    told = say("/set")[1]
    for name in DEFAULTS:
        assert f"  {name.replace('_', '-')} " in told
    assert "seed                7\n" in told and "max-tokens          12\n" in told
    say("/set max-tokens off"), say("/set markdown off"), say("/set stats off")
    assert chat.session.settings["max_tokens"] is None
    assert chat.screen.markdown is False and chat.screen.stats == "off"


def test_the_system_prompt_changes_and_goes(chat, say):
    say("/system Be brief.")
    assert "Be brief." in chat.session.conversation.prompt()
    assert "removed the system prompt: Be brief." in say("/system")[1]
    say("/set system Be\nlong.")
    assert chat.session.conversation.system == "Be\nlong."
    assert r"system              Be\nlong." in say("/show settings")[1]


def test_a_template_that_refuses_a_system_prompt(chat, say, monkeypatch):
    """Every later reply would have failed."""
    tokenizer = chat.session.loaded.tokenizer._tokenizer
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no!') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + tokenizer.chat_template)
    assert "no!" in say("/system Be brief.")[1]
    assert chat.session.conversation.system is None and "Paris" in say(QUESTION)[0]


def test_a_file_goes_with_a_message(chat, say, home):
    (home / "my notes.txt").write_text("Rome is old.")
    (home / "long").write_bytes(bytes((2 << 20) + 1))
    assert "`long` is too large: 2,097,153 bytes" in say("/read long")[1]
    told = say("/read ~/my\\ notes.txt")[1]
    assert "12 characters" in told and "they go with the next message" in told
    say("Is it?")
    assert messages(chat)[0] == "Is it?\n\nRome is old."
    say('/read "my notes.txt" And now?')
    assert messages(chat)[2] == "And now?\n\nRome is old."
    say("Bye")
    assert messages(chat)[4] == "Bye"


@pytest.mark.parametrize("option", ["", " --with-cache"])
def test_a_saved_chat_goes_on_elsewhere(chat, say, home, loaded, option):
    """With its cache nothing is computed again."""
    say("/set seed 5"), say("/system Be brief."), say(QUESTION)
    told = f"(saved to {home}/chat.json{', with its cache' * bool(option)})\n"
    assert say(f"/save ~/chat.json{option}")[1] == told
    assert stat.S_IMODE((home / "chat.json").stat().st_mode) == 0o600
    expected = say(ITALY)[0]
    say("/clear"), say("/system"), say("/set seed 0"), say("Hello")
    assert say("/load chat.json")[1] == "(1 question; `/show` shows the conversation)\n"
    assert chat.session.settings["seed"] == 5
    assert say(ITALY)[0] == expected
    assert bool(chat.last.stats.reused_tokens) == bool(option)
    assert [read(path).messages[0]["content"] for path in chats()] == [QUESTION, "Hello", QUESTION]


def test_no_other_file_is_written_over(chat, say, home):
    (home / "notes.txt").write_text("mine")
    say(QUESTION)
    assert "exists and is not a saved chat" in say("/save notes.txt")[1]
    assert (home / "notes.txt").read_text() == "mine"
    assert "error: " in say("/load notes.txt")[1] and len(messages(chat)) == 2


def test_the_answer_is_copied(chat, say, home, monkeypatch):
    program = home / "wl-copy"
    program.write_text('#!/bin/sh\ncat > "$HOME/copied"\n')
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    answer = say(QUESTION)[0].strip()
    assert "by wl-copy" in say("/copy")[1] and (home / "copied").read_text() == answer
    chat.session.conversation.knows_thoughts = True
    chat.session.conversation.messages[-1]["content"] = f"<think>Hm.</think>\n\n{answer}"
    assert "by wl-copy" in say("/copy")[1] and (home / "copied").read_text() == answer
    assert "has no code block 1; it has 0" in say("/copy code 1")[1]
    program.write_text("#!/bin/sh\nexit 1\n")
    assert "there is no clipboard" in say("/copy")[1]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    assert "there is no clipboard" in say("/copy")[1]
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b]52;c;" in say("/copy")[1]


def test_code_blocks():
    answer = "a\n```py\nx = 1\n```\n~~~\n```\n~~~\n```\nopen"
    assert [code_block(answer, n) for n in (1, 2)] == ["x = 1\n", "```\n"]
    with pytest.raises(UserError, match="no code block 3"):
        code_block(answer, 3)


def test_the_choices_of_tab(home, monkeypatch):
    (home / "a file").touch(), (home / "folder").mkdir(), (home / ".hidden").touch()
    assert choices("/re") == ["/read", "/regen", "/retry"] and choices("re") == []
    assert choices("/read ") == choices("/save ") == ["a\\ file", "folder/"]
    assert choices("/read a\\ f") == choices("/load ./a")[:0] + ["a\\ file"]
    assert choices("/load ~/f") == ["~/folder/"] and choices("/trace .h") == [".hidden"]
    assert "top-p" in choices("/set ") and choices("/set top-") == ["top-p", "top-k"]
    assert choices("/set stats ") == ["line", "json", "off"] and choices("/set temp ") == []
    assert choices("/show s") == ["settings"] and choices("/think o") == ["off", "on"]
    assert choices("hello /re") == [] and choices("") == [] and choices("/read /no/such/") == []


def test_an_editor_writes_the_next_message(chat, say, home, monkeypatch):
    editor = home / "editor"
    editor.write_text('#!/bin/sh\nkill -INT $PPID\nsleep 0.2\nprintf more >> "$1"\n')
    editor.chmod(0o700)
    monkeypatch.setenv("VISUAL", str(editor))
    with create_pipe_input() as keys:
        chat.lines = Lines(input=keys, output=DummyOutput())
        say("/editor Some")
        keys.send_text("!\r\r")
        assert (chat.lines.read(), chat.lines.read()) == ("Somemore!", "")
    monkeypatch.setenv("VISUAL", "false")
    assert "the editor `false` ended with status 1" in say("/editor")[1]


def test_a_reply_that_fails_in_any_way_keeps_the_chat(chat, say, monkeypatch):
    """MemoryError too."""
    first = say(QUESTION)[0]
    with monkeypatch.context() as patch:
        patch.setattr(chat.session.loaded.model, "hidden", out_of_memory, raising=False)
        patch.setattr("mlx_dsv3.conversation.session.run", out_of_memory)
        assert "MemoryError" in say(ITALY)[1]
    assert len(messages(chat)) == 2 and read(newest()).messages[0]["content"] == QUESTION
    assert say("/regen")[0] == first


def out_of_memory(*_, **__):
    raise MemoryError


def test_each_chat_is_kept_in_its_own_file(chat, say, loaded, home):
    """Two at once never mix; the question is kept before its reply."""
    other = Chat(Session(loaded), Screen(), model="other")
    other.kept = Kept()
    seen = []
    show = chat.screen.show
    chat.screen.show = lambda event: (seen.append(read(newest()).messages), show(event))
    say(QUESTION)
    assert seen[0] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ""},
    ]
    assert read(newest()).messages == chat.session.conversation.messages
    answer_line(other, ITALY)
    assert [read(newest(name)).messages[0]["content"] for name in ("demo", "other")] == [
        QUESTION,
        ITALY,
    ]
    assert newest() == newest("other")
    for path in chats():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="no chat of `third` is kept"):
        newest("third")


def test_the_newest_chats_stay(chat, say, home, monkeypatch):
    monkeypatch.setattr("mlx_dsv3.terminal.kept.MOST_CHATS", 3)
    chat.session.settings["max_tokens"] = 1
    for i in range(5):
        say(f"{i}"), say("/clear")
    assert [read(path).messages[0]["content"] for path in chats()] == ["4", "3", "2"]
    newest().write_text("damaged")
    assert read(newest()).messages[0]["content"] == "3"


@pytest.mark.parametrize("trouble", ["no folder", "full"])
def test_a_chat_that_cannot_be_kept_is_told_once(chat, say, home, monkeypatch, trouble):
    """And it is kept again when it can be."""
    with monkeypatch.context() as patch:
        if trouble == "full":
            patch.setattr("mlx_dsv3.conversation.transcript.os.replace", full)
        else:
            (home / ".mlx_dsv3").write_text("in the way")
        told = say(QUESTION)[1] + say(ITALY)[1] + say("/undo")[1]
    assert told.count("warning: this chat is not kept: ") == 1 and len(messages(chat)) == 2
    if trouble == "full":
        assert not list((home / ".mlx_dsv3/sessions").iterdir())
        say("/help")
        assert read(newest()).messages == chat.session.conversation.messages


def full(*_):
    raise OSError(28, "No space left on device")


def test_the_experts_chosen_are_traced(chat, say, home):
    assert "experts are traced to my trace" in say("/trace my\\ trace")[1]
    say(QUESTION)
    assert say("/trace off")[1] == "(no trace)\n"
    size = (home / "my trace").stat().st_size
    say(ITALY)
    lines = (home / "my trace").read_text().splitlines()
    assert (home / "my trace").stat().st_size == size
    assert {json.loads(line)[0] for line in lines} >= {1, 2, 3}
    assert json.loads(lines[0])[1][0]
    (home / "notes").write_text("mine")
    assert "`notes` exists and is not a trace" in say("/trace notes")[1]
    assert (home / "notes").read_text() == "mine"
    assert "are traced to my trace" in say("/trace my trace")[1]
