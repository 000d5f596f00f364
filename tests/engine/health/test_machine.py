"""The machine is described as the system describes it."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from crossflow.engine.health import machine


def test_the_cpu_is_the_last_device_and_has_memory() -> None:
    cpu = machine.devices()[-1]
    assert cpu.name.startswith("cpu, ")
    assert cpu.total > 10**8
    assert cpu.free is None or 0 < cpu.free <= cpu.total


def test_missing_packages_are_named_with_their_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OPTIONAL", {"no_such_module": "does nothing"})
    monkeypatch.setattr(machine, "REQUIRED", ("torch", "no_such_module"))
    assert machine.facts()["no_such_module"] == "not installed; it does nothing"
    (finding,) = [finding for finding in machine.examine_machine() if finding.name == "packages"]
    assert finding.sentence == "Packages that crossflow needs are not installed: no_such_module."


def test_a_disk_is_asked_where_a_folder_would_be_made(tmp_path: Path) -> None:
    assert machine.free_bytes(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**6))
    assert all("has 1.0 MB left." in finding.sentence for finding in machine.examine_machine())
    assert len(machine.examine_machine()) == 3


def test_java_is_absent_without_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert machine.java_version() is None
