"""A measurement: windows through a model, a few at a time, kept so that it can go on."""

import time
from pathlib import Path

from mlx_dsv3.importance.sums import Sums, write
from mlx_dsv3.importance.texts import Texts
from mlx_dsv3.importance.watch import go_through, watch
from mlx_dsv3.load import Loaded
from mlx_dsv3.parity.compare import batches
from mlx_dsv3.terminal.drawing import duration
from mlx_dsv3.terminal.progress import Bar

MOST_TOKENS = 2048  # at once: streamed experts are read again each time
SAVE_S = 60.0


class Measurement:
    """A run over the windows that are not done yet; `out` is written when all are."""

    def __init__(self, loaded: Loaded, texts: Texts, out: Path, about: dict[str, str]):
        self.loaded, self.texts, self.out, self.about = loaded, texts, out, about
        self.partial = partial_of(out)
        self.sums = Sums(loaded.args, loaded.mtp is not None)
        if self.partial.exists():
            self.sums.resume(self.partial, about["key"])
        self.saved_at, self.bar = time.monotonic(), Bar()
        watch(loaded, self.sums.note)

    def run(self) -> None:
        """Measure and write; whatever stops it, what is done is in `partial`."""
        try:
            self.all_windows()
        except BaseException:
            self.save()
            raise
        finally:
            self.bar.erase()
        write(self.out, self.sums.means(), self.about)
        self.partial.unlink(missing_ok=True)

    def all_windows(self) -> None:
        most = min(self.loaded.plan.prefill_chunk, MOST_TOKENS)
        begun, left = self.sums.done, self.texts.windows[self.sums.done :]
        for ids in batches(left, most):
            self.sums.pending = []
            go_through(self.loaded, ids, self.sums.note)
            self.sums.settle(len(ids))
            self.show(begun)
            if time.monotonic() - self.saved_at > SAVE_S:
                self.save()

    def save(self) -> None:
        if self.sums.done:
            self.sums.save(self.partial, self.about["key"])
        self.saved_at = time.monotonic()

    def show(self, begun: int) -> None:
        lengths = [len(window) for window in self.texts.windows]
        done, total = sum(lengths[: self.sums.done]), sum(lengths)
        speed = sum(lengths[begun : self.sums.done]) / self.bar.seconds
        words = f"{done:,} of {total:,} tokens, {speed:,.0f}/s, "
        self.bar.draw(done / total, words + f"{duration((total - done) / speed)} left")


def partial_of(out: Path) -> Path:
    """Return where a measurement is kept until it is done."""
    return out.with_name(f"{out.name}.partial")
