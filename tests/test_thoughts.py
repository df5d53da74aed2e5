"""A reply as it comes, told apart into its thoughts and its answer."""

import random

import pytest

from mlx_dsv3.conversation.thoughts import Thoughts, split

# Where the prompt has opened a thought, whether there may be one, a reply: its thought, its answer.
REPLIES = [
    (True, True, "hmm</think>\n\nParis", "hmm", "Paris"),
    (True, True, "\nhmm\n</think>Paris", "hmm\n", "Paris"),
    (True, True, "</think>Paris", "", "Paris"),
    (True, True, "hmm", "hmm", ""),
    (True, True, "a <think> b</thin", "a <think> b</thin", ""),
    (True, True, "<think>\nhmm</think>Paris", "hmm", "Paris"),
    (True, True, " \n<think>hmm", "hmm", ""),
    (True, True, "<thing> is</think>a", "<thing> is", "a"),
    (False, True, "<think>\nhmm</think>\n\nParis", "hmm", "Paris"),
    (False, True, "\n<think>hmm</think>Paris", "hmm", "Paris"),
    (False, True, "Paris <think>hmm</think>", "", "Paris <think>hmm</think>"),
    (False, True, "Paris</think>", "", "Paris</think>"),
    (False, True, "<think>a</think>b</think>c", "a", "b</think>c"),
    (False, True, "<thi", "", "<thi"),
    (False, True, "  ", "", "  "),
    (False, False, "<think>hmm</think>Paris", "", "<think>hmm</think>Paris"),
    (False, False, "\n\nParis", "", "\n\nParis"),
]


@pytest.mark.parametrize("starts_inside, may_think, reply, thought, answer", REPLIES)
def test_however_it_is_cut(starts_inside, may_think, reply, thought, answer):
    """A tag may come in pieces, and what only begins like one is text."""
    rng = random.Random(0)
    for _ in range(30):
        thoughts, rest, found = Thoughts(starts_inside, may_think), reply, {True: "", False: ""}
        while rest:
            size = rng.randint(0, 5)
            for is_thought, text in thoughts.feed(rest[:size]):
                found[is_thought] += text
            rest = rest[size:]
        for is_thought, text in thoughts.end():
            found[is_thought] += text
        assert (found[True], found[False]) == (thought, answer)
        assert thoughts.had_thought == (starts_inside or bool(thought))


def test_nothing_waits_that_is_no_tag():
    """A reader sees each word when it comes."""
    thoughts = Thoughts(starts_inside=False)
    assert thoughts.feed("<") == [] and thoughts.feed("b> ") == [(False, "<b> ")]
    assert thoughts.feed("Paris <") == [(False, "Paris <")]


@pytest.mark.parametrize(
    "reply, parts",
    [
        ("<think>\nhmm</think>\n\nA", ("\nhmm", "\n\nA")),
        ("hmm</think>A</think>B", ("hmm", "A</think>B")),
        ("A", ("", "A")),
    ],
)
def test_a_whole_reply(reply, parts):
    """What was written stays, line ends too: the template decides what it takes."""
    assert split(reply) == parts
