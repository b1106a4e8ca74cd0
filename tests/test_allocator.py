from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, dyncompress, torch
from dyncompress.allocator import keep_freed_memory
from dyncompress.provenance import Environment

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(16 << 20).add_(1)  # 64 MB: glibc maps blocks above 32 MB anew whatever it has learned
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before, said = faults(), Environment.here().allocator
kept = keep_freed_memory()
faults()
print(before, faults(), kept, "freed memory kept" in said, "freed memory kept" in Environment.here().allocator)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
def test_large_blocks_are_reused_and_the_report_says_so():
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout.split()
    before, after = int(out[0]), int(out[1])
    assert after < before / 10  # page faults: a 64 MB block of fresh pages has 32 huge or 16384 small ones
    assert out[2:] == ["True", "False", "True"]
