"""Time and memory of the losses, forward and backward, beside the formulas of other libraries, in one run.

    python benchmarks/loss.py                    # everything: about ten minutes on two cores
    python benchmarks/loss.py --cases kl --quick # the small shapes

Ratios are to the first variant of a case (the form that most libraries use). "copies" is the peak of extra memory in
units of one tensor of logits; "error" the relative error of the student's gradient against float64. Prints a table;
writes ``out/loss.csv`` and ``out/loss.png`` beside this file.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure
import peers
import torch
from torch import Tensor

from kd_lightning import functional
from kd_lightning.functional import Temperature, rows_fast

OUT = Path(__file__).parent / "out"
SMALL = [(128, 100), (256, 1000)]
LARGE = [(64, 21841), (2048, 32000), (1024, 151936)]
T = 4.0

Loss = Callable[..., Tensor]


class Row(NamedTuple):
    """One line of the table."""

    case: str
    shape: str
    dtype: str
    variant: str
    milliseconds: float
    ratio: float
    copies: float
    error: float


class Floor(torch.autograd.Function):
    """A gradient that is there already: what autograd itself costs."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, ready: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ready = ready
        return s.new_zeros(())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.ready, None


def kl(s: Tensor, t: Tensor, compiled: Callable[[Loss], Loss]) -> dict[str, Loss]:
    temperature, ready = torch.tensor(T, device=s.device), torch.zeros_like(s)
    targets = torch.randint(s.shape[1], s.shape[:1], device=s.device)
    variants: dict[str, Loss] = {
        "peers: mdistiller, torchdistill": lambda s, t: peers.kd_batchmean(s, t, T),
        "peer: DistillKit": lambda s, t: peers.kd_log_space(s, t, T),
        "peer: torchtune, 8 chunks": lambda s, t: peers.kd_chunked(s, t, T),
        "ours": lambda s, t: functional.kd_loss(s, t, temperature),
        "ours, with targets": lambda s, t: functional.kd_loss(s, t, temperature, targets=targets),
        "ours, weight .9": lambda s, t: 0.9 * functional.kd_loss(s, t, temperature),
        "floor: a ready gradient": lambda s, t: Floor.apply(s, ready),  # pyright: ignore[reportReturnType]
    }
    compile_kl = compiled(functional.kd_loss)
    variants["ours, compiled"] = lambda s, t: compile_kl(s, t, T)  # T as the peers have it: a number
    compile_nothing = compiled(lambda s, t: (s * 0).sum())
    variants["floor, compiled: (s · 0).sum()"] = lambda s, t: compile_nothing(s, t)
    compile_peer = compiled(peers.kd_batchmean)
    variants["peers: mdistiller, compiled"] = lambda s, t: compile_peer(s, t, T)
    return variants


def learnt(s: Tensor, t: Tensor, compiled: Callable[[Loss], Loss]) -> dict[str, Loss]:
    raw = torch.tensor([1.0], device=s.device, requires_grad=True)

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return functional.kd_loss(s, t, 1 + 20 * raw.sigmoid())

    return {
        "peer: CTKD": lambda s, t: peers.learnable_temperature(s, t, raw),
        "ours": ours,
        "ours, compiled": compiled(ours),
    }


def dkd(s: Tensor, t: Tensor, compiled: Callable[[Loss], Loss]) -> dict[str, Loss]:
    targets, temperature = torch.randint(s.shape[1], s.shape[:1], device=s.device), torch.tensor(T, device=s.device)

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return functional.dkd_loss(s, t, temperature, targets=targets)

    return {
        "peer: DKD, mdistiller": lambda s, t: peers.dkd(s, t, T, targets),
        "ours": ours,
        "ours, compiled": compiled(ours),
    }


def jsd(s: Tensor, t: Tensor, compiled: Callable[[Loss], Loss]) -> dict[str, Loss]:
    temperature = torch.tensor(T, device=s.device)

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return functional.jsd_loss(s, t, temperature, scale="none")

    return {
        "peer: TRL": lambda s, t: peers.generalised_jsd(s, t, T),
        "ours": ours,
        "ours, compiled": compiled(ours),
    }


def z_score(s: Tensor, t: Tensor, compiled: Callable[[Loss], Loss]) -> dict[str, Loss]:
    scale = torch.tensor(T * T, device=s.device)

    def ours(s: Tensor, t: Tensor) -> Tensor:
        spread = (T * (z.detach().float().std(-1, keepdim=True) + 1e-7) for z in (s, t))
        return functional.kd_loss(s, t, Temperature(*spread, scale=scale))

    return {
        "peer: logit standardisation": lambda s, t: peers.z_score(s, t, T),
        "ours, T per sample, detached": ours,
        "ours, compiled": compiled(ours),
    }


CASES: dict[str, tuple[Any, list[tuple[int, int]]]] = {
    "kl": (kl, SMALL + LARGE),
    "learnt T": (learnt, [*SMALL, (64, 21841)]),
    "dkd": (dkd, [*SMALL, (64, 21841)]),
    "jsd": (jsd, [(256, 1000), (64, 21841)]),
    "z-score": (z_score, [(256, 1000)]),
}


def logit_rows(case: str, shape: tuple[int, int], dtype: torch.dtype, options: Any) -> Iterator[Row]:
    build, _ = CASES[case]
    torch.manual_seed(0)
    torch._dynamo.reset()
    s = (torch.randn(shape, device=options.device) * 3).to(dtype).requires_grad_()
    t = (torch.randn(shape, device=options.device) * 3).to(dtype)
    compiled: Any = (lambda f: torch.compile(f, dynamic=False)) if options.compile else (lambda f: None)
    losses = build(s, t, compiled)
    if not options.compile:
        losses = {name: loss for name, loss in losses.items() if "compiled" not in name}

    def step(loss: Loss) -> Callable[[], None]:
        def run() -> None:
            s.grad = None
            loss(s, t).backward()

        return run

    steps = {name: step(loss) for name, loss in losses.items()}
    times = measure.interleaved_times(steps, options.seconds, options.device)
    first = next(iter(times))
    exact = _exact_gradient(losses[first], s, t) if s.numel() < 2**23 else None
    for name, seconds in times.items():
        copies = measure.peak_bytes(steps[name], options.device) / (s.numel() * s.element_size())
        error = float("nan")
        if exact is not None and "floor" not in name and "weight" not in name and case != "z-score":
            steps[name]()
            assert s.grad is not None
            reference = exact if "torchtune" not in name else exact / T**2  # it has no T²
            error = ((s.grad.double() - reference).norm() / reference.norm()).item()
        s.grad = None
        yield Row(case, str(shape), _short(dtype), name, 1e3 * seconds, seconds / times[first], copies, error)


def _exact_gradient(loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    wide = s.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(wide, t.double()), wide)
    return gradient


def fused_rows(rows: int, classes: int, options: Any, width: int = 256) -> Iterator[Row]:
    torch.manual_seed(0)
    h, w, ht, wt = (torch.randn(n, width, device=options.device) * 0.3 for n in (rows, classes, rows, classes))
    h.requires_grad_()
    w.requires_grad_()

    def matrix_products() -> None:
        with torch.no_grad():
            for i in range(0, rows, 256):
                part, teacher_part = h[i : i + 256], ht[i : i + 256]
                s = torch.nn.functional.linear(part, w)
                torch.nn.functional.linear(teacher_part, wt)
                _ = s @ w, s.t() @ part

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            h.grad = w.grad = None
            loss().backward()

        return run

    chunked: Any = peers.LinearChunked.apply
    steps: dict[str, Callable[[], None]] = {
        "peers: all logits at once": step(lambda: peers.linear_full(h, w, ht, wt, T)),
        "peer: Liger, 256 rows": step(lambda: chunked(h, w, ht, wt, T, 256)),
        "peer: torchtune, 8 chunks": step(lambda: peers.linear_chunked_outputs(h, w, ht, wt, T)),
        "floor: the four matrix products": matrix_products,
    }
    for chunk in (128, 256, 512):

        def ours(chunk: int = chunk) -> Tensor:
            return functional.fused_linear_kd_loss(h, w, ht, wt, T, chunk_size=chunk)

        steps[f"ours, {chunk} rows"] = step(ours)
    times = measure.interleaved_times(steps, options.seconds, options.device, least=3)
    first = next(iter(times))
    shape = f"({rows}, {width}) → {classes}"
    for name, seconds in times.items():
        copies = measure.peak_bytes(steps[name], options.device) / (4 * rows * classes)
        yield Row("fused linear", shape, "float32", name, 1e3 * seconds, seconds / times[first], copies, float("nan"))
    h.grad = w.grad = None


def chunk_rows(options: Any) -> Iterator[Row]:
    """How ``rows_fast.CHUNK_CPU`` was chosen."""
    name = "CHUNK_CPU" if options.device == "cpu" else "CHUNK_ACCELERATOR"
    kept = getattr(rows_fast, name)
    for shape in (*SMALL[1:], *LARGE[:2]):
        s, t = torch.randn(shape, device=options.device).requires_grad_(), torch.randn(shape, device=options.device)

        def step(size: int | None, s: Tensor = s, t: Tensor = t) -> Callable[[], None]:
            def run() -> None:
                s.grad = None
                setattr(rows_fast, name, size or kept)
                (peers.kd_batchmean(s, t, T) if size is None else functional.kd_loss(s, t, T)).backward()

            return run

        steps = {"peers: mdistiller, torchdistill": step(None)}
        steps |= {
            f"2^{power}": step(2**power) for power in (range(15, 21) if options.device == "cpu" else range(18, 27))
        }
        times = measure.interleaved_times(steps, options.seconds, options.device)
        for variant, seconds in times.items():
            ratio = seconds / next(iter(times.values()))
            yield Row("chunks", str(shape), "float32", variant, 1e3 * seconds, ratio, float("nan"), float("nan"))
        setattr(rows_fast, name, kept)


def rows_of(options: Any) -> Iterator[Row]:
    if options.chunks:
        yield from chunk_rows(options)
        return
    for case, (_, shapes) in CASES.items():
        if options.cases and case not in options.cases:
            continue
        for shape in shapes:
            if options.quick and shape not in SMALL:
                continue
            for dtype in (torch.float32, torch.bfloat16) if case == "kl" else (torch.float32,):
                yield from logit_rows(case, shape, dtype, options)
    if not options.quick and (not options.cases or "fused" in options.cases):
        yield from fused_rows(2048, 32000, options)
        yield from fused_rows(512, 151936, options)


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row.case, row.shape, row.dtype) for row in rows))
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(8, 1 + 1.6 * len(groups)), sharex=True, squeeze=False)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        members = [row for row in rows if (row.case, row.shape, row.dtype) == group and row.ratio < 3]
        colours = ["#d1495b" if row.variant.startswith("ours") else "#9aa5b1" for row in members]
        axis.barh([row.variant for row in members], [row.ratio for row in members], color=colours)
        axis.set_title(" · ".join(group), fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.axvline(1, color="black", linewidth=0.5)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("time, forward and backward, over the first variant")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="least time per case, shape and dtype")
    parser.add_argument("--cases", nargs="*", help=f"among {', '.join(CASES)}, fused")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--chunks", action="store_true", help="sweep the size of a chunk instead")
    options = parser.parse_args()
    measure.check_device(parser, options.device)
    torch.set_num_threads(options.threads)
    OUT.mkdir(exist_ok=True)
    print(measure.machine(options.device))
    rows: list[Row] = []
    for row in rows_of(options):
        rows.append(row)
        print(
            f"{row.case:12} {row.shape:22} {row.dtype:9} {row.variant:34} {row.milliseconds:9.3f} ms "
            f"{row.ratio:6.2f}× {row.copies:6.2f} copies  error {row.error:.1e}",
            flush=True,
        )
    with (OUT / "loss.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    plot(rows, OUT / "loss.png")


if __name__ == "__main__":
    main()
