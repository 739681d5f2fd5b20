"""`loralloc ranks`: where the ranks of a run went."""

from __future__ import annotations

import argparse
from pathlib import Path

from loralloc.cli.console import Console


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "ranks",
        help="show where the ranks of a run went",
        description=(
            "Show the rank of every adapted module by layer, and what changed from the start: "
            "'6-' or '6 -2' lost ranks, '11+' or '11 +3' gained some. Of a shrunk "
            "adapter, the sizes that it passed as well."
        ),
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="also draw a heat map into FILE (.png, .pdf or .svg)",
    )
    parser.add_argument(
        "--round",
        type=int,
        metavar="N",
        help="show the ranks after round N; 0 is the start (default: the last round)",
    )
    parser.add_argument(
        "--scored",
        action="store_true",
        help="leave out the ranks that this round gave, which no round has scored yet",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, and draw the picture where one is asked for."""
    from loralloc.allocation.record import Record
    from loralloc.report.frontier import frontier_table
    from loralloc.report.grid import RankGrid, read_allocation
    from loralloc.report.picture import check_picture, rank_figure
    from loralloc.report.ranks import rank_table

    allocation = read_allocation(args.folder)
    grid = RankGrid.from_allocation(allocation, shown_round=args.round, scored=args.scored)
    if args.png is not None:
        check_picture(args.png)
    out = Console()
    out.print(rank_table(grid, out.width))
    if allocation.get("frontier"):
        out.print("", frontier_table(Record.load(args.folder)))
    if args.png is not None:
        rank_figure(grid, args.png)
        out.print(f"picture: {args.png}", markup=False, highlight=False, soft_wrap=True)
    return 0
