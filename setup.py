"""The packages, found by rule: the root is ``crossflow``, a folder with an ``__init__.py`` is ``crossflow.<folder>``.

Everything else about the distribution stands in pyproject.toml, which has no way to say this.
"""

from setuptools import find_packages, setup

setup(
    packages=["crossflow", *(f"crossflow.{name}" for name in find_packages(exclude=["tests", "tests.*"]))],
    # A build front end leaves its own name here, and this file would be shipped as crossflow/setup.py.
    script_name="setup.py",
)
