"""`mindspeed-wan data`: make an annotation from a folder, check it, split it, count it, look at it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed_wan.data.records import ClipRecord
    from mindspeed_wan.data.survey import Surveyed

HELP = "make, check, split, count and show a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add init, check, split, stats and sheet."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    init = actions.add_parser("init", help="write data.jsonl, data.txt and data.json for a folder of clips")
    init.add_argument("folder", type=Path, help="videos and images, captions in .txt files of the same name")
    init.add_argument("--out", type=Path, metavar="DIR", help="where the files go; default: the folder itself")
    init.add_argument("--caption", metavar="TEXT", help="caption of clips that have no .txt file")
    init.add_argument("--num-frames", type=int, default=81, metavar="N", help="frames of a training sample, 4k+1")
    init.add_argument("--size", default="480x832", metavar="HxW", help="size of a training sample")
    init.add_argument("--buckets", action="store_true", help="five side ratios of that many pixels instead of one size")
    init.add_argument("--overwrite", action="store_true", help="replace files of an earlier init")
    check = actions.add_parser("check", help="list every problem with file:line; exit code 7 when there is one")
    _add_source(check)
    check.add_argument("--decode", action="store_true", help="decode every frame, not only the first of each clip")
    split = actions.add_parser("split", help="divide into a training and a validation set, by source video")
    _add_source(split)
    split.add_argument("--share", type=float, default=0.9, metavar="S", help="of the source videos used for training")
    split.add_argument("--seed", type=int, default=0)
    split.add_argument("--out", type=Path, metavar="DIR", help="default: beside the data set")
    stats = actions.add_parser("stats", help="frame rates, lengths, sizes, caption lengths, duplicates")
    _add_source(stats)
    stats.add_argument("--tokenizer", type=Path, metavar="DIR", help="count caption tokens against 512")
    sheet = actions.add_parser("sheet", help="one HTML file with frames and captions")
    _add_source(sheet)
    sheet.add_argument("--out", type=Path, default=Path("data_sheet.html"), metavar="FILE")
    sheet.add_argument("--limit", type=int, default=200, metavar="N", help="clips shown, spread over the set")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="data.json, data.txt, an annotation file, or a folder")
    parser.add_argument("--data-folder", type=Path, metavar="DIR", help="what relative clip paths are joined to")


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    actions = {"init": _init, "check": _check, "split": _split, "stats": _stats, "sheet": _sheet}
    return actions[args.action](args)


# ---- init ------------------------------------------------------------------------------------------------------------


def _init(args: argparse.Namespace) -> int:
    from mindspeed_wan.data.plan import ClipSettings
    from mindspeed_wan.errors import ConfigError, DataError

    height, width = _size(args.size)
    ClipSettings(num_frames=args.num_frames, max_height=height, max_width=width)  # raises with the nearest legal value
    if not args.folder.is_dir():
        raise DataError("no such folder", where=str(args.folder))
    out = (args.out or args.folder).resolve()
    targets = {name: out / name for name in ("data.jsonl", "data.txt", "data.json")}
    existing = [str(path) for path in targets.values() if path.exists()]
    if existing and not args.overwrite:
        raise ConfigError(f"{existing[0]} exists", fix="give --overwrite, or another --out")
    clips, skipped = _clips_of(args.folder.resolve(), args.caption)
    if not clips:
        raise DataError("no usable clip" + (f"; e.g. {skipped[0]}" if skipped else ""), where=str(args.folder))
    rows = [_row(clip.completed, args.folder.resolve()) for clip in clips]
    _write(targets["data.jsonl"], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _write(targets["data.txt"], f"{args.folder.resolve()},{targets['data.jsonl']}\n")
    settings = _data_json(targets["data.txt"], args.num_frames, height, width, buckets=args.buckets)
    _write(targets["data.json"], json.dumps(settings, indent=2) + "\n")
    print(f"{len(clips)} clips -> {targets['data.jsonl']}")
    for reason in skipped:
        print(f"  left out: {reason}")
    print(f"next: mindspeed-wan data check {targets['data.json']}, then train with --mm-data {targets['data.json']}")
    return 0


def _clips_of(folder: Path, default_caption: str | None) -> tuple[list[Surveyed], list[str]]:
    """Return the readable, captioned clips of a folder, and for each other the reason."""
    from mindspeed_wan.data.formats import clip_files
    from mindspeed_wan.data.records import ClipRecord, RowSource, kind_of
    from mindspeed_wan.data.survey import survey
    from mindspeed_wan.data.text_files import is_utf8, printable, read_text

    records, skipped = [], []
    for path in clip_files(folder):
        kind = kind_of(path)
        assert kind is not None  # clip_files took the others out
        if not is_utf8(str(path)):
            skipped.append(f"{printable(str(path))} has a name that is not UTF-8")
            continue
        caption_file = path.with_suffix(".txt")
        caption = read_text(caption_file).strip() if caption_file.is_file() else default_caption
        if not caption:
            skipped.append(f"{path} has no caption ({caption_file.name}); --caption TEXT gives one to all")
            continue
        records.append(ClipRecord(path, (caption,), RowSource(str(caption_file), 1), kind))
    surveyed = survey(records)
    skipped += [f"{clip.record.path} {clip.problem}" for clip in surveyed if clip.info is None]
    return [clip for clip in surveyed if clip.info is not None], skipped


def _row(record: ClipRecord, root: Path) -> dict[str, Any]:
    """Return a record as MindSpeed-MM writes it."""
    inside = record.path.is_relative_to(root)
    row: dict[str, Any] = {
        "path": record.path.relative_to(root).as_posix() if inside else str(record.path),
        "cap": record.captions[0] if len(record.captions) == 1 else list(record.captions),
        "num_frames": record.num_frames,
        "fps": round(record.fps, 3) if record.fps else None,
        "resolution": {"height": record.height, "width": record.width} if record.height else None,
        "cut": list(record.cut) if record.cut else None,
        "crop": list(record.crop) if record.crop else None,
    }
    return {**{key: value for key, value in row.items() if value is not None}, **record.extra}


def _data_json(data_txt: Path, num_frames: int, height: int, width: int, *, buckets: bool = False) -> dict[str, Any]:
    from mindspeed_wan.data.buckets import standard_sizes

    sizes = {"size_buckets": [list(size) for size in standard_sizes(height * width)]} if buckets else {}
    return {
        "dataset_param": {
            "dataset_type": "t2v",
            "basic_parameters": {"data_path": str(data_txt), "data_storage_mode": "combine"},
            "preprocess_parameters": {
                "num_frames": num_frames, "max_height": height, "max_width": width, "max_hxw": height * width,
                "force_resolution": True, "hw_stride": 16, "hw_aspect_thr": 5.0, "frame_interval": 1, "cfg": 0.0,
                **sizes,
            },
        },
        "dataloader_param": {"sampler_type": "LengthGroupedSampler", "group_data": True, "drop_last": False},
    }


def _size(text: str) -> tuple[int, int]:
    from mindspeed_wan.errors import ConfigError

    parts = text.lower().replace("*", "x").split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ConfigError(f"--size is '{text}'", fix="write height x width, like 480x832")
    return int(parts[0]), int(parts[1])


def _write(path: Path, text: str) -> None:
    from mindspeed_wan.data.feature_cache import write_atomically

    write_atomically(path, text)


# ---- the others ------------------------------------------------------------------------------------------------------


def _records(args: argparse.Namespace, *, strict: bool = True) -> tuple[list[ClipRecord], Any, Any]:
    """Return (records, clip settings or None, problems)."""
    from mindspeed_wan.data import manifest
    from mindspeed_wan.data.records import Problems

    path, folder, settings = args.data, args.data_folder, None
    if _is_settings(path):
        from mindspeed_wan.config.load import load_files
        from mindspeed_wan.data.build import clip_settings
        from mindspeed_wan.errors import ConfigError

        section = load_files(data=path).data
        if section.kind != "video":
            is_ours = not str(section.data_path).endswith(".jsonl")  # else a folder that MindSpeed-MM wrote
            raise ConfigError("this data file names features, not clips", where=str(path),
                              fix=f"mindspeed-wan features check {section.data_path}" if is_ours else None)
        settings = clip_settings(section)
        path, folder = Path(str(section.data_path)), folder or (section.data_folder and Path(section.data_folder))
    problems = Problems()
    records = manifest.collect(path, folder, problems)
    manifest.check_existence(records, problems)
    if strict:
        problems.raise_if_any()
    return records, settings, problems


def _is_settings(path: Path) -> bool:
    """Tell MindSpeed-MM's data.json (an object with dataset_param, perhaps as YAML) from an annotation."""
    from mindspeed_wan.data.text_files import read_text

    if path.suffix.lower() in (".yaml", ".yml"):
        return True
    return path.suffix.lower() == ".json" and '"dataset_param"' in read_text(path)


def _surveyed(records: Sequence[ClipRecord], *, decode: bool = False) -> list[Surveyed]:
    from tqdm import tqdm

    from mindspeed_wan.data.survey import survey

    with tqdm(total=len(records), desc="clips", unit="clip", disable=None, leave=False) as bar:
        return survey(records, decode=decode, on_clip=lambda: bar.update(1))


def _check(args: argparse.Namespace) -> int:
    from mindspeed_wan.data.survey import find_problems
    from mindspeed_wan.errors import EXIT_DATA

    records, settings, problems = _records(args, strict=False)
    missing = {problem.where for problem in problems.found}
    # Nobody asks for the lines of a good data set: those of a JSON list have to be searched for.
    present = [record for record in records if record.where not in missing] if missing else records
    find_problems(_surveyed(present, decode=args.decode), settings, problems)
    for problem in problems.found:
        print(problem)
    checked = "every frame decoded" if args.decode else "first frame decoded"
    print(f"{len(records)} clips ({checked}): {len(problems.found)} problems")
    return EXIT_DATA if problems else 0


def _split(args: argparse.Namespace) -> int:
    from mindspeed_wan.data.survey import split
    from mindspeed_wan.errors import ConfigError

    if not 0 < args.share < 1:
        raise ConfigError(f"--share is {args.share}; it must lie between 0 and 1")
    records, _, _ = _records(args)
    out = (args.out or (args.data if args.data.is_dir() else args.data.parent)).resolve()
    for name, part in zip(("train", "val"), split(records, args.share, args.seed)):
        target = out / f"data_{name}.jsonl"
        lines = [json.dumps(_row(record, out), ensure_ascii=False, default=str) for record in part]
        _write(target, "\n".join(lines) + "\n")
        _write(out / f"data_{name}.txt", f"{out},{target}\n")
        print(f"{name}: {len(part)} clips of {len({record.path for record in part})} videos -> {out}/data_{name}.txt")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from mindspeed_wan.data.survey import describe, statistics

    tokenizer = None
    if args.tokenizer is not None:
        from mindspeed_wan.models.text_encoder import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
    records, _, _ = _records(args)
    print("\n".join(describe(statistics(_surveyed(records), tokenizer=tokenizer))))
    return 0


def _sheet(args: argparse.Namespace) -> int:
    from mindspeed_wan.data.contact_sheet import contact_sheet
    from mindspeed_wan.data.survey import describe, statistics
    from mindspeed_wan.errors import ConfigError

    if args.limit < 1:
        raise ConfigError(f"--limit is {args.limit}; it must be at least 1")
    records, _, _ = _records(args)
    step = max(1, -(-len(records) // args.limit))
    clips = _surveyed(records)
    summary = describe(statistics(clips))
    shown = clips[::step]
    _write(args.out.resolve(), contact_sheet(shown, f"{args.data}: {len(shown)} of {len(clips)} clips", summary))
    print(f"{len(shown)} of {len(clips)} clips -> {args.out.resolve()}")
    return 0
