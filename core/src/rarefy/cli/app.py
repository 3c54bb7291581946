"""The command group and the one place where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence

import click

from rarefy import __version__
from rarefy.cli import analysis, files, plugins, recipes, runs
from rarefy.errors import RarefyError

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rarefy")
@click.option(
    "--plugin", "plugin_files", multiple=True, type=click.Path(), help="Load a single-file plugin. Repeatable."
)
@click.option("--quiet", is_flag=True, help="Print results only: no progress, no log.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, plugin_files: tuple[str, ...], quiet: bool, debug: bool) -> None:
    """Make a trained PyTorch model smaller and faster, and measure what was gained.

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 done but a budget was missed,
    4 a plugin is missing or broken, 130 interrupted and resumable.
    """
    from rarefy import progress

    context.with_resource(_logging_to_stderr(quiet))
    progress.set_quiet(quiet)
    if plugin_files:
        from rarefy.registry import add_files

        add_files(plugin_files)


for command in (*runs.COMMANDS, *recipes.COMMANDS, *analysis.COMMANDS, *files.COMMANDS, *plugins.COMMANDS):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        code = cli.main(args=list(arguments), prog_name="rarefy", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except RarefyError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; `rarefy run --resume DIR` goes on after the last finished step", err=True)
        code = INTERRUPTED
    except BrokenPipeError:
        code = 0
        with contextlib.suppress(OSError):
            sys.stdout.close()
    except Exception as error:
        if debug:
            raise
        click.echo(f"error: {type(error).__name__}: {error}\n(run again with --debug to see where)", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _logging_to_stderr(quiet: bool) -> Iterator[None]:
    log = logging.getLogger("rarefy")
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    handler.setLevel(logging.ERROR if quiet else logging.INFO)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"
