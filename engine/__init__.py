"""SDEdit as an engine: guided image synthesis and editing with score-based diffusion models.

    editor = sdedit.load()                                  # the bundled model, or a path to an artifact
    editor.edit("strokes.png", t0=0.5).images[0].save("picture.png")

Names are imported when first used, so that `import sdedit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdedit.artifact import Artifact as Artifact
    from sdedit.capi.shipped import noise_maker as noise_maker
    from sdedit.collage import Collage as Collage
    from sdedit.collage import Patch as Patch
    from sdedit.collage import compose as compose
    from sdedit.editor import Editor as Editor
    from sdedit.editor import load as load
    from sdedit.errors import ArtifactError as ArtifactError
    from sdedit.errors import BackendUnavailable as BackendUnavailable
    from sdedit.errors import Cancelled as Cancelled
    from sdedit.errors import ClosedError as ClosedError
    from sdedit.errors import DeviceError as DeviceError
    from sdedit.errors import ImageError as ImageError
    from sdedit.errors import NetworkError as NetworkError
    from sdedit.errors import OptionError as OptionError
    from sdedit.errors import OutOfTolerance as OutOfTolerance
    from sdedit.errors import OutputError as OutputError
    from sdedit.errors import ReplayError as ReplayError
    from sdedit.errors import SdeditError as SdeditError
    from sdedit.features import FeatureNetwork as FeatureNetwork
    from sdedit.features import open_features as open_features
    from sdedit.folder import edit_folder as edit_folder
    from sdedit.ledger import FolderProgress as FolderProgress
    from sdedit.ledger import FolderResult as FolderResult
    from sdedit.loop import Denoiser as Denoiser
    from sdedit.loop import Step as Step
    from sdedit.loop import denoise as denoise
    from sdedit.loop import perturb as perturb
    from sdedit.metrics import Kid as Kid
    from sdedit.metrics import kid as kid
    from sdedit.metrics import kid_difference as kid_difference
    from sdedit.metrics import l2 as l2
    from sdedit.noise import Noise as Noise
    from sdedit.noise import NoiseSource as NoiseSource
    from sdedit.options import EditOptions as EditOptions
    from sdedit.painting import strokes as strokes
    from sdedit.results import EditResult as EditResult
    from sdedit.results import Progress as Progress
    from sdedit.results import Result as Result
    from sdedit.results import Timings as Timings
    from sdedit.schedule import SAMPLERS as SAMPLERS
    from sdedit.schedule import SPACINGS as SPACINGS
    from sdedit.schedule import StepTable as StepTable
    from sdedit.schedule import plan as plan
    from sdedit.sde import EDM as EDM
    from sdedit.sde import VE as VE
    from sdedit.sde import VP as VP
    from sdedit.sde import VPDiscrete as VPDiscrete
    from sdedit.sheet import contact_sheet as contact_sheet
    from sdedit.tuning import Found as Found
    from sdedit.tuning import Trial as Trial
    from sdedit.tuning import Tuner as Tuner
    from sdedit.tuning import open_tuner as open_tuner
    from sdedit.tuning import search_t0 as search_t0

__version__ = "0.1.0"

_HOME = {
    name: module
    for module, names in {
        "artifact": "Artifact",
        "capi.shipped": "noise_maker",
        "collage": "Collage Patch compose",
        "editor": "Editor load",
        "errors": "ArtifactError BackendUnavailable Cancelled ClosedError DeviceError ImageError NetworkError "
        "OptionError OutOfTolerance OutputError ReplayError SdeditError",
        "features": "FeatureNetwork open_features",
        "folder": "edit_folder",
        "ledger": "FolderProgress FolderResult",
        "loop": "Denoiser Step denoise perturb",
        "metrics": "Kid kid kid_difference l2",
        "noise": "Noise NoiseSource",
        "options": "EditOptions",
        "painting": "strokes",
        "results": "EditResult Progress Result Timings",
        "schedule": "SAMPLERS SPACINGS StepTable plan",
        "sde": "EDM VE VP VPDiscrete",
        "sheet": "contact_sheet",
        "tuning": "Found Trial Tuner open_tuner search_t0",
    }.items()
    for name in names.split()
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sdedit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"sdedit.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
