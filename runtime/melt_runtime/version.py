"""The version of this distribution: the one place where it stands; the wheel reads it from here."""

__version__ = "0.1.0"
