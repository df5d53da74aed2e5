"""Whole chats as a person has them, at a terminal: what is typed, and what stands on the screen.

A chat takes seconds to start: each of these tests is one chat, or a few that go on.
"""

import re
import signal

from pseudo_terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_R, ENTER, TAB, UP

from demo_model.test_chat import QUESTION

PARIS, ROME = "The capital of France is Paris.", "The capital of Italy is Rome."
TOKYO, MADRID = "The capital of Japan is Tokyo.", "The capital of Spain is Madrid."
BANANA = "The colour of a banana is yellow."
STATISTICS = re.compile(r"\n?\[prompt \d+ \((\d+) reused\), first token .* s; reply \d+, .*\]\Z")
SETTINGS = """\
  temp                0.0
  top-p               1.0
  top-k               0
  min-p               0.0
  repetition-penalty  1.0
  seed                7
  max-tokens          none
  drafts              auto
  think               up to the model
  system              You are brief.
  stats               line
  markdown            on
  hide-thinking       off"""


def answer(said: str) -> str:
    """Return a reply without its line of statistics."""
    assert STATISTICS.search(said), said
    return STATISTICS.sub("", said)


def reused(said: str) -> int:
    return int(STATISTICS.search(said)[1])


def refused(said: str, *words: str) -> None:
    """Check a refusal: one sentence and a hint."""
    assert re.fullmatch(r"error: .+\n\nhint: .+", said), said
    assert all(word in said for word in words), said


def test_a_day_at_the_terminal(open_terminal, tmp_path):
    """Turns, messages of many lines, every command, mistakes: one chat answers them all."""
    (tmp_path / "fruit.txt").write_text("A banana is yellow.\n")
    terminal = open_terminal(columns=200, home=tmp_path, cwd=tmp_path)
    assert terminal.until_prompt() == "/help lists commands"
    ask = terminal.ask

    # Two turns, and a message of several lines: typed, and pasted.
    assert answer(ask(QUESTION)) == PARIS
    second = ask("And of Japan?")
    assert answer(second) == TOKYO and reused(second) > 20
    terminal.type('"""' + ENTER + "And" + ENTER)
    terminal.until(r"\.\.\. And\n\.\.\.\Z")
    assert answer(ask('of Italy?"""')) == ROME
    terminal.type("And" + ALT_ENTER)
    assert answer(ask("of Spain?").partition("\n")[2]) == MADRID
    assert ask("/show messages") == (
        f"1 user: {QUESTION}\nassistant: {PARIS}\n2 user: And of Japan?\nassistant: {TOKYO}\n"
        f"3 user: And\nof Italy?\nassistant: {ROME}\n4 user: And\nof Spain?\nassistant: {MADRID}"
    )
    pasted = "\n".join(f"line {i}" for i in range(40))
    terminal.paste(pasted)
    assert STATISTICS.search(ask(""))
    assert f"5 user: {pasted}\nassistant: " in ask("/show messages")
    assert ask("/undo").startswith("(took back: line 0 line 1 line 2 ")

    # 10,000 characters, and Ctrl-C while the prompt is computed: nothing of the bar stays.
    terminal.type("x" * 10_000 + ENTER)
    terminal.until(r"prompt [\d,]+ of 10,\d+ tokens, .* left")
    terminal.type(CTRL_C)
    assert terminal.until_prompt() == "\n(stopped)"
    assert ask("/undo") == f"(took back: {'x' * 60}...)"

    # Another answer, an earlier question.
    said = ask("/regen")
    assert said.startswith("(at temperature 0 the reply will be the same") and MADRID in said
    assert answer(ask("/retry 2")) == TOKYO
    refused(ask("/retry 9"), "there is no question 9; the chat has 2")

    # Mistakes: nothing of them reaches the model.
    refused(ask("/regenn"), "unknown command `/regenn`", "did you mean `/regen`?")
    refused(ask("/read absent.txt"), "`absent.txt`", "no such file")
    refused(ask("/load fruit.txt"), "`fruit.txt` is not JSON")
    refused(ask("/save fruit.txt"), "exists and is not a saved chat")
    refused(ask("/set temperature 1"), "did you mean `/set temp`?")
    refused(ask("/set temp hot"), "`/set temp` is `hot`; it takes a number from 0 to 1000")
    refused(ask("/drafts 9"), "`/drafts` is `9`")
    refused(ask("/think on"), "has no variable for thinking")

    # Settings, files, and what is said of them.
    assert ask("/set seed 7") == "(seed is 7)"
    assert ask("/system You are brief.") == "(the system prompt counts from the next reply on)"
    assert ask("/set") == SETTINGS
    assert ask("/save talk.json --with-cache") == "(saved to talk.json, with its cache)"
    assert ask("/clear") == "(cleared)" and ask("/show") == "system: You are brief."
    assert ask("/load talk.json") == "(2 questions; `/show` shows the conversation)"
    assert f"2 user: And of Japan?\nassistant: {TOKYO}" in ask("/show messages")
    said = ask("/read fruit.txt What colour is a banana?")
    assert answer(said) == f"(fruit.txt: 20 characters, 8 tokens)\n{BANANA}"
    for line, words in SHOWN.items():
        assert re.search(words, ask(line)), line
    assert answer(ask("//help me")), "a message that begins with a slash"

    # Keys: completion, the lines typed before, Ctrl-R, a line that is given up.
    terminal.type("/rea" + TAB + " fr" + TAB)
    assert ask("").startswith("(fruit.txt: 20 characters, 8 tokens; they go with the next message)")
    terminal.type(UP + UP)  # past /read
    terminal.until("//help me")
    terminal.type(CTRL_C + CTRL_R + "Japan")
    terminal.until("And of Japan")
    terminal.type(CTRL_C + CTRL_C)
    assert "(/exit or Ctrl-D leaves)" in terminal.until_prompt()
    terminal.type(CTRL_D)
    assert terminal.end() == 0 and terminal.is_restored()


SHOWN = {
    "/show settings": "seed +7",
    "/show model": "type +deepseek_v3, 4 layers",
    "/show prompt": rf"You are brief.<｜User｜>{re.escape(QUESTION)}<｜Assistant｜>The capital of ",
    "/copy": r"\(copied 33 characters by ",
    "/stats": "reply +11 tokens, ",
    "/context": r"questions +\S+ +\d+\n",
    "/plan": r"experts +.* GB   resident: 32 of 32 per layer",
    "/drafts 1": r"\(drafts is 1\)",
    "/trace trace.jsonl": r"\(experts are traced to trace.jsonl\)",
    "/trace off": r"\(no trace\)",
    "/set markdown off": r"\(markdown is off\)",
    "/help": r"/retry N +answer question N again",
}


def test_ctrl_c_at_all_times_and_a_window_that_changes(open_terminal, tmp_path):
    """A reply that is stopped is kept, a second Ctrl-C ends nothing, the window may change."""
    endless = ("--temp", "30", "--seed", "4")  # the demo model rambles on until it is stopped
    terminal = open_terminal(*endless, home=tmp_path)
    terminal.until_prompt()
    terminal.type("Tell me something long." + ENTER)
    terminal.until(r"long\.\n(.*\n){5,}")
    terminal.resize(50, 20)
    terminal.until(r"(.*\n){5,}")
    terminal.type(CTRL_C + CTRL_C)
    said = terminal.until_prompt()
    assert "(stopped)" in said
    terminal.resize(100, 40)
    assert terminal.ask("/set temp 0") == "(temp is 0.0)"
    said = terminal.ask(QUESTION)
    assert "Paris" in said and reused(said) > 10
    shown = terminal.ask("/show messages")
    assert shown.startswith("1 user: Tell me something long.\nassistant: ") and PARIS in shown
    terminal.type("/set temp 30" + ENTER)
    terminal.until_prompt()
    terminal.type("Another." + ENTER)
    terminal.until(r"Another\.\n(.*\n){3,}")
    terminal.type(CTRL_C * 12)
    terminal.until_prompt()
    assert terminal.ask("/show messages").count("user: ") >= 2
    terminal.type("/exit" + ENTER)
    assert terminal.end() == 0 and terminal.is_restored()


def test_a_chat_goes_on_however_it_ended(open_terminal, tmp_path):
    """Each chat takes up the one before: after /exit, Ctrl-D, SIGTERM, SIGHUP and SIGKILL."""
    endings = {"/exit": 0, "Ctrl-D": 0, "SIGTERM": -15, "SIGHUP": -1, "SIGKILL": -9}
    asked = []
    for way, status in endings.items():
        terminal = open_terminal(*["--continue"] * bool(asked), home=tmp_path)
        terminal.until_prompt()
        shown = terminal.ask("/show messages")
        assert [line for line in asked if line not in shown] == [], way
        terminal.ask("/set temp 0")
        asked.append(f"{len(asked) + 1} user: {QUESTION}\nassistant:")
        assert "Paris" in terminal.ask(QUESTION)
        if way.startswith("SIG"):
            terminal.ask("/set temp 30")
            asked.append(f"{len(asked) + 1} user: Ramble.\nassistant:")
            terminal.type("Ramble." + ENTER)
            terminal.until(r"Ramble\.\n(.*\n){3,}")
            terminal.send(getattr(signal, way))
        else:
            terminal.type("/exit" + ENTER if way == "/exit" else CTRL_D)
        assert terminal.end() == status, way
        assert terminal.is_restored() or way == "SIGKILL"
        terminal.close()
    terminal = open_terminal("--continue", home=tmp_path)
    terminal.until_prompt()
    shown = terminal.ask("/show messages")
    assert [line for line in asked if line not in shown] == []
