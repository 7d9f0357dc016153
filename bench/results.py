"""Where the figures of the benchmarks are kept: `bench/results/NAME.json`, with the machine."""

import datetime
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")
DOCS = FOLDER.parents[1] / "docs"


def machine() -> dict[str, Any]:
    """What the figures of a run depend on, without names of hosts."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("tpipe_jax", "jax", "jaxlib", "numpy")},
    }


def save(name: str, content: dict[str, Any], folder: Path = FOLDER) -> None:
    """Writes the figures of a benchmark; floats keep four digits."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **_rounded(content)}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)  # on one line
    (folder / f"{name}.json").write_text(text + "\n")


def picture(name: str, folder: Path) -> Path:
    """Where to draw what belongs to results in the folder; docs/ shows those that are kept."""
    return (DOCS if folder == FOLDER else folder) / f"{name}.png"


def load(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """What has been saved."""
    return json.loads((folder / f"{name}.json").read_text())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
