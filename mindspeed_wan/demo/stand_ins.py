"""Tiny working folders as users of other tools have them: what the migration tutorials are tried out on.

``write_stand_in("mindspeed-mm", folder)`` and its siblings write random weights of a few hundred kilobytes, real mp4
clips and that tool's own files, with the names and keys of a full-size set-up and tiny sizes in them. The tutorials'
commands then run as they stand, on a laptop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspeed_wan.demo.clips import write_clips
from mindspeed_wan.errors import ConfigError, ResourceError, did_you_mean
from mindspeed_wan.models.wan.config import WanConfig

SIZE = (32, 48)
"""Height and width of the clips."""
NUM_FRAMES = 5
_PROMPT = "a red circle moves left"


def write_stand_in(kind: str, out: str | Path) -> Path:
    """Write one working folder and return it.

    Raises:
        ConfigError: no such tool.
        ResourceError: the folder exists and holds something.
    """
    if kind not in STAND_INS:
        known = f"known: {', '.join(STAND_INS)}"
        raise ConfigError(f"'{kind}' is not a tool with a stand-in", fix=did_you_mean(kind, tuple(STAND_INS)) or known)
    root = Path(out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ResourceError("the folder exists and is not empty", where=str(root), fix="name a new one")
    root.mkdir(parents=True, exist_ok=True)
    STAND_INS[kind](root.resolve())
    return root


# ---- MindSpeed-MM --------------------------------------------------------------------------------------------------

_MM_WEIGHTS = "weights/Wan-AI/Wan2.2-T2V-A14B-Diffusers"
_MM_FILES = "examples/wan2.2/A14B/t2v"


def _mindspeed_mm(root: Path) -> None:
    """Weights in the Diffusers layout, ``examples/wan2.2`` with JSON, YAML and shell files, clips with ``data.txt``."""
    from mindspeed_wan.demo.model_folder import write_model_folder

    write_model_folder(root / _MM_WEIGHTS, task="t2v")
    clips = _clips(root / "data")
    rows = [json.loads(line) for line in (clips / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    _json(clips / "data.json", rows)
    (clips / "data.jsonl").unlink()
    files = root / _MM_FILES
    files.mkdir(parents=True)
    (root / "examples/wan2.2/data.txt").write_text("./data,./data/data.json\n", encoding="utf-8")
    (root / "examples/wan2.2/samples_t2v_prompts.txt").write_text(f"{_PROMPT}\n", encoding="utf-8")
    predictor = _predictor(root / _MM_WEIGHTS / "transformer")
    for expert, start, stop in (("high", 0, 0.417), ("low", 0.417, 1)):
        _json(files / f"pretrain_model_{expert}.json", _mm_model(predictor, start, stop))
    _json(files / "data.json", _mm_data())
    _json(files / "inference_model.json", _mm_inference(predictor))
    (root / "examples/wan2.2/A14B/fsdp2_config.yaml").write_text(_MM_FSDP2, encoding="utf-8")
    _script(files / "pretrain_high.sh", _MM_PRETRAIN)
    _script(files / "inference.sh", _MM_INFERENCE)


def _mm_model(predictor: dict[str, Any], start: float, stop: float) -> dict[str, Any]:
    return {
        "load_video_features": False, "load_text_features": False, "task": "t2v", "encoder_offload_interval": 8,
        "patch": {"clip_grad_async": False, "get_dist_model_load_from_pt": True},
        "diffusion": {"model_id": "wan_flow_match_scheduler", "num_train_timesteps": 1000, "shift": 5,
                      "sigma_min": 0.0, "extra_one_step": True, "max_timestep_boundary": stop,
                      "min_timestep_boundary": start},
        "predictor": {**predictor, "model_type": "t2v", "pipeline_num_layers": [1, 1], "qk_norm": True,
                      "qk_norm_type": "rmsnorm", "cross_attn_norm": True, "eps": 1e-6, "max_seq_len": 1024,
                      "attention_async_offload": False, "use_fused_rmsnorm": True},
        "ae": {"model_id": "wan_video_vae", "from_pretrained": f"./{_MM_WEIGHTS}/vae", "dtype": "bf16",
               "enable_tiling": False, "norm_latents": True, "norm_mode": "channel_specified_shift_scale",
               "do_sample": False},
        "text_encoder": {"model_id": "UMT5", "hub_backend": "hf", "from_pretrained": f"./{_MM_WEIGHTS}/text_encoder",
                         "dtype": "bf16"},
    }


def _mm_data() -> dict[str, Any]:
    height, width = SIZE
    size = {"max_height": height, "max_width": width}
    return {
        "dataset_param": {
            "dataset_type": "t2v",
            "basic_parameters": {"data_path": "./examples/wan2.2/data.txt", "data_storage_mode": "combine"},
            "preprocess_parameters": {
                "video_processor_type": "OpensoraplanVideoProcessor", "video_reader_type": "DecordVideo",
                "image_reader_type": "Image", "num_frames": NUM_FRAMES, "frame_interval": 1, **size,
                "max_hxw": height * width, "force_resolution": True, "hw_stride": 8, "train_fps": 16,
                "train_pipeline": {"video": [
                    {"trans_type": "ResizeVideo", "param": {"transform_size": size, "mode": "shortside"}},
                    {"trans_type": "ToTensorVideo"},
                    {"trans_type": "norm_fun", "param": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}},
                    {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": size}},
                ]},
            },
            "use_text_processer": True,
            "text_preprocess_methods": [{"method": "basic_clean"}, {"method": "whitespace_clean"}],
            "tokenizer_config": {"autotokenizer_name": "AutoTokenizer", "hub_backend": "hf",
                                 "from_pretrained": f"./{_MM_WEIGHTS}/tokenizer", "model_max_length": 512},
        },
        "dataloader_param": {"dataloader_mode": "sampler", "sampler_type": "LengthGroupedSampler", "shuffle": True,
                             "drop_last": True, "pin_memory": True, "group_data": True},
    }


def _mm_inference(predictor: dict[str, Any]) -> dict[str, Any]:
    height, width = SIZE
    return {
        "pipeline_class": "WanPipeline", "prompt": "./examples/wan2.2/samples_t2v_prompts.txt",
        "save_path": "./samples/", "use_prompt_preprocess": True, "dtype": "bf16", "device": "npu", "fps": 16,
        "frame_interval": 1, "boundary_ratio": 0.875,
        "pipeline_config": {"input_size": [NUM_FRAMES, height, width], "cpu_offload": True},
        "ae": {"model_id": "wan_video_vae", "from_pretrained": f"./{_MM_WEIGHTS}/vae/", "dtype": "fp32",
               "norm_latents": True, "norm_mode": "channel_specified_shift_scale"},
        "tokenizer": {"hub_backend": "hf", "autotokenizer_name": "AutoTokenizer",
                      "from_pretrained": f"./{_MM_WEIGHTS}/tokenizer/"},
        "text_encoder": {"hub_backend": "hf", "model_id": "UMT5",
                         "from_pretrained": f"./{_MM_WEIGHTS}/text_encoder/", "dtype": "bf16"},
        "low_noise_predictor": "./runs/low/",
        "predictor": {**predictor, "model_type": "wan2.2-t2v"},
        "diffusion": {"model_id": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "num_inference_steps": 4,
                      "guidance_scale": [4.0, 3.0], "flow_shift": 3.0, "solver_order": 2,
                      "prediction_type": "flow_prediction", "use_flow_sigmas": True},
    }


_MM_FSDP2 = """sharding_size: auto
sub_modules_to_wrap:
  - predictor.blocks.{*}
  - predictor.head
reshard_after_forward: True
param_dtype: "bf16"
reduce_dtype: "fp32"
cast_forward_inputs: True
ignored_modules:
  - ae
  - text_encoder
recompute_modules:
  - predictor.blocks.{*}
use_reentrant: True
"""

_MM_PRETRAIN = """#!/bin/bash
source /usr/local/Ascend/cann/set_env.sh
export CUDA_DEVICE_MAX_CONNECTIONS=2
export TASK_QUEUE_ENABLE=1
export HCCL_CONNECT_TIMEOUT=1200

NPUS_PER_NODE=1
MASTER_PORT=${MASTER_PORT:-6000}
TP=1
PP=1
CP=1
MBS=1
GBS=2
LOAD_PATH="./ckpt/t2v/transformer"
SAVE_PATH="./runs/high"

torchrun --nproc_per_node $NPUS_PER_NODE --nnodes 1 --node_rank 0 --master_addr localhost --master_port $MASTER_PORT \\
    pretrain_sora.py \\
    --tensor-model-parallel-size $TP --pipeline-model-parallel-size $PP --context-parallel-size $CP \\
    --context-parallel-algo ulysses_cp_algo --micro-batch-size $MBS --global-batch-size $GBS \\
    --num-workers 0 --lr 1e-5 --min-lr 1e-5 --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8 \\
    --lr-decay-style constant --weight-decay 1e-2 --lr-warmup-init 0 --lr-warmup-iters 0 --clip-grad 1.0 \\
    --train-iters 2 --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-save-optim --no-save-rng \\
    --downcast-to-bf16 --distributed-timeout-minutes 20 --use-fused-rmsnorm --use-torch-fsdp2 \\
    --untie-embeddings-and-output-weights --fsdp2-config-path ./examples/wan2.2/A14B/fsdp2_config.yaml \\
    --optimizer-selection fused_torch_adamw --use-cpu-initialization --attention-mask-type general \\
    --mm-data ./examples/wan2.2/A14B/t2v/data.json --mm-model ./examples/wan2.2/A14B/t2v/pretrain_model_high.json \\
    --mm-tool ./mindspeed_mm/tools/tools.json --log-interval 1 --save-interval 10000 --eval-interval 10000 \\
    --eval-iters 10 --load $LOAD_PATH --save $SAVE_PATH --ckpt-format torch_dcp --distributed-backend nccl
"""

_MM_INFERENCE = """#!/bin/bash
source /usr/local/Ascend/cann/set_env.sh
MASTER_PORT=${MASTER_PORT:-6000}
torchrun --nproc_per_node 1 --nnodes 1 --node_rank 0 --master_addr localhost --master_port $MASTER_PORT \\
    inference_sora.py \\
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1 \\
    --context-parallel-algo ulysses_cp_algo --micro-batch-size 1 --global-batch-size 1 --num-workers 1 --lr 5e-6 \\
    --min-lr 5e-6 --train-iters 5010 --clip-grad 1.0 --weight-decay 1e-2 --bf16 --attention-mask-type general \\
    --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-save-optim --no-save-rng --finetune \\
    --mm-model ./examples/wan2.2/A14B/t2v/inference_model.json --load ./runs/high --distributed-backend nccl
"""


# ---- DiffSynth-Studio ----------------------------------------------------------------------------------------------


def _diffsynth(root: Path) -> None:
    """``models/Wan-AI/Wan2.2-T2V-A14B`` in Wan-AI's layout, ``data/example_video_dataset`` with ``metadata.csv``."""
    from mindspeed_wan.demo.original_folder import write_original_folder

    models = root / "models" / "Wan-AI"
    models.mkdir(parents=True)
    write_original_folder(models / "Wan2.2-T2V-A14B", task="t2v")
    folder = _clips(root / "data" / "example_video_dataset")
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "data.jsonl").unlink()
    table = ["video,prompt", *(f"{row['path']},{row['cap']}" for row in rows)]
    (folder / "metadata.csv").write_text("\n".join(table) + "\n", encoding="utf-8")


# ---- the CANN inference recipe -------------------------------------------------------------------------------------


def _cann_recipe(root: Path) -> None:
    """``Wan2.2-I2V-A14B`` in Wan-AI's layout and ``examples/i2v_input.JPG``."""
    from mindspeed_wan.demo.original_folder import write_original_folder

    write_original_folder(root / "Wan2.2-I2V-A14B", task="i2v")
    (root / "examples").mkdir()
    _first_frame(root / "examples" / "i2v_input.JPG")


# ---- VideoX-Fun ----------------------------------------------------------------------------------------------------

_FUN = "models/Diffusion_Transformer/Wan2.2-Fun-A14B-InP"
_REWARD = "models/Personalized_Model/Wan2.2-Fun-A14B-InP-{expert}-noise-HPS2.1.safetensors"


def _videox_fun(root: Path) -> None:
    """The Fun-InP folder with VideoX-Fun's class name in its experts, reward LoRAs, clips with their JSON table."""
    from mindspeed_wan.demo.original_folder import write_original_folder

    fun = root / _FUN
    fun.parent.mkdir(parents=True)
    write_original_folder(fun, task="i2v")
    for expert in ("high_noise_model", "low_noise_model"):
        config = json.loads((fun / expert / "config.json").read_text(encoding="utf-8"))
        _json(fun / expert / "config.json", {**config, "_class_name": "Wan2_2Transformer3DModel"})
    (root / "models/Personalized_Model").mkdir()
    for seed, expert in enumerate(("high", "low")):
        _reward_lora(fun / "low_noise_model" / "config.json", root / _REWARD.format(expert=expert), seed)
    folder = _clips(root / "datasets" / "internal_datasets")
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "data.jsonl").unlink()
    _json(folder / "metadata.json",
          [{"file_path": row["path"], "text": row["cap"], "type": "video"} for row in rows])


def _reward_lora(config_file: Path, path: Path, seed: int) -> None:
    """Write an adapter in VideoX-Fun's own grammar: every linear layer but the feed-forward ones, rank 4, alpha 2."""
    import torch
    from safetensors.torch import save_file

    from mindspeed_wan.lora.spec import linear_modules

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    wan = WanConfig.from_original(json.loads(config_file.read_text(encoding="utf-8")))
    for module in linear_modules(wan).values():
        if ".ffn." in module.original:
            continue
        stem = "lora_unet__" + module.original.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = 0.05 * torch.randn(4, module.in_features, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = 0.05 * torch.randn(module.out_features, 4, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)


# ---- parts ---------------------------------------------------------------------------------------------------------


def _clips(folder: Path) -> Path:
    """Write clips whose only annotation is ``data.jsonl``; the other files are each tool's own."""
    clips = write_clips(folder, num_clips=8, size=SIZE, num_frames=NUM_FRAMES, fps=16)
    clips.data_txt.unlink()
    clips.data_json.unlink()
    return clips.folder


def _first_frame(path: Path) -> None:
    import numpy as np
    from PIL import Image

    height, width = SIZE
    rows = np.linspace(0, 255, height)[:, None] * np.ones((1, width))
    Image.fromarray(np.stack([rows, rows.mean() * np.ones_like(rows), 255 - rows], -1).astype(np.uint8)).save(path)


def _predictor(folder: Path) -> dict[str, Any]:
    """Return MindSpeed-MM's ``predictor`` block for a Diffusers expert."""
    wan = WanConfig.from_diffusers(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return {"model_id": "wandit", "dtype": "bf16", "patch_size": list(wan.patch_size), "text_len": wan.text_len,
            "in_dim": wan.in_channels, "hidden_size": wan.dim, "ffn_dim": wan.ffn_dim, "freq_dim": wan.freq_dim,
            "text_dim": wan.text_dim, "out_dim": wan.out_channels, "num_heads": wan.num_heads,
            "num_layers": wan.num_layers}


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | 0o111)


STAND_INS: dict[str, Callable[[Path], None]] = {
    "mindspeed-mm": _mindspeed_mm, "diffsynth": _diffsynth, "cann-recipe": _cann_recipe, "videox-fun": _videox_fun,
}
"""Tool -> what writes its working folder."""
