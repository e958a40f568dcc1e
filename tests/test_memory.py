import gc
import mmap
import platform
import subprocess
import sys

import pytest
import torch

from vqgnn import memory

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or memory.resident() is None, reason="no glibc, or no /proc"
)
# Two threads, one after the other, take 100 MB in small blocks and free them but for a few in between.
TWO_THREADS = """
import sys, threading
from vqgnn import memory
if sys.argv[1] == "one arena":
    memory.use_one_arena()
end = threading.Event()
def work(freed):
    blocks = [bytearray(50_000) for _ in range(2000)]
    blocks = blocks[::50]
    freed.set()
    end.wait()
before = memory.resident()
for _ in range(2):
    freed = threading.Event()
    threading.Thread(target=work, args=(freed,)).start()
    freed.wait()
print(memory.peak() - before)
end.set()
"""


def test_memory_of_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    memory.reset_peak(device)
    before = memory.resident(device)
    block = torch.empty(2**24, dtype=torch.uint8, device=device)
    assert memory.resident(device) - before == block.nbytes
    del block
    assert memory.resident(device) == before and memory.peak(device) - before == 2**24


def test_memory_counters():
    if memory.resident() is None:
        pytest.skip("no /proc")
    gc.collect()  # what earlier tests left must not be given back in between
    memory.reset_peak()
    before = memory.peak()
    size = 64_000_000
    with mmap.mmap(-1, size) as block:  # fresh from the system: malloc would take what earlier tests have freed
        block.write(bytes(size))
        assert memory.peak() - before > 0.8 * size
    assert memory.resident() <= memory.peak()


@needs_glibc
def test_freed_memory_is_given_back():
    memory.give_back()
    before, size = memory.resident(), 60_000  # below what malloc takes from the system by itself
    blocks = [torch.zeros(size, dtype=torch.uint8) for _ in range(2000)]
    blocks = blocks[::50] + blocks[-1:]  # between these, so that free alone gives nothing back
    kept = memory.resident() - before
    memory.give_back()
    given = kept - (memory.resident() - before)
    assert kept > 100_000_000 and given > 0.9 * kept


@needs_glibc
def test_threads_share_one_arena():
    taken = {
        how: int(subprocess.run([sys.executable, "-c", TWO_THREADS, how], check=True, capture_output=True).stdout)
        for how in ("one arena", "each its own")
    }
    assert taken["one arena"] < 130_000_000 and taken["each its own"] > 170_000_000
