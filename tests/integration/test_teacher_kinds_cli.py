"""Each kind of teacher from YAML, by its short class name."""

from __future__ import annotations

import pytest
import yaml

import kd_lightning.models  # as the command does, for short names
import kd_lightning.teachers
from kd_lightning import DistillationModule
from kd_lightning.callbacks import DistillationCallback
from tests.helpers import from_yaml

KINDS = {
    "FunctionTeacher": "{class_path: FunctionTeacher, init_args: {fn: torch.nn.functional.relu, output: probs}}",
    "OnnxTeacher": "{class_path: OnnxTeacher, init_args: {path: teacher.onnx, temperature: 2.0}}",
    "BatchTeacher": "batch:teacher_logits",
    "BatchTeacher with options": "{class_path: BatchTeacher, init_args: {key: t, output: log_probs, temperature: 2.0}}",
    "EMATeacher": "{class_path: EMATeacher, init_args: {decay: 0.99, temperature: {class_path: LinearSchedule, "
    "init_args: {init_value: 4.0, end_value: 1.0}}}}",
    "FrozenTeacher": "{class_path: FrozenTeacher, init_args: {module: {class_path: DigitsCNN}, fingerprint: v1, "
    "checkpoint: teacher.pt, transform: {class_path: Renormalize, init_args: {student_mean: [0.5], student_std: [0.5], "
    "teacher_mean: [0.3], teacher_std: [0.2], size: 16}}}}",
    "FrozenTeacher on the host": "{class_path: FrozenTeacher, init_args: {module: {class_path: DigitsCNN}, "
    "checkpoint: teacher.pt, placement: offload_whole}}",
    "FrozenTeacher at a place of one's own": "{class_path: FrozenTeacher, init_args: {module: {class_path: DigitsCNN}, "
    "checkpoint: teacher.pt, placement: {class_path: kd_lightning.teachers.Placement}}}",
    "FunctionTeacher with transform": "{class_path: FunctionTeacher, init_args: {fn: torch.nn.functional.relu, "
    "transform: torch.nn.functional.tanh}}",
    "MappedClasses": "{class_path: MappedClasses, init_args: {teacher: {class_path: OnnxTeacher, init_args: {path: "
    "teacher.onnx}}, classes: [[3, 4], 17]}}",
    "MappedClasses with unknown ones": "{class_path: MappedClasses, init_args: {teacher: 'batch:t', classes: [3, null, "
    "[4, 5]]}}",
    "ServedTeacher": "{class_path: ServedTeacher, init_args: {url: 'http://localhost:8000/v1', model: tiny, top_k: 4, "
    "api: sglang, tail: uniform, api_key_env: TINY_KEY}}",
    "LogitsFile": "{class_path: LogitsFile, init_args: {path: [one.npy, two.npy], key: idx}}",
    "TeacherEnsemble": "{class_path: TeacherEnsemble, init_args: {teachers: ['batch:a', {class_path: OnnxTeacher, "
    "init_args: {path: teacher.onnx}}]}}",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("owner", [DistillationModule, DistillationCallback])
def test_kinds_by_short_name(kind: str, owner: type) -> None:
    teacher = from_yaml(owner, {"teacher": yaml.safe_load(KINDS[kind])}).teacher
    assert type(teacher) is getattr(kd_lightning.teachers, kind.split()[0])
