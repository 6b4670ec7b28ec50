"""What GPUs promise, by their maker's sheets: dense half-precision matrix products, memory bandwidth, capacity.

Promises are not reached (one H200 was measured at 788 of 989.5 TFLOP/s and 4.3 of 4.8 TB/s), so times made of them are
limits. Sheets that print a peak "with sparsity" print twice the dense one.
"""

from dataclasses import dataclass

from llava.constants import InputError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU."""

    name: str
    flops: float
    """Dense float16/bfloat16 operations per second of the tensor cores, accumulating in float32; 2 per multiply-add."""
    bandwidth: float
    """Bytes per second to and from its memory."""
    capacity: float
    """Bytes of memory, as the card is sold (80 GB: 80e9; cards hold up to 6 % more)."""

    @property
    def ridge(self) -> float:
        """Operations per byte above which a kernel is bound by arithmetic, below by memory."""
        return self.flops / self.bandwidth


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 datasheet (2021): 312 TFLOPS dense; A100 40GB SXM/PCIe 1,555 GB/s, A100 80GB SXM 2,039 GB/s.
        # LLM-Viewer's entries `nvidia_A100` and `nvidia_A100_80G` are these two.
        Device(name="A100-40G", flops=312e12, bandwidth=1.555e12, capacity=40e9),
        Device(name="A100-80G", flops=312e12, bandwidth=2.039e12, capacity=80e9),
        # NVIDIA A800 80GB SXM datasheet: as the A100 80GB SXM; only NVLink is slower.
        Device(name="A800-80G", flops=312e12, bandwidth=2.039e12, capacity=80e9),
        # NVIDIA H100 datasheet, SXM5: 1,979 TFLOPS with sparsity, 3.35 TB/s.
        Device(name="H100", flops=989.5e12, bandwidth=3.35e12, capacity=80e9),
        # NVIDIA H200 datasheet, SXM: 1,979 TFLOPS with sparsity, 4.8 TB/s, 141 GB.
        Device(name="H200", flops=989.5e12, bandwidth=4.8e12, capacity=141e9),
        # NVIDIA L40S datasheet: FP16 tensor core 362.05 TFLOPS dense, 864 GB/s.
        Device(name="L40S", flops=362.05e12, bandwidth=0.864e12, capacity=48e9),
        # NVIDIA Ada GPU architecture whitepaper, appendix A, GeForce RTX 4090: FP16 tensor TFLOPS with FP32 accumulate
        # 165.2 dense, 1,008 GB/s.
        Device(name="RTX4090", flops=165.2e12, bandwidth=1.008e12, capacity=24e9),
    )
}


def get_device(name: str) -> Device:
    """Return a device of the table, in whatever case it is written.

    Raises:
        InputError: there is none of that name.
    """
    for device in DEVICES.values():
        if device.name.lower() == name.lower():
            return device
    raise InputError(f"unknown device {name!r}; choose from {', '.join(DEVICES)}")
