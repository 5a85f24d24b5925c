"""GPUs that an estimate knows, with the figures of their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """
    A kind of GPU.

    Attributes:
        memory: GiB.
        tflops: Dense matrix products in half precision, 10¹² operations per second.
        tflops_float32: The same in float32, without TF32, which torch leaves off.
        bandwidth: Of its memory, 10⁹ bytes per second.
    """

    memory: float
    tflops: float
    tflops_float32: float
    bandwidth: float


DEVICES = {
    "t4": Device(memory=15, tflops=65, tflops_float32=8.1, bandwidth=320),
    "l4": Device(memory=22.5, tflops=121, tflops_float32=30.3, bandwidth=300),
    "a10g": Device(memory=22.5, tflops=70, tflops_float32=35, bandwidth=600),
    "rtx4090": Device(memory=24, tflops=165, tflops_float32=82.6, bandwidth=1008),
    "a100-40gb": Device(memory=40, tflops=312, tflops_float32=19.5, bandwidth=1555),
    "a100-80gb": Device(memory=80, tflops=312, tflops_float32=19.5, bandwidth=2039),
    "h100": Device(memory=80, tflops=989, tflops_float32=67, bandwidth=3350),
    "h200": Device(memory=140, tflops=989, tflops_float32=67, bandwidth=4800),
    "b200": Device(memory=179, tflops=2250, tflops_float32=75, bandwidth=8000),
}
