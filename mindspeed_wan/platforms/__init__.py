"""Which hardware runs this process (NPU, CUDA or CPU) and its kernels for five operations."""
