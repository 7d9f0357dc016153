"""Text to train on, and settings that name it."""

from pathlib import Path

from tpipe_jax.config.settings import Config, DataConfig, ModelConfig, TrainConfig

T = 8
B = 4


def settings(
    train: str | Path, eval: str | Path | None = None, *, vocab_size: int = 256, seed: int = 0
) -> Config:
    return Config(
        model=ModelConfig(seq_len=T, vocab_size=vocab_size),
        train=TrainConfig(batch_size=B, seed=seed),
        data=DataConfig(train=str(train), eval=None if eval is None else str(eval)),
    )


TEXT = "".join(f"{i} sheep, schlüpfrig\n" for i in range(20)).encode()


def write_folder(path: Path) -> Path:
    """Files shorter than a window, an empty one, and others that are not text."""
    (path / "b").mkdir(parents=True)
    for name, part in {
        "a.txt": TEXT[:3],
        "b/a.rst": TEXT[3:5],
        "b/empty.md": b"",
        "b/z.MD": TEXT[5:7],
        "c.py": TEXT[7:],
        "b/picture.png": b"\x89PNG",
        "notes.dat": b"12",
        "index.json": b'{"name": "something"}',
    }.items():
        (path / name).write_bytes(part)
    return path
