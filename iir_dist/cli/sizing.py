"""`iir plan`: what a collection of some size needs, on paper."""

from __future__ import annotations

import functools
from typing import Any

import click

from iir_dist.cli.skin import main


def _whole(ctx: click.Context, param: click.Parameter, value: float) -> int:
    if value != int(value):
        raise click.BadParameter(f"{value:g} is not a whole number, as 250000 or 1e9", ctx, param)
    return int(value)


count = functools.partial(click.option, type=click.FloatRange(1, 1e15), callback=_whole, show_default=True)
"""An option with a whole number, which may be written as 1e9."""
amount = functools.partial(click.option, type=click.FloatRange(0, min_open=True), show_default=True)
price = functools.partial(click.option, type=click.FloatRange(0))


@main.command("plan")
@count("--images", required=True, help="Photos in the collection, as 1e9.")
@count("--gpus", default=8, help="H100s, one a machine of 16 cores.")
@count("--cores", default=128, help="Of machines without a GPU, 16 each.")
@count("--dim", default=512, help="Dimensions of an embedding.")
@amount("--image-kb", default=168, help="Of a photo.")
@amount("--megapixels", default=0.786, help="Of a photo as it is embedded; 0.786 is 768 x 1024.")
@amount("--scales", default=1.75, help="Pixels of all scales, in those of one; 1.75 is {1, 1/sqrt2, 1/2}.")
@click.option("--compiled", is_flag=True, help="Embed with embed.compile=true.")
@amount("--qps", default=100, help="Queries a second.")
@amount("--memory-gb", default=256, help="Of a machine that searches.")
@count("--pretrain-seen", default=100_000_000, help="Photos times epochs.")
@count("--finetune-seen", default=1_000_000, help="Photos times epochs.")
@price("--gpu-hour", help="Price of an hour of a machine with one GPU.")
@price("--cpu-hour", help="Price of an hour of a machine of 16 cores.")
@price("--tb-month", help="Price of a terabyte in the store for a month.")
def plan(**asked: Any) -> None:
    """Machines, hours and money for a collection, from measured costs of one unit.

    Money is in the currency of the prices that are given. What the index would be is planned as `iir index` does it.
    """
    from iir_dist.sizing import Sizing, size, table

    question = Sizing(**asked)
    click.echo(table(question, size(question)))
