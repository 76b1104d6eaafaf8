"""Tells optimum-cli of MELT: it imports every file that stands in this folder of its namespace."""

import transformers_melt  # noqa: F401
