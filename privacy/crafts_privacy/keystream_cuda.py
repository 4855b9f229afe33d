"""ChaCha20 (RFC 8439) on a GPU, a block of 64 bytes to a thread. Imported only where Triton is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crafts_privacy.keystream import WORDS_PER_BLOCK

_THREADS = 128


class CudaStream:
    """The key stream of one key, nonce 0, counted from block 0."""

    def __init__(self, key: bytes, device: torch.device) -> None:
        """Put the key's 32 bytes on the device."""
        self._key_8 = torch.frombuffer(bytearray(key), dtype=torch.int32).to(device)
        self._next_block = 0

    def __call__(self, num: int) -> Tensor:
        """See ``keystream.Stream``."""
        blocks, device = -(-num // WORDS_PER_BLOCK), self._key_8.device
        if self._next_block + blocks > 2**32:
            raise OverflowError("one key yields 256 GiB")
        words = torch.empty(blocks * WORDS_PER_BLOCK, dtype=torch.int64, device=device)
        if blocks:
            with torch.cuda.device(device):
                _chacha20[(triton.cdiv(blocks, _THREADS),)](
                    self._key_8, words.view(torch.int32), self._next_block, blocks, _THREADS
                )
        self._next_block += blocks
        return words[:num]


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _chacha20(key, out, first_block, num_blocks, THREADS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    counter = (block + first_block).to(tl.uint32)
    zero = tl.zeros([THREADS], tl.uint32)
    # The key's words, the same in every thread.
    k0 = zero + tl.load(key + 0).to(tl.uint32, bitcast=True)
    k1 = zero + tl.load(key + 1).to(tl.uint32, bitcast=True)
    k2 = zero + tl.load(key + 2).to(tl.uint32, bitcast=True)
    k3 = zero + tl.load(key + 3).to(tl.uint32, bitcast=True)
    k4 = zero + tl.load(key + 4).to(tl.uint32, bitcast=True)
    k5 = zero + tl.load(key + 5).to(tl.uint32, bitcast=True)
    k6 = zero + tl.load(key + 6).to(tl.uint32, bitcast=True)
    k7 = zero + tl.load(key + 7).to(tl.uint32, bitcast=True)
    # "expand 32-byte k"
    c0 = tl.full([THREADS], 0x61707865, tl.uint32)
    c1 = tl.full([THREADS], 0x3320646E, tl.uint32)
    c2 = tl.full([THREADS], 0x79622D32, tl.uint32)
    c3 = tl.full([THREADS], 0x6B206574, tl.uint32)
    x0, x1, x2, x3 = c0, c1, c2, c3
    x4, x5, x6, x7 = k0, k1, k2, k3
    x8, x9, x10, x11 = k4, k5, k6, k7
    x12, x13, x14, x15 = counter, zero, zero, zero
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    start, real = out + block * 16, block < num_blocks
    tl.store(start + 0, (x0 + c0).to(tl.int32, bitcast=True), real)
    tl.store(start + 1, (x1 + c1).to(tl.int32, bitcast=True), real)
    tl.store(start + 2, (x2 + c2).to(tl.int32, bitcast=True), real)
    tl.store(start + 3, (x3 + c3).to(tl.int32, bitcast=True), real)
    tl.store(start + 4, (x4 + k0).to(tl.int32, bitcast=True), real)
    tl.store(start + 5, (x5 + k1).to(tl.int32, bitcast=True), real)
    tl.store(start + 6, (x6 + k2).to(tl.int32, bitcast=True), real)
    tl.store(start + 7, (x7 + k3).to(tl.int32, bitcast=True), real)
    tl.store(start + 8, (x8 + k4).to(tl.int32, bitcast=True), real)
    tl.store(start + 9, (x9 + k5).to(tl.int32, bitcast=True), real)
    tl.store(start + 10, (x10 + k6).to(tl.int32, bitcast=True), real)
    tl.store(start + 11, (x11 + k7).to(tl.int32, bitcast=True), real)
    tl.store(start + 12, (x12 + counter).to(tl.int32, bitcast=True), real)
    tl.store(start + 13, x13.to(tl.int32, bitcast=True), real)
    tl.store(start + 14, x14.to(tl.int32, bitcast=True), real)
    tl.store(start + 15, x15.to(tl.int32, bitcast=True), real)
