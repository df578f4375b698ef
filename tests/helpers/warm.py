"""Shell scripts whose every Python starts in milliseconds: one process imports the heavy libraries, all others fork.

``WarmPython`` puts ``python``, ``torchrun``, ``mindspeed-wan`` and ``mm-convert`` into a folder for PATH. Each is a
client of a few lines that hands its arguments, environment, working directory and standard streams to the server and
waits for the exit code; signals are passed on. The launcher's ranks take the same way, because ``sys.executable`` of a
forked process names the client. What runs is the real command line on the real files; only the imports are shared.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "python": (), "python3": (),
    "torchrun": ("-m", "torch.distributed.run"),
    "mindspeed-wan": ("-m", "mindspeed_wan.cli.main"),
    "mm-convert": ("-m", "mindspeed_wan_converters"),
}
_PRELOAD = ("torch", "torch.distributed.run", "torch.distributed.fsdp", "torch.distributed.checkpoint", "av",
            "megatron.core.parallel_state", "megatron.core.tensor_parallel", "safetensors.torch", "pydantic",
            "diffusers", "transformers", "diffusers.models.autoencoders.autoencoder_kl_wan",
            "diffusers.models.transformers.transformer_wan", "transformers.models.umt5.modeling_umt5",
            "mindspeed_wan.config.schema", "mindspeed_wan.models.wan.model")
_CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
words = {words!r} + sys.argv[1:]
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
request = json.dumps([words, os.getcwd(), dict(os.environ), __file__]).encode()
link.sendmsg([len(request).to_bytes(8, "big")],
             [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
link.sendall(request)
pid = int(link.recv(16))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda signum, frame: os.kill(pid, signum))
answer = link.recv(16)
sys.exit(int(answer) if answer else 1)
"""


class WarmPython:
    """The server and its folder of commands; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "bin"
        self._address = str(folder / "s")

    def __enter__(self) -> WarmPython:
        self.path.mkdir(parents=True)
        for name, words in COMMANDS.items():
            file = self.path / name
            file.write_text(_CLIENT.format(python=sys.executable, words=list(words), address=self._address))
            file.chmod(0o755)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen([sys.executable, __file__, self._address], env=environment,
                                        start_new_session=True)
        while not Path(self._address).exists():
            if self._server.poll() is not None:
                raise RuntimeError("the server of warm processes did not start")
            time.sleep(0.02)
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def environment(self, **more: str) -> dict[str, str]:
        """Return variables for a shell whose Python is this one."""
        return {**os.environ, "PATH": f"{self.path}:/usr/bin:/bin", "PYTHON": str(self.path / "python"), **more}


def serve(address: str) -> None:
    """Import, then fork a process per connection until killed."""
    for name in _PRELOAD:
        importlib.import_module(name)
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel  # noqa: F401 (lazy ones)
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forked processes report their own exit code
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".tmp")
    listener.listen(64)
    os.rename(address + ".tmp", address)
    while True:
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _serve_one(link)
        link.close()


def _serve_one(link: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, ancillary, *_ = link.recvmsg(8, socket.CMSG_SPACE(12))
    streams = array.array("i", ancillary[0][2])
    wanted, request = int.from_bytes(head, "big"), b""
    while len(request) < wanted:
        request += link.recv(1 << 16)
    words, folder, environment, client = json.loads(request)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = str(Path(client).with_name("python"))
    link.sendall(str(os.getpid()).encode().ljust(16))
    code = _run(words)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    link.sendall(str(code).encode())
    os._exit(code)


def _run(words: list[str]) -> int:
    """Do what ``python WORDS`` does and return the exit code."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    while words[:1] == ["-u"]:
        words = words[1:]
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-":
            sys.argv = words
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
