"""What Linux still allows a process: the machine, and the control groups around it."""

from pathlib import Path

import pytest

from mlx_dsv3.device import available_bytes, has_metal, is_gpu, system_free_bytes

MB = 1 << 20
UNLIMITED = "9223372036854771712"  # what version 1 says without a limit


def lay_out(root: Path, files: dict[str, str]) -> Path:
    """Write files, with a machine that has 16 GB free."""
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {16 * 1024 * 1024} kB\n"} | files
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, used: int, cached: int = 0, **limits) -> dict[str, str]:
    """Return the files of a control group of version 2, in MB."""
    files = {f"{folder}/memory.{name}": f"{value}\n" for name, value in limits.items()}
    files[f"{folder}/memory.current"] = f"{used * MB}\n"
    files[f"{folder}/memory.stat"] = f"anon 7\nactive_file 9\ninactive_file {cached * MB}\n"
    return files


def free_mb(root: Path, files: dict[str, str]) -> float:
    return system_free_bytes(lay_out(root, files)) / MB


ROOT = "sys/fs/cgroup"
OWN = {"proc/self/cgroup": "0::/pod/box\n"}


def test_without_groups_the_machine_counts(tmp_path):
    assert free_mb(tmp_path, {}) == 16384
    assert system_free_bytes(tmp_path / "none") is None


def test_what_a_group_uses_is_no_longer_free(tmp_path):
    """A group of 3 GB with 2.9 in use was planned for as 3 GB, and the system ended the load."""
    assert free_mb(tmp_path, group(ROOT, used=2970, max=3072 * MB)) == 102
    assert free_mb(tmp_path, group(ROOT, used=4000, max=3072 * MB)) == 0


def test_pages_of_files_read_once_are_free(tmp_path):
    """A machine that has just converted a model looked full."""
    assert free_mb(tmp_path, group(ROOT, used=2970, cached=2900, max=3072 * MB)) == 3002


def test_the_least_of_all_groups_around(tmp_path):
    """Only the outermost group was looked at, which mostly has no limit."""
    files = OWN | group(ROOT, used=9000, max="max")
    files |= group(f"{ROOT}/pod", used=3000, max=5000 * MB)
    files |= group(f"{ROOT}/pod/box", used=100, max=4000 * MB)
    files |= group(f"{ROOT}/other", used=100, max=200 * MB)
    assert free_mb(tmp_path, files) == 2000
    assert free_mb(tmp_path, group(f"{ROOT}/pod", used=10, max=5000 * MB)) == 3900


def test_memory_high_slows_a_process_before_max_ends_it(tmp_path):
    assert free_mb(tmp_path, group(ROOT, used=500, max="max", high=2000 * MB)) == 1500
    assert free_mb(tmp_path, group(ROOT, used=500, max=1000 * MB, high=2000 * MB)) == 500


def test_a_container_that_knows_its_path_outside(tmp_path):
    """Without a namespace of its own, what it sees as the root is its own group."""
    files = {"proc/self/cgroup": "0::/../docker/1234\n"}
    assert free_mb(tmp_path, files | group(ROOT, used=100, max=300 * MB)) == 200


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_groups_of_version_1(tmp_path, controllers):
    files = {"proc/self/cgroup": f"9:cpuset:/\n4:{controllers}:/pod/box\n0::/\n"}
    for folder, limit, used in (
        ("", UNLIMITED, 5000 * MB),
        ("/pod", 1000 * MB, 900 * MB),
        ("/pod/box", UNLIMITED, 800 * MB),
    ):
        files[f"{ROOT}/memory{folder}/memory.limit_in_bytes"] = f"{limit}\n"
        files[f"{ROOT}/memory{folder}/memory.usage_in_bytes"] = f"{used}\n"
        stat = f"inactive_file 5\ntotal_inactive_file {50 * MB}\n"
        files[f"{ROOT}/memory{folder}/memory.stat"] = stat
    assert free_mb(tmp_path, files) == 150


def test_where_the_machine_does_not_say(tmp_path):
    """Old kernels have no `MemAvailable`, some containers no /proc/meminfo; groups still count."""
    files = {"proc/meminfo": "MemTotal: 5 kB\n"}
    assert system_free_bytes(lay_out(tmp_path, files)) is None
    assert free_mb(tmp_path, files | group(ROOT, used=1, max=3 * MB)) == 2


def test_this_machine_says_something():
    if not has_metal() and not is_gpu():
        assert 10 * MB < available_bytes() < 1 << 50
