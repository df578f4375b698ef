"""What happens to clips that cannot be read: replaced, counted, written down, and above a share the run stops."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mindspeed_wan.errors import DataError


@dataclass(frozen=True)
class BadSample:
    """One clip that could not be read, and why."""

    index: int
    path: str
    where: str
    reason: str


class BadSampleLog:
    """The distinct bad clips of a run, kept in ``bad_samples.jsonl`` (one object a line).

    Ranks append whole lines to one file, and a rank that meets a new bad clip reads what the others found, so the
    share is that of the whole job. What earlier starts of the run wrote stays listed but does not count: those clips
    may have been mended since, and those that were not are found again.

    Args:
        path: the file; ``None`` keeps the count in memory only.
        num_samples: size of the data set.
        max_fraction: share of bad clips above which the run stops; 0 stops at the first.
        write: whether this rank writes (one of the ranks that read the same samples should).
    """

    def __init__(self, path: Path | None, num_samples: int, max_fraction: float, *, write: bool = True) -> None:
        self.path, self.num_samples, self.max_fraction, self.write = path, num_samples, max_fraction, write
        self.found: dict[int, BadSample] = {}
        self._before = path.stat().st_size if path is not None and path.is_file() else 0

    def add(self, samples: Iterable[BadSample]) -> None:
        """Note bad samples.

        Raises:
            DataError: there are now more than the run accepts.
        """
        new = [sample for sample in samples if sample.index not in self.found]
        if not new:
            return
        self._read_others()
        for sample in new:
            if sample.index not in self.found:
                self.found[sample.index] = sample
                self._append(sample)
        share = len(self.found) / self.num_samples
        if share > self.max_fraction:
            last = new[-1]
            listed = f" (all are listed in {self.path})" if self.path else ""
            raise DataError(
                f"{last.path}: {last.reason}; {len(self.found)} of {self.num_samples} clips cannot be read, "
                f"more than max_bad_fraction {self.max_fraction:g}{listed}",
                where=last.where,
                fix="repair or remove the clip (mindspeed-wan data check --decode finds all), or raise "
                    "--max-bad-fraction",
            )

    def _append(self, sample: BadSample) -> None:
        if self.path is None or not self.write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(asdict(sample), ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def _read_others(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._before)
            lines = file.read().splitlines()
        for line in lines:
            try:
                sample = BadSample(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line that another rank is just writing
            self.found.setdefault(sample.index, sample)
