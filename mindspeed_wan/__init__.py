"""mindspeed-wan: train and run Wan2.2 A14B on Megatron-Core, FSDP2 and torch DCP.

platforms   what the hardware is (NPU, CUDA, CPU)      models      the DiT, the VAE, the text encoder
config      what the user asked for                    parallel    how one model spreads over ranks
diffusion   flow matching, schedules, solvers          checkpoint  DCP, MM files, manifests, safe loading
data        annotations, video, cached features        lora        adapters and their file formats
training    pretrain_sora.py                           inference   inference_sora.py
evaluation  metrics and reports                        planning    memory and time before a run
demo, cli   the walk through every stage; mindspeed-wan

Importing this package imports nothing else.
"""

__version__ = "0.1.0"
