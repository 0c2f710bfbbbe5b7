"""Export: every published kind of score network becomes one verified artifact. Needs the extra `export`."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from sdedit.sde import Sde
    from sdedit.verify import Report


def export_denoiser(
    net: "nn.Module",
    path: str | Path,
    *,
    sde: "Sde | str",
    size: int | tuple[int, int],
    channels: int = 3,
    predicts: str = "eps",
    time: str | None = None,
    time_scale: float | None = None,
    round_time: bool = False,
    data_range: tuple[float, float] = (-1.0, 1.0),
    sigma_data: float = 0.5,
    multiple: int = 1,
    conditions: Mapping[str, Mapping[str, Any]] | None = None,
    precision: str = "fp32",
    opset: int | None = None,
    dynamic: bool = False,
    name: str | None = None,
    license: str | None = None,
    guides: Sequence[str | Path] = (),
    allow_inaccurate: bool = False,
    force: bool = False,
) -> "Report":
    """Write any score network as a verified artifact: D(x; σ) in one ONNX file.

    net(x (B, C, H, W), label (B,), *conditions (B,)) -> (B, C or 2C, H, W), float32; more than C channels are a
    learned variance and dropped. sde: an sdedit schedule, or its spelling ("linear", "ve:sigma_min=0.02,…").
    size: height and width in pixels. predicts, time, time_scale, round_time, data_range, sigma_data: what the
    network returns and takes (sdedit.export.denoiser.Convention); time and its scale default to the usual ones.
    conditions: further inputs, {"class_label": {"dtype": "int64", "count": 1000}}. dynamic: any height and width
    that are multiples of `multiple`. guides: pictures to verify (and calibrate int8) with.

    Returns the report of the comparison with `net` itself. Raises OutOfTolerance, with nothing written, where the
    file is not the same function (allow_inaccurate writes it, marked); OptionError; OutputError.
    """
    from sdedit.export import exporting, schedules
    from sdedit.export.denoiser import Convention, usual_label
    from sdedit.export.source import Source

    schedule = schedules.parse(sde) if isinstance(sde, str) else sde
    usual_time, usual_scale = usual_label(schedule, predicts)
    scale = usual_scale if time_scale is None else time_scale
    convention = Convention(schedule, predicts, time or usual_time, scale, round_time, data_range, sigma_data)
    height, width = (size, size) if isinstance(size, int) else size
    own = copy.deepcopy(net).cpu().float().eval()  # the caller's is left as it is
    source = Source(
        "module", type(net).__name__, own, convention, channels, height, width, multiple, "model",
        dict(conditions or {}), name=name or Path(path).stem, license=license, details={"class": type(net).__name__},
    )  # fmt: skip
    graph = exporting.from_source(source, opset=opset, dynamic=dynamic)
    report = exporting.write(
        graph, Path(path), precision=precision, opset=opset, guides=[Path(g) for g in guides],
        allow_inaccurate=allow_inaccurate, force=force,
    )  # fmt: skip
    if not report.within and not allow_inaccurate:
        raise exporting.out_of_tolerance(report, Path(path))
    return report
