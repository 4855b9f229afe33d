"""Random words from the operating system's entropy, as fast as noise for millions of numbers needs.

A key stream is ChaCha20 (RFC 8439) under a 256-bit key drawn from ``os.urandom`` for this one use
and forgotten after it: what the operating system's own generator does, without its system calls.
On a CPU it is OpenSSL's. On CUDA the GPU makes it (``keystream_cuda``), because full weights want a
billion words each step; that stream is compared with OpenSSL's before its first use, and where it
differs or does not run, OpenSSL's is used.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

KEY_BYTES = 32
WORDS_PER_BLOCK = 8
_NONCE = bytes(16)
"""Block counter 0 and nonce 0: a key is used once."""
_CHECKED = (8 * 1025, 3, 801)
"""Words of three calls: more than one program of threads, and no whole number of blocks."""

Stream = Callable[[int], Tensor]
"""``stream(num)``: the next ``num`` uniform 64-bit words, int64, on the stream's device.

Every call starts at a new block of eight words. A key is good for 2**32 of them, 256 GiB.
"""


def key_stream(device: torch.device) -> Stream:
    """A stream under a fresh key. It has no seed and cannot be made again."""
    if device.type == "cuda" and _runs_on(device):
        from crafts_privacy.keystream_cuda import CudaStream

        return CudaStream(os.urandom(KEY_BYTES), device)
    return CpuStream(os.urandom(KEY_BYTES), device)


@cache
def _runs_on(device: torch.device) -> bool:
    """Whether this GPU makes OpenSSL's key stream, bit by bit."""
    if importlib.util.find_spec("triton") is None:
        return False
    from crafts_privacy.keystream_cuda import CudaStream

    key = os.urandom(KEY_BYTES)
    try:
        on_gpu, on_cpu = CudaStream(key, device), CpuStream(key, device)
        return all(torch.equal(on_gpu(num), on_cpu(num)) for num in _CHECKED)
    except Exception:  # a compiler that does not work here raises whatever it likes
        return False


class CpuStream:
    """OpenSSL's, moved to ``device``."""

    def __init__(self, key: bytes, device: torch.device) -> None:
        """Start at block 0."""
        self._encryptor = Cipher(algorithms.ChaCha20(key, _NONCE), mode=None).encryptor()
        self._device = device

    def __call__(self, num: int) -> Tensor:
        """See :data:`Stream`."""
        words = torch.empty(-(-num // WORDS_PER_BLOCK) * WORDS_PER_BLOCK, dtype=torch.int64)
        if num:
            buffer = words.numpy().data.cast("B")
            self._encryptor.update_into(bytes(buffer.nbytes), buffer)
        return words[:num].to(self._device)
