"""The verdict of a replay, told three ways: to people, as JSON, as a picture over depth.

JSON has no infinities: a figure that is not a finite number is null there.

Nothing is decided here (`bounds.py`). `about` says what was compared: the model's name, recipe and
activations, where its experts are, and how the replay ran.
"""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mlx_dsv3.errors import UserError, check_writable, in_line
from mlx_dsv3.parity.bounds import Verdict
from mlx_dsv3.parity.differences import TokenDifferences
from mlx_dsv3.parity.golden import Golden

TOP1_GAP = 0.5  # nats by which golden's best token is ahead where the second is not a tie


# --- JSON -------------------------------------------------------------------------------------


def as_json(golden: Golden, about: dict, verdict: Verdict) -> dict:
    result, bound = verdict.result, verdict.sources.bound()
    stages = [
        {
            "name": stage.name,
            "error": stage.error,
            "worst": stage.worst,
            "channel": stage.channel,
            "cosine": stage.cosine,
            "router": stage.agreement(),
            "router_outside_ties": stage.agreement(bound.tie),
            "bound": verdict.bound(stage.name).error,
        }
        for stage in result.stages.values()
    ]
    mtp = None
    if result.mtp_text is not None:
        mtp = text_json(result.mtp_text, verdict) | {
            "accepted": share(result.accepted),
            "golden_accepted": share(result.golden_accepted),
        }
    report = {
        "golden": {key: value for key, value in golden.about.items() if key != "config"},
        **about,
        "tokens": golden.num_tokens,
        "stages": stages,
        "head": text_json(result.head, verdict) if result.head.losses else None,
        "text": text_json(result.text, verdict),
        "mtp": mtp,
        "bound": bound._asdict(),
        "is_provisional": verdict.is_provisional,
        "is_too_short": verdict.is_too_short,
        "breaches": [vars(breach) for breach in verdict.breaches],
    }
    return without_infinities(report)


def without_infinities(value):
    """Return a nest of dictionaries and lists with null for each number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_infinities(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_json(text: TokenDifferences, verdict: Verdict) -> dict:
    (ours, golden), bound = text.perplexities, verdict.text_bound(text)
    return {
        "kl": text.kl,
        "top1": text.top1,
        "top1_outside_ties": text.top1_outside(TOP1_GAP),
        "perplexity": ours,
        "golden_perplexity": golden,
        "bound": {"kl": bound.kl, "perplexity": bound.perplexity},
    }


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


# --- for people -------------------------------------------------------------------------------


def print_report(golden: Golden, about: dict, verdict: Verdict) -> None:
    """Print origin, one row for each stage, the text, and the verdict."""
    result = verdict.result
    print_origin(golden, about)
    if result.mtp_text is None and "mtp.logprobs" in golden.prompts[0]:
        print("note: the model has no MTP module; that of the golden file is not compared")
    Console(width=max(Console().width, 88)).print(stage_table(verdict))
    if result.head.losses:
        print_text("head", result.head)
    print_text("text", result.text)
    if result.mtp_text is not None:
        print_text("MTP ", result.mtp_text)
        ours, theirs = share(result.accepted), share(result.golden_accepted)
        print(f"MTP   drafts the main model agrees with: {ours:.1%}, golden {theirs:.1%}")
    print(verdict_line(verdict))


def print_origin(golden: Golden, about: dict) -> None:
    source, num = golden.about, len(golden.prompts)
    lines = (
        f"golden  {source['model']}, {source['arithmetic']} on {source['device']}, torch "
        f"{source['torch']}, {num} prompt{'s' * (num > 1)}, {golden.num_tokens} tokens",
        f"model   {about['model']}, recipe {about['recipe']}, activations {about['activations']}, "
        f"experts {about['experts']}, {about['mode']}",
    )
    for line in lines:
        print(in_line(line))
    if about["same_source"] is False:
        print("note: the golden file was recorded from other shards than the model's")


def stage_table(verdict: Verdict) -> Table:
    """Return one row for each stage; a star marks those out of bounds."""
    table = Table("stage", "error", "worst", "channel", "1 - cosine", "router", "outside ties")
    wrong = {breach.where for breach in verdict.breaches}
    for stage in verdict.result.stages.values():
        routed = [stage.agreement(), stage.agreement(verdict.sources.bound().tie)]
        table.add_row(
            stage.name + (" *" if stage.name in wrong else ""),
            *(f"{value:.1e}" for value in (stage.error, stage.worst, stage.channel)),
            f"{max(1 - stage.cosine, 0):.0e}",
            *("" if value is None else f"{value:.1%}" for value in routed),
        )
    return table


def print_text(label: str, text: TokenDifferences) -> None:
    ours, golden = text.perplexities
    print(
        f"{label}  KL {text.kl:.1e}, best token {text.top1:.1%} "
        f"({text.top1_outside(TOP1_GAP):.1%} outside ties), perplexity {ours:.4f}, "
        f"golden {golden:.4f} ({ours / golden - 1:+.2%})"
    )


def verdict_line(verdict: Verdict) -> str:
    """Return the last line; it says where the bounds are a guess."""
    error = max(verdict.bound(name).error for name in verdict.result.stages)
    limits = f"(mean row error {error:.1e}, KL {verdict.text_bound(verdict.result.text).kl:.1e})"
    word = "outside" if verdict.breaches else "within"
    if verdict.is_too_short and not verdict.breaches:
        word = f"{verdict.num_tokens} tokens prove nothing: within"
    if verdict.is_provisional:
        return f"{word} provisional bounds {limits}: the demo's, grown with the depth by a guess"
    return f"{word} the bounds {limits}"


# --- picture ----------------------------------------------------------------------------------


def check_plot(file: Path) -> None:
    """Refuse, before minutes of replay, a picture that cannot be drawn or written."""
    check_writable(file)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UserError("`--plot` needs matplotlib", "`pip install matplotlib`") from None
    except Exception as error:  # of matplotlib's own settings, such as MPLBACKEND
        raise UserError(f"matplotlib does not start: {error}", "leave `--plot` out") from None
    if file.suffix.lstrip(".").lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"`{file}` is not the name of a picture", PLOT_HINT)


PLOT_HINT = "give `--plot` a file like `depth.png` in a folder that you may write to"


def plot(verdict: Verdict, about: dict, file: Path) -> None:
    """Draw error and router agreement over depth; needs matplotlib, an extra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = list(verdict.result.stages.values())
    figure, (top, bottom) = pyplot.subplots(2, sharex=True, figsize=(10, 6), layout="constrained")
    limits = [verdict.bound(stage.name).error for stage in stages]
    top.semilogy([max(stage.error, 1e-9) for stage in stages], "o-", label="mean row error")
    top.semilogy([max(stage.worst, 1e-9) for stage in stages], ".", label="worst row error")
    top.semilogy(limits, "--", color="grey", label="bound of the mean")
    top.set_ylabel("relative error")
    top.legend()
    routed = [i for i, stage in enumerate(stages) if stage.overlaps]
    for tie, label in ((None, "all"), (verdict.sources.bound().tie, "outside ties")):
        values = [100 * stages[i].agreement(tie) for i in routed]
        bottom.plot(routed, values, "o-", label=label)
    bottom.set_ylabel("router agreement, %")
    bottom.legend()
    step = max(1, len(stages) // 20)
    names = [stage.name for stage in stages][::step]
    bottom.set_xticks(range(0, len(stages), step), names, rotation=90)
    figure.suptitle(f"{about['recipe']}, {about['mode']} replay")
    figure.savefig(file)
    pyplot.close(figure)
