"""Mistakes planted in our checks, each a few words of one function: the lane must find them.

A plant names the function, the words in it and what stands in their place, the fault that it must
show, the program that meets it and the file. Whoever rewrites such a check moves its plant along:
it says so itself.
"""

import inspect
from dataclasses import dataclass
from pkgutil import resolve_name


@dataclass(frozen=True)
class Plant:
    """Words of a function and what takes their place; where to look, and how the fault begins."""

    function: str  # with its module, below mlx_dsv3
    words: str
    instead: str
    shows: str
    job: str
    place: str

    def changed(self) -> str:
        """Return the function's text with the mistake in it."""
        text = inspect.getsource(resolve_name(f"mlx_dsv3.{self.function}"))
        assert text.count(self.words) == 1, "the check was rewritten: move its plant along"
        return text.replace(self.words, self.instead)

    def put(self) -> None:
        """Change the function for this process, wherever it is imported."""
        function, names = resolve_name(f"mlx_dsv3.{self.function}"), {}
        code = compile(self.changed(), f"planted in {self.function}", "exec")
        exec(code, function.__globals__, names)
        function.__code__ = names[function.__name__].__code__


LENGTH = 'length = int.from_bytes(first_bytes, "little")'
NUMBER = "if not is_number or value != value:"
CONFIG, INDEX, TRUNK = (
    f"mlx/{name}"
    for name in (
        "config.json",
        "model.safetensors.index.json",
        "model-trunk-00001-of-00001.safetensors",
    )
)
GOLDEN, STATE, PLAN = "golden.safetensors", "state.safetensors", "chat --plan"
PLANTS = {
    "sizes are anything": Plant(
        "checkpoint.headers:_are_sizes",
        "type(n) is int and 0 <= n <= most",
        "True",
        "Traceback",
        PLAN,
        TRUNK,
    ),
    "memory as a header wants it": Plant(
        "checkpoint.headers:header_length",
        LENGTH,
        f"{LENGTH}; b'x' * min(length, 7 << 27)",
        "memory",
        PLAN,
        TRUNK,
    ),
    "deep JSON": Plant(
        "json_files:parse_json",
        "except RecursionError:",
        "except ZeroDivisionError:",
        "Traceback",
        PLAN,
        CONFIG,
    ),
    "pipes": Plant(
        "errors:read_text", "and not os.path.isfile(path)", "and False", "hang", PLAN, INDEX
    ),
    "names in an index": Plant(
        "checkpoint.format:read_index", "not is_file_name(shard)", "False", "Traceback", PLAN, INDEX
    ),
    "kinds in config.json": Plant(
        "fields:typed_value", "not is_number or", "False and", "Traceback", PLAN, CONFIG
    ),
    "another exception": Plant(
        "fields:refuse", "raise UserError(", "raise ValueError(", "Traceback", PLAN, CONFIG
    ),
    "escapes": Plant("errors:visible", "text.translate(ESCAPES)", "text", "prints", PLAN, CONFIG),
    "ids of a recording": Plant(
        "parity.golden:check_tensor", "if wrong.size:", "if False:", "crash", "parity", GOLDEN
    ),
    "a wait for ever": Plant(
        "fields:typed_value",
        NUMBER,
        NUMBER.replace("if", "while") + " pass\n    if 0:",
        "hang",
        PLAN,
        CONFIG,
    ),
    "ids of a conversation": Plant(
        "decoding.state:restore", "not 0 <= i < args.vocab_size", "False", "", "state", STATE
    ),
}
