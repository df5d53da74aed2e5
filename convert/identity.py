"""Which weights a source holds: V3 and V3-0324 have the same headers to the byte.

Three digests, none of which reads more than a few megabytes: `shards_sha256` over the sha256 of
every shard, which the hub tells; `sampled_sha256` over some bytes of the weights in a folder;
`source_sha256` over norms and biases, which both kinds of source know and golden files carry.
The first one that two sources share decides. Sizes and times of files are not part of it: they
belong to one folder on one machine (`Source.stamps`) and serve the resume of a conversion alone.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from convert.source import Source, read_bytes
from mlx_dsv3.checkpoint.hub import HEADER_REQUESTS

SAMPLE_BYTES = 4096
LATER_EXPERT = re.compile(r"\.experts\.(?!0\.)\d+\.")  # V3: 1,700 reads instead of 92,000


class Identity:
    """What a source's content is known by; a digest is computed when it is asked for."""

    def __init__(self, source: Source):
        self.source = source

    @cached_property
    def shards_sha256(self) -> str | None:
        """Digest of names and sha256 of all shards; None unless the hub tells every one."""
        known = self.source.repo.sha256 if self.source.repo else {}
        if not set(known) >= set(self.source.headers):
            return None
        lines = "".join(f"{known[shard]}  {shard}\n" for shard in sorted(self.source.headers))
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def sampled_sha256(self) -> str | None:
        """Digest of bytes from the middle of every tensor but later experts; None on the hub."""
        if self.source.repo:
            return None
        digest = hashlib.sha256(self.source.headers_sha256.encode())
        for name, tensor in sorted(self.source.tensors.items()):
            if not LATER_EXPERT.search(name):
                start, nbytes = tensor.nbytes // 2, min(SAMPLE_BYTES, tensor.nbytes // 2)
                path = self.source.path_of(tensor.shard)
                digest.update(name.encode() + read_bytes(path, tensor.offset + start, nbytes))
        return digest.hexdigest()

    @cached_property
    def source_sha256(self) -> str:
        """Digest of headers, norms and biases, as the reference's `HubTensors` computes it."""
        tensors = self.source.tensors
        names = sorted(name for name, tensor in tensors.items() if len(tensor.shape) == 1)
        digest = hashlib.sha256(self.source.headers_sha256.encode())
        with ThreadPoolExecutor(HEADER_REQUESTS) as pool:
            for name, values in zip(names, pool.map(self.source.read_small, names), strict=True):
                digest.update(name.encode() + values)
        return digest.hexdigest()

    def as_dict(self) -> dict[str, str | None]:
        """Return what journal and conversion.json name the source by."""
        repo = self.source.repo
        return {
            "id": repo and repo.repo_id,
            "revision": repo and repo.revision,
            "headers_sha256": self.source.headers_sha256,
            "source_sha256": self.source_sha256,
            "sampled_sha256": self.sampled_sha256,
            "shards_sha256": self.shards_sha256,
        }

    def is_that_of(self, noted: dict) -> bool | None:
        """Compare with one noted for the same headers; None where that one knows no content."""
        repo = self.source.repo
        if repo and noted.get("revision") == repo.revision:
            return True
        for key in ("shards_sha256", "sampled_sha256", "source_sha256"):
            if noted.get(key) and (ours := getattr(self, key)):
                return ours == noted[key]
        return None


def changed_shards(begun: dict, head: dict) -> list[str]:
    """Return the shards whose size or time is another than at the head `begun` of a journal."""
    return [shard for shard, stamp in head["files"].items() if begun["files"].get(shard) != stamp]
