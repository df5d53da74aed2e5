"""What a reply took: words for the statistics line and `/stats`, values for `--stats json`.

Both are of one reply, the experts' counters too.
"""

from dataclasses import asdict

from mlx_dsv3.conversation.session import End, Session
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.generate import Stats


def stats_values(end: End) -> dict:
    """Return the statistics for `--stats json`, what follows from the counts included."""
    stats, drafts = end.stats, end.stats.drafts
    values = {"finish_reason": end.finish_reason, **asdict(stats)}
    values |= {"prompt_tps": stats.prompt_tps, "reply_tps": stats.reply_tps}
    for name in ("acceptance", "mean_accepted", "tokens_per_forward", "speed_up"):
        values["drafts"][name] = getattr(drafts, name)
    if stats.experts is not None:
        each = {str(layer): experts_values(count) for layer, count in end.layers.items()}
        values["experts"] = experts_values(stats.experts) | {"layers": each}
    return values


def experts_values(count: Counters) -> dict:
    """Return what was asked of the experts, of one layer or of all."""
    values = asdict(count)
    values["bytes"] = values.pop("nbytes")
    return values | {"hit_rate": count.hit_rate, "gb_per_s": count.gb_per_s}


def experts_words(count: Counters) -> str:
    """Return the same in words."""
    return (
        f"{count.hit_rate:.0%} hits, {count.nbytes / 1e9:.2f} GB read ({count.gb_per_s:.1f} GB/s), "
        f"{count.wait_s:.2f} s waited"
    )


def stats_words(stats: Stats) -> list[str]:
    """Return the parts of the statistics line."""
    words = [
        f"prompt {stats.prompt_tokens} tokens ({stats.reused_tokens} reused), "
        f"{stats.prompt_tps:.1f}/s",
        f"reply {stats.reply_tokens} tokens, {stats.reply_tps:.1f}/s",
    ]
    drafts = stats.drafts
    if drafts.draft_steps:
        shares = " ".join(f"{share:.0%}" for share in drafts.acceptance)
        text = f"drafts accepted {shares}, {drafts.tokens_per_forward:.2f} tokens per step"
        if drafts.speed_up is not None:
            text += f", {drafts.speed_up:.2f} x plain"
        words.append(text)
    if stats.experts is not None:
        words.append(f"experts {experts_words(stats.experts)}")
    words.append(f"peak {stats.peak_bytes / 1e9:.2f} GB")
    return words


def stats_lines(end: End, session: Session) -> list[str]:
    """Return the lines of `/stats`: what a reply took, in full."""
    lines, drafts = stats_words(end.stats), end.stats.drafts
    if session.control.fixed != 0:
        for what, counts in (("made", drafts.steps), ("accepted", drafts.lengths)):
            words = ", ".join(f"{i}: {n}" for i, n in enumerate(counts) if n) or "none"
            lines.append(f"steps by drafts {what}: {words}")
        lines.append(f"mean accepted: {drafts.mean_accepted:.2f}")
    for layer, count in end.layers.items():
        capacity = session.loaded.store.banks[layer].capacity
        lines.append(f"layer {layer}: {capacity} slots, {experts_words(count)}")
    return lines
