"""What a GPU can compute at most: the denominator of perf/mfu."""

from __future__ import annotations

import re

import torch

# Dense bfloat16 FLOP/s of the tensor cores with float32 sums, by words of the device's name; the first line that fits counts.
# From the makers' data sheets, whose larger number is with sparsity. AMD's MI250X is two devices, each has half of it.
PEAKS = (
    ("GB200", 2500e12),  # nvidia.com/en-us/data-center/gb200-nvl72
    ("B200", 2250e12),  # nvidia.com/en-us/data-center/hgx: 36 PFLOP/s with sparsity for eight
    ("H200 NVL", 835.5e12),  # nvidia.com/en-us/data-center/h200
    ("H200", 989.5e12),
    ("GH200", 989.5e12),  # nvidia.com/en-us/data-center/grace-hopper-superchip
    ("H100 NVL", 835.5e12),  # nvidia.com/en-us/data-center/h100, as the next two
    ("H100 PCIe", 756.5e12),
    ("H100", 989.5e12),
    ("A100", 312e12),  # nvidia.com/en-us/data-center/a100
    ("A40", 149.7e12),  # nvidia.com/en-us/data-center/a40
    ("A30", 165e12),  # nvidia.com/en-us/data-center/products/a30-gpu
    ("A10", 125e12),  # nvidia.com/en-us/data-center/products/a10-gpu
    ("L40S", 362.05e12),  # nvidia.com/en-us/data-center/l40s
    ("L40", 181.05e12),  # nvidia.com/en-us/data-center/l40
    ("L4", 121e12),  # nvidia.com/en-us/data-center/l4
    ("RTX 4090", 165.2e12),  # NVIDIA Ada GPU architecture, appendix A
    ("RTX 3090", 71e12),  # NVIDIA Ampere GA102 GPU architecture, appendix A
    ("MI325X", 1307.4e12),  # amd.com/en/products/accelerators/instinct/mi300/mi325x.html
    ("MI300X", 1307.4e12),  # amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    ("MI250X", 191.5e12),  # amd.com/en/products/accelerators/instinct/mi200/mi250x.html
)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak, in FLOP/s; None for a CPU, a part of a GPU (MIG), and one that the table doesn't have."""
    return of_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def of_name(name: str) -> float | None:
    """By the name that CUDA gives the device, such as "NVIDIA A100-SXM4-80GB"."""
    words = set(re.split(r"[\s-]+", name))
    fits = (flops for model, flops in PEAKS if words.issuperset(model.split()))
    return None if "MIG" in words else next(fits, None)
