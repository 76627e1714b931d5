"""The verdicts of a preflight: one function for each line, from the facts to what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kd_lightning.functional import predictive_entropy, suggest_temperature
from kd_lightning.losses.first_batch import are_probabilities
from kd_lightning.preflight.costs import Costs
from kd_lightning.preflight.facts import Batch, Facts, Score, not_finite
from kd_lightning.preflight.report import Line
from kd_lightning.temperature.statistics import standard_deviation

__all__ = ["judge"]

_SOFT = (0.02, 0.95)  # parts of log C between which targets are neither one-hot nor uniform
_SHARE = (0.05, 0.99)  # of the gradient that the distillation term has
_DEAR = 0.2  # part of a step that the teacher may take
_CHEAPER = 0.7  # of the teacher's time, at which another way to run it is worth the words
_ECE = 0.1
_NOISE = 2.0  # standard errors


def judge(facts: Facts, costs: Costs | None) -> Iterator[Line]:
    """Yield the lines, in the order in which a step computes."""
    yield _teacher(facts)
    yield from (Line(problem.name, "wrong", problem.text) for problem in facts.problems if problem.name != "teacher")
    if not facts.train or facts.train[0].student is None:
        return
    yield _classes(facts.train[0])
    yield _layout(facts, facts.train[0])
    yield _labels(facts)
    yield _finite(facts)
    yield from _outputs(facts)
    if facts.score is not None:
        yield from _accuracy(facts, facts.score)
    rows = facts.rows("teacher")
    if len(rows) and not not_finite(rows, masked=True):
        yield _spread(facts, rows)
        if facts.steps:
            yield _softness(facts, rows)
        yield _suggestion(rows)
    if facts.steps:
        yield _weights(facts)
    if costs is not None:
        yield _cost(costs)
        yield _memory(costs)


def _teacher(facts: Facts) -> Line:
    teacher = facts.module.teacher
    texts = [problem.text for problem in facts.problems if problem.name == "teacher"]
    if texts:
        return Line("teacher", "wrong", texts[0])
    return Line("teacher", "ok", f"{teacher!r}, fingerprint {teacher.fingerprint()[:8]}")


def _classes(batch: Batch) -> Line:
    assert batch.student is not None
    ours = batch.student.shape[-1]
    if batch.teacher is None:
        return Line("classes", "ok", f"student {ours}; the teacher names a few in each row", values={"student": ours})
    theirs = batch.teacher.shape[-1]
    values = {"student": float(ours), "teacher": float(theirs)}
    if batch.teacher.shape == batch.student.shape:
        return Line("classes", "ok", f"{ours} of both", values=values)
    text = f"the student gives logits {tuple(batch.student.shape)}, the teacher {tuple(batch.teacher.shape)}"
    if ours != theirs:
        advice = "give both networks the same classes, or map them: kd_lightning.teachers.MappedClasses(teacher, [...])"
    else:
        advice = "let both networks give a row of logits for the same samples and positions"
    return Line("classes", "wrong", text, advice, values)


def _layout(facts: Facts, batch: Batch) -> Line:
    assert batch.student is not None
    logits, targets, class_dim = batch.student, batch.targets, facts.module.class_dim
    shape = tuple(logits.movedim(-1, class_dim).shape)
    text = f"logits {shape} with class_dim={class_dim}" + (
        "" if targets is None else f", targets {tuple(targets.shape)}"
    )
    if targets is None or targets.shape in (logits.shape[:-1], torch.Size(shape)):
        return Line("layout", "ok", text)
    fitting = [dim for dim in range(len(shape)) if shape[:dim] + shape[dim + 1 :] == tuple(targets.shape)]
    if fitting:
        return Line("layout", "wrong", text, f"--model.kd_loss KDLoss --model.kd_loss.class_dim {fitting[0]}")
    if logits.shape[-1] == 1:
        return Line("layout", "ok", text)
    advice = "return targets from unpack_batch(batch) that have the logits' shape, with or without its class dimension"
    return Line("layout", "wrong", text, advice)


def _labels(facts: Facts) -> Line:
    first, ignore = facts.train[0], facts.module.ignore_index
    given = [batch.targets.flatten() for batch in facts.train if batch.targets is not None]
    needed = any(step.task_weight for step in facts.steps) or not facts.steps
    if not given and needed:
        return Line("labels", "wrong", "the batches have none", "--model.task_weight 0, or batches with labels")
    if not given:
        return Line("labels", "ok", "the batches have none, and task_weight is 0")
    if first.task is None:
        return Line("labels", "ok", "values, which have no accuracy")
    values = torch.cat(given)
    kept = values if ignore is None else values[values != ignore]
    if first.task == "labels":
        return _shares(kept, "yes or no of each label")
    if values.is_floating_point():
        return _shares(kept, "probabilities of the classes")
    assert first.student is not None
    return _class_numbers(kept, len(values), first.student.shape[-1], ignore)


def _shares(values: Tensor, kind: str) -> Line:
    outside = values[(values < 0) | (values > 1)]
    if len(outside):
        return Line("labels", "wrong", f"{kind}, with the value {float(outside[0]):g}", "give values from 0 to 1")
    return Line("labels", "ok", kind)


def _class_numbers(kept: Tensor, count: int, classes: int, ignore: int | None) -> Line:
    ignored = 1 - len(kept) / max(count, 1)
    low, high = (int(kept.min()), int(kept.max())) if len(kept) else (0, 0)
    numbers = {"lowest": float(low), "highest": float(high), "ignored": ignored}
    outside = kept[(kept < 0) | (kept >= classes)]
    if len(outside):
        other = int(outside[0])
        advice = (
            f"--model.kd_loss KDLoss --model.kd_loss.ignore_index {other}, if {other} marks positions without a label; "
            f"else number the classes from 0 to {classes - 1}"
        )
        text = f"label {other} of {classes} classes, whose numbers end at {classes - 1}"
        return Line("labels", "wrong", text, advice, numbers)
    if not len(kept):
        advice = "label some of the positions, or train with --model.task_weight 0 and no labels"
        return Line("labels", "wrong", f"all {count} are ignored (ignore_index {ignore})", advice, numbers)
    text = f"{low} to {high} of {classes} classes, {ignored:.0%} ignored (ignore_index {ignore})"
    if ignored > 0.95:
        return Line("labels", "look", text, "is the mask the right way round?", numbers)
    return Line("labels", "ok", text, values=numbers)


def _finite(facts: Facts) -> Line:
    found = []
    for batch in facts.train:
        found += [name for name, value in (("inputs", batch.inputs), ("the student's logits", batch.student))
                  if not_finite(value)]  # fmt: skip
        found += ["the teacher's logits"] if not_finite(batch.teacher, masked=True) else []
    found += ["the loss"] if any(not math.isfinite(step.loss) for step in facts.steps) else []
    if not found:
        return Line("finite", "ok", "inputs, logits and loss")
    first = found[0]
    advice = {
        "inputs": "look for missing values or a division by 0 in the data",
        "the student's logits": "look at the initialisation and the scale of the inputs",
        "the teacher's logits": "run the teacher in another precision, such as --model.teacher.precision fp32 or bf16",
        "the loss": "look at the temperature and the weights",
    }
    return Line("finite", "wrong", f"NaN or infinite: {', '.join(dict.fromkeys(found))}", advice[first])


def _outputs(facts: Facts) -> Iterator[Line]:
    for whose in ("teacher", "student"):
        rows = facts.rows(whose)
        if facts.train[0].task == "labels" or not len(rows) or rows.shape[-1] < 2:
            continue
        name = f"{whose}'s output"
        if are_probabilities(rows):
            advice = (
                "take its softmax off; of a function, FunctionTeacher(fn, output='probs')"
                if whose == "teacher"
                else "take its softmax off: the losses have one"
            )
            yield Line(name, "wrong", "probabilities: its rows are from 0 to 1 and sum to 1", advice)
        else:
            yield Line(name, "ok", "logits")


def _accuracy(facts: Facts, score: Score) -> Iterator[Line]:
    classes = facts.rows("teacher").shape[-1]
    chance = 1 / classes
    error = math.sqrt(max(score.accuracy * (1 - score.accuracy), chance * (1 - chance)) / score.count)
    text = f"{score.accuracy:.4g} on {score.count} positions of {facts.evaluated_on} data (chance {chance:.2g})"
    values: dict[str, float | None] = {"accuracy": score.accuracy, "count": score.count, "chance": chance}
    values |= {f"accuracy with {name}": other.accuracy for name, other in facts.renormalised.items()}
    best = max(facts.renormalised.items(), key=lambda item: item[1].accuracy, default=None)
    gain = 0.0 if best is None else best[1].accuracy - score.accuracy
    if best is not None and gain > max(0.05, _NOISE * error):
        name, other = best
        text += (
            f"; with {name}, {other.accuracy:.4g} and a calibration error of {other.calibration_error:.3g}: its inputs "
            "are normalised in another way than in its training"
        )
        advice = "--model.teacher.transform Renormalize with the statistics of both, or the data module's mean and std"
        yield Line("teacher's accuracy", "wrong", text, advice, values)
    elif score.accuracy < chance + _NOISE * error:
        advice = "is it the checkpoint of this task, and are its classes numbered as the labels are?"
        yield Line("teacher's accuracy", "wrong", text, advice, values)
    else:
        yield Line("teacher's accuracy", "ok", text, values=values)
    ece = score.calibration_error
    text = f"{ece:.3g} (expected calibration error, 15 bins)"
    look = ece > _ECE + _NOISE * error
    advice = "kd-lightning calibrate --config … fits its own temperature" if look else ""
    yield Line("teacher's calibration", "look" if look else "ok", text, advice, {"calibration_error": ece})


def _spread(facts: Facts, teacher: Tensor) -> Line:
    student = facts.rows("student")
    theirs, ours = (float(standard_deviation(rows).mean()) for rows in (teacher, student))
    values = {"teacher": theirs, "student": ours}
    text = f"standard deviation over the classes: teacher {theirs:.3g}, student {ours:.3g}"
    if theirs < 1e-4:
        return Line("logit spread", "wrong", f"{text}: the teacher prefers no class",
                    "is it trained, and are its weights loaded?", values)  # fmt: skip
    return Line("logit spread", "ok", text, values=values)


def _softness(facts: Facts, rows: Tensor) -> Line:
    temperatures = list(dict.fromkeys(step.temperature for step in facts.steps))
    parts = [float(predictive_entropy(rows, t).mean()) / math.log(rows.shape[-1]) for t in temperatures]
    text = "; ".join(f"T = {t:.3g}: {part:.1%} of log C" for t, part in zip(temperatures, parts, strict=True))
    values = {f"entropy at T = {t:.4g}": part for t, part in zip(temperatures, parts, strict=True)}
    soft = _range(rows)
    text += "" if soft is None else f"; neither one-hot nor uniform from T = {soft[0]:.3g} to {soft[1]:.3g}"
    if max(parts) < _SOFT[0]:
        return Line("targets' entropy", "look", text, "the targets are nearly one-hot all along: raise T", values)
    if min(parts) > _SOFT[1]:
        return Line("targets' entropy", "look", text, "the targets are nearly uniform all along: lower T", values)
    return Line("targets' entropy", "ok", text, values=values)


def _range(rows: Tensor) -> tuple[float, float] | None:
    try:
        return suggest_temperature(rows, entropy=_SOFT[0]), suggest_temperature(rows, entropy=_SOFT[1])
    except ValueError:  # an end lies beyond 0.05 and 100
        return None


def _suggestion(rows: Tensor) -> Line:
    try:
        few, many = suggest_temperature(rows, entropy=0.5), suggest_temperature(rows)
    except ValueError as error:
        return Line("suggested T", "wrong", str(error), "is it trained, and does it give logits?")
    text = f"{many:.3g} to start from (entropy of 10 % of log C), {few:.3g} with few labels and a long run (50 %)"
    return Line("suggested T", "ok", text, values={"temperature": many, "few labels": few})


def _weights(facts: Facts) -> Line:
    steps = facts.steps
    first, last = steps[0], steps[-1]
    share = [s.kd_gradient / total if (total := s.kd_gradient + s.task_gradient) else 0.0 for s in steps]
    text = (
        f"kd_weight·T² {_course(s.effective_kd_weight for s in steps)}, "
        f"task_weight {_course(s.task_weight for s in steps)}, "
        f"distillation's share of the gradient at the student's logits {_course(share)}"
    )
    values = {
        "effective_kd_weight at the start": first.effective_kd_weight,
        "effective_kd_weight at the end": last.effective_kd_weight,
        "share at the start": share[0],
        "share at the end": share[-1],
    }
    if not any(step.kd_gradient for step in steps):
        advice = "--model.kd_weight 0.9" if not any(s.kd_weight for s in steps) else "look at labels and ignore_index"
        return Line("weights", "wrong", f"{text}: the teacher has no influence", advice, values)
    if max(share) < _SHARE[0]:
        return Line("weights", "look", text, "the teacher hardly counts: raise kd_weight or T", values)
    if min(share) > _SHARE[1] and any(step.task_weight for step in steps):
        return Line("weights", "look", text, "the labels hardly count: raise task_weight, or lower T", values)
    return Line("weights", "ok", text, values=values)


def _course(values: Iterable[float]) -> str:
    """Return a value, or its course from the start over the middle to the end of the run where it changes."""
    shown = [f"{value:.2g}" if value < 1 else f"{value:.3g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else " → ".join(shown)


def _cost(costs: Costs) -> Line:
    live = costs.times["live"]
    part = live / (live + costs.student)
    times = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in costs.times.items())
    text = f"{part:.0%} of a step ({times}; the student {1000 * costs.student:.3g} ms)"
    text += "".join(f"; {name} not measured ({reason})" for name, reason in costs.not_measured.items())
    values: dict[str, float | None] = {"share": part, "student": costs.student, **costs.times}
    cheaper = {name: t for name, t in costs.times.items() if t < _CHEAPER * live}
    if costs.cacheable:
        text += f"; no cache as it is: {costs.cacheable}"
        cheaper.pop("cached", None)
    if part < _DEAR or not cheaper:
        return Line("teacher's cost", "ok", text, values=values)
    ways = {
        "cached": "--model.teacher.cache TeacherCache --model.teacher.cache.path teacher.cache",
        "bf16": "--model.teacher.precision bf16",
        "compiled": "--model.teacher.compile true",
    }
    best = min(cheaper, key=lambda name: cheaper[name])
    return Line("teacher's cost", "look", text, f"take {best}: {ways[best]}", values)


def _memory(costs: Costs) -> Line:
    sizes = {"teacher": costs.teacher_bytes, "student": costs.student_bytes, "cache": costs.cache_bytes}
    text = ", ".join(f"{name} {_megabytes(size)}" for name, size in sizes.items() if size)
    values = {name: float(size) for name, size in sizes.items()}
    if not costs.device_bytes:
        return Line("memory", "ok", text, values=values)
    part = costs.peak_bytes / costs.device_bytes
    text += f"; peak of a step without the optimiser {_megabytes(costs.peak_bytes)}, {part:.0%} of the device"
    values |= {"peak": float(costs.peak_bytes)}
    if part > 0.9:
        return Line("memory", "look", text, "--model.teacher.micro_batch_size 8, or a smaller batch", values)
    return Line("memory", "ok", text, values=values)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.3g} MB"
