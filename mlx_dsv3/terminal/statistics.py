"""What a reply took: words for the statistics line and `/stats`, values for `--stats json`.

Both are of one reply, the experts' counters too.
"""

from dataclasses import asdict

from mlx_dsv3.conversation.session import End, Session
from mlx_dsv3.decoding.draft_stats import LEAST_TOKENS, DraftStats
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.generate import Prefill, Stats, context_limit
from mlx_dsv3.sizes import size
from mlx_dsv3.terminal.drawing import bar, duration

WIDTH = 24  # columns of a bar


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


def reply_values(end: End, prefill: Prefill | None) -> dict:
    """Return a reply for `--json`; `usage` has OpenAI's names. Without a token no statistics."""
    stats = end.stats
    prompt, reused = (prefill.total + 1, prefill.reused) if prefill else (0, 0)
    if stats is not None:
        prompt, reused = stats.prompt_tokens, stats.reused_tokens
    replied = stats.reply_tokens if stats else 0
    usage = {"prompt_tokens": prompt, "completion_tokens": replied}
    usage |= {"total_tokens": prompt + replied, "prompt_tokens_details": {"cached_tokens": reused}}
    values = {"text": end.text, "reasoning": end.reasoning, "finish_reason": end.finish_reason}
    return values | {"usage": usage, "statistics": stats and stats_values(end)}


def experts_values(count: Counters) -> dict:
    """Return what was asked of the experts, of one layer or of all."""
    values = asdict(count)
    values["bytes"] = values.pop("nbytes")
    return values | {"hit_rate": count.hit_rate, "gb_per_s": count.gb_per_s}


def share(part: int, whole: int, tokens: int) -> str:
    """Return a share in percent, or its two counts where few tokens stand behind it."""
    return f"{part / whole:.0%}" if tokens >= LEAST_TOKENS else f"{part:,} of {whole:,}"


def computed(stats: Stats) -> int:
    """Return the tokens of a prompt that were computed for it."""
    return stats.prompt_tokens - stats.reused_tokens


def hits(count: Counters, stats: Stats) -> str:
    tokens = computed(stats) + stats.reply_tokens
    return f"{share(count.hits, max(count.hits + count.misses, 1), tokens)} hits"


def stats_words(stats: Stats) -> list[str]:
    """Return the parts of the statistics line, which fits 100 columns where no expert streams."""
    first = f"first token {duration(stats.first_token_s)}"
    words = [
        f"prompt {stats.prompt_tokens:,} ({stats.reused_tokens:,} reused), {first}",
        f"reply {stats.reply_tokens:,}, {stats.reply_tps:.1f}/s",
    ]
    drafted, accepted = sum(stats.drafts.drafted), sum(stats.drafts.accepted)
    if drafted:
        words.append(f"drafts {share(accepted, drafted, drafted)}")
    if (experts := stats.experts) is not None:
        words.append(f"experts {hits(experts, stats)}, {size(experts.nbytes)} read")
    words.append(f"peak {size(stats.peak_bytes)}")
    return words


def stats_lines(end: End, session: Session) -> list[str]:
    """Return the lines of `/stats`: what a reply took, in full."""
    stats = end.stats
    prompt = f"{stats.prompt_tokens:,} tokens, {stats.reused_tokens:,} reused"
    if computed(stats) >= LEAST_TOKENS:
        prompt += f", {stats.prompt_tps:.1f}/s"
    rows = {"prompt": prompt, "first token": duration(stats.first_token_s)}
    rows["reply"] = f"{stats.reply_tokens:,} tokens, {stats.reply_tps:.1f}/s"
    rows["peak"] = f"{size(stats.peak_bytes)} since the start"
    lines = [f"{name:<12} {words}" for name, words in rows.items()]
    if session.control.fixed != 0:
        lines += drafts_lines(stats.drafts)
    return lines + experts_lines(end, session)


def drafts_lines(drafts: DraftStats) -> list[str]:
    """Return what was accepted, by the draft's position, and how many steps made how much."""
    pairs = [(a, d) for a, d in zip(drafts.accepted, drafts.drafted, strict=True) if d]
    words = ", then ".join(share(a, d, d) for a, d in pairs)
    lines = [f"{'drafts':<12} {f'{words} accepted' if words else 'none made'}"]
    if drafts.speed_up is not None:
        tokens = f"{drafts.tokens_per_forward:.2f} tokens per step"
        lines[0] += f"; {tokens}, {drafts.speed_up:.2f} x plain"
    for what, counts in (("made", drafts.steps), ("accepted", drafts.lengths)):
        most = max((i for i, count in enumerate(counts) if count), default=-1)
        for i, count in enumerate(counts[: most + 1]):
            lines.append(f"{f'{what} {i}':<12} {bar(count / max(counts), WIDTH)} {count:>7,} steps")
    return lines


def experts_lines(end: End, session: Session) -> list[str]:
    """Return each streamed layer's hit rate, as a bar, and what was read for it."""
    lines = []
    for layer, count in end.layers.items():
        capacity = session.loaded.store.banks[layer].capacity
        lines.append(
            f"{f'layer {layer}':<12} {bar(count.hit_rate, WIDTH)} {hits(count, end.stats)}, "
            f"{capacity} slots, {size(count.nbytes)} read ({count.gb_per_s:.1f} GB/s), "
            f"{count.wait_s:.2f} s waited"
        )
    return lines


def context_lines(session: Session) -> list[str]:
    """Return the lines of `/context`: how full it is, and of what."""
    parts, limit = session.context(), context_limit(session.loaded)
    used = sum(count for _, count in parts)
    lines = [f"{'context':<12} {bar(used / limit, WIDTH)} {used:>7,} of {limit:,} tokens"]
    for what, count in parts:
        lines.append(f"{what:<12} {bar(count / max(used, 1), WIDTH)} {count:>7,}")
    return lines
