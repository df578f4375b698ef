"""Damaged, foreign and hostile input: refused with a clear line and the right exit code, the old result untouched."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from mindspeed_wan.errors import CheckpointError, ConfigError, ResourceError, WanError
from mindspeed_wan_converters.cli import run
from tests.converters.tiny_weights import random_state, read_expert, write_expert, write_mm, write_pipeline


def digest(folder: Path) -> dict[str, str]:
    """Return name -> hash of every file below ``folder``."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(target: Path) -> list[str]:
    """Names beside the target that a finished or failed conversion must not leave."""
    return [p.name for p in target.parent.iterdir() if p.name.startswith(f".{target.name}.")]


# ---- mutations -----------------------------------------------------------------------------------------------

Mutation = Callable[[Path, random.Random], None]


def _change(expert: Path, state: dict[str, torch.Tensor]) -> None:
    for file in expert.glob("*.safetensors*"):
        file.unlink()
    write_expert(expert, "t2v", state)


def drop(root: Path, rng: random.Random) -> None:
    state = read_expert(root / "transformer")
    del state[rng.choice(list(state))]
    _change(root / "transformer", state)


def rename(root: Path, rng: random.Random) -> None:
    state = read_expert(root / "transformer")
    name = rng.choice(list(state))
    state[name.replace("weight", "wieght").replace("bias", "bais").replace("table", "tabel")] = state.pop(name)
    _change(root / "transformer", state)


def transpose(root: Path, rng: random.Random) -> None:
    state = read_expert(root / "transformer")
    name = rng.choice([n for n, v in state.items() if v.ndim == 2 and v.shape[0] != v.shape[1]])
    state[name] = state[name].t().contiguous()
    _change(root / "transformer", state)


def change_type(root: Path, rng: random.Random) -> None:
    state = read_expert(root / "transformer")
    name = rng.choice(list(state))
    state[name] = state[name].to(rng.choice([torch.bfloat16, torch.float16, torch.float64, torch.int32,
                                             torch.float8_e4m3fn]))
    _change(root / "transformer", state)


def duplicate(root: Path, rng: random.Random) -> None:
    folder = root / "transformer"
    state = read_expert(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_expert(folder, "t2v", state, shards=3)
    name = rng.choice(list(state))
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    other = rng.choice([s for s in shards if s.name != index["weight_map"][name]])
    from safetensors.torch import load_file

    save_file({**load_file(other), name: state[name]}, other)


def duplicate_in_header(root: Path, rng: random.Random) -> None:
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8:8 + length].rstrip()
    name = rng.choice([n for n in json.loads(header) if n != "__metadata__"])
    extra = json.dumps({name: json.loads(header)[name]})[1:-1].encode()
    header = header[:-1] + b"," + extra + b"}"
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length:])


def _sharded(root: Path, rng: random.Random) -> Path:
    folder = root / "transformer_2"
    state = read_expert(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_expert(folder, "t2v", state, shards=3)
    return rng.choice(sorted(folder.glob("*.safetensors")))


def missing_shard(root: Path, rng: random.Random) -> None:
    _sharded(root, rng).unlink()


def truncated_shard(root: Path, rng: random.Random) -> None:
    shard = _sharded(root, rng)
    shard.write_bytes(shard.read_bytes()[:rng.randrange(1, shard.stat().st_size)])


def lfs_pointer(root: Path, rng: random.Random) -> None:
    _sharded(root, rng).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 28577024\n")


def web_page(root: Path, rng: random.Random) -> None:
    _sharded(root, rng).write_text("<!DOCTYPE html><html><body>401 Unauthorized</body></html>")


def empty_file(root: Path, rng: random.Random) -> None:
    _sharded(root, rng).write_bytes(b"")


def huge_header(root: Path, rng: random.Random) -> None:
    shard = _sharded(root, rng)
    shard.write_bytes(struct.pack("<Q", rng.choice([1 << 40, 1 << 63, 0, 1])) + shard.read_bytes()[8:])


def index_points_outside(root: Path, rng: random.Random) -> None:
    _sharded(root, rng)
    path = root / "transformer_2" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    index["weight_map"][name] = rng.choice([
        "../transformer/diffusion_pytorch_model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors",
        ""])
    path.write_text(json.dumps(index))


def index_link_outside(root: Path, rng: random.Random) -> None:
    shard = _sharded(root, rng)
    outside = root.parent / f"outside-{root.name}"
    shard.rename(outside)
    shard.symlink_to(outside)


def index_disagrees(root: Path, rng: random.Random) -> None:
    shard = _sharded(root, rng)
    path = root / "transformer_2" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = [n for n, f in index["weight_map"].items() if f != shard.name]
    if rng.random() < 0.5:
        index["weight_map"][rng.choice(names)] = shard.name
    else:
        del index["weight_map"][rng.choice(names)]
    path.write_text(json.dumps(index))


def equal_experts(root: Path, _: random.Random) -> None:
    shutil.rmtree(root / "transformer_2")
    shutil.copytree(root / "transformer", root / "transformer_2")


def missing_expert(root: Path, rng: random.Random) -> None:
    shutil.rmtree(root / rng.choice(["transformer", "transformer_2"]))


def other_task(root: Path, rng: random.Random) -> None:
    path = root / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config.update(rng.choice([{"in_channels": 36}, {"num_layers": 3}, {"num_layers": 5}, {"ffn_dim": 96},
                              {"num_attention_heads": 8}, {"image_dim": 24}, {"_class_name": "FluxTransformer"},
                              {"in_channels": 48}]))
    path.write_text(json.dumps(config))


def broken_config(root: Path, rng: random.Random) -> None:
    path = root / "transformer" / "config.json"
    path.write_text(rng.choice(["", "{", "[]", "null", path.read_text()[:50]]))


MUTATIONS: list[Mutation] = [
    drop, rename, transpose, change_type, duplicate, duplicate_in_header, missing_shard, truncated_shard, lfs_pointer,
    web_page, empty_file, huge_header, index_points_outside, index_link_outside, index_disagrees, equal_experts,
    missing_expert, other_task, broken_config]


def test_random_corruptions_of_a_pipeline_are_refused(tmp_path: Path) -> None:
    good = write_pipeline(tmp_path / "good")
    target = tmp_path / "target"
    assert run(["hf_to_dcp", str(good), str(target), "--quiet"]) == 0
    before = digest(target)
    for number in range(120):
        mutate, rng = MUTATIONS[number % len(MUTATIONS)], random.Random(number)
        bad = tmp_path / f"bad{number}"
        shutil.copytree(good, bad)
        mutate(bad, rng)
        verb = rng.choice(["hf_to_dcp", "hf_to_mm", "hf_to_original"])
        with pytest.raises(CheckpointError) as caught:
            run([verb, str(bad), str(target), "--overwrite", "--quiet"])
        _assert_clear(caught.value, mutate.__name__)
        assert digest(target) == before and leftovers(target) == [], mutate.__name__
        shutil.rmtree(bad)


def _assert_clear(error: WanError, what: str) -> None:
    text = str(error)
    assert error.where and len(text.splitlines()) <= 2 and "Traceback" not in text, (what, text)


def test_random_values_in_config_files_never_end_in_a_traceback(tmp_path: Path) -> None:
    hf = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32"), shards=2)
    dcp_folder = tmp_path / "dcp"
    assert run(["hf_to_dcp", str(hf), str(dcp_folder), "--quiet"]) == 0
    (dcp_folder / "release" / "manifest.json").unlink()
    files = [hf / "config.json", hf / "diffusion_pytorch_model.safetensors.index.json", dcp_folder / "release/wan.json"]
    values: list[Any] = [0, -1, 1 << 70, 1.5, "x", "", None, [], {}, [1, 2], True, [0, 0, 0], float("nan"), "\0",
                         "../x"]
    accepted = 0
    for number in range(300):
        rng = random.Random(number)
        path = rng.choice(files)
        good = path.read_text()
        raw = json.loads(good)
        inner = [raw, *(v for v in raw.values() if isinstance(v, dict))]
        part = rng.choice(inner)
        part[rng.choice(list(part))] = rng.choice(values)
        path.write_text(json.dumps(raw))
        try:
            run(["verify", str(dcp_folder if "dcp" in path.parts else hf), "--quiet"])
            accepted += 1
        except WanError as error:
            assert error.exit_code in (2, 4)
        path.write_text(good)
    assert 0 < accepted < 150, "keys that do not matter may have any value, the others may not"


def test_swapped_experts_are_refused(tmp_path: Path) -> None:
    dcp_folder = tmp_path / "dcp"
    assert run(["hf_to_dcp", str(write_pipeline(tmp_path / "good")), str(dcp_folder), "--quiet"]) == 0
    (dcp_folder / "transformer").rename(dcp_folder / "x")
    (dcp_folder / "transformer_2").rename(dcp_folder / "transformer")
    (dcp_folder / "x").rename(dcp_folder / "transformer_2")
    with pytest.raises(CheckpointError, match="swapped"):
        run(["dcp_to_hf", str(dcp_folder), str(tmp_path / "out"), "--quiet"])
    with pytest.raises(CheckpointError, match="swapped"):
        run(["dcp_to_hf", str(dcp_folder / "transformer"), str(tmp_path / "out"), "--expert", "high", "--quiet"])


@pytest.mark.parametrize("verb", ["hf_to_mm", "hf_to_dcp", "hf_to_original"])
def test_flipped_bits_are_found_or_harmless(tmp_path: Path, verb: str) -> None:
    hf = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "bf16"))
    good = tmp_path / "good"
    assert run([verb, str(hf), str(good), "--quiet"]) == 0
    back, out = verb.split("_")[2] + "_to_hf", tmp_path / "out"
    refused = 0
    for number in range(40):
        rng = random.Random(number)
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        victim = rng.choice([p for p in sorted(bad.rglob("*")) if p.is_file() and p.stat().st_size > 500])
        raw = bytearray(victim.read_bytes())
        for _ in range(1 + 4095 * (number % 4 == 0)):
            at = rng.randrange(len(raw))
            raw[at] ^= 1 << rng.randrange(8)
        victim.write_bytes(raw)
        try:
            run([back, str(bad), str(out), "--overwrite", "--quiet"])
        except WanError as error:
            refused += 1
            assert isinstance(error, CheckpointError)
        else:
            assert run(["verify", str(out), str(hf), "--quiet"]) == 0, f"wrong weights passed ({victim}, {number})"
        shutil.rmtree(bad)
    assert refused >= 30


# ---- hostile pickles and zips --------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


def hostile_pickles(canary: Path) -> list[bytes]:
    """Pickles that create ``canary`` when loaded the ordinary way."""
    import builtins
    import subprocess

    touch = f"open({str(canary)!r}, 'w').close()"
    opcodes = [
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.",
        b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.",
        b"c__builtin__\nexec\n(S\"" + touch.encode() + b"\"\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c" + bytes([len(touch)]) + touch.encode() + b"\x85R.",
        b"\x80\x04\x8c\x0acollections\x8c\x24OrderedDict.__init__.__globals__.get\x93.",
        b"\x80\x02\x82\x01.", b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        b"ctorch\nload\n(S'/tmp/x'\ntR.", b"cnumpy\nload\n(S'/tmp/x'\ntR.", b"ctorch.hub\nload\n(tR.",
        b"ctorch.serialization\n_load\n(tR.", b"cnumpy.f2py.crackfortran\ngeteval\n(tR.", b"cruamel\nx\n.",
    ]
    calls = [Call(os.system, f"touch {canary}"), Call(builtins.eval, touch),
             Call(subprocess.Popen, ["touch", str(canary)]), {"model": Call(os.system, f"touch {canary}")},
             [Call(builtins.exec, touch)], Call(builtins.getattr, "os", "system"), Call(builtins.__import__, "os")]
    return opcodes + [pickle.dumps(value, protocol) for value in calls for protocol in (0, 2, 4)]


def write_torch_zip(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(4096))
        archive.writestr("archive/version", "3\n")


def test_hostile_pickles_are_never_executed(tmp_path: Path) -> None:
    canary, target = tmp_path / "canary", tmp_path / "target"
    state = random_state("t2v", "fp32")
    hf_dir = write_expert(tmp_path / "hf", "t2v", state)
    mm = write_mm(tmp_path / "mm", state, [4])
    dcp_folder = tmp_path / "dcp"
    assert run(["hf_to_dcp", str(hf_dir), str(dcp_folder), "--quiet"]) == 0
    for file in ("manifest.json", "wan.json"):
        (dcp_folder / "release" / file).unlink()
    for pickled in hostile_pickles(canary):
        write_torch_zip(mm / "release/mp_rank_00/model_optim_rng.pt", pickled)
        (dcp_folder / "release" / ".metadata").write_bytes(pickled)
        for verb, source in (("mm_to_hf", mm), ("dcp_to_hf", dcp_folder), ("inspect", dcp_folder), ("verify", mm)):
            with pytest.raises(CheckpointError):
                run([verb, str(source), *([str(target)] if verb.endswith("hf") else []), "--cfg.hf_dir", str(hf_dir)])
    assert not canary.exists() and not target.exists()


def test_hostile_payload_inside_a_distcp_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Call(os.system, f"touch {canary}")))
    state = random_state("t2v", "fp32")
    hf_dir = write_expert(tmp_path / "hf", "t2v", state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process; shown once per process only
        dcp.save({"model": {n: v for n, v in state.items()}}, checkpoint_id=tmp_path / "dcp")
    metadata = dcp.FileSystemReader(str(tmp_path / "dcp")).read_metadata()
    index = next(i for i in metadata.storage_data if i.fqn.endswith("patch_embedding.weight"))
    file = tmp_path / "dcp" / metadata.storage_data[index].relative_path
    metadata.storage_data[index].offset = file.stat().st_size
    metadata.storage_data[index].length = len(buffer.getvalue())
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="system"):
        run(["dcp_to_hf", str(tmp_path / "dcp"), str(tmp_path / "out"), "--cfg.hf_dir", str(hf_dir)])
    assert not canary.exists()


def test_zip_bombs_and_stride_tricks_are_refused(tmp_path: Path) -> None:
    state = random_state("t2v", "fp32")
    mm = write_mm(tmp_path / "mm", state, [4])
    hf_dir = write_expert(tmp_path / "hf", "t2v", state)
    file = mm / "release/mp_rank_00/model_optim_rng.pt"
    model = torch.load(file, weights_only=True)["model"]

    def refuse(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            run(["mm_to_hf", str(mm), str(tmp_path / "out"), "--cfg.hf_dir", str(hf_dir)])

    stored = file.read_bytes()
    with zipfile.ZipFile(io.BytesIO(stored)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in source.infolist():
            archive.writestr(member.filename, source.read(member))
    refuse("compressed")
    torch.save({"model": {**model, "head.head.bias": torch.zeros(1).expand(1 << 33)}}, file)
    refuse("does not fit")
    torch.save({"model": {**model, "head.head.weight": model["head.head.weight"].t()}}, file)
    refuse("not contiguous")
    write_torch_zip(file, b"\x80\x02" + b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    refuse("bytearray")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../x"])
def test_dcp_metadata_naming_files_outside_is_refused(tmp_path: Path, name: str) -> None:
    hf_dir = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32"))
    assert run(["hf_to_dcp", str(hf_dir), str(tmp_path / "dcp"), "--quiet"]) == 0
    release = tmp_path / "dcp" / "release"
    metadata = dcp.FileSystemReader(str(release)).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = name
    (release / "manifest.json").unlink()
    (release / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside"):
        run(["dcp_to_hf", str(tmp_path / "dcp"), str(tmp_path / "out")])


# ---- disk full, kill -9 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["hf_to_mm", "hf_to_dcp", "hf_to_original"])
def test_a_disk_that_fills_up_leaves_the_old_result_and_nothing_else(tmp_path: Path, verb: str) -> None:
    old = write_expert(tmp_path / "old", "t2v", random_state("t2v", "fp32", 1))
    new = write_expert(tmp_path / "new", "t2v", random_state("t2v", "fp32", 2))
    target = tmp_path / "target"
    assert run([verb, str(old), str(target), "--quiet"]) == 0
    before, (soft, hard) = digest(target), resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(p.stat().st_size for p in target.rglob("*") if p.is_file())
    for number in range(20):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (random.Random(number).randrange(largest), hard))
            with pytest.raises(ResourceError, match="cannot write"):
                run([verb, str(new), str(target), "--overwrite", "--quiet"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert digest(target) == before and leftovers(target) == []


def test_too_little_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    with pytest.raises(ResourceError, match="free"):
        run(["hf_to_dcp", str(hf), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def _fork_and_kill(argv: list[str], delay: float) -> bool:
    """Run a conversion in a forked process and kill -9 it after ``delay`` seconds; True when it was cut short."""
    import time

    child = os.fork()
    if child == 0:
        try:
            os._exit(run(argv))
        except BaseException:
            os._exit(99)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_at_random_moments(tmp_path: Path, count: int) -> None:
    """Kill -9 an overwriting conversion ``count`` times; the target is the old or the new result, whole, each time."""
    import time

    experts = [write_expert(tmp_path / name, "t2v", random_state("t2v", "fp32", seed))
               for seed, name in enumerate(("old", "new"))]
    target, killed = tmp_path / "target", 0
    for number in range(count):
        rng = random.Random(number)
        verb = rng.choice(["hf_to_dcp", "hf_to_mm", "hf_to_original"])
        shutil.rmtree(target, ignore_errors=True)
        options = ["--quiet", "--max-shard-size", "8KB"]
        start = time.perf_counter()
        assert run([verb, str(experts[0]), str(target), *options]) == 0
        took = time.perf_counter() - start
        command = [verb, str(experts[1]), str(target), "--overwrite", *options]
        if rng.random() < 0.3:
            shutil.rmtree(target)
        killed += _fork_and_kill(command, rng.random() * took * 1.1)
        if target.exists():
            assert run(["verify", str(target), "--quiet"]) == 0, "a folder that looks complete and is not"
        assert run([*command, "--resume"]) == 0
        assert run(["verify", str(target), str(experts[1]), "--quiet"]) == 0
        assert run(["verify", str(target), "--quiet"]) == 0 and leftovers(target) == []
    assert killed >= count // 2


def test_kill_nine_never_leaves_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, 16)


@pytest.mark.slow
def test_kill_nine_at_fifty_random_moments(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, 50)


def test_resume_keeps_finished_files_and_rewrites_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_wan_converters import convert as module
    from mindspeed_wan_converters import writer

    hf = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32"))
    command = ["hf_to_dcp", str(hf), str(tmp_path / "out"), "--quiet", "--max-shard-size", "20KB"]
    real, written = writer._write_one, []

    def interrupted(file: Any, *args: Any) -> Any:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(file.name)
        return real(file, *args)

    monkeypatch.setattr(writer, "_write_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([*command, "--workers", "1"])
    first, written[:] = set(written), []
    monkeypatch.setattr(writer, "_write_one", lambda file, *args: (written.append(file.name), real(file, *args))[1])
    assert run([*command, "--resume"]) == 0
    assert first and written and not first & set(written)
    assert run(["verify", str(tmp_path / "out"), str(hf), "--quiet"]) == 0
    assert module.journal_path(tmp_path / ".out.tmp").exists() is False


def test_resume_with_a_changed_source_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_wan_converters import writer

    hf = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32", 1))
    command = ["hf_to_dcp", str(hf), str(tmp_path / "out"), "--quiet", "--max-shard-size", "20KB", "--workers", "1"]
    real, count = writer._write_one, [0]

    def interrupted(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(writer, "_write_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(command)
    monkeypatch.setattr(writer, "_write_one", real)
    write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32", 2))
    assert run([*command, "--resume"]) == 0
    assert run(["verify", str(tmp_path / "out"), str(hf), "--quiet"]) == 0


def test_two_conversions_never_write_one_target(tmp_path: Path) -> None:
    import fcntl

    hf = write_expert(tmp_path / "hf", "t2v", random_state("t2v", "fp32"))
    with open(tmp_path / ".out.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process writes this target"):
            run(["hf_to_dcp", str(hf), str(tmp_path / "out")])
    assert run(["hf_to_dcp", str(hf), str(tmp_path / "out"), "--quiet"]) == 0
