"""Drafting on the demo model: the same text, exact states through `stream`, reads, the chat."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drafted import Drafted

from mlx_dsv3.decoding.draft_control import MAX_DRAFTS, DraftControl
from mlx_dsv3.decoding.draft_stats import LEAST_TOKENS, DraftStats
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.decoding.state import fingerprint, load_state
from mlx_dsv3.errors import UserError
from mlx_dsv3.generate import make_control, make_state, stream
from mlx_dsv3.load import Loaded

from . import identical
from .test_chat import QUESTION, ROOT, refused, run

OPENBLAS = sorted(Path("/usr/lib").glob("*/openblas-pthread/libblas.so.3"))
MARGIN = 1e-4  # below it, a fast BLAS may flip a token: its sums depend on the number of rows
FOLLOW_UP = "And what is the capital of Italy?"
SLOTS = 8  # of 32 experts


@pytest.fixture(scope="module")
def streamed(demo_q4) -> Loaded:
    return identical.load_streamed(demo_q4, SLOTS)


@pytest.fixture(scope="module")
def exact(loaded) -> Drafted:
    """Return what compares a state with a fresh prefill of its ids."""
    return Drafted(loaded.model, loaded.mtp)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 2, "auto"])
@pytest.mark.parametrize("experts", ["resident", "streamed"])
def test_memory_over_4000_tokens(loaded, streamed, experts, drafts):
    """A reply grows by the rows that were planned, also as the system counts it."""
    side = loaded if experts == "resident" else streamed
    model = Drafted(side.model, side.mtp)
    beside, resident = model.growth(DraftControl() if drafts == "auto" else drafts, 4000)
    planned = side.plan.cache_bytes / side.plan.context
    print(f"drafts {drafts}, {experts}: planned {planned:.0f} bytes per token, beside the caches ")
    print(f"{beside:.0f}, resident set {resident:.0f}")
    # The rest is what malloc keeps of arrays that grew; it was 5.7 times the plan with the leak.
    assert abs(beside) < 0.1 * planned and resident < 2.2 * planned


def check_margins(found: list[dict], blas: str) -> None:
    """Show every difference; with a fast BLAS, a Mac's own included, near-ties are no failures."""
    for entry in found:
        print(entry)
    is_exact = blas == "bundled" and sys.platform == "linux"
    assert not [entry for entry in found if is_exact or entry["margin"] >= MARGIN]


@pytest.mark.parametrize("experts", ["resident", "streamed"])
def test_text_is_that_of_plain_decoding(loaded, streamed, experts):
    """A prompt of 40 tokens for each sampler, 1 to 4 drafts; any BLAS this process has."""
    side = loaded if experts == "resident" else streamed
    found, blas = [], "openblas" if "openblas" in os.environ.get("LD_PRELOAD", "") else "bundled"
    names = list(identical.SAMPLERS)
    for name, ids in zip(names, identical.prompts_of(loaded, len(names)), strict=True):
        plain, _ = identical.text_of(loaded, ids, 40, 0, Sampler(**identical.SAMPLERS[name]))
        found += identical.differences(side, plain, ids, name, list(range(1, MAX_DRAFTS + 1)))
    check_margins(found, blas)


@pytest.mark.slow
@pytest.mark.parametrize("blas", ["bundled", "openblas"])
def test_text_of_40_prompts(demo_q4, blas):
    """40 prompts of 200 tokens, 1 to 4 drafts, four samplers, resident and streamed."""
    if blas == "openblas" and not OPENBLAS:
        pytest.skip("Debian's libopenblas0-pthread is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["PYTHONPATH"] = str(ROOT)
    if blas == "openblas":
        environment["LD_PRELOAD"] = str(OPENBLAS[0])
    command = [sys.executable, identical.__file__, demo_q4, "--prompts", "40", "--tokens", "200"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    result = json.loads(done.stdout)
    assert result["texts"] == 40 * len(identical.SAMPLERS) * 2 * MAX_DRAFTS
    check_margins(result["differences"], blas)


def reply(loaded, ids, state, **options) -> list[int]:
    return [piece.token for piece in stream(loaded, ids, state=state, **options)]


@pytest.mark.parametrize("drafts", [1, 3])
def test_ends_inside_accepted_drafts_leave_exact_states(loaded, ask, exact, monkeypatch, drafts):
    """Stop token, budget and context end; then a follow-up equals one computed from scratch."""
    ids, pieces = ask(QUESTION), list(stream(loaded, ask(QUESTION), drafts=0))
    plain = [piece.token for piece in pieces]
    second = ask(QUESTION, "".join(piece.text for piece in pieces), FOLLOW_UP)
    expected = reply(loaded, second, make_state(loaded, False), drafts=0)
    for limit in (None, *range(1, len(plain))):
        for context_end in (False, True):
            state, options = make_state(loaded), {"drafts": drafts}
            with monkeypatch.context() as patch:
                if context_end and limit:
                    end = len(ids) + limit
                    patch.setattr(loaded.args, "max_position_embeddings", end)
                elif limit:
                    options["max_tokens"] = limit
                *_, last = stream(loaded, ids, state=state, **options)
            assert last.finish_reason == ("length" if limit else "stop")
            exact.assert_exact(state, bound=1e-4)
            assert state.ids == (ids + plain)[: len(state.ids)]
            assert reply(loaded, second, state, drafts=drafts) == expected


def test_some_of_those_ends_were_inside_accepted_drafts(loaded, ask):
    """Guards the test above: the reply accepts drafts nearly everywhere, to its end token."""
    *_, last = stream(loaded, ask(QUESTION), drafts=3)
    drafts = last.stats.drafts
    assert drafts.tokens_per_forward > 1.8 and drafts.lengths[2] + drafts.lengths[3] >= 2
    assert drafts.tokens == last.stats.reply_tokens


@pytest.mark.parametrize("drafts", [2, "auto"])
def test_a_closed_stream_leaves_an_exact_state(loaded, ask, exact, drafts):
    """Ctrl-C between any two tokens: the state holds only what was shown."""
    ids, other = ask(QUESTION), ask("How many legs does a spider have?")
    plain = reply(loaded, ids, make_state(loaded, False), drafts=0)
    expected = reply(loaded, other, make_state(loaded, False), drafts=0)
    for taken in range(1, len(plain)):
        state = make_state(loaded)
        pieces = stream(loaded, ids, drafts=drafts, state=state)
        assert [next(pieces).token for _ in range(taken)] == plain[:taken]
        pieces.close()
        assert state.ids == (ids + plain[:taken])[: len(state.ids)]
        exact.assert_exact(state, bound=1e-4)
        assert reply(loaded, other, state, drafts=2) == expected


def test_a_saved_conversation_goes_on(loaded, ask, tmp_path):
    """The next turn after loading reuses what was saved and gives the same reply."""
    state = make_state(loaded)
    answer = "".join(piece.text for piece in stream(loaded, ask(QUESTION), drafts=2, state=state))
    state.save(tmp_path / "talk.safetensors", loaded.model)
    second = ask(QUESTION, answer, FOLLOW_UP)
    again = load_state(tmp_path / "talk.safetensors", loaded.model)
    pieces = list(stream(loaded, second, drafts=2, state=again))
    assert pieces[-1].stats.reused_tokens > len(ask(QUESTION))
    assert [piece.token for piece in pieces] == reply(loaded, second, state, drafts=2)


def test_a_saved_conversation_without_the_module(loaded, ask, demo_q4, tmp_path):
    """Its MTP cache is dropped where there is no module; where there is one, drafts need it."""
    state, path = make_state(loaded), tmp_path / "talk.safetensors"
    answer = "".join(piece.text for piece in stream(loaded, ask(QUESTION), drafts=2, state=state))
    state.save(path, loaded.model)
    second = ask(QUESTION, answer, FOLLOW_UP)
    expected = reply(loaded, second, make_state(loaded), drafts=0)
    plain = identical.load(demo_q4, with_mtp=False)
    without = load_state(path, plain.model)
    assert reply(plain, second, without) == expected and without.mtp_cache is None
    without.save(path, plain.model)
    again = load_state(path, loaded.model)
    with pytest.raises(UserError, match="needs an MTP cache"):
        reply(loaded, second, again, drafts=2)
    assert reply(loaded, second, again) == expected  # auto: plain


def test_a_quantisation_has_its_own_saved_conversations(loaded, converted):
    other = identical.load(converted("q8"))
    assert fingerprint(loaded.model) != fingerprint(other.model)
    assert fingerprint(loaded.model) == fingerprint(identical.load(converted("q4")).model)


def test_statistics_of_a_reply(loaded, ask):
    """Acceptance by position, tokens per step, and speed against the control's own plain steps."""
    control, tokens = DraftControl(), 0
    for _ in range(4):
        *_, last = stream(loaded, ask(QUESTION), control=control)
        drafts = last.stats.drafts
        assert drafts.tokens == last.stats.reply_tokens
        assert drafts.tokens + drafts.unseen == sum(drafts.steps) + sum(drafts.accepted)
        assert drafts.draft_steps == sum(drafts.lengths) and drafts.unseen <= MAX_DRAFTS
        assert all(0 <= share <= 1 for share in drafts.acceptance)
        tokens += drafts.tokens
    assert drafts.plain_step_s is not None and tokens > 40
    *_, last = stream(loaded, ask(QUESTION), drafts=0)
    assert last.stats.drafts.speed_up is None and last.stats.drafts.acceptance == []


def test_no_ratio_from_a_short_reply(loaded, ask):
    """The demo greeted with `0.03 x plain`: 13 tokens, most of their time spent in a compiler."""
    control = DraftControl()
    for question in (QUESTION, "Hello! How are you? Tell me a long story about the sea, please."):
        for _ in range(3):
            *_, last = stream(loaded, ask(question), control=control)
            drafts = last.stats.drafts
            is_long = drafts.warm_tokens - drafts.unseen >= LEAST_TOKENS
            assert (drafts.speed_up is not None) == bool(is_long and drafts.draft_steps)
            assert drafts.tokens - drafts.warm_tokens + drafts.unseen <= 2 * (MAX_DRAFTS + 1)
    made = DraftStats(plain_step_s=1.0)
    made.observe(1, 1, 100.0, is_warm=False)  # compiling
    for _ in range(LEAST_TOKENS // 2):
        made.observe(1, 1, 1.0, is_warm=True)
    assert made.speed_up == 2.0


@pytest.mark.parametrize("drafts", [0, 4])
def test_rates_count_every_token_and_all_of_its_time(loaded, ask, drafts):
    """Five tokens of one step, of which four took no time: 40,000 tokens a second."""
    for max_tokens in (2, 5, None):
        *_, last = stream(loaded, ask(QUESTION), drafts=drafts, max_tokens=max_tokens)
        stats = last.stats
        assert stats.reply_s >= stats.drafts.seconds > 0
        assert stats.reply_tps == pytest.approx(stats.reply_tokens / stats.reply_s)
        assert stats.drafts.tokens_per_forward == stats.reply_tokens / sum(stats.drafts.steps)


def test_reads_with_streamed_experts(streamed, ask):
    """Rows verified together share experts, but rejected ones read for nothing."""
    reads = {}
    for drafts in (0, 1, 4):
        before = streamed.store.counters
        for ids in identical.prompts_of(streamed, 3):
            text, stats = identical.text_of(streamed, ids, 40, drafts, Sampler())
        reads[drafts] = (streamed.store.counters - before).misses / 120
    print(f"expert reads for each token, {SLOTS} of 32 slots: {reads}")
    assert reads[0] > 0 and 0.5 * reads[0] < reads[1] < 3 * reads[0]
    assert reads[4] > reads[1]


def test_drafts_without_the_sidecar_are_refused(demo_q4, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(demo_q4, folder)
    (folder / "mtp.safetensors").unlink()
    done = run(folder, "-p", QUESTION, "--drafts", "2")
    refused(done, "`--drafts 2`", "no `mtp.safetensors`", "`python -m convert mtp SOURCE")
    assert "Paris" in run(folder, "-p", QUESTION).stdout  # auto: plain


@pytest.mark.parametrize("drafts", ["5", "-1", "many", ""])
def test_other_numbers_of_drafts_are_refused(loaded, drafts):
    with pytest.raises(UserError, match="--drafts") as caught:
        make_control(loaded, drafts)
    assert "0 to 4" in caught.value.hint


def test_chat_tells_what_drafting_did(demo_q4):
    stats = json.loads(run(demo_q4, "-p", QUESTION, "--drafts", "3", "--stats", "json").stderr)
    assert stats["drafts"]["steps"][3] > 0 and sum(stats["drafts"]["accepted"]) > 0


def test_repetition_penalty_in_the_chat(demo_q4):
    """Large enough to change the text, and the same text with drafts and without."""
    options = ("-p", QUESTION, "--repetition-penalty", "30", "--max-tokens", "20")
    plain = run(demo_q4, *options, "--drafts", "0").stdout
    assert plain == run(demo_q4, *options, "--drafts", "3").stdout
    assert plain != run(demo_q4, "-p", QUESTION, "--max-tokens", "20").stdout
    refused(run(demo_q4, "-p", QUESTION, "--repetition-penalty", "0"), "--repetition-penalty")
