"""Which folders and files make the wheel; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["leafnet", "leafnet.*"]), "leafnet.jobs"],
    # `python -P -m leafnet.jobs.train` where leafnet is installed and the repository is not.
    package_dir={"leafnet.jobs": "jobs"},
    package_data={"": ["templates/*", "*.yaml"]},
)
