"""Draws the pictures of docs/ anew from what is saved in bench/results/. Nothing is measured.

python bench/draw.py
"""

from importlib import import_module

import picture
import results

NAMES = "paper", "emulated", "pipeline", "torch_peer"


def main() -> None:
    picture.main()
    for name in NAMES:
        import_module(name).draw(results.picture(name, results.FOLDER), results.load(name))


if __name__ == "__main__":
    main()
