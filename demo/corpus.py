"""Write the demo model's corpus: short conversations made from the tables of `facts.toml`.

The script is the source and the text is not committed: the same seed gives the same
conversations. It knows nothing about tokens or models. About one wording x thing pair in twenty
never enters the corpus (`is_withheld`); held-out prompts are made from those pairs alone. The
questions of `questions.json` are kept out word for word, and those marked "new" must not occur
even with another thing in their place (`check_questions`): that is what makes the score a measure
of more than memory.
"""

import argparse
import json
import random
import re
import zlib
from pathlib import Path

from demo.facts import Attribute, Domain, load
from mlx_dsv3.errors import run_program

HERE = Path(__file__).parent

# Frames around a noun phrase ("the capital of France"). A polite one is answered with "Yes." first.
NOUN_FRAMES = (
    "what is {n}?|what's {n}?|tell me {n}.|please tell me {n}.|I would like to know {n}.|"
    "I want to know {n}.|{n}?|{n}, please.|I forgot {n}.|what would be {n}?|give me {n}.|"
    "name {n}.|remind me of {n}.|I am looking for {n}.|I need {n}.|"
    "my friend asked me about {n}.|I wonder what {n} is.|tell me what {n} is.|"
    "my question is about {n}.|we are talking about {n}. What is it?|"
    "I have to find out {n}.|I am not sure about {n}.|and what is {n}?|what was {n} again?|"
    "please give me {n}.|help me to remember {n}.|what do you think is {n}?|"
    "let me know {n}.|what is {n} then?|I do not know {n}. Do you?|"
    "what did you say is {n}?|teach me {n}.|in school we learned {n}, but I forgot it.|"
    "could it be that you know {n}?|everybody knows {n} but me.|"
    "if I ask you for {n}, what do you say?"
).split("|")
POLITE_NOUN_FRAMES = (
    "can you tell me {n}?|could you tell me {n}, please?|do you know {n}?|"
    "do you remember {n}?|do you know what {n} is?|can you help me with {n}?|"
    "would you tell me {n}?|can you name {n}?|could you say what {n} is?|"
    "would you please name {n}?"
).split("|")
INDIRECT_FRAMES = (
    "tell me {n}.|please tell me {n}.|I wonder {n}.|I would like to know {n}.|"
    "I want to know {n}.|I do not know {n}.|I forgot {n}.|my friend asked me {n}.|"
    "my son wants to know {n}.|explain {n}.|I am not sure {n}.|let me know {n}.|"
    "I was thinking about {n}.|it is not clear to me {n}.|I have to find out {n}.|"
    "I am curious {n}.|my teacher asked {n}.|who knows {n}?|please explain {n}.|"
    "tell me again {n}.|what do you think, {n}?|I never understood {n}.|"
    "help me to remember {n}."
).split("|")
POLITE_INDIRECT_FRAMES = (
    "do you know {n}?|can you tell me {n}?|could you tell me {n}?|"
    "could you please tell me {n}?|do you remember {n}?|can you say {n}?|"
    "would you tell me {n}?|can you explain {n}?|have you heard {n}?"
).split("|")
OPENERS = (
    "||||||hey, |hi, |so |okay, |and |please tell me, |tell me, |quick question: |"
    "one more question: |I wonder, |I was wondering, |sorry, but |well, |now |"
    "next question: |another question: |hello! |I want to know: |a question for you: |"
    "let me ask: |I would like to know: |say, |good, "
).split("|")
CLOSERS = (
    "?|?|?|?|?|, please?|? I forgot.|? Please tell me.|? Thanks.|, do you know?|, can you say?"
).split("|")
PREAMBLES = (
    "I am doing my homework.|My son asked me this.|My daughter wants to know this.|"
    "We play a quiz.|It is raining today.|I am writing a book.|I have a question.|"
    "I am curious.|My teacher asked us.|I read about this yesterday.|I am at school.|"
    "We talked about this at home.|I like to learn.|Help me, please.|I am going on a trip.|"
    "I saw it on TV.|This is for a test.|My friend does not know.|"
    "I am sitting in the garden.|I just had lunch.|I will visit my family tomorrow.|"
    "I have a small problem.|Here is an easy one.|You know a lot.|Let us try this.|"
    "I hope you can help.|I was thinking.|I am learning English.|I went to a museum.|"
    "Maybe you know this.|I want to paint a picture.|My brother and I are not sure.|"
    "I need this for work.|Let us start.|I am on the train."
).split("|")
POSTAMBLES = (
    "It is for my homework.|I forgot it.|I really want to know.|Thank you.|"
    "My friend asked me.|I hope you know it.|I never learned it.|Please be short.|"
    "I mean it.|We have a bet."
).split("|")
TAILS = (
    " in general| in your opinion| normally| as far as you know| these days| if I may ask|"
    " at the moment| when you think about it| for a child| usually| most of the time|"
    " in fact| when it is big| when it rains| in the morning| in summer| after all|"
    " in a few words"
).split("|")
# Sentences that bring a thing up before "it" is asked about.
INTROS = (
    "I have {a}.|I saw {a} today.|Let us talk about {a}.|Think of {a}.|I like {a}.|"
    "Take {a}.|My daughter likes {a}.|I read about {a}.|My question is about {a}.|"
    "There is {a} in my book.|We learn about {a} in school.|I dreamed of {a}.|Look at {a}.|"
    "Imagine {a}.|About {a}:|Do you know {a}?|Here is a picture of {a}.|"
    "I know little about {a}.|Say I have {a}.|My son talks about {a} all day.|"
    "Take {a}, for example."
).split("|")
SMALL_WORDS = set("the is of a an do does me what which that are in to you for has have".split())
FILLERS = (
    "please really actually usually exactly now then maybe just simply well today only normally "
    "nice good"
).split()
SAME_FOR = (
    "and {a}?|what about {a}?|how about {a}?|and what about {a}?|and for {a}?|"
    "the same for {a}?|and how about {a}?|now {a}.|{a}?|and with {a}?|okay, and {a}?"
).split("|")
SYSTEMS = (
    "You are a helpful assistant.|You are a friendly assistant. Answer in short sentences.|"
    "Answer the questions of the user.|You are the demo model of mlx_dsv3.|Be brief.|"
    "You are a small language model that answers simple questions.|"
    "Answer kindly and briefly.|You help a curious person."
).split("|")

WITHHELD_SHARE = 20  # one pair in so many


def capitalise(text: str) -> str:
    """Upper-case the first letter, except in our own names."""
    return text if text.startswith("mlx_dsv3") else text[:1].upper() + text[1:]


def fill(template: str, fields: dict[str, str]) -> str:
    """Put a thing's fields into a template; `{E}` and `{A}` open a sentence."""
    extra = {k.upper(): capitalise(fields[k]) for k in ("e", "a") if k in fields}
    return template.format(**fields, **extra)


def needed_fields(template: str) -> set[str]:
    return {name.lower() if name in "EA" else name for name in re.findall(r"{(\w+)}", template)}


def applies(attribute: Attribute, fields: dict[str, str]) -> bool:
    return needed_fields(attribute.answer) <= fields.keys()


def is_withheld(template: str, thing: str) -> bool:
    """Say whether this wording never meets this thing in the corpus (a fixed hash decides)."""
    return zlib.crc32(f"{template}|{thing}".encode()) % WITHHELD_SHARE == 0


def with_wrong_value(
    rng, domain: Domain, attribute: Attribute, fields: dict[str, str]
) -> dict[str, str]:
    """Add `w`, another thing's value of the same attribute."""
    values = {t[attribute.key] for t in domain.things.values() if attribute.key in t}
    wrong = sorted(values - {fields.get(attribute.key)})
    return fields | {"w": rng.choice(wrong)} if wrong else fields


FRAMES = {
    "nouns": (NOUN_FRAMES, POLITE_NOUN_FRAMES),
    "indirect": (INDIRECT_FRAMES, POLITE_INDIRECT_FRAMES),
}


def frame(rng, kind: str, template: str, fields: dict[str, str]) -> tuple[str, str]:
    """Wrap a template into a question; return it with the opening of its answer."""
    body = fill(template, fields)
    if kind in FRAMES:
        plain, polite = FRAMES[kind]
        is_polite = rng.random() < 0.3
        chosen = rng.choice(polite if is_polite else plain)
        return capitalise(chosen.format(n=body)), "Yes. " if is_polite else ""
    opener, closer = rng.choice(OPENERS), rng.choice(CLOSERS)
    if rng.random() < 0.1:
        closer = rng.choice(TAILS) + "?"
    if body.startswith(("tell ", "give ", "describe ", "say ", "let ", "explain ", "add ", "I ")):
        closer = "."
    return capitalise(opener + body + closer), ""


def drop_or_add_words(rng, text: str) -> str:
    """Leave out some small words, or put a filler in, as hurried people do."""
    words = text.split(" ")
    if rng.random() < 0.5:
        words = [w for w in words if w.lower() not in SMALL_WORDS or rng.random() > 0.35] or words
    else:
        words.insert(rng.randrange(len(words)), rng.choice(FILLERS))
    return " ".join(words)


def roughen(rng, text: str) -> str:
    """Type some questions the way people do: a word too few, a preamble, no capitals, no mark."""
    if rng.random() < 0.12:
        text = capitalise(drop_or_add_words(rng, text))
    if rng.random() < 0.18:
        text = f"{rng.choice(PREAMBLES)} {text}"
    elif rng.random() < 0.06:
        text = f"{text} {rng.choice(POSTAMBLES)}"
    if rng.random() < 0.12:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip("?.")
    return text


def ask(
    rng, domain: Domain, thing: str, attribute: Attribute, *, withheld=False
) -> tuple[str, str] | None:
    """Return a question and its answer, or None when the drawn pair is not wanted."""
    fields = with_wrong_value(rng, domain, attribute, domain.things[thing])
    kind = rng.choices(("nouns", "direct", "indirect"), (33, 45, 22))[0]
    if not getattr(attribute, kind):
        kind = "direct"
    template = rng.choice(getattr(attribute, kind))
    if not needed_fields(template) <= fields.keys() or is_withheld(template, thing) != withheld:
        return None
    question, opening = frame(rng, kind, template, fields)
    return question, opening + capitalise(fill(attribute.answer, fields))


def draw_topic(rng) -> tuple[Domain, str, Attribute]:
    """Draw a domain by weight, then a thing and an attribute it has."""
    domains, _ = load()
    domain = rng.choices(domains, [d.weight for d in domains])[0]
    thing = rng.choice(list(domain.things))
    usable = [a for a in domain.attributes if applies(a, domain.things[thing])]
    return domain, thing, rng.choice(usable)


def introduce(rng, domain: Domain, thing: str, attribute: Attribute) -> tuple[str, str]:
    """Bring a thing up in a sentence and ask about "it"."""
    fields = with_wrong_value(rng, domain, attribute, domain.things[thing])
    intro = rng.choice(INTROS).format(a=fields.get("a", fields["e"]))
    question = fill(rng.choice(attribute.follow), fields)
    opener = rng.choice(("", "", "", "and ", "now ", "so ", "tell me, "))
    closer = "." if question.startswith(("tell", "explain")) else "?"
    answer = capitalise(fill(attribute.answer, fields))
    return f"{intro} {capitalise(opener + question + closer)}", answer


def new_topic(rng, context) -> tuple[str, str, tuple]:
    """Ask about something new."""
    while True:
        topic = draw_topic(rng)
        if topic[2].follow and rng.random() < 0.12:
            question, answer = introduce(rng, *topic)
            return roughen(rng, question), answer, topic
        if asked := ask(rng, *topic):
            return roughen(rng, asked[0]), asked[1], topic


def same_thing(rng, context):
    """Ask for another attribute of "it"."""
    domain, thing, last = context
    fields = with_wrong_value(rng, domain, last, domain.things[thing])
    usable = [a for a in domain.attributes if a is not last and a.follow and applies(a, fields)]
    if not usable:
        return None
    attribute = rng.choice(usable)
    fields = with_wrong_value(rng, domain, attribute, fields)
    text = fill(rng.choice(attribute.follow), fields)
    opener = rng.choice(("", "", "", "and ", "and ", "okay, ", "so ", "tell me, ", "good. And "))
    closer = "." if text.startswith(("tell", "explain")) else "?"
    question = capitalise(opener + text + closer)
    return (
        roughen(rng, question),
        capitalise(fill(attribute.answer, fields)),
        (domain, thing, attribute),
    )


def same_attribute(rng, context):
    """Ask the last question for another thing."""
    domain, last, attribute = context
    others = [t for t, f in domain.things.items() if t != last and applies(attribute, f)]
    if not domain.swap or not others:
        return None
    thing = rng.choice(others)
    fields = domain.things[thing]
    question = capitalise(rng.choice(SAME_FOR).format(a=fields.get("a", fields["e"])))
    return (
        roughen(rng, question),
        capitalise(fill(attribute.answer, fields)),
        (domain, thing, attribute),
    )


def small_talk(rng, context):
    _, talk = load()
    reply = rng.choice(list(talk))
    return roughen_talk(rng, rng.choice(talk[reply])), reply, None


def roughen_talk(rng, text: str) -> str:
    if rng.random() < 0.15:
        text = rng.choice(("Hi, ", "Hello, ", "Hey, ", "So, ", "Well, ", "Okay, ", "Oh, ")) + text
    if rng.random() < 0.08:
        text = capitalise(drop_or_add_words(rng, text))
    draw = rng.random()
    if draw < 0.12:
        return text.lower()
    return text.rstrip("!?.") if draw < 0.25 else text


def next_turn(rng, context):
    """Draw a turn that fits the conversation so far."""
    moves = [(new_topic, 30), (small_talk, 14)]
    if context:
        moves += [(same_thing, 35), (same_attribute, 28)]
    while True:
        move = rng.choices([m for m, _ in moves], [w for _, w in moves])[0]
        if turn := move(rng, context):
            return turn


def conversation(rng) -> list[dict[str, str]]:
    """Make one conversation as chat messages: one to three turns, sometimes up to twelve."""
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    turns = rng.choices((1, 2, 3, rng.randint(4, 12)), (36, 32, 20, 12))[0]
    context = None
    for _ in range(turns):
        question, answer, context = next_turn(rng, context)
        if not answer.endswith(("!", ".", "?")):
            answer += "."
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def normalise(text: str) -> str:
    """Lower-case and drop punctuation, so that near-copies of a question count as copies."""
    return " ".join(re.findall(r"[a-z0-9_+]+", text.lower()))


def questions() -> list[dict]:
    return json.loads((HERE / "questions.json").read_text())


def corpus(num_conversations: int, seed: int = 0):
    """Yield conversations without the committed questions."""
    rng = random.Random(seed)
    banned = {normalise(q["question"]) for q in questions()}
    made = 0
    while made < num_conversations:
        messages = conversation(rng)
        if any(normalise(m["content"]) in banned for m in messages if m["role"] == "user"):
            continue
        made += 1
        yield messages


def held_out_prompts(num_prompts: int, seed: int = 1) -> list[str]:
    """Make questions from pairs of wording and thing that the corpus never has."""
    rng = random.Random(seed)
    prompts = {}
    while len(prompts) < num_prompts:
        if asked := ask(rng, *draw_topic(rng), withheld=True):
            prompts[asked[0]] = None
    return list(prompts)


def thing_pattern() -> re.Pattern:
    """Match any thing or plural of the tables, longest first."""
    names = {
        normalise(t[k])
        for d in load()[0]
        for t in d.things.values()
        for k in ("e", "s", "x", "y")
        if k in t
    }
    return re.compile(r"\b(" + "|".join(sorted(names, key=len, reverse=True)) + r")\b")


def check_questions(conversations) -> None:
    """Assert that no committed question, and no "new" wording with any thing, is in the corpus."""
    pattern = thing_pattern()
    exact = {normalise(q["question"]) for q in questions()}
    new = {pattern.sub("_", normalise(q["question"])) for q in questions() if q["wording"] == "new"}
    prompts = {normalise(p) for p in json.loads((HERE / "held_out_prompts.json").read_text())}
    for messages in conversations:
        for text in (normalise(m["content"]) for m in messages if m["role"] == "user"):
            assert text not in exact, text
            assert text not in prompts, text
            masked = pattern.sub("_", text)
            assert not any(wording in masked for wording in new), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print so many conversations")
    parser.add_argument("--write-prompts", action="store_true", help="renew held_out_prompts.json")
    args = parser.parse_args()
    if args.write_prompts:
        text = json.dumps(held_out_prompts(100), indent=1, ensure_ascii=False)
        (HERE / "held_out_prompts.json").write_text(text + "\n")
    made = list(corpus(args.conversations, args.seed))
    for messages in made[: args.show]:
        print("\n".join(f"{m['role']}: {m['content']}" for m in messages), end="\n\n")
    check_questions(made)
    characters = sum(len(m["content"]) for c in made for m in c)
    print(f"{len(made)} conversations, {characters} characters, questions absent")


if __name__ == "__main__":
    run_program(main)
