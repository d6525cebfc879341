"""Reports of run folders that the real `Workspace` published, whole and in part."""

from __future__ import annotations

import html.parser
import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfscratch import cli, reporting
from hfscratch.artifact import Proof, Workspace, read_manifest, write_json
from hfscratch.data import corpus
from hfscratch.data.census import Census
from hfscratch.data.contamination import Rule
from hfscratch.errors import UsageError
from hfscratch.recipe import to_dict
from hfscratch.reporting import figures, formats

SPLITS = {"train": 55, "validation": 3, "test": 2}
FATES = [(split, None, 900 + 37 * i) for split, number in SPLITS.items() for i in range(number)]
FATES += [("dropped", "too short", 7)] * 3 + [("dropped", "near-copy", 900)]
SETS = {"validation": 3, "test": 2, "exam|2.jsonl": 40}
OVERLAP = {"id": "a <b>/1", "set": "exam|2.jsonl", "example": "exam:9", "share": 0.25, "words": 31, "action": "kept"}
HISTORY = [
    {"step": step, "tokens": step * 1024, "loss": 8 - step / 50, "bits_per_byte": 4 - step / 100, "learning_rate": 1e-3}
    for step in range(10, 201, 10)
] + [{"step": 100, "tokens": 102_400, "eval_loss": 5.5, "eval_bits_per_byte": 2.75}]
SCORES = {
    "validation": {"bits_per_byte": 1.9712, "perplexity": 104.31, "num_bytes": 402_112, "num_tokens": 118_284},
    "test": {"bits_per_byte": 1.8731, "perplexity": 82.77, "num_bytes": 371_204, "num_tokens": 109_197},
    "parses": {
        "share": 0.315,
        "reference_share": 0.2778,
        "num_samples": 200,
        "num_references": 18,
        "num_tokens": 64,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 0,
    },
}
SAMPLES = [
    {"prompt": "", "text": "if a < b and b > c:\n    <script>alert('x')</script>\n"},
    {"prompt": "class Foo(", "text": "object):\n    '''```\n    fence\n    ```'''\n"},
]


def figures_of(value):
    return {"rouge1": {"value": value + 0.02, "interval": [value, value + 0.04]}} | {
        "rougeL": {"value": value, "interval": [value - 0.01, value + 0.01]}
    }


DOWNSTREAM = {
    "pretrain": {**SCORES, "answers": figures_of(0.1012)},
    "finetune": {"test": {"bits_per_byte": 1.9954}, "answers": figures_of(0.2034)},
    "most_frequent_answer": {"answers": figures_of(0.0111)},
    "name_as_words": {"answers": figures_of(0.1975)},
    "comparisons": [
        {"metric": "rougeL", "of": "finetune", "over": over, "difference": gain, "interval": interval, "ratio": ratio}
        for over, gain, interval, ratio in (
            ("pretrain", 0.1022, [0.08, 0.12], 2.01),
            ("name_as_words", 0.0059, [-0.01, 0.02], 1.03),
        )
    ],
}
ANSWERS = [
    {
        "id": str(number),
        "prompt": f"def <b>f{number}</b>(self):\n    return {number}\n",
        "reference": f"Return | number {number}.",
        "answers": {"pretrain": "", "finetune": f"Return `{number}`.", "name_as_words": f"f {number}"},
    }
    for number in range(20)
]
INPUTS = {
    "tokenizer": ["data"],
    "pretrain": ["tokenizer"],
    "finetune": ["pretrain"],
    "evaluate": ["data", "pretrain", "finetune"],
    "export": ["finetune"],
}


def publish(out, stage, fill, **manifest):
    workspace = Workspace(out, stage, key="k")
    standing = {name: read_manifest(out / name) for name in INPUTS.get(stage, [])}
    if not (out / "finetune").is_dir():
        standing.pop("finetune", None)
    inputs = {name: each["digest"] if each else "of one that is not here" for name, each in standing.items()}
    with workspace.staging() as folder:
        fill(folder)
        workspace.publish(folder, section={}, inputs=inputs, **manifest)


def write_ledger(folder):
    """A ledger of `FATES`: of two sources, of which one states a licence, and with one family of copies."""
    rows = [
        {
            "id": f"{number % 2}/{number}",
            "source": f"s|{number % 2}",
            "size_bytes": size,
            "num_chars": size,
            "fate": fate,
            "reason": reason,
            "license": "mit" if number % 2 else None,
            "family": "1/5" if number == 5 or reason == "near-copy" else None,
        }
        for number, (fate, reason, size) in enumerate(FATES)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=corpus.LEDGER_SCHEMA), folder / "ledger.parquet")
    overlaps = pa.Table.from_pylist([OVERLAP], schema=corpus.CONTAMINATION_SCHEMA)
    pq.write_table(overlaps, folder / "contamination.parquet")


def publish_data(out):
    out.mkdir(parents=True, exist_ok=True)
    write_ledger(out)
    census = Census.take(out, sets=SETS, rule=Rule(ngram=13, share=0.5, span_words=50))
    metrics = {
        "documents": SPLITS,
        "bytes": {"train": 11_843_212, "validation": 402_112, "test": 371_204},
        "fates": SPLITS | {"dropped": 4},
        "ignored": {".pdf": 12},
        "input_documents": 64,
        "taken_out": {"repeated lines": 1234, "repeated paragraphs": 0, "changed": 17},
        **to_dict(census),
    }
    proof = Proof("no document is in two splits", True, "60 documents | 60 digests")
    publish(out, "data", write_ledger, metrics=metrics, proofs=[proof], timings={"read": 3.2})


def publish_tokenizer(out):
    metrics = {
        "vocab_size": 4096,
        "tokens": {"train": 3_412_332, "validation": 118_322},
        "bytes_per_token": {"train": 3.47},
    }
    publish(out, "tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{}"), metrics=metrics)


def publish_pretrain(out, history=HISTORY):
    plan = [["precision", "fp32, because this processor has no fast bf16"]]
    training = {"history": history, "samples": [{"step": 100, "text": "the <the> the"}], "plan": plan}
    metrics = {"parameters": 7_341_056, "train_tokens": 1_000_448, "tokens_per_s": 5301.2, "train_seconds": 188.7}
    publish(
        out,
        "pretrain",
        lambda folder: write_json(folder / "metrics.json", training),
        metrics=metrics | {"precision": "fp32", "predicted_seconds": 186.0},
        timings={"train": 188.7},
    )


def publish_evaluate(out):
    has_answers = (out / "finetune").is_dir()

    def fill(folder):
        write_json(folder / "metrics.json", DOWNSTREAM if has_answers else {"pretrain": SCORES})
        write_json(folder / "samples.json", SAMPLES)
        if has_answers:
            write_json(folder / "answers.json", ANSWERS)

    proof = Proof("every token is predicted exactly once", True, "all of them")
    publish(out, "evaluate", fill, metrics={"pretrain": SCORES}, proofs=[proof], timings={"score test": 13.1})


def publish_finetune(out):
    history = [{"step": step, "eval_loss": 5 - step / 100} for step in (0, 50, 100)]
    metrics = {
        "task": "docstring",
        "method": "lora",
        "trainable_parameters": 294_912,
        "parameters": 7_341_056,
        "examples": {"train": {"used": 5952}},
        "steps": 100,
        "published_step": 75,
        "train_seconds": 36.9,
    }
    publish(out, "finetune", lambda folder: write_json(folder / "metrics.json", {"history": history}), metrics=metrics)


def publish_export(out):
    files = {
        "torch": {"bits_per_byte": 1.7342, "lost": 0.0, "tokens_per_s": 627.4},
        "fp32": {"file": "onnx/model.onnx", "size_bytes": 20_992_284, "bits_per_byte": 1.7342, "lost": 1e-11},
        "q4": {"file": "onnx/model_q4.onnx", "size_bytes": 4_288_116, "bits_per_byte": 1.7456, "lost": 0.00657},
    }
    files["q4"]["tokens_per_s"] = 1884.1
    metrics = {"onnx": files, "source": "finetune", "test_bytes": 29_575, "threads": 2}
    publish(out, "export", lambda folder: (folder / "model.onnx").write_bytes(b"0" * 2048), metrics=metrics)


@pytest.fixture
def downstream(out):
    """A run of the whole line."""
    for make in (publish_finetune, publish_evaluate, publish_export):
        make(out)
    return out


@pytest.fixture
def out(tmp_path):
    run = tmp_path / "runs" / "some-run"
    for make in (publish_data, publish_tokenizer, publish_pretrain, publish_evaluate):
        make(run)
    (run / "recipe.yaml").write_text("name: pycode-tiny\nout: runs/pycode-tiny\nseed: 0\n")
    return run


class Page(html.parser.HTMLParser):
    """Checks that elements close in order, and keeps their attributes and text."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def write(out):
    page, text = reporting.write(out)
    assert (page.name, text.name) == ("report.html", "report.md")
    return page.read_text(), text.read_text()


def test_the_page_is_one_file_without_network_or_script(out):
    page = Page(write(out)[0])
    assert "script" not in page.tags
    fetched = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "xlink:href")]
    assert all(value.startswith("#") for value in fetched), fetched
    assert not re.search(r"@import|url\((?!#)", write(out)[0])


def test_ids_are_unique_so_that_pictures_do_not_borrow_from_each_other(out):
    page = Page(write(out)[0])
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10
    used = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    assert used and used <= set(ids)


def test_the_headline_figures_are_there_in_both_reports(out):
    for report in write(out):
        for figure in ("1.873", "1.971", "82.77", "31.5 %", "7.34 M", "3 min 9 s", "5,301 tokens/s", "pycode-tiny"):
            assert figure in report, figure


def test_everything_that_was_recorded_is_told(out):
    for report in write(out):
        for told in (
            "too short",
            "1,234 repeated lines",
            "2 documents belong to families of copies: 1 of 2",
            "12 .pdf",
            "no document is in two splits",
            "because this processor has no fast bf16",
            "where 3 min 6 s were predicted",
            "after 100 steps",
            "score test",
            "transformers",
            "seed: 0",
            "3.41 M",
        ):
            assert told.lower() in report.lower(), told


def test_what_each_rule_left_is_told_and_adds_up(out):
    page, text = write(out)
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (\d*) \| (\d+) \| .*? \|$", text, flags=re.MULTILINE)
    left = {rule: (reasons, dropped, documents) for rule, reasons, dropped, documents in rows}
    assert left["read"] == ("", "", "64")
    assert left["readable"] == ("", "", "64")
    assert left["of a length to keep"] == ("too short", "3", "61")
    assert left["no near-copy"] == ("near-copy", "1", "60")
    assert left["not contaminated"] == ("", "", "60")
    kept = formats.size(sum(size for fate, _, size in FATES if fate != "dropped"))
    assert f'<td>near-copy</td><td class="num">1</td><td class="num">60</td><td class="num">{kept}</td>' in page
    assert "Documents left by each rule" in page


def test_sources_licences_and_overlaps_are_told_and_not_obeyed(out):
    page, text = write(out)
    sizes = [
        sum(size for n, (fate, _, size) in enumerate(FATES) if n % 2 == odd and fate != "dropped") for odd in (0, 1)
    ]
    for odd, licence in ((0, "not stated"), (1, "mit")):
        assert re.search(rf"\| s\\\|{odd} \| 32 \| 30 \| {formats.size(sizes[odd])} \| .* \|  \| {licence} \|", text)
    assert r"| exam\|2.jsonl | 40 | 1 | 0 | 0 | 1 |" in text
    assert "<td>a &lt;b&gt;/1</td>" in page


def test_tokens_are_told_by_source_where_they_stand_beside_their_documents(finished_run):
    """Of a real run: what the sources have adds up to what the splits have."""
    run = finished_run / "run"
    tokens = read_manifest(run / "tokenizer")["metrics"]["tokens"]
    told = Page(write(run)[0]).text
    assert list(reporting._source_tokens(run).values()) == [sum(tokens.values())]
    assert formats.count(sum(tokens.values())) in told


def test_what_the_model_writes_is_shown_and_not_obeyed(out):
    page, text = write(out)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert SAMPLES[0]["text"].strip() in Page(page).text
    assert "<mark>class Foo(</mark>object):" in page
    assert "````\n" + SAMPLES[1]["text"].rstrip() + "\n````" in text, "backticks in a sample close its block"


def test_table_cells_stay_in_their_column(out):
    text = write(out)[1]
    assert r"60 documents \| 60 digests" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_a_report_depends_on_the_run_alone(out):
    first = write(out)
    assert write(out) == first
    assert all(str(out) not in report for report in first), "a run folder can be moved"


def test_pictures_follow_the_colours_and_the_font_of_the_page(out):
    page = write(out)[0]
    for color in figures.CSS_COLORS:
        assert color not in page
    assert {"var(--first)", "var(--second)", "var(--muted)", "var(--rule)"} <= set(re.findall(r"var\(--\w+\)", page))
    assert "DejaVu Sans'" not in page
    assert page.count('<svg class="wide"') == page.count('<svg class="narrow"') == 4


PARTS = {
    "data": publish_data,
    "tokenizer": publish_tokenizer,
    "pretrain": publish_pretrain,
    "evaluate": publish_evaluate,
}


@pytest.mark.parametrize(
    "stages", [("data",), ("data", "tokenizer"), ("pretrain",), ("evaluate",), ("pretrain", "evaluate")]
)
def test_a_report_tells_as_much_as_there_is(tmp_path, stages):
    for stage in stages:
        PARTS[stage](tmp_path)
    page, text = write(tmp_path)
    assert tmp_path.name in Page(page).text
    assert ("1.873" in text) == ("evaluate" in stages)
    assert ("7.34 M" in text) == ("pretrain" in stages)
    assert ("too short" in text) == ("data" in stages)
    assert ("How it learned" in page) == ("pretrain" in stages)


OF_THE_MODEL = ("1.873", "82.77", "31.5 %", "class Foo(", "score test", "predicted exactly once", "evaluate/")


def summary(out, capsys):
    """What the command line prints of the run."""
    cli._print_summary(out, "recipe", 1.0)
    return capsys.readouterr().out


def test_figures_of_an_earlier_model_are_left_out_and_the_report_says_so(out, capsys):
    earlier = "evaluate: of an earlier model; run `hfscratch run RECIPE`"
    for told in (*write(out), summary(out, capsys)):
        assert earlier not in told
        assert "1.873" in told
    publish_pretrain(out, HISTORY[:-3])
    page, text = write(out)
    for told in (page, text, summary(out, capsys)):
        assert earlier in told
        assert not [figure for figure in OF_THE_MODEL if figure in told]
    assert "7.34 M" in text and "How it learned" in page
    publish_evaluate(out)
    for told in (*write(out), summary(out, capsys)):
        assert earlier not in told
        assert "1.873" in told


def test_what_an_outdated_artifact_gave_is_outdated_too(out, capsys):
    other = {"documents": {"train": 7}, "bytes": {"train": 7}}
    publish(out, "data", lambda folder: (folder / "README.md").write_text("other data"), metrics=other)
    for told in (write(out)[1], summary(out, capsys)):
        for stage in ("tokenizer", "pretrain", "evaluate"):
            assert f"{stage}: of earlier data; run" in told
        assert "7,341,056" not in told and "7.34 M" not in told


def test_an_artifact_of_a_later_stage_is_listed_too(out):
    publish(out, "compress", lambda folder: (folder / "model.onnx").write_bytes(b"0" * 2048), timings={"trace": 4.0})
    page, text = write(out)
    assert "compress/" in page and "| compress/ | 2.05 kB |" in text
    assert "trace" in page


def test_the_summary_counts_only_the_documents_that_were_trained_on(out):
    assert reporting._context(out)["summary"] == (
        "A language model of 7.34 M parameters, made from 55 training documents (11.8 MB of text) and a vocabulary of "
        "4,096."
    )


def test_the_terminal_says_of_how_many_samples_and_documents_a_share_is(out, capsys):
    assert "31.5% of 200 samples (pretrain); 27.8% of 18 documents cut alike" in summary(out, capsys)


def test_a_run_without_artifacts_has_no_report(tmp_path):
    with pytest.raises(UsageError, match="holds no artifact"):
        reporting.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_training_without_bits_per_byte_shows_its_loss(tmp_path):
    history = [{key: value for key, value in entry.items() if "bits" not in key} for entry in HISTORY]
    publish_pretrain(tmp_path, history)
    page, text = write(tmp_path)
    assert "Loss in nats a token" in page
    assert "| 100 | 102,400 | 5.500 |\n" in text


def test_what_a_training_was_measured_by_stands_with_its_source_and_shows_where_it_went_on(tmp_path):
    history = [
        {"step": step, "tokens": step * 1024, "loss": 8 - step / 50, "bits_per_byte": 4 - step / 100, "grad_norm": 0.5}
        | {"learning_rate_matrix": 1e-3 / step, "learning_rate_head": 4e-3 / step, "tokens_per_s": 5000.0 + step}
        | {"mfu": 0.3, "memory_gb": 1.5, "energy_wh": step / 100, "eval_gap": 0.1}
        for step in range(10, 201, 10)
    ]
    watched = {
        "tokens_per_s": {"value": 5105.0, "source": "measured: the median over the log"},
        "mfu": {"value": 0.3123, "source": "measured: tokens/s × 9 MFLOP ÷ <matrix rate>"},
        "energy_wh": {"value": 2.0, "source": "estimated: processor time × 12 W a core"},
        "co2_g": {"value": 0.00089, "source": "estimated: energy × 445 g a kWh"},
    }
    training = {"history": history, "resumes": [60, 120]}
    publish(
        tmp_path,
        "pretrain",
        lambda folder: write_json(folder / "metrics.json", training),
        metrics={"watched": watched, "spikes": [{"step": 77}]},
    )
    page, text = write(tmp_path)
    Page(page)
    for said in ("31.2 %", "2.00 Wh", "0.000890 g", "estimated: processor time × 12 W a core", "60, 120", "step 77"):
        assert said in page and said in text, said
    for title in ("gap: validation", "gradient norm", "learning rate by role", "MFU in percent", "energy so far, Wh"):
        assert title in page, title
    assert page.count("What training was measured by") == 3  # the wide form, the narrow one, and the caption
    assert figures.watched(HISTORY) == figures.watched(history[:1]) == figures.watched([]) == ""


def test_a_training_of_a_single_point_or_of_none_is_drawn(tmp_path):
    for history in ([], HISTORY[:1], HISTORY[-1:], [{**HISTORY[0], "loss": math.inf, "bits_per_byte": 3.0}]):
        publish_pretrain(tmp_path, history)
        Page(write(tmp_path)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_training_that_diverged_is_drawn_up_to_there(value):
    names = ("loss", "bits_per_byte", "eval_loss", "eval_bits_per_byte")
    broken = [{name: value if name in names else figure for name, figure in entry.items()} for entry in HISTORY]
    assert figures.learning_curve(broken) == ""
    assert figures.learning_curve(HISTORY + broken, value) == figures.learning_curve(HISTORY)
    only_loss = [{name: figure for name, figure in entry.items() if "bits" not in name} for entry in HISTORY + broken]
    assert figures.loss_curve(only_loss).startswith("<svg")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.count(4096), "4,096"),
        (formats.count(999_999), "999,999"),
        (formats.count(7_341_056), "7.34 M"),
        (formats.count(1_234_567_890), "1.23 B"),
        (formats.count(345_678_901), "346 M"),
        (formats.figure(1.8731), "1.873"),
        (formats.figure(82.771), "82.77"),
        (formats.figure(4231.24), "4,231.2"),
        (formats.share(0), "0 %"),
        (formats.share(0.2778), "27.8 %"),
        (formats.share(1), "100 %"),
        (formats.size(512), "512 bytes"),
        (formats.size(11_843_212), "11.8 MB"),
        (formats.size(235_000_000), "235 MB"),
        (formats.duration(0.44), "0.4 s"),
        (formats.duration(59.7), "1 min"),
        (formats.duration(188.7), "3 min 9 s"),
        (formats.duration(7500), "2 h 5 min"),
        (formats.tick(200_000), "200 k"),
        (formats.tick(1_500_000), "1.5 M"),
    ],
)
def test_numbers_are_written_for_people(written, expected):
    assert written == expected


def test_no_figure_is_lost_between_metrics_and_tiles(out):
    scores = json.loads((out / "evaluate" / "metrics.json").read_text())["pretrain"]
    tiles = reporting._context(out)["tiles"]
    assert [tile["value"] for tile in tiles if tile["label"] == "bits per byte"] == [
        formats.figure(scores[split]["bits_per_byte"]) for split in ("test", "validation")
    ]


def test_what_finetuning_taught_is_told_with_intervals_and_what_it_cost(downstream, capsys):
    page, text = write(downstream)
    for told in (Page(page).text, text, summary(downstream, capsys)):
        assert "0.203" in told and "0.101" in told and "0.011" in told
    for told in (Page(page).text, text):
        assert "0.193 to 0.213" in told
        assert "+0.102 (+0.080 to +0.120)" in told
        assert "1.995 bits per byte after finetuning, 1.873 before" in told
        assert "the interval holds 0" in told.split("as words”, prompt by prompt")[1]
    assert "5,952 examples, 100 steps" in summary(downstream, capsys)


def test_the_answers_shown_are_spread_over_all_prompts_and_are_not_obeyed(downstream):
    page, text = write(downstream)
    assert "<b>f" not in page
    shown = [number for number in range(20) if f"Return | number {number}." in Page(page).text]
    assert len(shown) == 6 and shown[0] == 0 and shown[-1] == 19
    rows = [line for line in text.splitlines() if line.startswith("| reference |")]
    assert len(rows) == 6
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_exported_files_are_told_with_size_loss_and_speed(downstream, capsys):
    page, text = write(downstream)
    for told in (Page(page).text, text):
        assert "4.29 MB" in told and "+0.657 %" in told and "1,884" in told and "1.7456" in told
    assert "4.3 MB, +0.657% bits per byte, 1,884 tokens/s" in summary(downstream, capsys)


def test_the_score_of_a_foreign_model_on_a_dataset_is_a_report_of_its_own(tmp_path, capsys):
    scores = {"bits_per_byte": 2.9012, "num_documents": 60, "num_bytes": 5000, "num_tokens": 2000}

    def fill(folder):
        write_json(folder / "metrics.json", {"model": {"dataset": scores}})
        write_json(folder / "samples.json", [])

    publish(tmp_path, "evaluate", fill, metrics={"model": {"dataset": scores}})
    page, text = write(tmp_path)
    for told in (Page(page).text, text, summary(tmp_path, capsys)):
        assert "2.901" in told


STEPS = [
    {"rule": "read", "reasons": {}, "documents": 12_345, "size_bytes": 9},
    {"rule": "readable", "reasons": {}, "documents": 12_345, "size_bytes": 9},
    {"rule": "no near-copy", "reasons": {"near-copy": 2345}, "documents": 10_000, "size_bytes": 7},
]
LENGTHS = {
    "bins": [{"first": 10**n, "last": 10 ** (n + 1) - 1, "documents": n + 1, "chars": n * 10**n} for n in range(9)]
}


def counted(number, label="source {}"):
    return {label.format(n): {"read_bytes": 100 + n, "kept_bytes": 90 - n} for n in range(number)}


def test_a_picture_for_a_file_is_the_same_every_time_and_stands_on_white():
    import io

    import matplotlib.image

    pictures = figures.data_pictures({"funnel": STEPS, "lengths": LENGTHS, "sources": counted(3)})
    assert list(pictures) == ["funnel", "lengths", "sources"]
    for picture in pictures.values():
        first = figures.png(picture)
        assert first == figures.png(picture)
        assert matplotlib.image.imread(io.BytesIO(first))[0, 0].tolist() == [1, 1, 1, 1]


def test_a_funnel_shows_the_rules_that_dropped_something():
    picture = figures.inline(figures.funnel(STEPS))
    assert "12,345" in picture and "10,000  (−2,345)" in picture
    assert "no near-copy" in picture and "readable" not in picture


def test_of_many_sources_the_small_ones_stand_together_and_names_are_no_formulas():
    picture = figures.inline(figures.sources(counted(40, r"a$b${} c_{{x}}")))
    assert "28 others" in picture
    assert "a$b$0 c_{x}" in picture and "a$b$39" not in picture


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"funnel": STEPS[:2], "lengths": {"bins": LENGTHS["bins"][:1]}, "sources": counted(1)},
        {"funnel": [STEPS[0] | {"documents": 0}]},
    ],
)
def test_what_says_nothing_is_not_drawn(data):
    assert figures.data_pictures(data) == {}
