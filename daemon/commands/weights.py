"""`maskd weights`: the networks' files: which there are, where they come from, and ONNX files made of a checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from daemon.config import weights_settings
from daemon.progress import Transfers
from models import weights
from models.cpu_choice import EXACT
from models.weights import NETWORKS, Network, Progress, State, WeightsError, WeightsFile

NEEDED = ("torch", "onnx")
COLOURS = {"in place": "green", "missing": "dim", "damaged": "red"}

app = typer.Typer(no_args_is_help=True, help="The networks' files: list, fetch, export.")


@app.command("list")
def list_() -> None:
    """Every network that maskd knows, what it serves, and whether its files are here and whole; in a pipe, every file."""
    folder, _ = weights_settings()
    console = Console()
    if not console.is_terminal:
        for net in NETWORKS:
            for file, state in _states(net, folder):
                told = f"{state}, optional" if file.optional and state is State.MISSING else str(state)
                typer.echo("\t".join((net.name, str(Path(net.folder) / file.name), told, file.repo, net.licence)))
        return
    columns = (Column("network", no_wrap=True), "engine", "serves", Column("size", justify="right", no_wrap=True), "licence")
    table = Table(*columns, Column("state", no_wrap=True), box=None, padding=(0, 2, 0, 0))
    notes = []
    with console.status("reading what is there"):
        for net in NETWORKS:
            word, files = _altogether(_states(net, folder))
            size = decimal(net.megabytes * 1_000_000, precision=1 if net.megabytes > 1000 else 0)
            table.add_row(net.name, net.engine or "", net.purpose, size, net.licence, f"[{COLOURS.get(word, 'yellow')}]{word}")
            notes += [f"{net.name} is {word}: {', '.join(files)}"] if files else []
    console.print(table)
    for note in (*notes, f"in {folder.absolute()}; to fetch one: maskd weights pull NETWORK"):
        console.print(f"\n{note}", highlight=False, soft_wrap=True)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Which network; `maskd weights list` names them.")] = "mobile-sam",
    into: Annotated[Path | None, typer.Option("--into", help="Another folder than MASKD_WEIGHTS_DIR.")] = None,
) -> None:
    """Fetch a network's files from the hub, checked; goes on where an earlier try stopped."""
    folder, token = weights_settings()
    wanted = weights.network(name)
    bars: dict[str, Progress] = {}
    with Transfers(Console(stderr=True)) as transfers:

        def progress(file: str, done: int, total: int | None) -> None:
            if file not in bars:  # not before it comes: what is in place needs none
                bars[file] = transfers.file(file)
            bars[file](done, total)

        secret = None if token is None else token.get_secret_value()
        own = weights.pull_network(name, into or folder, token=secret, progress=progress)
    for path in (own / file.name for file in wanted.files):
        if path.is_file():
            typer.echo(f"{path}  {weights.noted(path)}")


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="Only mobile-sam can be exported.")] = "mobile-sam",
    source: Annotated[Path | None, typer.Option("--from", help="The checkpoint; mobile_sam.pt of the weights folder.")] = None,
    into: Annotated[Path | None, typer.Option("--into", help="Another folder than MASKD_WEIGHTS_DIR.")] = None,
) -> None:
    """Make MobileSAM's two ONNX files of its checkpoint, and try them."""
    if name != "mobile-sam":
        raise typer.BadParameter("only mobile-sam can be exported")
    folder, _ = weights_settings()
    checkpoint = source or folder / weights.CHECKPOINT_FILE
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        raise WeightsError(f"the export needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")
    if not checkpoint.is_file():
        raise WeightsError(f"{checkpoint} is missing; run: maskd weights pull mobile-sam-checkpoint")
    weights.check(checkpoint)
    from models import export_mobile_sam, mobile_sam

    encoder, decoder = export_mobile_sam.export(checkpoint, into or folder)
    mobile_sam.load(encoder, decoder, threads=1, runtime=EXACT)
    for path in (encoder, decoder):
        typer.echo(f"{path}  {weights.check(path)}")


def _states(net: Network, folder: Path) -> list[tuple[WeightsFile, State]]:
    """The files of a network and what there is of each; reads them all."""
    return [(file, weights.state(folder / net.folder / file.name)) for file in net.files]


def _altogether(states: Sequence[tuple[WeightsFile, State]]) -> tuple[str, list[str]]:
    """What there is of a network, in a word, and the files that keep it from being in place."""
    damaged = [file.name for file, state in states if state is State.DAMAGED]
    missing = [file.name for file, state in states if state is State.MISSING and not file.optional]
    if damaged:
        return "damaged", damaged
    if missing:
        begun = any(state is not State.MISSING for _, state in states)
        return ("incomplete", missing) if begun else ("missing", [])
    return "unchecked" if any(state is State.UNCHECKED for _, state in states) else "in place", []
