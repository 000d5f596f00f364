"""Which caption of an item captioning trains on."""

from pydantic import Field

from crossflow.core.config import Section


class Captions(Section):
    which: int | None = Field(None, ge=0)
    """Train on this caption of each item (0 = the first; beyond the end, the last) instead of a random one each epoch.
    """
