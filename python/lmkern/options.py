"""How commands read their options: jsonargparse, with errors of one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


class UsageError(Exception):
    """A wrong option or configuration."""


def make_parser(command: str, description: str) -> ArgumentParser:
    """A parser of `lmkern command`, whose errors are UsageErrors."""
    import argparse

    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UsageError(f"{message} (see `lmkern {command} --help`)")

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Types and defaults as jsonargparse shows them, line breaks of examples as written."""

    return Parser(
        prog=f"lmkern {command}",
        usage=f"lmkern {command} [--OPTION VALUE ...]",
        description=description,
        formatter_class=Formatter,
    )


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace | None:
    """The parsed options, or None where `--help` was asked for and given."""
    try:
        return parser.parse_args(arguments)
    except SystemExit:
        return None


def make_config(kind: type, options: Namespace) -> Any:
    """A configuration dataclass; what its own checks refuse is a usage error."""
    try:
        return kind(**options.as_dict())
    except ValueError as error:
        raise UsageError(str(error)) from None
