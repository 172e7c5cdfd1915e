"""The command line: one subcommand per verb, no logic.

Exit codes are those of `fraqat --help`; 130 (Ctrl-C) and 143 (SIGTERM) come after a checkpoint.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fraqat import __version__, workflows
from fraqat.config import METHODS, Recipe, load_recipe, recipe_names
from fraqat.data.bad_samples import SkippedSamplesWarning
from fraqat.data.encoded import DamagedShardWarning
from fraqat.data.worker_watch import WorkerRestartWarning
from fraqat.distill import is_first_process
from fraqat.errors import FraqatError, VerificationError, config_error
from fraqat.export import TARGETS
from fraqat.planning import DEVICES, THIS_MACHINE, PlanOptions, Sharding
from fraqat.printable import printable
from fraqat.table import Table
from fraqat.workflows import AnalysisKind, RunFolder
from fraqat.workflows.comparing import DEFAULT_METHODS, CompareOptions
from fraqat.workflows.console import ConsoleProgress, print_table
from fraqat.workflows.verifying import NUM_BATCHES

_CTRL_C = 130
_SHOWN_WARNINGS = (SkippedSamplesWarning, DamagedShardWarning, WorkerRestartWarning)
app = typer.Typer(
    name="fraqat",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Quantization-aware training of generative models by fractional bit widths, down to 4-bit weights and 8-bit "
    "activations. Start with [bold]fraqat demo[/bold].",
    epilog="Exit codes: 0 done, 1 our own error, 2 impossible recipe or argument, 3 model, data, run or export "
    "missing, damaged or unsafe, 4 checkpoint damaged or of another run, 5 loss not finite, 6 place not writable or "
    "taken, 7 export not within its bound, 8 out of memory, 9 run stalled, 10 its process is gone, 130 Ctrl-C, 143 SIGTERM.",
)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)
_output = Console(highlight=False)
_shown = ExitStack()
"""What is drawn live; `main` ends it before it says how a command ended."""

RecipeArgument = Annotated[
    str, typer.Argument(help="YAML file, or a recipe of the package: " + ", ".join(recipe_names()))
]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print tables as JSON")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there")]
WidthOption = Annotated[
    float | None,
    typer.Option("--bits", help="Which of the widths of schedule.kind: several, instead of the final one"),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress")]


class FloatPrecision(StrEnum):
    """Choices of `--float-dtype`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder; what is finished there is not done again")] = Path("runs/demo"),
    settings: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize the embedded text-to-image pipeline with FraQAT, compare, export and write a page. Minutes on two cores."""
    tables, page = workflows.demo(out, _progress(quiet), tuple(settings or ()))
    _print_tables(tables, as_json, page=str(page))
    if not as_json:
        _output.print(f"Page: {printable(str(page), '')}", markup=False)


@app.command()
def train(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; the same recipe and folder go on where they stopped")
    ] = None,
    settings: SetOption = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Train the recipe's baselines too")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, the stages and the layers, train nothing")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a recipe in a run folder, or go on with it."""
    resolved = load_recipe(recipe, tuple(settings or ()))
    if dry_run:
        _print_dry_run(resolved, as_json)
        return
    if out is None:
        raise typer.BadParameter("is needed, unless with --dry-run", param_hint="--out")
    run = workflows.train(resolved, out, _progress(quiet), with_baselines=baselines)
    if is_first_process():
        _print_tables([_result_table(run)], as_json)


@app.command()
def status(run: RunArgument, as_json: JsonOption = False) -> None:
    """Say whether a run lives: step, time left, last checkpoint. Exit code 9 if it is stalled, 10 if its process is gone."""
    found = workflows.status(RunFolder.open(run))
    _print_tables([found.to_table()], as_json)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@app.command()
def compare(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="Folder of the comparison; what is finished there is not done again")],
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated, of the recipe's baselines and: " + ", ".join(METHODS)),
    ] = ",".join(DEFAULT_METHODS),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method")] = 3,
    rates: Annotated[
        str | None,
        typer.Option(help="Comma-separated learning rates that every method is tried at; default: around the recipe's"),
    ] = None,
    quality: Annotated[bool, typer.Option("--quality", help="Also sample from every student and judge it")] = False,
    settings: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare methods over seeds: same data and steps, each method at its own best learning rate."""
    options = CompareOptions(
        methods=tuple(name.strip() for name in methods.split(",")),
        num_seeds=seeds,
        rates=_numbers("--rates", rates),
        measures_quality=quality,
    )
    found = workflows.compare(load_recipe(recipe, tuple(settings or ())), out, options, _progress(quiet))
    _print_tables([found.rates_table(), found.to_table()], as_json)


@app.command()
def analyze(
    recipe: RecipeArgument,
    what: Annotated[
        AnalysisKind,
        typer.Option(
            help="Loss over widths; outliers of inputs and weights; loss with each layer quantized alone and left out; "
            "loss with each layer alone at several widths"
        ),
    ],
    bits: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated widths, with --what bits (default: 8 to 2 with the fractional ones) and layer-widths"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables, drawings and a page; RUN/analysis adds them to the report of RUN"),
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what quantization does to a recipe's model before anything is trained."""
    tables = workflows.analyze(
        load_recipe(recipe, tuple(settings or ())),
        what,
        _progress(quiet),
        bits=None if bits is None else _numbers("--bits", bits),
        folder=out,
        overwrite=overwrite,
    )
    _print_tables(tables, as_json)


@app.command()
def plan(
    recipe: RecipeArgument,
    device: Annotated[str, typer.Option(help="One of: " + ", ".join((*DEVICES, THIS_MACHINE)))] = "H100",
    num_devices: Annotated[int, typer.Option(help="Devices that share a batch")] = 1,
    sharding: Annotated[Sharding | None, typer.Option(help="How they share it; fsdp for more than one device")] = None,
    pretraining_tokens: Annotated[
        float | None,
        typer.Option(help="Tokens that the original model was trained on: predicts the best length of the run"),
    ] = None,
    memory_budget: Annotated[
        float | None, typer.Option(metavar="GIB", help="For the exported model: chooses the width of the weights")
    ] = None,
    pilot: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="Finished short run of the recipe, two or more: predicts the loss of this length"
        ),
    ] = None,
    target_loss: Annotated[
        float | None, typer.Option(help="Held-out distillation loss: predicts the steps that it needs, from the pilots")
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe needs before anything is downloaded or rented: memory, time, size of the result, length, width."""
    options = PlanOptions(
        num_devices=num_devices,
        sharding=sharding or (Sharding.NONE if num_devices == 1 else Sharding.FSDP),
    )
    questions = workflows.ComputeQuestions(pretraining_tokens, memory_budget, tuple(pilot or ()), target_loss)
    resolved = load_recipe(recipe, tuple(settings or ()))
    tables = [*workflows.plan_tables(resolved, device, options, questions), workflows.chosen_widths_table(resolved)]
    _print_tables([table for table in tables if table is not None], as_json)


@app.command()
def evaluate(
    run: RunArgument,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples", "--num-images", help="Held-out samples per model, instead of the recipe's number"
        ),
    ] = None,
    bits: WidthOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare original, baselines and student on the same prompts and seeds."""
    table = workflows.evaluate(
        RunFolder.open(run), _progress(quiet), bits=bits, num_samples=num_samples, overwrite=overwrite
    )
    _print_tables([table], as_json)


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(help="Folder of a run or of a packed export")],
    prompt: Annotated[list[str], typer.Option(help="Prompt; repeat for more")],
    out: Annotated[Path, typer.Option(help="PNG, TXT or WAV file for one prompt, folder for more")],
    seed: Annotated[int, typer.Option(help="Seed of the first one")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampler steps, instead of the recipe's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, instead of the recipe's")] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make images, texts or speech with the student of a run, or with an exported file."""
    changes = {"sampler": {"num_steps": steps, "guidance_scale": guidance}}
    paths = workflows.generate(
        source, tuple(prompt), out, _progress(quiet), seed=seed, changes=changes, overwrite=overwrite
    )
    for path in paths:
        _output.print(printable(str(path), ""), markup=False)


@app.command()
def export(
    run: RunArgument,
    target: Annotated[str, typer.Option("--format", help="Target, one of: " + ", ".join(TARGETS))] = "packed",
    float_dtype: Annotated[FloatPrecision, typer.Option(help="Precision of what is not quantized")] = (
        FloatPrecision.FLOAT32
    ),
    bits: WidthOption = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Quantize the trained weights anew where the target has another grid")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the trained student as files for a target, in RUN/export/TARGET, with --bits in RUN/export/TARGET-N-bits."""
    done = workflows.export(
        RunFolder.open(run),
        target,
        _progress(quiet),
        bits=bits,
        float_dtype=float_dtype.value,
        accept_loss=accept_loss,
        overwrite=overwrite,
    )
    row = (str(done.folder), done.num_bytes, done.num_quantized_weights, done.bits_per_weight)
    table = Table("Export", ("folder", "files, bytes", "quantized weights", "bits per quantized weight"), (row,))
    _print_tables([table], as_json)


@app.command()
def verify(
    exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder of `fraqat export`")],
    against: Annotated[Path, typer.Option(help="The run that it was made from")],
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of inputs that are compared")] = NUM_BATCHES,
    prompt: Annotated[
        str | None, typer.Option(help="Sample this too, with original, student and export, into RUN/verify/TARGET")
    ] = None,
    show_layers: Annotated[bool, typer.Option("--layers", help="Print a row for every layer")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run an export in its target's own runtime beside the trained student. Exit code 7 if a bound does not hold."""
    found = workflows.verify(
        exported, RunFolder.open(against), _progress(quiet), num_batches=num_batches, prompt=prompt
    )
    tables = [found.summary, found.layers] if show_layers or as_json else [found.summary]
    _print_tables(tables, as_json, holds=found.holds, samples=[str(path) for path in found.samples])
    for path in () if as_json else found.samples:
        _output.print(printable(str(path), ""), markup=False)
    if not found.holds:
        raise VerificationError(
            f"{exported} does not compute what was trained within the bounds of its target; the first layer that parts is "
            f"{found.first_difference or 'none by itself'}. Fix: export again; `--layers` shows every layer."
        )


@app.command()
def targets(as_json: JsonOption = False) -> None:
    """List the targets of `fraqat export` and of a recipe's `target:`."""
    rows = tuple((t.name, t.summary, ", ".join(t.tasks), t.extra or None) for t in TARGETS.values())
    _print_tables([Table("Targets", ("name", "what it is", "models", "extra to install"), rows)], as_json)


@app.command()
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Where to, instead of RUN/report.html")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write one self-contained HTML page about an evaluated run."""
    _output.print(str(workflows.report(RunFolder.open(run), out=out, overwrite=overwrite)), markup=False)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Run, export, recipe, pipeline folder, hub id or zoo:NAME")],
    as_json: JsonOption = False,
) -> None:
    """Show the layers of a run, an export, a recipe or a model."""
    _print_tables([workflows.inspect(source)], as_json)


def _progress(quiet: bool) -> ConsoleProgress:
    return _shown.enter_context(ConsoleProgress(_errors, quiet))


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise config_error(option, text, allowed="numbers with commas between them", fix="write 1e-4,3e-4") from None


def _print_dry_run(recipe: Recipe, as_json: bool) -> None:
    stages, layers = workflows.stages(recipe), workflows.layers(recipe).to_table()
    if as_json:
        values = {"recipe": recipe.to_values(), "stages": stages.to_json(), "layers": layers.to_json()}
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
        return
    sys.stdout.write(recipe.to_yaml() + "\n")
    _print_tables([stages, layers], as_json)


def _result_table(run: RunFolder) -> Table:
    rows: list[tuple[Any, ...]] = []
    for label, method in run.methods().items():
        result = method.read_json(method.result_path)
        rows.append((label, result["num_steps"], round(result["train_s"], 1), result["validation_loss"]))
    return Table(f"Trained in {run.path}", ("method", "steps", "train, s", "held-out distillation loss"), tuple(rows))


def _print_tables(tables: list[Table], as_json: bool, **extra: Any) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"tables": [table.to_json() for table in tables], **extra}, indent=2) + "\n")
        return
    if not _output.is_terminal:
        sys.stdout.write("\n\n".join(str(table) for table in tables) + "\n")
        return
    for table in tables:
        print_table(_output, table)


def _version(value: bool) -> None:
    if value:
        _output.print(f"fraqat {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version")
    ] = False,
) -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="(diffusers|transformers|huggingface_hub)")
    warnings.filterwarnings(
        "ignore", message="The `local_dir_use_symlinks` argument"
    )  # diffusers' own, for every hub id
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # RMS norms under autocast
    for category in _SHOWN_WARNINGS:
        warnings.filterwarnings("always", category=category)
    shown_by_python = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **where: Any) -> None:
        if issubclass(category, _SHOWN_WARNINGS):
            _errors.print(f"warning: {printable(str(message))}", style="yellow", markup=False)
        else:
            shown_by_python(message, category, *place, **where)

    warnings.showwarning = show


def main() -> None:
    """Runs the command line; errors that a user can mend become one message and an exit code."""
    try:
        with _shown:
            app()
    except FraqatError as error:
        _errors.print(f"error: {printable(str(error))}", style="red", markup=False)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == _CTRL_C:  # of typer, which says nothing about it
            _errors.print("stopped", style="red")
        raise
    except KeyboardInterrupt:
        _errors.print("stopped", style="red")
        sys.exit(_CTRL_C)


if __name__ == "__main__":
    main()
