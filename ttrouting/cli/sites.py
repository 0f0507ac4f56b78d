"""`ttrouting sites`: which MoE layers has a model, and what can be done with each?"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ttrouting.cli.models import POCKET, downloads, load_model
from ttrouting.cli.options import Debug, Device, Dtype, DtypeName, Json, ModelName
from ttrouting.cli.output import Output
from ttrouting.sites import Site, find_sites


def command(
    model: ModelName = POCKET,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the MoE layers of a model: experts, scoring, and what cannot be adapted in them."""
    output = Output(as_json)
    with output.waiting(f"loading {model}", downloads(model)) as say:
        loaded, _ = load_model(model, dtype.value, device)
        say("looking for MoE layers")
        found = find_sites(loaded)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "E", "K", "scoring", "weights", "support"):
        table.add_column(column, justify="right" if column in ("E", "K") else "left")
    for site in found:
        weights = "sum kept" if site.renormalises else "as scored"
        support = "; ".join(site.limits) or "full"
        table.add_row(site.name, str(site.num_experts), str(site.top_k), site.scoring, weights, support)
    output.show(table)
    name = type(loaded).__name__
    output.note(f"{name}: {len(found)} MoE layers. E experts, of which each token meets K.")
    output.data({"model": model, "class": name, "sites": [_facts(site) for site in found]})


def _facts(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "index": site.index,
        "experts": site.num_experts,
        "top_k": site.top_k,
        "scoring": site.scoring,
        "renormalises": site.renormalises,
        "scaling": site.rule.scaling,
        "chosen_in": site.topk_in,
        "interface": site.interface,
        "limits": list(site.limits),
    }
