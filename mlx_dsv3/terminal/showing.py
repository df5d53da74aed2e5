"""What commands show of a chat, on stderr: the conversation, settings, the model, statistics.

What a message or a template holds comes from outside. Model code is imported inside functions.
"""

import sys
from contextlib import redirect_stdout

from mlx_dsv3.errors import UserError, visible
from mlx_dsv3.terminal.adjust import settings_lines

PARTS = ("messages", "settings", "model", "prompt")
LONGEST_SHOWN = 60  # characters of a message that is only named


def say(text: str) -> None:
    print(visible(text), file=sys.stderr)


def brief(text: str) -> str:
    """Return the beginning of a message, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_SHOWN else f"{line[:LONGEST_SHOWN]}..."


def show(chat, text: str) -> None:
    part, session = text or PARTS[0], chat.session
    if part not in PARTS:
        raise UserError(f"there is no `/show {part}`", f"choose {', '.join(PARTS)}")
    if part == "messages":
        say("\n".join(message_lines(session.conversation)) or "(no message yet)")
    elif part == "settings":
        say("\n".join(settings_lines(chat)))
    elif part == "prompt":
        say(session.conversation.prompt() or "(no message yet)")
    else:
        say("\n".join(model_lines(chat)))


def message_lines(conversation) -> list[str]:
    """Return the conversation with its questions numbered, for /retry."""
    lines = [f"system: {conversation.system}"] if conversation.system else []
    for i, message in enumerate(conversation.messages):
        number = f"{i // 2 + 1} " if message["role"] == "user" else ""
        lines.append(f"{number}{message['role']}: {message['content']}")
    return lines


def model_lines(chat) -> list[str]:
    loaded, args = chat.session.loaded, chat.session.loaded.args
    return [
        f"  model     {chat.model}",
        f"  type      {loaded.config.get('model_type')}, {args.num_hidden_layers} layers",
        f"  experts   {loaded.plan.experts_words}",
        f"  MTP       {'none' if loaded.mtp is None else 'there'}",
        f"  context   {loaded.plan.context:,} tokens; {args.max_position_embeddings:,} at most",
    ]


def taken_up(session) -> str:
    """Say what a chat that goes on holds already."""
    count = session.conversation.num_questions
    return f"({count} question{'s' * (count != 1)}; `/show` shows the conversation)"


def show_stats(chat, text: str) -> None:
    from mlx_dsv3.terminal.statistics import stats_lines

    say("\n".join(stats_lines(chat.last, chat.session)) if chat.last else "no reply yet")


def show_context(chat, text: str) -> None:
    from mlx_dsv3.terminal.statistics import context_lines

    say("\n".join(context_lines(chat.session)))


def show_plan(chat, text: str) -> None:
    from mlx_dsv3.terminal.start import print_plan

    with redirect_stdout(sys.stderr):
        print_plan(chat.session.loaded.plan)
