"""A repository on the hub: what it holds, headers by range requests, files one by one.

The revision is pinned once and every request names it. Nothing here knows tensors' roles or the
order of work. Every failure that a user can mend is put into words, and what may pass by itself
(server errors, lost connections) is tried again. huggingface_hub is imported late: local folders
do without it.
"""

import hashlib
import re
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from mlx_dsv3.checkpoint.format import is_file_name
from mlx_dsv3.checkpoint.headers import check_total, header_length
from mlx_dsv3.errors import UserError, read_text
from mlx_dsv3.json_files import brief
from mlx_dsv3.sizes import gigabytes

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FIRST_BYTES = 256 << 10  # one request a shard: headers of V3's shards are about 100 KB
HEADER_REQUESTS = 8  # at once
MAX_SMALL_BYTES = 200 * 10**6  # of what is no weight; tokenizers have up to 35 MB
WAITS_S = (1, 2, 4, 8, 16, 32, 60)


def is_repo_id(name: str) -> bool:
    """Say whether a repository may have this name."""
    if not REPO_ID.fullmatch(name):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def cached_snapshots(repo_id: str) -> list[Path]:
    """Return the folders of a repository's revisions in the hub's cache, that of `main` first.

    The others follow by age, the newest first; any may lack files. Layout as documented:
    huggingface.co/docs/huggingface_hub, "cache".
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    ref = cache / "refs" / "main"
    main = read_text(ref).strip() if ref.is_file() else None
    found = [path for path in (cache / "snapshots").glob("*") if path.is_dir()]
    return sorted(found, key=lambda path: (path.name != main, -path.stat().st_mtime))


class Repo:
    """One revision of a model repository; `waits` (seconds) are between tries to find it."""

    def __init__(
        self, repo_id: str, revision: str | None = None, waits: tuple[float, ...] | None = None
    ):
        from huggingface_hub import HfApi

        self.repo_id, self.revision, self.header_bytes = repo_id, revision, 0
        try:
            info = self.ask(
                lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True), waits
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # a page, not JSON
            raise UserError(
                f"what answered for `{repo_id}` is not the hub: {brief(error)}",
                "a proxy or a login page may be in between; check the network and HF_ENDPOINT",
            ) from None
        files = info.siblings or ()
        self.revision = info.sha
        self.sizes = {file.rfilename: file.size for file in files}
        self.sha256 = {
            file.rfilename: file.lfs.sha256
            for file in files
            if file.lfs and isinstance(file.lfs.sha256, str)
        }
        is_commit = re.fullmatch("[0-9a-f]{7,64}", str(self.revision))  # it names a folder here
        for name, size in self.sizes.items():
            if type(size) is not int or size < 0 or not is_commit:
                raise UserError(
                    f"the hub tells no size of `{brief(name)}` in `{repo_id}`, or no commit",
                    "fetch the repository with `hf download` and give its folder",
                )

    def small_files(self, patterns: tuple[str, ...]) -> Path:
        """Fetch the files that match into the hub's cache, config.json among them; return where."""
        from huggingface_hub import hf_hub_download

        names = [name for name in self.sizes if any(fnmatch(name, p) for p in patterns)]
        names = [name for name in names if is_file_name(name)]
        if "config.json" not in names:
            inner = min((name for name in self.sizes if name.endswith("/config.json")), default="")
            hint = f"it has `{inner}`: `hf download` it and give that folder"
            raise UserError(
                f"`{self.repo_id}` has no config.json",
                hint if inner else "give a model's repository",
            )
        for name in names:
            if self.sizes[name] > MAX_SMALL_BYTES:
                raise UserError(
                    f"`{name}` in `{self.repo_id}` has {gigabytes(self.sizes[name])}",
                    "no model has such a file; check the name of the repository",
                )
            path = self.ask(partial(hf_hub_download, self.repo_id, name, revision=self.revision))
        return Path(path).parent

    def header(self, shard: str) -> tuple[bytes, int]:
        """Return a shard's header and size; reads its first bytes and no more."""
        size = self.sizes[shard]
        first = self.read(shard, 0, FIRST_BYTES)
        length = header_length(first[:8], shard, size)
        if len(first) < 8 + length:
            first = self.read(shard, 0, 8 + length)
        self.header_bytes += length
        check_total(self.header_bytes, self.repo_id)
        return first[8 : 8 + length], size

    def read(self, shard: str, start: int, count: int) -> bytes:
        """Return at most `count` bytes of a shard from `start` on, by one request."""
        return self.ask(partial(self._range, shard, start, count))

    def _range(self, shard: str, start: int, count: int) -> bytes:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        url, headers = self._request(shard)
        headers["Range"] = f"bytes={start}-{start + count - 1}"
        data = b""
        with get_session().stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            if start and response.status_code != 206:
                raise UserError(
                    f"the server of `{self.repo_id}` answers no requests for parts of a file",
                    "fetch the checkpoint with `hf download` and give its folder",
                )
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= count:  # a server may ignore the range
                    break
        return data[:count]

    def _request(self, name: str) -> tuple[str, dict]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        return hf_hub_url(self.repo_id, name, revision=self.revision), build_hf_headers()

    def fetch(self, shard: str, folder: Path | None) -> Path:
        """Bring a shard onto this machine: into `folder`, or into the hub's cache for None.

        In a folder an interrupted download continues where it stopped, also in a later process, and
        the result must have the hub's sha256.
        """
        from huggingface_hub import hf_hub_download

        if folder is None:
            call = partial(hf_hub_download, self.repo_id, shard, revision=self.revision)
            return Path(self.ask(call))
        if (folder / shard).exists():
            return folder / shard
        part = folder / f"{shard}.part"
        self.ask(partial(self._append, shard, part))
        if shard in self.sha256 and _sha256(part) != self.sha256[shard]:
            part.unlink()
            raise UserError(
                f"`{shard}` arrived damaged: its sha256 is not the hub's",
                "repeat the same command to fetch it again",
            )
        return part.rename(folder / shard)

    def _append(self, shard: str, part: Path) -> None:
        from huggingface_hub.file_download import http_get

        url, headers = self._request(shard)
        with open(part, "ab") as file:
            if (have := file.tell()) > self.sizes[shard]:
                file.truncate(have := 0)
            if have < self.sizes[shard]:
                size = self.sizes[shard]
                http_get(url, file, resume_size=have, headers=headers, expected_size=size)

    def ask(self, call: Callable, waits: tuple[float, ...] | None = None):
        """Do a request; wait and repeat while the hub or the network fails, then say so."""
        from huggingface_hub import errors

        for wait in (*(WAITS_S if waits is None else waits), None):
            try:
                return call()
            except errors.GatedRepoError:
                raise UserError(
                    f"`{self.repo_id}` is gated",
                    f"accept its terms on huggingface.co/{self.repo_id}, then `hf auth login`",
                ) from None
            except errors.RepositoryNotFoundError:
                raise UserError(
                    f"there is no folder and no repository `{self.repo_id}`, or it is private",
                    "check the spelling; for a private one, `hf auth login`",
                ) from None
            except errors.RevisionNotFoundError:
                raise UserError(
                    f"`{self.repo_id}` has no revision `{self.revision}`",
                    "check `--revision`; a conversion that began with a revision which is gone "
                    "needs another folder",
                ) from None
            except Exception as error:
                reason = _passing_failure(error)
                if reason is None:
                    raise
                if isinstance(error, errors.OfflineModeIsEnabled):
                    raise UserError(
                        f"`{self.repo_id}` is not on this machine, and HF_HUB_OFFLINE is set",
                        "unset HF_HUB_OFFLINE to fetch it, or give a folder that exists",
                    ) from None
                if wait is None:
                    raise UserError(
                        f"`{self.repo_id}` cannot be reached: {reason}",
                        "check the connection and repeat the same command, or give a folder that "
                        "exists",
                    ) from None
                time.sleep(wait)


def _passing_failure(error: Exception) -> str | None:
    """Return what may pass by itself (a lost connection, a busy server) in words, else None."""
    from huggingface_hub import errors
    from huggingface_hub.utils import get_session

    http = sys.modules[type(get_session()).__module__.partition(".")[0]]  # httpx or its successor
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"the hub refuses access ({status})", "`hf auth login`") from None
        if status < 500 and status not in (408, 429):
            raise UserError(
                f"the hub refuses a file or a request ({status})",
                "check the names of repository and revision, then repeat the same command",
            ) from None
        return f"status {status}"
    if isinstance(error, (http.RequestError, errors.LocalEntryNotFoundError, ConnectionError)):
        return "no connection"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return "the connection was cut"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
