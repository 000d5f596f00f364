"""What data a run was made of, and where they lay: written to its manifest, found and compared again later.

Specs of data are kept as they were given. Relative ones were meant from the directory in which the run was started, so
that is where they are looked for when they are not found from here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crossflow.core.errors import UserError
from crossflow.data.dataset import Examples
from crossflow.data.reader import Reader
from crossflow.data.readers import located

MANIFEST = "manifest.json"


def describe(data: Examples) -> dict[str, Any]:
    """The data set as a manifest tells of it."""
    reader = data.reader
    return {
        "spec": reader.spec,
        "split": reader.split,
        "num_items": len(data),
        "fingerprint": reader.fingerprint(),
    }


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run directory; empty when there is none that can be read."""
    try:
        content = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def open_again(open_spec: Callable[[str], Reader], spec: str, run: Path) -> Reader:
    """The reader of a spec that stands in the configuration of the run directory `run`.

    Raises UserError that says how data are named that lie elsewhere now.
    """
    started = read_manifest(run).get("directory")
    try:
        return open_spec(located(spec, Path(started)) if isinstance(started, str) else spec)
    except UserError as error:
        place = f" (a relative path was meant from {started}, where the run was started)" if started else ""
        raise UserError(
            f"{error} This is what the configuration of the run in {run} names{place}. If the data lie elsewhere now, "
            "say where: `crossflow evaluate --data SPEC`; `crossflow train --resume auto --data SPEC`, or "
            "data.val=SPEC, for a run that is to go on."
        ) from error


def expect_same(run: Path, data: Examples) -> None:
    """Raises UserError when the training data are not those that the run directory `run` began with.

    Where they lie does not matter, what is in them does.
    """
    before, now = read_manifest(run).get("data", {}), describe(data)
    if before.get("fingerprint") == now["fingerprint"]:
        return
    if "fingerprint" not in before:
        raise UserError(
            f"The {MANIFEST} of {run} does not tell what its training data were, so they cannot be compared with "
            f"{now['spec']}. If they are to be taken as they are, resume with --data-changed."
        )
    raise UserError(
        f"The training data of the run in {run} are not what they were when it began: {before['spec']} "
        f"({before['num_items']} items, fingerprint {before['fingerprint'][:12]}), now {now['spec']} "
        f"({now['num_items']} items, {now['fingerprint'][:12]}). What was learned from them before the flow "
        "(tokenizer, scales, a text autoencoder) would stay as it is, and the order of the items would be another. "
        "Put them back as they were, start a new run in another --output, or resume with --data-changed if this is "
        "intended."
    )


def changed(run: Path, data: Examples) -> dict[str, Any]:
    """The manifest of `run` for data that were exchanged on purpose; `earlier_data` lists what they were before."""
    content = read_manifest(run)
    if content.get("data", {}).get("fingerprint") == data.reader.fingerprint():
        return content
    earlier = [*content.get("earlier_data", []), content.get("data")]
    return {**content, "data": describe(data), "earlier_data": earlier}
