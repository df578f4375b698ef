"""Building a feature cache with any number of processes: each takes the next shard that nobody works on.

No process group is needed: ranks of one torchrun, array jobs of a cluster and a run started again next week all look at
the same folder. A shard is claimed by creating a file; a claim whose holder died (no sign of life for a while, or its
process is gone from this host) is taken over. Finished shards are kept when the clips, settings and weights they were
made from are still the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mindspeed_wan.checkpoint.tensor_file import write_tensor_file
from mindspeed_wan.data import feature_cache
from mindspeed_wan.data.dataset import ClipDataset
from mindspeed_wan.data.feature_cache import ClipContent, EncoderChoice, Identity
from mindspeed_wan.errors import DataError
from mindspeed_wan.models import conditioning
from mindspeed_wan.models.text_encoder import TextEncoder
from mindspeed_wan.models.vae import Tiling, WanVAE, unit_range

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STALE_SECONDS = 900.0
"""Seconds without a sign of life after which a claim on another host is taken over."""


class FeatureEncoder(Protocol):
    """What turns clips and captions into features."""

    def encode_clip(self, video: Tensor) -> Tensor:
        """Return normalised latents [16, f, h, w] of a video [3, F, H, W]."""

    def encode_text(self, caption: str) -> Tensor:
        """Return states [L, C] of a caption."""


class WanEncoders:
    """VAE and UMT5 on one device."""

    def __init__(self, choice: EncoderChoice, device: torch.device | str) -> None:
        assert choice.vae is not None and choice.text_encoder is not None  # encoder_choice refuses this
        tiling = Tiling(*choice.tiling) if choice.tiling else None
        self.choice = choice
        self.vae = WanVAE.from_pretrained(choice.vae, DTYPES[choice.vae_dtype], device, tiling=tiling)
        self.text = TextEncoder.from_pretrained(choice.text_encoder, DTYPES[choice.text_dtype], device,
                                                tokenizer=choice.tokenizer)

    def encode_clip(self, video: Tensor) -> Tensor:
        """Return normalised latents [16, f, h, w] fp32."""
        return self.vae.encode(video[None])[0]

    def encode_text(self, caption: str) -> Tensor:
        """Return states [L, C] in UMT5's dtype."""
        return self.text.encode([caption], self.choice.max_length, clean=self.choice.clean_captions)[0]


@dataclass
class BuildReport:
    """What one process did."""

    shards: int = 0
    samples: int = 0
    bad: int = 0
    kept: int = 0
    seconds: float = 0.0
    is_complete: bool = False


class Builder:
    """Builds one cache.

    Args:
        folder: the cache.
        dataset: clips, in the order that training will use.
        identity: what the cache is made from.
        encoder: makes the features.
        shard_samples: samples per shard.
        on_sample: called after each sample (progress).
    """

    def __init__(self, folder: Path, dataset: ClipDataset, identity: Identity, encoder: Callable[[], FeatureEncoder],
                 *, shard_samples: int = 32, on_sample: Callable[[], None] = lambda: None) -> None:
        self.folder, self.dataset, self.identity = folder, dataset, identity
        self.shard_samples, self.on_sample = shard_samples, on_sample
        self.shard_count = -(-len(dataset) // shard_samples)
        self._make_encoder = encoder
        self._encoder: FeatureEncoder | None = None

    @property
    def encoder(self) -> FeatureEncoder:
        """The encoders, loaded when the first sample needs them."""
        if self._encoder is None:
            self._encoder = self._make_encoder()
        return self._encoder

    def run(self) -> BuildReport:
        """Work until no shard is left that this process could do, and finish the cache if it is whole.

        Raises:
            DataError: the folder holds another cache.
            ResourceError: the disk is full.
        """
        started, report = time.monotonic(), BuildReport()
        self._open_folder()
        for number in self._in_turn():
            rows = self._plan(number)
            path = feature_cache.shard_path(self.folder, number)
            if _is_current(path, rows):
                report.kept += len(rows)
                continue
            with _claim(path) as is_mine:
                # Another process may have finished it between the look and the claim.
                if is_mine and not _is_current(path, rows):
                    report.bad += self._write_shard(path, rows)
                    report.shards, report.samples = report.shards + 1, report.samples + len(rows)
        report.is_complete = self._finish()
        report.seconds = time.monotonic() - started
        return report

    def _open_folder(self) -> None:
        path = self.folder / feature_cache.IDENTITY_FILE
        if path.is_file():
            found = feature_cache.read_identity(self.folder).differences(self.identity)
            if found:
                raise DataError(f"this folder holds a cache made differently ({'; '.join(found)})",
                                where=str(self.folder), fix="give another --out, or remove the folder")
            return
        feature_cache.write_atomically(path, json.dumps(self.identity.to_dict(), indent=2))

    def _in_turn(self) -> Iterator[int]:
        """Yield the shards; processes start at different ones, so that they seldom ask for the same."""
        start = int(os.environ.get("RANK", os.environ.get("SLURM_ARRAY_TASK_ID", "0")) or 0)
        world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")) or 1)
        offset = start * self.shard_count // max(1, world)
        yield from ((offset + step) % self.shard_count for step in range(self.shard_count))

    def _plan(self, number: int) -> list[dict[str, Any]]:
        """Return the rows of a shard: for each sample its name and everything training needs to know of it."""
        first = number * self.shard_samples
        path = feature_cache.shard_path(self.folder, number)
        known = [ClipContent(**row["content"]) for row in feature_cache.read_shard_rows(path) or ()]
        rows = []
        for index in range(first, min(first + self.shard_samples, len(self.dataset))):
            record, shape = self.dataset.records[index], self.dataset.shapes[index]
            content = feature_cache.clip_content(record.path, known)
            rows.append({
                "index": index,
                "name": feature_cache.sample_name(self.identity.key, index, content, record, shape),
                "shape": list(shape),
                "captions": list(record.captions),
                "where": record.where,
                "content": asdict(content),
            })
        return rows

    def _write_shard(self, path: Path, rows: list[dict[str, Any]]) -> int:
        """Encode a shard's samples and write it; returns how many clips could not be read.

        The index of an earlier build goes first: it names samples that this shard may not have.
        """
        (self.folder / feature_cache.INDEX_FILE).unlink(missing_ok=True)
        tensors: dict[str, Tensor] = {}
        bad = 0
        for row in rows:
            try:
                encoded = self._encode(row)
                row["crc"] = {name: feature_cache.checksum(tensor) for name, tensor in encoded.items()}
                tensors.update(encoded)
            except DataError as error:
                row["bad"], bad = error.message, bad + 1
            _touch(_claim_path(path))
            self.on_sample()
        write_tensor_file(path, tensors, {"rows": json.dumps(rows, ensure_ascii=False)})
        return bad

    def _encode(self, row: dict[str, Any]) -> dict[str, Tensor]:
        index, name = row["index"], row["name"]
        found: dict[str, Tensor] = {}
        for variant in range(self.identity.variants):
            video = unit_range(self.dataset.read(variant, index))
            found[f"{name}/latents/{variant}"] = self.encoder.encode_clip(video).cpu().contiguous()
            if self.identity.task == "i2v":
                still = conditioning.visible_video(video, conditioning.known_frames(video.shape[1]))
                found[f"{name}/condition/{variant}"] = self.encoder.encode_clip(still).cpu().contiguous()
        for number, caption in enumerate(row["captions"]):
            found[f"{name}/text/{number}"] = self.encoder.encode_text(caption).cpu().contiguous()
        return found

    def _finish(self) -> bool:
        """Write the empty caption and the index once every shard is there; returns whether the cache is whole."""
        index = []
        for number in range(self.shard_count):
            path = feature_cache.shard_path(self.folder, number)
            rows = feature_cache.read_shard_rows(path)
            if rows is None or not _is_current(path, self._names(number, rows)):
                return False
            index += [{**row, "shard": path.name} for row in rows]
        empty = self.folder / feature_cache.EMPTY_TEXT_FILE
        if not empty.is_file():
            write_tensor_file(empty, {"text": self.encoder.encode_text("").cpu()}, {})
        content = {"key": self.identity.key, "samples": index}
        feature_cache.write_atomically(self.folder / feature_cache.INDEX_FILE, json.dumps(content, ensure_ascii=False))
        return True

    def _names(self, number: int, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a finished shard's rows if they are the samples it should hold, judged without reading the clips."""
        first = number * self.shard_samples
        wanted = range(first, min(first + self.shard_samples, len(self.dataset)))
        expected = [
            feature_cache.sample_name(self.identity.key, index, ClipContent(**row["content"]),
                                      self.dataset.records[index], self.dataset.shapes[index])
            for index, row in zip(wanted, rows)
        ]
        return [{"name": name} for name in expected] if len(rows) == len(wanted) else []


def _is_current(path: Path, rows: Sequence[dict[str, Any]]) -> bool:
    """True when a whole shard is there and holds exactly these samples."""
    found = feature_cache.read_shard_rows(path)
    return found is not None and [row["name"] for row in found] == [row["name"] for row in rows]


# ---- claims ----------------------------------------------------------------------------------------------------------


def _claim_path(shard: Path) -> Path:
    return shard.with_suffix(".claim")


@contextlib.contextmanager
def _claim(shard: Path) -> Iterator[bool]:
    """Try to become the one that writes ``shard``; yields whether this process is."""
    path = _claim_path(shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _create_claim(path) and not (_is_abandoned(path) and _take_over(path)):
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def _create_claim(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise feature_cache.disk_error(error, path) from None
    try:
        os.write(descriptor, f"{socket.gethostname()} {os.getpid()} {_birth(os.getpid())}".encode())
    except OSError as error:
        path.unlink(missing_ok=True)  # a claim of nobody would keep everybody waiting
        raise feature_cache.disk_error(error, path) from None
    finally:
        os.close(descriptor)
    return True


def _is_abandoned(path: Path) -> bool:
    """True when the holder's process is gone from this host, or has not touched its claim for a long time."""
    try:
        age = time.time() - path.stat().st_mtime
        host, pid, born = [*path.read_text().split(), "", "", ""][:3]  # empty: killed before it wrote
    except OSError:
        return False
    if host == socket.gethostname() and pid.isdigit():
        now = _birth(int(pid))
        return now is None or bool(born and now and born != now)
    return age > _STALE_SECONDS


def _birth(pid: int) -> str | None:
    """Return when a process of this host started (a restarted container gives the same numbers again); ``None`` when
    there is none, "" where the system does not say."""
    if Path("/proc/self/stat").is_file():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


def _take_over(path: Path) -> bool:
    """Remove an abandoned claim and create ours; of several that try, one wins."""
    grave = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        os.rename(path, grave)
    except OSError:
        return False
    grave.unlink(missing_ok=True)
    return _create_claim(path)


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)
