"""Train one expert of Wan2.2 (see examples/wan2.2): torchrun pretrain_sora.py --help lists every flag."""

from mindspeed_wan.errors import run_main
from mindspeed_wan.training.pretrain import main

if __name__ == "__main__":
    run_main(main)
