"""What CapacityTemperature does for a student too small for its teacher, against constant T, on sklearn's digits.

    python benchmarks/capacity_temperature.py

One teacher (an MLP of 2 × 256 units) per seed; students of one hidden layer. All arms of a seed share the split, the
student's first weights and the order of the batches. Accuracy is that of the last epoch on a test part that decides
nothing. CPU, about two minutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from kd_lightning.functional import Temperature, kd_loss
from kd_lightning.temperature import CapacityTemperature, ConstantTemperature, Signals, TemperaturePolicy

BATCH_SIZE = 64
KD_WEIGHT, TASK_WEIGHT = 0.9, 0.1
Data = tuple[Tensor, Tensor, Tensor, Tensor]

ARMS: dict[str, Callable[[], TemperaturePolicy | None]] = {
    "no teacher": lambda: None,
    "T = 1": lambda: ConstantTemperature(1.0),
    "T = 2": lambda: ConstantTemperature(2.0),
    "T = 4": lambda: ConstantTemperature(4.0),
    "T = 8": lambda: ConstantTemperature(8.0),
    "capacity": lambda: CapacityTemperature(init_value=4.0, interval=50),
}


def digits(seed: int) -> Data:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.4, stratify=labels, random_state=seed)
    x_train, x_test, y_train, y_test = map(torch.as_tensor, parts)
    return x_train.float(), y_train, x_test.float(), y_test


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * (model(x).argmax(-1) == y).float().mean().item()


def train(
    model: nn.Module, data: Data, epochs: int, seed: int, teacher: nn.Module | None, policy: TemperaturePolicy | None
) -> list[tuple[float, float]]:
    """Train; returns (T, share that does not arrive) of each epoch's last step."""
    x, y, *_ = data
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order = torch.Generator().manual_seed(seed)
    trace: list[tuple[float, float]] = []
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=order).split(BATCH_SIZE):
            logits, targets = model(x[index]), y[index]
            loss = nn.functional.cross_entropy(logits, targets)
            if policy is not None and teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(x[index])
                temperature = policy(Signals(logits, teacher_logits, targets))
                assert isinstance(temperature, Temperature)
                loss = TASK_WEIGHT * loss + KD_WEIGHT * kd_loss(logits, teacher_logits, temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        if policy is not None and teacher is not None:
            with torch.no_grad():
                meter = CapacityTemperature(policy_value(policy), min_value=0.05, max_value=100.0)
                meter(Signals(model(x), teacher(x), y))
                trace.append((policy_value(policy), meter.ratio.item()))
    return trace


def policy_value(policy: TemperaturePolicy) -> float:
    return policy.value.item() if isinstance(policy, CapacityTemperature) else float(getattr(policy, "value", 0.0))


def mean_and_spread(values: list[float], sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} ± {spread:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--hidden", type=int, nargs="+", default=[6, 32], help="hidden units of the student")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # faster at this size
    results: dict[tuple[int, str], list[float]] = {}
    traces: dict[tuple[int, str], list[list[tuple[float, float]]]] = {}
    teachers = []
    for seed in range(arguments.seeds):
        data = digits(seed)
        torch.manual_seed(seed)
        teacher = mlp(64, 256, 256, 10)
        train(teacher, data, arguments.epochs, seed, None, None)
        teachers.append(accuracy(teacher, *data[2:]))
        for hidden in arguments.hidden:
            for name, build in ARMS.items():
                torch.manual_seed(1000 + seed)
                student = mlp(64, hidden, 10)
                trace = train(student, data, arguments.epochs, seed, teacher, build())
                results.setdefault((hidden, name), []).append(accuracy(student, *data[2:]))
                traces.setdefault((hidden, name), []).append(trace)

    print(f"teacher: {statistics.mean(teachers):.2f} % test accuracy, {arguments.seeds} seeds")
    print(
        f"{'hidden':>6} {'arm':>10}  {'accuracy (%)':>14} {'less T = 4 (paired)':>20}   T at 1/6, 1/2, end   "
        "share missed at 1/6, 1/2, end"
    )
    for (hidden, name), values in results.items():
        gains = [ours - theirs for ours, theirs in zip(values, results[hidden, "T = 4"], strict=True)]
        line = f"{hidden:6d} {name:>10}  {mean_and_spread(values):>14} {mean_and_spread(gains, '+'):>20}"
        if traces[hidden, name][0]:
            at = [arguments.epochs // 6, arguments.epochs // 2, arguments.epochs]
            columns = []
            for column in (0, 1):
                per_time = [[run[epoch - 1][column] for run in traces[hidden, name]] for epoch in at]
                columns.append(", ".join(f"{statistics.mean(seeds):5.2f}" for seeds in per_time))
            line += f"   {columns[0]:>19}   {columns[1]}"
        print(line)


if __name__ == "__main__":
    main()
