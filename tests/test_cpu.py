"""How many threads compute, on machines and in containers that this one is not."""

import os

import pytest

import sdedit
from sdedit import cpu

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(cpus, files): one that has so many CPUs, and these files of the system: name below / -> text."""
    monkeypatch.setattr(cpu, "SIBLINGS", str(tmp_path / "cpu{}" / "siblings"))
    monkeypatch.setattr(cpu, "GROUPS", str(tmp_path / "groups"))
    monkeypatch.setattr(cpu, "GROUP_FOLDERS", str(tmp_path / "fs"))

    def of(cpus, files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return of


def paired(count):
    """CPUs i and i + count/2 are hardware threads of one core."""
    half = count // 2
    return {f"cpu{i}/siblings": f"{i % half},{i % half + half}\n" for i in range(count)}


TWO = {"groups": "0::/pod/main\n", "fs/pod/main/cpu.max": "max 100000\n"}
ONE = {"groups": "5:cpu,cpuacct:/docker/a\n1:name=systemd:/\n", "fs/cpu/docker/a/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("cpus", "files", "cores"),
    [
        (range(8), {}, 8),
        (range(8), paired(8), 4),
        ([0, 1, 4], paired(8), 2),  # taskset
        ([5], paired(8), 1),
        (range(8), TWO, 8),
        (range(64), TWO | {"fs/pod/cpu.max": "200000 100000\n"}, 2),
        (range(64), TWO | {"fs/pod/main/cpu.max": "150000 100000\n", "fs/pod/cpu.max": "400000 100000\n"}, 2),
        (range(64), TWO | {"fs/pod/main/cpu.max": "20000 100000\n"}, 1),
        (range(4), TWO | {"fs/pod/main/cpu.max": "900000 100000\n"}, 4),
        (range(64), {"groups": "0::/seen/from/outside\n", "fs/cpu.max": "300000 100000\n"}, 3),  # a container's root
        (range(8), ONE | {"fs/cpu/docker/a/cpu.cfs_quota_us": "-1\n"}, 8),
        (range(8), ONE | {"fs/cpu/docker/a/cpu.cfs_quota_us": "300000\n"}, 3),
        (
            range(8),
            ONE
            | {
                "fs/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "100000\n",
                "fs/cpu,cpuacct/docker/a/cpu.cfs_period_us": "50000\n",
            },
            2,
        ),
        (range(8), {"groups": "0::/\n", "fs/cpu.max": ""}, 8),
        (range(8), {"groups": "0::/\n", "fs/cpu.max": "100000 0\n"}, 8),
        (range(8), {"groups": "0::/\n", "fs/cpu.max": "a b c\n"}, 8),
        (range(8), {"groups": "\n0\n0:\n0::\n3:cpu\n0::a\u2028b\x0c\n0::/\x00\n", "fs/cpu.max": "200000 100000"}, 2),
    ],
)
def test_a_core_that_may_be_used_is_a_thread(machine, network, cpus, files, cores):
    machine(cpus, files)
    assert cpu.usable_cores() == cores
    with sdedit.load(network, backend="ort-cpu") as editor:
        assert editor.backend.threads == cores


def test_a_number_of_threads_that_is_asked_for_is_taken(machine, network):
    machine(range(2), TWO | {"fs/pod/cpu.max": "100000 100000\n"})
    with sdedit.load(network, backend="ort-cpu", threads=3) as editor:
        assert editor.backend.threads == 3
