"""Generate videos with Wan2.2 or Wan2.1: ``python inference_sora.py --help``; the launchers are under examples/."""

from mindspeed_wan.inference.generate import run

if __name__ == "__main__":
    run()
