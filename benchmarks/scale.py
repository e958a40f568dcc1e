"""Run a command and note its memory: the most in RAM, the process's own pages and those of mapped files apart.

    python benchmarks/scale.py vqgnn train --dataset generated:nodes=10M,edges=100M,features=64 \
        --hidden 64 --batch-size 100000 --epochs 1

The table that `vqgnn train` prints has the times by phase; this adds what /proc/PID says while it runs.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

_EVERY = 0.1  # seconds between looks
_FIELDS = {"VmRSS": "resident", "RssAnon": "own pages", "RssFile": "pages of mapped files"}


def watch(command: list[str]) -> dict[str, float]:
    """Most bytes of each kind, seconds, and bytes read and written from and to the disk, of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    folder, most, traffic = Path(f"/proc/{process.pid}"), dict.fromkeys(_FIELDS, 0), {}
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            for field in _FIELDS:
                most[field] = max(most[field], int(status[field].split()[0]) * 1024)
            traffic = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
        except (OSError, KeyError):  # it is ending
            continue
        time.sleep(_EVERY)
    result = {f"most {name}, GB": round(most[field] / 1e9, 2) for field, name in _FIELDS.items()}
    result |= {f"disk {key}, GB": round(int(traffic.get(key, 0)) / 1e9, 2) for key in ("read_bytes", "write_bytes")}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # on a busy machine, far less than the seconds
    result["seconds of the CPU"] = round(used.ru_utime + used.ru_stime, 1)
    return {**result, "seconds": round(time.perf_counter() - start, 1), "exit code": process.returncode}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(json.dumps(watch(sys.argv[1:]), indent=2))
