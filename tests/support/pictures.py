"""What every picture must be: readable at the size of its axes, on a page of any colour."""

from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure
from matplotlib.text import Text


def check_readable(figure: Figure, path: Path) -> None:
    """No text is smaller than the numbers at the axes, axes have names, and all is opaque."""
    ticks = [label.get_fontsize() for axes in figure.axes for label in axes.get_xticklabels()]
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
    small = [text.get_text() for text in texts if text.get_fontsize() < max(ticks)]
    assert not small, small
    named = [axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes]
    assert all(named)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1


def shown(figure: Figure) -> str:
    """All text of a picture that can be seen."""
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return "\n".join(text.get_text() for text in texts if text.get_visible())
