"""The tables of what gpu_peers.py measured, in Markdown."""

import json
import statistics
from typing import Any

Row = dict[str, Any]


def table(result: Row) -> str:
    lines = [result["conditions"]["nvidia_smi"][-1], json.dumps(result["conditions"]["versions"])]
    rows = result["rows"]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        for batch in sorted({batch for row in mine for batch in row["edit_ms"]}, key=int):
            lines += ["", *one_table(network, batch, mine, result["steps"])]
        lines += [f"skipped: {network}: {row['name']}: {row['skipped']}" for row in mine if row.get("skipped")]
    return "\n".join(lines)


def one_table(network: str, batch: str, rows: list[Row], steps: int) -> list[str]:
    measured = [row for row in rows if row["edit_ms"].get(batch)]
    medians = {row["name"]: statistics.median(samples_of(row, batch)) for row in measured}
    torches = {name: value for name, value in medians.items() if name.startswith("torch")}
    best = min(torches, key=lambda name: torches[name]) if torches else None
    by_name = {row["name"]: [statistics.median(turn) for turn in row["edit_ms"][batch]] for row in measured}
    lines = [
        f"{network}, batch {batch}, {steps} steps; best of PyTorch: {best}",
        "",
        "| | ms an edit | min | max | ms a step | best torch's time ÷ its | device ms | from ort-cpu |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in measured:
        name, samples = row["name"], samples_of(row, batch)
        ratio = "-"
        if best is not None:
            found = [one / own for one, own in zip(by_name[best], by_name[name], strict=False)]
            ratio = f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"
        error = f"{row['largest_error']:.1e}{'' if row['agrees'] else ' TOO FAR'}" if "agrees" in row else "-"
        device_ms = (row.get("said") or {}).get("device_ms")
        lines.append(
            f"| {name} | {medians[name]:.2f} | {min(samples):.2f} | {max(samples):.2f} | {medians[name] / steps:.3f} | "
            f"{ratio} | {'-' if device_ms is None else format(device_ms, '.2f')} | {error} |"
        )
    return lines


def samples_of(row: Row, batch: str) -> list[float]:
    return [sample for turn in row["edit_ms"][batch] for sample in turn]
