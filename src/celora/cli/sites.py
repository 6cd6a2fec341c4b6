"""The commands of a federation of real sites: server, site, keys."""

import typer


def add(app: typer.Typer) -> None:
    """Add these commands."""
