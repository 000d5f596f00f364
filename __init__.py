"""crossflow: noise-free cross-modal flow models.

``crossflow.load(DIR|HUB_ID)`` gives a trained model to call. Names are resolved when first used, so that importing the
package (and asking the command for help) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossflow.engine.joint.pipeline import JointPipeline, load
    from crossflow.engine.sample import Pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load", "Pipeline", "JointPipeline"]

_HOME = {
    "load": "crossflow.engine.joint.pipeline",
    "Pipeline": "crossflow.engine.sample",
    "JointPipeline": "crossflow.engine.joint.pipeline",
}  # public name -> its module


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
