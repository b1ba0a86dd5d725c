"""Kept for tools that still call it; every field of the package is static, in pyproject.toml."""

from setuptools import setup

setup()
