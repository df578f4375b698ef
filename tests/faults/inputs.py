"""Bad input of every kind: media, annotations, hostile files, mutated weights, typos, two jobs on one target."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mindspeed_wan.checkpoint.safe_load import (
    read_dcp_metadata,
    read_safetensors_header,
    read_safetensors_index,
    safe_torch_load,
)
from mindspeed_wan.checkpoint.torch_file import Opaque
from mindspeed_wan.config.flag_table_inert import ALL_FLAGS
from mindspeed_wan.config.flags import parse, read_words
from mindspeed_wan.data import manifest as annotations
from mindspeed_wan.data.loader import Schedule, micro_batch_keys
from mindspeed_wan.data.sampler import GlobalBatchSampler
from mindspeed_wan.data.video import read_frames, read_image
from mindspeed_wan.errors import CheckpointError, ConfigError, DataError, WanError
from mindspeed_wan_converters.cli import run as convert
from tests.converters import test_safety as corpus
from tests.converters.tiny_weights import assert_same, random_state, read_expert, write_expert, write_pipeline
from tests.faults import runs, victims
from tests.faults.harness import Tally, Victim, wait_until
from tests.faults.saves import file_size_limit
from tests.helpers.odd_media import damaged_files, damaged_images, number_of, odd_files
from tests.launches import test_bad_input as training_input
from tests.unit.config.test_typos import is_named, misspell, typo_in_file
from tests.unit.config.world import World as ConfigWorld
from tests.unit.data.test_manifest import CLIPS, DAMAGED


def refusal(action: Callable[[], Any], *codes: int) -> WanError:
    """Run ``action`` and return the one-message error that it must end in."""
    try:
        action()
    except WanError as error:
        assert not codes or error.exit_code in codes, f"exit code {error.exit_code}: {error}"
        assert "Traceback" not in str(error)
        return error
    raise AssertionError("was accepted")


# ---- T9: data order ------------------------------------------------------------------------------------------


def data_order(tally: Tally, count: int, folder: Path) -> None:
    """T9: data-parallel sizes change twice in the middle of an epoch; every sample is still seen once an epoch."""
    for number in range(count):
        with tally.case(number):
            rng = random.Random(number)
            samples, batch = rng.randint(5, 60), 4
            sampler = GlobalBatchSampler(samples, seed=number)
            total = -(-3 * samples // batch)
            cuts = sorted(rng.sample(range(1, total), 2))
            seen = []
            for ranks, first, last in ((2, 0, cuts[0]), (1, *cuts), (2, cuts[1], total)):
                for step in range(first, last):
                    for rank in range(ranks):
                        schedule = Schedule(global_batch_size=batch, micro_batch_size=1, rank=rank, ranks=ranks,
                                            consumed=step * batch)
                        keys = micro_batch_keys(sampler, schedule)
                        for _ in range(batch // ranks):
                            seen += next(keys)
            for epoch in range(3):
                assert sorted(index for e, index in seen if e == epoch) == list(range(samples))


# ---- T15, T16: data ------------------------------------------------------------------------------------------


def bad_media(tally: Tally, count: int, folder: Path) -> None:
    """T15: a file is read exactly or refused in one line that names it, within ten seconds."""
    (folder / "damaged").mkdir()
    (folder / "odd").mkdir()
    damaged = list(damaged_files(folder / "damaged").items())
    for name, path in damaged[:count]:
        with tally.case(name):
            started = time.monotonic()
            try:
                frames = read_frames(path, range(21))
            except DataError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) <= 2
            else:  # FFmpeg can do without some boxes; what it returns has to be whole
                assert [number_of(frame) for frame in frames] == list(range(21))
            assert time.monotonic() - started < 10
    for name, path in list(damaged_images(folder).items())[: max(0, count - tally.run)]:
        with tally.case(name):
            refusal(lambda path=path: read_image(path), 7)  # type: ignore[misc]
    for name, (path, frames_there, *_) in list(odd_files(folder / "odd").items())[: max(0, count - tally.run)]:
        with tally.case(name):
            assert len(read_frames(path, range(min(5, frames_there)))) == min(5, frames_there)


def bad_annotations(tally: Tally, count: int, folder: Path) -> None:
    """T16: file, line and a hint, exit code 7."""
    for name, _ in CLIPS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    for number, (name, text, _, line) in enumerate(DAMAGED[:count]):
        with tally.case(f"{number} {text!r:.40}"):
            path = folder / name
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            message = str(refusal(lambda path=path: annotations.load(path), 7))  # type: ignore[misc]
            assert message.startswith(str(path) if line is None else f"{path}:{line}:"), message
            assert len(message.splitlines()) <= 3


# ---- T17: hostile files --------------------------------------------------------------------------------------


def _hostile(folder: Path, canary: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, an action that must be refused)."""
    cases: list[tuple[str, Callable[[], Any]]] = []
    for number, pickled in enumerate(corpus.hostile_pickles(canary)):
        weights, shards = folder / f"{number}.pt", folder / f"dcp{number}"
        corpus.write_torch_zip(weights, pickled)
        shards.mkdir()
        (shards / ".metadata").write_bytes(pickled)
        cases.append((f"pickle {number} in .pt", lambda path=weights: _no_weights(path)))  # type: ignore[misc]
        cases.append((f"pickle {number} in .metadata", lambda path=shards: read_dcp_metadata(path)))  # type: ignore[misc]
    for name, write in (("deflated", _deflated), ("stride 0", _stride_zero), ("bare pickle", _bare_pickle)):
        write(path := folder / f"{name}.pt")
        cases.append((name, lambda path=path: safe_torch_load(path)))  # type: ignore[misc]
    os.mkfifo(folder / "pipe.safetensors")  # opening it would wait for ever
    cases.append(("a pipe", lambda: read_safetensors_header(folder / "pipe.safetensors")))
    for length in (1 << 40, 1 << 63, 0, 1, 101 << 20):
        path = folder / f"header{length}.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
        cases.append((f"header of {length}", lambda path=path: read_safetensors_header(path)))  # type: ignore[misc]
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    doubled = b"{" + entry + b"," + entry + b"}"
    (path := folder / "doubled.safetensors").write_bytes(struct.pack("<Q", len(doubled)) + doubled + bytes(4))
    cases.append(("a name twice", lambda path=path: read_safetensors_header(path)))  # type: ignore[misc]
    shards = ("../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:x", "", "link", "loop")
    for number, shard in enumerate(shards):
        index = folder / f"index{number}" / "x.safetensors.index.json"
        index.parent.mkdir()
        (index.parent / "link").symlink_to("/etc/passwd")
        (index.parent / "loop").symlink_to("loop")
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        cases.append((f"shard {shard!r}", lambda path=index: read_safetensors_index(path)))  # type: ignore[misc]
    return cases


def _no_weights(path: Path) -> None:
    """Load a file; an object of a foreign class that stays an inert note counts as refused."""
    if isinstance(safe_torch_load(path), Opaque):
        raise CheckpointError("inert", where=str(path))


def _deflated(path: Path) -> None:
    torch.save({"w": torch.zeros(1 << 20)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in source.infolist():
            archive.writestr(member.filename, source.read(member))


def _stride_zero(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 33)}, path)


def _bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": 1}))


def hostile_files(tally: Tally, count: int, folder: Path) -> None:
    """T17: refused with exit code 4, no code has run, and no memory was taken on the word of a header."""
    import resource

    canary = folder / "canary"
    cases = _hostile(folder, canary)
    for name, action in cases[:: max(1, len(cases) // count)]:
        with tally.case(name):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            refusal(action, 4)
            assert not canary.exists(), "code has run"
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "more than 256 MiB taken"


# ---- T18b, T19, T20: converters ------------------------------------------------------------------------------


def full_disk_conversions(tally: Tally, count: int, folder: Path) -> None:
    """T18, conversions: exit code 3, the old result is untouched, nothing is left beside it."""
    old = write_expert(folder / "old", "t2v", random_state("t2v", "fp32", 1))
    new = write_expert(folder / "new", "t2v", random_state("t2v", "fp32", 2))
    for number in range(count):
        verb = ("hf_to_mm", "hf_to_dcp", "hf_to_original")[number % 3]
        target = folder / verb
        if not target.exists():
            assert convert([verb, str(old), str(target), "--quiet"]) == 0
        before = corpus.digest(target)
        largest = max(p.stat().st_size for p in target.rglob("*") if p.is_file())
        with tally.case(f"{number} {verb}"):
            with file_size_limit(random.Random(number).randrange(largest)):
                refusal(lambda: convert([verb, str(new), str(target), "--overwrite", "--quiet"]), 3)  # noqa: B023
            assert corpus.digest(target) == before and corpus.leftovers(target) == []


def round_trips(tally: Tally, count: int, folder: Path) -> None:
    """T19: there and back gives the same names, types, shapes and bits."""
    ways = ("mm tp1", "mm tp2", "mm tp4", "dcp", "mm+dcp tp2", "original")
    for number, (way, task, dtype) in enumerate(list(product(ways, ("t2v", "i2v", "i2v-2.1"), ("bf16",)))[:count]):
        with tally.case(f"{way} {task} {dtype}"):
            place, state = folder / str(number), random_state(task, dtype, number)
            hf = write_expert(place / "hf", task, state, shards=3)
            kind, _, tp = way.partition(" tp")
            options = ["--cfg.target_parallel_config.tp_size", tp, "--cfg.target_parallel_config.pp_layers", "[]"]
            first = kind.partition("+")[0]
            convert([f"hf_to_{first}", str(hf), str(place / "a"), "--quiet", *(options if first == "mm" else [])])
            last = "a"
            if kind == "mm+dcp":
                convert(["mm_to_dcp", str(place / "a"), str(place / "b"), "--quiet"])
                first, last = "dcp", "b"
            convert([f"{first}_to_hf", str(place / last), str(place / "back"), "--quiet"])
            assert_same(read_expert(place / "back"), state)


def mutations(tally: Tally, count: int, folder: Path) -> None:
    """T20: dropped, renamed, transposed, cast, doubled, swapped: refused with a name; the old target stays."""
    good = write_pipeline(folder / "good")
    target = folder / "target"
    assert convert(["hf_to_dcp", str(good), str(target), "--quiet"]) == 0
    before = corpus.digest(target)
    for number in range(count):
        mutate, rng = corpus.MUTATIONS[number % len(corpus.MUTATIONS)], random.Random(1000 + number)
        bad = folder / f"bad{number}"
        shutil.copytree(good, bad)
        with tally.case(f"{number} {mutate.__name__}"):
            mutate(bad, rng)
            verb = rng.choice(["hf_to_dcp", "hf_to_mm", "hf_to_original"])
            error = refusal(lambda: convert([verb, str(bad), str(target), "--overwrite", "--quiet"]), 4)  # noqa: B023
            assert isinstance(error, CheckpointError) and error.where and len(str(error).splitlines()) <= 2
            assert corpus.digest(target) == before and corpus.leftovers(target) == []
        shutil.rmtree(bad)


# ---- T21: typos ----------------------------------------------------------------------------------------------


def _typo_in_file(folder: Path, number: int) -> bool:
    """Misspell one key of a run's three files; returns whether the message names the right one."""
    world = ConfigWorld(folder / str(number))
    path, wrong = typo_in_file(world, random.Random(number))
    message = str(refusal(lambda: parse(world.argv(), {"WORLD_SIZE": "8"}), 2))
    assert wrong in message, f"{wrong}: {message}"
    return is_named(path, message)


def _typo_in_flag(number: int) -> bool:
    rng = random.Random(10_000 + number)
    name = rng.choice([name for name in ALL_FLAGS if len(name) > 5])
    wrong = "--" + misspell(name[2:], rng)
    if wrong in ALL_FLAGS:
        return True  # --local_rank for --local-rank: another flag, with the same meaning
    errors = read_words([wrong, "1"]).errors
    assert errors and isinstance(errors[0], ConfigError) and wrong in str(errors[0])
    return f"'{name}'" in str(errors[0])


def key_typos(tally: Tally, count: int, folder: Path) -> None:
    """T21: a misspelt key of a file is refused and shown."""
    for number in range(count):
        with tally.case(number):
            _typo_in_file(folder, number)


def flag_typos(tally: Tally, count: int, folder: Path) -> None:
    """T21: a misspelt flag is refused and shown."""
    for number in range(count):
        with tally.case(number):
            _typo_in_flag(number)


def named_typos(tally: Tally, count: int, folder: Path) -> None:
    """T21: the same typos; a case passes when the message names the right word."""
    for number in range(count // 2):
        with tally.case(f"key {number}"):
            assert _typo_in_file(folder, number)
        with tally.case(f"flag {number}"):
            assert _typo_in_flag(number)


# ---- T22: exit codes -----------------------------------------------------------------------------------------


def exit_codes(tally: Tally, count: int, folder: Path) -> None:
    """T22: what users get wrong, found by the run itself: the code says it, no traceback does."""
    for name, (code, phrase, change) in list(training_input.CASES.items())[:count]:
        with tally.case(name):
            place = folder / name.replace(" ", "_").replace("/", "_")
            world = runs.make_world(place, num_frames=5, size=(32, 48))
            argv = change(world, world.flags(place / "save", iters=1))
            victim = Victim(victims.train, 0, 1, "", argv, log=place / "log")
            assert victim.wait() == code, f"exit code other than {code}: {victim.output()[-500:]}"
            output = victim.output()
            assert phrase in output and "Traceback" not in output and "iteration 1/" not in output, output[-500:]


# ---- T23: two at once ----------------------------------------------------------------------------------------


def concurrent_use(tally: Tally, count: int, folder: Path) -> None:
    """T23: the second job on a save path and the second conversion of a target are refused and told who was first."""
    source = write_expert(folder / "hf", "t2v", random_state("t2v", "fp32"))
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        is_job = number % 2 == 0
        hold = victims.hold_folder if is_job else victims.hold_target
        with tally.case(f"{number} {'job' if is_job else 'conversion'}"):
            holder = Victim(hold, str(place / "target"), str(place / "ready"))
            try:
                wait_until((place / "ready").exists, "the first one", alive=holder)
                if is_job:
                    second = runs.start(place / "target", iters=1)[0]
                else:
                    second = Victim(victims.convert, ["hf_to_dcp", str(source), str(place / "target"), "--quiet"],
                                    log=place / "log")
                assert second.wait() == 2, second.output()[-500:]
                assert f"pid {holder.pid} on " in second.output() and "Traceback" not in second.output()
            finally:
                holder.kill()
            if not is_job:  # a killed one is not in the way
                assert convert(["hf_to_dcp", str(source), str(place / "target"), "--quiet"]) == 0
