"""What is found at discovery, against what was written down by hand."""

from __future__ import annotations

import pytest
import torch

import ttrouting as ttr
from tests.families.build import FAMILIES, build
from tests.families.expected import EXPECTED, REFUSED

VARIANTS = [(family, name) for family, expected in EXPECTED.items() for name in expected.variants]


def test_every_family_is_expected_or_refused():
    assert sorted([*EXPECTED, *REFUSED]) == sorted(FAMILIES)
    assert len(FAMILIES) == 62


@pytest.mark.check("rule")
@pytest.mark.parametrize("family", EXPECTED)
def test_sites(family, model, note):
    expected, tiny = EXPECTED[family], model(family)
    sites = ttr.find_sites(tiny)
    names = [f"{site.name}.{expected.routers.rpartition('.')[2]}" for site in sites]
    assert names == expected.router_names()
    for index, site in enumerate(sites):
        assert site.index == index
        assert site.scoring == expected.scoring
        assert site.renormalises == expected.renormalises
        assert site.rule.scaling == pytest.approx(expected.scaling, rel=1e-4)
        assert (site.num_experts, site.top_k) == (expected.experts, expected.top_k)
        assert site.interface == expected.interface
        assert site.edit_dtype == torch.float32
    found = list(dict.fromkeys(limit for site in sites for limit in site.limits))
    for words in expected.limits:
        assert any(words in limit for limit in found), f"{words!r} is not among {found}"
    assert len(found) == len(expected.limits), f"limits that nobody expected: {found}"
    note(
        **{"class": type(tiny).__name__},
        routers=expected.routers,
        experts=expected.experts,
        top_k=expected.top_k,
        scoring=sites[-1].scoring,
        renormalises=sites[-1].renormalises,
        scaling=round(sites[-1].rule.scaling, 4),
        limits=found,
    )


@pytest.mark.check("rule")
@pytest.mark.parametrize("family", EXPECTED)
def test_sites_in_bf16(family, model, note):
    """Half precision makes weights coarse: the rule must be found all the same."""
    expected = EXPECTED[family]
    sites = ttr.find_sites(model(family, torch.bfloat16))
    for site in sites:
        assert site.scoring == expected.scoring
        assert site.renormalises == expected.renormalises
        assert site.rule.scaling == pytest.approx(expected.scaling, rel=0.02)
        assert str(site.edit_dtype) == f"torch.{expected.dtype}"
        assert site.half_scores == expected.half_scores
    rounded = [limit for limit in sites[0].limits if "rounded" in limit]
    assert bool(rounded) == (expected.dtype != "float32")
    note(dtype=expected.dtype, bf16_limits=rounded)


@pytest.mark.parametrize(("family", "variant"), VARIANTS, ids=["-".join(v) for v in VARIANTS])
def test_variant(family, variant):
    expected = EXPECTED[family].variants[variant]
    for site in ttr.find_sites(build(family, **expected.changes)):
        assert site.scoring == expected.scoring
        assert site.renormalises == expected.renormalises
        assert site.rule.scaling == pytest.approx(expected.scaling, rel=1e-4)
