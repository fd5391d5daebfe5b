"""The report in a real Chromium, loaded from file://: links, filter, order, keyboard, lightbox, and hostile prompts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmalign.config import EvaluateConfig
from mmalign.evaluation import evaluate_policy
from mmalign.evaluation.report import Report, write_report

from .chromium import browse, card_order, needs_chromium
from .painter import Painter, brightness, darkness, noise, scorer

HOSTILE = (
    "</script><script>document.body.dataset.pwned = 1</script><img src=x onerror='document.body.dataset.pwned = 2'>"
    ' & "quotes" <!-- a red circle'
)
PROMPTS = ["a red square", "a red circle", "a blue square", HOSTILE, "a large blue circle"]

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("report")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    settings = EvaluateConfig(prompts=str(folder / "prompts.txt"), seeds=2, guidance_scale=[2.0, 4.0])
    scorers = [(scorer(brightness), True), (scorer(darkness), False), (scorer(noise), False)]
    # Only circles gain in brightness, so the order by gain is known: 1, 3, 4 and then 0, 2.
    report = evaluate_policy(Painter(only="circle"), settings, scorers, folder, title="Painter <before> & after")
    return report, folder


def test_deep_links(report: tuple[Report, Path], tmp_path: Path) -> None:
    page = report[1] / "report.html"
    _, document = browse(page, "", tmp_path)
    assert card_order(document) == [0, 1, 2, 3, 4]
    assert "dialog open" not in document
    _, document = browse(page, "#sort=brightness&filter=blue+A", tmp_path)
    assert card_order(document) == [4, 2]
    assert "2 of 5 prompts" in document
    _, document = browse(page, "#sort=darkness&open=1.1&guidance=4", tmp_path)
    assert card_order(document) == [0, 2, 1, 3, 4]
    assert re.search(r"<dialog[^>]* open", document)
    assert "prompt 2 · seed 1 · guidance 4" in document


def test_hostile_prompts_are_text(report: tuple[Report, Path], tmp_path: Path) -> None:
    out, document = browse(
        report[1] / "report.html",
        "",
        tmp_path,
        "out.text = document.querySelectorAll('.card h2')[3].lastChild.textContent;"
        "out.pwned = document.body.dataset.pwned;"
        "out.scripts = [...document.scripts].filter(s => !s.type && !s.nonce).length; out.title = document.title;",
    )
    assert out == {"text": HOSTILE, "scripts": 0, "title": "Painter <before> & after"}
    assert "data-pwned" not in document


def test_controls_keyboard_and_lightbox(report: tuple[Report, Path], tmp_path: Path) -> None:
    script = """
      const set = (id, value, type) => { $(id).value = value; $(id).dispatchEvent(new Event(type)); };
      set('sort', 'brightness', 'change'); out.sorted = cards(); out.hash = location.hash;
      $('dir').click(); out.reversed = cards(); $('dir').click();
      set('show', 'gains', 'change'); out.gains = cards(); set('show', 'all', 'change');
      press('/'); out.focused = document.activeElement.id;
      set('filter', 'RED circle', 'input'); out.filtered = cards(); out.count = $('count').textContent;
      set('filter', 'nothing like it', 'input'); out.none = $('cards').textContent; set('filter', '', 'input');
      document.activeElement.blur();
      await wait(300);
      press('j'); out.first = Number(document.activeElement.dataset.prompt);
      press('j'); out.second = Number(document.activeElement.dataset.prompt);
      document.querySelector('.card[data-prompt="3"] .shot').click();
      out.opened = [$('box').open, $('box-about').textContent, $('box-prompt').textContent.length];
      out.panes = [...document.querySelectorAll('.pane h3')].map(node => node.textContent);
      press('ArrowRight'); out.nextSeed = $('box-about').textContent;
      press('ArrowRight'); out.nextPrompt = $('box-about').textContent;
      press('ArrowUp'); out.up = $('box-about').textContent;
      press('g'); out.guidance = $('box-about').textContent;
      const seen = pane => getComputedStyle(pane).display !== 'none';
      const visible = () => [...document.querySelectorAll('.pane')].filter(seen).length;
      out.beside = visible(); press(' '); out.flipped = [visible(), document.querySelector('.pane.on h3').textContent];
      press(' '); out.flippedAgain = document.querySelector('.pane.on h3').textContent;
      await wait(100); out.wide = document.querySelector('.pane.on img').getBoundingClientRect().width;
      press('Escape'); out.closed = [$('box').open, location.hash.includes('open')];
      const loaded = () => [...document.querySelectorAll('.card img')].filter(image => image.naturalWidth === 16).length;
      for (let n = 0; n < 50 && loaded() < 20; n++) await wait(100);
      out.loaded = loaded();
      out.rows = [...document.querySelectorAll('#summary tbody tr')].length;
    """
    out, _ = browse(report[1] / "report.html", "", tmp_path, script)
    assert out["sorted"] == [1, 3, 4, 0, 2]
    assert "sort=brightness" in out["hash"]
    assert out["reversed"] == [0, 2, 1, 3, 4]
    assert out["gains"] == [1, 3, 4]
    assert out["focused"] == "filter"
    assert (out["filtered"], out["count"]) == ([1, 3], "2 of 5 prompts")
    assert out["none"] == "No prompt matches."
    assert (out["first"], out["second"]) == (1, 3)
    assert out["opened"] == [True, "prompt 4 · seed 0 · guidance 2", len(HOSTILE)]
    assert out["panes"] == ["before", "after"]
    assert out["nextSeed"] == "prompt 4 · seed 1 · guidance 2"
    assert out["nextPrompt"] == "prompt 5 · seed 0 · guidance 2"
    assert out["up"] == "prompt 4 · seed 0 · guidance 2"
    assert out["guidance"] == "prompt 4 · seed 0 · guidance 4"
    assert out["beside"] == 2
    assert out["flipped"] == [1, "before"]
    assert out["flippedAgain"] == "after"
    assert out["wide"] > 400
    assert out["closed"] == [False, False]
    assert out["loaded"] == 5 * 2 * 2
    assert out["rows"] == 4 * 2


def test_images_out_of_sight_are_not_decoded(report: tuple[Report, Path], tmp_path: Path) -> None:
    script = "await wait(300); out.images = document.querySelectorAll('.card img').length"
    few, _ = browse(report[1] / "report.html", "#size=512", tmp_path, script)
    assert 0 < few["images"] < 20


def test_linked_images_load_from_beside_the_page(report: tuple[Report, Path], tmp_path: Path) -> None:
    folder = report[1]
    original = (folder / "report.html").read_text(encoding="utf-8")
    write_report(report[0], folder, embed_budget=0)
    try:
        out, _ = browse(
            folder / "report.html",
            "#size=64",
            tmp_path,
            "await wait(500); const all = [...document.querySelectorAll('.card img')];"
            "out.linked = all.filter(i => i.getAttribute('src').startsWith('samples/')).length;"
            "out.loaded = all.filter(i => i.naturalWidth === 16).length",
        )
    finally:
        (folder / "report.html").write_text(original, encoding="utf-8")
    assert out["linked"] == out["loaded"] >= 8


def test_without_rewards_the_images_are_there(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red square", encoding="utf-8")
    evaluate_policy(Painter(), EvaluateConfig(prompts=str(tmp_path / "prompts.txt"), seeds=2), [], tmp_path)
    script = """
      out.images = document.querySelectorAll('.card img').length;
      out.hidden = ['show', 'subs', 'sort', 'reward'].every(id => $(id).hidden);
      document.querySelector('.shot').click(); out.open = $('box').open;
    """
    out, _ = browse(tmp_path / "report.html", "", tmp_path, script)
    assert out == {"images": 4, "hidden": True, "open": True}
