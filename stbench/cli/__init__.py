"""The Typer commands. Modules that define commands import heavy packages inside functions only."""
