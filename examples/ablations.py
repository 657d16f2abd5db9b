#!/usr/bin/env python3
"""What each part of AnchorNet's training is worth: one table from a few runs.

    python examples/ablations.py DATA                              # every variant, three seeds
    python examples/ablations.py DATA -- --device cuda --amp       # options for `anchorpatch train`
    python examples/ablations.py DATA --variants small no-se --seeds 0 -- --epochs 20

Runs live below --runs, one folder each, and go on where they stopped; those that are done are not
trained again. The table, in Markdown, goes to stdout: top-1 by Eq. 7 after the last epoch (not the
best one) as mean and standard deviation over the seeds, and by branch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

VARIANTS = {
    "paper": ["--recipe", "paper"],
    "small": ["--recipe", "small"],
    "S as printed": ["--recipe", "small", "--no-weighted-mean"],
    "no-se": ["--recipe", "small", "--no-se"],
    "no attention losses": ["--recipe", "small", "--no-attention-loss"],
}
BRANCHES = tuple(f"localization_{scale}" for scale in (63, 95, 111))


def train(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """Train one variant, or go on with it; return the record of its last epoch."""
    folder = args.runs / f"{variant.replace(' ', '-')}-{seed}"
    command = [sys.executable, "-m", "anchorpatch", "train", "--data", str(args.data)]
    command += ["--runs", str(folder), "--seed", str(seed), *VARIANTS[variant], *args.options]
    command += ["--image-cache", str(args.runs / "cache")]
    print("+", " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = (folder / "anchornet" / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1]) | {"minutes": sum(json.loads(x)["seconds"] for x in lines) / 60}


def row(variant: str, records: list[dict]) -> str:
    """Return a line of the table."""
    top1 = [100 * record["val"]["top1"] for record in records]
    spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
    branches = [
        f"{statistics.mean(100 * r['val']['top1_by_output'][name] for r in records):.1f}"
        for name in BRANCHES
    ]
    minutes = statistics.mean(record["minutes"] for record in records)
    cells = [variant, str(records[0]["epoch"]), str(len(records))]
    cells += [f"{statistics.mean(top1):.1f}{spread}", *branches, f"{minutes:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    args.options = arguments[cut + 1 :]
    columns = ["variant", "epochs", "seeds", "top-1 (Eq. 7)", "63 px", "95 px", "111 px", "minutes"]
    rows = [row(v, [train(args, v, seed) for seed in args.seeds]) for v in args.variants]
    print(f"| {' | '.join(columns)} |")
    print("|---" + "|---:" * (len(columns) - 1) + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
