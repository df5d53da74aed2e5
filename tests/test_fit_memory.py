"""`--fit-memory`: the recipe stays within the memory, and spends it where the error falls most."""

import json
from itertools import pairwise, product

import mlx.core as mx
import numpy as np
import pytest
import which_mac
from synthetic import source_of

from convert.__main__ import main
from convert.fit_memory import Choice, Item, choose, hull, survey
from convert.recipe import from_dict
from convert.source import open_folder
from mlx_dsv3.checkpoint.format import Quantization
from mlx_dsv3.errors import UserError
from mlx_dsv3.load import plan_memory
from mlx_dsv3.memory import sold_limit_bytes
from tests.tiny import FP8_CONFIG, A, write_hub

CONFIG = A | FP8_CONFIG | {"moe_intermediate_size": 64, "num_hidden_layers": 4}
CONTEXT = 64


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("fit") / "hub", CONFIG)


@pytest.fixture(scope="module")
def offers(hub):
    return survey(open_folder(hub), CONTEXT)


def least_gb(offers, extra_bytes: int = 0) -> float:
    """Return the memory of a machine that allows so much more than the least."""
    low, high = 0.0, 64.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        is_enough = sold_limit_bytes(middle) >= offers.least_bytes + extra_bytes
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def random_items(seed: int) -> list[Item]:
    rng = np.random.default_rng(seed)
    items = []
    for n in range(4):
        sizes, errors = np.sort(rng.integers(10, 99, 4)), np.sort(rng.random(4))[::-1]
        pairs = zip(sizes.tolist(), errors.tolist(), strict=True)
        items.append(Item("dense", n, hull([Choice(Quantization(4), *pair) for pair in pairs])))
    return items


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_is_better_by_more_than_a_step(seed):
    """Greedy on the hull is exact but for the last step, which may not fit."""
    items, budget = random_items(seed), 230
    if budget < sum(item.choices[0].nbytes for item in items):
        return
    chosen = choose(items, budget)
    combinations = [c for c in product(*(item.choices for item in items))]
    fitting = [c for c in combinations if sum(choice.nbytes for choice in c) <= budget]
    assert sum(choice.nbytes for choice in chosen) <= budget
    best = min(sum(choice.error for choice in c) for c in fitting)
    steps = [a.error - b.error for i in items for a, b in pairwise(i.choices)]
    assert sum(choice.error for choice in chosen) <= best + max(steps, default=0)


def test_what_no_layer_goes_around_gets_bits_first():
    """On the judge, the head with the bits of an expert cost a fifth of the KL."""
    choices = [Choice(Quantization(bits), size, 1 / size) for bits, size in ((4, 10), (8, 20))]
    items = [Item(role, None, choices) for role in ("experts_down", "head", "attention", "dense")]
    assert [choice.nbytes for choice in choose(items, 60)] == [10, 20, 10, 20]


def test_hull_keeps_what_is_best_at_some_price():
    sizes_and_errors = [(10, 9.0), (20, 8.9), (30, 1.0), (40, 2.0), (50, 0.5)]
    choices = [Choice(Quantization(4), *pair) for pair in sizes_and_errors]
    assert [choice.nbytes for choice in hull(choices)] == [10, 30, 50]


@pytest.mark.slow
def test_v3_from_headers():
    """Within 1 % of what a machine allows; below the least memory there is one sentence."""
    offers = survey(source_of(which_mac.V3), 8192)
    found = offers.fit(384)
    assert not offers.is_measured
    assert 0.99 * found.limit_bytes < found.total_bytes <= found.limit_bytes
    with pytest.raises(UserError) as refused:
        offers.fit(192)
    least = int(refused.value.hint.split("`")[1].split()[1])
    assert offers.fit(least).total_bytes <= sold_limit_bytes(least)
    with pytest.raises(UserError, match=f"a machine with {least - 1} GB"):
        offers.fit(least - 1)


def test_a_folder_takes_what_was_promised(hub, offers, tmp_path, capsys):
    """From flags to a folder, by way of the file that can be looked at and given again."""
    gb, recipe = least_gb(offers, 60_000), tmp_path / "mine.json"
    flags = ["--fit-memory", repr(gb), "--context", str(CONTEXT), "--save-recipe", str(recipe)]
    main(["run", str(hub), str(tmp_path / "out"), *flags])
    assert "experts_down" in capsys.readouterr().err
    options = {"context": CONTEXT, "experts": "resident", "limit_bytes": sold_limit_bytes(gb)}
    plan = plan_memory(tmp_path / "out", dtype=mx.bfloat16, **options)
    assert 0.99 * plan.limit_bytes < plan.total_bytes <= plan.limit_bytes
    assert abs(plan.total_bytes - offers.fit(gb).total_bytes) < 1000
    written = json.loads(recipe.read_text())
    again = from_dict(written, "it")
    assert again.as_dict() == written and again.is_fitted and again.by_layer
    main(["run", str(hub), str(tmp_path / "again"), "--recipe", str(recipe)])
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_from_the_least_to_more_than_enough(offers):
    least, most = offers.fit(least_gb(offers)).recipe, offers.fit(64).recipe
    bits = {role: chosen.bits for role, chosen in least.by_role.items()}
    assert {bits["experts_gate_up"], bits["experts_down"]} == {2}
    assert {bits[role] for role in ("attention", "dense", "embedding", "head")} == {4}
    assert bits["mtp"] == 8
    assert {chosen.bits for chosen in most.by_role.values()} == {8} and not most.by_layer


class OneChannel:
    """An importance by which one layer's experts have one channel that counts."""

    sha256 = "0" * 64

    def weights(self, path: str) -> np.ndarray | None:
        counts = np.ones(64, np.float32)  # the width of all experts' matrices
        if ".layers.2.mlp.experts." in path:
            counts[1:] = 1e-6
        return counts if ".experts." in path else None

    def share(self, path: str) -> float:
        return 1.0


def test_importance_changes_where_bits_go(hub, offers):
    """Where one channel counts, two bits meet it as well as eight: others get the bytes."""
    gb = least_gb(offers, 60_000)
    plain, weighed = offers.fit(gb), survey(open_folder(hub), CONTEXT, OneChannel()).fit(gb)
    bits = {(i.role, i.layer): c.quantization.bits for i, c in weighed.chosen}
    assert bits["experts_down", 2] < bits["experts_down", 1]
    assert plain.recipe.as_dict() != weighed.recipe.as_dict()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fit-memory", "0"], "`--fit-memory` is `0`; it takes GB, a number above 0"),
        (["--fit-memory", "nan"], "`--fit-memory` is `nan`"),
        (["--fit-memory", "64", "--recipe", "q4"], "`--fit-memory` excludes `--recipe`"),
        (["--fit-memory", "64", "--q-bits", "4"], "`--fit-memory` excludes `--recipe`"),
        (["--context", "64"], "`--context` needs `--fit-memory`"),
        (["--save-recipe", "mine"], "`--save-recipe` is `mine`; a recipe's name ends with `.json`"),
        (["--fit-memory", "0.1"], "a machine with 0.1 GB lets the model use 0 GB; resident it"),
    ],
)
def test_refusals(flags, words, hub):
    with pytest.raises(UserError) as refused:
        main(["plan", str(hub), *flags])
    assert refused.value.message.startswith(words) and refused.value.hint
