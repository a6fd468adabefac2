"""Peak memory of a process, whole or of a phase: of the GPU, or on a CPU its resident pages."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def phases_measurable(device: torch.device) -> bool:
    """Whether the peak can be started anew: on a GPU, and on a CPU under Linux."""
    return device.type == "cuda" or CLEAR.exists()


def forget_peak(device: torch.device) -> None:
    """The peak starts anew from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        CLEAR.write_text("5")  # proc(5): the high-water mark of resident pages, VmHWM


def peak_since_gb(device: torch.device) -> float:
    """Peak in GB since forget_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9
