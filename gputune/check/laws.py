"""What must hold on every device, as one list: ``gputune check`` runs it, and so do the tests.

Part of it are drills: trials diverge, memory runs out, a step cannot be recorded.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer
from torch import nn
from torch.nn import functional

from gputune.check.members import Case, difference, from_eager, from_plain_loop, scoring_of
from gputune.data.dataset import Dataset
from gputune.engine.job import Job, Outcome, Progress
from gputune.engine.kernel import KernelChunk
from gputune.engine.memory import run_in_parts
from gputune.hypergradients.hypergradient import Mode, hypergradient
from gputune.modules.recorder import RECORDERS, Replays
from gputune.population.population import Population
from gputune.scoring.estimators import fitted
from gputune.scoring.scores import OF_TASK
from gputune.solver.solve import solve_all, solved_module
from gputune.types import Backend

_LIMIT = 64 << 20  # bytes of a GPU beyond those that are taken
_WILD = 1e300  # a learning rate
_SINGLE = 2  # trials that fit where the limit is played


def leave(device: torch.device, backend: Backend) -> float:
    """Members beside some that diverge, from the same members without them."""
    calm = ({"lr": 0.01}, {"lr": 0.003}, {"lr": 0.001})
    shared = {"optimizer": "sgd", "momentum": 0.9}
    wild = ({"lr": _WILD}, *calm, {"lr": _WILD})
    ((_, expected),) = Case(calm, shared).trained(device, backend)
    case = Case(wild, shared)
    ((_, trained),) = case.trained(device, backend, scoring_of(case, "neg_log_loss"))
    if trained.alive != (1, 2, 3):
        raise RuntimeError(f"trials (1, 2, 3) should stay, but {trained.alive} did")
    return difference(trained.flat, expected.flat)


@dataclass(frozen=True)
class _SmallMemory(Job):
    """A CPU, whose memory no program limits, that holds a few trials."""

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> Outcome:
        """Train one chunk, if it fits."""
        if len(chunk.index) > _SINGLE:
            raise MemoryError("so many trials do not fit")
        return super().run(data, chunk, progress)


def run_out_of_memory(device: torch.device, backend: Backend) -> float:
    """Scores of trials that memory does not hold at once, from those of the same trials with all of it."""
    # 48 of width 128 take 80 MB for parameters, gradients and moments, in double precision.
    trials, width = (6, 8) if device.type == "cpu" else (48, 128)
    rates = tuple({"lr": 10**-power} for power in np.linspace(2, 4, trials).tolist())
    case = Case(rates, {"width": width}, epochs=2)
    data = case.data(device)
    (chunk,) = case.chunks(data)
    job = case.job(backend, scoring_of(case, "neg_log_loss"))
    # What libraries take at their first call is not of this chunk.
    expected = job.run(data, chunk).curves
    small = _SmallMemory if device.type == "cpu" else Job
    job = small(**{name: getattr(job, name) for name in ("seed", "epochs", "horizon", "backend", "scoring")})
    with ExitStack() as limits:
        if device.type == "cuda":  # so much, beyond what its tensors take
            torch.cuda.empty_cache()
            taken, (_, whole) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
            limits.callback(torch.cuda.set_per_process_memory_fraction, 1.0, device)
            torch.cuda.set_per_process_memory_fraction((taken + _LIMIT) / whole, device)
        outcomes = run_in_parts(job, data, chunk)
    if not job.fits.trials:
        raise RuntimeError("memory did not run out")
    curves = np.full_like(expected, np.nan)
    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise outcome.error()
        curves[list(outcome.index)] = outcome.curves
    return difference(torch.from_numpy(curves), torch.from_numpy(expected))


def recording_fails(device: torch.device, _backend: Backend) -> float:
    """How many steps were lost or taken twice, of steps that read a number and can therefore not be recorded."""
    total = torch.zeros((), device=device)

    def step() -> None:
        total.add_(1)
        total.item()

    expected = Counter[Hashable]({"step": 100})
    steps = Replays(RECORDERS[device.type](device), expected, lambda: [total], 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it says so
        for _ in range(12):
            steps.take("step", step)
    if steps.steps:
        raise RuntimeError("a step that reads a number was recorded")
    return abs(float(total) - 12)


EXACT, ROUNDED = 1e-10, 1e-4
"""Largest differences allowed in double and in single precision, after at most 50 steps."""

Measure = Callable[[torch.device, Backend], float]
"""Returns the largest difference of what a device computes from what is right, as a share of the largest number."""


@dataclass(frozen=True)
class Law:
    """What must hold: ``measure`` returns at most ``allowed``, with every one of ``backends`` that a device has.

    ``backends`` () is of what no backend trains; its measure is asked once, as "eager".
    """

    name: str
    measure: Measure
    allowed: float = EXACT
    backends: tuple[Backend, ...] = ("eager", "graph", "compiled")
    gpus: int = 0  # that it needs


_SIZES = (
    {"width": 16, "batch_size": 9, "lr": 0.01},
    {"width": 12, "batch_size": 11, "lr": 0.003},
    {"width": 9, "batch_size": 16, "lr": 0.01},
)
_RATES = ({"lr": 0.01}, {"lr": 0.003}, {"lr": 0.001})

CASES: Mapping[str, Case] = {
    "sgd": Case(_SIZES, {"optimizer": "sgd", "weight_decay": 0.01}),
    "sgd with momentum": Case(_SIZES, {"optimizer": "sgd", "momentum": 0.9}),
    "nesterov": Case(_SIZES, {"optimizer": "nesterov", "weight_decay": 0.01}),
    "adam": Case(_SIZES, {"optimizer": "adam", "weight_decay": 0.01}),
    "adamw": Case(_SIZES, {"weight_decay": 0.1}),
    "one batch size": Case(_RATES),
    "gelu": Case(_SIZES, {"activation": "gelu"}),
    "silu": Case(_SIZES, {"activation": "silu", "depth": 3}),
    "tanh": Case(_SIZES, {"activation": "tanh", "depth": 1}),
    "dropout": Case(tuple({**config, "dropout": 0.2} for config in _SIZES)),
    "cosine schedule": Case((*_RATES, {"lr": 0.01, "batch_size": 13}), {"schedule": "cosine"}),
    "weights": Case(_SIZES, weights=True),
    "a class that a fold lacks": Case(_SIZES, absent=True),
    "regression": Case(_SIZES, task="regression", weights=True),
}
"""Members of the built-in MLP that a plain loop can train too."""

_ROUNDED = Case(  # no kink that rounding could cross
    tuple({**config, "lr": 0.001} for config in _SIZES), {"activation": "tanh"}, dtype=torch.float32
)
_MODULE = Case(_RATES, module=True)


def _scores(device: torch.device, backend: Backend) -> float:
    """Scores of the last epoch from those of scikit-learn's scorers on the members' own outputs."""
    worst = []
    for task in ("multiclass", "regression"):
        case = Case(_SIZES, task=task, epochs=2)
        data = case.data(torch.device("cpu"))
        classes = None if task == "regression" else np.arange(data.n_outputs)
        for name in OF_TASK[task]:
            scorer = get_scorer(name)
            for chunk, trained in case.trained(device, backend, scoring_of(case, name)):
                for f, fold in enumerate(data.folds):
                    y, nothing = data.target[fold.valid].numpy(), np.zeros((len(fold.valid), 1))
                    for c in range(len(chunk.index)):
                        outputs = trained.member(f, c)(data.x[f, fold.valid]).detach()
                        answers = data.in_units(f, outputs)
                        expected = scorer(fitted(answers, classes, nothing, nothing), nothing, y)
                        worst.append(abs(trained.curves[c, -1, f] - expected) / max(1, abs(expected)))
    return float(np.max(worst))


def _solver_difference(device: torch.device, _backend: Backend) -> float:
    """Class chances of the solved logistic regression from scikit-learn's, which ends with a residual of 1e-12."""
    case, worst = Case(({"C": 0.1}, {"C": 2.0})), []
    data, configs = case.data(torch.device("cpu")), case.complete()
    solution = solve_all(case.data(device), configs)
    for f, fold in enumerate(data.folds):
        x = data.x[f].numpy()
        for c, config in enumerate(configs):
            plain = LogisticRegression(C=config["C"], tol=1e-12, max_iter=10_000)
            plain.fit(x[fold.train], data.y[fold.train].numpy())
            chances = solved_module(solution, f * len(configs) + c)(data.x[f]).softmax(-1).detach().numpy()
            worst.append(np.abs(chances - plain.predict_proba(x)).max())
    return float(np.max(worst))


def _hypergradient(mode: Mode, other: Mode, device: torch.device, _backend: Backend) -> float:
    """The derivative in learning rate and weight decay by two modes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64).to(device)
    y = torch.randint(3, (40,), generator=generator).to(device)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    run = partial(hypergradient, module, functional.cross_entropy, batches, (x[32:], y[32:]), optimizer="adamw", seed=0)
    values = {"lr": 0.1, "weight_decay": 0.01}
    found = [run(hyperparameters=values, mode=each).gradient for each in (mode, other)]
    return difference(*(torch.stack([slopes[name] for name in values]) for slopes in found))


def _by_kernel(case: Case, device: torch.device, backend: Backend) -> float:
    """Members from the plain loop. Raises NotBuiltError where the kernel cannot be compiled, and others would train."""
    data, job = case.data(device), case.job(backend)
    for chunk in case.chunks(data):
        KernelChunk(job.network(data, chunk), data, chunk.configs, seed=0, horizon=1, scoring=None)
    return from_plain_loop(case, device, backend)


def _second_gpu(device: torch.device, backend: Backend) -> float:
    """Members on each of the other GPUs from the plain loop."""
    others = (torch.device("cuda", i) for i in range(torch.cuda.device_count()) if i != (device.index or 0))
    return max((from_plain_loop(CASES["adamw"], other, backend) for other in others), default=0.0)


LAWS: tuple[Law, ...] = (
    *(Law(f"members equal the plain loop: {name}", partial(from_plain_loop, case)) for name, case in CASES.items()),
    Law("float32 against the plain loop in float64", partial(from_plain_loop, _ROUNDED), ROUNDED),
    Law("the kernel's members equal the loop's", partial(_by_kernel, _ROUNDED), ROUNDED, ("kernel",)),
    Law("a module equals the plain loop", partial(from_plain_loop, _MODULE), backends=("eager", "graph")),
    *(
        Law(f"recorded equals eager: {name}", partial(from_eager, CASES[name]), backends=("graph",))
        for name in ("adamw", "one batch size", "dropout", "cosine schedule")
    ),
    Law("recorded equals eager: a module", partial(from_eager, _MODULE), backends=("graph",)),
    Law("scores equal scikit-learn's", _scores),
    Law("the solved logistic regression equals scikit-learn's", _solver_difference, 1e-6, ()),
    Law("hypergradient: reverse equals forward", partial(_hypergradient, "reverse", "forward"), backends=()),
    Law("hypergradient: reverse equals finite differences", partial(_hypergradient, "reverse", "fd"), 1e-5, ()),
    Law("members that leave change nothing", leave),
    Law("memory that runs out halves the chunk", run_out_of_memory),
    Law("the other GPUs give the same", _second_gpu, backends=("eager", "graph"), gpus=2),
    # The last one: after a capture that failed PyTorch < 2.13 records nothing any more.
    Law("a recording that fails falls back", recording_fails, 0.0, ("graph",)),
)
"""What holds on every device, in the order in which it is checked."""
