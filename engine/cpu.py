"""Which CPU this is: what is kept for a machine's CPU is kept under this."""

import platform


def identity() -> list[str]:
    """Maker, model and features of the CPU; what little Python knows where the system has no file of it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(16384).partition("\n\n")[0]  # all cores are alike
    except OSError:
        return [platform.processor()]
    told = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")
    return [line for line in first.splitlines() if line.partition(":")[0].strip() in told]
