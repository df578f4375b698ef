"""The bad files and the bad commands of the launcher corpus: what users mistype, misplace, and leave half-downloaded.

A word of a command or a variable may start with ``@``: ``@files/x`` is a prepared file, ``@model`` the pipeline
folder, ``@repo`` the repository, ``@new`` a path of this case that does not exist yet.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.world import World, write_json

T2V = "@repo/examples/wan2.2/A14B/t2v"
I2V = "@repo/examples/wan2.2/A14B/i2v"
INP = "@repo/examples/wan2.2/A14B/inp"
WAN21 = "@repo/examples/wan2.1/14B"
CONVERT, TOOL = "@bin/mm-convert", "@bin/mindspeed-wan"

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 28577000000\n"


@dataclass(frozen=True)
class Case:
    """One command that must fail with ``code`` and say ``phrase``."""

    name: str
    command: tuple[str, ...]
    code: int
    phrase: str
    variables: dict[str, str] = field(default_factory=dict)


# ---- files -------------------------------------------------------------------------------------------------------


def write_files(folder: Path, world: World) -> None:
    """Write every damaged file that the cases name."""
    folder.mkdir(parents=True)
    good = json.loads((world.files / "model_high.json").read_text())
    data = json.loads((world.files / "data.json").read_text())
    _write_json_files(folder, good, data)
    _write_weights(folder, world.model)
    _write_annotations(folder, world, data)
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "utf16.txt").write_bytes("a fox".encode("utf-16"))
    (folder / "fsdp_typo.yaml").write_text("sharding_sizes: auto\n")
    (folder / "fsdp_list.yaml").write_text("- a\n- b\n")
    (folder / "fsdp_broken.yaml").write_text("sharding_size: [1\n")
    torn = folder / "torn"
    torn.mkdir()
    (torn / "latest_checkpointed_iteration.txt").write_text("garbage")
    (torn / "iter_0000002").mkdir()


def _write_json_files(folder: Path, model: dict[str, Any], data: dict[str, Any]) -> None:
    texts = {"set.json": '{"resolution": {480, 832}}', "half.json": json.dumps(data)[:100], "empty.json": "",
             "list.json": "[1, 2]", "number.json": "7", "quotes.json": "{'dataset_param': {}}", "nul.json": "\0\0\0",
             "twice.json": '{"task": "t2v", "task": "i2v"}', "nan.json": '{"task": NaN}',
             "html.json": "<!DOCTYPE html><html><body>404</body></html>"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    changes: dict[str, dict[str, Any]] = {
        "typo": {"predictor": {**model["predictor"], "num_head": 4}},
        "type": {"predictor": {**model["predictor"], "num_layers": "two"}},
        "negative": {"predictor": {**model["predictor"], "num_layers": -2}},
        "heads": {"predictor": {**model["predictor"], "num_heads": 7}},
        "layers": {"predictor": {**model["predictor"], "num_layers": 3}},
        "boundary": {"diffusion": {**model["diffusion"], "min_timestep_boundary": 0.9, "max_timestep_boundary": 0.1}},
        "shift": {"diffusion": {**model["diffusion"], "shift": 0}},
        "vae": {"ae": {**model["ae"], "from_pretrained": "/nowhere/vae"}},
        "i2v": {"task": "i2v", "predictor": {**model["predictor"], "in_dim": 36, "model_type": "wan2.2-i2v"}},
    }
    for name, change in changes.items():
        write_json(folder / f"model_{name}.json", {**model, **change})
    for name, key, value in (("frames", "num_frames", 8), ("typo", "num_frame", 9)):
        param = dict(data["dataset_param"])
        param["preprocess_parameters"] = {**param["preprocess_parameters"], key: value}
        write_json(folder / f"data_{name}.json", {**data, "dataset_param": param})


def _write_weights(folder: Path, model: Path) -> None:
    for name in ("lfs", "html", "truncated", "zero", "text", "renamed"):
        shutil.copytree(model / "transformer", folder / name / "transformer")
    paths = {name: next((folder / name / "transformer").glob("*.safetensors")) for name in
             ("lfs", "html", "truncated", "zero", "text", "renamed")}
    paths["lfs"].write_text(LFS)
    paths["html"].write_text("<!DOCTYPE html><html>Access denied</html>")
    paths["truncated"].write_bytes(paths["truncated"].read_bytes()[:-100])
    paths["zero"].write_bytes(b"")
    paths["text"].write_text("hello")
    paths["renamed"].write_bytes(paths["renamed"].read_bytes().replace(b"patch_embedding.weight",
        b"patch_embeddinq.weight"))
    (folder / "only_config").mkdir()
    shutil.copy(model / "transformer" / "config.json", folder / "only_config")
    shard = folder / "missing_shard" / "transformer"
    shutil.copytree(model / "transformer", shard)
    (shard / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"patch_embedding.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}))
    for name, text in (("lfs_lora", LFS), ("text_lora", "hello"), ("empty_lora", "")):
        (folder / f"{name}.safetensors").write_text(text)
    (folder / "weights.gguf").write_bytes(b"GGUF" + bytes(100))


def _write_annotations(folder: Path, world: World, data: dict[str, Any]) -> None:
    """One data.json for each damaged ``data.txt`` or annotation."""
    videos = world.data
    annotations = {"object": '{"path": "a.mp4"}', "no_caption": '[{"path": "videos/a.mp4"}]',
        "no_path": '[{"cap": "a"}]',
                   "null": '[{"path": "videos/a.mp4", "cap": null}]', "cut": '[{"path": "videos/a', "nothing": "[]"}
    tables: dict[str, str] = {}
    for name, text in annotations.items():
        (folder / f"ann_{name}.json").write_text(text)
        tables[name] = f"{videos},{folder / f'ann_{name}.json'}\n"
    tables |= {"no_comma": f"{videos}\n", "absent": f"{videos},/nowhere/data.json\n", "empty": "",
               "folder": f"{videos},{videos}/videos\n"}
    for name, text in tables.items():
        (folder / f"table_{name}.txt").write_text(text)
        param = {**data["dataset_param"], "basic_parameters": {
            **data["dataset_param"]["basic_parameters"], "data_path": str(folder / f"table_{name}.txt")}}
        write_json(folder / f"data_ann_{name}.json", {**data, "dataset_param": param})


# ---- commands ----------------------------------------------------------------------------------------------------


def _train(name: str, code: int, phrase: str, *flags: str, script: str = f"{T2V}/pretrain_high.sh",
           **variables: str) -> Case:
    return Case(f"train: {name}", ("bash", script, *flags), code, phrase, variables)


def _generate(name: str, code: int, phrase: str, *flags: str, script: str = f"{T2V}/inference.sh",
              **variables: str) -> Case:
    return Case(f"generate: {name}", ("bash", script, *flags), code, phrase, variables)


def _video(name: str, code: int, phrase: str, *flags: str) -> Case:
    """A generation whose weights are right."""
    start = ("--task", "t2v-A14B", "--ckpt_dir", "@model", "--size", "96*64", "--frame_num", "5", "--prompt", "a fox")
    return _generate(name, code, phrase, *start, *flags)


def _convert(name: str, code: int, phrase: str, *words: str) -> Case:
    return Case(f"convert: {name}", (CONVERT, *words), code, phrase)


def _tool(name: str, code: int, phrase: str, *words: str) -> Case:
    return Case(f"tool: {name}", (TOOL, *words), code, phrase)


def training_cases() -> list[Case]:
    """Return the mistakes around the training launchers."""
    cases = [_train(f"{variable}={value}", 2, variable, **{variable: value})
             for variable, values in {
                 "NPROC_PER_NODE": ("0", "-1", "two", "1.5"), "TP": ("0", "x", "-2"), "PP": ("0", "1.0"),
                 "CP": ("0", "all"), "MBS": ("0", "1e3"), "GRAD_ACC_STEP": ("0", "-1"), "GBS": ("0", "many"),
                 "SP": ("yes",), "KEEP_LAST": ("-1", "none"), "MAX_RESTARTS": ("-1", "x"), "NNODES": ("0", "1:4"),
                 "NODE_RANK": ("-1", "first"), "MASTER_PORT": ("0", "port"), "PRECISION": ("fp8", "FP32"),
                 "DEVICE": ("tpu", "gpu", "NPU"),
             }.items() for value in values]
    placeholders = ("path to save your model", "your/path", "./<weights>", "[env_name]/ckpt", "/path/to/ckpt",
        "$CKPT",
                    "xxx", "ckpt/...")
    cases += [_train(f"placeholder {value!r}", 2, "placeholder", LOAD_PATH=value) for value in placeholders]
    cases += [_train(f"placeholder in {variable}", 2, "placeholder", **{variable: "your/file.json"})
              for variable in ("MM_DATA", "MM_MODEL", "SAVE_PATH")]
    cases += [_train(f"MM_MODEL {name}", 2, name, MM_MODEL=f"@files/{name}.json") for name in (
        "set", "half", "empty", "list", "number", "quotes", "nul", "twice", "nan", "html", "absent")]
    cases += [_train(f"MM_DATA {name}", 2, name, MM_DATA=f"@files/{name}.json") for name in (
        "set", "half", "empty", "list", "quotes", "html", "absent")]
    cases += [_train(f"model.json with {name}", 2, phrase, MM_MODEL=f"@files/model_{name}.json") for name, phrase in (
        ("typo", "num_heads"), ("type", "num_layers"), ("negative", "num_layers"), ("heads", "heads"),
        ("boundary", "boundary"), ("shift", "shift"), ("vae", "/nowhere/vae"))]
    cases += [_train(f"data.json with {name}", 2, phrase, MM_DATA=f"@files/data_{name}.json") for name, phrase in (
        ("frames", "num_frames"), ("typo", "num_frame"))]
    cases += [_train(f"annotation: {name}", 7, phrase, MM_DATA=f"@files/data_ann_{name}.json") for name, phrase in (
        ("object", "ann_object.json"), ("no_caption", "ann_no_caption.json"), ("no_path", "ann_no_path.json"),
        ("null", "ann_null.json"), ("cut", "ann_cut.json"), ("nothing", "names no data set"),
        ("no_comma", "table_no_comma.txt"),
        ("absent", "/nowhere/data.json"), ("empty", "table_empty.txt"))]
    cases += [_train(f"weights: {name}", 4, phrase, LOAD_PATH=path) for name, path, phrase in (
        ("nothing there", "/nowhere", "/nowhere"), ("pipeline root", "@model", "root of a pipeline"),
        ("other expert", "@model/transformer_2", "low-noise"), ("vae", "@model/vae", "vae"),
        ("text encoder", "@model/text_encoder", "text_encoder"), ("empty folder", "@files/empty", "empty"),
        ("a text file", "@files/file", "weight file"), ("LFS pointer", "@files/lfs/transformer", "git-lfs pointer"),
        ("HTML page", "@files/html/transformer", "safetensors"),
        ("truncated", "@files/truncated/transformer", "bytes"),
        ("0 bytes", "@files/zero/transformer", "safetensors"), ("garbage", "@files/text/transformer", "safetensors"),
        ("renamed tensor", "@files/renamed/transformer", "patch_embeddinq"),
        ("missing shard", "@files/missing_shard/transformer", "00001-of-00002"),
        ("configuration alone", "@files/only_config", "config.json"), ("torn tracker", "@files/torn", "tracker"),
        ("GGUF", "@files/weights.gguf", "weight file"))]
    cases += [_train("model of other depth", 4, "missing", MM_MODEL="@files/model_layers.json"),
              _train("I2V model file, T2V weights", 4, "T2V", MM_MODEL="@files/model_i2v.json"),
              _train("save below a file", 3, "file", SAVE_PATH="@files/file/run", LOG_FOLDER="@new"),
              _train("no weights", 2, "--from-scratch", LOAD_PATH="")]
    cases += [_train(" ".join(flags), 2, phrase, *flags) for flags, phrase in (
        (("--trian-iters", "3"), "--train-iters"), (("--lr", "fast"), "--lr"), (("--lr",), "--lr"),
        (("words",), "words"),
        (("--train-iters", "-3"), "train"), (("--clip-grad", "x"), "--clip-grad"), (("--seed", "1.5"), "--seed"),
        (("--ckpt-format", "zip"), "--ckpt-format"), (("--lr-decay-style", "cosin"), "cosine"),
        (("--lora-r", "0"), "lora"), (("--lora-alpha", "nan"), "lora"), (("--adam-beta2", "2"), "beta2"),
        (("--context-parallel-algo", "rings"), "context"), (("--bad-step-policy", "ignore"), "policy"),
        (("--expert", "middle"), "expert"), (("--save-interval", "0"), "save"),
        (("--micro-batch-size", "0"), "micro"),
        (("--distributed-timeout-minutes", "0"), "timeout"), (("--num-workers", "-1"), "workers"))]
    cases += [_train(f"layout {sorted(layout.items())}", 2, phrase, **layout) for layout, phrase in (
        ({"TP": "4"}, "split"), ({"CP": "3", "NPROC_PER_NODE": "3"}, "heads"),
        ({"TP": "3", "NPROC_PER_NODE": "3"}, "heads"),
        ({"GBS": "3"}, "batch"), ({"VP": "2"}, "pipeline"), ({"NNODES": "2", "NODE_RANK": "2"}, "node"),
        ({"FSDP_CONFIG": "@files/fsdp_typo.yaml"}, "sharding_size"),
        ({"FSDP_CONFIG": "@files/fsdp_list.yaml"}, "fsdp_list"),
        ({"FSDP_CONFIG": "@files/fsdp_broken.yaml"}, "fsdp_broken"),
        ({"FSDP_CONFIG": "@files/absent.yaml"}, "absent.yaml"))]
    cases.append(_train("no such Python", 3, "python9", PYTHON="python9"))
    for script in (f"{T2V}/pretrain_low.sh", f"{I2V}/pretrain_high.sh", f"{WAN21}/t2v/pretrain.sh",
        f"{WAN21}/i2v/pretrain.sh"):
        cases.append(_train(f"{script[6:]}: weights that are not there", 4, "/nowhere", script=script,
            LOAD_PATH="/nowhere"))
        cases.append(_train(f"{script[6:]}: typo", 2, "--train-iters", "--train-itres", "1", script=script))
    for script in (f"{T2V}/finetune_lora_high.sh", f"{T2V}/finetune_lora_low.sh", f"{I2V}/finetune_lora_high.sh"):
        cases += [_train(f"{script[6:]}: {name}", 2, phrase, script=script, **variables) for name, phrase,
            variables in (
            ("target", "qq", {"LORA_TARGETS": "qq"}), ("rank", "lora", {"LORA_R": "-4"}),
            ("alpha", "lora", {"LORA_ALPHA": "none"}))]
    both = f"{T2V}/finetune_lora_both.sh"
    cases += [_train("both experts of one expert's folder", 4, "both", script=both, LOAD_PATH="@model/transformer",
                     MM_MODEL="@world/model_{expert}.json"),
              _train("both experts, no model file", 2, "absent_high.json", script=both, LOAD_PATH="@model",
                     MM_MODEL="@files/absent_{expert}.json")]
    return cases


def generation_cases() -> list[Case]:
    """Return the mistakes around the generation launchers."""
    cases = [_video(" ".join(flags), 2, phrase, *flags) for flags, phrase in (
        (("--sample_stps", "4"), "sample_steps"), (("--size", "100*64"), "multiple of 16"),
        (("--size", "big"), "size"),
        (("--frame_num", "6"), "4k+1"), (("--frame_num", "x"), "frame_num"),
        (("--sample_steps", "0"), "sample_steps"),
        (("--sample_shift", "-1"), "sample_shift"), (("--sample_solver", "eular"), "euler"),
        (("--boundary", "2"), "boundary"),
        (("--sample_guide_scale", "a,b"), "guide"), (("--image", "a.png"), "image"), (("--prompt", ""), "empty"),
        (("--prompt_file", "@files/empty.txt"), "empty.txt"), (("--prompt_file", "@files/blank.txt"), "blank.txt"),
        (("--prompt_file", "/nowhere.txt"), "/nowhere.txt"), (("--prompt_file", "@files/utf16.txt"), "utf16.txt"),
        (("--num_videos", "0"), "num_videos"), (("--dtype", "fp8"), "dtype"), (("--memory", "all"), "memory"),
        (("--noise", "white"), "noise"), (("--crf", "high"), "crf"), (("--ulysses_size", "3"), "ulysses"),
        (("--ring_size", "2"), "world size 1"), (("--cfg_size", "2"), "world size 1"),
        (("--task", "t2v-14b"), "t2v-14B"),
        (("--task", "ti2v-5B"), "out of scope"), (("--lora_path", "/nowhere.safetensors"), "/nowhere.safetensors"),
        (("--lora_weight", "0.5"), "lora_weight"), (("--lora_merge",), "lora_merge"),
        (("--step_cache", "tea"), "teacache"),
        (("--vae_tile_stride", "8,8"), "vae_tile"), (("--sample_preset", "fast"), "lightx2v"),
        (("--use_prompt_extend",), "prompt"), (("--prompt",), "prompt"), (("--device", "tpu"), "tpu"),
        (("--dtype", "fp32", "fox"), "fox"), (("--pipeline_model_parallel_size", "2"), "pipeline"),
        (("--base_seed", "one"), "base_seed"))]
    weights = ("--task", "t2v-A14B", "--size", "96*64", "--frame_num", "5", "--prompt", "a fox", "--ckpt_dir")
    cases += [_generate(f"weights: {name}", 4, phrase, *weights, path) for name, path, phrase in (
        ("nothing there", "/nowhere", "/nowhere"), ("empty", "@files/empty", "empty"),
        ("one expert", "@model/transformer",
         "transformer"), ("vae", "@model/vae", "vae"), ("a file", "@files/file", "file"))]
    cases += [_generate(f"expert: {name}", 4, phrase, *weights, "@model", "--load", path) for name, path, phrase in (
        ("other one", "@model/transformer_2", ""), ("LFS pointer", "@files/lfs/transformer", "git-lfs pointer"),
        ("truncated", "@files/truncated/transformer", ""), ("garbage", "@files/text/transformer", ""),
        ("nothing", "/nowhere", "/nowhere"))]
    cases += [
        _generate("I2V without an image", 2, "image", "--task", "i2v-A14B", "--ckpt_dir", "@model", "--prompt", "x",
                  script=f"{I2V}/inference.sh"),
        _generate("I2V of T2V weights", 2, "the weights are t2v-A14B", "--task", "i2v-A14B", "--ckpt_dir", "@model",
            "--prompt", "x", "--image",
                  f"{I2V}/first_frame_1.png", script=f"{I2V}/inference.sh"),
        _generate("model file that is not there", 2, "absent.json", "--mm-model", "@files/absent.json", "--prompt",
            "x"),
        _generate("model file that is not JSON", 2, "html.json", "--mm-model", "@files/html.json", "--prompt", "x"),
        _generate("eight cards without a folder", 4, "/nowhere", script=f"{T2V}/generate_8card.sh",
            CKPT_DIR="/nowhere"),
        _generate("eight cards, four heads", 2, "heads", script=f"{T2V}/generate_8card.sh", CKPT_DIR="@model"),
        _generate("NPROC_PER_NODE=zero", 2, "NPROC_PER_NODE", script=f"{I2V}/generate_8card.sh",
            NPROC_PER_NODE="zero"),
    ]
    cases += [_generate(f"reward adapters: {name}", code, phrase, *flags, script=f"{INP}/predict_t2v.sh", **variables)
              for name, code, phrase, flags, variables in (
                  ("no adapters there", 2, "HPS2.1", (), {}),
                  ("no weights there", 4, "/nowhere", (), {"LORA_LOW": "", "LORA_HIGH": "", "CKPT_DIR": "/nowhere"}),
                  ("weight that is no number", 2, "lora_weight", (), {"LORA_LOW": "@files/lfs_lora.safetensors",
                                                                      "LORA_HIGH": "", "LORA_WEIGHT": "half"}),
                  ("memory mode", 2, "memory", (), {"LORA_LOW": "", "LORA_HIGH": "", "GPU_MEMORY_MODE": "full"}),
                  ("T2V weights", 2, "the weights are t2v-A14B", (), {"LORA_LOW": "", "LORA_HIGH": "",
                  "CKPT_DIR": "@model"}),
                  ("typo", 2, "sample_steps", ("--sample_step", "4"), {"LORA_LOW": "", "LORA_HIGH": ""}))]
    return cases


def tool_cases() -> list[Case]:
    """Return the mistakes around ``mm-convert`` and ``mindspeed-wan``."""
    cases = [_convert(name, code, phrase, *words) for name, code, phrase, words in (
        ("verb", 2, "hf_to_mm", ("hf_to_mmm", "a", "b")), ("nothing", 2, "", ("hf_to_mm",)),
        ("converter", 2, "Wan2.2T2VConverter", ("Wan2.2T2VConvertor", "hf_to_mm", "a", "b")),
        ("no source", 4, "/nowhere", ("hf_to_mm", "/nowhere", "@new")),
        ("no target", 2, "target", ("hf_to_mm", "@model")),
        ("source is target", 2, "", ("hf_to_mm", "@model/transformer", "@model/transformer")),
        ("typo", 2, "workers", ("hf_to_mm", "@model/transformer", "@new", "--wokers", "2")),
        ("dtype", 2, "dtype", ("hf_to_mm", "@model/transformer", "@new", "--dtype", "fp8")),
        ("TP of heads", 2, "", ("hf_to_mm", "@model/transformer", "@new", "--cfg.target_parallel_config.tp_size",
        "3")),
        ("TP word", 2, "tp_size", ("hf_to_mm", "@model/transformer", "@new", "--cfg.target_parallel_config.tp_size",
        "x")),
        ("PP layers", 2, "", ("hf_to_mm", "@model/transformer", "@new", "--cfg.target_parallel_config.pp_layers",
        "[1]")),
        ("I2V converter", 2, "T2V weights", ("Wan2.2I2VConverter", "hf_to_mm", "@model/transformer", "@new")),
        ("LFS pointer", 4, "git-lfs pointer", ("hf_to_dcp", "@files/lfs/transformer", "@new")),
        ("HTML page", 4, "", ("hf_to_dcp", "@files/html/transformer", "@new")),
        ("truncated", 4, "", ("hf_to_mm", "@files/truncated/transformer", "@new")),
        ("0 bytes", 4, "", ("hf_to_original", "@files/zero/transformer", "@new")),
        ("renamed tensor", 4, "patch_embeddinq", ("hf_to_mm", "@files/renamed/transformer", "@new")),
        ("missing shard", 4, "00001-of-00002", ("hf_to_mm", "@files/missing_shard/transformer", "@new")),
        ("wrong direction", 4, "", ("mm_to_hf", "@model/transformer", "@new")),
        ("torn tracker", 4, "tracker", ("mm_to_hf", "@files/torn", "@new")),
        ("below a file", 3, "", ("hf_to_mm", "@model/transformer", "@files/file/target")),
        ("adapter of nothing", 4, "/nowhere", ("lora_hf_to_mm", "/nowhere", "@new")),
        ("adapter is a pointer", 4, "git-lfs pointer", ("lora_hf_to_mm", "@files/lfs_lora.safetensors", "@new")),
        ("merge without adapter", 2, "lora_path", ("merge_lora_to_base", "@model/transformer", "@new")),
        ("verify nothing", 4, "/nowhere", ("verify", "/nowhere")),
        ("inspect nothing", 4, "/nowhere", ("inspect", "/nowhere")))]
    cases += [_tool(name, code, phrase, *words) for name, code, phrase, words in (
        ("command", 2, "lora", ("lore",)), ("no command of lora", 2, "", ("lora",)),
        ("adapter that is not there", 4, "/nowhere", ("lora", "inspect", "/nowhere")),
        ("adapter pointer", 4, "git-lfs pointer", ("lora", "inspect", "@files/lfs_lora.safetensors")),
        ("adapter text", 4, "text_lora", ("lora", "verify", "@files/text_lora.safetensors", "--report", "@new.log")),
        ("adapter empty", 4, "empty_lora", ("lora", "convert", "@files/empty_lora.safetensors", "--to", "kohya",
        "--out", "@new")),
        ("whole model as adapter", 4, "adapter", ("lora", "inspect", "@model/transformer")),
        ("format", 2, "diffusers", ("lora", "convert", "x", "--to", "difusers", "--out", "@new")),
        ("model", 2, "t2v-A14B", ("lora", "inspect", "@files/file", "--model", "t2v-A14")),
        ("merge weight", 2, "", ("lora", "merge", "--base", "@model/transformer", "--lora", "x=y", "--out", "@new")),
        ("import of nothing", 2, "command", ("import", "diffsynth")),
        ("import typo", 2, "lora_rank", ("import", "diffsynth", "--out", "@new", "--", "train.py",
        "--dataset_base_path", "d", "--dataset_metadata_path", "m",
          "--output_path", "o", "--lora_rnk", "3")),
        ("annotation", 7, "/nowhere", ("data", "check", "/nowhere")),
        ("plan of nothing", 2, "", ("plan", "--modle", "x")),
        ("report of nothing", 7, "metrics.jsonl", ("report", "/nowhere")))]
    return cases
