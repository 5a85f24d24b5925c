"""Where the rows of a task come from: a data set of the Hub, or files with the same columns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..rewards.inputs import is_missing


FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# What a value of a row can be asked to be
KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a text that is not empty": lambda value: isinstance(value, str) and value.strip() != "",
    "a number or a text": lambda value: (
        isinstance(value, (str, int, float)) and not isinstance(value, bool) and not is_missing(value)
    ),
    "a dictionary": lambda value: isinstance(value, Mapping),
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "a list of messages": lambda value: (
        isinstance(value, list) and value != [] and all(isinstance(item, Mapping) for item in value)
    ),
}


@dataclass(frozen=True)
class Source:
    """
    A split of a data set.

    Attributes:
        repo: Its name on the Hub.
        columns: The columns that a task reads; others are left behind.
        configuration: The configuration's name; `None`: the data set has one alone.
        split: The split's name on the Hub.
        file: The file of the repository that is read; for one whose loading script `datasets` runs no more. `None`:
            what the split consists of.
        name: What local files of it are called, as one folder can hold several sources: `name.jsonl`, `name.json`,
            `name.parquet`, or a folder of such files. `None`: every such file of the folder.
    """

    repo: str
    columns: tuple[str, ...]
    configuration: str | None = None
    split: str = "test"
    file: str | None = None
    name: str | None = None

    def load(self, path: str | os.PathLike[str] | None = None, revision: str | None = None) -> Dataset:
        """
        The rows, with `columns` alone.

        Args:
            path: A file, or a folder that has files or one subfolder with files, instead of the Hub's data set.
            revision: A branch, tag or commit of the Hub's data set; `None`: the newest.

        Raises:
            FileNotFoundError: If there are no such files.
            ValueError: If there are no rows, they can't be read, columns are missing, or both `path` and `revision`
                are given.
        """
        if path is not None and revision is not None:
            raise ValueError(f"revision ({revision!r}) is of the Hub's data set, so it can't go with path ({path}).")
        if path is not None:
            files = self._local_files(Path(path))
            form, names = FORMATS[files[0].suffix], [str(file) for file in files]
            try:
                rows = load_dataset(form, data_files=names, split="train")
            except (ValueError, StopIteration, DatasetGenerationError) as error:  # of empty and of broken files
                reason = str(error.__cause__ or error) or "there are none"
                raise ValueError(f"No rows of {self.repo} can be read from {', '.join(names)}: {reason}") from error
            return self._checked(rows, str(path))
        if self.file is not None:
            place = f"hf://datasets/{self.repo}{'' if revision is None else '@' + revision}/{self.file}"
            rows = load_dataset(FORMATS[Path(self.file).suffix], data_files=place, split="train")
        else:
            rows = load_dataset(self.repo, self.configuration, split=self.split, revision=revision)
        return self._checked(rows, self.repo)

    def _local_files(self, path: Path) -> list[Path]:
        places = [path]
        if self.name is not None and path.is_dir():
            places = [path / f"{self.name}{suffix}" for suffix in FORMATS] + [path / self.name]
        for place in places:
            files = _files(place.iterdir() if place.is_dir() else [place])
            if not files and place.is_dir():  # as in a snapshot, which may have them in data/
                files = _files(place.glob("[!.]*/**/*"))
                folders = sorted({str(file.parent) for file in files})
                if len(folders) > 1:
                    raise ValueError(f"{place} must have its files in one folder; it has {', '.join(folders)}.")
            if files:
                if len({FORMATS[file.suffix] for file in files}) > 1:
                    raise ValueError(
                        f"{place} holds files of different formats: {', '.join(file.name for file in files)}."
                    )
                return files
        raise FileNotFoundError(
            f"There are no rows of {self.repo} at {path}; it must be "
            + ("a file" if self.name is None else f"a folder with a file or folder {self.name!r}, or such a file")
            + f" ({', '.join(FORMATS)})"
            + (", or a folder of such files." if self.name is None else ".")
        )

    def _checked(self, rows: Dataset, place: str) -> Dataset:
        check_columns(rows, self.columns, place)
        return rows.select_columns(list(self.columns))


def _files(found: Iterable[Path]) -> list[Path]:
    return sorted(file for file in found if file.is_file() and file.suffix in FORMATS)


def value_of(row: Mapping[str, Any], column: str, kind: str, place: str) -> Any:
    """
    The value of a row's column, which must be of a kind.

    Args:
        row: The row, or a dictionary in it.
        column: The column, or the dictionary's key.
        kind: One of `KINDS`.
        place: Which row it is, for the error.

    Raises:
        ValueError: If it is of another kind.
    """
    value = row.get(column)
    if not KINDS[kind](value):
        raise ValueError(f"{place}: {column} must be {kind}; got {value!r:.200}.")
    return value


def check_columns(rows: Dataset, columns: Sequence[str], place: str) -> None:
    """
    Check that rows have the columns that are read.

    Args:
        rows: The rows.
        columns: The columns that they need.
        place: Where they are from, for the error.

    Raises:
        ValueError: If one is missing.
    """
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"The rows of {place} need the columns {', '.join(columns)}; missing: {', '.join(missing)}. They have "
            f"{', '.join(rows.column_names) or 'none'}."
        )


def split_rows(rows: Dataset, test_share: float, seed: int, split: str) -> Dataset:
    """
    The training or the test part of rows that come in one piece.

    The parts depend on the number of rows and the seed alone.

    Args:
        rows: All rows.
        test_share: Share of the test part, in (0, 1); rounded up to whole rows.
        seed: Of the shuffle.
        split: "train" or "test".

    Raises:
        ValueError: If there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} rows can't be split into rows to train on and rows to test on.")
    return rows.train_test_split(test_size=test_share, seed=seed)[split]
