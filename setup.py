"""Which folders are installed as which packages? Everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

# Folders at the top of the repository that are installed inside `ttrouting`.
MAPPED = {
    "ttrouting.strategies": "strategies",
    "ttrouting.refsets": "refsets",
    "ttrouting.baselines": "demos/baselines",  # what `ttrouting bench` compares with
}

setup(
    packages=[*find_packages(include=["ttrouting", "ttrouting.*"]), *MAPPED],
    package_dir=MAPPED,
)
