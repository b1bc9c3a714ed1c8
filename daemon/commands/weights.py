"""`maskd weights`: the networks' files: which there are, where they come from, and ONNX files made of a checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from daemon.config import weights_settings
from daemon.progress import Transfers
from models import weights
from models.weights import NETWORKS, WeightsError

NEEDED = ("torch", "onnx")

app = typer.Typer(no_args_is_help=True, help="The networks' files: list, fetch, export.")


@app.command("list")
def list_() -> None:
    """Every file that maskd knows, and whether it is here, whole and ready."""
    folder, _ = weights_settings()
    rows = [(net, file, weights.state(folder / file.name)) for net in NETWORKS for file in net.files]
    console = Console()
    if not console.is_terminal:
        for net, file, state in rows:
            typer.echo("\t".join((net.name, file.name, str(state), file.repo, net.licence)))
        return
    table = Table("network", "file", "state", "from", "licence", "serves", box=None, padding=(0, 2, 0, 0))
    for net, file, state in rows:
        table.add_row(net.name, file.name, str(state), file.repo, net.licence, net.purpose)
    console.print(table)
    console.print(f"\nin {folder.absolute()}", highlight=False, soft_wrap=True)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Which network; `maskd weights list` names them.")] = "mobile-sam",
    into: Annotated[Path | None, typer.Option("--into", help="Another folder than MASKD_WEIGHTS_DIR.")] = None,
) -> None:
    """Fetch a network's files from the hub, checked; goes on where an earlier try stopped."""
    folder, token = weights_settings()
    folder = into or folder
    with Transfers(Console(stderr=True)) as transfers:
        for file in weights.network(name).files:
            secret = None if token is None else token.get_secret_value()
            path = weights.pull(file, folder, token=secret, progress=transfers.file(file.name))
            typer.echo(f"{path}  {weights.check(path)}")


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
    mobile_sam.load(encoder, decoder, threads=1)
    for path in (encoder, decoder):
        typer.echo(f"{path}  {weights.check(path)}")
