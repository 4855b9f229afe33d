import numpy as np
import pytest
import torch

from crafts_privacy import keystream
from crafts_privacy.keystream import KEY_BYTES, CpuStream, key_stream

CPU = torch.device("cpu")


def as_bytes(words: torch.Tensor) -> bytes:
    return words.cpu().numpy().tobytes()


def test_the_stream_is_chacha20() -> None:
    """RFC 8439, appendix A.1, test vectors 1 and 2: blocks 0 and 1 of a zero key."""
    stream = CpuStream(bytes(KEY_BYTES), CPU)
    assert as_bytes(stream(8)).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")
    assert as_bytes(stream(8)).hex().startswith("9f07e7be5551387a98ba977c732d080d")


def test_a_call_starts_at_a_new_block() -> None:
    whole, parts = CpuStream(bytes(KEY_BYTES), CPU), CpuStream(bytes(KEY_BYTES), CPU)
    expected = whole(24)
    assert torch.equal(parts(3), expected[:3])
    assert torch.equal(parts(9), expected[8:17])
    assert parts(0).numel() == 0


def test_each_stream_has_a_key_of_its_own() -> None:
    assert not torch.equal(key_stream(CPU)(8), key_stream(CPU)(8))


def test_a_key_is_all_of_256_bits_from_the_operating_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(keystream.os, "urandom", lambda num: asked.append(num) or bytes(num))
    stream = key_stream(CPU)
    assert asked == [32]
    assert torch.equal(stream(8), CpuStream(bytes(KEY_BYTES), CPU)(8))


def test_every_bit_is_set_half_the_time() -> None:
    words = key_stream(CPU)(100_000).numpy().view(np.uint64)
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / np.sqrt(100_000)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_stream() -> None:
    from crafts_privacy.keystream_cuda import CudaStream

    key, cuda = bytes(range(KEY_BYTES)), torch.device("cuda")
    on_gpu, on_cpu = CudaStream(key, cuda), CpuStream(key, CPU)
    for num in (1, 8, 0, 1023, 1 << 20):
        assert torch.equal(on_gpu(num).cpu(), on_cpu(num))
    assert isinstance(key_stream(cuda), CudaStream)
