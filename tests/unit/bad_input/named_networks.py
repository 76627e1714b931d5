"""Factories of `build_model` that build no network."""

from kd_lightning.models import build_model
from tests.unit.bad_input.case import Case

STANDARD = (
    "{} is of Python's standard library, which builds no network, and was not looked up. Name a torch.nn.Module class, "
    "or a function that is annotated as returning one."
)
NEITHER = (
    "{} is neither a torch.nn.Module class nor annotated as returning one, and was not called. Annotate it with "
    "`-> nn.Module`, or name a function of your own that is annotated and calls it."
)
DOTTED = (
    "factory must be a dotted path such as 'torchvision.models.resnet18', got {!r}. Put the module's name in front of "
    "the function's."
)


def case(factory: str, error: type[Exception], message: str) -> Case:
    return Case(f"factory {factory!r}", lambda: build_model(factory), error, message.format(factory))


CASES = [
    *(case(factory, TypeError, STANDARD) for factory in ("os.system", "subprocess.Popen", "builtins.eval", "pdb.run")),
    *(case(factory, TypeError, NEITHER) for factory in ("torch.os.system", "torch.load", "torch.optim.SGD")),
    case("lightning.pytorch.LightningModule.load_from_checkpoint", TypeError, NEITHER),
    *(case(factory, ValueError, DOTTED) for factory in ("resnet18", "", "torchvision.", "my net.Net")),
    case("torch.nn", TypeError, "torch.nn is a module: name a function or class that builds a network."),
    case(
        "torch.__version__",
        TypeError,
        "torch.__version__ is a TorchVersion: name a function or class that builds a network.",
    ),
    case(
        "nowhere.Net",
        ImportError,
        "Looked for nowhere.Net: there is no module 'nowhere' in this environment. Install its package, correct the "
        "spelling, or start where its file is.",
    ),
    case(
        "torch.nn.Linaer",
        ImportError,
        "Looked for torch.nn.Linaer: torch.nn has no 'Linaer'. Close matches: Linear, LazyLinear.",
    ),
]
