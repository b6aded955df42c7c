"""The version, stated once; pyproject.toml and lmkern.__version__ read it from here."""

__version__ = "0.1.0"
