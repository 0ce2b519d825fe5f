"""The faults that were tried, as a table: python tests/cluster/fault_table.py chaos.jsonl (make chaos)."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(rows: list[dict[str, str | float]]) -> str:
    """Markdown; a row is there only if the outputs were those of the undisturbed run."""
    lines = ["| fault | during | s undisturbed | s with the fault | s lost |", "|---|---|---|---|---|"]
    for row in rows:
        lost = float(row["seconds"]) - float(row["undisturbed"])
        lines.append(f"| {row['fault']} | {row['step']} | {row['undisturbed']} | {row['seconds']} | {lost:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]) + "\n")
