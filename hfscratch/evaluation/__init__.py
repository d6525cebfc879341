"""Measures of a causal model: likelihoods of text, text it writes, answers, and `evaluate` modules around them.

    import evaluate
    from hfscratch.evaluation import metric_path

    metric = evaluate.load(metric_path("bits_per_byte"))
    metric.compute(predictions=texts, model="runs/pycode-tiny/pretrain")
    evaluate.load(metric_path("rouge")).compute(predictions=answers, references=references, per_example=True)

Each module is a folder of its own here, so that `evaluate.load` opens it by path, without the network.
"""

from __future__ import annotations

from pathlib import Path

from hfscratch.errors import UsageError


def metric_path(name: str) -> str:
    """The folder of one of our `evaluate` modules, for `evaluate.load`. Raises: UsageError for a name we lack."""
    folder = Path(__file__).parent / name
    if not (folder / f"{name}.py").is_file():
        known = sorted(path.stem for path in Path(__file__).parent.glob("*/*.py") if path.stem == path.parent.name)
        raise UsageError(f"there is no metric '{name}'; there are {', '.join(known)}")
    return str(folder)
