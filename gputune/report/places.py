"""Where ``gputune tune`` puts what it makes, and how a command finds it again."""

from pathlib import Path

STUDY, MODEL = "study.db", "model"
"""What the folder of a search holds."""


def model_folder(study: Path) -> Path:
    """Return where the model of a study lies: beside it, under the study's own name where that is not the usual one."""
    return study.parent / (MODEL if study.name == STUDY else f"{study.stem}.{MODEL}")


def study_file(place: str) -> Path:
    """Return the study file of a path, which may be the folder of a search."""
    path = Path(place)
    return path / STUDY if path.is_dir() else path
