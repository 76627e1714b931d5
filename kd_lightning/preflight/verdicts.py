"""The verdicts of a preflight: one function for each line, from the facts to what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from kd_lightning.functional import predictive_entropy, suggest_temperature
from kd_lightning.losses.first_batch import are_probabilities
from kd_lightning.preflight.costs import Costs
from kd_lightning.preflight.facts import Batch, Facts, Score, not_finite
from kd_lightning.preflight.report import Line, Verdict
from kd_lightning.temperature.statistics import standard_deviation

_SOFT = (0.02, 0.95)  # parts of log C between which targets are neither one-hot nor uniform
_SHARE = (0.05, 0.99)  # of the gradient that the distillation term has
_DEAR = 0.2  # part of a step that the teacher may take
_CHEAPER = 0.7  # of the teacher's time, at which another way to run it is worth the words
_ECE = 0.1
_NOISE = 2.0  # standard errors


def judge(facts: Facts, costs: Costs | None) -> Iterator[Line]:
    """Yield the lines, in the order in which a step computes."""
    teacher = facts.module.teacher
    failed = [line for line in facts.problems if line.name == "teacher"]
    yield failed[0] if failed else Line("teacher", "ok", f"{teacher!r}, fingerprint {teacher.fingerprint()[:8]}")
    yield from (line for line in facts.problems if line not in failed)
    if not facts.train or facts.train[0].student is None:
        return
    yield _classes(facts.train[0], facts.train[0].student)
    yield _layout(facts.module.class_dim, facts.train[0].student, facts.train[0].targets)
    yield _labels(facts, facts.train[0].student.shape[-1])
    yield _finite(facts)
    yield from _outputs(facts)
    if facts.score is not None:
        yield from _accuracy(facts, facts.score)
    rows = facts.rows("teacher")
    if len(rows) and not not_finite(rows, masked=True):
        yield _spread(rows, facts.rows("student"))
        if facts.steps:
            yield _softness(facts, rows)
        yield _suggestion(rows)
    if facts.steps:
        yield _weights(facts)
    if costs is not None:
        yield _cost(costs)
        yield _memory(costs)


def _line(name: str, text: str, values: Mapping[str, float | None], *findings: tuple[bool, Verdict, str]) -> Line:
    """Return a line with the verdict and advice of the first finding whose condition holds, else ``"ok"``."""
    for holds, verdict, advice in findings:
        if holds:
            return Line(name, verdict, text, advice, values)
    return Line(name, "ok", text, values=values)


def _classes(batch: Batch, student: Tensor) -> Line:
    ours = student.shape[-1]
    if batch.teacher is None:
        return Line("classes", "ok", f"student {ours}; the teacher names a few in each row", values={"student": ours})
    theirs = batch.teacher.shape[-1]
    values = {"student": float(ours), "teacher": float(theirs)}
    if batch.teacher.shape == student.shape:
        return Line("classes", "ok", f"{ours} of both", values=values)
    text = f"the student gives logits {tuple(student.shape)}, the teacher {tuple(batch.teacher.shape)}"
    advice = "let both networks give a row of logits for the same samples and positions"
    if ours != theirs:
        advice = "give both networks the same classes, or map them: kd_lightning.teachers.MappedClasses(teacher, [...])"
    return Line("classes", "wrong", text, advice, values)


def _layout(class_dim: int, logits: Tensor, targets: Tensor | None) -> Line:
    shape = tuple(logits.movedim(-1, class_dim).shape)
    text = f"logits {shape} with class_dim={class_dim}"
    if targets is None:
        return Line("layout", "ok", text)
    text, given = f"{text}, targets {tuple(targets.shape)}", tuple(targets.shape)
    fitting = [dim for dim in range(len(shape)) if shape[:dim] + shape[dim + 1 :] == given]
    if given in (logits.shape[:-1], shape) or (not fitting and logits.shape[-1] == 1):
        return Line("layout", "ok", text)
    advice = "return targets from unpack_batch(batch) that have the logits' shape, with or without its class dimension"
    if fitting:
        advice = f"--model.kd_loss KDLoss --model.kd_loss.class_dim {fitting[0]}"
    return Line("layout", "wrong", text, advice)


def _labels(facts: Facts, classes: int) -> Line:
    task, ignore = facts.train[0].task, facts.module.ignore_index
    given = [batch.targets.flatten() for batch in facts.train if batch.targets is not None]
    if not given:
        if facts.steps and not any(step.task_weight for step in facts.steps):
            return Line("labels", "ok", "the batches have none, and task_weight is 0")
        return Line("labels", "wrong", "the batches have none", "--model.task_weight 0, or batches with labels")
    if task is None:
        return Line("labels", "ok", "values, which have no accuracy")
    values = torch.cat(given)
    kept = values if ignore is None else values[values != ignore]
    if task == "classes" and not values.is_floating_point():
        return _class_numbers(kept, len(values), classes, ignore)
    kind = "yes or no of each label" if task == "labels" else "probabilities of the classes"
    outside = kept[(kept < 0) | (kept > 1)]
    if len(outside):
        return Line("labels", "wrong", f"{kind}, with the value {float(outside[0]):g}", "give values from 0 to 1")
    return Line("labels", "ok", kind)


def _class_numbers(kept: Tensor, count: int, classes: int, ignore: int | None) -> Line:
    ignored = 1 - len(kept) / max(count, 1)
    low, high = (int(kept.min()), int(kept.max())) if len(kept) else (0, 0)
    values = {"lowest": float(low), "highest": float(high), "ignored": ignored}
    outside = kept[(kept < 0) | (kept >= classes)]
    if len(outside):
        other = int(outside[0])
        advice = (
            f"--model.kd_loss KDLoss --model.kd_loss.ignore_index {other}, if {other} marks positions without a label; "
            f"else number the classes from 0 to {classes - 1}"
        )
        text = f"label {other} of {classes} classes, whose numbers end at {classes - 1}"
        return Line("labels", "wrong", text, advice, values)
    if not len(kept):
        advice = "label some of the positions, or train with --model.task_weight 0 and no labels"
        return Line("labels", "wrong", f"all {count} are ignored (ignore_index {ignore})", advice, values)
    text = f"{low} to {high} of {classes} classes, {ignored:.0%} ignored (ignore_index {ignore})"
    return _line("labels", text, values, (ignored > 0.95, "look", "is the mask the right way round?"))


_NOT_FINITE = {  # and what to do about the first that is not
    "inputs": "look for missing values or a division by 0 in the data",
    "the student's logits": "look at the initialisation and the scale of the inputs",
    "the teacher's logits": "run the teacher in another precision, such as --model.teacher.precision fp32 or bf16",
    "the loss": "look at the temperature and the weights",
}


def _finite(facts: Facts) -> Line:
    found = []
    for batch in facts.train:
        bad = not_finite(batch.inputs), not_finite(batch.student), not_finite(batch.teacher, masked=True)
        found += [name for name, is_bad in zip(_NOT_FINITE, bad, strict=False) if is_bad]
    if any(not math.isfinite(step.loss) for step in facts.steps):
        found.append("the loss")
    if not found:
        return Line("finite", "ok", "inputs, logits and loss")
    return Line("finite", "wrong", f"NaN or infinite: {', '.join(dict.fromkeys(found))}", _NOT_FINITE[found[0]])


def _outputs(facts: Facts) -> Iterator[Line]:
    softmax_off = {
        "teacher": "take its softmax off; of a function, FunctionTeacher(fn, output='probs')",
        "student": "take its softmax off: the losses have one",
    }
    for whose, advice in softmax_off.items():
        rows = facts.rows(whose)
        if facts.train[0].task == "labels" or not len(rows) or rows.shape[-1] < 2:
            continue
        found = bool(are_probabilities(rows))
        text = "probabilities: its rows are from 0 to 1 and sum to 1" if found else "logits"
        yield _line(f"{whose}'s output", text, {}, (found, "wrong", advice))


def _accuracy(facts: Facts, score: Score) -> Iterator[Line]:
    chance = 1 / facts.rows("teacher").shape[-1]
    error = math.sqrt(max(score.accuracy * (1 - score.accuracy), chance * (1 - chance)) / score.count)
    text = f"{score.accuracy:.4g} on {score.count} positions of {facts.evaluated_on} data (chance {chance:.2g})"
    values: dict[str, float | None] = {"accuracy": score.accuracy, "count": score.count, "chance": chance}
    values |= {f"accuracy with {name}": other.accuracy for name, other in facts.renormalised.items()}
    name, best = max(facts.renormalised.items(), key=lambda item: item[1].accuracy, default=("", score))
    otherwise = best.accuracy - score.accuracy > max(0.05, _NOISE * error)
    if otherwise:
        text += (
            f"; with {name}, {best.accuracy:.4g} and a calibration error of {best.calibration_error:.3g}: its inputs "
            "are normalised in another way than in its training"
        )
    renormalise = "--model.teacher.transform Renormalize with the statistics of both, or the data module's mean and std"
    other_task = "is it the checkpoint of this task, and are its classes numbered as the labels are?"
    guesses = score.accuracy < chance + _NOISE * error
    yield _line("teacher's accuracy", text, values, (otherwise, "wrong", renormalise), (guesses, "wrong", other_task))
    ece = score.calibration_error
    text = f"{ece:.3g} (expected calibration error, 15 bins)"
    fits = "kd-lightning calibrate --config … fits its own temperature"
    too_high = ece > _ECE + _NOISE * error
    yield _line("teacher's calibration", text, {"calibration_error": ece}, (too_high, "look", fits))


def _spread(teacher: Tensor, student: Tensor) -> Line:
    theirs, ours = (float(standard_deviation(rows).mean()) for rows in (teacher, student))
    text = f"standard deviation over the classes: teacher {theirs:.3g}, student {ours:.3g}"
    flat = theirs < 1e-4
    text += ": the teacher prefers no class" if flat else ""
    advice = "is it trained, and are its weights loaded?"
    return _line("logit spread", text, {"teacher": theirs, "student": ours}, (flat, "wrong", advice))


def _softness(facts: Facts, rows: Tensor) -> Line:
    entropies = {
        step.temperature: float(predictive_entropy(rows, step.temperature).mean()) / math.log(rows.shape[-1])
        for step in facts.steps
    }
    text = "; ".join(f"T = {t:.3g}: {part:.1%} of log C" for t, part in entropies.items())
    try:
        low, high = (suggest_temperature(rows, entropy=entropy) for entropy in _SOFT)
        text += f"; neither one-hot nor uniform from T = {low:.3g} to {high:.3g}"
    except ValueError:
        pass  # because an end lies beyond 0.05 and 100
    return _line(
        "targets' entropy",
        text,
        {f"entropy at T = {t:.4g}": part for t, part in entropies.items()},
        (max(entropies.values()) < _SOFT[0], "look", "the targets are nearly one-hot all along: raise T"),
        (min(entropies.values()) > _SOFT[1], "look", "the targets are nearly uniform all along: lower T"),
    )


def _suggestion(rows: Tensor) -> Line:
    try:
        few, many = suggest_temperature(rows, entropy=0.5), suggest_temperature(rows)
    except ValueError as error:
        return Line("suggested T", "wrong", str(error), "is it trained, and does it give logits?")
    text = f"{many:.3g} to start from (entropy of 10 % of log C), {few:.3g} with few labels and a long run (50 %)"
    return Line("suggested T", "ok", text, values={"temperature": many, "few labels": few})


def _weights(facts: Facts) -> Line:
    steps = facts.steps
    effective = [step.effective_kd_weight for step in steps]
    share = [s.kd_gradient / total if (total := s.kd_gradient + s.task_gradient) else 0.0 for s in steps]
    text = (
        f"kd_weight·T² {_course(effective)}, task_weight {_course(step.task_weight for step in steps)}, "
        f"distillation's share of the gradient at the student's logits {_course(share)}"
    )
    values = {
        "effective_kd_weight at the start": effective[0],
        "effective_kd_weight at the end": effective[-1],
        "share at the start": share[0],
        "share at the end": share[-1],
    }
    if not any(step.kd_gradient for step in steps):
        weighted = any(step.kd_weight for step in steps)
        advice = "look at labels and ignore_index" if weighted else "--model.kd_weight 0.9"
        return Line("weights", "wrong", f"{text}: the teacher has no influence", advice, values)
    has_labels = any(step.task_weight for step in steps)
    return _line(
        "weights",
        text,
        values,
        (max(share) < _SHARE[0], "look", "the teacher hardly counts: raise kd_weight or T"),
        (min(share) > _SHARE[1] and has_labels, "look", "the labels hardly count: raise task_weight, or lower T"),
    )


def _course(values: Iterable[float]) -> str:
    """Return a value, or its course from the start over the middle to the end of the run where it changes."""
    shown = [f"{value:.2g}" if value < 1 else f"{value:.3g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else " → ".join(shown)


_CHEAPER_WAYS = {
    "cached": "--model.teacher.cache TeacherCache --model.teacher.cache.path teacher.cache",
    "bf16": "--model.teacher.precision bf16",
    "compiled": "--model.teacher.compile true",
}


def _cost(costs: Costs) -> Line:
    live = costs.times["live"]
    part = live / (live + costs.student)
    times = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in costs.times.items())
    text = f"{part:.0%} of a step ({times}; the student {1000 * costs.student:.3g} ms)"
    text += "".join(f"; {name} not measured ({reason})" for name, reason in costs.not_measured.items())
    text += f"; no cache as it is: {costs.cacheable}" if costs.cacheable else ""
    ways = {name: costs.times.get(name, math.inf) for name in _CHEAPER_WAYS if name != "cached" or not costs.cacheable}
    best = min(ways, key=lambda name: ways[name])
    worth = part >= _DEAR and ways[best] < _CHEAPER * live
    values = {"share": part, "student": costs.student, **costs.times}
    return _line("teacher's cost", text, values, (worth, "look", f"take {best}: {_CHEAPER_WAYS[best]}"))


def _memory(costs: Costs) -> Line:
    sizes = {"teacher": costs.teacher_bytes, "student": costs.student_bytes, "cache": costs.cache_bytes}
    text = ", ".join(f"{name} {_megabytes(size)}" for name, size in sizes.items() if size)
    values = {name: float(size) for name, size in sizes.items()}
    if not costs.device_bytes:
        return Line("memory", "ok", text, values=values)
    part = costs.peak_bytes / costs.device_bytes
    text += f"; peak of a step without the optimiser {_megabytes(costs.peak_bytes)}, {part:.0%} of the device"
    advice = "--model.teacher.micro_batch_size 8, or a smaller batch"
    return _line("memory", text, values | {"peak": float(costs.peak_bytes)}, (part > 0.9, "look", advice))


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.3g} MB"
