"""The page of an inspection in a real browser: drawn, hovered, clicked, without a complaint, quickly."""

import json

import pytest
import torch

from chromium import PROGRAM, chromium
from inspections import E, L, T, inspection
from ttrouting.inspection.page import write_page
from ttrouting.inspection.record import Inspection

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
SLOWEST = 5000  # milliseconds to draw 16 layers x 64 experts x 1,000 tokens, on a machine that has other work too
TIP = "document.getElementById('tip').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def shown(browser, tmp_path):
    """`shown(inspection, **how)`: the page, opened; nothing may have been said or asked for by the end."""

    def show(found, **how):
        browser.complaints.clear()
        browser.asked.clear()
        browser.open(write_page(found, tmp_path / "page.html"), **how)
        return browser

    yield show
    browser.value("1")  # what was said until now has arrived
    assert browser.complaints == []
    assert [url for url in browser.asked if not url.startswith("file://")] == []


def pixels(page, number, section):
    """`[rows, columns, 4]`, what a canvas shows."""
    script = (
        f"(() => {{ const c = document.querySelectorAll('#{section} canvas')[{number}];"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height);"
        "return [c.height, c.width, Array.from(d.data)]; })()"
    )
    rows, columns, data = page.value(script)
    return torch.tensor(data).view(rows, columns, 4)


def darkness(image):
    return 3 * 255 - image[..., :3].sum(-1)


def test_maps_are_as_dark_as_their_numbers(shown):
    found = inspection()
    page = shown(found)
    for number, trace in enumerate((found.base, found.adapted)):
        image = darkness(pixels(page, number, "loads"))
        assert image.shape == (L, E)
        order = trace.load.flatten().argsort()
        assert bool((image.flatten()[order].diff() >= 0).all())
        assert bool(((image == 0) == (trace.load == 0)).all())
    shift, image = found.adapted.load - found.base.load, pixels(page, 2, "loads")
    blue, red = image[..., 2], image[..., 0]
    assert bool((blue[shift > 0.01] > red[shift > 0.01]).all())
    assert bool((red[shift < -0.01] > blue[shift < -0.01]).all())
    layer = found.difference.layers()[0].index
    for number, trace in enumerate((found.base, found.adapted)):
        expected = torch.zeros(E, T)
        for t in range(T):
            for expert, weight in zip(trace.ids[t, layer].tolist(), trace.weights[t, layer].tolist(), strict=True):
                if expert >= 0:
                    expected[expert, t] = weight
        image = darkness(pixels(page, number, "tokens"))
        order = expected.flatten().argsort()
        assert bool((image.flatten()[order].diff() >= 0).all())
        assert bool(((image == 0) == (expected == 0)).all())


def test_hovering_a_cell_tells_its_numbers(shown):
    found = inspection()
    page = shown(found)
    box = page.box("#loads canvas")
    expert, layer = 5, 1
    page.mouse(box["x"] + (expert + 0.5) * box["width"] / E, box["y"] + (layer + 0.5) * box["height"] / L)
    told = page.value(TIP)
    assert told.startswith(f"model.layers.{layer}.mlp, expert {expert}\n")
    for name in ("base", "adapted"):
        trace = getattr(found, name)
        chosen = trace.ids[:, layer] == expert
        mean = float(trace.weights[:, layer][chosen].mean())
        assert f"{name}: {100 * float(chosen.any(-1).float().mean()):.1f} % of tokens, mean weight {mean:.3f}" in told


def test_hovering_a_token_tells_its_experts_k_and_entropy(shown):
    found = inspection()
    page = shown(found)
    token, layer = 6, found.difference.layers()[0].index
    box = page.box(f"#text span:nth-child({token + 1})")
    page.mouse(box["x"] + 2, box["y"] + box["height"] / 2)
    told = page.value(TIP)
    assert f"“x”, token {token}\n" in told
    for name in ("base", "adapted"):
        trace = getattr(found, name)
        k, entropy = float(trace.k[token].float().mean()), float(trace.entropy[token].mean())
        assert f"{name}, all layers: k {k:.2f}, entropy {entropy:.2f}" in told
        pairs = zip(trace.weights[token, layer].tolist(), trace.ids[token, layer].tolist(), strict=True)
        listed = "   ".join(f"{e} {w:.3f}" for w, e in sorted(pairs, reverse=True) if e >= 0)
        assert f"\n{name}: {listed}" in told
    assert f"experts differ in {int(found.difference.changed[token].sum())} of {L} layers" in told


def test_clicking_a_layer_shows_it(shown):
    page = shown(inspection())
    box = page.box("#loads canvas")
    for layer in (0, 2):
        before = pixels(page, 0, "tokens")
        page.click(box["x"] + 5, box["y"] + (layer + 0.5) * box["height"] / L)
        assert page.value("document.getElementById('layer').value") == str(layer)
        assert (
            not torch.equal(pixels(page, 0, "tokens"), before) or layer == inspection().difference.layers()[0].index
        )


@pytest.mark.parametrize("mode", ["changed", "k", "entropy", "top"])
def test_the_text_takes_the_colours_that_are_asked_for(shown, mode):
    page = shown(inspection())
    page.value(
        f"(() => {{ const m = document.getElementById('mode'); m.value = '{mode}';"
        "m.dispatchEvent(new Event('change')); })()"
    )
    colours = page.value("[...document.querySelectorAll('#text span')].map((s) => s.style.background)")
    assert len(colours) == T
    assert len(set(colours)) > 1


def test_tables_and_curves_are_there(shown):
    found = inspection()
    page = shown(found)
    assert page.value("document.querySelectorAll('#changes tbody tr').length") == L
    assert page.value("document.querySelectorAll('#curves circle').length") == 3  # one of four losses is no number
    assert page.value("document.querySelector('#next tbody tr').textContent") == "“ a”25.0 %50.0 %"
    assert page.value("document.getElementById('text').textContent").count("</script>") == 1


def test_one_trace_alone_without_weights(shown):
    found = inspection()
    bare = type(found.base).from_arrays(found.base.ids, num_experts=E)
    page = shown(Inspection("bare", bare))
    assert page.value("document.querySelectorAll('canvas').length") == 2
    for section in ("changes", "curves", "next"):
        assert page.value(f"document.getElementById('{section}').hidden") is True


def test_dark_and_narrow(shown, tmp_path):
    page = shown(inspection(), width=400, dark=True)
    assert page.value("document.documentElement.scrollWidth") <= 400
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert darkness(pixels(page, 0, "loads")).max() > 3 * 150  # nothing is dark, on dark
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_a_thousand_tokens_do_not_freeze_it(shown):
    """16 layers x 64 experts x 1,000 tokens: drawn, hovered all over and switched, each in its time."""
    found = inspection(tokens=1000, layers=16, experts=64, k=8)
    page = shown(found)
    assert int(page.value("document.body.dataset.milliseconds")) < SLOWEST
    # how long the page's own code is at work for each of 100 events
    script = """
      (() => {
        const times = [], timed = (f) => { const t = performance.now(); f(); times.push(performance.now() - t); };
        const canvas = document.querySelectorAll('#tokens canvas')[2], box = canvas.getBoundingClientRect();
        for (let i = 0; i < 100; i++)
          timed(() => canvas.dispatchEvent(new PointerEvent('pointermove',
            { clientX: box.left + (i + 0.5) * box.width / 100, clientY: box.top + (i + 0.5) * box.height / 100 })));
        const hover = times.splice(0), layer = document.getElementById('layer');
        for (let l = 0; l < 16; l++) { layer.value = l; timed(() => layer.dispatchEvent(new Event('change'))); }
        return [Math.max(...hover), Math.max(...times)];
      })()
    """
    hover, switch = page.value(script)
    assert hover < 250, json.dumps([hover, switch])
    assert switch < 1000, json.dumps([hover, switch])
