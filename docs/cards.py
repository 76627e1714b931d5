"""Write a page for each temperature policy: its row of policies.md, a plot, examples, and its docstring.

Sphinx's ``conf.py`` calls :func:`write`; the pages are not committed. The plot replays one recorded training: a student
of the digits that starts undecided and approaches its teacher, seen by every policy alike.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from kd_lightning import Distiller, FrozenTeacher, temperature
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.plotting import plot_temperature_grid
from kd_lightning.temperature import Progress, Signals, TemperaturePolicy

ROOT = Path(__file__).parents[1]
STEPS = 60
COSINE = {"class_path": "CosineSchedule", "init_args": {"init_value": 8.0, "end_value": 2.0}}
EXAMPLES: dict[str, dict[str, Any]] = {
    "AsymmetricTemperature": {"student": 1.0, "teacher": 4.0},
    "CapacityTemperature": {"interval": 5, "overload": 0.5, "underload": 0.2},
    "ClassFrequencyTemperature": {"class_counts": [100, 80, 60, 40, 30, 20, 15, 10, 5, 2]},
    "ConfidenceTemperature": {},
    "ConstantTemperature": {"value": 4.0},
    "CorrectWrongTemperature": {},
    "DepthTemperature": {"shallow": 8.0, "deep": 2.0},
    "DisagreementTemperature": {},
    "EnergyTemperature": {},
    "EntropyTemperature": {"min_value": 2.0, "max_value": 6.0},
    "GroupTemperature": {"key": "source", "temperatures": {8: COSINE, 9: 6.0}, "default": 2.0},
    "InstanceTemperature": {"num_classes": 10, "init_value": 8.0},
    "JoinedTemperature": {"policies": [2.0, {"class_path": "EntropyTemperature", "init_args": {}}], "boundaries": [20]},
    "LearnableTemperature": {"init_value": 8.0},
    "LogitStandardization": {},
    "LogitStdTemperature": {},
    "LossGapTemperature": {},
    "MaxLogitTemperature": {"ratio": 3.5},
    "MultiTemperature": {},
    "ProductTemperature": {"policies": [{"class_path": "LogitStdTemperature", "init_args": {}}, COSINE]},
    "ScheduledTemperature": {"schedule": COSINE},
    "SharpnessTemperature": {},
    "TargetConfidenceTemperature": {},
    "TokenDifficultyTemperature": {},
    "TransformedTeacherTemperature": {},
}

PAGE = """# {name}

{facts}

```python
temperature = {python}
```

```yaml
{yaml}```

![T over one recorded training]({name}.png)

T of student and teacher over 60 steps of one training on digits, the same for every policy. The line is the mean over
the batch; the band reaches from its smallest to its largest T.

```{{eval-rst}}
.. autoclass:: kd_lightning.temperature.{name}
   :no-index:
   :no-members:
```
"""


def in_python(value: Any) -> str:
    """Return the Python expression of a value as YAML has it."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = [f"{name}={in_python(argument)}" for name, argument in value.get("init_args", {}).items()]
        return f"{value['class_path']}({', '.join(arguments)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {in_python(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(in_python, value)) + "]" if isinstance(value, list) else repr(value)


def in_yaml(name: str) -> dict[str, Any]:
    """Return a policy's example as a configuration has it."""
    example = copy.deepcopy(EXAMPLES[name])  # parsers change what they are given
    return {"class_path": name, **({"init_args": example} if example else {})}


def build(name: str) -> TemperaturePolicy:
    """Return the policy of the example."""
    return eval(in_python(in_yaml(name)), vars(temperature).copy())


def record() -> list[Signals]:
    """Train a student and return what a policy sees in each step."""
    data = DigitsDataModule(batch_size=22, train_fraction=0.05, in_memory=True)
    data.setup("fit")
    images, labels = (torch.cat(part) for part in zip(*data.train_dataloader(), strict=True))
    teacher = FrozenTeacher(DigitsCNN(), checkpoint=ROOT / "configs" / "digits_teacher.safetensors")
    teacher.load()
    torch.manual_seed(0)
    student, distiller = DigitsCNN(channels=(4, 8), hidden=16), Distiller(teacher, temperature=4.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    teacher_logits, run = teacher.logits(images), []
    for step in range(STEPS):
        progress = Progress(step=step, max_steps=STEPS, epoch=step, max_epochs=STEPS)
        logits = student(images)
        run.append(Signals(logits.detach(), teacher_logits, labels, progress, extra={"source": labels}))
        optimizer.zero_grad()
        distiller(images, logits, labels, progress).loss.backward()
        optimizer.step()
    return run


def replay(policy: TemperaturePolicy, run: list[Signals]) -> list[Any]:
    """Return mean, minimum and maximum of student's and teacher's temperature in each step, for each loss term."""
    distiller = Distiller(None, temperature=policy, task_weight=0.0)
    groups = policy.param_groups()
    learner = torch.optim.SGD(groups, lr=0.05) if groups else None
    steps = []
    for seen in run:
        out = distiller(
            None,
            seen.student_logits,
            seen.targets,
            seen.progress,
            teacher_logits=seen.teacher_logits,
            extra=seen.extra,
        )
        if learner:
            learner.zero_grad()
            out.loss.backward()
            learner.step()
        steps.append([[(T.mean().item(), T.min().item(), T.max().item()) for T in t[:2]] for t in out.temperatures])
    return [tuple(zip(*term, strict=True)) for term in zip(*steps, strict=True)]


def rows() -> dict[str, list[tuple[str, str]]]:
    """Return the rows of the table of policies by name, as pairs of heading and cell."""
    lines = [line for line in (ROOT / "docs" / "policies.md").read_text().splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    headings = table[0]
    found = {}
    for cells in table[1:]:
        names = re.findall(r"`(\w+Temperature|LogitStandardization)`", cells[0])
        found |= {name: list(zip(headings[1:], cells[1:], strict=True)) for name in names}
    return found


def in_words(cell: str) -> str:
    """Return a cell as it reads without the table: the atlas's three counts as a sentence."""
    counts = re.fullmatch(r"(\d+)/(\d+)/(\d+)", cell)
    if counts is None:
        return cell
    better, alike, worse = counts.groups()
    page = "[the best constant temperature](atlas.md#policies-against-the-best-constant)"
    return f"against {page} reliably better in {better} settings, no reliable difference in {alike}, worse in {worse}"


def write(folder: Path) -> None:
    """Write the pages and their plots into a folder."""
    folder.mkdir(exist_ok=True)
    run, table = record(), rows()
    for name in EXAMPLES:
        plot_temperature_grid({name: replay(build(name), run)}).savefig(folder / f"{name}.png", dpi=110)
        facts = "\n".join(f"- **{heading}**: {in_words(cell)}" for heading, cell in table[name])
        facts = re.sub(r"\]\((?!http)", "](../", facts)
        example = yaml.safe_dump({"temperature": in_yaml(name)}, sort_keys=False, default_flow_style=None, width=100)
        page = PAGE.format(name=name, facts=facts, python=in_python(in_yaml(name)), yaml=example)
        (folder / f"{name}.md").write_text(page)
