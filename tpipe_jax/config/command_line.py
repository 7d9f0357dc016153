"""The command line of each program: its flags, examples, and rules that join flags. No jax."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tpipe_jax.config.arguments import flag_names, read_flags
from tpipe_jax.config.config_files import (
    RUN_FILE,
    check_block_is_named,
    find_config,
    load_config,
    with_named_places,
)
from tpipe_jax.config.flags import (
    CheckpointsFlags,
    CompileFlags,
    DoctorFlags,
    EvaluateFlags,
    ExportFlags,
    FilePlanFlags,
    Flags,
    GenerateFlags,
    GpuPlanFlags,
    ImportFlags,
    PlanFlags,
    PlotFlags,
    ProcessFlags,
    TokenizeFlags,
)
from tpipe_jax.config.own_runs import PLACES
from tpipe_jax.errors import UserError

DEFAULT_CONFIG = "quickstart"

AnyRunFlags = TypeVar("AnyRunFlags", Flags, PlanFlags, GpuPlanFlags, DoctorFlags, CompileFlags)

# Settings that name files or places, of those commands that do not use all of them. What writes a
# config.json uses all: it would make the user's own what a stranger's file names.
_USED: dict[type, tuple[str, ...]] = {
    GpuPlanFlags: ("plan.file",),
    CompileFlags: ("plan.file",),
    DoctorFlags: (),
}


def parse(args: Sequence[str], program: str) -> Flags:
    """Reads the command line of a run. Prints help and exits if asked to.

    Raises `UserError` for a config file that cannot be used or a setting out of its range.
    """
    examples = (
        "",
        "--workdir=runs/mine --config.data.train=book.txt --config.train.num-steps=2000",
        "--workdir=runs/mine --config.optim.learning-rate=3e-4",
    )
    flags = _parse_run(Flags, args, program, examples)
    _check_processes(flags.processes)
    return flags


def parse_plan(args: Sequence[str], program: str) -> PlanFlags | GpuPlanFlags | FilePlanFlags:
    """Reads the command line of planning: from measurements on devices, for GPUs that are not here,
    or from a file.

    Raises `UserError` for a value out of its range, and for flags that contradict each other.
    """
    examples = (
        "--config=quickstart",
        "--config=gpt3_13b --gpu=a100 --hosts=40",
        "--config=gpt3_1b --gpu=h100 --hosts=8 --config.mesh=auto --tokens=300e9",
        "--latency=runs/quickstart/latency.json --num-stages=4 --batch-size=1 --seq-len=1024",
    )
    given = [word.partition("=")[0].replace("_", "-") for word in args]
    if {"--gpu", "--latency"} <= set(given):
        raise UserError("--gpu and --latency plan from different times: leave one of them out.")
    if "--gpu" in given:
        if "--help" in given or "-h" in given:
            args = ["--help"]
        return _parse_run(GpuPlanFlags, args, program, examples[1:3])
    if "--latency" not in given:
        for flag in given:
            for kind, form in ((GpuPlanFlags, "--gpu=NAME"), (FilePlanFlags, "--latency=FILE")):
                if flag in set(flag_names(kind)) - set(flag_names(PlanFlags)):
                    raise UserError(
                        f"{flag} goes with {form}, which plans without devices: add that, or "
                        f"set config.*, as {program} --help lists."
                    )
        measured = _parse_run(PlanFlags, args, program, examples)
        _check_processes(measured.processes)
        return measured
    if "--help" in args or "-h" in args:
        args = ["--help"]
    flags = read_flags(FilePlanFlags, args, program, examples)
    is_interleaved = flags.schedule in ("auto", "interleaved")
    if flags.chunks is not None and not is_interleaved:
        raise UserError(
            f"--chunks={flags.chunks} is for --schedule=interleaved: leave one of the two out."
        )
    factors = flags.stage_factors
    if factors and (len(factors) != flags.num_stages or not all(0 < a < math.inf for a in factors)):
        raise UserError(
            f"--stage-factors must be {flags.num_stages} positive numbers, one for each stage: "
            f"they are {' '.join(map(str, factors))}."
        )
    return flags


def parse_generate(args: Sequence[str], program: str) -> GenerateFlags:
    """Reads the command line of generation. Raises `UserError` for unusable values."""
    run = "--workdir=runs/quickstart"
    examples = (
        f'{run} --prompt="The for statement"',
        f'{run} --prompt="The for statement" --temperature=0 --max-tokens=50',
        "--workdir=runs/gpt2 --prompt-ids=464,3290",
    )
    flags = read_flags(GenerateFlags, args, program, examples)
    if [flags.prompt, flags.prompt_ids, flags.prompt_file].count(None) != 2:
        raise UserError(
            "give a text to continue, with either --prompt, --prompt-file or --prompt-ids."
        )
    if flags.num_samples > 1 and flags.temperature == 0:
        raise UserError(
            f"--num-samples={flags.num_samples} would all be the same, since --temperature=0 "
            "always takes the most likely token: leave out one of them."
        )
    return flags


def parse_evaluate(args: Sequence[str], program: str) -> EvaluateFlags:
    """Reads the command line of an evaluation. Raises `UserError` for unusable values."""
    run = "--workdir=runs/quickstart"
    return read_flags(
        EvaluateFlags,
        args,
        program,
        (run, f"{run} --data=book.txt", f"{run} --step=300 --mesh.pipe=2"),
    )


def parse_convert(args: Sequence[str], program: str) -> ImportFlags | ExportFlags | None:
    """Reads the command line of a conversion, whose first word is `import` or `export`.

    Prints help on both and returns None if neither is named and help is asked for.
    """
    kinds = {"import": ImportFlags, "export": ExportFlags}
    examples = {
        "import": (
            "--from=gpt2 --workdir=runs/gpt2",
            "--from=models/gpt2-medium --workdir=runs/medium",
            "--from=trained --workdir=runs/again",
        ),
        "export": (
            "--workdir=runs/mine --to=trained",
            "--workdir=runs/mine --to=trained --step=500",
            "--workdir=runs/mine --to=trained --tokenizer=shards/tokenizer.json",
        ),
    }
    first = args[0] if args else ""
    if first in kinds:
        return read_flags(kinds[first], args[1:], f"{program} {first}", examples[first])
    if first in ("-h", "--help"):
        print("Exchanges weights with the folders of Hugging Face's GPT-2.\n\nExamples:")
        for word, lines in examples.items():
            print("\n".join(f"    {program} {word} {line}" for line in lines[:2]))
        print(f"\n{program} import --help and {program} export --help list the flags.")
        return None
    got = f"not {first}" if first else "and there is none"
    raise UserError(f"the first word must be import or export, {got}: see {program} --help.")


def parse_tokenize(args: Sequence[str], program: str) -> TokenizeFlags:
    """Reads the command line of tokenizing. Raises `UserError` for unusable values."""
    examples = (
        "--out=shards --train-bpe=32000 texts/",
        "--out=shards --tokenizer=tokenizer.json texts/ more.jsonl",
        "--out=shards --field=content code.parquet",
    )
    flags = read_flags(TokenizeFlags, args, program, examples)
    if not flags.inputs:
        raise UserError("there is nothing to tokenize: name files or folders.")
    if flags.train_bpe is not None and flags.tokenizer != "bytes":
        raise UserError(
            f"--train-bpe={flags.train_bpe} makes a tokenizer, and --tokenizer={flags.tokenizer} "
            "is one: give either."
        )
    return flags


def parse_checkpoints(args: Sequence[str], program: str) -> CheckpointsFlags:
    """Reads the command line of the list of checkpoints."""
    examples = ("runs/quickstart", "runs/mine", "runs/mine | grep damaged")
    return read_flags(CheckpointsFlags, _positional(args), program, examples)


def parse_plot(args: Sequence[str], program: str) -> PlotFlags:
    """Reads the command line of the picture of losses. Raises `UserError` if no run is named."""
    examples = ("runs/quickstart", "runs/quickstart runs/mine", "runs/* --out=losses.png")
    flags = read_flags(PlotFlags, _positional(args), program, examples)
    if not flags.workdirs:
        raise UserError("there is nothing to draw: name the workdir of a run, or several.")
    return flags


def parse_compile(args: Sequence[str], program: str) -> CompileFlags:
    """Reads the command line of compiling. Raises `UserError` if the devices are not named."""
    slices = "--config.plan.token-slices=uniform:16"
    examples = (
        f"--config=gpt3_175b --gpu=v100 --hosts=48 {slices}",
        "--config=gpt3_13b --gpu=a100 --config.plan.token-slices=704,688,656 --json=program.json",
        f"--tpu=v5e:2x2 --config.mesh.pipe=2 --config.mesh.model=2 {slices}",
    )
    flags = _parse_run(CompileFlags, args, program, examples)
    if (flags.gpu is None) == (flags.tpu is None):
        raise UserError("say what to compile for, with either --gpu=h100 or --tpu=v5e:2x2.")
    if flags.tpu is not None and flags.hosts is not None:
        raise UserError(
            f"--hosts={flags.hosts} is for GPUs, and the topology --tpu={flags.tpu} has its hosts: "
            "leave --hosts out."
        )
    return flags


def parse_doctor(args: Sequence[str], program: str) -> DoctorFlags:
    """Reads the command line of the report on this machine."""
    examples = ("", "--config=gpt3_1b", "--workdir=runs/mine")
    return _parse_run(DoctorFlags, args, program, examples)


def without_option(args: Sequence[str], name: str) -> list[str]:
    """Returns the arguments without `--name=value` or `--name value`; the name may have _ for -."""
    rest, words = [], iter(args)
    for word in words:
        option, is_assigned, _ = word.partition("=")
        if option.replace("_", "-") != f"--{name}":
            rest.append(word)
        elif not is_assigned:
            next(words, None)
    return rest


def _parse_run(
    kind: type[AnyRunFlags], args: Sequence[str], program: str, examples: Sequence[str]
) -> AnyRunFlags:
    """Reads flags that override a config: of --config, else of the run in --workdir, else of the
    quick start.
    """
    name, rest = _take_config(args)
    workdir = _last_value(rest, "--workdir")
    if name is None and workdir is not None and (Path(workdir) / RUN_FILE).is_file():
        name = str(Path(workdir) / RUN_FILE)
    path = find_config(DEFAULT_CONFIG if name is None else name)
    config = load_config(path)
    check_block_is_named(path, config, _last_value(rest, "--config.model.block") is not None)
    named = [s for s in PLACES if _last_value(rest, f"--config.{s.replace('_', '-')}") is not None]
    config = with_named_places(path, config, named, _USED.get(kind, PLACES))
    is_of_run = path.name == RUN_FILE
    default = kind(config, path.parent if is_of_run else Path("runs") / path.stem)
    return read_flags(kind, rest, program, examples, default)


def _check_processes(flags: ProcessFlags) -> None:
    """Raises `UserError` if flags contradict each other."""
    by_hand = [flags.coordinator, flags.num_processes, flags.process_id]
    if flags.local_processes is not None and [*by_hand, flags.local_device_ids] != [None] * 4:
        raise UserError(
            f"--local-processes={flags.local_processes} starts all processes itself: leave out "
            "--coordinator, --num-processes, --process-id and --local-device-ids."
        )
    if flags.coordinator is None or flags.num_processes is None or flags.process_id is None:
        if by_hand != [None] * 3:
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give all three, "
                "or none where a scheduler starts the processes."
            )
        return
    host, _, port = flags.coordinator.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise UserError(
            f"--coordinator={flags.coordinator} is not of the form HOST:PORT, with a port below "
            "65536."
        )
    if not 0 <= flags.process_id < flags.num_processes:
        raise UserError(
            f"--process-id={flags.process_id} must be at least 0 and below "
            f"--num-processes={flags.num_processes}."
        )


def _take_config(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the value of the last --config, if there is one, and all other arguments.

    Among these, --config.mesh=auto is replaced by --config.mesh.auto=True.
    """
    rest = list(args)
    for n, word in enumerate(rest):
        if word == "--config.mesh=auto":
            rest[n] = "--config.mesh.auto=True"
        elif word == "--config.mesh" and rest[n + 1 : n + 2] == ["auto"]:
            rest[n : n + 2] = ["--config.mesh.auto=True"]
    return _last_value(rest, "--config"), without_option(rest, "config")


def _positional(args: Sequence[str]) -> list[str]:
    """Returns the arguments with RUN for --workdir=RUN, which other commands take."""
    workdir = _last_value(args, "--workdir")
    return without_option(args, "workdir") + ([] if workdir is None else [workdir])


def _last_value(args: Sequence[str], flag: str) -> str | None:
    """Returns the value of the last --flag=value or --flag value, spelt with - or _."""
    found, words = None, iter(args)
    for word in words:
        option, is_assigned, value = word.partition("=")
        if option.replace("_", "-") == flag:
            found = value if is_assigned else next(words, "")
    return found
