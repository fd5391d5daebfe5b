"""`mmalign data check`: what it counts and what it calls an error."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from mmalign.data.audit import audit_rows, check_data
from mmalign.types import DataError, ImageRef


def kinds(audit) -> dict[str, tuple[str, int]]:
    return {finding.kind: (finding.severity, finding.count) for finding in audit.findings}


def test_clean_rows_have_no_findings(make_rows):
    audit = audit_rows(make_rows(4, width=40, height=30), source="pairs", resolution=16)
    assert audit.findings == []
    assert not audit.has_errors
    assert audit.counts == {"rows": 4, "paired": 4, "prompts": 4, "images": 8}
    assert audit.image_sizes == {"40x30": 8}
    assert (audit.image_height.low, audit.image_width.high) == (30, 40)
    assert (audit.prompt_words.median, audit.prompt_chars.high) == (2, 9)
    assert audit.upsampled_share == 0.0


def test_prompts_that_the_model_cuts_are_a_warning(make_rows):
    rows = [*make_rows(3), replace(make_rows(1)[0], id="again")]
    audit = audit_rows(rows, cut_prompts=lambda prompts: {text for text in prompts if text == "caption 0"})
    assert audit.finding("cut_prompt").severity == "warning"
    assert audit.finding("cut_prompt").examples == ["pairs:0", "pairs:0"]


def test_every_problem_is_counted_and_named(make_rows, encoded):
    rows = make_rows(8, width=32, height=32)
    rows[0] = replace(rows[0], rejected=ImageRef(content=b"junk", source="pairs:0 rejected"))
    rows[1] = replace(rows[1], rejected=rows[1].chosen)
    rows[2] = replace(rows[3], id="x", source="pairs:2")  # 3 repeats 2
    rows[4] = replace(rows[5].swapped(), id="y", source="pairs:4")  # 5 contradicts 4
    rows[6] = replace(rows[6], prompt=" ", preference=0.5)
    rows[7] = replace(rows[7], chosen=ImageRef(content=encoded(99, width=12, height=40)))
    audit = audit_rows(rows, resolution=32)
    assert kinds(audit) == {
        "unreadable": ("error", 1),
        "identical": ("error", 1),
        "contradicting": ("warning", 1),
        "duplicate": ("warning", 1),
        "empty_prompt": ("warning", 1),
        "ties": ("warning", 1),
        "below_resolution": ("warning", 1),
    }
    assert audit.has_errors
    assert audit.finding("unreadable").examples[0].startswith("pairs:0 rejected: not an image")
    assert audit.finding("identical").examples == ["pairs:1"]
    assert audit.finding("duplicate").examples == ["pairs:3 repeats pairs:2"]
    assert audit.finding("contradicting").examples == ["pairs:5 against pairs:4"]
    assert audit.finding("below_resolution").examples == ["pairs:7"]
    assert audit.upsampled_share == pytest.approx(1 / audit.counts["images"])


def test_identical_files_under_two_names_are_found(tmp_path, make_rows, encoded):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(0))
    pair = {"chosen": ImageRef(path=tmp_path / "a.png"), "rejected": ImageRef(path=tmp_path / "b.png")}
    assert kinds(audit_rows([replace(make_rows(1)[0], **pair)])) == {"identical": ("error", 1)}


def test_tie_is_no_contradiction(make_rows):
    (row,) = make_rows(1)
    tie = replace(row.swapped(), id="tie", preference=0.5)
    assert kinds(audit_rows([tie, row])) == {"ties": ("warning", 1)}
    assert kinds(audit_rows([tie])) == {"only_ties": ("error", 1)}


def test_examples_are_few(make_rows):
    rows = [replace(row, rejected=row.chosen) for row in make_rows(9)]
    finding = audit_rows(rows).finding("identical")
    assert (finding.count, len(finding.examples)) == (9, 5)


def test_check_reads_a_config_and_lists_all_bad_rows(tmp_path, data_config, encoded):
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(encoded(seed))
    lines = [
        {"prompt": "a", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": ""},
        {"prompt": "b", "chosen": "9.png"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    audit = check_data(data_config(file), resolution=16)
    assert kinds(audit) == {"bad_rows": ("error", 2)}
    assert [example.split(": ")[0] for example in audit.finding("bad_rows").examples] == [f"{file}:2", f"{file}:3"]
    assert audit.resolution == 16
    file.write_text('{"prompt": ""}')
    assert {"no_rows", "bad_rows"} == set(kinds(check_data(data_config(file))))
    with pytest.raises(DataError, match="does not exist"):
        check_data(data_config(tmp_path / "nope.jsonl"))


def test_json_and_table_show_the_same(make_rows):
    rows = make_rows(2)
    rows[0] = replace(rows[0], rejected=rows[0].chosen, source="[bold]pairs:0")
    calls = []
    audit = audit_rows(rows, source="my pairs", counts={"ties_dropped": 3}, progress=lambda *done: calls.append(done))
    assert calls == [(1, 2), (2, 2)]
    written = json.loads(audit.to_json())
    assert written["has_errors"] is True
    assert written["counts"]["ties_dropped"] == 3
    assert written["findings"][0]["kind"] == "identical"
    assert written["image_height"]["median"] == 16
    console = Console(file=io.StringIO(), width=200)
    console.print(audit.to_table())
    shown = console.file.getvalue()
    for text in ("data check: my pairs", "3 ties dropped", "error: identical", "1 rows", "[bold]pairs:0", "24x16: 3"):
        assert text in shown


# --- rows answered in text --------------------------------------------------------------------------------------------


def answers(make_rows, number: int) -> list:
    return [
        replace(
            row,
            prompt=f"<image> what {n} ?",
            images=(row.chosen,),
            chosen="there is a red circle .",
            rejected="a blue one .",
        )
        for n, row in enumerate(make_rows(number))
    ]


def test_clean_text_rows_have_lengths_and_no_findings(make_rows):
    rows = answers(make_rows, 4)
    rows[1] = replace(rows[1], rejected="there is a blue circle . and more")
    rows[2] = replace(rows[2], rejected="there is a blue circle .")
    audit = audit_rows(rows, resolution=1000)
    assert audit.findings == [], "what a prompt shows is not drawn, so it is not enlarged"
    assert audit.counts == {"rows": 4, "paired": 4, "prompts": 4, "images": 4}
    assert (audit.chosen_words.low, audit.chosen_words.high) == (6, 6)
    assert (audit.rejected_words.low, audit.rejected_words.high) == (4, 8)
    assert audit.longer_chosen_share == pytest.approx((1 + 1 + 0.5) / 4)
    console = Console(file=io.StringIO(), width=200)
    console.print(audit.to_table())
    assert "words in rejected" in console.file.getvalue()
    assert "in 62.5% of the pairs" in console.file.getvalue()
    assert audit_rows(make_rows(2)).longer_chosen_share is None


def test_every_problem_of_text_rows_is_counted_and_named(make_rows):
    rows = answers(make_rows, 9)
    rows[0] = replace(rows[0], images=(ImageRef(content=b"junk", source="pairs:0 images[0]"),))
    rows[1] = replace(rows[1], rejected=rows[1].chosen)
    rows[2] = replace(rows[3], id="x", source="pairs:2")  # 3 repeats 2
    rows[4] = replace(rows[5].swapped(), id="y", source="pairs:4")  # 5 contradicts 4
    rows[6] = replace(rows[6], images=())
    rows[7] = replace(rows[7], chosen=" ")
    # Same words about another image: neither a duplicate nor a contradiction.
    rows[8] = replace(rows[5].swapped(), id="z", source="pairs:8", images=rows[8].images)
    audit = audit_rows(rows)
    assert kinds(audit) == {
        "unreadable": ("error", 1),
        "identical": ("error", 1),
        "unusable": ("error", 2),
        "duplicate": ("warning", 1),
        "contradicting": ("warning", 1),
    }
    assert audit.finding("identical").examples == ["pairs:1"]
    assert audit.finding("duplicate").examples == ["pairs:3 repeats pairs:2"]
    assert audit.finding("contradicting").examples == ["pairs:5 against pairs:4"]
    first, second = audit.finding("unusable").examples
    assert first.startswith("pairs:6: the prompt has 1 <image> mark(s) for 0 image(s)")
    assert second.startswith("pairs:7: chosen is empty")


def test_bad_text_rows_of_a_file_are_listed(tmp_path, data_config, encoded):
    (tmp_path / "0.png").write_bytes(encoded(0))
    line = {"images": ["0.png"], "prompt": "what ?", "chosen": "x", "rejected": "y"}
    lines = [
        line,
        {**line, "images": []},
        {**line, "prompt": "<image> what ?", "images": []},
        {**line, "rejected": "x"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    audit = check_data(data_config(file))
    assert kinds(audit) == {"bad_rows": ("error", 2)}
    assert [example.split(": ")[0] for example in audit.finding("bad_rows").examples] == [f"{file}:3", f"{file}:4"]
    assert audit.counts["images"] == 1
