from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
import sys
import unicodedata
from typing import Any

import pytest
from rarefy.report import compare_html, compare_rows, console, numbers, render, verdict, words
from rarefy_schemas import (
    BudgetReport,
    ExportReport,
    Histogram,
    LayerReport,
    Measurement,
    Report,
    SkippedLayer,
    StageReport,
)

# Fixtures: a run of LeNet-5 with figures that are made up, but plausible and consistent with each other.

LAYERS = {"conv1": 520, "conv2": 25_050, "fc1": 400_500, "fc2": 5_010}
TOTAL = sum(LAYERS.values())
FULL = 4 * TOTAL + 488


def bell(layer: str, count: int, width: float, hole: float = 0.0) -> Histogram:
    edges = tuple(width * (i - 20) / 20 for i in range(41))
    centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    heights = [0 if abs(c) < hole else math.exp(-((3 * c / width) ** 2)) for c in centres]
    return Histogram(layer=layer, edges=edges, counts=tuple(round(count * h / sum(heights)) for h in heights))


def stage(
    index: int,
    name: str,
    accuracy: float,
    kept: dict[str, int],
    size: int,
    speeds: dict[int, tuple[float, float, float]],
    parameters: int = TOTAL,
    **more: Any,
) -> StageReport:
    nonzero, flops = sum(kept.values()), round(4_586_000 * parameters / TOTAL)
    figures = {
        "accuracy": accuracy,
        "parameters": parameters,
        "nonzero": nonzero,
        "sparsity": 1 - nonzero / parameters,
        "compression_rate": TOTAL / parameters,
        "index_space_saving": 1 - parameters / TOTAL,
        "nonzero_rate": TOTAL / nonzero,
        "flops": flops,
        "flops_rate": 4_586_000 / flops,
        "peak_memory": 4 * parameters + 60_000,
        "bytes": size,
        "bytes_rate": FULL / size,
    }
    measured = [Measurement(name=name, value=value) for name, value in figures.items()]
    for batch, (low, rate, high) in speeds.items():
        measured.append(Measurement(name=f"latency@{batch}", value=0.21 * batch**0.8 / rate, unit="ms"))
        measured.append(Measurement(name=f"speed_up_rate@{batch}", value=rate, low=low, high=high, unit="x"))
    return StageReport(
        index=index, name=name, measurements=tuple(measured), layer_parameters=kept, seconds=41.0 + index, **more
    )


def baseline() -> StageReport:
    return stage(
        -1, "original", 0.989, LAYERS, FULL + 900, {1: (0.98, 1.0, 1.02), 64: (0.99, 1.0, 1.01)},
        histograms=tuple(bell(name, count, 0.2) for name, count in LAYERS.items()),
        training=({"epoch": 1.0, "loss": 0.31, "validation": 0.964}, {"epoch": 2.0, "loss": 0.05, "validation": 0.989}),
    )  # fmt: skip


def pruned() -> StageReport:
    kept = {"conv1": 343, "conv2": 3_006, "fc1": 24_030, "fc2": 952}
    return stage(
        0, "prune", 0.9884, kept, 118_400, {1: (0.96, 0.99, 1.03), 64: (0.98, 1.0, 1.02)},
        technique="pruning/magnitude",
        config={"technique": "pruning/magnitude", "amount": 0.93},
        histograms=tuple(bell(name, count, 0.25, hole=0.06) for name, count in kept.items()),
        layers=tuple(
            LayerReport(name=name, kind="Linear", action="smallest weights set to zero",
                        scores={"sparsity": 1 - count / LAYERS[name], "threshold": 0.061})
            for name, count in kept.items()
        ),
        training=({"epoch": 1.0, "loss": 0.09, "validation": 0.98}, {"epoch": 2.0, "loss": 0.04, "validation": 0.9884}),
    )  # fmt: skip


def factorized() -> StageReport:
    kept = {"conv1": 343, "conv2": 3_006, "fc1.0": 19_200, "fc1.1": 12_500, "fc2": 952}
    return stage(
        1, "low rank", 0.9871, kept, 61_000, {1: (0.76, 0.79, 0.82), 64: (1.31, 1.35, 1.38)}, parameters=62_280,
        technique="factorization/svd",
        histograms=tuple(bell(name, count, 0.4) for name, count in kept.items()),
        layers=(LayerReport(name="fc1", kind="Linear", action="rank 24 of 500", scores={"rank": 24, "error": 0.18}),),
        skipped=(SkippedLayer(name="fc2", kind="Linear", reason="rank 5 would need more parameters than the layer"),),
    )  # fmt: skip


def sample(**changes: Any) -> Report:
    steps: list[StageReport] = []
    for step in (pruned(), factorized()):
        steps.append(step.model_copy(update={"notes": tuple(words(step, (baseline(), *steps)[-1]))}))
    whole: dict[str, Any] = {
        "name": "LeNet-5 on digits (fixture)",
        "status": "done",
        "metric": "accuracy",
        "recipe": {"model": "zoo:lenet5", "steps": [{"technique": "pruning/magnitude", "amount": 0.93}]},
        "seed": 7,
        "baseline": baseline(),
        "steps": tuple(steps),
        "test": (
            Measurement(name="original", value=0.9875, better="higher"),
            Measurement(name="compressed", value=0.985, better="higher"),
            Measurement(name="drop", value=0.0025, better="lower"),
        ),
        "exports": (
            ExportReport(format="rarefy", path="exports/model.rarefy", bytes=42_180, rate=FULL / 42_180,
                         max_difference=0),
            ExportReport(format="onnx", path="exports/model.onnx", bytes=251_777, rate=FULL / 251_777,
                         max_difference=2.4e-6,
                         notes=("float32: zeros take their full space in this format",)),
        ),
        "budgets": (
            BudgetReport(name="accuracy_drop", limit=0.005, value=0.0025, met=True),
            BudgetReport(name="latency", limit=0.9, value=1.266, met=False),
        ),
        "environment": {"rarefy": "0.1.0", "torch": "2.13.0+cpu", "processor": "one with a rather long name @ 2.80GHz"},
        "seconds": 161.0,
    }  # fmt: skip
    return Report(**(whole | changes))


def empty() -> Report:
    return Report(
        name="empty",
        status="running",
        metric="loss",
        recipe={},
        seed=0,
        baseline=StageReport(index=-1, name="original"),
    )


def plain(text: str) -> str:
    """Return text with the characters of a keyboard."""
    signs = {"NO-BREAK SPACE": " ", "MULTIPLICATION SIGN": "x", "EN DASH": "-", "MINUS SIGN": "-"}
    for name, sign in signs.items():
        text = text.replace(unicodedata.lookup(name), sign)
    return text


class Page(html.parser.HTMLParser):
    """Collects the text, the tags and the ids of a page, and whether its tags are balanced."""

    VOID = {"meta", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_says_what_was_asked_what_came_out_and_where() -> None:
    text = plain(Page(render(sample())).text)
    for part in (
        "LeNet-5 on digits (fixture)",
        "40.9x smaller on disk (1.72 MB to 42.2 KB), accuracy 98.75 % to 98.50 % on the test split",
        "1.27x slower at batch size 1, 1.35x faster at batch size 64",
        "latency 0.9 1.266 missed",
        "accuracy_drop 0.005 0.0025 met",
        "technique: pruning/magnitude",
        "This step made the model 1.25x slower at batch size 1.",
        "rank 24 of 500",
        "rank 5 would need more parameters than the layer",
        "fc1 400,500 31,700 7.9 %",
        "exports/model.onnx 251,777 6.85x 2.4e-06 float32: zeros take their full space in this format",
        "seed 7",
        "torch 2.13.0+cpu",
    ):
        assert part in text


def test_the_table_has_a_row_per_stage_with_the_survey_s_rates_and_the_spread_of_the_speed() -> None:
    text = plain(Page(render(sample())).text)
    row = text[text.index("2 low rank factorization/svd") :]
    assert row.startswith(
        "2 low rank factorization/svd 98.71 % 62,280 36,001 6.92x 12.0x 85.6 % 662,559 6.92x 309 KB 61.0 KB 28.3x "
        "0.79x (0.76-0.82) 0.266 ms 1.35x (1.31-1.38) 4.33 ms"
    )


def test_the_page_needs_nothing_from_elsewhere_and_is_small() -> None:
    text = render(sample())
    page = Page(text)
    assert len(text.encode()) < 400_000
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    assert not re.search(r"(?:src|href)=\"(?!#)|@import|url\((?!#)", text)
    assert page.open == []


def test_the_page_can_be_read_by_a_screen_reader() -> None:
    page = Page(render(sample()))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert set(labels) <= set(ids)
    assert len(page.all("svg")) == 1 + len(LAYERS)
    assert all(svg["role"] == "img" and svg["aria-labelledby"] in ids for svg in page.all("svg"))
    assert all(header["scope"] in {"col", "row"} for header in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    assert "2 low rank: 61.0 KB, 98.71 %" in plain(page.text)


@pytest.mark.parametrize("values", [[0.9953, 0.9955], [0.9675, 0.97], [0.2, 0.9], [0.9, 0.9]])
def test_ticks_that_differ_are_written_differently(values: list[float]) -> None:
    from rarefy.report.plots import size_against_metric

    drawn = size_against_metric([2e6, 1e6], values, "accuracy", "title")
    ticks = re.findall(rf">([\d.]+){numbers.SPACE}%<", drawn)
    assert 3 < len(ticks) == len(set(ticks))


def test_the_same_report_gives_the_same_page_and_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    def settings() -> dict[str, Any]:
        # asking for the backend would choose one
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before, modules = settings(), set(sys.modules)
    assert render(sample()) == render(sample())
    assert settings() == before
    assert "matplotlib.pyplot" not in set(sys.modules) - modules


def test_whatever_a_user_writes_stays_text() -> None:
    evil = "<script>alert('&\"$x$')</script>"
    step = pruned().model_copy(
        update={
            "name": evil,
            "technique": evil,
            "notes": (evil,),
            "layers": (LayerReport(name=evil, kind=evil, action=evil, scores={evil: 1.0}),),
            "skipped": (SkippedLayer(name=evil, kind=evil, reason=evil),),
            "layer_parameters": {evil: 3},
            "histograms": (bell(evil, 100, 1.0),),
        }
    )
    report = sample(
        name=evil,
        metric="accuracy",
        steps=(step,),
        recipe={evil: evil},
        notes=(evil,),
        environment={evil: evil},
        exports=(ExportReport(format=evil, path=evil, bytes=1, rate=1.0, max_difference=0.0, notes=(evil,)),),
        budgets=(BudgetReport(name=evil, limit=1, value=1, met=True),),
    )
    for page in (Page(render(report)), Page(compare_html([report]))):
        assert page.all("script") == []
        assert evil in page.text
        assert page.open == []


def test_a_metric_that_is_no_share_may_be_infinite_and_named_as_one_likes() -> None:
    metric = "perplexity <b>"
    stages = [
        StageReport(index=i, name=f"stage {i}", measurements=(Measurement(name=metric, value=v, better="lower"),
                    Measurement(name="bytes", value=100)))
        for i, v in ((-1, 12.5), (0, math.inf))
    ]  # fmt: skip
    report = sample(metric=metric, baseline=stages[0], steps=stages[1:], test=(), exports=(), budgets=())
    page = Page(render(report))
    assert "Perplexity <b> 12.5 to inf on the validation split" in page.text
    assert page.all("b") == []


def test_a_run_that_has_only_begun_has_a_page_too() -> None:
    page = Page(render(empty()))
    assert "the run is not finished" in page.text
    assert "Nothing measured yet." in page.text
    assert page.all("svg") == []


@pytest.mark.parametrize(
    "missing", [{"steps": ()}, {"test": ()}, {"exports": ()}, {"budgets": ()}, {"environment": {}}, {"recipe": {}}]
)
def test_missing_parts_leave_the_rest_standing(missing: dict[str, Any]) -> None:
    page = Page(render(sample(**missing)))
    assert page.open == []
    assert "LeNet-5 on digits (fixture)" in page.text


def test_what_plugins_measure_is_shown() -> None:
    step = pruned()
    measured = (*step.measurements, Measurement(name="energy", value=3.25, unit="J"))
    assert "energy: 3.25 J." in Page(render(sample(steps=(step.model_copy(update={"measurements": measured}),)))).text


def test_without_exports_the_last_checkpoint_is_the_size() -> None:
    assert plain(verdict(sample(exports=()))).startswith("28.3x smaller on disk (1.72 MB to 61.0 KB)")


def test_a_larger_file_is_called_larger() -> None:
    larger = ExportReport(format="onnx", path="a", bytes=2000, rate=0.5, max_difference=0.0)
    assert plain(verdict(sample(exports=(larger,)))).startswith("2.00x larger on disk")


def test_words_say_that_zeros_are_not_speed() -> None:
    (note,) = words(pruned(), baseline())
    assert plain(note).startswith("93.4 % of the parameters are exact zeros and the file is 14.6x smaller.")
    assert "not counted as speed" in note


def test_words_tell_a_slower_step_but_not_noise() -> None:
    kept = {"fc": 50}
    fast = stage(0, "a", 0.9, kept, 100, {1: (0.9, 1.0, 1.1)}, parameters=100)
    within_noise = stage(1, "b", 0.9, kept, 90, {1: (0.8, 0.93, 1.0)}, parameters=90)
    slower = stage(1, "c", 0.9, kept, 90, {1: (0.4, 0.5, 0.6)}, parameters=90)
    assert words(within_noise, fast) == []
    assert [plain(note) for note in words(slower, fast)] == ["This step made the model 2.00x slower at batch size 1."]


def test_words_tell_growth_and_a_step_that_gained_nothing() -> None:
    small = stage(0, "a", 0.9, {"fc": 50}, 100, {}, parameters=100_000)
    grown = stage(1, "b", 0.9, {"fc": 50}, 100, {}, parameters=200_000)
    assert [note.split(" from ")[0] for note in words(grown, small)][:2] == ["Parameters grew", "FLOPs grew"]
    assert words(small, small) == ["The number of parameters did not fall; the file did not shrink."]
    assert words(small, None) == []
    barely = stage(1, "b", 0.9, {"fc": 50}, 99_800, {}, parameters=100_000)
    before = stage(0, "a", 0.9, {"fc": 50}, 100_000, {}, parameters=100_000)
    assert words(barely, before) == ["The number of parameters did not fall; the file did not shrink."]
    for technique in ("recovery/batch-norm", "prepare/linear"):  # not meant to make anything smaller
        assert words(barely.model_copy(update={"technique": technique}), before) == []


def test_the_terminal_shows_the_outcome_the_steps_and_the_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    console(sample(name="[bold]name"))
    shown = " ".join(plain(capsys.readouterr().out).split())
    assert shown.startswith("[bold]name 40.9x smaller on disk")
    assert "low rank 98.71 % 62,280 36,001 662,559 61.0 KB 28.3x 0.79x 1.35x" in shown
    assert "budget latency: 1.266 of at most 0.9, MISSED" in shown
    console(empty())
    assert "Nothing measured yet." in capsys.readouterr().out


def test_runs_are_compared_by_the_same_figures() -> None:
    header, rows = compare_rows([sample(), empty()])
    whole, nothing = (dict(zip(header, row, strict=True)) for row in rows)
    assert (whole["original"], whole["compressed"], whole["bytes"]) == (0.9875, 0.985, 42_180)
    assert whole["speed-up @64"] == 1.35
    assert whole["budgets"] == "missed latency"
    assert nothing["run"] == "empty"
    assert nothing["compressed"] is None
    assert json.loads(json.dumps(rows)) == rows
    page = Page(compare_html([sample(), empty()]))
    assert page.open == []
    assert "98.50 % -0.25 points" in plain(page.text)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (numbers.size(0), "0 B"),
        (numbers.size(999), "999 B"),
        (numbers.size(1_000), "1.00 KB"),
        (numbers.size(999_999), "1.00 MB"),
        (numbers.size(41_300_000), "41.3 MB"),
        (numbers.count(431_080), "431,080"),
        (numbers.count(25_600_000), "25.6 M"),
        (numbers.count(999_999_999_999), "1.00 T"),
        (numbers.times(0.0123), "0.0123x"),
        (numbers.times(9.999), "10.0x"),
        (numbers.times(1234.5), "1,230x"),
        (numbers.percent(0.9271), "92.7 %"),
        (numbers.metric("top-5 accuracy", 0.98765), "98.77 %"),
        (numbers.metric("perplexity", math.inf), "inf"),
        (numbers.change("accuracy", -0.0025), "-0.25 points"),
        (numbers.change("loss", 0.5), "+0.5"),
        (numbers.duration(59.6), "1 min 0 s"),
        (numbers.duration(7384), "2 h 3 min"),
    ],
)
def test_numbers_are_written_for_people(written: str, read: str) -> None:
    assert plain(written) == read
