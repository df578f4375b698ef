"""A folder with every file a run names, in MindSpeed-MM's spelling with the values of its A14B examples."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL: dict[str, Any] = {
    "load_video_features": False,
    "load_text_features": False,
    "task": "t2v",
    "diffusion": {
        "model_id": "wan_flow_match_scheduler",
        "num_train_timesteps": 1000,
        "shift": 5,
        "sigma_min": 0.0,
        "extra_one_step": True,
        "max_timestep_boundary": 0.417,
        "min_timestep_boundary": 0.0,
    },
    "predictor": {
        "model_id": "wandit",
        "dtype": "bf16",
        "model_type": "t2v",
        "patch_size": [1, 2, 2],
        "text_len": 512,
        "in_dim": 16,
        "hidden_size": 5120,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "text_dim": 4096,
        "img_dim": 1280,
        "out_dim": 16,
        "num_heads": 40,
        "num_layers": 40,
        "pipeline_num_layers": [10, 10, 10, 10],
        "qk_norm": True,
        "qk_norm_type": "rmsnorm",
        "cross_attn_norm": True,
        "eps": 1e-6,
        "max_seq_len": 1024,
        "attention_async_offload": False,
        "use_fused_rmsnorm": True,
    },
    "patch": {"clip_grad_async": True, "bridge_patch": True},
    "encoder_offload_interval": 8,
    "ae": {
        "model_id": "wan_video_vae",
        "from_pretrained": "weights/vae",
        "dtype": "bf16",
        "enable_tiling": False,
        "tiling_param": {
            "tile_sample_min_height": 256,
            "tile_sample_min_width": 256,
            "tile_sample_stride_height": 192,
            "tile_sample_stride_width": 192,
        },
        "norm_latents": True,
        "norm_mode": "channel_specified_shift_scale",
        "do_sample": False,
    },
    "text_encoder": {"model_id": "UMT5", "dtype": "bf16", "hub_backend": "hf", "from_pretrained": "weights/umt5"},
}

I2V_CHANGES: dict[str, dict[str, Any]] = {
    "diffusion": {"max_timestep_boundary": 1.0, "min_timestep_boundary": 0.358},
    "predictor": {"model_type": "wan2.2-i2v", "in_dim": 36},
    "ae": {"i2v_processor": {"processor_id": "wan_i2v_processor", "i2v_vae_encod_tiling": False}},
}

DATA: dict[str, Any] = {
    "dataset_param": {
        "dataset_type": "t2v",
        "basic_parameters": {"data_path": "data.txt", "data_storage_mode": "combine"},
        "preprocess_parameters": {
            "video_processor_type": "OpensoraplanVideoProcessor",
            "video_reader_type": "DecordVideo",
            "image_reader_type": "Image",
            "num_frames": 81,
            "min_num_frames": 1,
            "frame_interval": 1,
            "auto_interval": False,
            "max_height": 480,
            "max_width": 832,
            "max_hxw": 399360,
            "train_fps": 24,
            "speed_factor": 1.0,
            "drop_short_ratio": 0.0,
            "cfg": 0.1,
            "hw_stride": 8,
            "force_resolution": False,
            "hw_aspect_thr": 5.0,
            "truncate_t_by_sp": False,
            "train_pipeline": {
                "video": [
                    {"trans_type": "ResizeVideo", "param": {"transform_size": "auto", "mode": "shortside"}},
                    {"trans_type": "ToTensorVideo"},
                    {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
                    {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": "auto"}},
                ]
            },
        },
        "use_text_processer": True,
        "enable_text_preprocessing": True,
        "text_preprocess_methods": [{"method": "basic_clean"}, {"method": "whitespace_clean"}],
        "tokenizer_config": {
            "autotokenizer_name": "AutoTokenizer",
            "hub_backend": "hf",
            "from_pretrained": "weights/tokenizer",
            "model_max_length": 512,
        },
    },
    "dataloader_param": {
        "dataloader_mode": "sampler",
        "sampler_type": "LengthGroupedSampler",
        "shuffle": True,
        "drop_last": True,
        "pin_memory": True,
        "group_frame": False,
        "group_resolution": False,
        "group_data": True,
        "initial_global_step_for_sampler": 0,
    },
}

FSDP2 = """\
sharding_size: auto
sub_modules_to_wrap:
  - predictor.blocks.{*}
  - predictor.head
reshard_after_forward: True
param_dtype: "bf16"
reduce_dtype: "fp32"
ignored_modules:
  - ae
  - text_encoder
cast_forward_inputs: True
recompute_modules:
  - predictor.blocks.{*}
num_to_forward_prefetch: 0
num_to_backward_prefetch: 0
offload_to_cpu: False
"""

_LAUNCHER = """
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --virtual-pipeline-model-parallel-size 1
    --context-parallel-size 1 --context-parallel-algo ulysses_cp_algo --micro-batch-size 1 --global-batch-size 8
    --num-workers 8 --lr 1e-5 --min-lr 1e-5 --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8
    --lr-decay-style constant --weight-decay 1e-2 --lr-warmup-init 0 --lr-warmup-iters 0 --clip-grad 1.0
    --train-iters 5000 --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-save-optim --no-save-rng
    --downcast-to-bf16 --distributed-timeout-minutes 20 --use-fused-rmsnorm --use-torch-fsdp2
    --untie-embeddings-and-output-weights --optimizer-selection fused_torch_adamw --use-cpu-initialization
    --attention-mask-type general --mm-tool ./mindspeed_mm/tools/tools.json --log-interval 1 --save-interval 10000
    --eval-interval 10000 --eval-iters 10 --ckpt-format torch_dcp --distributed-backend nccl
"""
LAUNCHER = _LAUNCHER.split()
"""The flags of MindSpeed-MM's pretraining launchers, file and checkpoint paths aside."""


@dataclass
class World:
    """Files of one run under ``root``; change ``model``, ``data`` or ``fsdp2`` before calling ``argv``."""

    root: Path
    model: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(MODEL))
    data: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(DATA))
    fsdp2: str = FSDP2

    def __post_init__(self) -> None:
        for name in ("weights/vae", "weights/umt5", "weights/tokenizer", "base"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "data.txt").write_text("clips,clips.json\n")

    @property
    def frames(self) -> dict[str, Any]:
        """The block most data errors are in."""
        return self.data["dataset_param"]["preprocess_parameters"]

    def argv(self, *more: str) -> list[str]:
        """Write the files and return a whole command line with ``more`` appended."""
        (self.root / "model.json").write_text(json.dumps(self.model, indent=4))
        (self.root / "data.json").write_text(json.dumps(self.data, indent=4))
        (self.root / "fsdp2.yaml").write_text(self.fsdp2)
        files = ["--mm-model", "model.json", "--mm-data", "data.json", "--fsdp2-config-path", "fsdp2.yaml"]
        paths = [str(self.root / w) if not w.startswith("--") else w for w in files]
        return [*LAUNCHER, *paths, "--load", str(self.root / "base"), "--save", str(self.root / "out"), *more]
