"""A small form of the benchmarks, compared with the committed results.

    python -m bench --quick
    python -m bench --quick --save     # keeps the ratios, for later runs to be compared with

About five minutes on two cores. It prints ratios, which depend less on the machine than seconds do,
and ends with status 1 if one has fallen by more than 15% from `bench/results/quick.json`.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))  # where the others find each other

import results

ALLOWED_FALL = 0.15
PROGRAMS = {
    "paper": ["--quick"],
    "emulated": ["--settings", "8", "--rounds=1"],
    "pipeline": ["--slices=uniform:1", "--slices=uniform:8", "--rounds=5", "--json={json}"],
    "torch_peer": ["--cases", "1x1024", "--rounds=3"],
}
NEEDS = {"emulated": ("C++ compiler", which("c++")), "torch_peer": ("torch", find_spec("torch"))}


def main() -> int:
    args = parse_args()
    if not args.quick:
        sys.exit("the whole benchmarks are scripts of their own: python bench/NAME.py --help")
    committed = {} if args.save else results.load("quick")["ratios"]
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, float] = {}
        for name, options in PROGRAMS.items():
            need, is_there = NEEDS.get(name, ("", True))
            if not is_there:
                print(f"{name} is left out, since there is no {need}")
                continue
            options = [option.format(json=Path(folder) / f"{name}.json") for option in options]
            command = [sys.executable, FOLDER / f"{name}.py", *options, f"--folder={folder}"]
            print(f"{name}:", flush=True)
            if status := subprocess.run(command, check=False).returncode:
                return status
            found |= RATIOS[name](results.load(name, Path(folder)))
    if args.save:
        results.save("quick", {"ratios": found})
        return 0
    return compare(found, committed)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="which has to be given")
    parser.add_argument("--save", action="store_true", help="keep the ratios, compare nothing")
    return parser.parse_args()


def of_paper(content: dict[str, Any]) -> dict[str, float]:
    return {
        f"predicted speed-up, {name}": row["model"]["speedup"]
        for name, row in content["settings"].items()
    }


def of_emulated(content: dict[str, Any]) -> dict[str, float]:
    """Of the formula's time to the measured one."""
    return {
        f"formula / emulated, {name}, {label}": row["formula_seconds"] / row["measured_seconds"]
        for name, rows in content["settings"].items()
        for label, row in rows.items()
        if label in ("unsliced", "sliced")
    }


def of_pipeline(rows: dict[str, Any]) -> dict[str, float]:
    """Over two stages without slices."""
    _, _, (name, sliced) = rows.items()
    return {f"speed-up, {name}, 1 x 1024": sliced["speedup"]}


def of_torch_peer(content: dict[str, Any]) -> dict[str, float]:
    """How many times as fast."""
    return {
        f"speed beside torch, {case}, {name}": 1 / row["ratios"][name]["median"]
        for case, row in content["cases"].items()
        for name in ("two stages", "one core")
    }


RATIOS = {
    "paper": of_paper,
    "emulated": of_emulated,
    "pipeline": of_pipeline,
    "torch_peer": of_torch_peer,
}


def compare(found: dict[str, float], committed: dict[str, float]) -> int:
    """Prints the ratios beside the committed ones; returns 1 if one has fallen too far."""
    print(f"\n{'ratio':60}{'committed':>10}{'now':>10}")
    fallen = []
    for name in found.keys() - committed.keys():
        print(f"{name:60}{'-':>10}{found[name]:10.3f}")
    for name, before in committed.items():
        now = found.get(name)
        print(f"{name:60}{before:10.3f}{now if now is not None else float('nan'):10.3f}")
        if now is not None and now < (1 - ALLOWED_FALL) * before:
            fallen.append(name)
    for name in fallen:
        print(f"FAILED: {name} has fallen by more than {ALLOWED_FALL:.0%}")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
