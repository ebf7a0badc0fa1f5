#!/usr/bin/env python3
"""Plants bugs into copies of the core, one at a time, and counts the steps until the simulation
finds each.

    python3 tools/mutants.py [NAME ...]        all, unless some are named
    python3 tools/mutants.py --list

The copies lie in build/mutants/; the core itself is never touched. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import native

CSRC = native.ROOT / "csrc"
BUILD = native.ROOT / "build" / "mutants"
SEEDS, STEPS = 400, 2500
LIMIT_S = 170


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: in ``file``, ``old`` (which stands there once) becomes ``new``."""

    what: str
    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times: {self.old}")
        return text.replace(self.old, self.new)


MUTANTS = {
    "skip-refund": Mutant(
        "a page that is kept does not get its second lease refunded",
        "mapper.cpp",
        "    member_->released(held - owed);",
        "    (void)owed;",
    ),
    "drop-fence": Mutant(
        "pages are unmapped before the work on them is done",
        "mapper_thread.cpp",
        "if (leaving_.empty() || !fence_passed(leaving_.front())) return false;",
        "if (leaving_.empty()) return false;\n  (void)fence_passed(leaving_.front());",
    ),
    "forget-kept-page": Mutant(
        "a page that is wanted again is unmapped all the same",
        "mapper.cpp",
        "  entry.leaving = 0;\n  if (there) return;",
        "  if (there) return;",
    ),
    "forget-member-reap": Mutant(
        "the row of a dead member is not cleared",
        "segment_rows.cpp",
        "      vacate_member(i, j);\n      ++reaped;",
        "      ++reaped;",
    ),
    "forget-owner-reap": Mutant(
        "the row of a dead owner is not cleared",
        "segment_rows.cpp",
        "      vacate_owner(i);\n      ++reaped;",
        "      ++reaped;",
    ),
    "keep-dead-bytes": Mutant(
        "what a dead member held is not booked as released",
        "segment_rows.cpp",
        "  row.released.store(charges::load(row.created));  // one store books all that it held\n",
        "",
    ),
    "no-steal": Mutant(
        "a lock that a dead process held is not stolen",
        "segment_lock.cpp",
        "if (known && !liveness_->take(layout::slot_byte(holder))) return false;",
        "if (known) return false;",
    ),
    "lend-a-page-too-many": Mutant(
        "a lease is granted for one granule more than there is",
        "segment_rows.cpp",
        "if (size_bytes > room.leasable) return false;",
        "if (size_bytes > room.leasable + 4096) return false;",
    ),
    "forget-mark": Mutant(
        "the high-water mark is not raised",
        "segment_rows.cpp",
        "if (charged > charges::load(mark)) mark.store(charged);",
        "(void)charged, (void)mark;",
    ),
    "give-back-unchecked": Mutant(
        "bytes are given back that were never leased",
        "account.cpp",
        "  if (size_bytes > sums.leased - sums.held) return false;\n",
        "  (void)sums;\n",
    ),
    "charge-leases-only": Mutant(
        "what members hold without an owner is not charged",
        "charges.hpp",
        "result.charge = std::max(result.leased, result.held);",
        "result.charge = result.leased;",
    ),
    "page-off-by-one": Mutant(
        "page 3 is mapped where page 4 belongs",
        "arena.cpp",
        "address() + region.offset + static_cast<size_t>(page) * region.chunk;",
        "address() + region.offset + static_cast<size_t>(page + (page == 3)) * region.chunk;",
    ),
    "lose-quarantine": Mutant(
        "a page that the device would not unmap is used again",
        "handles.cpp",
        "    quarantine(handle, address);\n    return;\n  }\n  ++counters_.unmaps;",
        "    give_back(handle);\n    return;\n  }\n  ++counters_.unmaps;",
    ),
    "release-without-kernel": Mutant(
        "the host's memory is released and not given back to the kernel",
        "host_backend.cpp",
        "error = punch(memfd_.get(), handle.id, handle.size) == 0 ? 0 : errno;",
        "error = 0;\n    (void)punch;",
    ),
    "extent-off-by-one": Mutant(
        "the space behind a released handle begins a granule too early",
        "host_backend.cpp",
        "    end_ = it->first;\n    free_.erase(it);",
        "    end_ = it->first - 4096;\n    free_.erase(it);",
    ),
    "unwind-half": Mutant(
        "a map that fails half-way keeps the pages before the failure in its count",
        "arena.cpp",
        "      mapped_pages_ += static_cast<int64_t>(pages.size());\n    }\n  }",
        "    }\n    mapped_pages_ += static_cast<int64_t>(pages.size());\n  }",
    ),
    "forget-evicted": Mutant(
        "the pool does not say which cached blocks were lost with a page",
        "blocks.cpp",
        "        evicted.push_back(id);\n      }\n      file_page(page, true);",
        "        (void)evicted;\n      }\n      file_page(page, true);",
    ),
    "inherit-handles": Mutant(
        "a forked child may use its parent's handles",
        "liveness.cpp",
        "      each->inherited_.store(true, std::memory_order_relaxed);\n",
        "",
    ),
}


def plant(mutant: Mutant, name: str) -> Path:
    """A copy of the core with the bug in it."""
    folder = BUILD / name / "csrc"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source in [*CSRC.glob("*.cpp"), *CSRC.glob("*.hpp")]:
        shutil.copy(source, folder)
    target = folder / mutant.file
    target.write_text(mutant.applied(target.read_text()))
    return folder


def hunt(name: str) -> int | None:
    """Steps until the simulation found the bug; None where it did not."""
    program = native.build("plain", "simulate", plant(MUTANTS[name], name), BUILD, keep=True)
    command = [str(program), "--seeds", str(SEEDS), "--steps", str(STEPS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if line.startswith("violation")]
    print("   ", said[0] if said else done.stderr.strip()[:200])
    found = re.search(r"seed (\d+)(?:, after (\d+) steps)?", done.stderr)
    if found is None:
        return STEPS
    # What shows only when everybody has left has taken all steps of its seed.
    return (int(found[1]) - 1) * STEPS + int(found[2] or STEPS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="all, unless some are named")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        for name, mutant in MUTANTS.items():
            print(f"{name:24} {mutant.what}")
        return 0
    missed = []
    results = {}
    for name in options.names or MUTANTS:
        steps = hunt(name)
        results[name] = steps
        print(f"{name:24} {'MISSED' if steps is None else f'after {steps} steps'}", flush=True)
        if steps is None:
            missed.append(name)
    (BUILD / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if missed:
        print(f"mutants: not found: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
